/* A small scheduler: requests wait in a queue, come into one workspace as it has room, and are advanced together, a pass
   at a time. Long prompts go in by pieces, so that those who are writing never wait for more than one piece.

     cc -O2 -I. examples/batch.c -o batch -lm -pthread
     ./batch DIR "Once upon a time" "There was a king" "In the forest" ...     (or: ./batch DIR < lines)

   Fairness: each pass has room for PASS tokens. Every request that is writing gets its one token; what room is left goes to
   prompts, the one that has waited longest first. A request comes in when the pages for its prompt and its whole answer
   can be set aside (dsv3_session_opts.reserve_pages), in the order of the queue, so none that is in can run out of them. */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PASS = 64, ACTIVE = 8, PAGES = 64, PROMPT = 1024, ANSWER = 48, REQUESTS = 64 };

typedef struct request {
    char text[4096];
    int32_t prompt[PROMPT];
    size_t n_prompt, n_read, n_written;
    int32_t next; /* the token that was picked and is to be run */
    dsv3_session *session;
    unsigned joined, finished; /* passes */
} request;

static request requests[REQUESTS];

static void check(dsv3_result result, const dsv3_error *error)
{
    if (result == DSV3_OK)
        return;
    fprintf(stderr, "%s\n", error->message);
    exit(1);
}

/* Does it come in? Pages for all that it may ever hold, or not yet. */
static bool join(request *r, const dsv3_model *model, dsv3_workspace *workspace, unsigned pass)
{
    dsv3_session_opts opts;
    dsv3_error error;
    memset(&opts, 0, sizeof opts);
    opts.workspace = workspace;
    opts.max_tokens = (uint32_t)r->n_prompt + ANSWER;
    opts.reserve_pages = (opts.max_tokens + DSV3_PAGE_TOKENS - 1) / DSV3_PAGE_TOKENS;
    dsv3_result result = dsv3_session_open(&r->session, model, &opts, &error);
    if (result == DSV3_ERROR_CACHE_FULL)
        return false;
    check(result, &error);
    r->joined = pass;
    return true;
}

static void answer(const request *r, const dsv3_tokenizer *tokenizer)
{
    char text[8192];
    size_t n = 0;
    dsv3_error error;
    check(dsv3_detokenize(tokenizer, dsv3_session_tokens(r->session), dsv3_session_length(r->session),
                          DSV3_DETOKENIZE_SKIP_SPECIAL, text, sizeof text, &n, &error),
          &error);
    printf("[passes %u to %u] %.*s\n", r->joined, r->finished, (int)n, text);
}

int main(int argc, char **argv)
{
    dsv3_model *model;
    dsv3_workspace *workspace;
    dsv3_workspace_opts opts;
    dsv3_error error;
    const dsv3_tokenizer *tokenizer;
    size_t n = 0, waiting = 0, done = 0; /* requests; the first that is not in; those that are through */
    if (argc < 2) {
        fprintf(stderr, "usage: batch DIR [PROMPT...]; without a prompt: one a line from stdin\n");
        return 2;
    }
    memset(&opts, 0, sizeof opts);
    opts.n_pages = PAGES, opts.max_batch = PASS;
    check(dsv3_model_open(&model, argv[1], NULL, &error), &error);
    check(dsv3_model_tokenizer(model, &tokenizer, &error), &error);
    check(dsv3_workspace_open(&workspace, model, &opts, &error), &error);
    const dsv3_config *config = dsv3_model_config(model);
    for (; n < REQUESTS; n++) {
        request *r = &requests[n];
        if (argc > 2 ? (int)n + 2 == argc : !fgets(r->text, sizeof r->text, stdin))
            break;
        if (argc > 2)
            snprintf(r->text, sizeof r->text, "%s", argv[n + 2]);
        r->text[strcspn(r->text, "\n")] = 0;
        check(dsv3_tokenize(tokenizer, r->text, strlen(r->text), DSV3_TOKENIZE_BOS, r->prompt, PROMPT, &r->n_prompt,
                            &error),
              &error);
        if (!r->n_prompt) {
            fprintf(stderr, "prompt %u is empty\n", (unsigned)n + 1);
            return 2;
        }
    }
    for (unsigned pass = 0; done < n; pass++) {
        dsv3_batch_item items[ACTIVE];
        request *of[ACTIVE]; /* whose the items are */
        size_t n_items = 0, room = PASS;
        memset(items, 0, sizeof items);
        while (waiting < n && waiting - done < ACTIVE && join(&requests[waiting], model, workspace, pass))
            waiting++;
        for (int prompts = 0; prompts < 2; prompts++) /* who is writing; then prompts, the oldest first */
            for (size_t k = 0; k < waiting; k++) {
                request *r = &requests[k];
                const size_t left = r->n_prompt - r->n_read;
                if (!r->session || (left > 0) != (prompts > 0) || !room)
                    continue;
                of[n_items] = r;
                items[n_items].session = r->session;
                items[n_items].tokens = left ? r->prompt + r->n_read : &r->next;
                items[n_items].count = !left ? 1 : left < room ? left : room;
                room -= items[n_items].count;
                n_items++;
            }
        if (!n_items) {
            fprintf(stderr, "prompt %u does not fit into the workspace\n", (unsigned)waiting + 1);
            return 1;
        }
        check(dsv3_batch(items, n_items, &error), &error);
        for (size_t i = 0; i < n_items; i++) {
            request *r = of[i];
            dsv3_sample sample;
            bool end = false;
            if (r->n_read < r->n_prompt)
                r->n_read += items[i].count;
            else
                r->n_written++;
            if (r->n_read < r->n_prompt)
                continue;
            check(dsv3_session_sample(r->session, NULL, &sample, &error), &error);
            r->next = sample.token;
            for (uint32_t j = 0; j < config->n_eos; j++)
                end = end || config->eos_token_id[j] == sample.token;
            if (!end && r->n_written < ANSWER)
                continue;
            r->finished = pass;
            answer(r, tokenizer);
            dsv3_session_close(r->session);
            r->session = NULL;
            done++;
        }
    }
    dsv3_workspace_close(workspace);
    dsv3_model_close(model);
    return 0;
}
