/* Drafts: the text is that of a run without them, bit for bit, whoever guesses and whatever is guessed; what stops, fails
   or is taken back in the middle of a draft leaves what single steps would have left.

   By default 8 prompts in the random model and 1 in the trained one; DSV3_PROMPTS=200 takes so many of both. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#ifndef DSV3_NO_TOKENIZER
#include "chat.h"
#endif

enum { MAX_IDS = 160 };

static tiny t;
static dsv3_model *model;
static dsv3_error e;

/* Only some ids ever get a chance: the fewer, the more of what random layers guess is right. */
static void liven(tiny *x)
{
    static const char live[] = "abcdef{}[]:\",0123 ";
    tiny_tensor *head = tiny_find(x, "lm_head.weight");
    size_t row = (size_t)head->shape[1];
    for (size_t id = 0; id < head->shape[0]; id++) {
        bool lives = id == 1;
#ifndef DSV3_NO_TOKENIZER
        for (size_t i = 0; x->o.tokenizer && model && i + 1 < sizeof live; i++) {
            size_t n;
            const dsv3_tokenizer *tok;
            dsv3_model_tokenizer(model, &tok, &e);
            const char *bytes = dsv3_token_bytes(tok, (int32_t)id, &n);
            lives |= bytes && n == 1 && bytes[0] == live[i];
        }
#endif
        lives |= !x->o.tokenizer && id >= 3 && id < sizeof live;
        for (size_t i = 0; i < row; i++) {
            uint16_t w;
            memcpy(&w, head->data + 2 * (id * row + i), 2);
            w = (uint16_t)(!lives                     ? 0
                           : id == 1 || !(w & 0x7F80) ? w
                                                      : w + 0x0100); /* two more in the exponent: times 4 */
            memcpy(head->data + 2 * (id * row + i), &w, 2);
        }
    }
    tiny_pack(x);
}

static tiny_opts small(uint32_t n_mtp)
{
    tiny_opts o = tiny_micro();
    o.dim = 32, o.kv_lora = 16, o.n_experts = 8, o.n_group = 4, o.topk_group = 2, o.mtp = n_mtp, o.max_pos = 256;
#ifndef DSV3_NO_TOKENIZER
    o.vocab = (uint32_t)TINY_N_TOKENS, o.tokenizer = true;
#endif
    return o;
}

/* What lies in `t`. */
static bool open_built(void)
{
    model = NULL;
    bool ok = CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
    if (ok) {
        liven(&t);
        dsv3_model_close(model);
        ok = CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
    }
    return ok;
}

static bool open_model(tiny_opts o)
{
    tiny_free(&t);
    tiny_build(&t, &o);
    return open_built();
}

static void close_model(void)
{
    dsv3_model_close(model);
    model = NULL;
    tiny_free(&t);
}

// ---- One run ---------------------------------------------------------------------------------------------

typedef struct outcome {
    dsv3_result result;
    dsv3_stats stats;
    int32_t ids[MAX_IDS]; /* all of the session's, prompt too */
    uint32_t n;
    uint64_t said;   /* of all that token_fn got */
    uint64_t logits; /* of what comes next */
} outcome;

typedef struct hearer {
    uint64_t hash;
    uint32_t n, stop_at, cancel_at; /* UINT32_MAX: never */
    dsv3_session *s;
} hearer;

static bool hear(void *user, const dsv3_token *token)
{
    hearer *h = (hearer *)user;
    h->hash = dsv3__hash(h->hash, &token->id, sizeof token->id);
    h->hash = dsv3__hash(h->hash, &token->logprob, sizeof token->logprob);
    h->hash = dsv3__hash(h->hash, token->text, token->len);
    if (h->n == h->cancel_at)
        dsv3_session_cancel(h->s);
    return h->n++ != h->stop_at;
}

/* Every other id, by the last one. */
static bool odd_mask(void *user, const int32_t *tokens, size_t n_tokens, uint32_t *mask)
{
    (void)user;
    for (uint32_t i = 0; i < (dsv3_model_config(model)->vocab_size + 31) / 32; i++)
        mask[i] = tokens[n_tokens - 1] % 3 ? 0x77777777u : 0xEEEEEEEEu;
    return true;
}

static void look(outcome *out, dsv3_session *s)
{
    const float *logits = NULL;
    out->n = (uint32_t)dsv3_session_length(s);
    if (CHECK(out->n <= MAX_IDS))
        memcpy(out->ids, dsv3_session_tokens(s), out->n * sizeof(int32_t));
    CHECK_OK(dsv3_session_logits(s, &logits, &e), e);
    out->logits = logits ? dsv3__hash(0, logits, dsv3_model_config(model)->vocab_size * sizeof(float)) : 0;
}

static void go(outcome *out, dsv3_session *s, const dsv3_generate_opts *opts, uint32_t stop_at, uint32_t cancel_at)
{
    dsv3_generate_opts g = *opts;
    hearer h = {0, 0, 0, 0, NULL};
    h.stop_at = stop_at, h.cancel_at = cancel_at, h.s = s;
    g.token_fn = hear, g.user = &h;
    memset(out, 0, sizeof *out);
    out->result = dsv3_generate(s, NULL, 0, &g, &out->stats, &e);
    dsv3__atomic_store(&s->cancel, 0); /* one that came with the last token is for the next call */
    out->said = h.hash;
    look(out, s);
}

static dsv3_session *session(const dsv3_session_opts *opts, const int32_t *prompt, size_t n)
{
    dsv3_session *s = NULL;
    CHECK_OK(dsv3_session_open(&s, model, opts, &e), e);
    if (s)
        CHECK_OK(dsv3_session_append(s, prompt, n, NULL, &e), e);
    return s;
}

static void run(outcome *out, const dsv3_session_opts *so, const dsv3_generate_opts *g, const int32_t *prompt, size_t n)
{
    dsv3_session *s = session(so, prompt, n);
    memset(out, 0, sizeof *out);
    if (s)
        go(out, s, g, UINT32_MAX, UINT32_MAX);
    dsv3_session_close(s);
}

static bool equal(const outcome *a, const outcome *b)
{
    return a->result == b->result && a->n == b->n && memcmp(a->ids, b->ids, a->n * sizeof(int32_t)) == 0 &&
           a->said == b->said && a->logits == b->logits && a->stats.stop == b->stats.stop &&
           a->stats.n_generated == b->stats.n_generated;
}

// ---- The host's drafter ----------------------------------------------------------------------------------

typedef struct oracle {
    const int32_t *ids; /* what will be written */
    uint32_t n, right;  /* of 100 guesses */
    uint64_t random;
    bool nonsense; /* ids that do not exist, counts that are too large */
} oracle;

static size_t know(void *user, const int32_t *tokens, size_t n_tokens, int32_t *draft, size_t cap)
{
    static const int32_t odd[] = {-1, INT32_MAX, INT32_MIN, 0, 1, 1 << 24};
    oracle *o = (oracle *)user;
    const int32_t vocab = (int32_t)dsv3_model_config(model)->vocab_size;
    (void)tokens;
    for (size_t i = 0; i < cap; i++) {
        uint64_t r = tiny_next(&o->random);
        bool right = n_tokens + i < o->n && r % 100 < o->right;
        draft[i] = right                        ? o->ids[n_tokens + i]
                   : o->nonsense && r / 100 % 2 ? odd[r / 200 % 6]
                                                : (int32_t)(r / 100 % (uint64_t)vocab);
        if (o->nonsense && r / 1000 % 16 == 0)
            draft[i] = vocab;
    }
    return o->nonsense ? (size_t)(tiny_next(&o->random) % 4 ? cap : 1000000) : cap;
}

// ---- The matrix ------------------------------------------------------------------------------------------

enum { GREEDY, SAMPLED, PENALTIES, STOPS, MASK, GRAMMAR, N_WAYS };
static const char *const way_names[N_WAYS] = {"greedy", "temperature 0.8, top-p", "penalties", "stop strings", "mask",
                                              "grammar"};
static const char *const stop_strings[] = {"ab", "0", "}{", "c,"};

