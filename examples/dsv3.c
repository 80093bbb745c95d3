/* dsv3: runs a checkpoint from the command line. All it does goes through the public calls of dsv3.h.

     dsv3 chat DIR                            a conversation (chat_tui.h)
     dsv3 generate DIR "Once upon a time"     writes on
     dsv3 tokenize DIR < text                 text -> ids
     dsv3 detokenize DIR < ids                ids -> text
     dsv3 render DIR < conversation           messages -> text and ids (render.h)
     dsv3 logits DIR --ids FILE --out FILE    the numbers behind the next token, for every token of FILE
     dsv3 inspect DIR                         what is in a checkpoint, and what it needs
     dsv3 quantize DIR OUT --to int8          the checkpoint again, in 8 bits (quantize.h)
     dsv3 experts DIR -f TEXT                 which experts a text goes through (experts.h)

   Stdout carries the result and nothing else, so that it can be piped. The progress bar and the speed go to stderr,
   and only to a terminal. Exit status: 0, 1 where the library or a file failed, 2 for wrong use, 130 after Ctrl-C.
   Build: cc -O2 -I. examples/dsv3.c -o dsv3 -lm -pthread */

#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L /* isatty, fileno, clock_gettime under -std=c99 */
#endif
#if defined(_WIN32) && !defined(__USE_MINGW_ANSI_STDIO)
#define __USE_MINGW_ANSI_STDIO 1
#endif

#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "cli.h"

// ---- Opening ---------------------------------------------------------------------------------------------

static dsv3_model *model_open(const char *dir, dsv3_isa isa, dsv3_compute compute, bool read_ahead)
{
    dsv3_model_opts opts;
    dsv3_model *model;
    dsv3_error error;
    memset(&opts, 0, sizeof opts);
    opts.isa = isa;
    opts.compute = compute;
    opts.read_ahead = read_ahead;
    opts.logger.fn = log_warning;
    opts.progress = bar("opening");
    check(dsv3_model_open(&model, dir, &opts, &error), &error);
    bar_clear();
    return model;
}

static const char *cache_latent, *cache_rope; /* --cache and --cache-rope; NULL: not given */
static bool expand;                           /* --expand */

static dsv3_cache cache_type(const char *name, const char *flag)
{
    static const char *const names[] = {"auto", "f32", "bf16", "i8"};
    uint32_t i = 0;
    while (name && i < COUNT(names) && strcmp(name, names[i]) != 0)
        i++;
    if (i == COUNT(names))
        usage("%s %s: auto, f32, bf16 or i8", flag, name);
    return (dsv3_cache)i;
}

static dsv3_session *session_open(const dsv3_model *model, uint32_t max_tokens, uint32_t max_batch, uint32_t n_threads,
                                  uint32_t n_draft, dsv3_drafter drafter)
{
    dsv3_session_opts opts;
    dsv3_session *session;
    dsv3_error error;
    memset(&opts, 0, sizeof opts);
    opts.max_tokens = max_tokens;
    opts.max_batch = max_batch;
    opts.n_threads = n_threads;
    opts.cache_latent = cache_type(cache_latent, "--cache");
    opts.cache_rope = cache_type(cache_rope, "--cache-rope");
    opts.expand = expand;
    opts.n_draft = n_draft;
    opts.drafter = drafter;
    opts.progress = bar("reading the prompt");
    check(dsv3_session_open(&session, model, &opts, &error), &error);
    return session;
}

/* --draft N, auto or off. */
static uint32_t draft_parse(const char *text)
{
    char *end = NULL;
    if (!text || strcmp(text, "off") == 0)
        return 0;
    if (strcmp(text, "auto") == 0)
        return DSV3_DRAFT_AUTO;
    unsigned long n = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || n > 16)
        usage("--draft %s: a number up to 16, auto or off", text);
    return (uint32_t)n;
}

static dsv3_drafter drafter_parse(const char *text)
{
    if (text && strcmp(text, "mtp") != 0 && strcmp(text, "lookup") != 0)
        usage("--drafter %s: mtp or lookup", text);
    return !text ? DSV3_DRAFTER_AUTO : text[0] == 'm' ? DSV3_DRAFTER_MTP : DSV3_DRAFTER_LOOKUP;
}

// ---- generate --------------------------------------------------------------------------------------------

static const char generate_help[] =
    "dsv3 generate DIR [PROMPT | -f FILE | -]    writes on behind the prompt\n"
    "\n"
    "  PROMPT                   the text to continue; none: the checkpoint starts by itself\n"
    "  -f FILE                  the prompt is this file, as it is\n"
    "  -                        the prompt comes from stdin\n"
    "  -n N                     how many tokens at most (default 256; 0: until the text ends or the context is full)\n"
    "  --context N              room for prompt and answer together (default: 4096, or the checkpoint's own if less)\n"
    "  --stop STRING            end before this text; may be given several times\n"
    "  --ignore-eos             go on behind the checkpoint's end of text\n"
    "  --json-output            what is written is one JSON object, and ends with it\n"
    "  --json-schema FILE       what is written is JSON that fits this JSON Schema; -: from stdin\n"
    "  --spacing HOW            of that JSON: one (a space behind comma and colon, or none), none, any (default: one)\n"
    "\n"
    "Sampling: the checkpoint's own (generation_config.json), each value replaced by the option that names it.\n"
    "  --greedy                 always the likeliest token\n"
    "  --temp T                 temperature; 0 is greedy\n"
    "  --top-k K                among the K likeliest\n"
    "  --top-p P                among the likeliest that sum up to P\n"
    "  --min-p P                among those at least P times as likely as the likeliest\n"
    "  --repetition-penalty R   above 1: makes tokens that were there less likely\n"
    "  --presence-penalty R     the same, by subtraction\n"
    "  --seed N                 the same seed, the same text (default: drawn from the clock)\n"
    "\n"
    "  --session FILE           goes on from the session in FILE, if it is there, and leaves it there at the end\n"
    "  --parallel N             N texts behind one prompt, with the seeds from --seed on, written together\n"
    "\n"
    "  --no-bos                 no begin-of-text token in front\n"
    "  --parse-special          markers written in the prompt are tokens, not text\n"
    "  --ids                    the prompt is token ids, separated by white space; nothing is put in front\n"
    "  --json                   a JSON object a token: id, text, logprob; a last one with stats\n"
    "  --draft N                guess so many tokens ahead and verify them in one pass, the text stays the same: 0 to "
    "16,\n"
    "                           or auto: as many as pay (default: 0)\n"
    "  --drafter WHO            mtp (the checkpoint's prediction layer), lookup (what followed the same words "
    "before);\n"
    "                           default: mtp where there is one\n"
    "  --threads N              default: as many as cores\n"
    "  --isa NAME               auto, scalar, avx2, avx-vnni, avx512, avx512-vnni, avx512-bf16,\n"
    "                           avx512-amx, neon (the results are the same)\n"
    "  --compute MODE           auto, f32, bf16, fp8, int8, tiles: how weights meet activations\n"
    "  --cache TYPE             f32, bf16, i8: how the latents of the context are kept (default: bf16; f32 in f32)\n"
    "  --cache-rope TYPE        and its rotated keys (default: f32, or bf16 where --cache says less)\n"
    "  --read-ahead             ask a slow disk for experts once they are chosen: for a model larger than memory\n"
    "  --expand                 reads long prompts faster; results then depend on the pieces they are read in, too\n";

