#!/usr/bin/env python3
"""Train the small DeepSeek-V3 model that ships in examples/tiny.

The model is transformers' own DeepseekV3ForCausalLM (MLA with YaRN, sigmoid
router with groups, a shared expert) plus one multi-token-prediction layer,
fitted to public-domain tales and written as an official-looking directory:
FP8 E4M3 in 128x128 blocks with F32 `weight_scale_inv`, BF16 where V3 has BF16,
per-expert tensor names, V3's tokenizer pipeline.

    pip install torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0

    python tests/oracle/train_tiny.py --out examples/tiny            # train and export
    python tests/oracle/train_tiny.py --check examples/tiny          # reload with transformers, measure
    python tests/oracle/train_tiny.py --help                         # everything else
    python tests/oracle/train_tiny.py --dense  --out build/dense      # same active size, no experts
    python tests/oracle/train_tiny.py --no-bias --out build/nobias    # router bias kept at 0
    python tests/oracle/train_tiny.py --bigram                       # the baseline's loss
    python tests/oracle/train_tiny.py --chat examples/tiny --out build/chat   # a last stage: conversations

The texts (--corpus, by default ../shared/corpus beside the repository) are
tales.txt, whose lines are joined into paragraphs; tinyshakespeare.txt can be
mixed in with --plays and is left out by default. Whole tales, 5 % of the bytes,
are held out. The length of a run is --steps (deterministic for one seed, thread
count and torch build) or --minutes (the schedule follows the clock). Progress
goes to stderr; one JSON line on stdout at the end. How the shipped model was
made, with all its figures: tiny_report.md.

The last stage, --chat DIR, begins with the stored weights of DIR. Every other row holds conversations that
tiny_talk.py makes of the same tales; on the plain rows the model is held to what DIR itself says (--hold), so
that it learns no more of these few texts, nor forgets them.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import tiny_talk

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"

BOS, EOS, PAD = 0, 1, 2
MARKERS = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
TAIL_MARKERS = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
VOCAB = 4096
BLOCK = 128
CONTEXT = 512           # length of a training row; the last part of a run uses LONG
LONG = 2048

CONFIG = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3",
    attention_bias=False, attention_dropout=0.0, bos_token_id=BOS, eos_token_id=EOS,
    first_k_dense_replace=1, hidden_act="silu", hidden_size=160, initializer_range=0.02,
    intermediate_size=320, kv_lora_rank=64, max_position_embeddings=LONG, moe_intermediate_size=96,
    moe_layer_freq=1, n_group=4, n_routed_experts=16, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=5, num_experts_per_tok=4, num_hidden_layers=4, num_key_value_heads=5,
    num_nextn_predict_layers=1, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16,
    rms_norm_eps=1e-6,
    rope_scaling=dict(beta_fast=32, beta_slow=1, factor=LONG // CONTEXT, mscale=1.0, mscale_all_dim=1.0,
                      original_max_position_embeddings=CONTEXT, type="yarn"),
    rope_theta=10000, routed_scaling_factor=2.5, scoring_func="sigmoid", tie_word_embeddings=False,
    topk_group=2, topk_method="noaux_tc", torch_dtype="bfloat16", use_cache=True, v_head_dim=32,
    vocab_size=VOCAB,
)
QUANTIZATION = dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[BLOCK, BLOCK])


def say(*words):
    print(*words, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the texts

def unwrap(text):
    """Join the hard-wrapped lines of each prose paragraph; indented lines (verse) stay."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        out = ""
        for line in block.split("\n"):
            if out and not line.startswith(" ") and not last_indented:
                out += " " + line.strip()
            else:
                out += ("\n" if out else "") + line.rstrip()
            last_indented = line.startswith(" ")
        paragraphs.append(out)
    return "\n\n".join(paragraphs)


def read_tales(corpus):
    """All tales, each one string: title, blank line, paragraphs."""
    parts = re.split(r"\n{4,}", (corpus / "tales.txt").read_text("utf-8"))
    return [unwrap(p) for p in parts if "\n" in p and not p.startswith("CONTENTS")]


def split_tales(tales):
    """Whole tales held out, from each of the three books: about 5 % of the bytes."""
    held = [t for i, t in enumerate(tales) if i % 20 == 13]
    return [t for i, t in enumerate(tales) if i % 20 != 13], held


def read_plays(corpus):
    """Tinyshakespeare as documents of some ten speeches."""
    speeches = (corpus / "tinyshakespeare.txt").read_text("utf-8").strip().split("\n\n")
    return ["\n\n".join(speeches[i:i + 40]) for i in range(0, len(speeches), 40)]


# ---------------------------------------------------------------- the tokenizer

