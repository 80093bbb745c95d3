/* The model against a plain second opinion: the same checkpoint run in double, token by token, in the expanded form of
   attention that the formulas are written in (keys and values of every head), experts one by one. `make oracle` compares
   with the transformers library; this needs nothing. Wrong models must fail by far, or the comparison would show nothing. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#define N    40
#define LONG 600 /* positions: nine blocks of attention and a piece, in two spans */
#define TOLERANCE 2e-5 /* of the largest logit */

/* Mistakes that a reader of the paper could make. */
enum { RIGHT, NO_MSCALE, OTHER_PAIRS, PLAIN_FREQUENCIES, BIAS_IGNORED, BIAS_IN_WEIGHTS, NO_NORMALISATION, NO_SCALING, NO_SHARED, VALUES_FIRST, GROUPS_IGNORED,
       LATENT_EPS, N_MISTAKES };

typedef struct rope_settings {
    double theta, factor, original, beta_fast, beta_slow, mscale, mscale_all_dim;
} rope_settings;

typedef struct reference {
    const tiny *t;
    const tiny_opts *o;
    rope_settings rope;
    int mistake;
    size_t n;        /* positions */
    double **values; /* [n_tensors] decoded */
    double *k, *v;   /* [n_layers, n, n_heads, nope + rope], [n_layers, n, n_heads, v_dim] */
    double *x, *y, *a, *b, *c; /* scratch */
} reference;

static double decode(const tiny_tensor *x, size_t i)
{
    uint16_t half;
    float f;
    if (strcmp(x->dtype, "F32") == 0)
        return memcpy(&f, x->data + 4 * i, 4), (double)f;
    if (strcmp(x->dtype, "F8_E4M3") == 0)
        return tiny_f8_value(x->data[i]);
    if (strcmp(x->dtype, "I8") == 0)
        return (double)(int8_t)x->data[i];
    memcpy(&half, x->data + 2 * i, 2);
    return strcmp(x->dtype, "F16") == 0 ? tiny_f16_value(half) : (double)tiny_float((uint32_t)half << 16);
}

static void reference_open(reference *r, const tiny *t, rope_settings rope, size_t n_positions)
{
    size_t rows = (size_t)t->o.n_layers * n_positions * t->o.n_heads, most = t->o.vocab + t->o.inter + 4096;
    memset(r, 0, sizeof *r);
    r->t = t;
    r->o = &t->o;
    r->rope = rope;
    r->n = n_positions;
    r->values = (double **)calloc(t->n_tensors, sizeof *r->values);
    for (size_t i = 0; i < t->n_tensors; i++) {
        const tiny_tensor *x = &t->tensors[i], *scale = NULL; /* of F8_E4M3 by blocks, of I8 by rows */
        bool rows_of_scales = strcmp(x->dtype, "I8") == 0;
        char name[220];
        size_t cols = (size_t)(x->rank == 2 ? x->shape[1] : x->shape[0]), n = (size_t)(x->rank == 2 ? x->shape[0] * cols : cols);
        snprintf(name, sizeof name, rows_of_scales ? "%s_scale" : "%s_scale_inv", x->name);
        for (size_t k = 0; k < t->n_tensors; k++)
            if (strcmp(t->tensors[k].name, name) == 0)
                scale = &t->tensors[k];
        r->values[i] = (double *)malloc(n * sizeof(double));
        for (size_t e = 0; e < n; e++)
            r->values[i][e] = decode(x, e) * (!scale           ? 1
                                              : rows_of_scales ? decode(scale, e / cols)
                                                               : decode(scale, e / cols / 128 * (size_t)scale->shape[1] + e % cols / 128));
    }
    r->k = (double *)calloc(rows * (t->o.nope + t->o.rope), sizeof(double));
    r->v = (double *)calloc(rows * t->o.v_dim, sizeof(double));
    r->x = (double *)malloc(5 * most * sizeof(double));
    r->y = r->x + most, r->a = r->y + most, r->b = r->a + most, r->c = r->b + most;
}

static void reference_close(reference *r)
{
    for (size_t i = 0; i < r->t->n_tensors; i++)
        free(r->values[i]);
    free(r->values), free(r->k), free(r->v), free(r->x);
}

