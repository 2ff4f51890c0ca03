"""One launch, up to four weights of the same x: what a program needs to find the one it owns.

A launch takes four slots (w0..w3, scales s0.., outputs o0.., rows n0..); unused ones repeat slot 0
with no rows. Weights may be of two types, slot 0's and slot 3's, outputs likewise: a pointer is
selected among the slots of one type.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import ne
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minidsv.kernels.gemm import MAX_SEGMENTS, Segment
from minidsv.kernels.launch import Row
from minidsv.kernels.tile import Tile
from minidsv.kernels.tiles_gemm import LINEAR, Tiles

Arguments = dict[str, str | int | float]  # as `launch.Row` holds them
WEIGHTS = frozenset(f"w{slot}" for slot in range(MAX_SEGMENTS))


@triton.jit
def has_type(slot, p0, p1, p2, p3, like):
    """Whether the slot's pointer is of like's type."""
    code = slot * 0
    if p0.dtype == like.dtype:
        code = tl.where(slot == 0, 1, code)
    if p1.dtype == like.dtype:
        code = tl.where(slot == 1, 1, code)
    if p2.dtype == like.dtype:
        code = tl.where(slot == 2, 1, code)
    if p3.dtype == like.dtype:
        code = tl.where(slot == 3, 1, code)
    return code == 1


@triton.jit
def select(slot, p0, p1, p2, p3, like):
    """The slot's pointer if it is of like's type; else `like`."""
    p = like
    if p0.dtype == like.dtype:
        p = tl.where(slot == 0, p0, p)
    if p1.dtype == like.dtype:
        p = tl.where(slot == 1, p1, p)
    if p2.dtype == like.dtype:
        p = tl.where(slot == 2, p2, p)
    if p3.dtype == like.dtype:
        p = tl.where(slot == 3, p3, p)
    return p


@triton.jit
def locate(tile, w0, w1, w2, w3, n0, n1, n2, n3, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """(slot, its rows, first row) of a tile: BLOCK rows of slot 0's type, OTHER of another."""
    B1: tl.constexpr = BLOCK if w1.dtype == w0.dtype else OTHER
    B2: tl.constexpr = BLOCK if w2.dtype == w0.dtype else OTHER
    B3: tl.constexpr = BLOCK if w3.dtype == w0.dtype else OTHER
    e0 = tl.cdiv(n0, BLOCK)
    e1 = e0 + tl.cdiv(n1, B1)
    e2 = e1 + tl.cdiv(n2, B2)
    slot = (tile >= e0).to(tl.int32) + (tile >= e1).to(tl.int32) + (tile >= e2).to(tl.int32)
    n = tl.where(slot == 0, n0, tl.where(slot == 1, n1, tl.where(slot == 2, n2, n3)))
    row = tl.where(slot == 0, tile * BLOCK, (tile - e0) * B1)
    row = tl.where(slot == 2, (tile - e1) * B2, row)
    return slot, n, tl.where(slot == 3, (tile - e2) * B3, row)


@triton.jit
def store(slot, o0, o1, o2, o3, at, y, mask):
    """The slot's output[at] = y, in its type."""
    if has_type(slot, o0, o1, o2, o3, o0):
        out = select(slot, o0, o1, o2, o3, o0)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)
    elif o3.dtype != o0.dtype:
        other = select(slot, o0, o1, o2, o3, o3)
        tl.store(other + at, y.to(other.dtype.element_ty), mask=mask)


def slot_order(kinds: Sequence[tuple[torch.dtype, ...]]) -> list[int]:
    """Which of up to four things of these types each slot holds; another type than the first's
    comes last, -1 is none."""
    order = sorted(range(len(kinds)), key=lambda i: tuple(map(ne, kinds[i], kinds[0])))
    order[-1:-1] = [-1] * (MAX_SEGMENTS - len(order)) if len(order) > 1 else []
    return order + [-1] * (MAX_SEGMENTS - len(order))


def slots(segments: Sequence[Segment], outputs: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of the four slots; outputs [T, out] or their parts [parts, T, out]."""
    kinds = [(s.weight.dtype, o.dtype) for s, o in zip(segments, outputs, strict=True)]
    args: dict[str, Any] = {}
    for slot, i in enumerate(slot_order(kinds)):
        segment, output = segments[max(i, 0)], outputs[max(i, 0)]
        args[f"w{slot}"], args[f"o{slot}"] = segment.weight, output
        args[f"s{slot}"] = segment.weight if segment.scale is None else segment.scale
        args[f"n{slot}"] = 0 if i < 0 else output.shape[-1]
    for letter in "wso":
        types = [args[f"{letter}{slot}"].dtype for slot in range(MAX_SEGMENTS)]
        assert {*types} == {types[0], types[-1]}, f"{letter} {types}: at most two types"
    return args


def tiles(args: dict[str, Any], block: int, other: int) -> int:
    """Programs over the rows of the four slots."""
    dtype = args["w0"].dtype
    rows = [(args[f"n{i}"], block if args[f"w{i}"].dtype == dtype else other) for i in range(4)]
    return sum(-(-n // size) for n, size in rows)


FP8, DENSE, GATE = ("fp8e4nv", "bf16"), ("bf16", "bf16"), ("bf16", "fp32")  # weight, output
UNIFORM = {1: ((FP8,) * 4,), 2: ((DENSE,) * 4, (GATE,) * 4)}
MIXED = {1: (FP8, FP8, FP8, GATE), 2: (DENSE, DENSE, DENSE, GATE)}  # fused_a_gemm's: few rows


def launch_rows(
    size: int,
    tiles: Callable[[Tiles], tuple[Tile, ...]],
    own: Callable[[Tile], Mapping[str, str | int | float]],
    normed: bool = True,
) -> tuple[Row, ...]:
    """Launches of a kernel with weights of `size` bytes.

    `tiles` picks the kernel's, `own` gives a tile's arguments beside the slots'. A kernel that can
    norm its operand (`normed`) always does for slots of two types. Parts of sums are fp32.
    """
    few, many = ([tile for short in rows for tile in tiles(short)] for rows in LINEAR[size])
    launches = {}
    for types in (*UNIFORM[size], MIXED[size]):
        mixed = types[0] != types[-1]
        norms = {mixed, True} if normed and types[0] != GATE else {False}
        for tile in few if mixed else few + many:
            slots = [(weight, out if tile.split == 1 else "fp32") for weight, out in types]
            for norm in sorted(norms):
                arguments = {**_slot_arguments(slots), **own(tile)}
                arguments |= _norm_arguments(norm) if normed else {}
                row = Row(arguments, tile.num_warps, tile.num_stages)
                launches[str(row)] = row
    return tuple(launches.values())


def _slot_arguments(types: Sequence[tuple[str, str]]) -> Arguments:
    arguments: Arguments = {"x": "*bf16:16", "k_size": "i32:16"}
    for slot, (weight, out) in enumerate(types):
        scale = "fp32" if weight == "fp8e4nv" else weight
        arguments |= {f"w{slot}": f"*{weight}:16", f"s{slot}": f"*{scale}:16"}
        arguments |= {f"o{slot}": f"*{out}:16", f"n{slot}": "i32"}
    return arguments


def _norm_arguments(norm: bool) -> Arguments:
    arguments: Arguments = {"update": "*bf16:16", "total": "*bf16:16", "added": "i32"}
    return arguments | {"gain": "*fp32:16" if norm else "*bf16:16", "eps": "fp32", "NORM": norm}
