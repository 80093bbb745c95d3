/* The floor st: safetensors headers and the index of shards. Files that lie are refused; what they say is named. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#define FILE1 "model.safetensors"
#define INDEX "model.safetensors.index.json"
#define EMBED "model.embed_tokens.weight"

static tiny t;
static dsv3_model *model;
static dsv3_error e;

static void build(tiny_opts o)
{
    tiny_free(&t);
    model = NULL;
    tiny_build(&t, &o);
}

static void build_shards(void)
{
    tiny_opts o = tiny_micro();
    o.n_shards = 3;
    build(o);
}

static void done(void)
{
    dsv3_model_close(model);
    model = NULL;
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

static dsv3_result reopen(void)
{
    dsv3_model_close(model);
    return tiny_open(&t, &model, NULL, &e);
}

/* Logits of a few tokens, as one number per bit pattern: equal files give equal hashes. */
static uint64_t logits_hash(void)
{
    static const int32_t ids[] = {3, 9, 27, 4, 12};
    dsv3_session *s = NULL;
    dsv3_outputs out;
    uint64_t hash = 0;
    float *logits = (float *)malloc(sizeof(float) * 5 * dsv3_model_config(model)->vocab_size);
    memset(&out, 0, sizeof out);
    out.logits = logits;
    if (CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e) && CHECK_OK(dsv3_session_append(s, ids, 5, &out, &e), e))
        hash = hash_of(logits, sizeof(float) * 5 * dsv3_model_config(model)->vocab_size);
    dsv3_session_close(s);
    free(logits);
    return hash;
}

/* Replaces the first entry of the header (the embedding's), which spells dtype, shape, offsets. */
static void entry(const char *text)
{
    build(tiny_micro());
    const char *old = "{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1024]}";
    CHECK(tiny_replace(&t, FILE1, old, text));
}

static void entry_refused(const char *text, dsv3_result either, dsv3_result or_else)
{
    entry(text);
    dsv3_result r = tiny_open(&t, &model, NULL, &e);
    if (!(CHECK_RESULT2(r, either, or_else, e) && CHECK_CONTAINS(e.message, FILE1)))
        printf("    with %s\n", text);
    CHECK(model == NULL);
    done();
}

TEST(lists_all_tensors)
{
    for (int shards = 0; shards < 4; shards += 3) {
        tiny_opts o = tiny_default();
        o.n_shards = (uint32_t)shards;
        build(o);
        REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
        REQUIRE(CHECK_EQ_UINT(dsv3_model_tensor_count(model), t.n_tensors));
        bool *seen = (bool *)calloc(t.n_tensors, sizeof(bool));
        for (size_t i = 0; i < t.n_tensors; i++) {
            const char *name = NULL;
            dsv3_tensor v, w;
            REQUIRE(CHECK_OK(dsv3_model_tensor_at(model, i, &name, &v, &e), e));
            const tiny_tensor *x = tiny_find(&t, name);
            REQUIRE(CHECK(x != NULL && !seen[x - t.tensors]));
            seen[x - t.tensors] = true;
            CHECK_EQ_STR(dsv3_dtype_name(v.dtype), x->dtype);
            CHECK_EQ_UINT(v.rank, x->rank);
            char file[64];
            snprintf(file, sizeof file, shards ? "model-%05u-of-%06u.safetensors" : FILE1, (unsigned)x->shard, 3u);
            CHECK_EQ_STR(dsv3_model_tensor_file(model, i), file);
            for (uint32_t d = 0; d < DSV3_MAX_RANK; d++)
                CHECK_EQ_UINT(v.shape[d], d < x->rank ? x->shape[d] : 0);
            CHECK_BYTES(v.data, x->size, x->data, x->size);
            if (x->rank == 2)
                CHECK_EQ_UINT(v.row_stride, x->size / x->shape[0]);
            CHECK_OK(dsv3_model_tensor(model, name, &w, &e), e);
            CHECK_BYTES(&w, sizeof w, &v, sizeof v);
            if (v.dtype == DSV3_DTYPE_F8_E4M3) {
                char scale[160];
                snprintf(scale, sizeof scale, "%s_scale_inv", name);
                const tiny_tensor *s = tiny_find(&t, scale);
                CHECK_BYTES(v.scale, s->size, s->data, s->size);
                CHECK_EQ_INT(v.scale_dtype, DSV3_DTYPE_F32);
                CHECK(v.block_rows == 128 && v.block_cols == 128);
                CHECK_EQ_UINT(v.scale_stride, s->shape[1]);
            } else {
                CHECK(v.scale == NULL && v.scale_dtype == DSV3_DTYPE_UNKNOWN && v.block_rows == 0 && v.block_cols == 0);
            }
        }
        CHECK(dsv3_model_tensor_file(model, t.n_tensors) == NULL);
        free(seen);
        done();
    }
}

/* A reader that hands out pointers is not copied from. */
TEST(views_into_the_file)
{
    build(tiny_default());
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    const tiny_file *f = tiny_get(&t, FILE1);
    for (size_t i = 0; i < dsv3_model_tensor_count(model); i++) {
        const char *name;
        dsv3_tensor v;
        CHECK_OK(dsv3_model_tensor_at(model, i, &name, &v, &e), e);
        CHECK((const uint8_t *)v.data > f->data && (const uint8_t *)v.data < f->data + f->size);
    }
    done();
}

