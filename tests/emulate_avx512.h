/* emulate_avx512.h: the AVX-512 intrinsics that dsv3.h uses, each as two AVX2 ones, and the instructions of VNNI, VBMI and
   BF16 as the manuals define them, so that its kernels for these run, and are compared bit for bit, on machines that have
   AVX2 alone. Include it before dsv3.h, which then takes all levels for supported. Slow, and only for tests. */
#ifndef DSV3_EMULATE_AVX512_H
#define DSV3_EMULATE_AVX512_H

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define DSV3__SIMD_PROVIDED
#define DSV3__TARGET_AVX512 __attribute__((target("avx2,fma,f16c")))
#define DSV3__TARGET_AVX_VNNI DSV3__TARGET_AVX512
#define DSV3__TARGET_AVX512_VNNI DSV3__TARGET_AVX512
#define DSV3__TARGET_AVX512_BF16 DSV3__TARGET_AVX512
#define DSV3__TARGET_AVX512_AMX DSV3__TARGET_AVX512
#define DSV3__PIN512(v) ((void)0)

#if defined(__has_feature)
    #if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
        #define EMU_CALLS
    #endif
#endif
#ifdef EMU_CALLS /* inlined, they take clang's sanitizers minutes */
    #define EMU static __attribute__((noinline, unused, target("avx2,fma,f16c")))
#else
    #define EMU static inline __attribute__((always_inline, unused, target("avx2,fma,f16c")))
#endif

typedef struct emu_ps {
    __m256 v[2];
} emu_ps;

typedef struct emu_pd {
    __m256d v[2];
} emu_pd;

typedef struct emu_si {
    __m256i v[2];
} emu_si;

/* Compilers make some of them macros. */
#undef _mm512_add_ps
#undef _mm512_sub_ps
#undef _mm512_mul_ps
#undef _mm512_div_ps
#undef _mm512_min_ps
#undef _mm512_max_ps
#undef _mm512_and_si512
#undef _mm512_xor_si512
#undef _mm512_max_epu8
#undef _mm512_sub_epi8
#undef _mm512_add_epi32
#undef _mm512_sub_epi32
#undef _mm512_slli_epi16
#undef _mm512_srai_epi16
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_set1_ps
#undef _mm512_set1_epi8
#undef _mm512_set1_epi16
#undef _mm512_set1_epi32
#undef _mm512_setzero_ps
#undef _mm512_setzero_si512
#undef _mm512_fmadd_ps
#undef _mm512_loadu_ps
#undef _mm512_storeu_ps
#undef _mm512_loadu_si512
#undef _mm512_castsi512_ps
#undef _mm512_castps_si512
#undef _mm512_castps_pd
#undef _mm512_castps512_ps256
#undef _mm512_castsi512_si256
#undef _mm512_extractf64x4_pd
#undef _mm512_extracti64x4_epi64
#undef _mm512_cvtph_ps
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi8_epi16
#undef _mm512_cmpeq_epi8_mask
#undef _mm512_cmpge_epu16_mask
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtepi32_epi16
#undef _mm512_shuffle_f32x4
#undef _mm512_permute_ps
#undef _mm512_maskz_mov_ps
#undef _mm512_maskz_mov_epi16
#undef _mm512_mask_mov_ps
#undef _mm512_castsi128_si512
#undef _mm512_inserti32x4
#undef _mm512_or_si512
#undef _mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_maskz_loadu_epi8
#undef _mm512_permutex2var_epi8
#undef _mm512_shuffle_epi8
#undef _mm512_permutexvar_epi64
#undef _mm512_unpacklo_epi8
#undef _mm512_unpackhi_epi8
#undef _mm512_unpacklo_epi16
#undef _mm512_unpackhi_epi16
#undef _mm512_unpacklo_ps
#undef _mm512_unpackhi_ps
#undef _mm512_shuffle_ps
#undef _mm512_permutex2var_ps
#undef _mm512_broadcastq_epi64

#define __m512 emu_ps
#define __m512d emu_pd
#define __m512i emu_si

