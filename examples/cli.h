/* What the program dsv3 stands on beside the library: errors in one line, the bar, buffers, files, arguments, JSON lines.
   Included once, by dsv3.c, behind dsv3.h. */
#ifndef DSV3_CLI_H
#define DSV3_CLI_H

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef _WIN32
    #include <fcntl.h>
    #include <io.h>
#else
    #include <unistd.h>
#endif

#if defined(__GNUC__)
    #define FORMAT(string, first) __attribute__((format(printf, string, first)))
    #define NORETURN              __attribute__((noreturn))
#else
    #define FORMAT(string, first)
    #define NORETURN
#endif
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

// ---- Terminal, errors ------------------------------------------------------------------------------------

static bool on_terminal;      /* stderr is one: then there is a bar, and the speed */
static const char *bar_title; /* of the bar that is on the screen, or NULL */

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void bar_clear(void)
{
    if (bar_title)
        fputs("\r\033[K", stderr);
    bar_title = NULL;
}

/* dsv3_progress: `user` is the title. Short calls never show a bar. */
static bool bar_show(void *user, uint64_t done, uint64_t total)
{
    static double began, drawn;
    static const void *title;
    double now = seconds();
    if (title != user || done == 0)
        title = user, began = drawn = now;
    if (total && done < total && now - began > 0.3 && now - drawn > 0.05) {
        int filled = (int)(30.0 * (double)done / (double)total);
        bar_title = (const char *)user;
        drawn = now;
        fprintf(stderr, "\r\033[K%s [%.*s%*s] %d%%", bar_title, filled, "##############################", 30 - filled,
                "", (int)(100.0 * (double)done / (double)total));
        fflush(stderr);
    }
    if (done == total)
        bar_clear();
    return true;
}

static dsv3_progress bar(const char *title)
{
    dsv3_progress progress = {NULL, NULL};
    if (on_terminal)
        progress.fn = bar_show, progress.user = (void *)(uintptr_t)title;
    return progress;
}

static void log_warning(void *user, dsv3_log_level level, const char *message)
{
    (void)user;
    if (level < DSV3_LOG_WARNING || !on_terminal)
        return;
    bar_clear();
    fprintf(stderr, "dsv3: warning: %s\n", message);
}

