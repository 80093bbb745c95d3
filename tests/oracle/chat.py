"""Conversations: dsv3 render against Jinja2, set up as transformers does, and the `tokenizers` wheel.

  text    equal for every conversation; where the template raises, an error
  ids     equal to those of the rendered text, markers parsed, where no content holds a marker's text; where one does,
          as many ids of added tokens as the template itself writes

Templates are read from SHARED/tokenizers; a markup whose template is not there is skipped by name.
"""

import copy
import json
import os
import random

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

import tokenizer_oracle

CONVERSATIONS = 500
BOS = "<｜begin▁of▁sentence｜>"
R1_PROMPT = "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}"
KIMI = ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>", "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"]
GIGA = ["<|role_sep|>", "<|message_sep|>"]
DECLARE_TOOLS = ("kimi-k2", "kimi-k2-thinking")


# ---------------------------------------------------------------- the reference

def environment():
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                       extensions=[jinja2.ext.loopcontrols])

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda _: "2025-01-01"
    return env


def read_text(*path):
    try:
        with open(os.path.join(*path), encoding="utf-8", newline="") as f:
            return f.read()
    except OSError:
        return None


def templates(shared):
    """markup -> template text, or None."""
    v3 = os.path.join(shared, "tokenizers", "deepseek-v3")
    found = {"v3": read_text(v3, "tokenizer_config.json"), "r1": read_text(v3, "tokenizer_config_r1.json")}
    found = {k: v and json.loads(v)["chat_template"] for k, v in found.items()}
    found["r1-think"] = None
    if found["r1"] and R1_PROMPT in found["r1"]:
        found["r1-think"] = found["r1"].replace(R1_PROMPT, R1_PROMPT.replace("<｜Assistant｜>", "<｜Assistant｜><think>\\n"))
    found["v3.1"] = read_text(v3, "chat_template_v3.1.jinja")
    for name in ("kimi-k2", "kimi-k2-thinking", "gigachat3"):
        found[name] = read_text(shared, "tokenizers", name, "chat_template.jinja")
    return found


