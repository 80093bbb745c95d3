/* The floors num and kern: conversions against their definitions, every kernel against a plain reading of the contract
   that stands above it in dsv3.h, and all variants against each other, bit for bit. */
#ifdef TEST_EMULATE_AVX512
#include "emulate_avx512.h"
#endif
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"

// ---- Helpers ---------------------------------------------------------------------------------------------

static uint64_t random_state = 1;

static uint32_t random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

/* Nearly normal, both signs, exponents that differ. */
static float random_float(void)
{
    int sum = 0;
    for (int i = 0; i < 4; i++)
        sum += (int)(random_bits() & 0xFFFF) - 0x8000;
    return (float)sum / 65536.0f;
}

/* All instruction sets there are, on any machine. */
static const dsv3_isa isas[] = {DSV3_ISA_SCALAR,      DSV3_ISA_AVX2,        DSV3_ISA_AVX512,     DSV3_ISA_AVX_VNNI,
                                DSV3_ISA_AVX512_VNNI, DSV3_ISA_AVX512_BF16, DSV3_ISA_AVX512_AMX, DSV3_ISA_NEON};
#define N_ISAS (sizeof isas / sizeof isas[0])

/* Kernel tables that this machine can run, or emulates, scalar first. */
static size_t variants(const dsv3__kern *list[N_ISAS + 1])
{
    size_t n = 0;
    for (size_t i = 0; i < N_ISAS; i++)
        if (dsv3_isa_supported(isas[i]) && (isas[i] != DSV3_ISA_AVX512_AMX || dsv3__cpu_lend_tiles()))
            list[n++] = dsv3__kern_get(isas[i]);
#if DSV3__AVX512 && DSV3__VNNI
    if (dsv3_isa_supported(DSV3_ISA_AVX512_BF16)) /* and what a CPU that asks otherwise would run */
        list[n++] = dsv3__cpu_asks_once() ? &dsv3__kern_avx512_bf16 : &dsv3__kern_avx512_bf16_once;
#endif
#if DSV3__NEON
    if (dsv3__cpu_dotprod()) /* and what a CPU without would run */
        list[n++] = &dsv3__kern_neon;
#endif
    return n;
}

#define FOR_VARIANTS(k)                                         \
    const dsv3__kern *variant_list[N_ISAS + 1], *k;             \
    size_t n_variants = variants(variant_list), variant_at = 0; \
    while (variant_at < n_variants && (k = variant_list[variant_at++], true))

static bool same_bits(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof(float)) == 0;
}

/* A block of exactly n bytes at an odd address: a sanitizer sees a byte too many, alignment faults show. */
typedef struct exact {
    uint8_t *block, *p;
} exact;

static exact exact_copy(const void *data, size_t n, size_t shift)
{
    exact e;
    e.block = (uint8_t *)malloc(n + shift + 1);
    e.p = e.block + shift;
    if (n)
        memcpy(e.p, data, n);
    e.block = (uint8_t *)realloc(e.block, n + shift ? n + shift : 1);
    e.p = e.block + shift;
    return e;
}

static size_t column_of(size_t position, dsv3_dtype dtype)
{
    size_t in = position % 64;
    return dtype == DSV3_DTYPE_F8_E4M3 ? position / 64 * 64 + in % 16 * 4 + in / 16 : position;
}

/* The value of code c, from its definition. */
static float fp8_by_definition(unsigned c)
{
    int e = c >> 3 & 15, m = c & 7;
    double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    if ((c & 0x7F) == 0x7F)
        return NAN;
    return (float)(c & 0x80 ? -v : v);
}

/* The value in column i of k; behind them, of a zero, or of a code 0 of FP8 or I8. */
static float value_at(const uint8_t *w, size_t i, size_t k, dsv3_dtype dtype, const float *scale64)
{
    uint16_t h;
    float f;
    if (i >= k && dtype != DSV3_DTYPE_F8_E4M3 && dtype != DSV3_DTYPE_I8)
        return 0.0f;
    switch (dtype) {
    case DSV3_DTYPE_I8: {
        volatile float product = (i < k ? (float)(int8_t)w[i] : 0.0f) * scale64[i / 64];
        return product;
    }
    case DSV3_DTYPE_F8_E4M3: {
        volatile float product = (i < k ? fp8_by_definition(w[i]) : 0.0f) * scale64[i / 64];
        return product;
    }
    case DSV3_DTYPE_F32: memcpy(&f, w + 4 * i, 4); return f;
    case DSV3_DTYPE_BF16: {
        memcpy(&h, w + 2 * i, 2);
        uint32_t bits = (uint32_t)h << 16;
        memcpy(&f, &bits, 4);
        return f;
    }
    default: {
        memcpy(&h, w + 2 * i, 2);
        int e = h >> 10 & 31, m = h & 1023;
        double v = e == 31 ? (m ? NAN : INFINITY) : e ? ldexp(1 + m / 1024.0, e - 15) : ldexp(m / 1024.0, -14);
        return (float)(h & 0x8000 ? -v : v);
    }
    }
}

/* The contract of a dot product, word for word. x in order of columns. */
static float dot_by_definition(const uint8_t *w, const float *x, const float *scale64, size_t k, dsv3_dtype dtype)
{
    float chain[64], t[16];
    for (int c = 0; c < 64; c++)
        chain[c] = 0.0f;
    for (size_t i = 0; i < (k + 63) / 64 * 64; i++) {
        size_t column = column_of(i, dtype);
        float wv = value_at(w, column, k, dtype, scale64), xv = column < k ? x[column] : 0.0f;
        chain[i % 64] = fmaf(wv, xv, chain[i % 64]);
    }
    for (int i = 0; i < 16; i++) {
        volatile float a = chain[i] + chain[16 + i], b = chain[32 + i] + chain[48 + i];
        t[i] = a + b;
    }
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] = t[i] + t[i + n];
    if (t[0] != t[0]) {
        uint32_t nan = 0x7FC00000;
        memcpy(t, &nan, 4);
    }
    return t[0];
}

/* n weights of moderate size; for F8_E4M3 any code but NaN. */
static void random_weights(uint8_t *w, size_t n, dsv3_dtype dtype)
{
    for (size_t i = 0; i < n; i++) {
        float f = random_float();
        uint16_t h;
        switch (dtype) {
        case DSV3_DTYPE_F32: memcpy(w + 4 * i, &f, 4); break;
        case DSV3_DTYPE_F16:
            h = dsv3__f16_encode(i % 7 ? f : f * 1e-6f); /* some denormal */
            memcpy(w + 2 * i, &h, 2);
            break;
        case DSV3_DTYPE_BF16:
            h = dsv3__bf16_encode(f);
            memcpy(w + 2 * i, &h, 2);
            break;
        default:
            do
                w[i] = (uint8_t)random_bits();
            while ((w[i] & 0x7F) == 0x7F);
        }
    }
}

/* x in order of columns -> packed, zeros behind. */
static void pack(float *packed, const float *x, size_t k, dsv3_dtype dtype)
{
    for (size_t i = 0; i < (k + 63) / 64 * 64; i++) {
        size_t column = column_of(i, dtype);
        packed[i] = column < k ? x[column] : 0.0f;
    }
}

static const dsv3_dtype dtypes[] = {DSV3_DTYPE_F32, DSV3_DTYPE_F16, DSV3_DTYPE_BF16, DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_I8};
static const size_t widths[] = {1,   2,   3,   4,   31,  32,  33,  63,   64,   65,   96,   127,  128,
                                129, 191, 320, 511, 512, 513, 576, 1000, 1024, 1088, 1408, 2048, 2112};
#define MOST 2112

// ---- Conversions -----------------------------------------------------------------------------------------

TEST(fp8_decode)
{
    for (unsigned c = 0; c < 256; c++) {
        float v = fp8_by_definition(c);
        if (v != v) {
            CHECK(dsv3__fp8_value[c] != dsv3__fp8_value[c]);
        } else {
            CHECK(same_bits(&dsv3__fp8_value[c], &v, 1));
        }
    }
    CHECK(dsv3__fp8_value[0x01] == 0.001953125f && dsv3__fp8_value[0x07] == 0.013671875f &&
          dsv3__fp8_value[0x38] == 1.0f);
    CHECK(dsv3__fp8_value[0x77] == 240.0f && dsv3__fp8_value[0x7E] == 448.0f && dsv3__fp8_value[0xC8] == -4.0f);
}

