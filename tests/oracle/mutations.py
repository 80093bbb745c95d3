"""Wrong models. A comparison that none of them fails would be worthless.

Each mutation changes transformers' model in one place, the way an implementation
could plausibly get it wrong; the program's logits must then be at least 100
tolerances away from it. `informative` mutations change nothing on the checkpoint
they run on, or too little: they are printed to show why the special checkpoints
t1x and t1e exist.
"""

import types
from dataclasses import dataclass
from typing import Callable

import torch

import reference
from checkpoints import BLOCK


@dataclass
class Mutation:
    label: str
    checkpoint: str
    change: Callable            # (model, weights, config) -> None, or a new model
    informative: bool = False


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


def sparse(model):
    return [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def each(modules, action):
    def change(model, weights, config):
        for m in modules(model):
            action(m, config)
    return change


def each_weight(edit):
    """Rebuilds the model from edited weights: edit(name, tensor, config) -> tensor or None (unchanged)."""
    def change(model, weights, config):
        edited = {}
        for name, w in weights.items():
            new = edit(name, w, config)
            edited[name] = w if new is None else new
        return reference.build(config, edited)
    return change


def with_config(**values):
    """Rebuilds the model as if config.json said this."""
    def change(model, weights, config):
        return reference.build({**config, **values}, weights)
    return change


def with_rope(**values):
    def change(model, weights, config):
        return reference.build({**config, "rope_scaling": {**config["rope_scaling"], **values}}, weights)
    return change


# ---------------------------------------------------------------- attention

def no_mscale(attn, config):
    attn.scaling = attn.qk_head_dim ** -0.5


def scale_of_latent(attn, config):
    attn.scaling *= (attn.qk_head_dim / (attn.kv_lora_rank + attn.qk_rope_head_dim)) ** 0.5


def plain_frequencies(model, weights, config):
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.compute_default_rope_parameters(model.config)[0]


def interpolated_frequencies(model, weights, config):
    """Position interpolation of every pair: YaRN without its ramp."""
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.compute_default_rope_parameters(model.config)[0] / config["rope_scaling"]["factor"]


def amplitude(value):
    def change(model, weights, config):
        model.model.rotary_emb.attention_scaling = value(model, config)
    return change


def mscale_on_cos_sin(model, weights, config):
    """m on cos and sin instead of m^2 on the softmax scale."""
    attn = attentions(model)[0]
    m = (attn.scaling * attn.qk_head_dim ** 0.5) ** 0.5
    for a in attentions(model):
        no_mscale(a, config)
    model.model.rotary_emb.attention_scaling *= m


def key_rope_normalised(attn, config):
    def hook(module, inputs, output):
        latent, rope = output.split([attn.kv_lora_rank, attn.qk_rope_head_dim], -1)
        return torch.cat([latent, rope * torch.rsqrt(rope.pow(2).mean(-1, keepdim=True) + 1e-6)], -1)
    attn.kv_a_proj_with_mqa.register_forward_hook(hook)


def identity(attribute):
    def action(attn, config):
        setattr(attn, attribute, torch.nn.Identity())
    return action


def latent_eps_from_config(attn, config):
    for norm in (attn.q_a_layernorm, attn.kv_a_layernorm):
        if norm is not None:
            norm.variance_epsilon = config["rms_norm_eps"]


def swap_key_value(name, w, config):
    """[v | k_nope] instead of [k_nope | v] in each head of kv_b_proj."""
    if name.endswith("kv_b_proj.weight"):
        nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
        heads = w.view(-1, nope + v, w.shape[1])
        return torch.cat([heads[:, v:], heads[:, :v]], 1).reshape(w.shape)


def split_kv_by_kind(name, w, config):
    """All keys of all heads first, then all values."""
    if name.endswith("kv_b_proj.weight"):
        nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
        heads = config["num_attention_heads"]
        return torch.cat([w[:heads * nope].view(heads, nope, -1), w[heads * nope:].view(heads, v, -1)], 1).reshape(w.shape)


# ---------------------------------------------------------------- router and experts

def router(choice_bias=True, weight_bias=False, normalise=None, scale=True, limit=True, excluded=float("-inf"),
           best_of=2, softmax=None):
    """A rewritten router with one thing wrong; with the defaults it is the right one (checked by run.py)."""
    def action(moe, config):
        gate = moe.gate
        v3 = hasattr(gate, "e_score_correction_bias")
        grouped = reference.grouped(gate) and limit

        def forward(self, hidden):
            logits = torch.nn.functional.linear(hidden.view(-1, self.hidden_dim).float(), self.weight.float())
            soft = not v3 if softmax is None else softmax
            scores = logits.softmax(-1) if soft else logits.sigmoid()
            bias = self.e_score_correction_bias if v3 else 0
            choice = scores + bias if choice_bias else scores
            if grouped:
                members = choice.view(len(choice), self.num_group, -1)
                group = members.topk(best_of if v3 else 1, -1).values.sum(-1)
                keep = torch.zeros_like(group).scatter_(1, group.topk(self.topk_group, -1).indices, 1).bool()
                choice = members.masked_fill(~keep.unsqueeze(-1), excluded).view(choice.shape)
            chosen = choice.topk(self.top_k, -1).indices
            weights = (scores + bias if weight_bias else scores).gather(1, chosen)
            if (v3 and self.norm_topk_prob) if normalise is None else normalise:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return logits, weights * self.routed_scaling_factor if scale else weights, chosen
        gate.forward = types.MethodType(forward, gate)
    return action


def gate_up_swapped(model, weights, config):
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    edited = {}
    for name, w in weights.items():
        for a, b in other.items():
            if name.endswith(a + ".weight"):
                name = name[:-len(a + ".weight")] + b + ".weight"
                break
        edited[name] = w
    return reference.build(config, edited)


def shared_times(factor):
    def action(moe, config):
        moe.shared_experts.down_proj.weight.mul_(factor(config))
    return action


def weight_before_expert(moe, config):
    """The routing weight applied to the expert's input."""
    experts = moe.experts

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for k in range(chosen.shape[1]):
            for e in chosen[:, k].unique():
                rows = (chosen[:, k] == e).nonzero()[:, 0]
                x = hidden[rows] * weights[rows, k, None]
                gate, up = torch.nn.functional.linear(x, self.gate_up_proj[e]).chunk(2, -1)
                out[rows] += torch.nn.functional.linear(self.act_fn(gate) * up, self.down_proj[e])
        return out
    experts.forward = types.MethodType(forward, experts)


# ---------------------------------------------------------------- norms and storage

def eps_everywhere(eps):
    def change(model, weights, config):
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = eps
        model.model.norm.variance_epsilon = eps
    return change


def norm_weight_plus_one(name, w, config):
    if name.endswith("norm.weight"):
        return w + 1


def fp8_mutation(dequantise):
    """dequantise(q as f32, scale, name, config) -> weights."""
    def change(model, weights, config):
        stored = reference.read_tensors(config["__directory__"])
        edited = dict(weights)
        for name, q in stored.items():
            if name + "_scale_inv" in stored:
                edited[name] = dequantise(q.float(), stored[name + "_scale_inv"], name, config)
        return reference.build({k: v for k, v in config.items() if k != "__directory__"}, edited)
    return change


def spread(scale, rows, cols):
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]