def train_tokenizer(texts):
    """Byte-level BPE behind V3's splits, numbered as V3 numbers: 3 markers, 256 bytes, merges in order."""
    han = "[一-龥\u3040-ゟ゠-ヿ]+"
    words = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
             "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+")
    splits = [dict(type="Split", pattern=dict(Regex=r), behavior="Isolated", invert=False)
              for r in (r"\p{N}{1,3}", han, words)]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    pre = dict(type="Sequence", pretokenizers=splits + [byte_level])

    shell = Tokenizer(models.BPE())
    frame = json.loads(shell.to_str())
    frame["pre_tokenizer"] = pre
    shell = Tokenizer.from_str(json.dumps(frame))
    shell.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB - len(TAIL_MARKERS), special_tokens=MARKERS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(shell.to_str())["model"]
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = MARKERS + letters + ["".join(m.split(" ")) for m in merges]
    assert len(set(names)) == len(names) == VOCAB - len(TAIL_MARKERS)
    vocab = {name: i for i, name in enumerate(names)}
    assert vocab == model["vocab"]

    def added(i, content, special):
        return dict(id=i, content=content, single_word=False, lstrip=False, rstrip=False,
                    normalized=not special, special=special)

    whole = dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[added(i, m, True) for i, m in enumerate(MARKERS)]
        + [added(len(names) + i, m, False) for i, m in enumerate(TAIL_MARKERS)],
        normalizer=dict(type="Sequence", normalizers=[]), pre_tokenizer=pre,
        post_processor=dict(whole, trim_offsets=False), decoder=whole,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, vocab=vocab, merges=merges))


def bpe_dropout(tok_json, p):
    """The same tokenizer, but each merge is skipped with probability p: a fresh spelling of the text every time."""
    return Tokenizer.from_str(json.dumps(dict(tok_json, model=dict(tok_json["model"], dropout=p))))


# ---------------------------------------------------------------- rows to learn from

def documents(tales, rng):
    """Each tale cut at random paragraphs, its title sometimes left out, so that BOS may stand before any opening."""
    for tale in tales:
        paragraphs = tale.split("\n\n")
        if len(paragraphs) > 1 and rng.random() < 0.5:
            paragraphs = paragraphs[1:]
        start = 0
        for i in range(1, len(paragraphs) + 1):
            if i == len(paragraphs):
                yield "\n\n".join(paragraphs[start:i]), True
            elif rng.random() < 0.06:
                yield "\n\n".join(paragraphs[start:i]), False
                start = i


class Rows:
    """An endless supply of [n, length+1] id tensors: epochs of shuffled documents, packed end to end."""

    def __init__(self, tales, plays, tok_json, dropout, until, plays_share, seed):
        self.tales, self.plays, self.share, self.until = tales, plays, plays_share, until
        self.plain, self.loose = bpe_dropout(tok_json, None), bpe_dropout(tok_json, dropout or None)
        self.rng, self.ids, self.epochs = random.Random(seed), [], 0

    def fill(self, progress):
        docs = list(documents(self.tales, self.rng))
        share = self.share * max(0.0, 1 - progress / 0.7)          # the plays fade out
        docs += [(p, True) for p in self.rng.sample(self.plays, int(share * len(self.plays)))]
        self.rng.shuffle(docs)
        tok = self.loose if progress < self.until else self.plain     # at the end the spelling settles
        for enc, (_, whole) in zip(tok.encode_batch([d for d, _ in docs], add_special_tokens=False), docs):
            self.ids += [BOS] + enc.ids + ([EOS] if whole else [])
        self.epochs += 1

    def take(self, n, length, progress):
        while len(self.ids) < n * (length + 1):
            self.fill(progress)
        rows = torch.tensor(self.ids[:n * (length + 1)]).view(n, length + 1)
        self.ids = self.ids[n * (length + 1):]
        return rows


class TalkRows:
    """Rows of whole conversations, each seeing itself alone. Early on most rows hold beginnings of replies only: that is
    where a reply takes up its subject, and what it takes to look it up is not learned from whole replies alone."""

    def __init__(self, tales, tok, seed):
        marks = dict(zip(("user", "assistant", "think", "end_think"), range(VOCAB - len(TAIL_MARKERS), VOCAB)))
        self.talks = tiny_talk.Talks(tales, seed)
        self.spelled = tiny_talk.Spelled(tok, self.talks, dict(marks, bos=BOS, eos=EOS))
        self.pool = []

    def row(self, length, openings):
        """Those of a pool that fill the row best; what does not fit the row at all is cut."""
        ids, learn, begins, short = [], [], [], self.talks.rng.random() < openings
        while len(ids) <= length:
            room = length + 1 - len(ids)
            if short:
                chosen = self.spelled.one(opening=self.talks.rng.choice((5, 6, 8, 12)))
            else:
                while len(self.pool) < 16:
                    self.pool.append(self.spelled.one(12 if length > CONTEXT and not self.pool else None))
                fitting = [c for c in self.pool if len(c[0]) <= room]
                if ids and not fitting:
                    break
                chosen = self.pool[0] if not ids else max(fitting, key=lambda c: len(c[0]))
                self.pool.remove(chosen)
            begins.append(len(ids))
            ids, learn = ids + chosen[0][:room], learn + chosen[1][:room]
        begins.append(len(ids))
        pad = length + 1 - len(ids)
        part = torch.bucketize(torch.arange(length + 1), torch.tensor(begins), right=True)
        position = torch.arange(length + 1) - torch.tensor([0, *begins])[part]
        return torch.tensor(ids + [PAD] * pad), torch.tensor(learn + [0.0] * pad), part, position

    def join(self, plain, step, openings):
        """Conversations in place of plain rows, of half of them in even steps and of all in odd ones: ids, weights,
        additive mask of [n, 1, length, length], positions, which rows are conversations."""
        n, length = plain.shape[0], plain.shape[1] - 1
        n_plain = (n + 1) // 2 if step % 2 == 0 else 0
        rows = [(r, (r != BOS).float(), torch.zeros(length + 1), torch.arange(length + 1)) for r in plain[:n_plain]]
        rows += [self.row(length, openings) for _ in range(n - n_plain)]
        talk = torch.arange(n) >= n_plain
        if step % 4 == 0:                          # the MTP layer learns from the first rows of a step
            rows, talk = rows[::-1], talk.flip(0)
        ids, learn, part, position = (torch.stack(c) for c in zip(*rows))
        part = part[:, :-1]
        see = (part[:, :, None] == part[:, None, :]).tril()
        return ids, learn, torch.zeros(see.shape).masked_fill(~see, -math.inf)[:, None], position[:, :-1], talk


