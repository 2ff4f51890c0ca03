"""The router's Triton kernels against the references.

On a GPU in every PDL mode, bitwise equal; `test_triton.py` runs the file in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from compare import assert_close
from minidsv.kernels.norm import PreNorm, add_rms_norm_ref, rms_norm_ref
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.router import (
    grouped_topk,
    grouped_topk_ref,
    norm_router_gemm,
    router_gemm,
    router_gemm_ref,
)

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
DEVICE = "cpu" if is_interpreted() else "cuda"
MODES = ("prefetch",) if is_interpreted() else ("off", "seed", "on", "prefetch")
DTYPE = torch.float32 if is_interpreted() else torch.bfloat16
GEMMS = [(0, 64, 8), (1, 96, 8), (5, 64, 7), (18, 72, 40)]
if not is_interpreted():
    GEMMS = [(0, 7168, 256), (1, 7168, 256), (8, 7168, 256), (16, 7168, 256), (17, 7168, 256),
             (300, 7168, 256), (1, 2048, 64), (3, 6144, 256), (13, 256, 8), (1000, 2048, 64),
             (2, 264, 100), (70, 264, 100), (8192, 7168, 256)]  # fmt: skip
NORMS = [(0, 64, 8), (1, 96, 8), (5, 400, 7), (18, 72, 40), (65, 64, 8)]
if not is_interpreted():
    NORMS += [(t, h, e) for t in (1, 3, 8, 16, 17, 64) for h, e in ((7168, 256), (2048, 64))]
    NORMS += [(4, 6144, 256), (33, 6144, 256), (64, 256, 8), (20, 1000, 30)]
SELECTIONS = [
    (256, 8, 8, 4),
    (256, 8, 1, 1),
    (64, 6, 1, 1),
    (8, 2, 4, 2),
    (24, 3, 3, 2),
    (12, 3, 2, 1),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("tokens", "hidden", "experts"), GEMMS)
def test_router_gemm(tokens: int, hidden: int, experts: int) -> None:
    """Rows past the tokens are NaN, which no result may show."""
    whole = torch.full((tokens + 3, hidden), float("nan"), dtype=DTYPE)
    whole[:tokens] = randn(tokens, hidden).to(DTYPE)
    weight = (randn(experts, hidden, seed=1) * hidden**-0.5).to(DTYPE).to(DEVICE)
    x = whole.to(DEVICE)[:tokens]
    for dtype in (torch.float32, torch.bfloat16)[: 1 if is_interpreted() else 2]:
        results = [router_gemm(x, weight, dtype, pdl=mode) for mode in MODES]
        want = router_gemm_ref(x, weight, dtype)
        tol = "fp32_logits" if dtype == torch.float32 else "bf16"
        for got in results:
            assert_close("logits", got, want, tol)
            assert torch.equal(got, results[0])


@pytest.mark.parametrize(("tokens", "hidden", "experts"), NORMS)
@pytest.mark.parametrize("first", [True, False])
def test_norm_router_gemm(tokens: int, hidden: int, experts: int, first: bool) -> None:
    """Logits are of the norm in fp32; without a block before there is nothing to add."""
    whole = torch.full((2, tokens + 3, hidden), float("nan"), dtype=DTYPE)
    whole[:, :tokens] = randn(2, tokens, hidden).to(DTYPE)
    out, residual = whole.to(DEVICE)[:, :tokens]
    gain = (1 + randn(hidden, seed=2) / 4).to(DEVICE)
    weight = (randn(experts, hidden, seed=1) * hidden**-0.5).to(DTYPE).to(DEVICE)
    x = PreNorm(None if first else out, residual, gain, 1e-6)
    results = [norm_router_gemm(x, weight, mode) for mode in MODES]
    total = residual if first else out.float() + residual.float()
    want = router_gemm_ref(rms_norm_ref(total.float(), gain, 1e-6), weight)
    normed = rms_norm_ref(residual, gain, 1e-6)
    if not first:
        normed, total = add_rms_norm_ref(out, residual, gain, 1e-6)
    for got in results:
        assert_close("logits", got[0], want, "fp32_logits" if is_interpreted() else "bf16")
        assert_close("normed", got[1], normed, "fp32" if is_interpreted() else "bf16")
        assert_close("residual", got[2], total, "exact")
        assert all(map(torch.equal, got, results[0]))


def select(logits: Tensor, bias: Tensor, sizes: tuple[int, ...], norm: bool) -> list[Tensor]:
    """Ids of the kernel in each mode, after a comparison with the reference."""
    _, top_k, n_group, topk_group = sizes
    options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
    options |= {"norm_topk_prob": norm, "routed_scaling_factor": 2.5}
    on_device = logits.to(DEVICE), bias.to(DEVICE)
    results = [grouped_topk(*on_device, **options, pdl=mode) for mode in MODES]
    weights, ids = grouped_topk_ref(*on_device, **options)
    for got in results:
        assert torch.equal(got[1], ids)
        assert_close("weights", got[0], weights, "fp32")
        assert torch.equal(got[0].nan_to_num(-1.0), results[0][0].nan_to_num(-1.0))
    return [ids.cpu() for _, ids in results]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", SELECTIONS)
def test_grouped_topk(sizes: tuple[int, ...], norm: bool) -> None:
    tokens = 2 if is_interpreted() else 777
    select(randn(tokens, sizes[0]), randn(sizes[0], seed=1) * 0.1 - 2.0, sizes, norm)
    select(randn(0, sizes[0]), randn(sizes[0]), sizes, norm)


@pytest.mark.parametrize("sizes", SELECTIONS)
def test_ties_and_nan(sizes: tuple[int, ...]) -> None:
    """Few distinct scores; NaN is the largest, so its experts come first, all in range."""
    tokens = 2 if is_interpreted() else 64
    coarse = (randn(tokens, sizes[0]) * 1.5).round()
    select(coarse, torch.zeros(sizes[0]), sizes, True)
    select(torch.zeros(1, sizes[0]), torch.zeros(sizes[0]), sizes, True)
    coarse[0, 3] = coarse[1, :] = float("nan")
    for ids in select(coarse, torch.zeros(sizes[0]), sizes, True):
        assert ids.min() >= 0
        assert ids.max() < sizes[0]
        assert ids[0, 0] == 3
        assert all(len(set(row)) == sizes[1] for row in ids.tolist())
