/* Sessions that share a workspace: any number of them advanced by one call, forks that share pages, budgets. What each one
   gets are the bits of its run alone. BATCH_OPS (environment) sets how many random operations the test of forks makes. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#define MAX 16

static tiny t;
static dsv3_model *model;
static dsv3_error e;

static bool open_model_in(tiny_opts o, dsv3_compute compute)
{
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    mo.compute = compute;
    tiny_free(&t);
    model = NULL;
    tiny_build(&t, &o);
    return CHECK_OK(tiny_open(&t, &model, &mo, &e), e);
}

static bool open_model(tiny_opts o)
{
    return open_model_in(o, DSV3_COMPUTE_AUTO);
}

static void close_model(void)
{
    dsv3_model_close(model);
    model = NULL;
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

static tiny_opts plain(void)
{
    tiny_opts o = tiny_default();
    o.tokenizer = false, o.vocab = 192;
    return o;
}

static tiny_opts micro(void)
{
    tiny_opts o = tiny_micro();
    o.tokenizer = false;
    o.vocab = 64, o.max_pos = 512;
    return o;
}

static size_t row_size(void)
{
    return dsv3_model_config(model)->vocab_size * sizeof(float);
}

static dsv3_workspace *open_workspace(uint32_t n_pages, uint32_t max_batch, uint32_t n_threads, dsv3_cache latent, dsv3_cache rope)
{
    dsv3_workspace *ws = NULL;
    dsv3_workspace_opts o;
    memset(&o, 0, sizeof o);
    o.n_pages = n_pages, o.max_batch = max_batch, o.n_threads = n_threads;
    o.cache_latent = latent, o.cache_rope = rope;
    CHECK_OK(dsv3_workspace_open(&ws, model, &o, &e), e);
    return ws;
}

static dsv3_result open_in(dsv3_session **s, dsv3_workspace *ws, uint32_t max_tokens, uint32_t reserve)
{
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.max_tokens = max_tokens, o.workspace = ws, o.reserve_pages = reserve;
    return dsv3_session_open(s, model, &o, &e);
}

/* A session of its own, of the same cache types, that runs token by token. */
static dsv3_session *open_alone(uint32_t max_tokens, dsv3_cache latent, dsv3_cache rope)
{
    dsv3_session *s = NULL;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.max_tokens = max_tokens, o.max_batch = 8, o.n_threads = 1, o.cache_latent = latent, o.cache_rope = rope;
    CHECK_OK(dsv3_session_open(&s, model, &o, &e), e);
    return s;
}

static bool same_logits(dsv3_session *a, dsv3_session *b)
{
    const float *x = NULL, *y = NULL;
    return CHECK_OK(dsv3_session_logits(a, &x, &e), e) && CHECK_OK(dsv3_session_logits(b, &y, &e), e) &&
           CHECK_BYTES(x, row_size(), y, row_size());
}

/* What the workspace says of its pages is what its sessions name. */
static bool sound(const dsv3_workspace *ws, dsv3_session *const *sessions, size_t n)
{
    uint32_t *refs = (uint32_t *)calloc(ws->n_pages, sizeof *refs), promised = 0, n_free = 0, count = 0, named = 0;
    bool ok = true;
    for (size_t k = 0; k < n; k++) {
        const dsv3_session *s = sessions[k];
        if (!s)
            continue;
        count++;
        ok = CHECK_EQ_UINT(s->n_pages, (s->n_cached + DSV3_PAGE_TOKENS - 1) / DSV3_PAGE_TOKENS) && ok;
        for (uint32_t i = 0; i < s->n_pages; i++)
            refs[s->pages[i]]++;
        ok = CHECK(s->drawn <= s->reserve) && ok;
        promised += s->reserve - s->drawn;
        named += s->owned != NULL && s->owned->refs > 0;
    }
    for (uint32_t i = 0; i < ws->n_pages; i++)
        n_free += refs[i] == 0;
    ok = CHECK_BYTES(ws->refs, ws->n_pages * 4, refs, ws->n_pages * 4) && ok;
    ok = CHECK_EQ_UINT(ws->n_free, n_free) && ok;
    for (uint32_t i = 0; i < ws->n_free; i++)
        ok = CHECK(refs[ws->free[i]]++ == 0) && ok; /* free, and listed once */
    ok = CHECK_EQ_UINT(ws->n_promised, promised) && CHECK(promised <= n_free) && ok;
    ok = CHECK_EQ_UINT(ws->n_sessions, count) && CHECK_EQ_UINT(named, count) && ok;
    for (uint32_t i = 0; i < ws->n_pages; i++)
        ok = (ws->marks[i] == 0 || CHECK(false)) && ok;
    free(refs);
    return ok;
}

/* One that takes part: a prompt, then the likeliest token each time. */
typedef struct member {
    dsv3_session *s;
    int32_t ids[512];
    size_t n_prompt, n, target;
} member;

static int32_t greedy(dsv3_session *s)
{
    dsv3_sample sample;
    CHECK_OK(dsv3_session_sample(s, NULL, &sample, &e), e);
    return sample.token;
}

