/* The floor smp, and generation on top of it: which token, with what probability, where text stops. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

static tiny t;
static dsv3_model *model;
static dsv3_session *s;
static dsv3_error e;

static bool open_all(tiny_opts o)
{
    dsv3_session_opts so;
    memset(&so, 0, sizeof so);
    so.n_threads = 1;
    so.max_batch = 16;
    tiny_free(&t);
    model = NULL, s = NULL;
    tiny_build(&t, &o);
    return CHECK_OK(tiny_open(&t, &model, NULL, &e), e) && CHECK_OK(dsv3_session_open(&s, model, &so, &e), e);
}

static void close_all(void)
{
    dsv3_session_close(s);
    dsv3_model_close(model);
    model = NULL, s = NULL;
    tiny_free(&t);
}

/* A model whose hidden state is of no account: every row of the head is zero but the bias-like first column. Logits are then
   in order of that column, nearly the same at every position. Text comes from 289 tokens and 2 added ones. */
static tiny_opts with_text(void)
{
    tiny_opts o = tiny_micro();
    o.vocab = (uint32_t)TINY_N_TOKENS + 9; /* rows that no token has */
    o.tokenizer = true;
    o.max_pos = 512;
    return o;
}

/* ---- the filters, in plain double arithmetic ---- */

typedef struct ranked {
    double p;
    uint32_t id;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = (const ranked *)a, *y = (const ranked *)b;
    return x->p != y->p ? (x->p < y->p ? 1 : -1) : x->id < y->id ? -1 : 1;
}

/* p [n] = the distribution that a token is drawn from. */
static void reference(double *p, const float *logits, uint32_t n, const dsv3_sample_opts *o, const int32_t *held, size_t n_held)
{
    ranked *r = (ranked *)malloc(n * sizeof *r);
    double max = -1e300, sum = 0, at = 0;
    for (uint32_t i = 0; i < n; i++) {
        bool seen = false;
        p[i] = (double)logits[i];
        for (size_t k = 0; k < n_held && !seen; k++)
            seen = held[k] == (int32_t)i;
        if (seen && o->repetition_penalty != 0)
            p[i] = p[i] > 0 ? p[i] / (double)o->repetition_penalty : p[i] * (double)o->repetition_penalty;
        if (seen)
            p[i] -= (double)o->presence_penalty;
        max = p[i] > max ? p[i] : max;
    }
    for (uint32_t i = 0; i < n; i++) {
        p[i] = o->temperature > 0 ? exp((p[i] - max) / (double)o->temperature) : p[i] == max;
        r[i].p = p[i];
        r[i].id = i;
    }
    qsort(r, n, sizeof *r, by_rank);
    for (uint32_t i = o->top_k && o->top_k < n ? o->top_k : n; i < n; i++)
        r[i].p = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += r[i].p;
    for (uint32_t i = 0; i < n && o->top_p > 0; i++) {
        if (at >= sum * (double)o->top_p)
            r[i].p = 0;
        at += r[i].p;
    }
    for (uint32_t i = 0; i < n; i++)
        if (r[i].p < (double)o->min_p * r[0].p)
            r[i].p = 0;
    sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += r[i].p;
    for (uint32_t i = 0; i < n; i++)
        p[r[i].id] = r[i].p / sum;
    free(r);
}

/* Chi-square of counts against p, cells of less than 8 expected thrown together. False, with a message, if it is far off. */
static bool fits(const uint32_t *counts, const double *p, uint32_t n, uint32_t draws)
{
    double chi = 0, small_expected = 0, small_found = 0;
    int cells = -1;
    for (uint32_t i = 0; i < n; i++) {
        double expected = p[i] * draws;
        if (p[i] == 0 && counts[i])
            return test_fail(__FILE__, __LINE__, "token %u was dropped, and drawn %u times", (unsigned)i, (unsigned)counts[i]);
        if (expected < 8) {
            small_expected += expected, small_found += counts[i];
            continue;
        }
        chi += (counts[i] - expected) * (counts[i] - expected) / expected;
        cells++;
    }
    if (small_expected >= 1)
        chi += (small_found - small_expected) * (small_found - small_expected) / small_expected, cells++;
    if (cells < 1)
        return true;
    if (chi > cells + 5 * sqrt(2.0 * cells) + 5)
        return test_fail(__FILE__, __LINE__, "chi-square %.1f of %d cells", chi, cells);
    return true;
}

