/* dsv3 chat: a conversation at the terminal. Included once, by dsv3.c, behind render.h (whose form its files have).

   Each turn renders the whole conversation, keeps of the session what is the same from its beginning, and appends the
   rest: a turn, /undo and /retry cost what is new in them.

   Line editing and history come with GNU Readline, if it is asked for:
     make CFLAGS='-O2 -DDSV3_READLINE' LDFLAGS=-lreadline */
#ifndef DSV3_CHAT_TUI_H
#define DSV3_CHAT_TUI_H

#ifndef _WIN32
#include <termios.h>
#endif
#ifdef DSV3_READLINE
#include <readline/history.h>
#include <readline/readline.h>
#endif

static const char chat_help[] =
    "dsv3 chat DIR                a conversation; without a terminal, each line of stdin is a message\n"
    "\n"
    "  --system TEXT|@FILE      what the model is told first\n"
    "  --think, --no-think      with reasoning or without, where the checkpoint can do both (V3.1)\n"
    "  --session FILE           goes on with the conversation in FILE, and keeps it there\n"
    "  --markup NAME            auto (as the checkpoint's chat template says), v3, r1, r1-think, v3.1, kimi-k2,\n"
    "                           kimi-k2-thinking, gigachat3\n"
    "  -n N                     tokens of an answer at most (default: until it ends)\n"
    "  --context N              room for the conversation (default: 4096, or the checkpoint's own if less)\n"
    "  --temp T, --top-k K, --top-p P, --min-p P, --greedy, --seed N, --threads N, --isa NAME, --compute MODE,\n"
    "  --read-ahead, --draft N, --drafter WHO\n"
    "                           as 'dsv3 generate -h' tells\n"
    "\n"
    "Ctrl-C stops an answer, Ctrl-D ends the program. A line that ends in \\ goes on in the next; pasted lines are "
    "one\n"
    "message. /help lists the commands. Reasoning is dimmed; where stdout is no terminal it is left out.\n";

static const char chat_commands[] = "/new            begins anew, the system message stays\n"
                                    "/undo           takes the last question and its answer back\n"
                                    "/retry          another answer to the last question\n"
                                    "/system [TEXT]  sets the system message, or takes it away\n"
                                    "/save FILE      writes the conversation as JSON ('dsv3 render' reads it)\n"
                                    "/load FILE      goes on with such a file\n"
                                    "/stats          context, speed\n"
                                    "/quit           ends, as Ctrl-D does\n";

typedef struct turn {
    dsv3_role role;
    bytes content, reasoning;
} turn;

typedef struct chat {
    const dsv3_tokenizer *tokenizer;
    dsv3_session *session;
    dsv3_chat_opts opts;
    dsv3_generate_opts generate;
    uint32_t context; /* tokens of room */
    turn *turns;      /* [n]; the first may be the system message */
    size_t n, cap;
    turn *answer;              /* the one that is being written */
    bool screen;               /* stdout is a terminal */
    bool dimmed;               /* and writes in grey now */
    char last;                 /* byte printed */
    uint64_t reused, rendered; /* tokens of the last prompt: kept from before, in all */
    dsv3_stats stats;
} chat;

static volatile sig_atomic_t chat_stop;     /* Ctrl-C */
static dsv3_session *volatile chat_running; /* what it cancels */

static void chat_interrupt(int signal_number)
{
    (void)signal_number;
    chat_stop = 1;
    if (chat_running)
        dsv3_session_cancel(chat_running);
#ifdef _WIN32
    signal(signal_number, chat_interrupt);
#endif
}

/* Reading a line must come back after Ctrl-C. */
static void chat_catch(void)
{
#ifdef _WIN32
    signal(SIGINT, chat_interrupt);
#else
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = chat_interrupt;
    sigaction(SIGINT, &action, NULL);
#endif
}

// ---- Turns -----------------------------------------------------------------------------------------------

static turn *turn_add(chat *c, dsv3_role role, const char *p, size_t n)
{
    if (c->n == c->cap)
        c->turns = (turn *)grow(c->turns, c->cap = c->cap ? 2 * c->cap : 16, sizeof *c->turns);
    turn *t = &c->turns[c->n++];
    memset(t, 0, sizeof *t);
    t->role = role;
    bytes_room(&t->content, 1);
    bytes_add(&t->content, p, n);
    return t;
}

static void turn_drop(chat *c)
{
    c->n--;
    free(c->turns[c->n].content.p), free(c->turns[c->n].reasoning.p);
}

