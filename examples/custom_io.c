/* A host that lets the library touch neither files nor malloc nor stderr: the checkpoint lies in memory (here it is
   read in beforehand, it could come from an archive or the network), memory comes from an allocator that counts, and
   messages go to the host's log. A directory is only one kind of reader.

     cc -O2 -I. examples/custom_io.c -o custom_io -lm -pthread
     ./custom_io examples/tiny "Once upon a time" */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FILES 256

/* ---- A checkpoint in memory: names and bytes ---- */

typedef struct blob {
    char name[256];
    void *data;
    uint64_t size;
} blob;

typedef struct archive {
    blob files[MAX_FILES];
    size_t n;
} archive;

/* dsv3_reader.open_fn: the whole file is in memory, so there is no read_fn. What is not there is FILE_NOT_FOUND; for
   optional files the library then goes on without. */
static dsv3_result archive_open(void *user, const char *name, dsv3_file *file)
{
    const archive *a = (const archive *)user;
    for (size_t i = 0; i < a->n; i++)
        if (strcmp(a->files[i].name, name) == 0) {
            file->data = a->files[i].data;
            file->size = a->files[i].size;
            return DSV3_OK;
        }
    return DSV3_ERROR_FILE_NOT_FOUND;
}

static void archive_close(void *user, dsv3_file *file)
{
    (void)user, (void)file; /* the bytes stay ours */
}

/* Reads every file of a directory. */
static bool archive_load(archive *a, const char *dir)
{
    struct dirent *entry;
    DIR *d = opendir(dir);
    if (!d)
        return false;
    while ((entry = readdir(d)) != NULL && a->n < MAX_FILES) {
        char path[4096];
        blob *b = &a->files[a->n];
        if (entry->d_name[0] == '.' || strlen(entry->d_name) >= sizeof b->name)
            continue;
        snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
        FILE *f = fopen(path, "rb");
        if (!f)
            continue;
        long size = fseek(f, 0, SEEK_END) == 0 ? ftell(f) : -1;
        b->data = size >= 0 && fseek(f, 0, SEEK_SET) == 0 ? malloc((size_t)size + 1) : NULL;
        b->size = size > 0 ? (uint64_t)size : 0;
        if (b->data && fread(b->data, 1, (size_t)b->size, f) == (size_t)b->size) {
            strcpy(b->name, entry->d_name);
            a->n++;
        } else {
            free(b->data); /* no regular file */
        }
        fclose(f);
    }
    closedir(d);
    return true;
}

/* ---- An allocator that counts ---- */

typedef struct counter {
    uint64_t bytes, peak, calls;
} counter;

/* dsv3_allocator.alloc_fn: `align` is at most 64. The distance to malloc's own pointer is kept in the byte before. */
static void *count_alloc(void *user, size_t size, size_t align)
{
    counter *c = (counter *)user;
    unsigned char *raw = (unsigned char *)malloc(size + align);
    if (!raw)
        return NULL;
    size_t shift = align - (size_t)((uintptr_t)raw & (align - 1));
    raw[shift - 1] = (unsigned char)shift;
    c->calls++;
    c->bytes += size;
    c->peak = c->bytes > c->peak ? c->bytes : c->peak;
    return raw + shift;
}

/* dsv3_allocator.free_fn: `size` is what was asked for. */
static void count_free(void *user, void *ptr, size_t size)
{
    ((counter *)user)->bytes -= size;
    free((unsigned char *)ptr - ((unsigned char *)ptr)[-1]);
}

/* ---- A log ---- */

static void log_line(void *user, dsv3_log_level level, const char *message)
{
    fprintf((FILE *)user, "custom_io: %s: %s\n", level == DSV3_LOG_WARNING ? "warning" : "info", message);
}

static bool print_token(void *user, const dsv3_token *token)
{
    fwrite(token->text, 1, token->len, (FILE *)user);
    return true;
}

int main(int argc, char **argv)
{
    static archive files;
    counter memory = {0, 0, 0};
    dsv3_error error;
    dsv3_model *model = NULL;
    dsv3_session *session = NULL;
    if (argc != 3) {
        fprintf(stderr, "usage: custom_io DIR PROMPT\n");
        return 2;
    }
    if (!archive_load(&files, argv[1])) {
        fprintf(stderr, "custom_io: %s: no such directory\n", argv[1]);
        return 1;
    }

    dsv3_model_opts opts = {0};
    opts.reader.open_fn = archive_open;
    opts.reader.close_fn = archive_close;
    opts.reader.user = &files;
    opts.allocator.alloc_fn = count_alloc;
    opts.allocator.free_fn = count_free;
    opts.allocator.user = &memory;
    opts.logger.fn = log_line;
    opts.logger.user = stderr;
    dsv3_result result = dsv3_model_open(&model, NULL, &opts, &error); /* no directory: the reader knows */
    uint64_t for_model = memory.bytes;
    if (!result)
        result = dsv3_session_open(&session, model, NULL, &error); /* allocates as its model does */
    uint64_t calls = memory.calls;
    if (!result) {
        dsv3_generate_opts generate = {0};
        generate.max_tokens = 100;
        generate.token_fn = print_token;
        generate.user = stdout;
        result = dsv3_generate(session, argv[2], strlen(argv[2]), &generate, NULL, &error);
        putchar('\n');
    }
    if (result)
        fprintf(stderr, "custom_io: %s\n", error.message);
    else
        fprintf(stderr, "model %llu bytes, session %llu bytes, %llu allocations after opening\n",
                (unsigned long long)for_model, (unsigned long long)(memory.bytes - for_model),
                (unsigned long long)(memory.calls - calls));

    dsv3_session_close(session);
    dsv3_model_close(model);
    if (memory.bytes)
        fprintf(stderr, "custom_io: %llu bytes were not given back\n", (unsigned long long)memory.bytes);
    for (size_t i = 0; i < files.n; i++)
        free(files.files[i].data);
    return result || memory.bytes ? 1 : 0;
}