/* Around every code and every midpoint: the nearest, ties to the even code. */
TEST(fp8_encode)
{
    for (unsigned sign = 0; sign < 2; sign++)
        for (unsigned c = 0; c < 0x7F; c++) {
            float v = fp8_by_definition(c), next = c == 0x7E ? 480.0f : fp8_by_definition(c + 1),
                  s = sign ? -1.0f : 1.0f;
            float middle = (v + next) / 2;
            unsigned up = c == 0x7E ? c : c + 1;
            CHECK_EQ_INT(dsv3__fp8_encode(s * v), sign << 7 | c);
            CHECK_EQ_INT(dsv3__fp8_encode(s * nextafterf(middle, 0)), sign << 7 | c);
            CHECK_EQ_INT(dsv3__fp8_encode(s * middle), sign << 7 | (c & 1 ? up : c));
            CHECK_EQ_INT(dsv3__fp8_encode(s * nextafterf(middle, 1000)), sign << 7 | up);
        }
    CHECK_EQ_INT(dsv3__fp8_encode(0.0f), 0);
    CHECK_EQ_INT(dsv3__fp8_encode(-0.0f), 0x80);
    CHECK_EQ_INT(dsv3__fp8_encode(1e-45f), 0);
    CHECK_EQ_INT(dsv3__fp8_encode(1e30f), 0x7E);
    CHECK_EQ_INT(dsv3__fp8_encode(-INFINITY), 0xFE);
    CHECK_EQ_INT(dsv3__fp8_encode(NAN), 0x7F);
    for (int i = 0; i < 200000; i++) { /* none is nearer than the one chosen */
        uint32_t bits = random_bits();
        float v;
        memcpy(&v, &bits, 4);
        if (!(fabsf(v) <= 448.0f))
            continue;
        unsigned c = dsv3__fp8_encode(v), mag = c & 0x7F;
        double here = fabs((double)fp8_by_definition(c) - (double)v);
        if (mag > 0 && !CHECK(here <= fabs((double)fp8_by_definition(c - 1) - (double)v)))
            return;
        if (mag < 0x7E && !CHECK(here <= fabs((double)fp8_by_definition(c + 1) - (double)v)))
            return;
    }
}

/* Integers, halves (to the even one) and their neighbours; clamped at +-127; every code that can be read. */
TEST(i8)
{
    for (int i = -127; i <= 127; i++) {
        float v = (float)i, half = v + 0.5f;
        int even = i % 2 ? i + 1 : i;
        CHECK_EQ_INT(dsv3__i8_encode(v), i);
        CHECK_EQ_INT(dsv3__i8_encode(nextafterf(half, -1e9f)), i);
        CHECK_EQ_INT(dsv3__i8_encode(half), even > 127 ? 127 : even);
        CHECK_EQ_INT(dsv3__i8_encode(nextafterf(half, 1e9f)), i < 127 ? i + 1 : 127);
    }
    CHECK_EQ_INT(dsv3__i8_encode(-127.5f), -127);
    CHECK_EQ_INT(dsv3__i8_encode(-1e30f), -127);
    CHECK_EQ_INT(dsv3__i8_encode(INFINITY), 127);
    CHECK_EQ_INT(dsv3__i8_encode(-INFINITY), -127);
    CHECK_EQ_INT(dsv3__i8_encode(NAN), 0);
    CHECK_EQ_INT(dsv3__i8_encode(-1e-45f), 0);
    for (int i = -128; i <= 127; i++) {
        int8_t code = (int8_t)i;
        CHECK(dsv3__num_get(&code, DSV3_DTYPE_I8, 0) == (float)i);
    }
}

TEST(f16_and_bf16)
{
    for (unsigned h = 0; h < 0x10000; h++) {
        uint8_t two[2] = {(uint8_t)h, (uint8_t)(h >> 8)};
        float f = dsv3__f16_decode((uint16_t)h), v = value_at(two, 0, 1, DSV3_DTYPE_F16, NULL);
        bool nan = (h & 0x7C00) == 0x7C00 && (h & 0x3FF);
        if (!CHECK(nan ? f != f : same_bits(&f, &v, 1)))
            return;
        if (!CHECK(nan ? (dsv3__f16_encode(f) & 0x7E00) == 0x7E00 : dsv3__f16_encode(f) == h))
            return;
        f = dsv3__bf16_decode((uint16_t)h), v = value_at(two, 0, 1, DSV3_DTYPE_BF16, NULL);
        nan = (h & 0x7F80) == 0x7F80 && (h & 0x7F);
        if (!CHECK(memcmp(&f, &v, 4) == 0))
            return;
        if (!CHECK(nan ? (dsv3__bf16_encode(f) & 0x7FC0) == 0x7FC0 : dsv3__bf16_encode(f) == h))
            return;
    }
    for (unsigned h = 0; h < 0x7C00; h++) { /* positive halves and what lies between them and the next */
        float v = dsv3__f16_decode((uint16_t)h), next = h == 0x7BFF ? 65536.0f : dsv3__f16_decode((uint16_t)(h + 1));
        float middle = (v + next) / 2;
        if (!CHECK(dsv3__f16_encode(nextafterf(middle, 0)) == h && dsv3__f16_encode(middle) == h + (h & 1) &&
                   dsv3__f16_encode(nextafterf(middle, 1e9f)) == h + 1 &&
                   dsv3__f16_encode(-middle) == (0x8000 | (h + (h & 1)))))
            return;
    }
    for (unsigned h = 0; h < 0x7F80; h++) {
        uint32_t b = (uint32_t)h << 16;
        float below = dsv3__bits_float(b + 0x7FFF), middle = dsv3__bits_float(b + 0x8000),
              above = dsv3__bits_float(b + 0x8001);
        if (!CHECK(dsv3__bf16_encode(below) == h && dsv3__bf16_encode(middle) == h + (h & 1) &&
                   dsv3__bf16_encode(above) == h + 1))
            return;
    }
    CHECK_EQ_INT(dsv3__f16_encode(1e-30f), 0);
    CHECK_EQ_INT(dsv3__f16_encode(INFINITY), 0x7C00);
}

TEST(e8m0)
{
    for (int c = 0; c < 255; c++)
        CHECK(dsv3__e8m0_decode((uint8_t)c) == (float)ldexp(1.0, c - 127));
    CHECK(dsv3__e8m0_decode(255) != dsv3__e8m0_decode(255));
}

// ---- Dot products and rows -------------------------------------------------------------------------------

/* Each of the 256 codes at each of the 64 columns of a block: value, place, and nothing elsewhere. */
TEST(fp8_codes_everywhere)
{
    static uint8_t w[256 * 64];
    static float scale64[256], out[256 * 64];
    FOR_VARIANTS(k)
    {
        for (int c = 0; c < 256; c++)
            scale64[c] = 0.75f + (float)c / 128.0f;
        for (size_t column = 0; column < 64; column++) {
            memset(w, 0, sizeof w);
            for (size_t c = 0; c < 256; c++)
                w[c * 64 + column] = (uint8_t)c;
            for (int natural = 0; natural < 2; natural++) {
                (natural ? k->nat_fp8 : k->row_fp8)(out, 64, k->lanes, w, scale64, sizeof w);
                for (size_t i = 0; i < sizeof w; i++) {
                    size_t at = natural ? i : column_of(i, DSV3_DTYPE_F8_E4M3);
                    float expected = value_at(w, at, sizeof w, DSV3_DTYPE_F8_E4M3, scale64);
                    if (!CHECK(expected != expected ? out[i] != out[i] : same_bits(&out[i], &expected, 1)))
                        return;
                }
            }
            for (size_t c = 0; c < 256; c++) { /* one code against one 1 */
                float x[64] = {0}, packed[64],
                      expected = value_at(w + c * 64, column, 64, DSV3_DTYPE_F8_E4M3, scale64 + c), r;
                x[column] = 1.0f;
                pack(packed, x, 64, DSV3_DTYPE_F8_E4M3);
                r = k->dot_fp8(w + c * 64, packed, scale64 + c, 64);
                if (!CHECK(expected != expected ? r != r : r == expected))
                    return;
            }
        }
    }
}

