/* The floors split, bpe and tok. Goldens of the published tokenizer where they lie beside the repository (test_shared(), or the folder
   itself), goldens of the small model's own tokenizer always; the rules once more, written the slow way, on random text;
   files that lie. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"

#define BAR "\xEF\xBD\x9C"
#define UNDER "\xE2\x96\x81"

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

static dsv3_result tok_open(dsv3_tokenizer **t, const dsv3_allocator *allocator, uint64_t limit, dsv3__str json, dsv3__str config)
{
    dsv3__tok_files files;
    memset(&files, 0, sizeof files);
    files.json = json;
    files.config = config;
    return dsv3__tok_open(t, allocator, limit, &files, &e);
}

static dsv3_result open_n(dsv3_tokenizer **t, const char *json, size_t n, const char *config)
{
    dsv3__str j, c;
    j.p = json;
    j.n = n;
    c.p = config;
    c.n = config ? strlen(config) : 0;
    dsv3__err_clear(&e);
    return tok_open(t, NULL, 0, j, c);
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
    CHECK(t->bpe.chain);
    CHECK(golden_file(t, file, false) > 100);
    t->bpe.chain = false;
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
    CHECK(t->bpe.chain);
    t->bpe.chain = false; /* the rule to the letter gives the same */
    CHECK_EQ_UINT(golden_file(t, file, true), 934);
    t->bpe.chain = true;
    free(file.p);
    free(decoding.p);
}

/* Overwrites the first `from` behind `at` with `to` and spaces. */
static void overwrite(char *at, const char *from, const char *to)
{
    char *p = strstr(at, from);
    if (!CHECK(p != NULL && strlen(to) <= strlen(from)))
        return;
    memset(p, ' ', strlen(from));
    memcpy(p, to, strlen(to));
}

/* R1's file is V3's with two placeholders made into other tokens. */
TEST(goldens_r1)
{
    if (!published())
        SKIP("no published tokenizer beside the repository");
    text json = read_file(published(), "tokenizer.json"), config = read_file(published(), "tokenizer_config_r1.json");
    text file = read_file(published(), "golden_r1.jsonl");
    dsv3_tokenizer *t;
    for (int i = 0; i < 2; i++) {
        char *entry = strstr(json.p, i ? "\"id\": 128799," : "\"id\": 128798,");
        REQUIRE(CHECK(entry != NULL));
        overwrite(entry, i ? "\"<" BAR "place" UNDER "holder" UNDER "no" UNDER "799" BAR ">\""
                           : "\"<" BAR "place" UNDER "holder" UNDER "no" UNDER "798" BAR ">\"", i ? "\"</think>\"" : "\"<think>\"");
        overwrite(entry, "\"normalized\": false", "\"normalized\": true");
        overwrite(entry, "\"special\": true", "\"special\":false");
    }
    CHECK_OK(open_n(&t, json.p, json.n, config.p), e);
    REQUIRE(t != NULL);
    CHECK_EQ_INT(dsv3_token_find(t, "<think>", 7), 128798);
    CHECK(!t->add_bos);
    CHECK_EQ_UINT(golden_file(t, file, true), 14);
    dsv3__tok_close(t);
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
        t->bpe.chain = i % 2 == 0;
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
    t->bpe.chain = true;
}

// ---- Markers ----------------------------------------------------------------------------------------------

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
        CHECK_EQ_UINT(r.n, 5);
        CHECK_EQ_INT(r.p[2], t->markers[m].id);
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

/* dsv3__split_class of a code point, by its UTF-8. */
static unsigned class_of(const dsv3__split *t, uint32_t code, char out[4], size_t *n)
{
    size_t len;
    *n = dsv3__utf8_put(out, code);
    unsigned c = dsv3__split_class(t, (const uint8_t *)out, (const uint8_t *)out + *n, &len);
    CHECK_EQ_UINT(len, code >= 0xD800 && code <= 0xDFFF ? 1 : *n);
    return c;
}

static dsv3__split *classes(void)
{
    static dsv3__split t;
    dsv3__split_init(&t, false);
    return &t;
}

/* How many characters of Unicode 16.0 are in each class. */
TEST(class_counts)
{
    static const struct {
        unsigned c, n;
    } list[] = {{DSV3__SPLIT_OTHER, 959275}, {DSV3__SPLIT_WORD, 122442}, {DSV3__SPLIT_PUNCT, 9365}, {DSV3__SPLIT_NUMBER, 1911},
                {DSV3__SPLIT_SPACE, 25}, {DSV3__SPLIT_CJK | DSV3__SPLIT_OTHER, 3}, {DSV3__SPLIT_CJK | DSV3__SPLIT_WORD, 21087},
                {DSV3__SPLIT_CJK | DSV3__SPLIT_PUNCT, 4}};
    unsigned counts[16] = {0};
    const dsv3__split *t = classes();
    for (uint32_t code = 0; code < 0x110000; code++) {
        char utf8[4];
        size_t n;
        counts[class_of(t, code, utf8, &n) & 15]++;
    }
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
        CHECK_EQ_UINT(counts[list[i].c], list[i].n);
}

TEST(classes_of_all_characters)
{
    if (!published())
        SKIP("no published tokenizer beside the repository");
    text file = read_file(published(), "unicode_classes.txt");
    uint8_t *expected = (uint8_t *)calloc(0x110000, 1);
    for (char *p = file.p; p && *p; p = strchr(p, '\n') ? strchr(p, '\n') + 1 : NULL) {
        char name;
        unsigned first, last;
        if (*p == '#' || sscanf(p, "%c %x %x", &name, &first, &last) != 3)
            continue;
        for (; first <= last; first++)
            expected[first] = name == 'L' || name == 'M'   ? DSV3__SPLIT_WORD
                              : name == 'P' || name == 'S' ? DSV3__SPLIT_PUNCT
                              : name == 'N'                ? DSV3__SPLIT_NUMBER
                                                           : DSV3__SPLIT_SPACE;
    }
    const dsv3__split *t = classes();
    for (uint32_t code = 0; code < 0x110000; code++) {
        char utf8[4];
        size_t n;
        unsigned c = class_of(t, code, utf8, &n);
        if ((c & 7) != (code >= 0xD800 && code <= 0xDFFF ? 0 : expected[code]))
            test_fail(__FILE__, __LINE__, "U+%04X: class %u, expected %u", code, c & 7, expected[code]);
    }
    free(expected);
    free(file.p);
}

/* Pieces of s, joined by '|'. */
static const char *pieces(const char *s, size_t n)
{
    static char out[4096];
    char *o = out;
    const uint8_t *p = (const uint8_t *)s, *end = p + n;
    while (p < end) {
        const uint8_t *next = dsv3__split_piece(classes(), p, end);
        if (!CHECK(next > p && next <= end))
            break;
        o += sprintf(o, "%s%.*s", o == out ? "" : "|", (int)(next - p), (const char *)p);
        p = next;
    }
    *o = 0;
    return out;
}

TEST(splitting)
{
    static const char *const list[][2] = {
        {"", ""},
        {"Hello world", "Hello| world"},
        {"1234567", "123|456|7"},
        {"a1b", "a|1|b"},
        {"don't", "don|'t"},
        {"!x", "!x"},
        {" !x", " !|x"},
        {"\t!", "\t|!"},
        {"\tx", "\tx"},
        {"$\xC3\xA9", "$|\xC3\xA9"},
        {"##hello", "##|hello"},
        {"#hello", "#hello"},
        {"!\n\n\nx", "!\n\n\n|x"},
        {"!\r\n", "!\r\n"},
        {"! \n", "!| \n"},
        {"a  1", "a|  |1"},       /* a piece ends before a number: the look-ahead sees its end */
        {"  b", " | b"},
        {"  !", " | !"},
        {"   ", "   "},
        {"x  ", "x|  "},
        {"x\n \ny", "x|\n \n|y"},
        {" \n  y", " \n| | y"},
        {"\n\n x", "\n\n| x"},
        {"a\r\nb", "a|\r\n|b"},
        {"\xC2\x85x", "\xC2\x85x"},                                 /* U+0085 is white space */
        {"\xC2\xA0\xC2\xA0x", "\xC2\xA0|\xC2\xA0x"},
        {"\xE2\x80\xA8x", "\xE2\x80\xA8x"},                         /* U+2028 is white space and no newline */
        {"\xE3\x80\x80\xE6\x97\xA5", "\xE3\x80\x80|\xE6\x97\xA5"}, /* U+3000 before CJK: a border of the second split */
        {"  \xE6\x97\xA5", "  |\xE6\x97\xA5"},
        {"a\xE6\x97\xA5" "b", "a|\xE6\x97\xA5|b"},
        {"\xE6\x97\xA5\xE3\x83\xBB\xE6\x9C\xAC", "\xE6\x97\xA5|\xE3\x83\xBB|\xE6\x9C\xAC"}, /* U+30FB is punctuation there */
        {"\xE3\x83\xBB\n", "\xE3\x83\xBB|\n"},                    /* and newlines do not stick to it */
        {"\xE3\x81\x80\xE3\x81\x81", "\xE3\x81\x80\xE3\x81\x81"}, /* U+3040, unassigned, joins a word */
        {"x\xE3\x81\x80", "x|\xE3\x81\x80"},
        {"\xE6\x97\xA5\xE3\x80\x85", "\xE6\x97\xA5|\xE3\x80\x85"}, /* U+3005 is outside */
        {"\xE9\xBE\xA5\xE9\xBE\xA6", "\xE9\xBE\xA5|\xE9\xBE\xA6"}, /* U+9FA5, U+9FA6 */
        {"\xE2\x80\x8B\xE2\x80\x8B", "\xE2\x80\x8B\xE2\x80\x8B"}, /* two ZWSP: one stretch that nothing matches */
        {"\xE2\x80\x8Bx", "\xE2\x80\x8Bx"},
        {"\xE2\x80\x8B\xE2\x80\x8Bx", "\xE2\x80\x8B|\xE2\x80\x8Bx"},
        {"\xE2\x80\x8B 1", "\xE2\x80\x8B| |1"},
        {"x\x01" "1", "x|\x01|1"},
        {"e\xCC\x81x", "e\xCC\x81x"},                               /* marks go with letters */
        {"!\xCC\x81", "!|\xCC\x81"},
        {"\xD9\xA1\xEF\xBC\x92\xC2\xB3" "4", "\xD9\xA1\xEF\xBC\x92\xC2\xB3|4"}, /* numbers of all kinds, in threes */
        {"\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x92\xBB", "\xF0\x9F\x91\xA9|\xE2\x80\x8D|\xF0\x9F\x92\xBB"},
        {"\xFF\xFFx", "\xFF|\xFFx"},                                /* bytes that are no UTF-8 are of the class other */
        {"\xE6\x97", "\xE6\x97"},
        {"\xE6\x97x", "\xE6|\x97x"},
        {" \xFF", " |\xFF"},
        {"\xC0\x80", "\xC0\x80"},
        {"\xED\xA0\x80z", "\xED\xA0|\x80z"},
    };
    static const uint8_t nul[] = {0, 'b'};
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++)
        CHECK_EQ_STR(pieces(list[i][0], strlen(list[i][0])), list[i][1]);
    CHECK_EQ_UINT(dsv3__split_piece(classes(), nul, nul + 2) - nul, 2); /* NUL is a character like any other */
}

