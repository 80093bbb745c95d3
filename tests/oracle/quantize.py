"""dsv3 quantize: what it writes against torch's own quantisation, and who else can read it.

For each checkpoint and each target:
  - every tensor that is written equals what torch makes of the source, bit for bit: codes, scales, kept tensors;
  - the safetensors package opens the files, and the index names each tensor once, with its total size;
  - int8: compressed-tensors, told by the config.json alone which modules are quantised, decompresses every one of
    them to the same f32 weights; transformers loads the dense model the same (it has no reader for experts in int8);
  - fp8: transformers' own reader of DeepSeek's format gives the same weights (it wants widths in multiples of 128);
  - bf16: transformers loads the model as it is;
  - the program's logits on the new directory agree with transformers on the dequantised weights.
A run that was broken off in the middle of seven shards is continued, and the files come out the same.

The other way round: int8 as others publish it (compressed-tensors' own files, blocks of 128 x 128, a scale a row with
and without a configuration) is written here, and the program's logits on it are compared likewise.
"""

import json
import os
import shutil

import numpy as np
import safetensors
import torch
import transformers

import checkpoints
import compare
import reference
from program import ProgramError

TARGETS = ("int8", "fp8", "bf16", "int8 --head")
PROMPTS = 40               # tried for one without near ties in the routing of the new weights


def sources():
    specs = {s.name: s for s in checkpoints.specs()}
    aligned = checkpoints.Spec("quantize", "every width a multiple of 128",
                               checkpoints.fp8(quantization_config=checkpoints.DROP, qk_rope_head_dim=128))
    return [specs["t1"], specs["t1d"], specs["f32"], specs["shards"], specs["mtp"], specs["fp8-ragged"], aligned]


# ---------------------------------------------------------------- torch's side

def int8(w):
    scale = w.abs().amax(1, keepdim=True) / 127
    scale[scale == 0] = 1
    return (w / scale).round().clamp(-127, 127).to(torch.int8), scale


def expected(directory, target, head):
    """Name -> tensor that dsv3 quantize must write."""
    out, stored, weights = {}, reference.read_tensors(directory), reference.read_weights(directory)
    for name, w in weights.items():
        if checkpoints.is_fp8(name) or head and name == "lm_head.weight":
            if target == "int8":
                out[name], out[name + "_scale"] = int8(w)
            elif target == "fp8":
                out[name], out[name + "_scale_inv"] = checkpoints.quantise(w, "plain")
            else:
                out[name] = w.to(torch.bfloat16)
        elif target == "bf16" and w.ndim == 2 and not name.endswith("mlp.gate.weight"):
            out[name] = w.to(torch.bfloat16)
        else:
            out[name] = stored[name]
    return out


def same_tensor(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---------------------------------------------------------------- readers

def open_safetensors(directory):
    """Names and the sum of sizes, as the safetensors package and the index tell them."""
    index, names, total = os.path.join(directory, "model.safetensors.index.json"), {}, 0
    for file in sorted(f for f in os.listdir(directory) if f.endswith(".safetensors")):
        with safetensors.safe_open(os.path.join(directory, file), "pt") as f:
            for name in f.keys():
                assert name not in names, f"{name} stands in {names[name]} and in {file}"
                names[name] = file
                t = f.get_tensor(name)
                total += t.numel() * t.element_size()
    if os.path.exists(index):
        with open(index) as f:
            said = json.load(f)
        assert said["weight_map"] == names, "the index names other tensors than the files"
        assert said["metadata"]["total_size"] == total, f"total_size {said['metadata']['total_size']}, found {total}"
    return names


def by_compressed_tensors(directory):
    """Name -> f32 weight, decompressed by the package wherever its configuration targets a module."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name
    config, stored, out = reference.read_config(directory), reference.read_tensors(directory), {}
    told = QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = told.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(told.format)
    assert scheme.targets == ["Linear"]
    for name, t in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight":
            if not leaf.startswith("weight_"):
                out[name] = t.float()
            continue
        linear = t.ndim == 2 and not module.endswith("embed_tokens")    # torch.nn.Linear, in the models that hold experts as such
        if linear and not any(match_name(module, pattern) for pattern in told.ignore):
            state = {"weight": t, "weight_scale": stored[module + ".weight_scale"]}
            out[name] = compressor.decompress(state, scheme)["weight"]
        else:
            out[name] = t.float()
    return out


def by_transformers(directory, target):
    """from_pretrained, dequantising: name -> f32 parameter or buffer, in transformers' own (fused) names."""
    how = {"int8": lambda: {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)},
           "fp8": lambda: {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)},
           "bf16": dict}[target]()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", **how)
    return named(model)


def named(model):
    tensors = dict(model.named_parameters())
    tensors.update({n: b for n, b in model.named_buffers() if "rotary_emb" not in n})
    return tensors


def equal_weights(a, b):
    wrong = [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])]
    return not wrong, f"{len(wrong)} of {len(b)} differ, {sorted(wrong)[:2]}" if wrong else ""


