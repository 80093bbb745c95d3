/* What the machine allows: a plain read of memory, and a loop of each multiply-add. Used by bench.c, which supplies die, now and
   MAX_THREADS. */

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef struct job {
    void (*fn)(void *ctx, uint32_t i, uint32_t n);
    void *ctx;
    uint32_t i, n;
} job;

static void *job_main(void *p)
{
    job *j = (job *)p;
    j->fn(j->ctx, j->i, j->n);
    return NULL;
}

/* Seconds that fn(ctx, 0, n) ... fn(ctx, n-1, n) take, each on a thread of its own. Starting a thread costs some 50 us:
   the work must be long beside that. */
static double on_threads(uint32_t n, void (*fn)(void *ctx, uint32_t i, uint32_t n), void *ctx)
{
    pthread_t thread[MAX_THREADS];
    job jobs[MAX_THREADS];
    double start = now();
    for (uint32_t i = n; i--;) {
        jobs[i].fn = fn, jobs[i].ctx = ctx, jobs[i].i = i, jobs[i].n = n;
        if (i == 0)
            job_main(&jobs[0]);
        else if (pthread_create(&thread[i], NULL, job_main, &jobs[i]))
            die("cannot start a thread");
    }
    for (uint32_t i = 1; i < n; i++)
        pthread_join(thread[i], NULL);
    return now() - start;
}

static uint64_t sink; /* results land here, so that no loop is without use */

static uint64_t read_plain(const uint8_t *p, size_t n)
{
    uint64_t sum[8] = {0}, v[8];
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        memcpy(v, p + i, 64);
        for (uint32_t j = 0; j < 8; j++)
            sum[j] += v[j];
    }
    for (; i < n; i++)
        sum[0] += p[i];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

#if defined(__x86_64__)
/* ahead: each line is asked for 4 KB before it is read, as the kernels do. Some CPUs' own prefetchers fall short of that. */
__attribute__((target("avx2"))) static inline uint64_t read_avx2(const uint8_t *p, size_t n, const bool ahead)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    uint64_t sum[4];
    size_t i = 0;
    for (; i + 128 <= n; i += 128) {
        if (ahead) {
            _mm_prefetch((const char *)((uintptr_t)(p + i) + 4096), _MM_HINT_T1);
            _mm_prefetch((const char *)((uintptr_t)(p + i) + 4160), _MM_HINT_T1);
        }
        a = _mm256_add_epi64(a, _mm256_loadu_si256((const __m256i *)(const void *)(p + i)));
        b = _mm256_add_epi64(b, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 32)));
        c = _mm256_add_epi64(c, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 64)));
        d = _mm256_add_epi64(d, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 96)));
    }
    _mm256_storeu_si256((__m256i *)(void *)sum, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
    return sum[0] + sum[1] + sum[2] + sum[3] + read_plain(p + i, n - i);
}

/* Twelve independent chains: more than latency times width of two units. HIDE keeps the compiler from seeing that they
       are equal, and from taking what does not change out of the loop; the sum of the chains is the result. */
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define HIDE(u)   __asm__("" : "+x"(u))
#define CHAIN_START(i) \
    a##i = u;          \
    HIDE(a##i);
#define CHAIN_STEP(i) STEP(a##i, u, s);
#define CHAIN_SUM(i)  SUM(sum, a##i);
#define CHAINS(name, isa, type, start)                                                  \
    __attribute__((target(isa))) static uint64_t name(uint64_t n)                       \
    {                                                                                   \
        type u = start, s = start, sum = start, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9; \
        type a10, a11;                                                                  \
        uint32_t result;                                                                \
        TWELVE(CHAIN_START)                                                             \
        while (n--) {                                                                   \
            TWELVE(CHAIN_STEP)                                                          \
        }                                                                               \
        TWELVE(CHAIN_SUM)                                                               \
        memcpy(&result, &sum, sizeof result);                                           \
        return result;                                                                  \
    }

/* a = a / 2 + 1 / 2 settles at 1 */
#define STEP(a, u, s) a = _mm256_fmadd_ps(a, u, s)
#define SUM(sum, a)   sum = _mm256_add_ps(sum, a)
CHAINS(chains_fma_ymm, "avx2,fma", __m256, _mm256_set1_ps(0.5f))
#undef STEP
#undef SUM
#define STEP(a, u, s) a = _mm512_fmadd_ps(a, u, s)
#define SUM(sum, a)   sum = _mm512_add_ps(sum, a)
CHAINS(chains_fma_zmm, "avx512f", __m512, _mm512_set1_ps(0.5f))
#undef STEP
#undef SUM
/* what AVX2 takes for 32 8-bit products: three instructions */
#define STEP(a, u, s) \
    HIDE(u);          \
    a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), s))
