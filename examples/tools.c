/* A tool called and answered in a loop: the model may ask for add(a, b); its call is read from the stream by name and
   arguments, computed here, given back as a message, and the model goes on, until it answers in words.

     cc -O2 -I. examples/tools.c -o tools -lm -pthread
     ./tools DIR "What is 17 and 25?"          with a checkpoint that knows tools: DeepSeek-V3.1, Kimi-K2-Thinking
     ./tools DIR "What is 17 and 25?" add      the first reply must call add, with arguments that fit its schema
     ./tools DIR "What is 17 and 25?" any      it must call a tool, whichever */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char tools[] =
    "[{\"type\": \"function\", \"function\": {\"name\": \"add\", \"description\": \"The sum of two numbers.\", "
    "\"parameters\": {\"type\": \"object\", \"properties\": {\"a\": {\"type\": \"number\"}, \"b\": {\"type\": "
    "\"number\"}}, \"required\": [\"a\", \"b\"]}}}]";

enum { MAX_CALLS = 4, MAX_ROUNDS = 4, MAX_TOKENS = 4096 };

/* A text that grows within its bounds; what is beyond is lost. */
typedef struct buffer {
    char p[4096];
    size_t n;
} buffer;

static void add(buffer *b, const char *p, size_t n)
{
    n = n < sizeof b->p - b->n ? n : sizeof b->p - b->n;
    memcpy(b->p + b->n, p, n);
    b->n += n;
}

static dsv3_text text_of(const buffer *b)
{
    dsv3_text text = {NULL, 0};
    text.p = b->p;
    text.len = b->n;
    return text;
}

/* One reply, taken apart. */
typedef struct heard {
    buffer answer, reasoning;
    buffer id[MAX_CALLS], name[MAX_CALLS], arguments[MAX_CALLS];
    uint32_t n_calls;
} heard;

static bool hear(void *user, const dsv3_reply_event *event)
{
    heard *h = (heard *)user;
    uint32_t k = event->call < MAX_CALLS ? event->call : MAX_CALLS - 1;
    switch (event->kind) {
    case DSV3_REPLY_REASONING: add(&h->reasoning, event->text, event->len); break;
    case DSV3_REPLY_ANSWER: add(&h->answer, event->text, event->len); break;
    case DSV3_REPLY_CALL_ID: add(&h->id[k], event->text, event->len); break;
    case DSV3_REPLY_CALL_NAME:
        h->name[k].n = 0;
        add(&h->name[k], event->text, event->len);
        h->n_calls = k + 1;
        break;
    case DSV3_REPLY_CALL_ARGUMENTS: add(&h->arguments[k], event->text, event->len); break;
    default: break;
    }
    return true;
}

static bool read_token(void *user, const dsv3_token *token)
{
    return token->id < 0 || dsv3_reply_put((dsv3_reply *)user, token->id);
}

static void check(dsv3_result result, const dsv3_error *error)
{
    if (!result)
        return;
    fprintf(stderr, "tools: %s\n", error->message);
    exit(1);
}

/* The number behind "key": in a flat object. A host would use its JSON reader. */
static double number(const buffer *json, const char *key)
{
    char text[sizeof json->p + 1];
    memcpy(text, json->p, json->n);
    text[json->n] = 0;
    const char *at = strstr(text, key);
    at = at ? strchr(at, ':') : NULL;
    return at ? strtod(at + 1, NULL) : 0;
}

/* Runs the call; an error is an answer too: the model may do better. */
static void call_tool(const buffer *name, const buffer *arguments, buffer *result)
{
    char text[64];
    result->n = 0;
    if (name->n == 3 && memcmp(name->p, "add", 3) == 0)
        snprintf(text, sizeof text, "%g", number(arguments, "\"a\"") + number(arguments, "\"b\""));
    else
        snprintf(text, sizeof text, "error: no such tool");
    add(result, text, strlen(text));
    printf("%.*s(%.*s) = %s\n", (int)name->n, name->p, (int)arguments->n, arguments->p, text);
}

