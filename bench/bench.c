/* How fast dsv3.h runs, beside what this machine allows.

   Writes checkpoints of named shapes with random weights once (shapes.h), and measures in one process, in turn: a plain
   read of the same mapped bytes and the multiply-add peaks of this CPU (roof.h), decode, prompts and batches of rows, the
   time to open, single matrix products (kernels.h), and another engine's llama-bench (peer.h). Each figure stands beside
   its bound, the larger of bytes / bandwidth and multiply-adds / peak. Only the public API is used. bench/README.md says
   how to read the tables. */

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* madvise */
#endif

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

enum { MAX_LIST = 64, MAX_REPS = 101, MAX_THREADS = 256, MAX_BATCH = 512, ROWS_CALLS = 4 };

#define FORMAT __attribute__((format(printf, 1, 2)))

FORMAT static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%sbench: ", isatty(2) ? "\r\033[K" : "");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static void must(dsv3_result result, const dsv3_error *error)
{
    if (result)
        die("%s: %s (dsv3.h:%u)", dsv3_result_name(result), error->message, error->line);
}

static void *need(size_t size)
{
    void *p = calloc(size ? size : 1, 1);
    if (!p)
        die("out of memory");
    return p;
}

/* On a terminal only: one line that says what runs. "" clears it. */
FORMAT static void progress(const char *format, ...)
{
    va_list args;
    if (!isatty(2))
        return;
    va_start(args, format);
    fprintf(stderr, "\r\033[K");
    vfprintf(stderr, format, args);
    fflush(stderr);
    va_end(args);
}

static double seconds(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static double now(void)
{
    return seconds(CLOCK_MONOTONIC);
}

typedef struct stats {
    double low, mid, high; /* mid: the median */
} stats;

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static stats stats_of(const double *v, uint32_t n)
{
    double sorted[MAX_REPS + 1];
    stats s;
    memcpy(sorted, v, n * sizeof *v);
    qsort(sorted, n, sizeof *v, compare_double);
    s.low = sorted[0], s.high = sorted[n - 1];
    s.mid = n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
    return s;
}

typedef struct list {
    uint32_t v[MAX_LIST];
    uint32_t n;
} list;

enum {
    WHAT_BANDWIDTH = 1,
    WHAT_OPEN = 2,
    WHAT_KERNELS = 4,
    WHAT_DECODE = 8,
    WHAT_PROMPT = 16,
    WHAT_ROWS = 32,
    WHAT_ALL = 63,
    WHAT_TOKENIZER = 64,
    WHAT_MASK = 128,
    WHAT_BATCH = 256,
    WHAT_DRAFT = 512
};

/* The command line; one of each group between --then. */
static struct {
    const char *shape, *dtype, *head, *drafts, *dir, *commit, *svg, *peer, *peer_model;
    list isas, computes, threads, contexts, prompts, rows, sessions, n_decode,
        reps;      /* computes: indices into COMPUTES */
    uint32_t what; /* WHAT_... */
    list batch;    /* rows run at once */
    bool expand;   /* attention of prompts with keys and values written out */
    bool json;
    const char *args[64]; /* for the tokenizer: DIR FILE... */
    uint32_t n_args;
} opt;

/* Arithmetic modes, numbered as dsv3_compute. */
static const char *const COMPUTES[] = {"auto", "f32", "bf16", "fp8", "int8", "tiles"};
enum { N_COMPUTES = sizeof COMPUTES / sizeof *COMPUTES };

static dsv3_compute compute_of(const char *name)
{
    uint32_t i = 0;
    while (i + 1 < N_COMPUTES && strcmp(COMPUTES[i], name))
        i++;
    return (dsv3_compute)i;
}

/* What AUTO means for weights of this type. */
static const char *compute_resolve(uint32_t index, const char *dtype)
{
    return index ? COMPUTES[index] : strcmp(dtype, "int8") == 0 ? "int8" : strcmp(dtype, "F32") == 0 ? "f32" : "bf16";
}

/* The type of the products that a mode multiplies: its peak is that of their instruction. E4M3 times E4M3 is exact in bf16. */
static const char *compute_products(const char *compute)
{
    return strcmp(compute, "fp8") == 0 ? "bf16" : strcmp(compute, "tiles") == 0 ? "halves" : compute;
}

#include "roof.h"
#include "shapes.h"
#include "out.h"
#include "chart.h"
#include "kernels.h"
#include "peer.h"

/* A number from a file of "key: number" lines such as /proc/self/status; 0 where there is none. */
static double number_in(const char *path, const char *key)
{
    char line[256];
    double value = 0;
    size_t n = strlen(key);
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, key, n) == 0 && line[n] == ':')
            value = atof(line + n + 1);
    if (f)
        fclose(f);
    return value;
}

/* Resident memory that is no mapped file and not only kept by malloc. */
static double anonymous_bytes(void)
{
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
    return 1024 * number_in("/proc/self/status", "RssAnon");
}

// =============================================================================
// >>work   A model, and what a pass over n rows of it must read and multiply: counted from its tensors.
// =============================================================================

typedef struct model {
    dsv3_model *m;
    dsv3_config c;
    const char *name, *isa_name, *dtype, *head_dtype; /* dtype: of most of the weights */
    const char *compute;
    dsv3_isa isa;
    peak main, rest,
        attention; /* the instruction for weights of `dtype`; for the router and a bf16 head; for the cache */
    spans mapped;  /* all tensors */
    double fixed_bytes, routed_bytes;         /* read for every token; all routed experts */
    double mtp_fixed_bytes, mtp_routed_bytes; /* the same of prediction layers, the head they read included */
    double head_bytes;
    double fixed_macs, routed_macs, head_macs, router_macs; /* a row; routed: all experts */
    double cache_bytes;                                     /* a token of context, all layers */
    double anonymous;                                       /* resident bytes that opening added, the mapping aside */
} model;

static int compare_span(const void *a, const void *b)
{
    const span *x = (const span *)a, *y = (const span *)b;
    return (x->p > y->p) - (x->p < y->p);
}

static const char *dtype_word(dsv3_dtype dtype)
{
    switch ((int)dtype) {
    case DSV3_DTYPE_F8_E4M3: return "fp8";
    case DSV3_DTYPE_BF16: return "bf16";
    case DSV3_DTYPE_I8: return "int8";
    default: return dsv3_dtype_name(dtype);
    }
}

static void model_count(model *b)
{
    dsv3_error error;
    size_t n = dsv3_model_tensor_count(b->m), kept = 0;
    double most = 0, bytes_of[32] = {0};
    bool own_head = false;
    b->mapped.v = (span *)need(2 * n * sizeof(span));
    for (size_t i = 0; i < n; i++) {
        const char *name;
        dsv3_tensor t;
        must(dsv3_model_tensor_at(b->m, i, &name, &t, &error), &error);
        size_t len = strlen(name);
        if ((len > 10 && strcmp(name + len - 10, "_scale_inv") == 0) ||
            (len > 13 && strcmp(name + len - 13, ".weight_scale") == 0))
            continue; /* counted with its weight */
        uint64_t count = 1, scales = t.scale ? (t.shape[0] + t.block_rows - 1) / t.block_rows * t.scale_stride : 0;
        for (uint32_t j = 0; j < t.rank; j++)
            count *= t.shape[j];
        span part[2] = {{(const uint8_t *)t.data, (size_t)count * dsv3_dtype_size(t.dtype)},
                        {(const uint8_t *)t.scale, (size_t)scales * dsv3_dtype_size(t.scale_dtype)}};
        for (uint32_t j = 0; j < 2; j++)
            if (part[j].p && part[j].n)
                b->mapped.v[b->mapped.n++] = part[j];
        double bytes = (double)(part[0].n + part[1].n), macs = t.rank == 2 ? (double)count : 0;
        bool embedding = strcmp(name, "model.embed_tokens.weight") == 0;
        if (strcmp(name, "lm_head.weight") == 0 || (embedding && b->c.tie_word_embeddings)) {
            b->fixed_bytes += bytes, b->head_bytes = bytes, b->head_macs = macs;
            b->head_dtype = dtype_word(t.dtype);
        } else if (embedding) {
            b->fixed_bytes += bytes / (double)t.shape[0]; /* one row */
        } else if (strncmp(name, "model.layers.", 13) == 0 && (uint32_t)atoi(name + 13) >= b->c.num_hidden_layers) {
            if (strstr(name, "embed_tokens")) /* one row */
                bytes /= (double)t.shape[0];
            own_head |= strstr(name, "shared_head.head") != NULL;
            *(strstr(name, ".mlp.experts.") ? &b->mtp_routed_bytes : &b->mtp_fixed_bytes) += bytes;
        } else {
            bool routed = strstr(name, ".mlp.experts.") != NULL; /* else: every token reads it */
            *(routed ? &b->routed_bytes : &b->fixed_bytes) += bytes;
            *(routed ? &b->routed_macs : strstr(name, ".mlp.gate.weight") ? &b->router_macs : &b->fixed_macs) += macs;
            if ((bytes_of[t.dtype & 31] += bytes) > most) {
                most = bytes_of[t.dtype & 31];
                b->dtype = dtype_word(t.dtype);
            }
        }
    }
    b->mtp_fixed_bytes += own_head ? 0 : b->head_bytes;
    qsort(b->mapped.v, b->mapped.n, sizeof(span), compare_span);
    for (size_t i = 0; i < b->mapped.n; i++) { /* neighbours are joined: one stream */
        span *last = kept ? &b->mapped.v[kept - 1] : NULL;
        b->mapped.total += b->mapped.v[i].n;
        if (last && last->p + last->n == b->mapped.v[i].p)
            last->n += b->mapped.v[i].n;
        else
            b->mapped.v[kept++] = b->mapped.v[i];
    }
    b->mapped.n = kept;
}

