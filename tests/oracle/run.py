#!/usr/bin/env python3
"""The oracle: this library against Hugging Face transformers, on checkpoints written on the fly.

  run.py --dsv3 build/dsv3 --work build/oracle [--shared ../shared]

Sections, any of which --only names (so does the name of a checkpoint):
  self            the oracle's own parts against each other; needs no program
  checkpoints     logits, experts, greedy text and f64 error of every checkpoint
  bits            the same bytes for every number of rows and threads, and for every ISA
  mutations       wrong models must be far away
  transcription   DeepSeek's own code, choice by choice
  quantize        dsv3 quantize, read back by compressed-tensors and transformers
  tiny            examples/tiny
  drafts          layers of multi-token prediction, and what they guess one after the other
  matmul          one product in each arithmetic mode against the published arithmetic
  fidelity        what the modes cost: end to end, on held-out text, at V3's widths
  schema          constrained output: the public JSON Schema suite, sampled texts, beside llguidance
  tokenizer       random texts against the tokenizers wheel
  speed           encoding speed beside the wheel's

Progress goes to stderr, tables to stdout; the last line counts. Exit status 1 if anything failed.
"""

import argparse
import json
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")    # torch's threads must not spin where others want the cores

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)

import tokenizer_oracle                                # noqa: E402  (sets the wheel to one thread)
import numpy as np                                     # noqa: E402
import safetensors                                     # noqa: E402
import tokenizers                                      # noqa: E402
import torch                                           # noqa: E402
import transformers                                    # noqa: E402

import cache                                           # noqa: E402
import chat                                            # noqa: E402
import checkpoints                                     # noqa: E402
import compare                                         # noqa: E402
import fidelity                                        # noqa: E402
import kimi                                            # noqa: E402
import matmul_modes                                    # noqa: E402
import mtp                                             # noqa: E402
import mutations                                       # noqa: E402
import quantize                                        # noqa: E402
import reference                                       # noqa: E402
import schema                                          # noqa: E402
import tiny                                            # noqa: E402
import transcription                                   # noqa: E402
from program import Program, ProgramError, cpu_isas    # noqa: E402
from report import Report, number, table               # noqa: E402

SECTIONS = ("self", "checkpoints", "bits", "mutations", "transcription", "quantize", "tiny", "matmul", "fidelity",
            "drafts", "tokenizer", "kimi", "chat", "cache", "schema", "speed")
QUICK = ("t1", "t1x", "t1e", "t1h", "odd", "mtp", "widths", "v2-lite", "v2-groups", "kimi-k2-thinking", "moonlight",
         "gigachat3", "fp8", "fp8-ragged", "fp8-shards", "far")
BITS = (("t1", 200), ("moonlight", 600), ("v2-groups", 150), ("fp8-ragged", 530), ("fp8-odd", 150))
TRANSCRIBED = ("t1", "v2-lite", "fp8", "fp8-ue8m0")
MUTATION_FACTOR = 100


