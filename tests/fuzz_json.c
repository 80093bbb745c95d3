/* The JSON reader on any bytes: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_json.c -lm -pthread */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Reads a value with the calls that a consumer would use, as deep as it goes. */
static void walk(dsv3__json *j)
{
    dsv3__json_str key;
    char text[16];
    double number;
    int64_t integer;
    uint64_t u;
    bool b;
    switch (dsv3__json_peek(j)) {
    case '{':
        dsv3__json_open(j, '{');
        while (dsv3__json_key(j, &key)) {
            dsv3__json_is(key, "vocab_size");
            if (j->depth < 40)
                walk(j);
            else
                dsv3__json_skip(j);
        }
        break;
    case '[':
        dsv3__json_open(j, '[');
        while (dsv3__json_item(j)) {
            if (j->depth < 40)
                walk(j);
            else
                dsv3__json_skip(j);
        }
        break;
    case '"':
        if ((j->end - j->p) % 2) {
            dsv3__json_copy(j, text, sizeof text);
        } else if (dsv3__json_string(j, &key)) {
            size_t n = 0;
            char *out = (char *)malloc(key.n ? key.n : 1);
            if (out && dsv3__json_decode(key, out, &n) && n > key.n)
                abort();
            free(out);
        }
        break;
    case 't':
    case 'f':
        dsv3__json_bool(j, &b);
        break;
    case 'n':
        dsv3__json_null(j);
        break;
    default:
        if ((j->end - j->p) % 2)
            dsv3__json_number(j, &number, &integer, &b);
        else
            dsv3__json_uint(j, &u);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    dsv3_error e[2];
    dsv3_result r[2];
    for (int k = 0; k < 2; k++) {
        dsv3__json j;
        dsv3__err_clear(&e[k]);
        dsv3__json_init(&j, (const char *)data, size, "fuzz.json", &e[k]);
        if (k)
            walk(&j);
        else
            dsv3__json_skip(&j);
        r[k] = dsv3__json_end(&j);
        if (r[k] != e[k].code || e[k].offset > size)
            abort();
    }
    if (r[1] == DSV3_OK && r[0] != DSV3_OK) /* what can be read can be skipped */
        abort();
    return 0;
}

#include "fuzz.h"