/* Without pointers: what the model uses is read, the rest is listed without data. */
TEST(tensors_of_a_reader_without_pointers)
{
    tiny_opts o = tiny_default();
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    mo.no_mtp = true;
    o.mtp = 1;
    build(o);
    t.read_mode = true;
    REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
    CHECK(t.n_reads > 0);
    CHECK_EQ_UINT(dsv3_model_tensor_count(model), t.n_tensors);
    size_t without = 0;
    for (size_t i = 0; i < t.n_tensors; i++) {
        const char *name;
        dsv3_tensor v;
        CHECK_OK(dsv3_model_tensor_at(model, i, &name, &v, &e), e);
        const tiny_tensor *x = tiny_find(&t, name);
        if (v.data)
            CHECK_BYTES(v.data, x->size, x->data, x->size);
        without += v.data == NULL;
        if (strncmp(name, "model.layers.3.", 15) != 0 && !strstr(name, "_scale_inv"))
            CHECK(v.data != NULL);
    }
    CHECK(without > 0);
    done();
}

TEST(unknown_tensors)
{
    const char *name;
    dsv3_tensor v;
    build(tiny_micro());
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    memset(&v, 0x55, sizeof v);
    CHECK_RESULT(dsv3_model_tensor(model, "model.nothing.weight", &v, &e), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.nothing.weight");
    CHECK(v.data == NULL && v.rank == 0);
    CHECK_RESULT(dsv3_model_tensor(model, "", &v, &e), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_RESULT(dsv3_model_tensor(model, "model.embed_tokens.weigh", &v, &e), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_RESULT(dsv3_model_tensor_at(model, t.n_tensors, &name, &v, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_model_tensor_at(model, SIZE_MAX, &name, &v, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    done();
}

/* Odd header, one file or three, another order, read or mapped: the same bits. */
TEST(layouts_are_equal)
{
    tiny_opts o = tiny_micro();
    build(o);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    uint64_t hash = logits_hash();
    done();
    for (int k = 0; k < 6; k++) {
        o = tiny_micro();
        o.odd = (k & 1) != 0;
        o.n_shards = k >= 4 ? 3 : 0;
        build(o);
        if (k >= 2) { /* tensors in reverse */
            for (size_t i = 0; i < t.n_tensors / 2; i++) {
                tiny_tensor x = t.tensors[i];
                t.tensors[i] = t.tensors[t.n_tensors - 1 - i];
                t.tensors[t.n_tensors - 1 - i] = x;
            }
            for (size_t i = 0; i < t.n_tensors; i++)
                t.tensors[i].shard = 0;
            tiny_pack(&t);
        }
        t.read_mode = k == 3 || k == 5;
        if (CHECK_OK(tiny_open(&t, &model, NULL, &e), e))
            CHECK_EQ_UINT(logits_hash(), hash);
        done();
    }
}

TEST(harmless_headers)
{
    build(tiny_micro());
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    uint64_t hash = logits_hash();
    done();
    static const char *const same[][2] = {
        {"\"__metadata__\":{\"format\":\"pt\"},", ""},                                        /* no metadata */
        {"{\"format\":\"pt\"}", "{\"format\":\"pt\",\"a\":\"\\u00e9\",\"b\":\"\"}"},
        {"\"dtype\":\"BF16\",\"shape\":[32,16]", "\"shape\":[32,16],\"dtype\":\"B\\u004616\""}, /* order, escapes */
        {"\"data_offsets\":[0,1024]", "\"data_offsets\" : [ 0 , 1024 ] , \"note\":[1,{\"x\":null}]"},
        {"\"model.embed_tokens.weight\"", "\"model.embed\\u005ftokens.weight\""},
    };
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
        build(tiny_micro());
        CHECK(tiny_replace(&t, FILE1, same[i][0], same[i][1]));
        if (CHECK_OK(reopen(), e))
            CHECK_EQ_UINT(logits_hash(), hash);
        else
            printf("    with %s\n", same[i][1]);
        done();
    }
    /* Tensors nobody uses: empty, scalar, of high rank, of a dtype that has no arithmetic or no name here. */
    static const struct {
        const char *dtype;
        uint32_t rank;
        uint64_t rows, size;
    } extra[] = {{"F32", 1, 0, 0}, {"F32", 0, 0, 4}, {"I64", 1, 3, 24}, {"F64", 1, 2, 16}, {"BOOL", 1, 5, 5}, {"F8_E5M2", 1, 3, 3},
                 {"F8_E8M0", 1, 3, 3}, {"U16", 1, 3, 6}, {"F4", 1, 6, 3}, {"F9_NEW", 1, 3, 7}, {"F8_E4M3", 1, 3, 3}};
    for (size_t i = 0; i < sizeof extra / sizeof extra[0]; i++) {
        dsv3_tensor v;
        build(tiny_micro());
        tiny_add(&t, "extra", extra[i].dtype, extra[i].rank, extra[i].rows, 0, NULL, (size_t)extra[i].size);
        tiny_pack(&t);
        if (CHECK_OK(reopen(), e)) {
            CHECK_EQ_UINT(logits_hash(), hash);
            if (CHECK_OK(dsv3_model_tensor(model, "extra", &v, &e), e))
                CHECK_EQ_UINT(v.rank, extra[i].rank);
        } else {
            printf("    with %s\n", extra[i].dtype);
        }
        done();
    }
}

TEST(file_lengths)
{
    for (size_t n = 0; n < 20; n++) { /* no header at all */
        build(tiny_micro());
        tiny_put(&t, FILE1, tiny_get(&t, FILE1)->data, n);
        CHECK_RESULT2(reopen(), DSV3_ERROR_TRUNCATED, DSV3_ERROR_SAFETENSORS, e);
        CHECK_CONTAINS(e.message, FILE1);
        done();
    }
    static const uint64_t lengths[] = {0, 1, 100000001, 0x7FFFFFFF, 0xFFFFFFFFu, 0x100000000u, INT64_MAX, UINT64_MAX - 7, UINT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        build(tiny_micro());
        memcpy(tiny_get(&t, FILE1)->data, &lengths[i], 8);
        dsv3_result r = reopen();
        if (r != DSV3_ERROR_JSON)
            CHECK_RESULT2(r, DSV3_ERROR_TRUNCATED, DSV3_ERROR_SAFETENSORS, e);
        CHECK_CONTAINS(e.message, FILE1);
        done();
    }
    build(tiny_micro()); /* one byte short, one byte long */
    tiny_file *f = tiny_get(&t, FILE1);
    tiny_put(&t, FILE1, f->data, f->size - 1);
    CHECK_RESULT(reopen(), DSV3_ERROR_TRUNCATED, e);
    CHECK_CONTAINS(e.message, FILE1);
    done();
    build(tiny_micro());
    tiny_text longer = {NULL, 0, 0};
    f = tiny_get(&t, FILE1);
    tiny_put_bytes(&longer, f->data, f->size);
    tiny_put_bytes(&longer, "x", 1);
    tiny_put(&t, FILE1, longer.p, longer.n);
    free(longer.p);
    CHECK_RESULT(reopen(), DSV3_ERROR_SAFETENSORS, e);
    CHECK_CONTAINS(e.message, FILE1);
    done();
}

TEST(headers_that_are_no_json)
{
    build(tiny_micro());
    tiny_file *f = tiny_get(&t, FILE1);
    f->data[8 + 2] = 0x01; /* in "__metadata__" */
    CHECK_RESULT(reopen(), DSV3_ERROR_JSON, e);
    CHECK_EQ_UINT(e.offset, 8 + 2);
    CHECK_CONTAINS(e.message, FILE1);
    done();
    static const char *const bad[][2] = {{"{\"format\":\"pt\"}", "{\"format\":\"pt\""}, {"\"__metadata__\":", "\"__metadata__\""}, {"{\"__metadata__\"", "[\"__metadata__\""}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        build(tiny_micro());
        CHECK(tiny_replace(&t, FILE1, bad[i][0], bad[i][1]));
        CHECK_RESULT2(reopen(), DSV3_ERROR_JSON, DSV3_ERROR_SAFETENSORS, e);
        done();
    }
    build(tiny_micro()); /* padded with zeros, not with spaces */
    f = tiny_get(&t, FILE1);
    uint64_t n;
    memcpy(&n, f->data, 8);
    if (f->data[8 + n - 1] == ' ') {
        f->data[8 + n - 1] = 0;
        CHECK_RESULT2(reopen(), DSV3_ERROR_JSON, DSV3_ERROR_SAFETENSORS, e);
    }
    done();
}

TEST(entries_that_lie)
{
    const dsv3_result st = DSV3_ERROR_SAFETENSORS, json = DSV3_ERROR_JSON, bad = DSV3_ERROR_BAD_TENSOR, trunc = DSV3_ERROR_TRUNCATED;
    /* incomplete, or of other types */
    entry_refused("{}", st, json);
    entry_refused("[]", st, json);
    entry_refused("null", st, json);
    entry_refused("{\"shape\":[32,16],\"data_offsets\":[0,1024]}", st, st);
    entry_refused("{\"dtype\":\"BF16\",\"data_offsets\":[0,1024]}", st, st);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16]}", st, st);
    entry_refused("{\"dtype\":16,\"shape\":[32,16],\"data_offsets\":[0,1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":512,\"data_offsets\":[0,1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":1024}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1024,1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,-16],\"data_offsets\":[0,1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16.5],\"data_offsets\":[0,1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[-1,1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[\"0\",1024]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"dtype\":\"BF16\",\"shape\":[32],\"shape\":[32,16],\"data_offsets\":[0,1024]}", st, json);
    /* offsets: backwards, beyond the end, a hole, an overlap, so large that sums wrap */
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[1024,0]}", st, st);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[8,1032]}", st, st);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[1000000,1001024]}", st, trunc);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1022]}", st, bad);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1026]}", st, bad);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,9223372036854775807]}", st, trunc);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[9223372036854774783,9223372036854775807]}", st, trunc);
    /* 2^64 - 1024 and 0: the length is right when it wraps; 2^64 - 1 + 8 wraps too */
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[18446744073709550592,0]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,18446744073709551615]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,18446744073709551616]}", st, json);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1e30]}", st, json);
    /* shapes whose product wraps to 512 elements, or to 0 */
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[4611686018427387904,4,512],\"data_offsets\":[0,1024]}", st, bad);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,1024]}", st, bad);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[9223372036854775807,2],\"data_offsets\":[0,1024]}", st, bad);
    entry_refused("{\"dtype\":\"BF16\",\"shape\":[1,1,1,1,1,1,1,32,16],\"data_offsets\":[0,1024]}", st, bad); /* rank 9 */
}

