/* dsv3 generate --session and --parallel. Included once, by dsv3.c, in front of generate. */
#ifndef DSV3_SESSIONS_H
#define DSV3_SESSIONS_H

// ---- A session in a file -----------------------------------------------------------------------------------

typedef struct kept_file {
    FILE *f;
    const char *path;
} kept_file;

static bool session_write(void *user, const void *data, size_t size)
{
    return fwrite(data, 1, size, ((kept_file *)user)->f) == size;
}

static bool session_read(void *user, void *data, size_t size)
{
    return fread(data, 1, size, ((kept_file *)user)->f) == size;
}

/* What the file holds, if it is there. */
static void session_load(dsv3_session *session, const char *path)
{
    kept_file file = {fopen(path, "rb"), path};
    dsv3_source source;
    dsv3_error error;
    if (!file.f && errno == ENOENT)
        return;
    if (!file.f || fseek(file.f, 0, SEEK_END))
        fail("%s: %s", path, strerror(errno));
    memset(&source, 0, sizeof source);
    long size = ftell(file.f); /* not known where it does not fit */
    source.size = size > 0 ? (uint64_t)size : 0;
    rewind(file.f);
    source.read_fn = session_read, source.user = &file;
    if (dsv3_load(&session, 1, &source, &error))
        fail("%s: %s", path, error.message);
    fclose(file.f);
}

/* Written beside and renamed when complete: what was there stays until then. */
static void session_save(dsv3_session *session, const char *path)
{
    bytes beside = {NULL, 0, 0};
    bytes_format(&beside, "%s.part", path);
    bytes_add(&beside, "", 1);
    kept_file file = {file_open(beside.p, "wb"), beside.p};
    dsv3_sink sink;
    dsv3_error error;
    sink.write_fn = session_write, sink.user = &file;
    if (dsv3_save(&session, 1, &sink, NULL, &error)) {
        fclose(file.f);
        remove(beside.p);
        fail("%s: %s", beside.p, error.message);
    }
    file_close(file.f, beside.p);
#ifdef _WIN32
    remove(path); /* rename does not replace there */
#endif
    if (rename(beside.p, path))
        fail("%s: cannot become %s: %s", beside.p, path, strerror(errno));
    free(beside.p);
}

// ---- Several continuations of one prompt -------------------------------------------------------------------

typedef struct strand {
    dsv3_session *session;
    uint64_t seed;
    double logprob; /* of all its tokens */
    dsv3_stop stop;
} strand;

static dsv3_stop strand_stop(const dsv3_config *c, const dsv3_generate_opts *o, int32_t id)
{
    for (uint32_t i = 0; i < c->n_eos && !o->ignore_eos; i++)
        if (c->eos_token_id[i] == id)
            return DSV3_STOP_EOS;
    return DSV3_STOP_NONE;
}

static void strand_print(const strand *s, const dsv3_tokenizer *tokenizer, size_t n_prompt, bool as_json)
{
    const int32_t *tokens = dsv3_session_tokens(s->session) + n_prompt;
    const size_t n = dsv3_session_length(s->session) - n_prompt;
    bytes text = {NULL, 0, 0}, out = {NULL, 0, 0};
    size_t len = 0;
    dsv3_error error;
    dsv3_result r = dsv3_detokenize(tokenizer, tokens, n, DSV3_DETOKENIZE_SKIP_SPECIAL, NULL, 0, &len, &error);
    if (r != DSV3_ERROR_BUFFER_TOO_SMALL)
        check(r, &error);
    check(dsv3_detokenize(tokenizer, tokens, n, DSV3_DETOKENIZE_SKIP_SPECIAL, bytes_room(&text, len + 1), len + 1, &len,
                          &error),
          &error);
    if (as_json) {
        bytes_format(&out, "{\"seed\":%" PRIu64 ",\"text\":", s->seed);
        json_text(&out, text.p, len);
        bytes_format(&out, ",\"ids\":[");
        for (size_t i = 0; i < n; i++)
            bytes_format(&out, i ? ",%" PRId32 : "%" PRId32, tokens[i]);
        bytes_format(&out, "],\"logprob\":%.6f,\"stop\":\"%s\"}\n", s->logprob, stop_name(s->stop));
    } else {
        bytes_format(&out, "--- seed %" PRIu64 "\n", s->seed);
        bytes_add(&out, text.p, len);
        if (!len || text.p[len - 1] != '\n')
            bytes_add(&out, "\n", 1);
    }
    bytes_print(&out);
    free(text.p), free(out.p);
}

