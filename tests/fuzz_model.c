/* A whole checkpoint: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_model.c -lm -pthread
   The input is a list of changes to a sound small one, 5 bytes each: file, offset (2), what, value. Then everything is done
   with it: open, text, append, rewind, generate, close. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tiny sound;
    static const int32_t ids[5] = {3, 9, 5, 40, 3};
    tiny t;
    dsv3_model *model = NULL;
    dsv3_session *s = NULL;
    dsv3_error e;
    if (!sound.n_files) {
        tiny_opts o = tiny_micro();
        o.vocab = 320, o.tokenizer = true, o.n_shards = 2;
        tiny_build(&sound, &o);
    }
    memset(&t, 0, sizeof t);
    for (size_t i = 0; i < sound.n_files; i++)
        tiny_put(&t, sound.files[i].name, sound.files[i].data, sound.files[i].size);
    t.read_mode = size > 0 && (data[0] & 0x80);
    for (size_t i = 0; i + 5 <= size && i < 5 * 64; i += 5) {
        tiny_file *f = &t.files[(data[i] & 0x7F) % t.n_files];
        size_t at = f->size ? ((size_t)data[i + 1] << 8 | data[i + 2]) % f->size : 0;
        switch (data[i + 3] % 8) {
        case 0: /* cut off */
            tiny_put(&t, f->name, f->data, at);
            break;
        case 1: /* a JSON number that is another one */
            while (at < f->size && (f->data[at] < '0' || f->data[at] > '9'))
                at++;
            if (at < f->size)
                f->data[at] = (uint8_t)('0' + data[i + 4] % 10);
            break;
        case 2: { /* a piece from elsewhere in the file */
            size_t from = (size_t)data[i + 4] * 37 % (f->size ? f->size : 1), n = 16;
            n = n < f->size - at ? n : f->size - at;
            n = n < f->size - from ? n : f->size - from;
            if (f->size)
                memmove(f->data + at, f->data + from, n);
            break;
        }
        default: /* a byte */
            if (at < f->size)
                f->data[at] = data[i + 4];
        }
    }
    if (tiny_open(&t, &model, NULL, &e) == DSV3_OK) {
        dsv3_session_opts so;
        dsv3_generate_opts g;
        memset(&so, 0, sizeof so);
        memset(&g, 0, sizeof g);
        so.max_tokens = 24, so.max_batch = 3, so.n_threads = 1;
        g.max_tokens = 4;
        dsv3_model_sampling(model, &g.sample);
        if (dsv3_session_open(&s, model, &so, &e) == DSV3_OK) {
            size_t n = dsv3_session_length(s);
            if (dsv3_session_append(s, ids, 5, NULL, &e) != DSV3_OK && dsv3_session_length(s) != n)
                abort();
            dsv3_session_rewind(s, 2, &e);
            dsv3_generate(s, "the \xe4\xb8\x80", 7, &g, NULL, &e);
            dsv3_generate(s, NULL, 0, NULL, NULL, &e);
        }
        dsv3_session_close(s);
        dsv3_model_close(model);
    }
    if (t.n_opened != t.n_closed)
        abort();
    tiny_free(&t);
    return 0;
}

#include "fuzz.h"
