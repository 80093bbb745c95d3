/* The floors ten and mm, and the public calls on tensors: quantize, dequantize, matmul. Results are compared bit for bit
   with a plain reading of the contract, and with themselves: whatever n, strip, order of rows, threads and kernels. */
#ifdef TEST_EMULATE_AVX512
    #include "emulate_avx512.h"
#endif
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"

#ifndef DSV3_NO_THREADS
    #include <pthread.h>
#endif

// ---- Helpers ---------------------------------------------------------------------------------------------

/* All instruction sets there are, on any machine. */
static const dsv3_isa isas[] = {DSV3_ISA_SCALAR, DSV3_ISA_AVX2, DSV3_ISA_AVX512, DSV3_ISA_AVX_VNNI, DSV3_ISA_AVX512_VNNI,
                                DSV3_ISA_AVX512_BF16, DSV3_ISA_AVX512_AMX, DSV3_ISA_NEON};

static uint64_t random_state = 1;

static uint32_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

static float random_float(void)
{
    int sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (int)(random_bits() & 0xFFFF) - 0x8000;
    return (float)sum / 65536.0f;
}

/* malloc that knows whether all came back, and can say no. */
typedef struct heap {
    size_t live, calls, fail_at; /* fail_at: the call that gets NULL, from 1; 0: none */
} heap;

static void *heap_alloc(void *user, size_t size, size_t align)
{
    heap *h = (heap *)user;
    if (++h->calls == h->fail_at)
        return NULL;
    h->live += size;
    uint8_t *raw = (uint8_t *)malloc(size + align + sizeof(void *));
    uint8_t *p = raw + sizeof(void *);
    p += (align - ((uintptr_t)p & (align - 1))) & (align - 1);
    memcpy(p - sizeof(void *), &raw, sizeof raw);
    return p;
}

static void heap_free(void *user, void *ptr, size_t size)
{
    void *raw;
    ((heap *)user)->live -= size;
    memcpy(&raw, (uint8_t *)ptr - sizeof(void *), sizeof raw);
    free(raw);
}

static float *floats(size_t n)
{
    float *p = (float *)calloc(n ? n : 1, sizeof(float));
    return p ? p : (float *)(abort(), (void *)0);
}

/* A tensor and all it views. */
typedef struct owned {
    dsv3_tensor t;
    uint8_t *data;
    float *scale;
} owned;

static owned make(dsv3_dtype dtype, size_t rows, size_t cols)
{
    owned o;
    dsv3_error e;
    size_t n_scales = dtype == DSV3_DTYPE_I8 ? rows : (rows + 127) / 128 * ((cols + 127) / 128);
    float *values = floats(rows * cols);
    for (size_t i = 0; i < rows * cols; i++)
        values[i] = random_float() * (1.0f + (float)(i / cols / 50)); /* blocks of different scale */
    o.data = (uint8_t *)malloc(rows * cols * dsv3_dtype_size(dtype));
    o.scale = dtype == DSV3_DTYPE_F8_E4M3 || dtype == DSV3_DTYPE_I8 ? floats(n_scales) : NULL;
    CHECK_OK(dsv3_quantize(&o.t, o.data, rows * cols * dsv3_dtype_size(dtype), o.scale, o.scale ? n_scales : 0, dtype, values, rows,
                           cols, &e),
             e);
    free(values);
    return o;
}

static void release(owned *o)
{
    free(o->data);
    free(o->scale);
}

/* out [n, rows] from in [n, cols], the order of summation as the header has it. */
static void reference(float *out, const float *in, size_t n, const dsv3_tensor *t)
{
    size_t rows = (size_t)dsv3__ten_n_rows(t), cols = (size_t)dsv3__ten_n_cols(t);
    float *w = floats(cols + 64), *x = floats(cols + 64), *packed_w = floats(cols + 64), *packed_x = floats(cols + 64);
    for (size_t r = 0; r < rows; r++) {
        CHECK(dsv3_dequantize(w, t, r, 1, NULL) == DSV3_OK);
        for (size_t j = 0; j < n; j++) {
            float a[64] = {0}, s[16];
            memcpy(x, in + j * cols, cols * sizeof(float));
            for (size_t i = 0; i < (cols + 63) / 64 * 64; i++) {
                size_t in_block = i % 64;
                size_t c = t->dtype == DSV3_DTYPE_F8_E4M3 ? i - in_block + in_block % 16 * 4 + in_block / 16 : i;
                packed_w[i] = c < cols ? w[c] : 0.0f;
                packed_x[i] = c < cols ? x[c] : 0.0f;
            }
            for (size_t i = 0; i < (cols + 63) / 64 * 64; i++)
                a[i % 64] = fmaf(packed_w[i], packed_x[i], a[i % 64]);
            for (int i = 0; i < 16; i++) {
                volatile float u = a[i] + a[16 + i], v = a[32 + i] + a[48 + i];
                s[i] = u + v;
            }
            for (int m = 8; m; m /= 2)
                for (int i = 0; i < m; i++)
                    s[i] += s[i + m];
            out[j * rows + r] = s[0];
        }
    }
    free(w), free(x), free(packed_w), free(packed_x);
}

static float *random_rows(size_t n)
{
    float *x = floats(n);
    for (size_t i = 0; i < n; i++)
        x[i] = random_float();
    return x;
}

static dsv3_matmul_opts options(dsv3_isa isa)
{
    dsv3_matmul_opts o;
    memset(&o, 0, sizeof o);
    o.isa = isa;
    o.compute = DSV3_COMPUTE_F32;
    return o;
}

static const dsv3_dtype dtypes[] = {DSV3_DTYPE_F32, DSV3_DTYPE_F16, DSV3_DTYPE_BF16, DSV3_DTYPE_F8_E4M3};

// ---- matmul ----------------------------------------------------------------------------------------------

/* All dtypes, kernels and numbers of rows against the reference. Widths on both sides of a block of 64, a scale block and
   a chunk of a panel; heights on both sides of a tile and a strip. */
