/* The floor gram: schemas to masks. Texts that fit and that do not; masks beside every token tried one by one; walks that
   never get stuck; what is refused, and how; limits; sampling and generation under masks. Semantics of JSON Schema are
   compared with the public test suite and another validator in tests/oracle/schema.py. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#ifndef DSV3_NO_TOKENIZER
#include "grammar.h"

static dsv3_error e;

static dsv3_grammar *open_schema(const char *schema, dsv3_spacing spacing)
{
    dsv3_grammar *g = NULL;
    dsv3_grammar_opts o;
    memset(&o, 0, sizeof o);
    o.spacing = spacing;
    if (!CHECK_OK(dsv3_grammar_open(&g, grammar_tokenizer(), schema, strlen(schema), &o, &e), e))
        printf("    %s\n", schema);
    return g;
}

static bool fits(const dsv3_grammar *g, const char *text)
{
    dsv3_grammar_state s;
    dsv3_grammar_start(g, &s);
    return dsv3_grammar_accept_text(g, &s, text, strlen(text)) && dsv3_grammar_can_end(g, &s);
}

/* ---- Texts ---- */

#define MAX_TEXTS 12

static const struct {
    const char *schema;
    const char *good[MAX_TEXTS], *bad[MAX_TEXTS];
} cases[] = {
    {"true",
     {"1", "-0.5e3", "\"\"", "[]", "{}", "[1, \"a\",null]", "{\"a\": {\"a\":[{}]}}", "\"\\n\\u001f\\\"\\\\\"",
      "\"\xC3\xA9\""},
     {"", "01", "1.", "tru", "[1,]", "{\"a\":1,}", "{\"a\":1,\"a\":2}", "\"\xC3\"", "\"\\u0041\"", "\"\\/\"", "[1 ]",
      "\"\n\""}},
    {"{\"type\": \"integer\", \"minimum\": -12, \"exclusiveMaximum\": 105}",
     {"0", "-0", "-12", "104", "99", "-1"},
     {"-13", "105", "1000", "1.0", "1e1", "007", "-", "\"1\""}},
    {"{\"type\": \"number\", \"minimum\": 0.25, \"maximum\": 1e1}",
     {"0.25", "0.250", "10", "10.0", "9.99999", "1", "0.3"},
     {"0.2499", "10.0001", "11", "-1", "0", "0.2", "1e0"}},
    {"{\"type\": \"number\", \"exclusiveMaximum\": 3}",
     {"2.99999999999999", "-3", "0", "-1000.5"},
     {"3", "3.0", "2.9999999999999999999"}},
    {"{\"minimum\": -0.5, \"maximum\": 0.05, \"type\": \"number\"}",
     {"-0.5", "0.05", "0", "-0.49999", "0.0499"},
     {"-0.51", "0.051", "0.1", "-1"}},
    {"{\"type\": \"integer\", \"multipleOf\": 12, \"allOf\": [{\"multipleOf\": 8}]}",
     {"0", "24", "-48", "240"},
     {"12", "8", "25", "1"}},
    {"{\"enum\": [\"a\\n\", 1.50, null, [1, {\"k\": true}], -0.0, 2e0]}",
     {"\"a\\n\"", "1.5", "null", "[1, {\"k\": true}]", "0", "2"},
     {"\"a\"", "1.50", "false", "[1]", "[1, {}]", "\"a\\n\\n\""}},
    {"{\"type\": \"string\", \"minLength\": 1, \"maxLength\": 3}",
     {"\"a\"", "\"\xC3\xA9\xF0\x9F\x98\x80z\"", "\"\\n\\n\\n\""},
     {"\"\"", "\"abcd\"", "\"\\n\\n\\n\\n\""}},
    {"{\"type\": \"string\", \"pattern\": \"^(ab|c+)?[^a-y]{2,3}$\"}",
     {"\"zz\"", "\"abzz\"", "\"cccZZZ\"", "\"\xC3\xA9\xE4\xB8\x80\"", "\"\\\"\\\\\""},
     {"\"abab\"", "\"ab\"", "\"zzzz\"", "\"a\""}},
    {"{\"type\": \"string\", \"pattern\": \"\\\\d\\\\.\\\\w*?x\"}", {"\"1.x\"", "\"ab7._xyz\""}, {"\"1x\"", "\"1.\""}},
    {"{\"type\": \"string\", \"pattern\": \"^a|b$\"}", {"\"a\"", "\"axx\"", "\"xxb\""}, {"\"xax\"", "\"bx\""}},
    {"{\"type\": \"string\", \"pattern\": \"^[\\\\u00e9-\\\\u4e00]+$\", \"maxLength\": 2}",
     {"\"\xC3\xA9\"", "\"\xE4\xB8\x80\xDF\xBF\"", "\"\xC4\x80\xE0\xA0\x80\""},
     {"\"\xC3\xA8\"", "\"\xE4\xB8\x81\"", "\"\xC3\xA9\xC3\xA9\xC3\xA9\"", "\"\""}},
    {"{\"type\": \"string\", \"pattern\": \"^(?:a{2}){1,2}$\", \"allOf\": [{\"pattern\": \"^.{0,3}$\"}]}",
     {"\"aa\""},
     {"\"aaaa\"", "\"a\""}},
    {"{\"type\": \"object\", \"properties\": {\"b\": {\"type\": \"integer\"}, \"a\": {\"type\": \"string\"}}, "
     "\"required\": [\"b\"],"
     "\"additionalProperties\": false}",
     {"{\"b\":1}", "{\"a\":\"\",\"b\":1}", "{\"b\":1, \"a\":\"x\"}"},
     {"{}", "{\"a\":\"\"}", "{\"b\":1,\"b\":1}", "{\"b\":1,\"c\":1}", "{\"b\":\"\"}", "[]"}},
    {"{\"type\": \"object\", \"properties\": {\"\\\"q\": true, \"A\": {\"const\": 1}, \"\\\\\": true, \"\\n\": true},"
     "\"additionalProperties\": false, \"minProperties\": 2, \"maxProperties\": 3}",
     {"{\"\\\"q\":1,\"\\\\\":2}", "{\"\\n\":1,\"A\":1,\"\\\\\":1}"},
     {"{\"A\":1}", "{\"A\":1,\"\\n\":1,\"\\\\\":1,\"\\\"q\":1}", "{\"A\":2,\"\\n\":1}", "{\"\\n\":1,\"\\n\":1}"}},
    {"{\"type\": \"object\", \"patternProperties\": {\"^n_\": {\"type\": \"integer\"}}, \"additionalProperties\": "
     "{\"type\": \"string\"}}",
     {"{\"n_\":1}", "{\"n_x\":1,\"n\":\"\"}"},
     {"{\"n_\":\"\"}", "{\"x\":1}", "{\"n_x\":1,\"n_x\":2}"}},
    {"{\"type\": \"object\", \"propertyNames\": {\"enum\": [\"x\", \"yy\"]}, \"additionalProperties\": {\"type\": "
     "\"null\"}}",
     {"{}", "{\"yy\":null,\"x\":null}"},
     {"{\"y\":null}", "{\"x\":1}", "{\"x\":null,\"x\":null}"}},
    {"{\"type\": \"object\", \"propertyNames\": {\"minLength\": 2, \"maxLength\": 3, \"pattern\": \"^[a-x]\"}, "
     "\"properties\": {\"abcd\": true}, \"additionalProperties\": {\"type\": \"integer\"}}",
     {"{}", "{\"ab\":1,\"ab\xC3\xA9\":2}"},
     {"{\"a\":1}", "{\"abcd\":1}", "{\"zz\":1}", "{\"ab\":null}", "{\"ab\":1,\"ab\":1}"}},
    {"{\"type\": \"object\", \"patternProperties\": {\"^[ab]$\": {}, \"^c\\n?d$\": {\"type\": \"null\"}}, "
     "\"additionalProperties\": "
     "false}",
     {"{}", "{\"b\":0,\"cd\":null,\"a\":{\"a\":1,\"z\":2},\"c\\nd\":null}"},
     {"{\"a\":1,\"a\":2}", "{\"b\":0,\"cd\":null,\"a\":0,\"c\\nd\":null,\"", "{\"cd\":null,\"c\\nd\":null,\"cd",
      "{\"ab\":1}", "{\"cd\":1}"}},
    {"{\"type\": \"object\", \"propertyNames\": {\"maxLength\": 0}, \"minProperties\": 1, \"additionalProperties\": "
     "{\"type\": "
     "\"null\"}}",
     {"{\"\":null}"},
     {"{}", "{\"\":null,", "{\"a\":null}"}},
    {"{\"dependentRequired\": {\"a\": [\"b\", \"c\"], \"b\": []}}",
     {"{}", "{\"b\":1}", "{\"a\":1,\"c\":2,\"b\":3}", "{\"c\":0,\"b\":0}", "[1]", "\"a\"", "{\"d\":{\"a\":1}}"},
     {"{\"a\":1}", "{\"a\":1,\"b\":1}", "{\"c\":1,\"a\":1}"}},
    {"{\"type\": [\"object\", \"null\"], \"properties\": {\"kind\": {\"enum\": [1, 2]}}, \"dependentSchemas\": {\"x\": "
     "{\"properties\": {\"kind\": {\"const\": 1}, \"x\": {\"type\": \"null\"}}, \"required\": [\"kind\"]}, \"y\": "
     "false}}",
     {"null", "{}", "{\"kind\":2}", "{\"x\":null,\"kind\":1}", "{\"kind\":1,\"x\":null}", "{\"z\":{\"y\":1}}"},
     {"{\"x\":null}", "{\"kind\":2,\"x\":null}", "{\"x\":null,\"kind\":2}", "{\"x\":1,\"kind\":1}", "{\"y\":1}"}},
    {"{\"anyOf\": [{\"type\": \"array\", \"prefixItems\": [{\"type\": \"null\"}], \"unevaluatedItems\": {\"type\": "
     "\"integer\"}}, "
     "{\"type\": \"object\", \"properties\": {\"a\": {}}, \"patternProperties\": {\"^_\": {}}, "
     "\"unevaluatedProperties\": false}]}",
     {"[]", "[null]", "[null,1,2]", "{\"a\":1}", "{\"_\":1,\"a\":2}"},
     {"[1]", "[null,null]", "{\"b\":1}", "1"}},
    {"{\"type\": \"object\", \"additionalProperties\": true, \"unevaluatedProperties\": false, \"allOf\": "
     "[{\"unevaluatedItems\": true, "
     "\"required\": [\"k\"]}]}",
     {"{\"k\":1}"},
     {"{}", "{\"l\":1}"}},
    {"{\"type\": \"array\", \"prefixItems\": [{\"type\": \"string\"}], \"items\": {\"type\": \"integer\"}, "
     "\"minItems\": 2, \"maxItems\": 3}",
     {"[\"\",1]", "[\"a\", 1, 2]"},
     {"[]", "[\"\"]", "[1,1]", "[\"\",\"\"]", "[\"\",1,2,3]"}},
    {"{\"items\": {\"type\": \"integer\"}, \"type\": \"array\", \"prefixItems\": [true, false, true]}",
     {"[]", "[1]", "[{}]"},
     {"[1,1]", "[1,"}},
    {"{\"anyOf\": [{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"integer\"}}, \"required\": [\"a\"]},"
     "{\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"string\"}, \"b\": {\"const\": 1}}, \"required\": "
     "[\"b\"]}]}",
     {"{\"a\":1}", "{\"a\":\"\",\"b\":1}", "{\"b\":1}", "{\"a\":1,\"b\":2}", "{\"b\":2,\"a\":1}"},
     {"{\"a\":\"\"}", "{\"a\":\"\",\"b\":2}", "{}", "{\"b\":2}"}},
    {"{\"oneOf\": [{\"type\": \"object\", \"properties\": {\"k\": {\"const\": \"x\"}, \"v\": {\"type\": \"integer\"}}, "
     "\"required\": [\"k\", \"v\"]},"
     "{\"type\": \"object\", \"properties\": {\"k\": {\"const\": \"xy\"}, \"v\": {\"type\": \"null\"}}, \"required\": "
     "[\"k\", \"v\"]}]}",
     {"{\"k\":\"x\",\"v\":1}", "{\"v\":null,\"k\":\"xy\"}"},
     {"{\"k\":\"x\",\"v\":null}", "{\"v\":1,\"k\":\"xy\"}", "{\"k\":\"x\"}"}},
    {"{\"$defs\": {\"n\": {\"type\": \"object\", \"properties\": {\"v\": {\"type\": \"integer\"}, \"next\": "
     "{\"anyOf\": [{\"$ref\": \"#/$defs/n\"},"
     "{\"type\": \"null\"}]}}, \"required\": [\"v\", \"next\"], \"additionalProperties\": false}}, \"$ref\": "
     "\"#/$defs/n\"}",
     {"{\"v\":1,\"next\":null}", "{\"next\":{\"next\":null,\"v\":1},\"v\":0}"},
     {"{\"v\":1}", "{\"v\":1,\"next\":{}}", "null"}},
    {"{\"$id\": \"http://x.org/a/b.json\", \"properties\": {\"p\": {\"$ref\": \"c.json#/$defs/d\"}}, \"type\": "
     "\"object\", \"$defs\": {\"c\": {\"$id\": "
     "\"/a/c.json\", \"$defs\": {\"d\": {\"$anchor\": \"here\", \"type\": \"null\"}}}}}",
     {"{\"p\":null}"},
     {"{\"p\":1}"}},
    {"{\"if\": {\"$id\": \"x:y\", \"const\": 1}, \"anyOf\": [{\"then\": false, \"else\": false, \"type\": \"null\"}, "
     "{\"$ref\": "
     "\"x:y\"}], \"minContains\": 3, \"maxContains\": 0}",
     {"1", "null"},
     {"2", "[]", "true"}},
    {"{\"type\": [\"string\", \"null\"], \"allOf\": [{\"anyOf\": [{\"const\": \"a\"}, {\"type\": \"null\"}, {\"enum\": "
     "[1, \"b\"]}]}]}",
     {"\"a\"", "\"b\"", "null"},
     {"1", "\"c\"", "\"ab\""}},
};

