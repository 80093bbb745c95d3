"""The layers of multi-token prediction against a step written over transformers' own decoder layer.

transformers leaves these layers out, so the step is stated here, from the DeepSeek-V3 paper (2.2) and the code of vLLM
(deepseek_mtp.py) and SGLang (deepseek_nextn.py); nothing is shared with the program:

  layer k, row i:  u = eh_proj [ RMSNorm(Emb(t_(i+k+1)); enorm) ; RMSNorm(h_i; hnorm) ]      embedding first
                   x = DecoderLayer(u), causal over the layer's own rows, rotary position i
                   m = RMSNorm(x; shared_head.norm), logits of token i + k + 2 = head m
  h of layer 0 is the main model's state after model.norm, of layer k the m of layer k - 1.
  Beyond the last layer, it goes on by itself: row i + 1 takes its own m_i and the token it guessed.

Checked: logits of every row within the tolerance (max |difference| / max |logit|), and, greedily, the ids that recursive
drafting guesses, from the program's own count of what was accepted.
"""

import json
import os
import time

import numpy as np
import torch
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import checkpoints
import compare
import reference
from program import read_bytes

STEPS = 32                 # greedy tokens of the recursive test
LIVE = 6                   # ids that are ever picked: the fewer, the more guesses are right
DEPTH = 4                  # guesses at once


def few_ids(name, w, config):
    """Random layers never guess right among many ids: all but a few get small logits, and what is guessed shows."""
    if name.endswith(("lm_head.weight", "shared_head.head.weight")):
        w[:checkpoints.FIRST_PROMPT_ID] *= 0.05
        w[checkpoints.FIRST_PROMPT_ID + LIVE:] *= 0.05


def few_tied(name, w, config):
    checkpoints.embedding_as_head(name, w, config)
    if name == "model.embed_tokens.weight":
        w[checkpoints.FIRST_PROMPT_ID + LIVE:] *= 0.2


def specs():
    fp8, plain = checkpoints.fp8, dict(rope_scaling=checkpoints.DROP)

    def make(*args, tweak=few_ids, **more):
        return checkpoints.Spec(*args, tweak=tweak, **more)

    return [
        make("mtp-1", "one layer, BF16", checkpoints.v3(num_nextn_predict_layers=1), junk=("mtp",)),
        make("mtp-2", "two layers", checkpoints.v3(num_nextn_predict_layers=2), junk=("mtp",)),
        make("mtp-shared", "embedding and head of the model", checkpoints.v3(num_nextn_predict_layers=1), junk=("mtp", "shared")),
        make("mtp-plain", "plain RoPE, half-split, no query latent",
             checkpoints.v3(num_nextn_predict_layers=2, q_lora_rank=None, rope_interleave=False, **plain), junk=("mtp", "shared")),
        make("mtp-dense", "a dense prediction layer", checkpoints.v3(num_nextn_predict_layers=1, n_group=1, topk_group=1),
             junk=("mtp-dense",)),
        make("mtp-tied", "tied embeddings, F32 file",
             checkpoints.v3(num_nextn_predict_layers=1, tie_word_embeddings=True, torch_dtype="float32"), dtype="f32",
             tweak=few_tied, junk=("mtp", "shared")),
        make("mtp-fp8", "FP8, one layer, as V3 stores it", fp8(num_nextn_predict_layers=1), dtype="fp8", junk=("mtp",)),
        make("mtp-fp8-2", "FP8, ue8m0, two layers",
             fp8(num_nextn_predict_layers=2, quantization_config=dict(checkpoints.FP8_CONFIG, scale_fmt="ue8m0")), dtype="fp8",
             scales="ue8m0", shards=3, junk=("mtp",)),
        make("mtp-odd", "FP8, odd widths, nothing aligned",
             fp8(num_nextn_predict_layers=2, hidden_size=149, intermediate_size=263, moe_intermediate_size=65, q_lora_rank=131,
                 kv_lora_rank=75, qk_nope_head_dim=21, qk_rope_head_dim=14, v_head_dim=37, num_attention_heads=3),
             dtype="fp8", odd=True, junk=("mtp", "shared")),
    ]


