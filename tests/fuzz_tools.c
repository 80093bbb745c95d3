/* Calls of any tool: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_tools.c -lm -pthread
   The first byte chooses markup and spacing, the rest is a list of tools. What compiles is walked through at random, and
   what was written goes through the reply: one call, of a tool that is in the list, its arguments whole JSON where the walk
   came to the end. As fuzz_schema, a share of the walks is long, and of the masks held against each token tried. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#include "chat.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { LONG = 60, SHORT = 8, MAX_TEXT = 1 << 14 };

typedef struct heard {
    char name[512], arguments[MAX_TEXT];
    size_t n_name, n_arguments, n_names, n_ends;
} heard;

static bool allowed(const uint32_t *mask, int32_t id)
{
    return (mask[id / 32] >> (id % 32) & 1) != 0;
}

static void put(char *to, size_t *n, size_t room, const dsv3_reply_event *event)
{
    if (*n + event->len > room)
        abort();
    memcpy(to + *n, event->text, event->len);
    *n += event->len;
}

static bool hear(void *user, const dsv3_reply_event *event)
{
    heard *h = (heard *)user;
    if (event->call != 0 || h->n_ends)
        abort();
    switch (event->kind) {
    case DSV3_REPLY_CALL_ID: break;
    case DSV3_REPLY_CALL_NAME:
        h->n_names += event->len != 0;
        put(h->name, &h->n_name, sizeof h->name, event);
        break;
    case DSV3_REPLY_CALL_ARGUMENTS: put(h->arguments, &h->n_arguments, sizeof h->arguments, event); break;
    case DSV3_REPLY_END: h->n_ends++; break;
    default: abort(); /* nothing beside the call */
    }
    return true;
}

static void mask_is_what_each_token_gives(const dsv3_grammar *g, const dsv3_tokenizer *t, const dsv3_grammar_state *s,
                                          const uint32_t *mask)
{
    for (int32_t id = 0; id < (int32_t)t->n_tokens; id++) {
        dsv3_grammar_state copy = *s;
        if (dsv3_grammar_accept(g, &copy, id) != allowed(mask, id))
            abort();
    }
}

static void walk(const dsv3_grammar *g, const dsv3_tokenizer *t, dsv3_markup markup, dsv3_text tools, uint64_t seed,
                 int steps, int tried)
{
    static heard h;
    uint32_t mask[16];
    dsv3_grammar_state s;
    dsv3_reply r;
    dsv3_reply_opts o;
    dsv3_tool_call call;
    dsv3_error e;
    bool ended = false;
    if (t->n_tokens > 32 * sizeof mask / sizeof *mask)
        abort();
    h.n_name = h.n_arguments = h.n_names = h.n_ends = 0;
    memset(&o, 0, sizeof o), memset(&call, 0, sizeof call);
    o.markup = markup, o.call = &call, o.event_fn = hear, o.user = &h;
    if (dsv3_reply_init(&r, t, &o, &e))
        abort();
    dsv3_grammar_start(g, &s);
    for (int i = 0; i < steps && !ended; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        int32_t id = (int32_t)((seed >> 33) % t->n_tokens);
        dsv3_grammar_mask(g, &s, mask);
        if (i == tried)
            mask_is_what_each_token_gives(g, t, &s, mask);
        for (uint32_t k = 0; !allowed(mask, id); k++, id = (id + 1) % (int32_t)t->n_tokens)
            if (k == t->n_tokens)
                abort(); /* stuck */
        ended = id == t->eos;
        if (!dsv3_grammar_accept(g, &s, id) || dsv3_reply_put(&r, id) != !ended)
            abort();
    }
    dsv3_reply_end(&r);
    if (h.n_ends != 1 || h.n_names > 1)
        abort();
    if (ended) {
        dsv3_text name = {h.name, h.n_name};
        dsv3__json j;
        dsv3__str parameters;
        dsv3__err_clear(&e);
        if (h.n_names != 1 || dsv3__gram_tool(tools, name, &parameters, &e))
            abort();
        dsv3__json_init(&j, h.arguments, h.n_arguments, "arguments", &e);
        dsv3__json_skip(&j);
        if (dsv3__json_end(&j) != DSV3_OK)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const dsv3_markup markups[] = {DSV3_MARKUP_V3, DSV3_MARKUP_R1, DSV3_MARKUP_R1_THINK, DSV3_MARKUP_V3_1,
                                          DSV3_MARKUP_KIMI_K2_THINKING};
    static dsv3_tokenizer *t;
    static dsv3_grammar *any;
    dsv3_grammar *g;
    dsv3_grammar_opts o;
    dsv3_text tools;
    dsv3_error e;
    memset(&o, 0, sizeof o);
    if (!t && (t = chat_tokenizer(true, NULL), dsv3_grammar_open(&any, t, NULL, 0, NULL, &e)))
        abort();
    if (size == 0)
        return 0;
    const dsv3_markup markup = markups[data[0] % DSV3__COUNT(markups)];
    o.like = any;
    o.spacing = (dsv3_spacing)(data[0] / DSV3__COUNT(markups) % 3);
    const uint64_t hash = dsv3__hash(0, data, size);
    o.max_states = hash % 16 ? 300 : 3000;
    o.memory_limit = 16 << 20;
    tools.p = (const char *)data + 1, tools.len = size - 1;
    dsv3_result r = dsv3_grammar_open_tools(&g, t, tools, markup, &o, &e);
    if (r != e.code || !r != (g != NULL))
        abort();
    if (r && r != DSV3_ERROR_JSON && r != DSV3_ERROR_SCHEMA)
        abort(); /* the limits hold before the memory does */
    if (!r)
        walk(g, t, markup, tools, hash, hash / 16 % 8 ? SHORT : LONG, hash / 128 % 8 ? -1 : (int)(hash / 1024 % SHORT));
    dsv3_grammar_close(g);
    return 0;
}

#include "fuzz.h"
