/* From a checkpoint to text in one call: what a program needs at least, with every error looked at.
   The pieces of text come as they are made; whole characters, never a half.

     cc -O2 -I. examples/simple.c -o simple -lm -pthread
     ./simple examples/tiny "Once upon a time" */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <stdio.h>
#include <string.h>

static bool print_token(void *user, const dsv3_token *token)
{
    (void)user;
    fwrite(token->text, 1, token->len, stdout);
    fflush(stdout);
    return true; /* false would end it here */
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: simple DIR PROMPT\n");
        return 2;
    }

    dsv3_error error;
    dsv3_model *model;
    if (dsv3_model_open(&model, argv[1], NULL, &error)) {
        fprintf(stderr, "simple: %s\n", error.message);
        return 1;
    }
    dsv3_session *session;
    if (dsv3_session_open(&session, model, NULL, &error)) {
        fprintf(stderr, "simple: %s\n", error.message);
        dsv3_model_close(model);
        return 1;
    }

    dsv3_generate_opts opts = {0}; /* greedy, until the text ends */
    opts.max_tokens = 200;
    opts.token_fn = print_token;
    dsv3_model_sampling(model, &opts.sample); /* or as the checkpoint wants it */
    opts.sample.seed = 7;

    dsv3_stats stats;
    dsv3_result result = dsv3_generate(session, argv[2], strlen(argv[2]), &opts, &stats, &error);
    putchar('\n');
    if (result)
        fprintf(stderr, "simple: %s\n", error.message);

    dsv3_session_close(session);
    dsv3_model_close(model);
    return result ? 1 : 0;
}