static void model_open(model *b, const char *dir, dsv3_isa isa, uint32_t compute)
{
    dsv3_error error;
    dsv3_model_opts options;
    dsv3_memory memory;
    const char *base = strrchr(opt.shape, '/');
    memset(b, 0, sizeof *b);
    memset(&options, 0, sizeof options);
    options.isa = isa;
    options.compute = (dsv3_compute)compute;
    b->anonymous = anonymous_bytes();
    must(dsv3_model_open(&b->m, dir, &options, &error), &error);
    b->anonymous = anonymous_bytes() - b->anonymous;
    b->c = *dsv3_model_config(b->m);
    b->name = base && base[1] ? base + 1 : opt.shape;
    b->isa = dsv3_model_isa(b->m);
    b->isa_name = dsv3_isa_name(b->isa);
    b->dtype = b->head_dtype = "?";
    must(dsv3_session_memory(b->m, NULL, &memory, &error), &error);
    b->cache_bytes = (double)memory.cache_bytes / memory.max_tokens;
    model_count(b);
    b->compute = compute_resolve(compute, b->dtype);
    b->main = peak_of(b->isa, compute_products(b->compute));
    b->rest = peak_of(b->isa, strcmp(b->compute, "f32") == 0     ? "f32"
                              : strcmp(b->compute, "tiles") == 0 ? "halves"
                                                                 : "bf16");
    b->attention = peak_of(b->isa, strcmp(b->compute, "f32") ? "halves" : "f32");
}

static void model_close(model *b)
{
    dsv3_model_close(b->m);
    free(b->mapped.v);
}

typedef struct work { /* of one call */
    double bytes;
    double main, rest, attention; /* multiply-adds, by the instruction that does them: see model */
} work;

/* The part of the routed experts that a row uses. */
static double active_share(const model *b)
{
    return b->c.n_routed_experts ? (double)b->c.num_experts_per_tok / b->c.n_routed_experts : 0;
}

/* The part of the routed experts that a call touches, in the mean over `calls` calls: runs them. A call without rows beside
   each other touches what one row uses; one of very many touches all. */
static double touched_share(const model *b, dsv3_session *s, const int32_t *ids, uint32_t rows, uint32_t calls)
{
    dsv3_error error;
    dsv3_outputs outputs;
    uint32_t n_layers = b->c.num_hidden_layers - b->c.first_k_dense_replace, top = b->c.num_experts_per_tok;
    size_t n = (size_t)n_layers * b->c.n_routed_experts, touched = 0;
    if (rows == 1 || rows > 64 || n == 0)
        return rows == 1 ? active_share(b) : 1;
    int32_t *experts = (int32_t *)need((size_t)rows * n_layers * top * sizeof *experts); /* [rows, n_layers, top] */
    uint8_t *seen = (uint8_t *)need(n); /* [n_layers, n_routed_experts] */
    memset(&outputs, 0, sizeof outputs);
    outputs.experts = experts;
    for (uint32_t call = 0; call < calls; call++) {
        must(dsv3_session_append(s, ids + call * rows, rows, &outputs, &error), &error);
        memset(seen, 0, n);
        for (size_t i = 0; i < (size_t)rows * n_layers * top; i++)
            seen[i / top % n_layers * b->c.n_routed_experts + (uint32_t)experts[i]] = 1;
        for (size_t i = 0; i < n; i++)
            touched += seen[i];
    }
    free(experts), free(seen);
    return (double)touched / (double)(n * calls);
}

/* One call that appends `rows` tokens behind `context` others, logits of the last. touched: the part of the routed experts
   that is read, once for each piece of --batch rows. */
static void work_of(const model *b, uint32_t rows, double context, double touched, work *w)
{
    double pairs = rows * (context + (rows + 1) / 2.0) * b->c.num_hidden_layers * b->c.num_attention_heads;
    uint32_t batch = opt.batch.v[0], pieces = (rows + batch - 1) / batch;
    double absorbed = 2.0 * b->c.kv_lora_rank + b->c.qk_rope_head_dim;
    double expanded = b->c.qk_nope_head_dim + b->c.qk_rope_head_dim + b->c.v_head_dim;
    bool same = strcmp(b->head_dtype, b->dtype) == 0;
    w->bytes = pieces * (b->fixed_bytes + b->routed_bytes * touched + b->cache_bytes * (context + rows));
    w->main = rows * (b->fixed_macs + b->routed_macs * active_share(b)) + (same ? b->head_macs : 0);
    w->rest = rows * b->router_macs + (same ? 0 : b->head_macs);
    w->attention = pairs * (opt.expand && rows >= 64 ? expanded : absorbed);
}

// =============================================================================
// >>run   The measurements.
// =============================================================================

static void out_begin(const char *what, const char *heading, const model *b, uint32_t threads)
{
    out_text("what", heading, what);
    out_text("shape", NULL, b->name);
    out_text("dtype", NULL, b->dtype);
    out_text("head", NULL, b->head_dtype);
    out_text("compute", NULL, b->compute);
    out_text("isa", NULL, b->isa_name);
    out_text("attention", NULL, opt.expand ? "expanded" : "absorbed");
    out_number("batch", NULL, 0, opt.batch.v[0]);
    out_number("threads", "threads", 0, threads);
}

static void run_bandwidth(model *b)
{
    enum { N_READS = 4, N_ROOFS = N_READS + N_PEAKS };
    static const char *const reads[N_READS] = {"read, the mapped weights", "read, huge pages",
                                               "plain read, the mapped weights", "plain read, huge pages"};
    for (uint32_t k = 0; k < opt.threads.n; k++) {
        static double v[N_ROOFS][MAX_REPS];
        uint32_t n = opt.threads.v[k], reps = opt.reps.v[0];
        read_rate(&b->mapped, n, &v[2][0]); /* page faults */
        for (uint32_t r = 0; r < reps; r++) {
            progress("bandwidth, %u threads: %u of %u", n, r + 1, reps);
            v[0][r] = read_rate(&b->mapped, n, &v[2][r]);
            v[1][r] = read_rate(huge_pages(), n, &v[3][r]);
            for (uint32_t i = 0; i < N_PEAKS; i++)
                v[N_READS + i][r] = peak_there((peak)i) ? peak_rate((peak)i, n) : 0;
        }
        for (uint32_t i = 0; i < N_ROOFS; i++) {
            stats s = stats_of(v[i], reps);
            bool is_read = i < N_READS;
            if (s.high <= 0)
                continue;
            out_text("what", NULL, is_read ? "read" : "multiply_add");
            out_text("of", "roof", is_read ? reads[i] : PEAKS[i - N_READS].name);
            out_text("shape", NULL, b->name);
            out_number("threads", "threads", 0, n);
            out_number(is_read ? "gb_s_best" : "gmac_s_best", "best", 1, 1e-9 * s.high);
            out_number(is_read ? "gb_s" : "gmac_s", "median", 1, 1e-9 * s.mid);
            out_text(NULL, "unit", is_read ? "GB/s" : "GMAC/s");
            out_number("reps", NULL, 0, reps);
            out_end();
        }
    }
    out_table();
}

/* Any ids do; the same ones in every run. */
static void token_ids(int32_t *ids, uint32_t n, uint32_t vocab)
{
    uint64_t state = 7;
    for (uint32_t i = 0; i < n; i++)
        ids[i] = (int32_t)(random64(&state) % vocab);
}

/* One measurement, repeated: `rows` tokens appended at a time, `calls` times, behind `context` tokens, a token picked after
   each call. */
typedef struct scene {
    const char *what;
    uint32_t context, rows, calls, reps;
    work w;
    double touched, spent; /* seconds */
    double rate[MAX_REPS], bound[MAX_REPS], ratio[MAX_REPS],
        cpu[MAX_REPS];                             /* tokens a second, the bound's, their ratio */
    double read[MAX_REPS], peak[MAX_REPS];         /* bytes, multiply-adds a second */
    double plain[MAX_REPS], ratio_plain[MAX_REPS]; /* the same with the best read by loads alone, see read_rate */
    double trip[MAX_REPS];                         /* nanoseconds, see round_trip */
    double peers[MAX_SETTINGS][MAX_REPS];          /* tokens a second */
    dsv3_session **group;                          /* [rows] one for each row; NULL: one session takes all rows */
} scene;

/* The roofs at one moment. */
typedef struct roofs {
    double read, plain, main, rest, attention, trip;
} roofs;

static roofs roofs_now(model *b, uint32_t threads)
{
    roofs r;
    double plain, mapped = read_rate(&b->mapped, threads, &r.plain), huge = read_rate(huge_pages(), threads, &plain);
    r.read = mapped > huge ? mapped : huge;
    r.plain = r.plain > plain ? r.plain : plain;
    r.main = peak_rate(b->main, threads);
    r.rest = b->rest == b->main ? r.main : peak_rate(b->rest, threads);
    r.attention = b->attention == b->rest ? r.rest : peak_rate(b->attention, threads);
    r.trip = round_trip(threads);
    return r;
}

/* Did the cores move from one die to two, or back? Then what lies between was measured on two machines. */
static bool roofs_moved(const roofs *a, const roofs *b)
{
    return a->trip > 2 * b->trip || b->trip > 2 * a->trip;
}

/* All scenes of a session take their tokens from one sequence: what is there already is kept. */
static void scene_context(dsv3_session *s, const int32_t *ids, uint32_t context)
{
    dsv3_error error;
    size_t have = dsv3_session_length(s);
    if (have > context)
        must(dsv3_session_rewind(s, context, &error), &error);
    else if (have < context)
        must(dsv3_session_append(s, ids + have, context - have, NULL, &error), &error);
}

/* One token for each session of the group, a token picked in each. */
static void group_step(const scene *c, const int32_t *ids, uint32_t call, dsv3_outputs *outputs)
{
    dsv3_batch_item items[64];
    dsv3_error error;
    dsv3_sample sample;
    memset(items, 0, sizeof items);
    for (uint32_t k = 0; k < c->rows; k++) {
        items[k].session = c->group[k], items[k].tokens = ids + call * c->rows + k, items[k].count = 1;
        items[k].outputs = outputs ? &outputs[k] : NULL;
    }
    must(dsv3_batch(items, c->rows, &error), &error);
    for (uint32_t k = 0; k < c->rows && !outputs; k++)
        must(dsv3_session_sample(c->group[k], NULL, &sample, &error), &error);
}

static void group_context(const scene *c)
{
    dsv3_error error;
    for (uint32_t k = 0; k < c->rows; k++)
        must(dsv3_session_rewind(c->group[k], c->context, &error), &error);
}