#define EMU_PS_2(name)                                                      \
    EMU emu_ps emu_##name(emu_ps a, emu_ps b)                                \
    {                                                                       \
        emu_ps r = {{_mm256_##name(a.v[0], b.v[0]), _mm256_##name(a.v[1], b.v[1])}}; \
        return r;                                                           \
    }
EMU_PS_2(add_ps)
EMU_PS_2(sub_ps)
EMU_PS_2(mul_ps)
EMU_PS_2(div_ps)
EMU_PS_2(min_ps)
EMU_PS_2(max_ps)
EMU_PS_2(unpacklo_ps) /* within each 128 bits, at 512 as at 256 */
EMU_PS_2(unpackhi_ps)
#define _mm512_add_ps emu_add_ps
#define _mm512_sub_ps emu_sub_ps
#define _mm512_mul_ps emu_mul_ps
#define _mm512_div_ps emu_div_ps
#define _mm512_min_ps emu_min_ps
#define _mm512_max_ps emu_max_ps
#define _mm512_unpacklo_ps emu_unpacklo_ps
#define _mm512_unpackhi_ps emu_unpackhi_ps

#define EMU_SI_2(name, with)                                                \
    EMU emu_si emu_##name(emu_si a, emu_si b)                                \
    {                                                                       \
        emu_si r = {{_mm256_##with(a.v[0], b.v[0]), _mm256_##with(a.v[1], b.v[1])}}; \
        return r;                                                           \
    }
EMU_SI_2(and_si512, and_si256)
EMU_SI_2(xor_si512, xor_si256)
EMU_SI_2(or_si512, or_si256)
EMU_SI_2(unpacklo_epi32, unpacklo_epi32) /* within each 128 bits, at 512 as at 256 */
EMU_SI_2(unpackhi_epi32, unpackhi_epi32)
EMU_SI_2(unpacklo_epi64, unpacklo_epi64)
EMU_SI_2(unpackhi_epi64, unpackhi_epi64)
EMU_SI_2(unpacklo_epi8, unpacklo_epi8)
EMU_SI_2(unpackhi_epi8, unpackhi_epi8)
EMU_SI_2(unpacklo_epi16, unpacklo_epi16)
EMU_SI_2(unpackhi_epi16, unpackhi_epi16)
EMU_SI_2(max_epu8, max_epu8)
EMU_SI_2(sub_epi8, sub_epi8)
EMU_SI_2(add_epi32, add_epi32)
EMU_SI_2(sub_epi32, sub_epi32)
#define _mm512_and_si512 emu_and_si512
#define _mm512_xor_si512 emu_xor_si512
#define _mm512_or_si512 emu_or_si512
#define _mm512_unpacklo_epi32 emu_unpacklo_epi32
#define _mm512_unpackhi_epi32 emu_unpackhi_epi32
#define _mm512_unpacklo_epi64 emu_unpacklo_epi64
#define _mm512_unpackhi_epi64 emu_unpackhi_epi64
#define _mm512_unpacklo_epi8 emu_unpacklo_epi8
#define _mm512_unpackhi_epi8 emu_unpackhi_epi8
#define _mm512_unpacklo_epi16 emu_unpacklo_epi16
#define _mm512_unpackhi_epi16 emu_unpackhi_epi16
#define _mm512_max_epu8 emu_max_epu8
#define _mm512_sub_epi8 emu_sub_epi8
#define _mm512_add_epi32 emu_add_epi32
#define _mm512_sub_epi32 emu_sub_epi32

#define EMU_SHIFT(name)                                                     \
    EMU emu_si emu_##name(emu_si a, int n)                                   \
    {                                                                       \
        emu_si r = {{_mm256_##name(a.v[0], n), _mm256_##name(a.v[1], n)}};    \
        return r;                                                           \
    }
EMU_SHIFT(slli_epi16)
EMU_SHIFT(srai_epi16)
EMU_SHIFT(slli_epi32)
EMU_SHIFT(srli_epi32)
#define _mm512_slli_epi16 emu_slli_epi16
#define _mm512_srai_epi16 emu_srai_epi16
#define _mm512_slli_epi32 emu_slli_epi32
#define _mm512_srli_epi32 emu_srli_epi32

#define EMU_SET(type, name, with, arg)                     \
    EMU type emu_##name(arg a)                              \
    {                                                      \
        type r = {{_mm256_##with(a), _mm256_##with(a)}};   \
        return r;                                          \
    }
EMU_SET(emu_ps, set1_ps, set1_ps, float)
EMU_SET(emu_si, set1_epi8, set1_epi8, char)
EMU_SET(emu_si, set1_epi16, set1_epi16, short)
EMU_SET(emu_si, set1_epi32, set1_epi32, int)
#define _mm512_set1_ps emu_set1_ps
#define _mm512_set1_epi8 emu_set1_epi8
#define _mm512_set1_epi16 emu_set1_epi16
#define _mm512_set1_epi32 emu_set1_epi32
#define _mm512_setzero_ps() emu_set1_ps(0.0f)
#define _mm512_setzero_si512() emu_set1_epi32(0)

EMU emu_ps emu_fmadd_ps(emu_ps a, emu_ps b, emu_ps c)
{
    emu_ps r = {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
    return r;
}
#define _mm512_fmadd_ps emu_fmadd_ps

EMU emu_ps emu_loadu_ps(const void *p)
{
    emu_ps r = {{_mm256_loadu_ps((const float *)p), _mm256_loadu_ps((const float *)p + 8)}};
    return r;
}

EMU void emu_storeu_ps(void *p, emu_ps a)
{
    _mm256_storeu_ps((float *)p, a.v[0]);
    _mm256_storeu_ps((float *)p + 8, a.v[1]);
}

EMU emu_si emu_loadu_si512(const void *p)
{
    emu_si r = {{_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)}};
    return r;
}
#define _mm512_loadu_ps emu_loadu_ps
#define _mm512_storeu_ps emu_storeu_ps
#define _mm512_loadu_si512 emu_loadu_si512

EMU emu_ps emu_castsi512_ps(emu_si a)
{
    emu_ps r = {{_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}};
    return r;
}

EMU emu_si emu_castps_si512(emu_ps a)
{
    emu_si r = {{_mm256_castps_si256(a.v[0]), _mm256_castps_si256(a.v[1])}};
    return r;
}

EMU emu_pd emu_castps_pd(emu_ps a)
{
    emu_pd r = {{_mm256_castps_pd(a.v[0]), _mm256_castps_pd(a.v[1])}};
    return r;
}

/* Quarters of 4 floats: two of a, two of b, two bits of how for each; and floats within each quarter. */
EMU emu_ps emu_shuffle_f32x4(emu_ps a, emu_ps b, int how)
{
    emu_ps r;
    for (int i = 0; i < 4; i++)
        memcpy((char *)&r + 16 * i, (const char *)(i < 2 ? &a : &b) + 16 * (how >> 2 * i & 3), 16);
    return r;
}

EMU emu_ps emu_permute_ps(emu_ps a, int how)
{
    emu_ps r;
    for (int i = 0; i < 16; i++)
        memcpy((char *)&r + 4 * i, (const char *)&a + 4 * (i / 4 * 4 + (how >> 2 * (i % 4) & 3)), 4);
    return r;
}
#define _mm512_shuffle_f32x4 emu_shuffle_f32x4
#define _mm512_permute_ps emu_permute_ps
#define _mm512_castsi512_ps emu_castsi512_ps
#define _mm512_castps_si512 emu_castps_si512
#define _mm512_castps_pd emu_castps_pd
#define _mm512_castps512_ps256(a) ((a).v[0])
#define _mm512_castsi512_si256(a) ((a).v[0])
#define _mm512_extractf64x4_pd(a, i) ((a).v[i])
#define _mm512_extracti64x4_epi64(a, i) ((a).v[i])

/* 16 halves -> 16 floats, 16 unsigned halves -> 16 words, 32 bytes -> 32 signed halves: in order, across the register. */
EMU emu_ps emu_cvtph_ps(__m256i a)
{
    emu_ps r = {{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
    return r;
}

EMU emu_si emu_cvtepu16_epi32(__m256i a)
{
    emu_si r = {{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))}};
    return r;
}

EMU emu_si emu_cvtepi8_epi16(__m256i a)
{
    emu_si r = {{_mm256_cvtepi8_epi16(_mm256_castsi256_si128(a)), _mm256_cvtepi8_epi16(_mm256_extracti128_si256(a, 1))}};
    return r;
}
#define _mm512_cvtph_ps emu_cvtph_ps
#define _mm512_cvtepu16_epi32 emu_cvtepu16_epi32
#define _mm512_cvtepi8_epi16 emu_cvtepi8_epi16

EMU __m256i emu_cvtepi32_epi16(emu_si a)
{
    uint32_t v[16];
    uint16_t r[16];
    memcpy(v, &a, sizeof v);
    for (int i = 0; i < 16; i++)
        r[i] = (uint16_t)v[i];
    return _mm256_loadu_si256((const __m256i *)(const void *)r);
}
#define _mm512_cvtepi32_epi16 emu_cvtepi32_epi16

EMU uint64_t emu_cmpeq_epi8_mask(emu_si a, emu_si b)
{
    uint64_t lo = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.v[0], b.v[0]));
    uint64_t hi = (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(a.v[1], b.v[1]));
    return hi << 32 | lo;
}
#define _mm512_cmpeq_epi8_mask emu_cmpeq_epi8_mask

#define _mm512_cmp_ps_mask(a, b, how)                                        \
    ((__mmask16)(_mm256_movemask_ps(_mm256_cmp_ps((a).v[0], (b).v[0], how)) | \
                 _mm256_movemask_ps(_mm256_cmp_ps((a).v[1], (b).v[1], how)) << 8))

EMU emu_ps emu_maskz_mov_ps(__mmask16 mask, emu_ps a)
{
    float v[16];
    memcpy(v, &a, sizeof v);
    for (int i = 0; i < 16; i++)
        v[i] = mask >> i & 1 ? v[i] : 0;
    memcpy(&a, v, sizeof v);
    return a;
}
#define _mm512_maskz_mov_ps emu_maskz_mov_ps

EMU uint32_t emu_cmpge_epu16_mask(emu_si a, emu_si b)
{
    uint16_t x[32], y[32];
    uint32_t mask = 0;
    memcpy(x, &a, 64);
    memcpy(y, &b, 64);
    for (int i = 0; i < 32; i++)
        mask |= (uint32_t)(x[i] >= y[i]) << i;
    return mask;
}
#define _mm512_cmpge_epu16_mask emu_cmpge_epu16_mask

EMU emu_si emu_maskz_mov_epi16(uint32_t mask, emu_si a)
{
    uint16_t x[32];
    memcpy(x, &a, 64);
    for (int i = 0; i < 32; i++)
        x[i] = mask >> i & 1 ? x[i] : 0;
    memcpy(&a, x, 64);
    return a;
}
#define _mm512_maskz_mov_epi16 emu_maskz_mov_epi16

EMU emu_ps emu_mask_mov_ps(emu_ps b, __mmask16 mask, emu_ps a)
{
    float v[16], other[16];
    memcpy(v, &a, sizeof v);
    memcpy(other, &b, sizeof other);
    for (int i = 0; i < 16; i++)
        v[i] = mask >> i & 1 ? v[i] : other[i];
    memcpy(&a, v, sizeof v);
    return a;
}
#define _mm512_mask_mov_ps emu_mask_mov_ps

EMU emu_si emu_castsi128_si512(__m128i a)
{
    emu_si r = {{_mm256_castsi128_si256(a), _mm256_setzero_si256()}};
    return r;
}

EMU emu_si emu_inserti32x4(emu_si a, __m128i b, int i)
{
    memcpy((uint8_t *)&a + 16 * i, &b, 16);
    return a;
}
#define _mm512_castsi128_si512 emu_castsi128_si512
#define _mm512_inserti32x4 emu_inserti32x4

EMU emu_si emu_cvtepi8_epi32(__m128i a)
{
    emu_si r = {{_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))}};
    return r;
}

EMU emu_ps emu_cvtepi32_ps(emu_si a)
{
    emu_ps r = {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}};
    return r;
}
#define _mm512_cvtepi8_epi32 emu_cvtepi8_epi32
#define _mm512_cvtepi32_ps emu_cvtepi32_ps

/* Bytes whose bit is 0 are zero, and are not read. */
EMU emu_si emu_shuffle_epi8(emu_si a, emu_si by)
{
    emu_si r = {{_mm256_shuffle_epi8(a.v[0], by.v[0]), _mm256_shuffle_epi8(a.v[1], by.v[1])}};
    return r;
}
#define _mm512_shuffle_epi8 emu_shuffle_epi8

EMU emu_si emu_broadcastq_epi64(__m128i low)
{
    emu_si r = {{_mm256_broadcastq_epi64(low), _mm256_broadcastq_epi64(low)}};
    return r;
}
#define _mm512_broadcastq_epi64 emu_broadcastq_epi64

/* SHUFPS: in each 128 bits two lanes of a, then two of b. */
EMU emu_ps emu_shuffle_ps(emu_ps a, emu_ps b, int by)
{
    float x[16], y[16], r[16];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
    for (int i = 0; i < 16; i++)
        r[i] = (i % 4 < 2 ? x : y)[i / 4 * 4 + (by >> 2 * (i % 4) & 3)];
    return emu_loadu_ps(r);
}
#define _mm512_shuffle_ps emu_shuffle_ps

/* VPERMI2PS: bits 0 ... 3 of an index choose a lane, bit 4 the table. */
EMU emu_ps emu_permutex2var_ps(emu_ps a, emu_si index, emu_ps b)
{
    float x[32], r[16];
    int32_t at[16];
    memcpy(x, &a, sizeof a), memcpy(x + 16, &b, sizeof b), memcpy(at, &index, sizeof at);
    for (int i = 0; i < 16; i++)
        r[i] = x[at[i] & 31];
    return emu_loadu_ps(r);
}
#define _mm512_permutex2var_ps emu_permutex2var_ps

EMU emu_si emu_maskz_loadu_epi8(uint64_t mask, const void *p)
{
    uint8_t bytes[64] = {0};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1)
            bytes[i] = ((const uint8_t *)p)[i];
    return emu_loadu_si512(bytes);
}
#define _mm512_maskz_loadu_epi8 emu_maskz_loadu_epi8

/* VPERMI2B: bits 0 ... 5 of an index choose a byte, bit 6 the table, bit 7 is not looked at. */
EMU emu_si emu_permutex2var_epi8(emu_si a, emu_si index, emu_si b)
{
    uint8_t table[128], at[64];
    memcpy(table, &a, 64);
    memcpy(table + 64, &b, 64);
    memcpy(at, &index, 64);
    for (int i = 0; i < 64; i++)
        at[i] = table[at[i] & 127];
    return emu_loadu_si512(at);
}
#define _mm512_permutex2var_epi8 emu_permutex2var_epi8

/* VPERMQ: bits 0 ... 2 of an index choose 8 bytes. */
EMU emu_si emu_permutexvar_epi64(emu_si index, emu_si a)
{
    uint64_t from[8], at[8];
    memcpy(from, &a, 64);
    memcpy(at, &index, 64);
    for (int i = 0; i < 8; i++)
        at[i] = from[at[i] & 7];
    return emu_loadu_si512(at);
}
#define _mm512_permutexvar_epi64 emu_permutexvar_epi64

/* VPDPBUSD: the products of 4 unsigned with 4 signed bytes are added to an int32, which wraps. */
EMU __m256i emu_dpbusd_256(__m256i sum, __m256i u, __m256i s)
{
    __m256i even_u = _mm256_and_si256(u, _mm256_set1_epi16(0xFF)), odd_u = _mm256_srli_epi16(u, 8);
    __m256i even_s = _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8), odd_s = _mm256_srai_epi16(s, 8);
    __m256i two = _mm256_add_epi32(_mm256_madd_epi16(even_u, even_s), _mm256_madd_epi16(odd_u, odd_s));
    return _mm256_add_epi32(sum, two);
}

EMU emu_si emu_dpbusd(emu_si sum, emu_si u, emu_si s)
{
    emu_si r = {{emu_dpbusd_256(sum.v[0], u.v[0], s.v[0]), emu_dpbusd_256(sum.v[1], u.v[1], s.v[1])}};
    return r;
}
#define DSV3__DPBUSD(sum, u, s) ((sum) = emu_dpbusd_256(sum, u, s))
#define DSV3__DPBUSD512(sum, u, s) ((sum) = emu_dpbusd(sum, u, s))

/* VDPBF16PS: fma of the high halves, then of the low ones, to nearest even whatever MXCSR says; operands and results that
   are denormal become 0 of their sign. (The CPU calls a result denormal before it is rounded to fewer bits, this after it:
   they differ where it rounds up to 2^-126 itself.) */
EMU __m256 emu_flush(__m256 v)
{
    const __m256i exponent = _mm256_set1_epi32(0x7F800000);
    __m256i bits = _mm256_castps_si256(v);
    __m256i small = _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), _mm256_setzero_si256());
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_and_si256(small, _mm256_set1_epi32(0x7FFFFFFF)), bits));
}

