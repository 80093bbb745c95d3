/* The arithmetic modes of the public products: f32, bf16, fp8, int8, tiles. Values against a plain reading of what each mode
   promises, in double; bits of a row against the same row alone, whatever rows, threads, executor and kernels. Nothing
   private of the header is used. */
#ifdef TEST_EMULATE_AVX512
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "emulate_avx512.h"
#endif
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#ifndef DSV3_NO_THREADS
#include <pthread.h>
#endif
#if defined(__x86_64__) && !defined(_WIN32)
#define HAVE_CSR 1
#include <xmmintrin.h>
#else
#define HAVE_CSR 0
#endif

#define COUNT(a) (sizeof(a) / sizeof(a)[0])

// ---- Modes -----------------------------------------------------------------------------------------------

typedef enum mode { AUTO, F32, BF16, FP8, INT8, TILES } mode;

static const mode modes[] = {AUTO, F32, BF16, FP8, INT8, TILES};
static const char *const mode_names[] = {"auto", "f32", "bf16", "fp8", "int8", "tiles"};

static dsv3_matmul_opts options(dsv3_isa isa, mode m)
{
    dsv3_matmul_opts o;
    memset(&o, 0, sizeof o);
    o.isa = isa;
    static const dsv3_compute values[] = {DSV3_COMPUTE_AUTO, DSV3_COMPUTE_F32,  DSV3_COMPUTE_BF16,
                                          DSV3_COMPUTE_FP8,  DSV3_COMPUTE_INT8, DSV3_COMPUTE_TILES};
    o.compute = values[m];
    return o;
}

#ifdef TEST_EMULATE_AVX512 /* slow; of the others scalar is what all are compared with */
static const dsv3_isa isas[] = {DSV3_ISA_AVX_VNNI, DSV3_ISA_AVX512_VNNI, DSV3_ISA_AVX512_BF16, DSV3_ISA_AVX512_AMX};
#else
static const dsv3_isa isas[] = {DSV3_ISA_SCALAR,      DSV3_ISA_AVX2,        DSV3_ISA_AVX512,     DSV3_ISA_AVX_VNNI,
                                DSV3_ISA_AVX512_VNNI, DSV3_ISA_AVX512_BF16, DSV3_ISA_AVX512_AMX, DSV3_ISA_NEON};
#endif

// ---- Weights ---------------------------------------------------------------------------------------------

typedef enum kind {
    W_F32,
    W_F16,
    W_BF16,
    W_F8,       /* blocks of 128 x 128, as published */
    W_F8_POWER, /* the same with scales of one byte, powers of two */
    W_F8_BARE,  /* no scales */
    W_I8_ROW,   /* a scale for each row: compressed-tensors */
    W_I8_BLOCK, /* blocks of 128 x 128 */
    N_KINDS
} kind;

static const char *const kind_names[] = {"F32", "F16", "BF16", "F8", "F8 E8M0", "F8 bare", "I8 by row", "I8 by block"};

typedef struct weight {
    kind k;
    dsv3_tensor t;
    uint8_t *data;
    float *scale; /* as floats, also where the tensor has bytes */
    uint8_t *scale_bytes;
} weight;

static void *room(size_t size)
{
    void *p = calloc(size ? size : 1, 1);
    return p ? p : (abort(), (void *)0);
}

static float *floats(size_t n)
{
    return (float *)room(n * sizeof(float));
}

static bool is_f8(kind k)
{
    return k == W_F8 || k == W_F8_POWER || k == W_F8_BARE;
}

static bool is_i8(kind k)
{
    return k == W_I8_ROW || k == W_I8_BLOCK;
}

static uint64_t seed;

/* The scale of element [r, c]; 1 where there is none. */
static float scale_at(const weight *w, size_t r, size_t c)
{
    return w->scale ? w->scale[r / w->t.block_rows * w->t.scale_stride + c / w->t.block_cols] : 1.0f;
}

/* I8 by hand: round(value / scale), scale = max / 127, so that codes of 127 occur; a few are then set to -128. */
static void make_i8(weight *w, const float *values, size_t rows, size_t cols)
{
    size_t br = w->k == W_I8_ROW ? 1 : 128, bc = w->k == W_I8_ROW ? cols : 128;
    size_t scale_cols = (cols + bc - 1) / bc, scale_rows = (rows + br - 1) / br;
    memset(&w->t, 0, sizeof w->t);
    w->data = (uint8_t *)room(rows * cols);
    w->scale = floats(scale_rows * scale_cols);
    w->t.data = w->data, w->t.scale = w->scale, w->t.dtype = DSV3_DTYPE_I8, w->t.scale_dtype = DSV3_DTYPE_F32;
    w->t.rank = 2, w->t.shape[0] = rows, w->t.shape[1] = cols, w->t.row_stride = cols;
    w->t.block_rows = (uint32_t)br, w->t.block_cols = (uint32_t)bc, w->t.scale_stride = scale_cols;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            float *s = &w->scale[r / br * scale_cols + c / bc];
            *s = fmaxf(*s, fabsf(values[r * cols + c]) / 127.0f);
        }
    for (size_t i = 0; i < scale_rows * scale_cols; i++)
        w->scale[i] = w->scale[i] > 0 ? w->scale[i] : 1.0f;
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++) {
            int code = (int)lrintf(values[r * cols + c] / scale_at(w, r, c));
            if ((r * cols + c) % 997 == 5)
                code = -128;
            w->data[r * cols + c] = (uint8_t)(code & 0xFF);
        }
}

static weight make_from(kind k, const float *values, size_t rows, size_t cols)
{
    static const dsv3_dtype dtypes[] = {DSV3_DTYPE_F32,     DSV3_DTYPE_F16,     DSV3_DTYPE_BF16,
                                        DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_F8_E4M3};
    weight w;
    dsv3_error e;
    memset(&w, 0, sizeof w);
    w.k = k;
    if (is_i8(k)) {
        make_i8(&w, values, rows, cols);
        return w;
    }
    size_t n_scales = (rows + 127) / 128 * ((cols + 127) / 128), size = rows * cols * dsv3_dtype_size(dtypes[k]);
    w.data = (uint8_t *)room(size);
    w.scale = is_f8(k) ? floats(n_scales) : NULL;
    CHECK_OK(dsv3_quantize(&w.t, w.data, size, w.scale, w.scale ? n_scales : 0, dtypes[k], values, rows, cols, &e), e);
    if (k == W_F8_POWER) { /* codes stay, scales move to the power of two above: still alive */
        w.scale_bytes = (uint8_t *)room(n_scales);
        for (size_t i = 0; i < n_scales; i++) {
            int exponent = (int)ceilf(log2f(w.scale[i]));
            w.scale[i] = ldexpf(1, exponent);
            w.scale_bytes[i] = (uint8_t)(exponent + 127);
        }
        w.t.scale = w.scale_bytes;
        w.t.scale_dtype = DSV3_DTYPE_F8_E8M0;
    } else if (k == W_F8_BARE) {
        free(w.scale);
        w.scale = NULL;
        w.t.scale = NULL, w.t.scale_dtype = DSV3_DTYPE_UNKNOWN, w.t.block_rows = w.t.block_cols = 0,
        w.t.scale_stride = 0;
    }
    return w;
}