static size_t first_turn(const chat *c)
{
    return c->n && c->turns[0].role == DSV3_ROLE_SYSTEM ? 1 : 0;
}

static void chat_clear(chat *c, size_t from)
{
    while (c->n > from)
        turn_drop(c);
}

static void chat_system(chat *c, const char *p, size_t n)
{
    if (first_turn(c)) {
        free(c->turns[0].content.p), free(c->turns[0].reasoning.p);
        memmove(c->turns, c->turns + 1, --c->n * sizeof *c->turns);
    }
    if (!n)
        return;
    turn t = *turn_add(c, DSV3_ROLE_SYSTEM, p, n);
    memmove(c->turns + 1, c->turns, (c->n - 1) * sizeof *c->turns);
    c->turns[0] = t;
}

// ---- Files -----------------------------------------------------------------------------------------------

static bool chat_save(const chat *c, const char *path)
{
    static const char *const roles[] = {"system", "user", "assistant", "tool"};
    bytes out = {NULL, 0, 0};
    FILE *f = fopen(path, "wb");
    if (!f) {
        fprintf(stderr, "dsv3: %s: %s\n", path, strerror(errno));
        return false;
    }
    bytes_format(&out, "{\"messages\":[");
    for (size_t i = 0; i < c->n; i++) {
        const turn *t = &c->turns[i];
        bytes_format(&out, "%s{\"role\":\"%s\",\"content\":", i ? ",\n" : "\n", roles[t->role]);
        json_text(&out, t->content.p, t->content.n);
        if (t->reasoning.n) {
            bytes_format(&out, ",\"reasoning_content\":");
            json_text(&out, t->reasoning.p, t->reasoning.n);
        }
        bytes_add(&out, "}", 1);
    }
    bytes_format(&out, "\n]}\n");
    bool good = fwrite(out.p, 1, out.n, f) == out.n;
    good = fclose(f) == 0 && good;
    if (!good)
        fprintf(stderr, "dsv3: %s: cannot write: %s\n", path, strerror(errno));
    free(out.p);
    return good;
}

/* On failure the conversation stays what it was. */
static bool chat_load(chat *c, const char *path)
{
    conversation from;
    FILE *f = fopen(path, "rb");
    if (!f) {
        fprintf(stderr, "dsv3: %s: %s\n", path, strerror(errno));
        return false;
    }
    bytes text = {NULL, 0, 0};
    for (size_t n = 1; n;)
        text.n += n = fread(bytes_room(&text, 65536), 1, 65536, f);
    bool unread = ferror(f) != 0;
    fclose(f);
    json j = {text.p, text.p, text.p + text.n, NULL, 0};
    memset(&from, 0, sizeof from);
    if (unread)
        j.error = "cannot be read", j.error_at = 0;
    else if (conversation_read(&from, &j) && from.n_calls)
        j.error = "the messages have tool calls, which a conversation here has not", j.error_at = 0;
    if (j.error)
        fprintf(stderr, "dsv3: %s: byte %" PRIu64 ": %s\n", path, (uint64_t)j.error_at, j.error);
    else
        chat_clear(c, 0);
    for (size_t i = 0; i < from.n && !j.error; i++) {
        const dsv3_message *m = &from.messages[i];
        turn *t = turn_add(c, m->role, m->content.p, m->content.len);
        bytes_add(&t->reasoning, m->reasoning.p, m->reasoning.len);
    }
    free(from.messages), free(from.calls), free(from.pool.p), free(from.key.p), free(text.p);
    return !j.error;
}

// ---- The screen ------------------------------------------------------------------------------------------

static void chat_dim(chat *c, bool dim)
{
    if (c->screen && dim != c->dimmed)
        fputs(dim ? "\033[2m" : "\033[0m", stdout);
    c->dimmed = dim;
}

/* A model's text must not steer the terminal: control characters are shown as '?'. */
static void chat_print(chat *c, const char *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char b = (unsigned char)p[i];
        bool c1 = b == 0xC2 && i + 1 < n && (unsigned char)p[i + 1] < 0xA0; /* U+0080 ... U+009F */
        bool control = (b < 0x20 && b != '\n' && b != '\t') || b == 0x7F || c1;
        fputc(c->screen && control ? '?' : b, stdout);
        i += c->screen && c1;
    }
    if (n)
        c->last = p[n - 1];
}

static void chat_line_end(chat *c)
{
    if (c->last != '\n')
        fputc('\n', stdout);
    c->last = '\n';
}