/* The part of the routed experts that a step reads, in the mean over all steps. */
static double group_touched(const model *b, const scene *c, const int32_t *ids)
{
    const uint32_t n_layers = b->c.num_hidden_layers - b->c.first_k_dense_replace, top = b->c.num_experts_per_tok;
    const size_t n = (size_t)n_layers * b->c.n_routed_experts;
    int32_t *experts = (int32_t *)need((size_t)c->rows * n_layers * top * sizeof *experts);
    uint8_t *seen = (uint8_t *)need(n + 1);
    dsv3_outputs outputs[64];
    size_t touched = 0;
    memset(outputs, 0, sizeof outputs);
    for (uint32_t k = 0; k < c->rows; k++)
        outputs[k].experts = experts + (size_t)k * n_layers * top;
    group_context(c);
    for (uint32_t call = 0; call < c->calls; call++) {
        group_step(c, ids, call, outputs);
        memset(seen, 0, n);
        for (size_t i = 0; i < (size_t)c->rows * n_layers * top; i++)
            seen[i / top % n_layers * b->c.n_routed_experts + (uint32_t)experts[i]] = 1;
        for (size_t i = 0; i < n; i++)
            touched += seen[i];
    }
    free(experts), free(seen);
    return n ? (double)touched / (double)(n * c->calls) : 0;
}

/* Seconds of one repetition. */
static double scene_time(dsv3_session *s, const int32_t *ids, const scene *c)
{
    dsv3_error error;
    dsv3_sample sample;
    if (c->group)
        group_context(c);
    else
        scene_context(s, ids, c->context);
    double start = now();
    for (uint32_t i = 0; i < c->calls && c->group; i++)
        group_step(c, ids + c->context, i, NULL);
    for (uint32_t i = 0; i < c->calls && !c->group; i++) {
        must(dsv3_session_append(s, ids + c->context + i * c->rows, c->rows, NULL, &error), &error);
        must(dsv3_session_sample(s, NULL, &sample, &error), &error);
    }
    return now() - start;
}

/* One repetition, made again where the cores moved; before: the roofs measured before it, replaced by those behind it. */
static void scene_measure(model *b, dsv3_session *s, const int32_t *ids, uint32_t threads, scene *c, roofs *before)
{
    uint32_t r = c->reps, tries = 0;
    double took, cpu;
    roofs first, after, mean;
    do {
        cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
        took = scene_time(s, ids, c);
        cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
        c->spent += took;
        first = *before;
        *before = after = roofs_now(b, threads);
    } while (roofs_moved(&first, &after) && ++tries < 4);
    c->cpu[r] = cpu / (took * threads);
    c->rate[r] = c->rows * c->calls / took;
    mean.read = (first.read + after.read) / 2, mean.plain = (first.plain + after.plain) / 2;
    mean.main = (first.main + after.main) / 2;
    mean.rest = (first.rest + after.rest) / 2, mean.attention = (first.attention + after.attention) / 2;
    double by_bytes = c->w.bytes / mean.read, macs = c->w.main + c->w.rest + c->w.attention;
    double by_macs =
        mean.main > 0 ? c->w.main / mean.main + c->w.rest / mean.rest + c->w.attention / mean.attention : 0;
    c->read[r] = mean.read, c->plain[r] = mean.plain, c->trip[r] = after.trip;
    c->peak[r] = by_macs > 0 ? macs / by_macs : 0;
    c->bound[r] = c->rows / (by_bytes > by_macs ? by_bytes : by_macs);
    c->ratio[r] = c->rate[r] / c->bound[r];
    by_bytes = c->w.bytes / mean.plain;
    c->ratio_plain[r] = c->rate[r] / c->rows * (by_bytes > by_macs ? by_bytes : by_macs);
    c->reps++;
}

static bool scene_done(const scene *c)
{
    return c->reps == opt.reps.v[0] || (c->reps && c->spent > (c->reps == 1 ? 30 : 60));
}

static void scene_start(model *b, dsv3_session *s, const int32_t *ids, scene *c, const char *what, uint32_t context,
                        uint32_t rows, uint32_t calls)
{
    memset(c, 0, sizeof *c);
    c->what = what, c->context = context, c->rows = rows, c->calls = calls;
    scene_context(s, ids, context);
    c->touched = touched_share(b, s, ids + context, rows, calls);
    work_of(b, rows, context + rows * (calls - 1) / 2.0, c->touched, &c->w);
}

/* A scene alone: repetitions in turn with the roofs and with another engine, where one is named. What it did on other cores
   than ours is compared with nothing: both begin again. */
static void scene_run(model *b, dsv3_session *s, const int32_t *ids, uint32_t threads, scene *c)
{
    roofs r = roofs_now(b, threads);
    uint32_t tries = 0;
    while (!scene_done(c)) {
        progress("%s, %u threads, context %u, %u rows: %u of %u", c->what, threads, c->context, c->rows, c->reps + 1,
                 opt.reps.v[0]);
        scene_measure(b, s, ids, threads, c, &r);
        const roofs ours = r;
        for (uint32_t k = 0; peer.path && k < peer.n_settings; k++) {
            bool decode = c->rows == 1;
            progress("%s, %u threads, context %u, %u rows: %u of %u, %s %s", c->what, threads, c->context, c->rows,
                     c->reps, opt.reps.v[0], peer.name, peer.setting[k]);
            c->peers[k][c->reps - 1] = peer_rate(k, threads, decode, c->context, decode ? c->calls : c->rows);
            r = roofs_now(b, threads);
        }
        if (roofs_moved(&ours, &r) && tries++ < opt.reps.v[0])
            c->reps--;
    }
}

static void scene_fields(const model *b, uint32_t threads, const scene *c)
{
    stats tok_s = stats_of(c->rate, c->reps);
    double gb_s = 1e-9 * stats_of(c->read, c->reps).mid, gmac_s = 1e-9 * stats_of(c->peak, c->reps).mid;
    double macs = c->w.main + c->w.rest + c->w.attention;
    out_begin(c->what, "what", b, threads);
    out_number("context", "context", 0, c->context);
    out_number("rows", "rows", 0, c->rows);
    out_number("tok_s_best", "best tok/s", 2, tok_s.high);
    out_number("tok_s", "tok/s", 2, tok_s.mid);
    out_number("bound_tok_s", "bound", 2, stats_of(c->bound, c->reps).mid);
    out_number("ratio", "ratio", 2, stats_of(c->ratio, c->reps).mid);
    out_text("bound", "bound by", gmac_s > 0 && macs / gmac_s > c->w.bytes / gb_s ? "macs" : "bytes");
    out_number("ms_call", "ms a call", 2, 1e3 * c->rows / tok_s.mid);
    out_number("gb_s", "GB/s", 1, 1e-9 * c->w.bytes * tok_s.mid / c->rows);
    out_number("read_gb_s", "of", 1, gb_s);
    out_number("plain_gb_s", "plain", 1, 1e-9 * stats_of(c->plain, c->reps).mid);
    out_number("ratio_plain", "ratio by plain", 2, stats_of(c->ratio_plain, c->reps).mid);
    out_number("gmac_s", "GMAC/s", 1, 1e-9 * macs * tok_s.mid / c->rows);
    out_number("peak_gmac_s", "of", 1, gmac_s);
    out_number("cpu", "cpu", 2, stats_of(c->cpu, c->reps).mid);
    out_number("trip_ns", "trip, ns", 0, stats_of(c->trip, c->reps).mid);
    out_number("touched_experts", NULL, 3, c->touched);
    out_number("bytes_call", NULL, 0, c->w.bytes);
    out_number("macs_call", NULL, 0, macs);
    out_number("reps", NULL, 0, c->reps);
}

static void scene_print(const model *b, uint32_t threads, const scene *c)
{
    char label[96];
    scene_fields(b, threads, c);
    out_end();
    if (c->rows == 1)
        snprintf(label, sizeof label, "decode at %u, %u thread%s, %s %s", c->context, threads, threads > 1 ? "s" : "",
                 b->dtype, b->compute);
    else
        snprintf(label, sizeof label, "prompt of %u, %u thread%s, %s %s", c->rows, threads, threads > 1 ? "s" : "",
                 b->dtype, b->compute);
    chart_bar(label, stats_of(c->rate, c->reps).mid, stats_of(c->bound, c->reps).mid);
}

static void scene_print_peer(const model *b, uint32_t threads, const scene *c)
{
    for (uint32_t k = 0; k < peer.n_settings; k++) {
        double ratio[MAX_REPS], low;
        for (uint32_t r = 0; r < c->reps; r++)
            ratio[r] = c->rate[r] / c->peers[k][r];
        stats s = stats_of(ratio, c->reps);
        low = s.low;
        out_begin("peer", NULL, b, threads);
        out_text("case", "what", c->what);
        out_number("context", "context", 0, c->context);
        out_number("rows", "rows", 0, c->rows);
        out_text("peer", "beside", peer.name);
        out_text("setting", "its options", peer.setting[k]);
        out_number("tok_s", "ours, tok/s", 2, stats_of(c->rate, c->reps).mid);
        out_number("peer_tok_s", "theirs, tok/s", 2, stats_of(c->peers[k], c->reps).mid);
        out_number("ratio", "ours / theirs", 2, s.mid);
        out_number("ratio_low", "lowest", 2, low);
        out_number("ratio_high", "highest", 2, s.high);
        out_number("read_gb_s", "read GB/s", 1, 1e-9 * stats_of(c->read, c->reps).mid);
        out_number("reps", "reps", 0, c->reps);
        out_end();
    }
}

/* The batch curve: all numbers of rows in turn, so that each step is held against its neighbour of the same moment. */
static void run_curve(model *b, dsv3_session *s, const int32_t *ids, uint32_t threads)
{
    uint32_t n = opt.rows.n, context = opt.contexts.v[0];
    scene *c = (scene *)need(n * sizeof *c);
    for (uint32_t i = 0; i < n; i++)
        scene_start(b, s, ids, &c[i], "rows", context, opt.rows.v[i], opt.rows.v[i] > 16 ? 2 : ROWS_CALLS);
    roofs r = roofs_now(b, threads);
    for (uint32_t rep = 0; rep < opt.reps.v[0]; rep++)
        for (uint32_t i = 0; i < n; i++) {
            progress("rows, %u threads, %u rows: %u of %u", threads, c[i].rows, rep + 1, opt.reps.v[0]);
            scene_measure(b, s, ids, threads, &c[i], &r);
        }
    chart.n_points = 0;
    snprintf(chart.curve, sizeof chart.curve, "Rows at once behind a context of %u, tokens a second, %u threads, %s %s",
             context, threads, b->dtype, b->compute);
    for (uint32_t i = 0; i < n; i++) {
        double step[MAX_REPS], single[MAX_REPS];
        for (uint32_t rep = 0; rep < c[i].reps; rep++) {
            step[rep] = c[i].rate[rep] / c[i ? i - 1 : 0].rate[rep];
            single[rep] = c[i].rate[rep] / c[0].rate[rep];
        }
        double of_previous = stats_of(step, c[i].reps).mid, of_first = stats_of(single, c[i].reps).mid;
        bool falls = of_previous < 0.9, below = opt.rows.v[0] == 1 && of_first < 0.98;
        scene_fields(b, threads, &c[i]);
        out_number("of_previous", "to the last", 2, of_previous);
        out_number("of_first", "to the first", 2, of_first);
        out_text("flag", "", stats_of(c[i].cpu, c[i].reps).mid < 0.9 ? "busy" : falls ? "STEP" : below ? "SLOWER" : "");
        out_end();
        chart_point(c[i].rows, stats_of(c[i].rate, c[i].reps).mid, stats_of(c[i].bound, c[i].reps).mid);
    }
    free(c);
}