static weight make(kind k, size_t rows, size_t cols)
{
    float *values = floats(rows * cols);
    for (size_t i = 0; i < rows * cols; i++) /* rows, and blocks, of different size */
        values[i] =
            (float)tiny_normal(&seed) * (0.02f + 0.01f * (float)(i / cols % 7)) * (1.0f + (float)(i % cols / 128));
    weight w = make_from(k, values, rows, cols);
    free(values);
    return w;
}

static void release(weight *w)
{
    free(w->data);
    free(w->scale);
    free(w->scale_bytes);
}

static void multiply(float *out, const float *in, size_t n, const weight *w, dsv3_isa isa, mode m)
{
    dsv3_matmul_opts o = options(isa, m);
    dsv3_error e;
    CHECK_OK(dsv3_matmul(out, in, n, &w->t, &o, &e), e);
}

/* Are products with this kind of weight offered? I8 may not be, yet. */
static bool offered(kind k)
{
    static int known[N_KINDS]; /* 0: not asked, 1: yes, 2: no */
    if (!is_i8(k))
        return true;
    if (!known[k]) {
        float in[64], out;
        dsv3_matmul_opts o = options(DSV3_ISA_SCALAR, AUTO);
        for (size_t i = 0; i < 64; i++)
            in[i] = 1;
        weight w = make(k, 1, 64);
        known[k] = dsv3_matmul(&out, in, 1, &w.t, &o, NULL) == DSV3_OK ? 1 : 2;
        release(&w);
    }
    return known[k] == 1;
}

// ---- What a mode promises, in double ---------------------------------------------------------------------

/* The mode that a weight of this kind gets when `m` is asked for. */
static mode effective(mode m, kind k)
{
    if (k == W_F32 || k == W_F16)
        return F32;
    if (m == AUTO)
        return is_i8(k) ? INT8 : BF16;
    if (is_i8(k))
        return m == INT8 ? INT8 : F32;
    return m == FP8 && !is_f8(k) ? BF16 : m == INT8 ? BF16 : m;
}

static float to_bf16(float f)
{
    uint32_t bits = tiny_bits(f);
    if (isnan(f))
        return f;
    return tiny_float((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

static float e4m3_value(unsigned code)
{
    unsigned e = code >> 3 & 15, f = code & 7;
    float v = (code & 0x7F) == 0x7F ? NAN : e ? ldexpf((float)(8 + f), (int)e - 10) : ldexpf((float)f, -9);
    return code & 0x80 ? -v : v;
}

/* The nearest value of E4M3, the even code of two as near; beyond 448 it is 448. */
static float e4m3_nearest(float f)
{
    unsigned low = 0, high = 0x7E;
    double mag = fabs((double)f);
    if (isnan(f))
        return f;
    while (low < high) { /* the last code whose lower midpoint is not above mag */
        unsigned mid = (low + high + 1) / 2;
        double border = ((double)e4m3_value(mid - 1) + (double)e4m3_value(mid)) / 2;
        if (mag > border || (mag == border && mid % 2 == 0))
            low = mid;
        else
            high = mid - 1;
    }
    return f < 0 ? -e4m3_value(low) : e4m3_value(low);
}

static double stored(const weight *w, size_t r, size_t c) /* without its scale */
{
    size_t i = r * (size_t)w->t.shape[1] + c;
    uint16_t half;
    float f;
    switch (w->k) {
    case W_F32: memcpy(&f, w->data + 4 * i, 4); return (double)f;
    case W_F16: memcpy(&half, w->data + 2 * i, 2); return tiny_f16_value(half);
    case W_BF16: memcpy(&half, w->data + 2 * i, 2); return (double)tiny_float((uint32_t)half << 16);
    case W_I8_ROW:
    case W_I8_BLOCK: return (double)(int8_t)w->data[i];
    default: return (double)e4m3_value(w->data[i]);
    }
}

/* x [cols] as the mode sees it: values [cols]; of int8 codes, and in s [cols] their scales (1 elsewhere). */
static void activations(float *values, float *s, const float *x, size_t cols, mode m, kind k)
{
    size_t group = m == FP8 || k == W_I8_BLOCK ? 128 : cols;
    for (size_t c = 0; c < cols; c++)
        values[c] = x[c], s[c] = 1;
    if (m != FP8 && m != INT8)
        return;
    for (size_t c0 = 0; c0 < cols; c0 += group) {
        size_t c1 = cols - c0 < group ? cols : c0 + group;
        float top = 0;
        for (size_t c = c0; c < c1; c++)
            top = fmaxf(top, fabsf(x[c]));
        /* DeepSeek, inference/kernel.py: at least 1e-4. A row of zeros in int8 gives zeros. */
        float step = m == FP8 ? fmaxf(top, 1e-4f) / 448.0f : top / 127.0f;
        for (size_t c = c0; c < c1; c++) {
            if (m == FP8) {
                volatile float quotient = x[c] / step;
                values[c] = step * e4m3_nearest(quotient);
            } else {
                volatile float quotient = step > 0 ? x[c] / step : 0;
                values[c] = fmaxf(-127.0f, fminf(127.0f, rintf(quotient)));
                s[c] = step;
            }
        }
    }
}

/* out, size [rows]: the product of one row x and the sum of its magnitudes. */
static void promised(double *out, double *size, const float *x, const weight *w, mode asked)
{
    size_t rows = (size_t)w->t.shape[0], cols = (size_t)w->t.shape[1];
    mode m = effective(asked, w->k);
    float *values = floats(cols), *s = floats(cols);
    activations(values, s, x, cols, m, w->k);
    for (size_t r = 0; r < rows; r++) {
        out[r] = size[r] = 0;
        for (size_t c = 0; c < cols; c++) {
            double product;
            float scale = scale_at(w, r, c);
            if (m == BF16) {
                volatile float scaled = x[c] * scale;
                product = stored(w, r, c) * (double)to_bf16(scaled);
            } else if (m == TILES) {
                const double half = to_bf16(x[c]);
                product = fabs(half) < ldexp(1, -50) ? 0 : stored(w, r, c) * (double)scale * half;
            } else if (m == INT8) {
                product = stored(w, r, c) * (double)values[c] * (double)s[c] * (double)scale;
            } else {
                volatile float value = (float)stored(w, r, c) * scale;
                product = (double)value * (double)values[c];
            }
            out[r] += product;
            size[r] += fabs(product);
        }
    }
    free(values), free(s);
}

/* The one level that takes denormals as 0, in products of bf16: those of a row of x too, times a weight of up to 448. */
static bool flushes(dsv3_isa isa)
{
    return isa == DSV3_ISA_AVX512_BF16;
}

/* At most a rounding for each 32 columns and some; flushed denormals are allowed for: activations' where they were rounded
   to bf16 (times a weight of up to 448), all of products on one level. In tiles each group adds two roundings more. */
static double allowed(size_t cols, double size, dsv3_isa isa, mode m)
{
    const bool some = flushes(isa) || m != F32;
    return ((double)cols / (m == TILES ? 24 : 32) + 16) * ldexp(1, -24) * size +
           (double)cols * ldexp(1, some ? -116 : -125);
}

/* n rows of `in`, each against what is promised; says where it first parts. */
static void check_values(const weight *w, const float *in, size_t n, dsv3_isa isa, mode m)
{
    size_t rows = (size_t)w->t.shape[0], cols = (size_t)w->t.shape[1], wrong = 0;
    float *out = floats(n * rows);
    double *expected = (double *)room(rows * sizeof(double)), *size = (double *)room(rows * sizeof(double));
    multiply(out, in, n, w, isa, m);
    for (size_t j = 0; j < n; j++) {
        promised(expected, size, in + j * cols, w, m);
        for (size_t r = 0; r < rows; r++)
            if (!(fabs((double)out[j * rows + r] - expected[r]) <= allowed(cols, size[r], isa, m)) && wrong++ == 0)
                printf("    %s, %s, %s [%u, %u], x %u, row %u: expected %.9g, found %.9g, allowed %.1e\n",
                       mode_names[m], kind_names[w->k], dsv3_isa_name(isa), (unsigned)rows, (unsigned)cols, (unsigned)j,
                       (unsigned)r, expected[r], (double)out[j * rows + r], allowed(cols, size[r], isa, m));
    }
    CHECK_EQ_UINT(wrong, 0);
    free(out), free(expected), free(size);
}

// ---- Activations -----------------------------------------------------------------------------------------

enum { PLAIN, ZERO, OUTLIER, HUGE_ALL, DENORMAL, SOME_DENORMAL, SMALL, HALF_ZERO, N_NATURES };

static void draw_row(float *x, size_t cols, int nature)
{
    for (size_t c = 0; c < cols; c++) {
        double v = tiny_normal(&seed);
        switch (nature) {
        case ZERO: v = 0; break;
        case HUGE_ALL: v *= 1e30; break;
        case DENORMAL: v *= 1e-40; break;
        case SOME_DENORMAL: v *= c % 3 ? 1 : 1e-41; break;
        case SMALL: v *= 3e-6; break; /* below the least scale of fp8 */
        case HALF_ZERO: v *= c < cols / 2 ? 0 : 1; break;
        default: break;
        }
        x[c] = (float)v;
    }
    if (nature == OUTLIER)
        x[cols * 2 / 3] = -1e30f;
}

/* Every nature comes up in n >= 8 rows. */
static float *draw_rows(size_t n, size_t cols)
{
    float *x = floats(n * cols);
    for (size_t j = 0; j < n; j++)
        draw_row(x + j * cols, cols, j < N_NATURES ? (int)j : j % 11 == 10 ? (int)(j % N_NATURES) : PLAIN);
    return x;
}

static bool same_bits(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof(float)) == 0;
}

// ---- Values ----------------------------------------------------------------------------------------------

/* Every mode, kind and kernel, widths and heights on both sides of vectors, tiles and blocks, against the promise. */
TEST(values)
{
    static const size_t shapes[][2] = {{1, 1},    {3, 17},    {4, 64},    {5, 65},   {33, 130},
                                       {70, 200}, {131, 576}, {37, 1408}, {20, 2048}};
    seed = 41;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k) ||
            k == W_F8_POWER) /* whether powers of two bind the activations too is the checkpoint's to say */
            continue;
        for (size_t i = 0; i < COUNT(shapes); i++) {
            weight w = make(k, shapes[i][0], shapes[i][1]);
            float *in = draw_rows(9, shapes[i][1]);
            for (size_t s = 0; s < COUNT(isas); s++)
                for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[s]); m++) {
                    check_values(&w, in, 9, isas[s], modes[m]);
                    check_values(&w, in, 1, isas[s], modes[m]);
                }
            release(&w);
            free(in);
        }
    }
}

