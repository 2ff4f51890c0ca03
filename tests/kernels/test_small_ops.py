"""Norms, RoPE, router, linear and experts against their formulas written out."""

import math

import pytest
import torch

from compare import assert_close
from minidsv.config import RopeConfig
from minidsv.kernels.absorb import absorb_q, absorb_v
from minidsv.kernels.gemm import (
    Segment,
    fused_a_gemm,
    fused_linear,
    fused_linear_cost,
    linear,
    normed_linear,
)
from minidsv.kernels.moe import moe_experts, swiglu_mlp
from minidsv.kernels.norm import PreNorm, add_rms_norm, layer_norm, rms_norm
from minidsv.kernels.quant import dequantize_fp8_blocks, quantize_fp8_blocks
from minidsv.kernels.rope import apply_rope
from minidsv.kernels.router import grouped_topk
from minidsv.rope import Rope, inv_freq


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    x, residual = randn(7, 96).to(dtype), randn(7, 96, seed=1).to(dtype)
    weight, bias = randn(96, seed=2), randn(96, seed=3)
    tol = "fp32" if dtype == torch.float32 else "bf16"
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert_close("rms", rms_norm(x, weight, 1e-5), want.to(dtype), tol)
    centred = wide - wide.mean(-1, keepdim=True)
    want = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    assert_close("layer", layer_norm(x, weight, bias, 1e-6), want.to(dtype), tol)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert_close(
        "sum", total, (wide + residual.double()).to(dtype), "exact" if tol == "fp32" else tol
    )
    unrounded = x.float() + residual.float()
    assert torch.equal(normed, rms_norm(unrounded, weight, 1e-5).to(dtype))


def test_yarn_frequencies() -> None:
    """The check values of model-spec 3.1 (DeepSeek-V3.2)."""
    deepseek = RopeConfig(1e4, 40.0, 4096, 32, 1, 1.0, 1.0)
    freq = inv_freq(deepseek, 64)
    want = {0: 1, 10: 5.623413e-2, 11: 3.900693e-2, 16: 5.5e-3, 17: 3.561997e-3, 20: 7.905694e-4}
    want |= {22: 1.778279e-4, 23: 3.333804e-5, 31: 3.333804e-6}
    for pair, value in want.items():
        assert float(freq[pair]) == pytest.approx(value, rel=1e-6)
    assert deepseek.cos_sin_scale == 1.0
    assert 192**-0.5 * deepseek.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_layouts(interleaved: bool) -> None:
    table = Rope(RopeConfig(1e4), 8, torch.device("cpu"))
    positions = torch.tensor([0, 1, 99])
    x = randn(3, 2, 8)
    got = apply_rope(x, *table.at(positions), interleaved)
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
            angle = position * 1e4 ** (-i / 4)
            c, s = math.cos(angle), math.sin(angle)
            want_a = x[t, :, a] * c - x[t, :, b] * s
            want_b = x[t, :, a] * s + x[t, :, b] * c
            assert_close("pair", got[t][:, [a, b]], torch.stack((want_a, want_b), -1), "fp32")