static const double *weight(const reference *r, uint32_t layer, const char *name)
{
    char full[200];
    if (layer == UINT32_MAX)
        snprintf(full, sizeof full, "%s", name);
    else
        snprintf(full, sizeof full, "model.layers.%u.%s", (unsigned)layer, name);
    for (size_t i = 0; i < r->t->n_tensors; i++)
        if (strcmp(r->t->tensors[i].name, full) == 0)
            return r->values[i];
    printf("no tensor %s\n", full);
    exit(2);
}

static void linear(double *out, const double *w, const double *in, size_t rows, size_t cols)
{
    for (size_t i = 0; i < rows; i++) {
        double sum = 0;
        for (size_t j = 0; j < cols; j++)
            sum += w[i * cols + j] * in[j];
        out[i] = sum;
    }
}

static void norm(double *out, const double *w, const double *in, size_t n, double eps)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += in[i] * in[i];
    for (size_t i = 0; i < n; i++)
        out[i] = in[i] / sqrt(sum / (double)n + eps) * w[i];
}

static double yarn_mscale(double factor, double m)
{
    return factor <= 1 ? 1 : 0.1 * m * log(factor) + 1;
}

/* Frequencies and angles in f32, as the reference implementations have them; the rest in double. */
static void rotate(const reference *r, double *x, uint32_t position)
{
    const rope_settings *p = &r->rope;
    uint32_t dim = r->o->rope;
    double pi = 3.14159265358979323846, amplitude = 1;
    for (uint32_t i = 0; i < dim / 2; i++) {
        double f = 1 / pow(p->theta, 2.0 * i / dim);
        if (p->factor > 0) {
            double fast = dim * log(p->original / (p->beta_fast * 2 * pi)) / (2 * log(p->theta));
            double slow = dim * log(p->original / (p->beta_slow * 2 * pi)) / (2 * log(p->theta));
            double low = floor(fast) > 0 ? floor(fast) : 0, high = ceil(slow) < dim - 1 ? ceil(slow) : dim - 1;
            double ramp = (i - low) / (low == high ? 0.001 : high - low);
            ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
            if (r->mistake != PLAIN_FREQUENCIES)
                f = f / p->factor * ramp + f * (1 - ramp);
            amplitude = p->mscale != 0 && p->mscale_all_dim != 0 ? yarn_mscale(p->factor, p->mscale) / yarn_mscale(p->factor, p->mscale_all_dim)
                                                                 : yarn_mscale(p->factor, 1);
        }
        float angle = (float)position * (float)f;
        bool halves = r->o->half_split != (r->mistake == OTHER_PAIRS);
        double *a = halves ? x + i : x + 2 * i, *b = halves ? x + i + dim / 2 : x + 2 * i + 1, old = *a;
        *a = amplitude * (old * cos((double)angle) - *b * sin((double)angle));
        *b = amplitude * (old * sin((double)angle) + *b * cos((double)angle));
    }
}