TEST(draws_follow_the_filters)
{
    static const dsv3_sample_opts cases[] = {
        /* size, temperature, top_k, top_p, min_p, repetition, presence, seed, mask */
        {0, 1.0f, 0, 0, 0, 0, 0, 0, NULL},       {0, 0.6f, 0, 0, 0, 0, 0, 0, NULL},     {0, 2.5f, 0, 0, 0, 0, 0, 0, NULL},      {0, 1.0f, 5, 0, 0, 0, 0, 0, NULL},
        {0, 1.0f, 1, 0, 0, 0, 0, 0, NULL},       {0, 1.0f, 32, 1.0f, 0, 1.0f, 0, 0, NULL}, {0, 1.0f, 0, 0.5f, 0, 0, 0, 0, NULL}, {0, 1.0f, 0, 0.001f, 0, 0, 0, 0, NULL},
        {0, 0.8f, 0, 0.95f, 0, 0, 0, 0, NULL},   {0, 1.0f, 0, 0, 0.3f, 0, 0, 0, NULL},  {0, 1.0f, 0, 0, 1.0f, 0, 0, 0, NULL},   {0, 1.5f, 10, 0.8f, 0.2f, 0, 0, 0, NULL},
        {0, 1.0f, 0, 0, 0, 1.8f, 0, 0, NULL},    {0, 1.0f, 0, 0, 0, 0.5f, 0, 0, NULL},  {0, 1.0f, 0, 0, 0, 0, 1.5f, 0, NULL},   {0, 1.0f, 0, 0, 0, 0, -1.0f, 0, NULL},
        {0, 0.9f, 12, 0.9f, 0.05f, 1.3f, 0.4f, 0, NULL}};
    int32_t ids[6] = {3, 9, 3, 30, 17, 9};
    const float *logits;
    uint32_t draws = TEST_SANITIZED ? 2000 : 20000;
    REQUIRE(open_all(tiny_micro()));
    REQUIRE(CHECK_OK(dsv3_session_append(s, ids, 6, NULL, &e), e) && CHECK_OK(dsv3_session_logits(s, &logits, &e), e));
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        uint32_t counts[32];
        double p[32];
        dsv3_sample_opts o = cases[k];
        memset(counts, 0, sizeof counts);
        reference(p, logits, 32, &o, ids, 6);
        for (uint32_t i = 0; i < draws; i++) {
            dsv3_sample sample;
            o.seed = i + 1000000 * k;
            if (!CHECK_OK(dsv3_session_sample(s, &o, &sample, &e), e))
                break;
            counts[sample.token & 31]++;
        }
        if (!fits(counts, p, 32, draws))
            printf("    case %d\n", (int)k);
    }
    close_all();
}

/* One hundred thousand draws of a full distribution. */
TEST(chi_square)
{
    uint32_t counts[32];
    double p[32];
    dsv3_sample_opts o;
    int32_t id = 21;
    const float *logits;
    memset(counts, 0, sizeof counts);
    memset(&o, 0, sizeof o);
    o.temperature = 1;
    REQUIRE(open_all(tiny_micro()));
    REQUIRE(CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e) && CHECK_OK(dsv3_session_logits(s, &logits, &e), e));
    reference(p, logits, 32, &o, &id, 1);
    for (uint32_t i = 0; i < 100000; i++) {
        dsv3_sample sample;
        o.seed = i;
        dsv3_session_sample(s, &o, &sample, &e);
        counts[sample.token & 31]++;
    }
    CHECK(fits(counts, p, 32, 100000));
    close_all();
}

/* The random numbers themselves: over positions with one seed, and over seeds at one position. */
TEST(uniform_numbers)
{
    uint32_t counts[64], pairs[256];
    double p[256];
    for (int k = 0; k < 2; k++) {
        memset(counts, 0, sizeof counts);
        memset(pairs, 0, sizeof pairs);
        double last = 0;
        for (uint32_t i = 0; i < 100000; i++) {
            double u = k ? dsv3__smp_uniform(7, i) : dsv3__smp_uniform(i, 7);
            CHECK(u >= 0 && u < 1);
            counts[(uint32_t)(u * 64)]++;
            pairs[(uint32_t)(u * 16) * 16 + (uint32_t)(last * 16)]++;
            last = u;
        }
        for (int i = 0; i < 256; i++)
            p[i] = 1.0 / 64;
        CHECK(fits(counts, p, 64, 100000));
        for (int i = 0; i < 256; i++)
            p[i] = 1.0 / 256;
        CHECK(fits(pairs, p, 256, 100000));
    }
    CHECK(dsv3__smp_uniform(1, 2) != dsv3__smp_uniform(2, 1));
    CHECK(dsv3__smp_uniform(0, 0) != 0);
}

/* Promised: the same stream on every platform, in every version. */
TEST(pinned_stream)
{
    static const struct {
        uint64_t seed, position, bits; /* of u * 2^53 */
    } pinned[] = {{0, 0, 5876733520225071u}, {0, 1, 6315957190297641u}, {1, 0, 3316356330981164u}, {42, 7, 6617773565905164u}, {UINT64_MAX, 4096, 7604207566538114u}, {0x9E3779B97F4A7C15ull, 123456, 8882525014884205u}};
    for (size_t i = 0; i < sizeof pinned / sizeof pinned[0]; i++)
        CHECK_EQ_UINT((uint64_t)(dsv3__smp_uniform(pinned[i].seed, pinned[i].position) * 9007199254740992.0), pinned[i].bits);
}

/* Given logits through the private picker: greedy takes the largest, the lowest id of equal ones. */
TEST(greedy)
{
    static const float rows[5][6] = {{0, 3, 1, 3, 2, 3}, {-5, -5, -5, -5, -5, -5}, {-1, -2, -3, -4, -0.5f, -0.5f}, {9, 0, 0, 0, 0, 9}, {-0.0f, 0.0f, 0.0f, -0.0f, 0, 0}};
    static const int32_t expected[5] = {1, 0, 4, 0, 0};
    dsv3_sample_opts o;
    memset(&o, 0, sizeof o);
    for (int k = 0; k < 5; k++)
        for (uint64_t seed = 0; seed < 3; seed++) {
            float logits[6];
            memcpy(logits, rows[k], sizeof logits);
            o.seed = seed;
            CHECK_EQ_INT(dsv3__smp_pick(dsv3__kern_get(DSV3_ISA_SCALAR), logits, 6, &o, seed), expected[k]);
        }
    int32_t id = 5;
    const float *logits;
    dsv3_sample a, b;
    REQUIRE(open_all(tiny_micro()));
    REQUIRE(CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e) && CHECK_OK(dsv3_session_logits(s, &logits, &e), e));
    CHECK_OK(dsv3_session_sample(s, NULL, &a, &e), e);
    for (int i = 0; i < 32; i++)
        CHECK(logits[i] < logits[a.token] || i >= a.token);
    o.top_k = 3, o.top_p = 0.5f, o.min_p = 0.5f, o.seed = 99; /* filters do not touch the likeliest */
    CHECK_OK(dsv3_session_sample(s, &o, &b, &e), e);
    CHECK_EQ_INT(b.token, a.token);
    CHECK_EQ_UINT(dsv3_session_length(s), 1); /* not appended */
    close_all();
}

