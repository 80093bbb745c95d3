/* The floor chat: what is rendered against goldens of the published templates (where they lie beside the repository, and our
   own always), texts that pose as markup, replies cut in every way. */
#define DSV3_IMPLEMENTATION
#define DSV3_STATIC
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

#include "chat.h"

static dsv3_error e;

#define N_MARKUPS       (DSV3_MARKUP_GIGACHAT3 + 1)
#define TEST_COUNT(a) (sizeof(a) / sizeof((a)[0]))

static dsv3_text text_of(const char *s)
{
    dsv3_text t;
    t.p = s;
    t.len = s ? strlen(s) : 0;
    return t;
}

// ---- Files ------------------------------------------------------------------------------------------------

typedef struct text {
    char *p;
    size_t n;
} text;

static text read_file(const char *folder, const char *name)
{
    char path[1024];
    text t = {NULL, 0};
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "rb");
    if (!f)
        return t;
    fseek(f, 0, SEEK_END);
    t.n = (size_t)ftell(f);
    rewind(f);
    t.p = (char *)malloc(t.n + 1);
    if (fread(t.p, 1, t.n, f) != t.n)
        t.n = 0;
    t.p[t.n] = 0;
    fclose(f);
    return t;
}

static const char *published(void)
{
    static char folder[1024];
    snprintf(folder, sizeof folder, "%s/tokenizers/deepseek-v3", test_shared() ? test_shared() : ".");
    text t = read_file(folder, "chat_golden.jsonl");
    free(t.p);
    return t.p ? folder : NULL;
}

static void replace(text *t, const char *from, const char *to)
{
    char *at = strstr(t->p, from);
    if (!CHECK(at != NULL))
        return;
    size_t n = strlen(from), m = strlen(to);
    memcpy(at, to, m); /* never longer */
    memmove(at + m, at + n, t->n + 1 - (size_t)(at - t->p) - n);
    t->n = t->n + m - n;
}

/* V3's, or R1's, which has <think> and </think> in the place of two others. Opened once. */
static dsv3_tokenizer *published_tokenizer(bool r1)
{
    static dsv3_tokenizer *open[2];
    if (open[r1])
        return open[r1];
    dsv3__tok_files files;
    memset(&files, 0, sizeof files);
    text json = read_file(published(), "tokenizer.json");
    text config = read_file(published(), r1 ? "tokenizer_config_r1.json" : "tokenizer_config.json");
    if (r1) {
        replace(&json, "<\xEF\xBD\x9Cplace\xE2\x96\x81holder\xE2\x96\x81no\xE2\x96\x81" "798\xEF\xBD\x9C>", "<think>");
        replace(&json, "<\xEF\xBD\x9Cplace\xE2\x96\x81holder\xE2\x96\x81no\xE2\x96\x81" "799\xEF\xBD\x9C>", "</think>");
    }
    files.json.p = json.p, files.json.n = json.n;
    files.config.p = config.p, files.config.n = config.n;
    CHECK_OK(dsv3__tok_open(&open[r1], NULL, 0, &files, &e), e);
    free(json.p);
    free(config.p);
    return open[r1];
}

// ---- Conversations ----------------------------------------------------------------------------------------

enum { MAX_MESSAGES = 24, MAX_CALLS = 8, MAX_IDS = 1 << 14 };

/* A golden line. Its strings live in `pool`, which is as long as the line. */
typedef struct golden {
    dsv3_markup markup;
    dsv3_message messages[MAX_MESSAGES];
    dsv3_tool_call calls[MAX_MESSAGES][MAX_CALLS];
    size_t n;
    dsv3_chat_opts opts;
    dsv3_text rendered; /* p NULL: the template raises */
    int32_t ids[MAX_IDS];
    size_t n_ids; /* SIZE_MAX: not given */
    char *pool;
    size_t used;
} golden;

static dsv3_text golden_text(golden *g, dsv3__json *j)
{
    dsv3__json_str s;
    dsv3_text t = {NULL, 0};
    if (dsv3__json_peek(j) == 'n') {
        dsv3__json_skip(j);
    } else if (dsv3__json_string(j, &s) && CHECK(dsv3__json_decode(s, g->pool + g->used, &t.len))) {
        t.p = g->pool + g->used;
        g->used += t.len;
    }
    return t;
}

static void golden_call(golden *g, dsv3__json *j, dsv3_tool_call *call)
{
    dsv3__json_str key;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        if (dsv3__json_is(key, "id"))
            call->id = golden_text(g, j);
        else if (dsv3__json_is(key, "function"))
            golden_call(g, j, call);
        else if (dsv3__json_is(key, "name"))
            call->name = golden_text(g, j);
        else if (dsv3__json_is(key, "arguments"))
            call->arguments = golden_text(g, j);
        else
            dsv3__json_skip(j);
    }
}

static void golden_message(golden *g, dsv3__json *j, size_t i)
{
    static const char *const roles[] = {"system", "user", "assistant", "tool"};
    dsv3_message *m = &g->messages[i];
    dsv3__json_str key, s;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        if (dsv3__json_is(key, "role") && dsv3__json_string(j, &s)) {
            for (int r = 0; r < 4; r++)
                if (dsv3__json_is(s, roles[r]))
                    m->role = (dsv3_role)r;
        } else if (dsv3__json_is(key, "content")) {
            m->content = golden_text(g, j);
        } else if (dsv3__json_is(key, "reasoning_content")) {
            m->reasoning = golden_text(g, j);
        } else if (dsv3__json_is(key, "name")) {
            m->name = golden_text(g, j);
        } else if (dsv3__json_is(key, "tool_call_id")) {
            m->tool_call_id = golden_text(g, j);
        } else if (dsv3__json_is(key, "prefix")) {
            dsv3__json_bool(j, &m->prefix);
        } else if (dsv3__json_is(key, "tool_calls")) {
            m->tool_calls = g->calls[i];
            for (dsv3__json_open(j, '['); dsv3__json_item(j) && CHECK(m->n_tool_calls < MAX_CALLS);)
                golden_call(g, j, &g->calls[i][m->n_tool_calls++]);
        } else {
            dsv3__json_skip(j);
        }
    }
}

static dsv3_markup markup_of(dsv3__json *j)
{
    char name[32];
    if (dsv3__json_copy(j, name, sizeof name))
        for (int m = 1; m < N_MARKUPS; m++)
            if (strcmp(name, dsv3_markup_name((dsv3_markup)m)) == 0)
                return (dsv3_markup)m;
    test_fail(__FILE__, __LINE__, "a line names no markup");
    return DSV3_MARKUP_AUTO;
}

static void golden_read(golden *g, const char *line, size_t n)
{
    dsv3__json j;
    dsv3__json_str key;
    memset(g, 0, sizeof *g);
    g->n_ids = SIZE_MAX;
    g->pool = (char *)malloc(n + 1);
    dsv3__json_init(&j, line, n, "golden", &e);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        uint64_t id;
        if (dsv3__json_is(key, "template")) {
            g->opts.markup = markup_of(&j);
        } else if (dsv3__json_is(key, "messages")) {
            for (dsv3__json_open(&j, '['); dsv3__json_item(&j) && CHECK(g->n < MAX_MESSAGES);)
                golden_message(g, &j, g->n++);
        } else if (dsv3__json_is(key, "add_generation_prompt")) {
            dsv3__json_bool(&j, &g->opts.add_generation_prompt);
        } else if (dsv3__json_is(key, "thinking")) {
            dsv3__json_bool(&j, &g->opts.thinking);
        } else if (dsv3__json_is(key, "tools")) {
            dsv3__json_peek(&j);
            g->opts.tools.p = j.p;
            dsv3__json_skip(&j);
            g->opts.tools.len = (size_t)(j.p - g->opts.tools.p);
        } else if (dsv3__json_is(key, "rendered")) {
            g->rendered = golden_text(g, &j);
        } else if (dsv3__json_is(key, "ids")) {
            g->n_ids = 0;
            for (dsv3__json_open(&j, '['); dsv3__json_item(&j) && dsv3__json_uint(&j, &id) && CHECK(g->n_ids < MAX_IDS);)
                g->ids[g->n_ids++] = (int32_t)id;
        } else {
            dsv3__json_skip(&j);
        }
    }
    CHECK_OK(dsv3__json_end(&j), e);
}

typedef struct rendered {
    char text[1 << 16];
    size_t len;
    int32_t ids[MAX_IDS];
    size_t n;
} rendered;

static rendered out;

static dsv3_result render(const dsv3_tokenizer *t, const dsv3_message *messages, size_t n, const dsv3_chat_opts *opts)
{
    dsv3_result r = dsv3_chat_text(t, messages, n, opts, out.text, sizeof out.text, &out.len, &e);
    dsv3_result again = dsv3_chat_render(t, messages, n, opts, out.ids, MAX_IDS, &out.n, &e);
    CHECK_EQ_INT(again, r);
    return r;
}

/* The reference's way: the whole text at once, markers parsed. */
static bool ids_are_those_of_text(const dsv3_tokenizer *t)
{
    static int32_t ids[MAX_IDS];
    size_t n;
    return CHECK_OK(dsv3_tokenize(t, out.text, out.len, DSV3_TOKENIZE_MARKERS, ids, MAX_IDS, &n, &e), e) && n == out.n &&
           memcmp(ids, out.ids, n * sizeof *ids) == 0;
}

static bool is_added(const dsv3_tokenizer *t, int32_t id)
{
    return (t->flags[id] & DSV3__TOK_ADDED) != 0;
}

static size_t count_added(const dsv3_tokenizer *t)
{
    size_t n = 0;
    for (size_t i = 0; i < out.n; i++)
        n += is_added(t, out.ids[i]) ? 1 : 0;
    return n;
}

/* Does the text hold markers that the renderer did not write? */
static bool holds_more_markers(const dsv3_tokenizer *t)
{
    size_t n, written = count_added(t), all = 0;
    static int32_t ids[MAX_IDS];
    CHECK_OK(dsv3_tokenize(t, out.text, out.len, DSV3_TOKENIZE_MARKERS, ids, MAX_IDS, &n, &e), e);
    for (size_t i = 0; i < n; i++)
        all += is_added(t, ids[i]) ? 1 : 0;
    CHECK(written <= all);
    return written < all;
}

typedef struct tally {
    size_t lines, texts, ids, marked, raises;
} tally;

