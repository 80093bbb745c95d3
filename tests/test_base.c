/* The floors base, err and mem: checked arithmetic, the message formatter, the caller's allocator. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

static const char *format(char *buffer, size_t size, const char *text, ...)
{
    va_list args;
    va_start(args, text);
    size_t n = dsv3__format_va(buffer, size, text, args);
    va_end(args);
    CHECK_EQ_UINT(n, strlen(buffer));
    return buffer;
}

TEST(checked_arithmetic)
{
    uint64_t v;
    CHECK(dsv3__mul(0, UINT64_MAX, &v) && v == 0);
    CHECK(dsv3__mul(UINT64_MAX, 0, &v) && v == 0);
    CHECK(dsv3__mul(UINT64_MAX, 1, &v) && v == UINT64_MAX);
    CHECK(dsv3__mul(0xFFFFFFFFu, 0x100000001u, &v) && v == UINT64_MAX);
    CHECK(!dsv3__mul(0x100000000u, 0x100000000u, &v));
    CHECK(!dsv3__mul(UINT64_MAX, 2, &v));
    CHECK(!dsv3__mul(3, UINT64_MAX / 3 + 1, &v));
    CHECK(dsv3__mul(3, UINT64_MAX / 3, &v));
    CHECK(dsv3__add(UINT64_MAX, 0, &v) && v == UINT64_MAX);
    CHECK(dsv3__add(UINT64_MAX - 7, 7, &v) && v == UINT64_MAX);
    CHECK(!dsv3__add(UINT64_MAX, 1, &v));
    CHECK(!dsv3__add(UINT64_MAX, UINT64_MAX, &v));
    CHECK_EQ_UINT(dsv3__ceil_div(0, 128), 0);
    CHECK_EQ_UINT(dsv3__ceil_div(1, 128), 1);
    CHECK_EQ_UINT(dsv3__ceil_div(128, 128), 1);
    CHECK_EQ_UINT(dsv3__ceil_div(576, 128), 5);
    CHECK_EQ_UINT(dsv3__ceil_div(UINT64_MAX, 2), UINT64_MAX / 2 + 1);
    CHECK_EQ_UINT(dsv3__min(3, 4), 3);
    CHECK_EQ_UINT(dsv3__min(4, 3), 3);
}

TEST(loads_from_any_address)
{
    static const uint8_t bytes[] = {0xFF, 0x01, 0x02, 0x03, 0x84, 0x05, 0x06, 0x07, 0x88, 0xFF};
    CHECK_EQ_UINT(dsv3__load16(bytes + 1), 0x0201);
    CHECK_EQ_UINT(dsv3__load32(bytes + 1), 0x84030201u);
    CHECK_EQ_UINT(dsv3__load64(bytes + 1), 0x8807060584030201ull);
    CHECK_EQ_UINT(dsv3__float_bits(1.0f), 0x3F800000u);
    CHECK(dsv3__bits_float(0xC0490FDBu) == -3.14159274f);
    CHECK_EQ_UINT(dsv3__float_bits(dsv3__bits_float(0x7FC01234u)), 0x7FC01234u);
}

TEST(hash)
{
    CHECK(dsv3__hash(0, "ab", 2) != dsv3__hash(0, "ba", 2));
    CHECK(dsv3__hash(0, "ab", 2) == dsv3__hash(0, "abc", 2));
    CHECK(dsv3__hash(0, "", 0) != dsv3__hash(0, "\0", 1));
}

TEST(formatter)
{
    char b[256];
    dsv3__str s;
    uint64_t shape[3] = {576, 7168, UINT64_MAX};
    s.p = "key\n\x7f\xc3\xa9", s.n = 7;
    CHECK_EQ_STR(format(b, sizeof b, "plain"), "plain");
    CHECK_EQ_STR(format(b, sizeof b, ""), "");
    CHECK_EQ_STR(format(b, sizeof b, "%s: %S", "config.json", &s), "config.json: key??\xc3\xa9");
    CHECK_EQ_STR(format(b, sizeof b, "%u %u", (uint64_t)0, UINT64_MAX), "0 18446744073709551615");
    CHECK_EQ_STR(format(b, sizeof b, "%d %d %d", (int64_t)-1, INT64_MIN, INT64_MAX), "-1 -9223372036854775808 9223372036854775807");
    CHECK_EQ_STR(format(b, sizeof b, "%D %D %D", shape, (uint32_t)3, shape, (uint32_t)1, shape, (uint32_t)0),
                 "[576, 7168, 18446744073709551615] [576] []");
    CHECK_EQ_STR(format(b, sizeof b, "100%%"), "100%");
}

TEST(formatter_doubles)
{
    char b[64];
    static const struct {
        double v;
        const char *text;
    } cases[] = {{0, "0"},           {1, "1"},         {-1, "-1"},       {2.5, "2.5"},      {0.1, "0.1"},         {40, "40"},
                 {0.0625, "0.0625"}, {1e-5, "1e-5"},   {1e-6, "1e-6"},   {1.5e-6, "1.5e-6"}, {123456, "123456"},   {1e6, "1e6"},
                 {10000, "10000"},   {-2.25, "-2.25"}, {0.001, "0.001"}, {5e-324, "4.940656e-324"}, {2.5e7, "2.5e7"}, {50000.5, "50000.5"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        CHECK_EQ_STR(format(b, sizeof b, "%f", cases[i].v), cases[i].text);
    CHECK_EQ_STR(format(b, sizeof b, "%f %f %f", HUGE_VAL, -HUGE_VAL, HUGE_VAL - HUGE_VAL), "inf -inf nan");
    CHECK_NEAR(strtod(format(b, sizeof b, "%f", 1.7e308), NULL), 1.7e308, 1e303);
    CHECK_NEAR(strtod(format(b, sizeof b, "%f", 1234567.0), NULL), 1234567.0, 1);
    CHECK_NEAR(strtod(format(b, sizeof b, "%f", 0.9999999), NULL), 0.9999999, 1e-6);
}

/* Too long a text is cut between code points, for every length of the buffer. */
TEST(formatter_cuts_between_code_points)
{
    static const char text[] = "a\xc3\xa9\xe4\xb8\x80\xf0\x9f\x98\x80z";
    for (size_t size = 1; size <= sizeof text + 2; size++) {
        char b[32], at = 0;
        memset(b, '#', sizeof b);
        size_t n = dsv3__format(b, size, "%s", text), whole = 0;
        static const size_t ends[] = {0, 1, 3, 6, 10, 11};
        for (size_t i = 0; i < 6; i++)
            if (ends[i] <= size - 1)
                whole = ends[i];
        CHECK_EQ_UINT(n, whole);
        CHECK_BYTES(b, n, text, whole);
        CHECK_EQ_INT(b[n], 0);
        at = b[size];
        CHECK_EQ_INT(at, '#');
    }
}