/* The same tokens alone: the same ids, the same last logits. */
static bool check_alone(member *m, dsv3_cache latent, dsv3_cache rope)
{
    dsv3_session *s = open_alone(512, latent, rope);
    bool ok = true;
    size_t n = m->n < m->n_prompt ? m->n : m->n_prompt;
    CHECK_OK(dsv3_session_append(s, m->ids, n, NULL, &e), e);
    for (size_t i = n; i < m->n && ok; i++) {
        int32_t id = greedy(s);
        ok = CHECK_EQ_INT(m->ids[i], id);
        CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    }
    ok = CHECK_BYTES(dsv3_session_tokens(m->s), dsv3_session_length(m->s) * 4, m->ids, m->n * 4) && ok;
    ok = same_logits(m->s, s) && ok;
    dsv3_session_close(s);
    return ok;
}

static void join_and_leave(unsigned width, unsigned steps, uint32_t n_threads, dsv3_cache latent, dsv3_cache rope)
{
    uint64_t random = 77 + width;
    static member members[MAX];
    unsigned left = 0;
    uint64_t rows = 0;
    memset(members, 0, sizeof members);
    dsv3_workspace *ws = open_workspace(width * 3, 24, n_threads, latent, rope);
    for (unsigned step = 0; step <= steps; step++) {
        dsv3_batch_item items[MAX];
        size_t n = 0;
        memset(items, 0, sizeof items);
        for (unsigned k = 0; k < width; k++) {
            member *m = &members[k];
            if (m->s && (m->n >= m->target || step == steps || tiny_next(&random) % 97 == 0)) {
                if (m->n && !check_alone(m, latent, rope))
                    printf("    width %u, step %u, session %u of %u tokens\n", width, step, k, (unsigned)m->n);
                dsv3_session_close(m->s);
                m->s = NULL;
                left++;
            }
            if (!m->s && step < steps && tiny_next(&random) % 3 == 0) {
                m->n = 0, m->n_prompt = 1 + tiny_next(&random) % 90, m->target = m->n_prompt + 1 + tiny_next(&random) % 60;
                tiny_ids(m->ids, m->n_prompt, dsv3_model_config(model)->vocab_size, tiny_next(&random));
                CHECK_OK(open_in(&m->s, ws, 192, 0), e);
            }
            if (!m->s || tiny_next(&random) % 4 == 0)
                continue; /* not in this step */
            if (m->n >= m->n_prompt)
                m->ids[m->n] = greedy(m->s);
            items[n].session = m->s;
            items[n].tokens = m->ids + m->n;
            items[n].count = m->n >= m->n_prompt ? 1 : 1 + tiny_next(&random) % (m->n_prompt - m->n);
            rows += items[n].count;
            m->n += items[n++].count;
        }
        CHECK_OK(dsv3_batch(items, n, &e), e);
    }
    CHECK(left > 2 && rows > steps);
    CHECK(sound(ws, NULL, 0));
    dsv3_workspace_close(ws);
}

TEST(joined_and_left_at_random)
{
    REQUIRE(open_model(micro()));
    join_and_leave(1, 500, 1, DSV3_CACHE_F32, DSV3_CACHE_F32);
    join_and_leave(2, 500, 1, DSV3_CACHE_F32, DSV3_CACHE_F32);
    join_and_leave(4, 500, 2, DSV3_CACHE_F32, DSV3_CACHE_F32);
    join_and_leave(8, 500, 1, DSV3_CACHE_F32, DSV3_CACHE_F32);
    join_and_leave(16, 500, 1, DSV3_CACHE_F32, DSV3_CACHE_F32);
    close_model();
    REQUIRE(open_model(plain()));
    join_and_leave(4, 40, 1, DSV3_CACHE_F32, DSV3_CACHE_F32);
    join_and_leave(4, 40, 2, DSV3_CACHE_I8, DSV3_CACHE_BF16);
    join_and_leave(3, 40, 1, DSV3_CACHE_BF16, DSV3_CACHE_F32);
    close_model();
}

