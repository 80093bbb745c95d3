/* Bad files, exhaustively: every truncated prefix of every file of a small checkpoint, every byte of its headers and JSON
   files changed to 0, 255 and one more. Each gives an error that says something, or a model that runs; never a crash (a
   sanitizer looks on). Where the byte has no meaning the logits have the same bits. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#define INDEX "model.safetensors.index.json"

static tiny t;
static dsv3_error e;
static unsigned n_opened, n_refused; /* what became of the damaged checkpoints */
static uint64_t hash;                /* of the logits, where the last one ran */

/* As small as the architecture allows: a few kilobytes, one dense and one MoE layer. */
static tiny_opts nano(uint32_t n_shards)
{
    tiny_opts o = tiny_micro();
    o.vocab = 16, o.dim = 4, o.inter = 4, o.moe_inter = 2, o.n_heads = 1, o.q_lora = 2, o.kv_lora = 2, o.nope = 2, o.rope = 2, o.v_dim = 2;
    o.n_experts = 4, o.max_pos = 16;
    o.n_shards = n_shards;
    return o;
}

static void build(tiny_opts o)
{
    tiny_free(&t);
    tiny_build(&t, &o);
    n_opened = n_refused = 0;
}

static bool told(dsv3_result r)
{
    return CHECK_EQ_INT(e.code, r) && CHECK(e.message[0]);
}

/* Opens what there is and uses it a little. Anything may fail, but then it says why. */
static void use(void)
{
    static const int32_t ids[3] = {3, 9, 5};
    dsv3_model *model = NULL;
    dsv3_session *s = NULL;
    dsv3_session_opts so;
    dsv3_result r = tiny_open(&t, &model, NULL, &e);
    hash = 0;
    if (r) {
        told(r);
        CHECK(model == NULL);
        n_refused++;
    } else {
        const dsv3_tokenizer *tok;
        const float *logits;
        n_opened++;
        memset(&so, 0, sizeof so);
        so.max_tokens = 8, so.max_batch = 2, so.n_threads = 1;
        r = dsv3_session_open(&s, model, &so, &e);
        if (!r)
            r = dsv3_session_append(s, ids, 3, NULL, &e);
        if (!r)
            r = dsv3_session_logits(s, &logits, &e);
        if (!r) {
            dsv3_generate_opts g;
            memset(&g, 0, sizeof g);
            hash = hash_of(logits, dsv3_model_config(model)->vocab_size * sizeof(float));
            dsv3_model_sampling(model, &g.sample);
            g.max_tokens = 2;
            r = dsv3_generate(s, NULL, 0, &g, NULL, &e);
        }
        if (r)
            told(r);
        if (dsv3_model_tokenizer(model, &tok, &e) == DSV3_OK) {
            r = dsv3_session_rewind(s, 0, &e);
            r = dsv3_generate(s, "an \xe4\xb8\x80", 6, NULL, NULL, &e);
            if (r)
                told(r);
        }
        dsv3_session_close(s);
        dsv3_model_close(model);
    }
    CHECK_EQ_INT(t.n_opened, t.n_closed);
}

/* All prefixes of a file. The whole one is put back. */
static void prefixes(const char *name, bool may_run)
{
    tiny_file *f = tiny_get(&t, name);
    size_t size = f->size;
    uint8_t *whole = (uint8_t *)malloc(size);
    memcpy(whole, f->data, size);
    for (size_t n = 0; n < size; n++) {
        unsigned before = n_opened;
        tiny_put(&t, name, whole, n);
        use();
        if (!CHECK(may_run || n_opened == before || whole[n] == '\n')) /* all but the last line end */
            printf("    %s cut to %u bytes opens\n", name, (unsigned)n);
    }
    tiny_put(&t, name, whole, size);
    free(whole);
}

/* Each of the first `n` bytes changed. */
static void bytes(const char *name, size_t n)
{
    tiny_file *f = tiny_get(&t, name);
    for (size_t i = 0; i < n; i++) {
        uint8_t old = f->data[i], values[3] = {0, 255, (uint8_t)(old + 1)};
        for (int k = 0; k < 3; k++) {
            if (values[k] == old)
                continue;
            f->data[i] = values[k];
            use();
        }
        f->data[i] = old;
    }
}

static size_t header_size(const char *name)
{
    uint64_t n;
    memcpy(&n, tiny_get(&t, name)->data, 8);
    return (size_t)n + 8;
}

