/* dsv3 quantize: a checkpoint written again with its linear layers in 8 bits, or in BF16, in the layout of a release.
   Included once, by dsv3.c, behind cli.h and model_open.

   Every file of the checkpoint becomes one of the same name. Values go through memory in bands of 128 rows: decoded,
   encoded, written; nothing else is held but the scales of the file at hand. A file is written as <name>.part and gets
   its name when it is complete; files that are there with the header that would be written are left alone, so a run that
   was broken off goes on where it was. config.json comes last: a directory without it is no checkpoint yet, and one that
   holds another checkpoint is not touched. */
#ifndef DSV3_QUANTIZE_H
#define DSV3_QUANTIZE_H

#include <limits.h>
#include <sys/stat.h>
#ifdef _WIN32
    #include <direct.h>
#endif
#ifndef DSV3_NO_THREADS
    #include <pthread.h>
#endif

static const char quantize_help[] =
    "dsv3 quantize DIR OUT --to int8|fp8|bf16    writes the checkpoint DIR again, into the directory OUT\n"
    "\n"
    "  --to int8     a scale a row, as compressed-tensors stores W8A8\n"
    "  --to fp8      E4M3 with a scale for each 128 x 128, as DeepSeek-V3 is published\n"
    "  --to bf16     no scales\n"
    "  --head        the output head too; without it lm_head stays as it is\n"
    "  --threads N   default: as many as cores\n"
    "\n"
    "Attention, experts and dense layers are converted. Embeddings, norms, the router and the head stay as they are\n"
    "(--to bf16 rounds embeddings and the head too). What DIR has in 8 bits is decoded and encoded anew. Files that "
    "are\n"
    "complete in OUT are not written again: a run that was broken off can be repeated.\n";

enum { BAND_ROWS = 128 }; /* a multiple of the rows of a block, so that bands quantize as the whole tensor would */

/* What the user wants. */
typedef struct recipe {
    const char *dir, *out;
    dsv3_dtype to;
    bool head;
    uint32_t n_threads;
    dsv3_progress progress;
    uint64_t done, total; /* bytes of all files */
} recipe;

/* One tensor of a file that is written. */
typedef struct piece {
    const char *name; /* of the tensor it comes from */
    dsv3_tensor from;
    dsv3_dtype dtype;
    uint64_t offset, size; /* bytes in the data of the file */
    bool scales;           /* not the tensor, but the scales that go with it */
    bool converted;        /* not the same bytes */
} piece;

typedef struct pieces {
    piece *p;
    size_t n, cap;
    uint64_t scales_size, data_size;
    bytes header; /* length, JSON, padding: all that stands before the data */
} pieces;

// ---- What becomes of a tensor ----------------------------------------------------------------------------

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

/* The linear layers that releases hold in 8 bits, those of a prediction layer included. */
static bool is_projection(const char *name)
{
    return (ends_with(name, "_proj.weight") && !ends_with(name, "eh_proj.weight")) ||
           ends_with(name, ".kv_a_proj_with_mqa.weight");
}

/* Is this tensor the scales of the one whose name it prolongs? */
static bool is_scale(const dsv3_model *model, const char *name, const dsv3_tensor *t)
{
    static const char *const ends[] = {"_scale_inv", "_scale"};
    for (size_t i = 0; i < COUNT(ends); i++) {
        bytes base = {NULL, 0, 0};
        dsv3_tensor weight;
        bool found = false;
        if (!ends_with(name, ends[i]))
            continue;
        bytes_add(&base, name, strlen(name) - strlen(ends[i]));
        bytes_add(&base, "", 1);
        found = dsv3_model_tensor(model, base.p, &weight, NULL) == DSV3_OK && weight.scale && weight.scale == t->data;
        free(base.p);
        if (found)
            return true;
    }
    return false;
}

static bool is_8_bits(dsv3_dtype dtype)
{
    return dtype == DSV3_DTYPE_I8 || dtype == DSV3_DTYPE_F8_E4M3;
}

