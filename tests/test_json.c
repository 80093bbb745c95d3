/* The floor json: what is accepted, what is refused, and at which byte. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"

/* Skips one value and demands the end. The text is copied, so that a sanitizer sees a byte too many. */
static dsv3_result skip(const char *text, size_t len, dsv3_error *e)
{
    dsv3__json j;
    char *copy = (char *)malloc(len ? len : 1);
    if (len)
        memcpy(copy, text, len);
    dsv3__err_clear(e);
    dsv3__json_init(&j, copy, len, "test.json", e);
    dsv3__json_skip(&j);
    dsv3_result r = dsv3__json_end(&j);
    CHECK_EQ_INT(e->code, r);
    if (r) {
        CHECK(e->offset <= len);
        CHECK_CONTAINS(e->message, "test.json");
    }
    free(copy);
    return r;
}

static dsv3_result read_number(const char *text, double *v, int64_t *integer, bool *is_integer)
{
    dsv3_error e;
    dsv3__json j;
    dsv3__err_clear(&e);
    dsv3__json_init(&j, text, strlen(text), "test.json", &e);
    dsv3__json_number(&j, v, integer, is_integer);
    return dsv3__json_end(&j);
}

TEST(accepts)
{
    static const char *const good[] = {
        "{}", "[]", "0", "-0", "10", "1.5", "-1.25e-3", "1E+5", "1e5", "\"\"", "\"a\"", "true", "false", "null", " \t\r\n{ } \t\r\n",
        "[1,2,3]", "[ 1 , [ ] , { } ]", "{\"a\":1}", "{\"a\" : [ { \"b\" : null } , true ] , \"c\" : \"d\" }",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\uD83D\\uDE00\"", "\"\xc3\xa9\xe4\xb8\x80\xf0\x9f\x98\x80\x7f\"",
        "\"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf\"", "1000000000000000019884624838656", "{\"\":{\"\":0}}", "[[[[]]]]",
        /* left standing where nobody reads them: Python writes these */
        "NaN", "[NaN,Infinity,-Infinity]", "{\"x\":-Infinity}", "1e400", "1e-400"};
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        dsv3_error e;
        if (!CHECK_OK(skip(good[i], strlen(good[i]), &e), e))
            printf("    in %s\n", good[i]);
    }
}

TEST(refuses_at_the_byte)
{
    /* `at` is the byte told as `offset`. */
    static const struct {
        const char *text;
        size_t at;
    } bad[] = {{"", 0},           {"   ", 3},         {"{", 1},           {"[", 1},          {"}", 0},         {"]", 0},
               {"{}x", 2},        {"{} {}", 3},       {"1 2", 2},         {"[1 2]", 3},      {"[1,]", 3},      {"[,1]", 1},
               {"[1,,2]", 3},     {"{,}", 1},         {"{\"a\"}", 4},     {"{\"a\" 1}", 5},  {"{\"a\":}", 5},  {"{\"a\":1,}", 7},
               {"{a:1}", 1},      {"{1:1}", 1},       {"{'a':1}", 1},     {"[1}", 2},        {"{\"a\":1]", 6}, {"[}", 1},
               {"tru", 0},        {"True", 0},        {"nul", 0},         {"nullx", 4},      {"truefalse", 4}, {"Nan", 0},
               {"+1", 0},         {".5", 0},          {"// x\n1", 0},     {"\"abc", 4},      {"\"a\nb\"", 2},  {"\"a\tb\"", 2},
               {"\"\x01\"", 1},   {"\"ab\\", 4},      {"\"ab\\\"", 5},    {"\"a\\qb\"", 2},  {"\"a\\x41\"", 2}, {"\"\\u00g0\"", 1},
               {"\"\\u12\"", 6},  {"\"\\\xc3\xa9\"", 1}, {"\"a\xff\"", 2}, {"\"\xc3\"", 1},  {"\"\xc0\xaf\"", 1}, {"\"\x80\"", 1},
               {"\"\xed\xa0\x80\"", 1}, {"\"\xf4\x90\x80\x80\"", 1}, {"\"\xe0\x9f\xbf\"", 1}, {"\"\xf0\x8f\xbf\xbf\"", 1},
               {"\"\xf8\x88\x80\x80\x80\"", 1}, {"\xef\xbb\xbf{}", 0}, {"\xff", 0}};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        dsv3_error e;
        bool ok = CHECK_RESULT(skip(bad[i].text, strlen(bad[i].text), &e), DSV3_ERROR_JSON, e);
        if (!(CHECK_EQ_UINT(e.offset, bad[i].at) && ok))
            printf("    in %s: %s\n", bad[i].text, e.message);
    }
}

