/* A conversation, in as few lines as an honest one takes: each line of stdin is a message, the answer streams to stdout,
   reasoning to stderr. The whole conversation is rendered each time; what the session holds of it from the beginning is
   kept, so that a turn costs what is new.

     cc -O2 -I. examples/chat.c -o chat -lm -pthread
     ./chat examples/tiny                      or, where the checkpoint's template is not known,
     ./chat DIR v3                             with one of v3 r1 r1-think v3.1 kimi-k2 kimi-k2-thinking gigachat3 */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_MESSAGES = 200, MAX_TOKENS = 4096, MAX_LINE = 4096 };

static char answer[65536]; /* what the assistant says now */
static size_t answer_len;

static void check(dsv3_result result, const dsv3_error *error)
{
    if (!result)
        return;
    fprintf(stderr, "chat: %s\n", error->message);
    exit(1);
}

/* A piece of the reply, by its kind. */
static bool hear(void *user, const dsv3_reply_event *event)
{
    (void)user;
    if (event->kind == DSV3_REPLY_ANSWER && answer_len + event->len <= sizeof answer) {
        memcpy(answer + answer_len, event->text, event->len);
        answer_len += event->len;
        fwrite(event->text, 1, event->len, stdout);
        fflush(stdout);
    } else if (event->kind == DSV3_REPLY_REASONING) {
        fwrite(event->text, 1, event->len, stderr);
    }
    return true;
}

static bool read_token(void *user, const dsv3_token *token)
{
    return token->id < 0 || dsv3_reply_put((dsv3_reply *)user, token->id);
}

static dsv3_text keep(const char *p, size_t len)
{
    dsv3_text text = {NULL, 0};
    char *copy = (char *)malloc(len + 1);
    if (!copy)
        exit(1);
    memcpy(copy, p, len);
    text.p = copy;
    text.len = len;
    return text;
}

int main(int argc, char **argv)
{
    static dsv3_message messages[MAX_MESSAGES];
    static int32_t ids[MAX_TOKENS];
    static char line[MAX_LINE];
    size_t n = 0;
    dsv3_chat_opts opts = {0};
    dsv3_generate_opts generate = {0};
    dsv3_reply_opts how = {0};
    dsv3_reply reply;
    dsv3_error error;
    dsv3_model *model;
    dsv3_session *session;
    const dsv3_tokenizer *tokenizer;
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: chat DIR [MARKUP]\n");
        return 2;
    }
    for (int m = 1; argc == 3 && m <= DSV3_MARKUP_GIGACHAT3; m++)
        if (strcmp(argv[2], dsv3_markup_name((dsv3_markup)m)) == 0)
            opts.markup = (dsv3_markup)m;
    opts.add_generation_prompt = true;
    check(dsv3_model_open(&model, argv[1], NULL, &error), &error);
    check(dsv3_model_tokenizer(model, &tokenizer, &error), &error);
    check(dsv3_session_open(&session, model, NULL, &error), &error);
    dsv3_model_sampling(model, &generate.sample);
    generate.max_tokens = 300;
    generate.token_fn = read_token, generate.user = &reply;
    how.markup = opts.markup, how.event_fn = hear;

    while (n + 2 <= MAX_MESSAGES && fgets(line, sizeof line, stdin)) {
        messages[n].role = DSV3_ROLE_USER;
        messages[n++].content = keep(line, strcspn(line, "\n"));
        size_t n_ids, same = 0, held = dsv3_session_length(session);
        check(dsv3_chat_render(tokenizer, messages, n, &opts, ids, MAX_TOKENS, &n_ids, &error), &error);
        while (same < held && same < n_ids && dsv3_session_tokens(session)[same] == ids[same])
            same++;
        check(dsv3_session_rewind(session, same, &error), &error);
        check(dsv3_session_append(session, ids + same, n_ids - same, NULL, &error), &error);

        answer_len = 0;
        check(dsv3_reply_init(&reply, tokenizer, &how, &error), &error);
        check(dsv3_generate(session, NULL, 0, &generate, NULL, &error), &error);
        dsv3_reply_end(&reply);
        putchar('\n');
        messages[n].role = DSV3_ROLE_ASSISTANT;
        messages[n++].content = keep(answer, answer_len);
        generate.sample.seed++;
    }
    while (n)
        free((void *)(uintptr_t)messages[--n].content.p);
    dsv3_session_close(session);
    dsv3_model_close(model);
    return 0;
}