static bool way(dsv3_generate_opts *g, int which, const dsv3_grammar *grammar, uint64_t seed)
{
    static const int32_t stops[] = {7};
    memset(g, 0, sizeof *g);
    g->max_tokens = 24;
    g->sample.seed = seed;
    if (which != GREEDY)
        g->sample.temperature = 0.8f, g->sample.top_p = 0.95f;
    if (which == PENALTIES)
        g->sample.repetition_penalty = 1.3f, g->sample.presence_penalty = 0.2f, g->sample.top_k = 12,
        g->ignore_eos = true;
    if (which == STOPS)
        g->stop_strings = stop_strings, g->n_stop_strings = 4, g->stop_tokens = stops, g->n_stop_tokens = 1;
    if (which == MASK)
        g->mask_fn = odd_mask;
    if (which == GRAMMAR)
        g->grammar = grammar, g->max_tokens = 40;
    return which != GRAMMAR || grammar;
}

typedef struct drafting {
    const char *name;
    uint32_t n;
    dsv3_drafter who;
} drafting;

static const drafting draftings[] = {
    {"mtp 1", 1, DSV3_DRAFTER_MTP},       {"mtp 2", 2, DSV3_DRAFTER_MTP},
    {"mtp 4", 4, DSV3_DRAFTER_MTP},       {"mtp auto", DSV3_DRAFT_AUTO, DSV3_DRAFTER_MTP},
    {"lookup 4", 4, DSV3_DRAFTER_LOOKUP}, {"host 5", 5, DSV3_DRAFTER_HOST}};
enum { N_DRAFTINGS = 6 };

static uint32_t n_prompts(uint32_t otherwise)
{
    const char *text = getenv("DSV3_PROMPTS");
    return text && atoi(text) > 0 ? (uint32_t)atoi(text) : TEST_SANITIZED ? (otherwise + 3) / 4 : otherwise;
}

/* Every way, drafter and number of threads on every prompt against the run without drafts. */
static void matrix(const char *what, const dsv3_grammar *grammar, uint32_t prompts, int ways)
{
    const bool all =
        getenv("DSV3_PROMPTS") != NULL; /* else two threads for a few: they are slow where cores are busy */
    uint64_t runs = 0, different = 0, drafted[N_DRAFTINGS], accepted[N_DRAFTINGS];
    memset(drafted, 0, sizeof drafted), memset(accepted, 0, sizeof accepted);
    for (uint32_t p = 0; p < prompts; p++) {
        int32_t ids[60];
        size_t n = 1 + (p * 7) % 40;
        tiny_ids(ids, n, dsv3_model_config(model)->vocab_size, p + 1);
        for (int w = 0; w < ways; w++) {
            dsv3_generate_opts g;
            dsv3_session_opts so;
            outcome plain, run_of;
            if (!way(&g, w, grammar, p))
                continue;
            memset(&so, 0, sizeof so);
            so.max_tokens = p % 5 == 4 ? (uint32_t)n + 9 : 128; /* sometimes the session is full before the text ends */
            so.n_threads = 1, so.max_batch = 48;
            run(&plain, &so, &g, ids, n);
            CHECK(plain.result == DSV3_OK && plain.stats.drafted == 0);
            for (int d = 0; d < N_DRAFTINGS; d++) {
                uint64_t first[2] = {0, 0};
                for (uint32_t threads = 1; threads <= (all || (p * 5 + (uint32_t)w) % 24 == 0 ? 2u : 1u); threads++) {
                    oracle o = {plain.ids, plain.n, 60, p, false};
                    so.n_draft = draftings[d].n, so.drafter = draftings[d].who, so.n_threads = threads;
                    so.draft_fn = know, so.draft_user = &o;
                    so.max_batch = threads == 1 ? 48 : 3 + p % 5;
                    run(&run_of, &so, &g, ids, n);
                    runs++;
                    bool same = equal(&plain, &run_of);
                    different += !same;
                    if (!same && different <= 5)
                        printf("    %s: prompt %u, %s, %s, %u threads: %u tokens against %u\n", what, (unsigned)p,
                               way_names[w], draftings[d].name, (unsigned)threads, (unsigned)run_of.n,
                               (unsigned)plain.n);
                    CHECK(run_of.stats.accepted <= run_of.stats.drafted &&
                          run_of.stats.accepted <= run_of.stats.n_generated);
                    drafted[d] += run_of.stats.drafted, accepted[d] += run_of.stats.accepted;
                    /* What is guessed is a function of the tokens too, where the clock and small batches have no say. */
                    if (threads == 1)
                        first[0] = run_of.stats.drafted, first[1] = run_of.stats.accepted;
                    else if (draftings[d].who != DSV3_DRAFTER_HOST && draftings[d].n < so.max_batch)
                        CHECK(first[0] == run_of.stats.drafted && first[1] == run_of.stats.accepted);
                }
            }
        }
    }
    CHECK_EQ_UINT(different, 0);
    for (int d = 0; d < N_DRAFTINGS; d++)
        CHECK(draftings[d].n == DSV3_DRAFT_AUTO || prompts < 4 || accepted[d] > 0);
    if (getenv("DSV3_PROMPTS")) {
        printf("%s: %u prompts, %llu runs, %llu differences;", what, (unsigned)prompts, (unsigned long long)runs,
               (unsigned long long)different);
        for (int d = 0; d < N_DRAFTINGS; d++)
            printf(" %s %llu/%llu", draftings[d].name, (unsigned long long)accepted[d], (unsigned long long)drafted[d]);
        printf("\n");
    }
}

static dsv3_grammar *any_json(void)
{
    dsv3_grammar *grammar = NULL;
#ifndef DSV3_NO_TOKENIZER
    const dsv3_tokenizer *tok;
    if (CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e))
        CHECK_OK(dsv3_grammar_open(&grammar, tok, NULL, 0, NULL, &e), e);
#endif
    return grammar;
}

TEST(same_text)
{
    for (uint32_t n_mtp = 1; n_mtp <= 2; n_mtp++) {
        REQUIRE(open_model(small(n_mtp)));
        CHECK_EQ_UINT(dsv3_model_mtp(model), n_mtp);
        dsv3_grammar *grammar = any_json();
        matrix(n_mtp == 1 ? "one layer" : "two layers", grammar, n_prompts(8) / n_mtp, N_WAYS);
#ifndef DSV3_NO_TOKENIZER
        dsv3_grammar_close(grammar);
#endif
        close_model();
    }
}

TEST(same_text_of_a_trained_model)
{
#ifndef DSV3_NO_STDIO
    dsv3_error missing;
    if (dsv3_model_open(&model, "examples/tiny", NULL, &missing))
        SKIP("no examples/tiny here");
    matrix("examples/tiny", NULL, n_prompts(1), getenv("DSV3_PROMPTS") ? PENALTIES + 1 : SAMPLED + 1);
    dsv3_model_close(model);
    model = NULL;
#else
    SKIP("built without files");
#endif
}

// ---- In the middle ---------------------------------------------------------------------------------------

static const drafting middles[] = {
    {"mtp 3", 3, DSV3_DRAFTER_MTP}, {"lookup 4", 4, DSV3_DRAFTER_LOOKUP}, {"host 4", 4, DSV3_DRAFTER_HOST}};

/* token_fn stops, or cancels, at every token; then the text is taken back to every length, and goes on. */
static void stopped(uint32_t n_mtp)
{
    int32_t ids[8];
    dsv3_generate_opts g;
    outcome plain, a, b;
    const uint32_t step = getenv("DSV3_PROMPTS") ? 1 : TEST_SANITIZED ? 12 : 4;
    REQUIRE(open_model(small(n_mtp)));
    tiny_ids(ids, 8, dsv3_model_config(model)->vocab_size, 5);
    way(&g, SAMPLED, NULL, 4);
    g.ignore_eos = true;
    for (size_t d = 0; d < sizeof middles / sizeof middles[0]; d++) {
        dsv3_session_opts so, none;
        oracle o;
        memset(&so, 0, sizeof so);
        so.n_threads = 1, so.max_tokens = 64;
        none = so;
        run(&plain, &none, &g, ids, 8);
        so.n_draft = middles[d].n, so.drafter = middles[d].who, so.draft_fn = know, so.draft_user = &o;
        so.max_batch = 5;
        o.ids = plain.ids, o.n = plain.n, o.right = 70, o.random = 1, o.nonsense = false;
        for (uint32_t at = 0; at < 24; at++)
            for (int cancel = 0; cancel < 2; cancel++) {
                dsv3_session *x = session(&none, ids, 8), *y = session(&so, ids, 8);
                go(&a, x, &g, cancel ? UINT32_MAX : at, cancel ? at : UINT32_MAX);
                go(&b, y, &g, cancel ? UINT32_MAX : at, cancel ? at : UINT32_MAX);
                CHECK(a.result == b.result && (at == 23 || a.result == (cancel ? DSV3_ERROR_CANCELLED : DSV3_OK)));
                CHECK(equal(&a, &b));
                dsv3__atomic_store(&x->cancel, 0), dsv3__atomic_store(&y->cancel, 0);
                for (uint32_t back = b.n; back > 0; back -= back > step ? step : 1) { /* taken back, and on */
                    CHECK_OK(dsv3_session_rewind(x, back, &e), e);
                    CHECK_OK(dsv3_session_rewind(y, back, &e), e);
                    if (back % 2) {
                        CHECK_OK(dsv3_session_append(x, ids + back % 8, 1, NULL, &e), e);
                        CHECK_OK(dsv3_session_append(y, ids + back % 8, 1, NULL, &e), e);
                    }
                    g.max_tokens = 5;
                    go(&a, x, &g, UINT32_MAX, UINT32_MAX);
                    go(&b, y, &g, UINT32_MAX, UINT32_MAX);
                    g.max_tokens = 24;
                    if (!CHECK(equal(&a, &b)))
                        printf("    %s: stopped at %u, back to %u\n", middles[d].name, (unsigned)at, (unsigned)back);
                }
                dsv3_session_close(x), dsv3_session_close(y);
            }
    }
    close_model();
}