#define SUM(sum, a) sum = _mm256_add_epi32(sum, a)
CHAINS(chains_maddubs_ymm, "avx2", __m256i, _mm256_set1_epi8(3))
#undef STEP
#undef SUM
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define STEP(a, u, s) a = _mm256_dpbusd_avx_epi32(a, u, s)
#define SUM(sum, a)   sum = _mm256_add_epi32(sum, a)
CHAINS(chains_dpbusd_ymm, "avx2,avxvnni", __m256i, _mm256_set1_epi8(3))
#undef STEP
#undef SUM
#define STEP(a, u, s) a = _mm512_dpbusd_epi32(a, u, s)
#define SUM(sum, a)   sum = _mm512_add_epi32(sum, a)
CHAINS(chains_dpbusd_zmm, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(3))
#undef STEP
#undef SUM
/* the sums grow until they stand still; 0x3F003F00 is a pair of 0.5 */
#define STEP(a, u, s) a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_castps_si512(u), (__m512bh)_mm512_castps_si512(s))
#define SUM(sum, a)   sum = _mm512_add_ps(sum, a)
CHAINS(chains_dpbf16_zmm, "avx512f,avx512bf16", __m512, _mm512_castsi512_ps(_mm512_set1_epi32(0x3F003F00)))
#undef STEP
#undef SUM
#define NEW_CHAINS(name) name
#else
#define NEW_CHAINS(name) NULL
#endif
#if DSV3__AMX
/* One of these makes 16,384 products in 16 cycles: one in 32 steps. */
__attribute__((target("amx-tile,amx-int8"))) static uint64_t chains_tdpbssd(uint64_t n)
{
    if (!dsv3__cpu_lend_tiles())
        return 0;
    DSV3__TILES_BEGIN(&dsv3__k_tile_shapes);
    for (n /= 32; n--;) {
        for (int i = 0; i < 3; i++) { /* 12 */
            DSV3__TILE_DOT(0, 4, 6);
            DSV3__TILE_DOT(1, 4, 7);
            DSV3__TILE_DOT(2, 5, 6);
            DSV3__TILE_DOT(3, 5, 7);
        }
    }
    DSV3__TILES_END();
    return n;
}

/* Of bf16 half as many. */
__attribute__((target("amx-tile,amx-bf16"))) static uint64_t chains_tdpbf16ps(uint64_t n)
{
    if (!dsv3__cpu_lend_tiles())
        return 0;
    DSV3__TILES_BEGIN(&dsv3__k_tile_shapes);
    DSV3__TILE_ZERO(4);
    DSV3__TILE_ZERO(5);
    DSV3__TILE_ZERO(6);
    DSV3__TILE_ZERO(7);
    for (n /= 32; n--;) {
        for (int i = 0; i < 3; i++) { /* 12 */
            DSV3__TILE_DOT_BF16(0, 4, 6);
            DSV3__TILE_DOT_BF16(1, 4, 7);
            DSV3__TILE_DOT_BF16(2, 5, 6);
            DSV3__TILE_DOT_BF16(3, 5, 7);
        }
    }
    DSV3__TILES_END();
    return n;
}
#define AMX_CHAINS(name) name
#else
#define AMX_CHAINS(name) NULL
#endif
#define X64_CHAINS(name) name
#else
#define X64_CHAINS(name) NULL
#define NEW_CHAINS(name) NULL
#define AMX_CHAINS(name) NULL
#endif