/* Wrong use: one line that says what to do. */
FORMAT(1, 2) NORETURN static void usage(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("dsv3: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

FORMAT(1, 2) NORETURN static void fail(const char *format, ...)
{
    va_list args;
    bar_clear();
    va_start(args, format);
    fputs("dsv3: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

/* Ends the program if a call of the library failed. */
static void check(dsv3_result result, const dsv3_error *error)
{
    const char *hint = "";
    switch (result) {
    case DSV3_OK: return;
    case DSV3_ERROR_FILE_NOT_FOUND: hint = " (DIR is the checkpoint's directory, with its config.json)"; break;
    case DSV3_ERROR_CONTEXT_FULL: hint = " (--context N makes room for more)"; break;
    case DSV3_ERROR_OUT_OF_MEMORY: hint = " ('dsv3 inspect DIR --context N' tells what a session takes)"; break;
    case DSV3_ERROR_UNSUPPORTED_CPU: hint = " (--isa auto takes what there is)"; break;
    default: break;
    }
    fail("%s%s", error->message[0] ? error->message : dsv3_result_name(result), hint);
}

/* Everything asked for has been printed: did it arrive? */
static int finish(void)
{
    if (fflush(stdout) || ferror(stdout))
        fail("cannot write the output: %s", strerror(errno));
    return 0;
}

// ---- Buffers and files -----------------------------------------------------------------------------------

static void *grow(void *data, size_t count, size_t size)
{
    void *grown = count > SIZE_MAX / size ? NULL : realloc(data, count * size);
    if (!grown)
        fail("out of memory");
    return grown;
}

typedef struct bytes {
    char *p;
    size_t n, cap;
} bytes;

static char *bytes_room(bytes *b, size_t more)
{
    if (!b->p || b->cap - b->n < more) {
        b->cap = b->cap + more > 2 * b->cap ? b->cap + more + 64 : 2 * b->cap;
        b->p = (char *)grow(b->p, b->cap, 1);
    }
    return b->p + b->n;
}

static void bytes_add(bytes *b, const char *s, size_t n)
{
    if (n)
        memcpy(bytes_room(b, n), s, n);
    b->n += n;
}

FORMAT(2, 3) static void bytes_format(bytes *b, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (n > 0)
        bytes_add(b, text, (size_t)n < sizeof text ? (size_t)n : sizeof text - 1);
}

static void bytes_print(bytes *b)
{
    fwrite(b->p, 1, b->n, stdout);
    b->n = 0;
}

typedef struct ids {
    int32_t *p;
    size_t n, cap;
} ids;

static void ids_room(ids *list, size_t cap)
{
    if (list->cap < cap)
        list->p = (int32_t *)grow(list->p, list->cap = cap > 2 * list->cap ? cap : 2 * list->cap, sizeof *list->p);
}

static void ids_add(ids *list, int32_t id)
{
    ids_room(list, list->n + 1);
    list->p[list->n++] = id;
}

/* "-" is stdin, or stdout. */
static FILE *file_open(const char *path, const char *mode)
{
    if (strcmp(path, "-") == 0)
        return *mode == 'r' ? stdin : stdout;
    FILE *f = fopen(path, mode);
    if (!f)
        fail("%s: %s", path, strerror(errno));
    return f;
}

static void file_write(FILE *f, const char *path, const void *data, size_t size)
{
    if (fwrite(data, 1, size, f) != size)
        fail("%s: cannot write: %s", path, strerror(errno));
}

static void file_close(FILE *f, const char *path)
{
    if (f == stdout ? fflush(f) : fclose(f))
        fail("%s: cannot write: %s", path, strerror(errno));
}

static bytes file_read(const char *path)
{
    bytes b = {NULL, 0, 0};
    FILE *f = file_open(path, "rb");
    for (size_t n = 1; n;)
        b.n += n = fread(bytes_room(&b, 65536), 1, 65536, f);
    if (ferror(f))
        fail("%s: %s", path, strerror(errno));
    if (f != stdin)
        fclose(f);
    return b;
}

/* One line without its end; false where there is none. */
static bool line_read(bytes *line)
{
    int c;
    line->n = 0;
    while ((c = getc(stdin)) != EOF && c != '\n')
        *bytes_room(line, 1) = (char)c, line->n++;
    return c != EOF || line->n;
}

/* Ids separated by white space. */
static ids ids_parse(const char *text, size_t n, const char *where)
{
    ids list = {NULL, 0, 0};
    for (size_t i = 0, end; i < n; i = end) {
        int64_t id = 0;
        bool digits = true;
        for (end = i; end < n && !isspace((unsigned char)text[end]); end++) {
            digits = digits && text[end] >= '0' && text[end] <= '9' && id <= INT32_MAX;
            id = digits ? 10 * id + (text[end] - '0') : id;
        }
        if (end == i) {
            end++;
            continue;
        }
        if (!digits || id > INT32_MAX)
            usage("%s: '%.*s' is no token id; give numbers separated by white space", where,
                  (int)(end - i < 40 ? end - i : 40), text + i);
        ids_add(&list, (int32_t)id);
    }
    return list;
}

// ---- Arguments -------------------------------------------------------------------------------------------

typedef enum option_kind {
    OPTION_FLAG,  /* bool */
    OPTION_COUNT, /* uint32_t */
    OPTION_SEED,  /* uint64_t */
    OPTION_REAL,  /* float, from min to max */
    OPTION_TEXT,  /* const char * */
    OPTION_TEXTS, /* texts, each use adds one */
    OPTION_ISA,   /* dsv3_isa */
    OPTION_COMPUTE /* dsv3_compute */
} option_kind;

typedef struct option {
    const char *name;
    option_kind kind;
    void *value;
    double min, max;
} option;

typedef struct texts {
    const char *p[16];
    size_t n;
} texts;

static void option_set(const char *command, const option *o, const char *arg)
{
    char *end = NULL;
    bool good = isdigit((unsigned char)*arg) || *arg == '.';
    errno = 0;
    switch (o->kind) {
    case OPTION_FLAG: *(bool *)o->value = true; return;
    case OPTION_COUNT: {
        unsigned long long v = strtoull(arg, &end, 10);
        if (!good || *end || errno || v > UINT32_MAX)
            usage("%s: %s wants a whole number, found '%s'", command, o->name, arg);
        *(uint32_t *)o->value = (uint32_t)v;
        return;
    }
    case OPTION_SEED: {
        unsigned long long v = strtoull(arg, &end, 10);
        if (!good || *end || errno)
            usage("%s: %s wants a whole number below 2^64, found '%s'", command, o->name, arg);
        *(uint64_t *)o->value = v;
        return;
    }
    case OPTION_REAL: {
        double v = strtod(arg, &end);
        if (!(good || *arg == '-') || *end || !(v >= o->min && v <= o->max))
            usage("%s: %s wants a number from %g to %g, found '%s'", command, o->name, o->min, o->max, arg);
        *(float *)o->value = (float)v;
        return;
    }
    case OPTION_TEXT: *(const char **)o->value = arg; return;
    case OPTION_TEXTS: {
        texts *list = (texts *)o->value;
        if (list->n == COUNT(list->p))
            usage("%s: %s at most %d times", command, o->name, (int)COUNT(list->p));
        list->p[list->n++] = arg;
        return;
    }
    case OPTION_ISA: {
        static const dsv3_isa isas[] = {DSV3_ISA_AUTO,   DSV3_ISA_SCALAR,      DSV3_ISA_AVX2,        DSV3_ISA_AVX_VNNI,
                                        DSV3_ISA_AVX512, DSV3_ISA_AVX512_VNNI, DSV3_ISA_AVX512_BF16, DSV3_ISA_AVX512_AMX,
                                        DSV3_ISA_NEON};
        for (size_t i = 0; i < COUNT(isas); i++)
            if (strcmp(arg, dsv3_isa_name(isas[i])) == 0) {
                *(dsv3_isa *)o->value = isas[i];
                return;
            }
        usage("%s: --isa wants auto, scalar, avx2, avx-vnni, avx512, avx512-vnni, avx512-bf16, avx512-amx or neon, "
              "found '%s'",
              command, arg);
    }
    case OPTION_COMPUTE:
        for (int i = DSV3_COMPUTE_AUTO; i <= DSV3_COMPUTE_TILES; i++)
            if (strcmp(arg, dsv3_compute_name((dsv3_compute)i)) == 0) {
                *(dsv3_compute *)o->value = (dsv3_compute)i;
                return;
            }
        usage("%s: --compute wants auto, f32, bf16, fp8, int8 or tiles, found '%s'", command, arg);
    }
}

/* Reads argv behind the command: options anywhere, `--` ends them, "-" is no option. Returns how many words are left,
   which go to words [max]; the first is the checkpoint's directory and must be there. */
static int arguments(int argc, char **argv, const char *help, const option *options, size_t n_options,
                     const char **words, int max)
{
    const char *command = argv[1];
    int n = 0;
    bool only_words = false;
    for (int i = 2; i < argc; i++) {
        const char *arg = argv[i], *value = NULL;
        if (only_words || arg[0] != '-' || !arg[1]) {
            if (n == max)
                usage("%s: one argument too many: '%s' (texts with spaces stand in quotes)", command, arg);
            words[n++] = arg;
            continue;
        }
        if (strcmp(arg, "--") == 0) {
            only_words = true;
            continue;
        }
        if (strcmp(arg, "-h") == 0 || strcmp(arg, "--help") == 0) {
            fputs(help, stdout);
            exit(finish());
        }
        const char *equals = arg[1] == '-' ? strchr(arg, '=') : NULL;
        size_t length = equals ? (size_t)(equals - arg) : strlen(arg);
        const option *o = NULL;
        for (size_t k = 0; k < n_options; k++)
            if (strlen(options[k].name) == length && memcmp(options[k].name, arg, length) == 0)
                o = &options[k];
        if (!o)
            usage("%s: no option '%s'; 'dsv3 %s -h' lists them", command, arg, command);
        if (equals && o->kind == OPTION_FLAG)
            usage("%s: %s takes no value", command, o->name);
        value = equals ? equals + 1 : o->kind == OPTION_FLAG ? "" : i + 1 < argc ? argv[++i] : NULL;
        if (!value)
            usage("%s: %s wants a value", command, o->name);
        option_set(command, o, value);
    }
    if (n == 0)
        usage("%s: which checkpoint? dsv3 %s DIR ..., see 'dsv3 %s -h'", command, command, command);
    return n;
}

// ---- JSON ------------------------------------------------------------------------------------------------

static void json_text(bytes *out, const char *s, size_t n)
{
    bytes_add(out, "\"", 1);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c == '"' || c == '\\')
            bytes_format(out, "\\%c", c);
        else if (c == '\n')
            bytes_add(out, "\\n", 2);
        else if (c < 0x20 || c == 0x7f)
            bytes_format(out, "\\u%04x", c);
        else
            bytes_add(out, s + i, 1);
    }
    bytes_add(out, "\"", 1);
}

/* JSON has no NaN. */
static void json_number(bytes *out, double v)
{
    if (v - v == 0)
        bytes_format(out, "%.9g", v);
    else
        bytes_add(out, "null", 4);
}

/* A reader over one line. The first error stays; what is behind it reads as nothing. */
typedef struct json {
    const char *start, *p, *end;
    const char *error;
    size_t error_at;
} json;

static bool json_fail(json *j, const char *error)
{
    if (!j->error)
        j->error = error, j->error_at = (size_t)(j->p - j->start);
    j->p = j->end;
    return false;
}

/* Skips space; then the next byte, or 0 at the end. */
static char json_peek(json *j)
{
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\t' || *j->p == '\r' || *j->p == '\n'))
        j->p++;
    return j->p < j->end ? *j->p : '\0';
}

static bool json_take(json *j, char c)
{
    if (json_peek(j) != c || j->p == j->end)
        return false;
    j->p++;
    return true;
}

static bool json_hex(json *j, uint32_t *value)
{
    *value = 0;
    for (int i = 0; i < 4; i++) {
        char c = j->p < j->end ? *j->p : '\0';
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0)
            return json_fail(j, "\\u wants four hexadecimal digits");
        *value = *value << 4 | (uint32_t)digit;
        j->p++;
    }
    return true;
}

static void utf8_add(bytes *out, uint32_t c)
{
    char s[4];
    size_t n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n; i-- > 1; c >>= 6)
        s[i] = (char)(0x80 | (c & 0x3f));
    s[0] = (char)(n == 1 ? c : (0xf00u >> n & 0xff) | c);
    bytes_add(out, s, n);
}