// The splits once more, as tokenizer.json has them: one after the other, each on the pieces that the former left, the third
// by its alternatives.

typedef struct unit {
    unsigned c;
    uint8_t first;
    size_t at;
} unit;

static size_t third_match(const unit *u, size_t i, size_t hi)
{
    size_t k = i, last;
    unsigned c = u[i].c & 7;
#define IS(j, want) ((j) < hi && (u[j].c & 7) == (want))
#define NEWLINE(j) ((j) < hi && (u[j].first == '\r' || u[j].first == '\n'))
#define LETTER(j) (IS(j, DSV3__SPLIT_WORD) && u[j].first < 0x80)
    if (c == DSV3__SPLIT_PUNCT && u[i].first < 0x80 && LETTER(i + 1)) {
        for (k = i + 1; LETTER(k); k++)
            continue;
        return k;
    }
    if (c == DSV3__SPLIT_WORD || (c != DSV3__SPLIT_PUNCT && !NEWLINE(i) && IS(i + 1, DSV3__SPLIT_WORD))) {
        for (k = i + 1; IS(k, DSV3__SPLIT_WORD); k++)
            continue;
        return k;
    }
    k = i + (u[i].first == ' ');
    if (IS(k, DSV3__SPLIT_PUNCT)) {
        while (IS(k, DSV3__SPLIT_PUNCT))
            k++;
        while (NEWLINE(k))
            k++;
        return k;
    }
    for (k = i, last = 0; IS(k, DSV3__SPLIT_SPACE); k++)
        if (NEWLINE(k))
            last = k + 1;
    if (last)
        return last;
    return k <= i + 1 || k == hi ? k : k - 1;
}

/* Is there a border of pieces before unit i? */
static void slow_borders(const unit *u, size_t n, bool *border)
{
    memset(border, 0, n);
    for (size_t i = 0, run = 0; i < n; i++) {
        run = (u[i].c & 7) == DSV3__SPLIT_NUMBER ? run + 1 : 0;
        border[i] = i == 0 || (run ? run % 3 == 1 : (u[i - 1].c & 7) == DSV3__SPLIT_NUMBER) ||
                    (u[i].c & DSV3__SPLIT_CJK) != (u[i - 1].c & DSV3__SPLIT_CJK);
    }
    for (size_t lo = 0, hi; lo < n; lo = hi) {
        for (hi = lo + 1; hi < n && !border[hi]; hi++)
            continue;
        for (size_t i = lo; i < hi;) {
            size_t end = third_match(u, i, hi);
            if (end == i) {
                i++;
                continue;
            }
            border[i] = true;
            if (end < n)
                border[end] = true;
            i = end;
        }
    }
}

TEST(splitting_like_the_patterns)
{
    static const char *const alphabet[] = {" ", " ", "\n", "\r", "\t", "a", "Z", "\xC3\xA9", "\xCC\x81", "1", "\xD9\xA1", "!", "$", "\xE2\x82\xAC",
        "\xE6\x97\xA5", "\xE3\x81\x82", "\xE3\x83\xBB", "\xE3\x82\x99", "\xE3\x81\x80", "\xE3\x80\x85", "\xE3\x80\x80", "\xC2\xA0",
        "\xE2\x80\x8B", "\x01", "\xFF", "\xE6", "\xF0\x9F\x98\x80", "\xE2\x80\xA8", "\xC2\x85", "'", "<", "\xF3\xA0\x84\x80"};
    const dsv3__split *t = classes();
    random_state = 1;
    for (int round = 0; round < 200000; round++) {
        char s[64];
        unit u[16];
        bool border[16];
        size_t n = 0, len = 0, count = 1 + random_below(12);
        for (size_t i = 0; i < count; i++) {
            const char *c = alphabet[random_below(sizeof alphabet / sizeof alphabet[0])];
            memcpy(s + len, c, strlen(c));
            len += strlen(c);
        }
        const uint8_t *p = (const uint8_t *)s, *end = p + len;
        for (size_t at = 0, k; at < len && n < 16; at += k, n++) {
            u[n].c = dsv3__split_class(t, p + at, end, &k);
            u[n].first = p[at];
            u[n].at = at;
        }
        slow_borders(u, n, border);
        size_t next = 0;
        for (size_t i = 0; i < n; i++) {
            bool found = u[i].at == next;
            if (found)
                next = (size_t)(dsv3__split_piece(t, p + next, end) - p);
            if (found != border[i]) {
                test_fail(__FILE__, __LINE__, "round %d: %s", round, pieces(s, len));
                return;
            }
        }
        CHECK_EQ_UINT(next, len);
    }
}

// ---- Small tokenizers -------------------------------------------------------------------------------------

/* A tokenizer.json is put together from these; NULL: as DeepSeek-V3 has it. */
typedef struct parts {
    const char *added, *normalizer, *pre_tokenizer, *post_processor, *decoder, *model; /* whole values, or of fields of model */
    const char *vocab;  /* more entries, after the bytes and what the merges make: ,"x": 3 */
    const char *merges; /* the whole array, instead of `rules` */
    const char *more;   /* more keys at the top */
    const char *(*rules)[2]; /* [n_rules] pairs of bytes */
    size_t n_rules;
    size_t n_special; /* ids in front of the bytes */
    bool reversed;    /* keys in another order: model, and in it merges, before what they need */
    bool listed;      /* ["a", "b"] */
    bool escaped;     /* \u for every letter */
} parts;

#define PATTERN_1 "\\\\p{N}{1,3}"
#define PATTERN_2 "[\xE4\xB8\x80-\xE9\xBE\xA5\xE3\x81\x80-\xE3\x82\x9F\xE3\x82\xA0-\xE3\x83\xBF]+"
#define PATTERN_3                                                                                                   \
    "[!\\\"#$%&'()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?"          \
    "[\\\\p{L}\\\\p{M}]+| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+"
#define SPLIT(pattern) "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" pattern "\"},\"behavior\":\"Isolated\",\"invert\":false}"
#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false}"
#define SEQUENCE(parts) "{\"type\":\"Sequence\",\"pretokenizers\":[" parts "]}"
#define PRE_TOKENIZER SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3) "," BYTE_LEVEL)
#define ADDED(id, content, special, normalized)                                                                   \
    "{\"id\":" id ",\"content\":\"" content "\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":" normalized \
    ",\"special\":" special "}"

/* Byte letters of n bytes, for JSON. */
static char *letters(char *o, const char *bytes, size_t n, bool escaped)
{
    uint16_t byte_of[0x144];
    dsv3__tok_letters_init(byte_of);
    for (size_t i = 0; i < n; i++) {
        uint32_t code = 0;
        while (byte_of[code] == DSV3__TOK_NO_BYTE || (byte_of[code] & 0xFF) != (uint8_t)bytes[i])
            code++;
        if (escaped) {
            o += sprintf(o, "\\u%04x", code);
            continue;
        }
        if (code == '"' || code == '\\')
            *o++ = '\\';
        o += dsv3__utf8_put(o, code);
    }
    *o = 0;
    return o;
}

static char *build_vocab(char *o, const parts *p)
{
    size_t id = p->n_special;
    o += sprintf(o, "\"vocab\":{");
    for (size_t i = 0; i < p->n_special; i++)
        o += sprintf(o, "\"<s%d>\":%d,", (int)i, (int)i);
    for (int b = 0; b < 256; b++, id++) {
        char byte = (char)b;
        o += sprintf(o, "%s\"", b ? "," : "");
        o = letters(o, &byte, 1, p->escaped);
        o += sprintf(o, "\":%d", (int)id);
    }
    for (size_t r = 0; r < p->n_rules; r++, id++) {
        o += sprintf(o, ",\"");
        o = letters(o, p->rules[r][0], strlen(p->rules[r][0]), p->escaped);
        o = letters(o, p->rules[r][1], strlen(p->rules[r][1]), p->escaped);
        o += sprintf(o, "\":%d", (int)id);
    }
    return o + sprintf(o, "%s}", p->vocab ? p->vocab : "");
}

static char *build_merges(char *o, const parts *p)
{
    o += sprintf(o, "\"merges\":");
    if (p->merges)
        return o + sprintf(o, "%s", p->merges);
    *o++ = '[';
    for (size_t r = 0; r < p->n_rules; r++) {
        o += sprintf(o, "%s%s\"", r ? "," : "", p->listed ? "[" : "");
        o = letters(o, p->rules[r][0], strlen(p->rules[r][0]), p->escaped);
        o += sprintf(o, p->listed ? "\", \"" : p->escaped ? "\\u0020" : " ");
        o = letters(o, p->rules[r][1], strlen(p->rules[r][1]), p->escaped);
        o += sprintf(o, "\"%s", p->listed ? "]" : "");
    }
    return o + sprintf(o, "]");
}

