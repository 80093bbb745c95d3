#!/usr/bin/env python3
"""Writes tests/tokenizer_tiny.jsonl: what the tokenizers wheel does with the shipped model's tokenizer.

  make_tokenizer_goldens.py [TOKENIZER_DIRECTORY [OUTPUT]]     (examples/tiny, tests/tokenizer_tiny.jsonl)

One object a line, LF only: text, parse_special, ids, decoded, category. With parse_special
false the ids are those of the wheel with added_tokens emptied, with true those of the wheel as
it is; decoded is the wheel's decode of the ids with nothing skipped, which is the text. Lines of
category "decode" have no text: ids (broken characters and unknown ids among them),
skip_special_tokens and what the wheel makes of them. Run it again whenever the tokenizer
changes: the test that reads the file knows nothing else.
"""

import json
import os
import random
import sys
import unicodedata

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import tokenizer_oracle                                # noqa: E402
from tokenizer_oracle import EDGES, WORDS, Texts       # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
LIMIT = 200_000

LANGUAGES = {
    "en": ["The quick brown fox jumps over the lazy dog.", "It's a long way, isn't it? They'd say we're late; I'll run."],
    "de": ["Über den grünen Hügeln läuft ein Fuchs, groß und weiß.", "Rechtsschutzversicherungsgesellschaften, Äpfel, Öl."],
    "fr": ["L’été dernier, j'ai mangé des crêpes à Noël ; qu'en dis-tu ?", "« Où est le garçon ? » — Là-bas, près du château."],
    "es": ["¿Dónde está el niño? ¡Mañana vendrá la cigüeña!", "El corazón del pingüino late rápido."],
    "it": ["Perché la città è così bella? È già sera.", "C'era una volta un pezzo di legno."],
    "pl": ["Zażółć gęślą jaźń, źle się dzieje.", "Łódź płynie po rzece."],
    "tr": ["Işık ılık süzülüyor; İstanbul'da gökyüzü açık.", "Çocuk ağaca çıktı."],
    "vi": ["Trời hôm nay đẹp quá, chúng ta đi dạo nhé.", "Một ngày mới bắt đầu ở Hà Nội."],
    "ru": ["Жила-была старушка, ёж и лиса у синего моря.", "Сколько стоит этот чай? 25 рублей."],
    "uk": ["Їжак і лелека живуть у ґаї.", "Сонце сходить над Дніпром."],
    "el": ["Καλημέρα κόσμε, ο ήλιος ανατέλλει.", "Η γάτα κοιμάται στην αυλή."],
    "zh": ["从前有一个磨坊主，他有三个儿子。", "今天是2024年3月1日，天气很好！"],
    "zhT": ["從前有一隻貓，穿著靴子走進森林。", "價格是１２３元。"],
    "ja": ["むかしむかし、おじいさんとおばあさんがいました。", "東京タワーは３３３メートルです。ｶﾀｶﾅも少し々。"],
    "ko": ["옛날 옛적에 고양이가 살았습니다.", "오늘은 3월 1일, 날씨가 맑아요!"],
    "ar": ["كان يا ما كان في قديم الزمان.", "السعر ٢٥ ديناراً، وهذا كَثِيرٌ."],
    "he": ["היה היה פעם חתול במגפיים.", "שָׁלוֹם לכולם!"],
    "fa": ["روزی روزگاری گربه‌ای بود.", "امروز ۱۲ فروردین است."],
    "hi": ["एक समय की बात है, एक बिल्ली थी।", "मूल्य १२५ रुपये है।"],
    "bn": ["এক দেশে এক বিড়াল ছিল।"], "ta": ["ஒரு ஊரில் ஒரு பூனை இருந்தது."], "te": ["ఒక ఊరిలో పిల్లి ఉండేది."],
    "th": ["กาลครั้งหนึ่งนานมาแล้วมีแมวตัวหนึ่ง ๑๒๓"], "lo": ["ມີແມວໂຕໜຶ່ງ ໑໒"], "km": ["មានឆ្មាមួយ ១២"],
    "my": ["ကြောင်တစ်ကောင်ရှိ၏ ၁၂"], "ka": ["იყო და არა იყო რა."], "hy": ["Լինում է, չի լինում մի կատու։"],
    "am": ["አንድ ድመት ነበረ ፩፪"], "bo": ["བྱི་ལ་ཞིག་ཡོད། ༡༢"], "mn": ["ᠮᠤᠤᠷ ᠪᠠᠢᠢᠵᠠᠢ"], "si": ["බළලෙක් සිටියේය."],
    "chr": ["ᏪᏌ ᎤᏪᎦ"], "cop": ["ⲉⲙⲟⲩ"], "got": ["𐌺𐌰𐍄𐍄𐌰"], "cune": ["𒊓𒀀 𒐕"], "egy": ["𓃠𓇋𓅱 𓏤"],
}
CODE = ["int main(int argc, char **argv)\n{\n\tfor (int i = 0; i < 10; i++)\n\t\tx[i] += a->b * 2;\n\treturn 0;\n}\n",
        "def f(x, *, y=1_000):\n    \"\"\"Doc.\"\"\"\n    return {k: v for k, v in x.items() if v != y}\n",
        "#include <stdio.h>\r\n#define N 0x1F\r\n", "SELECT * FROM t WHERE a >= 3.5 AND b LIKE '%x%';",
        "<div class=\"a b\"><p>x &amp; y</p></div>", "{\"a\": [1, 2.5e-3, null], \"b\": \"\\u0041\"}", "$ ls -la ~/x | grep '^d' && echo $?",
        "fn f<'a>(s: &'a str) -> Option<&'a str> { None }", "a=b;c:d,e.f!g?h", "#!/bin/sh\nset -e\n\n\n", "x² + y₁ ≤ ∞",
        "// comment\n/* other */\n--flag=value", "R\"(raw)\"", "λx.x", "@decorator\nclass A(B): pass"]