EMU __m256 emu_dpbf16_256(__m256 sum, __m256i w, __m256i x)
{
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
    __m256 w1 = emu_flush(_mm256_castsi256_ps(_mm256_and_si256(w, high)));
    __m256 x1 = emu_flush(_mm256_castsi256_ps(_mm256_and_si256(x, high)));
    __m256 w0 = emu_flush(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)));
    __m256 x0 = emu_flush(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)));
    sum = emu_flush(_mm256_fmadd_ps(w1, x1, emu_flush(sum)));
    return emu_flush(_mm256_fmadd_ps(w0, x0, sum));
}

/* w and x: registers of floats or of words, as the kernels have them. */
EMU emu_ps emu_dpbf16(emu_ps sum, const void *w, const void *x)
{
    emu_si a = emu_loadu_si512(w), b = emu_loadu_si512(x);
    emu_ps r = {{emu_dpbf16_256(sum.v[0], a.v[0], b.v[0]), emu_dpbf16_256(sum.v[1], a.v[1], b.v[1])}};
    return r;
}
EMU emu_ps emu_dpbf16_each(emu_ps sum, const void *w, uint32_t word)
{
    const emu_si x = emu_set1_epi32((int)word);
    return emu_dpbf16(sum, w, &x);
}
#define DSV3__DPBF16(sum, w, x) ((sum) = emu_dpbf16(sum, &(w), &(x)))
#define DSV3__DPBF16_EACH(sum, w, word) ((sum) = emu_dpbf16_each(sum, &(w), word))