/* Equal logits: filters that keep a number of tokens keep the lowest ids. */
TEST(ties)
{
    dsv3_sample_opts o;
    uint32_t seen = 0;
    memset(&o, 0, sizeof o);
    o.temperature = 1;
    for (int k = 0; k < 3; k++) {
        o.top_k = k == 0 ? 5 : 0;
        o.top_p = k == 1 ? 0.31f : 0;
        o.min_p = k == 2 ? 1.0f : 0;
        seen = 0;
        for (uint64_t i = 0; i < 2000; i++) {
            float logits[16];
            for (int v = 0; v < 16; v++)
                logits[v] = 2.5f;
            o.seed = i;
            seen |= 1u << dsv3__smp_pick(dsv3__kern_get(DSV3_ISA_SCALAR), logits, 16, &o, 3);
        }
        CHECK_EQ_UINT(seen, k < 2 ? 0x1F : 0xFFFF); /* 5 of 16 is the first sum to reach 0.31 */
    }
}

/* Extreme options and logits neither loop nor leave the vocabulary. */
TEST(extremes)
{
    static const float temperatures[] = {1e-30f, 1e-10f, 0.001f, 1e29f}, values[] = {0, 1e38f, -1e38f, 1e-40f, 3e38f, -3e38f};
    dsv3_sample_opts o;
    memset(&o, 0, sizeof o);
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 6; b++)
            for (uint64_t seed = 0; seed < 20; seed++) {
                float logits[8];
                for (int v = 0; v < 8; v++)
                    logits[v] = v % 3 == 1 ? values[b] : -values[(b + v) % 6] / 2;
                o.temperature = temperatures[a], o.seed = seed;
                o.top_p = seed % 2 ? 0.9f : 0, o.top_k = seed % 3 ? 4 : 0;
                int32_t id = dsv3__smp_pick(dsv3__kern_get(DSV3_ISA_SCALAR), logits, 8, &o, seed);
                CHECK(id >= 0 && id < 8);
            }
    float one[1] = {-7};
    CHECK_EQ_INT(dsv3__smp_pick(dsv3__kern_get(DSV3_ISA_SCALAR), one, 1, &o, 5), 0);
}

/* The result depends on logits, options and position alone: not on how the session came there, nor on what was drawn before. */
TEST(deterministic)
{
    int32_t ids[40];
    dsv3_sample_opts o;
    dsv3_sample a, b;
    unsigned changed = 0;
    memset(&o, 0, sizeof o);
    o.temperature = 1, o.seed = 12345;
    tiny_ids(ids, 40, 32, 5);
    REQUIRE(open_all(tiny_micro()));
    for (size_t n = 1; n <= 40; n++) {
        dsv3_session *other = NULL;
        CHECK_OK(dsv3_session_append(s, ids + n - 1, 1, NULL, &e), e);
        o.seed = 12345;
        CHECK_OK(dsv3_session_sample(s, &o, &a, &e), e);
        CHECK_OK(dsv3_session_sample(s, &o, &b, &e), e);
        CHECK(a.token == b.token && a.logprob == b.logprob);
        CHECK_OK(dsv3_session_open(&other, model, NULL, &e), e);
        CHECK_OK(dsv3_session_append(other, ids, n, NULL, &e), e);
        CHECK_OK(dsv3_session_sample(other, &o, &b, &e), e);
        CHECK(a.token == b.token && a.logprob == b.logprob);
        dsv3_session_close(other);
        o.seed = 54321;
        CHECK_OK(dsv3_session_sample(s, &o, &b, &e), e);
        changed += a.token != b.token;
    }
    CHECK(changed > 25);
    close_all();

    /* One seed, and so hot that logits do not matter: still another number at every position. */
    unsigned seen = 0, n_seen = 0;
    dsv3_generate_opts g;
    memset(&g, 0, sizeof g);
    g.sample.temperature = 1e6f, g.ignore_eos = true, g.max_tokens = 50;
    REQUIRE(open_all(tiny_micro()));
    CHECK_OK(dsv3_session_append(s, ids, 1, NULL, &e), e);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, NULL, &e), e);
    for (size_t i = 1; i < 51; i++)
        seen |= 1u << dsv3_session_tokens(s)[i];
    for (int i = 0; i < 32; i++)
        n_seen += seen >> i & 1;
    CHECK(n_seen > 18);
    close_all();
}

