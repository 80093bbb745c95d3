/* dsv3 experts: which experts a text goes through. Included once, by dsv3.c, behind cli.h and encode.

   Counts come from dsv3_workspace_experts; the share of experts that the next token uses again from dsv3_outputs. --no-bias
   opens the checkpoint through a reader that holds its files in memory, and writes zeros over the router's bias there. */
#ifndef DSV3_EXPERTS_H
#define DSV3_EXPERTS_H

static const char experts_help[] =
    "dsv3 experts DIR [-f FILE]    the experts that a text goes through: a heat map, and how even their load is\n"
    "\n"
    "  -f FILE        the text; default: stdin\n"
    "  -n N           its first N tokens (default: all)\n"
    "  --svg FILE     the heat map as a picture\n"
    "  --json         numbers instead: counts by layer and expert, balance, reuse\n"
    "  --no-bias      with the router's bias at zero, as if nothing had balanced the load (reads the checkpoint into "
    "memory)\n"
    "  --threads N    default: as many as cores\n"
    "\n"
    "Of each layer: max/mean (1 is even), coefficient of variation (0 is even), entropy as a share of the greatest, "
    "and\n"
    "how many of a token's experts the next token uses again, beside what chance would give.\n";

// ---- A reader that holds files in memory -------------------------------------------------------------------

typedef struct held_file {
    struct held_file *next;
    bytes data;
} held_file;

typedef struct held_dir {
    const char *dir;
    held_file *files;
} held_dir;

static dsv3_result held_open(void *user, const char *name, dsv3_file *file)
{
    held_dir *d = (held_dir *)user;
    bytes path = {NULL, 0, 0};
    bytes_format(&path, "%s/%s", d->dir, name);
    bytes_add(&path, "", 1);
    FILE *f = fopen(path.p, "rb");
    if (!f) {
        free(path.p);
        return DSV3_ERROR_FILE_NOT_FOUND;
    }
    fclose(f);
    held_file *h = (held_file *)grow(NULL, 1, sizeof *h);
    h->data = file_read(path.p);
    free(path.p);
    h->next = d->files;
    d->files = h;
    file->data = h->data.p;
    file->size = h->data.n;
    return DSV3_OK;
}

static dsv3_result held_read(void *user, dsv3_file *file, uint64_t offset, void *dst, size_t size)
{
    (void)user;
    memcpy(dst, (const char *)file->data + offset, size);
    return DSV3_OK;
}

/* The bias decides who is chosen: zeros in our copy of it, and it decides nothing. */
static void held_zero_bias(held_dir *d, const dsv3_model *model)
{
    for (size_t i = 0; i < dsv3_model_tensor_count(model); i++) {
        const char *name;
        dsv3_tensor tensor;
        dsv3_error error;
        check(dsv3_model_tensor_at(model, i, &name, &tensor, &error), &error);
        if (!strstr(name, "e_score_correction_bias"))
            continue;
        for (held_file *h = d->files; h; h = h->next) {
            uintptr_t at = (uintptr_t)tensor.data - (uintptr_t)h->data.p;
            size_t n = (size_t)tensor.shape[0] * dsv3_dtype_size(tensor.dtype);
            if (at < h->data.n && n <= h->data.n - at)
                memset(h->data.p + at, 0, n);
        }
    }
}

// ---- What was counted --------------------------------------------------------------------------------------

typedef struct load {
    uint32_t layers, experts, top_k, first_layer; /* layers that have experts; the number of the first */
    uint64_t *counts;                             /* [layers, experts] */
    uint64_t *again, *pairs;                      /* [layers] experts used again, and experts that could have been */
    uint64_t n_tokens;
} load;

typedef struct balance {
    double max, cv, entropy, reuse;
} balance;

