/* tiny.h: a small random checkpoint in memory, in the layout of an official release. Fixed seed: the same bytes on every
   platform. Weights live (attention is not uniform, routing chooses), so that a wrong model shows in the logits:
     linears N(0, (g / sqrt(fan_in))^2) with g = 1, q_b_proj and q_proj 1.5, router 2 · embedding N(0, 1)
     norm weights 1 + 0.2 N(0, 1) · router bias 0.1 N(0, 1)

     tiny t;
     tiny_opts o = tiny_default();
     tiny_build(&t, &o);
     tiny_set(&t, "config.json", "hidden_act", "\"gelu\"");        // change what is to be wrong
     tiny_find(&t, "lm_head.weight")->shape[0]--, tiny_pack(&t);
     result = tiny_open(&t, &model, NULL, &error);                 // through a dsv3_reader
     tiny_free(&t);

   Also here: an allocator that counts and fails on demand (tiny_heap). Include dsv3.h and test.h first. */
#ifndef DSV3_TINY_H
#define DSV3_TINY_H

#ifdef _WIN32
    #include <direct.h>
#else
    #include <unistd.h>
#endif

#define TINY_MAX_FILES 16
#define TINY_BOS "<\xef\xbd\x9c" "begin\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>" /* id 0 */
#define TINY_EOS "<\xef\xbd\x9c" "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>"   /* id 1 */
#define TINY_PAD "<\xef\xbd\x9c\xe2\x96\x81pad\xe2\x96\x81\xef\xbd\x9c>"                /* id 2 */
#define TINY_USER "<\xef\xbd\x9cUser\xef\xbd\x9c>"                                      /* the id behind the last merge */
#define TINY_ASSISTANT "<\xef\xbd\x9c" "Assistant\xef\xbd\x9c>"

/* config.json's quantization_config of compressed-tensors W8A8. */
#define TINY_W8A8                                                                                                             \
    "{\"config_groups\": {\"group_0\": {\"input_activations\": {\"actorder\": null, \"block_structure\": null, \"dynamic\": true, " \
    "\"group_size\": null, \"num_bits\": 8, \"observer\": null, \"observer_kwargs\": {}, \"strategy\": \"token\", "                  \
    "\"symmetric\": true, \"type\": \"int\"}, \"output_activations\": null, \"targets\": [\"Linear\"], \"weights\": {"               \
    "\"actorder\": null, \"block_structure\": null, \"dynamic\": false, \"group_size\": null, \"num_bits\": 8, "                      \
    "\"observer\": \"minmax\", \"observer_kwargs\": {}, \"strategy\": \"channel\", \"symmetric\": true, \"type\": \"int\"}}}, "       \
    "\"format\": \"int-quantized\", \"global_compression_ratio\": 1.5, \"ignore\": [\"lm_head\"], \"kv_cache_scheme\": null, "       \
    "\"quant_method\": \"compressed-tensors\", \"quantization_status\": \"compressed\"}"

typedef struct tiny_opts {
    uint32_t vocab, dim, inter, moe_inter, n_layers, n_dense, n_heads, q_lora, kv_lora, nope, rope, v_dim;
    uint32_t n_experts, n_shared, top_k, n_group, topk_group, max_pos;
    float scaling; /* routed_scaling_factor */
    dsv3_dtype dtype;   /* of the linears: F8_E4M3, I8, BF16, F16, F32; the others are BF16 (F32 with F32), the bias F32 */
    uint32_t n_shards;  /* 0: model.safetensors; else shards and an index */
    bool tie, softmax /* the V2 family */, yarn, half_split /* rope_interleave false */;
    bool tokenizer;     /* tokenizer.json and tokenizer_config.json */
    uint32_t mtp;       /* layers of multi-token prediction; embedding and head are the model's */
    bool odd;           /* an odd header length: no tensor is aligned to anything */
    uint64_t seed;
} tiny_opts;

typedef struct tiny_tensor {
    char name[200];
    char dtype[16];
    uint32_t rank;
    uint64_t shape[4];
    uint8_t *data;
    size_t size;
    uint32_t shard; /* counted from 1 */
} tiny_tensor;

typedef struct tiny_file {
    char name[300];
    uint8_t *data; /* exactly `size` bytes, so that a sanitizer sees one more */
    size_t size;
} tiny_file;

typedef struct tiny {
    tiny_opts o;
    uint64_t random;
    tiny_tensor *tensors;
    size_t n_tensors, cap_tensors;
    tiny_file files[TINY_MAX_FILES];
    size_t n_files;
    /* the reader */
    bool read_mode;        /* files hand out no pointer: read_fn is called */
    long n_opened, n_closed, n_reads;
    long fail_read;        /* this read (1, 2, ...) fails; 0: none */
    const char *fail_open; /* opening this name gives DSV3_ERROR_IO */
} tiny;

/* About 230 KB, V3 in small: FP8 with scales, groups alive, one dense layer of three. */
static inline tiny_opts tiny_default(void)
{
    tiny_opts o;
    memset(&o, 0, sizeof o);
    o.vocab = 320, o.dim = 64, o.inter = 96, o.moe_inter = 32, o.n_layers = 3, o.n_dense = 1, o.n_heads = 4;
    o.q_lora = 32, o.kv_lora = 32, o.nope = 16, o.rope = 16, o.v_dim = 24;
    o.n_experts = 8, o.n_shared = 1, o.top_k = 3, o.n_group = 4, o.topk_group = 2, o.max_pos = 256;
    o.scaling = 2.5f, o.dtype = DSV3_DTYPE_F8_E4M3, o.yarn = true, o.tokenizer = true, o.seed = 1;
    return o;
}

/* About 10 KB, for tests that open it thousands of times. No tokenizer: 32 ids. */
static inline tiny_opts tiny_micro(void)
{
    tiny_opts o = tiny_default();
    o.vocab = 32, o.dim = 16, o.inter = 16, o.moe_inter = 8, o.n_layers = 2, o.n_heads = 2;
    o.q_lora = 8, o.kv_lora = 8, o.nope = 4, o.rope = 4, o.v_dim = 4, o.n_experts = 4, o.top_k = 2, o.n_group = 2, o.topk_group = 1;
    o.max_pos = 64, o.tokenizer = false;
    return o;
}

