"""Triton kernels of the MLPs for a lone token: weights stream once through the CUDA cores.

    gate_up   a program owns rows of gate and the same of up, of one expert or the shared one
    down      a program owns rows of the hidden axis and walks over the shared expert and all slots
              in order, so that the weighted sum needs no launch of its own

A thread holds the same eight columns of every row of a [ROWS, matrices, C] tile, as in gemv_triton;
sums of eight products are scaled (FP8: the scale of their 128 columns) and added up in fp32. The
shared expert's weights are the only ones known before the wait; `down` holds its first tile then.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.moe_weights_triton import Weights, arguments, pointees, prefetch, rounded
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import LONE_DOWN as DOWN_TILES
from minidsv.kernels.tiles_moe import LONE_GATE_UP as UP_TILE


@triton.jit
def _weights(w, rows, n, k0, size, C: tl.constexpr):
    """[R, S, C] of `rows` [R] below n [S] of the matrices at w [S], from column k0 on; else 0."""
    k = k0 + tl.arange(0, C)[None, None, :]
    at = w[None, :, None] + (rows[:, None, None] * size + k)
    mask = (rows[:, None, None] < n[None, :, None]) & (k < size)
    return tl.load(tl.max_contiguous(at, [1, 1, 8]), mask=mask, other=0.0)


@triton.jit
def _vectors(x, k0, size, C: tl.constexpr):
    """fp32 [S, C] of the vectors at x [S]."""
    k = k0 + tl.arange(0, C)[None, :]
    return tl.load(x[:, None] + k, mask=k < size, other=0.0).to(tl.float32)


@triton.jit
def _products(tile, values, scale, k0, size):
    """[R, S, C / 8] sums of eight products of `tile` and `values` [S, C], scaled.

    FP8: scale [S] points to the scales of the matrices' blocks of rows.
    """
    R: tl.constexpr = tile.shape[0]
    S: tl.constexpr = tile.shape[1]
    C: tl.constexpr = tile.shape[2]
    products = tile.to(tl.float32) * values[None, :, :]
    sums = tl.sum(tl.reshape(products, [R, S, C // 8, 8]), 3)
    if tile.dtype == tl.float8e4nv:
        at = k0 + tl.arange(0, C // 8) * 8
        factor = tl.load(
            scale[:, None] + (at // 128)[None, :], mask=(at < size)[None, :], other=0.0
        )
        sums *= factor[None, :, :]
    return sums


@triton.jit(do_not_specialize=("shared_programs",))
def _lone_gate_up_kernel(
    x, h, shared_h, ids, weight, scale, shared_weight, shared_scale,
    hidden, inner, shared_inner, shared_programs,
    BF16: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    is_shared = program < shared_programs
    routed = program - shared_programs
    blocks = tl.cdiv(inner, ROWS)
    block = tl.where(is_shared, program, routed % blocks) * ROWS
    rows, one = block + tl.arange(0, ROWS), tl.arange(0, 1)
    if PDL == "prefetch":
        lines = shared_weight + tl.minimum(rows, shared_inner - 1) * hidden
        prefetch(lines, hidden, is_shared.to(tl.int32), 8)
        prefetch(lines + shared_inner * hidden, hidden, is_shared.to(tl.int32), 8)
    pdl_begin(PDL)
    slot = tl.where(is_shared, 0, routed // blocks)
    expert = tl.load(ids + slot, mask=is_shared == 0, other=0)
    width = tl.where(is_shared, shared_inner, inner)
    w = tl.where(is_shared, shared_weight, weight + expert * 2 * inner * hidden) + one
    v = w + width * hidden
    s = scale + expert * 2 * tl.cdiv(inner, 128) * tl.cdiv(hidden, 128)
    s = tl.where(is_shared, shared_scale, s) + one
    s += block // 128 * tl.cdiv(hidden, 128)
    t = s + tl.cdiv(width, 128) * tl.cdiv(hidden, 128)
    gate = tl.zeros([ROWS, 1, C // 8], tl.float32)
    up = tl.zeros([ROWS, 1, C // 8], tl.float32)
    for k0 in range(0, hidden, C):
        a = _weights(w, rows, one + width, k0, hidden, C)
        b = _weights(v, rows, one + width, k0, hidden, C)
        values = _vectors(x + one, k0, hidden, C)
        gate += _products(a, values, s, k0, hidden)
        up += _products(b, values, t, k0, hidden)
    gate, up = tl.sum(tl.sum(gate, 2), 1), tl.sum(tl.sum(up, 2), 1)
    gate, up = rounded(gate, BF16), rounded(up, BF16)
    value = rounded(gate / (1.0 + tl.exp(-gate)) * up, BF16)
    out = tl.where(is_shared, shared_h, h + slot * inner)
    tl.store(out + rows, value.to(h.dtype.element_ty), mask=rows < width)
    pdl_end(PDL)


@triton.jit(do_not_specialize=("slots",))
def _lone_down_kernel(
    h, shared_h, weights, ids, out, weight, scale, shared_weight, shared_scale,
    slots, hidden, inner, shared_inner,
    BF16: tl.constexpr, ROWS: tl.constexpr, S: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * ROWS
    rows, one, several = block + tl.arange(0, ROWS), tl.arange(0, 1), tl.arange(0, S)
    if PDL == "prefetch":
        tile = _weights(shared_weight + one, rows, one + hidden, 0, shared_inner, S * C)
    pdl_begin(PDL, LATE=True)
    if PDL != "prefetch":
        tile = _weights(shared_weight + one, rows, one + hidden, 0, shared_inner, S * C)
    s = shared_scale + block // 128 * tl.cdiv(shared_inner, 128) + one
    acc = _products(tile, _vectors(shared_h + one, 0, shared_inner, S * C), s, 0, shared_inner)
    for k0 in range(S * C, shared_inner, S * C):
        tile = _weights(shared_weight + one, rows, one + hidden, k0, shared_inner, S * C)
        values = _vectors(shared_h + one, k0, shared_inner, S * C)
        acc += _products(tile, values, s, k0, shared_inner)
    total = tl.sum(rounded(tl.sum(acc, 2), BF16), 1)
    for first in range(0, slots, S):
        exists = first + several < slots
        slot = tl.where(exists, first + several, first)
        expert = tl.load(ids + slot)
        factor = tl.load(weights + slot)
        w = weight + expert * hidden * inner
        t = scale + expert * tl.cdiv(hidden, 128) * tl.cdiv(inner, 128)
        t += block // 128 * tl.cdiv(inner, 128)
        n = tl.where(exists, hidden, 0)
        part = _weights(w, rows, n, 0, inner, C)
        sums = _products(part, _vectors(h + slot * inner, 0, inner, C), t, 0, inner)
        if not WHOLE:
            for k0 in range(C, inner, C):
                part = _weights(w, rows, n, k0, inner, C)
                sums += _products(part, _vectors(h + slot * inner, k0, inner, C), t, k0, inner)
        y = rounded(tl.sum(sums, 2), BF16) * factor[None, :]
        total += tl.sum(tl.where(exists[None, :], y, 0.0), 1)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=rows < hidden)
    pdl_end(PDL, LATE=True)


def up_sizes(tile: Tile, hidden: int) -> dict[str, int]:
    """The constants of gate_up, whose programs have block_n rows of gate and as many of up."""
    columns = min(tile.block_k, next_power_of_2(hidden))
    return {"ROWS": tile.block_n, "C": columns}


def down_sizes(tile: Tile, inner: int, slots: int) -> dict[str, int]:
    """The constants of down: several slots of a short sum share a tile."""
    columns = min(tile.block_k, next_power_of_2(inner))
    together = min(tile.block_k // columns, next_power_of_2(max(1, slots)))
    whole = int(inner <= columns)
    return {"ROWS": tile.block_n, "S": together, "C": columns, "WHOLE": whole}


def _row(tile: Tile, fp8: bool, **more: str | int | float) -> Row:
    types: dict[str, str | int | float] = {
        "h": "*bf16:16", "shared_h": "*bf16:16", "ids": "*i64:16", "hidden": "i32:16",
        "inner": "i32:16", "shared_inner": "i32:16", "BF16": 1, **pointees(fp8), **more,
    }  # fmt: skip
    return Row(types, tile.num_warps, tile.num_stages)


def _up_rows() -> tuple[Row, ...]:
    """Long sums and the bundled model's."""
    more = {"x": "*bf16:16", "shared_programs": "i32"}
    return tuple(
        _row(UP_TILE, fp8, **more, **up_sizes(UP_TILE, hidden))
        for fp8 in (True, False)
        for hidden in (7168, 256)
    )


