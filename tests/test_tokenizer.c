/* The floor tok. Goldens of the published tokenizer where they lie beside the repository (test_shared(), or the folder
   itself), goldens of the small model's own tokenizer always; the rules once more, written the slow way, on random text;
   files that lie. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"

static dsv3_error e;

// ---- Files ------------------------------------------------------------------------------------------------

typedef struct text {
    char *p;
    size_t n;
} text;

/* The whole file; p NULL if there is none. */
static text read_file(const char *folder, const char *name)
{
    char path[1024];
    text t = {NULL, 0};
    snprintf(path, sizeof path, "%s%s%s", folder, *folder ? "/" : "", name);
    FILE *f = fopen(path, "rb");
    if (!f)
        return t;
    fseek(f, 0, SEEK_END);
    t.n = (size_t)ftell(f);
    rewind(f);
    t.p = (char *)malloc(t.n + 1);
    if (fread(t.p, 1, t.n, f) != t.n)
        t.n = 0;
    t.p[t.n] = 0;
    fclose(f);
    return t;
}

/* The folder of the published tokenizer, or NULL. */
static const char *published(void)
{
    static char folder[1024];
    text t = {NULL, 0};
    if (!test_shared())
        return NULL;
    snprintf(folder, sizeof folder, "%s/tokenizers/deepseek-v3", test_shared());
    t = read_file(folder, "golden.jsonl");
    if (!t.p) {
        snprintf(folder, sizeof folder, "%s", test_shared());
        t = read_file(folder, "golden.jsonl");
    }
    free(t.p);
    return t.p ? folder : NULL;
}

static dsv3_result open_n(dsv3_tokenizer **t, const char *json, size_t n, const char *config)
{
    dsv3__str j, c;
    j.p = json;
    j.n = n;
    c.p = config;
    c.n = config ? strlen(config) : 0;
    return dsv3__tok_open(t, NULL, 0, j, c, &e);
}

static dsv3_tokenizer *open_text(const char *json, const char *config)
{
    dsv3_tokenizer *t;
    CHECK_OK(open_n(&t, json, strlen(json), config), e);
    return t;
}

static dsv3_tokenizer *open_folder(const char *folder)
{
    dsv3_tokenizer *t = NULL;
    text json = read_file(folder, "tokenizer.json"), config = read_file(folder, "tokenizer_config.json");
    if (json.p)
        CHECK_OK(open_n(&t, json.p, json.n, config.p), e);
    free(json.p);
    free(config.p);
    return t;
}

/* The published one: opened once. */
static dsv3_tokenizer *v3(void)
{
    static dsv3_tokenizer *t;
    if (!t && published())
        t = open_folder(published());
    return t;
}

// ---- Ids --------------------------------------------------------------------------------------------------

typedef struct ids {
    int32_t *p;
    size_t n, cap;
} ids;

static ids encode(const dsv3_tokenizer *t, const char *s, size_t n, uint32_t flags)
{
    ids r = {NULL, 0, 0};
    r.cap = n + 8; /* never more than a token a byte, and the one in front */
    r.p = (int32_t *)malloc(r.cap * sizeof *r.p);
    CHECK_OK(dsv3_tokenize(t, s, n, flags, r.p, r.cap, &r.n, &e), e);
    return r;
}

static text decode(const dsv3_tokenizer *t, const int32_t *p, size_t n, uint32_t flags)
{
    text r = {NULL, 0};
    size_t need;
    CHECK_OK(dsv3_detokenize(t, p, n, flags, NULL, 0, &need, &e), e);
    r.p = (char *)malloc(need + 1);
    CHECK_OK(dsv3_detokenize(t, p, n, flags, r.p, need, &r.n, &e), e);
    CHECK_EQ_UINT(r.n, need);
    r.p[r.n] = 0;
    return r;
}

static bool same_ids(ids found, const int32_t *expected, size_t n)
{
    return found.n == n && memcmp(found.p, expected, n * sizeof *expected) == 0;
}