TEST(stop_cancel_and_rewind)
{
    stopped(1);
    stopped(2);
}

/* An executor that cancels at the nth time it is asked to run something: in any layer of any pass, a guess's too. */
typedef struct breaker {
    uint64_t n, at;
    dsv3_session *s;
} breaker;

static void break_run(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx)
{
    breaker *b = (breaker *)user;
    if (b->s && b->n++ == b->at)
        dsv3_session_cancel(b->s);
    for (uint32_t i = 0; i < n; i++)
        task(ctx, i);
}

TEST(cancel_inside)
{
    int32_t ids[6];
    dsv3_generate_opts g;
    dsv3_session_opts so, none;
    outcome plain, a;
    breaker b = {0, 0, NULL};
    uint64_t cancelled = 0, step = 1;
    for (uint32_t n_mtp = 1; n_mtp <= 2; n_mtp++) {
        REQUIRE(open_model(small(n_mtp)));
        tiny_ids(ids, 6, dsv3_model_config(model)->vocab_size, 3);
        way(&g, SAMPLED, NULL, 2);
        g.ignore_eos = true, g.max_tokens = 10;
        memset(&so, 0, sizeof so);
        so.max_tokens = 64, so.n_threads = 1;
        none = so;
        run(&plain, &none, &g, ids, 6);
        so.n_draft = 3, so.drafter = DSV3_DRAFTER_MTP;
        so.executor.run_fn = break_run, so.executor.user = &b, so.executor.n_threads = 2;
        for (uint64_t at = 0; at < 100000; at += step) {
            b.s = NULL;
            dsv3_session *s = session(&so, ids, 6);
            b.n = 0, b.at = at, b.s = s;
            dsv3_result r = dsv3_generate(s, NULL, 0, &g, &a.stats, &e);
            bool through = b.n <= at;
            b.s = NULL;
            CHECK(r == DSV3_OK || (!through && r == DSV3_ERROR_CANCELLED));
            cancelled += r == DSV3_ERROR_CANCELLED;
            uint64_t written = a.stats.n_generated;
            dsv3__atomic_store(&s->cancel, 0); /* it may have come too late for that call */
            CHECK_EQ_UINT(dsv3_session_length(s), 6 + written);
            CHECK(memcmp(dsv3_session_tokens(s), plain.ids, (size_t)(6 + written) * sizeof(int32_t)) == 0);
            dsv3_session *fresh = session(&none, plain.ids, (size_t)(6 + written));
            outcome x, y;
            look(&x, s), look(&y, fresh);
            CHECK(x.logits == y.logits);
            dsv3_session_close(fresh);
            if (written < 10) { /* and on, to the same end */
                dsv3_generate_opts rest = g;
                rest.max_tokens = 10 - (uint32_t)written;
                go(&a, s, &rest, UINT32_MAX, UINT32_MAX);
                if (!CHECK(a.n == plain.n && memcmp(a.ids, plain.ids, a.n * sizeof(int32_t)) == 0 &&
                           a.logits == plain.logits))
                    printf("    cancelled at %u\n", (unsigned)at);
            }
            dsv3_session_close(s);
            if (through)
                break;
            step = 1 + at / 40;
        }
        close_model();
    }
    CHECK(cancelled > 100);
}

/* Whatever a host proposes. */
TEST(nonsense)
{
    REQUIRE(open_model(small(1)));
    dsv3_grammar *grammar = any_json();
    for (uint32_t p = 0; p < 30; p++) {
        int32_t ids[10];
        dsv3_generate_opts g;
        dsv3_session_opts so;
        outcome plain, a;
        oracle o;
        tiny_ids(ids, 10, dsv3_model_config(model)->vocab_size, p);
        if (!way(&g, (int)(p % N_WAYS), grammar, p))
            continue;
        memset(&so, 0, sizeof so);
        so.max_tokens = 10 + p, so.n_threads = 1;
        run(&plain, &so, &g, ids, 10);
        o.ids = plain.ids, o.n = plain.n, o.right = p % 3 * 45, o.random = p, o.nonsense = true;
        so.n_draft = 1 + p % 16, so.drafter = DSV3_DRAFTER_HOST, so.draft_fn = know, so.draft_user = &o;
        run(&a, &so, &g, ids, 10);
        CHECK(equal(&plain, &a));
    }
#ifndef DSV3_NO_TOKENIZER
    dsv3_grammar_close(grammar);
#endif
    close_model();
}

/* A guess whose embedding is broken fails nobody who does not write it. */
TEST(broken_guess)
{
    int32_t ids[4];
    dsv3_generate_opts g;
    dsv3_session_opts so;
    outcome plain, a;
    oracle o = {NULL, 0, 0, 0, false};
    REQUIRE(open_model(small(1)));
    tiny_tensor *embed = tiny_find(&t, "model.embed_tokens.weight");
    for (size_t id = 2; id < embed->shape[0]; id++) /* all that is neither prompt nor written */
        for (size_t i = 0; i < embed->shape[1]; i++)
            if (id % 2 == 0)
                memset(embed->data + 2 * (id * (size_t)embed->shape[1] + i), 0xFF, 2);
    tiny_pack(&t);
    dsv3_model_close(model);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    tiny_ids(ids, 4, dsv3_model_config(model)->vocab_size, 8);
    for (int i = 0; i < 4; i++)
        ids[i] |= 1;
    way(&g, GREEDY, NULL, 1);
    g.mask_fn = NULL;
    uint32_t words = (dsv3_model_config(model)->vocab_size + 31) / 32, mask[64];
    for (uint32_t i = 0; i < words && i < 64; i++)
        mask[i] = 0xAAAAAAAAu; /* odd ids are whole */
    g.sample.mask = mask;
    memset(&so, 0, sizeof so);
    so.n_threads = 1, so.max_tokens = 64;
    run(&plain, &so, &g, ids, 4);
    CHECK(plain.result == DSV3_OK && plain.stats.n_generated > 4);
    so.n_draft = 4, so.drafter = DSV3_DRAFTER_HOST, so.draft_fn = know, so.draft_user = &o;
    o.ids = plain.ids, o.n = plain.n, o.right = 30;
    run(&a, &so, &g, ids, 4);
    CHECK(equal(&plain, &a));
    close_model();
}

// ---- Beside others ---------------------------------------------------------------------------------------

static dsv3_result save(dsv3_session *const *s, size_t n, tiny_stored *f)
{
    dsv3_sink sink;
    sink.write_fn = tiny_stored_put, sink.user = f;
    f->n = 0;
    return dsv3_save(s, n, &sink, NULL, &e);
}

static dsv3_result load(dsv3_session *const *s, size_t n, tiny_stored *f)
{
    dsv3_source source;
    f->at = 0;
    source.read_fn = tiny_stored_get, source.user = f, source.size = f->n;
    return dsv3_load(s, n, &source, &e);
}

enum { SLOTS = 5, LONG = 200 };