static balance balance_of(const load *l, uint32_t layer)
{
    const uint64_t *counts = l->counts + (size_t)layer * l->experts;
    balance b = {0, 0, 0, 0};
    double sum = 0, squares = 0;
    for (uint32_t e = 0; e < l->experts; e++) {
        sum += (double)counts[e], squares += (double)counts[e] * (double)counts[e];
        b.max = (double)counts[e] > b.max ? (double)counts[e] : b.max;
    }
    const double mean = sum / l->experts;
    if (sum <= 0)
        return b;
    b.max /= mean;
    b.cv = squares / l->experts / (mean * mean) - 1;
    b.cv = b.cv > 0 ? sqrt(b.cv) : 0;
    for (uint32_t e = 0; e < l->experts; e++)
        if (counts[e])
            b.entropy -= (double)counts[e] / sum * log((double)counts[e] / sum);
    b.entropy = l->experts > 1 ? b.entropy / log((double)l->experts) : 1;
    b.reuse = l->pairs[layer] ? (double)l->again[layer] / (double)l->pairs[layer] : 0;
    return b;
}

/* Of consecutive tokens, experts [n, layers, top_k]. */
static void count_again(load *l, const int32_t *experts, size_t n)
{
    for (size_t t = 0; t + 1 < n; t++)
        for (uint32_t layer = 0; layer < l->layers; layer++) {
            const int32_t *a = experts + (t * l->layers + layer) * l->top_k, *b = a + (size_t)l->layers * l->top_k;
            for (uint32_t i = 0, j = 0; i < l->top_k && j < l->top_k;) { /* both ascend */
                l->again[layer] += a[i] == b[j];
                if (a[i] < b[j])
                    i++;
                else
                    j++;
            }
            l->pairs[layer] += l->top_k;
        }
}

static void load_run(load *l, const dsv3_model *model, const ids *text, uint32_t n_threads)
{
    const dsv3_config *c = dsv3_model_config(model);
    dsv3_session *session = session_open(model, 0, 0, n_threads, 0, DSV3_DRAFTER_AUTO);
    dsv3_workspace *workspace = dsv3_session_workspace(session);
    dsv3_error error;
    dsv3_outputs outputs;
    dsv3_memory memory;
    memset(l, 0, sizeof *l);
    memset(&outputs, 0, sizeof outputs);
    l->first_layer = c->first_k_dense_replace;
    l->layers = c->num_hidden_layers - c->first_k_dense_replace;
    l->experts = c->n_routed_experts, l->top_k = c->num_experts_per_tok;
    if (!l->layers)
        fail("the checkpoint has no experts");
    l->counts = (uint64_t *)grow(NULL, (size_t)l->layers * l->experts, sizeof(uint64_t));
    l->again = (uint64_t *)grow(NULL, l->layers, sizeof(uint64_t));
    l->pairs = (uint64_t *)grow(NULL, l->layers, sizeof(uint64_t));
    memset(l->again, 0, l->layers * sizeof(uint64_t));
    memset(l->pairs, 0, l->layers * sizeof(uint64_t));
    check(dsv3_session_memory(model, NULL, &memory, &error), &error);
    int32_t *experts = (int32_t *)grow(NULL, (size_t)memory.max_tokens * l->layers * l->top_k, sizeof(int32_t));
    outputs.experts = experts;
    for (size_t at = 0; at < text->n; at += memory.max_tokens) { /* a longer text goes through in pieces */
        size_t n = text->n - at < memory.max_tokens ? text->n - at : memory.max_tokens;
        check(dsv3_session_rewind(session, 0, &error), &error);
        check(dsv3_session_append(session, text->p + at, n, &outputs, &error), &error);
        count_again(l, experts, n);
        l->n_tokens += n;
    }
    bar_clear();
    check(dsv3_workspace_experts(workspace, l->counts, (size_t)l->layers * l->experts, true, &error), &error);
    free(experts);
    dsv3_session_close(session);
}

// ---- Shown -------------------------------------------------------------------------------------------------