static void check_ids(const dsv3_tokenizer *t, const char *s, uint32_t flags, const int32_t *expected, size_t n)
{
    ids r = encode(t, s, strlen(s), flags);
    if (!same_ids(r, expected, n)) {
        char found[256] = "";
        for (size_t i = 0; i < r.n && strlen(found) < 200; i++)
            snprintf(found + strlen(found), sizeof found - strlen(found), " %d", (int)r.p[i]);
        test_fail(__FILE__, __LINE__, "\"%s\": %lu ids:%s", s, (unsigned long)r.n, found);
    }
    free(r.p);
}

/* The bytes of the ids, joined, are the text. */
static bool round_trip(const dsv3_tokenizer *t, const char *s, size_t n, ids r)
{
    size_t at = 0;
    for (size_t i = 0; i < r.n; i++) {
        size_t len;
        const char *bytes = dsv3_token_bytes(t, r.p[i], &len);
        if (!bytes || at + len > n || memcmp(bytes, s + at, len) != 0)
            return false;
        at += len;
    }
    return at == n;
}

static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((random_state >> 33) % n);
}

static double seconds(void)
{
    return (double)clock() / CLOCKS_PER_SEC;
}

// ---- Goldens ----------------------------------------------------------------------------------------------

typedef struct golden {
    text in, decoded;
    ids expected;
    bool add_special, parse_special, skip_special;
} golden;

static void golden_string(dsv3__json *j, text *out)
{
    dsv3__json_str s;
    if (!dsv3__json_string(j, &s))
        return;
    out->p = (char *)malloc(s.n + 1);
    CHECK(dsv3__json_decode(s, out->p, &out->n));
}

/* One line of a golden file. parse_special: as in the line, else `parse`. */
static golden golden_read(const char *line, size_t n, bool parse)
{
    golden g;
    dsv3__json j;
    dsv3__json_str key;
    memset(&g, 0, sizeof g);
    g.parse_special = parse;
    g.expected.p = (int32_t *)malloc((n + 1) * sizeof *g.expected.p); /* fewer ids than bytes of the line */
    dsv3__json_init(&j, line, n, "golden", &e);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        uint64_t id;
        if (dsv3__json_is(key, "text"))
            golden_string(&j, &g.in);
        else if (dsv3__json_is(key, "decoded"))
            golden_string(&j, &g.decoded);
        else if (dsv3__json_is(key, "ids"))
            for (dsv3__json_open(&j, '['); dsv3__json_item(&j) && dsv3__json_uint(&j, &id);)
                g.expected.p[g.expected.n++] = (int32_t)id;
        else if (dsv3__json_is(key, "add_special_tokens"))
            dsv3__json_bool(&j, &g.add_special);
        else if (dsv3__json_is(key, "parse_special"))
            dsv3__json_bool(&j, &g.parse_special);
        else if (dsv3__json_is(key, "skip_special_tokens"))
            dsv3__json_bool(&j, &g.skip_special);
        else
            dsv3__json_skip(&j);
    }
    CHECK_OK(dsv3__json_end(&j), e);
    return g;
}

static void golden_free(golden *g)
{
    free(g->in.p);
    free(g->decoded.p);
    free(g->expected.p);
}

/* Every line of the file; returns their number. Lines end in LF alone. */
static size_t golden_file(const dsv3_tokenizer *t, text file, bool parse)
{
    size_t lines = 0;
    for (const char *p = file.p, *end = file.p + file.n, *next; p < end; p = next + 1, lines++) {
        next = (const char *)memchr(p, '\n', (size_t)(end - p));
        next = next ? next : end;
        golden g = golden_read(p, (size_t)(next - p), parse);
        if (g.in.p) {
            uint32_t flags = (g.add_special ? DSV3_TOKENIZE_BOS : 0u) | (g.parse_special ? DSV3_TOKENIZE_MARKERS : 0u);
            ids r = encode(t, g.in.p, g.in.n, flags);
            if (!same_ids(r, g.expected.p, g.expected.n))
                test_fail(__FILE__, __LINE__, "line %lu: other ids", (unsigned long)lines + 1);
            free(r.p);
        }
        text d = decode(t, g.expected.p, g.expected.n, g.skip_special ? DSV3_DETOKENIZE_SKIP_SPECIAL : 0);
        if (!CHECK_BYTES(d.p, d.n, g.decoded.p, g.decoded.n))
            test_fail(__FILE__, __LINE__, "line %lu: decoded otherwise", (unsigned long)lines + 1);
        free(d.p);
        golden_free(&g);
    }
    return lines;
}