def test_rope_layouts_choose_different_keys() -> None:
    cos, sin = Rope(RopeConfig(1e4), 64, torch.device("cpu")).at(torch.arange(64))
    x = randn(64, 64)
    assert not torch.allclose(
        apply_rope(x, cos, sin, True), apply_rope(x, cos, sin, False), atol=1.0
    )


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("norm", [True, False])
def test_router(n_group: int, topk_group: int, norm: bool) -> None:
    logits, bias = (
        randn(20, 64),
        randn(64, seed=1) * 0.3 - 2.0,
    )  # negative biased scores: -inf, not 0
    weights, ids = grouped_topk(
        logits,
        bias,
        top_k=6,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    size = 64 // n_group
    for t in range(20):
        scores = logits[t].sigmoid()
        biased = (scores + bias).tolist()
        groups = [sorted(biased[g * size : (g + 1) * size])[-2:] for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: -sum(groups[g]))[:topk_group]
        allowed = [e for e in range(64) if n_group == 1 or e // size in kept]
        want = sorted(allowed, key=lambda e: -biased[e])[:6]
        assert sorted(ids[t].tolist()) == sorted(want)
        chosen = scores[ids[t]]
        share = chosen / chosen.sum() if norm else chosen
        assert_close("weights", weights[t], share * 2.5, "fp32")


def test_router_ties_take_the_lowest_expert() -> None:
    options = {"top_k": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": True}
    _, ids = grouped_topk(torch.zeros(1, 8), torch.zeros(8), **options, routed_scaling_factor=1.0)
    assert ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_with_fp8_weights(dtype: torch.dtype) -> None:
    x, weight = randn(5, 200).to(dtype), randn(576, 200, seed=1)
    q, scale = quantize_fp8_blocks(weight, ue8m0=False)
    exact = x.double() @ dequantize_fp8_blocks(q, scale).double().T
    tol = "fp32_logits" if dtype == torch.float32 else "bf16"
    assert_close("against dequantised", linear(x, q, scale), exact.to(dtype), tol)
    full = (x.double() @ weight.double().T).float()
    assert (linear(x, q, scale).float() - full).norm() / full.norm() < 0.04
    fp32 = linear(x, weight, out_dtype=torch.float32)
    assert torch.equal(fp32, torch.nn.functional.linear(x.float(), weight.float()))


def test_fused_projections_are_those_of_linear() -> None:
    out, residual, gain = randn(5, 200).bfloat16(), randn(5, 200, seed=3).bfloat16(), randn(200)
    x, total = add_rms_norm(out, residual, gain, 1e-6)
    block = PreNorm(out, residual, gain, 1e-6)
    q, scale = quantize_fp8_blocks(randn(576, 200, seed=1))
    dense = randn(64, 200, seed=2).bfloat16()
    for wk, weights_proj in ((None, dense), (Segment(dense), None)):
        got = fused_a_gemm(block, Segment(q, scale), Segment(dense), wk, weights_proj)
        assert torch.equal(got[0], linear(x, q, scale))
        assert torch.equal(got[1], linear(x, dense))
        assert (got[2] is None) is (wk is None)
        if weights_proj is None:
            assert got[3] is None
        else:
            assert torch.equal(got[3], x.float() @ dense.float().T)
        assert torch.equal(got[4], total)
    (first,), same = normed_linear(PreNorm(None, residual, gain, 1e-6), [Segment(dense)])
    assert torch.equal(first, linear(rms_norm(residual, gain, 1e-6), dense))
    assert same is residual
    nbytes, flops = fused_linear_cost(5, [Segment(q, scale), Segment(dense, None, torch.float32)])
    assert nbytes == 576 * 200 + 5 * 2 * 4 + 64 * 200 * 2 + 5 * (200 * 2 + 576 * 2 + 64 * 4)
    assert flops == 2 * 5 * 200 * (576 + 64)


def test_bad_projections_are_named() -> None:
    x, w = randn(2, 128).bfloat16(), randn(256, 128)
    q, scale = quantize_fp8_blocks(w)
    for bad, message in (
        (lambda: linear(x, w), "weight torch.float32: one dtype, or fp32 out"),
        (lambda: linear(x, w[:, :64].bfloat16()), r"x \(2, 128\), weight \(256, 64\)"),
        (lambda: linear(x, q), "float8_e4m3fn without scales"),
        (lambda: linear(x, q, scale.T), r"scale \(1, 2\) is not \(2, 1\)"),
        (lambda: linear(x, q, scale.double()), "scale torch.float64 is not float32"),
        (lambda: linear(x, w.bfloat16(), scale), "weight torch.bfloat16 with scales"),
        (lambda: fused_linear(x, [Segment(q, scale)] * 5), "5 segments: 1 to 4"),
        (lambda: absorb_q(x[None], w[None]), r"is not \[T, 1, 256\]"),
        (lambda: absorb_v(x[:, None], w[None]), "bfloat16, weight torch.float32"),
    ):
        with pytest.raises(AssertionError, match=message):
            bad()


@pytest.mark.parametrize("fp8", [False, True])
def test_moe_experts(fp8: bool) -> None:
    experts, hidden, inner = 6, 64, 32
    gate_up, down = randn(experts, 2, inner, hidden) / 8, randn(experts, hidden, inner, seed=1) / 8
    scales: list[torch.Tensor | None] = [None, None]
    if fp8:
        gate_up, scales[0] = quantize_stack(gate_up)
        down, scales[1] = quantize_stack(down)
    x = randn(9, hidden, seed=2)
    ids = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(t))[:3] for t in range(9)]
    )
    ids[ids == 4] = 0  # one expert gets nothing; another may come twice
    weights = randn(9, 3, seed=3).abs()

    def expert(e: int) -> tuple[torch.Tensor | None, ...]:
        stacks = (gate_up, scales[0], down, scales[1])
        return tuple(None if stack is None else stack[e] for stack in stacks)

    stacks = (gate_up, scales[0], down, scales[1])
    got = moe_experts(x, weights, ids, *stacks, *expert(4))
    for t in range(9):
        want = swiglu_mlp(x[t : t + 1], *expert(4))
        for w, e in zip(weights[t], ids[t].tolist(), strict=True):
            want += w * swiglu_mlp(x[t : t + 1], *expert(e))
        assert_close("experts", got[t : t + 1], want, "fp32_logits")


def quantize_stack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [quantize_fp8_blocks(w) for w in weight.flatten(0, -3)]
    data = torch.stack([q.view(torch.uint8) for q, _ in parts]).view(torch.float8_e4m3fn)
    scale = torch.stack([s for _, s in parts])
    return data.view(weight.shape), scale.view(*weight.shape[:-2], *scale.shape[1:])
