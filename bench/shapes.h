/* Checkpoints of named shapes with random weights, as official directories: config.json, shards and their index.
   Used by bench.c, which supplies die, need and progress.

   The weights keep the activations sane and the router alive: projections Gaussian with std 1 / sqrt(fan-in), norms
   around 1, a bias that moves the choice of experts. Tensors lie in the order of the usual safetensors writer, with the
   alignment that this gives, so that what is timed is what published files look like.

   A shape with a prediction layer walks: behind token t its model likes t + 1 best, and its prediction layer guesses that
   for a chosen share of the tokens. */

typedef struct shape {
    const char *name;
    uint32_t dim, layers, dense, inter, experts, top, groups, top_groups, shared, moe_inter;
    uint32_t heads, q_lora, kv_lora, nope, rope, v, vocab;
    uint32_t mtp; /* prediction layers: 0 or 1 */
} shape;

/* bench-3b and v3-slice are also written as GGUF by tools for other engines: keep the figures. */
static const shape SHAPES[] = {
    /* name       dim layers dense inter ex top gr tg sh moe_i heads q_lora kv_l nope rope v vocab mtp */
    {"bench-3b", 2048, 8, 1, 8192, 64, 6, 1, 1, 1, 1408, 16, 1536, 512, 128, 64, 128, 32768, 0},
    {"v3-slice", 7168, 3, 1, 18432, 32, 8, 8, 4, 1, 2048, 128, 1536, 512, 128, 64, 128, 16384, 0},
    {"tiny", 256, 4, 1, 512, 16, 4, 4, 2, 1, 192, 4, 128, 128, 64, 32, 64, 2048, 0},
    {"bench-3b-mtp", 2048, 8, 1, 8192, 64, 6, 1, 1, 1, 1408, 16, 1536, 512, 128, 64, 128, 32768, 1},
    {"tiny-mtp", 256, 4, 1, 512, 16, 4, 4, 2, 1, 192, 4, 128, 128, 64, 32, 64, 2048, 1},
};

#define SHARD_BYTES ((uint64_t)2 << 30)

/* The walk. A vocabulary in WALKS parts, one for each pair of acceptance and reuse. A text stays in its part and takes its
   tokens in order, for the head's row of t + 1 is the embedding of t, and embeddings are so large that no layer hides them.
   The prediction layer joins to the embedding alone (eh_proj = [1 0]); its head has the rows of some tokens, drawn for each
   part, exchanged: behind those it guesses wrong. Experts too are chosen by the embedding: tokens that share a part of its
   columns choose the same ones more often. */

enum { WALKS = 8 };
#define WALK_STD 4.0 /* of embeddings */

static const double WALK_ACCEPTANCE[4] = {0, 0.5, 0.7, 0.85};
static const double WALK_SHARED[2] = {0, 0.6}; /* of the columns: experts used again at chance, and 0.4 of them */

/* What a tensor's rows are. */
typedef enum filling {
    FILL_RANDOM,
    FILL_TOKENS,  /* row t is the vector of token t, */
    FILL_NEXT,    /* of the token before t: the model's next token, */
    FILL_GUESSED, /* or of another, where the prediction layer is to be wrong */
    FILL_UNIT     /* one column each */
} filling;