/* The file is sound, the tensor is not what the model wants: told with name, expected and found. */
TEST(tensors_that_do_not_fit)
{
    entry("{\"dtype\":\"BF16\",\"shape\":[16,32],\"data_offsets\":[0,1024]}");
    CHECK_RESULT(reopen(), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, EMBED);
    CHECK_CONTAINS(e.message, "[16, 32]");
    CHECK_CONTAINS(e.message, "[32, 16]");
    done();
    entry("{\"dtype\":\"BF16\",\"shape\":[512],\"data_offsets\":[0,1024]}");
    CHECK_RESULT(reopen(), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, EMBED);
    done();
    entry("{\"dtype\":\"BF16\",\"shape\":[1,32,16],\"data_offsets\":[0,1024]}");
    CHECK_RESULT(reopen(), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, EMBED);
    done();
    static const char *const dtypes[] = {"I16", "U16", "F12", "bf16", ""};
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        char text[128];
        snprintf(text, sizeof text, "{\"dtype\":\"%s\",\"shape\":[32,16],\"data_offsets\":[0,1024]}", dtypes[i]);
        entry(text);
        CHECK_RESULT2(reopen(), DSV3_ERROR_BAD_TENSOR, DSV3_ERROR_SAFETENSORS, e);
        CHECK_CONTAINS(e.message, EMBED);
        done();
    }
    build(tiny_micro()); /* F64 has the bytes, but no arithmetic */
    snprintf(tiny_find(&t, "model.norm.weight")->dtype, 16, "F64");
    tiny_find(&t, "model.norm.weight")->shape[0] = 4;
    tiny_pack(&t);
    CHECK_RESULT(reopen(), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.norm.weight");
    done();
}