/* Modes round differently, or this file would test nothing; where a mode falls back on another the bits are that one's. */
TEST(modes_that_differ)
{
    enum { ROWS = 70, COLS = 700, N = 5 };
    seed = 42;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k))
            continue;
        weight w = make(k, ROWS, COLS);
        float *in = floats(N * COLS), *a = floats(N * ROWS), *b = floats(N * ROWS);
        for (size_t j = 0; j < N; j++)
            draw_row(in + j * COLS, COLS, PLAIN);
        for (size_t m = 0; m < COUNT(modes); m++)
            for (size_t o = 0; o < COUNT(modes); o++) {
                multiply(a, in, N, &w, DSV3_ISA_AUTO, modes[m]);
                multiply(b, in, N, &w, DSV3_ISA_AUTO, modes[o]);
                bool alike = effective(modes[m], k) == effective(modes[o], k);
                if (!CHECK(same_bits(a, b, N * ROWS) == alike))
                    printf("    %s: %s and %s\n", kind_names[k], mode_names[modes[m]], mode_names[modes[o]]);
            }
        release(&w);
        free(in), free(a), free(b);
    }
}

/* Activations that lie exactly between two codes go to the even one; and in fp8 the quotient x / s decides, as published,
   not x * (1 / s). */
TEST(borders_between_codes)
{
    enum { ROWS = 40, COLS = 128, N = 4 };
    seed = 50;
    float *in = floats(N * COLS);
    for (size_t c = 0; c < COLS; c++) {
        in[c] = c ? ((float)c - 64) + 0.5f : 127.0f; /* int8, s = 1 */
        unsigned code = (unsigned)(c % 125 + 1);
        in[COLS + c] = c ? (e4m3_value(code) + e4m3_value(code + 1)) / 2 : 448.0f; /* fp8, s = 1 */
        in[2 * COLS + c] = tiny_float(
            0x3F808000u + ((uint32_t)(tiny_next(&seed) % 200) << 16)); /* bf16, where scales are powers of two */
    }
    float *x = in + 3 * COLS, top = 1.7f, s = 0;
    unsigned found = 0;
    for (unsigned tries = 0; tries < 100000 && found < 20;
         tries++) { /* a scale whose quotient and product differ often */
        top = 1 + (float)(tiny_next(&seed) % 1000000) / 1e6f;
        s = top / 448.0f;
        found = 0;
        for (unsigned code = 1; code < 120; code++) {
            float border = (e4m3_value(code) + e4m3_value(code + 1)) / 2 * s;
            for (int step = -1; step <= 1; step++) {
                volatile float at = tiny_float((uint32_t)((int)tiny_bits(border) + step)), quotient = at / s,
                               inverse = 1 / s, product = at * inverse;
                if (e4m3_nearest(quotient) != e4m3_nearest(product) && found < COLS - 1)
                    x[++found] = at;
            }
        }
    }
    CHECK(found >= 20);
    x[0] = top;
    for (size_t c = found + 1; c < COLS; c++)
        x[c] = 0;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k) || k == W_F8_POWER)
            continue;
        weight w = make(k, ROWS, COLS);
        for (size_t i = 0; w.scale && i < (k == W_I8_ROW ? (size_t)ROWS : 1); i++)
            w.scale[i] = 0.25f;
        for (size_t i = 0; i < COUNT(isas); i++)
            for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[i]); m++) {
                check_values(&w, in, N, isas[i], modes[m]);
                check_values(&w, in, 1, isas[i], modes[m]);
            }
        release(&w);
    }
    free(in);
}

// ---- Same bits -------------------------------------------------------------------------------------------

#ifndef DSV3_NO_THREADS
/* Host threads, one for each task, with a floating-point state of their own that must survive. */
typedef struct job {
    void (*task)(void *ctx, uint32_t i);
    void *ctx;
    uint32_t i, state, left;
} job;

static void *run_job(void *arg)
{
    job *j = (job *)arg;
#if HAVE_CSR
    if (j->state)
        _mm_setcsr(j->state);
#endif
    j->task(j->ctx, j->i);
#if HAVE_CSR
    j->left = _mm_getcsr();
#endif
    return NULL;
}

typedef struct crew {
    uint32_t state; /* MXCSR of the threads; 0: as they come */
    uint32_t runs, changed;
} crew;

