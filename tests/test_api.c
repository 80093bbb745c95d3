/* The public calls as a stranger meets them: null pointers, options of wrong sizes, defaults, what is said when all is well. */
#ifndef _GNU_SOURCE
    #define _GNU_SOURCE /* fork, sigaltstack */
#endif
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#if defined(__linux__) && !defined(__ILP32__)
    #include <signal.h>
    #include <sys/wait.h>
    #include <unistd.h>
#endif

static tiny t;
static dsv3_model *model;
static dsv3_session *s;
static dsv3_error e;

static bool open_all(tiny_opts o)
{
    dsv3_session_opts so;
    memset(&so, 0, sizeof so);
    so.n_threads = 1;
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
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

/* Linux does not lend tile registers to a process whose alternate signal stack is too small for them: AUTO goes without, and
   gives the same bits; the level by its name is an error. Runs first, in a child: what was lent once stays lent. */
TEST(tiles_that_are_refused)
{
#if defined(__linux__) && !defined(__ILP32__) && !TEST_SANITIZED
    if (dsv3_isa_supported(DSV3_ISA_AVX512_AMX)) {
        const pid_t child = fork();
        int status = -1;
        if (child == 0) {
            static char stack[8192];
            stack_t small;
            dsv3_model_opts mo;
            int wrong = 0;
            memset(&small, 0, sizeof small);
            memset(&mo, 0, sizeof mo);
            small.ss_sp = stack, small.ss_size = sizeof stack;
            wrong |= sigaltstack(&small, NULL) != 0;
            wrong |= !open_all(tiny_default()) << 1;
            wrong |= (dsv3_model_isa(model) != DSV3_ISA_AVX512_VNNI) << 2;
            wrong |= (dsv3_session_append(s, (const int32_t[]){1, 2, 3}, 3, NULL, &e) != DSV3_OK) << 3;
            close_all();
            tiny_opts o = tiny_default();
            tiny_build(&t, &o);
            mo.isa = DSV3_ISA_AVX512_AMX;
            wrong |= (tiny_open(&t, &model, &mo, &e) != DSV3_ERROR_UNSUPPORTED_CPU || model) << 4;
            wrong |= !strstr(e.message, "does not lend") << 5;
            mo.compute = DSV3_COMPUTE_F32; /* which needs none */
            wrong |= (tiny_open(&t, &model, &mo, &e) != DSV3_OK) << 6;
            dsv3_model_close(model);
            tiny_free(&t);
            _exit(wrong);
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        CHECK_EQ_INT(status, 0);
        return;
    }
#endif
    SKIP("no tile registers, or sanitized");
}

TEST(closing_nothing)
{
    dsv3_model_close(NULL);
    dsv3_session_close(NULL);
    dsv3_tokenizer_close(NULL);
}

TEST(names)
{
    static const struct {
        dsv3_dtype dtype;
        const char *name;
        size_t size;
    } dtypes[] = {{DSV3_DTYPE_F32, "F32", 4}, {DSV3_DTYPE_F16, "F16", 2}, {DSV3_DTYPE_BF16, "BF16", 2}, {DSV3_DTYPE_F8_E4M3, "F8_E4M3", 1},
                  {DSV3_DTYPE_F8_E8M0, "F8_E8M0", 1}, {DSV3_DTYPE_F8_E5M2, "F8_E5M2", 1}, {DSV3_DTYPE_I8, "I8", 1}, {DSV3_DTYPE_U8, "U8", 1},
                  {DSV3_DTYPE_I16, "I16", 2}, {DSV3_DTYPE_U16, "U16", 2}, {DSV3_DTYPE_I32, "I32", 4}, {DSV3_DTYPE_U32, "U32", 4},
                  {DSV3_DTYPE_I64, "I64", 8}, {DSV3_DTYPE_U64, "U64", 8}, {DSV3_DTYPE_F64, "F64", 8}, {DSV3_DTYPE_BOOL, "BOOL", 1}};
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        CHECK_EQ_STR(dsv3_dtype_name(dtypes[i].dtype), dtypes[i].name);
        CHECK_EQ_UINT(dsv3_dtype_size(dtypes[i].dtype), dtypes[i].size);
    }
    CHECK_EQ_STR(dsv3_dtype_name(DSV3_DTYPE_UNKNOWN), "?");
    CHECK_EQ_UINT(dsv3_dtype_size(DSV3_DTYPE_UNKNOWN), 0);
    CHECK_EQ_STR(dsv3_dtype_name((dsv3_dtype)999), "?");
    CHECK_EQ_UINT(dsv3_dtype_size((dsv3_dtype)999), 0);
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AVX2), "avx2");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AVX512), "avx512");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AVX_VNNI), "avx-vnni");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AVX512_VNNI), "avx512-vnni");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AVX512_BF16), "avx512-bf16");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AVX512_AMX), "avx512-amx");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_NEON), "neon");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_SCALAR), "scalar");
    CHECK_EQ_STR(dsv3_isa_name(DSV3_ISA_AUTO), "auto");
    CHECK(dsv3_isa_name((dsv3_isa)999) != NULL);
    CHECK(dsv3_isa_supported(DSV3_ISA_SCALAR));
    CHECK(!dsv3_isa_supported((dsv3_isa)999));
    CHECK(!dsv3_isa_supported(DSV3_ISA_AVX512) || dsv3_isa_supported(DSV3_ISA_AVX2));
    CHECK(!dsv3_isa_supported(DSV3_ISA_AVX_VNNI) || dsv3_isa_supported(DSV3_ISA_AVX2));
    CHECK(!dsv3_isa_supported(DSV3_ISA_AVX512_VNNI) || dsv3_isa_supported(DSV3_ISA_AVX512));
    CHECK(!dsv3_isa_supported(DSV3_ISA_AVX512_BF16) || dsv3_isa_supported(DSV3_ISA_AVX512_VNNI));
    CHECK(!dsv3_isa_supported(DSV3_ISA_AVX512_AMX) || dsv3_isa_supported(DSV3_ISA_AVX512_VNNI));
    CHECK(!dsv3_isa_supported((dsv3_isa)8) && !dsv3_isa_supported((dsv3_isa)31) && !dsv3_isa_supported((dsv3_isa)-1));
}

