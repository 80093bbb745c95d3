"""Number formats of the cache against f32: what they do to the distribution of the next token.

  tiny       examples/tiny on 1,024 tokens of its tales
  v3-widths  random weights with V3's widths of the cache (512 and 64, heads of 128 and 64), 1,024 and 8,192 tokens

Weights and arithmetic are the same in each run (f32); only the rows of the cache differ. KL is that of the distribution
behind each token from the one with a cache of f32, in nats. The random model is the harder case: its logits are as
uncertain as its experts, and a row that changes an expert shows in all of them.
"""

import os

import numpy as np
import torch
import tokenizers

import checkpoints
import reference

TYPES = (("bf16", "f32"), ("bf16", "bf16"), ("i8", "f32"), ("i8", "bf16"), ("i8", "i8"))
MOST = {"tiny": {"bf16": 2e-3, "i8": 2e-2}, "v3-widths": {"bf16": 2e-2, "i8": 5e-2}}   # mean KL


def spec():
    config = checkpoints.v3(hidden_size=256, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
                            num_attention_heads=2, q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=128,
                            qk_rope_head_dim=64, v_head_dim=128, vocab_size=256, max_position_embeddings=16384,
                            rope_scaling=checkpoints.yarn(factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0))
    return checkpoints.Spec("v3-widths", "V3's cache row", config)


def log_softmax(x):
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare(program, directory, ids, vocab, name, report, types=TYPES):
    def run(*cache):
        out = os.path.join(program.work, "cache.f32")
        path = program._ids_file(ids)
        options = ["--cache", cache[0], "--cache-rope", cache[1]] if cache else []
        program.run("logits", directory, "--ids", path, "--out", out, "--compute", "f32", *options)
        return log_softmax(np.fromfile(out, dtype="<f4").reshape(len(ids), vocab))

    exact, rows = run(), []
    for latent, rope in types:
        other = run(latent, rope)
        kl = (np.exp(exact) * (exact - other)).sum(-1)
        same = float((exact.argmax(-1) == other.argmax(-1)).mean())
        row = {"model": name, "tokens": len(ids), "latent": latent, "rope": rope, "kl": float(kl.mean()),
               "kl99": float(np.quantile(kl, 0.99)), "most": float(kl.max()), "same": same}
        rows.append(row)
        report.check(f"cache: {name}, {len(ids)} tokens, {latent} and {rope}", 0 < row["kl"] < MOST[name][latent],
                     f"mean KL {row['kl']:.1e}")
    return rows


def check(tiny, corpus, work, program, report, quick=False):
    rows = []
    if not os.path.exists(os.path.join(corpus, "tales.txt")) or not os.path.exists(os.path.join(tiny, "model.safetensors")):
        report.skip("cache: tiny", f"no {corpus}/tales.txt, or no model in {tiny}")
    else:
        wheel = tokenizers.Tokenizer.from_file(os.path.join(tiny, "tokenizer.json"))
        with open(os.path.join(corpus, "tales.txt"), encoding="utf-8") as f:
            ids = wheel.encode(f.read(40000)[20000:], add_special_tokens=False).ids[:1024]
        rows += compare(program, tiny, ids, reference.read_config(tiny)["vocab_size"], "tiny", report)
    s = spec()
    directory = os.path.join(work, "v3-widths")
    checkpoints.write(s, checkpoints.draw(s, 1), directory)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, s.config["vocab_size"], (8192,), generator=generator).tolist()
    rows += compare(program, directory, ids[:1024], s.config["vocab_size"], "v3-widths", report)
    if not quick:
        rows += compare(program, directory, ids, s.config["vocab_size"], "v3-widths", report, TYPES[1:4:2])
    return rows


if __name__ == "__main__":
    import sys

    import report as reports
    from program import Program

    r = reports.Report()
    os.makedirs(sys.argv[2], exist_ok=True)
    for row in check("examples/tiny", "../shared/corpus", sys.argv[2], Program(sys.argv[1], sys.argv[2]), r):
        print(row)
    print(r.last_line())
