"""Constrained output: the grammar of JSON Schemas against the public test suite, against jsonschema, beside llguidance.

  suite     JSON-Schema-Test-Suite, draft 2020-12, the required tests, as the source package of jsonschema carries them:
            of every schema that is accepted each valid instance can be written (in the spelling of json.dumps without
            escapes that are not needed; 1.0 as 1), no invalid one can. A schema that no value fits is decided too: the
            error says so, and the suite has no valid instance of it. What is refused, and why, is a table.
  sampled   2,000 texts of examples/tiny at temperature 1.5 under 30 schemas: each ends, parses and validates.
  random    2,000 schemas put together at random, 40 values for each: what is accepted is what jsonschema validates.
  beside    time of a mask and of compiling on V3's tokenizer, and how often llguidance allows the same tokens.
"""

import ctypes as C
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time

import jsonschema

from report import table

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(HERE)), "examples"))
import ffi                                             # noqa: E402

# Accepted whole; what of them is refused all the same, and why.
WHOLE = ("type", "enum", "const", "properties", "required", "additionalProperties", "items", "minItems", "maxItems",
         "minLength", "maxLength", "pattern", "minimum", "maximum", "anyOf", "ref", "defs")
EXPECTED = ("another document",)                         # draft 2020-12's own metaschema, twice
TEXTS = 2000


class Grammars:
    """The library's grammars of one tokenizer."""

    def __init__(self, lib, directory):
        self.dsv3 = ffi.Library(lib)
        p, state = C.c_void_p, C.POINTER(ffi.GrammarState)
        for name, types, result in (("grammar_mask", [p, state, C.POINTER(C.c_uint32)], None),
                                    ("grammar_accept", [p, state, C.c_int32], C.c_bool), ("tokenizer_close", [p], None)):
            function = getattr(self.dsv3.lib, "dsv3_" + name)
            function.argtypes, function.restype = types, result
        self.tokenizer, self.any = p(), None
        error = ffi.Error()
        if self.dsv3.lib.dsv3_tokenizer_open(C.byref(self.tokenizer), C.c_char_p(directory.encode()), None, C.byref(error)):
            raise RuntimeError(error.message.decode())
        info = ffi.TokenizerInfo()
        self.dsv3.tokenizer_info_get(self.tokenizer, C.byref(info))
        self.mask_type = C.c_uint32 * ((info.n_tokens + 31) // 32)
        self.any = self.compile(True)

    def compile(self, schema, alone=False):
        grammar, text = C.c_void_p(), json.dumps(schema).encode()
        options = ffi.sized(ffi.GrammarOpts, like=None if alone or not self.any else self.any)
        self.dsv3.grammar_open(C.byref(grammar), self.tokenizer, text, len(text), C.byref(options))
        return grammar

    def start(self, grammar):
        state = ffi.GrammarState()
        self.dsv3.grammar_start(grammar, C.byref(state))
        return state

    def fits(self, grammar, text):
        state, text = self.start(grammar), text.encode("utf-8", "surrogatepass")
        return (self.dsv3.grammar_accept_text(grammar, C.byref(state), text, len(text))
                and self.dsv3.grammar_can_end(grammar, C.byref(state)))


def plain(value):
    """The value with whole numbers as int: how they are written."""
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, list):
        return [plain(v) for v in value]
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


def spelled(value):
    return json.dumps(plain(value), ensure_ascii=False)


def suite_files(work):
    """name -> groups, of the suite in the source package, which pip fetches once."""
    folder = os.path.join(work, "jsonschema")
    packed = os.path.join(folder, f"jsonschema-{jsonschema.__version__}.tar.gz")
    if not os.path.exists(packed):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder,
                        f"jsonschema=={jsonschema.__version__}"], check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(packed) as tar:
        return {os.path.basename(m.name)[:-5]: json.load(io.TextIOWrapper(tar.extractfile(m), "utf-8"))
                for m in tar.getmembers() if m.name.endswith(".json") and os.path.dirname(m.name).endswith("/json/tests/draft2020-12")}