/* What token_fn works on. */
typedef struct writer {
    bool json;
    bool text;  /* there is a tokenizer; otherwise ids are printed */
    bool any;   /* something was written */
    char last;  /* last byte of text written */
    bytes line; /* json: the line of the last token, still open, since held-back text may follow */
    bytes held; /* its text */
    float logprob;
} writer;

/* The last token's line ends when the next one comes. */
static void writer_end_line(writer *w)
{
    if (!w->line.n)
        return;
    json_text(&w->line, w->held.p, w->held.n);
    bytes_format(&w->line, ",\"logprob\":");
    json_number(&w->line, (double)w->logprob);
    bytes_add(&w->line, "}\n", 2);
    bytes_print(&w->line);
    w->held.n = 0;
}

static bool write_token(void *user, const dsv3_token *token)
{
    writer *w = (writer *)user;
    bar_clear();
    if (w->json) {
        if (token->id >= 0) {
            writer_end_line(w);
            bytes_format(&w->line, "{\"id\":%" PRId32 ",\"text\":", token->id);
            w->logprob = token->logprob;
        }
        bytes_add(&w->held, token->text, token->len);
    } else if (w->text) {
        fwrite(token->text, 1, token->len, stdout);
        if (token->len)
            w->last = token->text[token->len - 1];
    } else if (token->id >= 0) {
        printf(w->any ? " %" PRId32 : "%" PRId32, token->id);
    }
    w->any = true;
    return fflush(stdout) == 0 && !ferror(stdout);
}

static dsv3_session *running; /* what Ctrl-C cancels */

static void interrupt(int signal_number)
{
    dsv3_session_cancel(running);
    signal(signal_number, SIG_DFL); /* a second one ends the program */
}

static const char *stop_name(dsv3_stop stop)
{
    static const char *const names[] = {"none",    "eos",      "token",     "string", "max_tokens",
                                        "context", "callback", "cancelled", "grammar"};
    return (size_t)stop < COUNT(names) ? names[stop] : "?";
}

static double rate(uint64_t n, double time)
{
    return time > 0 ? (double)n / time : 0;
}

/* The last line of --json. */
static void write_stats(writer *w, const dsv3_stats *stats, uint64_t seed, dsv3_isa isa)
{
    bytes_format(&w->line, "{\"stats\":{\"n_prompt\":%" PRIu64 ",\"n_generated\":%" PRIu64, stats->n_prompt,
                 stats->n_generated);
    bytes_format(&w->line, ",\"prompt_seconds\":%.6f,\"decode_seconds\":%.6f", stats->prompt_seconds,
                 stats->decode_seconds);
    bytes_format(&w->line, ",\"prompt_tokens_per_second\":%.2f", rate(stats->n_prompt, stats->prompt_seconds));
    bytes_format(&w->line, ",\"tokens_per_second\":%.2f", rate(stats->n_generated, stats->decode_seconds));
    bytes_format(&w->line, ",\"drafted\":%" PRIu64 ",\"accepted\":%" PRIu64 ",\"draft_seconds\":%.6f", stats->drafted,
                 stats->accepted, stats->draft_seconds);
    bytes_format(&w->line, ",\"stop\":\"%s\",\"seed\":%" PRIu64 ",\"isa\":\"%s\"}}\n", stop_name(stats->stop), seed,
                 dsv3_isa_name(isa));
    bytes_print(&w->line);
}

/* For the reader at the terminal. */
static void show_speed(const dsv3_stats *stats, const dsv3_sample_opts *sample)
{
    fprintf(stderr, "[prompt: %" PRIu64 " tokens, %.1f a second; text: %" PRIu64 " tokens, %.1f a second",
            stats->n_prompt, rate(stats->n_prompt, stats->prompt_seconds), stats->n_generated,
            rate(stats->n_generated, stats->decode_seconds));
    if (stats->drafted)
        fprintf(stderr, "; guessed: %" PRIu64 ", right: %" PRIu64, stats->drafted, stats->accepted);
    if (sample->temperature > 0)
        fprintf(stderr, "; seed %" PRIu64, sample->seed);
    fprintf(stderr, "; %s]\n", stop_name(stats->stop));
}

/* What the sampling options said; a negative number: nothing. */
typedef struct sampling {
    bool greedy;
    uint32_t top_k;                                                        /* UINT32_MAX: not given */
    float temperature, top_p, min_p, repetition_penalty, presence_penalty; /* presence: below -100 */
    uint64_t seed;
} sampling;

static void sampling_choose(dsv3_sample_opts *o, const sampling *given, const dsv3_model *model)
{
    if (!given->greedy)
        dsv3_model_sampling(model, o);
    if (!given->greedy && given->temperature >= 0)
        o->temperature = given->temperature;
    if (given->top_k != UINT32_MAX)
        o->top_k = given->top_k;
    if (given->top_p >= 0)
        o->top_p = given->top_p;
    if (given->min_p >= 0)
        o->min_p = given->min_p;
    if (given->repetition_penalty >= 0)
        o->repetition_penalty = given->repetition_penalty;
    if (given->presence_penalty >= -100)
        o->presence_penalty = given->presence_penalty;
    o->seed = given->seed;
}

/* What --json-output and --json-schema ask for; NULL: nothing. */
static dsv3_grammar *grammar_open(const dsv3_tokenizer *tokenizer, const char *schema_file, bool any_json,
                                  const char *spacing)
{
    static const char *const names[] = {"one", "none", "any"};
    dsv3_grammar *grammar = NULL;
    dsv3_grammar_opts opts;
    dsv3_error error;
    bytes schema = {NULL, 0, 0};
    memset(&opts, 0, sizeof opts);
    int how = 0;
    while (spacing && how < 3 && strcmp(spacing, names[how]) != 0)
        how++;
    if (how == 3)
        usage("--spacing %s: one, none or any", spacing);
    opts.spacing = (dsv3_spacing)how;
    if (!schema_file && !any_json)
        return NULL;
    if (schema_file && any_json)
        usage("generate: --json-output and --json-schema: give one of them");
    if (schema_file)
        schema = file_read(schema_file);
    else
        bytes_format(&schema, "{\"type\":\"object\"}");
    if (dsv3_grammar_open(&grammar, tokenizer, schema.p ? schema.p : "", schema.n, &opts, &error))
        fail("%s: %s", schema_file ? schema_file : "--json-output", error.message);
    free(schema.p);
    return grammar;
}

#include "sessions.h"