class Layer:
    """One prediction layer: transformers' decoder layer and what stands around it."""

    def __init__(self, model, weights, k):
        config, at = model.config, f"model.layers.{model.config.num_hidden_layers + k}."
        mine = {n[len(at):]: w for n, w in weights.items() if n.startswith(at)}
        sparse = "mlp.gate.weight" in mine
        self.model, self.eps = model, config.rms_norm_eps
        index = config.first_k_dense_replace if sparse else 0
        assert sparse or config.first_k_dense_replace > 0
        with torch.device("meta"):
            self.block = v3.DeepseekV3DecoderLayer(config, index)
        self.block.self_attn.layer_idx = 0
        for name, target in [*self.block.named_parameters(), *self.block.named_buffers()]:
            head, _, leaf = name.rpartition(".")
            module = self.block.get_submodule(head)
            if head.endswith("mlp.experts"):
                parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
                value = torch.stack([mine[f"{head}.{e}.{part}.weight"] for e in range(target.shape[0]) for part in parts])
                value = value.view(target.shape)
            else:
                value = mine[name]
            if leaf in module._parameters:
                module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
        self.block.eval()
        self.enorm, self.hnorm, self.eh, self.norm = (mine[n + ".weight"] for n in ("enorm", "hnorm", "eh_proj", "shared_head.norm"))
        self.embed = mine.get("embed_tokens.weight", model.model.embed_tokens.weight)
        self.head = mine.get("shared_head.head.weight", model.lm_head.weight)

    def rms(self, x, w):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def __call__(self, states, tokens):
        """states [n, D] of rows 0 ... n - 1, tokens [n] that join them -> (m [n, D], logits [n, V])."""
        n = len(tokens)
        u = torch.cat((self.rms(self.embed[tokens], self.enorm), self.rms(states, self.hnorm)), -1) @ self.eh.T
        positions = torch.arange(n)[None]
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        rope = self.model.model.rotary_emb(u[None], positions)
        x = self.block(u[None], attention_mask=mask, position_ids=positions, position_embeddings=rope)
        m = self.rms((x[0] if isinstance(x, tuple) else x)[0], self.norm)
        return m, m @ self.head.T


class Predictor:
    def __init__(self, directory):
        config = reference.read_config(directory)
        weights = reference.read_weights(directory)
        self.n = config["num_nextn_predict_layers"]
        base = {n: w for n, w in weights.items()
                if not any(n.startswith(f"model.layers.{config['num_hidden_layers'] + k}.") for k in range(self.n))}
        self.model = reference.build(config, base)
        self.layers = [Layer(self.model, weights, k) for k in range(self.n)]

    @torch.no_grad()
    def states(self, ids):
        return self.model.model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]

    @torch.no_grad()
    def main(self, ids):
        return self.model.lm_head(self.states(ids))

    @torch.no_grad()
    def rows(self, ids):
        """[n, layers, V]: of token p, layer k's row p - 1 - k, which guesses what follows p; zeros where there is none."""
        below = self.states(ids)
        tokens = torch.tensor(ids)
        out = torch.zeros(len(ids), self.n, self.model.config.vocab_size)
        for k, layer in enumerate(self.layers):
            n = len(ids) - 1 - k
            if n < 1:
                break
            below, logits = layer(below[:n], tokens[k + 1:])
            out[k + 1:, k] = logits
        return out

    @torch.no_grad()
    def guess(self, states, ids, depth):
        """Greedy guesses behind ids, the last of which the main model has not seen (states: of all others): [depth] ids.

        Every layer is run anew for each guess, over all rows: slow, and plain to see."""
        ids, own, guesses = list(ids), [], []
        last = len(self.layers) - 1
        for j in range(depth):
            below = states
            k = 0
            while True:
                # Layer k: a row for each state below it that has a token k + 1 behind it.
                rows = min(len(below), len(ids) - 1 - k)
                m, logits = self.layers[k](below[:rows], torch.tensor(ids[k + 1:k + 1 + rows]))
                if k == last or rows + k + 1 == len(ids) and k == min(j, last):
                    break
                below, k = m, k + 1
            # The last layer goes on by itself: the state below its next row is its own.
            if k == last and j > last:
                below = torch.cat((below, torch.stack(own)))
                m, logits = self.layers[k](below, torch.tensor(ids[k + 1:k + 1 + len(below)]))
            if k == last:
                own.append(m[-1])
            guesses.append(int(logits[-1].argmax()))
            ids.append(guesses[-1])
        return guesses


