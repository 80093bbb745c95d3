/* dsv3_matmul alone: the shapes of V3's and bench-3b's projections times 1 ... 512 rows, out of a buffer of weights that no cache
   holds. Threads work apart, each on matrices of its own: nothing waits for anything, what is timed is the inner loops with
   their packing. Used by bench.c. */

enum { KERNEL_BYTES = 512 << 20, MAX_MATRICES = 512 };

static const struct {
    uint32_t n, k; /* outputs, inputs */
} KERNEL_SHAPES[] = {{2048, 7168}, {7168, 2048}, {1536, 7168}, {1408, 2048}};
static const uint32_t KERNEL_ROWS[] = {1, 4, 16, 48, 512};

typedef struct kernel_job {
    dsv3_tensor matrix[MAX_MATRICES];
    uint32_t n_matrices, calls, rows;
    const float *x; /* [rows, k] */
    float *out;     /* [threads, rows, n] */
    uint32_t n;
    dsv3_matmul_opts options;
} kernel_job;

static void kernel_run(void *ctx, uint32_t i, uint32_t n)
{
    const kernel_job *j = (const kernel_job *)ctx;
    float *out_rows = j->out + (size_t)i * j->rows * j->n;
    dsv3_error error;
    uint32_t sum = 0, bits;
    for (uint32_t c = 0; c < j->calls; c++) {
        must(dsv3_matmul(out_rows, j->x, j->rows, &j->matrix[(c * n + i) % j->n_matrices], &j->options, &error),
             &error);
        memcpy(&bits, out_rows + c % j->n, sizeof bits);
        sum += bits;
    }
    __sync_fetch_and_add(&sink, sum);
}

/* A few outputs against the weights as f32 in f64: what was timed was the product. */
static void kernel_check(const kernel_job *j, uint32_t k, double tolerance)
{
    const dsv3_tensor *w = &j->matrix[0];
    kernel_job one = *j;
    dsv3_error error;
    float *row = (float *)need(k * sizeof *row);
    one.calls = 1;
    kernel_run(&one, 0, 1);
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t r = i * (j->n - 1) / 3, t = i * (j->rows - 1) / 3;
        double sum = 0, size = 0, found = j->out[(size_t)t * j->n + r];
        must(dsv3_dequantize(row, w, r, 1, &error), &error);
        for (uint32_t c = 0; c < k; c++) {
            double product = (double)row[c] * j->x[(size_t)t * k + c];
            sum += product, size += fabs(product);
        }
        if (!(fabs(found - sum) <= tolerance * size) || size == 0)
            die("matmul %u x %u, %u rows: output [%u, %u] is %g, expected %g", j->n, k, j->rows, t, r, found, sum);
    }
    free(row);
}

/* Weights of `dtype` at p, with scales as checkpoints have them. */
static dsv3_tensor kernel_matrix(const void *p, const void *scale, dsv3_dtype dtype, uint32_t n, uint32_t k)
{
    dsv3_tensor w;
    memset(&w, 0, sizeof w);
    w.data = p, w.dtype = dtype, w.rank = 2;
    w.shape[0] = n, w.shape[1] = k, w.row_stride = (uint64_t)k * dsv3_dtype_size(dtype);
    if (dtype == DSV3_DTYPE_F8_E4M3) {
        w.scale = scale, w.scale_dtype = DSV3_DTYPE_F32;
        w.block_rows = w.block_cols = 128, w.scale_stride = (k + 127) / 128;
    } else if (dtype == DSV3_DTYPE_I8) {
        w.scale = scale, w.scale_dtype = DSV3_DTYPE_F32;
        w.block_rows = 1, w.block_cols = k, w.scale_stride = 1;
    }
    return w;
}