TEST(errors_are_told_in_full)
{
    dsv3_error e;
    memset(&e, 0xEE, sizeof e);
    dsv3_result r = DSV3__FAIL_AT(&e, DSV3_ERROR_JSON, 77, "config.json: byte %u", (uint64_t)77);
    CHECK_EQ_INT(r, DSV3_ERROR_JSON);
    CHECK_EQ_INT(e.code, DSV3_ERROR_JSON);
    CHECK_EQ_UINT(e.line, __LINE__ - 3);
    CHECK_EQ_UINT(e.offset, 77);
    CHECK_EQ_STR(e.message, "config.json: byte 77");
    dsv3__err_clear(&e);
    CHECK(e.code == DSV3_OK && e.line == 0 && e.offset == 0);
    CHECK_EQ_STR(e.message, "");
}

TEST(result_names)
{
    static const dsv3_result all[] = {
        DSV3_OK, DSV3_ERROR_INVALID_ARGUMENT, DSV3_ERROR_INVALID_OPTIONS, DSV3_ERROR_OUT_OF_MEMORY, DSV3_ERROR_MEMORY_LIMIT,
        DSV3_ERROR_BUFFER_TOO_SMALL, DSV3_ERROR_CONTEXT_FULL, DSV3_ERROR_CANCELLED, DSV3_ERROR_FILE_NOT_FOUND, DSV3_ERROR_IO,
        DSV3_ERROR_TRUNCATED, DSV3_ERROR_JSON, DSV3_ERROR_SAFETENSORS, DSV3_ERROR_UNSUPPORTED_MODEL, DSV3_ERROR_MISSING_TENSOR,
        DSV3_ERROR_BAD_TENSOR, DSV3_ERROR_TOKENIZER, DSV3_ERROR_UNSUPPORTED_CPU, DSV3_ERROR_THREAD, DSV3_ERROR_FEATURE_DISABLED};
    /* Numbers, once given, keep their meaning. */
    static const int numbers[] = {0, -1, -2, -3, -4, -5, -6, -7, -20, -21, -22, -23, -24, -30, -31, -32, -33, -40, -41, -42};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        const char *name = dsv3_result_name(all[i]);
        CHECK_EQ_INT((int)all[i], numbers[i]);
        CHECK(strncmp(name, "DSV3_", 5) == 0 && !strchr(name, '?'));
        for (size_t k = 0; k < i; k++)
            CHECK(strcmp(name, dsv3_result_name(all[k])) != 0);
    }
    CHECK_EQ_STR(dsv3_result_name(DSV3_OK), "DSV3_OK");
    CHECK_EQ_STR(dsv3_result_name(DSV3_ERROR_BAD_TENSOR), "DSV3_ERROR_BAD_TENSOR");
    CHECK(dsv3_result_name((dsv3_result)12345) != NULL);
}