/* The file; to be freed. */
static char *build(const parts *p)
{
    static char model[1 << 18], file[1 << 19];
    char *o = model;
    o += sprintf(o, "\"model\":{\"type\":\"BPE\",\"unk_token\":null,%s", p->model ? p->model : "");
    o = p->reversed ? build_merges(o, p) : build_vocab(o, p);
    *o++ = ',';
    o = p->reversed ? build_vocab(o, p) : build_merges(o, p);
    sprintf(o, "}");
    o = file;
    o += sprintf(o, "{%s%s\"version\":\"1.0\",\"truncation\":null,", p->reversed ? model : "", p->reversed ? "," : "");
    o += sprintf(o, "\"added_tokens\":%s,\n", p->added ? p->added : "[]");
    o += sprintf(o, "\"normalizer\":%s,\n", p->normalizer ? p->normalizer : "{\"type\":\"Sequence\",\"normalizers\":[]}");
    o += sprintf(o, "\"pre_tokenizer\":%s,\n", p->pre_tokenizer ? p->pre_tokenizer : PRE_TOKENIZER);
    o += sprintf(o, "\"post_processor\":%s,\n", p->post_processor ? p->post_processor : BYTE_LEVEL);
    o += sprintf(o, "\"decoder\":%s%s", p->decoder ? p->decoder : BYTE_LEVEL, p->more ? p->more : "");
    o += sprintf(o, p->reversed ? "}" : ",\n%s}\n", model);
    o = (char *)malloc(strlen(file) + 1);
    memcpy(o, file, strlen(file) + 1);
    return o;
}

static dsv3_tokenizer *open_parts(const parts *p, const char *config)
{
    char *json = build(p);
    dsv3_tokenizer *t = open_text(json, config);
    free(json);
    return t;
}

static const char *hello[][2] = {{"l", "l"}, {"h", "e"}, {"ll", "o"}, {"he", "llo"}, {" ", "w"}, {"o", "r"}, {" w", "or"}, {"a", "a"}, {"aa", "aa"}};

static parts hello_parts(void)
{
    parts p;
    memset(&p, 0, sizeof p);
    p.rules = hello;
    p.n_rules = sizeof hello / sizeof hello[0];
    return p;
}

/* The number of a byte's id where the bytes stand first, in order. */
enum { WORD_0 = 256 };

TEST(spellings)
{
    static const int32_t expected[] = {WORD_0 + 3, WORD_0 + 6, 'l', 'd', WORD_0 + 7, 'a', '"', '\\', 0xE6};
    static const char s[] = "hello worldaaa\"\\\xE6";
    for (int i = 0; i < 16; i++) {
        parts p = hello_parts();
        p.reversed = i & 1;
        p.listed = i & 2;
        p.escaped = i & 4;
        p.added = i & 8 ? "[" ADDED("265", "<\\uff5c\\ud83d\\ude00>", "true", "false") "]" : NULL;
        dsv3_tokenizer *t = open_parts(&p, NULL);
        if (!t)
            continue;
        check_ids(t, s, 0, expected, sizeof expected / sizeof expected[0]);
        CHECK(t->bpe.chain);
        t->bpe.chain = false;
        check_ids(t, s, 0, expected, sizeof expected / sizeof expected[0]);
        CHECK_EQ_INT(dsv3_token_find(t, "<" BAR "\xF0\x9F\x98\x80>", 9), i & 8 ? 265 : -1);
        dsv3__tok_close(t);
    }
}

// ---- Merging ----------------------------------------------------------------------------------------------

/* The rule, the slow way: of all pairs that merge, the lowest rank, the leftmost. */
static size_t slow_merge(const dsv3_tokenizer *t, const uint8_t *p, size_t n, int32_t *out)
{
    uint32_t w[64];
    for (size_t i = 0; i < n; i++)
        w[i] = p[i];
    for (;;) {
        uint32_t best = UINT32_MAX;
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            uint32_t made = dsv3__bpe_pair(&t->bpe, w[i], w[i + 1]);
            if (made && made < best)
                best = made, at = i;
        }
        if (best == UINT32_MAX)
            break;
        w[at] = best;
        memmove(w + at + 1, w + at + 2, (n - at - 2) * sizeof *w);
        n--;
    }
    for (size_t i = 0; i < n; i++)
        out[i] = t->bpe.ids[w[i]];
    return n;
}

/* Random texts of the letters a ... a + n_letters - 1 (one piece each): both ways of merging follow the rule. */
static void check_merging(dsv3_tokenizer *t, uint32_t n_letters, int rounds)
{
    for (int round = 0; round < rounds; round++) {
        char s[48];
        int32_t slow[64];
        bool chain = t->bpe.chain;
        size_t n = 1 + random_below(sizeof s);
        for (size_t i = 0; i < n; i++)
            s[i] = (char)('a' + random_below(n_letters));
        size_t n_slow = slow_merge(t, (const uint8_t *)s, n, slow);
        for (int way = 0; way < 2; way++) {
            t->bpe.chain = chain && way == 0;
            ids r = encode(t, s, n, 0);
            if (!same_ids(r, slow, n_slow))
                test_fail(__FILE__, __LINE__, "%s: other than the rule: %.*s", t->bpe.chain ? "chain" : "heap", (int)n, s);
            free(r.p);
        }
        t->bpe.chain = chain;
        if (test_now.failures)
            return;
    }
}

/* Vocabularies as a trainer makes them: the commonest pair merges, again and again. dsv3__bpe_sound must find that
   every word merges back to itself. */
TEST(merging_with_trained_words)
{
    static char words[64][2][64];
    static const char *rules[64][2];
    int with_chain = 0;
    random_state = 2;
    for (int round = 0; round < 60; round++) {
        uint32_t n_letters = 1 + random_below(4), n_rules = 1 + random_below(50), row[600];
        size_t n = sizeof row / sizeof row[0], n_words = n_letters;
        char names[64][64];
        for (uint32_t i = 0; i < n_letters; i++)
            names[i][0] = (char)('a' + i), names[i][1] = 0;
        for (size_t i = 0; i < n; i++)
            row[i] = random_below(n_letters);
        parts p;
        memset(&p, 0, sizeof p);
        p.rules = rules;
        while (p.n_rules < n_rules && n_words < 60) {
            unsigned count[64][64] = {{0}}, best = 0;
            uint32_t a = 0, b = 0;
            for (size_t i = 0; i + 1 < n; i++)
                if (++count[row[i]][row[i + 1]] > best && strlen(names[row[i]]) + strlen(names[row[i + 1]]) < 60)
                    best = count[row[i]][row[i + 1]], a = row[i], b = row[i + 1];
            if (best < 2)
                break;
            strcpy(words[p.n_rules][0], names[a]);
            strcpy(words[p.n_rules][1], names[b]);
            rules[p.n_rules][0] = words[p.n_rules][0];
            rules[p.n_rules][1] = words[p.n_rules][1];
            p.n_rules++;
            snprintf(names[n_words], sizeof names[0], "%s%s", names[a], names[b]);
            size_t to = 0;
            for (size_t i = 0; i < n; i++, to++) {
                bool merge = i + 1 < n && row[i] == a && row[i + 1] == b;
                row[to] = merge ? (uint32_t)n_words : row[i];
                i += merge;
            }
            n = to;
            n_words++;
        }
        dsv3_tokenizer *t = open_parts(&p, NULL);
        if (!t)
            continue;
        CHECK(t->bpe.chain);
        with_chain += t->bpe.chain;
        check_merging(t, n_letters, 400);
        dsv3__tok_close(t);
    }
    CHECK(with_chain > 50);
}

/* Vocabularies that no trainer made: words that do not merge back to themselves, halves that come after their merge. What
   chain cannot do must be left to heap. */
TEST(merging_with_any_words)
{
    static char words[64][2][64];
    static const char *rules[64][2];
    int with_chain = 0, without = 0;
    random_state = 3;
    for (int round = 0; round < 300; round++) {
        char names[64][64];
        uint32_t n_letters = 1 + random_below(3), n_names = n_letters, want = 1 + random_below(30);
        for (uint32_t i = 0; i < n_letters; i++)
            names[i][0] = (char)('a' + i), names[i][1] = 0;
        parts p;
        memset(&p, 0, sizeof p);
        p.rules = rules;
        for (int tries = 0; p.n_rules < want && tries < 500; tries++) {
            const char *a = names[random_below(n_names)], *b = names[random_below(n_names)];
            char both[128];
            bool known = false;
            snprintf(both, sizeof both, "%s%s", a, b);
            for (uint32_t i = 0; i < n_names; i++)
                known = known || strcmp(names[i], both) == 0;
            if (known || strlen(both) > 12)
                continue;
            strcpy(words[p.n_rules][0], a);
            strcpy(words[p.n_rules][1], b);
            strcpy(names[n_names++], both);
            p.n_rules++;
        }
        for (size_t i = 0; i < p.n_rules; i++) { /* some in another order */
            size_t k = round % 2 ? i : random_below((uint32_t)p.n_rules);
            rules[i][0] = words[i][0], rules[i][1] = words[i][1];
            if (k < i) {
                const char *a = rules[i][0], *b = rules[i][1];
                rules[i][0] = rules[k][0], rules[i][1] = rules[k][1];
                rules[k][0] = a, rules[k][1] = b;
            }
        }
        dsv3_tokenizer *t = open_parts(&p, NULL);
        if (!t)
            continue;
        with_chain += t->bpe.chain;
        without += !t->bpe.chain;
        check_merging(t, n_letters, 200);
        dsv3__tok_close(t);
    }
    CHECK(with_chain > 20);
    CHECK(without > 20);
}

/* Any bytes at all: the two ways agree, and the bytes come back. */
static void check_bytes(dsv3_tokenizer *t, const char *s, size_t n)
{
    bool chain = t->bpe.chain;
    for (uint32_t flags = 0; flags <= DSV3_TOKENIZE_MARKERS; flags += DSV3_TOKENIZE_MARKERS) {
        ids r = encode(t, s, n, flags), slow;
        t->bpe.chain = false;
        slow = encode(t, s, n, flags);
        t->bpe.chain = chain;
        CHECK(same_ids(r, slow.p, slow.n));
        CHECK(round_trip(t, s, n, r));
        free(r.p);
        free(slow.p);
    }
}

