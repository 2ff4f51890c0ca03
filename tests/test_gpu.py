"""The PyTorch operators on a CUDA device agree with the CPU's."""

from pathlib import Path

import pytest
import torch

from builders import prompt
from compare import relative_l2
from minidsv import LLM, SamplingParams
from minidsv.questions import eval_questions
from minidsv.request import Request
from minidsv.sampler import Sampler

pytestmark = pytest.mark.gpu
FAMILIES = ("dsv32", "glm")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [40, 200])
def test_float32_logits(family: str, length: int, checkpoints: dict[str, Path]) -> None:
    ids = prompt(length)
    caches = {"kv_cache_dtype": "float32", "index_cache_dtype": "float32", "num_pages": 8}
    folder = str(checkpoints[family])
    want = LLM(folder, device="cpu", **caches).prompt_logits(ids)
    got = LLM(folder, device="cuda", dtype="float32", **caches).prompt_logits(ids).cpu()
    assert relative_l2(got, want) < 5e-6


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8", "fp8_flat"])
@pytest.mark.parametrize("index", ["float32", "bfloat16", "fp8"])
def test_every_cache_dtype_retrieves(kv: str, index: str) -> None:
    """The bundled model, FP8 weights and bf16 compute, finds its answers past index_topk."""
    caches = {"kv_cache_dtype": kv, "index_cache_dtype": index}
    llm = LLM(device="cuda", backend="torch", num_pages=100, **caches)
    tokenizer = llm.engine.tokenizer
    questions = eval_questions(
        "retrieval_open", 12, 3, 384, lambda text: len(tokenizer.encode(text)) - 1
    )
    outputs = llm.generate([q.prompt for q in questions], SamplingParams(max_tokens=8))
    answers = [tokenizer.decode(o.outputs[0].token_ids) for o in outputs]
    right = sum(a == q.answer for a, q in zip(answers, questions, strict=True))
    assert right >= 11, f"{right} of 12"


def test_auto_is_bfloat16_with_fp8_index_keys(checkpoints: dict[str, Path]) -> None:
    llm = LLM(str(checkpoints["glm"]), device="auto", max_model_len=512, num_pages=20)
    config = llm.engine.config
    assert (config.device, config.dtype) == ("cuda:0", "bfloat16")
    assert (config.kv_cache_dtype, config.index_cache_dtype) == ("bfloat16", "fp8")
    outputs = llm.generate([prompt(n) for n in (3, 70, 130)], SamplingParams(max_tokens=8))
    assert all(output.outputs[0].finish_reason for output in outputs)


def test_draws_are_the_same_on_both_devices(checkpoints: dict[str, Path]) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True)
    options = {"dtype": "float32", "kv_cache_dtype": "float32", "index_cache_dtype": "float32"}
    cpu, cuda = (
        LLM(str(checkpoints["dsv32"]), device=device, num_pages=4, **options).generate(
            [prompt(30)], params
        )
        for device in ("cpu", "cuda")
    )
    assert cpu[0].outputs[0].token_ids == cuda[0].outputs[0].token_ids


def test_the_sampler_does_not_wait_for_the_device() -> None:
    """Bans, biases, penalties, filters and draws of one batch: the CPU's choice, without a sync."""
    params = [
        SamplingParams(temperature=0.8, seed=1, min_p=0.1, presence_penalty=1.0, min_tokens=5),
        SamplingParams(temperature=1.2, seed=2, top_k=5, logit_bias={3: 4.0}),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(temperature=1.0, seed=3, top_p=0.7, frequency_penalty=-1.0),
        SamplingParams(),
    ]
    requests = [Request("r", [4, 9, 20], p, p.seed or 0, 16) for p in params]
    devices = [torch.device(name) for name in ("cpu", "cuda")]
    samplers = [Sampler(50, [1], device) for device in devices]
    for step in range(4):
        logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(step))
        on_device = logits.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = samplers[1](on_device, requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got.tolist() == samplers[0](logits, requests).tolist()
        for request, token in zip(requests, got.tolist(), strict=True):
            request.output_token_ids.append(token)
