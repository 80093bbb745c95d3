/* test.h: what every test program here stands on. C99 and C++11, no dependencies.

     TEST(adds) { CHECK_EQ_INT(1 + 1, 2); }
     TEST_MAIN(RUN(adds))

   A test that is not listed in TEST_MAIN is an unused function, and the compiler says so.
   Usage of the program: [-v] [NAME ...] [FOLDER]. A NAME runs only the tests whose name contains it; FOLDER is the
   data that lies beside the repository (test_shared()). Quiet unless something fails; the last line counts tests:
   "N passed, M failed, K skipped". The exit status is 1 if one failed. Checks belong to the main thread. */
#ifndef DSV3_TEST_H
#define DSV3_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* Kernels run fifteen times slower then: tests that repeat them may take each way once. */
#define TEST_SANITIZED 0
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    #undef TEST_SANITIZED
    #define TEST_SANITIZED 1
#elif defined(__has_feature)
    #if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
        #undef TEST_SANITIZED
        #define TEST_SANITIZED 1
    #endif
#endif

#define TEST_MAX_MESSAGES 12 /* of one test; the rest is only counted */

typedef struct test_entry {
    const char *name;
    void (*run)(void);
} test_entry;

typedef struct test_state {
    const char *name;    /* of the running test */
    const char *skipped; /* why, or NULL */
    const char *shared;
    unsigned failures; /* of the running test */
} test_state;

static test_state test_now;

#define TEST(name) static void test_##name(void)
#define RUN(name) {#name, test_##name}
#define TEST_MAIN(...)                                                       \
    int main(int argc, char **argv)                                          \
    {                                                                        \
        static const test_entry list[] = {__VA_ARGS__};                      \
        return test_main(list, sizeof list / sizeof list[0], argc, argv);    \
    }

