"""One checkpoint: find weights and a prompt that live, write it, ask both sides, compare."""

import os
from dataclasses import dataclass, field

import numpy as np
import torch

import checkpoints
import reference
from program import ProgramError

TOLERANCE = 2e-5           # max |difference| / max |logit|, f32 against f32
MARGIN_COMPARED = 1e-5     # experts must agree wherever the reference's own margin is larger
MARGIN_ALLOWED = 2e-5      # a draw with any smaller routing margin is drawn again
MARGIN_WANTED = 1e-4
GAP_ALLOWED = 1e-4         # the same for the top-1/top-2 gap of each greedy step
GAP_WANTED = 5e-4
F64_FACTOR = 2.0           # our error against f64 may be this many times torch's own
ATTEMPTS = 24


# ---------------------------------------------------------------- does a draw live?

@dataclass
class Life:
    """What the recipe asks of a draw before a comparison on it means anything."""
    entropy: tuple = (0, 0, 0)     # attention entropy / ln(keys): 10 %, 50 %, 90 %
    used: float = 1.0              # share of the experts that some token chose
    bias: float = 1.0              # tokens whose experts the bias changes
    groups: float = 1.0            # tokens whose experts the group limit changes
    spread: float = 0.0            # standard deviation of the logits
    margin: float = float("inf")   # smallest routing margin, prompt and continuation
    gap: float = float("inf")      # smallest top-1/top-2 gap of the continuation
    distinct: int = 0              # different ids in the continuation's second half
    seed: int = 0

    def possible(self):
        return self.margin >= MARGIN_ALLOWED and self.gap >= GAP_ALLOWED

    def complaints(self, spec, picks):
        experts = spec.config["n_routed_experts"]
        out = []
        if not 0.4 <= self.entropy[1] <= 0.85:
            out.append(f"median attention entropy {self.entropy[1]:.2f}")
        if self.used < (1.0 if picks >= 9 * experts else 0.15):
            out.append(f"experts used {self.used:.0%}")
        if self.bias < 0.1:
            out.append(f"bias matters for {self.bias:.0%}")
        if self.groups < 0.1:
            out.append(f"groups matter for {self.groups:.0%}")
        if not 0.5 <= self.spread <= 5:
            out.append(f"logit deviation {self.spread:.2f}")
        if self.margin < MARGIN_WANTED:
            out.append(f"routing margin {self.margin:.1e}")
        if self.gap < GAP_WANTED:
            out.append(f"greedy gap {self.gap:.1e}")
        if self.distinct < 4:
            out.append("continuation loops")
        return out


def choose(gate, scores, limit):
    """Expert sets [n, K] for these choice scores, with or without the group limit."""
    if limit:
        n = scores.shape[0]
        members = scores.view(n, gate.num_group, -1)
        best = members.topk(2, -1).values.sum(-1) if hasattr(gate, "e_score_correction_bias") else members.amax(-1)
        keep = torch.zeros_like(best).scatter_(1, best.topk(gate.topk_group, -1).indices, 1).bool()
        scores = members.masked_fill(~keep.unsqueeze(-1), float("-inf")).view(n, -1)
    return scores.topk(gate.top_k, -1).indices.sort(-1).values


def life_of_routing(life, model, logits):
    changed_by_bias, changed_by_groups, used, total = [], [], 0, 0
    gates = [l.mlp.gate for l in model.model.layers if hasattr(l.mlp, "gate")]
    for gate, z in zip(gates, logits):
        limit, scores = reference.grouped(gate), reference.choice_scores(gate, z)
        chosen = choose(gate, scores, limit)
        used += len(chosen.unique())
        total += z.shape[1]
        if hasattr(gate, "e_score_correction_bias"):
            changed_by_bias.append((choose(gate, z.sigmoid(), limit) != chosen).any(-1).double().mean().item())
        if limit:
            changed_by_groups.append((choose(gate, scores, False) != chosen).any(-1).double().mean().item())
    if gates:
        life.used = used / total
    if changed_by_bias:
        life.bias = min(changed_by_bias)
    if changed_by_groups:
        life.groups = min(changed_by_groups)


def entropy_quantiles(maps):
    shares = []
    for p in maps:                                       # [1, heads, queries, keys] of one layer
        p = p[0].double()[:, 1:]
        h = -(p * p.clamp_min(1e-300).log()).sum(-1)
        shares.append((h / torch.arange(2, p.shape[1] + 2).double().log()).flatten())
    return tuple(torch.quantile(torch.cat(shares), torch.tensor([0.1, 0.5, 0.9]).double()).tolist())


