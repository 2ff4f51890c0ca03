"""FP8 activations: the formula, how far it is from unquantised, and the engine's option."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from compare import relative_l2
from minidsv import LLM, SamplingParams
from minidsv.engine_config import EngineConfig
from minidsv.kernels.gemm import linear
from minidsv.kernels.moe import moe_experts, swiglu_mlp
from minidsv.kernels.quant import Activations, per_token_group_quant_fp8_ref, quantize_fp8_blocks
from minidsv.layers import FP8_ACTIVATION_TOKENS
from minidsv.questions import eval_questions

KINDS: tuple[Activations, ...] = ("fp8", "fp8_ue8m0")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stack(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """FP8 weights of unit gain [..., out, in]."""
    matrices = (randn(*shape, seed=seed) * shape[-1] ** -0.5).flatten(0, -3)
    weights, scales = zip(*map(quantize_fp8_blocks, matrices), strict=True)
    scale = torch.stack(scales)
    return torch.stack(weights).view(shape), scale.view(*shape[:-2], *scale.shape[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_projection_sums_scaled_blocks(kind: Activations) -> None:
    x = randn(9, 384) * torch.logspace(-2, 2, 384)
    weight, scale = quantize_fp8_blocks(randn(200, 384, seed=1))
    codes, factors = per_token_group_quant_fp8_ref(x, ue8m0=kind == "fp8_ue8m0")
    want = torch.zeros(9, 200, dtype=torch.float64)
    for block in range(3):
        k = slice(128 * block, 128 * block + 128)
        sums = codes[:, k].double() @ weight[:, k].double().T
        want += sums * factors[:, block, None] * scale[:, block].repeat_interleave(128)[:200]
    got = linear(x, weight, scale, activations=kind)
    assert relative_l2(got, want) < 1e-6
    assert 5e-3 < relative_l2(got, linear(x, weight, scale)) < 0.04


def test_what_is_not_quantised() -> None:
    x, weight = randn(3, 200), randn(70, 200, seed=1)
    odd = quantize_fp8_blocks(weight)
    assert torch.equal(linear(x, *odd, activations="fp8"), linear(x, *odd))
    assert torch.equal(linear(x[:, :128], weight[:, :128], activations="fp8"),
                       linear(x[:, :128], weight[:, :128]))  # fmt: skip
    mlp = (*stack(1, 2, 64, 128, seed=1), *stack(1, 128, 64, seed=2))
    one = tuple(tensor[0] for tensor in mlp)  # 64 columns of h are no whole group
    assert torch.equal(
        swiglu_mlp(x[:, :128], *one, activations="fp8"), swiglu_mlp(x[:, :128], *one)
    )
    routed = (*stack(2, 2, 128, 128, seed=3), *stack(2, 128, 128, seed=4))
    args = x[:, :128], torch.ones(3, 1), torch.tensor([[0], [1], [1]]), *routed
    assert torch.equal(moe_experts(*args, *one, activations="fp8"), moe_experts(*args, *one))


@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind: Activations) -> None:
    """x and h of the routed and of the shared experts: each adds some 3 % to the error."""
    x = randn(40, 256)
    routed = (*stack(4, 2, 128, 256, seed=1), *stack(4, 256, 128, seed=2))
    shared = tuple(w[0] for w in (*stack(1, 2, 128, 256, seed=3), *stack(1, 256, 128, seed=4)))
    ids = randn(40, 4, seed=5).topk(2).indices
    args = x, torch.full((40, 2), 0.5), ids, *routed
    for last in (shared, (None,) * 4):
        got, want = (moe_experts(*args, *last, activations=a) for a in (kind, "none"))
        assert 0.02 < relative_l2(got, want) < 0.08
    got, want = (swiglu_mlp(x, *shared, activations=a) for a in (kind, "none"))
    assert 0.02 < relative_l2(got, want) < 0.08


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def llms(request: pytest.FixtureRequest, visible_gpu: None) -> tuple[LLM, LLM]:
    """The bundled model with FP8 activations, and without."""
    options = {"num_pages": 400, "enable_prefix_caching": False, "device": request.param}
    options["cuda_graph"] = "off"
    return LLM(activations="fp8", **options), LLM(**options)


def test_the_help_says_from_which_step_on() -> None:
    (option,) = (option for option in fields(EngineConfig) if option.name == "activations")
    assert f"steps of {FP8_ACTIVATION_TOKENS} tokens" in option.metadata["help"]


def test_long_steps_alone_are_quantised(llms: tuple[LLM, LLM]) -> None:
    fp8, plain = llms
    assert "FP8 activations" in fp8.engine.runner.describe()
    assert "FP8 activations" not in plain.engine.runner.describe()
    ids = [7 + i % 200 for i in range(FP8_ACTIVATION_TOKENS)]
    assert torch.equal(fp8.prompt_logits(ids[:-1]), plain.prompt_logits(ids[:-1]))
    assert 1e-3 < relative_l2(fp8.prompt_logits(ids), plain.prompt_logits(ids)) < 0.5


@pytest.mark.parametrize(("kind", "length"), [("fact_open", 0), ("retrieval_open", 384)])
def test_answers_stay_right(kind: str, length: int, llms: tuple[LLM, LLM]) -> None:
    """Of prompts that fill steps of more than 256 tokens, alone or together."""
    fp8 = llms[0]
    encode, decode = fp8.engine.tokenizer.encode, fp8.engine.tokenizer.decode
    questions = eval_questions(kind, 40, 20, length, lambda text: len(encode(text)) - 1)
    assert sum(len(encode(q.prompt)) for q in questions) > 2 * FP8_ACTIVATION_TOKENS
    outputs = fp8.generate([q.prompt for q in questions], SamplingParams(max_tokens=16))
    answers = [decode(output.outputs[0].token_ids) for output in outputs]
    right = sum(a == q.answer for a, q in zip(answers, questions, strict=True))
    assert right >= 0.9 * len(questions)
