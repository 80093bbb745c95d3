/* grammar.h: a vocabulary to try grammars with, and a walk through one. The bytes, words of JSON that are in one token in
   real vocabularies, parts of characters, and added tokens, which no text may hold. Include dsv3.h first. */
#ifndef DSV3_TEST_GRAMMAR_H
#define DSV3_TEST_GRAMMAR_H

#include <stdlib.h>
#include <string.h>

static const char *const grammar_words[] = {"{\"",        "\":",      "\": ",
                                            "\":\"",      "\": \"",   "\",\"",
                                            "\", \"",     "\"}",      "\"]",
                                            "\"},{\"",    "}}",       "]}",
                                            "]]",         "[[",       "[{\"",
                                            "{}",         "[]",       "{\"a\":",
                                            "\"a\"",      "\"b\":",   "\"a\":1,\"b\":",
                                            "\",",        "\"",       "a\"",
                                            "ab",         "abc",      "abcabcabc",
                                            " abc",       "name",     "name\"",
                                            "kind\":\"",  "true",     "false",
                                            "null",       "ue",       "12",
                                            "123",        "0.",       ".5",
                                            "1e",         "e5",       "-1",
                                            "000",        ": ",       ", ",
                                            ",\n",        "\n  ",     "  ",
                                            "\\n",        "\\\"",     "\\u00",
                                            "1f",         "\\",       "\\\\",
                                            "\xC3",       "\xA9",     "\xC3\xA9",
                                            "\xC3\xA9\"", "\xE4\xB8", "\xF0\x9F\x98\x80",
                                            "\xF0\x9F",   "\x98\x80", "\xED\xA0",
                                            "1}",         "1]",       "1,",
                                            "1,2",        "2]}",      "\"x\":",
                                            "}\n",        "a\xC3",    "\xA9z\",\"",
                                            "\",\"ab",    "\":\"x",   "\", \"a",
                                            "1]]"};

enum { GRAMMAR_WORDS = sizeof grammar_words / sizeof grammar_words[0], GRAMMAR_EOS = 256 + GRAMMAR_WORDS };

/* A tokenizer as far as a grammar looks into it. Ids: the bytes, the words, end of text, another added token, a token
   without bytes. */
static dsv3_tokenizer *grammar_tokenizer(void)
{
    static dsv3_tokenizer t;
    static char pool[4096];
    static dsv3__tok_span spans[GRAMMAR_EOS + 3];
    static uint8_t flags[GRAMMAR_EOS + 3];
    uint32_t at = 0;
    if (t.n_tokens)
        return &t;
    t.pool = pool;
    t.spans = spans;
    t.flags = flags;
    for (uint32_t i = 0; i < GRAMMAR_EOS + 3; i++) {
        char byte = (char)i;
        const char *text = i < 256 ? &byte : i < GRAMMAR_EOS ? grammar_words[i - 256] : "ab";
        spans[i].at = at;
        spans[i].n = (uint32_t)(i < 256 ? 1 : i == GRAMMAR_EOS + 2 ? 0 : strlen(text));
        memcpy(pool + at, text, spans[i].n);
        at += spans[i].n;
        flags[i] = (uint8_t)(i == GRAMMAR_EOS || i == GRAMMAR_EOS + 1 ? DSV3__TOK_ADDED : 0);
    }
    t.eos = GRAMMAR_EOS;
    t.bos = t.pad = -1;
    t.n_tokens = GRAMMAR_EOS + 3;
    return &t;
}

static uint64_t grammar_random(uint64_t *state, uint64_t below)
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (z ^ (z >> 31)) % below;
}

#define GRAMMAR_MASK ((GRAMMAR_EOS + 3 + 31) / 32)

static bool grammar_bit(const uint32_t *mask, int32_t token)
{
    return (mask[token / 32] >> (token % 32) & 1) != 0;
}

/* The mask by its meaning: each token tried. */
static void grammar_brute(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t *mask)
{
    memset(mask, 0, GRAMMAR_MASK * sizeof *mask);
    for (int32_t i = 0; i < GRAMMAR_EOS + 3; i++) {
        dsv3_grammar_state copy = *s;
        if (dsv3_grammar_accept(g, &copy, i))
            mask[i / 32] |= 1u << (i % 32);
    }
}

#endif
