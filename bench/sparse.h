/* Checkpoints of holes: config.json, index and shard headers as published, the data a gap in each file.

   Opening such a directory does all that opening the real one does, and takes a few megabytes of disk. Every weight reads
   as zero: nothing can be computed with it. Used by sparse.c and tests/test_sparse.c; needs a file system with holes. */
#ifndef SPARSE_H
#define SPARSE_H

#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct sparse_shape {
    const char *name;
    uint32_t dim, layers, dense, inter, experts, top, groups, top_groups, shared, moe_inter;
    uint32_t heads, q_lora, kv_lora, nope, rope, v, vocab, mtp;
    uint32_t shards;
} sparse_shape;

static const sparse_shape SPARSE_SHAPES[] = {
    /* name        dim layers dense inter ex top gr tg sh moe_i heads q_lora kv_l nope rope v vocab mtp shards */
    {"v3-671b", 7168, 61, 3, 18432, 256, 8, 8, 4, 1, 2048, 128, 1536, 512, 128, 64, 128, 129280, 1, 163},
    {"small", 256, 3, 1, 512, 16, 4, 4, 2, 1, 128, 4, 128, 128, 64, 32, 64, 1024, 1, 5},
};

typedef struct sparse_tensor {
    char name[128];
    const char *dtype;
    uint32_t rows, cols; /* cols 0: rank 1 */
    uint32_t element;    /* bytes */
    uint32_t shard;
} sparse_tensor;

/* What a directory holds; shard names follow from their number. */
typedef struct sparse {
    sparse_tensor *v; /* [n] */
    uint32_t n, cap;
    uint64_t data_bytes; /* of tensors */
    uint64_t file_bytes; /* of shards, headers included */
} sparse;

static inline void sparse_add(sparse *s, const char *dtype, uint32_t rows, uint32_t cols, const char *prefix,
                              const char *part)
{
    if (s->n == s->cap) {
        s->cap = s->cap * 2 + 64;
        s->v = (sparse_tensor *)realloc(s->v, s->cap * sizeof *s->v);
        if (!s->v)
            abort();
    }
    sparse_tensor *t = &s->v[s->n++];
    snprintf(t->name, sizeof t->name, "%s%s", prefix, part);
    t->dtype = dtype, t->rows = rows, t->cols = cols, t->shard = 0;
    t->element = strcmp(dtype, "F32") == 0 ? 4 : strcmp(dtype, "BF16") == 0 ? 2 : 1;
}

static inline uint64_t sparse_size(const sparse_tensor *t)
{
    return (uint64_t)t->rows * (t->cols ? t->cols : 1) * t->element;
}

/* A projection: FP8 with a scale for each block of 128 x 128. */
static inline void sparse_linear(sparse *s, uint32_t rows, uint32_t cols, const char *prefix, const char *part)
{
    char name[48];
    snprintf(name, sizeof name, "%s.weight", part);
    sparse_add(s, "F8_E4M3", rows, cols, prefix, name);
    snprintf(name, sizeof name, "%s.weight_scale_inv", part);
    sparse_add(s, "F32", (rows + 127) / 128, (cols + 127) / 128, prefix, name);
}

static inline void sparse_mlp(sparse *s, uint32_t dim, uint32_t inter, const char *prefix)
{
    sparse_linear(s, inter, dim, prefix, "gate_proj");
    sparse_linear(s, inter, dim, prefix, "up_proj");
    sparse_linear(s, dim, inter, prefix, "down_proj");
}

