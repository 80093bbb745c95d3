/* The schema compiler and its masks: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_schema.c -lm
   The first byte chooses spacing and depth, the rest is a schema. What compiles is walked through: a mask is what trying
   each token gives, it is never empty before the end, and what comes out is JSON that fits. What takes long (many states,
   long walks, masks held against each token tried) is done for a share of the inputs that their hash chooses: coverage does
   not draw the fuzzer to those. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "grammar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LONG = 24, SHORT = 6 };

/* So many tokens, random by the seed; `tried`: where the mask is held against each token tried, which takes most of the
   time. */
static void walk(const dsv3_grammar *g, uint64_t seed, int steps, int tried)
{
    static char text[1 << 14];
    size_t len = 0, bytes;
    uint32_t mask[GRAMMAR_MASK], brute[GRAMMAR_MASK];
    dsv3_grammar_state s, again;
    dsv3_error e;
    dsv3_grammar_start(g, &s);
    for (int i = 0; i < steps; i++) {
        int32_t token = (int32_t)grammar_random(&seed, GRAMMAR_EOS + 3);
        dsv3_grammar_mask(g, &s, mask);
        if (i == tried) {
            grammar_brute(g, &s, brute);
            if (memcmp(mask, brute, sizeof mask) != 0)
                abort();
        }
        for (int32_t k = 0; !grammar_bit(mask, token); k++, token = (token + 1) % (GRAMMAR_EOS + 3))
            if (k == GRAMMAR_EOS + 3)
                abort(); /* stuck */
        if (!dsv3_grammar_accept(g, &s, token))
            abort();
        if (token == GRAMMAR_EOS)
            break;
        const char *p = dsv3_token_bytes(grammar_tokenizer(), token, &bytes);
        memcpy(text + len, p, bytes);
        len += bytes;
    }
    dsv3_grammar_start(g, &again);
    if (!dsv3_grammar_accept_text(g, &again, text, len))
        abort();
    if (dsv3_grammar_can_end(g, &again)) {
        dsv3__json j;
        dsv3__err_clear(&e);
        dsv3__json_init(&j, text, len, "text", &e);
        dsv3__json_skip(&j);
        if (dsv3__json_end(&j) != DSV3_OK)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static dsv3_grammar *any;
    dsv3_grammar *g;
    dsv3_grammar_opts o;
    dsv3_error e;
    memset(&o, 0, sizeof o);
    if (!any && dsv3_grammar_open(&any, grammar_tokenizer(), NULL, 0, NULL, &e))
        abort();
    if (size == 0)
        return 0;
    o.like = any;
    o.spacing = (dsv3_spacing)(data[0] % 3);
    o.max_depth = 1 + data[0] / 3 % 8;
    const uint64_t hash = dsv3__hash(0, data, size);
    o.max_states = hash % 16 ? 300 : 3000;
    o.memory_limit = 16 << 20;
    dsv3_result r = dsv3_grammar_open(&g, grammar_tokenizer(), (const char *)data + 1, size - 1, &o, &e);
    if (r != e.code || !r != (g != NULL))
        abort();
    if (r && r != DSV3_ERROR_JSON && r != DSV3_ERROR_SCHEMA)
        abort(); /* the limits hold before the memory does */
    if (!r)
        walk(g, hash, hash / 16 % 8 ? SHORT : LONG, hash / 128 % 8 ? -1 : (int)(hash / 1024 % SHORT));
    dsv3_grammar_close(g);
    return 0;
}

#include "fuzz.h"
