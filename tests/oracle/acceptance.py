#!/usr/bin/env python3
"""How often guesses are right on text that the small model was not trained on, beside what independent speculative sampling
could reach.

  acceptance.py --dsv3 build/dsv3 [--shared ../shared] [--tales 4] [--work build/acceptance]

Prompts are the beginnings of held-out tales (train_tiny.py: every 20th); the program continues them by --draft N with
--drafter mtp and lookup. "right" is accepted / drafted; "tokens a pass" is what one reading of the weights gave. The bound
is that of the usual rule (Leviathan et al. 2023) for one guess: the mean of sum min(p, q) over the positions of the
continuations, p the model's distribution and q the prediction layer's, both behind the same temperature. Greedy: how often
both have the same best token.
"""

import argparse
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from program import Program, read_bytes                # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def held_out(corpus):
    """The same tales as train_tiny.py leaves out."""
    import pathlib
    import train_tiny
    return train_tiny.split_tales(train_tiny.read_tales(pathlib.Path(corpus)))[1]


def softmax(x, temperature):
    x = (x - x.max(-1, keepdims=True)).astype(np.float64) / temperature
    p = np.exp(x)
    return p / p.sum(-1, keepdims=True)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--dsv3", default="build/dsv3")
    a.add_argument("--shared", default="../shared")
    a.add_argument("--tiny", default=os.path.join(ROOT, "examples", "tiny"))
    a.add_argument("--work", default="build/acceptance")
    a.add_argument("--tales", type=int, default=4)
    a.add_argument("--prompt", type=int, default=64, help="tokens of a tale that are given")
    a.add_argument("-n", type=int, default=160, help="tokens written behind each")
    o = a.parse_args()
    os.makedirs(o.work, exist_ok=True)
    program = Program(o.dsv3, o.work)
    with open(os.path.join(o.tiny, "config.json")) as f:
        config = json.load(f)
    tales = held_out(os.path.join(o.shared, "corpus"))
    tales = [t for t in tales if len(t) > 600][:o.tales]
    prompts = [line["ids"][:o.prompt] for line in program.jsonl("tokenize", o.tiny, [{"text": t[:4000]} for t in tales])]

    def written(ids, draft, drafter, temperature, seed):
        out = program.run("generate", o.tiny, "-", "--ids", "--json", "-n", o.n, "--ignore-eos", "--temp", temperature,
                          "--top-p", 1, "--top-k", 0, "--seed", seed, "--draft", draft, "--drafter", drafter, "--threads", 1,
                          input=" ".join(map(str, ids)).encode())
        lines = [json.loads(line) for line in out.decode().split("\n") if line]
        return [line["id"] for line in lines[:-1]], lines[-1]["stats"]

    print(f"{len(prompts)} held-out tales, {o.prompt} tokens given, {o.n} written\n")
    print("| drafter | temperature | guesses at once | right | tokens a pass | bound for one guess |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for drafter in ("mtp", "lookup"):
        for temperature in (0, 0.8):
            bound = "-"
            if drafter == "mtp":
                overlap = []
                for i, ids in enumerate(prompts):
                    text = ids + written(ids, 0, drafter, temperature, i)[0]
                    paths = [os.path.join(o.work, name) for name in ("logits.f32", "mtp.f32")]
                    program.run("logits", o.tiny, "--ids", program._ids_file(text), "--out", paths[0], "--mtp", paths[1])
                    p, q = (np.frombuffer(read_bytes(path), "<f4").reshape(len(text), -1)[o.prompt - 1:-1] for path in paths)
                    q = q[:, :config["vocab_size"]]
                    if temperature:
                        overlap.append(np.minimum(softmax(p, temperature), softmax(q, temperature)).sum(-1))
                    else:
                        overlap.append((p.argmax(-1) == q.argmax(-1)).astype(float))
                bound = f"{np.concatenate(overlap).mean():.2f}"
            for draft in (1, 2, 4):
                drafted = accepted = tokens = 0
                for i, ids in enumerate(prompts):
                    text, stats = written(ids, draft, drafter, temperature, i)
                    drafted, accepted = drafted + stats["drafted"], accepted + stats["accepted"]
                    tokens += len(text)
                right = f"{accepted / drafted:.2f}" if drafted else "-"
                print(f"| {drafter} | {temperature} | {draft} | {right} | {tokens / (tokens - accepted):.2f} | "
                      f"{bound if draft == 1 else ''} |", flush=True)


if __name__ == "__main__":
    main()