static void run_at_once(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx)
{
    crew *c = (crew *)user;
    pthread_t thread[16];
    job jobs[16];
    bool started[16];
    c->runs++;
    for (uint32_t i = 0; i < n; i++) {
        jobs[i].task = task, jobs[i].ctx = ctx, jobs[i].i = i, jobs[i].state = c->state, jobs[i].left = 0;
        started[i] = pthread_create(&thread[i], NULL, run_job, &jobs[i]) == 0;
        if (!started[i])
            task(ctx, i);
    }
    for (uint32_t i = 0; i < n; i++)
        if (started[i]) {
            pthread_join(thread[i], NULL);
            c->changed += c->state && (jobs[i].left & 0xFFC0) != (c->state & 0xFFC0);
        }
}
#endif

static const size_t counts[] = {1, 2, 3, 4, 5, 7, 48, 512};

static bool has_denormals(const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (x[i] != 0 && fabsf(x[i]) < ldexpf(1, -126))
            return true;
    return false;
}

/* A row alone decides: among any others, on any kernels. The level that flushes is the last of the list. */
TEST(rows_alone)
{
    static const size_t shapes[][2] = {{70, 200}, {131, 700}, {3, 2100}};
    enum { N = 512 };
    seed = 43;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1))
        for (size_t i = 0; i < COUNT(shapes) && offered(k); i++) {
            if (TEST_SANITIZED && i == 1)
                continue;
            size_t rows = shapes[i][0], cols = shapes[i][1], n_alone = i || TEST_SANITIZED ? 96 : N;
            weight w = make(k, rows, cols);
            float *in = draw_rows(N, cols), *alone = floats(N * rows), *out = floats(N * rows + 1);
            for (size_t m = 0; m < COUNT(modes); m++) {
                for (size_t j = 0; j < n_alone; j++)
                    multiply(alone + j * rows, in + j * cols, 1, &w, DSV3_ISA_SCALAR, modes[m]);
                for (size_t s = 0; s < COUNT(isas); s++) {
                    for (size_t j = 0; j < n_alone && flushes(isas[s]) && dsv3_isa_supported(isas[s]); j++)
                        if (has_denormals(in + j * cols,
                                          cols)) /* its own bits, then, but still alone as among others */
                            multiply(alone + j * rows, in + j * cols, 1, &w, isas[s], modes[m]);
                    for (size_t c = 0; c < COUNT(counts) && dsv3_isa_supported(isas[s]); c++) {
                        size_t n = counts[c], first = c % 2 ? n_alone - n : 0; /* from either end */
                        if (n > n_alone)
                            continue; /* once will do */
                        memset(out, 0x55, (n * rows + 1) * sizeof(float));
                        multiply(out, in + first * cols, n, &w, isas[s], modes[m]);
                        if (!CHECK(same_bits(out, alone + first * rows, n * rows)))
                            printf("    %s, %s, %s [%u, %u], %u rows\n", mode_names[modes[m]], kind_names[k],
                                   dsv3_isa_name(isas[s]), (unsigned)rows, (unsigned)cols, (unsigned)n);
                        CHECK_EQ_UINT(tiny_bits(out[n * rows]), 0x55555555); /* nothing behind */
                    }
                }
            }
            release(&w);
            free(in), free(alone), free(out);
        }
}

/* An executor of 1 to 8 threads: the bits of none. */
TEST(threads)
{
#ifndef DSV3_NO_THREADS
    enum { ROWS = 700, COLS = 300, N = 48 };
    static const size_t few[] = {1, 5, 48};
    seed = 44;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k))
            continue;
        weight w = make(k, ROWS, COLS);
        float *in = draw_rows(N, COLS), *expected = floats(N * ROWS), *out = floats(N * ROWS);
        for (size_t m = 0; m < COUNT(modes); m++) {
            multiply(expected, in, N, &w, DSV3_ISA_AUTO, modes[m]);
            for (uint32_t n_threads = 1; n_threads <= 8; n_threads++)
                for (size_t c = 0; c < COUNT(few); c++) {
                    crew crew_now = {0, 0, 0};
                    dsv3_matmul_opts o = options(DSV3_ISA_AUTO, modes[m]);
                    dsv3_error e;
                    o.executor.run_fn = run_at_once;
                    o.executor.n_threads = n_threads;
                    o.executor.user = &crew_now;
                    memset(out, 0x55, N * ROWS * sizeof(float));
                    CHECK_OK(dsv3_matmul(out, in, few[c], &w.t, &o, &e), e);
                    if (!CHECK(same_bits(out, expected, few[c] * ROWS)))
                        printf("    %s, %s, %u threads, %u rows\n", mode_names[modes[m]], kind_names[k],
                               (unsigned)n_threads, (unsigned)few[c]);
                    CHECK(crew_now.runs > 0);
                }
        }
        release(&w);
        free(in), free(expected), free(out);
    }
#else
    SKIP("needs POSIX threads");
#endif
}

// ---- Codes -----------------------------------------------------------------------------------------------

/* Each of the 254 codes that are numbers, at every place of 64 and of 128 columns (and behind 128), alone among zeros of
   both signs: the product with x = 448, which every mode holds exactly, is 448 times the code. */
static void check_codes(dsv3_isa isa, mode m, size_t cols, size_t n)
{
    enum { CODES = 254 };
    float *in = floats(n * cols), *out = floats(n * CODES);
    float scale[2] = {0.25f, 0.25f};
    uint8_t *data = (uint8_t *)room(CODES * cols);
    dsv3_matmul_opts o = options(isa, m);
    dsv3_tensor t;
    dsv3_error e;
    size_t wrong = 0;
    memset(&t, 0, sizeof t);
    t.data = data, t.scale = scale, t.dtype = DSV3_DTYPE_F8_E4M3, t.scale_dtype = DSV3_DTYPE_F32, t.rank = 2;
    t.shape[0] = CODES, t.shape[1] = cols, t.row_stride = cols;
    t.block_rows = 1024, t.block_cols = 128, t.scale_stride = (cols + 127) / 128;
    for (size_t place = 0; place < cols; place++) {
        for (size_t j = 0; j < n; j++)
            for (size_t c = 0; c < cols; c++)
                in[j * cols + c] = c == place ? (j % 2 ? -448.0f : 448.0f) : (float)((int)(tiny_next(&seed) % 31) - 15);
        for (unsigned i = 0; i < CODES; i++) {
            memset(data + i * cols, i % 3 ? 0x00 : 0x80, cols);
            data[i * cols + place] = (uint8_t)(i < 127 ? i : i + 1);
        }
        CHECK_OK(dsv3_matmul(out, in, n, &t, &o, &e), e);
        for (size_t j = 0; j < n; j++)
            for (unsigned i = 0; i < CODES; i++) {
                float expected = e4m3_value(i < 127 ? i : i + 1) * (j % 2 ? -112.0f : 112.0f);
                if (out[j * CODES + i] != expected && wrong++ == 0)
                    printf("    %s, %s, %u columns, %u rows, code 0x%02X at %u: expected %g, found %g\n", mode_names[m],
                           dsv3_isa_name(isa), (unsigned)cols, (unsigned)n, i < 127 ? i : i + 1, (unsigned)place,
                           (double)expected, (double)out[j * CODES + i]);
            }
    }
    CHECK_EQ_UINT(wrong, 0);
    free(in), free(out), free(data);
}

TEST(every_code_at_every_place)
{
    seed = 45;
    for (size_t s = 0; s < COUNT(isas); s++)
        for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[s]); m++)
            for (size_t n = 1; n <= 7; n += 6) {
                check_codes(isas[s], modes[m], 64, n);
                check_codes(isas[s], modes[m], 128, n);
                check_codes(isas[s], modes[m], 150, n);
            }
}

