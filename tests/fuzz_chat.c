/* Conversations: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_chat.c -lm -pthread
   Bytes: markup, options, then messages: role and which fields are there, each field its length and bytes. Whatever the
   fields hold: the ids spell the text, and the markers among them are those of the same conversation of harmless words. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#include "chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MAX_MESSAGES = 12, MAX_CALLS = 3, MAX_IDS = 1 << 16 };

typedef struct input {
    const uint8_t *p, *end;
} input;

static unsigned take(input *in)
{
    return in->p < in->end ? *in->p++ : 0;
}

/* A field that is not there, or one of up to 255 bytes. */
static dsv3_text take_text(input *in, bool there)
{
    dsv3_text t = {NULL, 0};
    if (!there)
        return t;
    size_t n = take(in);
    t.p = (const char *)in->p;
    t.len = n < (size_t)(in->end - in->p) ? n : (size_t)(in->end - in->p);
    in->p += t.len;
    return t;
}

static void harmless(dsv3_text *t)
{
    if (t->len)
        t->p = "x", t->len = 1;
}

typedef struct result {
    dsv3_result code;
    size_t n, n_marks, len;
    int32_t ids[MAX_IDS], marks[MAX_IDS];
    char text[MAX_IDS];
} result;

static void render(result *r, const dsv3_tokenizer *t, const dsv3_message *messages, size_t n, const dsv3_chat_opts *o)
{
    dsv3_error e, f;
    size_t at = 0;
    r->n_marks = 0;
    r->code = dsv3_chat_render(t, messages, n, o, r->ids, MAX_IDS, &r->n, &e);
    if (dsv3_chat_text(t, messages, n, o, r->text, MAX_IDS, &r->len, &f) != r->code || (r->code && !e.message[0]))
        abort();
    if (r->code && r->code != DSV3_ERROR_INVALID_ARGUMENT && r->code != DSV3_ERROR_JSON)
        abort();
    for (size_t i = 0; i < r->n && !r->code; i++) {
        size_t m;
        const char *bytes = dsv3_token_bytes(t, r->ids[i], &m);
        if (!bytes || at + m > r->len || memcmp(bytes, r->text + at, m) != 0)
            abort();
        at += m;
        if (t->flags[r->ids[i]] & DSV3__TOK_ADDED)
            r->marks[r->n_marks++] = r->ids[i];
    }
    if (!r->code && at != r->len)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static dsv3_tokenizer *tokenizers[2];
    static result as_is, plain;
    static dsv3_message messages[MAX_MESSAGES + 1];
    static dsv3_tool_call calls[MAX_MESSAGES][MAX_CALLS];
    dsv3_chat_opts o;
    dsv3_tool_call call;
    input in;
    size_t n = 0;
    if (!tokenizers[0]) {
        tokenizers[0] = chat_tokenizer(false, CHAT_GIGA_TEMPLATE);
        tokenizers[1] = chat_tokenizer(true, CHAT_GIGA_TEMPLATE);
    }
    in.p = data, in.end = data + size;
    memset(&o, 0, sizeof o);
    o.markup = (dsv3_markup)(DSV3_MARKUP_V3 + take(&in) % DSV3_MARKUP_GIGACHAT3);
    unsigned flags = take(&in);
    o.add_generation_prompt = flags & 1;
    o.thinking = (flags & 2) != 0;
    o.tools = take_text(&in, (flags & 4) != 0);
    if (flags & 16) {
        memset(&call, 0, sizeof call);
        call.id = take_text(&in, true);
        call.name = take_text(&in, true);
        o.call = &call;
    }
    const dsv3_tokenizer *t = tokenizers[flags >> 3 & 1];
    while (in.p < in.end && n < MAX_MESSAGES) {
        dsv3_message *m = &messages[n];
        unsigned has = take(&in);
        memset(m, 0, sizeof *m);
        m->role = (dsv3_role)(has & 3);
        m->content = take_text(&in, !(has & 4));
        m->reasoning = take_text(&in, (has & 8) != 0);
        m->name = take_text(&in, (has & 16) != 0);
        m->tool_call_id = take_text(&in, (has & 32) != 0);
        m->prefix = (has & 128) != 0;
        if (has & 64) {
            m->tool_calls = calls[n];
            m->n_tool_calls = take(&in) % (MAX_CALLS + 1);
            for (size_t k = 0; k < m->n_tool_calls; k++) {
                calls[n][k].id = take_text(&in, true);
                calls[n][k].name = take_text(&in, true);
                calls[n][k].arguments = take_text(&in, true);
            }
        }
        n++;
    }
    render(&as_is, t, messages, n, &o);
    if (o.call && !as_is.code) { /* the prompt of a call is where the conversation with it goes */
        dsv3_message *m = &messages[n];
        memset(m, 0, sizeof *m);
        m->role = DSV3_ROLE_ASSISTANT;
        m->tool_calls = &call, m->n_tool_calls = 1;
        call.arguments.p = "{}", call.arguments.len = 2;
        o.call = NULL;
        render(&plain, t, messages, n + 1, &o);
        if (plain.code || plain.len < as_is.len || memcmp(plain.text, as_is.text, as_is.len) != 0)
            abort();
        o.call = &call;
    }
    for (size_t i = 0; i < n; i++) {
        dsv3_message *m = &messages[i];
        harmless(&m->content), harmless(&m->reasoning), harmless(&m->name), harmless(&m->tool_call_id);
        for (size_t k = 0; k < m->n_tool_calls; k++)
            harmless(&calls[i][k].id), harmless(&calls[i][k].name), harmless(&calls[i][k].arguments);
    }
    if (o.call)
        harmless(&call.id), harmless(&call.name);
    render(&plain, t, messages, n, &o);
    if (as_is.code != plain.code || as_is.n_marks != plain.n_marks ||
        memcmp(as_is.marks, plain.marks, plain.n_marks * sizeof *plain.marks) != 0)
        abort();
    return 0;
}

#include "fuzz.h"