static void check_random_bytes(dsv3_tokenizer *t, const char *sample, size_t n_sample)
{
    char s[300];
    for (int b = 0; b < 256; b++) {
        s[0] = (char)b;
        check_bytes(t, s, 1);
    }
    for (int round = 0; round < 4000 && !test_now.failures; round++) {
        size_t n = random_below(sizeof s), from = random_below((uint32_t)(n_sample - sizeof s));
        memcpy(s, sample + from, n);
        for (int damage = (int)random_below(4) * (int)n / 20; damage > 0 && n; damage--)
            s[random_below((uint32_t)n)] = (char)random_below(256);
        for (size_t i = 0; i < n && round % 7 == 0; i++)
            s[i] = (char)(round % 14 ? random_below(256) : 0x80 + random_below(128));
        check_bytes(t, s, n);
    }
}

TEST(any_bytes)
{
    static const char sample[] =
        "She said: \"It's 1234567 steps\", and left.\r\n\r\n\tPerch\xC3\xA9 la citt\xC3\xA0 <" BAR "User" BAR ">\xE5\xA4\xA9\xE6\xB0\x94"
        "\xE5\xBE\x88\xE5\xA5\xBD\xEF\xBC\x81\xE3\x82\x80\xE3\x81\x8B\xE3\x81\x97\xE3\x82\x80\xE3\x81\x8B\xE3\x81\x97\xF0\x9F\x98\x80\xF0\x9F"
        "\x91\xA9\xE2\x80\x8D\xF0\x9F\x92\xBB    ------====== hellohellohelloaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa "
        "\xD7\xA9\xD7\x9C\xD7\x95\xD7\x9D once upon a time there was a miller who had three sons, his mill, a donkey and a cat; the sons had "
        "to grind, the donkey had to carry grain and flour away, and the cat to catch mice";
    parts p = hello_parts();
    dsv3_tokenizer *t = open_parts(&p, NULL);
    REQUIRE(t != NULL);
    random_state = 4;
    check_random_bytes(t, sample, sizeof sample - 1);
    dsv3__tok_close(t);
    if (v3())
        check_random_bytes(v3(), sample, sizeof sample - 1);
}

TEST(any_bytes_of_long_texts)
{
    if (!v3())
        SKIP("no published tokenizer beside the repository");
    static const char *const files[] = {"long/kokoro.txt", "long/mixed.txt", "long/hongloumeng.txt", "long/promessi_sposi.txt"};
    random_state = 5;
    for (int i = 0; i < 4; i++) {
        text file = read_file(published(), files[i]);
        check_random_bytes(v3(), file.p, file.n);
        free(file.p);
    }
}

/* The worst of one piece, n of a kind: ids as counted with the `tokenizers` library, and time about in proportion to n. */
TEST(long_pieces)
{
    dsv3_tokenizer *t = v3();
    if (!t)
        SKIP("no published tokenizer beside the repository");
    static const struct {
        const char *s;
        size_t n, ids;
    } list[] = {{"a", 1000000, 125000}, {" ", 1000000, 7813}, {"\n", 1000000, 62500}, {"\xE4\xB8\x80", 300000, 150000}, {"=", 1000000, 15625},
                {"ab", 500000, 500000}, {"\xE2\x80\x8D", 300000, 150000}, {"7", 1000000, 333334}, {"<", 1000000, 0}, {"<" BAR, 100000, 0},
                {"<" BAR "User" BAR ">", 100000, 100000}};
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        size_t n = strlen(list[i].s);
        char *s = (char *)malloc(n * list[i].n);
        for (size_t k = 0; k < list[i].n; k++)
            memcpy(s + k * n, list[i].s, n);
        for (int way = 0; way < 2; way++) {
            double times[2];
            for (int whole = 0; whole < 2; whole++) {
                t->bpe.chain = way == 0;
                times[whole] = seconds();
                ids r = encode(t, s, n * list[i].n / (whole ? 1 : 4), DSV3_TOKENIZE_MARKERS);
                times[whole] = seconds() - times[whole];
                if (whole && list[i].ids)
                    CHECK_EQ_UINT(r.n, list[i].ids);
                free(r.p);
            }
            if (times[1] > 0.2 && times[1] > 12 * times[0]) /* 4 times the text; a quadratic way would take 16 times as long */
                test_fail(__FILE__, __LINE__, "%lu of \"%s\": %.3f s, a quarter: %.3f s", (unsigned long)list[i].n, list[i].s, times[1], times[0]);
            CHECK(times[1] < 5);
        }
        t->bpe.chain = true;
        free(s);
    }
}

// ---- Text again -------------------------------------------------------------------------------------------

