/* What the machine allows: a plain read of memory, and a loop of multiply-adds. Used by bench.c, which supplies die, now and
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
__attribute__((target("avx2"))) static uint64_t read_avx2(const uint8_t *p, size_t n)
{
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    uint64_t sum[4];
    size_t i = 0;
    for (; i + 128 <= n; i += 128) {
        a = _mm256_add_epi64(a, _mm256_loadu_si256((const __m256i *)(const void *)(p + i)));
        b = _mm256_add_epi64(b, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 32)));
        c = _mm256_add_epi64(c, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 64)));
        d = _mm256_add_epi64(d, _mm256_loadu_si256((const __m256i *)(const void *)(p + i + 96)));
    }
    _mm256_storeu_si256((__m256i *)(void *)sum, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
    return sum[0] + sum[1] + sum[2] + sum[3] + read_plain(p + i, n - i);
}

    #define TWELVE(X)      X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
    #define CHAIN_START(i) a##i = SET((float)i);
    #define CHAIN_STEP(i)  a##i = FMA(a##i, half, half);
    #define CHAIN_SUM(i)   sum = FMA(a##i, half, sum);
    /* Twelve independent chains a = a / 2 + 1 / 2, which settle at 1: more than latency times width of two units. */
    #define CHAINS(name, isa, type)                                                              \
        __attribute__((target(isa))) static float name(uint64_t n)                               \
        {                                                                                        \
            type half = SET(0.5f), sum = half, a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11; \
            float result;                                                                        \
            TWELVE(CHAIN_START)                                                                  \
            while (n--) {                                                                        \
                TWELVE(CHAIN_STEP)                                                               \
            }                                                                                    \
            TWELVE(CHAIN_SUM)                                                                    \
            memcpy(&result, &sum, sizeof result);                                                \
            return result;                                                                       \
        }
    #define SET _mm256_set1_ps
    #define FMA _mm256_fmadd_ps
CHAINS(chains_avx2, "avx2,fma", __m256)
    #undef SET
    #undef FMA
    #define SET _mm512_set1_ps
    #define FMA _mm512_fmadd_ps
CHAINS(chains_avx512, "avx512f", __m512)
#endif

enum { N_CHAIN_STEPS = 4000000 };

static void chains_job(void *ctx, uint32_t i, uint32_t n)
{
    float result = 0;
    (void)i, (void)n, (void)ctx;
#if defined(__x86_64__)
    result = (*(const dsv3_isa *)ctx == DSV3_ISA_AVX512 ? chains_avx512 : chains_avx2)(N_CHAIN_STEPS);
#endif
    __sync_fetch_and_add(&sink, (uint64_t)result);
}

/* Multiply-adds a second of n threads; 0 where no loop is written for the instruction set (scalar, other machines). */
static double peak_rate(dsv3_isa isa, uint32_t n)
{
    double lanes = isa == DSV3_ISA_AVX512 ? 16 : isa == DSV3_ISA_AVX2 ? 8 : 0;
    return lanes > 0 ? 12.0 * N_CHAIN_STEPS * lanes * n / on_threads(n, chains_job, &isa) : 0;
}

typedef struct span {
    const uint8_t *p;
    size_t n;
} span;

typedef struct spans {
    span *v; /* [n], by address */
    size_t n;
    uint64_t total; /* bytes */
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
            sum += read_avx2(s->v[k].p + a, (size_t)(b - a));
            continue;
        }
#endif
        sum += read_plain(s->v[k].p + a, (size_t)(b - a));
    }
    __sync_fetch_and_add(&sink, sum);
}

/* Bytes a second of n threads, each reading its share front to back. */
static double read_rate(spans *s, uint32_t n)
{
    return (double)s->total / on_threads(n, spans_job, s);
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