TEST(every_tensor_is_needed)
{
    build(tiny_micro());
    size_t n = t.n_tensors;
    for (size_t i = 0; i < n; i++) {
        char name[200];
        build(tiny_micro());
        snprintf(name, sizeof name, "%s", t.tensors[i].name);
        tiny_remove(&t, name);
        tiny_pack(&t);
        bool scale = strstr(name, "_scale_inv") != NULL;
        char *end = strstr(name, "_scale_inv");
        CHECK_RESULT2(reopen(), DSV3_ERROR_MISSING_TENSOR, scale ? DSV3_ERROR_BAD_TENSOR : DSV3_ERROR_MISSING_TENSOR, e);
        if (end)
            *end = 0;
        CHECK_CONTAINS(e.message, name);
        done();
    }
}

TEST(scales_that_do_not_fit)
{
    static const char weight[] = "model.layers.0.mlp.gate_proj.weight";
    char name[128];
    snprintf(name, sizeof name, "%s_scale_inv", weight);
    for (int k = 0; k < 6; k++) {
        float two[2] = {1, 1};
        build(tiny_micro());
        tiny_tensor *x = tiny_find(&t, name);
        if (k == 0) /* too many */
            tiny_remove(&t, name), tiny_add(&t, name, "F32", 2, 1, 2, two, 8);
        else if (k == 1) /* a row of them, not a matrix: the wrong rank */
            x->rank = 1;
        else if (k == 2) /* integers */
            snprintf(x->dtype, sizeof x->dtype, "I32");
        else if (k == 3) /* a BF16 weight has none: which of the two is meant? */
            tiny_find(&t, weight)->size *= 2, tiny_find(&t, weight)->data = (uint8_t *)tiny_realloc(tiny_find(&t, weight)->data, 512),
                memset(tiny_find(&t, weight)->data, 0, 512), snprintf(tiny_find(&t, weight)->dtype, 16, "BF16");
        else if (k == 4) /* none at all */
            tiny_remove(&t, name), tiny_add(&t, name, "F32", 2, 0, 0, NULL, 0);
        else /* FNUZ codes mean other values */
            snprintf(tiny_find(&t, weight)->dtype, 16, "F8_E4M3FNUZ");
        tiny_pack(&t);
        if (!CHECK_RESULT2(reopen(), DSV3_ERROR_BAD_TENSOR, k == 5 ? DSV3_ERROR_SAFETENSORS : DSV3_ERROR_BAD_TENSOR, e) ||
            !CHECK_CONTAINS(e.message, weight))
            printf("    case %d\n", k);
        done();
    }
}

