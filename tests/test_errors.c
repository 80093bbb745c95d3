/* Each result code once, through the public calls; the message names file, tensor or key, what was expected and found. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#if defined(__linux__) && !defined(DSV3_NO_THREADS)
    #include <sys/resource.h>
#endif
static tiny t;
static dsv3_model *model;
static dsv3_session *s;
static dsv3_error e;

static void build(void)
{
    tiny_opts o = tiny_micro();
    tiny_free(&t);
    model = NULL, s = NULL;
    tiny_build(&t, &o);
    memset(&e, 0xEE, sizeof e);
}

static bool build_and_open(void)
{
    build();
    return CHECK_OK(tiny_open(&t, &model, NULL, &e), e) && CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e);
}

static void done(void)
{
    dsv3_session_close(s);
    dsv3_model_close(model);
    model = NULL, s = NULL;
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

/* Everything that an error promises, beside its words. */
static bool raised(dsv3_result r, dsv3_result expected)
{
    bool ok = CHECK_RESULT(r, expected, e);
    ok = CHECK_EQ_INT(e.code, r) && ok;
    ok = CHECK(e.line > 0) && ok;
    ok = CHECK(e.message[0] && memchr(e.message, 0, sizeof e.message) != NULL) && ok;
    if (expected != DSV3_ERROR_JSON)
        ok = CHECK_EQ_UINT(e.offset, 0) && ok;
    return ok;
}

TEST(ok)
{
    int32_t id = 3;
    REQUIRE(build_and_open());
    memset(&e, 0xEE, sizeof e);
    CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
    CHECK(e.code == DSV3_OK && e.message[0] == 0);
    done();
    build(); /* what is not there, and need not be, is no error */
    tiny_drop(&t, "generation_config.json");
    memset(&e, 0xEE, sizeof e);
    CHECK_EQ_INT(tiny_open(&t, &model, NULL, &e), DSV3_OK);
    CHECK_EQ_INT(e.code, DSV3_OK);
    CHECK_EQ_STR(e.message, "");
    CHECK(e.line == 0 && e.offset == 0);
    done();
}

TEST(invalid_argument)
{
    int32_t ids[3] = {3, 32, 4};
    REQUIRE(build_and_open());
    raised(dsv3_session_append(s, ids, 3, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT);
    CHECK_CONTAINS(e.message, "32");
    done();
}

TEST(invalid_options)
{
    dsv3_model_opts o;
    memset(&o, 0, sizeof o);
    build();
    o.struct_size = 7;
    raised(tiny_open(&t, &model, &o, &e), DSV3_ERROR_INVALID_OPTIONS);
    CHECK_CONTAINS(e.message, "7");
    CHECK(model == NULL);
    done();
}

TEST(out_of_memory)
{
    tiny_heap heap;
    dsv3_model_opts o;
    memset(&heap, 0, sizeof heap);
    memset(&o, 0, sizeof o);
    build();
    heap.fail_at = 1;
    o.allocator = tiny_allocator(&heap);
    raised(tiny_open(&t, &model, &o, &e), DSV3_ERROR_OUT_OF_MEMORY);
    CHECK_EQ_UINT(heap.live_bytes, 0);
    done();
}

TEST(memory_limit)
{
    dsv3_model_opts o;
    dsv3_session_opts so;
    memset(&o, 0, sizeof o);
    memset(&so, 0, sizeof so);
    build();
    o.memory_limit = 100;
    raised(tiny_open(&t, &model, &o, &e), DSV3_ERROR_MEMORY_LIMIT);
    CHECK_CONTAINS(e.message, "100");
    CHECK(model == NULL);
    o.memory_limit = 1 << 20;
    REQUIRE(CHECK_OK(tiny_open(&t, &model, &o, &e), e));
    so.memory_limit = 1000;
    raised(dsv3_session_open(&s, model, &so, &e), DSV3_ERROR_MEMORY_LIMIT);
    CHECK_CONTAINS(e.message, "1000");
    CHECK(s == NULL);
    done();
}

TEST(buffer_too_small)
{
    float values[6] = {1, 2, 3, 4, 5, 6};
    unsigned char data[12];
    dsv3_tensor v;
    raised(dsv3_quantize(&v, data, 11, NULL, 0, DSV3_DTYPE_F16, values, 2, 3, &e), DSV3_ERROR_BUFFER_TOO_SMALL);
    CHECK_CONTAINS(e.message, "12");
    CHECK_CONTAINS(e.message, "11");
}

TEST(context_full)
{
    int32_t ids[65];
    REQUIRE(build_and_open());
    tiny_ids(ids, 65, 32, 1);
    raised(dsv3_session_append(s, ids, 65, NULL, &e), DSV3_ERROR_CONTEXT_FULL);
    CHECK_CONTAINS(e.message, "64");
    CHECK_CONTAINS(e.message, "65");
    done();
}

TEST(cancelled)
{
    int32_t id = 3;
    REQUIRE(build_and_open());
    dsv3_session_cancel(s);
    raised(dsv3_session_append(s, &id, 1, NULL, &e), DSV3_ERROR_CANCELLED);
    done();
}

TEST(file_not_found)
{
    build();
    tiny_drop(&t, "config.json");
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_FILE_NOT_FOUND);
    CHECK_CONTAINS(e.message, "config.json");
    done();
#ifndef DSV3_NO_STDIO
    raised(dsv3_model_open(&model, "no/such/directory", NULL, &e), DSV3_ERROR_FILE_NOT_FOUND);
    CHECK_CONTAINS(e.message, "config.json");
    CHECK_CONTAINS(e.message, "no/such/directory");
#endif
}