static bool snapshot_write(void *user, const void *data, size_t size)
{
    return fwrite(data, 1, size, (FILE *)user) == size;
}

/* Seconds to write the session, or (NULL) as many bytes, to a file and on to the disk. */
static double snapshot_seconds(dsv3_session *s, uint64_t size)
{
    char path[PATH_SIZE];
    dsv3_error error;
    path_join(path, opt.dir, "/", "snapshot");
    FILE *f = fopen(path, "wb");
    if (!f)
        die("%s cannot be written", path);
    static char block[1 << 18];
    double start = now();
    dsv3_sink to;
    to.write_fn = snapshot_write, to.user = f;
    if (s)
        must(dsv3_save(&s, 1, &to, NULL, &error), &error);
    for (uint64_t at = 0; !s && at < size; at += sizeof block)
        fwrite(block, 1, size - at < sizeof block ? (size_t)(size - at) : sizeof block, f);
    fflush(f);
    fsync(fileno(f));
    double took = now() - start;
    fclose(f);
    remove(path);
    return took;
}

/* What a fork takes, and a snapshot; then sessions advanced together, a token each, all forks behind one context: the
   batch's rate beside the bound by the bytes of the experts that are read. */
static void run_batch(model *b, uint32_t threads)
{
    enum { CALLS = 8, FORKS = 64 };
    const uint32_t context = opt.contexts.v[0], n = opt.sessions.n;
    uint32_t most = 0;
    dsv3_error error;
    dsv3_workspace_opts wo;
    dsv3_session_opts so;
    dsv3_workspace *ws;
    dsv3_session *first, *group[FORKS];
    for (uint32_t i = 0; i < n; i++)
        most = opt.sessions.v[i] > most ? opt.sessions.v[i] : most;
    memset(&wo, 0, sizeof wo);
    memset(&so, 0, sizeof so);
    wo.n_pages = context / 64 + 1 + most * 2, wo.n_threads = threads;
    must(dsv3_workspace_open(&ws, b->m, &wo, &error), &error);
    so.workspace = ws, so.max_tokens = context + CALLS + 1;
    must(dsv3_session_open(&first, b->m, &so, &error), &error);
    int32_t *ids = (int32_t *)need((context + CALLS * FORKS) * sizeof *ids);
    token_ids(ids, context + CALLS * FORKS, b->c.vocab_size);
    progress("batch, %u threads: a context of %u", threads, context);
    must(dsv3_session_append(first, ids, context, NULL, &error), &error);
    double fork_us[MAX_REPS], write[MAX_REPS], plain[MAX_REPS];
    dsv3_workspace_info before, after;
    uint64_t size = 0;
    must(dsv3_save(&first, 1, NULL, &size, &error), &error);
    dsv3_workspace_info_get(ws, &before);
    for (uint32_t r = 0; r < opt.reps.v[0]; r++) {
        double start = now();
        for (uint32_t k = 0; k < FORKS; k++)
            must(dsv3_session_fork(&group[k], first, 0, &error), &error);
        fork_us[r] = 1e6 * (now() - start) / FORKS;
        dsv3_workspace_info_get(ws, &after);
        for (uint32_t k = 0; k < FORKS; k++)
            dsv3_session_close(group[k]);
        write[r] = 1e-9 * (double)size / snapshot_seconds(first, size);
        plain[r] = 1e-9 * (double)size / snapshot_seconds(NULL, size);
    }
    out_begin("fork", "what", b, threads);
    out_number("context", "context", 0, context);
    out_number("fork_us", "us a fork", 1, stats_of(fork_us, opt.reps.v[0]).mid);
    out_number("pages", "pages", 0, before.n_pages - before.n_free);
    out_number("pages_64", "with 64 forks", 0, after.n_pages - after.n_free);
    out_number("snapshot_mb", "snapshot, MB", 1, 1e-6 * (double)size);
    out_number("save_gb_s", "saved, GB/s", 2, stats_of(write, opt.reps.v[0]).mid);
    out_number("write_gb_s", "plain write, GB/s", 2, stats_of(plain, opt.reps.v[0]).mid);
    out_end();
    out_table();
    for (uint32_t k = 0; k < most; k++)
        must(dsv3_session_fork(&group[k], first, 0, &error), &error);
    scene *c = (scene *)need(n * sizeof *c);
    for (uint32_t i = 0; i < n; i++) {
        memset(&c[i], 0, sizeof c[i]);
        c[i].what = "batch", c[i].context = context, c[i].rows = opt.sessions.v[i], c[i].calls = CALLS;
        c[i].group = group;
        c[i].touched = group_touched(b, &c[i], ids + context);
        work_of(b, c[i].rows, context + CALLS / 2.0, c[i].touched, &c[i].w);
        c[i].w.bytes += b->cache_bytes * context * (c[i].rows - 1); /* each reads it: it is in no cache */
    }
    roofs r = roofs_now(b, threads);
    for (uint32_t rep = 0; rep < opt.reps.v[0]; rep++)
        for (uint32_t i = 0; i < n; i++) {
            progress("batch, %u threads, %u sessions: %u of %u", threads, c[i].rows, rep + 1, opt.reps.v[0]);
            scene_measure(b, NULL, ids, threads, &c[i], &r);
        }
    for (uint32_t i = 0; i < n; i++) {
        double single[MAX_REPS];
        for (uint32_t rep = 0; rep < c[i].reps; rep++)
            single[rep] = c[i].rate[rep] / c[0].rate[rep];
        scene_fields(b, threads, &c[i]);
        out_number("touched", "experts read", 3, c[i].touched);
        out_number("of_first", "to the first", 2, stats_of(single, c[i].reps).mid);
        out_end();
    }
    out_table();
    for (uint32_t k = 0; k < most; k++)
        dsv3_session_close(group[k]);
    dsv3_session_close(first);
    dsv3_workspace_close(ws);
    free(c), free(ids);
}

// ---- Drafts ----------------------------------------------------------------------------------------------

enum { DRAFTS = 4, DRAFT_CONTEXT = 64, DRAFT_PLAIN = DRAFTS, DRAFT_TURN = 16 };

static const uint32_t draft_lengths[DRAFTS] = {1, 2, 4, DSV3_DRAFT_AUTO};

/* One part of a walking shape: see shapes.h. */
typedef struct draft_scene {
    uint32_t part, n;
    double right, reuse;               /* of its tokens: guessed right; of a token's experts: used again by the next */
    double touched[6];                 /* [rows] part of the routed experts that so many neighbours use */
    double rate[DRAFTS + 1][MAX_REPS]; /* tokens a second; the last: plain */
    double gain[DRAFTS][MAX_REPS];     /* against the plain run beside it */
    double passes[DRAFTS], drafted[DRAFTS], seconds[DRAFTS]; /* of the last repetition; seconds: the drafter's part */
    uint32_t reps;
} draft_scene;

/* Counts experts behind the context: [n] tokens of the text run as rows of one call. */
static void draft_experts(const model *b, dsv3_session *s, const int32_t *ids, draft_scene *c)
{
    const uint32_t n_layers = b->c.num_hidden_layers - b->c.first_k_dense_replace, top = b->c.num_experts_per_tok;
    const uint32_t n_experts = b->c.n_routed_experts;
    int32_t *experts = (int32_t *)need((size_t)c->n * n_layers * top * sizeof *experts);
    uint8_t *seen = (uint8_t *)need(n_experts);
    dsv3_error error;
    dsv3_outputs outputs;
    memset(&outputs, 0, sizeof outputs);
    outputs.experts = experts;
    must(dsv3_session_rewind(s, DRAFT_CONTEXT, &error), &error);
    must(dsv3_session_append(s, ids + DRAFT_CONTEXT, c->n, &outputs, &error), &error);
    for (uint32_t rows = 1; rows <= 5; rows++) {
        uint64_t touched = 0, windows = 0;
        for (uint32_t l = 0; l < n_layers; l++)
            for (uint32_t i = 0; i + rows <= c->n; i++, windows++) {
                memset(seen, 0, n_experts);
                for (uint32_t j = 0; j < rows * top; j++)
                    seen[experts[((i + j / top) * n_layers + l) * top + j % top]] = 1;
                for (uint32_t k = 0; k < n_experts; k++)
                    touched += seen[k];
            }
        c->touched[rows] = (double)touched / (double)(windows * n_experts);
    }
    c->reuse = 2 - c->touched[2] / c->touched[1];
    free(experts), free(seen);
}

static bool draft_runs(uint32_t which)
{
    return which == DRAFT_PLAIN || draft_lengths[which] == DSV3_DRAFT_AUTO || !opt.drafts ||
           strcmp(opt.drafts, "auto") != 0;
}

/* One way of writing the text: a session and a thread of its own, whose clock runs while it is its turn. */
typedef struct draft_lane {
    struct draft_round *round;
    dsv3_session *s;
    uint32_t which; /* of draft_lengths, or DRAFT_PLAIN */
    uint32_t got;   /* tokens since its turn began */
    double since, seconds;
    bool done;
    dsv3_stats told;
    pthread_t thread;
} draft_lane;

/* All ways of writing one text. They take turns of DRAFT_TURN tokens, so that what the machine does besides meets all alike. */
typedef struct draft_round {
    pthread_mutex_t lock;
    pthread_cond_t passed;
    uint32_t turn, n; /* whose turn it is; tokens to write */
    draft_lane lane[DRAFTS + 1];
} draft_round;

static void draft_wait(draft_lane *l)
{
    draft_round *r = l->round;
    pthread_mutex_lock(&r->lock);
    while (r->turn != l->which)
        pthread_cond_wait(&r->passed, &r->lock);
    pthread_mutex_unlock(&r->lock);
    l->got = 0, l->since = now();
}