TEST(structs_of_options_are_right_when_zero)
{
    dsv3_model_opts mo;
    dsv3_session_opts so;
    dsv3_generate_opts go;
    dsv3_sample_opts sampling;
    dsv3_outputs out;
    int32_t ids[3] = {3, 4, 5};
    dsv3_sample sample;
    tiny_opts o = tiny_micro();
    memset(&mo, 0, sizeof mo);
    memset(&so, 0, sizeof so);
    memset(&go, 0, sizeof go);
    memset(&sampling, 0, sizeof sampling);
    memset(&out, 0, sizeof out);
    for (int sized = 0; sized < 2; sized++) { /* and with their own size */
        if (sized) {
            mo.struct_size = (uint32_t)sizeof mo, so.struct_size = (uint32_t)sizeof so, go.struct_size = (uint32_t)sizeof go;
            sampling.struct_size = (uint32_t)sizeof sampling, out.struct_size = (uint32_t)sizeof out;
            go.sample.struct_size = (uint32_t)sizeof sampling;
        }
        tiny_free(&t);
        tiny_build(&t, &o);
        REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
        REQUIRE(CHECK_OK(dsv3_session_open(&s, model, &so, &e), e));
        CHECK_OK(dsv3_session_append(s, ids, 3, &out, &e), e);
        CHECK_OK(dsv3_session_sample(s, &sampling, &sample, &e), e);
        go.max_tokens = 4;
        CHECK_OK(dsv3_generate(s, NULL, 0, &go, NULL, &e), e);
        CHECK_EQ_INT(dsv3_session_tokens(s)[3], sample.token); /* greedy */
        close_all();
    }
}

