"""Triton kernel under `rope_quant`: a program takes some heads of a token, the last one its key."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant import E4M3_MAX
from minidsv.kernels.quant_triton import divide, to_e4m3
from minidsv.kernels.rope_triton import load_angles, load_pairs, store_pairs, turn
from minidsv.kernels.tiles_small import TABLES


@triton.jit
def _quantize_rows(
    nope, pe, nope_out, pe_out, inside, c, s, scale,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    MAX: tl.constexpr,
):  # fmt: skip
    """Rows at four pointers [N, 1]; cos and sin [1, BLOCK_R / 2]."""
    i = tl.arange(0, BLOCK_C)[None, :]
    mask = inside & (i < C)
    a, b = load_pairs(pe, inside, R // 2, BLOCK_R // 2, True)
    x = tl.load(nope + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(nope_out + i, to_e4m3(divide(x, scale), MAX), mask=mask)
    a, b = turn(a.to(tl.float32), b.to(tl.float32), c, s)
    a, b = to_e4m3(divide(a, scale), MAX), to_e4m3(divide(b, scale), MAX)
    store_pairs(pe_out, inside, a, b, R // 2, BLOCK_R // 2, True)


@triton.jit(do_not_specialize=["H"])
def _rope_quantize_kernel(
    q_nope, q_pe, k_nope, k_pe, cos, sin, q8_nope, q8_pe, k8_nope, k8_pe,
    q_nope_token, q_nope_head, q_pe_token, q_pe_head, k_nope_token, k_pe_token,
    H, q_scale, k_scale,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BH: tl.constexpr, MAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    pdl_begin(PDL)
    c = load_angles(cos, token, R // 2, BLOCK_R // 2)
    s = load_angles(sin, token, R // 2, BLOCK_R // 2)
    if part < tl.num_programs(1) - 1:
        h = (part * BH + tl.arange(0, BH))[:, None].to(tl.int64)
        _quantize_rows(
            q_nope + token * q_nope_token + h * q_nope_head,
            q_pe + token * q_pe_token + h * q_pe_head,
            q8_nope + (token * H + h) * C, q8_pe + (token * H + h) * R,
            h < H, c, s, q_scale, C, R, BLOCK_C, BLOCK_R, MAX,
        )  # fmt: skip
    else:
        one = tl.zeros((1, 1), tl.int32)
        _quantize_rows(
            k_nope + token * k_nope_token + one, k_pe + token * k_pe_token + one,
            k8_nope + token * C + one, k8_pe + token * R + one,
            one == 0, c, s, k_scale, C, R, BLOCK_C, BLOCK_R, MAX,
        )  # fmt: skip
    pdl_end(PDL)


_INPUTS = ("q_nope", "q_pe", "k_nope", "k_pe")
_OUTPUTS = ("q8_nope", "q8_pe", "k8_nope", "k8_pe")
_STRIDES = tuple(
    f"{n}_{axis}" for n in _INPUTS for axis in ("token", "head") if (n[0], axis) != ("k", "head")
)


def _rows() -> tuple[Row, ...]:
    arguments: dict[str, str | int | float] = dict.fromkeys(_INPUTS, "*bf16:16")
    arguments |= dict.fromkeys(("cos", "sin"), "*fp32:16") | dict.fromkeys(_STRIDES, "i32:16")
    arguments |= dict.fromkeys(_OUTPUTS, "*fp8e4nv:16")
    arguments |= {"H": "i32", "q_scale": "fp32", "k_scale": "fp32", "MAX": E4M3_MAX}
    return tuple(
        Row(arguments | _sizes(c, 64) | {"BH": tile.block_m}, tile.num_warps)
        for c in (512, 128)
        for tile in TABLES["rope_quantize"]
    )


def _sizes(c: int, r: int) -> dict[str, int]:
    return {"C": c, "R": r, "BLOCK_C": next_power_of_2(c), "BLOCK_R": next_power_of_2(r)}


ROPE_QUANTIZE = KernelSpec(_rope_quantize_kernel, _rows())
SPECS = (ROPE_QUANTIZE,)


def rope_quantize(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_scale: float,
    k_scale: float,
    mode: PdlMode,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Last axes contiguous -> contiguous e4m3."""
    inputs = dict(zip(_INPUTS, (q_nope, q_pe, k_nope, k_pe), strict=True))
    args: dict[str, Any] = {**inputs, "cos": cos, "sin": sin}
    for name, x in inputs.items():
        assert x.stride(-1) == 1, f"{name} strides {x.stride()}: want the last axis contiguous"
        args[f"{name}_token"] = x.stride(0)
        if x.dim() == 3:
            args[f"{name}_head"] = x.stride(1)
    outputs = [
        torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in inputs.values()
    ]
    tokens, heads, c = q_nope.shape
    tile = launch_config("rope_quantize", tokens, (heads, c))
    args |= dict(zip(_OUTPUTS, outputs, strict=True)) | _sizes(c, q_pe.shape[2])
    args |= {"H": heads, "q_scale": q_scale, "k_scale": k_scale}
    args |= {"BH": tile.block_m, "MAX": E4M3_MAX}
    grid = (tokens, cdiv(heads, tile.block_m) + 1)
    ROPE_QUANTIZE.launch(grid, mode, args, tile.num_warps)
    return outputs[0], outputs[1], outputs[2], outputs[3]