/* One line of goldens. */
static void check_golden(const golden *g, const dsv3_tokenizer *t, size_t line, tally *sum)
{
    dsv3_result r = render(t, g->messages, g->n, &g->opts);
    sum->lines++;
    if (!g->rendered.p) {
        sum->raises++;
        if (!CHECK_EQ_INT(r, DSV3_ERROR_INVALID_ARGUMENT))
            test_fail(__FILE__, __LINE__, "line %lu: the template raises", (unsigned long)line);
        return;
    }
    if (!CHECK_OK(r, e) || !CHECK_BYTES(out.text, out.len, g->rendered.p, g->rendered.len)) {
        test_fail(__FILE__, __LINE__, "line %lu: rendered otherwise", (unsigned long)line);
        return;
    }
    sum->texts++;
    if (g->n_ids == SIZE_MAX) {
        CHECK(holds_more_markers(t) || ids_are_those_of_text(t));
        return;
    }
    if (holds_more_markers(t)) { /* the golden has read the contents' markers: so does the text, so do not we */
        size_t n;
        static int32_t ids[MAX_IDS];
        CHECK_OK(dsv3_tokenize(t, out.text, out.len, DSV3_TOKENIZE_MARKERS, ids, MAX_IDS, &n, &e), e);
        CHECK(n == g->n_ids && memcmp(ids, g->ids, n * sizeof *ids) == 0);
        sum->marked++;
        return;
    }
    if (CHECK(out.n == g->n_ids && memcmp(out.ids, g->ids, out.n * sizeof *out.ids) == 0))
        sum->ids++;
    else
        test_fail(__FILE__, __LINE__, "line %lu: other ids", (unsigned long)line);
}

static golden g;

static void check_goldens(text file, const dsv3_tokenizer *(*tokenizer)(dsv3_markup), tally *sum)
{
    size_t line = 1;
    for (const char *p = file.p, *end = file.p + file.n, *next; p < end; p = next + 1, line++) {
        next = (const char *)memchr(p, '\n', (size_t)(end - p));
        next = next ? next : end;
        golden_read(&g, p, (size_t)(next - p));
        check_golden(&g, tokenizer(g.opts.markup), line, sum);
        free(g.pool);
    }
}

static const dsv3_tokenizer *published_for(dsv3_markup m)
{
    return published_tokenizer(m != DSV3_MARKUP_V3);
}

TEST(goldens)
{
    if (!published())
        SKIP("no tokenizers/deepseek-v3/chat_golden.jsonl beside the repository");
    tally sum;
    memset(&sum, 0, sizeof sum);
    text file = read_file(published(), "chat_golden.jsonl");
    check_goldens(file, published_for, &sum);
    CHECK_EQ_UINT(sum.lines, 266);
    CHECK_EQ_UINT(sum.texts, 260);
    CHECK_EQ_UINT(sum.raises, 6);
    CHECK_EQ_UINT(sum.ids, 166);
    CHECK_EQ_UINT(sum.marked, 10);
    free(file.p);
}

/* The checkpoints' own templates are recognised, and do what the name of the markup does. */
TEST(templates_recognised)
{
    dsv3_markup m;
    if (!published())
        SKIP("no tokenizers/deepseek-v3/chat_golden.jsonl beside the repository");
    CHECK_OK(dsv3_chat_markup(published_tokenizer(false), &m, &e), e);
    CHECK_EQ_STR(dsv3_markup_name(m), "v3");
    CHECK_OK(dsv3_chat_markup(published_tokenizer(true), &m, &e), e);
    CHECK_EQ_STR(dsv3_markup_name(m), "r1");
    text v3_1 = read_file(published(), "chat_template_v3.1.jinja");
    dsv3_tokenizer *t = chat_tokenizer(true, v3_1.p);
    CHECK_OK(dsv3_chat_markup(t, &m, &e), e);
    CHECK_EQ_STR(dsv3_markup_name(m), "v3.1");
    dsv3_tokenizer_close(t);
    free(v3_1.p);
}

/* What tells the templates apart, in words of our own. */
TEST(recognition)
{
    static const struct {
        const char *text, *name;
    } cases[] = {
        {"{{'<\xEF\xBD\x9CUser\xEF\xBD\x9C>'}} is_first_sp", "v3"},
        {"'<\xEF\xBD\x9CUser\xEF\xBD\x9C>' is_first_sp content.split('</think>')[-1] '<\xEF\xBD\x9C" "Assistant\xEF\xBD\x9C>'", "r1"},
        {"'<\xEF\xBD\x9CUser\xEF\xBD\x9C>' split('</think>')[-1] '<\xEF\xBD\x9C" "Assistant\xEF\xBD\x9C><think>\\n'", "r1-think"},
        {"'<\xEF\xBD\x9CUser\xEF\xBD\x9C>' split('</think>')[-1] '<\xEF\xBD\x9C" "Assistant\xEF\xBD\x9C><think>\n'", "r1-think"},
        {"'<\xEF\xBD\x9CUser\xEF\xBD\x9C>' ns.is_last_user thinking", "v3.1"},
        {"<|im_user|>user<|im_middle|>", "kimi-k2"},
        {"<|im_user|>user<|im_middle|> <think> <|tool_calls_section_begin|>", "kimi-k2-thinking"},
        {"<|im_user|>user<|im_middle|> <|tool_calls_section_begin|>", NULL}, /* revisions of K2-Instruct */
        {"<|im_user|>user<|im_middle|> <think> <|tool_calls_section_begin|> thinking", NULL}, /* K2.5 */
        {CHAT_GIGA_TEMPLATE, "gigachat3"},
        {"'<\xEF\xBD\x9CUser\xEF\xBD\x9C>' DSML", NULL}, /* V3.2 */
        {"User: {{content}}", NULL},
        {"{{bos_token}}", NULL},
    };
    dsv3_markup m;
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        dsv3_tokenizer *t = chat_tokenizer(true, cases[i].text);
        dsv3_result r = dsv3_chat_markup(t, &m, &e);
        CHECK_EQ_INT(r, cases[i].name ? DSV3_OK : DSV3_ERROR_TOKENIZER);
        CHECK_EQ_STR(dsv3_markup_name(m), cases[i].name ? cases[i].name : "auto");
        if (!cases[i].name)
            CHECK_CONTAINS(e.message, "not known here: name a markup");
        dsv3_tokenizer_close(t);
    }
    dsv3_tokenizer *t = chat_tokenizer(true, NULL);
    CHECK_RESULT(dsv3_chat_markup(t, &m, &e), DSV3_ERROR_TOKENIZER, e);
    CHECK_CONTAINS(e.message, "has no chat template: name a markup");
    dsv3_tokenizer_close(t);
}

/* A chat template stands in one of two files, in one of two forms. */
TEST(where_templates_stand)
{
    static const struct {
        const char *config, *file, *name;
    } cases[] = {
        {"{\"chat_template\": \"a <|im_middle|>\\n\"}", NULL, "kimi-k2"},
        {"{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"<|role_sep|>\"}, "
         "{\"name\": \"default\", \"template\": \"<|im_middle|>\"}]}", NULL, "kimi-k2"},
        {"{\"chat_template\": \"<|im_middle|>\"}", "<|role_sep|>", "gigachat3"},
        {"{\"chat_template\": null}", NULL, NULL},
        {"{\"chat_template\": [{\"name\": \"tool_use\", \"template\": \"<|im_middle|>\"}, 3]}", NULL, NULL},
        {"{\"chat_template\": {\"default\": \"<|im_middle|>\"}}", NULL, NULL},
        {"{\"chat_template\": \"\"}", "", NULL},
    };
    tiny t;
    tiny_opts to = tiny_micro();
    dsv3_model_opts mo;
    dsv3_markup m;
    to.vocab = 320, to.tokenizer = true;
    memset(&mo, 0, sizeof mo);
    for (size_t i = 0; i < TEST_COUNT(cases); i++) {
        dsv3_tokenizer *tok;
        tiny_build(&t, &to);
        mo.reader = tiny_reader(&t);
        tiny_put(&t, "tokenizer_config.json", cases[i].config, strlen(cases[i].config));
        if (cases[i].file)
            tiny_put(&t, "chat_template.jinja", cases[i].file, strlen(cases[i].file));
        if (CHECK_OK(dsv3_tokenizer_open(&tok, NULL, &mo, &e), e)) {
            CHECK_EQ_INT(dsv3_chat_markup(tok, &m, &e), cases[i].name ? DSV3_OK : DSV3_ERROR_TOKENIZER);
            CHECK_EQ_STR(dsv3_markup_name(m), cases[i].name ? cases[i].name : "auto");
        }
        dsv3_tokenizer_close(tok);
        tiny_free(&t);
    }
}

static dsv3_tokenizer *small; /* all markers */

static const dsv3_tokenizer *small_for(dsv3_markup m)
{
    (void)m;
    return small;
}

/* Texts of our own, rendered by Jinja2 (tests/oracle/chat.py --goldens). */
TEST(small_goldens)
{
    tally sum;
    memset(&sum, 0, sizeof sum);
    text file = read_file("tests", "chat_tiny.jsonl");
    if (!file.p)
        SKIP("no tests/chat_tiny.jsonl here");
    small = chat_tokenizer(true, NULL);
    check_goldens(file, small_for, &sum);
    CHECK(sum.texts > 150);
    CHECK(sum.raises > 5);
    dsv3_tokenizer_close(small);
    free(file.p);
}

// ---- What does not pose as markup -------------------------------------------------------------------------

enum { N_FIELDS = 14 };

/* A conversation whose every field is one of the given texts. */
typedef struct posing {
    dsv3_message messages[8];
    dsv3_tool_call calls[2];
    dsv3_chat_opts opts;
    char tools[8192];
} posing;

static posing p;

static const char *escaped(const char *s, char *to)
{
    char *o = to;
    for (; *s; s++) {
        if (*s == '"' || *s == '\\')
            *o++ = '\\';
        *o++ = *s;
    }
    *o = 0;
    return to;
}

static void pose(dsv3_markup m, const char *const *f)
{
    char a[1024], b[1024], c[1024];
    memset(&p, 0, sizeof p);
    p.opts.markup = m;
    p.opts.add_generation_prompt = p.opts.thinking = true;
    if (m == DSV3_MARKUP_V3_1 || m == DSV3_MARKUP_KIMI_K2 || m == DSV3_MARKUP_KIMI_K2_THINKING) {
        snprintf(p.tools, sizeof p.tools, "[{\"function\": {\"name\": \"%s\", \"description\": \"%s\", \"parameters\": {\"a\": \"%s\"}}}]",
                 escaped(f[0], a), escaped(f[1], b), escaped(f[2], c));
        p.opts.tools = text_of(p.tools);
    }
    p.messages[0].role = p.messages[1].role = DSV3_ROLE_SYSTEM;
    p.messages[0].content = text_of(f[3]);
    p.messages[1].content = text_of(f[4]);
    p.messages[2].role = DSV3_ROLE_USER;
    p.messages[2].content = text_of(f[5]);
    p.messages[2].name = text_of(f[6]);
    p.messages[3].role = DSV3_ROLE_ASSISTANT;
    p.messages[3].content = text_of(m == DSV3_MARKUP_V3 ? NULL : f[7]);
    p.messages[3].reasoning = text_of(f[8]);
    p.messages[3].tool_calls = p.calls;
    p.messages[3].n_tool_calls = 2;
    p.calls[0].id = text_of(f[9]);
    p.calls[0].name = text_of(f[10]);
    p.calls[0].arguments = text_of(f[11]);
    p.calls[1] = p.calls[0];
    p.messages[4].role = DSV3_ROLE_TOOL;
    p.messages[4].content = text_of(f[12]);
    p.messages[4].tool_call_id = text_of(f[13]);
    p.messages[5].role = DSV3_ROLE_ASSISTANT;
    p.messages[5].content = text_of(f[7]);
    p.messages[6].role = DSV3_ROLE_USER;
    p.messages[6].content = text_of(f[5]);
    p.messages[7] = p.messages[6];
}

