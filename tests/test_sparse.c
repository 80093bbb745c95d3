/* Opening what is far larger than memory: shards of holes with real headers (bench/sparse.h), all of DeepSeek-V3-671B
   among them. Nothing but headers may be read. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#ifndef _WIN32
    #include "../bench/sparse.h"
    #include "tiny.h"

static sparse s;
static dsv3_error e;

/* A directory of the shape, new, below the temporary folder; its path into dir. */
static bool make(const sparse_shape *shape, char dir[300])
{
    static tiny none; /* without files: only the directory */
    return tiny_write_dir(&none, dir, 300) && sparse_write(&s, shape, dir);
}

static void unmake(const sparse_shape *shape, const char *dir)
{
    sparse_remove(shape, dir);
    free(s.v);
    memset(&s, 0, sizeof s);
}

/* All tensors are there with their shapes, and scales hang on their weights. */
static void check_tensors(const dsv3_model *model)
{
    REQUIRE(CHECK_EQ_UINT(dsv3_model_tensor_count(model), s.n));
    for (uint32_t i = 0; i < s.n && test_now.failures == 0; i++) {
        const sparse_tensor *want = &s.v[i];
        dsv3_tensor t;
        REQUIRE(CHECK_OK(dsv3_model_tensor(model, want->name, &t, &e), e));
        CHECK_EQ_STR(dsv3_dtype_name(t.dtype), want->dtype);
        CHECK_EQ_UINT(t.rank, want->cols ? 2 : 1);
        CHECK_EQ_UINT(t.shape[0], want->rows);
        CHECK_EQ_UINT(t.rank == 2 ? t.shape[1] : 0, want->cols);
        CHECK(t.data != NULL);
        CHECK((t.scale != NULL) == (strcmp(want->dtype, "F8_E4M3") == 0));
    }
}

TEST(small)
{
    const sparse_shape *shape = &SPARSE_SHAPES[1];
    char dir[300];
    dsv3_model *model;
    dsv3_memory memory;
    dsv3_tensor t;
    if (!make(shape, dir)) {
        unmake(shape, dir);
        SKIP("no holes in files of the temporary folder");
    }
    if (CHECK_OK(dsv3_model_open(&model, dir, NULL, &e), e)) {
        check_tensors(model);
        CHECK_OK(dsv3_session_memory(model, NULL, &memory, &e), e);
        CHECK_EQ_UINT(memory.file_bytes, s.data_bytes);
        if (CHECK_OK(dsv3_model_tensor(model, "model.layers.2.mlp.experts.15.down_proj.weight", &t, &e), e))
            CHECK(((const uint8_t *)t.data)[0] == 0 && ((const uint8_t *)t.data)[t.row_stride * t.shape[0] - 1] == 0);
        dsv3_model_close(model);
    }
    char last[64], path[400]; /* the last shard one byte short */
    sparse_shard_name(last, shape->shards - 1, shape->shards);
    snprintf(path, sizeof path, "%s/%s", dir, last);
    struct stat info;
    CHECK(stat(path, &info) == 0 && truncate(path, info.st_size - 1) == 0);
    CHECK_RESULT(dsv3_model_open(&model, dir, NULL, &e), DSV3_ERROR_TRUNCATED, e);
    CHECK_CONTAINS(e.message, last);
    unmake(shape, dir);
}

/* Bytes of the file that lie in the page cache. */
static uint64_t resident(const char *path)
{
    struct stat info;
    uint64_t n = 0;
    int fd = open(path, O_RDONLY);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (!CHECK(fd >= 0 && fstat(fd, &info) == 0))
        return 0;
    #ifdef __linux__
    size_t size = (size_t)info.st_size, pages = (size + page - 1) / page;
    unsigned char *in = (unsigned char *)calloc(pages, 1);
    void *map = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (CHECK(in && map != MAP_FAILED && mincore(map, size, in) == 0))
        for (size_t i = 0; i < pages; i++)
            n += (in[i] & 1) * page;
    munmap(map, size);
    free(in);
    #else
    (void)page;
    #endif
    close(fd);
    return n;
}

/* Takes the file out of the page cache. Does advice bring its first bytes back? It does not under emulation, nor where
   files live in memory. */