TEST(texts)
{
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        dsv3_grammar *g = open_schema(cases[i].schema, DSV3_SPACING_ONE);
        REQUIRE(g);
        for (size_t k = 0; k < MAX_TEXTS && cases[i].good[k]; k++)
            if (!CHECK(fits(g, cases[i].good[k])))
                printf("    %s: %s\n", cases[i].schema, cases[i].good[k]);
        for (size_t k = 0; k < MAX_TEXTS && cases[i].bad[k]; k++)
            if (!CHECK(!fits(g, cases[i].bad[k])))
                printf("    %s: %s\n", cases[i].schema, cases[i].bad[k]);
        dsv3_grammar_close(g);
    }
}

TEST(spacing)
{
    static const char *const texts[] = {"{\"a\":[1,2]}", "{\"a\": [1, 2]}", "{\n  \"a\": [\n    1,\n    2\n  ]\n}",
                                        " {\"a\":[ ]}", "{\"a\":[1] }"};
    static const bool good[3][5] = {
        {true, true, false, false, false}, {true, false, false, false, false}, {true, true, true, true, true}};
    for (int spacing = 0; spacing < 3; spacing++) {
        dsv3_grammar *g = open_schema("true", (dsv3_spacing)spacing);
        REQUIRE(g);
        for (int i = 0; i < 5; i++)
            CHECK_EQ_INT(fits(g, texts[i]), good[spacing][i]);
        CHECK(!fits(g, "{} ") && !fits(g, "\"a\" "));
        dsv3_grammar_state s;
        dsv3_grammar_start(g, &s);
        int n = 0;
        while (n < 1000 && dsv3_grammar_accept_text(g, &s, " ", 1))
            n++;
        CHECK_EQ_INT(n, spacing == DSV3_SPACING_ANY ? 64 : 0);
        dsv3_grammar_close(g);
    }
}