static uint64_t walk_hash(uint64_t x)
{
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

/* Whether the prediction layer knows what follows token t. */
static bool walk_right(uint32_t t, uint32_t vocab)
{
    double p = WALK_ACCEPTANCE[t / (vocab / WALKS) % 4];
    return (double)(walk_hash(t + 1000003) >> 40) < p * 16777216.0;
}

/* Token t + n, in its part. */
static uint32_t walk_on(uint32_t t, uint32_t n, uint32_t vocab)
{
    const uint32_t part = vocab / WALKS;
    return t - t % part + (t % part + n) % part;
}

/* The token whose vector is row t. */
static uint32_t walk_source(filling how, uint32_t t, uint32_t vocab)
{
    const uint32_t part = vocab / WALKS;
    uint32_t from = how == FILL_TOKENS ? t : walk_on(t, part - 1, vocab);
    if (how == FILL_GUESSED && !walk_right(from, vocab))
        do
            from = walk_on(from, 1, vocab);
        while (walk_right(from, vocab)); /* the next that is wrong too: never itself, there are many */
    return from;
}

/* How a shape is written. The head is BF16 as published, unless it is asked for in the form of the other weights. */
typedef struct format {
    dsv3_dtype dtype; /* F8_E4M3: 128 x 128 blocks; I8: a scale a row (compressed-tensors W8A8); BF16 */
    bool head8;
} format;

typedef struct spec { /* one tensor to be written: mean + std * a Gaussian; codes have no mean */
    char name[96];
    dsv3_dtype dtype;
    uint32_t rows, cols; /* cols 0: rank 1 */
    double mean, std;
    filling how;
    uint32_t shard;
} spec;

typedef struct specs {
    spec *v; /* [n] */
    uint32_t n, cap;
    format f;
} specs;

static uint64_t spec_count(const spec *t)
{
    return (uint64_t)t->rows * (t->cols ? t->cols : 1);
}

static void spec_add(specs *s, dsv3_dtype dtype, uint32_t rows, uint32_t cols, double mean, double std,
                     const char *name)
{
    if (s->n == s->cap) {
        s->cap = s->cap * 2 + 64;
        s->v = (spec *)realloc(s->v, s->cap * sizeof *s->v);
        if (!s->v)
            die("out of memory");
    }
    spec *t = &s->v[s->n++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->dtype = dtype, t->rows = rows, t->cols = cols, t->mean = mean, t->std = std;
}

/* Gaussian codes of this standard deviation: the largest of a block then lies near 448, the largest of a row near 127, as
   quantisers leave them. */
#define CODE_STD_FP8  107.0
#define CODE_STD_INT8 34.0

/* A projection that is stored with scales: weights of std gain / sqrt(fan-in). */
static void spec_linear(specs *s, uint32_t rows, uint32_t cols, double gain, const char *prefix, const char *part)
{
    char name[96];
    bool fp8 = s->f.dtype == DSV3_DTYPE_F8_E4M3, int8 = s->f.dtype == DSV3_DTYPE_I8;
    double std = gain / sqrt((double)cols), code = fp8 ? CODE_STD_FP8 : int8 ? CODE_STD_INT8 : std, scale = std / code;
    snprintf(name, sizeof name, "%s%s.weight", prefix, part);
    spec_add(s, s->f.dtype, rows, cols, 0, code, name);
    snprintf(name, sizeof name, "%s%s.weight_scale%s", prefix, part, fp8 ? "_inv" : "");
    if (fp8)
        spec_add(s, DSV3_DTYPE_F32, (rows + 127) / 128, (cols + 127) / 128, scale, 0.05 * scale, name);
    if (int8)
        spec_add(s, DSV3_DTYPE_BF16, rows, 1, scale, 0.05 * scale, name);
}

/* [1 0], stored as the others are. */
static void spec_unit(specs *s, uint32_t rows, uint32_t cols, const char *prefix, const char *part)
{
    const uint32_t before = s->n;
    spec_linear(s, rows, cols, 1, prefix, part);
    for (uint32_t i = before + 1; i < s->n; i++) /* scales: the largest code is a one */
        s->v[i].mean = 1 / (s->f.dtype == DSV3_DTYPE_I8 ? 127.0 : 448.0), s->v[i].std = 0;
    s->v[before].how = FILL_UNIT;
}

static void spec_mlp(specs *s, uint32_t dim, uint32_t inter, const char *prefix)
{
    spec_linear(s, inter, dim, 1, prefix, "gate_proj");
    spec_linear(s, inter, dim, 1, prefix, "up_proj");
    spec_linear(s, dim, inter, 1, prefix, "down_proj");
}

static void spec_norm(specs *s, uint32_t n, const char *prefix, const char *part)
{
    char name[96];
    snprintf(name, sizeof name, "%s%s.weight", prefix, part);
    spec_add(s, DSV3_DTYPE_BF16, n, 0, 1, 0.2, name);
}

/* The last `n` specs that are weights of `cols` columns. */
static void spec_how(specs *s, uint32_t n, filling how)
{
    for (uint32_t i = s->n - n; i < s->n; i++)
        if (!strstr(s->v[i].name, "_scale"))
            s->v[i].how = how;
}

static void spec_head(specs *s, const shape *p, const char *prefix, const char *part, filling how)
{
    char name[96];
    uint32_t before = s->n;
    snprintf(name, sizeof name, "%s%s.weight", prefix, part);
    if (s->f.head8)
        spec_linear(s, p->vocab, p->dim, 1, prefix, part);
    else
        spec_add(s, DSV3_DTYPE_BF16, p->vocab, p->dim, 0, 1 / sqrt((double)p->dim), name);
    spec_how(s, s->n - before, how);
}

static void specs_of_shape(specs *s, const shape *p)
{
    char at[64], name[96];
    spec_add(s, DSV3_DTYPE_BF16, p->vocab, p->dim, 0, p->mtp ? WALK_STD : 1, "model.embed_tokens.weight");
    spec_how(s, 1, p->mtp ? FILL_TOKENS : FILL_RANDOM);
    for (uint32_t l = 0; l < p->layers + p->mtp; l++) {
        snprintf(at, sizeof at, "model.layers.%u.", l);
        if (l >= p->layers) {
            spec_norm(s, p->dim, at, "enorm");
            spec_norm(s, p->dim, at, "hnorm");
            spec_norm(s, p->dim, at, "shared_head.norm");
            spec_unit(s, p->dim, 2 * p->dim, at, "eh_proj");
            spec_head(s, p, at, "shared_head.head", FILL_GUESSED);
        }
        spec_norm(s, p->dim, at, "input_layernorm");
        spec_norm(s, p->dim, at, "post_attention_layernorm");
        snprintf(at, sizeof at, "model.layers.%u.self_attn.", l);
        spec_linear(s, p->q_lora, p->dim, 1, at, "q_a_proj");
        spec_norm(s, p->q_lora, at, "q_a_layernorm");
        spec_linear(s, p->heads * (p->nope + p->rope), p->q_lora, 1.5, at, "q_b_proj");
        spec_linear(s, p->kv_lora + p->rope, p->dim, 1, at, "kv_a_proj_with_mqa");
        spec_norm(s, p->kv_lora, at, "kv_a_layernorm");
        spec_linear(s, p->heads * (p->nope + p->v), p->kv_lora, 1, at, "kv_b_proj");
        spec_linear(s, p->dim, p->heads * p->v, 1, at, "o_proj");
        snprintf(at, sizeof at, "model.layers.%u.mlp.", l);
        if (l < p->dense) {
            spec_mlp(s, p->dim, p->inter, at);
            continue;
        }
        snprintf(name, sizeof name, "%sgate.weight", at);
        spec_add(s, DSV3_DTYPE_BF16, p->experts, p->dim, 0, 2 / sqrt((double)p->dim), name);
        snprintf(name, sizeof name, "%sgate.e_score_correction_bias", at);
        spec_add(s, DSV3_DTYPE_F32, p->experts, 0, 0, p->mtp ? 0.02 : 0.1, name); /* a walk: chance */
        for (uint32_t e = 0; e < p->experts; e++) {
            snprintf(at, sizeof at, "model.layers.%u.mlp.experts.%u.", l, e);
            spec_mlp(s, p->dim, p->moe_inter, at);
        }
        snprintf(at, sizeof at, "model.layers.%u.mlp.shared_experts.", l);
        spec_mlp(s, p->dim, p->moe_inter * p->shared, at);
    }
    spec_norm(s, p->dim, "model.", "norm");
    spec_head(s, p, "", "lm_head", p->mtp ? FILL_NEXT : FILL_RANDOM);
}

/* Also the stamp: a directory whose config.json is another text is written again. */
static void config_text(char *text, size_t size, const shape *p, format f)
{
    static const char FP8[] = "  \"quantization_config\": {\"activation_scheme\": \"dynamic\", \"fmt\": \"e4m3\", "
                              "\"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]},\n";
    /* as llm-compressor writes it */
    static const char INT8[] =
        "  \"quantization_config\": {\n    \"config_groups\": {\"group_0\": {\n"
        "      \"input_activations\": {\"actorder\": null, \"block_structure\": null, \"dynamic\": true, "
        "\"group_size\": null, \"num_bits\": 8, \"observer\": null, \"observer_kwargs\": {}, "
        "\"strategy\": \"token\", \"symmetric\": true, \"type\": \"int\"},\n"
        "      \"output_activations\": null,\n      \"targets\": [\"Linear\"],\n"
        "      \"weights\": {\"actorder\": null, \"block_structure\": null, \"dynamic\": false, "
        "\"group_size\": null, \"num_bits\": 8, \"observer\": \"minmax\", \"observer_kwargs\": {}, "
        "\"strategy\": \"channel\", \"symmetric\": true, \"type\": \"int\"}}},\n"
        "    \"format\": \"int-quantized\",\n    \"global_compression_ratio\": null,\n"
        "    \"ignore\": [%s\"re:.*mlp\\\\.gate$\"],\n    \"kv_cache_scheme\": null,\n"
        "    \"quant_method\": \"compressed-tensors\",\n    \"quantization_status\": \"compressed\"\n  },\n";
    char quantization[2048] = "";
    if (f.dtype == DSV3_DTYPE_F8_E4M3)
        snprintf(quantization, sizeof quantization, "%s", FP8);
    if (f.dtype == DSV3_DTYPE_I8)
        snprintf(quantization, sizeof quantization, INT8, f.head8 ? "" : "\"lm_head\", ");
    snprintf(
        text, size,
        "{\n  \"_name_or_path\": \"%s, random weights, writer %d\",\n  \"architectures\": "
        "[\"DeepseekV3ForCausalLM\"],\n"
        "  \"model_type\": \"deepseek_v3\",\n  \"hidden_act\": \"silu\",\n  \"hidden_size\": %u,\n"
        "  \"num_hidden_layers\": %u,\n  \"first_k_dense_replace\": %u,\n  \"moe_layer_freq\": 1,\n"
        "  \"intermediate_size\": %u,\n  \"n_routed_experts\": %u,\n  \"num_experts_per_tok\": %u,\n"
        "  \"n_group\": %u,\n  \"topk_group\": %u,\n  \"n_shared_experts\": %u,\n  \"moe_intermediate_size\": %u,\n"
        "  \"num_attention_heads\": %u,\n  \"num_key_value_heads\": %u,\n  \"q_lora_rank\": %u,\n"
        "  \"kv_lora_rank\": %u,\n  \"qk_nope_head_dim\": %u,\n  \"qk_rope_head_dim\": %u,\n  \"v_head_dim\": %u,\n"
        "  \"vocab_size\": %u,\n  \"scoring_func\": \"sigmoid\",\n  \"topk_method\": \"noaux_tc\",\n"
        "  \"norm_topk_prob\": true,\n  \"routed_scaling_factor\": 2.5,\n  \"rms_norm_eps\": 1e-06,\n"
        "  \"rope_theta\": 10000,\n  \"rope_scaling\": null,\n  \"max_position_embeddings\": 163840,\n"
        "  \"num_nextn_predict_layers\": %u,\n  \"attention_bias\": false,\n  \"tie_word_embeddings\": false,\n"
        "  \"bos_token_id\": 0,\n  \"eos_token_id\": 1,\n%s  \"torch_dtype\": \"bfloat16\"\n}\n",
        p->name, f.dtype == DSV3_DTYPE_F8_E4M3 ? 2 : 1, p->dim, p->layers, p->dense, p->inter, p->experts, p->top,
        p->groups, p->top_groups, p->shared, p->moe_inter, p->heads, p->heads, p->q_lora, p->kv_lora, p->nope, p->rope,
        p->v, p->vocab, p->mtp, quantization);
}

enum { N_QUANTILES = 4096 }; /* 12 random bits pick one */

/* out: [N_QUANTILES] elements of t->dtype: the Gaussian's quantiles z in the tensor's own scale and type. */
static void quantile_table(uint8_t *out, const spec *t, const double *z)
{
    for (uint32_t i = 0; i < N_QUANTILES; i++) {
        float value = (float)(t->mean + t->std * z[i]);
        uint32_t bits, bf16;
        memcpy(&bits, &value, sizeof bits);
        bf16 = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
        if (t->dtype == DSV3_DTYPE_F32) {
            memcpy(out + 4 * i, &bits, 4);
        } else if (t->dtype == DSV3_DTYPE_BF16) {
            out[2 * i] = (uint8_t)(bf16 & 0xFF), out[2 * i + 1] = (uint8_t)(bf16 >> 8);
        } else if (t->dtype == DSV3_DTYPE_I8) {
            double code = floor((double)value + 0.5);
            out[i] = (uint8_t)(int8_t)(code < -128 ? -128 : code > 127 ? 127 : code);
        } else if (i ==
                   N_QUANTILES /
                       2) { /* one in 4,096 is denormal: reckoned, 1 to 8 in 10,000 are, by how far outliers reach */
            out[i] = 3;
        } else { /* the nearest of 127 magnitudes; 0x7F, the NaN, is not among them */
            double best = 1e9;
            for (uint32_t code = 0; code < 127; code++) {
                double v = code < 8 ? ldexp(code, -9) : ldexp(8 + (code & 7), (int)(code >> 3) - 10);
                double distance = fabs(v - fabs((double)value));
                if (distance < best) {
                    best = distance;
                    out[i] = (uint8_t)(code | (value < 0 ? 0x80u : 0u));
                }
            }
        }
    }
}

static uint64_t random64(uint64_t *state) /* splitmix64 */
{
    uint64_t x = *state += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

/* Fills out[0 ... n-1] (room for 4 more) with elements of `size` bytes drawn from a table; five a random number. */
static void fill(uint8_t *out, size_t n, size_t size, const uint8_t *quantiles, uint64_t *state)
{
    for (size_t i = 0; i < n; i += 5) {
        uint64_t r = random64(state);
        for (size_t j = i; j < i + 5; j++, r >>= 12) {
            if (size == 1)
                out[j] = quantiles[r & (N_QUANTILES - 1)];
            else if (size == 2)
                memcpy(out + 2 * j, quantiles + 2 * (r & (N_QUANTILES - 1)), 2);
            else
                memcpy(out + 4 * j, quantiles + 4 * (r & (N_QUANTILES - 1)), 4);
        }
    }
}

enum { PATH_SIZE = 2048 };

static void path_join(char out[PATH_SIZE], const char *dir, const char *separator, const char *name)
{
    if (snprintf(out, PATH_SIZE, "%s%s%s", dir, separator, name) >= PATH_SIZE)
        die("%s: the path is too long", dir);
}

static FILE *file_create(const char *dir, const char *name)
{
    char path[PATH_SIZE];
    path_join(path, dir, "/", name);
    FILE *f = fopen(path, "wb");
    if (!f)
        die("cannot write %s", path);
    return f;
}

static void file_write(FILE *f, const void *data, size_t size)
{
    if (fwrite(data, 1, size, f) != size)
        die("cannot write the checkpoint: disk full?");
}

static void file_finish(FILE *f)
{
    if (fclose(f))
        die("cannot write the checkpoint: disk full?");
}

static int compare_spec(const void *a, const void *b)
{
    const spec *x = (const spec *)a, *y = (const spec *)b;
    size_t sx = dsv3_dtype_size(x->dtype), sy = dsv3_dtype_size(y->dtype);
    if (x->shard != y->shard)
        return x->shard < y->shard ? -1 : 1;
    return sx != sy ? (sx > sy ? -1 : 1) : strcmp(x->name, y->name); /* the order of the reference writer */
}

/* Row `row` of a tensor that is not all random: out [cols] elements, room for 4 more. */
static void fill_row(uint8_t *out, const spec *t, uint32_t row, const uint8_t *quantiles)
{
    const size_t size = dsv3_dtype_size(t->dtype);
    if (t->how == FILL_UNIT) {
        static const uint8_t one[2] = {0x80, 0x3F}; /* BF16 */
        memset(out, 0, t->cols * size);
        if (size == 2)
            memcpy(out + 2 * (size_t)row, one, 2);
        else
            out[row] = t->dtype == DSV3_DTYPE_I8 ? 127 : 0x7E;
        return;
    }
    const uint32_t token = walk_source(t->how, row, t->rows), part = token / (t->rows / WALKS);
    const uint32_t n_shared = (uint32_t)(WALK_SHARED[part / 4] * t->cols);
    uint64_t common = walk_hash(part + 1), own = walk_hash(token + 2000003);
    fill(out, n_shared, size, quantiles, &common);
    fill(out + n_shared * size, t->cols - n_shared, size, quantiles, &own);
}

/* One shard: tensors v[0 ... n-1]. done, total: bytes, for the bar. */
static void shard_write(FILE *f, const spec *v, uint32_t n, const double *z, uint64_t *random, uint64_t *done,
                        uint64_t total)
{
    enum { CHUNK = 1 << 18 };
    char *header = (char *)need((size_t)n * 256 + 16);
    uint8_t *chunk = (uint8_t *)need((CHUNK + 4) * 4);
    uint8_t *quantiles = (uint8_t *)need(N_QUANTILES * 4);
    uint64_t offset = 0, header_size;
    size_t len = (size_t)sprintf(header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (uint32_t i = 0; i < n; i++) {
        uint64_t size = spec_count(&v[i]) * dsv3_dtype_size(v[i].dtype);
        len += (size_t)sprintf(header + len, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%u", v[i].name,
                               dsv3_dtype_name(v[i].dtype), v[i].rows);
        if (v[i].cols)
            len += (size_t)sprintf(header + len, ",%u", v[i].cols);
        len += (size_t)sprintf(header + len, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", offset, offset + size);
        offset += size;
    }
    header[len++] = '}';
    while (len % 8)
        header[len++] = ' ';
    header_size = len;
    file_write(f, &header_size, 8);
    file_write(f, header, len);
    for (uint32_t i = 0; i < n; i++) {
        size_t element = dsv3_dtype_size(v[i].dtype);
        if (i == 0 || v[i].dtype != v[i - 1].dtype || v[i].mean != v[i - 1].mean || v[i].std != v[i - 1].std)
            quantile_table(quantiles, &v[i], z);
        for (uint64_t left = spec_count(&v[i]), k; left; left -= k) {
            k = v[i].how ? v[i].cols : left < CHUNK ? left : CHUNK;
            if (v[i].how)
                fill_row(chunk, &v[i], (uint32_t)(v[i].rows - left / v[i].cols), quantiles);
            else
                fill(chunk, (size_t)k, element, quantiles, random);
            file_write(f, chunk, (size_t)k * element);
            *done += k * element;
            if (*done / (total / 200 + 1) != (*done - k * element) / (total / 200 + 1)) {
                int part = (int)(20 * *done / total);
                progress("writing [%.*s%*s] %3.0f %%  %.2f of %.2f GB", part, "####################", 20 - part, "",
                         100.0 * (double)*done / (double)total, 1e-9 * (double)*done, 1e-9 * (double)total);
            }
        }
    }
    free(header), free(chunk), free(quantiles);
}

static void make_dirs(const char *path)
{
    char part[PATH_SIZE];
    for (size_t n = 1; n == 1 || path[n - 1]; n++)
        if (path[n] == '/' || !path[n]) {
            memcpy(part, path, n);
            part[n] = 0;
            mkdir(part, 0777);
        }
}

static void remove_dir(const char *path)
{
    DIR *d = opendir(path);
    char file[PATH_SIZE];
    if (!d)
        return;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        path_join(file, path, "/", e->d_name);
        if (e->d_name[0] != '.')
            unlink(file);
    }
    closedir(d);
    rmdir(path);
}

/* out [N_QUANTILES]: the Gaussian's quantiles, by bisection. */
static void gauss_quantiles(double *out)
{
    for (uint32_t i = 0; i < N_QUANTILES; i++) {
        double low = -6, high = 6;
        for (uint32_t step = 0; step < 50; step++) {
            double middle = (low + high) / 2;
            *(0.5 * erfc(-middle / sqrt(2.0)) * N_QUANTILES < i + 0.5 ? &low : &high) = middle;
        }
        out[i] = low;
    }
}

/* dir: out, where the shape lies below `parent`; written if it does not lie there yet. */
static void shape_ensure(char dir[PATH_SIZE], const shape *p, format wanted, const char *parent)
{
    char config[8192], found[8192], path[PATH_SIZE], temporary[PATH_SIZE], name[64];
    snprintf(name, sizeof name, "%s-%s%s", p->name,
             wanted.dtype == DSV3_DTYPE_F8_E4M3 ? "fp8"
             : wanted.dtype == DSV3_DTYPE_I8    ? "int8"
                                                : "bf16",
             wanted.head8 ? "-head8" : "");
    path_join(dir, parent, "/", name);
    path_join(path, dir, "/", "config.json");
    path_join(temporary, dir, ".part", "");
    config_text(config, sizeof config, p, wanted);
    FILE *f = fopen(path, "rb");
    if (f) {
        size_t n = fread(found, 1, sizeof found, f);
        fclose(f);
        if (n == strlen(config) && memcmp(found, config, n) == 0)
            return;
    }
    remove_dir(temporary);
    make_dirs(temporary);

    double z[N_QUANTILES];
    gauss_quantiles(z);
    specs s;
    memset(&s, 0, sizeof s);
    s.f = wanted;
    specs_of_shape(&s, p);
    uint64_t total = 0, done = 0, random = 1;
    for (uint32_t i = 0; i < s.n; i++) {
        s.v[i].shard = (uint32_t)(total / SHARD_BYTES);
        total += spec_count(&s.v[i]) * dsv3_dtype_size(s.v[i].dtype);
    }
    uint32_t n_shards = s.v[s.n - 1].shard + 1;
    qsort(s.v, s.n, sizeof *s.v, compare_spec);
    FILE *index = n_shards > 1 ? file_create(temporary, "model.safetensors.index.json") : NULL;
    if (index)
        fprintf(index, "{\n  \"metadata\": {\"total_size\": %" PRIu64 "},\n  \"weight_map\": {", total);
    for (uint32_t i = 0, n; i < s.n; i += n) {
        for (n = 0; i + n < s.n && s.v[i + n].shard == s.v[i].shard; n++)
            ;
        snprintf(name, sizeof name, "model.safetensors");
        if (index)
            snprintf(name, sizeof name, "model-%05u-of-%06u.safetensors", s.v[i].shard + 1, n_shards);
        for (uint32_t j = 0; index && j < n; j++)
            fprintf(index, "%s\n    \"%s\": \"%s\"", i + j ? "," : "", s.v[i + j].name, name);
        f = file_create(temporary, name);
        shard_write(f, &s.v[i], n, z, &random, &done, total);
        file_finish(f);
    }
    if (index) {
        fprintf(index, "\n  }\n}\n");
        file_finish(index);
    }
    f = file_create(temporary, "config.json");
    file_write(f, config, strlen(config));
    file_finish(f);
    free(s.v);
    progress("%s", "");
    remove_dir(dir);
    if (rename(temporary, dir))
        die("cannot rename %s to %s", temporary, dir);
}