/* VCVTNE2PS2BF16: to nearest even; what is denormal becomes 0 of its sign, a NaN a quiet one. */
EMU emu_ps emu_to_bf16(const void *low, const void *high)
{
    uint32_t v[32];
    uint16_t halves[32];
    memcpy(v, low, 64);
    memcpy(v + 16, high, 64);
    for (int i = 0; i < 32; i++) {
        if ((v[i] & 0x7F800000) == 0)
            v[i] &= 0x80000000;
        if ((v[i] & 0x7FFFFFFF) > 0x7F800000)
            v[i] |= 0x00400000;
        else
            v[i] += 0x7FFF + (v[i] >> 16 & 1);
        halves[i] = (uint16_t)(v[i] >> 16);
    }
    return emu_loadu_ps(halves);
}
#define DSV3__TO_BF16(words, low, high) ((words) = emu_to_bf16(&(low), &(high)))

/* AMX: eight tiles a thread, of 16 rows of 64 bytes, or of a word. What a tile holds before anything was loaded is not 0 here. */
typedef struct emu_tile {
    int32_t word[16][16];
} emu_tile;

static __thread emu_tile emu_tiles[8];
static __thread uint8_t emu_rows[8], emu_bytes[8];
static __thread int emu_tiles_open;

static void emu_tiles_begin(const uint8_t *shapes)
{
    int ok = shapes[0] == 1;
    for (int t = 0; t < 8; t++)
        ok = ok && (shapes[16 + 2 * t] == 64 || shapes[16 + 2 * t] == 4) && shapes[17 + 2 * t] == 0 && shapes[48 + t] >= 1 && shapes[48 + t] <= 16;
    if (!ok || emu_tiles_open)
        __builtin_trap();
    memcpy(emu_rows, shapes + 48, 8);
    for (int t = 0; t < 8; t++)
        emu_bytes[t] = shapes[16 + 2 * t];
    memset(emu_tiles, 0x55, sizeof emu_tiles);
    emu_tiles_open = 1;
}

