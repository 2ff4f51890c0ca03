"""The small Triton kernels against their references, among NaNs, bit by bit where sums are exact.

On a GPU in every PDL mode, which must agree in every bit; `test_triton.py` runs the same file in
Triton's interpreter, on numbers that need no rounding to bf16 or e4m3 (it has neither).
"""

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.argmax import argmax, argmax_ref
from minidsv.kernels.bandwidth import PIECE, sum_pieces, sum_pieces_ref
from minidsv.kernels.embedding import embedding, embedding_ref
from minidsv.kernels.norm import (
    add_rms_norm,
    add_rms_norm_ref,
    layer_norm,
    layer_norm_ref,
    rms_norm,
    rms_norm_ref,
)
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.quant import per_token_group_quant_fp8, per_token_group_quant_fp8_ref
from minidsv.kernels.rope import apply_rope, apply_rope_ref, rope_cos_sin, rope_cos_sin_ref
from minidsv.kernels.rope_quant import mla_rope_quantize_fp8, mla_rope_quantize_fp8_ref

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
HALF = torch.float16 if is_interpreted() else torch.bfloat16
TOKENS = (0, 1, 5) if is_interpreted() else (0, 1, 7, 64, 300)
NAN = float("nan")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def small(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Integers from -3 to 3: sums of their products are exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """x as a view whose rows lie among NaNs."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), NAN, dtype=x.dtype, device=x.device)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def in_all_modes(op, *args) -> tuple[Tensor, ...]:
    """op's results, which must not depend on the mode."""
    results = []
    for mode in MODES:
        got = op(*args, pdl=mode)
        results.append(got if isinstance(got, tuple) else (got,))
    for mode, got in zip(MODES, results, strict=True):
        for mine, first in zip(got, results[0], strict=True):
            assert torch.equal(bits(mine), bits(first)), mode
    return results[0]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.numel() else x.float()


def assert_same(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dim", [128, 200, 1536, 7168])
def test_norms(tokens: int, dim: int) -> None:
    weight, bias = random(dim, seed=1), random(dim, seed=2)
    for dtype in (HALF, torch.float32):
        x = strided(random(tokens, dim, dtype=dtype))
        residual = strided(random(tokens, dim, dtype=HALF, seed=3))
        tol = "bf16" if dtype == HALF else "fp32"
        (got,) = in_all_modes(rms_norm, x, weight, 1e-6)
        assert_close("rms", got, rms_norm_ref(x, weight, 1e-6), tol)
        (got,) = in_all_modes(layer_norm, x, weight, bias, 1e-6)
        assert_close("layer", got, layer_norm_ref(x, weight, bias, 1e-6), tol)
        got, total = in_all_modes(add_rms_norm, x, residual, weight, 1e-6)
        want, want_total = add_rms_norm_ref(x, residual, weight, 1e-6)
        assert_close("normed", got, want, "bf16")
        assert_same(total, want_total)


def test_norms_of_exact_sums() -> None:
    """Mean squares that every order of adding gives: the reference's bits."""
    x, weight = small(3, 512, dtype=HALF), random(512, seed=1)
    assert_same(in_all_modes(rms_norm, x, weight, 0.0)[0], rms_norm_ref(x, weight, 0.0))
    zeros = torch.zeros(2, 512, dtype=HALF, device=DEVICE)
    assert not in_all_modes(rms_norm, zeros, weight, 1e-6)[0].any()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("heads", "dim"), [(None, 64), (3, 64), (20, 64), (4, 12)])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(tokens: int, heads: int | None, dim: int, interleaved: bool) -> None:
    shape = (tokens, dim) if heads is None else (tokens, heads, dim)
    cos, sin = random(tokens, dim // 2, seed=1), random(tokens, dim // 2, seed=2)
    for dtype in (HALF, torch.float32) if is_interpreted() else (HALF,):
        x = strided(random(*shape, dtype=dtype))
        (got,) = in_all_modes(apply_rope, x, cos, sin, interleaved)
        assert_same(got, apply_rope_ref(x, cos, sin, interleaved))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cos_sin_of_large_angles(dtype: torch.dtype) -> None:
    """Within 2^-23 of the fp32 angles' cos and sin in fp64."""
    positions = torch.tensor([0, 1, 2, 355, 1000, 163839, 999_999], dtype=dtype, device=DEVICE)
    inv_freq = (1e4 ** -(torch.arange(32) / 32)).to(DEVICE)
    cos, sin = in_all_modes(rope_cos_sin, positions, inv_freq, 1.0)
    angles = (positions.float()[:, None] * inv_freq).double()
    assert (cos.double() - angles.cos()).abs().max() <= 2**-23
    assert (sin.double() - angles.sin()).abs().max() <= 2**-23
    scaled = in_all_modes(rope_cos_sin, positions, inv_freq[:5], 1.25)
    for got, want in zip(scaled, rope_cos_sin_ref(positions, inv_freq[:5], 1.25), strict=True):
        assert_close("scaled", got, want, "fp32")
    assert in_all_modes(rope_cos_sin, positions[:0], inv_freq, 1.0)[0].shape == (0, 32)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("dim", "group"), [(7168, 128), (384, 128), (96, 32)])
@pytest.mark.parametrize("ue8m0", [True, False])
def test_group_quant(tokens: int, dim: int, group: int, ue8m0: bool) -> None:
    x = small(tokens, dim, dtype=HALF)
    x[:, ::group] = 448.0  # the scale is 1
    if not is_interpreted():
        x = random(tokens, dim, dtype=HALF) * torch.logspace(-3, 3, dim, device=DEVICE).to(HALF)
        x[:1, : dim // 2] = 0
    x = strided(x)
    want = per_token_group_quant_fp8_ref(x, group, ue8m0)
    for got, expected in zip(
        in_all_modes(per_token_group_quant_fp8, x, group, ue8m0), want, strict=True
    ):
        assert_same(got, expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("heads", "c", "r"), [(16, 512, 64), (3, 128, 64), (5, 100, 12)])
@pytest.mark.parametrize(("q_scale", "k_scale"), [(1.0, 1.0), (0.25, 4.0)])
def test_rope_quantize(tokens, heads: int, c: int, r: int, q_scale, k_scale) -> None:
    shapes = ((tokens, heads, c), (tokens, heads, r), (tokens, c), (tokens, r))
    if is_interpreted():  # a quarter turn
        inputs = [small(*shape, dtype=HALF, seed=i) for i, shape in enumerate(shapes)]
        cos, sin = torch.zeros(tokens, r // 2), torch.ones(tokens, r // 2)
    else:
        inputs = [random(*shape, dtype=HALF, seed=i) * 30 for i, shape in enumerate(shapes)]
        inputs[0][:1, :, :2], inputs[3][:1, :2] = 1e4, -1e4  # saturate
        angle = random(tokens, r // 2)
        cos, sin = angle.cos(), angle.sin()
    args = [*map(strided, inputs), cos, sin, q_scale, k_scale]
    want = mla_rope_quantize_fp8_ref(*args)
    got = in_all_modes(mla_rope_quantize_fp8, *args, "triton")
    for mine, expected in zip(got, want, strict=True):
        assert_same(mine, expected)


@pytest.mark.skipif(is_interpreted(), reason="a CUDA library")
@pytest.mark.parametrize("tokens", [1, 64])
def test_rope_quantize_against_flashinfer(tokens: int) -> None:
    pytest.importorskip("flashinfer")
    shapes = ((tokens, 128, 512), (tokens, 128, 64), (tokens, 512), (tokens, 64))
    inputs = [random(*shape, dtype=HALF, seed=i) for i, shape in enumerate(shapes)]
    angle = random(tokens, 32)
    args = (*inputs, angle.cos(), angle.sin(), 0.5, 2.0)
    ours = in_all_modes(mla_rope_quantize_fp8, *args, "triton")
    theirs = in_all_modes(mla_rope_quantize_fp8, *args, "flashinfer")
    for mine, other in zip(ours, theirs, strict=True):
        differs = bits(mine) != bits(other)
        assert differs.float().mean() < 1e-3
        assert_close("flashinfer", mine.float(), other.float(), "fp8_weight")


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", [256, 7168, 33])
@pytest.mark.parametrize("tokens", TOKENS)
def test_embedding(tokens: int, dim: int, ids_dtype: torch.dtype) -> None:
    table = strided(random(50, dim, dtype=HALF))
    table[7] = NAN
    ids = torch.arange(tokens, device=DEVICE) * 11 % 50
    ids = torch.where(ids == 7, 8, ids)
    (got,) = in_all_modes(embedding, ids.to(ids_dtype), table)
    assert_same(got, embedding_ref(ids, table))


@pytest.mark.parametrize("vocab", [1, 1280, 4097] if is_interpreted() else [1, 1280, 4097, 129280])
@pytest.mark.parametrize("rows", [0, 1, 3, 20])
def test_argmax(rows: int, vocab: int) -> None:
    logits = strided(random(rows, vocab))
    logits[:1] = -float("inf")  # all equal: the lowest id
    logits[1:2] = -logits[1:2].abs()
    logits[1:2, vocab // 2] = 0.0
    logits[1:2, vocab // 3] = -0.0
    logits[2:3, vocab // 2 :: 5] = 99.0
    assert_same(in_all_modes(argmax, logits)[0], argmax_ref(logits))
    if rows > 1:
        logits[0, -1] = -NAN
        logits[1, vocab // 2 :] = NAN
        assert in_all_modes(argmax, logits)[0][:2].tolist() == [vocab - 1, vocab // 2]


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_sum_pieces(pieces: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (pieces * PIECE,), dtype=torch.int32, device=DEVICE)
    assert_same(in_all_modes(sum_pieces, words)[0], sum_pieces_ref(words))