static void draft_pass_on(draft_lane *l)
{
    draft_round *r = l->round;
    l->seconds += now() - l->since;
    pthread_mutex_lock(&r->lock);
    for (uint32_t i = 1; i <= DRAFTS + 1; i++)
        if (!r->lane[(l->which + i) % (DRAFTS + 1)].done) {
            r->turn = (l->which + i) % (DRAFTS + 1);
            break;
        }
    pthread_cond_broadcast(&r->passed);
    pthread_mutex_unlock(&r->lock);
}

static bool draft_token(void *user, const dsv3_token *t)
{
    draft_lane *l = (draft_lane *)user;
    (void)t;
    if (++l->got == DRAFT_TURN)
        draft_pass_on(l), draft_wait(l);
    return true;
}

static void *draft_main(void *user)
{
    draft_lane *l = (draft_lane *)user;
    dsv3_error error;
    dsv3_generate_opts go;
    memset(&go, 0, sizeof go);
    go.max_tokens = l->round->n, go.ignore_eos = true, go.token_fn = draft_token, go.user = l;
    draft_wait(l);
    must(dsv3_generate(l->s, NULL, 0, &go, &l->told, &error), &error);
    l->done = true;
    draft_pass_on(l);
    return NULL;
}

/* Writes the n tokens of the walk behind its context in every way. Sessions are new each time: AUTO knows nothing when it
   begins. */
static void draft_run(const model *b, uint32_t threads, const int32_t *ids, draft_scene *c)
{
    dsv3_error error;
    draft_round r;
    memset(&r, 0, sizeof r);
    r.n = c->n;
    pthread_mutex_init(&r.lock, NULL), pthread_cond_init(&r.passed, NULL);
    for (uint32_t i = 0; i <= DRAFTS; i++) {
        draft_lane *l = &r.lane[i];
        dsv3_session_opts so;
        memset(&so, 0, sizeof so);
        l->round = &r, l->which = i, l->done = !draft_runs(i);
        if (l->done)
            continue;
        so.n_threads = threads, so.max_tokens = DRAFT_CONTEXT + c->n + 1;
        so.n_draft = i == DRAFT_PLAIN ? 0 : draft_lengths[i];
        must(dsv3_session_open(&l->s, b->m, &so, &error), &error);
        must(dsv3_session_append(l->s, ids, DRAFT_CONTEXT, NULL, &error), &error);
    }
    for (r.turn = c->reps % (DRAFTS + 1); !draft_runs(r.turn); r.turn++)
        continue; /* the last one, plain, always runs */
    for (uint32_t i = 0; i <= DRAFTS; i++)
        if (draft_runs(i) && pthread_create(&r.lane[i].thread, NULL, draft_main, &r.lane[i]))
            die("no thread for the drafts");
    for (uint32_t i = 0; i <= DRAFTS; i++)
        if (draft_runs(i))
            pthread_join(r.lane[i].thread, NULL);
    for (uint32_t i = 0; i <= DRAFTS; i++) {
        const draft_lane *l = &r.lane[i];
        if (!draft_runs(i))
            continue;
        if (memcmp(dsv3_session_tokens(l->s), ids, (DRAFT_CONTEXT + c->n) * sizeof *ids))
            die("the text of part %u is not the walk: this checkpoint cannot measure drafts", c->part);
        dsv3_session_close(l->s);
        c->rate[i][c->reps] = c->n / l->seconds;
        if (i == DRAFT_PLAIN)
            continue;
        c->gain[i][c->reps] = r.lane[DRAFT_PLAIN].seconds / l->seconds;
        c->passes[i] = (double)(l->told.n_generated - l->told.accepted);
        c->drafted[i] = (double)l->told.drafted, c->seconds[i] = l->told.draft_seconds / l->seconds;
    }
    c->reps++;
    pthread_cond_destroy(&r.passed), pthread_mutex_destroy(&r.lock);
}

/* The part of the experts that a number of rows between two whole ones uses. */
static double draft_touched(const draft_scene *c, double rows)
{
    const uint32_t below = rows < 1 ? 1 : rows > 4 ? 4 : (uint32_t)rows;
    return c->touched[below] + (c->touched[below + 1] - c->touched[below]) * (rows - below);
}

/* How many times faster guessing k tokens can be, if time is bytes: README.md, Drafts. */
static double draft_gain(const model *b, const draft_scene *c, uint32_t k, double tokens_a_pass)
{
    const double cache = b->cache_bytes * (DRAFT_CONTEXT + c->n / 2.0) / (b->c.num_hidden_layers + 1);
    const double one = b->fixed_bytes + b->routed_bytes * c->touched[1] + cache * b->c.num_hidden_layers;
    const double pass = b->fixed_bytes + b->routed_bytes * c->touched[k + 1] + cache * b->c.num_hidden_layers;
    const double guesses = k * (b->mtp_fixed_bytes + cache) +
                           b->mtp_routed_bytes * (draft_touched(c, tokens_a_pass) + (k - 1) * c->touched[1]);
    return tokens_a_pass * one / (pass + guesses);
}

static void draft_print(const model *b, uint32_t threads, const draft_scene *c)
{
    double allowed[DRAFTS], best = 1;
    for (uint32_t k = 0; k + 1 < DRAFTS; k++) {
        double expected = 1; /* tokens a pass */
        for (uint32_t i = draft_lengths[k]; i; i--)
            expected = 1 + c->right * expected;
        allowed[k] = draft_gain(b, c, draft_lengths[k], draft_runs(k) ? c->n / c->passes[k] : expected);
        best = allowed[k] > best ? allowed[k] : best;
    }
    allowed[DRAFTS - 1] = best;
    for (uint32_t k = 0; k < DRAFTS; k++) {
        char length[16];
        if (!draft_runs(k))
            continue;
        stats gain = stats_of(c->gain[k], c->reps);
        snprintf(length, sizeof length, "%u", draft_lengths[k]);
        out_begin("draft", NULL, b, threads);
        out_number("acceptance", "acceptance", 2, WALK_ACCEPTANCE[c->part % 4]);
        out_number("acceptance_got", "got", 2, c->right);
        out_number("reuse", "reuse", 2, c->reuse);
        out_text("n_draft", "drafts", draft_lengths[k] == DSV3_DRAFT_AUTO ? "auto" : length);
        out_number("tokens_pass", "tokens a pass", 2, c->n / c->passes[k]);
        out_number("drafted", "guessed", 0, c->drafted[k]);
        out_number("plain_tok_s", "plain tok/s", 2, stats_of(c->rate[DRAFT_PLAIN], c->reps).mid);
        out_number("tok_s", "tok/s", 2, stats_of(c->rate[k], c->reps).mid);
        out_number("gain", "gain", 2, gain.mid);
        out_number("gain_low", "lowest", 2, gain.low);
        out_number("gain_high", "highest", 2, gain.high);
        out_number("gain_bytes", "by bytes", 2, allowed[k]);
        out_number("ratio", "ratio", 2, gain.mid / allowed[k]);
        out_number("draft_share", "time guessing", 2, c->seconds[k]);
        out_number("touched_1", NULL, 4, c->touched[1]);
        out_number("touched_2", NULL, 4, c->touched[2]);
        out_number("touched_3", NULL, 4, c->touched[3]);
        out_number("touched_5", NULL, 4, c->touched[5]);
        out_number("tokens", NULL, 0, c->n);
        out_number("reps", NULL, 0, c->reps);
        out_end();
    }
}

/* Decoding with and without drafts on a walking shape, in turn. */
static void run_draft(const char *dir, dsv3_isa isa, uint32_t compute)
{
    static draft_scene scenes[WALKS];
    dsv3_error error;
    model b;
    model_open(&b, dir, isa, compute);
    if (dsv3_model_mtp(b.m) != 1)
        die("--what draft: '%s' has no layer of multi-token prediction", opt.shape);
    const uint32_t n = opt.n_decode.v[0], part_size = b.c.vocab_size / WALKS;
    if (opt.drafts && strcmp(opt.drafts, "all") && strcmp(opt.drafts, "auto"))
        die("--drafts: '%s' is neither all nor auto", opt.drafts);
    if (DRAFT_CONTEXT + n + 1 > part_size)
        die("--what draft: at most %u tokens here", part_size - DRAFT_CONTEXT - 1);
    if (!opt.json)
        printf("`%s`: %s weights, %s head, %s, %s arithmetic; %.4f GB a token, and %.4f GB a guess.\n\n", b.name,
               b.dtype, b.head_dtype, b.isa_name, b.compute, 1e-9 * (b.fixed_bytes + b.routed_bytes * active_share(&b)),
               1e-9 * (b.mtp_fixed_bytes + b.mtp_routed_bytes * active_share(&b)));
    int32_t *ids = (int32_t *)need((DRAFT_CONTEXT + n) * sizeof *ids);
    for (uint32_t t = 0; t < opt.threads.n; t++) {
        const uint32_t threads = opt.threads.v[t];
        dsv3_workspace_opts wo;
        dsv3_workspace *ws;
        memset(&wo, 0, sizeof wo);
        wo.n_threads = threads, wo.n_pages = 2 * ((DRAFT_CONTEXT + n) / 64 + 2), wo.max_batch = 128;
        must(dsv3_workspace_open(&ws, b.m, &wo, &error), &error);
        for (uint32_t part = 0; part < WALKS; part++) {
            dsv3_session_opts so;
            dsv3_session *s;
            draft_scene *c = &scenes[part];
            memset(c, 0, sizeof *c);
            c->part = part, c->n = n;
            for (uint32_t i = 0; i < DRAFT_CONTEXT + n; i++) {
                ids[i] = (int32_t)(part * part_size + i);
                c->right += i >= DRAFT_CONTEXT && walk_right((uint32_t)ids[i], b.c.vocab_size);
            }
            c->right /= n;
            memset(&so, 0, sizeof so);
            so.workspace = ws, so.max_tokens = DRAFT_CONTEXT + n + 1;
            must(dsv3_session_open(&s, b.m, &so, &error), &error);
            must(dsv3_session_append(s, ids, DRAFT_CONTEXT, NULL, &error), &error);
            draft_experts(&b, s, ids, c);
            dsv3_session_close(s);
            while (c->reps < opt.reps.v[0]) {
                progress("draft, %u threads, acceptance %.2f, reuse %.2f: %u of %u", threads, c->right, c->reuse,
                         c->reps + 1, opt.reps.v[0]);
                draft_run(&b, threads, ids, c);
            }
            draft_print(&b, threads, c);
        }
        out_table();
        dsv3_workspace_close(ws);
    }
    free(ids);
    model_close(&b);
}