TEST(version)
{
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", DSV3_VERSION_MAJOR, DSV3_VERSION_MINOR, DSV3_VERSION_PATCH);
    CHECK_EQ_UINT(dsv3_version(), DSV3_VERSION);
    CHECK_EQ_STR(DSV3_VERSION_STRING, text);
    CHECK_EQ_UINT(DSV3_VERSION, DSV3_VERSION_MAJOR * 1000000 + DSV3_VERSION_MINOR * 1000 + DSV3_VERSION_PATCH);
}

TEST(memory_is_aligned_and_counted)
{
    tiny_heap heap;
    dsv3__mem mem;
    dsv3_error e;
    void *p[3];
    memset(&heap, 0, sizeof heap);
    dsv3_allocator a = tiny_allocator(&heap);
    dsv3__mem_init(&mem, &a, 0);
    static const uint64_t sizes[3] = {0, 1, 1000};
    for (int i = 0; i < 3; i++) {
        REQUIRE(CHECK_OK(dsv3__mem_alloc(&mem, &p[i], sizes[i], "test", &e), e));
        CHECK_EQ_UINT((uintptr_t)p[i] % 64, 0);
        memset(p[i], 1, (size_t)sizes[i]);
        CHECK_EQ_UINT(mem.used, heap.live_bytes);
    }
    CHECK_EQ_UINT(heap.n_allocs, 3);
    for (int i = 0; i < 3; i++)
        dsv3__mem_free(&mem, p[i]);
    dsv3__mem_free(&mem, NULL);
    CHECK_EQ_UINT(mem.used, 0);
    CHECK_EQ_UINT(heap.live_bytes, 0);
    CHECK_EQ_UINT(heap.n_damaged + heap.n_strange, 0);
}

TEST(memory_by_default)
{
    dsv3__mem mem;
    dsv3_error e;
    void *p;
    dsv3__mem_init(&mem, NULL, 0);
    for (uint64_t size = 1; size < 5000; size = size * 2 + 1) {
        REQUIRE(CHECK_OK(dsv3__mem_alloc(&mem, &p, size, "test", &e), e));
        CHECK_EQ_UINT((uintptr_t)p % 64, 0);
        memset(p, 2, (size_t)size);
        dsv3__mem_free(&mem, p);
    }
    CHECK_EQ_UINT(mem.used, 0);
}

