"""The arithmetic modes of one product: dsv3_matmul, through the shared library, against the published code in torch.

Each mode is written here from what others published, in torch, and never from this library's code:
  f32   the weights' f32 values (code * scale, rounded once) times the activations, summed in f64
  bf16  code * bf16(x * scale): the scale of a weight's block goes to the activation before it is rounded; BF16 weights
        take bf16(x)
  fp8   DeepSeek-V3, inference/kernel.py at 9b4e978: act_quant, then fp8_gemm. Per token and 128 channels s = max(amax,
        1e-4) / 448, code = e4m3(x / s); block sums in f32, times both scales, in order. With scale_fmt "ue8m0" s is
        rounded up to a power of two. The published code asserts widths in multiples of 128; here a ragged last group is
        a group of what is left
  int8  vLLM's dynamic_scaled_int8_quant and scaled_mm, which run compressed-tensors' W8A8: per token s = amax / 127,
        code = round half to even(x * 127 / amax), a row of zeros gives zeros; an exact integer sum, times s, times the
        scale of the row. With scales for 128 x 128 blocks (SGLang's block_int8): the same per token and 128 channels.
        compressed-tensors' own fake quantisation in torch differs: it divides by 127.5
  tiles bf16(x), 0 below 2^-50, times the codes: block sums in f32, times the scale of the block, in order (the published
        fp8_gemm with activations in bf16)
A mode that a weight's type does not have falls back as `effective` says.

The inputs are settled: no activation lies so near to a rounding border that x / s and x * (1 / s), both of them
published, would round to two codes; one code apart is far more than the tolerance.

  matmul_modes.py [build/libdsv3.so]     prints the table by itself
"""

import ctypes as C
import os
import sys

import torch
import torch.nn.functional as F

import checkpoints

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "examples"))
import ffi                                             # noqa: E402

BLOCK = 128
TOLERANCE = 1e-5                                       # of a row: max |difference| / max |out|
MODES = ("f32", "bf16", "fp8", "int8", "tiles")
COMPUTE = {"auto": 0, "f32": 1, "bf16": 2, "fp8": 3, "int8": 4, "tiles": 5}
ISA = {"scalar": 1, "avx2": 2, "avx512": 3, "avx-vnni": 4, "avx512-vnni": 5, "avx512-bf16": 6,
       "avx512-amx": 7}
DTYPE = {"F32": 1, "F16": 2, "BF16": 3, "F8": 4, "F8 ue8m0": 4, "F8 E8M0": 4, "I8 row": 7, "I8 block": 7}
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES = ((2048, 200), (1408, 130), (576, 384), (200, 131), (130, 70))      # columns, rows
COUNTS = (1, 2, 5, 48)


# ---------------------------------------------------------------- the published arithmetic

def effective(mode, kind):
    """The mode a weight gets; kind: "F32", "F16", "BF16", "F8" or "I8"."""
    if kind in ("F32", "F16"):
        return "f32"
    if mode == "auto":
        return "int8" if kind == "I8" else "bf16"
    if kind == "I8":
        return "int8" if mode == "int8" else "f32"
    return "bf16" if mode == "int8" or mode == "fp8" and kind == "BF16" else mode


def spread(scale, shape, block):
    """One scale an element."""
    rows, cols = block
    return scale.repeat_interleave(rows, 0)[:shape[0]].repeat_interleave(cols, 1)[:, :shape[1]]


def up_to_power_of_two(s):
    """2^ceil(log2 s), exactly (V3.2's kernel takes it from the exponent's bits)."""
    mantissa, exponent = torch.frexp(s)
    return torch.ldexp(torch.ones_like(s), exponent - (mantissa == 0.5).to(exponent.dtype))


def act_quant(x, ue8m0=False):
    """(codes [n, k] E4M3, scales [n, ceil(k / 128)])"""
    groups = F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    s = groups.abs().amax(-1).clamp_min(1e-4) / 448.0
    if ue8m0:
        s = up_to_power_of_two(s)
    codes = (groups / s.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, :x.shape[1]], s


