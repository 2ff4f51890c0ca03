"""The fused Triton kernels before attention against their references, in buffers full of NaN.

Numbers whose sums are exact in every order must give the reference's bytes; random ones may differ
by a rounding where fp32 sums were added in another order. On a GPU in every PDL mode, which must
agree in every bit; `test_triton.py` runs the same file in Triton's interpreter on exact numbers.
"""

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.index_cache import fp8_page_bytes, read_index_k_buffer
from minidsv.kernels.indexer_prep import (
    index_k_write,
    index_k_write_ref,
    index_q_prep,
    index_q_prep_ref,
)
from minidsv.kernels.mla_prep import norm_rope_set_mla_kv_buffer, norm_rope_set_mla_kv_buffer_ref
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.set_mla_kv_buffer import fp8_row_bytes, read_mla_kv_buffer

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
HALF = torch.float16 if is_interpreted() else torch.bfloat16
TOKENS = (0, 1, 5) if is_interpreted() else (0, 1, 7, 70, 300)
SLOTS = 640
NAN = float("nan")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).to(dtype).to(DEVICE)


def spikes(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> Tensor:
    """Rows of 0 but for seven +-1: every sum of them has three bits."""
    rows = torch.zeros(shape)
    where = torch.rand(shape, generator=generator(seed)).argsort(-1)[..., :7]
    signs = torch.randint(0, 2, where.shape, generator=generator(seed + 1)) * 2.0 - 1
    return rows.scatter_(-1, where, signs).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """x as a view whose rows lie among NaNs."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), NAN, dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def quarter_turns(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    """Angles of -90, 0, 90 and 180 degrees: rotations that round nothing."""
    turns = torch.randint(0, 4, (tokens, half), generator=generator(7)).to(DEVICE)
    cos = torch.tensor([0.0, 1.0, 0.0, -1.0], device=DEVICE)[turns]
    return cos, torch.tensor([-1.0, 0.0, 1.0, 0.0], device=DEVICE)[turns]


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angle = random(tokens, half, seed=9)
    return angle.cos(), angle.sin()


def written(op, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What op(buffer, pdl=mode) leaves in a poisoned buffer, which must not depend on the mode."""
    size = torch.Size(shape).numel() * dtype.itemsize
    results = []
    for mode in MODES:
        raw = torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)
        results.append(raw)
        op(raw.view(dtype).view(shape), pdl=mode)
    for mode, raw in zip(MODES, results, strict=True):
        assert torch.equal(raw, results[0]), mode
    return results[0].view(dtype).view(shape)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like.view(torch.uint8), 0xFF).view(like.dtype).view_as(like)