/* Each item has its own outputs. */
TEST(outputs_of_items)
{
    int32_t ids[2][40];
    uint32_t some[3] = {0, 7, 39};
    REQUIRE(open_model(plain()));
    size_t vocab = row_size() / 4, experts = (size_t)(dsv3_model_config(model)->num_hidden_layers - dsv3_model_config(model)->first_k_dense_replace) *
                                             dsv3_model_config(model)->num_experts_per_tok;
    float *all = (float *)malloc(40 * row_size()), *few = (float *)malloc(3 * row_size()), *expected = (float *)malloc(40 * row_size());
    int32_t *chosen = (int32_t *)malloc(40 * experts * 4), *expected_chosen = (int32_t *)malloc(40 * experts * 4);
    dsv3_workspace *ws = open_workspace(4, 16, 2, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    dsv3_session *s[2];
    dsv3_batch_item items[2];
    dsv3_outputs out[2];
    memset(items, 0, sizeof items);
    memset(out, 0, sizeof out);
    for (int k = 0; k < 2; k++) {
        tiny_ids(ids[k], 40, 192, 5 + (uint64_t)k);
        CHECK_OK(open_in(&s[k], ws, 64, 1), e);
        items[k].session = s[k], items[k].tokens = ids[k], items[k].count = 40, items[k].outputs = &out[k];
    }
    out[0].logits = few, out[0].logit_rows = some, out[0].n_logit_rows = 3;
    out[1].logits = all, out[1].experts = chosen;
    CHECK_OK(dsv3_batch(items, 2, &e), e);
    for (int k = 0; k < 2; k++) {
        dsv3_session *alone = open_alone(64, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
        dsv3_outputs o;
        memset(&o, 0, sizeof o);
        o.logits = expected, o.experts = expected_chosen;
        CHECK_OK(dsv3_session_append(alone, ids[k], 40, &o, &e), e);
        same_logits(s[k], alone);
        for (int i = 0; k == 0 && i < 3; i++)
            CHECK_BYTES(few + (size_t)i * vocab, row_size(), expected + some[i] * vocab, row_size());
        if (k == 1) {
            CHECK_BYTES(all, 40 * row_size(), expected, 40 * row_size());
            CHECK_BYTES(chosen, 40 * experts * 4, expected_chosen, 40 * experts * 4);
        }
        dsv3_session_close(alone);
        dsv3_session_close(s[k]);
    }
    dsv3_workspace_close(ws);
    free(all), free(few), free(expected), free(chosen), free(expected_chosen);
    close_model();
}

TEST(what_cannot_be_a_batch)
{
    int32_t ids[3] = {1, 2, 3}, bad[1] = {192};
    dsv3_batch_item items[2];
    dsv3_session *a, *b, *other, *s = NULL;
    REQUIRE(open_model(plain()));
    dsv3_workspace *ws = open_workspace(4, 4, 1, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(open_in(&a, ws, 64, 0), e);
    CHECK_OK(open_in(&b, ws, 64, 0), e);
    other = open_alone(64, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    memset(items, 0, sizeof items);
    for (int k = 0; k < 2; k++)
        items[k].session = a, items[k].tokens = ids, items[k].count = 3;
    CHECK_OK(dsv3_batch(NULL, 0, &e), e);
    CHECK_RESULT(dsv3_batch(NULL, 1, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "item 1: the session is in the batch already");
    items[1].session = other;
    CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "another workspace");
    items[1].session = NULL;
    CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    items[1].session = b, items[1].tokens = bad, items[1].count = 1;
    CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "item 1: append: token 0 is 192");
    items[1].tokens = ids, items[1].count = 65;
    CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_CONTEXT_FULL, e);
    CHECK_EQ_UINT(dsv3_session_length(a) + dsv3_session_length(b), 0);
    items[1].count = 3; /* and after all that it still works */
    CHECK_OK(dsv3_batch(items, 2, &e), e);
    CHECK_OK(dsv3_session_append(other, ids, 3, NULL, &e), e);
    same_logits(a, other), same_logits(b, other);

    dsv3_session_opts so;
    memset(&so, 0, sizeof so);
    so.cache_latent = (dsv3_cache)9;
    CHECK_RESULT(dsv3_session_open(&s, model, &so, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    dsv3_model *second = NULL;
    CHECK_OK(tiny_open(&t, &second, NULL, &e), e);
    memset(&so, 0, sizeof so);
    so.workspace = ws;
    CHECK_RESULT(dsv3_session_open(&s, second, &so, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    CHECK(s == NULL);
    dsv3_model_close(second);
    dsv3_session_close(a), dsv3_session_close(b), dsv3_session_close(other);
    dsv3_workspace_close(ws);
    dsv3_workspace_close(NULL);
    close_model();
}

/* A count of 0 brings logits up to date; a batch of nothing does nothing. */
TEST(nothing_to_append)
{
    int32_t ids[10];
    const float *x;
    REQUIRE(open_model(plain()));
    tiny_ids(ids, 10, 192, 3);
    dsv3_session *s = open_alone(64, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO), *r = open_alone(64, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    dsv3_batch_item item;
    memset(&item, 0, sizeof item);
    item.session = s;
    CHECK_OK(dsv3_batch(&item, 1, &e), e); /* an empty one has none */
    CHECK_RESULT(dsv3_session_logits(s, &x, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_OK(dsv3_session_append(s, ids, 10, NULL, &e), e);
    CHECK_OK(dsv3_session_rewind(s, 6, &e), e);
    CHECK(!s->logits_valid);
    CHECK_OK(dsv3_batch(&item, 1, &e), e);
    CHECK(s->logits_valid);
    CHECK_OK(dsv3_session_append(r, ids, 6, NULL, &e), e);
    same_logits(s, r);
    dsv3_session_close(s), dsv3_session_close(r);
    close_model();
}

static bool stop_at_once(void *user, uint64_t done, uint64_t total)
{
    (void)total;
    return ++*(int *)user < 2 || done == 0;
}

/* A batch that fails in its second piece: all is as it was, for all. */
TEST(a_batch_that_fails)
{
    int32_t ids[60];
    REQUIRE(open_model(plain()));
    tiny_ids(ids, 60, 192, 4);
    dsv3_session *alone = open_alone(64, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    dsv3_workspace *ws = open_workspace(6, 8, 2, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    int calls = 0;
    dsv3_session_opts so;
    dsv3_session *s[2];
    dsv3_batch_item items[2];
    memset(&so, 0, sizeof so);
    memset(items, 0, sizeof items);
    so.workspace = ws, so.max_tokens = 128;
    CHECK_OK(dsv3_session_open(&s[0], model, &so, &e), e);
    so.progress.fn = stop_at_once, so.progress.user = &calls;
    CHECK_OK(dsv3_session_open(&s[1], model, &so, &e), e);
    CHECK_OK(dsv3_session_append(s[0], ids, 5, NULL, &e), e);
    CHECK_OK(dsv3_session_append(s[1], ids, 3, NULL, &e), e);
    for (int k = 0; k < 2; k++)
        items[k].session = s[k], items[k].tokens = ids + (k ? 3 : 5), items[k].count = 30;
    for (int how = 0; how < 2; how++) {
        calls = how ? -100 : 0;
        if (how)
            dsv3_session_cancel(s[1]);
        CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_CANCELLED, e);
        CHECK_EQ_UINT(dsv3_session_length(s[0]), 5);
        CHECK_EQ_UINT(dsv3_session_length(s[1]), 3);
        sound(ws, s, 2);
    }
    calls = -100;
    CHECK_OK(dsv3_session_append(alone, ids, 5, NULL, &e), e);
    same_logits(s[0], alone);
    CHECK_OK(dsv3_session_rewind(alone, 3, &e), e);
    same_logits(s[1], alone);
    CHECK_OK(dsv3_batch(items, 2, &e), e);
    CHECK_OK(dsv3_session_append(alone, ids + 3, 30, NULL, &e), e);
    same_logits(s[1], alone);
    CHECK_OK(dsv3_session_append(alone, ids + 33, 2, NULL, &e), e);
    same_logits(s[0], alone);
    for (int k = 0; k < 2; k++)
        dsv3_session_close(s[k]);
    dsv3_session_close(alone);
    dsv3_workspace_close(ws);
    close_model();
}

/* Forks name the same pages; the first write into one copies it and no other. */
TEST(forks_share_pages)
{
    enum { FORKS = 64, PROMPT = 300 };
    int32_t ids[PROMPT + 1];
    dsv3_session *s[FORKS + 1];
    dsv3_batch_item items[FORKS];
    dsv3_workspace_info info;
    REQUIRE(open_model(micro()));
    tiny_ids(ids, PROMPT + 1, 64, 9);
    dsv3_workspace *ws = open_workspace(200, 64, 2, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    dsv3_session *alone = open_alone(400, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(open_in(&s[0], ws, 400, 0), e);
    CHECK_OK(dsv3_session_append(s[0], ids, PROMPT, NULL, &e), e);
    CHECK_OK(dsv3_session_append(alone, ids, PROMPT, NULL, &e), e);
    dsv3_workspace_info_get(ws, &info);
    CHECK_EQ_UINT(info.n_pages - info.n_free, 5);
    CHECK_EQ_UINT(info.n_pages, 200);
    CHECK_EQ_INT(info.cache_latent, DSV3_CACHE_BF16); /* what bf16 arithmetic meets anyway */
    for (int k = 1; k <= FORKS; k++)
        CHECK_OK(dsv3_session_fork(&s[k], s[0], 0, &e), e);
    dsv3_workspace_info_get(ws, &info);
    CHECK_EQ_UINT(info.n_pages - info.n_free, 5); /* not one more */
    CHECK_EQ_UINT(info.n_sessions, FORKS + 1);
    CHECK_EQ_UINT(ws->refs[s[0]->pages[4]], FORKS + 1);
    for (int k = 1; k <= FORKS; k++)
        CHECK(s[k]->logits == s[0]->logits && s[k]->logits_valid); /* not run again */
    memset(items, 0, sizeof items);
    for (int k = 0; k < FORKS; k++)
        ids[PROMPT] = 3, items[k].session = s[k + 1], items[k].tokens = ids + PROMPT, items[k].count = 1;
    CHECK_OK(dsv3_batch(items, FORKS, &e), e);
    dsv3_workspace_info_get(ws, &info);
    CHECK_EQ_UINT(info.n_pages - info.n_free, 5 + FORKS); /* each its last page */
    same_logits(s[0], alone);
    CHECK_OK(dsv3_session_append(alone, ids + PROMPT, 1, NULL, &e), e);
    for (int k = 1; k <= FORKS; k++)
        same_logits(s[k], alone);
    sound(ws, s, FORKS + 1);
    dsv3_session_close(s[0]); /* the parent first */
    s[0] = NULL;
    CHECK_OK(dsv3_session_rewind(s[1], 100, &e), e);
    CHECK_OK(dsv3_session_append(s[1], ids + 100, PROMPT - 99, NULL, &e), e); /* writes into pages that others name */
    same_logits(s[1], alone);
    CHECK_OK(dsv3_session_rewind(s[2], 0, &e), e);
    CHECK_OK(dsv3_session_append(s[2], ids, PROMPT + 1, NULL, &e), e);
    same_logits(s[2], alone), same_logits(s[3], alone);
    sound(ws, s, FORKS + 1);
    for (int k = 1; k <= FORKS; k++)
        dsv3_session_close(s[k]);
    sound(ws, NULL, 0);
    dsv3_workspace_close(ws);
    dsv3_session_close(alone);
    close_model();
}

/* Forks of a session that has a workspace of its own live in it, and the last one closes it. */
TEST(forks_of_a_session_alone)
{
    int32_t ids[80];
    REQUIRE(open_model(micro()));
    tiny_ids(ids, 80, 64, 9);
    dsv3_session *s = open_alone(128, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO), *f = NULL, *g = NULL;
    CHECK_OK(dsv3_session_append(s, ids, 64, NULL, &e), e);
    CHECK_OK(dsv3_session_fork(&f, s, 0, &e), e);
    CHECK(dsv3_session_workspace(f) == dsv3_session_workspace(s));
    CHECK_RESULT(dsv3_session_fork(&g, s, 2, &e), DSV3_ERROR_CACHE_FULL, e);
    CHECK(g == NULL);
    CHECK_OK(dsv3_session_append(f, ids + 64, 16, NULL, &e), e); /* the second of two pages */
    CHECK_RESULT(dsv3_session_append(s, ids + 64, 16, NULL, &e), DSV3_ERROR_CACHE_FULL, e);
    CHECK_EQ_UINT(dsv3_session_length(s), 64);
    dsv3_session *both[2] = {s, f};
    sound(s->ws, both, 2);
    dsv3_session_close(s);
    dsv3_session *r = open_alone(128, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(dsv3_session_append(r, ids, 80, NULL, &e), e);
    same_logits(f, r);
    dsv3_session_close(f), dsv3_session_close(r);
    close_model();
}

/* Pages that are promised are there; those that are not may be missing, and then nothing has changed. */
TEST(budgets)
{
    int32_t ids[256];
    dsv3_session *a = NULL, *b = NULL, *c = NULL, *list[3];
    dsv3_workspace_info info;
    REQUIRE(open_model(micro()));
    tiny_ids(ids, 256, 64, 9);
    dsv3_workspace *ws = open_workspace(5, 64, 1, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(open_in(&a, ws, 256, 2), e);
    CHECK_OK(open_in(&b, ws, 256, 0), e);
    CHECK_RESULT(open_in(&c, ws, 256, 4), DSV3_ERROR_CACHE_FULL, e);
    dsv3_workspace_info_get(ws, &info);
    CHECK_EQ_UINT(info.n_free, 5);
    CHECK_EQ_UINT(info.n_reserved, 2);
    CHECK_RESULT(dsv3_session_append(b, ids, 193, NULL, &e), DSV3_ERROR_CACHE_FULL, e); /* four */
    CHECK_EQ_UINT(dsv3_session_length(b), 0);
    CHECK_OK(dsv3_session_append(b, ids, 192, NULL, &e), e); /* three */
    CHECK_OK(dsv3_session_append(a, ids, 128, NULL, &e), e);
    CHECK_RESULT(dsv3_session_append(a, ids, 1, NULL, &e), DSV3_ERROR_CACHE_FULL, e);
    CHECK_EQ_UINT(dsv3_session_length(a), 128);
    CHECK_OK(dsv3_session_rewind(a, 64, &e), e); /* set aside again: not for b */
    CHECK_RESULT(dsv3_session_append(b, ids, 1, NULL, &e), DSV3_ERROR_CACHE_FULL, e);
    CHECK_OK(dsv3_session_fork(&c, b, 0, &e), e);
    dsv3_batch_item items[2];
    memset(items, 0, sizeof items);
    items[0].session = a, items[0].tokens = ids + 64, items[0].count = 64;
    items[1].session = c, items[1].tokens = ids + 64, items[1].count = 1;
    CHECK_RESULT(dsv3_batch(items, 2, &e), DSV3_ERROR_CACHE_FULL, e);
    CHECK_EQ_UINT(dsv3_session_length(a), 64);
    CHECK_OK(dsv3_session_rewind(b, 190, &e), e);
    CHECK_RESULT(dsv3_session_append(b, ids + 190, 2, NULL, &e), DSV3_ERROR_CACHE_FULL, e); /* would need a copy */
    items[1].session = c;
    list[0] = a, list[1] = b, list[2] = c;
    sound(ws, list, 3);
    /* Two that share a page and both write need one more page, not two. */
    CHECK_OK(dsv3_session_rewind(c, 190, &e), e);
    CHECK_OK(dsv3_session_rewind(a, 0, &e), e);
    dsv3_session_close(a);
    dsv3_session *filler = NULL;
    CHECK_OK(open_in(&filler, ws, 256, 1), e);
    for (int k = 0; k < 2; k++)
        items[k].session = k ? c : b, items[k].tokens = ids + 190, items[k].count = 2;
    CHECK_OK(dsv3_batch(items, 2, &e), e);
    dsv3_session *r = open_alone(256, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(dsv3_session_append(r, ids, 192, NULL, &e), e);
    same_logits(b, r), same_logits(c, r);
    list[0] = filler;
    sound(ws, list, 3);
    dsv3_session_close(filler), dsv3_session_close(b), dsv3_session_close(c), dsv3_session_close(r);
    dsv3_workspace_close(ws);
    close_model();
}

/* Random forks, appends, rewinds, synchronisations and closings beside a plain copy of each one's tokens; what logits must be
   is told by a session that shares nothing. */
TEST(random_forks)
{
    enum { SESSIONS = 12, LENGTH = 320 };
    static int32_t copies[SESSIONS][LENGTH];
    size_t lengths[SESSIONS], full = 0, forks = 0, copied = 0;
    dsv3_session *s[SESSIONS];
    const char *env = getenv("BATCH_OPS");
    unsigned long ops = env ? strtoul(env, NULL, 10) : 3000;
    uint64_t random = 5;
    memset(s, 0, sizeof s);
    memset(lengths, 0, sizeof lengths);
    REQUIRE(open_model(micro()));
    dsv3_workspace *ws = open_workspace(11, 16, 1, DSV3_CACHE_I8, DSV3_CACHE_BF16);
    dsv3_session *plain_one = open_alone(LENGTH, DSV3_CACHE_I8, DSV3_CACHE_BF16);
    for (unsigned long op = 0; op < ops; op++) {
        unsigned k = (unsigned)(tiny_next(&random) % SESSIONS), j = (unsigned)(tiny_next(&random) % SESSIONS);
        unsigned what = (unsigned)(tiny_next(&random) % 16);
        bool ok = true;
        int32_t more[LENGTH];
        if (!s[k]) {
            if (!s[j] || tiny_next(&random) % 4 == 0) {
                if (open_in(&s[k], ws, LENGTH, (uint32_t)(tiny_next(&random) % 2)) != DSV3_OK)
                    ok = CHECK_RESULT(e.code, DSV3_ERROR_CACHE_FULL, e);
                lengths[k] = 0;
                continue;
            }
            dsv3_result r = dsv3_session_fork(&s[k], s[j], (uint32_t)(tiny_next(&random) % 2), &e);
            if (r) {
                CHECK_RESULT(r, DSV3_ERROR_CACHE_FULL, e);
                continue;
            }
            lengths[k] = lengths[j];
            memcpy(copies[k], copies[j], sizeof copies[k]);
            forks++;
            continue;
        }
        if (what < 2) {
            dsv3_session_close(s[k]);
            s[k] = NULL;
        } else if (what < 5) { /* often to where pages meet */
            size_t n = (size_t)(tiny_next(&random) % (lengths[k] + 1));
            n = tiny_next(&random) % 3 == 0 ? n / 64 * 64 : n;
            ok = CHECK_OK(dsv3_session_rewind(s[k], n, &e), e);
            lengths[k] = n;
        } else if (what < 7) {
            size_t same = (size_t)(tiny_next(&random) % (lengths[k] + 1)), n = same + (size_t)(tiny_next(&random) % 9), kept = 0;
            n = n < LENGTH ? n : LENGTH;
            memcpy(more, copies[k], sizeof more);
            tiny_ids(more + same, n - same, 64, tiny_next(&random));
            dsv3_result r = dsv3_session_sync(s[k], more, n, &kept, &e);
            if (r == DSV3_OK) {
                ok = CHECK(kept >= same && kept <= n);
                memcpy(copies[k], more, sizeof more);
                lengths[k] = n;
            } else {
                ok = CHECK_RESULT(r, DSV3_ERROR_CACHE_FULL, e);
                full++;
            }
        } else if (what < 8 && s[j] && j != k) { /* two at once */
            dsv3_batch_item items[2];
            memset(items, 0, sizeof items);
            for (int i = 0; i < 2; i++) {
                unsigned who = i ? j : k;
                items[i].session = s[who], items[i].tokens = more + 20 * i, items[i].count = (size_t)(tiny_next(&random) % 20);
                tiny_ids(more + 20 * i, 20, 64, tiny_next(&random));
                if (lengths[who] + items[i].count > LENGTH)
                    items[i].count = LENGTH - lengths[who];
            }
            dsv3_result r = dsv3_batch(items, 2, &e);
            for (int i = 0; i < 2 && !r; i++) {
                unsigned who = i ? j : k;
                memcpy(copies[who] + lengths[who], items[i].tokens, items[i].count * 4);
                lengths[who] += items[i].count;
            }
            if (r)
                ok = CHECK_RESULT(r, DSV3_ERROR_CACHE_FULL, e), full++;
        } else {
            size_t n = (size_t)(tiny_next(&random) % (what < 11 ? 40 : 3));
            n = n < LENGTH - lengths[k] ? n : LENGTH - lengths[k];
            tiny_ids(more, n, 64, tiny_next(&random) % 3); /* few seeds: prompts that agree */
            uint32_t before = s[k]->n_pages ? s[k]->pages[s[k]->n_pages - 1] : 0, index = s[k]->n_pages - 1;
            dsv3_result r = dsv3_session_append(s[k], more, n, NULL, &e);
            if (r == DSV3_OK) {
                memcpy(copies[k] + lengths[k], more, n * 4);
                copied += lengths[k] > 0 && index < s[k]->n_pages && s[k]->pages[index] != before;
                lengths[k] += n;
            } else {
                ok = CHECK_RESULT(r, DSV3_ERROR_CACHE_FULL, e);
                full++;
            }
        }
        if (s[k]) {
            ok = CHECK_BYTES(dsv3_session_tokens(s[k]), dsv3_session_length(s[k]) * 4, copies[k], lengths[k] * 4) && ok;
            if (lengths[k] && tiny_next(&random) % 4 == 0) {
                dsv3_result r = dsv3_session_sync(plain_one, copies[k], lengths[k], NULL, &e);
                ok = CHECK_OK(r, e) && same_logits(s[k], plain_one) && ok;
            }
        }
        ok = (op % 16 != 0 || sound(ws, s, SESSIONS)) && ok;
        if (!ok) {
            printf("    operation %lu: %u on %u, of %u tokens\n", op, what, k, (unsigned)lengths[k]);
            break;
        }
    }
    if (env)
        printf("%lu operations: %lu forks, %lu pages copied, %lu times full\n", ops, (unsigned long)forks, (unsigned long)copied, (unsigned long)full);
    CHECK(ops < 3000 || (forks > ops / 50 && copied > ops / 100 && full > 0));
    for (unsigned k = 0; k < SESSIONS; k++)
        dsv3_session_close(s[k]);
    sound(ws, NULL, 0);
    dsv3_workspace_close(ws);
    dsv3_session_close(plain_one);
    close_model();
}

TEST(synchronised)
{
    int32_t ids[100], other[100];
    size_t kept = 7;
    REQUIRE(open_model(plain()));
    tiny_ids(ids, 100, 192, 4);
    dsv3_session *s = open_alone(100, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO), *r = open_alone(100, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(dsv3_session_sync(s, NULL, 0, &kept, &e), e);
    CHECK_EQ_UINT(kept, 0);
    CHECK_OK(dsv3_session_sync(s, ids, 80, &kept, &e), e);
    CHECK_EQ_UINT(kept, 0);
    CHECK_OK(dsv3_session_sync(s, ids, 90, &kept, &e), e);
    CHECK_EQ_UINT(kept, 80);
    memcpy(other, ids, sizeof ids);
    other[30] = (ids[30] + 1) % 192;
    CHECK_OK(dsv3_session_sync(s, other, 95, &kept, &e), e);
    CHECK_EQ_UINT(kept, 30);
    CHECK_OK(dsv3_session_append(r, other, 95, NULL, &e), e);
    same_logits(s, r);
    CHECK_OK(dsv3_session_sync(s, other, 95, &kept, &e), e);
    CHECK_EQ_UINT(kept, 95);
    same_logits(s, r);
    CHECK_OK(dsv3_session_sync(s, other, 20, &kept, &e), e);
    CHECK_EQ_UINT(kept, 20);
    CHECK_EQ_UINT(dsv3_session_length(s), 20);
    CHECK_OK(dsv3_session_rewind(r, 20, &e), e);
    same_logits(s, r);
    /* What fails leaves the tokens, and what they give. */
    other[60] = -1;
    CHECK_OK(dsv3_session_sync(s, ids, 90, NULL, &e), e);
    CHECK_RESULT(dsv3_session_sync(s, other, 90, &kept, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_session_sync(s, ids, 101, &kept, &e), DSV3_ERROR_CONTEXT_FULL, e);
    CHECK_RESULT(dsv3_session_sync(s, NULL, 1, &kept, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    other[60] = 5;
    dsv3_session_cancel(s);
    CHECK_RESULT(dsv3_session_sync(s, other, 95, &kept, &e), DSV3_ERROR_CANCELLED, e);
    CHECK_EQ_UINT(kept, 0);
    CHECK_BYTES(dsv3_session_tokens(s), dsv3_session_length(s) * 4, ids, 90 * 4);
    CHECK_OK(dsv3_session_sync(r, ids, 90, NULL, &e), e);
    same_logits(s, r);
    dsv3_session_close(s), dsv3_session_close(r);
    close_model();
}

/* Other number formats of the cache: other bits, but near (where an expert was not changed for another, nearer), and the same
   however rows are cut. Where attention rounds to bf16 anyway, bf16 is as good as f32. */
TEST(cache_types)
{
    static const dsv3_cache types[][2] = {{DSV3_CACHE_F32, DSV3_CACHE_AUTO},  {DSV3_CACHE_BF16, DSV3_CACHE_F32}, {DSV3_CACHE_BF16, DSV3_CACHE_AUTO},
                                          {DSV3_CACHE_I8, DSV3_CACHE_F32},    {DSV3_CACHE_I8, DSV3_CACHE_AUTO},  {DSV3_CACHE_I8, DSV3_CACHE_I8},
                                          {DSV3_CACHE_F32, DSV3_CACHE_BF16}};
    static const double most[] = {0, 0.15, 0.15, 0.2, 0.2, 0.2, 0.15}, least[] = {0, 1e-5, 1e-5, 1e-4, 1e-4, 1e-4, 1e-5};
    int32_t ids[150];
    uint64_t bytes[7];
    for (int k = 0; k < 6; k++) {
        tiny_opts o = k % 3 == 2 ? micro() : plain();
        if (k % 3 == 1)
            o.kv_lora = 96, o.rope = 24;
        REQUIRE(open_model_in(o, k < 3 ? DSV3_COMPUTE_F32 : DSV3_COMPUTE_BF16));
        size_t vocab = row_size() / 4;
        float *expected = (float *)malloc(150 * row_size()), *got = (float *)malloc(150 * row_size());
        tiny_ids(ids, 150, 64, 8);
        for (int i = 0; i < 7; i++) {
            dsv3_session *s = open_alone(150, types[i][0], types[i][1]);
            dsv3_workspace_info info;
            dsv3_outputs out;
            double rms = 0;
            memset(&out, 0, sizeof out);
            out.logits = i ? got : expected;
            CHECK_OK(dsv3_session_append(s, ids, 150, &out, &e), e);
            for (size_t v = 0; v < 150 * vocab && i; v++)
                rms += ((double)got[v] - expected[v]) * ((double)got[v] - expected[v]);
            rms = sqrt(rms / (150.0 * (double)vocab));
            bool same = k >= 3 && types[i][0] != DSV3_CACHE_I8 && i != 2 && i != 6; /* keys in f32 */
            if (!CHECK(same ? rms == 0 : rms <= most[i] && rms >= least[i]))
                printf("    model %d, types %d: rms %g\n", k, i, rms);
            dsv3_workspace_info_get(dsv3_session_workspace(s), &info);
            bytes[i] = info.page_bytes;
            CHECK_EQ_INT(info.cache_latent, types[i][0]);
            CHECK(info.cache_rope != DSV3_CACHE_AUTO);
            const float *again;
            CHECK_OK(dsv3_session_rewind(s, 77, &e), e);
            CHECK_OK(dsv3_session_logits(s, &again, &e), e);
            CHECK_BYTES(again, row_size(), out.logits + 76 * vocab, row_size());
            for (size_t n = 77; n < 150; n += 3 + n % 5) { /* other pieces */
                size_t more = 150 - n < 3 + n % 5 ? 150 - n : 3 + n % 5;
                CHECK_OK(dsv3_session_append(s, ids + n, more, NULL, &e), e);
            }
            CHECK_OK(dsv3_session_logits(s, &again, &e), e);
            CHECK_BYTES(again, row_size(), out.logits + 149 * vocab, row_size());
            dsv3_session_close(s);
        }
        CHECK(bytes[2] < bytes[1] && bytes[4] < bytes[3] && bytes[5] < bytes[2] && bytes[2] * 19 <= bytes[0] * 10);
        free(expected), free(got);
        close_model();
    }
}

/* The counts are those of the experts that outputs name. */
TEST(counts_of_experts)
{
    enum { N = 50 };
    int32_t ids[N];
    REQUIRE(open_model(plain()));
    const dsv3_config *c = dsv3_model_config(model);
    const size_t layers = c->num_hidden_layers - c->first_k_dense_replace, experts = c->n_routed_experts, top = c->num_experts_per_tok;
    uint64_t *counts = (uint64_t *)malloc(layers * experts * 8), *expected = (uint64_t *)calloc(layers * experts, 8);
    int32_t *chosen = (int32_t *)malloc(N * layers * top * 4);
    dsv3_outputs out;
    memset(&out, 0, sizeof out);
    out.experts = chosen;
    tiny_ids(ids, N, 192, 8);
    dsv3_session *s = open_alone(N, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    dsv3_workspace *ws = dsv3_session_workspace(s);
    CHECK_OK(dsv3_session_append(s, ids, N, &out, &e), e);
    for (size_t i = 0; i < N * layers * top; i++)
        expected[i / top % layers * experts + (size_t)chosen[i]]++;
    CHECK_RESULT(dsv3_workspace_experts(ws, counts, layers * experts - 1, true, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_RESULT(dsv3_workspace_experts(ws, NULL, 0, true, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    for (int k = 0; k < 3; k++) {
        memset(counts, 1, layers * experts * 8);
        CHECK_OK(dsv3_workspace_experts(ws, counts, layers * experts, k == 1, &e), e);
        if (k == 2)
            memset(expected, 0, layers * experts * 8);
        CHECK_BYTES(counts, layers * experts * 8, expected, layers * experts * 8);
    }
    free(counts), free(expected), free(chosen);
    dsv3_session_close(s);
    close_model();
}

static dsv3_session *sibling;

static bool meddle(void *user, const dsv3_token *token)
{
    int32_t id = 1;
    dsv3_session *s = NULL;
    dsv3_error error;
    (void)token;
    dsv3_batch_item item;
    memset(&item, 0, sizeof item);
    item.session = sibling, item.tokens = &id, item.count = 1;
    CHECK_RESULT(dsv3_session_append(sibling, &id, 1, NULL, &error), DSV3_ERROR_INVALID_ARGUMENT, error);
    CHECK_RESULT(dsv3_batch(&item, 1, &error), DSV3_ERROR_INVALID_ARGUMENT, error);
    CHECK_RESULT(dsv3_session_fork(&s, sibling, 0, &error), DSV3_ERROR_INVALID_ARGUMENT, error);
    CHECK_RESULT(open_in(&s, (dsv3_workspace *)user, 64, 0), DSV3_ERROR_INVALID_ARGUMENT, e);
    return true;
}

/* While one of a workspace's sessions runs, callbacks can do nothing with the others. */
TEST(callbacks_keep_out)
{
    int32_t id = 1;
    dsv3_session *s;
    dsv3_generate_opts g;
    REQUIRE(open_model(plain()));
    dsv3_workspace *ws = open_workspace(4, 8, 1, DSV3_CACHE_AUTO, DSV3_CACHE_AUTO);
    CHECK_OK(open_in(&s, ws, 64, 0), e);
    CHECK_OK(open_in(&sibling, ws, 64, 0), e);
    CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    memset(&g, 0, sizeof g);
    g.max_tokens = 2, g.token_fn = meddle, g.user = ws, g.ignore_eos = true;
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, NULL, &e), e);
    CHECK_OK(dsv3_session_append(sibling, &id, 1, NULL, &e), e);
    dsv3_session_close(s), dsv3_session_close(sibling);
    dsv3_workspace_close(ws);
    close_model();
}

TEST_MAIN(RUN(joined_and_left_at_random), RUN(outputs_of_items), RUN(what_cannot_be_a_batch), RUN(nothing_to_append), RUN(a_batch_that_fails),
          RUN(forks_share_pages), RUN(forks_of_a_session_alone), RUN(budgets), RUN(random_forks), RUN(synchronised), RUN(cache_types),
          RUN(counts_of_experts), RUN(callbacks_keep_out))