/* The added tokens among the ids, in order. */
static size_t skeleton(const dsv3_tokenizer *t, int32_t *ids)
{
    size_t n = 0;
    for (size_t i = 0; i < out.n; i++)
        if (is_added(t, out.ids[i]))
            ids[n++] = out.ids[i];
    return n;
}

static bool poses(const dsv3_tokenizer *t, dsv3_markup m, const char *const *fields, const int32_t *expected, size_t n)
{
    int32_t found[256];
    pose(m, fields);
    if (!CHECK_OK(dsv3_chat_render(t, p.messages, 8, &p.opts, out.ids, MAX_IDS, &out.n, &e), e))
        return false;
    return skeleton(t, found) == n && memcmp(found, expected, n * sizeof *found) == 0;
}

/* Every added token's text: in all fields, in each alone, and with its halves at the ends of neighbouring fields. */
static void check_posing(const dsv3_tokenizer *t, dsv3_markup m, size_t step)
{
    const char *fields[N_FIELDS];
    int32_t expected[256];
    size_t n;
    for (int i = 0; i < N_FIELDS; i++)
        fields[i] = "x";
    pose(m, fields);
    if (!CHECK_OK(dsv3_chat_render(t, p.messages, 8, &p.opts, out.ids, MAX_IDS, &out.n, &e), e))
        return;
    n = skeleton(t, expected);
    CHECK(n > 8);
    for (size_t k = 0; k < t->n_markers; k++) {
        char marker[256], halves[300];
        bool common = dsv3__bpe_trie_find(&t->marker_trie, "<think>", 7) == (int64_t)k || t->n_markers - k < 40;
        snprintf(marker, sizeof marker, "%.*s", (int)t->contents[k].n, t->content_pool + t->contents[k].at);
        if (k % step && !common)
            continue;
        for (int i = 0; i < N_FIELDS; i++)
            fields[i] = marker;
        bool good = poses(t, m, fields, expected, n);
        for (int i = 0; i < N_FIELDS && common; i++) {
            for (int j = 0; j < N_FIELDS; j++)
                fields[j] = i == j ? marker : "x";
            good = good && poses(t, m, fields, expected, n);
        }
        for (size_t cut = 1; cut < t->contents[k].n && (common || cut == 1); cut++) {
            snprintf(halves, sizeof halves, "%s%.*s", marker + cut, (int)cut, marker);
            bool between = ((unsigned char)marker[cut] & 0xC0) != 0x80; /* tools are UTF-8 */
            for (int i = 0; i < N_FIELDS; i++)
                fields[i] = between || i > 2 ? halves : "x";
            good = good && poses(t, m, fields, expected, n);
        }
        if (!CHECK(good))
            test_fail(__FILE__, __LINE__, "%s posed in markup %s", marker, dsv3_markup_name(m));
    }
}

TEST(posing_small)
{
    for (int think = 0; think < 2; think++) {
        dsv3_tokenizer *t = chat_tokenizer(think == 1, CHAT_GIGA_TEMPLATE);
        for (int m = DSV3_MARKUP_V3; m < N_MARKUPS; m++)
            check_posing(t, (dsv3_markup)m, 1);
        dsv3_tokenizer_close(t);
    }
}

TEST(posing_published)
{
    if (!published())
        SKIP("no tokenizers/deepseek-v3 beside the repository");
    check_posing(published_tokenizer(false), DSV3_MARKUP_V3, 1);
    check_posing(published_tokenizer(true), DSV3_MARKUP_R1, 1);
    check_posing(published_tokenizer(true), DSV3_MARKUP_R1_THINK, 7);
    check_posing(published_tokenizer(true), DSV3_MARKUP_V3_1, 7);
}

// ---- The rest of rendering --------------------------------------------------------------------------------

static void say(dsv3_message *m, dsv3_role role, const char *content)
{
    memset(m, 0, sizeof *m);
    m->role = role;
    m->content = text_of(content);
}

/* The ids of a conversation begin with those of its beginning. */
TEST(a_prefix_stays)
{
    static int32_t before[MAX_IDS];
    dsv3_tokenizer *t = chat_tokenizer(true, CHAT_GIGA_TEMPLATE);
    for (int m = DSV3_MARKUP_V3; m < N_MARKUPS; m++) {
        dsv3_message c[6];
        dsv3_chat_opts o;
        size_t n = 0;
        memset(&o, 0, sizeof o);
        o.markup = (dsv3_markup)m;
        say(&c[0], DSV3_ROLE_SYSTEM, "Be brief.");
        for (int i = 1; i < 6; i++)
            say(&c[i], i % 2 ? DSV3_ROLE_USER : DSV3_ROLE_ASSISTANT, i == 3 ? "" : "one\n two");
        for (size_t k = 1; k <= 6; k++) {
            CHECK_OK(render(t, c, k, &o), e);
            CHECK(out.n > n && memcmp(out.ids, before, n * sizeof *before) == 0);
            n = out.n;
            memcpy(before, out.ids, n * sizeof *before);
            CHECK(ids_are_those_of_text(t));
        }
        c[4].reasoning = text_of("because"); /* only Kimi-K2-Thinking writes it, and not before an answer */
        CHECK_OK(render(t, c, 6, &o), e);
        CHECK(out.n == n && memcmp(out.ids, before, n * sizeof *before) == 0);
    }
    dsv3_tokenizer_close(t);
}