static int generate(int argc, char **argv)
{
    const char *file = NULL, *schema = NULL, *spacing = NULL, *kept = NULL, *words[2] = {NULL, NULL};
    const char *draft = NULL, *drafter = NULL;
    uint32_t context = 0, n_threads = 0, n_texts = 0;
    bool by_ids = false, read_ahead = false, json_output = false;
    dsv3_isa isa = DSV3_ISA_AUTO;
    dsv3_compute compute = DSV3_COMPUTE_AUTO;
    sampling given = {false, UINT32_MAX, -1, -1, -1, -1, -1000, (uint64_t)time(NULL) % 1000000007u};
    texts stops;
    writer w;
    dsv3_generate_opts opts;
    memset(&stops, 0, sizeof stops);
    memset(&w, 0, sizeof w);
    memset(&opts, 0, sizeof opts);
    opts.max_tokens = 256;
    const option options[] = {
        {"-f", OPTION_TEXT, &file, 0, 0},
        {"-n", OPTION_COUNT, &opts.max_tokens, 0, 0},
        {"--context", OPTION_COUNT, &context, 0, 0},
        {"--stop", OPTION_TEXTS, &stops, 0, 0},
        {"--ignore-eos", OPTION_FLAG, &opts.ignore_eos, 0, 0},
        {"--json-output", OPTION_FLAG, &json_output, 0, 0},
        {"--json-schema", OPTION_TEXT, &schema, 0, 0},
        {"--spacing", OPTION_TEXT, &spacing, 0, 0},
        {"--greedy", OPTION_FLAG, &given.greedy, 0, 0},
        {"--temp", OPTION_REAL, &given.temperature, 0, 100},
        {"--top-k", OPTION_COUNT, &given.top_k, 0, 0},
        {"--top-p", OPTION_REAL, &given.top_p, 0, 1},
        {"--min-p", OPTION_REAL, &given.min_p, 0, 1},
        {"--repetition-penalty", OPTION_REAL, &given.repetition_penalty, 0, 100},
        {"--presence-penalty", OPTION_REAL, &given.presence_penalty, -100, 100},
        {"--seed", OPTION_SEED, &given.seed, 0, 0},
        {"--session", OPTION_TEXT, &kept, 0, 0},
        {"--cache", OPTION_TEXT, &cache_latent, 0, 0},
        {"--cache-rope", OPTION_TEXT, &cache_rope, 0, 0},
        {"--parallel", OPTION_COUNT, &n_texts, 0, 0},
        {"--no-bos", OPTION_FLAG, &opts.no_bos, 0, 0},
        {"--parse-special", OPTION_FLAG, &opts.parse_markers, 0, 0},
        {"--ids", OPTION_FLAG, &by_ids, 0, 0},
        {"--json", OPTION_FLAG, &w.json, 0, 0},
        {"--threads", OPTION_COUNT, &n_threads, 0, 0},
        {"--isa", OPTION_ISA, &isa, 0, 0},
        {"--compute", OPTION_COMPUTE, &compute, 0, 0},
        {"--read-ahead", OPTION_FLAG, &read_ahead, 0, 0},
        {"--expand", OPTION_FLAG, &expand, 0, 0},
        {"--draft", OPTION_TEXT, &draft, 0, 0},
        {"--drafter", OPTION_TEXT, &drafter, 0, 0},
    };
    arguments(argc, argv, generate_help, options, COUNT(options), words, 2);
    if (file && words[1])
        usage("generate: a prompt and -f FILE: give one of them");
    const uint32_t n_draft = draft_parse(draft);
    const dsv3_drafter who = drafter_parse(drafter);
    if (n_texts && (kept || stops.n || schema || json_output || n_draft))
        usage("generate: --parallel goes without --session, --stop, --json-output, --json-schema and --draft");
    if (words[1] && strcmp(words[1], "-") == 0)
        file = "-";
    bytes prompt = {NULL, 0, 0};
    if (file)
        prompt = file_read(file);
    else if (words[1])
        bytes_add(&prompt, words[1], strlen(words[1]));
    ids prompt_ids = {NULL, 0, 0};
    if (by_ids && (prompt_ids = ids_parse(prompt.p, prompt.n, file ? file : "generate --ids")).n == 0)
        usage("generate: --ids wants at least one token id as the prompt");

    dsv3_model *model = model_open(words[0], isa, compute, read_ahead);
    dsv3_error error;
    const dsv3_tokenizer *tokenizer;
    w.text = dsv3_model_tokenizer(model, &tokenizer, &error) == DSV3_OK;
    if (!w.text && !by_ids)
        fail("%s (without a tokenizer the prompt is given as ids: --ids)", error.message);
    if ((schema || json_output) && !w.text)
        fail("%s (JSON is written by a tokenizer's tokens)", error.message);
    sampling_choose(&opts.sample, &given, model);
    dsv3_grammar *grammar = grammar_open(tokenizer, schema, json_output, spacing);
    opts.grammar = grammar;
    opts.stop_strings = stops.p, opts.n_stop_strings = stops.n;
    opts.token_fn = write_token, opts.user = &w;
    if (n_texts) {
        if (!w.text)
            fail("--parallel needs a tokenizer: %s", error.message);
        if (!by_ids) {
            uint32_t flags = 0;
            flags |= opts.no_bos ? 0u : (uint32_t)DSV3_TOKENIZE_BOS;
            flags |= opts.parse_markers ? (uint32_t)DSV3_TOKENIZE_MARKERS : 0u;
            ids_room(&prompt_ids, prompt.n + 8);
            check(dsv3_tokenize(tokenizer, prompt.n ? prompt.p : "", prompt.n, flags, prompt_ids.p, prompt_ids.cap,
                                &prompt_ids.n, &error),
                  &error);
        }
        if (!prompt_ids.n)
            fail("the prompt is empty: there is nothing to go on from");
        signal(SIGINT, interrupt);
        parallel(model, tokenizer, &prompt_ids, n_texts, context, n_threads, &opts, w.json);
        dsv3_model_close(model);
        free(prompt.p), free(prompt_ids.p);
        return finish();
    }

    dsv3_session *session = running = session_open(model, context, 0, n_threads, n_draft, who);
    if (kept)
        session_load(session, kept);
    dsv3_stats stats;
    memset(&stats, 0, sizeof stats);
    signal(SIGINT, interrupt);
    double start = seconds();
    dsv3_result result = by_ids ? dsv3_session_append(session, prompt_ids.p, prompt_ids.n, NULL, &error) : DSV3_OK;
    double appended = seconds() - start;
    if (!result)
        result = dsv3_generate(session, by_ids ? NULL : prompt.n ? prompt.p : "", prompt.n, &opts, &stats, &error);
    signal(SIGINT, SIG_DFL);
    if (by_ids)
        stats.n_prompt = dsv3_session_length(session) ? prompt_ids.n : 0, stats.prompt_seconds = appended;
    bool cancelled = result == DSV3_ERROR_CANCELLED;
    if (cancelled)
        stats.stop = DSV3_STOP_CANCELLED;

    bar_clear();
    if (w.json)
        writer_end_line(&w);
    if (w.json && (!result || cancelled))
        write_stats(&w, &stats, given.seed, dsv3_model_isa(model));
    else if (!w.json && w.any && w.last != '\n')
        fputc('\n', stdout);
    fflush(stdout);
    if (!cancelled)
        check(result, &error);
    if (kept)
        session_save(session, kept);
    if (on_terminal)
        show_speed(&stats, &opts.sample);
    dsv3_session_close(session);
    dsv3_grammar_close(grammar);
    dsv3_model_close(model);
    free(prompt.p), free(prompt_ids.p), free(w.line.p), free(w.held.p);
    finish();
    return cancelled ? 130 : 0;
}

// ---- tokenize, detokenize --------------------------------------------------------------------------------

static const char tokenize_help[] =
    "dsv3 tokenize DIR < TEXT     text on stdin -> ids, one line\n"
    "\n"
    "  DIR              a checkpoint, or its tokenizer files alone\n"
    "  --bos            the begin-of-text id in front, where the checkpoint asks for it\n"
    "  --parse-special  markers written in the text become their ids\n"
    "  --jsonl          a line in, a line out:\n"
    "                   {\"text\":...,\"add_special_tokens\":bool,\"parse_special\":bool} -> {\"ids\":[...]}\n"
    "                   both false where left out; a line that cannot be read gives {\"error\":\"...\"}\n";