static dsv3_dtype dtype_after(const recipe *r, const char *name, const dsv3_tensor *t)
{
    bool matrix = t->rank == 2 && ends_with(name, ".weight");
    if (is_8_bits(t->dtype) && !t->scale)
        fail("%s: %s without scales that fit it", name, dsv3_dtype_name(t->dtype));
    if (matrix && (is_projection(name) || (r->head && strcmp(name, "lm_head.weight") == 0)))
        return r->to;
    bool wide = t->dtype == DSV3_DTYPE_F32 || t->dtype == DSV3_DTYPE_F16;
    if (is_8_bits(t->dtype) || (r->to == DSV3_DTYPE_BF16 && matrix && wide && !ends_with(name, ".mlp.gate.weight")))
        return DSV3_DTYPE_BF16;
    return t->dtype;
}

/* Scales of a whole tensor: [rows, cols]. */
static void scale_shape(const piece *x, uint64_t shape[2])
{
    bool rows = x->from.rank == 2 && x->dtype == DSV3_DTYPE_I8;
    shape[0] = rows ? x->from.shape[0] : (x->from.shape[0] + 127) / 128;
    shape[1] = rows ? 1 : (x->from.shape[1] + 127) / 128;
}

static void piece_add(pieces *list, const piece *x)
{
    if (list->n == list->cap)
        list->p = (piece *)grow(list->p, list->cap = 2 * list->cap + 64, sizeof *list->p);
    list->p[list->n++] = *x;
}

static size_t piece_width(const piece *x)
{
    return x->scales ? sizeof(float) : dsv3_dtype_size(x->dtype);
}