/* The weights into the page cache, read in order; or out of it (pages that are mapped somewhere stay). */
static void page_cache(const char *dir, bool keep)
{
    static uint8_t buffer[1 << 22];
    char path[PATH_SIZE];
    DIR *d = opendir(dir);
    if (!d)
        die("no directory %s", dir);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        path_join(path, dir, "/", e->d_name);
        int fd = strstr(e->d_name, ".safetensors") ? open(path, O_RDONLY) : -1;
        if (fd < 0)
            continue;
        progress("reading %s", e->d_name);
        while (keep && read(fd, buffer, sizeof buffer) > 0)
            ;
#ifdef POSIX_FADV_DONTNEED
        if (!keep && fsync(fd) == 0) /* dirty pages would stay */
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
        close(fd);
    }
    closedir(d);
}

/* From nothing to the first token: page cache warm (reps times), then dropped (once). b->m is closed: a mapping would hold
   the pages. */
static void run_open(const model *b, const char *dir, uint32_t threads)
{
    static const char *const name[3] = {"warm, best", "warm, median", "page cache dropped"};
    double v[4][MAX_REPS + 1], disk = 0; /* open, session, first token of a prompt of 8, all three: ms */
    uint32_t reps = opt.reps.v[0];
    for (uint32_t r = 0; r <= reps; r++) {
        dsv3_error error;
        dsv3_model *m;
        dsv3_session *s;
        dsv3_model_opts model_opts;
        dsv3_session_opts session_opts;
        dsv3_sample sample;
        int32_t ids[8];
        token_ids(ids, 8, b->c.vocab_size);
        memset(&model_opts, 0, sizeof model_opts);
        memset(&session_opts, 0, sizeof session_opts);
        model_opts.isa = b->isa, session_opts.n_threads = threads;
        model_opts.compute = compute_of(b->compute);
        if (r == reps)
            page_cache(dir, false);
        progress("open: %u of %u", r + 1, reps + 1);
        disk = number_in("/proc/self/io", "read_bytes");
        double t0 = now();
        must(dsv3_model_open(&m, dir, &model_opts, &error), &error);
        double t1 = now();
        must(dsv3_session_open(&s, m, &session_opts, &error), &error);
        double t2 = now();
        must(dsv3_session_append(s, ids, 8, NULL, &error), &error);
        must(dsv3_session_sample(s, NULL, &sample, &error), &error);
        double t3 = now();
        v[0][r] = 1e3 * (t1 - t0), v[1][r] = 1e3 * (t2 - t1), v[2][r] = 1e3 * (t3 - t2), v[3][r] = 1e3 * (t3 - t0);
        disk = number_in("/proc/self/io", "read_bytes") - disk;
        dsv3_session_close(s);
        dsv3_model_close(m);
    }
    page_cache(dir, false); /* what a cold start reads lies in small pages: once more, in order */
    page_cache(dir, true);
    for (uint32_t i = 0; i < 3; i++) {
        double x[4];
        for (uint32_t j = 0; j < 4; j++)
            x[j] = i == 0 ? stats_of(v[j], reps).low : i == 1 ? stats_of(v[j], reps).mid : v[j][reps];
        out_begin("open", NULL, b, threads);
        out_text("pages", "start", name[i]);
        out_number("open_ms", "open, ms", 2, x[0]);
        out_number("session_ms", "session, ms", 2, x[1]);
        out_number("first_append_ms", "8 tokens, ms", 1, x[2]);
        out_number("first_token_ms", "first token, ms", 1, x[3]);
        out_number("disk_mb", "MB from disk", 1, i < 2 ? 0 : 1e-6 * disk);
        out_end();
    }
    out_table();
}

static uint32_t longest(bool wanted, const list *l, uint32_t times, uint32_t more, uint32_t length)
{
    for (uint32_t i = 0; wanted && i < l->n; i++)
        length = times * l->v[i] + more > length ? times * l->v[i] + more : length;
    return length;
}

static void run_shape(const char *dir, dsv3_isa isa, uint32_t compute, bool first)
{
    dsv3_error error;
    model b;
    model_open(&b, dir, isa, compute);
    if (!opt.json)
        printf(
            "`%s`: %s weights, %s head, %s, %s arithmetic, %u rows at once%s; %.3f GB in all, %.4f GB and %.4f GMAC a "
            "token.\n\n",
            b.name, b.dtype, b.head_dtype, b.isa_name, b.compute, opt.batch.v[0],
            opt.expand ? ", attention of prompts expanded" : "", 1e-9 * (double)b.mapped.total,
            1e-9 * (b.fixed_bytes + b.routed_bytes * active_share(&b)),
            1e-9 * (b.fixed_macs + b.router_macs + b.head_macs + b.routed_macs * active_share(&b)));
    fflush(stdout);
    if (opt.what & WHAT_OPEN && first) {
        model_close(&b);
        run_open(&b, dir, opt.threads.v[opt.threads.n - 1]);
        model_open(&b, dir, isa, compute);
    }
    if (opt.what & WHAT_BANDWIDTH && first)
        run_bandwidth(&b);
    if (opt.what & WHAT_BATCH)
        for (uint32_t k = 0; k < opt.threads.n; k++)
            run_batch(&b, opt.threads.v[k]);
    if (!(opt.what & (WHAT_DECODE | WHAT_PROMPT | WHAT_ROWS))) {
        model_close(&b);
        return;
    }

    dsv3_session_opts options;
    dsv3_memory memory[MAX_LIST];
    double anonymous[MAX_LIST];
    uint32_t n_prompts = opt.what & WHAT_PROMPT ? opt.prompts.n : 0,
             n_contexts = opt.what & WHAT_DECODE ? opt.contexts.n : 0;
    uint32_t n_scenes = n_prompts + n_contexts;
    memset(&options, 0, sizeof options);
    options.max_batch = opt.batch.v[0];
    options.expand = opt.expand;
    options.max_tokens = longest(opt.what & WHAT_DECODE, &opt.contexts, 1, opt.n_decode.v[0], 1);
    options.max_tokens = longest(opt.what & WHAT_PROMPT, &opt.prompts, 1, 0, options.max_tokens);
    options.max_tokens = longest(opt.what & WHAT_ROWS, &opt.rows, ROWS_CALLS, opt.contexts.v[0], options.max_tokens);
    int32_t *ids = (int32_t *)need(options.max_tokens * sizeof *ids);
    token_ids(ids, options.max_tokens, b.c.vocab_size);
    huge_pages();
    scene *all = (scene *)need(opt.threads.n * n_scenes * sizeof *all); /* [threads][prompts, contexts] */
    for (uint32_t k = 0; n_scenes && k < opt.threads.n; k++) {
        dsv3_session *s;
        scene *scenes = all + k * n_scenes;
        uint32_t n = options.n_threads = opt.threads.v[k];
        double plain, before = anonymous_bytes();
        must(dsv3_session_memory(b.m, &options, &memory[k], &error), &error);
        must(dsv3_session_open(&s, b.m, &options, &error), &error);
        read_rate(&b.mapped, n, &plain); /* page faults */
        /* prompts rising, contexts falling: most of what a context needs is then there already */
        for (uint32_t i = 0; i < n_prompts; i++) {
            scene_start(&b, s, ids, &scenes[i], "prompt", 0, opt.prompts.v[i], 1);
            scene_run(&b, s, ids, n, &scenes[i]);
        }
        for (uint32_t i = n_contexts; i-- > 0;) {
            progress("decode, %u threads, context %u: start", n, opt.contexts.v[i]);
            scene_start(&b, s, ids, &scenes[n_prompts + i], "decode", opt.contexts.v[i], 1, opt.n_decode.v[0]);
            scene_run(&b, s, ids, n, &scenes[n_prompts + i]);
        }
        anonymous[k] = b.anonymous + anonymous_bytes() - before;
        dsv3_session_close(s);
        for (uint32_t i = 0; i < n_scenes; i++)
            scene_print(&b, n, &scenes[i]);
    }
    out_table();
    for (uint32_t k = 0; peer.path && k < opt.threads.n; k++)
        for (uint32_t i = 0; i < n_scenes; i++)
            scene_print_peer(&b, opt.threads.v[k], &all[k * n_scenes + i]);
    out_table();
    for (uint32_t k = 0; opt.what & WHAT_ROWS && k < opt.threads.n; k++) {
        dsv3_session *s;
        options.n_threads = opt.threads.v[k];
        must(dsv3_session_open(&s, b.m, &options, &error), &error);
        run_curve(&b, s, ids, opt.threads.v[k]);
        dsv3_session_close(s);
    }
    out_table();
    for (uint32_t k = 0; n_scenes && k < opt.threads.n; k++) {
        out_begin("memory", NULL, &b, opt.threads.v[k]);
        out_number("mapped_mb", "mapped, MB", 1, 1e-6 * (double)memory[k].file_bytes);
        out_number("model_mb", "model, MB", 2, 1e-6 * (double)memory[k].model_bytes);
        out_number("session_mb", "session, MB", 2, 1e-6 * (double)memory[k].session_bytes);
        out_number("cache_mb", "its cache, MB", 2, 1e-6 * (double)memory[k].cache_bytes);
        out_number("max_tokens", "for tokens", 0, memory[k].max_tokens);
        out_number("anonymous_mb", "resident beyond the mapping, MB", 2, 1e-6 * anonymous[k]);
        out_end();
    }
    out_table();
    free(all), free(ids);
    model_close(&b);
}

