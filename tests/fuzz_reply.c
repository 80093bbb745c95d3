/* Replies: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_reply.c -lm -pthread
   Bytes: markup and options, then tokens: from 224 on a marker, below it the high byte of an id or the byte itself. Every
   event is UTF-8, every token is told once, the end comes once; and with each word cut into its bytes the same is said. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#include "chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_ENTRIES = 1 << 16 };

typedef struct said {
    uint32_t entries[MAX_ENTRIES]; /* kind << 24 | call << 8 | byte */
    size_t n, n_ids, n_ends;
} said;

static void note(said *s, uint32_t entry)
{
    if (s->n < MAX_ENTRIES)
        s->entries[s->n++] = entry;
}

static bool hear(void *user, const dsv3_reply_event *event)
{
    said *s = (said *)user;
    uint32_t tag = (uint32_t)event->kind << 24 | (event->call & 0xFFFF) << 8;
    if (s->n_ends)
        abort();
    s->n_ends += event->kind == DSV3_REPLY_END;
    s->n_ids += event->id >= 0;
    if (event->kind == DSV3_REPLY_CALL_NAME && event->len)
        note(s, 0xFFFFFFFF);
    for (size_t i = 0, step; i < event->len; i += step) {
        step = dsv3__utf8_length(event->text + i, event->text + event->len);
        if (!step)
            abort();
        for (size_t k = 0; k < step; k++)
            note(s, tag | (uint8_t)event->text[i + k]);
    }
    return true;
}

static void put(dsv3_reply *r, said *s, int32_t id)
{
    size_t before = s->n_ids;
    bool was = !s->n_ends, more = dsv3_reply_put(r, id);
    if (more != !s->n_ends || s->n_ids != before + was)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char *const stops[] = {"ab", "b\xE4\xB8\x80", "<think>x"};
    static dsv3_tokenizer *tokenizers[2];
    static said words, bytes;
    dsv3_reply a, b;
    dsv3_reply_opts o;
    dsv3_tool_call call;
    dsv3_error e;
    if (!tokenizers[0]) {
        tokenizers[0] = chat_tokenizer(false, NULL);
        tokenizers[1] = chat_tokenizer(true, NULL);
    }
    if (size < 2 || size > 4096)
        return 0;
    memset(&o, 0, sizeof o);
    o.markup = (dsv3_markup)(DSV3_MARKUP_V3 + data[0] % DSV3_MARKUP_GIGACHAT3);
    o.thinking = data[1] & 1;
    o.keep_newlines = (data[1] & 2) != 0;
    o.stop_strings = stops;
    o.n_stop_strings = data[1] >> 2 & 3;
    const dsv3_tokenizer *t = tokenizers[data[1] >> 4 & 1];
    memset(&call, 0, sizeof call);
    call.id.p = call.name.p = "f", call.id.len = call.name.len = 1;
    if (data[1] & 32 && o.markup != DSV3_MARKUP_KIMI_K2 && o.markup != DSV3_MARKUP_GIGACHAT3)
        o.call = &call;
    o.event_fn = hear;
    words.n = words.n_ids = words.n_ends = bytes.n = bytes.n_ids = bytes.n_ends = 0;
    o.user = &words;
    if (dsv3_reply_init(&a, t, &o, &e))
        abort();
    o.user = &bytes;
    if (dsv3_reply_init(&b, t, &o, &e))
        abort();
    for (size_t i = 2; i < size; i++) {
        size_t n;
        int32_t id = data[i];
        if (id >= 224)
            id = dsv3__chat_id(t, (id - 224) % DSV3__CHAT_N_MARKERS);
        else if (id >= 192 && i + 1 < size)
            id = (id & 1) << 8 | data[++i];
        else
            id = t->bpe.ids[id];
        if (id < 0 || id >= (int32_t)t->n_tokens)
            continue;
        put(&a, &words, id);
        const char *p = dsv3_token_bytes(t, id, &n);
        if (t->flags[id] & DSV3__TOK_ADDED) /* some are text where they have no meaning, and then in one piece */
            n = 0, put(&b, &bytes, id);
        for (size_t k = 0; k < n; k++)
            put(&b, &bytes, t->bpe.ids[(uint8_t)p[k]]);
    }
    dsv3_reply_end(&a);
    dsv3_reply_end(&b);
    if (words.n_ends != 1 || bytes.n_ends != 1 || words.n != bytes.n ||
        memcmp(words.entries, bytes.entries, words.n * sizeof *words.entries) != 0)
        abort();
    return 0;
}

#include "fuzz.h"