def held_stream(held, tok):
    ids = []
    for enc in tok.encode_batch(held, add_special_tokens=False):
        ids += [BOS] + enc.ids + [EOS]
    return ids


# ---------------------------------------------------------------- model

def build(dense=False, dropout=0.0, attention="eager", experts="eager"):
    cfg = dict(CONFIG)
    if dense:                                      # every layer dense, as wide as what one token activates
        moe = (cfg["num_experts_per_tok"] + cfg["n_shared_experts"]) * cfg["moe_intermediate_size"]
        n, k = cfg["num_hidden_layers"], cfg["first_k_dense_replace"]
        cfg.update(first_k_dense_replace=n + 1, intermediate_size=(k * cfg["intermediate_size"] + (n - k) * moe) // n)
    config = DeepseekV3Config(**{k: v for k, v in cfg.items() if k != "torch_dtype"})
    config._attn_implementation, config._experts_implementation = attention, experts
    model = DeepseekV3ForCausalLM(config)
    model.mtp = MTP(config)
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        std = 0.5 * p.shape[-1] ** -0.5
        if "embed_tokens" in name:
            std = 0.1
        elif "o_proj" in name or "down_proj" in name:
            std *= 0.2                             # the layers start as small corrections
        elif "gate.weight" in name or "lm_head" in name:
            std = 0.02
        nn.init.normal_(p, 0, std)
    if dropout:
        drop = lambda y: F.dropout(y, dropout, training=model.training)
        model.model.embed_tokens.register_forward_hook(lambda m, i, o: drop(o))
        for layer in [*model.model.layers, model.mtp.layer]:
            layer.self_attn.register_forward_hook(lambda m, i, o: (drop(o[0]), *o[1:]))
            layer.mlp.register_forward_hook(lambda m, i, o: drop(o))
    return model


class MTP(nn.Module):
    """One more decoder layer that sees h_i (after the final norm) and token i+1, and guesses token i+2."""

    def __init__(self, config):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = v3.DeepseekV3RMSNorm(d, eps), v3.DeepseekV3RMSNorm(d, eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.layer = v3.DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.norm = v3.DeepseekV3RMSNorm(d, eps)

    def forward(self, model, h, next_ids, mask=None, pos=None):
        e = model.model.embed_tokens(next_ids)
        u = self.eh_proj(torch.cat([self.enorm(e), self.hnorm(h)], -1))
        pos = torch.arange(u.shape[1])[None] if pos is None else pos
        if mask is None and model.config._attn_implementation == "eager":       # sdpa: causal without a mask
            mask = torch.full((u.shape[1], u.shape[1]), -math.inf).triu(1)[None, None]
        rope = model.model.rotary_emb(u, pos)
        return self.norm(self.layer(u, attention_mask=mask, position_ids=pos, position_embeddings=rope))


def gates(model):
    layers = [*model.model.layers, model.mtp.layer]
    return [(i, m.mlp.gate) for i, m in enumerate(layers) if hasattr(m.mlp, "gate")]


class Load:
    """Counts how many tokens each expert received, by hooks on the routers."""

    def __init__(self, model):
        self.counts = {i: torch.zeros(g.num_experts) for i, g in gates(model)}
        for i, g in gates(model):
            g.register_forward_hook(lambda m, a, out, i=i: self.add(i, out[2]))

    def add(self, i, chosen):
        self.counts[i] += torch.bincount(chosen.reshape(-1), minlength=len(self.counts[i])).float()

    def reset(self):
        for c in self.counts.values():
            c.zero_()

    def table(self):
        return {i: dict(max_over_mean=round((c.max() / c.mean()).item(), 3),
                        min_over_mean=round((c.min() / c.mean()).item(), 3),
                        cv=round((c.std(unbiased=False) / c.mean()).item(), 3))
                for i, c in self.counts.items() if c.sum() > 0}


def move_biases(model, load, by):
    """The auxiliary-loss-free rule: move the choice, not the loss."""
    for i, g in gates(model):
        c = load.counts[i]
        g.e_score_correction_bias += by * torch.sign(c.mean() - c)


def cross_entropy(model, h, targets, weights=None, reduction="mean"):
    targets = targets.masked_fill(targets == BOS, -100)        # BOS is given, never predicted
    if weights is not None:
        each = F.cross_entropy(model.lm_head(h).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return (each * weights.flatten()).sum() / (weights.sum() if reduction == "mean" else 1)
    return F.cross_entropy(model.lm_head(h).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction)


@torch.no_grad()
def evaluate(model, stream, n_bytes, length=CONTEXT, mtp=True, load=None):
    """Held-out loss over windows of `length` tokens, each starting afresh; every token is predicted once."""
    model.eval()
    if load:
        load.reset()
    text_nll = nll = n = mtp_nll = mtp_n = same = rows = 0
    for a in range(0, len(stream) - 1, length):
        ids = torch.tensor(stream[a:a + length + 1])[None]
        x, y = ids[:, :-1], ids[:, 1:]
        h = model.model(x, use_cache=False).last_hidden_state
        logits = model.lm_head(h)[0]
        each = F.cross_entropy(logits, y[0], reduction="none")
        keep = y[0] != BOS
        nll, n = nll + each[keep].sum().item(), n + keep.sum().item()
        text_nll += each[keep & (y[0] != EOS)].sum().item()
        if mtp and x.shape[1] > 1:
            m = model.lm_head(model.mtp(model, h[:, :-1], x[:, 1:]))[0]
            each, keep = F.cross_entropy(m, y[0, 1:], reduction="none"), keep[1:]
            mtp_nll, mtp_n = mtp_nll + each[keep].sum().item(), mtp_n + keep.sum().item()
            same += (m.argmax(-1) == logits[1:].argmax(-1))[keep].sum().item()
    model.train()
    out = dict(loss=nll / n, bits_per_byte=text_nll / math.log(2) / n_bytes, tokens=n)
    if mtp:
        out.update(mtp_loss=mtp_nll / mtp_n, mtp_accept=same / mtp_n)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in out.items()}


@torch.no_grad()
def evaluate_talk(model, spelled, n=80):
    """Loss of the replies in conversations of one turn, thoughts and end included; and of the words that name the subject."""
    model.eval()
    nll = count = named_nll = named = 0
    for ids, weights in (spelled.one(1) for _ in range(n)):
        ids, weights = torch.tensor(ids)[None], torch.tensor(weights)[None, 1:]
        h = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = lambda w: cross_entropy(model, h, ids[:, 1:], w.float(), "sum").item()
        nll, count = nll + loss(weights > 0), count + (weights > 0).sum().item()
        named_nll, named = named_nll + loss(weights > 1), named + (weights > 1).sum().item()
    model.train()
    return dict(talk_loss=round(nll / count, 4), subject_loss=round(named_nll / named, 4))


# ---------------------------------------------------------------- numbers as they are stored

def is_fp8(name):
    return ("_proj" in name) and "eh_proj" not in name


def fp8_blocks(w):
    """[..., O, N] f32 -> E4M3 codes and the F32 scale of each 128x128 block; edge blocks are just smaller."""
    o, n = w.shape[-2:]
    wide = F.pad(w, (0, -n % BLOCK, 0, -o % BLOCK))
    blocks = wide.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))      # [..., ob, 128, nb, 128]
    amax = blocks.abs().amax((-3, -1))
    scale = torch.where(amax > 0, amax / 448, torch.ones_like(amax))
    spread = scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :o, :n]
    return (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def from_fp8(q, scale):
    o, n = q.shape[-2:]
    return q.float() * scale.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :o, :n]


