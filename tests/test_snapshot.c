/* Sessions saved and loaded: the same bits afterwards, pages that are shared stored once, and nothing but an error from a
   snapshot that is cut, changed, forged or of something else. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

static tiny t;
static dsv3_model *model;
static dsv3_error e;

static tiny_opts micro(void)
{
    tiny_opts o = tiny_micro();
    o.max_pos = 512;
    return o;
}

static bool open_model(tiny_opts o)
{
    tiny_free(&t);
    model = NULL;
    tiny_build(&t, &o);
    return CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
}

static void close_model(void)
{
    dsv3_model_close(model);
    model = NULL;
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

static dsv3_result save(dsv3_session *const *sessions, size_t n, tiny_stored *m)
{
    dsv3_sink sink;
    uint64_t size = 0, measured = 0;
    sink.write_fn = tiny_stored_put, sink.user = m;
    m->n = 0;
    dsv3_result r = dsv3_save(sessions, n, NULL, &measured, &e);
    if (r)
        return r;
    r = dsv3_save(sessions, n, &sink, &size, &e);
    CHECK_EQ_UINT(size, measured);
    if (!r)
        CHECK_EQ_UINT(size, m->n);
    return r;
}

/* size_known: says how long it is. */
static dsv3_result load(dsv3_session *const *sessions, size_t n, tiny_stored *m, bool size_known)
{
    dsv3_source source;
    m->at = 0;
    source.read_fn = tiny_stored_get, source.user = m, source.size = size_known ? m->n : 0;
    return dsv3_load(sessions, n, &source, &e);
}

static dsv3_session *open_session(uint32_t max_tokens, dsv3_cache latent, dsv3_cache rope)
{
    dsv3_session *s = NULL;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.max_tokens = max_tokens, o.max_batch = 16, o.n_threads = 1, o.cache_latent = latent, o.cache_rope = rope;
    CHECK_OK(dsv3_session_open(&s, model, &o, &e), e);
    return s;
}

static size_t row_size(void)
{
    return dsv3_model_config(model)->vocab_size * sizeof(float);
}

static bool same_logits(dsv3_session *a, dsv3_session *b)
{
    const float *x = NULL, *y = NULL;
    return CHECK_OK(dsv3_session_logits(a, &x, &e), e) && CHECK_OK(dsv3_session_logits(b, &y, &e), e) &&
           CHECK_BYTES(x, row_size(), y, row_size());
}

/* Goes on with both, and they stay the same. */
static bool same_way_on(dsv3_session *a, dsv3_session *b)
{
    dsv3_generate_opts g;
    memset(&g, 0, sizeof g);
    g.max_tokens = 12, g.ignore_eos = true, g.sample.temperature = 1, g.sample.seed = 5, g.sample.repetition_penalty = 1.2f;
    bool ok = same_logits(a, b);
    ok = CHECK_OK(dsv3_generate(a, NULL, 0, &g, NULL, &e), e) && CHECK_OK(dsv3_generate(b, NULL, 0, &g, NULL, &e), e) && ok;
    return CHECK_BYTES(dsv3_session_tokens(a), dsv3_session_length(a) * 4, dsv3_session_tokens(b), dsv3_session_length(b) * 4) &&
           same_logits(a, b) && ok;
}

