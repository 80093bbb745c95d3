"""The reference: Hugging Face transformers' own DeepSeek classes, in f32 and in f64.

Checkpoints are read back from their files by the safetensors package, FP8 weights
become the f32 product fp8 * scale, and the model runs with eager attention and the
eager expert loop. The f64 run is the same code with its casts to f32 turned into
casts to f64; only the rotary angles stay what they are by definition, the f32
product of an f32 position and an f32 frequency.
"""

import json
import os
import types

import safetensors
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

from checkpoints import dequantise

transformers.logging.set_verbosity_error()

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
                "I8": torch.int8}

# Keys of config.json that name the file or its storage and mean nothing to the network.
NOT_FOR_THE_CONFIG = ("architectures", "model_type", "quantization_config", "torch_dtype", "dtype", "auto_map",
                      "transformers_version")


# ---------------------------------------------------------------- reading

def read_config(directory):
    with open(os.path.join(directory, "config.json")) as f:
        return json.load(f)


def read_tensors(directory):
    """Name -> tensor as stored, from one file or from the shards that the index names."""
    index = os.path.join(directory, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index) as f:
            files = sorted(set(json.load(f)["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    out = {}
    for file in files:
        # deserialize, unlike safe_open, hands out copies: it reads files whose tensors are not aligned.
        with open(os.path.join(directory, file), "rb") as f:
            for name, entry in safetensors.deserialize(f.read()):
                flat = torch.frombuffer(entry["data"], dtype=torch.uint8).view(TORCH_DTYPES[entry["dtype"]])
                out[name] = flat.view(entry["shape"])
    return out


def read_weights(directory):
    """Name -> f32 tensor: what the checkpoint means, whatever it is stored as."""
    stored = read_tensors(directory)
    out = {}
    for name in list(stored):
        if name.endswith("_scale_inv"):
            continue
        t = stored.pop(name)
        out[name] = dequantise(t, stored[name + "_scale_inv"]) if t.dtype == torch.float8_e4m3fn else t.float()
    return out


# ---------------------------------------------------------------- models

def build(config, weights):
    """transformers' model for this config.json, holding these f32 weights.

    model_type kimi_k2 and joyai_llm_flash have no class of their own: they are V3 by another name.
    """
    lite = config["model_type"] == "deepseek_v2"
    values = {k: v for k, v in config.items() if k not in NOT_FOR_THE_CONFIG}
    values = json.loads(json.dumps(values))                 # transformers edits nested dicts in place
    hf_config = (DeepseekV2Config if lite else DeepseekV3Config)(
        **values, attn_implementation="eager", experts_implementation="eager")
    with torch.device("meta"):
        model = (DeepseekV2ForCausalLM if lite else DeepseekV3ForCausalLM)(hf_config)
    assert model.config._attn_implementation == "eager" and model.config._experts_implementation == "eager"
    fill(model, weights)
    # The rotary buffers are computed at construction, and there they were on "meta".
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    return model.eval()


def fill(model, weights):
    """Every parameter and buffer of the model from the official names; nothing may be left over on our side."""
    weights = dict(weights)
    tied = model.config.tie_word_embeddings
    targets = dict(model.named_parameters())
    targets.update({n: b for n, b in model.named_buffers() if "rotary_emb" not in n})
    for name, target in targets.items():
        if name == "lm_head.weight" and tied:
            continue
        head, _, leaf = name.rpartition(".")
        if head.endswith("mlp.experts"):
            count = target.shape[0]
            each = [weights.pop(f"{head}.{e}.{part}.weight") for e in range(count)
                    for part in (("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",))]
            value = torch.stack(each).view(target.shape)    # gate rows first, then up rows
        else:
            value = weights.pop(name)
        assert value.shape == target.shape, (name, value.shape, target.shape)
        module = model.get_submodule(head)
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    last = f"model.layers.{model.config.num_hidden_layers}."
    left = [n for n in weights if not n.startswith(last) and not n.endswith("inv_freq")]
    assert not left, f"tensors that no parameter took: {left[:5]}"


def load(directory):
    return build(read_config(directory), read_weights(directory))


class InDouble(TorchFunctionMode):
    """Runs code written for f32 in f64: wherever it asks for torch.float32 it gets torch.float64."""

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def to_double(model):
    """The same model in f64 (changes it). Run it inside InDouble()."""
    rotary = model.model.rotary_emb
    frequencies, amplitude = rotary.inv_freq.clone(), rotary.attention_scaling
    assert frequencies.dtype == torch.float32
    lite = isinstance(model.config, DeepseekV2Config)

    def forward(self, x, position_ids):
        with torch._C.DisableTorchFunction():
            angle = (position_ids[..., None].to(torch.float32) * frequencies).to(torch.float64)
        if lite:
            return torch.polar(torch.full_like(angle, amplitude), angle)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * amplitude, angle.sin() * amplitude

    model.double()
    rotary.forward = types.MethodType(forward, rotary)
    return model


# ---------------------------------------------------------------- running

class Routing:
    """Records each MoE layer's router logits and chosen experts during forwards."""

    def __init__(self, model):
        self.gates = [l.mlp.gate for l in model.model.layers if hasattr(l.mlp, "gate")]
        self.config = model.config
        self.logits = [[] for _ in self.gates]
        self.chosen = [[] for _ in self.gates]
        self.hooks = [g.register_forward_hook(self._hook(i)) for i, g in enumerate(self.gates)]

    def _hook(self, i):
        def hook(module, inputs, output):
            self.logits[i].append(output[0].double())
            self.chosen[i].append(output[2])
        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for h in self.hooks:
            h.remove()

    def result(self):
        """(experts [n, layers, K] sorted, margins [n, layers, 2]: of experts and of groups)."""
        if not self.gates:
            return None, None
        experts, margins = [], []
        for gate, logits, chosen in zip(self.gates, self.logits, self.chosen):
            experts.append(torch.cat(chosen).sort(-1).values)
            margins.append(router_margins(gate, torch.cat(logits), self.config))
        return torch.stack(experts, 1).numpy(), torch.stack(margins, 1).numpy()


def choice_scores(gate, logits):
    """What the choice is made by: sigmoid + bias (V3), softmax (V2)."""
    if hasattr(gate, "e_score_correction_bias"):
        return logits.sigmoid() + gate.e_score_correction_bias.double()
    return logits.softmax(-1)


def grouped(gate):
    if hasattr(gate, "e_score_correction_bias"):
        return gate.num_group > 1
    return gate.topk_method == "group_limited_greedy" and gate.num_group > 1


def router_margins(gate, logits, config):
    """How far each choice is from another one: [n, 2], the gap behind the last expert and behind the last group."""
    scores = choice_scores(gate, logits)
    n, experts = scores.shape
    out = torch.full((n, 2), float("inf"), dtype=torch.float64)
    if grouped(gate):
        members = scores.view(n, gate.num_group, -1)
        best = members.topk(2, -1).values.sum(-1) if hasattr(gate, "e_score_correction_bias") else members.amax(-1)
        ranked = best.sort(-1, descending=True)
        if gate.topk_group < gate.num_group:
            out[:, 1] = ranked.values[:, gate.topk_group - 1] - ranked.values[:, gate.topk_group]
        keep = torch.zeros_like(best).scatter_(1, ranked.indices[:, :gate.topk_group], 1).bool()
        scores = members.masked_fill(~keep.unsqueeze(-1), float("-inf")).view(n, experts)
    top = scores.sort(-1, descending=True).values
    if gate.top_k < experts:
        out[:, 0] = top[:, gate.top_k - 1] - top[:, gate.top_k]
    return out


@torch.no_grad()
def forward(model, ids, chunk=0, attentions=False):
    """Logits of every position [n, V] (numpy, the model's precision), experts, margins, attention maps or None."""
    maps = None
    with Routing(model) as routing:
        if not chunk:
            # output_attentions holds every map: only for the small ones.
            out = model(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=attentions)
            logits, maps = out.logits[0], out.attentions if attentions else None
        else:
            cache, parts = None, []
            for at in range(0, len(ids), chunk):
                out = model(input_ids=torch.tensor([ids[at:at + chunk]]), use_cache=True, **with_cache(cache))
                cache = cache_of(out)
                parts.append(out.logits[0])
            logits = torch.cat(parts)
        experts, margins = routing.result()
    return logits.numpy(), experts, margins, maps


@torch.no_grad()
def greedy(model, ids, steps, chunk=0):
    """(`steps` ids by argmax, top-1/top-2 gap of each step, margins [steps - 1, layers, 2] of the new tokens)."""
    cache, out = None, None
    for at in range(0, len(ids), chunk or len(ids)):
        out = model(input_ids=torch.tensor([ids[at:at + (chunk or len(ids))]]), use_cache=True, logits_to_keep=1,
                    **with_cache(cache))
        cache = cache_of(out)
    text, gaps = [], []
    with Routing(model) as routing:
        for step in range(steps):
            top = out.logits[0, -1].topk(2)
            text.append(int(top.indices[0]))
            gaps.append(float(top.values[0] - top.values[1]))
            if step + 1 < steps:
                out = model(input_ids=torch.tensor([[text[-1]]]), use_cache=True, **with_cache(cache))
        _, margins = routing.result()
    return text, gaps, margins


# transformers 5.24 renames past_key_values to cache.

def with_cache(cache):
    return {} if cache is None else {"cache": cache}


def cache_of(out):
    return out.cache