TEST(structs_of_strange_sizes)
{
    dsv3_model *m = NULL;
    dsv3_session *other = NULL;
    dsv3_memory memory;
    dsv3_sample sample;
    int32_t id = 3;
    REQUIRE(open_all(tiny_micro()));
    CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    for (uint32_t wrong = 1; wrong < 400; wrong = wrong * 2 + 1) {
        dsv3_model_opts mo;
        dsv3_session_opts so;
        dsv3_generate_opts go;
        dsv3_sample_opts sampling;
        dsv3_outputs out;
        dsv3_matmul_opts mm;
        memset(&mo, 0, sizeof mo);
        memset(&so, 0, sizeof so);
        memset(&go, 0, sizeof go);
        memset(&sampling, 0, sizeof sampling);
        memset(&out, 0, sizeof out);
        memset(&mm, 0, sizeof mm);
        mo.struct_size = so.struct_size = go.struct_size = sampling.struct_size = out.struct_size = mm.struct_size = wrong;
        CHECK_RESULT(tiny_open(&t, &m, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_RESULT(dsv3_session_open(&other, model, &so, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_RESULT(dsv3_session_memory(model, &so, &memory, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_RESULT(dsv3_session_append(s, &id, 1, &out, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_RESULT(dsv3_session_sample(s, &sampling, &sample, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_RESULT(dsv3_generate(s, NULL, 0, &go, NULL, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        go.struct_size = 0, go.sample.struct_size = wrong;
        CHECK_RESULT(dsv3_generate(s, NULL, 0, &go, NULL, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_EQ_UINT(dsv3_session_length(s), 1);
        float w = 1, x = 2, y = 0;
        dsv3_tensor v;
        CHECK_OK(dsv3_quantize(&v, &w, 4, NULL, 0, DSV3_DTYPE_F32, &w, 1, 1, &e), e);
        CHECK_RESULT(dsv3_matmul(&y, &x, 1, &v, &mm, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        dsv3_tokenizer *tok = NULL;
        mo.reader = tiny_reader(&t);
        CHECK_RESULT(dsv3_tokenizer_open(&tok, NULL, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    }
    close_all();
}

TEST(null_pointers)
{
    dsv3_model_opts mo;
    dsv3_memory memory;
    dsv3_tensor v;
    dsv3_sample sample;
    const float *logits;
    const char *name;
    int32_t id = 3;
    memset(&mo, 0, sizeof mo);
    REQUIRE(open_all(tiny_micro()));
    CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    const dsv3_result bad = DSV3_ERROR_INVALID_ARGUMENT;
    mo.reader = tiny_reader(&t);
    CHECK_RESULT(dsv3_model_open(NULL, NULL, &mo, &e), bad, e);
    CHECK_RESULT(dsv3_session_open(NULL, model, NULL, &e), bad, e);
    dsv3_session *none = s;
    CHECK_RESULT(dsv3_session_open(&none, NULL, NULL, &e), bad, e);
    CHECK(none == NULL);
    CHECK_RESULT(dsv3_session_memory(NULL, NULL, &memory, &e), bad, e);
    CHECK_RESULT(dsv3_session_memory(model, NULL, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_session_append(NULL, &id, 1, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_session_rewind(NULL, 0, &e), bad, e);
    CHECK_RESULT(dsv3_session_logits(NULL, &logits, &e), bad, e);
    CHECK_RESULT(dsv3_session_logits(s, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_session_sample(NULL, NULL, &sample, &e), bad, e);
    CHECK_RESULT(dsv3_session_sample(s, NULL, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_session_logprobs(NULL, 1, &sample, &e), bad, e);
    CHECK_RESULT(dsv3_session_logprobs(s, 1, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_generate(NULL, NULL, 0, NULL, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_model_tensor(NULL, "x", &v, &e), bad, e);
    CHECK_RESULT(dsv3_model_tensor(model, NULL, &v, &e), bad, e);
    CHECK_RESULT(dsv3_model_tensor(model, "lm_head.weight", NULL, &e), bad, e);
    CHECK_RESULT(dsv3_model_tensor_at(NULL, 0, &name, &v, &e), bad, e);
    CHECK_RESULT(dsv3_model_tensor_at(model, 0, NULL, &v, &e), bad, e);
    CHECK_RESULT(dsv3_model_tensor_at(model, 0, &name, NULL, &e), bad, e);
    CHECK_RESULT(dsv3_model_tokenizer(model, NULL, &e), bad, e);
    dsv3_model *m = model;
    CHECK_RESULT2(dsv3_model_open(&m, NULL, NULL, &e), bad, DSV3_ERROR_FEATURE_DISABLED, e); /* neither directory nor reader */
    CHECK(m == NULL);
    CHECK_EQ_UINT(dsv3_session_length(s), 1);
    close_all();
}

TEST(half_given_callbacks)
{
    dsv3_model *m = NULL;
    dsv3_session *other = NULL;
    tiny_heap heap;
    memset(&heap, 0, sizeof heap);
    REQUIRE(open_all(tiny_micro()));
    for (int k = 0; k < 2; k++) {
        dsv3_model_opts mo;
        dsv3_session_opts so;
        dsv3_matmul_opts mm;
        dsv3_allocator half = tiny_allocator(&heap);
        float w = 1, x = 2, y = 0;
        dsv3_tensor v;
        memset(&mo, 0, sizeof mo);
        memset(&so, 0, sizeof so);
        memset(&mm, 0, sizeof mm);
        if (k)
            half.alloc_fn = NULL;
        else
            half.free_fn = NULL;
        mo.allocator = so.allocator = mm.allocator = half;
        CHECK_RESULT(tiny_open(&t, &m, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_RESULT(dsv3_session_open(&other, model, &so, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_OK(dsv3_quantize(&v, &w, 4, NULL, 0, DSV3_DTYPE_F32, &w, 1, 1, &e), e);
        CHECK_RESULT(dsv3_matmul(&y, &x, 1, &v, &mm, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    }
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    mo.reader = tiny_reader(&t);
    mo.reader.open_fn = NULL; /* required */
    CHECK_RESULT(dsv3_model_open(&m, NULL, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    long open = t.n_opened - t.n_closed;
    mo.reader = tiny_reader(&t);
    mo.reader.close_fn = NULL; /* optional */
    CHECK_OK(dsv3_model_open(&m, NULL, &mo, &e), e);
    dsv3_model_close(m);
    mo.reader.read_fn = NULL; /* not called while files hand out pointers */
    CHECK_OK(dsv3_model_open(&m, NULL, &mo, &e), e);
    dsv3_model_close(m);
    t.read_mode = true; /* and missed where they do not */
    m = NULL;
    CHECK_RESULT2(dsv3_model_open(&m, NULL, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, DSV3_ERROR_IO, e);
    CHECK(m == NULL);
    t.n_closed = t.n_opened - open;
    CHECK_EQ_UINT(heap.n_allocs, 0);
    close_all();
}

TEST(strange_values)
{
    dsv3_model *m = NULL;
    dsv3_session *other = NULL;
    dsv3_model_opts mo;
    dsv3_session_opts so;
    memset(&mo, 0, sizeof mo);
    REQUIRE(open_all(tiny_micro()));
    mo.isa = (dsv3_isa)77;
    CHECK_RESULT2(tiny_open(&t, &m, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, DSV3_ERROR_UNSUPPORTED_CPU, e);
    for (int k = 0; k < 4; k++) { /* sizes that no machine has: refused, by one name or another, without a crash */
        memset(&so, 0, sizeof so);
        so.max_tokens = k == 0 ? UINT32_MAX : 8;
        so.max_batch = k == 1 ? UINT32_MAX : 0;
        so.n_threads = k == 2 ? UINT32_MAX : 1;
        so.memory_limit = (uint64_t)1 << 30;
        if (k == 3)
            so.executor.n_threads = UINT32_MAX;
        dsv3_result r = dsv3_session_open(&other, model, &so, &e);
        if (r == DSV3_OK)
            dsv3_session_close(other);
        else
            CHECK(r == DSV3_ERROR_INVALID_OPTIONS || r == DSV3_ERROR_MEMORY_LIMIT || r == DSV3_ERROR_OUT_OF_MEMORY);
        CHECK(k == 1 || k == 3 || r != DSV3_OK);
    }
    close_all();
}

TEST(defaults_of_a_session)
{
    dsv3_memory by_default, as_said;
    dsv3_session_opts so;
    tiny_opts o = tiny_micro();
    o.max_pos = 5000;
    memset(&so, 0, sizeof so);
    REQUIRE(open_all(o));
    so.max_tokens = 4096, so.max_batch = 512;
    CHECK_OK(dsv3_session_memory(model, NULL, &by_default, &e), e);
    CHECK_OK(dsv3_session_memory(model, &so, &as_said, &e), e);
    CHECK_BYTES(&by_default, sizeof by_default, &as_said, sizeof as_said);
    close_all();
    o.max_pos = 100;
    REQUIRE(open_all(o));
    so.max_tokens = 100;
    CHECK_OK(dsv3_session_memory(model, NULL, &by_default, &e), e);
    CHECK_OK(dsv3_session_memory(model, &so, &as_said, &e), e);
    CHECK_BYTES(&by_default, sizeof by_default, &as_said, sizeof as_said);
    close_all();
}

/* ---- logging, progress ---- */

typedef struct heard {
    unsigned n;
    dsv3_log_level worst;
    char all[4096];
} heard;

static void hear(void *user, dsv3_log_level level, const char *message)
{
    heard *h = (heard *)user;
    h->n++;
    if (level > h->worst)
        h->worst = level;
    strncat(h->all, message, sizeof h->all - strlen(h->all) - 2);
    strcat(h->all, "\n");
}

TEST(logger)
{
    heard h;
    dsv3_model_opts mo;
    tiny_opts o = tiny_micro();
    for (int k = 0; k < 3; k++) {
        memset(&h, 0, sizeof h);
        memset(&mo, 0, sizeof mo);
        mo.logger.fn = hear, mo.logger.user = &h;
        o.vocab = 320, o.tokenizer = true;
        tiny_free(&t);
        tiny_build(&t, &o);
        if (k == 1) { /* a tensor nobody knows */
            tiny_add(&t, "model.layers.0.self_attn.indexer.wk.weight", "F32", 1, 3, 0, NULL, 12);
            tiny_pack(&t);
        }
        if (k == 2)
            tiny_put(&t, "tokenizer.json", "{}", 2);
        model = NULL;
        REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
        if (k == 0)
            CHECK_EQ_INT(h.worst, DSV3_LOG_INFO); /* nothing to warn of */
        if (k == 2 && CHECK_EQ_INT(h.worst, DSV3_LOG_WARNING))
            CHECK_CONTAINS(h.all, "tokenizer.json");
        close_all();
    }
}

typedef struct reports {
    uint64_t last, total, count, stop_at;
    bool bad;
} reports;

static bool report(void *user, uint64_t done, uint64_t total)
{
    reports *r = (reports *)user;
    r->bad |= done < r->last || (total && done > total);
    r->last = done;
    r->total = total;
    return ++r->count != r->stop_at;
}

TEST(progress_of_opening)
{
    dsv3_model_opts mo;
    reports r;
    tiny_opts o = tiny_micro();
    o.n_shards = 3;
    uint64_t count = 0;
    for (uint64_t stop = 0; stop <= count; stop++) {
        memset(&mo, 0, sizeof mo);
        memset(&r, 0, sizeof r);
        mo.progress.fn = report, mo.progress.user = &r;
        r.stop_at = stop;
        tiny_free(&t);
        tiny_build(&t, &o);
        t.read_mode = true;
        model = NULL;
        dsv3_result result = tiny_open(&t, &model, &mo, &e);
        CHECK(!r.bad);
        if (stop == 0) {
            REQUIRE(CHECK_OK(result, e));
            count = r.count;
            CHECK(count >= 3 && r.last > 0);
            CHECK(r.total == 0 || r.last == r.total);
        } else {
            CHECK_RESULT(result, DSV3_ERROR_CANCELLED, e);
            CHECK(model == NULL);
        }
        close_all();
    }
}

/* ---- the tokenizer's place in the model ---- */

TEST(a_model_without_a_tokenizer)
{
    const dsv3_tokenizer *tok = (const dsv3_tokenizer *)&t;
    int32_t id = 4;
    REQUIRE(open_all(tiny_micro()));
    CHECK_RESULT(dsv3_model_tokenizer(model, &tok, &e), DSV3_ERROR_TOKENIZER, e);
    CHECK(tok == NULL);
    CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    CHECK_OK(dsv3_generate(s, NULL, 0, NULL, NULL, &e), e); /* ids need none */
    CHECK_RESULT(dsv3_generate(s, "x", 1, NULL, NULL, &e), DSV3_ERROR_TOKENIZER, e);
    close_all();
}

#ifndef DSV3_NO_TOKENIZER
/* Another kind of tokenizer: the model opens, text calls fail and name what is not known. */
TEST(a_model_with_another_tokenizer)
{
    static const char *const changes[][3] = {
        {"\"type\": \"BPE\"", "\"type\": \"Unigram\"", "Unigram"},
        {"{N}{1,3}", "{N}{1,2}", "{N}{1,2}"},
        {"\"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": false", "\"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": true", "use_regex"},
        {"{\"type\": \"ByteLevel\", \"add_prefix_space\": false", "{\"type\": \"Metaspace\", \"add_prefix_space\": false", "Metaspace"},
        {"\"normalizers\": []", "\"normalizers\": [{\"type\": \"NFC\"}]", "normalizer"},
        {"\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback"},
    };
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        const dsv3_tokenizer *tok;
        int32_t id = 4;
        tiny_opts o = tiny_micro();
        o.vocab = 320, o.tokenizer = true;
        tiny_free(&t);
        tiny_build(&t, &o);
        CHECK(tiny_replace(&t, "tokenizer.json", changes[i][0], changes[i][1]));
        model = NULL, s = NULL;
        REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e) && CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e));
        CHECK_RESULT(dsv3_model_tokenizer(model, &tok, &e), DSV3_ERROR_TOKENIZER, e);
        CHECK_CONTAINS(e.message, changes[i][2]);
        CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
        CHECK_RESULT(dsv3_generate(s, "x", 1, NULL, NULL, &e), DSV3_ERROR_TOKENIZER, e);
        CHECK_CONTAINS(e.message, changes[i][2]);
        close_all();
    }
}

/* Ids that the model has no rows for must not come out of text. */
TEST(a_vocabulary_smaller_than_the_ids)
{
    tiny_opts o = tiny_micro();
    o.vocab = 270, o.tokenizer = true;
    tiny_free(&t);
    tiny_build(&t, &o);
    model = NULL, s = NULL;
    dsv3_result r = tiny_open(&t, &model, NULL, &e);
    if (r == DSV3_OK) {
        REQUIRE(CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e));
        r = dsv3_generate(s, "the ing and, then 12, then  \n\n, then --", 39, NULL, NULL, &e);
        CHECK(dsv3_session_length(s) == 0);
    }
    CHECK_RESULT2(r, DSV3_ERROR_TOKENIZER, DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "270");
    close_all();
}

TEST(tokenizer_alone)
{
    dsv3_tokenizer *tok = NULL;
    dsv3_tokenizer_info info;
    dsv3_model_opts mo;
    int32_t ids[16];
    size_t n = 0, len = 0;
    tiny_opts o = tiny_micro();
    o.vocab = 320, o.tokenizer = true;
    memset(&mo, 0, sizeof mo);
    tiny_free(&t);
    tiny_build(&t, &o);
    tiny_drop(&t, "model.safetensors");
    tiny_drop(&t, "config.json");
    mo.reader = tiny_reader(&t);
    for (int read_mode = 0; read_mode < 2; read_mode++) {
        t.read_mode = read_mode != 0;
        REQUIRE(CHECK_OK(dsv3_tokenizer_open(&tok, NULL, &mo, &e), e));
        dsv3_tokenizer_info_get(tok, &info);
        CHECK_EQ_INT(info.n_tokens, TINY_N_TOKENS);
        CHECK(info.bos == 0 && info.eos == 1 && info.pad == 2 && info.add_bos);
        CHECK_OK(dsv3_tokenize(tok, "the", 3, DSV3_TOKENIZE_BOS, ids, 16, &n, &e), e);
        CHECK(n == 2 && ids[0] == 0 && ids[1] == 262);
        const char *bytes = dsv3_token_bytes(tok, 262, &len);
        CHECK_BYTES(bytes, len, "the", 3);
        CHECK_EQ_INT(dsv3_token_find(tok, TINY_USER, strlen(TINY_USER)), TINY_USER_ID);
        CHECK_EQ_INT(dsv3_token_find(tok, "the", 3), -1);
        dsv3_tokenizer_close(tok);
        CHECK_EQ_INT(t.n_opened, t.n_closed);
    }
    tiny_drop(&t, "tokenizer_config.json"); /* not needed */
    REQUIRE(CHECK_OK(dsv3_tokenizer_open(&tok, NULL, &mo, &e), e));
    dsv3_tokenizer_info_get(tok, &info);
    CHECK(info.bos == -1 && info.eos == -1 && info.pad == -1 && !info.add_bos);
    dsv3_tokenizer_close(tok);
    tiny_drop(&t, "tokenizer.json");
    CHECK_RESULT2(dsv3_tokenizer_open(&tok, NULL, &mo, &e), DSV3_ERROR_TOKENIZER, DSV3_ERROR_FILE_NOT_FOUND, e);
    CHECK_CONTAINS(e.message, "tokenizer.json");
    CHECK(tok == NULL);
    tiny_free(&t);
}

#define TOKENIZER_TESTS RUN(a_model_with_another_tokenizer), RUN(a_vocabulary_smaller_than_the_ids), RUN(tokenizer_alone)
#else
TEST(tokenizer_alone)
{
    SKIP("built without the tokenizer");
}

#define TOKENIZER_TESTS RUN(tokenizer_alone)
#endif

/* Everything from a directory: mapped, read, in shards: the same tokens as from memory. */
TEST(directories)
{
#ifndef DSV3_NO_STDIO
    int32_t expected[8], start = 5;
    char dir[300];
    tiny_opts o = tiny_micro();
    o.n_shards = 2;
    REQUIRE(open_all(o));
    dsv3_generate_opts g;
    memset(&g, 0, sizeof g);
    g.max_tokens = 7;
    g.ignore_eos = true;
    CHECK_OK(dsv3_session_append(s, &start, 1, NULL, &e), e);
    CHECK_OK(dsv3_generate(s, NULL, 0, &g, NULL, &e), e);
    memcpy(expected, dsv3_session_tokens(s), sizeof expected);
    close_all();
    tiny_build(&t, &o);
    REQUIRE(CHECK(tiny_write_dir(&t, dir, sizeof dir)));
    for (int k = 0; k < 2; k++) {
        dsv3_model_opts mo;
        dsv3_memory m[2];
        memset(&mo, 0, sizeof mo);
        mo.no_mmap = k == 1;
        REQUIRE(CHECK_OK(dsv3_model_open(&model, dir, &mo, &e), e));
        CHECK(e.code == DSV3_OK && e.message[0] == 0);
        REQUIRE(CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e));
        CHECK_OK(dsv3_session_append(s, &start, 1, NULL, &e), e);
        CHECK_OK(dsv3_generate(s, NULL, 0, &g, NULL, &e), e);
        CHECK_BYTES(dsv3_session_tokens(s), sizeof expected, expected, sizeof expected);
        CHECK_OK(dsv3_session_memory(model, NULL, &m[k], &e), e);
        if (k)
            CHECK(m[1].model_bytes > m[0].model_bytes + m[0].file_bytes / 2 && m[0].file_bytes == m[1].file_bytes);
        dsv3_session_close(s);
        dsv3_model_close(model);
    }
    model = NULL, s = NULL;
    tiny_remove_dir(&t, dir);
    tiny_free(&t);
#else
    SKIP("built without files");
#endif
}

TEST_MAIN(RUN(tiles_that_are_refused), RUN(closing_nothing), RUN(names), RUN(structs_of_options_are_right_when_zero), RUN(structs_of_strange_sizes), RUN(null_pointers),
          RUN(half_given_callbacks), RUN(strange_values), RUN(defaults_of_a_session), RUN(logger), RUN(progress_of_opening),
          RUN(a_model_without_a_tokenizer), TOKENIZER_TESTS, RUN(directories))