def slots(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(SLOTS, generator=generator(1))[:tokens].to(dtype).to(DEVICE)


def untouched(buffer: Tensor, loc: Tensor) -> bool:
    """Rows of no slot in `loc` are still 0xFF."""
    others = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    others[loc.long()] = False
    return bool((buffer.view(torch.uint8)[others] == 0xFF).all())


CACHES = (HALF, torch.float32, torch.float8_e4m3fn, torch.uint8)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("c", "r"), [(512, 64), (128, 64), (384, 24)])
@pytest.mark.parametrize("cache", CACHES, ids=str)
@pytest.mark.parametrize("loc_dtype", [torch.int32, torch.int64])
def test_latent_rows(tokens: int, c: int, r: int, cache: torch.dtype, loc_dtype) -> None:
    shape = (SLOTS, fp8_row_bytes(c, r) if cache == torch.uint8 else c + r)
    loc, gain = slots(tokens, loc_dtype), random(c, seed=1)
    exact = [
        strided(torch.ones(tokens, c, dtype=HALF, device=DEVICE) * 2),  # mean square 4, normed 1
        torch.full((c,), 7.0, device=DEVICE),
        0.0,
        strided(spikes(tokens, r)),
        *quarter_turns(tokens, r // 2),
        0.5,
    ]
    got = written(lambda b, pdl: norm_rope_set_mla_kv_buffer(b, loc, *exact, pdl=pdl), shape, cache)
    if tokens and not (is_interpreted() and cache == torch.uint8):  # 7 over its scale is not exact
        want = poisoned(got)
        norm_rope_set_mla_kv_buffer_ref(want, loc, *exact)
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    if is_interpreted() or not tokens:
        return
    args = [
        strided(random(tokens, c, dtype=HALF)),
        gain,
        1e-6,
        strided(random(tokens, r, dtype=HALF)),
    ]
    args += [*angles(tokens, r // 2), 0.5]
    got = written(lambda b, pdl: norm_rope_set_mla_kv_buffer(b, loc, *args, pdl=pdl), shape, cache)
    want = poisoned(got)
    norm_rope_set_mla_kv_buffer_ref(want, loc, *args)
    assert untouched(got, loc)
    read = [read_mla_kv_buffer(x, loc.long(), c, 0.5) for x in (got, want)]
    assert_close("rows", *read, "bf16" if cache.itemsize > 1 else "fp8_weight")
    assert (read[0] != read[1]).float().mean() < 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("heads", [4, 20] if is_interpreted() else [64, 5])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("fp8", [True, False])
def test_index_queries(tokens: int, heads: int, interleaved: bool, fp8: bool) -> None:
    """D = 64: the Hadamard factor is 1/8, exact; D = 128 as the models have it."""
    for dim, exact in ((64, True), (128, False))[: 1 if is_interpreted() else 2]:
        q = spikes(tokens, heads, dim) if exact else random(tokens, heads, dim, dtype=HALF)
        turns = (quarter_turns if exact else angles)(tokens, 16 if exact else 32)
        gate = strided(random(tokens, heads, seed=4))
        args = (strided(q), gate, *turns, interleaved, dim**-0.5, heads**-0.5, fp8)
        results = [index_q_prep(*args, pdl=mode) for mode in MODES[-1 if exact else 0 :]]
        want, want_gate = index_q_prep_ref(*args)
        for got, weights in results:
            assert got.dtype == (torch.float8_e4m3fn if fp8 else HALF)
            assert torch.equal(got.float(), results[0][0].float())
            assert torch.equal(weights, results[0][1])
        got, weights = results[0]
        if exact or not fp8:
            assert torch.equal(got.float(), want.float())
            assert_close("weights", weights, want_gate, "exact")
            continue
        assert_close("weights", weights, want_gate, "fp32")
        assert_close("q", got.float(), want.float(), "fp8_step")
        assert tokens == 0 or (got.float() != want.float()).float().mean() < 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("cache", [torch.uint8, HALF], ids=str)
@pytest.mark.parametrize("loc_dtype", [torch.int32, torch.int64])
def test_index_keys(tokens: int, interleaved: bool, cache: torch.dtype, loc_dtype) -> None:
    loc = slots(tokens, loc_dtype)
    for dim in (64,) if is_interpreted() else (64, 128):
        page = (fp8_page_bytes(dim),) if cache == torch.uint8 else (64, dim)
        signs = torch.where(spikes(tokens, dim) > 0, 1.0, -1.0)
        signs[:, dim // 2 :] = -signs[:, : dim // 2]  # mean 0, variance 1
        gain = spikes(dim, dtype=torch.float32, seed=3)
        exact = [strided(signs.to(HALF)), gain, torch.zeros_like(gain), 0.0]
        exact += [*quarter_turns(tokens, dim // 4), interleaved]
        compare_keys(exact, loc, dim, (10, *page), cache, dim == 64 or cache != torch.uint8)
        if is_interpreted():
            return
        keys = strided(random(tokens, dim, dtype=HALF) + 0.5)
        args = [keys, random(dim, seed=1), random(dim, seed=2), 1e-6]
        args += [*angles(tokens, dim // 4), interleaved]
        compare_keys(args, loc, dim, (10, *page), cache, False)


def compare_keys(args, loc: Tensor, dim: int, shape, cache: torch.dtype, exact: bool) -> None:
    got = written(lambda b, pdl: index_k_write(b, loc, *args, pdl=pdl), shape, cache)
    want = poisoned(got)
    index_k_write_ref(want, loc, *args)
    if exact:
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    pages = torch.arange(10, device=DEVICE)
    read = [read_index_k_buffer(x, pages, dim) for x in (got, want)]
    named = [x[loc.long()] for x in read]
    assert_close("keys", *named, "bf16" if cache != torch.uint8 else "fp8_step")
    assert not len(loc) or (named[0] != named[1]).float().mean() < 1e-2
    others = torch.ones(SLOTS, dtype=torch.bool, device=DEVICE)
    others[loc.long()] = False
    assert read[0][others].isnan().all()