def as_stored(name, w):
    """The value a reader of the checkpoint will see for this parameter."""
    if not is_fp8(name):
        return w.to(torch.bfloat16).float()
    if name.endswith("gate_up_proj"):
        return torch.cat([from_fp8(*fp8_blocks(half)) for half in w.chunk(2, -2)], -2)
    return from_fp8(*fp8_blocks(w))


class Stored:
    """Within this block the parameters hold their stored values; leaving it puts the exact ones back.
    Gradients taken inside and applied outside are the straight-through estimate."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.exact = [(p, p.data) for p in self.model.parameters()]
        for name, p in self.model.named_parameters():
            p.data = as_stored(name, p.data)

    def __exit__(self, *_):
        for p, w in self.exact:
            p.data = w


# ---------------------------------------------------------------- checkpoint directory

def official_tensors(model):
    """(official name, f32 tensor) for every weight, experts one by one, the MTP layer after the last layer."""
    n = model.config.num_hidden_layers
    for name, w in model.state_dict().items():
        if name.startswith("mtp."):
            name = f"model.layers.{n}." + re.sub(r"^layer\.", "", name[4:])
            name = name.replace(f"layers.{n}.norm.", f"layers.{n}.shared_head.norm.")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(w):
                for part, half in zip(("gate_proj", "up_proj"), both.chunk(2, 0)):
                    yield f"{name[:-12]}{e}.{part}.weight", half
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(w):
                yield f"{name[:-9]}{e}.down_proj.weight", down
        else:
            yield name, w


def export(model, tok_json, out, sampling):
    out = Path(out)
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = {}
    for name, w in official_tensors(model):
        if name.endswith("e_score_correction_bias"):
            tensors[name] = w.float().clone()
        elif is_fp8(name):
            q, scale = fp8_blocks(w.float())
            tensors[name], tensors[name + "_scale_inv"] = q, scale
        else:
            tensors[name] = w.to(torch.bfloat16)
    save_file({k: v.contiguous() for k, v in tensors.items()}, new / "model.safetensors", metadata={"format": "pt"})
    (new / "model.safetensors").chmod(0o644)

    cfg = dict(CONFIG, quantization_config=QUANTIZATION)
    for key in ("first_k_dense_replace", "intermediate_size"):
        cfg[key] = getattr(model.config, key)
    write = lambda name, obj, indent=2: (new / name).write_text(
        json.dumps(obj, ensure_ascii=False, indent=indent) + "\n", "utf-8")
    write("config.json", dict(sorted(cfg.items())))
    write("generation_config.json", dict(_from_model_config=True, bos_token_id=BOS, do_sample=True,
                                         eos_token_id=EOS, **sampling))
    write("tokenizer.json", tok_json)
    token = lambda s: dict(__type="AddedToken", content=s, lstrip=False, normalized=True, rstrip=False, single_word=False)
    write("tokenizer_config.json", dict(
        add_bos_token=True, add_eos_token=False, bos_token=token(MARKERS[BOS]), clean_up_tokenization_spaces=False,
        eos_token=token(MARKERS[EOS]), legacy=True, model_max_length=CONFIG["max_position_embeddings"],
        pad_token=token(MARKERS[EOS]), sp_model_kwargs={}, unk_token=None, tokenizer_class="PreTrainedTokenizerFast",
        chat_template=CHAT_TEMPLATE()))
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def CHAT_TEMPLATE():
    """V3's own template, from the shared tokenizer files or from the model directory already here."""
    for path in (SHARED / "tokenizers/deepseek-v3/tokenizer_config.json", ROOT / "examples/tiny/tokenizer_config.json"):
        if path.exists():
            return json.loads(path.read_text("utf-8"))["chat_template"]
    return None


