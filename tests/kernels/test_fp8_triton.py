"""The Triton kernels with FP8 activations against the references, in every PDL mode, among NaNs.

In the interpreter (`test_triton.py`) x is fp32 and only the logic is held.
"""

from typing import Any

import numpy as np
import pytest
import torch
from test_gemm_triton import DEVICE, DTYPE, MODES, among_nans, ending_in_nan, randn, segment
from test_moe_triton import mlp, one, tokens_of
from torch import Tensor

from compare import relative_l2
from minidsv.kernels.gemm import fused_a_gemm, fused_linear, linear_ref
from minidsv.kernels.moe import moe_experts, moe_experts_ref, swiglu_mlp, swiglu_mlp_ref
from minidsv.kernels.norm import PreNorm
from minidsv.kernels.pdl import is_interpreted
from minidsv.kernels.quant import Activations

pytestmark = [] if is_interpreted() else [pytest.mark.gpu]
KINDS: tuple[Activations, ...] = ("fp8", "fp8_ue8m0")
LIMIT = 1e-5 if is_interpreted() else 1e-2  # of h's roundings, some fall to the other side
# tokens, experts, top_k, hidden, inner, inner of the shared expert (0: none)
CASES = [(5, 3, 2, 256, 128, 128), (70, 2, 1, 128, 128, 0)]
if not is_interpreted():
    CASES = [(0, 8, 2, 256, 128, 128), (1, 8, 2, 256, 128, 128), (300, 8, 2, 384, 256, 128),
             (700, 64, 6, 2048, 1408, 2816), (260, 256, 8, 1024, 256, 256),
             (2100, 8, 2, 640, 128, 0)]  # fmt: skip
MLPS = [(19, 384, 128)]
if not is_interpreted():
    MLPS = [(0, 256, 512), (8, 7168, 2304), (1000, 640, 1408), (2100, 2048, 512)]


@pytest.fixture(autouse=True)
def correct_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter casts one number in fifty wrongly to e4m3: rounding loses the carry."""
    if not is_interpreted():
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def cast(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "fp8e4nv"):
            return convert(values, source, target, rounding)
        return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", cast)


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("rows", [(70,), (200, 130, 40), (256, 64)])
def test_linear(rows: tuple[int, ...], activations: Activations) -> None:
    k = 256 if is_interpreted() else 1536
    segments = [segment(n, k, "fp8", seed) for seed, n in enumerate(rows)]
    for tokens in (0, 1, 70) if is_interpreted() else (0, 1, 64, 130, 300, 2100):
        x = among_nans(randn(tokens, k, seed=tokens).to(DTYPE))
        results = [fused_linear(x, segments, mode, activations) for mode in MODES]
        for i, s in enumerate(segments):
            want = linear_ref(x, s.weight, s.scale, None, activations)
            assert not want.numel() or relative_l2(results[0][i], want) < LIMIT
            assert all(torch.equal(results[0][i], other[i]) for other in results)


def test_other_weights_and_columns_stay_as_they_are() -> None:
    """BF16 weights beside FP8 ones, and FP8 weights whose columns are no whole groups."""
    k = 256
    q_a, kv_a, wk = (segment(n, k, "fp8", seed) for seed, n in enumerate((128, 70, 128)))
    gate = ending_in_nan(randn(16, k, seed=5).to(DTYPE))
    gain = ending_in_nan(randn(k, seed=9).abs() + 0.5)
    block = PreNorm(*(among_nans(randn(40, k, seed=i).to(DTYPE)) for i in (0, 1)), gain, 1e-6)
    want = fused_a_gemm(block, q_a, kv_a, wk, gate, None, "fp8")
    plain = fused_a_gemm(block, q_a, kv_a, wk, gate, None)
    for mode in MODES:
        got = fused_a_gemm(block, q_a, kv_a, wk, gate, mode, "fp8")
        for a, b in zip(got, want, strict=True):
            assert a is not None
            assert b is not None
            assert relative_l2(a, b) < LIMIT
    assert torch.equal(want[3], plain[3])
    assert relative_l2(want[0], plain[0]) > 5e-3
    odd = segment(70, 144, "fp8")
    x = among_nans(randn(30, 144).to(DTYPE))
    for mode in MODES:
        (got,) = fused_linear(x, [odd], mode, "fp8")
        assert torch.equal(got, fused_linear(x, [odd], mode)[0])


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize(("tokens", "experts", "top_k", "hidden", "inner", "shared"), CASES)
def test_moe_experts(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    shared: int,
    activations: Activations,
) -> None:
    x = tokens_of(tokens, hidden)
    stacks = mlp(True, experts, hidden, inner, seed=1)
    shared_mlp = one(mlp(True, 1, hidden, shared, seed=3)) if shared else (None,) * 4
    favour = randn(tokens, experts, seed=5) + 2 * randn(experts, seed=6)  # busy and idle experts
    ids = favour.topk(top_k).indices
    weights = torch.rand(tokens, top_k, device=DEVICE) + 0.1
    weighted = x, weights, ids, *stacks, *shared_mlp
    results = [moe_experts(*weighted, mode, activations) for mode in MODES]
    check(results, moe_experts_ref(*weighted, activations), moe_experts_ref(*weighted))


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize(("tokens", "hidden", "inner"), MLPS)
def test_swiglu_mlp(tokens: int, hidden: int, inner: int, activations: Activations) -> None:
    x, weights = tokens_of(tokens, hidden), one(mlp(True, 1, hidden, inner, seed=1))
    results = [swiglu_mlp(x, *weights, mode, activations) for mode in MODES]
    want = swiglu_mlp_ref(x, *weights, activations)
    check(results, want, swiglu_mlp_ref(x, *weights))


def check(results: list[Tensor], want: Tensor, unquantised: Tensor) -> None:
    """The same bits in every mode, near `want`; further from what FP8 activations are not."""
    for got in results:
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert torch.equal(got, results[0])
    if want.numel():
        assert relative_l2(results[0], want) < LIMIT
        assert relative_l2(results[0], unquantised) > 2e-2