static const char detokenize_help[] =
    "dsv3 detokenize DIR < IDS    ids on stdin, separated by white space -> text, as it is\n"
    "\n"
    "  DIR              a checkpoint, or its tokenizer files alone\n"
    "  --skip-special   leave special tokens out\n"
    "  --jsonl          a line in, a line out: {\"ids\":[...],\"skip_special_tokens\":bool} -> {\"text\":...}\n"
    "                   false where left out; a line that cannot be read gives {\"error\":\"...\"}\n";

/* One call is enough where the room is: a token is at least one byte, but for the BOS. */
static dsv3_result encode(const dsv3_tokenizer *t, const bytes *text, bool bos, bool markers, ids *out,
                          dsv3_error *error)
{
    uint32_t flags = 0;
    if (bos)
        flags |= DSV3_TOKENIZE_BOS;
    if (markers)
        flags |= DSV3_TOKENIZE_MARKERS;
    ids_room(out, text->n + 8);
    return dsv3_tokenize(t, text->n ? text->p : "", text->n, flags, out->p, out->cap, &out->n, error);
}

static dsv3_result decode(const dsv3_tokenizer *t, const ids *list, bool skip_special, bytes *out, dsv3_error *error)
{
    uint32_t flags = 0;
    size_t n = 0;
    if (skip_special)
        flags |= DSV3_DETOKENIZE_SKIP_SPECIAL;
    dsv3_result result = dsv3_detokenize(t, list->p, list->n, flags, NULL, 0, &n, error);
    out->n = 0;
    if (result && result != DSV3_ERROR_BUFFER_TOO_SMALL)
        return result;
    result = dsv3_detokenize(t, list->p, list->n, flags, bytes_room(out, n + 1), n + 1, &n, error);
    out->n = result ? 0 : n;
    return result;
}

static void answer_lines(const dsv3_tokenizer *tokenizer, bool to_text)
{
    bytes line = {NULL, 0, 0}, scratch = {NULL, 0, 0}, out = {NULL, 0, 0}, text = {NULL, 0, 0};
    ids list = {NULL, 0, 0};
    request r;
    memset(&r, 0, sizeof r);
    while (line_read(&line)) {
        dsv3_error error;
        json j = {line.p, line.p, line.p + line.n, NULL, 0};
        error.code = DSV3_OK;
        if (request_read(&r, &j, &scratch) && !(to_text ? r.has_ids : r.has_text))
            j.error = to_text ? "no \"ids\" in the line" : "no \"text\" in the line", j.error_at = 0;
        if (!j.error && to_text)
            decode(tokenizer, &r.list, r.skip_special_tokens, &text, &error);
        else if (!j.error)
            encode(tokenizer, &r.text, r.add_special_tokens, r.parse_special, &list, &error);
        if (j.error) {
            scratch.n = 0;
            bytes_format(&scratch, "byte %" PRIu64 ": %s", (uint64_t)j.error_at, j.error);
        } else if (error.code) {
            scratch.n = 0;
            bytes_format(&scratch, "%s", error.message);
        }
        if (j.error || error.code) {
            bytes_format(&out, "{\"error\":");
            json_text(&out, scratch.p, scratch.n);
        } else if (to_text) {
            bytes_format(&out, "{\"text\":");
            json_text(&out, text.p, text.n);
        } else {
            bytes_format(&out, "{\"ids\":[");
            for (size_t i = 0; i < list.n; i++)
                bytes_format(&out, i ? ",%" PRId32 : "%" PRId32, list.p[i]);
            bytes_add(&out, "]", 1);
        }
        bytes_add(&out, "}\n", 2);
        bytes_print(&out);
        fflush(stdout);
    }
    free(line.p), free(scratch.p), free(out.p), free(text.p), free(list.p), free(r.text.p), free(r.list.p);
}

static int tokens(int argc, char **argv)
{
    bool to_text = strcmp(argv[1], "detokenize") == 0, jsonl = false, bos = false, parse_special = false,
         skip_special = false;
    const char *dir;
    const option encoding[] = {
        {"--jsonl", OPTION_FLAG, &jsonl, 0, 0},
        {"--bos", OPTION_FLAG, &bos, 0, 0},
        {"--parse-special", OPTION_FLAG, &parse_special, 0, 0},
    };
    const option decoding[] = {{"--jsonl", OPTION_FLAG, &jsonl, 0, 0},
                               {"--skip-special", OPTION_FLAG, &skip_special, 0, 0}};
    if (to_text)
        arguments(argc, argv, detokenize_help, decoding, COUNT(decoding), &dir, 1);
    else
        arguments(argc, argv, tokenize_help, encoding, COUNT(encoding), &dir, 1);

    dsv3_tokenizer *tokenizer;
    dsv3_error error;
    check(dsv3_tokenizer_open(&tokenizer, dir, NULL, &error), &error);
    if (jsonl) {
        answer_lines(tokenizer, to_text);
    } else if (to_text) {
        bytes in = file_read("-"), text = {NULL, 0, 0};
        ids list = ids_parse(in.p, in.n, "detokenize");
        check(decode(tokenizer, &list, skip_special, &text, &error), &error);
        if (isatty(fileno(stdout)) && text.n && text.p[text.n - 1] != '\n')
            bytes_add(&text, "\n", 1);
        bytes_print(&text);
        free(in.p), free(list.p), free(text.p);
    } else {
        bytes text = file_read("-"), out = {NULL, 0, 0};
        ids list = {NULL, 0, 0};
        check(encode(tokenizer, &text, bos, parse_special, &list, &error), &error);
        for (size_t i = 0; i < list.n; i++)
            bytes_format(&out, i ? " %" PRId32 : "%" PRId32, list.p[i]);
        bytes_add(&out, "\n", 1);
        bytes_print(&out);
        free(text.p), free(out.p), free(list.p);
    }
    dsv3_tokenizer_close(tokenizer);
    return finish();
}

// ---- logits ----------------------------------------------------------------------------------------------

static const char logits_help[] =
    "dsv3 logits DIR --ids FILE --out FILE [--experts FILE] [--mtp FILE]\n"
    "\n"
    "Runs the n ids of a file, nothing in front, and writes what the model says behind each of them.\n"
    "  --ids FILE       token ids, separated by white space; - is stdin\n"
    "  --out FILE       float32 [n, vocab_size], little-endian; - is stdout\n"
    "  --experts FILE   int32 [n, MoE layers, num_experts_per_tok]: the chosen experts, ascending\n"
    "  --mtp FILE       float32 [n, prediction layers, vocab_size]: what each says of the same next token, from the\n"
    "                   model's state 1, 2, ... tokens before; zeros where there is none\n"
    "  --rows N         tokens run at a time (default 512; the results are the same)\n"
    "  --threads N      default: as many as cores\n"
    "  --isa NAME       auto, scalar, avx2, avx-vnni, avx512, avx512-vnni, avx512-bf16,\n"
    "                   avx512-amx, neon (the results are the same)\n"
    "  --compute MODE   auto, f32, bf16, fp8, int8, tiles: how weights meet activations\n"
    "  --cache TYPE     f32, bf16, i8: how the latents of the context are kept (default: bf16; f32 in f32)\n"
    "  --cache-rope TYPE  and its rotated keys (default: f32, or bf16 where --cache says less)\n"
    "  --expand         attention of 64 rows or more with keys and values written out\n";