/* Two workspaces of as many pages. Whatever happens in one happens in the other; the sessions of the second draft. */
typedef struct twins {
    dsv3_workspace *ws[2];
    dsv3_session *s[2][SLOTS];
    oracle guesser;
    const dsv3_grammar *grammar;
    tiny_stored f[2];
    uint64_t random;
    uint32_t done[10], full; /* how often which operation was right; how often pages were short */
} twins;

static uint32_t any(twins *w, uint32_t n)
{
    return (uint32_t)(tiny_next(&w->random) % n);
}

static bool agree(twins *w, const dsv3_session *const *pair)
{
    const size_t n = dsv3_session_length(pair[0]);
    (void)w;
    return CHECK_EQ_UINT(dsv3_session_length(pair[1]), n) &&
           CHECK(n == 0 ||
                 memcmp(dsv3_session_tokens(pair[0]), dsv3_session_tokens(pair[1]), n * sizeof(int32_t)) == 0) &&
           CHECK_EQ_UINT(pair[1]->n_cached, pair[0]->n_cached) &&
           CHECK_EQ_UINT(pair[1]->logits_valid, pair[0]->logits_valid);
}

static void open_twin(twins *w, uint32_t k)
{
    dsv3_session_opts so;
    dsv3_result r[2];
    uint32_t d = any(w, N_DRAFTINGS);
    memset(&so, 0, sizeof so);
    so.max_tokens = LONG, so.reserve_pages = any(w, 4) ? 0 : any(w, 3);
    for (int y = 0; y < 2; y++) {
        so.workspace = w->ws[y];
        r[y] = dsv3_session_open(&w->s[y][k], model, &so, &e);
        so.n_draft = draftings[d].n, so.drafter = draftings[d].who, so.draft_fn = know, so.draft_user = &w->guesser;
    }
    CHECK(r[0] == r[1]);
    w->full += r[0] == DSV3_ERROR_CACHE_FULL;
}

/* One random operation on slot k, in both workspaces. */
static void twin_step(twins *w)
{
    static const uint32_t lengths[] = {1, 2, 3, 20, 62, 63, 64, 65, 90};
    const uint32_t k = any(w, SLOTS), other = any(w, SLOTS), op = any(w, 10);
    const uint32_t vocab = dsv3_model_config(model)->vocab_size, count = lengths[any(w, 9)], at = any(w, LONG);
    dsv3_result r[2] = {DSV3_OK, DSV3_OK};
    int32_t ids[SLOTS][LONG];
    outcome out[2];
    dsv3_generate_opts g;
    hearer h[2];
    memset(out, 0, sizeof out);
    if (!w->s[0][k]) {
        open_twin(w, k);
        return;
    }
    const uint32_t n = (uint32_t)dsv3_session_length(w->s[0][k]);
    for (uint32_t i = 0; i < SLOTS; i++)
        tiny_ids(ids[i], LONG, vocab, w->random + i);
    way(&g, (int)any(w, N_WAYS), w->grammar, w->random);
    g.max_tokens = 1 + any(w, 30), g.ignore_eos = any(w, 2) != 0;
    w->guesser.right = 0;
    for (int y = 0; y < 2; y++) {
        dsv3_session **s = w->s[y];
        dsv3_batch_item items[SLOTS];
        size_t used = 0, kept = 0;
        switch (op) {
        case 0: r[y] = dsv3_session_append(s[k], ids[0], count, NULL, &e); break;
        case 1: r[y] = dsv3_session_rewind(s[k], at < n ? at : n, &e); break;
        case 2:
            memcpy(ids[1], dsv3_session_tokens(s[k]), (at < n ? at : n) * sizeof(int32_t));
            r[y] = dsv3_session_sync(s[k], ids[1], 1 + at, &kept, &e);
            out[y].said = kept;
            break;
        case 3:
            if (!s[other])
                r[y] = dsv3_session_fork(&s[other], s[k], at % 3, &e);
            break;
        case 4:
            if (at % 4 == 0)
                dsv3_session_close(s[k]), s[k] = NULL;
            break;
        case 5:
            memset(items, 0, sizeof items);
            for (uint32_t i = 0; i < SLOTS; i++)
                if (s[i] && (i == k || (at >> i) % 2))
                    items[used].session = s[i], items[used].tokens = ids[i], items[used++].count = (count + i * 7) % 70;
            r[y] = dsv3_batch(items, used, &e);
            break;
        case 6: /* over each other, from the other's file */ r[y] = save(&s[k], 1, &w->f[y]); break;
        default:
            if (n == 0)
                break;
            memset(&h[y], 0, sizeof h[y]);
            h[y].s = s[k], h[y].stop_at = at % 3 ? UINT32_MAX : at % 16, h[y].cancel_at = at % 5 ? UINT32_MAX : at % 12;
            g.token_fn = hear, g.user = &h[y];
            r[y] = dsv3_generate(s[k], NULL, 0, &g, &out[y].stats, &e);
            dsv3__atomic_store(&s[k]->cancel, 0);
            out[y].said = h[y].hash + out[y].stats.n_generated * 16 + (uint64_t)out[y].stats.stop;
        }
    }
    if (!CHECK(r[0] == r[1] && out[0].said == out[1].said))
        printf("    operation %u on a session of %u tokens: %d, drafted %d\n", (unsigned)op, (unsigned)n, r[0], r[1]);
    w->done[op] += r[0] == DSV3_OK, w->full += r[0] == DSV3_ERROR_CACHE_FULL;
    if (op == 6 && r[0] == DSV3_OK) {
        CHECK_BYTES(w->f[1].data, w->f[1].n, w->f[0].data, w->f[0].n); /* drafts leave no trace */
        for (int y = 0; y < 2; y++)
            if (w->s[y][other])
                r[y] = load(&w->s[y][other], 1, &w->f[1 - y]);
        CHECK(r[0] == r[1]);
    }
    for (uint32_t i = 0; i < SLOTS; i++) {
        const dsv3_session *pair[2] = {w->s[0][i], w->s[1][i]};
        CHECK(!pair[0] == !pair[1]);
        if (!pair[0] || !pair[1] || !agree(w, pair) || any(w, 4))
            continue;
        const float *x = NULL, *y = NULL;
        r[0] = dsv3_session_logits(w->s[0][i], &x, &e), r[1] = dsv3_session_logits(w->s[1][i], &y, &e);
        CHECK(r[0] == r[1] && (r[0] || memcmp(x, y, vocab * sizeof *x) == 0));
    }
    /* And not a page more. */
    CHECK_EQ_UINT(w->ws[1]->n_free, w->ws[0]->n_free);
    CHECK_EQ_UINT(w->ws[1]->n_promised, w->ws[0]->n_promised);
}

/* Forks, batches, snapshots, rewinds, stops and cancellations beside other sessions, in workspaces that are often full. */
TEST(beside_others)
{
    const uint32_t steps = n_prompts(15) * 100;
    for (uint32_t n_mtp = 1; n_mtp <= 2; n_mtp++) {
        twins w;
        dsv3_workspace_opts o;
        memset(&w, 0, sizeof w), memset(&o, 0, sizeof o);
        REQUIRE(open_model(small(n_mtp)));
        dsv3_grammar *grammar = any_json();
        w.grammar = grammar, w.random = n_mtp;
        o.n_pages = 8, o.max_batch = 7 + 20 * (n_mtp - 1), o.n_threads = 1;
        for (int y = 0; y < 2; y++)
            CHECK_OK(dsv3_workspace_open(&w.ws[y], model, &o, &e), e);
        for (uint32_t i = 0; i < steps && w.ws[1]; i++) {
            twin_step(&w);
            if (test_now.failures) {
                printf("    %u layers, operation %u\n", (unsigned)n_mtp, (unsigned)i);
                break;
            }
        }
        for (int i = 0; i < 10; i++)
            CHECK(w.done[i] > steps / 150);
        CHECK(w.full > steps / 60);
        if (getenv("DSV3_PROMPTS"))
            printf("beside others, %u layers: %u operations, pages short in %u\n", (unsigned)n_mtp, (unsigned)steps,
                   (unsigned)w.full);
        for (int y = 0; y < 2; y++) {
            for (uint32_t i = 0; i < SLOTS; i++)
                dsv3_session_close(w.s[y][i]);
            CHECK(w.ws[y] && w.ws[y]->n_free == o.n_pages);
            dsv3_workspace_close(w.ws[y]);
            free(w.f[y].data);
        }
#ifndef DSV3_NO_TOKENIZER
        dsv3_grammar_close(grammar);
#endif
        close_model();
    }
}

