#!/usr/bin/env python3
"""dsv3.h from Python, with ctypes alone: what a binding for any language needs.

    make lib
    python3 examples/ffi.py build/libdsv3.so examples/tiny "Once upon a time"
    python3 examples/ffi.py --asserts > layout.c && cc -fsyntax-only -I. layout.c

Writes a text token by token, and checks on the way that both sides agree on the layout of every struct: options carry
their size, the configuration is compared with config.json, a tensor with its shape, an error with its message.
Exits with 1 if anything differs.
"""
import ctypes as C
import json
import re
import sys
from ctypes import POINTER, Structure, byref, c_bool, c_char, c_char_p, c_double, c_float, c_int, c_int32, c_size_t
from ctypes import c_uint32, c_uint64, c_void_p, sizeof
from pathlib import Path


class Error(Structure):
    _fields_ = [("code", c_int), ("line", c_uint32), ("offset", c_uint64), ("message", c_char * 256)]


class Allocator(Structure):
    _fields_ = [("alloc_fn", c_void_p), ("free_fn", c_void_p), ("user", c_void_p)]


class File(Structure):
    _fields_ = [("data", c_void_p), ("size", c_uint64), ("handle", c_void_p)]


class Reader(Structure):
    _fields_ = [("open_fn", c_void_p), ("read_fn", c_void_p), ("close_fn", c_void_p), ("user", c_void_p)]


class Executor(Structure):
    _fields_ = [("run_fn", c_void_p), ("n_threads", c_uint32), ("user", c_void_p)]


LOG_FN = C.CFUNCTYPE(None, c_void_p, c_int, c_char_p)
PROGRESS_FN = C.CFUNCTYPE(c_bool, c_void_p, c_uint64, c_uint64)
DRAFT_FN = C.CFUNCTYPE(c_size_t, c_void_p, POINTER(c_int32), c_size_t, POINTER(c_int32), c_size_t)


class Logger(Structure):
    _fields_ = [("fn", LOG_FN), ("user", c_void_p)]


class Progress(Structure):
    _fields_ = [("fn", PROGRESS_FN), ("user", c_void_p)]


class Tensor(Structure):
    _fields_ = [("data", c_void_p), ("scale", c_void_p), ("dtype", c_int), ("scale_dtype", c_int), ("rank", c_uint32),
                ("block_rows", c_uint32), ("block_cols", c_uint32), ("reserved", c_uint32), ("shape", c_uint64 * 8),
                ("row_stride", c_uint64), ("scale_stride", c_uint64)]


class MatmulOpts(Structure):
    _fields_ = [("struct_size", c_uint32), ("isa", c_int), ("compute", c_int), ("executor", Executor), ("allocator", Allocator)]


class TokenizerInfo(Structure):
    _fields_ = [("n_tokens", c_int32), ("bos", c_int32), ("eos", c_int32), ("pad", c_int32), ("add_bos", c_bool)]


class Config(Structure):
    _fields_ = (
        [("model_type", c_char * 32)]
        + [(n, c_uint32) for n in (
            "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers first_k_dense_replace "
            "num_attention_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts "
            "n_shared_experts num_experts_per_tok n_group topk_group max_position_embeddings "
            "num_nextn_predict_layers").split()]
        + [("scoring_func", c_int), ("topk_method", c_int)]
        + [(n, c_bool) for n in "norm_topk_prob tie_word_embeddings rope_interleave rope_yarn".split()]
        + [("routed_scaling_factor", c_float), ("rms_norm_eps", c_float)]
        + [(n, c_double) for n in (
            "rope_theta rope_factor rope_beta_fast rope_beta_slow rope_mscale rope_mscale_all_dim "
            "rope_attention_factor").split()]
        + [("rope_original_max_position_embeddings", c_uint32), ("bos_token_id", c_int32), ("eos_token_id", c_int32 * 8),
           ("n_eos", c_uint32), ("dtype", c_char * 16), ("quant_method", c_char * 32), ("scale_fmt", c_char * 16)])