/* Every width, dtype and variant: the bits of the definition, and an error within the stated bound. */
TEST(dot_bits)
{
    static uint8_t w[MOST * 4];
    static float x[MOST], packed[MOST + 64], scale64[MOST / 64 + 1];
    random_state = 11;
    for (size_t d = 0; d < DSV3__COUNT(dtypes); d++)
        for (size_t i = 0; i < DSV3__COUNT(widths); i++) {
            size_t n = widths[i], size = dsv3_dtype_size(dtypes[d]);
            random_weights(w, n, dtypes[d]);
            for (size_t c = 0; c < n; c++)
                x[c] = random_float();
            for (size_t b = 0; b < DSV3__COUNT(scale64); b++)
                scale64[b] = 0.01f + fabsf(random_float());
            pack(packed, x, n, dtypes[d]);
            float expected = dot_by_definition(w, x, scale64, n, dtypes[d]);
            double sum = 0, magnitude = 0;
            for (size_t c = 0; c < n; c++) {
                double product = (double)value_at(w, c, n, dtypes[d], scale64) * (double)x[c];
                sum += product;
                magnitude += fabs(product);
            }
            CHECK_NEAR(expected, sum, ((double)n / 64 + 8) * ldexp(1, -24) * magnitude);
            FOR_VARIANTS(k)
            {
                exact e = exact_copy(w, n * size, 1 + i % 5);
                float r = dsv3__kern_dot(k, dtypes[d])(e.p, packed, scale64, n);
                if (!CHECK(same_bits(&r, &expected, 1)))
                    printf("    %s %s width %u\n", dsv3_isa_name(k->isa), dsv3_dtype_name(dtypes[d]), (unsigned)n);
                free(e.block);
            }
        }
}

/* Rows: contiguous, spread as tiles want them, and in order of columns. */
TEST(rows)
{
    static uint8_t w[MOST * 4];
    static float scale64[MOST / 64 + 1], out[MOST + 64], spread[4 * (MOST + 64)];
    random_state = 12;
    for (size_t d = 0; d < DSV3__COUNT(dtypes); d++)
        for (size_t i = 0; i < DSV3__COUNT(widths); i++) {
            size_t n = widths[i], steps = (n + 63) / 64;
            random_weights(w, n, dtypes[d]);
            for (size_t b = 0; b < DSV3__COUNT(scale64); b++)
                scale64[b] = random_float();
            FOR_VARIANTS(k)
            {
                exact e = exact_copy(w, n * dsv3_dtype_size(dtypes[d]), 1 + i % 3);
                size_t lanes = k->lanes;
                bool ok = true;
                dsv3__kern_row(k, dtypes[d], false)(out, 64, lanes, e.p, scale64, n);
                dsv3__kern_row(k, dtypes[d], false)(spread + lanes, 4 * lanes, steps * 4 * lanes, e.p, scale64, n);
                for (size_t p = 0; p < steps * 64; p++) {
                    size_t c = column_of(p, dtypes[d]), b = p / 64, g = p % 64 / lanes, l = p % lanes;
                    float expected = value_at(w, c, n, dtypes[d], scale64);
                    ok = ok && same_bits(&out[p], &expected, 1) &&
                         same_bits(&spread[g * steps * 4 * lanes + b * 4 * lanes + lanes + l], &expected, 1);
                }
                (dtypes[d] == DSV3_DTYPE_F8_E4M3 ? k->nat_fp8 : dsv3__kern_row(k, dtypes[d], false))(out, 64, lanes,
                                                                                                     e.p, scale64, n);
                for (size_t c = 0; c < steps * 64; c++) {
                    float expected = value_at(w, c, n, dtypes[d], scale64);
                    ok = ok && same_bits(&out[c], &expected, 1);
                }
                CHECK(ok);
                free(e.block);
            }
        }
}

/* A NaN code anywhere, against 0 too, is a NaN with the agreed bits. */
TEST(nan_codes)
{
    static uint8_t w[1100];
    static float packed[1152], scale64[18], out[1152];
    const uint32_t nan = 0x7FC00000;
    random_state = 13;
    random_weights(w, sizeof w, DSV3_DTYPE_F8_E4M3);
    for (size_t b = 0; b < 18; b++)
        scale64[b] = 0.5f;
    FOR_VARIANTS(k)
    for (size_t at = 0; at < sizeof w; at++) {
        uint8_t was = w[at];
        w[at] = at % 2 ? 0x7F : 0xFF;
        float r = k->dot_fp8(w, packed, scale64, sizeof w);
        if (!CHECK(memcmp(&r, &nan, 4) == 0))
            return;
        k->row_fp8(out, 64, k->lanes, w, scale64, sizeof w);
        for (size_t p = 0; p < sizeof w; p++)
            if (!CHECK((out[p] != out[p]) == (column_of(p, DSV3_DTYPE_F8_E4M3) == at)))
                return;
        k->nat_fp8(out, 64, k->lanes, w, scale64, sizeof w);
        for (size_t p = 0; p < sizeof w; p++)
            if (!CHECK((out[p] != out[p]) == (p == at)))
                return;
        w[at] = was;
    }
}

/* Scales that the folded 2^120 does not carry, and those that are hardly there. */
TEST(scales)
{
    static const float extreme[] = {127.0f, 128.0f,  255.0f,         256.0f,    -256.0f,  1e4f,
                                    1e30f,  3.4e38f, INFINITY,       -INFINITY, NAN,      0.0f,
                                    -0.0f,  1e-30f,  1.1754944e-38f, 1e-40f,    1.4e-45f, -3.0f};
    enum { K = 300 };
    static uint8_t w[K];
    static float x[K], packed[320], scale64[5], out[320], expected[320];
    random_state = 14;
    random_weights(w, K, DSV3_DTYPE_F8_E4M3);
    for (size_t c = 0; c < K; c++)
        x[c] = random_float();
    pack(packed, x, K, DSV3_DTYPE_F8_E4M3);
    for (size_t i = 0; i < DSV3__COUNT(extreme); i++)
        for (size_t b = 0; b < 5; b++) {
            for (size_t j = 0; j < 5; j++)
                scale64[j] = j == b ? extreme[i] : 0.25f;
            float dot = dot_by_definition(w, x, scale64, K, DSV3_DTYPE_F8_E4M3);
            FOR_VARIANTS(k)
            {
                float r = k->dot_fp8(w, packed, scale64, K);
                CHECK(same_bits(&r, &dot, 1));
                for (int natural = 0; natural < 2; natural++) {
                    (natural ? k->nat_fp8 : k->row_fp8)(out, 64, k->lanes, w, scale64, K);
                    for (size_t p = 0; p < 320; p++) {
                        size_t c = natural ? p : column_of(p, DSV3_DTYPE_F8_E4M3);
                        expected[p] = value_at(w, c, K, DSV3_DTYPE_F8_E4M3, scale64);
                        if (!CHECK(expected[p] != expected[p] ? out[p] != out[p] : same_bits(&out[p], &expected[p], 1)))
                            return;
                    }
                }
            }
        }
}

// ---- Tiles -----------------------------------------------------------------------------------------------

/* A tile is so many dot products: any size of it, any neighbours, through an index or not. */
TEST(tile_bits)
{
    static const size_t sizes[] = {1, 2, 3, 4, 5, 7, 13}, depths[] = {64, 512, 576, 1088};
    enum { ROWS = 13, STRIDE = 1152 };
    static float w[ROWS * STRIDE], x[ROWS * STRIDE], out[ROWS * 16], dots[ROWS * ROWS];
    static const uint32_t index[ROWS] = {12, 3, 3, 0, 7, 1, 11, 2, 9, 4, 5, 8, 6};
    random_state = 15;
    for (size_t i = 0; i < ROWS * STRIDE; i++)
        w[i] = random_float(), x[i] = random_float();
    x[5 * STRIDE + 17] = NAN; /* one row of x and one of w spoil their own results only */
    w[6 * STRIDE + 44] = INFINITY;
    for (size_t d = 0; d < DSV3__COUNT(depths); d++) {
        for (size_t j = 0; j < ROWS; j++)
            for (size_t i = 0; i < ROWS; i++)
                dots[j * ROWS + i] = dot_by_definition((const uint8_t *)(w + i * STRIDE), x + j * STRIDE, NULL,
                                                       depths[d], DSV3_DTYPE_F32);
        for (size_t a = 0; a < DSV3__COUNT(sizes); a++)
            for (size_t b = 0; b < DSV3__COUNT(sizes); b++)
                for (int indexed = 0; indexed < 2; indexed++) {
                    FOR_VARIANTS(k)
                    {
                        size_t n_w = sizes[a], n_x = sizes[b];
                        bool ok = true;
                        memset(out, 0x11, sizeof out);
                        k->tile(out, 16, w, STRIDE, n_w, x, STRIDE, indexed ? index : NULL, n_x, depths[d]);
                        for (size_t j = 0; j < n_x; j++)
                            for (size_t i = 0; i < n_w; i++)
                                ok = ok && same_bits(&out[j * 16 + i], &dots[(indexed ? index[j] : j) * ROWS + i], 1);
                        for (size_t i = 0; i < ROWS * 16; i++) /* nothing else is written */
                            ok = ok && ((i % 16 < n_w && i / 16 < n_x) || dsv3__float_bits(out[i]) == 0x11111111);
                        if (!CHECK(ok))
                            printf("    %s %u x %u, %u deep\n", dsv3_isa_name(k->isa), (unsigned)n_w, (unsigned)n_x,
                                   (unsigned)depths[d]);
                    }
                }
    }
}