static int logits(int argc, char **argv)
{
    const char *ids_path = NULL, *out_path = NULL, *experts_path = NULL, *mtp_path = NULL, *dir;
    uint32_t rows = 0, n_threads = 0;
    dsv3_isa isa = DSV3_ISA_AUTO;
    dsv3_compute compute = DSV3_COMPUTE_AUTO;
    const option options[] = {
        {"--ids", OPTION_TEXT, &ids_path, 0, 0},          {"--out", OPTION_TEXT, &out_path, 0, 0},
        {"--experts", OPTION_TEXT, &experts_path, 0, 0},  {"--rows", OPTION_COUNT, &rows, 0, 0},
        {"--threads", OPTION_COUNT, &n_threads, 0, 0},    {"--isa", OPTION_ISA, &isa, 0, 0},
        {"--compute", OPTION_COMPUTE, &compute, 0, 0},    {"--cache", OPTION_TEXT, &cache_latent, 0, 0},
        {"--cache-rope", OPTION_TEXT, &cache_rope, 0, 0}, {"--mtp", OPTION_TEXT, &mtp_path, 0, 0},
        {"--expand", OPTION_FLAG, &expand, 0, 0},
    };
    arguments(argc, argv, logits_help, options, COUNT(options), &dir, 1);
    if (!ids_path || !out_path)
        usage("logits: --ids FILE and --out FILE are both needed; 'dsv3 logits -h' tells their form");
    if (experts_path && strcmp(out_path, "-") == 0 && strcmp(experts_path, "-") == 0)
        usage("logits: --out and --experts cannot both be stdout");
    bytes text = file_read(ids_path);
    ids list = ids_parse(text.p, text.n, ids_path);
    if (!list.n || list.n > UINT32_MAX)
        usage("logits: %s: at least one token id is needed", ids_path);

    dsv3_model *model = model_open(dir, isa, compute, false);
    const dsv3_config *config = dsv3_model_config(model);
    dsv3_session *session = session_open(model, (uint32_t)list.n, rows, n_threads, mtp_path ? 1 : 0,
                                         mtp_path ? DSV3_DRAFTER_MTP : DSV3_DRAFTER_AUTO);
    size_t n_mtp = dsv3_model_mtp(model);
    bool moe = config->n_routed_experts && config->num_hidden_layers > config->first_k_dense_replace;
    size_t n_moe_layers = moe ? config->num_hidden_layers - config->first_k_dense_replace : 0;
    size_t vocab_size = config->vocab_size, n_chosen = n_moe_layers * config->num_experts_per_tok;
    /* Memory stays bounded: pieces of some 64 MB of logits, in whole multiples of --rows. */
    size_t unit = rows ? rows : 16, fit = (64u << 20) / (vocab_size * sizeof(float));
    size_t piece = fit < unit ? unit : fit / unit * unit;
    if (piece > list.n)
        piece = list.n;
    float *values = (float *)grow(NULL, piece * vocab_size, sizeof *values);
    int32_t *experts = experts_path ? (int32_t *)grow(NULL, piece * n_chosen + 1, sizeof *experts) : NULL;
    float *drafts = mtp_path ? (float *)grow(NULL, piece * n_mtp * vocab_size, sizeof *drafts) : NULL;
    FILE *out = file_open(out_path, "wb"), *experts_out = experts_path ? file_open(experts_path, "wb") : NULL;
    FILE *mtp_out = mtp_path ? file_open(mtp_path, "wb") : NULL;
    for (size_t done = 0, n; done < list.n; done += n) {
        dsv3_outputs outputs;
        dsv3_error error;
        n = list.n - done < piece ? list.n - done : piece;
        memset(&outputs, 0, sizeof outputs);
        outputs.logits = values;
        outputs.experts = experts;
        outputs.draft_logits = drafts;
        check(dsv3_session_append(session, list.p + done, n, &outputs, &error), &error);
        file_write(out, out_path, values, n * vocab_size * sizeof *values);
        if (experts)
            file_write(experts_out, experts_path, experts, n * n_chosen * sizeof *experts);
        if (drafts)
            file_write(mtp_out, mtp_path, drafts, n * n_mtp * vocab_size * sizeof *drafts);
    }
    bar_clear();
    file_close(out, out_path);
    if (experts)
        file_close(experts_out, experts_path);
    if (drafts)
        file_close(mtp_out, mtp_path);
    dsv3_session_close(session);
    dsv3_model_close(model);
    free(text.p), free(list.p), free(values), free(experts), free(drafts);
    return finish();
}

// ---- inspect ---------------------------------------------------------------------------------------------

static const char inspect_help[] =
    "dsv3 inspect DIR    what a checkpoint is, what is in it, and what it needs\n"
    "\n"
    "  --context N    the session whose memory is told (default: 4096, or the checkpoint's own if less)\n"
    "  --bandwidth B  how many tokens a second at most, where memory is read at B GB/s\n"
    "  --tensors      every tensor as well\n"
    "  --json         one JSON object\n";

typedef enum field_kind { FIELD_UINT, FIELD_INT, FIELD_BOOL, FIELD_FLOAT, FIELD_DOUBLE, FIELD_TEXT } field_kind;

/* dsv3_config, in the order it is shown. */
// clang-format off
static const struct field {
    const char *name;
    field_kind kind;
    size_t offset;
} fields[] = {
#define U(name) {#name, FIELD_UINT, offsetof(dsv3_config, name)}
#define I(name) {#name, FIELD_INT, offsetof(dsv3_config, name)}
#define B(name) {#name, FIELD_BOOL, offsetof(dsv3_config, name)}
#define F(name) {#name, FIELD_FLOAT, offsetof(dsv3_config, name)}
#define D(name) {#name, FIELD_DOUBLE, offsetof(dsv3_config, name)}
#define T(name) {#name, FIELD_TEXT, offsetof(dsv3_config, name)}
    T(model_type), U(vocab_size), U(hidden_size), U(intermediate_size), U(moe_intermediate_size), U(num_hidden_layers),
    U(first_k_dense_replace), U(num_nextn_predict_layers), U(num_attention_heads), U(q_lora_rank), U(kv_lora_rank),
    U(qk_nope_head_dim), U(qk_rope_head_dim), U(v_head_dim), U(n_routed_experts), U(n_shared_experts),
    U(num_experts_per_tok), U(n_group), U(topk_group), B(norm_topk_prob), F(routed_scaling_factor), F(rms_norm_eps),
    B(tie_word_embeddings), U(max_position_embeddings), D(rope_theta), B(rope_interleave), B(rope_yarn), D(rope_factor),
    D(rope_beta_fast), D(rope_beta_slow), D(rope_mscale), D(rope_mscale_all_dim), D(rope_attention_factor),
    U(rope_original_max_position_embeddings), I(bos_token_id), T(dtype), T(quant_method), T(scale_fmt),
#undef U
#undef I
#undef B
#undef F
#undef D
#undef T
};
// clang-format on

/* What a tensor is for, from its name. */
// clang-format off
typedef enum part {
    PART_EMBEDDING, PART_HEAD, PART_NORM, PART_ATTENTION, PART_ROUTER, PART_ROUTED, PART_SHARED, PART_DENSE,
    PART_SCALE, PART_MTP, PART_OTHER, N_PARTS
} part;
// clang-format on

static const char *const part_names[N_PARTS] = {"embedding",      "head",           "norms",     "attention", "router",
                                                "routed_experts", "shared_experts", "dense_mlp", "scales",    "mtp",
                                                "other"};

