/* The floors fwd and ses through the public calls: the same bits however rows are cut and who computes them; a failed
   call changes nothing; nothing is allocated once a session is open. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#define N 24 /* tokens of a timeline, where nothing else is said */

static tiny t;
static dsv3_model *model;
static dsv3_error e;

static bool open_model(tiny_opts o, dsv3_isa isa)
{
    dsv3_model_opts opts;
    memset(&opts, 0, sizeof opts);
    opts.isa = isa;
    tiny_free(&t);
    model = NULL;
    tiny_build(&t, &o);
    return CHECK_OK(tiny_open(&t, &model, &opts, &e), e);
}

static void close_model(void)
{
    dsv3_model_close(model);
    model = NULL;
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

static dsv3_session *open_session(uint32_t max_batch, uint32_t n_threads)
{
    dsv3_session *s = NULL;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.max_tokens = 64;
    o.max_batch = max_batch;
    o.n_threads = n_threads;
    CHECK_OK(dsv3_session_open(&s, model, &o, &e), e);
    return s;
}

static size_t row_size(void)
{
    return dsv3_model_config(model)->vocab_size * sizeof(float);
}

static size_t expert_row(void)
{
    const dsv3_config *c = dsv3_model_config(model);
    return (size_t)(c->num_hidden_layers - c->first_k_dense_replace) * c->num_experts_per_tok;
}

/* Appends all, the logits of each row into logits [n, vocab], the experts into experts [n, expert_row] (may be NULL). */
static bool run(dsv3_session *s, const int32_t *ids, size_t n, float *logits, int32_t *experts)
{
    dsv3_outputs out;
    memset(&out, 0, sizeof out);
    out.logits = logits;
    out.experts = experts;
    return CHECK_OK(dsv3_session_append(s, ids, n, &out, &e), e);
}

/* The session's own logits, which must be these. */
static bool check_logits(dsv3_session *s, const float *expected)
{
    const float *logits = NULL;
    return CHECK_OK(dsv3_session_logits(s, &logits, &e), e) && CHECK_BYTES(logits, row_size(), expected, row_size());
}

/* The variants that are run everywhere below. */
static tiny_opts variant(int k)
{
    tiny_opts o = k == 0 ? tiny_default() : k == 1 ? tiny_blocks() : k == 2 ? tiny_v2() : tiny_micro();
    o.tokenizer = false;
    if (k == 0)
        o.vocab = 192;
    if (k == 2)
        o.n_experts = 16, o.n_group = 4, o.topk_group = 2;
    if (k == 3)
        o.dtype = DSV3_DTYPE_F16, o.tie = true;
    if (k == 4)
        o.dtype = DSV3_DTYPE_F32, o.half_split = true;
    if (k == 5)
        o.dtype = DSV3_DTYPE_BF16, o.n_shared = 0, o.odd = true;
    return o;
}

#define N_VARIANTS 6

TEST(same_bits_for_rows_threads_and_kernels)
{
    static const uint32_t batches[] = {1, 7, 512}, threads[] = {1, 2, 3, 8};
    for (int k = 0; k < N_VARIANTS; k++) {
        int32_t ids[N], *experts = NULL, *expected_experts = NULL;
        float *logits = NULL, *expected = NULL;
        for (int isa = DSV3_ISA_SCALAR; isa <= DSV3_ISA_AVX512_AMX; isa++) {
            if (!dsv3_isa_supported((dsv3_isa)isa) || !open_model(variant(k), (dsv3_isa)isa))
                continue;
            CHECK_EQ_INT(dsv3_model_isa(model), isa);
            if (!expected) {
                expected = (float *)malloc(N * row_size());
                logits = (float *)malloc(N * row_size());
                experts = (int32_t *)malloc(N * expert_row() * 4);
                expected_experts = (int32_t *)malloc(N * expert_row() * 4);
                tiny_ids(ids, N, dsv3_model_config(model)->vocab_size, 7);
                dsv3_session *s = open_session(1, 1);
                run(s, ids, N, expected, expected_experts);
                dsv3_session_close(s);
            }
            for (int b = 0; b < 3; b++)
                for (int th = 0; th < 4; th++) {
                    if (k > 0 && b != 2 && th != 1 + (k & 1))
                        continue; /* all combinations for one variant, some for the others */
                    dsv3_session *s = open_session(batches[b], threads[th]);
                    memset(logits, 0, N * row_size());
                    run(s, ids, N, logits, experts);
                    bool ok = CHECK_BYTES(logits, N * row_size(), expected, N * row_size());
                    ok = CHECK_BYTES(experts, N * expert_row() * 4, expected_experts, N * expert_row() * 4) && ok;
                    ok = check_logits(s, expected + (N - 1) * row_size() / 4) && ok;
                    if (!ok)
                        printf("    variant %d, %s, %u rows, %u threads\n", k, dsv3_isa_name((dsv3_isa)isa), (unsigned)batches[b], (unsigned)threads[th]);
                    dsv3_session_close(s);
                }
            close_model();
        }
        free(logits), free(expected), free(experts), free(expected_experts);
    }
}

/* The logits say something: rows differ, no two tokens are alike, values are of the order of 1. */
TEST(logits_live)
{
    int32_t ids[N];
    REQUIRE(open_model(tiny_default(), DSV3_ISA_AUTO));
    float *logits = (float *)malloc(N * row_size());
    double sum = 0, sum2 = 0;
    size_t n = N * row_size() / 4;
    tiny_ids(ids, N, 320, 3);
    dsv3_session *s = open_session(0, 0);
    run(s, ids, N, logits, NULL);
    for (size_t i = 0; i < n; i++)
        sum += logits[i], sum2 += (double)logits[i] * logits[i];
    CHECK(sum2 / (double)n > 0.5 && sum2 / (double)n < 3 && fabs(sum / (double)n) < 0.5);
    for (size_t i = 1; i < N; i++)
        CHECK(memcmp(logits + i * 320, logits + (i - 1) * 320, row_size()) != 0);
    dsv3_session_close(s);
    free(logits);
    close_model();
}

TEST(append_in_pieces)
{
    for (int k = 0; k < N_VARIANTS; k += 2) {
        int32_t ids[N];
        uint64_t random = 11;
        REQUIRE(open_model(variant(k), DSV3_ISA_AUTO));
        float *expected = (float *)malloc(N * row_size()), *logits = (float *)malloc(N * row_size());
        tiny_ids(ids, N, dsv3_model_config(model)->vocab_size, 7);
        dsv3_session *s = open_session(0, 1);
        run(s, ids, N, expected, NULL);
        dsv3_session_close(s);
        for (int round = 0; round < 10; round++) {
            s = open_session(1 + (uint32_t)(tiny_next(&random) % 9), 1);
            for (size_t at = 0; at < N;) {
                size_t n = round ? 1 + tiny_next(&random) % 6 : 1;
                n = n > N - at ? N - at : n;
                run(s, ids + at, n, logits, NULL);
                CHECK_BYTES(logits, n * row_size(), (char *)expected + at * row_size(), n * row_size());
                at += n;
                CHECK_EQ_UINT(dsv3_session_length(s), at);
                CHECK_BYTES(dsv3_session_tokens(s), at * 4, ids, at * 4);
                check_logits(s, expected + (at - 1) * row_size() / 4);
            }
            dsv3_session_close(s);
        }
        free(expected), free(logits);
        close_model();
    }
}

TEST(rewind_and_go_on)
{
    int32_t ids[N], other[N];
    REQUIRE(open_model(variant(0), DSV3_ISA_AUTO));
    float *expected = (float *)malloc(N * row_size()), *logits = (float *)malloc(N * row_size());
    tiny_ids(ids, N, 192, 7);
    tiny_ids(other, N, 192, 8);
    dsv3_session *s = open_session(5, 2);
    run(s, ids, N, expected, NULL);
    for (size_t n = N; n-- > 1;) { /* ever shorter, with and without a look at the logits, with other tokens in between */
        CHECK_OK(dsv3_session_rewind(s, n, &e), e);
        CHECK_EQ_UINT(dsv3_session_length(s), n);
        CHECK_BYTES(dsv3_session_tokens(s), n * 4, ids, n * 4);
        if (n % 3)
            check_logits(s, expected + (n - 1) * 192);
        if (n % 2) {
            run(s, other, 7, logits, NULL);
            CHECK_OK(dsv3_session_rewind(s, n, &e), e);
            CHECK_OK(dsv3_session_rewind(s, n, &e), e); /* to where it is: nothing */
            run(s, ids + n, N - n, logits, NULL);
            CHECK_BYTES(logits, (N - n) * row_size(), expected + n * 192, (N - n) * row_size());
            CHECK_OK(dsv3_session_rewind(s, n, &e), e);
        }
        check_logits(s, expected + (n - 1) * 192);
        dsv3_sample sample;
        CHECK_OK(dsv3_session_sample(s, NULL, &sample, &e), e);
        CHECK_EQ_UINT(dsv3_session_length(s), n);
    }
    CHECK_RESULT(dsv3_session_rewind(s, 2, &e), DSV3_ERROR_INVALID_ARGUMENT, e); /* forwards */
    CHECK_EQ_UINT(dsv3_session_length(s), 1);
    check_logits(s, expected);
    CHECK_OK(dsv3_session_rewind(s, 0, &e), e);
    const float *none = expected;
    CHECK_RESULT(dsv3_session_logits(s, &none, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK(none == NULL);
    run(s, ids, N, logits, NULL);
    CHECK_BYTES(logits, N * row_size(), expected, N * row_size());
    dsv3_session_close(s);
    free(expected), free(logits);
    close_model();
}

static bool stop_at(void *user, uint64_t done, uint64_t total)
{
    (void)total;
    return done < *(uint64_t *)user;
}

/* Whatever fails, the session is as it was: length, tokens, logits, and what comes next. */
TEST(failed_append_changes_nothing)
{
    int32_t ids[N], bad[N];
    uint64_t limit;
    REQUIRE(open_model(variant(0), DSV3_ISA_AUTO));
    float *expected = (float *)malloc(N * row_size()), *logits = (float *)malloc(N * row_size());
    tiny_ids(ids, N, 192, 7);
    dsv3_session *s = open_session(0, 1);
    run(s, ids, N, expected, NULL);
    dsv3_session_close(s);
    for (int k = 0; k < 14; k++) {
        dsv3_session_opts o;
        dsv3_outputs out;
        dsv3_result want = DSV3_ERROR_INVALID_ARGUMENT;
        uint32_t rows[3] = {0, 2, 4};
        size_t count = 10;
        memset(&o, 0, sizeof o);
        memset(&out, 0, sizeof out);
        o.max_tokens = N, o.max_batch = 4, o.n_threads = 1;
        limit = UINT64_MAX;
        o.progress.fn = stop_at, o.progress.user = &limit;
        memcpy(bad, ids + 8, sizeof(int32_t) * 10);
        out.logits = logits, out.logit_rows = rows, out.n_logit_rows = 3;
        switch (k) {
        case 0: bad[9] = 192; break;
        case 1: bad[0] = -1; break;
        case 2: bad[5] = INT32_MAX; break;
        case 3: bad[5] = INT32_MIN; break;
        case 4: rows[2] = 10; break;              /* no such row */
        case 5: rows[2] = 1; break;               /* not ascending */
        case 6: rows[2] = 2; break;               /* twice the same */
        case 7: out.logits = NULL; break;         /* rows asked for, and no place for them */
        case 8: out.struct_size = 3, want = DSV3_ERROR_INVALID_OPTIONS; break;
        case 9: count = N - 8 + 1, want = DSV3_ERROR_CONTEXT_FULL; break;
        case 10: limit = 5, want = DSV3_ERROR_CANCELLED; break; /* in the middle */
        case 11: limit = 0, want = DSV3_ERROR_CANCELLED; break;
        case 12: limit = 10, want = DSV3_ERROR_CANCELLED; break; /* when all is done */
        default: want = DSV3_ERROR_CANCELLED; break;
        }
        REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
        limit = UINT64_MAX;
        run(s, ids, 8, logits, NULL);
        limit = k == 10 ? 5 : k == 11 ? 0 : k == 12 ? 10 : UINT64_MAX;
        if (k == 13)
            dsv3_session_cancel(s);
        int32_t many[N + 8];
        memcpy(many, ids, sizeof ids);
        dsv3_result r = dsv3_session_append(s, k == 9 ? many : bad, count, &out, &e);
        bool ok = k == 7 && r == DSV3_OK; /* a null pointer may also mean: no logits wanted */
        if (ok) {
            dsv3_session_close(s);
            continue;
        }
        ok = CHECK_RESULT(r, want, e);
        CHECK_EQ_INT(e.code, r);
        CHECK(e.message[0] != 0);
        limit = UINT64_MAX;
        ok = CHECK_EQ_UINT(dsv3_session_length(s), 8) && ok;
        ok = CHECK_BYTES(dsv3_session_tokens(s), 8 * 4, ids, 8 * 4) && ok;
        ok = check_logits(s, expected + 7 * 192) && ok;
        ok = run(s, ids + 8, N - 8, logits, NULL) && ok;
        ok = CHECK_BYTES(logits, (N - 8) * row_size(), expected + 8 * 192, (N - 8) * row_size()) && ok;
        if (!ok)
            printf("    case %d\n", k);
        dsv3_session_close(s);
    }
    free(expected), free(logits);
    close_model();
}

TEST(append_nothing)
{
    int32_t id = 5;
    REQUIRE(open_model(variant(3), DSV3_ISA_AUTO));
    float row[32];
    const float *logits;
    dsv3_session *s = open_session(0, 1);
    CHECK_EQ_UINT(dsv3_session_length(s), 0);
    CHECK_RESULT(dsv3_session_logits(s, &logits, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_OK(dsv3_session_append(s, NULL, 0, NULL, &e), e);
    CHECK_EQ_UINT(dsv3_session_length(s), 0);
    run(s, &id, 1, row, NULL);
    CHECK_OK(dsv3_session_append(s, NULL, 0, NULL, &e), e);
    CHECK_EQ_UINT(dsv3_session_length(s), 1);
    check_logits(s, row);
    CHECK_RESULT(dsv3_session_append(s, NULL, 1, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    check_logits(s, row);
    dsv3_session_close(s);
    close_model();
}

TEST(chosen_rows)
{
    int32_t ids[N];
    static const uint32_t chosen[5][4] = {{0, 5, 11, N - 1}, {0, 1, 2, 3}, {N - 4, N - 3, N - 2, N - 1}, {3, 4, 12, 13}, {7, 8, 9, 10}};
    REQUIRE(open_model(variant(0), DSV3_ISA_AUTO));
    float *expected = (float *)malloc(N * row_size()), *logits = (float *)malloc(5 * row_size());
    tiny_ids(ids, N, 192, 7);
    dsv3_session *s = open_session(0, 1);
    run(s, ids, N, expected, NULL);
    dsv3_session_close(s);
    for (uint32_t batch = 1; batch < 30; batch += 7)
        for (int k = 0; k < 6; k++) {
            dsv3_outputs out;
            memset(&out, 0, sizeof out);
            out.logit_rows = chosen[k % 5];
            out.n_logit_rows = k == 5 ? 0 : 4;
            out.logits = logits;
            memset(logits, 0x7E, 5 * row_size());
            s = open_session(batch, 2);
            CHECK_OK(dsv3_session_append(s, ids, N, &out, &e), e);
            for (int i = 0; i < (k == 5 ? 0 : 4); i++)
                CHECK_BYTES(logits + i * 192, row_size(), expected + chosen[k % 5][i] * 192, row_size());
            CHECK_BYTES(logits + (k == 5 ? 0 : 4 * 192), 4, "~~~~", 4); /* and not a float more: 0x7E is '~' */
            check_logits(s, expected + (N - 1) * 192);
            dsv3_session_close(s);
        }
    free(expected), free(logits);
    close_model();
}

/* Chosen experts: ascending, of few enough groups, the same for any cut, and chosen by the tokens. */
TEST(experts)
{
    int32_t ids[N], experts[N * 2 * 3], again[N * 2 * 3];
    unsigned used[8] = {0, 0, 0, 0, 0, 0, 0, 0}, n_used = 0;
    tiny_opts o = tiny_default(); /* 8 experts in 4 groups, 3 of 2 groups; 2 MoE layers */
    o.tokenizer = false, o.vocab = 192;
    REQUIRE(open_model(o, DSV3_ISA_AUTO));
    REQUIRE(CHECK_EQ_UINT(expert_row(), 6));
    tiny_ids(ids, N, 192, 7);
    dsv3_session *s = open_session(0, 1);
    run(s, ids, N, NULL, experts);
    dsv3_session_close(s);
    for (int i = 0; i < N * 2; i++) {
        const int32_t *x = experts + i * 3;
        CHECK(x[0] >= 0 && x[0] < x[1] && x[1] < x[2] && x[2] < 8);
        unsigned groups = 1u << (x[0] / 2) | 1u << (x[1] / 2) | 1u << (x[2] / 2);
        CHECK(groups & (groups - 1));                   /* two groups */
        CHECK((x[0] / 2 == x[1] / 2) || (x[1] / 2 == x[2] / 2)); /* not three */
        for (int k = 0; k < 3; k++)
            used[x[k]]++;
    }
    for (int k = 0; k < 8; k++)
        n_used += used[k] > 0;
    CHECK(n_used >= 6);
    for (uint32_t batch = 1; batch <= 9; batch += 4) {
        memset(again, 0, sizeof again);
        s = open_session(batch, 3);
        run(s, ids, 10, NULL, again);
        run(s, ids + 10, N - 10, NULL, again + 10 * 6);
        CHECK_BYTES(again, sizeof again, experts, sizeof experts);
        dsv3_session_close(s);
    }
    close_model();
}

TEST(cancel_before_the_call)
{
    int32_t ids[N];
    REQUIRE(open_model(variant(3), DSV3_ISA_AUTO));
    float expected[N * 32], logits[N * 32];
    const float *own;
    tiny_ids(ids, N, 32, 7);
    dsv3_session *s = open_session(4, 2);
    run(s, ids, N, expected, NULL);
    CHECK_OK(dsv3_session_rewind(s, 3, &e), e);
    dsv3_session_cancel(s);
    dsv3_session_cancel(s);
    CHECK_RESULT(dsv3_session_append(s, ids + 3, 5, NULL, &e), DSV3_ERROR_CANCELLED, e); /* the next one, */
    run(s, ids + 3, N - 3, logits, NULL);                                                 /* and no other */
    CHECK_BYTES(logits, (N - 3) * row_size(), expected + 3 * 32, (N - 3) * row_size());
    dsv3_session_cancel(s);
    dsv3_stats stats;
    dsv3_generate_opts g;
    memset(&g, 0, sizeof g);
    g.max_tokens = 3;
    CHECK_RESULT(dsv3_generate(s, NULL, 0, &g, &stats, &e), DSV3_ERROR_CANCELLED, e);
    CHECK_EQ_INT(stats.stop, DSV3_STOP_CANCELLED);
    CHECK(stats.n_generated <= 1); /* the token that the logits already told may be there */
    CHECK_EQ_UINT(dsv3_session_length(s), N + stats.n_generated);
    CHECK_OK(dsv3_session_rewind(s, N, &e), e);
    CHECK_OK(dsv3_session_logits(s, &own, &e), e);
    CHECK_BYTES(own, row_size(), expected + (N - 1) * 32, row_size());
    dsv3_session_close(s);
    close_model();
}

typedef struct reports {
    uint64_t last, total, count;
    bool bad;
} reports;

static bool report(void *user, uint64_t done, uint64_t total)
{
    reports *r = (reports *)user;
    r->bad |= done < r->last || (total && done > total) || (r->count && total != r->total);
    r->last = done;
    r->total = total;
    r->count++;
    return true;
}

TEST(progress_of_a_prompt)
{
    int32_t ids[N];
    reports r;
    dsv3_session *s = NULL;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    memset(&r, 0, sizeof r);
    REQUIRE(open_model(variant(3), DSV3_ISA_AUTO));
    tiny_ids(ids, N, 32, 7);
    o.max_batch = 5, o.max_tokens = 64, o.progress.fn = report, o.progress.user = &r;
    REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
    CHECK_OK(dsv3_session_append(s, ids, N, NULL, &e), e);
    CHECK(!r.bad && r.count >= 2);
    CHECK_EQ_UINT(r.total, N);
    CHECK_EQ_UINT(r.last, N);
    dsv3_session_close(s);
    close_model();
}

TEST(context_full)
{
    int32_t ids[N];
    dsv3_session *s = NULL;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    REQUIRE(open_model(variant(3), DSV3_ISA_AUTO));
    float expected[N * 32], logits[N * 32];
    tiny_ids(ids, N, 32, 7);
    s = open_session(0, 1);
    run(s, ids, N, expected, NULL);
    dsv3_session_close(s);
    o.max_tokens = 10, o.max_batch = 3, o.n_threads = 1;
    REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
    CHECK_RESULT(dsv3_session_append(s, ids, 11, NULL, &e), DSV3_ERROR_CONTEXT_FULL, e);
    CHECK_CONTAINS(e.message, "10");
    CHECK_EQ_UINT(dsv3_session_length(s), 0);
    run(s, ids, 10, logits, NULL);
    CHECK_BYTES(logits, 10 * row_size(), expected, 10 * row_size());
    CHECK_RESULT(dsv3_session_append(s, ids, 1, NULL, &e), DSV3_ERROR_CONTEXT_FULL, e);
    CHECK_RESULT(dsv3_session_append(s, ids, SIZE_MAX, NULL, &e), DSV3_ERROR_CONTEXT_FULL, e);
    check_logits(s, expected + 9 * 32);
    CHECK_OK(dsv3_session_rewind(s, 9, &e), e);
    run(s, ids + 9, 1, logits, NULL);
    check_logits(s, expected + 9 * 32);
    dsv3_session_close(s);
    close_model();
}

/* A host's own threads: any order, tasks one by one. */
static uint32_t n_runs;

static void run_backwards(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx)
{
    (*(uint32_t *)user)++;
    while (n-- > 0)
        task(ctx, n);
}

static void run_odd_first(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx)
{
    (*(uint32_t *)user)++;
    for (uint32_t i = 1; i < n; i += 2)
        task(ctx, i);
    for (uint32_t i = 0; i < n; i += 2)
        task(ctx, i);
}

TEST(executor_of_the_host)
{
    int32_t ids[N];
    REQUIRE(open_model(variant(1), DSV3_ISA_AUTO));
    uint32_t vocab = dsv3_model_config(model)->vocab_size;
    float *expected = (float *)malloc(N * row_size()), *logits = (float *)malloc(N * row_size());
    tiny_ids(ids, N, vocab, 7);
    dsv3_session *s = open_session(0, 1);
    run(s, ids, N, expected, NULL);
    dsv3_session_close(s);
    for (uint32_t n = 1; n <= 16; n *= 2)
        for (int k = 0; k < 2; k++) {
            dsv3_session_opts o;
            memset(&o, 0, sizeof o);
            o.max_tokens = 64, o.max_batch = 9, o.n_threads = 3;
            o.executor.run_fn = k ? run_backwards : run_odd_first;
            o.executor.n_threads = n;
            o.executor.user = &n_runs;
            n_runs = 0;
            REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
            run(s, ids, N, logits, NULL);
            CHECK_BYTES(logits, N * row_size(), expected, N * row_size());
            CHECK(n_runs > 0 || n == 1);
            dsv3_session_close(s);
        }
    free(expected), free(logits);
    close_model();
}

/* Two timelines of one model, taking turns, disturb each other in nothing. */
TEST(two_sessions)
{
    int32_t ids[2][N];
    REQUIRE(open_model(variant(0), DSV3_ISA_AUTO));
    float *expected[2], *row = (float *)malloc(row_size());
    dsv3_session *s[2];
    for (int k = 0; k < 2; k++) {
        expected[k] = (float *)malloc(N * row_size());
        tiny_ids(ids[k], N, 192, 20 + (uint64_t)k);
        s[k] = open_session(6, 2);
        run(s[k], ids[k], N, expected[k], NULL);
        dsv3_session_close(s[k]);
    }
    for (int k = 0; k < 2; k++)
        s[k] = open_session(6, 2);
    for (size_t i = 0; i < N; i++)
        for (int k = 0; k < 2; k++) {
            run(s[k], &ids[k][i], 1, row, NULL);
            CHECK_BYTES(row, row_size(), expected[k] + i * 192, row_size());
            check_logits(s[k], expected[k] + i * 192);
        }
    for (int k = 0; k < 2; k++) {
        check_logits(s[k], expected[k] + (N - 1) * 192);
        dsv3_session_close(s[k]);
        free(expected[k]);
    }
    free(row);
    close_model();
}

/* Logits that are no numbers: the tensor is named, the session is as it was. */
TEST(damaged_weights_are_named)
{
    static const struct {
        const char *name;
        int how; /* 0: BF16 NaN, 1: F8 NaN, 2: F32 NaN, 3: BF16 infinity, 4: F32 infinity */
    } cases[] = {{"model.norm.weight", 0}, {"lm_head.weight", 0}, {"model.layers.1.input_layernorm.weight", 3}, {"model.layers.0.mlp.gate_proj.weight", 1},
                 {"model.layers.1.self_attn.kv_b_proj.weight", 1}, {"model.layers.0.self_attn.o_proj.weight_scale_inv", 2},
                 {"model.layers.1.mlp.shared_experts.down_proj.weight_scale_inv", 4}, {"model.layers.0.self_attn.q_a_layernorm.weight", 0},
                 {"model.layers.1.mlp.gate.weight", 0}, {"model.layers.1.mlp.gate.e_score_correction_bias", 2}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        int32_t ids[6];
        tiny_opts o = tiny_micro();
        tiny_free(&t);
        tiny_build(&t, &o);
        tiny_tensor *x = tiny_find(&t, cases[i].name);
        REQUIRE(CHECK(x != NULL));
        static const uint8_t patterns[5][4] = {{0xC0, 0x7F}, {0x7F}, {0, 0, 0xC0, 0x7F}, {0x80, 0x7F}, {0, 0, 0x80, 0x7F}};
        memcpy(x->data, patterns[cases[i].how], cases[i].how == 1 ? 1 : cases[i].how == 2 || cases[i].how == 4 ? 4 : 2);
        tiny_pack(&t);
        model = NULL;
        dsv3_result r = tiny_open(&t, &model, NULL, &e); /* nothing is scanned at opening */
        REQUIRE(CHECK_OK(r, e));
        tiny_ids(ids, 6, 32, 9);
        dsv3_session *s = open_session(0, 1);
        char name[200];
        snprintf(name, sizeof name, "%s", cases[i].name);
        char *end = strstr(name, "_scale_inv");
        if (end)
            *end = 0;
        if (!(CHECK_RESULT(dsv3_session_append(s, ids, 6, NULL, &e), DSV3_ERROR_BAD_TENSOR, e) && CHECK_CONTAINS(e.message, name)))
            printf("    with %s\n", cases[i].name);
        CHECK_EQ_UINT(dsv3_session_length(s), 0);
        dsv3_stats stats;
        CHECK_RESULT(dsv3_generate(s, NULL, 0, NULL, &stats, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
        dsv3_session_close(s);
        close_model();
    }
}

/* A NaN in an embedding row hurts only who uses it. */
TEST(a_damaged_row_that_is_not_used)
{
    int32_t good[3] = {4, 6, 8}, bad[3] = {4, 5, 8};
    tiny_opts o = tiny_micro();
    tiny_free(&t);
    tiny_build(&t, &o);
    tiny_tensor *x = tiny_find(&t, "model.embed_tokens.weight");
    x->data[5 * 16 * 2] = 0xC0, x->data[5 * 16 * 2 + 1] = 0x7F;
    tiny_pack(&t);
    model = NULL;
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    float row[3 * 32];
    dsv3_session *s = open_session(0, 1);
    run(s, good, 3, row, NULL);
    CHECK_RESULT(dsv3_session_append(s, bad, 3, NULL, &e), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.embed_tokens.weight");
    CHECK_EQ_UINT(dsv3_session_length(s), 3);
    check_logits(s, row + 2 * 32);
    dsv3_session_close(s);
    close_model();
}

/* Once a session is open, nothing is allocated by it, nor by the model, while tokens go in and out by ids. */
TEST(steady_state_allocates_nothing)
{
    int32_t ids[N];
    tiny_heap model_heap, session_heap;
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    memset(&model_heap, 0, sizeof model_heap);
    memset(&session_heap, 0, sizeof session_heap);
    mo.allocator = tiny_allocator(&model_heap);
    tiny_opts to = variant(0);
    tiny_free(&t);
    tiny_build(&t, &to);
    model = NULL;
    REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
    tiny_ids(ids, N, 192, 7);
    for (uint32_t threads = 1; threads <= 3; threads++) {
        dsv3_session *s = NULL;
        dsv3_session_opts o;
        dsv3_sample sample, top[5];
        dsv3_sample_opts so;
        dsv3_generate_opts go;
        const float *logits;
        memset(&o, 0, sizeof o);
        memset(&so, 0, sizeof so);
        memset(&go, 0, sizeof go);
        o.max_tokens = 60, o.max_batch = 7, o.n_threads = threads;
        o.allocator = tiny_allocator(&session_heap);
        REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
        uint64_t model_allocs = model_heap.n_allocs, session_allocs = session_heap.n_allocs;
        uint64_t model_frees = model_heap.n_frees, session_frees = session_heap.n_frees;
        CHECK_OK(dsv3_session_append(s, ids, N, NULL, &e), e);
        CHECK_OK(dsv3_session_rewind(s, 11, &e), e);
        CHECK_OK(dsv3_session_logits(s, &logits, &e), e);
        so.temperature = 1, so.top_k = 20, so.top_p = 0.9f, so.min_p = 0.01f, so.repetition_penalty = 1.1f, so.presence_penalty = 0.1f;
        CHECK_OK(dsv3_session_sample(s, &so, &sample, &e), e);
        CHECK_OK(dsv3_session_logprobs(s, 5, top, &e), e);
        go.max_tokens = 20, go.sample = so, go.ignore_eos = true;
        CHECK_OK(dsv3_generate(s, NULL, 0, &go, NULL, &e), e);
        CHECK_EQ_UINT(dsv3_session_length(s), 31);
        CHECK_EQ_UINT(model_heap.n_allocs - model_allocs, 0);
        CHECK_EQ_UINT(session_heap.n_allocs - session_allocs, 0);
        CHECK_EQ_UINT(model_heap.n_frees - model_frees, 0);
        CHECK_EQ_UINT(session_heap.n_frees - session_frees, 0);
        dsv3_session_close(s);
        CHECK_EQ_UINT(session_heap.live_bytes, 0);
    }
    close_model();
    CHECK_EQ_UINT(model_heap.live_bytes, 0);
    CHECK_EQ_UINT(model_heap.n_damaged + session_heap.n_damaged + model_heap.n_strange + session_heap.n_strange, 0);
}

/* A session is as large as dsv3_session_memory says, and its cache is rank + rope values a token and layer. */
TEST(memory_is_told_before)
{
    tiny_heap heap;
    tiny_opts to = variant(0);
    REQUIRE(open_model(to, DSV3_ISA_AUTO));
    for (uint32_t k = 0; k < 12; k++) {
        dsv3_session *s = NULL;
        dsv3_session_opts o;
        dsv3_memory m;
        memset(&heap, 0, sizeof heap);
        memset(&o, 0, sizeof o);
        o.max_tokens = 1 + k * 37, o.max_batch = 1 + k * 11 % 50, o.n_threads = 1 + k % 3;
        o.allocator = tiny_allocator(&heap);
        if (o.max_tokens > to.max_pos)
            o.max_tokens = to.max_pos;
        CHECK_OK(dsv3_session_memory(model, &o, &m, &e), e);
        CHECK_EQ_UINT(heap.n_allocs, 0);
        CHECK_EQ_UINT(m.max_tokens, o.max_tokens);
        REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
        CHECK_EQ_UINT(heap.live_bytes, m.session_bytes);
        CHECK(m.cache_bytes < m.session_bytes);
        uint64_t rows = (uint64_t)to.n_layers * ((o.max_tokens + 63) / 64 * 64); /* pages of 64; padded to 64 values */
        CHECK(m.cache_bytes >= rows * (to.kv_lora + to.rope) * 2 && m.cache_bytes <= rows * (to.kv_lora + to.rope + 63) / 64 * 64 * 4 + 4096);
        dsv3_session_close(s);
        CHECK_EQ_UINT(heap.live_bytes, 0);
    }
    dsv3_memory m;
    CHECK_OK(dsv3_session_memory(model, NULL, &m, &e), e);
    CHECK_EQ_UINT(m.max_tokens, 256); /* min(4096, max_position_embeddings) */
    uint64_t in_file = 0;
    for (size_t i = 0; i < t.n_tensors; i++)
        in_file += t.tensors[i].size;
    CHECK_EQ_UINT(m.file_bytes, in_file);
    close_model();
}

/* Logits of n of the rows, from passes of at most 512; with keys and values written out or not. */
static void run_long(const int32_t *ids, size_t n_ids, const uint32_t *rows, size_t n, bool expand, float *logits)
{
    dsv3_session_opts so;
    dsv3_outputs out;
    dsv3_session *s = NULL;
    memset(&so, 0, sizeof so), memset(&out, 0, sizeof out);
    so.max_tokens = (uint32_t)n_ids, so.max_batch = 512, so.n_threads = 1, so.expand = expand;
    out.logit_rows = rows, out.n_logit_rows = n, out.logits = logits;
    REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &so, &e), e));
    CHECK_OK(dsv3_session_append(s, ids, n_ids, &out, &e), e);
    dsv3_session_close(s);
}

/* Behind 1,000 tokens, where few rows are summed by spans of positions that threads share, in rounds, and many rows are not:
   the same bits, and the numbers of one running sum over all positions, which is what written-out keys meet. 40 heads are
   three groups of them. */
TEST(long_timelines)
{
    enum { LONG = 1300, LAST = 24 };
    static const size_t steps[] = {1, 3, 8, 9, 1, 2}; /* LAST in all */
    static const uint32_t threads[] = {1, 2, 8};
    static const dsv3_compute modes[] = {DSV3_COMPUTE_F32, DSV3_COMPUTE_BF16};
    static int32_t ids[LONG];
    static uint32_t rows[LAST];
    tiny_opts o = tiny_micro();
    o.n_heads = 40, o.max_pos = 4096;
    for (uint32_t i = 0; i < LAST; i++)
        rows[i] = LONG - LAST + i;
    for (size_t m = 0; m < sizeof modes / sizeof *modes; m++) {
        dsv3_model_opts mo;
        dsv3_session_opts so;
        dsv3_session *s = NULL;
        memset(&mo, 0, sizeof mo), memset(&so, 0, sizeof so);
        mo.compute = modes[m];
        tiny_build(&t, &o);
        REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
        tiny_ids(ids, LONG, o.vocab, 3);
        float *expected = malloc(LAST * row_size()), *got = malloc(LAST * row_size());
        run_long(ids, LONG, rows, LAST, true, got);
        run_long(ids, LONG, rows, LAST, false, expected);
        double apart = 0, largest = 0;
        for (size_t i = 0; i < LAST * o.vocab && modes[m] == DSV3_COMPUTE_F32; i++) {
            apart = fmax(apart, fabs((double)got[i] - (double)expected[i]));
            largest = fmax(largest, fabs((double)expected[i]));
        }
        if (!CHECK(modes[m] != DSV3_COMPUTE_F32 || (apart > 0 && apart <= 1e-5 * largest))) /* it is another way */
            printf("    spans %g from one sum, the largest logit %g\n", apart, largest);
        so.max_tokens = LONG, so.max_batch = 512;
        for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
            size_t done = 0;
            so.n_threads = threads[i];
            REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &so, &e), e));
            CHECK_OK(dsv3_session_append(s, ids, LONG - LAST, NULL, &e), e);
            for (size_t k = 0; k < sizeof steps / sizeof *steps; done += steps[k++])
                run(s, ids + LONG - LAST + done, steps[k], got + done * o.vocab, NULL);
            CHECK_EQ_UINT(done, LAST);
            if (!CHECK_BYTES(got, LAST * row_size(), expected, LAST * row_size()))
                printf("    mode %d, %u threads\n", (int)modes[m], threads[i]);
            dsv3_session_close(s);
        }
        free(expected), free(got);
        close_model();
    }
}

TEST_MAIN(RUN(same_bits_for_rows_threads_and_kernels), RUN(logits_live), RUN(append_in_pieces), RUN(rewind_and_go_on),
          RUN(failed_append_changes_nothing), RUN(append_nothing), RUN(chosen_rows), RUN(experts), RUN(cancel_before_the_call),
          RUN(progress_of_a_prompt), RUN(context_full), RUN(executor_of_the_host), RUN(two_sessions), RUN(damaged_weights_are_named),
          RUN(a_damaged_row_that_is_not_used), RUN(steady_state_allocates_nothing), RUN(memory_is_told_before),
          RUN(long_timelines))