TEST(refuses_numbers)
{
    static const char *const bad[] = {"01", "-01", "00", "1.", "1.e5", ".5", "-.5", "1e", "1e+", "1e-", "-", "--1", "+1", "1.5.5", "1e5.5", "0x10", "1_000", "- 1", "-I", "-Inf", "1a", "Infinit", "NaN1"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        dsv3_error e;
        if (!CHECK_RESULT(skip(bad[i], strlen(bad[i]), &e), DSV3_ERROR_JSON, e))
            printf("    in %s\n", bad[i]);
    }
}

/* A NUL byte is no end: it is a byte that stands in no JSON text. */
TEST(refuses_nul)
{
    dsv3_error e;
    CHECK_RESULT(skip("{}\0", 3, &e), DSV3_ERROR_JSON, e);
    CHECK_EQ_UINT(e.offset, 2);
    CHECK_RESULT(skip("\0{}", 3, &e), DSV3_ERROR_JSON, e);
    CHECK_RESULT(skip("[1\0]", 4, &e), DSV3_ERROR_JSON, e);
    CHECK_RESULT(skip("[\0]", 3, &e), DSV3_ERROR_JSON, e);
    CHECK_RESULT(skip("\"a\0b\"", 5, &e), DSV3_ERROR_JSON, e);
    CHECK_RESULT(skip("\"\\\0\"", 4, &e), DSV3_ERROR_JSON, e);
    CHECK_RESULT(skip("{\"a\"\0:1}", 8, &e), DSV3_ERROR_JSON, e);
}