def fp8_gemm(codes, s, weight, scale):
    """[n, rows] f32"""
    out = torch.zeros(codes.shape[0], weight.shape[0])
    of_row = torch.arange(weight.shape[0]) // BLOCK
    for b in range(s.shape[1]):
        at = slice(b * BLOCK, (b + 1) * BLOCK)
        part = (codes[:, at].double() @ weight[:, at].double().T).float()
        out += part * s[:, b, None] * scale[of_row, b]
    return out


def int8_quant(x):
    """(codes [n, k] as f64, scales [n, 1]) of whole rows"""
    amax = x.abs().amax(1, keepdim=True)
    inverse = torch.where(amax > 0, 127.0 / amax, torch.zeros_like(amax))
    return (x * inverse).round().clamp(-128, 127).double(), amax / 127.0


def int8_gemm(x, weight, scale, block):
    """[n, rows]; the integer sums are exact in f64."""
    if block[1] >= x.shape[1]:
        codes, s = int8_quant(x)
        return (codes @ weight.double().T).float() * s * scale.T
    out = torch.zeros(x.shape[0], weight.shape[0])
    of_row = torch.arange(weight.shape[0]) // block[0]
    for b in range(scale.shape[1]):
        at = slice(b * block[1], (b + 1) * block[1])
        codes, s = int8_quant(x[:, at])
        out += (codes @ weight[:, at].double().T).float() * s * scale[of_row, b]
    return out


def tiles_gemm(x, weight, scale):
    """[n, rows]"""
    half = x.to(torch.bfloat16).double()
    half[half.abs() < 2.0 ** -50] = 0
    if scale is None:
        return (half @ weight.double().T).float()
    out = torch.zeros(x.shape[0], weight.shape[0])
    of_row = torch.arange(weight.shape[0]) // BLOCK
    for b in range(scale.shape[1]):
        at = slice(b * BLOCK, (b + 1) * BLOCK)
        out += (half[:, at] @ weight[:, at].double().T).float() * scale[of_row, b]
    return out


def linear(x, weight, scale, block, mode, ue8m0=False):
    """x [n, k] f32 times the transposed weight as stored, in the mode that this weight gets: f32 [n, rows]."""
    kind = {torch.float8_e4m3fn: "F8", torch.int8: "I8", torch.bfloat16: "BF16", torch.float16: "F16"}.get(weight.dtype, "F32")
    mode = effective(mode, kind)
    if mode == "f32":
        w = weight.float() if scale is None else weight.float() * spread(scale, weight.shape, block)
        return (x.double() @ w.double().T).float()
    if mode == "fp8":
        return fp8_gemm(*act_quant(x, ue8m0), weight, scale)
    if mode == "int8":
        return int8_gemm(x, weight, scale, block)
    if mode == "tiles":
        return tiles_gemm(x, weight, scale)
    if scale is None:
        return (x.to(torch.bfloat16).double() @ weight.double().T).float()
    parts = []
    for i in range(scale.shape[0]):                    # rows that share their scales share the rounded activations
        scaled = (x * spread(scale[i:i + 1], x.shape, (x.shape[0], block[1]))).to(torch.bfloat16)
        parts.append(scaled.double() @ weight[i * block[0]:(i + 1) * block[0]].double().T)
    return torch.cat(parts, 1).float()


# ---------------------------------------------------------------- the library