/* ---- Masks ---- */

/* Walks at random, `n` tokens or to the end; at each step the mask is what trying every token gives, and not empty. */
static void walk(const dsv3_grammar *g, uint64_t seed, int n, const char *schema)
{
    static char text[1 << 14];
    size_t len = 0;
    uint32_t mask[GRAMMAR_MASK], brute[GRAMMAR_MASK], kept_mask[GRAMMAR_MASK];
    dsv3_grammar_state s, kept;
    dsv3_grammar_start(g, &s);
    kept = s;
    dsv3_grammar_mask(g, &kept, kept_mask);
    for (int i = 0; i < n; i++) {
        int32_t options[GRAMMAR_EOS + 3];
        uint32_t n_options = 0;
        dsv3_grammar_mask(g, &s, mask);
        grammar_brute(g, &s, brute);
        for (int32_t t = 0; t < GRAMMAR_EOS + 3; t++) {
            if (grammar_bit(mask, t) != grammar_bit(brute, t)) {
                CHECK(grammar_bit(mask, t) == grammar_bit(brute, t));
                printf("    %s behind %.*s: token %d\n", schema, (int)len, text, (int)t);
                return;
            }
            if (grammar_bit(mask, t) && (t >= 256 || grammar_random(&seed, 4) == 0 || n_options == 0))
                options[n_options++] = t;
        }
        CHECK_EQ_INT(grammar_bit(mask, GRAMMAR_EOS), dsv3_grammar_can_end(g, &s));
        if (!CHECK(n_options > 0)) {
            printf("    %s is stuck behind %.*s\n", schema, (int)len, text);
            return;
        }
        int32_t token = options[grammar_random(&seed, n_options)];
        CHECK(dsv3_grammar_accept(g, &s, token));
        if (token == GRAMMAR_EOS) {
            dsv3__json j;
            dsv3__err_clear(&e);
            dsv3__json_init(&j, text, len, "text", &e);
            dsv3__json_skip(&j);
            if (!CHECK_OK(dsv3__json_end(&j), e))
                printf("    %.*s\n", (int)len, text);
            text[len] = 0;
            CHECK(fits(g, text));
            dsv3_grammar_mask(g, &s, mask);
            for (size_t k = 0; k < GRAMMAR_MASK; k++)
                CHECK_EQ_UINT(mask[k], 0);
            break;
        }
        size_t bytes;
        const char *p = dsv3_token_bytes(grammar_tokenizer(), token, &bytes);
        memcpy(text + len, p, bytes);
        len += bytes;
        if (i % 7 == 3) { /* a state that was kept gives its mask again, whatever came later */
            dsv3_grammar_mask(g, &kept, mask);
            CHECK(memcmp(mask, kept_mask, sizeof mask) == 0);
            kept = s;
            dsv3_grammar_mask(g, &kept, kept_mask);
        }
    }
}