TEST(round_trips)
{
    static const dsv3_cache types[][2] = {{DSV3_CACHE_F32, DSV3_CACHE_F32},   {DSV3_CACHE_BF16, DSV3_CACHE_BF16}, {DSV3_CACHE_I8, DSV3_CACHE_BF16},
                                          {DSV3_CACHE_BF16, DSV3_CACHE_F32},  {DSV3_CACHE_I8, DSV3_CACHE_I8},     {DSV3_CACHE_F32, DSV3_CACHE_I8}};
    static const size_t lengths[] = {0, 1, 63, 64, 65, 130};
    int32_t ids[130];
    tiny_stored m;
    memset(&m, 0, sizeof m);
    for (int k = 0; k < 2; k++) {
        tiny_opts o = micro();
        if (k)
            o = tiny_default(), o.tokenizer = false;
        REQUIRE(open_model(o));
        tiny_ids(ids, 130, 32, 3);
        for (int i = 0; i < 6; i++)
            for (int l = 0; l < 6; l++) {
                dsv3_session *a = open_session(160, types[i][0], types[i][1]), *b = open_session(160, types[i][0], types[i][1]);
                CHECK_OK(dsv3_session_append(a, ids, lengths[l], NULL, &e), e);
                CHECK_OK(dsv3_session_append(b, ids + 3, 10, NULL, &e), e); /* and something else in the other */
                CHECK_OK(dsv3_session_rewind(b, 0, &e), e);
                CHECK_OK(save(&a, 1, &m), e);
                CHECK_OK(load(&b, 1, &m, l % 2 == 0), e);
                CHECK_EQ_UINT(dsv3_session_length(b), lengths[l]);
                if (lengths[l])
                    same_way_on(b, a);
                /* In the middle of a text: the last token has not been run. */
                CHECK(l == 0 || b->n_cached == b->n_tokens);
                dsv3_generate_opts g;
                memset(&g, 0, sizeof g);
                g.max_tokens = 3, g.ignore_eos = true;
                if (lengths[l]) {
                    CHECK_OK(dsv3_generate(a, NULL, 0, &g, NULL, &e), e);
                    CHECK(a->n_cached < a->n_tokens);
                }
                CHECK_OK(dsv3_session_rewind(b, 0, &e), e);
                CHECK_OK(save(&a, 1, &m), e);
                CHECK_OK(load(&b, 1, &m, true), e);
                if (lengths[l])
                    same_way_on(b, a);
                dsv3_session_close(a), dsv3_session_close(b);
            }
        close_model();
    }
    free(m.data);
}

static dsv3_workspace *open_workspace(uint32_t n_pages)
{
    dsv3_workspace *ws = NULL;
    dsv3_workspace_opts o;
    memset(&o, 0, sizeof o);
    o.n_pages = n_pages, o.max_batch = 16, o.n_threads = 1;
    CHECK_OK(dsv3_workspace_open(&ws, model, &o, &e), e);
    return ws;
}

static dsv3_session *open_in(dsv3_workspace *ws, uint32_t max_tokens, uint32_t reserve)
{
    dsv3_session *s = NULL;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.workspace = ws, o.max_tokens = max_tokens, o.reserve_pages = reserve;
    CHECK_OK(dsv3_session_open(&s, model, &o, &e), e);
    return s;
}