static bool chat_event(void *user, const dsv3_reply_event *event)
{
    chat *c = (chat *)user;
    turn *t = c->answer;
    bar_clear();
    if (!event->len)
        return true;
    switch (event->kind) {
    case DSV3_REPLY_REASONING:
        bytes_add(&t->reasoning, event->text, event->len);
        if (!c->screen)
            return true;
        break;
    case DSV3_REPLY_ANSWER:
        if (!t->content.n && t->reasoning.n && c->screen) {
            chat_line_end(c);
            fputc('\n', stdout);
        }
        bytes_add(&t->content, event->text, event->len);
        break;
    case DSV3_REPLY_CALL_NAME:
        chat_line_end(c);
        chat_print(c, "calls ", 6);
        break;
    default: break;
    }
    chat_dim(c, event->kind != DSV3_REPLY_ANSWER);
    chat_print(c, event->text, event->len);
    if (event->kind == DSV3_REPLY_CALL_NAME)
        chat_print(c, " ", 1);
    fflush(stdout);
    return true;
}

static void chat_status(const chat *c)
{
    if (on_terminal)
        fprintf(stderr, "\033[2m[%" PRIu64 " tokens, %.1f a second; context %" PRIu64 " of %" PRIu32 "%s]\033[0m\n",
                c->stats.n_generated, rate(c->stats.n_generated, c->stats.decode_seconds),
                (uint64_t)dsv3_session_length(c->session), c->context,
                c->stats.stop == DSV3_STOP_CANCELLED    ? "; stopped"
                : c->stats.stop == DSV3_STOP_CONTEXT    ? ", which is full: /new, /undo, or --context N"
                : c->stats.stop == DSV3_STOP_MAX_TOKENS ? "; cut by -n"
                                                        : "");
}

// ---- An answer -------------------------------------------------------------------------------------------

static bool chat_token(void *user, const dsv3_token *token)
{
    return token->id < 0 || dsv3_reply_put((dsv3_reply *)user, token->id);
}

static dsv3_result chat_render(const chat *c, ids *list, dsv3_error *error)
{
    dsv3_message *messages = (dsv3_message *)grow(NULL, c->n + 1, sizeof *messages);
    dsv3_result r = DSV3_ERROR_BUFFER_TOO_SMALL;
    memset(messages, 0, (c->n + 1) * sizeof *messages);
    for (size_t i = 0; i < c->n; i++) {
        messages[i].role = c->turns[i].role;
        messages[i].content.p = c->turns[i].content.p, messages[i].content.len = c->turns[i].content.n;
        messages[i].reasoning.p = c->turns[i].reasoning.p, messages[i].reasoning.len = c->turns[i].reasoning.n;
    }
    for (size_t room = 1024; r == DSV3_ERROR_BUFFER_TOO_SMALL; room = list->n) {
        ids_room(list, room);
        r = dsv3_chat_render(c->tokenizer, messages, c->n, &c->opts, list->p, list->cap, &list->n, error);
    }
    free(messages);
    return r;
}

/* Makes the session hold these ids: what it has of them from the beginning stays. */
static dsv3_result chat_append(chat *c, const ids *list, dsv3_error *error)
{
    const int32_t *held = dsv3_session_tokens(c->session);
    size_t same = 0, n = dsv3_session_length(c->session);
    while (same < n && same < list->n && held[same] == list->p[same])
        same++;
    c->reused = same, c->rendered = list->n;
    dsv3_result r = same < n ? dsv3_session_rewind(c->session, same, error) : DSV3_OK;
    if (!r && same < list->n)
        r = dsv3_session_append(c->session, list->p + same, list->n - same, NULL, error);
    return r;
}