static void load_json(const load *l, bool biased)
{
    bytes out = {NULL, 0, 0};
    uint64_t again = 0, pairs = 0;
    bytes_format(&out,
                 "{\"n_tokens\":%" PRIu64 ",\"n_experts\":%" PRIu32 ",\"experts_per_token\":%" PRIu32
                 ",\"bias\":%s,\"layers\":[",
                 l->n_tokens, l->experts, l->top_k, biased ? "true" : "false");
    for (uint32_t layer = 0; layer < l->layers; layer++) {
        const balance b = balance_of(l, layer);
        bytes_format(&out,
                     "%s{\"layer\":%" PRIu32
                     ",\"max_over_mean\":%.6f,\"cv\":%.6f,\"entropy\":%.6f,\"reuse\":%.6f,\"counts\":[",
                     layer ? "," : "", l->first_layer + layer, b.max, b.cv, b.entropy, b.reuse);
        for (uint32_t e = 0; e < l->experts; e++)
            bytes_format(&out, "%s%" PRIu64, e ? "," : "", l->counts[(size_t)layer * l->experts + e]);
        bytes_format(&out, "]}");
        again += l->again[layer], pairs += l->pairs[layer];
    }
    bytes_format(&out, "],\"reuse\":%.6f,\"reuse_by_chance\":%.6f}\n", pairs ? (double)again / (double)pairs : 0,
                 (double)l->top_k / l->experts);
    bytes_print(&out);
    free(out.p);
}

/* A row a layer, a character an expert, or for as many as make 96 columns do; then the layer's figures. */
static void load_print(const load *l)
{
    static const char shades[] = " .:-=+*#%@"; /* of the mean: below 1/8, then 1/4, 3/8, ... 1, 1.5, 2, 3 and more */
    static const double steps[] = {0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.75, 2.5, 4.0};
    const uint32_t group = (l->experts + 95) / 96;
    double sum[4] = {0, 0, 0, 0};
    printf("%" PRIu64 " tokens, %" PRIu32 " of %" PRIu32 " experts each; a column is %" PRIu32
           " expert%s, '=' is the mean\n\n",
           l->n_tokens, l->top_k, l->experts, group, group > 1 ? "s" : "");
    printf("%-6s %-*s  max/mean    cv  entropy  reuse\n", "layer", (int)((l->experts + group - 1) / group) + 2, "");
    for (uint32_t layer = 0; layer < l->layers; layer++) {
        const uint64_t *counts = l->counts + (size_t)layer * l->experts;
        const balance b = balance_of(l, layer);
        const double mean = (double)l->n_tokens * l->top_k / l->experts;
        printf("%-6" PRIu32 " |", l->first_layer + layer);
        for (uint32_t e = 0; e < l->experts; e += group) {
            uint32_t n = l->experts - e < group ? l->experts - e : group, shade = 0;
            uint64_t here = 0;
            for (uint32_t i = 0; i < n; i++)
                here += counts[e + i];
            while (shade < COUNT(steps) && (double)here / n >= steps[shade] * mean)
                shade++;
            putchar(shades[shade]);
        }
        printf("|  %8.2f %5.2f  %7.3f  %5.3f\n", b.max, b.cv, b.entropy, b.reuse);
        sum[0] += b.max, sum[1] += b.cv, sum[2] += b.entropy, sum[3] += b.reuse;
    }
    printf("%-6s %-*s  %8.2f %5.2f  %7.3f  %5.3f  (reuse by chance %.3f)\n", "mean",
           (int)((l->experts + group - 1) / group) + 2, "", sum[0] / l->layers, sum[1] / l->layers, sum[2] / l->layers,
           sum[3] / l->layers, (double)l->top_k / l->experts);
}

