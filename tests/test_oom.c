/* Memory that runs out, at every place where it can: allocation n fails, for all n, through open, tokenize, session,
   append, generate, close. Nothing leaks, nothing is half done, and the next try succeeds. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

static tiny t;
static dsv3_error e;

static tiny_opts small(uint32_t n_shards)
{
    tiny_opts o = tiny_micro();
    o.n_layers = 2;
    o.n_shards = n_shards;
#ifndef DSV3_NO_TOKENIZER
    o.vocab = (uint32_t)TINY_N_TOKENS, o.tokenizer = true;
#endif
    return o;
}

static void build(tiny_opts o, bool read_mode)
{
    tiny_free(&t);
    tiny_build(&t, &o);
    t.read_mode = read_mode;
}

static void nothing_left(const tiny_heap *heap, uint64_t n)
{
    bool ok = CHECK_EQ_UINT(heap->live_bytes, 0);
    ok = CHECK_EQ_UINT(heap->n_damaged + heap->n_strange, 0) && ok;
    ok = CHECK_EQ_INT(t.n_opened, t.n_closed) && ok;
    if (!ok)
        printf("    allocation %u\n", (unsigned)n);
}

/* Must be out of memory, in words. */
static bool out_of_memory(dsv3_result r, uint64_t n)
{
    bool ok = CHECK_RESULT(r, DSV3_ERROR_OUT_OF_MEMORY, e) && CHECK(e.message[0]);
    if (!ok)
        printf("    allocation %u\n", (unsigned)n);
    return ok;
}

static void model_open(uint32_t n_shards, bool read_mode, bool all_later)
{
    uint64_t n, failed = 0;
    build(small(n_shards), read_mode);
    for (n = 1; n < 5000; n++) {
        tiny_heap heap;
        dsv3_model_opts o;
        dsv3_model *model = (dsv3_model *)&heap;
        memset(&heap, 0, sizeof heap);
        memset(&o, 0, sizeof o);
        heap.fail_at = n, heap.fail_on = all_later;
        o.allocator = tiny_allocator(&heap);
        dsv3_result r = tiny_open(&t, &model, &o, &e);
        if (heap.n_allocs < n) { /* all went well: that was the last */
            CHECK_OK(r, e);
            dsv3_model_close(model);
            nothing_left(&heap, n);
            break;
        }
        failed++;
        if (r == DSV3_OK) { /* then it was the tokenizer's, which is no reason not to open: but it must say so */
            const dsv3_tokenizer *tok;
            out_of_memory(dsv3_model_tokenizer(model, &tok, &e), n);
            CHECK(tok == NULL);
        } else {
            out_of_memory(r, n);
            CHECK(model == NULL);
        }
        dsv3_model_close(model);
        nothing_left(&heap, n);
    }
    CHECK(failed > 2 && n < 5000);
}

TEST(opening)
{
    model_open(0, false, false);
    model_open(0, false, true);
    tiny_free(&t);
}

TEST(opening_shards_by_reading)
{
    model_open(3, true, false);
    model_open(3, true, true);
    tiny_free(&t);
}

TEST(opening_a_directory)
{
#ifndef DSV3_NO_STDIO
    char dir[300];
    build(small(2), false);
    REQUIRE(CHECK(tiny_write_dir(&t, dir, sizeof dir)));
    for (int no_mmap = 0; no_mmap < 2; no_mmap++)
        for (uint64_t n = 1; n < 5000; n++) {
            tiny_heap heap;
            dsv3_model_opts o;
            dsv3_model *model = NULL;
            memset(&heap, 0, sizeof heap);
            memset(&o, 0, sizeof o);
            heap.fail_at = n;
            o.no_mmap = no_mmap != 0;
            o.allocator = tiny_allocator(&heap);
            dsv3_result r = dsv3_model_open(&model, dir, &o, &e);
            bool last = heap.n_allocs < n;
            if (last)
                CHECK_OK(r, e);
            else if (r)
                out_of_memory(r, n);
            dsv3_model_close(model);
            nothing_left(&heap, n);
            if (last)
                break;
        }
    tiny_remove_dir(&t, dir);
    tiny_free(&t);
#else
    SKIP("built without files");
#endif
}