/* Lets the model answer. If nothing came, the conversation is as it was. */
static bool chat_answer(chat *c)
{
    ids list = {NULL, 0, 0};
    dsv3_error error;
    dsv3_reply reply;
    dsv3_reply_opts how;
    memset(&how, 0, sizeof how);
    memset(&c->stats, 0, sizeof c->stats);
    how.markup = c->opts.markup;
    how.thinking = c->opts.thinking;
    how.event_fn = chat_event;
    how.user = c;
    check(dsv3_reply_init(&reply, c->tokenizer, &how, &error), &error);
    dsv3_result r = chat_render(c, &list, &error);
    chat_stop = 0;
    chat_running = c->session;
    if (!r)
        r = chat_append(c, &list, &error);
    c->answer = turn_add(c, DSV3_ROLE_ASSISTANT, NULL, 0);
    c->generate.token_fn = chat_token, c->generate.user = &reply;
    c->last = '\n';
    if (!r)
        r = dsv3_generate(c->session, NULL, 0, &c->generate, &c->stats, &error);
    chat_running = NULL;
    dsv3_reply_end(&reply);
    free(list.p);
    bar_clear();
    chat_dim(c, false);
    chat_line_end(c);
    fflush(stdout);
    if (r == DSV3_ERROR_CANCELLED)
        c->stats.stop = DSV3_STOP_CANCELLED;
    bool any = c->answer->content.n || c->answer->reasoning.n;
    if (r && r != DSV3_ERROR_CANCELLED)
        fprintf(stderr, "dsv3: %s%s\n", error.message,
                r == DSV3_ERROR_CONTEXT_FULL ? " (/undo, /new, or --context N makes room)" : "");
    else
        chat_status(c);
    if (!any)
        turn_drop(c);
    if (!any && !r)
        fputs("(no answer)\n", stderr);
    return any;
}

static void chat_ask(chat *c, const char *p, size_t n)
{
    turn_add(c, DSV3_ROLE_USER, p, n);
    if (!chat_answer(c))
        turn_drop(c);
}

static void chat_retry(chat *c)
{
    if (c->n > first_turn(c) && c->turns[c->n - 1].role == DSV3_ROLE_ASSISTANT)
        turn_drop(c);
    if (c->n == first_turn(c)) {
        fputs("there is no question yet\n", stderr);
        return;
    }
    c->generate.sample.seed++;
    chat_answer(c);
}

static void chat_undo(chat *c)
{
    if (c->n == first_turn(c)) {
        fputs("there is nothing to take back\n", stderr);
        return;
    }
    while (c->n > first_turn(c) && c->turns[c->n - 1].role != DSV3_ROLE_USER)
        turn_drop(c);
    if (c->n > first_turn(c))
        turn_drop(c);
    fprintf(stderr, "taken back; %" PRIu64 " messages are left\n", (uint64_t)c->n);
}

static void chat_show(const chat *c)
{
    fprintf(stderr, "messages   %" PRIu64 "%s\n", (uint64_t)c->n, first_turn(c) ? ", a system message first" : "");
    fprintf(stderr, "markup     %s%s\n", dsv3_markup_name(c->opts.markup), c->opts.thinking ? ", with reasoning" : "");
    fprintf(stderr, "context    %" PRIu64 " of %" PRIu32 " tokens\n", (uint64_t)dsv3_session_length(c->session),
            c->context);
    if (!c->rendered)
        return;
    fprintf(stderr, "last       prompt of %" PRIu64 " tokens, %" PRIu64 " of them there before\n", c->rendered,
            c->reused);
    fprintf(stderr, "           answer of %" PRIu64 " tokens, %.1f a second, ended by %s, seed %" PRIu64 "\n",
            c->stats.n_generated, rate(c->stats.n_generated, c->stats.decode_seconds), stop_name(c->stats.stop),
            c->generate.sample.seed);
}

// ---- Input -----------------------------------------------------------------------------------------------

/* One line without its end. False at the end of input; *stopped: Ctrl-C instead of a line. */
static bool chat_line(bytes *line, const char *prompt, bool *stopped)
{
    line->n = 0;
    *stopped = false;
#ifdef DSV3_READLINE
    if (*prompt) {
        char *s = readline(prompt);
        if (!s)
            return false;
        bytes_add(line, s, strlen(s));
        free(s);
        return true;
    }
#endif
    fputs(prompt, stdout);
    fflush(stdout);
    for (;;) {
        int byte = getc(stdin);
        if (byte == '\n') {
            if (*prompt && line->n == 4095) /* what a terminal takes of a line */
                fputs("dsv3: the terminal has cut this line at 4,095 bytes; 'dsv3 chat' built with Readline has no "
                      "limit\n",
                      stderr);
            return true;
        }
        if (byte == EOF && ferror(stdin) && chat_stop) { /* Ctrl-C came while waiting */
            clearerr(stdin);
            *stopped = true;
            return true;
        }
        if (byte == EOF)
            return line->n > 0;
        *bytes_room(line, 1) = (char)byte, line->n++;
    }
}

/* Takes `mark` out of the line; was it there? */
static bool chat_cut(bytes *line, const char *mark)
{
    size_t n = strlen(mark);
    for (size_t i = 0; i + n <= line->n; i++)
        if (memcmp(line->p + i, mark, n) == 0) {
            memmove(line->p + i, line->p + i + n, line->n - i - n);
            line->n -= n;
            return true;
        }
    return false;
}

