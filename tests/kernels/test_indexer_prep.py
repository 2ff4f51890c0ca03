"""The indexer's preparation on CPU: what it composes, and the scale folding under torch.compile."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from compare import assert_close
from minidsv.kernels import indexer_prep
from minidsv.kernels.index_cache import read_index_k_buffer
from minidsv.kernels.indexer_prep import (
    apply_q_scale_and_softmax_scale,
    folding,
    index_k_write,
    index_q_prep,
    warm_up_folding,
)
from minidsv.kernels.quant import hadamard


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scales_are_folded_by_one_dynamic_graph() -> None:
    """M = 1, 2, 7: at most one recompilation (size 1 may be compiled for itself)."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(apply_q_scale_and_softmax_scale, dynamic=True, backend=counter)
    for tokens in (1, 2, 7, 1, 7):
        weights, scale = randn(tokens, 64), randn(tokens, 64, 1, seed=1).exp()
        want = weights * scale.squeeze(-1) * 128**-0.5
        assert torch.equal(compiled(weights, scale, 128**-0.5), want)
    assert counter.frame_count <= 2


def test_the_folding_is_compiled_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all that any number of tokens needs is compiled by the warm-up."""
    folding.cache_clear()
    assert folding("cpu") is apply_q_scale_and_softmax_scale
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile_(f, backend=counter, **kw))
    monkeypatch.setattr(indexer_prep, "find_spec", lambda name: name)
    folded = folding("cuda")
    monkeypatch.setattr(indexer_prep, "folding", lambda _: folded)
    torch.compiler.reset()
    warm_up_folding(8, 0.5, torch.device("cpu"))
    warm = counter.frame_count
    assert 0 < warm <= 2
    angle = torch.zeros(7, 32)
    with torch.inference_mode():
        for tokens in (1, 2, 7):
            q, gate = randn(tokens, 8, 128), randn(tokens, 8)
            rope = angle[:tokens].cos(), angle[:tokens].sin()
            index_q_prep(q, gate, *rope, False, 0.5, 8**-0.5, True)
    assert counter.frame_count == warm
    folding.cache_clear()


@pytest.mark.parametrize("interleaved", [True, False])
def test_fp8_scores_are_the_plain_ones(interleaved: bool) -> None:
    """sum_j w_j relu(q_j . k) of the rotated, quantised parts, scales folded in, against fp32."""
    angle = randn(9, 32, seed=4)
    q, k, gate = randn(9, 8, 128), randn(9, 128, seed=1), randn(9, 8, seed=2)
    gain, bias = randn(128, seed=5).abs(), randn(128, seed=6)
    scores = []
    for fp8, buffer in (
        (False, torch.zeros(1, 64, 128)),
        (True, torch.zeros(1, 8448, dtype=torch.uint8)),
    ):
        turns = (angle.cos(), angle.sin(), interleaved)
        prepared, weights = index_q_prep(q, gate, *turns, 128**-0.5, 8**-0.5, fp8)
        index_k_write(buffer, torch.arange(9), k, gain, bias, 1e-6, *turns)
        keys = read_index_k_buffer(buffer, torch.tensor([0]), 128)[:9]
        scores.append(torch.einsum("thd,sd->ths", prepared.float(), keys).relu())
        scores[-1] = torch.einsum("th,ths->ts", weights, scores[-1])
    assert (scores[1] - scores[0]).norm() < 0.06 * scores[0].norm()


def test_queries_are_rotated_before_the_hadamard_product() -> None:
    q, gate = randn(3, 4, 128).bfloat16(), randn(3, 4)
    cos, sin = torch.zeros(3, 32), torch.ones(3, 32)  # (a, b) -> (-b, a)
    turned = torch.cat((-q[..., 32:64], q[..., :32], q[..., 64:]), -1)
    got, weights = index_q_prep(q, gate, cos, sin, False, 0.5, 0.25, True)
    scale = weights / gate / 0.125
    assert_close("q", got.float() * scale[..., None], hadamard(turned), "fp8_weight")
    plain, weights = index_q_prep(q, gate, cos, sin, False, 0.5, 0.25, False)
    assert torch.equal(plain, turned)
    assert torch.equal(weights, gate * 0.125)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": torch.zeros(2, 3)}, r"gate \(2, 3\), q \(2, 4, 128\)"),
        ({"gate": torch.zeros(2, 4).half()}, "gate torch.float16 is not fp32"),
        ({"cos": torch.zeros(3, 32)}, r"cos \(3, 32\) is not \[2, 64 / 2\]"),
        ({"sin": torch.zeros(2, 16)}, r"sin \(2, 16\) is not \[2, 64 / 2\]"),
    ],
)
def test_unfit_queries_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    args = {"q": torch.zeros(2, 4, 128), "gate": torch.zeros(2, 4)}
    args |= {"cos": torch.zeros(2, 32), "sin": torch.zeros(2, 32)} | change
    with pytest.raises(AssertionError, match=message):
        index_q_prep(**args, interleaved=True, softmax_scale=1.0, head_scale=1.0, fp8=True)