def _down_rows() -> tuple[Row, ...]:
    """Long sums, those of a shard of 8, and the bundled model's: a dense layer's, the experts'."""
    more = {"weights": "*fp32:16", "out": "*bf16:16", "slots": "i32"}
    return tuple(
        _row(tile, size == 1, **more, **down_sizes(tile, inner, slots))
        for size, tile in DOWN_TILES.items()
        for inner, slots in ((2048, 8), (256, 8), (512, 0), (128, 2))
    )


LONE_GATE_UP = KernelSpec(
    _lone_gate_up_kernel, _up_rows(), frozenset(("shared_weight",)), fp_fusion=True
)
LONE_DOWN = KernelSpec(
    _lone_down_kernel, _down_rows(), frozenset(("shared_weight",)), fp_fusion=True
)
SPECS = (LONE_GATE_UP, LONE_DOWN)


def lone(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    routed: Weights,
    shared: Weights | None,
    tiles: tuple[Tile, Tile],
    mode: PdlMode,
) -> Tensor:
    """x [1, hidden], weights and ids [1, k] (k = 0: the shared expert alone) -> [1, hidden]."""
    assert x.is_contiguous(), f"x strides {x.stride()}"
    shared_inner = shared.inner if shared else 0
    h, shared_h = x.new_empty(ids.shape[1], routed.inner), x.new_empty(shared_inner)
    out = torch.empty_like(x)
    common: dict[str, Any] = {
        "h": h, "shared_h": shared_h, "ids": ids, "hidden": x.shape[1], "inner": routed.inner,
        "shared_inner": shared_inner, "BF16": int(x.dtype == torch.bfloat16),
    }  # fmt: skip
    shared = shared or routed
    gate_up(common | {"x": x}, routed, shared, tiles[0], mode)
    down(common | {"weights": weights, "out": out}, routed, shared, tiles[1], mode)
    return out


def gate_up(
    args: dict[str, Any], routed: Weights, shared: Weights, tile: Tile, mode: PdlMode
) -> None:
    """Fill h and shared_h of `args`."""
    programs = cdiv(args["shared_inner"], tile.block_n)
    args |= arguments(routed.gate_up, routed.gate_up_scale, shared.gate_up, shared.gate_up_scale)
    args |= {"shared_programs": programs, **up_sizes(tile, args["hidden"])}
    grid = (programs + args["ids"].shape[1] * cdiv(routed.inner, tile.block_n),)
    LONE_GATE_UP.launch(grid, mode, args, tile.num_warps, tile.num_stages)


def down(args: dict[str, Any], routed: Weights, shared: Weights, tile: Tile, mode: PdlMode) -> None:
    """Fill `out` of `args`."""
    args |= arguments(routed.down, routed.down_scale, shared.down, shared.down_scale)
    slots = args["ids"].shape[1]
    args |= {"slots": slots, **down_sizes(tile, routed.inner, slots)}
    grid = (cdiv(args["hidden"], tile.block_n),)
    LONE_DOWN.launch(grid, mode, args, tile.num_warps, tile.num_stages)
