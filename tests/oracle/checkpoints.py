"""Small checkpoints written on the fly: configurations, weights that live, files.

Each Spec is one directory in the layout of an official release (config.json,
model.safetensors or shards with an index, per-expert tensor names). The weights
follow one recipe, chosen so that every part of the network shows in the logits:

  every linear       N(0, (g / sqrt(fan_in))^2), g = 1; q_b_proj and q_proj 1.5, router 2
  embedding          N(0, 1)
  norm weights       1 + 0.2 N(0, 1)
  router bias        0.1 N(0, 1)

Default-initialised models (std 0.02) would be useless here: their attention is
uniform, their router indifferent, and a wrong softmax scale or a missing bias
changes nothing that a comparison could see.
"""

import json
import math
import os
import shutil
import struct
import zlib
from dataclasses import dataclass, field
from typing import Callable, Optional

import torch

BLOCK = 128          # FP8 weights carry one scale per 128 x 128 block
FP8_MAX = 448.0
EOS = 1              # its head row is nearly zero, so that greedy text never ends early
FIRST_PROMPT_ID = 3

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}
DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
}


# ---------------------------------------------------------------- configurations

def yarn(factor=4, original=64, beta_fast=32, beta_slow=1, **mscales):
    return {"type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "beta_fast": beta_fast, "beta_slow": beta_slow, **mscales}


def v3(**changes):
    """T1: DeepSeek-V3 made small. eps is 1e-5 on purpose (the latent norms keep 1e-6)."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "max_position_embeddings": 256,
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_scaling": yarn(mscale=1.0, mscale_all_dim=1.0),
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 24,
        "vocab_size": 128,
    }
    config.update(changes)
    if "num_attention_heads" in changes:
        config["num_key_value_heads"] = config["num_attention_heads"]
    return {key: value for key, value in config.items() if value is not DROP}


DROP = object()      # v3(key=DROP) leaves the key out of config.json


def v2(**changes):
    """The V2 family: softmax router, no bias, no normalisation, mscale 0.707 on both sides."""
    settings = dict(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2",
                    scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
                    routed_scaling_factor=1.0, n_group=1, topk_group=1, q_lora_rank=None,
                    rms_norm_eps=1e-6, num_nextn_predict_layers=DROP,
                    rope_scaling=yarn(factor=40, original=64, mscale=0.707, mscale_all_dim=0.707),
                    max_position_embeddings=2560)
    settings.update(changes)
    return v3(**settings)


FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
              "weight_block_size": [BLOCK, BLOCK]}


def fp8(**changes):
    """Widths as FP8 blocks meet them: D 256, and C + dr = 192 rows, so a ragged last block."""
    settings = dict(hidden_size=256, intermediate_size=384, moe_intermediate_size=128, n_shared_experts=1,
                    q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64,
                    max_position_embeddings=4096, rms_norm_eps=1e-6,
                    rope_scaling=yarn(factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0),
                    quantization_config=dict(FP8_CONFIG))
    settings.update(changes)
    return v3(**settings)


# ---------------------------------------------------------------- the list

@dataclass
class Spec:
    name: str
    about: str
    config: dict
    dtype: str = "bf16"                  # bf16, f16, f32, fp8
    scales: str = "plain"                # fp8: plain, or ue8m0 (powers of two, still stored as F32)
    shards: int = 0                      # 0: one model.safetensors
    shard_name: str = "model-{:05d}-of-{:06d}.safetensors"
    odd: bool = False                    # odd header length: no tensor is aligned to anything
    # Tensors that logits do not depend on: "inv_freq"; "mtp" or "mtp-dense": prediction layers, with "shared" less their
    # copies of embedding and head.
    junk: tuple = ()
    tweak: Optional[Callable] = None     # (name, drawn tensor, config): a last change, in place
    stored_as: Optional[Callable] = None  # tensor name -> dtype, where it is not `dtype`
    prompt: int = 48
    steps: int = 64                      # greedy continuation
    chunk: int = 0                       # rows the reference runs at a time (0: all)
    heavy: bool = False                  # large: left out by --quick
    f64: bool = True
    live: bool = True                    # False: the liveness asserts of the recipe do not apply in full


def small_latents(name, w, config):
    """T1e: latent mean square about 1e-6, so that the eps of the latent norms is visible."""
    if name.endswith("q_a_proj.weight"):
        w *= 1e-3
    if name.endswith("kv_a_proj_with_mqa.weight"):
        w[:config["kv_lora_rank"]] *= 1e-3


def negative_biases(name, w, config):
    """T1x: every choice score is negative, so that masking excluded groups with 0 picks from them."""
    if name.endswith("e_score_correction_bias"):
        w -= 1.5


def small_embedding(name, w, config):
    """The first norm sees a mean square near its eps, so that the config's eps is visible."""
    if name == "model.embed_tokens.weight":
        w *= 3e-3


def embedding_as_head(name, w, config):
    """An embedding that also serves as head: as a linear layer it wants the gain of one."""
    if name == "model.embed_tokens.weight":
        w /= math.sqrt(config["hidden_size"])


def norms_f32(name):
    """V3.2 stores norms as F32; router in F32 and its bias in BF16 are legal too."""
    if "norm" in name or name.endswith("mlp.gate.weight"):
        return torch.float32
    if name.endswith("e_score_correction_bias"):
        return torch.bfloat16
    return None


def half_fp8(name):
    """A release that quantises some modules only: the header of each tensor decides."""
    return torch.bfloat16 if ".layers.1." in name or "o_proj" in name else None


def specs():
    plain = dict(rope_scaling=DROP)
    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "type": "yarn",
                  "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0,
                  "mscale": 1.0, "mscale_all_dim": 1.0}
    bare = {key: DROP for key in ("attention_bias", "attention_dropout", "ep_size", "initializer_range", "use_cache",
                                  "moe_layer_freq", "num_nextn_predict_layers", "tie_word_embeddings",
                                  "scoring_func", "topk_method", "torch_dtype")}
    return [
        # The V3 branch and one change at a time.
        Spec("t1", "DeepSeek-V3 made small", v3()),
        Spec("t1q", "q_lora_rank null", v3(q_lora_rank=None)),
        Spec("t1p", "plain RoPE, no rope_scaling", v3(**plain)),
        Spec("t1g", "one group", v3(n_group=1, topk_group=1)),
        Spec("t1m", "mscale 1, mscale_all_dim 0.707", v3(rope_scaling=yarn(mscale=1.0, mscale_all_dim=0.707))),
        Spec("t1a", "YaRN without mscale keys", v3(rope_scaling=yarn())),
        Spec("t1h", "rope_interleave false", v3(rope_interleave=False)),
        Spec("t1d", "dense layers only", v3(first_k_dense_replace=3)),
        Spec("t1s", "sparse layers only", v3(first_k_dense_replace=0, num_hidden_layers=2)),
        Spec("t1u", "norm_topk_prob false", v3(norm_topk_prob=False)),
        Spec("t1x", "biases shifted by -1.5", v3(), tweak=negative_biases),
        Spec("t1e", "latents near the latent eps", v3(), tweak=small_latents),
        Spec("t1n", "embeddings near the config's eps", v3(), tweak=small_embedding),
        Spec("tied", "tied embeddings, no lm_head", v3(tie_word_embeddings=True), tweak=embedding_as_head),
        # How a checkpoint is written.
        Spec("f32", "F32 file", v3(torch_dtype="float32"), dtype="f32"),
        Spec("f16", "F16 file", v3(torch_dtype="float16"), dtype="f16"),
        Spec("mixed", "norms and router F32, bias BF16", v3(), stored_as=norms_f32),
        Spec("shards", "seven shards with an index", v3(), shards=7),
        Spec("odd", "odd header length, nothing aligned", v3(), odd=True),
        Spec("parameters", "rope_parameters, dtype", v3(rope_scaling=DROP, rope_theta=DROP, rope_parameters=parameters,
                                                        torch_dtype=DROP, dtype="bfloat16", head_dim=16)),
        Spec("bare", "only the keys that matter", v3(**bare)),
        Spec("mtp", "MTP layer present", v3(num_nextn_predict_layers=1), junk=("mtp",)),
        # Widths that divide by nothing.
        Spec("widths", "5 heads, widths off every lane count",
             v3(hidden_size=52, intermediate_size=90, moe_intermediate_size=23, num_attention_heads=5, q_lora_rank=27,
                kv_lora_rank=41, qk_nope_head_dim=19, qk_rope_head_dim=10, v_head_dim=29, vocab_size=131)),
        Spec("widths-f32", "the same in F32",
             v3(hidden_size=52, intermediate_size=90, moe_intermediate_size=23, num_attention_heads=5, q_lora_rank=27,
                kv_lora_rank=41, qk_nope_head_dim=19, qk_rope_head_dim=10, v_head_dim=29, vocab_size=131,
                torch_dtype="float32"), dtype="f32", odd=True),
        # The family.
        Spec("v3-router", "256 experts, 8 groups, top-8 of 4",
             v3(n_routed_experts=256, n_group=8, topk_group=4, num_experts_per_tok=8, num_hidden_layers=2,
                n_shared_experts=1)),
        Spec("v2-lite", "softmax greedy, mscale 0.707", v2()),
        Spec("v2-groups", "group_limited_greedy, scale 16",
             v2(topk_method="group_limited_greedy", n_routed_experts=40, n_group=8, topk_group=3, num_experts_per_tok=6,
                routed_scaling_factor=16.0, q_lora_rank=48, rope_scaling=yarn(factor=40, original=64, mscale=1.0,
                                                                              mscale_all_dim=1.0))),
        Spec("kimi-k2", "384 experts, one group, beta 1/1",
             v3(model_type="kimi_k2", n_routed_experts=384, n_group=1, topk_group=1, num_experts_per_tok=8,
                n_shared_experts=1, num_hidden_layers=2, routed_scaling_factor=2.827, rope_theta=50000.0,
                rms_norm_eps=1e-6, qk_rope_head_dim=64, max_position_embeddings=131072,
                rope_scaling=yarn(factor=32.0, original=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0,
                                  mscale_all_dim=1.0)),
             shards=3, shard_name="model-{}-of-{}.safetensors", junk=("inv_freq",)),
        Spec("kimi-k2-thinking", "factor 64, eps 1e-5",
             v3(model_type="kimi_k2", n_routed_experts=48, n_group=1, topk_group=1, num_experts_per_tok=8,
                n_shared_experts=1, routed_scaling_factor=2.827, rope_theta=50000.0, qk_rope_head_dim=64,
                max_position_embeddings=262144,
                rope_scaling=yarn(factor=64.0, original=4096, beta_fast=1.0, beta_slow=1.0, mscale=1.0,
                                  mscale_all_dim=1.0)), junk=("inv_freq",)),
        Spec("moonlight", "no q_lora, plain RoPE, eps 1e-5",
             v3(q_lora_rank=None, n_group=1, topk_group=1, n_routed_experts=32, num_experts_per_tok=6,
                routed_scaling_factor=2.446, rope_theta=50000.0, max_position_embeddings=8192, **plain)),
        Spec("gigachat3", "v_head_dim 192, nope 128, C 512",
             v3(q_lora_rank=None, hidden_size=96, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=192, n_group=1, topk_group=1, num_experts_per_tok=4, n_shared_experts=1, rms_norm_eps=1e-6,
                rope_theta=100000, max_position_embeddings=262144, num_nextn_predict_layers=1,
                rope_scaling=yarn(factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0)), junk=("mtp",)),
        Spec("joyai", "theta 3.2e7, MTP layer with a dense MLP",
             v3(model_type="joyai_llm_flash", n_group=1, topk_group=1, n_routed_experts=64, num_experts_per_tok=8,
                n_shared_experts=1, qk_rope_head_dim=64, rope_theta=32000000, rms_norm_eps=1e-6,
                max_position_embeddings=131072, num_nextn_predict_layers=1, **plain), junk=("mtp-dense",)),
        Spec("glm-widths", "192/64/256, 5 heads", v3(num_attention_heads=5, hidden_size=80, q_lora_rank=48, kv_lora_rank=128,
                                                     qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, n_group=1,
                                                     topk_group=1, num_experts_per_tok=4, n_shared_experts=1,
                                                     rope_scaling=None, rope_theta=1000000, max_position_embeddings=4096)),
        # FP8.
        Spec("fp8", "FP8 128x128, ragged kv_a", fp8(), dtype="fp8"),
        Spec("fp8-ue8m0", "scales are powers of two",
             fp8(quantization_config=dict(FP8_CONFIG, scale_fmt="ue8m0")), dtype="fp8", scales="ue8m0"),
        Spec("fp8-ragged", "no width a multiple of 128",
             fp8(hidden_size=200, intermediate_size=296, moe_intermediate_size=72, q_lora_rank=136, kv_lora_rank=88,
                 qk_nope_head_dim=40, qk_rope_head_dim=24, v_head_dim=56, n_shared_experts=3), dtype="fp8"),
        Spec("fp8-odd", "odd widths and an odd header",
             fp8(hidden_size=149, intermediate_size=263, moe_intermediate_size=65, q_lora_rank=131, kv_lora_rank=75,
                 qk_nope_head_dim=21, qk_rope_head_dim=14, v_head_dim=37, num_attention_heads=3), dtype="fp8", odd=True),
        Spec("fp8-shards", "weights and scales in different shards", fp8(), dtype="fp8", shards=5),
        Spec("fp8-mixed", "one layer and every o_proj in BF16",
             fp8(quantization_config=dict(FP8_CONFIG, modules_to_not_convert=["model.layers.1", "o_proj"])),
             dtype="fp8", stored_as=half_fp8),
        Spec("fp8-mtp", "with an MTP layer, as V3 stores it", fp8(num_nextn_predict_layers=1), dtype="fp8", junk=("mtp",)),
        Spec("fp8-lite", "V2-Lite in FP8, width 171 = 1.34 blocks",
             v2(hidden_size=256, intermediate_size=171, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32,
                v_head_dim=32, quantization_config=dict(FP8_CONFIG)), dtype="fp8"),
        # Positions.
        Spec("far", "4 times YaRN's original length",
             v3(num_hidden_layers=2, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2,
                max_position_embeddings=512), prompt=256),
        Spec("far-lite", "the same for V2",
             v2(num_hidden_layers=2, n_routed_experts=8, num_experts_per_tok=2), prompt=256),
        Spec("far-v3", "V3's own YaRN, 3 times its 4096",
             v3(first_k_dense_replace=2, num_hidden_layers=2, num_attention_heads=2, qk_rope_head_dim=64, hidden_size=48,
                rms_norm_eps=1e-6, max_position_embeddings=163840,
                rope_scaling=yarn(factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0)),
             prompt=12600 - 64, chunk=512, heavy=True),
        # Real widths, few layers.
        Spec("wide-lite", "V2-Lite's widths, 2 layers, 8 experts",
             v2(hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_attention_heads=16,
                kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=8,
                num_experts_per_tok=3, num_hidden_layers=2, vocab_size=1024,
                rope_scaling=yarn(factor=40, original=4096, mscale=0.707, mscale_all_dim=0.707),
                max_position_embeddings=163840), heavy=True),
        Spec("wide-v3", "V3's widths, one layer, 6 experts, FP8",
             fp8(hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_attention_heads=128,
                 q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                 n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0,
                 num_hidden_layers=1, vocab_size=1024, max_position_embeddings=163840),
             dtype="fp8", prompt=32, heavy=True, f64=False),
    ]