#ifndef DSV3_NO_TOKENIZER
TEST(tokenizer)
{
    static const char text[] = "The thing, and the other thing: 1234567 \xe4\xb8\x80\xe4\xb8\x80 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    build(small(0), false);
    for (uint64_t n = 1; n < 1000; n++) {
        tiny_heap heap;
        dsv3_model_opts o;
        dsv3_tokenizer *tok = (dsv3_tokenizer *)&heap;
        memset(&heap, 0, sizeof heap);
        memset(&o, 0, sizeof o);
        heap.fail_at = n;
        o.allocator = tiny_allocator(&heap);
        o.reader = tiny_reader(&t);
        dsv3_result r = dsv3_tokenizer_open(&tok, NULL, &o, &e);
        if (heap.n_allocs >= n) {
            out_of_memory(r, n);
            CHECK(tok == NULL);
            nothing_left(&heap, n);
            continue;
        }
        REQUIRE(CHECK_OK(r, e));
        uint64_t live = heap.live_bytes, opened = heap.n_allocs;
        for (uint64_t k = 1; k < 1000; k++) { /* encoding may want memory of its own */
            int32_t ids[200];
            size_t count = 0;
            heap.fail_at = heap.n_allocs + k;
            r = dsv3_tokenize(tok, text, sizeof text - 1, 0, ids, 200, &count, &e);
            CHECK_EQ_UINT(heap.live_bytes, live);
            if (heap.n_allocs < heap.fail_at) {
                CHECK_OK(r, e);
                break;
            }
            out_of_memory(r, k);
            CHECK_EQ_UINT(count, 0);
        }
        CHECK(opened > 1);
        dsv3_tokenizer_close(tok);
        nothing_left(&heap, n);
        break;
    }
    tiny_free(&t);
}
#endif

TEST(session)
{
    dsv3_model *model = NULL;
    build(small(0), false);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    for (uint32_t threads = 1; threads <= 3; threads += 2)
        for (uint64_t n = 1; n < 1000; n++) {
            tiny_heap heap;
            dsv3_session_opts o;
            dsv3_session *s = (dsv3_session *)&heap;
            memset(&heap, 0, sizeof heap);
            memset(&o, 0, sizeof o);
            heap.fail_at = n;
            o.n_threads = threads;
            o.allocator = tiny_allocator(&heap);
            dsv3_result r = dsv3_session_open(&s, model, &o, &e);
            if (heap.n_allocs >= n) {
                out_of_memory(r, n);
                CHECK(s == NULL);
            } else {
                CHECK_OK(r, e);
                CHECK(n > 1);
                dsv3_session_close(s);
            }
            CHECK_EQ_UINT(heap.live_bytes, 0);
            CHECK_EQ_UINT(heap.n_damaged, 0);
            if (heap.n_allocs < n)
                break;
        }
    dsv3_model_close(model);
    tiny_free(&t);
}