#ifndef DSV3_NO_TOKENIZER

/* Each under a schema, or a mask, of its own: alone, drafted beside the others, and token by token in one batch. */
TEST(masked_together)
{
    static const char *const schemas[] = {"{\"type\":\"array\",\"items\":{\"enum\":[1,2,30]},\"maxItems\":6}",
                                          "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"boolean\"}}",
                                          "{\"enum\":[\"abcdefabcdef\",\"abcdee\"]}", NULL};
    enum { N = 5 };
    REQUIRE(open_model(small(1)));
    const dsv3_tokenizer *tok;
    const uint32_t words = (dsv3_model_config(model)->vocab_size + 31) / 32;
    dsv3_grammar *grammars[N] = {NULL, NULL, NULL, NULL, NULL};
    dsv3_workspace *ws = NULL;
    dsv3_workspace_opts o;
    uint64_t accepted = 0;
    CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e);
    for (int k = 0; k < 4; k++)
        CHECK_OK(dsv3_grammar_open(&grammars[k], tok, schemas[k], schemas[k] ? strlen(schemas[k]) : 0, NULL, &e), e);
    memset(&o, 0, sizeof o);
    o.n_pages = 12, o.max_batch = 16, o.n_threads = 1;
    REQUIRE(CHECK_OK(dsv3_workspace_open(&ws, model, &o, &e), e));
    for (uint32_t p = 0; p < n_prompts(6); p++) {
        dsv3_session *s[N], *b[N];
        dsv3_session_opts so;
        dsv3_generate_opts g[N];
        dsv3_grammar_state state[N];
        outcome plain[N], drafted[N];
        uint32_t written[N], live = N;
        int32_t prompt[8];
        memset(written, 0, sizeof written);
        for (int k = 0; k < N; k++) {
            const drafting *d = &draftings[(p + (uint32_t)k) % (N_DRAFTINGS - 1)];
            tiny_ids(prompt, 8, dsv3_model_config(model)->vocab_size, p * N + (uint32_t)k);
            way(&g[k], grammars[k] ? GRAMMAR : MASK, grammars[k], p);
            g[k].ignore_eos = true, g[k].max_tokens = 24;
            if (p % 3 == 2)
                g[k].sample.temperature = 0;
            memset(&so, 0, sizeof so);
            so.max_tokens = 64, so.max_batch = 8, so.n_threads = 1;
            run(&plain[k], &so, &g[k], prompt, 8);
            memset(&so, 0, sizeof so);
            so.workspace = ws, so.max_tokens = 64;
            b[k] = session(&so, prompt, 8);
            so.n_draft = d->n, so.drafter = d->who;
            s[k] = session(&so, prompt, 8);
            if (grammars[k])
                dsv3_grammar_start(grammars[k], &state[k]);
        }
        for (int k = N - 1; k >= 0; k--) {
            go(&drafted[k], s[k], &g[k], UINT32_MAX, UINT32_MAX);
            if (!CHECK(equal(&plain[k], &drafted[k])))
                printf("    prompt %u, schema %d, drafted\n", (unsigned)p, k);
            accepted += drafted[k].stats.accepted;
        }
        while (live) { /* a token for each, then one pass for all */
            dsv3_batch_item items[N];
            int32_t next[N];
            memset(items, 0, sizeof items);
            live = 0;
            for (int k = 0; k < N; k++) {
                uint32_t mask[64], some = 0;
                dsv3_sample sample;
                dsv3_sample_opts how = g[k].sample;
                memset(mask, 0, sizeof mask);
                if (written[k] >= plain[k].stats.n_generated)
                    continue;
                if (grammars[k])
                    dsv3_grammar_mask(grammars[k], &state[k], mask);
                else
                    odd_mask(NULL, dsv3_session_tokens(b[k]), dsv3_session_length(b[k]), mask);
                if (grammars[k])
                    mask[0] &= ~2u; /* the end of text, which ignore_eos leaves out */
                for (uint32_t i = 0; i < words; i++)
                    some |= mask[i];
                CHECK(some);
                how.mask = mask;
                if (!CHECK_OK(dsv3_session_sample(b[k], &how, &sample, &e), e))
                    return;
                if (grammars[k])
                    CHECK(dsv3_grammar_accept(grammars[k], &state[k], sample.token));
                next[live] = sample.token, written[k]++;
                items[live].session = b[k], items[live].tokens = &next[live], items[live].count = 1;
                live++;
            }
            CHECK_OK(dsv3_batch(items, live, &e), e);
        }
        for (int k = 0; k < N; k++) {
            outcome end;
            look(&end, b[k]);
            CHECK(end.n == plain[k].n && memcmp(end.ids, plain[k].ids, end.n * sizeof(int32_t)) == 0);
            CHECK(end.logits == plain[k].logits);
            dsv3_session_close(s[k]), dsv3_session_close(b[k]);
        }
    }
    CHECK(accepted > 10);
    dsv3_workspace_close(ws);
    for (int k = 0; k < 4; k++)
        dsv3_grammar_close(grammars[k]);
    close_model();
}

static bool read_call(void *user, const dsv3_token *token)
{
    return token->id < 0 || dsv3_reply_put((dsv3_reply *)user, token->id);
}

typedef struct call_heard {
    char arguments[512];
    size_t n, n_names;
} call_heard;

static bool hear_call(void *user, const dsv3_reply_event *event)
{
    call_heard *h = (call_heard *)user;
    h->n_names += event->kind == DSV3_REPLY_CALL_NAME;
    CHECK(event->kind != DSV3_REPLY_ANSWER && event->kind != DSV3_REPLY_REASONING);
    if (event->kind == DSV3_REPLY_CALL_ARGUMENTS && CHECK(h->n + event->len <= sizeof h->arguments)) {
        memcpy(h->arguments + h->n, event->text, event->len);
        h->n += event->len;
    }
    return true;
}

/* Calls that must be made: under each tool's schema, with every drafter, alone and beside others, the ids and the arguments
   that are heard are those without drafts. */