def dequantised(directory):
    """All tensors of a checkpoint directory as f32, FP8 multiplied out."""
    raw = load_file(Path(directory) / "model.safetensors")
    return {k: from_fp8(w, raw[k + "_scale_inv"]) if w.dtype == torch.float8_e4m3fn else w.float()
            for k, w in raw.items() if not k.endswith("_scale_inv")}


def load_checked(directory):
    """Load a directory through AutoModelForCausalLM after dequantising; strict, but for the MTP layer."""
    directory = Path(directory)
    tensors = dequantised(directory)
    cfg = json.loads((directory / "config.json").read_text("utf-8"))
    cfg.pop("quantization_config")
    cfg["torch_dtype"] = "float32"
    n = cfg["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as tmp:
        save_file(tensors, Path(tmp) / "model.safetensors", metadata={"format": "pt"})
        (Path(tmp) / "config.json").write_text(json.dumps(cfg), "utf-8")
        model, info = AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.float32, output_loading_info=True,
                                                           attn_implementation="eager", experts_implementation="eager")
    strange = [k for k in info["unexpected_keys"] if not k.startswith(f"model.layers.{n}.")]
    if info["missing_keys"] or strange or info["mismatched_keys"]:
        raise SystemExit(f"{directory}: missing {info['missing_keys']}, unexpected {strange}, {info['mismatched_keys']}")
    model.mtp = MTP(model.config)
    own, prefix = {}, f"model.layers.{n}."
    for k, w in tensors.items():
        if k.startswith(prefix):
            k = k[len(prefix):]
            own[k if k.split(".")[0] in ("enorm", "hnorm", "eh_proj") else
                k.replace("shared_head.", "") if k.startswith("shared_head") else "layer." + k] = w
    if any(".experts." in k for k in own):         # fuse the experts as transformers holds them
        join = lambda p: torch.stack([own.pop(f"layer.mlp.experts.{e}.{p}.weight") for e in range(cfg["n_routed_experts"])])
        gate, up, down = join("gate_proj"), join("up_proj"), join("down_proj")
        own["layer.mlp.experts.gate_up_proj"], own["layer.mlp.experts.down_proj"] = torch.cat([gate, up], 1), down
    model.mtp.load_state_dict(own, strict=True)
    return model.eval()


# ---------------------------------------------------------------- baselines, samples