// ---- Pairs, codes of 8 bits ------------------------------------------------------------------------------

/* The column of position i of a block of 64, word for word from the contract. */
static size_t pair_column(size_t i, dsv3_dtype dtype)
{
    size_t r = i % 32 / 16, lane = i % 16, second = i < 32;
    return (dtype == DSV3_DTYPE_F8_E4M3 ? 4 * lane + 2 * r : 32 * r + 2 * lane) + second;
}

/* Floats at positions in pairs, n a multiple of 64 -> what x of the variant's dot products looks like. The floats are bf16. */
static void pair_form(float *to, const float *x, size_t n, bool words)
{
    memcpy(to, x, n * sizeof(float));
    for (size_t i = 0; words && i < n / 2; i++) {
        const float *block = x + i / 32 * 64;
        uint32_t second = dsv3__float_bits(block[i % 32]), first = dsv3__float_bits(block[32 + i % 32]), word;
        word = (second & 0xFFFF0000) | first >> 16;
        memcpy(to + i, &word, 4);
    }
}

static float pair_value(const uint8_t *w, size_t c, size_t k, dsv3_dtype dtype)
{
    const float one = 1;
    const size_t block = c / 64 * 64;
    return c < k ? value_at(w + block * dsv3_dtype_size(dtype), c - block, k - block, dtype, &one) : 0;
}

/* As dot_by_definition, x at positions. */
static float pair_dot(const uint8_t *w, const float *x, size_t k, dsv3_dtype dtype)
{
    float chain[32] = {0}, t[16];
    for (size_t i = 0; i < (k + 63) / 64 * 64; i++)
        chain[i % 32] = fmaf(pair_value(w, i / 64 * 64 + pair_column(i % 64, dtype), k, dtype), x[i], chain[i % 32]);
    for (int i = 0; i < 16; i++)
        t[i] = chain[i] + chain[16 + i];
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] = t[i] + t[i + n];
    return t[0] == t[0] ? t[0] : dsv3__bits_float(DSV3__NAN_BITS);
}

static const dsv3_dtype pair_dtypes[] = {DSV3_DTYPE_BF16, DSV3_DTYPE_F8_E4M3};

static float pairs_dot(const dsv3__kern *k, dsv3_dtype dtype, const void *w, const float *x, size_t n)
{
    float r;
    dsv3__kern_dots(k, dtype)(&r, 1, w, 0, 1, &x, 1, n, w);
    return r;
}

/* Where float p of rows in pairs goes, in blocks `block` apart, registers `group` apart. */
static size_t pair_place(size_t p, size_t block, size_t group, const dsv3__kern *k)
{
    if (k->pair_words)
        return p / 32 * block + p % 32 / k->lanes * group + p % k->lanes;
    return p / 64 * block + p % 64 / 32 * (block / 2) + p % 32 / k->lanes * group + p % k->lanes;
}

/* Dot products, rows and rounding in pairs: every width, dtype and variant. */
TEST(pairs)
{
    enum { PAD = (MOST + 63) / 64 * 64, ROWS = 7 };
    static uint8_t w[MOST * 2];
    static float many[ROWS][PAD], doubled[PAD];
    static float x[PAD], form[PAD], at[PAD], expected[PAD], out[PAD], spread[6 * PAD + 32], scale64[PAD / 64], raw[PAD];
    random_state = 31;
    for (size_t d = 0; d < 2; d++)
        for (size_t i = 0; i < DSV3__COUNT(widths); i++) {
            const size_t n = widths[i], padded = (n + 63) / 64 * 64;
            random_weights(w, n, pair_dtypes[d]);
            for (size_t p = 0; p < n && d && i % 2; p++)
                w[p] = (uint8_t)(p == 700 ? 0x83 : (w[p] & 0xBF) | 0x20); /* at most one that is denormal */
            for (size_t p = 0; p < padded; p++) {
                raw[p] = random_float();
                x[p] = dsv3__bf16_decode(dsv3__bf16_encode(random_float()));
            }
            for (size_t b = 0; b < padded / 64; b++)
                scale64[b] = 0.01f + fabsf(random_float());
            const float dot = pair_dot(w, x, n, pair_dtypes[d]);
            FOR_VARIANTS(k)
            {
                const size_t unit = k->pair_words ? 2 : 1, floats = padded / unit, lanes = k->lanes;
                const size_t wide = 6 * lanes, apart = padded / 64 * wide; /* blocks and registers with gaps between them */
                exact e = exact_copy(w, n * dsv3_dtype_size(pair_dtypes[d]), 1 + i % 5);
                bool ok = true;
                for (size_t p = 0; p < padded; p++)
                    at[p] = x[p] * (pair_dtypes[d] == DSV3_DTYPE_F8_E4M3 ? k->up : 1);
                pair_form(form, at, padded, k->pair_words);
                float r = pairs_dot(k, pair_dtypes[d], e.p, form, n);
                CHECK(same_bits(&r, &dot, 1));
                for (size_t n_x = 2; n_x <= ROWS; n_x++) { /* rows of x, each twice the one before */
                    const float *rows[ROWS];
                    float dots[2 * ROWS];
                    memset(dots, 0x55, sizeof dots);
                    for (size_t j = 0; j < n_x; j++) {
                        for (size_t p = 0; p < padded; p++)
                            doubled[p] = at[p] * (float)(1 << j);
                        pair_form(many[j], doubled, padded, k->pair_words);
                        rows[j] = many[j];
                    }
                    dsv3__kern_dots(k, pair_dtypes[d])(dots, 2, e.p, 0, 1, rows, n_x, n, e.p);
                    for (size_t j = 0; j < ROWS; j++) {
                        float expect = dot * (float)(1 << j);
                        ok = ok && (j < n_x ? same_bits(&dots[2 * j], &expect, 1)
                                            : dsv3__float_bits(dots[2 * j]) == 0x55555555);
                        ok = ok && dsv3__float_bits(dots[2 * j + 1]) == 0x55555555;
                    }
                }

                for (size_t p = 0; p < padded; p++)
                    at[p] = pair_value(w, p / 64 * 64 + pair_column(p % 64, pair_dtypes[d]), n, pair_dtypes[d]);
                pair_form(expected, at, padded, k->pair_words);
                dsv3__kern_row(k, pair_dtypes[d], true)(out, 64 / unit, lanes, e.p, NULL, n);
                ok = ok && same_bits(out, expected, floats);
                dsv3__kern_row(k, pair_dtypes[d], true)(spread + lanes, wide, apart, e.p, NULL, n);
                for (size_t p = 0; p < floats; p++)
                    ok = ok && same_bits(&spread[lanes + pair_place(p, wide, apart, k)], &expected[p], 1);

                for (size_t p = 0; p < padded; p++) {
                    volatile float scaled = raw[p] * scale64[p / 64];
                    at[p] = dsv3__bf16_decode(dsv3__bf16_encode(scaled));
                }
                pair_form(expected, at, padded, k->pair_words);
                for (size_t p = 0; p < padded; p++) /* the floats of a word lie side by side, the low half's first */
                    doubled[k->pair_words ? p / 64 * 64 + p % 32 * 2 + (p % 64 < 32) : p] = raw[p];
                k->round_pairs(out, 64 / unit, lanes, doubled, scale64, 1, padded);
                ok = ok && same_bits(out, expected, floats);
                k->round_pairs(spread + lanes, wide, apart, doubled, scale64, k->up, padded);
                for (size_t p = 0; p < floats; p++) {
                    float got = spread[lanes + pair_place(p, wide, apart, k)];
                    if (!k->pair_words)
                        got /= k->up;
                    ok = ok && same_bits(&got, &expected[p], 1);
                }
                if (!CHECK(ok))
                    printf("    %s %s width %u\n", dsv3_isa_name(k->isa), dsv3_dtype_name(pair_dtypes[d]), (unsigned)n);
                free(e.block);
            }
        }
}

