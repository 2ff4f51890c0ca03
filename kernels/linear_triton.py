"""Launches `fused_linear`: the form and tile that `launch_config` names for these sizes.

block_m 1           gemv_triton, one token
split > 1           gemm_triton's narrow form, `split` warps' K slices of 128
else                gemm_triton's wide form
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minidsv.kernels.gemm import Segment
from minidsv.kernels.gemm_triton import NARROW, WIDE
from minidsv.kernels.gemv_triton import GEMV
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.segments_triton import slots, tiles
from minidsv.kernels.tile import Tile


def project(x: Tensor, segments: Sequence[Segment], mode: PdlMode) -> list[Tensor]:
    """x [T, in] through each of `segments` -> [T, out] each."""
    weights = [s.weight for s in segments]
    rows = sum(len(w) for w in weights)
    dims = rows, x.shape[1], weights[0].element_size()
    return project_in(launch_config("linear", len(x), dims), x, segments, mode)


def project_in(tile: Tile, x: Tensor, segments: Sequence[Segment], mode: PdlMode) -> list[Tensor]:
    """The same in a given tile."""
    assert x.stride(1) == 1, f"x strides {x.stride()}: want contiguous rows"
    for s in segments:
        assert s.weight.is_contiguous(), f"weight strides {s.weight.stride()}: want contiguous"
        assert s.scale is None or s.scale.is_contiguous(), f"scale strides {s.scale.stride()}"
    args, outputs = slots(x, segments)
    args |= {"x": x, "k_size": x.shape[1]}
    if len(x) == 0:
        return outputs
    spec, grid, sizes = _form(tile, args, len(x), x.stride(0))
    spec.launch(grid, mode, args | sizes, tile.num_warps, tile.num_stages)
    return outputs


def _form(tile: Tile, args: dict[str, Any], m: int, x_stride: int):
    """(kernel, grid, its own arguments)."""
    sizes = {"BLOCK_N": tile.block_n}
    if tile.block_m == 1:
        other = max(1, tile.block_n // 2)
        sizes |= {"BLOCK_K": tile.block_k, "OTHER_N": other}
        return GEMV, (tiles(args, tile.block_n, other),), sizes
    sizes |= {"m": m, "x_stride": x_stride, "BLOCK_M": tile.block_m}
    if tile.split > 1:
        sizes |= {"KS": tile.split, "OTHER_N": 16}
        return NARROW, (tiles(args, tile.block_n, 16),), sizes
    blocks = tiles(args, tile.block_n, tile.block_n)
    return WIDE, (-(-m // tile.block_m), blocks), sizes | {"BLOCK_K": tile.block_k}
