"""Paged caches: bytes as documented, nothing but the named slots touched, reads undo writes."""

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.index_cache import fp8_page_bytes, read_index_k_buffer, set_index_k_buffer
from minidsv.kernels.quant import hadamard
from minidsv.kernels.set_mla_kv_buffer import (
    fp8_row_bytes,
    read_mla_kv_buffer,
    set_mla_kv_buffer,
    set_mla_kv_buffer_fp8_quant,
)

SLOTS = 640


def rows(c: int, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Slots (shuffled), k_nope and k_rope as views with odd strides."""
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randperm(SLOTS, generator=generator)[:70]
    wide = torch.randn(70, 3, c + r + 5, generator=generator)
    return loc, wide[:, 1, :c], wide[:, 1, c + 5 :]


def untouched(buffer: Tensor, before: Tensor, loc: Tensor) -> bool:
    others = torch.ones(buffer.shape[0], dtype=torch.bool)
    others[loc] = False
    return torch.equal(buffer.view(torch.uint8)[others], before.view(torch.uint8)[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loc_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("c", "r"), [(512, 64), (128, 64), (100, 28)])
def test_plain_rows(dtype: torch.dtype, loc_dtype: torch.dtype, c: int, r: int) -> None:
    loc, nope, rope = rows(c, r)
    buffer = torch.full((SLOTS, c + r), float("nan"), dtype=dtype)
    before = buffer.clone()
    set_mla_kv_buffer(buffer, loc.to(loc_dtype), nope, rope)
    want = torch.cat((nope, rope), -1).to(dtype)
    assert torch.equal(buffer[loc], want)
    assert untouched(buffer, before, loc)
    assert torch.equal(read_mla_kv_buffer(buffer, loc, c), want.float())


@pytest.mark.parametrize(("c", "r", "size"), [(512, 64, 656), (128, 64, 260), (256, 32, 328)])
def test_fp8_row_bytes(c: int, r: int, size: int) -> None:
    """C e4m3, then one fp32 scale per 128 channels, then bf16 rope: model-spec 7.4, format A."""
    assert fp8_row_bytes(c, r) == size
    loc, nope, rope = rows(c, r)
    nope[0] = 0.0  # an all-zero tile must not divide by zero
    buffer = torch.full((SLOTS, size), 0xFF, dtype=torch.uint8)
    before = buffer.clone()
    set_mla_kv_buffer_fp8_quant(buffer, loc, nope, rope)
    assert untouched(buffer, before, loc)
    for i, slot in enumerate(loc.tolist()):
        raw = buffer[slot]
        scales = raw[c : c + c // 32].clone().view(torch.float32)
        amax = nope[i].unflatten(0, (-1, 128)).abs().amax(-1).clamp_min(1e-4)
        assert_close("scales", scales, amax / 448, "fp32")
        want = (nope[i] / scales.repeat_interleave(128)).to(torch.float8_e4m3fn)
        assert torch.equal(raw[:c], want.view(torch.uint8))
        assert torch.equal(raw[c + c // 32 :].clone().view(torch.bfloat16), rope[i].bfloat16())
    read = read_mla_kv_buffer(buffer, loc, c)
    assert torch.equal(read[:, c:], rope.bfloat16().float())
    error = (read[:, :c] - nope).norm() / nope.norm()
    assert error < 0.03


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_flat_row(scale: float) -> None:
    """Format B: one e4m3 cast over one scalar scale, saturating."""
    loc, nope, rope = rows(512, 64)
    nope[0, 0] = 1e6
    buffer = torch.zeros(SLOTS, 576, dtype=torch.uint8).view(torch.float8_e4m3fn)
    before = buffer.clone()
    set_mla_kv_buffer_fp8_quant(buffer, loc, nope, rope, scale)
    assert untouched(buffer, before, loc)
    row = torch.cat((nope, rope), -1) / scale
    want = row.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(buffer.view(torch.uint8)[loc], want.view(torch.uint8))
    assert torch.equal(read_mla_kv_buffer(buffer, loc, 512, scale), want.float() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_index_pages(dtype: torch.dtype) -> None:
    buffer = torch.full((10, 64, 128), float("nan"), dtype=dtype)
    loc, k, _ = rows(128, 0)
    set_index_k_buffer(buffer, loc, k)
    pages = torch.tensor([7, 0, 9])
    got = read_index_k_buffer(buffer, pages, 128)
    full = torch.full((SLOTS, 128), float("nan"), dtype=dtype)
    full[loc] = k.to(dtype)
    want = full.view(10, 64, 128)[pages].flatten(0, 1).float()
    assert_close("pages", got, want, "exact")


def test_fp8_index_page_bytes() -> None:
    """64 keys first, then 64 fp32 scales: model-spec 7.5 (DeepGEMM)."""
    assert fp8_page_bytes(128) == 8448
    buffer = torch.full((10, 8448), 0xFF, dtype=torch.uint8)
    before = buffer.clone()
    loc, k, _ = rows(128, 0, seed=3)
    set_index_k_buffer(buffer, loc, k)
    rotated = hadamard(k).bfloat16().float()
    written = torch.zeros_like(buffer, dtype=torch.bool)
    flat = buffer.flatten()
    for i, slot in enumerate(loc.tolist()):
        base, offset = slot // 64 * 8448, slot % 64
        key = slice(base + offset * 128, base + offset * 128 + 128)
        at = slice(base + 8192 + offset * 4, base + 8192 + offset * 4 + 4)
        scale = flat[at].clone().view(torch.float32)
        assert float(scale.log2()) == int(scale.log2()), "scales are powers of two"
        assert torch.equal(
            flat[key], (rotated[i] / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        )
        written.view(-1)[key] = written.view(-1)[at] = True
    assert torch.equal(buffer[~written], before[~written])
    read = read_index_k_buffer(buffer, torch.arange(10), 128)
    assert (read[loc] - rotated).norm() / rotated.norm() < 0.03


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_byte_rows_are_copied(dtype: torch.dtype) -> None:
    loc, nope, rope = rows(512, 64)
    nope, rope = (x.to(torch.float8_e4m3fn).view(dtype) for x in (nope, rope))
    buffer = torch.zeros(SLOTS, 576, dtype=torch.uint8).view(dtype)
    before = buffer.clone()
    set_mla_kv_buffer(buffer, loc, nope, rope, pdl="on")  # a CPU tensor: the reference
    assert torch.equal(buffer[loc].view(torch.uint8), torch.cat((nope, rope), -1).view(torch.uint8))
    assert untouched(buffer, before, loc)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loc": torch.zeros(2)}, "loc torch.float32 is not int32 or int64"),
        ({"loc": torch.zeros(1, 2, dtype=torch.int64)}, r"loc \(1, 2\) is not \[T\]"),
        ({"k_rope": torch.zeros(3, 64)}, r"k_rope \(3, 64\): not \[2, \*\]"),
        ({"k_rope": torch.zeros(2, 64).half()}, "k_nope torch.float32, k_rope torch.float16"),
        ({"kv_buffer": torch.zeros(9, 575)}, r"\(9, 575\) torch.float32: its rows must hold 576"),
        ({"kv_buffer": torch.zeros(9, 9, 64)}, r"\(9, 9, 64\) is not \[num_slots, row\]"),
        ({"kv_buffer": torch.zeros(576, 9).T}, r"strides \(1, 9\): want contiguous rows"),
        ({"kv_buffer": torch.zeros(9, 576, dtype=torch.uint8)}, "copied, not quantised"),
    ],
)
def test_unfit_rows_are_refused(change: dict[str, Tensor], message: str) -> None:
    args = {
        "kv_buffer": torch.zeros(9, 576),
        "loc": torch.tensor([1, 2]),
        "k_nope": torch.zeros(2, 512),
        "k_rope": torch.zeros(2, 64),
    }
    with pytest.raises(AssertionError, match=message):
        set_mla_kv_buffer(**args | change)