TEST(detokenizing)
{
    parts p = hello_parts();
    p.added = "[" ADDED("265", "<S>", "true", "false") "," ADDED("266", "<N>", "false", "true") "]";
    dsv3_tokenizer *t = open_parts(&p, NULL);
    REQUIRE(t != NULL);
    static const struct {
        int32_t in[8];
        size_t n;
        bool skip;
        const char *out;
    } list[] = {
        {{WORD_0 + 3, ' ', 265, 266}, 4, false, "hello <S><N>"},
        {{WORD_0 + 3, 265, 266}, 3, true, "hello<N>"},
        {{-1, 'a', 267, 1 << 30, 'b', INT32_MIN}, 6, false, "ab"},            /* unknown ids leave nothing */
        {{0xE6, 0x97, 0xA5}, 3, false, "\xE6\x97\xA5"},
        {{0xE6, 0x97}, 2, false, "\xEF\xBF\xBD"},                             /* one for a maximal part */
        {{0xE6, 265, 0x97, 0xA5}, 4, false, "\xEF\xBF\xBD<S>\xEF\xBF\xBD\xEF\xBF\xBD"},
        {{0xE6, 265, 0x97, 0xA5}, 4, true, "\xE6\x97\xA5"},                   /* what is left out leaves no gap */
        {{0xE6, 300, 0x97, 0xA5}, 4, false, "\xE6\x97\xA5"},
        {{0xF0, 0x90, 0x80, 'x'}, 4, false, "\xEF\xBF\xBDx"},
        {{0xF0, 0x80, 0x80, 'x'}, 4, false, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDx"},
        {{0xED, 0xA0, 0x80}, 3, false, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
        {{0xC0, 0xAF, 0xFF}, 3, false, "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD"},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        text d = decode(t, list[i].in, list[i].n, list[i].skip ? DSV3_DETOKENIZE_SKIP_SPECIAL : 0);
        CHECK_EQ_STR(d.p, list[i].out);
        free(d.p);
    }
    char out[8] = "........";
    size_t n = 99;
    CHECK_RESULT(dsv3_detokenize(t, list[0].in, 4, 0, out, 7, &n, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_EQ_UINT(n, 12);
    CHECK_BYTES(out, 8, "hello <.", 8);
    CHECK_RESULT(dsv3_detokenize(t, list[0].in, 4, 1, out, 7, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_EQ_UINT(n, 0);
    CHECK_RESULT(dsv3_detokenize(t, NULL, 4, 0, out, 7, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_detokenize(NULL, list[0].in, 4, 0, out, 7, &n, NULL), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_detokenize(t, list[0].in, 4, 0, out, 7, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_OK(dsv3_detokenize(t, NULL, 0, 0, NULL, 0, &n, &e), e);
    CHECK_EQ_UINT(n, 0);
    CHECK(dsv3_token_bytes(t, 267, &n) == NULL && n == 0);
    CHECK(dsv3_token_bytes(t, -1, NULL) == NULL);
    CHECK(dsv3_token_bytes(t, 265, &n) != NULL && n == 3);
    dsv3__tok_close(t);
}

/* Fed in any portions, a stream gives what the whole gives, only whole characters, and never takes anything back. */
TEST(streaming)
{
    parts p = hello_parts();
    dsv3_tokenizer *t = open_parts(&p, NULL);
    REQUIRE(t != NULL);
    static const uint8_t likely[] = {0xF0, 0x9F, 0x98, 0x80, 0xE6, 0x97, 0xA5, 0xC3, 0xA9, 'a', 0xED, 0xA0, 0xF4, 0x90, 0xE0, 0xC0, 0xFF, 0xBF};
    random_state = 6;
    for (int round = 0; round < 50000 && !test_now.failures; round++) {
        int32_t in[16];
        char out[16 * 12 + 9], *o = out;
        size_t n = random_below(16);
        dsv3__tok_stream stream = {0, {0}};
        for (size_t i = 0; i < n; i++)
            in[i] = likely[random_below(sizeof likely)];
        text whole = decode(t, in, n, 0);
        for (size_t i = 0, k; i < n; i += k) {
            char chunk[16];
            k = 1 + random_below(3);
            k = k < n - i ? k : n - i;
            for (size_t c = 0; c < k; c++)
                chunk[c] = (char)in[i + c];
            size_t put = dsv3__tok_stream_put(&stream, chunk, k, o);
            CHECK(put <= 3 * (k + 3));
            for (const char *q = o; q < o + put; q += dsv3__utf8_length(q, o + put))
                REQUIRE(CHECK(dsv3__utf8_length(q, o + put) > 0));
            o += put;
            CHECK(memcmp(out, whole.p, (size_t)(o - out)) == 0); /* never more than is certain */
        }
        o += dsv3__tok_stream_flush(&stream, o);
        CHECK_EQ_UINT(dsv3__tok_stream_flush(&stream, o), 0);
        CHECK_BYTES(out, o - out, whole.p, whole.n);
        free(whole.p);
    }
    dsv3__tok_close(t);
}

// ---- The call ---------------------------------------------------------------------------------------------

TEST(tokenizing)
{
    parts p = hello_parts();
    p.added = "[" ADDED("265", "<B>", "true", "false") "]";
    dsv3_tokenizer *t = open_parts(&p, "{\"bos_token\":\"<B>\",\"add_bos_token\":true}"), *plain = open_parts(&p, NULL);
    REQUIRE(t != NULL && plain != NULL);
    static const int32_t with[] = {265, WORD_0 + 3}, without[] = {WORD_0 + 3}, marked[] = {265, 265};
    int32_t out[4] = {7, 7, 7, 7};
    size_t n = 99;
    check_ids(t, "hello", 0, without, 1);
    check_ids(t, "hello", DSV3_TOKENIZE_BOS, with, 2);
    check_ids(t, "<B>", DSV3_TOKENIZE_BOS | DSV3_TOKENIZE_MARKERS, marked, 2);
    check_ids(plain, "hello", DSV3_TOKENIZE_BOS, without, 1);
    check_ids(t, "", DSV3_TOKENIZE_BOS, with, 1);
    CHECK_OK(dsv3_tokenize(t, "hello hello", 11, 0, NULL, 0, &n, NULL), e);
    CHECK_EQ_UINT(n, 3);
    CHECK_RESULT(dsv3_tokenize(t, "hello hello", 11, 0, out, 2, &n, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_EQ_UINT(n, 3);
    CHECK(out[0] == WORD_0 + 3 && out[1] == ' ' && out[2] == 7);
    CHECK_OK(dsv3_tokenize(t, NULL, 0, 0, out, 2, &n, &e), e);
    CHECK_EQ_UINT(n, 0);
    CHECK_RESULT(dsv3_tokenize(NULL, "x", 1, 0, out, 2, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_tokenize(t, NULL, 1, 0, out, 2, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_tokenize(t, "x", 1, 0, NULL, 2, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_tokenize(t, "x", 1, 0, out, 2, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_tokenize(t, "x", 1, 4, out, 2, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_tokenize(t, "x", (size_t)1 << 31, 0, out, 2, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_EQ_INT(dsv3_token_find(NULL, "x", 1), -1);
    CHECK(dsv3_token_bytes(NULL, 0, &n) == NULL);
    dsv3__tok_close(t);
    dsv3__tok_close(plain);
    dsv3__tok_close(NULL);
}

/* Two passes, the leftmost, there the longest; gaps are texts of their own. */
TEST(added_tokens)
{
    parts p = hello_parts();
    p.added = "[" ADDED("265", "zzq", "false", "true") "," ADDED("122", "z", "true", "false") "," ADDED("266", "wkb", "false", "true") ","
              ADDED("119", "w", "false", "true") "," ADDED("267", "wk", "false", "false") "," ADDED("256", "ll", "false", "false") "]";
    dsv3_tokenizer *t = open_parts(&p, NULL);
    REQUIRE(t != NULL);
    static const int32_t first[] = {'z', 'z', 'q'}, longest[] = {267, 'b', 'w', 'q'}, one[] = {265, 266}, cuts[] = {257, 256, 'o'}, no_cut[] = {259};
    check_ids(t, "zzq", DSV3_TOKENIZE_MARKERS, first, 3);   /* the first pass takes both z before zzq is looked for */
    check_ids(t, "wkbwq", DSV3_TOKENIZE_MARKERS, longest, 4);
    t->markers[1].normalized = t->markers[4].normalized = true;
    check_ids(t, "zzqwkb", DSV3_TOKENIZE_MARKERS, one, 2);  /* in one pass the longest at a place is taken */
    check_ids(t, "hello", DSV3_TOKENIZE_MARKERS, cuts, 3);  /* a word that is an added token cuts the text */
    check_ids(t, "hello", 0, no_cut, 1);
    CHECK_EQ_INT(dsv3_token_find(t, "wkb", 3), 266);
    CHECK_EQ_INT(dsv3_token_find(t, "wkbx", 4), -1);
    dsv3__tok_close(t);
}

TEST(ignore_merges)
{
    static const int32_t whole[] = {WORD_0 + 9}, merged[] = {'q', WORD_0 + 7}, longer[] = {'q', WORD_0 + 7, 'a'};
    for (int i = 0; i < 2; i++) {
        parts p = hello_parts();
        p.model = i ? "\"ignore_merges\":true," : "\"ignore_merges\":false,";
        p.vocab = ",\"qaa\":265";
        dsv3_tokenizer *t = open_parts(&p, NULL);
        REQUIRE(t != NULL);
        check_ids(t, "qaa", 0, i ? whole : merged, i ? 1 : 2);
        check_ids(t, "qaaa", 0, longer, 3);
        dsv3__tok_close(t);
    }
}

// ---- Files that lie ---------------------------------------------------------------------------------------

static void refused(parts p, const char *part_of_message)
{
    char *json = build(&p);
    dsv3_tokenizer *t = (dsv3_tokenizer *)&p;
    CHECK_RESULT(open_n(&t, json, strlen(json), NULL), DSV3_ERROR_TOKENIZER, e);
    CHECK(t == NULL);
    CHECK_CONTAINS(e.message, part_of_message);
    CHECK_CONTAINS(e.message, "tokenizer.json");
    dsv3__tok_close(t);
    free(json);
}

#define REFUSED(field, value, message) \
    do {                               \
        parts p = hello_parts();       \
        p.field = value;               \
        refused(p, message);           \
    } while (0)

TEST(refused_files)
{
    REFUSED(normalizer, "{\"type\":\"NFC\"}", "NFC");
    REFUSED(normalizer, "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Lowercase\"}]}", "Lowercase");
    REFUSED(pre_tokenizer, "null", "pre_tokenizer");
    REFUSED(pre_tokenizer, BYTE_LEVEL, "pre_tokenizer");
    REFUSED(pre_tokenizer, SEQUENCE("{\"type\":\"Metaspace\"}"), "Metaspace");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," BYTE_LEVEL), "three Splits");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT("\\\\p{N}{1,4}") "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3) "," BYTE_LEVEL), "\\p{N}{1,4}");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_3) "," SPLIT(PATTERN_2) "," BYTE_LEVEL), "[A-Za-z]+|");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3) "," SPLIT("x") "," BYTE_LEVEL), "pattern x");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3)), "ByteLevel");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3) "," BYTE_LEVEL "," BYTE_LEVEL), "ByteLevel");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3)
                                    ",{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":false}"), "add_prefix_space");
    REFUSED(pre_tokenizer, SEQUENCE(SPLIT(PATTERN_1) "," SPLIT(PATTERN_2) "," SPLIT(PATTERN_3)
                                    ",{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"), "use_regex");
    REFUSED(pre_tokenizer, SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" PATTERN_1 "\"},\"behavior\":\"Removed\",\"invert\":false}"), "Isolated");
    REFUSED(pre_tokenizer, SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" PATTERN_1 "\"},\"behavior\":\"Isolated\",\"invert\":true}"), "invert");
    REFUSED(pre_tokenizer, SEQUENCE("{\"type\":\"Split\",\"pattern\":{\"String\":\"x\"},\"behavior\":\"Isolated\",\"invert\":false}"), "Regex");
    REFUSED(post_processor, "{\"type\":\"BertProcessing\"}", "BertProcessing");
    REFUSED(post_processor, "{\"type\":\"TemplateProcessing\",\"single\":[{\"Sequence\":{\"id\":\"A\"}},{\"SpecialToken\":{\"id\":\"x\"}}],"
                            "\"special_tokens\":{\"x\":{\"ids\":[0]}}}", "TemplateProcessing");
    REFUSED(decoder, "null", "decoder");
    REFUSED(decoder, "{\"type\":\"Sequence\",\"decoders\":[]}", "decoder");
    REFUSED(model, "\"dropout\":0.1,", "dropout");
    REFUSED(model, "\"continuing_subword_prefix\":\"##\",", "##");
    REFUSED(model, "\"end_of_word_suffix\":\"</w>\",", "</w>");
    REFUSED(model, "\"byte_fallback\":true,", "byte_fallback");
    REFUSED(model, "\"ignore_merges\":1,", "ignore_merges");
    REFUSED(model, "\"type\":\"Unigram\",", "Unigram");
    REFUSED(model, "\"score\":1,", "model.score");
    REFUSED(model, "\"vocab\":{},", "model.vocab is given twice");
    REFUSED(model, "\"merges\":[],\"merges\":[],", "model.merges is given twice");
    REFUSED(vocab, ",\"q\":9", "id 9 is given twice");
    REFUSED(vocab, ",\"q\":265", "\"q\" stands there twice");
    REFUSED(vocab, ",\"\\u0071\":265", "\"q\" stands there twice");
    REFUSED(vocab, ",\"q r\":265,\"q r\":266", "\"q r\" stands there twice");
    REFUSED(vocab, ",\"qq\":266", "no entry has the id 265");
    REFUSED(vocab, ",\"qq\":2097152", "2097152");
    REFUSED(vocab, ",\"\":265", "0 bytes");
    REFUSED(merges, "[\"a q\",\"a x\"]", "model.merges[0]: the result of \"a q\"");
    REFUSED(merges, "[\"h e\",\"z he\"]", "model.merges[1]");
    REFUSED(merges, "[\"zz e\"]", "first half");
    REFUSED(merges, "[\"e zz\"]", "second half");
    REFUSED(merges, "[\"h e\",\"h e\"]", "model.merges[1] makes the token");
    REFUSED(merges, "[\"he\"]", "\"he\"");
    REFUSED(merges, "[\"h e l\"]", "\"h e l\"");
    REFUSED(merges, "[\" e\"]", "\" e\"");
    REFUSED(merges, "[\"e \"]", "\"e \"");
    REFUSED(merges, "[\"h  e\"]", "\"h  e\"");
    REFUSED(merges, "[\"\xE4\xB8\x80 e\"]", "byte letters");
    REFUSED(merges, "[[\"h\"]]", "model.merges[0]");
    REFUSED(merges, "[[]]", "model.merges[0]");
    REFUSED(merges, "[[\"h\",\"e\",\"l\"]]", "model.merges[0]");
    REFUSED(merges, "[7]", "model.merges[0]");
    REFUSED(merges, "[null]", "model.merges[0]");
    REFUSED(more, ",\"decoder\":null", "decoder is given twice");
    REFUSED(added, "[" ADDED("266", "<x>", "true", "false") "]", "expected the id 265");
    REFUSED(added, "[" ADDED("264", "<x>", "true", "false") "]", "expected the id 265");
    REFUSED(added, "[" ADDED("266", "<x>", "true", "false") "," ADDED("265", "<y>", "true", "false") "]", "expected the id 265");
    REFUSED(added, "[" ADDED("265", "he", "true", "false") "]", "expected the id 257");
    REFUSED(added, "[" ADDED("265", "<x>", "true", "false") "," ADDED("266", "<x>", "true", "false") "]", "\"<x>\" stands there twice");
    REFUSED(added, "[" ADDED("257", "he", "true", "false") "," ADDED("257", "he", "true", "false") "]", "\"he\" stands there twice");
    REFUSED(added, "[" ADDED("265", "", "true", "false") "]", "0 bytes");
    REFUSED(added, "[" ADDED("4294967561", "<x>", "true", "false") "]", "4294967561");
    REFUSED(added, "[{\"id\":265,\"content\":\"<x>\",\"special\":true,\"normalized\":false,\"lstrip\":true}]", "lstrip");
    REFUSED(added, "[{\"id\":265,\"content\":\"<x>\",\"special\":true,\"normalized\":false,\"single_word\":true}]", "single_word");
    REFUSED(added, "[{\"id\":265,\"content\":\"<x>\",\"special\":true}]", "normalized");
    REFUSED(added, "[{\"id\":265,\"id\":265,\"content\":\"<x>\",\"special\":true,\"normalized\":false}]", "id is given twice");
    parts p = hello_parts(); /* a third byte letter that is not there */
    char *json = build(&p), *at = strstr(json, "\"\xC4\x82\":2,");
    REQUIRE(CHECK(at != NULL));
    memcpy(at, "\"\xD4\x82\"", 4);
    dsv3_tokenizer *t;
    CHECK_RESULT(open_n(&t, json, strlen(json), NULL), DSV3_ERROR_TOKENIZER, e);
    CHECK_CONTAINS(e.message, "the byte 2");
    free(json);
}