static inline void sparse_layer(sparse *s, const sparse_shape *p, uint32_t l)
{
    char at[64];
    snprintf(at, sizeof at, "model.layers.%" PRIu32 ".", l);
    if (l >= p->layers) { /* multi-token prediction: its own copies of embedding and head */
        sparse_add(s, "BF16", p->vocab, p->dim, at, "embed_tokens.weight");
        sparse_add(s, "BF16", p->dim, 0, at, "enorm.weight");
        sparse_add(s, "BF16", p->dim, 0, at, "hnorm.weight");
        sparse_add(s, "BF16", p->dim, 2 * p->dim, at, "eh_proj.weight");
        sparse_add(s, "BF16", p->dim, 0, at, "shared_head.norm.weight");
        sparse_add(s, "BF16", p->vocab, p->dim, at, "shared_head.head.weight");
    }
    sparse_add(s, "BF16", p->dim, 0, at, "input_layernorm.weight");
    sparse_add(s, "BF16", p->dim, 0, at, "post_attention_layernorm.weight");
    snprintf(at, sizeof at, "model.layers.%" PRIu32 ".self_attn.", l);
    sparse_linear(s, p->q_lora, p->dim, at, "q_a_proj");
    sparse_add(s, "BF16", p->q_lora, 0, at, "q_a_layernorm.weight");
    sparse_linear(s, p->heads * (p->nope + p->rope), p->q_lora, at, "q_b_proj");
    sparse_linear(s, p->kv_lora + p->rope, p->dim, at, "kv_a_proj_with_mqa");
    sparse_add(s, "BF16", p->kv_lora, 0, at, "kv_a_layernorm.weight");
    sparse_linear(s, p->heads * (p->nope + p->v), p->kv_lora, at, "kv_b_proj");
    sparse_linear(s, p->dim, p->heads * p->v, at, "o_proj");
    snprintf(at, sizeof at, "model.layers.%" PRIu32 ".mlp.", l);
    if (l < p->dense) {
        sparse_mlp(s, p->dim, p->inter, at);
        return;
    }
    sparse_add(s, "BF16", p->experts, p->dim, at, "gate.weight");
    sparse_add(s, "F32", p->experts, 0, at, "gate.e_score_correction_bias");
    for (uint32_t e = 0; e < p->experts; e++) {
        snprintf(at, sizeof at, "model.layers.%" PRIu32 ".mlp.experts.%" PRIu32 ".", l, e);
        sparse_mlp(s, p->dim, p->moe_inter, at);
    }
    snprintf(at, sizeof at, "model.layers.%" PRIu32 ".mlp.shared_experts.", l);
    sparse_mlp(s, p->dim, p->moe_inter * p->shared, at);
}

/* The keys and values of DeepSeek-V3's own file. */
static inline void sparse_config(FILE *f, const sparse_shape *p)
{
#define U(key, value) fprintf(f, "  \"%s\": %" PRIu32 ",\n", key, (uint32_t)(value))
    fprintf(f, "{\n  \"architectures\": [\"DeepseekV3ForCausalLM\"],\n  \"model_type\": \"deepseek_v3\",\n"
               "  \"attention_bias\": false,\n  \"attention_dropout\": 0.0,\n  \"hidden_act\": \"silu\",\n"
               "  \"initializer_range\": 0.02,\n  \"moe_layer_freq\": 1,\n  \"norm_topk_prob\": true,\n"
               "  \"rms_norm_eps\": 1e-06,\n  \"rope_theta\": 10000,\n  \"routed_scaling_factor\": 2.5,\n"
               "  \"rope_scaling\": {\"beta_fast\": 32, \"beta_slow\": 1, \"factor\": 40, \"mscale\": 1.0,\n"
               "    \"mscale_all_dim\": 1.0, \"original_max_position_embeddings\": 4096, \"type\": \"yarn\"},\n"
               "  \"scoring_func\": \"sigmoid\",\n  \"topk_method\": \"noaux_tc\",\n"
               "  \"tie_word_embeddings\": false,\n  \"use_cache\": true,\n");
    U("hidden_size", p->dim), U("num_hidden_layers", p->layers), U("first_k_dense_replace", p->dense);
    U("intermediate_size", p->inter), U("moe_intermediate_size", p->moe_inter), U("n_routed_experts", p->experts);
    U("n_shared_experts", p->shared), U("num_experts_per_tok", p->top), U("n_group", p->groups);
    U("topk_group", p->top_groups), U("num_attention_heads", p->heads), U("num_key_value_heads", p->heads);
    U("q_lora_rank", p->q_lora), U("kv_lora_rank", p->kv_lora), U("qk_nope_head_dim", p->nope);
    U("qk_rope_head_dim", p->rope), U("v_head_dim", p->v), U("vocab_size", p->vocab);
    U("num_nextn_predict_layers", p->mtp), U("max_position_embeddings", 163840);
    fprintf(f, "  \"bos_token_id\": 0,\n  \"eos_token_id\": 1,\n"
               "  \"quantization_config\": {\"activation_scheme\": \"dynamic\", \"fmt\": \"e4m3\",\n"
               "    \"quant_method\": \"fp8\", \"weight_block_size\": [128, 128]},\n"
               "  \"torch_dtype\": \"bfloat16\"\n}\n");
#undef U
}

/* The order of the usual writer: the widest type first, then by name. */
static inline int sparse_compare(const void *a, const void *b)
{
    const sparse_tensor *x = (const sparse_tensor *)a, *y = (const sparse_tensor *)b;
    if (x->shard != y->shard)
        return x->shard < y->shard ? -1 : 1;
    return x->element != y->element ? (x->element > y->element ? -1 : 1) : strcmp(x->name, y->name);
}

static inline void sparse_shard_name(char name[64], uint32_t shard, uint32_t shards)
{
    snprintf(name, 64, "model-%05" PRIu32 "-of-%06" PRIu32 ".safetensors", shard + 1, shards);
}

static inline FILE *sparse_create(const char *dir, const char *name)
{
    char path[1024];
    return snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path ? fopen(path, "wb") : NULL;
}