class ModelOpts(Structure):
    _fields_ = [("struct_size", c_uint32), ("isa", c_int), ("compute", c_int), ("no_mmap", c_bool), ("read_ahead", c_bool), ("no_mtp", c_bool),
                ("memory_limit", c_uint64),
                ("allocator", Allocator), ("reader", Reader), ("logger", Logger), ("progress", Progress)]


class Memory(Structure):
    _fields_ = [(n, c_uint64) for n in "file_bytes model_bytes cache_bytes session_bytes".split()] + [("max_tokens", c_uint32)]


class SessionOpts(Structure):
    _fields_ = [("struct_size", c_uint32), ("max_tokens", c_uint32), ("max_batch", c_uint32), ("n_threads", c_uint32),
                ("memory_limit", c_uint64), ("executor", Executor), ("allocator", Allocator), ("progress", Progress),
                ("cache_latent", c_int), ("cache_rope", c_int), ("expand", c_bool), ("workspace", c_void_p),
                ("reserve_pages", c_uint32),
                ("n_draft", c_uint32), ("drafter", c_int), ("draft_fn", DRAFT_FN), ("draft_user", c_void_p)]


class Outputs(Structure):
    _fields_ = [("struct_size", c_uint32), ("logit_rows", POINTER(c_uint32)), ("n_logit_rows", c_size_t),
                ("logits", POINTER(c_float)), ("experts", POINTER(c_int32)), ("draft_logits", POINTER(c_float))]


class SampleOpts(Structure):
    _fields_ = [("struct_size", c_uint32), ("temperature", c_float), ("top_k", c_uint32), ("top_p", c_float),
                ("min_p", c_float), ("repetition_penalty", c_float), ("presence_penalty", c_float), ("seed", c_uint64),
                ("mask", POINTER(c_uint32))]


class Sample(Structure):
    _fields_ = [("token", c_int32), ("logprob", c_float)]


class Token(Structure):
    _fields_ = [("id", c_int32), ("logprob", c_float), ("text", C.POINTER(c_char)), ("len", c_size_t)]


TOKEN_FN = C.CFUNCTYPE(c_bool, c_void_p, POINTER(Token))
MASK_FN = C.CFUNCTYPE(c_bool, c_void_p, POINTER(c_int32), c_size_t, POINTER(c_uint32))


class GrammarOpts(Structure):
    _fields_ = [("struct_size", c_uint32), ("spacing", c_int), ("max_depth", c_uint32), ("max_states", c_uint32),
                ("memory_limit", c_uint64), ("allocator", Allocator), ("like", c_void_p)]


class GrammarFrame(Structure):
    _fields_ = [("first", C.c_uint16), ("n", C.c_uint16), ("keys", C.c_uint16), ("object", C.c_uint16), ("count", c_uint32)]


class GrammarThread(Structure):
    _fields_ = [("id", c_uint32), ("parents", c_uint32), ("count", c_uint32)]


class GrammarState(Structure):
    _fields_ = [("hash", c_uint64), ("chars", c_uint32), ("place", C.c_uint16), ("depth", C.c_uint16), ("first", C.c_uint16),
                ("n_threads", C.c_uint16), ("n_keys", C.c_uint16), ("spaces", C.c_uint16), ("frames", GrammarFrame * 64),
                ("threads", GrammarThread * 160), ("keys", c_uint64 * 160)]


class GenerateOpts(Structure):
    _fields_ = [("struct_size", c_uint32), ("max_tokens", c_uint32), ("sample", SampleOpts), ("no_bos", c_bool),
                ("parse_markers", c_bool), ("ignore_eos", c_bool), ("stop_tokens", POINTER(c_int32)),
                ("n_stop_tokens", c_size_t), ("stop_strings", POINTER(c_char_p)), ("n_stop_strings", c_size_t),
                ("token_fn", TOKEN_FN), ("user", c_void_p), ("grammar", c_void_p), ("mask_fn", MASK_FN)]