/* The string's bytes are added to `out`. Bytes that are no UTF-8 pass, as they do in the tokenizer. */
static bool json_string(json *j, bytes *out)
{
    if (!json_take(j, '"'))
        return json_fail(j, "expected a string");
    while (j->p < j->end && *j->p != '"') {
        uint32_t c = (unsigned char)*j->p++, low;
        if (c < 0x20) {
            j->p--;
            return json_fail(j, "control character in a string");
        }
        if (c != '\\') {
            bytes_add(out, j->p - 1, 1);
            continue;
        }
        static const char escapes[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
        c = j->p < j->end ? (unsigned char)*j->p : 0;
        const char *escape = c ? strchr(escapes, (int)c) : NULL;
        if (!escape && c != 'u')
            return json_fail(j, "unknown escape in a string");
        j->p++;
        if (escape) {
            bytes_add(out, meant + (escape - escapes), 1);
            continue;
        }
        if (!json_hex(j, &c))
            return false;
        if (c >= 0xd800 && c < 0xdc00 && j->end - j->p >= 2 && j->p[0] == '\\' && j->p[1] == 'u') {
            j->p += 2;
            if (!json_hex(j, &low))
                return false;
            if (low < 0xdc00 || low > 0xdfff)
                return json_fail(j, "half a surrogate pair in a string");
            c = 0x10000 + ((c - 0xd800) << 10) + (low - 0xdc00);
        }
        if (c >= 0xd800 && c < 0xe000)
            return json_fail(j, "half a surrogate pair in a string");
        utf8_add(out, c);
    }
    return json_take(j, '"') || json_fail(j, "a string without end");
}

static bool json_bool(json *j, bool *value)
{
    json_peek(j);
    for (int i = 0; i < 2; i++) {
        const char *word = i ? "true" : "false";
        size_t n = strlen(word);
        if ((size_t)(j->end - j->p) >= n && memcmp(j->p, word, n) == 0) {
            j->p += n;
            *value = i == 1;
            return true;
        }
    }
    return json_fail(j, "expected true or false");
}

static bool json_ids(json *j, ids *list)
{
    if (!json_take(j, '['))
        return json_fail(j, "expected a list of ids");
    if (json_take(j, ']'))
        return true;
    do {
        int64_t id = 0;
        char c = json_peek(j);
        if (c < '0' || c > '9')
            return json_fail(j, "expected a token id, a whole number from 0");
        for (; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++)
            if ((id = 10 * id + (*j->p - '0')) > INT32_MAX)
                return json_fail(j, "a token id beyond 2^31");
        ids_add(list, (int32_t)id);
    } while (json_take(j, ','));
    return json_take(j, ']') || json_fail(j, "expected , or ] in a list of ids");
}

/* Passes over any value. */
static bool json_skip(json *j, bytes *scratch, int depth)
{
    char c = json_peek(j);
    if (depth > 64)
        return json_fail(j, "nested too deep");
    if (c == '"')
        return json_string(j, scratch);
    if (c == '{' || c == '[') {
        char close = c == '{' ? '}' : ']';
        j->p++;
        if (json_take(j, close))
            return true;
        do {
            if (c == '{' && !(json_string(j, scratch) && (json_take(j, ':') || json_fail(j, "expected a colon"))))
                return false;
            if (!json_skip(j, scratch, depth + 1))
                return false;
        } while (json_take(j, ','));
        return json_take(j, close) || json_fail(j, "expected a comma or the closing bracket");
    }
    const char *start = j->p;
    while (j->p < j->end && (isalnum((unsigned char)*j->p) || *j->p == '-' || *j->p == '+' || *j->p == '.'))
        j->p++;
    size_t n = (size_t)(j->p - start);
    bool word = (n == 4 && (memcmp(start, "true", 4) == 0 || memcmp(start, "null", 4) == 0)) ||
                (n == 5 && memcmp(start, "false", 5) == 0);
    if (word || (n && (*start == '-' || isdigit((unsigned char)*start))))
        return true;
    j->p = start;
    return json_fail(j, "expected a value");
}

/* A line of --jsonl; unknown keys are passed over, of a key given twice the last counts. */
typedef struct request {
    bytes text;
    ids list;
    bool has_text, has_ids, add_special_tokens, parse_special, skip_special_tokens;
} request;

static bool request_read(request *r, json *j, bytes *scratch)
{
    r->text.n = r->list.n = 0;
    r->has_text = r->has_ids = r->add_special_tokens = r->parse_special = r->skip_special_tokens = false;
    if (!json_take(j, '{'))
        return json_fail(j, "expected an object");
    if (!json_take(j, '}')) {
        do {
            scratch->n = 0;
            if (!json_string(j, scratch) || !(json_take(j, ':') || json_fail(j, "expected a colon")))
                return false;
            bytes_add(scratch, "", 1);
            const char *key = scratch->p;
            bool good;
            if (strcmp(key, "text") == 0)
                r->text.n = 0, good = r->has_text = json_string(j, &r->text);
            else if (strcmp(key, "ids") == 0)
                r->list.n = 0, good = r->has_ids = json_ids(j, &r->list);
            else if (strcmp(key, "add_special_tokens") == 0)
                good = json_bool(j, &r->add_special_tokens);
            else if (strcmp(key, "parse_special") == 0)
                good = json_bool(j, &r->parse_special);
            else if (strcmp(key, "skip_special_tokens") == 0)
                good = json_bool(j, &r->skip_special_tokens);
            else
                good = json_skip(j, scratch, 0);
            if (!good)
                return false;
        } while (json_take(j, ','));
        if (!json_take(j, '}'))
            return json_fail(j, "expected a comma or the closing brace");
    }
    json_peek(j);
    return j->p == j->end || json_fail(j, "something behind the object");
}

#endif // DSV3_CLI_H