class Library:
    """dsv3_quantize and dsv3_matmul on torch tensors."""

    def __init__(self, path):
        self.dsv3 = ffi.Library(path)
        self.has_modes = hasattr(self.dsv3.lib, "dsv3_compute_name")
        fields = list(ffi.MatmulOpts._fields_)
        if self.has_modes and "compute" not in [name for name, _ in fields]:
            fields.insert([name for name, _ in fields].index("isa") + 1, ("compute", C.c_int))
        self.Opts = type("MatmulOpts", (C.Structure,), {"_fields_": fields})
        f = self.dsv3.lib.dsv3_matmul
        f.argtypes, f.restype = [C.c_void_p, C.c_void_p, C.c_size_t, C.POINTER(ffi.Tensor), C.POINTER(self.Opts),
                                 C.POINTER(ffi.Error)], C.c_int
        f = self.dsv3.lib.dsv3_quantize
        f.argtypes, f.restype = [C.POINTER(ffi.Tensor), C.c_void_p, C.c_size_t, C.c_void_p, C.c_size_t, C.c_int, C.c_void_p,
                                 C.c_uint64, C.c_uint64, C.POINTER(ffi.Error)], C.c_int
        self.dsv3.lib.dsv3_isa_supported.argtypes, self.dsv3.lib.dsv3_isa_supported.restype = [C.c_int], C.c_bool
        self.isas = [name for name, number in ISA.items() if self.dsv3.lib.dsv3_isa_supported(number)]
        if self.has_modes:
            self.dsv3.lib.dsv3_compute_name.argtypes, self.dsv3.lib.dsv3_compute_name.restype = [C.c_int], C.c_char_p

    def call(self, name, *args):
        error = ffi.Error()
        code = getattr(self.dsv3.lib, "dsv3_" + name)(*args, C.byref(error))
        if code:
            raise ffi.Dsv3Error(error.message.decode())

    def quantise(self, values, dtype):
        """(data, scale or None) as dsv3_quantize writes them; data has the torch type of the format."""
        rows, cols = values.shape
        kind = TORCH.get(dtype, torch.float8_e4m3fn)
        data = torch.empty(rows, cols, dtype=kind)
        scale = torch.empty(-(-rows // BLOCK), -(-cols // BLOCK)) if dtype not in TORCH else None
        self.call("quantize", C.byref(ffi.Tensor()), data.data_ptr(), data.numel() * data.element_size(),
                  None if scale is None else scale.data_ptr(), 0 if scale is None else scale.numel(), DTYPE[dtype],
                  values.contiguous().data_ptr(), rows, cols)
        return data, scale

    def matmul(self, x, weight, mode, isa):
        """[n, rows]"""
        rows, cols = weight.data.shape
        t = ffi.Tensor(data=weight.data.data_ptr(), dtype=DTYPE[weight.kind], rank=2, shape=(C.c_uint64 * 8)(rows, cols),
                       row_stride=cols * weight.data.element_size())
        if weight.scale is not None:
            stored = weight.scale_stored
            t.scale, t.scale_dtype = stored.data_ptr(), 5 if stored.dtype == torch.uint8 else 1
            t.block_rows, t.block_cols = weight.block
            t.scale_stride = stored.shape[1]
        opts = self.Opts(struct_size=C.sizeof(self.Opts), isa=ISA[isa])
        if self.has_modes:
            opts.compute = COMPUTE[mode]
        x, out = x.contiguous(), torch.full((x.shape[0], rows), float("nan"))
        self.call("matmul", out.data_ptr(), x.data_ptr(), x.shape[0], C.byref(t), C.byref(opts))
        return out


# ---------------------------------------------------------------- weights and inputs

class Weight:
    """A drawn weight as stored: data, f32 scales (None without), what the library is handed as scales, block."""

    def __init__(self, library, kind, rows, cols, generator):
        self.kind, self.scale, self.block = kind, None, (BLOCK, BLOCK)
        values = torch.randn(rows, cols, generator=generator) / cols ** 0.5
        values *= 1 + torch.arange(rows)[:, None] % 7 + torch.arange(cols) // BLOCK % 3     # rows and blocks of different size
        if kind.startswith("I8"):
            self.block = (1, cols) if kind == "I8 row" else self.block
            shape = (-(-rows // self.block[0]), -(-cols // self.block[1]))
            padded = F.pad(values.abs(), (0, shape[1] * self.block[1] - cols, 0, shape[0] * self.block[0] - rows))
            amax = padded.unflatten(1, (shape[1], -1)).unflatten(0, (shape[0], -1)).amax((1, 3))
            self.scale = amax / (127.5 if kind == "I8 row" else 127.0)      # so that -128 occurs, as in files
            codes = values / spread(self.scale, values.shape, self.block)
            self.data = codes.round().clamp(-128, 127).to(torch.int8)
        elif kind.startswith("F8"):
            if kind == "F8":
                self.data, self.scale = library.quantise(values, "F8")
            else:
                self.data, self.scale = checkpoints.quantise(values, "ue8m0")
        else:
            self.data, _ = library.quantise(values, kind)
        self.values = values
        self.scale_stored = self.scale
        if kind == "F8 E8M0":
            self.scale_stored = (torch.frexp(self.scale).exponent + 126).to(torch.uint8)


def settle(x):
    """Moves activations away from the borders between two codes, of every group that a mode quantises by."""
    for _ in range(8):
        moved = torch.zeros_like(x, dtype=torch.bool)
        for size, top in ((x.shape[1], 127.0), (BLOCK, 127.0), (BLOCK, 448.0)):
            groups = F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size)).double()
            amax = groups.abs().amax(-1, keepdim=True)
            if top == 448:
                amax = amax.clamp_min(1e-4)
            steps = groups / amax.clamp_min(1e-300) * top
            if top == 448:                              # in units of the last bit of e4m3, also of the ue8m0 step
                for q in (steps, groups / up_to_power_of_two((amax / 448).float()).double()):
                    unit = torch.exp2(torch.frexp(q).exponent.clamp_min(-5).double() - 4)
                    near = ((q / unit - (q / unit).floor() - 0.5).abs() < 1e-4) & (groups.abs() < amax)
                    moved |= near.flatten(1)[:, :x.shape[1]]
            else:
                near = ((steps - steps.floor() - 0.5).abs() < 1e-4) & (groups.abs() < amax)
                moved |= near.flatten(1)[:, :x.shape[1]]
        if not moved.any():
            return x
        x = torch.where(moved, x * 0.995, x)
    raise RuntimeError("activations near a rounding border remain")


NATURES = ("plain", "zero", "outlier", "1e30", "denormals", "some denormals", "3e-6", "half zero")


def inputs(cols, generator):
    """[48, cols]: the first rows one of each nature, the rest plain with an outlier column, as activations have."""
    x = torch.randn(48, cols, generator=generator)
    x[:, 3] *= 20
    x[1] = 0
    x[2, cols // 3] = -3e4
    x[3] *= 1e30
    x[4] *= 1e-40
    x[5, ::3] *= 1e-41
    x[6] *= 3e-6                                        # below the least scale of fp8
    x[7, :cols // 2] = 0
    return settle(x)


def error_of(ours, expected, cols, w_max):
    """The worst row: max |difference| / max |out|. Denormal products may be flushed: a floor of 2^-126 each."""
    floor = cols * w_max * 2.0 ** -126
    if not torch.isfinite(ours).all():
        return float("inf")
    d = ((ours.double() - expected.double()).abs().amax(1) - floor).clamp_min(0)
    top = expected.abs().double().amax(1)
    return float(torch.where(d > 0, d / top.clamp_min(1e-300), torch.zeros_like(d)).max())


# ---------------------------------------------------------------- the checks

def check(library_path, report):
    """Rows for the table: one for each type of weight and mode."""
    try:
        library = Library(library_path)
    except OSError as e:
        report.fail("matmul", str(e))
        return []
    modes = ("auto", *MODES) if library.has_modes else ("f32",)
    if not library.has_modes:
        report.skip("matmul: modes", "the library has f32 alone")
    for mode in modes if library.has_modes else ():
        name = library.dsv3.lib.dsv3_compute_name(COMPUTE[mode]).decode()
        report.check(f"matmul: the name of {mode}", name == mode, name)
    generator, rows = torch.Generator().manual_seed(5), []
    for kind in DTYPE:
        base = kind.split()[0]
        worst, weights = {}, []
        for cols, n_rows in SHAPES:
            weights.append((Weight(library, kind, n_rows, cols, generator), inputs(cols, generator)))
        if kind == "F8":                                # its quantiser is the published one, code for code
            for w, _ in weights:
                codes, scale = checkpoints.quantise(w.values, "plain")
                report.check(f"matmul: quantize {list(w.values.shape)}", torch.equal(scale, w.scale) and
                             torch.equal(codes.view(torch.uint8), w.data.view(torch.uint8)), "codes or scales differ from torch's")
        try:
            library.matmul(weights[0][1][:1], weights[0][0], modes[-1], "scalar")
        except ffi.Dsv3Error as e:
            if base == "I8":
                report.skip(f"matmul: {kind}", str(e))
            else:
                report.fail(f"matmul: {kind}", str(e))
            continue
        for w, x in weights:
            cols, w_max = w.data.shape[1], float(w.values.abs().max())
            for mode in modes:
                # Whether byte scales, powers of two by nature, bind the activations as well is the library's choice.
                choices = {"": linear(x, w.data, w.scale, w.block, mode)}
                if kind == "F8 E8M0" and mode == "fp8":
                    choices[", ue8m0"] = linear(x, w.data, w.scale, w.block, mode, ue8m0=True)
                for isa in library.isas:
                    for choice, expected in choices.items():
                        e = 0.0
                        for n in COUNTS:
                            for at in range(0, 8 if n < 5 else 1, n):       # each nature in small numbers too
                                ours = library.matmul(x[at:at + n], w, mode, isa)
                                e = max(e, error_of(ours, expected[at:at + n], cols, w_max))
                        key = mode, choice, isa
                        worst[key] = max(worst.get(key, 0.0), e)
        for mode in modes:
            found = {}
            for choice in sorted({c for m, c, _ in worst if m == mode}):
                found[choice] = [worst[mode, choice, isa] for isa in library.isas]
            choice = min(found, key=lambda c: max(found[c]))
            report.check(f"matmul: {kind}, {mode}", max(found[choice]) <= TOLERANCE, f"{max(found[choice]):.1e} > {TOLERANCE:.0e}")
            rows.append({"weights": kind, "mode": mode, "is": effective(mode, base) + choice,
                         **{isa: e for isa, e in zip(library.isas, found[choice])}})
        if base == "F8":
            spoilt(library, weights[-1][0], weights[-1][1], modes, report)
    return rows


def spoilt(library, w, x, modes, report):
    """NaN codes make their row NaN and change no other."""
    sound = {(mode, isa): library.matmul(x[:5], w, mode, isa) for mode in modes for isa in library.isas}
    bytes_, rows = w.data.view(torch.uint8), w.data.shape[0]
    keep = bytes_.clone()
    bytes_[3, 0], bytes_[rows - 1, -1] = 0x7F, 0xFF
    for (mode, isa), before in sound.items():
        after = library.matmul(x[:5], w, mode, isa)
        bad = torch.zeros(rows, dtype=torch.bool)
        bad[3] = bad[rows - 1] = True
        report.check(f"matmul: NaN codes, {w.kind}, {mode}, {isa}", bool(after[:, bad].isnan().all()) and
                     torch.equal(after[:, ~bad], before[:, ~bad]), "the row is not NaN, or another changed")
    bytes_.copy_(keep)


def self_check(report):
    """Settled inputs are what they promise, and this file's fp8 is that of transcription.py where both are defined."""
    import transcription
    generator = torch.Generator().manual_seed(6)
    x = inputs(1408, generator)
    amax = x.abs().amax(1, keepdim=True)
    codes, s = int8_quant(x)
    divided = torch.where(s > 0, (x / s).round(), torch.zeros_like(x)).clamp(-127, 127)
    normal = (amax > 1e-30).expand_as(x)                # 127 / amax overflows for denormals
    report.check("self: int8, x / s = x * 127 / amax", torch.equal(codes.float()[normal], divided[normal]))
    for scale_fmt in (None, "ue8m0"):
        codes, s = act_quant(x, scale_fmt is not None)
        theirs, their_s = transcription.act_quant(x, scale_fmt)
        report.check(f"self: act_quant {scale_fmt or 'plain'} = transcription", torch.equal(s, their_s) and
                     torch.equal(codes.view(torch.uint8), theirs.flatten(1).view(torch.uint8)))
        times = (F.pad(x, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)) * (1 / s)[..., None]).clamp(-448, 448)
        report.check(f"self: act_quant {scale_fmt or 'plain'}, x / s = x * (1 / s)",
                     torch.equal(times.to(torch.float8_e4m3fn).flatten(1)[:, :x.shape[1]].view(torch.uint8), codes.view(torch.uint8)))


COLUMNS = [("weights", "weights", "<"), ("asked for", "mode", "<"), ("computed", "is", "<")]


def table(rows):
    from report import number
    from report import table as print_table
    isas = [isa for isa in ISA if any(isa in row for row in rows)]
    return print_table(f"Products against the published arithmetic: worst row, max |difference| / max |out| (limit {TOLERANCE:.0e})",
                       COLUMNS + [(isa, lambda r, isa=isa: number(r.get(isa)), ">") for isa in isas], rows)


def main():
    from report import Report
    report = Report()
    self_check(report)
    rows = check(sys.argv[1] if len(sys.argv) > 1 else "build/libdsv3.so", report)
    print(table(rows))
    print(report.last_line())
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