class Stats(Structure):
    _fields_ = [("n_prompt", c_uint64), ("n_generated", c_uint64), ("prompt_seconds", c_double),
                ("decode_seconds", c_double), ("stop", c_int), ("drafted", c_uint64), ("accepted", c_uint64),
                ("draft_seconds", c_double)]


differences = []


def same(what, found, expected):
    if found != expected:
        differences.append(what)
        print(f"ffi.py: {what}: expected {expected!r}, found {found!r}", file=sys.stderr)


class Dsv3Error(Exception):
    pass


class Library:
    """The functions, each with its types; one that returns a result raises Dsv3Error with the library's own message."""

    def __init__(self, path):
        self.lib = C.CDLL(str(Path(path).resolve()))
        out = POINTER(c_void_p)
        self.fallible = {
            "model_open": [out, c_char_p, POINTER(ModelOpts)],
            "model_tokenizer": [c_void_p, out],
            "model_tensor": [c_void_p, c_char_p, POINTER(Tensor)],
            "tokenize": [c_void_p, c_char_p, c_size_t, c_uint32, POINTER(c_int32), c_size_t, POINTER(c_size_t)],
            "detokenize": [c_void_p, POINTER(c_int32), c_size_t, c_uint32, c_char_p, c_size_t, POINTER(c_size_t)],
            "session_open": [out, c_void_p, POINTER(SessionOpts)],
            "session_memory": [c_void_p, POINTER(SessionOpts), POINTER(Memory)],
            "session_append": [c_void_p, POINTER(c_int32), c_size_t, POINTER(Outputs)],
            "session_rewind": [c_void_p, c_size_t],
            "session_sample": [c_void_p, POINTER(SampleOpts), POINTER(Sample)],
            "dequantize": [POINTER(c_float), POINTER(Tensor), c_uint64, c_uint64],
            "matmul": [POINTER(c_float), POINTER(c_float), c_size_t, POINTER(Tensor), POINTER(MatmulOpts)],
            "grammar_open": [out, c_void_p, c_char_p, c_size_t, POINTER(GrammarOpts)],
            "generate": [c_void_p, c_char_p, c_size_t, POINTER(GenerateOpts), POINTER(Stats)],
        }
        for name, types in self.fallible.items():
            function = getattr(self.lib, "dsv3_" + name)
            function.argtypes, function.restype = types + [POINTER(Error)], c_int
        for name, types, result in [
            ("version", [], c_uint32), ("result_name", [c_int], c_char_p), ("isa_name", [c_int], c_char_p),
            ("dtype_size", [c_int], c_size_t), ("model_close", [c_void_p], None), ("session_close", [c_void_p], None),
            ("model_config", [c_void_p], POINTER(Config)), ("model_isa", [c_void_p], c_int),
            ("model_sampling", [c_void_p, POINTER(SampleOpts)], None), ("session_length", [c_void_p], c_size_t),
            ("tokenizer_info_get", [c_void_p, POINTER(TokenizerInfo)], None), ("session_cancel", [c_void_p], None),
            ("grammar_close", [c_void_p], None), ("grammar_start", [c_void_p, POINTER(GrammarState)], None),
            ("grammar_accept_text", [c_void_p, POINTER(GrammarState), c_char_p, c_size_t], c_bool),
            ("grammar_can_end", [c_void_p, POINTER(GrammarState)], c_bool),
        ]:
            function = getattr(self.lib, "dsv3_" + name)
            function.argtypes, function.restype = types, result

    def __getattr__(self, name):
        function = getattr(self.lib, "dsv3_" + name)
        if name not in self.fallible:
            return function

        def call(*args):
            error = Error()
            code = function(*args, byref(error))
            same(name + ": the error's code", error.code, code)
            if code:
                raise Dsv3Error(f"{self.lib.dsv3_result_name(code).decode()}: {error.message.decode()}")
        return call