/* A prompt of text is tokenized: the one place where a running session allocates. A failure leaves it as it was. */
TEST(generate)
{
#ifndef DSV3_NO_TOKENIZER
    dsv3_model *model = NULL;
    tiny_heap heap, model_heap;
    dsv3_session_opts o;
    dsv3_model_opts mo;
    dsv3_session *s = NULL;
    int32_t ids[4] = {5, 6, 7, 8};
    const float *logits;
    dsv3_generate_opts g;
    memset(&heap, 0, sizeof heap);
    memset(&model_heap, 0, sizeof model_heap);
    memset(&o, 0, sizeof o);
    memset(&mo, 0, sizeof mo);
    memset(&g, 0, sizeof g);
    build(small(0), false);
    mo.allocator = tiny_allocator(&model_heap);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
    o.n_threads = 1;
    o.allocator = tiny_allocator(&heap);
    REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &o, &e), e));
    CHECK_OK(dsv3_session_append(s, ids, 4, NULL, &e), e);
    CHECK_OK(dsv3_session_logits(s, &logits, &e), e);
    uint64_t live = heap.live_bytes, model_live = model_heap.live_bytes, failed = 0;
    uint64_t hash = hash_of(logits, dsv3_model_config(model)->vocab_size * sizeof(float));
    g.max_tokens = 3;
    for (int which = 0; which < 2; which++)
        for (uint64_t n = 1; n < 1000; n++) {
            tiny_heap *h = which ? &model_heap : &heap;
            dsv3_stats stats;
            heap.fail_at = model_heap.fail_at = 0;
            h->fail_at = h->n_allocs + n;
            dsv3_result r = dsv3_generate(s, " and the other", 14, &g, &stats, &e);
            bool last = h->n_allocs < h->fail_at;
            CHECK_EQ_UINT(heap.live_bytes, live);
            CHECK_EQ_UINT(model_heap.live_bytes, model_live);
            if (last) {
                CHECK_OK(r, e);
                CHECK_OK(dsv3_session_rewind(s, 4, &e), e);
                break;
            }
            failed++;
            out_of_memory(r, n);
            CHECK_EQ_UINT(dsv3_session_length(s), 4);
            CHECK(stats.n_generated == 0);
            CHECK_OK(dsv3_session_logits(s, &logits, &e), e);
            CHECK_EQ_UINT(hash_of(logits, dsv3_model_config(model)->vocab_size * sizeof(float)), hash);
        }
    CHECK(failed > 0);
    dsv3_session_close(s);
    dsv3_model_close(model);
    CHECK_EQ_UINT(heap.live_bytes + model_heap.live_bytes, 0);
    tiny_free(&t);
#else
    SKIP("built without the tokenizer");
#endif
}

TEST(matmul)
{
    float values[2 * 3] = {1, 2, 3, 4, 5, 6}, in[3] = {1, 1, 1}, out[2] = {0, 0};
    float data[6];
    dsv3_tensor v;
    REQUIRE(CHECK_OK(dsv3_quantize(&v, data, sizeof data, NULL, 0, DSV3_DTYPE_F32, values, 2, 3, &e), e));
    for (uint64_t n = 1; n < 100; n++) {
        tiny_heap heap;
        dsv3_matmul_opts o;
        memset(&heap, 0, sizeof heap);
        memset(&o, 0, sizeof o);
        heap.fail_at = n;
        o.allocator = tiny_allocator(&heap);
        dsv3_result r = dsv3_matmul(out, in, 1, &v, &o, &e);
        CHECK_EQ_UINT(heap.live_bytes, 0);
        if (heap.n_allocs < n) {
            CHECK_OK(r, e);
            CHECK(out[0] == 6 && out[1] == 15);
            break;
        }
        out_of_memory(r, n);
    }
}

/* A limit in bytes: one byte less than enough is refused, enough is enough, and what is reported is what was counted. */
static bool put(void *user, const void *data, size_t size)
{
    tiny_text *text = (tiny_text *)user;
    tiny_put_bytes(text, data, size);
    return true;
}

static size_t taken;

static bool get(void *user, void *data, size_t size)
{
    tiny_text *text = (tiny_text *)user;
    if (size > text->n - taken)
        return false;
    memcpy(data, text->p + taken, size);
    taken += size;
    return true;
}