TEST(required_calls)
{
    static const char tools[] =
        "[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"parameters\":{\"type\":\"object\",\"properties\":{"
        "\"a\":{"
        "\"type\":\"integer\",\"maximum\":99,\"minimum\":-99},\"bb\":{\"enum\":[1,20,30]}},\"required\":[\"a\",\"bb\"],"
        "\"additionalProperties\":false}}},{\"type\":\"function\",\"function\":{\"name\":\"tags\",\"parameters\":{"
        "\"type\":"
        "\"object\",\"properties\":{\"of\":{\"type\":\"array\",\"items\":{\"type\":\"string\",\"maxLength\":3},"
        "\"minItems\":2,"
        "\"maxItems\":4}},\"required\":[\"of\"],\"additionalProperties\":false}}}]";
    static const dsv3_markup markups[] = {DSV3_MARKUP_V3, DSV3_MARKUP_V3_1, DSV3_MARKUP_KIMI_K2_THINKING};
    tiny_opts to = small(1);
    to.vocab = 320, to.max_pos = 512;
    tiny_free(&t);
    tiny_build(&t, &to);
    tiny_text json = chat_tokenizer_json(&t, true);
    tiny_put(&t, "tokenizer.json", json.p, json.n);
    free(json.p);
    REQUIRE(open_built());
    const dsv3_tokenizer *tok;
    dsv3_workspace *ws = NULL;
    dsv3_workspace_opts wo;
    uint64_t accepted = 0, ended = 0;
    CHECK_OK(dsv3_model_tokenizer(model, &tok, &e), e);
    memset(&wo, 0, sizeof wo);
    wo.n_pages = 12, wo.max_batch = 16, wo.n_threads = 1;
    REQUIRE(CHECK_OK(dsv3_workspace_open(&ws, model, &wo, &e), e));
    for (uint32_t p = 0; p < n_prompts(6) * 2; p++) {
        dsv3_message user;
        dsv3_tool_call call;
        dsv3_chat_opts co;
        dsv3_generate_opts g;
        dsv3_grammar *grammar = NULL;
        dsv3_text list;
        outcome plain;
        call_heard first;
        int32_t ids[MAX_IDS];
        size_t n;
        memset(&user, 0, sizeof user), memset(&call, 0, sizeof call), memset(&co, 0, sizeof co);
        list.p = tools, list.len = sizeof tools - 1;
        user.role = DSV3_ROLE_USER, user.content.p = "abc [1, 2]", user.content.len = 10;
        call.name.p = p % 2 ? "tags" : "add", call.name.len = p % 2 ? 4 : 3;
        call.id.p = "functions.f:0", call.id.len = 13;
        co.markup = markups[p % 3], co.add_generation_prompt = true, co.call = &call;
        CHECK_OK(dsv3_grammar_open_tool(&grammar, tok, list, call.name, NULL, &e), e);
        if (!CHECK_OK(dsv3_chat_render(tok, &user, 1, &co, ids, MAX_IDS, &n, &e), e) || !grammar)
            break;
        way(&g, GRAMMAR, grammar, p);
        g.max_tokens = 60;
        if (p % 4 == 3)
            g.sample.temperature = 0;
        memset(&plain, 0, sizeof plain), memset(&first, 0, sizeof first);
        for (int d = -1; d < 2 * (N_DRAFTINGS - 1); d++) { /* then in a workspace that others are in */
            dsv3_session_opts so;
            dsv3_reply_opts ro;
            dsv3_reply reply;
            call_heard heard;
            outcome now;
            memset(&so, 0, sizeof so), memset(&ro, 0, sizeof ro);
            memset(&heard, 0, sizeof heard), memset(&now, 0, sizeof now);
            so.max_tokens = MAX_IDS, so.n_threads = 1, so.max_batch = 48;
            if (d >= N_DRAFTINGS - 1)
                memset(&so, 0, sizeof so), so.workspace = ws, so.max_tokens = MAX_IDS;
            if (d >= 0)
                so.n_draft = draftings[d % (N_DRAFTINGS - 1)].n, so.drafter = draftings[d % (N_DRAFTINGS - 1)].who;
            dsv3_session *other = d < N_DRAFTINGS - 1 ? NULL : session(&so, ids, n), *s = session(&so, ids, n);
            ro.markup = co.markup, ro.event_fn = hear_call, ro.user = &heard, ro.call = &call;
            CHECK_OK(dsv3_reply_init(&reply, tok, &ro, &e), e);
            g.token_fn = read_call, g.user = &reply;
            now.result = dsv3_generate(s, NULL, 0, &g, &now.stats, &e);
            dsv3_reply_end(&reply);
            look(&now, s);
            if (d < 0)
                plain = now, first = heard;
            CHECK(equal(&plain, &now));
            CHECK(heard.n_names == 1 && heard.n == first.n && memcmp(heard.arguments, first.arguments, heard.n) == 0);
            accepted += now.stats.accepted;
            if (now.stats.stop == DSV3_STOP_EOS) {
                dsv3_grammar_state state;
                dsv3_grammar_start(grammar, &state);
                CHECK(dsv3_grammar_accept_text(grammar, &state, heard.arguments, heard.n) &&
                      dsv3_grammar_can_end(grammar, &state));
                ended++;
            }
            dsv3_session_close(s), dsv3_session_close(other);
        }
        dsv3_grammar_close(grammar);
    }
    CHECK(ended > 20 && accepted > 50);
    if (getenv("DSV3_PROMPTS"))
        printf("required calls: %llu ended, %llu guesses accepted\n", (unsigned long long)ended,
               (unsigned long long)accepted);
    dsv3_workspace_close(ws);
    close_model();
}
#endif

/* Written down at every token of a drafted text, read by a session that guesses otherwise, and on. */
TEST(saved_in_the_middle)
{
    int32_t ids[6];
    tiny_stored f;
    outcome plain, a, b;
    dsv3_generate_opts g, rest;
    dsv3_session_opts so;
    memset(&f, 0, sizeof f), memset(&so, 0, sizeof so);
    REQUIRE(open_model(small(2)));
    tiny_ids(ids, 6, dsv3_model_config(model)->vocab_size, 12);
    way(&g, PENALTIES, NULL, 9);
    so.max_tokens = 64, so.max_batch = 8, so.n_threads = 1;
    run(&plain, &so, &g, ids, 6);
    for (uint32_t at = 1; at < g.max_tokens; at++) {
        so.n_draft = 3, so.drafter = at % 2 ? DSV3_DRAFTER_MTP : DSV3_DRAFTER_LOOKUP;
        dsv3_session *x = session(&so, ids, 6);
        so.n_draft = at % 3 + 1, so.drafter = at % 4 < 2 ? DSV3_DRAFTER_MTP : DSV3_DRAFTER_LOOKUP;
        dsv3_session *y = session(&so, ids, 2);
        rest = g, rest.max_tokens = at;
        go(&a, x, &rest, UINT32_MAX, UINT32_MAX);
        CHECK_OK(save(&x, 1, &f), e);
        CHECK_OK(dsv3_session_rewind(y, 0, &e), e);
        CHECK_OK(load(&y, 1, &f), e);
        rest.max_tokens = g.max_tokens - at;
        go(&a, x, &rest, UINT32_MAX, UINT32_MAX);
        go(&b, y, &rest, UINT32_MAX, UINT32_MAX);
        CHECK(equal(&a, &b));
        CHECK(b.n == plain.n && memcmp(b.ids, plain.ids, b.n * sizeof(int32_t)) == 0 && b.logits == plain.logits);
        dsv3_session_close(x), dsv3_session_close(y);
    }
    free(f.data);
    close_model();
}

/* One page for all: where plain steps find room, drafts do, and both end at the same token. */
TEST(no_room)
{
    int32_t ids[60];
    dsv3_generate_opts g;
    REQUIRE(open_model(small(1)));
    way(&g, SAMPLED, NULL, 3);
    g.ignore_eos = true;
    for (uint32_t n = 40; n <= 60; n += 4)
        for (int d = 0; d < N_DRAFTINGS; d++) {
            outcome out[2];
            oracle o = {NULL, 0, 0, 0, false};
            tiny_ids(ids, n, dsv3_model_config(model)->vocab_size, n);
            for (int y = 0; y < 2; y++) {
                dsv3_workspace *ws = NULL;
                dsv3_workspace_opts wo;
                dsv3_session_opts so;
                hearer h = {0, 0, UINT32_MAX, UINT32_MAX, NULL};
                memset(&wo, 0, sizeof wo), memset(&so, 0, sizeof so), memset(&out[y], 0, sizeof out[y]);
                wo.n_pages = 1, wo.max_batch = 16, wo.n_threads = 1;
                CHECK_OK(dsv3_workspace_open(&ws, model, &wo, &e), e);
                so.workspace = ws, so.max_tokens = 128;
                if (y)
                    so.n_draft = draftings[d].n, so.drafter = draftings[d].who, so.draft_fn = know, so.draft_user = &o;
                dsv3_session *s = session(&so, ids, n);
                g.token_fn = hear, g.user = &h;
                out[y].result = dsv3_generate(s, NULL, 0, &g, &out[y].stats, &e);
                out[y].said = h.hash, out[y].n = (uint32_t)dsv3_session_length(s);
                memcpy(out[y].ids, dsv3_session_tokens(s), out[y].n * sizeof(int32_t));
                dsv3_session_close(s);
                dsv3_workspace_close(ws);
            }
            CHECK(equal(&out[0], &out[1]));
            CHECK(out[0].result == (n > 41 ? DSV3_ERROR_CACHE_FULL : DSV3_OK));
        }
    close_model();
}

// ---- Memory and options ----------------------------------------------------------------------------------

