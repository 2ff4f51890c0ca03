"""Triton kernels of the MLPs: gate_up and down over tiles of (expert, tokens, rows of the weight).

Both multiply weight rows [ROWS, K] with tokens [K, BT], so that the weights are the tensor cores'
M side and few tokens waste little. A launch holds the shared expert's programs first (of a dense
layer: all), then the routed experts' by the plan of `moe_plan_triton`; the last of an expert's
tiles of many tokens takes a smaller form if it holds few. FP8 weights become bf16 (exact).
Nothing is touched before the wait: what streams for so long gains nothing by it. Tiles of one token
are `moe_lone_triton`'s.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.moe_lone_triton import lone
from minidsv.kernels.moe_plan_triton import combine, prepare
from minidsv.kernels.moe_product_triton import product
from minidsv.kernels.moe_weights_triton import Weights, arguments, pointees, rounded
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_moe import MLP_TILES


@triton.jit
def _share(
    is_shared, program, shared_programs, shared_blocks, blocks, plan, tokens, BT: tl.constexpr,
):  # fmt: skip
    """(block of rows, expert, begin, end) of a program: tokens of the shared expert, entries of
    `order` of a routed one."""
    routed = program - shared_programs
    tile = tl.where(is_shared, program // shared_blocks, routed // blocks)
    block = tl.where(is_shared, program % shared_blocks, routed % blocks)
    expert = tl.load(plan + tile * 3, mask=is_shared == 0, other=0).to(tl.int64)
    begin = tl.load(plan + tile * 3 + 1, mask=is_shared == 0, other=0)
    end = tl.load(plan + tile * 3 + 2, mask=is_shared == 0, other=0)
    begin = tl.where(is_shared, tile * BT, begin)
    return block, expert, begin, tl.where(is_shared, tokens, end)


@triton.jit
def _gate_up(
    x, h, order, w, scale, scales, block, begin, end, is_shared, top_k, hidden, width,
    BF16: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of one expert; its scales of gate and, `scales` behind them, of up."""
    half: tl.constexpr = ROWS // 2  # of gate, and as many of up
    r, c = tl.arange(0, ROWS), tl.arange(0, half)
    t = tl.arange(0, BT)
    slot = tl.minimum(begin + t, end - 1)
    chosen = tl.load(order + slot, mask=slot < tl.where(is_shared, 0, end), other=0) // top_k
    row = tl.where(is_shared, slot, chosen)
    line = tl.minimum(block * half + r % half, width - 1) + r // half * width
    scale += block * half // 128 * tl.cdiv(hidden, 128)
    acc = product(
        w + line * hidden, x + row.to(tl.int64) * hidden, t < end - begin, scale, scale + scales,
        hidden, ROWS, BT, BK, EVEN,
    )  # fmt: skip
    gate, up = tl.split(tl.permute(tl.reshape(acc, (2, half, BT)), (2, 1, 0)))  # [BT, half]
    gate, up = rounded(gate, BF16), rounded(up, BF16)
    value = rounded(gate / (1.0 + tl.exp(-gate)) * up, BF16)
    column = block * half + c
    h += begin.to(tl.int64) * width
    mask = (t < end - begin)[:, None] & (column < width)[None, :]
    tl.store(h + t[:, None] * width + column[None, :], value.to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("tokens", "top_k", "shared_programs"))
