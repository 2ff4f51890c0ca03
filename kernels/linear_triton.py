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
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.segments_triton import slots, tiles
from minidsv.kernels.tile import Tile


def project(x: Tensor, segments: Sequence[Segment], mode: PdlMode) -> list[Tensor]:
    """x [T, in] through each of `segments` -> [T, out] each, in one launch.

    BF16 weights beside FP8 ones take a second, unless a gate's (fp32 out).
    """
    dense = [s.scale is None and s.out_dtype in (None, x.dtype) for s in segments]
    if any(dense) and any(s.scale is not None for s in segments):
        pairs = list(zip(segments, dense, strict=True))
        parts = {
            kind: iter(project(x, [s for s, is_dense in pairs if is_dense == kind], mode))
            for kind in (False, True)
        }
        return [next(parts[is_dense]) for is_dense in dense]
    dims = _size(segments), sum(len(s.weight) for s in segments)
    return project_in(launch_config("linear", len(x), dims), x, segments, mode)


def _size(segments: Sequence[Segment]) -> int:
    """Bytes of a weight: 1 where any is FP8, which decides the tile, else 2."""
    return 1 if any(s.scale is not None for s in segments) else 2


def project_in(tile: Tile, x: Tensor, segments: Sequence[Segment], mode: PdlMode) -> list[Tensor]:
    """The same in a given tile."""
    assert x.stride(1) == 1, f"x strides {x.stride()}: want contiguous rows"
    for s in segments:
        assert s.weight.is_contiguous(), f"weight strides {s.weight.stride()}: want contiguous"
        assert s.scale is not None or s.weight.dtype == x.dtype, f"{s.weight.dtype=} {x.dtype=}"
        assert s.scale is None or s.scale.is_contiguous(), f"scale strides {s.scale.stride()}"
    args, outputs = slots(x, segments)
    args |= {"x": x, "k_size": x.shape[1]}
    specs, grid, own = _form(tile, args, len(x), x.stride(0))
    spec = specs[_size(segments)]
    spec.launch(grid, mode, args | own, tile.num_warps, tile.num_stages)
    return outputs


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