TEST(gigachat)
{
    dsv3_tokenizer *t = chat_tokenizer(true, CHAT_GIGA_TEMPLATE);
    dsv3_message c[4];
    dsv3_tool_call call;
    dsv3_chat_opts o;
    memset(&o, 0, sizeof o);
    memset(&call, 0, sizeof call);
    call.name = text_of("f");
    call.arguments = text_of("{\"a\": 1}");
    o.add_generation_prompt = true;
    say(&c[0], DSV3_ROLE_SYSTEM, "s");
    say(&c[1], DSV3_ROLE_USER, "u");
    say(&c[2], DSV3_ROLE_ASSISTANT, NULL);
    c[2].tool_calls = &call;
    c[2].n_tool_calls = 1;
    say(&c[3], DSV3_ROLE_TOOL, "r");
    CHECK_OK(render(t, c, 4, &o), e);
    out.text[out.len] = 0;
    CHECK_EQ_STR(out.text, TINY_BOS "developer system<|role_sep|>\nBe kind.\n\nBe short.<|message_sep|>\n\n"
                                    "system<|role_sep|>\ns<|message_sep|>\n\nuser<|role_sep|>\nu<|message_sep|>\n\n"
                                    "assistant<|role_sep|>\n<|message_sep|>\n\n"
                                    "function call<|role_sep|>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}<|message_sep|>\n\n"
                                    "function result<|role_sep|>\nr<|message_sep|>\n\nassistant<|role_sep|>\n");
    CHECK(ids_are_those_of_text(t));
    dsv3_tokenizer_close(t);
    t = chat_tokenizer(true, "<|role_sep|>");
    CHECK_RESULT(render(t, c, 4, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "the checkpoint's chat template holds");
    dsv3_tokenizer_close(t);
}

/* Kimi's words where there is no system message are the template's. */
TEST(kimi_system)
{
    dsv3_message c;
    dsv3_chat_opts o;
    memset(&o, 0, sizeof o);
    say(&c, DSV3_ROLE_USER, "u");
    dsv3_tokenizer *t = chat_tokenizer(true, "'<|im_system|>system<|im_middle|>You are a tree.<|im_end|>' <|im_user|>");
    CHECK_OK(render(t, &c, 1, &o), e);
    out.text[out.len] = 0;
    CHECK_EQ_STR(out.text, "<|im_system|>system<|im_middle|>You are a tree.<|im_end|><|im_user|>user<|im_middle|>u<|im_end|>");
    CHECK_EQ_INT(out.ids[0], dsv3_token_find(t, "<|im_system|>", 13));
    dsv3_tokenizer_close(t);
}

/* V3's template of December 2024 takes the last system message alone, and so does its tokenizer's AUTO. */
TEST(one_system)
{
    dsv3_message c[3];
    dsv3_chat_opts o;
    memset(&o, 0, sizeof o);
    say(&c[0], DSV3_ROLE_SYSTEM, "first");
    say(&c[1], DSV3_ROLE_USER, "u");
    say(&c[2], DSV3_ROLE_SYSTEM, "last");
    dsv3_tokenizer *t = chat_tokenizer(true, "{{ns.system_prompt}} '<\xEF\xBD\x9CUser\xEF\xBD\x9C>'");
    CHECK_OK(render(t, c, 3, &o), e);
    CHECK_BYTES(out.text, out.len, TINY_BOS "last" TINY_USER "u", strlen(TINY_BOS "last" TINY_USER "u"));
    o.markup = DSV3_MARKUP_V3; /* named: the form that is current */
    CHECK_OK(render(t, c, 3, &o), e);
    CHECK_BYTES(out.text, out.len, TINY_BOS "first\n\nlast" TINY_USER "u", strlen(TINY_BOS "first\n\nlast" TINY_USER "u"));
    dsv3_tokenizer_close(t);
}

/* Tools are written as Python's json.dumps would, whatever their spelling. */
TEST(tools)
{
    static const char spelled[] = " [ {\"function\" :{\"name\":\"f\\u0041\\/\", \"n\":[1,-2.50,true , null,{} ,[]],\n\t\"parameters\":{\"\\u00e9\\n\\u0001\":\"\\ud83d\\ude00\\\"\"}}}]\n";
    dsv3_tokenizer *t = chat_tokenizer(true, NULL);
    dsv3_message c;
    dsv3_chat_opts o;
    memset(&o, 0, sizeof o);
    say(&c, DSV3_ROLE_SYSTEM, "s");
    o.markup = DSV3_MARKUP_KIMI_K2;
    o.tools = text_of(spelled);
    CHECK_OK(render(t, &c, 1, &o), e);
    out.text[out.len] = 0;
    CHECK_EQ_STR(out.text, "<|im_system|>tool_declare<|im_middle|>[{\"function\": {\"name\": \"fA/\", \"n\": [1, -2.50, true, null, {}, []], "
                           "\"parameters\": {\"\xC3\xA9\\n\\u0001\": \"\xF0\x9F\x98\x80\\\"\"}}}]<|im_end|>"
                           "<|im_system|>system<|im_middle|>s<|im_end|>");
    o.markup = DSV3_MARKUP_V3_1;
    CHECK_OK(render(t, &c, 1, &o), e);
    out.text[out.len] = 0;
    CHECK_CONTAINS(out.text, TINY_BOS "s\n\n## Tools\nYou have access to the following tools:\n\n### fA/\nDescription: \n\nParameters: {\"\xC3\xA9\\n\\u0001\": ");
    o.markup = DSV3_MARKUP_V3;
    CHECK_RESULT(render(t, &c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "no place for tools");
    o.tools = text_of("[ ]"); /* none */
    CHECK_OK(render(t, &c, 1, &o), e);
    static const char *const bad[] = {"{}", "[1,]", "[\"\\x\"]", "[", "[\"\\ud800\"]", "3 3"};
    o.markup = DSV3_MARKUP_KIMI_K2;
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        o.tools = text_of(bad[i]);
        CHECK_RESULT(render(t, &c, 1, &o), DSV3_ERROR_JSON, e);
    }
    o.markup = DSV3_MARKUP_V3_1;
    o.tools = text_of("[3]");
    CHECK_RESULT(render(t, &c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    dsv3_tokenizer_close(t);
}

TEST(errors)
{
    dsv3_tokenizer *t = chat_tokenizer(true, NULL);
    dsv3_message c[2];
    dsv3_tool_call call;
    dsv3_chat_opts o;
    int32_t ids[4];
    char four[4];
    size_t n, len;
    memset(&o, 0, sizeof o);
    memset(&call, 0, sizeof call);
    say(&c[0], DSV3_ROLE_USER, "hello there");
    say(&c[1], DSV3_ROLE_ASSISTANT, NULL);
    CHECK_RESULT(dsv3_chat_render(t, c, 1, NULL, ids, 4, &n, &e), DSV3_ERROR_TOKENIZER, e);
    o.markup = DSV3_MARKUP_R1;
    CHECK_RESULT(dsv3_chat_render(NULL, c, 1, &o, ids, 4, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_chat_render(t, NULL, 1, &o, ids, 4, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_chat_render(t, c, 1, &o, NULL, 4, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_chat_render(t, c, 1, &o, ids, 4, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_chat_text(t, c, 1, &o, NULL, 4, &n, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_chat_render(t, c, 1, &o, ids, 4, &n, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK(n > 4);
    CHECK_OK(dsv3_chat_render(t, c, 1, &o, NULL, 0, &n, &e), e);
    CHECK_RESULT(dsv3_chat_text(t, c, 1, &o, four, 4, &len, &e), DSV3_ERROR_BUFFER_TOO_SMALL, e);
    CHECK_EQ_UINT(len, strlen(TINY_BOS TINY_USER "hello there"));
    CHECK_OK(dsv3_chat_text(t, c, 1, &o, NULL, 0, &len, NULL), e);
    o.struct_size = 3;
    CHECK_RESULT(dsv3_chat_render(t, c, 1, &o, ids, 4, &n, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o.struct_size = sizeof o;
    o.markup = (dsv3_markup)77;
    CHECK_RESULT(dsv3_chat_render(t, c, 1, &o, ids, 4, &n, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    CHECK_EQ_STR(dsv3_markup_name(o.markup), "?");
    o.markup = DSV3_MARKUP_R1;
    CHECK_RESULT(render(t, c, 2, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "messages[1] has no content");
    c[1].tool_calls = &call, c[1].n_tool_calls = 1;
    CHECK_RESULT(render(t, c, 2, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "messages[1] has no name in a tool call");
    call.name = text_of("f");
    CHECK_RESULT(render(t, c, 2, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "no arguments in a tool call");
    c[1].tool_calls = NULL;
    CHECK_RESULT(render(t, c, 2, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    c[0].role = (dsv3_role)9;
    CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    c[0].role = DSV3_ROLE_USER;
    c[0].content.len = SIZE_MAX; /* refused before it is read */
    CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    dsv3_tokenizer_close(t);
    tiny plain;
    tiny_opts to = tiny_micro();
    to.vocab = 320, to.tokenizer = true;
    tiny_build(&plain, &to);
    dsv3_model_opts mo;
    memset(&mo, 0, sizeof mo);
    mo.reader = tiny_reader(&plain);
    CHECK_OK(dsv3_tokenizer_open(&t, NULL, &mo, &e), e);
    say(&c[0], DSV3_ROLE_USER, "x");
    o.markup = DSV3_MARKUP_KIMI_K2;
    CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_TOKENIZER, e);
    CHECK_CONTAINS(e.message, "markup kimi-k2 needs the token \"<|im_system|>\"");
    dsv3_tokenizer_close(t);
    tiny_put(&plain, "chat_template.jinja", "<|im_middle|>", 13); /* goes before the other file's */
    CHECK_OK(dsv3_tokenizer_open(&t, NULL, &mo, &e), e);
    dsv3_markup m;
    CHECK_OK(dsv3_chat_markup(t, &m, &e), e);
    CHECK_EQ_INT(m, DSV3_MARKUP_KIMI_K2);
    dsv3_tokenizer_close(t);
    tiny_free(&plain);
}

TEST(no_memory)
{
    dsv3_tokenizer *t = chat_tokenizer(true, NULL);
    tiny_heap heap;
    dsv3_message c[2];
    dsv3_chat_opts o;
    size_t n;
    char *long_text = (char *)malloc(100000);
    memset(long_text, 'a', 100000);
    memset(&o, 0, sizeof o);
    o.markup = DSV3_MARKUP_V3;
    say(&c[0], DSV3_ROLE_USER, "x");
    say(&c[1], DSV3_ROLE_USER, "");
    c[1].content.p = long_text, c[1].content.len = 100000;
    dsv3_allocator was = t->mem.allocator;
    for (uint64_t fail = 1;; fail++) {
        memset(&heap, 0, sizeof heap);
        heap.fail_at = fail;
        t->mem.allocator = tiny_allocator(&heap);
        dsv3_result r = dsv3_chat_render(t, c, 2, &o, NULL, 0, &n, &e);
        t->mem.allocator = was;
        CHECK_EQ_UINT(heap.live_bytes, 0);
        if (r == DSV3_OK) {
            CHECK(fail > 2);
            break;
        }
        if (!CHECK_EQ_INT(r, DSV3_ERROR_OUT_OF_MEMORY) || !CHECK(fail < 50))
            break;
    }
    dsv3_tokenizer_close(t);
    free(long_text);
}

// ---- Replies ----------------------------------------------------------------------------------------------

/* In scripts a marker is '@' and a letter. */
static const struct {
    char letter;
    int marker;
} script_markers[] = {
    {'T', DSV3__CHAT_THINK},   {'t', DSV3__CHAT_THINK_END},   {'S', DSV3__CHAT_CALLS},        {'s', DSV3__CHAT_CALLS_END},
    {'C', DSV3__CHAT_CALL},    {'c', DSV3__CHAT_CALL_END},    {'|', DSV3__CHAT_SEP},          {'E', DSV3__CHAT_EOS},
    {'U', DSV3__CHAT_USER},    {'K', DSV3__CHAT_IM_CALLS},    {'k', DSV3__CHAT_IM_CALLS_END}, {'L', DSV3__CHAT_IM_CALL},
    {'l', DSV3__CHAT_IM_CALL_END}, {'=', DSV3__CHAT_IM_ARGUMENT}, {'I', DSV3__CHAT_IM_END},   {'M', DSV3__CHAT_MESSAGE_SEP},
};

typedef struct script {
    const char *markup;
    int how;              /* or'ed together */
    const char *stops[2]; /* where STOPS */
    const char *text;
    const char *expected; /* R[reasoning]A[answer]I0[id of call 0]N0[name]G0[arguments]E */
} script;

enum { PLAIN = 0, THINKING = 1, SPELLED = 2 /* no <think> in the tokenizer */, KEEP = 4, STOPS = 8 };

#define V3_END "<\xEF\xBD\x9Ctool\xE2\x96\x81" "call\xE2\x96\x81" "end\xEF\xBD\x9C>"
#define V3_SEP "<\xEF\xBD\x9Ctool\xE2\x96\x81sep\xEF\xBD\x9C>"

static const script scripts[] = {
    {"v3", 0, {0, 0}, "Hello@E", "A[Hello]E"},
    {"v3", 0, {0, 0}, "@E", "E"},
    {"v3", 0, {0, 0}, "", "E"},
    {"v3", 0, {0, 0}, "Ciao\n\n@E", "A[Ciao\n\n]E"},
    {"v3", 0, {0, 0}, "caf\xC3\xA9 \xF0\x9F\x98\x80 \xE4\xB8\x80@E", "A[caf\xC3\xA9 \xF0\x9F\x98\x80 \xE4\xB8\x80]E"},
    {"v3", 0, {0, 0}, "a\xC3@E", "A[a\xEF\xBF\xBD]E"},
    {"v3", 0, {0, 0}, "\xF0\x9F\x98" "a\xFF\xE4\xB8", "A[\xEF\xBF\xBD" "a\xEF\xBF\xBD\xEF\xBF\xBD]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|look\n```json\n{\"n\": 0}\n```@c@s@E", "N0[look]G0[{\"n\": 0}]E"},
    {"v3", 0, {0, 0}, "Let me see.@S@Cfunction@|f\n```json\n{}\n```@c@s@E", "A[Let me see.]N0[f]G0[{}]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\n```json\n1\n```@c\n@Cfunction@|g\n```json\n2\n```@c@s@E", "N0[f]G0[1]N1[g]G1[2]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\n{\"a\":1}@c@s@E", "N0[f]G0[{\"a\":1}]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\n```js@c@s@E", "N0[f]G0[```js]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\n```json\nx\n```y\n``@c@s@E", "N0[f]G0[x\n```y\n``]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\n```json\n{\"a\n```@E", "N0[f]G0[{\"a]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\n```json\n{\"a", "N0[f]G0[{\"a]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f", "E"},
    {"v3", 0, {0, 0}, "@S@Cf\n```json\n1\n```@c@s@E", "N0[f]G0[1]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f@c@s@E", "N0[f]E"},
    {"v3", 0, {0, 0}, "@Cfunction@|f\n```json\n1\n```@cDone\n@E", "N0[f]G0[1]A[Done\n]E"},
    {"v3", 0, {0, 0}, "@S@Cfunction@|f\xE4\n```json\n\xE4\xB8@c@s@E", "N0[f\xEF\xBF\xBD]G0[\xEF\xBF\xBD]E"},
    {"v3", 0, {0, 0}, "a@cb@|d@E", "A[a" V3_END "b" V3_SEP "d]E"},
    {"v3", 0, {0, 0}, "Yes@UNo", "A[Yes]E"},
    {"v3", 0, {0, 0}, "close it with </think>, then\n```json\n@E", "A[close it with </think>, then\n```json\n]E"},
    {"r1", 0, {0, 0}, "@T\nhm\n@t\n\nNo.@E", "R[hm]A[No.]E"},
    {"r1", 0, {0, 0}, "No need@E", "A[No need]E"},
    {"r1", 0, {0, 0}, "@Thm@tYes@E", "R[hm]A[Yes]E"},
    {"r1", 0, {0, 0}, "@T\n\n@t\n\nAt once.@E", "A[At once.]E"},
    {"r1", 0, {0, 0}, "@Thm", "R[hm]E"},
    {"r1", 0, {0, 0}, "@Ta@Tb@tc@E", "R[ab]A[c]E"},
    {"r1", 0, {0, 0}, "a@Tb@t@E", "A[a<think>b</think>]E"},
    {"r1", 0, {0, 0}, "@T a\n\nb\n\n@t\n\n\nc@E", "R[ a\n\nb\n]A[\nc]E"},
    {"r1", 0, {0, 0}, "@TI should look\n@S@Cfunction@|f\n```json\n1\n```@c@s@E", "R[I should look]N0[f]G0[1]E"},
    {"r1", 0, {0, 0}, "@Tx@t\n\n@S@Cfunction@|f\n```json\n1\n```@c@s@E", "R[x]N0[f]G0[1]E"},
    {"r1", KEEP, {0, 0}, "@T\nhm\n@t\n\nNo@E", "R[\nhm\n]A[\n\nNo]E"},
    {"r1-think", 0, {0, 0}, "hm\n@t\n\nNo.@E", "R[hm]A[No.]E"},
    {"r1-think", 0, {0, 0}, "hm\n", "R[hm\n]E"},
    {"r1-think", 0, {0, 0}, "@tYes@E", "A[Yes]E"},
    {"r1-think", 0, {0, 0}, "write </think>?\xE4\xB8@tYes@E", "R[write </think>?\xEF\xBF\xBD]A[Yes]E"},
    {"v3.1", THINKING, {0, 0}, "\nhm@tNo@E", "R[hm]A[No]E"},
    {"v3.1", 0, {0, 0}, "@S@Cf@|{\"a\": 1}@c@Cg@|{}@c@s@E", "N0[f]G0[{\"a\": 1}]N1[g]G1[{}]E"},
    {"v3.1", 0, {0, 0}, "Sure.@S@Cf@|@c@s@E", "A[Sure.]N0[f]E"},
    {"v3.1", THINKING, {0, 0}, "a@S@Cf@|\n```@c@s@E", "R[a]N0[f]G0[\n```]E"},
    {"kimi-k2", 0, {0, 0}, "Hi@I", "A[Hi]E"},
    {"kimi-k2", 0, {0, 0}, "@K@Lfunctions.look:0@={\"n\": 0}@l@Lfunctions.a:b:12@={}@l@k@I",
     "I0[functions.look:0]N0[look]G0[{\"n\": 0}]I1[functions.a:b:12]N1[a:b]G1[{}]E"},
    {"kimi-k2-thinking", 0, {0, 0}, "@Thm@t@K@Lsearch:1@=q@l@k@I", "R[hm]I0[search:1]N0[search]G0[q]E"},
    {"kimi-k2-thinking", 0, {0, 0}, "@TI call\n@K@Lfunctions.x@=1@l@k@I", "R[I call]I0[functions.x]N0[x]G0[1]E"},
    {"gigachat3", 0, {0, 0}, "Hello.@M\n\nuser", "A[Hello.]E"},
    {"r1", SPELLED, {0, 0}, "<think>\nhm\n</think>\n\nNo.@E", "R[hm]A[No.]E"},
    {"r1", SPELLED, {0, 0}, "<thinker>x</think>@E", "A[<thinker>x</think>]E"},
    {"r1", SPELLED, {0, 0}, "<think", "A[<think]E"},
    {"r1", SPELLED | KEEP, {0, 0}, "<think>\nhm\n</think>\n\nNo.@E", "R[\nhm\n]A[\n\nNo.]E"},
    {"r1-think", SPELLED, {0, 0}, "a < b </thin k>\n\n</think>c</think>@E", "R[a < b </thin k>\n]A[c</think>]E"},
    {"r1-think", SPELLED, {0, 0}, "a\n</thi", "R[a\n</thi]E"},
    {"v3", STOPS, {"STOP", "\n\n"}, "one\nSTO two STOP three@E", "A[one\nSTO two ]E"},
    {"v3", STOPS, {"STOP", "\n\n"}, "one\n\ntwo", "A[one]E"},
    {"v3", STOPS, {"abcd", "bc"}, "zabce", "A[za]E"},
    {"v3", STOPS, {"cd", "\xE4\xB8\x80!"}, "\xE4\xB8\x80? abc", "A[\xE4\xB8\x80? abc]E"},
    {"v3", STOPS, {"aab", "x"}, "aaab", "A[a]E"},
    {"r1-think", STOPS, {"STOP", "x"}, "STOP@tgoSTOPy@E", "R[STOP]A[go]E"},
    {"r1", SPELLED | STOPS, {"<thy", "<think>"}, "<think>a</think>b<think>c", "R[a]A[b]E"},
    {"v3", STOPS, {"f", "x"}, "@S@Cfunction@|f\n```json\nfx\n```@c@s@E", "N0[f]G0[fx]E"},
};

/* What the events said: one entry a byte, and one where something whole begins. */
typedef struct transcript {
    int32_t entries[4096]; /* kind << 24 | call << 16 | byte, or 256: begins, 257: the end */
    size_t n, n_ids;
    int32_t ids[1024];
    bool utf8;
} transcript;

static bool write_down(void *user, const dsv3_reply_event *event)
{
    transcript *t = (transcript *)user;
    int32_t tag = (int32_t)event->kind << 24 | (int32_t)(event->call << 16);
    if (event->id >= 0)
        t->ids[t->n_ids++] = event->id;
    if (event->kind == DSV3_REPLY_END || ((event->kind == DSV3_REPLY_CALL_NAME || event->kind == DSV3_REPLY_CALL_ID) && event->len))
        t->entries[t->n++] = tag | (event->kind == DSV3_REPLY_END ? 257 : 256);
    for (size_t i = 0; i < event->len; i++)
        t->entries[t->n++] = tag | (uint8_t)event->text[i];
    for (size_t i = 0, step; i < event->len && t->utf8; i += step) {
        step = dsv3__utf8_length(event->text + i, event->text + event->len);
        t->utf8 = step > 0;
        step = step ? step : 1;
    }
    return true;
}

/* As it stands in the scripts. */
static const char *spelled_out(const transcript *t)
{
    static char s[8192];
    static const char *const names[] = {"R", "A", "I", "N", "G"};
    size_t n = 0;
    int32_t last = -1;
    for (size_t i = 0; i < t->n; i++) {
        int32_t tag = t->entries[i] >> 16, byte = t->entries[i] & 0xFFFF, kind = tag >> 8;
        if (tag != last || byte >= 256)
            n += (size_t)snprintf(s + n, sizeof s - n, "%s", last >= 0 ? "]" : "");
        if (byte == 257) {
            n += (size_t)snprintf(s + n, sizeof s - n, "E");
            last = -1;
            continue;
        }
        if ((tag != last || byte == 256) && kind <= DSV3_REPLY_ANSWER)
            n += (size_t)snprintf(s + n, sizeof s - n, "%s[", names[kind]);
        else if (tag != last || byte == 256)
            n += (size_t)snprintf(s + n, sizeof s - n, "%s%d[", names[kind], (int)(tag & 255));
        if (byte < 256)
            s[n++] = (char)byte;
        last = tag;
    }
    s[n] = 0;
    return s;
}

/* A script as bytes and, below 0, markers. */
static size_t script_items(const script *s, int *items)
{
    size_t n = 0;
    for (const char *c = s->text; *c; c++) {
        if (*c != '@') {
            items[n++] = (uint8_t)*c;
            continue;
        }
        c++;
        for (size_t i = 0; i < TEST_COUNT(script_markers); i++)
            if (script_markers[i].letter == *c)
                items[n] = -1 - script_markers[i].marker;
        n++;
    }
    return n;
}

static void reply_begin(dsv3_reply *r, const dsv3_tokenizer *t, const script *s, transcript *to)
{
    dsv3_reply_opts o;
    memset(&o, 0, sizeof o);
    memset(to, 0, sizeof *to);
    to->utf8 = true;
    for (int m = 1; m < N_MARKUPS; m++)
        if (strcmp(s->markup, dsv3_markup_name((dsv3_markup)m)) == 0)
            o.markup = (dsv3_markup)m;
    o.thinking = (s->how & THINKING) != 0;
    o.keep_newlines = (s->how & KEEP) != 0;
    o.stop_strings = s->stops;
    o.n_stop_strings = s->how & STOPS ? 2 : 0;
    o.event_fn = write_down;
    o.user = to;
    CHECK_OK(dsv3_reply_init(r, t, &o, &e), e);
}

/* One piece of text, as if there were a token of it. */
static void reply_piece(dsv3_reply *r, const int *items, size_t n)
{
    char bytes[512];
    for (size_t i = 0; i < n; i++)
        bytes[i] = (char)items[i];
    if (!r->opts.event_fn)
        return;
    dsv3__reply_text(r, bytes, n);
    dsv3__reply_flush(r);
}

static int32_t byte_id(const dsv3_tokenizer *t, int byte)
{
    return t->bpe.ids[byte];
}

/* Everything that decides what comes next. */
static bool same_state(const dsv3_reply *a, const dsv3_reply *b)
{
    return a->state == b->state && a->n_calls == b->n_calls && a->skip == b->skip && a->n_out == 0 && b->n_out == 0 &&
           memcmp(a->utf8, b->utf8, 1u + a->utf8[0]) == 0 && a->n_held == b->n_held && memcmp(a->held, b->held, a->n_held) == 0 &&
           a->n_name == b->n_name && memcmp(a->name, b->name, a->n_name) == 0 && !a->opts.event_fn == !b->opts.event_fn;
}

static transcript uncut, bytewise, piece;
static dsv3_reply states[512];
static size_t written[512]; /* entries of the transcript before item i */

/* Read byte by byte, item i finds the reply in states[i]. Any piece [i, j) of text, put at once there, must say the same
   and leave states[j]: so every way to cut the reply does. */
static bool all_cuts(const dsv3_tokenizer *t, const script *s, const int *items, size_t n)
{
    dsv3_reply r;
    reply_begin(&states[0], t, s, &bytewise);
    for (size_t i = 0; i < n; i++) {
        written[i] = bytewise.n;
        states[i + 1] = states[i];
        dsv3_reply_put(&states[i + 1], items[i] < 0 ? dsv3__chat_id(t, -1 - items[i]) : byte_id(t, items[i]));
    }
    written[n] = bytewise.n;
    for (size_t i = 0; i < n; i++)
        for (size_t j = i + 1; j <= n && items[j - 1] >= 0; j++) {
            r = states[i];
            r.opts.user = &piece;
            memset(&piece, 0, sizeof piece);
            reply_piece(&r, items + i, j - i);
            if (!same_state(&r, &states[j]) || piece.n != written[j] - written[i] ||
                memcmp(piece.entries, bytewise.entries + written[i], piece.n * sizeof *piece.entries) != 0)
                return false;
        }
    return true;
}

TEST(replies)
{
    CHECK(TEST_COUNT(scripts) >= 40);
    for (size_t k = 0; k < TEST_COUNT(scripts); k++) {
        const script *s = &scripts[k];
        dsv3_tokenizer *t = chat_tokenizer(!(s->how & SPELLED), CHAT_GIGA_TEMPLATE);
        int items[512];
        size_t n = script_items(s, items), n_put = 0;
        dsv3_reply r;
        reply_begin(&r, t, s, &uncut);
        for (size_t i = 0, j; i < n; i = j) { /* as few pieces as there can be */
            for (j = i; j < n && items[j] >= 0; j++)
                continue;
            if (j > i)
                reply_piece(&r, items + i, j - i);
            else
                dsv3_reply_put(&r, dsv3__chat_id(t, -1 - items[j++]));
        }
        dsv3_reply_end(&r);
        dsv3_reply_end(&r);
        CHECK(!dsv3_reply_put(&r, 5));
        CHECK_EQ_STR(spelled_out(&uncut), s->expected);
        CHECK(uncut.utf8);
        if (!CHECK(all_cuts(t, s, items, n)))
            test_fail(__FILE__, __LINE__, "cut otherwise, script %lu says something else", (unsigned long)k);
        dsv3_reply_end(&states[n]);
        CHECK_EQ_STR(spelled_out(&bytewise), s->expected);
        for (size_t i = 0; i < n && states[i].opts.event_fn; i++) /* each token is told once, in order */
            n_put++;
        CHECK_EQ_UINT(bytewise.n_ids, n_put);
        for (size_t i = 0; i < bytewise.n_ids && i < n_put; i++)
            CHECK_EQ_INT(bytewise.ids[i], items[i] < 0 ? dsv3__chat_id(t, -1 - items[i]) : byte_id(t, items[i]));
        dsv3_tokenizer_close(t);
    }
}

static bool refuse(void *user, const dsv3_reply_event *event)
{
    (void)event;
    return --*(int *)user > 0;
}

TEST(reply_edges)
{
    static const char *const bad[] = {"", NULL, "0123456789012345678901234567890123456789012345678901234567890123"};
    dsv3_tokenizer *t = chat_tokenizer(true, NULL);
    dsv3_reply r;
    dsv3_reply_opts o;
    int left = 2;
    memset(&o, 0, sizeof o);
    CHECK_RESULT(dsv3_reply_init(&r, t, &o, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    o.event_fn = refuse;
    o.user = &left;
    CHECK_RESULT(dsv3_reply_init(&r, t, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_reply_init(NULL, t, &o, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_reply_init(&r, NULL, &o, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_reply_init(&r, t, &o, &e), DSV3_ERROR_TOKENIZER, e); /* no template, no markup named */
    CHECK(!dsv3_reply_put(&r, 5));
    o.markup = DSV3_MARKUP_V3;
    o.struct_size = 4;
    CHECK_RESULT(dsv3_reply_init(&r, t, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    o.struct_size = sizeof o;
    o.n_stop_strings = 1;
    CHECK_RESULT(dsv3_reply_init(&r, t, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    for (size_t i = 0; i < TEST_COUNT(bad); i++) {
        o.stop_strings = bad + i;
        CHECK_RESULT(dsv3_reply_init(&r, t, &o, &e), DSV3_ERROR_INVALID_OPTIONS, e);
    }
    o.n_stop_strings = 0;
    CHECK_OK(dsv3_reply_init(&r, t, &o, &e), e);
    CHECK(dsv3_reply_put(&r, byte_id(t, 'a')));
    CHECK(!dsv3_reply_put(&r, byte_id(t, 'b'))); /* the second event is refused */
    CHECK_EQ_INT(left, 0);
    CHECK(!dsv3_reply_put(&r, byte_id(t, 'c')));
    dsv3_reply_end(&r);
    CHECK_EQ_INT(left, 0);
    /* unknown ids are no text, but they are told; a name is cut where its room ends */
    script s = {"v3.1", 0, {0, 0}, "", ""};
    reply_begin(&r, t, &s, &uncut);
    CHECK(dsv3_reply_put(&r, 1 << 20));
    CHECK(dsv3_reply_put(&r, -7));
    CHECK_EQ_UINT(uncut.n_ids, 1);
    dsv3_reply_put(&r, dsv3__chat_id(t, DSV3__CHAT_CALL));
    for (int i = 0; i < 300; i++)
        dsv3_reply_put(&r, byte_id(t, 'n'));
    dsv3_reply_put(&r, dsv3__chat_id(t, DSV3__CHAT_SEP));
    CHECK_EQ_UINT(uncut.n, 256); /* one: it begins; 255 bytes */
    dsv3_reply_end(&r);
    dsv3_tokenizer_close(t);
}

// ---- Tools that must be called ------------------------------------------------------------------------------

static const char must_tools[] =
    "[{\"type\": \"function\", \"function\": {\"name\": \"add\", \"description\": \"Sums.\", \"parameters\": {\"type\": "
    "\"object\", \"properties\": {\"a\": {\"type\": \"number\", \"minimum\": -9}, \"b\": {\"type\": \"integer\"}}, "
    "\"required\": [\"a\", \"b\"], \"additionalProperties\": false}}}, "
    "{\"type\": \"function\", \"function\": {\"parameters\": {\"type\": \"object\", \"properties\": {\"text\": {\"type\": "
    "\"string\", \"maxLength\": 12}, \"kind\": {\"enum\": [\"<|im_end|>\", \"```\", \"\\n```\"]}, \"tags\": {\"items\": "
    "{\"$ref\": \"#/$defs/tag\"}, \"type\": \"array\", \"maxItems\": 3}}, \"required\": [\"text\", \"kind\"], \"$defs\": "
    "{\"tag\": {\"type\": \"string\", \"pattern\": \"^[`a-c]{1,4}$\"}}, \"additionalProperties\": false}, \"name\": \"find "
    "\\u00e9\"}}, "
    "{\"type\": \"function\", \"function\": {\"name\": \"list\", \"parameters\": {\"type\": \"object\", "
    "\"additionalProperties\": {\"type\": \"boolean\"}, \"minProperties\": 1, \"maxProperties\": 2, \"propertyNames\": "
    "{\"enum\": [\"x\", \"y\", \"z\"]}}}}, "
    "{\"type\": \"function\", \"function\": {\"name\": \"now\"}}, "
    "{\"type\": \"function\", \"function\": {\"name\": \"odd\", \"parameters\": {\"not\": {}}}}]";

typedef struct must_heard {
    char arguments[8192], name[64], id[64];
    size_t n, n_names, n_ids, n_other, n_ends;
} must_heard;

static bool must_hear(void *user, const dsv3_reply_event *event)
{
    must_heard *h = (must_heard *)user;
    switch (event->kind) {
    case DSV3_REPLY_CALL_ID:
        h->n_ids++;
        snprintf(h->id, sizeof h->id, "%.*s", (int)event->len, event->text);
        break;
    case DSV3_REPLY_CALL_NAME:
        if (!event->len) /* a token of it was read */
            break;
        h->n_names++;
        snprintf(h->name, sizeof h->name, "%.*s", (int)event->len, event->text);
        break;
    case DSV3_REPLY_CALL_ARGUMENTS:
        memcpy(h->arguments + h->n, event->text, event->len);
        h->n += event->len;
        break;
    case DSV3_REPLY_END: h->n_ends++; break;
    default: h->n_other++;
    }
    CHECK_EQ_UINT(event->call, 0);
    return true;
}

/* Ids at random where the grammar allows them, through the reply; false if they do not come to an end. */
static bool must_write(const dsv3_grammar *grammar, dsv3_reply *r, const dsv3_tokenizer *t, uint64_t *seed)
{
    uint32_t mask[32];
    dsv3_grammar_state s;
    dsv3_grammar_start(grammar, &s);
    for (int i = 0; i < 4000; i++) {
        *seed = *seed * 6364136223846793005ull + 1442695040888963407ull;
        int32_t id = (int32_t)((*seed >> 33) % t->n_tokens);
        dsv3_grammar_mask(grammar, &s, mask);
        while (!(mask[id / 32] >> (id % 32) & 1))
            id = (id + 1) % (int32_t)t->n_tokens;
        bool ends = id == t->eos;
        if (!CHECK(dsv3_grammar_accept(grammar, &s, id)) || !CHECK_EQ_INT(dsv3_reply_put(r, id), !ends))
            return false;
        if (ends)
            return true;
    }
    return false;
}

/* The whole conversation, with the call as it was heard, begins with the prompt and the arguments. */
static void must_begin(const dsv3_tokenizer *t, dsv3_message *c, dsv3_chat_opts *o, const dsv3_tool_call *call,
                       const must_heard *h)
{
    static char prompt[MAX_IDS];
    dsv3_tool_call made = *call;
    size_t n = out.len;
    memcpy(prompt, out.text, n);
    memcpy(prompt + n, h->arguments, h->n);
    made.arguments.p = h->arguments, made.arguments.len = h->n;
    say(&c[1], DSV3_ROLE_ASSISTANT, NULL);
    c[1].tool_calls = &made, c[1].n_tool_calls = 1;
    o->call = NULL;
    CHECK_OK(render(t, c, 2, o), e);
    CHECK(out.len > n + h->n && memcmp(out.text, prompt, n + h->n) == 0);
}

/* MUST_REPLIES: how many of each tool in each markup. */
TEST(must_call)
{
    static const char *const names[] = {"add", "find \xC3\xA9", "list"};
    static const dsv3_markup markups[] = {DSV3_MARKUP_V3, DSV3_MARKUP_R1, DSV3_MARKUP_R1_THINK, DSV3_MARKUP_V3_1,
                                          DSV3_MARKUP_V3_1, DSV3_MARKUP_KIMI_K2_THINKING};
    const char *many = getenv("MUST_REPLIES");
    size_t n_replies = many ? (size_t)strtoul(many, NULL, 10) : 60;
    uint64_t seed = 1;
    for (int with_think = 0; with_think < 2; with_think++) {
        dsv3_tokenizer *t = chat_tokenizer(with_think != 0, NULL);
        for (size_t k = 0; k < TEST_COUNT(names); k++) {
            dsv3_grammar *grammar = NULL;
            if (!CHECK_OK(dsv3_grammar_open_tool(&grammar, t, text_of(must_tools), text_of(names[k]), NULL, &e), e))
                continue;
            for (size_t m = 0; m < TEST_COUNT(markups) * n_replies; m++) {
                static must_heard h;
                dsv3_message c[2];
                dsv3_chat_opts o;
                dsv3_reply_opts how;
                dsv3_reply r;
                dsv3_tool_call call;
                memset(&h, 0, sizeof h);
                memset(&o, 0, sizeof o);
                memset(&how, 0, sizeof how);
                memset(&call, 0, sizeof call);
                call.name = text_of(names[k]);
                call.id = text_of("functions.f:0");
                say(&c[0], DSV3_ROLE_USER, "hello");
                size_t which = m % TEST_COUNT(markups);
                o.markup = how.markup = markups[which];
                o.thinking = how.thinking = which == 4;
                o.add_generation_prompt = true;
                o.call = how.call = &call;
                how.event_fn = must_hear, how.user = &h;
                CHECK_OK(render(t, c, 1, &o), e);
                CHECK_OK(dsv3_reply_init(&r, t, &how, &e), e);
                if (!CHECK(must_write(grammar, &r, t, &seed)))
                    continue;
                CHECK_EQ_UINT(h.n_ids, o.markup == DSV3_MARKUP_KIMI_K2_THINKING);
                CHECK(h.n_names == 1 && h.n_ends == 1 && h.n_other == 0);
                CHECK_EQ_STR(h.name, names[k]);
                dsv3_grammar_state s;
                dsv3_grammar_start(grammar, &s);
                CHECK(dsv3_grammar_accept_text(grammar, &s, h.arguments, h.n) && dsv3_grammar_can_end(grammar, &s));
                must_begin(t, c, &o, &call, &h);
            }
            dsv3_grammar_close(grammar);
        }
        dsv3_tokenizer_close(t);
    }
}

/* The prompt of a required call is where the conversation with that call goes through, whatever stands before it: the
   first call of a conversation, one behind a result, one of a later turn. One letter a message: u a s, c an assistant's
   call, C two of them, t a tool's result. */
TEST(must_call_again)
{
    static const char *const before[] = {"u",    "su",   "uct",     "ucts",  "uCtt",    "uctau", "uctasu",
                                         "uctu", "ut",   "uctauct", "uaucts",  "uctct", "uau"};
    static const dsv3_markup markups[] = {DSV3_MARKUP_V3,   DSV3_MARKUP_R1,   DSV3_MARKUP_R1_THINK,
                                          DSV3_MARKUP_V3_1, DSV3_MARKUP_V3_1, DSV3_MARKUP_KIMI_K2_THINKING};
    static char prompt[MAX_IDS];
    static int32_t ids[MAX_IDS];
    const bool real = published() != NULL;
    for (int which = 0; which < (real ? 4 : 2); which++) {
        dsv3_tokenizer *t = which < 2 ? chat_tokenizer(which != 0, NULL) : published_tokenizer(which == 3);
        for (size_t k = 0; k < TEST_COUNT(markups) * TEST_COUNT(before); k++) {
            dsv3_message c[MAX_MESSAGES];
            dsv3_tool_call calls[2], must;
            dsv3_chat_opts o;
            size_t n = 0;
            memset(&o, 0, sizeof o);
            memset(calls, 0, sizeof calls);
            o.markup = markups[k / TEST_COUNT(before)];
            o.thinking = k / TEST_COUNT(before) == 4;
            if (which >= 2 && o.markup == DSV3_MARKUP_KIMI_K2_THINKING)
                continue; /* not its tokenizer */
            for (int i = 0; i < 2; i++) {
                calls[i].id = text_of("functions.f:0");
                calls[i].name = text_of(i ? "f" : "get time");
                calls[i].arguments = text_of("{\"a\": 1}");
            }
            for (const char *a = before[k % TEST_COUNT(before)]; *a; a++, n++) {
                bool call = *a == 'c' || *a == 'C';
                say(&c[n],
                    *a == 'u'   ? DSV3_ROLE_USER
                    : *a == 's' ? DSV3_ROLE_SYSTEM
                    : *a == 't' ? DSV3_ROLE_TOOL
                                : DSV3_ROLE_ASSISTANT,
                    call ? NULL : *a == 's' ? "be" : "a word");
                c[n].tool_call_id = text_of("functions.f:0");
                c[n].tool_calls = call ? calls : NULL;
                c[n].n_tool_calls = *a == 'C' ? 2 : call;
            }
            must = calls[0];
            o.call = &must;
            o.add_generation_prompt = true;
            if (!CHECK_OK(render(t, c, n, &o), e))
                continue;
            size_t len = out.len, n_ids = out.n;
            memcpy(prompt, out.text, len);
            memcpy(ids, out.ids, n_ids * sizeof *ids);
            say(&c[n], DSV3_ROLE_ASSISTANT, NULL);
            c[n].tool_calls = &must, c[n].n_tool_calls = 1;
            o.call = NULL;
            CHECK_OK(render(t, c, n + 1, &o), e);
            bool begins = out.len > len && memcmp(out.text, prompt, len) == 0;
            if (!CHECK(begins && memcmp(out.text + len, "{\"a\": 1}", 8) == 0))
                printf("%s after \"%s\": %.*s\n  but then %.*s\n", dsv3_markup_name(o.markup),
                       before[k % TEST_COUNT(before)], (int)len, prompt, (int)out.len, out.text);
            CHECK(out.n > n_ids && memcmp(out.ids, ids, n_ids * sizeof *ids) == 0);
        }
        if (which < 2)
            dsv3_tokenizer_close(t);
    }
}

/* Any of the tools: a name, and arguments that fit that one; the conversation with the call goes through all of it. */
TEST(must_choose)
{
    static const char *const names[] = {"add", "find \xC3\xA9", "list"};
    static const dsv3_markup markups[] = {DSV3_MARKUP_V3, DSV3_MARKUP_R1, DSV3_MARKUP_R1_THINK, DSV3_MARKUP_V3_1,
                                          DSV3_MARKUP_KIMI_K2_THINKING};
    static char list[sizeof must_tools];
    static char prompt[MAX_IDS];
    static must_heard h;
    const char *many = getenv("MUST_REPLIES");
    size_t n_replies = many ? (size_t)strtoul(many, NULL, 10) : 60;
    uint64_t seed = 1, chosen[3] = {0, 0, 0};
    snprintf(list, sizeof list, "%.*s]", (int)(strstr(must_tools, ", {\"type\": \"function\", \"function\": {\"name\": \"now\"") - must_tools),
             must_tools);
    for (int with_think = 0; with_think < 2; with_think++) {
        dsv3_tokenizer *t = chat_tokenizer(with_think != 0, NULL);
        dsv3_grammar *own[3] = {NULL, NULL, NULL};
        for (size_t k = 0; k < 3; k++)
            CHECK_OK(dsv3_grammar_open_tool(&own[k], t, text_of(list), text_of(names[k]), NULL, &e), e);
        for (size_t m = 0; m < TEST_COUNT(markups); m++) {
            dsv3_grammar *grammar = NULL;
            if (!CHECK_OK(dsv3_grammar_open_tools(&grammar, t, text_of(list), markups[m], NULL, &e), e))
                continue;
            for (size_t i = 0; i < n_replies; i++) {
                dsv3_message c[2];
                dsv3_chat_opts o;
                dsv3_reply_opts how;
                dsv3_reply r;
                dsv3_tool_call call;
                size_t k = 0, n;
                memset(&h, 0, sizeof h), memset(&o, 0, sizeof o);
                memset(&how, 0, sizeof how), memset(&call, 0, sizeof call);
                say(&c[0], DSV3_ROLE_USER, "hello");
                o.markup = how.markup = markups[m];
                o.add_generation_prompt = true;
                o.call = how.call = &call;
                how.event_fn = must_hear, how.user = &h;
                CHECK_OK(render(t, c, 1, &o), e);
                n = out.len;
                memcpy(prompt, out.text, n);
                CHECK_OK(dsv3_reply_init(&r, t, &how, &e), e);
                if (!CHECK(must_write(grammar, &r, t, &seed)))
                    continue;
                while (k < 2 && strcmp(h.name, names[k]) != 0)
                    k++;
                CHECK_EQ_STR(h.name, names[k]);
                chosen[k]++;
                CHECK(h.n_names == 1 && h.n_ends == 1 && h.n_other == 0);
                CHECK_EQ_UINT(h.n_ids, o.markup == DSV3_MARKUP_KIMI_K2_THINKING);
                dsv3_grammar_state s;
                dsv3_grammar_start(own[k], &s);
                CHECK(dsv3_grammar_accept_text(own[k], &s, h.arguments, h.n) && dsv3_grammar_can_end(own[k], &s));
                call.name = text_of(h.name), call.id = text_of(h.id);
                call.arguments.p = h.arguments, call.arguments.len = h.n;
                say(&c[1], DSV3_ROLE_ASSISTANT, NULL);
                c[1].tool_calls = &call, c[1].n_tool_calls = 1;
                o.call = NULL;
                CHECK_OK(render(t, c, 2, &o), e);
                const char *said = h.n_ids ? h.id : h.name;
                CHECK(out.len > n + strlen(said) && memcmp(out.text, prompt, n) == 0 &&
                      memcmp(out.text + n, said, strlen(said)) == 0);
            }
            dsv3_grammar_close(grammar);
        }
        for (size_t k = 0; k < 3; k++)
            dsv3_grammar_close(own[k]);
        dsv3_tokenizer_close(t);
    }
    CHECK(chosen[0] > 5 && chosen[1] > 5 && chosen[2] > 5);
}

/* Masks of the head and of what follows are what trying each token gives; what is no list of tools is refused. */
TEST(must_choose_edges)
{
    dsv3_tokenizer *t = chat_tokenizer(true, CHAT_GIGA_TEMPLATE);
    dsv3_grammar *grammar = NULL;
    dsv3_text tools = text_of("[{\"function\": {\"name\": \"a\"}}, {\"function\": {\"name\": \"ab\", \"parameters\": "
                              "{\"$ref\": \"#/$defs/x\", \"$defs\": {\"x\": {\"type\": \"object\", \"properties\": {\"v\": "
                              "{\"$ref\": \"#\"}}, \"additionalProperties\": false}}}}}]");
    static const dsv3_markup markups[] = {DSV3_MARKUP_V3, DSV3_MARKUP_V3_1, DSV3_MARKUP_KIMI_K2_THINKING};
    for (size_t m = 0; m < TEST_COUNT(markups); m++) {
        if (!CHECK_OK(dsv3_grammar_open_tools(&grammar, t, tools, markups[m], NULL, &e), e))
            continue;
        for (uint64_t seed = 1; seed < 60; seed++) {
            dsv3_grammar_state s, copy;
            uint32_t mask[32];
            dsv3_grammar_start(grammar, &s);
            for (uint64_t i = 0, random = seed * 7919; i < 40 && s.place != DSV3__GRAM_AT_EOS; i++) {
                int32_t next = -1;
                dsv3_grammar_mask(grammar, &s, mask);
                for (int32_t id = 0; id < (int32_t)t->n_tokens; id++) {
                    copy = s;
                    bool ok = dsv3_grammar_accept(grammar, &copy, id);
                    if (!CHECK_EQ_INT(ok, mask[id / 32] >> (id % 32) & 1))
                        break;
                    random = random * 6364136223846793005ull + 1442695040888963407ull;
                    next = ok && (next < 0 || random >> 62 == 0) ? id : next;
                }
                if (!CHECK(next >= 0) || !CHECK(dsv3_grammar_accept(grammar, &s, next)))
                    break;
            }
        }
        dsv3_grammar_close(grammar);
    }
    for (uint64_t n = 1, last = 0; !last; n++) { /* each allocation fails once; all blocks come back */
        tiny_heap heap;
        dsv3_grammar_opts o;
        memset(&heap, 0, sizeof heap), memset(&o, 0, sizeof o);
        heap.fail_at = n;
        o.allocator = tiny_allocator(&heap);
        dsv3_result r = dsv3_grammar_open_tools(&grammar, t, tools, markups[n % TEST_COUNT(markups)], &o, &e);
        last = heap.n_allocs < n;
        CHECK_RESULT(r, last ? DSV3_OK : DSV3_ERROR_OUT_OF_MEMORY, e);
        CHECK((grammar != NULL) == last && n < 1000 && (n > 20 || !last));
        dsv3_grammar_close(grammar);
        CHECK_EQ_UINT(heap.live_bytes + heap.n_damaged, 0);
    }
    static const struct {
        const char *tools, *word;
    } bad[] = {{"{}", "list of tools"}, {"[]", "list of tools"}, {"[1]", "/0: expected a function"},
               {"[{\"function\": {\"name\": \"\"}}]", "/0: expected a function"},
               {"[{\"function\": {\"name\": \"a:b\"}}]", "no colon"},
               {"[{\"function\": {\"name\": \"a\\nb\"}}]", "no newline"},
               {"[{\"function\": {\"name\": \"a\"}}, {\"function\": {\"name\": \"\\u0061\"}}]", "/1: a name that another"},
               {"[{\"function\": {\"name\": \"a\", \"parameters\": false}}]", "no value can fit"},
               {"[{\"function\": {\"name\": \"a\", \"name\": \"b\"}}]", "/0/function/name: a key that stands there twice"},
               {"[{\"function\": {\"name\": \"a\"}}, {\"function\": {\"name\": \"b\", \"parameters\": {\"minItems\": 1, \"items\": "
                "false, \"type\": \"array\"}}}]", "no value can fit"},
               {"[{\"function\": {\"name\": \"a\", \"parameters\": {\"$ref\": \"#/0\"}}}]", "what is not there"},
               {"[{\"function\": {\"name\": \"a\", \"parameters\": {\"not\": {}}}}]", "/0/function/parameters/not"}};
    for (size_t i = 0; i < TEST_COUNT(bad); i++)
        for (size_t m = 0; m < TEST_COUNT(markups); m++) {
            CHECK_RESULT(dsv3_grammar_open_tools(&grammar, t, text_of(bad[i].tools), markups[m], NULL, &e), DSV3_ERROR_SCHEMA, e);
            CHECK_CONTAINS(e.message, bad[i].word);
            CHECK(grammar == NULL);
        }
    CHECK_RESULT(dsv3_grammar_open_tools(&grammar, t, text_of("["), DSV3_MARKUP_V3, NULL, &e), DSV3_ERROR_JSON, e);
    CHECK_RESULT(dsv3_grammar_open_tools(&grammar, t, text_of("[{\"function\": {\"name\": \"\xFF\"}}]"), DSV3_MARKUP_V3, NULL, &e),
                 DSV3_ERROR_JSON, e);
    CHECK_RESULT(dsv3_grammar_open_tools(&grammar, t, tools, DSV3_MARKUP_KIMI_K2, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_grammar_open_tools(&grammar, t, tools, DSV3_MARKUP_AUTO, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "gigachat3");
    CHECK_RESULT(dsv3_grammar_open_tools(NULL, t, tools, DSV3_MARKUP_V3, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    dsv3_tokenizer_close(t);
}

TEST(must_call_edges)
{
    dsv3_tokenizer *t = chat_tokenizer(true, CHAT_GIGA_TEMPLATE);
    dsv3_grammar *grammar = NULL;
    dsv3_grammar_state s;
    dsv3_message c[4];
    dsv3_chat_opts o;
    dsv3_reply_opts how;
    dsv3_reply r;
    dsv3_tool_call call;
    must_heard h;
    memset(&o, 0, sizeof o);
    memset(&how, 0, sizeof how);
    memset(&call, 0, sizeof call);
    memset(&h, 0, sizeof h);
    say(&c[0], DSV3_ROLE_USER, "x");
    o.call = &call;
    o.markup = DSV3_MARKUP_V3_1;
    o.add_generation_prompt = true;
    call.id = text_of("functions.f:0");
    CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "expected a name of");
    memset(&call, 0, sizeof call);
    call.name = text_of("f");
    CHECK_OK(render(t, c, 1, &o), e);
    o.markup = DSV3_MARKUP_KIMI_K2_THINKING;
    CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "a name and an id");
    call.id = text_of("functions.f:0");
    CHECK_OK(render(t, c, 1, &o), e);
    static const dsv3_markup none[] = {DSV3_MARKUP_KIMI_K2, DSV3_MARKUP_GIGACHAT3};
    for (size_t i = 0; i < TEST_COUNT(none); i++) {
        o.markup = how.markup = none[i];
        how.event_fn = must_hear, how.user = &h, how.call = &call;
        CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
        CHECK_CONTAINS(e.message, dsv3_markup_name(none[i]));
        CHECK_RESULT(dsv3_reply_init(&r, t, &how, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    }
    CHECK_EQ_UINT(h.n_names, 0);
    o.markup = DSV3_MARKUP_V3;
    o.add_generation_prompt = false;
    CHECK_RESULT(render(t, c, 1, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    o.add_generation_prompt = true;
    CHECK_RESULT(render(t, c, 0, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    say(&c[1], DSV3_ROLE_ASSISTANT, "y");
    CHECK_RESULT(render(t, c, 2, &o), DSV3_ERROR_INVALID_ARGUMENT, e);
    say(&c[2], DSV3_ROLE_TOOL, "z"); /* behind a result there is no new turn */
    say(&c[3], DSV3_ROLE_SYSTEM, "w");
    CHECK_OK(render(t, c, 4, &o), e);
    CHECK(out.len > 10 && memcmp(out.text + out.len - 10, "f\n```json\n", 10) == 0);

    /* Without a grammar a model may close the call and make another. */
    static transcript heard;
    memset(&heard, 0, sizeof heard);
    how.markup = DSV3_MARKUP_V3_1;
    how.event_fn = write_down, how.user = &heard;
    CHECK_OK(dsv3_reply_init(&r, t, &how, &e), e);
    const int more[] = {DSV3__CHAT_CALL_END, DSV3__CHAT_CALL, DSV3__CHAT_SEP, DSV3__CHAT_CALL_END, DSV3__CHAT_CALLS_END};
    CHECK(dsv3_reply_put(&r, t->bpe.ids['1']));
    for (size_t i = 0; i < TEST_COUNT(more); i++)
        CHECK(dsv3_reply_put(&r, dsv3__chat_id(t, more[i])) &&
              (more[i] != DSV3__CHAT_CALL || dsv3_reply_put(&r, t->bpe.ids['g'])));
    dsv3_reply_end(&r);
    CHECK_EQ_STR(spelled_out(&heard), "N0[f]G0[1]N1[g]E");

    dsv3_text tools = text_of(must_tools), none_there = {NULL, 0};
    CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, tools, text_of("sub"), NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_CONTAINS(e.message, "no tool has the name \"sub\"");
    CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, tools, text_of("odd"), NULL, &e), DSV3_ERROR_SCHEMA, e);
    CHECK_CONTAINS(e.message, "not");
    CHECK(grammar == NULL);
    CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, none_there, text_of("add"), NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, tools, none_there, NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    CHECK_RESULT(dsv3_grammar_open_tool(NULL, t, tools, text_of("add"), NULL, &e), DSV3_ERROR_INVALID_ARGUMENT, e);
    static const char *const bad[] = {"{}", "[", "[{\"function\": {\"name\": \"f\", \"parameters\": {]}}]", "[] x"};
    for (size_t i = 0; i < TEST_COUNT(bad); i++)
        CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, text_of(bad[i]), text_of("f"), NULL, &e), DSV3_ERROR_JSON, e);
    static char name[257], escaped[64 + 6 * 256];
    for (size_t n = 254; n <= 256; n++) { /* the longest names, each letter as \u0061 */
        size_t at = (size_t)snprintf(escaped, sizeof escaped, "[{\"function\": {\"name\": \"");
        for (size_t i = 0; i < n; i++)
            name[i] = 'a', at += (size_t)snprintf(escaped + at, sizeof escaped - at, "\\u0061");
        snprintf(escaped + at, sizeof escaped - at, "\"}}]");
        CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, text_of(escaped), text_of(name), NULL, &e),
                     n > 255 ? DSV3_ERROR_INVALID_ARGUMENT : DSV3_OK, e);
        dsv3_grammar_close(grammar);
        name[253] = 0;
        CHECK_RESULT(dsv3_grammar_open_tool(&grammar, t, text_of(escaped), text_of(name), NULL, &e),
                     DSV3_ERROR_INVALID_ARGUMENT, e);
        CHECK_CONTAINS(e.message, "no tool has the name");
    }
    CHECK_OK(dsv3_grammar_open_tool(&grammar, t, tools, text_of("now"), NULL, &e), e);
    dsv3_grammar_start(grammar, &s);
    CHECK(!dsv3_grammar_accept_text(grammar, &s, "[", 1));
    CHECK(dsv3_grammar_accept_text(grammar, &s, "{}", 2) && dsv3_grammar_can_end(grammar, &s));
    dsv3_grammar_close(grammar);
    dsv3_tokenizer_close(t);
}

TEST_MAIN(RUN(goldens), RUN(templates_recognised), RUN(recognition), RUN(where_templates_stand), RUN(small_goldens), RUN(posing_small), RUN(posing_published),
          RUN(a_prefix_stays), RUN(gigachat), RUN(kimi_system), RUN(one_system), RUN(tools), RUN(errors), RUN(no_memory),
          RUN(replies), RUN(reply_edges), RUN(must_call), RUN(must_call_again), RUN(must_choose), RUN(must_choose_edges), RUN(must_call_edges))
