"""The tokenizer against the `tokenizers` wheel: random texts both ways, and speed side by side.

  safe mode       parse_special false  =  the wheel with added_tokens emptied
  markers         parse_special true   =  the wheel as it is
"""

import json
import os
import random
import subprocess
import sys
import time
import unicodedata

os.environ["TOKENIZERS_PARALLELISM"] = "false"        # before the import: one thread, for the speed comparison
os.environ["RAYON_NUM_THREADS"] = "1"

import tokenizers                                      # noqa: E402

from program import ProgramError                       # noqa: E402

LONG_TEXTS = ("promessi_sposi.txt", "hongloumeng.txt", "kokoro.txt", "mixed.txt")


# ---------------------------------------------------------------- the wheel

def read_json(directory, name):
    with open(os.path.join(directory, name), encoding="utf-8") as f:
        return json.load(f)


def wheels(directory):
    """(as it is, with added_tokens emptied, the added tokens' texts)."""
    data = read_json(directory, "tokenizer.json")
    markers = [t["content"] for t in data["added_tokens"]]
    whole = tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    data["added_tokens"] = []
    safe = tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))
    return whole, safe, markers


def bos_id(directory, whole):
    """The id that add_special_tokens puts in front, or None."""
    try:
        config = read_json(directory, "tokenizer_config.json")
    except OSError:
        return None
    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return whole.token_to_id(bos) if bos and config.get("add_bos_token") else None


# ---------------------------------------------------------------- random texts

EDGES = [0x00, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x1C, 0x1F, 0x20, 0x7F, 0x80, 0x85, 0xA0, 0xAA, 0xAD, 0xB2, 0xBD, 0x17F, 0x300,
         0x378, 0x1680, 0x180E, 0x2000, 0x200A, 0x200B, 0x200D, 0x2028, 0x2029, 0x202F, 0x205F, 0x20E3, 0x2160, 0x2E80,
         0x3000, 0x3005, 0x3006, 0x3007, 0x303F, 0x3040, 0x3041, 0x3096, 0x3097, 0x3098, 0x3099, 0x309B, 0x309C, 0x309F,
         0x30A0, 0x30FB, 0x30FF, 0x3100, 0x3400, 0x4DBF, 0x4DFF, 0x4E00, 0x9FA5, 0x9FA6, 0x9FFF, 0xA000, 0xAC00, 0xD7A3,
         0xE000, 0xF900, 0xFE0F, 0xFEFF, 0xFF0F, 0xFF11, 0xFF21, 0xFF5C, 0xFF65, 0xFFFD, 0xFFFE, 0x10000, 0x1D7CE,
         0x1F1E6, 0x1F3FB, 0x1F600, 0x20000, 0x2A6DF, 0x323AF, 0x323B0, 0xE0001, 0xE0100, 0xE01EF, 0x10FFFF]
WORDS = ("the and of to in a is that it was he for on are with as his they at be this from have or by one had not but what "
         "all were when we there can an your which their said if do will each about how up out them then she many some so "
         "don't I'll they've it's snake_case camelCase HTTPServer int main(void) return x[i] += 1; != == -> // /* */ #include "
         "0x1F 3.14159 1,000,000 2024-01-31 user@example.com https://example.com/a/b?c=d&e=f#g $HOME %s \\n \\t").split(" ")