/* Scales as V3.1 and later releases may store them. */
TEST(scale_dtypes)
{
    uint64_t hash = 0;
    for (int k = 0; k < 3; k++) {
        build(tiny_micro());
        for (size_t i = 0; i < t.n_tensors; i++) {
            tiny_tensor *x = &t.tensors[i];
            float scale;
            if (!strstr(x->name, "_scale_inv"))
                continue;
            int exponent;
            memcpy(&scale, x->data, 4);
            frexp((double)scale, &exponent);
            scale = (float)ldexp(1, exponent);
            if (k == 0) {
                memcpy(x->data, &scale, 4);
            } else if (k == 1) {
                uint16_t b = tiny_to_bf16(scale);
                memcpy(x->data, &b, 2);
                x->size = 2;
                snprintf(x->dtype, sizeof x->dtype, "BF16");
            } else {
                x->data[0] = (uint8_t)(exponent + 127);
                x->size = 1;
                snprintf(x->dtype, sizeof x->dtype, "F8_E8M0");
            }
        }
        tiny_pack(&t);
        if (CHECK_OK(reopen(), e)) {
            uint64_t h = logits_hash();
            if (k == 0)
                hash = h;
            CHECK_EQ_UINT(h, hash);
        }
        done();
    }
}

#define CONFIG_BLOCKS(rows, cols) "{\"quant_method\": \"blockwise_int8\", \"activation_scheme\": \"dynamic\", \"weight_block_size\": [" rows ", " cols "]}"

/* I8 as published: a scale a row, or blocks; one weight of the checkpoint is changed, and has those values then. */
TEST(i8_weights)
{
    static const char weight[] = "model.layers.0.mlp.down_proj.weight";
    static const char ct_blocks[] = "{\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\", \"config_groups\": {\"group_0\": "
                                    "{\"weights\": {\"strategy\": \"block\", \"block_structure\": [4, 64]}}}}";
    static const struct {
        const char *config, *suffix, *dtype;
        uint64_t rank, rows, cols; /* of the scales */
        uint32_t block_rows;       /* 0: refused */
        const char *extra, *named;
    } cases[] = {
        {TINY_W8A8, "_scale", "F32", 2, 0, 1, 1, NULL, NULL},
        {TINY_W8A8, "_scale", "BF16", 2, 0, 1, 1, NULL, NULL},
        {TINY_W8A8, "_scale", "F16", 2, 0, 1, 1, NULL, NULL},
        {"null", "_scale", "F32", 2, 0, 1, 1, NULL, NULL}, /* the headers alone say it */
        {"{\"quant_method\": \"w8a8_int8\", \"is_dynamic\": true}", "_scale", "F32", 1, 0, 0, 1, NULL, NULL},
        {"null", "_scale_inv", "F32", 2, 1, 1, 128, NULL, NULL},
        {CONFIG_BLOCKS("128", "128"), "_scale_inv", "F32", 2, 1, 1, 128, NULL, NULL},
        {CONFIG_BLOCKS("4", "64"), "_scale_inv", "F32", 2, 4, 1, 4, NULL, NULL},
        {ct_blocks, "_scale", "BF16", 2, 4, 1, 4, NULL, NULL},
        {TINY_W8A8, "", "F32", 2, 0, 1, 0, NULL, "_scale (or ..._scale_inv) is missing"},
        {TINY_W8A8, "_scale", "F32", 2, 0, 1, 0, "_scale_inv", "both"},
        {TINY_W8A8, "_scale", "F32", 2, 0, 1, 0, "_zero_point", "_zero_point exists: asymmetric"},
        {TINY_W8A8, "_scale", "F32", 2, 0, 2, 0, NULL, "expected [16, 1] for blocks of 1 x 24"},
        {TINY_W8A8, "_scale", "F32", 2, 1, 1, 0, NULL, "expected [16, 1]"},
        {TINY_W8A8, "_scale", "I32", 2, 0, 1, 0, NULL, "dtype I32, expected F32, F16, BF16"},
        {ct_blocks, "_scale", "F32", 2, 0, 1, 0, NULL, "expected [4, 1] for blocks of 4 x 64"},
        {CONFIG_BLOCKS("4", "64"), "_scale_inv", "F32", 2, 1, 1, 0, NULL, "expected [4, 1]"},
    };
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        tiny_opts o = tiny_micro();
        o.inter = 24;
        build(o);
        tiny_tensor *x = tiny_find(&t, weight);
        uint64_t rows = x->shape[0], cols = x->shape[1], n = cases[k].rows ? cases[k].rows : rows, all = n * (cases[k].cols ? cases[k].cols : 1);
        uint8_t scales[64 * 4] = {0};
        char name[128];
        REQUIRE(CHECK(rows == 16 && cols == 24));
        snprintf(x->dtype, sizeof x->dtype, "I8");
        for (size_t i = 0; i < x->size; i++)
            x->data[i] = (uint8_t)(i * 37 + i / 256);
        x->data[5] = 0x80; /* -128 */
        snprintf(name, sizeof name, "%s_scale_inv", weight);
        tiny_remove(&t, name);
        size_t each = strcmp(cases[k].dtype, "F32") == 0 || strcmp(cases[k].dtype, "I32") == 0 ? 4 : 2;
        for (size_t i = 0; i < all; i++) {
            float f = 0.25f * (float)(1 + i % 3);
            uint16_t h = cases[k].dtype[0] == 'B' ? tiny_to_bf16(f) : tiny_to_f16(f);
            memcpy(scales + each * i, each == 4 ? (void *)&f : (void *)&h, each);
        }
        snprintf(name, sizeof name, "%s%s", weight, cases[k].suffix);
        if (cases[k].suffix[0])
            tiny_add(&t, name, cases[k].dtype, (uint32_t)cases[k].rank, n, cases[k].cols, scales, (size_t)all * each);
        snprintf(name, sizeof name, "%s%s", weight, cases[k].extra ? cases[k].extra : "");
        if (cases[k].extra)
            tiny_add(&t, name, "F32", 2, 1, 1, scales, 4);
        tiny_set(&t, "config.json", "quantization_config", cases[k].config);
        tiny_pack(&t);
        dsv3_result r = reopen();
        dsv3_tensor v;
        float out[24];
        bool ok;
        if (cases[k].block_rows) {
            ok = CHECK_OK(r, e) && CHECK_OK(dsv3_model_tensor(model, weight, &v, &e), e) && CHECK_EQ_UINT(v.block_rows, cases[k].block_rows);
            for (uint64_t row = 0; ok && row < rows; row++) {
                ok = CHECK_OK(dsv3_dequantize(out, &v, row, 1, &e), e);
                for (size_t c = 0; ok && c < cols; c++)
                    ok = CHECK(out[c] == (float)(int8_t)tiny_find(&t, weight)->data[row * cols + c] * 0.25f * (float)(1 + row / cases[k].block_rows % 3));
            }
        } else {
            ok = CHECK_RESULT2(r, cases[k].extra && cases[k].extra[1] == 'z' ? DSV3_ERROR_UNSUPPORTED_MODEL : DSV3_ERROR_BAD_TENSOR,
                               DSV3_ERROR_MISSING_TENSOR, e) && CHECK_CONTAINS(e.message, cases[k].named) && CHECK_CONTAINS(e.message, weight);
        }
        if (!ok)
            printf("    case %d\n", (int)k);
        done();
    }
}