/* Several rows of weights by several of x, also so wide that variants take them in parts. */
TEST(pairs_of_rows)
{
    static const size_t wide[] = {130, 1408, 2320, 4224, 9000};
    enum { PAD = 9088, W = 8, X = 7 };
    static uint8_t w[W * (2 * PAD + 3)];
    static float x[X][PAD], at[PAD], form[X][PAD], expected[X][W];
    random_state = 77;
    for (size_t d = 0; d < 2; d++)
        for (size_t i = 0; i < DSV3__COUNT(wide); i++) {
            const size_t n = wide[i], padded = (n + 63) / 64 * 64, stride = n * (2 - d) + 3;
            random_weights(w, W * stride / (2 - d), pair_dtypes[d]);
            for (size_t r = 0; r < W; r++) /* what lies between two rows is of no interest */
                memset(w + (r + 1) * stride - 3, 0x7F, 3);
            for (size_t j = 0; j < X; j++) {
                for (size_t p = 0; p < padded; p++)
                    x[j][p] = dsv3__bf16_decode(dsv3__bf16_encode(random_float()));
                for (size_t r = 0; r < W; r++)
                    expected[j][r] = pair_dot(w + r * stride, x[j], n, pair_dtypes[d]);
            }
            FOR_VARIANTS(k)
            {
                const float *rows[X];
                exact e = exact_copy(w, W * stride - 3, 1 + i);
                for (size_t j = 0; j < X; j++) {
                    for (size_t p = 0; p < padded; p++)
                        at[p] = x[j][p] * (pair_dtypes[d] == DSV3_DTYPE_F8_E4M3 ? k->up : 1);
                    pair_form(form[j], at, padded, k->pair_words);
                    rows[j] = form[j];
                }
                for (size_t n_w = 1; n_w <= W; n_w += n_w)
                    for (size_t n_x = 1; n_x <= X; n_x += 1 + n_x / 5) {
                        float out[X][W + 1];
                        bool ok = true;
                        memset(out, 0x55, sizeof out);
                        dsv3__kern_dots(k, pair_dtypes[d])(out[0], W + 1, e.p, stride, n_w, rows, n_x, n, e.p);
                        for (size_t j = 0; j < X; j++)
                            for (size_t r = 0; r <= W; r++)
                                ok = ok && (j < n_x && r < n_w ? same_bits(&out[j][r], &expected[j][r], 1)
                                                               : dsv3__float_bits(out[j][r]) == 0x55555555);
                        if (!CHECK(ok))
                            printf("    %s %s width %u, %u rows by %u\n", dsv3_isa_name(k->isa),
                                   dsv3_dtype_name(pair_dtypes[d]), (unsigned)n, (unsigned)n_w, (unsigned)n_x);
                    }
                free(e.block);
            }
        }
}

/* Each of the 256 codes at each of the 64 columns of a block in pairs, against a 1 and alone in its row. */
TEST(pair_codes_everywhere)
{
    static uint8_t w[256 * 64];
    static float out[256 * 64], expected[256 * 64], at[256 * 64], x[64], form[64];
    for (size_t column = 0; column < 64; column++) {
        size_t position = 0;
        memset(w, 0, sizeof w);
        for (size_t c = 0; c < 256; c++)
            w[c * 64 + column] = (uint8_t)c;
        for (size_t p = 0; p < 64; p++)
            if (pair_column(p, DSV3_DTYPE_F8_E4M3) == column)
                position = p;
        for (size_t p = 0; p < sizeof w; p++)
            at[p] = p % 64 == position ? fp8_by_definition((unsigned)(p / 64)) : 0;
        memset(x, 0, sizeof x);
        FOR_VARIANTS(k)
        {
            x[position] = k->up;
            size_t floats = sizeof w / (k->pair_words ? 2 : 1);
            bool ok = true;
            pair_form(expected, at, sizeof w, k->pair_words);
            pair_form(form, x, 64, k->pair_words);
            k->row_fp8_pairs(out, k->pair_words ? 32 : 64, k->lanes, w, NULL, sizeof w);
            for (size_t p = 0; p < floats; p++) { /* a NaN among floats is any NaN; among words it is compared */
                bool nan = !k->pair_words && expected[p] != expected[p];
                ok = ok && (nan ? out[p] != out[p]
                                : ((dsv3__float_bits(out[p]) ^ dsv3__float_bits(expected[p])) & 0x7FFF7FFF) == 0);
            }
            for (size_t c = 0; c < 256; c++) {
                float r = pairs_dot(k, DSV3_DTYPE_F8_E4M3, w + c * 64, form, 64), v = fp8_by_definition((unsigned)c);
                ok = ok && (v != v ? dsv3__float_bits(r) == DSV3__NAN_BITS : r == v);
                /* the sign of words, where it is more than that of a 0 */
                size_t word = c * 32 + position % 32;
                uint32_t half = dsv3__float_bits(out[k->pair_words ? word : 0]) >> (position < 32 ? 16 : 0) & 0xFFFF;
                ok = ok && (!k->pair_words || v != v || half == dsv3__float_bits(v) >> 16);
            }
            if (!CHECK(ok)) {
                printf("    %s column %u\n", dsv3_isa_name(k->isa), (unsigned)column);
                return;
            }
        }
    }
}

/* to_bytes: of all lengths; ties, zeros, denormal scales, values that are not finite, at every place. */
TEST(to_bytes_bits)
{
    enum { N = 100 };
    static const float special[] = {INFINITY, -INFINITY, NAN, 1e30f, -1e30f, 1e-42f, 0, 0.5f};
    float x[N];
    random_state = 36;
    for (size_t round = 0; round < 400; round++) {
        const size_t n = 1 + round % N;
        const float largest = round % 7 == 0 ? 0 : round % 7 == 1 ? 3e-43f : round % 7 == 2 ? 127 : 5;
        for (size_t i = 0; i < n; i++) {
            x[i] = largest * ((float)(random_bits() % 4097) / 2048.0f - 1);
            x[i] = round % 7 == 2 ? rintf(2 * x[i]) / 2 : x[i]; /* of scale 1, if 127 is among them: ties */
        }
        x[random_bits() % n] = round % 7 == 2 ? 127 : largest;
        if (round % 3 == 0)
            x[random_bits() % n] = special[round / 3 % DSV3__COUNT(special)];
        int8_t expected[N + 1], codes[N + 1];
        int32_t sum, expected_sum, count = 0;
        memset(expected, 99, sizeof expected);
        const float scale = dsv3__k_to_bytes_scalar(expected, x, n, &expected_sum);
        for (size_t i = 0; i < n; i++) {
            count += expected[i];
            if (scale > 1e-30f && scale < INFINITY) /* the nearest, by the definition */
                CHECK(fabs((double)x[i] / scale - expected[i]) <= 0.5 + 1e-5);
        }
        CHECK_EQ_INT(expected_sum, count);
        FOR_VARIANTS(v)
        {
            memset(codes, 99, sizeof codes);
            const float s = v->to_bytes(codes, x, n, &sum);
            CHECK(same_bits(&s, &scale, 1) || (s != s && scale != scale));
            if (!CHECK(memcmp(codes, expected, sizeof codes) == 0 && sum == expected_sum)) {
                printf("    %s, %u values\n", dsv3_isa_name(v->isa), (unsigned)n);
                return;
            }
        }
    }
}