TEST(masks)
{
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int spacing = 0; spacing < 3; spacing++) {
            dsv3_grammar *g = open_schema(cases[i].schema, (dsv3_spacing)spacing);
            REQUIRE(g);
            for (uint64_t seed = 0; seed < 4; seed++)
                walk(g, seed * 77 + i, 40, cases[i].schema);
            dsv3_grammar_close(g);
        }
}

/* Where the limits press: shallow, keys that run out, values that cannot be, options that differ late. */
TEST(never_stuck)
{
    static const char *const schemas[] = {
        "{\"$defs\": {\"t\": {\"type\": \"object\", \"properties\": {\"a\": {\"$ref\": \"#/$defs/t\"}, \"b\": "
        "{\"$ref\": \"#/$defs/t\"}},"
        "\"additionalProperties\": false}}, \"$ref\": \"#/$defs/t\"}",
        "{\"$defs\": {\"t\": {\"type\": \"array\", \"items\": {\"anyOf\": [{\"$ref\": \"#/$defs/t\"}, {\"type\": "
        "\"object\", \"required\": [\"a\"],"
        "\"additionalProperties\": {\"$ref\": \"#/$defs/t\"}}]}, \"minItems\": 0}}, \"$ref\": \"#/$defs/t\"}",
        "{\"type\": \"object\", \"properties\": {\"a\": true, \"ab\": true, \"abc\": {\"type\": \"array\", \"items\": "
        "{\"items\": {\"type\": \"array\"}}}},"
        "\"additionalProperties\": false, \"required\": [\"abc\"], \"maxProperties\": 2}",
        "{\"type\": \"object\", \"properties\": {\"a\": {\"const\": 1}, \"ab\": false}, \"minProperties\": 1, "
        "\"additionalProperties\": false}",
        "{\"anyOf\": [{\"type\": \"array\", \"items\": {\"type\": \"array\", \"items\": {\"const\": 12}}, "
        "\"minItems\": 2},"
        "{\"type\": \"array\", \"items\": {\"type\": \"array\", \"items\": {\"const\": 123}, \"maxItems\": 1}}]}",
        "{\"type\": \"object\", \"minProperties\": 3, \"additionalProperties\": {\"type\": \"object\"}}",
    };
    for (size_t i = 0; i < sizeof schemas / sizeof schemas[0]; i++)
        for (uint32_t depth = 2; depth < 5; depth++) {
            dsv3_grammar *g = NULL;
            dsv3_grammar_opts o;
            memset(&o, 0, sizeof o);
            o.max_depth = depth;
            REQUIRE(CHECK_OK(dsv3_grammar_open(&g, grammar_tokenizer(), schemas[i], strlen(schemas[i]), &o, &e), e));
            for (uint64_t seed = 0; seed < 20; seed++)
                walk(g, seed * 31 + depth, 60, schemas[i]);
            dsv3_grammar_close(g);
        }
}