# ---------------------------------------------------------------- one directory

def calm_prompt(spec, model):
    """A prompt on which no routing decision of the new weights is nearly a tie."""
    for seed in range(PROMPTS):
        ids = checkpoints.prompt(spec, seed)
        logits, experts, margins, _ = reference.forward(model, ids)
        if margins is None or margins.min() >= compare.MARGIN_ALLOWED:
            return ids, logits
    raise RuntimeError(f"{spec.name}: every prompt has a near tie")


def check_target(spec, source, options, work, program, report):
    directory, label = os.path.join(work, f"{spec.name}-{options}".replace(" ", "")), f"quantize: {spec.name} to {options}"
    target, *head = options.split()
    shutil.rmtree(directory, ignore_errors=True)
    row = {"checkpoint": spec.name, "file": spec.dtype.upper(), "to": options, "equal": "-", "readers": "", "positions": None,
           "error": None, "moved": None}
    program.run("quantize", source, directory, "--to", target, *head)

    want, found = expected(source, target, bool(head)), reference.read_tensors(directory)
    wrong = [n for n in want.keys() | found.keys() if n not in want or n not in found or not same_tensor(want[n], found[n])]
    row["equal"] = f"{len(want) - len(wrong)}/{len(want)}"
    report.check(f"{label}: tensors", not wrong, f"{len(wrong)} differ: {sorted(wrong)[:3]}")
    try:
        report.check(f"{label}: files", set(open_safetensors(directory)) == set(want), "other tensors than expected")
    except (AssertionError, safetensors.SafetensorError) as e:
        report.fail(f"{label}: files", str(e))
    config, old = reference.read_config(directory), reference.read_config(source)
    report.check(f"{label}: config.json", without(config) == without(old) and ("quantization_config" in config) == (target != "bf16"),
                 "says more than it should")

    model = reference.load(directory)
    readers = []
    if target == "int8":
        weights = reference.read_weights(directory)
        good, why = equal_weights(by_compressed_tensors(directory), weights)
        report.check(f"{label}: compressed-tensors", good, why)
        readers += ["compressed-tensors"] * good
    if target == "bf16" or target == "int8" and spec.name == "t1d" or target == "fp8" and spec.name == "quantize":
        good, why = equal_weights(by_transformers(directory, target), named(model))
        report.check(f"{label}: transformers", good, why)
        readers += ["transformers"] * good
    row["readers"] = ", ".join(readers)

    ids, logits = calm_prompt(spec, model)
    ours, _, _ = program.logits(directory, ids, spec.config["vocab_size"])
    before, *_ = reference.forward(reference.load(source), ids)
    row["positions"], row["error"] = len(ids), compare.distance(ours, logits)
    row["moved"] = float(np.median(np.abs(logits - before).max(-1)) / np.abs(before).max())
    report.check(f"{label}: logits", row["error"] <= compare.TOLERANCE, f"{row['error']:.1e}")
    return row


def without(config):
    return {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}


def check_resume(source, target_directory, work, program, report):
    """Two of seven shards done, one in pieces, no config.json: as a run leaves it that was killed."""
    whole, again = target_directory, os.path.join(work, "quantize-resumed")
    shutil.rmtree(again, ignore_errors=True)
    os.makedirs(again)
    shards = sorted(f for f in os.listdir(whole) if f.endswith(".safetensors"))
    for file in shards[:2]:
        shutil.copy(os.path.join(whole, file), again)
    with open(os.path.join(whole, shards[2]), "rb") as f, open(os.path.join(again, shards[2] + ".part"), "wb") as g:
        g.write(f.read(1000))
    with open(os.path.join(whole, shards[3]), "rb") as f, open(os.path.join(again, shards[3]), "wb") as g:
        g.write(f.read()[:-1])                                           # a byte short
    inodes = [os.stat(os.path.join(again, f)).st_ino for f in shards[:2]]
    program.run("quantize", source, again, "--to", "int8")
    kept = [os.stat(os.path.join(again, f)).st_ino for f in shards[:2]] == inodes
    same = sorted(os.listdir(again)) == sorted(os.listdir(whole)) and all(
        open(os.path.join(again, f), "rb").read() == open(os.path.join(whole, f), "rb").read() for f in os.listdir(whole))
    report.check("quantize: a run that was broken off goes on", kept and same,
                 "complete shards were written again" if not kept else "other files")


# ---------------------------------------------------------------- int8 as others publish it