/* A code that is NaN spoils its row and no other: at every place of 64, in full and ragged blocks, for one row and many. */
TEST(nan_codes)
{
    enum { ROWS = 37, N = 9 };
    static const size_t widths[] = {64, 128, 200, 333};
    seed = 46;
    for (size_t i = 0; i < COUNT(widths); i++) {
        size_t cols = widths[i];
        weight w = make(W_F8, ROWS, cols);
        float *in = floats(N * cols), *before = floats(N * ROWS), *out = floats(N * ROWS);
        for (size_t j = 0; j < N; j++)
            draw_row(in + j * cols, cols, j == 1 ? ZERO : j == 2 ? HALF_ZERO : PLAIN);
        for (size_t s = 0; s < COUNT(isas); s++)
            for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[s]); m++) {
                multiply(before, in, N, &w, isas[s], modes[m]);
                for (size_t place = 0; place<cols; place += cols> 128 ? 3 : 1) {
                    size_t bad = place % ROWS, n = place % 2 ? N : 1, wrong = 0;
                    uint8_t *code = &w.data[bad * cols + place], kept = *code;
                    *code = place % 4 < 2 ? 0xFF : 0x7F;
                    multiply(out, in, n, &w, isas[s], modes[m]);
                    *code = kept;
                    for (size_t j = 0; j < n; j++)
                        for (size_t r = 0; r < ROWS; r++)
                            wrong += (r == bad ? isnan(out[j * ROWS + r]) != 0
                                               : same_bits(&out[j * ROWS + r], &before[j * ROWS + r], 1))
                                         ? 0
                                         : 1;
                    if (!CHECK_EQ_UINT(wrong, 0))
                        printf("    %s, %s, %u columns, at %u, %u rows\n", mode_names[modes[m]], dsv3_isa_name(isas[s]),
                               (unsigned)cols, (unsigned)place, (unsigned)n);
                }
            }
        release(&w);
        free(in), free(before), free(out);
    }
}

// ---- Extreme activations ---------------------------------------------------------------------------------

/* Zeros give +0. Rows that are not finite never give a number that looks sound: NaN in, NaN out. */
TEST(zeros_and_worse)
{
    enum { ROWS = 70, COLS = 333, N = 6 };
    seed = 47;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k))
            continue;
        weight w = make(k, ROWS, COLS);
        float *in = floats(N * COLS), *before = floats(N * ROWS), *out = floats(N * ROWS);
        for (size_t j = 0; j < N; j++)
            draw_row(in + j * COLS, COLS, j == 0 ? ZERO : PLAIN);
        for (size_t c = 0; c < COLS; c += 2)
            in[c] = -0.0f;
        for (size_t r = 0; r < ROWS; r++) /* a weight of zero would make NaN of infinity */
            if (is_f8(k) && !(w.data[r * COLS + 131] & 0x7F))
                w.data[r * COLS + 131] = 0x10;
        for (size_t s = 0; s < COUNT(isas); s++)
            for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[s]); m++) {
                size_t wrong = 0;
                multiply(before, in, N, &w, isas[s], modes[m]);
                in[2 * COLS + 131] = NAN;
                in[4 * COLS + 131] = -INFINITY;
                multiply(out, in, N, &w, isas[s], modes[m]);
                in[2 * COLS + 131] = in[4 * COLS + 131] = 1;
                for (size_t j = 0; j < N; j++)
                    for (size_t r = 0; r < ROWS; r++) {
                        float f = out[j * ROWS + r];
                        if (j == 0)
                            wrong += tiny_bits(f) != 0;
                        else if (j == 2)
                            wrong += isnan(f) ? 0 : 1;
                        else if (j == 4)
                            wrong += isfinite(f) != 0;
                        else
                            wrong += !same_bits(&f, &before[j * ROWS + r], 1);
                    }
                if (!CHECK_EQ_UINT(wrong, 0))
                    printf("    %s, %s, %s\n", mode_names[modes[m]], kind_names[k], dsv3_isa_name(isas[s]));
            }
        release(&w);
        free(in), free(before), free(out);
    }
}

/* Rows times a power of two: the result's bits times that power, as long as nothing leaves the range of normal floats (in
   fp8 also: as long as the least scale of a group does not bind). Rounding, scales and codes do not depend on size. */
TEST(powers_of_two)
{
    enum { ROWS = 40, COLS = 300, N = 6 };
    static const int powers[] = {-60, -9, 1, 40, 90};
    seed = 48;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k))
            continue;
        weight w = make(k, ROWS, COLS);
        float *in = floats(N * COLS), *moved = floats(N * COLS), *plain = floats(N * ROWS), *out = floats(N * ROWS);
        for (size_t j = 0; j < N; j++)
            draw_row(in + j * COLS, COLS, PLAIN);
        for (size_t i = 0; i < N * COLS; i++)
            in[i] = copysignf(fmaxf(fabsf(in[i]), 0.001f), in[i]); /* no product of 2^-60 is a denormal */
        for (size_t s = 0; s < COUNT(isas); s++)
            for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[s]); m++) {
                multiply(plain, in, N, &w, isas[s], modes[m]);
                for (size_t p = 0; p < COUNT(powers); p++) {
                    if (powers[p] < 0 && effective(modes[m], k) == FP8)
                        continue;
                    if (powers[p] < -40 && effective(modes[m], k) == TILES)
                        continue; /* 0 */
                    for (size_t i = 0; i < N * COLS; i++)
                        moved[i] = ldexpf(in[i], powers[p]);
                    multiply(out, moved, N, &w, isas[s], modes[m]);
                    for (size_t i = 0; i < N * ROWS; i++)
                        out[i] = ldexpf(out[i], -powers[p]);
                    if (!CHECK(same_bits(out, plain, N * ROWS)))
                        printf("    %s, %s, %s, 2^%d\n", mode_names[modes[m]], kind_names[k], dsv3_isa_name(isas[s]),
                               powers[p]);
                }
            }
        release(&w);
        free(in), free(moved), free(plain), free(out);
    }
}

/* Integer sums at their largest: 65,536 columns of +-127 (and -128) give the exact sum, rounded once to f32. Twice as many
   still fit 32 bits; they may be refused, not be wrong. */