# ---------------------------------------------------------------- weights

def layer_tensors(config, layer, sparse):
    """Name -> shape of one decoder layer, official names."""
    c = config
    heads, nope, rope, v = (c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"])
    width, latent, rank = c["hidden_size"], c["kv_lora_rank"], c.get("q_lora_rank")
    at = f"model.layers.{layer}."
    out = {at + "input_layernorm.weight": (width,), at + "post_attention_layernorm.weight": (width,)}
    if rank is None:
        out[at + "self_attn.q_proj.weight"] = (heads * (nope + rope), width)
    else:
        out[at + "self_attn.q_a_proj.weight"] = (rank, width)
        out[at + "self_attn.q_a_layernorm.weight"] = (rank,)
        out[at + "self_attn.q_b_proj.weight"] = (heads * (nope + rope), rank)
    out[at + "self_attn.kv_a_proj_with_mqa.weight"] = (latent + rope, width)
    out[at + "self_attn.kv_a_layernorm.weight"] = (latent,)
    out[at + "self_attn.kv_b_proj.weight"] = (heads * (nope + v), latent)
    out[at + "self_attn.o_proj.weight"] = (width, heads * v)

    def mlp(prefix, inner):
        out[prefix + "gate_proj.weight"] = (inner, width)
        out[prefix + "up_proj.weight"] = (inner, width)
        out[prefix + "down_proj.weight"] = (width, inner)

    if not sparse:
        mlp(at + "mlp.", c["intermediate_size"])
        return out
    out[at + "mlp.gate.weight"] = (c["n_routed_experts"], width)
    if c["model_type"] != "deepseek_v2":
        out[at + "mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
    for e in range(c["n_routed_experts"]):
        mlp(at + f"mlp.experts.{e}.", c["moe_intermediate_size"])
    mlp(at + "mlp.shared_experts.", c["moe_intermediate_size"] * c["n_shared_experts"])
    return out


def tensor_shapes(spec):
    """Name -> shape of everything the reference needs, then of what it must ignore."""
    c, used, ignored = spec.config, {}, {}
    used["model.embed_tokens.weight"] = (c["vocab_size"], c["hidden_size"])
    for layer in range(c["num_hidden_layers"]):
        used.update(layer_tensors(c, layer, layer >= c["first_k_dense_replace"]))
    used["model.norm.weight"] = (c["hidden_size"],)
    if not c.get("tie_word_embeddings", False):
        used["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])

    width, last = c["hidden_size"], c["num_hidden_layers"]
    if "mtp" in spec.junk or "mtp-dense" in spec.junk:
        for layer in range(last, last + c["num_nextn_predict_layers"]):
            at = f"model.layers.{layer}."
            ignored.update(layer_tensors(c, layer, "mtp" in spec.junk))
            ignored.update({at + "enorm.weight": (width,), at + "hnorm.weight": (width,),
                            at + "eh_proj.weight": (width, 2 * width), at + "shared_head.norm.weight": (width,)})
            if "shared" not in spec.junk:
                ignored.update({at + "shared_head.head.weight": (c["vocab_size"], width),
                                at + "embed_tokens.weight": (c["vocab_size"], width)})
    if "inv_freq" in spec.junk:
        for layer in range(last):
            ignored[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (56,)
    return used, ignored


def draw_tensor(name, shape, generator):
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    if "norm" in name.split(".")[-2]:
        return 1 + 0.2 * noise
    if name.endswith("e_score_correction_bias"):
        return 0.1 * noise
    if "embed_tokens" in name or "inv_freq" in name:
        return noise
    gain = 2.0 if name.endswith("mlp.gate.weight") else 1.5 if "q_b_proj" in name or "q_proj" in name else 1.0
    return noise * (gain / math.sqrt(shape[-1]))


def is_fp8(name):
    """What the FP8 releases quantise: every projection; not embeddings, head, norms, router, eh_proj."""
    return name.endswith("_proj.weight") and "eh_proj" not in name or name.endswith("with_mqa.weight")


def quantise(w, scales):
    """f32 [rows][cols] -> E4M3 and one F32 scale per block; the blocks at the edges are smaller.

    Rows of blocks one after another: a whole large matrix would need several f32 copies of itself.
    """
    rows, cols = w.shape
    q = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK))
    for i in range(scale.shape[0]):
        band = w[i * BLOCK:(i + 1) * BLOCK]
        top = torch.nn.functional.pad(band.abs().amax(0), (0, -cols % BLOCK)).view(-1, BLOCK).amax(-1)
        scale[i] = (top / FP8_MAX).clamp_min(2.0 ** -100)
        if scales == "ue8m0":
            scale[i] = torch.exp2(torch.ceil(torch.log2(scale[i])))
        each = scale[i].repeat_interleave(BLOCK)[:cols]
        q[i * BLOCK:(i + 1) * BLOCK] = (band / each).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return q, scale


def dequantise(q, scale):
    """The f32 product that defines an FP8 weight: w[i][j] = fp8[i][j] * scale[i / 128][j / 128]."""
    w = q.to(torch.float32)
    for i in range(scale.shape[0]):
        w[i * BLOCK:(i + 1) * BLOCK] *= scale[i].repeat_interleave(BLOCK)[:q.shape[1]]
    return w


def draw(spec, seed):
    """Name -> tensor exactly as the file holds it (FP8 weights with their scales)."""
    generator = torch.Generator().manual_seed((zlib.crc32(spec.name.encode()) + 1_000_003 * seed) % 2 ** 63)
    used, ignored = tensor_shapes(spec)
    stored = {}
    for name, shape in {**used, **ignored}.items():
        w = draw_tensor(name, shape, generator)
        if name == "lm_head.weight" or name == "model.embed_tokens.weight" and "lm_head.weight" not in used:
            w[EOS] *= 0.01
        if spec.tweak:
            spec.tweak(name, w, spec.config)
        dtype = spec.stored_as(name) if spec.stored_as else None
        if spec.dtype == "fp8" and is_fp8(name) and dtype is None:
            stored[name], stored[name + "_scale_inv"] = quantise(w.to(torch.bfloat16).float(), spec.scales)
        elif dtype is None and name.endswith("e_score_correction_bias"):
            stored[name] = w
        else:
            stored[name] = w.to(dtype or DTYPES.get(spec.dtype, torch.bfloat16))
    return stored


# ---------------------------------------------------------------- files

def write_safetensors(path, tensors, odd=False):
    """One file. `odd`: the data begins at an odd offset, as the format allows."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        size = t.numel() * t.element_size()
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if odd:
        text += b" "
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for t in tensors.values():
            f.write(t.contiguous().view(torch.uint8).numpy().reshape(-1).data)


def write(spec, stored, directory):
    """A whole checkpoint directory, replacing what was there."""
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(spec.config, f, indent=2)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": EOS}
    with open(os.path.join(directory, "generation_config.json"), "w") as f:
        json.dump(generation, f, indent=2)
    names = sorted(stored, key=lambda n: zlib.crc32(n.encode())) if spec.odd else sorted(stored)
    if not spec.shards:
        write_safetensors(os.path.join(directory, "model.safetensors"), {n: stored[n] for n in names}, spec.odd)
        return
    # Round robin over the sorted names: a weight and its scale, a gate and its up, part company.
    where = {}
    for shard in range(spec.shards):
        file = spec.shard_name.format(shard + 1, spec.shards)
        part = {n: stored[n] for n in names[shard::spec.shards]}
        where.update({n: file for n in part})
        write_safetensors(os.path.join(directory, file), part, spec.odd)
    total = sum(t.numel() * t.element_size() for t in stored.values())
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, f, indent=2)


def prompt(spec, seed):
    generator = torch.Generator().manual_seed((zlib.crc32(spec.name.encode()) ^ 0x5eed) + 7919 * seed)
    return torch.randint(FIRST_PROMPT_ID, spec.config["vocab_size"], (spec.prompt,), generator=generator).tolist()