static part part_of(const char *name, const dsv3_config *config)
{
    const char *layer = strstr(name, "layers.");
    if (layer && strtoul(layer + 7, NULL, 10) >= config->num_hidden_layers)
        return PART_MTP;
    if (strstr(name, "rotary_emb"))
        return PART_OTHER;
    if (strstr(name, "norm"))
        return PART_NORM;
    if (layer)
        return strstr(name, ".self_attn.")        ? PART_ATTENTION
               : strstr(name, ".experts.")        ? PART_ROUTED
               : strstr(name, ".shared_experts.") ? PART_SHARED
               : strstr(name, ".mlp.gate.")       ? PART_ROUTER
               : strstr(name, ".mlp.")            ? PART_DENSE
                                                  : PART_OTHER;
    return strstr(name, "embed_tokens") ? PART_EMBEDDING : strstr(name, "lm_head") ? PART_HEAD : PART_OTHER;
}

typedef struct tally {
    uint64_t n, size, read; /* tensors; bytes; of them, bytes read for one token */
} tally;

static uint64_t tensor_size(const dsv3_tensor *t)
{
    uint64_t size = dsv3_dtype_size(t->dtype);
    for (uint32_t i = 0; i < t->rank; i++)
        size *= t->shape[i];
    return size;
}

static const char *topk_name(dsv3_topk_method method)
{
    return method == DSV3_TOPK_NOAUX_TC ? "noaux_tc" : method == DSV3_TOPK_GREEDY ? "greedy" : "group_limited_greedy";
}

/* Bytes of cache a token takes, in all layers together. */
static uint64_t cache_row(const dsv3_memory *m)
{
    return m->max_tokens ? m->cache_bytes / m->max_tokens : 0;
}

static const char *human(double size, char text[32])
{
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
    size_t unit = 0;
    for (; size >= 1000 && unit + 1 < COUNT(units); unit++)
        size /= 1000;
    snprintf(text, 32, unit ? "%.2f %s" : "%.0f %s", size, units[unit]);
    return text;
}

static void field_print(bytes *out, const struct field *f, const dsv3_config *config, bool quoted)
{
    const void *at = (const char *)config + f->offset;
    switch (f->kind) {
    case FIELD_UINT: bytes_format(out, "%" PRIu32, *(const uint32_t *)at); break;
    case FIELD_INT: bytes_format(out, "%" PRId32, *(const int32_t *)at); break;
    case FIELD_BOOL: bytes_format(out, "%s", *(const bool *)at ? "true" : "false"); break;
    case FIELD_FLOAT: bytes_format(out, "%.7g", (double)*(const float *)at); break;
    case FIELD_DOUBLE: bytes_format(out, "%.15g", *(const double *)at); break;
    case FIELD_TEXT:
        if (quoted)
            json_text(out, (const char *)at, strlen((const char *)at));
        else
            bytes_format(out, "%s", (const char *)at);
    }
}

/* All that inspect tells. */
typedef struct inspection {
    const dsv3_model *model;
    const dsv3_config *config;
    tally parts[N_PARTS][32]; /* [part, dtype] */
    tally plan[N_PARTS];      /* the same by use: scales count with the weights they belong to */
    tally all;
    double bandwidth;                   /* bytes a second; 0: not told */
    uint64_t n_weights, n_read_weights; /* numbers; scales and MTP aside; read: for one token */
    dsv3_memory memory;
    const dsv3_tokenizer *tokenizer;
    dsv3_error no_tokenizer; /* why, if so */
} inspection;

static void tensor_at(const dsv3_model *model, size_t i, const char **name, dsv3_tensor *t)
{
    dsv3_error error;
    check(dsv3_model_tensor_at(model, i, name, t, &error), &error);
}

static void inspect_tensors(inspection *x)
{
    const dsv3_config *config = x->config;
    dsv3_error error;
    dsv3_tensor t;
    bool has_head =
        dsv3_model_tensor(x->model, "lm_head.weight", &t, &error) == DSV3_OK && !config->tie_word_embeddings;
    for (size_t i = 0, n = dsv3_model_tensor_count(x->model); i < n; i++) {
        const char *name;
        tensor_at(x->model, i, &name, &t);
        size_t length = strlen(name);
        part what = part_of(name, config), row = what;
        bool scale = length > 10 && strcmp(name + length - 10, "_scale_inv") == 0;
        uint64_t size = tensor_size(&t), read = size, each = dsv3_dtype_size(t.dtype);
        if (what == PART_MTP || what == PART_OTHER || (what == PART_HEAD && !has_head))
            read = 0;
        else if (what == PART_ROUTED) /* the chosen ones only */
            read = (uint64_t)((double)size * config->num_experts_per_tok / config->n_routed_experts + 0.5);
        else if (what == PART_EMBEDDING && has_head) /* one row; a tied one is read whole, as the head */
            read = t.rank ? size / (t.shape[0] ? t.shape[0] : 1) : 0;
        if (scale && what != PART_MTP)
            row = PART_SCALE;
        tally *to[3];
        to[0] = &x->parts[row][(size_t)t.dtype < 32 ? t.dtype : 0], to[1] = &x->plan[what], to[2] = &x->all;
        for (int k = 0; k < 3; k++)
            to[k]->n++, to[k]->size += size, to[k]->read += read;
        if (row != PART_SCALE && row != PART_MTP && each)
            x->n_weights += size / each, x->n_read_weights += read / each;
    }
}

/* What a token takes of memory. Routed experts are read in part, an embedding by the row, the rest whole and always. */
typedef struct memory_plan {
    uint64_t always;   /* bytes of weights that every token reads */
    uint64_t routed;   /* bytes of which a token reads some */
    uint64_t expert;   /* bytes of one routed expert */
    uint64_t resident; /* what must be in memory, or every token waits for the disk: `always` and the session */
    uint64_t full;     /* what must be, or some tokens do */
    uint64_t idle;     /* in the files, but not run */
    uint64_t cache;    /* bytes of cache that the last token of the context reads */
    double first_rate, last_rate; /* tokens a second at the bandwidth: empty context, full one; 0: not told */
} memory_plan;

static memory_plan plan_of(const inspection *x)
{
    const tally *routed = &x->plan[PART_ROUTED];
    memory_plan p;
    uint64_t n_experts = (uint64_t)x->config->n_routed_experts;
    if (x->config->num_hidden_layers > x->config->first_k_dense_replace)
        n_experts *= x->config->num_hidden_layers - x->config->first_k_dense_replace;
    p.always = x->all.read - routed->read;
    p.routed = routed->size;
    p.expert = n_experts ? routed->size / n_experts : 0;
    p.idle = x->plan[PART_MTP].size + x->plan[PART_OTHER].size;
    p.resident = p.always + x->memory.session_bytes;
    p.full = x->all.size - p.idle + x->memory.session_bytes;
    p.cache = x->memory.cache_bytes;
    p.first_rate = x->all.read ? x->bandwidth / (double)x->all.read : 0;
    p.last_rate = x->all.read ? x->bandwidth / (double)(x->all.read + p.cache) : 0;
    return p;
}

/* The kinds of a plan, as they are run. */
static const part plan_parts[] = {PART_EMBEDDING, PART_NORM,   PART_ATTENTION, PART_DENSE,
                                  PART_ROUTER,    PART_ROUTED, PART_SHARED,    PART_HEAD};