static void attention(reference *r, uint32_t l, uint32_t position, const double *in, double *out)
{
    const tiny_opts *o = r->o;
    size_t dk = o->nope + o->rope, n_q = o->n_heads * dk, dkv = o->nope + o->v_dim;
    double *q = (double *)malloc((n_q + o->q_lora + 2 * (o->kv_lora + o->rope) + o->n_heads * (dkv + o->v_dim) + r->n) * sizeof(double));
    double *latent_q = q + n_q, *kv = latent_q + o->q_lora, *c = kv + o->kv_lora + o->rope, *up = c + o->kv_lora + o->rope;
    double *mixed = up + o->n_heads * dkv, *p = mixed + o->n_heads * o->v_dim;
    double *k = r->k + l * r->n * n_q, *v = r->v + l * r->n * o->n_heads * o->v_dim;
    double m = r->rope.factor > 0 && r->rope.mscale_all_dim != 0 && r->mistake != NO_MSCALE ? yarn_mscale(r->rope.factor, r->rope.mscale_all_dim) : 1;
    double eps = r->mistake == LATENT_EPS ? 1e-5 : 1e-6;
    if (o->q_lora) {
        linear(latent_q, weight(r, l, "self_attn.q_a_proj.weight"), in, o->q_lora, o->dim);
        norm(latent_q, weight(r, l, "self_attn.q_a_layernorm.weight"), latent_q, o->q_lora, eps);
        linear(q, weight(r, l, "self_attn.q_b_proj.weight"), latent_q, n_q, o->q_lora);
    } else {
        linear(q, weight(r, l, "self_attn.q_proj.weight"), in, n_q, o->dim);
    }
    linear(kv, weight(r, l, "self_attn.kv_a_proj_with_mqa.weight"), in, o->kv_lora + o->rope, o->dim);
    norm(c, weight(r, l, "self_attn.kv_a_layernorm.weight"), kv, o->kv_lora, eps);
    rotate(r, kv + o->kv_lora, position);
    linear(up, weight(r, l, "self_attn.kv_b_proj.weight"), c, o->n_heads * dkv, o->kv_lora);
    for (size_t h = 0; h < o->n_heads; h++) {
        bool swapped = r->mistake == VALUES_FIRST;
        memcpy(k + position * n_q + h * dk, up + h * dkv + (swapped ? o->v_dim : 0), o->nope * sizeof(double));
        memcpy(k + position * n_q + h * dk + o->nope, kv + o->kv_lora, o->rope * sizeof(double));
        memcpy(v + (position * o->n_heads + h) * o->v_dim, up + h * dkv + (swapped ? 0 : o->nope), o->v_dim * sizeof(double));
        rotate(r, q + h * dk + o->nope, position);
    }
    for (size_t h = 0; h < o->n_heads; h++) {
        double max = -1e300, sum = 0;
        for (size_t s = 0; s <= position; s++) {
            p[s] = 0;
            for (size_t i = 0; i < dk; i++)
                p[s] += q[h * dk + i] * k[s * n_q + h * dk + i];
            p[s] *= m * m / sqrt((double)dk);
            max = p[s] > max ? p[s] : max;
        }
        for (size_t s = 0; s <= position; s++)
            sum += p[s] = exp(p[s] - max);
        for (size_t j = 0; j < o->v_dim; j++) {
            mixed[h * o->v_dim + j] = 0;
            for (size_t s = 0; s <= position; s++)
                mixed[h * o->v_dim + j] += p[s] / sum * v[(s * o->n_heads + h) * o->v_dim + j];
        }
    }
    linear(out, weight(r, l, "self_attn.o_proj.weight"), mixed, o->dim, o->n_heads * o->v_dim);
    free(q);
}

/* out += factor * MLP(in) */
static void mlp(reference *r, uint32_t l, const char *prefix, size_t width, const double *in, double *out, double factor)
{
    char name[64];
    double *gate = r->a, *up = r->b, *down = r->c;
    snprintf(name, sizeof name, "%sgate_proj.weight", prefix);
    linear(gate, weight(r, l, name), in, width, r->o->dim);
    snprintf(name, sizeof name, "%sup_proj.weight", prefix);
    linear(up, weight(r, l, name), in, width, r->o->dim);
    for (size_t i = 0; i < width; i++)
        gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    snprintf(name, sizeof name, "%sdown_proj.weight", prefix);
    linear(down, weight(r, l, name), gate, r->o->dim, width);
    for (size_t i = 0; i < r->o->dim; i++)
        out[i] += factor * down[i];
}

/* The index of the largest of those not taken, the lowest of equal ones. */
static uint32_t largest(const double *v, const bool *taken, uint32_t n)
{
    uint32_t best = UINT32_MAX;
    for (uint32_t i = 0; i < n; i++)
        if (!taken[i] && (best == UINT32_MAX || v[i] > v[best]))
            best = i;
    return best;
}

