"""Triton kernels under `norm`: one program a row, the row in registers.

The gain (and the bias) is replay-constant: in prefetch mode it is loaded before the wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tiles_small import NORM_TILES


@triton.jit
def rms_normalize(wide, gain, D, eps):
    """fp32 row of any shape; what lies beyond D must be 0."""
    return wide * tl.rsqrt(tl.sum(wide * wide) / D + eps) * gain


@triton.jit
def _load_row(x, stride, c, D):
    row = tl.program_id(0).to(tl.int64) * stride
    return tl.load(x + row + c, mask=c < D, other=0.0).to(tl.float32)


@triton.jit
def _store_row(out, value, c, D):
    row = tl.program_id(0).to(tl.int64) * D
    tl.store(out + row + c, value.to(out.dtype.element_ty), mask=c < D)


@triton.jit
def _rms_norm_kernel(
    x, weight, out, x_stride, D, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    if PDL == "prefetch":
        gain = tl.load(weight + c, mask=c < D, other=0.0)
    pdl_begin(PDL)
    wide = _load_row(x, x_stride, c, D)
    if PDL != "prefetch":
        gain = tl.load(weight + c, mask=c < D, other=0.0)
    _store_row(out, rms_normalize(wide, gain, D, eps), c, D)
    pdl_end(PDL)


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, out, total, x_stride, residual_stride, D, eps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    if PDL == "prefetch":
        gain = tl.load(weight + c, mask=c < D, other=0.0)
    pdl_begin(PDL)
    wide = _load_row(x, x_stride, c, D) + _load_row(residual, residual_stride, c, D)
    if PDL != "prefetch":
        gain = tl.load(weight + c, mask=c < D, other=0.0)
    _store_row(total, wide, c, D)
    _store_row(out, rms_normalize(wide, gain, D, eps), c, D)
    pdl_end(PDL)


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, out, x_stride, D, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    if PDL == "prefetch":
        gain = tl.load(weight + c, mask=c < D, other=0.0)
        shift = tl.load(bias + c, mask=c < D, other=0.0)
    pdl_begin(PDL)
    wide = _load_row(x, x_stride, c, D)
    if PDL != "prefetch":
        gain = tl.load(weight + c, mask=c < D, other=0.0)
        shift = tl.load(bias + c, mask=c < D, other=0.0)
    centred = tl.where(c < D, wide - tl.sum(wide) / D, 0.0)
    _store_row(out, rms_normalize(centred, gain, D, eps) + shift, c, D)
    pdl_end(PDL)


def _rows(op: str, pointers: dict[str, str], *strides: str) -> tuple[Row, ...]:
    """A row for each tile of `op`: `pointers` to aligned memory, strides and D divisible by 16."""
    arguments: dict[str, str | int | float] = {n: f"*{t}:16" for n, t in pointers.items()}
    arguments |= dict.fromkeys((*strides, "D"), "i32:16") | {"eps": "fp32"}
    return tuple(
        Row(arguments | {"BLOCK": tile.block_n}, tile.num_warps) for tile in NORM_TILES[op]
    )


_ADD = {"x": "bf16", "residual": "bf16", "weight": "fp32", "out": "bf16", "total": "bf16"}
RMS_NORM = KernelSpec(
    _rms_norm_kernel,
    _rows("rms_norm", {"x": "bf16", "weight": "fp32", "out": "bf16"}, "x_stride"),
    frozenset({"weight"}),
)
ADD_RMS_NORM = KernelSpec(
    _add_rms_norm_kernel,
    _rows("add_rms_norm", _ADD, "x_stride", "residual_stride"),
    frozenset({"weight"}),
)
LAYER_NORM = KernelSpec(
    _layer_norm_kernel,
    _rows("layer_norm", {"x": "bf16", "weight": "fp32", "bias": "fp32", "out": "bf16"}, "x_stride"),
    frozenset({"weight", "bias"}),
)
SPECS = (RMS_NORM, ADD_RMS_NORM, LAYER_NORM)


def _launch(spec: KernelSpec, op: str, x: Tensor, mode: PdlMode, args: dict[str, object]) -> None:
    assert x.dim() == 2, f"x {tuple(x.shape)} is not [T, D]"
    assert x.stride(1) == 1, f"x strides {x.stride()}: want contiguous rows"
    tokens, dim = x.shape
    tile = launch_config(op, tokens, (dim,))
    args |= {"x": x, "x_stride": x.stride(0), "D": dim, "BLOCK": tile.block_n}
    spec.launch((tokens,), mode, args, tile.num_warps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, mode: PdlMode) -> Tensor:
    """x [T, D], last axis contiguous; weight fp32 [D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(RMS_NORM, "rms_norm", x, mode, {"weight": weight, "out": out, "eps": eps})
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, mode: PdlMode
) -> tuple[Tensor, Tensor]:
    """x and residual [T, D], last axes contiguous; weight fp32 [D]."""
    assert residual.stride(1) == 1, f"residual strides {residual.stride()}: want contiguous rows"
    out, total = (
        torch.empty(x.shape, dtype=residual.dtype, device=residual.device) for _ in range(2)
    )
    args: dict[str, object] = {"weight": weight, "out": out, "total": total, "eps": eps}
    args |= {"residual": residual, "residual_stride": residual.stride(0)}
    _launch(ADD_RMS_NORM, "add_rms_norm", x, mode, args)
    return out, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mode: PdlMode) -> Tensor:
    """x [T, D], last axis contiguous; weight and bias fp32 [D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    args: dict[str, object] = {"weight": weight, "bias": bias, "out": out, "eps": eps}
    _launch(LAYER_NORM, "layer_norm", x, mode, args)
    return out
