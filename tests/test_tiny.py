"""The bundled model through the engine: what it can do, and that broken engines show in it.

A fixed sample of held-out questions; stored FP8 weights, sparse attention, greedy, on CPU.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from builders import hf_logits, with_config
from compare import relative_l2
from minidsv import LLM, SamplingParams
from minidsv.batch import StepBatch
from minidsv.checkpoint import Checkpoint
from minidsv.config import ModelConfig
from minidsv.engine_config import bundled_model
from minidsv.kernels import topk
from minidsv.kernels.quant import dequantize_fp8_blocks
from minidsv.kernels.topk import topk_positions
from minidsv.questions import Question, eval_questions
from minidsv.runner import ModelRunner
from minidsv.scheduler import Chunk

SEED = 20
LONG = (320, 384, 512)  # contexts of more than 4 x index_topk
PAGE = 64
ANSWER = SamplingParams(max_tokens=16)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Without a prefix cache, so that no damaged run sees keys of a sound one."""
    return LLM(num_pages=400, enable_prefix_caching=False)


def draw(llm: LLM, kind: str, count: int, length: int = 0) -> list[Question]:
    tokenizer = llm.engine.tokenizer
    return eval_questions(kind, count, SEED, length, lambda text: len(tokenizer.encode(text)) - 1)


def accuracy(llm: LLM, questions: Sequence[Question]) -> float:
    """Share of answers that are exactly right, the newline that ends them included."""
    outputs = llm.generate([q.prompt for q in questions], ANSWER)
    answers = [llm.engine.tokenizer.decode(o.outputs[0].token_ids) for o in outputs]
    return sum(a == q.answer for a, q in zip(answers, questions, strict=True)) / len(questions)


@pytest.fixture(scope="module")
def facts(llm: LLM) -> list[Question]:
    return draw(llm, "fact_open", 100)


@pytest.fixture(scope="module")
def retrieval(llm: LLM) -> list[Question]:
    return [question for length in LONG for question in draw(llm, "retrieval_open", 15, length)]


def test_open_facts(llm: LLM, facts: list[Question]) -> None:
    assert accuracy(llm, facts) >= 0.97


def test_four_choice_facts(llm: LLM) -> None:
    assert accuracy(llm, draw(llm, "fact_choice", 100)) >= 0.8


@pytest.mark.parametrize("length", [128, 256, 384, 512])
def test_open_retrieval(llm: LLM, length: int) -> None:
    assert accuracy(llm, draw(llm, "retrieval_open", 40, length)) >= 0.9


@pytest.mark.parametrize("length", [128, 384])
def test_four_choice_retrieval(llm: LLM, length: int) -> None:
    assert accuracy(llm, draw(llm, "retrieval_choice", 30, length)) >= 0.75


def most_recent(logits: Tensor, seq_lens: Tensor, k: int) -> Tensor:
    positions = seq_lens.unsqueeze(1) - k + torch.arange(k)
    return positions.masked_fill(positions < 0, -1)


def random_choice(logits: Tensor, seq_lens: Tensor, k: int) -> Tensor:
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    return topk_positions(noise.masked_fill(logits.isneginf(), float("-inf")), seq_lens, k)


@pytest.mark.parametrize("rule", [most_recent, random_choice], ids=lambda rule: rule.__name__)
def test_other_selections_lose_retrieval_only(
    rule: object,
    llm: LLM,
    facts: list[Question],
    retrieval: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topk, "topk_positions", rule)
    assert accuracy(llm, retrieval) <= 0.35
    assert accuracy(llm, facts) >= 0.97


def test_swapped_indexer_rope_loses_retrieval_only(
    facts: list[Question], retrieval: list[Question], tmp_path: Path
) -> None:
    folder = with_config(bundled_model(), tmp_path / "swapped", indexer_rope_interleave=True)
    swapped = LLM(str(folder), num_pages=400)
    assert accuracy(swapped, retrieval) <= 0.35
    assert accuracy(swapped, facts) >= 0.97


def answer_page(llm: LLM, question: Question) -> int:
    """Number of the page that holds the first token of the answer in the context."""
    end = question.prompt.index(question.record) + question.record.rindex(question.answer.rstrip())
    return len(llm.engine.tokenizer.encode(question.prompt[:end])) // PAGE


def test_a_stale_page_loses_the_answer(
    llm: LLM, retrieval: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of the answer's page see the page of the request beside it."""
    prepare = ModelRunner.prepare

    def broken(self: ModelRunner, chunks: Sequence[Chunk], rows: list[int]) -> StepBatch:
        step = prepare(self, chunks, rows)
        if len(chunks) == 2:  # the prompts of both; later steps read what these computed
            other = chunks[0].request.page_ids
            step.block_table[1, number] = other[min(number, len(other) - 1)]
        return step

    monkeypatch.setattr(ModelRunner, "prepare", broken)
    right = 0
    for question, other in zip(retrieval, retrieval[-1:] + retrieval[:-1], strict=True):
        number = answer_page(llm, question)
        outputs = llm.generate([other.prompt, question.prompt], ANSWER)
        answer = llm.engine.tokenizer.decode(outputs[1].outputs[0].token_ids)
        right += answer == question.answer
    assert right / len(retrieval) <= 0.35


def test_transformers_agrees(llm: LLM, retrieval: list[Question]) -> None:
    """transformers gives the same logits for the dequantised checkpoint, sparse and dense."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    folder = bundled_model()
    config = DeepseekV32Config.from_pretrained(folder)
    config.quantization_config = None
    config._attn_implementation = "eager"
    model = DeepseekV32ForCausalLM(config).eval()
    state = {
        piece.name: piece.data.float()
        if piece.scale is None
        else dequantize_fp8_blocks(piece.data, piece.scale)
        for piece in Checkpoint(folder, ModelConfig.from_path(folder)).tensors()
    }
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            part: torch.stack(
                [state.pop(f"{prefix}{e}.{part}.weight") for e in range(config.n_routed_experts)]
            )
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        state[prefix + "gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
        state[prefix + "down_proj"] = parts["down_proj"]
    model.load_state_dict(state)
    ids = tuple(llm.engine.tokenizer.encode(retrieval[-1].prompt))
    for length in (50, len(ids)):
        got, want = llm.prompt_logits(ids[:length]), hf_logits(model, ids[:length])
        assert relative_l2(got, want) < 5e-6