/* Each check is an expression: true if it held. Actual value first, expected second. */
#define CHECK(cond) test_check((cond) ? true : false, __FILE__, __LINE__, #cond)
#define CHECK_EQ_INT(found, expected) test_int((long long)(found), (long long)(expected), __FILE__, __LINE__, #found)
#define CHECK_EQ_UINT(found, expected) \
    test_uint((unsigned long long)(found), (unsigned long long)(expected), __FILE__, __LINE__, #found)
#define CHECK_EQ_STR(found, expected) test_str((found), (expected), __FILE__, __LINE__, #found)
#define CHECK_NEAR(found, expected, tolerance) \
    test_near((double)(found), (double)(expected), (double)(tolerance), __FILE__, __LINE__, #found)
#define CHECK_BYTES(found, n_found, expected, n_expected) \
    test_bytes((found), (size_t)(n_found), (expected), (size_t)(n_expected), __FILE__, __LINE__, #found)
#define CHECK_CONTAINS(text, part) test_contains((text), (part), __FILE__, __LINE__, #text)
/* A call of the library that must succeed, or must give this code; `error` is the dsv3_error it was handed. */
#define CHECK_OK(call, error) CHECK_RESULT(call, DSV3_OK, error)
#define CHECK_RESULT(call, expected, error) \
    test_result(dsv3_result_name(call), dsv3_result_name(expected), (error).message, __FILE__, __LINE__, #call)
/* A call that may give either of two codes. */
#define CHECK_RESULT2(call, either, or_else, error)                                                                                   \
    test_result2((int)(call), (int)(either), (int)(or_else), dsv3_result_name(either), dsv3_result_name(or_else),                    \
                 dsv3_result_name((error).code), (error).message, __FILE__, __LINE__, #call)
/* Leaves the test at once. */
#define REQUIRE(check) \
    do {               \
        if (!(check))  \
            return;    \
    } while (0)
#define SKIP(why)                \
    do {                         \
        test_now.skipped = why;  \
        return;                  \
    } while (0)

/* The folder of shared data, or NULL. */
static inline const char *test_shared(void)
{
    return test_now.shared;
}

/* FNV-1a of n bytes, to tell one result from another. */
static inline uint64_t hash_of(const void *bytes, size_t n)
{
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ ((const unsigned char *)bytes)[i]) * 0x100000001B3u;
    return hash;
}

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static inline bool test_fail(const char *file, int line, const char *format, ...)
{
    va_list args;
    if (++test_now.failures <= TEST_MAX_MESSAGES) {
        va_start(args, format);
        printf("%s:%d: %s: ", file, line, test_now.name);
        vprintf(format, args);
        printf("\n");
        va_end(args);
        fflush(stdout);
    }
    return false;
}

static inline bool test_check(bool ok, const char *file, int line, const char *what)
{
    return ok ? true : test_fail(file, line, "not true: %s", what);
}

static inline bool test_int(long long found, long long expected, const char *file, int line, const char *what)
{
    return found == expected ? true : test_fail(file, line, "%s: expected %lld, found %lld", what, expected, found);
}

static inline bool test_uint(unsigned long long found, unsigned long long expected, const char *file, int line, const char *what)
{
    return found == expected ? true : test_fail(file, line, "%s: expected %llu, found %llu", what, expected, found);
}

static inline bool test_str(const char *found, const char *expected, const char *file, int line, const char *what)
{
    if (found == expected || (found && expected && strcmp(found, expected) == 0))
        return true;
    return test_fail(file, line, "%s: expected \"%s\", found \"%s\"", what, expected ? expected : "(null)", found ? found : "(null)");
}

/* NaN is near nothing. */
static inline bool test_near(double found, double expected, double tolerance, const char *file, int line, const char *what)
{
    if (found == expected || fabs(found - expected) <= tolerance)
        return true;
    return test_fail(file, line, "%s: expected %.17g within %g, found %.17g", what, expected, tolerance, found);
}

static inline bool test_bytes(const void *found, size_t n_found, const void *expected, size_t n_expected, const char *file,
                              int line, const char *what)
{
    const unsigned char *f = (const unsigned char *)found, *e = (const unsigned char *)expected;
    if (n_found != n_expected)
        return test_fail(file, line, "%s: expected %lu bytes, found %lu", what, (unsigned long)n_expected, (unsigned long)n_found);
    for (size_t i = 0; i < n_found; i++)
        if (f[i] != e[i])
            return test_fail(file, line, "%s: byte %lu of %lu: expected 0x%02X, found 0x%02X", what, (unsigned long)i,
                             (unsigned long)n_found, e[i], f[i]);
    return true;
}

static inline bool test_contains(const char *text, const char *part, const char *file, int line, const char *what)
{
    return strstr(text, part) ? true : test_fail(file, line, "%s: expected \"%s\" in \"%s\"", what, part, text);
}

static inline bool test_result(const char *found, const char *expected, const char *message, const char *file, int line, const char *what)
{
    return strcmp(found, expected) == 0 ? true : test_fail(file, line, "%s: expected %s, found %s \"%s\"", what, expected, found, message);
}

static inline bool test_result2(int found, int either, int or_else, const char *either_name, const char *or_name, const char *found_name,
                                const char *message, const char *file, int line, const char *what)
{
    if (found == either || found == or_else)
        return true;
    return test_fail(file, line, "%s: expected %s or %s, found %s \"%s\"", what, either_name, or_name, found ? found_name : "DSV3_OK", message);
}

static inline int test_main(const test_entry *list, size_t count, int argc, char **argv)
{
    unsigned passed = 0, failed = 0, skipped = 0;
    bool verbose = false, filtered = false;
    for (int i = 1; i < argc; i++) {
        struct stat info;
        if (strcmp(argv[i], "-v") == 0)
            verbose = true;
        else if (!test_now.shared && stat(argv[i], &info) == 0 && S_ISDIR(info.st_mode))
            test_now.shared = argv[i];
        else
            filtered = true;
    }
    for (size_t t = 0; t < count; t++) {
        bool wanted = !filtered;
        for (int i = 1; i < argc && !wanted; i++)
            wanted = argv[i] != test_now.shared && argv[i][0] != '-' && strstr(list[t].name, argv[i]) != NULL;
        if (!wanted)
            continue;
        clock_t start = clock();
        test_now.name = list[t].name;
        test_now.skipped = NULL;
        test_now.failures = 0;
        list[t].run();
        if (test_now.failures > TEST_MAX_MESSAGES)
            printf("%s: %u more failures\n", list[t].name, test_now.failures - TEST_MAX_MESSAGES);
        if (test_now.failures)
            failed++;
        else if (test_now.skipped)
            skipped++;
        else
            passed++;
        if (test_now.skipped)
            printf("%s: skipped: %s\n", list[t].name, test_now.skipped);
        if (verbose)
            printf("%s %s %.2f s\n", test_now.failures ? "FAILED" : test_now.skipped ? "skipped" : "ok", list[t].name,
                   (double)(clock() - start) / CLOCKS_PER_SEC);
    }
    printf("%u passed, %u failed, %u skipped\n", passed, failed, skipped);
    return failed ? 1 : 0;
}

#endif /* DSV3_TEST_H */