/* One character of one pattern is another one: the ids would be others. */
TEST(every_character_of_the_patterns)
{
    parts p = hello_parts();
    char *json = build(&p), *from = strstr(json, "\"Regex\""), *to = strstr(json, "\"ByteLevel\"");
    int changed = 0;
    for (char *q = from; q < to; q++) {
        char old = *q;
        dsv3_tokenizer *t;
        if (old < 'A' || old > 'z' || old == '\\' || old == '[' || old == ']')
            continue;
        *q = old == 'k' ? 'j' : 'k';
        dsv3_result r = open_n(&t, json, strlen(json), NULL);
        CHECK(r == DSV3_ERROR_TOKENIZER || r == DSV3_ERROR_JSON);
        CHECK(t == NULL);
        *q = old;
        changed++;
    }
    CHECK(changed > 100);
    free(json);
}

TEST(bad_json)
{
    static const struct {
        const char *vocab, *merges, *added;
    } list[] = {{",\"\\ud800\":265", NULL, NULL}, {",\"\\u00\":265", NULL, NULL}, {",\"zz\"265", NULL, NULL}, {",\"zz\":", NULL, NULL},
                {",\"zz\":-1", NULL, NULL}, {",\"zz\":265.5", NULL, NULL}, {",\"zz\":\"265\"", NULL, NULL}, {",\"zz\":0265", NULL, NULL},
                {",", NULL, NULL}, {",\"z\xFF\":265", NULL, NULL}, {",\"z\nz\":265", NULL, NULL}, {NULL, "[\"h e\",]", NULL}, {NULL, "{}", NULL},
                {NULL, "[\"h e]", NULL}, {NULL, "[\"h \\x\"]", NULL}, {NULL, "[[\"h\" \"e\"]]", NULL}, {NULL, NULL, "{}"}, {NULL, NULL, "[7]"},
                {NULL, NULL, "[{\"id\":\"x\"}]"}, {NULL, NULL, "[{\"special\":1}]"}, {NULL, NULL, "[{\"content\":\"\\udc00\"}]"}};
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        parts p = hello_parts();
        p.vocab = list[i].vocab;
        p.merges = list[i].merges;
        p.added = list[i].added;
        char *json = build(&p);
        dsv3_tokenizer *t;
        if (!CHECK_RESULT(open_n(&t, json, strlen(json), NULL), DSV3_ERROR_JSON, e))
            printf("    number %d\n", (int)i);
        CHECK(t == NULL);
        free(json);
    }
}

/* Other spellings of ids, and whole numbers with a point: as JSON has it. */
TEST(ids_in_any_spelling)
{
    parts p = hello_parts();
    p.vocab = ",\"zz\" : 265.0 ,\"zy\":\t2.66e2\r,\"zx\":267 ";
    dsv3_tokenizer *t = open_parts(&p, NULL);
    REQUIRE(t != NULL);
    CHECK_EQ_UINT(t->n_tokens, 268);
    dsv3__tok_close(t);
}

/* Each truncation, in a block of its own length, so that a sanitizer sees a byte more. */
TEST(truncated_files)
{
    static const char config[] = "{\"add_bos_token\":true,\"bos_token\":{\"content\":\"<B>\"},\"eos_token\":\"<B>\"}";
    for (int i = 0; i < 2; i++) {
        parts p = hello_parts();
        p.added = "[" ADDED("265", "<B>", "true", "false") "]";
        p.reversed = p.listed = i;
        char *json = build(&p);
        dsv3__str j, c;
        dsv3_tokenizer *t;
        for (j.n = 0; j.n < strlen(json) - 2; j.n++) { /* the last brace and the newline behind it */
            char *cut = (char *)malloc(j.n ? j.n : 1);
            memcpy(cut, json, j.n);
            j.p = cut;
            c.p = config, c.n = sizeof config - 1;
            dsv3_result r = tok_open(&t, NULL, 0, j, c);
            if ((r != DSV3_ERROR_JSON && r != DSV3_ERROR_TOKENIZER) || t) /* a number cut short is another id */
                test_fail(__FILE__, __LINE__, "%lu bytes: %s", (unsigned long)j.n, dsv3_result_name(r));
            free(cut);
        }
        j.p = json, j.n = strlen(json);
        for (c.n = 1; c.n < sizeof config - 1; c.n++) {
            char *cut = (char *)malloc(c.n);
            memcpy(cut, config, c.n);
            c.p = cut;
            CHECK_RESULT(tok_open(&t, NULL, 0, j, c), DSV3_ERROR_JSON, e);
            free(cut);
        }
        free(json);
    }
}

/* Each byte made into 0, 255 and one more: an error, or a tokenizer that works. */
TEST(changed_files)
{
    parts p = hello_parts();
    p.added = "[" ADDED("265", "<B>", "true", "false") "]";
    char *json = build(&p);
    size_t n = strlen(json);
    int opened = 0;
    for (size_t i = 0; i < n; i++)
        for (int k = 0; k < 3; k++) {
            char old = json[i];
            dsv3_tokenizer *t;
            json[i] = (char)(k == 0 ? 0 : k == 1 ? 255 : old + 1);
            dsv3_result r = open_n(&t, json, n, NULL);
            CHECK((r == DSV3_OK) == (t != NULL));
            CHECK((r == DSV3_OK) == (e.message[0] == 0));
            CHECK(r == DSV3_OK || r == DSV3_ERROR_JSON || r == DSV3_ERROR_TOKENIZER);
            if (t) {
                static const char s[] = "hello <B> hello worldaaaaaaa\xE6\x97\xA5";
                ids out = encode(t, s, sizeof s - 1, DSV3_TOKENIZE_MARKERS);
                CHECK(round_trip(t, s, sizeof s - 1, out) || out.n);
                free(out.p);
                opened++;
            }
            dsv3__tok_close(t);
            json[i] = old;
        }
    CHECK(opened > 100);
    free(json);
}

/* ids of many other texts: an entry too many, a word over the limit, merges without end. */
TEST(limits)
{
    parts p = hello_parts();
    char *big = (char *)malloc(3000);
    dsv3_tokenizer *t;
    int n = sprintf(big, ",\"%01024d\":265", 0);
    p.vocab = big;
    t = open_parts(&p, NULL);
    REQUIRE(t != NULL);
    static const int32_t expected[] = {WORD_0 + 3};
    CHECK(!t->bpe.chain); /* words so long are merged by the rule */
    check_ids(t, "hello", 0, expected, 1);
    dsv3__tok_close(t);
    n = sprintf(big, ",\"%01025d\":265", 0);
    refused(p, "1025 bytes");
    n = sprintf(big, "[" ADDED("265", "%01025d", "true", "false") "]", 0);
    CHECK(n > 0);
    p.vocab = NULL;
    p.added = big;
    refused(p, "1025 bytes");
    free(big);
    dsv3__str j, c;
    j.p = "{}", j.n = (64u << 20) + 1;
    c.p = NULL, c.n = 0;
    CHECK_RESULT(tok_open(&t, NULL, 0, j, c), DSV3_ERROR_TOKENIZER, e);
    CHECK_CONTAINS(e.message, "67108865 bytes");
}

// ---- tokenizer_config.json --------------------------------------------------------------------------------

#define TEMPLATE(more)                                                                                                  \
    "{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<B>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\"," \
    "\"type_id\":0}}" more "],\"pair\":[],\"special_tokens\":{\"<B>\":{\"id\":\"<B>\",\"ids\":[265],\"tokens\":[\"<B>\"]}}}"