static void experts(reference *r, uint32_t l, const double *in, double *out, int32_t *chosen)
{
    const tiny_opts *o = r->o;
    double score[64], choice[64], group[64], sum = 0, max = -1e300;
    bool excluded[64], keep[64];
    uint32_t n = o->n_experts, size = n / o->n_group, count = 0;
    linear(score, weight(r, l, "mlp.gate.weight"), in, n, o->dim);
    for (uint32_t i = 0; i < n; i++)
        max = score[i] > max ? score[i] : max;
    for (uint32_t i = 0; i < n; i++)
        sum += exp(score[i] - max);
    for (uint32_t i = 0; i < n; i++) {
        score[i] = o->softmax ? exp(score[i] - max) / sum : 1 / (1 + exp(-score[i]));
        choice[i] = score[i] + (o->softmax || r->mistake == BIAS_IGNORED ? 0 : weight(r, l, "mlp.gate.e_score_correction_bias")[i]);
        excluded[i] = r->mistake != GROUPS_IGNORED;
        keep[i] = false;
    }
    for (uint32_t g = 0; g < o->n_group; g++) {
        bool taken[64] = {false};
        uint32_t first = largest(choice + g * size, taken, size);
        group[g] = choice[g * size + first];
        taken[first] = true;
        if (!o->softmax)
            group[g] += choice[g * size + largest(choice + g * size, taken, size)];
    }
    bool group_taken[64] = {false};
    for (uint32_t k = 0; k < o->topk_group; k++) {
        uint32_t g = largest(group, group_taken, o->n_group);
        group_taken[g] = true;
        for (uint32_t i = 0; i < size; i++)
            excluded[g * size + i] = false;
    }
    sum = 0;
    for (uint32_t k = 0; k < o->top_k; k++) {
        uint32_t e = largest(choice, excluded, n);
        excluded[e] = keep[e] = true;
        sum += r->mistake == BIAS_IN_WEIGHTS ? choice[e] : score[e];
    }
    for (uint32_t e = 0; e < n; e++) {
        char prefix[40];
        double w = r->mistake == BIAS_IN_WEIGHTS ? choice[e] : score[e];
        if (!keep[e])
            continue;
        chosen[count++] = (int32_t)e;
        if (!o->softmax && r->mistake != NO_NORMALISATION)
            w /= sum + 1e-20;
        if (r->mistake != NO_SCALING)
            w *= (double)o->scaling;
        snprintf(prefix, sizeof prefix, "mlp.experts.%u.", (unsigned)e);
        mlp(r, l, prefix, o->moe_inter, in, out, w);
    }
    if (o->n_shared && r->mistake != NO_SHARED)
        mlp(r, l, "mlp.shared_experts.", (size_t)o->n_shared * o->moe_inter, in, out, 1);
}

/* One token: logits [vocab], chosen experts [n_moe_layers, top_k]. */
static void step(reference *r, int32_t id, uint32_t position, double *logits, int32_t *chosen)
{
    const tiny_opts *o = r->o;
    double *x = r->x, *y = r->y, *add = (double *)malloc(o->dim * sizeof(double));
    memcpy(x, weight(r, UINT32_MAX, "model.embed_tokens.weight") + (size_t)id * o->dim, o->dim * sizeof(double));
    for (uint32_t l = 0; l < o->n_layers; l++) {
        norm(y, weight(r, l, "input_layernorm.weight"), x, o->dim, 1e-5);
        attention(r, l, position, y, add);
        for (size_t i = 0; i < o->dim; i++)
            x[i] += add[i], add[i] = 0;
        norm(y, weight(r, l, "post_attention_layernorm.weight"), x, o->dim, 1e-5);
        if (l < o->n_dense)
            mlp(r, l, "mlp.", o->inter, y, add, 1);
        else
            experts(r, l, y, add, chosen + (l - o->n_dense) * o->top_k);
        for (size_t i = 0; i < o->dim; i++)
            x[i] += add[i];
    }
    norm(y, weight(r, UINT32_MAX, "model.norm.weight"), x, o->dim, 1e-5);
    linear(logits, weight(r, UINT32_MAX, o->tie ? "model.embed_tokens.weight" : "lm_head.weight"), y, o->vocab, o->dim);
    free(add);
}

/* Largest difference of the logits, as a part of the largest logit. Experts are compared where nothing is wrong on purpose. */
static double compare(const tiny *t, rope_settings rope, int mistake, size_t n, const int32_t *ids, const float *logits, const int32_t *chosen)
{
    reference r;
    size_t row = (size_t)(t->o.n_layers - t->o.n_dense) * t->o.top_k;
    double *expected = (double *)malloc(t->o.vocab * sizeof(double)), worst = 0, max = 0;
    int32_t *expected_experts = (int32_t *)malloc((row + 1) * sizeof(int32_t));
    reference_open(&r, t, rope, n);
    r.mistake = mistake;
    for (uint32_t i = 0; i < n; i++) {
        step(&r, ids[i], i, expected, expected_experts);
        for (size_t k = 0; k < t->o.vocab; k++) {
            double d = fabs(expected[k] - (double)logits[i * t->o.vocab + k]);
            worst = d > worst || d != d ? d : worst;
            max = fabs(expected[k]) > max ? fabs(expected[k]) : max;
        }
        if (mistake == RIGHT)
            CHECK_BYTES(chosen + i * row, row * 4, expected_experts, row * 4);
    }
    reference_close(&r);
    free(expected), free(expected_experts);
    return worst / max;
}

