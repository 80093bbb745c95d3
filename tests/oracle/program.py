"""Calling the program under test. Stdout is its result, a non-zero exit status an error."""

import json
import os
import re
import subprocess

import numpy as np


class ProgramError(Exception):
    pass


def cpu_isas():
    """The --isa values this CPU can run."""
    flags = set()
    try:
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("flags"):
                    flags = set(line.split())
                    break
    except OSError:
        pass
    isas = ["scalar"]
    if {"avx2", "fma", "f16c"} <= flags:
        isas.append("avx2")
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        isas.append("avx512")
    if "avx2" in isas and "avx_vnni" in flags:
        isas.append("avx-vnni")
    if "avx512" in isas and "avx512_vnni" in flags:
        isas.append("avx512-vnni")
    if "avx512-vnni" in isas and {"avx512_bf16", "avx512vbmi"} <= flags:
        isas.append("avx512-bf16")
    if "avx512-vnni" in isas and {"amx_tile", "amx_int8"} <= flags:
        isas.append("avx512-amx")
    return isas


class Program:
    def __init__(self, path, work, timeout=600):
        self.path, self.work, self.timeout = os.path.abspath(path), work, timeout
        self.has_compute = b"--compute" in self.run("logits", "-h")

    def _compute(self, mode):
        """Options that ask for an arithmetic mode. A program without modes has f32 alone."""
        if not self.has_compute and mode != "f32":
            raise ProgramError(f"the program has no --compute {mode}")
        return ["--compute", mode] if self.has_compute else []

    def run(self, *args, input=None):
        command = [self.path, *map(str, args)]
        try:
            done = subprocess.run(command, input=input, capture_output=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            raise ProgramError(f"{' '.join(command)}: no answer in {self.timeout} s")
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ProgramError(f"{' '.join(command)}: exit {done.returncode}: {said[-1] if said else '(silent)'}")
        return done.stdout

    def _ids_file(self, ids):
        path = os.path.join(self.work, "ids.txt")
        with open(path, "w") as f:
            f.write("".join(f"{i}\n" if at % 16 == 15 else f"{i} " for at, i in enumerate(ids)))
        return path

    def logits(self, directory, ids, vocab, moe_layers=0, top_k=0, rows=None, threads=None, isa=None, compute="f32",
               expand=False):
        """(f32 [n, vocab], experts int32 [n, moe_layers, top_k] or None, the bytes of both files)."""
        out, experts_out = (os.path.join(self.work, name) for name in ("logits.f32", "experts.i32"))
        args = ["logits", directory, "--ids", self._ids_file(ids), "--out", out, *self._compute(compute)]
        if expand:
            args.append("--expand")
        if moe_layers:
            args += ["--experts", experts_out]
        for flag, value in (("--rows", rows), ("--threads", threads), ("--isa", isa)):
            if value is not None:
                args += [flag, value]
        for path in (out, experts_out):
            if os.path.exists(path):
                os.remove(path)
        self.run(*args)
        raw = read_bytes(out)
        want = len(ids) * vocab * 4
        if len(raw) != want:
            raise ProgramError(f"logits file of {len(raw)} bytes, expected {len(ids)} x {vocab} x 4 = {want}")
        logits, experts = np.frombuffer(raw, "<f4").reshape(len(ids), vocab), None
        if moe_layers:
            chosen = read_bytes(experts_out)
            want = len(ids) * moe_layers * top_k * 4
            if len(chosen) != want:
                raise ProgramError(f"experts file of {len(chosen)} bytes, expected {len(ids)} x {moe_layers} x {top_k} "
                                   f"x 4 = {want}")
            experts = np.frombuffer(chosen, "<i4").reshape(len(ids), moe_layers, top_k)
            raw = raw + chosen
        return logits, experts, raw

    def greedy(self, directory, ids, steps, how="file"):
        """Ids of a greedy continuation; the prompt's ids come from a file, an argument or stdin."""
        args = ["generate", directory, "--ids", "--greedy", "-n", steps, "--json", *self._compute("f32")]
        text = " ".join(map(str, ids))
        if len(ids) + steps > 4096:                     # what a session holds unless told otherwise
            args += ["--context", len(ids) + steps]
        if how == "file":
            out = self.run(*args, "-f", self._ids_file(ids))
        elif how == "argument":
            out = self.run(*args[:2], text, *args[2:])
        else:
            out = self.run(*args[:2], "-", *args[2:], input=text.encode())
        lines = [json.loads(line) for line in out.decode().split("\n") if line]
        if not lines or "stats" not in lines[-1]:
            raise ProgramError("generate --json: the last line has no stats")
        return [line["id"] for line in lines[:-1]]

    def converse(self, directory, questions, n, markup="auto"):
        """`dsv3 chat`, greedy, one conversation a question: (answer, reasoning, what ended it)."""
        kept = [os.path.join(self.work, f"talk-{i}.json") for i in range(len(questions))]
        lines = "".join(f"{q}\n/stats\n/save {path}\n/new\n" for q, path in zip(questions, kept))
        command = [self.path, "chat", directory, "--greedy", "-n", str(n), "--markup", markup, "--compute", "f32"]
        for path in kept:
            if os.path.exists(path):
                os.remove(path)
        done = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=self.timeout)
        said = done.stderr.decode(errors="replace")
        ended = re.findall(r"answer of \d+ tokens, .*, ended by (\w+)", said)
        if done.returncode or len(ended) != len(questions):
            raise ProgramError(f"{' '.join(command)}: exit {done.returncode}, {len(ended)} answers: {said[-300:]}")
        answers = []
        for path, end in zip(kept, ended):
            reply = json.loads(read_bytes(path))["messages"][-1]
            answers.append((reply["content"], reply.get("reasoning_content", ""), end))
        return answers

    def jsonl(self, command, directory, objects):
        """tokenize or detokenize --jsonl: one answer per object."""
        text = "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects)
        out = self.run(command, directory, "--jsonl", input=text.encode())
        lines = out.decode().split("\n")
        if lines[-1] == "":
            lines.pop()
        if len(lines) != len(objects):
            raise ProgramError(f"{command} --jsonl: {len(lines)} lines for {len(objects)}")
        return [json.loads(line) for line in lines]


def read_bytes(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        raise ProgramError(str(e))