TEST(bits)
{
    static const size_t shapes[][2] = {{1, 1},    {3, 63},   {4, 64},   {5, 65},    {33, 129},  {131, 320}, {64, 576},
                                       {37, 1408}, {70, 2048}, {35, 2112}, {41, 4500}, {6, 7168}};
    static const size_t counts[] = {1, 2, 3, 4, 5, 6, 7, 12, 13, 48, 49, 101};
    enum { N = 101 };
    random_state = 21;
    for (size_t d = 0; d < DSV3__COUNT(dtypes); d++)
        for (size_t i = 0; i < DSV3__COUNT(shapes); i++) {
            size_t rows = shapes[i][0], cols = shapes[i][1];
            owned w = make(dtypes[d], rows, cols);
            float *in = random_rows(N * cols), *expected = floats(N * rows), *out = floats(N * rows + 1);
            dsv3_error e;
            reference(expected, in, N, &w.t);
            for (size_t s = 0; s < DSV3__COUNT(isas); s++) {
                const dsv3_isa isa = isas[s];
                dsv3_matmul_opts o = options(isa);
                if (!dsv3_isa_supported(isa))
                    continue;
                for (size_t c = 0; c < DSV3__COUNT(counts); c++) {
                    size_t n = counts[c];
                    if ((isa == DSV3_ISA_SCALAR && n > 13) || (TEST_SANITIZED && (c + i) % 3))
                        continue; /* slow, and the same path; in turn */
                    memset(out, 0x55, (N * rows + 1) * sizeof(float));
                    CHECK_OK(dsv3_matmul(out, in, n, &w.t, &o, &e), e);
                    if (!CHECK(memcmp(out, expected, n * rows * sizeof(float)) == 0))
                        printf("    %s %s [%u, %u] n %u\n", dsv3_isa_name(isa), dsv3_dtype_name(dtypes[d]), (unsigned)rows,
                               (unsigned)cols, (unsigned)n);
                    CHECK_EQ_UINT(dsv3__float_bits(out[n * rows]), 0x55555555); /* nothing behind */
                }
            }
            release(&w);
            free(in), free(expected), free(out);
        }
}

/* These bits must never change, whatever the compiler, the flags, the machine. */
TEST(bits_are_frozen)
{
    const dsv3_matmul_opts exact = options(DSV3_ISA_AUTO);
    static const uint64_t golden[] = {0xA2331CF87CFA1534, 0xC3D643A9EDEBE187, 0xD235DDDF3F4DC726, 0xB1CE09A7F39DA017};
    for (size_t d = 0; d < DSV3__COUNT(dtypes); d++) {
        random_state = 22 + d;
        owned w = make(dtypes[d], 150, 1000);
        float *in = random_rows(9 * 1000), *out = floats(9 * 150);
        dsv3_error e;
        CHECK_OK(dsv3_matmul(out, in, 9, &w.t, &exact, &e), e);
        uint64_t hash = 14695981039346656037ull;
        for (size_t i = 0; i < 9 * 150; i++)
            hash = (hash ^ dsv3__float_bits(out[i])) * 1099511628211ull;
        if (!CHECK(hash == golden[d]))
            printf("    %s: 0x%08lX%08lX\n", dsv3_dtype_name(dtypes[d]), (unsigned long)(hash >> 32), (unsigned long)(hash & 0xFFFFFFFF));
        release(&w);
        free(in), free(out);
    }
}

/* The stated bound, against double, over the values as dequantize gives them. */
TEST(accuracy)
{
    const dsv3_matmul_opts exact = options(DSV3_ISA_AUTO);
    enum { ROWS = 60, COLS = 3000, N = 4 };
    random_state = 26;
    for (size_t d = 0; d < DSV3__COUNT(dtypes); d++) {
        owned w = make(dtypes[d], ROWS, COLS);
        float *in = random_rows(N * COLS), *out = floats(N * ROWS), *values = floats(ROWS * COLS);
        double worst = 0;
        dsv3_error e;
        CHECK_OK(dsv3_matmul(out, in, N, &w.t, &exact, &e), e);
        CHECK_OK(dsv3_dequantize(values, &w.t, 0, ROWS, &e), e);
        for (size_t j = 0; j < N; j++)
            for (size_t r = 0; r < ROWS; r++) {
                double sum = 0, magnitude = 0;
                for (size_t c = 0; c < COLS; c++) {
                    double product = (double)values[r * COLS + c] * (double)in[j * COLS + c];
                    sum += product;
                    magnitude += fabs(product);
                }
                worst = fmax(worst, fabs((double)out[j * ROWS + r] - sum) / magnitude);
            }
        CHECK_NEAR(worst, 0, (COLS / 64 + 8) * ldexp(1, -24));
        CHECK(worst > 0);
        release(&w);
        free(in), free(out), free(values);
    }
}

/* A spoilt row of weights, and a spoilt row of x, spoil their own results only. */
TEST(rows_are_independent)
{
    enum { ROWS = 70, COLS = 700, N = 14 };
    random_state = 27;
    owned w = make(DSV3_DTYPE_F8_E4M3, ROWS, COLS);
    float *in = random_rows(N * COLS), *before = floats(N * ROWS), *out = floats(N * ROWS);
    dsv3_error e;
    CHECK_OK(dsv3_matmul(before, in, N, &w.t, NULL, &e), e);
    w.data[33 * COLS + 511] = 0xFF;
    w.data[69 * COLS + 699] = 0x7F;
    in[5 * COLS + 3] = NAN;
    in[9 * COLS + 640] = INFINITY;
    for (size_t n = 1; n <= N; n += 13) {
        for (size_t j0 = 0; j0 < N; j0 += n) {
            CHECK_OK(dsv3_matmul(out + j0 * ROWS, in + j0 * COLS, n, &w.t, NULL, &e), e);
        }
        for (size_t j = 0; j < N; j++)
            for (size_t r = 0; r < ROWS; r++) {
                float f = out[j * ROWS + r];
                bool nan = r == 33 || r == 69 || j == 5;
                if (nan)
                    CHECK_EQ_UINT(dsv3__float_bits(f), 0x7FC00000);
                else if (j == 9)
                    CHECK(!(fabsf(f) < INFINITY));
                else
                    CHECK(memcmp(&f, &before[j * ROWS + r], 4) == 0);
            }
    }
    release(&w);
    free(in), free(before), free(out);
}

/* Host threads: last task first, on one thread or on many at once. */
typedef struct threads {
    uint32_t runs, tasks;
} threads;

static void run_backwards(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx)
{
    threads *t = (threads *)user;
    t->runs++;
    t->tasks += n;
    while (n--)
        task(ctx, n);
}