TEST(prefixes_of_weights)
{
    build(nano(0));
    use();
    REQUIRE(CHECK_EQ_UINT(n_opened, 1) && CHECK(hash != 0));
    prefixes("model.safetensors", false);
    t.read_mode = true; /* the same without pointers: short reads */
    prefixes("model.safetensors", false);
    tiny_free(&t);
}

TEST(prefixes_of_json_files)
{
    build(nano(2));
    prefixes("config.json", false);
    prefixes("generation_config.json", false);
    prefixes(INDEX, false);
    CHECK(n_opened <= 3);
    prefixes("model-00002-of-000002.safetensors", false);
    tiny_free(&t);
}

TEST(bytes_of_headers)
{
    build(nano(0));
    bytes("model.safetensors", header_size("model.safetensors"));
    CHECK(n_refused > 10 * n_opened); /* nearly every byte has a meaning */
    tiny_free(&t);
}

TEST(bytes_of_json_files)
{
    build(nano(2));
    bytes("config.json", tiny_get(&t, "config.json")->size);
    bytes("generation_config.json", tiny_get(&t, "generation_config.json")->size);
    bytes(INDEX, tiny_get(&t, INDEX)->size);
    CHECK(n_refused > n_opened && n_opened > 0);
    tiny_free(&t);
}

#ifndef DSV3_NO_TOKENIZER
/* The tokenizer's files are the larger part: opened alone, for speed, and used on a few texts. */
static void use_tokenizer(void)
{
    static const char text[] = "The thing \xe4\xb8\x80 12 " TINY_USER "\n\n \xf0\x9f\x98\x80\xff";
    dsv3_tokenizer *tok = NULL;
    dsv3_model_opts o;
    memset(&o, 0, sizeof o);
    o.reader = tiny_reader(&t);
    dsv3_result r = dsv3_tokenizer_open(&tok, NULL, &o, &e);
    if (r) {
        told(r);
        CHECK(tok == NULL);
        n_refused++;
    } else {
        int32_t ids[64];
        char back[256];
        size_t n = 0, len = 0;
        n_opened++;
        CHECK_OK(dsv3_tokenize(tok, text, sizeof text - 1, DSV3_TOKENIZE_BOS | DSV3_TOKENIZE_MARKERS, ids, 64, &n, &e), e);
        CHECK_OK(dsv3_tokenize(tok, text, sizeof text - 1, 0, ids, 64, &n, &e), e);
        CHECK_OK(dsv3_detokenize(tok, ids, n, 0, back, sizeof back, &len, &e), e);
        /* whatever the words are now, text comes back: the last byte of it as U+FFFD */
        if (CHECK_EQ_UINT(len, sizeof text - 1 + 2))
            CHECK_BYTES(back, len - 3, text, sizeof text - 2);
        dsv3_tokenizer_close(tok);
    }
    CHECK_EQ_INT(t.n_opened, t.n_closed);
}

TEST(prefixes_of_tokenizer_files)
{
    static const char *const names[2] = {"tokenizer.json", "tokenizer_config.json"};
    tiny_opts o = nano(0);
    o.vocab = 320, o.tokenizer = true;
    build(o);
    use_tokenizer();
    REQUIRE(CHECK_EQ_UINT(n_opened, 1));
    for (int k = 0; k < 2; k++) {
        tiny_file *f = tiny_get(&t, names[k]);
        size_t size = f->size;
        uint8_t *whole = (uint8_t *)malloc(size);
        memcpy(whole, f->data, size);
        n_opened = 0;
        for (size_t n = 0; n < size; n++) {
            tiny_put(&t, names[k], whole, n);
            use_tokenizer();
        }
        CHECK_EQ_UINT(n_opened, 1); /* without the last line end */
        tiny_put(&t, names[k], whole, size);
        free(whole);
    }
    tiny_free(&t);
}

TEST(bytes_of_tokenizer_files)
{
    static const char *const names[2] = {"tokenizer.json", "tokenizer_config.json"};
    tiny_opts o = nano(0);
    o.vocab = 320, o.tokenizer = true;
    build(o);
    for (int k = 0; k < 2; k++) {
        tiny_file *f = tiny_get(&t, names[k]);
        for (size_t i = 0; i < f->size; i++) {
            uint8_t old = f->data[i], values[3] = {0, 255, (uint8_t)(old + 1)};
            for (int v = 0; v < 3; v++) {
                f->data[i] = values[v];
                use_tokenizer();
            }
            f->data[i] = old;
        }
    }
    CHECK(n_refused > 1000 && n_opened > 10);
    tiny_free(&t);
}