static void plan_print(const inspection *x)
{
    char size[32], read[32];
    const memory_plan p = plan_of(x);
    printf("\n%-16s%32s%18s\n", "plan", "size, scales too", "read for a token");
    for (size_t i = 0; i < COUNT(plan_parts); i++) {
        const tally *t = &x->plan[plan_parts[i]];
        if (!t->n)
            continue;
        printf("%-16s%32s%18s", part_names[plan_parts[i]], human((double)t->size, size), human((double)t->read, read));
        if (plan_parts[i] == PART_ROUTED)
            printf("   %" PRIu32 " of %" PRIu32 " a layer, %s each", x->config->num_experts_per_tok,
                   x->config->n_routed_experts, human((double)p.expert, size));
        printf("\n");
    }
    printf("%-16s%32s%18s   at most: %" PRIu32 " tokens of %" PRIu64 " bytes\n", "cache", human((double)p.cache, size),
           human((double)p.cache, read), x->memory.max_tokens, cache_row(&x->memory));
    if (p.idle)
        printf("%-16s%32s%18s\n", "not run", human((double)p.idle, size), "-");
    printf("in memory %s at least: what every token reads, and the session\n", human((double)p.resident, size));
    printf("          %s for full speed: all experts; with less, those that are missing come from the disk\n",
           human((double)p.full, size));
    if (x->bandwidth > 0)
        printf("speed     at most %.3g tokens a second at %g GB/s, %.3g where the context is full\n", p.first_rate,
               1e-9 * x->bandwidth, p.last_rate);
    printf("\n");
}

static void plan_json(const inspection *x, bytes *out)
{
    const memory_plan p = plan_of(x);
    bytes_format(out, ",\"plan\":{\"kinds\":[");
    for (size_t i = 0; i < COUNT(plan_parts); i++) {
        const tally *t = &x->plan[plan_parts[i]];
        bytes_format(out, "%s{\"kind\":\"%s\",\"bytes\":%" PRIu64 ",\"bytes_per_token\":%" PRIu64 "}", i ? "," : "",
                     part_names[plan_parts[i]], t->size, t->read);
    }
    bytes_format(out, "],\"always_bytes\":%" PRIu64 ",\"routed_bytes\":%" PRIu64 ",\"expert_bytes\":%" PRIu64, p.always,
                 p.routed, p.expert);
    bytes_format(out, ",\"resident_bytes\":%" PRIu64 ",\"full_speed_bytes\":%" PRIu64 ",\"idle_bytes\":%" PRIu64,
                 p.resident, p.full, p.idle);
    bytes_format(out, ",\"cache_read_bytes\":%" PRIu64, p.cache);
    if (x->bandwidth > 0)
        bytes_format(out, ",\"bandwidth\":%.0f,\"tokens_per_second\":%.6g,\"tokens_per_second_full_context\":%.6g",
                     x->bandwidth, p.first_rate, p.last_rate);
    bytes_format(out, "}");
}

static void inspect_print(const inspection *x, const char *dir, bool list)
{
    char size[32], read[32];
    const dsv3_config *config = x->config;
    const dsv3_memory *m = &x->memory;
    bytes out = {NULL, 0, 0};
    printf("%s\n\nconfiguration\n", dir);
    for (size_t i = 0; i < COUNT(fields); i++) {
        out.n = 0;
        field_print(&out, &fields[i], config, false);
        printf("  %-38s%.*s\n", fields[i].name, (int)out.n, out.n ? out.p : "");
    }
    printf("  %-38s%s\n", "scoring_func", config->scoring_func == DSV3_SCORING_SIGMOID ? "sigmoid" : "softmax");
    printf("  %-38s%s\n", "topk_method", topk_name(config->topk_method));
    printf("  %-38s", "eos_token_id");
    for (uint32_t i = 0; i < config->n_eos; i++) {
        size_t n = 0;
        const char *text = x->tokenizer ? dsv3_token_bytes(x->tokenizer, config->eos_token_id[i], &n) : NULL;
        printf("%s%" PRId32 " %.*s", i ? ", " : "", config->eos_token_id[i], (int)n, text ? text : "");
    }
    printf("\n\n%-16s%-10s%10s%12s%18s\n", "tensors", "dtype", "number", "size", "read for a token");
    for (int p = 0; p < N_PARTS; p++)
        for (int d = 0; d < 32; d++) {
            const tally *t = &x->parts[p][d];
            if (t->n)
                printf("%-16s%-10s%10" PRIu64 "%12s%18s\n", part_names[p], dsv3_dtype_name((dsv3_dtype)d), t->n,
                       human((double)t->size, size), human((double)t->read, read));
        }
    printf("%-26s%10" PRIu64 "%12s%18s\n", "all", x->all.n, human((double)x->all.size, size),
           human((double)x->all.read, read));
    plan_print(x);
    printf("weights   %.4g million, of which %.4g million are used for a token (MTP aside)\n",
           1e-6 * (double)x->n_weights, 1e-6 * (double)x->n_read_weights);
    printf("memory    %s in the files, mapped; %s for the open model (%s kernels)\n",
           human((double)m->file_bytes, size), human((double)m->model_bytes, read),
           dsv3_isa_name(dsv3_model_isa(x->model)));
    printf("session   %s for %" PRIu32 " tokens, the cache of %s included", human((double)m->session_bytes, size),
           m->max_tokens, human((double)m->cache_bytes, read));
    printf(" (%" PRIu64 " bytes a token)\n", cache_row(m));
    dsv3_sample_opts s;
    dsv3_model_sampling(x->model, &s);
    if (s.temperature > 0)
        printf("sampling  temperature %g, top-k %" PRIu32 ", top-p %g\n", (double)s.temperature, s.top_k,
               (double)s.top_p);
    else
        printf("sampling  greedy\n");
    if (x->tokenizer) {
        dsv3_tokenizer_info info;
        dsv3_tokenizer_info_get(x->tokenizer, &info);
        printf("tokenizer %" PRId32 " tokens, bos %" PRId32 "%s, eos %" PRId32 ", pad %" PRId32 "\n", info.n_tokens,
               info.bos, info.add_bos ? " (put in front)" : "", info.eos, info.pad);
    } else {
        printf("tokenizer none: %s\n", x->no_tokenizer.message);
    }
    if (list)
        printf("\n");
    for (size_t i = 0, n = list ? dsv3_model_tensor_count(x->model) : 0; i < n; i++) {
        const char *name;
        dsv3_tensor t;
        tensor_at(x->model, i, &name, &t);
        printf("%-60s %-8s [", name, dsv3_dtype_name(t.dtype));
        for (uint32_t k = 0; k < t.rank; k++)
            printf(k ? ", %" PRIu64 : "%" PRIu64, t.shape[k]);
        printf("] %s\n", human((double)tensor_size(&t), size));
    }
    free(out.p);
}