int main(int argc, char **argv)
{
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: tools DIR QUESTION [TOOL]\n");
        return 2;
    }
    static heard replies[MAX_ROUNDS];
    static buffer results[MAX_ROUNDS][MAX_CALLS];
    static dsv3_tool_call calls[MAX_ROUNDS][MAX_CALLS];
    static dsv3_message messages[1 + MAX_ROUNDS * (1 + MAX_CALLS)];
    static int32_t ids[MAX_TOKENS];
    dsv3_error error;
    dsv3_model *model;
    dsv3_session *session;
    const dsv3_tokenizer *tokenizer;
    dsv3_chat_opts opts = {0};
    dsv3_generate_opts generate = {0};
    dsv3_tool_call must = {{0}, {0}, {0}};
    dsv3_grammar *grammar = NULL;
    size_t n = 1;
    check(dsv3_model_open(&model, argv[1], NULL, &error), &error);
    check(dsv3_model_tokenizer(model, &tokenizer, &error), &error);
    check(dsv3_chat_markup(tokenizer, &opts.markup, &error), &error);
    check(dsv3_session_open(&session, model, NULL, &error), &error);
    opts.add_generation_prompt = true;
    opts.tools.p = tools;
    opts.tools.len = strlen(tools);
    dsv3_model_sampling(model, &generate.sample);
    generate.max_tokens = 1000;
    if (argc == 4 && strcmp(argv[3], "any") == 0) {
        check(dsv3_grammar_open_tools(&grammar, tokenizer, opts.tools, opts.markup, NULL, &error), &error);
    } else if (argc == 4) {
        must.name.p = argv[3], must.name.len = strlen(argv[3]);
        must.id.p = "functions.add:0", must.id.len = 15; /* Kimi's way to name a call */
        check(dsv3_grammar_open_tool(&grammar, tokenizer, opts.tools, must.name, NULL, &error), &error);
    }
    messages[0].role = DSV3_ROLE_USER;
    messages[0].content.p = argv[2];
    messages[0].content.len = strlen(argv[2]);

    for (int round = 0; round < MAX_ROUNDS; round++) {
        heard *h = &replies[round];
        size_t n_ids, same = 0, held = dsv3_session_length(session);
        dsv3_reply reply;
        dsv3_reply_opts how = {0};
        opts.call = how.call = grammar && round == 0 ? &must : NULL;
        generate.grammar = opts.call ? grammar : NULL;
        how.markup = opts.markup, how.event_fn = hear, how.user = h;
        check(dsv3_reply_init(&reply, tokenizer, &how, &error), &error);
        check(dsv3_chat_render(tokenizer, messages, n, &opts, ids, MAX_TOKENS, &n_ids, &error), &error);
        while (same < held && same < n_ids && dsv3_session_tokens(session)[same] == ids[same])
            same++;
        check(dsv3_session_rewind(session, same, &error), &error);
        check(dsv3_session_append(session, ids + same, n_ids - same, NULL, &error), &error);
        generate.token_fn = read_token, generate.user = &reply;
        check(dsv3_generate(session, NULL, 0, &generate, NULL, &error), &error);
        dsv3_reply_end(&reply);

        messages[n].role = DSV3_ROLE_ASSISTANT;
        messages[n].content = text_of(&h->answer);
        messages[n].reasoning = text_of(&h->reasoning);
        messages[n].tool_calls = h->n_calls ? calls[round] : NULL;
        messages[n++].n_tool_calls = h->n_calls;
        for (uint32_t k = 0; k < h->n_calls; k++) {
            calls[round][k].id = text_of(&h->id[k]);
            calls[round][k].name = text_of(&h->name[k]);
            calls[round][k].arguments = text_of(&h->arguments[k]);
            call_tool(&h->name[k], &h->arguments[k], &results[round][k]);
            messages[n].role = DSV3_ROLE_TOOL;
            messages[n].tool_call_id = text_of(&h->id[k]);
            messages[n++].content = text_of(&results[round][k]);
        }
        if (!h->n_calls) {
            printf("%.*s\n", (int)h->answer.n, h->answer.p);
            break;
        }
    }
    dsv3_session_close(session);
    dsv3_grammar_close(grammar);
    dsv3_model_close(model);
    return 0;
}
