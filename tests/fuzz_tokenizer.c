/* The tokenizer: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_tokenizer.c -lm -pthread
   First byte even: the rest is text for a sound tokenizer, whose promises are checked. Odd: the rest is a tokenizer.json, or,
   if bit 1 is set, the end of a tiktoken.model. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Any bytes become tokens, and the bytes of the tokens are those bytes. */
static void check_text(const dsv3_tokenizer *tok, const char *text, size_t len, bool safe)
{
    dsv3_error e;
    size_t n = 0, again = 0, at = 0, out = 0;
    if (dsv3_tokenize(tok, text, len, 0, NULL, 0, &n, &e) != (n ? DSV3_ERROR_BUFFER_TOO_SMALL : DSV3_OK) && e.code != DSV3_OK)
        abort();
    int32_t *ids = (int32_t *)malloc((n + 1) * sizeof *ids);
    if (!ids || dsv3_tokenize(tok, text, len, 0, ids, n, &again, &e) != DSV3_OK || again != n)
        abort();
    for (size_t i = 0; i < n; i++) {
        size_t m;
        const char *bytes = dsv3_token_bytes(tok, ids[i], &m);
        if (!bytes || m > len - at || memcmp(bytes, text + at, m) != 0)
            abort();
        at += m;
        if (safe && (ids[i] < 3 || ids[i] >= TINY_USER_ID)) /* no text makes a marker */
            abort();
    }
    if (at != len)
        abort();
    dsv3_detokenize(tok, ids, n, 0, NULL, 0, &out, &e);
    char *back = (char *)malloc(out + 1);
    if (!back || dsv3_detokenize(tok, ids, n, 0, back, out, &again, &e) != DSV3_OK || again != out)
        abort();
    for (size_t i = 0; i < out;) { /* always UTF-8 */
        size_t m = dsv3__utf8_length(back + i, back + out);
        if (!m)
            abort();
        i += m;
    }
    free(back);
    free(ids);
    n = 0;
    dsv3_tokenize(tok, text, len, DSV3_TOKENIZE_BOS | DSV3_TOKENIZE_MARKERS, NULL, 0, &n, &e);
}

/* tiktoken.model: the bytes, and behind them the input. */
static void put_ranks(tiny *t, const uint8_t *data, size_t size)
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    tiny_text s = {NULL, 0, 0};
    for (int b = 0; b < 256; b++)
        tiny_printf(&s, "%c%c== %d\n", letters[b >> 2], letters[(b & 3) << 4], b);
    tiny_put_bytes(&s, data, size);
    tiny_put(t, "tiktoken.model", s.p, s.n);
    free(s.p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tiny t, ranks;
    static dsv3_tokenizer *sound;
    static dsv3_model_opts o, ranks_o;
    dsv3_error e;
    if (!t.n_files) {
        tiny_opts to = tiny_micro();
        to.vocab = 320, to.tokenizer = true;
        tiny_build(&t, &to);
        o.reader = tiny_reader(&t);
        ranks_o.reader = tiny_reader(&ranks);
        if (dsv3_tokenizer_open(&sound, NULL, &o, &e) != DSV3_OK)
            abort();
    }
    if (size < 1)
        return 0;
    if (data[0] & 1) {
        dsv3_tokenizer *tok = NULL;
        bool model = (data[0] & 2) != 0;
        if (model)
            put_ranks(&ranks, data + 1, size - 1);
        else
            tiny_put(&t, "tokenizer.json", data + 1, size - 1);
        dsv3_result r = dsv3_tokenizer_open(&tok, NULL, model ? &ranks_o : &o, &e);
        if (r == DSV3_OK)
            check_text(tok, "The thing \xe4\xb8\x80 12\n\n \xf0\x9f\x98\x80\xff--", 26, false);
        else if (e.code != r || !e.message[0])
            abort();
        dsv3_tokenizer_close(tok);
    } else {
        check_text(sound, (const char *)data + 1, size - 1, true);
    }
    return 0;
}

#include "fuzz.h"
