"""The Triton writers against the reference, bit by bit, in buffers full of NaN.

On a GPU in every PDL mode; `test_triton.py` runs the same file in Triton's interpreter, which
rounds neither to bf16 nor to e4m3 correctly, so there the keys are exact in both.
"""

import functools

import pytest
import torch
from torch import Tensor

from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.set_mla_kv_buffer import (
    fp8_row_bytes,
    set_mla_kv_buffer,
    set_mla_kv_buffer_fp8_quant,
    set_mla_kv_buffer_fp8_quant_ref,
    set_mla_kv_buffer_ref,
)

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
FLOATS = (torch.float32, torch.float16 if is_interpreted() else torch.bfloat16)
SLOTS = 640
TOKENS = (0, 1, 5) if is_interpreted() else (0, 1, 70)
DIMS = ((512, 64), (128, 64))


def keys(tokens: int, c: int, r: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """k_nope [tokens, c], k_rope [tokens, r], among NaNs where the layout leaves room."""
    generator = torch.Generator().manual_seed(tokens + c)
    values = torch.randn(tokens, c + r, generator=generator) * 30
    if is_interpreted():  # exact in e4m3, also over the scale that an amax of 448 gives: 1
        values = (values % 16).floor() - 8
        values[:, :c:64] = 448.0
    values[:1, :c] *= 0.0  # an all-zero group must not divide by zero
    if layout == "rows":
        whole = values.to(dtype)
        return whole[:, :c].contiguous(), whole[:, c:].contiguous()
    whole = torch.full((tokens, 2, c + r + 9), float("nan")).to(dtype)
    whole = whole.transpose(0, 2).contiguous().transpose(0, 2) if layout == "columns" else whole
    whole[:, 1, :c], whole[:, 1, c + 9 :] = values[:, :c].to(dtype), values[:, c:].to(dtype)
    return whole[:, 1, :c], whole[:, 1, c + 9 :]


def check(write, reference, dtype: torch.dtype, width: int, nope: Tensor, rope: Tensor, loc_dtype):
    """In every mode `write` leaves the reference's bytes in all slots, named by `loc` or not."""
    loc = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1))[: len(nope)]
    poisoned = torch.full((SLOTS, width * dtype.itemsize), 0xFF, dtype=torch.uint8)
    results = []
    for mode in MODES:  # before the reference, whose freed memory could hold the answer
        results.append(poisoned.to(DEVICE).clone().view(dtype))
        write(results[-1], *(x.to(DEVICE) for x in (loc.to(loc_dtype), nope, rope)), pdl=mode)
    want = poisoned.view(dtype)
    reference(want, loc, nope, rope)
    for mode, got in zip(MODES, results, strict=True):
        assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8)), mode


@pytest.mark.parametrize("loc_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["rows", "wide", "columns"])
@pytest.mark.parametrize(("c", "r"), [*DIMS, (100, 12)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rows(tokens: int, c: int, r: int, layout: str, loc_dtype) -> None:
    for buffer_dtype in FLOATS:
        for dtype in FLOATS:
            nope, rope = keys(tokens, c, r, layout, dtype)
            check(
                set_mla_kv_buffer,
                set_mla_kv_buffer_ref, buffer_dtype, c + r, nope, rope, loc_dtype,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("c", "r"), [(512, 64), (528, 128), (100, 12)])
def test_bytes_are_copied(c: int, r: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    whole = torch.randint(256, (TOKENS[-1], c + r), dtype=torch.uint8, generator=generator).view(
        dtype
    )
    check(
        set_mla_kv_buffer,
        set_mla_kv_buffer_ref, dtype, c + r, whole[:, :c], whole[:, c:], torch.int64,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["rows", "wide", "columns"])
@pytest.mark.parametrize(("c", "r"), [*DIMS, (640, 2)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_fp8_rows(tokens: int, c: int, r: int, layout: str) -> None:
    for dtype in FLOATS:
        nope, rope = keys(tokens, c, r, layout, dtype)
        check(
            set_mla_kv_buffer_fp8_quant,
            set_mla_kv_buffer_fp8_quant_ref,
            torch.uint8, fp8_row_bytes(c, r), nope, rope, torch.int64,
        )  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.25] if is_interpreted() else [1.0, 0.25, 0.3])
@pytest.mark.parametrize("layout", ["rows", "wide", "columns"])
def test_flat_rows(layout: str, scale: float) -> None:
    """500 saturates at 448, and so do the largest values over 0.25 and 0.3."""
    for (c, r), dtype in zip((*DIMS, (100, 12)), (*FLOATS, FLOATS[1]), strict=True):
        nope, rope = keys(TOKENS[-1], c, r, layout, dtype)
        nope[-1, 0] = rope[-1, 0] = 500 * scale
        check(
            functools.partial(set_mla_kv_buffer_fp8_quant, scale=scale),
            functools.partial(set_mla_kv_buffer_fp8_quant_ref, scale=scale),
            torch.float8_e4m3fn, c + r, nope, rope, torch.int64,
        )  # fmt: skip


@pytest.mark.skipif(is_interpreted(), reason="4.8 GB")
def test_slots_beyond_two_to_the_31_elements() -> None:
    slots = 2**31 // 576 + 100
    buffer = torch.zeros(slots, 576, dtype=torch.bfloat16, device="cuda")
    nope, rope = (x.cuda() for x in keys(2, 512, 64, "rows", torch.bfloat16))
    loc = torch.tensor([slots - 1, 3], device="cuda")
    set_mla_kv_buffer(buffer, loc, nope, rope, pdl="prefetch")
    assert torch.equal(buffer[loc], torch.cat((nope, rope), -1))
    assert buffer.count_nonzero() == buffer[loc].count_nonzero()
