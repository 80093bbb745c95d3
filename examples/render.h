/* dsv3 render: conversations as JSON to text and ids. Included once, by dsv3.c, behind cli.h. */
#ifndef DSV3_RENDER_H
#define DSV3_RENDER_H

static const char render_help[] =
    "dsv3 render DIR < JSON       a conversation -> its text in the checkpoint's markup\n"
    "\n"
    "  DIR              a checkpoint, or its tokenizer files alone\n"
    "  --markup NAME    auto (as the checkpoint's chat template says), v3, r1, r1-think, v3.1, kimi-k2,\n"
    "                   kimi-k2-thinking, gigachat3\n"
    "  --jsonl          a line in, a line out:\n"
    "                   {\"messages\":[...],\"add_generation_prompt\":bool,\"thinking\":bool,\"tools\":[...]}\n"
    "                   -> {\"rendered\":...,\"ids\":[...]}; one that cannot be rendered gives {\"error\":\"...\"}\n"
    "\n"
    "A message: {\"role\":\"system\"|\"user\"|\"assistant\"|\"tool\",\"content\":\"...\"} and, where they apply, "
    "name,\n"
    "reasoning_content, tool_call_id, prefix, tool_calls: "
    "[{\"id\":...,\"function\":{\"name\":...,\"arguments\":\"...\"}}].\n"
    "Contents are text: markers written in them are ordinary characters.\n";

static dsv3_markup markup_named(const char *command, const char *name)
{
    for (int i = DSV3_MARKUP_AUTO; i <= DSV3_MARKUP_GIGACHAT3; i++)
        if (strcmp(name, dsv3_markup_name((dsv3_markup)i)) == 0)
            return (dsv3_markup)i;
    usage("%s: --markup wants auto, v3, r1, r1-think, v3.1, kimi-k2, kimi-k2-thinking or gigachat3, found '%s'",
          command, name);
}

/* A conversation read from one line of JSON. Its strings lie in `pool`. */
typedef struct conversation {
    dsv3_message *messages; /* [n] */
    dsv3_tool_call *calls;  /* [n_calls] of all messages */
    size_t n, n_calls;
    dsv3_chat_opts opts;
    bytes pool, key;
} conversation;

static bool json_null(json *j)
{
    json_peek(j);
    if (j->end - j->p < 4 || memcmp(j->p, "null", 4) != 0)
        return false;
    j->p += 4;
    return true;
}

/* The next key of an object that has been opened, terminated; NULL at its end or after an error. */
static const char *json_key(json *j, bytes *key, bool *first)
{
    if (json_take(j, '}') || j->error)
        return NULL;
    if (!*first && !json_take(j, ',')) {
        json_fail(j, "expected a comma or the closing bracket");
        return NULL;
    }
    *first = false;
    key->n = 0;
    if (!json_string(j, key) || !(json_take(j, ':') || json_fail(j, "expected a colon")))
        return NULL;
    bytes_add(key, "", 1);
    return key->p;
}

static bool json_open(json *j, char bracket)
{
    return json_take(j, bracket) || json_fail(j, bracket == '{' ? "expected an object" : "expected a list");
}

/* The pool has room for all strings of the line: it never moves. */
static bool read_text(json *j, conversation *c, dsv3_text *text)
{
    size_t from = c->pool.n;
    if (json_null(j))
        return true;
    if (!json_string(j, &c->pool))
        return false;
    text->p = c->pool.p + from;
    text->len = c->pool.n - from;
    return true;
}

static void read_call(json *j, conversation *c, dsv3_tool_call *call, int depth)
{
    const char *key;
    dsv3_text type = {NULL, 0};
    bool first = true;
    if (!json_open(j, '{'))
        return;
    while ((key = json_key(j, &c->key, &first)) != NULL) {
        if (depth == 0 && strcmp(key, "id") == 0) {
            read_text(j, c, &call->id);
        } else if (depth == 0 && strcmp(key, "function") == 0) {
            read_call(j, c, call, 1);
        } else if (depth == 0 && strcmp(key, "type") == 0) {
            if (read_text(j, c, &type) && (type.len != 8 || memcmp(type.p, "function", 8) != 0))
                json_fail(j, "a tool call whose type is not \"function\"");
        } else if (depth == 1 && strcmp(key, "name") == 0) {
            read_text(j, c, &call->name);
        } else if (depth == 1 && strcmp(key, "arguments") == 0) {
            read_text(j, c, &call->arguments);
        } else {
            c->key.n = 0;
            json_skip(j, &c->key, 0);
        }
    }
}