static void inspect_json(const inspection *x, const char *dir, bool list)
{
    const dsv3_config *config = x->config;
    const dsv3_memory *m = &x->memory;
    bytes out = {NULL, 0, 0};
    const char *comma = "";
    bytes_format(&out, "{\"dir\":");
    json_text(&out, dir, strlen(dir));
    bytes_format(&out, ",\"config\":{");
    for (size_t i = 0; i < COUNT(fields); i++) {
        bytes_format(&out, "\"%s\":", fields[i].name);
        field_print(&out, &fields[i], config, true);
        bytes_add(&out, ",", 1);
    }
    bytes_format(&out, "\"scoring_func\":\"%s\",\"topk_method\":\"%s\",\"eos_token_id\":[",
                 config->scoring_func == DSV3_SCORING_SIGMOID ? "sigmoid" : "softmax", topk_name(config->topk_method));
    for (uint32_t i = 0; i < config->n_eos; i++)
        bytes_format(&out, i ? ",%" PRId32 : "%" PRId32, config->eos_token_id[i]);
    bytes_format(&out, "]},\"tensors\":[");
    for (int p = 0; p < N_PARTS; p++)
        for (int d = 0; d < 32; d++) {
            const tally *t = &x->parts[p][d];
            if (!t->n)
                continue;
            bytes_format(&out, "%s{\"kind\":\"%s\",\"dtype\":\"%s\",\"count\":%" PRIu64 ",\"bytes\":%" PRIu64, comma,
                         part_names[p], dsv3_dtype_name((dsv3_dtype)d), t->n, t->size);
            bytes_format(&out, ",\"bytes_per_token\":%" PRIu64 "}", t->read);
            comma = ",";
        }
    bytes_format(&out, "],\"tensor_count\":%" PRIu64 ",\"tensor_bytes\":%" PRIu64 ",\"bytes_per_token\":%" PRIu64,
                 x->all.n, x->all.size, x->all.read);
    bytes_format(&out, ",\"parameters\":%" PRIu64 ",\"parameters_per_token\":%" PRIu64, x->n_weights,
                 x->n_read_weights);
    bytes_format(&out, ",\"cache_bytes_per_token\":%" PRIu64 ",\"memory\":{\"file_bytes\":%" PRIu64, cache_row(m),
                 m->file_bytes);
    bytes_format(&out, ",\"model_bytes\":%" PRIu64 ",\"max_tokens\":%" PRIu32, m->model_bytes, m->max_tokens);
    bytes_format(&out, ",\"session_bytes\":%" PRIu64 ",\"cache_bytes\":%" PRIu64 "}", m->session_bytes, m->cache_bytes);
    plan_json(x, &out);
    bytes_format(&out, ",\"isa\":\"%s\",\"tokenizer\":", dsv3_isa_name(dsv3_model_isa(x->model)));
    if (x->tokenizer) {
        dsv3_tokenizer_info info;
        dsv3_tokenizer_info_get(x->tokenizer, &info);
        bytes_format(&out,
                     "{\"n_tokens\":%" PRId32 ",\"bos\":%" PRId32 ",\"eos\":%" PRId32 ",\"pad\":%" PRId32
                     ",\"add_bos\":%s}",
                     info.n_tokens, info.bos, info.eos, info.pad, info.add_bos ? "true" : "false");
    } else {
        bytes_format(&out, "{\"error\":");
        json_text(&out, x->no_tokenizer.message, strlen(x->no_tokenizer.message));
        bytes_add(&out, "}", 1);
    }
    if (list)
        bytes_format(&out, ",\"list\":[");
    for (size_t i = 0, n = list ? dsv3_model_tensor_count(x->model) : 0; i < n; i++) {
        const char *name;
        dsv3_tensor t;
        tensor_at(x->model, i, &name, &t);
        bytes_format(&out, i ? ",\n{\"name\":" : "\n{\"name\":");
        json_text(&out, name, strlen(name));
        bytes_format(&out, ",\"dtype\":\"%s\",\"shape\":[", dsv3_dtype_name(t.dtype));
        for (uint32_t k = 0; k < t.rank; k++)
            bytes_format(&out, k ? ",%" PRIu64 : "%" PRIu64, t.shape[k]);
        bytes_format(&out, "],\"bytes\":%" PRIu64 "}", tensor_size(&t));
    }
    bytes_format(&out, list ? "]}\n" : "}\n");
    bytes_print(&out);
    free(out.p);
}

static int inspect(int argc, char **argv)
{
    const char *dir;
    uint32_t context = 0;
    float bandwidth = 0; /* GB/s */
    bool list = false, as_json = false;
    const option options[] = {
        {"--context", OPTION_COUNT, &context, 0, 0},
        {"--bandwidth", OPTION_REAL, &bandwidth, 0, 1000000},
        {"--tensors", OPTION_FLAG, &list, 0, 0},
        {"--json", OPTION_FLAG, &as_json, 0, 0},
    };
    arguments(argc, argv, inspect_help, options, COUNT(options), &dir, 1);
    inspection x;
    dsv3_session_opts opts;
    dsv3_error error;
    memset(&x, 0, sizeof x);
    memset(&opts, 0, sizeof opts);
    opts.max_tokens = context;
    x.bandwidth = 1e9 * (double)bandwidth;
    dsv3_model *model = model_open(dir, DSV3_ISA_AUTO, DSV3_COMPUTE_AUTO, false);
    x.model = model;
    x.config = dsv3_model_config(model);
    check(dsv3_session_memory(model, &opts, &x.memory, &error), &error);
    if (dsv3_model_tokenizer(model, &x.tokenizer, &x.no_tokenizer))
        x.tokenizer = NULL;
    inspect_tensors(&x);
    (as_json ? inspect_json : inspect_print)(&x, dir, list);
    dsv3_model_close(model);
    return finish();
}

// ---- render ----------------------------------------------------------------------------------------------

#include "render.h"

// ---- chat ------------------------------------------------------------------------------------------------

#include "chat_tui.h"

// ---- quantize --------------------------------------------------------------------------------------------

#include "quantize.h"

// ---- experts ---------------------------------------------------------------------------------------------

#include "experts.h"

// ---- main ------------------------------------------------------------------------------------------------

static const char main_help[] =
    "dsv3 " DSV3_VERSION_STRING ": runs DeepSeek-V3 checkpoints as they are published\n"
    "\n"
    "  dsv3 chat DIR                                a conversation\n"
    "  dsv3 generate DIR [PROMPT | -f FILE | -]     writes on behind the prompt\n"
    "  dsv3 tokenize DIR < TEXT                     text -> ids\n"
    "  dsv3 detokenize DIR < IDS                    ids -> text\n"
    "  dsv3 render DIR < JSON                       a conversation -> its text and ids\n"
    "  dsv3 logits DIR --ids FILE --out FILE        the numbers behind the next token, for every token\n"
    "  dsv3 inspect DIR                             what a checkpoint is and what it needs\n"
    "  dsv3 quantize DIR OUT --to int8|fp8|bf16     writes a checkpoint again, in 8 bits or in BF16\n"
    "  dsv3 experts DIR -f TEXT                     which experts a text goes through, and how evenly\n"
    "\n"
    "'dsv3 COMMAND -h' tells more. DIR holds config.json and the rest, unconverted.\n";

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int argc, char **argv);
    } commands[] = {
        {"generate", generate}, {"tokenize", tokens}, {"detokenize", tokens},
        {"logits", logits},     {"inspect", inspect}, {"render", render},
        {"quantize", quantize}, {"chat", chat_run},   {"experts", experts_run},
    };
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#endif
    on_terminal = isatty(fileno(stderr));
    if (argc < 2)
        usage("what shall be done? dsv3 generate DIR \"Once upon a time\", or 'dsv3 -h'");
    for (size_t i = 0; i < COUNT(commands); i++)
        if (strcmp(argv[1], commands[i].name) == 0)
            return commands[i].run(argc, argv);
    if (strcmp(argv[1], "--version") == 0) {
        puts("dsv3 " DSV3_VERSION_STRING);
        return finish();
    }
    if (strcmp(argv[1], "-h") != 0 && strcmp(argv[1], "--help") != 0)
        usage("no command '%s': chat, generate, tokenize, detokenize, render, logits, inspect, quantize or experts; "
              "'dsv3 -h' "
              "tells more",
              argv[1]);
    fputs(main_help, stdout);
    return finish();
}