#ifndef DSV3_NO_THREADS
typedef struct job {
    void (*task)(void *ctx, uint32_t i);
    void *ctx;
    uint32_t i;
} job;

static void *run_job(void *arg)
{
    job *j = (job *)arg;
    j->task(j->ctx, j->i);
    return NULL;
}

static void run_at_once(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx)
{
    pthread_t thread[16];
    job jobs[16];
    bool started[16];
    ((threads *)user)->runs++;
    for (uint32_t i = 0; i < n; i++) {
        jobs[i].task = task, jobs[i].ctx = ctx, jobs[i].i = i;
        started[i] = pthread_create(&thread[i], NULL, run_job, &jobs[i]) == 0;
        if (!started[i])
            task(ctx, i);
    }
    for (uint32_t i = 0; i < n; i++)
        if (started[i])
            pthread_join(thread[i], NULL);
}
#endif

TEST(executors)
{
    enum { ROWS = 700, COLS = 900, N = 3 };
    random_state = 28;
    const dsv3_matmul_opts exact = options(DSV3_ISA_AUTO);
    owned w = make(DSV3_DTYPE_F8_E4M3, ROWS, COLS);
    float *in = random_rows(N * COLS), *expected = floats(N * ROWS), *out = floats(N * ROWS);
    dsv3_error e;
    CHECK_OK(dsv3_matmul(expected, in, N, &w.t, &exact, &e), e);
    for (uint32_t n_threads = 0; n_threads < 6; n_threads++)
        for (size_t n = 1; n <= N; n += 2)
            for (int at_once = 0; at_once < 2; at_once++) {
                threads t = {0, 0};
                dsv3_matmul_opts o = options(DSV3_ISA_AUTO);
                o.executor.run_fn = run_backwards;
#ifndef DSV3_NO_THREADS
                if (at_once)
                    o.executor.run_fn = run_at_once;
#endif
                o.executor.n_threads = n_threads;
                o.executor.user = &t;
                memset(out, 0, N * ROWS * sizeof(float));
                CHECK_OK(dsv3_matmul(out, in, n, &w.t, &o, &e), e);
                CHECK(memcmp(out, expected, n * ROWS * sizeof(float)) == 0);
                CHECK_EQ_UINT(t.runs, 1);
            }
    release(&w);
    free(in), free(expected), free(out);
}

TEST(allocators)
{
    random_state = 29;
    owned w = make(DSV3_DTYPE_BF16, 40, 500);
    float *in = random_rows(600 * 500), *out = floats(600 * 40);
    heap h = {0, 0, 0};
    dsv3_matmul_opts o = options(DSV3_ISA_AUTO);
    dsv3_error e;
    o.allocator.alloc_fn = heap_alloc;
    o.allocator.free_fn = heap_free;
    o.allocator.user = &h;
    CHECK_OK(dsv3_matmul(out, in, 600, &w.t, &o, &e), e);
    CHECK(h.calls > 0);
    CHECK_EQ_UINT(h.live, 0);
    size_t calls = h.calls;
    for (size_t i = 1; i <= calls; i++) {
        h.calls = 0;
        h.fail_at = i;
        CHECK_RESULT(dsv3_matmul(out, in, 600, &w.t, &o, &e), DSV3_ERROR_OUT_OF_MEMORY, e);
        CHECK_CONTAINS(e.message, "matmul");
        CHECK_EQ_UINT(h.live, 0);
    }
    release(&w);
    free(in), free(out);
}

/* A host that flushes denormals or rounds otherwise gets the same bits, and its own state back. */
TEST(floating_point_state)
{
#if DSV3__X64
    enum { ROWS = 10, COLS = 500 };
    random_state = 30;
    owned w = make(DSV3_DTYPE_F8_E4M3, ROWS, COLS);
    float *in = random_rows(COLS), *out = floats(ROWS), *expected = floats(ROWS), *values = floats(ROWS * COLS), *again = floats(ROWS * COLS);
    dsv3_error e;
    for (size_t i = 0; i < ROWS * COLS; i++)
        w.data[i] = (uint8_t)(w.data[i] & 0x87); /* denormal codes */
    CHECK_OK(dsv3_matmul(expected, in, 1, &w.t, NULL, &e), e);
    CHECK_OK(dsv3_dequantize(values, &w.t, 0, ROWS, &e), e);
    CHECK(expected[0] != 0);
    uint32_t state = _mm_getcsr();
    _mm_setcsr(0x1F80 | 0x8040 | 0x6000); /* flush, denormals are zero, toward zero */
    dsv3_result a = dsv3_matmul(out, in, 1, &w.t, NULL, &e), b = dsv3_dequantize(again, &w.t, 0, ROWS, &e);
    uint32_t left = _mm_getcsr();
    _mm_setcsr(state);
    CHECK(a == DSV3_OK && b == DSV3_OK);
    CHECK_EQ_UINT(left & 0xFFC0, 0x1F80 | 0x8040 | 0x6000);
    CHECK(memcmp(out, expected, ROWS * sizeof(float)) == 0);
    CHECK(memcmp(again, values, ROWS * COLS * sizeof(float)) == 0);
    release(&w);
    free(in), free(out), free(expected), free(values), free(again);
#else
    SKIP("x86-64 only");
#endif
}

