"""The Triton GEMV, GEMMs and per-head products against the reference, in every PDL mode.

Inputs lie among NaNs: x is a column slice, weights end where NaNs begin. In the interpreter
(`test_triton.py`) x is fp32 and only the logic is held.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.absorb import absorb_q, absorb_q_ref, absorb_v, absorb_v_ref
from minidsv.kernels.gemm import (
    Segment,
    fused_a_gemm,
    fused_linear,
    linear,
    linear_ref,
    normed_linear,
)
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.parts_triton import sum_parts
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.quant import dequantize_fp8_blocks, quantize_fp8_blocks

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
DTYPE = torch.float32 if is_interpreted() else torch.bfloat16
TOKENS = (0, 1, 3, 20) if is_interpreted() else (0, 1, 7, 16, 20, 33, 130)
SHAPES = ((40, 144), (6, 2600)) if is_interpreted() else ((576, 1536), (70, 2600))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def among_nans(x: Tensor) -> Tensor:
    """A view with x's values and contiguous rows, NaN around."""
    whole = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 32), float("nan"))
    view = whole.to(x).narrow(0, 1, x.shape[0]).narrow(-1, 16, x.shape[-1])
    view.copy_(x)
    return view


def ending_in_nan(weight: Tensor) -> Tensor:
    """Contiguous, with NaNs in the memory before and after it."""
    bits = torch.full((weight.numel() + 512,), 0x7F, dtype=torch.uint8, device=weight.device)
    if weight.dtype != torch.float8_e4m3fn:
        bits = torch.full((weight.numel() + 512,), float("nan"), device=weight.device).to(weight)
        bits[256:-256] = weight.flatten()
        return bits[256:-256].view_as(weight)
    bits[256:-256] = weight.view(torch.uint8).flatten()
    return bits[256:-256].view(weight.dtype).view_as(weight)


def segment(rows: int, k: int, kind: str, seed: int = 1) -> Segment:
    weight = randn(rows, k, seed=seed) / 8
    if kind == "fp8":
        q, scale = quantize_fp8_blocks(weight.cpu(), ue8m0=False)
        return Segment(ending_in_nan(q.to(DEVICE)), scale.to(DEVICE))
    out = torch.float32 if kind == "fp32" else None
    return Segment(ending_in_nan(weight.to(DTYPE)), out_dtype=out)


def check(name: str, run, want: list[Tensor]) -> None:
    """`run(mode)` is near `want`, and the same bits in every mode."""
    results = [[t.clone() for t in run(mode)] for mode in MODES]
    for got, reference in zip(results[0], want, strict=True):
        tol = "bf16" if got.dtype == torch.bfloat16 else "fp32_logits"
        assert_close(name, got, reference, tol)
    for mode, result in zip(MODES, results, strict=True):
        for one, other in zip(results[0], result, strict=True):
            assert torch.equal(one, other), f"{name}: {mode} differs from {MODES[0]}"


def wanted(x: Tensor, s: Segment, dtype: torch.dtype | None = None) -> Tensor:
    """Rounded once from fp64, to x's dtype unless `dtype` or the segment says otherwise."""
    exact = linear_ref(x.double().float(), s.weight, s.scale, torch.float32)
    if s.scale is None:
        exact = x.double() @ s.weight.double().T
    return exact.to(s.out_dtype or dtype or x.dtype)


def check_linear(s: Segment, k: int, tokens: tuple[int, ...]) -> None:
    for m in tokens:
        x = among_nans(randn(m, k, seed=m).to(DTYPE))
        want = wanted(x, s)
        check(
            f"{m} tokens",
            lambda mode, x=x: [linear(x, s.weight, s.scale, s.out_dtype, pdl=mode)], [want],
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["fp8", "bf16", "fp32"])
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_linear(rows: int, k: int, kind: str) -> None:
    check_linear(segment(rows, k, kind), k, TOKENS)


@pytest.mark.skipif(is_interpreted(), reason="4200 rows")
@pytest.mark.parametrize("k", [1536, 2600])
def test_linear_of_many_rows(k: int) -> None:
    check_linear(segment(4200, k, "fp8"), k, (16, 33))


