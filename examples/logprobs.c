/* How likely a model finds a text: for each token its probability, and what the model would rather have said. The whole
   text goes through in one append that gives the logits of every row; a language model's loss is their mean.

     cc -O2 -I. examples/logprobs.c -o logprobs -lm -pthread
     ./logprobs examples/tiny "Once upon a time there was a king." */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(dsv3_result result, const dsv3_error *error)
{
    if (result) {
        fprintf(stderr, "logprobs: %s\n", error->message);
        exit(1);
    }
}

/* log(sum(exp(row))), the largest taken out so that nothing overflows; also which is the largest.
   row        [vocab_size] */
static double log_sum_exp(const float *row, size_t vocab_size, size_t *best)
{
    double sum = 0;
    *best = 0;
    for (size_t i = 1; i < vocab_size; i++)
        if (row[i] > row[*best])
            *best = i;
    for (size_t i = 0; i < vocab_size; i++)
        sum += exp((double)row[i] - (double)row[*best]);
    return log(sum) + (double)row[*best];
}

/* A token's text in quotes; it may be a part of a character. */
static void print_token(const dsv3_tokenizer *tokenizer, int32_t token)
{
    size_t len;
    const char *text = dsv3_token_bytes(tokenizer, token, &len);
    putchar('"');
    for (size_t i = 0; i < len; i++)
        if ((unsigned char)text[i] < 0x20)
            printf("\\x%02x", (unsigned char)text[i]);
        else
            putchar(text[i]);
    putchar('"');
}

int main(int argc, char **argv)
{
    dsv3_error error;
    dsv3_model *model;
    dsv3_session *session;
    const dsv3_tokenizer *tokenizer;
    if (argc != 3) {
        fprintf(stderr, "usage: logprobs DIR TEXT\n");
        return 2;
    }
    check(dsv3_model_open(&model, argv[1], NULL, &error), &error);
    check(dsv3_model_tokenizer(model, &tokenizer, &error), &error);

    /* First how many, then the ids. Where no BOS is asked for, the first token has nothing before it and gets no number. */
    size_t n = 0, length = strlen(argv[2]), vocab_size = dsv3_model_config(model)->vocab_size;
    check(dsv3_tokenize(tokenizer, argv[2], length, DSV3_TOKENIZE_BOS, NULL, 0, &n, &error), &error);
    int32_t *tokens = (int32_t *)malloc((n + 1) * sizeof *tokens);          /* [n] */
    float *logits = (float *)malloc((n + 1) * vocab_size * sizeof *logits); /* [n, vocab_size] */
    if (!tokens || !logits) {
        fprintf(stderr, "logprobs: out of memory\n");
        return 1;
    }
    check(dsv3_tokenize(tokenizer, argv[2], length, DSV3_TOKENIZE_BOS, tokens, n, &n, &error), &error);

    dsv3_session_opts session_opts = {0};
    session_opts.max_tokens = (uint32_t)n + 1;
    check(dsv3_session_open(&session, model, &session_opts, &error), &error);
    dsv3_outputs outputs = {0};
    outputs.logits = logits;
    check(dsv3_session_append(session, tokens, n, &outputs, &error), &error);

    double total = 0;
    for (size_t t = 1; t < n; t++) { /* row t - 1 speaks of token t */
        const float *row = logits + (t - 1) * vocab_size;
        size_t best;
        double norm = log_sum_exp(row, vocab_size, &best), logprob = (double)row[tokens[t]] - norm;
        total += logprob;
        printf("%8.3f %7.2f%%  ", logprob, 100 * exp(logprob));
        print_token(tokenizer, tokens[t]);
        if ((int32_t)best != tokens[t]) {
            printf("   rather %.2f%% ", 100 * exp((double)row[best] - norm));
            print_token(tokenizer, (int32_t)best);
        }
        putchar('\n');
    }
    if (n > 1)
        printf("%zu tokens, %.3f nats each, perplexity %.2f, %.3f bits a byte\n", n - 1, -total / (double)(n - 1),
               exp(-total / (double)(n - 1)), -total / log(2.0) / (double)length);

    /* What comes next: the same numbers, ready made. */
    dsv3_sample next[5];
    if (n > 0) {
        check(dsv3_session_logprobs(session, 5, next, &error), &error);
        printf("next: ");
        for (int i = 0; i < 5; i++) {
            print_token(tokenizer, next[i].token);
            printf(" %.2f%%  ", 100 * exp((double)next[i].logprob));
        }
        putchar('\n');
    }

    free(tokens);
    free(logits);
    dsv3_session_close(session);
    dsv3_model_close(model);
    return 0;
}
