/* Writes all of DeepSeek-V3-671B but its numbers (sparse.h), and measures how long it takes to open.

     build/sparse write DIR      91,991 tensors in 163 shards, 689 GB long, a few megabytes on the disk
     build/sparse open DIR [N]   opens any checkpoint N times (default 9): the time, and the memory of the tables
     build/sparse remove DIR     takes away what `write` wrote

   Shape "small" in front of DIR (`write small DIR`) writes five small shards. */

#ifndef _GNU_SOURCE
    #define _GNU_SOURCE
#endif

#define DSV3_IMPLEMENTATION
#include "dsv3.h"
#include "sparse.h"

#include <errno.h>
#include <time.h>

static int fail(const char *what, const char *why)
{
    fprintf(stderr, "sparse: %s: %s\n", what, why);
    return 1;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int write_shape(const sparse_shape *shape, const char *dir)
{
    sparse s;
    double start = now();
    if (mkdir(dir, 0777) && errno != EEXIST)
        return fail(dir, strerror(errno));
    bool ok = sparse_write(&s, shape, dir);
    free(s.v);
    if (!ok) {
        sparse_remove(shape, dir);
        return fail(dir, "cannot be written here, or the file system keeps no holes");
    }
    printf("%s: %" PRIu32 " tensors in %" PRIu32 " shards, %" PRIu64 " bytes of tensors, %" PRIu64
           " bytes of files, %.2f s\n",
           dir, s.n, shape->shards, s.data_bytes, s.file_bytes, now() - start);
    return 0;
}

static int compare_double(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int open_dir(const char *dir, int n)
{
    double took[101], closing = 0;
    dsv3_memory memory;
    dsv3_error error;
    size_t tensors = 0;
    n = n < 1 ? 1 : n > 101 ? 101 : n;
    for (int i = 0; i < n; i++) {
        dsv3_model *model;
        double start = now();
        if (dsv3_model_open(&model, dir, NULL, &error))
            return fail(dir, error.message);
        took[i] = now() - start;
        tensors = dsv3_model_tensor_count(model);
        if (dsv3_session_memory(model, NULL, &memory, &error))
            return fail(dir, error.message);
        start = now();
        dsv3_model_close(model);
        closing = now() - start;
    }
    double first = took[0];
    qsort(took, (size_t)n, sizeof *took, compare_double);
    printf("%s: %zu tensors opened in %.1f ms (median of %d; best %.1f, first %.1f, closing %.1f), %.1f MB of tables, "
           "%.0f bytes a tensor\n",
           dir, tensors, 1e3 * took[n / 2], n, 1e3 * took[0], 1e3 * first, 1e3 * closing,
           1e-6 * (double)memory.model_bytes, (double)memory.model_bytes / (double)(tensors ? tensors : 1));
    return 0;
}

int main(int argc, char **argv)
{
    const sparse_shape *shape = &SPARSE_SHAPES[0];
    bool writes = argc > 2 && (strcmp(argv[1], "write") == 0 || strcmp(argv[1], "remove") == 0);
    if (writes && argc == 4) {
        size_t i = 0, n = sizeof SPARSE_SHAPES / sizeof *SPARSE_SHAPES;
        while (i < n && strcmp(SPARSE_SHAPES[i].name, argv[2]) != 0)
            i++;
        if (i == n)
            return fail(argv[2], "no such shape");
        shape = &SPARSE_SHAPES[i];
    }
    if (writes && argc <= 4 && argv[1][0] == 'w')
        return write_shape(shape, argv[argc - 1]);
    if (writes && argc <= 4)
        return sparse_remove(shape, argv[argc - 1]), 0;
    if (argc > 2 && argc <= 4 && strcmp(argv[1], "open") == 0)
        return open_dir(argv[2], argc == 4 ? atoi(argv[3]) : 9);
    fprintf(stderr, "usage: sparse write [SHAPE] DIR | open DIR [N] | remove [SHAPE] DIR\n");
    return 2;
}