/* With such a file in the directory the model opens all the same, and only text fails. */
TEST(a_model_with_a_damaged_tokenizer)
{
    tiny_opts o = nano(0);
    o.vocab = 320, o.tokenizer = true;
    build(o);
    use();
    REQUIRE(CHECK_EQ_UINT(n_opened, 1));
    uint64_t whole = hash;
    for (size_t cut = 0; cut < tiny_get(&t, "tokenizer.json")->size; cut += 500) {
        dsv3_model *model = NULL;
        const dsv3_tokenizer *tok;
        build(o);
        tiny_put(&t, "tokenizer.json", tiny_get(&t, "tokenizer.json")->data, cut);
        use();
        CHECK_EQ_UINT(n_opened, 1);
        CHECK_EQ_UINT(hash, whole);
        if (CHECK_OK(tiny_open(&t, &model, NULL, &e), e)) {
            CHECK_RESULT2(dsv3_model_tokenizer(model, &tok, &e), DSV3_ERROR_TOKENIZER, DSV3_ERROR_JSON, e);
            CHECK_CONTAINS(e.message, "tokenizer.json");
        }
        dsv3_model_close(model);
    }
    tiny_free(&t);
}
#endif

/* Bytes without a meaning: white space, what stands behind keys that nobody reads, metadata. */
TEST(bytes_without_a_meaning)
{
    static const char space[4] = {' ', '\t', '\n', '\r'};
    build(nano(0));
    tiny_set(&t, "config.json", "a_key_nobody_reads", "\"some words\"");
    use();
    uint64_t whole = hash;
    REQUIRE(CHECK(whole != 0));
    for (int file = 0; file < 2; file++) {
        const char *name = file ? "model.safetensors" : "config.json";
        tiny_file *f = tiny_get(&t, name);
        size_t size = file ? header_size(name) : f->size;
        bool quoted = false;
        for (size_t i = file ? 8 : 0; i < size; i++) {
            uint8_t old = f->data[i];
            quoted ^= old == '"';
            if (quoted || (old != ' ' && old != '\n'))
                continue;
            for (int k = 0; k < 4; k++) {
                f->data[i] = (uint8_t)space[k];
                use();
                if (!CHECK_EQ_UINT(hash, whole))
                    printf("    %s, byte %u\n", name, (unsigned)i);
            }
            f->data[i] = old;
        }
    }
    static const char *const texts[2][2] = {{"config.json", "a_key_nobody_reads\": \"some words"}, {"model.safetensors", "format\":\"pt"}};
    for (int k = 0; k < 2; k++) {
        tiny_file *f = tiny_get(&t, texts[k][0]);
        size_t at = tiny_search(f->data, f->size, texts[k][1]);
        for (size_t i = at; i < at + strlen(texts[k][1]); i++) {
            uint8_t old = f->data[i];
            if (old == '"' || old == ':' || (old == ' ' && f->data[i - 1] == ':'))
                continue;
            f->data[i] = (uint8_t)(old + 1);
            use();
            CHECK_EQ_UINT(hash, whole);
            f->data[i] = old;
        }
    }
    tiny_free(&t);
}

/* Junk in the place of weights runs, or is found when logits are no numbers. */
TEST(random_weights)
{
    uint64_t random = 3;
    for (int k = 0; k < 60; k++) {
        build(nano(0));
        tiny_file *f = tiny_get(&t, "model.safetensors");
        for (size_t i = header_size("model.safetensors"); i < f->size; i++)
            if (k % 3 == 0 || tiny_next(&random) % 50 == 0)
                f->data[i] = (uint8_t)tiny_next(&random);
        use();
        CHECK_EQ_UINT(n_opened, 1);
    }
    tiny_free(&t);
}

#ifndef DSV3_NO_TOKENIZER
TEST_MAIN(RUN(prefixes_of_weights), RUN(prefixes_of_json_files), RUN(bytes_of_headers), RUN(bytes_of_json_files),
          RUN(prefixes_of_tokenizer_files), RUN(bytes_of_tokenizer_files), RUN(a_model_with_a_damaged_tokenizer),
          RUN(bytes_without_a_meaning), RUN(random_weights))
#else
TEST_MAIN(RUN(prefixes_of_weights), RUN(prefixes_of_json_files), RUN(bytes_of_headers), RUN(bytes_of_json_files),
          RUN(bytes_without_a_meaning), RUN(random_weights))
#endif