/* n continuations from forks of one session that holds the prompt, seeds apart, advanced together. */
static void parallel(const dsv3_model *model, const dsv3_tokenizer *tokenizer, const ids *prompt, uint32_t n,
                     uint32_t context, uint32_t n_threads, const dsv3_generate_opts *o, bool as_json)
{
    const dsv3_config *c = dsv3_model_config(model);
    dsv3_workspace *workspace;
    dsv3_workspace_opts wo;
    dsv3_session_opts so;
    dsv3_session *first;
    dsv3_error error;
    strand *strands = (strand *)grow(NULL, n, sizeof *strands);
    dsv3_batch_item *items = (dsv3_batch_item *)grow(NULL, n, sizeof *items);
    int32_t *next = (int32_t *)grow(NULL, n, sizeof *next);
    uint64_t generated = 0, longest;
    memset(&wo, 0, sizeof wo);
    memset(&so, 0, sizeof so);
    memset(strands, 0, n * sizeof *strands);
    context = context ? context : c->max_position_embeddings < 4096 ? c->max_position_embeddings : 4096;
    if (prompt->n >= context)
        fail("the prompt has %lu tokens, the context %" PRIu32, (unsigned long)prompt->n, context);
    longest = o->max_tokens && o->max_tokens < context - prompt->n ? prompt->n + o->max_tokens : context;
    /* the prompt's pages once; each continuation its own from the page on where the prompt ends */
    const uint64_t of_each = (longest + DSV3_PAGE_TOKENS - 1) / DSV3_PAGE_TOKENS - prompt->n / DSV3_PAGE_TOKENS;
    const uint64_t pages = prompt->n / DSV3_PAGE_TOKENS + 1 + n * of_each;
    wo.n_pages = pages < 1u << 26 ? (uint32_t)pages : 1u << 26;
    wo.n_threads = n_threads;
    wo.cache_latent = cache_type(cache_latent, "--cache"), wo.cache_rope = cache_type(cache_rope, "--cache-rope");
    wo.expand = expand;
    check(dsv3_workspace_open(&workspace, model, &wo, &error), &error);
    so.workspace = workspace, so.max_tokens = (uint32_t)longest;
    so.progress = bar("reading the prompt");
    check(dsv3_session_open(&first, model, &so, &error), &error);
    running = first;
    double start = seconds();
    check(dsv3_session_append(first, prompt->p, prompt->n, NULL, &error), &error);
    bar_clear();
    const double read = seconds() - start;
    for (uint32_t k = 0; k < n; k++) {
        strands[k].seed = o->sample.seed + k;
        check(dsv3_session_fork(&strands[k].session, first, 0, &error), &error);
    }
    dsv3_session_close(first);
    running = strands[0].session;
    start = seconds();
    for (size_t active = n; active;) {
        active = 0;
        memset(items, 0, n * sizeof *items);
        for (uint32_t k = 0; k < n; k++) {
            strand *s = &strands[k];
            dsv3_sample_opts how = o->sample;
            dsv3_sample sample;
            if (s->stop)
                continue;
            how.seed = s->seed;
            check(dsv3_session_sample(s->session, &how, &sample, &error), &error);
            s->logprob += (double)sample.logprob;
            s->stop = strand_stop(c, o, sample.token);
            next[active] = sample.token;
            items[active].session = s->session, items[active].tokens = &next[active], items[active].count = 1;
            active++, generated++;
        }
        check(dsv3_batch(items, active, &error), &error);
        for (uint32_t k = 0; k < n; k++)
            if (!strands[k].stop && dsv3_session_length(strands[k].session) == longest)
                strands[k].stop = longest < context ? DSV3_STOP_MAX_TOKENS : DSV3_STOP_CONTEXT;
    }
    const double took = seconds() - start;
    for (uint32_t k = 0; k < n; k++) {
        strand_print(&strands[k], tokenizer, prompt->n, as_json);
        dsv3_session_close(strands[k].session);
    }
    if (on_terminal)
        fprintf(stderr, "[prompt: %lu tokens, %.1f a second; %" PRIu32 " texts: %" PRIu64 " tokens, %.1f a second]\n",
                (unsigned long)prompt->n, rate(prompt->n, read), n, generated, rate(generated, took));
    dsv3_workspace_close(workspace);
    free(strands), free(items), free(next);
}

#endif