TEST(memory_failures)
{
    tiny_heap heap;
    dsv3__mem mem;
    dsv3_error e;
    void *p = &heap, *q;
    memset(&heap, 0, sizeof heap);
    dsv3_allocator a = tiny_allocator(&heap);
    heap.fail_at = 1;
    dsv3__mem_init(&mem, &a, 0);
    CHECK_RESULT(dsv3__mem_alloc(&mem, &p, 100, "latent cache", &e), DSV3_ERROR_OUT_OF_MEMORY, e);
    CHECK(p == NULL);
    CHECK_CONTAINS(e.message, "latent cache");
    CHECK_EQ_UINT(mem.used, 0);
    CHECK_RESULT(dsv3__mem_alloc(&mem, &p, UINT64_MAX, "latent cache", &e), DSV3_ERROR_OUT_OF_MEMORY, e);
    CHECK_RESULT(dsv3__mem_alloc(&mem, &p, UINT64_MAX - 63, "latent cache", &e), DSV3_ERROR_OUT_OF_MEMORY, e);

    dsv3__mem_init(&mem, &a, 4096);
    REQUIRE(CHECK_OK(dsv3__mem_alloc(&mem, &q, 1000, "weights", &e), e));
    CHECK_RESULT(dsv3__mem_alloc(&mem, &p, 4000, "latent cache", &e), DSV3_ERROR_MEMORY_LIMIT, e);
    CHECK(p == NULL);
    CHECK_CONTAINS(e.message, "4096");
    CHECK_CONTAINS(e.message, "4000");
    CHECK_RESULT(dsv3__mem_alloc(&mem, &p, UINT64_MAX - 100, "latent cache", &e), DSV3_ERROR_MEMORY_LIMIT, e);
    REQUIRE(CHECK_OK(dsv3__mem_alloc(&mem, &p, 2900, "weights", &e), e));
    CHECK(mem.used <= 4096);
    dsv3__mem_free(&mem, p);
    dsv3__mem_free(&mem, q);
    CHECK_EQ_UINT(heap.live_bytes, 0);
}

TEST(memory_grows)
{
    tiny_heap heap;
    dsv3__mem mem;
    dsv3_error e;
    void *array = NULL;
    uint64_t cap = 0;
    memset(&heap, 0, sizeof heap);
    dsv3_allocator a = tiny_allocator(&heap);
    dsv3__mem_init(&mem, &a, 0);
    for (uint64_t n = 0; n < 1000; n++) {
        REQUIRE(CHECK_OK(dsv3__mem_grow(&mem, &array, &cap, n, n + 1, sizeof(uint32_t), "list", &e), e));
        CHECK(cap > n);
        ((uint32_t *)array)[n] = (uint32_t)n * 7;
    }
    for (uint64_t n = 0; n < 1000; n++)
        CHECK_EQ_UINT(((uint32_t *)array)[n], n * 7);
    CHECK(heap.n_allocs < 20);
    uint64_t allocs = heap.n_allocs, old_cap = cap;
    CHECK_OK(dsv3__mem_grow(&mem, &array, &cap, 1000, cap, sizeof(uint32_t), "list", &e), e);
    CHECK_EQ_UINT(heap.n_allocs, allocs);
    heap.fail_at = allocs + 1; /* a failure keeps the array */
    CHECK_RESULT(dsv3__mem_grow(&mem, &array, &cap, 1000, cap + 1, sizeof(uint32_t), "list", &e), DSV3_ERROR_OUT_OF_MEMORY, e);
    CHECK_EQ_UINT(cap, old_cap);
    CHECK_EQ_UINT(((uint32_t *)array)[999], 999 * 7);
    CHECK_RESULT(dsv3__mem_grow(&mem, &array, &cap, 1000, UINT64_MAX / 2, sizeof(uint32_t), "list", &e), DSV3_ERROR_OUT_OF_MEMORY, e);
    dsv3__mem_free(&mem, array);
    CHECK_EQ_UINT(heap.live_bytes, 0);
    CHECK_EQ_UINT(heap.n_damaged, 0);
}

TEST_MAIN(RUN(checked_arithmetic), RUN(loads_from_any_address), RUN(hash), RUN(formatter), RUN(formatter_doubles),
          RUN(formatter_cuts_between_code_points), RUN(errors_are_told_in_full), RUN(result_names), RUN(version),
          RUN(memory_is_aligned_and_counted), RUN(memory_by_default), RUN(memory_failures), RUN(memory_grows))