/* bytes: all widths, groups, numbers of rows on both sides; the extremes of codes; rows of w end where memory ends. */
TEST(bytes_bits)
{
    static const size_t n_ws[] = {1, 2, 3, 4, 5, 9, 16, 31, 32, 37}, n_xs[] = {1, 2, 3, 4, 6, 7, 13, 16, 17, 32, 35, 37, 48, 61};
    static const size_t groups[] = {128, 64, 40, 0};
    static const size_t wide[] = {1,   3,   31,  32,  33,  63,  64,   65,   127,  128,
                                  129, 200, 256, 300, 511, 576, 1000, 2112, 33000};
    enum { W = 37, X = 61, K = 33024, OUT = 40 };
    int8_t *w = (int8_t *)malloc(W * K), *codes = (int8_t *)malloc(X * K);
    float *w_scale = (float *)malloc(W * K * sizeof(float)), *x_scale = (float *)malloc(X * K * sizeof(float));
    static float out[X * OUT], expected[X * OUT];
    float *x_scales = (float *)malloc(X * 2 * K * sizeof(float)); /* a row of x_scale, then the sums */
    const int8_t *x[X];
    const float *xs[X];
    random_state = 32;
    uint8_t *scratch = (uint8_t *)malloc(dsv3__k_bytes_scratch(X, K));
    REQUIRE(w && codes && w_scale && x_scale && x_scales && scratch);
    for (size_t i = 0; i < W * K; i++)
        w_scale[i] = random_float();
    for (size_t i = 0; i < X * K; i++)
        x_scale[i] = random_float();
    x_scale[3 * K] = NAN;
    for (size_t i = 0; i < DSV3__COUNT(wide); i++)
        for (size_t g = 0; g < DSV3__COUNT(groups); g++) {
            const size_t k = wide[i], group = groups[g] ? groups[g] : k, n_groups = (k + group - 1) / group;
            const size_t stride = k + 7;
            if (k > 3000 && group == 40)
                continue; /* slow */
            for (size_t p = 0; p < W * stride; p++)
                w[p] = (int8_t)(i % 3 ? (int)(random_bits() & 255) - 128 : i % 2 ? -128 : 127);
            for (size_t j = 0; j < X; j++) {
                for (size_t c = 0; c < K; c++) {
                    int code = i % 3 ? (int)(random_bits() & 255) - 128 : -127;
                    codes[j * K + c] = (int8_t)(c >= k ? 0 : code == -128 ? -127 : code);
                }
                for (size_t b = 0; b < n_groups; b++) {
                    int32_t sum = 0;
                    for (size_t c = b * group; c < k && c < (b + 1) * group; c++)
                        sum += codes[j * K + c];
                    sum *= 128;
                    memcpy(x_scales + j * 2 * K + n_groups + b, &sum, sizeof sum);
                }
                memcpy(x_scales + j * 2 * K, x_scale + j * K, n_groups * sizeof(float));
                x[j] = codes + j * K, xs[j] = x_scales + j * 2 * K;
            }
            exact e = exact_copy(w, (W - 1) * stride + k, 1 + i % 3);
            memset(expected, 0x11, sizeof expected);
            dsv3__k_bytes_scalar(expected, OUT, (const int8_t *)e.p, stride, w_scale, W, x, xs, X, k, group, scratch);
            for (size_t j = 0; j < X && i % 5 == 0; j++) { /* the definition, beside the scalar code */
                float y = 0;
                for (size_t b = 0; b < n_groups; b++) {
                    int64_t sum = 0;
                    for (size_t c = b * group; c < k && c < (b + 1) * group; c++)
                        sum += (int64_t)w[2 * stride + c] * codes[j * K + c];
                    volatile float s = w_scale[2 * n_groups + b] * xs[j][b];
                    y = fmaf((float)sum, s, y);
                }
                CHECK(y != y ? dsv3__float_bits(expected[j * OUT + 2]) == DSV3__NAN_BITS
                             : same_bits(&y, &expected[j * OUT + 2], 1));
            }
            FOR_VARIANTS(v)
            for (size_t a = 0; a < DSV3__COUNT(n_ws); a++)
                for (size_t b = 0; b < DSV3__COUNT(n_xs); b++) {
                    size_t n_w = n_ws[a], n_x = n_xs[b];
                    bool ok = true;
                    if (v->isa == DSV3_ISA_SCALAR ||
                        (k > 3000 && (n_w % 4 != 1 || n_x % 6 != 1 || n_w * n_x > 100) && (n_w != 37 || n_x != 17)))
                        continue;
                    memset(out, 0x11, sizeof out);
                    v->bytes(out, OUT, (const int8_t *)e.p + (W - n_w) * stride, stride, w_scale + (W - n_w) * n_groups,
                             n_w, x, xs, n_x, k, group, scratch);
                    for (size_t p = 0; p < X * OUT; p++) {
                        float want =
                            p % OUT < n_w && p / OUT < n_x ? expected[p + W - n_w] : dsv3__bits_float(0x11111111);
                        ok = ok && same_bits(&out[p], &want, 1);
                    }
                    if (!CHECK(ok)) {
                        printf("    %s %u x %u, %u columns, groups of %u\n", dsv3_isa_name(v->isa), (unsigned)n_w,
                               (unsigned)n_x, (unsigned)k, (unsigned)group);
                        return;
                    }
                }
            free(e.block);
        }
    free(w), free(codes), free(w_scale), free(x_scale), free(x_scales), free(scratch);
}

/* The order of summation itself: these bits must never change, whatever the compiler, the flags and the kernel. */
TEST(order_is_frozen)
{
    enum { K = 1000, ROWS = 50 };
    static uint8_t w[K * 4];
    static float x[K], packed[1024], scale64[16];
    static const uint64_t golden[] = {0xCA35AA03C0F20B39, 0x0D8D38D8C087393A, 0x6B90BFF5E556E356, 0x513265F3A065DB15,
                                      0xBCCA59453A69EA36};
    for (size_t d = 0; d < DSV3__COUNT(dtypes); d++) {
        FOR_VARIANTS(k)
        {
            float results[ROWS];
            random_state = 16 + d;
            for (size_t r = 0; r < ROWS; r++) {
                random_weights(w, K, dtypes[d]);
                for (size_t c = 0; c < K; c++)
                    x[c] = random_float();
                for (size_t b = 0; b < 16; b++)
                    scale64[b] = random_float();
                pack(packed, x, K, dtypes[d]);
                results[r] = dsv3__kern_dot(k, dtypes[d])(w, packed, scale64, K);
            }
            uint64_t hash = dsv3__hash(0, results, sizeof results);
            if (!CHECK(hash == golden[d]))
                printf("    %s %s: 0x%08lX%08lX\n", dsv3_isa_name(k->isa), dsv3_dtype_name(dtypes[d]),
                       (unsigned long)(hash >> 32), (unsigned long)(hash & 0xFFFFFFFF));
        }
    }
}

TEST(outer_bits)
{
    static const size_t heads[] = {1, 2, 4, 5, 9}, columns[] = {1, 7, 8, 23, 24, 64, 65, 128, 200, 512};
    enum { T = 37, STRIDE = 516 };
    static float a[9 * 40], b[T * STRIDE], u[9 * STRIDE], expected[9 * STRIDE], start[9 * STRIDE];
    random_state = 17;
    for (size_t i = 0; i < DSV3__COUNT(a); i++)
        a[i] = random_float();
    for (size_t i = 0; i < DSV3__COUNT(b); i++)
        b[i] = random_float();
    for (size_t i = 0; i < DSV3__COUNT(u); i++)
        start[i] = random_float();
    for (size_t i = 0; i < DSV3__COUNT(heads); i++)
        for (size_t j = 0; j < DSV3__COUNT(columns); j++) {
            memcpy(expected, start, sizeof start);
            for (size_t h = 0; h < heads[i]; h++)
                for (size_t c = 0; c < columns[j]; c++)
                    for (size_t t = 0; t < T; t++)
                        expected[h * STRIDE + c] = fmaf(a[h * 40 + t], b[t * STRIDE + c], expected[h * STRIDE + c]);
            FOR_VARIANTS(k)
            {
                memcpy(u, start, sizeof start);
                k->outer(u, STRIDE, heads[i], a, 40, b, STRIDE, T, columns[j]);
                CHECK(same_bits(u, expected, DSV3__COUNT(u)));
            }
        }
}

