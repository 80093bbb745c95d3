"""DeepSeek's own inference code, written again in plain torch, with its choices as switches.

Line numbers refer to deepseek-ai/DeepSeek-V3 at 9b4e978: [m.N] is inference/model.py,
[k.N] inference/kernel.py. Nothing is copied: the point is to state what that code
computes, and to measure how far each of its choices is from transformers' and from
this library's. One process, no distribution [m.124-139, 262-265, 794-797].

Where it differs from transformers:
  router      a linear and a sigmoid in the model's dtype, bf16 [m.576-580]; f32 elsewhere
  bias        exists only where dim == 7168 [m.564]: no small model has one there
  norms       eps is 1e-6, always [m.278], with one rounding after the weight [m.294]
  attention   scores and outputs through the latent cache, "absorb" [m.481-495], or "naive" [m.471-479]
  weights     FP8 becomes bf16(fp8 * scale) before use [m.155-157, k.83-86, k.107]
  inputs      with gemm_impl "fp8" they are quantised too, 128 at a time [m.159-160, k.25-35];
              V3.1's power-of-two scales reach only plain Linear layers [m.205 against m.233, 262]
  YaRN        frequencies and scale change only if max_seq_len > original_seq_len [m.367, m.435];
              no amplitude on cos and sin at all; mscale plays mscale_all_dim's part [m.436]
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 128                                            # [m.15]


@dataclass
class Choices:
    dtype: torch.dtype = torch.bfloat16                # of activations and unquantised weights [m.802]
    attention: str = "absorb"                          # "absorb" or "naive" [m.17]
    router: str = "model"                              # "model" (dtype) or "f32"
    gemm: str = "bf16"                                 # FP8 weights: "bf16" (round the product), "exact" (f32), "fp8" (W8A8) [m.16]
    scale_fmt: str = None                              # "ue8m0": activation scales are powers of two
    eps: float = 1e-6                                  # [m.278]
    yarn: bool = True                                  # max_seq_len > original_seq_len
    bias: bool = True                                  # as if dim were 7168 [m.564]
    frequencies: torch.Tensor = None                   # inverse frequencies from elsewhere


# ---------------------------------------------------------------- kernels

def act_quant(x, scale_fmt):
    """[k.25-35] per token and 128 channels: s = max(amax, 1e-4) / 448, y = e4m3(x / s)."""
    if x.shape[-1] % BLOCK:
        raise ValueError(f"act_quant needs widths in multiples of {BLOCK}, got {x.shape[-1]}")   # [k.52]
    groups = x.float().unflatten(-1, (-1, BLOCK))
    s = groups.abs().amax(-1).clamp_min(1e-4) / 448.0
    if scale_fmt == "ue8m0":
        s = torch.exp2(torch.ceil(torch.log2(s)))
    y = (groups / s.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return y, s


def fp8_gemm(x, weight, scale, scale_fmt, dtype):
    """[k.145-172] f32 sums of 128, each times both scales, blocks in order, one rounding at the end."""
    y, s = act_quant(x, scale_fmt)
    out = torch.zeros(*x.shape[:-1], weight.shape[0])
    rows = torch.arange(weight.shape[0]) // BLOCK      # [k.154]
    for b in range(s.shape[-1]):
        part = y[..., b, :].float() @ weight[:, b * BLOCK:(b + 1) * BLOCK].float().T
        out += part * s[..., b, None] * scale[rows, b]
    return out.to(dtype)


# ---------------------------------------------------------------- rotary

def rotary_frequencies(c, ch):
    """[m.366-370], with the correction range of [m.314-364]."""
    dim, theta = c["qk_rope_head_dim"], float(c["rope_theta"])
    f = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    scaling = c.get("rope_scaling")
    if not scaling or not ch.yarn:
        return f

    def turn(rotations):
        return dim * math.log(scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turn(scaling["beta_fast"])), 0)
    high = min(math.ceil(turn(scaling["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low + (0.001 if low == high else 0))).clamp(0, 1)
    smooth = 1 - ramp
    return f / scaling["factor"] * (1 - smooth) + f * smooth


def rotate(x, angle):
    """[m.389-393] pairs (2i, 2i+1) as complex numbers, in f32 (f64 in the f64 run), back to x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(angle, dtype=wide), angle.to(wide))      # [m.374]
    turn = turn.view(angle.shape[0], *[1] * (x.dim() - 2), angle.shape[1])
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------- the model