TEST(duplicates)
{
    static const char *const twice[][2] = {
        /* the same place, so that no hole shows */
        {"\"model.embed_tokens.weight\":{", "\"model.embed_tokens.weight\":{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1024]},\"model.embed_tokens.weight\":{"},
        {"\"model.embed_tokens.weight\":{", "\"model.embed\\u005ftokens.weight\":{\"dtype\":\"BF16\",\"shape\":[32,16],\"data_offsets\":[0,1024]},\"model.embed_tokens.weight\":{"},
        /* empty ones */
        {"\"model.embed_tokens.weight\":{", "\"x\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"x\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"model.embed_tokens.weight\":{"},
        {"\"__metadata__\":{", "\"__metadata__\":{},\"__metadata__\":{"},
    };
    static const char *const names[] = {EMBED, EMBED, "x", "__metadata__"};
    for (size_t i = 0; i < 4; i++) {
        build(tiny_micro());
        CHECK(tiny_replace(&t, FILE1, twice[i][0], twice[i][1]));
        CHECK_RESULT(reopen(), DSV3_ERROR_SAFETENSORS, e);
        CHECK_CONTAINS(e.message, names[i]);
        CHECK_CONTAINS(e.message, FILE1);
        done();
    }
}

TEST(strange_names)
{
    char text[1500], name[1100];
    memset(name, 'n', sizeof name);
    for (size_t n = 500; n <= 1000; n += 100) { /* long names: refused or listed */
        build(tiny_micro());
        snprintf(text, sizeof text, "\"%.*s\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"model.embed_tokens.weight\":{", (int)n, name);
        CHECK(tiny_replace(&t, FILE1, "\"model.embed_tokens.weight\":{", text));
        dsv3_result r = reopen();
        if (r)
            CHECK_RESULT(r, DSV3_ERROR_SAFETENSORS, e);
        else
            CHECK_EQ_UINT(dsv3_model_tensor_count(model), t.n_tensors + 1);
        done();
    }
    static const char *const bad[] = {"a\\u0000b", "\\ud800"}; /* nobody could ask for them */
    for (size_t i = 0; i < 2; i++) {
        build(tiny_micro());
        snprintf(text, sizeof text, "\"%s\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},\"model.embed_tokens.weight\":{", bad[i]);
        CHECK(tiny_replace(&t, FILE1, "\"model.embed_tokens.weight\":{", text));
        CHECK_RESULT2(reopen(), DSV3_ERROR_JSON, DSV3_ERROR_SAFETENSORS, e);
        done();
    }
}

TEST(no_weights)
{
    build(tiny_micro());
    tiny_drop(&t, FILE1);
    CHECK_RESULT(reopen(), DSV3_ERROR_FILE_NOT_FOUND, e);
    CHECK_CONTAINS(e.message, FILE1);
    done();
    build(tiny_micro());
    tiny_put(&t, FILE1, "\2\0\0\0\0\0\0\0{}", 10);
    CHECK_RESULT(reopen(), DSV3_ERROR_MISSING_TENSOR, e);
    done();
}

