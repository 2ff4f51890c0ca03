"""Triton kernels of the MLPs with FP8 activations: e4m3 by e4m3, as in gemm_fp8_triton.

x is quantised once, and gathered by the plan of `moe_plan_triton`. A program of gate_up makes 128
columns of h, a group, which it quantises itself: [gate | up] is its pair of tiles. The shared
expert's programs (of a dense layer: all) come first.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.gemm_fp8_triton import grouped, pair
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.moe_plan_triton import combine, prepare
from minidsv.kernels.moe_weights_triton import Weights, arguments, pointees, rounded
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant_triton import FP8_LIMITS, divide, fp8_scale, quantize_groups, to_e4m3
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_gemm import TOKEN_TILES
from minidsv.kernels.tiles_moe import FP8_MLP


@triton.jit
def _share(
    program, shared_programs, shared_blocks, blocks, plan, tokens,
    BT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """(is shared, block of rows, expert, begin, end) of a program: tokens of the shared expert,
    entries of `order` of a routed one."""
    is_shared = program < shared_programs
    own = tl.where(is_shared, program, 0)
    tile, block = grouped(own, tl.cdiv(tokens, BT), shared_blocks, GROUP)
    routed = program - shared_programs
    entry = plan + routed // blocks * 3
    expert = tl.load(entry, mask=is_shared == 0, other=0).to(tl.int64)
    begin = tl.load(entry + 1, mask=is_shared == 0, other=0)
    end = tl.load(entry + 2, mask=is_shared == 0, other=0)
    block = tl.where(is_shared, block, routed % blocks)
    begin = tl.where(is_shared, tile * BT, begin)
    return is_shared, block, expert, begin, tl.where(is_shared, tokens, end)


@triton.jit(do_not_specialize=("tokens", "top_k", "shared_programs"))
def _gate_up_fp8_kernel(
    x, xs, h, hs, shared_h, shared_hs, plan, order, weight, scale, shared_weight, shared_scale,
    tokens, top_k, hidden, inner, shared_inner, shared_programs,
    BF16: tl.constexpr, UE8M0: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr,
    BT: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(PDL)
    is_shared, block, expert, begin, end = _share(
        tl.program_id(0), shared_programs, shared_inner // 128, inner // 128, plan, tokens, BT,
        GROUP,
    )  # fmt: skip
    if begin < end:
        at = begin + tl.arange(0, BT)
        slot = tl.minimum(at, end - 1)
        chosen = tl.load(order + slot, mask=slot < tl.where(is_shared, 0, end), other=0) // top_k
        row = tl.where(is_shared, slot, chosen).to(tl.int64)
        width, blocks = tl.where(is_shared, shared_inner, inner), hidden // 128
        w = tl.where(is_shared, shared_weight, weight + expert * 2 * inner * hidden)
        s = tl.where(is_shared, shared_scale, scale + expert * 2 * (inner // 128) * blocks)
        s += block * blocks
        column = block * 128 + tl.arange(0, 128)
        w += column.to(tl.int64) * hidden
        gate, up = pair(
            x + row * hidden, xs + row * blocks, w, w + width.to(tl.int64) * hidden,
            s, s + width // 128 * blocks, blocks, BT, 128,
        )  # fmt: skip
        gate, up = rounded(gate, BF16), rounded(up, BF16)
        value = rounded(gate / (1.0 + tl.exp(-gate)) * up, BF16)
        value_scale = fp8_scale(tl.max(tl.abs(value), 1), UE8M0, MAX, FLOOR)
        inside, row = at < end, at.to(tl.int64)
        codes = tl.where(is_shared, shared_h, h) + row[:, None] * width + column[None, :]
        tl.store(codes, to_e4m3(divide(value, value_scale[:, None]), MAX), mask=inside[:, None])
        scales = tl.where(is_shared, shared_hs, hs) + row * (width // 128) + block
        tl.store(scales, value_scale, mask=inside)
    pdl_end(PDL)


@triton.jit(do_not_specialize=("tokens", "slots", "shared_programs"))
def _down_fp8_kernel(
    h, hs, shared_h, shared_hs, y, plan, order, weight, scale, shared_weight, shared_scale,
    tokens, slots, hidden, inner, shared_inner, shared_programs,
    BT: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_begin(PDL)
    row_tiles = tl.cdiv(hidden, 2 * ROWS)
    is_shared, block, expert, begin, end = _share(
        tl.program_id(0), shared_programs, row_tiles, row_tiles, plan, tokens, BT, GROUP
    )
    if begin < end:
        at = begin + tl.arange(0, BT)
        row = tl.minimum(at, end - 1)
        width = tl.where(is_shared, shared_inner, inner)
        blocks = width // 128
        w = tl.where(is_shared, shared_weight, weight + expert * hidden * inner)
        s = tl.where(is_shared, shared_scale, scale + expert * (hidden // 128) * blocks)
        first = block * 2 * ROWS
        second = tl.minimum(first + ROWS, hidden - ROWS)  # again, where there is none
        r = tl.arange(0, ROWS)
        w += (first + r).to(tl.int64) * width
        source = row.to(tl.int64)
        y0, y1 = pair(
            tl.where(is_shared, shared_h, h) + source * width,
            tl.where(is_shared, shared_hs, hs) + source * blocks,
            w, w + (second - first).to(tl.int64) * width,
            s + first // 128 * blocks, s + second // 128 * blocks, blocks, BT, ROWS,
            y.dtype.element_ty == tl.bfloat16,
        )  # fmt: skip
        chosen = tl.load(order + row, mask=row < tl.where(is_shared, 0, end), other=0)
        slot = tl.where(is_shared, slots + row, chosen).to(tl.int64)
        out, inside = y + slot[:, None] * hidden + r[None, :], (at < end)[:, None]
        tl.store(out + first, y0.to(y.dtype.element_ty), mask=inside)
        tl.store(out + second, y1.to(y.dtype.element_ty), mask=inside)
    pdl_end(PDL)


def _row(tile: Tile, **more: str | int | float) -> Row:
    arguments: dict[str, str | int | float] = {
        "plan": "*i32:16", "order": "*i32:16", "tokens": "i32", "hidden": "i32:16",
        "inner": "i32:16", "shared_inner": "i32:16", "shared_programs": "i32",
        "h": "*fp8e4nv:16", "hs": "*fp32:16", "shared_h": "*fp8e4nv:16", "shared_hs": "*fp32:16",
    }  # fmt: skip
    return Row(arguments | pointees(True) | more, tile.num_warps, tile.num_stages)


def _up_sizes(tile: Tile, ue8m0: bool) -> dict[str, str | int | float]:
    return {"BT": tile.block_m, "GROUP": TOKEN_TILES, "UE8M0": ue8m0} | FP8_LIMITS


def _down_sizes(tile: Tile) -> dict[str, str | int | float]:
    return {"BT": tile.block_m, "GROUP": TOKEN_TILES, "ROWS": tile.block_n // 2}


GATE_UP_FP8 = KernelSpec(
    _gate_up_fp8_kernel,
    tuple(
        _row(up, x="*fp8e4nv:16", xs="*fp32:16", top_k="i32", BF16=1, **_up_sizes(up, ue8m0))
        for (up, _), ue8m0 in itertools.product(FP8_MLP, (False, True))
    ),
    fp_fusion=True,
)
DOWN_FP8 = KernelSpec(
    _down_fp8_kernel,
    tuple(_row(down, y="*bf16:16", slots="i32", **_down_sizes(down)) for _, down in FP8_MLP),
    fp_fusion=True,
)
SPECS = (GATE_UP_FP8, DOWN_FP8)


def mlp_fp8(x: Tensor, dense: Weights, ue8m0: bool, mode: PdlMode) -> Tensor:
    """x [T, hidden] -> [T, hidden] through one MLP."""
    y, ids = torch.empty_like(x), torch.empty((len(x), 0), dtype=torch.int64, device=x.device)
    _run(x, ids, dense, dense, y, ue8m0, mode)
    return y


def moe_fp8(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    routed: Weights,
    shared: Weights | None,
    ue8m0: bool,
    mode: PdlMode,
) -> Tensor:
    """x [T, hidden], weights and ids [T, k] -> [T, hidden]."""
    for name, tensor in (("weights", weights), ("ids", ids)):
        assert tensor.is_contiguous(), f"{name} strides {tensor.stride()}"
    rows = ids.numel() + (len(x) if shared else 0)
    y = torch.empty((rows, x.shape[1]), dtype=x.dtype, device=x.device)
    _run(x, ids, routed, shared, y, ue8m0, mode)
    return combine(y, weights, len(x), shared is not None, mode)


def _empty_h(x: Tensor, rows: int, inner: int) -> tuple[Tensor, Tensor]:
    """Room for h [rows, inner] and its scales."""
    codes = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=x.device)
    return codes, torch.empty((rows, inner // 128), dtype=torch.float32, device=x.device)


def _run(
    x: Tensor,
    ids: Tensor,
    routed: Weights,
    shared: Weights | None,
    y: Tensor,
    ue8m0: bool,
    mode: PdlMode,
) -> None:
    """Fill y: a row a slot of `ids`, then a row a token of `shared`."""
    (tokens, hidden), slots = x.shape, ids.numel()
    dims = (len(routed.down) if slots else 1, max(1, ids.shape[1]))
    up, down = (launch_config(op, tokens, dims) for op in ("moe_gate_up_fp8", "moe_down_fp8"))
    plan = order = torch.empty(0, dtype=torch.int32, device=x.device)
    routed_tiles = 0
    if slots:
        plan, order = prepare(ids, len(routed.down), up.block_m, mode)
        routed_tiles = len(plan)
    codes, scales = quantize_groups(x, 128, ue8m0, mode)
    h, hs = _empty_h(x, slots, routed.inner)
    stand_in = shared or routed
    shared_h, shared_hs = _empty_h(x, tokens if shared else 0, stand_in.inner)
    token_tiles = cdiv(tokens, up.block_m) if shared else 0
    common: dict[str, Any] = {
        "h": h, "hs": hs, "shared_h": shared_h, "shared_hs": shared_hs, "plan": plan,
        "order": order, "tokens": tokens, "hidden": hidden, "inner": routed.inner,
        "shared_inner": stand_in.inner,
    }  # fmt: skip
    programs = stand_in.inner // 128 * token_tiles
    args = common | arguments(
        routed.gate_up, routed.gate_up_scale, stand_in.gate_up, stand_in.gate_up_scale
    )
    args |= {"x": codes, "xs": scales, "top_k": max(1, ids.shape[1]), "shared_programs": programs}
    args |= {"BF16": int(x.dtype == torch.bfloat16), **_up_sizes(up, ue8m0)}
    grid = (programs + routed.inner // 128 * routed_tiles,)
    GATE_UP_FP8.launch(grid, mode, args, up.num_warps, up.num_stages)
    row_tiles = cdiv(hidden, down.block_n)
    programs = row_tiles * token_tiles
    args = common | arguments(routed.down, routed.down_scale, stand_in.down, stand_in.down_scale)
    args |= {"y": y, "slots": slots, "shared_programs": programs, **_down_sizes(down)}
    DOWN_FP8.launch(
        (programs + row_tiles * routed_tiles,), mode, args, down.num_warps, down.num_stages
    )
