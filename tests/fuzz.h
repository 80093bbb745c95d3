/* fuzz.h: a main for the fuzz targets where there is no libFuzzer. `make fuzz` builds them with it (-DDSV3_FUZZER);
   with any other compiler:

     cc -g -fsanitize=address,undefined -I. -o build/fuzz_json tests/fuzz_json.c -lm -pthread
     build/fuzz_json FILE...                 replays files
     build/fuzz_json -n 100000 FILE...       that many changed copies of them; -s SEED for others
     build/fuzz_json -keep last.bin -n ...   writes each input to a file before it runs, to have the one that crashed

   Not coverage guided: a first net, not the last. Include it behind LLVMFuzzerTestOneInput. */
#ifndef DSV3_FUZZ_H
#define DSV3_FUZZ_H

#ifndef DSV3_FUZZER

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct fuzz_input {
    uint8_t *data;
    size_t size;
} fuzz_input;

static uint64_t fuzz_state;

static uint64_t fuzz_random(uint64_t below)
{
    uint64_t z = (fuzz_state += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return below ? z % below : 0;
}

static const char *const fuzz_words[] = {
    "{", "}", "[", "]", ",", ":", "\"", "\\u0000", "\\ud800", "\\u0041", "null", "true", "false", "NaN", "-1", "0", "1e400", "18446744073709551615",
    "9223372036854775808", "4294967296", "2147483648", "0.5", "\xff", "\xc3\xa9", "\xf0\x9f\x98\x80", "  ", "\"a\":1,", "[[[[[[[[", "../", "{}"};

/* One change of data [size]; there is room for 64 bytes more. Returns the new size. */
static size_t fuzz_change(uint8_t *data, size_t size, const fuzz_input *other)
{
    size_t at = (size_t)fuzz_random(size + 1), n = 1 + (size_t)fuzz_random(16);
    switch (fuzz_random(8)) {
    case 0: /* a bit */
        if (at < size)
            data[at] ^= (uint8_t)(1u << fuzz_random(8));
        return size;
    case 1: /* a byte */
        if (at < size)
            data[at] = (uint8_t)fuzz_random(256);
        return size;
    case 2: { /* a word put in */
        const char *word = fuzz_words[fuzz_random(sizeof fuzz_words / sizeof fuzz_words[0])];
        memmove(data + at + strlen(word), data + at, size - at);
        memcpy(data + at, word, strlen(word));
        return size + strlen(word);
    }
    case 3: /* a piece taken out */
        n = n < size - at ? n : size - at;
        memmove(data + at, data + at + n, size - at - n);
        return size - n;
    case 4: { /* a piece twice */
        size_t from = (size_t)fuzz_random(size + 1);
        uint8_t piece[16];
        n = n < size - from ? n : size - from;
        memcpy(piece, data + from, n);
        memmove(data + at + n, data + at, size - at);
        memcpy(data + at, piece, n);
        return size + n;
    }
    case 5: /* cut off */
        return fuzz_random(4) ? size : at;
    case 6: { /* a piece of another input over this one */
        size_t from = (size_t)fuzz_random(other->size + 1);
        n = n < size - at ? n : size - at;
        n = n < other->size - from ? n : other->size - from;
        memcpy(data + at, other->data + from, n);
        return size;
    }
    default: /* a digit counted on */
        for (size_t i = at; i < size; i++)
            if (data[i] >= '0' && data[i] <= '9') {
                data[i] = (uint8_t)('0' + ((uint64_t)data[i] - '0' + 1 + fuzz_random(8)) % 10);
                break;
            }
        return size;
    }
}

/* The input in a block of its very size, so that a sanitizer sees the byte behind. */
static void fuzz_run(const uint8_t *data, size_t size, const char *keep)
{
    uint8_t *copy = (uint8_t *)malloc(size ? size : 1);
    FILE *f = keep ? fopen(keep, "wb") : NULL;
    if (f) {
        fwrite(data, 1, size, f);
        fclose(f);
    }
    if (!copy)
        exit(2);
    if (size)
        memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

int main(int argc, char **argv)
{
    fuzz_input *inputs = (fuzz_input *)calloc((size_t)argc + 1, sizeof *inputs);
    size_t n_inputs = 0;
    unsigned long n = 0;
    const char *keep = NULL;
    uint64_t seed = 1;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-n") == 0 && i + 1 < argc) {
            n = strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "-s") == 0 && i + 1 < argc) {
            seed = strtoul(argv[++i], NULL, 10);
        } else if (strcmp(argv[i], "-keep") == 0 && i + 1 < argc) {
            keep = argv[++i];
        } else {
            FILE *f = fopen(argv[i], "rb");
            fuzz_input *input = &inputs[n_inputs];
            int c;
            if (!f) {
                fprintf(stderr, "%s: cannot be read\n", argv[i]);
                return 2;
            }
            while ((c = fgetc(f)) != EOF) {
                if ((input->size & (input->size + 1)) == 0)
                    input->data = (uint8_t *)realloc(input->data, input->size * 2 + 2);
                if (!input->data)
                    return 2;
                input->data[input->size++] = (uint8_t)c;
            }
            fclose(f);
            n_inputs++;
            fuzz_run(input->data, input->size, keep);
        }
    }
    printf("%lu inputs replayed\n", (unsigned long)n_inputs);
    if (n_inputs == 0)
        n_inputs = 1; /* an empty one */
    for (unsigned long k = 0; k < n; k++) {
        fuzz_state = seed * 1000003u + k * 7919u;
        const fuzz_input *input = &inputs[fuzz_random(n_inputs)], *other = &inputs[fuzz_random(n_inputs)];
        unsigned changes = 1 + (unsigned)fuzz_random(fuzz_random(4) ? 3 : 30);
        uint8_t *data = (uint8_t *)malloc(input->size + 64 * 31);
        size_t size = input->size;
        if (!data)
            return 2;
        if (size)
            memcpy(data, input->data, size);
        while (changes--)
            size = fuzz_change(data, size, other);
        fuzz_run(data, size, keep);
        free(data);
    }
    if (n)
        printf("%lu changed inputs run\n", n);
    for (size_t i = 0; i < n_inputs; i++)
        free(inputs[i].data);
    free(inputs);
    return 0;
}

#endif
#endif /* DSV3_FUZZ_H */