static void emu_tile_load(int t, const void *p, size_t stride)
{
    if (!emu_tiles_open)
        __builtin_trap();
    memset(&emu_tiles[t], 0, sizeof emu_tiles[t]);
    for (size_t i = 0; i < emu_rows[t]; i++)
        memcpy(emu_tiles[t].word[i], (const uint8_t *)p + i * stride, emu_bytes[t]);
}

static void emu_tile_store(int t, void *p, size_t stride)
{
    if (!emu_tiles_open)
        __builtin_trap();
    for (size_t i = 0; i < emu_rows[t]; i++)
        memcpy((uint8_t *)p + i * stride, emu_tiles[t].word[i], emu_bytes[t]);
}

static void emu_tiles_fit(int sum, int a, int b)
{
    if (!emu_tiles_open || emu_rows[sum] != emu_rows[a] || emu_rows[b] != 16 || emu_bytes[a] != 64 ||
        emu_bytes[sum] != emu_bytes[b])
        __builtin_trap();
}

/* sum[m][n] += the 4 products of word k of row m of a with word n of row k of b, for all k. */
static void emu_tile_dot(int sum, int a, int b)
{
    emu_tiles_fit(sum, a, b);
    for (int m = 0; m < emu_rows[a]; m++)
        for (int k = 0; k < 16; k++) {
            int8_t w[4], x[16][4];
            memcpy(w, &emu_tiles[a].word[m][k], 4);
            memcpy(x, emu_tiles[b].word[k], 64);
            for (int n = 0; n < 16; n++)
                for (int i = 0; i < 4; i++)
                    emu_tiles[sum].word[m][n] = (int32_t)((uint32_t)emu_tiles[sum].word[m][n] + (uint32_t)(w[i] * x[n][i]));
        }
}