class Official:
    """One sequence from position 0, all logits: [n] ids -> [n][vocab]."""

    def __init__(self, config, stored, choices):
        self.c, self.ch, self.w, self.s = config, choices, {}, {}
        for name, t in stored.items():
            if name.endswith("_scale_inv"):
                self.s[name[:-len("_scale_inv")]] = t
            elif t.dtype == torch.float8_e4m3fn or name.endswith("e_score_correction_bias"):
                self.w[name] = t                       # the bias stays f32 [m.564]
            else:
                self.w[name] = t.to(choices.dtype)
        self.experts = []                              # [layer] -> [n][K]
        heads = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        self.scale = heads ** -0.5                     # [m.434]
        scaling = config.get("rope_scaling")
        if scaling and choices.yarn:                   # [m.435-437]
            m = 0.1 * scaling.get("mscale_all_dim", 0) * math.log(scaling["factor"]) + 1.0
            self.scale *= m * m

    def weight(self, name):
        """[k.83-86, k.107] the dequantised weight, in the default dtype; "exact" keeps the f32 product."""
        w = self.w[name]
        if w.dtype != torch.float8_e4m3fn:
            return w
        full = self.s[name].repeat_interleave(BLOCK, 0)[:w.shape[0]].repeat_interleave(BLOCK, 1)[:, :w.shape[1]]
        product = w.float() * full
        return product.to(self.ch.dtype) if self.ch.gemm == "exact" else product.to(torch.bfloat16).to(self.ch.dtype)

    def linear(self, x, name, plain=True):
        """[m.153-163]; `plain`: class Linear, which alone passes scale_fmt on [m.205]."""
        w = self.w[name]
        if w.dtype == torch.float8_e4m3fn and self.ch.gemm == "fp8":
            return fp8_gemm(x, w, self.s[name], self.ch.scale_fmt if plain else None, self.ch.dtype)
        return F.linear(x, self.weight(name))

    def norm(self, x, name, eps=None):
        """[m.294] f32 inside (f64 in the f64 run), the weight too, one rounding."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        y = x.to(wide)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + (self.ch.eps if eps is None else eps))
        return (y * self.w[name].to(wide)).to(x.dtype)

    def attend(self, q_latent, q_pe, kv, k_pe, mask):
        """[m.486-494] the softmax over positions t, of the latents: [s][h][c]."""
        wide = torch.float64 if kv.dtype == torch.float64 else torch.float32
        scores = (torch.einsum("shc,tc->sht", q_latent, kv) + torch.einsum("shr,tr->sht", q_pe, k_pe)) * self.scale
        p = (scores + mask.unsqueeze(1)).softmax(-1, dtype=wide).to(kv.dtype)
        return torch.einsum("sht,tc->shc", p, kv)

    def values(self, u, w_uv, name):
        """[m.495] what the sums of latents [s][h][c] are worth to each head: [s][h][d]."""
        return torch.einsum("shc,hdc->shd", u, w_uv)

    def attention(self, x, at, angle):
        """[m.446-497]"""
        c, n = self.c, x.shape[0]
        heads, nope, latent = c["num_attention_heads"], c["qk_nope_head_dim"], c["kv_lora_rank"]
        if c["q_lora_rank"] is None:
            q = self.linear(x, at + "q_proj.weight", False)
        else:
            q = self.linear(x, at + "q_a_proj.weight")
            q = self.linear(self.norm(q, at + "q_a_layernorm.weight", 1e-6), at + "q_b_proj.weight", False)
        q_nope, q_pe = q.view(n, heads, -1).split([nope, c["qk_rope_head_dim"]], -1)
        q_pe = rotate(q_pe, angle)
        kv, k_pe = self.linear(x, at + "kv_a_proj_with_mqa.weight").split([latent, c["qk_rope_head_dim"]], -1)
        k_pe = rotate(k_pe, angle)
        kv = self.norm(kv, at + "kv_a_layernorm.weight", 1e-6)
        mask = torch.full((n, n), float("-inf"), dtype=x.dtype).triu_(1)            # [m.789]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self.ch.attention == "naive":                                            # [m.471-479]
            both = self.linear(kv, at + "kv_b_proj.weight", False).view(n, heads, -1)
            k_nope, v = both[..., :nope], both[..., nope:]
            k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, heads, -1)], -1)
            scores = torch.einsum("shd,thd->sht", torch.cat([q_nope, q_pe], -1), k) * self.scale
            p = (scores + mask.unsqueeze(1)).softmax(-1, dtype=wide).to(x.dtype)
            out = torch.einsum("sht,thd->shd", p, v)
        else:                                                                       # [m.481-495]
            w = self.weight(at + "kv_b_proj.weight").view(heads, -1, latent)
            q_latent = torch.einsum("shd,hdc->shc", q_nope, w[:, :nope])
            out = self.attend(q_latent, q_pe, kv, k_pe, mask)
            out = self.values(out, w[:, nope:], at + "kv_b_proj.weight")
        return self.linear(out.flatten(1), at + "o_proj.weight", False)

    def mlp(self, x, at, plain=False):
        """[m.532], [m.633]: experts are plain Linear layers, the others column and row parallel ones."""
        gate, up = self.linear(x, at + "gate_proj.weight", plain), self.linear(x, at + "up_proj.weight", plain)
        return self.linear(F.silu(gate) * up, at + "down_proj.weight", plain)

    def route(self, x, at):
        """[m.566-598]"""
        c, w = self.c, self.w[at + "gate.weight"]
        sigmoid = c["model_type"] != "deepseek_v2"
        if self.ch.router == "f32":
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            z = F.linear(x.to(wide), w.to(wide))
        else:
            z = F.linear(x, w)
        if sigmoid:
            scores = z.sigmoid()
        else:
            scores = z.softmax(-1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        choice, bias = scores, self.w.get(at + "gate.e_score_correction_bias") if self.ch.bias else None
        if bias is not None:
            choice = choice + bias
        if c["n_group"] > 1:
            members = choice.view(len(x), c["n_group"], -1)
            best = members.amax(-1) if bias is None else members.topk(2, -1).values.sum(-1)
            out = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(c["topk_group"], -1).indices, False)
            choice = members.masked_fill(out.unsqueeze(-1), float("-inf")).flatten(1)
        chosen = choice.topk(c["num_experts_per_tok"], -1).indices
        weights = scores.gather(1, chosen)
        if sigmoid:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * c["routed_scaling_factor"]).to(x.dtype), chosen

    def moe(self, x, at):
        """[m.679-693]: experts in ascending order, accumulated in the model's dtype."""
        weights, chosen = self.route(x, at)
        self.experts.append(chosen.sort(-1).values)
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            rows, slot = torch.where(chosen == e)
            y[rows] += self.mlp(x[rows], f"{at}experts.{e}.", plain=True) * weights[rows, slot, None]
        return y + self.mlp(x, at + "shared_experts.")

    @torch.no_grad()
    def __call__(self, ids):
        """[m.773-798], the head over all positions."""
        self.experts = []
        f = self.ch.frequencies if self.ch.frequencies is not None else rotary_frequencies(self.c, self.ch)
        angle = torch.outer(torch.arange(len(ids), dtype=torch.float32), f)         # [m.372-373]
        x = self.w["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(self.c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, at + "input_layernorm.weight"), at + "self_attn.", angle)
            y = self.norm(x, at + "post_attention_layernorm.weight")
            x = x + (self.moe(y, at + "mlp.") if layer >= self.c["first_k_dense_replace"] else self.mlp(y, at + "mlp."))
        return self.linear(self.norm(x, "model.norm.weight"), "lm_head.weight", False)


# ---------------------------------------------------------------- what is compared

def variants(config):
    """(what, its choices) in the order of the printed table. eps follows the config unless it is the subject."""
    quantised = "quantization_config" in config
    f32 = dict(dtype=torch.float32, router="f32", gemm="exact", eps=config["rms_norm_eps"])
    out = [("f32, naive attention", Choices(**{**f32, "attention": "naive"})),
           ("f32, absorbed attention", Choices(**f32))]
    if config["rms_norm_eps"] != 1e-6:
        out.append(("f32, eps 1e-6 in every norm", Choices(**{**f32, "eps": 1e-6})))
    if config.get("rope_scaling"):
        out.append(("f32, opened for no more than the original length", Choices(**{**f32, "yarn": False})))
    if config["model_type"] != "deepseek_v2":
        out.append(("f32, no bias (dim is not 7168)", Choices(**{**f32, "bias": False})))
    if quantised:
        out.append(("f32, weights rounded to bf16", Choices(**{**f32, "gemm": "bf16"})))
        out.append(("f32, activations quantised", Choices(**{**f32, "gemm": "fp8"})))
        out.append(("f32, activations quantised, ue8m0", Choices(**{**f32, "gemm": "fp8", "scale_fmt": "ue8m0"})))
    bf16 = dict(eps=config["rms_norm_eps"])
    out.append(("bf16, absorbed, router f32", Choices(**bf16, router="f32")))
    out.append(("bf16, absorbed, router bf16 (as published)", Choices(**bf16)))
    out.append(("bf16, naive, router bf16", Choices(**bf16, attention="naive")))
    if quantised:
        out.append(("bf16, activations quantised (fp8 gemm)", Choices(**bf16, gemm="fp8")))
    return out
