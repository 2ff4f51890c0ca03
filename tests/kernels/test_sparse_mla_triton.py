"""Sparse MLA's Triton kernels against the reference, over shuffled caches full of NaN.

On a GPU in every PDL mode; `test_triton.py` runs the same file in Triton's interpreter, whose bf16
arithmetic is wrong, so there queries are fp16.

The kernels round weights and the splits' sums to the operands' dtype, so an element errs by a few
2^-9 of the largest value that is summed, however small it comes out: values are of order 1, for
which the elementwise tolerance is made, and the scores (deviation 7) come from the queries.
"""

import math

import pytest
import torch
from torch import Tensor

from compare import assert_close, relative_l2
from minidsv.kernels.combine_triton import combine, combine_values
from minidsv.kernels.pdl import is_interpreted, triton_mode
from minidsv.kernels.set_mla_kv_buffer import (
    fp8_row_bytes,
    read_mla_kv_buffer,
    set_mla_kv_buffer,
    set_mla_kv_buffer_fp8_quant,
)
from minidsv.kernels.sparse_mla import sparse_mla, sparse_mla_ref, sparse_mla_values
from minidsv.kernels.sparse_mla_triton import EMPTY

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
QUERY = torch.float16 if is_interpreted() else torch.bfloat16
PLAIN = "float16" if is_interpreted() else "bfloat16"
E4M3 = torch.float8_e4m3fn
SLOTS = 4096
KV_SCALE, Q_SCALE = 2.0**-7, 2.0**-2
DIMS = [(128, 64)] if is_interpreted() else [(512, 64), (128, 64)]
HEADS = [1, 70] if is_interpreted() else [1, 4, 16, 17, 64, 100, 128]
TOPK = [21] if is_interpreted() else [1, 64, 100, 2048]
TOKENS = [0, 1, 8] if is_interpreted() else [0, 1, 3, 40]


def cache(layout: str, rows: Tensor, c: int, written: Tensor) -> Tensor:
    """A buffer of `layout` that holds `rows` in the slots `written`, NaN everywhere else."""
    r = rows.shape[1] - c
    if layout == PLAIN:
        buffer = torch.full((SLOTS, c + r), float("nan"), dtype=getattr(torch, layout))
        set_mla_kv_buffer(buffer, written, rows[:, :c], rows[:, c:])
        return buffer.to(DEVICE)
    width = fp8_row_bytes(c, r) if layout == "fp8" else c + r
    buffer = torch.full((SLOTS, width), 0xFF, dtype=torch.uint8)
    buffer = buffer if layout == "fp8" else buffer.view(E4M3)
    scale = 1.0 if layout == "fp8" else KV_SCALE
    set_mla_kv_buffer_fp8_quant(buffer, written, rows[:, :c], rows[:, c:], scale)
    return buffer.to(DEVICE)