static void header_add(pieces *list, const piece *x)
{
    bytes *h = &list->header, name = {NULL, 0, 0};
    uint64_t scale[2];
    const uint64_t *shape = x->from.shape;
    uint32_t rank = x->from.rank;
    bytes_add(&name, x->name, strlen(x->name));
    if (x->scales) {
        const char *end = x->dtype == DSV3_DTYPE_I8 ? "_scale" : "_scale_inv";
        bytes_add(&name, end, strlen(end));
        scale_shape(x, scale);
        shape = scale, rank = 2;
    }
    bytes_add(h, ",", 1);
    json_text(h, name.p, name.n);
    bytes_format(h, ":{\"dtype\":\"%s\",\"shape\":[", x->scales ? "F32" : dsv3_dtype_name(x->dtype));
    for (uint32_t i = 0; i < rank; i++)
        bytes_format(h, i ? ",%" PRIu64 : "%" PRIu64, shape[i]);
    bytes_format(h, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", x->offset, x->offset + x->size);
    free(name.p);
}

/* The tensors first ... end - 1 of the model are one file. Scales stand in front, then wide types before narrow ones:
   whatever the shapes, every tensor is aligned. */
static void plan_file(pieces *list, const recipe *r, const dsv3_model *model, size_t first, size_t end)
{
    list->n = 0;
    list->header.n = 0;
    list->data_size = list->scales_size = 0;
    for (size_t i = first; i < end; i++) {
        piece x;
        dsv3_error error;
        memset(&x, 0, sizeof x);
        check(dsv3_model_tensor_at(model, i, &x.name, &x.from, &error), &error);
        if (is_scale(model, x.name, &x.from))
            continue;
        x.dtype = dtype_after(r, x.name, &x.from);
        x.converted = x.dtype != x.from.dtype || x.from.scale != NULL;
        x.size = dsv3_dtype_size(x.dtype);
        for (uint32_t k = 0; k < x.from.rank; k++)
            x.size *= x.from.shape[k];
        piece_add(list, &x);
        if (x.converted && is_8_bits(x.dtype)) {
            uint64_t shape[2];
            scale_shape(&x, shape);
            x.scales = true;
            x.size = shape[0] * shape[1] * sizeof(float);
            piece_add(list, &x);
        }
    }
    static const char start[] = "{\"__metadata__\":{\"format\":\"pt\"}";
    bytes_add(&list->header, "\0\0\0\0\0\0\0\0", 8);
    bytes_add(&list->header, start, sizeof start - 1);
    for (int pass = 0; pass < 5; pass++) { /* scales; then 8, 4, 2, 1 bytes an element */
        for (size_t i = 0; i < list->n; i++) {
            piece *x = &list->p[i];
            if (pass == 0 ? !x->scales : x->scales || piece_width(x) != (size_t)16 >> pass)
                continue;
            x->offset = list->data_size;
            list->data_size += x->size;
            header_add(list, x);
        }
        if (pass == 0)
            list->scales_size = list->data_size;
    }
    bytes_add(&list->header, "}", 1);
    while (list->header.n % 8)
        bytes_add(&list->header, " ", 1);
    for (int i = 0; i < 8; i++)
        list->header.p[i] = (char)((uint64_t)(list->header.n - 8) >> 8 * i);
}

// ---- Bands of rows ---------------------------------------------------------------------------------------

/* What one thread does: rows `row` ... of a tensor, decoded and encoded. */
typedef struct band {
    const piece *x;
    uint64_t row, n_rows;
    float *values; /* [BAND_ROWS, cols] */
    uint8_t *data; /* the same as x->dtype */
    float *scale;  /* of these rows, inside the scales of the tensor; NULL where there are none */
    size_t n_scales;
    dsv3_error error;
} band;

static void *band_run(void *argument)
{
    band *b = (band *)argument;
    uint64_t cols = b->x->from.shape[1];
    size_t size = (size_t)(b->n_rows * cols) * dsv3_dtype_size(b->x->dtype);
    dsv3_tensor written;
    if (!dsv3_dequantize(b->values, &b->x->from, b->row, b->n_rows, &b->error))
        dsv3_quantize(&written, b->data, size, b->scale, b->n_scales, b->x->dtype, b->values, b->n_rows, cols,
                      &b->error);
    return NULL;
}

/* All bands at once, each on a thread of its own; one that cannot be had is done here. */
static void bands_run(band *bands, size_t n)
{
#ifndef DSV3_NO_THREADS
    pthread_t threads[64];
    bool started[64];
    for (size_t i = 1; i < n; i++)
        started[i] = pthread_create(&threads[i], NULL, band_run, &bands[i]) == 0;
    band_run(&bands[0]);
    for (size_t i = 1; i < n; i++)
        if (started[i])
            pthread_join(threads[i], NULL);
        else
            band_run(&bands[i]);
#else
    for (size_t i = 0; i < n; i++)
        band_run(&bands[i]);
#endif
}

// ---- Files -----------------------------------------------------------------------------------------------

typedef struct output {
    FILE *f;
    char *path, *part;
} output;

static char *path_join(const char *dir, const char *name, const char *end)
{
    size_t n = strlen(dir) + strlen(name) + strlen(end) + 2;
    char *path = (char *)grow(NULL, n, 1);
    snprintf(path, n, "%s/%s%s", dir, name, end);
    return path;
}

/* Nothing half written stays behind. */
NORETURN static void output_fail(const output *o)
{
    int why = errno;
    if (o->f)
        fclose(o->f);
    remove(o->part);
    fail("%s: cannot write: %s", o->part, strerror(why));
}

static void output_open(output *o, const char *dir, const char *name)
{
    o->path = path_join(dir, name, "");
    o->part = path_join(dir, name, ".part");
    o->f = fopen(o->part, "wb");
    if (!o->f)
        fail("%s: %s", o->part, strerror(errno));
}

static void output_write(const output *o, const void *data, size_t size)
{
    if (fwrite(data, 1, size, o->f) != size)
        output_fail(o);
}

static void output_seek(const output *o, uint64_t offset)
{
    if (offset > LONG_MAX)
        fail("%s: %" PRIu64 " bytes in front of the weights are too many", o->part, offset);
    if (fseek(o->f, (long)offset, SEEK_SET))
        output_fail(o);
}

static void output_close(output *o)
{
    bool good = fflush(o->f) == 0;
#ifndef _WIN32
    good = good && fsync(fileno(o->f)) == 0; /* the name must not outlive the data */
#endif
    if (!good)
        output_fail(o);
    FILE *f = o->f;
    o->f = NULL;
    if (fclose(f))
        output_fail(o);
#ifdef _WIN32
    remove(o->path); /* rename does not replace there */
#endif
    if (rename(o->part, o->path))
        output_fail(o);
    free(o->path), free(o->part);
}

static void write_text(const char *dir, const char *name, const bytes *text)
{
    output o;
    output_open(&o, dir, name);
    output_write(&o, text->p, text->n);
    output_close(&o);
}

/* Is this file there, complete, with this header? What lies behind the header is taken for what it says. */
static bool is_there(const pieces *list, const char *path)
{
    FILE *f = fopen(path, "rb");
    bytes found = {NULL, 0, 0};
    bool same = false;
    struct stat s;
    if (!f)
        return false;
    if (stat(path, &s) == 0 && (uint64_t)s.st_size == list->header.n + list->data_size) {
        bytes_room(&found, list->header.n);
        same = fread(found.p, 1, list->header.n, f) == list->header.n &&
               memcmp(found.p, list->header.p, list->header.n) == 0;
    }
    fclose(f);
    free(found.p);
    return same;
}

static void report(recipe *r, uint64_t more)
{
    r->done += more;
    if (r->progress.fn)
        r->progress.fn(r->progress.user, r->done, r->total);
}

static void write_copied(recipe *r, const output *o, const piece *x)
{
    const uint8_t *data = (const uint8_t *)x->from.data;
    for (uint64_t at = 0, n; at < x->size; at += n) {
        n = x->size - at < 1u << 22 ? x->size - at : 1u << 22;
        output_write(o, data + at, (size_t)n);
        report(r, n);
    }
}

/* scales: those of the whole tensor, out; NULL where there are none. */
static void write_converted(recipe *r, const output *o, const piece *x, float *scales)
{
    band bands[64];
    uint64_t rows = x->from.shape[0], cols = x->from.shape[1], scale[2], n;
    size_t width = dsv3_dtype_size(x->dtype);
    scale_shape(x, scale);
    for (uint32_t i = 0; i < r->n_threads; i++) {
        memset(&bands[i], 0, sizeof bands[i]);
        bands[i].x = x;
        bands[i].values = (float *)grow(NULL, (size_t)cols, BAND_ROWS * sizeof(float));
        bands[i].data = (uint8_t *)grow(NULL, (size_t)cols, BAND_ROWS * width);
    }
    for (uint64_t row = 0; row < rows; row += n) {
        size_t n_bands = 0;
        for (n = 0; n_bands < r->n_threads && row + n < rows; n_bands++) {
            band *b = &bands[n_bands];
            b->row = row + n;
            b->n_rows = rows - b->row < BAND_ROWS ? rows - b->row : BAND_ROWS;
            b->n_scales = !scales ? 0 : (size_t)(x->dtype == DSV3_DTYPE_I8 ? b->n_rows : scale[1]);
            b->scale = !scales ? NULL : scales + (x->dtype == DSV3_DTYPE_I8 ? b->row : b->row / 128 * scale[1]);
            n += b->n_rows;
        }
        bands_run(bands, n_bands);
        for (size_t i = 0; i < n_bands; i++) {
            const band *b = &bands[i];
            if (b->error.code) {
                fclose(o->f);
                remove(o->part);
                fail("%s, rows from %" PRIu64 ": %s", x->name, b->row, b->error.message);
            }
            output_write(o, b->data, (size_t)(b->n_rows * cols) * width);
        }
        report(r, n * cols * width);
    }
    for (uint32_t i = 0; i < r->n_threads; i++)
        free(bands[i].values), free(bands[i].data);
}

static void write_file(recipe *r, const pieces *list, const char *name)
{
    output o;
    output_open(&o, r->out, name);
    uint8_t *scales = (uint8_t *)grow(NULL, (size_t)list->scales_size + 1, 1);
    output_write(&o, list->header.p, list->header.n);
    output_seek(&o, list->header.n + list->scales_size);
    report(r, list->header.n);
    for (int pass = 1; pass < 5; pass++) /* as plan_file ordered them */
        for (size_t i = 0; i < list->n; i++) {
            const piece *x = &list->p[i];
            if (x->scales || piece_width(x) != (size_t)16 >> pass)
                continue;
            bool scaled = i + 1 < list->n && list->p[i + 1].scales; /* a tensor's scales follow it */
            if (x->converted)
                write_converted(r, &o, x, scaled ? (float *)(void *)(scales + list->p[i + 1].offset) : NULL);
            else
                write_copied(r, &o, x);
        }
    output_seek(&o, list->header.n);
    output_write(&o, scales, (size_t)list->scales_size);
    report(r, list->scales_size);
    free(scales);
    output_close(&o);
}

// ---- config.json and the rest ----------------------------------------------------------------------------

static const char config_int8[] =
    "{\n"
    "    \"config_groups\": {\n"
    "      \"group_0\": {\n"
    "        \"input_activations\": {\"dynamic\": true, \"num_bits\": 8, \"strategy\": \"token\", \"symmetric\": true, "
    "\"type\": \"int\"},\n"
    "        \"output_activations\": null,\n"
    "        \"targets\": [\"Linear\"],\n"
    "        \"weights\": {\"dynamic\": false, \"num_bits\": 8, \"strategy\": \"channel\", \"symmetric\": true, "
    "\"type\": \"int\"}\n"
    "      }\n"
    "    },\n"
    "    \"format\": \"int-quantized\",\n"
    "    \"ignore\": [%s\"re:.*mlp\\\\.gate$\", \"re:.*eh_proj$\", \"re:.*shared_head\\\\.head$\"],\n"
    "    \"kv_cache_scheme\": null,\n"
    "    \"quant_method\": \"compressed-tensors\",\n"
    "    \"quantization_status\": \"compressed\"\n"
    "  }";

static const char config_fp8[] = "{\n"
                                 "    \"activation_scheme\": \"dynamic\",\n"
                                 "    \"fmt\": \"e4m3\",\n"
                                 "    \"quant_method\": \"fp8\",\n"
                                 "    \"weight_block_size\": [128, 128]\n"
                                 "  }";

/* The old file with another quantization_config; what else it says, it says as before. */
static bytes config_text(const recipe *r)
{
    char *path = path_join(r->dir, "config.json", "");
    bytes old = file_read(path), text = {NULL, 0, 0}, key = {NULL, 0, 0}, scratch = {NULL, 0, 0};
    json j = {old.p, old.p, old.p + old.n, NULL, 0};
    const char *comma = "{";
    bool good = json_take(&j, '{');
    while (good && json_peek(&j) == '"') {
        const char *start = j.p;
        key.n = 0;
        good = json_string(&j, &key) && json_take(&j, ':');
        good = good && json_skip(&j, &scratch, 0);
        bytes_add(&key, "", 1);
        if (good && strcmp(key.p, "quantization_config") != 0) {
            bool dtype = strcmp(key.p, "torch_dtype") == 0 || strcmp(key.p, "dtype") == 0;
            bytes_format(&text, "%s\n  ", comma);
            comma = ",";
            if (dtype && r->to == DSV3_DTYPE_BF16)
                bytes_format(&text, "\"%s\": \"bfloat16\"", key.p);
            else
                bytes_add(&text, start, (size_t)(j.p - start));
        }
        good = good && (json_take(&j, ',') || json_peek(&j) == '}');
    }
    if (!good) /* the library has read it, so it is JSON; but perhaps deeper than this reader goes */
        fail("%s: %s", path, j.error ? j.error : "not an object");
    if (r->to != DSV3_DTYPE_BF16)
        bytes_format(&text, "%s\n  \"quantization_config\": ", comma);
    if (r->to == DSV3_DTYPE_F8_E4M3)
        bytes_format(&text, "%s", config_fp8);
    if (r->to == DSV3_DTYPE_I8) {
        const char *at = strstr(config_int8, "%s");
        bytes_add(&text, config_int8, (size_t)(at - config_int8));
        bytes_format(&text, "%s", r->head ? "" : "\"lm_head\", ");
        bytes_add(&text, at + 2, strlen(at + 2));
    }
    bytes_add(&text, "\n}\n", 3);
    free(path), free(old.p), free(key.p), free(scratch.p);
    return text;
}

static void copy_small_files(const recipe *r)
{
    static const char *const names[] = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "configuration_deepseek.py",
        "modeling_deepseek.py",
        "tokenization_kimi.py",
        "tiktoken.model",
        "LICENSE",
        "LICENSE-CODE",
        "LICENSE-MODEL",
    };
    for (size_t i = 0; i < COUNT(names); i++) {
        char *path = path_join(r->dir, names[i], "");
        FILE *f = fopen(path, "rb");
        if (f) {
            fclose(f);
            bytes text = file_read(path);
            write_text(r->out, names[i], &text);
            free(text.p);
        }
        free(path);
    }
}

