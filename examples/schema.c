/* A text that must fit a JSON Schema: the schema is compiled once, and generation may only go where it allows.
   Whatever the model would rather write, what comes out parses and fits.

     cc -O2 -I. examples/schema.c -o schema -lm -pthread
     ./schema examples/tiny "Once upon a time" */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <stdio.h>
#include <string.h>

static const char schema[] =
    "{"
    "  \"type\": \"object\","
    "  \"properties\": {"
    "    \"hero\":   {\"type\": \"string\", \"minLength\": 2, \"maxLength\": 16},"
    "    \"animal\": {\"enum\": [\"cat\", \"dog\", \"bird\", \"frog\"]},"
    "    \"age\":    {\"type\": \"integer\", \"minimum\": 3, \"maximum\": 99},"
    "    \"friends\": {\"type\": \"array\", \"items\": {\"type\": \"string\", \"pattern\": \"^[A-Z][a-z]{1,8}$\"},"
    "                \"maxItems\": 3}"
    "  },"
    "  \"required\": [\"hero\", \"animal\", \"age\", \"friends\"],"
    "  \"additionalProperties\": false"
    "}";

static bool print_token(void *user, const dsv3_token *token)
{
    (void)user;
    fwrite(token->text, 1, token->len, stdout);
    fflush(stdout);
    return true;
}

int main(int argc, char **argv)
{
    dsv3_error error = {DSV3_OK, 0, 0, ""};
    dsv3_model *model = NULL;
    dsv3_session *session = NULL;
    dsv3_grammar *grammar = NULL;
    const dsv3_tokenizer *tokenizer;
    dsv3_generate_opts opts = {0};
    dsv3_stats stats;
    if (argc != 3) {
        fprintf(stderr, "usage: schema DIR PROMPT\n");
        return 2;
    }
    opts.max_tokens = 200; /* should it come to that, the text is the beginning of one that fits */
    opts.sample.temperature = 1;
    opts.sample.seed = 5;
    opts.token_fn = print_token;

    bool ok = !dsv3_model_open(&model, argv[1], NULL, &error) && !dsv3_model_tokenizer(model, &tokenizer, &error) &&
              !dsv3_grammar_open(&grammar, tokenizer, schema, strlen(schema), NULL, &error) &&
              !dsv3_session_open(&session, model, NULL, &error);
    opts.grammar = grammar; /* serves any number of sessions */
    ok = ok && !dsv3_generate(session, argv[2], strlen(argv[2]), &opts, &stats, &error);
    if (ok)
        putchar('\n');
    else
        fprintf(stderr, "schema: %s\n", error.message);

    dsv3_session_close(session);
    dsv3_grammar_close(grammar);
    dsv3_model_close(model);
    return ok ? 0 : 1;
}