static void run_tokenizer(void)
{
    dsv3_error error;
    dsv3_tokenizer *t = NULL;
    double v[MAX_REPS];
    uint32_t reps = opt.reps.v[0];
    for (uint32_t r = 0; r < reps; r++) {
        dsv3_tokenizer_close(t);
        double start = now();
        must(dsv3_tokenizer_open(&t, opt.args[0], NULL, &error), &error);
        v[r] = 1e3 * (now() - start);
    }
    out_text("what", NULL, "tokenizer_open");
    out_text(NULL, "tokenizer, 1 thread", "open");
    out_number("best_ms", "best, ms", 2, stats_of(v, reps).low);
    out_number("median_ms", "median, ms", 2, stats_of(v, reps).mid);
    out_end();
    out_table();
    for (uint32_t i = 1; i < opt.n_args; i++) {
        FILE *f = fopen(opt.args[i], "rb");
        const char *base = strrchr(opt.args[i], '/');
        if (!f || fseek(f, 0, SEEK_END))
            die("cannot read %s", opt.args[i]);
        size_t len = (size_t)ftell(f), cap = len + 16, count = 0; /* never more tokens than bytes */
        char *text = (char *)need(len);
        int32_t *ids = (int32_t *)need(cap * sizeof *ids);
        rewind(f);
        if (fread(text, 1, len, f) != len)
            die("cannot read %s", opt.args[i]);
        fclose(f);
        for (uint32_t r = 0; r < reps; r++) {
            progress("%s: %u of %u", opt.args[i], r + 1, reps);
            double start = now();
            must(dsv3_tokenize(t, text, len, 0, ids, cap, &count, &error), &error);
            v[r] = 1e-6 * (double)len / (now() - start);
        }
        out_text("what", NULL, "tokenizer");
        out_text("text", "text", base ? base + 1 : opt.args[i]);
        out_number("bytes", "bytes", 0, (double)len);
        out_number("tokens", "tokens", 0, (double)count);
        out_number("mb_s_best", "best, MB/s", 2, stats_of(v, reps).high);
        out_number("mb_s", "median, MB/s", 2, stats_of(v, reps).mid);
        out_end();
        free(text), free(ids);
    }
    out_table();
    dsv3_tokenizer_close(t);
}

/* Schemas, and a text that fits each. */
static const char *const MASKS[][3] = {
    {"any JSON", "true",
     "{\"title\": \"A tale\", \"n\": [1, 2.5, -3e10, null], \"inner\": {\"text\": \"He said: \\\"no\\\".\"}}"},
    {"object",
     "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\",\"minLength\":2,\"maxLength\":50},\"age\":{"
     "\"type\":\"integer\","
     "\"minimum\":0,\"maximum\":120},\"tags\":{\"type\":\"array\",\"items\":{\"type\":\"string\"}},\"kind\":{\"enum\":["
     "\"alpha\",\"beta\"]}},"
     "\"required\":[\"name\",\"age\"],\"additionalProperties\":false}",
     "{\"name\": \"Anna the great\", \"age\": 42, \"tags\": [\"a long tag, with words\", \"b\"], \"kind\": \"beta\"}"},
    {"patterns",
     "{\"type\":\"object\",\"properties\":{\"code\":{\"type\":\"string\",\"pattern\":\"^[A-Z]{3}-[0-9]{4}$\"},\"word\":"
     "{\"type\":\"string\","
     "\"pattern\":\"^[a-z "
     "]+$\"},\"mail\":{\"type\":\"string\",\"pattern\":\"^[a-z.]+@[a-z]+\\\\.(com|org)$\"}},\"additionalProperties\":"
     "false}",
     "{\"code\": \"ABC-1234\", \"word\": \"some small words in a row\", \"mail\": \"someone.else@example.org\"}"},
};

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Constrained output: compiling, and a mask before each token of a text; of each the best of the repetitions. */
static void run_mask(void)
{
    enum { MAX_TOKENS = 256 };
    dsv3_error error;
    dsv3_tokenizer *t = NULL;
    dsv3_tokenizer_info info;
    must(dsv3_tokenizer_open(&t, opt.args[0], NULL, &error), &error);
    dsv3_tokenizer_info_get(t, &info);
    uint32_t *mask = (uint32_t *)need(((size_t)info.n_tokens + 31) / 32 * sizeof *mask), reps = opt.reps.v[0];
    for (size_t i = 0; i < sizeof MASKS / sizeof *MASKS; i++) {
        const char *schema = MASKS[i][1], *text = MASKS[i][2];
        double best[MAX_TOKENS + 1], compile[2] = {1e9, 1e9};
        int32_t ids[MAX_TOKENS];
        size_t n = 0;
        dsv3_grammar_state state;
        dsv3_grammar *g = NULL, *like = NULL;
        dsv3_grammar_opts o;
        memset(&o, 0, sizeof o);
        must(dsv3_tokenize(t, text, strlen(text), 0, ids, MAX_TOKENS, &n, &error), &error);
        for (uint32_t r = 0; r < 2 * reps; r++) { /* alone, then with the table of tokens of the one before */
            double start = now();
            o.like = r % 2 ? like : NULL;
            must(dsv3_grammar_open(&g, t, schema, strlen(schema), &o, &error), &error);
            double took = 1e3 * (now() - start);
            compile[r % 2] = took < compile[r % 2] ? took : compile[r % 2];
            if (r % 2 == 0) {
                like = g;
                continue;
            }
            dsv3_grammar_close(g);
            if (r + 1 < 2 * reps)
                dsv3_grammar_close(like);
        }
        dsv3_grammar_start(like, &state);
        for (size_t k = 0; k <= n; k++) {
            best[k] = 1e9;
            for (uint32_t r = 0; r < reps; r++) {
                double start = now();
                dsv3_grammar_mask(like, &state, mask);
                double took = 1e6 * (now() - start);
                best[k] = took < best[k] ? took : best[k];
            }
            if (k < n && !dsv3_grammar_accept(like, &state, ids[k]))
                die("the text for '%s' does not fit at token %u", MASKS[i][0], (unsigned)k);
        }
        if (!dsv3_grammar_can_end(like, &state))
            die("the text for '%s' is not whole", MASKS[i][0]);
        qsort(best, n + 1, sizeof *best, by_size);
        out_text("what", NULL, "mask");
        out_text("schema", "masks, 1 thread", MASKS[i][0]);
        out_number("tokens", "tokens", 0, (double)(n + 1));
        out_number("median_us", "median, us", 1, best[(n + 1) / 2]);
        out_number("p99_us", "99th percentile, us", 1, best[(n + 1) * 99 / 100]);
        out_number("compile_ms", "compile, ms", 2, compile[0]);
        out_number("compile_like_ms", "with a table of tokens, ms", 2, compile[1]);
        out_end();
        dsv3_grammar_close(like);
    }
    out_table();
    free(mask);
    dsv3_tokenizer_close(t);
}

// =============================================================================
// >>main   Command line and heading.
// =============================================================================

static const char HELP[] =
    "usage: bench [options]                               speed on a checkpoint of random weights, beside the bound\n"
    "       bench --what tokenizer [options] DIR FILE...  speed of a checkpoint's tokenizer on texts\n"
    "       bench --what mask [options] DIR               time of masks for JSON, on a checkpoint's tokenizer\n"
    "  --shape NAME|DIR   bench-3b (default), v3-slice, tiny, or a checkpoint's directory\n"
    "  --dtype NAME       what a named shape and the kernels' weights are: fp8 (default), int8, bf16\n"
    "  --head bf16|8bit   the head of a named shape; 8bit: as the other weights (bf16)\n"
    "  --dir DIR          where the shapes are written, once (build/shapes)\n"
    "  --what LIST        bandwidth, open, kernels, decode, prompt, rows; all of these (default); tokenizer; mask; "
    "batch; draft\n"
    "  --compute LIST     arithmetic: auto, f32, bf16, fp8, int8, tiles (auto)\n"
    "  --isa LIST         auto, scalar, avx2, avx-vnni, avx512, avx512-vnni, avx512-bf16, avx512-amx (auto)\n"
    "  --threads LIST     (1 and all cores)\n"
    "  --context LIST     tokens before the first decoded one (8,4096,16384); before the rows: the first of them\n"
    "  --prompt LIST      lengths of prompts (128,512,4096)\n"
    "  --sessions LIST    sessions advanced together by a token each, behind the first context (1,2,4,8,16)\n"
    "  --rows LIST        rows at once, at most 512 (1-8,12,13,16,17,24,25,32,33,48,49,64)\n"
    "  --batch N          rows of a prompt run at once (512)\n"
    "  --expand           attention of prompts with keys and values of each head written out\n"
    "  --tokens N         tokens decoded in a repetition (32)\n"
    "  --drafts WORD      of --what draft: all (default) or auto, which leaves fixed numbers of guesses out\n"
    "  --reps N           repetitions (5); a case over a minute stops at two, one whose first took 30 s at one\n"
    "  --peer PATH        a llama-bench (of llama.cpp or ik_llama.cpp) to run in turn with decode and prompt\n"
    "  --peer-model FILE  its model, a GGUF of the same shape\n"
    "  --json             one object a line\n"
    "  --svg FILE         also draws the figures\n"
    "  --commit TEXT      for the heading\n"
    "  --then             further measurements behind it: options stay as they were, --what begins anew\n";

static list parse_list(const char *flag, const char *text, uint32_t largest)
{
    list l = {{0}, 0};
    for (char *end; *text; text = *end ? end + 1 : end) {
        unsigned long v = strtoul(text, &end, 10), last = v;
        bool good = end != text;
        if (good && *end == '-') {
            text = end + 1;
            last = strtoul(text, &end, 10);
            good = end != text;
        }
        if (!good || (*end && *end != ',') || v < 1 || last < v || last > largest || last - v >= MAX_LIST - l.n)
            die("%s wants numbers from 1 to %u, as in: %s 1,2,5-8; at most %u of them", flag, largest, flag,
                (uint32_t)MAX_LIST);
        for (; v <= last; v++)
            l.v[l.n++] = (uint32_t)v;
    }
    if (l.n == 0)
        die("%s wants a number", flag);
    return l;
}

/* Takes one word off the front of a list with commas: its number among `words`. */
static uint32_t parse_word(const char *flag, const char **text, const char *const *words, uint32_t n)
{
    size_t len = strcspn(*text, ",");
    uint32_t i = 0;
    while (i < n && (strlen(words[i]) != len || strncmp(words[i], *text, len)))
        i++;
    if (i == n)
        die("%s: '%s' is not among its words; bench -h lists them", flag, *text);
    *text += len + ((*text)[len] == ',');
    return i;
}