/* White at nothing, dark blue at three times the mean and more. */
static void load_svg(const load *l, const char *path)
{
    const uint32_t cell = l->experts > 64 ? 6 : 14, left = 40, top = 24;
    const double mean = (double)l->n_tokens * l->top_k / l->experts;
    bytes out = {NULL, 0, 0};
    bytes_format(&out,
                 "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%" PRIu32 "\" height=\"%" PRIu32
                 "\" font-family=\"sans-serif\" "
                 "font-size=\"11\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
                 left + l->experts * cell + 8, top + l->layers * cell + 8);
    bytes_format(&out,
                 "<text x=\"%" PRIu32 "\" y=\"15\">experts 0 to %" PRIu32 "; %" PRIu64
                 " tokens; darkest: 3 times the mean</text>\n",
                 left, l->experts - 1, l->n_tokens);
    for (uint32_t layer = 0; layer < l->layers; layer++) {
        if (cell >= 11 || layer % 4 == 0)
            bytes_format(&out, "<text x=\"4\" y=\"%" PRIu32 "\">%" PRIu32 "</text>\n", top + layer * cell + cell - 2,
                         l->first_layer + layer);
        for (uint32_t e = 0; e < l->experts; e++) {
            double v = mean > 0 ? (double)l->counts[(size_t)layer * l->experts + e] / (3 * mean) : 0;
            v = v > 1 ? 1 : v;
            bytes_format(&out,
                         "<rect x=\"%" PRIu32 "\" y=\"%" PRIu32 "\" width=\"%" PRIu32 "\" height=\"%" PRIu32
                         "\" fill=\"#%02x%02x%02x\"/>\n",
                         left + e * cell, top + layer * cell, cell, cell, (unsigned)(255 - 247 * v),
                         (unsigned)(255 - 207 * v), (unsigned)(255 - 148 * v));
        }
    }
    bytes_format(&out, "</svg>\n");
    FILE *f = file_open(path, "wb");
    file_write(f, path, out.p, out.n);
    file_close(f, path);
    free(out.p);
}

static int experts_run(int argc, char **argv)
{
    const char *dir = NULL, *file = "-", *svg = NULL;
    uint32_t n = 0, n_threads = 0;
    bool as_json = false, no_bias = false;
    const option options[] = {
        {"-f", OPTION_TEXT, &file, 0, 0},           {"-n", OPTION_COUNT, &n, 0, 0},
        {"--svg", OPTION_TEXT, &svg, 0, 0},         {"--json", OPTION_FLAG, &as_json, 0, 0},
        {"--no-bias", OPTION_FLAG, &no_bias, 0, 0}, {"--threads", OPTION_COUNT, &n_threads, 0, 0},
    };
    arguments(argc, argv, experts_help, options, COUNT(options), &dir, 1);
    bytes text = file_read(file);
    held_dir held = {NULL, NULL};
    dsv3_model *model;
    dsv3_error error;
    const dsv3_tokenizer *tokenizer;
    ids list = {NULL, 0, 0};
    load l;
    if (no_bias) {
        dsv3_model_opts opts;
        memset(&opts, 0, sizeof opts);
        held.dir = dir;
        opts.reader.open_fn = held_open, opts.reader.read_fn = held_read, opts.reader.user = &held;
        check(dsv3_model_open(&model, NULL, &opts, &error), &error);
        held_zero_bias(&held, model);
    } else {
        model = model_open(dir, DSV3_ISA_AUTO, DSV3_COMPUTE_AUTO, false);
    }
    check(dsv3_model_tokenizer(model, &tokenizer, &error), &error);
    check(encode(tokenizer, &text, true, false, &list, &error), &error);
    list.n = n && n < list.n ? n : list.n;
    load_run(&l, model, &list, n_threads);
    if (as_json)
        load_json(&l, !no_bias);
    else
        load_print(&l);
    if (svg)
        load_svg(&l, svg);
    dsv3_model_close(model);
    for (held_file *h = held.files, *next; h; h = next) {
        next = h->next;
        free(h->data.p), free(h);
    }
    free(l.counts), free(l.again), free(l.pairs), free(text.p), free(list.p);
    return finish();
}

#endif
