/* Another engine's llama-bench, run in turn with our own measurements: ik_llama.cpp's (-mla 3 -fa 1, with and without
   -rtr 1) or llama.cpp's (-fa). One process a figure, one repetition each, over the same number of threads. Used by bench.c,
   which supplies die. */

#include <sys/wait.h>

enum { MAX_SETTINGS = 2, PEER_TEXT = 1 << 16 };

static struct {
    const char *path, *model; /* the program; a GGUF of the same shape */
    bool ik;
    const char *fa; /* what its -fa takes */
    const char *name, *setting[MAX_SETTINGS];
    uint32_t n_settings;
} peer;

/* What a program writes to its standard output; text [PEER_TEXT] is terminated. False if it fails. */
static bool peer_exec(char *const *args, char *text)
{
    int ends[2], status = 0;
    size_t n = 0;
    if (pipe(ends))
        die("cannot make a pipe");
    pid_t child = fork();
    if (child < 0)
        die("cannot start %s", args[0]);
    if (child == 0) {
        FILE *null = fopen("/dev/null", "w");
        dup2(ends[1], 1);
        if (null)
            dup2(fileno(null), 2);
        close(ends[0]), close(ends[1]);
        execv(args[0], args);
        _exit(127);
    }
    close(ends[1]);
    for (ssize_t got; n < PEER_TEXT - 1 && (got = read(ends[0], text + n, PEER_TEXT - 1 - n)) > 0;)
        n += (size_t)got;
    text[n] = 0;
    close(ends[0]);
    return waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* Which fork it is, by what its help lists. */
static void peer_find(const char *path, const char *model)
{
    static char text[PEER_TEXT];
    char program[PATH_SIZE], help[] = "-h", *args[3];
    path_join(program, path, "", "");
    args[0] = program, args[1] = help, args[2] = NULL;
    if (access(path, X_OK))
        die("--peer %s: no program there", path);
    if (!model || access(model, R_OK))
        die("--peer wants --peer-model FILE, a GGUF of the same shape");
    if (!peer_exec(args, text) || !strstr(text, "--n-gen"))
        die("--peer %s: this is no llama-bench, by what its -h says", path);
    peer.path = path, peer.model = model;
    peer.ik = strstr(text, "-mla,") != NULL;
    const char *flash = strstr(text, "--flash-attn");
    peer.fa = flash && strncmp(flash + 12, " <on", 4) == 0 ? "on" : "1";
    peer.name = peer.ik ? "ik_llama.cpp" : "llama.cpp";
    peer.n_settings = peer.ik ? 2 : 1;
    peer.setting[0] = peer.ik ? "-mla 3 -fa 1" : "-fa";
    peer.setting[1] = "-mla 3 -fa 1 -rtr 1";
    if (!peer.ik && !strstr(text, "--n-depth"))
        die("--peer %s: a llama-bench without -d cannot be told the context", path);
}

/* The number behind a key of its JSON, in an array or not; 0 if the key is missing. */
static double peer_number(const char *text, const char *key)
{
    const char *at = strstr(text, key);
    if (!at)
        return 0;
    at += strlen(key);
    at += strspn(at, "\": [\n");
    return atof(at);
}

/* Tokens a second of one call: n tokens of a prompt, or n tokens decoded behind `context`. */
static double peer_rate(uint32_t setting, uint32_t threads, bool decode, uint32_t context, uint32_t n)
{
    static char text[PEER_TEXT];
    char words[32][PATH_SIZE], *args[33];
    char number[3][32];
    uint32_t count = 0;
    snprintf(number[0], sizeof number[0], "%u", threads);
    snprintf(number[1], sizeof number[1], "%u", n);
    snprintf(number[2], sizeof number[2], peer.ik ? "%u,%u" : "%u", context, n);
    const char *const line[] = {peer.path, "-m", peer.model, "-t", number[0], "-r", "1", "-o", "json", "-fa", peer.fa};
    const char *const prompt[] = {"-p", number[1], "-n", "0"};
    const char *const ik_decode[] = {"-p", "0", "-n", "0", "-gp", number[2]};
    const char *const llama_decode[] = {"-p", "0", "-n", number[1], "-d", number[2]};
    const char *const ik[] = {"-mla", "3", "-rtr", setting ? "1" : "0"};
#define PEER_ADD(list)                                         \
    for (size_t i = 0; i < sizeof(list) / sizeof *(list); i++) \
    path_join(words[count++], (list)[i], "", "")
    PEER_ADD(line);
    if (!decode)
        PEER_ADD(prompt);
    else if (peer.ik)
        PEER_ADD(ik_decode);
    else
        PEER_ADD(llama_decode);
    if (peer.ik)
        PEER_ADD(ik);
#undef PEER_ADD
    for (uint32_t i = 0; i < count; i++)
        args[i] = words[i];
    args[count] = NULL;
    double rate = peer_exec(args, text) ? peer_number(text, "\"avg_ts\"") : 0;
    if (!(rate > 0)) {
        char command[PEER_TEXT] = "";
        size_t len = 0;
        for (uint32_t i = 0; i < count && len < sizeof command; i++)
            len += (size_t)snprintf(command + len, sizeof command - len, " %s", args[i]);
        die("this failed; run it by hand to see why:%s", command);
    }
    return rate;
}
