"""Launches `fused_linear`: the form and tile that `launch_config` names for these sizes.

block_m 1           gemv_triton, one token
block_k > 128       gemm_triton's narrow form, a warp for each 128 columns of a step
else                gemm_triton's wide form

`split` programs share the sum of an output, and parts_triton adds their parts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from triton import cdiv

from minidsv.kernels.gemm import Segment
from minidsv.kernels.gemm_triton import NARROW, WIDE, narrow_sizes, wide_sizes
from minidsv.kernels.gemv_triton import GEMV, norm_arguments
from minidsv.kernels.gemv_triton import sizes as gemv_sizes
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.norm import PreNorm, pre_norm
from minidsv.kernels.parts_triton import sum_parts
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.segments_triton import slots, tiles
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_gemm import takes_norm


def project(
    x: Tensor, segments: Sequence[Segment], mode: PdlMode, norm: PreNorm | None = None
) -> tuple[list[Tensor], Tensor]:
    """x [T, in] through each of `segments` -> ([T, out] each, x): one launch, and one
    more where programs share the sums.

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
        return _project_in(tile, x, segments, mode, norm)
    parts, total = {}, x
    for kind in (False, True):
        mine = [s for s, is_dense in zip(segments, dense, strict=True) if is_dense == kind]
        outputs, total = project(x, mine, mode, norm)
        parts[kind] = iter(outputs)
    return [next(parts[kind]) for kind in dense], total


def _size(segments: Sequence[Segment]) -> int:
    """Bytes of a weight: 1 where any is FP8, which decides the tile, else 2."""
    return 1 if any(s.scale is not None for s in segments) else 2


def _project_in(
    tile: Tile, x: Tensor, segments: Sequence[Segment], mode: PdlMode, norm: PreNorm | None = None
) -> tuple[list[Tensor], Tensor]:
    """The same in a given tile."""
    assert norm is None or takes_norm(tile), f"{tile} takes no norm"
    assert x.stride(1) == 1, f"x strides {x.stride()}: want contiguous rows"
    for s in segments:
        assert s.weight.is_contiguous(), f"weight strides {s.weight.stride()}: want contiguous"
        assert s.scale is not None or s.weight.dtype == x.dtype, f"{s.weight.dtype=} {x.dtype=}"
        assert s.scale is None or s.scale.is_contiguous(), f"scale strides {s.scale.stride()}"
    outputs = [
        torch.empty(len(x), len(s.weight), dtype=s.out_dtype or x.dtype, device=x.device)
        for s in segments
    ]
    if tile.block_m == 1:
        return outputs, _gemv(tile, x, segments, outputs, norm, mode)
    _gemm(tile, x, segments, outputs, mode)
    return outputs, x


def _gemv(
    tile: Tile,
    x: Tensor,
    segments: Sequence[Segment],
    outputs: list[Tensor],
    norm: PreNorm | None,
    mode: PdlMode,
) -> Tensor:
    """Fill the outputs -> x, or the sum that the norm is of."""
    norms, total = norm_arguments(x, norm)
    own = gemv_sizes(tile)
    args = slots(segments, outputs) | {"x": x, "k_size": x.shape[1]} | norms | own
    grid = (min(len(x), 1) * tiles(args, tile.block_n, own["OTHER_N"]),)
    GEMV[_size(segments)].launch(grid, mode, args, tile.num_warps, tile.num_stages)
    return total


def _gemm(
    tile: Tile, x: Tensor, segments: Sequence[Segment], outputs: list[Tensor], mode: PdlMode
) -> None:
    """Fill the outputs, through fp32 parts where programs share a sum."""
    (m, k_size), narrow = x.shape, tile.block_k > 128
    span = cdiv(k_size, tile.split * tile.block_k) * tile.block_k
    parts = cdiv(k_size, span)
    shares = outputs
    if tile.split > 1:
        shares = [
            torch.empty(parts, *o.shape, dtype=torch.float32, device=x.device) for o in outputs
        ]
    own = narrow_sizes(tile) if narrow else wide_sizes(tile)
    args = slots(segments, shares) | own
    args |= {"x": x, "m": m, "k_size": k_size, "x_stride": x.stride(0), "span": span}
    blocks = tiles(args, tile.block_n, own["OTHER_N"])
    grid = (min(m, 1) * blocks, parts) if narrow else (cdiv(m, tile.block_m), blocks, parts)
    specs = NARROW if narrow else WIDE
    specs[_size(segments)].launch(grid, mode, args, tile.num_warps, tile.num_stages)
    if tile.split > 1:
        sum_parts(shares, outputs, mode)