/* A workspace, sessions in it, forks, a batch, a snapshot saved and loaded. */
TEST(workspace)
{
    dsv3_model *model = NULL;
    int32_t ids[80];
    uint64_t n;
    tiny_text text;
    memset(&text, 0, sizeof text);
    tiny_opts to = small(0);
    to.max_pos = 256;
    build(to, false);
    tiny_ids(ids, 80, to.vocab, 3);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    for (n = 1; n < 1000; n++) {
        tiny_heap heap;
        dsv3_workspace_opts wo;
        dsv3_session_opts so;
        dsv3_workspace *ws = NULL;
        dsv3_session *s[4] = {NULL, NULL, NULL, NULL};
        memset(&heap, 0, sizeof heap);
        memset(&wo, 0, sizeof wo);
        memset(&so, 0, sizeof so);
        heap.fail_at = n;
        wo.n_pages = 8, wo.max_batch = 16, wo.n_threads = 1 + n % 2;
        wo.allocator = tiny_allocator(&heap);
        dsv3_result r = dsv3_workspace_open(&ws, model, &wo, &e);
        so.workspace = ws, so.max_tokens = 100, so.reserve_pages = 2;
        if (!r)
            r = dsv3_session_open(&s[0], model, &so, &e);
        if (!r) {
            CHECK_OK(dsv3_session_append(s[0], ids, 70, NULL, &e), e);
            r = dsv3_session_fork(&s[1], s[0], 1, &e);
        }
        if (!r) {
            dsv3_batch_item items[2];
            uint64_t before = heap.n_allocs;
            memset(items, 0, sizeof items);
            for (int k = 0; k < 2; k++)
                items[k].session = s[k], items[k].tokens = ids + k, items[k].count = 9;
            CHECK_OK(dsv3_batch(items, 2, &e), e);
            dsv3_sink sink;
            sink.write_fn = put, sink.user = &text;
            text.n = 0;
            CHECK_OK(dsv3_save(s, 2, &sink, NULL, &e), e);
            CHECK_EQ_UINT(heap.n_allocs, before); /* neither allocates */
            so.reserve_pages = 0;
            r = dsv3_session_open(&s[2], model, &so, &e);
        }
        if (!r)
            r = dsv3_session_open(&s[3], model, &so, &e);
        if (!r) {
            dsv3_source source;
            source.read_fn = get, source.user = &text, source.size = text.n, taken = 0;
            r = dsv3_load(s + 2, 2, &source, &e);
            CHECK_EQ_UINT(dsv3_session_length(s[2]) + dsv3_session_length(s[3]), r ? 0 : 158);
        }
        const bool last = heap.n_allocs < n;
        if (last)
            CHECK_OK(r, e);
        else
            out_of_memory(r, n);
        if (ws) { /* what is there still works, or did nothing */
            dsv3_workspace_info info;
            dsv3_workspace_info_get(ws, &info);
            CHECK_EQ_UINT(info.n_sessions, (s[0] != NULL) + (s[1] != NULL) + (s[2] != NULL) + (s[3] != NULL));
            CHECK_EQ_UINT(info.memory, heap.live_bytes);
            if (s[0])
                CHECK_OK(dsv3_session_sync(s[0], ids, 72, NULL, &e), e);
        }
        for (int k = 0; k < 4; k++)
            dsv3_session_close(s[k]);
        dsv3_workspace_close(ws);
        CHECK_EQ_UINT(heap.live_bytes, 0);
        CHECK_EQ_UINT(heap.n_damaged + heap.n_strange, 0);
        if (last)
            break;
    }
    CHECK(n > 10 && n < 1000);
    /* A limit on memory: sessions and forks fail, and can be had again when another is closed. */
    dsv3_workspace_opts wo;
    dsv3_session_opts so;
    dsv3_workspace *ws = NULL;
    dsv3_session *s[3] = {NULL, NULL, NULL};
    dsv3_workspace_info info;
    dsv3_memory m;
    memset(&wo, 0, sizeof wo);
    memset(&so, 0, sizeof so);
    wo.n_pages = 4, wo.max_batch = 16, wo.n_threads = 1;
    CHECK_OK(dsv3_workspace_open(&ws, model, &wo, &e), e);
    dsv3_workspace_info_get(ws, &info);
    so.workspace = ws, so.max_tokens = 100;
    CHECK_OK(dsv3_session_memory(model, &so, &m, &e), e);
    CHECK_EQ_UINT(m.cache_bytes, 0);
    dsv3_workspace_close(ws);
    wo.memory_limit = info.memory + 2 * m.session_bytes;
    CHECK_OK(dsv3_workspace_open(&ws, model, &wo, &e), e);
    so.workspace = ws;
    CHECK_OK(dsv3_session_open(&s[0], model, &so, &e), e);
    CHECK_OK(dsv3_session_fork(&s[1], s[0], 0, &e), e);
    CHECK_RESULT(dsv3_session_fork(&s[2], s[0], 0, &e), DSV3_ERROR_MEMORY_LIMIT, e);
    CHECK_RESULT(dsv3_session_open(&s[2], model, &so, &e), DSV3_ERROR_MEMORY_LIMIT, e);
    CHECK(s[2] == NULL);
    dsv3_session_close(s[0]);
    CHECK_OK(dsv3_session_fork(&s[2], s[1], 0, &e), e);
    dsv3_session_close(s[1]), dsv3_session_close(s[2]);
    dsv3_workspace_close(ws);
    free(text.p);
    dsv3_model_close(model);
    tiny_free(&t);
}