TEST(configuration)
{
    static const struct {
        const char *config, *post_processor, *message;
        int32_t bos, eos, pad;
        bool add;
    } list[] = {
        {NULL, NULL, NULL, -1, -1, -1, false},
        {"{}", NULL, NULL, -1, -1, -1, false},
        {"\xEF\xBB\xBF{\"bos_token\":null,\"add_bos_token\":null}", NULL, NULL, -1, -1, -1, false},
        {"{\"bos_token\":\"<B>\",\"eos_token\":{\"__type\":\"AddedToken\",\"content\":\"<E>\"},\"add_bos_token\":true,\"tokenizer_class\":"
         "\"LlamaTokenizerFast\",\"model_max_length\":1000000000000000019884624838656}", NULL, NULL, 265, 266, -1, true},
        {"{\"bos_token\":\"\\u003cB>\",\"pad_token\":\"<none>\"}", NULL, NULL, 265, -1, -1, false},
        {"{\"bos_token\":\"he\",\"pad_token\":\"<E>\"}", NULL, NULL, 257, -1, 266, false}, /* any token may be named */
        {NULL, TEMPLATE(""), NULL, 265, -1, -1, true},
        {"{\"add_bos_token\":false}", TEMPLATE(""), NULL, 265, -1, -1, false},
        {"{\"bos_token\":\"<E>\"}", TEMPLATE(""), "bos_token is 266", 0, 0, 0, false},
        {NULL, TEMPLATE(",{\"SpecialToken\":{\"id\":\"<B>\",\"type_id\":0}}"), "post_processor", 0, 0, 0, false},
        {"{\"add_bos_token\":true}", NULL, "begin-of-text", 0, 0, 0, false},
        {"{\"eos_token\":\"<none>\"}", NULL, "eos_token \"<none>\"", 0, 0, 0, false},
        {"{\"eos_token\":{}}", NULL, "eos_token has no content", 0, 0, 0, false},
        {"{\"eos_token\":\"<E>\",\"eos_token\":\"<E>\"}", NULL, "eos_token is given twice", 0, 0, 0, false},
        {"{\"eos_token\":7}", NULL, "byte", 0, 0, 0, false},
        {"{\"add_bos_token\":7}", NULL, "byte", 0, 0, 0, false},
        {"[]", NULL, "byte 0", 0, 0, 0, false},
        {"{} x", NULL, "byte 3", 0, 0, 0, false},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        parts p = hello_parts();
        dsv3_tokenizer *t;
        dsv3_tokenizer_info info;
        p.added = "[" ADDED("265", "<B>", "true", "false") "," ADDED("266", "<E>", "true", "false") "]";
        p.post_processor = list[i].post_processor;
        char *json = build(&p);
        dsv3_result r = open_n(&t, json, strlen(json), list[i].config);
        free(json);
        CHECK((r == DSV3_OK) == !list[i].message);
        CHECK_CONTAINS(e.message, list[i].message ? list[i].message : "");
        if (!t)
            continue;
        dsv3_tokenizer_info_get(t, &info);
        CHECK_EQ_INT(info.n_tokens, 267);
        CHECK_EQ_INT(info.bos, list[i].bos);
        CHECK_EQ_INT(info.eos, list[i].eos);
        CHECK_EQ_INT(info.pad, list[i].pad);
        CHECK(info.add_bos == list[i].add);
        dsv3__tok_close(t);
    }
}

// ---- Memory -----------------------------------------------------------------------------------------------

typedef struct heap {
    long fail_at, n, live; /* the call that fails; 0: none */
} heap;

static void *heap_alloc(void *user, size_t size, size_t align)
{
    heap *h = (heap *)user;
    (void)align;
    if (++h->n == h->fail_at)
        return NULL;
    h->live++;
    return malloc(size);
}

static void heap_free(void *user, void *ptr, size_t size)
{
    memset(ptr, 0xDD, size);
    ((heap *)user)->live--;
    free(ptr);
}

TEST(allocations)
{
    parts p = hello_parts();
    p.added = "[" ADDED("265", "<B>", "true", "false") "]";
    p.escaped = true;
    char *json = build(&p), *s = (char *)malloc(100000);
    memset(s, 'a', 100000);
    dsv3__str j, c;
    j.p = json, j.n = strlen(json);
    c.p = "{\"bos_token\":\"<B>\",\"chat_template\":\"x\"}", c.n = strlen(c.p);
    for (int way = 0; way < 2; way++) {
        dsv3_result r = DSV3_ERROR_OUT_OF_MEMORY;
        heap h = {0, 0, 0};
        dsv3_allocator a = {heap_alloc, heap_free, NULL};
        a.user = &h;
        for (h.fail_at = 1; r && h.fail_at < 1000; h.fail_at++) {
            dsv3_tokenizer *t;
            size_t n;
            h.n = 0;
            r = tok_open(&t, &a, 0, j, c);
            if (!r) {
                t->bpe.chain = way == 0;
                r = dsv3_tokenize(t, s, 100000, 0, NULL, 0, &n, &e);
                CHECK_EQ_UINT(n, r ? 0 : 25000);
            }
            CHECK(r == DSV3_OK || r == DSV3_ERROR_OUT_OF_MEMORY);
            dsv3__tok_close(t);
            CHECK_EQ_INT(h.live, 0);
        }
        CHECK(r == DSV3_OK);
        CHECK(h.fail_at > 15);
    }
    /* the limit in bytes: all that lies below what is needed fails as such */
    uint64_t need = 0;
    dsv3_tokenizer *t;
    for (uint64_t limit = 1024; limit < (1u << 22) && !need; limit += limit / 64) {
        dsv3_result r = tok_open(&t, NULL, limit, j, c);
        CHECK(r == DSV3_OK || r == DSV3_ERROR_MEMORY_LIMIT);
        if (!t)
            continue;
        size_t n;
        need = limit;
        CHECK(t->mem.used <= limit);
        CHECK_OK(dsv3_tokenize(t, s, 100, 0, NULL, 0, &n, &e), e);
        CHECK_RESULT(dsv3_tokenize(t, s, 100000, 0, NULL, 0, &n, &e), DSV3_ERROR_MEMORY_LIMIT, e); /* 0.8 MB for a while */
        dsv3__tok_close(t);
    }
    CHECK(need > 0);
    free(json);
    free(s);
}

/* Short texts and those of many words allocate nothing. */
TEST(allocates_nothing_for_text)
{
    parts p = hello_parts();
    heap h = {0, 0, 0};
    dsv3_allocator a = {heap_alloc, heap_free, NULL};
    char *json = build(&p);
    dsv3__str j, c;
    dsv3_tokenizer *t;
    size_t n;
    a.user = &h;
    j.p = json, j.n = strlen(json);
    c.p = NULL, c.n = 0;
    CHECK_OK(tok_open(&t, &a, 0, j, c), e);
    long before = h.n;
    for (int i = 0; i < 1000; i++)
        CHECK_OK(dsv3_tokenize(t, "hello hello worldaaaaaaaaaaaaaaaaaaa", 36, 0, NULL, 0, &n, &e), e);
    CHECK(h.n == before || DSV3__BPE_SMALL < 1000); /* with DSV3_REGRESSION every piece is a long one */
    dsv3__tok_close(t);
    CHECK_EQ_INT(h.live, 0);
    free(json);
}

// ---- Kimi's tiktoken.model ----------------------------------------------------------------------------------

/* Where the pattern cuts; '|' in the expected text. */
TEST(kimi_splits)
{
    static const char *const cases[] = {
        "Hello| world", "camel|Case|HTTPServer", "a|BC", "ABc", "don't| DON'T| it's|x", "we're", "we're| I'LL| I've|n",
        "a| | |1", "a| | b", "123|456|7", "x|\n \n|y", "!\n\n\n|x", " !|x", "\t|!", "a|  \n|  | b", "\xE4\xB8\xAD\xE6\x96\x87|abc",
        "abc|\xE4\xB8\xAD\xE6\x96\x87", "\xE3\x80\x87\xE4\xB8\xAD|1", "1\xE3\x80\x87", "\xE3\x81\x8B\xE3\x81\xAA", "A\xCA\xB0|B", "ABC\xCA\xB0|D",
        "e\xCC\x81t\xCC\x81", "!\xCC\x81" "a", "-a", "--|a", "\xC3\x89t\xC3\xA9", "\xC7\x85o", "is'\xC5\xBF|o", "a|\r\n|b", "\xE2\x80\x8D\xE2\x80\x8D", "x's|'t",
        "  ", "\xFF\xFE|a", "\xFF" "a", "##|x",
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        static dsv3__split split;
        char whole[256], found[256];
        size_t n = 0, at = 0;
        if (!split.kimi)
            dsv3__split_init(&split, true);
        for (const char *c = cases[i]; *c; c++)
            if (*c != '|')
                whole[n++] = *c;
        const uint8_t *p = (const uint8_t *)whole, *end = p + n;
        while (p < end) {
            const uint8_t *e_ = dsv3__split_piece(&split, p, end);
            if (!CHECK(e_ > p && e_ <= end))
                break;
            memcpy(found + at, p, (size_t)(e_ - p));
            at += (size_t)(e_ - p);
            found[at++] = '|';
            p = e_;
        }
        found[at ? at - 1 : 0] = 0;
        CHECK_EQ_STR(found, cases[i]);
    }
}

static size_t base64_line(char *out, const char *bytes, size_t n, unsigned rank)
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t at = 0;
    for (size_t i = 0; i < n; i += 3) {
        uint32_t v = 0;
        for (size_t k = 0; k < 3; k++)
            v = v << 8 | (i + k < n ? (uint8_t)bytes[i + k] : 0u);
        for (size_t k = 0; k < 4; k++)
            out[at++] = i + k <= n ? letters[v >> (18 - 6 * k) & 63] : '=';
    }
    return at + (size_t)sprintf(out + at, " %u\n", rank);
}

/* The bytes in V3's order, then what these merge into. */
static text ranks_text(const char *const *more, size_t n)
{
    text t = {(char *)malloc(20000), 0};
    unsigned rank = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int b = 0; b < 256; b++) {
            char byte = (char)b;
            bool prints = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
            if (prints == (pass == 0))
                t.n += base64_line(t.p + t.n, &byte, 1, rank++);
        }
    for (size_t i = 0; i < n; i++)
        t.n += base64_line(t.p + t.n, more[i], strlen(more[i]), rank++);
    return t;
}

static const char *const some_words[] = {"ab", "bc", "abc", " a", "abcabc", "  ", "    ", "\xE4\xB8", "\xE4\xB8\xAD"};