/* The same of codes as they lie, where a variant does that; what it does not do it must say, and of what is not finite. */
TEST(outer_of_codes)
{
    static const size_t rows[] = {1, 7, 8, 16, 20, 128}, columns[] = {24, 64, 128, 200, 512};
    static const dsv3_dtype code_dtypes[] = {DSV3_DTYPE_F8_E4M3, DSV3_DTYPE_I8, DSV3_DTYPE_BF16, DSV3_DTYPE_F16,
                                              DSV3_DTYPE_F32};
    enum { T = 128, STRIDE = 515 };
    static uint8_t w[T * STRIDE * 4];
    static float a[T], scale[T], values[STRIDE], u[STRIDE], expected[STRIDE];
    size_t done = 0;
    random_state = 18;
    for (size_t i = 0; i < T; i++)
        a[i] = random_float(), scale[i] = 0.01f + fabsf(random_float());
    for (size_t d = 0; d < DSV3__COUNT(code_dtypes); d++)
        for (size_t i = 0; i < DSV3__COUNT(rows); i++)
            for (size_t j = 0; j < DSV3__COUNT(columns); j++) {
                const size_t n = rows[i], k_columns = columns[j];
                const bool fp8 = code_dtypes[d] == DSV3_DTYPE_F8_E4M3, whole = n % 8 == 0 && k_columns % 64 == 0;
                const size_t size = dsv3_dtype_size(code_dtypes[d]), used = ((n - 1) * STRIDE + k_columns) * size;
                random_weights(w, T * STRIDE, code_dtypes[d]);
                if (size == 1)
                    w[3] = fp8 ? 0x01 : 0x80; /* denormal; -128 */
                memset(expected, 0, sizeof expected);
                for (size_t t = 0; t < n; t++) {
                    for (size_t c = 0; c < k_columns; c++) {
                        const float code = dsv3__num_get(w, code_dtypes[d], t * STRIDE + c);
                        volatile float value = code * scale[fp8 ? c / 64 : t];
                        values[c] = value;
                    }
                    for (size_t c = 0; c < k_columns; c++)
                        expected[c] = fmaf(a[t], values[c], expected[c]);
                }
                FOR_VARIANTS(k)
                {
                    exact e = exact_copy(w, used, 1 + i);
                    memset(u, 0x55, sizeof u);
                    const bool made = k->outer_codes(u, a, e.p, STRIDE * size, code_dtypes[d], scale, n, k_columns, e.p);
                    CHECK(!made || (whole && same_bits(u, expected, k_columns)));
                    CHECK(made || !whole || k->outer_codes == dsv3__k_outer_codes_scalar);
                    done += made;
                    const float kept = scale[0];
                    scale[0] = INFINITY;
                    CHECK(!k->outer_codes(u, a, e.p, STRIDE * size, code_dtypes[d], scale, n, k_columns, e.p));
                    scale[0] = kept;
                    free(e.block);
                    e = exact_copy(w, used, 1 + i);
                    ((uint8_t *)(uintptr_t)e.p)[(n - 1) * STRIDE + k_columns / 2] = 0xFF;
                    CHECK(!fp8 || !k->outer_codes(u, a, e.p, STRIDE * size, code_dtypes[d], scale, n, k_columns, NULL));
                    free(e.block);
                }
            }
    printf("    %u products made of codes as they lie\n", (unsigned)done);
}

// ---- Halves ----------------------------------------------------------------------------------------------

static float half(float v)
{
    float r = dsv3__bf16_decode(dsv3__bf16_encode(v));
    return fabsf(r) < ldexpf(1, -50) ? 0 : r;
}

/* y + a + b of every run of 32, as the contract says. */
static float half_sum(float y, const float *w, size_t w_step, const float *x, size_t x_step, size_t n)
{
    for (size_t r = 0; r < n; r += 32) {
        float a = 0, b = 0;
        for (size_t i = r; i < n && i < r + 32; i += 2)
            a = fmaf(half(w[i * w_step]), half(x[i * x_step]), a);
        for (size_t i = r + 1; i < n && i < r + 32; i += 2)
            b = fmaf(half(w[i * w_step]), half(x[i * x_step]), b);
        a += b;
        y += a;
    }
    return y;
}

/* Numbers of every size that a half may have, and some that it may not; or tame ones. */
static float half_float(bool wild)
{
    float v = random_float();
    return !wild ? v : ldexpf(v, (int)(random_bits() % 120) - 70);
}

TEST(halves)
{
    enum { WIDE = 192 };
    static const size_t across[] = {64, 128, 192}, latents[] = {64, 96, 100, 17, 192}, heads[] = {1, 3, 8, 9, 16},
                        counts[] = {1, 5, 16, 17, 31, 32, 33, 48, 50, 64};
    static float keys[64][WIDE], q[16][WIDE], p[16][64], start[16][WIDE + 3], u[16][WIDE + 3], expected[16][WIDE + 3];
    static float query[16 * WIDE], scores[16][64];
    static float packed[64 * WIDE];
    static uint16_t codes[64][WIDE];
    random_state = 23;
    for (size_t n = 0; n < 300; n++) {
        const size_t width = across[n % 3], count = counts[random_bits() % DSV3__COUNT(counts)],
                     n_h = heads[random_bits() % DSV3__COUNT(heads)];
        size_t latent = latents[random_bits() % DSV3__COUNT(latents)];
        const bool wild = n % 7 == 0;
        dsv3__half_block block = {{(const uint8_t *)codes, (const uint8_t *)&codes[0][width / 64 * 32], NULL, NULL},
                                  {sizeof codes[0], sizeof codes[0], 0, 0},
                                  {width / 64 * 32, width - width / 64 * 32, 0, 0},
                                  width,
                                  count,
                                  packed,
                                  NULL,
                                  0};
        if (n % 2)
            block.n[0] = width, block.n[1] = 0; /* in one part */
        latent = latent > block.n[0] ? block.n[0] : latent;
        for (size_t t = 0; t < 64; t++)
            for (size_t c = 0; c < width; c++) {
                keys[t][c] = half_float(wild);
                uint16_t code = 0x7FC0;
                dsv3__k_to_halves_scalar(&code, &keys[t][c], 1);
                codes[t][c] = t < count ? code : 0x7FC0; /* NaN where nobody may look */
            }
        for (size_t h = 0; h < 16; h++) {
            for (size_t c = 0; c < width; c++)
                q[h][c] = half_float(wild), start[h][c] = random_float();
            for (size_t t = 0; t < 64; t++)
                p[h][t] = t < count ? fabsf(half_float(wild)) : NAN; /* what nobody may read */
        }
        FOR_VARIANTS(k)
        {
            bool ok = true;
            memset(packed, 0xFF, sizeof packed); /* NaN wherever it is not written */
            memset(query, 0xFF, sizeof query);
            for (size_t h = 0; h < n_h; h++) { /* of any length */
                uint16_t some[WIDE + 1], first[WIDE], rest[WIDE];
                k->to_halves(some, q[h], width - h);
                k->split_halves(first, rest, q[h], width - h);
                for (size_t c = 0; c + h < width; c++)
                    ok = ok && dsv3__bf16_decode(some[c]) == half(q[h][c]) && first[c] == some[c] &&
                         dsv3__bf16_decode(rest[c]) == half(q[h][c] - half(q[h][c]));
            }
            k->half_keys(&block);
            k->half_query(query, q[0], WIDE, n_h, width);
            k->half_scores(scores[0], 64, &block, query, n_h);
            for (size_t h = 0; h < n_h; h++)
                for (size_t t = 0; t < count; t++) {
                    float y = half_sum(0, keys[t], 1, q[h], 1, width);
                    ok = ok && same_bits(&y, &scores[h][t], 1);
                }
            CHECK(ok);
            memcpy(u, start, sizeof u);
            memcpy(expected, start, sizeof u);
            for (size_t h = 0; h < n_h; h++)
                for (size_t c = 0; c < latent; c++)
                    expected[h][c] = half_sum(start[h][c], p[h], 1, &keys[0][c], WIDE, count);
            k->half_sums(u[0], WIDE + 3, n_h, p[0], 64, &block, latent);
            if (!CHECK(memcmp(u, expected, sizeof u) == 0))
                printf("    %s, width %zu, latent %zu, %zu heads, %zu rows\n", dsv3_isa_name(k->isa), width, latent,
                       n_h, count);
        }
    }
}

/* A NaN in a row of the cache reaches those who see the row, and nobody else. */
TEST(halves_nan)
{
    static float keys[64][64], q[16][64], p[16][64], u[16][64], scores[16][64], query[16 * 64], packed[64 * 64];
    static uint16_t codes[64][64];
    static const uint32_t nans[] = {0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001};
    for (size_t i = 0; i < DSV3__COUNT(nans); i++) {
        FOR_VARIANTS(k)
        {
            for (size_t t = 0; t < 64; t++)
                for (size_t c = 0; c < 64; c++)
                    keys[t][c] = 1, q[t % 16][c] = 1, p[t % 16][c] = 1;
            keys[40][7] = dsv3__bits_float(nans[i]);
            for (size_t count = 39; count < 43; count++) {
                bool ok = true;
                memset(u, 0, sizeof u);
                dsv3__half_block block = {{(const uint8_t *)codes, NULL, NULL, NULL},
                                          {sizeof codes[0], 0, 0, 0},
                                          {64, 0, 0, 0},
                                          64,
                                          count,
                                          packed,
                                          NULL,
                                          0};
                k->to_halves(codes[0], keys[0], 64 * 64);
                k->half_keys(&block);
                k->half_query(query, q[0], 64, 16, 64);
                k->half_scores(scores[0], 64, &block, query, 16);
                k->half_sums(u[0], 64, 16, p[0], 64, &block, 64);
                for (size_t h = 0; h < 16; h++)
                    for (size_t c = 0; c < 64; c++) {
                        ok = ok && (c >= count || (scores[h][c] != scores[h][c]) == (c == 40));
                        ok = ok && (u[h][c] != u[h][c]) == (c == 7 && count > 40);
                    }
                CHECK(ok);
            }
        }
    }
}