TEST(tiny_goldens)
{
    text file = read_file("tests", "tokenizer_tiny.jsonl");
    dsv3_tokenizer *t = open_folder("examples/tiny");
    if (!t || !file.p) {
        dsv3__tok_close(t);
        free(file.p);
        SKIP("no examples/tiny/tokenizer.json or tests/tokenizer_tiny.jsonl here");
    }
    CHECK(t->chain);
    CHECK(golden_file(t, file, false) > 100);
    t->chain = false;
    golden_file(t, file, false);
    dsv3__tok_close(t);
    free(file.p);
}

TEST(goldens)
{
    dsv3_tokenizer *t = v3();
    if (!t)
        SKIP("no published tokenizer beside the repository");
    text file = read_file(published(), "golden.jsonl"), decoding = read_file(published(), "decode_golden.jsonl");
    CHECK_EQ_UINT(golden_file(t, file, true), 934);
    CHECK_EQ_UINT(golden_file(t, decoding, true), 300);
    CHECK(t->chain);
    t->chain = false; /* the rule to the letter gives the same */
    CHECK_EQ_UINT(golden_file(t, file, true), 934);
    t->chain = true;
    free(file.p);
    free(decoding.p);
}

/* R1's file is V3's with two placeholders named anew. */
TEST(goldens_r1)
{
    if (!published())
        SKIP("no published tokenizer beside the repository");
    static const char bar[] = "\xEF\xBD\x9C", under[] = "\xE2\x96\x81";
    text json = read_file(published(), "tokenizer.json"), config = read_file(published(), "tokenizer_config_r1.json");
    text file = read_file(published(), "golden_r1.jsonl");
    char *out = (char *)malloc(json.n), *o = out;
    for (char *p = json.p, *end = json.p + json.n; p < end;) {
        int found = 0;
        for (int i = 798; i <= 799 && !found; i++) {
            char name[64];
            int n = snprintf(name, sizeof name, "\"<%splace%sholder%sno%s%d%s>\"", bar, under, under, under, i, bar);
            if ((size_t)(end - p) > (size_t)n && memcmp(p, name, (size_t)n) == 0) {
                static const char marked[] = "\"special\": true";
                char *special = strstr(p, marked);
                found = n;
                o += sprintf(o, "\"%s\"", i == 798 ? "<think>" : "</think>");
                CHECK(special && special - p < 400);
                memcpy(special + 11, "null", 4); /* so that what follows is not forgotten */
            }
        }
        if (found) {
            p += found;
        } else if ((size_t)(end - p) > 15 && memcmp(p, "\"special\": null", 15) == 0) {
            o += sprintf(o, "\"special\": false");
            p += 15;
        } else {
            *o++ = *p++;
        }
    }
    dsv3_tokenizer *t;
    CHECK_OK(open_n(&t, out, (size_t)(o - out), config.p), e);
    REQUIRE(t != NULL);
    CHECK_EQ_INT(dsv3_token_find(t, "<think>", 7), 128798);
    CHECK(!t->add_bos);
    CHECK_EQ_UINT(golden_file(t, file, true), 14);
    /* one of R1's golden lines wants the token that its configuration does not ask for in front */
    dsv3__tok_close(t);
    free(out);
    free(json.p);
    free(config.p);
    free(file.p);
}

// ---- SHA-256: the long goldens are given by their hash -------------------------------------------------------

