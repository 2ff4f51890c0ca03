"""Triton kernels under `mla_prep`: one program a token, its row stored by set_mla_kv_buffer's
functions.

The gain alone is replay-constant: in prefetch mode it is loaded before the wait.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.norm_triton import rms_normalize
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant_triton import FP8_LIMITS, divide, to_e4m3
from minidsv.kernels.rope_triton import load_angles, load_pairs, turn
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes
from minidsv.kernels.set_mla_kv_buffer_triton import DIMS, store_fp8_row, store_plain_row
from minidsv.kernels.tiles_small import TABLES


@triton.jit
def normed(row, gain, c, eps, C: tl.constexpr):
    """The latent at `row`, normalised and rounded to its dtype."""
    wide = tl.load(row + c, mask=c < C, other=0.0).to(tl.float32)
    return rms_normalize(wide, gain, C, eps).to(row.dtype.element_ty)


@triton.jit
def turned(row, cos, sin, token, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The k_pe [BLOCK_R] at `row`, rotated by the token's angles and rounded to its dtype."""
    a, b = load_pairs(row + tl.zeros((1, 1), tl.int32), True, R // 2, BLOCK_R // 2, True)
    c = load_angles(cos, token, R // 2, BLOCK_R // 2)
    s = load_angles(sin, token, R // 2, BLOCK_R // 2)
    a, b = turn(a.to(tl.float32), b.to(tl.float32), c, s)
    dtype: tl.constexpr = row.dtype.element_ty
    return tl.reshape(tl.join(a.to(dtype), b.to(dtype)), (BLOCK_R,))


@triton.jit
def _plain_kernel(
    kv_buffer, loc, latent, gain, k_pe, cos, sin,
    slot_stride, latent_stride, pe_stride, eps,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    if PDL == "prefetch":
        g = tl.load(gain + c, mask=c < C, other=0.0)
    pdl_begin(PDL)
    slot = tl.load(loc + token).to(tl.int64)
    if PDL != "prefetch":
        g = tl.load(gain + c, mask=c < C, other=0.0)
    rope = turned(k_pe + token * pe_stride, cos, sin, token, R, BLOCK_R)
    nope = normed(latent + token * latent_stride, g, c, eps, C)
    store_plain_row(kv_buffer + slot * slot_stride, nope, rope, c, r, C, R)
    pdl_end(PDL)


@triton.jit
def _flat_kernel(
    kv_buffer, loc, latent, gain, k_pe, cos, sin,
    slot_stride, latent_stride, pe_stride, eps, scale,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    MAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    if PDL == "prefetch":
        g = tl.load(gain + c, mask=c < C, other=0.0)
    pdl_begin(PDL)
    slot = tl.load(loc + token).to(tl.int64)
    if PDL != "prefetch":
        g = tl.load(gain + c, mask=c < C, other=0.0)
    rope = turned(k_pe + token * pe_stride, cos, sin, token, R, BLOCK_R).to(tl.float32)
    nope = normed(latent + token * latent_stride, g, c, eps, C).to(tl.float32)
    nope = to_e4m3(divide(nope, scale), MAX)
    rope = to_e4m3(divide(rope, scale), MAX)
    store_plain_row(kv_buffer + slot * slot_stride, nope, rope, c, r, C, R)
    pdl_end(PDL)


@triton.jit
def _fp8_kernel(
    latent_out, scales, rope_out, loc, latent, gain, k_pe, cos, sin,
    slot_stride, latent_stride, pe_stride, eps,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    g, r = tl.arange(0, BLOCK_C // 128), tl.arange(0, BLOCK_R)
    c = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    if PDL == "prefetch":
        gains = tl.load(gain + c, mask=c < C, other=0.0)
    pdl_begin(PDL)
    slot = tl.load(loc + token).to(tl.int64)
    if PDL != "prefetch":
        gains = tl.load(gain + c, mask=c < C, other=0.0)
    rope = turned(k_pe + token * pe_stride, cos, sin, token, R, BLOCK_R)
    nope = normed(latent + token * latent_stride, gains, c, eps, C)
    store_fp8_row(
        latent_out + slot * slot_stride,
        scales + slot * (slot_stride // 4),
        rope_out + slot * (slot_stride // 2),
        nope, rope, g, c, r, C, R, MAX, FLOOR,
    )  # fmt: skip
    pdl_end(PDL)


def _sizes(c: int, r: int) -> dict[str, int]:
    return {"C": c, "R": r, "BLOCK_C": next_power_of_2(c), "BLOCK_R": next_power_of_2(r)}


def _rows(outputs: dict[str, str], fp8: bool = False, **more: str | int | float) -> tuple[Row, ...]:
    """Launches on the models' sizes: `outputs` name -> pointee, `more` what one kernel adds."""
    arguments: dict[str, str | int | float] = {n: f"*{t}:16" for n, t in outputs.items()}
    arguments |= {"latent": "*bf16:16", "k_pe": "*bf16:16"}
    arguments |= dict.fromkeys(("gain", "cos", "sin"), "*fp32:16")
    arguments |= dict.fromkeys(("latent_stride", "pe_stride"), "i32:16") | {"eps": "fp32"} | more
    rows = []
    for c, r in DIMS:
        width = fp8_row_bytes(c, r) if fp8 else c + r
        slot = {"loc": "*i64:16", "slot_stride": "i32" if width % 16 else "i32:16"}
        rows += [
            Row(arguments | slot | _sizes(c, r), tile.num_warps)
            for tile in TABLES["norm_rope_set_mla_kv_buffer"]
        ]
    return tuple(rows)


_CONSTANT = frozenset({"gain"})
PLAIN = KernelSpec(_plain_kernel, _rows({"kv_buffer": "bf16"}), _CONSTANT)
FLAT = KernelSpec(
    _flat_kernel,
    _rows({"kv_buffer": "fp8e4nv"}, scale="fp32", MAX=FP8_LIMITS["MAX"]),
    _CONSTANT,
)
FP8 = KernelSpec(
    _fp8_kernel,
    _rows({"latent_out": "fp8e4nv", "scales": "fp32", "rope_out": "bf16"}, True, **FP8_LIMITS),
    _CONSTANT,
)
SPECS = (PLAIN, FLAT, FP8)


def write_rows(
    kv_buffer: Tensor,
    loc: Tensor,
    latent: Tensor,
    gain: Tensor,
    eps: float,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    mode: PdlMode,
) -> None:
    """The buffer's dtype chooses the kernel: uint8 fp8 rows, e4m3 flat ones, plain otherwise."""
    assert loc.is_contiguous(), f"loc has stride {loc.stride()}"
    for name, x in (("latent", latent), ("k_pe", k_pe)):
        assert x.stride(1) == 1, f"{name} strides {x.stride()}: want contiguous rows"
    args: dict[str, Any] = {"loc": loc, "latent": latent, "gain": gain, "k_pe": k_pe, "eps": eps}
    args |= {"cos": cos, "sin": sin, "slot_stride": kv_buffer.stride(0)}
    args |= {"latent_stride": latent.stride(0), "pe_stride": k_pe.stride(0)}
    args |= _sizes(latent.shape[1], k_pe.shape[1])
    spec = PLAIN
    if kv_buffer.dtype == torch.uint8:
        spec = FP8
        args |= FP8_LIMITS | {
            "latent_out": kv_buffer.view(torch.float8_e4m3fn),
            "scales": kv_buffer.view(torch.float32),
            "rope_out": kv_buffer.view(torch.bfloat16),
        }
    else:
        args |= {"kv_buffer": kv_buffer}
    if kv_buffer.dtype == torch.float8_e4m3fn:
        spec = FLAT
        args |= {"scale": scale, "MAX": FP8_LIMITS["MAX"]}
    tile = launch_config("norm_rope_set_mla_kv_buffer", len(loc), latent.shape[1:])
    spec.launch(loc.shape, mode, args, tile.num_warps)