def scale_divides(q, scale, name, config):
    return q / spread(scale, *q.shape)


def scale_per_head(q, scale, name, config):
    """kv_b_proj cut into heads first, each head's block rows counted from its own start."""
    if not name.endswith("kv_b_proj.weight"):
        return q * spread(scale, *q.shape)
    rows = config["qk_nope_head_dim"] + config["v_head_dim"]
    row = torch.arange(q.shape[0])
    block = (row // rows * rows) // BLOCK + row % rows // BLOCK
    return q * scale[block.clamp_max(scale.shape[0] - 1)].repeat_interleave(BLOCK, 1)[:, :q.shape[1]]


def scale_stretched(q, scale, name, config):
    """Blocks of equal size, rows / block rows, where the last ones are really smaller."""
    rows = torch.arange(q.shape[0]) * scale.shape[0] // q.shape[0]
    cols = torch.arange(q.shape[1]) * scale.shape[1] // q.shape[1]
    return q * scale[rows][:, cols]


def last_block_unscaled(q, scale, name, config):
    """The ragged rows at the end take the scales of the block row before."""
    full = spread(scale, *q.shape).clone()
    whole = q.shape[0] // BLOCK * BLOCK
    if 0 < whole < q.shape[0]:
        full[whole:] = full[whole - 1]
    return q * full


# ---------------------------------------------------------------- the list

def mutations():
    m = Mutation
    return [
        m("softmax scale without m^2", "t1", each(attentions, no_mscale)),
        m("softmax scale of the latent width", "t1", each(attentions, scale_of_latent)),
        m("half-split RoPE", "t1", with_config(rope_interleave=False)),
        m("interleaved RoPE where the config says half-split", "t1h", with_config(rope_interleave=True)),
        m("plain instead of YaRN frequencies", "t1", plain_frequencies),
        m("every frequency divided by the factor", "t1", interpolated_frequencies),
        m("m on cos/sin instead of m^2 on the scale", "t1", mscale_on_cos_sin),
        m("amplitude of cos/sin ignored (mscale 1/0.707)", "t1m", amplitude(lambda *_: 1.0)),
        m("amplitude of cos/sin ignored (no mscale keys)", "t1a", amplitude(lambda *_: 1.0)),
        m("m from mscale instead of mscale_all_dim", "t1m", with_rope(mscale_all_dim=1.0, mscale=1.0)),
        m("beta_fast 32 instead of 1", "kimi-k2-thinking", with_rope(beta_fast=32.0)),
        m("theta 10000 instead of 3.2e7", "joyai", with_config(rope_theta=10000)),
        m("original length taken from max_position_embeddings", "far", with_rope(original_max_position_embeddings=512)),
        m("V2 without m^2", "v2-lite", each(attentions, no_mscale)),
        m("k_pe normalised", "t1", each(attentions, key_rope_normalised)),
        m("latent not normalised", "t1", each(attentions, identity("kv_a_layernorm"))),
        m("query latent not normalised", "t1", each(attentions, identity("q_a_layernorm"))),
        m("K and V slices of kv_b_proj swapped", "t1", each_weight(swap_key_value)),
        m("kv_b_proj split by kind, not by head", "t1", each_weight(split_kv_by_kind)),
        m("v_head_dim taken for qk_nope_head_dim", "gigachat3", each_weight(swap_key_value)),
        m("choice without bias", "t1", each(sparse, router(choice_bias=False))),
        m("weights from the biased scores", "t1", each(sparse, router(weight_bias=True))),
        m("routed_scaling_factor dropped", "t1", each(sparse, router(scale=False))),
        m("no top-k normalisation", "t1", each(sparse, router(normalise=False))),
        m("normalised although norm_topk_prob is false", "t1u", each(sparse, router(normalise=True))),
        m("group limit ignored", "t1", each(sparse, router(limit=False))),
        m("group score of the best, not the best two", "t1", each(sparse, router(best_of=1))),
        m("excluded groups 0.0, ordinary bias", "t1", each(sparse, router(excluded=0.0)), informative=True),
        m("excluded groups 0.0", "t1x", each(sparse, router(excluded=0.0))),
        m("softmax instead of sigmoid", "t1", each(sparse, router(softmax=True))),
        m("V2: sigmoid instead of softmax", "v2-lite", each(sparse, router(softmax=False))),
        m("V2: normalised", "v2-lite", each(sparse, router(normalise=True))),
        m("V2: group limit ignored", "v2-groups", each(sparse, router(limit=False))),
        m("gate and up swapped", "t1", gate_up_swapped),
        m("shared experts dropped", "t1", each(sparse, shared_times(lambda c: 0.0))),
        m("shared experts scaled as the routed ones", "t1", each(sparse, shared_times(lambda c: c["routed_scaling_factor"]))),
        m("routing weight on the expert's input", "t1", each(sparse, weight_before_expert)),
        m("latent eps from the config, ordinary latents", "t1", each(attentions, latent_eps_from_config), informative=True),
        m("latent eps from the config", "t1e", each(attentions, latent_eps_from_config)),
        m("eps 1e-6 whatever the config says", "t1n", eps_everywhere(1e-6)),
        m("norm weight as 1 + w", "t1", each_weight(norm_weight_plus_one)),
        m("FP8: scale divides", "fp8", fp8_mutation(scale_divides)),
        m("FP8: kv_b_proj scales counted per head", "fp8-ragged", fp8_mutation(scale_per_head)),
        m("FP8: equal instead of ragged blocks", "fp8-ragged", fp8_mutation(scale_stretched)),
        m("FP8: ragged last rows with the scale before", "fp8", fp8_mutation(last_block_unscaled)),
    ]


def mutate(mutation, directory):
    """The wrong model, built afresh."""
    config, weights = reference.read_config(directory), reference.read_weights(directory)
    model = reference.build(config, weights)
    if "FP8" in mutation.label:
        config["__directory__"] = directory
    with torch.no_grad():
        return mutation.change(model, weights, config) or model