/* The directory OUT, made if need be. It must not be DIR by another name, and not hold another checkpoint than the one
   that config.json, as it will be written, belongs to. */
static void out_open(const recipe *r, const bytes *config)
{
    struct stat in, out;
    if (stat(r->out, &out)) {
#ifdef _WIN32
        int failed = _mkdir(r->out);
#else
        int failed = mkdir(r->out, 0777);
#endif
        if (failed)
            fail("%s: cannot be made: %s", r->out, strerror(errno));
        return;
    }
    if ((out.st_mode & S_IFMT) != S_IFDIR)
        fail("%s: not a directory", r->out);
#ifdef _WIN32
    char full_in[_MAX_PATH], full_out[_MAX_PATH];
    (void)in;
    bool same = _fullpath(full_in, r->dir, sizeof full_in) && _fullpath(full_out, r->out, sizeof full_out) &&
                _stricmp(full_in, full_out) == 0;
#else
    bool same = stat(r->dir, &in) == 0 && in.st_dev == out.st_dev && in.st_ino == out.st_ino;
#endif
    if (same)
        fail("%s: is the checkpoint itself; OUT must be another directory", r->out);
    char *path = path_join(r->out, "config.json", "");
    if (stat(path, &out) == 0) {
        bytes there = file_read(path);
        if (there.n != config->n || memcmp(there.p, config->p, there.n) != 0)
            fail("%s: holds another checkpoint; OUT must be a new directory, or one that this command began", r->out);
        free(there.p);
    }
    free(path);
}