class Texts:
    """Seeded texts over every class of code point, class edges and pieces of the tokenizer's own markers."""

    def __init__(self, seed, markers):
        self.r = random.Random(seed)
        pools = {}
        for c in range(0x110000):
            if 0xD800 <= c <= 0xDFFF:
                continue
            category = unicodedata.category(chr(c))
            key = {"Lo": "Lo", "Ll": "Lc", "Lu": "Lc", "Lt": "Lc", "Lm": "Lm", "Cn": "Cn", "Co": "Co"}.get(category, category[0])
            pools.setdefault(key, []).append(chr(c))
        self.pools = list(pools.values())
        self.ranges = [(0x21, 0x7E), (0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF),
                       (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x20A0, 0x20CF),
                       (0x2190, 0x27BF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF),
                       (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF)]
        self.spaces = [chr(c) for c in (9, 10, 11, 12, 13, 32, 32, 32, 32, 0x85, 0xA0, 0x2003, 0x2028, 0x3000)]
        self.markers = markers

    def run(self):
        r, kind = self.r, self.r.randrange(12)
        length = r.choice((1, 1, 1, 2, 2, 3, 4, 7))
        if kind == 0:
            return "".join(r.choice(r.choice(self.pools)) for _ in range(length))
        if kind == 1:
            pool = r.choice(self.pools)
            return "".join(r.choice(pool) for _ in range(length))
        if kind == 2:
            return "".join(chr(r.choice(EDGES)) for _ in range(length))
        if kind in (3, 4):
            low, high = r.choice(self.ranges)
            return "".join(chr(r.randint(low, high)) for _ in range(length))
        if kind == 5:
            return "".join(r.choice(self.spaces) for _ in range(length))
        if kind == 6:
            return r.choice((" ", "", "\n")).join(r.choice(WORDS) for _ in range(length))
        if kind == 7:
            return r.choice("aA1 =.-\n\t'\u4e00\u3042\u200d") * r.choice((2, 3, 5, 16, 40))
        if kind == 8:
            return str(r.randrange(10 ** r.randrange(1, 14)))
        if kind == 9:
            return "".join(r.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + r.choice(("", "a", "Zb", " ", "\n", "1"))
                           for _ in range(length))
        if not self.markers:
            return "<|x|>"
        marker = r.choice(self.markers if r.randrange(3) else self.markers[:3] + self.markers[-12:])
        if kind == 10:
            return marker
        damage = r.randrange(4)
        if damage == 0:
            a, b = sorted((r.randrange(len(marker) + 1), r.randrange(len(marker) + 1)))
            return marker[a:b]
        if damage == 1:
            at = r.randrange(len(marker))
            return marker[:at] + r.choice((" ", "<", ">", "x", "\uff5c", "|")) + marker[at + r.randrange(2):]
        if damage == 2:
            return marker.replace("\uff5c", "|").replace("\u2581", "_")
        return marker * 2

    def text(self):
        return "".join(self.run() for _ in range(self.r.choice((0, 1, 2, 3, 5, 8, 13, 21))))

    def ids(self, size):
        """Ids to decode: any, few specials, a few beyond the vocabulary, and runs of single bytes."""
        r = self.r
        out = []
        for _ in range(r.choice((0, 1, 2, 5, 12, 30))):
            kind = r.randrange(8)
            out.append(r.randrange(size + 300) if kind == 0 else r.randrange(min(size, 300)) if kind < 4 else r.randrange(size))
        return out


# ---------------------------------------------------------------- checks

def check(name, directory, program, report, count, seed=20250101):
    """Encode and decode of one tokenizer directory, `count` texts; a row for the table."""
    if not os.path.exists(os.path.join(directory, "tokenizer.json")):
        report.skip(f"tokenizer {name}", f"no tokenizer.json in {directory}")
        return None
    whole, safe, markers = wheels(directory)
    bos = bos_id(directory, whole)
    make = Texts(seed, markers)
    texts = [make.text() for _ in range(count)]
    row = {"tokenizer": name, "texts": count, "mb": sum(len(t.encode()) for t in texts) / 1e6}

    # Every text both ways; every eighth with add_special_tokens.
    asked, wanted = [], []
    for at, text in enumerate(texts):
        front = at % 8 == 7
        for parse, wheel in ((False, safe), (True, whole)):
            asked.append({"text": text, "add_special_tokens": front, "parse_special": parse})
            ids = wheel.encode(text, add_special_tokens=False).ids
            wanted.append([bos] + ids if front and bos is not None else ids)
    try:
        answers = program.jsonl("tokenize", directory, asked)
        wrong = [i for i, (a, w) in enumerate(zip(answers, wanted)) if a.get("ids") != w]
        by_mode = {p: sum(asked[i]["parse_special"] == p for i in wrong) for p in (False, True)}
        row["safe"], row["markers"] = f"{count - by_mode[False]}/{count}", f"{count - by_mode[True]}/{count}"
        detail = f"{asked[wrong[0]]}: {answers[wrong[0]]}, wheel {wanted[wrong[0]]}" if wrong else ""
        report.check(f"tokenizer {name}: safe mode, {count} texts", not by_mode[False], detail)
        report.check(f"tokenizer {name}: markers, {count} texts", not by_mode[True], detail)
    except (ProgramError, ValueError, UnicodeDecodeError) as e:
        report.fail(f"tokenizer {name}: encode", str(e))

    asked, wanted = [], []
    for at in range(count):
        ids = make.ids(whole.get_vocab_size())
        asked.append({"ids": ids, "skip_special_tokens": bool(at % 2)})
        wanted.append(whole.decode(ids, skip_special_tokens=bool(at % 2)))
    try:
        answers = program.jsonl("detokenize", directory, asked)
        wrong = [i for i, (a, w) in enumerate(zip(answers, wanted)) if a.get("text") != w]
        row["decode"] = f"{count - len(wrong)}/{count}"
        report.check(f"tokenizer {name}: decode, {count} lists", not wrong,
                     f"{asked[wrong[0]]}: {answers[wrong[0]]}, wheel {wanted[wrong[0]]!r}" if wrong else "")
    except (ProgramError, ValueError, UnicodeDecodeError) as e:
        report.fail(f"tokenizer {name}: decode", str(e))
    return row


