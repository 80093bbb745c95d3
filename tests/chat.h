/* chat.h: a small tokenizer in memory that has the markers of every markup. Include dsv3.h, test.h and tiny.h first. */
#ifndef CHAT_H
#define CHAT_H

/* As GigaChat3's template is recognised and read; the words are these tests' own. */
#define CHAT_GIGA_TEMPLATE                                                               \
    "{%- set add_tokens = namespace(role_sep=\"<|role_sep|>\\n\") -%}\n{%- set DEVSYSTEM -%}\n" \
    "Be kind.\n\nBe short.\n{%- endset -%}\n{{- bos_token -}}"

/* The tokenizer.json of a tiny checkpoint with the markers of every markup put in. `with_think` false: <think> and </think>
   are spelled, as by DeepSeek-V3's own tokenizer. o.vocab must be 320. */
static inline tiny_text chat_tokenizer_json(const tiny *t, bool with_think)
{
    static const char behind[] = "\n  ],\n  \"normalizer\"";
    tiny_text j = {NULL, 0, 0};
    for (size_t i = 0; i < t->n_files; i++) {
        const tiny_file *f = &t->files[i];
        if (strcmp(f->name, "tokenizer.json") != 0)
            continue;
        size_t at = 0;
        while (at + sizeof behind <= f->size && memcmp(f->data + at, behind, sizeof behind - 1) != 0)
            at++;
        tiny_put_bytes(&j, (const char *)f->data, at);
        int id = TINY_USER_ID + 2;
        for (int m = DSV3__CHAT_CALLS; m < DSV3__CHAT_N_MARKERS; m++) {
            if (!with_think && (m == DSV3__CHAT_THINK || m == DSV3__CHAT_THINK_END))
                continue;
            tiny_printf(&j, ",\n");
            tiny_added_token(&j, id++, dsv3__chat_markers[m], m % 2 == 0, "");
        }
        tiny_put_bytes(&j, (const char *)f->data + at, f->size - at);
    }
    return j;
}

static inline dsv3_tokenizer *chat_tokenizer(bool with_think, const char *chat_template)
{
    tiny t;
    tiny_opts o = tiny_micro();
    dsv3__tok_files files;
    dsv3_tokenizer *tokenizer = NULL;
    dsv3_error error;
    o.vocab = 320, o.tokenizer = true;
    tiny_build(&t, &o);
    memset(&files, 0, sizeof files);
    for (size_t i = 0; i < t.n_files; i++)
        if (strcmp(t.files[i].name, "tokenizer_config.json") == 0)
            files.config.p = (const char *)t.files[i].data, files.config.n = t.files[i].size;
    tiny_text j = chat_tokenizer_json(&t, with_think);
    files.json.p = j.p, files.json.n = j.n;
    files.chat_template.p = chat_template, files.chat_template.n = chat_template ? strlen(chat_template) : 0;
    CHECK_OK(dsv3__tok_open(&tokenizer, NULL, 0, &files, &error), error);
    tiny_free(&t);
    free(j.p);
    return tokenizer;
}

#endif /* CHAT_H */