def checkpoint(directory, shared, template, more):
    """The published tokenizer with `more` added tokens and this template. Returns the added tokens' texts."""
    os.makedirs(directory, exist_ok=True)
    data = tokenizer_oracle.read_json(os.path.join(shared, "tokenizers", "deepseek-v3"), "tokenizer.json")
    texts = {t["id"]: t for t in data["added_tokens"]}
    if "<think>" in more:
        for at, content in ((128798, "<think>"), (128799, "</think>")):
            texts[at].update(content=content, special=False, normalized=True)
    at = max(texts)
    for content in more:
        if content not in ("<think>", "</think>"):
            at += 1
            data["added_tokens"].append({"id": at, "content": content, "single_word": False, "lstrip": False,
                                         "rstrip": False, "normalized": False, "special": True})
    with open(os.path.join(directory, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(data, f, ensure_ascii=False)
    with open(os.path.join(directory, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump({"bos_token": BOS, "add_bos_token": True, "chat_template": template}, f)
    return [t["content"] for t in data["added_tokens"]]


# ---------------------------------------------------------------- random conversations

class Conversations:
    def __init__(self, seed, markers, markup):
        self.r, self.markup = random.Random(seed), markup
        self.texts = self.all_texts = tokenizer_oracle.Texts(seed + 1, markers)
        self.plain_texts = copy.copy(self.all_texts)
        self.plain_texts.markers = None
        self.markers = markers

    def text(self):
        kind = self.r.randrange(12)
        if kind == 0:
            return ""
        if kind == 1:
            return self.r.choice(("\n", " ", "\n\n", "</think", "think>", "a\n", "<|im_end|", "｜>", "User｜>"))
        if kind == 2 and self.texts.markers:
            return self.r.choice(("</think>", "<think>", "a</think>b</think>\n\nc", "<think>\na\n</think>\n\nb"))
        if kind == 3:
            return self.r.choice(self.markers) if self.texts.markers else "<|User|>"
        return "".join(self.texts.text() for _ in range(self.r.randrange(1, 4)))

    def word(self):
        return self.r.choice(("get_weather", "f", "", "天気", "a b", "x\ny", self.text()))

    def call(self, at):
        arguments = json.dumps({self.word(): self.text()}, ensure_ascii=self.r.random() < 0.5)
        return {"id": f"functions.{self.word()}:{at}", "type": "function",
                "function": {"name": self.word(), "arguments": arguments}}

    def message(self):
        role = self.r.choice(("system", "user", "user", "assistant", "assistant", "tool"))
        m = {"role": role, "content": self.text()}
        if role == "tool":
            m["tool_call_id"] = self.word()
        if role == "assistant" and self.r.random() < 0.4:
            m["content"] = None if self.r.random() < 0.5 else m["content"]
            m["tool_calls"] = [self.call(i) for i in range(self.r.randrange(0 if m["content"] is not None else 1, 4))]
        elif role == "assistant" and self.r.random() < 0.05:
            m["content"] = None
        if role == "assistant" and self.r.random() < 0.4:
            m["reasoning_content"] = self.text()
        if self.r.random() < 0.1:
            m["name"] = self.word()
        if role == "assistant" and self.r.random() < 0.1:
            m["prefix"] = self.r.random() < 0.5
        if self.r.random() < 0.03 and role in ("user", "system"):
            m["content"] = None
        return m

    def tools(self):
        def value(depth):
            kind = self.r.randrange(6 if depth < 3 else 4)
            if kind == 0:
                return self.r.choice((True, False, None, 0, -3, 17))
            if kind < 4:
                return self.text()
            if kind == 4:
                return [value(depth + 1) for _ in range(self.r.randrange(3))]
            return {self.word(): value(depth + 1) for _ in range(self.r.randrange(4))}
        return [{"type": "function", "function": {"name": self.word(), "description": self.text(),
                                                  "parameters": {"type": "object", "properties": {"p": value(0)}}}}
                for _ in range(self.r.randrange(0, 3))]

    def one(self):
        self.texts = self.r.choice((self.all_texts, self.plain_texts))
        c = {"messages": [self.message() for _ in range(self.r.choice((0, 1, 1, 2, 3, 4, 6, 9)))],
             "add_generation_prompt": self.r.random() < 0.6}
        if self.r.random() < 0.5:
            c["thinking"] = self.r.random() < 0.5
        if self.markup in DECLARE_TOOLS and self.r.random() < 0.4:
            c["tools"] = self.tools()
        return c


def strings(x):
    if isinstance(x, str):
        yield x
    elif isinstance(x, dict):
        for k, v in x.items():
            yield k
            yield from strings(v)
    elif isinstance(x, list):
        for v in x:
            yield from strings(v)


def without_strings(c):
    """The same conversation with every text in it made harmless; what matters to a template stays."""
    c = copy.deepcopy(c)
    for m in c["messages"]:
        for key in ("content", "reasoning_content", "tool_call_id", "name"):
            if m.get(key):
                m[key] = "x"
        for call in m.get("tool_calls", ()):
            call.update(id="x", function={"name": "x", "arguments": "x"})
    if c.get("tools"):
        c["tools"] = [{"x": "x"}]
    return c


# ---------------------------------------------------------------- the comparison

def check_markup(markup, template, directory, shared, program, report, n):
    more = ["<think>", "</think>"] if markup != "v3" else []
    more += KIMI if markup.startswith("kimi") else GIGA if markup == "gigachat3" else []
    markers = checkpoint(directory, shared, template, more)
    wheel = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    added = {wheel.token_to_id(m) for m in markers}
    compiled = environment().from_string(template)
    draw = Conversations(hash_of(markup), markers, markup)
    conversations = [draw.one() for _ in range(n)]

    def reference(c):
        try:
            return compiled.render(**copy.deepcopy(c), bos_token=BOS, eos_token="<｜end▁of▁sentence｜>")
        except Exception:                              # whatever Python says: the template raises
            return None

    lines = "".join(json.dumps(c, ensure_ascii=draw.r.random() < 0.5) + "\n" for c in conversations)
    auto = program.run("render", directory, "--jsonl", input=lines.encode())
    named = program.run("render", directory, "--markup", markup, "--jsonl", input=lines.encode())
    row = {"markup": markup, "conversations": n, "text": 0, "raises": 0, "ids": 0, "posed": 0}
    report.check(f"chat: {markup}: recognised", auto == named)
    for at, (c, line) in enumerate(zip(conversations, named.split(b"\n"))):
        found, wanted = json.loads(line), reference(c)
        if wanted is None or "error" in found:
            row["raises"] += report.check(f"chat: {markup}: conversation {at}", wanted is None and "error" in found,
                                          f"{found} against {wanted!r}, {c}")
            continue
        row["text"] += report.check(f"chat: {markup}: conversation {at}", found["rendered"] == wanted,
                                    f"{found['rendered']!r} against {wanted!r}")
        if any(m in s for s in strings(c) for m in markers):
            harmless = wheel.encode(reference(without_strings(c)), add_special_tokens=False).ids
            specials = [i for i in found["ids"] if i in added]
            row["posed"] += report.check(f"chat: {markup}: markers of {at}", specials == [i for i in harmless if i in added],
                                         f"{specials} in {c}")
        else:
            ids = wheel.encode(wanted, add_special_tokens=False).ids
            row["ids"] += report.check(f"chat: {markup}: ids of {at}", found["ids"] == ids, f"{found['ids']} against {ids}")
    return row


def hash_of(text):
    return int.from_bytes(text.encode(), "little") % 1000003


def check(shared, work, program, report, n=CONVERSATIONS):
    rows = []
    for markup, template in templates(shared).items():
        if template is None:
            report.skip(f"chat: {markup}", "no template in the shared data")
            continue
        rows.append(check_markup(markup, template, os.path.join(work, "chat-" + markup), shared, program, report, n))
        report.say(f"chat {markup} done")
    return rows


# ---------------------------------------------------------------- goldens for tests/chat_tiny.jsonl

def own_conversations():
    """Small ones, of our own words, for every rule there is."""
    def m(role, content, **more):
        return {"role": role, "content": content, **more}

    def calls(*names):
        return [{"id": f"functions.{n}:{i}", "type": "function",
                 "function": {"name": n, "arguments": json.dumps({"n": i})}} for i, n in enumerate(names)]

    hi, yes, rule = m("user", "Who sings?"), m("assistant", "The kettle."), m("system", "Rhyme.")
    call, answer = m("assistant", None, tool_calls=calls("look")), m("tool", "42", tool_call_id="functions.look:0")
    return [
        [], [hi], [m("user", "")], [rule], [rule, hi], [hi, yes], [hi, yes, hi], [rule, hi, yes, m("user", "più\n\n")],
        [rule, m("system", "Never lie."), hi], [hi, rule, yes, m("system", "Late.")], [yes], [hi, hi], [hi, yes, yes, hi],
        [hi, m("assistant", "<think>\nhm\n</think>\n\nNo.")], [hi, m("assistant", "<think>a</think>b</think>c"), hi],
        [hi, m("assistant", "no end <think>"), hi], [hi, m("assistant", None)], [m("user", None)],
        [hi, call], [hi, call, answer], [hi, call, answer, yes], [hi, call, answer, yes, hi, call, answer, yes],
        [hi, m("assistant", None, tool_calls=calls("a", "b", "c")), answer, answer, answer], [hi, call, answer, call, answer],
        [hi, m("assistant", "Wait.", tool_calls=calls("a", "b")), answer, yes], [hi, m("assistant", "Wait.", tool_calls=[])],
        [hi, m("assistant", "Sure,", prefix=True)], [hi, call, answer, hi], [call, answer], [answer, hi],
        [hi, m("assistant", "So.", reasoning_content="because"), hi, m("assistant", None, reasoning_content="let me look",
                                                                     tool_calls=calls("look")), answer],
        [m("user", "I am", name="Ada"), m("assistant", "you are", name="Bob")],
    ]


def write_goldens(shared, path):
    with open(path, "w", encoding="utf-8") as f:
        for markup, template in templates(shared).items():
            if template is None or markup == "gigachat3":  # its template's text is not ours to copy
                continue
            compiled = environment().from_string(template)
            for messages in own_conversations():
                for options in ({}, {"add_generation_prompt": True, "thinking": True}):
                    try:
                        text = compiled.render(messages=messages, bos_token=BOS, add_generation_prompt=False) if not options \
                            else compiled.render(messages=messages, bos_token=BOS, **options)
                    except Exception:
                        text = None
                    f.write(json.dumps({"template": markup, "messages": messages, **options, "rendered": text},
                                       ensure_ascii=False) + "\n")


if __name__ == "__main__":
    import sys
    if len(sys.argv) != 3:
        sys.exit("usage: chat.py SHARED OUT: writes tests/chat_tiny.jsonl")
    write_goldens(*sys.argv[1:])