@pytest.mark.parametrize(
    "kinds",
    ["fp8 fp8 fp8 fp32", "fp8 fp8", "bf16 bf16 bf16 fp32", "fp8 fp8 bf16 fp32", "fp32 fp8",
     "bf16 fp8 bf16 fp32"],
)  # fmt: skip
def test_fused_linear(kinds: str) -> None:
    k = SHAPES[0][1]
    rows = (24, 10, 8, 4) if is_interpreted() else (1536, 576, 128, 64)
    segments = [
        segment(n, k, kind, seed)
        for seed, (n, kind) in enumerate(zip(rows, kinds.split(), strict=False))
    ]
    for tokens in TOKENS:
        x = among_nans(randn(tokens, k, seed=tokens).to(DTYPE))
        check(
            kinds,
            lambda mode, x=x: fused_linear(x, segments, mode),
            [wanted(x, s) for s in segments],
        )


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("kinds", ["fp8 fp8 fp8 fp32", "bf16 bf16 bf16 fp32", "fp8 bf16", "fp8"])
def test_normed_linear(kinds: str, added: bool) -> None:
    """Programs share the storing of the sum, also where they are fewer than its parts."""
    for k in (SHAPES[0][1], 2600):
        rows = (24, 10, 8, 4) if is_interpreted() or k > 2000 else (1536, 576, 128, 64)
        segments = [
            segment(n, k, kind, seed)
            for seed, (n, kind) in enumerate(zip(rows, kinds.split(), strict=False))
        ]
        gain = ending_in_nan(randn(k, seed=9).abs() + 0.5)
        for tokens in TOKENS if k < 2000 else (1, 3):
            out, residual = (
                among_nans(randn(tokens, k, seed=tokens + i).to(DTYPE)) for i in (0, 1)
            )
            x = PreNorm(out if added else None, residual, gain, 1e-6)
            total = residual.double() + (out.double() if added else 0)
            normed = total * (total.square().mean(1, keepdim=True) + 1e-6).rsqrt() * gain

            want = [wanted(normed, s, DTYPE) for s in segments]
            sizes = [root_mean_square(w) for w in want]

            def run(mode, x=x, segments=segments, sizes=sizes):
                outputs, residual = normed_linear(x, segments, mode)
                scaled = [(o / n).to(DTYPE) for o, n in zip(outputs, sizes, strict=True)]
                return [*scaled, residual]

            scaled = [(w / n).to(DTYPE) for w, n in zip(want, sizes, strict=True)]
            check(f"{tokens} tokens of {k}", run, [*scaled, total.to(DTYPE)])


def root_mean_square(x: Tensor) -> Tensor:
    """fp32 [T, 1]; a norm rounded to bf16, or not, shows in products as a share of it."""
    return x.float().square().mean(1, keepdim=True).sqrt()


def test_parts_are_added_in_their_order() -> None:
    parts = torch.tensor([1e8, 1.0, -1e8], device=DEVICE).view(3, 1, 1).repeat(1, 5, 144)
    outputs = [torch.ones(5, 144, dtype=dtype, device=DEVICE) for dtype in (DTYPE, torch.float32)]
    sum_parts([parts, parts.flip(0)], outputs, "off")
    assert all(output.eq(0).all() for output in outputs)
    sum_parts([parts[[0, 2, 1]]], outputs[1:], "off")
    assert outputs[1].eq(1).all()


def test_fused_a_gemm_without_an_indexer() -> None:
    k = SHAPES[0][1]
    q_a, kv_a, wk = (segment(n, k, "fp8", n) for n in (24, 10, 8))
    gate = segment(4, k, "bf16").weight
    x = PreNorm(randn(3, k).to(DTYPE), randn(3, k, seed=1).to(DTYPE), randn(k, seed=2), 1e-6)
    outs = fused_a_gemm(x, q_a, kv_a, wk, gate, pdl="on")
    assert outs[3].dtype == torch.float32
    for got, want in zip(outs, fused_a_gemm(x, q_a, kv_a, wk, gate), strict=True):
        size = root_mean_square(want)
        assert_close("fused_a", got / size, want / size, "bf16")
    short = fused_a_gemm(x, q_a, kv_a, None, None, pdl="on")
    assert short[2:4] == (None, None)
    assert all(map(torch.equal, (*short[:2], short[4]), (*outs[:2], outs[4])))