TEST(longest_int8_sums)
{
    enum { ROWS = 6, N = 5 };
    if (!offered(W_I8_ROW))
        SKIP("no arithmetic for I8 yet");
    for (size_t cols = 65536; cols <= 131072; cols *= 2) {
        float *in = floats(N * cols), *out = floats(N * ROWS), scale[ROWS];
        uint8_t *data = (uint8_t *)room(ROWS * cols);
        static const int codes[ROWS][2] = {{127, 127}, {-127, -127}, {-128, -128}, {127, -128}, {1, 0}, {-128, 127}};
        static const int x[N][2] = {{127, 127}, {-127, -127}, {127, -127}, {127, 1}, {-127, 126}};
        dsv3_tensor t;
        dsv3_error e;
        memset(&t, 0, sizeof t);
        t.data = data, t.scale = scale, t.dtype = DSV3_DTYPE_I8, t.scale_dtype = DSV3_DTYPE_F32, t.rank = 2;
        t.shape[0] = ROWS, t.shape[1] = cols, t.row_stride = cols;
        t.block_rows = 1, t.block_cols = (uint32_t)cols, t.scale_stride = 1;
        for (size_t c = 0; c < cols; c++) {
            for (size_t r = 0; r < ROWS; r++)
                data[r * cols + c] = (uint8_t)(codes[r][c % 2] & 0xFF);
            for (size_t j = 0; j < N; j++)
                in[j * cols + c] = (float)x[j][c % 2];
        }
        for (size_t r = 0; r < ROWS; r++)
            scale[r] = 0.5f;
        for (size_t s = 0; s < COUNT(isas); s++) {
            if (!dsv3_isa_supported(isas[s]))
                continue;
            for (size_t n = 1; n <= N; n += 4) {
                dsv3_matmul_opts o = options(isas[s], INT8);
                dsv3_result result = dsv3_matmul(out, in, n, &t, &o, &e);
                if (result && cols > 65536)
                    continue;
                CHECK_OK(result, e);
                for (size_t j = 0; j < n; j++)
                    for (size_t r = 0; r < ROWS; r++) {
                        long long pair = (long long)codes[r][0] * x[j][0] + (long long)codes[r][1] * x[j][1];
                        CHECK_EQ_INT(out[j * ROWS + r], (float)(pair * (long long)(cols / 2)) * 0.5f);
                    }
            }
        }
        free(in), free(out), free(data);
    }
}

// ---- The host's floating-point state ---------------------------------------------------------------------

/* Flushed denormals, denormals as zeros, another rounding, flags raised: the same bits, and the host's state stays. */
TEST(floating_point_state)
{
#if HAVE_CSR
    enum { ROWS = 600, COLS = 130, N = 9 };
    static const uint32_t states[] = {0x1F80 | 0x8040, 0x1F80 | 0x6000, 0x1F80 | 0x8040 | 0x2000, 0x1F80 | 0x4000};
    const uint32_t mine = _mm_getcsr();
    seed = 49;
    for (kind k = (kind)0; k < N_KINDS; k = (kind)(k + 1)) {
        if (!offered(k))
            continue;
        weight w = make(k, ROWS, COLS);
        float *in = draw_rows(N, COLS), *expected = floats(N * ROWS), *out = floats(N * ROWS);
        for (size_t i = 0; i < ROWS * COLS && is_f8(k); i += 3)
            w.data[i] &= 0x87; /* denormal codes */
        for (size_t s = 0; s < COUNT(isas); s++)
            for (size_t m = 0; m < COUNT(modes) && dsv3_isa_supported(isas[s]); m++) {
                dsv3_matmul_opts o = options(isas[s], modes[m]);
                dsv3_error e;
                multiply(expected, in, N, &w, isas[s], modes[m]);
                for (size_t i = 0; i < COUNT(states); i++) {
                    size_t n = i % 2 ? 1 : N;
                    _mm_setcsr(states[i]);
                    dsv3_result result = dsv3_matmul(out, in, n, &w.t, &o, &e);
                    uint32_t left = _mm_getcsr();
                    _mm_setcsr(mine);
                    CHECK_OK(result, e);
                    CHECK_EQ_UINT(left & 0xFFC0, states[i]);
                    if (!CHECK(same_bits(out, expected, n * ROWS)))
                        printf("    %s, %s, %s, state 0x%X\n", mode_names[modes[m]], kind_names[k],
                               dsv3_isa_name(isas[s]), (unsigned)states[i]);
#ifndef DSV3_NO_THREADS
                    crew crew_now = {0, 0, 0}; /* and on threads that the host brings */
                    crew_now.state = states[i];
                    o.executor.run_fn = run_at_once;
                    o.executor.n_threads = 3;
                    o.executor.user = &crew_now;
                    CHECK_OK(dsv3_matmul(out, in, n, &w.t, &o, &e), e);
                    CHECK(same_bits(out, expected, n * ROWS));
                    CHECK(crew_now.runs > 0 || n == 1); /* one row may be too little to share */
                    CHECK_EQ_UINT(crew_now.changed, 0);
                    memset(&o.executor, 0, sizeof o.executor);
#endif
                }
            }
        release(&w);
        free(in), free(expected), free(out);
    }
#else
    SKIP("x86-64 only");
#endif
}

// ---- Models ----------------------------------------------------------------------------------------------

static bool open_in(tiny *t, dsv3_isa isa, mode m, const dsv3_session_opts *so, dsv3_model **model, dsv3_session **session)
{
    dsv3_model_opts mo;
    dsv3_error e;
    memset(&mo, 0, sizeof mo);
    mo.isa = isa;
    mo.compute = options(isa, m).compute;
    return CHECK_OK(tiny_open(t, model, &mo, &e), e) && CHECK_OK(dsv3_session_open(session, *model, so, &e), e);
}

/* Logits [n, vocab] of one run, in appends of `step` tokens; of n runs of one token each, if step is 0. */
static bool run_model(tiny *t, float *logits, const int32_t *ids, size_t n, size_t step, uint32_t n_threads,
                      dsv3_isa isa, mode m)
{
    dsv3_model *model = NULL;
    dsv3_session *session = NULL;
    dsv3_session_opts so;
    dsv3_error e;
    memset(&so, 0, sizeof so);
    so.max_tokens = (uint32_t)n, so.n_threads = n_threads;
    so.cache_latent = step ? DSV3_CACHE_AUTO : DSV3_CACHE_BF16;
    bool ok = open_in(t, isa, m, &so, &model, &session);
    for (size_t at = 0, alone = !step; ok && at < n; at += step) {
        dsv3_outputs out;
        if (alone)
            step = 1, ok = CHECK_OK(dsv3_session_rewind(session, 0, &e), e);
        memset(&out, 0, sizeof out);
        out.logits = logits + at * dsv3_model_config(model)->vocab_size;
        ok = CHECK_OK(dsv3_session_append(session, ids + at, n - at < step ? n - at : step, &out, &e), e);
    }
    dsv3_session_close(session);
    dsv3_model_close(model);
    return ok;
}

/* One token at a time on one thread, or in any pieces on any threads and kernels: the same logits, in every mode. */
TEST(logits_of_a_model)
{
    enum { N = 60 };
    static const dsv3_dtype dtypes[] = {DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_BF16, DSV3_DTYPE_F16, DSV3_DTYPE_F32};
    static const size_t steps[] = {2, 3, 4, 5, 7, 48, N};
    int32_t ids[N];
    for (size_t d = 0; d < (TEST_SANITIZED ? 1 : COUNT(dtypes)); d++) {
        tiny t;
        tiny_opts o = d || TEST_SANITIZED ? tiny_default() : tiny_blocks();
        o.dtype = dtypes[d];
        tiny_build(&t, &o);
        tiny_ids(ids, N, o.vocab, 7);
        float *alone = floats(N * o.vocab), *out = floats(N * o.vocab), *in_f32 = floats(N * o.vocab);
        REQUIRE(run_model(&t, in_f32, ids, N, N, 1, DSV3_ISA_AUTO, F32));
        for (size_t m = 0; m < COUNT(modes); m++) {
            REQUIRE(run_model(&t, alone, ids, N, 1, 1, DSV3_ISA_AUTO, modes[m]));
            bool exact = modes[m] == F32; /* elsewhere attention rounds to bf16, if nothing else does */
            CHECK(same_bits(alone, in_f32, N * o.vocab) == exact);
            for (size_t s = 0; s < COUNT(isas); s++)
                for (size_t i = 0; i < COUNT(steps) && dsv3_isa_supported(isas[s]); i++) {
                    if ((isas[s] == DSV3_ISA_SCALAR || exact || TEST_SANITIZED) && steps[i] != 5 && steps[i] != N)
                        continue; /* slow; or seen in test_session.c */
                    uint32_t n_threads = (uint32_t)(1 + (i + 3 * s) % 8);
                    REQUIRE(run_model(&t, out, ids, N, steps[i], n_threads, isas[s], modes[m]));
                    if (!CHECK(same_bits(out, alone, N * o.vocab)))
                        printf("    %s, %s, %s, %u at a time, %u threads\n", mode_names[modes[m]],
                               dsv3_dtype_name(dtypes[d]), dsv3_isa_name(isas[s]), (unsigned)steps[i],
                               (unsigned)n_threads);
                }
        }
        free(alone), free(out), free(in_f32);
        tiny_free(&t);
    }
}