TEST(log_probabilities)
{
    int32_t ids[3] = {7, 8, 9};
    const float *logits;
    dsv3_sample all[32], few[5], sample;
    dsv3_sample_opts o;
    double sum = 0, max = -1e300, total = 0;
    memset(&o, 0, sizeof o);
    REQUIRE(open_all(tiny_micro()));
    CHECK_RESULT(dsv3_session_logprobs(s, 1, all, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    REQUIRE(CHECK_OK(dsv3_session_append(s, ids, 3, NULL, &e), e) && CHECK_OK(dsv3_session_logits(s, &logits, &e), e));
    REQUIRE(CHECK_OK(dsv3_session_logprobs(s, 32, all, &e), e));
    for (int i = 0; i < 32; i++)
        max = (double)logits[i] > max ? (double)logits[i] : max;
    for (int i = 0; i < 32; i++)
        total += exp((double)logits[i] - max);
    for (int i = 0; i < 32; i++) {
        CHECK_NEAR(all[i].logprob, (double)logits[all[i].token] - max - log(total), 2e-6);
        sum += exp((double)all[i].logprob);
        if (i)
            CHECK(logits[all[i - 1].token] > logits[all[i].token] || (logits[all[i - 1].token] == logits[all[i].token] && all[i - 1].token < all[i].token));
    }
    CHECK_NEAR(sum, 1, 1e-5);
    for (size_t k = 1; k <= 5; k++) {
        CHECK_OK(dsv3_session_logprobs(s, k, few, &e), e);
        CHECK_BYTES(few, k * sizeof(dsv3_sample), all, k * sizeof(dsv3_sample));
    }
    CHECK_RESULT(dsv3_session_logprobs(s, 0, all, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_session_logprobs(s, 33, all, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    o.temperature = 3, o.top_k = 4, o.repetition_penalty = 2; /* before any filter */
    for (o.seed = 0; o.seed < 20; o.seed++) {
        CHECK_OK(dsv3_session_sample(s, &o, &sample, &e), e);
        for (int i = 0; i < 32; i++)
            if (all[i].token == sample.token)
                CHECK(all[i].logprob == sample.logprob);
    }
    close_all();
}

/* The first of the likeliest is the greedy token, also where log-probabilities are too coarse to tell two logits apart. */
TEST(log_probabilities_of_close_logits)
{
    float logits[2000];
    dsv3_sample best[3];
    for (int i = 0; i < 2000; i++)
        logits[i] = 0;
    logits[1200] = 0.1f;
    logits[1300] = nextafterf(0.1f, 1);
    logits[1400] = 0.1f;
    dsv3__smp_top(dsv3__kern_get(DSV3_ISA_SCALAR), best, 3, logits, 2000);
    CHECK_EQ_INT(best[0].token, 1300);
    CHECK_EQ_INT(best[1].token, 1200);
    CHECK_EQ_INT(best[2].token, 1400);
}

/* Loops of sixteen and what is left of them; every variant of exp_sum makes the same sum. */
TEST(all_lengths)
{
    static const dsv3_isa isas[] = {DSV3_ISA_SCALAR, DSV3_ISA_AVX2,        DSV3_ISA_AVX_VNNI,    DSV3_ISA_AVX512,
                                    DSV3_ISA_AVX512_VNNI, DSV3_ISA_AVX512_BF16, DSV3_ISA_NEON};
    static float logits[1100], scratch[1100];
    const float inf = dsv3__bits_float(0x7F800000u), nan = dsv3__bits_float(0x7FC00000u);
    const uint32_t saved = dsv3__fp_enter();
    uint64_t state = 5;
    for (uint32_t n = 1; n <= 1100; n = n < 70 ? n + 1 : n + 103) {
        double sum = 0, exact, ours, max = -1e30;
        for (uint32_t i = 0; i < n; i++) {
            logits[i] = (float)(tiny_uniform(&state) * 30 - 20);
            max = (double)logits[i] > max ? (double)logits[i] : max;
        }
        if (n > 2)
            logits[n / 2] = -inf; /* masked */
        for (uint32_t i = 0; i < n; i++)
            sum += exp((double)logits[i] - max);
        exact = max + log(sum), ours = dsv3__smp_log_sum(dsv3__kern_get(DSV3_ISA_SCALAR), logits, n);
        CHECK(fabs(ours - exact) < 1e-6);
        for (size_t k = 0; k < sizeof isas / sizeof isas[0]; k++)
            if (dsv3_isa_supported(isas[k]))
                CHECK(dsv3__smp_log_sum(dsv3__kern_get(isas[k]), logits, n) == ours);
        for (uint32_t at = 0; at < n; at += n < 70 ? 1 : 97) {
            dsv3_sample_opts o;
            memset(&o, 0, sizeof o);
            memcpy(scratch, logits, n * sizeof(float));
            scratch[at] = scratch[n - 1] = 11; /* equals: the first */
            CHECK_EQ_UINT(dsv3__smp_argmax(scratch, n), at);
            CHECK_EQ_INT(dsv3__smp_pick(dsv3__kern_get(DSV3_ISA_SCALAR), scratch, n, &o, 0), at);
            memcpy(scratch, logits, n * sizeof(float));
            scratch[n / 2] = 1;
            CHECK(dsv3__fwd_finite(scratch, n));
            scratch[at] = at % 2 ? inf : nan;
            CHECK(!dsv3__fwd_finite(scratch, n));
        }
    }
    logits[0] = logits[1] = logits[2] = -inf;
    CHECK_EQ_UINT(dsv3__smp_argmax(logits, 3), 0);
    dsv3__fp_leave(saved);
}

TEST(options_out_of_range)
{
    const float inf = dsv3__bits_float(0x7F800000u), nan = dsv3__bits_float(0x7FC00000u);
    int32_t id = 5;
    REQUIRE(open_all(tiny_micro()));
    CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    for (int k = 0; k < 13; k++) {
        dsv3_sample sample;
        dsv3_sample_opts o;
        dsv3_generate_opts g;
        memset(&o, 0, sizeof o);
        memset(&g, 0, sizeof g);
        o.temperature = 1;
        switch (k) {
        case 0: o.temperature = -1; break;
        case 1: o.temperature = nan; break;
        case 2: o.temperature = inf; break;
        case 3: o.top_p = -0.1f; break;
        case 4: o.top_p = 1.1f; break;
        case 5: o.top_p = nan; break;
        case 6: o.min_p = -0.1f; break;
        case 7: o.min_p = 1.5f; break;
        case 8: o.repetition_penalty = -1; break;
        case 9: o.repetition_penalty = nan; break;
        case 10: o.presence_penalty = inf; break;
        case 11: o.presence_penalty = nan; break;
        default: o.struct_size = (uint32_t)sizeof o + 1; break;
        }
        if (!CHECK_RESULT(dsv3_session_sample(s, &o, &sample, &e), DSV3_ERROR_INVALID_OPTIONS, e))
            printf("    case %d\n", k);
        g.sample = o, g.max_tokens = 1;
        CHECK_RESULT(dsv3_generate(s, NULL, 0, &g, NULL, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_EQ_UINT(dsv3_session_length(s), 1);
    }
    close_all();
}

/* ---- generation ---- */

typedef struct taken {
    int32_t ids[600];
    float logprobs[600];
    size_t n;            /* tokens */
    size_t n_calls;
    char text[8192];
    size_t len;
    size_t before[600];  /* length of the text before token i was handed over, and with it */
    size_t after[600];
    size_t stop_after;   /* say stop at this call; 0: never */
    bool cancel;         /* cancel instead */
    bool bad;            /* a partial character, a call behind the last */
    bool ended;
} taken;

static bool take(void *user, const dsv3_token *token)
{
    taken *x = (taken *)user;
    const char *p = token->text, *end = token->text + token->len;
    x->bad |= x->ended || x->n >= 600 || x->len + token->len > sizeof x->text;
    if (x->bad)
        return false;
    while (p < end) { /* whole, well-formed characters */
        size_t n = dsv3__utf8_length(p, end);
        x->bad |= n == 0;
        p += n ? n : 1;
    }
    if (token->id == -1) {
        x->ended = true;
        x->bad |= token->len == 0;
    } else {
        x->before[x->n] = x->len;
        x->logprobs[x->n] = token->logprob;
        x->ids[x->n++] = token->id;
    }
    memcpy(x->text + x->len, token->text, token->len);
    x->len += token->len;
    if (token->id != -1)
        x->after[x->n - 1] = x->len;
    x->n_calls++;
    if (x->stop_after && x->n_calls == x->stop_after) {
        if (!x->cancel)
            return false;
        dsv3_session_cancel(s);
    }
    return true;
}

static taken got;

/* Options with everything on but what the test says. */
static dsv3_generate_opts gen_opts(uint32_t max_tokens, float temperature, uint64_t seed)
{
    dsv3_generate_opts g;
    memset(&g, 0, sizeof g);
    memset(&got, 0, sizeof got);
    g.max_tokens = max_tokens;
    g.sample.temperature = temperature;
    g.sample.seed = seed;
    g.ignore_eos = true;
    g.token_fn = take;
    g.user = &got;
    return g;
}

/* A session that holds these words, and their number of tokens. */
static size_t fresh(const char *prompt)
{
    const dsv3_tokenizer *tok;
    int32_t ids[200];
    size_t n = 0;
    CHECK_OK(dsv3_session_rewind(s, 0, &e), e);
    CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e);
    CHECK_OK(dsv3_tokenize(tok, prompt, strlen(prompt), DSV3_TOKENIZE_BOS, ids, 200, &n, &e), e);
    CHECK_OK(dsv3_session_append(s, ids, n, NULL, &e), e);
    return n;
}

TEST(generate_is_sample_and_append)
{
    for (int k = 0; k < 2; k++) {
        dsv3_stats stats;
        int32_t ids[30];
        float logprobs[30];
        REQUIRE(open_all(tiny_micro()));
        int32_t start[3] = {4, 5, 6};
        dsv3_generate_opts g = gen_opts(30, k ? 1.0f : 0, 77);
        CHECK_OK(dsv3_session_append(s, start, 3, NULL, &e), e);
        for (int i = 0; i < 30; i++) {
            dsv3_sample sample;
            CHECK_OK(dsv3_session_sample(s, &g.sample, &sample, &e), e);
            ids[i] = sample.token, logprobs[i] = sample.logprob;
            CHECK_OK(dsv3_session_append(s, &sample.token, 1, NULL, &e), e);
        }
        CHECK_OK(dsv3_session_rewind(s, 3, &e), e);
        CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e); /* no tokenizer here: ids go round without text */
        CHECK_EQ_UINT(got.n, 30);
        CHECK_BYTES(got.ids, 30 * 4, ids, 30 * 4);
        CHECK_BYTES(got.logprobs, 30 * 4, logprobs, 30 * 4);
        CHECK_EQ_UINT(got.len, 0);
        CHECK(!got.bad && !got.ended);
        CHECK_EQ_UINT(dsv3_session_length(s), 33);
        CHECK_BYTES(dsv3_session_tokens(s) + 3, 30 * 4, ids, 30 * 4);
        CHECK_EQ_UINT(stats.n_prompt, 0);
        CHECK_EQ_UINT(stats.n_generated, 30);
        CHECK_EQ_INT(stats.stop, DSV3_STOP_MAX_TOKENS);
        CHECK(stats.decode_seconds > 0 && stats.decode_seconds < 60 && stats.prompt_seconds >= 0);
        close_all();
    }
}

TEST(generate_until_the_context_is_full)
{
    dsv3_stats stats;
    int32_t start[3] = {4, 5, 6};
    REQUIRE(open_all(tiny_micro())); /* 64 positions */
    dsv3_generate_opts g = gen_opts(0, 0, 0);
    CHECK_OK(dsv3_session_append(s, start, 3, NULL, &e), e);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
    CHECK_EQ_INT(stats.stop, DSV3_STOP_CONTEXT);
    CHECK_EQ_UINT(dsv3_session_length(s), 64);
    CHECK(stats.n_generated == 61 || stats.n_generated == 62); /* one more may be told, and find no room */
    CHECK_EQ_UINT(got.n, stats.n_generated);
    CHECK_BYTES(dsv3_session_tokens(s) + 3, 61 * 4, got.ids, 61 * 4);
    g = gen_opts(0, 0, 0);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
    CHECK_EQ_INT(stats.stop, DSV3_STOP_CONTEXT);
    CHECK(stats.n_generated <= 1);
    CHECK_EQ_UINT(dsv3_session_length(s), 64);
    close_all();
}

TEST(generate_stops_at_tokens)
{
    dsv3_stats stats;
    int32_t start[3] = {4, 5, 6}, all[40];
    REQUIRE(open_all(tiny_micro()));
    CHECK_OK(dsv3_session_append(s, start, 3, NULL, &e), e);
    dsv3_generate_opts g = gen_opts(40, 1, 3);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
    memcpy(all, got.ids, sizeof all);
    for (size_t k = 0; k < 40; k += 7) {
        int32_t stops[2];
        size_t first = 0;
        stops[0] = 9999, stops[1] = all[k];
        while (all[first] != all[k])
            first++;
        CHECK_OK(dsv3_session_rewind(s, 3, &e), e);
        g = gen_opts(40, 1, 3);
        g.stop_tokens = stops, g.n_stop_tokens = 2;
        CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
        CHECK_EQ_INT(stats.stop, DSV3_STOP_TOKEN);
        CHECK_EQ_UINT(stats.n_generated, first + 1);
        CHECK_EQ_UINT(dsv3_session_length(s), 3 + first + 1); /* the token that stops is in the session */
        CHECK_BYTES(dsv3_session_tokens(s) + 3, (first + 1) * 4, all, (first + 1) * 4);
    }
    dsv3_model_close(NULL);
    close_all();
    /* the checkpoint's own end: any id that greedy text comes to */
    char value[16];
    tiny_opts o = tiny_micro();
    tiny_free(&t);
    tiny_build(&t, &o);
    snprintf(value, sizeof value, "%d", (int)all[9]);
    tiny_set(&t, "config.json", "eos_token_id", value);
    model = NULL, s = NULL;
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e) && CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e));
    CHECK_OK(dsv3_session_append(s, start, 3, NULL, &e), e);
    g = gen_opts(40, 1, 3);
    g.ignore_eos = false;
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
    CHECK_EQ_INT(stats.stop, DSV3_STOP_EOS);
    CHECK(stats.n_generated <= 10);
    CHECK_EQ_INT(dsv3_session_tokens(s)[dsv3_session_length(s) - 1], got.ids[got.n - 1]);
    close_all();
}

TEST(generate_stops_when_told)
{
    dsv3_stats stats;
    int32_t start[3] = {4, 5, 6};
    REQUIRE(open_all(tiny_micro()));
    CHECK_OK(dsv3_session_append(s, start, 3, NULL, &e), e);
    for (size_t k = 1; k <= 3; k++) {
        CHECK_OK(dsv3_session_rewind(s, 3, &e), e);
        dsv3_generate_opts g = gen_opts(40, 1, 3);
        got.stop_after = k;
        CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
        CHECK_EQ_INT(stats.stop, DSV3_STOP_CALLBACK);
        CHECK_EQ_UINT(stats.n_generated, k);
        CHECK_EQ_UINT(dsv3_session_length(s), 3 + k);
        CHECK(!got.bad);

        CHECK_OK(dsv3_session_rewind(s, 3, &e), e);
        g = gen_opts(40, 1, 3);
        got.stop_after = k, got.cancel = true;
        CHECK_RESULT(dsv3_generate(s, NULL, 0, &g, &stats, &e), DSV3_ERROR_CANCELLED, e);
        CHECK_EQ_INT(stats.stop, DSV3_STOP_CANCELLED);
        CHECK_EQ_UINT(stats.n_generated, got.n);
        CHECK_EQ_UINT(dsv3_session_length(s), 3 + got.n); /* what was generated stays */
        CHECK_BYTES(dsv3_session_tokens(s) + 3, got.n * 4, got.ids, got.n * 4);
    }
    close_all();
}

TEST(generate_with_nothing_to_go_on_from)
{
    dsv3_stats stats;
    REQUIRE(open_all(tiny_micro()));
    memset(&stats, 0x55, sizeof stats);
    CHECK_RESULT(dsv3_generate(s, NULL, 0, NULL, &stats, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK(stats.n_prompt == 0 && stats.n_generated == 0 && stats.stop == DSV3_STOP_NONE); /* filled on failure too */
    CHECK_RESULT(dsv3_generate(s, "words", 5, NULL, &stats, &e), DSV3_ERROR_TOKENIZER, e);
    CHECK_CONTAINS(e.message, "tokenizer.json");
    CHECK_EQ_UINT(dsv3_session_length(s), 0);
    close_all();
}

#ifndef DSV3_NO_TOKENIZER
TEST(prompts)
{
    const dsv3_tokenizer *tok;
    dsv3_stats stats;
    int32_t ids[100];
    size_t n;
    static const char prompt[] = "the thing and " TINY_USER " the other";
    REQUIRE(open_all(with_text()));
    REQUIRE(CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e));
    for (int k = 0; k < 4; k++) { /* BOS in front or not, markers as ids or as text */
        dsv3_generate_opts g = gen_opts(2, 0, 0);
        g.no_bos = (k & 1) != 0;
        g.parse_markers = (k & 2) != 0;
        CHECK_OK(dsv3_tokenize(tok, prompt, sizeof prompt - 1, (k & 1 ? 0 : (uint32_t)DSV3_TOKENIZE_BOS) | (k & 2 ? (uint32_t)DSV3_TOKENIZE_MARKERS : 0), ids, 100, &n, &e), e);
        CHECK_EQ_INT(ids[0] == 0, k % 2 == 0);
        CHECK_OK(dsv3_session_rewind(s, 0, &e), e);
        CHECK_OK(dsv3_generate(s, prompt, sizeof prompt - 1, &g, &stats, &e), e);
        CHECK_EQ_UINT(stats.n_prompt, n);
        CHECK_EQ_UINT(stats.n_generated, 2);
        CHECK_EQ_UINT(dsv3_session_length(s), n + 2);
        CHECK_BYTES(dsv3_session_tokens(s), n * 4, ids, n * 4);
        CHECK_OK(dsv3_generate(s, "the", 3, &g, &stats, &e), e); /* no BOS in the middle */
        CHECK_EQ_UINT(stats.n_prompt, 1);
        CHECK_EQ_INT(dsv3_session_tokens(s)[n + 2], 262);
    }
    CHECK_OK(dsv3_session_rewind(s, 0, &e), e); /* the BOS alone is something to go on from */
    dsv3_generate_opts g = gen_opts(1, 0, 0);
    CHECK_OK(dsv3_generate(s, "", 0, &g, &stats, &e), e);
    CHECK_EQ_UINT(stats.n_prompt, 1);
    CHECK_OK(dsv3_session_rewind(s, 0, &e), e);
    g.no_bos = true;
    CHECK_RESULT(dsv3_generate(s, "", 0, &g, &stats, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    char *longest = (char *)malloc(600);
    memset(longest, '~', 600);
    CHECK_RESULT(dsv3_generate(s, longest, 600, &g, &stats, &e), DSV3_ERROR_CONTEXT_FULL, e);
    CHECK_EQ_UINT(dsv3_session_length(s), 0);
    free(longest);
    close_all();
}

/* All that is handed out, put together, is the text of the tokens; whole characters only. */
TEST(text_is_whole)
{
    const dsv3_tokenizer *tok;
    unsigned replaced = 0;
    REQUIRE(open_all(with_text()));
    REQUIRE(CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e));
    size_t n = fresh("on and on");
    for (uint64_t seed = 0; seed < 40; seed++) {
        char text[8192];
        size_t len = 0;
        dsv3_stats stats;
        CHECK_OK(dsv3_session_rewind(s, n, &e), e);
        dsv3_generate_opts g = gen_opts(120, 3, seed); /* hot: half of it are lonely bytes */
        CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
        CHECK(!got.bad);
        CHECK_EQ_UINT(got.n, 120);
        CHECK_OK(dsv3_detokenize(tok, got.ids, got.n, 0, text, sizeof text, &len, &e), e);
        if (!CHECK_BYTES(got.text, got.len, text, len))
            printf("    seed %d\n", (int)seed);
        for (size_t i = 0; i + 3 <= len; i++)
            replaced += memcmp(text + i, "\xef\xbf\xbd", 3) == 0;
        for (size_t i = 0; i < got.n; i++)
            CHECK(got.ids[i] < TINY_N_TOKENS); /* rows without a token are not drawn */
    }
    CHECK(replaced > 100);
    close_all();
}

/* Stop strings: the text ends before the first one, wherever tokens are cut; what merely began like one comes out. */
TEST(stop_strings)
{
    REQUIRE(open_all(with_text()));
    size_t n = fresh("the"), spanning = 0;
    for (uint64_t seed = 0; seed < 12; seed++) {
        taken whole;
        dsv3_stats stats;
        uint64_t random = seed;
        CHECK_OK(dsv3_session_rewind(s, n, &e), e);
        dsv3_generate_opts g = gen_opts(60, 1.5f, seed);
        CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
        whole = got;
        REQUIRE(CHECK(whole.len > 30));
        for (int k = 0; k < 30; k++) {
            char words[3][32]; /* 6 characters and the end */
            const char *stops[3];
            size_t first = whole.len, n_stops = 1 + (size_t)(k % 3);
            for (size_t w = 0; w < n_stops; w++) { /* pieces of the very text, of 1 ... 6 characters, begun anywhere */
                size_t at = tiny_next(&random) % (whole.len - 26), len = 0, n_chars = 1 + tiny_next(&random) % 6;
                while (((unsigned char)whole.text[at] & 0xC0) == 0x80)
                    at++;
                for (size_t i = 0; i < n_chars; i++)
                    len += dsv3__utf8_length(whole.text + at + len, whole.text + whole.len);
                memcpy(words[w], whole.text + at, len);
                words[w][len] = 0;
                for (size_t i = 0; i < len; i++) /* a NUL ends a stop string */
                    if (!words[w][i])
                        words[w][0] = '~', words[w][1] = 0;
                stops[w] = words[w];
            }
            for (size_t token = 0; token <= whole.n && first == whole.len; token++) { /* found as soon as it is whole */
                size_t known = token < whole.n ? whole.after[token] : whole.len;
                for (size_t w = 0; w < n_stops; w++)
                    for (size_t i = 0; i + strlen(words[w]) <= known && i < first; i++)
                        if (memcmp(whole.text + i, words[w], strlen(words[w])) == 0)
                            first = i;
            }
            CHECK_OK(dsv3_session_rewind(s, n, &e), e);
            g = gen_opts(60, 1.5f, seed);
            g.stop_strings = stops, g.n_stop_strings = n_stops;
            CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
            if (first == whole.len) { /* the ~ that never came */
                CHECK_EQ_INT(stats.stop, DSV3_STOP_MAX_TOKENS);
                CHECK_BYTES(got.text, got.len, whole.text, whole.len);
                continue;
            }
            bool ok = CHECK_BYTES(got.text, got.len, whole.text, first);
            if (ok && got.n < 60)
                CHECK_EQ_INT(stats.stop, DSV3_STOP_STRING);
            CHECK(!got.bad && !got.ended);
            CHECK_BYTES(got.ids, got.n * 4, whole.ids, got.n * 4);
            CHECK_EQ_UINT(dsv3_session_length(s), n + got.n);
            spanning += got.n > 1 && got.n < 60 && whole.before[got.n - 1] > first;
            if (!ok)
                printf("    seed %d, \"%s\"\n", (int)seed, words[0]);
        }
    }
    CHECK(spanning > 20); /* the string began in a token before the last */
    const char *empty[1] = {""};
    dsv3_generate_opts g = gen_opts(1, 0, 0);
    g.stop_strings = empty, g.n_stop_strings = 1;
    CHECK_RESULT2(dsv3_generate(s, NULL, 0, &g, NULL, &e), DSV3_ERROR_INVALID_OPTIONS, DSV3_ERROR_INVALID_ARGUMENT, e);
    close_all();
}

/* Halves of characters as stop strings: refused, or found; no half of a character is handed out either way. */
TEST(stop_strings_that_are_no_text)
{
    static const char *const stops[] = {"\x80", "\x98\x80", "\xbf", "\xbd", "\xef\xbf", "\xc3"};
    REQUIRE(open_all(with_text()));
    size_t n = fresh("the");
    for (uint64_t seed = 0; seed < 12; seed++) {
        dsv3_stats stats;
        CHECK_OK(dsv3_session_rewind(s, n, &e), e);
        dsv3_generate_opts g = gen_opts(60, 3, seed);
        g.stop_strings = &stops[seed % 6], g.n_stop_strings = 1;
        dsv3_result r = dsv3_generate(s, NULL, 0, &g, &stats, &e);
        CHECK(r == DSV3_OK || r == DSV3_ERROR_INVALID_OPTIONS);
        CHECK(!got.bad);
    }
    close_all();
}

/* A marker that stops is not text; one that does not stop is. */
TEST(the_text_of_a_stop_token)
{
    dsv3_stats stats;
    REQUIRE(open_all(with_text()));
    size_t n = fresh("the"), len;
    dsv3_generate_opts g = gen_opts(20, 1.5f, 4);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
    int32_t stop = got.ids[10];
    size_t first = 0;
    const dsv3_tokenizer *tok;
    char text[1000];
    while (got.ids[first] != stop)
        first++;
    CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e);
    CHECK_OK(dsv3_detokenize(tok, got.ids, first, 0, text, sizeof text, &len, &e), e);
    CHECK_OK(dsv3_session_rewind(s, n, &e), e);
    g = gen_opts(20, 1.5f, 4);
    g.stop_tokens = &stop, g.n_stop_tokens = 1;
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, &stats, &e), e);
    CHECK_EQ_INT(stats.stop, DSV3_STOP_TOKEN);
    CHECK_EQ_UINT(got.n, first + 1);
    CHECK_BYTES(got.text, got.len, text, len);
    close_all();
}

#define TEXT_TESTS RUN(prompts), RUN(text_is_whole), RUN(stop_strings), RUN(stop_strings_that_are_no_text), RUN(the_text_of_a_stop_token)
#else
TEST(text)
{
    SKIP("built without the tokenizer");
}

#define TEXT_TESTS RUN(text)
#endif

TEST_MAIN(RUN(draws_follow_the_filters), RUN(chi_square), RUN(uniform_numbers), RUN(pinned_stream), RUN(greedy), RUN(ties), RUN(extremes),
          RUN(deterministic), RUN(log_probabilities), RUN(log_probabilities_of_close_logits), RUN(all_lengths), RUN(options_out_of_range),
          RUN(generate_is_sample_and_append), RUN(generate_until_the_context_is_full), RUN(generate_stops_at_tokens),
          RUN(generate_stops_when_told), RUN(generate_with_nothing_to_go_on_from), TEXT_TESTS)