URLS = ["https://example.com/a/b?c=d&e=f#g", "http://user:pw@host.example:8080/~x/%20y", "mailto:someone@example.org",
        "ftp://192.168.0.1/file.tar.gz", "www.例え.jp/パス", "file:///C:/Program%20Files/"]
MATH = ["∀x∈ℝ: ⌈x⌉ = −⌊−x⌋", "E = mc²", "∑_{i=0}^{n} i² = n(n+1)(2n+1)/6", "½ + ¼ = ¾", "√2 ≈ 1.41421", "x ≠ y ⇒ ¬(x = y)"]
TARGETED = ["a  1", "  b", "x\n \ny", " \n  y", "!\n\n\nx", "\u200b\u200b", "##hello", "#hello", " !x", "\t!", "!x", "don't", "$é", "  ",
            " ", "\n", "\r\n", "\r", "\t", "\n\n\n", " \n", "\n ", "a \n", "\u3000a", "a\u3000", "\u00a0a", "1234567", "12 345", "１２３４５",
            "x1y22z333", "²³¹", "Ⅷ", "Hello, 世界!", "世界hello", "あいうabc", "アイウ・エオ", "々", "゛゜", "龥龦", "ー", "a\u0301b", "\u0301a",
            " \u0301", "👍🏽", "👨\u200d👩\u200d👧", "🇫🇷", "\ufeffBOM", "soft\u00adhyphen", "a\u2028b", "a\u0085b", "\x00", "a\x00b",
            "\x1c\x1d\x1e\x1f", "tab\ttab", "trailing space ", "...", "…", "--", "—", "''", "\"\"", "¿¡", "。、", "（）", "a.b.c", "A.B", "3.14",
            "1,000", "-5", "+7", "50%", "C++", "C#", ".NET", "e-mail", "re-enter", "o'clock", "rock'n'roll", "I'm", "we've", "IT'S"]


def base64ish(r, n):
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return "".join(r.choice(alphabet) for _ in range(n)) + "=" * r.randrange(3)