typedef struct run_of {
    tiny t;
    size_t n;
    int32_t ids[LONG];
    float *logits;
    int32_t *experts;
    rope_settings rope;
} run_of;

/* Builds, opens, runs. `rope` is written into config.json as well. */
/* What the reference below computes. */
static const dsv3_model_opts *exact(void)
{
    static dsv3_model_opts opts;
    opts.compute = DSV3_COMPUTE_F32;
    return &opts;
}

static bool run(run_of *x, tiny_opts o, rope_settings rope, size_t positions)
{
    dsv3_model *model = NULL;
    dsv3_session *s = NULL;
    dsv3_error e;
    dsv3_outputs out;
    char text[300];
    o.tokenizer = false;
    o.yarn = rope.factor > 0;
    memset(&out, 0, sizeof out);
    tiny_build(&x->t, &o);
    x->rope = rope, x->n = positions;
    snprintf(text, sizeof text, "%.9g", rope.theta);
    tiny_set(&x->t, "config.json", "rope_theta", text);
    if (o.yarn) {
        int n = snprintf(text, sizeof text, "{\"rope_type\": \"yarn\", \"factor\": %.9g, \"original_max_position_embeddings\": %.9g, \"beta_fast\": %.9g, \"beta_slow\": %.9g",
                         rope.factor, rope.original, rope.beta_fast, rope.beta_slow);
        if (rope.mscale != 0 || rope.mscale_all_dim != 0)
            n += snprintf(text + n, sizeof text - (size_t)n, ", \"mscale\": %.9g, \"mscale_all_dim\": %.9g", rope.mscale, rope.mscale_all_dim);
        snprintf(text + n, sizeof text - (size_t)n, "}");
        tiny_set(&x->t, "config.json", "rope_scaling", text);
    }
    tiny_ids(x->ids, x->n, o.vocab, 17);
    x->logits = (float *)malloc(x->n * o.vocab * sizeof(float));
    x->experts = (int32_t *)malloc(x->n * (o.n_layers * o.top_k + 1) * sizeof(int32_t));
    out.logits = x->logits;
    out.experts = o.n_dense < o.n_layers ? x->experts : NULL;
    bool ok = CHECK_OK(tiny_open(&x->t, &model, exact(), &e), e) && CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e) &&
              CHECK_OK(dsv3_session_append(s, x->ids, x->n, &out, &e), e);
    dsv3_session_close(s);
    dsv3_model_close(model);
    return ok;
}

static void release(run_of *x)
{
    free(x->logits), free(x->experts);
    tiny_free(&x->t);
}

static const rope_settings plain = {10000, 0, 0, 0, 0, 0, 0}, yarn = {10000, 4, 64, 32, 1, 1, 1};

static void agrees_at(const char *what, tiny_opts o, rope_settings rope, size_t positions)
{
    run_of x;
    if (run(&x, o, rope, positions)) {
        double d = compare(&x.t, rope, RIGHT, x.n, x.ids, x.logits, x.experts);
        if (!CHECK(d <= TOLERANCE))
            printf("    %s: %.2g of the largest logit\n", what, d);
    }
    release(&x);
}

static void agrees(const char *what, tiny_opts o, rope_settings rope)
{
    agrees_at(what, o, rope, N);
}

TEST(dtypes)
{
    static const dsv3_dtype dtypes[] = {DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_I8, DSV3_DTYPE_BF16, DSV3_DTYPE_F16, DSV3_DTYPE_F32};
    for (int k = 0; k < 4; k++) {
        tiny_opts o = tiny_default();
        o.dtype = dtypes[k];
        o.odd = k % 2 != 0;
        agrees(dsv3_dtype_name(dtypes[k]), o, yarn);
    }
    agrees("blocks", tiny_blocks(), yarn);
}