/* A message: a line, or several: pasted between the marks that a terminal puts around them, or each but the last ending
   in a backslash. False at the end of input. */
static bool chat_message(bytes *message, bytes *line, bool prompts)
{
    bool stopped, pasting = false, more = true;
    message->n = 0;
    for (const char *prompt = "> "; more; prompt = "  ") {
        chat_stop = 0;
        if (!chat_line(line, !prompts || pasting ? "" : prompt, &stopped))
            return message->n > 0;
        if (stopped) {
            fputs("\n(Ctrl-D or /quit ends)\n", stderr);
            message->n = 0;
            return true;
        }
        pasting = chat_cut(line, "\033[200~") || pasting;
        pasting = !chat_cut(line, "\033[201~") && pasting;
        more = pasting || (line->n && line->p[line->n - 1] == '\\');
        if (more && !pasting)
            line->p[line->n - 1] = '\n';
        else if (more)
            bytes_add(line, "\n", 1);
        bytes_add(message, line->p, line->n);
    }
    return true;
}

#if !defined(_WIN32) && !defined(DSV3_READLINE)
static struct termios chat_terminal; /* as it was */

static void chat_restore(void)
{
    fputs("\033[?2004l", stdout);
    fflush(stdout);
    tcsetattr(fileno(stdin), TCSANOW, &chat_terminal);
}
#endif

/* Asks the terminal to mark what is pasted, and not to show such marks. */
static void chat_prepare(void)
{
#if !defined(_WIN32) && !defined(DSV3_READLINE)
    struct termios plain;
    if (tcgetattr(fileno(stdin), &chat_terminal))
        return;
    plain = chat_terminal;
#ifdef ECHOCTL
    plain.c_lflag &= ~(tcflag_t)ECHOCTL;
#endif
    tcsetattr(fileno(stdin), TCSANOW, &plain);
    atexit(chat_restore);
    fputs("\033[?2004h", stdout);
#endif
}

/* A line that begins with a slash. False: the end. */
static bool chat_command(chat *c, bytes *message)
{
    bytes_add(message, "", 1);
    char *word = message->p, *rest = word + strcspn(word, " \n");
    while (*rest == ' ' || *rest == '\n')
        *rest++ = '\0';
    bool path = strcmp(word, "/save") == 0 || strcmp(word, "/load") == 0;
    if (strcmp(word, "/quit") == 0)
        return false;
    if (path && !*rest)
        fprintf(stderr, "%s FILE\n", word);
    else if (strcmp(word, "/new") == 0)
        chat_clear(c, first_turn(c));
    else if (strcmp(word, "/undo") == 0)
        chat_undo(c);
    else if (strcmp(word, "/retry") == 0)
        chat_retry(c);
    else if (strcmp(word, "/system") == 0)
        chat_system(c, rest, strlen(rest));
    else if (strcmp(word, "/save") == 0)
        chat_save(c, rest);
    else if (strcmp(word, "/load") == 0)
        chat_load(c, rest);
    else if (strcmp(word, "/stats") == 0)
        chat_show(c);
    else
        fprintf(stderr, "%s%s", strcmp(word, "/help") == 0 ? "" : "no such command; there are:\n", chat_commands);
    return true;
}

static void chat_loop(chat *c, const char *session_file)
{
    bytes message = {NULL, 0, 0}, line = {NULL, 0, 0};
    bool prompts = c->screen && isatty(fileno(stdin));
    if (prompts)
        chat_prepare();
    while (chat_message(&message, &line, prompts)) {
        if (!message.n)
            continue;
#ifdef DSV3_READLINE
        if (prompts) {
            bytes_add(&message, "", 1), message.n--;
            add_history(message.p);
        }
#endif
        if (message.p[0] != '/')
            chat_ask(c, message.p, message.n);
        else if (!chat_command(c, &message))
            break;
        if (session_file)
            chat_save(c, session_file);
    }
    if (prompts && !message.n)
        fputc('\n', stdout);
    free(message.p), free(line.p);
}