/* Several sessions together: what they share is stored once, and shared again. */
TEST(shared_pages_are_stored_once)
{
    int32_t ids[200];
    tiny_stored m;
    dsv3_session *s[4], *r[4];
    dsv3_workspace_info info;
    uint64_t one = 0, all = 0;
    memset(&m, 0, sizeof m);
    REQUIRE(open_model(micro()));
    tiny_ids(ids, 200, 32, 3);
    dsv3_workspace *ws = open_workspace(24), *other = open_workspace(24);
    s[0] = open_in(ws, 256, 0);
    CHECK_OK(dsv3_session_append(s[0], ids, 200, NULL, &e), e);
    for (int k = 1; k < 4; k++)
        CHECK_OK(dsv3_session_fork(&s[k], s[0], 0, &e), e);
    CHECK_OK(dsv3_session_rewind(s[1], 100, &e), e); /* shares two pages, the second not to its end */
    CHECK_OK(dsv3_session_rewind(s[2], 128, &e), e);
    CHECK_OK(dsv3_session_append(s[2], ids + 5, 20, NULL, &e), e);
    CHECK_OK(dsv3_save(s, 1, NULL, &one, &e), e);
    CHECK_OK(dsv3_save(s, 4, NULL, &all, &e), e);
    if (!CHECK(all < one + one / 3)) /* tokens, logits, and the pages that differ */
        printf("    one %llu, all %llu\n", (unsigned long long)one, (unsigned long long)all);
    CHECK_OK(save(s, 4, &m), e);
    for (int k = 0; k < 4; k++)
        r[k] = open_in(other, 256, (uint32_t)k % 2);
    CHECK_OK(load(r, 4, &m, true), e);
    dsv3_workspace_info_get(other, &info);
    CHECK_EQ_UINT(info.n_pages - info.n_free, 5);
    CHECK_EQ_UINT(other->refs[r[0]->pages[0]], 4);
    CHECK(r[0]->pages[3] == r[3]->pages[3] && r[2]->pages[1] == r[0]->pages[1] && r[2]->pages[2] != r[0]->pages[2]);
    for (int k = 0; k < 4; k++)
        same_way_on(r[k], s[k]);
    /* Into a part of the sessions, or one that is too short, or a workspace without room: nothing happens. */
    dsv3_session *last = r[3];
    size_t length = dsv3_session_length(r[0]);
    CHECK_RESULT(load(r, 3, &m, true), DSV3_ERROR_SNAPSHOT, e);
    r[3] = r[2];
    CHECK_RESULT(load(r, 4, &m, true), DSV3_ERROR_INVALID_ARGUMENT, e);
    r[3] = s[3];
    CHECK_RESULT(load(r, 4, &m, true), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(load(r, 0, &m, true), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_EQ_UINT(dsv3_session_length(r[0]), length);
    CHECK_OK(save(s, 1, &m), e);
    dsv3_workspace *small = open_workspace(3);
    dsv3_session *short_one = open_in(other, 150, 0), *poor = open_in(small, 256, 1);
    CHECK_RESULT(load(&short_one, 1, &m, true), DSV3_ERROR_CONTEXT_FULL, e);
    CHECK_RESULT(load(&poor, 1, &m, true), DSV3_ERROR_CACHE_FULL, e);
    dsv3_session_close(short_one), dsv3_session_close(poor);
    dsv3_workspace_info_get(small, &info);
    CHECK_EQ_UINT(info.n_free, 3);
    for (int k = 0; k < 4; k++)
        dsv3_session_close(s[k]);
    r[3] = last;
    for (int k = 0; k < 4; k++)
        dsv3_session_close(r[k]);
    dsv3_workspace_close(ws), dsv3_workspace_close(other), dsv3_workspace_close(small);
    free(m.data);
    close_model();
}

/* The session has these tokens and gives these logits still. */
static bool as_it_was(dsv3_session *s, const int32_t *ids, size_t n, const float *logits, uint32_t n_free)
{
    const float *x = NULL;
    bool ok = CHECK_BYTES(dsv3_session_tokens(s), dsv3_session_length(s) * 4, ids, n * 4);
    ok = CHECK_EQ_UINT(s->ws->n_free, n_free) && CHECK(!s->ws->running && !s->listed) && ok;
    return CHECK_OK(dsv3_session_logits(s, &x, &e), e) && CHECK_BYTES(x, row_size(), logits, row_size()) && ok;
}

TEST(cut_and_changed)
{
    int32_t ids[80];
    tiny_stored m;
    const float *x;
    memset(&m, 0, sizeof m);
    for (int type = DSV3_CACHE_F32; type <= DSV3_CACHE_I8; type += 2) {
        REQUIRE(open_model(micro()));
        tiny_ids(ids, 80, 32, 3);
        float *logits = (float *)malloc(row_size());
        dsv3_session *a = open_session(80, (dsv3_cache)type, DSV3_CACHE_AUTO), *b = open_session(192, (dsv3_cache)type, DSV3_CACHE_AUTO);
        CHECK_OK(dsv3_session_append(a, ids, type == DSV3_CACHE_F32 ? 4 : 67, NULL, &e), e);
        CHECK_OK(dsv3_session_append(b, ids + 10, 6, NULL, &e), e);
        CHECK_OK(dsv3_session_logits(b, &x, &e), e);
        memcpy(logits, x, row_size());
        CHECK_OK(save(&a, 1, &m), e);
        size_t n = m.n;
        bool ok = true;
        for (size_t cut = 0; cut < n && ok; cut++) {
            m.n = cut;
            ok = CHECK(load(&b, 1, &m, cut % 2 == 0) != DSV3_OK) && CHECK(e.message[0]);
            ok = (cut % 16 || as_it_was(b, ids + 10, 6, logits, 2)) && ok;
        }
        m.n = n;
        for (size_t i = 0; i < n && ok; i++) {
            const uint8_t flip = (uint8_t)(i % 3 == 0 ? 0xFF : 1u << (i % 8));
            m.data[i] ^= flip;
            ok = CHECK(load(&b, 1, &m, i % 2 == 0) != DSV3_OK) && CHECK(e.message[0]);
            ok = (i % 16 || as_it_was(b, ids + 10, 6, logits, 2)) && ok;
            m.data[i] ^= flip;
            if (!ok)
                printf("    byte %u of %u\n", (unsigned)i, (unsigned)n);
        }
        CHECK_OK(tiny_stored_put(&m, "x", 1) ? DSV3_OK : DSV3_ERROR_IO, e);
        CHECK_RESULT(load(&b, 1, &m, true), DSV3_ERROR_SNAPSHOT, e); /* something behind it */
        CHECK_OK(load(&b, 1, &m, false), e);
        same_way_on(b, a);
        free(logits);
        dsv3_session_close(a), dsv3_session_close(b);
        close_model();
    }
    free(m.data);
}

/* Numbers that are wrong though the checksums are right: as someone would write them who wants to do harm. */
static void seal(tiny_stored *m, size_t tables)
{
    dsv3__snap_sum sum;
    uint64_t v;
    dsv3__snap_sum_start(&sum);
    dsv3__snap_sum_add(&sum, m->data, 248);
    v = dsv3__snap_sum_get(&sum);
    memcpy(m->data + 248, &v, 8);
    dsv3__snap_sum_start(&sum);
    dsv3__snap_sum_add(&sum, m->data, tables);
    v = dsv3__snap_sum_get(&sum);
    memcpy(m->data + tables, &v, 8);
    dsv3__snap_sum_start(&sum);
    dsv3__snap_sum_add(&sum, m->data, m->n - 8);
    v = dsv3__snap_sum_get(&sum);
    memcpy(m->data + m->n - 8, &v, 8);
}

TEST(forged)
{
    int32_t ids[80];
    tiny_stored m;
    const float *x;
    memset(&m, 0, sizeof m);
    REQUIRE(open_model(micro()));
    tiny_ids(ids, 80, 32, 3);
    float *logits = (float *)malloc(row_size());
    dsv3_session *a = open_session(256, DSV3_CACHE_F32, DSV3_CACHE_F32), *b = open_session(192, DSV3_CACHE_F32, DSV3_CACHE_F32);
    CHECK_OK(dsv3_session_append(a, ids, 70, NULL, &e), e);
    CHECK_OK(dsv3_session_append(b, ids + 10, 6, NULL, &e), e);
    CHECK_OK(dsv3_session_logits(b, &x, &e), e);
    memcpy(logits, x, row_size());
    CHECK_OK(save(&a, 1, &m), e);
    const size_t tokens = 264, numbers = tokens + 4 * 70, rows = numbers + 8, tables = rows + 8;
    seal(&m, tables);
    CHECK_OK(load(&a, 1, &m, true), e); /* the seal itself is right */
    static const uint32_t values[] = {0, 1, 2, 63, 65, 71, 128, 0x7FFFFFFF, 0x80000000u, 0xFFFFFFFFu};
    const size_t places[] = {16, 20, 32, 36, 40, 44, 48, 256, 260, tokens, tokens + 4 * 69, numbers, numbers + 4, rows, rows + 4};
    for (size_t p = 0; p < sizeof places / sizeof places[0]; p++)
        for (size_t v = 0; v < sizeof values / sizeof values[0]; v++) {
            uint32_t was;
            memcpy(&was, m.data + places[p], 4);
            const bool harmless = was == values[v] || ((places[p] == tokens || places[p] == tokens + 4 * 69) && values[v] < 32) ||
                                  (places[p] == 260 && values[v] == 65); /* fewer rows than there are */
            memcpy(m.data + places[p], &values[v], 4);
            seal(&m, tables);
            if (!harmless) {
                dsv3_result r = load(&b, 1, &m, v % 2 == 0);
                if (!CHECK(r != DSV3_OK) || !as_it_was(b, ids + 10, 6, logits, 2))
                    printf("    %u at %u\n", (unsigned)values[v], (unsigned)places[p]);
            }
            memcpy(m.data + places[p], &was, 4);
        }
    seal(&m, tables);
    CHECK_OK(load(&b, 1, &m, true), e);
    CHECK_OK(dsv3_session_rewind(b, 0, &e), e);
    /* Rows that are no numbers are rows: the logits are refused. */
    CHECK_OK(save(&a, 1, &m), e);
    memset(m.data + tables + 8 + 64 * 4, 0xFF, 64);
    seal(&m, tables);
    CHECK_OK(load(&b, 1, &m, true), e);
    CHECK_RESULT(dsv3_session_logits(b, &x, &e), DSV3_ERROR_BAD_TENSOR, e);
    free(logits), free(m.data);
    dsv3_session_close(a), dsv3_session_close(b);
    close_model();
}

/* Of another model, mode or cache type: refused by name. */
TEST(of_something_else)
{
    int32_t ids[10];
    tiny_stored m;
    memset(&m, 0, sizeof m);
    tiny_ids(ids, 10, 32, 3);
    REQUIRE(open_model(micro()));
    dsv3_session *s = open_session(64, DSV3_CACHE_F32, DSV3_CACHE_F32);
    CHECK_OK(dsv3_session_append(s, ids, 10, NULL, &e), e);
    CHECK_OK(save(&s, 1, &m), e);
    dsv3_session_close(s);
    s = open_session(64, DSV3_CACHE_I8, DSV3_CACHE_BF16);
    CHECK_RESULT(load(&s, 1, &m, true), DSV3_ERROR_SNAPSHOT, e);
    CHECK_CONTAINS(e.message, "cache of f32 and f32, here it is of i8 and bf16");
    dsv3_session_close(s);
    close_model();
    for (int k = 0; k < 6; k++) { /* the last two are the same model */
        tiny_opts o = micro();
        dsv3_model_opts mo;
        memset(&mo, 0, sizeof mo);
        if (k == 0)
            o.seed = 2; /* other weights alone */
        if (k == 1)
            o.scaling = 1.5f;
        if (k == 2)
            o.n_layers = 3;
        if (k == 3)
            mo.compute = DSV3_COMPUTE_F32;
        if (k == 5)
            o.n_shards = 0;
        tiny_free(&t);
        model = NULL;
        tiny_build(&t, &o);
        t.read_mode = k == 4;
        REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
        s = open_session(64, DSV3_CACHE_F32, DSV3_CACHE_F32);
        dsv3_result r = load(&s, 1, &m, true);
        if (k < 4) {
            CHECK_RESULT(r, DSV3_ERROR_SNAPSHOT, e);
            CHECK_CONTAINS(e.message, k < 3 ? "of another model: deepseek_v3, fingerprint" : "computed in mode int8, this model is open in f32");
            CHECK_EQ_UINT(dsv3_session_length(s), 0);
        } else {
            CHECK_OK(r, e);
        }
        dsv3_session_close(s);
        close_model();
    }
    free(m.data);
}

/* A sink that fails, arguments that cannot be. */
TEST(writing_fails)
{
    int32_t ids[70];
    tiny_stored m;
    dsv3_sink sink;
    dsv3_source source;
    memset(&m, 0, sizeof m);
    memset(&source, 0, sizeof source);
    REQUIRE(open_model(micro()));
    tiny_ids(ids, 70, 32, 3);
    dsv3_session *s = open_session(128, DSV3_CACHE_F32, DSV3_CACHE_F32), *none = NULL;
    CHECK_OK(dsv3_session_append(s, ids, 70, NULL, &e), e);
    CHECK_OK(save(&s, 1, &m), e);
    const size_t n = m.n;
    for (size_t at = 1; at <= n; at += 97) {
        m.fail_at = at;
        CHECK_RESULT(save(&s, 1, &m), DSV3_ERROR_IO, e);
        CHECK_EQ_UINT(s->ws->marks[s->pages[0]], 0);
    }
    m.fail_at = 0;
    sink.write_fn = NULL, sink.user = NULL;
    CHECK_RESULT(dsv3_save(&s, 1, &sink, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_save(NULL, 1, NULL, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_save(&none, 1, NULL, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_load(&s, 1, &source, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_load(&s, 1, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_OK(save(&s, 1, &m), e);
    CHECK_EQ_UINT(m.n, n);
    free(m.data);
    dsv3_session_close(s);
    close_model();
}

TEST_MAIN(RUN(round_trips), RUN(shared_pages_are_stored_once), RUN(cut_and_changed), RUN(forged), RUN(of_something_else), RUN(writing_fails))
