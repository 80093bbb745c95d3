/* Snapshots: clang -fsanitize=fuzzer,address,undefined -DDSV3_FUZZER -I. tests/fuzz_snapshot.c -lm -pthread
   The first byte says how many sessions are to be loaded (1 to 4) and whether the checksums are put right, as whoever forges one
   would; the rest is the snapshot, or, if it does not begin as one, a list of changes to a sound one, 4 bytes each: place (2),
   value, what. What loads is gone on from, forked, saved and closed. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void seal_at(tiny_stored *p, size_t from, size_t at)
{
    dsv3__snap_sum sum;
    uint64_t v;
    if (at + 8 > p->n)
        return;
    dsv3__snap_sum_start(&sum);
    dsv3__snap_sum_add(&sum, p->data + from, at - from);
    v = dsv3__snap_sum_get(&sum);
    memcpy(p->data + at, &v, 8);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static tiny t;
    static dsv3_model *model;
    static tiny_stored sound[5];
    dsv3_error e;
    dsv3_session *s[4] = {NULL, NULL, NULL, NULL};
    dsv3_session_opts so;
    dsv3_workspace_opts wo;
    dsv3_workspace *ws = NULL;
    int32_t ids[100];
    memset(&so, 0, sizeof so);
    memset(&wo, 0, sizeof wo);
    wo.n_pages = 12, wo.max_batch = 8, wo.n_threads = 1;
    so.max_tokens = 130;
    tiny_ids(ids, 100, 32, 5);
    if (!model) {
        tiny_opts o = tiny_micro();
        o.max_pos = 256;
        tiny_build(&t, &o);
        if (tiny_open(&t, &model, NULL, &e))
            abort();
    }
    if (dsv3_workspace_open(&ws, model, &wo, &e))
        abort();
    so.workspace = ws;
    const unsigned n = size ? 1u + (data[0] & 3) : 1;
    for (unsigned k = 0; k < n; k++)
        if (k % 2 ? dsv3_session_fork(&s[k], s[0], 0, &e) : dsv3_session_open(&s[k], model, &so, &e))
            abort();
    if (!sound[n].n) {
        dsv3_sink sink;
        sink.write_fn = tiny_stored_put, sink.user = &sound[n];
        if (dsv3_session_append(s[0], ids, 70, NULL, &e) || (n > 1 && dsv3_session_append(s[1], ids, 9, NULL, &e)) ||
            dsv3_save(s, n, &sink, NULL, &e))
            abort();
        for (unsigned k = 0; k < n; k++)
            dsv3_session_rewind(s[k], 0, NULL);
    }
    tiny_stored p = {NULL, 0, 0, 0, 0};
    if (size > 9 && memcmp(data + 1, "DSV3SNAP", 8) == 0) {
        tiny_stored_put(&p, data + 1, size - 1);
    } else {
        tiny_stored_put(&p, sound[n].data, sound[n].n);
        for (size_t i = 1; i + 4 <= size && i < 4 * 64; i += 4) {
            size_t at = ((size_t)data[i] << 8 | data[i + 1]) % p.n;
            if (data[i + 3] & 1) /* mostly where the tables are */
                at %= 700;
            if (data[i + 3] % 32 == 30)
                p.n = at + 1;
            else
                p.data[at % p.n] = data[i + 2];
        }
    }
    if (size && data[0] & 4 && p.n > 264) { /* header, tables where those of a sound one are, all */
        seal_at(&p, 0, 248);
        uint32_t pages = 0, tokens = 0, cached[2];
        memcpy(&pages, p.data + 48, 4);
        for (unsigned k = 0; k < n && 264 + 8 * k <= p.n; k++) {
            memcpy(cached, p.data + 256 + 8 * k, 8);
            tokens += (cached[0] & 0xFFF) + ((cached[1] & 0xFFF) + 63) / 64;
        }
        seal_at(&p, 0, 256 + 8 * n + 4 * (size_t)tokens + 4 * (size_t)(pages & 0xFFF));
        seal_at(&p, 0, p.n - 8);
    }
    dsv3_source source;
    source.read_fn = tiny_stored_get, source.user = &p, source.size = size && data[0] & 8 ? p.n : 0;
    if (dsv3_load(s, n, &source, &e) == DSV3_OK) {
        dsv3_session *f = NULL;
        for (unsigned k = 0; k < n; k++) {
            const float *logits;
            size_t length = dsv3_session_length(s[k]);
            for (size_t i = 0; i < length; i++)
                if (dsv3_session_tokens(s[k])[i] < 0 || dsv3_session_tokens(s[k])[i] >= 32)
                    abort();
            if (length)
                dsv3_session_logits(s[k], &logits, &e);
            if (length < 120)
                dsv3_session_append(s[k], ids, 5, NULL, &e);
            if (dsv3_session_fork(&f, s[k], 0, &e) == DSV3_OK) {
                dsv3_session_rewind(f, dsv3_session_length(f) / 2, NULL);
                dsv3_session_append(f, ids, 1, NULL, &e);
                dsv3_session_close(f);
            }
        }
        dsv3_save(s, n, NULL, NULL, &e);
    } else {
        for (unsigned k = 0; k < n; k++)
            if (dsv3_session_length(s[k]) != 0)
                abort();
    }
    for (unsigned k = 0; k < n; k++)
        dsv3_session_close(s[k]);
    dsv3_workspace_close(ws); /* asserts nothing of pages: look here */
    free(p.data);
    return 0;
}

#include "fuzz.h"
