"""Triton kernel that ends a sum which programs shared: y = sum of fp32 parts, in their order.

One program adds BLOCK elements of one of up to four outputs; all its loads are in flight at once.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from minidsv.kernels.gemm import MAX_SEGMENTS
from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.segments_triton import locate, select, slot_order, store
from minidsv.kernels.tiles_gemm import MAX_PARTS

BLOCK = 512


@triton.jit(do_not_specialize=("m", "parts"))
def _sum_parts_kernel(
    p0, p1, p2, p3, o0, o1, o2, o3, n0, n1, n2, n3, m, parts,
    MAX_PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """p [parts, m, n] fp32 -> o [m, n], each."""
    slot, size, first = locate(
        tl.program_id(0), p0, p1, p2, p3, m * n0, m * n1, m * n2, m * n3, BLOCK, BLOCK
    )  # fmt: skip
    p = select(slot, p0, p1, p2, p3, p0)
    at = first + tl.arange(0, BLOCK)
    pdl_begin(PDL)
    y = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(MAX_PARTS):
        end = tl.where(parts > part, size, 0)
        y += tl.load(p + part * size.to(tl.int64) + at, mask=at < end, other=0.0)
    store(slot, o0, o1, o2, o3, at, y, at < size)
    pdl_end(PDL)


def _row(first: str, last: str) -> Row:
    """Of outputs of two types, or one."""
    arguments: dict[str, str | int | float] = {"m": "i32", "parts": "i32"}
    for slot in range(MAX_SEGMENTS):
        out = last if slot == MAX_SEGMENTS - 1 else first
        arguments |= {f"p{slot}": "*fp32:16", f"o{slot}": f"*{out}:16", f"n{slot}": "i32:16"}
    return Row({**arguments, "MAX_PARTS": MAX_PARTS, "BLOCK": BLOCK})


ROWS = tuple(_row(*types) for types in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")))
SUM_PARTS = KernelSpec(_sum_parts_kernel, ROWS)
SPECS = (SUM_PARTS,)


def sum_parts(parts: Sequence[Tensor], outputs: Sequence[Tensor], mode: PdlMode) -> None:
    """Each of up to four outputs [T, n] = the sum of its fp32 parts [parts, T, n]."""
    count, m, _ = parts[0].shape
    args: dict[str, Any] = {"m": m, "parts": count, "MAX_PARTS": MAX_PARTS, "BLOCK": BLOCK}
    assert count <= MAX_PARTS, f"{count} parts: at most {MAX_PARTS}"
    for slot, i in enumerate(slot_order([(o.dtype,) for o in outputs])):
        args[f"p{slot}"], args[f"o{slot}"] = parts[max(i, 0)], outputs[max(i, 0)]
        args[f"n{slot}"] = 0 if i < 0 else outputs[i].shape[1]
    programs = sum(cdiv(o.numel(), BLOCK) for o in outputs)
    SUM_PARTS.launch((programs,), mode, args)
