"""The engine on its Triton kernels: against the references, and bit by bit with PDL on and off."""

from pathlib import Path

import pytest
import torch
from delay import PROGRAMS, delay
from torch import Tensor

from builders import prompt
from compare import relative_l2
from minidsv import LLM, SamplingParams
from minidsv.batch import StepBatch
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.kernels.launch import KernelSpec
from minidsv.model import DeepseekV32
from minidsv.questions import eval_questions

pytestmark = pytest.mark.gpu
CACHES = [("bfloat16", "bfloat16"), ("bfloat16", "fp8"), ("fp8", "fp8"), ("fp8_flat", "fp8")]
REPLAYS = 1000
PAGES = 3
TRITON = {"backend": "triton", "cuda_graph": "off"}
ON_CUDA = TRITON | {"device": "cuda"}


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs SM 9.0")


@pytest.mark.parametrize("family", ["dsv32", "glm"])
@pytest.mark.parametrize("length", [1, 40, 200])
@pytest.mark.parametrize(("kv", "index"), CACHES)
def test_logits(
    family: str, length: int, kv: str, index: str, checkpoints: dict[str, Path]
) -> None:
    """As near to fp32 compute as the references in bf16 are, and PDL changes no bit."""
    ids = prompt(length)
    options = {"device": "cuda", "kv_cache_dtype": kv, "index_cache_dtype": index, "num_pages": 8}
    folder = str(checkpoints[family])
    on, off, torch_backend, fp32 = (
        LLM(folder, **options, **more).prompt_logits(ids).cpu()
        for more in (
            TRITON | {"pdl": "on"},
            TRITON | {"pdl": "off"},
            {"backend": "torch"},
            {"dtype": "float32"},
        )
    )
    assert torch.isfinite(on).all()
    assert torch.equal(on, off)
    # A routing or selection that flips at a tie costs percents, in either.
    assert relative_l2(on, fp32) < 2 * relative_l2(torch_backend, fp32) + 0.03


@pytest.mark.parametrize(("kv", "index"), CACHES)
def test_retrieval_with_pdl_and_without(kv: str, index: str) -> None:
    """The bundled model past index_topk, batches that grow and shrink: the same tokens, right."""
    options = {"kv_cache_dtype": kv, "index_cache_dtype": index}
    on, off = (
        retrieved(LLM(pdl=pdl, num_pages=300, **ON_CUDA, **options)) for pdl in ("on", "off")
    )
    assert on == off


def retrieved(llm: LLM) -> list[list[int]]:
    """Tokens of the answers to 40 questions, nearly all right."""
    tokenizer = llm.engine.tokenizer
    questions = eval_questions("retrieval_open", 40, 3, 384, lambda t: len(tokenizer.encode(t)) - 1)
    outputs = llm.generate([q.prompt for q in questions], SamplingParams(max_tokens=8))
    answers = [o.outputs[0].token_ids for o in outputs]
    right = sum(tokenizer.decode(a) == q.answer for a, q in zip(answers, questions, strict=True))
    assert right >= 37, f"{right} of 40"
    return answers


def test_flashinfer_in_the_engine() -> None:
    """Its mla_rope_quantize_fp8 under backend="flashinfer", over the flat cache, eager and in a
    graph: the tokens of ours."""
    pytest.importorskip("flashinfer")
    options = {"device": "cuda", "kv_cache_dtype": "fp8_flat", "num_pages": 300}
    ours = retrieved(LLM(backend="triton", cuda_graph="off", **options))
    for graph in ("off", "on"):
        assert retrieved(LLM(backend="flashinfer", cuda_graph=graph, **options)) == ours


def decode_step(tokens: list[int], at: int) -> StepBatch:
    """One token each of len(tokens) requests, at position `at` of PAGES consecutive pages."""
    rows = torch.arange(len(tokens), device="cuda")
    table = torch.arange(len(tokens) * PAGES, device="cuda").view(len(tokens), PAGES)
    positions = torch.full_like(rows, at)
    slots = table[:, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
    ids = torch.tensor(tokens, device="cuda")
    return StepBatch(ids, positions, slots, positions + 1, rows, table, rows, at + 1)


@pytest.mark.parametrize(
    ("requests", "kv"),
    [(3, "fp8"), (1, "bfloat16")],  # a lone token has kernels of its own, and splits bf16 rows
)
def test_a_captured_chain_with_delays_equals_pdl_off(
    requests: int, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 replays of a whole decode step; between any two kernels one that triggers at once and
    ends after a random time. Inputs change from replay to replay, so stale memory is wrong."""
    llm = LLM(pdl="off", kv_cache_dtype=kv, num_pages=12, **ON_CUDA)
    model = llm.engine.runner.model
    for at in range(150):  # fill the caches of the requests past index_topk
        model.forward(decode_step([5 + at % 7, 40 + at % 11, 90 + at % 13][:requests], at))
    variants = [[10 + i, 200 - i, 3 * i + 7][:requests] for i in range(5)]
    step = decode_step(variants[0], 150)
    ids = [torch.tensor(v, device="cuda") for v in variants]
    want = [forward_of(model, step, i) for i in ids]
    assert not torch.equal(want[0], want[1])
    assert all(torch.isfinite(logits).all() for logits in want)

    on = LLM(pdl="on", kv_cache_dtype=kv, num_pages=12, **ON_CUDA).engine.runner
    for mine, other in zip(on.cache.latent, llm.engine.runner.cache.latent, strict=True):
        mine.copy_(other)
    for mine, other in zip(on.cache.index, llm.engine.runner.cache.index, strict=True):
        if mine is not None and other is not None:
            mine.copy_(other)
    rounds = torch.zeros(1, dtype=torch.int32, device="cuda")
    sink = torch.zeros(PROGRAMS, dtype=torch.int32, device="cuda")
    launch = KernelSpec.launch

    def slowed(self: KernelSpec, grid, mode, args, *rest, **more):
        launch(self, grid, mode, args, *rest, **more)
        if self.name != "delay_kernel":
            delay(rounds, sink, mode)

    monkeypatch.setattr(KernelSpec, "launch", slowed)
    on.model.forward(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, logits = on.model.forward(step)
    monkeypatch.setattr(KernelSpec, "launch", launch)
    generator = torch.Generator().manual_seed(0)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for replay in range(REPLAYS):
        which = int(torch.randint(len(ids), (1,), generator=generator))
        step.input_ids.copy_(ids[which])
        rounds.fill_(int(torch.randint(300, (1,), generator=generator)) * (replay % 3))
        graph.replay()
        wrong += (logits != want[which]).any()
    assert int(wrong) == 0, f"{int(wrong)} of {REPLAYS} replays differ"


def forward_of(model: DeepseekV32, step: StepBatch, ids: Tensor) -> Tensor:
    """Logits of `step` for other tokens."""
    step.input_ids.copy_(ids)
    return model.forward(step)[1].clone()