// ---- The command -----------------------------------------------------------------------------------------

static void recipe_read(recipe *r, int argc, char **argv)
{
    const char *words[2] = {NULL, NULL}, *to = NULL;
    const option options[] = {
        {"--to", OPTION_TEXT, &to, 0, 0},
        {"--head", OPTION_FLAG, &r->head, 0, 0},
        {"--threads", OPTION_COUNT, &r->n_threads, 0, 0},
    };
    arguments(argc, argv, quantize_help, options, COUNT(options), words, 2);
    if (!words[1])
        usage("quantize: into which directory? dsv3 quantize DIR OUT --to int8|fp8|bf16");
    if (to && strcmp(to, "int8") == 0)
        r->to = DSV3_DTYPE_I8;
    else if (to && strcmp(to, "fp8") == 0)
        r->to = DSV3_DTYPE_F8_E4M3;
    else if (to && strcmp(to, "bf16") == 0)
        r->to = DSV3_DTYPE_BF16;
    else
        usage("quantize: --to wants int8, fp8 or bf16%s%s%s", to ? ", found '" : "", to ? to : "", to ? "'" : "");
    r->dir = words[0];
    r->out = words[1];
#ifdef _SC_NPROCESSORS_ONLN
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (!r->n_threads && cores > 0)
        r->n_threads = (uint32_t)cores;
#endif
    if (!r->n_threads)
        r->n_threads = 1;
    if (r->n_threads > 64)
        r->n_threads = 64;
}