/* sum[m][n] += (the low halves' products, from +0 up) + (the high halves'). Operands and results below 2^-126 are 0. */
__attribute__((noinline, target("avx2,fma"))) static void emu_tile_dot_bf16_flushed(emu_tile *sum, const emu_tile *a, const emu_tile *b,
                                                                                    int rows)
{
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
    for (int m = 0; m < rows; m++)
        for (int n = 0; n < 16; n += 8) {
            __m256 even = _mm256_setzero_ps(), odd = even, y = _mm256_loadu_ps((const float *)(const void *)&sum->word[m][n]);
            for (int k = 0; k < 16; k++) {
                const __m256i w = _mm256_set1_epi32(a->word[m][k]), x = _mm256_loadu_si256((const __m256i *)(const void *)&b->word[k][n]);
                even = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), even);
                odd = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)), _mm256_castsi256_ps(_mm256_and_si256(x, high)), odd);
            }
            _mm256_storeu_ps((float *)(void *)&sum->word[m][n], _mm256_add_ps(y, _mm256_add_ps(even, odd)));
        }
}

static void emu_tile_dot_bf16(int sum, int a, int b)
{
    const unsigned csr = _mm_getcsr();
    emu_tiles_fit(sum, a, b);
    _mm_setcsr(0x9FC0); /* flush to zero, denormals are zeros */
    emu_tile_dot_bf16_flushed(&emu_tiles[sum], &emu_tiles[a], &emu_tiles[b], emu_rows[a]);
    _mm_setcsr(csr);
}
#define DSV3__TILES_BEGIN(shapes) emu_tiles_begin(*(shapes))
#define DSV3__TILES_END() (emu_tiles_open = 0)
#define DSV3__TILE_ZERO(t) memset(&emu_tiles[t], 0, sizeof emu_tiles[t])
#define DSV3__TILE_LOAD emu_tile_load
#define DSV3__TILE_STORE emu_tile_store
#define DSV3__TILE_DOT emu_tile_dot
#define DSV3__TILE_DOT_BF16 emu_tile_dot_bf16

#endif
#endif /* DSV3_EMULATE_AVX512_H */