/* buffer: [KERNEL_BYTES] codes. */
static void kernel_case(spans *read_of, const uint8_t *buffer, const float *scale, const float *x, dsv3_dtype dtype,
                        const char *dtype_name, dsv3_isa isa, const char *compute, uint32_t threads, uint32_t n,
                        uint32_t k, uint32_t rows)
{
    static kernel_job j;
    double rate[MAX_REPS], bound[MAX_REPS], ratio[MAX_REPS], read[MAX_REPS], peak_gmac[MAX_REPS];
    double cpu[MAX_REPS];
    size_t bytes = (size_t)n * k * dsv3_dtype_size(dtype);
    double macs = (double)n * k * rows, scales = dtype == DSV3_DTYPE_F8_E4M3 ? 4.0 * (n / 128) * (k / 128) : 4.0 * n;
    peak p = peak_of(isa, compute_products(compute));
    uint32_t reps = opt.reps.v[0];
    memset(&j, 0, sizeof j);
    j.options.isa = isa;
    j.options.compute = compute_of(compute);
    while (j.n_matrices < MAX_MATRICES && (j.n_matrices + 1) * bytes <= KERNEL_BYTES) {
        j.matrix[j.n_matrices] = kernel_matrix(buffer + j.n_matrices * bytes, scale, dtype, n, k);
        j.n_matrices++;
    }
    j.n = n, j.rows = rows, j.x = x, j.calls = 1;
    j.out = (float *)need((size_t)threads * rows * n * sizeof(float));
    kernel_check(&j, k, strcmp(compute, "f32") == 0 ? 1e-6 : strcmp(compute, "bf16") == 0 ? 4e-3 : 0.05);
    double start = now();
    kernel_run(&j, 0, 1);
    double one = now() - start;
    j.calls = one > 0.06 ? 1 : (uint32_t)(0.06 / one) + 1;
    double plain, before = read_rate(read_of, threads, &plain), peak_before = peak_rate(p, threads);
    for (uint32_t r = 0; r < reps; r++) {
        progress("kernels, %s %s, %u threads, %u x %u, %u rows: %u of %u", dtype_name, compute, threads, n, k, rows,
                 r + 1, reps);
        double cpu_start = seconds(CLOCK_PROCESS_CPUTIME_ID), took = on_threads(threads, kernel_run, &j);
        cpu[r] = (seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu_start) / (took * threads);
        rate[r] = macs * j.calls * threads / took;
        double after = read_rate(read_of, threads, &plain), peak_after = peak_rate(p, threads);
        read[r] = (before + after) / 2, peak_gmac[r] = (peak_before + peak_after) / 2;
        double seconds_bytes = ((double)bytes + scales) / read[r],
               seconds_macs = peak_gmac[r] > 0 ? macs / peak_gmac[r] : 0;
        bound[r] = macs / (seconds_bytes > seconds_macs ? seconds_bytes : seconds_macs);
        ratio[r] = rate[r] / bound[r];
        before = after, peak_before = peak_after;
    }
    char size[32];
    double gmac = 1e-9 * stats_of(rate, reps).mid, gb = gmac * (double)bytes / macs,
           roof = 1e-9 * stats_of(read, reps).mid;
    double most = 1e-9 * stats_of(peak_gmac, reps).mid;
    snprintf(size, sizeof size, "%u x %u", n, k);
    out_text("what", NULL, "kernel");
    out_text("shape", "weights", size);
    out_text("dtype", "dtype", dtype_name);
    out_text("compute", "compute", compute);
    out_text("isa", "isa", dsv3_isa_name(isa));
    out_number("threads", "threads", 0, threads);
    out_number("context", NULL, 0, 0);
    out_number("rows", "rows", 0, rows);
    out_number("tok_s", NULL, 0, 1e9 * gmac / ((double)n * k));
    out_number("bound_tok_s", NULL, 0, stats_of(bound, reps).mid / ((double)n * k));
    out_number("gmac_s", "GMAC/s", 1, gmac);
    out_number("peak_gmac_s", "of", 1, most);
    out_number("gb_s", "GB/s", 1, gb);
    out_number("read_gb_s", "of", 1, roof);
    out_text("bound", "bound by", gmac <= 0 || most <= 0 || (double)bytes / roof > macs / most ? "bytes" : "macs");
    out_number("ratio", "ratio", 2, stats_of(ratio, reps).mid);
    out_number("cpu", "cpu", 2, stats_of(cpu, reps).mid);
    out_number("reps", NULL, 0, reps);
    out_end();
    free(j.out);
}

static void run_kernels(dsv3_dtype dtype, const char *dtype_name, dsv3_isa isa, const char *compute)
{
    enum { X_FLOATS = 512 * 7168 };
    spec codes, scales, rows;
    double z[N_QUANTILES];
    uint8_t quantiles[4 * N_QUANTILES];
    uint64_t state = 3;
    spans *all = huge_pages(),
          part = *all; /* the first half of that buffer: the same pages for the work and the read */
    span half = all->v[0];
    uint8_t *buffer = (uint8_t *)(uintptr_t)half.p;
    float *scale = (float *)need((7168 + 8) * sizeof *scale), *x = (float *)need((X_FLOATS + 8) * sizeof *x);
    bool fp8 = dtype == DSV3_DTYPE_F8_E4M3, int8 = dtype == DSV3_DTYPE_I8;
    half.n = KERNEL_BYTES, part.v = &half, part.n = 1, part.total = half.n;
    memset(&codes, 0, sizeof codes);
    scales = rows = codes;
    gauss_quantiles(z);
    codes.dtype = dtype, codes.std = fp8 ? CODE_STD_FP8 : int8 ? CODE_STD_INT8 : 0.02;
    scales.dtype = rows.dtype = DSV3_DTYPE_F32;
    scales.mean = 0.02 / codes.std, scales.std = 0.05 * scales.mean, rows.std = 1;
    progress("kernels: weights%s", "");
    quantile_table(quantiles, &codes, z);
    fill(buffer, KERNEL_BYTES / dsv3_dtype_size(dtype), dsv3_dtype_size(dtype), quantiles, &state);
    quantile_table(quantiles, &scales, z);
    fill((uint8_t *)scale, 7168, 4, quantiles, &state);
    quantile_table(quantiles, &rows, z);
    fill((uint8_t *)x, X_FLOATS, 4, quantiles, &state);
    for (uint32_t t = 0; t < opt.threads.n; t++)
        for (size_t s = 0; s < sizeof KERNEL_SHAPES / sizeof *KERNEL_SHAPES; s++)
            for (size_t r = 0; r < sizeof KERNEL_ROWS / sizeof *KERNEL_ROWS; r++)
                kernel_case(&part, buffer, scale, x, dtype, dtype_name, isa, compute, opt.threads.v[t],
                            KERNEL_SHAPES[s].n, KERNEL_SHAPES[s].k, KERNEL_ROWS[r]);
    out_table();
    free(scale), free(x);
}