TEST(memory)
{
    tiny_heap heap;
    dsv3_session_opts so;
    dsv3_memory m;
    REQUIRE(open_model(small(2)));
    for (int who = DSV3_DRAFTER_MTP; who <= DSV3_DRAFTER_HOST; who++)
        for (uint64_t n = 1; n < 100; n++) {
            dsv3_session *s = NULL;
            outcome a;
            dsv3_generate_opts g;
            oracle o = {NULL, 0, 0, 0, false};
            int32_t ids[5] = {3, 4, 5, 3, 4};
            memset(&heap, 0, sizeof heap), memset(&so, 0, sizeof so);
            heap.fail_at = n;
            so.max_tokens = 40, so.n_threads = 2, so.n_draft = who == DSV3_DRAFTER_MTP ? DSV3_DRAFT_AUTO : 6;
            so.drafter = (dsv3_drafter)who, so.draft_fn = know, so.draft_user = &o;
            so.allocator = tiny_allocator(&heap);
            dsv3_result r = dsv3_session_open(&s, model, &so, &e);
            if (heap.n_allocs >= n) {
                CHECK(r == DSV3_ERROR_OUT_OF_MEMORY && !s && heap.live_bytes == 0);
                continue;
            }
            REQUIRE(CHECK_OK(r, e));
            CHECK_OK(dsv3_session_memory(model, &so, &m, &e), e);
            CHECK_EQ_UINT(heap.live_bytes, m.session_bytes);
            uint64_t allocs = heap.n_allocs;
            heap.fail_at = allocs + 1, heap.fail_on = true; /* drafting allocates nothing */
            CHECK_OK(dsv3_session_append(s, ids, 5, NULL, &e), e);
            way(&g, SAMPLED, NULL, 1);
            go(&a, s, &g, UINT32_MAX, UINT32_MAX);
            CHECK_OK(a.result, e);
            CHECK_EQ_UINT(heap.n_allocs, allocs);
#ifndef DSV3_NO_TOKENIZER
            for (uint64_t k = 1; k < 50; k++) { /* a prompt of text does */
                uint32_t before = (uint32_t)dsv3_session_length(s);
                outcome b;
                heap.fail_at = heap.n_allocs + k, heap.fail_on = false;
                r = dsv3_generate(s, "ab", 2, &g, NULL, &e);
                if (heap.n_allocs < heap.fail_at)
                    break;
                CHECK_RESULT(r, DSV3_ERROR_OUT_OF_MEMORY, e);
                look(&b, s);
                CHECK(b.n == before && b.logits == a.logits);
            }
#endif
            dsv3_session_close(s);
            CHECK_EQ_UINT(heap.live_bytes + heap.n_damaged, 0);
            break;
        }
    close_model();
}

static void refused(dsv3_session_opts so, dsv3_result expected, const char *part)
{
    dsv3_session *s = NULL;
    CHECK_RESULT(dsv3_session_open(&s, model, &so, &e), expected, e);
    CHECK_CONTAINS(e.message, part);
    CHECK(s == NULL);
    dsv3_session_close(s);
}