static void sha256(const uint8_t *data, size_t n, uint8_t out[32])
{
    uint32_t h[8], k[64], w[64];
    size_t total = (n + 9 + 63) / 64 * 64, found = 0;
    uint8_t *m = (uint8_t *)calloc(total, 1);
    for (uint32_t p = 2; found < 64; p++) { /* fractions of the roots of the first primes */
        bool prime = true;
        for (uint32_t d = 2; d * d <= p; d++)
            prime = prime && p % d != 0;
        if (!prime)
            continue;
        long double c = cbrtl((long double)p), s = sqrtl((long double)p);
        if (found < 8)
            h[found] = (uint32_t)(uint64_t)((s - floorl(s)) * 4294967296.0L);
        k[found++] = (uint32_t)(uint64_t)((c - floorl(c)) * 4294967296.0L);
    }
    memcpy(m, data, n);
    m[n] = 0x80;
    for (int i = 0; i < 8; i++)
        m[total - 1 - (size_t)i] = (uint8_t)((uint64_t)n * 8 >> (8 * i));
#define ROTATE(x, r) ((x) >> (r) | (x) << (32 - (r)))
    for (size_t b = 0; b < total; b += 64) {
        uint32_t v[8];
        memcpy(v, h, sizeof v);
        for (int i = 0; i < 64; i++) {
            const uint8_t *q = m + b + 4 * (i & 15);
            w[i] = i < 16 ? (uint32_t)q[0] << 24 | (uint32_t)q[1] << 16 | (uint32_t)q[2] << 8 | q[3]
                          : w[i - 16] + w[i - 7] + (ROTATE(w[i - 15], 7) ^ ROTATE(w[i - 15], 18) ^ w[i - 15] >> 3) +
                                (ROTATE(w[i - 2], 17) ^ ROTATE(w[i - 2], 19) ^ w[i - 2] >> 10);
            uint32_t a = v[7] + (ROTATE(v[4], 6) ^ ROTATE(v[4], 11) ^ ROTATE(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) + k[i] + w[i];
            uint32_t c = (ROTATE(v[0], 2) ^ ROTATE(v[0], 13) ^ ROTATE(v[0], 22)) + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            memmove(v + 1, v, 7 * sizeof *v);
            v[4] += a;
            v[0] = a + c;
        }
        for (int i = 0; i < 8; i++)
            h[i] += v[i];
    }
#undef ROTATE
    for (int i = 0; i < 32; i++)
        out[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
    free(m);
}

TEST(goldens_long)
{
    dsv3_tokenizer *t = v3();
    if (!t)
        SKIP("no published tokenizer beside the repository");
    static const struct {
        const char *file;
        size_t n;
        const char *sha256;
    } list[] = {
        {"long/hongloumeng.txt", 157170, "bf307b00830a2d19c2cdbbf2ad4e31057e02b78d518d4e017fc7de549e7aa25b"},
        {"long/kokoro.txt", 111097, "89f2177ffc045eca9736f9cd1056428c53490636117ea9d8cb6a15b6562a085d"},
        {"long/mixed.txt", 267262, "8725ae13e928cd4ecd18d5f8cad0cf73c4d983e05e4cc0bd98b0e42c1d423f5c"},
        {"long/promessi_sposi.txt", 220736, "a874e578e0f3d053ab53f8f29131acbed8eb0328a6c0c71394f3286926db5bc4"},
        {"../../corpus/tinyshakespeare.txt", 300896, "74a1a6ce89e742c7a1eed7efe627ccee3e2f179fe155cc6357fcb86ff3514615"},
        {"../../corpus/tales.txt", 252414, "92686aaf0906d874b1c48f9516d6d457be1d7b15b2a18ea1ea3e508765a090c5"},
    };
    for (size_t i = 0; i < 2 * sizeof list / sizeof list[0]; i++) {
        char hex[65] = "";
        uint8_t hash[32];
        t->chain = i % 2 == 0;
        text file = read_file(published(), list[i / 2].file);
        ids r = encode(t, file.p, file.n, 0);
        CHECK_EQ_UINT(r.n, list[i / 2].n);
        sha256((const uint8_t *)r.p, r.n * 4, hash);
        for (int b = 0; b < 32; b++)
            snprintf(hex + 2 * b, 3, "%02x", hash[b]);
        CHECK_EQ_STR(hex, list[i / 2].sha256);
        CHECK(round_trip(t, file.p, file.n, r));
        free(r.p);
        free(file.p);
    }
    t->chain = true;
}

// ---- Markers ----------------------------------------------------------------------------------------------

#define BAR "\xEF\xBD\x9C"
#define UNDER "\xE2\x96\x81"

TEST(text_is_text)
{
    dsv3_tokenizer *t = v3();
    if (!t)
        SKIP("no published tokenizer beside the repository");
    static const int32_t user[] = {30, 28217, 6756, 28217, 32}, marker[] = {128803}, cut[] = {128803, 21, 128804},
                         halves[] = {30, 28217, 6756};
    check_ids(t, "<" BAR "User" BAR ">", 0, user, 5);
    check_ids(t, "<" BAR "User" BAR ">", DSV3_TOKENIZE_MARKERS, marker, 1);
    check_ids(t, "<" BAR "User" BAR ">3<" BAR "Assistant" BAR ">", DSV3_TOKENIZE_MARKERS, cut, 3);
    check_ids(t, "<" BAR "User", DSV3_TOKENIZE_MARKERS, halves, 3);
    for (uint32_t m = 0; m < t->n_markers; m++) { /* no text of a marker gives an added id, alone or inside a text */
        char s[256];
        int n = snprintf(s, sizeof s, "a %.*s %.*s", (int)t->contents[m].n, t->content_pool + t->contents[m].at,
                         (int)t->contents[m].n, t->content_pool + t->contents[m].at);
        ids r = encode(t, s, (size_t)n, 0);
        for (size_t i = 0; i < r.n; i++)
            CHECK(!(t->flags[r.p[i]] & DSV3__TOK_ADDED));
        free(r.p);
        r = encode(t, s, (size_t)n, DSV3_TOKENIZE_MARKERS);
        CHECK_EQ_UINT(r.n, 4);
        CHECK_EQ_INT(r.p[1], t->markers[m].id);
        free(r.p);
        CHECK_EQ_INT(dsv3_token_find(t, t->content_pool + t->contents[m].at, t->contents[m].n), t->markers[m].id);
    }
    CHECK_EQ_UINT(t->n_markers, 818);
    CHECK_EQ_INT(dsv3_token_find(t, "<", 1), -1);
    CHECK_EQ_INT(dsv3_token_find(t, "", 0), -1);
    CHECK_EQ_INT(dsv3_token_find(t, "hello", 5), -1); /* a word, but not an added token */
    dsv3_tokenizer_info info;
    dsv3_tokenizer_info_get(t, &info);
    CHECK_EQ_INT(info.n_tokens, 128815);
    CHECK_EQ_INT(info.bos, 0);
    CHECK_EQ_INT(info.eos, 1);
    CHECK_EQ_INT(info.pad, 1);
    CHECK(info.add_bos);
}

// ---- Classes and splitting --------------------------------------------------------------------------------

/* dsv3__tok_class of a code point, by its UTF-8. */
static unsigned class_of(const dsv3_tokenizer *t, uint32_t code, char out[4], size_t *n)
{
    size_t len;
    *n = dsv3__utf8_put(out, code);
    unsigned c = dsv3__tok_class(t, (const uint8_t *)out, (const uint8_t *)out + *n, &len);
    CHECK_EQ_UINT(len, code >= 0xD800 && code <= 0xDFFF ? 1 : *n);
    return c;
}

static dsv3_tokenizer *classes(void)
{
    static dsv3_tokenizer t;
    dsv3__tok_classes_init(&t);
    return &t;
}

TEST(class_counts)
{
    static const unsigned expected[5] = {963945, 144198 - 0, 0, 0, 25}; /* of Unicode 16.0; see below for the others */
    unsigned counts[16] = {0};
    dsv3_tokenizer *t = classes();
    (void)expected;
    for (uint32_t code = 0; code < 0x110000; code++) {
        char utf8[4];
        size_t n;
        counts[class_of(t, code, utf8, &n) & 15]++;
    }
    CHECK_EQ_UINT(counts[DSV3__TOK_SPACE], 25);
    CHECK_EQ_UINT(counts[DSV3__TOK_CJK | DSV3__TOK_WORD] + counts[DSV3__TOK_CJK | DSV3__TOK_PUNCT] + counts[DSV3__TOK_CJK],
                  0x9FA5 - 0x4E00 + 1 + 0x30FF - 0x3040 + 1);
    CHECK_EQ_UINT(counts[DSV3__TOK_CJK | DSV3__TOK_NUMBER] + counts[DSV3__TOK_CJK | DSV3__TOK_SPACE], 0);
}