/* An object has as many keys as a state remembers, and then it must end. */
TEST(many_keys)
{
    dsv3_grammar *g = open_schema("{\"type\": \"object\", \"required\": [\"last\"]}", DSV3_SPACING_NONE);
    dsv3_grammar_state s;
    char member[32];
    int n = 0;
    REQUIRE(g);
    dsv3_grammar_start(g, &s);
    CHECK(dsv3_grammar_accept_text(g, &s, "{", 1));
    for (; n < 1000; n++) {
        size_t len = (size_t)snprintf(member, sizeof member, "\"k%d\":%d,", n, n);
        if (!dsv3_grammar_accept_text(g, &s, member, len))
            break;
    }
    CHECK_EQ_INT(n, DSV3_GRAMMAR_KEYS - 1);
    CHECK(!dsv3_grammar_accept_text(g, &s, "\"z", 2));
    CHECK(dsv3_grammar_accept_text(g, &s, "\"last\":[]}", 10));
    CHECK(dsv3_grammar_can_end(g, &s));
    dsv3_grammar_close(g);
}

TEST(like)
{
    dsv3_grammar *first = open_schema("true", DSV3_SPACING_ONE), *second = NULL;
    dsv3_grammar_opts o;
    uint32_t a[GRAMMAR_MASK], b[GRAMMAR_MASK];
    dsv3_grammar_state s;
    REQUIRE(first);
    memset(&o, 0, sizeof o);
    o.like = first;
    REQUIRE(
        CHECK_OK(dsv3_grammar_open(&second, grammar_tokenizer(), cases[8].schema, strlen(cases[8].schema), &o, &e), e));
    dsv3_grammar *third = open_schema(cases[8].schema, DSV3_SPACING_ONE);
    dsv3_grammar_start(second, &s);
    dsv3_grammar_mask(second, &s, a);
    dsv3_grammar_mask(third, &s, b);
    CHECK(memcmp(a, b, sizeof a) == 0);
    CHECK(second->mem.used < third->mem.used);
    dsv3_grammar_close(second);
    dsv3_grammar_close(third);
    dsv3_grammar_close(first);
}

/* ---- Refusals ---- */

