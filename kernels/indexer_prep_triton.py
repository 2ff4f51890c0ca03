"""Triton kernels under `indexer_prep`: a program takes rows of D channels, heads of one token or
keys of several, as four parts: the pairs' first and second channels, of the half that is rotated
and of the rest.

The Hadamard product is taken of each part, by tensor-core dots with +-1 that are exact but for the
fp32 sum, then between the parts, and scaled once. Gain and bias are replay-constant: in prefetch
mode they are loaded before the wait.
"""

from collections.abc import Iterator
from itertools import product
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
def prepare_queries(
    q, gate, cos, sin, out, weights, token, heads, H, head_scale, softmax_scale,
    NORM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """`heads` of one token (int64): q points to their rows [N, 1], gate to the token's."""
    inside = heads < H
    w = tl.load(gate + heads, mask=inside, other=0.0) * head_scale
    a, b, c, d = _load_parts(q, inside[:, None], HALF, INTERLEAVED)
    a, b = _turn_parts(a, b, cos, sin, token, True, HALF)
    rows = out + (token * H + heads[:, None]) * (4 * HALF)
    if out.dtype.element_ty.is_fp8():
        parts, scale = _quantize(_hadamard((a, b, c, d), NORM, HALF), MAX, FLOOR)
        _store_parts(rows, inside[:, None], parts, HALF, INTERLEAVED)
        w *= scale
    else:
        _store_parts(rows, inside[:, None], (a, b, c, d), HALF, INTERLEAVED)
    tl.store(weights + token * H + heads, w * softmax_scale, mask=inside)


@triton.jit(do_not_specialize=["H"])
def _index_q_kernel(
    q, gate, cos, sin, out, weights, token_stride, head_stride, gate_stride, H,
    head_scale, softmax_scale, NORM: tl.constexpr,
    HALF: tl.constexpr, BH: tl.constexpr, INTERLEAVED: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    pdl_begin(PDL)
    q += token * token_stride + heads[:, None].to(tl.int64) * head_stride
    prepare_queries(
        q, gate + token * gate_stride, cos, sin, out, weights, token, heads, H,
        head_scale, softmax_scale, NORM, HALF, INTERLEAVED, MAX, FLOOR,
    )  # fmt: skip
    pdl_end(PDL)


@triton.jit
def load_vector(x, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
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
def write_keys(
    keys, loc, k, gains, biases, cos, sin, tokens, T, eps, NORM: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The keys of `tokens` [BT] (int64) whose rows k [BT, 1] points to; quantised if e4m3."""
    D: tl.constexpr = 4 * HALF
    rows, inside = tokens[:, None], (tokens < T)[:, None]
    slots = tl.load(loc + tokens, mask=tokens < T, other=0).to(tl.int64)
    parts = _load_parts(k, inside, HALF, INTERLEAVED)
    a, b, c, d = _layer_norm(parts, gains, biases, eps, D)
    a, b = _turn_parts(a, b, cos, sin, rows, inside, HALF)
    if keys.dtype.element_ty.is_fp8():
        parts, scale = _quantize(_hadamard((a, b, c, d), NORM, HALF), MAX, FLOOR)
        page, offset = slots // PAGE, slots % PAGE
        to = keys + page * (PAGE * (D + 4)) + offset * D
        _store_parts(to[:, None], inside, parts, HALF, INTERLEAVED)
        at = page * (PAGE * (D + 4) // 4) + PAGE * D // 4 + offset
        tl.store(keys.to(tl.pointer_type(tl.float32)) + at, scale, mask=tokens < T)
    else:
        _store_parts(keys + slots[:, None] * D, inside, (a, b, c, d), HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["T"])
def _index_k_kernel(
    keys, loc, k, gain, bias, cos, sin, k_stride, T, eps, NORM: tl.constexpr,
    HALF: tl.constexpr, BT: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    if PDL == "prefetch":
        gains = load_vector(gain, HALF, INTERLEAVED)
        biases = load_vector(bias, HALF, INTERLEAVED)
    pdl_begin(PDL)
    if PDL != "prefetch":
        gains = load_vector(gain, HALF, INTERLEAVED)
        biases = load_vector(bias, HALF, INTERLEAVED)
    write_keys(
        keys, loc, k + tokens[:, None] * k_stride, gains, biases, cos, sin, tokens, T, eps,
        NORM, HALF, INTERLEAVED, PAGE, MAX, FLOOR,
    )  # fmt: skip
    pdl_end(PDL)


_VECTORS: dict[str, str | int | float] = dict.fromkeys(("cos", "sin"), "*fp32:16")
_LAYOUTS = (False, True)  # interleaved; D 128, of which 64 are rotated


def constants(half: int, interleaved: bool) -> dict[str, Any]:
    """What is known of rows of 4 `half` channels, quantised or not."""
    return {"NORM": (4 * half) ** -0.5, "HALF": half, "INTERLEAVED": interleaved} | FP8_LIMITS


def _q_rows() -> Iterator[Row]:
    arguments: dict[str, Any] = _VECTORS | {
        "q": "*bf16:16",
        "gate": "*fp32:16",
        "weights": "*fp32:16",
    }
    arguments |= {"H": "i32", "head_scale": "fp32", "softmax_scale": "fp32"}
    arguments |= {"token_stride": "i32:16", "head_stride": "i32:16", "gate_stride": "i32:16"}
    for out, tile, layout in product(_TYPES, TABLES["index_q_prep"], _LAYOUTS):
        sizes = {"out": f"*{out}:16", "BH": tile.block_m}
        yield Row(arguments | sizes | constants(32, layout), tile.num_warps)


def _k_rows() -> Iterator[Row]:
    arguments: dict[str, Any] = _VECTORS | {"k": "*bf16:16", "T": "i32", "PAGE": PAGE_SIZE}
    arguments |= {"gain": "*fp32:16", "bias": "*fp32:16", "k_stride": "i32:16", "eps": "fp32"}
    for keys, loc, tile, layout in product(
        _TYPES, ("i64", "i32"), TABLES["index_k_write"], _LAYOUTS
    ):
        sizes = {"keys": f"*{keys}:16", "loc": f"*{loc}:16", "BT": tile.block_m}
        yield Row(arguments | sizes | constants(32, layout), tile.num_warps)


_TYPES = ("bf16", "fp8e4nv")
INDEX_Q = KernelSpec(_index_q_kernel, tuple(_q_rows()))
INDEX_K = KernelSpec(_index_k_kernel, tuple(_k_rows()), frozenset({"gain", "bias"}))
SPECS = (INDEX_Q, INDEX_K)


def half_of(dim: int, cos: Tensor) -> int:
    """A quarter of the channels: the kernels turn the first half of them, in parts for a dot."""
    half = cos.shape[1]
    assert dim == 4 * half, f"{2 * half} of {dim} channels are rotated, want half of them"
    assert half in (16, 32), f"{dim} channels: the Triton kernels take 64 or 128"
    return half


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
    args |= {"gate_stride": gate.stride(0), "BH": tile.block_m}
    args |= constants(half_of(dim, cos), interleaved)
    INDEX_Q.launch((tokens, cdiv(heads, tile.block_m)), mode, args, tile.num_warps)
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
    args |= {"PAGE": PAGE_SIZE} | constants(half_of(dim, cos), interleaved)
    args |= {"keys": typed(buffer)}
    INDEX_K.launch((cdiv(tokens, tile.block_m),), mode, args, tile.num_warps)


def typed(buffer: Tensor) -> Tensor:
    """A cache of bytes as its e4m3 values."""
    return buffer.view(torch.float8_e4m3fn) if buffer.dtype == torch.uint8 else buffer