def _gate_up_kernel(
    x, h, shared_h, plan, order, weight, scale, shared_weight, shared_scale,
    tokens, top_k, hidden, inner, shared_inner, shared_programs,
    BF16: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    BT: tl.constexpr, FEW: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = ROWS // 2
    program = tl.program_id(0)
    is_shared = program < shared_programs
    shared_blocks = tl.cdiv(shared_inner, half)
    pdl_begin(PDL, LATE=True)
    block, expert, begin, end = _share(
        is_shared, program, shared_programs, shared_blocks, tl.cdiv(inner, half), plan, tokens, BT
    )  # fmt: skip
    width = tl.where(is_shared, shared_inner, inner)
    w = tl.where(is_shared, shared_weight, weight + expert * 2 * inner * hidden)
    blocks = tl.cdiv(width, 128) * tl.cdiv(hidden, 128)
    s = tl.where(is_shared, shared_scale, scale + expert * 2 * blocks)
    out = tl.where(is_shared, shared_h, h)
    if begin < end:
        if end - begin > FEW:
            _gate_up(
                x, out, order, w, s, blocks, block, begin, end, is_shared, top_k, hidden, width,
                BF16, EVEN, ROWS, BT, BK,
            )  # fmt: skip
        elif FEW > 0:
            _gate_up(
                x, out, order, w, s, blocks, block, begin, end, is_shared, top_k, hidden, width,
                BF16, EVEN, ROWS, FEW, BK,
            )  # fmt: skip
    pdl_end(PDL, LATE=True)


@triton.jit
def _down(
    h, y, order, w, scale, block, begin, end, is_shared, slots, hidden, width,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of one expert."""
    at = begin + tl.arange(0, BT)
    row = tl.minimum(at, end - 1)
    listed = tl.where(is_shared, 0, end)
    chosen = tl.load(order + row, mask=row < listed, other=0)
    slot = tl.where(is_shared, slots + row, chosen)
    column = block * ROWS + tl.arange(0, ROWS)
    line = tl.minimum(column, hidden - 1)
    scale += block * ROWS // 128 * tl.cdiv(width, 128)
    source = h + row.to(tl.int64) * width
    acc = product(w + line * width, source, at < end, scale, scale, width, ROWS, BT, BK, EVEN)
    tl.store(
        y + slot.to(tl.int64)[:, None] * hidden + column[None, :],
        tl.trans(acc).to(y.dtype.element_ty),
        mask=(at < end)[:, None] & (column < hidden)[None, :],
    )


@triton.jit(do_not_specialize=("tokens", "slots", "shared_programs"))
def _down_kernel(
    h, shared_h, y, plan, order, weight, scale, shared_weight, shared_scale,
    tokens, slots, hidden, inner, shared_inner, shared_programs,
    EVEN: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, FEW: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.cdiv(hidden, ROWS)
    is_shared = program < shared_programs
    pdl_begin(PDL, LATE=True)
    block, expert, begin, end = _share(
        is_shared, program, shared_programs, blocks, blocks, plan, tokens, BT
    )
    width = tl.where(is_shared, shared_inner, inner)
    w = tl.where(is_shared, shared_weight, weight + expert * hidden * inner)
    s = scale + expert * tl.cdiv(hidden, 128) * tl.cdiv(inner, 128)
    s = tl.where(is_shared, shared_scale, s)
    source = tl.where(is_shared, shared_h, h)
    if begin < end:
        if end - begin > FEW:
            _down(
                source, y, order, w, s, block, begin, end, is_shared, slots, hidden, width,
                EVEN, ROWS, BT, BK,
            )  # fmt: skip
        elif FEW > 0:
            _down(
                source, y, order, w, s, block, begin, end, is_shared, slots, hidden, width,
                EVEN, ROWS, FEW, BK,
            )  # fmt: skip
    pdl_end(PDL, LATE=True)


def _rows(**more: str | int | float) -> tuple[Row, ...]:
    """Both types of weights in every tile."""
    types: dict[str, str | int | float] = {
        "plan": "*i32:16", "order": "*i32:16", "tokens": "i32", "hidden": "i32:16",
        "inner": "i32:16", "shared_inner": "i32:16", "shared_programs": "i32",
        "h": "*bf16:16", "shared_h": "*bf16:16", "EVEN": 1, **more,
    }  # fmt: skip
    return tuple(
        Row(types | pointees(size == 1) | _sizes(tile), tile.num_warps, tile.num_stages)
        for size in (1, 2)
        for tile in MLP_TILES[size]
    )


def _sizes(tile: Tile) -> dict[str, int]:
    """A tile of many tokens has a second form for a quarter of them, and fewer."""
    few = tile.block_m // 4 if tile.block_m >= 64 else 0
    return {"ROWS": tile.block_n, "BT": tile.block_m, "FEW": few, "BK": tile.block_k}


GATE_UP = KernelSpec(_gate_up_kernel, _rows(x="*bf16:16", top_k="i32", BF16=1), fp_fusion=True)
DOWN = KernelSpec(_down_kernel, _rows(y="*bf16:16", slots="i32"), fp_fusion=True)
SPECS = (GATE_UP, DOWN)


def mlp_triton(x: Tensor, dense: Weights, mode: PdlMode) -> Tensor:
    """x [T, hidden] -> [T, hidden] through one MLP."""
    ids = torch.empty((len(x), 0), dtype=torch.int64, device=x.device)
    tiles = _tiles(len(x), ids, dense)
    if tiles[0].block_m == 1:
        return lone(x, x.new_empty(1, 0, dtype=torch.float32), ids, dense, dense, tiles, mode)
    y = torch.empty_like(x)
    _run(x, ids, dense, dense, y, tiles, mode)
    return y


def moe_triton(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    routed: Weights,
    shared: Weights | None,
    mode: PdlMode,
) -> Tensor:
    """x [T, hidden], weights and ids [T, k] -> [T, hidden]."""
    for name, tensor in (("weights", weights), ("ids", ids)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
    tiles = _tiles(len(x), ids, routed)
    if tiles[0].block_m == 1:
        return lone(x, weights, ids, routed, shared, tiles, mode)
    rows = ids.numel() + (len(x) if shared else 0)
    y = torch.empty((rows, x.shape[1]), dtype=x.dtype, device=x.device)
    _run(x, ids, routed, shared, y, tiles, mode)
    return combine(y, weights, len(x), shared is not None, mode)


def _tiles(tokens: int, ids: Tensor, routed: Weights) -> tuple[Tile, Tile]:
    """Of gate_up and of down, for the same number of tokens."""
    hidden, inner = routed.down.shape[-2:]
    top_k = ids.shape[1]
    experts, size = len(routed.down) if top_k else 1, 1 if routed.down_scale is not None else 2
    dims = (experts, max(1, top_k), hidden, inner, size)
    up, down = (launch_config(op, tokens, dims) for op in ("moe_gate_up", "moe_down"))
    assert up.block_m == down.block_m, f"gate_up {up}, down {down}"
    return up, down


def _run(
    x: Tensor,
    ids: Tensor,
    routed: Weights,
    shared: Weights | None,
    y: Tensor,
    tiles: tuple[Tile, Tile],
    mode: PdlMode,
) -> None:
    """Fill y: a row a slot of `ids`, then a row a token of `shared`."""
    assert x.is_contiguous(), f"x strides {x.stride()}"
    (tokens, hidden), slots, (up, down) = x.shape, ids.numel(), tiles
    plan = order = torch.empty(0, dtype=torch.int32, device=x.device)
    routed_tiles = 0
    if slots:
        plan, order = prepare(ids, len(routed.down), up.block_m, mode)
        routed_tiles = len(plan)
    h = x.new_empty(slots, routed.inner)
    stand_in = shared or routed
    shared_h = x.new_empty(tokens if shared else 0, stand_in.inner)
    token_tiles = cdiv(tokens, up.block_m) if shared else 0
    common: dict[str, Any] = {
        "h": h, "shared_h": shared_h, "plan": plan, "order": order, "tokens": tokens,
        "hidden": hidden, "inner": routed.inner, "shared_inner": stand_in.inner,
    }  # fmt: skip
    half = up.block_n // 2
    programs = cdiv(stand_in.inner, half) * token_tiles
    args = common | arguments(
        routed.gate_up, routed.gate_up_scale, stand_in.gate_up, stand_in.gate_up_scale
    )
    args |= {"x": x, "top_k": max(1, ids.shape[1]), "BF16": int(x.dtype == torch.bfloat16)}
    args |= {"shared_programs": programs, "EVEN": int(hidden % up.block_k == 0), **_sizes(up)}
    grid = (programs + cdiv(routed.inner, half) * routed_tiles,)
    GATE_UP.launch(grid, mode, args, up.num_warps, up.num_stages)
    programs = cdiv(hidden, down.block_n) * token_tiles
    args = common | arguments(routed.down, routed.down_scale, stand_in.down, stand_in.down_scale)
    args |= {"y": y, "slots": slots, "shared_programs": programs, **_sizes(down)}
    args |= {"EVEN": int(routed.inner % down.block_k == 0 == stand_in.inner % down.block_k)}
    grid = (programs + cdiv(hidden, down.block_n) * routed_tiles,)
    DOWN.launch(grid, mode, args, down.num_warps, down.num_stages)