static void read_calls(json *j, conversation *c, dsv3_message *m)
{
    bool first = true;
    if (json_null(j) || !json_open(j, '['))
        return;
    m->tool_calls = c->calls + c->n_calls;
    while (!json_take(j, ']') && !j->error) {
        if (!first && !json_take(j, ',')) {
            json_fail(j, "expected a comma or the closing bracket");
            return;
        }
        first = false;
        memset(&c->calls[c->n_calls], 0, sizeof *c->calls);
        read_call(j, c, &c->calls[c->n_calls], 0);
        c->n_calls++, m->n_tool_calls++;
    }
}

static void read_role(json *j, conversation *c, dsv3_message *m)
{
    static const char *const names[] = {"system", "user", "assistant", "tool"};
    c->key.n = 0;
    if (!json_string(j, &c->key))
        return;
    bytes_add(&c->key, "", 1);
    for (int i = 0; i < (int)COUNT(names); i++)
        if (strcmp(c->key.p, names[i]) == 0) {
            m->role = (dsv3_role)i;
            return;
        }
    json_fail(j, "a role that is not system, user, assistant or tool");
}

static void read_message(json *j, conversation *c, dsv3_message *m)
{
    const char *key;
    bool first = true, role = false;
    memset(m, 0, sizeof *m);
    if (!json_open(j, '{'))
        return;
    while ((key = json_key(j, &c->key, &first)) != NULL) {
        if (strcmp(key, "role") == 0) {
            role = true;
            read_role(j, c, m);
        } else if (strcmp(key, "content") == 0) {
            read_text(j, c, &m->content);
        } else if (strcmp(key, "reasoning_content") == 0) {
            read_text(j, c, &m->reasoning);
        } else if (strcmp(key, "name") == 0) {
            read_text(j, c, &m->name);
        } else if (strcmp(key, "tool_call_id") == 0) {
            read_text(j, c, &m->tool_call_id);
        } else if (strcmp(key, "tool_calls") == 0) {
            read_calls(j, c, m);
        } else if (strcmp(key, "prefix") == 0) {
            json_bool(j, &m->prefix);
        } else {
            c->key.n = 0;
            json_skip(j, &c->key, 0);
        }
    }
    if (!role)
        json_fail(j, "a message without a role");
}

static void read_messages(json *j, conversation *c)
{
    bool first = true;
    if (!json_open(j, '['))
        return;
    while (!json_take(j, ']') && !j->error) {
        if (!first && !json_take(j, ',')) {
            json_fail(j, "expected a comma or the closing bracket");
            return;
        }
        first = false;
        read_message(j, c, &c->messages[c->n]);
        c->n++;
    }
}

/* An unknown key is passed over; of a key given twice the last counts. */
static bool conversation_read(conversation *c, json *j)
{
    const char *key;
    bool first = true, messages = false;
    size_t objects = 1, length = (size_t)(j->end - j->p);
    for (const char *p = j->p; p < j->end; p++)
        objects += *p == '{';
    c->messages = (dsv3_message *)grow(c->messages, objects, sizeof *c->messages);
    c->calls = (dsv3_tool_call *)grow(c->calls, objects, sizeof *c->calls);
    c->n = c->n_calls = c->pool.n = 0;
    bytes_room(&c->pool, length + 1);
    c->opts.add_generation_prompt = c->opts.thinking = false;
    c->opts.tools.p = NULL;
    if (!json_open(j, '{'))
        return false;
    while ((key = json_key(j, &c->key, &first)) != NULL) {
        if (strcmp(key, "messages") == 0) {
            messages = true, c->n = 0;
            read_messages(j, c);
        } else if (strcmp(key, "add_generation_prompt") == 0) {
            json_bool(j, &c->opts.add_generation_prompt);
        } else if (strcmp(key, "thinking") == 0) {
            json_bool(j, &c->opts.thinking);
        } else {
            bool tools = strcmp(key, "tools") == 0 && !json_null(j);
            json_peek(j);
            const char *from = j->p;
            c->key.n = 0;
            json_skip(j, &c->key, 0);
            if (tools)
                c->opts.tools.p = from, c->opts.tools.len = (size_t)(j->p - from);
        }
    }
    if (!j->error && json_peek(j))
        json_fail(j, "something behind the object");
    return j->error ? false : messages || json_fail(j, "no \"messages\" in the line");
}

