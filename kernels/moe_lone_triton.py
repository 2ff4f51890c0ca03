"""Triton kernels of the MLPs for a lone token: weights stream once through the CUDA cores.

    gate_up   a program owns rows of gate and the same of up, of one expert or the shared one
    down      a program owns rows of the hidden axis and walks over the shared expert and all slots
              in order, several side by side, so that the weighted sum needs no launch of its own

A thread holds the same eight columns of every row of a [ROWS, columns] tile, as in gemv_triton;
sums of eight products are scaled (FP8: the scale of their 128 columns) and added up in fp32. The
shared expert's weights are the only ones known before the wait: `down` holds its first tile then;
`gate_up` gained nothing from touching them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_ahead, pdl_begin, pdl_end
from minidsv.kernels.moe_weights_triton import Weights, arguments, pointees, rounded
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import LONE_DOWN as DOWN_TILES
from minidsv.kernels.tiles_moe import LONE_DOWN_UNEVEN as UNEVEN_DOWN_TILE
from minidsv.kernels.tiles_moe import LONE_GATE_UP as UP_TILE

LINE = 256  # columns that a warp's threads hold eight of


@triton.jit
def _each(x, C: tl.constexpr):
    """[S * C] of x [S], each C times."""
    S: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[:, None], [S, C]), [S * C])


@triton.jit
def _weights(w, rows, n, k0, size, N: tl.constexpr, C: tl.constexpr):
    """[R, N] of `rows` [R] below n: C columns from k0 on of each of the N / C matrices at w (a
    pointer, or N); else 0."""
    EIGHT: tl.constexpr = w.dtype.scalar.element_ty.primitive_bitwidth  # in bytes
    k = k0 + tl.arange(0, N) % C
    at = (w + k)[None, :] + (rows * size)[:, None]
    at = tl.max_contiguous(tl.multiple_of(at, [1, EIGHT]), [1, 8])
    return tl.load(at, mask=(rows[:, None] < n) & (k < size)[None, :], other=0.0)


@triton.jit
def _vectors(x, k0, size, N: tl.constexpr, C: tl.constexpr):
    """fp32 [N], the same columns of the vectors at x."""
    k = k0 + tl.arange(0, N) % C
    return tl.load(x + k, mask=k < size, other=0.0).to(tl.float32)


@triton.jit
def _products(tile, values, scale, k0, size, C: tl.constexpr):
    """[R, N / 8] sums of eight products of `tile` [R, N] and `values` [N], scaled.

    FP8: `scale` (a pointer, or N / 8) is that of the matrices' blocks of rows.
    """
    R: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    products = tile.to(tl.float32) * values[None, :]
    sums = tl.sum(tl.reshape(products, [R, N // 8, 8]), 2)
    if tile.dtype == tl.float8e4nv:
        at = k0 + tl.arange(0, N // 8) * 8 % C
        sums *= tl.load(scale + at // 128, mask=at < size, other=0.0)[None, :]
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
    rows = block + tl.arange(0, ROWS)
    pdl_begin(PDL)
    slot = tl.where(is_shared, 0, routed // blocks)
    expert = tl.load(ids + slot, mask=is_shared == 0, other=0)
    width = tl.where(is_shared, shared_inner, inner)
    w = tl.where(is_shared, shared_weight, weight + expert * 2 * inner * hidden)
    v = w + width * hidden
    s = scale + expert * 2 * tl.cdiv(inner, 128) * tl.cdiv(hidden, 128)
    s = tl.where(is_shared, shared_scale, s)
    s += block // 128 * tl.cdiv(hidden, 128)
    t = s + tl.cdiv(width, 128) * tl.cdiv(hidden, 128)
    gate = tl.zeros([ROWS, C // 8], tl.float32)
    up = tl.zeros([ROWS, C // 8], tl.float32)
    for k0 in range(0, hidden, C):
        a = _weights(w, rows, width, k0, hidden, C, C)
        b = _weights(v, rows, width, k0, hidden, C, C)
        values = _vectors(x, k0, hidden, C, C)
        gate += _products(a, values, s, k0, hidden, C)
        up += _products(b, values, t, k0, hidden, C)
    gate, up = rounded(tl.sum(gate, 1), BF16), rounded(tl.sum(up, 1), BF16)
    value = rounded(gate / (1.0 + tl.exp(-gate)) * up, BF16)
    out = tl.where(is_shared, shared_h, h + slot * inner)
    tl.store(out + rows, value.to(h.dtype.element_ty), mask=rows < width)
    pdl_end(PDL)


@triton.jit
def _sums(tile, w, x, scale, rows, n, size, C: tl.constexpr, WHOLE: tl.constexpr):
    """[R, N / 8] sums over all columns; `tile` holds the first C, which may be the whole."""
    N: tl.constexpr = tile.shape[1]
    sums = _products(tile, _vectors(x, 0, size, N, C), scale, 0, size, C)
    if not WHOLE:
        for k0 in range(C, size, C):
            tile = _weights(w, rows, n, k0, size, N, C)
            sums += _products(tile, _vectors(x, k0, size, N, C), scale, k0, size, C)
    return sums


@triton.jit(do_not_specialize=("slots",))
def _lone_down_kernel(
    h, shared_h, weights, ids, out, weight, scale, shared_weight, shared_scale,
    slots, hidden, inner, shared_inner,
    BF16: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, S: tl.constexpr, C: tl.constexpr,
    WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * ROWS
    rows, several, column = block + tl.arange(0, ROWS), tl.arange(0, S), tl.arange(0, S * C)
    if PDL == "prefetch":
        tile = _weights(shared_weight, rows, hidden, 0, shared_inner, WIDE, WIDE)
    pdl_ahead(PDL)
    pdl_begin(PDL)
    if PDL != "prefetch":
        tile = _weights(shared_weight, rows, hidden, 0, shared_inner, WIDE, WIDE)
    s = shared_scale + block // 128 * tl.cdiv(shared_inner, 128)
    sums = _sums(tile, shared_weight, shared_h, s, rows, hidden, shared_inner, WIDE, False)
    total = rounded(tl.sum(sums, 1), BF16)
    for first in range(0, slots, S):
        slot = tl.minimum(first + several, slots - 1)
        expert, factor = tl.load(ids + slot), tl.load(weights + slot)
        w = _each(weight + expert * hidden * inner, C)
        n = tl.where(first + column // C < slots, hidden, 0)[None, :]
        part = _weights(w, rows, n, 0, inner, S * C, C)
        x = h + tl.minimum(first + column // C, slots - 1) * inner
        t = scale + expert * tl.cdiv(hidden, 128) * tl.cdiv(inner, 128)
        t += block // 128 * tl.cdiv(inner, 128)
        more = _sums(part, w, x, _each(t, C // 8), rows, n, inner, C, WHOLE)
        y = rounded(tl.sum(tl.reshape(more, [ROWS, S, C // 8]), 2), BF16) * factor[None, :]
        total += tl.sum(tl.where((first + several < slots)[None, :], y, 0.0), 1)
    tl.store(out + rows, total.to(out.dtype.element_ty), mask=rows < hidden)
    pdl_end(PDL)


def up_sizes(tile: Tile, hidden: int) -> dict[str, int]:
    """The constants of gate_up, whose programs have block_n rows of gate and as many of up."""
    columns = min(tile.block_k, next_power_of_2(hidden))
    return {"ROWS": tile.block_n, "C": columns}


def down_sizes(tile: Tile, inner: int, slots: int) -> dict[str, int]:
    """The constants of down: slots share a step of block_k columns that one's would not fill."""
    even = not slots or inner % tile.block_k == 0
    columns = tile.block_k if even else min(tile.block_k, LINE, next_power_of_2(inner))
    together = min(tile.block_k // columns, next_power_of_2(max(1, slots)))
    whole = int(slots > 0 and inner <= columns)
    return {
        "ROWS": tile.block_n, "WIDE": tile.block_k, "S": together, "C": columns, "WHOLE": whole
    }  # fmt: skip


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
    """Long sums, those of a shard of 8, of the bundled model, and uneven ones."""
    more = {"weights": "*fp32:16", "out": "*bf16:16", "slots": "i32"}
    return tuple(
        _row(tile, size == 1, **more, **down_sizes(tile, inner, slots))
        for size, even in DOWN_TILES.items()
        for tile, inner, slots in (
            (even, 2048, 8), (even, 256, 8), (even, 128, 2), (UNEVEN_DOWN_TILE, 1408, 6)
        )
    )  # fmt: skip


LONE_GATE_UP = KernelSpec(_lone_gate_up_kernel, _up_rows(), fp_fusion=True)
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
    for size in (x.shape[1], routed.inner, shared_inner):
        assert size % 8 == 0, f"{size} columns: want a multiple of 8, which one load takes"
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