/* One shard: its header, then a hole as large as its tensors v[0 ... n-1]. Does the file system keep holes? A first shard
   of which more than half lies on the disk says no, and so does this. */
static inline bool sparse_shard(FILE *f, const sparse_tensor *v, uint32_t n, uint64_t *file_bytes)
{
    char *header = (char *)malloc((size_t)n * 256 + 64);
    uint64_t offset = 0;
    struct stat info;
    size_t len;
    if (!header)
        return false;
    len = (size_t)sprintf(header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (uint32_t i = 0; i < n; i++) {
        uint64_t end = offset + sparse_size(&v[i]);
        len += (size_t)sprintf(header + len, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%" PRIu32, v[i].name, v[i].dtype,
                               v[i].rows);
        if (v[i].cols)
            len += (size_t)sprintf(header + len, ",%" PRIu32, v[i].cols);
        len += (size_t)sprintf(header + len, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", offset, end);
        offset = end;
    }
    header[len++] = '}';
    while (len % 8)
        header[len++] = ' ';
    uint8_t size[8];
    for (int i = 0; i < 8; i++)
        size[i] = (uint8_t)((uint64_t)len >> 8 * i);
    bool ok = fwrite(size, 1, 8, f) == 8 && fwrite(header, 1, len, f) == len && fflush(f) == 0;
    *file_bytes = 8 + (uint64_t)len + offset;
    ok = ok && ftruncate(fileno(f), (off_t)*file_bytes) == 0 && fstat(fileno(f), &info) == 0;
    free(header);
    return ok && ((uint64_t)info.st_blocks * 512 < *file_bytes / 2 || *file_bytes < 1u << 20);
}

/* Writes the shape into `dir`, which is there. The tensors stay in s->v [s->n], in the order of the files; the caller
   frees them. False: a file could not be written, or has no hole. */
static inline bool sparse_write(sparse *s, const sparse_shape *p, const char *dir)
{
    char name[64];
    uint64_t total = 0, at = 0;
    memset(s, 0, sizeof *s);
    sparse_add(s, "BF16", p->vocab, p->dim, "model.", "embed_tokens.weight");
    for (uint32_t l = 0; l < p->layers + p->mtp; l++)
        sparse_layer(s, p, l);
    sparse_add(s, "BF16", p->dim, 0, "model.", "norm.weight");
    sparse_add(s, "BF16", p->vocab, p->dim, "", "lm_head.weight");
    for (uint32_t i = 0; i < s->n; i++)
        total += sparse_size(&s->v[i]);
    for (uint32_t i = 0; i < s->n; at += sparse_size(&s->v[i++])) /* at * shards fits: 2^40 bytes, 2^8 shards */
        s->v[i].shard = (uint32_t)(at * p->shards / total);
    s->data_bytes = total;

    FILE *f = sparse_create(dir, "config.json");
    if (!f)
        return false;
    sparse_config(f, p);
    bool ok = fclose(f) == 0;
    FILE *index = sparse_create(dir, "model.safetensors.index.json");
    if (!index)
        return false;
    fprintf(index, "{\n  \"metadata\": {\n    \"total_size\": %" PRIu64 "\n  },\n  \"weight_map\": {", total);
    for (uint32_t i = 0; i < s->n; i++) {
        sparse_shard_name(name, s->v[i].shard, p->shards);
        fprintf(index, "%s\n    \"%s\": \"%s\"", i ? "," : "", s->v[i].name, name);
    }
    fprintf(index, "\n  }\n}\n");
    ok = fclose(index) == 0 && ok;

    qsort(s->v, s->n, sizeof *s->v, sparse_compare);
    for (uint32_t first = 0, n; ok && first < s->n; first += n) {
        uint64_t size = 0;
        for (n = 1; first + n < s->n && s->v[first + n].shard == s->v[first].shard;)
            n++;
        sparse_shard_name(name, s->v[first].shard, p->shards);
        if (!(f = sparse_create(dir, name)))
            return false;
        ok = sparse_shard(f, &s->v[first], n, &size);
        ok = fclose(f) == 0 && ok;
        s->file_bytes += size;
    }
    return ok;
}

/* Takes away what sparse_write wrote, and the directory if nothing else is in it. */
static inline void sparse_remove(const sparse_shape *p, const char *dir)
{
    char name[64], path[1024];
    for (uint32_t i = 0; i < p->shards + 2; i++) {
        if (i < p->shards)
            sparse_shard_name(name, i, p->shards);
        else
            snprintf(name, sizeof name, "%s", i == p->shards ? "config.json" : "model.safetensors.index.json");
        if (snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path)
            unlink(path);
    }
    rmdir(dir);
}

#endif /* SPARSE_H */