static int quantize(int argc, char **argv)
{
    recipe r;
    pieces list;
    bytes index = {NULL, 0, 0};
    uint64_t total_size = 0, n_files = 0, n_there = 0;
    bool sharded = false; /* then there is an index */
    memset(&r, 0, sizeof r);
    memset(&list, 0, sizeof list);
    recipe_read(&r, argc, argv);
    dsv3_model *model = model_open(r.dir, DSV3_ISA_AUTO, DSV3_COMPUTE_AUTO, false);
    if (r.head && dsv3_model_config(model)->tie_word_embeddings)
        usage("quantize: --head: this checkpoint has no head of its own, its embeddings are tied");
    bytes config = config_text(&r);
    out_open(&r, &config);

    size_t n = dsv3_model_tensor_count(model);
    for (int writing = 0; writing < 2; writing++) { /* first: how much, and can it be done */
        r.progress = bar("writing");
        for (size_t first = 0, end; first < n; first = end) {
            const char *file = dsv3_model_tensor_file(model, first);
            for (end = first; end < n && strcmp(dsv3_model_tensor_file(model, end), file) == 0;)
                end++;
            plan_file(&list, &r, model, first, end);
            if (!writing) {
                r.total += list.header.n + list.data_size;
                continue;
            }
            char *path = path_join(r.out, file, "");
            bool there = is_there(&list, path);
            if (there)
                report(&r, list.header.n + list.data_size);
            else
                write_file(&r, &list, file);
            free(path);
            n_files++, n_there += there;
            total_size += list.data_size;
            sharded = sharded || strcmp(file, "model.safetensors") != 0;
            for (size_t i = 0; i < list.n; i++) {
                const piece *x = &list.p[i];
                bytes name = {NULL, 0, 0};
                bytes_add(&name, x->name, strlen(x->name));
                if (x->scales)
                    bytes_format(&name, x->dtype == DSV3_DTYPE_I8 ? "_scale" : "_scale_inv");
                bytes_format(&index, index.n ? ",\n    " : "\n    ");
                json_text(&index, name.p, name.n);
                bytes_format(&index, ": ");
                json_text(&index, file, strlen(file));
                free(name.p);
            }
        }
    }
    if (sharded) {
        bytes text = {NULL, 0, 0};
        bytes_format(&text, "{\n  \"metadata\": {\n    \"total_size\": %" PRIu64 "\n  },\n  \"weight_map\": {",
                     total_size);
        bytes_add(&text, index.p, index.n);
        bytes_format(&text, "\n  }\n}\n");
        write_text(r.out, "model.safetensors.index.json", &text);
        free(text.p);
    }
    copy_small_files(&r);
    write_text(r.out, "config.json", &config);
    bar_clear();
    if (on_terminal)
        fprintf(stderr, "[%" PRIu64 " files, %" PRIu64 " bytes; %" PRIu64 " of the files were there]\n", n_files,
                total_size, n_there);
    dsv3_model_close(model);
    free(list.p), free(list.header.p), free(index.p), free(config.p);
    return finish();
}

#endif // DSV3_QUANTIZE_H
