/* Threads of the host: many sessions over one model at once, sessions with threads of their own, cancelling from outside.
   `make tsan` runs this too. */
#define _POSIX_C_SOURCE 200809L
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#if !defined(_WIN32) && !defined(DSV3_NO_THREADS)
    #include <pthread.h>

    #define N 16
    #define WORKERS 4

static tiny t;
static dsv3_model *model;
static dsv3_error e;

static tiny_opts opts(uint32_t n_mtp)
{
    tiny_opts o = tiny_micro();
    o.mtp = n_mtp;
    #ifndef DSV3_NO_TOKENIZER
    o.vocab = (uint32_t)TINY_N_TOKENS, o.tokenizer = true;
    #endif
    return o;
}

static bool open_model_with(uint32_t n_mtp)
{
    tiny_opts o = opts(n_mtp);
    tiny_free(&t);
    tiny_build(&t, &o);
    model = NULL;
    return CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
}

static bool open_model(void)
{
    return open_model_with(0);
}

static void close_model(void)
{
    dsv3_model_close(model);
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

static dsv3_result open_session(dsv3_session **s, uint32_t max_batch, uint32_t n_threads)
{
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.max_tokens = 64, o.max_batch = max_batch, o.n_threads = n_threads;
    return dsv3_session_open(s, model, &o, NULL);
}

typedef struct worker {
    pthread_t thread;
    uint64_t seed;
    uint32_t n_threads;
    uint64_t hash;     /* of all that came out */
    unsigned failures;
} worker;

/* One timeline with all that can be done to it; checks are counted, since they belong to the main thread. */
static void *work(void *user)
{
    worker *w = (worker *)user;
    int32_t ids[N];
    dsv3_session *s = NULL;
    w->hash = w->seed;
    tiny_ids(ids, N, 200, w->seed);
    for (int round = 0; round < 3; round++) {
        const float *logits = NULL;
        dsv3_sample top[3];
        dsv3_generate_opts g;
        memset(&g, 0, sizeof g);
        g.max_tokens = 8, g.sample.temperature = 1, g.sample.seed = w->seed, g.ignore_eos = true;
        w->failures += open_session(&s, 1 + (uint32_t)round * 6, w->n_threads) != DSV3_OK;
        w->failures += dsv3_session_append(s, ids, N, NULL, NULL) != DSV3_OK;
        w->failures += dsv3_session_logits(s, &logits, NULL) != DSV3_OK;
        w->hash = w->hash * 31 + hash_of(logits, dsv3_model_config(model)->vocab_size * sizeof(float));
        w->failures += dsv3_session_rewind(s, N / 2, NULL) != DSV3_OK;
        w->failures += dsv3_generate(s, NULL, 0, &g, NULL, NULL) != DSV3_OK;
        w->hash = w->hash * 31 + hash_of(dsv3_session_tokens(s), dsv3_session_length(s) * 4);
        w->failures += dsv3_session_logprobs(s, 3, top, NULL) != DSV3_OK;
        w->hash = w->hash * 31 + hash_of(top, sizeof top);
    #ifndef DSV3_NO_TOKENIZER
        const dsv3_tokenizer *tok = NULL;
        int32_t encoded[64];
        size_t n = 0;
        w->failures += dsv3_model_tokenizer(model, &tok, NULL) != DSV3_OK;
        w->failures += dsv3_tokenize(tok, "the thing and the other, 1234 of them", 37, 0, encoded, 64, &n, NULL) != DSV3_OK;
        w->hash = w->hash * 31 + hash_of(encoded, n * 4);
    #endif
        dsv3_session_close(s);
    }
    return NULL;
}

static void run_workers(uint32_t n_threads)
{
    worker alone[WORKERS], together[WORKERS];
    memset(alone, 0, sizeof alone);
    memset(together, 0, sizeof together);
    REQUIRE(open_model());
    for (unsigned i = 0; i < WORKERS; i++) {
        alone[i].seed = together[i].seed = 100 + i;
        alone[i].n_threads = 1;
        together[i].n_threads = n_threads;
        work(&alone[i]);
        CHECK_EQ_UINT(alone[i].failures, 0);
    }
    for (unsigned i = 0; i < WORKERS; i++)
        REQUIRE(CHECK_EQ_INT(pthread_create(&together[i].thread, NULL, work, &together[i]), 0));
    for (unsigned i = 0; i < WORKERS; i++) {
        pthread_join(together[i].thread, NULL);
        CHECK_EQ_UINT(together[i].failures, 0);
        CHECK_EQ_UINT(together[i].hash, alone[i].hash);
    }
    CHECK(alone[0].hash != alone[1].hash);
    close_model();
}

TEST(sessions_on_several_threads)
{
    run_workers(1);
}

TEST(sessions_with_threads_of_their_own)
{
    run_workers(3);
}

/* Models opened and closed side by side share nothing. */
static void *open_and_close(void *user)
{
    worker *w = (worker *)user;
    for (int round = 0; round < 6; round++) {
        tiny mine;
        tiny_opts o = opts(0);
        dsv3_model *m = NULL;
        o.n_shards = (uint32_t)round % 3;
        tiny_build(&mine, &o);
        mine.read_mode = round % 2 != 0;
        dsv3_error error;
        w->failures += tiny_open(&mine, &m, NULL, &error) != DSV3_OK;
        dsv3_model_close(m);
        tiny_free(&mine);
    }
    return NULL;
}

TEST(opening_on_several_threads)
{
    worker w[WORKERS];
    memset(w, 0, sizeof w);
    for (unsigned i = 0; i < WORKERS; i++)
        REQUIRE(CHECK_EQ_INT(pthread_create(&w[i].thread, NULL, open_and_close, &w[i]), 0));
    for (unsigned i = 0; i < WORKERS; i++) {
        pthread_join(w[i].thread, NULL);
        CHECK_EQ_UINT(w[i].failures, 0);
    }
}

/* A session may wander from thread to thread, one at a time. */
static dsv3_session *wandering;

static void *append_one(void *user)
{
    worker *w = (worker *)user;
    int32_t id = (int32_t)w->seed;
    w->failures += dsv3_session_append(wandering, &id, 1, NULL, NULL) != DSV3_OK;
    return NULL;
}

TEST(a_session_that_changes_threads)
{
    int32_t ids[N];
    const float *logits;
    uint64_t hash[2];
    REQUIRE(open_model());
    tiny_ids(ids, N, 200, 3);
    size_t size = dsv3_model_config(model)->vocab_size * sizeof(float);
    for (int k = 0; k < 2; k++) {
        REQUIRE(CHECK_EQ_INT(open_session(&wandering, 4, 1 + (uint32_t)k), DSV3_OK));
        if (k == 0)
            CHECK_OK(dsv3_session_append(wandering, ids, N, NULL, &e), e);
        for (int i = 0; k == 1 && i < N; i++) {
            worker w;
            memset(&w, 0, sizeof w);
            w.seed = (uint64_t)ids[i];
            REQUIRE(CHECK_EQ_INT(pthread_create(&w.thread, NULL, append_one, &w), 0));
            pthread_join(w.thread, NULL);
            CHECK_EQ_UINT(w.failures, 0);
        }
        CHECK_OK(dsv3_session_logits(wandering, &logits, &e), e);
        hash[k] = hash_of(logits, size);
        dsv3_session_close(wandering);
    }
    CHECK_EQ_UINT(hash[1], hash[0]);
    close_model();
}

/* Cancelling from another thread, at all times: the call says so or is done, and the timeline is sound. */
typedef struct canceller {
    pthread_t thread;
    pthread_mutex_t lock;
    bool stop;
    dsv3_session *s;
    uint64_t random;
    int64_t longest; /* pause, nanoseconds */
    unsigned cancels;
} canceller;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void *cancel_now_and_then(void *user)
{
    canceller *c = (canceller *)user;
    for (;;) {
        struct timespec pause;
        pause.tv_sec = 0;
        pause.tv_nsec = (long)(tiny_next(&c->random) % (uint64_t)c->longest);
        nanosleep(&pause, NULL);
        pthread_mutex_lock(&c->lock);
        bool stop = c->stop;
        pthread_mutex_unlock(&c->lock);
        if (stop)
            return NULL;
        dsv3_session_cancel(c->s);
        c->cancels++;
    }
}

TEST(cancelling_from_outside)
{
    int32_t ids[48], expected_tokens[12];
    unsigned cancelled = 0, finished = 0;
    REQUIRE(open_model());
    uint32_t vocab = dsv3_model_config(model)->vocab_size;
    size_t size = vocab * sizeof(float);
    float *expected = (float *)malloc(48 * size);
    dsv3_session *s = NULL;
    dsv3_outputs out;
    dsv3_generate_opts g;
    memset(&out, 0, sizeof out);
    memset(&g, 0, sizeof g);
    g.max_tokens = 12, g.ignore_eos = true;
    tiny_ids(ids, 48, 200, 3);
    out.logits = expected;
    REQUIRE(CHECK_EQ_INT(open_session(&s, 4, 1), DSV3_OK));
    int64_t took = now_ns(); /* pauses suit the machine: some calls are to be cancelled and some to finish */
    CHECK_OK(dsv3_session_append(s, ids, 48, &out, &e), e);
    took = now_ns() - took;
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, NULL, &e), e);
    memcpy(expected_tokens, dsv3_session_tokens(s) + 48, sizeof expected_tokens);
    dsv3_session_close(s);
    for (uint32_t threads = 1; threads <= 3; threads++) {
        canceller c;
        memset(&c, 0, sizeof c);
        REQUIRE(CHECK_EQ_INT(open_session(&s, 4, threads), DSV3_OK));
        c.s = s;
        c.random = threads;
        c.longest = took < 1000000 ? 500000 : took > 1000000000 ? 500000000 : took / 2;
        pthread_mutex_init(&c.lock, NULL);
        REQUIRE(CHECK_EQ_INT(pthread_create(&c.thread, NULL, cancel_now_and_then, &c), 0));
        for (int round = 0; round < 150; round++) {
            size_t length = dsv3_session_length(s), more = 1 + (size_t)round % 11;
            if (length + more > 48) {
                CHECK_OK(dsv3_session_rewind(s, (size_t)round % 5, &e), e);
                continue;
            }
            dsv3_result r = dsv3_session_append(s, ids + length, more, NULL, &e);
            if (r) {
                CHECK_RESULT(r, DSV3_ERROR_CANCELLED, e);
                CHECK_EQ_UINT(dsv3_session_length(s), length);
                cancelled++;
                continue;
            }
            const float *logits;
            finished++;
            CHECK_EQ_UINT(dsv3_session_length(s), length + more);
            r = dsv3_session_logits(s, &logits, &e);
            if (r == DSV3_OK)
                CHECK_BYTES(logits, size, expected + (length + more - 1) * vocab, size);
            else
                CHECK_RESULT(r, DSV3_ERROR_CANCELLED, e);
        }
        for (int round = 0; round < 30; round++) { /* generation: a part of the same tokens, or all */
            dsv3_stats stats;
            dsv3_session_rewind(s, 0, NULL);
            if (dsv3_session_append(s, ids, 48, NULL, NULL) != DSV3_OK)
                continue;
            dsv3_result r = dsv3_generate(s, NULL, 0, &g, &stats, &e);
            CHECK(r == DSV3_OK || r == DSV3_ERROR_CANCELLED);
            CHECK_EQ_INT(stats.stop, r ? DSV3_STOP_CANCELLED : DSV3_STOP_MAX_TOKENS);
            CHECK_EQ_UINT(dsv3_session_length(s), 48 + stats.n_generated);
            CHECK_BYTES(dsv3_session_tokens(s) + 48, stats.n_generated * 4, expected_tokens, stats.n_generated * 4);
        }
        pthread_mutex_lock(&c.lock);
        c.stop = true;
        pthread_mutex_unlock(&c.lock);
        pthread_join(c.thread, NULL);
        pthread_mutex_destroy(&c.lock);
        CHECK(c.cancels > 0);
        dsv3_session_close(s);
    }
    CHECK(cancelled > 0 && finished > 0);
    free(expected);
    close_model();
}