def by_package(stored, config):
    """compressed-tensors quantises and describes: BF16 scales of max / 127.5, codes down to -128."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import INT8_W8A8
    scheme = QuantizationScheme(targets=["Linear"], **INT8_W8A8)
    told = QuantizationConfig(config_groups={"group_0": scheme}, format="int-quantized", quantization_status="compressed",
                              ignore=["lm_head", "re:.*mlp.gate$"])
    config["quantization_config"] = json.loads(told.model_dump_json())
    compressor = BaseCompressor.get_value_from_registry(told.format)
    for name in [n for n in stored if checkpoints.is_fp8(n)]:
        w = stored[name].to(torch.bfloat16)
        scale = (w.abs().amax(1, keepdim=True).float() / 127.5).to(torch.bfloat16)
        stored[name] = compressor.compress({"weight": w, "weight_scale": scale}, scheme)["weight"]
        stored[name + "_scale"] = scale
    assert min(int(t.min()) for t in stored.values() if t.dtype == torch.int8) == -128


def in_blocks(stored, config):
    """DeepSeek-R1-Block-INT8."""
    config["quantization_config"] = {"activation_scheme": "dynamic", "quant_method": "blockwise_int8",
                                     "weight_block_size": [checkpoints.BLOCK, checkpoints.BLOCK]}
    for name in [n for n in stored if checkpoints.is_fp8(n)]:
        w = stored[name].float()
        n, k = (-(-size // checkpoints.BLOCK) for size in w.shape)
        scale = torch.nn.functional.pad(w.abs(), (0, k * checkpoints.BLOCK - w.shape[1], 0, n * checkpoints.BLOCK - w.shape[0])) \
            .view(n, checkpoints.BLOCK, k, checkpoints.BLOCK).amax((1, 3)) / 127
        each = scale.repeat_interleave(checkpoints.BLOCK, 0)[:w.shape[0]].repeat_interleave(checkpoints.BLOCK, 1)[:, :w.shape[1]]
        stored[name], stored[name + "_scale_inv"] = (w / each).round().clamp(-128, 127).to(torch.int8), scale


def in_rows(shape, told):
    """DeepSeek-R1-Channel-INT8."""
    def rows(stored, config):
        config.pop("quantization_config", None)
        if told:
            config["quantization_config"] = told
        for name in [n for n in stored if checkpoints.is_fp8(n)]:
            stored[name], scale = int8(stored[name].float())
            stored[name + "_scale"] = scale.view(*shape).contiguous()
    return rows


PUBLISHED = (("compressed-tensors' own", by_package), ("blocks of 128 x 128", in_blocks),
             ("a scale a row, no configuration", in_rows((-1, 1), None)),
             ("a scale a row, w8a8_int8, [n]", in_rows((-1,), {"quant_method": "w8a8_int8", "is_dynamic": True})))


def check_published(spec, source, work, program, report):
    rows = []
    for what, make in PUBLISHED:
        label, directory = f"quantize: {what}", os.path.join(work, "published-int8")
        config = reference.read_config(source)
        stored = dict(reference.read_tensors(source))
        for name, w in reference.read_weights(source).items():
            if checkpoints.is_fp8(name):
                stored[name] = w
                stored.pop(name + "_scale_inv", None)
        make(stored, config)
        shutil.rmtree(directory, ignore_errors=True)
        os.makedirs(directory)
        with open(os.path.join(directory, "config.json"), "w") as f:
            json.dump(config, f, indent=2)
        checkpoints.write_safetensors(os.path.join(directory, "model.safetensors"), stored)
        ids, logits = calm_prompt(spec, reference.load(directory))
        try:
            ours, _, _ = program.logits(directory, ids, spec.config["vocab_size"])
        except ProgramError as e:
            report.fail(label, str(e))
            continue
        error = compare.distance(ours, logits)
        report.check(label, error <= compare.TOLERANCE, f"{error:.1e}")
        rows.append({"checkpoint": spec.name, "file": "I8", "to": "-", "equal": "-", "readers": what, "positions": len(ids),
                     "error": error, "moved": None})
    return rows


def check(work, program, report):
    rows = []
    for spec in sources():
        found = compare.find(spec, work)
        for target in TARGETS:
            if "--head" in target and spec.name != "t1":
                continue
            try:
                rows.append(check_target(spec, found.directory, target, work, program, report))
            except (ProgramError, RuntimeError, KeyError) as e:
                report.fail(f"quantize: {spec.name} to {target}", repr(e))
        if spec.shards:
            try:
                check_resume(found.directory, os.path.join(work, f"{spec.name}-int8"), work, program, report)
            except (ProgramError, OSError) as e:
                report.fail("quantize: a run that was broken off goes on", str(e))
        if spec.name == "fp8-ragged":
            rows += check_published(spec, found.directory, work, program, report)
        report.say(f"quantize: {spec.name} done")
    check_tied(work, program, report)
    return rows


def check_tied(work, program, report):
    """A head that is the embedding has no 8 bits of its own; without --head all goes on."""
    spec = next(s for s in checkpoints.specs() if s.name == "tied")
    source, out = compare.find(spec, work).directory, os.path.join(work, "tied-int8")
    shutil.rmtree(out, ignore_errors=True)
    try:
        program.run("quantize", source, out, "--to", "int8", "--head")
        report.fail("quantize: tied --head", "is not refused")
    except ProgramError as e:
        report.check("quantize: tied --head", "tied" in str(e) and not os.path.exists(out), str(e))
    check_target(spec, source, "int8", work, program, report)