def drafted(program, directory, ids, depth):
    """Ids and stats of a greedy run of the program with `depth` guesses at once."""
    text = " ".join(map(str, ids)).encode()
    out = program.run("generate", directory, "-", "--ids", "--greedy", "-n", STEPS, "--json", "--compute", "f32", "--ignore-eos",
                      "--threads", 1, "--draft", depth, "--drafter", "mtp", input=text)
    lines = [json.loads(line) for line in out.decode().split("\n") if line]
    return [line["id"] for line in lines[:-1]], lines[-1]["stats"]


def simulate(predictor, ids, written, depth):
    """(guessed, right) of a greedy run that writes `written`, by the reference's guesses."""
    text, n, total, right = list(ids) + written, len(ids) + 1, 0, 0
    states = predictor.states(text)                    # causal: those of a beginning are its own
    while n < len(text):                               # token n - 1 is written, not yet run
        k = min(depth, len(text) - n - 1)
        guesses = predictor.guess(states[:n - 1], text[:n], k) if k > 0 and n > predictor.n else []
        held = 0
        while held < len(guesses) and guesses[held] == text[n + held]:
            held += 1
        total, right = total + len(guesses), right + held
        n += held + 1
    return total, right


def check(work, program, report):
    rows = []
    for spec in specs():
        start = time.time()
        directory = os.path.join(work, spec.name)
        ids = checkpoints.prompt(spec, 0)
        for seed in range(8):                          # a draw whose routing is nowhere a near tie
            checkpoints.write(spec, checkpoints.draw(spec, seed), directory)
            predictor = Predictor(directory)
            margins = []
            hooks = [layer.block.mlp.gate.register_forward_hook(
                lambda m, a, o: margins.append(reference.router_margins(m, o[0].double(), predictor.model.config).min().item()))
                for layer in predictor.layers if hasattr(layer.block.mlp, "gate")]
            want = predictor.rows(ids).numpy()
            for hook in hooks:
                hook.remove()
            if min(margins, default=1) > compare.MARGIN_ALLOWED:
                break
        worst = 0
        for batch in (None, 1, 7):
            path = os.path.join(work, "mtp.f32")
            args = [] if batch is None else ["--rows", batch]
            program.run("logits", directory, "--ids", program._ids_file(ids), "--out", os.path.join(work, "logits.f32"),
                        "--mtp", path, "--compute", "f32", "--threads", 1, *args)
            ours = np.frombuffer(read_bytes(path), "<f4").reshape(want.shape)
            worst = max(worst, compare.distance(ours, want))
        report.check(f"{spec.name}: prediction logits", worst <= compare.TOLERANCE, f"{worst:.1e}")
        written, stats = drafted(program, directory, ids, DEPTH)
        plain, _ = drafted(program, directory, ids, 0)
        report.check(f"{spec.name}: the same text", written == plain)
        total, right = simulate(predictor, ids, written, DEPTH)
        same = (stats["drafted"], stats["accepted"]) == (total, right)
        report.check(f"{spec.name}: guesses", same, f"{stats['accepted']}/{stats['drafted']}, reference {right}/{total}")
        rows.append({"checkpoint": spec.name, "about": spec.about, "stored": spec.dtype, "layers": predictor.n,
                     "rows": len(ids), "error": worst, "margin": min(margins, default=None),
                     "guesses": f"{stats['accepted']}/{stats['drafted']}", "reference": f"{right}/{total}",
                     "seconds": time.time() - start})
    return rows
