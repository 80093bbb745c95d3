/* Safetensors headers and indexes: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_safetensors.c -lm -pthread
   The first byte says what the rest is: even: the JSON of a header in front of a small model's data; odd: the index. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char shard[] = "model-00001-of-000001.safetensors";
    static tiny t;
    static tiny_file whole; /* the sound file */
    dsv3_model *model = NULL;
    dsv3_error e;
    if (!t.n_files) {
        tiny_opts o = tiny_micro();
        o.n_shards = 1;
        tiny_build(&t, &o);
        tiny_put(&t, "whole", tiny_get(&t, shard)->data, tiny_get(&t, shard)->size);
        whole = *tiny_get(&t, "whole");
    }
    if (size < 1)
        return 0;
    if (data[0] & 1) {
        tiny_put(&t, shard, whole.data, whole.size);
        tiny_put(&t, "model.safetensors.index.json", data + 1, size - 1);
    } else {
        tiny_text f = {NULL, 0, 0};
        uint64_t old, n = size - 1;
        memcpy(&old, whole.data, 8);
        tiny_put_bytes(&f, &n, 8);
        tiny_put_bytes(&f, data + 1, size - 1);
        tiny_put_bytes(&f, whole.data + 8 + old, whole.size - 8 - (size_t)old);
        tiny_drop(&t, "model.safetensors.index.json");
        tiny_put(&t, "model.safetensors", f.p, f.n);
        free(f.p);
    }
    t.read_mode = (data[0] & 2) != 0;
    dsv3_result r = tiny_open(&t, &model, NULL, &e);
    if (r != e.code && r != DSV3_OK)
        abort();
    for (size_t i = 0; r == DSV3_OK && i < dsv3_model_tensor_count(model); i++) { /* all that a view promises is there */
        const char *name;
        dsv3_tensor v;
        float row[64];
        if (dsv3_model_tensor_at(model, i, &name, &v, &e) != DSV3_OK)
            abort();
        if (v.data && v.rank == 2 && v.shape[1] <= 64 && v.shape[0] > 0)
            dsv3_dequantize(row, &v, v.shape[0] - 1, 1, &e);
    }
    dsv3_model_close(model);
    if (t.n_opened != t.n_closed)
        abort();
    return 0;
}

#include "fuzz.h"