@dataclass
class Found:
    """A draw, its checkpoint directory, and all that the reference says about it."""
    spec: object
    directory: str
    ids: list
    logits: np.ndarray             # [n, V] f32
    experts: np.ndarray            # [n, layers, K], or None
    margins: np.ndarray            # [n, layers]: the smaller of both margins
    text: list                     # greedy continuation
    life: Life
    complaints: list
    attempts: int
    weights_seed: int
    model: object = field(repr=False, default=None)


def find(spec, work):
    """Draws weights and prompts until one lives; the best possible one if none satisfies every wish."""
    torch.set_num_threads(2 if spec.config["hidden_size"] >= 2048 else 1)
    directory = os.path.join(work, spec.name)
    best, model, drawn, attempts = None, None, None, 4 if spec.heavy else ATTEMPTS
    for attempt in range(attempts):
        seed = 0 if spec.heavy else attempt // 4
        if seed != drawn:
            checkpoints.write(spec, checkpoints.draw(spec, seed), directory)
            model, drawn = reference.load(directory), seed
        ids = checkpoints.prompt(spec, attempt)
        logits, experts, margins, maps = reference.forward(model, ids, spec.chunk, attentions=not spec.chunk)
        if margins is not None and margins.min() < MARGIN_ALLOWED:
            continue
        text, gaps, later = reference.greedy(model, ids, spec.steps, spec.chunk)
        life = Life(seed=attempt, spread=float(logits.std()), gap=min(gaps), distinct=len(set(text[len(text) // 2:])))
        if margins is not None:
            life.margin = float(min(margins.min(), later.min()))
            with reference.Routing(model) as routing, torch.no_grad():
                model(input_ids=torch.tensor([ids]), use_cache=False)
            life_of_routing(life, model, [torch.cat(z) for z in routing.logits])
        life.entropy = entropy_quantiles(maps) if maps else (0.5, 0.5, 0.5)
        if not life.possible() or checkpoints.EOS in text:
            continue
        picks = len(ids) * spec.config["num_experts_per_tok"]
        complaints = life.complaints(spec, picks)
        if best is None or len(complaints) < len(best.complaints):
            best = Found(spec, directory, ids, logits, experts, None if margins is None else margins.min(-1), text, life,
                         complaints, attempt + 1, seed)
        if not complaints:
            break
    if best is None:
        raise RuntimeError(f"{spec.name}: no draw out of {attempts} has the margins")
    if best.weights_seed != drawn:
        checkpoints.write(spec, checkpoints.draw(spec, best.weights_seed), directory)
        model = reference.load(directory)
    best.model = model
    return best


# ---------------------------------------------------------------- compare

def distance(a, b):
    """max |a - b| / max |b|; infinite where a is not a number."""
    if not np.isfinite(a).all():
        return float("inf")
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def locate(a, b):
    """Where two logits arrays part first: for a message."""
    per_row = np.abs(a.astype(np.float64) - b).max(-1) / np.abs(b).max()
    bad = np.flatnonzero(~(per_row <= TOLERANCE))
    return f"first row beyond the tolerance {bad[0]} of {len(per_row)}, {len(bad)} such rows" if len(bad) else ""


def checkpoint_row(found, program, report):
    """Runs every check of one checkpoint; returns the table row and the program's logits (None on an error)."""
    spec, name = found.spec, found.spec.name
    moe_layers = 0 if found.experts is None else found.experts.shape[1]
    row = {"checkpoint": name, "about": spec.about, "stored": spec.dtype, "positions": len(found.ids),
           "seed": found.life.seed, "error": None, "experts": "-", "greedy": "-", "torch_f64": None, "ours_f64": None,
           "margin": found.life.margin, "wishes": found.complaints}
    try:
        ours, experts, _ = program.logits(found.directory, found.ids, spec.config["vocab_size"], moe_layers,
                                          spec.config["num_experts_per_tok"])
    except ProgramError as e:
        report.fail(f"{name}: logits", str(e))
        return row, None

    row["error"] = distance(ours, found.logits)
    report.check(f"{name}: logits", row["error"] <= TOLERANCE,
                 f"{row['error']:.2e} > {TOLERANCE:.0e}; {locate(ours, found.logits)}")

    if len(found.ids) >= 64:                            # prompts so long may have keys and values written out
        expanded, _, _ = program.logits(found.directory, found.ids, spec.config["vocab_size"], expand=True)
        error = distance(expanded, found.logits)
        report.check(f"{name}: logits, expanded", error <= TOLERANCE and (expanded != ours).any(),
                     f"{error:.2e} > {TOLERANCE:.0e}, or the same bits; {locate(expanded, found.logits)}")

    if moe_layers:
        compared = found.margins > MARGIN_COMPARED
        same = (np.sort(experts, -1) == found.experts).all(-1)
        wrong = np.argwhere(~same & compared)
        row["experts"] = f"{int((same & compared).sum())}/{int(compared.sum())}"
        detail = ""
        if len(wrong):
            t, layer = wrong[0]
            detail = (f"position {t}, MoE layer {layer}: {sorted(experts[t, layer].tolist())}, reference "
                      f"{found.experts[t, layer].tolist()}, margin {found.margins[t, layer]:.1e}")
        report.check(f"{name}: experts", not len(wrong), detail)

    how = {"t1": "argument", "t1q": "stdin"}.get(name, "file")
    try:
        text = program.greedy(found.directory, found.ids, spec.steps, how)
        equal = next((i for i, (a, b) in enumerate(zip(text, found.text)) if a != b), min(len(text), len(found.text)))
        row["greedy"] = f"{equal}/{spec.steps}"
        report.check(f"{name}: greedy", text == found.text, f"equal for {equal} of {spec.steps}, got {len(text)} ids")
    except (ProgramError, ValueError, KeyError) as e:
        report.fail(f"{name}: greedy", str(e))

    if spec.f64:
        truth = f64_logits(found)
        row["torch_f64"], row["ours_f64"] = distance(found.logits, truth), distance(ours, truth)
        report.check(f"{name}: f64", row["ours_f64"] <= F64_FACTOR * row["torch_f64"],
                     f"{row['ours_f64']:.2e} from f64, torch f32 is {row['torch_f64']:.2e} from it")
    return row, ours


def f64_logits(found):
    """The reference's logits in f64. The model becomes the f64 one."""
    found.model = reference.to_double(found.model)
    with reference.InDouble():
        logits, *_ = reference.forward(found.model, found.ids, found.spec.chunk)
    assert logits.dtype == np.float64
    return logits


def dtype_label(row):
    return {"bf16": "BF16", "f16": "F16", "f32": "F32", "fp8": "FP8"}[row["stored"]]


# ---------------------------------------------------------------- same bits

def same_bits(program, found, ids, isas, report, rows=(1, 7, 512), threads=(1, 2, 3, 8)):
    """Byte-identical files whatever the rows at a time, the threads, and (see the README) the ISA."""
    spec = found.spec
    moe_layers = 0 if found.experts is None else found.experts.shape[1]
    args = (found.directory, ids, spec.config["vocab_size"], moe_layers, spec.config["num_experts_per_tok"])
    out, across = [], {}
    for isa in isas:
        cases = [("rows", dict(rows=r, threads=1)) for r in rows] + [("threads", dict(threads=t)) for t in threads]
        cases += [("both", dict(rows=7, threads=3))]
        first, equal = None, 0
        try:
            for kind, case in cases:
                _, _, raw = program.logits(*args, isa=isa, **case)
                if first is None:
                    first, across[isa] = raw, raw
                equal += raw == first
                report.check(f"same bits: {spec.name} {isa} " + " ".join(f"{k} {v}" for k, v in case.items()),
                             raw == first, "differs from rows 1, threads 1")
            part = len(ids) // 3
            start, _, _ = program.logits(args[0], ids[:part], *args[2:], isa=isa, rows=512)
            report.check(f"same bits: {spec.name} {isa} first {part} tokens alone", first.startswith(start.tobytes()),
                         "differs from the run of all tokens")
            out.append({"checkpoint": spec.name, "positions": len(ids), "isa": isa, "equal": f"{equal}/{len(cases)}"})
        except ProgramError as e:
            report.fail(f"same bits: {spec.name} {isa}", str(e))
    for isa in isas[1:]:
        if isa in across and "scalar" in across:
            report.check(f"same bits: {spec.name} {isa} = scalar", across[isa] == across["scalar"],
                         "the two ISAs write different files")
    return out
