"""Triton kernels under `indexer_prep`: a program takes rows of D channels, heads of one token or
keys of several, as four parts: the pairs' first and second channels, of the half that is rotated
and of the rest.

The Hadamard product is taken of each part, by tensor-core dots with +-1 that are exact but for the
fp32 sum, then between the parts, and scaled once. Gain and bias are replay-constant: in prefetch
mode they are loaded before the wait.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant_triton import FP8_LIMITS, fp8_scale, to_e4m3
from minidsv.kernels.rope_triton import load_pairs, store_pairs, turn
from minidsv.kernels.tiles_small import TABLES


@triton.jit
def _load_parts(rows, inside, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Four [N, HALF] from pointers `rows` [N, 1] to 4 HALF channels."""
    a, b = load_pairs(rows, inside, HALF, HALF, INTERLEAVED)
    c, d = load_pairs(rows + 2 * HALF, inside, HALF, HALF, INTERLEAVED)
    return a, b, c, d


@triton.jit
def _store_parts(rows, inside, parts, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse; casts to the rows' dtype."""
    store_pairs(rows, inside, parts[0], parts[1], HALF, HALF, INTERLEAVED)
    store_pairs(rows + 2 * HALF, inside, parts[2], parts[3], HALF, HALF, INTERLEAVED)


@triton.jit
def _hadamard(parts, NORM: tl.constexpr, HALF: tl.constexpr):
    """The product in the same parts, rounded to bf16, in fp32.

    Sylvester's matrix is a Kronecker power: +-1 of HALF channels by a dot, then two butterflies.
    """
    a, b, c, d = parts
    i = tl.arange(0, HALF)
    shared = i[:, None] & i[None, :]  # -1 to the number of bits that row and column share
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    signs = (1 - 2 * (shared & 1)).to(a.dtype)
    a = tl.dot(a, signs, input_precision="ieee")
    b = tl.dot(b, signs, input_precision="ieee")
    c = tl.dot(c, signs, input_precision="ieee")
    d = tl.dot(d, signs, input_precision="ieee")
    a, b = a + b, a - b
    c, d = c + d, c - d
    return _round(a + c, NORM), _round(b + d, NORM), _round(a - c, NORM), _round(b - d, NORM)


@triton.jit
def _round(x, NORM: tl.constexpr):
    return (x * NORM).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _quantize(parts, MAX: tl.constexpr, FLOOR: tl.constexpr):
    """fp32 parts -> e4m3 parts and one power-of-two scale a row [N]."""
    a, b, c, d = parts
    most = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    scale = fp8_scale(tl.max(most, 1), True, MAX, FLOOR)
    inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    inverse = inverse[:, None]  # exact, and so are the products
    a, b = to_e4m3(a * inverse, MAX), to_e4m3(b * inverse, MAX)
    return (a, b, to_e4m3(c * inverse, MAX), to_e4m3(d * inverse, MAX)), scale


@triton.jit
def _turn_parts(a, b, cos, sin, rows, inside, HALF: tl.constexpr):
    """Rotate the pairs by the angles of `rows` and round."""
    i = tl.arange(0, HALF)[None, :]
    c = tl.load(cos + rows * HALF + i, mask=inside, other=0.0)
    s = tl.load(sin + rows * HALF + i, mask=inside, other=0.0)
    first, second = turn(a.to(tl.float32), b.to(tl.float32), c, s)
    return first.to(a.dtype), second.to(b.dtype)


@triton.jit
def _q_parts(
    q, cos, sin, heads, token_stride, head_stride, H,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The rotated parts of one token's `heads`."""
    token = tl.program_id(0).to(tl.int64)
    inside = (heads < H)[:, None]
    rows = q + token * token_stride + heads[:, None].to(tl.int64) * head_stride
    a, b, c, d = _load_parts(rows, inside, HALF, INTERLEAVED)
    a, b = _turn_parts(a, b, cos, sin, token, True, HALF)
    return a, b, c, d


@triton.jit(do_not_specialize=["H"])
def _index_q_plain_kernel(
    q, gate, cos, sin, out, weights, token_stride, head_stride, gate_stride, H,
    head_scale, softmax_scale,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    pdl_begin(PDL)
    w = tl.load(gate + token * gate_stride + heads, mask=heads < H, other=0.0) * head_scale
    parts = _q_parts(q, cos, sin, heads, token_stride, head_stride, H, HALF, INTERLEAVED)
    rows = out + (token * H + heads[:, None]) * D
    _store_parts(rows, (heads < H)[:, None], parts, HALF, INTERLEAVED)
    tl.store(weights + token * H + heads, w * softmax_scale, mask=heads < H)
    pdl_end(PDL)


@triton.jit(do_not_specialize=["H"])
def _index_q_fp8_kernel(
    q, gate, cos, sin, out, weights, token_stride, head_stride, gate_stride, H,
    head_scale, softmax_scale, NORM: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, BH: tl.constexpr, INTERLEAVED: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    pdl_begin(PDL)
    w = tl.load(gate + token * gate_stride + heads, mask=heads < H, other=0.0) * head_scale
    parts = _q_parts(q, cos, sin, heads, token_stride, head_stride, H, HALF, INTERLEAVED)
    parts, scale = _quantize(_hadamard(parts, NORM, HALF), MAX, FLOOR)
    rows = out + (token * H + heads[:, None]) * D
    _store_parts(rows, (heads < H)[:, None], parts, HALF, INTERLEAVED)
    tl.store(weights + token * H + heads, w * scale * softmax_scale, mask=heads < H)
    pdl_end(PDL)


@triton.jit
def _load_vector(x, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A gain or bias [4 HALF] in the same parts, [1, HALF] each."""
    return _load_parts(x + tl.zeros((1, 1), tl.int32), True, HALF, INTERLEAVED)


@triton.jit
def _sum(parts):
    a, b, c, d = parts
    return tl.sum((a + b) + (c + d), 1)[:, None]


@triton.jit
def _layer_norm(parts, gains, biases, eps, D: tl.constexpr):
    """Normalised and rounded parts."""
    a, b, c, d = parts
    dtype: tl.constexpr = a.dtype
    a, b, c, d = a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    mean = _sum((a, b, c, d)) * (1.0 / D)
    a, b, c, d = a - mean, b - mean, c - mean, d - mean
    r = tl.rsqrt(_sum((a * a, b * b, c * c, d * d)) * (1.0 / D) + eps)
    a = (a * r * gains[0] + biases[0]).to(dtype)
    b = (b * r * gains[1] + biases[1]).to(dtype)
    c = (c * r * gains[2] + biases[2]).to(dtype)
    return a, b, c, (d * r * gains[3] + biases[3]).to(dtype)


@triton.jit
def _k_parts(
    k, gains, biases, cos, sin, tokens, k_stride, T, eps,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The normalised and rotated parts of the keys of `tokens` [BT] int64."""
    rows, inside = tokens[:, None], (tokens < T)[:, None]
    parts = _load_parts(k + rows * k_stride, inside, HALF, INTERLEAVED)
    a, b, c, d = _layer_norm(parts, gains, biases, eps, 4 * HALF)
    a, b = _turn_parts(a, b, cos, sin, rows, inside, HALF)
    return a, b, c, d


@triton.jit(do_not_specialize=["T"])
def _index_k_plain_kernel(
    keys, loc, k, gain, bias, cos, sin, k_stride, T, eps,
    D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    if PDL == "prefetch":
        gains = _load_vector(gain, HALF, INTERLEAVED)
        biases = _load_vector(bias, HALF, INTERLEAVED)
    pdl_begin(PDL)
    slots = tl.load(loc + tokens, mask=tokens < T, other=0).to(tl.int64)
    if PDL != "prefetch":
        gains = _load_vector(gain, HALF, INTERLEAVED)
        biases = _load_vector(bias, HALF, INTERLEAVED)
    parts = _k_parts(
        k, gains, biases, cos, sin, tokens, k_stride, T, eps, HALF, INTERLEAVED
    )  # fmt: skip
    _store_parts(keys + slots[:, None] * D, (tokens < T)[:, None], parts, HALF, INTERLEAVED)
    pdl_end(PDL)


@triton.jit(do_not_specialize=["T"])
def _index_k_fp8_kernel(
    keys, scales, loc, k, gain, bias, cos, sin, k_stride, T, eps, NORM: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    if PDL == "prefetch":
        gains = _load_vector(gain, HALF, INTERLEAVED)
        biases = _load_vector(bias, HALF, INTERLEAVED)
    pdl_begin(PDL)
    slots = tl.load(loc + tokens, mask=tokens < T, other=0).to(tl.int64)
    if PDL != "prefetch":
        gains = _load_vector(gain, HALF, INTERLEAVED)
        biases = _load_vector(bias, HALF, INTERLEAVED)
    parts = _k_parts(
        k, gains, biases, cos, sin, tokens, k_stride, T, eps, HALF, INTERLEAVED
    )  # fmt: skip
    parts, scale = _quantize(_hadamard(parts, NORM, HALF), MAX, FLOOR)
    page, offset = slots // PAGE, slots % PAGE
    rows = keys + page * (PAGE * (D + 4)) + offset * D
    _store_parts(rows[:, None], (tokens < T)[:, None], parts, HALF, INTERLEAVED)
    at = page * (PAGE * (D + 4) // 4) + PAGE * D // 4 + offset
    tl.store(scales + at, scale, mask=tokens < T)
    pdl_end(PDL)


_VECTORS: dict[str, str | int | float] = dict.fromkeys(("cos", "sin"), "*fp32:16")
_LAYOUTS = (False, True)  # interleaved; D 128, of which 64 are rotated


def _fp8_constants(dim: int) -> dict[str, Any]:
    return {"NORM": dim**-0.5} | FP8_LIMITS


def _q_rows(out: str, **more: Any) -> tuple[Row, ...]:
    arguments = _VECTORS | {"q": "*bf16:16", "gate": "*fp32:16", "out": f"*{out}:16"} | more
    arguments |= {"weights": "*fp32:16", "H": "i32", "head_scale": "fp32", "softmax_scale": "fp32"}
    arguments |= {"token_stride": "i32:16", "head_stride": "i32:16", "gate_stride": "i32:16"}
    return tuple(
        Row(
            arguments | {"D": 128, "HALF": 32, "BH": tile.block_m, "INTERLEAVED": layout},
            tile.num_warps,
        )
        for tile in TABLES["index_q_prep"]
        for layout in _LAYOUTS
    )


def _k_rows(keys: str, **more: Any) -> tuple[Row, ...]:
    arguments = _VECTORS | {"keys": f"*{keys}:16", "k": "*bf16:16", "T": "i32"} | more
    arguments |= {"gain": "*fp32:16", "bias": "*fp32:16", "k_stride": "i32:16", "eps": "fp32"}
    return tuple(
        Row(
            arguments
            | {"loc": f"*{loc}:16", "D": 128, "HALF": 32, "BT": tile.block_m}
            | {"INTERLEAVED": layout},
            tile.num_warps,
        )
        for loc in ("i64", "i32")
        for tile in TABLES["index_k_write"]
        for layout in _LAYOUTS
    )


_CONSTANT = frozenset({"gain", "bias"})
Q_PLAIN = KernelSpec(_index_q_plain_kernel, _q_rows("bf16"))
Q_FP8 = KernelSpec(_index_q_fp8_kernel, _q_rows("fp8e4nv", **_fp8_constants(128)))
K_PLAIN = KernelSpec(_index_k_plain_kernel, _k_rows("bf16"), _CONSTANT)
K_FP8 = KernelSpec(
    _index_k_fp8_kernel,
    _k_rows("fp8e4nv", scales="*fp32:16", PAGE=PAGE_SIZE, **_fp8_constants(128)),
    _CONSTANT,
)
SPECS = (Q_PLAIN, Q_FP8, K_PLAIN, K_FP8)


def _parts(dim: int, cos: Tensor) -> dict[str, int]:
    """D and HALF: the kernels turn the first half of the channels, in parts that a dot takes."""
    half = cos.shape[1]
    assert dim == 4 * half, f"{2 * half} of {dim} channels are rotated, want half of them"
    assert half in (16, 32), f"{dim} channels: the Triton kernels take 64 or 128"
    return {"D": dim, "HALF": half}


def index_q_prep(
    q: Tensor,
    gate: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    softmax_scale: float,
    head_scale: float,
    fp8: bool,
    mode: PdlMode,
) -> tuple[Tensor, Tensor]:
    """q [T, H, D] and gate [T, H], last axes contiguous."""
    for name, x in (("q", q), ("gate", gate)):
        assert x.stride(-1) == 1, f"{name} strides {x.stride()}: want the last axis contiguous"
    tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=torch.float8_e4m3fn if fp8 else q.dtype, device=q.device)
    weights = torch.empty(gate.shape, dtype=torch.float32, device=q.device)
    tile = launch_config("index_q_prep", tokens, (heads, dim))
    args: dict[str, Any] = {"q": q, "gate": gate, "cos": cos, "sin": sin, "out": out}
    args |= {"weights": weights, "head_scale": head_scale, "softmax_scale": softmax_scale}
    args |= {"token_stride": q.stride(0), "head_stride": q.stride(1), "H": heads}
    args |= {"gate_stride": gate.stride(0), "BH": tile.block_m, "INTERLEAVED": interleaved}
    args |= _parts(dim, cos) | (_fp8_constants(dim) if fp8 else {})
    grid = (tokens, cdiv(heads, tile.block_m))
    (Q_FP8 if fp8 else Q_PLAIN).launch(grid, mode, args, tile.num_warps)
    return out, weights


def index_k_write(
    buffer: Tensor,
    loc: Tensor,
    k: Tensor,
    gain: Tensor,
    bias: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    mode: PdlMode,
) -> None:
    """k [T, D], last axis contiguous; a uint8 buffer takes DeepGEMM's page."""
    assert loc.is_contiguous(), f"loc has stride {loc.stride()}"
    assert k.stride(1) == 1, f"k strides {k.stride()}: want contiguous rows"
    tokens, dim = k.shape
    tile = launch_config("index_k_write", tokens, (dim,))
    args: dict[str, Any] = {"loc": loc, "k": k, "gain": gain, "bias": bias, "eps": eps}
    args |= {"cos": cos, "sin": sin, "k_stride": k.stride(0), "T": tokens, "BT": tile.block_m}
    args |= {"INTERLEAVED": interleaved} | _parts(dim, cos)
    spec = K_PLAIN
    if buffer.dtype == torch.uint8:
        spec = K_FP8
        args |= {"scales": buffer.view(torch.float32), "PAGE": PAGE_SIZE} | _fp8_constants(dim)
        buffer = buffer.view(torch.float8_e4m3fn)
    spec.launch((cdiv(tokens, tile.block_m),), mode, args | {"keys": buffer}, tile.num_warps)