static int chat_run(int argc, char **argv)
{
    const char *dir, *system = NULL, *session_file = NULL, *markup = "auto", *draft = NULL, *drafter = NULL;
    uint32_t n_threads = 0;
    bool think = false, no_think = false, read_ahead = false;
    dsv3_isa isa = DSV3_ISA_AUTO;
    dsv3_compute compute = DSV3_COMPUTE_AUTO;
    sampling given = {false, UINT32_MAX, -1, -1, -1, -1, -1000, (uint64_t)time(NULL) % 1000000007u};
    chat c;
    memset(&c, 0, sizeof c);
    const option options[] = {
        {"--system", OPTION_TEXT, &system, 0, 0},
        {"--think", OPTION_FLAG, &think, 0, 0},
        {"--no-think", OPTION_FLAG, &no_think, 0, 0},
        {"--session", OPTION_TEXT, &session_file, 0, 0},
        {"--markup", OPTION_TEXT, &markup, 0, 0},
        {"-n", OPTION_COUNT, &c.generate.max_tokens, 0, 0},
        {"--context", OPTION_COUNT, &c.context, 0, 0},
        {"--greedy", OPTION_FLAG, &given.greedy, 0, 0},
        {"--temp", OPTION_REAL, &given.temperature, 0, 100},
        {"--top-k", OPTION_COUNT, &given.top_k, 0, 0},
        {"--top-p", OPTION_REAL, &given.top_p, 0, 1},
        {"--min-p", OPTION_REAL, &given.min_p, 0, 1},
        {"--seed", OPTION_SEED, &given.seed, 0, 0},
        {"--threads", OPTION_COUNT, &n_threads, 0, 0},
        {"--isa", OPTION_ISA, &isa, 0, 0},
        {"--compute", OPTION_COMPUTE, &compute, 0, 0},
        {"--read-ahead", OPTION_FLAG, &read_ahead, 0, 0},
        {"--draft", OPTION_TEXT, &draft, 0, 0},
        {"--drafter", OPTION_TEXT, &drafter, 0, 0},
    };
    arguments(argc, argv, chat_help, options, COUNT(options), &dir, 1);
    if (think && no_think)
        usage("chat: --think and --no-think: give one of them");
    c.opts.markup = markup_named("chat", markup);
    c.opts.add_generation_prompt = true;
    c.opts.thinking = think;
    c.screen = isatty(fileno(stdout));

    FILE *kept = session_file ? fopen(session_file, "rb") : NULL;
    if (kept)
        fclose(kept);
    if (kept && !chat_load(&c, session_file))
        return 1;

    dsv3_model *model = model_open(dir, isa, compute, read_ahead);
    dsv3_error error;
    ids trial = {NULL, 0, 0};
    if (dsv3_model_tokenizer(model, &c.tokenizer, &error))
        fail("%s: a conversation needs a tokenizer", error.message);
    if (c.opts.markup == DSV3_MARKUP_AUTO && dsv3_chat_markup(c.tokenizer, &c.opts.markup, &error))
        fail("%s (--markup NAME; or 'dsv3 generate' writes on behind a text without markup)", error.message);
    if (chat_render(&c, &trial, &error)) /* has the tokenizer what the markup needs? */
        fail("%s (another --markup; or 'dsv3 generate' writes on behind a text without markup)", error.message);
    free(trial.p);
    if ((think || no_think) && c.opts.markup != DSV3_MARKUP_V3_1)
        fprintf(stderr, "dsv3: markup %s is not told whether to think: --think and --no-think change nothing\n",
                dsv3_markup_name(c.opts.markup));
    c.session = session_open(model, c.context, 0, n_threads, draft_parse(draft), drafter_parse(drafter));
    dsv3_session_opts sized;
    dsv3_memory memory;
    memset(&sized, 0, sizeof sized);
    sized.max_tokens = c.context;
    check(dsv3_session_memory(model, &sized, &memory, &error), &error);
    c.context = memory.max_tokens;
    sampling_choose(&c.generate.sample, &given, model);

    if (system && system[0] == '@') {
        bytes text = file_read(system + 1);
        chat_system(&c, text.p, text.n);
        free(text.p);
    } else if (system) {
        chat_system(&c, system, strlen(system));
    }
    if (c.screen && on_terminal)
        fprintf(stderr, "%s, markup %s. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.\n",
                dsv3_model_config(model)->model_type, dsv3_markup_name(c.opts.markup));
    if (kept)
        fprintf(stderr, "%s: %" PRIu64 " messages\n", session_file, (uint64_t)c.n);
    chat_catch();
    chat_loop(&c, session_file);
    chat_clear(&c, 0);
    free(c.turns);
    dsv3_session_close(c.session);
    dsv3_model_close(model);
    return finish();
}

#endif /* DSV3_CHAT_TUI_H */