/* Three sessions of one model, each on a thread of its own with a fork beside it in its workspace and four threads below it.
   Batches of both, and texts written with drafts, go along one text that was written before, without drafts; all are
   cancelled at any time from the main thread. THREADS_CANCELS (environment): how often in all. */
enum { TEXT = 48 };

typedef struct batcher {
    pthread_t thread;
    pthread_mutex_t lock;
    bool stop;
    dsv3_session *s[2];
    int32_t ids[TEXT]; /* the text, */
    float *expected;   /* logits behind each token, */
    dsv3_sample_opts how; /* and what its tokens from number 5 on were picked by */
    uint64_t random, drafted, accepted;
    unsigned failures, cancelled, finished, cut; /* batches; texts that were cancelled */
} batcher;

static void batch_once(batcher *b)
{
    dsv3_batch_item items[2];
    size_t length[2];
    memset(items, 0, sizeof items);
    for (int k = 0; k < 2; k++) {
        length[k] = dsv3_session_length(b->s[k]);
        items[k].session = b->s[k], items[k].tokens = b->ids + length[k], items[k].count = 1 + (size_t)(tiny_next(&b->random) % 9);
    }
    dsv3_result r = dsv3_batch(items, 2, NULL);
    b->failures += r != DSV3_OK && r != DSV3_ERROR_CANCELLED;
    b->finished += r == DSV3_OK;
    b->cancelled += r != DSV3_OK;
    for (int k = 0; k < 2; k++)
        b->failures += dsv3_session_length(b->s[k]) != length[k] + (r ? 0 : items[k].count);
}