TEST(index_variants)
{
    build(tiny_micro());
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    uint64_t hash = logits_hash();
    done();
    for (int k = 0; k < 7; k++) {
        static const char meta[] = "\"metadata\": {\"total_size\": ";
        build_shards();
        switch (k) {
        case 0: break;
        case 1: CHECK(tiny_replace(&t, INDEX, meta, "\"metadata\": {\"total_parameters\": 1.5e9, \"x\": ")); break;
        case 2: CHECK(tiny_replace(&t, INDEX, meta, "\"metadata\": {\"total_size\": -1e400, \"y\": ")); break;
        case 3: CHECK(tiny_replace(&t, INDEX, meta, "\"metadata\": {}, \"other\": {\"z\": ")); break;
        case 4: /* single files beside the index are not looked at */
            tiny_put(&t, FILE1, "nonsense", 8);
            tiny_put(&t, "consolidated.safetensors", "nonsense", 8);
            break;
        case 5: /* a tensor of a shard that the map does not name */
            tiny_add(&t, "unmapped", "F32", 1, 2, 0, NULL, 8);
            tiny_pack(&t);
            CHECK(tiny_replace(&t, INDEX, ",\n    \"unmapped\": \"model-00003-of-000003.safetensors\"", ""));
            break;
        default: CHECK(tiny_replace(&t, INDEX, "model-00001-of", "model-0000\\u0031-of")); break;
        }
        if (CHECK_OK(reopen(), e))
            CHECK_EQ_UINT(logits_hash(), hash);
        else
            printf("    case %d\n", k);
        done();
    }
}