def suite(grammars, work, report):
    rows, reasons = [], {}
    for name, groups in sorted(suite_files(work).items()):
        row = {"keyword": name, "schemas": len(groups), "accepted": 0, "valid": 0, "invalid": 0, "refused": ""}
        refused = {}
        for group in groups:
            try:
                grammar = grammars.compile(group["schema"])
            except ffi.Dsv3Error as e:
                if "no value can fit it" in str(e):
                    report.check(f"schema: {name}: {group['description']}", not any(t["valid"] for t in group["tests"]), str(e))
                    row["accepted"], row["invalid"] = row["accepted"] + 1, row["invalid"] + len(group["tests"])
                    continue
                where, _, why = str(e).partition("schema: ")[2].rpartition(": ")
                why = where.rsplit("/", 1)[-1] if why.endswith("not supported") else why
                refused[why] = refused.get(why, 0) + 1
                if name in WHOLE:
                    report.check(f"schema: {name}: {group['description']}", any(w in str(e) for w in EXPECTED), str(e))
                continue
            row["accepted"] += 1
            for test in group["tests"]:
                row["valid" if test["valid"] else "invalid"] += 1
                report.check(f"schema: {name}: {group['description']}: {test['description']}",
                             grammars.fits(grammar, spelled(test["data"])) == test["valid"],
                             f"expected {'valid' if test['valid'] else 'invalid'}: {json.dumps(test['data'])}")
            grammars.dsv3.grammar_close(grammar)
        row["refused"] = ", ".join(f"{why}{f' ({n})' if n > 1 else ''}" for why, n in sorted(refused.items()))
        if len(row["refused"]) > 100:
            row["refused"] = row["refused"][:97] + "..."
        rows.append(row)
    return rows