static void write_once(batcher *b, dsv3_session *s)
{
    dsv3_generate_opts g;
    dsv3_stats stats;
    const size_t length = dsv3_session_length(s);
    memset(&g, 0, sizeof g);
    g.sample = b->how, g.max_tokens = 1 + (uint32_t)(tiny_next(&b->random) % 9), g.ignore_eos = true;
    dsv3_result r = dsv3_generate(s, NULL, 0, &g, &stats, NULL);
    b->failures += r != DSV3_OK && r != DSV3_ERROR_CANCELLED;
    b->failures += dsv3_session_length(s) != length + (size_t)stats.n_generated || (!r && stats.n_generated != g.max_tokens);
    b->cut += r != DSV3_OK;
    b->drafted += stats.drafted, b->accepted += stats.accepted;
}

static void *batch_until_told(void *user)
{
    batcher *b = (batcher *)user;
    const size_t vocab = dsv3_model_config(model)->vocab_size;
    for (;;) {
        const float *logits;
        pthread_mutex_lock(&b->lock);
        bool stop = b->stop;
        pthread_mutex_unlock(&b->lock);
        if (stop)
            return NULL;
        for (int k = 0; k < 2; k++)
            if (dsv3_session_length(b->s[k]) + 9 > TEXT)
                b->failures += dsv3_session_rewind(b->s[k], 5 + (size_t)(tiny_next(&b->random) % 9), NULL) != DSV3_OK;
        uint64_t what = tiny_next(&b->random) % 3;
        if (what < 2)
            write_once(b, b->s[what]);
        else
            batch_once(b);
        for (int k = 0; k < 2; k++) {
            const size_t n = dsv3_session_length(b->s[k]);
            b->failures += memcmp(dsv3_session_tokens(b->s[k]), b->ids, n * sizeof(int32_t)) != 0;
            if (dsv3_session_logits(b->s[k], &logits, NULL) == DSV3_OK)
                b->failures += memcmp(logits, b->expected + (n - 1) * vocab, vocab * sizeof(float)) != 0;
        }
    }
}