/* Several blocks of 128 in both directions, the last ones ragged. About 1.5 MB. */
static inline tiny_opts tiny_blocks(void)
{
    tiny_opts o = tiny_default();
    o.dim = 200, o.inter = 264, o.moe_inter = 136, o.n_layers = 2, o.q_lora = 144, o.kv_lora = 136, o.nope = 40, o.rope = 24, o.v_dim = 48;
    return o;
}

/* The V2 family: softmax router, no q_lora, no bias, no normalisation. */
static inline tiny_opts tiny_v2(void)
{
    tiny_opts o = tiny_default();
    o.softmax = true, o.q_lora = 0, o.n_group = 1, o.topk_group = 1, o.n_shared = 2, o.scaling = 1.0f, o.dtype = DSV3_DTYPE_BF16;
    return o;
}

/* ---- numbers ---- */

static inline uint64_t tiny_next(uint64_t *state) /* splitmix64 */
{
    uint64_t z = (*state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

static inline double tiny_uniform(uint64_t *state)
{
    return (double)(tiny_next(state) >> 11) / 9007199254740992.0;
}

/* Nearly normal: a sum of 12 uniforms, so that no libm decides the bits. */
static inline double tiny_normal(uint64_t *state)
{
    double sum = -6;
    for (int i = 0; i < 12; i++)
        sum += tiny_uniform(state);
    return sum;
}

static inline uint32_t tiny_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static inline float tiny_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

static inline uint16_t tiny_to_bf16(float f) /* finite values */
{
    uint32_t u = tiny_bits(f);
    return (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

/* Nearest value of a small float format, ties to even, by search: slow and plain. `decode` maps codes 0 ... top in rising order. */
static inline uint32_t tiny_nearest(double v, uint32_t top, double (*decode)(uint32_t))
{
    uint32_t lo = 0, hi = top;
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if (decode(mid) <= v)
            lo = mid;
        else
            hi = mid;
    }
    double below = v - decode(lo), above = decode(hi) - v;
    return below < above || (below == above && (lo & 1) == 0) ? lo : hi;
}

static inline double tiny_f16_value(uint32_t code)
{
    uint32_t e = code >> 10 & 31, m = code & 1023;
    return (e ? ldexp(1024.0 + m, (int)e - 25) : ldexp((double)m, -24)) * (code >> 15 ? -1 : 1);
}

static inline double tiny_f8_value(uint32_t code) /* the NaN codes as 480 */
{
    uint32_t e = code >> 3 & 15, m = code & 7;
    return (e ? ldexp(8.0 + m, (int)e - 10) : ldexp((double)m, -9)) * (code >> 7 ? -1 : 1);
}

static inline uint16_t tiny_to_f16(float f)
{
    return (uint16_t)(tiny_nearest(fabs((double)f), 0x7BFF, tiny_f16_value) | (f < 0 ? 0x8000u : 0));
}

static inline uint8_t tiny_to_f8(float f)
{
    return (uint8_t)(tiny_nearest(fabs((double)f), 0x7E, tiny_f8_value) | (f < 0 ? 0x80u : 0));
}

/* ---- text ---- */

typedef struct tiny_text {
    char *p;
    size_t n, cap;
} tiny_text;

static inline void *tiny_realloc(void *p, size_t size)
{
    void *q = realloc(p, size ? size : 1);
    if (!q) {
        printf("no memory for the tests\n");
        exit(2);
    }
    return q;
}

static inline void tiny_put_bytes(tiny_text *text, const void *p, size_t n)
{
    if (text->n + n > text->cap) {
        text->cap = (text->n + n) * 2;
        text->p = (char *)tiny_realloc(text->p, text->cap);
    }
    if (n)
        memcpy(text->p + text->n, p, n);
    text->n += n;
}

/* A snapshot in memory: a sink's write_fn and a source's read_fn, with one of these as their user. */
typedef struct tiny_stored {
    uint8_t *data;
    size_t n, at, cap;
    size_t fail_at; /* writing fails at this byte; 0: never */
} tiny_stored;

static inline bool tiny_stored_put(void *user, const void *data, size_t size)
{
    tiny_stored *f = (tiny_stored *)user;
    if (f->fail_at && f->n + size >= f->fail_at)
        return false;
    if (f->n + size > f->cap) {
        f->cap = (f->n + size) * 2;
        f->data = (uint8_t *)tiny_realloc(f->data, f->cap);
    }
    memcpy(f->data + f->n, data, size);
    f->n += size;
    return true;
}

static inline bool tiny_stored_get(void *user, void *data, size_t size)
{
    tiny_stored *f = (tiny_stored *)user;
    if (size > f->n - f->at)
        return false;
    memcpy(data, f->data + f->at, size);
    f->at += size;
    return true;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static inline void tiny_printf(tiny_text *text, const char *format, ...)
{
    char line[1024];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    tiny_put_bytes(text, line, n < 0 ? 0 : (size_t)n < sizeof line ? (size_t)n : sizeof line - 1);
}

/* ---- files ---- */

static inline tiny_file *tiny_get(tiny *t, const char *name)
{
    for (size_t i = 0; i < t->n_files; i++)
        if (strcmp(t->files[i].name, name) == 0)
            return &t->files[i];
    return NULL;
}

static inline void tiny_drop(tiny *t, const char *name)
{
    tiny_file *f = tiny_get(t, name);
    if (f) {
        free(f->data);
        *f = t->files[--t->n_files];
    }
}

static inline void tiny_put(tiny *t, const char *name, const void *data, size_t size)
{
    tiny_file *f = tiny_get(t, name);
    uint8_t *copy = (uint8_t *)tiny_realloc(NULL, size);
    if (size)
        memcpy(copy, data, size);
    if (f) {
        free(f->data);
    } else {
        if (t->n_files == TINY_MAX_FILES) {
            printf("tiny.h: too many files\n");
            exit(2);
        }
        f = &t->files[t->n_files++];
        snprintf(f->name, sizeof f->name, "%s", name);
    }
    f->data = copy;
    f->size = size;
}

static inline size_t tiny_search(const uint8_t *p, size_t n, const char *part)
{
    size_t m = strlen(part);
    for (size_t i = 0; i + m <= n; i++)
        if (memcmp(p + i, part, m) == 0)
            return i;
    return (size_t)-1;
}

/* Replaces the first `from` in a file; false if there is none. In a safetensors file: in its header, whose length follows. */
static inline bool tiny_replace(tiny *t, const char *name, const char *from, const char *to)
{
    tiny_file *f = tiny_get(t, name);
    bool header = strstr(name, ".safetensors") && !strstr(name, ".json");
    tiny_text text = {NULL, 0, 0};
    size_t at = f ? tiny_search(f->data, f->size, from) : (size_t)-1;
    if (at == (size_t)-1)
        return false;
    tiny_put_bytes(&text, f->data, at);
    tiny_put_bytes(&text, to, strlen(to));
    tiny_put_bytes(&text, f->data + at + strlen(from), f->size - at - strlen(from));
    if (header) {
        uint64_t n;
        memcpy(&n, text.p, 8);
        n = n + strlen(to) - strlen(from);
        memcpy(text.p, &n, 8);
    }
    tiny_put(t, name, text.p, text.n);
    free(text.p);
    return true;
}

/* Sets a key of a JSON file written here (one key a line, not the last one); value NULL takes it out. It goes in front. */
static inline void tiny_set(tiny *t, const char *name, const char *key, const char *value)
{
    char quoted[128], *line;
    size_t at, end;
    tiny_file *f = tiny_get(t, name);
    snprintf(quoted, sizeof quoted, "\n  \"%s\": ", key);
    at = tiny_search(f->data, f->size, quoted);
    if (at != (size_t)-1) { /* take the line out */
        tiny_text rest = {NULL, 0, 0};
        for (end = at + 1; end < f->size && f->data[end] != '\n'; end++) {}
        tiny_put_bytes(&rest, f->data, at);
        tiny_put_bytes(&rest, f->data + end, f->size - end);
        tiny_put(t, name, rest.p, rest.n);
        free(rest.p);
    }
    if (!value)
        return;
    line = (char *)tiny_realloc(NULL, strlen(value) + strlen(key) + 16);
    snprintf(line, strlen(value) + strlen(key) + 16, "{\n  \"%s\": %s,", key, value);
    tiny_replace(t, name, "{", line);
    free(line);
}

/* ---- tensors ---- */

static inline tiny_tensor *tiny_find(tiny *t, const char *name)
{
    for (size_t i = 0; i < t->n_tensors; i++)
        if (strcmp(t->tensors[i].name, name) == 0)
            return &t->tensors[i];
    return NULL;
}

static inline void tiny_remove(tiny *t, const char *name)
{
    tiny_tensor *x = tiny_find(t, name);
    if (x) {
        free(x->data);
        t->n_tensors--;
        memmove(x, x + 1, (size_t)(t->tensors + t->n_tensors - x) * sizeof *x);
    }
}

/* `data` is copied; NULL: zeros. */
static inline tiny_tensor *tiny_add(tiny *t, const char *name, const char *dtype, uint32_t rank, uint64_t rows, uint64_t cols,
                                    const void *data, size_t size)
{
    if (t->n_tensors == t->cap_tensors) {
        t->cap_tensors = t->cap_tensors * 2 + 64;
        t->tensors = (tiny_tensor *)tiny_realloc(t->tensors, t->cap_tensors * sizeof *t->tensors);
    }
    tiny_tensor *x = &t->tensors[t->n_tensors++];
    memset(x, 0, sizeof *x);
    snprintf(x->name, sizeof x->name, "%.*s", (int)sizeof x->name - 1, name);
    snprintf(x->dtype, sizeof x->dtype, "%s", dtype);
    x->rank = rank;
    x->shape[0] = rows;
    x->shape[1] = rank > 1 ? cols : 0;
    x->data = (uint8_t *)tiny_realloc(NULL, size);
    x->size = size;
    if (data)
        memcpy(x->data, data, size);
    else
        memset(x->data, 0, size);
    return x;
}

/* Values as `dtype`; F8_E4M3 adds the scales of blocks, I8 those of rows. */
static inline void tiny_store(tiny *t, const char *name, dsv3_dtype dtype, uint32_t rank, uint64_t rows, uint64_t cols, const float *v)
{
    size_t n = (size_t)(rows * (rank > 1 ? cols : 1));
    if (dtype == DSV3_DTYPE_F32) {
        tiny_add(t, name, "F32", rank, rows, cols, v, n * 4);
    } else if (dtype == DSV3_DTYPE_F8_E4M3) {
        char scale_name[220];
        size_t br = (size_t)(rows + 127) / 128, bc = (size_t)(cols + 127) / 128;
        float *scale = (float *)tiny_realloc(NULL, br * bc * 4);
        tiny_tensor *x = tiny_add(t, name, "F8_E4M3", rank, rows, cols, NULL, n);
        for (size_t b = 0; b < br * bc; b++)
            scale[b] = 0;
        for (size_t i = 0; i < n; i++) {
            float *s = &scale[i / cols / 128 * bc + i % cols / 128];
            if (fabsf(v[i]) > *s)
                *s = fabsf(v[i]);
        }
        for (size_t b = 0; b < br * bc; b++)
            scale[b] = scale[b] > 0 ? scale[b] / 448 : 1;
        for (size_t i = 0; i < n; i++)
            x->data[i] = tiny_to_f8(v[i] / scale[i / cols / 128 * bc + i % cols / 128]);
        snprintf(scale_name, sizeof scale_name, "%s_scale_inv", name);
        tiny_add(t, scale_name, "F32", 2, br, bc, scale, br * bc * 4);
        free(scale);
    } else if (dtype == DSV3_DTYPE_I8) {
        char scale_name[220];
        float *scale = (float *)tiny_realloc(NULL, (size_t)rows * 4);
        tiny_tensor *x = tiny_add(t, name, "I8", rank, rows, cols, NULL, n);
        for (size_t r = 0; r < rows; r++) {
            float most = 0;
            for (size_t c = 0; c < cols; c++)
                most = fabsf(v[r * cols + c]) > most ? fabsf(v[r * cols + c]) : most;
            scale[r] = most > 0 ? most / 127 : 1;
            for (size_t c = 0; c < cols; c++)
                x->data[r * cols + c] = (uint8_t)(int8_t)floorf(v[r * cols + c] / scale[r] + 0.5f);
        }
        snprintf(scale_name, sizeof scale_name, "%s_scale", name);
        tiny_add(t, scale_name, "F32", 2, rows, 1, scale, (size_t)rows * 4);
        free(scale);
    } else {
        tiny_tensor *x = tiny_add(t, name, dtype == DSV3_DTYPE_F16 ? "F16" : "BF16", rank, rows, cols, NULL, n * 2);
        for (size_t i = 0; i < n; i++) {
            uint16_t code = dtype == DSV3_DTYPE_F16 ? tiny_to_f16(v[i]) : tiny_to_bf16(v[i]);
            memcpy(x->data + 2 * i, &code, 2);
        }
    }
}

/* mean + sigma * normal. */
static inline void tiny_draw(tiny *t, const char *layer, const char *name, dsv3_dtype dtype, uint32_t rank, uint64_t rows, uint64_t cols,
                             double mean, double sigma)
{
    char full[200];
    size_t n = (size_t)(rows * (rank > 1 ? cols : 1));
    float *v = (float *)tiny_realloc(NULL, n * 4);
    for (size_t i = 0; i < n; i++)
        v[i] = (float)(mean + sigma * tiny_normal(&t->random));
    snprintf(full, sizeof full, "%s%s", layer, name);
    tiny_store(t, full, dtype, rank, rows, cols, v);
    free(v);
}

static inline void tiny_linear(tiny *t, const char *layer, const char *name, uint64_t rows, uint64_t cols, double gain)
{
    tiny_draw(t, layer, name, t->o.dtype, 2, rows, cols, 0, gain / sqrt((double)cols));
}

static inline void tiny_norm(tiny *t, const char *layer, const char *name, uint64_t n)
{
    tiny_draw(t, layer, name, t->o.dtype == DSV3_DTYPE_F32 ? DSV3_DTYPE_F32 : DSV3_DTYPE_BF16, 1, n, 0, 1, 0.2);
}

static inline void tiny_mlp(tiny *t, const char *layer, const char *prefix, uint64_t width)
{
    char name[96];
    snprintf(name, sizeof name, "%sgate_proj.weight", prefix);
    tiny_linear(t, layer, name, width, t->o.dim, 1);
    snprintf(name, sizeof name, "%sup_proj.weight", prefix);
    tiny_linear(t, layer, name, width, t->o.dim, 1);
    snprintf(name, sizeof name, "%sdown_proj.weight", prefix);
    tiny_linear(t, layer, name, t->o.dim, width, 1);
}

static inline void tiny_layer(tiny *t, uint32_t l, bool dense)
{
    const tiny_opts *o = &t->o;
    dsv3_dtype wide = o->dtype == DSV3_DTYPE_F32 ? DSV3_DTYPE_F32 : DSV3_DTYPE_BF16;
    char layer[64], name[64];
    snprintf(layer, sizeof layer, "model.layers.%u.", (unsigned)l);
    tiny_norm(t, layer, "input_layernorm.weight", o->dim);
    tiny_norm(t, layer, "post_attention_layernorm.weight", o->dim);
    if (o->q_lora) {
        tiny_linear(t, layer, "self_attn.q_a_proj.weight", o->q_lora, o->dim, 1);
        tiny_norm(t, layer, "self_attn.q_a_layernorm.weight", o->q_lora);
        tiny_linear(t, layer, "self_attn.q_b_proj.weight", o->n_heads * (o->nope + o->rope), o->q_lora, 1.5);
    } else {
        tiny_linear(t, layer, "self_attn.q_proj.weight", o->n_heads * (o->nope + o->rope), o->dim, 1.5);
    }
    tiny_linear(t, layer, "self_attn.kv_a_proj_with_mqa.weight", o->kv_lora + o->rope, o->dim, 1);
    tiny_norm(t, layer, "self_attn.kv_a_layernorm.weight", o->kv_lora);
    tiny_linear(t, layer, "self_attn.kv_b_proj.weight", o->n_heads * (o->nope + o->v_dim), o->kv_lora, 1);
    tiny_linear(t, layer, "self_attn.o_proj.weight", o->dim, o->n_heads * o->v_dim, 1);
    if (dense) {
        tiny_mlp(t, layer, "mlp.", o->inter);
        return;
    }
    tiny_draw(t, layer, "mlp.gate.weight", wide, 2, o->n_experts, o->dim, 0, 2 / sqrt((double)o->dim));
    if (!o->softmax)
        tiny_draw(t, layer, "mlp.gate.e_score_correction_bias", DSV3_DTYPE_F32, 1, o->n_experts, 0, 0, 0.1);
    for (uint32_t e = 0; e < o->n_experts; e++) {
        snprintf(name, sizeof name, "mlp.experts.%u.", (unsigned)e);
        tiny_mlp(t, layer, name, o->moe_inter);
    }
    if (o->n_shared)
        tiny_mlp(t, layer, "mlp.shared_experts.", (uint64_t)o->n_shared * o->moe_inter);
}

/* ---- the JSON files ---- */

static inline void tiny_write_config(tiny *t)
{
    const tiny_opts *o = &t->o;
    tiny_text c = {NULL, 0, 0};
    tiny_printf(&c, "{\n  \"architectures\": [\"Deepseek%sForCausalLM\"],\n", o->softmax ? "V2" : "V3");
    tiny_printf(&c, "  \"model_type\": \"deepseek_%s\",\n", o->softmax ? "v2" : "v3");
    tiny_printf(&c, "  \"attention_bias\": false,\n  \"bos_token_id\": 0,\n  \"eos_token_id\": 1,\n  \"hidden_act\": \"silu\",\n");
    tiny_printf(&c, "  \"vocab_size\": %u,\n  \"hidden_size\": %u,\n  \"intermediate_size\": %u,\n", o->vocab, o->dim, o->inter);
    tiny_printf(&c, "  \"moe_intermediate_size\": %u,\n  \"moe_layer_freq\": 1,\n  \"num_hidden_layers\": %u,\n", o->moe_inter, o->n_layers);
    tiny_printf(&c, "  \"first_k_dense_replace\": %u,\n  \"num_attention_heads\": %u,\n", o->n_dense, o->n_heads);
    tiny_printf(&c, "  \"num_key_value_heads\": %u,\n", o->n_heads);
    if (o->q_lora)
        tiny_printf(&c, "  \"q_lora_rank\": %u,\n", o->q_lora);
    else
        tiny_printf(&c, "  \"q_lora_rank\": null,\n");
    tiny_printf(&c, "  \"kv_lora_rank\": %u,\n  \"qk_nope_head_dim\": %u,\n  \"qk_rope_head_dim\": %u,\n", o->kv_lora, o->nope, o->rope);
    tiny_printf(&c, "  \"v_head_dim\": %u,\n  \"n_routed_experts\": %u,\n  \"n_shared_experts\": %u,\n", o->v_dim, o->n_experts, o->n_shared);
    tiny_printf(&c, "  \"num_experts_per_tok\": %u,\n  \"n_group\": %u,\n  \"topk_group\": %u,\n", o->top_k, o->n_group, o->topk_group);
    tiny_printf(&c, "  \"norm_topk_prob\": %s,\n  \"scoring_func\": \"%s\",\n", o->softmax ? "false" : "true", o->softmax ? "softmax" : "sigmoid");
    tiny_printf(&c, "  \"topk_method\": \"%s\",\n", !o->softmax ? "noaux_tc" : o->n_group > 1 ? "group_limited_greedy" : "greedy");
    tiny_printf(&c, "  \"routed_scaling_factor\": %.3f,\n  \"rms_norm_eps\": 1e-05,\n  \"rope_theta\": 10000,\n", (double)o->scaling);
    tiny_printf(&c, "  \"max_position_embeddings\": %u,\n  \"num_nextn_predict_layers\": %u,\n", o->max_pos, (unsigned)o->mtp);
    if (o->yarn)
        tiny_printf(&c, "  \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": %u, \"beta_fast\": 32, "
                        "\"beta_slow\": 1, \"mscale\": 1.0, \"mscale_all_dim\": 1.0},\n", o->max_pos / 4);
    if (o->half_split)
        tiny_printf(&c, "  \"rope_interleave\": false,\n");
    if (o->dtype == DSV3_DTYPE_F8_E4M3)
        tiny_printf(&c, "  \"quantization_config\": {\"activation_scheme\": \"dynamic\", \"fmt\": \"e4m3\", \"quant_method\": \"fp8\", "
                        "\"weight_block_size\": [128, 128]},\n");
    if (o->dtype == DSV3_DTYPE_I8)
        tiny_printf(&c, "  \"quantization_config\": " TINY_W8A8 ",\n");
    tiny_printf(&c, "  \"tie_word_embeddings\": %s,\n  \"torch_dtype\": \"%s\",\n  \"transformers_version\": \"4.39.3\"\n}\n", o->tie ? "true" : "false",
                o->dtype == DSV3_DTYPE_F32 ? "float32" : o->dtype == DSV3_DTYPE_F16 ? "float16" : "bfloat16");
    tiny_put(t, "config.json", c.p, c.n);
    free(c.p);
}

/* UTF-8 of the letter that byte-level BPE spells this byte with; returns its length. */
static inline size_t tiny_letter(unsigned byte, char *out)
{
    unsigned code = byte;
    if (byte < 0x21)
        code = 0x100 + byte;
    else if (byte >= 0x7F && byte <= 0xA0)
        code = 0x121 + (byte - 0x7F);
    else if (byte == 0xAD)
        code = 0x143;
    if (code < 0x80)
        return out[0] = (char)code, 1;
    return out[0] = (char)(0xC0 | code >> 6), out[1] = (char)(0x80 | (code & 63)), 2;
}

/* Bytes as a JSON string of byte letters. */
static inline void tiny_letters(tiny_text *text, const char *bytes)
{
    for (; *bytes; bytes++) {
        char letter[2];
        if (*bytes == '"' || *bytes == '\\')
            tiny_put_bytes(text, "\\", 1);
        tiny_put_bytes(text, letter, tiny_letter((unsigned char)*bytes, letter));
    }
}

/* Left and right part of each merge, in order; the result of merge r is id 259 + r. */
static const char *const tiny_merges[][2] = {
    {"t", "h"}, {"th", "e"}, {" ", "t"}, {" ", "a"}, {"i", "n"}, {"e", "r"}, {" ", "the"}, {"o", "n"}, {"a", "n"}, {"r", "e"},
    {"an", "d"}, {" a", "n"}, {" an", "d"}, {"in", "g"}, {"l", "l"}, {"e", "d"}, {"o", "u"}, {" ", " "}, {"  ", "  "}, {"\n", "\n"}, {"1", "2"},
    {"\xc3", "\xa9"}, {"\xe4\xb8", "\x80"}, {"\xf0\x9f", "\x98"}, {"a", "a"}, {"aa", "aa"}, {"'", "s"}, {"-", "-"}, {"q", "u"}};
/* In front of those: both parts of a merge must be words already. */
static const char *const tiny_merges_first[][2] = {{"\xe4", "\xb8"}, {"\xf0", "\x9f"}};
#define TINY_N_MERGES ((uint32_t)(sizeof tiny_merges / sizeof tiny_merges[0] + sizeof tiny_merges_first / sizeof tiny_merges_first[0]))
#define TINY_USER_ID ((int32_t)(259 + TINY_N_MERGES))
#define TINY_N_TOKENS (TINY_USER_ID + 2)

static inline const char *const *tiny_merge(uint32_t r)
{
    uint32_t first = (uint32_t)(sizeof tiny_merges_first / sizeof tiny_merges_first[0]);
    return r < first ? tiny_merges_first[r] : tiny_merges[r - first];
}

static inline void tiny_added_token(tiny_text *j, int id, const char *content, bool special, const char *end)
{
    tiny_printf(j, "    {\"id\": %d, \"content\": \"%s\", \"single_word\": false, \"lstrip\": false, \"rstrip\": false, "
                   "\"normalized\": %s, \"special\": %s}%s\n", id, content, special ? "false" : "true", special ? "true" : "false", end);
}

static inline void tiny_write_tokenizer(tiny *t)
{
    tiny_text j = {NULL, 0, 0};
    int id = 0;
    tiny_printf(&j, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n  \"added_tokens\": [\n");
    tiny_added_token(&j, 0, TINY_BOS, true, ",");
    tiny_added_token(&j, 1, TINY_EOS, true, ",");
    tiny_added_token(&j, 2, TINY_PAD, true, ",");
    tiny_added_token(&j, TINY_USER_ID, TINY_USER, false, ",");
    tiny_added_token(&j, TINY_USER_ID + 1, TINY_ASSISTANT, false, "");
    tiny_printf(&j, "  ],\n  \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": []},\n");
    tiny_printf(&j, "  \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [\n");
    tiny_printf(&j, "    {\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\p{N}{1,3}\"}, \"behavior\": \"Isolated\", \"invert\": false},\n");
    tiny_printf(&j, "    {\"type\": \"Split\", \"pattern\": {\"Regex\": \"[\xe4\xb8\x80-\xe9\xbe\xa5\xe3\x81\x80-\xe3\x82\x9f\xe3\x82\xa0-\xe3\x83\xbf]+\"}, "
                    "\"behavior\": \"Isolated\", \"invert\": false},\n");
    tiny_printf(&j, "    {\"type\": \"Split\", \"pattern\": {\"Regex\": \"%s\"}, \"behavior\": \"Isolated\", \"invert\": false},\n",
                "[!\\\"#$%&'()*+,\\\\-./:;<=>?@\\\\[\\\\\\\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\\\p{L}\\\\p{P}\\\\p{S}]?[\\\\p{L}\\\\p{M}]+"
                "| ?[\\\\p{P}\\\\p{S}]+[\\r\\n]*|\\\\s*[\\r\\n]+|\\\\s+(?!\\\\S)|\\\\s+");
    tiny_printf(&j, "    {\"type\": \"ByteLevel\", \"add_prefix_space\": false, \"trim_offsets\": true, \"use_regex\": false}\n  ]},\n");
    tiny_printf(&j, "  \"post_processor\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": false, \"use_regex\": true},\n");
    tiny_printf(&j, "  \"decoder\": {\"type\": \"ByteLevel\", \"add_prefix_space\": true, \"trim_offsets\": true, \"use_regex\": true},\n");
    tiny_printf(&j, "  \"model\": {\n    \"type\": \"BPE\", \"dropout\": null, \"unk_token\": null, \"continuing_subword_prefix\": null,\n"
                    "    \"end_of_word_suffix\": null, \"fuse_unk\": false, \"byte_fallback\": false,\n    \"vocab\": {\n");
    tiny_printf(&j, "      \"%s\": 0,\n      \"%s\": 1,\n      \"%s\": 2,\n", TINY_BOS, TINY_EOS, TINY_PAD);
    id = 3;
    for (int pass = 0; pass < 2; pass++) /* V3's order: the bytes that spell themselves, then the others */
        for (unsigned b = 0; b < 256; b++) {
            char letter[2];
            size_t n = tiny_letter(b, letter);
            bool itself = n == 1 || (b >= 0xA1 && b != 0xAD);
            if (itself != (pass == 0))
                continue;
            tiny_printf(&j, "      \"%s", letter[0] == '"' || letter[0] == '\\' ? "\\" : "");
            tiny_put_bytes(&j, letter, n);
            tiny_printf(&j, "\": %d,\n", id++);
        }
    for (uint32_t r = 0; r < TINY_N_MERGES; r++) {
        tiny_printf(&j, "      \"");
        tiny_letters(&j, tiny_merge(r)[0]);
        tiny_letters(&j, tiny_merge(r)[1]);
        tiny_printf(&j, "\": %d%s\n", id++, r + 1 < TINY_N_MERGES ? "," : "");
    }
    tiny_printf(&j, "    },\n    \"merges\": [\n");
    for (uint32_t r = 0; r < TINY_N_MERGES; r++) {
        tiny_printf(&j, "      \"");
        tiny_letters(&j, tiny_merge(r)[0]);
        tiny_printf(&j, " ");
        tiny_letters(&j, tiny_merge(r)[1]);
        tiny_printf(&j, "\"%s\n", r + 1 < TINY_N_MERGES ? "," : "");
    }
    tiny_printf(&j, "    ]\n  }\n}\n");
    tiny_put(t, "tokenizer.json", j.p, j.n);
    j.n = 0;
    tiny_printf(&j, "{\n  \"add_bos_token\": true,\n  \"add_eos_token\": false,\n  \"bos_token\": {\"__type\": \"AddedToken\", \"content\": \"%s\"},\n", TINY_BOS);
    tiny_printf(&j, "  \"eos_token\": \"%s\",\n  \"pad_token\": \"%s\",\n  \"model_max_length\": 1000000000000000019884624838656,\n", TINY_EOS, TINY_PAD);
    tiny_printf(&j, "  \"tokenizer_class\": \"LlamaTokenizerFast\"\n}\n");
    tiny_put(t, "tokenizer_config.json", j.p, j.n);
    free(j.p);
}

/* ---- safetensors ---- */

static inline void tiny_header(tiny_text *h, const tiny *t, uint32_t shard)
{
    uint64_t offset = 0;
    tiny_printf(h, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < t->n_tensors; i++) {
        const tiny_tensor *x = &t->tensors[i];
        if (shard && x->shard != shard)
            continue;
        tiny_printf(h, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", x->name, x->dtype);
        for (uint32_t d = 0; d < x->rank; d++)
            tiny_printf(h, "%s%llu", d ? "," : "", (unsigned long long)x->shape[d]);
        tiny_printf(h, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)offset, (unsigned long long)(offset + x->size));
        offset += x->size;
    }
    tiny_printf(h, "}");
    while (h->n % 8 != (t->o.odd ? 5 : 0))
        tiny_printf(h, " ");
}

static inline void tiny_shard_name(const tiny *t, uint32_t shard, char *name, size_t size)
{
    if (t->o.n_shards)
        snprintf(name, size, "model-%05u-of-%06u.safetensors", (unsigned)shard, (unsigned)t->o.n_shards);
    else
        snprintf(name, size, "model.safetensors");
}

/* Writes the safetensors files (and the index) from the list of tensors, as it now is. */
static inline void tiny_pack(tiny *t)
{
    tiny_text index = {NULL, 0, 0};
    uint64_t total = 0;
    char name[64];
    for (size_t i = 0; i < t->n_tensors; i++) {
        if (t->tensors[i].shard == 0)
            t->tensors[i].shard = t->o.n_shards ? 1 + (uint32_t)(i * t->o.n_shards / t->n_tensors) : 1;
        total += t->tensors[i].size;
    }
    for (uint32_t s = 1; s <= (t->o.n_shards ? t->o.n_shards : 1); s++) {
        tiny_text f = {NULL, 0, 0}, h = {NULL, 0, 0};
        tiny_header(&h, t, t->o.n_shards ? s : 0);
        uint64_t n = h.n;
        tiny_put_bytes(&f, &n, 8);
        tiny_put_bytes(&f, h.p, h.n);
        for (size_t i = 0; i < t->n_tensors; i++)
            if (t->tensors[i].shard == s || !t->o.n_shards)
                tiny_put_bytes(&f, t->tensors[i].data, t->tensors[i].size);
        tiny_shard_name(t, s, name, sizeof name);
        tiny_put(t, name, f.p, f.n);
        free(f.p);
        free(h.p);
    }
    if (!t->o.n_shards)
        return;
    tiny_printf(&index, "{\n  \"metadata\": {\"total_size\": %llu},\n  \"weight_map\": {\n", (unsigned long long)total);
    for (size_t i = 0; i < t->n_tensors; i++) {
        tiny_shard_name(t, t->tensors[i].shard, name, sizeof name);
        tiny_printf(&index, "    \"%s\": \"%s\"%s\n", t->tensors[i].name, name, i + 1 < t->n_tensors ? "," : "");
    }
    tiny_printf(&index, "  }\n}\n");
    tiny_put(t, "model.safetensors.index.json", index.p, index.n);
    free(index.p);
}

static inline void tiny_build(tiny *t, const tiny_opts *opts)
{
    dsv3_dtype wide = opts->dtype == DSV3_DTYPE_F32 ? DSV3_DTYPE_F32 : DSV3_DTYPE_BF16;
    static const char generation[] = "{\n  \"_from_model_config\": true,\n  \"bos_token_id\": 0,\n  \"eos_token_id\": 1,\n  \"do_sample\": true,\n"
                                     "  \"temperature\": 0.6,\n  \"top_p\": 0.95,\n  \"transformers_version\": \"4.39.3\"\n}\n";
    memset(t, 0, sizeof *t);
    t->o = *opts;
    t->random = opts->seed * 1000003u;
    tiny_draw(t, "model.", "embed_tokens.weight", wide, 2, opts->vocab, opts->dim, 0, 1);
    for (uint32_t l = 0; l < opts->n_layers + opts->mtp; l++)
        tiny_layer(t, l, l < opts->n_dense);
    for (uint32_t k = 0; k < opts->mtp; k++) {
        char layer[64];
        snprintf(layer, sizeof layer, "model.layers.%u.", (unsigned)(opts->n_layers + k));
        tiny_norm(t, layer, "enorm.weight", opts->dim);
        tiny_norm(t, layer, "hnorm.weight", opts->dim);
        tiny_draw(t, layer, "eh_proj.weight", wide, 2, opts->dim, 2 * opts->dim, 0, 1 / sqrt(2.0 * opts->dim));
        tiny_norm(t, layer, "shared_head.norm.weight", opts->dim);
    }
    tiny_norm(t, "model.", "norm.weight", opts->dim);
    if (!opts->tie)
        tiny_draw(t, "", "lm_head.weight", wide, 2, opts->vocab, opts->dim, 0, 1 / sqrt((double)opts->dim));
    tiny_write_config(t);
    tiny_put(t, "generation_config.json", generation, sizeof generation - 1);
    if (opts->tokenizer)
        tiny_write_tokenizer(t);
    tiny_pack(t);
}

static inline void tiny_free(tiny *t)
{
    for (size_t i = 0; i < t->n_tensors; i++)
        free(t->tensors[i].data);
    for (size_t i = 0; i < t->n_files; i++)
        free(t->files[i].data);
    free(t->tensors);
    memset(t, 0, sizeof *t);
}

/* ---- the reader ---- */

static inline dsv3_result tiny_reader_open(void *user, const char *name, dsv3_file *file)
{
    tiny *t = (tiny *)user;
    tiny_file *f = tiny_get(t, name);
    if (t->fail_open && strcmp(name, t->fail_open) == 0)
        return DSV3_ERROR_IO;
    if (!f)
        return DSV3_ERROR_FILE_NOT_FOUND;
    t->n_opened++;
    file->data = t->read_mode ? NULL : f->data;
    file->size = f->size;
    file->handle = f;
    return DSV3_OK;
}

static inline dsv3_result tiny_reader_read(void *user, dsv3_file *file, uint64_t offset, void *dst, size_t size)
{
    tiny *t = (tiny *)user;
    tiny_file *f = (tiny_file *)file->handle;
    if (++t->n_reads == t->fail_read)
        return DSV3_ERROR_IO;
    if (offset > f->size || size > f->size - offset)
        return DSV3_ERROR_TRUNCATED;
    if (size)
        memcpy(dst, f->data + offset, size);
    return DSV3_OK;
}

static inline void tiny_reader_close(void *user, dsv3_file *file)
{
    (void)file;
    ((tiny *)user)->n_closed++;
}

static inline dsv3_reader tiny_reader(tiny *t)
{
    dsv3_reader r;
    r.open_fn = tiny_reader_open;
    r.read_fn = tiny_reader_read;
    r.close_fn = tiny_reader_close;
    r.user = t;
    return r;
}

/* Opens through the reader; opts NULL: defaults. `error` must be there. */
static inline dsv3_result tiny_open(tiny *t, dsv3_model **model, const dsv3_model_opts *opts, dsv3_error *error)
{
    dsv3_model_opts o;
    memset(&o, 0, sizeof o);
    if (opts)
        o = *opts;
    o.reader = tiny_reader(t);
    return dsv3_model_open(model, NULL, &o, error);
}

/* ---- a directory on disk ---- */

static inline bool tiny_mkdir(const char *path)
{
#ifdef _WIN32
    return _mkdir(path) == 0;
#else
    return mkdir(path, 0700) == 0;
#endif
}

static inline void tiny_remove_dir(tiny *t, const char *dir)
{
    char path[600];
    for (size_t i = 0; i < t->n_files; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, t->files[i].name);
        remove(path);
    }
#ifdef _WIN32
    _rmdir(dir);
#else
    rmdir(dir);
#endif
}

/* Writes all files into a new directory of the temporary folder; its path into dir [size]. */
static inline bool tiny_write_dir(tiny *t, char *dir, size_t size)
{
    static unsigned serial;
    const char *base = getenv("TMPDIR");
    bool made = false;
#ifdef _WIN32
    base = getenv("TEMP");
#endif
    for (int attempt = 0; attempt < 100 && !made; attempt++) {
        uint64_t mix = (uint64_t)time(NULL) * 1000003u + (uint64_t)clock() * 31 + (uint64_t)(uintptr_t)t + serial++;
        snprintf(dir, size, "%s/dsv3-test-%llx", base ? base : "/tmp", (unsigned long long)tiny_next(&mix));
        made = tiny_mkdir(dir);
    }
    for (size_t i = 0; made && i < t->n_files; i++) {
        char path[600];
        snprintf(path, sizeof path, "%s/%s", dir, t->files[i].name);
        FILE *f = fopen(path, "wb");
        bool written = f && fwrite(t->files[i].data, 1, t->files[i].size, f) == t->files[i].size;
        if ((f && fclose(f) != 0) || !written)
            made = false;
    }
    return made;
}

/* ---- an allocator that counts ---- */

typedef struct tiny_heap {
    uint64_t n_allocs, n_frees;
    uint64_t live_bytes, peak_bytes;
    uint64_t fail_at;   /* this allocation (1, 2, ...) and, with fail_on, all later ones fail; 0: none */
    bool fail_on;
    uint64_t n_damaged; /* blocks freed with a wrong size, or written beyond their end */
    uint64_t n_strange; /* alignments that are no power of two up to 64 */
} tiny_heap;

#define TINY_HEAP_FRONT 128 /* raw pointer and size in front of a block */
#define TINY_HEAP_BACK 16

static inline void *tiny_heap_alloc(void *user, size_t size, size_t align)
{
    tiny_heap *h = (tiny_heap *)user;
    uint8_t *raw, *p;
    h->n_allocs++;
    if (align == 0 || align > 64 || (align & (align - 1)))
        h->n_strange++, align = 64;
    if (h->fail_at && (h->n_allocs == h->fail_at || (h->fail_on && h->n_allocs > h->fail_at)))
        return NULL;
    if (size > SIZE_MAX / 4 || !(raw = (uint8_t *)malloc(size + TINY_HEAP_FRONT + TINY_HEAP_BACK)))
        return NULL;
    p = raw + 64;
    p += (64 - ((uintptr_t)p & 63)) & 63;
    memcpy(p - 8, &raw, sizeof raw);
    memcpy(p - 16, &size, sizeof size);
    memset(p, 0xA5, size); /* nobody may rely on cleared memory */
    memset(p + size, 0x5A, TINY_HEAP_BACK);
    h->live_bytes += size;
    if (h->live_bytes > h->peak_bytes)
        h->peak_bytes = h->live_bytes;
    return p;
}

static inline void tiny_heap_free(void *user, void *ptr, size_t size)
{
    tiny_heap *h = (tiny_heap *)user;
    uint8_t *raw, *p = (uint8_t *)ptr;
    size_t kept;
    memcpy(&raw, p - 8, sizeof raw);
    memcpy(&kept, p - 16, sizeof kept);
    bool damaged = kept != size;
    for (size_t i = 0; i < TINY_HEAP_BACK; i++)
        damaged |= p[kept + i] != 0x5A;
    h->n_damaged += damaged;
    h->n_frees++;
    h->live_bytes -= kept;
    free(raw);
}

static inline dsv3_allocator tiny_allocator(tiny_heap *h)
{
    dsv3_allocator a;
    a.alloc_fn = tiny_heap_alloc;
    a.free_fn = tiny_heap_free;
    a.user = h;
    return a;
}

/* Ids that mean nothing, all below `vocab`, none of the first three. */
static inline void tiny_ids(int32_t *ids, size_t n, uint32_t vocab, uint64_t seed)
{
    for (size_t i = 0; i < n; i++)
        ids[i] = (int32_t)(3 + tiny_next(&seed) % (vocab - 3));
}

#endif /* DSV3_TINY_H */
