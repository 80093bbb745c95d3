/* dsv3.h - 0.1.0 - runs DeepSeek-V3-architecture language models from one C header. MIT licence, text at the end.

   It opens a checkpoint directory exactly as published (FP8, INT8, BF16, F16 or F32 safetensors, mapped, not converted, not
   copied) and gives the numbers of the reference implementation. It needs libc and libm, and pthreads unless told not to.

   DO THIS, in one .c file of your program:

       #define DSV3_IMPLEMENTATION
       #include "dsv3.h"

   and include it without the #define wherever else you need it. Compile with any -O, link with -lm -pthread. A first text:

       dsv3_model *model;
       dsv3_session *session;
       dsv3_error error;
       dsv3_generate_opts opts = {0};
       opts.max_tokens = 100;
       opts.token_fn = print_token;                       // bool print_token(void *user, const dsv3_token *token)
       if (dsv3_model_open(&model, "path/to/checkpoint", NULL, &error) ||
           dsv3_session_open(&session, model, NULL, &error) ||
           dsv3_generate(session, "Once upon a time", 16, &opts, NULL, &error))
           fprintf(stderr, "%s\n", error.message);

   CONTENTS (search for ">>word"; every section uses only those above it)

       base   compiler, sizes, unaligned loads            mla    multi-head latent attention, the cache row
       err    one error struct, one formatter             moe    router and experts
       mem    the caller's allocator, limits              fwd    the model, n rows at once
       os     files, time, cores                          mtp    multi-token prediction: guesses
       cpu    instruction sets, floating-point state      split  where a text is cut before merging
       thr    atomics, parallel-for                       bpe    byte-pair merging
       num    scalar formats: E4M3, E8M0, F16, BF16, I8   tok    tokenizer: text to ids and back
       ten    the quantized tensor                        chat   conversations to ids, replies to their parts
       kern   inner loops, per instruction set            gram   JSON and JSON Schema to masks over tokens
       mm     matrix products over quantized tensors      smp    logits to a token
       json   a bounded pull reader                       ws     what sessions share: pages, scratch, threads
       st     safetensors, shards, index                  ses    a timeline: tokens, pages, generation
       cfg    config.json, checked once                   snap   sessions written down and read again
       wt     names to weights                            api    the public calls
       nn     norm, rotary positions, linear maps, gated MLPs

   WHICH MODELS. DeepSeek-V3, R1, V3.1 (model_type deepseek_v3; FP8 128 x 128 with weight_scale_inv, also ue8m0; INT8 as
   compressed-tensors W8A8 or as the published R1 sets, a scale a row or a block), and by
   configuration alone Kimi-K2, Moonlight, GigaChat3, JoyAI (no or some query latent, any head sizes, one group or many,
   plain rotary positions or YaRN), DeepSeek-V2 and V2-Lite (softmax router, greedy and group_limited_greedy), tied
   embeddings, both rotary layouts. What is not supported is refused by the name of its key: V3.2's sparse attention,
   other activations, biases, other quantizations. dsv3_config lists what is read.

   DOES NOT convert or write checkpoints, does not print, log (unless you install a logger), exit, abort (DSV3_ASSERT guards
   its own invariants only; define it away if you like), touch signals
   or the locale, read the environment, keep writable globals, or start threads that outlive a
   session. It does not verify weights when opening: a NaN in them makes logits NaN, and then a search names the tensor.

   MEMORY. A model maps its files (no_mmap: reads them) and allocates tables only: about 200 bytes a tensor. Views of
   weights point into the mapping. A session allocates once, when it is opened: the cache (one row of kv_lora_rank +
   qk_rope_head_dim floats, padded to 64, for each layer and position: 2,304 bytes in the whole family), and scratch for
   max_batch rows; sessions that share a workspace (SESSIONS below) share both. dsv3_session_memory says how much before you
   open. Nothing is allocated after that, except by dsv3_generate for the ids of a text prompt, by dsv3_load for the ids of
   a snapshot and by dsv3_tokenize for pieces longer than a few kilobytes. All memory
   comes from the allocator in the options; every block is returned to it. A failed call leaves models and sessions as
   they were.
   Of a mapped file the system keeps in memory what it has room for. Opening reads the headers; the mappings ask for large
   pages and for nothing to be read in advance, so that a checkpoint may be larger than memory. Then a token waits for the
   experts that are missing. With read_ahead each layer asks for all of its chosen experts at once and for nothing else:
   less than half the bytes from the disk, but in small pages, which cost the processor about 0.8 ms a megabyte. It pays
   where a slow disk is what decode waits for, not below memory that holds the model.

   THREADS. A model and a tokenizer are immutable once open: share them freely. A session belongs to one thread at a time,
   and so does a workspace with all its sessions; any number of workspaces may run on one model at once.
   dsv3_session_cancel may be called from any thread, also from a signal handler. A session has its own threads (n_threads
   - 1 of them, asleep between calls), or runs on a host's through dsv3_executor. Callbacks come on the thread that called
   the library. Close sessions before their model.

   TILES. Intel's server CPUs since 2023 have registers for matrices (AMX), which multiply I8 weights eight times as fast
   as AVX-512 does. Linux lends them to a process that asks, and this library asks, with the isa AUTO too, when a model
   is opened, or dsv3_matmul called, whose products are of codes of 8 bits; never for other weights, nor with isa
   AVX512_VNNI. It cannot be taken back, and holds for the whole process: a thread that has used tiles carries 8 KB more
   of state, which the kernel puts on the stack (or the alternate stack) when it delivers a signal, and from then on
   sigaltstack refuses stacks below about 12 KB; sysconf(_SC_SIGSTKSZ) knows. Where the system refuses, AUTO goes without.
   Tiles are released after each product, so they cost nothing when threads are switched.

   SESSIONS. A dsv3_workspace holds a fixed number of cache pages (64 positions of all layers each), the scratch of a pass
   and its threads; any number of sessions share it, and each has but its tokens, a table of pages and a row of logits of
   its own. A session opened without one has a workspace to itself.

       dsv3_workspace_opts opts = {0};
       opts.n_pages = 1024;                                         // 65,536 positions, whoever's they are
       dsv3_workspace_open(&workspace, model, &opts, &error);
       session_opts.workspace = workspace;
       dsv3_session_open(&session, model, &session_opts, &error);   // as many as there is room for
       dsv3_batch_item items[2] = {{a, prompt, 100, NULL}, {b, &token, 1, NULL}};
       dsv3_batch(items, 2, &error);                                // one pass over the weights for both

   dsv3_batch advances each session by as many tokens as its item has: pieces of prompts and single tokens in one pass,
   since decoding waits for the weights and reads them once for all rows. Who is in a pass, and when, is the host's to
   decide: examples/batch.c is a small scheduler. dsv3_session_fork gives a second session with the same tokens, in
   microseconds: pages are named by both, and copied one by one when either writes into them. dsv3_session_sync makes a
   session hold given tokens and runs only what is not there yet; with the ids of dsv3_chat_render that is a conversation's
   next turn. An append that needs more pages than are free is DSV3_ERROR_CACHE_FULL, and nothing has changed. A session
   that must not meet it sets pages aside when it is opened (reserve_pages: ceil(max_tokens / 64), and one more for each
   fork it will have). dsv3_save writes sessions down, pages that they share once, and dsv3_load reads them again: into the
   same model, compute mode and cache type, with the same bits of logits. A snapshot is checked as any file is; one that
   does not fit is refused by the name of what differs. It is no defence against a forger: its rows are what they are.
   Caches may be kept in BF16, or latents in 8 bits with a scale for 64 of them: half, or 29 %, of the bytes of f32 in the
   V3 family. f32 is the default; README.md has what the others cost in accuracy.
   dsv3_workspace_experts tells how many rows went through each expert; dsv3 experts (examples/experts.h) draws it.

   DETERMINISM. The same tokens at the same positions give the same bits of logits, whatever else is in the batch, however
   a prompt is cut into pieces, with any number of threads, on every instruction set (with AVX512_BF16, compute mode
   BF16 and numbers below 2^-126 excepted: see dsv3_compute), with gcc and clang, at every optimisation level. All sums
   have one documented order (>>kern). The header pins contraction itself and refuses -ffast-math; it sets the
   floating-point state while it computes and puts the host's back. Rotary tables use the C library's double-precision
   cos, sin, pow and log rounded to float: with another libm a bit of them could move. Sampling is a function of logits,
   options, position and, with penalties, the tokens so far: the random number for a
   token depends on the seed and its position and on nothing else, so a retry takes a new seed.

   NUMBERS. Weights are exact: value = f32(code * scale). dsv3_model_opts.compute names how activations meet them: f32, or
   rounded to bf16 (the default for FP8 and BF16 weights: finer than the published recipe), to FP8 as published, or to
   8-bit integers (the default for I8 weights); dsv3_compute says each exactly, README.md what each costs. Router, norms,
   softmax, rotation and attention are f32 in all of them. The reference is Hugging Face transformers in f32; tests/oracle
   runs it live, beside DeepSeek's own quantised arithmetic. Attention is computed in its absorbed form only. Where
   DeepSeek's inference code differs (bf16 router), tests/oracle/README.md tells what was chosen and what it costs.

   ERRORS. Every call that can fail returns a dsv3_result and takes a dsv3_error *, last, which may be NULL. The message
   names the file, the tensor or key, what was expected and what was found. Pointers and counts given out are NULL or 0 on
   failure; a caller's own buffers may be partly written. Bad files are
   errors, never asserts: all lengths, offsets, shapes and names from files are checked before use.

   FILES. config.json; model.safetensors.index.json with its shards, or one model.safetensors; optional:
   generation_config.json, tokenizer.json (or Kimi's tiktoken.model), tokenizer_config.json, chat_template.jinja. Names of
   shards must be plain names that end in .safetensors, 4,096 of them at most; a read that comes up short is DSV3_ERROR_IO,
   a file that is shorter than its header says DSV3_ERROR_TRUNCATED. Mapped files
   must not shrink while a model is open (the system would raise SIGBUS): use no_mmap where that can happen.
   With a dsv3_reader checkpoints come from anywhere.

   TEXT. dsv3_tokenize treats text as text: special tokens written in it stay ordinary characters, unless
   DSV3_TOKENIZE_MARKERS is asked for by name. If the tokenizer is missing or of an unknown kind the model opens and works
   by ids; calls on text fail and say why.

   CONVERSATIONS. dsv3_chat_render turns messages (role, content, reasoning, tool calls and results) into ids, as the
   checkpoint's chat template would, to the byte: there is no Jinja here, but what the known templates print is written
   as rules. Which one it is, is recognised by the template's text; one that is not known is an error, never a guess; a
   host may name one. dsv3_reply reads what the model answers, token by token, into reasoning, answer, tool calls and the
   end.

       dsv3_chat_opts opts = {0};
       opts.add_generation_prompt = true;
       dsv3_chat_render(tokenizer, messages, n, &opts, ids, cap, &count, &error);
       dsv3_session_sync(session, ids, count, NULL, &error);
       dsv3_reply_init(&reply, tokenizer, &reply_opts, &error);
       ... dsv3_generate, whose token_fn says: return token->id < 0 || dsv3_reply_put(&reply, token->id); ...

   Forged markup: whatever stands in contents, names, ids, arguments, reasoning, results and tools, the ids hold those
   markers that the rules wrote and no other: "<|User|>" typed by a user is ordinary characters, also where two fields
   meet. This holds for tokens. A text that only looks like a turn ("User: ...") is still text that a model reads; and
   the two tags <think> and </think>, where a tokenizer has no ids for them (V3's under R1's template), are characters
   for all. Contents are otherwise untouched but for one thing the templates do: of an assistant's content, R1 and V3.1
   print only what is behind </think>.

   A conversation that grows gives ids that begin with those of before, so that a session goes on. The past changes where
   a template rewrites it: system messages all go to the front (DeepSeek); reasoning of earlier turns is left out (R1 and
   V3.1: all but the tool rounds; Kimi-K2-Thinking: up to the last answer without tool calls); and a reply may have been
   cut into other tokens than its text is. Comparing ids finds the common beginning in each case.

   Of a reply: </think> may be missing (then all is reasoning), and so may the end; a tool call ends reasoning; between
   tool calls newlines count for none, and other text is answer; markers of another speaker's turn end the reply; a
   marker where it has no meaning is text. Characters cut by tokens arrive whole, ill-formed ones as U+FFFD. A stop
   string ends the answer even where tokens cut it, and is not part of it. GigaChat3's function calls are not taken
   apart.

   CONSTRAINED OUTPUT. dsv3_sample_opts.mask says which tokens may be picked; dsv3_generate_opts takes such masks from a
   callback, or a dsv3_grammar: JSON, or JSON that fits a JSON Schema (draft 2020-12). What ends under a grammar parses and
   validates, always; it may be cut short by max_tokens or a full session, and dsv3_stats.stop says so. A schema is compiled
   once (dsv3_grammar_open); a mask takes some 20 microseconds on V3's 129,280 tokens, half a millisecond where a pattern
   leaves many words. A place in a text is a plain dsv3_grammar_state: copy it to come back to it.
   Read are: type enum const, properties patternProperties additionalProperties propertyNames (pattern, enum) required
   minProperties maxProperties, items prefixItems minItems maxItems, minLength maxLength pattern, minimum maximum
   exclusiveMinimum exclusiveMaximum multipleOf (whole numbers to 1000), anyOf allOf $ref $defs, and oneOf where no value
   can fit two of its options. $ref leads anywhere within the schema, by pointer, $anchor or $id, also in circles. What
   describes is passed over: title description default examples format deprecated readOnly writeOnly content... $comment.
   All else is refused by its name (not, if with then or else, contains uniqueItems dependent... unevaluated... $dynamicRef,
   unknown words, $ref to another document). A schema that no value fits is an error too, and says so.
   A character has one spelling: itself, but for \" \\ \b \f \n \r \t and \u00xx for other controls. Members come in any
   order, no key twice; the objects open at a place have at most 160 keys together, and depth is at most max_depth.
   Numbers have at most 19 digits before the point and 15 behind it; exponents, of two digits, only where no bound is given;
   integers are written without point and exponent. Patterns are those of ECMAScript without \b, \p, back references and
   looking around. At one place at most 32 alternatives are followed; should more meet there, the rest is not offered.
   A schema that needs more than its limits (max_states, 4,096 combinations of subschemas, 1 MB of text, a bounded time) is
   an error that says which. Tokens of markup never occur; the end of text does where the JSON is whole.

   TOOLS THAT MUST BE CALLED (what others call tool_choice). With dsv3_chat_opts.call the renderer begins the reply as the
   template would write that call (no reasoning before it), up to where the arguments begin: what opens them is in the
   prompt and nobody's choice. dsv3_grammar_open_tool compiles the tool's own schema; under it the model writes arguments
   that fit, then the end of text, and nothing else. The reply, which is told of the call too, has that one call:

       dsv3_tool_call call = {0};
       call.name = name;                                            // and call.id, for Kimi
       opts.call = reply_opts.call = &call;
       dsv3_grammar_open_tool(&generate_opts.grammar, tokenizer, tools, name, NULL, &error);

   Its prompt is where the conversation with that call in it goes through, byte for byte: where the templates of V3 and R1
   open no second section (behind an earlier call) or leave a round of results open, it does not either.
   What closes the call is written when the conversation is rendered with it (and dsv3_session_sync drops the end of text).
   Which of several tools it is, the model says where the call has no name (and no id): then the prompt ends before it, and
   dsv3_grammar_open_tools lets one of the names stand there, with arguments that fit that tool. V3, R1 and V3_1 and
   KIMI_K2_THINKING have such calls, the other markups refuse. Drafts, batches, forks and rewinding know nothing of it.

   DRAFTS. With dsv3_session_opts.n_draft, dsv3_generate guesses tokens ahead and runs them with the last one in one pass:
   reading the weights once may give several tokens. The text stays the same to the bit, for every seed, temperature,
   penalty, mask, grammar and stop: what is sampled at a position is a function of its logits and its own random number,
   and a guess counts only where it is what has just been sampled. So does all the rest of a session: guesses that were
   wrong, or were cut off by a stop, an error or a cancellation, leave nothing behind.
   Guesses come from the checkpoint's layer of multi-token prediction (DSV3_DRAFTER_MTP), which picks by the sampler's own
   options and random numbers; from what followed the same words before (LOOKUP), which takes no weights and suits texts
   that repeat their prompt; or from the host. A grammar steers them; a mask_fn is asked for tokens alone, which serves the
   first guess of a pass. A session with MTP holds max_batch states more; every session caches the layer, where the model
   was not opened with no_mtp. A pass over a few rows reads the experts of all of them, so that guesses can cost more than
   they bring: with DSV3_DRAFT_AUTO the session measures both, stops guessing where it does not pay, and tries again with a
   hundredth of the time. The clock decides how many are guessed, never what is written. dsv3_stats says how many were made
   and right.
   Drafts go with everything else. A fork drafts as its parent does, and shares with it the cache of the prediction layer
   too. dsv3_batch advances sessions that draft beside others; it takes tokens, so that it guesses none. A snapshot holds
   nothing of drafts: any session may go on from it, whoever guesses there; the prediction layer begins anew behind it, and
   is right less often at first. Guesses take free pages of the workspace while they are verified, never one that a token
   needs: where there is none, fewer are made, and CACHE_FULL comes where it would come without them.

   EMBEDDING, FFI. No varargs, unions, bit-fields or structs by value in the interface; enums are 32 bits; options may be
   zeroed; struct_size lets a binding state which layout it was written for. Text is UTF-8 as pointer and length.
   examples/ffi.py drives the shared library (make lib) from Python's ctypes.

   OPTIONS, macros defined before the #include, all optional:

       DSV3_IMPLEMENTATION      compile the implementation here
       DSV3_STATIC              everything static: for one translation unit
       DSV3_API                 how public functions are declared; default extern
       DSV3_DLL                 export them from a shared library, or import them
       DSV3_CONFIG_HEADER       a header with such macros, included first
       DSV3_MALLOC(size, align), DSV3_FREE(ptr)   both together: the default allocator
       DSV3_ASSERT(c)           for the library's own invariants; default assert
       DSV3_NO_THREADS          no pthreads: sessions run on the calling thread, or on an executor
       DSV3_NO_STDIO            no file access: a dsv3_reader is required
       DSV3_NO_SIMD             scalar kernels only
       DSV3_NO_AVX512           up to AVX2
       DSV3_NO_AMX              no tile registers: see TILES above
       DSV3_NO_TOKENIZER        no tokenizer and no conversations: ids only
       DSV3_REGRESSION          for tests: small tables, so that rare paths are common
*/
#ifndef DSV3_H
#define DSV3_H

#ifdef DSV3_CONFIG_HEADER
#include DSV3_CONFIG_HEADER
#endif

/* The implementation uses POSIX (mmap, clock_gettime); strict -std=c99 hides it unless asked before the first header. */
#if defined(DSV3_IMPLEMENTATION) && !defined(_WIN32) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DSV3_VERSION_MAJOR  0
#define DSV3_VERSION_MINOR  1
#define DSV3_VERSION_PATCH  0
#define DSV3_VERSION_STRING "0.1.0"
#define DSV3_VERSION        (DSV3_VERSION_MAJOR * 1000000 + DSV3_VERSION_MINOR * 1000 + DSV3_VERSION_PATCH)

#ifndef DSV3_API
#if defined(DSV3_STATIC)
#if defined(__GNUC__)
#define DSV3_API static __attribute__((unused))
#else
#define DSV3_API static
#endif
#elif defined(DSV3_DLL) && defined(_WIN32)
#ifdef DSV3_IMPLEMENTATION
#define DSV3_API __declspec(dllexport)
#else
#define DSV3_API __declspec(dllimport)
#endif
#elif defined(DSV3_DLL) && defined(__GNUC__)
#define DSV3_API __attribute__((visibility("default")))
#else
#define DSV3_API extern
#endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- Results and errors ----------------------------------------------------------------------------------

/* 0 or negative; grouped by tens; a number, once given, keeps its meaning. */
typedef enum dsv3_result {
    DSV3_OK = 0,
    DSV3_ERROR_INVALID_ARGUMENT = -1, /* a pointer, count, token or option that cannot be right */
    DSV3_ERROR_INVALID_OPTIONS = -2,  /* struct_size unknown, callbacks half given, values out of range */
    DSV3_ERROR_OUT_OF_MEMORY = -3,    /* the allocator said no */
    DSV3_ERROR_MEMORY_LIMIT = -4,     /* memory_limit would be passed */
    DSV3_ERROR_BUFFER_TOO_SMALL = -5, /* the needed size is in the count or length returned */
    DSV3_ERROR_CONTEXT_FULL = -6,     /* the session holds max_tokens */
    DSV3_ERROR_CANCELLED = -7,        /* dsv3_session_cancel, or a progress callback said stop */
    DSV3_ERROR_CACHE_FULL = -8,       /* the workspace has no page left: close or rewind a session */
    DSV3_ERROR_FILE_NOT_FOUND = -20,
    DSV3_ERROR_IO = -21,
    DSV3_ERROR_TRUNCATED = -22,         /* a file is shorter than its own header says */
    DSV3_ERROR_JSON = -23,              /* not JSON; `offset` is the byte */
    DSV3_ERROR_SAFETENSORS = -24,       /* JSON, but not a safetensors header or index */
    DSV3_ERROR_SNAPSHOT = -25,          /* no snapshot, a damaged one, or one of another model or cache type */
    DSV3_ERROR_UNSUPPORTED_MODEL = -30, /* a configuration this library does not run; the message names the key */
    DSV3_ERROR_MISSING_TENSOR = -31,
    DSV3_ERROR_BAD_TENSOR = -32, /* wrong shape or dtype, scales missing, values that are not finite */
    DSV3_ERROR_TOKENIZER = -33,  /* the tokenizer is missing or of an unknown kind, or a chat template is */
    DSV3_ERROR_SCHEMA = -34, /* a JSON Schema with a keyword or a size that is not supported, or that nothing fits */
    DSV3_ERROR_UNSUPPORTED_CPU = -40,  /* the instruction set asked for is not there */
    DSV3_ERROR_THREAD = -41,           /* a thread could not be started */
    DSV3_ERROR_FEATURE_DISABLED = -42, /* compiled out by a DSV3_NO_... macro */
    DSV3_RESULT_FORCE_32BIT = 0x7fffffff
} dsv3_result;

/* Caller-owned. Every call that can fail takes a pointer to one, last, which may be NULL. It is written on
   failure and on success alike (code DSV3_OK, empty message). */
typedef struct dsv3_error {
    dsv3_result code;
    uint32_t line;     /* line of dsv3.h that raised it */
    uint64_t offset;   /* byte in the file, for parse errors; otherwise 0 */
    char message[256]; /* UTF-8; names the file, tensor or key, what was expected and what was found */
} dsv3_error;

// ---- What a host may bring -------------------------------------------------------------------------------

/* Memory. Both functions or neither. Blocks are asked for with an alignment of at most 64. Sessions and dsv3_tokenize use
   the model's allocator from whatever threads they run on: it must be thread-safe, as malloc is. */
typedef struct dsv3_allocator {
    void *(*alloc_fn)(void *user, size_t size, size_t align); /* NULL when there is none */
    void (*free_fn)(void *user, void *ptr, size_t size);      /* `size` is the size asked for */
    void *user;
} dsv3_allocator;

/* A file opened by a reader. */
typedef struct dsv3_file {
    const void *data; /* the whole file in memory, valid until close; or NULL, then read_fn is called */
    uint64_t size;    /* bytes */
    void *handle;     /* the reader's own */
} dsv3_file;

/* Where a checkpoint comes from: a directory, an archive, memory, a network. `name` is one path component as
   the checkpoint spells it ("config.json", "model-00001-of-000163.safetensors"). `user` must outlive the model.
   open_fn    DSV3_ERROR_FILE_NOT_FOUND says that the file is not there, which is fine for the optional ones; any other
              error fails the opening. A failed open is not closed. Called on the opening thread, as read_fn is.
   read_fn    fills all `size` bytes or fails: a short read is DSV3_ERROR_IO. */
typedef struct dsv3_reader {
    dsv3_result (*open_fn)(void *user, const char *name, dsv3_file *file);                        /* Required */
    dsv3_result (*read_fn)(void *user, dsv3_file *file, uint64_t offset, void *dst, size_t size); /* if data is NULL */
    void (*close_fn)(void *user, dsv3_file *file);                                                /* Optional */
    void *user;
} dsv3_reader;

/* A host's own threads: run task(ctx, 0) ... task(ctx, n-1) in any order on any threads, return when all are done. */
typedef struct dsv3_executor {
    void (*run_fn)(void *user, uint32_t n, void (*task)(void *ctx, uint32_t i), void *ctx);
    uint32_t n_threads; /* how many may run at once; n is at most this. 0: one */
    void *user;
} dsv3_executor;

typedef enum dsv3_log_level {
    DSV3_LOG_INFO = 0,
    DSV3_LOG_WARNING = 1,
    DSV3_LOG_LEVEL_FORCE_32BIT = 0x7fffffff
} dsv3_log_level;

/* The library is silent unless this is given. Called on the thread that called the library. */
typedef struct dsv3_logger {
    void (*fn)(void *user, dsv3_log_level level, const char *message);
    void *user;
} dsv3_logger;

/* Long calls report here; `total` may be 0 (unknown). Returning false cancels the call. */
typedef struct dsv3_progress {
    bool (*fn)(void *user, uint64_t done, uint64_t total);
    void *user;
} dsv3_progress;

/* Which kernels run. AUTO takes the best that the CPU has. All give the same bits (AVX512_BF16: but for numbers below
   2^-126, see dsv3_compute). The numbers are names, not an order: ask dsv3_isa_supported about each. */
typedef enum dsv3_isa {
    DSV3_ISA_AUTO = 0,
    DSV3_ISA_SCALAR = 1,
    DSV3_ISA_AVX2 = 2,        /* AVX2, FMA, F16C */
    DSV3_ISA_AVX512 = 3,      /* AVX-512 F, BW, DQ, VL */
    DSV3_ISA_AVX_VNNI = 4,    /* AVX2 and AVX-VNNI */
    DSV3_ISA_AVX512_VNNI = 5, /* AVX512 and AVX-512 VNNI */
    DSV3_ISA_AVX512_BF16 = 6, /* AVX512_VNNI and AVX-512 BF16, VBMI */
    DSV3_ISA_AVX512_AMX = 7,  /* AVX512_VNNI and AMX INT8, on Linux: see TILES above */
    DSV3_ISA_NEON = 16,       /* aarch64, with its dot products of bytes where the CPU has them */
    DSV3_ISA_FORCE_32BIT = 0x7fffffff
} dsv3_isa;

/* How a weight meets its activations, tensor by tensor. Sums are f32, or exact integers, in one documented order (>>kern).
   Router, norms, softmax, rotation and attention over the cache, W_UK and W_UV with it, are f32 in every mode.
   AUTO   INT8 for I8 weights, BF16 for all others
   F32    value = f32(code * scale), activations f32: what the oracle compares. The same bits on all ISAs
   BF16   of F8_E4M3 weights code * bf16(x * scale), of BF16 weights w * bf16(x), rounded to nearest even: finer than the
          published recipe, which rounds activations to 4 bits; what would round to less than 2^-126 becomes 0. F32, F16
          and I8 weights as in F32. The same bits on all ISAs, but that AVX512_BF16 takes products and sums below 2^-126,
          and such weights, as 0, as its instruction does
   FP8    as published (DeepSeek's act_quant): for F8_E4M3 weights every 128 activations of a row share a scale max / 448 (a
          power of two where config.json says ue8m0) and become E4M3 codes; products and sums as in F32. Others as in BF16.
          The same bits on all ISAs
   INT8   of I8 weights with a scale a row, or for 128 columns: a row of activations, or each 128 of it, becomes codes of 8
          bits, scale = max / 127, rounded to nearest even; integer sums, exact (above 131,072 columns all is as in F32).
          Others as in BF16. The same bits on all ISAs */
typedef enum dsv3_compute {
    DSV3_COMPUTE_AUTO = 0,
    DSV3_COMPUTE_F32 = 1,
    DSV3_COMPUTE_BF16 = 2,
    DSV3_COMPUTE_FP8 = 3,
    DSV3_COMPUTE_INT8 = 4,
    DSV3_COMPUTE_FORCE_32BIT = 0x7fffffff
} dsv3_compute;

// ---- The quantized tensor --------------------------------------------------------------------------------

/* Element types of safetensors. Arithmetic is offered for F32, F16, BF16, F8_E4M3 and I8; the others can be listed. */
typedef enum dsv3_dtype {
    DSV3_DTYPE_UNKNOWN = 0,
    DSV3_DTYPE_F32 = 1,
    DSV3_DTYPE_F16 = 2,
    DSV3_DTYPE_BF16 = 3,
    DSV3_DTYPE_F8_E4M3 = 4, /* OCP "fn": no infinities, 0x7F and 0xFF are NaN, largest 448 */
    DSV3_DTYPE_F8_E8M0 = 5, /* 2^(byte - 127): a scale */
    DSV3_DTYPE_F8_E5M2 = 6,
    DSV3_DTYPE_I8 = 7, /* -128 ... 127; as a weight always with scales beside it */
    DSV3_DTYPE_U8 = 8,
    DSV3_DTYPE_I16 = 9,
    DSV3_DTYPE_U16 = 10,
    DSV3_DTYPE_I32 = 11,
    DSV3_DTYPE_U32 = 12,
    DSV3_DTYPE_I64 = 13,
    DSV3_DTYPE_U64 = 14,
    DSV3_DTYPE_F64 = 15,
    DSV3_DTYPE_BOOL = 16,
    DSV3_DTYPE_FORCE_32BIT = 0x7fffffff
} dsv3_dtype;

#define DSV3_MAX_RANK 8

/* A view of a weight: nothing is owned, nothing is copied, `data` may have any alignment.
   The value of element [i, j] is data[i, j] * scale[i / block_rows, j / block_cols], the product taken in f32;
   without scales it is data[i, j]. F8_E4M3 may have scales, I8 must, the others have none.
   DeepSeek-V3 stores F8_E4M3 with F32 scales over blocks of 128 x 128, the last ones ragged (DeepSeek-V3,
   README_WEIGHTS.md; the name in the files, weight_scale_inv, is historical: they multiply). Checkpoints in I8 have one
   scale a row (block_rows 1, block_cols >= shape[1]), or blocks likewise. */
typedef struct dsv3_tensor {
    const void *data;  /* [shape[0], shape[1], ...], row-major */
    const void *scale; /* [ceil(shape[0] / block_rows), ceil(shape[1] / block_cols)] or NULL */
    dsv3_dtype dtype;
    dsv3_dtype scale_dtype;        /* F32, F16, BF16 or F8_E8M0; UNKNOWN without scales */
    uint32_t rank;                 /* 0 ... DSV3_MAX_RANK; matmul and dequantize want 1 (one row) or 2 */
    uint32_t block_rows;           /* rows that share a scale; 0 without scales */
    uint32_t block_cols;           /* columns that share a scale: a multiple of 64, or all; 0 without scales */
    uint32_t reserved;             /* 0 */
    uint64_t shape[DSV3_MAX_RANK]; /* slowest first; 0 behind `rank` */
    uint64_t row_stride;           /* bytes from a row to the next */
    uint64_t scale_stride;         /* scales from a row of them to the next */
} dsv3_tensor;

typedef struct dsv3_matmul_opts {
    uint32_t struct_size;     /* 0, or sizeof(dsv3_matmul_opts) */
    dsv3_isa isa;             /* Default: AUTO */
    dsv3_compute compute;     /* Default: AUTO. FP8 takes scales as powers of two where the tensor's are F8_E8M0 */
    dsv3_executor executor;   /* Optional: default runs on the calling thread */
    dsv3_allocator allocator; /* Optional: scratch of one call; default malloc */
} dsv3_matmul_opts;

/* "F8_E4M3", as safetensors spells it; "?" when unknown. Static. */
DSV3_API const char *dsv3_dtype_name(dsv3_dtype dtype);

/* Bytes an element; 0 for UNKNOWN. */
DSV3_API size_t dsv3_dtype_size(dsv3_dtype dtype);

/* Writes `values` [n_rows, n_cols] as `dtype` into `data`, and describes it in `tensor`.
   F32, F16 and BF16 round to nearest even. F8_E4M3 takes blocks of 128 x 128, scale = max|block| / 448 (1 where the
   block is all zero), code = e4m3(value / scale), as the checkpoints were made. I8 takes rows: scale = max|row| / 127 (1
   where the row is all zero), code = value / scale rounded to nearest even, -127 ... 127; block_cols is then n_cols.
   tensor     out; views `data` and `scale`, which stay the caller's and must outlive it
   data       [n_rows, n_cols] elements of dtype, data_size bytes or more (else BUFFER_TOO_SMALL)
   scale      [ceil(n_rows / 128), ceil(n_cols / 128)] of F8_E4M3, [n_rows, 1] of I8: scale_count floats or more; NULL, 0
              where dtype has none
   Errors: INVALID_ARGUMENT (a dtype without arithmetic, sizes of 0, I8 with 2^32 columns; F8_E4M3 and I8: a value that
   is not finite), BUFFER_TOO_SMALL. Any thread. */
DSV3_API dsv3_result dsv3_quantize(dsv3_tensor *tensor, void *data, size_t data_size, float *scale, size_t scale_count,
                                   dsv3_dtype dtype, const float *values, uint64_t n_rows, uint64_t n_cols,
                                   dsv3_error *error);

/* out [n_rows, shape[1]] = the values of rows first_row ... first_row + n_rows - 1. Any thread. */
DSV3_API dsv3_result dsv3_dequantize(float *out, const dsv3_tensor *tensor, uint64_t first_row, uint64_t n_rows,
                                     dsv3_error *error);

/* out [n, shape[0]] = in [n, shape[1]] times the transposed weight, as opts->compute says, in one fixed order of summation:
   a row of `out` has the same bits whatever n, the executor and the ISA (DETERMINISM above).
   weight     rank 2 (or 1: one output), dtype F32, F16, BF16, F8_E4M3 or I8
   opts       NULL: AUTO kernels on this thread
   Errors: INVALID_ARGUMENT, INVALID_OPTIONS, UNSUPPORTED_CPU, OUT_OF_MEMORY. Any thread. */
DSV3_API dsv3_result dsv3_matmul(float *out, const float *in, size_t n, const dsv3_tensor *weight,
                                 const dsv3_matmul_opts *opts, dsv3_error *error);

// ---- Tokenizer -------------------------------------------------------------------------------------------

typedef struct dsv3_tokenizer dsv3_tokenizer; /* immutable once open: share between threads freely */

enum {
    DSV3_TOKENIZE_BOS = 1,     /* the begin-of-text id in front, where tokenizer_config.json asks for it */
    DSV3_TOKENIZE_MARKERS = 2, /* texts of added tokens ("<|User|>" ...) become their ids; without it they are text */
    DSV3_DETOKENIZE_SKIP_SPECIAL = 4 /* leave out added tokens whose `special` is true */
};

typedef struct dsv3_tokenizer_info {
    int32_t n_tokens;      /* ids 0 ... n_tokens - 1 exist */
    int32_t bos, eos, pad; /* -1: none named */
    bool add_bos;          /* tokenizer_config.json add_bos_token */
} dsv3_tokenizer_info;

/* Exactly the checkpoint's tokenizer: byte-level BPE of tokenizer.json, or tiktoken.model; see section >>tok. Kimi's Python
   wrapper cuts texts of more than 25,000 characters without, or with nothing but, white space; this does not.
   text       UTF-8, `len` bytes, any bytes allowed: ill-formed ones are carried through
   flags      DSV3_TOKENIZE_...; 0 is the safe mode: no input can yield the id of an added token
   tokens     [cap] out; cap 0 (tokens may be NULL) only counts
   count      out: ids needed, also when the result is BUFFER_TOO_SMALL (then tokens holds the first cap)
   Errors: INVALID_ARGUMENT (len >= 2^31), BUFFER_TOO_SMALL, OUT_OF_MEMORY. Any thread. */
DSV3_API dsv3_result dsv3_tokenize(const dsv3_tokenizer *tokenizer, const char *text, size_t len, uint32_t flags,
                                   int32_t *tokens, size_t cap, size_t *count, dsv3_error *error);

/* The text of `count` tokens, ill-formed UTF-8 replaced by U+FFFD (one a maximal part), unknown ids left out.
   text       [cap] out, no terminator; cap 0 only measures. len: out, bytes needed. Errors as dsv3_tokenize. */
DSV3_API dsv3_result dsv3_detokenize(const dsv3_tokenizer *tokenizer, const int32_t *tokens, size_t count,
                                     uint32_t flags, char *text, size_t cap, size_t *len, dsv3_error *error);

/* The bytes of one token: perhaps a part of a character. Owned by the tokenizer. NULL (len 0) for unknown ids. */
DSV3_API const char *dsv3_token_bytes(const dsv3_tokenizer *tokenizer, int32_t token, size_t *len);

/* The id of an added token by its text; -1 if there is none. */
DSV3_API int32_t dsv3_token_find(const dsv3_tokenizer *tokenizer, const char *text, size_t len);

DSV3_API void dsv3_tokenizer_info_get(const dsv3_tokenizer *tokenizer, dsv3_tokenizer_info *info);

// ---- Conversations ---------------------------------------------------------------------------------------

/* How a checkpoint writes a conversation. */
typedef enum dsv3_markup {
    DSV3_MARKUP_AUTO = 0,     /* the checkpoint's own, recognised by its chat template */
    DSV3_MARKUP_V3 = 1,       /* DeepSeek-V3 */
    DSV3_MARKUP_R1 = 2,       /* DeepSeek-R1, January 2025: the model opens <think> itself */
    DSV3_MARKUP_R1_THINK = 3, /* DeepSeek-R1, since February 2025: the prompt ends in "<think>\n" */
    DSV3_MARKUP_V3_1 = 4,     /* DeepSeek-V3.1: the prompt ends in <think> or </think> */
    DSV3_MARKUP_KIMI_K2 = 5,  /* Kimi-K2-Instruct as first published, Moonlight: tool calls are not written */
    DSV3_MARKUP_KIMI_K2_THINKING = 6,
    DSV3_MARKUP_GIGACHAT3 = 7,
    DSV3_MARKUP_FORCE_32BIT = 0x7fffffff
} dsv3_markup;

typedef enum dsv3_role {
    DSV3_ROLE_SYSTEM = 0,
    DSV3_ROLE_USER = 1,
    DSV3_ROLE_ASSISTANT = 2,
    DSV3_ROLE_TOOL = 3, /* what a tool gave back */
    DSV3_ROLE_FORCE_32BIT = 0x7fffffff
} dsv3_role;

/* UTF-8, any bytes allowed. */
typedef struct dsv3_text {
    const char *p; /* not terminated. NULL: there is none, which is not the same as an empty one */
    size_t len;
} dsv3_text;

typedef struct dsv3_tool_call {
    dsv3_text id;        /* KIMI_K2_THINKING writes it ("functions.NAME:0"), the others do not */
    dsv3_text name;      /* Required */
    dsv3_text arguments; /* Required: JSON, written as it is */
} dsv3_tool_call;

/* = {0} and the fields that are there. A template prints what it prints: a field without a place in the markup is left
   out, as by the reference (V3 and R1 have none for `reasoning`, `name` and `tool_call_id`). */
typedef struct dsv3_message {
    dsv3_role role;
    dsv3_text content;      /* Required, but in an assistant's turn that has tool_calls */
    dsv3_text reasoning;    /* assistant: KIMI_K2_THINKING writes it behind the last answer without tool calls */
    dsv3_text name;         /* KIMI_K2_THINKING writes it in place of the role */
    dsv3_text tool_call_id; /* tool: which call this answers. KIMI_K2_THINKING requires it */
    const dsv3_tool_call
        *tool_calls; /* [n_tool_calls], assistant; NULL: none. Not NULL with 0 of them: an empty list */
    size_t n_tool_calls;
    bool prefix; /* assistant, V3_1 with thinking: the turn begins with <think> */
} dsv3_message;

typedef struct dsv3_chat_opts {
    uint32_t struct_size;       /* 0, or the caller's sizeof */
    dsv3_markup markup;         /* Default: AUTO */
    bool add_generation_prompt; /* end with what makes the model answer */
    bool thinking;              /* V3_1: with reasoning. The other markups always have it, or never */
    dsv3_text
        tools; /* JSON: [{"type": "function", "function": {"name", "description", "parameters"}}, ...]; V3_1 and the
                        two of Kimi. INVALID_ARGUMENT with the others, which have no place for it */
    /* Optional, with add_generation_prompt: the reply must be this call. The ids end where its arguments begin (those here
       are not read), or, without a name, where that does; dsv3_grammar_open_tool, or _tools, has what follows.
       INVALID_ARGUMENT with KIMI_K2 and GIGACHAT3, and
       where the turn is not the assistant's. See TOOLS THAT MUST BE CALLED above */
    const dsv3_tool_call *call;
} dsv3_chat_opts;

DSV3_API const char *dsv3_markup_name(dsv3_markup markup); /* "r1-think"; "?" if unknown; static */

/* The markup of the checkpoint's chat template. Errors: TOKENIZER if there is none or it is not one of those known; the
   message says what can be done. Any thread. */
DSV3_API dsv3_result dsv3_chat_markup(const dsv3_tokenizer *tokenizer, dsv3_markup *markup, dsv3_error *error);

/* The ids of a conversation, begin-of-text included: those of the checkpoint's template, but for what is said about forged
   markup in CONVERSATIONS.
   messages   [n]
   opts       NULL: defaults
   tokens     [cap] out; cap 0 (tokens may be NULL) only counts. count: out, as dsv3_tokenize
   Errors: INVALID_ARGUMENT (where the template raises; the message names the place), INVALID_OPTIONS, TOKENIZER (markup
   unknown, or a token of it missing), JSON (tools), BUFFER_TOO_SMALL, OUT_OF_MEMORY, MEMORY_LIMIT. Any thread. */
DSV3_API dsv3_result dsv3_chat_render(const dsv3_tokenizer *tokenizer, const dsv3_message *messages, size_t n,
                                      const dsv3_chat_opts *opts, int32_t *tokens, size_t cap, size_t *count,
                                      dsv3_error *error);

/* The same as text, markers spelled: to look at. To tokenize it again would let contents pose as markup.
   text       [cap] out, no terminator; cap 0 only measures. len: out, bytes needed. Errors as dsv3_chat_render. */
DSV3_API dsv3_result dsv3_chat_text(const dsv3_tokenizer *tokenizer, const dsv3_message *messages, size_t n,
                                    const dsv3_chat_opts *opts, char *text, size_t cap, size_t *len, dsv3_error *error);

/* What a piece of a reply is. */
typedef enum dsv3_reply_kind {
    DSV3_REPLY_REASONING = 0,
    DSV3_REPLY_ANSWER = 1,
    DSV3_REPLY_CALL_ID = 2,   /* Kimi: "functions.NAME:0", whole; to be given back in tool_calls and tool_call_id */
    DSV3_REPLY_CALL_NAME = 3, /* of the tool, whole, at most 255 bytes of it: a call begins */
    DSV3_REPLY_CALL_ARGUMENTS = 4, /* as they grow, as the model writes them: JSON if it does */
    DSV3_REPLY_END = 5,            /* once, the last; no text */
    DSV3_REPLY_KIND_FORCE_32BIT = 0x7fffffff
} dsv3_reply_kind;

typedef struct dsv3_reply_event {
    dsv3_reply_kind kind;
    int32_t id;    /* the token that was read; each is told once, with the first event that it causes; else -1 */
    uint32_t call; /* of CALL_...: which of the reply's, from 0 */
    const char
        *text; /* whole code points, not terminated, valid during the call; empty while what comes is not certain */
    size_t len;
} dsv3_reply_event;

typedef struct dsv3_reply_opts {
    uint32_t struct_size; /* 0, or the caller's sizeof */
    dsv3_markup markup;   /* as in dsv3_chat_opts, and what the prompt was rendered with */
    bool thinking;
    bool keep_newlines; /* those that stand beside <think> and </think>: one behind the first; one before and two behind
                           the second. Default: they are no part of the text */
    const char *const *stop_strings; /* [n_stop_strings], terminated, 1 to 63 bytes, valid while the reply is read; the
                                        answer ends before the leftmost found. Looked for in the answer only */
    size_t n_stop_strings;
    bool (*event_fn)(void *user, const dsv3_reply_event *event); /* Required; false: no more events */
    void *user;
    const dsv3_tool_call *call; /* Optional: as in dsv3_chat_opts. dsv3_reply_init itself then tells its id and
                                   name, if it has one */
} dsv3_reply_opts;

/* A reply that is being read. The caller's memory, of any kind; its fields are not for use. */
typedef struct dsv3_reply {
    const dsv3_tokenizer *tokenizer;
    dsv3_reply_opts opts;
    int32_t markers[32];
    int32_t id;
    uint32_t state, n_calls, skip, n_held, n_out, n_name;
    dsv3_reply_kind out_kind;
    uint8_t utf8[4];
    char held[128], out[256], name[256];
} dsv3_reply;

/* Sets up a reply: what the model writes behind a conversation rendered with this markup and add_generation_prompt.
   tokenizer  must outlive the reply
   Errors: INVALID_ARGUMENT, INVALID_OPTIONS, TOKENIZER (as dsv3_chat_render). */
DSV3_API dsv3_result dsv3_reply_init(dsv3_reply *reply, const dsv3_tokenizer *tokenizer, const dsv3_reply_opts *opts,
                                     dsv3_error *error);

/* Reads one token; fit to be called by token_fn of dsv3_generate. False: the reply has ended, or event_fn said so. */
DSV3_API bool dsv3_reply_put(dsv3_reply *reply, int32_t token);

/* The model was stopped (length, cancellation): hands out what was held back, then END. Harmless when called again. */
DSV3_API void dsv3_reply_end(dsv3_reply *reply);
// ---- Constrained output ----------------------------------------------------------------------------------

/* A text that must be JSON, or fit a JSON Schema, as an automaton over the tokens of one tokenizer: see CONSTRAINED OUTPUT
   above. Immutable once open: share between threads freely. */
typedef struct dsv3_grammar dsv3_grammar;

typedef enum dsv3_spacing {
    DSV3_SPACING_ONE = 0,  /* one space or none behind a comma and a colon */
    DSV3_SPACING_NONE = 1, /* no white space */
    DSV3_SPACING_ANY = 2,  /* wherever JSON has it but behind the end, up to 64 bytes in a row */
    DSV3_SPACING_FORCE_32BIT = 0x7fffffff
} dsv3_spacing;

typedef struct dsv3_grammar_opts {
    uint32_t struct_size; /* 0, or the caller's sizeof */
    dsv3_spacing spacing;
    uint32_t max_depth;       /* of arrays and objects in each other, at most 64. Default: 32 */
    uint32_t max_states;      /* of strings, numbers and keys, 522 bytes each, at most 65535. Default: 8192 */
    uint64_t memory_limit;    /* bytes; 0: none */
    dsv3_allocator allocator; /* Default: malloc */
    const dsv3_grammar
        *like; /* Optional: one of the same tokenizer, closed later, whose table of tokens serves this one too:
                                 compiling takes less time and less memory */
} dsv3_grammar_opts;

enum { DSV3_GRAMMAR_DEPTH = 64, DSV3_GRAMMAR_KEYS = 160, DSV3_GRAMMAR_THREADS = 160 };

/* Where a text is: plain, copied with =, kept as long as one likes. Its fields are the library's own. */
typedef struct dsv3_grammar_frame {
    uint16_t first, n, keys, object;
    uint32_t count;
} dsv3_grammar_frame;

typedef struct dsv3_grammar_thread {
    uint32_t id, parents, count;
} dsv3_grammar_thread;

typedef struct dsv3_grammar_state {
    uint64_t hash;
    uint32_t chars;
    uint16_t place, depth, first, n_threads, n_keys, spaces;
    dsv3_grammar_frame frames[DSV3_GRAMMAR_DEPTH];
    dsv3_grammar_thread threads[DSV3_GRAMMAR_THREADS];
    uint64_t keys[DSV3_GRAMMAR_KEYS];
} dsv3_grammar_state;

/* Compiles a schema.
   grammar    out; NULL on failure
   tokenizer  must live longer
   schema     UTF-8, len bytes, not kept; NULL: any JSON value
   opts       NULL: defaults
   Errors: INVALID_ARGUMENT, INVALID_OPTIONS, JSON (`offset` is the byte), SCHEMA (the message names the keyword by its JSON
   pointer), OUT_OF_MEMORY, MEMORY_LIMIT. Any thread. */
DSV3_API dsv3_result dsv3_grammar_open(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, const char *schema,
                                       size_t len, const dsv3_grammar_opts *opts, dsv3_error *error);

/* The arguments of one of the tools: `parameters` of the function of that name; any object where it has none.
   tools      JSON, as in dsv3_chat_opts, not kept
   name       of the tool
   Errors: as dsv3_grammar_open (pointers and offsets count from the schema's beginning); INVALID_ARGUMENT where no tool has
   that name. Any thread. */
DSV3_API dsv3_result dsv3_grammar_open_tool(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, dsv3_text tools,
                                            dsv3_text name, const dsv3_grammar_opts *opts, dsv3_error *error);

/* Any of the tools: the name of one, what the markup has between, and arguments that fit that one. For prompts that end
   before the name (a call without one in dsv3_chat_opts).
   tools      JSON, as in dsv3_chat_opts, not kept; names without newline and colon
   markup     AUTO: the checkpoint's own
   Errors: as dsv3_grammar_open (pointers count from the list); INVALID_ARGUMENT where a markup has no such calls,
   TOKENIZER. The marker between name and arguments is a token: dsv3_grammar_accept_text cannot write it. Any thread. */
DSV3_API dsv3_result dsv3_grammar_open_tools(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, dsv3_text tools,
                                             dsv3_markup markup, const dsv3_grammar_opts *opts, dsv3_error *error);
DSV3_API void dsv3_grammar_close(dsv3_grammar *grammar); /* NULL is fine */

DSV3_API void dsv3_grammar_start(const dsv3_grammar *grammar, dsv3_grammar_state *state); /* nothing written yet */

/* Which tokens may come next; there always is one, until the end-of-text id has been accepted. That one (the tokenizer's
   eos) is among them where the text may end; other added tokens never are.
   mask       [(n_tokens + 31) / 32] out, bit i % 32 of word i / 32 for token i; n_tokens as in dsv3_tokenizer_info */
DSV3_API void dsv3_grammar_mask(const dsv3_grammar *grammar, const dsv3_grammar_state *state, uint32_t *mask);

/* One token more, or a text of any length (also a part of a character). False: it cannot stand here; the state is as it
   was. */
DSV3_API bool dsv3_grammar_accept(const dsv3_grammar *grammar, dsv3_grammar_state *state, int32_t token);
DSV3_API bool dsv3_grammar_accept_text(const dsv3_grammar *grammar, dsv3_grammar_state *state, const char *text,
                                       size_t len);

/* Is it a whole text that fits? (A number may still go on.) */
DSV3_API bool dsv3_grammar_can_end(const dsv3_grammar *grammar, const dsv3_grammar_state *state);

// ---- Model -----------------------------------------------------------------------------------------------

typedef struct dsv3_model dsv3_model; /* weights and tokenizer. Immutable once open: share between threads freely. */
typedef struct dsv3_session dsv3_session; /* one timeline: latent cache and logits. One thread at a time. */

typedef enum dsv3_scoring {
    DSV3_SCORING_SOFTMAX = 0,
    DSV3_SCORING_SIGMOID = 1,
    DSV3_SCORING_FORCE_32BIT = 0x7fffffff
} dsv3_scoring;

typedef enum dsv3_topk_method {
    DSV3_TOPK_GREEDY = 0,               /* V2-Lite */
    DSV3_TOPK_GROUP_LIMITED_GREEDY = 1, /* V2: a group scores by its best expert */
    DSV3_TOPK_NOAUX_TC = 2,             /* V3: a group scores by its two best, biased */
    DSV3_TOPK_METHOD_FORCE_32BIT = 0x7fffffff
} dsv3_topk_method;

/* config.json as read and checked; field names are the checkpoint's. */
typedef struct dsv3_config {
    char model_type[32];
    uint32_t vocab_size;
    uint32_t hidden_size;
    uint32_t intermediate_size;     /* dense layers */
    uint32_t moe_intermediate_size; /* one expert */
    uint32_t num_hidden_layers;
    uint32_t first_k_dense_replace; /* layers before the first MoE layer */
    uint32_t num_attention_heads;
    uint32_t q_lora_rank; /* 0: none */
    uint32_t kv_lora_rank;
    uint32_t qk_nope_head_dim;
    uint32_t qk_rope_head_dim;
    uint32_t v_head_dim;
    uint32_t n_routed_experts;
    uint32_t n_shared_experts; /* merged into one MLP of n_shared_experts * moe_intermediate_size */
    uint32_t num_experts_per_tok;
    uint32_t n_group;
    uint32_t topk_group;
    uint32_t max_position_embeddings;
    uint32_t num_nextn_predict_layers;
    dsv3_scoring scoring_func;
    dsv3_topk_method topk_method;
    bool norm_topk_prob;
    bool tie_word_embeddings;
    bool rope_interleave;
    bool rope_yarn;
    float routed_scaling_factor;
    float rms_norm_eps;
    double rope_theta;
    double rope_factor; /* YaRN; 1 without */
    double rope_beta_fast, rope_beta_slow;
    double rope_mscale, rope_mscale_all_dim; /* 0: not given */
    double rope_attention_factor;            /* 0: not given */
    uint32_t rope_original_max_position_embeddings;
    int32_t bos_token_id;    /* -1: none */
    int32_t eos_token_id[8]; /* generation_config.json, config.json and tokenizer_config.json together */
    uint32_t n_eos;
    char dtype[16];        /* "bfloat16": a hint only; every tensor says its own */
    char quant_method[32]; /* "fp8", "compressed-tensors" (W8A8), "blockwise_int8", "w8a8_int8", or "" */
    char scale_fmt[16];    /* "ue8m0", or "" */
} dsv3_config;

/* = {0} is right, and so is NULL. Every zero is the documented default. */
typedef struct dsv3_model_opts {
    uint32_t struct_size;     /* 0, or the caller's sizeof; unknown sizes are refused */
    dsv3_isa isa;             /* Default: AUTO */
    dsv3_compute compute;     /* Default: AUTO */
    bool no_mmap;             /* read the weights into memory instead of mapping them; for files of a directory */
    bool read_ahead;          /* ask the system for experts when the router has chosen them: see MEMORY above */
    bool no_mtp;              /* leave the layers of multi-token prediction alone: sessions cache a layer less */
    uint64_t memory_limit;    /* bytes this model may allocate (mapped files do not count); 0: none */
    dsv3_allocator allocator; /* Default: malloc */
    dsv3_reader reader;       /* Default: files of the directory. With a reader `dir` is ignored and may be NULL */
    dsv3_logger logger;       /* Default: silence */
    dsv3_progress progress;   /* Default: none. Units are bytes of headers and, with no_mmap, of weights */
} dsv3_model_opts;

/* What a model or a session takes. */
typedef struct dsv3_memory {
    uint64_t file_bytes;  /* tensors in the files: mapped, or, those that are used, read with no_mmap */
    uint64_t model_bytes; /* allocated by the open model, weights read with no_mmap included */
    uint64_t cache_bytes; /* a session's latent cache: whole pages */
    uint64_t
        session_bytes; /* all a session allocates when opened, cache included; generate adds the ids of a text prompt */
    uint32_t max_tokens; /* the session length this was counted for */
} dsv3_memory;

DSV3_API uint32_t dsv3_version(void);                      /* DSV3_VERSION of the linked code */
DSV3_API const char *dsv3_result_name(dsv3_result result); /* "DSV3_ERROR_JSON"; never NULL; static */
DSV3_API const char *dsv3_isa_name(dsv3_isa isa);          /* "avx2"; static */
DSV3_API bool dsv3_isa_supported(dsv3_isa isa);            /* does this CPU, and this build, have it */
DSV3_API const char *dsv3_compute_name(dsv3_compute mode); /* "bf16"; static */

/* Opens a checkpoint directory as published: config.json, model.safetensors.index.json with its shards or one
   model.safetensors, and, if there, tokenizer.json or tiktoken.model, tokenizer_config.json, chat_template.jinja,
   generation_config.json.
   Weights are mapped, not copied, not scanned. A missing or unknown tokenizer is no error: see dsv3_model_tokenizer.
   model      out; NULL on failure. Close with dsv3_model_close
   dir        UTF-8 path; may be NULL when opts->reader is given
   opts       NULL: defaults; copied
   Errors: any but those of sessions. Any thread. */
DSV3_API dsv3_result dsv3_model_open(dsv3_model **model, const char *dir, const dsv3_model_opts *opts,
                                     dsv3_error *error);
DSV3_API void dsv3_model_close(dsv3_model *model); /* NULL is fine; after its sessions */

DSV3_API const dsv3_config *dsv3_model_config(const dsv3_model *model);
DSV3_API dsv3_isa dsv3_model_isa(const dsv3_model *model);         /* what AUTO became */
DSV3_API dsv3_compute dsv3_model_compute(const dsv3_model *model); /* INT8 where AUTO was asked for */
DSV3_API uint32_t dsv3_model_mtp(const dsv3_model *model); /* layers of multi-token prediction that can be used; 0 */

/* The model's tokenizer, owned by it. TOKENIZER if the checkpoint has none that is known; the message says why. */
DSV3_API dsv3_result dsv3_model_tokenizer(const dsv3_model *model, const dsv3_tokenizer **tokenizer, dsv3_error *error);

/* Only a checkpoint's tokenizer files. Same options as a model; weights need not be there. */
DSV3_API dsv3_result dsv3_tokenizer_open(dsv3_tokenizer **tokenizer, const char *dir, const dsv3_model_opts *opts,
                                         dsv3_error *error);
DSV3_API void dsv3_tokenizer_close(dsv3_tokenizer *tokenizer); /* NULL is fine; not for a model's own */

/* Tensors of the checkpoint, by name or by number 0 ... count - 1 (in the order of the files). A weight in F8_E4M3
   or I8 carries the scales of its sibling `<name>_scale_inv` or, I8, `<name>_scale`. Views into the mapped files, valid
   until close. Where files are read, not mapped (no_mmap, read_fn), `data` of tensors that the model does not use is NULL.
   Errors: MISSING_TENSOR, INVALID_ARGUMENT. */
DSV3_API dsv3_result dsv3_model_tensor(const dsv3_model *model, const char *name, dsv3_tensor *tensor,
                                       dsv3_error *error);
DSV3_API size_t dsv3_model_tensor_count(const dsv3_model *model);
DSV3_API dsv3_result dsv3_model_tensor_at(const dsv3_model *model, size_t index, const char **name, dsv3_tensor *tensor,
                                          dsv3_error *error);

/* The name of the file that holds tensor `index`, "model-00001-of-000163.safetensors"; NULL where there is no such tensor.
   Owned by the model. */
DSV3_API const char *dsv3_model_tensor_file(const dsv3_model *model, size_t index);

// ---- Session ---------------------------------------------------------------------------------------------

enum { DSV3_PAGE_TOKENS = 64 }; /* positions of a timeline that a page of the cache holds, of all layers */

/* How numbers lie in the cache. A row is stored the same way whoever stores it, so bits of logits still depend on tokens
   and positions alone; what each costs in accuracy is in README.md. */
typedef enum dsv3_cache {
    DSV3_CACHE_AUTO = 0,
    DSV3_CACHE_F32 = 1,
    DSV3_CACHE_BF16 = 2, /* rounded to nearest even */
    DSV3_CACHE_I8 = 3,   /* 64 numbers share a scale max / 127; codes rounded to nearest even */
    DSV3_CACHE_FORCE_32BIT = 0x7fffffff
} dsv3_cache;

/* What sessions of one model may share: a fixed number of cache pages, the scratch of a pass, threads. See SESSIONS above.
   A workspace and all its sessions belong to one thread at a time; different workspaces run side by side. */
typedef struct dsv3_workspace dsv3_workspace;

typedef struct dsv3_workspace_opts {
    uint32_t struct_size;     /* 0, or the caller's sizeof */
    uint32_t n_pages;         /* of the cache, DSV3_PAGE_TOKENS positions each, at most 2^26. Default: 64 */
    uint32_t max_batch;       /* rows run at once; fixes the scratch. Default: 512 */
    uint32_t n_threads;       /* the calling one included. Default: cores of this machine. Ignored with an executor */
    dsv3_cache cache_latent;  /* Default: F32 */
    dsv3_cache cache_rope;    /* the rotated keys. Default: F32, or BF16 where cache_latent is smaller than F32 */
    uint64_t memory_limit;    /* bytes, its sessions included; 0: none */
    dsv3_executor executor;   /* Default: the workspace's own threads, asleep between calls */
    dsv3_allocator allocator; /* Default: the model's */
} dsv3_workspace_opts;

typedef struct dsv3_workspace_info {
    uint32_t n_pages;
    uint32_t n_free;     /* pages that hold nothing, those set aside included */
    uint32_t n_reserved; /* of those: set aside for sessions */
    uint32_t n_sessions;
    uint64_t page_bytes;
    uint64_t memory; /* bytes allocated, sessions included */
    dsv3_cache cache_latent, cache_rope;
} dsv3_workspace_info;

/* workspace  out; NULL on failure
   opts       NULL: defaults
   Errors: INVALID_ARGUMENT, INVALID_OPTIONS, OUT_OF_MEMORY, MEMORY_LIMIT, THREAD. Any thread. */
DSV3_API dsv3_result dsv3_workspace_open(dsv3_workspace **workspace, const dsv3_model *model,
                                         const dsv3_workspace_opts *opts, dsv3_error *error);
DSV3_API void dsv3_workspace_close(dsv3_workspace *workspace); /* NULL is fine; after its sessions */
DSV3_API void dsv3_workspace_info_get(const dsv3_workspace *workspace, dsv3_workspace_info *info);

/* How many rows went through each expert since the workspace was opened or its counts were last set to 0; a row that is run
   again, or in a pass that fails, counts too.
   counts     [n_moe_layers, n_routed_experts] out, cap of them or more (else BUFFER_TOO_SMALL)
   reset      and set them to 0
   Errors: INVALID_ARGUMENT, BUFFER_TOO_SMALL. */
DSV3_API dsv3_result dsv3_workspace_experts(dsv3_workspace *workspace, uint64_t *counts, size_t cap, bool reset,
                                            dsv3_error *error);

#define DSV3_DRAFT_AUTO 0xFFFFFFFFu

/* Who guesses tokens for dsv3_generate: see DRAFTS above. */
typedef enum dsv3_drafter {
    DSV3_DRAFTER_AUTO = 0,   /* MTP where the checkpoint has such a layer, else LOOKUP */
    DSV3_DRAFTER_MTP = 1,    /* the checkpoint's own layers of multi-token prediction */
    DSV3_DRAFTER_LOOKUP = 2, /* what followed the longest ending that the session has seen before */
    DSV3_DRAFTER_HOST = 3,   /* draft_fn */
    DSV3_DRAFTER_FORCE_32BIT = 0x7fffffff
} dsv3_drafter;

typedef struct dsv3_session_opts {
    uint32_t struct_size;     /* 0, or the caller's sizeof */
    uint32_t max_tokens;      /* length of the timeline, at most 2^30. Default: min(4096, max_position_embeddings) */
    uint32_t max_batch;       /* rows run at once, prompts are cut into such pieces; fixes the scratch. Default: 512 */
    uint32_t n_threads;       /* the calling one included. Default: cores of this machine. Ignored with an executor */
    uint64_t memory_limit;    /* bytes; 0: none */
    dsv3_executor executor;   /* Default: the session's own threads, asleep between calls */
    dsv3_allocator allocator; /* Default: the model's */
    dsv3_progress progress;   /* Default: none. Tokens done of those appended (a prompt's too), after each max_batch */
    dsv3_cache cache_latent;  /* as in dsv3_workspace_opts */
    dsv3_cache cache_rope;
    /* Optional: one that is shared, of the same model. It has what max_batch to allocator and the cache types say, which
       are ignored then. Default: a workspace of the session's own, with pages for max_tokens */
    dsv3_workspace *workspace;
    uint32_t reserve_pages; /* with a workspace: pages set aside for this session (CACHE_FULL if there are fewer) */
    uint32_t n_draft;       /* tokens that dsv3_generate guesses and verifies in one pass, at most 16. Default: none.
                                 DSV3_DRAFT_AUTO: as many as have paid so far */
    dsv3_drafter drafter;   /* Default: AUTO. INVALID_OPTIONS: MTP without such a layer */
    /* DSV3_DRAFTER_HOST: writes up to `cap` guesses behind tokens [n_tokens], returns how many. Anything may be guessed */
    size_t (*draft_fn)(void *user, const int32_t *tokens, size_t n_tokens, int32_t *draft, size_t cap);
    void *draft_user;
} dsv3_session_opts;

/* What an append gives back beside the session's own logits; every field optional. */
typedef struct dsv3_outputs {
    uint32_t struct_size;       /* 0, or the caller's sizeof */
    const uint32_t *logit_rows; /* [n_logit_rows] which of the appended tokens, ascending; NULL: all of them */
    size_t n_logit_rows;        /* with logit_rows */
    float *logits;              /* [n_logit_rows (or count), vocab_size] out */
    int32_t *experts; /* [count, n_moe_layers, num_experts_per_tok] out, ascending ids in each; MoE layers only */
    /* [count, dsv3_model_mtp, vocab_size] out: what prediction layer k says of the token that comes next too, but from the
       model's state k + 1 tokens before; zeros where there is none. The session must draft with MTP */
    float *draft_logits;
} dsv3_outputs;

/* Errors: INVALID_ARGUMENT, INVALID_OPTIONS, OUT_OF_MEMORY, MEMORY_LIMIT, THREAD, CACHE_FULL. */
DSV3_API dsv3_result dsv3_session_open(dsv3_session **session, const dsv3_model *model, const dsv3_session_opts *opts,
                                       dsv3_error *error);
DSV3_API void dsv3_session_close(dsv3_session *session); /* NULL is fine */

/* A second session with the same tokens, in the same workspace: it shares all pages of the cache, and the logits, and
   copies none. A page that is shared is copied by the first that writes into it. The fork has the parent's max_tokens and
   progress.
   child          out; NULL on failure
   reserve_pages  as in dsv3_session_opts, also of a session's own workspace
   Errors: INVALID_ARGUMENT, OUT_OF_MEMORY, MEMORY_LIMIT, CACHE_FULL. Thread: the workspace's. */
DSV3_API dsv3_result dsv3_session_fork(dsv3_session **child, dsv3_session *parent, uint32_t reserve_pages,
                                       dsv3_error *error);

DSV3_API dsv3_workspace *dsv3_session_workspace(const dsv3_session *session); /* its own, or the one it shares */

/* What dsv3_session_open with these options would take; opts NULL: defaults. Allocates nothing. With a workspace: what the
   session adds to it, cache_bytes 0. */
DSV3_API dsv3_result dsv3_session_memory(const dsv3_model *model, const dsv3_session_opts *opts, dsv3_memory *memory,
                                         dsv3_error *error);

/* Runs `count` tokens behind those the session holds. On failure the session is as it was before the call, and what
   `outputs` points to may be partly written.
   tokens     [count], each 0 <= id < vocab_size
   outputs    NULL, or what else is wanted
   Errors: INVALID_ARGUMENT, INVALID_OPTIONS, CONTEXT_FULL, CACHE_FULL (a shared workspace, or a forked session's),
   CANCELLED, BAD_TENSOR (logits not finite; the message names the tensor). Callbacks that a session calls may themselves
   call only dsv3_session_cancel on it, and nothing on others of its workspace. */
DSV3_API dsv3_result dsv3_session_append(dsv3_session *session, const int32_t *tokens, size_t count,
                                         const dsv3_outputs *outputs, dsv3_error *error);

/* What dsv3_batch appends to one session: as dsv3_session_append. A count of 0 only brings its logits up to date. */
typedef struct dsv3_batch_item {
    dsv3_session *session;
    const int32_t *tokens; /* [count] */
    size_t count;
    const dsv3_outputs *outputs; /* Optional */
} dsv3_batch_item;

/* Appends to any number of sessions of one workspace, each by any number of tokens: the rows of all go through the weights
   together (max_batch at a time), and each session gets the bits it would get alone. All of it happens or nothing: on
   failure every session is as it was; the message names the item. A session whose cancel comes ends the call for all.
   items      [n_items], no session twice; those of a session's own workspace: it and its forks
   Errors: as dsv3_session_append. */
DSV3_API dsv3_result dsv3_batch(const dsv3_batch_item *items, size_t n_items, dsv3_error *error);

/* Makes the session hold these tokens: keeps what both begin with, drops the rest, appends what is new. On failure the
   session has the tokens it had, of which those behind the common beginning are run again when they are needed.
   tokens     [count]
   kept       out, may be NULL: the length of the common beginning
   Errors: as dsv3_session_append. */
DSV3_API dsv3_result dsv3_session_sync(dsv3_session *session, const int32_t *tokens, size_t count, size_t *kept,
                                       dsv3_error *error);

/* Forgets all behind the first n_tokens. INVALID_ARGUMENT if there are fewer. The last token kept is run again, with
   the same bits, when logits are next needed. Pages that hold nothing any more go back to the workspace. */
DSV3_API dsv3_result dsv3_session_rewind(dsv3_session *session, size_t n_tokens, dsv3_error *error);

DSV3_API size_t dsv3_session_length(const dsv3_session *session);
DSV3_API const int32_t *
dsv3_session_tokens(const dsv3_session *session); /* [dsv3_session_length], until the next change */

/* logits: out, [vocab_size] of the last token, owned by the session, until its next change.
   The next append, rewind or generate, failed ones too, ends the pointer's life.
   Errors: INVALID_ARGUMENT for an empty session; as append when the last token must be run again. */
DSV3_API dsv3_result dsv3_session_logits(dsv3_session *session, const float **logits, dsv3_error *error);

/* From any thread, or a signal handler: the call that is running tokens returns DSV3_ERROR_CANCELLED within one layer. If
   none is, the next one that runs tokens does. */
DSV3_API void dsv3_session_cancel(dsv3_session *session);

/* Where a snapshot goes to and comes from, front to back. A callback that returns false ends the call: DSV3_ERROR_IO. */
typedef struct dsv3_sink {
    bool (*write_fn)(void *user, const void *data, size_t size); /* all of it */
    void *user;
} dsv3_sink;

typedef struct dsv3_source {
    bool (*read_fn)(void *user, void *data, size_t size); /* exactly `size` bytes */
    void *user;
    uint64_t size; /* of the snapshot, in bytes; 0: not known, and what lies behind it is not looked at */
} dsv3_source;

/* Writes sessions of one workspace down: their tokens and the rows of their caches, a page that several share once. The
   same tokens sampled from with the same options go on the same way: no other state is needed.
   sessions   [n], none twice
   sink       NULL: only measures
   size       out, may be NULL: bytes of the snapshot
   Errors: INVALID_ARGUMENT, IO. Allocates nothing. */
DSV3_API dsv3_result dsv3_save(dsv3_session *const *sessions, size_t n, const dsv3_sink *sink, uint64_t *size,
                               dsv3_error *error);

/* Reads a snapshot of n sessions into these n, in place of what they hold, which they keep until all was read and is right:
   there must be free pages for it. It must be of the same model (settings, tensors, and samples of weights agree), computed
   in the same dsv3_compute, with the same types of cache; logits then have the bits they had.
   sessions   [n] of one workspace, none twice, each with room for its tokens
   Errors: INVALID_ARGUMENT, IO, TRUNCATED, SNAPSHOT, CONTEXT_FULL, CACHE_FULL, OUT_OF_MEMORY, MEMORY_LIMIT. On failure the
   sessions are as they were. */
DSV3_API dsv3_result dsv3_load(dsv3_session *const *sessions, size_t n, const dsv3_source *source, dsv3_error *error);

// ---- Sampling and generation -----------------------------------------------------------------------------

/* = {0} is greedy. Filters apply in this order: penalties, temperature, top-k, top-p, min-p. A zero switches one off. */
typedef struct dsv3_sample_opts {
    uint32_t struct_size; /* 0, or the caller's sizeof */
    float temperature;    /* 0: greedy */
    uint32_t top_k;       /* keep the k most likely */
    float top_p;          /* keep the likeliest whose sum reaches top_p */
    float min_p;          /* drop what is less likely than min_p times the likeliest */
    float
        repetition_penalty; /* > 1 divides (multiplies, if negative) logits of tokens already in the session; 0 or 1: off */
    float presence_penalty; /* taken from logits of tokens already in the session */
    uint64_t seed;          /* the random number of a token is a function of (seed, position) */
    /* Optional: [(vocab_size + 31) / 32] what may be picked, bit i % 32 of word i / 32 for token i. It comes before all
       else: the logits of the others are -infinity. INVALID_ARGUMENT if it allows none. */
    const uint32_t *mask;
} dsv3_sample_opts;

typedef struct dsv3_sample {
    int32_t token;
    float logprob; /* natural log of its probability under the model, before any filter */
} dsv3_sample;

/* The checkpoint's own sampling (generation_config.json): greedy if it has none or says do_sample false. */
DSV3_API void dsv3_model_sampling(const dsv3_model *model, dsv3_sample_opts *opts);

/* Picks a token from the session's logits; does not append it. opts NULL: greedy. The result depends on the logits,
   the options, the position and, with penalties, the tokens the session holds, and on nothing else. Ids that the
   tokenizer (if there is one) does not know are never picked.
   Errors: as dsv3_session_logits, INVALID_OPTIONS. */
DSV3_API dsv3_result dsv3_session_sample(dsv3_session *session, const dsv3_sample_opts *opts, dsv3_sample *sample,
                                         dsv3_error *error);

/* The k likeliest next tokens, likeliest first (the lower id first where equal).
   samples    [k] out, 1 <= k <= vocab_size
   Errors: INVALID_ARGUMENT; as dsv3_session_logits. */
DSV3_API dsv3_result dsv3_session_logprobs(dsv3_session *session, size_t k, dsv3_sample *samples, dsv3_error *error);

typedef enum dsv3_stop {
    DSV3_STOP_NONE = 0,
    DSV3_STOP_EOS = 1,    /* an end-of-text id of the checkpoint */
    DSV3_STOP_TOKEN = 2,  /* one of opts->stop_tokens */
    DSV3_STOP_STRING = 3, /* one of opts->stop_strings */
    DSV3_STOP_MAX_TOKENS = 4,
    DSV3_STOP_CONTEXT = 5,  /* the session is full */
    DSV3_STOP_CALLBACK = 6, /* token_fn said so */
    DSV3_STOP_CANCELLED = 7,
    DSV3_STOP_GRAMMAR = 8, /* the text is complete, nothing can follow, and there is no end-of-text id to say so */
    DSV3_STOP_FORCE_32BIT = 0x7fffffff
} dsv3_stop;

/* A generated token, as handed to token_fn. */
typedef struct dsv3_token {
    int32_t id; /* -1 in the last call, if it only brings text that had been held back */
    float logprob;
    const char *text; /* whole code points that are now certain; often the token's own text, empty while a character or
                          a possible stop string is incomplete. Not terminated. Valid during the call */
    size_t len;
} dsv3_token;

typedef struct dsv3_generate_opts {
    uint32_t struct_size;       /* 0, or the caller's sizeof */
    uint32_t max_tokens;        /* 0: until a stop or the session is full */
    dsv3_sample_opts sample;    /* {0}: greedy */
    bool no_bos;                /* do not put the begin-of-text id in front of a prompt that starts a session */
    bool parse_markers;         /* markers written in the prompt become their ids (DSV3_TOKENIZE_MARKERS) */
    bool ignore_eos;            /* go on behind the checkpoint's end-of-text ids */
    const int32_t *stop_tokens; /* [n_stop_tokens]; the token that stops is appended, its text not handed out */
    size_t n_stop_tokens;
    const char *const
        *stop_strings; /* [n_stop_strings], terminated, 1 to 255 bytes; the text ends before the first found */
    size_t n_stop_strings;
    bool (*token_fn)(void *user, const dsv3_token *token); /* Optional: every token as it comes; false stops */
    void *user;
    /* Optional, of the model's own tokenizer: what is generated fits it, from its beginning. It may end where a text
       that fits does, with a stop token or one of the checkpoint's end-of-text ids (not with ignore_eos); cut short, by
       max_tokens for one, it is the beginning of a text that fits. */
    const dsv3_grammar *grammar;
    /* Optional: writes which tokens may come next, as dsv3_sample_opts.mask, which it finds all zero. With a grammar: what
       both allow. tokens [n_tokens]: all of the session's. It may only cancel the session; false: CANCELLED. */
    bool (*mask_fn)(void *user, const int32_t *tokens, size_t n_tokens, uint32_t *mask);
} dsv3_generate_opts;

typedef struct dsv3_stats {
    uint64_t n_prompt; /* tokens appended from the prompt */
    uint64_t n_generated;
    double prompt_seconds; /* appending the prompt */
    double decode_seconds; /* everything behind it */
    dsv3_stop stop;
    uint64_t drafted;     /* tokens guessed and verified */
    uint64_t accepted;    /* of them, those that were right */
    double draft_seconds; /* of decode_seconds, making the guesses */
} dsv3_stats;

/* The one call: appends the prompt and continues it, token by token, into the session.
   prompt     UTF-8, len bytes; NULL: go on from what the session holds. BOS is put in front of a first prompt where
              the checkpoint asks for it
   stats      out, may be NULL; filled on failure too
   Every generated token is in the session when it returns, the one that stopped it too. On failure in the middle, what was
   generated so far stays.
   Errors: INVALID_ARGUMENT, INVALID_OPTIONS, CONTEXT_FULL (the prompt does not fit), TOKENIZER (a prompt without a
   tokenizer), CANCELLED, BAD_TENSOR, OUT_OF_MEMORY and MEMORY_LIMIT (tokenizing a prompt only). */
DSV3_API dsv3_result dsv3_generate(dsv3_session *session, const char *prompt, size_t len,
                                   const dsv3_generate_opts *opts, dsv3_stats *stats, dsv3_error *error);

#ifdef __cplusplus
}
#endif
#endif // DSV3_H
#ifdef DSV3_IMPLEMENTATION
#ifndef DSV3__IMPLEMENTED
#define DSV3__IMPLEMENTED

// =============================================================================
// >>base   Compiler, architecture, sizes, unaligned little-endian loads.
//          Needs nothing. Every other section stands on it.
// =============================================================================

#ifdef __FAST_MATH__
#error "dsv3.h promises bits: compile it without -ffast-math"
#endif

#include <math.h>
#include <string.h>
#ifndef DSV3_MALLOC
#include <stdlib.h>
#endif
#ifndef DSV3_ASSERT
#include <assert.h>
#define DSV3_ASSERT(c) assert(c)
#endif

/* a * b + c must stay two roundings wherever fmaf is not written: a host compiles this with flags of its own. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off", \
                     "align-loops=64") /* PERF: tiles 0.71 of the FMA peak if gcc puts them anywhere, 0.86 so */
#endif

#if defined(__x86_64__) || defined(_M_X64)
#define DSV3__X64 1
#else
#define DSV3__X64 0
#endif
#if defined(__BYTE_ORDER__) && defined(__ORDER_BIG_ENDIAN__)
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#error "dsv3.h reads little-endian files in place: big-endian machines are not supported"
#endif
#endif

#if defined(__GNUC__)
#define DSV3__INLINE      static inline __attribute__((always_inline))
#define DSV3__NOINLINE    __attribute__((noinline))
#define DSV3__RESTRICT    __restrict__
#define DSV3__TARGET(isa) __attribute__((target(isa)))
#define DSV3__FETCH(p)    __builtin_prefetch((p), 0, 2) /* the line of p, near but not into L1 */
#define DSV3__LIKELY(c)   __builtin_expect(!!(c), 1)
#define DSV3__UNLIKELY(c) __builtin_expect(!!(c), 0)
#else
#define DSV3__INLINE static inline
#define DSV3__NOINLINE
#define DSV3__RESTRICT
#define DSV3__TARGET(isa)
#define DSV3__FETCH(p)    ((void)(p))
#define DSV3__LIKELY(c)   (c)
#define DSV3__UNLIKELY(c) (c)
#endif

#define DSV3__COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Bytes of a file, or of a name in it: pointer and length, not terminated. */
typedef struct dsv3__str {
    const char *p;
    size_t n;
} dsv3__str;

DSV3__INLINE size_t dsv3__min(size_t a, size_t b)
{
    return a < b ? a : b;
}

DSV3__INLINE uint64_t dsv3__ceil_div(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* *out = a * b; false if it does not fit. Every product of numbers from a file goes through here. */
static bool dsv3__mul(uint64_t a, uint64_t b, uint64_t *out)
{
    *out = a * b;
    return a == 0 || *out / a == b;
}

static bool dsv3__add(uint64_t a, uint64_t b, uint64_t *out)
{
    *out = a + b;
    return *out >= a;
}

/* safetensors promises no alignment: scalars from files are loaded with memcpy. */
DSV3__INLINE uint16_t dsv3__load16(const void *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

DSV3__INLINE uint32_t dsv3__load32(const void *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

DSV3__INLINE uint64_t dsv3__load64(const void *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

DSV3__INLINE float dsv3__bits_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

DSV3__INLINE uint32_t dsv3__float_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

/* FNV-1a, 64 bits, for the name tables. `seed` differs from run to run: no file can be made of names that collide. */
static uint64_t dsv3__hash(uint64_t seed, const void *data, size_t n)
{
    const uint8_t *p = (const uint8_t *)data;
    uint64_t h = 14695981039346656037ull ^ seed * 0x9E3779B97F4A7C15ull;
    for (size_t i = 0; i < n; i++)
        h = (h ^ p[i]) * 1099511628211ull;
    return h ^ (h >> 32);
}

/* DATA PATH: bytes to text, each line a function below and the shape that crosses.
     dsv3__st_open       files -> names, dtypes, shapes, offsets
     dsv3__wt_bind       names -> views of the weights, shapes checked
     dsv3_tokenize       text -> ids [n]
     dsv3_batch          ids [n] of each session -> rows of at most max_batch, together
     dsv3__fwd_rows      rows [n] -> hidden state [n, hidden_size]
       dsv3__nn_rmsnorm    x [n, hidden_size] -> the same, normalised
       dsv3__mla_forward   [n, hidden_size] -> [n, hidden_size]; writes one latent and one k_pe a row into the cache
       dsv3__moe_forward   [n, hidden_size] -> [n, hidden_size]; a dense layer is one MLP for all rows
     dsv3__fwd_logits    hidden state of the rows that ask -> logits [n, vocab_size]
     dsv3__mtp_guess     state and token [1] -> logits of the token after next, for dsv3__gen_draft: ids to verify
     dsv3_grammar_mask   a place in a text that must fit a schema -> the tokens that may come, a bit each
     dsv3__smp_pick      logits [vocab_size] -> a token
     dsv3_token_bytes    a token -> bytes */

// =============================================================================
// >>err   How a failure is told: one struct, one formatter, no stdio.
//         All failures pass through dsv3__err_set: the place for a breakpoint.
// =============================================================================

/* Internal calls take `err`, never NULL (the public ones supply one), and return a result. */
#define DSV3__TRY(call)                  \
    do {                                 \
        dsv3_result try_result = (call); \
        if (DSV3__UNLIKELY(try_result))  \
            return try_result;           \
    } while (0)

/* return DSV3__FAIL(err, DSV3_ERROR_JSON, "%s: expected %s", file, what); */
#define DSV3__FAIL(err, code, ...)            dsv3__err_set((err), (code), __LINE__, 0, __VA_ARGS__)
#define DSV3__FAIL_AT(err, code, offset, ...) dsv3__err_set((err), (code), __LINE__, (offset), __VA_ARGS__)

#include <stdarg.h>

typedef struct dsv3__out {
    char *p;
    size_t n, cap; /* cap leaves room for the terminator */
} dsv3__out;

/* Anything may stand in a name from a file: control characters are shown as '?'. */
static void dsv3__out_bytes(dsv3__out *o, const char *s, size_t n)
{
    for (size_t i = 0; i < n && o->n < o->cap; i++)
        o->p[o->n++] = (unsigned char)s[i] < 0x20 || s[i] == 0x7f ? '?' : s[i];
}

static void dsv3__out_uint(dsv3__out *o, uint64_t v)
{
    char digits[20];
    size_t n = 0;
    do
        digits[n++] = (char)('0' + v % 10);
    while (v /= 10);
    while (n)
        dsv3__out_bytes(o, &digits[--n], 1);
}

static void dsv3__out_double(dsv3__out *o, double v)
{
    int exponent = 0;
    if (v != v) {
        dsv3__out_bytes(o, "nan", 3);
        return;
    }
    if (v < 0) {
        dsv3__out_bytes(o, "-", 1);
        v = -v;
    }
    if (v > 1.7e308) {
        dsv3__out_bytes(o, "inf", 3);
        return;
    }
    if (v >= 1e6)
        for (; v >= 10; v /= 10)
            exponent++;
    if (v != 0 && v < 1e-3)
        for (; v < 1 - 1e-9; v *= 10) /* 1e-5 ends as 0.99999999999999989, and is to read 1e-5 */
            exponent--;
    v += v * 1e-12;
    dsv3__out_uint(o, (uint64_t)v);
    v -= (double)(uint64_t)v;
    if (v > 5e-7) {
        uint64_t digits = (uint64_t)(v * 1e6 + 0.5);
        if (digits > 999999)
            digits = 999999;
        dsv3__out_bytes(o, ".", 1);
        for (uint64_t unit = 100000; digits && unit; digits %= unit, unit /= 10) {
            char c = (char)('0' + digits / unit);
            dsv3__out_bytes(o, &c, 1);
        }
    }
    if (exponent) {
        dsv3__out_bytes(o, exponent < 0 ? "e-" : "e", exponent < 0 ? 2 : 1);
        dsv3__out_uint(o, (uint64_t)(exponent < 0 ? -exponent : exponent));
    }
}

/* %s terminated string, %S dsv3__str *, %u uint64_t, %d int64_t, %f double, %D const uint64_t * and uint32_t: a shape.
   Integers must be cast to the 64-bit type. Returns the length; text that does not fit is cut between code points. */
static size_t dsv3__format_va(char *buffer, size_t size, const char *format, va_list args)
{
    dsv3__out o;
    o.p = buffer, o.n = 0, o.cap = size - 1;
    for (const char *f = format; *f; f++) {
        if (*f != '%') {
            dsv3__out_bytes(&o, f, 1);
            continue;
        }
        switch (*++f) {
        case 's': {
            const char *s = va_arg(args, const char *);
            dsv3__out_bytes(&o, s, strlen(s));
            break;
        }
        case 'S': {
            const dsv3__str *s = va_arg(args, const dsv3__str *);
            dsv3__out_bytes(&o, s->p, s->n);
            break;
        }
        case 'u': dsv3__out_uint(&o, va_arg(args, uint64_t)); break;
        case 'd': {
            int64_t v = va_arg(args, int64_t);
            if (v < 0)
                dsv3__out_bytes(&o, "-", 1);
            dsv3__out_uint(&o, v < 0 ? (uint64_t)0 - (uint64_t)v : (uint64_t)v);
            break;
        }
        case 'f': dsv3__out_double(&o, va_arg(args, double)); break;
        case 'D': {
            const uint64_t *shape = va_arg(args, const uint64_t *);
            uint32_t rank = va_arg(args, uint32_t);
            dsv3__out_bytes(&o, "[", 1);
            for (uint32_t i = 0; i < rank; i++) {
                dsv3__out_bytes(&o, ", ", i ? 2 : 0);
                dsv3__out_uint(&o, shape[i]);
            }
            dsv3__out_bytes(&o, "]", 1);
            break;
        }
        default: dsv3__out_bytes(&o, f, 1);
        }
    }
    if (o.n == o.cap) { /* perhaps cut: drop an incomplete last code point */
        size_t lead = o.n;
        while (lead > 0 && ((unsigned char)buffer[lead - 1] & 0xC0) == 0x80)
            lead--;
        if (lead > 0 && (unsigned char)buffer[lead - 1] >= 0xC0) {
            unsigned char c = (unsigned char)buffer[lead - 1];
            size_t want = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : 2;
            if (o.n - (lead - 1) < want)
                o.n = lead - 1;
        }
    }
    buffer[o.n] = 0;
    return o.n;
}

static size_t dsv3__format(char *buffer, size_t size, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    size_t n = dsv3__format_va(buffer, size, format, args);
    va_end(args);
    return n;
}

static DSV3__NOINLINE dsv3_result dsv3__err_set(dsv3_error *err, dsv3_result code, int line, uint64_t offset,
                                                const char *format, ...)
{
    va_list args;
    va_start(args, format);
    err->code = code;
    err->line = (uint32_t)line;
    err->offset = offset;
    dsv3__format_va(err->message, sizeof err->message, format, args);
    va_end(args);
    return code;
}

static void dsv3__err_clear(dsv3_error *err)
{
    err->code = DSV3_OK;
    err->line = 0;
    err->offset = 0;
    err->message[0] = 0;
}

static void dsv3__log(const dsv3_logger *logger, dsv3_log_level level, const char *format, ...)
{
    char message[512];
    va_list args;
    if (!logger->fn)
        return;
    va_start(args, format);
    dsv3__format_va(message, sizeof message, format, args);
    va_end(args);
    logger->fn(logger->user, level, message);
}

DSV3_API const char *dsv3_result_name(dsv3_result result)
{
    switch (result) {
#define DSV3__NAME(name) \
    case name: return #name;
        DSV3__NAME(DSV3_OK)
        DSV3__NAME(DSV3_ERROR_INVALID_ARGUMENT)
        DSV3__NAME(DSV3_ERROR_INVALID_OPTIONS)
        DSV3__NAME(DSV3_ERROR_OUT_OF_MEMORY)
        DSV3__NAME(DSV3_ERROR_MEMORY_LIMIT)
        DSV3__NAME(DSV3_ERROR_BUFFER_TOO_SMALL)
        DSV3__NAME(DSV3_ERROR_CONTEXT_FULL)
        DSV3__NAME(DSV3_ERROR_CANCELLED)
        DSV3__NAME(DSV3_ERROR_CACHE_FULL)
        DSV3__NAME(DSV3_ERROR_FILE_NOT_FOUND)
        DSV3__NAME(DSV3_ERROR_IO)
        DSV3__NAME(DSV3_ERROR_TRUNCATED)
        DSV3__NAME(DSV3_ERROR_JSON)
        DSV3__NAME(DSV3_ERROR_SAFETENSORS)
        DSV3__NAME(DSV3_ERROR_SNAPSHOT)
        DSV3__NAME(DSV3_ERROR_UNSUPPORTED_MODEL)
        DSV3__NAME(DSV3_ERROR_MISSING_TENSOR)
        DSV3__NAME(DSV3_ERROR_BAD_TENSOR)
        DSV3__NAME(DSV3_ERROR_TOKENIZER)
        DSV3__NAME(DSV3_ERROR_SCHEMA)
        DSV3__NAME(DSV3_ERROR_UNSUPPORTED_CPU)
        DSV3__NAME(DSV3_ERROR_THREAD)
        DSV3__NAME(DSV3_ERROR_FEATURE_DISABLED)
#undef DSV3__NAME
    default: return "DSV3_ERROR_?";
    }
}

DSV3_API uint32_t dsv3_version(void)
{
    return DSV3_VERSION;
}

// =============================================================================
// >>mem   The caller's allocator, 64-byte alignment, a limit in bytes.
//         Every allocation of the library goes through dsv3__mem_alloc.
// =============================================================================

/* One per model and one per session; not shared between threads that allocate. */
typedef struct dsv3__mem {
    dsv3_allocator allocator;
    uint64_t used, limit; /* bytes; limit 0: none */
} dsv3__mem;

/* In front of each block, so that blocks stay 64-aligned and know their size. */
#define DSV3__MEM_HEADER 64

#ifndef DSV3_MALLOC
/* malloc with alignment: over-allocate and remember the distance in the byte before. align <= 64. */
static void *dsv3__mem_default_alloc(void *user, size_t size, size_t align)
{
    (void)user;
    if (size > SIZE_MAX - align)
        return NULL;
    uint8_t *raw = (uint8_t *)malloc(size + align);
    if (!raw)
        return NULL;
    size_t shift = align - ((uintptr_t)raw & (align - 1));
    raw[shift - 1] = (uint8_t)shift;
    return raw + shift;
}

static void dsv3__mem_default_free(void *user, void *ptr, size_t size)
{
    (void)user, (void)size;
    free((uint8_t *)ptr - ((uint8_t *)ptr)[-1]);
}
#else
static void *dsv3__mem_default_alloc(void *user, size_t size, size_t align)
{
    (void)user;
    return DSV3_MALLOC(size, align);
}

static void dsv3__mem_default_free(void *user, void *ptr, size_t size)
{
    (void)user, (void)size;
    DSV3_FREE(ptr);
}
#endif

static void dsv3__mem_init(dsv3__mem *mem, const dsv3_allocator *allocator, uint64_t limit)
{
    mem->used = 0;
    mem->limit = limit;
    if (allocator && allocator->alloc_fn) {
        mem->allocator = *allocator;
    } else {
        mem->allocator.alloc_fn = dsv3__mem_default_alloc;
        mem->allocator.free_fn = dsv3__mem_default_free;
        mem->allocator.user = NULL;
    }
}

/* *ptr = `size` bytes, 64-aligned, not cleared; NULL on failure. `what` names them in the message. */
static dsv3_result dsv3__mem_alloc(dsv3__mem *mem, void **ptr, uint64_t size, const char *what, dsv3_error *err)
{
    *ptr = NULL;
    if (size > SIZE_MAX - DSV3__MEM_HEADER)
        return DSV3__FAIL(err, DSV3_ERROR_OUT_OF_MEMORY, "%s: %u bytes are more than this machine can address", what,
                          size);
    if (mem->limit && (size + DSV3__MEM_HEADER > mem->limit || mem->used > mem->limit - size - DSV3__MEM_HEADER))
        return DSV3__FAIL(err, DSV3_ERROR_MEMORY_LIMIT,
                          "%s: %u bytes more than the %u in use would pass memory_limit %u", what, size, mem->used,
                          mem->limit);
    size_t total = (size_t)size + DSV3__MEM_HEADER;
    uint8_t *block = (uint8_t *)mem->allocator.alloc_fn(mem->allocator.user, total, 64);
    if (!block)
        return DSV3__FAIL(err, DSV3_ERROR_OUT_OF_MEMORY, "%s: the allocator has no %u bytes", what, (uint64_t)total);
    memcpy(block, &total, sizeof total);
    mem->used += total;
    *ptr = block + DSV3__MEM_HEADER;
    return DSV3_OK;
}

static void dsv3__mem_free(dsv3__mem *mem, const void *ptr)
{
    if (!ptr)
        return;
    uint8_t *block = (uint8_t *)(uintptr_t)ptr - DSV3__MEM_HEADER;
    size_t total;
    memcpy(&total, block, sizeof total);
    mem->used -= total;
    mem->allocator.free_fn(mem->allocator.user, block, total);
}

/* Makes room in *array for `want` elements of `size` bytes: *cap rises at least by half. The `used` elements stay. */
static dsv3_result dsv3__mem_grow(dsv3__mem *mem, void **array, uint64_t *cap, uint64_t used, uint64_t want,
                                  size_t size, const char *what, dsv3_error *err)
{
    void *bigger;
    uint64_t n = *cap + *cap / 2 + 16, bytes;
    if (want <= *cap)
        return DSV3_OK;
    if (n < want)
        n = want;
    if (!dsv3__mul(n, size, &bytes))
        return DSV3__FAIL(err, DSV3_ERROR_OUT_OF_MEMORY, "%s: too many", what);
    DSV3__TRY(dsv3__mem_alloc(mem, &bigger, bytes, what, err));
    if (used)
        memcpy(bigger, *array, (size_t)used * size);
    dsv3__mem_free(mem, *array);
    *array = bigger;
    *cap = n;
    return DSV3_OK;
}
// =============================================================================
// >>os   The default reader (a directory, mapped), time, number of cores.
//        Operating system headers are included here and in >>thr, nowhere else but for one line of >>cpu.
// =============================================================================

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#endif

/* Seconds from an arbitrary start. */
static double dsv3__os_seconds(void)
{
#if defined(_WIN32)
    LARGE_INTEGER now, rate;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&rate);
    return (double)now.QuadPart / (double)rate.QuadPart;
#elif defined(CLOCK_MONOTONIC)
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
#else
    return (double)time(NULL); /* a strict mode hid the clock */
#endif
}

#ifndef DSV3_NO_THREADS
static uint32_t dsv3__os_cores(void)
{
#if defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwNumberOfProcessors ? (uint32_t)info.dwNumberOfProcessors : 1;
#else
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n > 0 && n < 65536 ? (uint32_t)n : 1;
#endif
}
#endif

/* Asks for bytes of a mapped file before they are used, and does not wait for them. Where there is no such advice: nothing.
   In steps, because Linux cuts each call off at the device's readahead, 128 kB unless it was raised. Not for what is in
   memory already: the system looks at each page. */
static void dsv3__os_will_need(const void *data, uint64_t size)
{
#if !defined(_WIN32) && defined(MADV_WILLNEED)
    const size_t step = (size_t)128 << 10;
    uintptr_t at = (uintptr_t)data & ~((uintptr_t)sysconf(_SC_PAGESIZE) - 1), end = (uintptr_t)data + (size_t)size;
    for (; at < end; at += step)
        madvise((void *)at, end - at < step ? end - at : step, MADV_WILLNEED);
#else
    (void)data, (void)size;
#endif
}

/* The default reader's `user`. */
typedef struct dsv3__os_dir {
    const char *path; /* the caller's, alive during open; files keep no reference to it */
    bool no_mmap;
} dsv3__os_dir;

#ifndef DSV3_NO_STDIO

#define DSV3__OS_PATH_MAX 4096

static bool dsv3__os_join(char *out, const char *dir, const char *name)
{
    size_t n = strlen(dir), m = strlen(name);
    if (n + m + 2 > DSV3__OS_PATH_MAX)
        return false;
    memcpy(out, dir, n);
    if (n && out[n - 1] != '/')
        out[n++] = '/';
    memcpy(out + n, name, m + 1);
    return true;
}

#if defined(_WIN32)

static dsv3_result dsv3__os_open(void *user, const char *name, dsv3_file *file)
{
    const dsv3__os_dir *dir = (const dsv3__os_dir *)user;
    char path[DSV3__OS_PATH_MAX];
    wchar_t wide[DSV3__OS_PATH_MAX];
    LARGE_INTEGER size;
    if (!dsv3__os_join(path, dir->path, name) ||
        !MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, DSV3__OS_PATH_MAX))
        return DSV3_ERROR_FILE_NOT_FOUND;
    HANDLE h = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    if (h == INVALID_HANDLE_VALUE)
        return GetLastError() == ERROR_FILE_NOT_FOUND || GetLastError() == ERROR_PATH_NOT_FOUND
                   ? DSV3_ERROR_FILE_NOT_FOUND
                   : DSV3_ERROR_IO;
    if (GetFileType(h) != FILE_TYPE_DISK || !GetFileSizeEx(h, &size)) {
        CloseHandle(h);
        return DSV3_ERROR_IO;
    }
    file->size = (uint64_t)size.QuadPart;
    file->data = NULL;
    file->handle = (void *)h;
    if (dir->no_mmap || file->size == 0)
        return DSV3_OK;
    HANDLE mapping = CreateFileMappingW(h, NULL, PAGE_READONLY, 0, 0, NULL);
    if (mapping) {
        file->data = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
        CloseHandle(mapping); /* the view keeps it */
    }
    CloseHandle(h);
    file->handle = NULL;
    return file->data ? DSV3_OK : DSV3_ERROR_IO;
}

static dsv3_result dsv3__os_read(void *user, dsv3_file *file, uint64_t offset, void *dst, size_t size)
{
    uint8_t *p = (uint8_t *)dst;
    (void)user;
    while (size) {
        OVERLAPPED at;
        DWORD got = 0, want = size > 1u << 30 ? 1u << 30 : (DWORD)size;
        memset(&at, 0, sizeof at);
        at.Offset = (DWORD)offset;
        at.OffsetHigh = (DWORD)(offset >> 32);
        if (!ReadFile((HANDLE)file->handle, p, want, &got, &at) || !got)
            return DSV3_ERROR_IO;
        p += got, offset += got, size -= got;
    }
    return DSV3_OK;
}

static void dsv3__os_close(void *user, dsv3_file *file)
{
    (void)user;
    if (file->data)
        UnmapViewOfFile(file->data);
    else
        CloseHandle((HANDLE)file->handle);
}

#else

#ifndef O_CLOEXEC
#define O_CLOEXEC 0
#endif
#ifndef O_NONBLOCK
#define O_NONBLOCK 0
#endif

#define DSV3__OS_HEADER ((size_t)256 << 10) /* bytes; those of DeepSeek-V3's shards are 80 kB */

/* O_NONBLOCK: a pipe under the name of a shard must not hang the host. Links are followed: the Hugging Face cache is made
   of them. */
static dsv3_result dsv3__os_open(void *user, const char *name, dsv3_file *file)
{
    const dsv3__os_dir *dir = (const dsv3__os_dir *)user;
    char path[DSV3__OS_PATH_MAX];
    struct stat info;
    if (!dsv3__os_join(path, dir->path, name))
        return DSV3_ERROR_FILE_NOT_FOUND;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return access(path, F_OK) ? DSV3_ERROR_FILE_NOT_FOUND : DSV3_ERROR_IO;
    if (fstat(fd, &info) || !S_ISREG(info.st_mode) || info.st_size < 0) {
        close(fd);
        return DSV3_ERROR_IO;
    }
    file->size = (uint64_t)info.st_size;
    file->data = NULL;
    file->handle = (void *)(intptr_t)fd;
    if (dir->no_mmap || file->size == 0)
        return DSV3_OK;
    if (file->size > SIZE_MAX) {
        close(fd);
        return DSV3_ERROR_IO;
    }
    void *map = mmap(NULL, (size_t)file->size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd); /* the mapping keeps the file */
    if (map == MAP_FAILED)
        return DSV3_ERROR_IO;
    /* The header, and no more of a cold file: a fault at its first byte would read megabytes of weights with it. */
    dsv3__os_will_need(map, file->size < DSV3__OS_HEADER ? file->size : DSV3__OS_HEADER);
#ifdef MADV_HUGEPAGE
    madvise(map, (size_t)file->size, MADV_HUGEPAGE); /* harmless where the file system has no large folios */
#endif
    file->data = map;
    file->handle = NULL;
    return DSV3_OK;
}

/* lseek and read, not pread: strict C modes hide pread, and files are read by one thread, during open. */
static dsv3_result dsv3__os_read(void *user, dsv3_file *file, uint64_t offset, void *dst, size_t size)
{
    int fd = (int)(intptr_t)file->handle;
    uint8_t *p = (uint8_t *)dst;
    (void)user;
    if ((off_t)offset < 0 || (uint64_t)(off_t)offset != offset || lseek(fd, (off_t)offset, SEEK_SET) < 0)
        return DSV3_ERROR_IO;
    while (size) {
        ssize_t got = read(fd, p, size > 1u << 30 ? 1u << 30 : size);
        if (got <= 0)
            return DSV3_ERROR_IO;
        p += got, size -= (size_t)got;
    }
    return DSV3_OK;
}

static void dsv3__os_close(void *user, dsv3_file *file)
{
    (void)user;
    if (file->data)
        munmap((void *)(uintptr_t)file->data, (size_t)file->size);
    else
        close((int)(intptr_t)file->handle);
}

#endif
#endif // DSV3_NO_STDIO

/* The reader to use: the host's, or files of `dir`. */
static dsv3_result dsv3__os_reader(dsv3_reader *reader, const dsv3_reader *given, dsv3__os_dir *dir, dsv3_error *err)
{
    *reader = *given;
    if (given->open_fn)
        return DSV3_OK;
    if (given->read_fn || given->close_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "opts.reader: open_fn is missing");
#ifdef DSV3_NO_STDIO
    (void)dir;
    return DSV3__FAIL(err, DSV3_ERROR_FEATURE_DISABLED, "built with DSV3_NO_STDIO: opts.reader is required");
#else
    if (!dir->path)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dir is NULL and opts.reader is not given");
    reader->open_fn = dsv3__os_open;
    reader->read_fn = dsv3__os_read;
    reader->close_fn = dsv3__os_close;
    reader->user = dir;
    return DSV3_OK;
#endif
}

// =============================================================================
// >>cpu   Which kernels this machine can run, and the floating-point state they need.
// =============================================================================

/* GCC for Windows keeps 32-byte spills at 16-byte alignment (its bug 54412): scalar kernels there. */
#if DSV3__X64 && !defined(DSV3_NO_SIMD) && defined(__GNUC__) && !(defined(__MINGW32__) && !defined(__clang__))
#define DSV3__AVX2 1
#ifdef DSV3_NO_AVX512
#define DSV3__AVX512 0
#else
#define DSV3__AVX512 1
#endif
#if defined(__clang__) ? __clang_major__ >= 13 : __GNUC__ >= 11 /* older ones lack the names, or their assemblers do */
#define DSV3__VNNI 1
#else
#define DSV3__VNNI 0
#endif
#else
#define DSV3__AVX2   0
#define DSV3__AVX512 0
#define DSV3__VNNI   0
#endif
#if DSV3__AVX512 && DSV3__VNNI && !defined(DSV3_NO_AMX) && \
    ((defined(__linux__) && !defined(__ILP32__)) || defined(DSV3__SIMD_PROVIDED))
#define DSV3__AMX 1
#else
#define DSV3__AMX 0
#endif

#if DSV3__AVX2 && !defined(DSV3__SIMD_PROVIDED) /* tests bring emulated intrinsics */
#include <immintrin.h>
#endif
#if DSV3__X64
#include <xmmintrin.h>
#endif
#if DSV3__AVX2
#include <cpuid.h>
#endif

/* NEON itself is part of aarch64, unless the compiler was told to leave its registers alone. */
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(DSV3_NO_SIMD) && defined(__GNUC__)
#define DSV3__NEON 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#else
#define DSV3__NEON 0
#endif

DSV3_API const char *dsv3_isa_name(dsv3_isa isa)
{
    switch (isa) {
    case DSV3_ISA_AUTO: return "auto";
    case DSV3_ISA_SCALAR: return "scalar";
    case DSV3_ISA_AVX2: return "avx2";
    case DSV3_ISA_AVX512: return "avx512";
    case DSV3_ISA_AVX_VNNI: return "avx-vnni";
    case DSV3_ISA_AVX512_VNNI: return "avx512-vnni";
    case DSV3_ISA_AVX512_BF16: return "avx512-bf16";
    case DSV3_ISA_AVX512_AMX: return "avx512-amx";
    case DSV3_ISA_NEON: return "neon";
    default: return "?";
    }
}

#if DSV3__AVX2
#define DSV3__CPU_HAS(word, bits) (((word) & (bits)) == (bits))

/* Bit `isa` for each level that the build has, and whose instructions and register state CPU and system have. */
static uint32_t dsv3__cpu_levels(void)
{
    const unsigned avx = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* FMA, OSXSAVE, AVX, F16C: leaf 1, ecx */
    const unsigned avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL: leaf 7, ebx */
    const unsigned vbmi = 1u << 1, vnni = 1u << 11;                                    /* leaf 7, ecx */
    const unsigned vex_vnni = 1u << 4, bf16 = 1u << 5;                                 /* leaf 7.1, eax */
    const unsigned amx = 1u << 24 | 1u << 25;                                          /* TILE, INT8: leaf 7, edx */
    uint32_t levels = 1u << DSV3_ISA_SCALAR;
    unsigned a, b, c, d, more = 0, xcr0, high;
    if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !DSV3__CPU_HAS(c, avx))
        return levels;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if (!DSV3__CPU_HAS(xcr0, 0x6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !DSV3__CPU_HAS(b, avx2))
        return levels;
    if (a >= 1) {
        unsigned b1, c1, d1;
        __get_cpuid_count(7, 1, &more, &b1, &c1, &d1);
    }
#ifdef DSV3__SIMD_PROVIDED /* emulated */
    b |= avx512, c |= vbmi | vnni, d |= amx, more |= vex_vnni | bf16, xcr0 |= 0x600E0;
#endif
    levels |= 1u << DSV3_ISA_AVX2;
    if (DSV3__VNNI && DSV3__CPU_HAS(more, vex_vnni))
        levels |= 1u << DSV3_ISA_AVX_VNNI;
    if (!DSV3__AVX512 || !DSV3__CPU_HAS(xcr0, 0xE6) || !DSV3__CPU_HAS(b, avx512))
        return levels;
    levels |= 1u << DSV3_ISA_AVX512;
    if (!DSV3__VNNI || !DSV3__CPU_HAS(c, vnni))
        return levels;
    levels |= 1u << DSV3_ISA_AVX512_VNNI;
    if (DSV3__CPU_HAS(c, vbmi) && DSV3__CPU_HAS(more, bf16))
        levels |= 1u << DSV3_ISA_AVX512_BF16;
    if (DSV3__AMX && DSV3__CPU_HAS(d, amx) && DSV3__CPU_HAS(xcr0, 0x60000))
        levels |= 1u << DSV3_ISA_AVX512_AMX;
    return levels;
}
#else
static uint32_t dsv3__cpu_levels(void)
{
    return 1u << DSV3_ISA_SCALAR | (DSV3__NEON ? 1u << DSV3_ISA_NEON : 0);
}
#endif

#if DSV3__NEON
/* Has it SDOT? Of systems other than Linux, only what the compiler was told is believed. */
static bool dsv3__cpu_dotprod(void)
{
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#else
    return false;
#endif
}
#endif

/* PERF: is vdpbf16ps worth it? Intel's cores begin one in two cycles, so that it makes half the multiply-adds of
   vfmadd231ps (Emerald Rapids: 44 and 88 GMAC/s); vpermi2b, which decodes for it, is as slow. AMD's begin one of each in
   a cycle. */
static bool dsv3__cpu_fast_bf16(void)
{
#if DSV3__AVX2
    unsigned a, b, c, d;
    return !__get_cpuid(0, &a, &b, &c, &d) || b != 0x756E6547; /* "Genu"ineIntel */
#else
    return false;
#endif
}

/* May this process use the tile registers? Linux lends them to one that asks, for all its threads and for good: 8 KB of
   state, which a thread has from its first tile on, and which signal frames must then have room for. It refuses where a
   thread's alternate signal stack is too small for that, where a filter forbids the call, and before version 5.16. */
static bool dsv3__cpu_lend_tiles(void)
{
#if defined(DSV3__SIMD_PROVIDED)
    return true;
#elif DSV3__AMX /* the C library has no name for it: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) */
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(158L), "D"(0x1023L), "S"(18L) : "rcx", "r11", "memory");
    return result == 0;
#else
    return false;
#endif
}

/* The fastest level there is. */
static dsv3_isa dsv3__cpu_best(void)
{
    static const dsv3_isa order[] = {DSV3_ISA_NEON,   DSV3_ISA_AVX512_AMX, DSV3_ISA_AVX512_BF16, DSV3_ISA_AVX512_VNNI,
                                     DSV3_ISA_AVX512, DSV3_ISA_AVX_VNNI,   DSV3_ISA_AVX2};
    const uint32_t levels = dsv3__cpu_levels();
    for (size_t i = 0; i < DSV3__COUNT(order); i++)
        if ((levels >> order[i] & 1) && (order[i] != DSV3_ISA_AVX512_BF16 || dsv3__cpu_fast_bf16()))
            return order[i];
    return DSV3_ISA_SCALAR;
}

DSV3_API bool dsv3_isa_supported(dsv3_isa isa)
{
    return isa == DSV3_ISA_AUTO || ((unsigned)isa < 32 && (dsv3__cpu_levels() >> isa & 1));
}

/* AUTO -> the best there is; a level that is not there is refused. */
static dsv3_result dsv3__cpu_resolve(dsv3_isa *isa, dsv3_isa wanted, dsv3_error *err)
{
    if (dsv3_isa_name(wanted)[0] == '?')
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "opts.isa: %d is not an instruction set", (int64_t)wanted);
    if (!dsv3_isa_supported(wanted))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_CPU, "isa %s: this CPU and build have %s", dsv3_isa_name(wanted),
                          dsv3_isa_name(dsv3__cpu_best()));
    *isa = wanted == DSV3_ISA_AUTO ? dsv3__cpu_best() : wanted;
    return DSV3_OK;
}

/* Kernels need denormals (FP8 codes decode through them) and round-to-nearest, whatever the host has set.
   enter returns the host's state, leave restores it: both on the thread that computes. */
DSV3__INLINE uint32_t dsv3__fp_enter(void)
{
#if DSV3__X64
    uint32_t saved = _mm_getcsr();
    _mm_setcsr(0x1F80); /* all exceptions masked, round to nearest, FTZ and DAZ off */
    return saved;
#elif defined(__aarch64__)
    uint64_t saved;
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return (uint32_t)saved;
#else
    return 0;
#endif
}

DSV3__INLINE void dsv3__fp_leave(uint32_t saved)
{
#if DSV3__X64
    _mm_setcsr(saved);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)saved));
#else
    (void)saved;
#endif
}

// =============================================================================
// >>thr   Atomics and a parallel-for. Tasks are handed out one by one from a counter, so who runs what is left to
//         chance, and no result may depend on it: a task writes what no other task writes.
// =============================================================================

#if defined(__GNUC__)
DSV3__INLINE uint32_t dsv3__atomic_load(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}

DSV3__INLINE void dsv3__atomic_store(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
}

/* Returns the value before. */
DSV3__INLINE uint32_t dsv3__atomic_add(uint32_t *p, uint32_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);
}
#elif defined(_MSC_VER)
DSV3__INLINE uint32_t dsv3__atomic_load(const uint32_t *p)
{
    return (uint32_t)InterlockedOr((volatile LONG *)p, 0);
}

DSV3__INLINE void dsv3__atomic_store(uint32_t *p, uint32_t v)
{
    InterlockedExchange((volatile LONG *)p, (LONG)v);
}

DSV3__INLINE uint32_t dsv3__atomic_add(uint32_t *p, uint32_t v)
{
    return (uint32_t)InterlockedExchangeAdd((volatile LONG *)p, (LONG)v);
}
#else
#error "dsv3.h: no atomics for this compiler"
#endif

#ifndef DSV3_NO_THREADS
#if defined(_WIN32)
typedef HANDLE dsv3__thread;
typedef SRWLOCK dsv3__mutex;
typedef CONDITION_VARIABLE dsv3__cond;
#define DSV3__MUTEX_INIT(m)   (InitializeSRWLock(m), 0)
#define DSV3__MUTEX_FREE(m)   ((void)0)
#define DSV3__LOCK(m)         AcquireSRWLockExclusive(m)
#define DSV3__UNLOCK(m)       ReleaseSRWLockExclusive(m)
#define DSV3__COND_INIT(c)    (InitializeConditionVariable(c), 0)
#define DSV3__COND_FREE(c)    ((void)0)
#define DSV3__COND_WAIT(c, m) SleepConditionVariableSRW(c, m, INFINITE, 0)
#define DSV3__COND_ALL(c)     WakeAllConditionVariable(c)
#define DSV3__YIELD()         SwitchToThread()
#else
#include <pthread.h>
#include <sched.h>
typedef pthread_t dsv3__thread;
typedef pthread_mutex_t dsv3__mutex;
typedef pthread_cond_t dsv3__cond;
#define DSV3__MUTEX_INIT(m)   pthread_mutex_init(m, NULL)
#define DSV3__MUTEX_FREE(m)   pthread_mutex_destroy(m)
#define DSV3__LOCK(m)         pthread_mutex_lock(m)
#define DSV3__UNLOCK(m)       pthread_mutex_unlock(m)
#define DSV3__COND_INIT(c)    pthread_cond_init(c, NULL)
#define DSV3__COND_FREE(c)    pthread_cond_destroy(c)
#define DSV3__COND_WAIT(c, m) pthread_cond_wait(c, m)
#define DSV3__COND_ALL(c)     pthread_cond_broadcast(c)
#define DSV3__YIELD()         sched_yield()
#endif
#endif

#if DSV3__X64
#define DSV3__PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define DSV3__PAUSE() __asm__ volatile("yield")
#else
#define DSV3__PAUSE() ((void)0)
#endif

/* task < n_tasks; worker < n_threads, one thread at a time for each worker: scratch may be indexed by it. */
typedef void (*dsv3__task_fn)(void *ctx, uint32_t task, uint32_t worker);

typedef struct dsv3__pool {
    uint32_t n_threads;     /* the caller is worker 0 */
    dsv3_executor executor; /* run_fn set: the host's threads do the work */
    /* the work at hand */
    dsv3__task_fn fn;
    void *ctx;
    uint32_t n_tasks;
    uint32_t next; /* atomic: the next task */
#ifndef DSV3_NO_THREADS
    uint32_t generation; /* atomic: rises when work is there */
    uint32_t busy;       /* atomic: own threads still at it */
    uint32_t sleeping;   /* atomic: own threads in cond */
    uint32_t quit;       /* atomic */
    uint32_t spin;       /* how many pauses before a worker goes to sleep */
    uint32_t n_started;
    dsv3__thread *threads; /* [n_threads - 1] */
    dsv3__mutex mutex;
    dsv3__cond cond;
#endif
} dsv3__pool;

static void dsv3__pool_work(dsv3__pool *pool, uint32_t worker)
{
    uint32_t saved = dsv3__fp_enter(), task;
    while ((task = dsv3__atomic_add(&pool->next, 1)) < pool->n_tasks)
        pool->fn(pool->ctx, task, worker);
    dsv3__fp_leave(saved);
}

static void dsv3__pool_host_task(void *ctx, uint32_t i)
{
    dsv3__pool_work((dsv3__pool *)ctx, i);
}

#ifndef DSV3_NO_THREADS

/* A worker spins for a while after its work, since inside a pass the next piece comes within microseconds, then sleeps. */
static void dsv3__pool_thread(dsv3__pool *pool, uint32_t worker)
{
    uint32_t seen = 0;
    for (;;) {
        uint32_t spins = 0;
        while (dsv3__atomic_load(&pool->generation) == seen) {
            if (spins++ < pool->spin) {
                DSV3__PAUSE();
                continue;
            }
            DSV3__LOCK(&pool->mutex);
            dsv3__atomic_add(&pool->sleeping, 1); /* before the test: the caller raises generation, then looks here */
            while (dsv3__atomic_load(&pool->generation) == seen)
                DSV3__COND_WAIT(&pool->cond, &pool->mutex);
            dsv3__atomic_add(&pool->sleeping, (uint32_t)-1);
            DSV3__UNLOCK(&pool->mutex);
        }
        seen++;
        if (dsv3__atomic_load(&pool->quit))
            return;
        dsv3__pool_work(pool, worker);
        dsv3__atomic_add(&pool->busy, (uint32_t)-1);
    }
}

#if defined(_WIN32)
static DWORD WINAPI dsv3__pool_entry(LPVOID arg)
#else
static void *dsv3__pool_entry(void *arg)
#endif
{
    dsv3__pool *pool = (dsv3__pool *)arg;
    /* worker numbers are handed out by the counter that later hands out tasks */
    dsv3__pool_thread(pool, dsv3__atomic_add(&pool->next, 1));
    return 0;
}

static void dsv3__pool_wake(dsv3__pool *pool)
{
    dsv3__atomic_add(&pool->generation, 1);
    if (dsv3__atomic_load(&pool->sleeping)) {
        DSV3__LOCK(&pool->mutex);
        DSV3__COND_ALL(&pool->cond);
        DSV3__UNLOCK(&pool->mutex);
    }
}

#endif // DSV3_NO_THREADS

static void dsv3__pool_close(dsv3__pool *pool, dsv3__mem *mem)
{
#ifndef DSV3_NO_THREADS
    if (pool->threads) {
        dsv3__atomic_store(&pool->quit, 1);
        dsv3__pool_wake(pool);
        for (uint32_t i = 0; i < pool->n_started; i++) {
#if defined(_WIN32)
            WaitForSingleObject(pool->threads[i], INFINITE);
            CloseHandle(pool->threads[i]);
#else
            pthread_join(pool->threads[i], NULL);
#endif
        }
        DSV3__COND_FREE(&pool->cond);
        DSV3__MUTEX_FREE(&pool->mutex);
        dsv3__mem_free(mem, pool->threads);
        pool->threads = NULL;
    }
#else
    (void)pool, (void)mem;
#endif
}

/* n_threads 0: one a core. The pool must stay where it is until dsv3__pool_close. */
static dsv3_result dsv3__pool_open(dsv3__pool *pool, dsv3__mem *mem, uint32_t n_threads, const dsv3_executor *executor,
                                   dsv3_error *err)
{
    memset(pool, 0, sizeof *pool);
    pool->n_threads = 1;
    if (executor && executor->run_fn) {
        pool->executor = *executor;
        pool->n_threads = executor->n_threads ? executor->n_threads : 1;
        return DSV3_OK;
    }
#ifdef DSV3_NO_THREADS
    (void)mem, (void)err, (void)n_threads;
    return DSV3_OK;
#else
    uint32_t cores = dsv3__os_cores();
    pool->n_threads = n_threads ? n_threads : cores;
    pool->spin = pool->n_threads > cores ? 0 : 20000; /* a third of a millisecond to a millisecond */
    if (pool->n_threads == 1)
        return DSV3_OK;
    void *threads;
    DSV3__TRY(dsv3__mem_alloc(mem, &threads, (uint64_t)(pool->n_threads - 1) * sizeof(dsv3__thread), "threads", err));
    pool->threads = (dsv3__thread *)threads;
    if (DSV3__MUTEX_INIT(&pool->mutex)) {
        dsv3__mem_free(mem, threads);
        pool->threads = NULL;
        return DSV3__FAIL(err, DSV3_ERROR_THREAD, "no mutex to be had");
    }
    if (DSV3__COND_INIT(&pool->cond)) {
        DSV3__MUTEX_FREE(&pool->mutex);
        dsv3__mem_free(mem, threads);
        pool->threads = NULL;
        return DSV3__FAIL(err, DSV3_ERROR_THREAD, "no condition variable to be had");
    }
    pool->next = 1;
    for (uint32_t i = 0; i + 1 < pool->n_threads; i++) {
#if defined(_WIN32)
        bool ok = (pool->threads[i] = CreateThread(NULL, 0, dsv3__pool_entry, pool, 0, NULL)) != NULL;
#else
        bool ok = pthread_create(&pool->threads[i], NULL, dsv3__pool_entry, pool) == 0;
#endif
        if (!ok) {
            dsv3__pool_close(pool, mem);
            return DSV3__FAIL(err, DSV3_ERROR_THREAD, "thread %u of %u could not be started", (uint64_t)i + 2,
                              (uint64_t)pool->n_threads);
        }
        pool->n_started++;
    }
    while (dsv3__atomic_load(&pool->next) < pool->n_threads)
        DSV3__YIELD(); /* every thread has its number: the counter is free for tasks */
    return DSV3_OK;
#endif
}

/* fn(ctx, 0 ... n_tasks - 1, worker), on all threads; returns when all are done. Not reentrant. */
static void dsv3__pool_run(dsv3__pool *pool, uint32_t n_tasks, dsv3__task_fn fn, void *ctx)
{
    pool->fn = fn;
    pool->ctx = ctx;
    pool->n_tasks = n_tasks;
    dsv3__atomic_store(&pool->next, 0);
    if (pool->executor.run_fn && n_tasks > 1) {
        pool->executor.run_fn(pool->executor.user, pool->n_threads, dsv3__pool_host_task, pool);
        return;
    }
#ifndef DSV3_NO_THREADS
    if (pool->threads && n_tasks > 1) {
        dsv3__atomic_store(&pool->busy, pool->n_threads - 1);
        dsv3__pool_wake(pool);
        dsv3__pool_work(pool, 0);
        for (uint32_t spins = 0; dsv3__atomic_load(&pool->busy); spins++) {
            if (spins < pool->spin)
                DSV3__PAUSE();
            else
                DSV3__YIELD();
        }
        return;
    }
#endif
    dsv3__pool_work(pool, 0);
}
// =============================================================================
// >>num   Number formats: FP8 (E4M3 "fn"), F16, BF16, E8M0, I8, to f32 and back. Needs base alone.
//         Decoding is exact. Encoding rounds to nearest, ties to even, and leans on no floating-point mode.
// =============================================================================

DSV3_API const char *dsv3_dtype_name(dsv3_dtype dtype)
{
    switch (dtype) {
    case DSV3_DTYPE_F32: return "F32";
    case DSV3_DTYPE_F16: return "F16";
    case DSV3_DTYPE_BF16: return "BF16";
    case DSV3_DTYPE_F8_E4M3: return "F8_E4M3";
    case DSV3_DTYPE_F8_E8M0: return "F8_E8M0";
    case DSV3_DTYPE_F8_E5M2: return "F8_E5M2";
    case DSV3_DTYPE_I8: return "I8";
    case DSV3_DTYPE_U8: return "U8";
    case DSV3_DTYPE_I16: return "I16";
    case DSV3_DTYPE_U16: return "U16";
    case DSV3_DTYPE_I32: return "I32";
    case DSV3_DTYPE_U32: return "U32";
    case DSV3_DTYPE_I64: return "I64";
    case DSV3_DTYPE_U64: return "U64";
    case DSV3_DTYPE_F64: return "F64";
    case DSV3_DTYPE_BOOL: return "BOOL";
    default: return "?";
    }
}

DSV3_API size_t dsv3_dtype_size(dsv3_dtype dtype)
{
    switch (dtype) {
    case DSV3_DTYPE_F8_E4M3:
    case DSV3_DTYPE_F8_E8M0:
    case DSV3_DTYPE_F8_E5M2:
    case DSV3_DTYPE_I8:
    case DSV3_DTYPE_U8:
    case DSV3_DTYPE_BOOL: return 1;
    case DSV3_DTYPE_F16:
    case DSV3_DTYPE_BF16:
    case DSV3_DTYPE_I16:
    case DSV3_DTYPE_U16: return 2;
    case DSV3_DTYPE_F32:
    case DSV3_DTYPE_I32:
    case DSV3_DTYPE_U32: return 4;
    case DSV3_DTYPE_F64:
    case DSV3_DTYPE_I64:
    case DSV3_DTYPE_U64: return 8;
    default: return 0;
    }
}

/* What every NaN result of a dot product is, so that results have the same bits everywhere. */
#define DSV3__NAN_BITS   0x7FC00000u
#define DSV3__MIN_NORMAL 1.17549435e-38f /* 2^-126 */

/* f32 of every E4M3 code: sign, exponent (bias 7), mantissa 3; exponent 0 is denormal, 0x7F and 0xFF are NaN. */
// clang-format off
#define DSV3__FP8_ROW(unit) \
    8 * (unit), 9 * (unit), 10 * (unit), 11 * (unit), 12 * (unit), 13 * (unit), 14 * (unit), 15 * (unit)
#define DSV3__FP8_HALF(s)                                                                                \
    s 0.0f, s 0.001953125f, s 0.00390625f, s 0.005859375f, s 0.0078125f, s 0.009765625f, s 0.01171875f,  \
    s 0.013671875f, DSV3__FP8_ROW(s 0.001953125f), DSV3__FP8_ROW(s 0.00390625f), DSV3__FP8_ROW(s 0.0078125f), \
    DSV3__FP8_ROW(s 0.015625f), DSV3__FP8_ROW(s 0.03125f), DSV3__FP8_ROW(s 0.0625f), DSV3__FP8_ROW(s 0.125f), \
    DSV3__FP8_ROW(s 0.25f), DSV3__FP8_ROW(s 0.5f), DSV3__FP8_ROW(s 1.0f), DSV3__FP8_ROW(s 2.0f),         \
    DSV3__FP8_ROW(s 4.0f), DSV3__FP8_ROW(s 8.0f), DSV3__FP8_ROW(s 16.0f),                                \
    s 256.0f, s 288.0f, s 320.0f, s 352.0f, s 384.0f, s 416.0f, s 448.0f, NAN
// clang-format on
static const float dsv3__fp8_value[256] = {DSV3__FP8_HALF(+), DSV3__FP8_HALF(-)};

/* Nearest code, ties to even; what is larger than 448, infinities too, becomes +-448; NaN becomes 0x7F. */
static uint8_t dsv3__fp8_encode(float value)
{
    uint32_t bits = dsv3__float_bits(value), sign = bits >> 31 << 7, mag = bits & 0x7FFFFFFF, code;
    if (mag > 0x7F800000)
        return 0x7F;
    if (mag >= 0x43E80000) /* 464, halfway to what would be 480 */
        return (uint8_t)(sign | 0x7E);
    if (mag >= 0x3C800000) { /* 2^-6 up: normal. Bias 127 becomes 7, 23 bits of mantissa become 3 */
        uint32_t odd = mag >> 20 & 1;
        code = (mag + 0x7FFFF + odd - (120u << 23)) >> 20;
    } else if (mag >= 0x3A000000) {                                          /* 2^-11 up: units of 2^-9 */
        uint32_t shift = 141 - (mag >> 23), m = (mag & 0x7FFFFF) | 0x800000; /* 23 - 9 + 127; shift is 21 ... 25 */
        uint32_t half = 1u << (shift - 1), odd = m >> shift & 1;
        code = (m + half - 1 + odd) >> shift;
    } else {
        code = 0;
    }
    return (uint8_t)(sign | code);
}

static float dsv3__f16_decode(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 0x3FF;
    if (exponent == 31) /* infinity, NaN; a signalling NaN becomes quiet, as in vcvtph2ps */
        return dsv3__bits_float(sign | 0x7F800000 | mantissa << 13 | (mantissa ? 0x400000u : 0));
    if (exponent == 0) {
        float f = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24: exact, and normal */
        return dsv3__bits_float(sign | dsv3__float_bits(f));
    }
    return dsv3__bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

static uint16_t dsv3__f16_encode(float value)
{
    uint32_t bits = dsv3__float_bits(value), sign = bits >> 31 << 15, mag = bits & 0x7FFFFFFF, code;
    if (mag > 0x7F800000)
        code = 0x7E00 | (mag >> 13 & 0x3FF);
    else if (mag >= 0x477FF000) /* 65520, halfway to 2^16 */
        code = 0x7C00;
    else if (mag >= 0x38800000) /* 2^-14 up: normal */
        code = (mag + 0xFFF + (mag >> 13 & 1) - (112u << 23)) >> 13;
    else if (mag >= 0x33000000) {                                            /* 2^-25 up: units of 2^-24 */
        uint32_t shift = 126 - (mag >> 23), m = (mag & 0x7FFFFF) | 0x800000; /* 14 ... 24 */
        code = (m + (1u << (shift - 1)) - 1 + (m >> shift & 1)) >> shift;
    } else
        code = 0;
    return (uint16_t)(sign | code);
}

DSV3__INLINE float dsv3__bf16_decode(uint16_t h)
{
    return dsv3__bits_float((uint32_t)h << 16);
}

static uint16_t dsv3__bf16_encode(float value)
{
    uint32_t bits = dsv3__float_bits(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* 2^(code - 127); 0 is the f32 denormal 2^-127, 255 is NaN. */
static float dsv3__e8m0_decode(uint8_t code)
{
    return dsv3__bits_float(code == 255 ? DSV3__NAN_BITS : code == 0 ? 0x400000u : (uint32_t)code << 23);
}

/* Nearest integer, ties to even, in -127 ... 127: -128 has no opposite, so a code that is written never is it. NaN
   becomes 0. */
static int8_t dsv3__i8_encode(float value)
{
    uint32_t bits = dsv3__float_bits(value), mag = bits & 0x7FFFFFFF;
    if (mag > 0x7F800000)
        return 0;
    mag = mag > 0x42FE0000 ? 0x42FE0000 : mag;                           /* 127 */
    uint32_t shift = 150 - (mag >> 23), m = (mag & 0x7FFFFF) | 0x800000; /* 17 and more: units of 1 */
    shift = shift > 31 ? 31 : shift;                                     /* below 1/2 all bits go anyway */
    int32_t code = (int32_t)((m + (1u << (shift - 1)) - 1 + (m >> shift & 1)) >> shift);
    return (int8_t)(bits >> 31 ? -code : code);
}

/* Element i of an array of any alignment, as f32. dtype: F32, F16, BF16, F8_E4M3, I8 or F8_E8M0. */
static float dsv3__num_get(const void *array, dsv3_dtype dtype, uint64_t i)
{
    const uint8_t *p = (const uint8_t *)array;
    switch (dtype) {
    case DSV3_DTYPE_F32: return dsv3__bits_float(dsv3__load32(p + 4 * i));
    case DSV3_DTYPE_F16: return dsv3__f16_decode(dsv3__load16(p + 2 * i));
    case DSV3_DTYPE_BF16: return dsv3__bf16_decode(dsv3__load16(p + 2 * i));
    case DSV3_DTYPE_F8_E4M3: return dsv3__fp8_value[p[i]];
    case DSV3_DTYPE_I8: return (float)(p[i] < 128 ? p[i] : p[i] - 256);
    default: return dsv3__e8m0_decode(p[i]);
    }
}

// =============================================================================
// >>ten   The quantized tensor: what must hold before arithmetic touches one; its scales.
//         Needs num, err. Row blocks of scales count from row 0 of the tensor, so a part of a tensor is named by
//         absolute rows, never by a view that begins inside it.
// =============================================================================

static bool dsv3__ten_dtype_ok(dsv3_dtype dtype)
{
    return dtype == DSV3_DTYPE_F32 || dtype == DSV3_DTYPE_F16 || dtype == DSV3_DTYPE_BF16 ||
           dtype == DSV3_DTYPE_F8_E4M3 || dtype == DSV3_DTYPE_I8;
}

static bool dsv3__ten_scale_dtype_ok(dsv3_dtype dtype)
{
    return dtype == DSV3_DTYPE_F32 || dtype == DSV3_DTYPE_F16 || dtype == DSV3_DTYPE_BF16 ||
           dtype == DSV3_DTYPE_F8_E8M0;
}

DSV3__INLINE uint64_t dsv3__ten_n_rows(const dsv3_tensor *t)
{
    return t->rank == 2 ? t->shape[0] : 1;
}

DSV3__INLINE uint64_t dsv3__ten_n_cols(const dsv3_tensor *t)
{
    return t->rank == 0 ? 1 : t->shape[t->rank - 1];
}

DSV3__INLINE const uint8_t *dsv3__ten_row(const dsv3_tensor *t, uint64_t row)
{
    return (const uint8_t *)t->data + (size_t)(row * t->row_stride);
}

/* Can this view be read? With `arithmetic`: can kernels compute with it? What kernels do without a second look rests
   on this: every row and scale inside the address space, scales of 64 consecutive columns (from a multiple of 64) equal.
   `name` is for the message. Errors: INVALID_ARGUMENT (no tensor, no data), BAD_TENSOR. */
static dsv3_result dsv3__ten_check(const dsv3_tensor *t, const char *name, bool arithmetic, dsv3_error *err)
{
    uint64_t n = 1, size, rows, cols, bytes;
    if (!t)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "%s: the tensor is NULL", name);
    if (t->rank > DSV3_MAX_RANK)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: rank %u, at most %u", name, (uint64_t)t->rank,
                          (uint64_t)DSV3_MAX_RANK);
    size = dsv3_dtype_size(t->dtype);
    if (size == 0)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: unknown dtype %d", name, (int64_t)t->dtype);
    for (uint32_t i = 0; i < t->rank; i++)
        if (!dsv3__mul(n, t->shape[i], &n))
            return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %D elements are too many", name, t->shape, t->rank);
    if (!dsv3__mul(n, size, &bytes) || bytes > SIZE_MAX / 2)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %D elements are too many", name, t->shape, t->rank);
    if (!arithmetic)
        return DSV3_OK;

    if (!dsv3__ten_dtype_ok(t->dtype))
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: dtype %s, expected F32, F16, BF16, F8_E4M3 or I8", name,
                          dsv3_dtype_name(t->dtype));
    if (t->rank != 1 && t->rank != 2)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: shape %D, expected rank 1 or 2", name, t->shape, t->rank);
    if (n == 0)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: shape %D has no elements", name, t->shape, t->rank);
    if (!t->data)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "%s: data is NULL", name);
    rows = dsv3__ten_n_rows(t);
    cols = dsv3__ten_n_cols(t);
    if (rows > 1 && t->row_stride < cols * size)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: row_stride %u, a row has %u bytes", name, t->row_stride,
                          cols * size);
    if (rows > 1 && (!dsv3__mul(rows, t->row_stride, &bytes) || bytes > SIZE_MAX / 2))
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: row_stride %u is too large", name, t->row_stride);
    if (cols > SIZE_MAX / 16)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %u columns are too many", name, cols);

    if (!t->scale) {
        if (t->scale_dtype != DSV3_DTYPE_UNKNOWN || t->block_rows || t->block_cols)
            return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: blocks of %u x %u, but scale is NULL", name,
                              (uint64_t)t->block_rows, (uint64_t)t->block_cols);
        /* Integers without a scale are indices or masks: as weights they mean that a scale was lost. */
        if (t->dtype == DSV3_DTYPE_I8)
            return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: dtype I8, but scale is NULL", name);
        return DSV3_OK;
    }
    if (t->dtype != DSV3_DTYPE_F8_E4M3 && t->dtype != DSV3_DTYPE_I8)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: scales beside dtype %s; only F8_E4M3 and I8 have them", name,
                          dsv3_dtype_name(t->dtype));
    if (!dsv3__ten_scale_dtype_ok(t->scale_dtype))
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: scales of dtype %s, expected F32, F16, BF16 or F8_E8M0",
                          name, dsv3_dtype_name(t->scale_dtype));
    if (!t->block_rows || !t->block_cols)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: scales for blocks of %u x %u", name, (uint64_t)t->block_rows,
                          (uint64_t)t->block_cols);
    if (t->block_cols % 64 && t->block_cols < cols)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: block_cols %u, expected a multiple of 64", name,
                          (uint64_t)t->block_cols);
    uint64_t scale_rows = dsv3__ceil_div(rows, t->block_rows), scale_cols = dsv3__ceil_div(cols, t->block_cols);
    if (scale_rows > 1 &&
        (t->scale_stride < scale_cols || !dsv3__mul(scale_rows, t->scale_stride, &bytes) || bytes > SIZE_MAX / 8))
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: scale_stride %u, a row has %u scales", name, t->scale_stride,
                          scale_cols);
    return DSV3_OK;
}

/* scale64[i] = the scale of columns 64 * i ... in `row`, for the 64-blocks first ... first + n - 1; 1 without scales. */
static void dsv3__ten_scales(float *scale64, const dsv3_tensor *t, uint64_t row, size_t first, size_t n)
{
    uint64_t base, last = UINT64_MAX, end;
    float s = 1;
    if (!t->scale) {
        for (size_t i = 0; i < n; i++)
            scale64[i] = 1;
        return;
    }
    base = row / t->block_rows * t->scale_stride;
    end = dsv3__ceil_div(dsv3__ten_n_cols(t), t->block_cols);
    for (size_t i = 0; i < n; i++) {
        uint64_t column = (uint64_t)(first + i) * 64 / t->block_cols;
        column = column < end ? column : end - 1; /* padding */
        if (column != last) {
            last = column;
            s = dsv3__num_get(t->scale, t->scale_dtype, base + column);
        }
        scale64[i] = s;
    }
}
// =============================================================================
// >>kern   The inner loops, once per operation: contract, then _scalar, _avx2, _avx_vnni, _avx512, _avx512_vnni,
//          _avx512_bf16, _avx512_amx, _neon. A level borrows what it has no better one of (`make help`: which).
//          Needs num, cpu. Nothing here knows the model, a tensor or a thread.
// =============================================================================

/* ORDER OF SUMMATION. Every dot product here has 64 chains. Position i of a row belongs to chain i mod 64; a chain is
       c = +0;  c = fmaf(w, x, c) for its positions, rising
   rows being padded to a multiple of 64 with zeros (of FP8: with code 0). The 64 chains are added by one tree; with
   a[16q + i] for chain 16q + i:
       t[i] = (a[i] + a[16 + i]) + (a[32 + i] + a[48 + i])        16 sums
       t[i] += t[i + 8], then i + 4, i + 2, i + 1                  1 sum
   A NaN becomes the one NaN of DSV3__NAN_BITS. So a result has the same bits in every variant, alone or in a tile.
   Error: |err| <= (k / 64 + 8) * 2^-24 * sum |w x|, while nothing overflows and products stay above 2^-126.

   POSITIONS. Of F32, F16, BF16 and I8 weights: position = column. Of F8_E4M3: inside a block of 64 columns, position
   16p + i holds column 4i + p (p < 4, i < 16), because shifting a register of 16 words decodes byte p of each. x must be
   laid out likewise ("packed", >>mm). The value of an FP8 or I8 weight is f32(code * scale), rounded once.

   PAIRS. Where x was rounded to bf16, rows are padded to a multiple of 128, and the two positions of a chain in a block
   of 128 hold the second and the first of two columns (this order, as vdpbf16ps adds them). Position 16r + i and position
   64 + 16r + i (r < 4, i < 16) are of BF16 weights columns 32r + 2i + 1 and 32r + 2i, of F8_E4M3 columns c + 1 and c with
   c = 64 (r / 2) + 4i + 2 (r mod 2). Scales are in x already: the value of a weight is its code.
   Variants with `pair_words` hold x and decoded weights as words of two bf16, 64 for a block of 128: word 16r + i has
   position 16r + i in its high half, position 64 + 16r + i in its low half, and vdpbf16ps does both steps of 16 chains.
   That instruction takes operands and results below 2^-126 as 0; all else it rounds as two fmaf.

   INT8. The sum over a group of columns (all, or those of one scale) is an exact integer, the groups are added as
   y = fmaf((float)sum, w_scale * x_scale, y), rising from +0.

   All variants want denormals and round-to-nearest (dsv3__fp_enter). Pointers to weights may have any alignment; reads
   never pass the end of a row. */

#ifndef DSV3__TARGET_AVX2
#define DSV3__TARGET_AVX2 DSV3__TARGET("avx2,fma,f16c")
#endif
#ifndef DSV3__TARGET_AVX512 /* tests compile these for AVX2 over emulated intrinsics */
#define DSV3__TARGET_AVX512      DSV3__TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define DSV3__TARGET_AVX_VNNI    DSV3__TARGET("avxvnni,avx2,fma,f16c")
#define DSV3__TARGET_AVX512_VNNI DSV3__TARGET("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define DSV3__TARGET_AVX512_BF16 \
    DSV3__TARGET("avx512bf16,avx512vbmi,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define DSV3__TARGET_AVX512_AMX \
    DSV3__TARGET("amx-tile,amx-int8,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

/* Unrolled completely whatever the -O: an array of registers must not live in memory. */
#if defined(__clang__)
#define DSV3__UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define DSV3__UNROLL _Pragma("GCC unroll 16")
#else
#define DSV3__UNROLL
#endif

/* Keeps a loaded vector in a register: gcc folds the load into each of its uses otherwise, and loads become the limit. */
#if DSV3__AVX2
#define DSV3__PIN(v) __asm__("" : "+x"(v))
#ifndef DSV3__PIN512
#define DSV3__PIN512(v) __asm__("" : "+v"(v))
#endif
/* PERF: loads of x between those of weights crowd the weights out of the hardware's prefetcher. So they are asked for
   ahead, into the rows that follow too: FP8, BF16 and int8 at 0.9 ... 1.0 of a plain read where 0.45 ... 0.75 was
   (Emerald Rapids). */
#define DSV3__PREFETCH_AT(p, bytes) DSV3__FETCH((const void *)((uintptr_t)(p) + (bytes)))
#define DSV3__PREFETCH(p)           DSV3__PREFETCH_AT(p, 4096)
#endif

/* One instruction each, sums += products: of unsigned and signed bytes, four to an int32; of two bf16, the high first.
   PERF: as asm, since around the intrinsics gcc 12 moves the sums of a tile to the stack and back (100 of 217 GMAC/s). */
#if DSV3__VNNI && !defined(DSV3__DPBUSD)
#define DSV3__DPBUSD(sum, u, s) \
    __asm__("%{vex%} vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+x"(sum) : "x"(u), "x"(s)) /* 256 bits */
#define DSV3__DPBUSD512(sum, u, s) __asm__("vpdpbusd {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(u), "v"(s))
#define DSV3__DPBF16(sum, w, x)    __asm__("vdpbf16ps {%2, %1, %0|%0, %1, %2}" : "+v"(sum) : "v"(w), "v"(x))
#endif

/* Of tiles, named by their numbers. As asm, since gcc 12's intrinsics do not say that a load reads memory. */
#if DSV3__AMX && !defined(DSV3__TILE_DOT)
#define DSV3__TILES_BEGIN(shapes) __asm__ volatile("ldtilecfg %0" : : "m"(*(shapes)))
#define DSV3__TILES_END()         __asm__ volatile("tilerelease")
#define DSV3__TILE_ZERO(t)        __asm__ volatile("tilezero %%tmm" #t:)
#define DSV3__TILE_LOAD(t, p, stride)                                                  \
    __asm__ volatile("tileloadd {(%0, %1, 1), %%tmm" #t "|%%tmm" #t ", [%0 + %1 * 1]}" \
                     :                                                                 \
                     : "r"((const void *)(p)), "r"((size_t)(stride))                   \
                     : "memory")
#define DSV3__TILE_STORE(t, p, stride)                                                  \
    __asm__ volatile("tilestored {%%tmm" #t ", (%0, %1, 1)|[%0 + %1 * 1], %%tmm" #t "}" \
                     :                                                                  \
                     : "r"((void *)(p)), "r"((size_t)(stride))                          \
                     : "memory")
#define DSV3__TILE_DOT(sum, w, x) /* signed bytes times signed bytes */ \
    __asm__ volatile("tdpbssd {%%tmm" #x ", %%tmm" #w ", %%tmm" #sum "|%%tmm" #sum ", %%tmm" #w ", %%tmm" #x "}" :)
#endif

/* Bytes of scratch for `bytes` with n_x rows of x of k columns: their codes, and scales, by 16 rows. */
DSV3__INLINE size_t dsv3__k_bytes_scratch(size_t n_x, size_t k)
{
    return (n_x + 15) / 16 * 16 * ((k + 63) / 64) * (64 + sizeof(float));
}

typedef float (*dsv3__dot_fn)(const void *w, const float *x, const float *scale64, size_t k);
typedef void (*dsv3__row_fn)(float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k);

/* Rows of w that share loads of x in a tile. */
#define DSV3__TILE_W 4
/* The most floats of `sum` of one tile. */
#define DSV3__TILE_SUM (DSV3__TILE_W * 6 * 64)

/* A variant works on registers of `lanes` floats, 4, 8 or 16: lane l of register g of a block is position g * lanes + l.

   dot_<dtype>   the dot product of one row of weights w [k] with a packed row x [ceil64(k)].
                 fp8: scale64 [ceil(k / 64)], the scale of each 64 columns. A code that is NaN makes the result NaN.
                 Others: scale64 is not looked at.
   row_<dtype>   the values of w [k], and of the padding up to ceil64(k): register g of block b goes to
                 out + b * block + g * group, so block 64, group `lanes` is a row in order of positions. Exact but for the
                 product with the scale (as dot).
                 NaN codes give NaN elements.
   nat_fp8       out [ceil64(k)], the same with position = column, block 64, group ignored.
   dot_..._pairs, row_..._pairs   the same for pairs: x [ceil128(k)], scale64 is not looked at, row_ writes ceil128(k).
                 dot_fp8_pairs wants x times `up`, a power of two, and where one of these is infinite gives infinity or NaN.
   round_pairs   bf16(x * scale) * up, 0 instead of a bf16 below 2^-126, for n positions in pairs of F8_E4M3, n a multiple
                 of 128, read with strides x_block and x_group, written as row_ writes. scale64 [n / 64], the scales of
                 each 64 columns.
                 With pair_words, x of dot_..._pairs and what row_..._pairs and round_pairs write are words, a block being
                 128 columns of them; round_pairs reads floats always, and up is 1.
   to_bytes      codes [n], the nearest of x [n] / scale, ties to even; *sum: their sum. Returns the scale: max |x| / 127,
                 NaN if an x is not finite; where it is not above 0 all codes are 0.
   bytes         out[j * out_stride + i] = codes of 8 bits times codes of 8 bits, row i < n_w of w (w_stride bytes apart)
                 and row j < n_x of x (x[j] [ceil64(k)], zeros behind k), `group` columns to a scale (INT8 above):
                 w_scale [n_w, ceil(k / group)], x_scale[j] [ceil(k / group)], and behind it as many int32: 128 times the
                 sum of the group's codes. scratch: [dsv3__k_bytes_scratch(n_x, k)] bytes, 64-aligned is best.
   tile_add      sum [4][tile_x][lanes], one register of chains of each of 4 rows of w times n_x <= tile_x rows of x, go on
                 over `steps` blocks, from +0 if `first`: sum[i][j] += sum over s of w[i][s * w_step] times
                 x[j][s * x_step], a register each. So for n_w such groups of rows, sum_next floats and w_next floats apart.
   tile_add_pairs  the same for rows in pairs; with pair_words all but sum are words.
   tree          out[j * out_stride + i] = the chains of sum[.][i][j] added, for i < n_w and j < n_x: sum
                 [64 / lanes][4][tile_x][lanes], what tile_add made of all 64 chains.
   tile          out[j * out_stride + i] = dot product of row i < n_w of w (f32, w_stride floats apart) and row j < n_x
                 of x (x_stride floats apart; with index: row index[j] of x). Both [k], k a multiple of 64. Rows are
                 any floats: what matters is that both sides use the same positions.
   outer         u[h * u_stride + c] = fmaf(a[h * a_stride + t], b[t * b_stride + c], u[h * u_stride + c]) for t rising
                 from 0 to n_t - 1, for every h < n_h and c < n_c.
   exp_sum       x[i] = exp(x[i] - max) for i < n; returns their sum: 16 chains by i mod 16, rising from +0, then the tree
                 i + 8, i + 4, i + 2, i + 1. exp as dsv3__exp.
   swiglu        out[i] = silu(gate[i]) * up[i] for i < n, 0 instead of what is below 2^-126; out may be gate or up. silu as
                 dsv3__silu. */
/* In three parts, since variants share tables in such parts. */
#define DSV3__KERN_COMMON(X)                                                                                        \
    X(float, dot_f32, (const void *w, const float *x, const float *scale64, size_t k))                              \
    X(float, dot_f16, (const void *w, const float *x, const float *scale64, size_t k))                              \
    X(float, dot_bf16, (const void *w, const float *x, const float *scale64, size_t k))                             \
    X(float, dot_fp8, (const void *w, const float *x, const float *scale64, size_t k))                              \
    X(float, dot_i8, (const void *w, const float *x, const float *scale64, size_t k))                               \
    X(void, row_f32, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))       \
    X(void, row_f16, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))       \
    X(void, row_bf16, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))      \
    X(void, row_fp8, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))       \
    X(void, row_i8, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))        \
    X(void, nat_fp8, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))       \
    X(void, tile_add,                                                                                               \
      (float *sum, size_t sum_next, const float *const *w, size_t w_step, size_t w_next, size_t n_w,                \
       const float *const *x, size_t x_step, size_t steps, size_t n_x, bool first))                                 \
    X(void, tree, (float *out, size_t out_stride, const float *sum, size_t n_w, size_t n_x))                        \
    X(void, outer,                                                                                                  \
      (float *u, size_t u_stride, size_t n_h, const float *a, size_t a_stride, const float *b, size_t b_stride,     \
       size_t n_t, size_t n_c))                                                                                     \
    X(float, exp_sum, (float *x, size_t n, float max))                                                              \
    X(void, swiglu, (float *out, const float *gate, const float *up, size_t n))                                     \
    X(void, tile,                                                                                                   \
      (float *out, size_t out_stride, const float *w, size_t w_stride, size_t n_w, const float *x, size_t x_stride, \
       const uint32_t *index, size_t n_x, size_t k))
#define DSV3__KERN_PAIRS(X)                                                                                          \
    X(float, dot_bf16_pairs, (const void *w, const float *x, const float *scale64, size_t k))                        \
    X(float, dot_fp8_pairs, (const void *w, const float *x, const float *scale64, size_t k))                         \
    X(void, row_bf16_pairs, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k)) \
    X(void, row_fp8_pairs, (float *out, size_t block, size_t group, const void *w, const float *scale64, size_t k))  \
    X(void, round_pairs,                                                                                             \
      (float *out, size_t block, size_t group, const float *x, size_t x_block, size_t x_group, const float *scale64, \
       float up, size_t n))                                                                                          \
    X(void, tile_add_pairs,                                                                                          \
      (float *sum, size_t sum_next, const float *const *w, size_t w_step, size_t w_next, size_t n_w,                 \
       const float *const *x, size_t x_step, size_t steps, size_t n_x, bool first))
#define DSV3__KERN_BYTES(X)                                                                               \
    X(float, to_bytes, (int8_t * codes, const float *x, size_t n, int32_t *sum))                          \
    X(void, bytes,                                                                                        \
      (float *out, size_t out_stride, const int8_t *w, size_t w_stride, const float *w_scale, size_t n_w, \
       const int8_t *const *x, const float *const *x_scale, size_t n_x, size_t k, size_t group, void *scratch))
#define DSV3__KERN_OPS(X) DSV3__KERN_COMMON(X) DSV3__KERN_PAIRS(X) DSV3__KERN_BYTES(X)

#define DSV3__KERN_FIELD(ret, op, args) ret(*op) args;
typedef struct dsv3__kern {
    dsv3_isa isa;
    uint32_t lanes;      /* 4, 8 or 16 */
    uint32_t tile_x;     /* rows of x in a tile: 3 or 6 */
    uint32_t bytes_rows; /* rows of either side that `bytes` is best given at a time */
    bool pair_words;     /* x and weights in pairs: words of two bf16, not floats (PAIRS above) */
    float up;            /* a power of two: of x in dot_fp8_pairs, where codes are decoded as their value / up */
    DSV3__KERN_OPS(DSV3__KERN_FIELD)
} dsv3__kern;
#undef DSV3__KERN_FIELD

// ---- exp -------------------------------------------------------------------------------------------------

/* exp(x) = 2^n * e^r, n = round(x / ln 2), |r| <= ln(2) / 2, e^r by a polynomial. Error below 1 ulp (0.91 found over all
   floats); 0 instead of what is below 2^-126, infinity above 88.73, NaN of NaN.
   All variants do these same operations in this order. */
#define DSV3__EXP_LOW    -87.33654f  /* e^x >= 2^-126 */
#define DSV3__EXP_HIGH   89.0f       /* e^89 > 2^128 */
#define DSV3__EXP_MAGIC  12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits */
#define DSV3__EXP_LOG2E  1.44269504f
#define DSV3__EXP_LN2_HI 0.693359375f /* 9 bits: n * it is exact */
#define DSV3__EXP_LN2_LO -2.12194440e-4f
#define DSV3__EXP_C2     0.49999994f /* 1 + r + C2 r^2 + ... + C6 r^6: 3.2e-9 relative */
#define DSV3__EXP_C3     0.16666521f
#define DSV3__EXP_C4     0.041668266f
#define DSV3__EXP_C5     0.008368676f
#define DSV3__EXP_C6     0.001382069f

static float dsv3__exp(float x)
{
    if (x < DSV3__EXP_LOW)
        return 0;
    x = x > DSV3__EXP_HIGH ? DSV3__EXP_HIGH : x; /* NaN stays */
    float t = fmaf(x, DSV3__EXP_LOG2E, DSV3__EXP_MAGIC), n = t - DSV3__EXP_MAGIC;
    float r = fmaf(n, -DSV3__EXP_LN2_HI, x);
    r = fmaf(n, -DSV3__EXP_LN2_LO, r);
    float p = fmaf(DSV3__EXP_C6, r, DSV3__EXP_C5);
    p = fmaf(p, r, DSV3__EXP_C4);
    p = fmaf(p, r, DSV3__EXP_C3);
    p = fmaf(p, r, DSV3__EXP_C2);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    /* 2^n in two factors, since n is -126 ... 128 */
    uint32_t biased = dsv3__float_bits(t) - 0x4B400000u + 512, half = biased >> 1;
    return p * dsv3__bits_float((half - 256 + 127) << 23) * dsv3__bits_float((biased - half - 256 + 127) << 23);
}

/* 1 / (1 + e^-x). Error below 2.5 ulp. */
static float dsv3__sigmoid(float x)
{
    return 1.0f / (1.0f + dsv3__exp(-x));
}

/* x * sigmoid(x) as one division. Error below 2.5 ulp; below -88.73, where it is above -2.7e-37, the result is -0. */
static float dsv3__silu(float x)
{
    return x / (1.0f + dsv3__exp(-x));
}

/* Of activations nothing denormal is kept: one such operand makes a multiply-add of Intel's cores take 150 cycles, and
   gates far below 0 would give many. What is lost, 2^-126, is nothing beside any sum. */
DSV3__INLINE float dsv3__k_flush(float v)
{
    return fabsf(v) < DSV3__MIN_NORMAL ? 0 : v;
}

// ---- scalar ----------------------------------------------------------------------------------------------

/* The sum of 64 chains. The tree of the contract. */
static float dsv3__k_tree64_scalar(const float *a)
{
    float t[16];
    for (int i = 0; i < 16; i++)
        t[i] = (a[i] + a[16 + i]) + (a[32 + i] + a[48 + i]);
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] += t[i + n];
    return t[0] == t[0] ? t[0] : dsv3__bits_float(DSV3__NAN_BITS);
}

/* Are there scales beside the codes? */
DSV3__INLINE bool dsv3__k_scaled(dsv3_dtype dtype)
{
    return dtype == DSV3_DTYPE_F8_E4M3 || dtype == DSV3_DTYPE_I8;
}

/* One block of n <= 64 columns at their positions, zeros behind. */
DSV3__INLINE void dsv3__k_block_scalar(float *out, const uint8_t *w, float scale, size_t n, dsv3_dtype dtype)
{
    if (dtype == DSV3_DTYPE_F8_E4M3) {
        for (size_t c = 0; c < 64; c++)
            out[c % 4 * 16 + c / 4] = (c < n ? dsv3__fp8_value[w[c]] : 0.0f) * scale;
    } else if (dtype == DSV3_DTYPE_I8) {
        for (size_t c = 0; c < 64; c++)
            out[c] = (c < n ? (float)(int8_t)w[c] : 0.0f) * scale;
    } else {
        for (size_t c = 0; c < 64; c++)
            out[c] = c < n ? dsv3__num_get(w, dtype, c) : 0.0f;
    }
}

DSV3__INLINE size_t dsv3__k_block_size(dsv3_dtype dtype)
{
    return dtype == DSV3_DTYPE_F32 ? 256 : dsv3__k_scaled(dtype) ? 64 : 128; /* bytes of 64 columns */
}

/* Also what vector variants call for rows they cannot decode: they name their lanes. */
static void dsv3__k_row_scalar(float *out, size_t block, size_t group, size_t lanes, const void *w,
                               const float *scale64, size_t k, dsv3_dtype dtype)
{
    const uint8_t *p = (const uint8_t *)w;
    float values[64];
    for (size_t b = 0; b * 64 < k; b++) {
        dsv3__k_block_scalar(values, p + b * dsv3__k_block_size(dtype), dsv3__k_scaled(dtype) ? scale64[b] : 1.0f,
                             dsv3__min(k - b * 64, 64), dtype);
        for (size_t g = 0; g < 64 / lanes; g++)
            memcpy(out + b * block + g * group, values + g * lanes, lanes * sizeof(float));
    }
}

DSV3__INLINE float dsv3__k_dot_scalar(const void *w, const float *x, const float *scale64, size_t k, dsv3_dtype dtype)
{
    const uint8_t *p = (const uint8_t *)w;
    float a[64], values[64];
    for (int i = 0; i < 64; i++)
        a[i] = 0;
    for (size_t b = 0; b * 64 < k; b++) {
        dsv3__k_block_scalar(values, p + b * dsv3__k_block_size(dtype), dsv3__k_scaled(dtype) ? scale64[b] : 1.0f,
                             dsv3__min(k - b * 64, 64), dtype);
        for (size_t i = 0; i < 64; i++)
            a[i] = fmaf(values[i], x[b * 64 + i], a[i]);
    }
    return dsv3__k_tree64_scalar(a);
}

#define DSV3__K_DTYPE_SCALAR(name, dtype)                                                                   \
    static float dsv3__k_dot_##name##_scalar(const void *w, const float *x, const float *scale64, size_t k) \
    {                                                                                                       \
        return dsv3__k_dot_scalar(w, x, scale64, k, dtype);                                                 \
    }                                                                                                       \
    static void dsv3__k_row_##name##_scalar(float *out, size_t block, size_t group, const void *w,          \
                                            const float *scale64, size_t k)                                 \
    {                                                                                                       \
        dsv3__k_row_scalar(out, block, group, 8, w, scale64, k, dtype);                                     \
    }
DSV3__K_DTYPE_SCALAR(f32, DSV3_DTYPE_F32)
DSV3__K_DTYPE_SCALAR(f16, DSV3_DTYPE_F16)
DSV3__K_DTYPE_SCALAR(bf16, DSV3_DTYPE_BF16)
DSV3__K_DTYPE_SCALAR(fp8, DSV3_DTYPE_F8_E4M3)
DSV3__K_DTYPE_SCALAR(i8, DSV3_DTYPE_I8)
#undef DSV3__K_DTYPE_SCALAR

/* The column of position i of a block of 128, in pairs. */
DSV3__INLINE size_t dsv3__k_pair_column(size_t i, dsv3_dtype dtype)
{
    const size_t second = i < 64 ? 1 : 0, r = i % 64 / 16, lane = i % 16;
    return (dtype == DSV3_DTYPE_F8_E4M3 ? r / 2 * 64 + lane * 4 + r % 2 * 2 : r * 32 + lane * 2) + second;
}

/* One block of n <= 128 columns at their positions in pairs, zeros behind. */
DSV3__INLINE void dsv3__k_pair_block_scalar(float *out, const uint8_t *w, size_t n, dsv3_dtype dtype)
{
    for (size_t i = 0; i < 128; i++) {
        size_t c = dsv3__k_pair_column(i, dtype);
        out[i] = c < n ? dsv3__num_get(w, dtype, c) : 0.0f;
    }
}

static void dsv3__k_row_pairs_scalar(float *out, size_t block, size_t group, size_t lanes, const void *w, size_t k,
                                     dsv3_dtype dtype)
{
    const uint8_t *p = (const uint8_t *)w;
    float values[128];
    for (size_t c = 0; c < k; c += 128, p += 2 * dsv3__k_block_size(dtype)) {
        dsv3__k_pair_block_scalar(values, p, dsv3__min(k - c, 128), dtype);
        for (size_t h = 0; h < 2; h++, out += block)
            for (size_t g = 0; g < 64 / lanes; g++)
                memcpy(out + g * group, values + h * 64 + g * lanes, lanes * sizeof(float));
    }
}

DSV3__INLINE float dsv3__k_dot_pairs_scalar(const void *w, const float *x, size_t k, dsv3_dtype dtype)
{
    const uint8_t *p = (const uint8_t *)w;
    float a[64], values[128];
    for (int i = 0; i < 64; i++)
        a[i] = 0;
    for (size_t c = 0; c < k; c += 128, p += 2 * dsv3__k_block_size(dtype)) {
        dsv3__k_pair_block_scalar(values, p, dsv3__min(k - c, 128), dtype);
        for (size_t i = 0; i < 128; i++)
            a[i % 64] = fmaf(values[i], x[c + i], a[i % 64]);
    }
    return dsv3__k_tree64_scalar(a);
}

#define DSV3__K_PAIRS_SCALAR(name, dtype)                                                                         \
    static float dsv3__k_dot_##name##_pairs_scalar(const void *w, const float *x, const float *scale64, size_t k) \
    {                                                                                                             \
        (void)scale64;                                                                                            \
        return dsv3__k_dot_pairs_scalar(w, x, k, dtype);                                                          \
    }                                                                                                             \
    static void dsv3__k_row_##name##_pairs_scalar(float *out, size_t block, size_t group, const void *w,          \
                                                  const float *scale64, size_t k)                                 \
    {                                                                                                             \
        (void)scale64;                                                                                            \
        dsv3__k_row_pairs_scalar(out, block, group, 8, w, k, dtype);                                              \
    }
DSV3__K_PAIRS_SCALAR(bf16, DSV3_DTYPE_BF16)
DSV3__K_PAIRS_SCALAR(fp8, DSV3_DTYPE_F8_E4M3)
#undef DSV3__K_PAIRS_SCALAR

static void dsv3__k_round_pairs_scalar(float *out, size_t block, size_t group, const float *x, size_t x_block,
                                       size_t x_group, const float *scale64, float up, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const size_t b = i / 64, g = i % 64 / 8, l = i % 8;
        float v = x[b * x_block + g * x_group + l] * scale64[b / 2 * 2 + g / 4];
        out[b * block + g * group + l] = dsv3__k_flush(dsv3__bf16_decode(dsv3__bf16_encode(v))) * up;
    }
}

/* max |x| of n values; NaN if one is not finite. */
static float dsv3__k_max_scalar(const float *x, size_t n)
{
    float max = 0, poison = 0;
    for (size_t i = 0; i < n; i++) {
        float magnitude = fabsf(x[i]);
        max = magnitude > max ? magnitude : max;
        poison += magnitude * 0;
    }
    return max + poison;
}

/* The codes alone, of a scale above 0. */
static int32_t dsv3__k_codes_scalar(int8_t *codes, const float *x, size_t n, float scale)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    int32_t sum = 0;
    for (size_t i = 0; i < n; i++) {
        float v = x[i] / scale;
        v = v > 127 ? 127 : v < -127 ? -127 : v; /* where the scale is denormal */
        codes[i] = (int8_t)((v + magic) - magic);
        sum += codes[i];
    }
    return sum;
}

static float dsv3__k_to_bytes_scalar(int8_t *codes, const float *x, size_t n, int32_t *sum)
{
    const float scale = dsv3__k_max_scalar(x, n) / 127.0f;
    *sum = scale > 0 ? dsv3__k_codes_scalar(codes, x, n, scale) : 0;
    if (!(scale > 0)) /* all are 0, or too small for a scale, or one is not finite */
        memset(codes, 0, n);
    return scale;
}

static void dsv3__k_bytes_scalar(float *out, size_t out_stride, const int8_t *w, size_t w_stride, const float *w_scale,
                                 size_t n_w, const int8_t *const *x, const float *const *x_scale, size_t n_x, size_t k,
                                 size_t group, void *scratch)
{
    (void)scratch;
    const size_t n_groups = (k + group - 1) / group;
    for (size_t i = 0; i < n_w; i++, w += w_stride, w_scale += n_groups)
        for (size_t j = 0; j < n_x; j++) {
            float y = 0;
            for (size_t g = 0; g < n_groups; g++) {
                int32_t sum = 0;
                for (size_t c = g * group; c < dsv3__min(k, (g + 1) * group); c++)
                    sum += w[c] * x[j][c];
                y = fmaf((float)sum, w_scale[g] * x_scale[j][g], y);
            }
            out[j * out_stride + i] = y == y ? y : dsv3__bits_float(DSV3__NAN_BITS);
        }
}

static void dsv3__k_nat_fp8_scalar(float *out, size_t block, size_t group, const void *w, const float *scale64,
                                   size_t k)
{
    const uint8_t *p = (const uint8_t *)w;
    (void)block, (void)group;
    for (size_t c = 0; c < (k + 63) / 64 * 64; c++)
        out[c] = (c < k ? dsv3__fp8_value[p[c]] : 0.0f) * scale64[c / 64];
}

static void dsv3__k_tile_add_scalar(float *sum, size_t sum_next, const float *const *w, size_t w_step, size_t w_next,
                                    size_t n_w, const float *const *x, size_t x_step, size_t steps, size_t n_x,
                                    bool first)
{
    for (size_t i = 0; i < n_w * DSV3__TILE_W; i++)
        for (size_t j = 0; j < n_x; j++) {
            const float *row = w[i % DSV3__TILE_W] + i / DSV3__TILE_W * w_next;
            float *a = sum + i / DSV3__TILE_W * sum_next + (i % DSV3__TILE_W * 3 + j) * 8;
            for (size_t l = 0; first && l < 8; l++)
                a[l] = 0;
            for (size_t s = 0; s < steps; s++)
                for (size_t l = 0; l < 8; l++)
                    a[l] = fmaf(row[s * w_step + l], x[j][s * x_step + l], a[l]);
        }
}

static void dsv3__k_tree_scalar(float *out, size_t out_stride, const float *sum, size_t n_w, size_t n_x)
{
    float a[64];
    for (size_t i = 0; i < n_w; i++)
        for (size_t j = 0; j < n_x; j++) {
            for (size_t c = 0; c < 64; c++)
                a[c] = sum[((c / 8 * DSV3__TILE_W + i) * 3 + j) * 8 + c % 8];
            out[j * out_stride + i] = dsv3__k_tree64_scalar(a);
        }
}

static void dsv3__k_outer_scalar(float *u, size_t u_stride, size_t n_h, const float *a, size_t a_stride, const float *b,
                                 size_t b_stride, size_t n_t, size_t n_c)
{
    for (size_t h = 0; h < n_h; h++)
        for (size_t t = 0; t < n_t; t++)
            for (size_t c = 0; c < n_c; c++)
                u[h * u_stride + c] = fmaf(a[h * a_stride + t], b[t * b_stride + c], u[h * u_stride + c]);
}

/* The sum of the 16 chains of exp_sum. */
static float dsv3__k_tree16(float *t)
{
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++)
            t[i] += t[i + n];
    return t[0];
}

static float dsv3__k_exp_sum_scalar(float *x, size_t n, float max)
{
    float t[16] = {0};
    for (size_t i = 0; i < n; i++) {
        x[i] = dsv3__exp(x[i] - max);
        t[i % 16] += x[i];
    }
    return dsv3__k_tree16(t);
}

static void dsv3__k_swiglu_scalar(float *out, const float *gate, const float *up, size_t n)
{
    for (size_t i = 0; i < n; i++)
        out[i] = dsv3__k_flush(dsv3__silu(gate[i]) * up[i]);
}

typedef void (*dsv3__tile_add_fn)(float *sum, size_t sum_next, const float *const *w, size_t w_step, size_t w_next,
                                  size_t n_w, const float *const *x, size_t x_step, size_t steps, size_t n_x,
                                  bool first);
typedef void (*dsv3__tree_fn)(float *out, size_t out_stride, const float *sum, size_t n_w, size_t n_x);

/* How many of the n rows of x that are left go into the next tile: a last tile of 1 would wait for its additions. */
DSV3__INLINE size_t dsv3__k_tile_rows(size_t n, size_t most)
{
    return n > most && n < 2 * most ? (n + 1) / 2 : dsv3__min(n, most);
}

#define DSV3__TILE_CHUNK \
    640 /* columns: a row of the cache; 7 of 2.5 KB, or 10, stay in L1 while every group of lanes passes over them */

/* Reads n floats, a cache line at a time. */
DSV3__INLINE void dsv3__k_touch(const float *p, size_t n)
{
    for (size_t i = 0; i < n; i += 16)
        (void)*(const volatile float *)(p + i);
}

/* `tile` over rows in place. */
DSV3__INLINE void dsv3__k_tile_rows_in_place(dsv3__tile_add_fn add, dsv3__tree_fn tree, size_t lanes, size_t tile_x,
                                             float *out, size_t out_stride, const float *w, size_t w_stride, size_t n_w,
                                             const float *x, size_t x_stride, const uint32_t *index, size_t n_x,
                                             size_t k)
{
    float sum[DSV3__TILE_SUM]; /* [64 / lanes][4][tile_x][lanes] */
    const float *wr[DSV3__TILE_W], *xr[6];
    for (size_t i = 0; i < n_w; i += DSV3__TILE_W) {
        const size_t rows = dsv3__min(n_w - i, DSV3__TILE_W);
        for (size_t r = 0; r < rows; r++) /* PERF: comes in front to back; the tile would ask for every fourth line */
            dsv3__k_touch(w + (i + r) * w_stride, k);
        for (size_t j = 0, n; j < n_x; j += n) {
            n = dsv3__k_tile_rows(n_x - j, tile_x);
            for (size_t c = 0; c == 0 || c < k; c += DSV3__TILE_CHUNK)
                for (size_t g = 0; g < 64 / lanes; g++) {
                    for (size_t r = 0; r < DSV3__TILE_W; r++) /* rows that are not there repeat the last */
                        wr[r] = w + (i + dsv3__min(r, rows - 1)) * w_stride + c + g * lanes;
                    for (size_t r = 0; r < n; r++)
                        xr[r] = x + (index ? index[j + r] : j + r) * x_stride + c + g * lanes;
                    add(sum + g * DSV3__TILE_W * tile_x * lanes, 0, wr, 64, 0, 1, xr, 64,
                        dsv3__min(k - c, DSV3__TILE_CHUNK) / 64, n, c == 0);
                }
            tree(out + j * out_stride + i, out_stride, sum, rows, n);
        }
    }
}

static void dsv3__k_tile_scalar(float *out, size_t out_stride, const float *w, size_t w_stride, size_t n_w,
                                const float *x, size_t x_stride, const uint32_t *index, size_t n_x, size_t k)
{
    dsv3__k_tile_rows_in_place(dsv3__k_tile_add_scalar, dsv3__k_tree_scalar, 8, 3, out, out_stride, w, w_stride, n_w, x,
                               x_stride, index, n_x, k);
}

#define DSV3__TWO_120 1.329227995784916e36f

#if DSV3__AVX2
// ---- AVX2: chain 8g + l is lane l of register g ------------------------------------------------------------

/* The sum of 64 chains in 8 registers. */
DSV3__TARGET_AVX2 DSV3__INLINE float dsv3__k_tree64_avx2(const __m256 *a)
{
    __m256 lo = _mm256_add_ps(_mm256_add_ps(a[0], a[2]), _mm256_add_ps(a[4], a[6])); /* t[i], i < 8 */
    __m256 hi = _mm256_add_ps(_mm256_add_ps(a[1], a[3]), _mm256_add_ps(a[5], a[7])); /* t[i + 8] */
    __m256 t = _mm256_add_ps(lo, hi);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)); /* t[i] + t[i + 4] */
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));                                        /* + t[i + 2] */
    s = _mm_add_ss(s, _mm_movehdup_ps(s));                                         /* + t[i + 1] */
    float r = _mm_cvtss_f32(s);
    return r == r ? r : dsv3__bits_float(DSV3__NAN_BITS);
}

/* 8 values of F32, F16, BF16; 8 codes of I8. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_load8_avx2(const uint8_t *w, dsv3_dtype dtype)
{
    if (dtype == DSV3_DTYPE_F32)
        return _mm256_loadu_ps((const float *)(const void *)w);
    if (dtype == DSV3_DTYPE_I8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)w)));
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)w);
    if (dtype == DSV3_DTYPE_F16)
        return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); /* bits << 16 */
}

DSV3__TARGET_AVX2 DSV3__INLINE float dsv3__k_dot_avx2(const void *weights, const float *x, const float *scale64,
                                                      size_t k, dsv3_dtype dtype)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t block = dsv3__k_block_size(dtype), part = block / 8;
    uint8_t tail[256];
    __m256 a[8];
    a[0] = a[1] = a[2] = a[3] = a[4] = a[5] = a[6] = a[7] = _mm256_setzero_ps();
    while (k) {
        if (DSV3__UNLIKELY(k < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k * (block / 64));
            w = tail;
            k = 64;
        }
        __m256 s = _mm256_set1_ps(dtype == DSV3_DTYPE_I8 ? *scale64++ : 1.0f), v;
        for (size_t i = 0; i < block; i += 64)
            DSV3__PREFETCH(w + i);
#define DSV3__STEP(g)                            \
    v = dsv3__k_load8_avx2(w + g * part, dtype); \
    if (dtype == DSV3_DTYPE_I8)                  \
        v = _mm256_mul_ps(v, s);                 \
    a[g] = _mm256_fmadd_ps(v, _mm256_loadu_ps(x + 8 * g), a[g])
        DSV3__STEP(0);
        DSV3__STEP(1);
        DSV3__STEP(2);
        DSV3__STEP(3);
        DSV3__STEP(4);
        DSV3__STEP(5);
        DSV3__STEP(6);
        DSV3__STEP(7);
#undef DSV3__STEP
        w += block;
        x += 64;
        k -= 64;
    }
    return dsv3__k_tree64_avx2(a);
}

/* Where register g of a block goes, for variants of 8 and of 16 lanes. */
#define DSV3__REGISTER(lanes, g, group) ((lanes) == 8 ? (g) * (group) : (g) / 2 * (group) + (g) % 2 * 8)

DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_row_avx2(float *out, size_t block, size_t group, const void *weights,
                                                     const float *scale64, size_t k, dsv3_dtype dtype,
                                                     const size_t lanes)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t size = dsv3__k_block_size(dtype);
    uint8_t tail[256];
    for (size_t b = 0; b * 64 < k; b++, w += size, out += block) {
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, (k - b * 64) * (size / 64));
            w = tail;
        }
        __m256 s = _mm256_set1_ps(dtype == DSV3_DTYPE_I8 ? scale64[b] : 1.0f);
        for (size_t g = 0; g < 8; g++) {
            __m256 v = dsv3__k_load8_avx2(w + g * (size / 8), dtype);
            _mm256_storeu_ps(out + DSV3__REGISTER(lanes, g, group), dtype == DSV3_DTYPE_I8 ? _mm256_mul_ps(v, s) : v);
        }
    }
}

#define DSV3__K_DTYPE_AVX2(name, dtype)                                                                            \
    DSV3__TARGET_AVX2 static float dsv3__k_dot_##name##_avx2(const void *w, const float *x, const float *scale64,  \
                                                             size_t k)                                             \
    {                                                                                                              \
        return dsv3__k_dot_avx2(w, x, scale64, k, dtype);                                                          \
    }                                                                                                              \
    DSV3__TARGET_AVX2 static void dsv3__k_row_##name##_avx2(float *out, size_t block, size_t group, const void *w, \
                                                            const float *scale64, size_t k)                        \
    {                                                                                                              \
        dsv3__k_row_avx2(out, block, group, w, scale64, k, dtype, 8);                                              \
    }
DSV3__K_DTYPE_AVX2(f32, DSV3_DTYPE_F32)
DSV3__K_DTYPE_AVX2(f16, DSV3_DTYPE_F16)
DSV3__K_DTYPE_AVX2(bf16, DSV3_DTYPE_BF16)
DSV3__K_DTYPE_AVX2(i8, DSV3_DTYPE_I8)
#undef DSV3__K_DTYPE_AVX2

/* FP8: a code's 7 bits of exponent and mantissa, moved to bits 20 ... 26 of a word, are the f32 (a denormal one for
   denormal codes) of its value * 2^-120. Times scale * 2^120, both exact, that is f32(value * scale). What this gets wrong
   is watched for, and the row done again by the scalar code: NaN codes come out as 480, scales from 2^8 as infinity. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256i
dsv3__k_fp8_even_avx2(__m256i v) /* halves: bytes 0, 2; their sign 5 times, 7 bits, junk */
{
    return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 4);
}

DSV3__TARGET_AVX2 DSV3__INLINE __m256i dsv3__k_fp8_odd_avx2(__m256i v) /* bytes 1, 3 */
{
    return _mm256_srai_epi16(v, 4);
}

DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_fp8_low_avx2(__m256i halves) /* byte 0 or 1 of 8 words, * 2^-120 */
{
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(halves, 16), _mm256_set1_epi32((int)0x87F00000)));
}

DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_fp8_high_avx2(__m256i halves) /* byte 2 or 3 */
{
    return _mm256_castsi256_ps(_mm256_and_si256(halves, _mm256_set1_epi32((int)0x87F00000)));
}

DSV3__TARGET_AVX2 DSV3__INLINE __m256i dsv3__k_fp8_worst_avx2(__m256i worst,
                                                              __m256i v) /* bytes: the largest code & 0x7F */
{
    return _mm256_max_epu8(worst, _mm256_and_si256(v, _mm256_set1_epi8(0x7F)));
}

DSV3__TARGET_AVX2 DSV3__INLINE bool dsv3__k_fp8_nan_avx2(__m256i worst)
{
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(worst, _mm256_set1_epi8(0x7F))) != 0;
}

/* Registers of 8 chains: 0, 2, 4, 6 are lanes 0 ... 7 of bytes 0, 1, 2, 3. Decoded one by one, since 8 chains leave few
   registers. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256i dsv3__k_dot_fp8_block_avx2(__m256 *a, const uint8_t *w, const float *x,
                                                                  float scale, __m256i worst)
{
    const __m256 s = _mm256_set1_ps(scale * DSV3__TWO_120);
    __m256i v, t;
#define DSV3__STEP(g, values) /* fmaf(f32(code * scale), x, chain) */ \
    a[g] = _mm256_fmadd_ps(_mm256_mul_ps(values, s), _mm256_loadu_ps(x + 8 * g), a[g])
    v = _mm256_loadu_si256((const __m256i *)(const void *)w);
    worst = dsv3__k_fp8_worst_avx2(worst, v);
    t = dsv3__k_fp8_even_avx2(v);
    DSV3__STEP(0, dsv3__k_fp8_low_avx2(t));
    DSV3__STEP(4, dsv3__k_fp8_high_avx2(t));
    t = dsv3__k_fp8_odd_avx2(v);
    DSV3__STEP(2, dsv3__k_fp8_low_avx2(t));
    DSV3__STEP(6, dsv3__k_fp8_high_avx2(t));
    v = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32));
    worst = dsv3__k_fp8_worst_avx2(worst, v);
    t = dsv3__k_fp8_even_avx2(v);
    DSV3__STEP(1, dsv3__k_fp8_low_avx2(t));
    DSV3__STEP(5, dsv3__k_fp8_high_avx2(t));
    t = dsv3__k_fp8_odd_avx2(v);
    DSV3__STEP(3, dsv3__k_fp8_low_avx2(t));
    DSV3__STEP(7, dsv3__k_fp8_high_avx2(t));
#undef DSV3__STEP
    return worst;
}

DSV3__TARGET_AVX2 static float dsv3__k_dot_fp8_avx2(const void *weights, const float *x, const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t blocks = k / 64;
    uint8_t tail[64];
    __m256i worst = _mm256_setzero_si256();
    __m256 a[8];
    a[0] = a[1] = a[2] = a[3] = a[4] = a[5] = a[6] = a[7] = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; b++) {
        DSV3__PREFETCH(w + b * 64);
        worst = dsv3__k_dot_fp8_block_avx2(a, w + b * 64, x + b * 64, scale64[b], worst);
    }
    if (k % 64) {
        memset(tail, 0, sizeof tail);
        memcpy(tail, w + blocks * 64, k % 64);
        worst = dsv3__k_dot_fp8_block_avx2(a, tail, x + blocks * 64, scale64[blocks], worst);
    }
    float r = dsv3__k_tree64_avx2(a);
    /* a scale that became infinite makes every product it meets infinite or NaN, and with them the sum */
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx2(worst) || !(fabsf(r) < INFINITY)))
        return dsv3__k_dot_fp8_scalar(weights, x, scale64, k);
    return r;
}

DSV3__TARGET_AVX2 static void dsv3__k_row_fp8_avx2(float *out, size_t block, size_t group, const void *weights,
                                                   const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[64];
    __m256i worst = _mm256_setzero_si256();
    float scales = 0;
    for (size_t b = 0; b * 64 < k; b++) {
        const uint8_t *p = w + b * 64;
        float scaled = scale64[b] * DSV3__TWO_120, *to = out + b * block;
        __m256 s = _mm256_set1_ps(scaled);
        scales = fmaf(scaled, 0.0f, scales); /* infinity * 0 is NaN */
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, p, k - b * 64);
            p = tail;
        }
        for (size_t h = 0; h < 2; h++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(p + 32 * h));
            __m256i even = dsv3__k_fp8_even_avx2(v), odd = dsv3__k_fp8_odd_avx2(v);
            worst = dsv3__k_fp8_worst_avx2(worst, v);
            _mm256_storeu_ps(to + h * group, _mm256_mul_ps(dsv3__k_fp8_low_avx2(even), s));
            _mm256_storeu_ps(to + (2 + h) * group, _mm256_mul_ps(dsv3__k_fp8_low_avx2(odd), s));
            _mm256_storeu_ps(to + (4 + h) * group, _mm256_mul_ps(dsv3__k_fp8_high_avx2(even), s));
            _mm256_storeu_ps(to + (6 + h) * group, _mm256_mul_ps(dsv3__k_fp8_high_avx2(odd), s));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx2(worst) || scales != scales))
        dsv3__k_row_scalar(out, block, group, 8, weights, scale64, k, DSV3_DTYPE_F8_E4M3);
}

// ---- AVX2: pairs -------------------------------------------------------------------------------------------

/* Eight codes' values * 2^-120 times 2^120: the values. Where x brings the 2^120 (`up`), a dot product needs no such step:
   a fifth of its instructions. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_fp8_code_avx2(__m256 v)
{
    return _mm256_mul_ps(v, _mm256_set1_ps(DSV3__TWO_120));
}

/* 32 columns in pairs: bytes 1, 0 of 8 words are one chain register's, bytes 3, 2 the next but one's. x: where the first
   register's begin. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256i dsv3__k_dot_fp8_pairs_32_avx2(__m256 *a0, __m256 *a1, const uint8_t *w,
                                                                     const float *x, __m256i worst)
{
    __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)w);
    __m256i even = dsv3__k_fp8_even_avx2(v), odd = dsv3__k_fp8_odd_avx2(v);
    *a0 = _mm256_fmadd_ps(dsv3__k_fp8_low_avx2(odd), _mm256_loadu_ps(x), *a0);
    *a1 = _mm256_fmadd_ps(dsv3__k_fp8_high_avx2(odd), _mm256_loadu_ps(x + 16), *a1);
    *a0 = _mm256_fmadd_ps(dsv3__k_fp8_low_avx2(even), _mm256_loadu_ps(x + 64), *a0);
    *a1 = _mm256_fmadd_ps(dsv3__k_fp8_high_avx2(even), _mm256_loadu_ps(x + 80), *a1);
    return dsv3__k_fp8_worst_avx2(worst, v);
}

DSV3__TARGET_AVX2 static float dsv3__k_dot_fp8_pairs_avx2(const void *weights, const float *x, const float *scale64,
                                                          size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    __m256i worst = _mm256_setzero_si256();
    __m256 a[8];
    (void)scale64;
    a[0] = a[1] = a[2] = a[3] = a[4] = a[5] = a[6] = a[7] = _mm256_setzero_ps();
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 128, x += 128) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, left);
            w = tail;
        } else {
            DSV3__PREFETCH(w);
            DSV3__PREFETCH(w + 64);
        }
        worst = dsv3__k_dot_fp8_pairs_32_avx2(&a[0], &a[2], w, x, worst);
        worst = dsv3__k_dot_fp8_pairs_32_avx2(&a[1], &a[3], w + 32, x + 8, worst);
        worst = dsv3__k_dot_fp8_pairs_32_avx2(&a[4], &a[6], w + 64, x + 32, worst);
        worst = dsv3__k_dot_fp8_pairs_32_avx2(&a[5], &a[7], w + 96, x + 40, worst);
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx2(worst)))
        return dsv3__bits_float(DSV3__NAN_BITS);
    return dsv3__k_tree64_avx2(a);
}

DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_row_fp8_pairs_lanes_avx2(float *out, size_t block, size_t group,
                                                                     const void *weights, size_t k, const size_t lanes)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    __m256i worst = _mm256_setzero_si256();
    float *to = out;
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 128, to += 2 * block) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, left);
            w = tail;
        }
        for (size_t h = 0; h < 4; h++) {
            const size_t g = h / 2 * 4 + h % 2;
            float *first = to + DSV3__REGISTER(lanes, g, group), *next = to + DSV3__REGISTER(lanes, g + 2, group);
            __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32 * h));
            __m256i even = dsv3__k_fp8_even_avx2(v), odd = dsv3__k_fp8_odd_avx2(v);
            worst = dsv3__k_fp8_worst_avx2(worst, v);
            _mm256_storeu_ps(first, dsv3__k_fp8_code_avx2(dsv3__k_fp8_low_avx2(odd)));
            _mm256_storeu_ps(next, dsv3__k_fp8_code_avx2(dsv3__k_fp8_high_avx2(odd)));
            _mm256_storeu_ps(first + block, dsv3__k_fp8_code_avx2(dsv3__k_fp8_low_avx2(even)));
            _mm256_storeu_ps(next + block, dsv3__k_fp8_code_avx2(dsv3__k_fp8_high_avx2(even)));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx2(worst)))
        dsv3__k_row_pairs_scalar(out, block, group, lanes, weights, k, DSV3_DTYPE_F8_E4M3);
}

DSV3__TARGET_AVX2 static void dsv3__k_row_fp8_pairs_avx2(float *out, size_t block, size_t group, const void *w,
                                                         const float *scale64, size_t k)
{
    (void)scale64;
    dsv3__k_row_fp8_pairs_lanes_avx2(out, block, group, w, k, 8);
}

/* BF16: the second of two columns is the high half of a word, the first the low. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_second_avx2(__m256i v)
{
    return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32((int)0xFFFF0000)));
}

DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_first_avx2(__m256i v)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}

DSV3__TARGET_AVX2 static float dsv3__k_dot_bf16_pairs_avx2(const void *weights, const float *x, const float *scale64,
                                                           size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    __m256 a[8];
    __m256i v;
    (void)scale64;
    a[0] = a[1] = a[2] = a[3] = a[4] = a[5] = a[6] = a[7] = _mm256_setzero_ps();
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 256, x += 128) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * left);
            w = tail;
        }
#define DSV3__STEP(g)                                                                 \
    if (g % 2 == 0)                                                                   \
        DSV3__PREFETCH(w + 32 * g);                                                   \
    v = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32 * g));              \
    a[g] = _mm256_fmadd_ps(dsv3__k_second_avx2(v), _mm256_loadu_ps(x + 8 * g), a[g]); \
    a[g] = _mm256_fmadd_ps(dsv3__k_first_avx2(v), _mm256_loadu_ps(x + 64 + 8 * g), a[g])
        DSV3__STEP(0);
        DSV3__STEP(1);
        DSV3__STEP(2);
        DSV3__STEP(3);
        DSV3__STEP(4);
        DSV3__STEP(5);
        DSV3__STEP(6);
        DSV3__STEP(7);
#undef DSV3__STEP
    }
    return dsv3__k_tree64_avx2(a);
}

DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_row_bf16_pairs_lanes_avx2(float *out, size_t block, size_t group,
                                                                      const void *weights, size_t k, const size_t lanes)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 256, out += 2 * block) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * left);
            w = tail;
        }
        for (size_t g = 0; g < 8; g++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(w + 32 * g));
            float *to = out + DSV3__REGISTER(lanes, g, group);
            _mm256_storeu_ps(to, dsv3__k_second_avx2(v));
            _mm256_storeu_ps(to + block, dsv3__k_first_avx2(v));
        }
    }
}

DSV3__TARGET_AVX2 static void dsv3__k_row_bf16_pairs_avx2(float *out, size_t block, size_t group, const void *w,
                                                          const float *scale64, size_t k)
{
    (void)scale64;
    dsv3__k_row_bf16_pairs_lanes_avx2(out, block, group, w, k, 8);
}

/* dsv3__k_flush, 8 at once. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_flush_avx2(__m256 v)
{
    __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    return _mm256_and_ps(v, _mm256_cmp_ps(magnitude, _mm256_set1_ps(DSV3__MIN_NORMAL), _CMP_NLT_UQ));
}

/* bf16(v), as f32; no NaN but the quiet ones of the arithmetic. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_bf16_avx2(__m256 v)
{
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32((int)0xFFFF0000)));
}

DSV3__TARGET_AVX2 static void dsv3__k_round_pairs_avx2(float *out, size_t block, size_t group, const float *x,
                                                       size_t x_block, size_t x_group, const float *scale64, float up,
                                                       size_t n)
{
    const __m256 ups = _mm256_set1_ps(up);
    for (size_t g = 0; g < 8; g++)
        for (size_t b = 0; b < n / 64; b++) {
            __m256 v = _mm256_loadu_ps(x + b * x_block + g * x_group);
            v = dsv3__k_bf16_avx2(_mm256_mul_ps(v, _mm256_set1_ps(scale64[b / 2 * 2 + g / 4])));
            _mm256_storeu_ps(out + b * block + g * group, _mm256_mul_ps(dsv3__k_flush_avx2(v), ups));
        }
}

// ---- AVX2: codes of 8 bits -----------------------------------------------------------------------------------

/* Adds 32 products: |w| as unsigned bytes times x with w's sign. x is never -128, so a sum of two fits 16 bits. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256i dsv3__k_bytes_add_avx2(__m256i sum, __m256i w, __m256i magnitude, __m256i x)
{
    __m256i two = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(two, _mm256_set1_epi16(1)));
}

DSV3__TARGET_AVX2 DSV3__INLINE int32_t dsv3__k_sum8_avx2(__m256i v)
{
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1)));
}

DSV3__TARGET_AVX2 static float dsv3__k_to_bytes_avx2(int8_t *codes, const float *x, size_t n, int32_t *sum)
{
    const __m256 sign = _mm256_set1_ps(-0.0f), most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
    const size_t whole = n / 32 * 32;
    float lanes[16];
    __m256 max = _mm256_setzero_ps(), poison = max;
    __m256i total = _mm256_setzero_si256(), v[4];
    for (size_t i = 0; i < whole; i += 8) {
        __m256 magnitude = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i));
        max = _mm256_max_ps(magnitude, max);
        poison = _mm256_fmadd_ps(magnitude, _mm256_setzero_ps(), poison);
    }
    _mm256_storeu_ps(lanes, max), _mm256_storeu_ps(lanes + 8, poison);
    const float some = dsv3__k_max_scalar(lanes, 16), others = dsv3__k_max_scalar(x + whole, n - whole);
    const float scale = (some > others ? some + others * 0 : others + some * 0) / 127.0f; /* NaN of either */
    *sum = 0;
    if (!(scale > 0)) {
        memset(codes, 0, n);
        return scale;
    }
    const __m256 s = _mm256_set1_ps(scale);
    for (size_t i = 0; i < whole; i += 32) {
        DSV3__UNROLL
        for (size_t q = 0; q < 4; q++) {
            __m256 y = _mm256_div_ps(_mm256_loadu_ps(x + i + 8 * q), s);
            v[q] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(y, most), least));
            total = _mm256_add_epi32(total, v[q]);
        }
        /* the packs work in halves: words 0, 4, 1, 5, 2, 6, 3, 7 of 4 codes */
        __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        packed = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(void *)(codes + i), packed);
    }
    *sum = dsv3__k_sum8_avx2(total) + dsv3__k_codes_scalar(codes + whole, x + whole, n - whole, scale);
    return scale;
}

/* Sums of W rows of w times X rows of x over n columns: sum[i][j], W <= 2 and X <= 4 constants. */
DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_bytes_tile_avx2(int32_t sum[2][4], const int8_t *w, size_t w_stride,
                                                            const int8_t *const *x, size_t c, size_t n, const int W,
                                                            const int X)
{
    const int8_t *w0 = w + c, *w1 = w + (W > 1 ? w_stride : 0) + c;
    const int8_t *x0 = x[0] + c, *x1 = x[X > 1 ? 1 : 0] + c, *x2 = x[X > 2 ? 2 : 0] + c, *x3 = x[X > 3 ? 3 : 0] + c;
    __m256i a00, a01, a02, a03, a10, a11, a12, a13, v0, v1, m0, m1, y;
    a00 = a01 = a02 = a03 = a10 = a11 = a12 = a13 = v1 = m1 = _mm256_setzero_si256();
#define DSV3__LOAD(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define DSV3__STEP(j, from, first, next)                    \
    if (X > j) {                                            \
        y = DSV3__LOAD(from);                               \
        first = dsv3__k_bytes_add_avx2(first, v0, m0, y);   \
        if (W > 1)                                          \
            next = dsv3__k_bytes_add_avx2(next, v1, m1, y); \
    }
#define DSV3__STEPS(w_0, w_1, i)                        \
    v0 = DSV3__LOAD(w_0), m0 = _mm256_abs_epi8(v0);     \
    if (W > 1)                                          \
        v1 = DSV3__LOAD(w_1), m1 = _mm256_abs_epi8(v1); \
    DSV3__STEP(0, x0 + i, a00, a10)                     \
    DSV3__STEP(1, x1 + i, a01, a11)                     \
    DSV3__STEP(2, x2 + i, a02, a12)                     \
    DSV3__STEP(3, x3 + i, a03, a13)
    size_t i = 0;
    for (; i + 64 <= n; i += 64) {
        if (W == 1)
            DSV3__PREFETCH(w0 + i);
        DSV3__STEPS(w0 + i, w1 + i, i)
        DSV3__STEPS(w0 + i + 32, w1 + i + 32, i + 32)
    }
    for (; i + 32 <= n; i += 32) {
        DSV3__STEPS(w0 + i, w1 + i, i)
    }
    if (i < n) {
        int8_t tail[2][32];
        memset(tail, 0, sizeof tail);
        memcpy(tail[0], w0 + i, n - i);
        memcpy(tail[1], w1 + i, n - i);
        DSV3__STEPS(tail[0], tail[1], i)
    }
#undef DSV3__LOAD
#undef DSV3__STEP
#undef DSV3__STEPS
    sum[0][0] = dsv3__k_sum8_avx2(a00);
    if (X > 1)
        sum[0][1] = dsv3__k_sum8_avx2(a01);
    if (X > 2)
        sum[0][2] = dsv3__k_sum8_avx2(a02);
    if (X > 3)
        sum[0][3] = dsv3__k_sum8_avx2(a03);
    if (W > 1) {
        sum[1][0] = dsv3__k_sum8_avx2(a10);
        if (X > 1)
            sum[1][1] = dsv3__k_sum8_avx2(a11);
        if (X > 2)
            sum[1][2] = dsv3__k_sum8_avx2(a12);
        if (X > 3)
            sum[1][3] = dsv3__k_sum8_avx2(a13);
    }
}

DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_bytes_wx_avx2(float *out, size_t out_stride, const int8_t *w,
                                                          size_t w_stride, const float *w_scale, const int8_t *const *x,
                                                          const float *const *x_scale, size_t k, size_t group,
                                                          const int W, const int X)
{
    const size_t n_groups = (k + group - 1) / group;
    int32_t sum[2][4];
    float y[2][4] = {{0}};
    for (size_t g = 0, c = 0; g < n_groups; g++, c += group) {
        dsv3__k_bytes_tile_avx2(sum, w, w_stride, x, c, dsv3__min(k - c, group), W, X);
        for (int i = 0; i < W; i++)
            for (int j = 0; j < X; j++)
                y[i][j] = fmaf((float)sum[i][j], w_scale[(size_t)i * n_groups + g] * x_scale[j][g], y[i][j]);
    }
    for (int i = 0; i < W; i++)
        for (int j = 0; j < X; j++)
            out[(size_t)j * out_stride + (size_t)i] = y[i][j] == y[i][j] ? y[i][j] : dsv3__bits_float(DSV3__NAN_BITS);
}

DSV3__TARGET_AVX2 static void dsv3__k_bytes_avx2(float *out, size_t out_stride, const int8_t *w, size_t w_stride,
                                                 const float *w_scale, size_t n_w, const int8_t *const *x,
                                                 const float *const *x_scale, size_t n_x, size_t k, size_t group,
                                                 void *scratch)
{
    (void)scratch;
    const size_t n_groups = (k + group - 1) / group;
    for (size_t j = 0, t; j < n_x; j += t) {
        t = n_x - j < 4 ? n_x - j : 4;
        for (size_t i = 0; i < n_w;) {
            const bool two = t > 1 && i + 1 < n_w; /* one row of x: one row of w after the other, at memory's speed */
            float *to = out + j * out_stride + i;
            const int8_t *from = w + i * w_stride;
            const float *s = w_scale + i * n_groups;
#define DSV3__CASE(W, X) \
    case X: dsv3__k_bytes_wx_avx2(to, out_stride, from, w_stride, s, x + j, x_scale + j, k, group, W, X); break
            if (two)
                switch (t) {
                    DSV3__CASE(2, 4);
                    DSV3__CASE(2, 3);
                    DSV3__CASE(2, 2);
                }
            else
                switch (t) {
                    DSV3__CASE(1, 4);
                    DSV3__CASE(1, 3);
                    DSV3__CASE(1, 2);
                    DSV3__CASE(1, 1);
                }
#undef DSV3__CASE
            i += two ? 2 : 1;
        }
    }
}

// ---- AVX2: columns in order, tiles ---------------------------------------------------------------------------

/* A code's 7 bits, moved to bits 7 ... 13 of a half, are the f16 of its value * 2^-8. */
DSV3__TARGET_AVX2 static void dsv3__k_nat_fp8_avx2(float *out, size_t block, size_t group, const void *weights,
                                                   const float *scale64, size_t k)
{
    const __m256i keep = _mm256_set1_epi16((short)0xBF80);
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[64];
    __m256i worst = _mm256_setzero_si256();
    float scales = 0;
    for (size_t b = 0; b * 64 < k; b++) {
        const uint8_t *p = w + b * 64;
        float scaled = scale64[b] * 256.0f;
        __m256 s = _mm256_set1_ps(scaled);
        scales = fmaf(scaled, 0.0f, scales);
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, p, k - b * 64);
            p = tail;
        }
        for (size_t h = 0; h < 2; h++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)(p + 32 * h));
            worst = dsv3__k_fp8_worst_avx2(worst, v);
            for (size_t i = 32 * h; i < 32 * h + 32; i += 16) {
                __m128i c = _mm_loadu_si128((const __m128i *)(const void *)(p + i));
                __m256i f16 = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(c), 7), keep);
                _mm256_storeu_ps(out + b * 64 + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(f16)), s));
                _mm256_storeu_ps(out + b * 64 + i + 8,
                                 _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(f16, 1)), s));
            }
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx2(worst) || scales != scales))
        dsv3__k_nat_fp8_scalar(out, block, group, weights, scale64, k);
}

/* 12 of the 16 registers accumulate 8 chains of 4 x 3 pairs, 7 loads for 12 multiply-adds. T is a constant. */
DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_tile_add_t_avx2(float *sum, size_t sum_next, const float *const *w,
                                                            size_t w_step, size_t w_next, size_t n_w,
                                                            const float *const *x, size_t x_step, size_t steps,
                                                            bool first, const int T)
{
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3], *x0 = x[0], *x1 = x[T > 1 ? 1 : 0],
                *x2 = x[T > 2 ? 2 : 0];
    for (size_t q = 0; q < n_w; q++, sum += sum_next) {
        size_t wi = q * w_next, xi = 0;
        __m256 a00, a01, a02, a10, a11, a12, a20, a21, a22, a30, a31, a32, v0, v1, v2, v;
        a00 = a01 = a02 = a10 = a11 = a12 = a20 = a21 = a22 = a30 = a31 = a32 = _mm256_setzero_ps();
        v1 = v2 = a00;
        if (!first) {
            a00 = _mm256_loadu_ps(sum), a10 = _mm256_loadu_ps(sum + 24);
            a20 = _mm256_loadu_ps(sum + 48), a30 = _mm256_loadu_ps(sum + 72);
            if (T > 1) {
                a01 = _mm256_loadu_ps(sum + 8), a11 = _mm256_loadu_ps(sum + 32);
                a21 = _mm256_loadu_ps(sum + 56), a31 = _mm256_loadu_ps(sum + 80);
            }
            if (T > 2) {
                a02 = _mm256_loadu_ps(sum + 16), a12 = _mm256_loadu_ps(sum + 40);
                a22 = _mm256_loadu_ps(sum + 64), a32 = _mm256_loadu_ps(sum + 88);
            }
        }
        for (size_t s = 0; s < steps; s++, wi += w_step, xi += x_step) {
            v0 = _mm256_loadu_ps(x0 + xi);
            DSV3__PIN(v0);
            if (T > 1) {
                v1 = _mm256_loadu_ps(x1 + xi);
                DSV3__PIN(v1);
            }
            if (T > 2) {
                v2 = _mm256_loadu_ps(x2 + xi);
                DSV3__PIN(v2);
            }
#define DSV3__STEP(row, a0, a1, a2)      \
    v = _mm256_loadu_ps(row + wi);       \
    DSV3__PIN(v);                        \
    a0 = _mm256_fmadd_ps(v, v0, a0);     \
    if (T > 1)                           \
        a1 = _mm256_fmadd_ps(v, v1, a1); \
    if (T > 2)                           \
    a2 = _mm256_fmadd_ps(v, v2, a2)
            DSV3__STEP(w0, a00, a01, a02);
            DSV3__STEP(w1, a10, a11, a12);
            DSV3__STEP(w2, a20, a21, a22);
            DSV3__STEP(w3, a30, a31, a32);
#undef DSV3__STEP
        }
        _mm256_storeu_ps(sum, a00), _mm256_storeu_ps(sum + 24, a10);
        _mm256_storeu_ps(sum + 48, a20), _mm256_storeu_ps(sum + 72, a30);
        if (T > 1) {
            _mm256_storeu_ps(sum + 8, a01), _mm256_storeu_ps(sum + 32, a11);
            _mm256_storeu_ps(sum + 56, a21), _mm256_storeu_ps(sum + 80, a31);
        }
        if (T > 2) {
            _mm256_storeu_ps(sum + 16, a02), _mm256_storeu_ps(sum + 40, a12);
            _mm256_storeu_ps(sum + 64, a22), _mm256_storeu_ps(sum + 88, a32);
        }
    }
}

DSV3__TARGET_AVX2 static void dsv3__k_tile_add_avx2(float *sum, size_t sum_next, const float *const *w, size_t w_step,
                                                    size_t w_next, size_t n_w, const float *const *x, size_t x_step,
                                                    size_t steps, size_t n_x, bool first)
{
    if (n_x == 3)
        dsv3__k_tile_add_t_avx2(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 3);
    else if (n_x == 2)
        dsv3__k_tile_add_t_avx2(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 2);
    else
        dsv3__k_tile_add_t_avx2(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 1);
}

/* 4 sums at once, from 4 registers that hold t[i] + t[i + 4] of one output each. */
DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_tree_store_avx2(float *out, __m128 s0, __m128 s1, __m128 s2, __m128 s3,
                                                            size_t n_w)
{
    float some[4];
    _MM_TRANSPOSE4_PS(s0, s1, s2, s3);
    s0 = _mm_add_ps(_mm_add_ps(s0, s2), _mm_add_ps(s1, s3)); /* + t[i + 2], + t[i + 1] */
    s0 = _mm_blendv_ps(s0, _mm_castsi128_ps(_mm_set1_epi32((int)DSV3__NAN_BITS)), _mm_cmpunord_ps(s0, s0));
    if (n_w == 4) {
        _mm_storeu_ps(out, s0);
    } else {
        _mm_storeu_ps(some, s0);
        memcpy(out, some, n_w * sizeof(float));
    }
}

DSV3__TARGET_AVX2 DSV3__INLINE __m128 dsv3__k_tree4_avx2(const float *sum)
{
#define DSV3__A(g) _mm256_loadu_ps(sum + g * 96)
    __m256 lo = _mm256_add_ps(_mm256_add_ps(DSV3__A(0), DSV3__A(2)), _mm256_add_ps(DSV3__A(4), DSV3__A(6)));
    __m256 hi = _mm256_add_ps(_mm256_add_ps(DSV3__A(1), DSV3__A(3)), _mm256_add_ps(DSV3__A(5), DSV3__A(7)));
#undef DSV3__A
    __m256 t = _mm256_add_ps(lo, hi);                                          /* t[i] + t[i + 8] */
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)); /* + t[i + 4] */
}

DSV3__TARGET_AVX2 static void dsv3__k_tree_avx2(float *out, size_t out_stride, const float *sum, size_t n_w, size_t n_x)
{
    for (size_t j = 0; j < n_x; j++)
        dsv3__k_tree_store_avx2(out + j * out_stride, dsv3__k_tree4_avx2(sum + j * 8),
                                dsv3__k_tree4_avx2(sum + 24 + j * 8), dsv3__k_tree4_avx2(sum + 48 + j * 8),
                                dsv3__k_tree4_avx2(sum + 72 + j * 8), n_w);
}

DSV3__TARGET_AVX2 static void dsv3__k_tile_avx2(float *out, size_t out_stride, const float *w, size_t w_stride,
                                                size_t n_w, const float *x, size_t x_stride, const uint32_t *index,
                                                size_t n_x, size_t k)
{
    dsv3__k_tile_rows_in_place(dsv3__k_tile_add_avx2, dsv3__k_tree_avx2, 8, 3, out, out_stride, w, w_stride, n_w, x,
                               x_stride, index, n_x, k);
}

/* H rows of u by C registers of columns; H and C are constants. */
DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_outer_hc_avx2(float *u, size_t u_stride, const float *a, size_t a_stride,
                                                          const float *b, size_t b_stride, size_t n_t, const size_t H,
                                                          const size_t C)
{
    __m256 acc[12], v[8], s;
    DSV3__UNROLL
    for (size_t h = 0; h < H; h++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            acc[h * C + c] = _mm256_loadu_ps(u + h * u_stride + 8 * c);
    }
    for (size_t t = 0; t < n_t; t++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            v[c] = _mm256_loadu_ps(b + t * b_stride + 8 * c);
        DSV3__UNROLL
        for (size_t h = 0; h < H; h++) {
            s = _mm256_set1_ps(a[h * a_stride + t]);
            DSV3__UNROLL
            for (size_t c = 0; c < C; c++)
                acc[h * C + c] = _mm256_fmadd_ps(s, v[c], acc[h * C + c]);
        }
    }
    DSV3__UNROLL
    for (size_t h = 0; h < H; h++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            _mm256_storeu_ps(u + h * u_stride + 8 * c, acc[h * C + c]);
    }
}

DSV3__TARGET_AVX2 static void dsv3__k_outer_avx2(float *u, size_t u_stride, size_t n_h, const float *a, size_t a_stride,
                                                 const float *b, size_t b_stride, size_t n_t, size_t n_c)
{
    const size_t full = n_c / 8 * 8;
    size_t h = 0;
    for (; h + 4 <= n_h; h += 4) {
        float *to = u + h * u_stride;
        size_t c = 0;
        for (; c + 24 <= full; c += 24)
            dsv3__k_outer_hc_avx2(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 4, 3);
        for (; c < full; c += 8)
            dsv3__k_outer_hc_avx2(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 4, 1);
    }
    for (; h < n_h; h++) {
        float *to = u + h * u_stride;
        size_t c = 0;
        for (; c + 64 <= full; c += 64)
            dsv3__k_outer_hc_avx2(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 1, 8);
        for (; c < full; c += 8)
            dsv3__k_outer_hc_avx2(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 1, 1);
    }
    if (full < n_c)
        dsv3__k_outer_scalar(u + full, u_stride, n_h, a, a_stride, b + full, b_stride, n_t, n_c - full);
}

/* dsv3__exp, 8 at once. */
DSV3__TARGET_AVX2 DSV3__INLINE __m256 dsv3__k_exp8_avx2(__m256 x)
{
    const __m256 one = _mm256_set1_ps(1.0f), magic = _mm256_set1_ps(DSV3__EXP_MAGIC);
    const __m256i bias = _mm256_set1_epi32(127 - 256);
    const __m256 keep = _mm256_cmp_ps(x, _mm256_set1_ps(DSV3__EXP_LOW), _CMP_NLT_UQ);
    x = _mm256_min_ps(_mm256_set1_ps(DSV3__EXP_HIGH), x); /* the second operand, if it is NaN */
    x = _mm256_max_ps(_mm256_set1_ps(DSV3__EXP_LOW), x);
    __m256 t = _mm256_fmadd_ps(x, _mm256_set1_ps(DSV3__EXP_LOG2E), magic), n = _mm256_sub_ps(t, magic);
    __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-DSV3__EXP_LN2_HI), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(-DSV3__EXP_LN2_LO), r);
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(DSV3__EXP_C6), r, _mm256_set1_ps(DSV3__EXP_C5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV3__EXP_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV3__EXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(DSV3__EXP_C2));
    p = _mm256_fmadd_ps(p, r, one);
    p = _mm256_fmadd_ps(p, r, one);
    __m256i biased = _mm256_sub_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(0x4B400000 - 512));
    __m256i half = _mm256_srli_epi32(biased, 1), rest = _mm256_sub_epi32(biased, half);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
    return _mm256_and_ps(p, keep);
}

DSV3__TARGET_AVX2 static float dsv3__k_exp_sum_avx2(float *x, size_t n, float max)
{
    float t[16];
    __m256 m = _mm256_set1_ps(max), s0 = _mm256_setzero_ps(), s1 = s0;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256 e0 = dsv3__k_exp8_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i), m));
        __m256 e1 = dsv3__k_exp8_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i + 8), m));
        _mm256_storeu_ps(x + i, e0);
        _mm256_storeu_ps(x + i + 8, e1);
        s0 = _mm256_add_ps(s0, e0);
        s1 = _mm256_add_ps(s1, e1);
    }
    _mm256_storeu_ps(t, s0);
    _mm256_storeu_ps(t + 8, s1);
    for (; i < n; i++) {
        x[i] = dsv3__exp(x[i] - max);
        t[i % 16] += x[i];
    }
    return dsv3__k_tree16(t);
}

DSV3__TARGET_AVX2 static void dsv3__k_swiglu_avx2(float *out, const float *gate, const float *up, size_t n)
{
    const __m256 minus = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1.0f);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i), e = dsv3__k_exp8_avx2(_mm256_xor_ps(g, minus));
        __m256 v = _mm256_mul_ps(_mm256_div_ps(g, _mm256_add_ps(one, e)), _mm256_loadu_ps(up + i));
        _mm256_storeu_ps(out + i, dsv3__k_flush_avx2(v));
    }
    dsv3__k_swiglu_scalar(out + i, gate + i, up + i, n - i);
}
#endif // DSV3__AVX2

#if DSV3__VNNI
// ---- VNNI: codes of 8 bits, in registers of 256 and of 512 bits ------------------------------------------------

/* vpdpbusd wants one side unsigned: w with its top bit turned over is w + 128, and what that adds, 128 * sum(x), is taken
   off at the end. Sums wrap on the way, the result fits. Both widths share the driver; of their own they have
   tile   sum[j][i], row i < 4 of w times row j < n_x of x, n columns from c on. What lies `ahead` bytes behind the rows of
          w is asked for meanwhile: 4 rows read in step are no pattern that the hardware's prefetcher would follow
   row    sum[g], one row of w times one of x, for each `group` of k columns: front to back, at the speed of memory */
typedef void (*dsv3__bytes_tile_fn)(int32_t (*sum)[4], const int8_t *const *w, const int8_t *const *x, size_t n_x,
                                    size_t c, size_t n, size_t ahead);
typedef void (*dsv3__bytes_row_fn)(int32_t *sum, const int8_t *w, const int8_t *x, size_t k, size_t group);

/* 128 * the sum of the codes of group g, from behind the scales. */
DSV3__INLINE int32_t dsv3__k_bytes_minus(const float *x_scale, size_t n_groups, size_t g)
{
    int32_t minus;
    memcpy(&minus, x_scale + n_groups + g, sizeof minus);
    return minus;
}

DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_bytes_vnni(dsv3__bytes_tile_fn tile, dsv3__bytes_row_fn row,
                                                       const size_t tile_x, float *out, size_t out_stride,
                                                       const int8_t *w, size_t w_stride, const float *w_scale,
                                                       size_t n_w, const int8_t *const *x, const float *const *x_scale,
                                                       size_t n_x, size_t k, size_t group)
{
    enum { GROUPS = 256 }; /* at a time; of 128 columns that many are more than a row of any model */
    const size_t n_groups = (k + group - 1) / group;
    const __m128 nan = _mm_castsi128_ps(_mm_set1_epi32((int)DSV3__NAN_BITS));
    int32_t sums[GROUPS], sum[6][4];
    const int8_t *xr[6], *wr[4];
    const float *ws[4];
    float some[6][4]; /* y, in words of 4 rows of w */
    for (size_t j = 0, t; j < n_x; j += t) {
        t = dsv3__k_tile_rows(n_x - j, tile_x);
        for (size_t g0 = 0; g0 < n_groups; g0 += GROUPS) {
            const size_t groups = dsv3__min(n_groups - g0, GROUPS), n = dsv3__min(k - g0 * group, groups * group);
            const size_t ahead = j == 0 ? n_w * w_stride : 0; /* the rows of the next call, they may be */
            for (size_t r = 0; r < t; r++)
                xr[r] = x[j + r] + g0 * group;
            for (size_t i = 0; t == 1 && i < n_w; i++) {
                float *to = out + j * out_stride + i, y = g0 ? *to : 0;
                row(sums, w + i * w_stride + g0 * group, xr[0], n, group);
                for (size_t g = 0; g < groups; g++) {
                    int32_t exact =
                        (int32_t)((uint32_t)sums[g] - (uint32_t)dsv3__k_bytes_minus(x_scale[j], n_groups, g0 + g));
                    y = fmaf((float)exact, w_scale[i * n_groups + g0 + g] * x_scale[j][g0 + g], y);
                }
                *to = y == y ? y : dsv3__bits_float(DSV3__NAN_BITS);
            }
            for (size_t i = 0; t > 1 && i < n_w; i += 4) {
                const size_t rows = dsv3__min(n_w - i, 4);
                memset(some, 0, sizeof some);
                for (size_t r = 0; r < 4; r++) { /* rows that are not there repeat the last */
                    wr[r] = w + dsv3__min(i + r, n_w - 1) * w_stride + g0 * group;
                    ws[r] = w_scale + dsv3__min(i + r, n_w - 1) * n_groups + g0;
                }
                for (size_t r = 0; g0 && r < t; r++)
                    memcpy(some[r], out + (j + r) * out_stride + i, rows * sizeof(float));
                for (size_t g = 0; g < groups; g++) {
                    const __m128 w4 = _mm_setr_ps(ws[0][g], ws[1][g], ws[2][g], ws[3][g]);
                    tile(sum, wr, xr, t, g * group, dsv3__min(n - g * group, group), ahead);
                    for (size_t r = 0; r < t; r++) {
                        __m128i v = _mm_loadu_si128((const __m128i *)(const void *)sum[r]);
                        v = _mm_sub_epi32(v, _mm_set1_epi32(dsv3__k_bytes_minus(x_scale[j + r], n_groups, g0 + g)));
                        __m128 s = _mm_mul_ps(w4, _mm_set1_ps(x_scale[j + r][g0 + g]));
                        _mm_storeu_ps(some[r], _mm_fmadd_ps(_mm_cvtepi32_ps(v), s, _mm_loadu_ps(some[r])));
                    }
                }
                for (size_t r = 0; r < t; r++) {
                    __m128 y = _mm_loadu_ps(some[r]);
                    _mm_storeu_ps(some[r], _mm_blendv_ps(y, nan, _mm_cmpunord_ps(y, y)));
                    memcpy(out + (j + r) * out_stride + i, some[r], rows * sizeof(float));
                }
            }
        }
    }
}

/* The sums of 4 registers. */
DSV3__TARGET_AVX2 DSV3__INLINE void dsv3__k_bytes_store_avx_vnni(int32_t *sum, __m256i a, __m256i b, __m256i c,
                                                                 __m256i d)
{
    __m256i t = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128((__m128i *)(void *)sum, _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1)));
}

DSV3__TARGET_AVX_VNNI DSV3__NOINLINE static void dsv3__k_bytes_tile_avx_vnni(int32_t (*sum)[4], const int8_t *const *w,
                                                                             const int8_t *const *x, size_t n_x,
                                                                             size_t c, size_t n, size_t ahead)
{
    const __m256i top = _mm256_set1_epi8((char)0x80);
    const int8_t *w0 = w[0] + c, *w1 = w[1] + c, *w2 = w[2] + c, *w3 = w[3] + c;
    const int8_t *x0 = x[0] + c, *x1 = x[n_x > 1 ? 1 : 0] + c;
    __m256i a00, a01, a10, a11, a20, a21, a30, a31, v, y0, y1;
    a00 = a01 = a10 = a11 = a20 = a21 = a30 = a31 = _mm256_setzero_si256();
#define DSV3__LOAD(p) _mm256_loadu_si256((const __m256i *)(const void *)(p))
#define DSV3__STEP(row, a0, a1)                 \
    v = _mm256_xor_si256(DSV3__LOAD(row), top); \
    DSV3__DPBUSD(a0, v, y0);                    \
    DSV3__DPBUSD(a1, v, y1)
#define DSV3__STEPS(x_0, x_1, w_0, w_1, w_2, w_3) \
    y0 = DSV3__LOAD(x_0);                         \
    y1 = DSV3__LOAD(x_1);                         \
    DSV3__STEP(w_0, a00, a01);                    \
    DSV3__STEP(w_1, a10, a11);                    \
    DSV3__STEP(w_2, a20, a21);                    \
    DSV3__STEP(w_3, a30, a31)
    const size_t whole = n / 32 * 32, rest = n - whole;
    if (rest) {
        const int8_t *const from[6] = {x0, x1, w0, w1, w2, w3};
        int8_t tail[6][32];
        memset(tail, 0, sizeof tail);
        for (size_t r = 0; r < 6; r++)
            memcpy(tail[r], from[r] + whole, rest);
        DSV3__STEPS(tail[0], tail[1], tail[2], tail[3], tail[4], tail[5]);
    }
    for (size_t i = 0; i < whole; i += 32) {
        DSV3__PREFETCH_AT((i & 32 ? w2 : w0) + i, ahead);
        DSV3__PREFETCH_AT((i & 32 ? w3 : w1) + i, ahead);
        DSV3__STEPS(x0 + i, x1 + i, w0 + i, w1 + i, w2 + i, w3 + i);
    }
#undef DSV3__STEP
#undef DSV3__STEPS
    dsv3__k_bytes_store_avx_vnni(sum[0], a00, a10, a20, a30);
    dsv3__k_bytes_store_avx_vnni(sum[1], a01, a11, a21, a31);
}

DSV3__TARGET_AVX_VNNI static void dsv3__k_bytes_row_avx_vnni(int32_t *sum, const int8_t *w, const int8_t *x, size_t k,
                                                             size_t group)
{
    const __m256i top = _mm256_set1_epi8((char)0x80);
    int8_t tail[2][32];
    for (size_t n; k; k -= n, w += n, x += n) {
        __m256i a0, a1, a2, a3, v, y;
        size_t i = 0;
        n = dsv3__min(k, group);
        a0 = a1 = a2 = a3 = _mm256_setzero_si256();
#define DSV3__STEP(a, from_w, from_x)              \
    v = _mm256_xor_si256(DSV3__LOAD(from_w), top); \
    y = DSV3__LOAD(from_x);                        \
    DSV3__DPBUSD(a, v, y)
        for (; i + 128 <= n; i += 128) {
            DSV3__PREFETCH(w + i);
            DSV3__PREFETCH(w + i + 64);
            DSV3__STEP(a0, w + i, x + i);
            DSV3__STEP(a1, w + i + 32, x + i + 32);
            DSV3__STEP(a2, w + i + 64, x + i + 64);
            DSV3__STEP(a3, w + i + 96, x + i + 96);
        }
        for (; i + 32 <= n; i += 32) {
            DSV3__STEP(a0, w + i, x + i);
        }
        if (i < n) {
            memset(tail, 0, sizeof tail);
            memcpy(tail[0], w + i, n - i), memcpy(tail[1], x + i, n - i);
            DSV3__STEP(a1, tail[0], tail[1]);
        }
#undef DSV3__STEP
#undef DSV3__LOAD
        *sum++ = dsv3__k_sum8_avx2(_mm256_add_epi32(_mm256_add_epi32(a0, a1), _mm256_add_epi32(a2, a3)));
    }
}

DSV3__TARGET_AVX_VNNI static void dsv3__k_bytes_avx_vnni(float *out, size_t out_stride, const int8_t *w,
                                                         size_t w_stride, const float *w_scale, size_t n_w,
                                                         const int8_t *const *x, const float *const *x_scale,
                                                         size_t n_x, size_t k, size_t group, void *scratch)
{
    (void)scratch;
    dsv3__k_bytes_vnni(dsv3__k_bytes_tile_avx_vnni, dsv3__k_bytes_row_avx_vnni, 2, out, out_stride, w, w_stride,
                       w_scale, n_w, x, x_scale, n_x, k, group);
}
#endif // DSV3__VNNI

#if DSV3__AVX512
#if defined(__GNUC__) && !defined(__clang__) /* gcc 12's intrinsics (its bug 105593) */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
// ---- AVX-512: chain 16g + l is lane l of register g ----------------------------------------------------------

/* The sum of 64 chains in 4 registers. */
DSV3__TARGET_AVX512 DSV3__INLINE __m128 dsv3__k_tree4_avx512(__m512 a0, __m512 a1, __m512 a2, __m512 a3)
{
    __m512 t = _mm512_add_ps(_mm512_add_ps(a0, a1), _mm512_add_ps(a2, a3)); /* t[i], i < 16 */
    __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(t), 1));
    __m256 u = _mm256_add_ps(_mm512_castps512_ps256(t), hi);                   /* + t[i + 8] */
    return _mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1)); /* + t[i + 4] */
}

DSV3__TARGET_AVX512 DSV3__INLINE float dsv3__k_tree64_avx512(__m512 a0, __m512 a1, __m512 a2, __m512 a3)
{
    __m128 s = dsv3__k_tree4_avx512(a0, a1, a2, a3);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s)); /* + t[i + 2] */
    s = _mm_add_ss(s, _mm_movehdup_ps(s));  /* + t[i + 1] */
    float r = _mm_cvtss_f32(s);
    return r == r ? r : dsv3__bits_float(DSV3__NAN_BITS);
}

/* 16 values of F32, F16, BF16; 16 codes of I8. */
DSV3__TARGET_AVX512 DSV3__INLINE __m512 dsv3__k_load16_avx512(const uint8_t *w, dsv3_dtype dtype)
{
    if (dtype == DSV3_DTYPE_F32)
        return _mm512_loadu_ps((const void *)w);
    if (dtype == DSV3_DTYPE_I8)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)w)));
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)w);
    if (dtype == DSV3_DTYPE_F16)
        return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); /* bits << 16 */
}

DSV3__TARGET_AVX512 DSV3__INLINE float dsv3__k_dot_avx512(const void *weights, const float *x, const float *scale64,
                                                          size_t k, dsv3_dtype dtype)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t block = dsv3__k_block_size(dtype), part = block / 4;
    uint8_t tail[256];
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
    while (k) {
        if (DSV3__UNLIKELY(k < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k * (block / 64));
            w = tail;
            k = 64;
        }
        __m512 s = _mm512_set1_ps(dtype == DSV3_DTYPE_I8 ? *scale64++ : 1.0f), v;
        for (size_t i = 0; i < block; i += 64)
            DSV3__PREFETCH(w + i);
#define DSV3__STEP(g)                               \
    v = dsv3__k_load16_avx512(w + g * part, dtype); \
    if (dtype == DSV3_DTYPE_I8)                     \
        v = _mm512_mul_ps(v, s);                    \
    a##g = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + 16 * g), a##g)
        DSV3__STEP(0);
        DSV3__STEP(1);
        DSV3__STEP(2);
        DSV3__STEP(3);
#undef DSV3__STEP
        w += block;
        x += 64;
        k -= 64;
    }
    return dsv3__k_tree64_avx512(a0, a1, a2, a3);
}

DSV3__TARGET_AVX512 DSV3__INLINE void dsv3__k_row_avx512(float *out, size_t block, size_t group, const void *weights,
                                                         const float *scale64, size_t k, dsv3_dtype dtype)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t size = dsv3__k_block_size(dtype);
    uint8_t tail[256];
    for (size_t b = 0; b * 64 < k; b++, w += size, out += block) {
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, (k - b * 64) * (size / 64));
            w = tail;
        }
        __m512 s = _mm512_set1_ps(dtype == DSV3_DTYPE_I8 ? scale64[b] : 1.0f);
        for (size_t g = 0; g < 4; g++) {
            __m512 v = dsv3__k_load16_avx512(w + g * (size / 4), dtype);
            _mm512_storeu_ps(out + g * group, dtype == DSV3_DTYPE_I8 ? _mm512_mul_ps(v, s) : v);
        }
    }
}

#define DSV3__K_DTYPE_AVX512(name, dtype)                                                                              \
    DSV3__TARGET_AVX512 static float dsv3__k_dot_##name##_avx512(const void *w, const float *x, const float *scale64,  \
                                                                 size_t k)                                             \
    {                                                                                                                  \
        return dsv3__k_dot_avx512(w, x, scale64, k, dtype);                                                            \
    }                                                                                                                  \
    DSV3__TARGET_AVX512 static void dsv3__k_row_##name##_avx512(float *out, size_t block, size_t group, const void *w, \
                                                                const float *scale64, size_t k)                        \
    {                                                                                                                  \
        dsv3__k_row_avx512(out, block, group, w, scale64, k, dtype);                                                   \
    }
DSV3__K_DTYPE_AVX512(f32, DSV3_DTYPE_F32)
DSV3__K_DTYPE_AVX512(f16, DSV3_DTYPE_F16)
DSV3__K_DTYPE_AVX512(bf16, DSV3_DTYPE_BF16)
DSV3__K_DTYPE_AVX512(i8, DSV3_DTYPE_I8)
#undef DSV3__K_DTYPE_AVX512

DSV3__TARGET_AVX512 DSV3__INLINE bool dsv3__k_fp8_nan_avx512(__m512i worst)
{
    return _mm512_cmpeq_epi8_mask(worst, _mm512_set1_epi8(0x7F)) != 0;
}

DSV3__TARGET_AVX512 DSV3__INLINE __m512i dsv3__k_fp8_worst_avx512(__m512i worst, __m512i v)
{
    return _mm512_max_epu8(worst, _mm512_and_si512(v, _mm512_set1_epi8(0x7F)));
}

/* 64 codes: o[p] = bytes p of the 16 words, * 2^-120, as in the AVX2 code above. */
DSV3__TARGET_AVX512 DSV3__INLINE void dsv3__k_fp8x64_avx512(__m512 *o, __m512i v)
{
    const __m512i keep = _mm512_set1_epi32((int)0x87F00000);
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 4); /* bytes 0, 2 */
    __m512i odd = _mm512_srai_epi16(v, 4);                        /* bytes 1, 3 */
    o[0] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(even, 16), keep));
    o[1] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(odd, 16), keep));
    o[2] = _mm512_castsi512_ps(_mm512_and_si512(even, keep));
    o[3] = _mm512_castsi512_ps(_mm512_and_si512(odd, keep));
}

DSV3__TARGET_AVX512 DSV3__INLINE __m512i dsv3__k_dot_fp8_block_avx512(__m512 *a, __m512i v, const float *x, float scale,
                                                                      __m512i worst)
{
    __m512 s = _mm512_set1_ps(scale * DSV3__TWO_120), o[4];
    dsv3__k_fp8x64_avx512(o, v);
    a[0] = _mm512_fmadd_ps(_mm512_mul_ps(o[0], s), _mm512_loadu_ps(x), a[0]); /* fmaf(f32(code * scale), x, chain) */
    a[1] = _mm512_fmadd_ps(_mm512_mul_ps(o[1], s), _mm512_loadu_ps(x + 16), a[1]);
    a[2] = _mm512_fmadd_ps(_mm512_mul_ps(o[2], s), _mm512_loadu_ps(x + 32), a[2]);
    a[3] = _mm512_fmadd_ps(_mm512_mul_ps(o[3], s), _mm512_loadu_ps(x + 48), a[3]);
    return dsv3__k_fp8_worst_avx512(worst, v);
}

/* PERF: 8 lines of weights are loaded before the first is decoded: between them, the 4 loads of x a line would crowd the
   weights out of the prefetcher (10 against 25 GB/s on a Zen 4). */
DSV3__TARGET_AVX512 static float dsv3__k_dot_fp8_avx512(const void *weights, const float *x, const float *scale64,
                                                        size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t blocks = k / 64;
    size_t b = 0;
    uint8_t tail[64];
    __m512i worst = _mm512_setzero_si512(), v0, v1, v2, v3, v4, v5, v6, v7;
    __m512 a[4];
    a[0] = a[1] = a[2] = a[3] = _mm512_setzero_ps();
#define DSV3__LOAD(i)                            \
    v##i = _mm512_loadu_si512(w + (b + i) * 64); \
    DSV3__PREFETCH(w + (b + i) * 64);            \
    DSV3__PIN512(v##i)
#define DSV3__STEP(i) worst = dsv3__k_dot_fp8_block_avx512(a, v##i, x + (b + i) * 64, scale64[b + i], worst)
    for (; b + 8 <= blocks; b += 8) {
        DSV3__LOAD(0);
        DSV3__LOAD(1);
        DSV3__LOAD(2);
        DSV3__LOAD(3);
        DSV3__LOAD(4);
        DSV3__LOAD(5);
        DSV3__LOAD(6);
        DSV3__LOAD(7);
        DSV3__STEP(0);
        DSV3__STEP(1);
        DSV3__STEP(2);
        DSV3__STEP(3);
        DSV3__STEP(4);
        DSV3__STEP(5);
        DSV3__STEP(6);
        DSV3__STEP(7);
    }
    for (; b < blocks; b++) {
        DSV3__LOAD(0);
        DSV3__STEP(0);
    }
    if (k % 64) {
        memset(tail, 0, sizeof tail);
        memcpy(tail, w + blocks * 64, k % 64);
        v0 = _mm512_loadu_si512(tail);
        DSV3__STEP(0);
    }
#undef DSV3__LOAD
#undef DSV3__STEP
    float r = dsv3__k_tree64_avx512(a[0], a[1], a[2], a[3]);
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx512(worst) || !(fabsf(r) < INFINITY))) /* as in the AVX2 code */
        return dsv3__k_dot_fp8_scalar(weights, x, scale64, k);
    return r;
}

DSV3__TARGET_AVX512 static void dsv3__k_row_fp8_avx512(float *out, size_t block, size_t group, const void *weights,
                                                       const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[64];
    __m512i worst = _mm512_setzero_si512();
    float scales = 0;
    for (size_t b = 0; b * 64 < k; b++) {
        const uint8_t *p = w + b * 64;
        float scaled = scale64[b] * DSV3__TWO_120, *to = out + b * block;
        __m512 s = _mm512_set1_ps(scaled), o[4];
        scales = fmaf(scaled, 0.0f, scales);
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, p, k - b * 64);
            p = tail;
        }
        __m512i v = _mm512_loadu_si512(p);
        worst = dsv3__k_fp8_worst_avx512(worst, v);
        dsv3__k_fp8x64_avx512(o, v);
        _mm512_storeu_ps(to, _mm512_mul_ps(o[0], s));
        _mm512_storeu_ps(to + group, _mm512_mul_ps(o[1], s));
        _mm512_storeu_ps(to + 2 * group, _mm512_mul_ps(o[2], s));
        _mm512_storeu_ps(to + 3 * group, _mm512_mul_ps(o[3], s));
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx512(worst) || scales != scales))
        dsv3__k_row_scalar(out, block, group, 16, weights, scale64, k, DSV3_DTYPE_F8_E4M3);
}

/* As dsv3__k_nat_fp8_avx2. */
DSV3__TARGET_AVX512 static void dsv3__k_nat_fp8_avx512(float *out, size_t block, size_t group, const void *weights,
                                                       const float *scale64, size_t k)
{
    const __m512i keep = _mm512_set1_epi16((short)0xBF80);
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[64];
    __m512i worst = _mm512_setzero_si512();
    float scales = 0;
    for (size_t b = 0; b * 64 < k; b++) {
        const uint8_t *p = w + b * 64;
        float scaled = scale64[b] * 256.0f;
        __m512 s = _mm512_set1_ps(scaled);
        scales = fmaf(scaled, 0.0f, scales);
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, p, k - b * 64);
            p = tail;
        }
        worst = dsv3__k_fp8_worst_avx512(worst, _mm512_loadu_si512(p));
        for (size_t i = 0; i < 64; i += 32) {
            __m256i c = _mm256_loadu_si256((const __m256i *)(const void *)(p + i));
            __m512i f16 = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(c), 7), keep);
            _mm512_storeu_ps(out + b * 64 + i, _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(f16)), s));
            _mm512_storeu_ps(out + b * 64 + i + 16,
                             _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(f16, 1)), s));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx512(worst) || scales != scales))
        dsv3__k_nat_fp8_scalar(out, block, group, weights, scale64, k);
}

typedef __m512 (*dsv3__mac_fn)(__m512 sum, __m512 w, __m512 x);

DSV3__TARGET_AVX512 DSV3__INLINE __m512 dsv3__k_mac_avx512(__m512 sum, __m512 w, __m512 x)
{
    return _mm512_fmadd_ps(w, x, sum);
}

/* 24 of the 32 registers accumulate 16 chains of 4 x 6 pairs, 10 loads for 24 multiply-adds. T and mac are constants: mac
   adds the products of 16 chains, of floats or of words of two bf16. */
DSV3__TARGET_AVX512 DSV3__INLINE void dsv3__k_tile_add_t_avx512(dsv3__mac_fn mac, float *sum, size_t sum_next,
                                                                const float *const *w, size_t w_step, size_t w_next,
                                                                size_t n_w, const float *const *x, size_t x_step,
                                                                size_t steps, bool first, const int T)
{
    const float *w0 = w[0], *w1 = w[1], *w2 = w[2], *w3 = w[3], *x0 = x[0], *x1 = x[T > 1 ? 1 : 0],
                *x2 = x[T > 2 ? 2 : 0];
    const float *x3 = x[T > 3 ? 3 : 0], *x4 = x[T > 4 ? 4 : 0], *x5 = x[T > 5 ? 5 : 0];
    for (size_t q = 0; q < n_w; q++, sum += sum_next) {
        size_t wi = q * w_next, xi = 0;
        __m512 a00, a01, a02, a03, a04, a05, a10, a11, a12, a13, a14, a15, a20, a21, a22, a23, a24, a25, a30, a31, a32,
            a33, a34, a35;
        __m512 v0, v1, v2, v3, v4, v5, v;
        a00 = a01 = a02 = a03 = a04 = a05 = a10 = a11 = a12 = a13 = a14 = a15 = _mm512_setzero_ps();
        a20 = a21 = a22 = a23 = a24 = a25 = a30 = a31 = a32 = a33 = a34 = a35 = _mm512_setzero_ps();
        v1 = v2 = v3 = v4 = v5 = a00;
#define DSV3__LOAD(j, a0, a1, a2, a3)             \
    if (T > j) {                                  \
        a0 = _mm512_loadu_ps(sum + 16 * j);       \
        a1 = _mm512_loadu_ps(sum + 96 + 16 * j);  \
        a2 = _mm512_loadu_ps(sum + 192 + 16 * j); \
        a3 = _mm512_loadu_ps(sum + 288 + 16 * j); \
    }
#define DSV3__STORE(j, a0, a1, a2, a3)            \
    if (T > j) {                                  \
        _mm512_storeu_ps(sum + 16 * j, a0);       \
        _mm512_storeu_ps(sum + 96 + 16 * j, a1);  \
        _mm512_storeu_ps(sum + 192 + 16 * j, a2); \
        _mm512_storeu_ps(sum + 288 + 16 * j, a3); \
    }
#define DSV3__LOAD_X(j, to, from)        \
    if (T > j) {                         \
        to = _mm512_loadu_ps(from + xi); \
        DSV3__PIN512(to);                \
    }
#define DSV3__FMA(j, acc, with) \
    if (T > j)                  \
    acc = mac(acc, v, with)
#define DSV3__STEP(row, a0, a1, a2, a3, a4, a5) \
    v = _mm512_loadu_ps(row + wi);              \
    DSV3__PIN512(v);                            \
    DSV3__FMA(0, a0, v0);                       \
    DSV3__FMA(1, a1, v1);                       \
    DSV3__FMA(2, a2, v2);                       \
    DSV3__FMA(3, a3, v3);                       \
    DSV3__FMA(4, a4, v4);                       \
    DSV3__FMA(5, a5, v5)
        if (!first) {
            DSV3__LOAD(0, a00, a10, a20, a30)
            DSV3__LOAD(1, a01, a11, a21, a31)
            DSV3__LOAD(2, a02, a12, a22, a32)
            DSV3__LOAD(3, a03, a13, a23, a33)
            DSV3__LOAD(4, a04, a14, a24, a34)
            DSV3__LOAD(5, a05, a15, a25, a35)
        }
        for (size_t s = 0; s < steps; s++, wi += w_step, xi += x_step) {
            DSV3__LOAD_X(0, v0, x0)
            DSV3__LOAD_X(1, v1, x1)
            DSV3__LOAD_X(2, v2, x2)
            DSV3__LOAD_X(3, v3, x3)
            DSV3__LOAD_X(4, v4, x4)
            DSV3__LOAD_X(5, v5, x5)
            DSV3__STEP(w0, a00, a01, a02, a03, a04, a05);
            DSV3__STEP(w1, a10, a11, a12, a13, a14, a15);
            DSV3__STEP(w2, a20, a21, a22, a23, a24, a25);
            DSV3__STEP(w3, a30, a31, a32, a33, a34, a35);
        }
        DSV3__STORE(0, a00, a10, a20, a30)
        DSV3__STORE(1, a01, a11, a21, a31)
        DSV3__STORE(2, a02, a12, a22, a32)
        DSV3__STORE(3, a03, a13, a23, a33)
        DSV3__STORE(4, a04, a14, a24, a34)
        DSV3__STORE(5, a05, a15, a25, a35)
#undef DSV3__LOAD
#undef DSV3__STORE
#undef DSV3__LOAD_X
#undef DSV3__FMA
#undef DSV3__STEP
    }
}

#define DSV3__TILE_ADD_AVX512(mac)                                                                                    \
    switch (n_x) {                                                                                                    \
    case 6: dsv3__k_tile_add_t_avx512(mac, sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 6); break; \
    case 5: dsv3__k_tile_add_t_avx512(mac, sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 5); break; \
    case 4: dsv3__k_tile_add_t_avx512(mac, sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 4); break; \
    case 3: dsv3__k_tile_add_t_avx512(mac, sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 3); break; \
    case 2: dsv3__k_tile_add_t_avx512(mac, sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 2); break; \
    default: dsv3__k_tile_add_t_avx512(mac, sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 1);       \
    }

DSV3__TARGET_AVX512 static void dsv3__k_tile_add_avx512(float *sum, size_t sum_next, const float *const *w,
                                                        size_t w_step, size_t w_next, size_t n_w, const float *const *x,
                                                        size_t x_step, size_t steps, size_t n_x,
                                                        bool first){DSV3__TILE_ADD_AVX512(dsv3__k_mac_avx512)}

DSV3__TARGET_AVX512
    static void dsv3__k_tree_avx512(float *out, size_t out_stride, const float *sum, size_t n_w, size_t n_x)
{
    for (size_t j = 0; j < n_x; j++, sum += 16) {
#define DSV3__A(i, g) _mm512_loadu_ps(sum + g * 384 + i * 96)
        dsv3__k_tree_store_avx2(out + j * out_stride,
                                dsv3__k_tree4_avx512(DSV3__A(0, 0), DSV3__A(0, 1), DSV3__A(0, 2), DSV3__A(0, 3)),
                                dsv3__k_tree4_avx512(DSV3__A(1, 0), DSV3__A(1, 1), DSV3__A(1, 2), DSV3__A(1, 3)),
                                dsv3__k_tree4_avx512(DSV3__A(2, 0), DSV3__A(2, 1), DSV3__A(2, 2), DSV3__A(2, 3)),
                                dsv3__k_tree4_avx512(DSV3__A(3, 0), DSV3__A(3, 1), DSV3__A(3, 2), DSV3__A(3, 3)), n_w);
#undef DSV3__A
    }
}

/* The trees of four sums of 16 chains t[i] each. */
DSV3__TARGET_AVX512 DSV3__INLINE __m128 dsv3__k_tree16x4_avx512(__m512 t0, __m512 t1, __m512 t2, __m512 t3)
{
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(t0, t1, 0x44), _mm512_shuffle_f32x4(t0, t1, 0xee)); /* + t[i + 8] */
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(t2, t3, 0x44), _mm512_shuffle_f32x4(t2, t3, 0xee));
    __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); /* + t[i + 4] */
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));                                             /* + t[i + 2] */
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));                                             /* + t[i + 1] */
    __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1));
    __m256 u = _mm256_unpacklo_ps(_mm512_castps512_ps256(s), hi);
    __m128 r = _mm_unpacklo_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1));
    return _mm_blendv_ps(r, _mm_castsi128_ps(_mm_set1_epi32((int)DSV3__NAN_BITS)), _mm_cmpunord_ps(r, r));
}

/* Rows w0 and w1 by T rows of x, all 64 chains in registers: 20 loads for 24 multiply-adds, and no sum is written to memory
   on the way to its tree. T is a constant. out [T, n_w], out_stride floats apart; n_w 1: what w1 makes is dropped. */
DSV3__TARGET_AVX512 DSV3__INLINE void dsv3__k_tile_2t_avx512(float *out, size_t out_stride, const float *w0,
                                                             const float *w1, size_t n_w, const float *const *x,
                                                             size_t k, const size_t T)
{
    __m512 a[2][3][4], v0, v1, v;
    DSV3__UNROLL
    for (size_t j = 0; j < T; j++) {
        DSV3__UNROLL
        for (size_t g = 0; g < 4; g++)
            a[0][j][g] = a[1][j][g] = _mm512_setzero_ps();
    }
    for (size_t i = 0; i < k; i += 64) {
        DSV3__UNROLL
        for (size_t g = 0; g < 4; g++) {
            v0 = _mm512_loadu_ps(w0 + i + 16 * g);
            v1 = _mm512_loadu_ps(w1 + i + 16 * g);
            DSV3__PIN512(v0); /* gcc would read each again in every product */
            DSV3__PIN512(v1);
            DSV3__UNROLL
            for (size_t j = 0; j < T; j++) {
                v = _mm512_loadu_ps(x[j] + i + 16 * g);
                DSV3__PIN512(v);
                a[0][j][g] = _mm512_fmadd_ps(v0, v, a[0][j][g]);
                a[1][j][g] = _mm512_fmadd_ps(v1, v, a[1][j][g]);
            }
        }
    }
#define DSV3__T(i, j) _mm512_add_ps(_mm512_add_ps(a[i][j][0], a[i][j][1]), _mm512_add_ps(a[i][j][2], a[i][j][3]))
    DSV3__UNROLL
    for (size_t j = 0; j < T; j += 2) {
        const size_t next = j + 1 < T ? j + 1 : j;
        __m128 r = dsv3__k_tree16x4_avx512(DSV3__T(0, j), DSV3__T(1, j), DSV3__T(0, next), DSV3__T(1, next));
        float *to = out + j * out_stride,
              *to_next = out + next * out_stride; /* the same, of the same, where T is odd */
        if (n_w == 2) {
            _mm_storel_pi((__m64 *)(void *)to, r);
            _mm_storeh_pi((__m64 *)(void *)to_next, r);
        } else {
            _mm_store_ss(to, r);
            _mm_store_ss(to_next, _mm_movehl_ps(r, r));
        }
    }
#undef DSV3__T
}

DSV3__TARGET_AVX512 static void dsv3__k_tile_avx512(float *out, size_t out_stride, const float *w, size_t w_stride,
                                                    size_t n_w, const float *x, size_t x_stride, const uint32_t *index,
                                                    size_t n_x, size_t k)
{
    for (size_t i = 0; i < n_w; i += 2) {
        const size_t rows = dsv3__min(n_w - i, 2);
        const float *w0 = w + i * w_stride, *w1 = w0 + (rows - 1) * w_stride, *xr[3];
        for (size_t j = 0, n; j < n_x; j += n) {
            float *to = out + j * out_stride + i;
            n = dsv3__k_tile_rows(n_x - j, 3);
            for (size_t r = 0; r < n; r++)
                xr[r] = x + (index ? index[j + r] : j + r) * x_stride;
            switch (n) {
            case 3: dsv3__k_tile_2t_avx512(to, out_stride, w0, w1, rows, xr, k, 3); break;
            case 2: dsv3__k_tile_2t_avx512(to, out_stride, w0, w1, rows, xr, k, 2); break;
            default: dsv3__k_tile_2t_avx512(to, out_stride, w0, w1, rows, xr, k, 1);
            }
        }
    }
}

/* H rows of u by C registers of columns; H and C are constants. */
DSV3__TARGET_AVX512 DSV3__INLINE void dsv3__k_outer_hc_avx512(float *u, size_t u_stride, const float *a,
                                                              size_t a_stride, const float *b, size_t b_stride,
                                                              size_t n_t, const size_t H, const size_t C)
{
    __m512 acc[16], v[8], s;
    DSV3__UNROLL
    for (size_t h = 0; h < H; h++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            acc[h * C + c] = _mm512_loadu_ps(u + h * u_stride + 16 * c);
    }
    for (size_t t = 0; t < n_t; t++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            v[c] = _mm512_loadu_ps(b + t * b_stride + 16 * c);
        DSV3__UNROLL
        for (size_t h = 0; h < H; h++) {
            s = _mm512_set1_ps(a[h * a_stride + t]);
            DSV3__UNROLL
            for (size_t c = 0; c < C; c++)
                acc[h * C + c] = _mm512_fmadd_ps(s, v[c], acc[h * C + c]);
        }
    }
    DSV3__UNROLL
    for (size_t h = 0; h < H; h++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            _mm512_storeu_ps(u + h * u_stride + 16 * c, acc[h * C + c]);
    }
}

DSV3__TARGET_AVX512 static void dsv3__k_outer_avx512(float *u, size_t u_stride, size_t n_h, const float *a,
                                                     size_t a_stride, const float *b, size_t b_stride, size_t n_t,
                                                     size_t n_c)
{
    const size_t full = n_c / 16 * 16;
    size_t h = 0;
    for (; h + 4 <= n_h; h += 4) {
        float *to = u + h * u_stride;
        size_t c = 0;
        for (; c + 64 <= full; c += 64)
            dsv3__k_outer_hc_avx512(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 4, 4);
        for (; c < full; c += 16)
            dsv3__k_outer_hc_avx512(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 4, 1);
    }
    for (; h < n_h; h++) {
        float *to = u + h * u_stride;
        size_t c = 0;
        for (; c + 128 <= full; c += 128)
            dsv3__k_outer_hc_avx512(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 1, 8);
        for (; c < full; c += 16)
            dsv3__k_outer_hc_avx512(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 1, 1);
    }
    if (full < n_c)
        dsv3__k_outer_scalar(u + full, u_stride, n_h, a, a_stride, b + full, b_stride, n_t, n_c - full);
}

/* dsv3__k_flush, 16 at once. */
DSV3__TARGET_AVX512 DSV3__INLINE __m512 dsv3__k_flush_avx512(__m512 v)
{
    const __m512 magnitude =
        _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)));
    const __mmask16 keep = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(DSV3__MIN_NORMAL), _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(keep, v);
}

/* dsv3__exp, 16 at once. */
DSV3__TARGET_AVX512 DSV3__INLINE __m512 dsv3__k_exp16_avx512(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), magic = _mm512_set1_ps(DSV3__EXP_MAGIC);
    const __m512i bias = _mm512_set1_epi32(127 - 256);
    const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(DSV3__EXP_LOW), _CMP_NLT_UQ);
    x = _mm512_min_ps(_mm512_set1_ps(DSV3__EXP_HIGH), x); /* the second operand, if it is NaN */
    x = _mm512_max_ps(_mm512_set1_ps(DSV3__EXP_LOW), x);
    __m512 t = _mm512_fmadd_ps(x, _mm512_set1_ps(DSV3__EXP_LOG2E), magic), n = _mm512_sub_ps(t, magic);
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-DSV3__EXP_LN2_HI), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-DSV3__EXP_LN2_LO), r);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(DSV3__EXP_C6), r, _mm512_set1_ps(DSV3__EXP_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV3__EXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV3__EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(DSV3__EXP_C2));
    p = _mm512_fmadd_ps(p, r, one);
    p = _mm512_fmadd_ps(p, r, one);
    __m512i biased = _mm512_sub_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(0x4B400000 - 512));
    __m512i half = _mm512_srli_epi32(biased, 1), rest = _mm512_sub_epi32(biased, half);
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(half, bias), 23)));
    p = _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(rest, bias), 23)));
    return _mm512_maskz_mov_ps(keep, p);
}

DSV3__TARGET_AVX512 static float dsv3__k_exp_sum_avx512(float *x, size_t n, float max)
{
    float t[16];
    __m512 m = _mm512_set1_ps(max), s = _mm512_setzero_ps();
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 e = dsv3__k_exp16_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + i), m));
        _mm512_storeu_ps(x + i, e);
        s = _mm512_add_ps(s, e);
    }
    _mm512_storeu_ps(t, s);
    for (; i < n; i++) {
        x[i] = dsv3__exp(x[i] - max);
        t[i % 16] += x[i];
    }
    return dsv3__k_tree16(t);
}

DSV3__TARGET_AVX512 static void dsv3__k_swiglu_avx512(float *out, const float *gate, const float *up, size_t n)
{
    const __m512i minus = _mm512_set1_epi32((int)0x80000000);
    const __m512 one = _mm512_set1_ps(1.0f);
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m512 g = _mm512_loadu_ps(gate + i);
        __m512 e =
            dsv3__k_exp16_avx512(_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(g), minus))); /* e^-g */
        __m512 v = _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)), _mm512_loadu_ps(up + i));
        _mm512_storeu_ps(out + i, dsv3__k_flush_avx512(v));
    }
    dsv3__k_swiglu_scalar(out + i, gate + i, up + i, n - i);
}

// ---- AVX-512: pairs --------------------------------------------------------------------------------------------

/* 64 columns in pairs: bytes 1, 0 of 16 words are one chain register's, bytes 3, 2 the next one's. x: where the first
   register's begin. */
DSV3__TARGET_AVX512 DSV3__INLINE __m512i dsv3__k_dot_fp8_pairs_64_avx512(__m512 *a, __m512i v, const float *x,
                                                                         __m512i worst)
{
    __m512 o[4];
    dsv3__k_fp8x64_avx512(o, v);
    a[0] = _mm512_fmadd_ps(o[1], _mm512_loadu_ps(x), a[0]);
    a[1] = _mm512_fmadd_ps(o[3], _mm512_loadu_ps(x + 16), a[1]);
    a[0] = _mm512_fmadd_ps(o[0], _mm512_loadu_ps(x + 64), a[0]);
    a[1] = _mm512_fmadd_ps(o[2], _mm512_loadu_ps(x + 80), a[1]);
    return dsv3__k_fp8_worst_avx512(worst, v);
}

/* 8 lines of weights at once, as in dsv3__k_dot_fp8_avx512. */
DSV3__TARGET_AVX512 static float dsv3__k_dot_fp8_pairs_avx512(const void *weights, const float *x, const float *scale64,
                                                              size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    __m512i worst = _mm512_setzero_si512(), v0, v1, v2, v3, v4, v5, v6, v7;
    __m512 a[4];
    (void)scale64;
    a[0] = a[1] = a[2] = a[3] = _mm512_setzero_ps();
#define DSV3__LOAD(i)                      \
    v##i = _mm512_loadu_si512(w + i * 64); \
    DSV3__PREFETCH(w + i * 64);            \
    DSV3__PIN512(v##i)
#define DSV3__STEP(i, j)                                                 \
    worst = dsv3__k_dot_fp8_pairs_64_avx512(a, v##i, x + i * 64, worst); \
    worst = dsv3__k_dot_fp8_pairs_64_avx512(a + 2, v##j, x + i * 64 + 32, worst)
    for (; k >= 512; k -= 512, w += 512, x += 512) {
        DSV3__LOAD(0);
        DSV3__LOAD(1);
        DSV3__LOAD(2);
        DSV3__LOAD(3);
        DSV3__LOAD(4);
        DSV3__LOAD(5);
        DSV3__LOAD(6);
        DSV3__LOAD(7);
        DSV3__STEP(0, 1);
        DSV3__STEP(2, 3);
        DSV3__STEP(4, 5);
        DSV3__STEP(6, 7);
    }
    for (; k; k -= dsv3__min(k, 128), w += 128, x += 128) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k);
            w = tail;
        }
        DSV3__LOAD(0);
        DSV3__LOAD(1);
        DSV3__STEP(0, 1);
    }
#undef DSV3__LOAD
#undef DSV3__STEP
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx512(worst)))
        return dsv3__bits_float(DSV3__NAN_BITS);
    return dsv3__k_tree64_avx512(a[0], a[1], a[2], a[3]);
}

DSV3__TARGET_AVX512 static void dsv3__k_row_fp8_pairs_avx512(float *out, size_t block, size_t group,
                                                             const void *weights, const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    const __m512 up = _mm512_set1_ps(DSV3__TWO_120);
    uint8_t tail[128];
    __m512i worst = _mm512_setzero_si512();
    float *to = out;
    (void)scale64;
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 128, to += 2 * block) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, left);
            w = tail;
        }
        for (size_t h = 0; h < 2; h++) {
            __m512i v = _mm512_loadu_si512(w + 64 * h);
            __m512 o[4];
            worst = dsv3__k_fp8_worst_avx512(worst, v);
            dsv3__k_fp8x64_avx512(o, v);
            for (size_t q = 0; q < 2; q++) {
                _mm512_storeu_ps(to + (2 * h + q) * group, _mm512_mul_ps(o[2 * q + 1], up));
                _mm512_storeu_ps(to + (2 * h + q) * group + block, _mm512_mul_ps(o[2 * q], up));
            }
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_avx512(worst)))
        dsv3__k_row_pairs_scalar(out, block, group, 16, weights, k, DSV3_DTYPE_F8_E4M3);
}

/* BF16: the second of two columns is the high half of a word, the first the low. */
DSV3__TARGET_AVX512 DSV3__INLINE __m512 dsv3__k_second_avx512(__m512i v)
{
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xFFFF0000)));
}

DSV3__TARGET_AVX512 DSV3__INLINE __m512 dsv3__k_first_avx512(__m512i v)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
}

DSV3__TARGET_AVX512 static float dsv3__k_dot_bf16_pairs_avx512(const void *weights, const float *x,
                                                               const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    __m512i v;
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
    (void)scale64;
    for (; k; k -= dsv3__min(k, 128), w += 256, x += 128) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * k);
            w = tail;
        }
#define DSV3__STEP(g)                                                                    \
    DSV3__PREFETCH(w + 64 * g);                                                          \
    v = _mm512_loadu_si512(w + 64 * g);                                                  \
    a##g = _mm512_fmadd_ps(dsv3__k_second_avx512(v), _mm512_loadu_ps(x + 16 * g), a##g); \
    a##g = _mm512_fmadd_ps(dsv3__k_first_avx512(v), _mm512_loadu_ps(x + 64 + 16 * g), a##g)
        DSV3__STEP(0);
        DSV3__STEP(1);
        DSV3__STEP(2);
        DSV3__STEP(3);
#undef DSV3__STEP
    }
    return dsv3__k_tree64_avx512(a0, a1, a2, a3);
}

DSV3__TARGET_AVX512 static void dsv3__k_row_bf16_pairs_avx512(float *out, size_t block, size_t group,
                                                              const void *weights, const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    (void)scale64;
    for (; k; k -= dsv3__min(k, 128), w += 256, out += 2 * block) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * k);
            w = tail;
        }
        for (size_t g = 0; g < 4; g++) {
            __m512i v = _mm512_loadu_si512(w + 64 * g);
            _mm512_storeu_ps(out + g * group, dsv3__k_second_avx512(v));
            _mm512_storeu_ps(out + g * group + block, dsv3__k_first_avx512(v));
        }
    }
}

/* The bits of v, rounded to the upper 16: bf16(v) and something below it. As dsv3__k_bf16_avx2. */
DSV3__TARGET_AVX512 DSV3__INLINE __m512i dsv3__k_bf16_avx512(__m512 v)
{
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
}

DSV3__TARGET_AVX512 static void dsv3__k_round_pairs_avx512(float *out, size_t block, size_t group, const float *x,
                                                           size_t x_block, size_t x_group, const float *scale64,
                                                           float up, size_t n)
{
    const __m512 ups = _mm512_set1_ps(up);
    for (size_t g = 0; g < 4; g++)
        for (size_t b = 0; b < n / 64; b++) {
            __m512 v = _mm512_loadu_ps(x + b * x_block + g * x_group);
            v = _mm512_mul_ps(v, _mm512_set1_ps(scale64[b / 2 * 2 + g / 2]));
            v = dsv3__k_flush_avx512(dsv3__k_second_avx512(dsv3__k_bf16_avx512(v)));
            _mm512_storeu_ps(out + b * block + g * group, _mm512_mul_ps(v, ups));
        }
}

#define dsv3__k_bytes_avx512    dsv3__k_bytes_avx2
#define dsv3__k_to_bytes_avx512 dsv3__k_to_bytes_avx2

#if DSV3__VNNI
// ---- AVX-512 VNNI ----------------------------------------------------------------------------------------------

/* The sums of 4 registers. */
DSV3__TARGET_AVX512_VNNI DSV3__INLINE void dsv3__k_bytes_store_avx512_vnni(int32_t *sum, __m512i a, __m512i b,
                                                                           __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i t = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd)); /* a b c d, 4 times */
    __m256i u = _mm256_add_epi32(_mm512_castsi512_si256(t), _mm512_extracti64x4_epi64(t, 1));
    _mm_storeu_si128((__m128i *)(void *)sum, _mm_add_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1)));
}

/* 24 of the 32 registers sum 4 x 6 pairs, 10 loads for 24 instructions. X is a constant. */
DSV3__TARGET_AVX512_VNNI DSV3__INLINE void dsv3__k_bytes_tile_x_avx512_vnni(int32_t (*sum)[4], const int8_t *const *w,
                                                                            const int8_t *const *x, size_t c, size_t n,
                                                                            size_t ahead, const int X)
{
    const int8_t *w0 = w[0] + c, *w1 = w[1] + c, *w2 = w[2] + c, *w3 = w[3] + c, *x0 = x[0] + c,
                 *x1 = x[X > 1 ? 1 : 0] + c;
    const int8_t *x2 = x[X > 2 ? 2 : 0] + c, *x3 = x[X > 3 ? 3 : 0] + c, *x4 = x[X > 4 ? 4 : 0] + c,
                 *x5 = x[X > 5 ? 5 : 0] + c;
    const __m512i top = _mm512_set1_epi8((char)0x80);
    __m512i a00, a01, a02, a03, a04, a05, a10, a11, a12, a13, a14, a15, a20, a21, a22, a23, a24, a25, a30, a31, a32,
        a33, a34, a35;
    __m512i v0, v1, v2, v3, v4, v5, v;
    size_t i = 0;
    a00 = a01 = a02 = a03 = a04 = a05 = a10 = a11 = a12 = a13 = a14 = a15 = _mm512_setzero_si512();
    a20 = a21 = a22 = a23 = a24 = a25 = a30 = a31 = a32 = a33 = a34 = a35 = _mm512_setzero_si512();
    v1 = v2 = v3 = v4 = v5 = a00;
#define DSV3__ADD(j, acc, with) \
    if (X > j)                  \
    DSV3__DPBUSD512(acc, v, with)
#define DSV3__STEP(row, a0, a1, a2, a3, a4, a5) \
    v = _mm512_xor_si512(DSV3__LOAD(row), top); \
    DSV3__ADD(0, a0, v0);                       \
    DSV3__ADD(1, a1, v1);                       \
    DSV3__ADD(2, a2, v2);                       \
    DSV3__ADD(3, a3, v3);                       \
    DSV3__ADD(4, a4, v4);                       \
    DSV3__ADD(5, a5, v5)
#define DSV3__STEPS                               \
    v0 = DSV3__LOAD(x0);                          \
    if (X > 1)                                    \
        v1 = DSV3__LOAD(x1);                      \
    if (X > 2)                                    \
        v2 = DSV3__LOAD(x2);                      \
    if (X > 3)                                    \
        v3 = DSV3__LOAD(x3);                      \
    if (X > 4)                                    \
        v4 = DSV3__LOAD(x4);                      \
    if (X > 5)                                    \
        v5 = DSV3__LOAD(x5);                      \
    DSV3__STEP(w0, a00, a01, a02, a03, a04, a05); \
    DSV3__STEP(w1, a10, a11, a12, a13, a14, a15); \
    DSV3__STEP(w2, a20, a21, a22, a23, a24, a25); \
    DSV3__STEP(w3, a30, a31, a32, a33, a34, a35)
#define DSV3__LOAD(p) _mm512_loadu_si512((p) + i)
    for (; i + 64 <= n; i += 64) {
        DSV3__PREFETCH_AT(w0 + i, ahead);
        DSV3__PREFETCH_AT(w1 + i, ahead);
        DSV3__PREFETCH_AT(w2 + i, ahead);
        DSV3__PREFETCH_AT(w3 + i, ahead);
        DSV3__STEPS;
    }
#undef DSV3__LOAD
#define DSV3__LOAD(p) _mm512_maskz_loadu_epi8(there, (p) + i)
    if (i < n) {
        const __mmask64 there = ((uint64_t)1 << (n - i)) - 1;
        DSV3__STEPS;
    }
#undef DSV3__LOAD
#undef DSV3__STEPS
#undef DSV3__STEP
#undef DSV3__ADD
    dsv3__k_bytes_store_avx512_vnni(sum[0], a00, a10, a20, a30);
    if (X > 1)
        dsv3__k_bytes_store_avx512_vnni(sum[1], a01, a11, a21, a31);
    if (X > 2)
        dsv3__k_bytes_store_avx512_vnni(sum[2], a02, a12, a22, a32);
    if (X > 3)
        dsv3__k_bytes_store_avx512_vnni(sum[3], a03, a13, a23, a33);
    if (X > 4)
        dsv3__k_bytes_store_avx512_vnni(sum[4], a04, a14, a24, a34);
    if (X > 5)
        dsv3__k_bytes_store_avx512_vnni(sum[5], a05, a15, a25, a35);
}

DSV3__TARGET_AVX512_VNNI DSV3__NOINLINE static void dsv3__k_bytes_tile_avx512_vnni(int32_t (*sum)[4],
                                                                                   const int8_t *const *w,
                                                                                   const int8_t *const *x, size_t n_x,
                                                                                   size_t c, size_t n, size_t ahead)
{
    switch (n_x) {
    case 6: dsv3__k_bytes_tile_x_avx512_vnni(sum, w, x, c, n, ahead, 6); break;
    case 5: dsv3__k_bytes_tile_x_avx512_vnni(sum, w, x, c, n, ahead, 5); break;
    case 4: dsv3__k_bytes_tile_x_avx512_vnni(sum, w, x, c, n, ahead, 4); break;
    case 3: dsv3__k_bytes_tile_x_avx512_vnni(sum, w, x, c, n, ahead, 3); break;
    default: dsv3__k_bytes_tile_x_avx512_vnni(sum, w, x, c, n, ahead, 2);
    }
}

DSV3__TARGET_AVX512_VNNI static void dsv3__k_bytes_row_avx512_vnni(int32_t *sum, const int8_t *w, const int8_t *x,
                                                                   size_t k, size_t group)
{
    const __m512i top = _mm512_set1_epi8((char)0x80);
    for (size_t n; k; k -= n, w += n, x += n) {
        __m512i a0, a1, a2, a3, v, y;
        size_t i = 0;
        n = dsv3__min(k, group);
        a0 = a1 = a2 = a3 = _mm512_setzero_si512();
#define DSV3__STEP(a, at)                                      \
    DSV3__PREFETCH(w + i + at);                                \
    v = _mm512_xor_si512(_mm512_loadu_si512(w + i + at), top); \
    y = _mm512_loadu_si512(x + i + at);                        \
    DSV3__DPBUSD512(a, v, y)
        for (; i + 256 <= n; i += 256) {
            DSV3__STEP(a0, 0);
            DSV3__STEP(a1, 64);
            DSV3__STEP(a2, 128);
            DSV3__STEP(a3, 192);
        }
        for (; i + 128 <= n; i += 128) { /* a group of 128 is one turn of this */
            DSV3__STEP(a0, 0);
            DSV3__STEP(a1, 64);
        }
        if (i + 64 <= n) {
            DSV3__STEP(a0, 0);
            i += 64;
        }
#undef DSV3__STEP
        if (i < n) {
            const __mmask64 there = ((uint64_t)1 << (n - i)) - 1;
            v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, w + i), top);
            y = _mm512_maskz_loadu_epi8(there, x + i);
            DSV3__DPBUSD512(a1, v, y);
        }
        a0 = _mm512_add_epi32(_mm512_add_epi32(a0, a1), _mm512_add_epi32(a2, a3));
        *sum++ = dsv3__k_sum8_avx2(_mm256_add_epi32(_mm512_castsi512_si256(a0), _mm512_extracti64x4_epi64(a0, 1)));
    }
}

DSV3__TARGET_AVX512_VNNI static void dsv3__k_bytes_avx512_vnni(float *out, size_t out_stride, const int8_t *w,
                                                               size_t w_stride, const float *w_scale, size_t n_w,
                                                               const int8_t *const *x, const float *const *x_scale,
                                                               size_t n_x, size_t k, size_t group, void *scratch)
{
    (void)scratch;
    dsv3__k_bytes_vnni(dsv3__k_bytes_tile_avx512_vnni, dsv3__k_bytes_row_avx512_vnni, 6, out, out_stride, w, w_stride,
                       w_scale, n_w, x, x_scale, n_x, k, group);
}

#if DSV3__AMX
// ---- AMX INT8 --------------------------------------------------------------------------------------------------

/* Eight registers of 16 rows of 64 bytes, and one instruction that multiplies two of them: 16 rows of w by 16 of x, 64
   columns of each, 16,384 products of signed bytes in 16 cycles, eight times as many as vpdpbusd makes. Sums are exact, so
   the bits are the others'. The rows of w are loaded as they lie; the other operand has the words of 4 columns of 16 rows
   side by side, so rows of x are turned that way first, once for all rows of w that they meet here. */

/* to + c * to_stride, c < n: words c of from[0 ... 15]. n at most 16. */
DSV3__TARGET_AVX512_AMX DSV3__INLINE void dsv3__k_turn_avx512_amx(void *to, size_t to_stride, const void *const *from,
                                                                  size_t n)
{
    for (size_t c = 0; c < n; c += 4) {
        __m512i r[4], lo01, lo23, hi01, hi23, words[4];
        DSV3__UNROLL
        for (size_t q = 0; q < 4; q++) { /* 4 words of rows q, 4 + q, 8 + q, 12 + q */
#define DSV3__PART(row) _mm_loadu_si128((const __m128i *)(const void *)((const uint8_t *)from[row] + 4 * c))
            r[q] = _mm512_castsi128_si512(DSV3__PART(q));
            r[q] = _mm512_inserti32x4(r[q], DSV3__PART(4 + q), 1);
            r[q] = _mm512_inserti32x4(r[q], DSV3__PART(8 + q), 2);
            r[q] = _mm512_inserti32x4(r[q], DSV3__PART(12 + q), 3);
#undef DSV3__PART
        }
        lo01 = _mm512_unpacklo_epi32(r[0], r[1]), hi01 = _mm512_unpackhi_epi32(r[0], r[1]);
        lo23 = _mm512_unpacklo_epi32(r[2], r[3]), hi23 = _mm512_unpackhi_epi32(r[2], r[3]);
        words[0] = _mm512_unpacklo_epi64(lo01, lo23), words[1] = _mm512_unpackhi_epi64(lo01, lo23);
        words[2] = _mm512_unpacklo_epi64(hi01, hi23), words[3] = _mm512_unpackhi_epi64(hi01, hi23);
        for (size_t q = 0; q < dsv3__min(n - c, 4); q++)
            _mm512_storeu_ps((uint8_t *)to + (c + q) * to_stride, _mm512_castsi512_ps(words[q]));
    }
}

/* sum [32][32] = 32 rows of w times 16 X of x, n columns. x: turned, x_step bytes from 64 columns to the next. Of w `rows`
   are there, the others count as zeros. For each 64 columns `fetch` lines are asked for, from *next on. X is a constant. */
DSV3__TARGET_AVX512_AMX DSV3__INLINE void
dsv3__k_bytes_tile_x_avx512_amx(int32_t (*sum)[32], const int8_t *w, size_t w_stride, size_t rows, const uint8_t *x,
                                size_t x_step, size_t n, const uint8_t **next, size_t fetch, const int X)
{
    const uint8_t *ahead = *next;
    int8_t edge[32][64];
    DSV3__TILE_ZERO(0);
    DSV3__TILE_ZERO(2);
    if (X > 1) {
        DSV3__TILE_ZERO(1);
        DSV3__TILE_ZERO(3);
    }
    if (rows < 32 || n % 64)
        memset(edge, 0, sizeof edge);
    for (size_t c = 0; c < n; c += 64, x += x_step) {
        const int8_t *from = w + c;
        size_t stride = w_stride;
        if (DSV3__UNLIKELY(rows < 32 || n - c < 64)) {
            for (size_t i = 0; i < rows; i++) {
                memset(edge[i], 0, 64);
                memcpy(edge[i], w + i * w_stride + c, dsv3__min(n - c, 64));
            }
            from = edge[0], stride = 64;
        }
        DSV3__TILE_LOAD(6, x, 64);
        DSV3__TILE_LOAD(4, from, stride);
        DSV3__TILE_DOT(0, 4, 6);
        if (X > 1) {
            DSV3__TILE_LOAD(7, x + 1024, 64);
            DSV3__TILE_DOT(1, 4, 7);
        }
        DSV3__TILE_LOAD(5, from + 16 * stride, stride);
        DSV3__TILE_DOT(2, 5, 6);
        if (X > 1)
            DSV3__TILE_DOT(3, 5, 7);
        for (size_t i = 0; i < fetch; i++, ahead += 64)
            DSV3__FETCH(ahead);
    }
    *next = ahead;
    DSV3__TILE_STORE(0, sum[0], sizeof sum[0]);
    DSV3__TILE_STORE(2, sum[16], sizeof sum[0]);
    if (X > 1) {
        DSV3__TILE_STORE(1, sum[0] + 16, sizeof sum[0]);
        DSV3__TILE_STORE(3, sum[16] + 16, sizeof sum[0]);
    }
}

DSV3__TARGET_AVX512_AMX DSV3__NOINLINE static void
dsv3__k_bytes_tile_avx512_amx(int32_t (*sum)[32], const int8_t *w, size_t w_stride, size_t rows, const uint8_t *x,
                              size_t x_step, size_t n, const uint8_t **next, size_t fetch, bool two)
{
    if (two)
        dsv3__k_bytes_tile_x_avx512_amx(sum, w, w_stride, rows, x, x_step, n, next, fetch, 2);
    else
        dsv3__k_bytes_tile_x_avx512_amx(sum, w, w_stride, rows, x, x_step, n, next, fetch, 1);
}

/* Fewer rows of x than this are not worth turning. */
#define DSV3__TILES_FEW 7

DSV3__TARGET_AVX512_AMX static void dsv3__k_bytes_avx512_amx(float *out, size_t out_stride, const int8_t *w,
                                                             size_t w_stride, const float *w_scale, size_t n_w,
                                                             const int8_t *const *x, const float *const *x_scale,
                                                             size_t n_x, size_t k, size_t group, void *scratch)
{
    static const uint8_t shapes[64] = {1,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0, /* palette 1 */
                                       64, 0,  64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 64, 0, /* bytes of a row */
                                       0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,
                                       16, 16, 16, 16, 16, 16, 16, 16, 0,  0, 0,  0, 0,  0, 0,  0}; /* rows */
    const size_t n_groups = (k + group - 1) / group, tiles = (n_x + 15) / 16, steps = (k + 63) / 64;
    const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32((int)DSV3__NAN_BITS));
    uint8_t *turned = (uint8_t *)scratch;                                    /* [steps][tiles][16][16][4] */
    float *xs = (float *)(void *)(turned + steps * tiles * 1024), y[32][32]; /* [n_groups][16 tiles] */
    const void *from[16];
    int32_t sum[32][32];
    if (n_x < DSV3__TILES_FEW || (group % 64 && group < k)) {
        dsv3__k_bytes_avx512_vnni(out, out_stride, w, w_stride, w_scale, n_w, x, x_scale, n_x, k, group, scratch);
        return;
    }
    for (size_t t = 0; t < tiles; t++) {
        for (size_t s = 0; s < steps; s++) {
            for (size_t j = 0; j < 16; j++) /* rows that are not there repeat the last */
                from[j] = x[dsv3__min(16 * t + j, n_x - 1)] + 64 * s;
            dsv3__k_turn_avx512_amx(turned + (s * tiles + t) * 1024, 64, from, 16);
        }
        for (size_t g = 0; g < n_groups; g++)
            for (size_t j = 0; j < 16; j++)
                xs[(g * tiles + t) * 16 + j] = x_scale[dsv3__min(16 * t + j, n_x - 1)][g];
    }
    DSV3__TILES_BEGIN(&shapes);
    for (size_t i = 0; i < n_w; i += 32) {
        const size_t rows = dsv3__min(n_w - i, 32), pairs = (tiles + 1) / 2;
        const uint8_t *next = (const uint8_t *)(w + (i + 32) * w_stride);
        for (size_t t = 0; t < tiles; t += 2) {
            const size_t taken = dsv3__min(tiles - t, 2); /* tiles of x */
            memset(y, 0, sizeof y);
            for (size_t g = 0; g < n_groups; g++) {
                dsv3__k_bytes_tile_avx512_amx(
                    sum, w + i * w_stride + g * group, w_stride, rows, turned + (g * group / 64 * tiles + t) * 1024,
                    tiles * 1024, dsv3__min(k - g * group, group), &next, (32 + pairs - 1) / pairs, taken > 1);
                for (size_t b = 0; b < taken; b++) {
                    const __m512 s = _mm512_loadu_ps(xs + (g * tiles + t + b) * 16);
                    for (size_t r = 0; r < rows; r++) {
                        __m512 v = _mm512_cvtepi32_ps(_mm512_loadu_si512(sum[r] + 16 * b));
                        __m512 scale = _mm512_mul_ps(_mm512_set1_ps(w_scale[(i + r) * n_groups + g]), s);
                        _mm512_storeu_ps(y[r] + 16 * b, _mm512_fmadd_ps(v, scale, _mm512_loadu_ps(y[r] + 16 * b)));
                    }
                }
            }
            for (size_t b = 0; b < 2 * taken; b++) { /* 16 rows of w and of x each */
                const size_t r0 = b / taken * 16, j0 = (t + b % taken) * 16;
                float *to = out + j0 * out_stride + i + r0;
                float some[16][16];
                if (r0 >= rows)
                    break;
                for (size_t r = 0; r < 16; r++) {
                    float *row = y[r0 + r] + b % taken * 16;
                    const __m512 v = _mm512_loadu_ps(row);
                    const __mmask16 number = _mm512_cmp_ps_mask(v, v, _CMP_ORD_Q);
                    if (DSV3__UNLIKELY(number != 0xFFFF))
                        _mm512_storeu_ps(row, _mm512_mask_mov_ps(nan, number, v));
                    from[r] = row;
                }
                if (rows - r0 >= 16) {
                    dsv3__k_turn_avx512_amx(to, out_stride * sizeof(float), from, dsv3__min(n_x - j0, 16));
                    continue;
                }
                dsv3__k_turn_avx512_amx(some, sizeof some[0], from, 16);
                for (size_t j = 0; j < dsv3__min(n_x - j0, 16); j++)
                    memcpy(to + j * out_stride, some[j], (rows - r0) * sizeof(float));
            }
        }
    }
    DSV3__TILES_END();
}
#endif // DSV3__AMX

// ---- AVX-512 BF16, VBMI: pairs as words of two bf16 --------------------------------------------------------------

/* The bf16 of a code without its sign: high bytes, low bytes. Every code is a normal number there, the denormal ones too;
   0x7F is NaN. */
#define DSV3__16(v) (v), (v), (v), (v), (v), (v), (v), (v), (v), (v), (v), (v), (v), (v), (v), (v)
#define DSV3__STEPS 0x00, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0, 0xE0
static const uint8_t dsv3__k_fp8_bf16_high[128] = {0x00,           0x3B,
                                                   0x3B,           0x3B,
                                                   0x3C,           0x3C,
                                                   0x3C,           0x3C,
                                                   0x3C,           0x3C,
                                                   0x3C,           0x3C,
                                                   0x3C,           0x3C,
                                                   0x3C,           0x3C, /* 0 ... 15 */
                                                   DSV3__16(0x3D), DSV3__16(0x3E),
                                                   DSV3__16(0x3F), DSV3__16(0x40),
                                                   DSV3__16(0x41), DSV3__16(0x42),
                                                   0x43,           0x43,
                                                   0x43,           0x43,
                                                   0x43,           0x43,
                                                   0x43,           0x43,
                                                   0x43,           0x43,
                                                   0x43,           0x43,
                                                   0x43,           0x43,
                                                   0x43,           0x7F};
static const uint8_t dsv3__k_fp8_bf16_low[128] = {
    0x00,        0x00, 0x80,        0xC0, 0x00,        0x20, 0x40,        0x60,
    0x80,        0x90, 0xA0,        0xB0, 0xC0,        0xD0, 0xE0,        0xF0, /* 0 ... 15 */
    DSV3__STEPS, 0xF0, DSV3__STEPS, 0xF0, DSV3__STEPS, 0xF0, DSV3__STEPS, 0xF0,
    DSV3__STEPS, 0xF0, DSV3__STEPS, 0xF0, DSV3__STEPS, 0xC0};
#undef DSV3__16
#undef DSV3__STEPS

/* Bytes of the words of columns 4i, 4i + 1, out of 64 low bytes and behind them 64 high ones; 2 more: 4i + 2, 4i + 3. */
#define DSV3__WORD(i) 0x41014000u + 0x04040404u * i
static const uint32_t dsv3__k_fp8_bf16_words[16] = {DSV3__WORD(0),  DSV3__WORD(1),  DSV3__WORD(2),  DSV3__WORD(3),
                                                    DSV3__WORD(4),  DSV3__WORD(5),  DSV3__WORD(6),  DSV3__WORD(7),
                                                    DSV3__WORD(8),  DSV3__WORD(9),  DSV3__WORD(10), DSV3__WORD(11),
                                                    DSV3__WORD(12), DSV3__WORD(13), DSV3__WORD(14), DSV3__WORD(15)};
#undef DSV3__WORD

typedef struct dsv3__k_fp8_bf16 {
    __m512i high0, high1, low0, low1, words0, words1, sign;
} dsv3__k_fp8_bf16;

DSV3__TARGET_AVX512_BF16 DSV3__INLINE dsv3__k_fp8_bf16 dsv3__k_fp8_bf16_tables(void)
{
    dsv3__k_fp8_bf16 t;
    t.high0 = _mm512_loadu_si512(dsv3__k_fp8_bf16_high);
    t.high1 = _mm512_loadu_si512(dsv3__k_fp8_bf16_high + 64);
    t.low0 = _mm512_loadu_si512(dsv3__k_fp8_bf16_low);
    t.low1 = _mm512_loadu_si512(dsv3__k_fp8_bf16_low + 64);
    t.words0 = _mm512_loadu_si512(dsv3__k_fp8_bf16_words);
    t.words1 = _mm512_add_epi32(t.words0, _mm512_set1_epi32(0x02020202));
    t.sign = _mm512_set1_epi8((char)0x80);
    return t;
}

/* 64 codes: the words of columns 4i, 4i + 1 and of 4i + 2, 4i + 3. PERF: four two-register byte permutes; interleaving low
   and high within 128 bits would be cheaper by a little, but leaves chains in an order of its own. */
DSV3__TARGET_AVX512_BF16 DSV3__INLINE void dsv3__k_fp8x64_avx512_bf16(__m512i *p0, __m512i *p1,
                                                                      const dsv3__k_fp8_bf16 *t, __m512i v)
{
    __m512i high = _mm512_permutex2var_epi8(t->high0, v, t->high1), low = _mm512_permutex2var_epi8(t->low0, v, t->low1);
    high = _mm512_or_si512(high, _mm512_and_si512(v, t->sign));
    *p0 = _mm512_permutex2var_epi8(low, t->words0, high);
    *p1 = _mm512_permutex2var_epi8(low, t->words1, high);
}

/* PERF: 4 lines of weights at once, and 2 loads of x for each. */
DSV3__TARGET_AVX512_BF16 static float dsv3__k_dot_fp8_pairs_avx512_bf16(const void *weights, const float *x,
                                                                        const float *scale64, size_t k)
{
    const dsv3__k_fp8_bf16 t = dsv3__k_fp8_bf16_tables();
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    __m512i v0, v1, v2, v3, p0, p1, y;
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
    (void)scale64;
#define DSV3__LOAD(i)                      \
    v##i = _mm512_loadu_si512(w + i * 64); \
    DSV3__PREFETCH(w + i * 64);            \
    DSV3__PIN512(v##i)
#define DSV3__STEP(i, even, odd)                    \
    dsv3__k_fp8x64_avx512_bf16(&p0, &p1, &t, v##i); \
    y = _mm512_loadu_si512(x + i * 32);             \
    DSV3__DPBF16(even, p0, y);                      \
    y = _mm512_loadu_si512(x + i * 32 + 16);        \
    DSV3__DPBF16(odd, p1, y)
    for (; k >= 256; k -= 256, w += 256, x += 128) {
        DSV3__LOAD(0);
        DSV3__LOAD(1);
        DSV3__LOAD(2);
        DSV3__LOAD(3);
        DSV3__STEP(0, a0, a1);
        DSV3__STEP(1, a2, a3);
        DSV3__STEP(2, a0, a1);
        DSV3__STEP(3, a2, a3);
    }
    for (; k; k -= dsv3__min(k, 128), w += 128, x += 64) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k);
            w = tail;
        }
        DSV3__LOAD(0);
        DSV3__LOAD(1);
        DSV3__STEP(0, a0, a1);
        DSV3__STEP(1, a2, a3);
    }
#undef DSV3__LOAD
#undef DSV3__STEP
    return dsv3__k_tree64_avx512(a0, a1, a2, a3);
}

DSV3__TARGET_AVX512_BF16 static void dsv3__k_row_fp8_pairs_avx512_bf16(float *out, size_t block, size_t group,
                                                                       const void *weights, const float *scale64,
                                                                       size_t k)
{
    const dsv3__k_fp8_bf16 t = dsv3__k_fp8_bf16_tables();
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    __m512i p0, p1;
    (void)scale64;
    for (; k; k -= dsv3__min(k, 128), w += 128, out += block) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k);
            w = tail;
        }
        for (size_t h = 0; h < 2; h++) {
            dsv3__k_fp8x64_avx512_bf16(&p0, &p1, &t, _mm512_loadu_si512(w + 64 * h));
            _mm512_storeu_ps(out + 2 * h * group, _mm512_castsi512_ps(p0));
            _mm512_storeu_ps(out + (2 * h + 1) * group, _mm512_castsi512_ps(p1));
        }
    }
}

/* Two columns of BF16 are a word as they lie. */
DSV3__TARGET_AVX512_BF16 static float dsv3__k_dot_bf16_pairs_avx512_bf16(const void *weights, const float *x,
                                                                         const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    __m512i v, y;
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
    (void)scale64;
    for (; k; k -= dsv3__min(k, 128), w += 256, x += 64) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * k);
            w = tail;
        }
#define DSV3__STEP(g)                   \
    DSV3__PREFETCH(w + 64 * g);         \
    v = _mm512_loadu_si512(w + 64 * g); \
    y = _mm512_loadu_si512(x + 16 * g); \
    DSV3__DPBF16(a##g, v, y)
        DSV3__STEP(0);
        DSV3__STEP(1);
        DSV3__STEP(2);
        DSV3__STEP(3);
#undef DSV3__STEP
    }
    return dsv3__k_tree64_avx512(a0, a1, a2, a3);
}

DSV3__TARGET_AVX512_BF16 static void dsv3__k_row_bf16_pairs_avx512_bf16(float *out, size_t block, size_t group,
                                                                        const void *weights, const float *scale64,
                                                                        size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    (void)scale64;
    for (; k; k -= dsv3__min(k, 128), w += 256, out += block) {
        if (DSV3__UNLIKELY(k < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * k);
            w = tail;
        }
        for (size_t g = 0; g < 4; g++)
            _mm512_storeu_ps(out + g * group, _mm512_castsi512_ps(_mm512_loadu_si512(w + 64 * g)));
    }
}

DSV3__TARGET_AVX512_BF16 static void dsv3__k_round_pairs_avx512_bf16(float *out, size_t block, size_t group,
                                                                     const float *x, size_t x_block, size_t x_group,
                                                                     const float *scale64, float up, size_t n)
{
    const __m512i high = _mm512_set1_epi32((int)0xFFFF0000);
    (void)up;
    for (size_t g = 0; g < 4; g++)
        for (size_t b = 0; b < n / 128; b++) {
            const float *from = x + 2 * b * x_block + g * x_group;
            __m512 s = _mm512_set1_ps(scale64[2 * b + g / 2]);
            __m512i second = dsv3__k_bf16_avx512(_mm512_mul_ps(_mm512_loadu_ps(from), s));
            __m512i first = dsv3__k_bf16_avx512(_mm512_mul_ps(_mm512_loadu_ps(from + x_block), s));
            __m512i word = _mm512_or_si512(_mm512_and_si512(second, high), _mm512_srli_epi32(first, 16));
            _mm512_storeu_ps(out + b * block + g * group, _mm512_castsi512_ps(word));
        }
}

DSV3__TARGET_AVX512_BF16 DSV3__INLINE __m512 dsv3__k_mac_avx512_bf16(__m512 sum, __m512 w, __m512 x)
{
    DSV3__DPBF16(sum, w, x);
    return sum;
}

DSV3__TARGET_AVX512_BF16 static void dsv3__k_tile_add_pairs_avx512_bf16(float *sum, size_t sum_next,
                                                                        const float *const *w, size_t w_step,
                                                                        size_t w_next, size_t n_w,
                                                                        const float *const *x, size_t x_step,
                                                                        size_t steps, size_t n_x, bool first)
{
    DSV3__TILE_ADD_AVX512(dsv3__k_mac_avx512_bf16)
}
#endif // DSV3__VNNI
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif // DSV3__AVX512

#if DSV3__NEON
// ---- NEON: chain 4g + l is lane l of register g --------------------------------------------------------------

/* Here fmla rounds once, as fmaf does. BFDOT is of no use: it rounds a sum of two products (to odd, denormals flushed),
   which no chain does. */

/* v is used behind what makes `done`: gcc begins everything at once otherwise, and runs out of registers. */
#if defined(__clang__)
#define DSV3__BEHIND(v, done) ((void)(v), (void)(done))
#else
#define DSV3__BEHIND(v, done) __asm__("" : "+w"(v), "+w"(done))
#endif

/* 64 chains in 16 registers -> lane i: t[i] + t[i + 4], of which the 4 are still to be added. */
DSV3__INLINE float32x4_t dsv3__k_tree4_neon(const float32x4_t *a)
{
    float32x4_t t[4]; /* t[q]: t[4q ... 4q + 3] */
    DSV3__UNROLL
    for (size_t q = 0; q < 4; q++)
        t[q] = vaddq_f32(vaddq_f32(a[q], a[4 + q]), vaddq_f32(a[8 + q], a[12 + q]));
    return vaddq_f32(vaddq_f32(t[0], t[2]), vaddq_f32(t[1], t[3])); /* + t[i + 8], + t[i + 4] */
}

DSV3__INLINE float dsv3__k_tree64_neon(const float32x4_t *a)
{
    float32x4_t s = dsv3__k_tree4_neon(a);
    float32x2_t h = vadd_f32(vget_low_f32(s), vget_high_f32(s)); /* + t[i + 2] */
    float r = vget_lane_f32(h, 0) + vget_lane_f32(h, 1);         /* + t[i + 1] */
    return r == r ? r : dsv3__bits_float(DSV3__NAN_BITS);
}

/* 8 values of F32, F16, BF16; 8 codes of I8. */
DSV3__INLINE float32x4x2_t dsv3__k_load8_neon(const uint8_t *w, dsv3_dtype dtype)
{
    float32x4x2_t v;
    if (dtype == DSV3_DTYPE_F32) {
        v.val[0] = vreinterpretq_f32_u8(vld1q_u8(w));
        v.val[1] = vreinterpretq_f32_u8(vld1q_u8(w + 16));
    } else if (dtype == DSV3_DTYPE_I8) {
        int16x8_t h = vmovl_s8(vreinterpret_s8_u8(vld1_u8(w)));
        v.val[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(h)));
        v.val[1] = vcvtq_f32_s32(vmovl_high_s16(h));
    } else if (dtype == DSV3_DTYPE_F16) {
        float16x8_t h = vreinterpretq_f16_u8(vld1q_u8(w));
        v.val[0] = vcvt_f32_f16(vget_low_f16(h));
        v.val[1] = vcvt_high_f32_f16(h);
    } else {
        uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(w));
        v.val[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)); /* bits << 16 */
        v.val[1] = vreinterpretq_f32_u32(vshll_high_n_u16(h, 16));
    }
    return v;
}

DSV3__INLINE float dsv3__k_dot_neon(const void *weights, const float *x, const float *scale64, size_t k,
                                    dsv3_dtype dtype)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t block = dsv3__k_block_size(dtype);
    uint8_t tail[256];
    float32x4_t a[16];
    DSV3__UNROLL
    for (size_t g = 0; g < 16; g++)
        a[g] = vdupq_n_f32(0);
    while (k) {
        if (DSV3__UNLIKELY(k < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k * (block / 64));
            w = tail;
            k = 64;
        }
        const float s = dtype == DSV3_DTYPE_I8 ? *scale64++ : 1.0f;
        DSV3__UNROLL
        for (size_t g = 0; g < 16; g += 2) {
            float32x4x2_t v = dsv3__k_load8_neon(w + g * (block / 16), dtype);
            if (dtype == DSV3_DTYPE_I8) {
                v.val[0] = vmulq_n_f32(v.val[0], s);
                v.val[1] = vmulq_n_f32(v.val[1], s);
            }
            a[g] = vfmaq_f32(a[g], v.val[0], vld1q_f32(x + 4 * g));
            a[g + 1] = vfmaq_f32(a[g + 1], v.val[1], vld1q_f32(x + 4 * g + 4));
        }
        w += block;
        x += 64;
        k -= 64;
    }
    return dsv3__k_tree64_neon(a);
}

DSV3__INLINE void dsv3__k_row_neon(float *out, size_t block, size_t group, const void *weights, const float *scale64,
                                   size_t k, dsv3_dtype dtype)
{
    const uint8_t *w = (const uint8_t *)weights;
    const size_t size = dsv3__k_block_size(dtype);
    uint8_t tail[256];
    for (size_t b = 0; b * 64 < k; b++, w += size, out += block) {
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, (k - b * 64) * (size / 64));
            w = tail;
        }
        const float s = dtype == DSV3_DTYPE_I8 ? scale64[b] : 1.0f;
        for (size_t g = 0; g < 16; g += 2) {
            float32x4x2_t v = dsv3__k_load8_neon(w + g * (size / 16), dtype);
            vst1q_f32(out + g * group, dtype == DSV3_DTYPE_I8 ? vmulq_n_f32(v.val[0], s) : v.val[0]);
            vst1q_f32(out + (g + 1) * group, dtype == DSV3_DTYPE_I8 ? vmulq_n_f32(v.val[1], s) : v.val[1]);
        }
    }
}

#define DSV3__K_DTYPE_NEON(name, dtype)                                                                                \
    static float dsv3__k_dot_##name##_neon(const void *w, const float *x, const float *scale64, size_t k)              \
    {                                                                                                                  \
        return dsv3__k_dot_neon(w, x, scale64, k, dtype);                                                              \
    }                                                                                                                  \
    static void dsv3__k_row_##name##_neon(float *out, size_t block, size_t group, const void *w, const float *scale64, \
                                          size_t k)                                                                    \
    {                                                                                                                  \
        dsv3__k_row_neon(out, block, group, w, scale64, k, dtype);                                                     \
    }
DSV3__K_DTYPE_NEON(f32, DSV3_DTYPE_F32)
DSV3__K_DTYPE_NEON(f16, DSV3_DTYPE_F16)
DSV3__K_DTYPE_NEON(bf16, DSV3_DTYPE_BF16)
DSV3__K_DTYPE_NEON(i8, DSV3_DTYPE_I8)
#undef DSV3__K_DTYPE_NEON

/* FP8 as in the AVX2 code: values * 2^-120 by shifts, and the same two things are watched for. 16 codes, w = 4 words:
   o[p] = bytes p of the words. */
DSV3__INLINE void dsv3__k_fp8x16_neon(float32x4_t *o, uint8x16_t w)
{
    const uint32x4_t keep = vdupq_n_u32(0x87F00000u);
    int16x8_t v = vreinterpretq_s16_u8(w);
    uint32x4_t even = vreinterpretq_u32_s16(vshrq_n_s16(vshlq_n_s16(v, 8), 4)); /* bytes 0, 2 */
    uint32x4_t odd = vreinterpretq_u32_s16(vshrq_n_s16(v, 4));                  /* bytes 1, 3 */
    o[0] = vreinterpretq_f32_u32(vandq_u32(vshlq_n_u32(even, 16), keep));
    o[1] = vreinterpretq_f32_u32(vandq_u32(vshlq_n_u32(odd, 16), keep));
    o[2] = vreinterpretq_f32_u32(vandq_u32(even, keep));
    o[3] = vreinterpretq_f32_u32(vandq_u32(odd, keep));
}

DSV3__INLINE uint8x16_t dsv3__k_fp8_worst_neon(uint8x16_t worst, uint8x16_t v) /* bytes: the largest code & 0x7F */
{
    return vmaxq_u8(worst, vandq_u8(v, vdupq_n_u8(0x7F)));
}

DSV3__INLINE bool dsv3__k_fp8_nan_neon(uint8x16_t worst)
{
    return vmaxvq_u8(worst) == 0x7F;
}

/* Register 4p + q: byte p of words 4q ... 4q + 3. */
static float dsv3__k_dot_fp8_neon(const void *weights, const float *x, const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    const float *at = x;
    uint8_t tail[64];
    uint8x16_t worst = vdupq_n_u8(0);
    float32x4_t a[16], o[4];
    DSV3__UNROLL
    for (size_t g = 0; g < 16; g++)
        a[g] = vdupq_n_f32(0);
    for (size_t b = 0; b * 64 < k; b++, w += 64, at += 64) {
        const float s = scale64[b] * DSV3__TWO_120;
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k - b * 64);
            w = tail;
        }
        DSV3__UNROLL
        for (size_t q = 0; q < 4; q++) {
            uint8x16_t v = vld1q_u8(w + 16 * q);
            DSV3__BEHIND(v, a[(q + 3) % 4]);
            worst = dsv3__k_fp8_worst_neon(worst, v);
            dsv3__k_fp8x16_neon(o, v);
            DSV3__UNROLL
            for (size_t p = 0; p < 4; p++) /* fmaf(f32(code * scale), x, chain) */
                a[4 * p + q] = vfmaq_f32(a[4 * p + q], vmulq_n_f32(o[p], s), vld1q_f32(at + 16 * p + 4 * q));
        }
    }
    float r = dsv3__k_tree64_neon(a);
    /* a scale that became infinite makes every product it meets infinite or NaN, and with them the sum */
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_neon(worst) || !(fabsf(r) < INFINITY)))
        return dsv3__k_dot_fp8_scalar(weights, x, scale64, k);
    return r;
}

static void dsv3__k_row_fp8_neon(float *out, size_t block, size_t group, const void *weights, const float *scale64,
                                 size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[64];
    uint8x16_t worst = vdupq_n_u8(0);
    float32x4_t o[4];
    float scales = 0;
    for (size_t b = 0; b * 64 < k; b++, w += 64) {
        const float s = scale64[b] * DSV3__TWO_120;
        float *to = out + b * block;
        scales = fmaf(s, 0.0f, scales); /* infinity * 0 is NaN */
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k - b * 64);
            w = tail;
        }
        for (size_t q = 0; q < 4; q++) {
            uint8x16_t v = vld1q_u8(w + 16 * q);
            worst = dsv3__k_fp8_worst_neon(worst, v);
            dsv3__k_fp8x16_neon(o, v);
            DSV3__UNROLL
            for (size_t p = 0; p < 4; p++)
                vst1q_f32(to + (4 * p + q) * group, vmulq_n_f32(o[p], s));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_neon(worst) || scales != scales))
        dsv3__k_row_scalar(out, block, group, 4, weights, scale64, k, DSV3_DTYPE_F8_E4M3);
}

/* A code's 7 bits, moved to bits 7 ... 13 of a half, are the f16 of its value * 2^-8. */
static void dsv3__k_nat_fp8_neon(float *out, size_t block, size_t group, const void *weights, const float *scale64,
                                 size_t k)
{
    const int16x8_t keep = vdupq_n_s16((int16_t)0xBF80);
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[64];
    uint8x16_t worst = vdupq_n_u8(0);
    float scales = 0;
    for (size_t b = 0; b * 64 < k; b++, w += 64) {
        const float s = scale64[b] * 256.0f;
        scales = fmaf(s, 0.0f, scales);
        if (DSV3__UNLIKELY(k - b * 64 < 64)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, k - b * 64);
            w = tail;
        }
        for (size_t i = 0; i < 64; i += 16) {
            float *to = out + b * 64 + i;
            uint8x16_t v = vld1q_u8(w + i);
            int8x16_t c = vreinterpretq_s8_u8(v);
            float16x8_t lo = vreinterpretq_f16_s16(vandq_s16(vshll_n_s8(vget_low_s8(c), 7), keep));
            float16x8_t hi = vreinterpretq_f16_s16(vandq_s16(vshll_high_n_s8(c, 7), keep));
            worst = dsv3__k_fp8_worst_neon(worst, v);
            vst1q_f32(to, vmulq_n_f32(vcvt_f32_f16(vget_low_f16(lo)), s));
            vst1q_f32(to + 4, vmulq_n_f32(vcvt_high_f32_f16(lo), s));
            vst1q_f32(to + 8, vmulq_n_f32(vcvt_f32_f16(vget_low_f16(hi)), s));
            vst1q_f32(to + 12, vmulq_n_f32(vcvt_high_f32_f16(hi), s));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_neon(worst) || scales != scales))
        dsv3__k_nat_fp8_scalar(out, block, group, weights, scale64, k);
}

// ---- NEON: pairs -------------------------------------------------------------------------------------------

/* Bytes 1, 0 of words 4q ... 4q + 3 of 64 columns are one chain register's, bytes 3, 2 the next but three's. */
static float dsv3__k_dot_fp8_pairs_neon(const void *weights, const float *x, const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    uint8x16_t worst = vdupq_n_u8(0);
    float32x4_t a[16], o[4];
    (void)scale64;
    DSV3__UNROLL
    for (size_t g = 0; g < 16; g++)
        a[g] = vdupq_n_f32(0);
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 128, x += 128) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, left);
            w = tail;
        }
        DSV3__UNROLL
        for (size_t h = 0; h < 8; h++) {
            const size_t g = h / 4 * 8 + h % 4, before = (h + 7) % 8 / 4 * 8 + (h + 7) % 4;
            uint8x16_t v = vld1q_u8(w + 16 * h);
            DSV3__BEHIND(v, a[before]);
            DSV3__BEHIND(v, a[before + 4]);
            worst = dsv3__k_fp8_worst_neon(worst, v);
            dsv3__k_fp8x16_neon(o, v);
            a[g] = vfmaq_f32(a[g], o[1], vld1q_f32(x + 4 * g));
            a[g + 4] = vfmaq_f32(a[g + 4], o[3], vld1q_f32(x + 4 * g + 16));
            a[g] = vfmaq_f32(a[g], o[0], vld1q_f32(x + 4 * g + 64));
            a[g + 4] = vfmaq_f32(a[g + 4], o[2], vld1q_f32(x + 4 * g + 80));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_neon(worst)))
        return dsv3__bits_float(DSV3__NAN_BITS);
    return dsv3__k_tree64_neon(a);
}

static void dsv3__k_row_fp8_pairs_neon(float *out, size_t block, size_t group, const void *weights,
                                       const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[128];
    uint8x16_t worst = vdupq_n_u8(0);
    float32x4_t o[4];
    float *to = out;
    (void)scale64;
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 128, to += 2 * block) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, left);
            w = tail;
        }
        for (size_t h = 0; h < 8; h++) {
            float *first = to + (h / 4 * 8 + h % 4) * group, *next = first + 4 * group;
            uint8x16_t v = vld1q_u8(w + 16 * h);
            worst = dsv3__k_fp8_worst_neon(worst, v);
            dsv3__k_fp8x16_neon(o, v);
            vst1q_f32(first, vmulq_n_f32(o[1], DSV3__TWO_120));
            vst1q_f32(next, vmulq_n_f32(o[3], DSV3__TWO_120));
            vst1q_f32(first + block, vmulq_n_f32(o[0], DSV3__TWO_120));
            vst1q_f32(next + block, vmulq_n_f32(o[2], DSV3__TWO_120));
        }
    }
    if (DSV3__UNLIKELY(dsv3__k_fp8_nan_neon(worst)))
        dsv3__k_row_pairs_scalar(out, block, group, 4, weights, k, DSV3_DTYPE_F8_E4M3);
}

/* BF16: the second of two columns is the high half of a word, the first the low. */
DSV3__INLINE float32x4_t dsv3__k_second_neon(uint32x4_t v)
{
    return vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xFFFF0000u)));
}

DSV3__INLINE float32x4_t dsv3__k_first_neon(uint32x4_t v)
{
    return vreinterpretq_f32_u32(vshlq_n_u32(v, 16));
}

static float dsv3__k_dot_bf16_pairs_neon(const void *weights, const float *x, const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    float32x4_t a[16];
    (void)scale64;
    DSV3__UNROLL
    for (size_t g = 0; g < 16; g++)
        a[g] = vdupq_n_f32(0);
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 256, x += 128) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * left);
            w = tail;
        }
        DSV3__UNROLL
        for (size_t g = 0; g < 16; g++) {
            uint32x4_t v = vreinterpretq_u32_u8(vld1q_u8(w + 16 * g));
            a[g] = vfmaq_f32(a[g], dsv3__k_second_neon(v), vld1q_f32(x + 4 * g));
            a[g] = vfmaq_f32(a[g], dsv3__k_first_neon(v), vld1q_f32(x + 64 + 4 * g));
        }
    }
    return dsv3__k_tree64_neon(a);
}

static void dsv3__k_row_bf16_pairs_neon(float *out, size_t block, size_t group, const void *weights,
                                        const float *scale64, size_t k)
{
    const uint8_t *w = (const uint8_t *)weights;
    uint8_t tail[256];
    (void)scale64;
    for (size_t left = k; left; left -= dsv3__min(left, 128), w += 256, out += 2 * block) {
        if (DSV3__UNLIKELY(left < 128)) {
            memset(tail, 0, sizeof tail);
            memcpy(tail, w, 2 * left);
            w = tail;
        }
        for (size_t g = 0; g < 16; g++) {
            uint32x4_t v = vreinterpretq_u32_u8(vld1q_u8(w + 16 * g));
            vst1q_f32(out + g * group, dsv3__k_second_neon(v));
            vst1q_f32(out + g * group + block, dsv3__k_first_neon(v));
        }
    }
}

/* dsv3__k_flush, 4 at once. */
DSV3__INLINE float32x4_t dsv3__k_flush_neon(float32x4_t v)
{
    uint32x4_t tiny = vcltq_f32(vabsq_f32(v), vdupq_n_f32(DSV3__MIN_NORMAL));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), tiny));
}

/* bf16(v), as f32; no NaN but the quiet ones of the arithmetic. */
DSV3__INLINE float32x4_t dsv3__k_bf16_neon(float32x4_t v)
{
    uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    bits = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    return vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xFFFF0000u)));
}

static void dsv3__k_round_pairs_neon(float *out, size_t block, size_t group, const float *x, size_t x_block,
                                     size_t x_group, const float *scale64, float up, size_t n)
{
    for (size_t g = 0; g < 16; g++)
        for (size_t b = 0; b < n / 64; b++) {
            float32x4_t v = vmulq_n_f32(vld1q_f32(x + b * x_block + g * x_group), scale64[b / 2 * 2 + g / 8]);
            vst1q_f32(out + b * block + g * group, vmulq_n_f32(dsv3__k_flush_neon(dsv3__k_bf16_neon(v)), up));
        }
}

// ---- NEON: codes of 8 bits -----------------------------------------------------------------------------------

#if defined(__ARM_FEATURE_DOTPROD)
#define DSV3__SDOT(sum, w, x) (sum) = vdotq_s32(sum, w, x)
#else
/* Written as a number: compilers for plain aarch64 refuse the intrinsic, their assemblers the name. %0 is "v7" or so. */
#define DSV3__SDOT(sum, w, x)                                                                                        \
    __asm__(".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, " \
            "26, 27, 28, 29, 30, 31\n\t.equ .Ldsv3_v\\n, \\n\n\t.endr\n\t"                                           \
            ".inst 0x4E809400 | .Ldsv3_%2 << 16 | .Ldsv3_%1 << 5 | .Ldsv3_%0"                                        \
            : "+w"(sum)                                                                                              \
            : "w"(w), "w"(x))
#endif

/* Adds 16 products, with `dot` on a CPU that has SDOT. x is never -128, so a sum of two fits 16 bits. */
DSV3__INLINE int32x4_t dsv3__k_bytes_add_neon(int32x4_t sum, int8x16_t w, int8x16_t x, const bool dot)
{
    if (dot) {
        DSV3__SDOT(sum, w, x);
        return sum;
    }
    int16x8_t two = vmlal_high_s8(vmull_s8(vget_low_s8(w), vget_low_s8(x)), w, x);
    return vpadalq_s16(sum, two);
}

/* 16 columns of W rows of w times X rows of x, into sum[i * X + j]. W and X are constants. */
DSV3__INLINE void dsv3__k_bytes_step_neon(int32x4_t *sum, const int8_t *w, size_t w_stride, const int8_t *const *x,
                                          size_t c, const size_t W, const size_t X, const bool dot)
{
    int8x16_t v[4], row;
    DSV3__UNROLL
    for (size_t j = 0; j < X; j++)
        v[j] = vld1q_s8(x[j] + c);
    DSV3__UNROLL
    for (size_t i = 0; i < W; i++) {
        row = vld1q_s8(w + i * w_stride);
        DSV3__UNROLL
        for (size_t j = 0; j < X; j++)
            sum[i * X + j] = dsv3__k_bytes_add_neon(sum[i * X + j], row, v[j], dot);
    }
}

/* W rows of w times X rows of x, both at most 4. */
DSV3__INLINE void dsv3__k_bytes_wx_neon(float *out, size_t out_stride, const int8_t *w, size_t w_stride,
                                        const float *w_scale, const int8_t *const *x, const float *const *x_scale,
                                        size_t k, size_t group, const size_t W, const size_t X, const bool dot)
{
    const size_t n_groups = (k + group - 1) / group;
    const int8_t *xr[4];
    float y[16];
    DSV3__UNROLL
    for (size_t j = 0; j < X; j++)
        xr[j] = x[j];
    for (size_t i = 0; i < W * X; i++)
        y[i] = 0;
    for (size_t g = 0; g < n_groups; g++) {
        const size_t end = dsv3__min(k, (g + 1) * group);
        int32x4_t sum[16];
        size_t c = g * group;
        DSV3__UNROLL
        for (size_t i = 0; i < W * X; i++)
            sum[i] = vdupq_n_s32(0);
        for (; c + 16 <= end; c += 16)
            dsv3__k_bytes_step_neon(sum, w + c, w_stride, xr, c, W, X, dot);
        if (c < end) {
            int8_t tail[4 * 16];
            memset(tail, 0, sizeof tail);
            for (size_t i = 0; i < W; i++)
                memcpy(tail + 16 * i, w + i * w_stride + c, end - c);
            dsv3__k_bytes_step_neon(sum, tail, 16, xr, c, W, X, dot);
        }
        DSV3__UNROLL
        for (size_t i = 0; i < W * X; i++)
            y[i] = fmaf((float)vaddvq_s32(sum[i]), w_scale[i / X * n_groups + g] * x_scale[i % X][g], y[i]);
    }
    for (size_t i = 0; i < W * X; i++)
        out[i % X * out_stride + i / X] = y[i] == y[i] ? y[i] : dsv3__bits_float(DSV3__NAN_BITS);
}

DSV3__INLINE void dsv3__k_bytes_any_neon(float *out, size_t out_stride, const int8_t *w, size_t w_stride,
                                         const float *w_scale, size_t n_w, const int8_t *const *x,
                                         const float *const *x_scale, size_t n_x, size_t k, size_t group,
                                         const bool dot)
{
    const size_t n_groups = (k + group - 1) / group;
    for (size_t j = 0, t; j < n_x; j += t) {
        t = dsv3__min(n_x - j, 4);
        for (size_t i = 0; i < n_w;) {
            const bool four = t > 1 && i + 4 <= n_w; /* one row of x: one row of w after the other */
            float *to = out + j * out_stride + i;
            const int8_t *from = w + i * w_stride;
            const float *s = w_scale + i * n_groups;
#define DSV3__CASE(W, X) \
    case X: dsv3__k_bytes_wx_neon(to, out_stride, from, w_stride, s, x + j, x_scale + j, k, group, W, X, dot); break
            if (four)
                switch (t) {
                    DSV3__CASE(4, 4);
                    DSV3__CASE(4, 3);
                    DSV3__CASE(4, 2);
                }
            else
                switch (t) {
                    DSV3__CASE(1, 4);
                    DSV3__CASE(1, 3);
                    DSV3__CASE(1, 2);
                    DSV3__CASE(1, 1);
                }
#undef DSV3__CASE
            i += four ? 4 : 1;
        }
    }
}

static void dsv3__k_bytes_neon(float *out, size_t out_stride, const int8_t *w, size_t w_stride, const float *w_scale,
                               size_t n_w, const int8_t *const *x, const float *const *x_scale, size_t n_x, size_t k,
                               size_t group, void *scratch)
{
    (void)scratch;
    dsv3__k_bytes_any_neon(out, out_stride, w, w_stride, w_scale, n_w, x, x_scale, n_x, k, group, false);
}

static void dsv3__k_bytes_neon_dot(float *out, size_t out_stride, const int8_t *w, size_t w_stride,
                                   const float *w_scale, size_t n_w, const int8_t *const *x,
                                   const float *const *x_scale, size_t n_x, size_t k, size_t group, void *scratch)
{
    (void)scratch;
    dsv3__k_bytes_any_neon(out, out_stride, w, w_stride, w_scale, n_w, x, x_scale, n_x, k, group, true);
}

// ---- NEON: tiles ---------------------------------------------------------------------------------------------

/* 24 of the 32 registers accumulate 4 chains of 4 x 6 pairs, 10 loads for 24 multiply-adds. T is a constant. */
DSV3__INLINE void dsv3__k_tile_add_t_neon(float *sum, size_t sum_next, const float *const *w, size_t w_step,
                                          size_t w_next, size_t n_w, const float *const *x, size_t x_step, size_t steps,
                                          bool first, const size_t T)
{
    const float *wr[DSV3__TILE_W], *xr[6];
    DSV3__UNROLL
    for (size_t i = 0; i < DSV3__TILE_W; i++)
        wr[i] = w[i];
    DSV3__UNROLL
    for (size_t j = 0; j < T; j++)
        xr[j] = x[j];
    for (size_t q = 0; q < n_w; q++, sum += sum_next) {
        size_t wi = q * w_next, xi = 0;
        float32x4_t a[DSV3__TILE_W * 6], v[DSV3__TILE_W], row;
        DSV3__UNROLL
        for (size_t i = 0; i < DSV3__TILE_W; i++) {
            DSV3__UNROLL
            for (size_t j = 0; j < T; j++)
                a[i * 6 + j] = first ? vdupq_n_f32(0) : vld1q_f32(sum + (i * 6 + j) * 4);
        }
        for (size_t s = 0; s < steps; s++, wi += w_step, xi += x_step) {
            DSV3__UNROLL
            for (size_t i = 0; i < DSV3__TILE_W; i++)
                v[i] = vld1q_f32(wr[i] + wi);
            DSV3__UNROLL
            for (size_t j = 0; j < T; j++) {
                row = vld1q_f32(xr[j] + xi);
                if (j > 0)
                    DSV3__BEHIND(row, a[j - 1]);
                DSV3__UNROLL
                for (size_t i = 0; i < DSV3__TILE_W; i++)
                    a[i * 6 + j] = vfmaq_f32(a[i * 6 + j], v[i], row);
            }
        }
        DSV3__UNROLL
        for (size_t i = 0; i < DSV3__TILE_W; i++) {
            DSV3__UNROLL
            for (size_t j = 0; j < T; j++)
                vst1q_f32(sum + (i * 6 + j) * 4, a[i * 6 + j]);
        }
    }
}

static void dsv3__k_tile_add_neon(float *sum, size_t sum_next, const float *const *w, size_t w_step, size_t w_next,
                                  size_t n_w, const float *const *x, size_t x_step, size_t steps, size_t n_x,
                                  bool first)
{
    switch (n_x) {
    case 6: dsv3__k_tile_add_t_neon(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 6); break;
    case 5: dsv3__k_tile_add_t_neon(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 5); break;
    case 4: dsv3__k_tile_add_t_neon(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 4); break;
    case 3: dsv3__k_tile_add_t_neon(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 3); break;
    case 2: dsv3__k_tile_add_t_neon(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 2); break;
    default: dsv3__k_tile_add_t_neon(sum, sum_next, w, w_step, w_next, n_w, x, x_step, steps, first, 1);
    }
}

static void dsv3__k_tree_neon(float *out, size_t out_stride, const float *sum, size_t n_w, size_t n_x)
{
    float some[4];
    for (size_t j = 0; j < n_x; j++, sum += 4) {
        float32x4_t s[DSV3__TILE_W], a[16];
        for (size_t i = 0; i < DSV3__TILE_W; i++) {
            DSV3__UNROLL
            for (size_t g = 0; g < 16; g++)
                a[g] = vld1q_f32(sum + g * 96 + i * 24);
            s[i] = dsv3__k_tree4_neon(a);
        }
        /* 4 sums at once: + t[i + 2] of two, then + t[i + 1] of all */
        float32x4_t s01 = vaddq_f32(vcombine_f32(vget_low_f32(s[0]), vget_low_f32(s[1])),
                                    vcombine_f32(vget_high_f32(s[0]), vget_high_f32(s[1])));
        float32x4_t s23 = vaddq_f32(vcombine_f32(vget_low_f32(s[2]), vget_low_f32(s[3])),
                                    vcombine_f32(vget_high_f32(s[2]), vget_high_f32(s[3])));
        float32x4_t r = vpaddq_f32(s01, s23);
        r = vbslq_f32(vceqq_f32(r, r), r, vreinterpretq_f32_u32(vdupq_n_u32(DSV3__NAN_BITS)));
        vst1q_f32(some, r);
        memcpy(out + j * out_stride, some, n_w * sizeof(float));
    }
}

static void dsv3__k_tile_neon(float *out, size_t out_stride, const float *w, size_t w_stride, size_t n_w,
                              const float *x, size_t x_stride, const uint32_t *index, size_t n_x, size_t k)
{
    dsv3__k_tile_rows_in_place(dsv3__k_tile_add_neon, dsv3__k_tree_neon, 4, 6, out, out_stride, w, w_stride, n_w, x,
                               x_stride, index, n_x, k);
}

/* H rows of u by C registers of columns; H and C are constants. */
DSV3__INLINE void dsv3__k_outer_hc_neon(float *u, size_t u_stride, const float *a, size_t a_stride, const float *b,
                                        size_t b_stride, size_t n_t, const size_t H, const size_t C)
{
    float32x4_t acc[16], v[8];
    DSV3__UNROLL
    for (size_t h = 0; h < H; h++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            acc[h * C + c] = vld1q_f32(u + h * u_stride + 4 * c);
    }
    for (size_t t = 0; t < n_t; t++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            v[c] = vld1q_f32(b + t * b_stride + 4 * c);
        DSV3__UNROLL
        for (size_t h = 0; h < H; h++) {
            const float32x4_t s = vdupq_n_f32(a[h * a_stride + t]);
            DSV3__UNROLL
            for (size_t c = 0; c < C; c++)
                acc[h * C + c] = vfmaq_f32(acc[h * C + c], s, v[c]);
        }
    }
    DSV3__UNROLL
    for (size_t h = 0; h < H; h++) {
        DSV3__UNROLL
        for (size_t c = 0; c < C; c++)
            vst1q_f32(u + h * u_stride + 4 * c, acc[h * C + c]);
    }
}

static void dsv3__k_outer_neon(float *u, size_t u_stride, size_t n_h, const float *a, size_t a_stride, const float *b,
                               size_t b_stride, size_t n_t, size_t n_c)
{
    const size_t full = n_c / 4 * 4;
    size_t h = 0;
    for (; h + 4 <= n_h; h += 4) {
        float *to = u + h * u_stride;
        size_t c = 0;
        for (; c + 16 <= full; c += 16)
            dsv3__k_outer_hc_neon(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 4, 4);
        for (; c < full; c += 4)
            dsv3__k_outer_hc_neon(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 4, 1);
    }
    for (; h < n_h; h++) {
        float *to = u + h * u_stride;
        size_t c = 0;
        for (; c + 32 <= full; c += 32)
            dsv3__k_outer_hc_neon(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 1, 8);
        for (; c < full; c += 4)
            dsv3__k_outer_hc_neon(to + c, u_stride, a + h * a_stride, a_stride, b + c, b_stride, n_t, 1, 1);
    }
    if (full < n_c)
        dsv3__k_outer_scalar(u + full, u_stride, n_h, a, a_stride, b + full, b_stride, n_t, n_c - full);
}

/* dsv3__exp, 4 at once. */
DSV3__INLINE float32x4_t dsv3__k_exp4_neon(float32x4_t x)
{
    const float32x4_t one = vdupq_n_f32(1.0f), magic = vdupq_n_f32(DSV3__EXP_MAGIC);
    const int32x4_t bias = vdupq_n_s32(127 - 256);
    const uint32x4_t tiny = vcltq_f32(x, vdupq_n_f32(DSV3__EXP_LOW));
    x = vminq_f32(x, vdupq_n_f32(DSV3__EXP_HIGH)); /* NaN stays */
    x = vmaxq_f32(x, vdupq_n_f32(DSV3__EXP_LOW));
    float32x4_t t = vfmaq_f32(magic, x, vdupq_n_f32(DSV3__EXP_LOG2E)), n = vsubq_f32(t, magic);
    float32x4_t r = vfmaq_f32(x, n, vdupq_n_f32(-DSV3__EXP_LN2_HI));
    r = vfmaq_f32(r, n, vdupq_n_f32(-DSV3__EXP_LN2_LO));
    float32x4_t p = vfmaq_f32(vdupq_n_f32(DSV3__EXP_C5), vdupq_n_f32(DSV3__EXP_C6), r);
    p = vfmaq_f32(vdupq_n_f32(DSV3__EXP_C4), p, r);
    p = vfmaq_f32(vdupq_n_f32(DSV3__EXP_C3), p, r);
    p = vfmaq_f32(vdupq_n_f32(DSV3__EXP_C2), p, r);
    p = vfmaq_f32(one, p, r);
    p = vfmaq_f32(one, p, r);
    int32x4_t biased = vsubq_s32(vreinterpretq_s32_f32(t), vdupq_n_s32(0x4B400000 - 512));
    int32x4_t half = vshrq_n_s32(biased, 1), rest = vsubq_s32(biased, half); /* biased is positive */
    p = vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
    p = vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), tiny));
}

static float dsv3__k_exp_sum_neon(float *x, size_t n, float max)
{
    const float32x4_t m = vdupq_n_f32(max);
    float t[16];
    float32x4_t s[4];
    size_t i = 0;
    DSV3__UNROLL
    for (size_t q = 0; q < 4; q++)
        s[q] = vdupq_n_f32(0);
    for (; i + 16 <= n; i += 16) {
        DSV3__UNROLL
        for (size_t q = 0; q < 4; q++) {
            float32x4_t e = dsv3__k_exp4_neon(vsubq_f32(vld1q_f32(x + i + 4 * q), m));
            vst1q_f32(x + i + 4 * q, e);
            s[q] = vaddq_f32(s[q], e);
        }
    }
    DSV3__UNROLL
    for (size_t q = 0; q < 4; q++)
        vst1q_f32(t + 4 * q, s[q]);
    for (; i < n; i++) {
        x[i] = dsv3__exp(x[i] - max);
        t[i % 16] += x[i];
    }
    return dsv3__k_tree16(t);
}

static void dsv3__k_swiglu_neon(float *out, const float *gate, const float *up, size_t n)
{
    const float32x4_t one = vdupq_n_f32(1.0f);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t g = vld1q_f32(gate + i), e = dsv3__k_exp4_neon(vnegq_f32(g));
        vst1q_f32(out + i, dsv3__k_flush_neon(vmulq_f32(vdivq_f32(g, vaddq_f32(one, e)), vld1q_f32(up + i))));
    }
    dsv3__k_swiglu_scalar(out + i, gate + i, up + i, n - i);
}
#endif // DSV3__NEON

// ---- The tables ------------------------------------------------------------------------------------------

/* Where x in pairs is floats, a block of 128 is two blocks like all others. */
#define dsv3__k_tile_add_pairs_scalar dsv3__k_tile_add_scalar
#define dsv3__k_tile_add_pairs_avx2   dsv3__k_tile_add_avx2
#define dsv3__k_tile_add_pairs_avx512 dsv3__k_tile_add_avx512
#define dsv3__k_tile_add_pairs_neon   dsv3__k_tile_add_neon
/* Rounding to codes is memory's business with 8 lanes already. */
#define dsv3__k_to_bytes_avx_vnni    dsv3__k_to_bytes_avx2
#define dsv3__k_to_bytes_avx512_vnni dsv3__k_to_bytes_avx2
#define dsv3__k_to_bytes_neon        dsv3__k_to_bytes_scalar

#define DSV3__KERN_SCALAR(ret, op, args) dsv3__k_##op##_scalar,
static const dsv3__kern dsv3__kern_scalar = {DSV3_ISA_SCALAR, 8, 3, 32, false, 1, DSV3__KERN_OPS(DSV3__KERN_SCALAR)};
#undef DSV3__KERN_SCALAR
#if DSV3__AVX2
#define DSV3__KERN_AVX2(ret, op, args) dsv3__k_##op##_avx2,
static const dsv3__kern dsv3__kern_avx2 = {
    DSV3_ISA_AVX2, 8, 3, 32, false, DSV3__TWO_120, DSV3__KERN_OPS(DSV3__KERN_AVX2)};
#if DSV3__VNNI
#define DSV3__KERN_AVX_VNNI(ret, op, args) dsv3__k_##op##_avx_vnni,
static const dsv3__kern dsv3__kern_avx_vnni = {DSV3_ISA_AVX_VNNI,
                                               8,
                                               3,
                                               32,
                                               false,
                                               DSV3__TWO_120,
                                               DSV3__KERN_COMMON(DSV3__KERN_AVX2) DSV3__KERN_PAIRS(DSV3__KERN_AVX2)
                                                   DSV3__KERN_BYTES(DSV3__KERN_AVX_VNNI)};
#undef DSV3__KERN_AVX_VNNI
#endif
#undef DSV3__KERN_AVX2
#endif
#if DSV3__AVX512
#define DSV3__KERN_AVX512(ret, op, args) dsv3__k_##op##_avx512,
static const dsv3__kern dsv3__kern_avx512 = {
    DSV3_ISA_AVX512, 16, 6, 32, false, DSV3__TWO_120, DSV3__KERN_OPS(DSV3__KERN_AVX512)};
#if DSV3__VNNI
#define DSV3__KERN_AVX512_VNNI(ret, op, args) dsv3__k_##op##_avx512_vnni,
#define DSV3__KERN_AVX512_BF16(ret, op, args) dsv3__k_##op##_avx512_bf16,
static const dsv3__kern dsv3__kern_avx512_vnni = {
    DSV3_ISA_AVX512_VNNI,
    16,
    6,
    32,
    false,
    DSV3__TWO_120,
    DSV3__KERN_COMMON(DSV3__KERN_AVX512) DSV3__KERN_PAIRS(DSV3__KERN_AVX512) DSV3__KERN_BYTES(DSV3__KERN_AVX512_VNNI)};
static const dsv3__kern dsv3__kern_avx512_bf16 = {DSV3_ISA_AVX512_BF16,
                                                  16,
                                                  6,
                                                  32,
                                                  true,
                                                  1,
                                                  DSV3__KERN_COMMON(DSV3__KERN_AVX512)
                                                      DSV3__KERN_PAIRS(DSV3__KERN_AVX512_BF16)
                                                          DSV3__KERN_BYTES(DSV3__KERN_AVX512_VNNI)};
#if DSV3__AMX
#define dsv3__k_to_bytes_avx512_amx          dsv3__k_to_bytes_avx2
#define DSV3__KERN_AVX512_AMX(ret, op, args) dsv3__k_##op##_avx512_amx,
static const dsv3__kern dsv3__kern_avx512_amx = {
    DSV3_ISA_AVX512_AMX,
    16,
    6,
    128,
    false,
    DSV3__TWO_120,
    DSV3__KERN_COMMON(DSV3__KERN_AVX512) DSV3__KERN_PAIRS(DSV3__KERN_AVX512) DSV3__KERN_BYTES(DSV3__KERN_AVX512_AMX)};
#undef DSV3__KERN_AVX512_AMX
#endif
#undef DSV3__KERN_AVX512_VNNI
#undef DSV3__KERN_AVX512_BF16
#endif
#undef DSV3__KERN_AVX512
#endif

#if DSV3__NEON
#define DSV3__KERN_NEON(ret, op, args) dsv3__k_##op##_neon,
static const dsv3__kern dsv3__kern_neon = {
    DSV3_ISA_NEON, 4, 6, 32, false, DSV3__TWO_120, DSV3__KERN_OPS(DSV3__KERN_NEON)};
#define dsv3__k_bytes_neon dsv3__k_bytes_neon_dot /* the one that differs */
static const dsv3__kern dsv3__kern_neon_dot = {
    DSV3_ISA_NEON, 4, 6, 32, false, DSV3__TWO_120, DSV3__KERN_OPS(DSV3__KERN_NEON)};
#undef dsv3__k_bytes_neon
#undef DSV3__KERN_NEON
#endif

/* isa: what dsv3__cpu_resolve gave, never AUTO. */
static const dsv3__kern *dsv3__kern_get(dsv3_isa isa)
{
    switch ((int)isa) {
#if DSV3__NEON
    case DSV3_ISA_NEON: return dsv3__cpu_dotprod() ? &dsv3__kern_neon_dot : &dsv3__kern_neon;
#endif
#if DSV3__AVX2
    case DSV3_ISA_AVX2: return &dsv3__kern_avx2;
#endif
#if DSV3__AVX2 && DSV3__VNNI
    case DSV3_ISA_AVX_VNNI: return &dsv3__kern_avx_vnni;
#endif
#if DSV3__AVX512
    case DSV3_ISA_AVX512: return &dsv3__kern_avx512;
#endif
#if DSV3__AVX512 && DSV3__VNNI
    case DSV3_ISA_AVX512_VNNI: return &dsv3__kern_avx512_vnni;
    case DSV3_ISA_AVX512_BF16: return &dsv3__kern_avx512_bf16;
#endif
#if DSV3__AMX
    case DSV3_ISA_AVX512_AMX: return &dsv3__kern_avx512_amx;
#endif
    default: return &dsv3__kern_scalar;
    }
}

DSV3__INLINE dsv3__dot_fn dsv3__kern_dot(const dsv3__kern *k, dsv3_dtype dtype, bool pairs)
{
    if (pairs)
        return dtype == DSV3_DTYPE_F8_E4M3 ? k->dot_fp8_pairs : k->dot_bf16_pairs;
    return dtype == DSV3_DTYPE_F8_E4M3 ? k->dot_fp8
           : dtype == DSV3_DTYPE_BF16  ? k->dot_bf16
           : dtype == DSV3_DTYPE_F16   ? k->dot_f16
           : dtype == DSV3_DTYPE_I8    ? k->dot_i8
                                       : k->dot_f32;
}

DSV3__INLINE dsv3__row_fn dsv3__kern_row(const dsv3__kern *k, dsv3_dtype dtype, bool pairs)
{
    if (pairs)
        return dtype == DSV3_DTYPE_F8_E4M3 ? k->row_fp8_pairs : k->row_bf16_pairs;
    return dtype == DSV3_DTYPE_F8_E4M3 ? k->row_fp8
           : dtype == DSV3_DTYPE_BF16  ? k->row_bf16
           : dtype == DSV3_DTYPE_F16   ? k->row_f16
           : dtype == DSV3_DTYPE_I8    ? k->row_i8
                                       : k->row_f32;
}
// =============================================================================
// >>mm   Matrix products over quantized tensors: packing, strips of rows, and the public calls on tensors.
//        Needs kern, ten, thr, mem. Everything above a row or a tile is written here, once.
// =============================================================================

/* How products are made: the kernels and the arithmetic. */
typedef struct dsv3__mm_mode {
    const dsv3__kern *k;
    dsv3_compute compute; /* never AUTO */
    bool powers;          /* FP8: scales of activations are powers of two */
} dsv3__mm_mode;

/* What a row of x has to look like, before it meets a weight ("packed"). Always as many floats as dsv3__mm_pad says. */
typedef enum dsv3__form {
    DSV3__FORM_PLAIN, /* columns in order, zeros behind: F32, F16 weights; BF16, I8 where the mode has nothing else */
    DSV3__FORM_QUADS, /* at the positions of F8_E4M3 */
    DSV3__FORM_FP8,   /* the same, but rounded to what E4M3 codes and a scale for each 128 can say */
    DSV3__FORM_PAIRS, /* at the positions of BF16 in pairs, rounded to bf16 */
    DSV3__FORM_PAIRS_FP8, /* at the positions of F8_E4M3 in pairs; dsv3__mm_strip multiplies by the scale and rounds */
    DSV3__FORM_BYTES,     /* int8 codes [ceil64(k)], then a float: their scale, then an int32: 128 times their sum */
    DSV3__FORM_BYTES_128, /* int8 codes, then a float for each 128 of them, then an int32 for each */
    DSV3__FORMS
} dsv3__form;

static dsv3__form dsv3__mm_form(const dsv3__mm_mode *mode, const dsv3_tensor *w)
{
    const uint64_t cols = dsv3__ten_n_cols(w);
    const bool exact = mode->compute == DSV3_COMPUTE_F32;
    switch (w->dtype) {
    case DSV3_DTYPE_F8_E4M3:
        return exact ? DSV3__FORM_QUADS : mode->compute == DSV3_COMPUTE_FP8 ? DSV3__FORM_FP8 : DSV3__FORM_PAIRS_FP8;
    case DSV3_DTYPE_BF16: return exact ? DSV3__FORM_PLAIN : DSV3__FORM_PAIRS;
    case DSV3_DTYPE_I8:
        if (mode->compute != DSV3_COMPUTE_INT8 || cols > 131072)
            return DSV3__FORM_PLAIN;
        return w->block_cols >= cols  ? DSV3__FORM_BYTES
               : w->block_cols == 128 ? DSV3__FORM_BYTES_128
                                      : DSV3__FORM_PLAIN;
    default: return DSV3__FORM_PLAIN;
    }
}

DSV3__INLINE bool dsv3__mm_is_pairs(dsv3__form form)
{
    return form == DSV3__FORM_PAIRS || form == DSV3__FORM_PAIRS_FP8;
}

DSV3__INLINE bool dsv3__mm_is_bytes(dsv3__form form)
{
    return form == DSV3__FORM_BYTES || form == DSV3__FORM_BYTES_128;
}

/* Before k multiplies codes of 8 bits: where it wants tile registers, this process must have them. If the system does not
   lend them, AUTO goes without; a level that was asked for by name is an error. */
static dsv3_result dsv3__mm_permit(const dsv3__kern **k, dsv3_isa wanted, dsv3_error *err)
{
    if ((*k)->isa != DSV3_ISA_AVX512_AMX || dsv3__cpu_lend_tiles())
        return DSV3_OK;
    if (wanted != DSV3_ISA_AUTO)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_CPU,
                          "isa %s: the system does not lend this process tile registers", dsv3_isa_name(wanted));
    *k = dsv3__kern_get(DSV3_ISA_AVX512_VNNI);
    return DSV3_OK;
}

/* Floats from a packed row of k values to the next: whole blocks of 128, and 64 more, so that neighbouring rows (a tile
   reads several in step) do not fall into the same cache sets. */
DSV3__INLINE size_t dsv3__mm_pad(size_t k)
{
    return (k + 127) / 128 * 128 + 64;
}

/* DeepSeek's act_quant, and back: 128 values, or fewer. */
static void dsv3__mm_to_fp8(float *x, size_t n, bool powers)
{
    float max = dsv3__k_max_scalar(x, n), scale = (max < 1e-4f ? 1e-4f : max) / 448.0f;
    if (powers && scale < INFINITY) { /* the next power of two; scale is normal, being 2e-7 or more */
        uint32_t bits = dsv3__float_bits(scale);
        scale = dsv3__bits_float((bits + 0x7FFFFF) & 0xFF800000u);
    }
    for (size_t i = 0; i < n; i++)
        x[i] = dsv3__fp8_value[dsv3__fp8_encode(x[i] / scale)] * scale;
}

/* With more than DSV3__MM_FEW rows of x, a panel of dsv3__mm_rows rows of weights is decoded at a time, DSV3__MM_CHUNK
   columns of it, into registers in the order in which tiles read them: all registers 0 of the panel (16 KB: half of a small
   L1), then its registers 1, and so on. Of every such part, x of at most DSV3__MM_TOKENS rows streams past it from L2. */
#define DSV3__MM_FEW     4
#define DSV3__MM_BYTES   128    /* the most rows of either side that meet at a time as codes of 8 bits */
#define DSV3__MM_CODES   524288 /* as many of them at a time */
#define DSV3__MM_CHUNK   2048
#define DSV3__MM_TOKENS  96
#define DSV3__MM_ROUNDED 196608 /* floats of x rounded at a time */

DSV3__INLINE size_t dsv3__mm_rows(const dsv3__kern *k)
{
    return 128 / k->lanes;
}

/* Rows of x at a time. */
DSV3__INLINE size_t dsv3__mm_tokens(size_t cols)
{
    size_t tokens = DSV3__MM_ROUNDED / dsv3__mm_pad(cols) / 6 * 6;
    return tokens < 6 ? 6 : tokens > DSV3__MM_TOKENS ? DSV3__MM_TOKENS : tokens;
}

/* Blocks of 64 positions of a row. */
DSV3__INLINE size_t dsv3__mm_blocks(size_t cols, bool pairs)
{
    return pairs ? (cols + 127) / 128 * 2 : (cols + 63) / 64;
}

/* How many of them make a chunk: an even number, as equal as can be. */
DSV3__INLINE size_t dsv3__mm_chunk(size_t blocks)
{
    const size_t most = DSV3__MM_CHUNK / 64, chunks = (blocks + most - 1) / most;
    return ((blocks + chunks - 1) / chunks + 1) / 2 * 2;
}

/* Where a packed row keeps register g of block b of a chunk: at row + chunk's first block * 64 + b * block + g * group.
   Rows that meet weights one by one are in order of positions. Rows for tiles (`tiled`) have all of a chunk's registers 0,
   then its registers 1: a tile reads them in that order, and once packed they serve all rows of weights. */
typedef struct dsv3__mm_strides {
    size_t block, group;
} dsv3__mm_strides;

DSV3__INLINE dsv3__mm_strides dsv3__mm_layout(const dsv3__kern *k, size_t chunk_blocks, bool tiled)
{
    dsv3__mm_strides s;
    s.block = tiled ? k->lanes : 64;
    s.group = tiled ? chunk_blocks * k->lanes : k->lanes;
    return s;
}

/* Register 0 of block b, counted from the row; *group: from there to the next register. */
DSV3__INLINE size_t dsv3__mm_offset(const dsv3__kern *k, size_t b, size_t blocks, bool tiled, size_t *group)
{
    const size_t chunk = dsv3__mm_chunk(blocks), b0 = b / chunk * chunk;
    const dsv3__mm_strides s = dsv3__mm_layout(k, dsv3__min(blocks - b0, chunk), tiled);
    *group = s.group;
    return b0 * 64 + (b - b0) * s.block;
}

/* 128 columns to their positions (>>kern). */
static void dsv3__mm_place(float *placed, const float *v, dsv3__form form)
{
    if (form == DSV3__FORM_QUADS || form == DSV3__FORM_FP8) {
        for (size_t p = 0; p < 8; p++)
            for (size_t i = 0; i < 16; i++)
                placed[16 * p + i] = v[p / 4 * 64 + 4 * i + p % 4];
    } else if (dsv3__mm_is_pairs(form)) {
        const dsv3_dtype dtype = form == DSV3__FORM_PAIRS ? DSV3_DTYPE_BF16 : DSV3_DTYPE_F8_E4M3;
        for (size_t r = 0; r < 4; r++) {
            const size_t first = dsv3__k_pair_column(64 + 16 * r, dtype), next = form == DSV3__FORM_PAIRS ? 2 : 4;
            for (size_t i = 0; i < 16; i++) {
                placed[16 * r + i] = v[first + next * i + 1];
                placed[64 + 16 * r + i] = v[first + next * i];
            }
        }
    } else {
        memcpy(placed, v, 128 * sizeof(float));
    }
}

/* row takes the form of k values. row: room for dsv3__mm_pad(k); values and row do not overlap. */
static void dsv3__mm_pack(const dsv3__mm_mode *mode, float *row, const float *values, size_t k, dsv3__form form,
                          bool tiled)
{
    const bool pairs = dsv3__mm_is_pairs(form);
    const size_t blocks = dsv3__mm_blocks(k, pairs);
    if (dsv3__mm_is_bytes(form)) {
        const size_t group = form == DSV3__FORM_BYTES ? k : 128, padded = (k + 63) / 64 * 64;
        int8_t *codes = (int8_t *)(void *)row;
        const size_t n_groups = (k + group - 1) / group;
        for (size_t g = 0; g < n_groups; g++) {
            int32_t sum;
            float scale =
                mode->k->to_bytes(codes + g * group, values + g * group, dsv3__min(k - g * group, group), &sum);
            sum *= 128;
            memcpy(codes + padded + g * sizeof scale, &scale, sizeof scale);
            memcpy(codes + padded + (n_groups + g) * sizeof scale, &sum, sizeof sum);
        }
        memset(codes + k, 0, padded - k);
        return;
    }
    for (size_t c = 0; c < k; c += 128) {
        float v[128], placed[128];
        const size_t n = dsv3__min(k - c, 128);
        memcpy(v, values + c, n * sizeof(float));
        memset(v + n, 0, (128 - n) * sizeof(float));
        if (form == DSV3__FORM_FP8)
            dsv3__mm_to_fp8(v, n, mode->powers);
        for (size_t i = 0; i < 128 && pairs; i++) /* a NaN of any kind becomes the one that rounding keeps */
            v[i] = v[i] == v[i] ? v[i] : dsv3__bits_float(DSV3__NAN_BITS);
        for (size_t i = 0; i < 128 && form == DSV3__FORM_PAIRS; i++)
            v[i] = dsv3__k_flush(dsv3__bf16_decode(dsv3__bf16_encode(v[i])));
        dsv3__mm_place(placed, v, form);
        for (size_t h = 0; h < 2 && c / 64 + h < blocks; h++) {
            size_t group, at = dsv3__mm_offset(mode->k, c / 64 + h, blocks, tiled, &group), lanes = mode->k->lanes;
            for (size_t g = 0; g < 64 / lanes; g++)
                memcpy(row + at + g * group, placed + 64 * h + g * lanes, lanes * sizeof(float));
        }
    }
}

/* Floats of scratch that dsv3__mm_strip wants for weights of at most k columns; 64-aligned is best. Of narrower weights
   more rows of x are taken at a time, so each part is the largest that any width up to k asks for. */
DSV3__INLINE size_t dsv3__mm_panel_floats(size_t k)
{
    const size_t rows = 32; /* dsv3__mm_rows at most */
    const size_t chunk = k < DSV3__MM_CHUNK ? (k + 127) / 128 * 128 : DSV3__MM_CHUNK;
    const size_t decoded = rows * chunk + 16 * 16, sums = rows * DSV3__MM_TOKENS * 64;
    const size_t at_least = 6 * dsv3__mm_pad(k), most = DSV3__MM_TOKENS * dsv3__mm_pad(k);
    const size_t up_to = most < DSV3__MM_ROUNDED ? most : DSV3__MM_ROUNDED;
    const size_t tiles = decoded + sums + (at_least > up_to ? at_least : up_to);
    const size_t few = (DSV3__MM_FEW + 1) * dsv3__mm_pad(k), floats = tiles > few ? tiles : few;
    const size_t codes = 32 * dsv3__mm_pad(k), scales = DSV3__MM_BYTES * ((k + 127) / 128) + 16;
    const size_t bytes = scales + (codes > DSV3__MM_CODES ? codes : DSV3__MM_CODES) / 64 * (64 / sizeof(float) + 1);
    return dsv3__mm_pad((k + 63) / 64) + (floats > bytes ? floats : bytes);
}

/* Rows of w that make a task of good size when there are n rows of x: no result depends on it. */
static size_t dsv3__mm_strip_rows(const dsv3_tensor *w, size_t n)
{
    if (n > 1)
        return 128;
    size_t rows =
        (size_t)(131072 / (dsv3__ten_n_cols(w) * dsv3_dtype_size(w->dtype))); /* microseconds of memory traffic */
    return rows < 4 ? 4 : rows;
}

/* The scales of 64-blocks for the row block of `row`, 1 where there are none, unless they are there already: *have is what
   scale64 holds. */
DSV3__INLINE void dsv3__mm_scales(float *scale64, const dsv3_tensor *w, uint64_t row, size_t blocks, uint64_t *have)
{
    uint64_t want = w->scale ? row / w->block_rows : 0;
    if (dsv3__k_scaled(w->dtype) && want != *have)
        dsv3__ten_scales(scale64, w, row, 0, blocks);
    for (size_t b = 0; !dsv3__k_scaled(w->dtype) && want != *have && b < blocks; b++)
        scale64[b] = 1;
    *have = want;
}

/* A panel: rows [rows] of w from r0 times n <= DSV3__MM_TOKENS rows of x, as tiles want them.
   panel      [64 / lanes][groups of 4 rows][steps][4][lanes], decoded
   sums       [groups of 4 rows, tiles][64 / lanes][4][tile_x][lanes]: chains, which wait here for the next chunk */
static void dsv3__mm_panel(const dsv3__kern *k, float *panel, float *sums, float *scale64, const dsv3_tensor *w,
                           bool pairs, uint64_t r0, size_t rows, const float *const *x, size_t n, float *out,
                           size_t out_stride)
{
    const bool words = pairs && k->pair_words;
    const size_t cols = (size_t)dsv3__ten_n_cols(w), size = dsv3_dtype_size(w->dtype), lanes = k->lanes;
    const size_t blocks = dsv3__mm_blocks(cols, pairs), chunk = dsv3__mm_chunk(blocks);
    const size_t groups = (rows + DSV3__TILE_W - 1) / DSV3__TILE_W;
    const size_t w_step = DSV3__TILE_W * lanes, one = w_step * k->tile_x, all = 64 / lanes * one;
    const dsv3__row_fn decode = dsv3__kern_row(k, w->dtype, pairs);
    const dsv3__tile_add_fn add = pairs ? k->tile_add_pairs : k->tile_add;
    const float *wr[DSV3__TILE_W], *xr[6];
    uint64_t have = UINT64_MAX;
    /* PERF: the rows behind these, in equal parts while these multiply; decoding would wait for memory half of its time. */
    const uint8_t *next = (const uint8_t *)dsv3__ten_row(w, r0 + rows);
    const size_t bytes = r0 + 2 * rows <= dsv3__ten_n_rows(w) ? rows * (size_t)w->row_stride : 0;
    const size_t adds = (blocks + chunk - 1) / chunk * (64 / lanes) * ((n + k->tile_x - 1) / k->tile_x);
    const size_t fetch = (bytes / adds / 64 + 1) * 64;
    size_t fetched = 0;
    for (size_t b0 = 0; b0 < blocks; b0 += chunk) {
        const size_t here = dsv3__min(blocks - b0, chunk), piece = dsv3__min(cols - b0 * 64, here * 64);
        const size_t steps = words ? here / 2 : here; /* of 64 floats, or words of two columns */
        const size_t part =
            groups * steps * w_step + 16; /* all registers g; a line more: not all in the same cache sets */
        for (size_t i = 0; i < groups * DSV3__TILE_W; i++) {
            size_t r = dsv3__min(i, rows - 1); /* rows that are not there repeat the last */
            dsv3__mm_scales(scale64, w, r0 + r, blocks, &have);
            decode(panel + (i / DSV3__TILE_W * steps * DSV3__TILE_W + i % DSV3__TILE_W) * lanes, w_step, part,
                   dsv3__ten_row(w, r0 + r) + b0 * 64 * size, scale64 + b0, piece);
        }
        for (size_t g = 0; g < 64 / lanes; g++) {
            float *sum = sums + g * one;
            for (size_t i = 0; i < DSV3__TILE_W; i++)
                wr[i] = panel + g * part + i * lanes;
            for (size_t j = 0, t; j < n; j += t, sum += groups * all) {
                t = dsv3__k_tile_rows(n - j, k->tile_x);
                for (size_t end = fetched + fetch; fetched < end && fetched < bytes; fetched += 64)
                    DSV3__FETCH(next + fetched);
                for (size_t i = 0; i < t; i++)
                    xr[i] = x[j + i] + b0 * (words ? 32 : 64) + g * steps * lanes;
                add(sum, all, wr, w_step, steps * w_step, groups, xr, lanes, steps, t, b0 == 0);
            }
        }
    }
    for (size_t j = 0, t; j < n; j += t) {
        t = dsv3__k_tile_rows(n - j, k->tile_x);
        for (size_t q = 0; q < groups; q++, sums += all)
            k->tree(out + j * out_stride + q * DSV3__TILE_W, out_stride, sums,
                    dsv3__min(rows - q * DSV3__TILE_W, DSV3__TILE_W), t);
    }
}

/* More than DSV3__MM_FEW rows of x. */
static void dsv3__mm_many(const dsv3__kern *k, float *panel, const dsv3_tensor *w, dsv3__form form, uint64_t r0,
                          uint64_t r1, const float *x, size_t x_stride, const uint32_t *index, size_t n, float *out,
                          size_t out_stride)
{
    const bool pairs = dsv3__mm_is_pairs(form);
    const bool round = form == DSV3__FORM_PAIRS_FP8 || (pairs && k->pair_words);
    const size_t cols = (size_t)dsv3__ten_n_cols(w), pad = dsv3__mm_pad(cols), blocks = dsv3__mm_blocks(cols, pairs);
    const size_t chunk = dsv3__mm_chunk(blocks), tokens = dsv3__mm_tokens(cols), rows = dsv3__mm_rows(k);
    float *scale64 = panel;                                  /* [blocks] */
    float *rounded = panel + dsv3__mm_pad((cols + 63) / 64); /* [tokens, pad(cols)] */
    float *sums = rounded + tokens * pad;                    /* [rows, tokens, 64] */
    float *decoded = sums + rows * tokens * 64;              /* [rows, chunk of columns] */
    const float *xr[DSV3__MM_TOKENS];
    for (size_t j = 0, t; j < n; j += t) {
        t = dsv3__min(n - j, tokens);
        for (uint64_t r = r0, same; r < r1; r = same) { /* to where the scales change */
            same = round && w->scale && w->block_rows - r % w->block_rows < r1 - r
                       ? r + (w->block_rows - r % w->block_rows)
                       : r1;
            uint64_t have = UINT64_MAX;
            if (round)
                dsv3__mm_scales(scale64, w, r, blocks, &have);
            for (size_t i = 0; i < t; i++) {
                xr[i] = x + (index ? index[j + i] : j + i) * x_stride;
                for (size_t b = 0; b < blocks && round; b += chunk) {
                    const size_t here = dsv3__min(blocks - b, chunk);
                    const dsv3__mm_strides at = dsv3__mm_layout(k, here, true);
                    const size_t steps = k->pair_words ? here / 2 : here;
                    k->round_pairs(rounded + i * pad + b * (k->pair_words ? 32 : 64), k->lanes, steps * k->lanes,
                                   xr[i] + b * 64, at.block, at.group, scale64 + b, 1, here * 64);
                }
                xr[i] = round ? rounded + i * pad : xr[i];
            }
            for (uint64_t p = r; p < same; p += rows)
                dsv3__mm_panel(k, decoded, sums, scale64, w, pairs, p, (size_t)(same - p < rows ? same - p : rows), xr,
                               t, out + (size_t)(p - r0) + j * out_stride, out_stride);
        }
    }
}

/* y [pad(cols)] = a packed row as dot products of w want it: in order of positions, rounded if they are pairs. */
static void dsv3__mm_for_dot(const dsv3__kern *k, float *y, const float *x, const float *scale64, float up,
                             size_t blocks, bool round, bool tiled)
{
    const size_t chunk = dsv3__mm_chunk(blocks);
    for (size_t b = 0; b < blocks && !round; b++) {
        size_t group, at = dsv3__mm_offset(k, b, blocks, tiled, &group);
        for (size_t g = 0; g < 64 / k->lanes; g++)
            memcpy(y + b * 64 + g * k->lanes, x + at + g * group, k->lanes * sizeof(float));
    }
    for (size_t b = 0; b < blocks && round; b += chunk) {
        const size_t here = dsv3__min(blocks - b, chunk);
        const dsv3__mm_strides at = dsv3__mm_layout(k, here, tiled);
        k->round_pairs(y + b * (k->pair_words ? 32 : 64), 64, k->lanes, x + b * 64, at.block, at.group, scale64 + b, up,
                       here * 64);
    }
}

/* At most DSV3__MM_FEW rows of x: one row of weights after the other, front to back, the one pattern that runs at memory
   speed; it stays in L1 while each row of x meets it. */
static void dsv3__mm_few(const dsv3__kern *k, float *panel, const dsv3_tensor *w, dsv3__form form, uint64_t r0,
                         uint64_t r1, const float *x, size_t x_stride, const uint32_t *index, size_t n, bool tiled,
                         float *out, size_t out_stride)
{
    const bool pairs = dsv3__mm_is_pairs(form);
    const bool round = form == DSV3__FORM_PAIRS_FP8 || (pairs && k->pair_words);
    const size_t cols = (size_t)dsv3__ten_n_cols(w), pad = dsv3__mm_pad(cols), blocks = dsv3__mm_blocks(cols, pairs);
    const dsv3__dot_fn dot = dsv3__kern_dot(k, w->dtype, pairs);
    const float up = form == DSV3__FORM_PAIRS_FP8 ? k->up : 1;
    float *scale64 = panel;                                 /* [blocks] */
    float *values = panel + dsv3__mm_pad((cols + 63) / 64); /* [pad(cols)] */
    float *ready = values + pad;                            /* [n, pad(cols)], as floats or as words of two */
    const float *rows[DSV3__MM_FEW];
    uint64_t have = UINT64_MAX;
    for (size_t j = 0; j < n; j++)
        rows[j] = x + (index ? index[j] : j) * x_stride;
    for (uint64_t r = r0; r < r1; r++) {
        const uint64_t before = have;
        dsv3__mm_scales(scale64, w, r, blocks, &have);
        const bool make = have != before && (round || (tiled && r == r0));
        for (size_t j = 0; j < n; j++) {
            float *y = ready + j * pad, *result = &out[j * out_stride + (size_t)(r - r0)];
            if (make)
                dsv3__mm_for_dot(k, y, rows[j], scale64, up, blocks, round, tiled);
            *result = dot(dsv3__ten_row(w, r), round || tiled ? y : rows[j], scale64, cols);
            if (up != 1 && DSV3__UNLIKELY(!(fabsf(*result) < INFINITY))) { /* x * up was too large, it may be */
                k->row_fp8_pairs(values, 64, k->lanes, dsv3__ten_row(w, r), NULL, cols);
                dsv3__mm_for_dot(k, y, rows[j], scale64, 1, blocks, true, tiled);
                *result = k->dot_f32(values, y, NULL, blocks * 64);
                have = UINT64_MAX; /* y is to be made again */
            }
        }
    }
}

/* Integer products: rows of w as they lie, against rows of codes. */
static void dsv3__mm_bytes(const dsv3__kern *k, float *panel, const dsv3_tensor *w, dsv3__form form, uint64_t r0,
                           uint64_t r1, const float *x, size_t x_stride, const uint32_t *index, size_t n, float *out,
                           size_t out_stride)
{
    const size_t cols = (size_t)dsv3__ten_n_cols(w), group = form == DSV3__FORM_BYTES ? cols : 128;
    const size_t n_groups = (cols + group - 1) / group, padded = (cols + 63) / 64 * 64;
    const size_t most = k->bytes_rows, fit = DSV3__MM_CODES / padded / 32 * 32;
    const size_t tokens = dsv3__min(fit > 32 ? fit : 32, most);
    float *scratch = panel + (most * n_groups + 15) / 16 * 16;
    const int8_t *codes[DSV3__MM_BYTES];
    const float *x_scale[DSV3__MM_BYTES];
    for (uint64_t r = r0; r < r1; r += most) {
        const size_t rows = (size_t)(r1 - r < most ? r1 - r : most);
        for (size_t i = 0; i < rows; i++) /* [rows, n_groups] */
            for (size_t g = 0; g < n_groups; g++)
                panel[i * n_groups + g] =
                    w->scale ? dsv3__num_get(w->scale, w->scale_dtype, (r + i) / w->block_rows * w->scale_stride + g)
                             : 1;
        for (size_t j = 0, t; j < n; j += t) {
            t = dsv3__min(n - j, tokens);
            for (size_t i = 0; i < t; i++) {
                const float *row = x + (index ? index[j + i] : j + i) * x_stride;
                codes[i] = (const int8_t *)(const void *)row;
                x_scale[i] = row + padded / 4;
            }
            k->bytes(out + (size_t)(r - r0) + j * out_stride, out_stride, (const int8_t *)dsv3__ten_row(w, r),
                     (size_t)w->row_stride, panel, rows, codes, x_scale, t, cols, group, scratch);
        }
    }
}

/* Rows r0 ... r1 - 1 of w against n packed rows of x, on this thread, inside dsv3__fp_enter.
   w          passed dsv3__ten_check with arithmetic; k columns
   panel      [dsv3__mm_panel_floats(k)] scratch
   x          row j: x + j * x_stride, or, with index [n], x + index[j] * x_stride; each of dsv3__mm_form(mode, w)
   tiled      how x is packed; true if n > DSV3__MM_FEW
   out        out[j * out_stride + (r - r0)] = row r of w times row j of x */
static void dsv3__mm_strip(const dsv3__mm_mode *mode, float *panel, const dsv3_tensor *w, uint64_t r0, uint64_t r1,
                           const float *x, size_t x_stride, const uint32_t *index, size_t n, bool tiled, float *out,
                           size_t out_stride)
{
    const dsv3__form form = dsv3__mm_form(mode, w);
    if (dsv3__mm_is_bytes(form)) {
        dsv3__mm_bytes(mode->k, panel, w, form, r0, r1, x, x_stride, index, n, out, out_stride);
        return;
    }
    if (n <= DSV3__MM_FEW) {
        dsv3__mm_few(mode->k, panel, w, form, r0, r1, x, x_stride, index, n, tiled, out, out_stride);
        return;
    }
    dsv3__mm_many(mode->k, panel, w, form, r0, r1, x, x_stride, index, n, out, out_stride);
}

/* out [cols] = the values of one row, columns in order. Inside dsv3__fp_enter. */
static void dsv3__ten_row_values(const dsv3__kern *k, float *out, const dsv3_tensor *t, uint64_t row)
{
    const size_t cols = (size_t)dsv3__ten_n_cols(t), size = dsv3_dtype_size(t->dtype);
    const dsv3__row_fn decode = t->dtype == DSV3_DTYPE_F8_E4M3 ? k->nat_fp8 : dsv3__kern_row(k, t->dtype, false);
    const uint8_t *data = dsv3__ten_row(t, row);
    float scale64[16], tail[64];
    for (size_t c = 0; c < cols;) {
        size_t piece = dsv3__min(cols - c, 64 * DSV3__COUNT(scale64));
        if (piece > 64)
            piece -= piece % 64; /* the ragged end is a piece of its own: decoders write whole blocks */
        dsv3__ten_scales(scale64, t, row, c / 64, (piece + 63) / 64);
        if (piece % 64) {
            decode(tail, 64, k->lanes, data + c * size, scale64, piece);
            memcpy(out + c, tail, piece * sizeof(float));
        } else {
            decode(out + c, 64, k->lanes, data + c * size, scale64, piece);
        }
        c += piece;
    }
}

// ---- Public calls on tensors -----------------------------------------------------------------------------

static dsv3_result dsv3__ten_quantize(dsv3_tensor *tensor, void *data, size_t data_size, float *scale,
                                      size_t scale_count, dsv3_dtype dtype, const float *values, uint64_t n_rows,
                                      uint64_t n_cols, dsv3_error *err)
{
    const bool i8 = dtype == DSV3_DTYPE_I8;
    uint8_t *bytes = (uint8_t *)data;
    uint64_t count, need;
    if (!dsv3__ten_dtype_ok(dtype))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT,
                          "quantize: dtype %s, expected F32, F16, BF16, F8_E4M3 or I8", dsv3_dtype_name(dtype));
    if (!data || !values || n_rows == 0 || n_cols == 0)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "quantize: %s",
                          !data         ? "data is NULL"
                          : !values     ? "values is NULL"
                          : n_rows == 0 ? "n_rows is 0"
                                        : "n_cols is 0");
    if (!dsv3__mul(n_rows, n_cols, &count) || !dsv3__mul(count, 4, &need) || need > SIZE_MAX / 2 ||
        (i8 && n_cols > UINT32_MAX))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "quantize: %u rows of %u columns are too many", n_rows,
                          n_cols);
    need = count * dsv3_dtype_size(dtype);
    if (data_size < need)
        return DSV3__FAIL(err, DSV3_ERROR_BUFFER_TOO_SMALL, "quantize: data_size %u, needed %u", (uint64_t)data_size,
                          need);

    tensor->data = data;
    tensor->dtype = dtype;
    tensor->rank = 2;
    tensor->shape[0] = n_rows;
    tensor->shape[1] = n_cols;
    tensor->row_stride = n_cols * dsv3_dtype_size(dtype);
    if (!i8 && dtype != DSV3_DTYPE_F8_E4M3) {
        for (uint64_t i = 0; i < count; i++) {
            if (dtype == DSV3_DTYPE_F32) {
                memcpy(bytes + 4 * i, values + i, 4);
            } else {
                uint16_t h = dtype == DSV3_DTYPE_F16 ? dsv3__f16_encode(values[i]) : dsv3__bf16_encode(values[i]);
                memcpy(bytes + 2 * i, &h, 2);
            }
        }
        return DSV3_OK;
    }

    const float largest = i8 ? 127.0f : 448.0f;
    tensor->block_rows = i8 ? 1 : 128;
    tensor->block_cols = i8 ? (uint32_t)n_cols : 128;
    const uint64_t rows = tensor->block_rows, cols = tensor->block_cols; /* of a block */
    uint64_t scale_rows = dsv3__ceil_div(n_rows, rows), scale_cols = dsv3__ceil_div(n_cols, cols);
    if (!scale || scale_count < scale_rows * scale_cols)
        return DSV3__FAIL(err, DSV3_ERROR_BUFFER_TOO_SMALL, "quantize: scale_count %u, needed %u",
                          scale ? (uint64_t)scale_count : (uint64_t)0, scale_rows * scale_cols);
    tensor->scale = scale;
    tensor->scale_dtype = DSV3_DTYPE_F32;
    tensor->scale_stride = scale_cols;
    for (uint64_t br = 0; br < scale_rows; br++)
        for (uint64_t bc = 0; bc < scale_cols; bc++) {
            uint64_t r1 = n_rows - br * rows < rows ? n_rows : (br + 1) * rows,
                     c1 = n_cols - bc * cols < cols ? n_cols : (bc + 1) * cols;
            uint32_t max = 0; /* of magnitudes, as bits: infinities and NaN are above all others */
            for (uint64_t r = br * rows; r < r1; r++) {
                const float *v = values + (size_t)(r * n_cols);
                for (uint64_t c = bc * cols; c < c1; c++) {
                    uint32_t magnitude = dsv3__float_bits(v[c]) & 0x7FFFFFFF;
                    max = magnitude > max ? magnitude : max;
                }
            }
            for (uint64_t r = br * rows; max >= 0x7F800000 && r < r1; r++)
                for (uint64_t c = bc * cols; c < c1; c++)
                    if (!(fabsf(values[r * n_cols + c]) < INFINITY))
                        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "quantize: values[%u, %u] is not finite", r,
                                          c);
            float s = dsv3__bits_float(max) / largest;
            if (s == 0) /* all zero, or too small for any scale */
                s = 1;
            scale[br * scale_cols + bc] = s;
            for (uint64_t r = br * rows; r < r1; r++) {
                const float *v = values + (size_t)(r * n_cols);
                uint8_t *to = bytes + (size_t)(r * n_cols);
                if (i8)
                    for (uint64_t c = bc * cols; c < c1; c++)
                        to[c] = (uint8_t)dsv3__i8_encode(v[c] / s);
                else
                    for (uint64_t c = bc * cols; c < c1; c++)
                        to[c] = dsv3__fp8_encode(v[c] / s);
            }
        }
    return DSV3_OK;
}

DSV3_API const char *dsv3_compute_name(dsv3_compute mode)
{
    switch (mode) {
    case DSV3_COMPUTE_AUTO: return "auto";
    case DSV3_COMPUTE_F32: return "f32";
    case DSV3_COMPUTE_BF16: return "bf16";
    case DSV3_COMPUTE_FP8: return "fp8";
    case DSV3_COMPUTE_INT8: return "int8";
    default: return "?";
    }
}

DSV3_API dsv3_result dsv3_quantize(dsv3_tensor *tensor, void *data, size_t data_size, float *scale, size_t scale_count,
                                   dsv3_dtype dtype, const float *values, uint64_t n_rows, uint64_t n_cols,
                                   dsv3_error *error)
{
    dsv3_error local;
    dsv3_error *err = error ? error : &local;
    dsv3__err_clear(err);
    if (!tensor)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "quantize: tensor is NULL");
    memset(tensor, 0, sizeof *tensor);
    uint32_t saved = dsv3__fp_enter();
    dsv3_result result =
        dsv3__ten_quantize(tensor, data, data_size, scale, scale_count, dtype, values, n_rows, n_cols, err);
    dsv3__fp_leave(saved);
    if (result)
        memset(tensor, 0, sizeof *tensor);
    return result;
}

DSV3_API dsv3_result dsv3_dequantize(float *out, const dsv3_tensor *tensor, uint64_t first_row, uint64_t n_rows,
                                     dsv3_error *error)
{
    dsv3_error local;
    dsv3_error *err = error ? error : &local;
    dsv3__err_clear(err);
    DSV3__TRY(dsv3__ten_check(tensor, "tensor", true, err));
    uint64_t rows = dsv3__ten_n_rows(tensor), cols = dsv3__ten_n_cols(tensor);
    if (first_row > rows || n_rows > rows - first_row)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dequantize: rows %u + %u of a tensor of %u", first_row,
                          n_rows, rows);
    if (!out && n_rows)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dequantize: out is NULL");
    const dsv3__kern *k = dsv3__kern_get(dsv3__cpu_best());
    uint32_t saved = dsv3__fp_enter();
    for (uint64_t r = 0; r < n_rows; r++)
        dsv3__ten_row_values(k, out + (size_t)(r * cols), tensor, first_row + r);
    dsv3__fp_leave(saved);
    return DSV3_OK;
}

#define DSV3__MM_BATCH 512 /* rows of x packed at a time */

/* One call of dsv3_matmul as its tasks see it: a strip of rows each. */
typedef struct dsv3__mm_call {
    dsv3__mm_mode mode;
    const dsv3_tensor *w;
    float *panel; /* [n_threads, panel_floats] */
    size_t panel_floats;
    const float *x; /* [n, x_stride] packed */
    size_t x_stride, n;
    bool tiled;
    float *out;     /* [n, rows] */
    uint64_t strip; /* rows of a task */
} dsv3__mm_call;

static void dsv3__mm_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__mm_call *c = (const dsv3__mm_call *)ctx;
    uint64_t rows = dsv3__ten_n_rows(c->w), r0 = task * c->strip, r1 = rows - r0 < c->strip ? rows : r0 + c->strip;
    dsv3__mm_strip(&c->mode, c->panel + worker * c->panel_floats, c->w, r0, r1, c->x, c->x_stride, NULL, c->n, c->tiled,
                   c->out + (size_t)r0, (size_t)rows);
}

static dsv3_result dsv3__mm_resolve(dsv3_compute *compute, dsv3_compute wanted, dsv3_error *err)
{
    if ((int)wanted < 0 || wanted > DSV3_COMPUTE_INT8)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "opts.compute: %d is not an arithmetic mode",
                          (int64_t)wanted);
    *compute = wanted == DSV3_COMPUTE_AUTO ? DSV3_COMPUTE_INT8 : wanted;
    return DSV3_OK;
}

static dsv3_result dsv3__mm_matmul(float *out, const float *in, size_t n, const dsv3_tensor *w,
                                   const dsv3_matmul_opts *opts, dsv3__pool *pool, dsv3__mem *mem, dsv3_error *err)
{
    const size_t cols = (size_t)dsv3__ten_n_cols(w);
    const uint64_t rows = dsv3__ten_n_rows(w);
    dsv3__mm_call c;
    dsv3_isa isa = DSV3_ISA_SCALAR;
    uint64_t x_floats, panel_floats, floats, bytes, total;
    void *scratch;
    DSV3__TRY(dsv3__cpu_resolve(&isa, opts->isa, err));
    c.mode.k = dsv3__kern_get(isa);
    DSV3__TRY(dsv3__mm_resolve(&c.mode.compute, opts->compute, err));
    c.mode.powers = w->scale_dtype == DSV3_DTYPE_F8_E8M0;
    c.w = w;
    const dsv3__form form = dsv3__mm_form(&c.mode, w);
    if (dsv3__mm_is_bytes(form))
        DSV3__TRY(dsv3__mm_permit(&c.mode.k, opts->isa, err));
    c.n = dsv3__min(n, DSV3__MM_BATCH);
    c.x_stride = dsv3__mm_pad(cols);
    c.panel_floats = dsv3__mm_panel_floats(cols);
    if (!dsv3__mul(n, rows, &total) || !dsv3__mul(total, 4, &total) || total > SIZE_MAX / 2 ||
        !dsv3__mul(n, cols, &total) || !dsv3__mul(total, 4, &total) || total > SIZE_MAX / 2)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "matmul: %u rows are too many", (uint64_t)n);
    if (!dsv3__mul(c.n, c.x_stride, &x_floats) || !dsv3__mul(pool->n_threads, c.panel_floats, &panel_floats) ||
        !dsv3__add(x_floats, panel_floats, &floats) || !dsv3__mul(floats, sizeof(float), &bytes))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "matmul: %u threads are too many",
                          (uint64_t)pool->n_threads);
    DSV3__TRY(dsv3__mem_alloc(mem, &scratch, bytes, "matmul scratch", err));
    c.panel = (float *)scratch;
    c.x = c.panel + (size_t)panel_floats;
    for (size_t j = 0; j < n; j += c.n) {
        c.n = dsv3__min(n - j, DSV3__MM_BATCH);
        c.tiled = c.n > DSV3__MM_FEW;
        c.out = out + j * (size_t)rows;
        c.strip = dsv3__mm_strip_rows(w, c.n);
        if (rows / c.strip > UINT32_MAX / 2)
            c.strip = rows / (UINT32_MAX / 2) + 1;
        uint32_t saved = dsv3__fp_enter();
        for (size_t i = 0; i < c.n; i++)
            dsv3__mm_pack(&c.mode, c.panel + (size_t)panel_floats + i * c.x_stride, in + (j + i) * cols, cols, form,
                          c.tiled);
        dsv3__fp_leave(saved);
        dsv3__pool_run(pool, (uint32_t)dsv3__ceil_div(rows, c.strip), dsv3__mm_task, &c);
    }
    dsv3__mem_free(mem, scratch);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_matmul(float *out, const float *in, size_t n, const dsv3_tensor *weight,
                                 const dsv3_matmul_opts *opts, dsv3_error *error)
{
    dsv3_error local;
    dsv3_error *err = error ? error : &local;
    dsv3_matmul_opts defaults;
    dsv3__mem mem;
    dsv3__pool pool;
    dsv3__err_clear(err);
    memset(&defaults, 0, sizeof defaults);
    if (!opts)
        opts = &defaults;
    if (opts->struct_size && opts->struct_size != sizeof *opts)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "matmul: opts.struct_size %u, expected %u",
                          (uint64_t)opts->struct_size, (uint64_t)sizeof *opts);
    if (!opts->allocator.alloc_fn != !opts->allocator.free_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "matmul: opts.allocator wants both functions or neither");
    if (!opts->executor.run_fn && (opts->executor.n_threads || opts->executor.user))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "matmul: opts.executor has no run_fn");
    DSV3__TRY(dsv3__ten_check(weight, "weight", true, err));
    if (n && (!in || !out))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "matmul: %s is NULL", in ? "out" : "in");
    dsv3__mem_init(&mem, &opts->allocator, 0);
    DSV3__TRY(dsv3__pool_open(&pool, &mem, 1, &opts->executor, err));
    dsv3_result result = n ? dsv3__mm_matmul(out, in, n, weight, opts, &pool, &mem, err) : DSV3_OK;
    dsv3__pool_close(&pool, &mem);
    return result;
}
// =============================================================================
// >>json   A bounded pull reader: no tree, no recursion, nothing allocated.
//          Errors stick: after one, every call says "no more", and the caller looks once, at the end.
// =============================================================================

/* Reading an object:
     dsv3__json_open(&j, '{');
     while (dsv3__json_key(&j, &key)) {
         if (dsv3__json_is(key, "vocab_size")) dsv3__json_uint(&j, &v);
         else dsv3__json_skip(&j);                     // every value must be consumed
     }
     an array:  dsv3__json_open(&j, '['); while (dsv3__json_item(&j)) ... one value ...
     DSV3__TRY(dsv3__json_end(&j));                    // nothing but white space may follow */

#define DSV3__JSON_DEPTH 64

typedef struct dsv3__json {
    const char *begin, *p, *end;
    const char *file; /* for messages */
    uint64_t at;      /* where the text begins in it */
    dsv3_error *err;
    dsv3_result result; /* the first error */
    int depth;
    char close[DSV3__JSON_DEPTH]; /* what ends each open object or array */
    bool first[DSV3__JSON_DEPTH]; /* nothing read in it yet */
} dsv3__json;

/* A string between its quotes, escapes still in it. */
typedef struct dsv3__json_str {
    const char *p;
    size_t n;
    bool escaped;
} dsv3__json_str;

static void dsv3__json_init(dsv3__json *j, const char *text, size_t len, const char *file, dsv3_error *err)
{
    j->begin = j->p = text;
    j->end = text + len;
    j->file = file;
    j->at = 0;
    j->err = err;
    j->result = DSV3_OK;
    j->depth = 0;
}

/* Records the first error, and makes all later reads stop. Always false. */
static bool dsv3__json_fail(dsv3__json *j, const char *what)
{
    if (j->result == DSV3_OK)
        j->result = DSV3__FAIL_AT(j->err, DSV3_ERROR_JSON, j->at + (uint64_t)(j->p - j->begin), "%s: byte %u: %s",
                                  j->file, j->at + (uint64_t)(j->p - j->begin), what);
    j->p = j->end;
    return false;
}

/* For errors of meaning found by a consumer: as DSV3__FAIL, and sticks. */
#define DSV3__JSON_FAIL(j, code, ...) \
    ((j)->result ? (j)->result : ((j)->result = DSV3__FAIL((j)->err, (code), __VA_ARGS__)))

DSV3__INLINE void dsv3__json_space(dsv3__json *j)
{
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\n' || *j->p == '\r' || *j->p == '\t'))
        j->p++;
}

/* First byte of the next value, 0 at the end or after an error. */
DSV3__INLINE char dsv3__json_peek(dsv3__json *j)
{
    if (j->result)
        return 0;
    dsv3__json_space(j);
    return j->p < j->end ? *j->p : 0;
}

static bool dsv3__json_open(dsv3__json *j, char kind)
{
    if (dsv3__json_peek(j) != kind)
        return dsv3__json_fail(j, kind == '{' ? "expected an object" : "expected an array");
    if (j->depth == DSV3__JSON_DEPTH)
        return dsv3__json_fail(j, "nested deeper than 64");
    j->p++;
    j->close[j->depth] = kind == '{' ? '}' : ']';
    j->first[j->depth++] = true;
    return true;
}

/* Is there another element in the innermost object or array? Takes the comma, or the closing bracket. */
DSV3__INLINE bool dsv3__json_item(dsv3__json *j)
{
    char c = dsv3__json_peek(j);
    if (j->result)
        return false;
    DSV3_ASSERT(j->depth > 0);
    if (c == j->close[j->depth - 1]) {
        j->p++;
        j->depth--;
        return false;
    }
    if (j->first[j->depth - 1]) {
        j->first[j->depth - 1] = false;
        return c ? true : dsv3__json_fail(j, "unexpected end");
    }
    if (c != ',')
        return dsv3__json_fail(j, c ? "expected a comma or a closing bracket" : "unexpected end");
    j->p++;
    c = dsv3__json_peek(j);
    if (c == 0 || c == ']' || c == '}')
        return dsv3__json_fail(j, "a value is missing behind the comma");
    return true;
}

/* Length of the well-formed UTF-8 sequence at p (1 ... 4), 0 if there is none. Shortest forms only, no surrogates. */
static size_t dsv3__utf8_length(const char *text, const char *end)
{
    const unsigned char *p = (const unsigned char *)text;
    size_t left = (size_t)(end - text);
    if (left == 0)
        return 0;
    if (p[0] < 0x80)
        return 1;
    if (p[0] >= 0xC2 && p[0] <= 0xDF)
        return left >= 2 && (p[1] & 0xC0) == 0x80 ? 2 : 0;
    if ((p[0] & 0xF0) == 0xE0) {
        unsigned lo = p[0] == 0xE0 ? 0xA0 : 0x80, hi = p[0] == 0xED ? 0x9F : 0xBF;
        return left >= 3 && p[1] >= lo && p[1] <= hi && (p[2] & 0xC0) == 0x80 ? 3 : 0;
    }
    if (p[0] >= 0xF0 && p[0] <= 0xF4) {
        unsigned lo = p[0] == 0xF0 ? 0x90 : 0x80, hi = p[0] == 0xF4 ? 0x8F : 0xBF;
        return left >= 4 && p[1] >= lo && p[1] <= hi && (p[2] & 0xC0) == 0x80 && (p[3] & 0xC0) == 0x80 ? 4 : 0;
    }
    return 0;
}

static int dsv3__json_hex4(const char *p)
{
    int v = 0;
    for (int i = 0; i < 4; i++) {
        int c = (unsigned char)p[i], lower = c | 0x20;
        int digit = c >= '0' && c <= '9' ? c - '0' : lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
        if (digit < 0)
            return -1;
        v = v * 16 + digit;
    }
    return v;
}

static bool dsv3__json_string(dsv3__json *j, dsv3__json_str *s)
{
    s->p = "";
    s->n = 0;
    s->escaped = false;
    if (dsv3__json_peek(j) != '"')
        return dsv3__json_fail(j, "expected a string");
    const char *p = j->p + 1;
    for (;;) {
        if (p >= j->end)
            return j->p = p, dsv3__json_fail(j, "unexpected end in a string");
        unsigned char c = (unsigned char)*p;
        if (c == '"')
            break;
        if (c == '\\') {
            size_t n = j->end - p >= 2 && p[1] == 'u' ? 6 : 2;
            if ((size_t)(j->end - p) < n)
                return j->p = j->end, dsv3__json_fail(j, "unexpected end in a string");
            if (p[1] == 0 || !strchr("\"\\/bfnrtu", p[1]) || (n == 6 && dsv3__json_hex4(p + 2) < 0))
                return j->p = p, dsv3__json_fail(j, "a bad escape");
            s->escaped = true;
            p += n;
        } else if (c < 0x20) {
            return j->p = p, dsv3__json_fail(j, "a control character in a string");
        } else if (c < 0x80) {
            p++;
        } else {
            size_t n = dsv3__utf8_length(p, j->end);
            if (!n)
                return j->p = p, dsv3__json_fail(j, "not UTF-8");
            p += n;
        }
    }
    s->p = j->p + 1;
    s->n = (size_t)(p - s->p);
    j->p = p + 1;
    return true;
}

static size_t dsv3__utf8_put(char *out, uint32_t c)
{
    if (c < 0x80)
        return out[0] = (char)c, 1;
    if (c < 0x800)
        return out[0] = (char)(0xC0 | c >> 6), out[1] = (char)(0x80 | (c & 63)), 2;
    if (c < 0x10000)
        return out[0] = (char)(0xE0 | c >> 12), out[1] = (char)(0x80 | (c >> 6 & 63)), out[2] = (char)(0x80 | (c & 63)),
               3;
    return out[0] = (char)(0xF0 | c >> 18), out[1] = (char)(0x80 | (c >> 12 & 63)),
           out[2] = (char)(0x80 | (c >> 6 & 63)), out[3] = (char)(0x80 | (c & 63)), 4;
}

/* Decodes the escapes of s into out [s.n] (never longer than the source). False: half a surrogate pair. */
static bool dsv3__json_decode(dsv3__json_str s, char *out, size_t *n)
{
    const char *p = s.p, *end = s.p + s.n;
    char *o = out;
    while (p < end) {
        if (*p != '\\') {
            *o++ = *p++;
            continue;
        }
        char c = *++p; /* in bounds: dsv3__json_string has seen each escape whole */
        p++;
        const char *from = "\"\\/bfnrt", *to = "\"\\/\b\f\n\r\t", *at = c ? strchr(from, c) : NULL;
        if (at) {
            *o++ = to[at - from];
            continue;
        }
        int hi = c == 'u' && end - p >= 4 ? dsv3__json_hex4(p) : -1;
        if (hi < 0 || (hi >= 0xDC00 && hi <= 0xDFFF))
            return false;
        p += 4;
        uint32_t code = (uint32_t)hi;
        if (hi >= 0xD800 && hi <= 0xDBFF) {
            int lo = end - p >= 6 && p[0] == '\\' && p[1] == 'u' ? dsv3__json_hex4(p + 2) : -1;
            if (lo < 0xDC00 || lo > 0xDFFF)
                return false;
            code = 0x10000u + (((uint32_t)hi - 0xD800u) << 10) + ((uint32_t)lo - 0xDC00u);
            p += 6;
        }
        o += dsv3__utf8_put(o, code);
    }
    *n = (size_t)(o - out);
    return true;
}

/* Copies a decoded string, terminated, into out [size]. Too long, a bad escape, or a NUL in it: the error sticks. */
static bool dsv3__json_copy(dsv3__json *j, char *out, size_t size)
{
    dsv3__json_str s;
    size_t n;
    out[0] = 0;
    if (!dsv3__json_string(j, &s))
        return false;
    if (s.n >= size)
        return dsv3__json_fail(j, "this string is too long");
    if (!dsv3__json_decode(s, out, &n) || memchr(out, 0, n))
        return out[0] = 0, dsv3__json_fail(j, "a bad escape in the string before");
    out[n] = 0;
    return true;
}

/* s, escapes decoded, equals the literal (at most 255 bytes)? */
static bool dsv3__json_is(dsv3__json_str s, const char *literal)
{
    char decoded[6 * 255];
    size_t n = s.n;
    if (!s.escaped)
        return n == strlen(literal) && memcmp(s.p, literal, n) == 0;
    return n <= sizeof decoded && dsv3__json_decode(s, decoded, &n) && n == strlen(literal) &&
           memcmp(decoded, literal, n) == 0;
}

static bool dsv3__json_key(dsv3__json *j, dsv3__json_str *key)
{
    if (!dsv3__json_item(j) || !dsv3__json_string(j, key))
        return false;
    if (dsv3__json_peek(j) != ':')
        return dsv3__json_fail(j, "expected a colon");
    j->p++;
    return true;
}

/* A number: its value as a double, and, if written as an integer that fits 63 bits, exactly.
   Up to 15 digits and exponents to 22 the double is the correctly rounded one; otherwise within a few units, and
   infinite where it is too large. */
static bool dsv3__json_number(dsv3__json *j, double *value, int64_t *integer, bool *is_integer)
{
    uint64_t digits = 0;
    int exponent = 0;
    bool negative = false, any = false, exact = true; /* exact: no digit has been left out yet */
    *value = 0;
    *integer = 0;
    *is_integer = false;
    char c = dsv3__json_peek(j);
    if (c == 'N' || c == 'I')
        return dsv3__json_fail(j, "NaN and Infinity are not numbers here");
    if (c == '-') {
        negative = true;
        j->p++;
    }
    const char *start = j->p;
    for (; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++) {
        uint64_t digit = (uint64_t)(*j->p - '0');
        any = true;
        if (exact && digits <= ((uint64_t)INT64_MAX - digit) / 10)
            digits = digits * 10 + digit;
        else
            exponent++, exact = false;
    }
    if (!any || (*start == '0' && j->p - start > 1))
        return dsv3__json_fail(j, "expected a number");
    *is_integer = exact;
    if (j->p < j->end && *j->p == '.') {
        *is_integer = false;
        for (any = false, j->p++; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++) {
            uint64_t digit = (uint64_t)(*j->p - '0');
            any = true;
            if (exact && digits <= ((uint64_t)INT64_MAX - digit) / 10)
                digits = digits * 10 + digit, exponent--;
            else
                exact = false;
        }
        if (!any)
            return dsv3__json_fail(j, "digits are missing behind the point");
    }
    if (j->p < j->end && (*j->p == 'e' || *j->p == 'E')) {
        int e = 0;
        bool minus = false;
        *is_integer = false;
        j->p++;
        if (j->p < j->end && (*j->p == '-' || *j->p == '+'))
            minus = *j->p++ == '-';
        for (any = false; j->p < j->end && *j->p >= '0' && *j->p <= '9'; j->p++) {
            any = true;
            if (e < 10000)
                e = e * 10 + (*j->p - '0');
        }
        if (!any)
            return dsv3__json_fail(j, "digits are missing in the exponent");
        exponent += minus ? -e : e;
    }
    static const double powers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                    1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    double v = (double)digits;
    while (digits && exponent > 0 && v <= 1.7976931348623157e308) {
        int step = exponent < 22 ? exponent : 22;
        v *= powers[step];
        exponent -= step;
    }
    while (digits && exponent < 0 && v > 0) {
        int step = -exponent < 22 ? -exponent : 22;
        v /= powers[step];
        exponent += step;
    }
    *value = negative ? -v : v;
    if (*is_integer)
        *integer = negative ? -(int64_t)digits : (int64_t)digits;
    return true;
}

/* A non-negative integer, exactly. "4096.0" counts as one, "1e3" too. */
static bool dsv3__json_uint(dsv3__json *j, uint64_t *value)
{
    double v;
    int64_t integer;
    bool is_integer;
    *value = 0;
    if (!dsv3__json_number(j, &v, &integer, &is_integer))
        return false;
    if (!is_integer && v >= 0 && v < 9007199254740992.0 && v == (double)(int64_t)v)
        is_integer = true, integer = (int64_t)v;
    if (!is_integer || integer < 0)
        return dsv3__json_fail(j, "expected a non-negative integer");
    *value = (uint64_t)integer;
    return true;
}

static bool dsv3__json_word(dsv3__json *j, const char *word)
{
    size_t n = strlen(word);
    if ((size_t)(j->end - j->p) < n || memcmp(j->p, word, n) != 0)
        return dsv3__json_fail(j, "expected a value");
    j->p += n;
    return true;
}

static bool dsv3__json_bool(dsv3__json *j, bool *value)
{
    char c = dsv3__json_peek(j);
    *value = c == 't';
    if (c != 't' && c != 'f')
        return dsv3__json_fail(j, "expected true or false");
    return dsv3__json_word(j, c == 't' ? "true" : "false");
}

/* Takes a null if there is one. */
static bool dsv3__json_null(dsv3__json *j)
{
    return dsv3__json_peek(j) == 'n' && dsv3__json_word(j, "null");
}

/* One value of any kind, however deep (to 64). Numbers that are no numbers (NaN, 1e400) pass: nobody reads them. */
static bool dsv3__json_skip(dsv3__json *j)
{
    int depth = j->depth;
    bool in = false; /* inside something this call opened */
    do {
        dsv3__json_str s;
        double v;
        int64_t i;
        bool b;
        if (in) {
            if (j->close[j->depth - 1] == '}' ? !dsv3__json_key(j, &s) : !dsv3__json_item(j)) {
                in = j->depth > depth;
                continue;
            }
        }
        switch (dsv3__json_peek(j)) {
        case '{': dsv3__json_open(j, '{'); break;
        case '[': dsv3__json_open(j, '['); break;
        case '"': dsv3__json_string(j, &s); break;
        case 't':
        case 'f': dsv3__json_bool(j, &b); break;
        case 'n': dsv3__json_null(j); break;
        case 'N': dsv3__json_word(j, "NaN"); break;
        case 'I': dsv3__json_word(j, "Infinity"); break;
        case '-':
            if (j->end - j->p > 1 && j->p[1] == 'I') {
                dsv3__json_word(j, "-Infinity");
                break;
            }
            dsv3__json_number(j, &v, &i, &b);
            break;
        default: dsv3__json_number(j, &v, &i, &b);
        }
        in = j->depth > depth;
    } while (in && !j->result);
    return !j->result;
}

static dsv3_result dsv3__json_end(dsv3__json *j)
{
    dsv3__json_space(j);
    if (!j->result && j->p < j->end)
        dsv3__json_fail(j, "something stands behind the end");
    return j->result;
}
// =============================================================================
// >>st   Files of a checkpoint: safetensors headers, the shard index, name -> place.
//        In: a reader. Out: a table of tensors whose bytes lie inside their files. Every number that comes from a file is
//        checked here, once; nothing below looks at a length again.
// =============================================================================

#define DSV3__ST_HEADER_MAX    100000000u /* the format's own limit */
#define DSV3__ST_INDEX_MAX     (256u << 20)
#define DSV3__ST_CONFIG_MAX    (16u << 20)
#define DSV3__ST_TOKENIZER_MAX (64u << 20)
#define DSV3__ST_SHARDS_MAX    4096u
#define DSV3__ST_NAME_MAX      512u

/* A whole small file in memory. */
typedef struct dsv3__blob {
    dsv3__str text;
    dsv3_file file;
    bool open;
    void *owned; /* read into memory, if the reader does not have it there */
} dsv3__blob;

typedef struct dsv3__st_shard {
    dsv3_file file;
    bool open;
    const char *name; /* terminated */
} dsv3__st_shard;

typedef struct dsv3__st_tensor {
    const char *name;      /* terminated */
    const uint8_t *data;   /* NULL until read, where the reader does not map */
    uint64_t offset;       /* in the file */
    uint64_t size;         /* bytes */
    const uint64_t *shape; /* [rank] */
    uint32_t shard;
    uint16_t rank;
    uint16_t dtype; /* dsv3_dtype */
} dsv3__st_tensor;

/* Growing storage for names and shapes: chunks, so that pointers stay good. */
typedef struct dsv3__st_chunk {
    struct dsv3__st_chunk *next;
    uint64_t used, size;
} dsv3__st_chunk;

typedef struct dsv3__st {
    dsv3__mem *mem;
    dsv3_reader reader;
    const dsv3_progress *progress;
    uint64_t progress_done, progress_total;
    dsv3__st_shard *shards; /* [n_shards] */
    uint64_t n_shards, cap_shards;
    uint16_t shard_slots[2 * DSV3__ST_SHARDS_MAX]; /* open addressing by name: shard + 1 */
    uint64_t seed;                                 /* of the name tables */
    dsv3__st_tensor *tensors;                      /* [n_tensors], in the order of the files */
    uint64_t n_tensors, cap_tensors;
    uint32_t *slots; /* [n_slots] open addressing: tensor + 1, or 0 */
    uint64_t n_slots;
    dsv3__st_chunk *chunks;
    uint64_t n_unlisted;  /* tensors in shards that the index does not name: ignored */
    uint32_t i8_block[2]; /* rows and columns of I8 weights that share a scale, as config.json says; 0: it does not */
    uint64_t data_bytes;
} dsv3__st;

static dsv3_result dsv3__blob_open(dsv3__blob *blob, const dsv3_reader *reader, dsv3__mem *mem, const char *name,
                                   uint64_t limit, dsv3_error *err)
{
    memset(blob, 0, sizeof *blob);
    blob->text.p = "";
    dsv3_result r = reader->open_fn(reader->user, name, &blob->file);
    if (r == DSV3_ERROR_FILE_NOT_FOUND)
        return DSV3__FAIL(err, r, "%s: not found", name);
    if (r)
        return DSV3__FAIL(err, r < 0 ? r : DSV3_ERROR_IO, "%s: cannot be opened as a regular file", name);
    blob->open = true;
    if (blob->file.size > limit || blob->file.size > SIZE_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_IO, "%s: %u bytes, more than the %u expected at most", name, blob->file.size,
                          limit);
    blob->text.n = (size_t)blob->file.size;
    if (blob->file.data) {
        blob->text.p = (const char *)blob->file.data;
        return DSV3_OK;
    }
    if (!blob->text.n)
        return DSV3_OK;
    if (!reader->read_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s: the reader gives neither data nor read_fn", name);
    DSV3__TRY(dsv3__mem_alloc(mem, &blob->owned, blob->text.n, name, err));
    blob->text.p = (const char *)blob->owned;
    if (reader->read_fn(reader->user, &blob->file, 0, blob->owned, blob->text.n))
        return DSV3__FAIL(err, DSV3_ERROR_IO, "%s: reading %u bytes failed", name, (uint64_t)blob->text.n);
    return DSV3_OK;
}

static void dsv3__blob_close(dsv3__blob *blob, const dsv3_reader *reader, dsv3__mem *mem)
{
    dsv3__mem_free(mem, blob->owned);
    if (blob->open && reader->close_fn)
        reader->close_fn(reader->user, &blob->file);
    memset(blob, 0, sizeof *blob);
}

/* 8-aligned bytes that live as long as the table. */
static dsv3_result dsv3__st_keep(dsv3__st *st, void **out, uint64_t size, dsv3_error *err)
{
    size = (size + 7) & ~(uint64_t)7;
    if (!st->chunks || st->chunks->size - st->chunks->used < size) {
        void *block;
        uint64_t payload = size > 65536 - 64 ? size : 65536 - 64;
        DSV3__TRY(dsv3__mem_alloc(st->mem, &block, payload + sizeof(dsv3__st_chunk), "names of tensors", err));
        dsv3__st_chunk *chunk = (dsv3__st_chunk *)block;
        chunk->next = st->chunks;
        chunk->used = 0;
        chunk->size = payload;
        st->chunks = chunk;
    }
    *out = (uint8_t *)(st->chunks + 1) + st->chunks->used;
    st->chunks->used += size;
    return DSV3_OK;
}

/* Decodes and terminates a name. NUL inside, a bad escape or too many bytes: an error. */
static dsv3_result dsv3__st_name(char *out /* [DSV3__ST_NAME_MAX + 1] */, dsv3__json_str s, const char *file,
                                 dsv3_error *err)
{
    size_t n;
    if (s.n > DSV3__ST_NAME_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: a name of %u bytes, more than %u", file, (uint64_t)s.n,
                          (uint64_t)DSV3__ST_NAME_MAX);
    if (!dsv3__json_decode(s, out, &n) || memchr(out, 0, n))
        return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: a name with a bad escape or a NUL in it", file);
    out[n] = 0;
    return DSV3_OK;
}

static dsv3_result dsv3__st_keep_name(dsv3__st *st, const char **out, const char *name, dsv3_error *err)
{
    void *p;
    size_t n = strlen(name) + 1;
    DSV3__TRY(dsv3__st_keep(st, &p, n, err));
    memcpy(p, name, n);
    *out = (const char *)p;
    return DSV3_OK;
}

/* A shard's name is data from the index: one plain path component, nothing else (CVE-2026-75104 and its like). */
static bool dsv3__st_name_is_safe(const char *name)
{
    size_t n = strlen(name);
    static const char suffix[] = ".safetensors";
    if (n <= sizeof suffix - 1 || n > 255 || strcmp(name + n - (sizeof suffix - 1), suffix) != 0)
        return false;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)name[i] < 0x20 || name[i] == 0x7f || strchr("/\\:", name[i]))
            return false;
    return name[0] != '.';
}

static const dsv3__st_tensor *dsv3__st_find(const dsv3__st *st, const char *name)
{
    if (!st->n_slots)
        return NULL;
    for (uint64_t i = dsv3__hash(st->seed, name, strlen(name)) & (st->n_slots - 1);; i = (i + 1) & (st->n_slots - 1)) {
        if (!st->slots[i])
            return NULL;
        if (strcmp(st->tensors[st->slots[i] - 1].name, name) == 0)
            return &st->tensors[st->slots[i] - 1];
    }
}

/* Enters tensor `index` into the table, which is kept at most half full. False: the name is there already. */
static dsv3_result dsv3__st_enter(dsv3__st *st, uint32_t index, bool *fresh, dsv3_error *err)
{
    if ((uint64_t)index * 2 >= st->n_slots) {
        void *slots;
        uint64_t n = st->n_slots ? st->n_slots * 2 : 256;
        DSV3__TRY(dsv3__mem_alloc(st->mem, &slots, n * sizeof(uint32_t), "table of tensors", err));
        memset(slots, 0, (size_t)n * sizeof(uint32_t));
        dsv3__mem_free(st->mem, st->slots);
        st->slots = (uint32_t *)slots;
        st->n_slots = n;
        for (uint32_t t = 0; t < index; t++) {
            const char *name = st->tensors[t].name;
            uint64_t i = dsv3__hash(st->seed, name, strlen(name)) & (n - 1);
            while (st->slots[i])
                i = (i + 1) & (n - 1);
            st->slots[i] = t + 1;
        }
    }
    const char *name = st->tensors[index].name;
    uint64_t i = dsv3__hash(st->seed, name, strlen(name)) & (st->n_slots - 1);
    for (; st->slots[i]; i = (i + 1) & (st->n_slots - 1)) {
        if (strcmp(st->tensors[st->slots[i] - 1].name, name) == 0) {
            *fresh = false;
            return DSV3_OK;
        }
    }
    st->slots[i] = index + 1;
    *fresh = true;
    return DSV3_OK;
}

static const struct {
    const char *name;
    dsv3_dtype dtype;
} dsv3__st_dtypes[] = {
    {"F32", DSV3_DTYPE_F32},         {"F16", DSV3_DTYPE_F16},         {"BF16", DSV3_DTYPE_BF16},
    {"F8_E4M3", DSV3_DTYPE_F8_E4M3}, {"F8_E8M0", DSV3_DTYPE_F8_E8M0}, {"F8_E5M2", DSV3_DTYPE_F8_E5M2},
    {"I8", DSV3_DTYPE_I8},           {"U8", DSV3_DTYPE_U8},           {"I16", DSV3_DTYPE_I16},
    {"U16", DSV3_DTYPE_U16},         {"I32", DSV3_DTYPE_I32},         {"U32", DSV3_DTYPE_U32},
    {"I64", DSV3_DTYPE_I64},         {"U64", DSV3_DTYPE_U64},         {"F64", DSV3_DTYPE_F64},
    {"BOOL", DSV3_DTYPE_BOOL},
};

/* begin and end of each tensor of one file, to see that they tile it */
typedef struct dsv3__st_span {
    uint64_t begin, end;
} dsv3__st_span;

static bool dsv3__st_span_less(dsv3__st_span a, dsv3__st_span b)
{
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
}

/* Heapsort: no allocation, no worst case. Files as published are in order already and skip it. */
static void dsv3__st_span_sort(dsv3__st_span *a, size_t n)
{
    for (size_t start = n / 2, end = n; end > 1;) {
        if (start > 0) {
            start--;
        } else {
            dsv3__st_span last = a[--end];
            a[end] = a[0];
            a[0] = last;
        }
        for (size_t i = start, child; (child = 2 * i + 1) < end; i = child) {
            if (child + 1 < end && dsv3__st_span_less(a[child], a[child + 1]))
                child++;
            if (!dsv3__st_span_less(a[i], a[child]))
                break;
            dsv3__st_span swap = a[i];
            a[i] = a[child];
            a[child] = swap;
        }
    }
}

/* One entry of a header: {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]} -> t and span. */
static dsv3_result dsv3__st_read_entry(dsv3__st *st, dsv3__json *j, dsv3__st_tensor *t, dsv3__st_span *span,
                                       const char *file, dsv3_error *err)
{
    dsv3__json_str key, dtype;
    uint64_t shape[DSV3_MAX_RANK], count = 1, extent = 1, bytes, offsets[2] = {0, 0};
    uint32_t rank = 0, n_offsets = 0;
    bool has_dtype = false, has_shape = false, has_offsets = false;
    void *kept;
    dtype.p = "", dtype.n = 0, dtype.escaped = false;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        if (dsv3__json_is(key, "dtype") && !has_dtype) {
            has_dtype = dsv3__json_string(j, &dtype);
        } else if (dsv3__json_is(key, "shape") && !has_shape) {
            has_shape = dsv3__json_open(j, '[');
            while (dsv3__json_item(j)) {
                double v;
                int64_t dim;
                bool is_integer;
                if (rank == DSV3_MAX_RANK)
                    return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS, "%s: %s: more than 8 dimensions", file, t->name);
                if (dsv3__json_number(j, &v, &dim, &is_integer) && (!is_integer || dim < 0))
                    return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS,
                                           "%s: %s: shape holds %f, expected a non-negative integer", file, t->name, v);
                shape[rank++] = (uint64_t)dim;
            }
        } else if (dsv3__json_is(key, "data_offsets") && !has_offsets) {
            has_offsets = dsv3__json_open(j, '[');
            while (dsv3__json_item(j)) {
                double v;
                int64_t at;
                bool is_integer;
                if (n_offsets == 2)
                    return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS,
                                           "%s: %s: data_offsets: expected 2 numbers, found more", file, t->name);
                if (dsv3__json_number(j, &v, &at, &is_integer) && (!is_integer || at < 0))
                    return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS,
                                           "%s: %s: data_offsets hold %f, expected a non-negative integer", file,
                                           t->name, v);
                offsets[n_offsets++] = (uint64_t)at;
            }
        } else if (dsv3__json_is(key, "dtype") || dsv3__json_is(key, "shape") || dsv3__json_is(key, "data_offsets")) {
            return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS, "%s: %s: a key stands twice", file, t->name);
        } else {
            dsv3__json_skip(j);
        }
    }
    if (j->result)
        return j->result;
    if (!has_dtype || !has_shape || n_offsets != 2)
        return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS, "%s: %s: expected dtype, shape and two data_offsets", file,
                               t->name);
    t->dtype = DSV3_DTYPE_UNKNOWN;
    for (size_t i = 0; i < DSV3__COUNT(dsv3__st_dtypes); i++)
        if (dsv3__json_is(dtype, dsv3__st_dtypes[i].name))
            t->dtype = (uint16_t)dsv3__st_dtypes[i].dtype;
    for (uint32_t i = 0; i < rank; i++) /* a 0 among them must not hide an overflow of the others */
        if (!dsv3__mul(count, shape[i], &count) || !dsv3__mul(extent, shape[i] ? shape[i] : 1, &extent) ||
            extent > UINT64_MAX / 8)
            return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS, "%s: %s: shape %D is larger than any file", file, t->name,
                                   shape, rank);
    if (offsets[0] > offsets[1])
        return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS, "%s: %s: data_offsets end at %u before they begin at %u",
                               file, t->name, offsets[1], offsets[0]);
    if (t->dtype != DSV3_DTYPE_UNKNOWN) { /* of a type we do not know only the place can be checked */
        if (!dsv3__mul(count, dsv3_dtype_size((dsv3_dtype)t->dtype), &bytes) || bytes != offsets[1] - offsets[0])
            return DSV3__JSON_FAIL(j, DSV3_ERROR_SAFETENSORS, "%s: %s: %s %D takes %u bytes, data_offsets give %u",
                                   file, t->name, dsv3_dtype_name((dsv3_dtype)t->dtype), shape, rank, bytes,
                                   offsets[1] - offsets[0]);
    }
    DSV3__TRY(dsv3__st_keep(st, &kept, rank * sizeof(uint64_t), err));
    if (rank)
        memcpy(kept, shape, rank * sizeof(uint64_t));
    t->shape = (const uint64_t *)kept;
    t->rank = (uint16_t)rank;
    t->size = offsets[1] - offsets[0];
    span->begin = offsets[0];
    span->end = offsets[1];
    return DSV3_OK;
}

/* "__metadata__": strings, which nobody needs. */
static bool dsv3__st_skip_metadata(dsv3__json *j)
{
    dsv3__json_str key, value;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key))
        dsv3__json_string(j, &value);
    return !j->result;
}

/* Where an index says a tensor is. */
typedef struct dsv3__st_place {
    const char *name;
    uint32_t shard;
    bool found;
} dsv3__st_place;

typedef struct dsv3__st_map {
    dsv3__st_place *places; /* [n] */
    uint64_t n, cap;
    uint32_t *slots; /* [n_slots] open addressing: place + 1 */
    uint64_t n_slots;
    uint64_t seed;
} dsv3__st_map;

static dsv3__st_place *dsv3__st_map_find(const dsv3__st_map *map, const char *name, uint64_t *slot)
{
    uint64_t i = dsv3__hash(map->seed, name, strlen(name)) & (map->n_slots - 1);
    for (; map->slots[i]; i = (i + 1) & (map->n_slots - 1))
        if (strcmp(map->places[map->slots[i] - 1].name, name) == 0)
            return *slot = i, &map->places[map->slots[i] - 1];
    return *slot = i, (dsv3__st_place *)NULL;
}

/* The header of one shard: its tensors that `map` (NULL: no index) places there enter the table. */
static dsv3_result dsv3__st_read_header(dsv3__st *st, uint32_t shard, dsv3__json *j, uint64_t data_at,
                                        dsv3__st_span **spans, uint64_t *cap_spans, dsv3__st_map *map, dsv3_error *err)
{
    const char *file = st->shards[shard].name;
    uint64_t n_spans = 0, data_size = st->shards[shard].file.size - data_at;
    dsv3__json_str key;
    bool metadata = false, ordered = true;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        dsv3__st_tensor t;
        char name[DSV3__ST_NAME_MAX + 1];
        void *array;
        memset(&t, 0, sizeof t);
        if (dsv3__json_is(key, "__metadata__")) {
            if (metadata)
                return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: __metadata__ stands twice", file);
            metadata = true;
            if (!dsv3__st_skip_metadata(j))
                return j->result;
            continue;
        }
        DSV3__TRY(dsv3__st_name(name, key, file, err));
        t.name = name; /* until it is kept */
        array = *spans;
        dsv3_result grown =
            dsv3__mem_grow(st->mem, &array, cap_spans, n_spans, n_spans + 1, sizeof(dsv3__st_span), "offsets", err);
        *spans = (dsv3__st_span *)array;
        DSV3__TRY(grown);
        dsv3__st_span *span = *spans + n_spans++;
        DSV3__TRY(dsv3__st_read_entry(st, j, &t, span, file, err));
        ordered = ordered && (n_spans == 1 || !dsv3__st_span_less(*span, span[-1]));
        if (span->end > data_size)
            return DSV3__FAIL(err, DSV3_ERROR_TRUNCATED, "%s: %s ends at byte %u of the data, the file holds %u", file,
                              t.name, span->end, data_size);
        if (map) {
            uint64_t slot;
            dsv3__st_place *place = dsv3__st_map_find(map, t.name, &slot);
            if (!place || place->shard != shard) {
                st->n_unlisted++;
                continue;
            }
            if (place->found)
                return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: %s stands twice", file, t.name);
            place->found = true;
            t.name = place->name;
        } else {
            DSV3__TRY(dsv3__st_keep_name(st, &t.name, name, err));
        }
        t.shard = shard;
        t.offset = data_at + span->begin;
        if (st->shards[shard].file.data)
            t.data = (const uint8_t *)st->shards[shard].file.data + t.offset;
        if (st->n_tensors >= 0x7fffffffu)
            return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: too many tensors", file);
        array = st->tensors;
        grown = dsv3__mem_grow(st->mem, &array, &st->cap_tensors, st->n_tensors, st->n_tensors + 1, sizeof t, "tensors",
                               err);
        st->tensors = (dsv3__st_tensor *)array;
        DSV3__TRY(grown);
        st->tensors[st->n_tensors] = t;
        bool fresh;
        DSV3__TRY(dsv3__st_enter(st, (uint32_t)st->n_tensors, &fresh, err));
        if (!fresh)
            return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: %s stands twice", file, t.name);
        st->n_tensors++;
        st->data_bytes += t.size;
    }
    DSV3__TRY(dsv3__json_end(j));
    if (!ordered)
        dsv3__st_span_sort(*spans, (size_t)n_spans);
    uint64_t at = 0; /* the tensors must tile the data: no hole, no overlap, nothing behind them */
    for (uint64_t i = 0; i < n_spans; at = (*spans)[i++].end)
        if ((*spans)[i].begin != at)
            return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS,
                              "%s: a tensor begins at byte %u of the data, expected %u: they %s", file,
                              (*spans)[i].begin, at, (*spans)[i].begin < at ? "overlap" : "leave a hole");
    if (at != data_size)
        return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: the tensors take %u bytes, the file holds %u", file, at,
                          data_size);
    return DSV3_OK;
}

/* total is 0, unknown, while headers are read: how much there is to read stands in them. */
static dsv3_result dsv3__st_report(dsv3__st *st, uint64_t bytes, dsv3_error *err)
{
    st->progress_done += bytes;
    if (st->progress->fn && !st->progress->fn(st->progress->user, st->progress_done, st->progress_total))
        return DSV3__FAIL(err, DSV3_ERROR_CANCELLED, "opening was cancelled by the progress callback");
    return DSV3_OK;
}

static dsv3_result dsv3__st_open_shard(dsv3__st *st, uint32_t shard, dsv3__st_map *map, dsv3_error *err)
{
    dsv3__st_shard *s = &st->shards[shard];
    dsv3_result r = st->reader.open_fn(st->reader.user, s->name, &s->file);
    if (r == DSV3_ERROR_FILE_NOT_FOUND)
        return DSV3__FAIL(err, r, "%s: not found%s", s->name, map ? ", but model.safetensors.index.json names it" : "");
    if (r)
        return DSV3__FAIL(err, r < 0 ? r : DSV3_ERROR_IO, "%s: cannot be opened as a regular file", s->name);
    s->open = true;
    uint8_t first[8];
    if (s->file.size < 8)
        return DSV3__FAIL(err, DSV3_ERROR_TRUNCATED, "%s: %u bytes, expected 8 of header length at least", s->name,
                          s->file.size);
    if (s->file.data)
        memcpy(first, s->file.data, 8);
    else if (!st->reader.read_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s: the reader gives neither data nor read_fn", s->name);
    else if (st->reader.read_fn(st->reader.user, &s->file, 0, first, 8))
        return DSV3__FAIL(err, DSV3_ERROR_IO, "%s: reading failed", s->name);
    uint64_t n = dsv3__load64(first);
    if (n > DSV3__ST_HEADER_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: header of %u bytes, the format allows %u", s->name, n,
                          (uint64_t)DSV3__ST_HEADER_MAX);
    if (n > s->file.size - 8)
        return DSV3__FAIL(err, DSV3_ERROR_TRUNCATED, "%s: header of %u bytes, the file holds %u behind its length",
                          s->name, n, s->file.size - 8);
    void *owned = NULL;
    const char *header = NULL;
    if (s->file.data) {
        header = (const char *)s->file.data + 8;
    } else {
        DSV3__TRY(dsv3__mem_alloc(st->mem, &owned, n, s->name, err));
        header = (const char *)owned;
        if (st->reader.read_fn(st->reader.user, &s->file, 8, owned, (size_t)n)) {
            dsv3__mem_free(st->mem, owned);
            return DSV3__FAIL(err, DSV3_ERROR_IO, "%s: reading %u bytes of header failed", s->name, n);
        }
    }
    dsv3__json j;
    dsv3__st_span *spans = NULL;
    uint64_t cap_spans = 0;
    dsv3__json_init(&j, header, (size_t)n, s->name, err);
    j.at = 8;
    r = n && header[0] == '{'
            ? dsv3__st_read_header(st, shard, &j, 8 + n, &spans, &cap_spans, map, err)
            : DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: the header does not begin with {", s->name);
    dsv3__mem_free(st->mem, spans);
    dsv3__mem_free(st->mem, owned);
    return r ? r : dsv3__st_report(st, n, err);
}

static dsv3_result dsv3__st_add_shard(dsv3__st *st, const char *name, uint32_t *shard, dsv3_error *err)
{
    const uint64_t n_slots = DSV3__COUNT(st->shard_slots);
    uint64_t slot = dsv3__hash(st->seed, name, strlen(name)) % n_slots;
    for (; st->shard_slots[slot]; slot = (slot + 1) % n_slots) {
        *shard = st->shard_slots[slot] - 1u;
        if (strcmp(st->shards[*shard].name, name) == 0)
            return DSV3_OK;
    }
    if (st->n_shards == DSV3__ST_SHARDS_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "model.safetensors.index.json: more than %u shards",
                          (uint64_t)DSV3__ST_SHARDS_MAX);
    void *array = st->shards;
    dsv3_result grown = dsv3__mem_grow(st->mem, &array, &st->cap_shards, st->n_shards, st->n_shards + 1,
                                       sizeof(dsv3__st_shard), "shards", err);
    st->shards = (dsv3__st_shard *)array;
    DSV3__TRY(grown);
    *shard = (uint32_t)st->n_shards;
    st->shard_slots[slot] = (uint16_t)(*shard + 1);
    memset(&st->shards[st->n_shards], 0, sizeof(dsv3__st_shard));
    DSV3__TRY(dsv3__st_keep_name(st, &st->shards[st->n_shards].name, name, err));
    st->n_shards++;
    return DSV3_OK;
}

/* model.safetensors.index.json: {"weight_map": {name: shard, ...}, ...} */
static dsv3_result dsv3__st_read_index(dsv3__st *st, dsv3__str text, dsv3__st_map *map, dsv3_error *err)
{
    static const char file[] = "model.safetensors.index.json";
    dsv3__json j;
    dsv3__json_str key, value;
    const char *last = NULL; /* the shard named just before */
    uint32_t last_shard = 0;
    bool has_map = false;
    dsv3__json_init(&j, text.p, text.n, file, err);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        if (!dsv3__json_is(key, "weight_map")) {
            dsv3__json_skip(&j);
            continue;
        }
        if (has_map)
            return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: weight_map stands twice", file);
        has_map = true;
        dsv3__json_open(&j, '{');
        while (dsv3__json_key(&j, &key)) {
            dsv3__st_place place;
            char name[DSV3__ST_NAME_MAX + 1];
            void *array = map->places;
            uint64_t slot;
            if (!dsv3__json_string(&j, &value))
                break;
            DSV3__TRY(dsv3__st_name(name, key, file, err));
            DSV3__TRY(dsv3__st_keep_name(st, &place.name, name, err));
            if (!last || !dsv3__json_is(value, last)) {
                DSV3__TRY(dsv3__st_name(name, value, file, err));
                if (!dsv3__st_name_is_safe(name))
                    return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS,
                                      "%s: %s: shard \"%s\", expected the plain name of a .safetensors file", file,
                                      place.name, name);
                DSV3__TRY(dsv3__st_add_shard(st, name, &last_shard, err));
                last = st->shards[last_shard].name;
            }
            place.shard = last_shard;
            place.found = false;
            if (map->n >= 0x7fffffffu)
                return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: too many tensors", file);
            dsv3_result grown =
                dsv3__mem_grow(st->mem, &array, &map->cap, map->n, map->n + 1, sizeof place, "index", err);
            map->places = (dsv3__st_place *)array;
            DSV3__TRY(grown);
            if (map->n * 2 >= map->n_slots) {
                void *slots;
                uint64_t n = map->n_slots ? map->n_slots * 2 : 256;
                DSV3__TRY(dsv3__mem_alloc(st->mem, &slots, n * sizeof(uint32_t), "index", err));
                memset(slots, 0, (size_t)n * sizeof(uint32_t));
                dsv3__mem_free(st->mem, map->slots);
                map->slots = (uint32_t *)slots;
                map->n_slots = n;
                for (uint64_t i = 0; i < map->n; i++) {
                    dsv3__st_map_find(map, map->places[i].name, &slot);
                    map->slots[slot] = (uint32_t)i + 1;
                }
            }
            if (dsv3__st_map_find(map, place.name, &slot))
                return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: %s stands twice", file, place.name);
            map->places[map->n] = place;
            map->slots[slot] = (uint32_t)++map->n;
        }
    }
    DSV3__TRY(dsv3__json_end(&j));
    if (!map->n)
        return DSV3__FAIL(err, DSV3_ERROR_SAFETENSORS, "%s: weight_map is missing or empty", file);
    return DSV3_OK;
}

static dsv3_result dsv3__st_open_shards(dsv3__st *st, dsv3__blob *index, dsv3__st_map *map, dsv3_error *err)
{
    dsv3_result r =
        dsv3__blob_open(index, &st->reader, st->mem, "model.safetensors.index.json", DSV3__ST_INDEX_MAX, err);
    if (r == DSV3_ERROR_FILE_NOT_FOUND) {
        uint32_t shard;
        DSV3__TRY(dsv3__st_add_shard(st, "model.safetensors", &shard, err));
        r = dsv3__st_open_shard(st, shard, NULL, err);
        if (r == DSV3_ERROR_FILE_NOT_FOUND)
            return DSV3__FAIL(err, r, "neither model.safetensors.index.json nor model.safetensors is there");
        return r;
    }
    DSV3__TRY(r);
    DSV3__TRY(dsv3__st_read_index(st, index->text, map, err));
    DSV3__TRY(dsv3__st_report(st, index->text.n, err));
    for (uint32_t i = 0; i < st->n_shards; i++)
        DSV3__TRY(dsv3__st_open_shard(st, i, map, err));
    for (uint64_t i = 0; i < map->n; i++)
        if (!map->places[i].found)
            return DSV3__FAIL(err, DSV3_ERROR_MISSING_TENSOR, "%s: not in %s, where the index places it",
                              map->places[i].name, st->shards[map->places[i].shard].name);
    return DSV3_OK;
}

static void dsv3__st_close(dsv3__st *st)
{
    for (uint64_t i = 0; i < st->n_shards; i++)
        if (st->shards[i].open && st->reader.close_fn)
            st->reader.close_fn(st->reader.user, &st->shards[i].file);
    while (st->chunks) {
        dsv3__st_chunk *next = st->chunks->next;
        dsv3__mem_free(st->mem, st->chunks);
        st->chunks = next;
    }
    dsv3__mem_free(st->mem, st->shards);
    dsv3__mem_free(st->mem, st->tensors);
    dsv3__mem_free(st->mem, st->slots);
    memset(st, 0, sizeof *st);
}

/* Opens all shards and reads their headers. An index, if present, decides; else model.safetensors alone.
   On failure everything is closed again. */
static dsv3_result dsv3__st_open(dsv3__st *st, dsv3__mem *mem, const dsv3_reader *reader, const dsv3_progress *progress,
                                 dsv3_error *err)
{
    dsv3__blob index;
    dsv3__st_map map;
    memset(st, 0, sizeof *st);
    memset(&index, 0, sizeof index);
    memset(&map, 0, sizeof map);
    st->mem = mem;
    st->reader = *reader;
    st->progress = progress;
    st->seed = (uint64_t)(uintptr_t)mem; /* an address: another one in every run */
    map.seed = st->seed;
    dsv3_result r = dsv3__st_open_shards(st, &index, &map, err);
    dsv3__blob_close(&index, reader, mem);
    dsv3__mem_free(mem, map.places);
    dsv3__mem_free(mem, map.slots);
    if (r)
        dsv3__st_close(st);
    return r;
}

/* A tensor's view without its scales. */
static void dsv3__st_view(const dsv3__st_tensor *t, dsv3_tensor *view)
{
    memset(view, 0, sizeof *view);
    view->data = t->data;
    view->dtype = (dsv3_dtype)t->dtype;
    view->rank = t->rank;
    uint64_t columns = 1;
    for (uint32_t i = 0; i < t->rank; i++) {
        view->shape[i] = t->shape[i];
        columns *= t->rank == 1 || i > 0 ? t->shape[i] : 1; /* no overflow: the whole product was checked */
    }
    view->row_stride = columns * dsv3_dtype_size(view->dtype);
}

/* The tensor `<name of t><suffix>`; `name` receives that text. */
static const dsv3__st_tensor *dsv3__st_sibling(const dsv3__st *st, const dsv3__st_tensor *t, const char *suffix,
                                               char name[DSV3__ST_NAME_MAX + 16])
{
    dsv3__format(name, DSV3__ST_NAME_MAX + 16, "%s%s", t->name, suffix);
    return dsv3__st_find(st, name);
}

/* The view, with the scales of a sibling attached if there is one: F8_E4M3 and I8 need one.
     F8_E4M3   <name>_scale_inv  [ceil(n / 128), ceil(k / 128)]
     I8        <name>_scale_inv  [ceil(n / rows), ceil(k / cols)], blocks as config.json says, or 128 x 128
               <name>_scale      the same where config.json says blocks; else one for each row: [n, 1] or [n] */
static dsv3_result dsv3__st_weight(const dsv3__st *st, const dsv3__st_tensor *t, dsv3_tensor *view,
                                   const dsv3__st_tensor **scale, dsv3_error *err)
{
    char inverse_name[DSV3__ST_NAME_MAX + 16], plain_name[DSV3__ST_NAME_MAX + 16], zero_name[DSV3__ST_NAME_MAX + 16];
    const char *file = st->shards[t->shard].name, *name = inverse_name;
    dsv3__st_view(t, view);
    *scale = NULL;
    const bool i8 = view->dtype == DSV3_DTYPE_I8;
    if (!i8 && view->dtype != DSV3_DTYPE_F8_E4M3 && view->dtype != DSV3_DTYPE_BF16)
        return DSV3_OK;
    const dsv3__st_tensor *inverse = dsv3__st_sibling(st, t, "_scale_inv", inverse_name),
                          *plain = dsv3__st_sibling(st, t, "_scale", plain_name);
    if (view->dtype == DSV3_DTYPE_BF16) {
        if (inverse || plain)
            return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %s is BF16, yet %s exists", file, t->name,
                              inverse ? inverse_name : plain_name);
        return DSV3_OK;
    }
    if (i8 && dsv3__st_sibling(st, t, "_zero_point", zero_name))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: %s exists: asymmetric weights are not supported",
                          file, zero_name);
    if (i8 && inverse && plain)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: both %s and %s exist", file, inverse_name, plain_name);
    *scale = inverse;
    if (i8 && plain)
        *scale = plain, name = plain_name;
    if (!*scale)
        return DSV3__FAIL(err, DSV3_ERROR_MISSING_TENSOR, "%s: %s is %s, but %s%s is missing", file, t->name,
                          dsv3_dtype_name(view->dtype), i8 ? plain_name : name, i8 ? " (or ..._scale_inv)" : "");
    if (view->rank != 2)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %s: %s of shape %D, expected rank 2", file, t->name,
                          dsv3_dtype_name(view->dtype), view->shape, view->rank);

    dsv3_tensor s;
    dsv3__st_view(*scale, &s);
    uint64_t block[2] = {128, 128}, want[2];
    const bool by_rows = i8 && plain && !st->i8_block[0];
    if (by_rows)
        block[0] = 1, block[1] = view->shape[1];
    else if (i8 && st->i8_block[0])
        block[0] = st->i8_block[0], block[1] = st->i8_block[1];
    if (by_rows && s.rank == 1)
        s.rank = 2, s.shape[1] = 1;
    for (int i = 0; i < 2; i++)
        want[i] = block[i] ? dsv3__ceil_div(view->shape[i], block[i]) : 0;
    if (s.rank != 2 || s.shape[0] != want[0] || s.shape[1] != want[1] || block[1] > UINT32_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %s: expected %D for blocks of %u x %u of %D, found %D", file,
                          name, want, (uint32_t)2, block[0], block[1], view->shape, view->rank, (*scale)->shape,
                          (uint32_t)(*scale)->rank);
    if (!dsv3__ten_scale_dtype_ok(s.dtype))
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %s: dtype %s, expected F32, F16, BF16 or F8_E8M0", file,
                          name, dsv3_dtype_name(s.dtype));
    view->scale = s.data;
    view->scale_dtype = s.dtype;
    view->scale_stride = s.shape[1];
    view->block_rows = (uint32_t)block[0];
    view->block_cols = (uint32_t)block[1];
    return DSV3_OK;
}
// =============================================================================
// >>cfg   config.json and generation_config.json -> dsv3_config and the checkpoint's own sampling.
//         Checked once, so that no code below asks again. What is not supported is refused by the name of its key
//         (DSV3__CFG tables and dsv3__cfg_check). Absent keys mean what they mean in transformers' configuration classes.
// =============================================================================

/* How compressed-tensors quantizes weights, or activations, of one group of tensors. */
typedef struct dsv3__cfg_args {
    uint32_t num_bits;
    char type[16];
    char strategy[16];
    bool symmetric;
    bool dynamic;
    uint64_t block[2]; /* strategy block */
} dsv3__cfg_args;

/* The public configuration, and what is read only to be checked. */
typedef struct dsv3__cfg {
    dsv3_config c;
    bool v2;         /* model_type deepseek_v2 */
    bool has_q_lora; /* false: the key is absent and the tensors decide */
    bool has_kv_heads;
    char hidden_act[32];
    char scoring[32];
    char topk[32];
    char rope_type[32];
    char fmt[16];
    char format[32]; /* compressed-tensors */
    char activation_scheme[16];
    dsv3__cfg_args args; /* the last read */
    bool has_block;      /* the blocks of weights were told; of compressed-tensors: a group was */
    uint64_t block[2];   /* rows and columns of a weight that share a scale; 0: a scale a row */
    uint32_t moe_layer_freq, num_key_value_heads;
    bool attention_bias, mlp_bias, truncate;
    double partial_rotary_factor;
    dsv3_sample_opts sampling; /* generation_config.json */
} dsv3__cfg;

typedef enum dsv3__cfg_kind {
    DSV3__CFG_U32,
    DSV3__CFG_F32,
    DSV3__CFG_F64,
    DSV3__CFG_BOOL,
    DSV3__CFG_TEXT
} dsv3__cfg_kind;

typedef struct dsv3__cfg_key {
    const char *name;
    dsv3__cfg_kind kind;
    size_t offset; /* in dsv3__cfg */
    size_t size;   /* of a text */
} dsv3__cfg_key;

#define DSV3__CFG(kind, name, field)                                                        \
    {                                                                                       \
        name, DSV3__CFG_##kind, offsetof(dsv3__cfg, field), sizeof(((dsv3__cfg *)0)->field) \
    }

static const dsv3__cfg_key dsv3__cfg_keys[] = {
    DSV3__CFG(TEXT, "model_type", c.model_type),
    DSV3__CFG(U32, "vocab_size", c.vocab_size),
    DSV3__CFG(U32, "hidden_size", c.hidden_size),
    DSV3__CFG(U32, "intermediate_size", c.intermediate_size),
    DSV3__CFG(U32, "moe_intermediate_size", c.moe_intermediate_size),
    DSV3__CFG(U32, "num_hidden_layers", c.num_hidden_layers),
    DSV3__CFG(U32, "first_k_dense_replace", c.first_k_dense_replace),
    DSV3__CFG(U32, "num_attention_heads", c.num_attention_heads),
    DSV3__CFG(U32, "num_key_value_heads", num_key_value_heads),
    DSV3__CFG(U32, "q_lora_rank", c.q_lora_rank),
    DSV3__CFG(U32, "kv_lora_rank", c.kv_lora_rank),
    DSV3__CFG(U32, "qk_nope_head_dim", c.qk_nope_head_dim),
    DSV3__CFG(U32, "qk_rope_head_dim", c.qk_rope_head_dim),
    DSV3__CFG(U32, "v_head_dim", c.v_head_dim),
    DSV3__CFG(U32, "n_routed_experts", c.n_routed_experts),
    DSV3__CFG(U32, "n_shared_experts", c.n_shared_experts),
    DSV3__CFG(U32, "num_experts_per_tok", c.num_experts_per_tok),
    DSV3__CFG(U32, "n_group", c.n_group),
    DSV3__CFG(U32, "topk_group", c.topk_group),
    DSV3__CFG(U32, "moe_layer_freq", moe_layer_freq),
    DSV3__CFG(U32, "max_position_embeddings", c.max_position_embeddings),
    DSV3__CFG(U32, "num_nextn_predict_layers", c.num_nextn_predict_layers),
    DSV3__CFG(TEXT, "scoring_func", scoring),
    DSV3__CFG(TEXT, "topk_method", topk),
    DSV3__CFG(BOOL, "norm_topk_prob", c.norm_topk_prob),
    DSV3__CFG(BOOL, "tie_word_embeddings", c.tie_word_embeddings),
    DSV3__CFG(BOOL, "rope_interleave", c.rope_interleave),
    DSV3__CFG(BOOL, "attention_bias", attention_bias),
    DSV3__CFG(BOOL, "mlp_bias", mlp_bias),
    DSV3__CFG(F32, "routed_scaling_factor", c.routed_scaling_factor),
    DSV3__CFG(F32, "rms_norm_eps", c.rms_norm_eps),
    DSV3__CFG(F64, "rope_theta", c.rope_theta),
    DSV3__CFG(F64, "partial_rotary_factor", partial_rotary_factor),
    DSV3__CFG(TEXT, "hidden_act", hidden_act),
    DSV3__CFG(TEXT, "torch_dtype", c.dtype),
    DSV3__CFG(TEXT, "dtype", c.dtype),
};

/* Keys of rope_scaling, and of rope_parameters, its name in newer files. */
static const dsv3__cfg_key dsv3__cfg_rope_keys[] = {
    DSV3__CFG(TEXT, "type", rope_type),
    DSV3__CFG(TEXT, "rope_type", rope_type),
    DSV3__CFG(F64, "rope_theta", c.rope_theta),
    DSV3__CFG(F64, "factor", c.rope_factor),
    DSV3__CFG(F64, "beta_fast", c.rope_beta_fast),
    DSV3__CFG(F64, "beta_slow", c.rope_beta_slow),
    DSV3__CFG(F64, "mscale", c.rope_mscale),
    DSV3__CFG(F64, "mscale_all_dim", c.rope_mscale_all_dim),
    DSV3__CFG(F64, "attention_factor", c.rope_attention_factor),
    DSV3__CFG(F64, "partial_rotary_factor", partial_rotary_factor),
    DSV3__CFG(U32, "original_max_position_embeddings", c.rope_original_max_position_embeddings),
    DSV3__CFG(BOOL, "truncate", truncate),
};

static const dsv3__cfg_key dsv3__cfg_quant_keys[] = {
    DSV3__CFG(TEXT, "quant_method", c.quant_method),
    DSV3__CFG(TEXT, "fmt", fmt),
    DSV3__CFG(TEXT, "activation_scheme", activation_scheme),
    DSV3__CFG(TEXT, "scale_fmt", c.scale_fmt),
    DSV3__CFG(TEXT, "format", format),
};

static const dsv3__cfg_key dsv3__cfg_args_keys[] = {
    DSV3__CFG(U32, "num_bits", args.num_bits),  DSV3__CFG(TEXT, "type", args.type),
    DSV3__CFG(TEXT, "strategy", args.strategy), DSV3__CFG(BOOL, "symmetric", args.symmetric),
    DSV3__CFG(BOOL, "dynamic", args.dynamic),
};

/* What transformers takes from generation_config.json; a key that is absent switches its filter off. */
static const dsv3__cfg_key dsv3__cfg_generation_keys[] = {
    DSV3__CFG(F32, "temperature", sampling.temperature),
    DSV3__CFG(U32, "top_k", sampling.top_k),
    DSV3__CFG(F32, "top_p", sampling.top_p),
    DSV3__CFG(F32, "min_p", sampling.min_p),
    DSV3__CFG(F32, "repetition_penalty", sampling.repetition_penalty),
};

/* Takes the value if `key` is in the table; a null leaves the default. *seen: one bit a key, a second time is an error. */
static bool dsv3__cfg_take(dsv3__cfg *cfg, dsv3__json *j, dsv3__json_str key, const dsv3__cfg_key *keys, size_t n_keys,
                           uint64_t *seen)
{
    size_t i = 0;
    while (i < n_keys && !dsv3__json_is(key, keys[i].name))
        i++;
    if (i == n_keys)
        return false;
    if (*seen >> i & 1)
        return DSV3__JSON_FAIL(j, DSV3_ERROR_JSON, "%s: %s stands twice", j->file, keys[i].name), true;
    *seen |= (uint64_t)1 << i;
    if (dsv3__json_null(j))
        return true;
    void *field = (uint8_t *)cfg + keys[i].offset;
    double v = 0;
    int64_t integer;
    uint64_t u = 0;
    bool b = false;
    switch (keys[i].kind) {
    case DSV3__CFG_U32:
        if (dsv3__json_uint(j, &u) && u > 0x7fffffff)
            DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: %s is %u, more than 2^31 - 1", j->file, keys[i].name,
                            u);
        else
            *(uint32_t *)field = (uint32_t)u;
        break;
    case DSV3__CFG_F32:
        dsv3__json_number(j, &v, &integer, &b);
        *(float *)field = (float)v;
        break;
    case DSV3__CFG_F64:
        dsv3__json_number(j, &v, &integer, &b);
        *(double *)field = v;
        break;
    case DSV3__CFG_BOOL:
        dsv3__json_bool(j, &b);
        *(bool *)field = b;
        break;
    case DSV3__CFG_TEXT: dsv3__json_copy(j, (char *)field, keys[i].size); break;
    }
    return true;
}

/* eos_token_id: an id, a list of ids, or null. The union over all files is kept. */
static void dsv3__cfg_eos(dsv3__cfg *cfg, dsv3__json *j)
{
    bool list = dsv3__json_peek(j) == '[';
    if (dsv3__json_null(j) || (list && !dsv3__json_open(j, '[')))
        return;
    while (!list || dsv3__json_item(j)) {
        uint64_t id;
        uint32_t i = 0;
        if (!dsv3__json_uint(j, &id))
            return;
        while (i < cfg->c.n_eos && (uint64_t)cfg->c.eos_token_id[i] != id)
            i++;
        if (i == cfg->c.n_eos && id <= 0x7fffffff) {
            if (i == DSV3__COUNT(cfg->c.eos_token_id)) {
                DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: eos_token_id: more than %u ids", j->file,
                                (uint64_t)i);
                return;
            }
            cfg->c.eos_token_id[cfg->c.n_eos++] = (int32_t)id;
        }
        if (!list)
            return;
    }
}

static void dsv3__cfg_bos(dsv3__cfg *cfg, dsv3__json *j)
{
    uint64_t id;
    if (!dsv3__json_null(j) && dsv3__json_uint(j, &id) && id <= 0x7fffffff)
        cfg->c.bos_token_id = (int32_t)id;
}

/* [rows, columns]; compressed-tensors once wrote "128x128". */
static void dsv3__cfg_block(dsv3__json *j, const char *key, uint64_t block[2])
{
    uint64_t n = 0, v = 0;
    block[0] = block[1] = 0;
    if (dsv3__json_peek(j) == '"') {
        dsv3__json_str text;
        if (dsv3__json_string(j, &text) && dsv3__json_is(text, "128x128"))
            block[0] = block[1] = 128, n = 2;
    } else {
        dsv3__json_open(j, '[');
        while (dsv3__json_item(j) && dsv3__json_uint(j, &v)) {
            if (n < 2)
                block[n] = v;
            n++;
        }
    }
    /* Kernels apply a scale to 64 columns at a time. */
    if (!j->result && (n != 2 || !block[0] || block[0] > 1u << 24 || !block[1] || block[1] % 64 || block[1] > 1u << 24))
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                        "%s: quantization_config: %s is %D, expected [128, 128] or other multiples of 64 columns",
                        j->file, key, block, (uint32_t)(n < 2 ? n : 2));
}

/* Must be null, false, or an empty object or list. */
static void dsv3__cfg_none(dsv3__json *j, const char *where, const char *key)
{
    bool some = false;
    dsv3__json_str name;
    char kind = dsv3__json_peek(j);
    if (kind == '{') {
        dsv3__json_open(j, '{');
        while (dsv3__json_key(j, &name) && dsv3__json_skip(j))
            some = true;
    } else if (kind == '[') {
        dsv3__json_open(j, '[');
        while (dsv3__json_item(j) && dsv3__json_skip(j))
            some = true;
    } else if (!dsv3__json_null(j)) {
        some = kind != 'f';
        dsv3__json_skip(j);
    }
    if (some)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: quantization_config: %s%s is given: not supported",
                        j->file, where, key);
}

/* The arguments of `what` ("weights"), which must be 8 bits, int, symmetric. */
static void dsv3__cfg_read_args(dsv3__cfg *cfg, dsv3__json *j, const char *what)
{
    dsv3__json_str key;
    uint64_t seen = 0;
    dsv3__cfg_args *a = &cfg->args;
    memset(a, 0, sizeof *a);
    a->num_bits = 8;
    a->symmetric = true;
    memcpy(a->type, "int", 4);
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        char kind = dsv3__json_peek(j);
        if (dsv3__json_is(key, "actorder"))
            dsv3__cfg_none(j, what, ".actorder");
        else if (dsv3__json_is(key, "block_structure")) {
            if (!dsv3__json_null(j))
                dsv3__cfg_block(j, "block_structure", a->block);
        } else if (dsv3__json_is(key, "num_bits") && (kind == '{' || kind == '"')) /* a number for each module */
            DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: quantization_config: %s.num_bits is not a number",
                            j->file, what);
        else if (dsv3__json_is(key, "dynamic") && kind == '"') /* "local": of 4-bit floats */
            DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                            "%s: quantization_config: %s.dynamic is neither true nor false", j->file, what);
        else if (!dsv3__cfg_take(cfg, j, key, dsv3__cfg_args_keys, DSV3__COUNT(dsv3__cfg_args_keys), &seen))
            dsv3__json_skip(j);
    }
    if (a->num_bits != 8)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: quantization_config: %s.num_bits is %u, expected 8",
                        j->file, what, (uint64_t)a->num_bits);
    if (strcmp(a->type, "int") != 0)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: quantization_config: %s.type is \"%s\", expected \"int\"",
                        j->file, what, a->type);
    if (!a->symmetric)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                        "%s: quantization_config: %s.symmetric is false, expected true", j->file, what);
}

/* One of config_groups. Which tensors it speaks of, the headers say: `targets` and `ignore` are not looked at. */
static void dsv3__cfg_group(dsv3__cfg *cfg, dsv3__json *j)
{
    dsv3__json_str key;
    const dsv3__cfg_args *a = &cfg->args;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        if (dsv3__json_is(key, "weights") && !dsv3__json_null(j)) {
            dsv3__cfg_read_args(cfg, j, "weights");
            const bool blocks = strcmp(a->strategy, "block") == 0;
            if (!blocks && strcmp(a->strategy, "channel") != 0)
                DSV3__JSON_FAIL(
                    j, DSV3_ERROR_UNSUPPORTED_MODEL,
                    "%s: quantization_config: weights.strategy is \"%s\", expected \"channel\" or \"block\"", j->file,
                    a->strategy);
            else if (a->dynamic)
                DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                                "%s: quantization_config: weights.dynamic is true, expected false", j->file);
            else if (blocks != (a->block[0] != 0))
                DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                                "%s: quantization_config: weights.strategy is \"%s\", but block_structure is %s",
                                j->file, a->strategy, blocks ? "missing" : "given");
            else if (cfg->has_block && (cfg->block[0] != a->block[0] || cfg->block[1] != a->block[1]))
                DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                                "%s: quantization_config: weights.strategy differs between the groups", j->file);
            cfg->has_block = true;
            cfg->block[0] = a->block[0];
            cfg->block[1] = a->block[1];
        } else if (dsv3__json_is(key, "input_activations") && !dsv3__json_null(j)) {
            dsv3__cfg_read_args(cfg, j, "input_activations");
            if (!a->dynamic)
                DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                                "%s: quantization_config: input_activations.dynamic is false, expected true", j->file);
        } else if (dsv3__json_is(key, "output_activations")) {
            dsv3__cfg_none(j, "", "output_activations");
        } else if (dsv3__json_is(key, "format") && dsv3__json_peek(j) == '"') {
            dsv3__json_str format;
            if (dsv3__json_string(j, &format) && !dsv3__json_is(format, "int-quantized") &&
                !dsv3__json_is(format, "naive-quantized"))
                DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                                "%s: quantization_config: format of a group, expected \"int-quantized\"", j->file);
        } else if (!j->result && !dsv3__json_is(key, "weights") && !dsv3__json_is(key, "input_activations")) {
            dsv3__json_skip(j);
        }
    }
}

static void dsv3__cfg_check_quantization(dsv3__cfg *cfg, dsv3__json *j)
{
    const char *method = cfg->c.quant_method;
    const bool fp8 = strcmp(method, "fp8") == 0, groups = strcmp(method, "compressed-tensors") == 0,
               blocks = strcmp(method, "blockwise_int8") == 0;
    if (!fp8 && !groups && !blocks && strcmp(method, "w8a8_int8") != 0)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                        "%s: quantization_config.quant_method is \"%s\", expected \"fp8\", \"compressed-tensors\", "
                        "\"blockwise_int8\" or \"w8a8_int8\"",
                        j->file, method);
    else if (groups && strcmp(cfg->format, "int-quantized") != 0 && strcmp(cfg->format, "naive-quantized") != 0)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                        "%s: quantization_config.format is \"%s\" (compressed-tensors), expected \"int-quantized\"",
                        j->file, cfg->format);
    else if (fp8 && cfg->has_block && (cfg->block[0] != 128 || cfg->block[1] != 128))
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                        "%s: quantization_config.weight_block_size is %D, expected [128, 128]", j->file, cfg->block,
                        (uint32_t)2);
    else if (fp8 && cfg->fmt[0] && strcmp(cfg->fmt, "e4m3") != 0)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL, "%s: quantization_config.fmt is \"%s\", expected \"e4m3\"",
                        j->file, cfg->fmt);
    else if (cfg->activation_scheme[0] && strcmp(cfg->activation_scheme, "dynamic") != 0)
        DSV3__JSON_FAIL(j, DSV3_ERROR_UNSUPPORTED_MODEL,
                        "%s: quantization_config.activation_scheme is \"%s\", expected \"dynamic\"", j->file,
                        cfg->activation_scheme);
}

static void dsv3__cfg_quantization(dsv3__cfg *cfg, dsv3__json *j)
{
    dsv3__json_str key;
    uint64_t seen = 0;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        if (dsv3__json_is(key, "weight_block_size")) {
            if (dsv3__json_null(j))
                continue;
            dsv3__cfg_block(j, "weight_block_size", cfg->block);
            cfg->has_block = true;
        } else if (dsv3__json_is(key, "config_groups")) {
            dsv3__json_open(j, '{');
            while (dsv3__json_key(j, &key))
                dsv3__cfg_group(cfg, j);
        } else if (dsv3__json_is(key, "kv_cache_scheme")) {
            dsv3__cfg_none(j, "", "kv_cache_scheme");
        } else if (dsv3__json_is(key, "transform_config")) {
            dsv3__cfg_none(j, "", "transform_config");
        } else if (!dsv3__cfg_take(cfg, j, key, dsv3__cfg_quant_keys, DSV3__COUNT(dsv3__cfg_quant_keys), &seen)) {
            dsv3__json_skip(j);
        }
    }
    if (!j->result)
        dsv3__cfg_check_quantization(cfg, j);
}

/* Keys whose mere presence means another network. */
static const char *const dsv3__cfg_foreign[] = {
    "index_topk",         "index_n_heads", "index_head_dim", /* DeepSeek-V3.2's sparse attention */
    "text_config",                                           /* multimodal wrappers */
    "compression_config", "qk_layernorm",  "llama_4_scaling",
};

static dsv3_result dsv3__cfg_read(dsv3__cfg *cfg, dsv3__str text, dsv3_error *err)
{
    dsv3__json j;
    dsv3__json_str key;
    uint64_t seen = 0;
    bool q_lora_null = false, seen_quantization = false;
    dsv3__json_init(&j, text.p, text.n, "config.json", err);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        for (size_t i = 0; i < DSV3__COUNT(dsv3__cfg_foreign); i++)
            if (dsv3__json_is(key, dsv3__cfg_foreign[i]) && dsv3__json_peek(&j) != 'n' && dsv3__json_peek(&j) != 'f')
                return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                                  "config.json: %s: this kind of model is not supported", dsv3__cfg_foreign[i]);
        if (dsv3__json_is(key, "q_lora_rank")) {
            cfg->has_q_lora = true;
            q_lora_null = dsv3__json_peek(&j) == 'n';
        }
        cfg->has_kv_heads =
            cfg->has_kv_heads || (dsv3__json_is(key, "num_key_value_heads") && dsv3__json_peek(&j) != 'n');
        if (dsv3__json_is(key, "n_shared_experts") && dsv3__json_peek(&j) == 'n')
            cfg->c.n_shared_experts = 0;
        if (dsv3__json_is(key, "rope_scaling") || dsv3__json_is(key, "rope_parameters")) {
            if (dsv3__json_null(&j))
                continue;
            dsv3__json_open(&j, '{');
            uint64_t seen_here = 0;
            while (dsv3__json_key(&j, &key))
                if (!dsv3__cfg_take(cfg, &j, key, dsv3__cfg_rope_keys, DSV3__COUNT(dsv3__cfg_rope_keys), &seen_here))
                    dsv3__json_skip(&j);
        } else if (dsv3__json_is(key, "quantization_config")) {
            if (seen_quantization)
                return DSV3__FAIL(err, DSV3_ERROR_JSON, "config.json: quantization_config stands twice");
            seen_quantization = true;
            if (!dsv3__json_null(&j))
                dsv3__cfg_quantization(cfg, &j);
        } else if (dsv3__json_is(key, "eos_token_id")) {
            dsv3__cfg_eos(cfg, &j);
        } else if (dsv3__json_is(key, "bos_token_id")) {
            dsv3__cfg_bos(cfg, &j);
        } else if (!dsv3__cfg_take(cfg, &j, key, dsv3__cfg_keys, DSV3__COUNT(dsv3__cfg_keys), &seen)) {
            dsv3__json_skip(&j);
        }
    }
    if (q_lora_null)
        cfg->c.q_lora_rank = 0;
    return dsv3__json_end(&j);
}

/* The number must be there, and be between lo and hi. */
static dsv3_result dsv3__cfg_range(const char *key, uint64_t value, uint64_t lo, uint64_t hi, dsv3_error *err)
{
    if (value >= lo && value <= hi)
        return DSV3_OK;
    return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: %s is %u%s, expected %u to %u", key, value,
                      value ? "" : " or missing", lo, hi);
}

static dsv3_result dsv3__cfg_check_router(dsv3__cfg *cfg, dsv3_error *err)
{
    dsv3_config *c = &cfg->c;
    c->topk_method = c->scoring_func == DSV3_SCORING_SIGMOID ? DSV3_TOPK_NOAUX_TC : DSV3_TOPK_GREEDY;
    if (strcmp(cfg->topk, "noaux_tc") == 0)
        c->topk_method = DSV3_TOPK_NOAUX_TC;
    else if (strcmp(cfg->topk, "greedy") == 0)
        c->topk_method = DSV3_TOPK_GREEDY;
    else if (strcmp(cfg->topk, "group_limited_greedy") == 0)
        c->topk_method = DSV3_TOPK_GROUP_LIMITED_GREEDY;
    else if (cfg->topk[0])
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: topk_method is \"%s\", expected noaux_tc, greedy or group_limited_greedy",
                          cfg->topk);
    if ((c->scoring_func == DSV3_SCORING_SIGMOID) != (c->topk_method == DSV3_TOPK_NOAUX_TC))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: scoring_func \"%s\" does not go with topk_method \"%s\"",
                          c->scoring_func == DSV3_SCORING_SIGMOID ? "sigmoid" : "softmax", cfg->topk);
    if (c->scoring_func == DSV3_SCORING_SOFTMAX && c->norm_topk_prob)
        return DSV3__FAIL(
            err, DSV3_ERROR_UNSUPPORTED_MODEL,
            "config.json: norm_topk_prob is true with softmax scores: the published codes disagree on it");
    if (c->topk_method == DSV3_TOPK_GREEDY)
        c->n_group = c->topk_group = 1;
    DSV3__TRY(dsv3__cfg_range("n_routed_experts", c->n_routed_experts, 1, 65536, err));
    DSV3__TRY(dsv3__cfg_range("n_group", c->n_group, 1, c->n_routed_experts, err));
    DSV3__TRY(dsv3__cfg_range("topk_group", c->topk_group, 1, c->n_group, err));
    if (c->n_routed_experts % c->n_group)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: n_routed_experts %u is no multiple of n_group %u",
                          (uint64_t)c->n_routed_experts, (uint64_t)c->n_group);
    if (c->topk_method == DSV3_TOPK_NOAUX_TC && c->n_routed_experts / c->n_group < 2 && c->n_group > 1)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: groups of one expert: noaux_tc scores a group by two");
    DSV3__TRY(dsv3__cfg_range("num_experts_per_tok", c->num_experts_per_tok, 1,
                              (uint64_t)c->topk_group * (c->n_routed_experts / c->n_group), err));
    DSV3__TRY(dsv3__cfg_range("num_experts_per_tok", c->num_experts_per_tok, 1, 4096, err)); /* n * top_k < 2^32 */
    DSV3__TRY(dsv3__cfg_range("moe_intermediate_size", c->moe_intermediate_size, 1, 1u << 20, err));
    if (!(c->routed_scaling_factor > -1e9f && c->routed_scaling_factor < 1e9f))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: routed_scaling_factor is %f: out of range",
                          (double)c->routed_scaling_factor);
    DSV3__TRY(dsv3__cfg_range("n_shared_experts", c->n_shared_experts, 0, 4096, err));
    return dsv3__cfg_range("n_shared_experts * moe_intermediate_size",
                           (uint64_t)c->n_shared_experts * c->moe_intermediate_size, 0, 1u << 24, err);
}

static dsv3_result dsv3__cfg_check_rope(dsv3__cfg *cfg, dsv3_error *err)
{
    dsv3_config *c = &cfg->c;
    if (!(c->rope_theta > 1 && c->rope_theta < 1e30))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: rope_theta is %f, expected more than 1",
                          c->rope_theta);
    if (cfg->partial_rotary_factor != 1)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: partial_rotary_factor is %f, expected 1",
                          cfg->partial_rotary_factor);
    if (!cfg->rope_type[0] || strcmp(cfg->rope_type, "default") == 0) {
        c->rope_factor = 1;
        return DSV3_OK;
    }
    if (strcmp(cfg->rope_type, "yarn") != 0)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: rope type is \"%s\", expected \"default\" or \"yarn\"", cfg->rope_type);
    if (!cfg->truncate)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: rope truncate is false, which is not supported");
    c->rope_yarn = true;
    DSV3__TRY(dsv3__cfg_range("original_max_position_embeddings", c->rope_original_max_position_embeddings, 1, 1u << 30,
                              err));
    if (c->rope_factor == 0)
        c->rope_factor = (double)c->max_position_embeddings / c->rope_original_max_position_embeddings;
    if (c->rope_beta_fast == 0)
        c->rope_beta_fast = 32;
    if (c->rope_beta_slow == 0)
        c->rope_beta_slow = 1;
    if (!(c->rope_factor > 0 && c->rope_factor < 1e9 && c->rope_beta_fast > 0 && c->rope_beta_slow > 0 &&
          c->rope_beta_fast < 1e9 && c->rope_beta_slow < 1e9 && fabs(c->rope_mscale) < 1e9 &&
          fabs(c->rope_mscale_all_dim) < 1e9 && fabs(c->rope_attention_factor) < 1e9))
        return DSV3__FAIL(
            err, DSV3_ERROR_UNSUPPORTED_MODEL,
            "config.json: yarn factor %f, beta_fast %f, beta_slow %f, mscale %f, mscale_all_dim %f: out of range",
            c->rope_factor, c->rope_beta_fast, c->rope_beta_slow, c->rope_mscale, c->rope_mscale_all_dim);
    return DSV3_OK;
}

static dsv3_result dsv3__cfg_check(dsv3__cfg *cfg, dsv3_error *err)
{
    dsv3_config *c = &cfg->c;
    static const char *const types[] = {"deepseek_v3", "deepseek_v2", "kimi_k2", "joyai_llm_flash"};
    size_t type = 0;
    while (type < DSV3__COUNT(types) && strcmp(types[type], c->model_type) != 0)
        type++;
    if (type == DSV3__COUNT(types))
        return DSV3__FAIL(
            err, DSV3_ERROR_UNSUPPORTED_MODEL,
            "config.json: model_type is \"%s\", expected deepseek_v3, deepseek_v2, kimi_k2 or joyai_llm_flash",
            c->model_type);
    if (strcmp(cfg->scoring, "sigmoid") == 0)
        c->scoring_func = DSV3_SCORING_SIGMOID;
    else if (strcmp(cfg->scoring, "softmax") == 0)
        c->scoring_func = DSV3_SCORING_SOFTMAX;
    else if (cfg->scoring[0])
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: scoring_func is \"%s\", expected sigmoid or softmax", cfg->scoring);
    else
        c->scoring_func = cfg->v2 && strcmp(cfg->topk, "noaux_tc") != 0 ? DSV3_SCORING_SOFTMAX : DSV3_SCORING_SIGMOID;
    if (strcmp(cfg->hidden_act, "silu") != 0)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: hidden_act is \"%s\", expected \"silu\"",
                          cfg->hidden_act);
    if (cfg->attention_bias)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: attention_bias is true, which is not supported");
    if (cfg->mlp_bias)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: mlp_bias is true, which is not supported");
    if (cfg->moe_layer_freq != 1)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: moe_layer_freq is %u, expected 1",
                          (uint64_t)cfg->moe_layer_freq);
    DSV3__TRY(dsv3__cfg_range("vocab_size", c->vocab_size, 1, 1u << 24, err));
    DSV3__TRY(dsv3__cfg_range("hidden_size", c->hidden_size, 1, 1u << 20, err));
    DSV3__TRY(dsv3__cfg_range("num_hidden_layers", c->num_hidden_layers, 1, 4096, err));
    DSV3__TRY(dsv3__cfg_range("num_attention_heads", c->num_attention_heads, 1, 4096, err));
    DSV3__TRY(dsv3__cfg_range("kv_lora_rank", c->kv_lora_rank, 1, 65536, err));
    DSV3__TRY(dsv3__cfg_range("qk_nope_head_dim", c->qk_nope_head_dim, 1, 65536, err));
    DSV3__TRY(dsv3__cfg_range("qk_rope_head_dim", c->qk_rope_head_dim, 2, 65536, err));
    DSV3__TRY(dsv3__cfg_range("v_head_dim", c->v_head_dim, 1, 65536, err));
    DSV3__TRY(dsv3__cfg_range("q_lora_rank", c->q_lora_rank, 0, 1u << 20, err));
    DSV3__TRY(dsv3__cfg_range("max_position_embeddings", c->max_position_embeddings, 1, 1u << 30, err));
    if (c->qk_rope_head_dim % 2)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: qk_rope_head_dim is %u, expected an even number",
                          (uint64_t)c->qk_rope_head_dim);
    if (cfg->has_kv_heads && cfg->num_key_value_heads != c->num_attention_heads)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: num_key_value_heads is %u, expected num_attention_heads %u",
                          (uint64_t)cfg->num_key_value_heads, (uint64_t)c->num_attention_heads);
    if (!(c->rms_norm_eps >= 0 && c->rms_norm_eps < 1))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "config.json: rms_norm_eps is %f, expected 0 to 1",
                          (double)c->rms_norm_eps);
    if (c->first_k_dense_replace > c->num_hidden_layers)
        c->first_k_dense_replace = c->num_hidden_layers;
    if (c->first_k_dense_replace > 0)
        DSV3__TRY(dsv3__cfg_range("intermediate_size", c->intermediate_size, 1, 1u << 24, err));
    if (c->first_k_dense_replace < c->num_hidden_layers)
        DSV3__TRY(dsv3__cfg_check_router(cfg, err));
    else /* nothing below shall look at experts that are not there */
        c->n_routed_experts = c->n_shared_experts = c->num_experts_per_tok = c->moe_intermediate_size = 0;
    return dsv3__cfg_check_rope(cfg, err);
}

static void dsv3__cfg_defaults(dsv3__cfg *cfg, bool v2)
{
    dsv3_config *c = &cfg->c;
    memset(cfg, 0, sizeof *cfg);
    cfg->v2 = v2;
    cfg->moe_layer_freq = 1;
    cfg->truncate = true;
    cfg->partial_rotary_factor = 1;
    memcpy(cfg->hidden_act, "silu", 5);
    c->first_k_dense_replace = v2 ? 0 : 3;
    c->n_shared_experts = v2 ? 2 : 1;
    c->n_group = v2 ? 1 : 8;
    c->topk_group = v2 ? 1 : 4;
    c->routed_scaling_factor = v2 ? 1.0f : 2.5f;
    c->norm_topk_prob = !v2;
    c->rope_interleave = true;
    c->rms_norm_eps = 1e-6f;
    c->rope_theta = 10000;
    c->max_position_embeddings = v2 ? 2048 : 4096;
    c->bos_token_id = -1;
}

/* Is the file a deepseek_v2's? Its defaults differ, and keys come in any order. */
static bool dsv3__cfg_is_v2(dsv3__str text)
{
    dsv3_error ignored;
    dsv3__json j;
    dsv3__json_str key, value;
    bool v2 = false;
    dsv3__json_init(&j, text.p, text.n, "config.json", &ignored);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        if (dsv3__json_is(key, "model_type") && dsv3__json_peek(&j) == '"')
            v2 = dsv3__json_string(&j, &value) && dsv3__json_is(value, "deepseek_v2");
        else
            dsv3__json_skip(&j);
    }
    return v2;
}

/* config.json, checked. */
static dsv3_result dsv3__cfg_load(dsv3__cfg *cfg, dsv3__str text, dsv3_error *err)
{
    dsv3__cfg_defaults(cfg, dsv3__cfg_is_v2(text));
    DSV3__TRY(dsv3__cfg_read(cfg, text, err));
    return dsv3__cfg_check(cfg, err);
}

/* generation_config.json: stop ids, and how the checkpoint wants to be sampled. */
static dsv3_result dsv3__cfg_generation(dsv3__cfg *cfg, dsv3__str text, dsv3_error *err)
{
    dsv3__json j;
    dsv3__json_str key;
    uint64_t seen = 0;
    bool do_sample = false;
    cfg->sampling.temperature = 1; /* transformers' default, when it samples */
    dsv3__json_init(&j, text.p, text.n, "generation_config.json", err);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        if (dsv3__json_is(key, "eos_token_id"))
            dsv3__cfg_eos(cfg, &j);
        else if (dsv3__json_is(key, "bos_token_id"))
            dsv3__cfg_bos(cfg, &j);
        else if (dsv3__json_is(key, "do_sample") && dsv3__json_peek(&j) != 'n')
            dsv3__json_bool(&j, &do_sample);
        else if (!dsv3__cfg_take(cfg, &j, key, dsv3__cfg_generation_keys, DSV3__COUNT(dsv3__cfg_generation_keys),
                                 &seen))
            dsv3__json_skip(&j);
    }
    DSV3__TRY(dsv3__json_end(&j));
    if (!do_sample)
        memset(&cfg->sampling, 0, sizeof cfg->sampling);
    return DSV3_OK;
}
// =============================================================================
// >>wt   The open model: names of the checkpoint -> views of its weights, every shape and dtype checked against the
//        configuration. Nothing is copied where the reader maps; with read_fn each tensor is read here, once.
// =============================================================================

/* W_down(silu(W_gate x) * (W_up x)): a dense layer's, a routed expert's, the shared expert's. */
typedef struct dsv3__mlp {
    dsv3_tensor gate; /* [inter, hidden_size] */
    dsv3_tensor up;   /* [inter, hidden_size] */
    dsv3_tensor down; /* [hidden_size, inter] */
} dsv3__mlp;

typedef struct dsv3__layer {
    dsv3_tensor input_norm; /* [hidden_size] */
    dsv3_tensor post_norm;  /* [hidden_size] */
    dsv3_tensor q_a;        /* [q_lora_rank, hidden_size]; unused without q_lora_rank */
    dsv3_tensor q_a_norm;   /* [q_lora_rank] */
    dsv3_tensor q_b;        /* [n_heads * (nope + rope), q_lora_rank], or q_proj: [.., hidden_size] */
    dsv3_tensor kv_a;       /* [kv_lora_rank + rope, hidden_size] */
    dsv3_tensor kv_a_norm;  /* [kv_lora_rank] */
    dsv3_tensor kv_b;       /* [n_heads * (nope + v), kv_lora_rank]: of head h first W_UK, then W_UV */
    dsv3_tensor o;          /* [hidden_size, n_heads * v] */
    bool moe;
    bool has_mlp;            /* dense layers; MoE layers with a shared expert */
    dsv3__mlp mlp;           /* inter = intermediate_size, or n_shared_experts * moe_intermediate_size */
    dsv3_tensor router;      /* [n_routed_experts, hidden_size] */
    dsv3_tensor router_bias; /* [n_routed_experts]; noaux_tc only */
    dsv3__mlp *experts;      /* [n_routed_experts], inter = moe_intermediate_size */
} dsv3__layer;

#define DSV3__MTP_MAX 4 /* prediction layers that are used; published checkpoints have one */

/* What stands around a layer of multi-token prediction: see >>mtp. */
typedef struct dsv3__predictor {
    dsv3_tensor enorm;   /* [hidden_size] of the embedding */
    dsv3_tensor hnorm;   /* [hidden_size] of the state below */
    dsv3_tensor eh_proj; /* [hidden_size, 2 * hidden_size]: columns of the embedding, then of the state */
    dsv3_tensor norm;    /* [hidden_size] shared_head.norm */
    dsv3_tensor embed;   /* [vocab_size, hidden_size] and */
    dsv3_tensor head;    /* [vocab_size, hidden_size]: its own copies, or the model's */
} dsv3__predictor;

struct dsv3_model {
    dsv3__mem mem;
    dsv3_logger logger;
    dsv3__cfg cfg;
    dsv3_config config; /* = cfg.c, as handed out */
    const dsv3__kern *k;
    dsv3__mm_mode mode;  /* of linear maps */
    dsv3__mm_mode exact; /* of the router and of attention's: f32 */
    uint32_t forms;      /* bit f: a map of normalised rows wants them in form f */
    bool bytes;          /* weights are multiplied as codes of 8 bits */
    bool read_ahead;
    dsv3__st st;
    dsv3__layer *layers;     /* [num_hidden_layers + n_mtp] */
    uint32_t n_mtp;          /* layers of multi-token prediction, behind the others; 0: none, or none wanted */
    bool any_dense, any_moe; /* among all layers */
    dsv3__predictor mtp[DSV3__MTP_MAX];
    dsv3_tensor embed;    /* [vocab_size, hidden_size] */
    dsv3_tensor norm;     /* [hidden_size] */
    dsv3_tensor head;     /* [vocab_size, hidden_size] */
    float *inv_freq;      /* [rope / 2] */
    float rope_amplitude; /* multiplies cos and sin */
    float softmax_scale;
    dsv3_tokenizer *tokenizer; /* NULL: none that is known, and `tokenizer_error` says why */
    dsv3_error tokenizer_error;
    size_t max_token_bytes;
};

/* The bytes of a tensor, read from its file if the reader does not map. */
static dsv3_result dsv3__wt_load(dsv3_model *m, const dsv3__st_tensor *tensor, dsv3_error *err)
{
    dsv3__st_tensor *t = m->st.tensors + (tensor - m->st.tensors);
    dsv3__st_shard *shard = &m->st.shards[t->shard];
    void *data;
    if (t->data)
        return DSV3_OK;
    DSV3__TRY(dsv3__mem_alloc(&m->mem, &data, t->size, t->name, err));
    t->data = (const uint8_t *)data;
    if (t->size && m->st.reader.read_fn(m->st.reader.user, &shard->file, t->offset, data, (size_t)t->size))
        return DSV3__FAIL(err, DSV3_ERROR_IO, "%s: %s: reading %u bytes at %u failed", shard->name, t->name, t->size,
                          t->offset);
    m->st.progress_total = m->st.progress_total ? m->st.progress_total : m->st.progress_done + m->st.data_bytes;
    return dsv3__st_report(&m->st, t->size, err);
}

/* A weight by name with the shape it must have; cols 0: a vector [rows]. */
static dsv3_result dsv3__wt_get(dsv3_model *m, dsv3_tensor *view, const char *name, uint64_t rows, uint64_t cols,
                                dsv3_error *err)
{
    const dsv3__st_tensor *t = dsv3__st_find(&m->st, name), *scale;
    uint64_t want[2];
    if (!t)
        return DSV3__FAIL(err, DSV3_ERROR_MISSING_TENSOR, "%s: not in the checkpoint", name);
    want[0] = rows;
    want[1] = cols;
    uint32_t rank = cols ? 2 : 1;
    if (t->rank != rank || memcmp(t->shape, want, rank * sizeof(uint64_t)) != 0)
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %s: expected %D, found %D", m->st.shards[t->shard].name,
                          name, want, rank, t->shape, (uint32_t)t->rank);
    DSV3__TRY(dsv3__wt_load(m, t, err));
    DSV3__TRY(dsv3__st_weight(&m->st, t, view, &scale, err));
    if (scale) {
        DSV3__TRY(dsv3__wt_load(m, scale, err));
        view->scale = scale->data;
    }
    DSV3__TRY(dsv3__ten_check(view, name, true, err));
    m->bytes |= dsv3__mm_is_bytes(dsv3__mm_form(&m->mode, view));
    return DSV3_OK;
}

/* model.layers.<layer>.<part>, printed in one place. */
typedef struct dsv3__wt_name {
    char text[128];
} dsv3__wt_name;

static dsv3_result dsv3__wt_layer_tensor(dsv3_model *m, dsv3_tensor *view, uint32_t layer, const char *part,
                                         uint64_t rows, uint64_t cols, dsv3_error *err)
{
    dsv3__wt_name name;
    dsv3__format(name.text, sizeof name.text, "model.layers.%u.%s.weight", (uint64_t)layer, part);
    return dsv3__wt_get(m, view, name.text, rows, cols, err);
}

static dsv3_result dsv3__wt_mlp(dsv3_model *m, dsv3__mlp *mlp, uint32_t layer, const char *part, uint64_t inter,
                                dsv3_error *err)
{
    dsv3__wt_name name;
    uint64_t dim = m->config.hidden_size;
    dsv3__format(name.text, sizeof name.text, "%s.gate_proj", part);
    DSV3__TRY(dsv3__wt_layer_tensor(m, &mlp->gate, layer, name.text, inter, dim, err));
    dsv3__format(name.text, sizeof name.text, "%s.up_proj", part);
    DSV3__TRY(dsv3__wt_layer_tensor(m, &mlp->up, layer, name.text, inter, dim, err));
    dsv3__format(name.text, sizeof name.text, "%s.down_proj", part);
    return dsv3__wt_layer_tensor(m, &mlp->down, layer, name.text, dim, inter, err);
}

static dsv3_result dsv3__wt_attention(dsv3_model *m, dsv3__layer *l, uint32_t layer, dsv3_error *err)
{
    const dsv3_config *c = &m->config;
    uint64_t q_rows = (uint64_t)c->num_attention_heads * (c->qk_nope_head_dim + c->qk_rope_head_dim);
    uint64_t v_rows = (uint64_t)c->num_attention_heads * c->v_head_dim;
    if (c->q_lora_rank) {
        DSV3__TRY(dsv3__wt_layer_tensor(m, &l->q_a, layer, "self_attn.q_a_proj", c->q_lora_rank, c->hidden_size, err));
        DSV3__TRY(dsv3__wt_layer_tensor(m, &l->q_a_norm, layer, "self_attn.q_a_layernorm", c->q_lora_rank, 0, err));
        DSV3__TRY(dsv3__wt_layer_tensor(m, &l->q_b, layer, "self_attn.q_b_proj", q_rows, c->q_lora_rank, err));
    } else {
        DSV3__TRY(dsv3__wt_layer_tensor(m, &l->q_b, layer, "self_attn.q_proj", q_rows, c->hidden_size, err));
    }
    DSV3__TRY(dsv3__wt_layer_tensor(m, &l->kv_a, layer, "self_attn.kv_a_proj_with_mqa",
                                    (uint64_t)c->kv_lora_rank + c->qk_rope_head_dim, c->hidden_size, err));
    DSV3__TRY(dsv3__wt_layer_tensor(m, &l->kv_a_norm, layer, "self_attn.kv_a_layernorm", c->kv_lora_rank, 0, err));
    DSV3__TRY(dsv3__wt_layer_tensor(m, &l->kv_b, layer, "self_attn.kv_b_proj",
                                    (uint64_t)c->num_attention_heads * (c->qk_nope_head_dim + c->v_head_dim),
                                    c->kv_lora_rank, err));
    return dsv3__wt_layer_tensor(m, &l->o, layer, "self_attn.o_proj", c->hidden_size, v_rows, err);
}

static dsv3_result dsv3__wt_moe(dsv3_model *m, dsv3__layer *l, uint32_t layer, dsv3_error *err)
{
    const dsv3_config *c = &m->config;
    dsv3__wt_name name;
    void *experts;
    DSV3__TRY(dsv3__wt_layer_tensor(m, &l->router, layer, "mlp.gate", c->n_routed_experts, c->hidden_size, err));
    dsv3__format(name.text, sizeof name.text, "model.layers.%u.mlp.gate.e_score_correction_bias", (uint64_t)layer);
    if (c->topk_method == DSV3_TOPK_NOAUX_TC)
        DSV3__TRY(dsv3__wt_get(m, &l->router_bias, name.text, c->n_routed_experts, 0, err));
    else if (dsv3__st_find(&m->st, name.text))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "%s exists, but config.json does not say noaux_tc",
                          name.text);
    DSV3__TRY(dsv3__mem_alloc(&m->mem, &experts, c->n_routed_experts * sizeof(dsv3__mlp), "experts", err));
    l->experts = (dsv3__mlp *)experts;
    for (uint32_t e = 0; e < c->n_routed_experts; e++) {
        dsv3__format(name.text, sizeof name.text, "mlp.experts.%u", (uint64_t)e);
        DSV3__TRY(dsv3__wt_mlp(m, &l->experts[e], layer, name.text, c->moe_intermediate_size, err));
    }
    l->has_mlp = c->n_shared_experts > 0;
    dsv3__format(name.text, sizeof name.text, "model.layers.%u.mlp.shared_experts.gate_proj.weight", (uint64_t)layer);
    if (!l->has_mlp && dsv3__st_find(&m->st, name.text))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL, "%s exists, but config.json has no n_shared_experts",
                          name.text);
    if (l->has_mlp)
        DSV3__TRY(dsv3__wt_mlp(m, &l->mlp, layer, "mlp.shared_experts",
                               (uint64_t)c->n_shared_experts * c->moe_intermediate_size, err));
    return DSV3_OK;
}

/* Is there a query latent? null and absent keys mean different things to different readers: the tensors decide. */
static dsv3_result dsv3__wt_q_lora(dsv3_model *m, dsv3_error *err)
{
    const dsv3__st_tensor *q_a = dsv3__st_find(&m->st, "model.layers.0.self_attn.q_a_proj.weight");
    if (!m->cfg.has_q_lora)
        m->config.q_lora_rank = q_a && q_a->rank == 2 && q_a->shape[0] <= 1u << 20 ? (uint32_t)q_a->shape[0] : 0;
    if (m->config.q_lora_rank && !q_a && dsv3__st_find(&m->st, "model.layers.0.self_attn.q_proj.weight"))
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: q_lora_rank is %u, but the checkpoint has q_proj, no q_a_proj",
                          (uint64_t)m->config.q_lora_rank);
    if (!m->config.q_lora_rank && q_a)
        return DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                          "config.json: q_lora_rank is null, but the checkpoint has q_a_proj");
    return DSV3_OK;
}

static dsv3_result dsv3__wt_layer(dsv3_model *m, uint32_t i, bool moe, dsv3_error *err)
{
    const dsv3_config *c = &m->config;
    dsv3__layer *l = &m->layers[i];
    DSV3__TRY(dsv3__wt_layer_tensor(m, &l->input_norm, i, "input_layernorm", c->hidden_size, 0, err));
    DSV3__TRY(dsv3__wt_layer_tensor(m, &l->post_norm, i, "post_attention_layernorm", c->hidden_size, 0, err));
    DSV3__TRY(dsv3__wt_attention(m, l, i, err));
    l->moe = moe;
    *(moe ? &m->any_moe : &m->any_dense) = true;
    if (moe)
        return dsv3__wt_moe(m, l, i, err);
    l->has_mlp = true;
    return dsv3__wt_mlp(m, &l->mlp, i, "mlp", c->intermediate_size, err);
}

/* Is model.layers.<layer>.<part>.weight there? */
static bool dsv3__wt_has(const dsv3_model *m, uint32_t layer, const char *part)
{
    dsv3__wt_name name;
    dsv3__format(name.text, sizeof name.text, "model.layers.%u.%s.weight", (uint64_t)layer, part);
    return dsv3__st_find(&m->st, name.text) != NULL;
}

/* How many layers of multi-token prediction can be used: those that config.json speaks of and the files hold, which some
   published sets leave out. One with experts where no other layer has them has no configuration, nor has the reverse. */
static uint32_t dsv3__wt_count_mtp(const dsv3_model *m)
{
    const dsv3_config *c = &m->config;
    uint32_t n = 0;
    while (n < c->num_nextn_predict_layers && n < DSV3__MTP_MAX) {
        bool moe = dsv3__wt_has(m, c->num_hidden_layers + n, "mlp.gate");
        if (!dsv3__wt_has(m, c->num_hidden_layers + n, "eh_proj") ||
            (moe ? !c->n_routed_experts : c->intermediate_size < 1 || c->intermediate_size > 1u << 24))
            break;
        n++;
    }
    return n;
}

/* Prediction layer k. Whether it has experts is seen by its tensors (JoyAI's is dense). Embedding and head are stored with
   it in DeepSeek's files, equal to the model's (README_WEIGHTS.md); what is left out is the model's. */
static dsv3_result dsv3__wt_mtp(dsv3_model *m, uint32_t k, dsv3_error *err)
{
    const dsv3_config *c = &m->config;
    const uint32_t i = c->num_hidden_layers + k;
    const uint64_t dim = c->hidden_size;
    dsv3__predictor *p = &m->mtp[k];
    p->embed = m->embed, p->head = m->head;
    DSV3__TRY(dsv3__wt_layer_tensor(m, &p->enorm, i, "enorm", dim, 0, err));
    DSV3__TRY(dsv3__wt_layer_tensor(m, &p->hnorm, i, "hnorm", dim, 0, err));
    DSV3__TRY(dsv3__wt_layer_tensor(m, &p->eh_proj, i, "eh_proj", dim, 2 * dim, err));
    DSV3__TRY(dsv3__wt_layer_tensor(m, &p->norm, i, "shared_head.norm", dim, 0, err));
    if (dsv3__wt_has(m, i, "embed_tokens"))
        DSV3__TRY(dsv3__wt_layer_tensor(m, &p->embed, i, "embed_tokens", c->vocab_size, dim, err));
    if (dsv3__wt_has(m, i, "shared_head.head"))
        DSV3__TRY(dsv3__wt_layer_tensor(m, &p->head, i, "shared_head.head", c->vocab_size, dim, err));
    return dsv3__wt_layer(m, i, dsv3__wt_has(m, i, "mlp.gate"), err);
}

static dsv3_result dsv3__wt_bind(dsv3_model *m, bool no_mtp, dsv3_error *err)
{
    const dsv3_config *c = &m->config;
    void *layers;
    m->st.i8_block[0] = (uint32_t)m->cfg.block[0];
    m->st.i8_block[1] = (uint32_t)m->cfg.block[1];
    DSV3__TRY(dsv3__wt_q_lora(m, err));
    DSV3__TRY(dsv3__wt_get(m, &m->embed, "model.embed_tokens.weight", c->vocab_size, c->hidden_size, err));
    DSV3__TRY(dsv3__wt_get(m, &m->norm, "model.norm.weight", c->hidden_size, 0, err));
    if (c->tie_word_embeddings)
        m->head = m->embed;
    else
        DSV3__TRY(dsv3__wt_get(m, &m->head, "lm_head.weight", c->vocab_size, c->hidden_size, err));
    m->n_mtp = no_mtp ? 0 : dsv3__wt_count_mtp(m);
    uint64_t bytes = (c->num_hidden_layers + m->n_mtp) * sizeof(dsv3__layer);
    DSV3__TRY(dsv3__mem_alloc(&m->mem, &layers, bytes, "layers", err));
    memset(layers, 0, (size_t)bytes);
    m->layers = (dsv3__layer *)layers;
    for (uint32_t i = 0; i < c->num_hidden_layers; i++)
        DSV3__TRY(dsv3__wt_layer(m, i, i >= c->first_k_dense_replace, err));
    for (uint32_t k = 0; k < m->n_mtp; k++)
        DSV3__TRY(dsv3__wt_mtp(m, k, err));
    return DSV3_OK;
}

/* Which forms normalised rows are wanted in. */
static void dsv3__wt_forms(dsv3_model *m)
{
    const dsv3_config *c = &m->config;
    m->forms = 1u << dsv3__mm_form(&m->mode, &m->head);
    for (uint32_t k = 0; k < m->n_mtp; k++)
        m->forms |= 1u << dsv3__mm_form(&m->mode, &m->mtp[k].head);
    for (uint32_t i = 0; i < c->num_hidden_layers + m->n_mtp; i++) {
        const dsv3__layer *l = &m->layers[i];
        m->forms |= 1u << dsv3__mm_form(&m->mode, &l->kv_a);
        m->forms |= 1u << dsv3__mm_form(&m->mode, c->q_lora_rank ? &l->q_a : &l->q_b);
        if (l->has_mlp)
            m->forms |= 1u << dsv3__mm_form(&m->mode, &l->mlp.gate) | 1u << dsv3__mm_form(&m->mode, &l->mlp.up);
        if (!l->moe)
            continue;
        m->forms |= 1u << dsv3__mm_form(&m->exact, &l->router);
        for (uint32_t e = 0; e < c->n_routed_experts; e++)
            m->forms |=
                1u << dsv3__mm_form(&m->mode, &l->experts[e].gate) | 1u << dsv3__mm_form(&m->mode, &l->experts[e].up);
    }
}

static void dsv3__wt_unbind(dsv3_model *m)
{
    for (uint32_t i = 0; m->layers && i < m->config.num_hidden_layers + m->n_mtp; i++)
        dsv3__mem_free(&m->mem, m->layers[i].experts);
    dsv3__mem_free(&m->mem, m->layers);
    for (uint64_t i = 0; i < m->st.n_tensors; i++)
        if (!m->st.shards[m->st.tensors[i].shard].file.data)
            dsv3__mem_free(&m->mem, m->st.tensors[i].data);
}

/* Has the tensor a value, or a scale, that is not finite? Only asked when logits were not. */
static bool dsv3__wt_is_bad(const dsv3_tensor *t)
{
    uint64_t cols = t->rank == 2 ? t->shape[1] : t->shape[0], rows = t->rank == 2 ? t->shape[0] : 1;
    for (uint64_t r = 0; r < rows; r++)
        for (uint64_t i = 0; i < cols; i++) {
            float v = dsv3__num_get((const uint8_t *)t->data + r * t->row_stride, t->dtype, i);
            if (!(v - v == 0))
                return true;
        }
    if (!t->scale)
        return false;
    for (uint64_t r = 0; r < dsv3__ceil_div(rows, t->block_rows); r++)
        for (uint64_t i = 0; i < dsv3__ceil_div(cols, t->block_cols); i++) {
            float v = dsv3__num_get(t->scale, t->scale_dtype, r * t->scale_stride + i);
            if (!(v - v == 0))
                return true;
        }
    return false;
}

/* Not a layer behind the last, as those of multi-token prediction are: logits do not come from them. */
static bool dsv3__wt_runs(const dsv3_model *m, const char *name)
{
    static const char layers[] = "model.layers.";
    uint64_t layer = 0;
    if (strncmp(name, layers, sizeof layers - 1) != 0)
        return true;
    for (const char *p = name + sizeof layers - 1; *p >= '0' && *p <= '9' && layer < 1u << 20; p++)
        layer = layer * 10 + (uint64_t)(*p - '0');
    return layer < m->config.num_hidden_layers;
}

/* Logits were not finite: which tensor is to blame? Reads all weights of the layers that run. Always an error. */
static dsv3_result dsv3__wt_blame(const dsv3_model *m, const uint32_t *cancel, dsv3_error *err)
{
    for (uint64_t i = 0; i < m->st.n_tensors; i++) {
        const dsv3__st_tensor *t = &m->st.tensors[i], *scale;
        dsv3_tensor view;
        dsv3_error ignored;
        if (dsv3__atomic_load(cancel))
            return DSV3__FAIL(err, DSV3_ERROR_CANCELLED,
                              "cancelled while searching for the weight that made logits not finite");
        if (!dsv3__wt_runs(m, t->name) || !t->data || (t->rank != 1 && t->rank != 2) ||
            dsv3__st_weight(&m->st, t, &view, &scale, &ignored) || dsv3__ten_check(&view, t->name, true, &ignored) ||
            !dsv3__wt_is_bad(&view))
            continue;
        return DSV3__FAIL(err, DSV3_ERROR_BAD_TENSOR, "%s: %s holds a value that is not finite: logits are lost",
                          m->st.shards[t->shard].name, t->name);
    }
    return DSV3__FAIL(
        err, DSV3_ERROR_BAD_TENSOR,
        "logits are not finite, though every weight is: activations overflow f32 (a scale of the wrong size?)");
}
// =============================================================================
// >>nn   What a layer is made of: normalisation, rotary positions, linear maps, gated MLPs, over n rows at once.
//        Needs: mm, thr, wt. Owns: the scratch of a pass (dsv3__work).
//        One function for one row and for many; a row's bits depend on no other row.
// =============================================================================

#define DSV3__STRIP      128 /* outputs a task computes, of several rows: those that share scales; of few rows half of it */
#define DSV3__HEAD_ROWS  16  /* rows, and */
#define DSV3__HEAD_GROUP 8   /* heads at most, that one attention task takes */
#define DSV3__UK_ROWS    16  /* rows of W_UK decoded at a time */
#define DSV3__KEY_BLOCK  64  /* positions between two looks at the running maximum: a page */
#define DSV3__KEY_SPAN   512 /* positions summed up before they are added to the rest */

/* Rows of one MLP: some rows of the batch go through it, with weights. */
typedef struct dsv3__mlp_group {
    const dsv3__mlp *mlp;
    const uint32_t *rows; /* [n] rows of the batch; NULL: 0 ... n - 1 */
    const float *weights; /* [n]; NULL: 1 */
    uint32_t n;
    uint32_t inter;
    uint32_t first_task; /* number of its first strip */
    uint32_t first_row;  /* rows of the groups before */
    float *h;            /* [n, h_stride] silu(gate) * up, then packed for `down` */
    size_t h_stride;
} dsv3__mlp_group;

/* Where a worker writes what only it reads. */
typedef struct dsv3__worker {
    float *panel;   /* [dsv3__mm_panel_floats(widest)] decoded weights, see >>mm */
    float *a, *b;   /* [max_batch, DSV3__STRIP] outputs of a strip */
    float *q;       /* [DSV3__HEAD_ROWS, DSV3__HEAD_GROUP, cache_stride] absorbed queries, then attended latents */
    float *u;       /* [DSV3__HEAD_ROWS, DSV3__HEAD_GROUP, kv_lora_rank] sums of each row */
    float *u_span;  /* the same, of one span of positions */
    float *row;     /* [widest] */
    float *score;   /* [DSV3__HEAD_GROUP, DSV3__KEY_BLOCK] */
    float *w_uk;    /* [DSV3__UK_ROWS, kv_lora_rank] */
    float *keys;    /* [DSV3__KEY_BLOCK, cache_stride] rows of the cache as f32: one about to be stored, a block read */
    uint8_t *taken; /* [n_routed_experts] the router's marks */
    float *choice;  /* [2, n_routed_experts] its scores */
} dsv3__worker;

/* Where one part of a cache row, the latent or k_pe, lies in a layer of a page. Offsets and strides in bytes. */
typedef struct dsv3__cache_part {
    dsv3_dtype dtype; /* F32, BF16, I8 */
    uint32_t n;       /* numbers of a position */
    uint64_t codes, scales;
    size_t code_row, scale_row; /* I8: an f32 for each DSV3__CACHE_BLOCK numbers; else 0 */
} dsv3__cache_part;

/* Scratch of a workspace. Strides are in floats and at least dsv3__mm_pad(width). */
typedef struct dsv3__work {
    const dsv3_model *m;
    dsv3__pool *pool;
    uint32_t max_batch;  /* rows at once */
    bool tiled;          /* this pass: how rows are packed, see >>mm, and */
    uint32_t strip;      /* the outputs of a task */
    size_t cache_stride; /* floats of a position: latent, k_pe, zeros to a multiple of 64 */
    /* the cache: see dsv3__mla_layout */
    uint8_t *cache; /* [pages, layers, layer_bytes] */
    uint64_t layer_bytes, page_bytes;
    bool plain; /* both parts f32: rows [DSV3_PAGE_TOKENS, cache_stride], read where they lie */
    dsv3__cache_part latent, rope_key;
    uint64_t *counts; /* [n_moe_layers, n_routed_experts] rows that went through each */
    size_t x_stride, q_a_stride, q_stride, kv_stride, o_stride, eh_stride;
    float *x;                /* [n, x_stride] the residual stream */
    float *xn[DSV3__FORMS];  /* [n, x_stride] normalised, in each form that m->forms names */
    float *norm;             /* [hidden_size or q_lora_rank or kv_lora_rank] the norm's weights as f32 */
    float *norm2;            /* the same, for a second norm of the step */
    float *q_a;              /* [n, q_a_stride] query latent */
    float *q;                /* [n, q_stride] queries of all heads: nope, then rope */
    float *kv;               /* [n, kv_stride] latent and k_pe before norm and rotation */
    float *o;                /* [n, o_stride] attention's values of all heads */
    float *eh;               /* [n, eh_stride] embedding and state that meet in eh_proj, >>mtp */
    float *rope;             /* [n, qk_rope_head_dim] cos of each pair, then sin */
    float *router;           /* [n, n_routed_experts] router logits */
    float *router_bias;      /* [n_routed_experts] the layer's, as f32 */
    float *h;                /* dense: [n, pad(inter)]; MoE: [n * top_k, pad(moe_inter)], then the shared expert's */
    uint32_t *choice;        /* [n, top_k] chosen experts, ascending */
    float *choice_weight;    /* [n, top_k] */
    uint32_t *slot_rows;     /* [n * top_k] rows, by expert */
    float *slot_weights;     /* [n * top_k] */
    uint32_t *expert_first;  /* [n_routed_experts + 1] */
    dsv3__mlp_group *groups; /* [n_routed_experts + 1] */
    dsv3__worker *workers;   /* [n_threads] */
} dsv3__work;

/* Takes `count` things of `size` bytes from the plan; base NULL only measures. What does not fit 63 bits stays "too much"
   (DSV3__CARVE_FULL), which no allocator has. */
#define DSV3__CARVE_FULL ((uint64_t)1 << 62)

static void *dsv3__carve(uint8_t *base, uint64_t *used, uint64_t count, uint64_t size)
{
    void *p = base ? base + *used : NULL;
    uint64_t bytes;
    if (!dsv3__mul(count, size, &bytes) || bytes >= DSV3__CARVE_FULL || *used >= DSV3__CARVE_FULL)
        *used = DSV3__CARVE_FULL;
    else
        *used += (bytes + 63) & ~(uint64_t)63;
    return p;
}

static size_t dsv3__work_widest(const dsv3_model *m)
{
    const dsv3_config *c = &m->config;
    size_t widest = (size_t)c->hidden_size * (m->n_mtp ? 2 : 1), v = (size_t)c->num_attention_heads * c->v_head_dim;
    size_t inter = m->any_dense ? c->intermediate_size : 0;
    size_t shared = (size_t)c->n_shared_experts * c->moe_intermediate_size;
    widest = widest > v ? widest : v;
    widest = widest > inter ? widest : inter;
    widest = widest > shared ? widest : shared;
    widest = widest > c->moe_intermediate_size ? widest : c->moe_intermediate_size;
    widest = widest > c->q_lora_rank ? widest : c->q_lora_rank;
    return widest > c->kv_lora_rank ? widest : c->kv_lora_rank;
}

/* Lays the scratch out in `base`; returns the bytes it takes. No overflow in the products written here: max_batch <= 2^16,
   top_k <= 2^12, widths <= 2^24 (>>cfg); dsv3__carve looks after the rest. */
static uint64_t dsv3__work_plan(dsv3__work *w, const dsv3_model *m, uint32_t max_batch, uint32_t n_threads,
                                uint8_t *base)
{
    const dsv3_config *c = &m->config;
    const uint64_t f = sizeof(float), n = max_batch;
    uint64_t used = 0, h_moe = 0, h_dense = 0, slots = n * c->num_experts_per_tok, experts = c->n_routed_experts;
    bool moe = m->any_moe;
    size_t widest = dsv3__work_widest(m);
    memset(w, 0, sizeof *w);
    w->m = m;
    w->max_batch = max_batch;
    w->cache_stride = ((size_t)c->kv_lora_rank + c->qk_rope_head_dim + 63) / 64 * 64;
    w->x_stride = dsv3__mm_pad(c->hidden_size);
    w->q_a_stride = c->q_lora_rank ? dsv3__mm_pad(c->q_lora_rank) : 0;
    w->q_stride = (size_t)c->num_attention_heads * (c->qk_nope_head_dim + c->qk_rope_head_dim);
    w->kv_stride = dsv3__mm_pad((size_t)c->kv_lora_rank + c->qk_rope_head_dim);
    w->o_stride = dsv3__mm_pad((size_t)c->num_attention_heads * c->v_head_dim);
    w->eh_stride = m->n_mtp ? dsv3__mm_pad(2 * (size_t)c->hidden_size) : 0;
    if (!moe)
        slots = experts = 0;
    if (moe)
        h_moe = slots * dsv3__mm_pad(c->moe_intermediate_size) +
                n * (c->n_shared_experts ? dsv3__mm_pad((size_t)c->n_shared_experts * c->moe_intermediate_size) : 0);
    if (m->any_dense)
        h_dense = n * dsv3__mm_pad(c->intermediate_size);
    w->x = (float *)dsv3__carve(base, &used, n * w->x_stride, f);
    for (uint32_t form = 0; form < DSV3__FORMS; form++)
        if (m->forms >> form & 1)
            w->xn[form] = (float *)dsv3__carve(base, &used, n * w->x_stride, f);
    w->norm = (float *)dsv3__carve(base, &used, widest, f);
    w->norm2 = (float *)dsv3__carve(base, &used, widest, f);
    w->q_a = (float *)dsv3__carve(base, &used, n * w->q_a_stride, f);
    w->q = (float *)dsv3__carve(base, &used, n * w->q_stride, f);
    w->kv = (float *)dsv3__carve(base, &used, n * w->kv_stride, f);
    w->o = (float *)dsv3__carve(base, &used, n * w->o_stride, f);
    w->eh = (float *)dsv3__carve(base, &used, n * w->eh_stride, f);
    w->rope = (float *)dsv3__carve(base, &used, n * c->qk_rope_head_dim, f);
    w->h = (float *)dsv3__carve(base, &used, h_moe > h_dense ? h_moe : h_dense, f);
    w->router = (float *)dsv3__carve(base, &used, n * experts, f);
    w->router_bias = (float *)dsv3__carve(base, &used, experts, f);
    w->choice = (uint32_t *)dsv3__carve(base, &used, slots, sizeof(uint32_t));
    w->choice_weight = (float *)dsv3__carve(base, &used, slots, f);
    w->slot_rows = (uint32_t *)dsv3__carve(base, &used, slots, sizeof(uint32_t));
    w->slot_weights = (float *)dsv3__carve(base, &used, slots, f);
    w->expert_first = (uint32_t *)dsv3__carve(base, &used, experts + 1, sizeof(uint32_t));
    w->groups = (dsv3__mlp_group *)dsv3__carve(base, &used, experts + 1, sizeof(dsv3__mlp_group));
    w->workers = (dsv3__worker *)dsv3__carve(base, &used, n_threads, sizeof(dsv3__worker));
    for (uint32_t i = 0; i < n_threads; i++) {
        dsv3__worker t;
        t.panel = (float *)dsv3__carve(base, &used, dsv3__mm_panel_floats(widest), f);
        t.a = (float *)dsv3__carve(base, &used, n * DSV3__STRIP, f);
        t.b = (float *)dsv3__carve(base, &used, n * DSV3__STRIP, f);
        t.q = (float *)dsv3__carve(base, &used, (uint64_t)DSV3__HEAD_ROWS * DSV3__HEAD_GROUP * w->cache_stride, f);
        t.u = (float *)dsv3__carve(base, &used, (uint64_t)DSV3__HEAD_ROWS * DSV3__HEAD_GROUP * c->kv_lora_rank, f);
        t.u_span = (float *)dsv3__carve(base, &used, (uint64_t)DSV3__HEAD_ROWS * DSV3__HEAD_GROUP * c->kv_lora_rank, f);
        t.row = (float *)dsv3__carve(base, &used, widest, f);
        t.score = (float *)dsv3__carve(base, &used, DSV3__HEAD_GROUP * DSV3__KEY_BLOCK, f);
        t.w_uk = (float *)dsv3__carve(base, &used, (uint64_t)DSV3__UK_ROWS * c->kv_lora_rank, f);
        t.keys = (float *)dsv3__carve(base, &used, DSV3__KEY_BLOCK * w->cache_stride, f);
        t.taken = (uint8_t *)dsv3__carve(base, &used, experts, 1);
        t.choice = (float *)dsv3__carve(base, &used, experts * 2, f);
        if (base)
            w->workers[i] = t;
    }
    return used;
}

// ---- Linear maps -----------------------------------------------------------------------------------------

/* out [n, rows of w] = x times the transposed w, or added to out. */
typedef struct dsv3__linear {
    const dsv3__mm_mode *mode;
    const dsv3_tensor *w;
    const float *x; /* [n, x_stride] packed for w */
    size_t x_stride;
    float *out;
    size_t out_stride;
    bool add;
} dsv3__linear;

typedef struct dsv3__linear_task {
    dsv3__work *w;
    const dsv3__linear *maps;
    uint32_t n_maps, n;
} dsv3__linear_task;

static void dsv3__nn_linear_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__linear_task *t = (const dsv3__linear_task *)ctx;
    const dsv3__linear *map = t->maps;
    dsv3__worker *mine = &t->w->workers[worker];
    uint32_t strips;
    while (task >= (strips = (uint32_t)dsv3__ceil_div(map->w->shape[0], t->w->strip)))
        task -= strips, map++;
    uint64_t r0 = (uint64_t)task * t->w->strip,
             r1 = r0 + t->w->strip < map->w->shape[0] ? r0 + t->w->strip : map->w->shape[0];
    if (!map->add) {
        dsv3__mm_strip(map->mode, mine->panel, map->w, r0, r1, map->x, map->x_stride, NULL, t->n, t->w->tiled,
                       map->out + r0, map->out_stride);
        return;
    }
    dsv3__mm_strip(map->mode, mine->panel, map->w, r0, r1, map->x, map->x_stride, NULL, t->n, t->w->tiled, mine->a,
                   DSV3__STRIP);
    for (uint32_t i = 0; i < t->n; i++)
        for (uint64_t r = r0; r < r1; r++)
            map->out[i * map->out_stride + r] += mine->a[i * DSV3__STRIP + (r - r0)];
}

/* Independent maps of the same n rows, one join for all. */
static void dsv3__nn_linear(dsv3__work *w, const dsv3__linear *maps, uint32_t n_maps, uint32_t n)
{
    dsv3__linear_task t;
    uint64_t tasks = 0;
    t.w = w, t.maps = maps, t.n_maps = n_maps, t.n = n;
    for (uint32_t i = 0; i < n_maps; i++)
        tasks += dsv3__ceil_div(maps[i].w->shape[0], w->strip);
    dsv3__pool_run(w->pool, (uint32_t)tasks, dsv3__nn_linear_task, &t);
}

// ---- RMSNorm ---------------------------------------------------------------------------------------------

/* y = weight * (x / sqrt(mean(x^2) + eps)), all in f32; eps is added to the mean, inside the root. y may be x. */
static void dsv3__nn_rmsnorm_row(const dsv3__kern *k, float *y, const float *x, const float *weight, size_t n,
                                 float eps)
{
    float r = 1.0f / sqrtf(k->dot_f32(x, x, NULL, n) / (float)n + eps);
    for (size_t i = 0; i < n; i++)
        y[i] = weight[i] * (x[i] * r);
}

typedef struct dsv3__norm_task {
    dsv3__work *w;
    float eps;
    uint32_t n;
} dsv3__norm_task;

static void dsv3__nn_rmsnorm_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__norm_task *t = (const dsv3__norm_task *)ctx;
    dsv3__work *w = t->w;
    const size_t dim = w->m->config.hidden_size;
    float *y = w->workers[worker].row;
    dsv3__nn_rmsnorm_row(w->m->k, y, w->x + i * w->x_stride, w->norm, dim, t->eps);
    for (uint32_t form = 0; form < DSV3__FORMS; form++)
        if (w->m->forms >> form & 1)
            dsv3__mm_pack(&w->m->mode, w->xn[form] + i * w->x_stride, y, dim, (dsv3__form)form, w->tiled);
}

/* x -> xn, n rows. weight [hidden_size] */
static void dsv3__nn_rmsnorm(dsv3__work *w, const dsv3_tensor *weight, float eps, uint32_t n)
{
    dsv3__norm_task t;
    t.w = w, t.eps = eps, t.n = n;
    dsv3__ten_row_values(w->m->k, w->norm, weight, 0);
    dsv3__pool_run(w->pool, n, dsv3__nn_rmsnorm_task, &t);
}

/* The normalised rows as this weight wants them. */
static const float *dsv3__nn_input(const dsv3__work *w, const dsv3__mm_mode *mode, const dsv3_tensor *weight)
{
    return w->xn[dsv3__mm_form(mode, weight)];
}

/* A row that only this weight will read takes the form it wants. */
static void dsv3__nn_pack(dsv3__work *w, uint32_t worker, float *row, const dsv3__mm_mode *mode,
                          const dsv3_tensor *weight, bool tiled)
{
    const size_t cols = (size_t)dsv3__ten_n_cols(weight);
    memcpy(w->workers[worker].row, row, cols * sizeof(float));
    dsv3__mm_pack(mode, row, w->workers[worker].row, cols, dsv3__mm_form(mode, weight), tiled);
}

// ---- Rotary positions ------------------------------------------------------------------------------------

/* g of YaRN: how much attention is sharpened for a context stretched by `factor`. */
static double dsv3__nn_yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

/* Inverse frequencies [rope / 2], the amplitude of cos and sin, and the softmax scale (YaRN as in the
   DeepSeek-V2 paper, section 3.1.4). Roundings to
   f32 follow transformers' _compute_yarn_parameters: at position 10^5 a last bit of a frequency is a visible angle. */
static void dsv3__nn_rope_setup(dsv3_model *m)
{
    const dsv3_config *c = &m->config;
    const uint32_t dim = c->qk_rope_head_dim;
    double low = 0, high = 0, pi = 3.14159265358979323846;
    if (c->rope_yarn) {
        double l0 = c->rope_original_max_position_embeddings, base = 2 * log(c->rope_theta);
        low = floor(dim * log(l0 / (c->rope_beta_fast * 2 * pi)) / base);
        high = ceil(dim * log(l0 / (c->rope_beta_slow * 2 * pi)) / base);
        low = low > 0 ? low : 0;
        high = high < dim - 1.0 ? high : dim - 1.0;
        if (low == high)
            high += 0.001;
    }
    for (uint32_t i = 0; i < dim / 2; i++) {
        float power = (float)pow(c->rope_theta, (double)((float)(2 * i) / (float)dim)), plain = 1.0f / power;
        m->inv_freq[i] = plain;
        if (c->rope_yarn) {
            float ramp = ((float)i - (float)low) / (float)(high - low);
            ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
            float keep = 1.0f - ramp, stretched = 1.0f / ((float)c->rope_factor * power);
            m->inv_freq[i] = stretched * (1.0f - keep) + plain * keep;
        }
    }
    double amplitude = 1, sharpen = 1;
    if (c->rope_yarn) {
        if (c->rope_attention_factor != 0)
            amplitude = c->rope_attention_factor;
        else if (c->rope_mscale != 0 && c->rope_mscale_all_dim != 0)
            amplitude = dsv3__nn_yarn_mscale(c->rope_factor, c->rope_mscale) /
                        dsv3__nn_yarn_mscale(c->rope_factor, c->rope_mscale_all_dim);
        else
            amplitude = dsv3__nn_yarn_mscale(c->rope_factor, 1);
        if (c->rope_mscale_all_dim != 0)
            sharpen = dsv3__nn_yarn_mscale(c->rope_factor, c->rope_mscale_all_dim);
    }
    m->rope_amplitude = (float)amplitude;
    m->softmax_scale = (float)(sharpen * sharpen / sqrt((double)c->qk_nope_head_dim + c->qk_rope_head_dim));
}

/* table [rope] = cos of each pair, then sin. The angle is rounded to f32, as the reference's is; cos and sin are double
   libm rounded to f32, so that the table is the same on every platform. */
static void dsv3__nn_rope_table(const dsv3_model *m, float *table, uint32_t position)
{
    const uint32_t half = m->config.qk_rope_head_dim / 2;
    for (uint32_t i = 0; i < half; i++) {
        float angle = (float)position * m->inv_freq[i];
        table[i] = (float)cos((double)angle) * m->rope_amplitude;
        table[half + i] = (float)sin((double)angle) * m->rope_amplitude;
    }
}

/* Rotates v [rope] into out. DeepSeek's pairs are neighbours (2i, 2i + 1); rope_interleave false: (i, i + rope / 2). */
static void dsv3__nn_rope(const dsv3_model *m, float *out, const float *v, const float *table)
{
    const uint32_t half = m->config.qk_rope_head_dim / 2;
    const bool neighbours = m->config.rope_interleave;
    for (uint32_t i = 0; i < half; i++) {
        uint32_t a = neighbours ? 2 * i : i, b = neighbours ? 2 * i + 1 : i + half;
        float cosine = table[i], sine = table[half + i], va = v[a], vb = v[b];
        out[a] = va * cosine - vb * sine;
        out[b] = vb * cosine + va * sine;
    }
}

// ---- Gated MLPs ------------------------------------------------------------------------------------------

typedef struct dsv3__mlp_task {
    dsv3__work *w;
    const dsv3__mlp_group *groups;
    uint32_t n_groups, n;
} dsv3__mlp_task;

/* One strip of one group: h = silu(gate x) * (up x). */
static void dsv3__nn_mlp_up_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__mlp_task *t = (const dsv3__mlp_task *)ctx;
    const dsv3_model *m = t->w->m;
    dsv3__worker *mine = &t->w->workers[worker];
    uint32_t lo = 0, hi = t->n_groups; /* the last group whose first_task <= task */
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if (t->groups[mid].first_task <= task)
            lo = mid;
        else
            hi = mid;
    }
    const dsv3__mlp_group *g = &t->groups[lo];
    const dsv3__mlp *mlp = g->mlp;
    const uint32_t strip = t->w->strip, r0 = (task - g->first_task) * strip;
    const uint32_t r1 = r0 + strip < g->inter ? r0 + strip : g->inter;
    const size_t stride = t->w->x_stride;
    dsv3__mm_strip(&m->mode, mine->panel, &mlp->gate, r0, r1, dsv3__nn_input(t->w, &m->mode, &mlp->gate), stride,
                   g->rows, g->n, t->w->tiled, mine->a, DSV3__STRIP);
    dsv3__mm_strip(&m->mode, mine->panel, &mlp->up, r0, r1, dsv3__nn_input(t->w, &m->mode, &mlp->up), stride, g->rows,
                   g->n, t->w->tiled, mine->b, DSV3__STRIP);
    for (uint32_t i = 0; i < g->n; i++)
        m->k->swiglu(g->h + i * g->h_stride + r0, mine->a + i * DSV3__STRIP, mine->b + i * DSV3__STRIP, r1 - r0);
}

/* One row of one group: h as `down` wants it, which may need the whole row. */
static void dsv3__nn_mlp_pack_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__mlp_task *t = (const dsv3__mlp_task *)ctx;
    uint32_t lo = 0, hi = t->n_groups; /* the last group whose first_row <= task */
    while (hi - lo > 1) {
        uint32_t mid = (lo + hi) / 2;
        if (t->groups[mid].first_row <= task)
            lo = mid;
        else
            hi = mid;
    }
    const dsv3__mlp_group *g = &t->groups[lo];
    dsv3__nn_pack(t->w, worker, g->h + (task - g->first_row) * g->h_stride, &t->w->m->mode, &g->mlp->down,
                  g->n > DSV3__MM_FEW);
}

/* One strip of outputs over all groups: x += the sum of weight * (down h), groups in order, a row at a time complete. */
static void dsv3__nn_mlp_down_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__mlp_task *t = (const dsv3__mlp_task *)ctx;
    dsv3__work *w = t->w;
    dsv3__worker *mine = &w->workers[worker];
    const uint32_t dim = w->m->config.hidden_size, r0 = task * w->strip;
    const uint32_t r1 = r0 + w->strip < dim ? r0 + w->strip : dim;
    float *sum = mine->b; /* [n, DSV3__STRIP] */
    memset(sum, 0, (size_t)t->n * DSV3__STRIP * sizeof(float));
    for (uint32_t j = 0; j < t->n_groups; j++) {
        const dsv3__mlp_group *g = &t->groups[j];
        dsv3__mm_strip(&w->m->mode, mine->panel, &g->mlp->down, r0, r1, g->h, g->h_stride, NULL, g->n,
                       g->n > DSV3__MM_FEW, mine->a, DSV3__STRIP);
        for (uint32_t i = 0; i < g->n; i++) {
            float *to = sum + (size_t)(g->rows ? g->rows[i] : i) * DSV3__STRIP,
                  *from = mine->a + (size_t)i * DSV3__STRIP;
            float weight = g->weights ? g->weights[i] : 1.0f;
            for (uint32_t r = 0; r < r1 - r0; r++)
                to[r] += weight * from[r];
        }
    }
    for (uint32_t i = 0; i < t->n; i++)
        for (uint32_t r = r0; r < r1; r++)
            w->x[i * w->x_stride + r] += sum[i * DSV3__STRIP + (r - r0)];
}

/* x += all groups, n rows; xn holds the normalised rows. Three joins, however many experts. */
static void dsv3__nn_mlp(dsv3__work *w, dsv3__mlp_group *groups, uint32_t n_groups, uint32_t n)
{
    dsv3__mlp_task t;
    uint32_t tasks = 0, n_rows = 0;
    t.w = w, t.groups = groups, t.n_groups = n_groups, t.n = n;
    for (uint32_t i = 0; i < n_groups; i++) {
        groups[i].first_task = tasks;
        groups[i].first_row = n_rows;
        n_rows += groups[i].n;
        tasks += (groups[i].inter + w->strip - 1) / w->strip;
    }
    dsv3__pool_run(w->pool, tasks, dsv3__nn_mlp_up_task, &t);
    dsv3__pool_run(w->pool, n_rows, dsv3__nn_mlp_pack_task, &t);
    dsv3__pool_run(w->pool, (w->m->config.hidden_size + w->strip - 1) / w->strip, dsv3__nn_mlp_down_task, &t);
}
// =============================================================================
// >>mla   Multi-head latent attention, absorbed form (DeepSeek-V2 paper, section 2.1). Needs: nn.
//         In: normalised rows. Out: x += attention. Owns the layout of a cache row: the latent after its norm
//         [kv_lora_rank], k_pe after its rotation [qk_rope_head_dim], zeros to a multiple of 64. One row serves all heads.
//         Rows lie in pages of DSV3_PAGE_TOKENS positions, all layers of them together; each part in its own number format.
//         Absorbed is the only form: W_UK goes to the query's side, W_UV behind the sum over positions, so that keys and
//         values are never expanded and bits depend on tokens and positions alone.
// =============================================================================

#define DSV3__CACHE_BLOCK 64 /* numbers that share a scale, in 8 bits */

/* One row of a pass: which timeline, which position, which token. */
typedef struct dsv3__row {
    const uint32_t *pages; /* the timeline: page of positions 64 i ... 64 i + 63 */
    uint32_t position;
    int32_t token;
    bool cached;            /* its cache rows are there already, and stay untouched */
    float *logits;          /* [vocab_size] out; NULL: not asked for */
    int32_t *experts;       /* [n_moe_layers, top_k] out; NULL */
    const uint32_t *cancel; /* atomic: not 0 stops the pass */
    uint32_t shift;         /* of a prediction layer: its cache row is that of the token it takes in, so far ahead */
    const float *below;     /* [hidden_size] the state a prediction layer starts from; >>mtp alone */
    float *state;           /* [hidden_size] out, the state behind the last norm; NULL. May be `below` */
    bool draft;             /* nobody has asked for this token yet: logits that are not finite are no failure yet */
} dsv3__row;

typedef struct dsv3__mla_task {
    dsv3__work *w;
    const dsv3__layer *l;
    const dsv3__row *rows;
    uint32_t layer, n;
    uint32_t group; /* heads a task takes */
} dsv3__mla_task;

// ---- The cache -------------------------------------------------------------------------------------------

static void dsv3__mla_part(dsv3__cache_part *p, dsv3_cache type, uint32_t n, uint64_t *used)
{
    p->dtype = type == DSV3_CACHE_I8 ? DSV3_DTYPE_I8 : type == DSV3_CACHE_BF16 ? DSV3_DTYPE_BF16 : DSV3_DTYPE_F32;
    p->n = n;
    p->codes = *used;
    p->code_row = n * dsv3_dtype_size(p->dtype);
    *used += ((uint64_t)p->code_row * DSV3_PAGE_TOKENS + 63) & ~(uint64_t)63;
    p->scales = *used;
    p->scale_row = type == DSV3_CACHE_I8 ? (size_t)dsv3__ceil_div(n, DSV3__CACHE_BLOCK) * sizeof(float) : 0;
    *used += ((uint64_t)p->scale_row * DSV3_PAGE_TOKENS + 63) & ~(uint64_t)63;
}

/* How a page is laid out. Of f32 alone a layer is rows [DSV3_PAGE_TOKENS, cache_stride]; else it has the latents' codes,
   their scales, then the same of k_pe. No type is AUTO. */
static void dsv3__mla_layout(dsv3__work *w, dsv3_cache latent, dsv3_cache rope_key, uint32_t n_layers)
{
    const dsv3_config *c = &w->m->config;
    w->plain = latent == DSV3_CACHE_F32 && rope_key == DSV3_CACHE_F32;
    w->layer_bytes = 0;
    dsv3__mla_part(&w->latent, latent, c->kv_lora_rank, &w->layer_bytes);
    dsv3__mla_part(&w->rope_key, rope_key, c->qk_rope_head_dim, &w->layer_bytes);
    if (w->plain) {
        w->latent.code_row = w->rope_key.code_row = w->cache_stride * sizeof(float);
        w->rope_key.codes = c->kv_lora_rank * sizeof(float);
        w->rope_key.n = (uint32_t)w->cache_stride - c->kv_lora_rank; /* with the zeros behind it */
        w->layer_bytes = (uint64_t)w->latent.code_row * DSV3_PAGE_TOKENS;
    }
    w->page_bytes = w->layer_bytes * n_layers;
}

/* Piece i of the four that hold rows in a layer (codes and scales of the latent, of k_pe): where its row 0 is; returns the
   bytes of a row, 0 where there is no such piece. */
static size_t dsv3__mla_piece(const dsv3__work *w, uint32_t i, uint64_t *offset)
{
    const dsv3__cache_part *p = i < 2 ? &w->latent : &w->rope_key;
    *offset = i % 2 ? p->scales : p->codes;
    if (w->plain && i > 0) /* one piece: the rows */
        return 0;
    return i % 2 ? p->scale_row : p->code_row;
}

/* The layer's part of the page that holds a position. */
DSV3__INLINE uint8_t *dsv3__mla_page(const dsv3__work *w, const dsv3__row *row, uint32_t layer, uint32_t position)
{
    return w->cache + row->pages[position / DSV3_PAGE_TOKENS] * w->page_bytes + layer * w->layer_bytes;
}

/* v [p->n] becomes row `slot` of the part. A function of v alone. Of 8 bits: each block as to_bytes makes it, so what is
   not finite stays not finite. */
static void dsv3__mla_store(const dsv3__kern *k, const dsv3__cache_part *p, uint8_t *page, uint32_t slot,
                            const float *v)
{
    uint8_t *codes = page + p->codes + slot * p->code_row;
    float *scales = (float *)(void *)(page + p->scales + slot * p->scale_row);
    if (p->dtype == DSV3_DTYPE_F32) {
        memcpy(codes, v, p->n * sizeof(float));
        return;
    }
    if (p->dtype == DSV3_DTYPE_BF16) {
        uint16_t *halves = (uint16_t *)(void *)codes;
        for (uint32_t i = 0; i < p->n; i++)
            halves[i] = dsv3__bf16_encode(v[i]);
        return;
    }
    for (uint32_t i = 0; i < p->n; i += DSV3__CACHE_BLOCK) {
        int32_t sum;
        scales[i / DSV3__CACHE_BLOCK] =
            k->to_bytes((int8_t *)codes + i, v + i, dsv3__min(p->n - i, DSV3__CACHE_BLOCK), &sum);
    }
}

/* out [count rows, stride] = rows 0 ... count - 1 of the part. */
static void dsv3__mla_fetch(const dsv3__kern *k, const dsv3__cache_part *p, const uint8_t *page, uint32_t count,
                            float *out, size_t stride)
{
    dsv3_tensor t;
    memset(&t, 0, sizeof t);
    t.data = page + p->codes;
    t.dtype = p->dtype;
    t.rank = 2;
    t.shape[0] = count, t.shape[1] = p->n;
    t.row_stride = p->code_row;
    if (p->scale_row) {
        t.scale = page + p->scales;
        t.scale_dtype = DSV3_DTYPE_F32;
        t.block_rows = 1, t.block_cols = DSV3__CACHE_BLOCK;
        t.scale_stride = p->scale_row / sizeof(float);
    }
    for (uint32_t i = 0; i < count; i++)
        dsv3__ten_row_values(k, out + i * stride, &t, i);
}

/* Rows 0 ... count - 1 of a page as f32 [count, cache_stride]: where they lie, or decoded into the worker's `keys`. */
static const float *dsv3__mla_keys(const dsv3__work *w, dsv3__worker *mine, const uint8_t *page, uint32_t count)
{
    const size_t used = (size_t)w->latent.n + w->rope_key.n;
    if (w->plain)
        return (const float *)(const void *)page;
    dsv3__mla_fetch(w->m->k, &w->latent, page, count, mine->keys, w->cache_stride);
    dsv3__mla_fetch(w->m->k, &w->rope_key, page, count, mine->keys + w->latent.n, w->cache_stride);
    for (uint32_t i = 0; i < count; i++)
        memset(mine->keys + i * w->cache_stride + used, 0, (w->cache_stride - used) * sizeof(float));
    return mine->keys;
}

// ---- Attention -------------------------------------------------------------------------------------------

/* Of one row: the query latent is normalised (in place); the cache row is written: the latent normalised, k_pe rotated. */
static void dsv3__mla_latent_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__mla_task *t = (const dsv3__mla_task *)ctx;
    dsv3__work *w = t->w;
    const dsv3_config *c = &w->m->config;
    const float latent_eps = 1e-6f; /* whatever rms_norm_eps says: as transformers and the shipped code have it */
    const float *kv = w->kv + i * w->kv_stride;
    const dsv3__row *row = &t->rows[i];
    float *key = w->workers[worker].keys;
    if (c->q_lora_rank) {
        float *q_a = w->q_a + i * w->q_a_stride;
        dsv3__nn_rmsnorm_row(w->m->k, q_a, q_a, w->norm, c->q_lora_rank, latent_eps);
        dsv3__nn_pack(w, worker, q_a, &w->m->mode, &t->l->q_b, w->tiled);
    }
    if (row->cached)
        return;
    dsv3__nn_rmsnorm_row(w->m->k, key, kv, w->norm2, c->kv_lora_rank, latent_eps);
    dsv3__nn_rope(w->m, key + c->kv_lora_rank, kv + c->kv_lora_rank, w->rope + i * c->qk_rope_head_dim);
    for (size_t j = (size_t)c->kv_lora_rank + c->qk_rope_head_dim; j < w->cache_stride; j++)
        key[j] = 0;
    const uint32_t at = row->position + row->shift;
    uint8_t *page = dsv3__mla_page(w, row, t->layer, at);
    dsv3__mla_store(w->m->k, &w->latent, page, at % DSV3_PAGE_TOKENS, key);
    dsv3__mla_store(w->m->k, &w->rope_key, page, at % DSV3_PAGE_TOKENS, key + c->kv_lora_rank);
}

/* q [rows, group, cache_stride] = W_UK^T q_nope, then q_pe rotated: what meets the cache rows. */
static void dsv3__mla_absorb(const dsv3__mla_task *t, dsv3__worker *mine, uint32_t row0, uint32_t n_rows, uint32_t h0,
                             uint32_t n_heads)
{
    const dsv3__work *w = t->w;
    const dsv3_config *c = &w->m->config;
    const uint32_t nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim, latent = c->kv_lora_rank;
    const size_t head_stride = t->group * w->cache_stride; /* from a row's query to the next row's */
    memset(mine->q, 0, n_rows * head_stride * sizeof(float));
    for (uint32_t j = 0; j < n_heads; j++) {
        float *q = mine->q + j * w->cache_stride;
        const float *from = w->q + row0 * w->q_stride + (size_t)(h0 + j) * (nope + rope);
        uint64_t w_uk = (uint64_t)(h0 + j) * (nope + c->v_head_dim); /* row of kv_b */
        for (uint32_t i = 0; i < nope; i += DSV3__UK_ROWS) {
            uint32_t count = nope - i < DSV3__UK_ROWS ? nope - i : DSV3__UK_ROWS;
            for (uint32_t r = 0; r < count; r++)
                dsv3__ten_row_values(w->m->k, mine->w_uk + (size_t)r * latent, &t->l->kv_b, w_uk + i + r);
            w->m->k->outer(q, head_stride, n_rows, from + i, w->q_stride, mine->w_uk, latent, count, latent);
        }
        for (uint32_t i = 0; i < n_rows; i++)
            dsv3__nn_rope(w->m, q + i * head_stride + latent, from + i * w->q_stride + nope,
                          w->rope + (row0 + i) * rope);
    }
}

/* The running softmax of a head: sum and the latents in `u` are relative to exp(max). */
typedef struct dsv3__mla_sum {
    float max[DSV3__HEAD_GROUP], sum[DSV3__HEAD_GROUP];
} dsv3__mla_sum;

/* Brings head j to a new, larger maximum. u [kv_lora_rank] */
static void dsv3__mla_rescale(dsv3__mla_sum *s, uint32_t j, float *u, uint32_t latent, float max)
{
    float shrink = dsv3__exp(s->max[j] - max); /* 0 when there was nothing yet */
    s->max[j] = max;
    s->sum[j] *= shrink;
    for (uint32_t i = 0; i < latent; i++)
        u[i] *= shrink;
}

static void dsv3__mla_clear(dsv3__mla_sum *s, float *u, uint32_t n_heads, uint32_t latent)
{
    memset(u, 0, (size_t)n_heads * latent * sizeof(float));
    for (uint32_t j = 0; j < n_heads; j++)
        s->max[j] = -INFINITY, s->sum[j] = 0;
}

/* Adds the cache rows t0 ... t0 + count - 1 of the row's timeline, count <= DSV3__KEY_BLOCK; of the first `shift` there are
   none. q [n_heads, cache_stride], u [n_heads, kv_lora_rank] */
static void dsv3__mla_block(const dsv3__mla_task *t, dsv3__worker *mine, const dsv3__row *row, const float *q,
                            uint32_t n_heads, uint32_t t0, uint32_t count, dsv3__mla_sum *s, float *u)
{
    const dsv3__work *w = t->w;
    const dsv3__kern *k = w->m->k;
    const uint32_t latent = w->m->config.kv_lora_rank, none = t0 ? 0 : row->shift;
    const float *cache =
        dsv3__mla_keys(w, mine, dsv3__mla_page(w, row, t->layer, t0), count); /* [count, cache_stride] */
    cache += none * w->cache_stride, count -= none;
    k->tile(mine->score, DSV3__KEY_BLOCK, cache, w->cache_stride, count, q, w->cache_stride, NULL, n_heads,
            w->cache_stride);
    for (uint32_t j = 0; j < n_heads; j++) {
        float *score = mine->score + j * DSV3__KEY_BLOCK, max = -INFINITY;
        for (uint32_t i = 0; i < count; i++) {
            score[i] *= w->m->softmax_scale;
            max = score[i] > max ? score[i] : max;
        }
        if (max > s->max[j])
            dsv3__mla_rescale(s, j, u + j * latent, latent, max);
        s->sum[j] += k->exp_sum(score, count, s->max[j]);
    }
    k->outer(u, latent, n_heads, mine->score, DSV3__KEY_BLOCK, cache, w->cache_stride, count, latent);
}

/* Softmax over positions 0 ... each row's own, of the latents: row i's q [n_heads, cache_stride] in, its first kv_lora_rank
   floats out. Blocks and spans of positions lie at multiples of their lengths and are merged in order, so the bits depend
   on the position alone; spans keep the chains of additions short at 10^5 positions.
   PERF: all rows meet a block before the next one, so those of one timeline find it in L2. */
static void dsv3__mla_attend(const dsv3__mla_task *t, dsv3__worker *mine, const dsv3__row *rows, uint32_t n_rows,
                             size_t head_stride, uint32_t n_heads)
{
    const uint32_t latent = t->w->m->config.kv_lora_rank;
    const size_t u_stride = (size_t)DSV3__HEAD_GROUP * latent;
    dsv3__mla_sum all[DSV3__HEAD_ROWS], span[DSV3__HEAD_ROWS];
    uint32_t at[DSV3__HEAD_ROWS], last = 0; /* the last place in the cache that a row sees; of all */
    for (uint32_t i = 0; i < n_rows; i++) {
        dsv3__mla_clear(&all[i], mine->u + i * u_stride, n_heads, latent);
        at[i] = rows[i].position + rows[i].shift;
        last = at[i] > last ? at[i] : last;
    }
    for (uint32_t t0 = 0; t0 <= last; t0 += DSV3__KEY_SPAN) {
        for (uint32_t i = 0; i < n_rows; i++)
            dsv3__mla_clear(&span[i], mine->u_span + i * u_stride, n_heads, latent);
        for (uint32_t b = t0; b <= last && b - t0 < DSV3__KEY_SPAN; b += DSV3__KEY_BLOCK)
            for (uint32_t i = 0; i < n_rows; i++)
                if (b <= at[i])
                    dsv3__mla_block(t, mine, &rows[i], mine->q + i * head_stride, n_heads, b,
                                    (uint32_t)dsv3__min(at[i] - b + 1, DSV3__KEY_BLOCK), &span[i],
                                    mine->u_span + i * u_stride);
        for (uint32_t i = 0; i < n_rows; i++)
            for (uint32_t j = 0; j < n_heads && t0 <= at[i]; j++) {
                float *u = mine->u + i * u_stride + j * latent, *from = mine->u_span + i * u_stride + j * latent;
                if (span[i].max[j] > all[i].max[j])
                    dsv3__mla_rescale(&all[i], j, u, latent, span[i].max[j]);
                else
                    dsv3__mla_rescale(&span[i], j, from, latent, all[i].max[j]);
                all[i].sum[j] += span[i].sum[j];
                for (uint32_t c = 0; c < latent; c++)
                    u[c] += from[c];
            }
    }
    for (uint32_t i = 0; i < n_rows; i++)
        for (uint32_t j = 0; j < n_heads; j++) {
            float scale = 1.0f / all[i].sum[j], *q = mine->q + i * head_stride + j * t->w->cache_stride;
            for (uint32_t c = 0; c < latent; c++)
                q[c] = mine->u[i * u_stride + j * latent + c] * scale;
        }
}

/* A group of heads over a few rows: absorb, attend, W_UV. Writes their part of o. */
static void dsv3__mla_heads_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__mla_task *t = (const dsv3__mla_task *)ctx;
    dsv3__work *w = t->w;
    const dsv3_config *c = &w->m->config;
    dsv3__worker *mine = &w->workers[worker];
    const uint32_t n_groups = (c->num_attention_heads + t->group - 1) / t->group;
    const uint32_t h0 = task % n_groups * t->group, row0 = task / n_groups * DSV3__HEAD_ROWS;
    const uint32_t n_heads = (uint32_t)dsv3__min(t->group, c->num_attention_heads - h0);
    const uint32_t n_rows = (uint32_t)dsv3__min(DSV3__HEAD_ROWS, t->n - row0);
    const size_t head_stride = t->group * w->cache_stride;
    dsv3__mla_absorb(t, mine, row0, n_rows, h0, n_heads);
    dsv3__mla_attend(t, mine, &t->rows[row0], n_rows, head_stride, n_heads);
    for (uint32_t j = 0; j < n_heads; j++) {
        uint64_t w_uv =
            (uint64_t)(h0 + j) * (c->qk_nope_head_dim + c->v_head_dim) + c->qk_nope_head_dim; /* row of kv_b */
        float *u = mine->q + j * w->cache_stride;
        for (uint32_t i = 0; i < n_rows; i++)
            dsv3__nn_pack(w, worker, u + i * head_stride, &w->m->exact, &t->l->kv_b, n_rows > DSV3__MM_FEW);
        dsv3__mm_strip(&w->m->exact, mine->panel, &t->l->kv_b, w_uv, w_uv + c->v_head_dim, u, head_stride, NULL, n_rows,
                       n_rows > DSV3__MM_FEW, w->o + row0 * w->o_stride + (size_t)(h0 + j) * c->v_head_dim,
                       w->o_stride);
    }
}

static void dsv3__mla_pack_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__mla_task *t = (const dsv3__mla_task *)ctx;
    dsv3__nn_pack(t->w, worker, t->w->o + i * t->w->o_stride, &t->w->m->mode, &t->l->o, t->w->tiled);
}

/* x += attention of layer l over rows [n]; xn holds the normalised rows. */
static void dsv3__mla_forward(dsv3__work *w, const dsv3__layer *l, uint32_t layer, const dsv3__row *rows, uint32_t n)
{
    const dsv3_config *c = &w->m->config;
    const bool q_lora = c->q_lora_rank != 0;
    const uint32_t heads = c->num_attention_heads, chunks = (n + DSV3__HEAD_ROWS - 1) / DSV3__HEAD_ROWS;
    dsv3__linear first[2], q_b, o;
    dsv3__mla_task t;

    const dsv3__mm_mode *mode = &w->m->mode;
    first[0].mode = first[1].mode = q_b.mode = o.mode = mode;
    first[0].w = &l->kv_a, first[0].x = dsv3__nn_input(w, mode, &l->kv_a), first[0].x_stride = w->x_stride;
    first[0].out = w->kv, first[0].out_stride = w->kv_stride, first[0].add = false;
    first[1].w = q_lora ? &l->q_a : &l->q_b, first[1].x = dsv3__nn_input(w, mode, first[1].w),
    first[1].x_stride = w->x_stride;
    first[1].out = q_lora ? w->q_a : w->q, first[1].out_stride = q_lora ? w->q_a_stride : w->q_stride,
    first[1].add = false;
    dsv3__nn_linear(w, first, 2, n);

    t.w = w, t.l = l, t.rows = rows, t.layer = layer, t.n = n;
    t.group = (uint32_t)dsv3__ceil_div((uint64_t)heads * chunks, w->pool->n_threads);
    t.group = t.group < DSV3__HEAD_GROUP ? t.group : DSV3__HEAD_GROUP;
    if (q_lora)
        dsv3__ten_row_values(w->m->k, w->norm, &l->q_a_norm, 0);
    dsv3__ten_row_values(w->m->k, w->norm2, &l->kv_a_norm, 0);
    dsv3__pool_run(w->pool, n, dsv3__mla_latent_task, &t);

    if (q_lora) {
        q_b.w = &l->q_b, q_b.x = w->q_a, q_b.x_stride = w->q_a_stride, q_b.out = w->q, q_b.out_stride = w->q_stride,
        q_b.add = false;
        dsv3__nn_linear(w, &q_b, 1, n);
    }
    dsv3__pool_run(w->pool, (heads + t.group - 1) / t.group * chunks, dsv3__mla_heads_task, &t);

    dsv3__pool_run(w->pool, n, dsv3__mla_pack_task, &t);
    o.w = &l->o, o.x = w->o, o.x_stride = w->o_stride, o.out = w->x, o.out_stride = w->x_stride, o.add = true;
    dsv3__nn_linear(w, &o, 1, n);
}

// =============================================================================
// >>moe   Router and experts (DeepSeek-V3 paper, section 2.1.2). In: normalised rows. Out: x += experts.
//         The bias decides who is chosen and never how much they count. Rows are grouped by expert; a row's sum runs
//         over its experts in ascending order, the shared expert last, whoever else is in the batch.
// =============================================================================

/* The best of those not taken: the larger, and of equals the lower index. NaN never wins against a number. */
static uint32_t dsv3__moe_best(const float *score, const uint8_t *taken, uint32_t n)
{
    uint32_t best = n;
    for (uint32_t i = 0; i < n; i++)
        if (!taken[i] && (best == n || score[i] > score[best] || (score[best] != score[best] && score[i] == score[i])))
            best = i;
    return best;
}

/* What a group is worth: its two best (noaux_tc), or its best. */
static float dsv3__moe_group_score(const dsv3_config *c, const float *score, uint32_t n)
{
    float first = -INFINITY, second = -INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        if (score[i] > first)
            second = first, first = score[i];
        else if (score[i] > second)
            second = score[i];
    }
    return c->topk_method == DSV3_TOPK_NOAUX_TC ? first + second : first;
}

/* chosen [top_k] ascending, weight [top_k], from the router's logits z [n_routed_experts]. bias: NULL without noaux_tc.
   scratch: choice [2 * n_routed_experts], taken [n_routed_experts]. */
static void dsv3__moe_route(const dsv3_config *c, uint32_t *chosen, float *weight, const float *z, const float *bias,
                            float *choice, uint8_t *taken)
{
    const uint32_t n = c->n_routed_experts, group_size = n / c->n_group;
    float *score = choice + n; /* s: what the weight comes from; choice = s + bias: what the choice comes from */
    float poison = 0;          /* 0, or NaN if a router weight or bias is not finite: that must not pass as a choice */
    if (c->scoring_func == DSV3_SCORING_SIGMOID) {
        for (uint32_t e = 0; e < n; e++)
            score[e] = dsv3__sigmoid(z[e]);
    } else {
        float max = -INFINITY, sum = 0;
        for (uint32_t e = 0; e < n; e++)
            max = z[e] > max ? z[e] : max;
        for (uint32_t e = 0; e < n; e++)
            sum += score[e] = dsv3__exp(z[e] - max);
        for (uint32_t e = 0; e < n; e++)
            score[e] /= sum;
    }
    memset(taken, 0, n);
    for (uint32_t e = 0; e < n; e++) {
        choice[e] = score[e] + (bias ? bias[e] : 0);
        poison += choice[e] * 0;
    }
    if (c->topk_group < c->n_group) { /* experts of the groups left out count as taken */
        for (uint32_t left_out = c->n_group - c->topk_group; left_out; left_out--) {
            uint32_t worst = c->n_group; /* the smaller, and of equals the higher index */
            float worst_score = 0;
            for (uint32_t g = 0; g < c->n_group; g++) {
                if (taken[g * group_size])
                    continue;
                float s = dsv3__moe_group_score(c, choice + g * group_size, group_size);
                if (worst == c->n_group || !(s > worst_score))
                    worst = g, worst_score = s;
            }
            memset(taken + worst * group_size, 2, group_size);
        }
    }
    for (uint32_t i = 0; i < c->num_experts_per_tok; i++)
        taken[dsv3__moe_best(choice, taken, n)] = 1;
    float sum = 0;
    for (uint32_t e = 0, i = 0; e < n; e++)
        if (taken[e] == 1)
            chosen[i] = e, weight[i++] = score[e], sum += score[e];
    for (uint32_t i = 0; i < c->num_experts_per_tok; i++)
        weight[i] = (c->norm_topk_prob ? weight[i] / (sum + 1e-20f) : weight[i]) * c->routed_scaling_factor + poison;
}

typedef struct dsv3__moe_task {
    dsv3__work *w;
    const float *bias; /* [n_routed_experts] or NULL */
} dsv3__moe_task;

static void dsv3__moe_route_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__moe_task *t = (const dsv3__moe_task *)ctx;
    dsv3__work *w = t->w;
    const dsv3_config *c = &w->m->config;
    dsv3__worker *mine = &w->workers[worker];
    dsv3__moe_route(c, w->choice + (size_t)i * c->num_experts_per_tok,
                    w->choice_weight + (size_t)i * c->num_experts_per_tok, w->router + (size_t)i * c->n_routed_experts,
                    t->bias, mine->choice, mine->taken);
}

/* One chosen expert, before its first row is wanted. Its scales, a 4,096th of it, stay in memory by being used. */
static void dsv3__moe_ahead_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__mlp *e = ((const dsv3__mlp_group *)ctx)[i].mlp;
    (void)worker;
    dsv3__os_will_need(e->gate.data, e->gate.shape[0] * e->gate.row_stride);
    dsv3__os_will_need(e->up.data, e->up.shape[0] * e->up.row_stride);
    dsv3__os_will_need(e->down.data, e->down.shape[0] * e->down.row_stride);
}

#define DSV3__MOE_UNCOUNTED UINT32_MAX /* as moe_layer: none of those whose experts are counted and shown */

/* x += the layer's MLP: dense, or routed and shared experts. rows [n] only for the experts they ask to see. */
static void dsv3__moe_forward(dsv3__work *w, const dsv3__layer *l, uint32_t moe_layer, const dsv3__row *rows,
                              uint32_t n)
{
    const dsv3_config *c = &w->m->config;
    const uint32_t top_k = c->num_experts_per_tok, experts = c->n_routed_experts;
    uint32_t n_groups = 0;
    float *h = w->h;
    if (l->moe) {
        dsv3__linear router;
        dsv3__moe_task t;
        router.mode = &w->m->exact, router.w = &l->router;
        router.x = dsv3__nn_input(w, &w->m->exact, &l->router), router.x_stride = w->x_stride;
        router.out = w->router, router.out_stride = experts, router.add = false;
        dsv3__nn_linear(w, &router, 1, n);
        t.w = w, t.bias = NULL;
        if (l->router_bias.data) {
            dsv3__ten_row_values(w->m->k, w->router_bias, &l->router_bias, 0);
            t.bias = w->router_bias;
        }
        dsv3__pool_run(w->pool, n, dsv3__moe_route_task, &t);
        /* rows by expert: count, sum up, fill */
        memset(w->expert_first, 0, (experts + 1) * sizeof(uint32_t));
        for (size_t i = 0; i < (size_t)n * top_k; i++)
            w->expert_first[w->choice[i] + 1]++;
        for (uint32_t e = 0; e < experts; e++)
            w->expert_first[e + 1] += w->expert_first[e];
        for (uint32_t i = 0; i < n; i++) {
            for (uint32_t j = 0; j < top_k; j++) {
                uint32_t e = w->choice[(size_t)i * top_k + j], slot = w->expert_first[e]++;
                w->slot_rows[slot] = i;
                w->slot_weights[slot] = w->choice_weight[(size_t)i * top_k + j];
                if (rows[i].experts)
                    rows[i].experts[(size_t)moe_layer * top_k + j] = (int32_t)e;
            }
        }
        const size_t stride = dsv3__mm_pad(c->moe_intermediate_size);
        for (uint32_t e = 0, first = 0; e < experts;
             first = w->expert_first[e++]) { /* filling moved each start to its end */
            dsv3__mlp_group *g = &w->groups[n_groups];
            if (w->expert_first[e] == first)
                continue;
            g->mlp = &l->experts[e];
            g->rows = w->slot_rows + first;
            g->weights = w->slot_weights + first;
            g->n = w->expert_first[e] - first;
            g->inter = c->moe_intermediate_size;
            g->h = h + (size_t)first * stride;
            g->h_stride = stride;
            if (moe_layer != DSV3__MOE_UNCOUNTED)
                w->counts[(size_t)moe_layer * experts + e] += g->n;
            n_groups++;
        }
        if (w->m->read_ahead)
            dsv3__pool_run(w->pool, n_groups, dsv3__moe_ahead_task, w->groups);
        h += (size_t)n * top_k * stride;
    }
    if (l->has_mlp) {
        dsv3__mlp_group *g = &w->groups[n_groups++];
        g->mlp = &l->mlp;
        g->rows = NULL;
        g->weights = NULL;
        g->n = n;
        g->inter = l->moe ? c->n_shared_experts * c->moe_intermediate_size : c->intermediate_size;
        g->h = h;
        g->h_stride = dsv3__mm_pad(g->inter);
    }
    dsv3__nn_mlp(w, w->groups, n_groups, n);
}

// =============================================================================
// >>fwd   The model: embedding, layers, final norm, head, for n rows of any timelines and positions.
//         Rows of one timeline must come in rising order, each behind what its cache holds or in this very batch.
// =============================================================================

typedef struct dsv3__head_task {
    dsv3__work *w;
    const dsv3_tensor *head;
    const dsv3__row *rows;
    uint32_t n;
    const uint32_t *asked; /* [n] which rows */
} dsv3__head_task;

/* One strip of the vocabulary for all rows that ask. */
static void dsv3__fwd_head_task(void *ctx, uint32_t task, uint32_t worker)
{
    const dsv3__head_task *t = (const dsv3__head_task *)ctx;
    dsv3__work *w = t->w;
    dsv3__worker *mine = &w->workers[worker];
    const uint32_t vocab = w->m->config.vocab_size, r0 = task * w->strip;
    const uint32_t r1 = r0 + w->strip < vocab ? r0 + w->strip : vocab;
    dsv3__mm_strip(&w->m->mode, mine->panel, t->head, r0, r1, dsv3__nn_input(w, &w->m->mode, t->head), w->x_stride,
                   t->asked, t->n, w->tiled, mine->a, DSV3__STRIP);
    for (uint32_t i = 0; i < t->n; i++)
        memcpy(t->rows[t->asked[i]].logits + r0, mine->a + (size_t)i * DSV3__STRIP, (r1 - r0) * sizeof(float));
}

/* The normalised state of a row that asks for it. w->norm holds the weights. */
static void dsv3__fwd_state_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__head_task *t = (const dsv3__head_task *)ctx;
    const dsv3_config *c = &t->w->m->config;
    (void)worker;
    if (t->rows[i].state)
        dsv3__nn_rmsnorm_row(t->w->m->k, t->rows[i].state, t->w->x + i * t->w->x_stride, t->w->norm, c->hidden_size,
                             c->rms_norm_eps);
}

/* Logits [n]: no infinity, no NaN. */
static bool dsv3__fwd_finite(const float *logits, uint32_t n)
{
    float not_finite = 0; /* stays 0 unless a logit is infinite or NaN */
    for (uint32_t v = 0; v < n; v++)
        not_finite += logits[v] - logits[v];
    return not_finite == 0;
}

/* x -> through the last norm, states and logits of the rows that ask. `asked` is scratch [n]. */
static dsv3_result dsv3__fwd_logits(dsv3__work *w, const dsv3_tensor *norm, const dsv3_tensor *head,
                                    const dsv3__row *rows, uint32_t n, uint32_t *asked, dsv3_error *err)
{
    const uint32_t vocab = w->m->config.vocab_size;
    bool states = false;
    dsv3__head_task t;
    t.w = w, t.head = head, t.rows = rows, t.n = 0, t.asked = asked;
    for (uint32_t i = 0; i < n; i++) {
        states |= rows[i].state != NULL;
        if (rows[i].logits)
            asked[t.n++] = i;
    }
    if (!t.n && !states)
        return DSV3_OK;
    dsv3__nn_rmsnorm(w, norm, w->m->config.rms_norm_eps, n);
    if (states)
        dsv3__pool_run(w->pool, n, dsv3__fwd_state_task, &t);
    if (t.n)
        dsv3__pool_run(w->pool, (vocab + w->strip - 1) / w->strip, dsv3__fwd_head_task, &t);
    for (uint32_t i = 0; i < t.n; i++)
        if (!rows[asked[i]].draft && !dsv3__fwd_finite(rows[asked[i]].logits, vocab))
            return dsv3__wt_blame(w->m, rows[asked[i]].cancel, err);
    return DSV3_OK;
}

/* How a pass over n rows is cut up, and their rotary tables. */
static void dsv3__fwd_begin(dsv3__work *w, const dsv3__row *rows, uint32_t n)
{
    w->tiled = n > DSV3__MM_FEW;
    w->strip = w->tiled ? DSV3__STRIP : DSV3__STRIP / 2;
    for (uint32_t i = 0; i < n; i++)
        dsv3__nn_rope_table(w->m, w->rope + (size_t)i * w->m->config.qk_rope_head_dim, rows[i].position);
}

/* Has someone cancelled one of these timelines? The rows of one stand together. */
static bool dsv3__fwd_cancelled(const dsv3__row *rows, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        if ((i == 0 || rows[i].cancel != rows[i - 1].cancel) && dsv3__atomic_load(rows[i].cancel))
            return true;
    return false;
}

/* x -> layer i -> x: attention and MLP, each on normalised rows and added to them. moe_layer: which of those with experts
   it is, DSV3__MOE_UNCOUNTED for a prediction layer. */
static void dsv3__fwd_layer(dsv3__work *w, uint32_t i, uint32_t moe_layer, const dsv3__row *rows, uint32_t n)
{
    const dsv3__layer *l = &w->m->layers[i];
    const float eps = w->m->config.rms_norm_eps;
    dsv3__nn_rmsnorm(w, &l->input_norm, eps, n);
    dsv3__mla_forward(w, l, i, rows, n);
    dsv3__nn_rmsnorm(w, &l->post_norm, eps, n);
    dsv3__moe_forward(w, l, moe_layer, rows, n);
}

/* Runs rows [n], n <= max_batch: their cache rows are written, and the states and logits they ask for. Whether one is
   cancelled is looked at before every layer. */
static dsv3_result dsv3__fwd_rows(dsv3__work *w, const dsv3__row *rows, uint32_t n, uint32_t *asked, dsv3_error *err)
{
    const dsv3_model *m = w->m;
    uint32_t moe_layer = 0;
    dsv3__fwd_begin(w, rows, n);
    for (uint32_t i = 0; i < n; i++)
        dsv3__ten_row_values(m->k, w->x + i * w->x_stride, &m->embed, (uint64_t)rows[i].token);
    for (uint32_t i = 0; i < m->config.num_hidden_layers; i++) {
        if (dsv3__fwd_cancelled(rows, n))
            return DSV3__FAIL(err, DSV3_ERROR_CANCELLED, "cancelled before layer %u", (uint64_t)i);
        dsv3__fwd_layer(w, i, moe_layer, rows, n);
        moe_layer += m->layers[i].moe;
    }
    return dsv3__fwd_logits(w, &m->norm, &m->head, rows, n, asked, err);
}

// =============================================================================
// >>mtp   Multi-token prediction (DeepSeek-V3 paper, section 2.2): layers behind the last that guess one token further.
//         Prediction layer k joins the state below it at position i with the embedding of token i + k + 1,
//             x_i = eh_proj [RMSNorm(Emb(t_(i+k+1)); enorm), RMSNorm(state_i; hnorm)],
//         runs a whole decoder layer over x, at position i, with a cache of its own, and guesses token i + k + 2 from
//         RMSNorm(x; shared_head.norm) by the head. The state below layer 0 is the model's, below layer k layer k - 1's.
//         The paper prints the state first; the released weights take the embedding first, as the code of vLLM
//         (deepseek_mtp.py) and SGLang (deepseek_nextn.py) does. Both hand over states behind the norm: the model's final
//         one, and shared_head.norm (SGLang always, vLLM since 2026) where a layer follows a layer. The paper is silent.
//         vLLM zeroes the embedding at position 0, SGLang does not, nor does this.
//         For more tokens than there are layers the last one goes on by itself: its own state, the token it guessed, the
//         next row. Guesses steer only what is verified together (>>ses), never what is written.
//         The cache row stands where the model's of the token i + k + 1 stands: it knows no later token. So timelines share
//         both where they share tokens, and drafts need no page that the tokens do not need.
// =============================================================================

#define DSV3__DRAFT_MAX 16 /* tokens guessed at once */

typedef struct dsv3__mtp_task {
    dsv3__work *w;
    const dsv3__predictor *p;
    const dsv3__row *rows;
} dsv3__mtp_task;

/* Of one row: what eh_proj reads. w->norm and w->norm2 hold the weights of enorm and hnorm. */
static void dsv3__mtp_join_task(void *ctx, uint32_t i, uint32_t worker)
{
    const dsv3__mtp_task *t = (const dsv3__mtp_task *)ctx;
    dsv3__work *w = t->w;
    const dsv3__kern *k = w->m->k;
    const size_t dim = w->m->config.hidden_size;
    const float eps = w->m->config.rms_norm_eps;
    float *eh = w->eh + i * w->eh_stride;
    memset(eh, 0, w->eh_stride * sizeof(float)); /* dot products read on to a multiple of 64 */
    dsv3__ten_row_values(k, eh, &t->p->embed, (uint64_t)t->rows[i].token);
    dsv3__nn_rmsnorm_row(k, eh, eh, w->norm, dim, eps);
    dsv3__nn_rmsnorm_row(k, eh + dim, t->rows[i].below, w->norm2, dim, eps);
    dsv3__nn_pack(w, worker, eh, &w->m->mode, &t->p->eh_proj, w->tiled);
}

/* Rows [n] through prediction layer k, n <= max_batch. Each has its `position` i, `token` t_(i+k+1), state `below`. */
static dsv3_result dsv3__mtp_rows(dsv3__work *w, uint32_t k, const dsv3__row *rows, uint32_t n, uint32_t *asked,
                                  dsv3_error *err)
{
    const dsv3_model *m = w->m;
    const dsv3__predictor *p = &m->mtp[k];
    dsv3__mtp_task t;
    dsv3__linear join;
    if (dsv3__fwd_cancelled(rows, n))
        return DSV3__FAIL(err, DSV3_ERROR_CANCELLED, "cancelled before prediction layer %u", (uint64_t)k);
    dsv3__fwd_begin(w, rows, n);
    t.w = w, t.p = p, t.rows = rows;
    dsv3__ten_row_values(m->k, w->norm, &p->enorm, 0);
    dsv3__ten_row_values(m->k, w->norm2, &p->hnorm, 0);
    dsv3__pool_run(w->pool, n, dsv3__mtp_join_task, &t);
    join.mode = &m->mode, join.w = &p->eh_proj, join.x = w->eh, join.x_stride = w->eh_stride;
    join.out = w->x, join.out_stride = w->x_stride, join.add = false;
    dsv3__nn_linear(w, &join, 1, n);
    dsv3__fwd_layer(w, m->config.num_hidden_layers + k, DSV3__MOE_UNCOUNTED, rows, n);
    return dsv3__fwd_logits(w, &p->norm, &p->head, rows, n, asked, err);
}

/* The states below one prediction layer that a timeline still holds. */
typedef struct dsv3__mtp_queue {
    float *states;       /* [cap + k, stride]: positions first ... end - 1 */
    uint32_t first, end; /* first <= done <= end */
    uint32_t done;       /* rows 0 ... done - 1 of the layer are in the cache */
} dsv3__mtp_queue;

/* Where the ids of a timeline are: those from number n_old on stand by themselves, as long as they are not part of it. */
typedef struct dsv3__mtp_ids {
    const int32_t *old, *more;
    uint32_t n_old;
} dsv3__mtp_ids;

/* What a timeline knows for its prediction layers. They follow the model when drafts are wanted, not token by token: until
   then its states wait in line. */
typedef struct dsv3__mtp {
    uint32_t n;    /* layers; 0: nobody drafts with them */
    uint32_t cap;  /* states that queue k has room for, less k: each may get all that is in the one before */
    size_t stride; /* of states: hidden_size and zeros, as in dsv3__work */
    dsv3__mtp_queue q[DSV3__MTP_MAX];
    float *ahead; /* [n + 1, stride]: below layer k while guessing; [n] is the last layer's own */
} dsv3__mtp;

/* Where the state at `position` goes, which follows or is among those held; NULL: an older one. Room was made. */
static float *dsv3__mtp_place(dsv3__mtp *p, uint32_t k, uint32_t position)
{
    dsv3__mtp_queue *q = &p->q[k];
    return position < q->first ? NULL : q->states + (size_t)(position - q->first) * p->stride;
}

/* Holds no state: layers go on behind the first `done` rows, which all of them have. */
static void dsv3__mtp_restart(dsv3__mtp *p, uint32_t done)
{
    for (uint32_t k = 0; k < p->n; k++)
        p->q[k].first = p->q[k].end = p->q[k].done = done;
}

/* Room for states up to position end - 1: those that the layer has used go. */
static void dsv3__mtp_room(dsv3__mtp *p, uint32_t k, uint32_t end)
{
    dsv3__mtp_queue *q = &p->q[k];
    if (end <= q->first + p->cap + k)
        return;
    memmove(q->states, q->states + (size_t)(q->done - q->first) * p->stride,
            (size_t)(q->end - q->done) * p->stride * sizeof(float));
    q->first = q->done;
}

/* Only tokens 0 ... n - 1 are left. Where a state that is needed again has gone, the model runs its row again: the line
   starts anew at the first row that the last layer lacks. */
static void dsv3__mtp_cut(dsv3__mtp *p, uint32_t n)
{
    bool broken = false;
    for (uint32_t k = 0; k < p->n; k++) {
        dsv3__mtp_queue *q = &p->q[k];
        q->end = (uint32_t)dsv3__min(q->end, n > k ? n - k : 0);
        q->done = (uint32_t)dsv3__min(q->done, n > k + 1 ? n - k - 1 : 0);
        broken |= q->first > q->done || q->end < q->done;
    }
    if (broken)
        dsv3__mtp_restart(p, p->q[p->n - 1].done);
}

/* Runs all rows that tokens 0 ... n_tokens - 1 and the states held allow. like: the timeline, of a row. Pages that it
   shares may be written: with the bits that all who share them would write. rows: scratch [max_batch]. Of tokens from
   `from` on, what layers 0 ... n_logits - 1 say behind them, as logits [.., n_logits, vocab_size]; they guess the token
   after it from the model's state k + 1 tokens before. */
static dsv3_result dsv3__mtp_follow(dsv3__work *w, dsv3__mtp *p, const dsv3__row *like, const dsv3__mtp_ids *ids,
                                    uint32_t n_tokens, float *logits, uint32_t from, uint32_t n_logits, dsv3__row *rows,
                                    uint32_t *asked, dsv3_error *err)
{
    for (uint32_t k = 0; k < p->n; k++) {
        dsv3__mtp_queue *q = &p->q[k];
        const uint32_t end = (uint32_t)dsv3__min(q->end, n_tokens > k + 1 ? n_tokens - k - 1 : 0);
        while (q->done < end) {
            const uint32_t n = (uint32_t)dsv3__min(w->max_batch, end - q->done);
            if (k + 1 < p->n)
                dsv3__mtp_room(p, k + 1, q->done + n);
            for (uint32_t i = 0; i < n; i++) {
                const uint32_t position = q->done + i, token = position + k + 1;
                rows[i] = *like;
                rows[i].position = position, rows[i].shift = k + 1;
                rows[i].token = token < ids->n_old ? ids->old[token] : ids->more[token - ids->n_old];
                rows[i].below = dsv3__mtp_place(p, k, position);
                rows[i].state = k + 1 < p->n ? dsv3__mtp_place(p, k + 1, position)
                                : i + 1 == n ? p->ahead + (size_t)p->n * p->stride
                                             : NULL;
                rows[i].logits = logits && k < n_logits && token >= from
                                     ? logits + ((size_t)(token - from) * n_logits + k) * w->m->config.vocab_size
                                     : NULL;
                rows[i].draft = true;
            }
            DSV3__TRY(dsv3__mtp_rows(w, k, rows, n, asked, err));
            q->done += n;
            if (k + 1 < p->n)
                p->q[k + 1].end = q->done > p->q[k + 1].end ? q->done : p->q[k + 1].end;
        }
    }
    return DSV3_OK;
}

/* Logits [vocab_size] for the guess behind token n_tokens - 1 + j, itself a guess (j > 0) or, j = 0, the last one that is
   certain. To be called for j = 0, 1, ... in turn. *ok false: the states it takes are not at hand. */
static dsv3_result dsv3__mtp_guess(dsv3__work *w, dsv3__mtp *p, const dsv3__row *like, const int32_t *tokens,
                                   uint32_t n_tokens, uint32_t j, float *logits, bool *ok, dsv3__row *rows,
                                   uint32_t *asked, dsv3_error *err)
{
    const size_t stride = p->stride;
    if (j == 0) {
        dsv3__mtp_ids ids;
        ids.old = tokens, ids.more = NULL, ids.n_old = UINT32_MAX;
        dsv3__mtp_queue *q = &p->q[0];
        *ok = n_tokens > p->n && q->end + 1 >= n_tokens && q->first + 1 < n_tokens;
        if (!*ok)
            return DSV3_OK;
        if (q->done + 1 >= n_tokens) /* it has been run already, for nobody: again */
            q->done = n_tokens - 2;
        DSV3__TRY(dsv3__mtp_follow(w, p, like, &ids, n_tokens, logits, n_tokens - 1, 1, rows, asked, err));
        for (uint32_t k = 1; k < p->n; k++)
            memcpy(p->ahead + k * stride, dsv3__mtp_place(p, k, p->q[k].done), stride * sizeof(float));
        return DSV3_OK;
    }
    /* The guess enters every layer that has not yet been passed: the deepest first, since each writes what the next one
       starts from. The first of them is the one that guesses. */
    const uint32_t first = j < p->n ? j : p->n - 1;
    for (uint32_t k = p->n; k-- > first;) {
        rows[0] = *like;
        rows[0].position = n_tokens - 1 - k + (j - 1), rows[0].shift = k + 1;
        rows[0].token = tokens[n_tokens - 1 + j];
        rows[0].below = p->ahead + (j < p->n ? k : p->n) * stride;
        rows[0].state = p->ahead + (k + 1) * stride;
        rows[0].logits = k == first ? logits : NULL;
        rows[0].draft = true;
        DSV3__TRY(dsv3__mtp_rows(w, k, rows, 1, asked, err));
    }
    return DSV3_OK;
}

#define DSV3__LOOKUP_SPAN  65536u /* positions looked at, back from the end */
#define DSV3__LOOKUP_SHORT 2u     /* an ending must have been seen with so many tokens, */
#define DSV3__LOOKUP_LONG  16u    /* and no more of it are compared */

/* The drafter without weights: tokens [n] end as they did before; what followed then goes behind them, up to k tokens. The
   longest ending counts, of equals the last. Returns how many. */
static uint32_t dsv3__mtp_lookup(int32_t *tokens, uint32_t n, uint32_t k)
{
    const uint32_t lowest = n > DSV3__LOOKUP_SPAN ? n - DSV3__LOOKUP_SPAN : 0;
    uint32_t best = 0, best_length = DSV3__LOOKUP_SHORT - 1;
    for (uint32_t end = n - 1; end > lowest && best_length < DSV3__LOOKUP_LONG; end--) {
        uint32_t length = 0;
        while (length < DSV3__LOOKUP_LONG && length < end && tokens[end - 1 - length] == tokens[n - 1 - length])
            length++;
        if (length > best_length)
            best_length = length, best = end;
    }
    for (uint32_t i = 0; best && i < k; i++)
        tokens[n + i] = tokens[best + i]; /* of a short period: also from what was just guessed */
    return best ? k : 0;
}

#ifndef DSV3_NO_TOKENIZER

// =============================================================================
// >>split   Where a text is cut before it is merged: the regular expressions of two tokenizers, DeepSeek-V3's three and
//           Kimi's one, by hand. Needs: json (UTF-8). Owns: nothing; the table of classes lies in the tokenizer.
// =============================================================================

/* tokenizer.json has three patterns, each applied to the pieces that the one before left:

     1   \p{N}{1,3}
     2   [U+4E00-9FA5 U+3040-309F U+30A0-30FF]+
     3   [ASCII punctuation][A-Za-z]+  |  [^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+  |   ?[\p{P}\p{S}]+[\r\n]*
         |  \s*[\r\n]+  |  \s+(?!\S)  |  \s+

   They tell five classes of characters apart, and the ranges of the second. So there is no regex engine:
   dsv3__split_v3 finds the end of the next piece in one walk over the UTF-8. What no pattern matches is a piece of
   its own. Bytes that are not UTF-8 are characters of the class "other", each by itself.

   Kimi's code has one pattern, over the whole text, with Upper = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] and Lower =
   [\p{Ll}\p{Lm}\p{Lo}\p{M}], both without \p{Han}; every character is in some piece:

         \p{Han}+  |  [^\r\n\p{L}\p{N}]?Upper*Lower+('s|'t|'re|'ve|'m|'ll|'d)?
         |  [^\r\n\p{L}\p{N}]?Upper+Lower*('s|'t|'re|'ve|'m|'ll|'d)?  |  \p{N}{1,3}
         |   ?[^\s\p{L}\p{N}]+[\r\n]*  |  \s*[\r\n]+  |  \s+(?!\S)  |  \s+ */

/* What \p{L}\p{M}, \p{P}\p{S}, \p{N} and \s tell apart; then, what Kimi's pattern does. */
enum {
    DSV3__SPLIT_OTHER = 0, /* controls, format characters, unassigned, ill-formed bytes */
    DSV3__SPLIT_WORD = 1,  /* letters and marks */
    DSV3__SPLIT_PUNCT = 2, /* punctuation and symbols */
    DSV3__SPLIT_NUMBER = 3,
    DSV3__SPLIT_SPACE = 4,
    DSV3__SPLIT_CJK = 8, /* or'ed in: the second split's ranges */
    /* Kimi: OTHER (with punctuation and symbols), NUMBER, SPACE, and for words: */
    DSV3__SPLIT_UPPER = 1,
    DSV3__SPLIT_LOWER = 2,
    DSV3__SPLIT_CASELESS = 5, /* a letter that is upper and lower at once */
    DSV3__SPLIT_MARK = 6,     /* the same, but no letter */
    DSV3__SPLIT_HAN = 8       /* or'ed in */
};

#define DSV3__SPLIT_END        0x32400 /* behind it only U+E0100 ... U+E01EF have a class (marks) */
#define DSV3__SPLIT_BLOCK      128     /* code points a block */
#define DSV3__SPLIT_BLOCKS_MAX 256     /* different ones: 239 */

/* The class of each character, in two steps. */
typedef struct dsv3__split {
    bool kimi;
    uint8_t mark; /* the class of the marks from U+E0100 on */
    uint8_t block_of[DSV3__SPLIT_END / DSV3__SPLIT_BLOCK];
    uint8_t blocks[DSV3__SPLIT_BLOCKS_MAX][DSV3__SPLIT_BLOCK];
} dsv3__split;

/* Run lengths over U+0000 ... U+10FFFF: class << 5 | length; a length of 30 adds the byte that follows, 31 stands for
   the three that follow. */
/* Unicode 16.0, 2423 bytes. Generated by tests/gen_unicode.py. */
// clang-format off
static const uint8_t dsv3__split_runs[] = {
    9, 133, 18, 129, 79, 106, 71, 58, 70, 58, 68, 6, 129, 26, 129, 73, 33, 66, 1, 68, 98, 65, 33, 67, 97, 33, 65,
    99, 65, 55, 65, 62, 1, 65, 63, 202, 1, 0, 68, 44, 78, 37, 71, 33, 65, 33, 81, 62, 87, 65, 34, 2, 36, 65, 33, 4,
    66, 33, 65, 35, 1, 33, 1, 52, 1, 62, 53, 65, 62, 109, 65, 62, 143, 1, 62, 8, 2, 33, 70, 62, 11, 66, 2, 67, 1,
    62, 15, 65, 33, 65, 34, 65, 34, 65, 33, 8, 59, 4, 36, 66, 17, 74, 43, 65, 1, 67, 62, 34, 106, 68, 62, 72, 65,
    40, 1, 65, 42, 65, 38, 106, 35, 66, 33, 78, 2, 62, 29, 2, 62, 71, 14, 106, 62, 14, 68, 33, 2, 33, 66, 62, 16, 2,
    79, 1, 60, 2, 65, 1, 43, 5, 56, 65, 38, 8, 62, 45, 1, 62, 99, 66, 106, 65, 51, 1, 40, 2, 34, 2, 54, 1, 39, 1,
    33, 3, 36, 2, 41, 2, 34, 2, 36, 8, 33, 4, 34, 1, 37, 2, 106, 34, 66, 102, 66, 33, 65, 33, 2, 35, 1, 38, 4, 34,
    2, 54, 1, 39, 1, 34, 1, 34, 1, 34, 2, 33, 1, 37, 4, 34, 2, 35, 3, 33, 7, 36, 1, 33, 7, 106, 38, 65, 10, 35, 1,
    41, 1, 35, 1, 54, 1, 39, 1, 34, 1, 37, 2, 42, 1, 35, 1, 35, 2, 33, 15, 36, 2, 106, 66, 7, 39, 1, 35, 1, 40, 2,
    34, 2, 54, 1, 39, 1, 34, 1, 37, 2, 41, 2, 34, 2, 35, 7, 35, 4, 34, 1, 37, 2, 106, 65, 33, 102, 10, 34, 1, 38, 3,
    35, 1, 36, 3, 34, 1, 33, 1, 34, 3, 34, 3, 35, 3, 44, 4, 37, 3, 35, 1, 36, 2, 33, 6, 33, 14, 109, 72, 5, 45, 1,
    35, 1, 55, 1, 48, 2, 41, 1, 35, 1, 36, 7, 34, 1, 35, 2, 33, 2, 36, 2, 106, 7, 65, 103, 65, 36, 65, 40, 1, 35, 1,
    55, 1, 42, 1, 37, 2, 41, 1, 35, 1, 36, 7, 34, 6, 34, 1, 36, 2, 106, 1, 35, 12, 45, 1, 35, 1, 62, 21, 1, 35, 1,
    37, 65, 4, 36, 103, 37, 2, 115, 65, 38, 1, 35, 1, 50, 3, 56, 1, 41, 1, 33, 2, 39, 3, 33, 4, 38, 1, 33, 1, 40, 6,
    106, 2, 34, 65, 12, 62, 28, 4, 65, 47, 65, 106, 66, 30, 7, 34, 1, 33, 1, 37, 1, 56, 1, 33, 1, 55, 2, 37, 1, 33,
    1, 39, 1, 106, 2, 36, 30, 2, 33, 87, 34, 70, 116, 65, 33, 65, 33, 65, 33, 68, 42, 1, 62, 6, 4, 52, 65, 50, 1,
    62, 6, 1, 72, 33, 70, 1, 77, 30, 7, 62, 34, 106, 70, 62, 34, 106, 36, 66, 62, 8, 1, 33, 5, 33, 2, 62, 13, 65,
    63, 77, 1, 0, 1, 36, 2, 39, 1, 33, 1, 36, 2, 62, 11, 1, 36, 2, 62, 3, 1, 36, 2, 39, 1, 33, 1, 36, 2, 47, 1, 62,
    27, 1, 36, 2, 62, 37, 2, 35, 73, 116, 3, 48, 74, 6, 62, 56, 2, 38, 2, 65, 63, 108, 2, 0, 66, 49, 129, 58, 66, 3,
    62, 45, 67, 99, 40, 7, 54, 9, 54, 66, 9, 52, 12, 45, 1, 35, 1, 34, 12, 62, 54, 67, 33, 68, 34, 2, 106, 6, 106,
    6, 75, 35, 1, 33, 106, 6, 62, 59, 7, 62, 13, 5, 62, 40, 10, 62, 1, 1, 44, 4, 44, 4, 65, 3, 66, 106, 62, 0, 2,
    37, 11, 62, 14, 4, 58, 6, 107, 3, 94, 4, 60, 2, 66, 62, 33, 1, 61, 2, 33, 106, 6, 106, 6, 71, 33, 70, 2, 62, 1,
    30, 19, 62, 47, 1, 66, 106, 81, 41, 76, 62, 18, 106, 62, 28, 8, 68, 62, 26, 3, 69, 106, 3, 35, 106, 62, 6, 66,
    43, 5, 62, 13, 2, 35, 72, 8, 35, 65, 62, 9, 5, 63, 22, 2, 0, 2, 38, 2, 62, 8, 2, 38, 2, 40, 1, 33, 1, 33, 1, 33,
    1, 62, 1, 2, 62, 23, 1, 39, 65, 33, 67, 35, 1, 39, 67, 36, 2, 38, 1, 67, 45, 67, 2, 35, 1, 39, 66, 1, 139, 5,
    88, 130, 5, 129, 94, 17, 129, 16, 97, 33, 2, 102, 69, 33, 106, 69, 1, 45, 3, 94, 3, 15, 62, 3, 15, 66, 33, 68,
    33, 66, 42, 65, 33, 67, 37, 70, 33, 65, 33, 65, 33, 65, 36, 65, 43, 66, 36, 69, 37, 68, 33, 65, 126, 21, 34,
    101, 66, 4, 95, 154, 2, 0, 22, 75, 21, 126, 30, 94, 48, 118, 95, 118, 2, 0, 126, 0, 95, 224, 3, 0, 2, 94, 2, 1,
    94, 75, 62, 199, 70, 41, 5, 68, 97, 66, 62, 8, 1, 33, 5, 33, 2, 62, 26, 7, 33, 65, 14, 56, 9, 39, 1, 39, 1, 39,
    1, 39, 1, 39, 1, 39, 1, 39, 1, 39, 1, 62, 2, 94, 17, 33, 94, 16, 30, 4, 90, 1, 94, 59, 12, 94, 184, 26, 80, 129,
    68, 34, 97, 89, 105, 38, 65, 37, 66, 99, 34, 67, 1, 62, 56, 2, 34, 66, 35, 65, 62, 60, 65, 36, 5, 62, 13, 1, 62,
    64, 1, 66, 100, 74, 62, 2, 94, 8, 9, 65, 48, 94, 1, 1, 106, 94, 0, 104, 65, 111, 94, 2, 106, 94, 9, 111, 95, 64,
    1, 0, 63, 192, 25, 0, 94, 34, 63, 141, 86, 0, 3, 94, 25, 9, 62, 16, 66, 62, 239, 67, 48, 106, 34, 20, 62, 21,
    65, 42, 65, 62, 73, 106, 34, 70, 8, 87, 41, 66, 62, 73, 66, 62, 37, 2, 34, 1, 33, 1, 40, 21, 62, 24, 68, 33, 3,
    102, 68, 6, 62, 22, 68, 8, 62, 40, 8, 66, 106, 6, 56, 67, 33, 65, 35, 106, 62, 6, 66, 62, 6, 11, 65, 61, 3, 62,
    35, 77, 1, 33, 106, 4, 66, 48, 106, 37, 1, 62, 25, 9, 46, 2, 106, 2, 68, 55, 67, 62, 43, 24, 35, 66, 48, 66, 37,
    10, 38, 2, 38, 2, 38, 9, 39, 1, 39, 1, 62, 13, 65, 46, 66, 4, 62, 93, 65, 34, 2, 106, 6, 63, 164, 43, 0, 12, 55,
    4, 62, 19, 31, 4, 33, 0, 63, 110, 1, 0, 2, 62, 76, 30, 8, 39, 12, 37, 5, 44, 65, 45, 1, 37, 1, 33, 1, 34, 1, 34,
    1, 62, 78, 81, 16, 63, 107, 1, 0, 82, 62, 34, 2, 62, 24, 7, 65, 30, 2, 44, 68, 48, 74, 6, 48, 94, 5, 1, 83, 1,
    68, 4, 37, 1, 62, 105, 4, 79, 106, 71, 58, 70, 58, 75, 62, 59, 3, 38, 2, 38, 2, 38, 2, 35, 3, 71, 1, 71, 13, 66,
    2, 44, 1, 58, 1, 51, 1, 34, 1, 47, 2, 46, 30, 4, 62, 93, 5, 67, 4, 126, 15, 3, 73, 126, 27, 81, 98, 67, 1, 77,
    3, 65, 30, 17, 94, 15, 33, 30, 100, 61, 3, 62, 19, 15, 33, 123, 4, 62, 2, 100, 9, 52, 97, 40, 97, 5, 62, 13, 5,
    62, 0, 1, 65, 62, 6, 4, 40, 65, 101, 30, 12, 62, 128, 2, 106, 6, 62, 6, 4, 62, 6, 4, 62, 10, 8, 62, 22, 11, 65,
    43, 1, 47, 1, 39, 1, 34, 1, 43, 1, 47, 1, 39, 1, 34, 3, 62, 22, 12, 63, 55, 1, 0, 9, 54, 10, 40, 24, 38, 1, 62,
    12, 1, 41, 30, 39, 38, 2, 33, 1, 62, 14, 1, 34, 3, 33, 2, 55, 1, 65, 104, 55, 66, 103, 62, 1, 8, 105, 30, 18,
    51, 1, 34, 5, 101, 54, 102, 3, 65, 58, 5, 65, 30, 34, 62, 26, 4, 98, 34, 112, 2, 126, 16, 36, 1, 34, 5, 40, 1,
    35, 1, 61, 2, 35, 4, 33, 105, 7, 73, 7, 61, 98, 65, 61, 99, 30, 2, 40, 65, 62, 0, 4, 101, 71, 9, 62, 24, 3, 71,
    54, 2, 104, 51, 5, 104, 50, 7, 68, 12, 103, 30, 50, 62, 43, 30, 25, 62, 21, 13, 62, 21, 7, 102, 62, 10, 8, 106,
    6, 106, 60, 3, 37, 65, 55, 8, 66, 30, 178, 126, 1, 1, 62, 12, 1, 34, 65, 2, 34, 16, 35, 30, 25, 62, 3, 106, 33,
    8, 62, 3, 100, 69, 22, 54, 68, 30, 8, 53, 103, 20, 55, 9, 62, 41, 71, 4, 126, 0, 38, 9, 62, 30, 66, 1, 68, 33,
    13, 57, 7, 106, 6, 62, 23, 1, 106, 68, 36, 8, 62, 6, 66, 33, 9, 62, 39, 68, 36, 65, 34, 106, 33, 65, 33, 67, 1,
    116, 11, 50, 1, 62, 7, 70, 36, 30, 32, 39, 1, 33, 1, 36, 1, 47, 1, 42, 65, 6, 62, 29, 5, 106, 6, 36, 1, 40, 2,
    34, 2, 54, 1, 39, 1, 34, 1, 37, 1, 42, 2, 34, 2, 35, 2, 33, 6, 33, 5, 39, 2, 39, 3, 37, 11, 42, 1, 33, 2, 33, 1,
    62, 8, 1, 42, 1, 33, 2, 33, 1, 36, 1, 40, 66, 1, 66, 8, 34, 29, 62, 45, 69, 106, 66, 1, 65, 36, 30, 0, 62, 40,
    65, 33, 8, 106, 30, 136, 62, 24, 2, 41, 87, 38, 30, 4, 62, 35, 67, 33, 11, 106, 6, 77, 19, 62, 27, 65, 6, 106,
    6, 116, 28, 59, 2, 47, 4, 108, 68, 39, 30, 155, 62, 29, 65, 30, 70, 62, 34, 115, 12, 40, 2, 33, 2, 40, 1, 34, 1,
    62, 0, 1, 34, 2, 41, 67, 9, 106, 30, 40, 40, 2, 62, 16, 2, 40, 65, 34, 27, 62, 33, 72, 33, 8, 62, 44, 67, 33,
    69, 13, 62, 43, 7, 74, 30, 152, 62, 3, 65, 14, 106, 6, 41, 1, 62, 15, 1, 41, 69, 10, 125, 3, 66, 62, 0, 2, 54,
    1, 46, 30, 43, 39, 1, 34, 1, 62, 14, 3, 33, 1, 34, 1, 41, 8, 106, 6, 38, 1, 34, 1, 62, 7, 1, 34, 1, 38, 7, 106,
    31, 54, 1, 0, 55, 66, 7, 49, 1, 62, 11, 3, 37, 77, 106, 33, 30, 55, 33, 15, 117, 93, 13, 65, 63, 154, 3, 0, 30,
    72, 126, 81, 1, 69, 11, 62, 166, 31, 76, 10, 0, 62, 67, 66, 13, 63, 48, 4, 0, 16, 54, 10, 63, 155, 15, 0, 5, 63,
    71, 2, 0, 31, 185, 26, 0, 62, 18, 106, 31, 198, 6, 0, 63, 57, 2, 0, 7, 62, 1, 1, 106, 4, 66, 62, 49, 1, 106, 6,
    62, 0, 2, 37, 65, 10, 62, 25, 73, 36, 66, 10, 106, 1, 103, 1, 53, 5, 51, 31, 176, 1, 0, 62, 15, 67, 106, 30,
    168, 62, 34, 119, 68, 30, 71, 62, 45, 4, 62, 27, 7, 49, 30, 34, 34, 65, 34, 11, 34, 14, 63, 248, 23, 0, 8, 63,
    214, 4, 0, 30, 11, 42, 31, 231, 34, 0, 36, 1, 39, 1, 34, 1, 63, 35, 1, 0, 15, 33, 29, 35, 2, 33, 14, 36, 8, 63,
    140, 1, 0, 31, 4, 9, 0, 62, 77, 5, 45, 3, 41, 7, 42, 2, 65, 34, 65, 31, 96, 15, 0, 94, 210, 106, 6, 95, 180, 1,
    0, 30, 46, 62, 16, 2, 55, 9, 94, 86, 30, 30, 94, 216, 10, 94, 9, 2, 94, 30, 37, 67, 38, 8, 40, 66, 39, 94, 0,
    36, 94, 31, 21, 94, 36, 35, 65, 30, 92, 116, 12, 116, 12, 94, 57, 9, 121, 30, 105, 62, 55, 1, 62, 41, 1, 34, 2,
    33, 2, 34, 2, 36, 1, 44, 1, 33, 1, 39, 1, 62, 35, 1, 36, 2, 40, 1, 39, 1, 60, 1, 36, 1, 37, 1, 33, 3, 39, 1, 63,
    84, 1, 0, 2, 57, 65, 57, 65, 62, 1, 65, 57, 65, 62, 1, 65, 57, 65, 62, 1, 65, 57, 65, 62, 1, 65, 57, 65, 40, 2,
    126, 20, 95, 0, 2, 0, 62, 25, 68, 62, 20, 72, 33, 78, 33, 71, 15, 37, 1, 47, 31, 80, 4, 0, 62, 1, 6, 38, 30,
    183, 39, 1, 49, 2, 39, 1, 34, 1, 37, 5, 62, 32, 30, 3, 33, 30, 82, 62, 15, 3, 46, 2, 106, 4, 33, 65, 31, 64, 1,
    0, 62, 1, 17, 62, 18, 106, 5, 65, 31, 208, 1, 0, 62, 2, 106, 30, 184, 62, 3, 106, 4, 65, 31, 224, 1, 0, 39, 1,
    36, 1, 34, 1, 47, 1, 62, 167, 2, 105, 39, 30, 11, 62, 46, 4, 106, 4, 66, 31, 17, 3, 0, 126, 29, 65, 99, 65, 100,
    30, 46, 126, 15, 65, 111, 30, 164, 36, 1, 59, 1, 34, 1, 33, 2, 33, 1, 42, 1, 36, 1, 33, 1, 33, 6, 33, 4, 33, 1,
    33, 1, 33, 1, 35, 1, 34, 1, 33, 2, 33, 1, 33, 1, 33, 1, 33, 1, 33, 1, 34, 1, 33, 2, 36, 1, 39, 1, 36, 1, 36, 1,
    33, 1, 42, 1, 49, 5, 35, 1, 37, 1, 49, 30, 22, 66, 30, 240, 94, 14, 4, 94, 70, 12, 79, 2, 79, 1, 79, 1, 94, 7,
    10, 109, 94, 131, 30, 26, 93, 13, 94, 14, 4, 73, 7, 66, 14, 70, 30, 124, 95, 216, 3, 0, 4, 81, 3, 77, 3, 94, 89,
    4, 94, 65, 6, 76, 4, 65, 15, 76, 4, 94, 26, 8, 74, 6, 94, 10, 8, 94, 0, 2, 76, 4, 66, 30, 32, 95, 84, 1, 0, 12,
    78, 2, 77, 3, 74, 5, 94, 26, 7, 79, 2, 75, 6, 73, 7, 94, 117, 1, 94, 62, 106, 31, 6, 4, 0, 63, 224, 166, 0, 30,
    2, 63, 58, 16, 0, 6, 62, 192, 2, 63, 130, 22, 0, 14, 63, 49, 29, 0, 15, 63, 110, 2, 0, 31, 162, 9, 0, 63, 30, 2,
    0, 31, 226, 5, 0, 63, 75, 19, 0, 5, 63, 96, 16, 0, 31, 80, 221, 10, 62, 210, 31, 16, 254, 2,
};
// clang-format on

/* Letters and marks by case, as run lengths over U+0000 ... U+323FF: 0 mark, 1 upper, 2 lower, 3 a letter without case, 4
   upper and lower by turns, 5 lower and upper. Characters that are neither belong to any run. */
/* 966 bytes. Generated by tests/gen_unicode.py. */
// clang-format off
static const uint8_t dsv3__split_cases[] = {
    62, 67, 94, 43, 107, 69, 102, 62, 1, 94, 3, 158, 26, 177, 190, 18, 134, 66, 34, 164, 131, 34, 66, 36, 162, 131,
    34, 67, 34, 162, 135, 132, 164, 131, 34, 164, 130, 65, 97, 130, 66, 100, 34, 162, 131, 146, 179, 162, 133, 34,
    190, 29, 70, 34, 162, 130, 164, 35, 169, 94, 38, 97, 91, 126, 50, 30, 82, 132, 98, 132, 97, 68, 49, 162, 58, 94,
    5, 130, 162, 34, 67, 152, 68, 131, 131, 130, 162, 62, 20, 94, 18, 158, 5, 7, 158, 25, 142, 190, 68, 62, 10, 103,
    94, 19, 30, 33, 126, 34, 16, 126, 13, 30, 5, 98, 1, 126, 71, 15, 98, 7, 126, 5, 1, 126, 0, 29, 126, 59, 11, 126,
    28, 9, 105, 3, 118, 4, 97, 9, 97, 3, 97, 23, 121, 7, 126, 25, 9, 126, 12, 30, 28, 126, 24, 3, 97, 18, 97, 7,
    106, 15, 112, 4, 126, 25, 1, 97, 16, 105, 5, 102, 14, 110, 7, 126, 25, 29, 119, 2, 99, 16, 126, 25, 1, 97, 18,
    114, 23, 97, 11, 126, 25, 1, 97, 30, 0, 102, 15, 113, 1, 126, 29, 18, 103, 30, 16, 126, 25, 1, 97, 26, 106, 30,
    0, 97, 4, 126, 25, 1, 97, 30, 1, 101, 15, 98, 17, 126, 25, 2, 97, 16, 105, 8, 99, 24, 103, 4, 126, 39, 30, 25,
    126, 18, 1, 98, 12, 103, 30, 28, 126, 18, 1, 98, 9, 107, 20, 126, 30, 30, 10, 126, 19, 23, 101, 30, 85, 126, 13,
    20, 119, 4, 100, 3, 97, 3, 98, 7, 99, 4, 109, 12, 97, 17, 62, 18, 94, 14, 97, 67, 127, 93, 2, 0, 30, 5, 126, 2,
    62, 58, 73, 127, 17, 3, 0, 13, 115, 14, 114, 14, 114, 14, 126, 22, 30, 5, 102, 30, 37, 126, 71, 2, 126, 4, 1,
    126, 88, 30, 18, 126, 169, 9, 126, 23, 30, 52, 105, 30, 55, 126, 17, 17, 126, 8, 24, 126, 0, 13, 126, 26, 26,
    126, 6, 30, 11, 126, 21, 73, 135, 62, 34, 25, 100, 1, 102, 1, 98, 3, 102, 94, 14, 126, 33, 77, 97, 94, 4, 126,
    7, 30, 34, 158, 120, 72, 158, 68, 72, 40, 72, 40, 72, 40, 72, 40, 72, 40, 73, 136, 71, 40, 88, 40, 72, 40, 72,
    40, 72, 38, 74, 40, 72, 40, 72, 42, 70, 62, 91, 126, 65, 30, 20, 40, 162, 34, 66, 35, 66, 58, 162, 35, 65, 100,
    69, 40, 94, 31, 159, 125, 10, 0, 62, 18, 94, 18, 131, 34, 66, 135, 35, 163, 163, 69, 98, 35, 190, 69, 171, 3,
    142, 94, 18, 126, 49, 1, 126, 66, 30, 49, 127, 251, 1, 0, 7, 126, 74, 4, 127, 163, 117, 0, 158, 16, 97, 16, 97,
    156, 98, 2, 126, 50, 30, 9, 107, 142, 66, 158, 32, 97, 72, 133, 138, 99, 132, 97, 132, 66, 149, 36, 162, 36,
    176, 35, 164, 158, 8, 99, 130, 99, 65, 103, 1, 99, 1, 100, 1, 119, 29, 126, 34, 2, 126, 20, 30, 32, 109, 11,
    124, 10, 119, 25, 126, 2, 4, 126, 17, 28, 118, 1, 126, 37, 23, 99, 1, 104, 20, 123, 3, 126, 20, 1, 97, 3, 98, 2,
    101, 2, 97, 1, 126, 11, 7, 99, 12, 126, 17, 94, 14, 100, 73, 103, 94, 50, 126, 5, 29, 127, 0, 79, 0, 93, 97, 1,
    127, 225, 2, 0, 30, 82, 126, 147, 62, 2, 94, 7, 127, 151, 2, 0, 30, 101, 126, 66, 30, 2, 126, 88, 10, 126, 98,
    62, 10, 94, 10, 126, 66, 62, 10, 94, 10, 126, 82, 62, 9, 94, 11, 127, 65, 4, 0, 15, 126, 10, 30, 10, 126, 103,
    27, 127, 128, 1, 0, 62, 34, 94, 34, 126, 6, 30, 8, 102, 57, 6, 97, 94, 242, 126, 13, 5, 126, 46, 4, 126, 40, 30,
    12, 114, 30, 16, 126, 50, 3, 126, 23, 30, 27, 98, 2, 106, 4, 126, 15, 30, 2, 126, 18, 3, 126, 6, 29, 97, 2, 126,
    14, 3, 106, 3, 126, 18, 14, 104, 17, 126, 52, 19, 98, 30, 33, 126, 65, 30, 8, 126, 24, 2, 97, 18, 103, 6, 101,
    30, 0, 126, 26, 25, 97, 1, 110, 30, 1, 126, 23, 18, 119, 1, 126, 51, 20, 126, 205, 30, 11, 100, 30, 6, 126, 18,
    20, 126, 73, 13, 126, 71, 30, 5, 126, 206, 30, 86, 62, 2, 94, 33, 126, 19, 15, 97, 1, 97, 30, 64, 126, 19, 16,
    99, 28, 97, 10, 126, 10, 7, 97, 21, 97, 11, 126, 16, 19, 127, 146, 1, 0, 17, 126, 52, 30, 80, 126, 19, 21, 97,
    25, 126, 12, 14, 127, 91, 1, 0, 15, 97, 1, 126, 18, 30, 94, 127, 144, 20, 0, 1, 102, 25, 127, 190, 44, 0, 31,
    226, 6, 0, 127, 240, 2, 0, 16, 126, 18, 16, 127, 0, 3, 0, 62, 2, 94, 130, 126, 49, 1, 97, 30, 36, 126, 51, 28,
    127, 157, 76, 0, 31, 99, 23, 0, 58, 90, 58, 90, 58, 90, 58, 90, 58, 90, 58, 90, 58, 90, 58, 90, 58, 90, 58, 90,
    58, 90, 58, 90, 58, 94, 0, 58, 94, 2, 58, 94, 2, 58, 94, 2, 58, 94, 2, 58, 94, 2, 159, 54, 2, 0, 31, 0, 5, 0,
    74, 97, 94, 215, 30, 18, 126, 65, 30, 83, 126, 18, 7, 127, 119, 1, 0, 18, 126, 14, 31, 228, 1, 0, 124, 30, 198,
    126, 0, 2, 127, 224, 2, 0, 30, 18, 62, 4, 94, 4, 7, 127, 181, 58, 1,
};
// clang-format on

/* The second split: [一-龥぀-ゟ゠-ヿ]+ */
static bool dsv3__split_is_cjk(uint32_t code)
{
    return (code >= 0x4E00 && code <= 0x9FA5) || (code >= 0x3040 && code <= 0x30FF);
}

/* \p{Han}: a script, and not a range. Asked for one code after the other; *at: the range that is next. */
DSV3__INLINE bool dsv3__split_is_han(uint32_t code, uint32_t *at)
{
    static const uint32_t ranges[][2] = {
        {0x2E80, 0x2E99},   {0x2E9B, 0x2EF3},   {0x2F00, 0x2FD5},   {0x3005, 0x3005},   {0x3007, 0x3007},
        {0x3021, 0x3029},   {0x3038, 0x303B},   {0x3400, 0x4DBF},   {0x4E00, 0x9FFF},   {0xF900, 0xFA6D},
        {0xFA70, 0xFAD9},   {0x16FE2, 0x16FE3}, {0x16FF0, 0x16FF1}, {0x20000, 0x2A6DF}, {0x2A700, 0x2B739},
        {0x2B740, 0x2B81D}, {0x2B820, 0x2CEA1}, {0x2CEB0, 0x2EBE0}, {0x2EBF0, 0x2EE5D}, {0x2F800, 0x2FA1D},
        {0x30000, 0x3134A}, {0x31350, 0x323AF},
    };
    if (*at < DSV3__COUNT(ranges) && code > ranges[*at][1])
        ++*at;
    return *at < DSV3__COUNT(ranges) && code >= ranges[*at][0];
}

/* Unfolds run lengths, a character at a time. */
typedef struct dsv3__split_reader {
    const uint8_t *p;
    uint32_t left, at; /* characters of the run to come, and gone */
    uint8_t class_of_run;
} dsv3__split_reader;

DSV3__INLINE uint8_t dsv3__split_next(dsv3__split_reader *r)
{
    if (!r->left) {
        r->class_of_run = *r->p >> 5;
        r->left = *r->p++ & 31;
        if (r->left == 30)
            r->left += *r->p++;
        else if (r->left == 31)
            r->left = r->p[0] | (uint32_t)r->p[1] << 8 | (uint32_t)r->p[2] << 16, r->p += 3;
        r->at = 0;
    }
    r->left--;
    r->at++;
    return r->class_of_run;
}

/* The class of a letter or mark by the case table's run. */
static uint8_t dsv3__split_case(const dsv3__split_reader *r)
{
    static const uint8_t classes[] = {DSV3__SPLIT_MARK, DSV3__SPLIT_UPPER, DSV3__SPLIT_LOWER, DSV3__SPLIT_CASELESS};
    if (r->class_of_run < 4)
        return classes[r->class_of_run];
    return (r->class_of_run + r->at) & 1 ? DSV3__SPLIT_UPPER : DSV3__SPLIT_LOWER; /* turn by turn, 4: upper first */
}

/* Unfolds the run lengths into blocks of 128; blocks of one class throughout are shared. */
static void dsv3__split_init(dsv3__split *s, bool kimi)
{
    uint8_t uniform[16] = {0}; /* class -> 1 + its block */
    dsv3__split_reader classes = {dsv3__split_runs, 0, 0, 0}, cases = {dsv3__split_cases, 0, 0, 0};
    uint32_t n_blocks = 0, han = 0;
    s->kimi = kimi;
    s->mark = kimi ? DSV3__SPLIT_MARK : DSV3__SPLIT_WORD;
    for (uint32_t b = 0; b < DSV3__COUNT(s->block_of); b++) {
        uint8_t *block = s->blocks[n_blocks];
        bool same = true;
        for (uint32_t i = 0; i < DSV3__SPLIT_BLOCK; i++) {
            uint32_t code = b * DSV3__SPLIT_BLOCK + i;
            bool zone = kimi ? dsv3__split_is_han(code, &han) : dsv3__split_is_cjk(code);
            uint8_t c = dsv3__split_next(&classes);
            if (kimi)
                dsv3__split_next(&cases);
            if (kimi && c == DSV3__SPLIT_WORD)
                c = dsv3__split_case(&cases);
            else if (kimi && c == DSV3__SPLIT_PUNCT)
                c = DSV3__SPLIT_OTHER;
            block[i] = (uint8_t)(c | (zone ? DSV3__SPLIT_CJK : 0));
            same = same && block[i] == block[0];
        }
        if (same && uniform[block[0]]) {
            s->block_of[b] = uniform[block[0]] - 1;
            continue;
        }
        DSV3_ASSERT(n_blocks < DSV3__SPLIT_BLOCKS_MAX - 1);
        s->block_of[b] = (uint8_t)n_blocks++;
        if (same)
            uniform[block[0]] = (uint8_t)n_blocks;
    }
}

/* Class of the character at p (before end), and its length. */
DSV3__INLINE unsigned dsv3__split_class(const dsv3__split *s, const uint8_t *p, const uint8_t *end, size_t *n)
{
    uint32_t code;
    *n = 1;
    if (*p < 0x80)
        return s->blocks[0][*p];
    *n = dsv3__utf8_length((const char *)p, (const char *)end);
    switch (*n) {
    case 2: code = (p[0] & 31u) << 6 | (p[1] & 63u); break;
    case 3: code = (p[0] & 15u) << 12 | (p[1] & 63u) << 6 | (p[2] & 63u); break;
    case 4:
        code = (p[0] & 7u) << 18 | (p[1] & 63u) << 12 | (p[2] & 63u) << 6 | (p[3] & 63u);
        if (code >= DSV3__SPLIT_END)
            return code >= 0xE0100 && code <= 0xE01EF ? s->mark : (unsigned)DSV3__SPLIT_OTHER;
        break;
    default: *n = 1; return DSV3__SPLIT_OTHER;
    }
    return s->blocks[s->block_of[code / DSV3__SPLIT_BLOCK]][code % DSV3__SPLIT_BLOCK];
}

DSV3__INLINE bool dsv3__split_is_newline(uint8_t c)
{
    return c == '\r' || c == '\n';
}

/* End of the run of characters of class `want` (a zone's bit with it) from p. */
DSV3__INLINE const uint8_t *dsv3__split_run(const dsv3__split *s, const uint8_t *p, const uint8_t *end, unsigned want)
{
    size_t n;
    while (p < end && dsv3__split_class(s, p, end, &n) == want)
        p += n;
    return p;
}

/* ` ?[\p{P}\p{S}]+[\r\n]*` from its first punctuation on. */
static const uint8_t *dsv3__split_punct(const dsv3__split *s, const uint8_t *p, const uint8_t *end, unsigned zone)
{
    p = dsv3__split_run(s, p, end, DSV3__SPLIT_PUNCT | zone);
    while (!zone && p < end && dsv3__split_is_newline(*p))
        p++;
    return p;
}

/* `\s*[\r\n]+|\s+(?!\S)|\s+`: to the last newline of the run; else all but its last character, which is left for the
   word behind it, unless the text ends there, or V3's first two splits cut there. */
static const uint8_t *dsv3__split_space(const dsv3__split *s, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *begin = p, *last = p, *newline = NULL;
    unsigned c = DSV3__SPLIT_NUMBER;
    size_t n;
    for (; p < end && (c = dsv3__split_class(s, p, end, &n)) == DSV3__SPLIT_SPACE; p += n) {
        last = p;
        if (dsv3__split_is_newline(*p))
            newline = p + 1;
    }
    if (newline)
        return newline;
    if (p == end || last == begin || (!s->kimi && (c == DSV3__SPLIT_NUMBER || (c & DSV3__SPLIT_CJK))))
        return p;
    return last;
}

/* Characters that nothing matches: to the first that something does, be it as the prefix of a word. */
static const uint8_t *dsv3__split_other(const dsv3__split *s, const uint8_t *p, const uint8_t *end, unsigned zone)
{
    const uint8_t *begin = p;
    for (;;) {
        size_t n;
        dsv3__split_class(s, p, end, &n);
        const uint8_t *next = p + n;
        unsigned c = next < end ? dsv3__split_class(s, next, end, &n) : (unsigned)DSV3__SPLIT_NUMBER;
        if (c == (DSV3__SPLIT_WORD | zone))
            return p == begin ? dsv3__split_run(s, next, end, c) : p;
        if (c != (DSV3__SPLIT_OTHER | zone))
            return next;
        p = next;
    }
}

/* End of the piece that begins at p (before end). The first two splits (numbers in threes; CJK or not) are only borders
   that the alternatives of the third do not cross: its classes are compared together with the zone's bit, and a number
   is in none of them. */
static const uint8_t *dsv3__split_v3(const dsv3__split *s, const uint8_t *p, const uint8_t *end)
{
    size_t n;
    unsigned c = dsv3__split_class(s, p, end, &n), zone = c & DSV3__SPLIT_CJK, next;
    const uint8_t *e = p + n;
    switch (c & ~(unsigned)DSV3__SPLIT_CJK) {
    case DSV3__SPLIT_WORD: return dsv3__split_run(s, e, end, c);
    case DSV3__SPLIT_PUNCT:
        if (*p >= 0x80 || e == end || *e >= 0x80 || s->blocks[0][*e] != DSV3__SPLIT_WORD)
            return dsv3__split_punct(s, e, end, zone);
        while (e < end && *e < 0x80 && s->blocks[0][*e] == DSV3__SPLIT_WORD) /* [!"#$...][A-Za-z]+ */
            e++;
        return e;
    case DSV3__SPLIT_NUMBER:
        for (int i = 1; i < 3 && e < end && dsv3__split_class(s, e, end, &n) == DSV3__SPLIT_NUMBER; i++)
            e += n;
        return e;
    case DSV3__SPLIT_SPACE:
        next = e < end && !dsv3__split_is_newline(*p) ? dsv3__split_class(s, e, end, &n) : (unsigned)DSV3__SPLIT_SPACE;
        if (next == DSV3__SPLIT_WORD)
            return dsv3__split_run(s, e + n, end, DSV3__SPLIT_WORD);
        if (next == DSV3__SPLIT_PUNCT && *p == ' ')
            return dsv3__split_punct(s, e, end, 0);
        return dsv3__split_space(s, p, end);
    default: return dsv3__split_other(s, p, end, zone);
    }
}

/* Is it in a set of Kimi's classes? Of the sets of cased letters Han is no part. */
#define DSV3__SPLIT_BIT(c)   (1u << (c))
#define DSV3__SPLIT_ANY_CASE (DSV3__SPLIT_BIT(DSV3__SPLIT_CASELESS) | DSV3__SPLIT_BIT(DSV3__SPLIT_MARK))
#define DSV3__SPLIT_UPPERS   (DSV3__SPLIT_BIT(DSV3__SPLIT_UPPER) | DSV3__SPLIT_ANY_CASE)
#define DSV3__SPLIT_LOWERS   (DSV3__SPLIT_BIT(DSV3__SPLIT_LOWER) | DSV3__SPLIT_ANY_CASE)
#define DSV3__SPLIT_SIGNS    (DSV3__SPLIT_BIT(DSV3__SPLIT_OTHER) | DSV3__SPLIT_BIT(DSV3__SPLIT_MARK))

/* End of the run of characters whose class is in a set; *last: behind the last one that has any case, or NULL. */
static const uint8_t *dsv3__split_set(const dsv3__split *s, const uint8_t *p, const uint8_t *end, unsigned set,
                                      const uint8_t **last)
{
    size_t n;
    *last = NULL;
    for (; p < end; p += n) {
        unsigned bit = DSV3__SPLIT_BIT(dsv3__split_class(s, p, end, &n));
        if (!(bit & set))
            break;
        *last = bit & DSV3__SPLIT_ANY_CASE ? p + n : *last;
    }
    return p;
}

/* `Upper*Lower+` from p, or NULL. Where no small letter ends the capitals, the last that has any case is the Lower. */
static const uint8_t *dsv3__split_lower(const dsv3__split *s, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *any, *e = dsv3__split_set(s, p, end, DSV3__SPLIT_UPPERS, &any), *ignored;
    const uint8_t *lower = dsv3__split_set(s, e, end, DSV3__SPLIT_LOWERS, &ignored);
    return lower > e ? lower : any;
}

/* `Upper+Lower*` from p, or NULL, where `Upper*Lower+` is not. */
static const uint8_t *dsv3__split_upper(const dsv3__split *s, const uint8_t *p, const uint8_t *end)
{
    const uint8_t *any, *e = dsv3__split_set(s, p, end, DSV3__SPLIT_UPPERS, &any);
    return e > p ? e : NULL;
}

/* `('s|'t|'re|'ve|'m|'ll|'d)?`, capitals and the long s too. */
static const uint8_t *dsv3__split_contraction(const uint8_t *p, const uint8_t *end)
{
    static const char *const pairs[] = {"re", "ve", "ll"};
    size_t left = (size_t)(end - p);
    if (left < 2 || *p != '\'')
        return p;
    uint8_t a = p[1] | 0x20, b = left > 2 ? p[2] | 0x20 : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd')
        return p + 2;
    if (left > 2 && p[1] == 0xC5 && p[2] == 0xBF)
        return p + 3;
    for (uint32_t i = 0; i < DSV3__COUNT(pairs); i++)
        if (a == (uint8_t)pairs[i][0] && b == (uint8_t)pairs[i][1])
            return p + 3;
    return p;
}

/* End of Kimi's piece that begins at p (before end). */
static const uint8_t *dsv3__split_kimi(const dsv3__split *s, const uint8_t *p, const uint8_t *end)
{
    size_t n;
    unsigned c = dsv3__split_class(s, p, end, &n);
    const uint8_t *behind = p + n, *e = NULL, *ignored;
    bool prefix =
        !((DSV3__SPLIT_UPPERS | DSV3__SPLIT_LOWERS) & ~DSV3__SPLIT_BIT(DSV3__SPLIT_MARK) & DSV3__SPLIT_BIT(c)) &&
        c != DSV3__SPLIT_NUMBER && !dsv3__split_is_newline(*p);
    if (c & DSV3__SPLIT_HAN)
        return dsv3__split_set(s, p, end, 0xFFFFu & ~0xFFu, &ignored);
    if (prefix)
        e = dsv3__split_lower(s, behind, end);
    if (!e)
        e = dsv3__split_lower(s, p, end);
    if (!e && prefix)
        e = dsv3__split_upper(s, behind, end);
    if (!e)
        e = dsv3__split_upper(s, p, end);
    if (e)
        return dsv3__split_contraction(e, end);
    if (c == DSV3__SPLIT_NUMBER) {
        e = behind;
        for (int i = 1; i < 3 && e < end && (dsv3__split_class(s, e, end, &n) & 7) == DSV3__SPLIT_NUMBER; i++)
            e += n;
        return e;
    }
    const unsigned signs = DSV3__SPLIT_SIGNS | DSV3__SPLIT_SIGNS << DSV3__SPLIT_HAN; /* Han or not */
    e = dsv3__split_set(s, *p == ' ' ? behind : p, end, signs, &ignored);
    if (e == (*p == ' ' ? behind : p))
        return dsv3__split_space(s, p, end);
    while (e < end && dsv3__split_is_newline(*e))
        e++;
    return e;
}

DSV3__INLINE const uint8_t *dsv3__split_piece(const dsv3__split *s, const uint8_t *p, const uint8_t *end)
{
    return s->kimi ? dsv3__split_kimi(s, p, end) : dsv3__split_v3(s, p, end);
}

// =============================================================================
// >>bpe   Byte-pair merging, exactly: bytes of a piece -> words -> ids; and the tables it stands on.
//         Needs: mem. Owns: the tables of one tokenizer, which never change once they are built.
// =============================================================================

/* A piece starts as its bytes; of all neighbouring pairs that the merges name, the one of lowest rank (the leftmost of
   these) becomes one, until none is left.

   A token that merging can make is a *word*, numbered by age: 0 ... 255 are the bytes themselves, 256 + r is what merge
   r makes. So a word is its own rank: "lowest rank" is "lowest word", and one number a pair serves as both.

   Two ways of merging give the same result. dsv3__bpe_heap follows the rule to the letter, n log n, for any file.
   dsv3__bpe_chain never merges: it takes at each place the longest word that can stand behind the one before, and goes
   back a word where none can. It rests on two facts about files in which every word, spelled out, merges back to itself
   (what a BPE trainer writes is so; dsv3__bpe_sound verifies it when the file is opened):
     - a row of words is the merging of its bytes exactly if each two neighbours are the merging of theirs: whatever
       merges first across some border would do so with only these two words present;
     - two neighbours are that if no pair (x, y) across the border ever merges: x among the words that end the left one
       while it grows, y among those that begin the right one (dsv3__bpe_apart). A look-up or two settle it.
   PERF: chain is 1.5 to 3 times as fast as heap on running text, and 2 to 60 times on a million equal characters. */

enum {
    DSV3__BPE_CHAIN_MAX = 256,     /* bytes of a word for chain (DeepSeek-V3: 128): how often it may look at a byte */
    DSV3__BPE_UNITS_MAX = 1 << 24, /* beginnings of tokens (DeepSeek-V3: 274,130) */
    DSV3__BPE_TRIES = 64,          /* places looked at before a new one is taken */
    DSV3__BPE_PROBES_MAX = 256     /* merges whose hashes collide this often were made to */
};

/* Strings to numbers, in one array (a double array without the second). A unit is a beginning of some string:
     bits  0-8   the byte it ends with, plus 1; 0: the unit is free
           9-30  the number of the string it is, plus 1; 0: it is none
             31  some unit has this place as its base
          32-63  its base: the beginning longer by byte b is at base + b, if it is there
   Bases are different and not 0, so that the byte alone tells whose a unit is. PERF: beginnings that follow each other
   lie close together; a hash table of the same is twice as large, and a look-up touches a cache line for every byte:
   with one, tokenizing took half as long again. */
typedef struct dsv3__bpe_trie {
    uint64_t *units; /* 256 behind the last base */
    uint32_t root;   /* base of the empty string */
    uint32_t depth;  /* bytes of the longest string */
} dsv3__bpe_trie;

/* The two words that a word was made of (a byte: itself twice). In bit 31: does any merge have this word on its left,
   on its right? PERF: that spares 15 % of the look-ups of pairs in Italian, 70 % in Chinese. */
typedef struct dsv3__bpe_parts {
    uint32_t left, right;
} dsv3__bpe_parts;

#define DSV3__BPE_JOINS ((uint32_t)1 << 31)

#define DSV3__BPE_GONE       UINT32_MAX /* no word */
#define DSV3__BPE_VALUE_BITS 22
#define DSV3__BPE_VALUE_MASK ((1u << DSV3__BPE_VALUE_BITS) - 1)
#define DSV3__BPE_MULTIPLIER 0x9E3779B97F4A7C15ull

#ifdef DSV3_REGRESSION
#define DSV3__BPE_SMALL 64
#else
#define DSV3__BPE_SMALL 8192 /* bytes of scratch on the stack: pieces of 1000 bytes with chain, of 227 with heap */
#endif

typedef struct dsv3__bpe {
    uint32_t n_words;       /* bytes, what merges make, and (ignore_merges) vocabulary that no merge makes */
    int32_t *ids;           /* [n_words] */
    dsv3__bpe_parts *parts; /* [256 + merges] */
    uint64_t *pairs;        /* [1 << (64 - pairs_shift)] left << 43 | right << 22 | what they make; 0: an empty slot */
    unsigned pairs_shift;
    dsv3__bpe_trie trie; /* bytes -> word */
    bool chain;          /* dsv3__bpe_chain may be used */
    bool whole;          /* ignore_merges: a piece that is a word stays whole */
} dsv3__bpe;

#define DSV3__BPE_BYTE(unit) ((unit)&511)
/* 1 + the number of the string that ends here; 0: none does. */
#define DSV3__BPE_VALUE(unit) ((uint32_t)((unit) >> 9) & DSV3__BPE_VALUE_MASK)
#define DSV3__BPE_BASE(unit)  ((uint32_t)((unit) >> 32))

/* The number of a string; -1 if it is not there. */
static int64_t dsv3__bpe_trie_find(const dsv3__bpe_trie *trie, const char *bytes, size_t n)
{
    uint64_t unit = (uint64_t)trie->root << 32;
    for (size_t i = 0; i < n; i++) {
        unit = trie->units[DSV3__BPE_BASE(unit) + (uint8_t)bytes[i]];
        if (DSV3__BPE_BYTE(unit) != (uint8_t)bytes[i] + 1u)
            return -1;
    }
    return (int64_t)DSV3__BPE_VALUE(unit) - 1;
}

/* The word that left and right merge into; 0 if none. Open addressing, linear probing. */
DSV3__INLINE uint32_t dsv3__bpe_pair(const dsv3__bpe *t, uint32_t left, uint32_t right)
{
    uint64_t key = (uint64_t)left << 21 | right, mask = ~(uint64_t)0 >> t->pairs_shift;
    for (uint64_t i = (key * DSV3__BPE_MULTIPLIER) >> t->pairs_shift;; i = (i + 1) & mask) {
        uint64_t slot = t->pairs[i];
        if (slot >> DSV3__BPE_VALUE_BITS == key)
            return (uint32_t)slot & DSV3__BPE_VALUE_MASK; /* an empty slot reads as key 0, value 0 */
        if (!slot)
            return 0;
    }
}

// ---- Merging ------------------------------------------------------------------------------------------------

/* Where ids go. More than `cap` are only counted. */
typedef struct dsv3__bpe_sink {
    int32_t *tokens; /* [cap] */
    size_t cap, n;
    dsv3__mem mem; /* for pieces too long for `small` */
    void *big;
    uint64_t big_size;
    uint64_t small[DSV3__BPE_SMALL / 8];
    dsv3_error *err;
} dsv3__bpe_sink;

DSV3__INLINE void dsv3__bpe_push(dsv3__bpe_sink *sink, int32_t id)
{
    if (sink->n < sink->cap)
        sink->tokens[sink->n] = id;
    sink->n++;
}

/* mem: the tokenizer's, which other threads use too: what a call takes for a long piece is counted on its own. */
static void dsv3__bpe_sink_init(dsv3__bpe_sink *sink, const dsv3__mem *mem, int32_t *tokens, size_t cap)
{
    uint64_t limit = mem->limit == 0 ? 0 : mem->limit > mem->used ? mem->limit - mem->used : 1;
    dsv3__mem_init(&sink->mem, &mem->allocator, limit);
    sink->tokens = tokens;
    sink->cap = cap;
    sink->n = 0;
    sink->big = NULL;
    sink->big_size = 0;
}

/* Scratch of one piece; what it holds is gone with the next call. */
static dsv3_result dsv3__bpe_scratch(dsv3__bpe_sink *sink, void **scratch, uint64_t size)
{
    *scratch = sink->small;
    if (size <= sizeof sink->small)
        return DSV3_OK;
    if (size > sink->big_size) {
        dsv3__mem_free(&sink->mem, sink->big);
        sink->big_size = 0;
        DSV3__TRY(dsv3__mem_alloc(&sink->mem, &sink->big, size, "tokenizing a long piece", sink->err));
        sink->big_size = size;
    }
    *scratch = sink->big;
    return DSV3_OK;
}

/* The longest word at p, and its length. Every byte is a word. */
DSV3__INLINE uint32_t dsv3__bpe_longest(const dsv3__bpe *t, const uint8_t *p, const uint8_t *end, size_t *n)
{
    const uint64_t *units = t->trie.units;
    uint64_t unit = (uint64_t)t->trie.root << 32;
    uint32_t word = 0;
    *n = 0;
    for (const uint8_t *q = p; q < end;) {
        unit = units[DSV3__BPE_BASE(unit) + *q];
        if (DSV3__BPE_BYTE(unit) != *q++ + 1u)
            break;
        if (DSV3__BPE_VALUE(unit))
            word = DSV3__BPE_VALUE(unit) - 1, *n = (size_t)(q - p);
    }
    return word;
}

/* Do x and y stay two words although their parts might merge across the border, if only words below `limit` are made?
   Walks back in time: x is what ended the left one, y what began the right one, while x was not yet a part of x_until
   nor y of y_until. A tie (y's own merge is of the same pair) falls to the pair across the border, as the leftmost. */
static bool dsv3__bpe_parts_apart(const dsv3__bpe *t, uint32_t x, uint32_t y, uint32_t limit)
{
    uint32_t x_until = limit, y_until = limit;
    dsv3__bpe_parts px = t->parts[x], py = t->parts[y];
    while (x >= 256 || y >= 256) {
        if (x > y) {
            x_until = x;
            x = px.right & ~DSV3__BPE_JOINS;
            px = t->parts[x];
        } else {
            y_until = y;
            y = py.left & ~DSV3__BPE_JOINS;
            py = t->parts[y];
        }
        if (px.left & py.right & DSV3__BPE_JOINS) {
            uint32_t made = dsv3__bpe_pair(t, x, y);
            if (made && made < x_until && made <= y_until)
                return false;
        }
    }
    return true;
}

/* Is this row of two words the merging of its bytes? */
DSV3__INLINE bool dsv3__bpe_apart(const dsv3__bpe *t, uint32_t x, uint32_t y)
{
    if ((t->parts[x].left & t->parts[y].right & DSV3__BPE_JOINS) && dsv3__bpe_pair(t, x, y))
        return false;
    return dsv3__bpe_parts_apart(t, x, y, UINT32_MAX);
}

typedef struct dsv3__bpe_link {
    uint32_t word, end; /* its bytes end here */
} dsv3__bpe_link;

/* Merges without merging: see the top of the section. Linear: each place is given up at most once.
   first, n_first   the longest word at p, shorter than the piece */
static dsv3_result dsv3__bpe_chain(const dsv3__bpe *t, const uint8_t *p, size_t n, uint32_t first, size_t n_first,
                                   dsv3__bpe_sink *sink)
{
    size_t n_links = 0, pos = 0, len = n_first;
    uint32_t word = first;
    void *scratch;
    DSV3__TRY(dsv3__bpe_scratch(sink, &scratch, n * sizeof(dsv3__bpe_link) + n / 8 + 1));
    dsv3__bpe_link *links = (dsv3__bpe_link *)scratch;      /* [n_links] the merging of the first pos bytes */
    uint8_t *dead = (uint8_t *)scratch + n * sizeof *links; /* a bit a place: no word of the result ends here */
    memset(dead, 0, n / 8 + 1);
    while (pos < n) {
        size_t end = pos + len;
        if (!(dead[end >> 3] >> (end & 7) & 1) && (n_links == 0 || dsv3__bpe_apart(t, links[n_links - 1].word, word))) {
            links[n_links].word = word;
            links[n_links++].end = (uint32_t)end;
            pos = end;
            if (pos < n)
                word = dsv3__bpe_longest(t, p + pos, p + n, &len);
            continue;
        }
        while (len == 1) { /* nothing can begin here: the word before was wrong */
            DSV3_ASSERT(n_links > 0);
            dead[pos >> 3] |= (uint8_t)(1 << (pos & 7));
            n_links--;
            len = pos - (n_links ? links[n_links - 1].end : 0);
            pos -= len;
        }
        word = dsv3__bpe_longest(t, p + pos, p + pos + len - 1, &len); /* the next shorter one */
    }
    for (size_t i = 0; i < n_links; i++)
        dsv3__bpe_push(sink, t->ids[links[i].word]);
    return DSV3_OK;
}

/* A piece as a list of words, and the pairs in it that can merge. */
typedef struct dsv3__bpe_list {
    uint32_t *word, *prev, *next; /* [n]; a place that was merged into its left neighbour holds DSV3__BPE_GONE */
    uint64_t *heap;               /* [n_heap] new word << 32 | place, the smallest first; stale ones stay until met */
    size_t n, n_heap;
} dsv3__bpe_list;

static void dsv3__bpe_heap_push(dsv3__bpe_list *l, uint64_t entry)
{
    size_t i = l->n_heap++;
    for (; i > 0 && l->heap[(i - 1) / 2] > entry; i = (i - 1) / 2)
        l->heap[i] = l->heap[(i - 1) / 2];
    l->heap[i] = entry;
}

static uint64_t dsv3__bpe_heap_pop(dsv3__bpe_list *l)
{
    uint64_t top = l->heap[0], last = l->heap[--l->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= l->n_heap)
            break;
        if (child + 1 < l->n_heap && l->heap[child + 1] < l->heap[child])
            child++;
        if (l->heap[child] >= last)
            break;
        l->heap[i] = l->heap[child];
        i = child;
    }
    l->heap[i] = last;
    return top;
}

/* Enters the pair that begins at `place`, if it merges. */
static void dsv3__bpe_list_pair(const dsv3__bpe *t, dsv3__bpe_list *l, uint32_t place)
{
    uint32_t next = l->next[place], made = next < l->n ? dsv3__bpe_pair(t, l->word[place], l->word[next]) : 0;
    if (made)
        dsv3__bpe_heap_push(l, (uint64_t)made << 32 | place);
}

/* The rule itself: the pair of lowest rank merges, the leftmost of those. n log n. */
static dsv3_result dsv3__bpe_heap(const dsv3__bpe *t, const uint8_t *p, size_t n, dsv3__bpe_sink *sink)
{
    dsv3__bpe_list l;
    void *scratch;
    /* n - 1 pairs at first, and two for each of at most n - 1 merges: fewer than 3 n in all */
    DSV3__TRY(dsv3__bpe_scratch(sink, &scratch, (uint64_t)n * (3 * sizeof *l.heap + 3 * sizeof *l.word)));
    l.heap = (uint64_t *)scratch;
    l.word = (uint32_t *)(l.heap + 3 * n);
    l.prev = l.word + n;
    l.next = l.prev + n;
    l.n = n;
    l.n_heap = 0;
    for (uint32_t i = 0; i < n; i++) {
        l.word[i] = p[i];
        l.prev[i] = i - 1; /* of place 0: behind the end */
        l.next[i] = i + 1;
    }
    for (uint32_t i = 0; i + 1 < n; i++)
        dsv3__bpe_list_pair(t, &l, i);
    while (l.n_heap) {
        uint64_t top = dsv3__bpe_heap_pop(&l);
        uint32_t place = (uint32_t)top, made = (uint32_t)(top >> 32), next = l.next[place];
        if (l.word[place] == DSV3__BPE_GONE || next >= n || dsv3__bpe_pair(t, l.word[place], l.word[next]) != made)
            continue;
        l.word[place] = made;
        l.word[next] = DSV3__BPE_GONE;
        l.next[place] = l.next[next];
        if (l.next[place] < n)
            l.prev[l.next[place]] = place;
        dsv3__bpe_list_pair(t, &l, place);
        if (l.prev[place] < n)
            dsv3__bpe_list_pair(t, &l, l.prev[place]);
    }
    for (uint32_t i = 0; i < n; i = l.next[i])
        dsv3__bpe_push(sink, t->ids[l.word[i]]);
    return DSV3_OK;
}

static dsv3_result dsv3__bpe_merge(const dsv3__bpe *t, const uint8_t *p, size_t n, dsv3__bpe_sink *sink)
{
    if (t->chain || t->whole) {
        size_t n_word;
        uint32_t word = dsv3__bpe_longest(t, p, p + n, &n_word);
        if (n_word == n) {
            dsv3__bpe_push(sink, t->ids[word]);
            return DSV3_OK;
        }
        if (t->chain)
            return dsv3__bpe_chain(t, p, n, word, n_word, sink);
    }
    return dsv3__bpe_heap(t, p, n, sink);
}

// ---- Building: a trie ---------------------------------------------------------------------------------------

/* What the file says is not what is run here, or makes no sense. */
#define DSV3__BPE_FAIL(err, ...) DSV3__FAIL((err), DSV3_ERROR_TOKENIZER, "tokenizer.json: " __VA_ARGS__)

/* A string on its way into a trie. */
typedef struct dsv3__bpe_item {
    uint32_t at, n; /* bytes in the pool */
    uint32_t value;
} dsv3__bpe_item;

/* A unit, and the strings that begin as it does: items [from, to). */
typedef struct dsv3__bpe_branch {
    uint32_t place, depth, from, to;
} dsv3__bpe_branch;

typedef struct dsv3__bpe_builder {
    dsv3__bpe_trie *trie;
    dsv3__mem *mem;
    dsv3_error *err;
    const char *what; /* for errors */
    const char *pool;
    uint64_t cap;                  /* units allocated */
    uint64_t low;                  /* no free unit stands before */
    uint64_t end;                  /* all behind are free */
    dsv3__bpe_item *items, *spare; /* PERF: copied about, so that a branch's strings lie together */
    dsv3__bpe_branch *stack;
    uint64_t n_stack, stack_cap;
    uint32_t count[256]; /* strings of a branch by the byte they go on with; 0 between calls */
} dsv3__bpe_builder;

#define DSV3__BPE_IS_BASE ((uint64_t)1 << 31)

/* The first place from `at` on, before `stop`, where the first of n bytes may go, if the others follow. */
static uint64_t dsv3__bpe_trie_fit(const uint64_t *units, uint64_t at, uint64_t stop, const uint8_t *bytes, uint32_t n)
{
    for (; at < stop; at++) {
        uint64_t base = at - bytes[0];
        uint32_t i = 1;
        if (DSV3__BPE_BYTE(units[at]) || (units[base] & DSV3__BPE_IS_BASE))
            continue;
        while (i < n && !DSV3__BPE_BYTE(units[base + bytes[i]]))
            i++;
        if (i >= n)
            break;
    }
    return at;
}

/* A base that nobody has, with free units for all n bytes: in one of the first holes, else behind everything. */
static dsv3_result dsv3__bpe_trie_place(dsv3__bpe_builder *b, const uint8_t *bytes, uint32_t n, uint32_t *base)
{
    uint64_t cap = b->cap, room = b->end + DSV3__BPE_TRIES + 768, first = bytes[0] + 1u, at, stop; /* 0 is no base */
    if (cap < room) {
        void *grown = b->trie->units;
        DSV3__TRY(dsv3__mem_grow(b->mem, &grown, &b->cap, cap, room, sizeof(uint64_t), "tokens", b->err));
        b->trie->units = (uint64_t *)grown;
        memset(b->trie->units + cap, 0, (size_t)(b->cap - cap) * sizeof(uint64_t));
    }
    while (b->low < b->end && DSV3__BPE_BYTE(b->trie->units[b->low]))
        b->low++;
    at = b->low > first ? b->low : first;
    stop = at + DSV3__BPE_TRIES;
    at = dsv3__bpe_trie_fit(b->trie->units, at, stop, bytes, n);
    if (at == stop) {
        b->low++; /* a hole that is hard to fill */
        at = b->end > first ? b->end : first;
        at = dsv3__bpe_trie_fit(b->trie->units, at, at + 512, bytes, n); /* found: no base is at or behind b->end */
    }
    *base = (uint32_t)(at - bytes[0]);
    return DSV3_OK;
}

/* The string that ends at this unit gives its value. */
static dsv3_result dsv3__bpe_trie_value(dsv3__bpe_builder *b, const dsv3__bpe_branch *at, dsv3__bpe_item item)
{
    if (DSV3__BPE_VALUE(b->trie->units[at->place])) {
        dsv3__str text;
        text.p = b->pool + item.at;
        text.n = item.n;
        return DSV3__FAIL(b->err, DSV3_ERROR_TOKENIZER, "%s: \"%S\" stands there twice", b->what, &text);
    }
    b->trie->units[at->place] |= (uint64_t)(item.value + 1) << 9;
    if (b->trie->depth < at->depth)
        b->trie->depth = at->depth;
    return DSV3_OK;
}

/* Counts the branch's strings by the byte they go on with: bytes [n] are those in use, b->count how often. One that
   ends here leaves the branch. */
static dsv3_result dsv3__bpe_trie_count(dsv3__bpe_builder *b, dsv3__bpe_branch *at, uint8_t *bytes, uint32_t *n)
{
    const char *pool = b->pool + at->depth;
    *n = 0;
    for (uint32_t i = at->from; i < at->to; i++) {
        dsv3__bpe_item item = b->items[i];
        if (item.n == at->depth) {
            DSV3__TRY(dsv3__bpe_trie_value(b, at, item));
            b->items[i] = b->items[at->from++];
            continue;
        }
        uint8_t byte = (uint8_t)pool[item.at];
        if (b->count[byte]++ == 0)
            bytes[(*n)++] = byte;
    }
    return DSV3_OK;
}

/* Puts the branch's strings in the order of `bytes`. */
static void dsv3__bpe_trie_sort(dsv3__bpe_builder *b, const dsv3__bpe_branch *at, const uint8_t *bytes, uint32_t n)
{
    const char *pool = b->pool + at->depth;
    uint32_t first[256], next = at->from;
    for (uint32_t i = 0; i < n; i++) {
        first[bytes[i]] = next;
        next += b->count[bytes[i]];
    }
    for (uint32_t i = at->from; i < at->to; i++)
        b->spare[first[(uint8_t)pool[b->items[i].at]]++] = b->items[i];
    memcpy(b->items + at->from, b->spare + at->from, (at->to - at->from) * sizeof *b->items);
}

/* Takes a base, for the unit at `place` of this depth, and the units of these bytes behind it. */
static dsv3_result dsv3__bpe_trie_take(dsv3__bpe_builder *b, uint32_t place, uint32_t depth, const uint8_t *bytes,
                                       uint32_t n, uint32_t *base)
{
    DSV3__TRY(dsv3__bpe_trie_place(b, bytes, n, base));
    uint64_t *units = b->trie->units;
    units[*base] |= DSV3__BPE_IS_BASE;
    if (depth)
        units[place] |= (uint64_t)*base << 32;
    else
        b->trie->root = *base;
    for (uint32_t i = 0; i < n; i++) {
        units[*base + bytes[i]] |= bytes[i] + 1u;
        if (b->end <= (uint64_t)*base + bytes[i])
            b->end = (uint64_t)*base + bytes[i] + 1;
    }
    if (b->end > DSV3__BPE_UNITS_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_TOKENIZER, "%s: more than %u beginnings of strings", b->what,
                          (uint64_t)DSV3__BPE_UNITS_MAX);
    return DSV3_OK;
}

/* A branch of one string: half of all units. */
static dsv3_result dsv3__bpe_trie_tail(dsv3__bpe_builder *b, dsv3__bpe_branch at)
{
    dsv3__bpe_item item = b->items[at.from];
    for (; at.depth < item.n; at.depth++) {
        uint8_t byte = (uint8_t)b->pool[item.at + at.depth];
        uint32_t base;
        DSV3__TRY(dsv3__bpe_trie_take(b, at.place, at.depth, &byte, 1, &base));
        at.place = base + byte;
    }
    b->trie->units[at.place] |= (uint64_t)(item.value + 1) << 9;
    if (b->trie->depth < item.n)
        b->trie->depth = item.n;
    return DSV3_OK;
}

/* Gives a unit its value and its branches; these go on the stack. */
static dsv3_result dsv3__bpe_trie_grow(dsv3__bpe_builder *b, dsv3__bpe_branch at)
{
    uint8_t bytes[256];
    uint32_t n, base, from;
    void *stack = b->stack;
    if (at.to - at.from == 1)
        return dsv3__bpe_trie_tail(b, at);
    DSV3__TRY(dsv3__bpe_trie_count(b, &at, bytes, &n));
    if (n == 0)
        return DSV3_OK;
    if (n > 1)
        dsv3__bpe_trie_sort(b, &at, bytes, n);
    DSV3__TRY(
        dsv3__mem_grow(b->mem, &stack, &b->stack_cap, b->n_stack, b->n_stack + n, sizeof *b->stack, "tokens", b->err));
    b->stack = (dsv3__bpe_branch *)stack;
    DSV3__TRY(dsv3__bpe_trie_take(b, at.place, at.depth, bytes, n, &base));
    from = at.from;
    for (uint32_t i = 0; i < n; i++) {
        dsv3__bpe_branch *branch = &b->stack[b->n_stack++];
        branch->place = base + bytes[i];
        branch->depth = at.depth + 1;
        branch->from = from;
        from += b->count[bytes[i]];
        branch->to = from;
        b->count[bytes[i]] = 0;
    }
    return DSV3_OK;
}

/* A trie of n strings, none empty.
   items      [2 n] the strings, and as many behind them for scratch
   n_units    out: no unit is taken behind it */
static dsv3_result dsv3__bpe_trie_build(dsv3__bpe_trie *trie, const char *pool, dsv3__bpe_item *items, uint32_t n,
                                        const char *what, uint64_t *n_units, dsv3__mem *mem, dsv3_error *err)
{
    dsv3__bpe_builder b;
    dsv3__bpe_branch at = {0, 0, 0, 0};
    void *units;
    dsv3_result r;
    memset(&b, 0, sizeof b);
    b.trie = trie;
    b.mem = mem;
    b.err = err;
    b.what = what;
    b.pool = pool;
    b.cap = (uint64_t)n * 9 / 4 + 1024; /* DeepSeek-V3: 2.14 units a string */
    b.low = b.end = 1;
    b.items = items;
    b.spare = items + n;
    at.to = n;
    DSV3__TRY(dsv3__mem_alloc(mem, &units, b.cap * sizeof *trie->units, "tokens", err));
    memset(units, 0, (size_t)b.cap * sizeof *trie->units);
    trie->units = (uint64_t *)units;
    while ((r = dsv3__bpe_trie_grow(&b, at)) == DSV3_OK && b.n_stack)
        at = b.stack[--b.n_stack];
    dsv3__mem_free(mem, b.stack);
    *n_units = b.end;
    return r;
}

// ---- Building: words ----------------------------------------------------------------------------------------

/* What the file says. tiktoken.model says only what is made, in order: left is DSV3__BPE_GONE. */
typedef struct dsv3__bpe_rule {
    uint32_t left, right, made; /* ids */
} dsv3__bpe_rule;

typedef struct dsv3__bpe_source {
    const dsv3__bpe_rule *rules; /* [n_rules] the merges, in order */
    uint32_t n_rules, n_vocab;
    const uint8_t *flags; /* [n_vocab] not 0: no word, unless a merge makes it */
    uint64_t n_units;     /* of the trie */
    const char *pool;
    const dsv3__bpe_item *items; /* [n_vocab] where an id's bytes are, for rules without halves */
    uint32_t *word_of;           /* [n_vocab] out: id -> word, or DSV3__BPE_GONE */
    dsv3__mem *mem;
    dsv3_error *err;
} dsv3__bpe_source;

/* Numbers the words: b->ids, and the other way round s->word_of. */
static dsv3_result dsv3__bpe_number(dsv3__bpe *b, const dsv3__bpe_source *s)
{
    void *ids;
    DSV3__TRY(dsv3__mem_alloc(s->mem, &ids, (uint64_t)s->n_vocab * sizeof *b->ids, "words", s->err));
    b->ids = (int32_t *)ids; /* [n_vocab]: each word is another entry of the vocabulary */
    for (uint32_t id = 0; id < s->n_vocab; id++)
        s->word_of[id] = DSV3__BPE_GONE;
    for (uint32_t i = 0; i < 256; i++) {
        char byte = (char)i;
        int64_t id = dsv3__bpe_trie_find(&b->trie, &byte, 1);
        if (id < 0)
            return DSV3__BPE_FAIL(s->err, "model.vocab has no entry for the byte %u", (uint64_t)i);
        b->ids[i] = (int32_t)id;
        s->word_of[id] = i;
    }
    for (uint32_t r = 0; r < s->n_rules; r++) {
        uint32_t made = s->rules[r].made;
        if (s->word_of[made] != DSV3__BPE_GONE)
            return DSV3__BPE_FAIL(s->err, "model.merges[%u] makes the token %u, as model.merges[%u] does", (uint64_t)r,
                                  (uint64_t)made, (uint64_t)s->word_of[made] - 256);
        b->ids[256 + r] = (int32_t)made;
        s->word_of[made] = 256 + r;
    }
    b->n_words = 256 + s->n_rules;
    for (uint32_t id = 0; id < s->n_vocab && b->whole; id++)
        if (s->word_of[id] == DSV3__BPE_GONE && !s->flags[id]) {
            s->word_of[id] = b->n_words;
            b->ids[b->n_words++] = (int32_t)id;
        }
    return DSV3_OK;
}

/* Adds what two words make. */
static dsv3_result dsv3__bpe_put_pair(dsv3__bpe *b, uint32_t left, uint32_t right, uint32_t made, dsv3_error *err)
{
    uint64_t key = (uint64_t)left << 21 | right, mask = ~(uint64_t)0 >> b->pairs_shift;
    uint64_t i = (key * DSV3__BPE_MULTIPLIER) >> b->pairs_shift;
    for (int probes = 0; b->pairs[i]; probes++, i = (i + 1) & mask)
        if (probes == DSV3__BPE_PROBES_MAX)
            return DSV3__BPE_FAIL(err, "model.merges collide in a table more than chance allows");
    b->pairs[i] = key << DSV3__BPE_VALUE_BITS | made;
    return DSV3_OK;
}

/* The two words that the bytes of `made` end in when only older words are made; they merge into it. Of all places to cut,
   it is the one where nothing older merges across. */
static dsv3_result dsv3__bpe_halves(const dsv3__bpe *b, const dsv3__bpe_source *s, uint32_t made, uint32_t *left,
                                    uint32_t *right)
{
    const dsv3__bpe_item *item = &s->items[b->ids[made]];
    const char *bytes = s->pool + item->at;
    for (uint32_t i = 1; i < item->n; i++) {
        int64_t x = dsv3__bpe_trie_find(&b->trie, bytes, i);
        int64_t y = x < 0 ? -1 : dsv3__bpe_trie_find(&b->trie, bytes + i, item->n - i);
        if (y < 0 || s->word_of[x] >= made || s->word_of[y] >= made)
            continue;
        *left = s->word_of[x];
        *right = s->word_of[y];
        if (dsv3__bpe_parts_apart(b, *left, *right, made))
            return DSV3_OK;
    }
    return DSV3__FAIL(s->err, DSV3_ERROR_TOKENIZER, "tiktoken.model: no two tokens before it merge into token %u",
                      (uint64_t)b->ids[made]);
}

/* The tables of pairs and parts. b->chain: halves are made before their merge, merges make all words, none is long. */
static dsv3_result dsv3__bpe_load_pairs(dsv3__bpe *b, const dsv3__bpe_source *s)
{
    void *parts, *pairs;
    unsigned bits = 4;
    while ((uint64_t)1 << bits < (uint64_t)s->n_rules * 2) /* half full: 2^18 slots for DeepSeek-V3 */
        bits++;
    DSV3__TRY(dsv3__mem_alloc(s->mem, &parts, (uint64_t)(256 + s->n_rules) * sizeof *b->parts, "merges", s->err));
    b->parts = (dsv3__bpe_parts *)parts;
    DSV3__TRY(dsv3__mem_alloc(s->mem, &pairs, sizeof *b->pairs << bits, "merges", s->err));
    b->pairs = (uint64_t *)pairs;
    b->pairs_shift = 64 - bits;
    memset(b->pairs, 0, sizeof *b->pairs << bits);
    b->chain = b->n_words == 256 + s->n_rules && b->trie.depth <= DSV3__BPE_CHAIN_MAX;
    for (uint32_t i = 0; i < 256; i++)
        b->parts[i].left = b->parts[i].right = i;
    for (uint32_t r = 0; r < s->n_rules; r++) {
        uint32_t left = 0, right = 0, made = 256 + r;
        if (s->rules[r].left == DSV3__BPE_GONE)
            DSV3__TRY(dsv3__bpe_halves(b, s, made, &left, &right));
        else
            left = s->word_of[s->rules[r].left], right = s->word_of[s->rules[r].right];
        b->parts[made].left = left;
        b->parts[made].right = right;
        if (left != DSV3__BPE_GONE && right != DSV3__BPE_GONE)
            DSV3__TRY(dsv3__bpe_put_pair(b, left, right, made, s->err));
        if (left >= made || right >= made) {
            b->chain = false; /* and the marks below are not needed */
            continue;
        }
        b->parts[left].left |= DSV3__BPE_JOINS;
        b->parts[right].right |= DSV3__BPE_JOINS;
    }
    return DSV3_OK;
}

/* Does every word, spelled out, merge back to itself? Its halves do, being older; so it does if no pair across their
   border merges before the word itself would. */
static bool dsv3__bpe_sound(const dsv3__bpe *b)
{
    for (uint32_t w = 256; w < b->n_words; w++)
        if (!dsv3__bpe_parts_apart(b, b->parts[w].left & ~DSV3__BPE_JOINS, b->parts[w].right & ~DSV3__BPE_JOINS, w))
            return false;
    return true;
}

/* From now on the trie leads to words instead of ids, and only to words. */
static void dsv3__bpe_load_trie(dsv3__bpe *b, const dsv3__bpe_source *s)
{
    uint64_t *units = b->trie.units;
    for (uint64_t i = 0; i < s->n_units; i++) {
        uint32_t value = DSV3__BPE_VALUE(units[i]), word = value ? s->word_of[value - 1] : DSV3__BPE_GONE;
        units[i] = (units[i] & ~((uint64_t)DSV3__BPE_VALUE_MASK << 9)) |
                   (uint64_t)(word == DSV3__BPE_GONE ? 0 : word + 1) << 9;
    }
}

/* Everything but the trie, which must be there and lead from bytes to ids, and `whole`, from the merges. */
static dsv3_result dsv3__bpe_build(dsv3__bpe *b, const dsv3__bpe_source *s)
{
    DSV3__TRY(dsv3__bpe_number(b, s));
    DSV3__TRY(dsv3__bpe_load_pairs(b, s));
    b->chain = b->chain && dsv3__bpe_sound(b);
    dsv3__bpe_load_trie(b, s);
    return DSV3_OK;
}

static void dsv3__bpe_free(dsv3__bpe *b, dsv3__mem *mem)
{
    dsv3__mem_free(mem, b->ids);
    dsv3__mem_free(mem, b->parts);
    dsv3__mem_free(mem, b->pairs);
    dsv3__mem_free(mem, b->trie.units);
}

#endif // DSV3_NO_TOKENIZER

// =============================================================================
// >>tok   The checkpoint's tokenizer: tokenizer.json or tiktoken.model, text to ids and back.
//         Needs: json, split, bpe. Owns: the tokenizer, which never changes once it is open.
// =============================================================================

/* Text to ids: texts of added_tokens ("<|User|>") are cut out first, but only if the caller asks for it, since text is
   text; >>split cuts what lies between into pieces; >>bpe merges each piece into words, whose ids are looked up. Every
   byte string has ids, and their bytes are that string again.

   Opening reads tokenizer.json front to back, without a tree. A token of the vocabulary is spelled in *byte letters* (a
   code point that prints stands for a byte); it is turned into bytes once and for all. What this library does not do as
   the file says, or does not know, is refused by name: ids of another tokenizer would be wrong without a sign.

   Kimi's tiktoken.model has the tokens in order, and neither merges (>>bpe finds them) nor its pattern (>>split) nor the
   added tokens, which are in tokenizer_config.json. */

enum {
    DSV3__TOK_FILE_MAX = 64 << 20,   /* bytes of tokenizer.json */
    DSV3__TOK_CONFIG_MAX = 16 << 20, /* bytes of tokenizer_config.json */
    DSV3__TOK_IDS_MAX = 1 << 21,     /* ids: two words and what they make fit 64 bits */
    DSV3__TOK_BYTES_MAX = 1024,      /* of a token (DeepSeek-V3: 128, Kimi-K2: 256): how far ahead a match looks */
    DSV3__TOK_CHUNK = 64             /* bytes decoded at a time */
};

/* Text of ill-formed UTF-8 arrives in pieces: what is certain goes out, up to three bytes wait. Starts as {0}. */
typedef struct dsv3__tok_stream {
    uint8_t n; /* bytes waiting: the beginning of a well-formed sequence */
    uint8_t bytes[3];
} dsv3__tok_stream;

/* Length (at least 1, n > 0) of the first character at p, or of the maximal part of one that is none, as Unicode
   counts them (chapter 3, table 3-8). *state: 0 well-formed, 1 ill-formed, 2 neither yet: the bytes end within it. */
static size_t dsv3__tok_utf8_part(const uint8_t *p, size_t n, int *state)
{
    size_t want = p[0] >= 0xF0 ? 4 : p[0] >= 0xE0 ? 3 : 2, i = 1;
    uint8_t lo = p[0] == 0xE0 ? 0xA0 : p[0] == 0xF0 ? 0x90 : 0x80; /* of the second byte: shortest forms */
    uint8_t hi = p[0] == 0xED ? 0x9F : p[0] == 0xF4 ? 0x8F : 0xBF; /* no surrogates, nothing behind U+10FFFF */
    *state = p[0] >= 0x80;
    if (p[0] < 0xC2 || p[0] > 0xF4)
        return 1;
    for (; i < want && i < n && p[i] >= lo && p[i] <= hi; i++)
        lo = 0x80, hi = 0xBF;
    *state = i == want ? 0 : i == n ? 2 : 1;
    return i;
}

/* Appends n bytes and writes what is now certain: whole characters, U+FFFD for each ill-formed part. Returns how many
   bytes that is.
   out        [3 * (n + 3)] */
static size_t dsv3__tok_stream_put(dsv3__tok_stream *s, const char *bytes, size_t n, char *out)
{
    const uint8_t *p = (const uint8_t *)bytes, *end = p + n;
    char *o = out;
    while (p < end) {
        uint8_t window[4]; /* the bytes that wait and those that may complete them */
        size_t waiting = s->n, have = waiting, part;
        int state;
        if (!waiting && *p < 0x80) {
            *o++ = (char)*p++;
            continue;
        }
        memcpy(window, s->bytes, waiting);
        for (const uint8_t *q = p; have < 4 && q < end; q++)
            window[have++] = *q;
        part = dsv3__tok_utf8_part(window, have, &state);
        if (state == 2) { /* part == have < 4 */
            memcpy(s->bytes, window, part);
            s->n = (uint8_t)part;
            return (size_t)(o - out);
        }
        memcpy(o, state == 0 ? (const char *)window : "\xEF\xBF\xBD", state == 0 ? part : 3);
        o += state == 0 ? part : 3;
        s->n = 0;
        p += part - waiting; /* part >= waiting: what waits is the beginning of a sequence */
    }
    return (size_t)(o - out);
}

/* The end: an incomplete character becomes U+FFFD. out [3]. Harmless when called again. */
static size_t dsv3__tok_stream_flush(dsv3__tok_stream *s, char *out)
{
    size_t n = s->n ? 3 : 0;
    memcpy(out, "\xEF\xBF\xBD", n);
    s->n = 0;
    return n;
}

/* The texts of a checkpoint that are read; those that are not there are empty. */
typedef struct dsv3__tok_files {
    dsv3__str json;          /* tokenizer.json */
    dsv3__str ranks;         /* tiktoken.model, where `json` is empty */
    dsv3__str config;        /* tokenizer_config.json */
    dsv3__str chat_template; /* chat_template.jinja: goes before the one in `config` */
} dsv3__tok_files;

#ifndef DSV3_NO_TOKENIZER

/* A token's bytes in the pool. */
typedef struct dsv3__tok_span {
    uint32_t at, n;
} dsv3__tok_span;

typedef struct dsv3__tok_marker {
    int32_t id;
    bool normalized; /* matched in the second pass, in what the first one left */
    bool special;
} dsv3__tok_marker;

/* What is to know about an id. */
enum {
    DSV3__TOK_RAW = 1,    /* not spelled in byte letters alone: its bytes are its text */
    DSV3__TOK_ADDED = 2,  /* in added_tokens */
    DSV3__TOK_SPECIAL = 4 /* and `special` there */
};

#define DSV3__TOK_UNSET UINT32_MAX /* where the bytes of an id are not known yet */

struct dsv3_tokenizer {
    dsv3__mem mem;
    uint32_t n_tokens;
    char *pool;            /* the bytes of all tokens */
    dsv3__tok_span *spans; /* [n_tokens] */
    uint8_t *flags;        /* [n_tokens] */
    int32_t bos, eos, pad; /* -1: none */
    bool add_bos;
    uint32_t n_markers;
    dsv3__tok_marker *markers; /* [n_markers] in the order of the file */
    dsv3__tok_span *contents;  /* [n_markers] their texts, in content_pool */
    char *content_pool;
    dsv3__bpe_trie marker_trie; /* text -> place in `markers` */
    bool marker_starts[256];    /* can this byte begin one? */
    char *chat_template;        /* [n_chat_template] as it is in the checkpoint, for >>chat; NULL: none */
    size_t n_chat_template;
    dsv3__split split;
    dsv3__bpe bpe;
};

// ---- Text to ids -----------------------------------------------------------------------------------------

/* The leftmost marker of this pass in [p, end), the longest there. NULL if there is none; else its end. */
static const uint8_t *dsv3__tok_find_marker(const dsv3_tokenizer *t, const uint8_t *p, const uint8_t *end,
                                            bool normalized, const uint8_t **begin, int32_t *id)
{
    for (; p < end; p++) {
        const uint8_t *found = NULL;
        uint64_t unit = (uint64_t)t->marker_trie.root << 32;
        for (const uint8_t *q = p; q < end && t->marker_starts[*p];) {
            unit = t->marker_trie.units[DSV3__BPE_BASE(unit) + *q];
            if (DSV3__BPE_BYTE(unit) != *q++ + 1u)
                break;
            const dsv3__tok_marker *m = DSV3__BPE_VALUE(unit) ? &t->markers[DSV3__BPE_VALUE(unit) - 1] : NULL;
            if (m && m->normalized == normalized)
                *id = m->id, found = q;
        }
        if (found) {
            *begin = p;
            return found;
        }
    }
    return NULL;
}

/* Ids of [p, end). passes: 2 looks for markers, those that are not normalized first, the others in what that left; 0:
   text is text. What lies between markers is a text of its own. */
static dsv3_result dsv3__tok_encode(const dsv3_tokenizer *t, const uint8_t *p, const uint8_t *end, int passes,
                                    dsv3__bpe_sink *sink)
{
    const uint8_t *begin, *behind;
    int32_t id = 0;
    while (passes && (behind = dsv3__tok_find_marker(t, p, end, passes == 1, &begin, &id)) != NULL) {
        DSV3__TRY(dsv3__tok_encode(t, p, begin, passes - 1, sink));
        dsv3__bpe_push(sink, id);
        p = behind;
    }
    if (passes)
        return dsv3__tok_encode(t, p, end, passes - 1, sink);
    while (p < end) {
        const uint8_t *e = dsv3__split_piece(&t->split, p, end);
        DSV3__TRY(dsv3__bpe_merge(&t->bpe, p, (size_t)(e - p), sink));
        p = e;
    }
    return DSV3_OK;
}

static int32_t dsv3__tok_marker_id(const dsv3_tokenizer *t, const char *text, size_t n)
{
    int64_t i = dsv3__bpe_trie_find(&t->marker_trie, text, n);
    return i < 0 ? -1 : t->markers[i].id;
}

// ---- Opening: what is read ----------------------------------------------------------------------------------

/* What only the opening needs. */
typedef struct dsv3__tok_load {
    dsv3_tokenizer *t;
    dsv3_error *err;
    dsv3__json j;            /* tokenizer.json */
    uint16_t byte_of[0x144]; /* byte letter (a code point) -> its byte, + 256 if it ends or escapes a JSON string */
    uint64_t n_pool, pool_cap, spans_cap, flags_cap;
    uint32_t n_vocab;      /* entries of model.vocab */
    dsv3__bpe_trie raw;    /* text -> id of those that are no byte letters; the tokenizer's has the others */
    dsv3__bpe_rule *rules; /* [n_rules] the merges */
    uint64_t n_rules;
    uint64_t n_content, content_cap, contents_cap, markers_cap;
    uint64_t n_units;      /* of the tokenizer's trie */
    dsv3__bpe_item *items; /* strings of the trie that is built */
    char *text;            /* a decoded string */
    uint64_t text_cap;
} dsv3__tok_load;

#define DSV3__TOK_NO_BYTE 0xFFFF

/* ByteLevel spells a byte as a code point that prints: itself where it does, else from U+0100 up. */
static void dsv3__tok_letters_init(uint16_t *byte_of)
{
    int other = 0x100;
    for (int i = 0; i < 0x144; i++)
        byte_of[i] = DSV3__TOK_NO_BYTE;
    for (int b = 0; b < 256; b++) {
        bool prints = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
        byte_of[prints ? b : other++] = (uint16_t)(b == '"' || b == '\\' ? b + 256 : b);
    }
}

/* Turns byte letters from p on into bytes at out [cap] (which may be p: they are never longer); in JSON a quote or a
   backslash stops too. Returns where they end. */
DSV3__INLINE const char *dsv3__tok_letters(const dsv3__tok_load *l, const char *p, const char *end, bool in_json,
                                           char *out, size_t cap, size_t *n)
{
    size_t i = 0;
    while (p < end && i < cap) {
        unsigned code = (uint8_t)*p, length = 1, byte;
        if (code >= 0x80) {
            if (code < 0xC2 || code > 0xC5 || end - p < 2 || ((uint8_t)p[1] & 0xC0) != 0x80)
                break;
            code = (code & 31) << 6 | ((uint8_t)p[1] & 63), length = 2;
            if (code >= DSV3__COUNT(l->byte_of))
                break;
        }
        byte = l->byte_of[code];
        if (byte > 0xFF && (in_json || byte == DSV3__TOK_NO_BYTE))
            break;
        out[i++] = (char)byte;
        p += length;
    }
    *n = i;
    return p;
}

/* Room for `more` bytes behind the `used` of an array of char. */
static dsv3_result dsv3__tok_room(dsv3__tok_load *l, char **p, uint64_t *cap, uint64_t used, uint64_t more,
                                  const char *what)
{
    void *array = *p;
    DSV3__TRY(dsv3__mem_grow(&l->t->mem, &array, cap, used, used + more, 1, what, l->err));
    *p = (char *)array;
    return DSV3_OK;
}

/* Reads a string, escapes decoded, to l->text + at. *spelled is how it stands in the file, for messages. */
static dsv3_result dsv3__tok_load_string(dsv3__tok_load *l, size_t at, size_t *n, dsv3__str *spelled)
{
    dsv3__json_str s;
    if (!dsv3__json_string(&l->j, &s))
        return l->j.result;
    spelled->p = s.p;
    spelled->n = s.n;
    DSV3__TRY(dsv3__tok_room(l, &l->text, &l->text_cap, at, s.n, "a string of tokenizer.json"));
    if (!dsv3__json_decode(s, l->text + at, n)) {
        dsv3__json_fail(&l->j, "a bad escape in the string before");
        return l->j.result;
    }
    return DSV3_OK;
}

/* Room for the strings of a trie: l->items. */
static dsv3_result dsv3__tok_load_items(dsv3__tok_load *l, uint32_t n)
{
    void *items;
    dsv3__mem_free(&l->t->mem, l->items);
    l->items = NULL;
    DSV3__TRY(dsv3__mem_alloc(&l->t->mem, &items, ((uint64_t)n * 2 + 1) * sizeof *l->items, "tokens", l->err));
    l->items = (dsv3__bpe_item *)items;
    return DSV3_OK;
}

// ---- Opening: the vocabulary and the merges -----------------------------------------------------------------

/* Room for n ids in all. */
static dsv3_result dsv3__tok_load_ids_room(dsv3__tok_load *l, uint64_t n)
{
    dsv3_tokenizer *t = l->t;
    void *spans = t->spans, *flags = t->flags;
    DSV3__TRY(dsv3__mem_grow(&t->mem, &spans, &l->spans_cap, t->n_tokens, n, sizeof *t->spans, "tokens", l->err));
    t->spans = (dsv3__tok_span *)spans;
    DSV3__TRY(dsv3__mem_grow(&t->mem, &flags, &l->flags_cap, t->n_tokens, n, 1, "tokens", l->err));
    t->flags = (uint8_t *)flags;
    return DSV3_OK;
}

/* Makes the ids below n exist, without bytes yet. */
static dsv3_result dsv3__tok_load_ids(dsv3__tok_load *l, uint32_t n)
{
    dsv3_tokenizer *t = l->t;
    DSV3__TRY(dsv3__tok_load_ids_room(l, n));
    for (; t->n_tokens < n; t->n_tokens++) {
        t->spans[t->n_tokens].at = DSV3__TOK_UNSET;
        t->flags[t->n_tokens] = 0;
    }
    return DSV3_OK;
}

/* Reads a key of the vocabulary; its bytes go behind the pool. */
static dsv3_result dsv3__tok_load_key(dsv3__tok_load *l, dsv3__str *spelled, size_t *n, bool *raw)
{
    dsv3_tokenizer *t = l->t;
    const char *p;
    size_t n_text;
    DSV3__TRY(dsv3__tok_room(l, &t->pool, &l->pool_cap, l->n_pool, DSV3__TOK_BYTES_MAX, "token bytes"));
    *raw = false;
    if (dsv3__json_peek(&l->j) == '"') {
        spelled->p = l->j.p + 1;
        p = dsv3__tok_letters(l, spelled->p, l->j.end, true, t->pool + l->n_pool, DSV3__TOK_BYTES_MAX, n);
        if (p < l->j.end && *p == '"') {
            spelled->n = (size_t)(p - spelled->p);
            l->j.p = p + 1;
            return DSV3_OK;
        }
    }
    DSV3__TRY(dsv3__tok_load_string(l, 0, &n_text, spelled)); /* an escape in it, or no byte letter, or too long */
    p = dsv3__tok_letters(l, l->text, l->text + n_text, false, t->pool + l->n_pool, DSV3__TOK_BYTES_MAX, n);
    if (p == l->text + n_text)
        return DSV3_OK;
    *raw = true;
    *n = n_text;
    if (n_text <= DSV3__TOK_BYTES_MAX)
        memcpy(t->pool + l->n_pool, l->text, n_text);
    return DSV3_OK;
}

/* The number behind a key of the vocabulary. */
static bool dsv3__tok_load_id(dsv3__json *j, uint64_t *id)
{
    const char *p;
    uint64_t v = 0;
    if (dsv3__json_peek(j) != ':')
        return dsv3__json_fail(j, "expected a colon");
    j->p++;
    dsv3__json_peek(j);
    for (p = j->p; p < j->end && p - j->p < 8 && *p >= '0' && *p <= '9'; p++)
        v = v * 10 + (uint64_t)(*p - '0');
    if (p == j->p || p == j->end || (*p != ',' && *p != '\n' && *p != '}') || (*j->p == '0' && p - j->p > 1))
        return dsv3__json_uint(j, id); /* all other spellings */
    j->p = p;
    *id = v;
    return true;
}

static dsv3_result dsv3__tok_load_entry(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    dsv3__str spelled = {"", 0};
    uint64_t id;
    size_t n;
    bool raw;
    DSV3__TRY(dsv3__tok_load_key(l, &spelled, &n, &raw));
    if (!dsv3__tok_load_id(&l->j, &id))
        return l->j.result;
    if (n == 0 || n > DSV3__TOK_BYTES_MAX || id >= DSV3__TOK_IDS_MAX)
        return DSV3__BPE_FAIL(l->err,
                              "model.vocab: expected 1 to %u bytes and an id below %u, found %u bytes and %u, \"%S\"",
                              (uint64_t)DSV3__TOK_BYTES_MAX, (uint64_t)DSV3__TOK_IDS_MAX, (uint64_t)n, id, &spelled);
    if (id >= t->n_tokens)
        DSV3__TRY(dsv3__tok_load_ids(l, (uint32_t)id + 1));
    if (t->spans[id].at != DSV3__TOK_UNSET)
        return DSV3__BPE_FAIL(l->err, "model.vocab: the id %u is given twice, again to \"%S\"", id, &spelled);
    t->spans[id].at = (uint32_t)l->n_pool;
    t->spans[id].n = (uint32_t)n;
    t->flags[id] = raw ? DSV3__TOK_RAW : 0;
    l->n_pool += n;
    l->n_vocab++;
    return DSV3_OK;
}

static dsv3_result dsv3__tok_load_vocab(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    uint64_t size = (uint64_t)(l->j.end - l->j.begin); /* DeepSeek-V3: 60.9 bytes a token, 9.4 a byte of a token */
    DSV3__TRY(dsv3__tok_room(l, &t->pool, &l->pool_cap, 0, size / 9, "token bytes"));
    DSV3__TRY(dsv3__tok_load_ids_room(l, size / 60));
    dsv3__json_open(&l->j, '{');
    while (dsv3__json_item(&l->j))
        DSV3__TRY(dsv3__tok_load_entry(l));
    if (l->j.result)
        return l->j.result;
    for (uint32_t id = 0; id < t->n_tokens; id++)
        if (t->spans[id].at == DSV3__TOK_UNSET)
            return DSV3__BPE_FAIL(l->err, "model.vocab: no entry has the id %u, but there is %u", (uint64_t)id,
                                  (uint64_t)t->n_tokens - 1);
    for (int raw = 1; raw >= 0; raw--) {
        uint32_t n = 0;
        DSV3__TRY(dsv3__tok_load_items(l, l->n_vocab));
        for (uint32_t id = 0; id < l->n_vocab; id++) {
            l->items[n].at = t->spans[id].at;
            l->items[n].n = t->spans[id].n;
            l->items[n].value = id;
            n += (t->flags[id] & DSV3__TOK_RAW ? 1 : 0) == raw; /* or is overwritten by the next */
        }
        DSV3__TRY(dsv3__bpe_trie_build(raw ? &l->raw : &t->bpe.trie, t->pool, l->items, n,
                                       "tokenizer.json: model.vocab", &l->n_units, &t->mem, l->err));
    }
    return DSV3_OK;
}

/* The two halves of a merge as bytes, one behind the other in l->text. */
typedef struct dsv3__tok_halves {
    size_t n[2];
    dsv3__str spelled; /* of "a b"; of ["a", "b"] the b */
} dsv3__tok_halves;

/* The usual case: "a b" without escapes. */
static bool dsv3__tok_load_halves_fast(dsv3__tok_load *l, dsv3__tok_halves *h)
{
    const char *end = l->j.end, *p = l->j.p + 1;
    h->spelled.p = p;
    p = dsv3__tok_letters(l, p, end, true, l->text, DSV3__TOK_BYTES_MAX, &h->n[0]);
    if (p == end || *p != ' ' || !h->n[0])
        return false;
    p = dsv3__tok_letters(l, p + 1, end, true, l->text + h->n[0], DSV3__TOK_BYTES_MAX, &h->n[1]);
    if (p == end || *p != '"' || !h->n[1])
        return false;
    h->spelled.n = (size_t)(p - h->spelled.p);
    l->j.p = p + 1;
    return true;
}

/* Turns l->text [from, from + n) into the bytes of half i. */
static bool dsv3__tok_load_half(dsv3__tok_load *l, dsv3__tok_halves *h, int i, size_t from, size_t n)
{
    char *text = l->text + from;
    return n && dsv3__tok_letters(l, text, text + n, false, l->text + (i ? h->n[0] : 0), n, &h->n[i]) == text + n;
}

static dsv3_result dsv3__tok_load_halves(dsv3__tok_load *l, dsv3__tok_halves *h)
{
    dsv3__json *j = &l->j;
    char kind = dsv3__json_peek(j);
    bool good = false;
    size_t n, at;
    h->spelled.p = "";
    h->spelled.n = 0;
    if (kind == '"' && dsv3__tok_load_halves_fast(l, h))
        return DSV3_OK;
    if (kind == '"') {
        DSV3__TRY(dsv3__tok_load_string(l, 0, &n, &h->spelled));
        for (at = 0; at < n && l->text[at] != ' '; at++) /* a second space is no letter, and refused with the half */
            continue;
        good = at < n && dsv3__tok_load_half(l, h, 0, 0, at) && dsv3__tok_load_half(l, h, 1, at + 1, n - at - 1);
    } else if (kind == '[') {
        int i = 0;
        dsv3__json_open(j, '[');
        for (good = true; good && dsv3__json_item(j); i++) {
            at = i ? h->n[0] : 0;
            DSV3__TRY(dsv3__tok_load_string(l, at, &n, &h->spelled));
            good = i < 2 && dsv3__tok_load_half(l, h, i, at, n);
        }
        good = good && i == 2;
    }
    if (j->result)
        return j->result;
    if (!good)
        return DSV3__BPE_FAIL(l->err,
                              "model.merges[%u]: expected \"a b\" or [\"a\", \"b\"] in byte letters, found \"%S\"",
                              l->n_rules, &h->spelled);
    return DSV3_OK;
}

static dsv3_result dsv3__tok_load_rule(dsv3__tok_load *l)
{
    const dsv3_tokenizer *t = l->t;
    dsv3__bpe_rule *rule = &l->rules[l->n_rules];
    dsv3__tok_halves h;
    DSV3__TRY(dsv3__tok_load_halves(l, &h));
    size_t n = h.n[0] + h.n[1];
    int64_t left = dsv3__bpe_trie_find(&t->bpe.trie, l->text, h.n[0]);
    int64_t right = dsv3__bpe_trie_find(&t->bpe.trie, l->text + h.n[0], h.n[1]);
    uint32_t next = l->n_rules ? rule[-1].made + 1 : 0;
    int64_t made = next; /* PERF: the result is nearly always the id behind the last one */
    if (next >= l->n_vocab || t->spans[next].n != n || (t->flags[next] & DSV3__TOK_RAW) ||
        memcmp(t->pool + t->spans[next].at, l->text, n) != 0)
        made = dsv3__bpe_trie_find(&t->bpe.trie, l->text, n);
    if (left < 0 || right < 0 || made < 0)
        return DSV3__BPE_FAIL(l->err, "model.merges[%u]: the %s of \"%S\" is not in model.vocab", l->n_rules,
                              left < 0    ? "first half"
                              : right < 0 ? "second half"
                                          : "result",
                              &h.spelled);
    rule->left = (uint32_t)left;
    rule->right = (uint32_t)right;
    rule->made = (uint32_t)made;
    l->n_rules++;
    return DSV3_OK;
}

static dsv3_result dsv3__tok_load_merges(dsv3__tok_load *l)
{
    void *rules;
    DSV3__TRY(dsv3__tok_room(l, &l->text, &l->text_cap, 0, 2 * DSV3__TOK_BYTES_MAX, "a string of tokenizer.json"));
    DSV3__TRY(dsv3__mem_alloc(&l->t->mem, &rules, (l->n_vocab + 1) * sizeof *l->rules, "merges", l->err));
    l->rules = (dsv3__bpe_rule *)rules;
    dsv3__json_open(&l->j, '[');
    while (dsv3__json_item(&l->j)) {
        if (l->n_rules == l->n_vocab) /* each makes a token of its own */
            return DSV3__BPE_FAIL(l->err, "more model.merges than the %u of model.vocab", l->n_rules);
        DSV3__TRY(dsv3__tok_load_rule(l));
    }
    return l->j.result;
}

// ---- Opening: added tokens ----------------------------------------------------------------------------------

/* Room for another added token. */
static dsv3_result dsv3__tok_load_marker_room(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    uint64_t n = t->n_markers;
    void *markers = t->markers, *contents = t->contents;
    DSV3__TRY(dsv3__mem_grow(&t->mem, &markers, &l->markers_cap, n, n + 1, sizeof *t->markers, "added tokens", l->err));
    t->markers = (dsv3__tok_marker *)markers;
    DSV3__TRY(
        dsv3__mem_grow(&t->mem, &contents, &l->contents_cap, n, n + 1, sizeof *t->contents, "added tokens", l->err));
    t->contents = (dsv3__tok_span *)contents;
    return DSV3_OK;
}

/* Adds one, its text being in l->text [n]. */
static dsv3_result dsv3__tok_put_marker(dsv3__tok_load *l, uint64_t id, size_t n, bool special, bool normalized)
{
    dsv3_tokenizer *t = l->t;
    uint32_t index = t->n_markers;
    DSV3__TRY(dsv3__tok_load_marker_room(l));
    DSV3__TRY(dsv3__tok_room(l, &t->content_pool, &l->content_cap, l->n_content, n, "added tokens"));
    memcpy(t->content_pool + l->n_content, l->text, n);
    t->contents[index].at = (uint32_t)l->n_content;
    t->contents[index].n = (uint32_t)n;
    l->n_content += n;
    t->markers[index].id = (int32_t)id;
    t->markers[index].special = special;
    t->markers[index].normalized = normalized;
    t->n_markers++;
    return DSV3_OK;
}

/* Reads one of added_tokens; what it means is settled when the vocabulary is there.
   key        NULL, or the id, which is not in the object then */
static dsv3_result dsv3__tok_load_marker(dsv3__tok_load *l, const uint64_t *key_id)
{
    static const char *const names[] = {"id", "content", "special", "normalized", "lstrip", "rstrip", "single_word"};
    dsv3__json *j = &l->j;
    dsv3__json_str key;
    dsv3__str spelled = {"", 0};
    bool flags[DSV3__COUNT(names)] = {false};
    uint64_t id = key_id ? *key_id : 0, index = l->t->n_markers;
    uint32_t seen = key_id ? 1 : 0;
    size_t n = 0;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        uint32_t k = 0;
        while (k < DSV3__COUNT(names) && !dsv3__json_is(key, names[k]))
            k++;
        if (k == DSV3__COUNT(names)) {
            dsv3__json_skip(j);
            continue;
        }
        if (seen >> k & 1)
            return DSV3__BPE_FAIL(l->err, "added_tokens[%u]: %s is given twice", index, names[k]);
        seen |= 1u << k;
        if (k == 0)
            dsv3__json_uint(j, &id);
        else if (k == 1)
            DSV3__TRY(dsv3__tok_load_string(l, 0, &n, &spelled));
        else
            dsv3__json_bool(j, &flags[k]);
    }
    if (j->result)
        return j->result;
    for (uint32_t k = 0; k < DSV3__COUNT(names); k++) {
        if (k < 4 && !(seen >> k & 1))
            return DSV3__BPE_FAIL(l->err, "added_tokens[%u] has no %s", index, names[k]);
        if (k >= 4 && flags[k])
            return DSV3__BPE_FAIL(l->err, "added_tokens[%u] \"%S\": %s true is not supported", index, &spelled,
                                  names[k]);
    }
    if (n == 0 || n > DSV3__TOK_BYTES_MAX || id >= DSV3__TOK_IDS_MAX)
        return DSV3__BPE_FAIL(l->err,
                              "added_tokens[%u]: expected 1 to %u bytes and an id below %u, found %u bytes and %u",
                              index, (uint64_t)DSV3__TOK_BYTES_MAX, (uint64_t)DSV3__TOK_IDS_MAX, (uint64_t)n, id);
    return dsv3__tok_put_marker(l, id, n, flags[2], flags[3]);
}

static dsv3_result dsv3__tok_load_added(dsv3__tok_load *l)
{
    dsv3__json_open(&l->j, '[');
    while (dsv3__json_item(&l->j))
        DSV3__TRY(dsv3__tok_load_marker(l, NULL));
    return l->j.result;
}

/* The id of a token of model.vocab by its text; -1 if there is none. Its bytes, n of them, are left in l->text; raw:
   they are the text itself. */
static dsv3_result dsv3__tok_vocab_find(dsv3__tok_load *l, dsv3__str text, int64_t *id, size_t *n, bool *raw)
{
    DSV3__TRY(dsv3__tok_room(l, &l->text, &l->text_cap, 0, text.n, "a string of tokenizer.json"));
    *raw = dsv3__tok_letters(l, text.p, text.p + text.n, false, l->text, text.n, n) != text.p + text.n;
    if (*raw) {
        memcpy(l->text, text.p, text.n);
        *n = text.n;
    }
    *id = dsv3__bpe_trie_find(*raw ? &l->raw : &l->t->bpe.trie, l->text, *n);
    return DSV3_OK;
}

/* Ids of added tokens. `tokenizers` ignores those of the file: a content that model.vocab holds has that id, the others
   are numbered behind it in their order. Sane files say the same; a file that does not would mean two things. */
static dsv3_result dsv3__tok_settle_markers(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    for (uint32_t i = 0; i < t->n_markers; i++) {
        const dsv3__tok_marker *m = &t->markers[i];
        dsv3__str content;
        int64_t id;
        size_t n;
        bool raw;
        content.p = t->content_pool + t->contents[i].at;
        content.n = t->contents[i].n;
        DSV3__TRY(dsv3__tok_vocab_find(l, content, &id, &n, &raw));
        if (m->id != (id >= 0 ? id : (int64_t)t->n_tokens))
            return DSV3__BPE_FAIL(l->err, "added_tokens[%u] \"%S\": expected the id %u (%s), found %u", (uint64_t)i,
                                  &content, (uint64_t)(id >= 0 ? id : (int64_t)t->n_tokens),
                                  id >= 0 ? "that of model.vocab" : "the next one", (uint64_t)m->id);
        if (id < 0) {
            DSV3__TRY(dsv3__tok_load_ids(l, t->n_tokens + 1));
            DSV3__TRY(dsv3__tok_room(l, &t->pool, &l->pool_cap, l->n_pool, n, "token bytes"));
            memcpy(t->pool + l->n_pool, l->text, n);
            t->spans[m->id].at = (uint32_t)l->n_pool;
            t->spans[m->id].n = (uint32_t)n;
            t->flags[m->id] = raw ? DSV3__TOK_RAW : 0;
            l->n_pool += n;
        }
        t->flags[m->id] = (uint8_t)(t->flags[m->id] | DSV3__TOK_ADDED | (m->special ? DSV3__TOK_SPECIAL : 0));
    }
    return DSV3_OK;
}

/* What finds markers in a text. */
static dsv3_result dsv3__tok_load_marker_trie(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    uint64_t n_units;
    DSV3__TRY(dsv3__tok_load_items(l, t->n_markers));
    for (uint32_t i = 0; i < t->n_markers; i++) {
        l->items[i].at = t->contents[i].at;
        l->items[i].n = t->contents[i].n;
        l->items[i].value = i;
        t->marker_starts[(uint8_t)t->content_pool[t->contents[i].at]] = true;
    }
    return dsv3__bpe_trie_build(&t->marker_trie, t->content_pool, l->items, t->n_markers,
                                "tokenizer.json: added_tokens", &n_units, &t->mem, l->err);
}

// ---- Opening: the rest of the files -------------------------------------------------------------------------

/* The value of a key in the object that `object` stands before; `value` is left standing before it. False: no object,
   no such key, or more than one. Reads ahead only: the caller's own reader has been over the same text. */
static bool dsv3__tok_get(const dsv3__json *object, const char *name, dsv3__json *value)
{
    dsv3__json o = *object;
    dsv3__json_str key;
    int found = 0;
    if (dsv3__json_peek(&o) != '{')
        return false;
    dsv3__json_open(&o, '{');
    while (dsv3__json_key(&o, &key)) {
        if (dsv3__json_is(key, name)) {
            *value = o;
            found++;
        }
        dsv3__json_skip(&o);
    }
    return found == 1;
}

/* Is the value of this key the string `literal`? */
static bool dsv3__tok_get_is(const dsv3__json *object, const char *name, const char *literal)
{
    dsv3__json value;
    dsv3__json_str s;
    return dsv3__tok_get(object, name, &value) && dsv3__json_peek(&value) == '"' && dsv3__json_string(&value, &s) &&
           dsv3__json_is(s, literal);
}

/* Is the value of this key false? */
static bool dsv3__tok_get_false(const dsv3__json *object, const char *name)
{
    dsv3__json value;
    return dsv3__tok_get(object, name, &value) && dsv3__json_peek(&value) == 'f';
}

/* The error of a field that says what is not covered here. */
static dsv3_result dsv3__tok_refuse(const dsv3__tok_load *l, const dsv3__json *value, const char *field,
                                    const char *expected)
{
    dsv3__json at = *value;
    dsv3__str found;
    dsv3__json_peek(&at);
    found.p = at.p;
    dsv3__json_skip(&at);
    found.n = (size_t)(at.p - found.p);
    return DSV3__BPE_FAIL(l->err, "%s: expected %s, found %S", field, expected, &found);
}

/* The patterns that dsv3__tok_piece stands for, in their order: DeepSeek-V3, R1, V3.1 and what was made like them. */
// clang-format off
static const char *const dsv3__tok_patterns[] = {
    "\\p{N}{1,3}",
    "[\xE4\xB8\x80-\xE9\xBE\xA5\xE3\x81\x80-\xE3\x82\x9F\xE3\x82\xA0-\xE3\x83\xBF]+", /* the CJK ranges */
    ("[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
     "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")
};
// clang-format on

/* One Split of the pre_tokenizer; `index` is its place. Another pattern would give other ids. */
static dsv3_result dsv3__tok_load_split(dsv3__tok_load *l, const dsv3__json *split, size_t index)
{
    dsv3__json pattern, regex;
    dsv3__json_str s;
    dsv3__str found;
    size_t n;
    if (!dsv3__tok_get(split, "pattern", &pattern) || !dsv3__tok_get(&pattern, "Regex", &regex) ||
        dsv3__json_peek(&regex) != '"' || !dsv3__json_string(&regex, &s))
        return dsv3__tok_refuse(l, split, "pre_tokenizer", "a Split with a pattern.Regex");
    DSV3__TRY(dsv3__tok_room(l, &l->text, &l->text_cap, 0, s.n, "a string of tokenizer.json"));
    if (!dsv3__json_decode(s, l->text, &n))
        return dsv3__tok_refuse(l, &pattern, "pre_tokenizer", "a pattern without bad escapes");
    found.p = l->text;
    found.n = n;
    if (index >= DSV3__COUNT(dsv3__tok_patterns) || found.n != strlen(dsv3__tok_patterns[index]) ||
        memcmp(found.p, dsv3__tok_patterns[index], found.n) != 0)
        return DSV3__BPE_FAIL(l->err, "pre_tokenizer: no rules for split %u, pattern %S", (uint64_t)index, &found);
    if (!dsv3__tok_get_is(split, "behavior", "Isolated") || !dsv3__tok_get_false(split, "invert"))
        return dsv3__tok_refuse(l, split, "pre_tokenizer", "a Split with behavior Isolated, invert false");
    return DSV3_OK;
}

static dsv3_result dsv3__tok_load_pre_tokenizer(dsv3__tok_load *l, const dsv3__json *value)
{
    dsv3__json list;
    size_t index = 0;
    bool byte_level = false;
    if (!dsv3__tok_get_is(value, "type", "Sequence") || !dsv3__tok_get(value, "pretokenizers", &list) ||
        dsv3__json_peek(&list) != '[')
        return dsv3__tok_refuse(l, value, "pre_tokenizer", "a Sequence of Splits and a ByteLevel");
    dsv3__json_open(&list, '[');
    while (dsv3__json_item(&list)) {
        dsv3__json part = list;
        dsv3__json_skip(&list);
        if (!byte_level && dsv3__tok_get_is(&part, "type", "Split")) {
            DSV3__TRY(dsv3__tok_load_split(l, &part, index++));
            continue;
        }
        if (byte_level || !dsv3__tok_get_is(&part, "type", "ByteLevel") ||
            !dsv3__tok_get_false(&part, "add_prefix_space") || !dsv3__tok_get_false(&part, "use_regex"))
            return dsv3__tok_refuse(l, &part, "pre_tokenizer",
                                    "Splits, then one ByteLevel with add_prefix_space and use_regex false");
        byte_level = true;
    }
    if (index != DSV3__COUNT(dsv3__tok_patterns) || !byte_level)
        return dsv3__tok_refuse(l, value, "pre_tokenizer", "three Splits and a ByteLevel");
    return DSV3_OK;
}

static dsv3_result dsv3__tok_load_normalizer(dsv3__tok_load *l, const dsv3__json *value)
{
    dsv3__json list = *value;
    if (dsv3__json_peek(&list) == 'n')
        return DSV3_OK;
    if (dsv3__tok_get_is(value, "type", "Sequence") && dsv3__tok_get(value, "normalizers", &list) &&
        dsv3__json_peek(&list) == '[' && dsv3__json_open(&list, '[') && !dsv3__json_item(&list))
        return DSV3_OK;
    return dsv3__tok_refuse(l, value, "normalizer", "null or an empty Sequence");
}

/* A TemplateProcessing that puts one token in front, as `transformers` writes it: t->bos. */
static bool dsv3__tok_load_template(dsv3__tok_load *l, const dsv3__json *value)
{
    dsv3__json single, part, name, tokens, ids;
    char bos[DSV3__TOK_BYTES_MAX];
    uint64_t id = 0;
    if (!dsv3__tok_get(value, "single", &single) || dsv3__json_peek(&single) != '[' || !dsv3__json_open(&single, '[') ||
        !dsv3__json_item(&single) || !dsv3__tok_get(&single, "SpecialToken", &part) ||
        !dsv3__tok_get(&part, "id", &name) || dsv3__json_peek(&name) != '"' || !dsv3__json_copy(&name, bos, sizeof bos))
        return false;
    dsv3__json_skip(&single);
    if (!dsv3__json_item(&single) || !dsv3__tok_get(&single, "Sequence", &part) || !dsv3__tok_get_is(&part, "id", "A"))
        return false;
    dsv3__json_skip(&single);
    if (dsv3__json_item(&single) || !dsv3__tok_get(value, "special_tokens", &tokens) ||
        !dsv3__tok_get(&tokens, bos, &part) || !dsv3__tok_get(&part, "ids", &ids) || dsv3__json_peek(&ids) != '[' ||
        !dsv3__json_open(&ids, '[') || !dsv3__json_item(&ids) || !dsv3__json_uint(&ids, &id) || dsv3__json_item(&ids) ||
        id >= DSV3__TOK_IDS_MAX)
        return false;
    l->t->bos = (int32_t)id;
    l->t->add_bos = true;
    return true;
}

static dsv3_result dsv3__tok_load_post_processor(dsv3__tok_load *l, const dsv3__json *value)
{
    dsv3__json at = *value;
    if (dsv3__json_peek(&at) == 'n' || dsv3__tok_get_is(value, "type", "ByteLevel")) /* adds nothing */
        return DSV3_OK;
    if (dsv3__tok_get_is(value, "type", "TemplateProcessing") && dsv3__tok_load_template(l, value))
        return DSV3_OK;
    return dsv3__tok_refuse(l, value, "post_processor",
                            "null, ByteLevel, or a TemplateProcessing that puts one token in front");
}

/* A field of `model` beside vocab and merges. One that would change ids must have the value that does not; one that is
   not known might. */
static dsv3_result dsv3__tok_load_model_field(dsv3__tok_load *l, dsv3__json_str key, const dsv3__json *value)
{
    dsv3__json at = *value;
    dsv3__json_str s = {"", 0, false};
    dsv3__str name;
    char kind = dsv3__json_peek(&at);
    bool number, empty = kind == 'n' || (kind == '"' && dsv3__json_string(&at, &s) && s.n == 0);
    int64_t integer;
    double v;
    if (dsv3__json_is(key, "type"))
        return kind == '"' && dsv3__json_is(s, "BPE") ? DSV3_OK : dsv3__tok_refuse(l, value, "model.type", "\"BPE\"");
    if (dsv3__json_is(key, "dropout")) {
        if (kind == 'n' ||
            ((kind == '-' || (kind >= '0' && kind <= '9')) && dsv3__json_number(&at, &v, &integer, &number) && v == 0))
            return DSV3_OK;
        return dsv3__tok_refuse(l, value, "model.dropout", "null or 0");
    }
    if (dsv3__json_is(key, "continuing_subword_prefix") || dsv3__json_is(key, "end_of_word_suffix"))
        return empty ? DSV3_OK : dsv3__tok_refuse(l, value, "model: prefix or suffix of words", "null or \"\"");
    if (dsv3__json_is(key, "byte_fallback"))
        return kind == 'f' ? DSV3_OK : dsv3__tok_refuse(l, value, "model.byte_fallback", "false");
    if (dsv3__json_is(key, "ignore_merges")) {
        l->t->bpe.whole = kind == 't';
        return kind == 't' || kind == 'f' ? DSV3_OK
                                          : dsv3__tok_refuse(l, value, "model.ignore_merges", "true or false");
    }
    if (dsv3__json_is(key, "unk_token") || dsv3__json_is(key, "fuse_unk")) /* every byte is in the vocabulary */
        return DSV3_OK;
    name.p = key.p;
    name.n = key.n;
    return DSV3__BPE_FAIL(l->err, "model.%S: a field that is not known here", &name);
}

static dsv3_result dsv3__tok_load_model(dsv3__tok_load *l)
{
    dsv3__json *j = &l->j, early = *j; /* merges that stand before the vocabulary */
    dsv3__json_str key;
    bool vocab = false, merges = false, wait = false;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        bool is_vocab = dsv3__json_is(key, "vocab"), is_merges = dsv3__json_is(key, "merges");
        if ((is_vocab && vocab) || (is_merges && merges))
            return DSV3__BPE_FAIL(l->err, "model.%s is given twice", is_vocab ? "vocab" : "merges");
        vocab = vocab || is_vocab;
        merges = merges || is_merges;
        if (is_vocab) {
            DSV3__TRY(dsv3__tok_load_vocab(l));
        } else if (is_merges && vocab) {
            DSV3__TRY(dsv3__tok_load_merges(l));
        } else {
            dsv3__json value = *j;
            if (is_merges) {
                wait = true;
                early = value;
            }
            if (dsv3__json_skip(j) && !is_merges)
                DSV3__TRY(dsv3__tok_load_model_field(l, key, &value));
        }
    }
    if (j->result)
        return j->result;
    if (!vocab || !merges)
        return DSV3__BPE_FAIL(l->err, "model has no %s", vocab ? "merges" : "vocab");
    if (wait) {
        dsv3__json behind = *j;
        *j = early;
        DSV3__TRY(dsv3__tok_load_merges(l));
        *j = behind;
    }
    return DSV3_OK;
}

static dsv3_result dsv3__tok_load_file(dsv3__tok_load *l, dsv3__str text)
{
    static const char *const names[] = {"model",        "pre_tokenizer", "decoder",
                                        "added_tokens", "normalizer",    "post_processor"};
    dsv3__json *j = &l->j;
    dsv3__json_str key;
    uint32_t seen = 0;
    if (text.n > DSV3__TOK_FILE_MAX)
        return DSV3__BPE_FAIL(l->err, "%u bytes, expected at most %u", (uint64_t)text.n, (uint64_t)DSV3__TOK_FILE_MAX);
    dsv3__json_init(j, text.p, text.n, "tokenizer.json", l->err);
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        uint32_t k = 0;
        while (k < DSV3__COUNT(names) && !dsv3__json_is(key, names[k]))
            k++;
        if (k < DSV3__COUNT(names) && (seen >> k & 1))
            return DSV3__BPE_FAIL(l->err, "%s is given twice", names[k]);
        seen |= 1u << k;
        dsv3__json value = *j;
        if (k == 0) {
            DSV3__TRY(dsv3__tok_load_model(l));
        } else if (k == 3) {
            DSV3__TRY(dsv3__tok_load_added(l));
        } else if (dsv3__json_skip(j)) {
            if (k == 1)
                DSV3__TRY(dsv3__tok_load_pre_tokenizer(l, &value));
            else if (k == 2 && !dsv3__tok_get_is(&value, "type", "ByteLevel"))
                return dsv3__tok_refuse(l, &value, "decoder", "a ByteLevel");
            else if (k == 4)
                DSV3__TRY(dsv3__tok_load_normalizer(l, &value));
            else if (k == 5)
                DSV3__TRY(dsv3__tok_load_post_processor(l, &value));
        }
    }
    DSV3__TRY(dsv3__json_end(j));
    for (uint32_t k = 0; k < 3; k++)
        if (!(seen >> k & 1))
            return DSV3__BPE_FAIL(l->err, "it has no %s", names[k]);
    return DSV3_OK;
}

/* The token that a field of tokenizer_config.json names: a string, or an object with `content`. -1: null, unknown. */
static dsv3_result dsv3__tok_config_token(dsv3__tok_load *l, const dsv3__json *value, const char *name, bool must,
                                          int32_t *id)
{
    char text[DSV3__TOK_BYTES_MAX + 1];
    dsv3__json at = *value;
    dsv3__str content;
    int64_t found;
    size_t n;
    bool raw;
    *id = -1;
    if (dsv3__json_peek(&at) == 'n')
        return DSV3_OK;
    if (dsv3__json_peek(&at) == '{' && !dsv3__tok_get(value, "content", &at))
        return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER, "tokenizer_config.json: %s has no content", name);
    if (!dsv3__json_copy(&at, text, sizeof text))
        return at.result;
    content.p = text;
    content.n = strlen(text);
    *id = dsv3__tok_marker_id(l->t, text, content.n);
    if (*id < 0) {
        DSV3__TRY(dsv3__tok_vocab_find(l, content, &found, &n, &raw));
        *id = (int32_t)found;
    }
    if (*id < 0 && must)
        return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER,
                          "tokenizer_config.json: %s \"%S\" is no token of tokenizer.json", name, &content);
    return DSV3_OK;
}

/* Room for a chat template of n bytes, in place of the one that was there. */
static dsv3_result dsv3__tok_load_template_room(dsv3__tok_load *l, size_t n)
{
    dsv3_tokenizer *t = l->t;
    void *room;
    dsv3__mem_free(&t->mem, t->chat_template);
    t->chat_template = NULL;
    DSV3__TRY(dsv3__mem_alloc(&t->mem, &room, n + 1, "a chat template", l->err));
    t->chat_template = (char *)room;
    t->n_chat_template = n;
    return DSV3_OK;
}

/* chat_template of tokenizer_config.json: a string, or a list of {"name", "template"}, of which "default" is taken. */
static dsv3_result dsv3__tok_load_chat_template(dsv3__tok_load *l, const dsv3__json *value)
{
    dsv3__json at = *value, found = *value;
    dsv3__json_str s;
    char kind = dsv3__json_peek(&at);
    if (kind == '[') {
        bool any = false;
        dsv3__json_open(&at, '[');
        while (dsv3__json_item(&at)) {
            any = any || (dsv3__tok_get_is(&at, "name", "default") && dsv3__tok_get(&at, "template", &found));
            dsv3__json_skip(&at);
        }
        kind = any ? dsv3__json_peek(&found) : 0;
    }
    if (kind != '"' || !dsv3__json_string(&found, &s))
        return DSV3_OK; /* null, or of a form that is not known: as good as none */
    DSV3__TRY(dsv3__tok_load_template_room(l, s.n));
    if (!dsv3__json_decode(s, l->t->chat_template, &l->t->n_chat_template))
        return DSV3__FAIL(l->err, DSV3_ERROR_JSON, "tokenizer_config.json: a bad escape in chat_template");
    return DSV3_OK;
}

/* add_bos_token, the names of three tokens, the chat template. The rest is not read: DeepSeek-V3's tokenizer_class is
   wrong. */
static dsv3_result dsv3__tok_load_config(dsv3__tok_load *l, dsv3__str text)
{
    static const char *const names[] = {"bos_token", "eos_token", "pad_token", "add_bos_token", "chat_template"};
    dsv3_tokenizer *t = l->t;
    int32_t template_bos = t->bos;
    int32_t *const ids[] = {&t->bos, &t->eos, &t->pad};
    dsv3__json j, values[DSV3__COUNT(names)];
    dsv3__json_str key;
    uint32_t seen = 0;
    if (text.n > DSV3__TOK_CONFIG_MAX)
        return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER, "tokenizer_config.json: %u bytes, expected at most %u",
                          (uint64_t)text.n, (uint64_t)DSV3__TOK_CONFIG_MAX);
    if (text.n >= 3 && memcmp(text.p, "\xEF\xBB\xBF", 3) == 0) /* a byte order mark: tolerated in configurations */
        text.p += 3, text.n -= 3;
    dsv3__json_init(&j, text.p, text.n, "tokenizer_config.json", l->err);
    dsv3__json_open(&j, '{');
    while (dsv3__json_key(&j, &key)) {
        for (uint32_t k = 0; k < DSV3__COUNT(names); k++) {
            if (!dsv3__json_is(key, names[k]))
                continue;
            if (seen >> k & 1)
                return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER, "tokenizer_config.json: %s is given twice", names[k]);
            seen |= 1u << k;
            values[k] = j;
        }
        dsv3__json_skip(&j);
    }
    DSV3__TRY(dsv3__json_end(&j));
    for (uint32_t k = 0; k < DSV3__COUNT(ids); k++) {
        if (!(seen >> k & 1))
            continue;
        /* `transformers` lets a pad token be missing, and nothing here pads */
        DSV3__TRY(dsv3__tok_config_token(l, &values[k], names[k], k != 2, ids[k]));
    }
    if (template_bos >= 0 && t->bos >= 0 && t->bos != template_bos)
        return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER,
                          "tokenizer_config.json: bos_token is %d, but tokenizer.json puts %d in front",
                          (int64_t)t->bos, (int64_t)template_bos);
    if ((seen >> 3 & 1) && dsv3__json_peek(&values[3]) != 'n' && !dsv3__json_bool(&values[3], &t->add_bos))
        return values[3].result;
    return seen >> 4 & 1 ? dsv3__tok_load_chat_template(l, &values[4]) : DSV3_OK;
}

// ---- Opening: tiktoken.model --------------------------------------------------------------------------------

enum { DSV3__TOK_RANKS_ADDED = 256 /* ids behind the ranks, named or not */ };

#define DSV3__TOK_RANKS_FAIL(err, ...) DSV3__FAIL((err), DSV3_ERROR_TOKENIZER, "tiktoken.model: " __VA_ARGS__)

/* Bytes of base64 up to a space, to out; NULL if that is no base64, else the space. */
static const char *dsv3__tok_base64(const char *p, const char *end, char *out, size_t cap, size_t *n)
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    uint32_t bits = 0, n_bits = 0;
    const char *begin = p;
    *n = 0;
    for (; p < end && *p != ' ' && *p != '='; p++) {
        const char *letter = (const char *)memchr(letters, *p, sizeof letters - 1);
        if (!letter)
            return NULL;
        bits = bits << 6 | (uint32_t)(letter - letters);
        n_bits += 6;
        if (n_bits < 8)
            continue;
        if (*n == cap)
            return NULL;
        n_bits -= 8;
        out[(*n)++] = (char)(bits >> n_bits);
        bits &= (1u << n_bits) - 1;
    }
    while (p < end && *p == '=')
        p++;
    return p < end && *p == ' ' && (p - begin) % 4 == 0 && !bits && n_bits < 6 ? p : NULL;
}

/* One line: a token's bytes in base64, its rank, which is its id and the line's number. */
static dsv3_result dsv3__tok_load_rank(dsv3__tok_load *l, const char **at, const char *end)
{
    dsv3_tokenizer *t = l->t;
    uint32_t id = t->n_tokens;
    uint64_t rank = 0;
    size_t n;
    DSV3__TRY(dsv3__tok_room(l, &t->pool, &l->pool_cap, l->n_pool, DSV3__BPE_CHAIN_MAX, "token bytes"));
    const char *p = dsv3__tok_base64(*at, end, t->pool + l->n_pool, DSV3__BPE_CHAIN_MAX, &n),
               *digits = p ? p + 1 : NULL;
    if (!p || !n || id == DSV3__TOK_IDS_MAX)
        return DSV3__TOK_RANKS_FAIL(l->err, "line %u: expected 1 to %u bytes in base64, a space and a rank below %u",
                                    (uint64_t)id + 1, (uint64_t)DSV3__BPE_CHAIN_MAX, (uint64_t)DSV3__TOK_IDS_MAX);
    for (p = digits; p < end && *p >= '0' && *p <= '9' && rank <= id; p++)
        rank = rank * 10 + (uint64_t)(*p - '0');
    if (p == digits || rank != id || (p < end && *p != '\n'))
        return DSV3__TOK_RANKS_FAIL(l->err, "line %u: expected the rank %u", (uint64_t)id + 1, (uint64_t)id);
    if ((n == 1) != (id < 256))
        return DSV3__TOK_RANKS_FAIL(l->err, "line %u: expected the 256 bytes first, then longer tokens, found %u bytes",
                                    (uint64_t)id + 1, (uint64_t)n);
    DSV3__TRY(dsv3__tok_load_ids(l, id + 1));
    t->spans[id].at = (uint32_t)l->n_pool;
    t->spans[id].n = (uint32_t)n;
    t->flags[id] = 0;
    l->n_pool += n;
    *at = p < end ? p + 1 : p;
    return DSV3_OK;
}

/* l->items [n_vocab] are the tokens, in the order of their ids. */
static void dsv3__tok_ranks_items(dsv3__tok_load *l)
{
    for (uint32_t id = 0; id < l->n_vocab; id++) {
        l->items[id].at = l->t->spans[id].at;
        l->items[id].n = l->t->spans[id].n;
        l->items[id].value = id;
    }
}

static dsv3_result dsv3__tok_load_ranks(dsv3__tok_load *l, dsv3__str text)
{
    dsv3_tokenizer *t = l->t;
    const char *p = text.p, *end = text.p + text.n;
    uint64_t n_units;
    void *rules;
    if (text.n > DSV3__TOK_FILE_MAX)
        return DSV3__TOK_RANKS_FAIL(l->err, "%u bytes, expected at most %u", (uint64_t)text.n,
                                    (uint64_t)DSV3__TOK_FILE_MAX);
    while (p < end)
        DSV3__TRY(dsv3__tok_load_rank(l, &p, end));
    if (t->n_tokens < 256)
        return DSV3__TOK_RANKS_FAIL(l->err, "%u tokens, expected the 256 bytes at least", (uint64_t)t->n_tokens);
    l->n_vocab = t->n_tokens;
    t->bpe.whole = true;
    DSV3__TRY(dsv3__mem_alloc(&t->mem, &rules, ((uint64_t)l->n_vocab + 1) * sizeof *l->rules, "merges", l->err));
    l->rules = (dsv3__bpe_rule *)rules;
    for (uint32_t id = 256; id < l->n_vocab; id++) {
        l->rules[l->n_rules].left = l->rules[l->n_rules].right = DSV3__BPE_GONE;
        l->rules[l->n_rules++].made = id;
    }
    DSV3__TRY(dsv3__tok_load_items(l, l->n_vocab));
    DSV3__TRY(dsv3__bpe_trie_build(&l->raw, t->pool, l->items, 0, "tiktoken.model", &n_units, &t->mem, l->err));
    dsv3__tok_ranks_items(l);
    return dsv3__bpe_trie_build(&t->bpe.trie, t->pool, l->items, l->n_vocab, "tiktoken.model", &l->n_units, &t->mem,
                                l->err);
}

/* The tokens that tokenizer_config.json adds: {"163584": {"content": "[BOS]", ...}, ...}. */
static dsv3_result dsv3__tok_load_decoder(dsv3__tok_load *l)
{
    dsv3__json *j = &l->j;
    dsv3__json_str key;
    dsv3__json_open(j, '{');
    while (dsv3__json_key(j, &key)) {
        uint64_t id = 0;
        bool digits = key.n && key.n < 10;
        for (size_t i = 0; digits && i < key.n; i++) {
            digits = key.p[i] >= '0' && key.p[i] <= '9';
            id = id * 10 + (uint64_t)(key.p[i] - '0');
        }
        if (!digits || id < l->n_vocab || id >= (uint64_t)l->n_vocab + DSV3__TOK_RANKS_ADDED)
            return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER,
                              "tokenizer_config.json: added_tokens_decoder: expected ids from %u to %u, found \"%S\"",
                              (uint64_t)l->n_vocab, (uint64_t)l->n_vocab + DSV3__TOK_RANKS_ADDED - 1, &key);
        DSV3__TRY(dsv3__tok_load_marker(l, &id));
    }
    return j->result;
}

/* Gives the added ids their bytes; those that have no name get the one that Kimi's code gives them. */
static dsv3_result dsv3__tok_settle_ranks(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    uint32_t n_named = t->n_markers;
    DSV3__TRY(dsv3__tok_load_ids(l, l->n_vocab + DSV3__TOK_RANKS_ADDED));
    for (uint32_t i = 0; i < n_named; i++) {
        if (t->flags[t->markers[i].id] & DSV3__TOK_ADDED)
            return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER,
                              "tokenizer_config.json: added_tokens_decoder: the id %u is given twice",
                              (uint64_t)t->markers[i].id);
        t->flags[t->markers[i].id] = DSV3__TOK_ADDED;
    }
    for (uint32_t id = l->n_vocab; id < t->n_tokens; id++) {
        if (t->flags[id])
            continue;
        DSV3__TRY(dsv3__tok_room(l, &l->text, &l->text_cap, 0, 64, "added tokens"));
        size_t n = dsv3__format(l->text, 64, "<|reserved_token_%u|>", (uint64_t)id);
        DSV3__TRY(dsv3__tok_put_marker(l, id, n, true, false));
    }
    for (uint32_t i = 0; i < t->n_markers; i++) {
        const dsv3__tok_marker *m = &t->markers[i];
        size_t n = t->contents[i].n;
        DSV3__TRY(dsv3__tok_room(l, &t->pool, &l->pool_cap, l->n_pool, n, "token bytes"));
        memcpy(t->pool + l->n_pool, t->content_pool + t->contents[i].at, n);
        t->spans[m->id].at = (uint32_t)l->n_pool;
        t->spans[m->id].n = (uint32_t)n;
        t->flags[m->id] = (uint8_t)(DSV3__TOK_RAW | DSV3__TOK_ADDED | (m->special ? DSV3__TOK_SPECIAL : 0));
        l->n_pool += n;
    }
    return DSV3_OK;
}

/* Added tokens, if there is a tokenizer_config.json. It must be Kimi's: the file does not say how text is split. */
static dsv3_result dsv3__tok_load_ranks_config(dsv3__tok_load *l, dsv3__str text)
{
    dsv3__json all, value;
    if (!text.n)
        return DSV3_OK;
    if (text.n >= 3 && memcmp(text.p, "\xEF\xBB\xBF", 3) == 0)
        text.p += 3, text.n -= 3;
    dsv3__json_init(&l->j, text.p, text.n, "tokenizer_config.json", l->err);
    all = l->j;
    dsv3__json_skip(&l->j);
    DSV3__TRY(dsv3__json_end(&l->j));
    if (dsv3__tok_get(&all, "tokenizer_class", &value) &&
        !dsv3__tok_get_is(&all, "tokenizer_class", "TikTokenTokenizer"))
        return DSV3__TOK_RANKS_FAIL(l->err, "no rules for it but those of tokenizer_class TikTokenTokenizer");
    if (dsv3__tok_get(&all, "added_tokens_decoder", &value)) {
        l->j = value;
        DSV3__TRY(dsv3__tok_load_decoder(l));
    }
    return dsv3__tok_settle_ranks(l);
}

// ---- Opening: all of it -------------------------------------------------------------------------------------

static dsv3_result dsv3__tok_load_words(dsv3__tok_load *l)
{
    dsv3_tokenizer *t = l->t;
    dsv3__bpe_source source;
    void *word_of;
    DSV3__TRY(dsv3__mem_alloc(&t->mem, &word_of, (uint64_t)l->n_vocab * sizeof *source.word_of, "words", l->err));
    source.rules = l->rules;
    source.n_rules = (uint32_t)l->n_rules;
    source.n_vocab = l->n_vocab;
    source.flags = t->flags;
    source.n_units = l->n_units;
    source.pool = t->pool;
    source.items = l->items;
    source.word_of = (uint32_t *)word_of;
    source.mem = &t->mem;
    source.err = l->err;
    dsv3_result r = dsv3__bpe_build(&t->bpe, &source);
    dsv3__mem_free(&t->mem, word_of);
    return r;
}

static dsv3_result dsv3__tok_load_all(dsv3__tok_load *l, const dsv3__tok_files *files)
{
    dsv3_tokenizer *t = l->t;
    bool ranks = !files->json.n && files->ranks.n;
    dsv3__tok_letters_init(l->byte_of);
    dsv3__split_init(&t->split, ranks);
    if (ranks) {
        DSV3__TRY(dsv3__tok_load_ranks(l, files->ranks));
        DSV3__TRY(dsv3__tok_load_ranks_config(l, files->config));
    } else {
        DSV3__TRY(dsv3__tok_load_file(l, files->json));
        DSV3__TRY(dsv3__tok_settle_markers(l));
    }
    DSV3__TRY(dsv3__tok_load_marker_trie(l));
    if (files->config.n)
        DSV3__TRY(dsv3__tok_load_config(l, files->config));
    if (files->chat_template.n) {
        DSV3__TRY(dsv3__tok_load_template_room(l, files->chat_template.n));
        memcpy(t->chat_template, files->chat_template.p, files->chat_template.n);
    }
    if (ranks) { /* the trie of markers took the room */
        DSV3__TRY(dsv3__tok_load_items(l, l->n_vocab));
        dsv3__tok_ranks_items(l);
    }
    DSV3__TRY(dsv3__tok_load_words(l));
    if (t->bos >= (int32_t)t->n_tokens || (t->add_bos && t->bos < 0))
        return DSV3__FAIL(l->err, DSV3_ERROR_TOKENIZER,
                          "tokenizer: a begin-of-text token is asked for, but there is no token %d", (int64_t)t->bos);
    return DSV3_OK;
}

static void dsv3__tok_close(dsv3_tokenizer *t)
{
    if (!t)
        return;
    dsv3__mem mem = t->mem;
    dsv3__mem_free(&mem, t->pool);
    dsv3__mem_free(&mem, t->spans);
    dsv3__mem_free(&mem, t->flags);
    dsv3__mem_free(&mem, t->markers);
    dsv3__mem_free(&mem, t->contents);
    dsv3__mem_free(&mem, t->content_pool);
    dsv3__mem_free(&mem, t->marker_trie.units);
    dsv3__mem_free(&mem, t->chat_template);
    dsv3__bpe_free(&t->bpe, &mem);
    dsv3__mem_free(&mem, t);
}

/* From the texts of the files, which need not outlive the call.
   On failure *tok is NULL and nothing is kept. Errors: JSON, TOKENIZER, OUT_OF_MEMORY, MEMORY_LIMIT. */
static dsv3_result dsv3__tok_open(dsv3_tokenizer **tok, const dsv3_allocator *allocator, uint64_t memory_limit,
                                  const dsv3__tok_files *files, dsv3_error *err)
{
    dsv3__mem mem;
    dsv3__tok_load l;
    void *t;
    *tok = NULL;
    dsv3__mem_init(&mem, allocator, memory_limit);
    DSV3__TRY(dsv3__mem_alloc(&mem, &t, sizeof **tok, "a tokenizer", err));
    memset(t, 0, sizeof **tok);
    memset(&l, 0, sizeof l);
    l.t = (dsv3_tokenizer *)t;
    l.t->mem = mem;
    l.t->bos = l.t->eos = l.t->pad = -1;
    l.err = err;
    dsv3_result r = dsv3__tok_load_all(&l, files);
    dsv3__mem_free(&l.t->mem, l.raw.units);
    dsv3__mem_free(&l.t->mem, l.rules);
    dsv3__mem_free(&l.t->mem, l.items);
    dsv3__mem_free(&l.t->mem, l.text);
    if (r)
        dsv3__tok_close(l.t);
    else
        *tok = l.t;
    return r;
}

// ---- Public -------------------------------------------------------------------------------------------------

DSV3_API dsv3_result dsv3_tokenize(const dsv3_tokenizer *tokenizer, const char *text, size_t len, uint32_t flags,
                                   int32_t *tokens, size_t cap, size_t *count, dsv3_error *error)
{
    dsv3__bpe_sink sink;
    dsv3_error local;
    sink.err = error ? error : &local;
    dsv3__err_clear(sink.err);
    if (count)
        *count = 0;
    if (!tokenizer || !count || (!text && len) || (!tokens && cap))
        return DSV3__FAIL(sink.err, DSV3_ERROR_INVALID_ARGUMENT,
                          "dsv3_tokenize: tokenizer, text, tokens or count is NULL");
    if (len > INT32_MAX || (flags & ~(uint32_t)(DSV3_TOKENIZE_BOS | DSV3_TOKENIZE_MARKERS)))
        return DSV3__FAIL(sink.err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_tokenize: %u bytes, flags %u", (uint64_t)len,
                          (uint64_t)flags);
    dsv3__bpe_sink_init(&sink, &tokenizer->mem, tokens, cap);
    if ((flags & DSV3_TOKENIZE_BOS) && tokenizer->add_bos)
        dsv3__bpe_push(&sink, tokenizer->bos);
    const uint8_t *p = (const uint8_t *)(len ? text : "");
    dsv3_result r = dsv3__tok_encode(tokenizer, p, p + len, flags & DSV3_TOKENIZE_MARKERS ? 2 : 0, &sink);
    dsv3__mem_free(&sink.mem, sink.big);
    if (r)
        return r;
    *count = sink.n;
    if (cap && sink.n > cap)
        return DSV3__FAIL(sink.err, DSV3_ERROR_BUFFER_TOO_SMALL, "dsv3_tokenize: room for %u tokens, needed %u",
                          (uint64_t)cap, (uint64_t)sink.n);
    return DSV3_OK;
}

DSV3_API const char *dsv3_token_bytes(const dsv3_tokenizer *tokenizer, int32_t token, size_t *len)
{
    bool known = tokenizer && token >= 0 && (uint32_t)token < tokenizer->n_tokens;
    if (len)
        *len = known ? tokenizer->spans[token].n : 0;
    return known ? tokenizer->pool + tokenizer->spans[token].at : NULL;
}

DSV3_API int32_t dsv3_token_find(const dsv3_tokenizer *tokenizer, const char *text, size_t len)
{
    return tokenizer && text ? dsv3__tok_marker_id(tokenizer, text, len) : -1;
}

DSV3_API void dsv3_tokenizer_info_get(const dsv3_tokenizer *tokenizer, dsv3_tokenizer_info *info)
{
    info->n_tokens = tokenizer ? (int32_t)tokenizer->n_tokens : 0;
    info->bos = tokenizer ? tokenizer->bos : -1;
    info->eos = tokenizer ? tokenizer->eos : -1;
    info->pad = tokenizer ? tokenizer->pad : -1;
    info->add_bos = tokenizer && tokenizer->add_bos;
}

DSV3_API dsv3_result dsv3_detokenize(const dsv3_tokenizer *tokenizer, const int32_t *tokens, size_t count,
                                     uint32_t flags, char *text, size_t cap, size_t *len, dsv3_error *error)
{
    char out[3 * (DSV3__TOK_CHUNK + 3)];
    dsv3__tok_stream stream = {0, {0}};
    dsv3_error local, *err = error ? error : &local;
    size_t total = 0;
    dsv3__err_clear(err);
    if (len)
        *len = 0;
    if (!tokenizer || !len || (!tokens && count) || (!text && cap))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_detokenize: tokenizer, tokens, text or len is NULL");
    if (flags & ~(uint32_t)DSV3_DETOKENIZE_SKIP_SPECIAL)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_detokenize: flags %u", (uint64_t)flags);
    for (size_t i = 0; i <= count; i++) {
        size_t left = 0;
        const char *bytes = i < count ? dsv3_token_bytes(tokenizer, tokens[i], &left) : NULL;
        if (bytes && (flags & DSV3_DETOKENIZE_SKIP_SPECIAL) && (tokenizer->flags[tokens[i]] & DSV3__TOK_SPECIAL))
            continue;
        do { /* in chunks; behind the last token, the flush */
            size_t chunk = dsv3__min(left, DSV3__TOK_CHUNK);
            size_t n =
                i < count ? dsv3__tok_stream_put(&stream, bytes, chunk, out) : dsv3__tok_stream_flush(&stream, out);
            if (total < cap)
                memcpy(text + total, out, dsv3__min(n, cap - total));
            total += n;
            bytes = bytes ? bytes + chunk : NULL;
            left -= chunk;
        } while (left);
    }
    *len = total;
    if (cap && total > cap)
        return DSV3__FAIL(err, DSV3_ERROR_BUFFER_TOO_SMALL, "dsv3_detokenize: room for %u bytes, needed %u",
                          (uint64_t)cap, (uint64_t)total);
    return DSV3_OK;
}

#else // DSV3_NO_TOKENIZER

struct dsv3_tokenizer {
    dsv3__mem mem;
};

static dsv3_result dsv3__tok_disabled(dsv3_error *error)
{
    dsv3_error local;
    return DSV3__FAIL(error ? error : &local, DSV3_ERROR_FEATURE_DISABLED, "compiled with DSV3_NO_TOKENIZER");
}

static dsv3_result dsv3__tok_open(dsv3_tokenizer **tok, const dsv3_allocator *allocator, uint64_t memory_limit,
                                  const dsv3__tok_files *files, dsv3_error *err)
{
    (void)allocator, (void)memory_limit, (void)files;
    *tok = NULL;
    return dsv3__tok_disabled(err);
}

static void dsv3__tok_close(dsv3_tokenizer *t)
{
    (void)t;
}

DSV3_API dsv3_result dsv3_tokenize(const dsv3_tokenizer *tokenizer, const char *text, size_t len, uint32_t flags,
                                   int32_t *tokens, size_t cap, size_t *count, dsv3_error *error)
{
    (void)tokenizer, (void)text, (void)len, (void)flags, (void)tokens, (void)cap;
    if (count)
        *count = 0;
    return dsv3__tok_disabled(error);
}

DSV3_API dsv3_result dsv3_detokenize(const dsv3_tokenizer *tokenizer, const int32_t *tokens, size_t count,
                                     uint32_t flags, char *text, size_t cap, size_t *len, dsv3_error *error)
{
    (void)tokenizer, (void)tokens, (void)count, (void)flags, (void)text, (void)cap;
    if (len)
        *len = 0;
    return dsv3__tok_disabled(error);
}

DSV3_API const char *dsv3_token_bytes(const dsv3_tokenizer *tokenizer, int32_t token, size_t *len)
{
    (void)tokenizer, (void)token;
    if (len)
        *len = 0;
    return NULL;
}

DSV3_API int32_t dsv3_token_find(const dsv3_tokenizer *tokenizer, const char *text, size_t len)
{
    (void)tokenizer, (void)text, (void)len;
    return -1;
}

DSV3_API void dsv3_tokenizer_info_get(const dsv3_tokenizer *tokenizer, dsv3_tokenizer_info *info)
{
    (void)tokenizer;
    info->n_tokens = 0;
    info->bos = info->eos = info->pad = -1;
    info->add_bos = false;
}

#endif // DSV3_NO_TOKENIZER
// =============================================================================
// >>chat  Conversations: messages to ids in a checkpoint's markup, and the ids of a reply to its parts.
//         Needs: json, tok. Owns: nothing.
// =============================================================================

/* A chat template is a program in Jinja; what the known ones print is written here as rules. One function a family walks
   over the messages and writes two kinds of things: markers, which are ids, and text. Neighbouring text is tokenized as
   one piece, as the reference does with the whole string; but it is tokenized as text, so that no content can be a
   marker. What is odd below (a tool round that is never closed, calls that are left out) is odd in the templates, and
   models were trained on it. */

DSV3_API const char *dsv3_markup_name(dsv3_markup markup)
{
    static const char *const names[] = {"auto",     "v3", "r1", "r1-think", "v3.1", "kimi-k2", "kimi-k2-thinking",
                                        "gigachat3"};
    return (size_t)markup < DSV3__COUNT(names) ? names[markup] : "?";
}

#ifndef DSV3_NO_TOKENIZER

enum {
    DSV3__CHAT_BOS, /* what tokenizer_config.json names, if it does */
    DSV3__CHAT_EOS,
    DSV3__CHAT_USER,
    DSV3__CHAT_ASSISTANT,
    DSV3__CHAT_CALLS,
    DSV3__CHAT_CALLS_END,
    DSV3__CHAT_CALL,
    DSV3__CHAT_CALL_END,
    DSV3__CHAT_SEP,
    DSV3__CHAT_OUTPUTS,
    DSV3__CHAT_OUTPUTS_END,
    DSV3__CHAT_OUTPUT,
    DSV3__CHAT_OUTPUT_END,
    DSV3__CHAT_THINK,
    DSV3__CHAT_THINK_END,
    DSV3__CHAT_IM_SYSTEM, /* Kimi */
    DSV3__CHAT_IM_USER,
    DSV3__CHAT_IM_ASSISTANT,
    DSV3__CHAT_IM_MIDDLE,
    DSV3__CHAT_IM_END,
    DSV3__CHAT_IM_CALLS,
    DSV3__CHAT_IM_CALLS_END,
    DSV3__CHAT_IM_CALL,
    DSV3__CHAT_IM_ARGUMENT,
    DSV3__CHAT_IM_CALL_END,
    DSV3__CHAT_ROLE_SEP, /* GigaChat3 */
    DSV3__CHAT_MESSAGE_SEP,
    DSV3__CHAT_N_MARKERS
};

enum { DSV3__CHAT_NAME_MAX = 255 }; /* bytes of a call's name or id that a reply tells whole */

#define DSV3__CHAT_BAR "\xEF\xBD\x9C" /* U+FF5C */
#define DSV3__CHAT_LOW "\xE2\x96\x81" /* U+2581 */

// clang-format off
static const char *const dsv3__chat_markers[DSV3__CHAT_N_MARKERS] = {
    "<" DSV3__CHAT_BAR "begin" DSV3__CHAT_LOW "of" DSV3__CHAT_LOW "sentence" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "end" DSV3__CHAT_LOW "of" DSV3__CHAT_LOW "sentence" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "User" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "Assistant" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "calls" DSV3__CHAT_LOW "begin" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "calls" DSV3__CHAT_LOW "end" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "call" DSV3__CHAT_LOW "begin" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "call" DSV3__CHAT_LOW "end" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "sep" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "outputs" DSV3__CHAT_LOW "begin" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "outputs" DSV3__CHAT_LOW "end" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "output" DSV3__CHAT_LOW "begin" DSV3__CHAT_BAR ">",
    "<" DSV3__CHAT_BAR "tool" DSV3__CHAT_LOW "output" DSV3__CHAT_LOW "end" DSV3__CHAT_BAR ">",
    "<think>", "</think>",
    "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|role_sep|>", "<|message_sep|>"
};
// clang-format on

/* A piece of text within another, or NULL. */
static const char *dsv3__chat_find(dsv3__str text, const char *part)
{
    size_t n = strlen(part);
    for (const char *p = text.p, *end = text.p + text.n; (size_t)(end - p) >= n; p++) {
        p = (const char *)memchr(p, part[0], (size_t)(end - p) - n + 1);
        if (!p)
            return NULL;
        if (memcmp(p, part, n) == 0)
            return p;
    }
    return NULL;
}

/* What stands between two pieces of text; false if they are not there. */
static bool dsv3__chat_between(dsv3__str text, const char *begin, const char *end, dsv3__str *found)
{
    const char *b = text.n ? dsv3__chat_find(text, begin) : NULL, *e;
    dsv3__str rest;
    if (!b)
        return false;
    rest.p = b + strlen(begin);
    rest.n = (size_t)(text.p + text.n - rest.p);
    e = dsv3__chat_find(rest, end);
    if (!e)
        return false;
    found->p = rest.p;
    found->n = (size_t)(e - rest.p);
    return true;
}

static dsv3__str dsv3__chat_template(const dsv3_tokenizer *t)
{
    dsv3__str text;
    text.p = t->chat_template ? t->chat_template : "";
    text.n = t->chat_template ? t->n_chat_template : 0;
    return text;
}

/* The first of these that a template has says what it is; AUTO: not known here. */
static dsv3_markup dsv3__chat_recognise(dsv3__str text)
{
#define DSV3__CHAT_HAS(part) (dsv3__chat_find(text, (part)) != NULL)
    if (!text.n || DSV3__CHAT_HAS("DSML")) /* V3.2 and V4 */
        return DSV3_MARKUP_AUTO;
    if (DSV3__CHAT_HAS("<|im_middle|>")) {
        bool thinks = DSV3__CHAT_HAS("<think>"), calls = DSV3__CHAT_HAS("<|tool_calls_section_begin|>");
        if (thinks != calls || DSV3__CHAT_HAS("thinking")) /* later revisions of K2-Instruct, K2.5 */
            return DSV3_MARKUP_AUTO;
        return thinks ? DSV3_MARKUP_KIMI_K2_THINKING : DSV3_MARKUP_KIMI_K2;
    }
    if (DSV3__CHAT_HAS("<|role_sep|>"))
        return DSV3_MARKUP_GIGACHAT3;
    if (!DSV3__CHAT_HAS("<" DSV3__CHAT_BAR "User" DSV3__CHAT_BAR ">"))
        return DSV3_MARKUP_AUTO;
    if (DSV3__CHAT_HAS("is_last_user") && DSV3__CHAT_HAS("thinking"))
        return DSV3_MARKUP_V3_1;
    if (DSV3__CHAT_HAS("split('</think>')[-1]"))
        return DSV3__CHAT_HAS("<" DSV3__CHAT_BAR "Assistant" DSV3__CHAT_BAR "><think>\\n") ||
                       DSV3__CHAT_HAS("<" DSV3__CHAT_BAR "Assistant" DSV3__CHAT_BAR "><think>\n")
                   ? DSV3_MARKUP_R1_THINK
                   : DSV3_MARKUP_R1;
    return DSV3_MARKUP_V3;
#undef DSV3__CHAT_HAS
}

/* *markup: what was asked for, or, AUTO, the checkpoint's own. */
static dsv3_result dsv3__chat_resolve(const dsv3_tokenizer *t, dsv3_markup *markup, dsv3_error *err)
{
    if (*markup < DSV3_MARKUP_AUTO || *markup > DSV3_MARKUP_GIGACHAT3)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "chat: no markup %d", (int64_t)*markup);
    if (*markup == DSV3_MARKUP_AUTO)
        *markup = dsv3__chat_recognise(dsv3__chat_template(t));
    if (*markup == DSV3_MARKUP_AUTO)
        return DSV3__FAIL(err, DSV3_ERROR_TOKENIZER,
                          "chat: the checkpoint %s: name a markup (v3, r1, r1-think, v3.1, kimi-k2, kimi-k2-thinking, "
                          "gigachat3), or write the conversation yourself and give its ids",
                          t->chat_template ? "has a chat template that is not known here" : "has no chat template");
    return DSV3_OK;
}

// ---- Writing ---------------------------------------------------------------------------------------------

/* A conversation on its way out. The first failure stays, and later writing does nothing. */
typedef struct dsv3__chat {
    const dsv3_tokenizer *t;
    const dsv3_message *messages; /* [n] */
    size_t n;
    const dsv3_chat_opts *o;
    dsv3_markup markup;
    dsv3_result result;
    dsv3_error *err;
    char *text; /* [n_text] all of it, markers spelled */
    uint64_t n_text, text_cap;
    uint64_t done; /* so much of it is ids already */
    dsv3__bpe_sink sink;
} dsv3__chat;

#define DSV3__CHAT_FAIL(c, ...) \
    ((c)->result = (c)->result ? (c)->result : DSV3__FAIL((c)->err, DSV3_ERROR_INVALID_ARGUMENT, __VA_ARGS__))

static void dsv3__chat_put(dsv3__chat *c, const char *p, size_t n)
{
    void *text = c->text;
    if (c->result || !n)
        return;
    if (n > INT32_MAX - c->n_text) {
        DSV3__CHAT_FAIL(c, "chat: a conversation of more than %u bytes", (uint64_t)INT32_MAX);
        return;
    }
    c->result =
        dsv3__mem_grow(&c->sink.mem, &text, &c->text_cap, c->n_text, c->n_text + n, 1, "a conversation", c->err);
    c->text = (char *)text;
    if (c->result)
        return;
    memcpy(c->text + c->n_text, p, n);
    c->n_text += n;
}

static void dsv3__chat_str(dsv3__chat *c, const char *s)
{
    dsv3__chat_put(c, s, strlen(s));
}

/* The text since the last marker becomes ids. */
static void dsv3__chat_flush(dsv3__chat *c)
{
    const uint8_t *p = (const uint8_t *)c->text;
    if (!c->result && c->done < c->n_text)
        c->result = dsv3__tok_encode(c->t, p + c->done, p + c->n_text, 0, &c->sink);
    c->done = c->n_text;
}

static int32_t dsv3__chat_id(const dsv3_tokenizer *t, int marker)
{
    if (marker == DSV3__CHAT_BOS && t->bos >= 0)
        return t->bos;
    return dsv3__tok_marker_id(t, dsv3__chat_markers[marker], strlen(dsv3__chat_markers[marker]));
}

/* A tokenizer without <think> (DeepSeek-V3's, under R1's template) spells it; without another it is not made for this
   markup. */
static void dsv3__chat_mark(dsv3__chat *c, int marker)
{
    int32_t id = dsv3__chat_id(c->t, marker);
    const char *spelled = dsv3__chat_markers[marker];
    size_t n = strlen(spelled);
    if (id < 0) {
        if (marker == DSV3__CHAT_THINK || marker == DSV3__CHAT_THINK_END)
            dsv3__chat_put(c, spelled, n);
        else if (!c->result)
            c->result = DSV3__FAIL(c->err, DSV3_ERROR_TOKENIZER,
                                   "chat: markup %s needs the token \"%s\", the tokenizer has none",
                                   dsv3_markup_name(c->markup), spelled);
        return;
    }
    if (marker == DSV3__CHAT_BOS)
        spelled = dsv3_token_bytes(c->t, id, &n);
    dsv3__chat_flush(c);
    dsv3__chat_put(c, spelled, n);
    if (!c->result)
        dsv3__bpe_push(&c->sink, id);
    c->done = c->n_text;
}

/* A field that must be there; `i` is the message, `what` the field. */
static void dsv3__chat_field(dsv3__chat *c, size_t i, dsv3_text text, const char *what)
{
    if (text.p)
        dsv3__chat_put(c, text.p, text.len);
    else
        DSV3__CHAT_FAIL(c, "chat: messages[%u] has no %s", (uint64_t)i, what);
}

static void dsv3__chat_content(dsv3__chat *c, size_t i)
{
    dsv3__chat_field(c, i, c->messages[i].content, "content");
}

/* What stands behind the first </think> of a content, or behind the last; all of it if there is none. */
static dsv3_text dsv3__chat_answer(dsv3_text content, bool last)
{
    dsv3__str rest;
    const char *at;
    rest.p = content.p;
    rest.n = content.len;
    while (content.p && (at = dsv3__chat_find(rest, "</think>")) != NULL) {
        rest.n -= (size_t)(at - rest.p) + 8;
        rest.p = at + 8;
        if (!last)
            break;
    }
    content.p = rest.p;
    content.len = rest.n;
    return content;
}

// ---- Tools -----------------------------------------------------------------------------------------------

/* A string of JSON as Python's json writes it: no escapes but those that must be. */
static void dsv3__chat_json_string(dsv3__chat *c, dsv3__json_str s, bool quoted)
{
    static const char hex[] = "0123456789abcdef";
    static const char named[] = "\"\"\\\\\nn\rr\tt\bb\ff";
    uint64_t from = c->n_text;
    size_t n;
    dsv3__chat_put(c, s.p, s.n); /* room for it, and a place to decode it */
    if (c->result)
        return;
    if (!dsv3__json_decode(s, c->text + from, &n)) {
        c->result = DSV3__FAIL(c->err, DSV3_ERROR_JSON, "tools: a bad escape in a string");
        return;
    }
    c->n_text = from + n;
    if (!quoted)
        return;
    dsv3__chat_str(c, "\"");
    for (size_t i = 0; i < n && !c->result; i++) {
        char byte = c->text[from + i], escape[6] = {'\\', 'u', '0', '0', '0', '0'};
        const char *name = named;
        while (*name && *name != byte)
            name += 2;
        if (!*name && (uint8_t)byte >= 0x20) {
            dsv3__chat_put(c, &byte, 1);
            continue;
        }
        escape[4] = hex[(uint8_t)byte >> 4], escape[5] = hex[byte & 15];
        if (*name)
            escape[1] = name[1];
        dsv3__chat_put(c, escape, *name ? 2 : 6);
    }
    dsv3__chat_str(c, "\"");
    if (c->result)
        return;
    c->n_text -= n; /* the decoded string goes */
    memmove(c->text + from, c->text + from + n, (size_t)(c->n_text - from));
}

/* A value of JSON that is known to be sound, spaced as Python's json.dumps does. */
static void dsv3__chat_json(dsv3__chat *c, dsv3__json at)
{
    dsv3__json value = at;
    const char *end;
    dsv3__json_peek(&value);
    at.p = value.p;
    dsv3__json_skip(&value);
    end = value.p;
    while (at.p < end && !c->result) {
        dsv3__json_str s;
        const char *p = at.p;
        if (*p == '"') {
            dsv3__json_string(&at, &s);
            dsv3__chat_json_string(c, s, true);
            continue;
        }
        if (*p != ' ' && *p != '\n' && *p != '\r' && *p != '\t')
            dsv3__chat_put(c, p, 1);
        if (*p == ',' || *p == ':')
            dsv3__chat_str(c, " ");
        at.p++;
    }
}

/* Stands before the list of tools. False: there are none, or it is no list of sound JSON. */
static bool dsv3__chat_tools(dsv3__chat *c, dsv3__json *list)
{
    dsv3__json all;
    if (!c->o->tools.p || !c->o->tools.len || c->result)
        return false;
    dsv3__json_init(list, c->o->tools.p, c->o->tools.len, "tools", c->err);
    all = *list;
    if (dsv3__json_peek(&all) != '[')
        dsv3__json_fail(&all, "expected a list");
    dsv3__json_skip(&all);
    c->result = dsv3__json_end(&all);
    all = *list;
    return !c->result && dsv3__json_open(&all, '[') && dsv3__json_item(&all);
}

/* A string in an object; nothing if it is not there. */
static void dsv3__chat_json_field(dsv3__chat *c, const dsv3__json *object, const char *name)
{
    dsv3__json value;
    dsv3__json_str s;
    if (dsv3__tok_get(object, name, &value) && dsv3__json_peek(&value) == '"' && dsv3__json_string(&value, &s))
        dsv3__chat_json_string(c, s, false);
}

/* The tools of V3.1, behind the system text, as its model card has them. */
static void dsv3__chat_v3_1_tools(dsv3__chat *c)
{
    dsv3__json list;
    if (!dsv3__chat_tools(c, &list))
        return;
    dsv3__chat_str(c, "\n\n## Tools\nYou have access to the following tools:\n");
    dsv3__json_open(&list, '[');
    while (dsv3__json_item(&list)) {
        dsv3__json function, parameters;
        if (!dsv3__tok_get(&list, "function", &function)) {
            DSV3__CHAT_FAIL(c, "tools: expected objects with a \"function\"");
            return;
        }
        dsv3__chat_str(c, "\n### ");
        dsv3__chat_json_field(c, &function, "name");
        dsv3__chat_str(c, "\nDescription: ");
        dsv3__chat_json_field(c, &function, "description");
        dsv3__chat_str(c, "\n\nParameters: ");
        if (dsv3__tok_get(&function, "parameters", &parameters))
            dsv3__chat_json(c, parameters);
        else
            dsv3__chat_str(c, "{}");
        dsv3__chat_str(c, "\n");
        dsv3__json_skip(&list);
    }
    dsv3__chat_str(c, "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n");
    dsv3__chat_mark(c, DSV3__CHAT_CALLS);
    dsv3__chat_mark(c, DSV3__CHAT_CALL);
    dsv3__chat_str(c, "tool_call_name");
    dsv3__chat_mark(c, DSV3__CHAT_SEP);
    dsv3__chat_str(c, "tool_call_arguments");
    dsv3__chat_mark(c, DSV3__CHAT_CALL_END);
    dsv3__chat_str(c, "{additional_tool_calls}");
    dsv3__chat_mark(c, DSV3__CHAT_CALLS_END);
    dsv3__chat_str(c, "\n\nWhere:\n\n- `tool_call_name` must be an exact match to one of the available tools\n"
                      "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
                      "- For multiple tool calls, chain them directly without separators or spaces\n");
}

/* Is it left to the model which tool is called? */
static bool dsv3__chat_any_call(const dsv3_tool_call *call)
{
    return !call->name.len && !call->id.len;
}

// ---- The markups -----------------------------------------------------------------------------------------

/* DeepSeek's begin: all system contents, wherever they stand. */
static void dsv3__chat_system(dsv3__chat *c)
{
    dsv3__str text = dsv3__chat_template(c->t);
    bool any = false, only_last = c->o->markup == DSV3_MARKUP_AUTO && !dsv3__chat_find(text, "is_first_sp");
    size_t last = c->n;
    for (size_t i = 0; i < c->n; i++)
        last = c->messages[i].role == DSV3_ROLE_SYSTEM ? i : last;
    dsv3__chat_mark(c, DSV3__CHAT_BOS);
    for (size_t i = 0; i < c->n; i++) {
        if (c->messages[i].role != DSV3_ROLE_SYSTEM || (only_last && i != last)) /* V3's template of December 2024 */
            continue;
        if (any)
            dsv3__chat_str(c, "\n\n");
        dsv3__chat_content(c, i);
        any = true;
    }
}

/* DeepSeek's call as far as its arguments; as far as its name, where `any` may stand. */
static void dsv3__chat_call_open(dsv3__chat *c, size_t i, const dsv3_tool_call *call, bool any)
{
    bool fenced = c->markup != DSV3_MARKUP_V3_1;
    dsv3__chat_mark(c, DSV3__CHAT_CALL);
    if (fenced) {
        dsv3__chat_str(c, "function");
        dsv3__chat_mark(c, DSV3__CHAT_SEP);
    }
    if (any)
        return;
    dsv3__chat_field(c, i, call->name, "name in a tool call");
    if (fenced)
        dsv3__chat_str(c, "\n```json\n");
    else
        dsv3__chat_mark(c, DSV3__CHAT_SEP);
}

static void dsv3__chat_call_close(dsv3__chat *c, size_t i, const dsv3_tool_call *call)
{
    dsv3__chat_field(c, i, call->arguments, "arguments in a tool call");
    if (c->markup != DSV3_MARKUP_V3_1)
        dsv3__chat_str(c, "\n```");
    dsv3__chat_mark(c, DSV3__CHAT_CALL_END);
}

/* What V3's and R1's templates keep in mind. Only the first call and the first output of a conversation open a section. */
typedef struct dsv3__chat_state {
    bool called, answered; /* there was a call, an output */
    bool in_tool;          /* the last turn was a tool's */
} dsv3__chat_state;

/* A call of message i, whose turn has this content, as far as its arguments. */
static void dsv3__chat_v3_call_open(dsv3__chat *c, size_t i, dsv3_text content, const dsv3_tool_call *call, bool any,
                                    dsv3__chat_state *s)
{
    if (s->called) {
        dsv3__chat_str(c, "\n");
    } else {
        dsv3__chat_mark(c, DSV3__CHAT_ASSISTANT);
        if (c->markup != DSV3_MARKUP_V3 && content.p)
            dsv3__chat_put(c, content.p, content.len);
        dsv3__chat_mark(c, DSV3__CHAT_CALLS);
    }
    s->called = true;
    dsv3__chat_call_open(c, i, call, any);
}

static void dsv3__chat_v3_calls(dsv3__chat *c, size_t i, dsv3__chat_state *s)
{
    const dsv3_message *m = &c->messages[i];
    bool r1 = c->markup != DSV3_MARKUP_V3;
    s->in_tool = false;
    for (size_t k = 0; k < m->n_tool_calls; k++) {
        bool first = !s->called;
        dsv3__chat_v3_call_open(c, i, m->content, &m->tool_calls[k], false, s);
        dsv3__chat_call_close(c, i, &m->tool_calls[k]);
        if (!first && !r1) {
            dsv3__chat_mark(c, DSV3__CHAT_CALLS_END);
            dsv3__chat_mark(c, DSV3__CHAT_EOS);
        }
    }
    if (r1) {
        dsv3__chat_mark(c, DSV3__CHAT_CALLS_END);
        dsv3__chat_mark(c, DSV3__CHAT_EOS);
    }
}

static void dsv3__chat_v3_output(dsv3__chat *c, size_t i, dsv3__chat_state *s)
{
    if (!s->answered)
        dsv3__chat_mark(c, DSV3__CHAT_OUTPUTS);
    else if (c->markup == DSV3_MARKUP_V3)
        dsv3__chat_str(c, "\n");
    s->answered = s->in_tool = true;
    dsv3__chat_mark(c, DSV3__CHAT_OUTPUT);
    dsv3__chat_content(c, i);
    dsv3__chat_mark(c, DSV3__CHAT_OUTPUT_END);
}

static void dsv3__chat_v3_answer(dsv3__chat *c, size_t i, dsv3__chat_state *s)
{
    dsv3_text content = c->messages[i].content;
    if (!s->in_tool && c->markup != DSV3_MARKUP_V3)
        content = dsv3__chat_answer(content, true);
    dsv3__chat_mark(c, s->in_tool ? DSV3__CHAT_OUTPUTS_END : DSV3__CHAT_ASSISTANT);
    dsv3__chat_field(c, i, content, "content");
    dsv3__chat_mark(c, DSV3__CHAT_EOS);
    s->in_tool = false;
}

/* V3, R1, R1_THINK. V3 knows calls by a content that is missing, R1 by the list that is there. */
static void dsv3__chat_v3(dsv3__chat *c)
{
    dsv3__chat_state s = {false, false, false};
    dsv3__chat_system(c);
    for (size_t i = 0; i < c->n && !c->result; i++) {
        const dsv3_message *m = &c->messages[i];
        bool calls = c->markup == DSV3_MARKUP_V3 ? !m->content.p : m->tool_calls != NULL;
        if (m->role == DSV3_ROLE_USER) {
            s.in_tool = false;
            dsv3__chat_mark(c, DSV3__CHAT_USER);
            dsv3__chat_content(c, i);
        } else if (m->role == DSV3_ROLE_TOOL) {
            dsv3__chat_v3_output(c, i, &s);
        } else if (m->role == DSV3_ROLE_ASSISTANT) {
            (calls ? dsv3__chat_v3_calls : dsv3__chat_v3_answer)(c, i, &s);
        }
    }
    if (c->o->call) { /* behind an output the round stays open, as the template leaves it */
        const dsv3_text none = {NULL, 0};
        dsv3__chat_v3_call_open(c, c->n, none, c->o->call, dsv3__chat_any_call(c->o->call), &s);
    } else if (s.in_tool) {
        dsv3__chat_mark(c, DSV3__CHAT_OUTPUTS_END);
    } else if (c->o->add_generation_prompt) {
        dsv3__chat_mark(c, DSV3__CHAT_ASSISTANT);
        if (c->markup == DSV3_MARKUP_R1_THINK) {
            dsv3__chat_mark(c, DSV3__CHAT_THINK);
            dsv3__chat_str(c, "\n");
        }
    }
}

static void dsv3__chat_v3_1_assistant(dsv3__chat *c, size_t i, bool behind_user, bool in_tool)
{
    const dsv3_message *m = &c->messages[i];
    if (behind_user) {
        bool open = !m->tool_calls && m->prefix && c->o->thinking;
        dsv3__chat_mark(c, DSV3__CHAT_ASSISTANT);
        dsv3__chat_mark(c, open ? DSV3__CHAT_THINK : DSV3__CHAT_THINK_END);
    }
    if (!m->tool_calls) {
        dsv3__chat_field(c, i, in_tool ? m->content : dsv3__chat_answer(m->content, false), "content");
    } else {
        if (m->n_tool_calls && m->content.p)
            dsv3__chat_content(c, i);
        if (m->n_tool_calls)
            dsv3__chat_mark(c, DSV3__CHAT_CALLS);
        for (size_t k = 0; k < m->n_tool_calls; k++) {
            dsv3__chat_call_open(c, i, &m->tool_calls[k], false);
            dsv3__chat_call_close(c, i, &m->tool_calls[k]);
        }
        dsv3__chat_mark(c, DSV3__CHAT_CALLS_END);
    }
    dsv3__chat_mark(c, DSV3__CHAT_EOS);
}

static void dsv3__chat_v3_1(dsv3__chat *c)
{
    bool behind_user = false, in_tool = false;
    dsv3__chat_system(c);
    dsv3__chat_v3_1_tools(c);
    for (size_t i = 0; i < c->n && !c->result; i++) {
        const dsv3_message *m = &c->messages[i];
        if (m->role == DSV3_ROLE_SYSTEM)
            continue;
        if (m->role == DSV3_ROLE_ASSISTANT) {
            dsv3__chat_v3_1_assistant(c, i, behind_user, in_tool);
        } else {
            bool user = m->role == DSV3_ROLE_USER;
            dsv3__chat_mark(c, user ? DSV3__CHAT_USER : DSV3__CHAT_OUTPUT);
            dsv3__chat_content(c, i);
            if (!user)
                dsv3__chat_mark(c, DSV3__CHAT_OUTPUT_END);
        }
        behind_user = m->role == DSV3_ROLE_USER;
        in_tool = m->role == DSV3_ROLE_TOOL;
    }
    if (c->o->add_generation_prompt && behind_user) {
        dsv3__chat_mark(c, DSV3__CHAT_ASSISTANT);
        dsv3__chat_mark(c, c->o->thinking && !c->o->call ? DSV3__CHAT_THINK : DSV3__CHAT_THINK_END);
    }
    if (c->o->call) {
        dsv3__chat_mark(c, DSV3__CHAT_CALLS);
        dsv3__chat_call_open(c, c->n, c->o->call, dsv3__chat_any_call(c->o->call));
    }
}

static void dsv3__chat_kimi_head(dsv3__chat *c, dsv3_role role, dsv3_text name)
{
    static const char *const words[] = {"system", "user", "assistant", "tool"};
    dsv3__chat_mark(c, role == DSV3_ROLE_USER        ? DSV3__CHAT_IM_USER
                       : role == DSV3_ROLE_ASSISTANT ? DSV3__CHAT_IM_ASSISTANT
                                                     : DSV3__CHAT_IM_SYSTEM);
    if (name.len)
        dsv3__chat_put(c, name.p, name.len);
    else
        dsv3__chat_str(c, words[role]);
    dsv3__chat_mark(c, DSV3__CHAT_IM_MIDDLE);
}

/* The system text where a conversation has none: the template's own. */
static void dsv3__chat_kimi_system(dsv3__chat *c)
{
    const dsv3_text none = {NULL, 0};
    dsv3__str words;
    dsv3__chat_kimi_head(c, DSV3_ROLE_SYSTEM, none);
    if (dsv3__chat_between(dsv3__chat_template(c->t), "system<|im_middle|>You ", "<|im_end|>", &words)) {
        dsv3__chat_str(c, "You ");
        dsv3__chat_put(c, words.p, words.n);
    } else {
        dsv3__chat_str(c, c->markup == DSV3_MARKUP_KIMI_K2 ? "You are a helpful assistant"
                                                           : "You are Kimi, an AI assistant created by Moonshot AI.");
    }
    dsv3__chat_mark(c, DSV3__CHAT_IM_END);
}

/* An assistant's turn of Kimi-K2-Thinking; `open`: no later one is an answer. */
static void dsv3__chat_kimi_assistant(dsv3__chat *c, size_t i, bool open)
{
    const dsv3_message *m = &c->messages[i];
    dsv3__chat_mark(c, DSV3__CHAT_THINK);
    if (open)
        dsv3__chat_put(c, m->reasoning.p, m->reasoning.p ? m->reasoning.len : 0);
    dsv3__chat_mark(c, DSV3__CHAT_THINK_END);
    dsv3__chat_put(c, m->content.p, m->content.p ? m->content.len : 0);
    if (!m->n_tool_calls)
        return;
    dsv3__chat_mark(c, DSV3__CHAT_IM_CALLS);
    for (size_t k = 0; k < m->n_tool_calls; k++) {
        dsv3__chat_mark(c, DSV3__CHAT_IM_CALL);
        dsv3__chat_field(c, i, m->tool_calls[k].id, "id in a tool call");
        dsv3__chat_mark(c, DSV3__CHAT_IM_ARGUMENT);
        dsv3__chat_field(c, i, m->tool_calls[k].arguments, "arguments in a tool call");
        dsv3__chat_mark(c, DSV3__CHAT_IM_CALL_END);
    }
    dsv3__chat_mark(c, DSV3__CHAT_IM_CALLS_END);
}

static void dsv3__chat_kimi_message(dsv3__chat *c, size_t i, bool open)
{
    const dsv3_text none = {NULL, 0};
    const dsv3_message *m = &c->messages[i];
    bool thinking = c->markup == DSV3_MARKUP_KIMI_K2_THINKING;
    dsv3__chat_kimi_head(c, m->role, thinking ? m->name : none);
    if (!thinking) {
        dsv3__chat_content(c, i);
    } else if (m->role == DSV3_ROLE_ASSISTANT) {
        dsv3__chat_kimi_assistant(c, i, open);
    } else {
        if (m->role == DSV3_ROLE_TOOL) {
            dsv3__chat_str(c, "## Return of ");
            dsv3__chat_field(c, i, m->tool_call_id, "tool_call_id");
            dsv3__chat_str(c, "\n");
        }
        dsv3__chat_put(c, m->content.p, m->content.p ? m->content.len : 0);
    }
    dsv3__chat_mark(c, DSV3__CHAT_IM_END);
}

/* KIMI_K2, KIMI_K2_THINKING. */
static void dsv3__chat_kimi(dsv3__chat *c)
{
    const dsv3_text none = {NULL, 0};
    dsv3__json list;
    size_t answer = 0; /* behind the last answer: a turn of the assistant without calls */
    for (size_t i = 0; i < c->n; i++)
        if (c->messages[i].role == DSV3_ROLE_ASSISTANT && !c->messages[i].n_tool_calls)
            answer = i + 1;
    if (dsv3__chat_tools(c, &list)) {
        dsv3__chat_mark(c, DSV3__CHAT_IM_SYSTEM);
        dsv3__chat_str(c, "tool_declare");
        dsv3__chat_mark(c, DSV3__CHAT_IM_MIDDLE);
        dsv3__chat_json(c, list);
        dsv3__chat_mark(c, DSV3__CHAT_IM_END);
    }
    if (c->n ? c->messages[0].role != DSV3_ROLE_SYSTEM : c->markup == DSV3_MARKUP_KIMI_K2_THINKING)
        dsv3__chat_kimi_system(c);
    for (size_t i = 0; i < c->n && !c->result; i++)
        dsv3__chat_kimi_message(c, i, i >= answer);
    if (c->o->add_generation_prompt)
        dsv3__chat_kimi_head(c, DSV3_ROLE_ASSISTANT, none);
    if (c->o->call) {
        dsv3__chat_mark(c, DSV3__CHAT_THINK);
        dsv3__chat_mark(c, DSV3__CHAT_THINK_END);
        dsv3__chat_mark(c, DSV3__CHAT_IM_CALLS);
        dsv3__chat_mark(c, DSV3__CHAT_IM_CALL);
        dsv3__chat_put(c, c->o->call->id.p, c->o->call->id.len);
        if (!dsv3__chat_any_call(c->o->call))
            dsv3__chat_mark(c, DSV3__CHAT_IM_ARGUMENT);
    }
}

/* A turn of GigaChat3 but for its content. */
static void dsv3__chat_giga_head(dsv3__chat *c, const char *role)
{
    dsv3__chat_str(c, role);
    dsv3__chat_mark(c, DSV3__CHAT_ROLE_SEP);
    dsv3__chat_str(c, "\n");
}

static void dsv3__chat_giga_end(dsv3__chat *c)
{
    dsv3__chat_mark(c, DSV3__CHAT_MESSAGE_SEP);
    dsv3__chat_str(c, "\n\n");
}

/* Some kilobytes that stand before every conversation: the template's own. */
static void dsv3__chat_giga_developer(dsv3__chat *c)
{
    dsv3__str text;
    if (!dsv3__chat_between(dsv3__chat_template(c->t), "set DEVSYSTEM -%}", "{%- endset -%}", &text) ||
        dsv3__chat_find(text, "{{") || dsv3__chat_find(text, "{%")) {
        DSV3__CHAT_FAIL(c,
                        "chat: gigachat3 begins with a text that the checkpoint's chat template holds; there is none");
        return;
    }
    while (text.n && (*text.p == ' ' || *text.p == '\n' || *text.p == '\t'))
        text.p++, text.n--;
    while (text.n && (text.p[text.n - 1] == ' ' || text.p[text.n - 1] == '\n' || text.p[text.n - 1] == '\t'))
        text.n--;
    dsv3__chat_giga_head(c, "developer system");
    dsv3__chat_put(c, text.p, text.n);
    dsv3__chat_giga_end(c);
}

static void dsv3__chat_giga(dsv3__chat *c)
{
    static const char *const words[] = {"system", "user", "assistant", "function result"};
    size_t from = c->n && c->messages[0].role == DSV3_ROLE_SYSTEM ? 1 : 0;
    dsv3__chat_mark(c, DSV3__CHAT_BOS);
    dsv3__chat_giga_developer(c);
    for (size_t i = 0; i < c->n && !c->result; i++) {
        const dsv3_message *m = &c->messages[i];
        dsv3__chat_giga_head(c, words[m->role]);
        dsv3__chat_put(c, m->content.p, m->content.p ? m->content.len : 0);
        dsv3__chat_giga_end(c);
        if (m->role != DSV3_ROLE_ASSISTANT || !m->n_tool_calls)
            continue;
        dsv3__chat_giga_head(c, "function call"); /* the first one only */
        dsv3__chat_str(c, "{\"name\": \"");
        dsv3__chat_field(c, i, m->tool_calls[0].name, "name in a tool call");
        dsv3__chat_str(c, "\", \"arguments\": ");
        dsv3__chat_field(c, i, m->tool_calls[0].arguments, "arguments in a tool call");
        dsv3__chat_str(c, "}");
        dsv3__chat_giga_end(c);
    }
    if (c->o->add_generation_prompt && c->n > from && c->messages[c->n - 1].role != DSV3_ROLE_ASSISTANT)
        dsv3__chat_giga_head(c, "assistant");
}

// ---- Public: rendering -----------------------------------------------------------------------------------

/* A call that must be made, as the renderer and the reply are told of it. Names are as long as a reply tells them. */
static dsv3_result dsv3__chat_check_call(dsv3_markup markup, const dsv3_tool_call *call, dsv3_error *err)
{
    bool kimi = markup == DSV3_MARKUP_KIMI_K2_THINKING;
    dsv3_text said = kimi ? call->id : call->name;
    if (markup == DSV3_MARKUP_KIMI_K2 || markup == DSV3_MARKUP_GIGACHAT3)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "chat: markup %s has no tool calls that can be asked for",
                          dsv3_markup_name(markup));
    if (dsv3__chat_any_call(call))
        return DSV3_OK;
    if (!call->name.p || !call->name.len || !said.p || !said.len || call->name.len > DSV3__CHAT_NAME_MAX ||
        said.len > DSV3__CHAT_NAME_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "chat: opts.call: expected %s of 1 to %u bytes",
                          kimi ? "a name and an id" : "a name", (uint64_t)DSV3__CHAT_NAME_MAX);
    return DSV3_OK;
}

/* Arguments and options of a call. */
static dsv3_result dsv3__chat_check(dsv3__chat *c, const dsv3_chat_opts *opts)
{
    if (!c->t || (c->n && !c->messages))
        return DSV3__FAIL(c->err, DSV3_ERROR_INVALID_ARGUMENT, "chat: tokenizer or messages is NULL");
    if (opts->struct_size && opts->struct_size != sizeof *opts)
        return DSV3__FAIL(c->err, DSV3_ERROR_INVALID_OPTIONS, "chat opts: struct_size is %u, expected 0 or %u",
                          (uint64_t)opts->struct_size, (uint64_t)sizeof *opts);
    for (size_t i = 0; i < c->n; i++) {
        const dsv3_message *m = &c->messages[i];
        if (m->role < DSV3_ROLE_SYSTEM || m->role > DSV3_ROLE_TOOL || (m->n_tool_calls && !m->tool_calls))
            return DSV3__FAIL(c->err, DSV3_ERROR_INVALID_ARGUMENT,
                              "chat: messages[%u] has the role %d and %u tool calls", (uint64_t)i, (int64_t)m->role,
                              (uint64_t)m->n_tool_calls);
    }
    c->markup = opts->markup;
    DSV3__TRY(dsv3__chat_resolve(c->t, &c->markup, c->err));
    bool declares =
        c->markup == DSV3_MARKUP_V3_1 || c->markup == DSV3_MARKUP_KIMI_K2 || c->markup == DSV3_MARKUP_KIMI_K2_THINKING;
    dsv3__json list;
    if (!declares && dsv3__chat_tools(c, &list))
        return DSV3__FAIL(c->err, DSV3_ERROR_INVALID_ARGUMENT,
                          "chat: markup %s has no place for tools: describe them in the system message",
                          dsv3_markup_name(c->markup));
    if (opts->call) {
        size_t last = c->n;
        while (last && c->messages[last - 1].role == DSV3_ROLE_SYSTEM)
            last--;
        DSV3__TRY(dsv3__chat_check_call(c->markup, opts->call, c->err));
        if (!opts->add_generation_prompt || !last || c->messages[last - 1].role == DSV3_ROLE_ASSISTANT)
            return DSV3__FAIL(
                c->err, DSV3_ERROR_INVALID_ARGUMENT,
                "chat: opts.call: expected add_generation_prompt, and the user's or a tool's turn before");
    }
    return c->result;
}

/* Renders into c->text and c->sink; tokens [cap]. dsv3__chat_free in any case. */
static dsv3_result dsv3__chat_run(dsv3__chat *c, const dsv3_tokenizer *t, const dsv3_message *messages, size_t n,
                                  const dsv3_chat_opts *opts, int32_t *tokens, size_t cap, dsv3_error *err)
{
    c->t = t;
    c->messages = messages;
    c->n = n;
    c->o = opts;
    c->result = DSV3_OK;
    c->err = c->sink.err = err;
    c->text = NULL;
    c->n_text = c->text_cap = c->done = 0;
    c->sink.big = NULL;
    DSV3__TRY(dsv3__chat_check(c, opts));
    dsv3__bpe_sink_init(&c->sink, &t->mem, tokens, cap);
    switch (c->markup) {
    case DSV3_MARKUP_V3_1: dsv3__chat_v3_1(c); break;
    case DSV3_MARKUP_KIMI_K2:
    case DSV3_MARKUP_KIMI_K2_THINKING: dsv3__chat_kimi(c); break;
    case DSV3_MARKUP_GIGACHAT3: dsv3__chat_giga(c); break;
    default: dsv3__chat_v3(c);
    }
    dsv3__chat_flush(c);
    return c->result;
}

static void dsv3__chat_free(dsv3__chat *c)
{
    if (c->text)
        dsv3__mem_free(&c->sink.mem, c->text);
    if (c->sink.big)
        dsv3__mem_free(&c->sink.mem, c->sink.big);
}

DSV3_API dsv3_result dsv3_chat_markup(const dsv3_tokenizer *tokenizer, dsv3_markup *markup, dsv3_error *error)
{
    dsv3_error local, *err = error ? error : &local;
    dsv3__err_clear(err);
    if (markup)
        *markup = DSV3_MARKUP_AUTO;
    if (!tokenizer || !markup)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_chat_markup: tokenizer or markup is NULL");
    return dsv3__chat_resolve(tokenizer, markup, err);
}

DSV3_API dsv3_result dsv3_chat_render(const dsv3_tokenizer *tokenizer, const dsv3_message *messages, size_t n,
                                      const dsv3_chat_opts *opts, int32_t *tokens, size_t cap, size_t *count,
                                      dsv3_error *error)
{
    dsv3_chat_opts none;
    dsv3_error local, *err = error ? error : &local;
    dsv3__chat c;
    dsv3__err_clear(err);
    if (count)
        *count = 0;
    if (!count || (!tokens && cap))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_chat_render: tokens or count is NULL");
    memset(&none, 0, sizeof none);
    dsv3_result r = dsv3__chat_run(&c, tokenizer, messages, n, opts ? opts : &none, tokens, cap, err);
    dsv3__chat_free(&c);
    if (r)
        return r;
    *count = c.sink.n;
    if (cap && c.sink.n > cap)
        return DSV3__FAIL(err, DSV3_ERROR_BUFFER_TOO_SMALL, "dsv3_chat_render: room for %u tokens, needed %u",
                          (uint64_t)cap, (uint64_t)c.sink.n);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_chat_text(const dsv3_tokenizer *tokenizer, const dsv3_message *messages, size_t n,
                                    const dsv3_chat_opts *opts, char *text, size_t cap, size_t *len, dsv3_error *error)
{
    dsv3_chat_opts none;
    dsv3_error local, *err = error ? error : &local;
    dsv3__chat c;
    dsv3__err_clear(err);
    if (len)
        *len = 0;
    if (!len || (!text && cap))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_chat_text: text or len is NULL");
    memset(&none, 0, sizeof none);
    dsv3_result r = dsv3__chat_run(&c, tokenizer, messages, n, opts ? opts : &none, NULL, 0, err);
    if (!r) {
        *len = (size_t)c.n_text;
        if (cap && c.n_text)
            memcpy(text, c.text, dsv3__min((size_t)c.n_text, cap));
    }
    dsv3__chat_free(&c);
    if (!r && cap && *len > cap)
        return DSV3__FAIL(err, DSV3_ERROR_BUFFER_TOO_SMALL, "dsv3_chat_text: room for %u bytes, needed %u",
                          (uint64_t)cap, (uint64_t)*len);
    return r;
}

// ---- Reading a reply -------------------------------------------------------------------------------------

/* Ids tell markers from text, so a model may write about "</think>" without ending anything. Only a tokenizer that has no
   <think> of its own leaves its two to be found in the text. Text passes through two stages: dsv3__tok_stream makes whole
   characters of it; then what may be the beginning of a pattern (a marker, a stop string, a newline that counts for none)
   is held back until it is certain. Both see characters and not tokens: where a reply was cut into tokens does not
   matter. */

enum {
    DSV3__REPLY_START,  /* an answer, or reasoning if it is opened now */
    DSV3__REPLY_REASON, /* until </think>, or a tool call */
    DSV3__REPLY_ANSWER,
    DSV3__REPLY_CALLS, /* between tool calls */
    DSV3__REPLY_NAME,
    DSV3__REPLY_FENCE, /* where "```json" stands before arguments */
    DSV3__REPLY_ARGUMENTS,
    DSV3__REPLY_END
};

enum { DSV3__REPLY_PATTERN_MAX = 63 };

/* V3 and R1 fence arguments as Markdown does. */
static bool dsv3__reply_fenced(const dsv3_reply *r)
{
    return r->opts.markup == DSV3_MARKUP_V3 || r->opts.markup == DSV3_MARKUP_R1 ||
           r->opts.markup == DSV3_MARKUP_R1_THINK;
}

/* May the text open reasoning? */
static bool dsv3__reply_opens(const dsv3_reply *r)
{
    return r->state == DSV3__REPLY_START && r->markers[DSV3__CHAT_THINK] < 0 &&
           (r->opts.markup == DSV3_MARKUP_R1 || r->opts.markup == DSV3_MARKUP_KIMI_K2_THINKING);
}

/* What is looked for where the reply is now; NULL behind the last. "\xFF" is in no text: what stands before it is held
   back to the end of its part, and never found. */
static const char *dsv3__reply_pattern(const dsv3_reply *r, size_t i)
{
    static const char *const spelled[] = {"</think>", "\n</think>"};
    bool keep = r->opts.keep_newlines;
    switch (r->state) {
    case DSV3__REPLY_REASON:
        if (r->markers[DSV3__CHAT_THINK_END] < 0)
            return i < (keep ? 1u : 2u) ? spelled[i] : NULL;
        return i || keep ? NULL : "\n\xFF";
    case DSV3__REPLY_FENCE: return i ? NULL : "```json\n";
    case DSV3__REPLY_ARGUMENTS: return i || !dsv3__reply_fenced(r) ? NULL : "\n```\xFF";
    case DSV3__REPLY_START:
        if (dsv3__reply_opens(r) && i-- == 0)
            return "<think>";
        break;
    case DSV3__REPLY_ANSWER: break;
    default: return NULL;
    }
    return i < r->opts.n_stop_strings ? r->opts.stop_strings[i] : NULL;
}

static dsv3_reply_kind dsv3__reply_kind(const dsv3_reply *r)
{
    switch (r->state) {
    case DSV3__REPLY_REASON: return DSV3_REPLY_REASONING;
    case DSV3__REPLY_NAME: return DSV3_REPLY_CALL_NAME;
    case DSV3__REPLY_FENCE:
    case DSV3__REPLY_ARGUMENTS: return DSV3_REPLY_CALL_ARGUMENTS;
    case DSV3__REPLY_END: return DSV3_REPLY_END;
    default: return DSV3_REPLY_ANSWER;
    }
}

static void dsv3__reply_event(dsv3_reply *r, dsv3_reply_kind kind, const char *text, size_t len)
{
    dsv3_reply_event event;
    if (!r->opts.event_fn)
        return;
    event.kind = kind;
    event.id = r->id;
    event.call = r->n_calls ? r->n_calls - 1 : 0;
    event.text = text;
    event.len = len;
    r->id = -1;
    if (!r->opts.event_fn(r->opts.user, &event) || kind == DSV3_REPLY_END)
        r->opts.event_fn = NULL; /* that was the last */
}

static void dsv3__reply_flush(dsv3_reply *r)
{
    size_t n = r->n_out;
    r->n_out = 0;
    if (n)
        dsv3__reply_event(r, r->out_kind, r->out, n);
}

static void dsv3__reply_emit(dsv3_reply *r, const char *p, size_t n)
{
    dsv3_reply_kind kind = dsv3__reply_kind(r);
    if (kind != r->out_kind || r->n_out + n > sizeof r->out)
        dsv3__reply_flush(r);
    r->out_kind = kind;
    memcpy(r->out + r->n_out, p, n);
    r->n_out += (uint32_t)n;
}

static void dsv3__reply_finish(dsv3_reply *r)
{
    dsv3__reply_flush(r);
    r->n_held = 0;
    r->state = DSV3__REPLY_END;
    dsv3__reply_event(r, DSV3_REPLY_END, "", 0);
}

static void dsv3__reply_skip(dsv3_reply *r, uint32_t newlines)
{
    r->skip = r->opts.keep_newlines ? 0 : newlines;
}

/* Pattern i of this state was found. */
static void dsv3__reply_found(dsv3_reply *r, size_t i)
{
    if (r->state == DSV3__REPLY_REASON) {
        r->state = DSV3__REPLY_ANSWER;
        dsv3__reply_skip(r, 2);
    } else if (r->state == DSV3__REPLY_FENCE) {
        r->state = DSV3__REPLY_ARGUMENTS;
    } else if (dsv3__reply_opens(r) && i == 0) {
        r->state = DSV3__REPLY_REASON;
        dsv3__reply_skip(r, 1);
    } else {
        dsv3__reply_finish(r);
    }
}

/* Hands out the first character that is held. */
static void dsv3__reply_release(dsv3_reply *r)
{
    size_t n = dsv3__utf8_length(r->held, r->held + r->n_held);
    n = n ? n : 1;
    if (r->state == DSV3__REPLY_START)
        r->state = DSV3__REPLY_ANSWER;
    if (r->state == DSV3__REPLY_FENCE)
        r->state = DSV3__REPLY_ARGUMENTS;
    dsv3__reply_emit(r, r->held, n);
    r->n_held -= (uint32_t)n;
    memmove(r->held, r->held + n, r->n_held);
}

/* Is some pattern found at the beginning of what is held (*i is its number), or might one be? */
static bool dsv3__reply_match(const dsv3_reply *r, size_t *i, bool *found)
{
    bool may = false;
    const char *pattern;
    for (*i = 0; (pattern = dsv3__reply_pattern(r, *i)) != NULL; ++*i) {
        size_t n = strlen(pattern);
        if (memcmp(r->held, pattern, dsv3__min(n, r->n_held)) != 0)
            continue;
        may = true;
        *found = n <= r->n_held;
        if (*found)
            break;
    }
    return may;
}

/* Decides about what is held, from the left, as far as it is certain. */
static void dsv3__reply_settle(dsv3_reply *r)
{
    while (r->n_held) {
        bool found = false;
        size_t i;
        if (!dsv3__reply_match(r, &i, &found)) {
            dsv3__reply_release(r);
            continue;
        }
        if (!found)
            return;
        r->n_held = 0; /* behind a stop string nothing counts, and behind the others nothing is held */
        dsv3__reply_found(r, i);
    }
}

/* The name of a call is complete. Kimi writes an id that holds it. */
static void dsv3__reply_named(dsv3_reply *r, bool kimi)
{
    static const char prefix[] = "functions.";
    size_t from = 0, to = r->n_name;
    dsv3__reply_flush(r);
    if (kimi) {
        dsv3__reply_event(r, DSV3_REPLY_CALL_ID, r->name, to);
        if (to >= sizeof prefix - 1 && memcmp(r->name, prefix, sizeof prefix - 1) == 0)
            from = sizeof prefix - 1;
        for (size_t i = from; i < r->n_name; i++)
            to = r->name[i] == ':' ? i : to;
    }
    dsv3__reply_event(r, DSV3_REPLY_CALL_NAME, r->name + from, to - from);
    r->state = dsv3__reply_fenced(r) ? DSV3__REPLY_FENCE : DSV3__REPLY_ARGUMENTS;
}

/* One whole character. */
static void dsv3__reply_char(dsv3_reply *r, const char *p, size_t n)
{
    bool newline = *p == '\n';
    if (r->skip && newline) {
        r->skip--;
        return;
    }
    r->skip = 0;
    if (r->state == DSV3__REPLY_CALLS && newline)
        return;
    if (r->state == DSV3__REPLY_CALLS)
        r->state = DSV3__REPLY_ANSWER;
    if (r->state == DSV3__REPLY_NAME) {
        if (newline && dsv3__reply_fenced(r))
            dsv3__reply_named(r, false);
        else if (r->n_name + n < sizeof r->name)
            memcpy(r->name + r->n_name, p, n), r->n_name += (uint32_t)n;
        return;
    }
    if (r->state == DSV3__REPLY_END)
        return;
    memcpy(r->held + r->n_held, p, n); /* at most a pattern without its last byte, and a character */
    r->n_held += (uint32_t)n;
    dsv3__reply_settle(r);
}

static void dsv3__reply_chars(dsv3_reply *r, const char *p, size_t n)
{
    for (size_t i = 0, step; i < n; i += step) {
        step = dsv3__utf8_length(p + i, p + n);
        dsv3__reply_char(r, p + i, step);
    }
}

/* Bytes of the reply that are no marker. */
static void dsv3__reply_text(dsv3_reply *r, const char *bytes, size_t n)
{
    char out[3 * (DSV3__TOK_CHUNK + 3)];
    dsv3__tok_stream stream;
    memcpy(&stream, r->utf8, sizeof stream);
    for (size_t chunk; n; bytes += chunk, n -= chunk) {
        chunk = dsv3__min(n, DSV3__TOK_CHUNK);
        dsv3__reply_chars(r, out, dsv3__tok_stream_put(&stream, bytes, chunk, out));
    }
    memcpy(r->utf8, &stream, sizeof stream);
}

/* A part ends here. `marked`: by a marker that belongs there, before which a newline of reasoning counts for none. */
static void dsv3__reply_close(dsv3_reply *r, bool marked)
{
    char out[3];
    dsv3__tok_stream stream;
    memcpy(&stream, r->utf8, sizeof stream);
    dsv3__reply_chars(r, out, dsv3__tok_stream_flush(&stream, out));
    memcpy(r->utf8, &stream, sizeof stream);
    if (r->state == DSV3__REPLY_ARGUMENTS || (r->state == DSV3__REPLY_REASON && marked && !r->opts.keep_newlines)) {
        static const char *const dropped[] = {"\n```", "\n"};
        const char *drop = dropped[r->state == DSV3__REPLY_REASON];
        if (r->n_held == strlen(drop) && memcmp(r->held, drop, r->n_held) == 0)
            r->n_held = 0;
    }
    while (r->n_held)
        dsv3__reply_release(r);
    r->skip = 0;
}

/* A marker by its id. False: it has no meaning here and is text, as its spelling. */
static bool dsv3__reply_marker(dsv3_reply *r, int marker)
{
    bool reasoning = r->state == DSV3__REPLY_REASON, named = r->state == DSV3__REPLY_NAME;
    bool in_call = named || r->state == DSV3__REPLY_FENCE || r->state == DSV3__REPLY_ARGUMENTS;
    switch (marker) {
    case DSV3__CHAT_THINK:
        if (r->state != DSV3__REPLY_START || r->n_held || r->utf8[0])
            return reasoning;
        r->state = DSV3__REPLY_REASON;
        dsv3__reply_skip(r, 1);
        return true;
    case DSV3__CHAT_THINK_END:
        if (!reasoning)
            return r->state == DSV3__REPLY_START;
        dsv3__reply_close(r, true);
        r->state = DSV3__REPLY_ANSWER;
        dsv3__reply_skip(r, 2);
        return true;
    case DSV3__CHAT_CALLS:
    case DSV3__CHAT_IM_CALLS:
    case DSV3__CHAT_CALLS_END:
    case DSV3__CHAT_IM_CALLS_END:
        dsv3__reply_close(r, true);
        r->state = marker == DSV3__CHAT_CALLS || marker == DSV3__CHAT_IM_CALLS ? DSV3__REPLY_CALLS : DSV3__REPLY_ANSWER;
        return true;
    case DSV3__CHAT_CALL:
    case DSV3__CHAT_IM_CALL:
        dsv3__reply_close(r, true);
        dsv3__reply_flush(r);
        r->state = DSV3__REPLY_NAME;
        r->n_name = 0;
        r->n_calls++;
        return true;
    case DSV3__CHAT_SEP:
    case DSV3__CHAT_IM_ARGUMENT:
        if (!named)
            return false;
        dsv3__reply_close(r, true);
        if (marker == DSV3__CHAT_SEP && dsv3__reply_fenced(r))
            r->n_name = 0; /* that was the type, "function" */
        else
            dsv3__reply_named(r, marker == DSV3__CHAT_IM_ARGUMENT);
        return true;
    case DSV3__CHAT_CALL_END:
    case DSV3__CHAT_IM_CALL_END:
        if (!in_call)
            return false;
        dsv3__reply_close(r, true);
        if (named)
            dsv3__reply_named(r, marker == DSV3__CHAT_IM_CALL_END);
        r->state = DSV3__REPLY_CALLS;
        return true;
    default: /* the end, or a turn that is not the model's */
        dsv3__reply_close(r, false);
        dsv3__reply_finish(r);
        return true;
    }
}

DSV3_API dsv3_result dsv3_reply_init(dsv3_reply *reply, const dsv3_tokenizer *tokenizer, const dsv3_reply_opts *opts,
                                     dsv3_error *error)
{
    dsv3_error local, *err = error ? error : &local;
    dsv3__err_clear(err);
    if (!reply || !tokenizer || !opts || !opts->event_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT,
                          "dsv3_reply_init: reply, tokenizer, opts or event_fn is NULL");
    memset(reply, 0, sizeof *reply);
    if (opts->struct_size && opts->struct_size != sizeof *opts)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "reply opts: struct_size is %u, expected 0 or %u",
                          (uint64_t)opts->struct_size, (uint64_t)sizeof *opts);
    for (size_t i = 0; i < opts->n_stop_strings; i++) {
        const char *s = opts->stop_strings ? opts->stop_strings[i] : NULL;
        if (!s || !*s || strlen(s) > DSV3__REPLY_PATTERN_MAX)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "reply opts: stop string %u: expected 1 to %u bytes",
                              (uint64_t)i, (uint64_t)DSV3__REPLY_PATTERN_MAX);
    }
    dsv3_markup markup = opts->markup;
    DSV3__TRY(dsv3__chat_resolve(tokenizer, &markup, err));
    if (opts->call)
        DSV3__TRY(dsv3__chat_check_call(markup, opts->call, err));
    reply->tokenizer = tokenizer;
    reply->opts = *opts;
    reply->opts.markup = markup;
    reply->id = -1;
    for (int i = 0; i < DSV3__CHAT_N_MARKERS; i++)
        reply->markers[i] = dsv3__chat_id(tokenizer, i);
    bool thinks = markup == DSV3_MARKUP_R1_THINK || (markup == DSV3_MARKUP_V3_1 && opts->thinking);
    reply->state = thinks ? DSV3__REPLY_REASON : DSV3__REPLY_START;
    dsv3__reply_skip(reply, markup == DSV3_MARKUP_V3_1 && thinks ? 1 : 0); /* R1's prompt has that newline */
    if (opts->call) { /* the prompt ends behind what opens its arguments */
        const dsv3_tool_call *call = opts->call;
        reply->opts.call = NULL;
        reply->n_calls = 1;
        reply->skip = 0;
        reply->state = DSV3__REPLY_ARGUMENTS;
        if (dsv3__chat_any_call(call)) {
            reply->state = DSV3__REPLY_NAME;
            return DSV3_OK;
        }
        if (markup == DSV3_MARKUP_KIMI_K2_THINKING)
            dsv3__reply_event(reply, DSV3_REPLY_CALL_ID, call->id.p, call->id.len);
        dsv3__reply_event(reply, DSV3_REPLY_CALL_NAME, call->name.p, call->name.len);
    }
    return DSV3_OK;
}

DSV3_API bool dsv3_reply_put(dsv3_reply *reply, int32_t token)
{
    int marker = 0;
    if (!reply || !reply->opts.event_fn)
        return false;
    reply->id = token;
    while (marker < DSV3__CHAT_N_MARKERS && (reply->markers[marker] != token || token < 0))
        marker++;
    if (token >= 0 && token == reply->tokenizer->eos)
        marker = DSV3__CHAT_EOS;
    if (marker == DSV3__CHAT_N_MARKERS || !dsv3__reply_marker(reply, marker)) {
        size_t n;
        const char *bytes = dsv3_token_bytes(reply->tokenizer, token, &n);
        dsv3__reply_text(reply, bytes, n);
    }
    dsv3__reply_flush(reply);
    if (reply->id >= 0) /* nothing is certain yet, but the token was read */
        dsv3__reply_event(reply, dsv3__reply_kind(reply), "", 0);
    return reply->opts.event_fn != NULL;
}

DSV3_API void dsv3_reply_end(dsv3_reply *reply)
{
    if (!reply || !reply->opts.event_fn)
        return;
    dsv3__reply_close(reply, false);
    dsv3__reply_finish(reply);
}

#else // DSV3_NO_TOKENIZER

DSV3_API dsv3_result dsv3_chat_markup(const dsv3_tokenizer *tokenizer, dsv3_markup *markup, dsv3_error *error)
{
    (void)tokenizer;
    if (markup)
        *markup = DSV3_MARKUP_AUTO;
    return dsv3__tok_disabled(error);
}

DSV3_API dsv3_result dsv3_chat_render(const dsv3_tokenizer *tokenizer, const dsv3_message *messages, size_t n,
                                      const dsv3_chat_opts *opts, int32_t *tokens, size_t cap, size_t *count,
                                      dsv3_error *error)
{
    (void)tokenizer, (void)messages, (void)n, (void)opts, (void)tokens, (void)cap;
    if (count)
        *count = 0;
    return dsv3__tok_disabled(error);
}

DSV3_API dsv3_result dsv3_chat_text(const dsv3_tokenizer *tokenizer, const dsv3_message *messages, size_t n,
                                    const dsv3_chat_opts *opts, char *text, size_t cap, size_t *len, dsv3_error *error)
{
    (void)tokenizer, (void)messages, (void)n, (void)opts, (void)text, (void)cap;
    if (len)
        *len = 0;
    return dsv3__tok_disabled(error);
}

DSV3_API dsv3_result dsv3_reply_init(dsv3_reply *reply, const dsv3_tokenizer *tokenizer, const dsv3_reply_opts *opts,
                                     dsv3_error *error)
{
    (void)tokenizer, (void)opts;
    if (reply)
        memset(reply, 0, sizeof *reply);
    return dsv3__tok_disabled(error);
}

DSV3_API bool dsv3_reply_put(dsv3_reply *reply, int32_t token)
{
    (void)reply, (void)token;
    return false;
}

DSV3_API void dsv3_reply_end(dsv3_reply *reply)
{
    (void)reply;
}

#endif // DSV3_NO_TOKENIZER
// =============================================================================
// >>gram  Output that must be JSON, or fit a JSON Schema: schema -> automaton over bytes -> mask over tokens.
//         Needs: json, tok. Owns: the compiled grammar, which never changes once it is open.
// =============================================================================

/* Three floors.

   *Lexemes.* What has no inner structure, a string with its quotes, a number, `true`, and the key of a member, is read by
   deterministic automata over bytes that share one table. Patterns become automata through sets of places (Thompson's
   construction); bounds of numbers by comparing digit for digit; everything that must hold at once, or of which one must
   hold, by running the parts side by side (dsv3__gram_product). States from which no end can be reached are taken out:
   whoever is in a state can finish.

   *Nodes.* A node is a set of subschemas that hold at once for a value, each set kept once, so recursion ends. It is
   spread out into alternatives without $ref, allOf, anyOf, oneOf, const and enum in them; their scalars are one lexeme
   automaton, and their arrays and objects are followed side by side in *threads*, since what tells them apart may come
   late. JSON's brackets are the same for all threads: one stack of frames is enough, and a thread knows by a bit mask
   which threads of the frame below live on through it. For every node it is known how deep and with how many keys its
   smallest text is (dsv3__gram_needs); nothing is begun that could not be ended within the limits.

   *Tokens.* The vocabulary is a trie in preorder; a mask is a walk over it that leaves each subtree at its first byte
   that is not possible. Within a string that allows everything, all tokens without a quote are known in advance, and
   only those with one are walked. */

enum {
    DSV3__GRAM_DEPTH_MAX = DSV3_GRAMMAR_DEPTH,
    DSV3__GRAM_KEYS_MAX = DSV3_GRAMMAR_KEYS,
    DSV3__GRAM_THREADS_ALL = DSV3_GRAMMAR_THREADS,
    DSV3__GRAM_THREADS_MAX = 32,     /* of one value */
    DSV3__GRAM_WORK_MAX = 1 << 27,   /* steps to compile */
    DSV3__GRAM_TEXT_MAX = 1 << 20,   /* bytes of a schema */
    DSV3__GRAM_VALUES_MAX = 1 << 16, /* JSON values in it */
    DSV3__GRAM_ATOMS_MAX = 64,       /* subschemas that hold at once */
    DSV3__GRAM_SPREAD_MAX = 4096,    /* steps to spread one node out into its alternatives */
    DSV3__GRAM_NODES_MAX = 4096,
    DSV3__GRAM_PLACES_MAX = 1 << 15, /* of a pattern's automaton before it is made deterministic */
    DSV3__GRAM_PARTS_MAX = 128,      /* automata run side by side to make one */
    DSV3__GRAM_GROUPS_MAX = 32,      /* open parentheses of a pattern */
    DSV3__GRAM_RANGES_MAX = 128,     /* of a character class */
    DSV3__GRAM_REPEAT_MAX = 1000,    /* {m,n} of a pattern */
    DSV3__GRAM_INT_DIGITS = 19,
    DSV3__GRAM_FRACTION_DIGITS = 15,
    DSV3__GRAM_EXACT_DIGITS = 15,
    DSV3__GRAM_DIGITS_MAX = 40, /* of a bound */
    DSV3__GRAM_STATES = 8192,
    DSV3__GRAM_STATES_MAX = 65535,
    DSV3__GRAM_DEPTH = 32,
    DSV3__GRAM_SPACES = 64, /* white space in a row, DSV3_SPACING_ANY */
    DSV3__GRAM_OPEN = 200,  /* keys that can be reached, counted so far: more than a state can remember */
    DSV3__GRAM_WALKS = 4    /* lexemes begun within one token that are walked the quick way */
};

#define DSV3__GRAM_NEVER  UINT32_MAX /* a need that cannot be met */
#define DSV3__GRAM_NO_MAX UINT32_MAX

#ifndef DSV3_NO_TOKENIZER

/* What is known of a state of a lexeme. */
typedef struct dsv3__gram_info {
    uint16_t label;       /* 0: nothing ends here. 1: a value does; of a key: 1 + its place in `keys` */
    uint16_t first, last; /* of a key: the named ones that can still be reached, first ... last - 1 */
    uint8_t final;        /* it ends here and cannot go on */
    uint8_t open;         /* of a key: more unnamed ones can be reached than a state can remember */
    uint8_t free;         /* within a string whose going on is free */
} dsv3__gram_info;

/* A key that an object may have: a name, or, behind the names, all that are treated alike. */
typedef struct dsv3__gram_key {
    uint64_t hash; /* of the spelled name */
    uint32_t node; /* of its value; 0: must not be there */
    bool named, required;
} dsv3__gram_key;

/* An alternative of a node that is an array or an object. */
typedef struct dsv3__gram_alt {
    bool object;
    uint32_t min, max; /* items or members */
    uint32_t first,
        n; /* array: [n + 1] nodes of its items, in `children`, the last of all others; object: keys, the names first */
    uint32_t start, end, n_required; /* object: automaton of its keys, states start ... end - 1 */
    uint32_t n_named;
    uint32_t depth, keys;           /* needs, this one included */
    uint32_t reserved;              /* object: keys it must have room for */
    uint32_t open_depth, open_keys; /* object: needs of the dearest value of an unnamed key */
} dsv3__gram_alt;

typedef struct dsv3__gram_node {
    uint32_t scalar;             /* automaton, 0: none */
    uint32_t lengths, n_lengths; /* strings of which only the length is bounded, in `lengths` */
    uint32_t alts, n_alts;
    uint32_t depth, keys, best; /* needs of its smallest alternative, and which that is */
} dsv3__gram_node;

typedef struct dsv3__gram_length {
    uint32_t min, max; /* code points */
} dsv3__gram_length;

/* A node of the trie, preorder: the children follow. */
typedef struct dsv3__gram_token {
    uint32_t end;  /* behind its subtree */
    int32_t token; /* -1: none ends here */
    uint16_t depth;
    uint8_t byte;
    uint8_t quote; /* a string that was free ends in this subtree */
} dsv3__gram_token;

/* The vocabulary, for all grammars of a tokenizer. */
typedef struct dsv3__gram_vocab {
    dsv3__gram_token *trie; /* [n] */
    uint32_t n, n_tokens;
    uint32_t *pure;     /* [n_tokens / 32] tokens that leave a free string free and unended */
    uint32_t *by_chars; /* those that begin few characters first */
    uint32_t chars
        [257]; /* chars[c]: where those with c characters begin, c < 256 (255: or more); chars[256]: their number */
} dsv3__gram_vocab;

struct dsv3_grammar {
    dsv3__mem mem;
    const dsv3_tokenizer *tokenizer;
    dsv3__gram_vocab vocab;
    bool shares_vocab;
    dsv3_spacing spacing;
    uint32_t max_depth, max_states;
    uint32_t string, body;  /* automaton of any string; its state behind the quote */
    uint32_t head;          /* of tools: automaton of what stands before their arguments; 0: none */
    int32_t sep;            /* of tools: the marker that the byte SEP stands for in it */
    uint16_t *next;         /* [n_states, 256] 0: not possible */
    dsv3__gram_info *info;  /* [n_states] */
    dsv3__gram_node *nodes; /* [0]: what cannot be; [1]: the root */
    dsv3__gram_alt *alts;
    dsv3__gram_key *keys;
    dsv3__gram_length *lengths;
    uint32_t *children;
    uint64_t n_states, cap_next, cap_info, n_nodes, cap_nodes, n_alts, cap_alts, n_keys, cap_keys, n_lengths,
        cap_lengths, n_children, cap_children;
};

/* A value of the schema's text. Number 0 is none, 1 the whole. */
typedef struct dsv3__gram_value {
    char kind;                       /* { [ " t f n, 0 a number */
    uint32_t next, child, parent, n; /* the next in the same object or array; the first within, and how many */
    dsv3__str key, text;             /* decoded; of a number as written */
    bool checked;                    /* its keywords are known */
    bool whole;                      /* a document of its own */
} dsv3__gram_value;

/* A place of a pattern's automaton. */
enum { DSV3__GRAM_EMPTY, DSV3__GRAM_BYTES, DSV3__GRAM_BEGIN, DSV3__GRAM_END };

typedef struct dsv3__gram_place {
    uint8_t kind, lo, hi;
    bool seen;
    uint32_t a, b; /* where it leads; 0: nowhere. Only EMPTY has two */
} dsv3__gram_place;

/* Lists of numbers, each kept once and numbered as they come. */
typedef struct dsv3__gram_lists {
    uint32_t *items, *slots; /* slots: [n_slots], a power of two; 0: free */
    dsv3__tok_span *spans;
    uint64_t n_items, cap_items, n, cap, n_slots;
} dsv3__gram_lists;

/* What goes into a product. A group holds if all its parts do; the product is what any of its groups holds for. */
typedef struct dsv3__gram_part {
    uint32_t group, start;
    bool is_length, optional; /* optional: may fail without the group failing */
    dsv3__gram_length length;
} dsv3__gram_part;

/* Kinds of an atom (top four bits) and the value it stands for. */
enum {
    DSV3__GRAM_SCHEMA = 0,
    DSV3__GRAM_CONST = 1,  /* this value */
    DSV3__GRAM_ENUM = 2,   /* one of the scalars of this array */
    DSV3__GRAM_CHOICE = 3, /* one of the schemas of this array */
    DSV3__GRAM_VALUES = 4, /* one of the values of this array */
    DSV3__GRAM_PLAIN = 5,  /* a schema whose choices are left aside */
    DSV3__GRAM_FALSE = 15
};

#define DSV3__GRAM_ATOM(kind, index) ((uint32_t)(kind) << 28 | (uint32_t)(index))
#define DSV3__GRAM_KIND(atom)        ((atom) >> 28)
#define DSV3__GRAM_INDEX(atom)       ((atom)&0x0FFFFFFFu)

/* Subschemas that hold at once: the first `done` are spread out, the others not yet. */
typedef struct dsv3__gram_conj {
    uint32_t n, done;
    uint32_t atoms[DSV3__GRAM_ATOMS_MAX];
} dsv3__gram_conj;

/* Two options of a oneOf: no value may fit both. */
typedef struct dsv3__gram_apart {
    uint32_t node, value;
} dsv3__gram_apart;

typedef struct dsv3__gram_memo {
    uint32_t value, start;
} dsv3__gram_memo;

typedef struct dsv3__gram_build {
    dsv3_grammar *g;
    dsv3_error *err;
    char *pool; /* decoded strings of the schema */
    dsv3__gram_value *values;
    dsv3__gram_place *places;
    uint32_t *walk, *reach, *set, *tuple; /* scratch of the constructions */
    dsv3__gram_lists lists, conjs;        /* sets of places, or states side by side; atoms of the nodes */
    dsv3__gram_lists goals;               /* places behind a byte, before what they lead on to by themselves */
    uint32_t *goal_sets;                  /* [goals] the set each leads to, a number in `lists` */
    dsv3__gram_conj *spread;
    dsv3__gram_apart *apart;
    dsv3__gram_memo *patterns;
    dsv3__str *names; /* of one object */
    uint64_t n_pool, n_values, cap_values, n_places, cap_places, cap_walk, cap_reach, cap_set, cap_tuple, n_spread,
        cap_spread, n_apart, cap_apart, n_patterns, cap_patterns, n_names, cap_names, cap_goal_sets;
    uint32_t number, integer; /* automata of those without bounds; 0: not made yet */
    uint64_t work;            /* steps done */
} dsv3__gram_build;

/* Room for `want` elements in all in one of the arrays above. */
#define DSV3__GRAM_ROOM(b, array, cap, used, want)                                                                \
    dsv3__mem_grow(&(b)->g->mem, (void **)(void *)&(array), &(cap), (used), (want), sizeof *(array), "a grammar", \
                   (b)->err)

/* Counts steps, a nanosecond or a few each: what explodes does so in time before it does in memory. */
static dsv3_result dsv3__gram_work(dsv3__gram_build *b, uint64_t steps)
{
    b->work += steps;
    return b->work < DSV3__GRAM_WORK_MAX
               ? DSV3_OK
               : DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: takes more than %u steps to compile",
                            (uint64_t)DSV3__GRAM_WORK_MAX);
}

// ---- The schema's text -----------------------------------------------------------------------------------

static dsv3_result dsv3__gram_read_string(dsv3__gram_build *b, dsv3__json *j, dsv3__json_str s, dsv3__str *out)
{
    char *p = b->pool + b->n_pool;
    size_t n;
    if (!dsv3__json_decode(s, p, &n))
        return dsv3__json_fail(j, "half a surrogate pair in the string before"), j->result;
    out->p = p;
    out->n = n;
    b->n_pool += n;
    return DSV3_OK;
}

/* One value without what is in it. */
static dsv3_result dsv3__gram_read_value(dsv3__gram_build *b, dsv3__json *j, dsv3__gram_value *v)
{
    dsv3__json_str s;
    double number;
    int64_t integer;
    bool flag;
    char c = dsv3__json_peek(j);
    const char *begin = j->p;
    v->kind = c == 'f' || c == 't' || c == 'n' || c == '"' || c == '{' || c == '[' ? c : (char)0;
    if (c == '{' || c == '[') {
        dsv3__json_open(j, c);
    } else if (c == '"') {
        if (dsv3__json_string(j, &s))
            return dsv3__gram_read_string(b, j, s, &v->text);
    } else if (c == 't' || c == 'f') {
        dsv3__json_bool(j, &flag);
    } else if (c == 'n') {
        dsv3__json_null(j);
    } else {
        dsv3__json_number(j, &number, &integer, &flag);
    }
    v->text.p = begin;
    v->text.n = (size_t)(j->p - begin);
    return j->result;
}

/* The schema as values that point to each other. */
static dsv3_result dsv3__gram_read(dsv3__gram_build *b, const char *schema, size_t len)
{
    dsv3__json j;
    dsv3__json_str key = {"", 0, false};
    uint32_t parent = 0, last[DSV3__JSON_DEPTH + 1]; /* last: the one before, at each depth; 0: none */
    void *pool;
    dsv3__json_init(&j, schema, len, "schema", b->err);
    DSV3__TRY(dsv3__mem_alloc(&b->g->mem, &pool, len + 1, "a grammar", b->err));
    b->pool = (char *)pool;
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->values, b->cap_values, 0, 1));
    memset(b->values, 0, sizeof *b->values);
    b->n_values = 1;
    last[0] = 0;
    do {
        if (parent && (b->values[parent].kind == '{' ? !dsv3__json_key(&j, &key) : !dsv3__json_item(&j))) {
            parent = b->values[parent].parent;
            continue;
        }
        if (b->n_values == DSV3__GRAM_VALUES_MAX)
            return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: more than %u values",
                              (uint64_t)DSV3__GRAM_VALUES_MAX);
        DSV3__TRY(DSV3__GRAM_ROOM(b, b->values, b->cap_values, b->n_values, b->n_values + 1));
        uint32_t i = (uint32_t)b->n_values++, at = (uint32_t)j.depth;
        dsv3__gram_value *v = &b->values[i];
        memset(v, 0, sizeof *v);
        v->parent = parent;
        if (parent) {
            b->values[parent].n++;
            if (b->values[parent].kind == '{')
                DSV3__TRY(dsv3__gram_read_string(b, &j, key, &v->key));
            *(last[at] ? &b->values[last[at]].next : &b->values[parent].child) = i;
        }
        last[at] = i;
        DSV3__TRY(dsv3__gram_read_value(b, &j, v));
        if (v->kind == '{' || v->kind == '[')
            parent = i, last[at + 1] = 0;
    } while (parent && !j.result);
    return dsv3__json_end(&j);
}

static bool dsv3__gram_same(dsv3__str a, dsv3__str b)
{
    return a.n == b.n && memcmp(a.p, b.p, a.n) == 0;
}

static bool dsv3__gram_is(dsv3__str a, const char *literal)
{
    return a.n == strlen(literal) && memcmp(a.p, literal, a.n) == 0;
}

/* A member of an object (`value`: of that kind, 0 any); 0 if there is none. */
static uint32_t dsv3__gram_member(const dsv3__gram_build *b, uint32_t object, dsv3__str key)
{
    uint32_t i = b->values[object].kind == '{' ? b->values[object].child : 0;
    while (i && !dsv3__gram_same(b->values[i].key, key))
        i = b->values[i].next;
    return i;
}

static uint32_t dsv3__gram_find(const dsv3__gram_build *b, uint32_t object, const char *key)
{
    dsv3__str s;
    s.p = key;
    s.n = strlen(key);
    return dsv3__gram_member(b, object, s);
}

/* Where a value stands, as a JSON pointer; for messages, cut in front if it is long. */
static const char *dsv3__gram_where(const dsv3__gram_build *b, uint32_t value, char *out, size_t size)
{
    size_t at = size - 1;
    out[at] = 0;
    for (; value > 1; value = b->values[value].parent) {
        const dsv3__gram_value *v = &b->values[value];
        char number[24];
        dsv3__str step = v->key;
        if (b->values[v->parent].kind == '[') {
            uint64_t k = 0;
            for (uint32_t i = b->values[v->parent].child; i != value; i = b->values[i].next)
                k++;
            step.p = number;
            step.n = dsv3__format(number, sizeof number, "%u", k);
        }
        if (step.n + 1 > at)
            return out + at;
        at -= step.n + 1;
        out[at] = '/';
        memcpy(out + at + 1, step.p, step.n);
    }
    return at + 1 == size ? "the root" : out + at;
}

/* return DSV3__GRAM_REFUSE(b, value, "text"): what is wrong with this value, and where it stands. */
static dsv3_result dsv3__gram_refuse(const dsv3__gram_build *b, uint32_t value, const char *what, int line)
{
    char where[128];
    return dsv3__err_set(b->err, DSV3_ERROR_SCHEMA, line, 0, "schema: %s: %s",
                         dsv3__gram_where(b, value, where, sizeof where), what);
}
#define DSV3__GRAM_REFUSE(b, value, what) dsv3__gram_refuse((b), (value), (what), __LINE__)

// ---- Lists and states ------------------------------------------------------------------------------------

static uint64_t dsv3__gram_hash(const uint32_t *list, uint32_t n)
{
    uint64_t h = n;
    for (uint32_t i = 0; i < n; i++)
        h = (h ^ list[i]) * 0x9E3779B97F4A7C15ull, h ^= h >> 29;
    return h;
}

static void dsv3__gram_lists_clear(dsv3__gram_lists *l)
{
    l->n = l->n_items = 0;
    if (l->n_slots)
        memset(l->slots, 0, (size_t)l->n_slots * sizeof *l->slots);
}

/* The number of a list; *fresh: it is new. */
static dsv3_result dsv3__gram_intern(dsv3__gram_build *b, dsv3__gram_lists *l, const uint32_t *list, uint32_t n,
                                     uint32_t *index, bool *fresh)
{
    if (2 * l->n >= l->n_slots) { /* half full: twice as many */
        uint64_t cap = 0, want = l->n_slots ? 2 * l->n_slots : 64;
        uint32_t *slots = NULL;
        DSV3__TRY(DSV3__GRAM_ROOM(b, slots, cap, 0, want));
        memset(slots, 0, (size_t)want * sizeof *slots);
        for (uint32_t i = 0; i < l->n; i++) {
            uint64_t at = dsv3__gram_hash(l->items + l->spans[i].at, l->spans[i].n) & (want - 1);
            while (slots[at])
                at = (at + 1) & (want - 1);
            slots[at] = i + 1;
        }
        dsv3__mem_free(&b->g->mem, l->slots);
        l->slots = slots;
        l->n_slots = want;
    }
    uint64_t at = dsv3__gram_hash(list, n) & (l->n_slots - 1);
    for (; l->slots[at]; at = (at + 1) & (l->n_slots - 1)) {
        const dsv3__tok_span *s = &l->spans[l->slots[at] - 1];
        if (s->n == n && memcmp(l->items + s->at, list, n * sizeof *list) == 0)
            return *index = l->slots[at] - 1, *fresh = false, DSV3_OK;
    }
    DSV3__TRY(DSV3__GRAM_ROOM(b, l->spans, l->cap, l->n, l->n + 1));
    DSV3__TRY(DSV3__GRAM_ROOM(b, l->items, l->cap_items, l->n_items, l->n_items + n + 1));
    if (l->n_items + n > UINT32_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: too large");
    memcpy(l->items + l->n_items, list, n * sizeof *list);
    l->spans[l->n].at = (uint32_t)l->n_items;
    l->spans[l->n].n = n;
    l->n_items += n;
    *index = (uint32_t)l->n++;
    l->slots[at] = *index + 1;
    *fresh = true;
    return DSV3_OK;
}

/* A new state that leads nowhere. */
static dsv3_result dsv3__gram_state_new(dsv3__gram_build *b, uint32_t *state)
{
    dsv3_grammar *g = b->g;
    if (g->n_states == g->max_states)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: its strings, numbers and keys need more than %u states",
                          (uint64_t)g->max_states);
    uint64_t n = g->n_states * 256;
    DSV3__TRY(DSV3__GRAM_ROOM(b, g->next, g->cap_next, n, n + 256));
    DSV3__TRY(DSV3__GRAM_ROOM(b, g->info, g->cap_info, g->n_states, g->n_states + 1));
    memset(g->next + n, 0, 256 * sizeof *g->next);
    memset(&g->info[g->n_states], 0, sizeof *g->info);
    *state = (uint32_t)g->n_states++;
    return DSV3_OK;
}

/* States first ... end - 1, which lead to no others: ways that reach no end are taken out. *start becomes 0 if it
   has none. */
static dsv3_result dsv3__gram_trim(dsv3__gram_build *b, uint32_t first, uint32_t end, uint32_t *start)
{
    dsv3_grammar *g = b->g;
    bool dead = false;
    for (uint32_t s = first; s < end; s++) /* `final`, meanwhile: an end can be reached */
        g->info[s].final = g->info[s].label != 0;
    for (bool again = true; again;) {
        again = false;
        DSV3__TRY(dsv3__gram_work(b, (uint64_t)(end - first) * 256));
        for (uint32_t s = end; s-- > first;) {
            const uint16_t *row = g->next + (size_t)s * 256;
            for (int c = 0; c < 256 && !g->info[s].final; c++)
                if (row[c] && g->info[row[c]].final)
                    g->info[s].final = 1, again = true;
        }
    }
    if (!g->info[*start].final)
        *start = 0;
    for (uint32_t s = first; s < end; s++)
        dead = dead || !g->info[s].final;
    for (uint32_t s = first; s < end && dead; s++) {
        uint16_t *row = g->next + (size_t)s * 256;
        for (int c = 0; c < 256; c++)
            if (row[c] && !g->info[row[c]].final)
                row[c] = 0;
    }
    for (uint32_t s = first; s < end; s++) {
        const uint16_t *row = g->next + (size_t)s * 256;
        g->info[s].final = g->info[s].label != 0;
        for (int c = 0; c < 256 && g->info[s].final; c++)
            g->info[s].final = row[c] == 0;
    }
    return DSV3_OK;
}

/* A character as it is spelled within a string, at most 6 bytes. Its only spelling: that of json.dumps with
   ensure_ascii=False. */
static size_t dsv3__gram_spell(uint32_t c, char *out)
{
    const char *shorts = "\b\t\n\f\r\"\\", *letters = "btnfr\"\\", *at = c && c < 128 ? strchr(shorts, (int)c) : NULL;
    out[0] = '\\';
    if (at)
        return out[1] = letters[at - shorts], 2;
    if (c < 0x20) {
        memcpy(out + 1, "u00", 3);
        out[4] = (char)('0' + (c >> 4));
        out[5] = "0123456789abcdef"[c & 15];
        return 6;
    }
    return dsv3__utf8_put(out, c);
}

/* The character at p, well-formed UTF-8. */
static uint32_t dsv3__gram_char(const char *p, size_t n)
{
    uint32_t c = (unsigned char)p[0];
    c = n == 1 ? c : n == 2 ? c & 31 : n == 3 ? c & 15 : c & 7;
    for (size_t i = 1; i < n; i++)
        c = c << 6 | ((unsigned char)p[i] & 63);
    return c;
}

/* Adds a way for one more byte. */
static dsv3_result dsv3__gram_literal_byte(dsv3__gram_build *b, uint32_t *state, char c)
{
    size_t at = (size_t)*state * 256 + (unsigned char)c;
    uint32_t fresh = b->g->next[at];
    if (!fresh) {
        DSV3__TRY(dsv3__gram_state_new(b, &fresh));
        b->g->next[at] = (uint16_t)fresh;
    }
    *state = fresh;
    return DSV3_OK;
}

/* Adds a way for these bytes, from *state to *state; quoted: spelled as a string. */
static dsv3_result dsv3__gram_literal(dsv3__gram_build *b, uint32_t *state, dsv3__str text, bool quoted)
{
    if (quoted)
        DSV3__TRY(dsv3__gram_literal_byte(b, state, '"'));
    for (size_t i = 0, step; i < text.n; i += step) {
        char spelled[6];
        size_t n = 1;
        spelled[0] = text.p[i];
        step = quoted ? dsv3__utf8_length(text.p + i, text.p + text.n) : 1;
        if (quoted)
            n = dsv3__gram_spell(dsv3__gram_char(text.p + i, step), spelled);
        for (size_t k = 0; k < n; k++)
            DSV3__TRY(dsv3__gram_literal_byte(b, state, spelled[k]));
    }
    return quoted ? dsv3__gram_literal_byte(b, state, '"') : DSV3_OK;
}

// ---- Patterns --------------------------------------------------------------------------------------------

typedef struct dsv3__gram_ranges {
    uint32_t n, lo[DSV3__GRAM_RANGES_MAX], hi[DSV3__GRAM_RANGES_MAX];
} dsv3__gram_ranges;

/* A piece of a pattern: places first ... of which begin and end; the end leads nowhere yet. */
typedef struct dsv3__gram_piece {
    uint32_t first, begin, end;
} dsv3__gram_piece;

typedef struct dsv3__gram_group {
    uint32_t first, begin, fork, tail, end;
} dsv3__gram_group;

typedef struct dsv3__gram_regex {
    dsv3__gram_build *b;
    uint32_t value; /* the pattern, for messages */
    const char *p, *end;
} dsv3__gram_regex;

static dsv3_result dsv3__gram_place_new(dsv3__gram_regex *r, uint8_t kind, uint32_t a, uint32_t second, uint32_t *place)
{
    dsv3__gram_build *b = r->b;
    if (b->n_places == DSV3__GRAM_PLACES_MAX)
        return DSV3__GRAM_REFUSE(b, r->value, "a pattern that is too large");
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->places, b->cap_places, b->n_places, b->n_places + 1));
    dsv3__gram_place *p = &b->places[b->n_places];
    memset(p, 0, sizeof *p);
    p->kind = kind;
    p->a = a;
    p->b = second;
    *place = (uint32_t)b->n_places++;
    return DSV3_OK;
}

/* Bytes lo[i] ... hi[i], i < n, in front of place `to`; one more way out of `*fork`. */
static dsv3_result dsv3__gram_chain(dsv3__gram_regex *r, const uint8_t *lo, const uint8_t *hi, size_t n, uint32_t to,
                                    uint32_t *fork)
{
    uint32_t at = to, fresh;
    while (n--) {
        DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_BYTES, at, 0, &at));
        r->b->places[at].lo = lo[n];
        r->b->places[at].hi = hi[n];
    }
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, at, 0, &fresh));
    r->b->places[*fork].b = fresh;
    *fork = fresh;
    return DSV3_OK;
}

/* Characters lo ... hi, all of 0x20 and more and spelled as they are: cut into blocks whose bytes are independent. */
static dsv3_result dsv3__gram_chain_plain(dsv3__gram_regex *r, uint32_t lo, uint32_t hi, uint32_t to, uint32_t *fork)
{
    static const uint32_t borders[] = {0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF, 0x10FFFF};
    while (lo <= hi) {
        uint32_t top = hi;
        char a[4], z[4];
        for (size_t i = DSV3__COUNT(borders); i-- > 0;)
            if (lo <= borders[i] && borders[i] < top)
                top = borders[i];
        for (uint32_t bits = 18; bits >= 6; bits -= 6) { /* a block starts at a multiple of its size, or is one lead */
            uint32_t m = ((uint32_t)1 << bits) - 1;
            if ((lo & ~m) == (top & ~m) || lo < 0x80)
                continue;
            if ((lo & m) && (lo | m) < top)
                top = lo | m;
            else if (!(lo & m) && (top & m) != m)
                top = (top & ~m) - 1;
        }
        size_t n = dsv3__utf8_put(a, lo);
        dsv3__utf8_put(z, top);
        if (lo < 0xD800 || lo > 0xDFFF)
            DSV3__TRY(dsv3__gram_chain(r, (const uint8_t *)a, (const uint8_t *)z, n, to, fork));
        lo = top + 1;
    }
    return DSV3_OK;
}

/* A piece for one character of the ranges, which are in order and apart. */
static dsv3_result dsv3__gram_class(dsv3__gram_regex *r, const dsv3__gram_ranges *set, dsv3__gram_piece *piece)
{
    uint32_t fork;
    piece->first = (uint32_t)r->b->n_places;
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &piece->end));
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &piece->begin));
    fork = piece->begin;
    for (uint32_t i = 0; i < set->n; i++) {
        uint32_t lo = set->lo[i];
        while (lo <= set->hi[i]) { /* to the next character that is escaped */
            uint32_t hi = lo;
            char spelled[6], last[6], more[6];
            size_t n = dsv3__gram_spell(lo, spelled);
            if (spelled[0] == '\\') { /* \u0000 to \u0007 and such go together */
                memcpy(last, spelled, n);
                while (n == 6 && hi < set->hi[i] && dsv3__gram_spell(hi + 1, more) == 6 && more[4] == last[4] &&
                       more[5] == last[5] + 1)
                    hi++, last[5]++;
                DSV3__TRY(dsv3__gram_chain(r, (const uint8_t *)spelled, (const uint8_t *)last, n, piece->end, &fork));
            } else {
                while (hi < set->hi[i] && hi + 1 != '"' && hi + 1 != '\\')
                    hi = hi < '\\' ? hi + 1 : set->hi[i];
                DSV3__TRY(dsv3__gram_chain_plain(r, lo, hi, piece->end, &fork));
            }
            lo = hi + 1;
        }
    }
    return DSV3_OK;
}

static bool dsv3__gram_range_add(dsv3__gram_ranges *set, uint32_t lo, uint32_t hi)
{
    if (set->n == DSV3__GRAM_RANGES_MAX)
        return false;
    set->lo[set->n] = lo;
    set->hi[set->n++] = hi;
    return true;
}

/* In order, apart; `negate`: all other characters. */
static bool dsv3__gram_ranges_settle(dsv3__gram_ranges *set, bool negate)
{
    dsv3__gram_ranges out;
    uint32_t next = 0;
    out.n = 0;
    for (uint32_t i = 1; i < set->n; i++)
        for (uint32_t k = i; k > 0 && set->lo[k] < set->lo[k - 1]; k--) {
            uint32_t lo = set->lo[k], hi = set->hi[k];
            set->lo[k] = set->lo[k - 1], set->hi[k] = set->hi[k - 1];
            set->lo[k - 1] = lo, set->hi[k - 1] = hi;
        }
    for (uint32_t i = 0; i < set->n; i++) {
        uint32_t lo = set->lo[i] > next ? set->lo[i] : next;
        if (negate && set->lo[i] > next && !dsv3__gram_range_add(&out, next, set->lo[i] - 1))
            return false;
        if (!negate && lo <= set->hi[i] && !dsv3__gram_range_add(&out, lo, set->hi[i]))
            return false;
        next = set->hi[i] + 1 > next ? set->hi[i] + 1 : next;
    }
    if (negate && next <= 0x10FFFF && !dsv3__gram_range_add(&out, next, 0x10FFFF))
        return false;
    *set = out;
    return true;
}

/* \d \w \s and their opposites, added to the set; false: none of them, or too many. */
static bool dsv3__gram_escape_class(dsv3__gram_ranges *set, char c)
{
    static const uint32_t digit[] = {'0', '9'}, word[] = {'0', '9', 'A', 'Z', '_', '_', 'a', 'z'},
                          space[] = {9,      13,     0x20,   0x20,   0xA0,   0xA0,   0x1680, 0x1680, 0x2000, 0x200A,
                                     0x2028, 0x2029, 0x202F, 0x202F, 0x205F, 0x205F, 0x3000, 0x3000, 0xFEFF, 0xFEFF};
    char lower = (char)(c | 0x20);
    const uint32_t *list = lower == 'd' ? digit : lower == 'w' ? word : space;
    size_t n = lower == 'd' ? DSV3__COUNT(digit) : lower == 'w' ? DSV3__COUNT(word) : DSV3__COUNT(space);
    dsv3__gram_ranges own;
    own.n = 0;
    if (lower != 'd' && lower != 'w' && lower != 's')
        return false;
    for (size_t i = 0; i < n; i += 2)
        dsv3__gram_range_add(&own, list[i], list[i + 1]);
    dsv3__gram_ranges_settle(&own, c != lower);
    for (uint32_t i = 0; i < own.n; i++)
        if (!dsv3__gram_range_add(set, own.lo[i], own.hi[i]))
            return false;
    return true;
}

/* Hexadecimal digits; -1: not as many. */
static int64_t dsv3__gram_hex(dsv3__gram_regex *r, size_t n)
{
    int64_t v = 0;
    for (; n--; r->p++) {
        int c = r->p < r->end ? (unsigned char)*r->p | 0x20 : 0;
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0)
            return -1;
        v = v * 16 + digit;
    }
    return v;
}

/* The character that stands behind a backslash, r->p on it. */
static dsv3_result dsv3__gram_escape(dsv3__gram_regex *r, uint32_t *c)
{
    const char *from = "nrtfv0", *to = "\n\r\t\f\v";
    char e = *r->p++;
    const char *at = e ? strchr(from, e) : NULL;
    int64_t v = -1;
    if (at && e != '0') {
        v = to[at - from];
    } else if (e == '0' && (r->p == r->end || *r->p < '0' || *r->p > '9')) {
        v = 0;
    } else if (e == 'x') {
        v = dsv3__gram_hex(r, 2);
    } else if (e == 'c' && r->p < r->end && ((*r->p | 0x20) >= 'a' && (*r->p | 0x20) <= 'z')) {
        v = *r->p++ & 31;
    } else if (e == 'u' && r->p < r->end && *r->p == '{') {
        const char *close = (const char *)memchr(r->p, '}', (size_t)(r->end - r->p));
        size_t n = close ? (size_t)(close - r->p - 1) : 0;
        r->p++;
        v = n >= 1 && n <= 6 ? dsv3__gram_hex(r, n) : -1;
        r->p++;
    } else if (e == 'u') {
        v = dsv3__gram_hex(r, 4);
        if (v >= 0xD800 && v <= 0xDBFF && r->end - r->p >= 6 && r->p[0] == '\\' && r->p[1] == 'u') {
            r->p += 2;
            int64_t low = dsv3__gram_hex(r, 4);
            v = low >= 0xDC00 && low <= 0xDFFF ? 0x10000 + ((v - 0xD800) << 10) + (low - 0xDC00) : -1;
        }
    } else if (e && strchr("^$\\.*+?()[]{}|/-\"'`!#%&,:;<=>@_~ ", e)) {
        v = (unsigned char)e;
    }
    if (v < 0 || v > 0x10FFFF || (v >= 0xD800 && v <= 0xDFFF))
        return DSV3__GRAM_REFUSE(r->b, r->value,
                                 "a pattern with an escape that is none here (\\b, \\p, back references are not)");
    *c = (uint32_t)v;
    return DSV3_OK;
}

static dsv3_result dsv3__gram_regex_char(dsv3__gram_regex *r, uint32_t *c)
{
    size_t n = dsv3__utf8_length(r->p, r->end);
    if (*r->p == '\\') {
        if (++r->p == r->end)
            return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern that ends in a backslash");
        return dsv3__gram_escape(r, c);
    }
    *c = dsv3__gram_char(r->p, n);
    r->p += n;
    return DSV3_OK;
}

/* [...], r->p behind the bracket. */
static dsv3_result dsv3__gram_bracket(dsv3__gram_regex *r, dsv3__gram_ranges *set)
{
    bool negate = r->p < r->end && *r->p == '^', room = true;
    set->n = 0;
    r->p += negate;
    while (r->p < r->end && *r->p != ']') {
        uint32_t lo, hi;
        bool escape = *r->p == '\\' && r->end - r->p > 1;
        if (escape && strchr("dDwWsS", r->p[1]) && r->p[1]) {
            room = room && dsv3__gram_escape_class(set, r->p[1]);
            r->p += 2;
            continue;
        }
        if (escape && r->p[1] == 'b') { /* in brackets, backspace */
            lo = '\b';
            r->p += 2;
        } else {
            DSV3__TRY(dsv3__gram_regex_char(r, &lo));
        }
        hi = lo;
        if (r->end - r->p >= 2 && r->p[0] == '-' && r->p[1] != ']') {
            r->p++;
            if (*r->p == '\\' && r->end - r->p > 1 && r->p[1] && strchr("dDwWsS", r->p[1]))
                return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with a class as the end of a range");
            DSV3__TRY(dsv3__gram_regex_char(r, &hi));
        }
        if (hi < lo)
            return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with a range that runs backwards");
        room = room && dsv3__gram_range_add(set, lo, hi);
    }
    if (r->p == r->end)
        return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with a bracket that is not closed");
    r->p++;
    if (!room || !dsv3__gram_ranges_settle(set, negate))
        return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with too many ranges in one class");
    return DSV3_OK;
}

/* * + ? {m,n} at r->p, if there is one: *min and *max (NO_MAX: none). A `{` that is no quantifier is refused: dialects
   differ. */
static dsv3_result dsv3__gram_quantifier(dsv3__gram_regex *r, uint32_t *min, uint32_t *max)
{
    char c = r->p < r->end ? *r->p : (char)0;
    *min = *max = 1;
    if (!c || !strchr("*+?{", c))
        return DSV3_OK;
    r->p++;
    if (c != '{') {
        *min = c == '+';
        *max = c == '?' ? 1 : DSV3__GRAM_NO_MAX;
    } else {
        uint32_t *out = min;
        bool any[2] = {false, false};
        int k = 0;
        *min = *max = 0;
        for (; r->p < r->end && *r->p != '}'; r->p++) {
            if (*r->p == ',' && k == 0) {
                k = 1;
                out = max;
                continue;
            }
            if (*r->p < '0' || *r->p > '9' || *out > DSV3__GRAM_REPEAT_MAX)
                break;
            *out = *out * 10 + (uint32_t)(*r->p - '0');
            any[k] = true;
        }
        if (r->p == r->end || *r->p != '}' || !any[0] || *min > DSV3__GRAM_REPEAT_MAX || *max > DSV3__GRAM_REPEAT_MAX ||
            (any[1] && *max < *min))
            return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with {m,n} that is none, or above 1000");
        r->p++;
        *max = k == 0 ? *min : any[1] ? *max : DSV3__GRAM_NO_MAX;
    }
    if (r->p < r->end && *r->p == '?') /* lazy: the same texts */
        r->p++;
    return DSV3_OK;
}

/* Another piece like this one, which must not be tied to anything yet. */
static dsv3_result dsv3__gram_copy(dsv3__gram_regex *r, const dsv3__gram_piece *piece, uint32_t last,
                                   dsv3__gram_piece *out)
{
    uint32_t shift = (uint32_t)r->b->n_places - piece->first, place;
    for (uint32_t i = piece->first; i < last; i++) {
        dsv3__gram_place p = r->b->places[i];
        DSV3__TRY(dsv3__gram_place_new(r, p.kind, p.a ? p.a + shift : 0, p.b ? p.b + shift : 0, &place));
        r->b->places[place].lo = p.lo;
        r->b->places[place].hi = p.hi;
    }
    out->first = piece->first + shift;
    out->begin = piece->begin + shift;
    out->end = piece->end + shift;
    return DSV3_OK;
}

/* The piece min to max times. */
static dsv3_result dsv3__gram_repeat(dsv3__gram_regex *r, dsv3__gram_piece *piece, uint32_t min, uint32_t max)
{
    const uint32_t last = (uint32_t)r->b->n_places, n = max != DSV3__GRAM_NO_MAX ? max : min ? min : 1;
    dsv3__gram_piece one = *piece;
    uint32_t begin, tail, out;
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &out));
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &begin));
    tail = begin;
    for (uint32_t i = 0; i < n; i++) { /* the first is tied last: the others are copies of it */
        if (i + 1 < n)
            DSV3__TRY(dsv3__gram_copy(r, piece, last, &one));
        else
            one = *piece;
        if (i >= min)
            r->b->places[tail].b = out;
        r->b->places[tail].a = one.begin;
        tail = one.end;
        if (max == DSV3__GRAM_NO_MAX && i + 1 == n) { /* and again */
            uint32_t loop;
            DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, one.begin, 0, &loop));
            r->b->places[tail].b = loop;
        }
    }
    r->b->places[tail].a = out;
    piece->begin = begin;
    piece->end = out;
    return DSV3_OK;
}

static dsv3_result dsv3__gram_group_open(dsv3__gram_regex *r, dsv3__gram_group *group)
{
    group->first = (uint32_t)r->b->n_places;
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &group->end));
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &group->tail));
    DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, group->tail, 0, &group->begin));
    group->fork = group->begin;
    return DSV3_OK;
}

/* What stands behind `(`: nothing, `?:` or a name. */
static dsv3_result dsv3__gram_group_kind(dsv3__gram_regex *r)
{
    if (r->p == r->end || *r->p != '?')
        return DSV3_OK;
    if (r->end - r->p >= 2 && r->p[1] == ':')
        return r->p += 2, DSV3_OK;
    const char *close = (const char *)memchr(r->p, '>', (size_t)(r->end - r->p));
    if (r->end - r->p >= 3 && r->p[1] == '<' && r->p[2] != '=' && r->p[2] != '!' && close)
        return r->p = close + 1, DSV3_OK;
    return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern that looks ahead or behind");
}

/* One character or class at r->p. */
static dsv3_result dsv3__gram_regex_class(dsv3__gram_regex *r, dsv3__gram_ranges *set)
{
    uint32_t c;
    set->n = 0;
    if (*r->p == '.') {
        dsv3__gram_range_add(set, '\n', '\n');
        dsv3__gram_range_add(set, '\r', '\r');
        dsv3__gram_range_add(set, 0x2028, 0x2029);
        dsv3__gram_ranges_settle(set, true);
        return r->p++, DSV3_OK;
    }
    if (*r->p == '[')
        return r->p++, dsv3__gram_bracket(r, set);
    if (*r->p == '\\' && r->end - r->p > 1 && dsv3__gram_escape_class(set, r->p[1]))
        return dsv3__gram_ranges_settle(set, false), r->p += 2, DSV3_OK;
    if (strchr("*+?{}]", *r->p) && *r->p)
        return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with * + ? { } or ] where none can be");
    DSV3__TRY(dsv3__gram_regex_char(r, &c));
    dsv3__gram_range_add(set, c, c);
    return DSV3_OK;
}

/* The whole pattern as one piece. */
static dsv3_result dsv3__gram_regex_parse(dsv3__gram_regex *r, dsv3__gram_piece *whole)
{
    dsv3__gram_group groups[DSV3__GRAM_GROUPS_MAX], *g = groups;
    DSV3__TRY(dsv3__gram_group_open(r, g));
    while (r->p < r->end || g > groups) {
        dsv3__gram_piece piece;
        uint32_t min, max;
        char c = r->p < r->end ? *r->p : (char)0;
        if (r->p == r->end || (c == ')' && g == groups))
            return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with parentheses that do not match");
        if (c == '(') {
            r->p++;
            if (++g == groups + DSV3__GRAM_GROUPS_MAX)
                return DSV3__GRAM_REFUSE(r->b, r->value, "a pattern with more than 31 parentheses in each other");
            DSV3__TRY(dsv3__gram_group_kind(r));
            DSV3__TRY(dsv3__gram_group_open(r, g));
            continue;
        }
        if (c == '|') {
            uint32_t tail, fork;
            r->p++;
            r->b->places[g->tail].a = g->end;
            DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &tail));
            DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, tail, 0, &fork));
            r->b->places[g->fork].b = fork;
            g->fork = fork;
            g->tail = tail;
            continue;
        }
        if (c == '^' || c == '$') {
            r->p++;
            piece.first = (uint32_t)r->b->n_places;
            DSV3__TRY(dsv3__gram_place_new(r, DSV3__GRAM_EMPTY, 0, 0, &piece.end));
            DSV3__TRY(dsv3__gram_place_new(r, (uint8_t)(c == '^' ? DSV3__GRAM_BEGIN : DSV3__GRAM_END), piece.end, 0,
                                           &piece.begin));
        } else if (c == ')') {
            r->p++;
            r->b->places[g->tail].a = g->end;
            piece.first = g->first;
            piece.begin = g->begin;
            piece.end = g->end;
            g--;
        } else {
            dsv3__gram_ranges set;
            DSV3__TRY(dsv3__gram_regex_class(r, &set));
            DSV3__TRY(dsv3__gram_class(r, &set, &piece));
        }
        DSV3__TRY(dsv3__gram_quantifier(r, &min, &max));
        if (min != 1 || max != 1)
            DSV3__TRY(dsv3__gram_repeat(r, &piece, min, max));
        r->b->places[g->tail].a = piece.begin;
        g->tail = piece.end;
    }
    r->b->places[g->tail].a = g->end;
    whole->begin = g->begin;
    whole->end = g->end;
    return DSV3_OK;
}

/* b->set [*n]: places, in order, that are reached from b->walk [n_walk] without a byte. What leads on by itself is left
   out; the places that wait for bytes or for the end, and `match`, stay. */
static dsv3_result dsv3__gram_closure(dsv3__gram_build *b, uint32_t n_walk, bool at_begin, bool at_end, uint32_t match,
                                      uint32_t *n)
{
    uint32_t n_seen = 0;
    uint64_t moves = 0;
    *n = 0;
    while (n_walk) {
        uint32_t at = b->walk[--n_walk];
        dsv3__gram_place *p = &b->places[at];
        if (!at || p->seen)
            continue;
        p->seen = true;
        b->reach[n_seen++] = at;
        if (p->kind == DSV3__GRAM_BYTES || p->kind == DSV3__GRAM_END || at == match)
            b->set[(*n)++] = at;
        if (p->kind == DSV3__GRAM_EMPTY || (p->kind == DSV3__GRAM_BEGIN && at_begin) ||
            (p->kind == DSV3__GRAM_END && at_end))
            b->walk[n_walk++] = p->b, b->walk[n_walk++] = p->a; /* a first: so they come nearly in order */
    }
    for (uint32_t i = 0; i < n_seen; i++)
        b->places[b->reach[i]].seen = false;
    for (uint32_t gap = *n > 32 ? *n / 4 : 1; gap; gap = gap > 4 ? gap / 4 : gap > 1 ? 1 : 0)
        for (uint32_t i = gap; i < *n; i++)
            for (uint32_t k = i; k >= gap && b->set[k] < b->set[k - gap]; k -= gap, moves++) {
                uint32_t t = b->set[k];
                b->set[k] = b->set[k - gap];
                b->set[k - gap] = t;
            }
    return dsv3__gram_work(b, moves + 8 * n_seen + 64);
}

/* The set that the places b->walk [n_walk] are and lead on to, a new one with a state of its own. Most bytes lead where
   others did: that is looked up. */
static dsv3_result dsv3__gram_goal(dsv3__gram_build *b, uint32_t n_walk, uint32_t match, uint32_t *set)
{
    uint32_t goal, n, state;
    bool fresh;
    DSV3__TRY(dsv3__gram_intern(b, &b->goals, b->walk, n_walk, &goal, &fresh));
    if (!fresh)
        return *set = b->goal_sets[goal], dsv3__gram_work(b, n_walk);
    DSV3__TRY(dsv3__gram_work(b, 8 * n_walk));
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->goal_sets, b->cap_goal_sets, goal, goal + 1));
    DSV3__TRY(dsv3__gram_closure(b, n_walk, false, false, match, &n));
    DSV3__TRY(dsv3__gram_intern(b, &b->lists, b->set, n, set, &fresh));
    b->goal_sets[goal] = *set;
    return fresh ? dsv3__gram_state_new(b, &state) : DSV3_OK;
}

/* Fills the row of the state for list `index`: bytes are cut where a range of one of its places begins or ends. */
static dsv3_result dsv3__gram_pattern_row(dsv3__gram_build *b, uint32_t index, uint32_t state, uint32_t first,
                                          uint32_t done, uint32_t match)
{
    bool cut[257];
    uint32_t n;
    dsv3__tok_span span = b->lists.spans[index];
    memset(cut, 0, sizeof cut);
    for (uint32_t i = 0; i < span.n; i++) {
        const dsv3__gram_place *p = &b->places[b->lists.items[span.at + i]];
        if (p->kind == DSV3__GRAM_BYTES)
            cut[p->lo] = cut[p->hi + 1] = true;
    }
    for (uint32_t c = 0, end; c < 256; c = end) {
        uint32_t n_walk = 0, target;
        for (end = c + 1; end < 256 && !cut[end];)
            end++;
        for (uint32_t i = 0; i < span.n; i++) {
            const dsv3__gram_place *p = &b->places[b->lists.items[span.at + i]];
            if (p->kind == DSV3__GRAM_BYTES && p->lo <= c && c <= p->hi)
                b->walk[n_walk++] = p->a;
        }
        DSV3__TRY(dsv3__gram_work(b, span.n));
        if (!n_walk)
            continue;
        DSV3__TRY(dsv3__gram_goal(b, n_walk, match, &target));
        for (uint32_t k = c; k < end; k++)
            b->g->next[(size_t)state * 256 + k] = (uint16_t)(first + target);
    }
    memcpy(b->walk, b->lists.items + span.at, span.n * sizeof *b->walk);
    DSV3__TRY(dsv3__gram_closure(b, span.n, false, true, match, &n));
    for (uint32_t i = 0; i < n; i++)
        if (b->set[i] == match)
            b->g->next[(size_t)state * 256 + '"'] = (uint16_t)done;
    return DSV3_OK;
}

/* Automaton of the strings, with quotes, in which the pattern is found somewhere. */
static dsv3_result dsv3__gram_pattern(dsv3__gram_build *b, dsv3__str pattern, uint32_t value, uint32_t *start)
{
    dsv3__gram_regex r;
    dsv3__gram_piece whole = {0, 0, 0}, before, behind;
    dsv3__gram_ranges any;
    uint32_t done, first, n, index, zero;
    bool fresh;
    r.b = b;
    r.value = value;
    r.p = pattern.p;
    r.end = pattern.p + pattern.n;
    b->n_places = 0;
    any.n = 0;
    dsv3__gram_range_add(&any, 0, 0x10FFFF);
    DSV3__TRY(dsv3__gram_place_new(&r, DSV3__GRAM_EMPTY, 0, 0, &zero)); /* number 0 is none */
    DSV3__TRY(dsv3__gram_class(&r, &any, &before));
    DSV3__TRY(dsv3__gram_repeat(&r, &before, 0, DSV3__GRAM_NO_MAX));
    DSV3__TRY(dsv3__gram_regex_parse(&r, &whole));
    DSV3__TRY(dsv3__gram_class(&r, &any, &behind));
    DSV3__TRY(dsv3__gram_repeat(&r, &behind, 0, DSV3__GRAM_NO_MAX));
    b->places[before.end].a = whole.begin;
    b->places[whole.end].a = behind.begin;
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->walk, b->cap_walk, 0, 3 * b->n_places + 2));
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->reach, b->cap_reach, 0, b->n_places));
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->set, b->cap_set, 0, b->n_places));
    DSV3__TRY(dsv3__gram_state_new(b, start));
    DSV3__TRY(dsv3__gram_state_new(b, &done));
    b->g->info[done].label = 1;
    dsv3__gram_lists_clear(&b->lists);
    dsv3__gram_lists_clear(&b->goals);
    b->walk[0] = before.begin;
    DSV3__TRY(dsv3__gram_closure(b, 1, true, false, behind.end, &n));
    DSV3__TRY(dsv3__gram_intern(b, &b->lists, b->set, n, &index, &fresh));
    DSV3__TRY(dsv3__gram_state_new(b, &first));
    b->g->next[(size_t)*start * 256 + '"'] = (uint16_t)first;
    for (uint32_t i = 0; i < b->lists.n; i++)
        DSV3__TRY(dsv3__gram_pattern_row(b, i, first + i, first, done, behind.end));
    DSV3__TRY(dsv3__gram_trim(b, *start, (uint32_t)b->g->n_states, start));
    return DSV3_OK;
}

// ---- Numbers ---------------------------------------------------------------------------------------------

/* 0.d0 d1 ... * 10^point, without zeros at either end; zero has no digits. */
typedef struct dsv3__gram_decimal {
    bool negative;
    int32_t n, point;
    uint8_t digits[DSV3__GRAM_DIGITS_MAX];
} dsv3__gram_decimal;

typedef struct dsv3__gram_bound {
    bool given, open; /* open: the bound itself is outside */
    dsv3__gram_decimal at;
} dsv3__gram_bound;

typedef struct dsv3__gram_numbers {
    bool integer;
    dsv3__gram_bound min, max;
    uint32_t multiple; /* 0: of anything */
    uint32_t fraction; /* digits behind the point, at most */
} dsv3__gram_numbers;

/* False: more digits than a bound may have. */
static bool dsv3__gram_decimal_read(dsv3__str text, dsv3__gram_decimal *d)
{
    bool fraction = false, minus = false;
    int32_t exponent = 0;
    size_t i = 0;
    memset(d, 0, sizeof *d);
    for (; i < text.n && text.p[i] != 'e' && text.p[i] != 'E'; i++) {
        char c = text.p[i];
        d->negative = d->negative || c == '-';
        fraction = fraction || c == '.';
        if (c < '0' || c > '9')
            continue;
        if (d->n == 0 && c == '0') {
            d->point -= fraction;
            continue;
        }
        if (d->n < DSV3__GRAM_DIGITS_MAX)
            d->digits[d->n++] = (uint8_t)(c - '0');
        else if (c != '0')
            return false;
        d->point += !fraction;
    }
    for (i++; i < text.n; i++) {
        minus = minus || text.p[i] == '-';
        if (text.p[i] >= '0' && text.p[i] <= '9' && exponent < 100000)
            exponent = exponent * 10 + (text.p[i] - '0');
    }
    while (d->n && d->digits[d->n - 1] == 0)
        d->n--;
    d->point = d->n ? d->point + (minus ? -exponent : exponent) : 0;
    d->negative = d->negative && d->n;
    return d->point > -400 && d->point < 400;
}

static bool dsv3__gram_decimal_whole(const dsv3__gram_decimal *d)
{
    return d->point >= d->n;
}

/* The sign of (a number with this sign and a magnitude that is m < 0, 0, > 0 beside the bound's) - bound. */
static int dsv3__gram_order(const dsv3__gram_decimal *bound, bool negative, int m)
{
    if (bound->n == 0)
        return m == 0 ? 0 : negative ? -1 : 1;
    if (negative != bound->negative)
        return negative ? -1 : 1;
    return negative ? -m : m;
}

static int dsv3__gram_compare(const dsv3__gram_decimal *a, const dsv3__gram_decimal *b)
{
    int m = a->n == 0 || b->n == 0 ? (a->n != 0) - (b->n != 0) : (a->point > b->point) - (a->point < b->point);
    for (int32_t i = 0; m == 0 && i < DSV3__GRAM_DIGITS_MAX; i++)
        m = (i < a->n ? a->digits[i] : 0) - (i < b->n ? b->digits[i] : 0);
    return dsv3__gram_order(b, a->negative, m);
}

/* Where the automaton of a number is: what has been read, how many digits of this part, and how they compare with the
   bounds' so far (0 less, 1 equal, 2 more). */
enum {
    DSV3__GRAM_NUM_START,
    DSV3__GRAM_NUM_MINUS,
    DSV3__GRAM_NUM_ZERO,
    DSV3__GRAM_NUM_INT,
    DSV3__GRAM_NUM_POINT,
    DSV3__GRAM_NUM_FRACTION,
    DSV3__GRAM_NUM_E,
    DSV3__GRAM_NUM_E_SIGN,
    DSV3__GRAM_NUM_E_1,
    DSV3__GRAM_NUM_E_2
};

typedef struct dsv3__gram_num {
    uint32_t phase, negative, k, min, max, rest; /* rest: of the division by `multiple` */
} dsv3__gram_num;

static uint32_t dsv3__gram_num_digit(const dsv3__gram_bound *bound, uint32_t so_far, uint32_t digit, int32_t index)
{
    uint32_t want = index >= 0 && index < bound->at.n ? bound->at.digits[index] : 0;
    return !bound->given || so_far != 1 ? so_far : digit < want ? 0 : digit > want ? 2 : 1;
}

/* At the point: the number of digits decides first. */
static uint32_t dsv3__gram_num_int(const dsv3__gram_bound *bound, uint32_t so_far, uint32_t k)
{
    uint32_t digits = bound->at.point > 0 ? (uint32_t)bound->at.point : 0;
    return !bound->given ? 1 : k > digits ? 2 : k < digits ? 0 : so_far;
}

/* May the number end here, as far as this bound goes? The sign of number - bound. */
static int dsv3__gram_num_order(const dsv3__gram_bound *bound, uint32_t so_far, const dsv3__gram_num *s)
{
    bool fraction = s->phase == DSV3__GRAM_NUM_FRACTION;
    int32_t used = fraction ? bound->at.point + (int32_t)s->k : bound->at.point > 0 ? bound->at.point : 0;
    int m = (int)(fraction ? so_far : dsv3__gram_num_int(bound, so_far, s->k)) - 1;
    if (m == 0 && bound->at.n > used) /* digits of the bound are left */
        m = -1;
    return dsv3__gram_order(&bound->at, s->negative != 0, m);
}

static bool dsv3__gram_num_ends(const dsv3__gram_numbers *n, const dsv3__gram_num *s)
{
    if (s->phase == DSV3__GRAM_NUM_E_1 || s->phase == DSV3__GRAM_NUM_E_2)
        return true;
    if (s->phase != DSV3__GRAM_NUM_ZERO && s->phase != DSV3__GRAM_NUM_INT && s->phase != DSV3__GRAM_NUM_FRACTION)
        return false;
    int low = n->min.given ? dsv3__gram_num_order(&n->min, s->min, s) : 1;
    int high = n->max.given ? dsv3__gram_num_order(&n->max, s->max, s) : -1;
    return (low > 0 || (low == 0 && !n->min.open)) && (high < 0 || (high == 0 && !n->max.open)) && s->rest == 0;
}

/* The state behind one more byte; false: there is none. */
static bool dsv3__gram_num_next(const dsv3__gram_numbers *n, dsv3__gram_num *s, char c)
{
    bool whole = s->phase == DSV3__GRAM_NUM_ZERO || s->phase == DSV3__GRAM_NUM_INT;
    bool bounded = n->min.given || n->max.given || n->integer || n->multiple;
    uint32_t digit = (uint32_t)(c - '0');
    if (c == '-' && s->phase == DSV3__GRAM_NUM_START)
        return s->phase = DSV3__GRAM_NUM_MINUS, s->negative = 1, true;
    if (c == '.' && whole && !n->integer && !n->multiple && n->fraction) {
        s->min = dsv3__gram_num_int(&n->min, s->min, s->k);
        s->max = dsv3__gram_num_int(&n->max, s->max, s->k);
        return s->phase = DSV3__GRAM_NUM_POINT, s->k = 0, true;
    }
    if (c == 'e' || c == 'E') {
        if (bounded || (!whole && s->phase != DSV3__GRAM_NUM_FRACTION))
            return false;
        return s->phase = DSV3__GRAM_NUM_E, s->k = s->negative = 0, true;
    }
    if ((c == '-' || c == '+') && s->phase == DSV3__GRAM_NUM_E)
        return s->phase = DSV3__GRAM_NUM_E_SIGN, true;
    if (c < '0' || c > '9')
        return false;
    switch (s->phase) {
    case DSV3__GRAM_NUM_START:
    case DSV3__GRAM_NUM_MINUS:
    case DSV3__GRAM_NUM_INT:
        if (s->k == DSV3__GRAM_INT_DIGITS)
            return false;
        if (digit == 0 && s->phase != DSV3__GRAM_NUM_INT)
            return s->phase = DSV3__GRAM_NUM_ZERO, true;
        s->min = dsv3__gram_num_digit(&n->min, s->min, digit, (int32_t)s->k);
        s->max = dsv3__gram_num_digit(&n->max, s->max, digit, (int32_t)s->k);
        s->rest = n->multiple ? (s->rest * 10 + digit) % n->multiple : 0;
        return s->phase = DSV3__GRAM_NUM_INT, s->k++, true;
    case DSV3__GRAM_NUM_POINT:
    case DSV3__GRAM_NUM_FRACTION:
        if (s->k == n->fraction)
            return false;
        s->min = dsv3__gram_num_digit(&n->min, s->min, digit, n->min.at.point + (int32_t)s->k);
        s->max = dsv3__gram_num_digit(&n->max, s->max, digit, n->max.at.point + (int32_t)s->k);
        return s->phase = DSV3__GRAM_NUM_FRACTION, s->k++, true;
    case DSV3__GRAM_NUM_E:
    case DSV3__GRAM_NUM_E_SIGN: return s->phase = DSV3__GRAM_NUM_E_1, true;
    case DSV3__GRAM_NUM_E_1: return s->phase = DSV3__GRAM_NUM_E_2, true;
    default: return false;
    }
}

/* Automaton of the numbers within bounds. */
static dsv3_result dsv3__gram_number(dsv3__gram_build *b, const dsv3__gram_numbers *n, uint32_t *start)
{
    static const char bytes[] = "0123456789-+.eE";
    uint32_t index;
    dsv3__gram_num s;
    bool fresh;
    memset(&s, 0, sizeof s);
    s.min = s.max = 1;
    dsv3__gram_lists_clear(&b->lists);
    DSV3__TRY(dsv3__gram_intern(b, &b->lists, &s.phase, 6, &index, &fresh));
    DSV3__TRY(dsv3__gram_state_new(b, start));
    for (uint32_t i = 0; i < b->lists.n; i++) {
        dsv3__gram_num from;
        memcpy(&from, b->lists.items + b->lists.spans[i].at, sizeof from);
        b->g->info[*start + i].label = dsv3__gram_num_ends(n, &from);
        for (const char *c = bytes; *c; c++) {
            uint32_t unused;
            s = from;
            if (!dsv3__gram_num_next(n, &s, *c))
                continue;
            DSV3__TRY(dsv3__gram_intern(b, &b->lists, &s.phase, 6, &index, &fresh));
            if (fresh)
                DSV3__TRY(dsv3__gram_state_new(b, &unused));
            b->g->next[(size_t)(*start + i) * 256 + (unsigned char)*c] = (uint16_t)(*start + index);
        }
    }
    DSV3__TRY(dsv3__gram_trim(b, *start, (uint32_t)b->g->n_states, start));
    return DSV3_OK;
}

// ---- Side by side ----------------------------------------------------------------------------------------

typedef struct dsv3__gram_parts {
    uint32_t n, groups;
    dsv3__gram_part part[DSV3__GRAM_PARTS_MAX];
} dsv3__gram_parts;

/* What the keys of an object are read by. */
typedef struct dsv3__gram_object {
    dsv3__gram_alt *alt;
    const dsv3__gram_conj *members;
    dsv3__gram_parts parts;
    uint32_t schema[DSV3__GRAM_PARTS_MAX]; /* that a part brings for the value, 0: none */
    uint32_t owner[DSV3__GRAM_PARTS_MAX];  /* the member that has it */
    /* What ends where the parts are in these states. */
    dsv3_result (*label_fn)(dsv3__gram_build *b, const struct dsv3__gram_object *o, const uint32_t *tuple,
                            uint16_t *label);
} dsv3__gram_object;

/* A length is counted in the upper half of its state, over the automaton of any string. */
static uint32_t dsv3__gram_part_next(const dsv3_grammar *g, const dsv3__gram_part *part, uint32_t state, uint32_t c)
{
    uint32_t at = state & 0xFFFF, count = state >> 16, to = g->next[(size_t)at * 256 + c];
    if (!part->is_length || at != g->body || !to)
        return to ? to | (part->is_length ? count << 16 : 0) : 0;
    if (c == '"')
        return count >= part->length.min ? to : 0;
    if (part->length.max == DSV3__GRAM_NO_MAX)
        count = count < part->length.min ? count + 1 : count;
    else if (count++ == part->length.max)
        return 0;
    return count << 16 | to;
}

/* A group that lost a part is out. False: all are. */
static bool dsv3__gram_tuple_settle(const dsv3__gram_part *parts, uint32_t n, uint32_t *tuple)
{
    bool any = false;
    for (uint32_t i = 0, end; i < n; i = end) {
        bool alive = true;
        for (end = i; end < n && parts[end].group == parts[i].group; end++)
            alive = alive && (tuple[end] || parts[end].optional);
        for (uint32_t k = i; k < end && !alive; k++)
            tuple[k] = 0;
        any = any || alive;
    }
    return any;
}

/* Does a value end here? */
static bool dsv3__gram_tuple_ends(const dsv3_grammar *g, const dsv3__gram_part *parts, uint32_t n,
                                  const uint32_t *tuple)
{
    for (uint32_t i = 0, end; i < n; i = end) {
        bool all = true;
        for (end = i; end < n && parts[end].group == parts[i].group; end++)
            all = all && (parts[end].optional || g->info[tuple[end] & 0xFFFF].label);
        if (all)
            return true;
    }
    return false;
}

/* One automaton for the parts [n], those of a group beside each other. object: they read its keys. Its states are the
   last ones, from *start on. */
static dsv3_result dsv3__gram_product(dsv3__gram_build *b, const dsv3__gram_part *parts, uint32_t n,
                                      const dsv3__gram_object *object, uint32_t *start)
{
    uint32_t now[DSV3__GRAM_PARTS_MAX], then[DSV3__GRAM_PARTS_MAX], before[DSV3__GRAM_PARTS_MAX], index, unused;
    bool fresh;
    if (n == 1 && !object && !parts->is_length)
        return *start = parts->start, DSV3_OK;
    for (uint32_t i = 0; i < n; i++)
        now[i] = parts[i].start;
    dsv3__gram_lists_clear(&b->lists);
    DSV3__TRY(dsv3__gram_intern(b, &b->lists, now, n, &index, &fresh));
    DSV3__TRY(dsv3__gram_state_new(b, start));
    for (uint32_t s = 0; s < b->lists.n; s++) {
        uint32_t target = 0;
        memcpy(now, b->lists.items + b->lists.spans[s].at, n * sizeof *now);
        if (dsv3__gram_tuple_ends(b->g, parts, n, now)) {
            uint16_t label = 1;
            if (object)
                DSV3__TRY(object->label_fn(b, object, now, &label));
            b->g->info[*start + s].label = label;
        }
        memset(before, 0, sizeof before);
        DSV3__TRY(dsv3__gram_work(b, 512 * (uint64_t)n));
        for (uint32_t c = 0; c < 256; c++) {
            for (uint32_t i = 0; i < n; i++)
                then[i] = now[i] ? dsv3__gram_part_next(b->g, &parts[i], now[i], c) : 0;
            if (!dsv3__gram_tuple_settle(parts, n, then))
                continue;
            if (!target || memcmp(then, before, n * sizeof *then) != 0) {
                DSV3__TRY(dsv3__gram_intern(b, &b->lists, then, n, &index, &fresh));
                if (fresh)
                    DSV3__TRY(dsv3__gram_state_new(b, &unused));
                target = *start + index;
                memcpy(before, then, n * sizeof *then);
            }
            b->g->next[(size_t)(*start + s) * 256 + c] = (uint16_t)target;
        }
    }
    if (!object)
        DSV3__TRY(dsv3__gram_trim(b, *start, (uint32_t)b->g->n_states, start));
    return DSV3_OK;
}

// ---- References ------------------------------------------------------------------------------------------

#define DSV3__GRAM_URI_MAX 512

/* Length of the scheme of a URI with its colon, 0: it is relative. */
static size_t dsv3__gram_scheme(dsv3__str uri)
{
    size_t n = 0;
    while (n < uri.n &&
           ((uri.p[n] | 0x20) >= 'a' ? (uri.p[n] | 0x20) <= 'z'
                                     : n && ((uri.p[n] >= '0' && uri.p[n] <= '9') || strchr("+-.", uri.p[n]))))
        n++;
    return n && n < uri.n && uri.p[n] == ':' ? n + 1 : 0;
}

/* out: `ref` (without a fragment) as seen from `base`. Dots in paths are not resolved. False: too long. */
static bool dsv3__gram_uri_join(dsv3__str base, dsv3__str ref, char *out, dsv3__str *uri)
{
    size_t scheme = dsv3__gram_scheme(base), keep = 0, authority = scheme;
    if (base.n - scheme >= 2 && memcmp(base.p + scheme, "//", 2) == 0)
        for (authority += 2; authority < base.n && base.p[authority] != '/';)
            authority++;
    if (ref.n == 0) {
        keep = base.n;
    } else if (ref.n >= 2 && memcmp(ref.p, "//", 2) == 0) {
        keep = scheme;
    } else if (ref.p[0] == '/') {
        keep = authority;
    } else if (!dsv3__gram_scheme(ref)) {
        for (keep = base.n; keep > authority && base.p[keep - 1] != '/';)
            keep--;
    }
    if (keep + ref.n > DSV3__GRAM_URI_MAX)
        return false;
    memmove(out, base.p, keep);
    memcpy(out + keep, ref.p, ref.n);
    uri->p = out;
    uri->n = keep + ref.n;
    return true;
}

static dsv3__str dsv3__gram_before_fragment(dsv3__str uri)
{
    const char *hash = uri.n ? (const char *)memchr(uri.p, '#', uri.n) : NULL;
    if (hash)
        uri.n = (size_t)(hash - uri.p);
    return uri;
}

/* The $id of a schema, 0: none. What stands in const or enum is no schema. */
static uint32_t dsv3__gram_id(const dsv3__gram_build *b, uint32_t value)
{
    uint32_t id = dsv3__gram_find(b, value, "$id");
    for (uint32_t v = value; id && v > 1; v = b->values[v].parent)
        if (b->values[b->values[v].parent].kind == '{' &&
            (dsv3__gram_is(b->values[v].key, "const") || dsv3__gram_is(b->values[v].key, "enum")))
            return 0;
    return id && b->values[id].kind == '"' ? id : 0;
}

/* The schema whose $id counts for this value: itself or one around it, at last the whole. */
static uint32_t dsv3__gram_resource(const dsv3__gram_build *b, uint32_t value)
{
    while (value > 1 && !b->values[value].whole && !dsv3__gram_id(b, value))
        value = b->values[value].parent;
    return value;
}

/* The absolute URI of a resource, as far as its own and outer $id make it one. out [DSV3__GRAM_URI_MAX] */
static bool dsv3__gram_base_uri(const dsv3__gram_build *b, uint32_t resource, char *out, dsv3__str *uri)
{
    uint32_t chain[DSV3__JSON_DEPTH + 1], n = 0;
    for (uint32_t v = resource; v; v = v > 1 && !b->values[v].whole ? dsv3__gram_resource(b, b->values[v].parent) : 0)
        chain[n++] = v;
    uri->p = out;
    uri->n = 0;
    while (n--) {
        uint32_t id = dsv3__gram_id(b, chain[n]);
        if (id && !dsv3__gram_uri_join(*uri, dsv3__gram_before_fragment(b->values[id].text), out, uri))
            return false;
    }
    return true;
}

/* The value a JSON pointer leads to, 0: none. */
static uint32_t dsv3__gram_pointer(const dsv3__gram_build *b, uint32_t at, dsv3__str pointer)
{
    char step[DSV3__GRAM_URI_MAX];
    for (size_t i = 0; at && i < pointer.n;) {
        dsv3__str s;
        size_t n = 0;
        for (i++; i < pointer.n && pointer.p[i] != '/'; i++) {
            char c = pointer.p[i];
            if (c == '%' && pointer.n - i > 2) {
                char hex[4] = {'0', '0', pointer.p[i + 1], pointer.p[i + 2]};
                int code = dsv3__json_hex4(hex);
                if (code < 0)
                    return 0;
                c = (char)code;
                i += 2;
            }
            if (c == '~' && i + 1 < pointer.n && (pointer.p[i + 1] == '0' || pointer.p[i + 1] == '1'))
                c = pointer.p[++i] == '0' ? '~' : '/';
            if (n == sizeof step)
                return 0;
            step[n++] = c;
        }
        s.p = step;
        s.n = n;
        if (b->values[at].kind == '[') {
            uint64_t index = 0;
            for (size_t k = 0; k < n; k++)
                index = step[k] >= '0' && step[k] <= '9' && index < 1u << 20 ? index * 10 + (uint64_t)(step[k] - '0')
                                                                             : UINT32_MAX;
            for (at = n ? b->values[at].child : 0; at && index; index--)
                at = b->values[at].next;
        } else {
            at = dsv3__gram_member(b, at, s);
        }
    }
    return at;
}

/* What the $ref of a schema names. */
static dsv3_result dsv3__gram_ref(const dsv3__gram_build *b, uint32_t schema, uint32_t ref, uint32_t *target)
{
    char own[DSV3__GRAM_URI_MAX], other[DSV3__GRAM_URI_MAX];
    dsv3__str text = b->values[ref].text, path = dsv3__gram_before_fragment(text), uri, found, fragment;
    uint32_t resource = dsv3__gram_resource(b, schema), anchor = 0;
    if (b->values[ref].kind != '"' || !dsv3__gram_base_uri(b, resource, own, &uri) ||
        !dsv3__gram_uri_join(uri, path, own, &uri))
        return DSV3__GRAM_REFUSE(b, ref, "expected a reference, of at most 512 bytes");
    for (uint32_t v = 1; path.n; v++) {
        if (v == b->n_values)
            return DSV3__GRAM_REFUSE(b, ref, "a reference to another document");
        if ((v == 1 || dsv3__gram_id(b, v)) && dsv3__gram_base_uri(b, v, other, &found) &&
            dsv3__gram_same(found, uri)) {
            resource = v;
            break;
        }
    }
    fragment.p = text.p + dsv3__min(path.n + 1, text.n);
    fragment.n = text.n - dsv3__min(path.n + 1, text.n);
    *target = resource;
    if (fragment.n && fragment.p[0] == '/')
        *target = dsv3__gram_pointer(b, resource, fragment);
    for (uint32_t v = 1; v < b->n_values && fragment.n && fragment.p[0] != '/'; v++) {
        anchor = dsv3__gram_find(b, v, "$anchor");
        anchor = anchor ? anchor : dsv3__gram_find(b, v, "$dynamicAnchor");
        if (anchor && dsv3__gram_same(b->values[anchor].text, fragment) && dsv3__gram_resource(b, v) == resource) {
            *target = v;
            break;
        }
        *target = 0;
    }
    return *target ? DSV3_OK : DSV3__GRAM_REFUSE(b, ref, "a reference to what is not there");
}

// ---- Keywords --------------------------------------------------------------------------------------------

enum {
    DSV3__GRAM_NULL = 1,
    DSV3__GRAM_BOOL = 2,
    DSV3__GRAM_WHOLE = 4,
    DSV3__GRAM_REAL = 8 /* numbers that are not whole */,
    DSV3__GRAM_NUMBER = 12,
    DSV3__GRAM_STRING = 16,
    DSV3__GRAM_ARRAY = 32,
    DSV3__GRAM_OBJECT = 64,
    DSV3__GRAM_SCALARS = 31,
    DSV3__GRAM_ALL = 127
};

/* What is read, by the kind its value must have: u a count, n a number, s a string, { an object, [ an array with
   something in it, l an array, x a schema, b true or false, t a type, a anything; and what says nothing about the value:
   i. */
static const struct {
    const char *name;
    char kind;
} dsv3__gram_keywords[] = {{"type", 't'},
                           {"enum", '['},
                           {"const", 'a'},
                           {"properties", '{'},
                           {"patternProperties", '{'},
                           {"additionalProperties", 'x'},
                           {"propertyNames", 'x'},
                           {"required", 'l'},
                           {"minProperties", 'u'},
                           {"maxProperties", 'u'},
                           {"items", 'x'},
                           {"prefixItems", '['},
                           {"minItems", 'u'},
                           {"maxItems", 'u'},
                           {"minLength", 'u'},
                           {"maxLength", 'u'},
                           {"pattern", 's'},
                           {"minimum", 'n'},
                           {"maximum", 'n'},
                           {"exclusiveMinimum", 'n'},
                           {"exclusiveMaximum", 'n'},
                           {"multipleOf", 'n'},
                           {"anyOf", '['},
                           {"oneOf", '['},
                           {"allOf", '['},
                           {"$ref", 's'},
                           {"minContains", 'u'}, /* without contains, which is not known, these say nothing */
                           {"maxContains", 'u'},
                           {"if", 'x'},
                           {"then", 'x'},
                           {"else", 'x'},
                           {"uniqueItems", 'b'},
                           {"$defs", '{'},
                           {"definitions", '{'},
                           {"$schema", 'i'},
                           {"$id", 's'},
                           {"$anchor", 's'},
                           {"$dynamicAnchor", 'i'},
                           {"$comment", 'i'},
                           {"title", 'i'},
                           {"description", 'i'},
                           {"default", 'i'},
                           {"examples", 'i'},
                           {"deprecated", 'i'},
                           {"readOnly", 'i'},
                           {"writeOnly", 'i'},
                           {"format", 'i'},
                           {"contentEncoding", 'i'},
                           {"contentMediaType", 'i'},
                           {"contentSchema", 'i'}};

static const char *const dsv3__gram_types[] = {"null", "boolean", "integer", "number", "string", "array", "object"};
static const uint32_t dsv3__gram_type_bits[] = {DSV3__GRAM_NULL,   DSV3__GRAM_BOOL,   DSV3__GRAM_WHOLE,
                                                DSV3__GRAM_NUMBER, DSV3__GRAM_STRING, DSV3__GRAM_ARRAY,
                                                DSV3__GRAM_OBJECT};

/* The type bits of a name, 0: there is no such type. */
static uint32_t dsv3__gram_type_named(const dsv3__gram_value *v)
{
    for (size_t i = 0; i < DSV3__COUNT(dsv3__gram_types) && v->kind == '"'; i++)
        if (dsv3__gram_is(v->text, dsv3__gram_types[i]))
            return dsv3__gram_type_bits[i];
    return 0;
}

/* Type bits of the keyword `type`, 0: wrong. */
static uint32_t dsv3__gram_type(const dsv3__gram_build *b, uint32_t value)
{
    uint32_t bits = 0;
    if (b->values[value].kind != '[')
        return dsv3__gram_type_named(&b->values[value]);
    for (uint32_t i = b->values[value].child; i; i = b->values[i].next) {
        uint32_t one = dsv3__gram_type_named(&b->values[i]);
        if (!one)
            return 0;
        bits |= one;
    }
    return bits;
}

/* Type bits of a value as it stands. */
static uint32_t dsv3__gram_kind_bits(const dsv3__gram_value *v)
{
    dsv3__gram_decimal d;
    switch (v->kind) {
    case 'n': return DSV3__GRAM_NULL;
    case 't':
    case 'f': return DSV3__GRAM_BOOL;
    case '"': return DSV3__GRAM_STRING;
    case '[': return DSV3__GRAM_ARRAY;
    case '{': return DSV3__GRAM_OBJECT;
    default:
        return dsv3__gram_decimal_read(v->text, &d) && dsv3__gram_decimal_whole(&d) ? (uint32_t)DSV3__GRAM_WHOLE
                                                                                    : (uint32_t)DSV3__GRAM_REAL;
    }
}

/* A count, `otherwise` where the keyword is not there. Checked before: what is larger than 2^30 counts as that. */
static uint32_t dsv3__gram_count(const dsv3__gram_build *b, uint32_t schema, const char *name, uint32_t otherwise)
{
    dsv3__gram_decimal d;
    uint32_t v = dsv3__gram_find(b, schema, name), count = 0;
    if (!v)
        return otherwise;
    if (!dsv3__gram_decimal_read(b->values[v].text, &d) || d.point > 9)
        return 1u << 30;
    for (int32_t i = 0; i < d.point; i++)
        count = count * 10 + (i < d.n ? d.digits[i] : 0u);
    return count;
}

static bool dsv3__gram_dialect(dsv3__str uri)
{
    const char *const starts[] = {"http://json-schema.org/", "https://json-schema.org/"};
    for (int i = 0; i < 2; i++)
        if (uri.n >= strlen(starts[i]) && memcmp(uri.p, starts[i], strlen(starts[i])) == 0)
            return true;
    return false;
}

/* Is there a keyword that is not known, or whose value cannot be? */
static dsv3_result dsv3__gram_check(const dsv3__gram_build *b, uint32_t schema)
{
    for (uint32_t v = b->values[schema].child; v; v = b->values[v].next) {
        const dsv3__gram_value *value = &b->values[v];
        dsv3__gram_decimal d;
        size_t i = 0;
        bool ok = true;
        while (i < DSV3__COUNT(dsv3__gram_keywords) && !dsv3__gram_is(value->key, dsv3__gram_keywords[i].name))
            i++;
        if (i == DSV3__COUNT(dsv3__gram_keywords))
            return DSV3__GRAM_REFUSE(b, v, "a keyword that is not supported");
        switch (dsv3__gram_keywords[i].kind) {
        case 'u':
            ok = value->kind == 0 && dsv3__gram_decimal_read(value->text, &d) && dsv3__gram_decimal_whole(&d) &&
                 !d.negative;
            break;
        case 'n': ok = value->kind == 0; break;
        case 's': ok = value->kind == '"'; break;
        case '{': ok = value->kind == '{'; break;
        case '[': ok = value->kind == '[' && value->n > 0; break;
        case 'l': ok = value->kind == '['; break;
        case 'x': ok = value->kind == '{' || value->kind == 't' || value->kind == 'f'; break;
        case 'b': ok = value->kind == 't' || value->kind == 'f'; break;
        case 't': ok = dsv3__gram_type(b, v) != 0; break;
        default: break;
        }
        if (!ok)
            return DSV3__GRAM_REFUSE(b, v, "not the kind of value that this keyword takes");
        bool decides = dsv3__gram_is(value->key, "if") && /* alone it says nothing, nor do the others without it */
                       (dsv3__gram_find(b, schema, "then") || dsv3__gram_find(b, schema, "else"));
        if (decides || (dsv3__gram_is(value->key, "uniqueItems") && value->kind == 't'))
            return DSV3__GRAM_REFUSE(b, v, "a keyword that is not supported");
        if (dsv3__gram_is(value->key, "$schema") && !dsv3__gram_dialect(value->text))
            return DSV3__GRAM_REFUSE(b, v, "a dialect that is none of json-schema.org's");
        if (dsv3__gram_is(value->key, "required"))
            for (uint32_t k = value->child; k; k = b->values[k].next)
                if (b->values[k].kind != '"')
                    return DSV3__GRAM_REFUSE(b, k, "expected a string");
    }
    return DSV3_OK;
}

// ---- Nodes -----------------------------------------------------------------------------------------------

static dsv3_result dsv3__gram_add(dsv3__gram_build *b, dsv3__gram_conj *c, uint32_t atom)
{
    for (uint32_t i = 0; i < c->n; i++)
        if (c->atoms[i] == atom)
            return DSV3_OK;
    if (c->n == DSV3__GRAM_ATOMS_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: more than %u schemas that hold for one value",
                          (uint64_t)DSV3__GRAM_ATOMS_MAX);
    c->atoms[c->n++] = atom;
    return DSV3_OK;
}

/* Adds a schema: an object, true (says nothing) or false. */
static dsv3_result dsv3__gram_add_schema(dsv3__gram_build *b, dsv3__gram_conj *c, uint32_t value)
{
    char kind = b->values[value].kind;
    if (kind == 't' || (kind == '{' && !b->values[value].n))
        return DSV3_OK;
    if (kind != '{' && kind != 'f')
        return DSV3__GRAM_REFUSE(b, value, "expected a schema");
    return dsv3__gram_add(
        b, c, kind == 'f' ? DSV3__GRAM_ATOM(DSV3__GRAM_FALSE, 0) : DSV3__GRAM_ATOM(DSV3__GRAM_SCHEMA, value));
}

/* The node of what holds at once; a new one is built later. */
static dsv3_result dsv3__gram_node_get(dsv3__gram_build *b, const dsv3__gram_conj *conj, uint32_t *node)
{
    dsv3__gram_conj c = *conj;
    bool fresh;
    *node = 0;
    for (uint32_t i = 0; i < c.n; i++) {
        if (DSV3__GRAM_KIND(c.atoms[i]) == DSV3__GRAM_FALSE)
            return DSV3_OK;
        for (uint32_t k = i; k > 0 && c.atoms[k] < c.atoms[k - 1]; k--) {
            uint32_t t = c.atoms[k];
            c.atoms[k] = c.atoms[k - 1];
            c.atoms[k - 1] = t;
        }
    }
    DSV3__TRY(dsv3__gram_intern(b, &b->conjs, c.atoms, c.n, node, &fresh));
    ++*node;
    if (!fresh)
        return DSV3_OK;
    if (*node >= DSV3__GRAM_NODES_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: more than %u combinations of subschemas",
                          (uint64_t)DSV3__GRAM_NODES_MAX);
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->g->nodes, b->g->cap_nodes, b->g->n_nodes, b->g->n_nodes + 1));
    memset(&b->g->nodes[b->g->n_nodes++], 0, sizeof *b->g->nodes);
    return DSV3_OK;
}

/* Type bits that an atom allows. */
static uint32_t dsv3__gram_atom_types(const dsv3__gram_build *b, uint32_t atom)
{
    const dsv3__gram_value *v = &b->values[DSV3__GRAM_INDEX(atom)];
    uint32_t bits = 0, type;
    switch (DSV3__GRAM_KIND(atom)) {
    case DSV3__GRAM_SCHEMA:
        type = dsv3__gram_find(b, DSV3__GRAM_INDEX(atom), "type");
        return type ? dsv3__gram_type(b, type) : (uint32_t)DSV3__GRAM_ALL;
    case DSV3__GRAM_CONST: return dsv3__gram_kind_bits(v);
    case DSV3__GRAM_ENUM:
        for (uint32_t i = v->child; i; i = b->values[i].next)
            bits |= dsv3__gram_kind_bits(&b->values[i]);
        return bits & DSV3__GRAM_SCALARS;
    default: return DSV3__GRAM_ALL;
    }
}

/* Notes that no two options may fit the same value, given what else the schema says. */
static dsv3_result dsv3__gram_apart_note(dsv3__gram_build *b, uint32_t schema, uint32_t array)
{
    for (uint32_t i = b->values[array].child; i; i = b->values[i].next)
        for (uint32_t k = b->values[i].next; k; k = b->values[k].next) {
            dsv3__gram_conj pair;
            dsv3__gram_apart *apart;
            pair.n = 0;
            DSV3__TRY(dsv3__gram_add(b, &pair, DSV3__GRAM_ATOM(DSV3__GRAM_PLAIN, schema)));
            DSV3__TRY(dsv3__gram_add_schema(b, &pair, i));
            DSV3__TRY(dsv3__gram_add_schema(b, &pair, k));
            DSV3__TRY(DSV3__GRAM_ROOM(b, b->apart, b->cap_apart, b->n_apart, b->n_apart + 1));
            apart = &b->apart[b->n_apart];
            apart->value = k;
            DSV3__TRY(dsv3__gram_node_get(b, &pair, &apart->node));
            b->n_apart++;
        }
    return DSV3_OK;
}

/* Spreads out one schema: what else holds with it is added, choices as atoms of their own. */
static dsv3_result dsv3__gram_spread_schema(dsv3__gram_build *b, dsv3__gram_conj *c, uint32_t schema)
{
    uint32_t target = 0, v;
    if (!b->values[schema].checked) {
        b->values[schema].checked = true;
        DSV3__TRY(dsv3__gram_check(b, schema));
        v = dsv3__gram_find(b, schema, "oneOf");
        if (v)
            DSV3__TRY(dsv3__gram_apart_note(b, schema, v));
    }
    for (v = b->values[schema].child; v; v = b->values[v].next) {
        dsv3__str key = b->values[v].key;
        if (dsv3__gram_is(key, "$ref")) {
            DSV3__TRY(dsv3__gram_work(b, 8 * b->n_values));
            DSV3__TRY(dsv3__gram_ref(b, schema, v, &target));
            DSV3__TRY(dsv3__gram_add_schema(b, c, target));
        } else if (dsv3__gram_is(key, "allOf")) {
            for (uint32_t i = b->values[v].child; i; i = b->values[i].next)
                DSV3__TRY(dsv3__gram_add_schema(b, c, i));
        } else if (dsv3__gram_is(key, "anyOf") || dsv3__gram_is(key, "oneOf")) {
            DSV3__TRY(dsv3__gram_add(b, c, DSV3__GRAM_ATOM(DSV3__GRAM_CHOICE, v)));
        } else if (dsv3__gram_is(key, "enum")) {
            DSV3__TRY(dsv3__gram_add(b, c, DSV3__GRAM_ATOM(DSV3__GRAM_VALUES, v)));
        } else if (dsv3__gram_is(key, "const")) {
            DSV3__TRY(dsv3__gram_add(b, c, DSV3__GRAM_ATOM(DSV3__GRAM_CONST, v)));
        }
    }
    return DSV3_OK;
}

/* The alternatives of the next choice of `c`, onto the stack. */
static dsv3_result dsv3__gram_spread_choice(dsv3__gram_build *b, const dsv3__gram_conj *c)
{
    uint32_t atom = c->atoms[c->done], array = DSV3__GRAM_INDEX(atom);
    bool values = DSV3__GRAM_KIND(atom) == DSV3__GRAM_VALUES, scalars = false;
    for (uint32_t i = b->values[array].child; i; i = b->values[i].next) {
        bool scalar = (dsv3__gram_kind_bits(&b->values[i]) & DSV3__GRAM_SCALARS) != 0;
        if (values && scalar && scalars)
            continue;
        scalars = scalars || scalar;
        DSV3__TRY(DSV3__GRAM_ROOM(b, b->spread, b->cap_spread, b->n_spread, b->n_spread + 1));
        dsv3__gram_conj *next = &b->spread[b->n_spread++];
        *next = *c;
        if (values) {
            next->atoms[next->done++] =
                scalar ? DSV3__GRAM_ATOM(DSV3__GRAM_ENUM, array) : DSV3__GRAM_ATOM(DSV3__GRAM_CONST, i);
        } else {
            next->atoms[next->done] = next->atoms[--next->n];
            DSV3__TRY(dsv3__gram_add_schema(b, next, i));
        }
    }
    return DSV3_OK;
}

/* The next alternative of what is on the stack, spread out, with the types it allows; *types 0: there is none. */
static dsv3_result dsv3__gram_spread_next(dsv3__gram_build *b, uint32_t *steps, dsv3__gram_conj *c, uint32_t *types)
{
    *types = 0;
    while (b->n_spread) {
        *c = b->spread[--b->n_spread];
        *types = DSV3__GRAM_ALL;
        for (uint32_t i = 0; i < c->done; i++)
            *types &= dsv3__gram_atom_types(b, c->atoms[i]);
        while (*types) {
            if (c->done == c->n)
                return DSV3_OK;
            DSV3__TRY(dsv3__gram_work(b, 4 * DSV3__GRAM_ATOMS_MAX));
            if (++*steps > DSV3__GRAM_SPREAD_MAX)
                return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA,
                                  "schema: more than %u steps through anyOf, allOf, enum of one value",
                                  (uint64_t)DSV3__GRAM_SPREAD_MAX);
            uint32_t atom = c->atoms[c->done], kind = DSV3__GRAM_KIND(atom);
            if (kind == DSV3__GRAM_CHOICE || kind == DSV3__GRAM_VALUES) {
                DSV3__TRY(dsv3__gram_spread_choice(b, c));
                *types = 0;
                break;
            }
            c->done++;
            if (kind == DSV3__GRAM_FALSE) {
                *types = 0;
                break;
            }
            if (kind == DSV3__GRAM_SCHEMA)
                DSV3__TRY(dsv3__gram_spread_schema(b, c, DSV3__GRAM_INDEX(atom)));
            if (kind == DSV3__GRAM_PLAIN)
                c->atoms[c->done - 1] = DSV3__GRAM_ATOM(DSV3__GRAM_SCHEMA, DSV3__GRAM_INDEX(atom));
            *types &= dsv3__gram_atom_types(b, c->atoms[c->done - 1]);
        }
    }
    return DSV3_OK;
}

// ---- Scalars of a node -----------------------------------------------------------------------------------

static dsv3_result dsv3__gram_part_add(dsv3__gram_build *b, dsv3__gram_parts *p, uint32_t start)
{
    if (p->n == DSV3__GRAM_PARTS_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: more than %u patterns, bounds and literals side by side",
                          (uint64_t)DSV3__GRAM_PARTS_MAX);
    memset(&p->part[p->n], 0, sizeof p->part[p->n]);
    p->part[p->n].group = p->groups;
    p->part[p->n++].start = start;
    return DSV3_OK;
}

static dsv3_result dsv3__gram_part_length(dsv3__gram_build *b, dsv3__gram_parts *p, uint32_t min, uint32_t max)
{
    DSV3__TRY(dsv3__gram_part_add(b, p, b->g->string));
    if (min > 0xFFFF || (max > 0xFFFF && max != DSV3__GRAM_NO_MAX))
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: minLength or maxLength above 65535 beside a pattern");
    p->part[p->n - 1].is_length = true;
    p->part[p->n - 1].length.min = min;
    p->part[p->n - 1].length.max = max;
    return DSV3_OK;
}

/* Automaton of one of the patterns of the schema, made once. */
static dsv3_result dsv3__gram_pattern_get(dsv3__gram_build *b, uint32_t value, dsv3__str pattern, uint32_t *start)
{
    for (uint64_t i = 0; i < b->n_patterns; i++)
        if (b->patterns[i].value == value)
            return *start = b->patterns[i].start, DSV3_OK;
    DSV3__TRY(dsv3__gram_pattern(b, pattern, value, start));
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->patterns, b->cap_patterns, b->n_patterns, b->n_patterns + 1));
    b->patterns[b->n_patterns].value = value;
    b->patterns[b->n_patterns++].start = *start;
    return DSV3_OK;
}

/* A scalar of the schema as it is to be written: whole numbers and short decimals plainly, others as they stand. */
static dsv3_result dsv3__gram_scalar_literal(dsv3__gram_build *b, uint32_t root, uint32_t value)
{
    const dsv3__gram_value *v = &b->values[value];
    dsv3__gram_decimal d;
    char plain[DSV3__GRAM_INT_DIGITS + DSV3__GRAM_FRACTION_DIGITS + 4];
    dsv3__str text = v->text;
    uint32_t state = root;
    if (v->kind == 0 && dsv3__gram_decimal_read(text, &d) && d.point <= DSV3__GRAM_INT_DIGITS &&
        d.n - d.point <= DSV3__GRAM_FRACTION_DIGITS) {
        size_t n = 0;
        if (d.negative)
            plain[n++] = '-';
        for (int32_t i = d.point > 0 ? 0 : d.point - 1; i < d.point || i < d.n; i++) {
            if (i == d.point)
                plain[n++] = '.';
            plain[n++] = (char)('0' + (i >= 0 && i < d.n ? d.digits[i] : 0));
        }
        text.p = plain;
        text.n = n;
    }
    DSV3__TRY(dsv3__gram_literal(b, &state, text, v->kind == '"'));
    b->g->info[state].label = 1;
    return DSV3_OK;
}

/* Automaton of the words, of those of `types` among null, true, false. */
static dsv3_result dsv3__gram_words(dsv3__gram_build *b, uint32_t types, uint32_t *start)
{
    static const char *const words[] = {"null", "true", "false"};
    DSV3__TRY(dsv3__gram_state_new(b, start));
    for (size_t i = 0; i < 3; i++) {
        uint32_t state = *start;
        dsv3__str s;
        s.p = words[i];
        s.n = strlen(words[i]);
        if (!(types & (i ? (uint32_t)DSV3__GRAM_BOOL : (uint32_t)DSV3__GRAM_NULL)))
            continue;
        DSV3__TRY(dsv3__gram_literal(b, &state, s, false));
        b->g->info[state].label = 1;
    }
    DSV3__TRY(dsv3__gram_trim(b, *start, (uint32_t)b->g->n_states, start));
    return DSV3_OK;
}

/* The tighter of two bounds. side 1: a lower, -1: an upper one. */
static void dsv3__gram_tighten(dsv3__gram_bound *bound, const dsv3__gram_decimal *at, bool open, int side)
{
    int order = bound->given ? side * dsv3__gram_compare(at, &bound->at) : 1;
    if (order > 0 || (order == 0 && open)) {
        bound->given = true;
        bound->open = open;
        bound->at = *at;
    }
}

/* What the schemas say about numbers. */
static dsv3_result dsv3__gram_number_bounds(dsv3__gram_build *b, const dsv3__gram_conj *c, dsv3__gram_numbers *n)
{
    static const char *const names[] = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"};
    for (uint32_t i = 0; i < c->n; i++) {
        uint32_t schema = DSV3__GRAM_INDEX(c->atoms[i]), v = dsv3__gram_find(b, schema, "multipleOf");
        dsv3__gram_decimal d;
        if (DSV3__GRAM_KIND(c->atoms[i]) != DSV3__GRAM_SCHEMA)
            continue;
        if (v) {
            uint32_t m = dsv3__gram_count(b, schema, "multipleOf", 0), a = n->multiple ? n->multiple : 1, r = m;
            if (!dsv3__gram_decimal_read(b->values[v].text, &d) || !dsv3__gram_decimal_whole(&d) || d.negative || !m ||
                m > 1000)
                return DSV3__GRAM_REFUSE(b, v, "multipleOf takes whole numbers from 1 to 1000");
            for (uint32_t x = a; r;) { /* the greatest common divisor ends in x */
                uint32_t t = x % r;
                x = r, r = t;
                if (!r)
                    n->multiple = a / x * m;
            }
            if (n->multiple > 1000)
                return DSV3__GRAM_REFUSE(b, v, "multipleOf, taken together, is above 1000");
        }
        for (int k = 0; k < 4; k++) {
            v = dsv3__gram_find(b, schema, names[k]);
            if (!v)
                continue;
            if (!dsv3__gram_decimal_read(b->values[v].text, &d))
                return DSV3__GRAM_REFUSE(b, v, "a bound with more than 40 digits");
            if (k % 2 && !n->integer && d.n > DSV3__GRAM_EXACT_DIGITS)
                return DSV3__GRAM_REFUSE(b, v, "an exclusive bound with more than 15 digits");
            dsv3__gram_tighten(k < 2 ? &n->min : &n->max, &d, k % 2 != 0, k < 2 ? 1 : -1);
        }
    }
    return DSV3_OK;
}

/* Numbers, as the schemas have them. Near a bound that is outside a number must not have more digits than a double
   tells apart: 2.9999999999999999 is 3 to whoever reads it. */
static dsv3_result dsv3__gram_number_get(dsv3__gram_build *b, const dsv3__gram_conj *c, bool integer, bool *plain,
                                         uint32_t *start)
{
    dsv3__gram_numbers n;
    uint32_t *memo = integer ? &b->integer : &b->number;
    memset(&n, 0, sizeof n);
    n.integer = integer;
    DSV3__TRY(dsv3__gram_number_bounds(b, c, &n));
    int32_t point = 0;
    if (n.min.given && n.min.open)
        point = n.min.at.point;
    if (n.max.given && n.max.open && n.max.at.point > point)
        point = n.max.at.point;
    n.fraction = DSV3__GRAM_FRACTION_DIGITS;
    if ((n.min.given && n.min.open) || (n.max.given && n.max.open))
        n.fraction = (uint32_t)(point > DSV3__GRAM_EXACT_DIGITS ? 0 : DSV3__GRAM_EXACT_DIGITS - point);
    *plain = !n.min.given && !n.max.given && !n.multiple;
    if (*plain && *memo)
        return *start = *memo, DSV3_OK;
    DSV3__TRY(dsv3__gram_number(b, &n, start));
    if (*plain)
        *memo = *start;
    return DSV3_OK;
}

/* Adds the parts that the consts and enums of an alternative are. *any: there are some. */
static dsv3_result dsv3__gram_literals(dsv3__gram_build *b, const dsv3__gram_conj *c, uint32_t types,
                                       dsv3__gram_parts *p, bool *any)
{
    *any = false;
    for (uint32_t i = 0; i < c->n; i++) {
        uint32_t kind = DSV3__GRAM_KIND(c->atoms[i]), at = DSV3__GRAM_INDEX(c->atoms[i]), start;
        if (kind != DSV3__GRAM_CONST && kind != DSV3__GRAM_ENUM)
            continue;
        *any = true;
        DSV3__TRY(dsv3__gram_state_new(b, &start));
        for (uint32_t v = kind == DSV3__GRAM_ENUM ? b->values[at].child : at; v;
             v = kind == DSV3__GRAM_ENUM ? b->values[v].next : 0)
            if (dsv3__gram_kind_bits(&b->values[v]) & types & DSV3__GRAM_SCALARS)
                DSV3__TRY(dsv3__gram_scalar_literal(b, start, v));
        DSV3__TRY(dsv3__gram_trim(b, start, (uint32_t)b->g->n_states, &start));
        DSV3__TRY(dsv3__gram_part_add(b, p, start));
    }
    return DSV3_OK;
}

/* The groups of parts that the scalars of one alternative are, and its strings of which only the length counts. */
static dsv3_result dsv3__gram_scalars(dsv3__gram_build *b, const dsv3__gram_conj *c, uint32_t types,
                                      dsv3__gram_node *node, dsv3__gram_parts *p)
{
    dsv3__gram_parts literals;
    uint32_t start, min = 0, max = DSV3__GRAM_NO_MAX, first = p->n;
    bool any, plain = true;
    literals.n = literals.groups = 0;
    DSV3__TRY(dsv3__gram_literals(b, c, types, &literals, &any));
    for (uint32_t kind = 0; kind < 3; kind++) { /* words, numbers, strings: a group each */
        uint32_t want = types & (kind == 0   ? (uint32_t)(DSV3__GRAM_NULL | DSV3__GRAM_BOOL)
                                 : kind == 1 ? (uint32_t)DSV3__GRAM_NUMBER
                                             : (uint32_t)DSV3__GRAM_STRING);
        first = p->n;
        if (!want)
            continue;
        if (kind == 0) {
            DSV3__TRY(dsv3__gram_words(b, want, &start));
            DSV3__TRY(dsv3__gram_part_add(b, p, start));
        } else if (kind == 1) {
            DSV3__TRY(dsv3__gram_number_get(b, c, want == DSV3__GRAM_WHOLE, &plain, &start));
            DSV3__TRY(dsv3__gram_part_add(b, p, start));
        } else {
            for (uint32_t i = 0; i < c->n; i++) {
                uint32_t schema = DSV3__GRAM_INDEX(c->atoms[i]), v = dsv3__gram_find(b, schema, "pattern");
                uint32_t least, most;
                if (DSV3__GRAM_KIND(c->atoms[i]) != DSV3__GRAM_SCHEMA)
                    continue;
                least = dsv3__gram_count(b, schema, "minLength", 0);
                most = dsv3__gram_count(b, schema, "maxLength", DSV3__GRAM_NO_MAX);
                min = least > min ? least : min;
                max = most < max ? most : max;
                if (v) {
                    DSV3__TRY(dsv3__gram_pattern_get(b, v, b->values[v].text, &start));
                    DSV3__TRY(dsv3__gram_part_add(b, p, start));
                }
            }
            bool bounded = min || max != DSV3__GRAM_NO_MAX;
            if (bounded && !any && p->n == first) {
                dsv3__gram_length length;
                length.min = min;
                length.max = max;
                if (min > max)
                    continue;
                DSV3__TRY(DSV3__GRAM_ROOM(b, b->g->lengths, b->g->cap_lengths, b->g->n_lengths, b->g->n_lengths + 1));
                b->g->lengths[b->g->n_lengths++] = length;
                node->n_lengths++;
                continue;
            }
            if (bounded && min <= max)
                DSV3__TRY(dsv3__gram_part_length(b, p, min, max));
            if (p->n == first &&
                !(any && (types & DSV3__GRAM_SCALARS) == want)) /* literals are strings by themselves */
                DSV3__TRY(dsv3__gram_part_add(b, p, min > max ? 0 : b->g->string));
        }
        bool alive = min <= max || kind != 2;
        for (uint32_t i = 0; i < literals.n; i++)
            DSV3__TRY(dsv3__gram_part_add(b, p, literals.part[i].start));
        for (uint32_t i = first; i < p->n; i++)
            alive = alive && p->part[i].start;
        if (alive)
            p->groups++;
        else
            p->n = first;
    }
    return DSV3_OK;
}

// ---- Arrays and objects of a node ------------------------------------------------------------------------

static dsv3_result dsv3__gram_alt_new(dsv3__gram_build *b, const dsv3__gram_alt *alt)
{
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->g->alts, b->g->cap_alts, b->g->n_alts, b->g->n_alts + 1));
    b->g->alts[b->g->n_alts++] = *alt;
    return DSV3_OK;
}

/* Number of items that an atom names one by one. */
static uint32_t dsv3__gram_prefix(const dsv3__gram_build *b, uint32_t atom, uint32_t *list)
{
    bool constant = DSV3__GRAM_KIND(atom) == DSV3__GRAM_CONST;
    *list = constant ? DSV3__GRAM_INDEX(atom) : dsv3__gram_find(b, DSV3__GRAM_INDEX(atom), "prefixItems");
    return *list ? b->values[*list].n : 0;
}

/* Node of item `index`. */
static dsv3_result dsv3__gram_item(dsv3__gram_build *b, const dsv3__gram_conj *c, uint32_t index, uint32_t *node)
{
    dsv3__gram_conj item;
    item.n = 0;
    DSV3__TRY(dsv3__gram_work(b, (uint64_t)index * c->n));
    for (uint32_t i = 0; i < c->n; i++) {
        uint32_t list, n = dsv3__gram_prefix(b, c->atoms[i], &list), v = list ? b->values[list].child : 0;
        bool constant = DSV3__GRAM_KIND(c->atoms[i]) == DSV3__GRAM_CONST;
        for (uint32_t k = 0; k < index && v; k++)
            v = b->values[v].next;
        if (index >= n)
            v = constant ? 0 : dsv3__gram_find(b, DSV3__GRAM_INDEX(c->atoms[i]), "items");
        if (constant)
            DSV3__TRY(dsv3__gram_add(b, &item,
                                     v ? DSV3__GRAM_ATOM(DSV3__GRAM_CONST, v) : DSV3__GRAM_ATOM(DSV3__GRAM_FALSE, 0)));
        else if (v)
            DSV3__TRY(dsv3__gram_add_schema(b, &item, v));
    }
    return dsv3__gram_node_get(b, &item, node);
}

static dsv3_result dsv3__gram_array(dsv3__gram_build *b, const dsv3__gram_conj *c)
{
    dsv3__gram_alt alt;
    uint32_t list;
    memset(&alt, 0, sizeof alt);
    alt.max = DSV3__GRAM_NO_MAX;
    for (uint32_t i = 0; i < c->n; i++) {
        uint32_t schema = DSV3__GRAM_INDEX(c->atoms[i]), n = dsv3__gram_prefix(b, c->atoms[i], &list);
        bool constant = DSV3__GRAM_KIND(c->atoms[i]) == DSV3__GRAM_CONST;
        uint32_t min = constant ? n : dsv3__gram_count(b, schema, "minItems", 0);
        uint32_t max = constant ? n : dsv3__gram_count(b, schema, "maxItems", DSV3__GRAM_NO_MAX);
        alt.n = n > alt.n ? n : alt.n;
        alt.min = min > alt.min ? min : alt.min;
        alt.max = max < alt.max ? max : alt.max;
    }
    alt.first = (uint32_t)b->g->n_children;
    for (uint32_t i = 0; i <= alt.n; i++) {
        uint32_t node;
        DSV3__TRY(dsv3__gram_item(b, c, i, &node));
        DSV3__TRY(DSV3__GRAM_ROOM(b, b->g->children, b->g->cap_children, b->g->n_children, b->g->n_children + 1));
        b->g->children[b->g->n_children++] = node; /* the last is for all others */
    }
    return dsv3__gram_alt_new(b, &alt);
}

/* Order of two names as they are spelled, so that those with a common beginning stand together. */
static int dsv3__gram_name_order(dsv3__str x, dsv3__str y)
{
    size_t i = 0, n = dsv3__min(x.n, y.n);
    char a[6], b[6];
    while (i < n && x.p[i] == y.p[i])
        i++;
    if (i == n)
        return (x.n > n) - (y.n > n);
    if (((unsigned char)x.p[i] | (unsigned char)y.p[i]) >= 0x80)
        return (unsigned char)x.p[i] < (unsigned char)y.p[i] ? -1 : 1;
    size_t n_a = dsv3__gram_spell((unsigned char)x.p[i], a), n_b = dsv3__gram_spell((unsigned char)y.p[i], b);
    int order = memcmp(a, b, dsv3__min(n_a, n_b));
    return order ? order : (n_a > n_b) - (n_a < n_b);
}

/* Adds a name, in order, once. */
static dsv3_result dsv3__gram_name_add(dsv3__gram_build *b, dsv3__str name)
{
    uint64_t lo = 0, hi = b->n_names;
    while (lo < hi) {
        uint64_t mid = (lo + hi) / 2;
        int order = dsv3__gram_name_order(b->names[mid], name);
        if (order == 0)
            return DSV3_OK;
        if (order < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    DSV3__TRY(dsv3__gram_work(b, (b->n_names - lo) / 2));
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->names, b->cap_names, b->n_names, b->n_names + 1));
    memmove(b->names + lo + 1, b->names + lo, (size_t)(b->n_names - lo) * sizeof *b->names);
    b->names[lo] = name;
    b->n_names++;
    return DSV3_OK;
}

/* Adds what an atom says of the value of a key. tuple: where the automata of the object's parts are. */
static dsv3_result dsv3__gram_key_schema(dsv3__gram_build *b, const dsv3__gram_object *o, const uint32_t *tuple,
                                         uint32_t member, const dsv3__str *name, dsv3__gram_conj *c)
{
    uint32_t atom = o->members->atoms[member], at = DSV3__GRAM_INDEX(atom), v;
    bool matched = false;
    if (DSV3__GRAM_KIND(atom) == DSV3__GRAM_CONST) {
        v = name ? dsv3__gram_member(b, at, *name) : 0;
        return dsv3__gram_add(b, c, v ? DSV3__GRAM_ATOM(DSV3__GRAM_CONST, v) : DSV3__GRAM_ATOM(DSV3__GRAM_FALSE, 0));
    }
    v = dsv3__gram_find(b, at, "properties");
    v = v && name ? dsv3__gram_member(b, v, *name) : 0;
    if (v) {
        matched = true;
        DSV3__TRY(dsv3__gram_add_schema(b, c, v));
    }
    for (uint32_t i = 0; i < o->parts.n; i++)
        if (o->schema[i] && o->owner[i] == member && b->g->info[tuple[i]].label) {
            matched = true;
            DSV3__TRY(dsv3__gram_add_schema(b, c, o->schema[i]));
        }
    v = dsv3__gram_find(b, at, "additionalProperties");
    return v && !matched ? dsv3__gram_add_schema(b, c, v) : DSV3_OK;
}

/* A key ends: which is it, and what may its value be? */
static dsv3_result dsv3__gram_key_label(dsv3__gram_build *b, const dsv3__gram_object *o, const uint32_t *tuple,
                                        uint16_t *label)
{
    dsv3_grammar *g = b->g;
    dsv3__gram_alt *alt = o->alt;
    dsv3__gram_conj c;
    uint32_t named = g->info[tuple[1]].label, node, i; /* part 1: the names */
    c.n = 0;
    for (i = 0; i < o->members->n; i++)
        DSV3__TRY(dsv3__gram_key_schema(b, o, tuple, i, named ? &b->names[named - 1] : NULL, &c));
    DSV3__TRY(dsv3__gram_node_get(b, &c, &node));
    *label = 0;
    if (!node)
        return DSV3_OK;
    i = alt->first + (named ? named - 1 : alt->n_named);
    while (!named && i < g->n_keys && g->keys[i].node != node)
        i++;
    if (i == g->n_keys) {
        DSV3__TRY(DSV3__GRAM_ROOM(b, g->keys, g->cap_keys, g->n_keys, g->n_keys + 1));
        memset(&g->keys[g->n_keys++], 0, sizeof *g->keys);
    }
    if (i >= UINT16_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: more than %u keys", (uint64_t)UINT16_MAX);
    g->keys[i].node = node;
    *label = (uint16_t)(i + 1);
    return DSV3_OK;
}

/* The names and the parts that an atom brings to an object's keys. */
static dsv3_result dsv3__gram_object_names(dsv3__gram_build *b, uint32_t atom)
{
    static const char *const lists[] = {"properties", "required", "propertyNames"};
    uint32_t at = DSV3__GRAM_INDEX(atom), v, enumeration;
    if (DSV3__GRAM_KIND(atom) == DSV3__GRAM_CONST) {
        for (v = b->values[at].child; v; v = b->values[v].next)
            DSV3__TRY(dsv3__gram_name_add(b, b->values[v].key));
        return DSV3_OK;
    }
    for (int i = 0; i < 3; i++) {
        uint32_t list = dsv3__gram_find(b, at, lists[i]);
        enumeration = i == 2 && list ? dsv3__gram_find(b, list, "enum") : 0;
        list = i == 2 ? enumeration : list;
        for (v = list ? b->values[list].child : 0; v; v = b->values[v].next)
            if (i == 0 || b->values[v].kind == '"')
                DSV3__TRY(dsv3__gram_name_add(b, i == 0 ? b->values[v].key : b->values[v].text));
    }
    return DSV3_OK;
}

/* propertyNames: patterns, and lists of names. */
static dsv3_result dsv3__gram_object_property_names(dsv3__gram_build *b, dsv3__gram_object *o, uint32_t schema)
{
    uint32_t start;
    if (b->values[schema].kind == 't')
        return DSV3_OK;
    if (b->values[schema].kind == 'f')
        return dsv3__gram_part_add(b, &o->parts, 0);
    for (uint32_t v = b->values[schema].child; v; v = b->values[v].next) {
        dsv3__str key = b->values[v].key;
        if (dsv3__gram_is(key, "pattern") && b->values[v].kind == '"') {
            DSV3__TRY(dsv3__gram_pattern_get(b, v, b->values[v].text, &start));
            DSV3__TRY(dsv3__gram_part_add(b, &o->parts, start));
        } else if (dsv3__gram_is(key, "enum") && b->values[v].kind == '[') {
            DSV3__TRY(dsv3__gram_state_new(b, &start));
            for (uint32_t i = b->values[v].child; i; i = b->values[i].next)
                if (b->values[i].kind == '"')
                    DSV3__TRY(dsv3__gram_scalar_literal(b, start, i));
            DSV3__TRY(dsv3__gram_trim(b, start, (uint32_t)b->g->n_states, &start));
            DSV3__TRY(dsv3__gram_part_add(b, &o->parts, start));
        } else if (!dsv3__gram_is(key, "type") || !(dsv3__gram_type(b, v) & DSV3__GRAM_STRING)) {
            return DSV3__GRAM_REFUSE(b, v, "propertyNames takes pattern, enum and type string");
        }
    }
    return DSV3_OK;
}

/* The automata that read the keys: any string, the names, patternProperties, propertyNames. */
static dsv3_result dsv3__gram_object_parts(dsv3__gram_build *b, dsv3__gram_object *o)
{
    uint32_t start, v;
    o->parts.n = o->parts.groups = 0;
    memset(o->schema, 0, sizeof o->schema);
    DSV3__TRY(dsv3__gram_part_add(b, &o->parts, b->g->string));
    DSV3__TRY(dsv3__gram_state_new(b, &start));
    for (uint64_t i = 0; i < b->n_names; i++) {
        uint32_t state = start;
        DSV3__TRY(dsv3__gram_literal(b, &state, b->names[i], true));
        b->g->info[state].label = (uint16_t)(i + 1);
    }
    DSV3__TRY(dsv3__gram_part_add(b, &o->parts, b->n_names ? start : 0));
    o->parts.part[1].optional = true;
    for (uint32_t i = 0; i < o->members->n; i++) {
        uint32_t at = DSV3__GRAM_INDEX(o->members->atoms[i]);
        if (DSV3__GRAM_KIND(o->members->atoms[i]) == DSV3__GRAM_CONST)
            continue;
        v = dsv3__gram_find(b, at, "patternProperties");
        for (v = v ? b->values[v].child : 0; v; v = b->values[v].next) {
            DSV3__TRY(dsv3__gram_pattern_get(b, v, b->values[v].key, &start));
            DSV3__TRY(dsv3__gram_part_add(b, &o->parts, start));
            o->parts.part[o->parts.n - 1].optional = true;
            o->schema[o->parts.n - 1] = v;
            o->owner[o->parts.n - 1] = i;
        }
        v = dsv3__gram_find(b, at, "propertyNames");
        if (v)
            DSV3__TRY(dsv3__gram_object_property_names(b, o, v));
    }
    return DSV3_OK;
}

/* Is the name among those that an atom requires? */
static bool dsv3__gram_requires(const dsv3__gram_build *b, uint32_t atom, dsv3__str name)
{
    uint32_t at = DSV3__GRAM_INDEX(atom), v;
    if (DSV3__GRAM_KIND(atom) == DSV3__GRAM_CONST)
        return dsv3__gram_member(b, at, name) != 0;
    v = dsv3__gram_find(b, at, "required");
    for (v = v ? b->values[v].child : 0; v && !dsv3__gram_same(b->values[v].text, name);)
        v = b->values[v].next;
    return v != 0;
}

/* Of a key as it is spelled. */
static uint64_t dsv3__gram_key_hash(uint64_t hash, uint8_t c)
{
    return (hash ^ c) * 1099511628211ull;
}
#define DSV3__GRAM_KEY_HASH 14695981039346656037ull

static dsv3_result dsv3__gram_object_alt(dsv3__gram_build *b, const dsv3__gram_conj *c)
{
    dsv3_grammar *g = b->g;
    dsv3__gram_alt alt;
    dsv3__gram_object o;
    memset(&alt, 0, sizeof alt);
    alt.object = true;
    alt.max = DSV3__GRAM_NO_MAX;
    b->n_names = 0;
    for (uint32_t i = 0; i < c->n; i++) {
        uint32_t at = DSV3__GRAM_INDEX(c->atoms[i]);
        DSV3__TRY(dsv3__gram_object_names(b, c->atoms[i]));
        if (DSV3__GRAM_KIND(c->atoms[i]) == DSV3__GRAM_CONST)
            continue;
        uint32_t min = dsv3__gram_count(b, at, "minProperties", 0);
        uint32_t max = dsv3__gram_count(b, at, "maxProperties", DSV3__GRAM_NO_MAX);
        alt.min = min > alt.min ? min : alt.min;
        alt.max = max < alt.max ? max : alt.max;
    }
    alt.first = (uint32_t)g->n_keys;
    alt.n_named = (uint32_t)b->n_names;
    if (g->n_keys + b->n_names >= UINT16_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA, "schema: more than %u keys", (uint64_t)UINT16_MAX);
    DSV3__TRY(DSV3__GRAM_ROOM(b, g->keys, g->cap_keys, g->n_keys, g->n_keys + b->n_names));
    for (uint64_t i = 0; i < b->n_names; i++) {
        dsv3__gram_key *key = &g->keys[g->n_keys++];
        memset(key, 0, sizeof *key);
        key->named = true;
        key->hash = DSV3__GRAM_KEY_HASH;
        for (size_t at = 0, n; at < b->names[i].n; at += n) {
            char spelled[6];
            n = dsv3__utf8_length(b->names[i].p + at, b->names[i].p + b->names[i].n);
            size_t n_spelled = dsv3__gram_spell(dsv3__gram_char(b->names[i].p + at, n), spelled);
            for (size_t k = 0; k < n_spelled; k++)
                key->hash = dsv3__gram_key_hash(key->hash, (uint8_t)spelled[k]);
        }
        for (uint32_t k = 0; k < c->n; k++) {
            uint32_t list = dsv3__gram_find(b, DSV3__GRAM_INDEX(c->atoms[k]), "required");
            DSV3__TRY(dsv3__gram_work(b, 4 * (b->values[list].n + b->values[DSV3__GRAM_INDEX(c->atoms[k])].n)));
            key->required = key->required || dsv3__gram_requires(b, c->atoms[k], b->names[i]);
        }
        alt.n_required += key->required;
    }
    o.alt = &alt;
    o.members = c;
    o.label_fn = dsv3__gram_key_label;
    DSV3__TRY(dsv3__gram_object_parts(b, &o));
    DSV3__TRY(dsv3__gram_product(b, o.parts.part, o.parts.n, &o, &alt.start));
    alt.end = (uint32_t)g->n_states;
    alt.n = (uint32_t)g->n_keys - alt.first;
    return dsv3__gram_alt_new(b, &alt);
}

/* All of a node. */
static dsv3_result dsv3__gram_node_build(dsv3__gram_build *b, uint32_t index)
{
    dsv3__gram_node node;
    dsv3__gram_parts parts;
    dsv3__gram_conj c;
    uint32_t steps = 0, types;
    const dsv3__tok_span span = b->conjs.spans[index - 1];
    memset(&node, 0, sizeof node);
    node.alts = (uint32_t)b->g->n_alts;
    node.lengths = (uint32_t)b->g->n_lengths;
    parts.n = parts.groups = 0;
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->spread, b->cap_spread, 0, 1));
    b->n_spread = 1;
    b->spread->done = 0;
    b->spread->n = span.n;
    memcpy(b->spread->atoms, b->conjs.items + span.at, span.n * sizeof *b->spread->atoms);
    for (;;) {
        DSV3__TRY(dsv3__gram_spread_next(b, &steps, &c, &types));
        if (!types)
            break;
        if (types & DSV3__GRAM_SCALARS)
            DSV3__TRY(dsv3__gram_scalars(b, &c, types, &node, &parts));
        if (types & DSV3__GRAM_ARRAY)
            DSV3__TRY(dsv3__gram_array(b, &c));
        if (types & DSV3__GRAM_OBJECT)
            DSV3__TRY(dsv3__gram_object_alt(b, &c));
    }
    if (parts.n)
        DSV3__TRY(dsv3__gram_product(b, parts.part, parts.n, NULL, &node.scalar));
    node.n_alts = (uint32_t)b->g->n_alts - node.alts;
    if (node.n_alts + node.n_lengths > DSV3__GRAM_THREADS_MAX)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA,
                          "schema: a value with more than %u alternatives that are arrays or objects",
                          (uint64_t)DSV3__GRAM_THREADS_MAX);
    b->g->nodes[index] = node;
    return DSV3_OK;
}

// ---- What a value takes at least -------------------------------------------------------------------------

static void dsv3__gram_need_max(const dsv3__gram_node *n, uint32_t *depth, uint32_t *keys)
{
    *depth = n->depth > *depth ? n->depth : *depth;
    *keys = n->keys > *keys ? n->keys : *keys;
}

/* The node of item `index`. */
static uint32_t dsv3__gram_item_node(const dsv3_grammar *g, const dsv3__gram_alt *a, uint32_t index)
{
    return g->children[a->first + (index < a->n ? index : a->n)];
}

/* Needs of an alternative from those of its nodes. NEVER where a value it must have cannot be. */
static void dsv3__gram_need_alt(const dsv3_grammar *g, dsv3__gram_alt *a)
{
    uint32_t depth = 0, keys = 0, more = 0, unnamed = 0;
    a->open_depth = a->open_keys = 0;
    for (uint32_t i = 0; !a->object && i < a->min && i <= a->n; i++)
        dsv3__gram_need_max(&g->nodes[dsv3__gram_item_node(g, a, i)], &depth, &keys);
    for (uint32_t i = 0; a->object && i < a->n; i++) {
        const dsv3__gram_key *k = &g->keys[a->first + i];
        const dsv3__gram_node *n = &g->nodes[k->node];
        if (k->required || (n->depth != DSV3__GRAM_NEVER && a->min > a->n_required))
            dsv3__gram_need_max(n, &depth, &keys);
        if (n->depth == DSV3__GRAM_NEVER)
            continue;
        more += k->named;
        if (!k->named) {
            unnamed = 1;
            dsv3__gram_need_max(n, &a->open_depth, &a->open_keys);
        }
    }
    a->reserved = a->object ? (a->min > a->n_required ? a->min : a->n_required) : 0;
    if (a->min > a->max || (a->object && (a->n_required > a->max || (!unnamed && more < a->min))))
        depth = DSV3__GRAM_NEVER;
    a->depth = depth >= DSV3__GRAM_DEPTH_MAX || a->reserved > DSV3__GRAM_KEYS_MAX ? DSV3__GRAM_NEVER : depth + 1;
    a->keys = keys > DSV3__GRAM_KEYS_MAX ? DSV3__GRAM_NEVER : a->reserved + keys;
}

/* Needs of all nodes: depths fall from "never" to the least there is; then the keys of the way that is so shallow. */
static void dsv3__gram_needs(dsv3_grammar *g)
{
    for (uint32_t i = 0; i < g->n_nodes; i++) {
        dsv3__gram_node *n = &g->nodes[i];
        n->depth = n->keys = n->scalar || n->n_lengths ? 0 : DSV3__GRAM_NEVER;
    }
    for (int keys = 0; keys < 2; keys++)
        for (bool again = true; again;) {
            again = false;
            for (uint32_t i = (uint32_t)g->n_nodes; i-- > 0;) {
                dsv3__gram_node *n = &g->nodes[i];
                for (uint32_t k = n->alts; k < n->alts + n->n_alts; k++) {
                    dsv3__gram_alt *a = &g->alts[k];
                    dsv3__gram_need_alt(g, a);
                    bool better = a->depth < n->depth, changed = keys && n->depth && n->best == k && a->keys != n->keys;
                    if (better)
                        n->depth = a->depth, n->best = k;
                    if (changed)
                        n->keys = a->keys;
                    again = again || better || changed;
                }
            }
        }
}

/* Keys whose value cannot be are taken out; which keys can still be reached from each state. */
static dsv3_result dsv3__gram_finish_keys(dsv3__gram_build *b, dsv3__gram_alt *a)
{
    dsv3_grammar *g = b->g;
    uint32_t first = a->start;
    for (uint32_t i = 0; i < a->n; i++)
        if (g->nodes[g->keys[a->first + i].node].depth == DSV3__GRAM_NEVER)
            g->keys[a->first + i].node = 0;
    for (uint32_t s = first; s < a->end; s++)
        if (g->info[s].label && !g->keys[g->info[s].label - 1].node)
            g->info[s].label = 0;
    DSV3__TRY(dsv3__gram_trim(b, first, a->end, &a->start));
    for (uint32_t s = first; s < a->end; s++) {
        dsv3__gram_info *info = &g->info[s];
        info->first = UINT16_MAX;
        if (info->label && g->keys[info->label - 1].named)
            info->first = (uint16_t)(info->label - 1), info->last = info->label;
        else if (info->label)
            info->open = 1; /* here, how many unnamed ones: up to OPEN */
    }
    for (bool again = true; again;) {
        again = false;
        DSV3__TRY(dsv3__gram_work(b, (uint64_t)(a->end - first) * 256));
        for (uint32_t s = a->end; s-- > first;) {
            dsv3__gram_info *info = &g->info[s];
            const uint16_t *row = g->next + (size_t)s * 256;
            uint32_t open = info->label && !g->keys[info->label - 1].named;
            for (int c = 0; c < 256; c++) {
                const dsv3__gram_info *to = &g->info[row[c]];
                if (!row[c])
                    continue;
                open += to->open;
                if (to->first < info->first)
                    info->first = to->first, again = true;
                if (to->last > info->last)
                    info->last = to->last, again = true;
            }
            open = open < DSV3__GRAM_OPEN ? open : (uint32_t)DSV3__GRAM_OPEN;
            if (open != info->open)
                info->open = (uint8_t)open, again = true;
        }
    }
    for (uint32_t s = first; s < a->end; s++) {
        dsv3__gram_info *info = &g->info[s];
        if (info->open && info->open < DSV3__GRAM_OPEN && !info->final)
            return DSV3__FAIL(
                b->err, DSV3_ERROR_SCHEMA,
                "schema: patternProperties or propertyNames that leave few names: name them in properties");
        info->open = info->open == DSV3__GRAM_OPEN;
    }
    return DSV3_OK;
}

/* In which states is the going on of a string free? Where every byte that any string may have leads on to such a state. */
static dsv3_result dsv3__gram_finish_free(dsv3__gram_build *b)
{
    dsv3_grammar *g = b->g;
    uint32_t n = (uint32_t)g->n_states, *beside; /* the state of any string beside each state; 0: none */
    DSV3__TRY(DSV3__GRAM_ROOM(b, b->set, b->cap_set, 0, n));
    beside = b->set;
    memset(beside, 0, n * sizeof *beside);
    beside[g->string] = g->string;
    for (uint32_t i = 0; i < g->n_nodes; i++)
        beside[g->nodes[i].scalar] = g->string;
    for (uint32_t i = 0; i < g->n_alts; i++)
        beside[g->alts[i].object ? g->alts[i].start : 0] = g->string;
    beside[0] = 0;
    for (uint32_t s = 1; s < n; s++)
        g->info[s].free = 0;
    for (bool again = true; again;) { /* one pass: states stand behind those that found them, nearly all */
        again = false;
        DSV3__TRY(dsv3__gram_work(b, (uint64_t)n * 64));
        for (uint32_t s = 1; s < n; s++) {
            const uint16_t *row = g->next + (size_t)s * 256, *any = g->next + (size_t)beside[s] * 256;
            for (uint32_t c = 0, last = 0; beside[s] && c < 256; c++) {
                uint32_t to = row[c], too = any[c], both = to << 16 | too;
                if (both == last || !to || !too)
                    continue;
                last = both;
                if (to < s) /* `free`, meanwhile: 1 as said, 2 that a later state leads here */
                    g->info[to].free = 2;
                if (beside[to])
                    continue;
                beside[to] = too;
                again = again || to < s;
            }
        }
    }
    for (uint32_t s = 1; s < n; s++)
        g->info[s].free |= beside[s] != 0;
    for (bool again = true; again;) { /* from the last: again only where a state changes that a later one leads to */
        again = false;
        DSV3__TRY(dsv3__gram_work(b, (uint64_t)n * 64));
        for (uint32_t s = n; s-- > 1;) {
            const uint16_t *row = g->next + (size_t)s * 256, *any = g->next + (size_t)beside[s] * 256;
            bool on = g->info[s].free & 1, was = on;
            for (uint32_t c = 0, last = 0; on && c < 256; c++) {
                uint32_t to = row[c], too = any[c], both = to << 16 | too;
                if (both == last || !too || g->info[too].final)
                    continue;
                last = both;
                on = to && (g->info[to].free & 1) && beside[to] == too;
            }
            again = again || (was && !on && (g->info[s].free & 2));
            g->info[s].free = (uint8_t)((g->info[s].free & 2) | on);
        }
    }
    for (uint32_t s = 1; s < n; s++)
        g->info[s].free = (g->info[s].free & 1) && beside[s] == g->body;
    return DSV3_OK;
}

#define DSV3__GRAM_SEP 0xFF /* in no text */

/* What may stand before arguments: the name of a tool as the markup writes it, and what is between. Its end is labelled
   with the node of that tool's arguments. */
static dsv3_result dsv3__gram_head(dsv3__gram_build *b, uint32_t tool, dsv3_markup markup, uint32_t any)
{
    dsv3_grammar *g = b->g;
    const bool kimi = markup == DSV3_MARKUP_KIMI_K2_THINKING;
    const uint32_t function = dsv3__gram_find(b, tool, "function");
    const uint32_t name = dsv3__gram_find(b, function, "name"), schema = dsv3__gram_find(b, function, "parameters");
    const dsv3__str text = b->values[name].text;
    dsv3__str before, behind;
    dsv3__gram_conj arguments;
    uint32_t state = g->head, node, end;
    if (b->values[name].kind != '"' || !text.n || text.n > DSV3__CHAT_NAME_MAX || memchr(text.p, '\n', text.n) ||
        memchr(text.p, ':', text.n))
        return DSV3__GRAM_REFUSE(b, tool, "expected a function with a name of 1 to 255 bytes, no colon, no newline");
    before.p = "functions.";
    before.n = kimi ? 10 : 0;
    behind.p = kimi ? ":" : markup == DSV3_MARKUP_V3_1 ? "\xFF" : "\n```json\n";
    behind.n = strlen(behind.p);
    DSV3__TRY(dsv3__gram_literal(b, &state, before, false));
    DSV3__TRY(dsv3__gram_literal(b, &state, text, false));
    DSV3__TRY(dsv3__gram_literal(b, &state, behind, false));
    if (kimi) { /* and the number of the call, of three digits at most */
        if (g->next[(size_t)state * 256 + '0'])
            return DSV3__GRAM_REFUSE(b, tool, "a name that another tool has");
        DSV3__TRY(dsv3__gram_state_new(b, &end));
        for (uint32_t k = 0, digit; k < 3; k++, state = digit) {
            DSV3__TRY(dsv3__gram_state_new(b, &digit));
            for (int c = '0'; c <= '9'; c++)
                g->next[(size_t)state * 256 + (size_t)c] = (uint16_t)digit;
            g->next[(size_t)digit * 256 + DSV3__GRAM_SEP] = (uint16_t)end;
        }
        state = end;
    }
    arguments.n = 0;
    b->values[schema].whole = schema != 0;
    DSV3__TRY(dsv3__gram_add_schema(b, &arguments, schema ? schema : any));
    DSV3__TRY(dsv3__gram_node_get(b, &arguments, &node));
    if (!node || g->info[state].label)
        return DSV3__GRAM_REFUSE(b, tool, node ? "a name that another tool has" : "arguments that no value can fit");
    g->info[state].label = (uint16_t)node;
    return DSV3_OK;
}

/* The heads of all tools of a list that has been read. */
static dsv3_result dsv3__gram_heads(dsv3__gram_build *b, dsv3_markup markup)
{
    const uint32_t any = (uint32_t)b->n_values;
    DSV3__TRY(dsv3__gram_state_new(b, &b->g->head));
    DSV3__TRY(
        DSV3__GRAM_ROOM(b, b->values, b->cap_values, any, any + 2)); /* {"type": "object"}, where one says nothing */
    memset(b->values + any, 0, 2 * sizeof *b->values);
    b->n_values += 2;
    dsv3__gram_value *object = &b->values[any], *type = object + 1;
    object->kind = '{', object->n = 1, object->child = any + 1, object->parent = 1, object->whole = true;
    type->kind = '"', type->parent = any;
    type->key.p = "type", type->key.n = 4;
    type->text.p = "object", type->text.n = 6;
    if (b->values[1].kind != '[' || !b->values[1].n)
        return DSV3__GRAM_REFUSE(b, 1, "expected a list of tools");
    for (uint32_t v = b->values[1].child; v; v = b->values[v].next)
        DSV3__TRY(dsv3__gram_head(b, v, markup, any));
    return DSV3_OK;
}

/* From the schema to the automaton. schema NULL: any value. markup not AUTO: it is a list of tools. */
static dsv3_result dsv3__gram_compile(dsv3__gram_build *b, const char *schema, size_t len, dsv3_markup markup)
{
    dsv3_grammar *g = b->g;
    dsv3__gram_conj root;
    dsv3__str empty = {"", 0};
    uint32_t node;
    DSV3__TRY(dsv3__gram_read(b, schema ? schema : "true", schema ? len : 4));
    DSV3__TRY(dsv3__gram_state_new(b, &node)); /* number 0 is none, among nodes too */
    DSV3__TRY(DSV3__GRAM_ROOM(b, g->nodes, g->cap_nodes, 0, 1));
    memset(g->nodes, 0, sizeof *g->nodes);
    g->n_nodes = 1;
    DSV3__TRY(dsv3__gram_pattern(b, empty, 1, &g->string));
    g->body = g->next[(size_t)g->string * 256 + '"'];
    root.n = 0;
    if (markup) {
        DSV3__TRY(dsv3__gram_heads(b, markup));
        node = (uint32_t)g->n_nodes - 1; /* those of the tools are the first ones */
    } else {
        DSV3__TRY(dsv3__gram_add_schema(b, &root, 1));
        DSV3__TRY(dsv3__gram_node_get(b, &root, &node));
    }
    const uint32_t last = node;
    for (uint32_t i = 1; i < g->n_nodes; i++)
        DSV3__TRY(dsv3__gram_node_build(b, i));
    dsv3__gram_needs(g);
    for (uint64_t i = 0; i < b->n_apart; i++)
        if (g->nodes[b->apart[i].node].depth != DSV3__GRAM_NEVER)
            return DSV3__GRAM_REFUSE(b, b->apart[i].value, "oneOf: this option and one before it may both hold");
    for (uint32_t i = 1; i < last && node; i++)
        node = g->nodes[i].depth > g->max_depth ? i : node;
    if (!node || g->nodes[node].depth > g->max_depth)
        return DSV3__FAIL(b->err, DSV3_ERROR_SCHEMA,
                          "schema: no value can fit it, or none that is %u deep and has %u keys",
                          (uint64_t)g->max_depth, (uint64_t)DSV3__GRAM_KEYS_MAX);
    for (uint32_t i = 0; i < g->n_alts; i++)
        if (g->alts[i].object)
            DSV3__TRY(dsv3__gram_finish_keys(b, &g->alts[i]));
    return dsv3__gram_finish_free(b);
}

// ---- The vocabulary --------------------------------------------------------------------------------------

/* A token to be sorted: its first eight bytes, most significant first, nearly always say enough. */
typedef struct dsv3__gram_sort {
    uint64_t head;
    int32_t token;
    uint32_t n; /* bytes */
} dsv3__gram_sort;

static uint8_t dsv3__gram_sort_byte(const dsv3_tokenizer *t, const dsv3__gram_sort *x, size_t i)
{
    return i < 8 ? (uint8_t)(x->head >> (56 - 8 * i)) : (uint8_t)t->pool[t->spans[x->token].at + i];
}

static bool dsv3__gram_sort_before(const dsv3_tokenizer *t, const dsv3__gram_sort *x, const dsv3__gram_sort *y)
{
    const char *a = t->pool + t->spans[x->token].at, *b = t->pool + t->spans[y->token].at;
    int order = memcmp(a, b, x->n < y->n ? x->n : y->n);
    return order ? order < 0 : x->n < y->n;
}

/* Merges runs of growing length, to and fro between `list` and `other` [n]; what is in order ends up in `list`. */
static void dsv3__gram_sort_merge(const dsv3_tokenizer *t, dsv3__gram_sort *list, dsv3__gram_sort *other, size_t n)
{
    for (size_t run = 1; run < n; run *= 2) {
        for (size_t at = 0; at < n; at += 2 * run) {
            size_t i = at, mid = dsv3__min(at + run, n), k = mid, end = dsv3__min(at + 2 * run, n);
            for (size_t to = at; to < end; to++)
                other[to] =
                    i < mid && (k == end || !dsv3__gram_sort_before(t, &list[k], &list[i])) ? list[i++] : list[k++];
        }
        memcpy(list, other, n * sizeof *list);
    }
}

/* By their heads byte for byte, from the last; those with equal heads by all of their bytes. In order in `list`. */
static void dsv3__gram_sort_all(const dsv3_tokenizer *t, dsv3__gram_sort *list, dsv3__gram_sort *other, size_t n)
{
    for (int shift = 0; shift < 64; shift += 8) {
        size_t at[257];
        memset(at, 0, sizeof at);
        for (size_t i = 0; i < n; i++)
            at[(list[i].head >> shift & 255) + 1]++;
        for (int c = 0; c < 256; c++)
            at[c + 1] += at[c];
        for (size_t i = 0; i < n; i++)
            other[at[list[i].head >> shift & 255]++] = list[i];
        dsv3__gram_sort *swap = list; /* an even number of times */
        list = other;
        other = swap;
    }
    for (size_t i = 0, end; i < n; i = end) {
        for (end = i + 1; end < n && list[end].head == list[i].head;)
            end++;
        dsv3__gram_sort_merge(t, list + i, other + i, end - i);
    }
}

/* The trie of sorted tokens; out NULL only counts its nodes. */
static uint32_t dsv3__gram_trie(const dsv3_tokenizer *t, const dsv3__gram_sort *list, size_t n, dsv3__gram_token *out)
{
    uint32_t n_nodes = 0, open[DSV3__TOK_BYTES_MAX + 1]; /* nodes on the way to the last token */
    size_t depth = 0;
    for (size_t i = 0; i < n; i++) {
        const dsv3__gram_sort *x = &list[i];
        size_t same = 0, most = i ? dsv3__min(x->n - 1, list[i - 1].n) : 0; /* equal tokens: the last node twice */
        while (same < most && dsv3__gram_sort_byte(t, x, same) == dsv3__gram_sort_byte(t, x - 1, same))
            same++;
        n_nodes += (uint32_t)(x->n - same);
        if (!out)
            continue;
        uint32_t next = n_nodes - (uint32_t)(x->n - same);
        for (; depth > same; depth--)
            out[open[depth]].end = next;
        for (depth = same; depth < x->n; next++) {
            dsv3__gram_token *node = &out[next];
            open[++depth] = next;
            node->token = depth == x->n ? x->token : -1;
            node->depth = (uint16_t)depth;
            node->byte = dsv3__gram_sort_byte(t, x, depth - 1);
            node->quote = 0;
        }
    }
    for (; depth > 0; depth--)
        out[open[depth]].end = n_nodes;
    return n_nodes;
}

/* Which tokens go through a string that is free, and in which one ends. chars_of: scratch, [n_tokens] */
static void dsv3__gram_vocab_free(dsv3_grammar *g, uint16_t *chars_of)
{
    dsv3__gram_vocab *v = &g->vocab;
    uint32_t state[DSV3__TOK_BYTES_MAX + 1], chars[DSV3__TOK_BYTES_MAX + 1], open[DSV3__TOK_BYTES_MAX + 1];
    memset(chars_of, 0, v->n_tokens * sizeof *chars_of);
    memset(v->chars, 0, sizeof v->chars);
    state[0] = g->body;
    chars[0] = 0;
    for (uint32_t i = 0; i < v->n; i++) {
        const dsv3__gram_token *node = &v->trie[i];
        uint32_t d = node->depth, from = state[d - 1], to = g->next[(size_t)from * 256 + node->byte];
        open[d] = i;
        state[d] = g->info[to].final ? 0 : to;
        chars[d] = chars[d - 1] + (from == g->body && chars[d - 1] < 255);
        if (g->info[to].final)
            for (uint32_t k = d; k > 0 && !v->trie[open[k]].quote; k--)
                v->trie[open[k]].quote = 1;
        if (node->token >= 0 && state[d]) {
            v->pure[node->token / 32] |= 1u << (node->token % 32);
            chars_of[node->token] = (uint16_t)(chars[d] + 1);
            v->chars[chars[d] + 1]++;
        }
    }
    for (uint32_t c = 0; c < 256; c++)
        v->chars[c + 1] += v->chars[c];
    for (uint32_t i = 0; i < v->n_tokens; i++)
        if (chars_of[i])
            v->by_chars[v->chars[chars_of[i] - 1]++] = i;
    memmove(v->chars + 1, v->chars, 256 * sizeof *v->chars); /* they have moved on to where the next ones begin */
    v->chars[0] = 0;
}

static dsv3_result dsv3__gram_vocab_open(dsv3__gram_build *b, const dsv3_tokenizer *t)
{
    dsv3__gram_vocab *v = &b->g->vocab;
    dsv3__gram_sort *list = NULL, *other = NULL;
    uint64_t cap = 0, cap_other = 0, cap_trie = 0, cap_pure = 0, cap_chars = 0;
    size_t n = 0, words = (t->n_tokens + 31) / 32;
    v->n_tokens = t->n_tokens;
    dsv3_result r = DSV3__GRAM_ROOM(b, list, cap, 0, t->n_tokens);
    if (!r)
        r = DSV3__GRAM_ROOM(b, other, cap_other, 0, t->n_tokens);
    for (uint32_t i = 0; !r && i < t->n_tokens; i++) {
        dsv3__tok_span s = t->spans[i];
        if (s.n == 0 || s.n > DSV3__TOK_BYTES_MAX || (t->flags[i] & DSV3__TOK_ADDED)) /* markup is never text */
            continue;
        list[n].token = (int32_t)i;
        list[n].n = s.n;
        list[n].head = 0;
        for (uint32_t k = 0; k < 8; k++)
            list[n].head = list[n].head << 8 | (k < s.n ? (uint8_t)t->pool[s.at + k] : 0u);
        n++;
    }
    if (!r) {
        dsv3__gram_sort_all(t, list, other, n);
        v->n = dsv3__gram_trie(t, list, n, NULL);
        r = DSV3__GRAM_ROOM(b, v->trie, cap_trie, 0, v->n);
        if (!r)
            dsv3__gram_trie(t, list, n, v->trie);
    }
    if (!r)
        r = DSV3__GRAM_ROOM(b, v->pure, cap_pure, 0, words);
    if (!r)
        r = DSV3__GRAM_ROOM(b, v->by_chars, cap_chars, 0, t->n_tokens);
    if (!r) {
        memset(v->pure, 0, words * sizeof *v->pure);
        dsv3__gram_vocab_free(b->g, (uint16_t *)(void *)other);
    }
    dsv3__mem_free(&b->g->mem, list);
    dsv3__mem_free(&b->g->mem, other);
    return r;
}

// ---- One byte --------------------------------------------------------------------------------------------

/* Where a text is. VALUE: the current threads are nodes; LEXEME, KEY: states; COLON: nodes of the value to come. */
enum {
    DSV3__GRAM_AT_VALUE,
    DSV3__GRAM_AT_FIRST_ITEM,
    DSV3__GRAM_AT_LEXEME,
    DSV3__GRAM_AT_FIRST_KEY,
    DSV3__GRAM_AT_NEXT_KEY,
    DSV3__GRAM_AT_KEY,
    DSV3__GRAM_AT_COLON,
    DSV3__GRAM_AT_AFTER,
    DSV3__GRAM_AT_END,
    DSV3__GRAM_AT_EOS,
    DSV3__GRAM_AT_HEAD /* the only thread is a state of it */
};

/* Only what is in use of a state is copied. */
static void dsv3__gram_state_copy(dsv3_grammar_state *to, const dsv3_grammar_state *from)
{
    memcpy(to, from, offsetof(dsv3_grammar_state, frames));
    memcpy(to->frames, from->frames, from->depth * sizeof *to->frames);
    memcpy(to->threads, from->threads, from->n_threads * sizeof *to->threads);
    memcpy(to->keys, from->keys, from->n_keys * sizeof *to->keys);
}

static bool dsv3__gram_fits(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t depth, uint32_t keys)
{
    return depth <= g->max_depth && s->depth + depth <= g->max_depth && keys <= DSV3__GRAM_KEYS_MAX &&
           s->n_keys + keys <= DSV3__GRAM_KEYS_MAX;
}

/* Adds a current thread; one that is there already lives on for these parents too. There is always room for one: the
   frames that may still be opened leave it. */
static void dsv3__gram_thread_add(dsv3_grammar_state *s, uint32_t id, uint32_t parents, uint32_t length)
{
    uint32_t room = (uint32_t)DSV3__GRAM_THREADS_ALL - s->first - ((uint32_t)DSV3__GRAM_DEPTH_MAX - s->depth),
             i = s->first;
    while (i < s->n_threads && (s->threads[i].id != id || s->threads[i].count != length))
        i++;
    if (i == s->n_threads) {
        if (i - s->first >= DSV3__GRAM_THREADS_MAX || i - s->first >= room)
            return;
        s->threads[i].id = id;
        s->threads[i].parents = 0;
        s->threads[i].count = length;
        s->n_threads++;
    }
    s->threads[i].parents |= parents;
}

/* Which value comes next, for the threads of the array in `mask`: nodes as current threads. Only asks where !add. */
static bool dsv3__gram_items(const dsv3_grammar *g, dsv3_grammar_state *s, uint32_t mask, uint32_t count, bool add)
{
    const uint32_t first = s->frames[s->depth - 1].first, n = s->frames[s->depth - 1].n;
    bool any = false;
    for (uint32_t i = 0; i < n; i++) {
        const dsv3__gram_alt *a = &g->alts[s->threads[first + i].id];
        uint32_t node = dsv3__gram_item_node(g, a, count);
        if (!(mask >> i & 1) || count >= a->max || !dsv3__gram_fits(g, s, g->nodes[node].depth, g->nodes[node].keys))
            continue;
        any = true;
        if (add)
            dsv3__gram_thread_add(s, node, (uint32_t)1 << i, 0);
    }
    return any;
}

/* Keys of the object that a thread would have room for once another one, `required` or not, is in; 0: it may not be. */
static uint32_t dsv3__gram_key_room(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t thread, uint32_t count,
                                    bool required)
{
    const dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    const dsv3__gram_alt *a = &g->alts[s->threads[f->first + thread].id];
    uint32_t members = count + 1 + a->n_required - s->threads[f->first + thread].count - required, most = 0, room;
    for (uint32_t i = 0; i < f->n; i++) {
        const dsv3__gram_alt *other = &g->alts[s->threads[f->first + i].id];
        most = other->keys - other->reserved > most ? other->keys - other->reserved : most;
    }
    room = f->keys + members > s->n_keys ? f->keys + members : s->n_keys;
    return members <= a->max && room + most <= DSV3__GRAM_KEYS_MAX ? room : 0;
}

/* May this thread's object have this key now? hash: of the key as it stands. */
static bool dsv3__gram_key_fits(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t thread, uint32_t key,
                                uint64_t hash, uint32_t count)
{
    const dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    const dsv3__gram_key *k = &g->keys[key];
    const dsv3__gram_node *n = &g->nodes[k->node];
    uint32_t room = k->node && n->depth <= g->max_depth ? dsv3__gram_key_room(g, s, thread, count, k->required) : 0;
    for (uint32_t i = 0; i < count && room; i++)
        if (s->keys[f->keys + i] == hash)
            return false;
    return room && s->depth + n->depth <= g->max_depth && room + n->keys <= DSV3__GRAM_KEYS_MAX;
}

/* Is there a key that can be reached from this state and may be had? */
static bool dsv3__gram_key_open(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t thread, uint32_t state,
                                uint32_t count)
{
    const dsv3__gram_info *info = &g->info[state];
    const dsv3__gram_alt *a = &g->alts[s->threads[s->frames[s->depth - 1].first + thread].id];
    if (info->open) {
        uint32_t room = dsv3__gram_key_room(g, s, thread, count, false);
        if (room && a->open_depth <= g->max_depth && s->depth + a->open_depth <= g->max_depth &&
            room + a->open_keys <= DSV3__GRAM_KEYS_MAX)
            return true;
    }
    for (uint32_t k = info->first; k < info->last; k++)
        if (dsv3__gram_key_fits(g, s, thread, k, g->keys[k].hash, count))
            return true;
    return false;
}

static uint32_t dsv3__gram_lowest(uint32_t mask)
{
    uint32_t i = 0;
    while (!(mask >> i & 1))
        i++;
    return i;
}

/* The state of a current thread behind one more byte of its lexeme, 0: it ends. chars: so far, of a bounded string. */
static uint32_t dsv3__gram_lexeme_next(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t thread,
                                       uint32_t state, uint32_t chars, uint8_t c)
{
    const dsv3_grammar_thread *t = &s->threads[s->first + thread];
    uint32_t to = g->next[(size_t)state * 256 + c];
    if (!to)
        return 0;
    if (s->place == DSV3__GRAM_AT_KEY) {
        uint32_t parent = dsv3__gram_lowest(t->parents), count = s->frames[s->depth - 1].count;
        bool ok = g->info[to].label ? dsv3__gram_key_fits(g, s, parent, g->info[to].label - 1u, s->hash, count)
                                    : dsv3__gram_key_open(g, s, parent, to, count);
        return ok ? to : 0;
    }
    if (t->count && state == g->body) {
        const dsv3__gram_length *l = &g->lengths[t->count - 1];
        return (c == '"' ? chars >= l->min : chars < l->max) ? to : 0;
    }
    return to;
}

/* Threads of the innermost frame that are not in the mask are dropped. */
static void dsv3__gram_keep(dsv3_grammar_state *s, uint32_t mask)
{
    dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    uint32_t n = 0;
    for (uint32_t i = 0; i < f->n; i++)
        if (mask >> i & 1)
            s->threads[f->first + n++] = s->threads[f->first + i];
    f->n = (uint16_t)n;
    s->first = s->n_threads = (uint16_t)(f->first + n);
}

/* A value is complete, for these threads of the frame around it. */
static void dsv3__gram_complete(dsv3_grammar_state *s, uint32_t mask)
{
    if (s->depth == 0) {
        s->place = DSV3__GRAM_AT_END;
        s->first = s->n_threads = 0;
        return;
    }
    dsv3__gram_keep(s, mask);
    s->frames[s->depth - 1].count++;
    s->place = DSV3__GRAM_AT_AFTER;
}

/* Threads in `mask` of the innermost frame that may end with `count` items or members. */
static uint32_t dsv3__gram_closable(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t mask, uint32_t count)
{
    const dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    uint32_t out = 0;
    for (uint32_t i = 0; i < f->n; i++) {
        const dsv3_grammar_thread *t = &s->threads[f->first + i];
        const dsv3__gram_alt *a = &g->alts[t->id];
        if ((mask >> i & 1) && count >= a->min && (!a->object || t->count == a->n_required))
            out |= (uint32_t)1 << i;
    }
    return out;
}

static void dsv3__gram_close(dsv3_grammar_state *s, uint32_t mask)
{
    dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    uint32_t parents = 0;
    for (uint32_t i = 0; i < f->n; i++)
        if (mask >> i & 1)
            parents |= s->threads[f->first + i].parents;
    s->n_keys = f->keys;
    s->depth--;
    dsv3__gram_complete(s, parents);
}

/* May `c` stand behind a value, with `count` in the frame by now, for these threads? */
static bool dsv3__gram_after(const dsv3_grammar *g, dsv3_grammar_state *s, uint32_t mask, uint32_t count, uint8_t c)
{
    if (s->depth == 0)
        return false;
    const dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    if (c == (f->object ? '}' : ']'))
        return dsv3__gram_closable(g, s, mask, count) != 0;
    if (c != ',')
        return g->spacing == DSV3_SPACING_ANY && (c == ' ' || c == '\n' || c == '\t' || c == '\r');
    if (!f->object)
        return dsv3__gram_items(g, s, mask, count, false);
    for (uint32_t i = 0; i < f->n; i++)
        if ((mask >> i & 1) && dsv3__gram_key_open(g, s, i, g->alts[s->threads[f->first + i].id].start, count))
            return true;
    return false;
}

/* Can one of the current nodes be an array, or an object? */
static bool dsv3__gram_enterable(const dsv3_grammar *g, const dsv3_grammar_state *s, bool object)
{
    for (uint32_t i = s->first; i < s->n_threads; i++) {
        const dsv3__gram_node *node = &g->nodes[s->threads[i].id];
        for (uint32_t k = 0; k < node->n_alts; k++) {
            const dsv3__gram_alt *a = &g->alts[node->alts + k];
            if (a->object == object && dsv3__gram_fits(g, s, a->depth, a->keys))
                return true;
        }
    }
    return false;
}

/* A thread for each alternative of this kind of the current nodes; a frame for them. */
static void dsv3__gram_enter(const dsv3_grammar *g, dsv3_grammar_state *s, bool object)
{
    dsv3_grammar_thread now[DSV3__GRAM_THREADS_MAX];
    uint32_t n = (uint32_t)s->n_threads - s->first, reserved = 0;
    memcpy(now, s->threads + s->first, n * sizeof *now);
    s->n_threads = s->first;
    for (uint32_t i = 0; i < n; i++) {
        const dsv3__gram_node *node = &g->nodes[now[i].id];
        for (uint32_t k = 0; k < node->n_alts; k++) {
            const dsv3__gram_alt *a = &g->alts[node->alts + k];
            if (a->object != object || !dsv3__gram_fits(g, s, a->depth, a->keys))
                continue;
            dsv3__gram_thread_add(s, node->alts + k, now[i].parents, 0);
        }
    }
    for (uint32_t i = s->first; i < s->n_threads; i++)
        if (g->alts[s->threads[i].id].reserved > reserved)
            reserved = g->alts[s->threads[i].id].reserved;
    n = s->n_threads;
    s->n_threads = s->first;
    for (uint32_t i = s->first; i < n; i++) { /* what one has reserved must leave the others room for their values */
        const dsv3__gram_alt *a = &g->alts[s->threads[i].id];
        if (s->n_keys + reserved + a->keys - a->reserved <= DSV3__GRAM_KEYS_MAX)
            s->threads[s->n_threads++] = s->threads[i];
    }
    dsv3_grammar_frame *f = &s->frames[s->depth++];
    f->first = s->first;
    f->n = (uint16_t)(s->n_threads - s->first);
    f->object = object;
    f->keys = s->n_keys;
    f->count = 0;
    s->n_keys = (uint16_t)(s->n_keys + reserved);
    s->first = s->n_threads;
    s->place = object ? DSV3__GRAM_AT_FIRST_KEY : DSV3__GRAM_AT_FIRST_ITEM;
    if (!object)
        dsv3__gram_items(g, s, UINT32_MAX, 0, true);
}

/* A key has ended, the current threads are in its states: the nodes of its value take their place. */
static void dsv3__gram_key_done(const dsv3_grammar *g, dsv3_grammar_state *s)
{
    dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    uint32_t nodes[DSV3__GRAM_THREADS_MAX], n = 0, mask = 0, room = s->n_keys;
    for (uint32_t i = s->first; i < s->n_threads; i++) {
        const dsv3__gram_key *k = &g->keys[g->info[s->threads[i].id].label - 1];
        uint32_t parent = dsv3__gram_lowest(s->threads[i].parents);
        uint32_t own = dsv3__gram_key_room(g, s, parent, f->count, k->required);
        room = own > room ? own : room;
    }
    for (uint32_t i = s->first; i < s->n_threads; i++) {
        const dsv3__gram_key *k = &g->keys[g->info[s->threads[i].id].label - 1];
        uint32_t parent = dsv3__gram_lowest(s->threads[i].parents);
        const dsv3__gram_alt *a = &g->alts[s->threads[f->first + parent].id];
        if (room + a->keys - a->reserved > DSV3__GRAM_KEYS_MAX || room + g->nodes[k->node].keys > DSV3__GRAM_KEYS_MAX)
            continue;
        s->threads[f->first + parent].count += k->required;
        mask |= (uint32_t)1 << parent;
        nodes[n++] = k->node;
    }
    s->keys[f->keys + f->count] = s->hash;
    s->n_keys = (uint16_t)room;
    dsv3__gram_keep(s, mask);
    for (uint32_t i = 0; i < n; i++) /* threads were in the order of their parents, and so are those kept */
        dsv3__gram_thread_add(s, nodes[i], (uint32_t)1 << i, 0);
    s->place = DSV3__GRAM_AT_COLON;
}

/* Where none of the current threads can go on, their lexeme has ended: then true. */
static bool dsv3__gram_lexeme_settle(const dsv3_grammar *g, dsv3_grammar_state *s)
{
    uint32_t parents = 0;
    for (uint32_t i = s->first; i < s->n_threads; i++) {
        if (!g->info[s->threads[i].id].final)
            return false;
        parents |= s->threads[i].parents;
    }
    if (s->place == DSV3__GRAM_AT_KEY)
        dsv3__gram_key_done(g, s);
    else
        dsv3__gram_complete(s, parents);
    return true;
}

/* The current threads go on to the states `to` [n], 0: not; `c` was read. */
static void dsv3__gram_lexeme_step(const dsv3_grammar *g, dsv3_grammar_state *s, const uint32_t *to, uint32_t n,
                                   uint8_t c)
{
    uint32_t kept = s->first;
    bool begun = false;
    for (uint32_t i = 0; i < n; i++) {
        dsv3_grammar_thread t = s->threads[s->first + i];
        begun = begun || (t.count && t.id == g->body);
        if (!to[i])
            continue;
        t.id = to[i];
        s->threads[kept++] = t;
    }
    s->n_threads = (uint16_t)kept;
    s->chars += begun;
    if (!dsv3__gram_lexeme_settle(g, s))
        s->hash = dsv3__gram_key_hash(s->hash, c);
}

/* The first byte of a value. */
static bool dsv3__gram_value_begin(const dsv3_grammar *g, dsv3_grammar_state *s, uint8_t c)
{
    dsv3_grammar_thread now[DSV3__GRAM_THREADS_MAX];
    uint32_t n = (uint32_t)s->n_threads - s->first, first = s->first;
    if (c == '{' || c == '[') {
        if (!dsv3__gram_enterable(g, s, c == '{'))
            return false;
        dsv3__gram_enter(g, s, c == '{');
        return true;
    }
    memcpy(now, s->threads + first, n * sizeof *now);
    s->n_threads = s->first;
    for (uint32_t i = 0; i < n; i++) {
        const dsv3__gram_node *node = &g->nodes[now[i].id];
        uint32_t state = g->next[(size_t)node->scalar * 256 + c];
        if (state)
            dsv3__gram_thread_add(s, state, now[i].parents, 0);
        for (uint32_t k = 0; c == '"' && k < node->n_lengths; k++)
            dsv3__gram_thread_add(s, g->body, now[i].parents, node->lengths + k + 1);
    }
    if (s->n_threads == s->first) {
        memcpy(s->threads + first, now, n * sizeof *now);
        s->n_threads = (uint16_t)(first + n);
        return false;
    }
    s->place = DSV3__GRAM_AT_LEXEME;
    s->chars = 0;
    dsv3__gram_lexeme_settle(g, s);
    return true;
}

/* The opening quote of a key. */
static bool dsv3__gram_key_begin(const dsv3_grammar *g, dsv3_grammar_state *s)
{
    const dsv3_grammar_frame *f = &s->frames[s->depth - 1];
    for (uint32_t i = 0; i < f->n; i++) {
        uint32_t start = g->alts[s->threads[f->first + i].id].start, state = g->next[(size_t)start * 256 + '"'];
        if (state && dsv3__gram_key_open(g, s, i, state, f->count))
            dsv3__gram_thread_add(s, state, (uint32_t)1 << i, 0);
    }
    if (s->n_threads == s->first)
        return false;
    s->place = DSV3__GRAM_AT_KEY;
    s->hash = DSV3__GRAM_KEY_HASH;
    return true;
}

/* One byte outside of lexemes. */
static bool dsv3__gram_structure(const dsv3_grammar *g, dsv3_grammar_state *s, uint8_t c)
{
    uint32_t mask, count = s->depth ? s->frames[s->depth - 1].count : 0;
    switch (s->place) {
    case DSV3__GRAM_AT_COLON: return c == ':' ? s->place = DSV3__GRAM_AT_VALUE, true : false;
    case DSV3__GRAM_AT_FIRST_ITEM:
    case DSV3__GRAM_AT_FIRST_KEY:
        mask = c == (s->place == DSV3__GRAM_AT_FIRST_KEY ? '}' : ']') ? dsv3__gram_closable(g, s, UINT32_MAX, 0) : 0;
        if (mask)
            return dsv3__gram_close(s, mask), true;
        if (s->place == DSV3__GRAM_AT_FIRST_ITEM)
            return dsv3__gram_value_begin(g, s, c);
        return c == '"' && dsv3__gram_key_begin(g, s);
    case DSV3__GRAM_AT_NEXT_KEY: return c == '"' && dsv3__gram_key_begin(g, s);
    case DSV3__GRAM_AT_VALUE: return dsv3__gram_value_begin(g, s, c);
    case DSV3__GRAM_AT_AFTER:
        if (!dsv3__gram_after(g, s, UINT32_MAX, count, c))
            return false;
        if (c != ',')
            return dsv3__gram_close(s, dsv3__gram_closable(g, s, UINT32_MAX, count)), true;
        s->place = DSV3__GRAM_AT_NEXT_KEY;
        if (!s->frames[s->depth - 1].object) {
            dsv3__gram_items(g, s, UINT32_MAX, count, true);
            s->place = DSV3__GRAM_AT_VALUE;
        }
        return true;
    default: return false;
    }
}

/* White space, where it may stand. */
static bool dsv3__gram_space(const dsv3_grammar *g, dsv3_grammar_state *s, uint8_t c)
{
    bool inner = s->place == DSV3__GRAM_AT_NEXT_KEY || (s->place == DSV3__GRAM_AT_VALUE && s->depth);
    bool any = g->spacing == DSV3_SPACING_ANY && s->place != DSV3__GRAM_AT_END && s->place != DSV3__GRAM_AT_EOS;
    if (!(any && s->spaces < DSV3__GRAM_SPACES) &&
        !(g->spacing == DSV3_SPACING_ONE && inner && c == ' ' && s->spaces == 0))
        return false;
    s->spaces++;
    return true;
}

/* One byte more of the head, or the marker. False: it cannot be. */
static bool dsv3__gram_head_byte(const dsv3_grammar *g, dsv3_grammar_state *s, uint8_t c)
{
    uint32_t to = s->place == DSV3__GRAM_AT_HEAD ? g->next[(size_t)s->threads[0].id * 256 + c] : 0u;
    if (!to)
        return false;
    if (g->info[to].label) { /* its end: a node */
        to = g->info[to].label;
        s->place = DSV3__GRAM_AT_VALUE;
    }
    s->threads[0].id = to;
    return true;
}

/* One byte more. False: it cannot be, and the state is as it was. */
static bool dsv3__gram_byte(const dsv3_grammar *g, dsv3_grammar_state *s, uint8_t c)
{
    const bool space = c == ' ' || c == '\n' || c == '\t' || c == '\r';
    if (s->place == DSV3__GRAM_AT_HEAD)
        return c != DSV3__GRAM_SEP && dsv3__gram_head_byte(g, s, c);
    if (s->place == DSV3__GRAM_AT_LEXEME || s->place == DSV3__GRAM_AT_KEY) {
        uint32_t to[DSV3__GRAM_THREADS_MAX], n = (uint32_t)s->n_threads - s->first, any = 0, mask = 0;
        for (uint32_t i = 0; i < n; i++) {
            const dsv3_grammar_thread *t = &s->threads[s->first + i];
            to[i] = dsv3__gram_lexeme_next(g, s, i, t->id, s->chars, c);
            any |= to[i];
            mask |= g->info[t->id].label ? t->parents : 0;
        }
        if (any)
            return dsv3__gram_lexeme_step(g, s, to, n, c), true;
        if (s->place == DSV3__GRAM_AT_KEY || !mask || s->depth == 0 ||
            !dsv3__gram_after(g, s, mask, s->frames[s->depth - 1].count + 1, c))
            return false;
        dsv3__gram_complete(s, mask); /* a number ends where something else begins */
    }
    if (space)
        return dsv3__gram_space(g, s, c);
    if (!dsv3__gram_structure(g, s, c))
        return false;
    s->spaces = 0;
    return true;
}

static bool dsv3__gram_can_end(const dsv3_grammar *g, const dsv3_grammar_state *s)
{
    bool ends = s->place == DSV3__GRAM_AT_END;
    for (uint32_t i = s->first; s->place == DSV3__GRAM_AT_LEXEME && s->depth == 0 && i < s->n_threads; i++)
        ends = ends || g->info[s->threads[i].id].label;
    return ends;
}

// ---- The mask --------------------------------------------------------------------------------------------

enum { DSV3__GRAM_LANES = 4 }; /* threads of a lexeme that are walked without a whole state */

/* From where a subtree is walked: within a lexeme by its states alone. */
typedef struct dsv3__gram_base {
    dsv3_grammar_state s;
    uint32_t depth; /* bytes of the token behind which s holds */
    uint32_t end;   /* of the subtree */
    uint32_t heavy; /* from this depth on the way here is no longer within the lexeme; 0: it is */
    uint32_t lanes; /* 0: not a lexeme, or too many threads */
    bool plain;     /* one lane, of a value without a bound on its length */
} dsv3__gram_base;

typedef struct dsv3__gram_walk {
    const dsv3_grammar *g;
    uint32_t *mask;
    uint32_t n_bases, at; /* at: `s` holds behind so many bytes of the way; UINT32_MAX: behind none */
    dsv3_grammar_state s;
    dsv3__gram_base bases[DSV3__GRAM_WALKS];
    uint8_t way[DSV3__TOK_BYTES_MAX + 1];
    uint16_t lane[DSV3__TOK_BYTES_MAX + 1][DSV3__GRAM_LANES];
    uint32_t chars[DSV3__TOK_BYTES_MAX + 1];
} dsv3__gram_walk;

static void dsv3__gram_base_push(dsv3__gram_walk *w, const dsv3_grammar_state *s, uint32_t depth, uint32_t end)
{
    dsv3__gram_base *base = &w->bases[w->n_bases++];
    uint32_t n = (uint32_t)s->n_threads - s->first;
    bool lexeme = s->place == DSV3__GRAM_AT_LEXEME || s->place == DSV3__GRAM_AT_KEY;
    dsv3__gram_state_copy(&base->s, s);
    base->depth = depth;
    base->end = end;
    base->heavy = 0;
    base->lanes = lexeme && n <= DSV3__GRAM_LANES ? n : 0;
    base->plain = n == 1 && s->place == DSV3__GRAM_AT_LEXEME && !s->threads[s->first].count;
    for (uint32_t i = 0; i < base->lanes; i++)
        w->lane[depth][i] = (uint16_t)s->threads[s->first + i].id;
    w->chars[depth] = s->chars;
}

/* One byte within a lexeme, at depth d of the way: 1 it goes on, 0 it does not, -1 the lexeme may end. */
static int dsv3__gram_walk_lanes(dsv3__gram_walk *w, const dsv3__gram_base *base, uint32_t d, uint8_t c)
{
    const dsv3_grammar *g = w->g;
    bool any = false, begun = false;
    for (uint32_t i = 0; i < base->lanes; i++) {
        uint32_t from = w->lane[d - 1][i], to = g->next[(size_t)from * 256 + c];
        w->lane[d][i] = 0;
        if (!from)
            continue;
        if (!to) {
            if (g->info[from].label)
                return -1;
            continue;
        }
        if (g->info[to].final)
            return -1;
        begun = begun || (base->s.threads[base->s.first + i].count && from == g->body);
        to = dsv3__gram_lexeme_next(g, &base->s, i, from, w->chars[d - 1], c);
        w->lane[d][i] = (uint16_t)to;
        any = any || to;
    }
    w->chars[d] = w->chars[d - 1] + begun;
    return any;
}

/* One byte with the whole state, which is brought to depth d - 1 of the way first. */
static bool dsv3__gram_walk_state(dsv3__gram_walk *w, const dsv3__gram_base *base, uint32_t d, uint8_t c)
{
    if (w->at != d - 1) {
        dsv3__gram_state_copy(&w->s, &base->s);
        for (w->at = base->depth; w->at < d - 1; w->at++)
            dsv3__gram_byte(w->g, &w->s, w->way[w->at]);
    }
    if (!dsv3__gram_byte(w->g, &w->s, c))
        return false;
    w->at = d;
    return true;
}

/* Where the going on of a string is free: sets all tokens without a quote. True: the others alone are left to walk. */
static bool dsv3__gram_mask_free(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t *mask)
{
    const dsv3__gram_vocab *v = &g->vocab;
    const uint32_t n = (uint32_t)s->n_threads - s->first;
    bool done = false;
    if (s->place != DSV3__GRAM_AT_LEXEME && s->place != DSV3__GRAM_AT_KEY)
        return false;
    for (uint32_t i = 0; i < n && !done; i++) {
        const dsv3_grammar_thread *t = &s->threads[s->first + i];
        uint32_t left = UINT32_MAX;
        if (!g->info[t->id].free)
            continue;
        if (s->place == DSV3__GRAM_AT_KEY) {
            uint32_t parent = dsv3__gram_lowest(t->parents), count = s->frames[s->depth - 1].count;
            const dsv3__gram_alt *a = &g->alts[s->threads[s->frames[s->depth - 1].first + parent].id];
            uint32_t room = dsv3__gram_key_room(g, s, parent, count, false);
            if (!room || s->depth + a->open_depth > g->max_depth || room + a->open_keys > DSV3__GRAM_KEYS_MAX)
                continue;
        }
        if (t->count && g->lengths[t->count - 1].max != DSV3__GRAM_NO_MAX)
            left = g->lengths[t->count - 1].max - s->chars;
        uint32_t fit = v->chars[left < 255 ? left + 1 : 256];
        bool all = left >= 255 || fit == v->chars[256];
        if (all || (n == 1 && fit > v->chars[256] / 2)) {
            for (uint32_t k = 0; k < (v->n_tokens + 31) / 32; k++)
                mask[k] |= v->pure[k];
            for (uint32_t k = all ? v->chars[256] : fit; k < v->chars[256]; k++)
                mask[v->by_chars[k] / 32] &= ~((uint32_t)1 << (v->by_chars[k] % 32));
        } else {
            for (uint32_t k = 0; k < fit; k++)
                mask[v->by_chars[k] / 32] |= (uint32_t)1 << (v->by_chars[k] % 32);
        }
        done = all || n == 1;
    }
    return done;
}

/* From node i on, as far as one lexeme that is read by one thread goes, within the innermost base: what is most of a walk.
   Returns the node it does not know how to take. */
static uint32_t dsv3__gram_walk_lexeme(dsv3__gram_walk *w, uint32_t i)
{
    const dsv3_grammar *g = w->g;
    const uint32_t end = w->bases[w->n_bases - 1].end;
    while (i < end) {
        const dsv3__gram_token *node = &g->vocab.trie[i];
        const uint32_t d = node->depth, from = w->lane[d - 1][0], to = g->next[(size_t)from * 256 + node->byte];
        if (to ? g->info[to].final : g->info[from].label)
            break;
        w->way[d - 1] = node->byte;
        w->lane[d][0] = (uint16_t)to;
        if (to && node->token >= 0)
            w->mask[node->token / 32] |= 1u << (node->token % 32);
        i = to ? i + 1 : node->end;
    }
    return i;
}

/* The tokens that may come next. */
static void dsv3__gram_mask(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t *mask)
{
    const dsv3__gram_vocab *v = &g->vocab;
    dsv3__gram_walk w;
    bool quotes_only = dsv3__gram_mask_free(g, s, mask);
    w.g = g;
    w.mask = mask;
    w.n_bases = 0;
    w.at = UINT32_MAX;
    dsv3__gram_base_push(&w, s, 0, v->n);
    if (g->sep >= 0 && s->place == DSV3__GRAM_AT_HEAD && g->next[(size_t)s->threads[0].id * 256 + DSV3__GRAM_SEP])
        mask[g->sep / 32] |= 1u << (g->sep % 32);
    for (uint32_t i = 0; i < v->n;) {
        while (i >= w.bases[w.n_bases - 1].end)
            w.n_bases--;
        dsv3__gram_base *base = &w.bases[w.n_bases - 1];
        const dsv3__gram_token *node = &v->trie[i];
        if (!base->heavy || node->depth <= base->heavy) { /* within the lexeme */
            if (quotes_only && w.n_bases == 1 && !node->quote) {
                i = node->end;
                continue;
            }
            if (base->plain && !(quotes_only && w.n_bases == 1)) {
                uint32_t next = dsv3__gram_walk_lexeme(&w, i);
                w.at = next == i ? w.at : UINT32_MAX;
                if (next != i) {
                    i = next;
                    continue;
                }
            }
        }
        const uint32_t d = node->depth;
        if (w.at != UINT32_MAX && w.at >= d)
            w.at = UINT32_MAX; /* that was another branch */
        base->heavy = d <= base->heavy ? 0 : base->heavy;
        w.way[d - 1] = node->byte;
        int on = base->lanes && !base->heavy ? dsv3__gram_walk_lanes(&w, base, d, node->byte) : -1;
        if (on < 0) {
            on = dsv3__gram_walk_state(&w, base, d, node->byte);
            if (on && !base->heavy)
                base->heavy = d;
            if (on && node->end > i + 1 && w.n_bases < DSV3__GRAM_WALKS &&
                (w.s.place == DSV3__GRAM_AT_LEXEME || w.s.place == DSV3__GRAM_AT_KEY))
                dsv3__gram_base_push(&w, &w.s, d, node->end);
        }
        if (on && node->token >= 0)
            mask[node->token / 32] |= 1u << (node->token % 32);
        i = on ? i + 1 : node->end;
    }
}

static bool dsv3__gram_is_of(const dsv3_grammar *g, const dsv3_tokenizer *t)
{
    return g->tokenizer == t;
}

/* One token more. False: it cannot be, and the state is as it was. */
static bool dsv3__gram_accept(const dsv3_grammar *g, dsv3_grammar_state *s, const char *text, size_t len)
{
    dsv3_grammar_state next;
    dsv3__gram_state_copy(&next, s);
    for (size_t i = 0; i < len; i++)
        if (!dsv3__gram_byte(g, &next, (uint8_t)text[i]))
            return false;
    dsv3__gram_state_copy(s, &next);
    return true;
}

// ---- Public ----------------------------------------------------------------------------------------------

static void dsv3__gram_build_close(dsv3__gram_build *b)
{
    dsv3__mem *mem = &b->g->mem;
    const void *blocks[] = {b->pool,  b->values,      b->places,      b->walk,        b->reach,
                            b->set,   b->lists.items, b->lists.slots, b->lists.spans, b->spread,
                            b->apart, b->patterns,    b->conjs.items, b->conjs.slots, b->conjs.spans,
                            b->names, b->goals.items, b->goals.slots, b->goals.spans, b->goal_sets};
    for (size_t i = 0; i < DSV3__COUNT(blocks); i++)
        dsv3__mem_free(mem, blocks[i]);
}

DSV3_API void dsv3_grammar_close(dsv3_grammar *grammar)
{
    if (!grammar)
        return;
    const void *blocks[] = {grammar->next, grammar->info,    grammar->nodes,   grammar->alts,
                            grammar->keys, grammar->lengths, grammar->children};
    const void *vocab[] = {grammar->vocab.trie, grammar->vocab.pure, grammar->vocab.by_chars};
    for (size_t i = 0; i < DSV3__COUNT(blocks); i++)
        dsv3__mem_free(&grammar->mem, blocks[i]);
    for (size_t i = 0; i < DSV3__COUNT(vocab) && !grammar->shares_vocab; i++)
        dsv3__mem_free(&grammar->mem, vocab[i]);
    dsv3__mem mem = grammar->mem;
    dsv3__mem_free(&mem, grammar);
}

static dsv3_result dsv3__gram_opts(dsv3_grammar_opts *o, const dsv3_grammar_opts *opts, const dsv3_tokenizer *tokenizer,
                                   dsv3_error *err)
{
    memset(o, 0, sizeof *o);
    if (opts && opts->struct_size && opts->struct_size != sizeof *o)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "grammar opts: struct_size is %u, expected 0 or %u",
                          (uint64_t)opts->struct_size, (uint64_t)sizeof *o);
    if (opts)
        *o = *opts;
    o->max_depth = o->max_depth ? o->max_depth : (uint32_t)DSV3__GRAM_DEPTH;
    o->max_states = o->max_states ? o->max_states : (uint32_t)DSV3__GRAM_STATES;
    if (o->max_depth > DSV3__GRAM_DEPTH_MAX || o->max_states > DSV3__GRAM_STATES_MAX || (uint32_t)o->spacing > 2)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS,
                          "grammar opts: max_depth %u, max_states %u, spacing %u: at most 64, 65535 and 2",
                          (uint64_t)o->max_depth, (uint64_t)o->max_states, (uint64_t)o->spacing);
    if (!o->allocator.alloc_fn != !o->allocator.free_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS,
                          "grammar opts: allocator needs alloc_fn and free_fn, or neither");
    if (o->like && o->like->tokenizer != tokenizer)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "grammar opts: `like` is of another tokenizer");
    return DSV3_OK;
}

/* markup not AUTO: `schema` is a list of tools. */
static dsv3_result dsv3__gram_open(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, const char *schema,
                                   size_t len, dsv3_markup markup, const dsv3_grammar_opts *opts, dsv3_error *err)
{
    dsv3_grammar_opts o;
    dsv3__gram_build b;
    dsv3__mem mem;
    void *p;
    if (!grammar || !tokenizer)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_grammar_open: grammar or tokenizer is NULL");
    *grammar = NULL;
    DSV3__TRY(dsv3__gram_opts(&o, opts, tokenizer, err));
    if (len > DSV3__GRAM_TEXT_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_SCHEMA, "schema: %u bytes, at most %u", (uint64_t)len,
                          (uint64_t)DSV3__GRAM_TEXT_MAX);
    dsv3__mem_init(&mem, &o.allocator, o.memory_limit);
    DSV3__TRY(dsv3__mem_alloc(&mem, &p, sizeof(dsv3_grammar), "a grammar", err));
    memset(p, 0, sizeof(dsv3_grammar));
    memset(&b, 0, sizeof b);
    b.g = (dsv3_grammar *)p;
    b.err = err;
    b.g->mem = mem;
    b.g->tokenizer = tokenizer;
    b.g->spacing = o.spacing;
    b.g->max_depth = o.max_depth;
    b.g->max_states = o.max_states;
    b.g->sep = -1;
    if (markup == DSV3_MARKUP_V3_1 || markup == DSV3_MARKUP_KIMI_K2_THINKING)
        b.g->sep = dsv3__chat_id(tokenizer, markup == DSV3_MARKUP_V3_1 ? DSV3__CHAT_SEP : DSV3__CHAT_IM_ARGUMENT);
    dsv3_result r = dsv3__gram_compile(&b, schema, len, markup);
    if (!r && o.like) {
        b.g->vocab = o.like->vocab;
        b.g->shares_vocab = true;
    } else if (!r) {
        r = dsv3__gram_vocab_open(&b, tokenizer);
    }
    dsv3__gram_build_close(&b);
    if (r)
        dsv3_grammar_close(b.g);
    else
        *grammar = b.g;
    return r;
}

DSV3_API dsv3_result dsv3_grammar_open(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, const char *schema,
                                       size_t len, const dsv3_grammar_opts *opts, dsv3_error *error)
{
    dsv3_error local, *err = error ? error : &local;
    dsv3__err_clear(err);
    return dsv3__gram_open(grammar, tokenizer, schema, len, DSV3_MARKUP_AUTO, opts, err);
}

/* The parameters of the tool of that name. */
static dsv3_result dsv3__gram_tool(dsv3_text tools, dsv3_text name, dsv3__str *schema, dsv3_error *err)
{
    static const char any[] = "{\"type\": \"object\"}";
    bool found = false;
    dsv3__json list;
    dsv3__str wanted;
    if (!tools.p || !tools.len || !name.p || name.len > DSV3__CHAT_NAME_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT,
                          "dsv3_grammar_open_tool: expected tools, and a name of at most %u bytes",
                          (uint64_t)DSV3__CHAT_NAME_MAX);
    dsv3__json_init(&list, tools.p, tools.len, "tools", err);
    if (dsv3__json_peek(&list) != '[')
        dsv3__json_fail(&list, "expected a list");
    if (dsv3__json_open(&list, '['))
        while (dsv3__json_item(&list)) {
            dsv3__json function, value;
            dsv3__json_str s;
            char decoded[6 * DSV3__CHAT_NAME_MAX]; /* a byte as \u0061: a longer spelling is a longer name */
            size_t n;
            if (!found && dsv3__tok_get(&list, "function", &function) && dsv3__tok_get(&function, "name", &value) &&
                dsv3__json_peek(&value) == '"' && dsv3__json_string(&value, &s) && s.n <= sizeof decoded &&
                dsv3__json_decode(s, decoded, &n) && n == name.len && memcmp(decoded, name.p, n) == 0) {
                found = true;
                schema->p = any;
                schema->n = sizeof any - 1;
                if (dsv3__tok_get(&function, "parameters", &value)) {
                    dsv3__json_peek(&value);
                    schema->p = value.p;
                    dsv3__json_skip(&value);
                    schema->n = (size_t)(value.p - schema->p);
                }
            }
            dsv3__json_skip(&list);
        }
    DSV3__TRY(dsv3__json_end(&list));
    wanted.p = name.p;
    wanted.n = name.len;
    if (!found)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_grammar_open_tool: no tool has the name \"%S\"",
                          &wanted);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_grammar_open_tool(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, dsv3_text tools,
                                            dsv3_text name, const dsv3_grammar_opts *opts, dsv3_error *error)
{
    dsv3_error local, *err = error ? error : &local;
    dsv3__str schema = {NULL, 0};
    dsv3__err_clear(err);
    if (grammar)
        *grammar = NULL;
    DSV3__TRY(dsv3__gram_tool(tools, name, &schema, err));
    return dsv3_grammar_open(grammar, tokenizer, schema.p, schema.n, opts, error);
}

DSV3_API dsv3_result dsv3_grammar_open_tools(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, dsv3_text tools,
                                             dsv3_markup markup, const dsv3_grammar_opts *opts, dsv3_error *error)
{
    dsv3_error local, *err = error ? error : &local;
    dsv3_tool_call any;
    dsv3__err_clear(err);
    memset(&any, 0, sizeof any);
    if (grammar)
        *grammar = NULL;
    if (!tokenizer || !tools.p)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "dsv3_grammar_open_tools: tokenizer or tools is missing");
    DSV3__TRY(dsv3__chat_resolve(tokenizer, &markup, err));
    DSV3__TRY(dsv3__chat_check_call(markup, &any, err));
    int sep = markup == DSV3_MARKUP_KIMI_K2_THINKING ? DSV3__CHAT_IM_ARGUMENT : DSV3__CHAT_SEP;
    if (dsv3__chat_id(tokenizer, sep) < 0)
        return DSV3__FAIL(err, DSV3_ERROR_TOKENIZER, "chat: markup %s needs the token \"%s\", the tokenizer has none",
                          dsv3_markup_name(markup), dsv3__chat_markers[sep]);
    return dsv3__gram_open(grammar, tokenizer, tools.p, tools.len, markup, opts, err);
}

DSV3_API void dsv3_grammar_start(const dsv3_grammar *grammar, dsv3_grammar_state *state)
{
    memset(state, 0, sizeof *state);
    state->place = grammar->head ? DSV3__GRAM_AT_HEAD : DSV3__GRAM_AT_VALUE;
    state->threads[0].id = grammar->head ? grammar->head : 1; /* the root */
    state->threads[0].parents = 1;
    state->n_threads = 1;
}

DSV3_API void dsv3_grammar_mask(const dsv3_grammar *grammar, const dsv3_grammar_state *state, uint32_t *mask)
{
    memset(mask, 0, (grammar->vocab.n_tokens + 31) / 32 * sizeof *mask);
    dsv3__gram_mask(grammar, state, mask);
    int32_t eos = grammar->tokenizer->eos;
    if (eos >= 0 && (uint32_t)eos < grammar->vocab.n_tokens && dsv3__gram_can_end(grammar, state))
        mask[eos / 32] |= 1u << (eos % 32);
}

DSV3_API bool dsv3_grammar_accept(const dsv3_grammar *grammar, dsv3_grammar_state *state, int32_t token)
{
    size_t n;
    const char *bytes = dsv3_token_bytes(grammar->tokenizer, token, &n);
    if (token >= 0 && token == grammar->tokenizer->eos) {
        if (!dsv3__gram_can_end(grammar, state))
            return false;
        state->place = DSV3__GRAM_AT_EOS;
        return true;
    }
    if (token >= 0 && token == grammar->sep)
        return dsv3__gram_head_byte(grammar, state, DSV3__GRAM_SEP);
    return n && !(grammar->tokenizer->flags[token] & DSV3__TOK_ADDED) && dsv3__gram_accept(grammar, state, bytes, n);
}

DSV3_API bool dsv3_grammar_accept_text(const dsv3_grammar *grammar, dsv3_grammar_state *state, const char *text,
                                       size_t len)
{
    return dsv3__gram_accept(grammar, state, text, len);
}

DSV3_API bool dsv3_grammar_can_end(const dsv3_grammar *grammar, const dsv3_grammar_state *state)
{
    return dsv3__gram_can_end(grammar, state);
}

#else // DSV3_NO_TOKENIZER

DSV3_API dsv3_result dsv3_grammar_open(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, const char *schema,
                                       size_t len, const dsv3_grammar_opts *opts, dsv3_error *error)
{
    (void)tokenizer, (void)schema, (void)len, (void)opts;
    if (grammar)
        *grammar = NULL;
    return dsv3__tok_disabled(error);
}

DSV3_API dsv3_result dsv3_grammar_open_tool(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, dsv3_text tools,
                                            dsv3_text name, const dsv3_grammar_opts *opts, dsv3_error *error)
{
    (void)tools, (void)name;
    return dsv3_grammar_open(grammar, tokenizer, NULL, 0, opts, error);
}

DSV3_API dsv3_result dsv3_grammar_open_tools(dsv3_grammar **grammar, const dsv3_tokenizer *tokenizer, dsv3_text tools,
                                             dsv3_markup markup, const dsv3_grammar_opts *opts, dsv3_error *error)
{
    (void)tools, (void)markup;
    return dsv3_grammar_open(grammar, tokenizer, NULL, 0, opts, error);
}

DSV3_API void dsv3_grammar_close(dsv3_grammar *grammar)
{
    (void)grammar;
}

DSV3_API void dsv3_grammar_start(const dsv3_grammar *grammar, dsv3_grammar_state *state)
{
    (void)grammar, (void)state;
}

DSV3_API void dsv3_grammar_mask(const dsv3_grammar *grammar, const dsv3_grammar_state *state, uint32_t *mask)
{
    (void)grammar, (void)state, (void)mask;
}

DSV3_API bool dsv3_grammar_accept(const dsv3_grammar *grammar, dsv3_grammar_state *state, int32_t token)
{
    (void)grammar, (void)state, (void)token;
    return false;
}

static bool dsv3__gram_is_of(const dsv3_grammar *g, const dsv3_tokenizer *t)
{
    (void)g, (void)t;
    return false;
}

static void dsv3__gram_mask(const dsv3_grammar *g, const dsv3_grammar_state *s, uint32_t *mask)
{
    (void)g, (void)s, (void)mask;
}

DSV3_API bool dsv3_grammar_accept_text(const dsv3_grammar *grammar, dsv3_grammar_state *state, const char *text,
                                       size_t len)
{
    (void)grammar, (void)state, (void)text, (void)len;
    return false;
}

DSV3_API bool dsv3_grammar_can_end(const dsv3_grammar *grammar, const dsv3_grammar_state *state)
{
    (void)grammar, (void)state;
    return false;
}

#endif // DSV3_NO_TOKENIZER
// =============================================================================
// >>smp   Logits -> a token. What is picked is a function of logits, options and position: no hidden state.
//         Needs kern (exp). Scratch: the session's copy of the logits.
// =============================================================================

/* A uniform number in [0, 1) for (seed, position): two rounds of SplitMix64's finaliser. The same on every platform. */
static double dsv3__smp_uniform(uint64_t seed, uint64_t position)
{
    uint64_t x = seed + 0x9E3779B97F4A7C15ull;
    for (int round = 0; round < 2; round++) {
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
        x = (x ^ x >> 27) * 0x94D049BB133111EBull;
        x ^= x >> 31;
        if (round == 0)
            x += (position + 1) * 0x9E3779B97F4A7C15ull;
    }
    return (double)(x >> 11) * (1.0 / 9007199254740992.0);
}

static bool dsv3__smp_opts_ok(const dsv3_sample_opts *o)
{
    const float huge = 1e30f; /* also refuses NaN and infinity */
    return o->temperature >= 0 && o->temperature < huge && o->top_p >= 0 && o->top_p <= 1 && o->min_p >= 0 &&
           o->min_p <= 1 && o->repetition_penalty >= 0 && o->repetition_penalty < huge && o->presence_penalty > -huge &&
           o->presence_penalty < huge;
}

/* Penalties for the tokens the session holds, once for each. seen: scratch, a bit for each token of the vocabulary. */
static void dsv3__smp_penalties(float *logits, uint32_t vocab, const int32_t *tokens, size_t n_tokens,
                                const dsv3_sample_opts *o, uint8_t *seen)
{
    bool repetition = o->repetition_penalty != 0 && o->repetition_penalty != 1;
    if (!repetition && o->presence_penalty == 0)
        return;
    memset(seen, 0, (vocab + 7) / 8);
    for (size_t i = 0; i < n_tokens; i++) {
        uint32_t t = (uint32_t)tokens[i];
        if (seen[t / 8] >> (t % 8) & 1)
            continue;
        seen[t / 8] = (uint8_t)(seen[t / 8] | 1u << (t % 8));
        if (repetition)
            logits[t] = logits[t] > 0 ? logits[t] / o->repetition_penalty : logits[t] * o->repetition_penalty;
        logits[t] -= o->presence_penalty;
    }
}

/* Logits of what is not in the mask become -infinity. False: nothing is left. */
static bool dsv3__smp_mask(float *logits, uint32_t n, const uint32_t *mask)
{
    uint32_t any = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bit = mask[i / 32] >> (i % 32) & 1;
        any |= bit;
        if (!bit)
            logits[i] = dsv3__bits_float(0xFF800000u);
    }
    return any != 0;
}

static uint32_t dsv3__smp_argmax(const float *v, uint32_t n)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < n; i++)
        if (v[i] > v[best])
            best = i;
    return best;
}

/* Zeroes all but the largest p [n] (none negative) whose sum reaches `target`; by_count: whose number does. Equal ones are
   kept from the lowest index. The border is found digit by digit in the bits of the floats, which order as they do. */
static void dsv3__smp_cut(float *p, uint32_t n, double target, bool by_count)
{
    uint32_t prefix = 0;
    double above = 0; /* what is strictly larger than the border weighs */
    for (int shift = 24; shift >= 0; shift -= 8) {
        double weight[256];
        uint32_t known = shift == 24 ? 0 : 0xFFFFFFFFu << (shift + 8), digit = 255;
        for (uint32_t i = 0; i < 256; i++)
            weight[i] = 0;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t bits = dsv3__float_bits(p[i]);
            if ((bits & known) == prefix)
                weight[bits >> shift & 255] += by_count ? 1 : (double)p[i];
        }
        while (digit > 0 && above + weight[digit] < target)
            above += weight[digit--];
        prefix |= digit << shift;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t bits = dsv3__float_bits(p[i]);
        if (bits < prefix || (bits == prefix && above >= target))
            p[i] = 0;
        else if (bits == prefix)
            above += by_count ? 1 : (double)p[i];
    }
}

/* A token from logits [n], which become scratch. Penalties are in them already. */
static int32_t dsv3__smp_pick(float *logits, uint32_t n, const dsv3_sample_opts *o, uint64_t position)
{
    uint32_t best = dsv3__smp_argmax(logits, n), last = best;
    float max = logits[best];
    double sum = 0, at = 0, u;
    if (o->temperature == 0)
        return (int32_t)best;
    for (uint32_t i = 0; i < n; i++)
        logits[i] = i == best ? 1.0f : dsv3__exp((logits[i] - max) / o->temperature); /* of -infinity: 0 */
    if (o->top_k && o->top_k < n)
        dsv3__smp_cut(logits, n, o->top_k, true);
    if (o->top_p > 0 && o->top_p < 1) {
        for (uint32_t i = 0; i < n; i++)
            sum += (double)logits[i];
        dsv3__smp_cut(logits, n, sum * (double)o->top_p, false);
    }
    sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        if (logits[i] < o->min_p)
            logits[i] = 0;
        sum += (double)logits[i];
    }
    u = dsv3__smp_uniform(o->seed, position) * sum;
    for (uint32_t i = 0; i < n; i++) {
        if (logits[i] == 0)
            continue;
        last = i;
        at += (double)logits[i];
        if (at > u)
            break;
    }
    return (int32_t)last;
}

/* Subtracting this from a logit gives its log-probability. */
static double dsv3__smp_log_sum(const float *logits, uint32_t n)
{
    float max = logits[dsv3__smp_argmax(logits, n)];
    double sum = 0;
    for (uint32_t i = 0; i < n; i++)
        sum += (double)dsv3__exp(logits[i] - max);
    return (double)max + log(sum);
}

/* Likelier first, of equals the lower id. */
static bool dsv3__smp_before(dsv3_sample a, dsv3_sample b)
{
    return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
}

/* Lets heap[i] sink in a heap of n whose root is the one that all others are before. */
static void dsv3__smp_sink(dsv3_sample *heap, size_t i, size_t n)
{
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && dsv3__smp_before(heap[child], heap[child + 1]))
            child++;
        if (!dsv3__smp_before(heap[i], heap[child]))
            return;
        dsv3_sample swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
    }
}

/* best [k]: the k likeliest of logits [n], in order, with log-probabilities. */
static void dsv3__smp_top(dsv3_sample *best, size_t k, const float *logits, uint32_t n)
{
    double log_sum = dsv3__smp_log_sum(logits, n);
    for (uint32_t i = 0; i < n; i++) { /* ordered by logits: log-probabilities round close ones together */
        dsv3_sample s;
        s.token = (int32_t)i;
        s.logprob = logits[i];
        if (i < k) {
            best[i] = s;
            if (i + 1 == k)
                for (size_t j = k / 2; j-- > 0;)
                    dsv3__smp_sink(best, j, k);
        } else if (dsv3__smp_before(s, best[0])) {
            best[0] = s;
            dsv3__smp_sink(best, 0, k);
        }
    }
    for (size_t end = k; end > 1;) {
        dsv3_sample last = best[--end];
        best[end] = best[0];
        best[0] = last;
        dsv3__smp_sink(best, 0, end);
    }
    for (size_t i = 0; i < k; i++)
        best[i].logprob = (float)((double)best[i].logprob - log_sum);
}

// =============================================================================
// >>ws    What sessions share: the cache in pages, the scratch of a pass, threads. Needs: fwd.
//         A page is DSV3_PAGE_TOKENS positions of all layers. Sessions name pages by number, each page counts who names
//         it, and only a page with one name is written. All of it is allocated when a workspace is opened.
// =============================================================================

#define DSV3__WS_BATCH_MAX 65536u
#define DSV3__WS_STOP_MAX  255u /* bytes of a stop string */

/* Logits that sessions name, as they do pages. There is one for each session, so that one that must not write into those it
   names (a fork names them too) finds others that nobody does. */
typedef struct dsv3__ws_logits {
    struct dsv3__ws_logits *next; /* among those that nobody names */
    uint32_t refs;
    float *values; /* [vocab_size] */
} dsv3__ws_logits;

#define DSV3__WS_LOGITS_HEADER 64 /* bytes from the struct to its values */

struct dsv3_workspace {
    const dsv3_model *m;
    dsv3__mem mem;
    dsv3__pool pool;
    dsv3__work work;
    dsv3_cache cache_latent, cache_rope; /* not AUTO */
    bool own;                            /* of one session and its forks: goes with the last */
    bool running;                        /* inside a call: callbacks must not come back */
    uint32_t n_sessions;
    uint32_t n_pages, n_free;
    uint32_t n_promised;    /* of the free: set aside for sessions */
    dsv3__ws_logits *spare; /* logits that nobody names */
    void *block;            /* all below, and the scratch */
    uint32_t *refs;         /* [n_pages] how many sessions name it */
    uint32_t *free;         /* [n_pages] the first n_free of them are the free pages */
    uint32_t *marks;        /* [n_pages] 0 between calls */
    float *sampling;        /* [vocab_size] the sampler's copy of logits */
    uint8_t *seen;          /* [vocab_size / 8] */
    uint32_t *masks;        /* [2, vocab_size / 32] what a grammar allows, and a host */
    dsv3__row *rows;        /* [max_batch] */
    uint32_t *asked;        /* [max_batch] */
    char *piece;            /* [3 * (max_token_bytes + 3)] text of a token */
    char *held;             /* [DSV3__WS_STOP_MAX + the same] text that may still become a stop string */
};

/* Layers that have cache rows: the model's, then those of multi-token prediction. */
static uint32_t dsv3__ws_layers(const dsv3_model *m)
{
    return m->config.num_hidden_layers + m->n_mtp;
}

/* Counters of experts: [n_moe_layers, n_routed_experts], prediction layers left out. */
static uint64_t dsv3__ws_counts(const dsv3_model *m)
{
    const dsv3_config *c = &m->config;
    return (uint64_t)(c->num_hidden_layers - c->first_k_dense_replace) * c->n_routed_experts;
}

/* Lays all of a workspace's memory out; returns its bytes. base NULL only measures. */
static uint64_t dsv3__ws_plan(dsv3_workspace *ws, uint32_t max_batch, uint8_t *base)
{
    const dsv3_config *c = &ws->m->config;
    uint64_t used = 0, piece = 3 * ((uint64_t)ws->m->max_token_bytes + 3);
    uint64_t scratch = dsv3__work_plan(&ws->work, ws->m, max_batch, ws->pool.n_threads, NULL);
    if (base) {
        memset(base, 0, (size_t)scratch); /* rows are padded with zeros that nobody writes again */
        dsv3__work_plan(&ws->work, ws->m, max_batch, ws->pool.n_threads, base);
        base += scratch;
    }
    ws->work.pool = &ws->pool;
    dsv3__mla_layout(&ws->work, ws->cache_latent, ws->cache_rope, dsv3__ws_layers(ws->m));
    ws->work.cache = (uint8_t *)dsv3__carve(base, &used, ws->n_pages, ws->work.page_bytes);
    ws->work.counts = (uint64_t *)dsv3__carve(base, &used, dsv3__ws_counts(ws->m), sizeof(uint64_t));
    ws->refs = (uint32_t *)dsv3__carve(base, &used, ws->n_pages, sizeof(uint32_t));
    ws->free = (uint32_t *)dsv3__carve(base, &used, ws->n_pages, sizeof(uint32_t));
    ws->marks = (uint32_t *)dsv3__carve(base, &used, ws->n_pages, sizeof(uint32_t));
    ws->sampling = (float *)dsv3__carve(base, &used, c->vocab_size, sizeof(float));
    ws->seen = (uint8_t *)dsv3__carve(base, &used, (c->vocab_size + 7) / 8, 1);
    ws->masks = (uint32_t *)dsv3__carve(base, &used, 2 * (((uint64_t)c->vocab_size + 31) / 32), sizeof(uint32_t));
    ws->rows = (dsv3__row *)dsv3__carve(base, &used, max_batch, sizeof(dsv3__row));
    ws->asked = (uint32_t *)dsv3__carve(base, &used, max_batch, sizeof(uint32_t));
    ws->piece = (char *)dsv3__carve(base, &used, piece, 1);
    ws->held = (char *)dsv3__carve(base, &used, piece + DSV3__WS_STOP_MAX, 1);
    return used + scratch;
}

/* Options with their defaults in place. `whose` they are is said in messages. */
static dsv3_result dsv3__ws_opts(dsv3_workspace_opts *o, const dsv3_model *m, const dsv3_workspace_opts *opts,
                                 const char *whose, dsv3_error *err)
{
    memset(o, 0, sizeof *o);
    if (opts) {
        if (opts->struct_size && opts->struct_size != sizeof *o)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s opts: struct_size is %u, expected 0 or %u", whose,
                              (uint64_t)opts->struct_size, (uint64_t)sizeof *o);
        *o = *opts;
    }
    if (!o->n_pages)
        o->n_pages = 64;
    if (!o->max_batch)
        o->max_batch = 512;
    if (o->cache_latent == DSV3_CACHE_AUTO)
        o->cache_latent = DSV3_CACHE_F32;
    if (o->cache_rope == DSV3_CACHE_AUTO)
        o->cache_rope = o->cache_latent == DSV3_CACHE_F32 ? DSV3_CACHE_F32 : DSV3_CACHE_BF16;
    if ((uint32_t)o->cache_latent > DSV3_CACHE_I8 || (uint32_t)o->cache_rope > DSV3_CACHE_I8)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s opts: cache types %d and %d are not known", whose,
                          (int64_t)o->cache_latent, (int64_t)o->cache_rope);
    if (o->max_batch > DSV3__WS_BATCH_MAX)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s opts: max_batch is %u, at most %u", whose,
                          (uint64_t)o->max_batch, (uint64_t)DSV3__WS_BATCH_MAX);
    if (o->n_pages > 1u << 26)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s opts: n_pages is %u, at most 2^26", whose,
                          (uint64_t)o->n_pages);
    if (o->n_threads > 4096 || o->executor.n_threads > 4096)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s opts: n_threads is %u, at most 4096", whose,
                          (uint64_t)(o->n_threads > 4096 ? o->n_threads : o->executor.n_threads));
    if (!o->allocator.alloc_fn != !o->allocator.free_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "%s opts: allocator needs alloc_fn and free_fn, or neither",
                          whose);
    if (!o->allocator.alloc_fn)
        o->allocator = m->mem.allocator;
    return DSV3_OK;
}

static void dsv3__ws_close(dsv3_workspace *ws)
{
    dsv3__mem mem;
    DSV3_ASSERT(ws->n_sessions == 0);
    dsv3__pool_close(&ws->pool, &ws->mem);
    dsv3__mem_free(&ws->mem, ws->block);
    mem = ws->mem;
    dsv3__mem_free(&mem, ws);
}

/* Options as dsv3__ws_opts leaves them. */
static dsv3_result dsv3__ws_open(dsv3_workspace **workspace, const dsv3_model *m, const dsv3_workspace_opts *o,
                                 dsv3_error *err)
{
    dsv3__mem mem;
    void *p;
    dsv3__mem_init(&mem, &o->allocator, o->memory_limit);
    DSV3__TRY(dsv3__mem_alloc(&mem, &p, sizeof(dsv3_workspace), "workspace", err));
    dsv3_workspace *ws = (dsv3_workspace *)p;
    memset(ws, 0, sizeof *ws);
    ws->m = m;
    ws->mem = mem;
    ws->cache_latent = o->cache_latent, ws->cache_rope = o->cache_rope;
    ws->n_pages = ws->n_free = o->n_pages;
    dsv3_result r = dsv3__pool_open(&ws->pool, &ws->mem, o->n_threads, &o->executor, err);
    if (!r)
        r = dsv3__mem_alloc(&ws->mem, &ws->block, dsv3__ws_plan(ws, o->max_batch, NULL), "workspace: cache and scratch",
                            err);
    if (r) {
        dsv3__ws_close(ws);
        return r;
    }
    dsv3__ws_plan(ws, o->max_batch, (uint8_t *)ws->block);
    memset(ws->work.counts, 0, (size_t)dsv3__ws_counts(m) * sizeof(uint64_t));
    memset(ws->refs, 0, ws->n_pages * sizeof(uint32_t));
    memset(ws->marks, 0, ws->n_pages * sizeof(uint32_t));
    for (uint32_t i = 0; i < ws->n_pages; i++)
        ws->free[i] = ws->n_pages - 1 - i; /* page 0 is taken first */
    *workspace = ws;
    return DSV3_OK;
}

/* Bytes that dsv3__ws_open takes. */
static uint64_t dsv3__ws_memory(const dsv3_model *m, const dsv3_workspace_opts *o, uint64_t *cache_bytes)
{
    dsv3_workspace ws;
    uint64_t threads = 0;
    memset(&ws, 0, sizeof ws);
    ws.m = m;
    ws.cache_latent = o->cache_latent, ws.cache_rope = o->cache_rope;
    ws.n_pages = o->n_pages;
    ws.pool.n_threads = 1;
    if (o->executor.run_fn) {
        ws.pool.n_threads = o->executor.n_threads ? o->executor.n_threads : 1;
    } else {
#ifndef DSV3_NO_THREADS
        ws.pool.n_threads = o->n_threads ? o->n_threads : dsv3__os_cores();
        threads = ws.pool.n_threads > 1 ? (ws.pool.n_threads - 1) * sizeof(dsv3__thread) + DSV3__MEM_HEADER : 0;
#endif
    }
    uint64_t block = dsv3__ws_plan(&ws, o->max_batch, NULL);
    *cache_bytes = 0;
    dsv3__carve(NULL, cache_bytes, ws.n_pages, ws.work.page_bytes);
    return block + DSV3__MEM_HEADER + sizeof(dsv3_workspace) + DSV3__MEM_HEADER + threads;
}

/* The rows that `page` has at positions below n go to `to`. */
static void dsv3__ws_copy_rows(dsv3_workspace *ws, uint32_t to, uint32_t page, uint32_t n)
{
    const dsv3__work *w = &ws->work;
    for (uint64_t layer = 0; layer < w->page_bytes; layer += w->layer_bytes) {
        const uint8_t *src = w->cache + page * w->page_bytes + layer;
        uint8_t *dst = w->cache + to * w->page_bytes + layer;
        for (uint32_t i = 0; i < 4; i++) {
            uint64_t offset;
            size_t row = dsv3__mla_piece(w, i, &offset);
            memcpy(dst + offset, src + offset, row * n);
        }
    }
}

// =============================================================================
// >>ses   One timeline: its tokens, the pages of its cache, the logits of its last token; and a pass for any number of
//         them. Memory is fixed at open; appending, sampling and generating from ids allocate nothing.
// =============================================================================

/* What drafting has cost and brought, for DSV3_DRAFT_AUTO. Seconds decide whether to guess, never what is written. */
typedef struct dsv3__ses_pace {
    double pass[DSV3__DRAFT_MAX + 2]; /* seconds of a pass over so many rows, moving means; 0: not seen yet */
    double draft;                     /* seconds of guessing a token; negative: not seen yet */
    double holds[DSV3__DRAFT_MAX];    /* the i-th guess is right, when those before were: moving means */
    uint32_t seen[DSV3__DRAFT_MAX];   /* how often that was looked at */
    double saved;                     /* seconds that drafting has won, and a share of all others: what may be risked */
    uint32_t since_plain;             /* passes since the last over one row */
    uint32_t n_tokens, n_rows;        /* the last pass: its start, and its rows; 0: none to judge */
    double seconds;                   /* what it took, guesses included */
} dsv3__ses_pace;

struct dsv3_session {
    const dsv3_model *m;
    dsv3_workspace *ws;
    dsv3_progress progress;
    uint32_t max_tokens;
    uint32_t n_tokens; /* what the caller sees */
    uint32_t n_cached; /* cache rows 0 ... n_cached - 1 are right; behind them run again */
    uint32_t cancel;   /* atomic; set from any thread */
    bool logits_valid;
    uint32_t n_pages;        /* that it names: ceil(n_cached / DSV3_PAGE_TOKENS) between calls */
    uint32_t reserve, drawn; /* pages promised, and how many of them it has */
    bool lent;               /* its last page is there for guesses alone, and was not promised */
    dsv3__ws_logits *owned;  /* whose values `logits` are */
    float *logits;           /* [vocab_size] of the last token */
    int32_t *tokens;         /* [max_tokens] */
    uint32_t *pages;         /* [ceil(max_tokens / DSV3_PAGE_TOKENS)] */
    /* of drafts */
    dsv3_drafter drafter;
    uint32_t n_draft, max_draft; /* as asked for, and at most */
    size_t (*draft_fn)(void *user, const int32_t *tokens, size_t n_tokens, int32_t *draft, size_t cap);
    void *draft_user;
    uint32_t n_ahead;    /* tokens n_tokens ... n_tokens + n_ahead - 1 are guesses that have been run: with their */
    uint32_t ahead_from; /* logits in `ahead`, whose first is of this token */
    float *ahead;        /* [max_draft, vocab_size] */
    dsv3__ses_pace pace;
    dsv3__mtp mtp;
    /* of the pass at hand, see dsv3__ses_run */
    bool listed;
    uint32_t keep;    /* tokens that stay; set by the caller */
    uint32_t guesses; /* behind all tokens: so many of `tokens`, to be run too; set by the caller, 0 between passes */
    uint32_t valid;   /* cache rows that are right, of those */
    uint32_t at, end; /* the next position to run, and how many tokens there will be, guesses too */
    uint32_t take;    /* rows in this piece */
    size_t next_row;  /* of outputs->logit_rows */
    const float *written; /* logits of the last row */
};

DSV3__INLINE uint32_t dsv3__ses_pages_of(uint32_t n_tokens)
{
    return (n_tokens + DSV3_PAGE_TOKENS - 1) / DSV3_PAGE_TOKENS;
}

/* AUTO guesses at most so many: what repeats itself goes on for longer. */
#define DSV3__SES_AUTO_MTP    4u
#define DSV3__SES_AUTO_OTHERS 8u

/* Lays a session out, itself in front; returns its bytes. What it is to know of drafts is put into it. max_batch: its
   workspace's. */
static uint64_t dsv3__ses_plan(dsv3_session *s, const dsv3_model *m, const dsv3_session_opts *o, uint32_t max_batch,
                               uint8_t *base)
{
    const uint32_t max_tokens = o->max_tokens;
    uint64_t used = 0;
    s->n_draft = o->n_draft;
    s->drafter = o->drafter;
    s->draft_fn = o->draft_fn, s->draft_user = o->draft_user;
    s->max_draft = o->n_draft != DSV3_DRAFT_AUTO    ? o->n_draft
                   : o->drafter == DSV3_DRAFTER_MTP ? DSV3__SES_AUTO_MTP
                                                    : DSV3__SES_AUTO_OTHERS;
    s->max_draft = (uint32_t)dsv3__min(s->max_draft, max_batch - 1); /* they and a true row make one pass */
    s->pace.draft = -1;
    s->mtp.n = s->n_draft && s->drafter == DSV3_DRAFTER_MTP ? m->n_mtp : 0;
    s->mtp.cap = max_batch + 2;
    s->mtp.stride = dsv3__mm_pad(m->config.hidden_size);
    dsv3__carve(base, &used, 1, sizeof(dsv3_session));
    s->tokens = (int32_t *)dsv3__carve(base, &used, max_tokens, sizeof(int32_t));
    s->pages = (uint32_t *)dsv3__carve(base, &used, dsv3__ses_pages_of(max_tokens), sizeof(uint32_t));
    s->ahead = (float *)dsv3__carve(base, &used, (uint64_t)s->max_draft * m->config.vocab_size, sizeof(float));
    uint64_t states = used;
    for (uint32_t k = 0; k < s->mtp.n; k++)
        s->mtp.q[k].states =
            (float *)dsv3__carve(base, &used, ((uint64_t)s->mtp.cap + k) * s->mtp.stride, sizeof(float));
    s->mtp.ahead = (float *)dsv3__carve(base, &used, s->mtp.n ? (s->mtp.n + 1) * s->mtp.stride : 0, sizeof(float));
    if (base)
        memset(base + states, 0, (size_t)(used - states)); /* padded as the scratch is */
    return used;
}

/* Options with their defaults in place; those of its workspace, where it has one of its own. */
static dsv3_result dsv3__ses_opts(dsv3_session_opts *o, dsv3_workspace_opts *w, const dsv3_model *m,
                                  const dsv3_session_opts *opts, dsv3_error *err)
{
    dsv3_workspace_opts given;
    memset(o, 0, sizeof *o);
    memset(w, 0, sizeof *w);
    if (opts) {
        if (opts->struct_size && opts->struct_size != sizeof *o)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "session opts: struct_size is %u, expected 0 or %u",
                              (uint64_t)opts->struct_size, (uint64_t)sizeof *o);
        *o = *opts;
    }
    if (!o->max_tokens)
        o->max_tokens = m->config.max_position_embeddings < 4096 ? m->config.max_position_embeddings : 4096;
    if (o->max_tokens > 1u << 30)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "session opts: max_tokens is %u, at most 2^30",
                          (uint64_t)o->max_tokens);
    if (o->n_draft > DSV3__DRAFT_MAX && o->n_draft != DSV3_DRAFT_AUTO)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "session opts: n_draft is %u, at most %u",
                          (uint64_t)o->n_draft, (uint64_t)DSV3__DRAFT_MAX);
    if (o->drafter == DSV3_DRAFTER_AUTO)
        o->drafter = m->n_mtp ? DSV3_DRAFTER_MTP : DSV3_DRAFTER_LOOKUP;
    if (o->drafter == DSV3_DRAFTER_MTP && !m->n_mtp)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS,
                          "session opts: the checkpoint has no layer of multi-token prediction to draft with");
    if ((int32_t)o->drafter < DSV3_DRAFTER_AUTO || o->drafter > DSV3_DRAFTER_HOST)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "session opts: drafter %d", (int64_t)o->drafter);
    if (o->drafter == DSV3_DRAFTER_HOST && !o->draft_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "session opts: DSV3_DRAFTER_HOST without draft_fn");
    if (o->workspace && o->workspace->m != m)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "session opts: the workspace is of another model");
    if (o->workspace)
        return DSV3_OK;
    memset(&given, 0, sizeof given);
    given.n_pages = dsv3__ses_pages_of(o->max_tokens);
    given.max_batch = o->max_batch, given.n_threads = o->n_threads;
    given.cache_latent = o->cache_latent, given.cache_rope = o->cache_rope;
    given.memory_limit = o->memory_limit;
    given.executor = o->executor, given.allocator = o->allocator;
    o->reserve_pages = 0;
    DSV3__TRY(dsv3__ws_opts(w, m, &given, "session", err));
    w->max_batch = w->max_batch < o->max_tokens ? w->max_batch : o->max_tokens;
    return DSV3_OK;
}

/* Gives the logits that it names back; they are spare when nobody else does. */
static void dsv3__ses_drop_logits(dsv3_session *s)
{
    if (--s->owned->refs == 0) {
        s->owned->next = s->ws->spare;
        s->ws->spare = s->owned;
    }
    s->owned = NULL;
}

/* Takes spare ones. There are as many as sessions, this one names none: so there is one. */
static void dsv3__ses_take_logits(dsv3_session *s)
{
    s->owned = s->ws->spare;
    s->ws->spare = s->owned->next;
    s->owned->refs = 1;
    s->logits = s->owned->values;
}

/* One name less for a page. If it was the last, the page is free, and set aside again up to `reserve`. */
static void dsv3__ses_give_page(dsv3_session *s, uint32_t page)
{
    dsv3_workspace *ws = s->ws;
    if (--ws->refs[page])
        return;
    ws->free[ws->n_free++] = page;
    if (!s->lent && s->drawn)
        s->drawn--, ws->n_promised++;
    s->lent = false;
}

/* Forgets the pages from number n_pages on. */
static void dsv3__ses_trim(dsv3_session *s, uint32_t n_pages)
{
    while (s->n_pages > n_pages)
        dsv3__ses_give_page(s, s->pages[--s->n_pages]);
}

/* A free page: one that was promised, as long as there are. The caller knows that there is one. */
static uint32_t dsv3__ses_take_page(dsv3_session *s)
{
    dsv3_workspace *ws = s->ws;
    uint32_t page = ws->free[--ws->n_free];
    if (s->drawn < s->reserve)
        s->drawn++, ws->n_promised--;
    ws->refs[page] = 1;
    return page;
}

static void dsv3__ses_close(dsv3_session *s)
{
    dsv3_workspace *ws = s->ws;
    dsv3__ses_trim(s, 0);
    ws->n_promised -= s->reserve - s->drawn;
    dsv3__ses_drop_logits(s);
    dsv3__ws_logits *spare = ws->spare; /* one less for one session less */
    ws->spare = spare->next;
    dsv3__mem_free(&ws->mem, spare);
    dsv3__mem_free(&ws->mem, s);
    ws->n_sessions--;
    if (ws->own && !ws->n_sessions)
        dsv3__ws_close(ws);
}

/* A session without tokens in this workspace, with logits that are spare. Options as dsv3__ses_opts leaves them. */
static dsv3_result dsv3__ses_new(dsv3_session **session, dsv3_workspace *ws, const dsv3_session_opts *o,
                                 dsv3_error *err)
{
    const uint64_t vocab = ws->m->config.vocab_size;
    const uint32_t reserve = o->reserve_pages, max_batch = ws->work.max_batch;
    dsv3_session plan;
    void *block, *logits;
    if (reserve > ws->n_free - ws->n_promised)
        return DSV3__FAIL(err, DSV3_ERROR_CACHE_FULL, "session: %u pages to be reserved, the workspace has %u",
                          (uint64_t)reserve, (uint64_t)(ws->n_free - ws->n_promised));
    DSV3__TRY(dsv3__mem_alloc(&ws->mem, &block, dsv3__ses_plan(&plan, ws->m, o, max_batch, NULL), "session", err));
    dsv3_result r = dsv3__mem_alloc(&ws->mem, &logits, DSV3__WS_LOGITS_HEADER + vocab * sizeof(float), "logits", err);
    if (r) {
        dsv3__mem_free(&ws->mem, block);
        return r;
    }
    dsv3_session *s = (dsv3_session *)block;
    memset(s, 0, sizeof *s);
    dsv3__ses_plan(s, ws->m, o, max_batch, (uint8_t *)block);
    s->m = ws->m;
    s->ws = ws;
    s->progress = o->progress;
    s->max_tokens = o->max_tokens;
    s->reserve = reserve;
    ws->n_promised += reserve;
    ws->n_sessions++;
    dsv3__ws_logits *l = (dsv3__ws_logits *)logits;
    l->values = (float *)(void *)((uint8_t *)logits + DSV3__WS_LOGITS_HEADER);
    l->next = ws->spare;
    ws->spare = l;
    dsv3__ses_take_logits(s);
    *session = s;
    return DSV3_OK;
}

static dsv3_result dsv3__ses_open(dsv3_session **session, const dsv3_model *m, const dsv3_session_opts *opts,
                                  dsv3_error *err)
{
    dsv3_session_opts o;
    dsv3_workspace_opts w;
    DSV3__TRY(dsv3__ses_opts(&o, &w, m, opts, err));
    dsv3_workspace *ws = o.workspace;
    if (ws && ws->running)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "the workspace is running: no session can be opened");
    if (!ws)
        DSV3__TRY(dsv3__ws_open(&ws, m, &w, err));
    dsv3_result r = dsv3__ses_new(session, ws, &o, err);
    if (!o.workspace && r)
        dsv3__ws_close(ws);
    else if (!o.workspace)
        ws->own = true;
    return r;
}

static dsv3_result dsv3__ses_memory(const dsv3_model *m, const dsv3_session_opts *opts, dsv3_memory *memory,
                                    dsv3_error *err)
{
    dsv3_session_opts o;
    dsv3_workspace_opts w;
    dsv3_session s;
    DSV3__TRY(dsv3__ses_opts(&o, &w, m, opts, err));
    memory->file_bytes = m->st.data_bytes;
    memory->model_bytes = m->mem.used + (m->tokenizer ? m->tokenizer->mem.used : 0);
    memory->session_bytes = o.workspace ? 0 : dsv3__ws_memory(m, &w, &memory->cache_bytes);
    const uint32_t max_batch = o.workspace ? o.workspace->work.max_batch : w.max_batch;
    memory->session_bytes += dsv3__ses_plan(&s, m, &o, max_batch, NULL) + DSV3__MEM_HEADER;
    memory->session_bytes += DSV3__WS_LOGITS_HEADER + (uint64_t)m->config.vocab_size * sizeof(float) + DSV3__MEM_HEADER;
    memory->max_tokens = o.max_tokens;
    return DSV3_OK;
}

/* Forgets guesses that have been run, and all behind token n - 1. */
static void dsv3__ses_cut(dsv3_session *s, uint32_t n)
{
    s->logits_valid = s->logits_valid && n == s->n_tokens;
    s->n_ahead = 0;
    s->n_tokens = n;
    s->n_cached = s->n_cached < n ? s->n_cached : n;
    dsv3__mtp_cut(&s->mtp, n);
    dsv3__ses_trim(s, dsv3__ses_pages_of(s->n_cached));
}

/* Number i of its pages becomes its own, if it is not: a new one, or a copy of the first n_rows rows of one that is shared.
   The caller knows that there is one. */
static void dsv3__ses_own_page(dsv3_session *s, uint32_t i, uint32_t n_rows)
{
    dsv3_workspace *ws = s->ws;
    if (i >= s->n_pages) {
        s->pages[s->n_pages++] = dsv3__ses_take_page(s);
    } else if (ws->refs[s->pages[i]] > 1) {
        uint32_t shared = s->pages[i];
        s->pages[i] = dsv3__ses_take_page(s);
        dsv3__ws_copy_rows(ws, s->pages[i], shared, n_rows);
        ws->refs[shared]--;
    }
}

/* Rows of page number i among the first n of a timeline. */
static uint32_t dsv3__ses_rows_of(uint32_t n, uint32_t i)
{
    const uint32_t first = i * DSV3_PAGE_TOKENS;
    return n > first ? (uint32_t)dsv3__min(n - first, DSV3_PAGE_TOKENS) : 0;
}

/* Pages of its own behind the rows it has, up to position end - 1, or, where there are too few, nothing. */
static bool dsv3__ses_own(dsv3_session *s, uint32_t end)
{
    const dsv3_workspace *ws = s->ws;
    const uint32_t first = s->n_cached / DSV3_PAGE_TOKENS, last = dsv3__ses_pages_of(end);
    uint32_t need = 0, promised = s->reserve - s->drawn;
    for (uint32_t i = first; i < last; i++)
        need += i >= s->n_pages || ws->refs[s->pages[i]] > 1;
    if (need > promised && need - promised > ws->n_free - ws->n_promised)
        return false;
    for (uint32_t i = first; i < last; i++)
        dsv3__ses_own_page(s, i, dsv3__ses_rows_of(s->n_cached, i));
    return true;
}

/* Gives each session pages of its own where this pass writes: new ones, and copies of those that are shared. Either all
   that are wanted or, where the workspace has too few, none. */
static dsv3_result dsv3__ses_pages(const dsv3_batch_item *items, size_t n, dsv3_error *err)
{
    dsv3_workspace *ws = items[0].session->ws;
    uint64_t lack = 0; /* pages beyond those that are promised */
    for (size_t k = 0; k < n; k++) {
        const dsv3_session *s = items[k].session;
        uint32_t need = 0, promised = s->reserve - s->drawn;
        for (uint32_t i = s->valid / DSV3_PAGE_TOKENS; s->valid < s->end && i < dsv3__ses_pages_of(s->end); i++)
            if (i >= s->n_pages || ws->refs[s->pages[i]] - ws->marks[s->pages[i]] > 1) {
                need++;
                if (i < s->n_pages)
                    ws->marks[s->pages[i]]++; /* one name less: the last one need not copy */
            }
        lack += need > promised ? need - promised : 0;
    }
    for (size_t k = 0; k < n; k++) {
        const dsv3_session *s = items[k].session;
        for (uint32_t i = s->valid / DSV3_PAGE_TOKENS; i < s->n_pages; i++)
            ws->marks[s->pages[i]] = 0;
    }
    if (lack > ws->n_free - ws->n_promised)
        return DSV3__FAIL(err, DSV3_ERROR_CACHE_FULL, "append: %u pages more than the workspace has: %u of %u are free",
                          lack - (ws->n_free - ws->n_promised), (uint64_t)(ws->n_free - ws->n_promised),
                          (uint64_t)ws->n_pages);
    for (size_t k = 0; k < n; k++) {
        dsv3_session *s = items[k].session;
        for (uint32_t i = s->valid / DSV3_PAGE_TOKENS; s->valid < s->end && i < dsv3__ses_pages_of(s->end); i++)
            dsv3__ses_own_page(s, i, dsv3__ses_rows_of(s->valid, i));
    }
    return DSV3_OK;
}

/* A row of this timeline, of which nothing else is said yet. */
static void dsv3__ses_like(dsv3_session *s, dsv3__row *row)
{
    memset(row, 0, sizeof *row);
    row->pages = s->pages;
    row->cancel = &s->cancel;
}

/* Lets the prediction layers follow up to token n_tokens - 1; the arguments are dsv3__mtp_follow's. */
static dsv3_result dsv3__ses_follow(dsv3_session *s, const dsv3__mtp_ids *ids, uint32_t n_tokens, float *logits,
                                    uint32_t from, dsv3_error *err)
{
    dsv3_workspace *ws = s->ws;
    dsv3__row like;
    dsv3__ses_like(s, &like);
    uint32_t saved = dsv3__fp_enter();
    dsv3_result r =
        dsv3__mtp_follow(&ws->work, &s->mtp, &like, ids, n_tokens, logits, from, s->mtp.n, ws->rows, ws->asked, err);
    dsv3__fp_leave(saved);
    return r;
}

/* Only counts are raised: nothing of the cache is copied. What waits in line for the parent's prediction layers is run
   first, so that it is not run for parent and child. */
static dsv3_result dsv3__ses_fork(dsv3_session **child, dsv3_session *s, uint32_t reserve, dsv3_error *err)
{
    dsv3_session *f;
    dsv3_session_opts o;
    memset(&o, 0, sizeof o);
    o.max_tokens = s->max_tokens, o.reserve_pages = reserve, o.progress = s->progress;
    o.n_draft = s->n_draft, o.drafter = s->drafter, o.draft_fn = s->draft_fn, o.draft_user = s->draft_user;
    DSV3__TRY(dsv3__ses_new(&f, s->ws, &o, err));
    if (s->mtp.n) {
        dsv3__mtp_ids ids;
        dsv3_error ignored; /* they stop where they are */
        ids.old = s->tokens, ids.more = NULL, ids.n_old = UINT32_MAX;
        s->ws->running = true;
        dsv3__ses_follow(s, &ids, s->n_cached, NULL, 0, &ignored);
        s->ws->running = false;
    }
    memcpy(f->tokens, s->tokens, s->n_tokens * sizeof *s->tokens);
    memcpy(f->pages, s->pages, s->n_pages * sizeof *s->pages);
    for (uint32_t i = 0; i < s->n_pages; i++)
        s->ws->refs[s->pages[i]]++;
    f->n_pages = s->n_pages, f->n_tokens = s->n_tokens, f->n_cached = s->n_cached;
    if (s->mtp.n)
        dsv3__mtp_restart(&f->mtp, s->mtp.q[s->mtp.n - 1].done);
    f->logits_valid = s->logits_valid;
    if (s->logits_valid) {
        dsv3__ses_drop_logits(f);
        f->owned = s->owned, f->logits = s->logits;
        s->owned->refs++;
    }
    *child = f;
    return DSV3_OK;
}

/* Row of the next position of this session. */
static void dsv3__ses_row(dsv3_session *s, const dsv3_batch_item *item, dsv3__row *row)
{
    const dsv3_config *c = &s->m->config;
    const dsv3_outputs *out = item->outputs;
    const size_t experts = (size_t)(c->num_hidden_layers - c->first_k_dense_replace) * c->num_experts_per_tok;
    const uint32_t position = s->at++, n_tokens = s->end - s->guesses;
    dsv3__ses_like(s, row);
    row->position = position;
    row->draft = position >= n_tokens;
    row->token = position < s->keep || row->draft ? s->tokens[position] : item->tokens[position - s->keep];
    row->cached = position < s->valid;
    if (s->mtp.n)
        row->state = dsv3__mtp_place(&s->mtp, 0, position);
    if (row->draft)
        row->logits = s->ahead + (size_t)(position - n_tokens) * c->vocab_size;
    else if (position + 1 == n_tokens)
        row->logits = s->logits;
    if (out && position >= s->keep && !row->draft) {
        const uint32_t i = position - s->keep;
        if (out->experts)
            row->experts = out->experts + i * experts;
        if (out->logits && !out->logit_rows)
            row->logits = out->logits + (size_t)i * c->vocab_size;
        else if (out->logits && s->next_row < out->n_logit_rows && out->logit_rows[s->next_row] == i)
            row->logits = out->logits + s->next_row++ * c->vocab_size;
    }
    if (position + 1 == n_tokens)
        s->written = row->logits;
}

/* What a pass does for prediction layers before its first row. */
static void dsv3__ses_run_begin(dsv3_session *s, const dsv3_batch_item *item)
{
    s->n_ahead = 0;
    dsv3__mtp_cut(&s->mtp, s->keep);
    if (s->mtp.n && s->at > s->mtp.q[0].end)
        s->at = s->mtp.q[0].end; /* states that are missing: these rows run again */
    if (item->outputs && item->outputs->draft_logits)
        memset(item->outputs->draft_logits, 0,
               item->count * s->mtp.n * s->m->config.vocab_size * sizeof *item->outputs->draft_logits);
}

/* Prediction layers run what the first n tokens and their states allow. */
static dsv3_result dsv3__ses_run_follow(dsv3_session *s, const dsv3_batch_item *item, uint32_t n, dsv3_error *err)
{
    dsv3__mtp_ids ids;
    ids.old = s->tokens, ids.more = item->tokens, ids.n_old = item->count ? s->keep : UINT32_MAX;
    return dsv3__ses_follow(s, &ids, n, item->outputs ? item->outputs->draft_logits : NULL, s->keep, err);
}

/* Runs for each session, listed once, the tokens it keeps (`keep`, set by the caller) and has not run, then those of its
   item, then its guesses: max_batch rows at a time, whoever's they are. In the end each holds keep + count tokens, the
   logits of the last, and those of the guesses in `ahead`. */
static dsv3_result dsv3__ses_run(const dsv3_batch_item *items, size_t n, dsv3_error *err)
{
    dsv3_workspace *ws = n ? items[0].session->ws : NULL;
    bool any = false;
    for (size_t k = 0; k < n; k++) {
        dsv3_session *s = items[k].session;
        s->end = s->keep + (uint32_t)items[k].count + s->guesses;
        s->valid = s->n_cached < s->keep ? s->n_cached : s->keep;
        s->at = s->valid;
        const uint32_t n_tokens = s->end - s->guesses;
        if (s->at == n_tokens && n_tokens && !(s->logits_valid && s->n_tokens == n_tokens))
            s->at--; /* its last row is run again, for the logits */
        s->next_row = 0;
        s->written = NULL;
        any = any || s->at < s->end;
    }
    if (!any)
        return DSV3_OK;
    DSV3__TRY(dsv3__ses_pages(items, n, err));
    for (size_t k = 0; k < n; k++) {
        dsv3_session *s = items[k].session;
        if (s->at == s->end)
            continue;
        dsv3__ses_run_begin(s, &items[k]);
        if (s->owned->refs > 1) {
            dsv3__ses_drop_logits(s);
            dsv3__ses_take_logits(s);
        }
    }
    dsv3_result r = DSV3_OK;
    ws->running = true;
    for (size_t k = 0; k < n && !r;) {
        uint32_t rows = 0;
        size_t first = k, last = k; /* items of this piece: first ... last - 1 */
        for (; last < n && rows < ws->work.max_batch && !r; last++) {
            dsv3_session *s = items[last].session;
            s->take = (uint32_t)dsv3__min(ws->work.max_batch - rows, s->end - s->at);
            rows += s->take;
            if (s->mtp.n && s->take && s->at + s->take > s->mtp.q[0].first + s->mtp.cap) { /* the line moves up */
                r = dsv3__ses_run_follow(s, &items[last], s->at + 1, err);
                dsv3__mtp_room(&s->mtp, 0, s->at + s->take);
            }
        }
        rows = 0;
        for (size_t j = first; j < last && !r; j++)
            for (uint32_t i = 0; i < items[j].session->take; i++)
                dsv3__ses_row(items[j].session, &items[j], &ws->rows[rows++]);
        uint32_t saved = dsv3__fp_enter();
        if (rows && !r)
            r = dsv3__fwd_rows(&ws->work, ws->rows, rows, ws->asked, err);
        dsv3__fp_leave(saved);
        for (size_t j = first; j < last && !r; j++) {
            dsv3_session *s = items[j].session;
            const uint32_t done = s->at > s->keep ? s->at - s->keep : 0;
            if (!s->take)
                continue;
            if (s->at == s->end && s->written && s->written != s->logits)
                memcpy(s->logits, s->written, s->m->config.vocab_size * sizeof(float));
            if (s->mtp.n && s->mtp.q[0].end < s->at)
                s->mtp.q[0].end = s->at;
            if (s->mtp.n && items[j].outputs && items[j].outputs->draft_logits)
                r = dsv3__ses_run_follow(s, &items[j], s->at, err);
            if (!r && done && items[j].count && s->progress.fn &&
                !s->progress.fn(s->progress.user, done, items[j].count))
                r = DSV3__FAIL(err, DSV3_ERROR_CANCELLED, "cancelled by the progress callback behind %u of %u tokens",
                               (uint64_t)done, (uint64_t)items[j].count);
        }
        for (k = first; k < last && items[k].session->at == items[k].session->end;)
            k++;
    }
    ws->running = false;
    for (size_t k = 0; k < n; k++) {
        dsv3_session *s = items[k].session;
        if (r == DSV3_ERROR_CANCELLED)
            dsv3__atomic_store(&s->cancel, 0);
        if (r) {
            s->n_cached = s->valid;
            s->logits_valid = false; /* run again when asked for */
            dsv3__mtp_cut(&s->mtp, s->valid);
            s->n_ahead = 0;
        } else {
            if (items[k].count)
                memmove(s->tokens + s->keep, items[k].tokens, items[k].count * sizeof *s->tokens);
            s->n_tokens = s->n_cached = s->end - s->guesses;
            s->n_ahead = s->guesses;
            s->ahead_from = s->n_tokens;
            s->logits_valid = s->end > 0;
        }
        dsv3__ses_trim(s, dsv3__ses_pages_of(s->n_cached + s->n_ahead));
    }
    return r;
}

/* Can this be run behind the first `keep` tokens? */
static dsv3_result dsv3__ses_check(const dsv3_session *s, uint32_t keep, const dsv3_batch_item *item, dsv3_error *err)
{
    const dsv3_outputs *outputs = item->outputs;
    const size_t count = item->count;
    if (count && !item->tokens)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "append: tokens is NULL");
    if (outputs && outputs->struct_size && outputs->struct_size != sizeof *outputs)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "append: outputs.struct_size is %u, expected 0 or %u",
                          (uint64_t)outputs->struct_size, (uint64_t)sizeof *outputs);
    if (outputs && outputs->logit_rows) {
        if (outputs->n_logit_rows && !outputs->logits)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "append: outputs.logit_rows without outputs.logits");
        for (size_t i = 0; i < outputs->n_logit_rows; i++)
            if (outputs->logit_rows[i] >= count || (i && outputs->logit_rows[i] <= outputs->logit_rows[i - 1]))
                return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT,
                                  "append: outputs.logit_rows[%u] is %u: expected ascending, below %u", (uint64_t)i,
                                  (uint64_t)outputs->logit_rows[i], (uint64_t)count);
    }
    if (outputs && outputs->draft_logits && !s->mtp.n)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT,
                          "append: outputs.draft_logits, but the session does not draft with prediction layers");
    if (count > s->max_tokens - keep)
        return DSV3__FAIL(err, DSV3_ERROR_CONTEXT_FULL, "append: %u tokens behind %u, the session holds %u",
                          (uint64_t)count, (uint64_t)keep, (uint64_t)s->max_tokens);
    for (size_t i = 0; i < count; i++)
        if (item->tokens[i] < 0 || (uint32_t)item->tokens[i] >= s->m->config.vocab_size)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "append: token %u is %d, the vocabulary has %u",
                              (uint64_t)i, (int64_t)item->tokens[i], (uint64_t)s->m->config.vocab_size);
    return DSV3_OK;
}

/* Which item it was, in front of the message. */
static dsv3_result dsv3__ses_blame(size_t item, dsv3_error *err)
{
    dsv3_error plain = *err;
    dsv3__format(err->message, sizeof err->message, "item %u: %s", (uint64_t)item, plain.message);
    return err->code;
}

static dsv3_result dsv3__ses_batch(const dsv3_batch_item *items, size_t n, dsv3_error *err)
{
    dsv3_result r = DSV3_OK;
    size_t listed = 0;
    for (; listed < n && !r; listed++) {
        dsv3_session *s = items[listed].session;
        if (!s)
            r = DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "session is NULL");
        else if (s->ws->running)
            r = DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "the session is running: a callback may only cancel it");
        else if (s->ws != items[0].session->ws)
            r = DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "the session is of another workspace than item 0's");
        else if (s->listed)
            r = DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "the session is in the batch already");
        else
            r = dsv3__ses_check(s, s->n_tokens, &items[listed], err);
        if (r)
            break;
        s->keep = s->n_tokens;
        s->listed = true;
    }
    if (r)
        dsv3__ses_blame(listed, err);
    else
        r = dsv3__ses_run(items, n, err);
    while (listed--)
        items[listed].session->listed = false;
    return r;
}

/* The one-item case of a batch. */
static dsv3_result dsv3__ses_append(dsv3_session *s, const int32_t *tokens, size_t count, const dsv3_outputs *outputs,
                                    dsv3_error *err)
{
    dsv3_batch_item item;
    item.session = s, item.tokens = tokens, item.count = count, item.outputs = outputs;
    DSV3__TRY(dsv3__ses_check(s, s->n_tokens, &item, err));
    if (!count)
        return DSV3_OK;
    s->keep = s->n_tokens;
    return dsv3__ses_run(&item, 1, err);
}

static dsv3_result dsv3__ses_sync(dsv3_session *s, const int32_t *tokens, size_t count, size_t *kept, dsv3_error *err)
{
    dsv3_batch_item item;
    uint32_t keep = 0;
    if (count && !tokens)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "sync: tokens is NULL");
    while (keep < count && keep < s->n_tokens && tokens[keep] == s->tokens[keep])
        keep++;
    item.session = s, item.tokens = count ? tokens + keep : NULL, item.count = count - keep, item.outputs = NULL;
    DSV3__TRY(dsv3__ses_check(s, keep, &item, err));
    if (item.count) {
        s->keep = keep;
        DSV3__TRY(dsv3__ses_run(&item, 1, err));
    } else if (keep < s->n_tokens) {
        dsv3__ses_cut(s, keep);
    }
    *kept = keep;
    return DSV3_OK;
}

/* A token at the end that is only run when something behind it is needed. One that was guessed has been run: what is known
   behind it becomes the session's (but for logits that are not finite, which a run will tell of). Returns whether. */
static bool dsv3__ses_push(dsv3_session *s, int32_t token)
{
    const size_t vocab = s->m->config.vocab_size;
    const float *logits = s->n_ahead ? s->ahead + (s->n_tokens - s->ahead_from) * vocab : NULL;
    if (s->n_ahead && s->tokens[s->n_tokens] == token && dsv3__fwd_finite(logits, (uint32_t)vocab)) {
        memcpy(s->logits, logits, vocab * sizeof(float));
        s->n_cached = ++s->n_tokens;
        s->n_ahead--;
        return true;
    }
    dsv3__ses_cut(s, s->n_tokens);
    s->tokens[s->n_tokens++] = token;
    s->logits_valid = false;
    return false;
}

/* Runs what is missing up to the last token, and n guesses behind it, which stand in s->tokens. */
static dsv3_result dsv3__ses_ahead(dsv3_session *s, uint32_t n, dsv3_error *err)
{
    dsv3_batch_item item;
    memset(&item, 0, sizeof item);
    item.session = s;
    s->keep = s->n_tokens;
    s->guesses = n;
    dsv3_result r = dsv3__ses_run(&item, 1, err);
    s->guesses = 0;
    return r;
}

/* Makes s->logits those of the last token. */
static dsv3_result dsv3__ses_logits(dsv3_session *s, dsv3_error *err)
{
    if (!s->n_tokens)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "the session is empty: there are no logits yet");
    return s->logits_valid ? DSV3_OK : dsv3__ses_ahead(s, 0, err);
}

/* Ids that may be picked: the tokenizer's, if it knows fewer than the vocabulary has rows. */
static uint32_t dsv3__ses_pickable(const dsv3_session *s)
{
    dsv3_tokenizer_info info;
    if (!s->m->tokenizer)
        return s->m->config.vocab_size;
    dsv3_tokenizer_info_get(s->m->tokenizer, &info);
    return info.n_tokens > 0 && (uint32_t)info.n_tokens < s->m->config.vocab_size ? (uint32_t)info.n_tokens
                                                                                  : s->m->config.vocab_size;
}

/* The token at `position` from its logits, which are in s->ws->sampling and become scratch; -1: the mask allows none. It
   is a function of them, the options, the position and, with penalties, the tokens before. Floating-point state: ours. */
static int32_t dsv3__ses_pick(dsv3_session *s, const dsv3_sample_opts *o, uint32_t position)
{
    uint32_t pickable = dsv3__ses_pickable(s);
    if (o->mask && !dsv3__smp_mask(s->ws->sampling, pickable, o->mask))
        return -1;
    dsv3__smp_penalties(s->ws->sampling, s->m->config.vocab_size, s->tokens, position, o, s->ws->seen);
    return dsv3__smp_pick(s->ws->sampling, pickable, o, position);
}

static dsv3_result dsv3__ses_sample(dsv3_session *s, const dsv3_sample_opts *opts, dsv3_sample *sample, dsv3_error *err)
{
    dsv3_sample_opts greedy;
    memset(&greedy, 0, sizeof greedy);
    if (!opts)
        opts = &greedy;
    if (opts->struct_size && opts->struct_size != sizeof *opts)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "sample opts: struct_size is %u, expected 0 or %u",
                          (uint64_t)opts->struct_size, (uint64_t)sizeof *opts);
    if (!dsv3__smp_opts_ok(opts))
        return DSV3__FAIL(
            err, DSV3_ERROR_INVALID_OPTIONS,
            "sample opts: temperature %f, top_p %f, min_p %f, repetition_penalty %f: negative, above 1, or not finite",
            (double)opts->temperature, (double)opts->top_p, (double)opts->min_p, (double)opts->repetition_penalty);
    DSV3__TRY(dsv3__ses_logits(s, err));
    uint32_t vocab = s->m->config.vocab_size;
    memcpy(s->ws->sampling, s->logits, vocab * sizeof(float));
    uint32_t saved = dsv3__fp_enter();
    int32_t token = dsv3__ses_pick(s, opts, s->n_tokens);
    if (token >= 0)
        sample->logprob = (float)((double)s->logits[token] - dsv3__smp_log_sum(s->logits, vocab));
    dsv3__fp_leave(saved);
    if (token < 0)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "sample opts: the mask allows no token");
    sample->token = token;
    return DSV3_OK;
}

// ---- Generation ------------------------------------------------------------------------------------------

/* What the loop carries from token to token. */
typedef struct dsv3__gen {
    dsv3_session *s;
    const dsv3_generate_opts *o;
    dsv3__tok_stream stream;  /* bytes of an incomplete character */
    size_t n_held;            /* bytes in s->ws->held */
    dsv3_grammar_state text;  /* with a grammar: what it has seen */
    dsv3_grammar_state draft; /* the same, with the guesses made so far */
    bool pushed;              /* nothing has asked for what follows the last token */
} dsv3__gen;

static dsv3_result dsv3__gen_check(const dsv3_session *s, const dsv3_generate_opts *o, dsv3_error *err)
{
    if (o->struct_size && o->struct_size != sizeof *o)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "generate opts: struct_size is %u, expected 0 or %u",
                          (uint64_t)o->struct_size, (uint64_t)sizeof *o);
    if (o->sample.mask && (o->grammar || o->mask_fn))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "generate opts: sample.mask beside a grammar or mask_fn");
    if (o->grammar && !dsv3__gram_is_of(o->grammar, s->m->tokenizer))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "generate opts: the grammar is of another tokenizer");
    if ((o->n_stop_tokens && !o->stop_tokens) || (o->n_stop_strings && !o->stop_strings))
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "generate opts: a count of stops without the stops");
    for (size_t i = 0; i < o->n_stop_strings; i++) {
        size_t n = o->stop_strings[i] ? strlen(o->stop_strings[i]) : 0;
        if (n < 1 || n > DSV3__WS_STOP_MAX)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS,
                              "generate opts: stop string %u has %u bytes, expected 1 to %u", (uint64_t)i, (uint64_t)n,
                              (uint64_t)DSV3__WS_STOP_MAX);
        const char *at = o->stop_strings[i], *end = at + n;
        for (size_t step; at < end; at += step) /* half a character as a stop would hand the other half out */
            if (!(step = dsv3__utf8_length(at, end)))
                return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "generate opts: stop string %u is not UTF-8",
                                  (uint64_t)i);
    }
    return DSV3_OK;
}

static dsv3_stop dsv3__gen_stop_token(const dsv3__gen *g, int32_t token)
{
    const dsv3_config *c = &g->s->m->config;
    for (size_t i = 0; i < g->o->n_stop_tokens; i++)
        if (g->o->stop_tokens[i] == token)
            return DSV3_STOP_TOKEN;
    for (uint32_t i = 0; i < c->n_eos && !g->o->ignore_eos; i++)
        if (c->eos_token_id[i] == token)
            return DSV3_STOP_EOS;
    return DSV3_STOP_NONE;
}

/* What a grammar allows behind `text`, into mask [words]; false: nothing, the text is complete. */
static bool dsv3__gen_grammar_mask(const dsv3__gen *g, const dsv3_grammar_state *text, uint32_t *mask, uint32_t words)
{
    const dsv3_generate_opts *o = g->o;
    const dsv3_config *c = &g->s->m->config;
    const bool ends = dsv3_grammar_can_end(o->grammar, text);
    uint32_t any = 0;
    memset(mask, 0, words * sizeof *mask);
    dsv3__gram_mask(o->grammar, text, mask);
    for (uint32_t i = 0; i < c->n_eos && ends && !o->ignore_eos; i++)
        if (c->eos_token_id[i] >= 0 && (uint32_t)c->eos_token_id[i] < c->vocab_size)
            mask[c->eos_token_id[i] / 32] |= 1u << (c->eos_token_id[i] % 32);
    for (size_t i = 0; i < o->n_stop_tokens && ends; i++)
        if (o->stop_tokens[i] >= 0 && (uint32_t)o->stop_tokens[i] < c->vocab_size)
            mask[o->stop_tokens[i] / 32] |= 1u << (o->stop_tokens[i] % 32);
    for (uint32_t i = 0; i < words; i++)
        any |= mask[i];
    return any || !ends;
}

/* The tokens that may come next, into s->ws->masks. *stop: GRAMMAR where there is none because the text is complete. */
static dsv3_result dsv3__gen_mask(dsv3__gen *g, dsv3_stop *stop, dsv3_error *err)
{
    dsv3_session *s = g->s;
    const dsv3_generate_opts *o = g->o;
    const uint32_t words = (s->m->config.vocab_size + 31) / 32;
    uint32_t *mask = s->ws->masks, *host = s->ws->masks + words;
    memset(mask, 0xFF, words * sizeof *mask);
    memset(host, o->mask_fn ? 0 : 0xFF, words * sizeof *host);
    if (o->grammar && !dsv3__gen_grammar_mask(g, &g->text, mask, words))
        return *stop = DSV3_STOP_GRAMMAR, DSV3_OK;
    if (o->mask_fn) {
        s->ws->running = true;
        bool go_on = o->mask_fn(o->user, s->tokens, s->n_tokens, host);
        s->ws->running = false;
        if (!go_on || dsv3__atomic_load(&s->cancel)) {
            dsv3__atomic_store(&s->cancel, 0);
            return DSV3__FAIL(err, DSV3_ERROR_CANCELLED, "cancelled by mask_fn");
        }
    }
    for (uint32_t i = 0; i < words; i++)
        mask[i] &= host[i];
    return DSV3_OK;
}

// ---- Drafts ----------------------------------------------------------------------------------------------
//
// Guesses stand in s->tokens behind n_tokens and are run with the last token in one pass. The loop then samples token after
// token as ever, from logits that are there already as long as it picks what was guessed: a guess is accepted when it
// is what the loop would have written anyway. Nothing else knows of drafts, and nothing has to be undone.

/* The prediction layers' guess number j, picked as the sampler would pick the token at its place, by the same random
   number: so that it is the token that is going to be sampled as often as the two distributions let it. -1: none. */
static dsv3_result dsv3__gen_guess(dsv3__gen *g, uint32_t j, int32_t *token, dsv3_error *err)
{
    dsv3_session *s = g->s;
    dsv3_sample_opts how = g->o->sample;
    dsv3__row like;
    bool ok = true;
    *token = -1;
    dsv3__ses_like(s, &like);
    uint32_t saved = dsv3__fp_enter();
    dsv3_result r = dsv3__mtp_guess(&s->ws->work, &s->mtp, &like, s->tokens, s->n_tokens, j, s->ws->sampling, &ok,
                                    s->ws->rows, s->ws->asked, err);
    if (!r && ok && j == 0 && (g->o->grammar || g->o->mask_fn)) {
        how.mask = s->ws->masks; /* made for this position already */
    } else if (!r && ok && g->o->grammar) {
        const uint32_t words = (s->m->config.vocab_size + 31) / 32;
        ok = dsv3__gen_grammar_mask(g, &g->draft, s->ws->masks + words, words);
        how.mask = s->ws->masks + words;
    }
    if (!r && ok)
        *token = dsv3__ses_pick(s, &how, s->n_tokens + j);
    dsv3__fp_leave(saved);
    if (r == DSV3_ERROR_CANCELLED)
        dsv3__atomic_store(&s->cancel, 0);
    return r;
}

/* Makes room in the cache for the last token and k guesses behind it, or fewer; returns how many. Without pages there are
   no guesses; whether a run fails for lack of one is not decided here. */
static uint32_t dsv3__gen_room(dsv3_session *s, uint32_t k)
{
    const uint32_t n = s->n_tokens, n_free = s->ws->n_free, drawn = s->drawn;
    while (k && !dsv3__ses_own(s, n + k)) { /* without the last page */
        const uint32_t less = (dsv3__ses_pages_of(n + k) - 1) * DSV3_PAGE_TOKENS;
        k = less > n ? less - n : 0;
    }
    s->lent = s->n_pages > dsv3__ses_pages_of(n) && n_free - s->ws->n_free > s->drawn - drawn;
    return k;
}

/* Up to k guesses behind the session's tokens; *n: how many. They end before what cannot be, and behind what ends the
   text. */
static dsv3_result dsv3__gen_draft(dsv3__gen *g, uint32_t k, uint32_t *n, dsv3_error *err)
{
    dsv3_session *s = g->s;
    int32_t *draft = s->tokens + s->n_tokens;
    dsv3_stop stop = DSV3_STOP_NONE;
    *n = 0;
    k = dsv3__gen_room(s, k);
    if (!k)
        return DSV3_OK;
    if (s->drafter == DSV3_DRAFTER_LOOKUP)
        k = dsv3__mtp_lookup(s->tokens, s->n_tokens, k);
    if (s->drafter == DSV3_DRAFTER_HOST) {
        s->ws->running = true;
        k = (uint32_t)dsv3__min(s->draft_fn(s->draft_user, s->tokens, s->n_tokens, draft, k), k);
        s->ws->running = false;
    }
    if (g->o->grammar)
        g->draft = g->text;
    while (*n < k && stop == DSV3_STOP_NONE) {
        if (s->drafter == DSV3_DRAFTER_MTP)
            DSV3__TRY(dsv3__gen_guess(g, *n, &draft[*n], err));
        if (draft[*n] < 0 || (uint32_t)draft[*n] >= s->m->config.vocab_size)
            break;
        stop = dsv3__gen_stop_token(g, draft[*n]);
        if (g->o->grammar && stop == DSV3_STOP_NONE && !dsv3_grammar_accept(g->o->grammar, &g->draft, draft[*n]))
            break;
        ++*n;
    }
    return DSV3_OK;
}

/* A moving mean that believes its first values quickly. */
static void dsv3__ses_pace_mean(double *mean, double value, uint32_t n_before)
{
    *mean += (value - *mean) / (n_before < 15 ? n_before + 2 : 16);
}

/* Seconds of a pass over n rows: seen, or guessed from the longest one seen that is shorter. */
static double dsv3__ses_pace_pass(const dsv3__ses_pace *p, uint32_t n)
{
    uint32_t seen = n;
    while (seen > 1 && !(p->pass[seen] > 0))
        seen--;
    double a_row = seen > 1 ? (p->pass[seen] - p->pass[1]) / (seen - 1) : 0.3 * p->pass[1];
    return p->pass[seen] + (a_row > 0 ? a_row : 0) * (n - seen);
}

#define DSV3__PACE_SHARE 0.01 /* of the time without drafts may go into trying them again */
#define DSV3__PACE_PLAIN 48u  /* after so many passes with drafts one without: what they are measured by */

/* The last pass has brought what it has brought. n_tokens: now. */
static void dsv3__ses_pace_judge(dsv3__ses_pace *p, uint32_t n_tokens)
{
    const uint32_t n = p->n_rows;
    p->n_rows = 0;
    if (!n || n_tokens <= p->n_tokens)
        return;
    const uint32_t got = n_tokens - p->n_tokens; /* tokens: of the guesses, got - 1 were right */
    if (n == 1) {
        p->saved += DSV3__PACE_SHARE * p->seconds;
    } else {
        p->saved += got * p->pass[1] - p->seconds;
        for (uint32_t i = 0; i < n - 1 && i < got; i++) {
            if (!p->seen[i])
                p->holds[i] = i ? p->holds[i - 1] : 0.6;
            dsv3__ses_pace_mean(&p->holds[i], i + 1 < got, p->seen[i]++);
        }
    }
    if (p->saved > 8 * p->pass[1]) /* riches of long ago are no reason to lose now */
        p->saved = 8 * p->pass[1];
}

/* How many guesses are worth it, at most `cap`: the most tokens a second, by what was seen so far; none while it is not
   known what a plain pass takes. What is not seen to pay is tried when as much as it may lose has been saved. */
static uint32_t dsv3__ses_pace_choose(const dsv3__ses_pace *p, uint32_t cap)
{
    const double plain = p->pass[1], draft = p->draft < 0 ? 0.1 * plain : p->draft;
    double best = 0, tokens = 1, all = 1, holds = 0.6;
    uint32_t k = 0;
    if (!(plain > 0) || p->since_plain >= DSV3__PACE_PLAIN)
        return 0;
    best = 1 / plain;
    for (uint32_t i = 0; i < cap; i++) {
        holds = p->seen[i] ? p->holds[i] : holds;
        all *= holds, tokens += all;
        double rate = tokens / (dsv3__ses_pace_pass(p, i + 2) + (i + 1) * draft);
        if (rate > best)
            best = rate, k = i + 1;
    }
    if (k && p->seen[0] >= 8 && p->saved > 0)
        return k;
    k = k ? k : 1;
    return cap && p->saved > dsv3__ses_pace_pass(p, k + 1) + k * draft - plain ? k : 0;
}

/* Runs the last token, and guesses behind it. */
static dsv3_result dsv3__gen_ahead(dsv3__gen *g, dsv3_stats *stats, dsv3_error *err)
{
    dsv3_session *s = g->s;
    dsv3__ses_pace *p = &s->pace;
    uint32_t cap = (uint32_t)dsv3__min(s->max_draft, s->max_tokens - s->n_tokens), k = cap, n = 0;
    const bool alone = s->n_cached + 1 >= s->n_tokens; /* no other rows have to be run again */
    if (g->o->max_tokens)
        k = cap = (uint32_t)dsv3__min(cap, g->o->max_tokens - stats->n_generated - 1);
    if (s->n_draft == DSV3_DRAFT_AUTO) {
        dsv3__ses_pace_judge(p, s->n_tokens);
        k = dsv3__ses_pace_choose(p, cap);
    }
    double start = dsv3__os_seconds();
    s->lent = false;
    if (k)
        DSV3__TRY(dsv3__gen_draft(g, k, &n, err));
    double drafted = dsv3__os_seconds();
    p->n_tokens = s->n_tokens;
    DSV3__TRY(dsv3__ses_ahead(s, n, err));
    double end = dsv3__os_seconds();
    stats->drafted += n;
    stats->draft_seconds += drafted - start;
    if (!alone)
        return DSV3_OK;
    p->n_rows = n + 1;
    p->seconds = end - start;
    p->since_plain = n ? p->since_plain + 1 : 0;
    double *pass = &p->pass[n + 1];
    if (!(p->pass[1] > 0) && !n)
        p->saved = end - drafted; /* the first try is free */
    *pass = *pass > 0 ? *pass + (end - drafted - *pass) / 8 : end - drafted;
    if (n)
        p->draft = p->draft < 0 ? (drafted - start) / n : p->draft + ((drafted - start) / n - p->draft) / 8;
    return DSV3_OK;
}

// ---- Text ------------------------------------------------------------------------------------------------

/* Adds text to what is held, and says how much of it is certain: all before the first stop string, or else all but the
   longest end that could begin one. */
static size_t dsv3__gen_release(dsv3__gen *g, const char *text, size_t n, dsv3_stop *stop)
{
    char *held = g->s->ws->held;
    size_t certain;
    memcpy(held + g->n_held, text, n);
    g->n_held += n;
    for (size_t at = 0; at < g->n_held; at++) {
        for (size_t i = 0; i < g->o->n_stop_strings; i++) {
            size_t len = strlen(g->o->stop_strings[i]);
            if (len <= g->n_held - at && memcmp(held + at, g->o->stop_strings[i], len) == 0)
                return *stop = DSV3_STOP_STRING, at;
        }
    }
    for (certain = 0; certain < g->n_held; certain++) {
        size_t rest = g->n_held - certain, i = 0;
        while (i < g->o->n_stop_strings &&
               (strlen(g->o->stop_strings[i]) <= rest || memcmp(held + certain, g->o->stop_strings[i], rest) != 0))
            i++;
        if (i < g->o->n_stop_strings)
            break;
    }
    return certain;
}

/* Hands a token and `n` bytes of held text out, and forgets them. */
static void dsv3__gen_emit(dsv3__gen *g, int32_t id, float logprob, size_t n, dsv3_stop *stop)
{
    dsv3_token token;
    token.id = id;
    token.logprob = logprob;
    token.text = g->s->ws->held;
    token.len = n;
    g->s->ws->running = true;
    if (g->o->token_fn && !g->o->token_fn(g->o->user, &token) && *stop == DSV3_STOP_NONE)
        *stop = DSV3_STOP_CALLBACK;
    g->s->ws->running = false;
    g->n_held -= n;
    memmove(g->s->ws->held, g->s->ws->held + n, g->n_held);
}

/* The end: what was held back is text after all. */
static void dsv3__gen_flush(dsv3__gen *g, dsv3_stop stop)
{
    size_t n = dsv3__tok_stream_flush(&g->stream, g->s->ws->piece);
    dsv3_stop found = DSV3_STOP_NONE;
    if (stop == DSV3_STOP_STRING || stop == DSV3_STOP_CALLBACK)
        return;
    dsv3__gen_release(g, g->s->ws->piece, n, &found);
    if (g->n_held)
        dsv3__gen_emit(g, -1, 0, g->n_held, &found);
}

static dsv3_result dsv3__gen_loop(dsv3__gen *g, dsv3_stats *stats, dsv3_error *err)
{
    dsv3_session *s = g->s;
    while (stats->stop == DSV3_STOP_NONE) {
        dsv3_sample sample = {0, 0};
        dsv3_sample_opts how = g->o->sample;
        size_t n = 0, certain = 0;
        if (g->o->max_tokens && stats->n_generated == g->o->max_tokens) {
            stats->stop = DSV3_STOP_MAX_TOKENS;
            break;
        }
        if (s->n_tokens == s->max_tokens) {
            stats->stop = DSV3_STOP_CONTEXT;
            break;
        }
        if (dsv3__atomic_load(&s->cancel)) {
            dsv3__atomic_store(&s->cancel, 0);
            return DSV3__FAIL(err, DSV3_ERROR_CANCELLED, "cancelled behind %u generated tokens", stats->n_generated);
        }
        if (g->o->grammar || g->o->mask_fn) {
            DSV3__TRY(dsv3__gen_mask(g, &stats->stop, err));
            if (stats->stop != DSV3_STOP_NONE)
                break;
            how.mask = s->ws->masks;
        }
        if (s->max_draft && !s->logits_valid && dsv3__smp_opts_ok(&how))
            DSV3__TRY(dsv3__gen_ahead(g, stats, err));
        g->pushed = false;
        DSV3__TRY(dsv3__ses_sample(s, &how, &sample, err));
        g->pushed = true;
        stats->accepted += dsv3__ses_push(s, sample.token);
        stats->n_generated++;
        stats->stop = dsv3__gen_stop_token(g, sample.token);
        if (g->o->grammar && stats->stop == DSV3_STOP_NONE)
            dsv3_grammar_accept(g->o->grammar, &g->text, sample.token);
        if (s->m->tokenizer && stats->stop == DSV3_STOP_NONE) {
            const char *bytes = dsv3_token_bytes(s->m->tokenizer, sample.token, &n);
            if (bytes)
                n = dsv3__tok_stream_put(&g->stream, bytes, n, s->ws->piece);
            certain = dsv3__gen_release(g, s->ws->piece, n, &stats->stop);
        }
        dsv3__gen_emit(g, sample.token, sample.logprob, certain, &stats->stop);
    }
    return DSV3_OK;
}

/* Tokenizes and appends. */
static dsv3_result dsv3__gen_prompt(dsv3_session *s, const char *prompt, size_t len, const dsv3_generate_opts *o,
                                    dsv3_stats *stats, dsv3_error *err)
{
    uint32_t flags = (o->parse_markers ? (uint32_t)DSV3_TOKENIZE_MARKERS : 0) |
                     (!o->no_bos && s->n_tokens == 0 ? (uint32_t)DSV3_TOKENIZE_BOS : 0);
    size_t count = 0;
    void *tokens;
    if (!s->m->tokenizer)
        return *err = s->m->tokenizer_error, err->code;
    dsv3_result r = dsv3_tokenize(s->m->tokenizer, prompt, len, flags, NULL, 0, &count, err);
    if (r && r != DSV3_ERROR_BUFFER_TOO_SMALL)
        return r;
    DSV3__TRY(dsv3__mem_alloc(&s->ws->mem, &tokens, count * sizeof(int32_t), "prompt", err));
    r = dsv3_tokenize(s->m->tokenizer, prompt, len, flags, (int32_t *)tokens, count, &count, err);
    if (!r)
        r = dsv3__ses_append(s, (const int32_t *)tokens, count, NULL, err);
    dsv3__mem_free(&s->ws->mem, tokens);
    if (!r)
        stats->n_prompt = count;
    return r;
}

static dsv3_result dsv3__ses_generate(dsv3_session *s, const char *prompt, size_t len, const dsv3_generate_opts *opts,
                                      dsv3_stats *stats, dsv3_error *err)
{
    dsv3_generate_opts none;
    dsv3__gen g;
    memset(&none, 0, sizeof none);
    memset(&g, 0, sizeof g);
    g.s = s;
    g.o = opts ? opts : &none;
    DSV3__TRY(dsv3__gen_check(s, g.o, err));
    if (g.o->grammar)
        dsv3_grammar_start(g.o->grammar, &g.text);
    double start = dsv3__os_seconds();
    dsv3_result r = prompt ? dsv3__gen_prompt(s, prompt, len, g.o, stats, err) : DSV3_OK;
    stats->prompt_seconds = dsv3__os_seconds() - start;
    if (!r && !s->n_tokens)
        r = DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT,
                       "generate: the session and the prompt are empty, there is nothing to go on from");
    if (!r) {
        r = dsv3__gen_loop(&g, stats, err);
        if (g.pushed) { /* a last token that was guessed has been run: as if it had not, it would hold a page more */
            s->n_cached = (uint32_t)dsv3__min(s->n_cached, s->n_tokens - 1);
            s->logits_valid = false;
        }
        dsv3__ses_cut(s, s->n_tokens); /* what was guessed beyond the end */
        s->lent = false;
        s->pace.n_rows = 0;
        dsv3__gen_flush(&g, stats->stop);
        stats->decode_seconds = dsv3__os_seconds() - start - stats->prompt_seconds;
    }
    if (r == DSV3_ERROR_CANCELLED)
        stats->stop = DSV3_STOP_CANCELLED;
    return r;
}
// =============================================================================
// >>snap  Sessions written down and read again. Needs: ses. A snapshot is a file from anywhere: no number in it is used
//         before it was held against the model and the sessions it goes into, and nothing of a session changes before all
//         was read. Little-endian, in this order, checksums of all bytes before them:
//           header      256 bytes: dsv3__snap_header; its checksum is the last 8
//           sessions    [n_sessions] n_tokens, n_cached: u32 each
//           for each    tokens [n_tokens], numbers of its pages [ceil(n_cached / 64)]: u32. Pages are counted as they first
//                       occur, so that one that is shared is there once
//           pages       [n_pages] how many rows of each are stored: u32; checksum
//           for each    for each layer of the model, those of prediction left out, for each piece of it
//                       (dsv3__mla_piece): rows
//           checksum
// =============================================================================

#define DSV3__SNAP_HEADER  256u
#define DSV3__SNAP_VERSION 1u

/* A checksum of 64 bits, 32 bytes a step in four lanes. Each step is one-to-one in the lane and in the word, so a change of
   bytes of one word never goes unseen. */
typedef struct dsv3__snap_sum {
    uint64_t lane[4], total;
    uint8_t part[32];
} dsv3__snap_sum;

static void dsv3__snap_sum_start(dsv3__snap_sum *sum)
{
    memset(sum, 0, sizeof *sum);
    for (uint32_t i = 0; i < 4; i++)
        sum->lane[i] = 0x9E3779B97F4A7C15ull * (i + 1);
}

static void dsv3__snap_sum_add(dsv3__snap_sum *sum, const void *data, size_t n)
{
    const uint8_t *p = (const uint8_t *)data;
    uint64_t a = sum->lane[0], b = sum->lane[1], c = sum->lane[2], d = sum->lane[3];
    while (n) {
        const uint8_t *from = p;
        size_t at = (size_t)(sum->total % 32), take = dsv3__min(n, 32 - at);
        if (take < 32) {
            memcpy(sum->part + at, p, take);
            from = sum->part;
        }
        p += take, n -= take, sum->total += take;
        if (at + take < 32)
            break;
#define DSV3__SNAP_STEP(lane, i)          \
    lane ^= dsv3__load64(from + 8 * (i)); \
    lane = (lane << 29 | lane >> 35) * 0xC2B2AE3D27D4EB4Full
        DSV3__SNAP_STEP(a, 0);
        DSV3__SNAP_STEP(b, 1);
        DSV3__SNAP_STEP(c, 2);
        DSV3__SNAP_STEP(d, 3);
#undef DSV3__SNAP_STEP
    }
    sum->lane[0] = a, sum->lane[1] = b, sum->lane[2] = c, sum->lane[3] = d;
}

/* Of all so far; more may follow. */
static uint64_t dsv3__snap_sum_get(const dsv3__snap_sum *sum)
{
    dsv3__snap_sum end = *sum;
    const uint8_t zeros[32] = {0};
    uint64_t h = sum->total;
    if (sum->total % 32)
        dsv3__snap_sum_add(&end, zeros, 32 - (size_t)(sum->total % 32));
    for (uint32_t i = 0; i < 4; i++) {
        h = (h ^ end.lane[i]) * 0x9FB21C651E98DF25ull;
        h ^= h >> 29;
    }
    return h;
}

static void dsv3__snap_number(dsv3__snap_sum *sum, uint64_t v)
{
    dsv3__snap_sum_add(sum, &v, sizeof v);
}

static void dsv3__snap_real(dsv3__snap_sum *sum, double v)
{
    dsv3__snap_sum_add(sum, &v, sizeof v);
}

/* 64 bytes from the middle of a weight. */
static void dsv3__snap_sample(dsv3__snap_sum *sum, const dsv3_tensor *t)
{
    if (!t->data)
        return;
    const uint64_t bytes =
        dsv3__ten_n_rows(t) > 1 ? dsv3__ten_n_rows(t) * t->row_stride : dsv3__ten_n_cols(t) * dsv3_dtype_size(t->dtype);
    const uint64_t n = bytes < 64 ? bytes : 64;
    dsv3__snap_sum_add(sum, (const uint8_t *)t->data + (bytes - n) / 2, (size_t)n);
}

/* Two models with the same one give the same rows: what they compute, all tensors by name, dtype and shape, and some bytes
   of the weights of every layer. Reads a few hundred pages of the files. */
static uint64_t dsv3__snap_fingerprint(const dsv3_model *m)
{
    const dsv3_config *c = &m->config;
    const uint32_t numbers[] = {c->vocab_size,
                                c->hidden_size,
                                c->intermediate_size,
                                c->moe_intermediate_size,
                                c->num_hidden_layers,
                                c->first_k_dense_replace,
                                c->num_attention_heads,
                                c->q_lora_rank,
                                c->kv_lora_rank,
                                c->qk_nope_head_dim,
                                c->qk_rope_head_dim,
                                c->v_head_dim,
                                c->n_routed_experts,
                                c->n_shared_experts,
                                c->num_experts_per_tok,
                                c->n_group,
                                c->topk_group,
                                (uint32_t)c->scoring_func,
                                (uint32_t)c->topk_method,
                                c->norm_topk_prob,
                                c->tie_word_embeddings,
                                c->rope_interleave,
                                c->rope_yarn,
                                c->rope_original_max_position_embeddings,
                                m->mode.powers};
    dsv3__snap_sum sum;
    dsv3__snap_sum_start(&sum);
    for (uint32_t i = 0; i < DSV3__COUNT(numbers); i++)
        dsv3__snap_number(&sum, numbers[i]);
    dsv3__snap_real(&sum, (double)c->routed_scaling_factor), dsv3__snap_real(&sum, (double)c->rms_norm_eps);
    dsv3__snap_real(&sum, c->rope_theta), dsv3__snap_real(&sum, c->rope_factor);
    dsv3__snap_real(&sum, c->rope_beta_fast), dsv3__snap_real(&sum, c->rope_beta_slow);
    dsv3__snap_real(&sum, c->rope_mscale), dsv3__snap_real(&sum, c->rope_mscale_all_dim);
    dsv3__snap_real(&sum, c->rope_attention_factor);
    for (uint64_t i = 0; i < m->st.n_tensors; i++) {
        const dsv3__st_tensor *t = &m->st.tensors[i];
        dsv3__snap_sum_add(&sum, t->name, strlen(t->name) + 1);
        dsv3__snap_number(&sum, t->dtype);
        dsv3__snap_sum_add(&sum, t->shape, t->rank * sizeof *t->shape);
    }
    dsv3__snap_sample(&sum, &m->embed), dsv3__snap_sample(&sum, &m->norm), dsv3__snap_sample(&sum, &m->head);
    for (uint32_t i = 0; i < c->num_hidden_layers; i++) {
        const dsv3__layer *l = &m->layers[i];
        dsv3__snap_sample(&sum, &l->input_norm), dsv3__snap_sample(&sum, &l->kv_a), dsv3__snap_sample(&sum, &l->kv_b);
        dsv3__snap_sample(&sum, &l->o), dsv3__snap_sample(&sum, &l->mlp.down), dsv3__snap_sample(&sum, &l->router);
        dsv3__snap_sample(&sum, &l->router_bias);
    }
    return dsv3__snap_sum_get(&sum);
}

typedef struct dsv3__snap_header {
    uint64_t total; /* bytes of the snapshot */
    uint64_t fingerprint;
    uint32_t compute, latent, rope_key; /* dsv3_compute, dsv3_cache, dsv3_cache */
    uint32_t n_sessions, n_pages;
    char model_type[32];
} dsv3__snap_header;

/* magic, version, total, fingerprint, five numbers, the name, zeros, checksum */
static void dsv3__snap_pack(uint8_t *bytes, const dsv3__snap_header *h)
{
    const uint32_t version = DSV3__SNAP_VERSION, size = DSV3__SNAP_HEADER;
    const uint32_t numbers[] = {h->compute, h->latent, h->rope_key, h->n_sessions, h->n_pages};
    dsv3__snap_sum sum;
    memset(bytes, 0, DSV3__SNAP_HEADER);
    memcpy(bytes, "DSV3SNAP", 8);
    memcpy(bytes + 8, &version, 4);
    memcpy(bytes + 12, &size, 4);
    memcpy(bytes + 16, &h->total, 8);
    memcpy(bytes + 24, &h->fingerprint, 8);
    memcpy(bytes + 32, numbers, sizeof numbers);
    memcpy(bytes + 64, h->model_type, sizeof h->model_type);
    dsv3__snap_sum_start(&sum);
    dsv3__snap_sum_add(&sum, bytes, DSV3__SNAP_HEADER - 8);
    const uint64_t checksum = dsv3__snap_sum_get(&sum);
    memcpy(bytes + DSV3__SNAP_HEADER - 8, &checksum, 8);
}

/* What a snapshot of these sessions has to say of the model and the cache. */
static void dsv3__snap_describe(dsv3__snap_header *h, const dsv3_workspace *ws)
{
    memset(h, 0, sizeof *h);
    h->fingerprint = dsv3__snap_fingerprint(ws->m);
    h->compute = (uint32_t)ws->m->mode.compute;
    h->latent = (uint32_t)ws->cache_latent, h->rope_key = (uint32_t)ws->cache_rope;
    memcpy(h->model_type, ws->m->config.model_type, sizeof h->model_type);
}

/* Bytes of a page's layers that a snapshot holds: prediction layers come behind them, and only guess. */
static uint64_t dsv3__snap_layers(const dsv3__work *w)
{
    return w->m->config.num_hidden_layers * w->layer_bytes;
}

/* Bytes of a position in the snapshot, all its layers. */
static uint64_t dsv3__snap_row(const dsv3__work *w)
{
    uint64_t offset, bytes = 0;
    for (uint32_t i = 0; i < 4; i++)
        bytes += dsv3__mla_piece(w, i, &offset);
    return bytes * w->m->config.num_hidden_layers;
}

/* Sessions of one workspace, none of them twice, none running: marks them `listed`, up to *listed, which the caller takes
   back. */
static dsv3_result dsv3__snap_list(dsv3_session *const *sessions, size_t n, size_t *listed, dsv3_error *err)
{
    for (*listed = 0; *listed < n; ++*listed) {
        dsv3_session *s = sessions[*listed];
        if (!s)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "session %u is NULL", (uint64_t)*listed);
        if (s->ws->running)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "session %u is running: a callback may only cancel it",
                              (uint64_t)*listed);
        if (s->ws != sessions[0]->ws)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "session %u is of another workspace than the first",
                              (uint64_t)*listed);
        if (s->listed)
            return DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "session %u is in the list already", (uint64_t)*listed);
        s->listed = true;
    }
    return n ? DSV3_OK : DSV3__FAIL(err, DSV3_ERROR_INVALID_ARGUMENT, "no sessions");
}

static void dsv3__snap_unlist(dsv3_session *const *sessions, size_t listed)
{
    while (listed--)
        sessions[listed]->listed = false;
}

// ---- Writing ---------------------------------------------------------------------------------------------

typedef struct dsv3__snap_out {
    const dsv3_sink *sink;
    dsv3__snap_sum sum;
} dsv3__snap_out;

static dsv3_result dsv3__snap_write(dsv3__snap_out *o, const void *data, size_t n, dsv3_error *err)
{
    if (!n)
        return DSV3_OK;
    const uint64_t at = o->sum.total;
    dsv3__snap_sum_add(&o->sum, data, n);
    if (!o->sink->write_fn(o->sink->user, data, n))
        return DSV3__FAIL(err, DSV3_ERROR_IO, "snapshot: writing %u bytes at %u failed", (uint64_t)n, at);
    return DSV3_OK;
}

static dsv3_result dsv3__snap_write_sum(dsv3__snap_out *o, dsv3_error *err)
{
    const uint64_t sum = dsv3__snap_sum_get(&o->sum);
    return dsv3__snap_write(o, &sum, sizeof sum, err);
}

/* The rows stored of a page: as many as the one that has most of them needs. */
static uint32_t dsv3__snap_stored(dsv3_session *const *sessions, size_t n, uint32_t i, uint32_t page)
{
    uint32_t rows = 0;
    for (size_t k = 0; k < n; k++) {
        const dsv3_session *s = sessions[k];
        if (i < s->n_pages && s->pages[i] == page && dsv3__ses_rows_of(s->n_cached, i) > rows)
            rows = dsv3__ses_rows_of(s->n_cached, i);
    }
    return rows;
}

static dsv3_result dsv3__snap_write_page(dsv3__snap_out *o, const dsv3__work *w, uint32_t page, uint32_t rows,
                                         dsv3_error *err)
{
    const uint8_t *layer = w->cache + page * w->page_bytes, *end = layer + dsv3__snap_layers(w);
    for (; layer < end; layer += w->layer_bytes)
        for (uint32_t i = 0; i < 4; i++) {
            uint64_t offset;
            size_t row = dsv3__mla_piece(w, i, &offset);
            DSV3__TRY(dsv3__snap_write(o, layer + offset, row * rows, err));
        }
    return DSV3_OK;
}

/* marks [page] is its number in the snapshot, counted from 1. */
static dsv3_result dsv3__snap_save(dsv3_session *const *sessions, size_t n, const dsv3__snap_header *h,
                                   const dsv3_sink *sink, dsv3_error *err)
{
    const dsv3_workspace *ws = sessions[0]->ws;
    dsv3__snap_out o;
    uint8_t header[DSV3__SNAP_HEADER];
    o.sink = sink;
    dsv3__snap_sum_start(&o.sum);
    dsv3__snap_pack(header, h);
    DSV3__TRY(dsv3__snap_write(&o, header, sizeof header, err));
    for (size_t k = 0; k < n; k++) {
        const uint32_t counts[2] = {sessions[k]->n_tokens, sessions[k]->n_cached};
        DSV3__TRY(dsv3__snap_write(&o, counts, sizeof counts, err));
    }
    for (size_t k = 0; k < n; k++) {
        const dsv3_session *s = sessions[k];
        DSV3__TRY(dsv3__snap_write(&o, s->tokens, s->n_tokens * sizeof *s->tokens, err));
        for (uint32_t i = 0; i < s->n_pages; i++) {
            const uint32_t number = ws->marks[s->pages[i]] - 1;
            DSV3__TRY(dsv3__snap_write(&o, &number, sizeof number, err));
        }
    }
    for (int data = 0; data < 2; data++) { /* how many rows of each page; then the rows */
        uint32_t next = 1;
        for (size_t k = 0; k < n; k++) {
            const dsv3_session *s = sessions[k];
            for (uint32_t i = 0; i < s->n_pages; i++) {
                if (ws->marks[s->pages[i]] != next)
                    continue; /* it was there before */
                const uint32_t rows = dsv3__snap_stored(sessions, n, i, s->pages[i]);
                next++;
                DSV3__TRY(data ? dsv3__snap_write_page(&o, &ws->work, s->pages[i], rows, err)
                               : dsv3__snap_write(&o, &rows, sizeof rows, err));
            }
        }
        DSV3__TRY(dsv3__snap_write_sum(&o, err));
    }
    return DSV3_OK;
}

static dsv3_result dsv3__snap_save_all(dsv3_session *const *sessions, size_t n, const dsv3_sink *sink, uint64_t *size,
                                       dsv3_error *err)
{
    size_t listed;
    dsv3_result r = dsv3__snap_list(sessions, n, &listed, err);
    if (!r) {
        dsv3_workspace *ws = sessions[0]->ws;
        dsv3__snap_header h;
        dsv3__snap_describe(&h, ws);
        h.n_sessions = (uint32_t)n;
        h.total = DSV3__SNAP_HEADER + 8 * (uint64_t)n + 16;
        for (size_t k = 0; k < n; k++) {
            const dsv3_session *s = sessions[k];
            h.total += 4 * ((uint64_t)s->n_tokens + s->n_pages);
            for (uint32_t i = 0; i < s->n_pages; i++)
                if (!ws->marks[s->pages[i]]) {
                    ws->marks[s->pages[i]] = ++h.n_pages;
                    h.total += 4 + dsv3__snap_stored(sessions, n, i, s->pages[i]) * dsv3__snap_row(&ws->work);
                }
        }
        *size = h.total;
        ws->running = true;
        if (sink)
            r = dsv3__snap_save(sessions, n, &h, sink, err);
        ws->running = false;
        for (size_t k = 0; k < n; k++)
            for (uint32_t i = 0; i < sessions[k]->n_pages; i++)
                ws->marks[sessions[k]->pages[i]] = 0;
    }
    dsv3__snap_unlist(sessions, listed);
    return r;
}

// ---- Reading ---------------------------------------------------------------------------------------------

typedef struct dsv3__snap_in {
    const dsv3_source *source;
    dsv3__snap_sum sum;
    dsv3__snap_header h;
} dsv3__snap_in;

static dsv3_result dsv3__snap_read(dsv3__snap_in *in, void *data, size_t n, dsv3_error *err)
{
    if (n && !in->source->read_fn(in->source->user, data, n))
        return DSV3__FAIL(err, DSV3_ERROR_IO, "snapshot: reading %u bytes at %u failed", (uint64_t)n, in->sum.total);
    dsv3__snap_sum_add(&in->sum, data, n);
    return DSV3_OK;
}

static dsv3_result dsv3__snap_read_sum(dsv3__snap_in *in, dsv3_error *err)
{
    const uint64_t expected = dsv3__snap_sum_get(&in->sum), at = in->sum.total;
    uint64_t found;
    DSV3__TRY(dsv3__snap_read(in, &found, sizeof found, err));
    if (found != expected)
        return DSV3__FAIL_AT(err, DSV3_ERROR_SNAPSHOT, at, "snapshot: damaged: the checksum at %u does not fit", at);
    return DSV3_OK;
}

static const char *dsv3__snap_cache_name(uint32_t type)
{
    return type == DSV3_CACHE_F32 ? "f32" : type == DSV3_CACHE_BF16 ? "bf16" : type == DSV3_CACHE_I8 ? "i8" : "?";
}

/* The header, held against the model and the list. */
static dsv3_result dsv3__snap_read_header(dsv3__snap_in *in, const dsv3_workspace *ws, size_t n, dsv3_error *err)
{
    uint8_t bytes[DSV3__SNAP_HEADER], again[DSV3__SNAP_HEADER];
    uint32_t version, numbers[5];
    dsv3__snap_header want, *h = &in->h;
    if (in->source->size && in->source->size < DSV3__SNAP_HEADER)
        return DSV3__FAIL(err, DSV3_ERROR_TRUNCATED, "snapshot: %u bytes, a header has %u", in->source->size,
                          (uint64_t)DSV3__SNAP_HEADER);
    DSV3__TRY(dsv3__snap_read(in, bytes, sizeof bytes, err));
    if (memcmp(bytes, "DSV3SNAP", 8) != 0)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: it is none: the first bytes are not DSV3SNAP");
    memcpy(&version, bytes + 8, 4);
    if (version != DSV3__SNAP_VERSION)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: version %u, expected %u", (uint64_t)version,
                          (uint64_t)DSV3__SNAP_VERSION);
    memcpy(&h->total, bytes + 16, 8);
    memcpy(&h->fingerprint, bytes + 24, 8);
    memcpy(numbers, bytes + 32, sizeof numbers);
    memcpy(h->model_type, bytes + 64, sizeof h->model_type);
    h->compute = numbers[0], h->latent = numbers[1], h->rope_key = numbers[2];
    h->n_sessions = numbers[3], h->n_pages = numbers[4];
    dsv3__snap_pack(again, h); /* its size, zeros where nothing is, its checksum */
    if (memcmp(bytes, again, sizeof bytes) != 0)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: the header is damaged");
    if (in->source->size && in->source->size != h->total)
        return DSV3__FAIL(err, in->source->size < h->total ? DSV3_ERROR_TRUNCATED : DSV3_ERROR_SNAPSHOT,
                          "snapshot: %u bytes, its header says %u", in->source->size, h->total);
    dsv3__snap_describe(&want, ws);
    if (h->fingerprint != want.fingerprint || memcmp(h->model_type, want.model_type, sizeof h->model_type) != 0) {
        char name[33];
        memcpy(name, h->model_type, 32);
        name[32] = 0;
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT,
                          "snapshot: of another model: %s, fingerprint %u; this is %s, fingerprint %u", name,
                          h->fingerprint, ws->m->config.model_type, want.fingerprint);
    }
    if (h->compute != want.compute)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: computed in mode %s, this model is open in %s",
                          dsv3_compute_name((dsv3_compute)(h->compute & 0xFF)), dsv3_compute_name(ws->m->mode.compute));
    if (h->latent != want.latent || h->rope_key != want.rope_key)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: cache of %s and %s, here it is of %s and %s",
                          dsv3__snap_cache_name(h->latent), dsv3__snap_cache_name(h->rope_key),
                          dsv3__snap_cache_name(want.latent), dsv3__snap_cache_name(want.rope_key));
    if (h->n_sessions != n)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: %u sessions, %u to be loaded", (uint64_t)h->n_sessions,
                          (uint64_t)n);
    if (h->n_pages > ws->n_free)
        return DSV3__FAIL(err, DSV3_ERROR_CACHE_FULL, "snapshot: %u pages, the workspace has %u free",
                          (uint64_t)h->n_pages, (uint64_t)ws->n_free);
    return DSV3_OK;
}

/* What is in memory until all is known to be right. Of each session `keep` is n_tokens, `valid` is n_cached. */
typedef struct dsv3__snap_tables {
    int32_t *tokens;   /* of all sessions, one behind the other */
    uint32_t *numbers; /* of their pages, likewise */
    uint32_t *rows;    /* [n_pages] stored, */
    uint32_t *index;   /* [n_pages] and which page of its session it is */
    uint32_t *pages;   /* [n_pages] the workspace's page for it */
    uint32_t *owner;   /* [n_pages] the session that took it */
} dsv3__snap_tables;

/* Tokens, numbers of pages and rows, every one in its range. Then it is known how long the snapshot must be. */
static dsv3_result dsv3__snap_read_tables(dsv3__snap_in *in, dsv3_session *const *sessions, size_t n,
                                          const dsv3__snap_tables *t, dsv3_error *err)
{
    const dsv3_workspace *ws = sessions[0]->ws;
    const uint32_t vocab = ws->m->config.vocab_size;
    int32_t *tokens = t->tokens;
    uint32_t *numbers = t->numbers, seen = 0;
    uint64_t lack = 0, total;
    for (size_t k = 0; k < n; k++) {
        const dsv3_session *s = sessions[k];
        const uint32_t n_pages = dsv3__ses_pages_of(s->valid), before = seen, promised = s->reserve - s->drawn;
        DSV3__TRY(dsv3__snap_read(in, tokens, s->keep * sizeof *tokens, err));
        for (uint32_t i = 0; i < s->keep; i++)
            if (tokens[i] < 0 || (uint32_t)tokens[i] >= vocab)
                return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT,
                                  "snapshot: session %u: token %u is %d, the vocabulary has %u", (uint64_t)k,
                                  (uint64_t)i, (int64_t)tokens[i], (uint64_t)vocab);
        DSV3__TRY(dsv3__snap_read(in, numbers, n_pages * sizeof *numbers, err));
        for (uint32_t i = 0; i < n_pages; i++) {
            if (numbers[i] == seen && seen < in->h.n_pages)
                t->owner[seen] = (uint32_t)k, t->index[seen++] = i;
            else if (numbers[i] >= seen || t->index[numbers[i]] != i)
                return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: session %u: page %u has number %u of %u",
                                  (uint64_t)k, (uint64_t)i, (uint64_t)numbers[i], (uint64_t)in->h.n_pages);
        }
        lack += seen - before > promised ? seen - before - promised : 0;
        tokens += s->keep, numbers += n_pages;
    }
    if (seen != in->h.n_pages)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: %u pages, %u are named", (uint64_t)in->h.n_pages,
                          (uint64_t)seen);
    DSV3__TRY(dsv3__snap_read(in, t->rows, seen * sizeof *t->rows, err));
    numbers = t->numbers;
    for (size_t k = 0; k < n; k++)
        for (uint32_t i = 0; i < dsv3__ses_pages_of(sessions[k]->valid); i++, numbers++)
            if (t->rows[*numbers] < dsv3__ses_rows_of(sessions[k]->valid, i) || t->rows[*numbers] > DSV3_PAGE_TOKENS)
                return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: page %u has %u rows, session %u needs %u",
                                  (uint64_t)*numbers, (uint64_t)t->rows[*numbers], (uint64_t)k,
                                  (uint64_t)dsv3__ses_rows_of(sessions[k]->valid, i));
    DSV3__TRY(dsv3__snap_read_sum(in, err));
    total = in->sum.total + 8;
    for (uint32_t i = 0; i < seen; i++)
        total += t->rows[i] * dsv3__snap_row(&ws->work);
    if (total != in->h.total)
        return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: its tables make %u bytes, its header says %u", total,
                          in->h.total);
    if (lack > ws->n_free - ws->n_promised)
        return DSV3__FAIL(err, DSV3_ERROR_CACHE_FULL, "snapshot: %u pages more than the workspace has", lack);
    return DSV3_OK;
}

/* Rows into free pages that no session names yet; *taken of them. */
static dsv3_result dsv3__snap_read_pages(dsv3__snap_in *in, dsv3_session *const *sessions, const dsv3__snap_tables *t,
                                         uint32_t *taken, dsv3_error *err)
{
    dsv3_workspace *ws = sessions[0]->ws;
    const dsv3__work *w = &ws->work;
    while (*taken < in->h.n_pages) {
        const uint32_t number = (*taken)++, page = dsv3__ses_take_page(sessions[t->owner[number]]);
        uint8_t *layer = w->cache + page * w->page_bytes, *end = layer + dsv3__snap_layers(w);
        memset(end, 0, (size_t)(w->page_bytes - dsv3__snap_layers(w))); /* what prediction layers look back at */
        t->pages[number] = page;
        for (; layer < end; layer += w->layer_bytes)
            for (uint32_t i = 0; i < 4; i++) {
                uint64_t offset;
                size_t row = dsv3__mla_piece(w, i, &offset);
                DSV3__TRY(dsv3__snap_read(in, layer + offset, row * t->rows[number], err));
            }
    }
    return dsv3__snap_read_sum(in, err);
}

/* All was read and is right: the sessions take it in place of what they had. */
static void dsv3__snap_install(dsv3_session *const *sessions, size_t n, const dsv3__snap_tables *t, uint32_t taken)
{
    dsv3_workspace *ws = sessions[0]->ws;
    const int32_t *tokens = t->tokens;
    const uint32_t *numbers = t->numbers;
    for (uint32_t i = 0; i < taken; i++)
        ws->refs[t->pages[i]] = 0; /* counted anew */
    for (size_t k = 0; k < n; k++) {
        dsv3_session *s = sessions[k];
        dsv3__ses_trim(s, 0);
        s->n_tokens = s->keep, s->n_cached = s->valid;
        s->n_ahead = 0;
        dsv3__mtp_restart(&s->mtp, s->valid > s->mtp.n ? s->valid - s->mtp.n : 0);
        s->n_pages = dsv3__ses_pages_of(s->n_cached);
        s->logits_valid = false;
        if (s->n_tokens)
            memcpy(s->tokens, tokens, s->n_tokens * sizeof *tokens);
        for (uint32_t i = 0; i < s->n_pages; i++) {
            s->pages[i] = t->pages[numbers[i]];
            ws->refs[s->pages[i]]++;
        }
        tokens += s->n_tokens, numbers += s->n_pages;
    }
}

static dsv3_result dsv3__snap_load(dsv3_session *const *sessions, size_t n, const dsv3_source *source, dsv3_error *err)
{
    dsv3_workspace *ws = sessions[0]->ws;
    dsv3__snap_in in;
    dsv3__snap_tables t;
    uint64_t n_tokens = 0, n_numbers = 0, used = 0;
    uint32_t taken = 0;
    void *block;
    in.source = source;
    dsv3__snap_sum_start(&in.sum);
    DSV3__TRY(dsv3__snap_read_header(&in, ws, n, err));
    for (size_t k = 0; k < n; k++) {
        dsv3_session *s = sessions[k];
        uint32_t counts[2];
        DSV3__TRY(dsv3__snap_read(&in, counts, sizeof counts, err));
        if (counts[0] > s->max_tokens)
            return DSV3__FAIL(err, DSV3_ERROR_CONTEXT_FULL, "snapshot: session %u has %u tokens, this one holds %u",
                              (uint64_t)k, (uint64_t)counts[0], (uint64_t)s->max_tokens);
        if (counts[1] > counts[0])
            return DSV3__FAIL(err, DSV3_ERROR_SNAPSHOT, "snapshot: session %u has %u rows for %u tokens", (uint64_t)k,
                              (uint64_t)counts[1], (uint64_t)counts[0]);
        s->keep = counts[0], s->valid = counts[1];
        n_tokens += counts[0], n_numbers += dsv3__ses_pages_of(counts[1]);
    }
    for (uint8_t *base = NULL;; base = (uint8_t *)block) {
        used = 0;
        t.tokens = (int32_t *)dsv3__carve(base, &used, n_tokens, sizeof(int32_t));
        t.numbers = (uint32_t *)dsv3__carve(base, &used, n_numbers, sizeof(uint32_t));
        t.rows = (uint32_t *)dsv3__carve(base, &used, in.h.n_pages, sizeof(uint32_t));
        t.index = (uint32_t *)dsv3__carve(base, &used, in.h.n_pages, sizeof(uint32_t));
        t.pages = (uint32_t *)dsv3__carve(base, &used, in.h.n_pages, sizeof(uint32_t));
        t.owner = (uint32_t *)dsv3__carve(base, &used, in.h.n_pages, sizeof(uint32_t));
        if (base)
            break;
        DSV3__TRY(dsv3__mem_alloc(&ws->mem, &block, used, "snapshot: its tables", err));
    }
    dsv3_result r = dsv3__snap_read_tables(&in, sessions, n, &t, err);
    if (!r)
        r = dsv3__snap_read_pages(&in, sessions, &t, &taken, err);
    if (!r)
        dsv3__snap_install(sessions, n, &t, taken);
    else
        while (taken--)
            dsv3__ses_give_page(sessions[t.owner[taken]], t.pages[taken]);
    dsv3__mem_free(&ws->mem, block);
    return r;
}

static dsv3_result dsv3__snap_load_all(dsv3_session *const *sessions, size_t n, const dsv3_source *source,
                                       dsv3_error *err)
{
    size_t listed;
    dsv3_result r = dsv3__snap_list(sessions, n, &listed, err);
    if (!r) {
        dsv3_workspace *ws = sessions[0]->ws;
        ws->running = true;
        r = dsv3__snap_load(sessions, n, source, err);
        ws->running = false;
    }
    dsv3__snap_unlist(sessions, listed);
    return r;
}

// =============================================================================
// >>api   The public calls: look at the arguments, then one private call each.
//         (Those on tensors and on the tokenizer stand in >>mm and >>tok.)
// =============================================================================

/* Every public call that can fail begins with this: `error` may be NULL. */
#define DSV3__API_ERROR(error) \
    dsv3_error own_error;      \
    if (!(error))              \
        (error) = &own_error;  \
    dsv3__err_clear(error)

/* A session that is free to be used: there is one, and this is not one of its own callbacks. */
#define DSV3__API_SESSION(error, session) \
    DSV3__API_NOT_NULL(error, session);   \
    if ((session)->ws->running)           \
    return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "the session is running: a callback may only cancel it")

#define DSV3__API_NOT_NULL(error, pointer) \
    if (!(pointer))                        \
    return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "%s is NULL", #pointer)

static dsv3_result dsv3__api_model_opts(dsv3_model_opts *o, const dsv3_model_opts *opts, dsv3_error *err)
{
    memset(o, 0, sizeof *o);
    if (!opts)
        return DSV3_OK;
    if (opts->struct_size && opts->struct_size != sizeof *o)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS, "model opts: struct_size is %u, expected 0 or %u",
                          (uint64_t)opts->struct_size, (uint64_t)sizeof *o);
    if (!opts->allocator.alloc_fn != !opts->allocator.free_fn)
        return DSV3__FAIL(err, DSV3_ERROR_INVALID_OPTIONS,
                          "model opts: allocator needs alloc_fn and free_fn, or neither");
    *o = *opts;
    return DSV3_OK;
}

/* The last word of opening: files that may be missing left a message behind, and a missing one is sought in `dir`. */
static dsv3_result dsv3__api_opened(dsv3_result r, const char *dir, const dsv3_model_opts *o, dsv3_error *err)
{
    if (r == DSV3_OK)
        dsv3__err_clear(err);
    if (r == DSV3_ERROR_FILE_NOT_FOUND && !o->reader.open_fn && dir) {
        dsv3_error plain = *err;
        dsv3__format(err->message, sizeof err->message, "%s: %s", dir, plain.message);
    }
    return r;
}

/* tokenizer.json, or without it tiktoken.model, and, if there, tokenizer_config.json and chat_template.jinja. */
static dsv3_result dsv3__api_tokenizer(dsv3_tokenizer **tokenizer, const dsv3_reader *reader, const dsv3_model_opts *o,
                                       dsv3__mem *mem, dsv3_error *err)
{
    static const char *const names[] = {"tiktoken.model", "tokenizer_config.json", "chat_template.jinja"};
    dsv3__blob json, blobs[DSV3__COUNT(names)];
    dsv3__tok_files files;
    dsv3_error missing;
    dsv3_result r = dsv3__blob_open(&json, reader, mem, "tokenizer.json", DSV3__ST_TOKENIZER_MAX, err);
    bool ranks = r == DSV3_ERROR_FILE_NOT_FOUND;
    memset(blobs, 0, sizeof blobs);
    if (ranks) {
        missing = *err;
        r = dsv3__blob_open(&blobs[0], reader, mem, names[0], DSV3__ST_TOKENIZER_MAX, err);
        if (r == DSV3_ERROR_FILE_NOT_FOUND)
            *err = missing;
    }
    for (uint32_t i = 1; i < DSV3__COUNT(names) && !r; i++) {
        r = dsv3__blob_open(&blobs[i], reader, mem, names[i], DSV3__ST_CONFIG_MAX, err);
        if (r == DSV3_ERROR_FILE_NOT_FOUND)
            r = DSV3_OK;
        else if (!r && i == 1 && !blobs[i].text.n)
            r = DSV3__FAIL(err, DSV3_ERROR_JSON, "tokenizer_config.json: empty");
    }
    files.json = json.text;
    files.ranks = blobs[0].text;
    files.config = blobs[1].text;
    files.chat_template = blobs[2].text;
    uint64_t left = o->memory_limit ? o->memory_limit - mem->used : UINT64_MAX; /* the tokenizer counts for itself */
    if (!r)
        r = dsv3__tok_open(tokenizer, &o->allocator, left ? left : 1, &files, err);
    for (size_t i = DSV3__COUNT(names); i--;)
        dsv3__blob_close(&blobs[i], reader, mem);
    dsv3__blob_close(&json, reader, mem);
    return r;
}

DSV3_API dsv3_result dsv3_tokenizer_open(dsv3_tokenizer **tokenizer, const char *dir, const dsv3_model_opts *opts,
                                         dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, tokenizer);
    *tokenizer = NULL;
    dsv3_model_opts o;
    dsv3__os_dir files;
    dsv3_reader reader;
    dsv3__mem mem;
    DSV3__TRY(dsv3__api_model_opts(&o, opts, error));
    files.path = dir, files.no_mmap = o.no_mmap;
    DSV3__TRY(dsv3__os_reader(&reader, &o.reader, &files, error));
    dsv3__mem_init(&mem, &o.allocator, o.memory_limit);
    return dsv3__api_opened(dsv3__api_tokenizer(tokenizer, &reader, &o, &mem, error), dir, &o, error);
}

DSV3_API void dsv3_tokenizer_close(dsv3_tokenizer *tokenizer)
{
    dsv3__tok_close(tokenizer);
}

static dsv3_result dsv3__api_config(dsv3_model *m, const dsv3_reader *reader, dsv3_error *err)
{
    dsv3__blob blob;
    dsv3_result r = dsv3__blob_open(&blob, reader, &m->mem, "config.json", DSV3__ST_CONFIG_MAX, err);
    if (!r)
        r = dsv3__cfg_load(&m->cfg, blob.text, err);
    dsv3__blob_close(&blob, reader, &m->mem);
    DSV3__TRY(r);
    r = dsv3__blob_open(&blob, reader, &m->mem, "generation_config.json", DSV3__ST_CONFIG_MAX, err);
    if (!r)
        r = dsv3__cfg_generation(&m->cfg, blob.text, err);
    if (!r && !dsv3__smp_opts_ok(&m->cfg.sampling))
        r = DSV3__FAIL(err, DSV3_ERROR_UNSUPPORTED_MODEL,
                       "generation_config.json: temperature %f, top_p %f: sampling out of range",
                       (double)m->cfg.sampling.temperature, (double)m->cfg.sampling.top_p);
    dsv3__blob_close(&blob, reader, &m->mem);
    m->config = m->cfg.c;
    return r == DSV3_ERROR_FILE_NOT_FOUND ? DSV3_OK : r;
}

/* The tokenizer's end-of-text id counts as one of the checkpoint's. */
static void dsv3__api_tokenizer_facts(dsv3_model *m)
{
    dsv3_tokenizer_info info;
    dsv3_config *c = &m->config;
    uint32_t i = 0;
    dsv3_tokenizer_info_get(m->tokenizer, &info);
    while (i < c->n_eos && c->eos_token_id[i] != info.eos)
        i++;
    if (i == c->n_eos && info.eos >= 0 && i < DSV3__COUNT(c->eos_token_id))
        c->eos_token_id[c->n_eos++] = info.eos;
    for (int32_t t = 0; t < info.n_tokens; t++) {
        size_t n;
        dsv3_token_bytes(m->tokenizer, t, &n);
        m->max_token_bytes = n > m->max_token_bytes ? n : m->max_token_bytes;
    }
}

static dsv3_result dsv3__api_open(dsv3_model *m, const dsv3_reader *reader, const dsv3_model_opts *o, dsv3_error *err)
{
    void *inv_freq;
    dsv3_isa isa = DSV3_ISA_SCALAR;
    DSV3__TRY(dsv3__cpu_resolve(&isa, o->isa, err));
    m->k = dsv3__kern_get(isa);
    m->mode.k = m->exact.k = m->k;
    m->exact.compute = DSV3_COMPUTE_F32;
    DSV3__TRY(dsv3__mm_resolve(&m->mode.compute, o->compute, err));
    m->logger = o->logger;
    m->read_ahead = o->read_ahead;
    DSV3__TRY(dsv3__api_config(m, reader, err));
    DSV3__TRY(dsv3__st_open(&m->st, &m->mem, reader, &o->progress, err));
    m->mode.powers = strcmp(m->config.scale_fmt, "ue8m0") == 0;
    DSV3__TRY(dsv3__wt_bind(m, o->no_mtp, err));
    dsv3__wt_forms(m);
    if (m->bytes) {
        DSV3__TRY(dsv3__mm_permit(&m->k, o->isa, err));
        m->mode.k = m->exact.k = m->k;
    }
    if (m->st.progress_total > m->st.progress_done) /* tensors that nobody needs were not read */
        DSV3__TRY(dsv3__st_report(&m->st, m->st.progress_total - m->st.progress_done, err));
    DSV3__TRY(
        dsv3__mem_alloc(&m->mem, &inv_freq, m->config.qk_rope_head_dim / 2 * sizeof(float), "rotary frequencies", err));
    m->inv_freq = (float *)inv_freq;
    dsv3__nn_rope_setup(m);
    dsv3_result r = dsv3__api_tokenizer(&m->tokenizer, reader, o, &m->mem, &m->tokenizer_error);
    if (r == DSV3_ERROR_OUT_OF_MEMORY || r == DSV3_ERROR_MEMORY_LIMIT)
        return *err = m->tokenizer_error, r;
    if (r) { /* the model works by ids; calls on text say why they cannot */
        m->tokenizer_error.code = DSV3_ERROR_TOKENIZER;
        dsv3__log(&m->logger, DSV3_LOG_WARNING, "no tokenizer: %s", m->tokenizer_error.message);
    } else {
        dsv3__api_tokenizer_facts(m);
    }
    if (m->st.n_unlisted)
        dsv3__log(&m->logger, DSV3_LOG_WARNING, "%u tensors in the shards are not in the index: ignored",
                  m->st.n_unlisted);
    dsv3__log(&m->logger, DSV3_LOG_INFO, "%s: %u layers, %u tensors in %u files, %u bytes, kernels %s, compute %s",
              m->config.model_type, (uint64_t)m->config.num_hidden_layers, m->st.n_tensors, m->st.n_shards,
              m->st.data_bytes, dsv3_isa_name(m->k->isa), dsv3_compute_name(m->mode.compute));
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_model_open(dsv3_model **model, const char *dir, const dsv3_model_opts *opts,
                                     dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, model);
    *model = NULL;
    dsv3_model_opts o;
    dsv3__os_dir files;
    dsv3_reader reader;
    dsv3__mem mem;
    void *p;
    DSV3__TRY(dsv3__api_model_opts(&o, opts, error));
    files.path = dir, files.no_mmap = o.no_mmap;
    DSV3__TRY(dsv3__os_reader(&reader, &o.reader, &files, error));
    dsv3__mem_init(&mem, &o.allocator, o.memory_limit);
    DSV3__TRY(dsv3__mem_alloc(&mem, &p, sizeof(dsv3_model), "model", error));
    dsv3_model *m = (dsv3_model *)p;
    memset(m, 0, sizeof *m);
    m->mem = mem;
    uint32_t saved = dsv3__fp_enter(); /* rotary tables and numbers are rounded as everywhere */
    dsv3_result r = dsv3__api_open(m, &reader, &o, error);
    dsv3__fp_leave(saved);
    m->st.progress = NULL;
    if (reader.user == &files) /* the path is the caller's: closing does not need it */
        m->st.reader.user = NULL;
    if (r)
        dsv3_model_close(m);
    else
        *model = m;
    return dsv3__api_opened(r, dir, &o, error);
}

DSV3_API void dsv3_model_close(dsv3_model *model)
{
    if (!model)
        return;
    dsv3__tok_close(model->tokenizer);
    dsv3__mem_free(&model->mem, model->inv_freq);
    dsv3__wt_unbind(model);
    dsv3__st_close(&model->st);
    dsv3__mem mem = model->mem;
    dsv3__mem_free(&mem, model);
}

DSV3_API const dsv3_config *dsv3_model_config(const dsv3_model *model)
{
    return &model->config;
}

DSV3_API dsv3_isa dsv3_model_isa(const dsv3_model *model)
{
    return model->k->isa;
}

DSV3_API dsv3_compute dsv3_model_compute(const dsv3_model *model)
{
    return model->mode.compute;
}

DSV3_API uint32_t dsv3_model_mtp(const dsv3_model *model)
{
    return model->n_mtp;
}

DSV3_API dsv3_result dsv3_model_tokenizer(const dsv3_model *model, const dsv3_tokenizer **tokenizer, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, tokenizer);
    *tokenizer = NULL;
    DSV3__API_NOT_NULL(error, model);
    *tokenizer = model->tokenizer;
    if (!model->tokenizer)
        *error = model->tokenizer_error;
    return error->code;
}

static dsv3_result dsv3__api_tensor(const dsv3_model *m, const dsv3__st_tensor *t, dsv3_tensor *tensor)
{
    const dsv3__st_tensor *scale;
    dsv3_error ignored; /* a scale that does not fit is no reason not to show the tensor */
    if (dsv3__st_weight(&m->st, t, tensor, &scale, &ignored))
        dsv3__st_view(t, tensor);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_model_tensor(const dsv3_model *model, const char *name, dsv3_tensor *tensor,
                                       dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, tensor);
    memset(tensor, 0, sizeof *tensor);
    DSV3__API_NOT_NULL(error, model);
    DSV3__API_NOT_NULL(error, name);
    const dsv3__st_tensor *t = dsv3__st_find(&model->st, name);
    if (!t)
        return DSV3__FAIL(error, DSV3_ERROR_MISSING_TENSOR, "%s: not in the checkpoint", name);
    return dsv3__api_tensor(model, t, tensor);
}

DSV3_API size_t dsv3_model_tensor_count(const dsv3_model *model)
{
    return (size_t)model->st.n_tensors;
}

DSV3_API dsv3_result dsv3_model_tensor_at(const dsv3_model *model, size_t index, const char **name, dsv3_tensor *tensor,
                                          dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, name);
    *name = NULL;
    DSV3__API_NOT_NULL(error, tensor);
    memset(tensor, 0, sizeof *tensor);
    DSV3__API_NOT_NULL(error, model);
    if (index >= model->st.n_tensors)
        return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "tensor %u of %u", (uint64_t)index, model->st.n_tensors);
    *name = model->st.tensors[index].name;
    return dsv3__api_tensor(model, &model->st.tensors[index], tensor);
}

DSV3_API const char *dsv3_model_tensor_file(const dsv3_model *model, size_t index)
{
    return index < model->st.n_tensors ? model->st.shards[model->st.tensors[index].shard].name : NULL;
}

DSV3_API dsv3_result dsv3_session_open(dsv3_session **session, const dsv3_model *model, const dsv3_session_opts *opts,
                                       dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, session);
    *session = NULL;
    DSV3__API_NOT_NULL(error, model);
    return dsv3__ses_open(session, model, opts, error);
}

DSV3_API dsv3_result dsv3_workspace_open(dsv3_workspace **workspace, const dsv3_model *model,
                                         const dsv3_workspace_opts *opts, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, workspace);
    *workspace = NULL;
    DSV3__API_NOT_NULL(error, model);
    dsv3_workspace_opts o;
    DSV3__TRY(dsv3__ws_opts(&o, model, opts, "workspace", error));
    return dsv3__ws_open(workspace, model, &o, error);
}

DSV3_API void dsv3_workspace_close(dsv3_workspace *workspace)
{
    if (workspace)
        dsv3__ws_close(workspace);
}

DSV3_API void dsv3_workspace_info_get(const dsv3_workspace *workspace, dsv3_workspace_info *info)
{
    info->n_pages = workspace->n_pages;
    info->n_free = workspace->n_free;
    info->n_reserved = workspace->n_promised;
    info->n_sessions = workspace->n_sessions;
    info->page_bytes = workspace->work.page_bytes;
    info->memory = workspace->mem.used;
    info->cache_latent = workspace->cache_latent;
    info->cache_rope = workspace->cache_rope;
}

DSV3_API dsv3_result dsv3_workspace_experts(dsv3_workspace *workspace, uint64_t *counts, size_t cap, bool reset,
                                            dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, workspace);
    DSV3__API_NOT_NULL(error, counts);
    const size_t need = (size_t)dsv3__ws_counts(workspace->m);
    if (cap < need)
        return DSV3__FAIL(error, DSV3_ERROR_BUFFER_TOO_SMALL, "workspace experts: cap is %u, needed %u", (uint64_t)cap,
                          (uint64_t)need);
    memcpy(counts, workspace->work.counts, need * sizeof *counts);
    if (reset)
        memset(workspace->work.counts, 0, need * sizeof *counts);
    return DSV3_OK;
}

DSV3_API void dsv3_session_close(dsv3_session *session)
{
    if (session)
        dsv3__ses_close(session);
}

DSV3_API dsv3_result dsv3_session_fork(dsv3_session **child, dsv3_session *parent, uint32_t reserve_pages,
                                       dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, child);
    *child = NULL;
    DSV3__API_SESSION(error, parent);
    return dsv3__ses_fork(child, parent, reserve_pages, error);
}

DSV3_API dsv3_workspace *dsv3_session_workspace(const dsv3_session *session)
{
    return session->ws;
}

DSV3_API dsv3_result dsv3_session_memory(const dsv3_model *model, const dsv3_session_opts *opts, dsv3_memory *memory,
                                         dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, memory);
    memset(memory, 0, sizeof *memory);
    DSV3__API_NOT_NULL(error, model);
    return dsv3__ses_memory(model, opts, memory, error);
}

DSV3_API dsv3_result dsv3_session_append(dsv3_session *session, const int32_t *tokens, size_t count,
                                         const dsv3_outputs *outputs, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_SESSION(error, session);
    return dsv3__ses_append(session, tokens, count, outputs, error);
}

DSV3_API dsv3_result dsv3_batch(const dsv3_batch_item *items, size_t n_items, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    if (n_items)
        DSV3__API_NOT_NULL(error, items);
    return dsv3__ses_batch(items, n_items, error);
}

DSV3_API dsv3_result dsv3_session_sync(dsv3_session *session, const int32_t *tokens, size_t count, size_t *kept,
                                       dsv3_error *error)
{
    DSV3__API_ERROR(error);
    size_t own_kept;
    if (!kept)
        kept = &own_kept;
    *kept = 0;
    DSV3__API_SESSION(error, session);
    return dsv3__ses_sync(session, tokens, count, kept, error);
}

DSV3_API dsv3_result dsv3_session_rewind(dsv3_session *session, size_t n_tokens, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_SESSION(error, session);
    if (n_tokens > session->n_tokens)
        return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "rewind to %u tokens: the session holds %u",
                          (uint64_t)n_tokens, (uint64_t)session->n_tokens);
    if (n_tokens == session->n_tokens)
        return DSV3_OK;
    dsv3__ses_cut(session, (uint32_t)n_tokens);
    return DSV3_OK;
}

DSV3_API size_t dsv3_session_length(const dsv3_session *session)
{
    return session->n_tokens;
}

DSV3_API const int32_t *dsv3_session_tokens(const dsv3_session *session)
{
    return session->tokens;
}

DSV3_API dsv3_result dsv3_session_logits(dsv3_session *session, const float **logits, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, logits);
    *logits = NULL;
    DSV3__API_SESSION(error, session);
    DSV3__TRY(dsv3__ses_logits(session, error));
    *logits = session->logits;
    return DSV3_OK;
}

DSV3_API void dsv3_session_cancel(dsv3_session *session)
{
    dsv3__atomic_store(&session->cancel, 1);
}

DSV3_API dsv3_result dsv3_save(dsv3_session *const *sessions, size_t n, const dsv3_sink *sink, uint64_t *size,
                               dsv3_error *error)
{
    DSV3__API_ERROR(error);
    uint64_t own_size;
    if (!size)
        size = &own_size;
    *size = 0;
    DSV3__API_NOT_NULL(error, sessions);
    if (sink && !sink->write_fn)
        return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "save: write_fn is NULL");
    return dsv3__snap_save_all(sessions, n, sink, size, error);
}

DSV3_API dsv3_result dsv3_load(dsv3_session *const *sessions, size_t n, const dsv3_source *source, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, sessions);
    DSV3__API_NOT_NULL(error, source);
    if (!source->read_fn)
        return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "load: read_fn is NULL");
    return dsv3__snap_load_all(sessions, n, source, error);
}

DSV3_API void dsv3_model_sampling(const dsv3_model *model, dsv3_sample_opts *opts)
{
    *opts = model->cfg.sampling;
}

DSV3_API dsv3_result dsv3_session_sample(dsv3_session *session, const dsv3_sample_opts *opts, dsv3_sample *sample,
                                         dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_NOT_NULL(error, sample);
    memset(sample, 0, sizeof *sample);
    DSV3__API_SESSION(error, session);
    return dsv3__ses_sample(session, opts, sample, error);
}

DSV3_API dsv3_result dsv3_session_logprobs(dsv3_session *session, size_t k, dsv3_sample *samples, dsv3_error *error)
{
    DSV3__API_ERROR(error);
    DSV3__API_SESSION(error, session);
    DSV3__API_NOT_NULL(error, samples);
    if (k < 1 || k > session->m->config.vocab_size)
        return DSV3__FAIL(error, DSV3_ERROR_INVALID_ARGUMENT, "logprobs: k is %u, expected 1 to %u", (uint64_t)k,
                          (uint64_t)session->m->config.vocab_size);
    DSV3__TRY(dsv3__ses_logits(session, error));
    uint32_t saved = dsv3__fp_enter();
    dsv3__smp_top(samples, k, session->logits, session->m->config.vocab_size);
    dsv3__fp_leave(saved);
    return DSV3_OK;
}

DSV3_API dsv3_result dsv3_generate(dsv3_session *session, const char *prompt, size_t len,
                                   const dsv3_generate_opts *opts, dsv3_stats *stats, dsv3_error *error)
{
    dsv3_stats own_stats;
    DSV3__API_ERROR(error);
    if (!stats)
        stats = &own_stats;
    memset(stats, 0, sizeof *stats);
    DSV3__API_SESSION(error, session);
    return dsv3__ses_generate(session, prompt, len, opts, stats, error);
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

#endif // DSV3__IMPLEMENTED
#endif // DSV3_IMPLEMENTATION

/* REVISION HISTORY
   0.1.0 (2026-11-24)  First: opens published checkpoints, gives the reference's numbers, writes text.

   LICENCE: MIT
   Copyright (c) 2026 The dsv3.h authors

   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
   documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
   rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
   persons to whom the Software is furnished to do so, subject to the following conditions:

   The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
   Software.

   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
   WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
   COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
   OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE. */