/* W_UK meets one row of queries as it lies where its shape allows that, and several rows, or with other kernels, written
   out: the same logits. Rows of a head share their scales (F8_E4M3), or each has its own (I8). */
TEST(queries_of_one_row)
{
    enum { N = 6 };
    static const dsv3_dtype dtypes[] = {DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_I8, DSV3_DTYPE_BF16, DSV3_DTYPE_F16, DSV3_DTYPE_F32};
    static const mode both[] = {F32, AUTO};
    int32_t ids[N];
    for (size_t d = 0; d < COUNT(dtypes); d++) {
        tiny t;
        tiny_opts o = tiny_default();
        o.dtype = dtypes[d], o.kv_lora = 256, o.nope = 32, o.v_dim = 32, o.n_layers = 2;
        tiny_build(&t, &o);
        tiny_ids(ids, N, o.vocab, 7);
        float *together = floats(N * o.vocab), *out = floats(N * o.vocab);
        for (size_t m = 0; m < COUNT(both); m++) {
            REQUIRE(run_model(&t, together, ids, N, N, 1, DSV3_ISA_AUTO, both[m]));
            for (size_t s = 0; s < COUNT(isas); s++)
                for (uint32_t n_threads = 1; n_threads < 3 && dsv3_isa_supported(isas[s]); n_threads++) {
                    REQUIRE(run_model(&t, out, ids, N, 1, n_threads, isas[s], both[m]));
                    if (!CHECK(same_bits(out, together, N * o.vocab)))
                        printf("    %s, %s, %s, %u threads\n", mode_names[both[m]], dsv3_dtype_name(dtypes[d]),
                               dsv3_isa_name(isas[s]), (unsigned)n_threads);
                }
        }
        free(together), free(out);
        tiny_free(&t);
    }
}

/* Logits [n, vocab] behind appends of `first`, then `step` tokens, with keys and values written out or not. */
static bool run_expanded(tiny *t, float *logits, const int32_t *ids, size_t n, size_t first, size_t step, bool expand,
                         uint32_t n_threads, dsv3_isa isa, mode m, dsv3_cache cache)
{
    dsv3_model *model = NULL;
    dsv3_session *session = NULL;
    dsv3_session_opts so;
    dsv3_error e;
    memset(&so, 0, sizeof so);
    so.max_tokens = (uint32_t)n, so.n_threads = n_threads, so.expand = expand, so.cache_latent = so.cache_rope = cache;
    bool ok = open_in(t, isa, m, &so, &model, &session);
    for (size_t at = 0, some; ok && at < n; at += some) {
        dsv3_outputs out;
        some = at ? step : first;
        some = n - at < some ? n - at : some;
        memset(&out, 0, sizeof out);
        out.logits = logits + at * dsv3_model_config(model)->vocab_size;
        ok = CHECK_OK(dsv3_session_append(session, ids + at, some, &out, &e), e);
    }
    dsv3_session_close(session);
    dsv3_model_close(model);
    return ok;
}

/* Attention with keys and values written out: near the absorbed one, in F32 very near, whatever the prompt is cut into and
   whatever the cache holds; the same bits on any threads and kernels. Passes of few rows go the other way. */
TEST(expanded)
{
    enum { N = 410 };
    static const size_t cuts[][2] = {{N, 1}, {64, 65}, {300, 64}, {255, 70}, {150, 1}, {257, 153}};
    static const dsv3_cache caches[] = {DSV3_CACHE_AUTO, DSV3_CACHE_F32, DSV3_CACHE_BF16, DSV3_CACHE_I8};
    static int32_t ids[N];
    for (int which = 0; which < (TEST_SANITIZED ? 1 : 3); which++) {
        tiny t;
        tiny_opts o = which == 0 ? tiny_blocks() : which == 1 ? tiny_default() : tiny_v2();
        o.max_pos = 512;
        tiny_build(&t, &o);
        tiny_ids(ids, N, o.vocab, 9);
        const size_t all = N * o.vocab;
        float *absorbed = floats(all), *out = floats(all), *again = floats(all);
        for (size_t m = 0; m < COUNT(modes); m++)
            for (size_t c = 0; c < COUNT(cuts); c++) {
                const dsv3_cache cache = caches[(c + m) % COUNT(caches)];
                double worst = 0, largest = 0, square = 0, size = 0;
                REQUIRE(run_expanded(&t, absorbed, ids, N, N, N, false, 2, DSV3_ISA_AUTO, modes[m], cache));
                REQUIRE(run_expanded(&t, out, ids, N, cuts[c][0], cuts[c][1], true, 2, DSV3_ISA_AUTO, modes[m], cache));
                for (size_t i = 0; i < all; i++) {
                    const double d = fabs((double)out[i] - (double)absorbed[i]);
                    worst = d > worst ? d : worst, square += d * d;
                    largest = fabs(absorbed[i]) > largest ? fabs(absorbed[i]) : largest;
                    size += (double)absorbed[i] * (double)absorbed[i];
                }
                CHECK(worst > 0); /* it is another way */
                /* Where something is rounded, what is near a border goes the other way: a cache, codes of activations. */
                const bool exact = modes[m] == F32 && (cache == DSV3_CACHE_AUTO || cache == DSV3_CACHE_F32);
                if (!CHECK(exact ? worst <= 1e-5 * largest : sqrt(square / size) < (modes[m] == FP8 ? 0.2 : 0.05)))
                    printf("    %d %s, %u then %u: worst %g of %g, %g\n", which, mode_names[modes[m]],
                           (unsigned)cuts[c][0], (unsigned)cuts[c][1], worst, largest, sqrt(square / size));
                for (size_t s = 0; s < COUNT(isas) && !c; s++) {
                    if (!dsv3_isa_supported(isas[s]) || (isas[s] == DSV3_ISA_SCALAR && which))
                        continue;
                    REQUIRE(run_expanded(&t, again, ids, N, N, 1, true, (uint32_t)(1 + (s + m) % 8), isas[s], modes[m], cache));
                    if (!CHECK(same_bits(again, out, all)))
                        printf("    %s, %s\n", mode_names[modes[m]], dsv3_isa_name(isas[s]));
                }
            }
        free(absorbed), free(out), free(again);
        tiny_free(&t);
    }
}

/* Draws a tensor again, as another type. */
static void redraw(tiny *t, const char *name, dsv3_dtype dtype)
{
    tiny_tensor *old = tiny_find(t, name);
    REQUIRE(CHECK(old != NULL));
    uint64_t rows = old->shape[0], cols = old->shape[1];
    tiny_remove(t, name);
    tiny_draw(t, "", name, dtype, 2, rows, cols, 0, 1 / sqrt((double)cols));
    tiny_pack(t);
}