static bool make_cold(const char *path)
{
    bool works = false;
    #if defined(__linux__) && defined(POSIX_FADV_DONTNEED)
    int fd = open(path, O_RDONLY);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *map = mmap(NULL, page, PROT_READ, MAP_PRIVATE, fd, 0);
    if (CHECK(fd >= 0 && map != MAP_FAILED) && fsync(fd) == 0 && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0 &&
        resident(path) == 0 && madvise(map, page, MADV_WILLNEED) == 0) {
        for (int i = 0; i < 1000 && !works; i++) {
            struct timespec ms = {0, 1000000};
            works = resident(path) > 0;
            if (!works)
                nanosleep(&ms, NULL);
        }
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    }
    munmap(map, page);
    close(fd);
    #else
    (void)path;
    #endif
    return works;
}

TEST(v3_671b)
{
    const sparse_shape *shape = &SPARSE_SHAPES[0];
    char dir[300], name[64], path[400];
    dsv3_model *model;
    dsv3_memory memory;
    if (sizeof(size_t) < 8)
        SKIP("689 GB are more than can be addressed");
    if (!make(shape, dir)) {
        unmake(shape, dir);
        SKIP("no holes in files of the temporary folder, or no room");
    }
    CHECK_EQ_UINT(s.n, 91991); /* as published */
    CHECK_EQ_UINT(s.data_bytes, 688574839360u);
    sparse_shard_name(name, 100, shape->shards);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    bool cold = make_cold(path);
    if (CHECK_OK(dsv3_model_open(&model, dir, NULL, &e), e)) {
        if (cold) { /* 80 kB of header; a fault alone would have brought 4 MB or more */
            uint64_t before = resident(path), ahead = 0;
            dsv3_tensor t;
            CHECK(before > 4096 && before <= 1u << 20);
            /* what read_ahead asks for comes, and nothing beside it */
            uint32_t k = s.n;
            while (--k && (s.v[k].shard != 100 || sparse_size(&s.v[k]) != 2048 * 7168))
                ;
            if (CHECK_OK(dsv3_model_tensor(model, s.v[k].name, &t, &e), e))
                dsv3__os_will_need(t.data, t.shape[0] * t.row_stride);
            for (int i = 0; i < 300 && ahead < before + 2048 * 7168; i++) {
                struct timespec pause = {0, 10000000};
                nanosleep(&pause, NULL);
                ahead = resident(path);
            }
            CHECK(ahead >= before + 2048 * 7168 && ahead <= before + 2048 * 7168 + 8192);
        }
        check_tensors(model);
        const dsv3_config *c = dsv3_model_config(model);
        CHECK_EQ_UINT(c->num_hidden_layers, 61);
        CHECK_EQ_UINT(c->n_routed_experts, 256);
        CHECK(c->rope_yarn);
        CHECK_OK(dsv3_session_memory(model, NULL, &memory, &e), e);
        CHECK_EQ_UINT(memory.file_bytes, s.data_bytes);
        CHECK(memory.model_bytes < 300u * s.n); /* tables */
        CHECK_EQ_UINT(memory.cache_bytes, 4096u * 62 * (512 * 2 + 64 * 4));
        dsv3_model_close(model);
    }
    unmake(shape, dir);
}

/* Advice moves pages, not numbers. */
TEST(read_ahead)
{
    static tiny t;
    static float logits[2][4096];
    const int32_t ids[6] = {1, 5, 3, 2, 7, 4};
    char dir[300];
    tiny_opts o = tiny_blocks();
    tiny_build(&t, &o);
    REQUIRE(CHECK(tiny_write_dir(&t, dir, sizeof dir)));
    for (int k = 0; k < 2; k++) {
        dsv3_model_opts mo;
        dsv3_model *model;
        dsv3_session *session;
        const float *out;
        memset(&mo, 0, sizeof mo);
        mo.read_ahead = k == 1;
        if (!CHECK_OK(dsv3_model_open(&model, dir, &mo, &e), e))
            break;
        size_t size = dsv3_model_config(model)->vocab_size * sizeof(float);
        if (CHECK_OK(dsv3_session_open(&session, model, NULL, &e), e)) {
            if (CHECK_OK(dsv3_session_append(session, ids, 6, NULL, &e), e) &&
                CHECK_OK(dsv3_session_logits(session, &out, &e), e) && CHECK(size <= sizeof logits[k]))
                memcpy(logits[k], out, size);
            dsv3_session_close(session);
        }
        dsv3_model_close(model);
    }
    CHECK(logits[0][0] != 0);
    CHECK_BYTES(logits[1], sizeof logits[1], logits[0], sizeof logits[0]);
    tiny_remove_dir(&t, dir);
    tiny_free(&t);
}

TEST_MAIN(RUN(small), RUN(v3_671b), RUN(read_ahead))
#else
TEST(holes)
{
    SKIP("needs POSIX files with holes");
}

TEST_MAIN(RUN(holes))
#endif