TEST(index_that_lies)
{
    static const struct {
        const char *from, *to;
        dsv3_result either, or_else;
        const char *named;
    } cases[] = {
        {"\"weight_map\"", "\"weight_mop\"", DSV3_ERROR_SAFETENSORS, DSV3_ERROR_SAFETENSORS, "weight_map"},
        {"\"weight_map\": {", "\"weight_map\": [], \"x\": {", DSV3_ERROR_SAFETENSORS, DSV3_ERROR_JSON, INDEX},
        {"\"model-00001-of-000003.safetensors\"", "7", DSV3_ERROR_SAFETENSORS, DSV3_ERROR_JSON, INDEX},
        {"\"model-00001-of-000003.safetensors\"", "null", DSV3_ERROR_SAFETENSORS, DSV3_ERROR_JSON, INDEX},
        {"\"model.embed_tokens.weight\"", "\"model.embed_tokens.weight\": \"model-00001-of-000003.safetensors\", \"model.embed_tokens.weight\"",
         DSV3_ERROR_SAFETENSORS, DSV3_ERROR_SAFETENSORS, EMBED},
        {"\"model.embed_tokens.weight\"", "\"model.embed_tokens.weight\": \"model-00001-of-000003.safetensors\", \"model.embed\\u005ftokens.weight\"",
         DSV3_ERROR_SAFETENSORS, DSV3_ERROR_SAFETENSORS, EMBED},
        /* in another shard than it says, or in one that is not there */
        {"\"model.embed_tokens.weight\": \"model-00001", "\"model.embed_tokens.weight\": \"model-00002", DSV3_ERROR_SAFETENSORS, DSV3_ERROR_MISSING_TENSOR, EMBED},
        {"\"model.embed_tokens.weight\": \"model-00001", "\"model.embed_tokens.weight\": \"model-00009", DSV3_ERROR_FILE_NOT_FOUND, DSV3_ERROR_FILE_NOT_FOUND, "model-00009-of-000003.safetensors"},
        {"\"model.embed_tokens.weight\"", "\"model.other.weight\"", DSV3_ERROR_MISSING_TENSOR, DSV3_ERROR_SAFETENSORS, "model."},
        {"{", "{,", DSV3_ERROR_JSON, DSV3_ERROR_JSON, INDEX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        build_shards();
        CHECK(tiny_replace(&t, INDEX, cases[i].from, cases[i].to));
        dsv3_result r = reopen();
        if (!(CHECK_RESULT2(r, cases[i].either, cases[i].or_else, e) && CHECK_CONTAINS(e.message, cases[i].named)))
            printf("    case %d\n", (int)i);
        done();
    }
    build_shards();
    tiny_drop(&t, "model-00002-of-000003.safetensors");
    CHECK_RESULT(reopen(), DSV3_ERROR_FILE_NOT_FOUND, e);
    CHECK_CONTAINS(e.message, "model-00002-of-000003.safetensors");
    done();
}

static char asked[8][64];
static size_t n_asked;

static dsv3_result spying_open(void *user, const char *name, dsv3_file *file)
{
    if (n_asked < 8)
        snprintf(asked[n_asked++], sizeof asked[0], "%s", name);
    return tiny_reader_open(user, name, file);
}

/* Names of shards are data: nothing outside the directory is ever asked for. */
TEST(shard_names_that_lead_away)
{
    static const char *const names[] = {
        "../model-00001-of-000003.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "a\\\\b.safetensors", "..\\\\b.safetensors",
        "C:model.safetensors", "model\\u0000.safetensors", "", ".", "..", "model.bin", "config.json", "m\\u000aodel.safetensors", "\\u002e\\u002e/x.safetensors",
        "x\\u002fy.safetensors", "model.safetensors\\u0000", ".safetensors/", "model.safetensors:stream", "\\ud800.safetensors",
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx.safetensors"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char quoted[400];
        build_shards();
        snprintf(quoted, sizeof quoted, "\"%s\"", names[i]);
        CHECK(tiny_replace(&t, INDEX, "\"model-00001-of-000003.safetensors\"", quoted));
        dsv3_model_opts o;
        memset(&o, 0, sizeof o);
        o.reader = tiny_reader(&t);
        o.reader.open_fn = spying_open;
        n_asked = 0;
        dsv3_result r = dsv3_model_open(&model, NULL, &o, &e);
        bool ok = CHECK_RESULT2(r, DSV3_ERROR_SAFETENSORS, DSV3_ERROR_JSON, e) && CHECK_CONTAINS(e.message, INDEX);
        for (size_t k = 0; k < n_asked; k++)
            ok = CHECK(tiny_get(&t, asked[k]) || strcmp(asked[k], FILE1) == 0 || strstr(asked[k], "tokenizer")) && ok;
        if (!ok)
            printf("    shard \"%s\"\n", names[i]);
        done();
    }
}

/* Each read may fail: told as IO, nothing stays open. */
TEST(reads_that_fail)
{
    tiny_opts o = tiny_micro();
    o.n_shards = 3;
    build(o);
    t.read_mode = true;
    REQUIRE(CHECK_OK(reopen(), e));
    long n = t.n_reads;
    done();
    CHECK(n > 5);
    for (long i = 1; i <= n; i++) {
        build(o);
        t.read_mode = true;
        t.fail_read = i;
        CHECK_RESULT(reopen(), DSV3_ERROR_IO, e);
        CHECK(strstr(e.message, ".json") || strstr(e.message, ".safetensors"));
        CHECK(model == NULL);
        done();
    }
    static const char *const names[] = {"config.json", INDEX, "model-00003-of-000003.safetensors"};
    for (size_t i = 0; i < 3; i++) {
        build(o);
        t.fail_open = names[i];
        CHECK_RESULT(reopen(), DSV3_ERROR_IO, e);
        CHECK_CONTAINS(e.message, names[i]);
        done();
    }
}

/* Through the files of a directory: mapped and read, whole and in shards; the FIFO in the place of a shard does not hang. */
TEST(directories)
{
#ifndef DSV3_NO_STDIO
    tiny_opts o = tiny_micro();
    build(o);
    REQUIRE(CHECK_OK(reopen(), e));
    uint64_t hash = logits_hash();
    done();
    for (int k = 0; k < 4; k++) {
        char dir[300];
        dsv3_model_opts opts;
        memset(&opts, 0, sizeof opts);
        opts.no_mmap = (k & 1) != 0;
        o.n_shards = k >= 2 ? 3 : 0;
        build(o);
        REQUIRE(CHECK(tiny_write_dir(&t, dir, sizeof dir - 1)));
        if (CHECK_OK(dsv3_model_open(&model, dir, &opts, &e), e))
            CHECK_EQ_UINT(logits_hash(), hash);
        dsv3_model_close(model);
        model = NULL;
        strcat(dir, "/");
        CHECK_OK(dsv3_model_open(&model, dir, &opts, &e), e);
        dsv3_model_close(model);
        model = NULL;
        if (k >= 2) {
            char path[400];
            snprintf(path, sizeof path, "%s/model-00002-of-000003.safetensors", dir);
            remove(path);
            CHECK_RESULT(dsv3_model_open(&model, dir, &opts, &e), DSV3_ERROR_FILE_NOT_FOUND, e);
            CHECK_CONTAINS(e.message, "model-00002-of-000003.safetensors");
            CHECK(tiny_mkdir(path)); /* a directory is no file */
            CHECK_RESULT2(dsv3_model_open(&model, dir, &opts, &e), DSV3_ERROR_FILE_NOT_FOUND, DSV3_ERROR_IO, e);
            rmdir(path);
        }
        tiny_remove_dir(&t, dir);
        CHECK_RESULT(dsv3_model_open(&model, dir, &opts, &e), DSV3_ERROR_FILE_NOT_FOUND, e);
        CHECK_CONTAINS(e.message, "config.json");
        done();
    }
#else
    SKIP("built without files");
#endif
}

TEST_MAIN(RUN(lists_all_tensors), RUN(views_into_the_file), RUN(tensors_of_a_reader_without_pointers), RUN(unknown_tensors),
          RUN(layouts_are_equal), RUN(harmless_headers), RUN(file_lengths), RUN(headers_that_are_no_json), RUN(entries_that_lie),
          RUN(tensors_that_do_not_fit), RUN(every_tensor_is_needed), RUN(scales_that_do_not_fit), RUN(scale_dtypes), RUN(i8_weights), RUN(duplicates),
          RUN(strange_names), RUN(no_weights), RUN(index_variants), RUN(index_that_lies), RUN(shard_names_that_lead_away),
          RUN(reads_that_fail), RUN(directories))