typedef enum peak {
    PEAK_FMA_YMM,
    PEAK_FMA_ZMM,
    PEAK_MADDUBS,
    PEAK_DPBUSD_YMM,
    PEAK_DPBUSD,
    PEAK_DPBF16,
    PEAK_TDPBSSD,
    PEAK_TDPBF16,
    N_PEAKS
} peak;

static const struct {
    const char *name;
    double macs; /* multiply-adds of a step of one chain */
    uint64_t (*chains)(uint64_t n);
} PEAKS[N_PEAKS] = {
    {"vfmadd231ps ymm", 8, X64_CHAINS(chains_fma_ymm)},
    {"vfmadd231ps zmm", 16, X64_CHAINS(chains_fma_zmm)},
    {"vpmaddubsw + vpmaddwd ymm", 32, X64_CHAINS(chains_maddubs_ymm)},
    {"vpdpbusd ymm", 32, NEW_CHAINS(chains_dpbusd_ymm)},
    {"vpdpbusd zmm", 64, NEW_CHAINS(chains_dpbusd_zmm)},
    {"vdpbf16ps zmm", 32, NEW_CHAINS(chains_dpbf16_zmm)},
    {"tdpbssd", 16384 / 32, AMX_CHAINS(chains_tdpbssd)},
    {"tdpbf16ps", 8192 / 32, AMX_CHAINS(chains_tdpbf16ps)},
};

/* Does this CPU have the instruction, this program a loop of it, and the system the registers. */
static bool peak_there(peak p)
{
    unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0;
    bool zmm = dsv3_isa_supported(DSV3_ISA_AVX512);
    if (!PEAKS[p].chains || !dsv3_isa_supported(DSV3_ISA_AVX2))
        return false;
#if defined(__x86_64__)
    __get_cpuid_count(7, 1, &a1, &b, &c, &d);
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
#endif
    switch ((int)p) {
    case PEAK_FMA_ZMM: return zmm;
    case PEAK_DPBUSD_YMM: return a1 >> 4 & 1;      /* AVX-VNNI */
    case PEAK_DPBUSD: return zmm && (c >> 11 & 1); /* AVX512_VNNI */
    case PEAK_DPBF16: return zmm && (a1 >> 5 & 1); /* AVX512_BF16 */
    case PEAK_TDPBSSD:
    case PEAK_TDPBF16: return dsv3_isa_supported(DSV3_ISA_AVX512_AMX) && dsv3__cpu_lend_tiles();
    default: return true;
    }
}

enum { N_CHAIN_STEPS = 4000000 };

static void chains_job(void *ctx, uint32_t i, uint32_t n)
{
    (void)i, (void)n;
    __sync_fetch_and_add(&sink, PEAKS[*(const peak *)ctx].chains(N_CHAIN_STEPS));
}

/* Multiply-adds a second of n threads; 0 where there is no such peak (N_PEAKS: scalar kernels, other machines). */
static double peak_rate(peak p, uint32_t n)
{
    return p < N_PEAKS ? 12.0 * N_CHAIN_STEPS * PEAKS[p].macs * n / on_threads(n, chains_job, &p) : 0;
}

/* The fastest instruction for products in f32, in bf16, of halves (attention's) or in 8 bits that kernels of this level may
   use; bf16 where there is none of its own is two f32 FMAs a pair. */