TEST(numbers)
{
    static const struct {
        const char *text;
        double v;
    } cases[] = {{"0", 0}, {"-0", 0}, {"1", 1}, {"-1", -1}, {"40", 40}, {"40.0", 40}, {"10000", 10000}, {"1e-06", 1e-6}, {"1E-6", 1e-6},
                 {"0.00001", 1e-5}, {"1e-05", 1e-5}, {"2.5", 2.5}, {"2.827", 2.827}, {"0.707", 0.707}, {"50000.0", 50000}, {"1e3", 1000},
                 {"123456789012345", 123456789012345.0}, {"9007199254740992", 9007199254740992.0},
                 {"0.1", 0.1}, {"1e22", 1e22}, {"123456789012345e-22", 123456789012345e-22}, {"-12.5e-1", -1.25}, {"0.0000000000", 0},
                 {"0e999999999999999999999", 0}, {"1e-999999999999999999999", 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double v;
        int64_t integer;
        bool is_integer;
        CHECK_EQ_INT(read_number(cases[i].text, &v, &integer, &is_integer), DSV3_OK);
        if (!CHECK(v == cases[i].v))
            printf("    %s: %.17g\n", cases[i].text, v);
    }
}

/* Any decimal is within a few units of the C library's reading, and a short one is exactly it. */
TEST(numbers_against_strtod)
{
    uint64_t state = 5;
    for (int i = 0; i < 20000; i++) {
        char text[64];
        double v, expected;
        int64_t integer;
        bool is_integer;
        int digits = 1 + (int)(dsv3__hash(0, &state, 8) % 17), exponent;
        state++;
        exponent = (int)(dsv3__hash(0, &state, 8) % (i % 2 ? 600 : 20)) - (i % 2 ? 300 : 10);
        uint64_t bits = dsv3__hash(0, &state, 8) >> 11;
        snprintf(text, sizeof text, "%.*e", digits - 1, (double)bits / 9007199254740992.0 * 9 + 1);
        char *e = strchr(text, 'e');
        snprintf(e, 16, "e%d", exponent);
        expected = strtod(text, NULL);
        CHECK_EQ_INT(read_number(text, &v, &integer, &is_integer), DSV3_OK);
        bool exact = digits <= 15 && abs(exponent - (digits - 1)) <= 22;
        if (!CHECK(fabs(v - expected) <= (exact ? 0 : 40 * 2.3e-16 * fabs(expected))))
            printf("    %s: %.17g\n", text, v);
    }
}

TEST(too_large_numbers_are_infinite)
{
    double v;
    int64_t integer;
    bool is_integer;
    static const char *const large[] = {"1e309", "1e400", "1e99999", "17976931348623159e292", "123456789e301", "1e1000000000000"};
    for (size_t i = 0; i < sizeof large / sizeof large[0]; i++) {
        CHECK_EQ_INT(read_number(large[i], &v, &integer, &is_integer), DSV3_OK);
        if (!CHECK(v > 1.7976931348623157e308 && !is_integer))
            printf("    %s: %.17g\n", large[i], v);
    }
    char longest[5002]; /* 5000 digits */
    memset(longest, '9', 5000);
    longest[5000] = 0;
    CHECK_EQ_INT(read_number(longest, &v, &integer, &is_integer), DSV3_OK);
    CHECK(v > 1.7976931348623157e308 && !is_integer);
}

/* Digits beyond the precision are left out, not mixed in. */
TEST(many_digits)
{
    double v;
    int64_t integer;
    bool is_integer;
    CHECK_EQ_INT(read_number("0.10000000000000000555111512312578270211815834045410156250", &v, &integer, &is_integer), DSV3_OK);
    CHECK_NEAR(v, 0.1, 1e-16);
    CHECK_EQ_INT(read_number("3.1415926535897932384626433832795028841971693993751058", &v, &integer, &is_integer), DSV3_OK);
    CHECK_NEAR(v, 3.141592653589793, 1e-15);
    CHECK_EQ_INT(read_number("92233720368547758079999999999", &v, &integer, &is_integer), DSV3_OK);
    CHECK_NEAR(v, 92233720368547758079999999999.0, 1e14);
    CHECK_EQ_INT(read_number("9223372036854775808111.5e-3", &v, &integer, &is_integer), DSV3_OK);
    CHECK_NEAR(v, 9223372036854775808.1115, 4096);
}

TEST(integers)
{
    static const struct {
        const char *text;
        int64_t integer;
        bool is_integer;
    } cases[] = {{"0", 0, true}, {"-0", 0, true}, {"129280", 129280, true}, {"-5", -5, true}, {"999999999999999999", 999999999999999999, true},
                 {"9223372036854775807", INT64_MAX, true}, {"-9223372036854775807", -INT64_MAX, true}, {"9223372036854775808", 0, false},
                 {"18446744073709551615", 0, false}, {"1.0", 0, false}, {"1e3", 0, false}, {"1000000000000000019884624838656", 0, false}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double v;
        int64_t integer;
        bool is_integer;
        CHECK_EQ_INT(read_number(cases[i].text, &v, &integer, &is_integer), DSV3_OK);
        CHECK_EQ_INT(is_integer, cases[i].is_integer);
        CHECK_EQ_INT(integer, cases[i].integer);
    }
}

TEST(unsigned_integers)
{
    static const struct {
        const char *text;
        uint64_t v;
        bool ok;
    } cases[] = {{"0", 0, true}, {"-0", 0, true}, {"4096.0", 4096, true}, {"1e3", 1000, true}, {"4294967296", 4294967296u, true},
                 {"9007199254740993", 9007199254740993u, true}, {"9223372036854775807", INT64_MAX, true}, {"1.5", 0, false}, {"-1", 0, false},
                 {"-1.0", 0, false}, {"1e300", 0, false}, {"1e400", 0, false}, {"18446744073709551616", 0, false}, {"NaN", 0, false},
                 {"Infinity", 0, false}, {"-Infinity", 0, false}, {"\"5\"", 0, false}, {"null", 0, false}, {"[]", 0, false}, {"true", 0, false}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dsv3_error e;
        dsv3__json j;
        uint64_t v = 99;
        dsv3__err_clear(&e);
        dsv3__json_init(&j, cases[i].text, strlen(cases[i].text), "test.json", &e);
        bool ok = dsv3__json_uint(&j, &v);
        if (!(CHECK_EQ_INT(ok, cases[i].ok) && CHECK_EQ_UINT(ok ? v : 0, cases[i].v)))
            printf("    in %s\n", cases[i].text);
        CHECK_EQ_INT(dsv3__json_end(&j), cases[i].ok ? DSV3_OK : DSV3_ERROR_JSON);
    }
}

TEST(strings)
{
    static const struct {
        const char *text, *decoded; /* NULL: no text at all */
        bool escaped;
    } cases[] = {{"\"\"", "", false},
                 {"\"abc\"", "abc", false},
                 {"\"\xc3\xa9\"", "\xc3\xa9", false},
                 {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\/\b\f\n\r\t", true},
                 {"\"\\u0041\\u00e9\\u4E00\\uffff\"", "A\xc3\xa9\xe4\xb8\x80\xef\xbf\xbf", true},
                 {"\"<\\uff5cend\\u2581\"", "<\xef\xbd\x9c" "end\xe2\x96\x81", true},
                 {"\"\\ud83d\\ude00\\uDBFF\\uDFFF\"", "\xf0\x9f\x98\x80\xf4\x8f\xbf\xbf", true},
                 {"\"\\ud83d\"", NULL, true},
                 {"\"\\ude00\"", NULL, true},
                 {"\"\\ud83dx\"", NULL, true},
                 {"\"\\ud83d\\u0041\"", NULL, true},
                 {"\"\\ud83d\\ud83d\\ude00\"", NULL, true},
                 {"\"\\ude00\\ud83d\"", NULL, true},
                 {"\"\\ud83d\\n\"", NULL, true}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dsv3_error e;
        dsv3__json j;
        dsv3__json_str s;
        size_t n = 0;
        dsv3__err_clear(&e);
        dsv3__json_init(&j, cases[i].text, strlen(cases[i].text), "test.json", &e);
        REQUIRE(CHECK(dsv3__json_string(&j, &s)));
        CHECK_OK(dsv3__json_end(&j), e);
        CHECK_EQ_INT(s.escaped, cases[i].escaped);
        CHECK_EQ_UINT(s.n, strlen(cases[i].text) - 2);
        char *out = (char *)malloc(s.n ? s.n : 1); /* never longer than the source */
        bool ok = dsv3__json_decode(s, out, &n);
        CHECK_EQ_INT(ok, cases[i].decoded != NULL);
        if (ok && cases[i].decoded) {
            CHECK_BYTES(out, n, cases[i].decoded, strlen(cases[i].decoded));
            CHECK(dsv3__json_is(s, cases[i].decoded));
            CHECK(!dsv3__json_is(s, "something else"));
        }
        free(out);
    }
}

/* Every code point, raw and as an escape. */
TEST(code_points)
{
    for (uint32_t c = 1; c <= 0x10FFFF; c += c < 0x1000 ? 1 : 61) {
        char raw[8], text[24], escape[16];
        dsv3_error e;
        dsv3__json j;
        dsv3__json_str s;
        if (c >= 0xD800 && c <= 0xDFFF)
            continue;
        size_t n = dsv3__utf8_put(raw, c), m;
        CHECK_EQ_UINT(dsv3__utf8_length(raw, raw + n), n);
        for (size_t k = 0; k < n; k++)
            CHECK_EQ_UINT(dsv3__utf8_length(raw, raw + k), 0);
        if (c < 0x10000)
            snprintf(text, sizeof text, "\"\\u%04X\"", (unsigned)c);
        else
            snprintf(text, sizeof text, "\"\\u%04x\\u%04x\"", (unsigned)(0xD800 + ((c - 0x10000) >> 10)), (unsigned)(0xDC00 + ((c - 0x10000) & 0x3FF)));
        dsv3__json_init(&j, text, strlen(text), "test.json", &e);
        if (!CHECK(dsv3__json_string(&j, &s) && dsv3__json_decode(s, escape, &m)))
            continue;
        CHECK_BYTES(escape, m, raw, n);
    }
}

/* Which first, second, third and fourth bytes make a character: counted against the definition (Unicode, table 3-7). */
TEST(utf8_well_formed)
{
    unsigned counts[5] = {0, 0, 0, 0, 0};
    for (unsigned a = 0; a < 256; a++)
        for (unsigned b = 0; b < 256; b++) {
            char p[4];
            p[0] = (char)a, p[1] = (char)b, p[2] = (char)0x80, p[3] = (char)0xBF;
            counts[dsv3__utf8_length(p, p + 4)]++;
        }
    CHECK_EQ_UINT(counts[1], 128 * 256);
    CHECK_EQ_UINT(counts[2], 30 * 64);
    CHECK_EQ_UINT(counts[3], 32 + 14 * 64 + 32);
    CHECK_EQ_UINT(counts[4], 48 + 3 * 64 + 16);
    CHECK_EQ_UINT(dsv3__utf8_length("", ""), 0);
}

TEST(names_with_escapes)
{
    dsv3_error e;
    dsv3__json j;
    dsv3__json_str s;
    char text[2000], name[256];
    CHECK(dsv3__utf8_put(name, 'v') == 1);
    strcpy(text, "\"voc\\u0061b_si\\u007ae\"");
    dsv3__json_init(&j, text, strlen(text), "test.json", &e);
    CHECK(dsv3__json_string(&j, &s) && dsv3__json_is(s, "vocab_size") && !dsv3__json_is(s, "vocab_siz") && !dsv3__json_is(s, "vocab_sizes"));
    for (size_t n = 1; n <= 255; n += 127) { /* all of it written as escapes */
        size_t at = 0;
        text[at++] = '"';
        for (size_t i = 0; i < n; i++) {
            name[i] = (char)('a' + i % 26);
            snprintf(text + at, 7, "\\u%04x", (unsigned)name[i]);
            at += 6;
        }
        name[n] = 0;
        text[at++] = '"';
        dsv3__json_init(&j, text, at, "test.json", &e);
        CHECK(dsv3__json_string(&j, &s) && dsv3__json_is(s, name));
        name[n - 1] = '!';
        CHECK(!dsv3__json_is(s, name));
    }
}

TEST(copies)
{
    static const struct {
        const char *text;
        const char *copy; /* into 8 bytes; NULL: refused */
    } cases[] = {{"\"silu\"", "silu"},         {"\"1234567\"", "1234567"}, {"\"12345678\"", NULL},   {"\"a\\nb\"", "a\nb"},
                 {"\"a\\u0000b\"", NULL},      {"\"\\ud800\"", NULL},      {"12", NULL},             {"\"\"", ""},
                 {"\"\xc3\xa9\"", "\xc3\xa9"}, {"null", NULL},             {"\"\\u0041\"", "A"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dsv3_error e;
        dsv3__json j;
        char out[8] = "#######";
        dsv3__err_clear(&e);
        dsv3__json_init(&j, cases[i].text, strlen(cases[i].text), "test.json", &e);
        bool ok = dsv3__json_copy(&j, out, sizeof out);
        if (!CHECK_EQ_INT(ok, cases[i].copy != NULL))
            printf("    in %s\n", cases[i].text);
        CHECK_EQ_STR(out, cases[i].copy ? cases[i].copy : "");
        CHECK_EQ_INT(dsv3__json_end(&j), ok ? DSV3_OK : DSV3_ERROR_JSON);
    }
}

TEST(walks_objects_and_arrays)
{
    static const char text[] = " {\"a\": [1, 2, 3], \"b\": {\"c\": true, \"d\": null}, \"e\": [], \"f\": {}, \"g\": \"x\"} ";
    dsv3_error e;
    dsv3__json j;
    dsv3__json_str key;
    char keys[32] = "";
    uint64_t sum = 0, v;
    bool truth = false, null_seen = false;
    dsv3__err_clear(&e);
    dsv3__json_init(&j, text, sizeof text - 1, "test.json", &e);
    CHECK_EQ_INT(dsv3__json_peek(&j), '{');
    REQUIRE(CHECK(dsv3__json_open(&j, '{')));
    while (dsv3__json_key(&j, &key)) {
        strncat(keys, key.p, key.n);
        if (dsv3__json_is(key, "a")) {
            for (dsv3__json_open(&j, '['); dsv3__json_item(&j); sum += v)
                dsv3__json_uint(&j, &v);
        } else if (dsv3__json_is(key, "b")) {
            dsv3__json_open(&j, '{');
            while (dsv3__json_key(&j, &key)) {
                strncat(keys, key.p, key.n);
                if (dsv3__json_is(key, "c"))
                    dsv3__json_bool(&j, &truth);
                else
                    null_seen = dsv3__json_null(&j);
            }
        } else if (dsv3__json_is(key, "e")) {
            dsv3__json_open(&j, '[');
            CHECK(!dsv3__json_item(&j));
        } else {
            CHECK(!dsv3__json_null(&j)); /* takes nothing that is no null */
            dsv3__json_skip(&j);
        }
    }
    CHECK_OK(dsv3__json_end(&j), e);
    CHECK_EQ_STR(keys, "abcdefg");
    CHECK_EQ_UINT(sum, 6);
    CHECK(truth && null_seen);
}

/* After an error every call says no, nothing loops, and the first error stays. */
TEST(errors_stick)
{
    static const char text[] = "{\"a\": tru, \"b\": 1}";
    dsv3_error e;
    dsv3__json j;
    dsv3__json_str s;
    double d;
    int64_t i;
    uint64_t u;
    bool b;
    char out[8];
    dsv3__err_clear(&e);
    dsv3__json_init(&j, text, sizeof text - 1, "test.json", &e);
    CHECK(dsv3__json_open(&j, '{') && dsv3__json_key(&j, &s) && !dsv3__json_bool(&j, &b));
    CHECK_EQ_UINT(e.offset, 6);
    for (int round = 0; round < 2; round++) {
        CHECK(!dsv3__json_key(&j, &s) && !dsv3__json_item(&j) && !dsv3__json_open(&j, '{') && !dsv3__json_open(&j, '['));
        CHECK(!dsv3__json_skip(&j) && !dsv3__json_string(&j, &s) && !dsv3__json_number(&j, &d, &i, &b) && !dsv3__json_uint(&j, &u));
        CHECK(!dsv3__json_bool(&j, &b) && !dsv3__json_null(&j) && !dsv3__json_copy(&j, out, sizeof out) && dsv3__json_peek(&j) == 0);
    }
    CHECK_RESULT(dsv3__json_end(&j), DSV3_ERROR_JSON, e);
    CHECK_EQ_UINT(e.offset, 6);
    CHECK_CONTAINS(e.message, "byte 6");
}

/* An error of meaning, found by who reads, sticks as well; a syntax error that came first wins. */
TEST(errors_of_meaning)
{
    dsv3_error e;
    dsv3__json j;
    dsv3__err_clear(&e);
    dsv3__json_init(&j, "[1, 2]", 6, "test.json", &e);
    dsv3__json_open(&j, '[');
    CHECK_EQ_INT(DSV3__JSON_FAIL(&j, DSV3_ERROR_SAFETENSORS, "%s: too short", "here"), DSV3_ERROR_SAFETENSORS);
    CHECK(!dsv3__json_item(&j));
    CHECK_RESULT(dsv3__json_end(&j), DSV3_ERROR_SAFETENSORS, e);
    CHECK_EQ_STR(e.message, "here: too short");
    dsv3__json_init(&j, "x", 1, "test.json", &e);
    dsv3__json_open(&j, '[');
    CHECK_EQ_INT(DSV3__JSON_FAIL(&j, DSV3_ERROR_SAFETENSORS, "late"), DSV3_ERROR_JSON);
}

TEST(depth)
{
    char text[2000];
    dsv3_error e;
    for (int kind = 0; kind < 2; kind++)
        for (size_t depth = 60; depth <= 70; depth++) {
            size_t at = 0;
            for (size_t i = 0; i < depth; i++) {
                memcpy(text + at, kind ? "{\"a\":" : "[", kind ? 5 : 1);
                at += kind ? 5 : 1;
            }
            text[at++] = '7';
            for (size_t i = 0; i < depth; i++)
                text[at++] = kind ? '}' : ']';
            dsv3_result r = skip(text, at, &e);
            CHECK_EQ_INT(r, depth <= 64 ? DSV3_OK : DSV3_ERROR_JSON);
            if (r)
                CHECK_EQ_UINT(e.offset, kind ? 64 * 5 : 64);
        }
    char *deep = (char *)malloc(1000000); /* no recursion: the stack does not know */
    memset(deep, '[', 1000000);
    CHECK_RESULT(skip(deep, 1000000, &e), DSV3_ERROR_JSON, e);
    CHECK_CONTAINS(e.message, "64");
    free(deep);
}

static const char document[] =
    "{ \"a\\u00e9\": [1, -2.5e+3, {\"x\": \"\\ud83d\\ude00 \xe4\xb8\x80\", \"y\": [true, false, null]}], \"rope\": {\"factor\": 40.0}, \"z\": \"\\\\\\\"\" }";

TEST(every_prefix_is_refused)
{
    dsv3_error e;
    size_t n = sizeof document - 1;
    CHECK_OK(skip(document, n, &e), e);
    for (size_t k = 0; k < n; k++) {
        dsv3_result r = skip(document, k, &e);
        if (!CHECK_EQ_INT(r, DSV3_ERROR_JSON))
            printf("    %lu bytes\n", (unsigned long)k);
    }
}

/* Every byte of it changed to everything: no crash, an offset inside, and what passes once passes twice. */
TEST(every_byte_changed)
{
    size_t n = sizeof document - 1, passed = 0;
    char text[sizeof document];
    for (size_t k = 0; k < n; k++)
        for (unsigned c = 0; c < 256; c++) {
            dsv3_error e;
            memcpy(text, document, n);
            text[k] = (char)c;
            passed += skip(text, n, &e) == DSV3_OK;
        }
    CHECK(passed > n && passed < n * 256 / 2); /* letters in strings, digits: yes; the rest: no */
}

TEST_MAIN(RUN(accepts), RUN(refuses_at_the_byte), RUN(refuses_numbers), RUN(refuses_nul), RUN(numbers), RUN(numbers_against_strtod),
          RUN(too_large_numbers_are_infinite), RUN(many_digits), RUN(integers), RUN(unsigned_integers), RUN(strings), RUN(code_points),
          RUN(utf8_well_formed), RUN(names_with_escapes), RUN(copies), RUN(walks_objects_and_arrays), RUN(errors_stick),
          RUN(errors_of_meaning), RUN(depth), RUN(every_prefix_is_refused), RUN(every_byte_changed))