TEST(limits)
{
    tiny_heap heap;
    dsv3_model *model = NULL;
    dsv3_session *s = NULL;
    dsv3_model_opts o;
    dsv3_session_opts so;
    dsv3_memory m;
    for (int read_mode = 0; read_mode < 2; read_mode++) {
        memset(&heap, 0, sizeof heap);
        memset(&o, 0, sizeof o);
        memset(&so, 0, sizeof so);
        build(small(0), read_mode != 0);
        o.allocator = tiny_allocator(&heap);
        REQUIRE(CHECK_OK(tiny_open(&t, &model, &o, &e), e));
        uint64_t peak = heap.peak_bytes, live = heap.live_bytes;
        CHECK_OK(dsv3_session_memory(model, NULL, &m, &e), e);
        CHECK_EQ_UINT(m.model_bytes, live);
        so.max_tokens = 16, so.n_threads = 2;
        CHECK_OK(dsv3_session_memory(model, &so, &m, &e), e);
        so.memory_limit = m.session_bytes;
        CHECK_OK(dsv3_session_open(&s, model, &so, &e), e);
        CHECK_EQ_UINT(heap.live_bytes - live, m.session_bytes);
        dsv3_session_close(s);
        so.memory_limit = m.session_bytes - 1;
        CHECK_RESULT(dsv3_session_open(&s, model, &so, &e), DSV3_ERROR_MEMORY_LIMIT, e);
        CHECK(s == NULL);
        CHECK_EQ_UINT(heap.live_bytes, live);
        dsv3_model_close(model);
        nothing_left(&heap, 0);

        o.memory_limit = peak;
        CHECK_OK(tiny_open(&t, &model, &o, &e), e);
        dsv3_model_close(model);
        for (uint64_t limit = 64; limit < live; limit += live / 60 + 1) {
            memset(&heap, 0, sizeof heap);
            o.memory_limit = limit;
            dsv3_result r = tiny_open(&t, &model, &o, &e);
            CHECK(heap.peak_bytes <= limit);
            if (r == DSV3_OK) { /* all but the tokenizer found room */
                const dsv3_tokenizer *tok;
                CHECK_RESULT(dsv3_model_tokenizer(model, &tok, &e), DSV3_ERROR_MEMORY_LIMIT, e);
                dsv3_model_close(model);
            } else {
                CHECK_RESULT(r, DSV3_ERROR_MEMORY_LIMIT, e);
            }
            nothing_left(&heap, limit);
        }
        tiny_free(&t);
    }
}

#ifndef DSV3_NO_TOKENIZER
TEST_MAIN(RUN(opening), RUN(opening_shards_by_reading), RUN(opening_a_directory), RUN(tokenizer), RUN(session), RUN(workspace), RUN(generate), RUN(matmul), RUN(limits))
#else
TEST_MAIN(RUN(opening), RUN(opening_shards_by_reading), RUN(opening_a_directory), RUN(session), RUN(generate), RUN(matmul), RUN(limits))
#endif
