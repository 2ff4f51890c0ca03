"""Triton kernels under `set_mla_kv_buffer`: one program writes one token's row.

    copy   kv_buffer[loc[t]] = [k_nope[t] | k_rope[t]], cast to the buffer's dtype
    flat   the same as e4m3 over one scalar scale
    fp8    C e4m3, C / 128 fp32 scales, r bf16 (FlashMLA's 656 bytes for C = 512, r = 64)

Nothing here is constant over a replay, so every access follows the wait. `loc` and the token are
int64 before they multiply a stride. Each row is stored by its own function, which a kernel that
computes the row itself can call too.
"""

import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from minidsv.kernels.launch import KernelSpec, Row, pdl_begin, pdl_end
from minidsv.kernels.launch_config import launch_config
from minidsv.kernels.pdl import PdlMode
from minidsv.kernels.quant_triton import FP8_LIMITS, divide, fp8_scale, to_e4m3
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes
from minidsv.kernels.tiles_small import TABLES


@triton.jit
def _load(x, stride, step, columns, N: tl.constexpr):
    """x[program, columns] (columns < N), row and column strides `stride` and `step`."""
    row = tl.program_id(0).to(tl.int64) * stride
    return tl.load(x + row + columns * step, mask=columns < N)


@triton.jit
def store_plain_row(row, nope, rope, c, r, C: tl.constexpr, R: tl.constexpr):
    """[nope | rope] in the dtype of `row`, a pointer to the slot."""
    tl.store(row + c, nope.to(row.dtype.element_ty), mask=c < C)
    tl.store(row + C + r, rope.to(row.dtype.element_ty), mask=r < R)