def selection(tokens: int, topk: int, written: Tensor, generator: torch.Generator) -> Tensor:
    """Slots with none (-1) behind, in the middle, or everywhere, by token."""
    draws = [torch.randperm(len(written), generator=generator)[:topk] for _ in range(tokens)]
    indices = written[torch.stack(draws)] if tokens else torch.empty(0, topk, dtype=torch.int64)
    indices[1::4, topk // 2 :] = -1
    indices[2::4] = -1
    indices[3::4, topk // 3 : topk // 2] = -1
    indices[3::4, 0] = -1
    return indices.to(DEVICE)


def inputs(layout: str, tokens: int, heads: int, topk: int, c: int, r: int):
    """q_latent, q_pe (a strided view), kv_buffer, topk_indices."""
    generator = torch.Generator().manual_seed(tokens + heads + topk)
    written = torch.randperm(SLOTS, generator=generator)[: max(topk, 40)]
    written = written[written != 0]  # slot 0 stays poison: none is not slot 0
    rows = torch.randn(len(written), c + r, generator=generator)
    rows *= torch.logspace(-6, 0, len(written), base=2.0)[:, None]  # scales differ by row
    rows[:, : c // 2] *= 0.1  # and by group
    query = torch.randn(tokens, heads, c + 2 * r, generator=generator) * 4
    query[..., c : c + r] = float("nan")
    query = query.to(DEVICE, QUERY)
    kv_buffer = cache(layout.removesuffix("_query"), rows, c, written)
    indices = selection(tokens, min(topk, len(written)), written, generator)
    q_latent, q_pe = query[..., :c].contiguous(), query[..., c + r :]
    if layout.endswith("_query"):
        q_latent, q_pe = (x.float().div(Q_SCALE).to(E4M3) for x in (q_latent, q_pe))
    return q_latent, q_pe, kv_buffer, indices


def as_multiplied(kv_buffer: Tensor, c: int) -> Tensor:
    """fp8 rows as plain ones of the query's dtype, to which the kernel rounds values times scales:
    of bf16, times the scale's first 16 bits, as two numbers."""
    rows = read_mla_kv_buffer(kv_buffer, torch.arange(SLOTS, device=DEVICE), c, 1.0)
    if QUERY is torch.bfloat16:
        values = kv_buffer[:, :c].view(E4M3).float().unflatten(1, (-1, 128))
        scale = kv_buffer[:, c : c + c // 32].view(torch.float32)[..., None]
        high = scale.bfloat16().float()
        low = (values * (scale - high).bfloat16().float()).bfloat16().float()
        rows[:, :c] = (values * high + low).flatten(1)
    return rows.to(QUERY)


def scales(layout: str) -> dict[str, float]:
    found = {"scale": 0.1, "kv_scale": KV_SCALE if "flat" in layout else 1.0}
    return found | {"q_scale": Q_SCALE if "query" in layout else 1.0}


@pytest.mark.parametrize("layout", [PLAIN, "fp8", "fp8_flat", "fp8_flat_query"])
@pytest.mark.parametrize(("c", "r"), DIMS)
@pytest.mark.parametrize("heads", HEADS)
def test_against_the_reference(layout: str, c: int, r: int, heads: int) -> None:
    """The reference reads the rows that the kernel multiplies: the tight check of every layout.

    The scores of fp8 rows as stored differ by a few 2^-9 / sqrt(3) of their deviation.
    """
    for tokens in TOKENS:
        for topk in TOPK:
            args = inputs(layout, tokens, heads, topk, c, r)
            modes = MODES if c == DIMS[0][0] and heads in (1, 128) else MODES[-1:]
            got = [sparse_mla(*args, **scales(layout), pdl=mode) for mode in modes]
            want = stored = sparse_mla_ref(*args, **scales(layout))
            if layout == "fp8":
                want = sparse_mla_ref(*args[:2], as_multiplied(args[2], c), args[3], 0.1)
            name = f"{tokens} tokens, top {topk}"
            assert_close(name, got[0], want, "bf16")
            assert not want.any() or relative_l2(got[0], want) < 5e-3, name
            assert not want.any() or relative_l2(got[0], stored) < 1e-2, name
            assert not got[0][2::4].count_nonzero(), f"{name}: no slot, no zeros"
            for mode, other in zip(modes, got, strict=True):
                assert torch.equal(other, got[0]), f"{name}: {mode} differs"


@pytest.mark.parametrize(
    ("tokens", "splits"), [(0, 2), (1, 2), (1, 32), (3, 2), (7, 16), (4, 32), (20, 2), (11, 8)]
)
@pytest.mark.parametrize("c", [c for c, _ in DIMS])
def test_sum_of_splits(tokens: int, splits: int, c: int) -> None:
    """A lone token's with W_UV too, which lies between NaNs; a token's splits may all be empty."""
    heads, v, dtype = 3, 48, torch.float32 if is_interpreted() else torch.bfloat16
    generator = torch.Generator().manual_seed(tokens + splits)
    lse = torch.randn(tokens, splits, heads, generator=generator) * 4
    lse[::2, splits // 2 :] = EMPTY.value
    lse[2::4] = EMPTY.value
    partial = torch.randn(tokens, splits, heads, c, generator=generator)
    partial[lse == EMPTY.value] = 0
    partial, lse = partial.to(dtype).to(DEVICE), lse.to(DEVICE)
    kv_b = torch.full((heads, 32 + v + 16, c), float("nan"), dtype=dtype)
    kv_b[:, 32:-16] = torch.randn(heads, v, c, generator=generator) / 8
    w_uv = kv_b.to(DEVICE)[:, 32:-16]
    shares = (lse.double() * math.log(2)).softmax(1)[..., None]
    want = (shares * partial.double()).sum(1)
    modes = [triton_mode(partial, mode) for mode in MODES]
    latents = [combine(partial, lse, mode) for mode in modes]
    tol = "bf16" if dtype == torch.bfloat16 else "fp32"
    assert_close("latents", latents[0], want.to(dtype), tol)
    assert all(torch.equal(other, latents[0]) for other in latents)
    if tokens != 1:
        return
    values = [combine_values(partial, lse, w_uv, mode) for mode in modes]
    product = torch.einsum("thc,hvc->thv", latents[0].double(), w_uv.double()).flatten(1)
    assert_close("values", values[0], product.to(dtype), "bf16" if tol == "bf16" else "fp32_logits")
    assert all(torch.equal(other, values[0]) for other in values)


@pytest.mark.parametrize("tokens", TOKENS)
def test_values(tokens: int) -> None:
    """As a whole: an element errs by 2^-9 of the latents that it weighs, however small it is."""
    (c, r), heads, topk = DIMS[0], HEADS[-1], 100
    q_latent, q_pe, kv_buffer, indices = inputs("fp8", tokens, heads, topk, c, r)
    w_uv = torch.randn(heads, 24, c, generator=torch.Generator().manual_seed(3)) / 8
    w_uv = w_uv.to(DEVICE, QUERY)
    got = sparse_mla_values(q_latent, q_pe, kv_buffer, indices, w_uv, 0.1, MODES[-1])
    latent = sparse_mla_ref(q_latent, q_pe, as_multiplied(kv_buffer, c), indices, 0.1)
    want = torch.einsum("thc,hvc->thv", latent.double(), w_uv.double()).flatten(1)
    assert got.shape == want.shape
    assert got.dtype == QUERY
    assert not got[2::4].count_nonzero(), "no slot, no zeros"
    assert not tokens or relative_l2(got, want) < 5e-3


@pytest.mark.parametrize("layout", ["fp8", "fp8_flat"])
def test_fp8_against_full_precision(layout: str) -> None:
    """Loose: FP8 rows against the rows that were written."""
    c, r = DIMS[0]
    written = torch.arange(1, 101)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(100, c + r, generator=generator)
    query = (torch.randn(3, 4, c + r, generator=generator) * 0.3).to(DEVICE, QUERY)
    indices = written.expand(3, -1).contiguous().to(DEVICE)
    query = query[..., :c], query[..., c:]
    got = sparse_mla(
        *query, cache(layout, rows, c, written), indices, **scales(layout), pdl="prefetch"
    )
    want = sparse_mla_ref(*query, cache(PLAIN, rows, c, written), indices, 0.1)
    assert_close(layout, got, want, "fp8_weight")


@pytest.mark.skipif(is_interpreted(), reason="operands are fp16, as queries are")
@pytest.mark.parametrize("heads", [4, 64])
def test_latents_beyond_the_range_of_f16(heads: int) -> None:
    """fp8 rows from 1e-6 to 1e7 in one token; the scores come from the rope part alone."""
    c, r = DIMS[0]
    written = torch.arange(1, 65)
    rows = torch.randn(64, c + r, generator=torch.Generator().manual_seed(8))
    rows[:, :c] *= torch.logspace(-6, 7, 64)[:, None]
    kv_buffer = cache("fp8", rows, c, written)
    q_pe = torch.randn(1, heads, r, generator=torch.Generator().manual_seed(9)).to(DEVICE, QUERY)
    q_latent = torch.zeros(1, heads, c, dtype=QUERY, device=DEVICE)
    for count in (8, 64):  # the small ones alone too
        args = q_latent, q_pe, kv_buffer, written[None, :count].contiguous().to(DEVICE), 0.1
        got = sparse_mla(*args, out_dtype=torch.float32, pdl="prefetch")
        want = sparse_mla_ref(*args, out_dtype=torch.float32)
        largest = want.abs().max()
        assert largest > 0
        assert_close(f"{count} rows", got / largest, want / largest, "bf16")


@pytest.mark.skipif(is_interpreted(), reason="4.8 GB")
def test_slots_beyond_two_to_the_31_elements() -> None:
    slots = 2**31 // 576 + 100
    buffer = torch.full((slots, 576), float("nan"), dtype=torch.bfloat16, device="cuda")
    indices = torch.tensor([[slots - 1, 5, slots - 40]], device="cuda")
    buffer[indices[0]] = torch.randn(3, 576, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 16, 576, device="cuda", dtype=torch.bfloat16)
    args = query[..., :512], query[..., 512:], buffer, indices, 0.1
    assert_close("far slots", sparse_mla(*args, pdl="prefetch"), sparse_mla_ref(*args), "bf16")