TEST(io)
{
    build();
    t.read_mode = true;
    t.fail_read = 1;
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_IO);
    CHECK_CONTAINS(e.message, "config.json");
    done();
}

TEST(truncated)
{
    build();
    tiny_file *f = tiny_get(&t, "model.safetensors");
    tiny_put(&t, "model.safetensors", f->data, f->size - 10);
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_TRUNCATED);
    CHECK_CONTAINS(e.message, "model.safetensors");
    done();
}

TEST(json)
{
    build();
    tiny_put(&t, "config.json", "{\"a\": 1,\n \"b\": tru}", 20);
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_JSON);
    CHECK_CONTAINS(e.message, "config.json");
    CHECK_EQ_UINT(e.offset, 15);
    done();
}

TEST(safetensors)
{
    build();
    CHECK(tiny_replace(&t, "model.safetensors", "\"data_offsets\":[0,", "\"data_offsets\":[1,"));
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_SAFETENSORS);
    CHECK_CONTAINS(e.message, "model.safetensors");
    CHECK_CONTAINS(e.message, "model.embed_tokens.weight");
    done();
}

TEST(unsupported_model)
{
    build();
    tiny_set(&t, "config.json", "hidden_act", "\"gelu\"");
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_UNSUPPORTED_MODEL);
    CHECK_CONTAINS(e.message, "config.json");
    CHECK_CONTAINS(e.message, "hidden_act");
    CHECK_CONTAINS(e.message, "silu");
    CHECK_CONTAINS(e.message, "gelu");
    done();
}

TEST(missing_tensor)
{
    build();
    tiny_remove(&t, "model.layers.1.mlp.experts.2.up_proj.weight");
    tiny_remove(&t, "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv");
    tiny_pack(&t);
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_MISSING_TENSOR);
    CHECK_CONTAINS(e.message, "model.layers.1.mlp.experts.2.up_proj.weight");
    done();
}

TEST(bad_tensor)
{
    build();
    tiny_tensor *x = tiny_find(&t, "model.layers.0.self_attn.o_proj.weight");
    x->shape[0] = 8, x->shape[1] = 16;
    tiny_pack(&t);
    raised(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_BAD_TENSOR);
    CHECK_CONTAINS(e.message, "model.layers.0.self_attn.o_proj.weight");
    CHECK_CONTAINS(e.message, "[8, 16]");
    CHECK_CONTAINS(e.message, "[16, 8]");
    done();
}

TEST(tokenizer)
{
    const dsv3_tokenizer *tok = NULL;
    build();
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    raised(dsv3_model_tokenizer(model, &tok, &e), DSV3_ERROR_TOKENIZER);
    CHECK_CONTAINS(e.message, "tokenizer.json");
    CHECK(tok == NULL);
    done();
}

TEST(unsupported_cpu)
{
    bool found = false;
    for (int isa = DSV3_ISA_SCALAR; isa <= DSV3_ISA_NEON; isa++) {
        dsv3_model_opts o;
        if (dsv3_isa_supported((dsv3_isa)isa) || strcmp(dsv3_isa_name((dsv3_isa)isa), "?") == 0)
            continue;
        found = true;
        memset(&o, 0, sizeof o);
        o.isa = (dsv3_isa)isa;
        build();
        raised(tiny_open(&t, &model, &o, &e), DSV3_ERROR_UNSUPPORTED_CPU);
        CHECK_CONTAINS(e.message, dsv3_isa_name((dsv3_isa)isa));
        CHECK(model == NULL);
        done();
    }
    if (!found)
        SKIP("this CPU has all instruction sets");
}