/* Arguments argv[0 ... argc-1], in which --then does not occur. first: from the defaults. */
static void parse(int argc, char **argv, bool first)
{
    static const char *const WHAT[] = {"bandwidth", "open", "kernels", "decode", "prompt", "rows",
                                       "tokenizer", "mask", "batch",   "draft",  "all"};
    enum { N_WHAT = sizeof WHAT / sizeof *WHAT, MAX_ISAS = 32 };
    static const struct {
        const char *flag, *initial; /* initial: of a list */
        const char **text;
        list *numbers;
        uint32_t largest;
    } FLAGS[] = {
        {"--shape", NULL, &opt.shape, NULL, 0},
        {"--dtype", NULL, &opt.dtype, NULL, 0},
        {"--head", NULL, &opt.head, NULL, 0},
        {"--drafts", NULL, &opt.drafts, NULL, 0},
        {"--dir", NULL, &opt.dir, NULL, 0},
        {"--commit", NULL, &opt.commit, NULL, 0},
        {"--svg", NULL, &opt.svg, NULL, 0},
        {"--peer", NULL, &opt.peer, NULL, 0},
        {"--peer-model", NULL, &opt.peer_model, NULL, 0},
        {"--threads", "1", NULL, &opt.threads, MAX_THREADS},
        {"--context", "8,4096,16384", NULL, &opt.contexts, 1000000},
        {"--prompt", "128,512,4096", NULL, &opt.prompts, 1000000},
        {"--rows", "1-8,12,13,16,17,24,25,32,33,48,49,64", NULL, &opt.rows, MAX_BATCH},
        {"--batch", "512", NULL, &opt.batch, 65536},
        {"--sessions", "1,2,4,8,16", NULL, &opt.sessions, 64},
        {"--tokens", "32", NULL, &opt.n_decode, 100000},
        {"--reps", "5", NULL, &opt.reps, MAX_REPS},
    };
    enum { N_FLAGS = sizeof FLAGS / sizeof *FLAGS };
    const char *isas[MAX_ISAS]; /* "?" for a number that names none */
    for (uint32_t k = 0; k < MAX_ISAS; k++)
        isas[k] = dsv3_isa_name((dsv3_isa)k);
    opt.what = 0;
    if (first) {
        long cores = sysconf(_SC_NPROCESSORS_ONLN);
        opt.shape = "bench-3b", opt.dtype = "fp8", opt.head = "bf16", opt.dir = "build/shapes", opt.commit = "";
        for (uint32_t k = 0; k < N_FLAGS; k++)
            if (FLAGS[k].numbers)
                *FLAGS[k].numbers = parse_list(FLAGS[k].flag, FLAGS[k].initial, FLAGS[k].largest);
        if (cores > 1)
            opt.threads.v[opt.threads.n++] = (uint32_t)(cores < MAX_THREADS ? cores : MAX_THREADS);
        opt.isas.v[0] = DSV3_ISA_AUTO, opt.isas.n = 1;
        opt.computes.v[0] = 0, opt.computes.n = 1;
    }
    for (int i = 0; i < argc; i++) {
        const char *a = argv[i], *value;
        uint32_t k = 0;
        if (strcmp(a, "-h") == 0 || strcmp(a, "--help") == 0) {
            fputs(HELP, stdout);
            exit(0);
        }
        if (strcmp(a, "--json") == 0) {
            opt.json = true;
            continue;
        }
        if (strcmp(a, "--expand") == 0) {
            opt.expand = true;
            continue;
        }
        if (a[0] != '-') {
            if (opt.n_args == 64)
                die("at most 63 texts");
            opt.args[opt.n_args++] = a;
            continue;
        }
        while (k < N_FLAGS && strcmp(a, FLAGS[k].flag))
            k++;
        if (k == N_FLAGS && strcmp(a, "--what") && strcmp(a, "--isa") && strcmp(a, "--compute"))
            die("no option %s; bench -h lists them", a);
        if (++i == argc)
            die("%s wants a value; bench -h says which", a);
        value = argv[i];
        if (strcmp(a, "--what") == 0)
            while (*value) {
                uint32_t w = parse_word(a, &value, WHAT, N_WHAT);
                opt.what |= w == N_WHAT - 1 ? (uint32_t)WHAT_ALL : 1u << w;
            }
        else if (strcmp(a, "--isa") == 0)
            for (opt.isas.n = 0; *value && opt.isas.n < MAX_LIST;)
                opt.isas.v[opt.isas.n++] = parse_word(a, &value, isas, MAX_ISAS);
        else if (strcmp(a, "--compute") == 0)
            for (opt.computes.n = 0; *value && opt.computes.n < MAX_LIST;)
                opt.computes.v[opt.computes.n++] = parse_word(a, &value, COMPUTES, N_COMPUTES);
        else if (FLAGS[k].text)
            *FLAGS[k].text = value;
        else
            *FLAGS[k].numbers = parse_list(a, value, FLAGS[k].largest);
    }
    if (!opt.what)
        opt.what = WHAT_ALL;
    if (opt.n_args && !(opt.what & (WHAT_TOKENIZER | WHAT_MASK)))
        die("'%s': only --what tokenizer and mask take files", opt.args[0]);
    if (!opt.n_args && opt.what & (WHAT_TOKENIZER | WHAT_MASK))
        die("a directory with tokenizer.json is missing: bench --what tokenizer|mask DIR [FILE...]");
    if (strcmp(opt.dtype, "fp8") && strcmp(opt.dtype, "int8") && strcmp(opt.dtype, "bf16"))
        die("--dtype is fp8, int8 or bf16");
    if (strcmp(opt.head, "bf16") && strcmp(opt.head, "8bit"))
        die("--head is bf16 or 8bit");
    if (strcmp(opt.head, "8bit") == 0 && strcmp(opt.dtype, "bf16") == 0)
        die("--head 8bit goes with --dtype fp8 or int8");
    if (!opt.peer != !opt.peer_model)
        die("--peer and --peer-model go together");
    if (opt.peer)
        peer_find(opt.peer, opt.peer_model);
}

static void heading(int argc, char **argv)
{
    char line[256], cpu[256] = "unknown processor", date[64];
    struct utsname u;
    time_t t = time(NULL);
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            snprintf(cpu, sizeof cpu, "%.200s", strchr(line, ':') + 2);
            cpu[strcspn(cpu, "\n")] = 0;
            break;
        }
    if (f)
        fclose(f);
    strftime(date, sizeof date, "%Y-%m-%d %H:%M UTC", gmtime(&t));
    snprintf(chart.note, sizeof chart.note, "dsv3.h %s%s%s, %s, %ld cores, %s", DSV3_VERSION_STRING,
             *opt.commit ? ", commit " : "", opt.commit, cpu, sysconf(_SC_NPROCESSORS_ONLN), date);
    if (opt.json)
        return;
    printf("# Speed of dsv3.h %s\n\n- machine: %s, %ld cores, %.0f GB", DSV3_VERSION_STRING, cpu,
           sysconf(_SC_NPROCESSORS_ONLN), 1e-9 * (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE));
    if (uname(&u) == 0)
        printf(", %s %s", u.sysname, u.release);
    printf("\n- multiply-adds: ");
    for (uint32_t i = 0, n = 0; i < N_PEAKS; i++)
        if (peak_there((peak)i))
            printf("%s%s", n++ ? ", " : "", PEAKS[i].name);
#if defined(__clang__)
    printf("\n- compiler: clang %s", __clang_version__);
#else
    printf("\n- compiler: gcc %s", __VERSION__);
#endif
#ifdef BENCH_CFLAGS
    printf(", `%s`", BENCH_CFLAGS);
#endif
    printf("\n- date: %s\n- commit: %s\n- command: `", date, *opt.commit ? opt.commit : "unknown");
    for (int i = 0; i < argc; i++)
        printf("%s%s", i ? " " : "", argv[i]);
    printf("`\n\n");
}

/* On the named shape's variant that has a prediction layer. */
static void run_drafts(format f)
{
    char dir[PATH_SIZE], name[64];
    const shape *p = NULL;
    snprintf(name, sizeof name, "%s%s", opt.shape, strstr(opt.shape, "-mtp") ? "" : "-mtp");
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        if (strcmp(name, SHAPES[i].name) == 0)
            p = &SHAPES[i];
    if (!p)
        die("--what draft needs a shape whose text is known: bench-3b or tiny");
    opt.shape = p->name;
    shape_ensure(dir, p, f, opt.dir);
    page_cache(dir, true);
    for (uint32_t i = 0; i < opt.isas.n; i++)
        for (uint32_t j = 0; j < opt.computes.n; j++)
            run_draft(dir, (dsv3_isa)opt.isas.v[i], opt.computes.v[j]);
}

/* What one group of options asks for. */
static void run_group(void)
{
    char dir[PATH_SIZE];
    const shape *p = NULL;
    struct stat st;
    format f;
    memset(&f, 0, sizeof f);
    f.dtype = strcmp(opt.dtype, "fp8") == 0    ? DSV3_DTYPE_F8_E4M3
              : strcmp(opt.dtype, "int8") == 0 ? DSV3_DTYPE_I8
                                               : DSV3_DTYPE_BF16;
    f.head8 = strcmp(opt.head, "8bit") == 0;
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++)
        if (strcmp(opt.shape, SHAPES[i].name) == 0)
            p = &SHAPES[i];
    if (!p && (stat(opt.shape, &st) || !S_ISDIR(st.st_mode)))
        die("'%s' is neither a shape (bench-3b, v3-slice, tiny) nor a directory", opt.shape);
    if (opt.what & WHAT_TOKENIZER)
        run_tokenizer();
    if (opt.what & WHAT_MASK)
        run_mask();
    for (uint32_t i = 0; opt.what & WHAT_KERNELS && i < opt.isas.n; i++)
        for (uint32_t j = 0; j < opt.computes.n; j++) {
            dsv3_isa isa = (dsv3_isa)opt.isas.v[i];
            if (isa == DSV3_ISA_AUTO)
                isa = dsv3__cpu_best();
            run_kernels(f.dtype, opt.dtype, isa, compute_resolve(opt.computes.v[j], opt.dtype));
        }
    if (opt.what & WHAT_DRAFT)
        run_drafts(f);
    if (!(opt.what & ((WHAT_ALL & ~(uint32_t)WHAT_KERNELS) | WHAT_BATCH)))
        return;
    if (p)
        shape_ensure(dir, p, f, opt.dir);
    else
        path_join(dir, opt.shape, "", "");
    page_cache(dir, true);
    for (uint32_t i = 0; i < opt.isas.n; i++)
        for (uint32_t j = 0; j < opt.computes.n; j++)
            run_shape(dir, (dsv3_isa)opt.isas.v[i], opt.computes.v[j], i + j == 0);
}

int main(int argc, char **argv)
{
    bool first = true;
    for (int i = 1, n; first || i < argc; i += n + 1) {
        for (n = 0; i + n < argc && strcmp(argv[i + n], "--then"); n++)
            ;
        parse(n, argv + i, first);
        if (first)
            heading(argc, argv);
        first = false;
        run_group();
    }
    if (opt.svg)
        chart_write(opt.svg);
    return 0;
}