@triton.jit
def store_fp8_row(
    latent, scales, rope_out, nope, rope, g, c, r,
    C: tl.constexpr, R: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The fp8 row through three pointers to the slot (e4m3, fp32, bf16); nope [groups, 128]."""
    nope = nope.to(tl.float32)
    scale = fp8_scale(tl.max(tl.abs(nope), 1), False, MAX, FLOOR)
    tl.store(latent + c, to_e4m3(divide(nope, scale[:, None]), MAX), mask=c < C)
    tl.store(scales + C // 4 + g, scale, mask=g < C // 128)
    tl.store(rope_out + (C + C // 32) // 2 + r, rope.to(tl.bfloat16), mask=r < R)


@triton.jit
def _copy_row_kernel(
    kv_buffer, loc, k_nope, k_rope,
    slot_stride, nope_stride, nope_step, rope_stride, rope_step,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    pdl_begin(PDL)
    slot = tl.load(loc + tl.program_id(0)).to(tl.int64)
    nope = _load(k_nope, nope_stride, nope_step, c, C)
    rope = _load(k_rope, rope_stride, rope_step, r, R)
    store_plain_row(kv_buffer + slot * slot_stride, nope, rope, c, r, C, R)
    pdl_end(PDL)


@triton.jit
def _flat_row_kernel(
    kv_buffer, loc, k_nope, k_rope, scale,
    slot_stride, nope_stride, nope_step, rope_stride, rope_step,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    MAX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    c, r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    pdl_begin(PDL)
    slot = tl.load(loc + tl.program_id(0)).to(tl.int64)
    nope = _load(k_nope, nope_stride, nope_step, c, C).to(tl.float32)
    rope = _load(k_rope, rope_stride, rope_step, r, R).to(tl.float32)
    nope = to_e4m3(divide(nope, scale), MAX)
    rope = to_e4m3(divide(rope, scale), MAX)
    store_plain_row(kv_buffer + slot * slot_stride, nope, rope, c, r, C, R)
    pdl_end(PDL)


@triton.jit
def _fp8_row_kernel(
    latent, scales, rope_out, loc, k_nope, k_rope,
    slot_stride, nope_stride, nope_step, rope_stride, rope_step,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    MAX: tl.constexpr, FLOOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    g, r = tl.arange(0, BLOCK_C // 128), tl.arange(0, BLOCK_R)
    c = g[:, None] * 128 + tl.arange(0, 128)[None, :]
    pdl_begin(PDL)
    slot = tl.load(loc + tl.program_id(0)).to(tl.int64)
    nope = _load(k_nope, nope_stride, nope_step, c, C)
    rope = _load(k_rope, rope_stride, rope_step, r, R).to(tl.float32)
    store_fp8_row(
        latent + slot * slot_stride,
        scales + slot * (slot_stride // 4),
        rope_out + slot * (slot_stride // 2),
        nope, rope, g, c, r, C, R, MAX, FLOOR,
    )  # fmt: skip
    pdl_end(PDL)


_STRIDES = ("nope_stride", "nope_step", "rope_stride", "rope_step")
ALIGNED: dict[str, str | int] = dict(zip(_STRIDES, ("i32:16", 1, "i32:16", 1), strict=True))
ANY: dict[str, str | int] = dict.fromkeys(_STRIDES, "i32")
VARIANTS = ((":16", ALIGNED), ("", ANY))
KEYS = ("bf16", "fp32")
COPIES = (("bf16", "bf16"), ("bf16", "fp32"), ("u8", "u8"))  # buffer, keys
FP8_FIELDS = {"latent": "fp8e4nv", "scales": "fp32", "rope_out": "bf16"}
DIMS = ((512, 64), (128, 64))  # C and r: DeepSeek-V3.2 and GLM-5; the bundled model


def _sizes(c: int, r: int) -> dict[str, int]:
    return {"C": c, "R": r, "BLOCK_C": next_power_of_2(c), "BLOCK_R": next_power_of_2(r)}


def _rows(
    types: Iterable[tuple[dict[str, str], str]],
    row_size: Callable[[int, int], int] = operator.add,
    **more: str | float,
) -> tuple[Row, ...]:
    """Launches for each of `types`: (output name -> pointee, pointee of k_nope and k_rope).

    `row_size` gives the buffer's row for (C, r), `more` the arguments that one kernel adds.
    """
    rows = []
    for (outputs, keys), (c, r), variant in itertools.product(types, DIMS, VARIANTS):
        align, strides = variant
        arguments: dict[str, str | int | float] = {n: f"*{t}:16" for n, t in outputs.items()}
        arguments["slot_stride"] = "i32" if row_size(c, r) % 16 else "i32:16"
        arguments |= dict.fromkeys(("k_nope", "k_rope"), f"*{keys}{align}")
        arguments |= {"loc": f"*i64{align}", **strides, **_sizes(c, r), **more}
        rows += [Row(arguments, tile.num_warps) for tile in TABLES["set_mla_kv_buffer"]]
    return tuple(rows)


COPY = KernelSpec(
    _copy_row_kernel, _rows([({"kv_buffer": buffer}, keys) for buffer, keys in COPIES])
)
FLAT = KernelSpec(
    _flat_row_kernel,
    _rows([({"kv_buffer": "fp8e4nv"}, keys) for keys in KEYS], scale="fp32", MAX=FP8_LIMITS["MAX"]),
)
FP8 = KernelSpec(
    _fp8_row_kernel,
    _rows([(FP8_FIELDS, keys) for keys in KEYS], fp8_row_bytes, **FP8_LIMITS),
)
SPECS = (COPY, FLAT, FP8)


def _inputs(kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor) -> dict[str, Any]:
    """Arguments that the three kernels share; loc [T], k_nope [T, C], k_rope [T, r]."""
    assert loc.is_contiguous(), f"loc has stride {loc.stride()}"
    strides = {
        "slot_stride": kv_buffer.stride(0),
        "nope_stride": k_nope.stride(0),
        "nope_step": k_nope.stride(1),
        "rope_stride": k_rope.stride(0),
        "rope_step": k_rope.stride(1),
    }
    keys = {"loc": loc, "k_nope": k_nope, "k_rope": k_rope}
    return keys | strides | _sizes(k_nope.shape[1], k_rope.shape[1])


def _launch(spec: KernelSpec, mode: PdlMode, args: dict[str, Any]) -> None:
    tokens = len(args["loc"])
    tile = launch_config("set_mla_kv_buffer", tokens, (args["C"], args["R"]))
    spec.launch((tokens,), mode, args, tile.num_warps)


def copy_rows(
    kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor, mode: PdlMode
) -> None:
    """kv_buffer[loc] = [k_nope | k_rope]; one-byte dtypes are copied as bytes."""
    if kv_buffer.element_size() == 1:
        kv_buffer, k_nope, k_rope = (x.view(torch.uint8) for x in (kv_buffer, k_nope, k_rope))
    args = _inputs(kv_buffer, loc, k_nope, k_rope)
    _launch(COPY, mode, args | {"kv_buffer": kv_buffer})


def write_flat_rows(
    kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor, scale: float, mode: PdlMode
) -> None:
    """kv_buffer e4m3 [num_slots, C + r]."""
    args = _inputs(kv_buffer, loc, k_nope, k_rope)
    _launch(FLAT, mode, args | {"kv_buffer": kv_buffer, "scale": scale, "MAX": FP8_LIMITS["MAX"]})


def write_fp8_rows(
    kv_buffer: Tensor, loc: Tensor, k_nope: Tensor, k_rope: Tensor, mode: PdlMode
) -> None:
    """kv_buffer uint8 [num_slots, C + C / 32 + 2 r], seen through one pointer a field's type."""
    views = {
        "latent": kv_buffer.view(torch.float8_e4m3fn),
        "scales": kv_buffer.view(torch.float32),
        "rope_out": kv_buffer.view(torch.bfloat16),
    }
    args = _inputs(kv_buffer, loc, k_nope, k_rope)
    _launch(FP8, mode, args | views | FP8_LIMITS)