/* A machine without room for another stack. */
TEST(thread)
{
#if defined(__linux__) && defined(RLIMIT_AS) && !TEST_SANITIZED && !defined(DSV3_NO_THREADS)
    unsigned long pages = 0;
    struct rlimit old, small;
    dsv3_session_opts o;
    FILE *f = fopen("/proc/self/statm", "r");
    bool known = f && fscanf(f, "%lu", &pages) == 1;
    if (f)
        fclose(f);
    if (!known || getrlimit(RLIMIT_AS, &old) != 0)
        SKIP("the size of this process is not known");
    build();
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    memset(&o, 0, sizeof o);
    o.n_threads = 2048;
    o.max_tokens = 8;
    small = old;
    small.rlim_cur = (rlim_t)pages * 4096 + ((rlim_t)64 << 20);
    if (setrlimit(RLIMIT_AS, &small) != 0)
        SKIP("no limit can be set");
    dsv3_result r = dsv3_session_open(&s, model, &o, &e);
    setrlimit(RLIMIT_AS, &old);
    if (r == DSV3_ERROR_OUT_OF_MEMORY || r == DSV3_OK) { /* as under an emulator, which does not keep the limit */
        done();
        SKIP("threads could be started all the same");
    }
    raised(r, DSV3_ERROR_THREAD);
    CHECK(s == NULL);
    o.n_threads = 2; /* and nothing is left behind */
    CHECK_OK(dsv3_session_open(&s, model, &o, &e), e);
    done();
#else
    SKIP("needs Linux, threads, and no sanitizer");
#endif
}

TEST(feature_disabled)
{
#ifdef DSV3_NO_STDIO
    build();
    raised(dsv3_model_open(&model, "a directory", NULL, &e), DSV3_ERROR_FEATURE_DISABLED);
    CHECK_CONTAINS(e.message, "DSV3_NO_STDIO");
    done();
#else
    SKIP("this build has everything");
#endif
}

/* Long names are cut, not run over, and control characters do not reach a terminal. */
TEST(messages_of_long_names)
{
    char key[700];
    build();
    memset(key, 'k', sizeof key);
    memcpy(key, "\"hidden_act\": \"", 15);
    for (int i = 15; i < 600; i += 3)
        memcpy(key + i, "\xe4\xb8\x80", 3);
    memcpy(key + 600, "\", \"x\": \"", 10);
    CHECK(tiny_replace(&t, "config.json", "\"hidden_act\": \"", key));
    dsv3_result r = tiny_open(&t, &model, NULL, &e);
    CHECK(r == DSV3_ERROR_UNSUPPORTED_MODEL || r == DSV3_ERROR_JSON);
    const char *p = e.message, *end = e.message + strlen(e.message);
    while (p < end) { /* a lead byte that says how many follow, and these */
        int n = (unsigned char)*p < 0x80 ? 0 : (unsigned char)*p < 0xE0 ? 1 : (unsigned char)*p < 0xF0 ? 2 : 3;
        REQUIRE(CHECK((unsigned char)*p < 0x80 || (unsigned char)*p >= 0xC2));
        for (p++; n; n--, p++)
            REQUIRE(CHECK(p < end && (unsigned char)*p >= 0x80 && (unsigned char)*p < 0xC0));
    }
    done();
    build();
    tiny_set(&t, "config.json", "model_type", "\"\\u001b[31mred\\u0007\\r\\n\"");
    CHECK(tiny_open(&t, &model, NULL, &e) != DSV3_OK);
    for (const char *c = e.message; *c; c++)
        CHECK((unsigned char)*c >= 0x20 && *c != 0x7f);
    done();
}

/* Callers who do not care pass NULL. */
TEST(error_may_be_null)
{
    int32_t bad = -1;
    build();
    tiny_drop(&t, "config.json");
    dsv3_model_opts o;
    memset(&o, 0, sizeof o);
    o.reader = tiny_reader(&t);
    CHECK_EQ_INT(dsv3_model_open(&model, NULL, &o, NULL), DSV3_ERROR_FILE_NOT_FOUND);
    done();
    REQUIRE(build_and_open());
    CHECK_EQ_INT(dsv3_session_append(s, &bad, 1, NULL, NULL), DSV3_ERROR_INVALID_ARGUMENT);
    CHECK_EQ_INT(dsv3_session_rewind(s, 5, NULL), DSV3_ERROR_INVALID_ARGUMENT);
    CHECK_EQ_INT(dsv3_generate(s, NULL, 0, NULL, NULL, NULL), DSV3_ERROR_INVALID_ARGUMENT);
    done();
}

TEST_MAIN(RUN(ok), RUN(invalid_argument), RUN(invalid_options), RUN(out_of_memory), RUN(memory_limit), RUN(buffer_too_small),
          RUN(context_full), RUN(cancelled), RUN(file_not_found), RUN(io), RUN(truncated), RUN(json), RUN(safetensors),
          RUN(unsupported_model), RUN(missing_tensor), RUN(bad_tensor), RUN(tokenizer), RUN(unsupported_cpu), RUN(thread),
          RUN(feature_disabled), RUN(messages_of_long_names), RUN(error_may_be_null))