TEST(refused)
{
    static const struct {
        const char *schema, *word;
        dsv3_result code;
    } list[] = {
        {"{\"type\": \"string\", \"nope\": 1}", "/nope", DSV3_ERROR_SCHEMA},
        {"{\"properties\": {\"a\": {\"not\": {}}}}", "/properties/a/not", DSV3_ERROR_SCHEMA},
        {"{\"uniqueItems\": true}", "/uniqueItems", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"string\", \"t\\u0079pe\": \"number\"}", "/type: a key that stands there twice",
         DSV3_ERROR_SCHEMA},
        {"{\"properties\": {\"a\": {}, \"b\": {}, \"a\": {}}}", "/properties/a: a key that", DSV3_ERROR_SCHEMA},
        {"{\"if\": {\"const\": 1}, \"then\": false}", "/if", DSV3_ERROR_SCHEMA},
        {"{\"else\": {}, \"if\": true}", "/if", DSV3_ERROR_SCHEMA},
        {"{\"if\": 1}", "/if", DSV3_ERROR_SCHEMA},
        {"{\"maxContains\": 1, \"contains\": {}}", "/contains", DSV3_ERROR_SCHEMA},
        {"{\"minLength\": -1}", "/minLength", DSV3_ERROR_SCHEMA},
        {"{\"minItems\": 1.5}", "/minItems", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"text\"}", "/type", DSV3_ERROR_SCHEMA},
        {"{\"enum\": []}", "/enum", DSV3_ERROR_SCHEMA},
        {"{\"anyOf\": [1]}", "/anyOf/0", DSV3_ERROR_SCHEMA},
        {"{\"required\": [1]}", "/required/0", DSV3_ERROR_SCHEMA},
        {"{\"items\": [{}]}", "/items", DSV3_ERROR_SCHEMA},
        {"{\"dependentRequired\": {\"a\": 1}}", "/dependentRequired/a", DSV3_ERROR_SCHEMA},
        {"{\"dependentRequired\": {\"a\": [\"b\", 1]}}", "/dependentRequired/a/1", DSV3_ERROR_SCHEMA},
        {"{\"dependentSchemas\": {\"a\": []}}", "/dependentSchemas/a", DSV3_ERROR_SCHEMA},
        {"{\"dependentRequired\": {\"a\": [\"b\"]}, \"properties\": {\"b\": false}, \"required\": [\"a\"], \"type\": "
         "\"object\"}",
         "no value", DSV3_ERROR_SCHEMA},
        {"{\"unevaluatedProperties\": false, \"allOf\": [{}]}", "/unevaluatedProperties", DSV3_ERROR_SCHEMA},
        {"{\"dependentSchemas\": {}, \"unevaluatedItems\": {}}", "/unevaluatedItems", DSV3_ERROR_SCHEMA},
        {"{\"propertyNames\": {\"not\": {}}}", "/propertyNames/not", DSV3_ERROR_SCHEMA},
        {"{\"multipleOf\": 0.1}", "/multipleOf", DSV3_ERROR_SCHEMA},
        {"{\"$ref\": \"other.json\"}", "/$ref", DSV3_ERROR_SCHEMA},
        {"{\"$ref\": \"#/$defs/x\"}", "/$ref", DSV3_ERROR_SCHEMA},
        {"{\"$schema\": \"http://example.org/\"}", "/$schema", DSV3_ERROR_SCHEMA},
        {"{\"oneOf\": [{\"type\": \"integer\"}, {\"minimum\": 2}]}", "/oneOf/1", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"(?=a)\"}", "ahead", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"(a\"}", "parentheses", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"a)\"}", "parentheses", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"*a\"}", "/pattern", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"[b-a]\"}", "backwards", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"[a\"}", "bracket", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"a\\\\b\"}", "escape", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"\\\\p{L}\"}", "escape", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"a{2,1}\"}", "{m,n}", DSV3_ERROR_SCHEMA},
        {"{\"pattern\": \"a\\\\\"}", "backslash", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"object\", \"patternProperties\": {\"^[ab]{70}$\": {}, \"^[cd]c{80}$\": {}}, "
         "\"additionalProperties\": "
         "false}",
         "few names, of more than 64 bytes", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"object\", \"properties\": {\"abc\": {}, \"b\": {}}, \"propertyNames\": {\"maxLength\": 2, "
         "\"pattern\": "
         "\"^[ab]?$\"}, \"minProperties\": 4}",
         "minProperties 4, but there are 3 names", DSV3_ERROR_SCHEMA},
        {"false", "no value", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"integer\", \"minimum\": 2, \"maximum\": 1}", "no value", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"string\", \"minLength\": 2, \"pattern\": \"^a?$\"}", "no value", DSV3_ERROR_SCHEMA},
        {"{\"$ref\": \"#/$defs/a\", \"$defs\": {\"a\": {\"type\": \"array\", \"items\": {\"$ref\": \"#/$defs/a\"}, "
         "\"minItems\": 1}}}",
         "no value", DSV3_ERROR_SCHEMA},
        {"{\"type\": \"object\", \"properties\": {\"a\": false}, \"required\": [\"a\"]}", "no value",
         DSV3_ERROR_SCHEMA},
        {"{\"type\": ", "schema", DSV3_ERROR_JSON},
        {"{\"type\": \"\\ud800\"}", "surrogate", DSV3_ERROR_JSON},
        {"1", "expected a schema", DSV3_ERROR_SCHEMA},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        dsv3_grammar *g = (dsv3_grammar *)&e;
        CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), list[i].schema, strlen(list[i].schema), NULL, &e),
                     list[i].code, e);
        CHECK_CONTAINS(e.message, list[i].word);
        CHECK(g == NULL);
    }
    for (size_t i = 0; i < DSV3__COUNT(dsv3__gram_keywords); i++) { /* what only describes changes nothing */
        char schema[200];
        if (dsv3__gram_keywords[i].kind != 'i' || strcmp(dsv3__gram_keywords[i].name, "$schema") == 0)
            continue;
        snprintf(schema, sizeof schema, "{\"type\": \"null\", \"%s\": [{\"not\": 1}]}", dsv3__gram_keywords[i].name);
        dsv3_grammar *g = open_schema(schema, DSV3_SPACING_ONE);
        CHECK(g && fits(g, "null") && !fits(g, "1"));
        dsv3_grammar_close(g);
    }
}