TEST(errors)
{
    static const float zeros[8 * 64] = {0};
    float in[64] = {0}, out[8];
    uint8_t codes[8 * 64] = {0};
    dsv3_tensor good, t;
    dsv3_matmul_opts o = options(DSV3_ISA_AUTO);
    dsv3_error e;
    float scale[1];
    CHECK_OK(dsv3_quantize(&good, codes, sizeof codes, scale, 1, DSV3_DTYPE_F8_E4M3, zeros, 8, 64, &e), e);
    CHECK(dsv3_matmul(out, in, 1, &good, NULL, NULL) == DSV3_OK);
    CHECK_OK(dsv3_matmul(NULL, NULL, 0, &good, NULL, &e), e); /* nothing to do */
    CHECK_RESULT(dsv3_matmul(out, in, 1, NULL, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_matmul(NULL, in, 1, &good, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_matmul(out, NULL, 1, &good, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK(dsv3_matmul(out, NULL, 1, &good, NULL, NULL) == DSV3_ERROR_INVALID_ARGUMENT);
    CHECK_RESULT(dsv3_matmul(out, in, SIZE_MAX / 64, &good, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);

    o.struct_size = 7;
    CHECK_RESULT(dsv3_matmul(out, in, 1, &good, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    CHECK_CONTAINS(e.message, "struct_size");
    o = options((dsv3_isa)99);
    CHECK_RESULT(dsv3_matmul(out, in, 1, &good, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    for (size_t s = 0; s < DSV3__COUNT(isas); s++)
        if (!dsv3_isa_supported(isas[s])) {
            o = options(isas[s]);
            CHECK_RESULT(dsv3_matmul(out, in, 1, &good, &o, &e), DSV3_ERROR_UNSUPPORTED_CPU, e);
            CHECK_CONTAINS(e.message, dsv3_isa_name(isas[s]));
        }
    o = options((dsv3_isa)8); /* a number between two names */
    CHECK_RESULT(dsv3_matmul(out, in, 1, &good, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o = options(DSV3_ISA_AUTO);
    o.allocator.alloc_fn = heap_alloc;
    CHECK_RESULT(dsv3_matmul(out, in, 1, &good, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o = options(DSV3_ISA_AUTO);
    o.executor.n_threads = 4;
    CHECK_RESULT(dsv3_matmul(out, in, 1, &good, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);

#define BAD(field, value, code, part)                              \
    do {                                                           \
        t = good;                                                  \
        t.field = value;                                           \
        CHECK_RESULT(dsv3_matmul(out, in, 1, &t, NULL, &e), code, e); \
        CHECK_CONTAINS(e.message, part);                           \
        CHECK_RESULT(dsv3_dequantize(out, &t, 0, 0, &e), code, e);   \
    } while (0)
    BAD(data, NULL, DSV3_ERROR_INVALID_ARGUMENT, "data");
    BAD(dtype, DSV3_DTYPE_I32, DSV3_ERROR_BAD_TENSOR, "I32");
    BAD(dtype, (dsv3_dtype)77, DSV3_ERROR_BAD_TENSOR, "dtype");
    BAD(dtype, DSV3_DTYPE_F16, DSV3_ERROR_BAD_TENSOR, "row_stride");
    BAD(rank, 0, DSV3_ERROR_BAD_TENSOR, "rank");
    BAD(rank, 3, DSV3_ERROR_BAD_TENSOR, "[8, 64, 0]");
    BAD(rank, 9, DSV3_ERROR_BAD_TENSOR, "rank 9");
    BAD(shape[0], 0, DSV3_ERROR_BAD_TENSOR, "no elements");
    BAD(shape[0], UINT64_MAX / 32, DSV3_ERROR_BAD_TENSOR, "too many");
    BAD(shape[1], 65, DSV3_ERROR_BAD_TENSOR, "row_stride 64");
    BAD(row_stride, UINT64_MAX / 2, DSV3_ERROR_BAD_TENSOR, "row_stride");
    BAD(scale, NULL, DSV3_ERROR_BAD_TENSOR, "scale is NULL");
    BAD(scale_dtype, DSV3_DTYPE_I8, DSV3_ERROR_BAD_TENSOR, "scales of dtype I8");
    BAD(block_rows, 0, DSV3_ERROR_BAD_TENSOR, "0 x 128");
    BAD(block_cols, 32, DSV3_ERROR_BAD_TENSOR, "block_cols 32");
    t = good;
    t.block_rows = 4;
    t.scale_stride = 0;
    CHECK_RESULT(dsv3_matmul(out, in, 1, &t, NULL, &e), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "scale_stride");
    t = good;
    t.dtype = DSV3_DTYPE_BF16;
    t.row_stride = 128;
    CHECK_RESULT(dsv3_matmul(out, in, 1, &t, NULL, &e), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "scales beside dtype BF16");
    t = good;
    t.dtype = DSV3_DTYPE_I8;
    t.scale = NULL;
    t.scale_dtype = DSV3_DTYPE_UNKNOWN;
    t.block_rows = t.block_cols = 0;
    CHECK_RESULT(dsv3_matmul(out, in, 1, &t, NULL, &e), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "dtype I8, but scale is NULL");
    CHECK_RESULT(dsv3_dequantize(out, &good, 7, 2, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_dequantize(out, &good, 9, 0, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_dequantize(NULL, &good, 0, 1, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_OK(dsv3_dequantize(NULL, &good, 8, 0, &e), e);
}

// ---- Views -----------------------------------------------------------------------------------------------

/* Block sizes, dtypes of scales, strides, alignments: the value is code times the scale of its block. */
TEST(blocks_and_strides)
{
    const dsv3_matmul_opts exact = options(DSV3_ISA_AUTO);
    static const uint32_t blocks[][2] = {{128, 128}, {64, 64}, {1, 128}, {100, 192}, {256, 64}, {7, 1000}, {1000, 1000}, {3, 450}};
    enum { ROWS = 203, COLS = 450, STRIDE = 471, SCALES = 203 * 9 };
    static uint8_t data[ROWS * STRIDE + 3], scale[SCALES * 4 + 3];
    float *out = floats(ROWS * COLS), *in = random_rows(5 * COLS), *result = floats(5 * ROWS), *expected = floats(5 * ROWS);
    dsv3_error e;
    random_state = 31;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(random_bits() & 0xF7);
    for (size_t b = 0; b < DSV3__COUNT(blocks); b++)
        for (int kind = 0; kind < 4; kind++) { /* scales of F32, BF16, E8M0, none */
            static const dsv3_dtype kinds[] = {DSV3_DTYPE_F32, DSV3_DTYPE_BF16, DSV3_DTYPE_F8_E8M0, DSV3_DTYPE_UNKNOWN};
            dsv3_tensor t;
            bool ok = true;
            memset(&t, 0, sizeof t);
            for (size_t i = 0; i < SCALES; i++) {
                float f = 0.5f + fabsf(random_float());
                uint16_t h = dsv3__bf16_encode(f);
                uint8_t c = (uint8_t)(120 + random_bits() % 10);
                if (kind == 0)
                    memcpy(scale + 1 + 4 * i, &f, 4);
                else if (kind == 1)
                    memcpy(scale + 1 + 2 * i, &h, 2);
                else
                    scale[1 + i] = c;
            }
            t.data = data + 3;
            t.dtype = DSV3_DTYPE_F8_E4M3;
            t.rank = 2;
            t.shape[0] = ROWS;
            t.shape[1] = COLS;
            t.row_stride = STRIDE;
            if (kind < 3) {
                t.scale = scale + 1;
                t.scale_dtype = kinds[kind];
                t.block_rows = blocks[b][0];
                t.block_cols = blocks[b][1];
                t.scale_stride = (COLS + blocks[b][1] - 1) / blocks[b][1] + 1;
                if (t.scale_stride * ((ROWS + blocks[b][0] - 1) / blocks[b][0]) > SCALES)
                    t.scale_stride--;
            }
            CHECK_OK(dsv3_dequantize(out, &t, 0, ROWS, &e), e);
            for (size_t r = 0; r < ROWS; r++)
                for (size_t c = 0; c < COLS; c++) {
                    float s = kind < 3 ? dsv3__num_get(scale + 1, kinds[kind], r / blocks[b][0] * (size_t)t.scale_stride + c / blocks[b][1]) : 1.0f;
                    volatile float expect = dsv3__fp8_value[data[3 + r * STRIDE + c]] * s;
                    ok = ok && out[r * COLS + c] == expect;
                }
            CHECK(ok);
            CHECK_OK(dsv3_dequantize(out, &t, 130, 1, &e), e); /* a row on its own */
            CHECK(out[449] == dsv3__fp8_value[data[3 + 130 * STRIDE + 449]] *
                                  (kind < 3 ? dsv3__num_get(scale + 1, kinds[kind], 130 / blocks[b][0] * (size_t)t.scale_stride + 449 / blocks[b][1]) : 1.0f));
            reference(expected, in, 5, &t);
            CHECK_OK(dsv3_matmul(result, in, 5, &t, &exact, &e), e);
            CHECK(memcmp(result, expected, 5 * ROWS * sizeof(float)) == 0);
            CHECK_OK(dsv3_matmul(result, in, 1, &t, &exact, &e), e);
            CHECK(memcmp(result, expected, ROWS * sizeof(float)) == 0);
        }
    free(out), free(in), free(result), free(expected);
}

TEST(rank_1)
{
    float values[100], in[200], out[2];
    dsv3_tensor t;
    dsv3_error e;
    random_state = 32;
    for (int i = 0; i < 100; i++)
        values[i] = in[i] = in[100 + i] = (float)(i % 5);
    CHECK_OK(dsv3_quantize(&t, values, sizeof values, NULL, 0, DSV3_DTYPE_F32, values, 1, 100, &e), e);
    t.rank = 1;
    t.shape[0] = 100;
    t.shape[1] = 0;
    t.row_stride = 0;
    CHECK_OK(dsv3_matmul(out, in, 2, &t, NULL, &e), e);
    CHECK(out[0] == 600 && out[1] == 600); /* 20 * (0 + 1 + 4 + 9 + 16) */
    CHECK_OK(dsv3_dequantize(in, &t, 0, 1, &e), e);
    CHECK(memcmp(in, values, sizeof values) == 0);
}

/* Scratch for the widest of a model's weights is enough for its narrower ones, of which more rows of x are taken at a time:
   what lies behind the scratch stays as it is. */
TEST(scratch_of_the_widest)
{
    enum { ROWS = 40, N = 2 * DSV3__MM_TOKENS + DSV3__MM_WHOLE - 1, GUARD = 65536 }; /* words: twice as many rows at a time */
    static const size_t widest[] = {128, 2048, 4000, 7168, 10944, 18432}, wide[] = {64, 512, 1408, 2048, 2112, 7168};
    random_state = 35;
    for (size_t i = 0; i < 3 * DSV3__COUNT(wide); i++) {
        const bool codes = i / DSV3__COUNT(wide) == 1, few = i / DSV3__COUNT(wide) == 2; /* of 8 bits; few rows at the end */
        const size_t cols = wide[i % DSV3__COUNT(wide)], at_once = 2 * dsv3__mm_tokens(cols);
        const size_t n = few ? at_once + DSV3__MM_WHOLE - 1 : codes && cols < 2048 ? 17 : N;
        owned w = make(codes ? DSV3_DTYPE_I8 : DSV3_DTYPE_F8_E4M3, ROWS, cols);
        const size_t stride = dsv3__mm_pad(cols);
        float *in = random_rows(N * cols), *x = floats(N * stride), *out = floats(N * ROWS);
        for (size_t s = 0; s < DSV3__COUNT(isas); s++)
            for (size_t k = 0; k < DSV3__COUNT(widest); k++) {
                const size_t room = dsv3__mm_panel_floats(widest[k]);
                if (!dsv3_isa_supported(isas[s]) || isas[s] == DSV3_ISA_SCALAR || cols > widest[k])
                    continue;
                float *panel = floats(room + GUARD);
                size_t touched = 0;
                for (size_t g = 0; g < GUARD; g++)
                    panel[room + g] = 42;
                dsv3__mm_mode mode = {dsv3__kern_get(isas[s]), codes ? DSV3_COMPUTE_INT8 : DSV3_COMPUTE_BF16, false};
                const dsv3__mm_x rows = {x, stride, NULL, n, true};
                uint32_t saved = dsv3__fp_enter();
                for (size_t j = 0; j < N; j++)
                    dsv3__mm_pack(&mode, x + j * stride, in + j * cols, cols, dsv3__mm_form(&mode, &w.t), true);
                dsv3__mm_strip(&mode, panel, &w.t, 0, ROWS, &rows, out, ROWS, NULL);
                dsv3__fp_leave(saved);
                for (size_t g = 0; g < GUARD; g++)
                    touched += panel[room + g] != 42;
                if (!CHECK_EQ_UINT(touched, 0))
                    printf("    %s: %u columns in scratch for %u\n", dsv3_isa_name(isas[s]), (unsigned)cols, (unsigned)widest[k]);
                free(panel);
            }
        release(&w);
        free(in), free(x), free(out);
    }
}

/* Strips that begin inside a block of scales, rows through an index, every kernel. */
TEST(strips)
{
    enum { ROWS = 300, COLS = 2500, N = 60 };
    random_state = 33;
    static const uint64_t cuts[] = {0, 1, 4, 37, 100, 129, 200, 257, 299, 300};
    const size_t stride = dsv3__mm_pad(COLS);
    owned w = make(DSV3_DTYPE_F8_E4M3, ROWS, COLS);
    float *in = random_rows(N * COLS), *x = floats(N * stride), *panel = floats(dsv3__mm_panel_floats(COLS)), *out = floats(N * ROWS),
          *expected = floats(N * ROWS);
    uint32_t index[N];
    dsv3_error e;
    dsv3__mm_mode mode = {NULL, DSV3_COMPUTE_BF16, false};
    CHECK_OK(dsv3_matmul(expected, in, N, &w.t, NULL, &e), e);
    for (uint32_t i = 0; i < N; i++)
        index[i] = random_bits() % N;
    for (size_t s = 0; s < DSV3__COUNT(isas); s++) {
        const dsv3_isa isa = isas[s];
        if (!dsv3_isa_supported(isa))
            continue;
        for (size_t n = 1; n <= (isa == DSV3_ISA_SCALAR ? 4 : N); n = n * 4 - (n == 16 ? 4 : 0))
            for (int indexed = 0; indexed < 4; indexed++) { /* odd: rows through an index; 2, 3: packed for tiles, though few */
                const bool tiled = indexed >= 2 || n > DSV3__MM_FEW;
                uint32_t saved = dsv3__fp_enter();
                mode.k = dsv3__kern_get(isa);
                for (size_t j = 0; j < N; j++)
                    dsv3__mm_pack(&mode, x + j * stride, in + j * COLS, COLS, dsv3__mm_form(&mode, &w.t), tiled);
                const dsv3__mm_x rows = {x, stride, indexed % 2 ? index : NULL, n, tiled};
                for (size_t i = 0; i + 1 < DSV3__COUNT(cuts); i++)
                    dsv3__mm_strip(&mode, panel, &w.t, cuts[i], cuts[i + 1], &rows, out + cuts[i], ROWS,
                                   indexed ? (const uint8_t *)w.t.data : NULL);
                dsv3__fp_leave(saved);
                for (size_t j = 0; j < n; j++)
                    CHECK(memcmp(out + j * ROWS, expected + (indexed % 2 ? index[j] : j) * ROWS, ROWS * sizeof(float)) == 0);
            }
    }
    release(&w);
    free(in), free(x), free(panel), free(out), free(expected);
}

/* Packed rows: where each column goes, zeros behind; strides that do not fall together. */
TEST(packing)
{
    static const size_t widths[] = {1, 63, 64, 65, 200, 1024};
    for (size_t i = 0; i < DSV3__COUNT(widths); i++)
        for (int form = DSV3__FORM_PLAIN; form < DSV3__FORMS; form++) {
            size_t k = widths[i], stride = dsv3__mm_pad(k);
            bool pairs = dsv3__mm_is_pairs((dsv3__form)form);
            float *row = floats(stride), *values = floats(k);
            dsv3__mm_mode mode = {dsv3__kern_get(DSV3_ISA_SCALAR), DSV3_COMPUTE_BF16, false};
            if (form == DSV3__FORM_FP8 || dsv3__mm_is_bytes((dsv3__form)form)) {
                free(row), free(values);
                continue; /* values change: see rounding_of_activations */
            }
            CHECK(stride % 64 == 0 && stride >= k && stride * sizeof(float) % 4096 != 0);
            memset(row, 0x33, stride * sizeof(float));
            for (size_t c = 0; c < k; c++)
                values[c] = (float)(c % 251 + 1); /* bf16 has them all */
            const size_t end = (k + 63) / 64 * 64;
            const int tiled = form % 2; /* both layouts: registers of 8, those of the first 8 chains first */
            dsv3__mm_pack(&mode, row, values, k, (dsv3__form)form, tiled);
            for (size_t c = 0; c < (k + 127) / 128 * 128 && form == DSV3__FORM_HALVES; c++)
                CHECK(dsv3__bf16_decode(((const uint16_t *)(const void *)row)[c]) == (c < k ? values[c] : 0));
            if (form == DSV3__FORM_HALVES) {
                free(row), free(values);
                continue;
            }
            for (size_t p = 0; p < end; p++) {
                size_t q = p % 64, c = p, at = tiled ? q / 8 * (end / 8) + p / 64 * 8 + p % 8 : p;
                if (pairs && tiled)
                    at = q % 32 / 8 * (end / 4) + p / 64 * 16 + q / 32 * 8 + p % 8;
                if (form == DSV3__FORM_QUADS)
                    c = p - q + q % 16 * 4 + q / 16;
                else if (form == DSV3__FORM_PAIRS)
                    c = p - q + q % 32 / 16 * 32 + q % 16 * 2 + (q < 32);
                else if (form == DSV3__FORM_PAIRS_FP8)
                    c = p - q + q % 16 * 4 + q % 32 / 16 * 2 + (q < 32);
                if (!CHECK(row[at] == (c < k ? (float)(c % 251 + 1) : 0.0f)))
                    return;
            }
            free(row), free(values);
        }
}

// ---- quantize --------------------------------------------------------------------------------------------

TEST(quantize_fp8)
{
    enum { ROWS = 300, COLS = 200 };
    random_state = 34;
    float *values = floats(ROWS * COLS), *back = floats(ROWS * COLS), scale[6];
    uint8_t *data = (uint8_t *)malloc(ROWS * COLS);
    dsv3_tensor t;
    dsv3_error e;
    for (size_t r = 0; r < ROWS; r++)
        for (size_t c = 0; c < COLS; c++)
            values[r * COLS + c] = r / 128 == 1 && c / 128 == 0 ? 0.0f : random_float() * (float)(1 + r / 128);
    CHECK_OK(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), e);
    CHECK(t.data == data && t.scale == scale && t.dtype == DSV3_DTYPE_F8_E4M3 && t.scale_dtype == DSV3_DTYPE_F32 && t.rank == 2);
    CHECK(t.shape[0] == ROWS && t.shape[1] == COLS && t.row_stride == COLS && t.scale_stride == 2 && t.block_rows == 128 && t.block_cols == 128);
    CHECK_OK(dsv3_dequantize(back, &t, 0, ROWS, &e), e);
    CHECK(scale[2] == 1); /* the block of zeros */
    for (size_t b = 0; b < 6; b++) {
        float max = 0;
        for (size_t r = b / 2 * 128; r < ROWS && r < b / 2 * 128 + 128; r++)
            for (size_t c = b % 2 * 128; c < COLS && c < b % 2 * 128 + 128; c++) {
                float v = values[r * COLS + c];
                max = fmaxf(max, fabsf(v));
                /* half a step: 2^-4 of the value, or half of the smallest code */
                CHECK_NEAR(back[r * COLS + c], v, fmaxf(fabsf(v) / 15.99f, scale[b] / 1023.0f));
                CHECK_EQ_INT(data[r * COLS + c], dsv3__fp8_encode(v / scale[b]));
            }
        if (b != 2)
            CHECK(scale[b] == max / 448.0f);
    }
    /* what cannot be */
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS - 1, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 5, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, NULL, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_I16, values, ROWS, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, 0, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, 0, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_quantize(&t, NULL, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, NULL, ROWS, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_quantize(NULL, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, UINT64_MAX / 2, 3, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    values[7 * COLS + 5] = INFINITY;
    CHECK_RESULT(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "[7, 5]");
    CHECK(t.data == NULL && t.rank == 0); /* failure leaves an empty tensor */
    /* tiny and huge values keep their scale, or lose everything, but never make a NaN */
    for (int i = 0; i < 4; i++) {
        static const float size[] = {3.4e38f, 1e-30f, 1e-40f, 1.4e-45f};
        for (size_t c = 0; c < ROWS * COLS; c++)
            values[c] = size[i] * ((float)((int)(c % 5) - 2) / 2);
        CHECK_OK(dsv3_quantize(&t, data, ROWS * COLS, scale, 6, DSV3_DTYPE_F8_E4M3, values, ROWS, COLS, &e), e);
        CHECK_OK(dsv3_dequantize(back, &t, 0, ROWS, &e), e);
        CHECK_NEAR(back[4], size[i], i < 2 ? size[i] * 1e-6f : size[i] * 1.1f);
        CHECK(back[2] == 0);
    }
    free(values), free(back), free(data);
}

TEST(quantize_i8)
{
    enum { ROWS = 37, COLS = 200 };
    random_state = 35;
    float *values = floats(ROWS * COLS), *back = floats(ROWS * COLS), scale[ROWS];
    int8_t data[ROWS * COLS];
    dsv3_tensor t;
    dsv3_error e;
    for (size_t i = 0; i < ROWS * COLS; i++)
        values[i] = i / COLS == 5 ? 0.0f : random_float() * ldexpf(1, (int)(i / COLS) - 20);
    for (size_t c = 0; c < COLS; c++) /* scale 1, halves: ties go to the even code */
        values[7 * COLS + c] = c == 3 ? -127.0f : (float)((int)c - 100) / 2;
    CHECK_OK(dsv3_quantize(&t, data, sizeof data, scale, ROWS, DSV3_DTYPE_I8, values, ROWS, COLS, &e), e);
    CHECK(t.data == data && t.scale == scale && t.dtype == DSV3_DTYPE_I8 && t.scale_dtype == DSV3_DTYPE_F32 && t.rank == 2);
    CHECK(t.shape[0] == ROWS && t.shape[1] == COLS && t.row_stride == COLS && t.scale_stride == 1 && t.block_rows == 1 && t.block_cols == COLS);
    CHECK_OK(dsv3_dequantize(back, &t, 0, ROWS, &e), e);
    CHECK(scale[5] == 1 && scale[7] == 1);
    for (size_t r = 0; r < ROWS; r++) {
        float max = 0;
        int most = 0;
        for (size_t c = 0; c < COLS; c++) {
            size_t i = r * COLS + c;
            max = fmaxf(max, fabsf(values[i]));
            most = abs(data[i]) > most ? abs(data[i]) : most;
            CHECK_NEAR(back[i], values[i], 0.50001f * scale[r]);
            CHECK(back[i] == (float)data[i] * scale[r]);
            if (r == 7 && c != 3) {
                int twice = (int)c - 100, down = (twice - (twice & 1)) / 2;
                CHECK_EQ_INT(data[i], !(twice & 1) ? twice / 2 : down % 2 ? down + 1 : down);
            }
        }
        if (r != 5) {
            CHECK(scale[r] == max / 127.0f);
            CHECK_EQ_INT(most, 127);
        }
    }
    /* what is read: -128 too, scales of every dtype, rows of one scale and blocks */
    data[3 * COLS + 199] = -128;
    CHECK_OK(dsv3_dequantize(back, &t, 3, 1, &e), e);
    CHECK(back[199] == -128.0f * scale[3]);
    static const dsv3_dtype kinds[] = {DSV3_DTYPE_F32, DSV3_DTYPE_F16, DSV3_DTYPE_BF16, DSV3_DTYPE_F8_E8M0};
    static const uint32_t blocks[][2] = {{1, 200}, {1, 4000}, {128, 128}, {8, 64}, {1, 128}};
    for (size_t k = 0; k < DSV3__COUNT(kinds); k++)
        for (size_t b = 0; b < DSV3__COUNT(blocks); b++) {
            uint8_t stored[ROWS * 4 * 4];
            dsv3_tensor v = t;
            bool ok = true;
            for (size_t i = 0; i < ROWS * 4; i++) {
                float f = 0.5f + fabsf(random_float());
                uint16_t h = kinds[k] == DSV3_DTYPE_F16 ? dsv3__f16_encode(f) : dsv3__bf16_encode(f);
                uint8_t c = (uint8_t)(120 + random_bits() % 10);
                memcpy(stored + i * dsv3_dtype_size(kinds[k]), k == 0 ? (void *)&f : k == 3 ? (void *)&c : (void *)&h, dsv3_dtype_size(kinds[k]));
            }
            v.scale = stored;
            v.scale_dtype = kinds[k];
            v.block_rows = blocks[b][0];
            v.block_cols = blocks[b][1];
            v.scale_stride = (COLS + blocks[b][1] - 1) / blocks[b][1];
            CHECK_OK(dsv3_dequantize(back, &v, 0, ROWS, &e), e);
            for (size_t i = 0; i < ROWS * COLS; i++) {
                size_t at = i / COLS / blocks[b][0] * (size_t)v.scale_stride + i % COLS / blocks[b][1];
                volatile float expect = (float)data[i] * dsv3__num_get(stored, kinds[k], at);
                ok = ok && back[i] == expect;
            }
            CHECK(ok);
        }
    /* what cannot be */
    CHECK_RESULT(dsv3_quantize(&t, data, sizeof data - 1, scale, ROWS, DSV3_DTYPE_I8, values, ROWS, COLS, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_RESULT(dsv3_quantize(&t, data, sizeof data, scale, ROWS - 1, DSV3_DTYPE_I8, values, ROWS, COLS, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_RESULT(dsv3_quantize(&t, data, sizeof data, scale, 1, DSV3_DTYPE_I8, values, 1, (uint64_t)1 << 32, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    values[7 * COLS + 5] = NAN;
    CHECK_RESULT(dsv3_quantize(&t, data, sizeof data, scale, ROWS, DSV3_DTYPE_I8, values, ROWS, COLS, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "[7, 5]");
    /* tiny and huge values keep their scale, or lose everything, but never make a NaN */
    for (int i = 0; i < 4; i++) {
        static const float size[] = {3.4e38f, 1e-30f, 1e-40f, 1.4e-45f};
        for (size_t c = 0; c < ROWS * COLS; c++)
            values[c] = size[i] * ((float)((int)(c % 5) - 2) / 2);
        CHECK_OK(dsv3_quantize(&t, data, sizeof data, scale, ROWS, DSV3_DTYPE_I8, values, ROWS, COLS, &e), e);
        CHECK_OK(dsv3_dequantize(back, &t, 0, ROWS, &e), e);
        CHECK_NEAR(back[4], size[i], i < 2 ? size[i] * 1e-6f : size[i] * 1.1f);
        CHECK(back[2] == 0);
    }
    free(values), free(back);
}

TEST(quantize_floats)
{
    static const float values[] = {0, -0.0f, 1, -1.0f / 3, 65504, 65520, 1e-8f, 3.0e38f, INFINITY, NAN, 6e-8f, 1.00048828125f};
    enum { N = DSV3__COUNT(values) };
    uint8_t data[4 * N];
    float back[N];
    dsv3_tensor t;
    dsv3_error e;
    for (size_t d = 0; d < 3; d++) {
        CHECK_OK(dsv3_quantize(&t, data, N * dsv3_dtype_size(dtypes[d]), NULL, 0, dtypes[d], values, 1, N, &e), e);
        CHECK(!t.scale && t.block_rows == 0 && t.scale_dtype == DSV3_DTYPE_UNKNOWN);
        CHECK_OK(dsv3_dequantize(back, &t, 0, 1, &e), e);
        for (size_t i = 0; i < N; i++) {
            double v = (double)values[i], step = dtypes[d] == DSV3_DTYPE_F32 ? 0 : dtypes[d] == DSV3_DTYPE_F16 ? 11 : 8;
            if (values[i] != values[i])
                CHECK(back[i] != back[i]);
            else if (dtypes[d] == DSV3_DTYPE_F16 && values[i] > 65519)
                CHECK(back[i] == INFINITY);
            else if (values[i] == INFINITY)
                CHECK(back[i] == INFINITY);
            else
                CHECK_NEAR(back[i], v, step > 0 ? fmax(fabs(v) * ldexp(1, (int)-step), dtypes[d] == DSV3_DTYPE_F16 ? ldexp(1, -25) : 0) : 0);
            CHECK(!(values[i] == 0) || dsv3__float_bits(back[i]) == dsv3__float_bits(values[i]));
        }
        CHECK_RESULT(dsv3_quantize(&t, data, N * dsv3_dtype_size(dtypes[d]) - 1, NULL, 0, dtypes[d], values, 1, N, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    }
}

TEST(dtypes_of_safetensors)
{
    static const char *const names[] = {"?",   "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F8_E5M2", "I8",  "U8",
                                        "I16", "U16", "I32", "U32",  "I64",     "U64",     "F64",     "BOOL"};
    static const size_t sizes[] = {0, 4, 2, 2, 1, 1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 8, 1};
    for (size_t i = 0; i < DSV3__COUNT(names); i++) {
        CHECK_EQ_STR(dsv3_dtype_name((dsv3_dtype)i), names[i]);
        CHECK_EQ_UINT(dsv3_dtype_size((dsv3_dtype)i), sizes[i]);
    }
    CHECK_EQ_STR(dsv3_dtype_name((dsv3_dtype)1000), "?");
    CHECK_EQ_UINT(dsv3_dtype_size((dsv3_dtype)1000), 0);
}

/* Outputs of a task: long, but four tasks to a thread where that leaves 64 (128 of many rows), and a scratch that holds them. */
TEST(tasks_of_a_join)
{
    static const uint32_t outputs[] = {1, 64, 100, 576, 2048, 7168, 12672, 129280};
    static dsv3__work w;
    static dsv3__pool pool;
    w.pool = &pool;
    for (int tiled = 0; tiled < 2; tiled++)
        for (pool.n_threads = 1, w.tiled = tiled != 0; pool.n_threads <= 64; pool.n_threads++)
            for (size_t i = 0; i < DSV3__COUNT(outputs); i++) {
                const uint32_t strip = dsv3__nn_strip(&w, outputs[i]), least = tiled ? 128 : 64, most = tiled ? 256 : 512;
                CHECK(strip >= least && strip <= most && (strip & (strip - 1)) == 0);
                CHECK(strip <= (tiled ? DSV3__STRIP_MANY : DSV3__STRIP_FEW));
                if (pool.n_threads > 1) /* as few tasks as that leaves, no fewer */
                    CHECK((strip == least || outputs[i] >= 4 * strip * pool.n_threads) &&
                          (strip == most || outputs[i] < 8 * strip * pool.n_threads));
            }
}

TEST_MAIN(RUN(bits), RUN(bits_are_frozen), RUN(accuracy), RUN(rows_are_independent), RUN(executors), RUN(allocators),
          RUN(floating_point_state), RUN(errors), RUN(blocks_and_strides), RUN(rank_1), RUN(scratch_of_the_widest), RUN(strips), RUN(packing), RUN(quantize_fp8), RUN(quantize_i8),
          RUN(quantize_floats), RUN(dtypes_of_safetensors), RUN(tasks_of_a_join))