// ---- exp -------------------------------------------------------------------------------------------------

TEST(scale_max_bits)
{
    static float x[100], y[100], z[100];
    random_state = 29;
    for (size_t n = 0; n < 100; n++) {
        float most = -INFINITY;
        for (size_t i = 0; i < n; i++) {
            x[i] = i % 11 == 5 ? NAN : random_float() - 2;
            most = x[i] * 0.3f > most ? x[i] * 0.3f : most;
        }
        FOR_VARIANTS(k)
        {
            memcpy(y, x, sizeof y);
            CHECK(k->scale_max(y, n, 0.3f) == most);
            memcpy(z, x, sizeof z);
            k->shrink(z, n, 0.3f, 0.25f);
            for (size_t i = 0; i < n; i++)
                CHECK(x[i] != x[i] ? z[i] != z[i] : z[i] == (fabsf(x[i] * 0.3f) < 0.25f ? 0 : x[i] * 0.3f));
            for (size_t i = 0; i < n; i++)
                CHECK(x[i] != x[i] ? y[i] != y[i] : y[i] == x[i] * 0.3f);
        }
    }
}

static double ulps(float found, double expected)
{
    int e;
    double unit = ldexp(1, -149);
    if (expected >= ldexp(1, -126)) {
        frexp(expected, &e);
        unit = ldexp(1, e - 24);
    }
    return fabs((double)found - expected) / unit;
}

TEST(exp_accuracy)
{
    double worst = 0, worst_sigmoid = 0, worst_silu = 0;
    for (uint32_t sign = 0; sign < 2; sign++)
        for (uint32_t bits = 0; bits < 0x42D00000; bits += 1009) { /* to 104 */
            float x = dsv3__bits_float(sign << 31 | bits), y = dsv3__exp(x);
            double e = exp((double)x);
            if (e > 3.4028235677973366e38) { /* rounds to infinity */
                if (!CHECK(y == INFINITY))
                    return;
                continue;
            }
            if (e < 1.1754943e-38) { /* 2^-126, or within the error of it */
                if (!CHECK(y == 0 || e > 1.17549e-38))
                    return;
                continue;
            }
            worst = fmax(worst, ulps(y, e));
            double sigmoid = 1 / (1 + exp(-(double)x)), silu = fabs((double)x * sigmoid);
            if (sigmoid > 1e-37)
                worst_sigmoid = fmax(worst_sigmoid, ulps(dsv3__sigmoid(x), sigmoid));
            if (x > -88.7f && silu > 1e-37)
                worst_silu = fmax(worst_silu, ulps(fabsf(dsv3__silu(x)), silu));
        }
    CHECK_NEAR(worst, 0, 1.0);
    CHECK_NEAR(worst_sigmoid, 0, 2.5);
    CHECK_NEAR(worst_silu, 0, 2.5);
    CHECK(worst > 0.5);
    CHECK(dsv3__exp(0.0f) == 1.0f && dsv3__exp(-0.0f) == 1.0f);
    CHECK(dsv3__exp(-INFINITY) == 0 && dsv3__exp(-1e30f) == 0 && dsv3__exp(-87.34f) == 0 &&
          dsv3__exp(-87.33f) > 1.17549e-38f);
    CHECK(dsv3__exp(INFINITY) == INFINITY && dsv3__exp(88.73f) == INFINITY && dsv3__exp(88.72f) < INFINITY);
    CHECK(dsv3__exp(NAN) != dsv3__exp(NAN));
    CHECK(dsv3__sigmoid(-INFINITY) == 0 && dsv3__sigmoid(INFINITY) == 1 && dsv3__silu(-100.0f) == 0 &&
          dsv3__silu(100.0f) == 100.0f);
}

TEST(exp_bits)
{
    static float x[4096], y[4096], up[4096], out[4096];
    random_state = 18;
    for (size_t n = 0; n < 4096; n = n < 70 ? n + 1 : n * 2 + 1) {
        for (size_t i = 0; i < n; i++) {
            uint32_t bits = random_bits();
            x[i] = i % 3 ? random_float() * 100 : dsv3__bits_float(bits); /* any bits, NaN aside */
            if (x[i] != x[i])
                x[i] = INFINITY;
            up[i] = random_float();
        }
        float max = 3.5f, chains[16] = {0};
        for (size_t i = 0; i < n; i++) {
            y[i] = dsv3__exp(x[i] - max);
            if (y[i] == INFINITY)
                x[i] = y[i] = -200.0f, y[i] = 0; /* sums of finite numbers */
            chains[i % 16] += y[i];
        }
        for (int m = 8; m; m /= 2)
            for (int i = 0; i < m; i++)
                chains[i] += chains[i + m];
        FOR_VARIANTS(k)
        {
            memcpy(out, x, n * sizeof(float));
            float sum = k->exp_sum(out, n, max);
            CHECK(same_bits(out, y, n) && same_bits(&sum, chains, 1));
            memset(out, 0, sizeof out);
            k->swiglu(out, x, up, n);
            bool ok = true;
            for (size_t i = 0; i < n; i++) {
                volatile float silu = dsv3__silu(x[i]);
                float expected = fabsf(silu * up[i]) < 1.17549435e-38f ? 0 : silu * up[i];
                ok = ok && (expected != expected ? out[i] != out[i] : same_bits(&out[i], &expected, 1));
            }
            CHECK(ok);
            memcpy(out, x, n * sizeof(float));
            k->swiglu(out, out, up, n); /* in place */
            for (size_t i = 0; i < n; i++)
                ok = ok && (x[i] != x[i] || out[i] != out[i] || out[i] == dsv3__k_flush(dsv3__silu(x[i]) * up[i]));
            CHECK(ok);
        }
    }
}

/* The tables are what they say, and the scalar one is always there. */
TEST(tables)
{
    FOR_VARIANTS(k)
    {
        bool wide = k->isa == DSV3_ISA_AVX512 || k->isa == DSV3_ISA_AVX512_VNNI || k->isa == DSV3_ISA_AVX512_BF16 ||
                    k->isa == DSV3_ISA_AVX512_AMX;
        CHECK_EQ_INT(k->isa, variant_list[variant_at - 1]->isa);
        CHECK(k->lanes == (wide ? 16u : k->isa == DSV3_ISA_NEON ? 4u : 8u));
        CHECK(k->pair_words == (k->isa == DSV3_ISA_AVX512_BF16));
    }
    for (size_t i = 0; i < N_ISAS; i++)
        CHECK(!dsv3_isa_supported(isas[i]) || dsv3__kern_get(isas[i])->isa == isas[i]);
    CHECK(dsv3_isa_supported(dsv3__cpu_best()) && dsv3_isa_supported(DSV3_ISA_SCALAR));
#if defined(TEST_EMULATE_AVX512) && DSV3__AVX512 && DSV3__VNNI
    /* all but NEON, AVX512_BF16 twice */
    CHECK(!dsv3_isa_supported(DSV3_ISA_AVX2) || (n_variants == N_ISAS && dsv3__cpu_best() == DSV3_ISA_AVX512_AMX));
#endif
#if DSV3__NEON
    CHECK_EQ_INT(dsv3__cpu_best(), DSV3_ISA_NEON);
#endif
}

TEST_MAIN(RUN(fp8_decode), RUN(fp8_encode), RUN(i8), RUN(f16_and_bf16), RUN(e8m0), RUN(fp8_codes_everywhere),
          RUN(dot_bits), RUN(rows), RUN(nan_codes), RUN(scales), RUN(tile_bits), RUN(pairs),
          RUN(pairs_of_rows), RUN(pair_codes_everywhere),
          RUN(to_bytes_bits), RUN(bytes_bits), RUN(order_is_frozen), RUN(outer_bits), RUN(outer_of_codes),
          RUN(halves), RUN(halves_nan),
          RUN(scale_max_bits), RUN(exp_accuracy), RUN(exp_bits), RUN(tables))