TEST(families)
{
    tiny_opts o = tiny_v2();
    static const rope_settings lite = {10000, 40, 64, 32, 1, 0.707, 0.707};
    agrees("V2-Lite", o, lite);
    o = tiny_v2();
    o.n_experts = 16, o.n_group = 4, o.topk_group = 2, o.q_lora = 24, o.scaling = 16;
    agrees("V2", o, lite);
    o = tiny_default();
    o.q_lora = 0, o.n_group = 1, o.topk_group = 1;
    agrees("Moonlight", o, plain);
    static const rope_settings kimi = {50000, 32, 64, 1, 1, 1, 1};
    o = tiny_default();
    o.n_group = 1, o.topk_group = 1, o.n_experts = 24, o.top_k = 8, o.dtype = DSV3_DTYPE_BF16;
    agrees("Kimi", o, kimi);
    o = tiny_default();
    o.v_dim = 40, o.tie = true, o.n_shared = 2;
    agrees("wide values, tied", o, yarn);
    o = tiny_default();
    o.half_split = true;
    agrees("half-split", o, yarn);
    o = tiny_default();
    o.n_dense = 3;
    agrees("all dense", o, plain);
    o = tiny_default();
    o.n_dense = 0, o.n_shared = 0, o.mtp = 1, o.n_shards = 3;
    agrees("no dense layer, no shared expert, a prediction layer beside", o, plain);
}

TEST(rope)
{
    static const rope_settings cases[] = {{10000, 4, 64, 32, 1, 1, 0.707}, {10000, 4, 64, 32, 1, 0, 0}, {500, 8, 16, 4, 1, 1, 1}, {10000, 1, 64, 32, 1, 1, 1}, {1e6, 0, 0, 0, 0, 0, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char what[32];
        snprintf(what, sizeof what, "rope %d", (int)i);
        agrees(what, tiny_default(), cases[i]);
    }
}

/* Sums over positions that are made in pieces, each relative to a largest score of its own. */
TEST(many_positions)
{
    tiny_opts o = tiny_default();
    o.max_pos = 1024;
    agrees_at("many positions", o, yarn, LONG);
    o.q_lora = 0, o.n_group = 1, o.topk_group = 1, o.n_heads = 20;
    agrees_at("many positions, 20 heads", o, plain, LONG);
}

/* Each mistake must be seen from far off, or the agreement above would mean little. */
TEST(mistakes_show)
{
    run_of x;
    tiny_opts o = tiny_default();
    o.n_experts = 16;
    if (run(&x, o, yarn, N))
        for (int m = RIGHT + 1; m < LATENT_EPS; m++) {
            double d = compare(&x.t, yarn, m, x.n, x.ids, x.logits, x.experts);
            if (!CHECK(d > 100 * TOLERANCE))
                printf("    mistake %d: only %.2g\n", m, d);
        }
    release(&x);
}

/* The latent norms have an eps of their own: seen where latents are small. */
TEST(latent_eps)
{
    run_of x;
    tiny_opts o = tiny_default();
    o.dtype = DSV3_DTYPE_F32;
    static const char *const names[2] = {"self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"};
    bool ok = run(&x, o, yarn, N);
    for (uint32_t l = 0; l < o.n_layers; l++)
        for (int k = 0; k < 2; k++) {
            char name[100];
            snprintf(name, sizeof name, "model.layers.%u.%s", (unsigned)l, names[k]);
            tiny_tensor *w = tiny_find(&x.t, name);
            for (size_t i = 0; i < 32 * o.dim; i++) {
                float f;
                memcpy(&f, w->data + 4 * i, 4);
                f *= 1e-3f;
                memcpy(w->data + 4 * i, &f, 4);
            }
        }
    tiny_pack(&x.t);
    dsv3_model *model = NULL;
    dsv3_session *s = NULL;
    dsv3_error e;
    dsv3_outputs out;
    memset(&out, 0, sizeof out);
    out.logits = x.logits;
    out.experts = x.experts;
    if (ok && CHECK_OK(tiny_open(&x.t, &model, exact(), &e), e) && CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e) &&
        CHECK_OK(dsv3_session_append(s, x.ids, x.n, &out, &e), e)) {
        double right = compare(&x.t, yarn, RIGHT, x.n, x.ids, x.logits, x.experts), wrong = compare(&x.t, yarn, LATENT_EPS, x.n, x.ids, x.logits, x.experts);
        if (!CHECK(right <= TOLERANCE && wrong > 100 * TOLERANCE))
            printf("    right %.2g, wrong %.2g\n", right, wrong);
    }
    dsv3_session_close(s);
    dsv3_model_close(model);
    release(&x);
}

TEST_MAIN(RUN(dtypes), RUN(families), RUN(rope), RUN(many_positions), RUN(mistakes_show), RUN(latent_eps))