def schemas():
    """30 schemas, all of which end by themselves: without a bound a text at this temperature goes on and on."""
    word = {"type": "string", "pattern": "^[a-z]{1,6}$"}
    short = {"type": "string", "maxLength": 6}
    closed = {"type": "object", "additionalProperties": False}
    def obj(required=None, **properties):
        return {**closed, "properties": properties, "required": list(properties) if required is None else required}
    tree = {"$defs": {"t": obj(["v"], v={"type": "integer", "minimum": 0, "maximum": 9},
                               kids={"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 1})}, "$ref": "#/$defs/t"}
    point = obj(x={"type": "number", "minimum": -1, "maximum": 1}, y={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5})
    return [
        {"type": "boolean"}, {"type": "null"}, {"type": "integer", "minimum": -7, "maximum": 1200},
        {"type": "number", "minimum": -0.125, "exclusiveMaximum": 3}, {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 9999},
        {"exclusiveMinimum": 99.5, "maximum": 1e3, "type": "number"}, short, {"type": "string", "minLength": 3, "maxLength": 9},
        word, {"type": "string", "pattern": "^(\\d{3}-)?[A-F]+\\.(txt|md)$", "maxLength": 12},
        {"type": "string", "pattern": "^[^\"\\\\a-m]{2,5}$"}, {"type": "string", "pattern": "e", "maxLength": 5},
        {"enum": ["red", "green\n", 3, 2.5, None, [1, {"a": False}], {"b": []}]}, {"const": {"k": [1, "\u00e9\"", None]}},
        obj(name=short, age={"type": "integer", "minimum": 0, "maximum": 120}), obj([], a=word, b={"type": "boolean"}, c={"type": "null"}),
        {**obj(["a"], a=word, b={"enum": [1, 2]}), "maxProperties": 1}, {"type": "array", "items": word, "maxItems": 3},
        {"type": "array", "prefixItems": [word, {"type": "boolean"}], "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 4},
        {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "minItems": 1, "maxItems": 2}, tree, point,
        {"anyOf": [obj(k={"const": "cat"}, lives={"type": "integer", "minimum": 1, "maximum": 9}), obj(k={"const": "dog"}, name=word)]},
        {"oneOf": [obj(k={"const": "on"}), {"type": "array", "items": {"const": 0}, "maxItems": 2}, {"type": "boolean"}]},
        {"allOf": [{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}},
                   {"properties": {"a": {"minimum": 5, "maximum": 50}, "b": {"type": "boolean"}}, "maxProperties": 2,
                    "patternProperties": {"^[ab]$": {}}, "additionalProperties": False}, {"properties": {"a": {"multipleOf": 5}}}]},
        {"type": "object", "patternProperties": {"^n_": {"type": "boolean"}}, "additionalProperties": {"type": "null"}, "minProperties": 1,
         "maxProperties": 2, "propertyNames": {"enum": ["n_a", "n_b", "c"]}},
        {"type": "object", "propertyNames": {"enum": ["x", "y", "zz"]}, "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 9}, "minProperties": 2},
        {"type": ["string", "null", "boolean"], "maxLength": 4},
        {"$defs": {"p": point}, "type": "array", "items": {"anyOf": [{"$ref": "#/$defs/p"}, {"type": "null"}]}, "minItems": 1, "maxItems": 2},
        obj(a=obj(b=obj(c=obj(d={"type": "array", "items": {"enum": ["x", "xx"]}, "maxItems": 2})))),
    ]


def sampled(lib, directory, report):
    """TEXTS texts, shared out among the schemas."""
    dsv3, found, kinds = ffi.Library(lib), {"texts": 0, "tokens": 0, "schemas": 0}, schemas()
    model, session, tokenizer, start = C.c_void_p(), C.c_void_p(), C.c_void_p(), time.time()
    dsv3.model_open(C.byref(model), directory.encode(), None)
    dsv3.model_tokenizer(model, C.byref(tokenizer))
    dsv3.session_open(C.byref(session), model, C.byref(ffi.sized(ffi.SessionOpts, max_tokens=1024, n_threads=1)))
    written, prompt = [], "Once upon a time".encode()
    collect = ffi.TOKEN_FN(lambda user, t: bool(written.append(C.string_at(t.contents.text, t.contents.len))) or True)
    stats, like = ffi.Stats(), None
    for index, schema in enumerate(kinds):
        grammar, text = C.c_void_p(), json.dumps(schema).encode()
        dsv3.grammar_open(C.byref(grammar), tokenizer, text, len(text), C.byref(ffi.sized(ffi.GrammarOpts, spacing=2 if index == 13 else index % 2, like=like)))
        like = like or grammar
        validator = jsonschema.Draft202012Validator(schema)
        options = ffi.sized(ffi.GenerateOpts, max_tokens=900, token_fn=collect, grammar=grammar)
        options.sample = ffi.sized(ffi.SampleOpts, temperature=1.5)
        for seed in range(index, TEXTS, len(kinds)):
            del written[:]
            options.sample.seed = seed
            first = not dsv3.session_length(session)
            dsv3.session_rewind(session, 0 if first else found["prompt"])
            dsv3.generate(session, prompt if first else None, len(prompt) if first else 0, C.byref(options), C.byref(stats))
            if first:
                found["prompt"] = stats.n_prompt
            text, ok, why = b"".join(written).decode(), False, f"stop {stats.stop}"
            if stats.stop == 1:
                try:
                    validator.validate(json.loads(text))
                    ok = True
                except (ValueError, jsonschema.ValidationError) as e:
                    why = str(e).split("\n")[0]
            report.check(f"schema: sampled {index}, seed {seed}", ok, f"{why}: {text!r} under {json.dumps(schema)}")
            found["texts"] += 1
            found["tokens"] += stats.n_generated
        found["schemas"] += 1
        if grammar is not like:
            dsv3.grammar_close(grammar)
    dsv3.session_close(session)
    dsv3.grammar_close(like)
    dsv3.model_close(model)
    report.say(f"schema: {found['texts']} sampled texts in {time.time() - start:.1f} s")
    return {**found, "seconds": time.time() - start}


def random_schema(draw, depth):
    """Keywords on few names and small values, so that they meet. Nothing where Python's patterns are not ECMAScript's: $ before
    a newline at the end, \\w beyond ASCII."""
    if draw.random() < 0.08:
        return draw.random() < 0.7
    schema, inner = {}, lambda: random_schema(draw, depth - 1)
    number = lambda: draw.choice([-1, 0, 1, 2, 0.5, 1.5, 10, 12])
    value = lambda: random_value(draw, 1)
    choices = {
        "type": lambda: draw.choice(["null", "boolean", "integer", "number", "string", "array", "object", ["integer", "string"], ["array", "null", "object"]]),
        "enum": lambda: [value() for _ in range(draw.randint(1, 4))], "const": value,
        "minimum": number, "maximum": number, "exclusiveMinimum": number, "exclusiveMaximum": number, "multipleOf": lambda: draw.randint(1, 4),
        "minLength": lambda: draw.randint(0, 2), "maxLength": lambda: draw.randint(0, 3),
        "pattern": lambda: draw.choice(["a", "^a", "b$", "^[ab]*$", "a{2}", "^(a|bb)?c?$", "[^a]", "^.$", "\u00e9|\\t", "^[a-c]+$"]),
        "minItems": lambda: draw.randint(0, 2), "maxItems": lambda: draw.randint(0, 3), "required": lambda: draw.sample(["a", "ab", "b"], draw.randint(0, 2)),
        "minProperties": lambda: draw.randint(0, 2), "maxProperties": lambda: draw.randint(0, 3),
        "dependentRequired": lambda: {k: draw.sample(["a", "ab", "b"], draw.randint(0, 2)) for k in draw.sample(["a", "b", "c"], draw.randint(1, 2))},
        "propertyNames": lambda: draw.choice([{"maxLength": 1}, {"minLength": 1}, {"minLength": 1, "maxLength": 2, "pattern": "a|b"}, {"enum": ["a", "b", "c"]}]),
    }
    if depth:
        choices.update({
            "items": inner, "prefixItems": lambda: [inner() for _ in range(draw.randint(1, 2))], "additionalProperties": inner,
            "properties": lambda: {k: inner() for k in draw.sample(["a", "ab", "b", "\u00e9\""], draw.randint(1, 3))},
            "patternProperties": lambda: {draw.choice(["^a", "b", "^[a-z]+$"]): inner()}, "anyOf": lambda: [inner() for _ in range(draw.randint(1, 3))],
            "allOf": lambda: [inner() for _ in range(draw.randint(1, 2))], "oneOf": lambda: [inner() for _ in range(draw.randint(1, 2))],
            "dependentSchemas": lambda: {k: inner() for k in draw.sample(["a", "ab", "b"], draw.randint(1, 2))},
            "unevaluatedProperties": inner, "unevaluatedItems": inner, "$ref": lambda: "#/$defs/" + draw.choice("xy")})
    for key in draw.sample(sorted(choices), draw.randint(1, 4 if depth else 2)):
        schema[key] = choices[key]()
    return schema


def random_value(draw, depth):
    kind = draw.randint(0, 6 if depth else 4)
    if kind < 2:
        return draw.choice([None, True, False, 0, 1, 2, -1, 3, 12])
    if kind == 2:
        return draw.choice([0.5, 1.5, -0.25, 10.75, 2])
    if kind < 5:
        return "".join(draw.choice("aabbc\u00e9\t\"") for _ in range(draw.randint(0, 4)))
    if kind == 5:
        return [random_value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return {draw.choice(["a", "ab", "b", "\u00e9\"", "c", ""]): random_value(draw, depth - 1) for _ in range(draw.randint(0, 3))}


def at_random(grammars, report, n=2000):
    draw, found = random.Random(7), {"schemas": n, "accepted": 0, "valid": 0, "invalid": 0}
    for index in range(n):
        schema = {"$defs": {"x": random_schema(draw, 1), "y": random_schema(draw, 1)}, "anyOf": [random_schema(draw, 2)]}
        values = [random_value(draw, 2) for _ in range(40)]
        try:
            grammar = grammars.compile(schema)
        except ffi.Dsv3Error:
            continue
        found["accepted"] += 1
        validator = jsonschema.Draft202012Validator(schema)
        for value in values:
            try:
                valid = validator.is_valid(value)
            except RecursionError:                     # a $ref that leads to itself: undefined
                break
            found["valid" if valid else "invalid"] += 1
            if grammars.fits(grammar, spelled(value)) != valid:
                report.fail(f"schema: random {index}", f"expected {'valid' if valid else 'invalid'}: {spelled(value)} under {json.dumps(schema)}")
                break
        else:
            report.check(f"schema: random {index}", True)
        grammars.dsv3.grammar_close(grammar)
    return found


# What a host may ask for, and a text that fits.
BESIDE = [
    ("person", {"type": "object", "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 50}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string"}}, "kind": {"enum": ["alpha", "beta", "gamma"]}},
        "required": ["name", "age", "tags", "kind"], "additionalProperties": False},
     {"name": "J\u00f6rg M\u00fcller the great", "age": 42, "tags": ["a long tag, with words", "b"], "kind": "beta"}),
    ("patterns", {"type": "object", "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "word": {"type": "string", "pattern": "^[a-z ]+$"},
        "mail": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.(com|org)$"}}, "required": ["code", "word", "mail"], "additionalProperties": False},
     {"code": "ABC-1234", "word": "some small words in a row", "mail": "someone.else@example.org"}),
    ("any object", {"type": "object"},
     {"title": "A tale", "n": [1, 2.5, -3e10, None, True], "inner": {"text": "He said: \"no\".\n", "list": [[], {}]}}),
]


def beside(lib, directory, report):
    """Microseconds of a mask along each text, ours and llguidance's, the best of three at each token."""
    import llguidance
    import llguidance.hf
    import transformers
    grammars = Grammars(lib, directory)
    hf = transformers.PreTrainedTokenizerFast(tokenizer_file=os.path.join(directory, "tokenizer.json"))
    hf.eos_token = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    theirs_tokenizer = llguidance.hf.from_tokenizer(hf)
    n_words, rows = (theirs_tokenizer.vocab_size + 31) // 32, []
    for name, schema, value in BESIDE:
        ids = hf.encode(json.dumps(value, ensure_ascii=False), add_special_tokens=False)
        ours, theirs, mask, their_mask, equal = [], [], grammars.mask_type(), (C.c_uint32 * n_words)(), 0
        starts = [time.perf_counter()]
        grammar = grammars.compile(schema, alone=True)
        starts.append(time.perf_counter())
        matcher = llguidance.LLMatcher(theirs_tokenizer, llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), defaults={"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}))
        starts.append(time.perf_counter())
        state = grammars.start(grammar)
        for i, token in enumerate(ids + [hf.eos_token_id]):
            best = []
            for _ in range(3):
                at = time.perf_counter()
                grammars.dsv3.grammar_mask(grammar, C.byref(state), mask)
                best.append(time.perf_counter() - at)
            ours.append(min(best) * 1e6)
            at = time.perf_counter()
            matcher.unsafe_compute_mask_ptr(C.addressof(their_mask), C.sizeof(their_mask))
            theirs.append((time.perf_counter() - at) * 1e6)
            n = min(len(mask), n_words)
            equal += list(mask)[:n] == list(their_mask)[:n]
            if token == hf.eos_token_id:
                break
            report.check(f"schema: beside: {name}: token {i}", bool(grammars.dsv3.grammar_accept(grammar, C.byref(state), token)),
                         hf.decode([token]))
            if not matcher.consume_token(token):
                report.say(f"schema: llguidance refuses token {i} of {name}: {matcher.get_error()}")
                break
        grammars.dsv3.grammar_close(grammar)
        def spread(times):
            times = sorted(times)
            return f"{times[len(times) // 2]:.0f}", f"{times[min(len(times) - 1, int(len(times) * 0.99))]:.0f}"
        rows.append({"schema": name, "tokens": len(ids) + 1, "ours": spread(ours), "theirs": spread(theirs), "equal": f"{equal}",
                     "compile": f"{(starts[1] - starts[0]) * 1e3:.0f}", "their_compile": f"{(starts[2] - starts[1]) * 1e3:.0f}"})
        report.check(f"schema: beside: {name}: median under 100 us", float(rows[-1]["ours"][0]) < 100, rows[-1]["ours"][0])
    return rows


def check(lib, tiny, v3, work, report):
    grammars = Grammars(lib, tiny)
    out = {"schema_suite": suite(grammars, work, report), "schema_random": at_random(grammars, report), "schema_sampled": sampled(lib, tiny, report)}
    if os.path.exists(os.path.join(v3, "tokenizer.json")):
        out["schema_beside"] = beside(lib, v3, report)
    else:
        report.skip("schema: beside llguidance", f"no tokenizer in {v3}")
    return out


def tables(out):
    text = table("JSON-Schema-Test-Suite, draft 2020-12: schemas accepted, and instances of those as the suite has them", [
        ("file", "keyword", "<"), ("schemas", "schemas", ">"), ("accepted", "accepted", ">"), ("valid", "valid", ">"),
        ("invalid", "invalid", ">"), ("refused for", "refused", "<")], out["schema_suite"])
    s = out["schema_random"]
    text += (f"\nRandom schemas: {s['schemas']}, of which {s['accepted']} are accepted; {s['valid']} valid and {s['invalid']} invalid values, "
             "as jsonschema has them\n")
    s = out["schema_sampled"]
    text += f"\nSampled at temperature 1.5: {s['texts']} texts, {s['tokens']} tokens, under {s['schemas']} schemas, {s['seconds']:.0f} s\n"
    if out.get("schema_beside"):
        text += "\n" + table("Masks on V3's tokenizer, microseconds; compiling, milliseconds (ours with the table of tokens)", [
            ("schema", "schema", "<"), ("tokens", "tokens", ">"), ("median", lambda r: r["ours"][0], ">"), ("p99", lambda r: r["ours"][1], ">"),
            ("compile", "compile", ">"), ("llguidance", lambda r: r["theirs"][0], ">"), ("p99", lambda r: r["theirs"][1], ">"),
            ("compile", "their_compile", ">"), ("same masks", "equal", ">")], out["schema_beside"])
    return text
