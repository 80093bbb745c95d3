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
    CHECK(!"a markup");
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
        {"<|im_user|>user<|im_middle|> <think>", "kimi-k2-thinking"},
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

TEST_MAIN(RUN(goldens), RUN(templates_recognised), RUN(recognition), RUN(small_goldens), RUN(posing_small), RUN(posing_published),
          RUN(a_prefix_stays), RUN(gigachat), RUN(kimi_system), RUN(tools), RUN(errors), RUN(no_memory))