def test_every_fp8_code_is_exact() -> None:
    """One-hot tokens read the weights back, subnormals too; 0x7F and 0xFF are NaN."""
    codes = (torch.arange(256)[:, None] + torch.arange(128) * 2) % 256
    weight = codes.where(codes % 128 != 127, 0).to(torch.uint8).view(torch.float8_e4m3fn)
    x = torch.eye(128, dtype=DTYPE, device=DEVICE)
    for tokens in (1, 8, 64) if is_interpreted() else (1, 8, 16, 32, 64, 128):
        for first in {0, 64 - tokens // 2, 128 - tokens}:
            one_hot = x[first : first + tokens]
            y = linear(one_hot, weight.to(DEVICE), torch.ones(2, 1, device=DEVICE), pdl="on")
            assert torch.equal(y.cpu(), weight.float().T[first : first + tokens].to(DTYPE)), tokens


def test_scales_far_apart() -> None:
    """Sums are counted in units that change with every block; a scale may be 0."""
    scales = torch.tensor([[1.0, 0.0, 1e-12, 3e4, 1e-30, 2.0], [0.0, 0.0, 1e-5, 0.0, 0.0, 1e-9]])
    for blocks in (scales, scales.flip(1), torch.zeros(2, 6)):
        for tokens in (1, 8, 64) if is_interpreted() else (1, 8, 16, 32, 64, 128):
            s = replace(segment(160, 720, "fp8"), scale=blocks.to(DEVICE))
            x = randn(tokens, 720).to(DTYPE)
            size = dequantize_fp8_blocks(s.weight, s.scale).norm(dim=1).clamp_min(1e-9)
            s = replace(s, out_dtype=torch.float32)
            want = wanted(x, s) / size
            check(
                f"{tokens} tokens",
                lambda mode, x=x, s=s, size=size: [fused_linear(x, (s,), mode)[0] / size], [want],
            )  # fmt: skip


@pytest.mark.skipif(is_interpreted(), reason="1.9 GB")
def test_a_weight_beyond_two_to_the_30_elements() -> None:
    weight = torch.zeros(300_000, 7168, dtype=torch.bfloat16, device="cuda")  # 2^31 elements
    weight[-1] = 1
    for tokens in (1, 8, 80):
        x = randn(tokens, 7168).bfloat16()
        y = linear(x, weight, out_dtype=torch.float32, pdl="prefetch")
        assert_close("last row", y[:, -1], x.double().sum(1).float(), "fp32_logits")
        assert y[:, :-1].count_nonzero() == 0


@pytest.mark.parametrize(
    ("heads", "n", "v", "c"),
    [(3, 16, 24, 40)]
    if is_interpreted()
    else [(128, 128, 128, 512), (64, 192, 256, 512), (8, 64, 64, 128)],
)
def test_absorbed_products(heads: int, n: int, v: int, c: int) -> None:
    kv_b = ending_in_nan((randn(heads, n + v, c) / 8).to(DTYPE))
    w_uk, w_uv = kv_b.split((n, v), 1)
    for tokens in TOKENS:
        q = randn(tokens, heads, n + 64, seed=1).to(DTYPE)
        q[..., n:] = float("nan")
        latent = among_nans(randn(tokens, heads, c, seed=2).to(DTYPE))
        for run, x, w, reference in (
            (absorb_q, q[..., :n], w_uk, absorb_q_ref),
            (absorb_v, latent, w_uv, absorb_v_ref),
        ):
            want = reference(x.double(), w.double()).to(DTYPE)
            check(run.__name__, lambda mode, run=run, x=x, w=w: [run(x, w, mode)], [want])
