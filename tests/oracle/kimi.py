"""Kimi's tokenizer: dsv3 tokenize on tiktoken.model against PyPI's tiktoken with the public pattern.

  goldens     the texts of DeepSeek-V3's goldens, all categories
  random      seeded texts over all classes, with markers spelled in them
  long        running text, where it lies in the shared data

Safe mode is compared with encode_ordinary, markers parsed with allowed_special="all". tiktoken reads the ranks from the
file itself: nothing is fetched.
"""

import base64
import json
import os
import random

import tiktoken

import tokenizer_oracle

HAN = r"[^\p{Han}]"
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&" + HAN + "]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&" + HAN + "]"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([r"[\p{Han}]+", r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + "+" + SHORT,
                    r"[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + "*" + SHORT, r"\p{N}{1,3}",
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])

# The published tokenizer_config.json's added_tokens_decoder; the ids between are reserved.
ADDED = {163584: "[BOS]", 163585: "[EOS]", 163586: "<|im_end|>", 163587: "<|im_user|>", 163588: "<|im_assistant|>",
         163590: "<|start_header_id|>", 163591: "<|end_header_id|>", 163593: "[EOT]", 163594: "<|im_system|>",
         163595: "<|tool_calls_section_begin|>", 163596: "<|tool_calls_section_end|>", 163597: "<|tool_call_begin|>",
         163598: "<|tool_call_argument_begin|>", 163599: "<|tool_call_end|>", 163601: "<|im_middle|>",
         163602: "<|media_begin|>", 163603: "<|media_content|>", 163604: "<|media_end|>", 163605: "<|media_pad|>",
         163606: "<think>", 163607: "</think>", 163838: "[UNK]", 163839: "[PAD]"}
LONG = ("promessi_sposi.txt", "hongloumeng.txt", "kokoro.txt", "mixed.txt")
RANDOM = 20000


def read_ranks(path):
    ranks = {}
    with open(path, "rb") as f:
        for line in f.read().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    return ranks


def checkpoint(directory, model):
    """tiktoken.model beside a tokenizer_config.json of the published form."""
    os.makedirs(directory, exist_ok=True)
    to = os.path.join(directory, "tiktoken.model")
    if not os.path.exists(to):
        os.symlink(os.path.abspath(model), to)
    decoder = {str(i): {"content": c, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                        "special": not c.startswith(("<think", "</think"))} for i, c in ADDED.items()}
    with open(os.path.join(directory, "tokenizer_config.json"), "w") as f:
        json.dump({"added_tokens_decoder": decoder, "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]",
                   "tokenizer_class": "TikTokenTokenizer"}, f)


def texts(shared, markers, n, seed=20250203):
    golden = os.path.join(shared, "tokenizers", "deepseek-v3", "golden.jsonl")
    found = []
    if os.path.exists(golden):
        with open(golden, encoding="utf-8", newline="\n") as f:
            found = [json.loads(line)["text"] for line in f.read().split("\n") if line]
    draw, r = tokenizer_oracle.Texts(seed, markers), random.Random(seed)
    edges = ["'s", "'S", "'ſ", "'re", "'LL", "'d", "'x", "aBC", "ABc", "ǅ", "ª", "ー", "中", "〇", "々", "\u0301", "\u200d", "1", "\n", " ",
             "\u3000", "É", "ß", "ʰ", "か", "Ⅷ", "ñ", "𞤀", "𞤢", "𐐀"]
    for i in range(n):
        if i % 4 == 0:
            found.append("".join(r.choice(edges) for _ in range(r.randrange(1, 12))))
        else:
            found.append("".join(draw.text() for _ in range(r.randrange(1, 3))))
    return found


def ask(program, directory, batch, markers):
    lines = "".join(json.dumps({"text": t, "parse_special": markers}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(batch))
    return [json.loads(line).get("ids") for line in program.run("tokenize", directory, "--jsonl", input=lines.encode()).splitlines()]


def check(shared, work, program, report, n=RANDOM):
    model = os.path.join(shared, "tokenizers", "kimi-k2", "tiktoken.model")
    if not os.path.exists(model):
        report.skip("kimi", "no tokenizers/kimi-k2/tiktoken.model in the shared data")
        return []
    directory = os.path.join(work, "kimi")
    checkpoint(directory, model)
    ranks = read_ranks(model)
    special = {ADDED.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), len(ranks) + 256)}
    wheel = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    batch = texts(shared, list(ADDED.values()) + ["<|reserved_token_163700|>"], n)
    rows = []
    for what, markers in (("safe", False), ("markers", True)):
        found = ask(program, directory, batch, markers)
        equal = 0
        for text, ids in zip(batch, found):
            wanted = wheel.encode(text, allowed_special="all") if markers else wheel.encode_ordinary(text)
            equal += report.check(f"kimi: {what}: {text!r}", ids == wanted, f"{ids} against {wanted}")
        rows.append({"what": what, "texts": len(batch), "equal": equal})
    for name in LONG:
        path = os.path.join(shared, "tokenizers", "deepseek-v3", "long", name)
        if os.path.exists(path):
            with open(path, "rb") as f:
                raw = f.read()
            ids = [int(i) for i in program.run("tokenize", directory, input=raw).split()]
            equal = report.check(f"kimi: {name}", ids == wheel.encode_ordinary(raw.decode()))
            rows.append({"what": name, "texts": 1, "equal": int(equal)})
    return rows


def write_goldens(shared, texts_from, path):
    """Texts of tests/tokenizer_tiny.jsonl with Kimi's ids."""
    ranks = read_ranks(os.path.join(shared, "tokenizers", "kimi-k2", "tiktoken.model"))
    wheel = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    with open(texts_from, encoding="utf-8", newline="\n") as f:
        found = [json.loads(line).get("text") for line in f.read().split("\n") if line]
    with open(path, "w", encoding="utf-8") as f:
        for text in sorted({t for t in found if t and len(t) < 60})[::2]:
            f.write(json.dumps({"text": text, "ids": wheel.encode_ordinary(text), "decoded": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    import sys
    if len(sys.argv) != 4:
        sys.exit("usage: kimi.py SHARED tests/tokenizer_tiny.jsonl OUT: writes tests/tokenizer_kimi.jsonl")
    write_goldens(*sys.argv[1:])