/* The text, and the pair of sessions: i says who drafts. */
static bool batcher_open(batcher *b, unsigned i, const uint32_t *mask)
{
    static const dsv3_drafter who[] = {DSV3_DRAFTER_MTP, DSV3_DRAFTER_LOOKUP, DSV3_DRAFTER_MTP};
    static const uint32_t n_draft[] = {3, 4, DSV3_DRAFT_AUTO};
    dsv3_session *s = NULL;
    dsv3_session_opts so;
    dsv3_generate_opts g;
    dsv3_outputs out;
    memset(b, 0, sizeof *b), memset(&so, 0, sizeof so), memset(&g, 0, sizeof g), memset(&out, 0, sizeof out);
    b->random = i;
    b->how.mask = mask;
    b->how.temperature = i == 1 ? 0 : 0.8f, b->how.top_p = i == 2 ? 0.95f : 0, b->how.seed = i;
    b->expected = (float *)malloc(TEXT * dsv3_model_config(model)->vocab_size * sizeof(float));
    tiny_ids(b->ids, 5, 200, 3 + i);
    g.sample = b->how, g.max_tokens = TEXT - 5, g.ignore_eos = true;
    if (!CHECK_EQ_INT(open_session(&s, 4, 1), DSV3_OK))
        return false;
    CHECK_OK(dsv3_session_append(s, b->ids, 5, NULL, &e), e);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, NULL, &e), e);
    CHECK_EQ_UINT(dsv3_session_length(s), TEXT);
    memcpy(b->ids, dsv3_session_tokens(s), sizeof b->ids);
    CHECK_OK(dsv3_session_rewind(s, 0, &e), e);
    out.logits = b->expected;
    CHECK_OK(dsv3_session_append(s, b->ids, TEXT, &out, &e), e);
    dsv3_session_close(s);
    so.max_tokens = 128, so.max_batch = 6, so.n_threads = 4; /* pages for a fork too */
    so.n_draft = n_draft[i], so.drafter = who[i];
    pthread_mutex_init(&b->lock, NULL);
    return CHECK_OK(dsv3_session_open(&b->s[0], model, &so, &e), e) &&
           CHECK_OK(dsv3_session_append(b->s[0], b->ids, 5, NULL, &e), e) &&
           CHECK_OK(dsv3_session_fork(&b->s[1], b->s[0], 0, &e), e);
}