/* Schemas that explode meet a limit. */
TEST(limits)
{
    static char schema[1 << 21];
    dsv3_grammar *g;
    dsv3_grammar_opts o;
    char *p;
    memset(&o, 0, sizeof o);
    o.memory_limit = 64 << 20;
    static const char *const ready[] = {
        "{\"type\": \"string\", \"pattern\": \"(a|b)*a(a|b){20}$\"}",
        "{\"type\": \"string\", \"pattern\": \"((a{1000}){1000}){1000}\"}",
        "{\"type\": \"string\", \"pattern\": \"^a*$\", \"maxLength\": 60000}",
        "{\"type\": \"string\", \"pattern\": \"^a*$\", \"maxLength\": 1e20}",
        "{\"type\": \"integer\", \"multipleOf\": 997, \"allOf\": [{\"multipleOf\": 991}]}",
    };
    for (size_t i = 0; i < sizeof ready / sizeof ready[0]; i++) {
        CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), ready[i], strlen(ready[i]), &o, &e), DSV3_ERROR_SCHEMA,
                     e);
        CHECK(g == NULL);
    }
    p = schema + sprintf(schema, "{\"allOf\": ["); /* 4^20 ways */
    for (int i = 0; i < 20; i++)
        p +=
            sprintf(p, "%s{\"anyOf\": [{\"minimum\": %d}, {\"minLength\": %d}, {\"minItems\": %d}, {\"maximum\": %d}]}",
                    i ? "," : "", i, i, i, i);
    sprintf(p, "]}");
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), schema, strlen(schema), &o, &e), DSV3_ERROR_SCHEMA, e);
    p = schema;
    for (int i = 0; i < 100; i++)
        p += sprintf(p, "{\"items\": ");
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), schema, strlen(schema), &o, &e), DSV3_ERROR_JSON, e);
    CHECK_CONTAINS(e.message, "nested");
    p = schema + sprintf(schema, "{\"type\": \"object\", \"required\": [");
    for (int i = 0; i < 200; i++)
        p += sprintf(p, "%s\"key number %d\"", i ? "," : "", i);
    sprintf(p, "]}");
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), schema, strlen(schema), &o, &e), DSV3_ERROR_SCHEMA, e);
    CHECK_CONTAINS(e.message, "160 keys");
    memset(schema, ' ', sizeof schema);
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), schema, sizeof schema, &o, &e), DSV3_ERROR_SCHEMA, e);
    o.memory_limit = 100 << 10;
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), NULL, 0, &o, &e), DSV3_ERROR_MEMORY_LIMIT, e);
    o.memory_limit = 0;
    o.max_states = 100;
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), NULL, 0, &o, &e), DSV3_ERROR_SCHEMA, e);
    CHECK_CONTAINS(e.message, "100 states");
    o.max_states = 65536;
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), NULL, 0, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o.max_states = 0;
    o.max_depth = 65;
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), NULL, 0, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o.struct_size = 1;
    CHECK_RESULT(dsv3_grammar_open(&g, grammar_tokenizer(), NULL, 0, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    CHECK_RESULT(dsv3_grammar_open(&g, NULL, NULL, 0, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_grammar_open(NULL, grammar_tokenizer(), NULL, 0, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
}

/* Each allocation fails once; all blocks come back. */
TEST(out_of_memory)
{
    static const int which[] = {0, 8, 14, 16, 19, 20};
    for (size_t i = 0; i < sizeof which / sizeof which[0]; i++) {
        const char *schema = cases[which[i]].schema;
        for (uint64_t n = 1; n < 1000; n++) {
            tiny_heap heap;
            dsv3_grammar_opts o;
            dsv3_grammar *g;
            memset(&heap, 0, sizeof heap);
            memset(&o, 0, sizeof o);
            heap.fail_at = n;
            o.allocator = tiny_allocator(&heap);
            dsv3_result r = dsv3_grammar_open(&g, grammar_tokenizer(), schema, strlen(schema), &o, &e);
            bool last = heap.n_allocs < n;
            CHECK_RESULT(r, last ? DSV3_OK : DSV3_ERROR_OUT_OF_MEMORY, e);
            dsv3_grammar_close(g);
            CHECK_EQ_UINT(heap.live_bytes, 0);
            CHECK_EQ_UINT(heap.n_damaged, 0);
            if (last) {
                CHECK(n > 20);
                break;
            }
        }
    }
}

/* ---- Sampling and generation ---- */

static dsv3_model *small_model(tiny *t)
{
    dsv3_model *m = NULL;
    tiny_opts to = tiny_micro();
    to.vocab = 320, to.tokenizer = true;
    tiny_build(t, &to);
    CHECK_OK(tiny_open(t, &m, NULL, &e), e);
    return m;
}

TEST(sample_mask)
{
    tiny t;
    dsv3_model *m = small_model(&t);
    dsv3_session *s = NULL;
    dsv3_sample_opts o;
    dsv3_sample free_pick, sample;
    uint32_t mask[10];
    const int32_t tokens[] = {5, 6, 7};
    REQUIRE(m && CHECK_OK(dsv3_session_open(&s, m, NULL, &e), e));
    CHECK_OK(dsv3_session_append(s, tokens, 3, NULL, &e), e);
    memset(&o, 0, sizeof o);
    CHECK_OK(dsv3_session_sample(s, &o, &free_pick, &e), e);
    memset(mask, 0xFF, sizeof mask);
    o.mask = mask;
    CHECK_OK(dsv3_session_sample(s, &o, &sample, &e), e);
    CHECK_EQ_INT(sample.token, free_pick.token);
    mask[free_pick.token / 32] &= ~(1u << (free_pick.token % 32)); /* without the likeliest: the second */
    dsv3_sample best[3];
    CHECK_OK(dsv3_session_logprobs(s, 3, best, &e), e);
    CHECK_OK(dsv3_session_sample(s, &o, &sample, &e), e);
    CHECK_EQ_INT(sample.token, best[1].token);
    CHECK_NEAR(sample.logprob, best[1].logprob, 1e-6); /* under the model, not under the mask */
    memset(mask, 0, sizeof mask);
    mask[2] = 1u << 3 | 1u << 9;
    for (int how = 0; how < 4; how++)
        for (uint64_t seed = 0; seed < 50; seed++) {
            o.temperature = how ? 2.0f : 1e-3f;
            o.top_k = how == 1 ? 5 : 0;
            o.top_p = how == 2 ? 0.9f : 0;
            o.repetition_penalty = how == 3 ? 1.5f : 0;
            o.seed = seed;
            CHECK_OK(dsv3_session_sample(s, &o, &sample, &e), e);
            CHECK(sample.token == 67 || sample.token == 73);
        }
    mask[2] = 0;
    CHECK_RESULT(dsv3_session_sample(s, &o, &sample, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    dsv3_session_close(s);
    dsv3_model_close(m);
    tiny_free(&t);
}

typedef struct collected {
    char text[4096];
    size_t n;
    int n_masks;
    const dsv3_tokenizer *tokenizer;
} collected;

static bool collect(void *user, const dsv3_token *token)
{
    collected *c = (collected *)user;
    memcpy(c->text + c->n, token->text, token->len);
    c->n += token->len;
    c->text[c->n] = 0;
    return true;
}

static bool no_letter_a(void *user, const int32_t *tokens, size_t n_tokens, uint32_t *mask)
{
    collected *c = (collected *)user;
    (void)tokens, (void)n_tokens;
    c->n_masks++;
    for (int32_t i = 0; i < 320; i++) {
        size_t n;
        const char *bytes = dsv3_token_bytes(c->tokenizer, i, &n);
        CHECK_EQ_INT(grammar_bit(mask, i), 0);
        if (!n || !memchr(bytes, 'a', n))
            mask[i / 32] |= 1u << (i % 32);
    }
    return true;
}

TEST(generate)
{
    static const char schema[] =
        "{\"type\": \"object\", \"properties\": {\"n\": {\"type\": \"integer\", \"maximum\": 99, \"minimum\": -99}, "
        "\"s\": {\"type\": \"string\", \"maxLength\": 8}, \"k\": {\"enum\": [\"aa\", \"bb\"]}}, "
        "\"required\": [\"n\", \"s\", \"k\"], \"additionalProperties\": false}";
    tiny t;
    dsv3_model *m = small_model(&t);
    dsv3_session *s = NULL;
    dsv3_grammar *g = NULL, *strange = open_schema("true", DSV3_SPACING_ONE);
    const dsv3_tokenizer *tokenizer;
    dsv3_generate_opts o;
    collected c;
    dsv3_stats stats;
    dsv3_session_opts so;
    memset(&so, 0, sizeof so);
    memset(&o, 0, sizeof o);
    so.n_threads = 1;
    REQUIRE(m && CHECK_OK(dsv3_session_open(&s, m, &so, &e), e) &&
            CHECK_OK(dsv3_model_tokenizer(m, &tokenizer, &e), e));
    REQUIRE(CHECK_OK(dsv3_grammar_open(&g, tokenizer, schema, strlen(schema), NULL, &e), e));
    for (int turn = 0; turn < 30; turn++) {
        memset(&c, 0, sizeof c);
        c.tokenizer = tokenizer;
        o.sample.temperature = 1.5f;
        o.sample.seed = (uint64_t)turn;
        o.grammar = g;
        o.token_fn = collect;
        o.user = &c;
        o.ignore_eos = turn % 3 == 1;
        o.mask_fn = turn % 3 == 2 ? no_letter_a : NULL;
        CHECK_OK(dsv3_session_rewind(s, 0, &e), e);
        CHECK_OK(dsv3_generate(s, "a", 1, &o, &stats, &e), e);
        CHECK_EQ_INT(stats.stop, o.ignore_eos ? DSV3_STOP_GRAMMAR : DSV3_STOP_EOS);
        if (!CHECK(fits(g, c.text)))
            printf("    %s\n", c.text);
        CHECK(!o.mask_fn || (c.n_masks > 5 && !strchr(c.text, 'a')));
    }
    o.sample.mask = s->ws->masks;
    CHECK_RESULT(dsv3_generate(s, NULL, 0, &o, &stats, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o.sample.mask = NULL;
    o.grammar = strange;
    CHECK_RESULT(dsv3_generate(s, NULL, 0, &o, &stats, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    dsv3_grammar_close(g);
    dsv3_grammar_close(strange);
    dsv3_session_close(s);
    dsv3_model_close(m);
    tiny_free(&t);
}

TEST_MAIN(RUN(texts), RUN(spacing), RUN(masks), RUN(never_stuck), RUN(many_keys), RUN(like), RUN(refused), RUN(limits),
          RUN(out_of_memory), RUN(sample_mask), RUN(generate))
#else
TEST(without)
{
    dsv3_error e;
    dsv3_grammar *g;
    CHECK_RESULT(dsv3_grammar_open(&g, NULL, NULL, 0, NULL, &e), DSV3_ERROR_FEATURE_DISABLED, e);
}

TEST_MAIN(RUN(without))
#endif