def bigram(train_ids):
    """Interpolated Kneser-Ney bigram (discount 0.75; continuation counts below, then uniform) as p[previous, next]."""
    d = 0.75
    pairs = Counter((a, b) for a, b in zip(train_ids, train_ids[1:]) if b != BOS)
    left, kinds, cont = torch.zeros(VOCAB), torch.zeros(VOCAB), torch.zeros(VOCAB)
    p = torch.zeros(VOCAB, VOCAB)
    for (a, b), c in pairs.items():
        p[a, b] = c - d
        left[a] += c
        kinds[a] += 1
        cont[b] += 1
    below = (cont - d).clamp(0) / cont.sum() + d * (cont > 0).sum() / cont.sum() / VOCAB
    left = left[:, None]
    return torch.where(left > 0, (p + d * kinds[:, None] * below) / left.clamp(1), below), left[:, 0]


def bigram_loss(p, stream, n_bytes):
    a, b = torch.tensor(stream[:-1]), torch.tensor(stream[1:])
    each = -p[a, b].log()
    return dict(loss=round(each[b != BOS].mean().item(), 4),
                bits_per_byte=round(each[(b != BOS) & (b != EOS)].sum().item() / math.log(2) / n_bytes, 4))


def start_from_bigram(model, train_ids, steps):
    """Fit embedding -> norm -> head to the smoothed bigram: a minute here saves the first epochs of the run."""
    p, count = bigram(train_ids)
    seen = count.nonzero()[:, 0]
    emb = model.model.embed_tokens.weight
    opt = torch.optim.Adam([emb, model.lm_head.weight], lr=0.02)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        if step % 8 == 0:
            order = seen[torch.randperm(len(seen))].chunk(8)
        a = order[step % 8]
        h = F.rms_norm(emb[a], emb.shape[1:], eps=1e-6)
        weight = count[a] / count[a].sum()
        loss = -(weight[:, None] * p[a] * model.lm_head(h).log_softmax(-1)).sum()
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    with torch.no_grad():                          # the norm hides the length of a row: choose one
        emb.copy_(F.rms_norm(emb, emb.shape[1:], eps=1e-6) * 0.5)
    say(f"started from the bigram: loss {loss.item():.3f} after {steps} steps")


@torch.no_grad()
def sample(model, tok, prompt, n, temperature, top_p, seed):
    """Plain sampling with transformers' cache."""
    rng = torch.Generator().manual_seed(seed)
    ids = [BOS] + tok.encode(prompt, add_special_tokens=False).ids
    x, cache = torch.tensor([ids]), None
    for _ in range(n):
        r = model(x, cache=cache, use_cache=True)
        cache = r.cache
        p = (r.logits[0, -1] / max(temperature, 1e-4)).softmax(-1)
        s, order = p.sort(descending=True)
        s[(s.cumsum(0) - s) >= top_p] = 0
        t = order[torch.multinomial(s, 1, generator=rng)].item()
        ids.append(t)
        if t == EOS:
            break
        x = torch.tensor([[t]])
    return ids


# ---------------------------------------------------------------- training