TEST(options)
{
    dsv3_session_opts so, none;
    dsv3_session *s = NULL;
    dsv3_outputs out;
    float *logits;
    int32_t ids[3] = {3, 4, 5};
    memset(&none, 0, sizeof none), memset(&out, 0, sizeof out);
    REQUIRE(open_model(small(1)));
    so = none, so.n_draft = 17;
    refused(so, DSV3_ERROR_INVALID_OPTIONS, "n_draft");
    so = none, so.drafter = DSV3_DRAFTER_HOST, so.n_draft = 1;
    refused(so, DSV3_ERROR_INVALID_OPTIONS, "draft_fn");
    so = none, so.drafter = (dsv3_drafter)9;
    refused(so, DSV3_ERROR_INVALID_OPTIONS, "drafter");
    logits = (float *)tiny_realloc(NULL, 3 * dsv3_model_config(model)->vocab_size * sizeof(float));
    out.draft_logits = logits;
    CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e);
    CHECK_RESULT(dsv3_session_append(s, ids, 3, &out, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_EQ_UINT(dsv3_session_length(s), 0);
    dsv3_session_close(s);
    so = none, so.n_draft = 1, so.max_batch = 1; /* no room for a guess, but for the layer */
    CHECK_OK(dsv3_session_open(&s, model, &so, &e), e);
    CHECK_OK(dsv3_session_append(s, ids, 3, &out, &e), e);
    uint32_t vocab = dsv3_model_config(model)->vocab_size, set[2] = {0, 0};
    for (uint32_t i = 0; i < 2 * vocab; i++)
        set[i / vocab] += logits[i] != 0;
    CHECK(set[0] == 0 && set[1] > 5);
    dsv3_session_close(s);
    free(logits);

    /* A layer that is not wanted, not there, or half there. */
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    mo.no_mtp = true;
    dsv3_model_close(model);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
    CHECK_EQ_UINT(dsv3_model_mtp(model), 0);
    so = none, so.drafter = DSV3_DRAFTER_MTP, so.n_draft = 1;
    refused(so, DSV3_ERROR_INVALID_OPTIONS, "multi-token prediction");
    so.drafter = DSV3_DRAFTER_AUTO; /* then it looks up */
    CHECK_OK(dsv3_session_open(&s, model, &so, &e), e);
    dsv3_session_close(s);
    dsv3_model_close(model);
    model = NULL;
    tiny_remove(&t, "model.layers.2.enorm.weight"), tiny_pack(&t);
    CHECK_RESULT(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.layers.2.enorm.weight");
    tiny_remove(&t, "model.layers.2.eh_proj.weight"), tiny_pack(&t);
    CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
    CHECK_EQ_UINT(dsv3_model_mtp(model), 0);
    close_model();
}

/* A machine of which all is known, in place of the clock: a pass over n rows takes 1 + row (n - 1), a guess `guess`, rows that
   the prediction layer has not seen a 64th each and a half, all give or take `noise`. */
typedef struct pace_machine {
    double row, guess, right, noise;
} pace_machine;

static double pace_noise(const pace_machine *m, uint64_t *random)
{
    return 1 + m->noise * (2 * tiny_uniform(random) - 1);
}

/* Seconds for n tokens with `fixed` guesses a pass, or as AUTO has it (0). Without drafts it would be n. */
static double pace_run(const pace_machine *m, uint32_t n, uint32_t fixed, uint64_t *random)
{
    dsv3__ses_pace p;
    double total = 0;
    uint32_t written = 0, behind = 64;
    memset(&p, 0, sizeof p);
    p.draft = -1;
    while (written < n) {
        dsv3__ses_pace_judge(&p, written);
        const uint32_t k = fixed ? fixed : dsv3__ses_pace_plan(&p, DSV3__DRAFT_MAX, &behind, 1 / 64.0);
        const bool far_behind = behind > DSV3__DRAFT_MAX + 1;
        const double guessing = k ? ((far_behind ? 0.5 + behind / 64.0 : 0) + k * m->guess) * pace_noise(m, random) : 0;
        const double running = (1 + m->row * k) * pace_noise(m, random);
        uint32_t got = 1;
        p.n_tokens = written;
        dsv3__ses_pace_learn(&p, k, guessing, running, far_behind);
        while (got <= k && tiny_uniform(random) < m->right)
            got++;
        total += guessing + running, written += got;
        behind = k ? got : behind + 1;
    }
    return total * n / written;
}

/* AUTO costs next to nothing where guesses do not pay, and takes most of what they bring where they do. */
TEST(pace)
{
    static const double rows[] = {0.05, 0.3, 0.6}, guesses[] = {0, 0.1, 0.3}, rights[] = {0, 0.5, 0.7, 0.85, 0.95};
    static const double noises[] = {0, 0.1};
    uint64_t random = 1;
    for (uint32_t i = 0; i < 3 * 3 * 5 * 2; i++) {
        const pace_machine m = {rows[i % 3], guesses[i / 3 % 3], rights[i / 9 % 5], noises[i / 45]};
        double best = 1000;
        for (uint32_t k = 1; k <= 4; k++) {
            const double fixed = pace_run(&m, 20000, k, &random) / 20;
            best = fixed < best ? fixed : best;
        }
        const double shortly = pace_run(&m, 256, 0, &random), took = pace_run(&m, 20000, 0, &random) / 20;
        CHECK(shortly < 256 * 1.02 + 4);
        CHECK(took < 1000 * 1.015);
        CHECK(took < best * 1.15);
    }
}

enum { ANEW = 640, ANEW_MORE = 4 };

/* What the prediction layers say behind ANEW tokens of which they have seen `keep` (0: all), where every page held
   `garbage` at first. *finite becomes false where that shows. */
static uint64_t said_anew(uint32_t keep, int garbage, uint32_t threads, dsv3_cache cache, bool *finite)
{
    const uint32_t vocab = dsv3_model_config(model)->vocab_size, n_mtp = dsv3_model_mtp(model);
    const size_t n = (size_t)ANEW_MORE * n_mtp * vocab;
    int32_t ids[ANEW + ANEW_MORE];
    float *logits = (float *)calloc(n, sizeof *logits);
    dsv3_outputs outputs;
    dsv3_session_opts so;
    dsv3_session *s = NULL;
    uint64_t hash = 0;
    memset(&so, 0, sizeof so), memset(&outputs, 0, sizeof outputs);
    tiny_ids(ids, ANEW + ANEW_MORE, vocab, 5);
    so.max_tokens = ANEW + 64, so.n_threads = threads, so.max_batch = 48, so.drafter = DSV3_DRAFTER_MTP;
    so.cache_latent = so.cache_rope = cache;
    so.n_draft = keep ? DSV3_DRAFT_AUTO : 2; /* which leaves waiting states behind where others follow */
    outputs.draft_logits = logits;
    if (logits && CHECK_OK(dsv3_session_open(&s, model, &so, &e), e)) {
        const dsv3__work *w = &s->ws->work;
        for (uint32_t i = 0; i < (ANEW + 64) / DSV3_PAGE_TOKENS; i++)
            memset(w->cache + i * w->page_bytes + dsv3__snap_layers(w), garbage,
                   (size_t)(w->page_bytes - dsv3__snap_layers(w)));
        CHECK_OK(dsv3_session_append(s, ids, ANEW, NULL, &e), e);
        if (keep)
            dsv3__mtp_anew(&s->mtp, keep);
        CHECK_OK(dsv3_session_append(s, ids + ANEW, ANEW_MORE, &outputs, &e), e);
        for (size_t i = 0; i < n; i++)
            *finite &= fabsf(logits[i]) < INFINITY;
        hash = dsv3__hash(0, logits, n * sizeof *logits);
    }
    dsv3_session_close(s);
    free(logits);
    return hash;
}

/* Layers that begin anew see nothing before: neither in the block where they do, nor in the spans that lie before. */
TEST(begins_anew)
{
    static const dsv3_cache caches[] = {DSV3_CACHE_F32, DSV3_CACHE_BF16, DSV3_CACHE_I8};
    for (uint32_t n_mtp = 1; n_mtp <= 2; n_mtp++) {
        tiny_opts o = small(n_mtp);
        o.max_pos = 1024;
        REQUIRE(open_model(o));
        for (uint32_t c = 0; c < 3; c++) {
            bool finite = true;
            const uint64_t all = said_anew(0, 0, 1, caches[c], &finite), few = said_anew(10, 0, 1, caches[c], &finite);
            CHECK(few && few == said_anew(10, 0xFF, 1, caches[c], &finite));
            CHECK(few == said_anew(10, 0x3F, 3, caches[c], &finite));
            CHECK(few != all && few != said_anew(11, 0, 1, caches[c], &finite));
            CHECK(finite);
        }
        close_model();
    }
}

/* At any length, and cut back behind that: the text stays, and guesses are made of numbers. */
TEST(begins_anew_anywhere)
{
    uint64_t random = 3;
    for (uint32_t n_mtp = 1; n_mtp <= 4; n_mtp++) {
        int32_t ids[60];
        dsv3_generate_opts g;
        dsv3_session_opts so;
        uint64_t drafted = 0;
        REQUIRE(open_model(small(n_mtp)));
        tiny_ids(ids, 60, dsv3_model_config(model)->vocab_size, 4);
        way(&g, GREEDY, NULL, 4);
        g.max_tokens = 3, g.ignore_eos = true;
        for (uint32_t round = 0; round < (TEST_SANITIZED ? 60 : 200); round++) {
            outcome plain, a;
            const uint32_t n = 2 + (uint32_t)(tiny_next(&random) % 50), cut = 1 + (uint32_t)(tiny_next(&random) % n);
            memset(&so, 0, sizeof so);
            so.max_tokens = 80, so.n_threads = 1, so.max_batch = 5 + (uint32_t)(tiny_next(&random) % 30);
            run(&plain, &so, &g, ids, cut);
            so.n_draft = DSV3_DRAFT_AUTO, so.drafter = DSV3_DRAFTER_MTP;
            dsv3_session *s = session(&so, ids, n);
            const uint32_t waiting = s->mtp.q[0].end - s->mtp.q[0].done;
            dsv3__mtp_anew(&s->mtp, waiting ? (uint32_t)(tiny_next(&random) % (waiting + 1)) : 0);
            CHECK_OK(dsv3_session_rewind(s, cut, &e), e);
            s->n_draft = 1 + round % 4; /* guess, whatever it costs */
            go(&a, s, &g, UINT32_MAX, UINT32_MAX);
            CHECK(a.n == plain.n && memcmp(a.ids, plain.ids, a.n * sizeof *a.ids) == 0 && a.logits == plain.logits);
            drafted += a.stats.drafted;
            for (uint32_t k = 0; k < n_mtp; k++) {
                const dsv3__mtp_queue *q = &s->mtp.q[k];
                CHECK(q->since <= q->done && q->first <= q->done && q->done <= q->end);
                for (size_t i = 0; q->end > q->first && i < (q->end - q->first) * s->mtp.stride; i++)
                    if (!CHECK(fabsf(q->states[i]) < INFINITY))
                        break;
            }
            dsv3_session_close(s);
        }
        CHECK(drafted > 0);
        close_model();
    }
}

/* With keys and values written out for 64 rows or more: a token that is run again because someone drafts is none of them. */
TEST(expanded_alike)
{
    enum { BEFORE = 3, MOST = 65 };
    tiny_opts o = small(1);
    int32_t ids[BEFORE + MOST];
    o.max_pos = 1024;
    REQUIRE(open_model(o));
    tiny_ids(ids, BEFORE + MOST, o.vocab, 4);
    for (size_t n = 62; n <= MOST; n++) {
        float *logits[3];
        for (int who = 0; who < 3; who++) { /* plain, drafting; absorbed */
            dsv3_session *s, *fork;
            dsv3_session_opts so;
            const float *at;
            memset(&so, 0, sizeof so);
            so.max_tokens = 200, so.n_threads = 1, so.expand = who < 2;
            if (who == 1)
                so.n_draft = 2, so.drafter = DSV3_DRAFTER_MTP;
            REQUIRE(dsv3_session_open(&s, model, &so, &e) == DSV3_OK);
            REQUIRE(dsv3_session_append(s, ids, BEFORE, NULL, &e) == DSV3_OK);
            REQUIRE(dsv3_session_fork(&fork, s, 0, &e) == DSV3_OK);
            REQUIRE(dsv3_session_append(fork, ids + BEFORE, n, NULL, &e) == DSV3_OK);
            REQUIRE(dsv3_session_logits(fork, &at, &e) == DSV3_OK);
            logits[who] = (float *)malloc(o.vocab * sizeof(float));
            memcpy(logits[who], at, o.vocab * sizeof(float));
            dsv3_session_close(fork);
            dsv3_session_close(s);
        }
        CHECK(memcmp(logits[0], logits[1], o.vocab * sizeof(float)) == 0);
        CHECK((memcmp(logits[0], logits[2], o.vocab * sizeof(float)) == 0) == (n < 64));
        free(logits[0]), free(logits[1]), free(logits[2]);
    }
    close_model();
}

TEST(lookup)
{
    int32_t tokens[40] = {1, 2, 3, 4, 9, 2, 3, 5, 7, 1, 2, 3};
    CHECK_EQ_UINT(dsv3__mtp_lookup(tokens, 12, 3), 3); /* "1 2 3" is longer than the later "2 3" */
    CHECK(tokens[12] == 4 && tokens[13] == 9 && tokens[14] == 2);
    tokens[11] = 8;
    CHECK_EQ_UINT(dsv3__mtp_lookup(tokens, 12, 3), 0);
    for (int i = 0; i < 12; i++)
        tokens[i] = i % 2;
    CHECK_EQ_UINT(dsv3__mtp_lookup(tokens, 12, 5), 5); /* a period goes on */
    for (int i = 12; i < 17; i++)
        CHECK_EQ_INT(tokens[i], i % 2);
    CHECK_EQ_UINT(dsv3__mtp_lookup(tokens, 1, 5), 0);
    CHECK_EQ_UINT(dsv3__mtp_lookup(tokens, 2, 5), 0);
}

#ifndef DSV3_NO_TOKENIZER
#define TOKENIZED , RUN(masked_together), RUN(required_calls)
#else
#define TOKENIZED
#endif

TEST_MAIN(RUN(same_text), RUN(same_text_of_a_trained_model), RUN(stop_cancel_and_rewind), RUN(cancel_inside),
          RUN(beside_others), RUN(saved_in_the_middle), RUN(no_room), RUN(nonsense), RUN(broken_guess), RUN(memory),
          RUN(options), RUN(lookup), RUN(pace), RUN(begins_anew), RUN(begins_anew_anywhere),
          RUN(expanded_alike) TOKENIZED)
