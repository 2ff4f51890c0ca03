"""Launches `fused_linear`: the form and tile that `launch_config` names for these sizes.

block_m 1           gemv_triton, one token
split > 1           gemm_triton's narrow form, `split` warps' K slices of 128
else                gemm_triton's wide form
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minidsv.kernels.gemm import Segment
from minidsv.kernels.gemm_triton import NARROW, WIDE, narrow_sizes, wide_sizes
from minidsv.kernels.gemv_triton import GEMV
from minidsv.kernels.gemv_triton import sizes as gemv_sizes
from minidsv.kernels.launch import KernelSpec
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.norm import PreNorm, pre_norm
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.segments_triton import norm_arguments, slots, tiles
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_gemm import takes_norm


def project(
    x: Tensor, segments: Sequence[Segment], mode: PdlMode, norm: PreNorm | None = None
) -> tuple[list[Tensor], Tensor]:
    """x [T, in] through each of `segments` -> ([T, out] each, x), in one launch.

    With `norm`, whose residual x is: what the norm makes of x, and the sum instead of x; in two
    launches where the tile does not take it. BF16 weights beside FP8 ones take another, unless a
    gate's (fp32 out).
    """
    dims = _size(segments), sum(len(s.weight) for s in segments), x.shape[1]
    tile = launch_config("linear", len(x), dims)
    if norm is not None and not takes_norm(tile):
        x, total = pre_norm(norm, mode)
        return project(x, segments, mode)[0], total
    dense = [s.scale is None and s.out_dtype in (None, x.dtype) for s in segments]
    if not any(dense) or all(s.scale is None for s in segments):
        return project_in(tile, x, segments, mode, norm)
    parts, total = {}, x
    for kind in (False, True):
        mine = [s for s, is_dense in zip(segments, dense, strict=True) if is_dense == kind]
        outputs, total = project(x, mine, mode, norm)
        parts[kind] = iter(outputs)
    return [next(parts[kind]) for kind in dense], total


def _size(segments: Sequence[Segment]) -> int:
    """Bytes of a weight: 1 where any is FP8, which decides the tile, else 2."""
    return 1 if any(s.scale is not None for s in segments) else 2


def project_in(
    tile: Tile, x: Tensor, segments: Sequence[Segment], mode: PdlMode, norm: PreNorm | None = None
) -> tuple[list[Tensor], Tensor]:
    """The same in a given tile, which must take the norm."""
    assert x.stride(1) == 1, f"x strides {x.stride()}: want contiguous rows"
    for s in segments:
        assert s.weight.is_contiguous(), f"weight strides {s.weight.stride()}: want contiguous"
        assert s.scale is not None or s.weight.dtype == x.dtype, f"{s.weight.dtype=} {x.dtype=}"
        assert s.scale is None or s.scale.is_contiguous(), f"scale strides {s.scale.stride()}"
    args, outputs = slots(x, segments)
    args |= {"x": x, "k_size": x.shape[1]}
    specs, grid, own = _form(tile, args, len(x), x.stride(0))
    norms, total = norm_arguments(x, norm)
    args |= own if specs is WIDE else own | norms
    specs[_size(segments)].launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return outputs, total


def _form(
    tile: Tile, args: dict[str, Any], m: int, x_stride: int
) -> tuple[dict[int, KernelSpec], tuple[int, ...], dict[str, Any]]:
    """(kernels, grid, the kernel's own arguments)."""
    if tile.block_m == 1:
        own = gemv_sizes(tile)
        return GEMV, (min(m, 1) * tiles(args, tile.block_n, own["OTHER_N"]),), own
    sizes = narrow_sizes(tile) if tile.split > 1 else wide_sizes(tile)
    own = {"m": m, "x_stride": x_stride, **sizes}
    blocks = tiles(args, tile.block_n, own.get("OTHER_N", tile.block_n))
    if tile.split > 1:
        return NARROW, (min(m, 1) * blocks,), own
    return WIDE, (-(-m // tile.block_m), blocks), own