def train(args, tales, held, tok_json):
    torch.manual_seed(args.seed)
    tok = Tokenizer.from_str(json.dumps(tok_json))
    model = build(args.dense, dropout=args.dropout, attention=args.attention, experts=args.experts)
    model.train()
    load, seen, talk = Load(model), 0, None
    if args.chat:
        teacher = load_checked(args.chat)
        model.load_state_dict(teacher.state_dict())
        talk = TalkRows(tales, tok, args.seed)
    plays = read_plays(args.corpus) if args.plays else []
    rows = Rows(tales, plays, tok_json, args.bpe_dropout, args.bpe_until, args.plays, args.seed)
    stream, n_bytes = held_stream(held, tok), sum(len(t.encode()) for t in held)
    if args.start and not args.resume and not args.tune and not args.chat:
        start_from_bigram(model, held_stream(tales, tok), args.start)
    groups = {"tables": [], "matrices": [], "norms": []}
    for name, p in model.named_parameters():
        groups["norms" if p.ndim < 2 else "tables" if p.shape[0] == VOCAB else "matrices"].append(p)
    opt = torch.optim.AdamW([dict(params=groups["tables"], weight_decay=args.decay, pace=0.3),
                             dict(params=groups["matrices"], weight_decay=args.decay, pace=1.0),
                             dict(params=groups["norms"], weight_decay=0.0, pace=1.0)],
                            lr=args.lr, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    params = sum(p.numel() for p in model.parameters())
    say(f"{params/1e6:.2f} M parameters; train {sum(map(len, tales))} bytes, held out {n_bytes} bytes, {len(stream)} tokens")

    start, step, last_say, last_export, curve = time.time(), 0, time.time(), time.time(), []
    if args.tune:
        model.load_state_dict(torch.load(args.tune, weights_only=False)["model"])
    if args.resume:
        state = torch.load(args.resume, weights_only=False)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        rng_state, rows.epochs = state["rows"]             # what was left of the epoch is passed over
        rows.rng.setstate(rng_state)
        torch.set_rng_state(state["torch"])
        if talk:
            talk.talks.rng.setstate(state["talk"])
        step, seen, curve = state["step"], state["seen"], state["curve"]
        start -= state.get("elapsed", 0)
    begun, woke, main, moved = seen, time.time(), torch.zeros(()), torch.zeros(())

    def save_state():
        torch.save(dict(model=model.state_dict(), opt=opt.state_dict(), rows=(rows.rng.getstate(), rows.epochs),
                        torch=torch.get_rng_state(), step=step, seen=seen, curve=curve, elapsed=time.time() - start,
                        talk=talk and talk.talks.rng.getstate()), args.state)

    while True:
        progress = (time.time() - start) / 60 / args.minutes if args.minutes else step / args.steps
        if progress >= 1:
            break
        long = progress > 1 - args.long
        length = LONG if long else CONTEXT
        ids = rows.take(max(1, args.batch * CONTEXT // length), length, progress)
        rate = min(1, (step + 1) / args.warm) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in opt.param_groups:
            group["lr"] = args.lr * group["pace"] * max(rate, 0.01)
        stored = Stored(model) if progress > 1 - args.qat else None
        if stored:
            stored.__enter__()
        load.reset()
        weights = torch.ones(ids.shape)
        mask = position = mask_ahead = position_ahead = None
        half = (len(ids) + 1) // 2                 # the MTP layer learns from every other row: its head is dear
        if talk:
            ids, weights, mask, position, is_talk = talk.join(ids, step, max(0.1, 1.2 - 2.5 * progress))
            mask_ahead, position_ahead = mask[:half, :, :-1, :-1], position[:half, :-1]
        x, y, weights = ids[:, :-1], ids[:, 1:], weights[:, 1:]
        h = model.model(x, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        ahead = cross_entropy(model, model.mtp(model, h[:half, :-1], x[:half, 1:], mask_ahead, position_ahead),
                              y[:half, 1:], weights[:half, 1:] if talk else None)
        loss = args.mtp * ahead
        if not talk or is_talk.any():
            main = cross_entropy(model, h[is_talk], y[is_talk], weights[is_talk]) if talk else cross_entropy(model, h, y)
            loss = loss + main
        if talk and not is_talk.all():
            with torch.no_grad():
                old = teacher.lm_head(teacher.model(x[~is_talk], use_cache=False).last_hidden_state).log_softmax(-1)
            new = model.lm_head(h[~is_talk]).log_softmax(-1)
            moved = (old.exp() * (old - new)).sum(-1).mean()
            loss = loss + args.hold * moved
        loss.backward()
        if stored:
            stored.__exit__()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if not args.no_bias:
            move_biases(model, load, args.bias_step * max(rate, 0.1))
        step, seen = step + 1, seen + x.numel()
        if step % args.eval_every == 0:
            r = evaluate(model, stream, n_bytes, load=load)
            curve.append(dict(step=step, loss=r["loss"], balance=load.table()))
            if talk:
                curve[-1].update(evaluate_talk(model, TalkRows(held, tok, args.seed).spelled))
                r.update(curve[-1])
            say(f"  step {step}: held out {r}  load max/mean {[t['max_over_mean'] for t in load.table().values()]}")
            load.reset()
        if time.time() - last_say > 20:
            last_say = time.time()
            far = f"moved {moved.item():.3f} " if talk else ""
            say(f"step {step} {progress:.1%} epoch {rows.epochs} loss {main.item():.3f} mtp {ahead.item():.3f} {far}"
                f"{(seen - begun) / (time.time() - woke):.0f} tokens/s {time.time() - start:.0f} s")
        if args.export_minutes and time.time() - last_export > 60 * args.export_minutes:
            last_export = time.time()
            export(model, tok_json, args.out, args.sampling)
            save_state()
        if step == args.stop:
            save_state()
            break
    exact = evaluate(model, stream, n_bytes, load=load)
    balance = load.table()
    with Stored(model):
        fp8 = evaluate(model, stream, n_bytes)
    export(model, tok_json, args.out, args.sampling)
    print(json.dumps(dict(steps=step, tokens=seen, epochs=rows.epochs, seconds=round(time.time() - start), params=params,
                          exact=exact, stored=fp8, balance=balance, curve=curve)), flush=True)


@torch.no_grad()
def settle(args, tales, tok_json):
    """Only the routers' biases of a directory move, by the load of plain rows and conversations in equal parts. While weights
    still learn the routers run ahead of a bias whose steps have become small, and the rows of the chat stage are other text."""
    torch.manual_seed(args.seed)
    tok = Tokenizer.from_file(str(Path(args.settle) / "tokenizer.json"))
    model = load_checked(args.settle)
    model.eval()
    rows, talk, load = Rows(tales, [], tok_json, 0.0, 0.0, 0.0, args.seed), TalkRows(tales, tok, args.seed), Load(model)
    for step in range(args.steps):
        rate = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        ids, _, mask, position, _ = talk.join(rows.take(args.batch, CONTEXT, 1.0), 2 * step, 0.0)
        load.reset()
        h = model.model(ids[:, :-1], attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        model.mtp(model, h[:, :-1], ids[:, 1:-1], mask[:, :, :-1, :-1], position[:, :-1])
        move_biases(model, load, args.bias_step * max(rate, 0.02))
        if step % 50 == 0:
            say(f"step {step}  load max/mean {[t['max_over_mean'] for t in load.table().values()]}")
    export(model, tok_json, args.out, args.sampling)


def check(args, held):
    """Everything a reader of the directory can verify without the training state."""
    tok = Tokenizer.from_file(str(Path(args.check) / "tokenizer.json"))
    model = load_checked(args.check)
    load = Load(model)
    stream, n_bytes = held_stream(held, tok), sum(len(t.encode()) for t in held)
    r = evaluate(model, stream, n_bytes, load=load)
    model.eval()
    print(json.dumps(dict(r, balance=load.table(), bytes=n_bytes,
                          disk=sum(f.stat().st_size for f in Path(args.check).iterdir()))))
    for seed, prompt in enumerate(args.prompt or ["Once upon a time there was a", "THE KING AND THE FOX\n\n"], 1):
        ids = sample(model, tok, prompt, args.n, args.temperature, args.top_p, seed)
        own = evaluate(model, ids, 1)["mtp_accept"]
        model.eval()
        print(f"--- seed {seed}, temperature {args.temperature}, top-p {args.top_p}; on this text the MTP layer's first "
              f"choice is the model's {own:.0%} of the time\n{tok.decode(ids, skip_special_tokens=True)}")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--corpus", type=Path, default=SHARED / "corpus")
    a.add_argument("--out", type=Path, default=ROOT / "examples/tiny")
    a.add_argument("--check", metavar="DIR", help="load DIR with transformers, measure it, write two samples")
    a.add_argument("--bigram", action="store_true", help="print the bigram's loss on the held-out tales")
    a.add_argument("--steps", type=int, default=2300)
    a.add_argument("--minutes", type=float, default=0, help="let the clock end the run instead of --steps")
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--batch", type=int, default=2, help=f"rows of {CONTEXT} tokens a step")
    a.add_argument("--lr", type=float, default=4e-3)
    a.add_argument("--warm", type=int, default=100, help="steps in which the learning rate rises")
    a.add_argument("--decay", type=float, default=0.1)
    a.add_argument("--dropout", type=float, default=0.1)
    a.add_argument("--bpe-dropout", type=float, default=0.05)
    a.add_argument("--bpe-until", type=float, default=0.75, help="share of the run with --bpe-dropout")
    a.add_argument("--plays", type=float, default=0.0, help="share of tinyshakespeare mixed in at the start")
    a.add_argument("--start", type=int, default=240, help="steps of the start from the bigram; 0: none")
    a.add_argument("--mtp", type=float, default=0.3, help="weight of the MTP loss")
    a.add_argument("--long", type=float, default=0.02, help=f"last part of the run, with rows of {LONG} tokens")
    a.add_argument("--qat", type=float, default=0.1, help="last part of the run, with the weights as stored")
    a.add_argument("--bias-step", type=float, default=4e-3, help="falls with the learning rate to a tenth")
    a.add_argument("--no-bias", action="store_true", help="leave the router's bias at 0")
    a.add_argument("--dense", action="store_true", help="no experts; the same active size")
    a.add_argument("--attention", default="eager")
    a.add_argument("--experts", default="eager")
    a.add_argument("--eval-every", type=int, default=250)
    a.add_argument("--stop", type=int, default=0, help="end after this step of a run planned for --steps")
    a.add_argument("--export-minutes", type=float, default=0, help="export (and write --state) this often on the way")
    a.add_argument("--state", default="train_tiny.state")
    a.add_argument("--resume", metavar="STATE", help="go on from a state file")
    a.add_argument("--chat", metavar="DIR", help="a last stage: conversations, from the stored weights of DIR")
    a.add_argument("--settle", metavar="DIR", help="behind --chat: --steps in which only the routers' biases of DIR move")
    a.add_argument("--hold", type=float, default=1.0, help="--chat: weight of the distance to DIR on plain rows")
    a.add_argument("--tune", metavar="STATE", help="a new, short run that starts with the weights of a state file")
    a.add_argument("--temperature", type=float, default=0.6)
    a.add_argument("--top-p", type=float, default=0.9)
    a.add_argument("--prompt", action="append")
    a.add_argument("-n", type=int, default=250, help="tokens of each sample of --check")
    args = a.parse_args()
    args.sampling = dict(temperature=args.temperature, top_p=args.top_p)
    torch.set_num_threads(args.threads)
    tales, held = split_tales(read_tales(args.corpus))
    if args.check:
        return check(args, held)
    tok_json = train_tokenizer(tales)
    if args.settle:
        return settle(args, tales, tok_json)
    if args.bigram:
        tok = Tokenizer.from_str(json.dumps(tok_json))
        stream = held_stream(held, tok)
        p, _ = bigram(held_stream(tales, tok))
        return print(json.dumps(bigram_loss(p, stream, sum(len(t.encode()) for t in held))))
    train(args, tales, held, tok_json)


if __name__ == "__main__":
    main()