/* What stays f32 in every mode: the router, norms, whatever their type, and in FP8 W_UK and W_UV inside attention. Seen on
   tokens that stand alone, in a cache of bf16: what attention rounds is then 1 and what the cache has rounded. With all other
   linears in F16, and the head in F32, no mode changes a bit; a head or a projection in BF16 does, and so, but for FP8, does
   W_UV where it can be had without rounding its weights. */
TEST(what_stays_f32)
{
    enum { N = 30 };
    static const dsv3_dtype kv_b[] = {DSV3_DTYPE_F16, DSV3_DTYPE_BF16, DSV3_DTYPE_F8_E4M3};
    int32_t ids[N];
    for (size_t d = 0; d < COUNT(kv_b) + 2; d++) {
        tiny t;
        tiny_opts o = tiny_default();
        o.dtype = DSV3_DTYPE_F16;
        tiny_build(&t, &o);
        tiny_ids(ids, N, o.vocab, 9);
        CHECK_EQ_STR(tiny_find(&t, "model.layers.1.mlp.gate.weight")->dtype, "BF16");
        if (d < COUNT(kv_b) + 1)
            redraw(&t, "lm_head.weight", DSV3_DTYPE_F32);
        for (unsigned l = 0; l < o.n_layers && d < COUNT(kv_b); l++) {
            char name[64];
            snprintf(name, sizeof name, "model.layers.%u.self_attn.kv_b_proj.weight", l);
            redraw(&t, name, kv_b[d]);
        }
        if (d == COUNT(kv_b))
            redraw(&t, "model.layers.1.self_attn.o_proj.weight", DSV3_DTYPE_BF16);
        float *expected = floats(N * o.vocab), *out = floats(N * o.vocab);
        REQUIRE(run_model(&t, expected, ids, N, 0, 1, DSV3_ISA_AUTO, F32));
        for (size_t m = 0; m < COUNT(modes); m++) {
            REQUIRE(run_model(&t, out, ids, N, 0, 1, DSV3_ISA_AUTO, modes[m]));
            const bool same = d == 0 || modes[m] == F32 || (d < COUNT(kv_b) && modes[m] == FP8);
            if (!CHECK(same_bits(out, expected, N * o.vocab) == same))
                printf("    case %u, %s\n", (unsigned)d, mode_names[modes[m]]);
        }
        free(expected), free(out);
        tiny_free(&t);
    }
}

/* A host thread that flushes denormals and rounds otherwise: the same logits, with threads too, and its state stays. */
TEST(floating_point_state_of_a_host)
{
#if HAVE_CSR
    enum { N = 20 };
    static const uint32_t states[] = {0x1F80 | 0x8040, 0x1F80 | 0x8040 | 0x6000, 0x1F80 | 0x2000};
    const uint32_t mine = _mm_getcsr();
    int32_t ids[N];
    tiny t;
    tiny_opts o = tiny_default();
    tiny_build(&t, &o);
    tiny_ids(ids, N, o.vocab, 8);
    float *expected = floats(N * o.vocab), *out = floats(N * o.vocab);
    for (size_t m = 0; m < COUNT(modes); m++) {
        REQUIRE(run_model(&t, expected, ids, N, N, 1, DSV3_ISA_AUTO, modes[m]));
        for (size_t i = 0; i < COUNT(states); i++) {
            _mm_setcsr(states[i]);
            bool ok = run_model(&t, out, ids, N, i == 2 ? 1 : N, (uint32_t)i + 1, DSV3_ISA_AUTO, modes[m]);
            uint32_t left = _mm_getcsr();
            _mm_setcsr(mine);
            CHECK_EQ_UINT(left & 0xFFC0, states[i]);
            CHECK(ok && same_bits(out, expected, N * o.vocab));
        }
    }
    free(expected), free(out);
    tiny_free(&t);
#else
    SKIP("x86-64 only");
#endif
}

/* A NaN code in a weight: nothing when opening, an error with the tensor's name when it is met. */
TEST(nan_code_in_a_model)
{
    static const char *const names[] = {"model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight",
                                        "model.layers.1.self_attn.kv_b_proj.weight",
                                        "model.layers.2.mlp.shared_experts.up_proj.weight"};
    int32_t ids[5] = {5, 6, 7, 8, 9};
    for (size_t i = 0; i < COUNT(names); i++)
        for (size_t m = 0; m < COUNT(modes); m++) {
            tiny t;
            tiny_opts o = tiny_default();
            dsv3_model *model = NULL;
            dsv3_session *session = NULL;
            dsv3_model_opts mo;
            dsv3_error e;
            memset(&mo, 0, sizeof mo);
            mo.compute = options(DSV3_ISA_AUTO, modes[m]).compute;
            tiny_build(&t, &o);
            tiny_tensor *spoilt = tiny_find(&t, names[i]);
            REQUIRE(CHECK(spoilt != NULL));
            spoilt->data[spoilt->size / 2] = 0x7F;
            tiny_pack(&t);
            REQUIRE(CHECK_OK(tiny_open(&t, &model, &mo, &e), e));
            REQUIRE(CHECK_OK(dsv3_session_open(&session, model, NULL, &e), e));
            CHECK_RESULT(dsv3_session_append(session, ids, 5, NULL, &e), DSV3_ERROR_BAD_TENSOR, e);
            CHECK_CONTAINS(e.message, names[i]);
            dsv3_session_close(session);
            dsv3_model_close(model);
            tiny_free(&t);
        }
}

// ---- Names and refusals ----------------------------------------------------------------------------------

TEST(names_and_refusals)
{
    float in[64] = {0}, out;
    dsv3_error e;
    for (size_t m = 0; m < COUNT(modes); m++)
        CHECK_EQ_STR(dsv3_compute_name(options(DSV3_ISA_AUTO, modes[m]).compute), mode_names[modes[m]]);
    CHECK_EQ_STR(dsv3_compute_name((dsv3_compute)99), "?");
    CHECK_EQ_STR(dsv3_compute_name((dsv3_compute)-1), "?");
    weight w = make(W_BF16, 1, 64);
    dsv3_matmul_opts o = options(DSV3_ISA_AUTO, F32);
    for (int wrong = -1; wrong < 100; wrong += 100 - 1) { /* -1 and 98 */
        o.compute = (dsv3_compute)wrong;
        CHECK_RESULT(dsv3_matmul(&out, in, 1, &w.t, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
        CHECK_CONTAINS(e.message, "compute");
    }
    release(&w);
    tiny t;
    tiny_opts to = tiny_micro();
    dsv3_model *model = NULL;
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    mo.compute = (dsv3_compute)6;
    tiny_build(&t, &to);
    CHECK_RESULT(tiny_open(&t, &model, &mo, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    CHECK_CONTAINS(e.message, "compute");
    CHECK(model == NULL);
    tiny_free(&t);
}

TEST_MAIN(RUN(values), RUN(modes_that_differ), RUN(borders_between_codes), RUN(rows_alone), RUN(threads),
          RUN(every_code_at_every_place), RUN(nan_codes), RUN(zeros_and_worse), RUN(powers_of_two),
          RUN(longest_int8_sums), RUN(floating_point_state), RUN(logits_of_a_model), RUN(queries_of_one_row),
          RUN(expanded), RUN(what_stays_f32), RUN(floating_point_state_of_a_host), RUN(nan_code_in_a_model),
          RUN(names_and_refusals))