def check_goldens(directory, report):
    """The wheel itself against the golden file beside this tokenizer: is this the version they were made with?"""
    path = os.path.join(directory, "golden.jsonl")
    if not os.path.exists(path):
        return
    whole, _, _ = wheels(directory)
    with open(path, encoding="utf-8", newline="\n") as f:
        lines = [json.loads(line) for line in f.read().split("\n") if line]
    bad = 0
    for line in lines:
        ids = whole.encode(line["text"], add_special_tokens=False).ids
        bad += ([0] + ids if line["add_special_tokens"] else ids) != line["ids"]
    report.check("tokenizer: the wheel agrees with golden.jsonl", not bad, f"{bad} of {len(lines)} differ")


# ---------------------------------------------------------------- speed

def wheel_speed(directory, paths, seconds=1.0):
    """File name -> MB/s of the wheel on one thread: the best of several passes over the whole text."""
    whole, _, _ = wheels(directory)
    out = {}
    for path in paths:
        with open(path, "rb") as f:
            raw = f.read()
        text, best, spent = raw.decode(), float("inf"), 0.0
        while spent < seconds:
            start = time.perf_counter()
            whole.encode(text, add_special_tokens=False)
            took = time.perf_counter() - start
            best, spent = min(best, took), spent + took
        out[os.path.basename(path)] = len(raw) / 1e6 / best
    return out


def bench_speed(bench, directory, paths):
    """The same from the C bench, on one thread too: a JSON object a line, the best pass of each text."""
    done = subprocess.run([bench, "--what", "tokenizer", "--json", directory, *paths], capture_output=True,
                          timeout=300)
    if done.returncode:
        raise ProgramError(f"bench: exit {done.returncode}: {done.stderr.decode(errors='replace').strip()[-200:]}")
    lines = [json.loads(line) for line in done.stdout.decode().split("\n") if line]
    return {line["text"]: line["mb_s_best"] for line in lines if line.get("what") == "tokenizer"}


def speed(directory, bench, report):
    """Rows of the table: both speeds on each long text, the wheel before and after the C bench, best taken."""
    paths = [os.path.join(directory, "long", name) for name in LONG_TEXTS]
    missing = [p for p in paths if not os.path.exists(p)]
    if missing or not os.path.exists(os.path.join(directory, "tokenizer.json")):
        report.skip("tokenizer speed", f"no long texts in {directory}")
        return []
    wheel = wheel_speed(directory, paths)
    ours = {}
    if os.path.exists(bench):
        try:
            ours = bench_speed(bench, directory, paths)
            if not ours:
                report.fail("tokenizer speed", "the bench printed no speeds")
        except (ProgramError, ValueError, KeyError, subprocess.TimeoutExpired) as e:
            report.fail("tokenizer speed", str(e))
        for name, again in wheel_speed(directory, paths).items():
            wheel[name] = max(wheel[name], again)
    else:
        report.skip("tokenizer speed: comparison", f"no bench at {bench}")
    rows = []
    for name in LONG_TEXTS:
        row = {"text": name, "wheel": wheel[name], "ours": ours.get(name), "times": None}
        if row["ours"]:
            row["times"] = row["ours"] / row["wheel"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    # The wheel's speed alone: tokenizer_oracle.py DIRECTORY FILES...
    for file, speed_of in wheel_speed(sys.argv[1], sys.argv[2:]).items():
        print(json.dumps({"file": file, "wheel_mb_per_s": round(speed_of, 2)}))