/* Both forms; the room is asked for first. */
static dsv3_result conversation_render(const conversation *c, const dsv3_tokenizer *t, bytes *text, ids *list,
                                       dsv3_error *error)
{
    size_t n_text = 0, n = 0;
    text->n = list->n = 0;
    dsv3_result r = dsv3_chat_text(t, c->messages, c->n, &c->opts, NULL, 0, &n_text, error);
    if (!r)
        r = dsv3_chat_text(t, c->messages, c->n, &c->opts, bytes_room(text, n_text + 1), n_text + 1, &text->n, error);
    if (!r && list->cap <= n_text)
        ids_room(list, n_text + 1); /* a token is at least a byte */
    if (!r)
        r = dsv3_chat_render(t, c->messages, c->n, &c->opts, list->p, list->cap, &n, error);
    list->n = n;
    return r;
}

static void render_lines(const dsv3_tokenizer *t, conversation *c)
{
    bytes line = {NULL, 0, 0}, text = {NULL, 0, 0}, out = {NULL, 0, 0};
    ids list = {NULL, 0, 0};
    while (line_read(&line)) {
        dsv3_error error;
        json j = {line.p, line.p, line.p + line.n, NULL, 0};
        error.code = DSV3_OK;
        if (conversation_read(c, &j))
            conversation_render(c, t, &text, &list, &error);
        if (j.error || error.code) {
            text.n = 0;
            if (j.error)
                bytes_format(&text, "byte %" PRIu64 ": %s", (uint64_t)j.error_at, j.error);
            else
                bytes_format(&text, "%s", error.message);
            bytes_format(&out, "{\"error\":");
            json_text(&out, text.p, text.n);
        } else {
            bytes_format(&out, "{\"rendered\":");
            json_text(&out, text.p, text.n);
            bytes_format(&out, ",\"ids\":[");
            for (size_t i = 0; i < list.n; i++)
                bytes_format(&out, i ? ",%" PRId32 : "%" PRId32, list.p[i]);
            bytes_add(&out, "]", 1);
        }
        bytes_add(&out, "}\n", 2);
        bytes_print(&out);
        fflush(stdout);
    }
    free(line.p), free(text.p), free(out.p), free(list.p);
}

static int render(int argc, char **argv)
{
    const char *dir, *markup = "auto";
    bool jsonl = false;
    const option options[] = {
        {"--jsonl", OPTION_FLAG, &jsonl, 0, 0},
        {"--markup", OPTION_TEXT, &markup, 0, 0},
    };
    arguments(argc, argv, render_help, options, COUNT(options), &dir, 1);
    conversation c;
    dsv3_tokenizer *tokenizer;
    dsv3_error error;
    memset(&c, 0, sizeof c);
    c.opts.markup = markup_named("render", markup);
    check(dsv3_tokenizer_open(&tokenizer, dir, NULL, &error), &error);
    if (jsonl) {
        render_lines(tokenizer, &c);
    } else {
        bytes in = file_read("-"), text = {NULL, 0, 0};
        ids list = {NULL, 0, 0};
        json j = {in.p, in.p, in.p + in.n, NULL, 0};
        if (!conversation_read(&c, &j))
            fail("render: byte %" PRIu64 " of stdin: %s", (uint64_t)j.error_at, j.error);
        check(conversation_render(&c, tokenizer, &text, &list, &error), &error);
        if (isatty(fileno(stdout)) && text.n && text.p[text.n - 1] != '\n')
            bytes_add(&text, "\n", 1);
        bytes_print(&text);
        free(in.p), free(text.p), free(list.p);
    }
    dsv3_tokenizer_close(tokenizer);
    free(c.messages), free(c.calls), free(c.pool.p), free(c.key.p);
    return finish();
}

#endif /* DSV3_RENDER_H */