def sized(kind, **values):
    """An options struct that says how large this side believes it to be: the library refuses any other size."""
    opts = kind(**values)
    opts.struct_size = sizeof(kind)
    return opts


def main(library, directory, prompt):
    dsv3 = Library(library)
    v = dsv3.version()
    print(f"dsv3 {v // 1000000}.{v // 1000 % 1000}.{v % 1000}", file=sys.stderr)

    # A size that is wrong, and a directory that is not there: errors, with their texts.
    model, session, tokenizer = c_void_p(), c_void_p(), c_void_p()
    for opts, path, word in [(ModelOpts(struct_size=sizeof(ModelOpts) - 1), directory, "struct_size"),
                             (sized(ModelOpts), directory + "/not-there", "config.json")]:
        try:
            dsv3.model_open(byref(model), path.encode(), byref(opts))
            same("opening " + path, "success", "an error")
        except Dsv3Error as e:
            same(f"'{word}' in the error's text", word in str(e), True)
            same("the model after an error", model.value, None)

    logged = []
    opts = sized(ModelOpts)
    opts.logger.fn = LOG_FN(lambda user, level, message: logged.append(message))
    opts.progress.fn = PROGRESS_FN(lambda user, done, total: True)
    dsv3.model_open(byref(model), directory.encode(), byref(opts))

    # Each field of the configuration against the file.
    config = dsv3.model_config(model).contents
    file = json.loads((Path(directory) / "config.json").read_text())
    for name, kind in Config._fields_:
        if name in file and file[name] is not None and name not in ("scoring_func", "topk_method", "eos_token_id"):
            found = getattr(config, name)
            expected = file[name]
            if kind is c_float:
                expected = c_float(expected).value
            same("config." + name, found.decode() if isinstance(found, bytes) else found, expected)
    quantization = file.get("quantization_config") or {}
    same("config.quant_method", config.quant_method.decode(), quantization.get("quant_method", ""))
    same("config.scale_fmt", config.scale_fmt.decode(), quantization.get("scale_fmt", ""))

    # A tensor, its shape and its values two ways: dequantized, and as the product with a unit vector.
    embed = Tensor()
    dsv3.model_tensor(model, b"model.embed_tokens.weight", byref(embed))
    same("rank", embed.rank, 2)
    same("shape", list(embed.shape), [config.vocab_size, config.hidden_size] + [0] * 6)
    same("row_stride", embed.row_stride, config.hidden_size * dsv3.dtype_size(embed.dtype))
    rows = (c_float * (3 * config.hidden_size))()
    dsv3.dequantize(rows, byref(embed), 0, 3)
    unit, column = (c_float * config.hidden_size)(), (c_float * config.vocab_size)()
    unit[1] = 1
    dsv3.matmul(column, unit, 1, byref(embed), byref(sized(MatmulOpts)))
    same("dequantize and matmul", [rows[r * config.hidden_size + 1] for r in range(3)], list(column[:3]))

    # Ids and back.
    dsv3.model_tokenizer(model, byref(tokenizer))
    info = TokenizerInfo()
    dsv3.tokenizer_info_get(tokenizer, byref(info))
    same("bos", info.bos, config.bos_token_id)
    text = prompt.encode()
    count = c_size_t()
    dsv3.tokenize(tokenizer, text, len(text), 0, None, 0, byref(count))
    ids = (c_int32 * max(count.value, 1))()
    dsv3.tokenize(tokenizer, text, len(text), 0, ids, count, byref(count))
    size = c_size_t()
    back = C.create_string_buffer(len(text) + 1)
    dsv3.detokenize(tokenizer, ids, count, 0, back, len(back), byref(size))
    same("ids and back", back.raw[:size.value].decode(), prompt)

    # A session, and a text.
    session_opts = sized(SessionOpts, max_tokens=512, n_threads=2)
    memory = Memory()
    dsv3.session_memory(model, byref(session_opts), byref(memory))
    same("max_tokens", memory.max_tokens, 512)
    dsv3.session_open(byref(session), model, byref(session_opts))

    tokens = []

    def token_fn(user, token):
        tokens.append(token.contents.id)
        sys.stdout.write(C.string_at(token.contents.text, token.contents.len).decode() if token.contents.len else "")
        sys.stdout.flush()
        return True

    generate_opts = sized(GenerateOpts, max_tokens=60, token_fn=TOKEN_FN(token_fn))
    generate_opts.sample = sized(SampleOpts)
    stats = Stats()
    dsv3.generate(session, text, len(text), byref(generate_opts), byref(stats))
    print()
    same("the number of tokens", len([t for t in tokens if t >= 0]), stats.n_generated)
    same("seconds are sane", 0 < stats.decode_seconds < 600, True)

    # The first token again, by hand: greedy is greedy.
    dsv3.session_rewind(session, stats.n_prompt)
    sample = Sample()
    dsv3.session_sample(session, byref(sized(SampleOpts)), byref(sample))
    same("the first token again", sample.token, tokens[0])
    logits = (c_float * config.vocab_size)()
    last = (c_int32 * 1)(sample.token)
    outputs = sized(Outputs, logits=C.cast(logits, POINTER(c_float)))
    dsv3.session_append(session, last, 1, byref(outputs))
    if len(tokens) > 1 and tokens[1] >= 0:
        same("the second token from logits", max(range(config.vocab_size), key=lambda i: logits[i]), tokens[1])

    # A text that must fit a schema.
    schema = b'{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4}'
    grammar, state = c_void_p(), GrammarState()
    dsv3.grammar_open(byref(grammar), tokenizer, schema, len(schema), byref(sized(GrammarOpts)))
    written = []
    collect = TOKEN_FN(lambda user, token: bool(written.append(C.string_at(token.contents.text, token.contents.len))) or True)
    generate_opts = sized(GenerateOpts, max_tokens=60, token_fn=collect, grammar=grammar)
    generate_opts.sample = sized(SampleOpts, temperature=1.5)
    dsv3.generate(session, None, 0, byref(generate_opts), byref(stats))
    numbers = json.loads(b"".join(written))
    same("the numbers fit", 2 <= len(numbers) <= 4 and all(type(n) is int and 0 <= n <= 99 for n in numbers), True)
    dsv3.grammar_start(grammar, byref(state))
    same("a text that fits", dsv3.grammar_accept_text(grammar, byref(state), b"[1,22]", 6), True)
    same("and ends", dsv3.grammar_can_end(grammar, byref(state)), True)
    same("one that does not", dsv3.grammar_accept_text(grammar, byref(state), b",", 1), False)

    dsv3.session_close(session)
    dsv3.grammar_close(grammar)
    dsv3.model_close(model)
    print(f"{stats.n_generated} tokens, {len(differences)} differences", file=sys.stderr)
    return 1 if differences else 0


def asserts():
    """C11 that compiles only where every struct here has the sizes and offsets that the compiler gives it."""
    print('#include "dsv3.h"')
    for name, kind in list(globals().items()):
        if isinstance(kind, type) and issubclass(kind, Structure) and kind is not Structure:
            c = "dsv3" + re.sub("([A-Z])", r"_\1", name).lower()
            print(f'_Static_assert(sizeof({c}) == {sizeof(kind)}, "{c}");')
            for field in kind._fields_:
                print(f'_Static_assert(offsetof({c}, {field[0]}) == {getattr(kind, field[0]).offset}, "{c}.{field[0]}");')


if __name__ == "__main__":
    if sys.argv[1:] == ["--asserts"]:
        sys.exit(asserts())
    if len(sys.argv) < 3:
        sys.exit("usage: ffi.py LIBRARY DIR [PROMPT]")
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "Once upon a time"))