class Run:
    def __init__(self, options):
        self.o, self.report, self.found, self.logits, self.out = options, Report(), {}, {}, {}
        self.specs = {s.name: s for s in checkpoints.specs()}
        self.program = None if options.self_only else Program(options.dsv3, options.work)

    def wanted(self, section):
        if self.o.self_only and section in ("bits", "quantize", "tiny", "matmul", "fidelity", "drafts", "tokenizer", "kimi",
                                             "chat", "cache", "schema", "speed"):
            return False
        return not self.o.only or self.o.only == section

    def draw(self, name):
        """The accepted draw of a checkpoint, found once. Its model is dropped after use: see load()."""
        if name not in self.found:
            self.found[name] = compare.find(self.specs[name], self.o.work)
        return self.found[name]

    def ours(self, name):
        """The program's logits on a checkpoint's prompt (with --self: the reference's own)."""
        found = self.draw(name)
        if name not in self.logits:
            if self.program is None:
                self.logits[name] = found.logits
            else:
                self.logits[name] = self.program.logits(found.directory, found.ids, found.spec.config["vocab_size"])[0]
        return self.logits[name]

    # ------------------------------------------------------------ sections

    def self_checks(self, names):
        """Two readers of one file, two routers, two f64 models: the oracle must agree with itself."""
        def among(*some):
            return [name for name in some if name in names]

        matmul_modes.self_check(self.report)
        for name in among("t1", "v2-lite", "kimi-k2", "tied"):
            found = self.draw(name)
            kind = "deepseek_v2" if found.spec.config["model_type"] == "deepseek_v2" else "deepseek_v3"
            edited = os.path.join(self.o.work, "from_pretrained")
            os.makedirs(edited, exist_ok=True)
            for file in os.listdir(edited):
                os.remove(os.path.join(edited, file))
            for file in os.listdir(found.directory):
                os.symlink(os.path.abspath(os.path.join(found.directory, file)), os.path.join(edited, file))
            os.remove(os.path.join(edited, "config.json"))
            with open(os.path.join(edited, "config.json"), "w") as f:
                json.dump({**found.spec.config, "model_type": kind}, f)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                edited, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
            logits, *_ = reference.forward(model, found.ids)
            self.report.check(f"self: {name} from_pretrained", (logits == found.logits).all(),
                              f"{compare.distance(logits, found.logits):.1e} from the model filled by name")
        for name in among("t1", "t1u", "t1x", "v2-lite", "v2-groups"):
            found = self.draw(name)
            model = reference.load(found.directory)
            for moe in mutations.sparse(model):
                mutations.router()(moe, found.spec.config)
            logits, *_ = reference.forward(model, found.ids)
            self.report.check(f"self: {name} rewritten router", compare.distance(logits, found.logits) < 2e-6,
                              f"{compare.distance(logits, found.logits):.1e}")
        for name in among("t1", "v2-lite", "v2-groups", "fp8"):
            found = self.draw(name)
            model = reference.load(found.directory)
            frequencies = model.model.rotary_emb.inv_freq.clone()
            with reference.InDouble():
                truth, *_ = reference.forward(reference.to_double(model), found.ids)
            config, stored = reference.read_config(found.directory), reference.read_tensors(found.directory)
            for attention in ("naive", "absorb"):
                choices = transcription.Choices(dtype=torch.float64, attention=attention, router="f32", gemm="exact",
                                                eps=config["rms_norm_eps"], frequencies=frequencies)
                error = compare.distance(transcription.Official(config, stored, choices)(found.ids).numpy(), truth)
                self.report.check(f"self: {name} f64, transformers = transcription, {attention}", error < 1e-12, f"{error:.1e}")

    def checkpoint_table(self, names):
        rows = []
        for name in names:
            start = time.time()
            try:
                found = self.draw(name)
            except RuntimeError as e:
                self.report.fail(name, str(e))
                continue
            if self.program is None:
                row, ours = self.row_without_program(found), found.logits
            else:
                row, ours = compare.checkpoint_row(found, self.program, self.report)
            found.model = None
            if ours is not None:
                self.logits[name] = ours
            row["seconds"] = time.time() - start
            rows.append(row)
            self.report.say(f"{name}: error {number(row['error'])}, experts {row['experts']}, greedy {row['greedy']}, "
                            f"{found.attempts} draws, {row['seconds']:.1f} s")
        self.out["checkpoints"] = rows
        return rows

    def row_without_program(self, found):
        row = {"checkpoint": found.spec.name, "about": found.spec.about, "stored": found.spec.dtype,
               "positions": len(found.ids), "seed": found.life.seed, "error": None, "experts": "-", "greedy": "-",
               "torch_f64": None, "ours_f64": None, "margin": found.life.margin, "wishes": found.complaints}
        if found.spec.f64:
            row["torch_f64"] = compare.distance(found.logits, compare.f64_logits(found))
        self.report.check(f"{found.spec.name}: the draw lives", not found.complaints or found.life.possible(),
                          ", ".join(found.complaints))
        return row

    def bits(self, names):
        isas, rows = cpu_isas(), []
        for isa in ("avx2", "avx-vnni", "avx512", "avx512-vnni", "avx512-bf16", "avx512-amx"):
            if isa not in isas:
                self.report.skip(f"same bits: {isa}", "this CPU does not have it")
        for name, length in BITS:
            if name not in names:
                continue
            found = self.draw(name)
            generator = torch.Generator().manual_seed(length)
            ids = torch.randint(checkpoints.FIRST_PROMPT_ID, found.spec.config["vocab_size"], (length,),
                                generator=generator).tolist()
            rows += compare.same_bits(self.program, found, ids, isas, self.report)
            self.report.say(f"same bits: {name} done")
        self.out["bits"] = rows

    def mutation_table(self, names):
        rows, limit = [], MUTATION_FACTOR * compare.TOLERANCE
        for m in mutations.mutations():
            if m.checkpoint not in names:
                continue
            try:
                ours = self.ours(m.checkpoint)
            except (ProgramError, RuntimeError) as e:
                self.report.fail(f"mutation: {m.label}", str(e))
                continue
            found = self.draw(m.checkpoint)
            logits, *_ = reference.forward(mutations.mutate(m, found.directory), found.ids)
            error = compare.distance(logits, ours)
            if not m.informative:
                self.report.check(f"mutation: {m.label} ({m.checkpoint})", error >= limit, f"only {error:.1e}")
            rows.append({"mutation": m.label, "checkpoint": m.checkpoint, "error": error,
                         "verdict": "shown only" if m.informative else "fails, as it must" if error >= limit else "NOT SEEN"})
        self.report.say(f"mutations: {len(rows)} done")
        self.out["mutations"] = rows

    def transcription_table(self, names):
        rows = []
        for name in TRANSCRIBED:
            if name not in names:
                continue
            try:
                ours = self.ours(name)
            except (ProgramError, RuntimeError) as e:
                self.report.fail(f"transcription: {name}", str(e))
                continue
            found = self.draw(name)
            config, stored = reference.read_config(found.directory), reference.read_tensors(found.directory)
            for what, choices in transcription.variants(config):
                model = transcription.Official(config, stored, choices)
                logits = model(found.ids).float().numpy()
                flips = sum(int((e.numpy() != found.experts[:, i]).any(-1).sum()) for i, e in enumerate(model.experts))
                per_row = np.abs(logits - ours).max(-1) / np.abs(ours).max()
                rows.append({"checkpoint": name, "what": what, "error": float(per_row.max()),
                             "median": float(np.median(per_row)), "flips": f"{flips}/{len(found.ids) * len(model.experts)}",
                             "argmax": f"{int((logits.argmax(-1) != ours.argmax(-1)).sum())}/{len(found.ids)}"})
                if what.endswith("attention"):          # the two that compute what the library computes
                    self.report.check(f"transcription: {name}, {what}", rows[-1]["error"] <= compare.TOLERANCE,
                                      f"{rows[-1]['error']:.1e}")
        self.report.say(f"transcription: {len(rows)} done")
        self.out["transcription"] = rows

    def tokenizers(self):
        shared = os.path.join(self.o.shared, "tokenizers", "deepseek-v3")
        rows = []
        if os.path.exists(os.path.join(shared, "tokenizer.json")):
            tokenizer_oracle.check_goldens(shared, self.report)
        for name, directory in (("deepseek-v3", shared), ("examples/tiny", self.o.tiny)):
            row = tokenizer_oracle.check(name, directory, self.program, self.report, self.o.texts)
            if row:
                rows.append(row)
                self.report.say(f"tokenizer {name} done")
        self.out["tokenizer"] = rows

    # ------------------------------------------------------------ all of it

    def everything(self):
        os.makedirs(self.o.work, exist_ok=True)
        torch.use_deterministic_algorithms(True)
        transformers.utils.logging.disable_progress_bar()
        names = list(self.specs)
        if self.o.quick:
            names = [n for n in names if n in QUICK]
        if self.o.only in self.specs:
            names = [self.o.only]
            self.checkpoint_table(names)
            self.mutation_table(names)
        elif self.o.only and self.o.only not in SECTIONS:
            sys.exit(f"run.py: --only {self.o.only}: neither a section ({', '.join(SECTIONS)}) nor a checkpoint")
        if self.wanted("self"):
            self.self_checks(names)
        if self.wanted("checkpoints"):
            self.checkpoint_table(names)
        if self.wanted("bits"):
            self.bits(names)
        if self.wanted("mutations"):
            self.mutation_table(names)
        if self.wanted("transcription"):
            self.transcription_table(names)
        if self.wanted("quantize"):
            self.out["quantize"] = quantize.check(self.o.work, self.program, self.report)
        if self.wanted("tiny"):
            row = tiny.check(self.o.tiny, self.program, self.report)
            self.out["tiny"] = [row] if row else []
            self.out["converse"] = tiny.converse(self.o.tiny, self.program, self.report) if row else []
        if self.wanted("drafts"):
            self.out["drafts"] = mtp.check(self.o.work, self.program, self.report)
        if self.wanted("matmul"):
            self.out["matmul"] = matmul_modes.check(self.o.lib, self.report)
            self.report.say("matmul: done")
        if self.wanted("fidelity"):
            self.out.update(fidelity.check(self.o.tiny, os.path.join(self.o.shared, "corpus"), self.o.work, self.program,
                                           self.report, self.o.quick))
        if self.wanted("schema"):
            self.out.update(schema.check(self.o.lib, self.o.tiny, os.path.join(self.o.shared, "tokenizers", "deepseek-v3"),
                                         self.o.work, self.report))
        if self.wanted("tokenizer"):
            self.tokenizers()
        if self.wanted("kimi"):
            self.out["kimi"] = kimi.check(self.o.shared, self.o.work, self.program, self.report)
        if self.wanted("chat"):
            self.out["chat"] = chat.check(self.o.shared, self.o.work, self.program, self.report)
        if self.wanted("cache"):
            self.out["cache"] = cache.check(self.o.tiny, os.path.join(self.o.shared, "corpus"), self.o.work, self.program,
                                            self.report, self.o.quick)
        if self.wanted("speed"):
            self.out["speed"] = tokenizer_oracle.speed(os.path.join(self.o.shared, "tokenizers", "deepseek-v3"), self.o.bench,
                                                       self.report)

    def print(self):
        versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                    "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__}
        if self.o.json:
            print(json.dumps({"versions": versions, **self.out, "failures": self.report.failures, "skips": self.report.skips,
                              "passed": self.report.passed, "seconds": time.time() - self.report.start}, default=float))
            return
        print("Oracle: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "\n")
        rows = self.out.get("checkpoints", []) + self.out.get("tiny", [])
        if rows:
            print(table("Checkpoints: max |difference| / max |logit| against transformers in f32 (limit "
                        f"{compare.TOLERANCE:.0e}), and of both against f64", [
                            ("checkpoint", "checkpoint", "<"), ("what it has", "about", "<"), ("file", compare.dtype_label, "<"),
                            ("positions", "positions", ">"), ("error", lambda r: number(r["error"]), ">"),
                            ("experts", "experts", ">"), ("margin", lambda r: margin(r["margin"]), ">"),
                            ("greedy", "greedy", ">"), ("torch/f64", lambda r: number(r["torch_f64"]), ">"),
                            ("ours/f64", lambda r: number(r["ours_f64"]), ">"),
                            ("wishes not met", lambda r: "; ".join(r["wishes"]), "<")], rows))
        if self.out.get("bits"):
            print(table("Same bits: runs whose file equals that of 1 row at a time on 1 thread", [
                ("checkpoint", "checkpoint", "<"), ("positions", "positions", ">"), ("isa", "isa", "<"), ("equal", "equal", ">")],
                self.out["bits"]))
        if self.out.get("mutations"):
            print(table(f"Wrong models: distance from the program, which must be {MUTATION_FACTOR} tolerances "
                        f"({MUTATION_FACTOR * compare.TOLERANCE:.0e}) or more", [
                            ("mutation", "mutation", "<"), ("checkpoint", "checkpoint", "<"),
                            ("distance", lambda r: number(r["error"]), ">"), ("verdict", "verdict", "<")], self.out["mutations"]))
        if self.out.get("transcription"):
            print(table("DeepSeek's own choices: distance from the program", [
                ("checkpoint", "checkpoint", "<"), ("computed with", "what", "<"), ("max", lambda r: number(r["error"]), ">"),
                ("median row", lambda r: number(r["median"]), ">"), ("expert sets changed", "flips", ">"),
                ("best token changed", "argmax", ">")], self.out["transcription"]))
        if self.out.get("quantize"):
            print(table(f"dsv3 quantize: the files against torch, bit for bit; logits on them against transformers "
                        f"(limit {compare.TOLERANCE:.0e})", [
                            ("checkpoint", "checkpoint", "<"), ("file", "file", "<"), ("to", "to", "<"),
                            ("tensors equal", "equal", ">"), ("read back by, or written as", "readers", "<"),
                            ("positions", "positions", ">"), ("error", lambda r: number(r["error"]), ">"),
                            ("median row from the source", lambda r: number(r["moved"]), ">")], self.out["quantize"]))
        if self.out.get("converse"):
            print(table(f"examples/tiny converses, greedy, at most {tiny.ANSWER} tokens: shares of the answers", [
                ("markup", "markup", "<"), ("answers", "answers", ">"), ("end by themselves", lambda r: f"{r['ended']:.2f}", ">"),
                ("speak of the subject", lambda r: f"{r['subject']:.2f}", ">"),
                ("think first", lambda r: f"{r['thought']:.2f}", ">")], self.out["converse"]))
        if self.out.get("drafts"):
            print(table(f"Prediction layers: max |difference| / max |logit| (limit {compare.TOLERANCE:.0e}), in three sizes of "
                        f"batch; greedy guesses, {mtp.DEPTH} at once, that were right", [
                            ("checkpoint", "checkpoint", "<"), ("what it has", "about", "<"), ("file", "stored", "<"),
                            ("layers", "layers", ">"), ("positions", "rows", ">"), ("error", lambda r: number(r["error"]), ">"),
                            ("margin", lambda r: margin(r["margin"]), ">"), ("right", "guesses", ">"),
                            ("reference", "reference", ">"), ("seconds", lambda r: f"{r['seconds']:.1f}", ">")],
                        self.out["drafts"]))
        if self.out.get("matmul"):
            print(matmul_modes.table(self.out["matmul"]))
        if self.out.get("published") or self.out.get("fidelity"):
            print(fidelity.tables(self.out))
        if self.out.get("schema_suite"):
            print(schema.tables(self.out))
        if self.out.get("tokenizer"):
            print(table("Tokenizer against the wheel: texts equal", [
                ("tokenizer", "tokenizer", "<"), ("texts", "texts", ">"), ("MB", lambda r: f"{r['mb']:.1f}", ">"),
                ("safe mode", lambda r: r.get("safe", "-"), ">"), ("markers", lambda r: r.get("markers", "-"), ">"),
                ("decode", lambda r: r.get("decode", "-"), ">")], self.out["tokenizer"]))
        if self.out.get("kimi"):
            print(table("Kimi's tokenizer against tiktoken: texts equal", [
                ("what", "what", "<"), ("texts", "texts", ">"), ("equal", "equal", ">")], self.out["kimi"]))
        if self.out.get("chat"):
            print(table("Conversations against Jinja2 and the wheel: texts equal, errors where the template raises, ids equal; "
                        "of contents that hold markers, ids of markers equal to the template's own", [
                            ("markup", "markup", "<"), ("conversations", "conversations", ">"), ("text", "text", ">"),
                            ("raises", "raises", ">"), ("ids", "ids", ">"), ("posed", "posed", ">")], self.out["chat"]))
        if self.out.get("cache"):
            print(table("Number formats of the cache: KL of the next token's distribution from the one with a cache of f32, nats", [
                ("model", "model", "<"), ("tokens", "tokens", ">"), ("latents", "latent", "<"), ("keys", "rope", "<"),
                ("mean", lambda r: f"{r['kl']:.1e}", ">"), ("99 %", lambda r: f"{r['kl99']:.1e}", ">"),
                ("most", lambda r: f"{r['most']:.1e}", ">"), ("same best", lambda r: f"{r['same']:.4f}", ">")],
                self.out["cache"]))
        if self.out.get("speed"):
            print(table("Encoding, MB/s on one thread", [
                ("text", "text", "<"), ("wheel", lambda r: f"{r['wheel']:.2f}", ">"),
                ("dsv3", lambda r: f"{r['ours']:.1f}" if r["ours"] else "-", ">"),
                ("times", lambda r: f"{r['times']:.1f}" if r["times"] else "-", ">")], self.out["speed"]))
        for name, why in self.report.skips:
            print(f"skipped: {name}: {why}")
        for name, detail in self.report.failures:
            print(f"FAILED: {name}: {detail}" if detail else f"FAILED: {name}")
        print(f"{time.time() - self.report.start:.0f} s")
        print(self.report.last_line())


def margin(x):
    return "-" if x is None or x == float("inf") else number(x)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dsv3", default="build/dsv3", help="the program under test")
    p.add_argument("--lib", help="the shared library; default: libdsv3.so beside the program")
    p.add_argument("--bench", help="the C bench; default: beside the program")
    p.add_argument("--work", default="build/oracle", help="where checkpoints are written")
    p.add_argument("--shared", default="../shared", help="directory with tokenizers/deepseek-v3 and corpus (skipped where absent)")
    p.add_argument("--tiny", default=os.path.join(ROOT, "examples", "tiny"), help="the shipped model")
    p.add_argument("--texts", type=int, help="random texts per tokenizer (20000; 2000 with --quick)")
    p.add_argument("--only", help="one section or one checkpoint")
    p.add_argument("--quick", action="store_true", help="a third of the checkpoints, none of the large ones")
    p.add_argument("--self", dest="self_only", action="store_true", help="only what needs no program")
    p.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = p.parse_args()
    options.bench = options.bench or os.path.join(os.path.dirname(options.dsv3) or ".", "bench")
    options.lib = options.lib or os.path.join(os.path.dirname(options.dsv3) or ".", "libdsv3.so")
    options.texts = options.texts or (2000 if options.quick else 20000)
    if not options.self_only and not os.access(options.dsv3, os.X_OK):
        sys.exit(f"run.py: {options.dsv3} is not a program: build it first, or run with --self")
    run = Run(options)
    run.everything()
    run.print()
    sys.exit(1 if run.report.failures else 0)


if __name__ == "__main__":
    main()