TEST(cancelling_batches)
{
    enum { SESSIONS = 3 };
    const char *env = getenv("THREADS_CANCELS");
    const unsigned cancels = env ? (unsigned)strtoul(env, NULL, 10) : 150;
    uint32_t mask[64]; /* few ids: random layers often guess right */
    uint64_t random = 9, drafted = 0, accepted = 0;
    batcher b[SESSIONS];
    unsigned cancelled = 0, finished = 0, cut = 0;
    REQUIRE(open_model_with(1));
    REQUIRE(CHECK(dsv3_model_config(model)->vocab_size <= 2048));
    memset(mask, 0, sizeof mask);
    mask[1] = 0x00010111u;
    int64_t took = now_ns();
    for (unsigned i = 0; i < SESSIONS; i++)
        REQUIRE(batcher_open(&b[i], i, mask));
    took = (now_ns() - took) / 2 / SESSIONS;
    for (unsigned i = 0; i < SESSIONS; i++)
        REQUIRE(CHECK_EQ_INT(pthread_create(&b[i].thread, NULL, batch_until_told, &b[i]), 0));
    for (unsigned i = 0; i < cancels; i++) {
        struct timespec pause;
        pause.tv_sec = 0;
        pause.tv_nsec = (long)(tiny_next(&random) % (uint64_t)(took < 1000000 ? 500000 : took > 100000000 ? 50000000 : took / 2));
        nanosleep(&pause, NULL);
        dsv3_session_cancel(b[tiny_next(&random) % SESSIONS].s[tiny_next(&random) % 2]);
    }
    for (unsigned i = 0; i < SESSIONS; i++) {
        pthread_mutex_lock(&b[i].lock);
        b[i].stop = true;
        pthread_mutex_unlock(&b[i].lock);
        pthread_join(b[i].thread, NULL);
        pthread_mutex_destroy(&b[i].lock);
        CHECK_EQ_UINT(b[i].failures, 0);
        cancelled += b[i].cancelled, finished += b[i].finished, cut += b[i].cut;
        drafted += b[i].drafted, accepted += b[i].accepted;
        dsv3_session_close(b[i].s[0]), dsv3_session_close(b[i].s[1]);
        free(b[i].expected);
    }
    if (env)
        printf("%u cancels: %u batches and %u texts cancelled, %u batches finished; %lu tokens guessed, %lu right\n", cancels,
               cancelled, cut, finished, (unsigned long)drafted, (unsigned long)accepted);
    CHECK(cancelled > 0 && cut > 0 && finished > 0);
    CHECK(drafted > accepted && accepted > 0);
    close_model();
}

/* Threads asleep between calls are woken, used and put to sleep as often as asked. */
TEST(many_small_calls)
{
    int32_t ids[N];
    REQUIRE(open_model());
    tiny_ids(ids, N, 200, 3);
    for (uint32_t threads = 2; threads <= 8; threads *= 2) {
        dsv3_session *s = NULL;
        for (int round = 0; round < 4; round++) {
            REQUIRE(CHECK_EQ_INT(open_session(&s, 2, threads), DSV3_OK));
            for (int i = 0; i < N; i++)
                CHECK_OK(dsv3_session_append(s, &ids[i], 1, NULL, &e), e);
            dsv3_session_close(s);
            CHECK_EQ_INT(open_session(&s, 2, threads), DSV3_OK); /* and never used */
            dsv3_session_close(s);
        }
    }
    close_model();
}

TEST_MAIN(RUN(sessions_on_several_threads), RUN(sessions_with_threads_of_their_own), RUN(opening_on_several_threads),
          RUN(a_session_that_changes_threads), RUN(cancelling_from_outside), RUN(cancelling_batches), RUN(many_small_calls))
#else
TEST(threads)
{
    SKIP("needs POSIX threads");
}

TEST_MAIN(RUN(threads))
#endif