static peak peak_of(dsv3_isa isa, const char *products)
{
    bool bf16 = isa == DSV3_ISA_AVX512_BF16, amx = isa == DSV3_ISA_AVX512_AMX,
         vnni = bf16 || amx || isa == DSV3_ISA_AVX512_VNNI, zmm = vnni || isa == DSV3_ISA_AVX512;
    if (isa == DSV3_ISA_SCALAR || !peak_there(PEAK_FMA_YMM))
        return N_PEAKS;
    if (strcmp(products, "int8") == 0)
        return amx && peak_there(PEAK_TDPBSSD)                           ? PEAK_TDPBSSD
               : vnni && peak_there(PEAK_DPBUSD)                         ? PEAK_DPBUSD
               : isa == DSV3_ISA_AVX_VNNI && peak_there(PEAK_DPBUSD_YMM) ? PEAK_DPBUSD_YMM
                                                                         : PEAK_MADDUBS;
    if (strcmp(products, "halves") == 0 && amx && peak_there(PEAK_TDPBF16))
        return PEAK_TDPBF16;
    if (strcmp(products, "f32") && bf16 && peak_there(PEAK_DPBF16))
        return PEAK_DPBF16;
    return zmm && peak_there(PEAK_FMA_ZMM) ? PEAK_FMA_ZMM : PEAK_FMA_YMM;
}

enum { N_TRIPS = 5000 };

static void trip_job(void *ctx, uint32_t i, uint32_t n)
{
    uint32_t *line = (uint32_t *)ctx;
    (void)n;
    for (uint32_t k = 0; k < N_TRIPS; k++) {
        while (__atomic_load_n(line, __ATOMIC_ACQUIRE) != 2 * k + i)
            continue;
        __atomic_store_n(line, 2 * k + i + 1, __ATOMIC_RELEASE);
    }
}

/* Nanoseconds from one thread to another and back, through one cache line: cores of one die take about 100, cores of two
   dies 450, and a virtual machine's cores move from the one to the other while it runs. What memory gives depends on it,
   since each die has a path of its own. 0 for one thread. */
static double round_trip(uint32_t n)
{
    static uint32_t line[32];
    line[16] = 0; /* no neighbours */
    return n < 2 ? 0 : 1e9 * on_threads(2, trip_job, &line[16]) / N_TRIPS;
}

typedef struct span {
    const uint8_t *p;
    size_t n;
} span;

typedef struct spans {
    span *v; /* [n], by address */
    size_t n;
    uint64_t total; /* bytes */
    bool ahead;     /* how they are read, see read_avx2 */
} spans;

static void spans_job(void *ctx, uint32_t i, uint32_t n)
{
    const spans *s = (const spans *)ctx;
    uint64_t from = s->total / n * i, to = i + 1 == n ? s->total : s->total / n * (i + 1), at = 0, sum = 0;
    for (size_t k = 0; k < s->n && at < to; at += s->v[k++].n) {
        uint64_t a = from > at ? from - at : 0, b = to - at < s->v[k].n ? to - at : s->v[k].n;
        if (a >= b)
            continue;
#if defined(__x86_64__)
        if (dsv3_isa_supported(DSV3_ISA_AVX2)) {
            const uint8_t *p = s->v[k].p + a;
            sum += s->ahead ? read_avx2(p, (size_t)(b - a), true) : read_avx2(p, (size_t)(b - a), false);
            continue;
        }
#endif
        sum += read_plain(s->v[k].p + a, (size_t)(b - a));
    }
    __sync_fetch_and_add(&sink, sum);
}

/* Bytes a second of n threads, each reading its share front to back. *plain: by loads alone; returned: or, where that is
   better, with lines asked for ahead. */
static double read_rate(spans *s, uint32_t n, double *plain)
{
    s->ahead = false;
    *plain = (double)s->total / on_threads(n, spans_job, s);
    s->ahead = true;
    double ahead = (double)s->total / on_threads(n, spans_job, s);
    return *plain > ahead ? *plain : ahead;
}

/* An anonymous buffer of 1 GB that asks to lie in huge pages: the best that memory gives. */
static spans *huge_pages(void)
{
    static span one;
    static spans all;
    if (!one.p) {
        one.n = (size_t)1 << 30;
        void *p = mmap(NULL, one.n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            die("no memory for the buffer of 1 GB that the read is measured on");
#ifdef MADV_HUGEPAGE
        madvise(p, one.n, MADV_HUGEPAGE);
#endif
        memset(p, 1, one.n);
        one.p = (const uint8_t *)p;
        all.v = &one, all.n = 1, all.total = one.n;
    }
    return &all;
}
