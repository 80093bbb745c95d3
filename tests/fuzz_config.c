/* config.json and generation_config.json: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_config.c -lm -pthread
   The first byte says which of the two the rest is. What opens is used. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tiny t;
    static tiny_file sound[2];
    static const char *const names[2] = {"config.json", "generation_config.json"};
    static const int32_t ids[3] = {3, 9, 5};
    dsv3_model *model = NULL;
    dsv3_session *s = NULL;
    dsv3_error e;
    if (!t.n_files) {
        tiny_opts o = tiny_micro();
        tiny_build(&t, &o);
        for (int k = 0; k < 2; k++) {
            char copy[32];
            snprintf(copy, sizeof copy, "sound%d", k);
            tiny_put(&t, copy, tiny_get(&t, names[k])->data, tiny_get(&t, names[k])->size);
            sound[k] = *tiny_get(&t, copy);
        }
    }
    if (size < 1)
        return 0;
    int which = data[0] & 1;
    tiny_put(&t, names[which], data + 1, size - 1);
    tiny_put(&t, names[1 - which], sound[1 - which].data, sound[1 - which].size);
    dsv3_result r = tiny_open(&t, &model, NULL, &e);
    if (r == DSV3_OK) {
        dsv3_session_opts so;
        dsv3_generate_opts g;
        memset(&so, 0, sizeof so);
        memset(&g, 0, sizeof g);
        so.max_tokens = 8, so.n_threads = 1;
        g.max_tokens = 2;
        dsv3_model_sampling(model, &g.sample);
        if (dsv3_session_open(&s, model, &so, &e) == DSV3_OK && dsv3_session_append(s, ids, 3, NULL, &e) == DSV3_OK)
            if (dsv3_generate(s, NULL, 0, &g, NULL, &e) == DSV3_ERROR_INVALID_OPTIONS)
                abort(); /* the checkpoint's own sampling must be one that sampling takes */
        dsv3_session_close(s);
        dsv3_model_close(model);
    } else if (e.code != r || !e.message[0]) {
        abort();
    }
    if (t.n_opened != t.n_closed)
        abort();
    return 0;
}

#include "fuzz.h"