static dsv3_result open_ranks(dsv3_tokenizer **t, const char *ranks, size_t n, const char *config, const dsv3_allocator *a)
{
    dsv3__tok_files files;
    memset(&files, 0, sizeof files);
    files.ranks.p = ranks, files.ranks.n = n;
    files.config.p = config, files.config.n = config ? strlen(config) : 0;
    dsv3__err_clear(&e);
    return dsv3__tok_open(t, a, 0, &files, &e);
}

#define KIMI_CONFIG                                                                                               \
    "{\"tokenizer_class\": \"TikTokenTokenizer\", \"eos_token\": \"[EOS]\", \"bos_token\": \"[BOS]\", \"added_tokens_decoder\": {"  \
    "\"266\": {\"content\": \"[EOS]\", \"special\": true, \"normalized\": false, \"lstrip\": false}, "                          \
    "\"265\": {\"content\": \"[BOS]\", \"special\": true, \"normalized\": false}}}"

TEST(kimi_ranks)
{
    static const struct {
        const char *text;
        uint32_t flags;
        size_t n;
        int32_t ids[4];
    } cases[] = {
        {"abc", 0, 1, {258}},          {"abcab", 0, 2, {258, 256}},
        {"xbc", 0, 2, {87, 257}},      {"abcabc", 0, 1, {260}},
        {" abc", 0, 2, {220, 258}},    {" a", 0, 1, {259}},
        {"       ", 0, 3, {262, 261, 220}}, {"\xE4\xB8\xAD", 0, 1, {264}},
        {"<|reserved_token_300|>[EOS]", DSV3_TOKENIZE_MARKERS, 2, {300, 266}},
        {"[BOS]a", DSV3_TOKENIZE_MARKERS | DSV3_TOKENIZE_BOS, 2, {265, 64}},
    };
    text ranks = ranks_text(some_words, 9);
    dsv3_tokenizer *t = NULL;
    dsv3_tokenizer_info info;
    for (int config = 1; config >= 0; config--) {
        CHECK_OK(open_ranks(&t, ranks.p, ranks.n - (size_t)config, config ? KIMI_CONFIG : NULL, NULL), e);
        if (!t)
            continue;
        dsv3_tokenizer_info_get(t, &info);
        CHECK_EQ_INT(info.n_tokens, config ? 265 + 256 : 265);
        CHECK_EQ_INT(info.bos, config ? 265 : -1);
        CHECK_EQ_INT(info.eos, config ? 266 : -1);
        CHECK(!info.add_bos && t->bpe.chain);
        for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
            if (config || !cases[i].flags)
                check_ids(t, cases[i].text, cases[i].flags, cases[i].ids, cases[i].n);
        ids r = encode(t, "[EOS]<|reserved_token_300|>", 27, 0);
        for (size_t i = 0; i < r.n; i++)
            CHECK(r.p[i] < 265);
        CHECK(round_trip(t, "[EOS]<|reserved_token_300|>", 27, r));
        free(r.p);
        dsv3_tokenizer_close(t);
    }
    free(ranks.p);
}

TEST(kimi_refused)
{
    static const struct {
        const char *word, *line, *says; /* another token, or another line, behind those that are sound */
    } files[] = {
        {"xyz", NULL, "no two tokens before it merge into token 265"},
        {"ab", NULL, "\"ab\" stands there twice"},
        {"q", NULL, "line 266: expected the 256 bytes first"},
        {NULL, "YWJi 266\n", "line 266: expected the rank 265"},
        {NULL, "YWJi 265x\n", "expected the rank 265"},
        {NULL, "YWJi \n", "expected the rank 265"},
        {NULL, "YWJi 99999999999999999999\n", "expected the rank 265"},
        {NULL, "YW*i 265\n", "line 266: expected 1 to 256 bytes in base64"},
        {NULL, "YWJ 265\n", "in base64"},
        {NULL, "YWJj", "in base64"},
        {NULL, " 265\n", "in base64"},
        {NULL, "\n", "in base64"},
    };
    static const struct {
        const char *config, *says;
    } configs[] = {
        {"{\"tokenizer_class\": \"QWenTokenizer\"}", "TikTokenTokenizer"},
        {"{\"added_tokens_decoder\": {\"264\": {\"content\": \"x\"}}}", "expected ids from 265 to 520, found \"264\""},
        {"{\"added_tokens_decoder\": {\"521\": {\"content\": \"x\"}}}", "found \"521\""},
        {"{\"added_tokens_decoder\": {\"1e3\": {\"content\": \"x\"}}}", "found \"1e3\""},
        {"{\"added_tokens_decoder\": {\"265\": {\"special\": true, \"normalized\": false}}}", "has no content"},
        {"{\"added_tokens_decoder\": {\"265\": {\"content\": \"x\", \"special\": true, \"normalized\": false, \"lstrip\": true}}}",
         "lstrip true is not supported"},
        {"{\"added_tokens_decoder\": {\"265\": {\"content\": \"x\", \"special\": true, \"normalized\": false}, "
         "\"265\": {\"content\": \"y\", \"special\": true, \"normalized\": false}}}", "the id 265 is given twice"},
        {"{\"added_tokens_decoder\": {\"265\": {\"content\": \"x\", \"special\": true, \"normalized\": false}, "
         "\"266\": {\"content\": \"x\", \"special\": true, \"normalized\": false}}}", "stands there twice"},
        {"{\"eos_token\": \"[EOS]\"}", "eos_token \"[EOS]\" is no token"},
    };
    text ranks = ranks_text(some_words, 9);
    dsv3_tokenizer *t;
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        size_t n = ranks.n;
        if (files[i].word)
            n += base64_line(ranks.p + n, files[i].word, strlen(files[i].word), 265);
        else
            n += (size_t)sprintf(ranks.p + n, "%s", files[i].line);
        CHECK_RESULT(open_ranks(&t, ranks.p, n, NULL, NULL), DSV3_ERROR_TOKENIZER, e);
        CHECK_CONTAINS(e.message, files[i].says);
        CHECK(t == NULL);
    }
    for (size_t i = 0; i < sizeof configs / sizeof configs[0]; i++) {
        CHECK_RESULT(open_ranks(&t, ranks.p, ranks.n, configs[i].config, NULL), DSV3_ERROR_TOKENIZER, e);
        CHECK_CONTAINS(e.message, configs[i].says);
    }
    for (size_t n = 1; n < ranks.n; n += n < ranks.n - 200 ? 5 : 1) { /* beginnings of the file */
        char *copy = (char *)malloc(n);
        memcpy(copy, ranks.p, n);
        dsv3_result r = open_ranks(&t, copy, n, NULL, NULL);
        CHECK(r == DSV3_ERROR_TOKENIZER || (r == DSV3_OK && t->n_tokens >= 256));
        dsv3_tokenizer_close(t);
        free(copy);
    }
    free(ranks.p);
}

TEST(kimi_allocations)
{
    text ranks = ranks_text(some_words, 9);
    heap h = {0, 0, 0};
    dsv3_allocator a = {heap_alloc, heap_free, NULL};
    dsv3_result r = DSV3_ERROR_OUT_OF_MEMORY;
    dsv3_tokenizer *t;
    a.user = &h;
    for (h.fail_at = 1; r && h.fail_at < 2000; h.fail_at++) {
        h.n = 0;
        r = open_ranks(&t, ranks.p, ranks.n, KIMI_CONFIG, &a);
        CHECK(r == DSV3_OK || r == DSV3_ERROR_OUT_OF_MEMORY);
        dsv3_tokenizer_close(t);
        CHECK_EQ_INT(h.live, 0);
    }
    CHECK(r == DSV3_OK);
    CHECK(h.fail_at > 15);
    free(ranks.p);
}

TEST(kimi_published)
{
    char folder[1024];
    snprintf(folder, sizeof folder, "%s/tokenizers/kimi-k2", test_shared() ? test_shared() : ".");
    text ranks = read_file(folder, "tiktoken.model"), file = read_file("tests", "tokenizer_kimi.jsonl");
    dsv3_tokenizer *t = NULL;
    if (!ranks.p || !file.p) {
        free(ranks.p);
        free(file.p);
        SKIP("no tokenizers/kimi-k2/tiktoken.model beside the repository");
    }
    CHECK_OK(open_ranks(&t, ranks.p, ranks.n, NULL, NULL), e);
    if (t) {
        CHECK(t->bpe.chain);
        CHECK_EQ_UINT(t->n_tokens, 163584);
        CHECK(golden_file(t, file, false) > 200);
        for (int32_t id = 0; id < (int32_t)t->n_tokens; id += 7) { /* a token alone is itself, as tiktoken defines it */
            size_t n;
            const char *bytes = dsv3_token_bytes(t, id, &n);
            const uint8_t *p = (const uint8_t *)bytes;
            if (dsv3__split_piece(&t->split, p, p + n) != p + n)
                continue;
            ids r = encode(t, bytes, n, 0);
            CHECK(same_ids(r, &id, 1));
            free(r.p);
        }
    }
    dsv3_tokenizer_close(t);
    free(ranks.p);
    free(file.p);
}

TEST_MAIN(RUN(tiny_goldens), RUN(goldens), RUN(goldens_r1), RUN(goldens_long), RUN(text_is_text), RUN(class_counts),
          RUN(classes_of_all_characters), RUN(splitting), RUN(splitting_like_the_patterns), RUN(spellings),
          RUN(merging_with_trained_words), RUN(merging_with_any_words), RUN(any_bytes), RUN(any_bytes_of_long_texts), RUN(long_pieces),
          RUN(detokenizing), RUN(streaming), RUN(tokenizing), RUN(added_tokens), RUN(ignore_merges), RUN(refused_files),
          RUN(every_character_of_the_patterns), RUN(bad_json), RUN(ids_in_any_spelling), RUN(truncated_files), RUN(changed_files),
          RUN(limits), RUN(configuration), RUN(allocations), RUN(allocates_nothing_for_text),
          RUN(kimi_splits), RUN(kimi_ranks), RUN(kimi_refused), RUN(kimi_allocations), RUN(kimi_published))