def texts(markers, vocabulary):
    """(category, text), the categories of the large tokenizer's golden file."""
    r, make = random.Random(20250102), Texts(20250103, markers)

    def chars(*categories):
        return [chr(c) for c in range(0x30000) if not 0xD800 <= c <= 0xDFFF and unicodedata.category(chr(c)) in categories]

    marks, numbers, punctuation, symbols = chars("Mn", "Mc", "Me"), chars("Nd", "Nl", "No"), chars("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"), chars("So", "Sm", "Sc", "Sk")
    letters, spaces = chars("Ll", "Lo", "Lu"), [chr(c) for c in (9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, 0x2003, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)]

    def mix(pools, low, high):
        return "".join(r.choice(r.choice(pools)) for _ in range(r.randint(low, high)))

    for code, lines in LANGUAGES.items():
        for line in lines:
            yield "lang-" + code, line
    everything = [line for lines in LANGUAGES.values() for line in lines]
    for _ in range(16):
        yield "lang-mix", r.choice((" ", "", ", ", "\n")).join(r.sample(everything, 3))
    for _ in range(16):
        yield "emoji", "".join(chr(r.choice((0x1F600, 0x1F44D, 0x1F1EB, 0x1F1F7, 0x2764, 0xFE0F, 0x200D, 0x1F3FD, 0x20E3, 0x31, 0x20, 0x78)))
                               for _ in range(r.randint(1, 8)))
    for _ in range(16):
        yield "combining", mix([marks, letters, " 1!a文"], 2, 8)
    for _ in range(20):
        yield "digits", str(r.randrange(10 ** r.randint(1, 20))) if r.randrange(2) else mix([numbers, "0123456789", " .,"], 2, 12)
    for text in CODE:
        yield "code", text
    for _ in range(40):
        yield "space", mix([spaces, "  \n\t", "ab1!"], 1, 8)
    for _ in range(30):
        yield "punct", mix([punctuation, symbols, "!\"#$%&'()*+,-./", " \na"], 1, 8)
    for text in URLS:
        yield "url", text
    for n in (12, 24, 40):
        yield "base64", base64ish(r, n)
    for text in MATH:
        yield "math", text
    for c in [*range(0x20), 0x7F, 0x80, 0x9F, 0xAD, 0x200E, 0xFEFF]:
        yield "control", r.choice(("{}", "a{}b", " {} ", "{}{}")).replace("{}", chr(c))
    for text in ("\ue000", "a\ue123b", "\uf8ff \U000f0000", "\u0378", "\u0378a", "a\U0010ffff", "\ufffe\uffff"):
        yield "unassigned", text
    for c in (0x1C89, 0x10D40, 0x1B4E, 0x105C0):
        yield "unicode16", f"x{chr(c)} {chr(c)}1{chr(c)}.{chr(c)}"
    for c in (0xA7CE, 0x11DE0, 0x2B96, 0x20C1):
        yield "unicode17", f"x{chr(c)} {chr(c)}1{chr(c)}.{chr(c)}"
    for text in ("一䷿龥龦", "〿\u3040ぁ\u3097\u3098゙゜ゝゟ", "゠アヿ\u3100ㄅ", "龥a龦", "丂 一", "鿿ꀀ", "㐀䶿𠀀", "豈﨎"):
        yield "cjk-edge", text
    for text in ("a" * 300, "ab" * 120, " " * 200, "\n" * 70, "=" * 130, "7" * 100, "一" * 60, "\u200d" * 50, "あ" * 64, "Aa" * 40 + "!" * 40,
                 " ".join(WORDS[:60])):
        yield "long", text
    yield "empty", ""
    for marker in markers:
        for shape in ("{}", "a{}b", " {} ", "{}{}", "x {}\n{}y", "<{}>"):
            yield "special", shape.replace("{}", marker)
    yield "special", "".join(markers)
    yield "special", markers[0] + "Hello" + markers[1]
    for marker in markers:
        for a, b in ((0, -1), (1, None), (0, 2), (2, None)):
            yield "partial", marker[a:b]
        yield "partial", marker.replace("\uff5c", "|").replace("\u2581", "_")
    for a in EDGES[::5]:
        b, c = r.choice(EDGES), r.choice((0x61, 0x31, 0x21, 0x20, 0x4E00))
        yield "grid", chr(a) + chr(b) + chr(c)
        yield "grid", chr(c) + chr(a) + chr(a) + chr(b)
    for _ in range(50):
        yield "random-unicode", mix([[chr(r.randrange(0x20, 0xD800)) for _ in range(20)], [chr(r.randrange(0xE000, 0x110000)) for _ in range(4)],
                                     letters, " 1a."], 2, 12)
    for _ in range(30):
        yield "random-vocab", "".join(r.choice(vocabulary) for _ in range(r.randint(2, 9)))
    for _ in range(60):
        yield "random-concat", make.text()[:120]
    for text in TARGETED:
        yield "targeted", text


def main():
    directory = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "examples", "tiny")
    output = sys.argv[2] if len(sys.argv) > 2 else os.path.join(ROOT, "tests", "tokenizer_tiny.jsonl")
    whole, safe, markers = tokenizer_oracle.wheels(directory)
    # Whole-text words of the vocabulary, to be joined at random: pieces that merge across what a text would have.
    vocabulary = [t for t in (whole.decode([i], skip_special_tokens=False) for i in range(259, whole.get_vocab_size()))
                  if "\ufffd" not in t and t not in markers]
    lines, seen = [], set()
    for category, text in texts(markers, vocabulary):
        both = category in ("special", "partial", "random-concat")
        for parse in (False, True) if both else (False,):
            if (text, parse) in seen:
                continue
            seen.add((text, parse))
            ids = (whole if parse else safe).encode(text, add_special_tokens=False).ids
            lines.append(json.dumps({"text": text, "ids": ids, "parse_special": parse,
                                     "decoded": whole.decode(ids, skip_special_tokens=False), "category": category},
                                    ensure_ascii=False, separators=(",", ":")))
    make = Texts(20250104, markers)
    for at in range(60):
        ids = make.ids(whole.get_vocab_size())[:16]
        if at % 3 == 0:
            ids += [whole.token_to_id(marker) for marker in markers]
        lines.append(json.dumps({"ids": ids, "skip_special_tokens": bool(at % 2), "category": "decode",
                                 "decoded": whole.decode(ids, skip_special_tokens=bool(at % 2))},
                                ensure_ascii=False, separators=(",", ":")))
    data = ("\n".join(lines) + "\n").encode()
    if len(data) > LIMIT:
        sys.exit(f"make_tokenizer_goldens.py: {len(data)} bytes, more than {LIMIT}")
    with open(output, "wb") as f:
        f.write(data)
    print(f"{output}: {len(lines)} lines, {len(data)} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
