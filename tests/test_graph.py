"""Decode graphs and steps launched ahead, on the CPU: what runs is what would be captured."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builders import prompt
from compare import relative_l2
from emulated import emulate_gpu
from minidsv import LLM, SamplingParams
from minidsv.engine import StepOutput
from minidsv.graph import GraphKey, batch_sizes, context_bounds
from minidsv.kernels.constants import PAGE_SIZE
from minidsv.request import Request
from minidsv.runner import LaunchedStep
from minidsv.scheduler import Chunk

TOPK = 48
FAMILIES = ("dsv32", "glm")
OPTIONS: dict[str, Any] = {"num_pages": 40, "max_model_len": 600, "max_num_seqs": 11}


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (64, [1, 2, 4, 8, 16, 24, 32, 48, 64]),
        (65, [1, 2, 4, 8, 16, 24, 32, 48, 64, 65]),
        (256, [1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 192, 256]),
    ],
)
def test_batch_sizes(most: int, sizes: list[int]) -> None:
    assert list(batch_sizes(most)) == sizes


def test_paths() -> None:
    assert context_bounds(2048, 65_792) == (2048, 8192, 65_792)
    assert context_bounds(2048, 8192) == (2048, 8192)
    assert context_bounds(2048, 600) == (600,)


def decode(llm: LLM, lengths: list[int]) -> tuple[Any, list[Request]]:
    """A step of requests that have computed all but their last token."""
    engine, requests = llm.engine, []
    for seed, length in enumerate(lengths):
        request = engine.make_request(list(prompt(length, seed=seed)), SamplingParams())
        assert engine.block_manager.grow(request, length)
        if length > 1:
            step = engine.runner.prepare([Chunk(request, 0, length - 1)], [0])
            engine.runner.model.forward(step)
        requests.append(request)
    chunks = [Chunk(request, request.num_tokens - 1, 1) for request in requests]
    return engine.runner.prepare(chunks, list(range(len(chunks)))), requests


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[5, 30, TOPK], [1, 60, 70, 129, 64, 200]])
def test_padding_changes_nothing(
    family: str, lengths: list[int], checkpoints: dict[str, Path]
) -> None:
    """The rows' logits are those without padding; no slot but the rows' own and the dummy page's
    is written; padding reads nothing that nobody wrote."""
    llm = LLM(str(checkpoints[family]), **OPTIONS)
    runner = llm.engine.runner
    buffers = [*runner.cache.latent, *(b for b in runner.cache.index if b is not None)]
    for buffer in buffers:
        buffer.fill_(torch.nan)
    step, _ = decode(llm, lengths)
    before = [b.clone() for b in buffers]
    _, want = runner.model.forward(step)
    after = [b.clone() for b in buffers]
    for buffer, old in zip(buffers, before, strict=True):
        buffer.copy_(old)
    graphs = emulate_gpu(llm.engine)
    key = graphs.key(step)
    longest = max(lengths)
    assert key == GraphKey(4 if len(lengths) == 3 else 8, 1, TOPK if longest <= TOPK else 600)
    ids, logits = graphs.replay(step)
    assert relative_l2(logits, want) < 5e-6
    assert torch.equal(ids, want.argmax(-1))
    dummy = runner.num_pages
    for buffer, expected in zip(buffers, after, strict=True):
        assert buffer[-1].shape == expected[-1].shape
        pages = buffer.view(dummy + 1, -1)[:dummy], expected.view(dummy + 1, -1)[:dummy]
        assert torch.allclose(*pages, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_smaller_batch_leaves_no_trace_of_a_larger_one(checkpoints: dict[str, Path]) -> None:
    llm = LLM(str(checkpoints["dsv32"]), **OPTIONS)
    graphs = emulate_gpu(llm.engine)
    large, _ = decode(llm, [60, 61, 62, 63, 64, 65, 66, 67])
    small, _ = decode(llm, [70, 80, 90])
    _, want = graphs.replay(small)
    want = want.clone()
    graphs.replay(large)
    table = graphs.buffers.block_table[:, : small.block_table.shape[1]]
    graphs.buffers.fill(small, 4)
    assert graphs.buffers.slot_mapping[3] == llm.engine.runner.num_pages * PAGE_SIZE
    assert graphs.buffers.request_index[:4].tolist() == [0, 1, 2, 0]
    assert torch.equal(table[:3], small.block_table)
    assert torch.equal(graphs.replay(small)[1], want)


def test_steps_without_a_graph(checkpoints: dict[str, Path]) -> None:
    llm = LLM(str(checkpoints["dsv32"]), **OPTIONS)
    graphs = emulate_gpu(llm.engine)
    step, _ = decode(llm, [5] * 12)
    assert graphs.key(step) is None
    assert graphs.key(replace(step, max_seq_len=601)) is None


# The engine over them

MIXED = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=9, ignore_eos=True, min_tokens=9),
    SamplingParams(max_tokens=20, temperature=1.0, seed=7, min_tokens=6),
    SamplingParams(max_tokens=15, temperature=0.7, top_k=20, top_p=0.9, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=14, stop_token_ids=list(range(0, 512, 5)), min_tokens=3),
    SamplingParams(max_tokens=18, temperature=1.3, seed=9, logit_bias={5: 3.0, 1: 4.0}),
]
READ_AT_ONCE = [
    SamplingParams(max_tokens=8, logprobs=2),
    SamplingParams(max_tokens=8, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=16, presence_penalty=1.5, repetition_penalty=1.2, ignore_eos=True),
    SamplingParams(max_tokens=0),
    SamplingParams(max_tokens=6, return_indexer_topk=True, ignore_eos=True),
]
PROMPTS = [prompt(n, seed=5) for n in (62, 50, 63, 60, 10, 47, 130)]


def generate(llm: LLM, params: list[SamplingParams]) -> tuple[list[Any], list[StepOutput]]:
    pieces: list[StepOutput] = []
    ids = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    outputs = llm.generate(ids, params, pieces.append)
    engine = llm.engine
    assert engine.block_manager.num_free == engine.runner.num_pages
    assert not engine.has_work
    assert not engine._texts
    return [output.outputs for output in outputs], pieces


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [MIXED, MIXED + READ_AT_ONCE], ids=["tokens", "more"])
@pytest.mark.parametrize(
    "pool", [{}, {"num_pages": 5, "max_model_len": 200}, {"max_num_batched_tokens": 16}]
)
def test_outputs_are_those_of_the_plain_engine(
    family: str, params: list[SamplingParams], pool: dict[str, int], checkpoints: dict[str, Path]
) -> None:
    """Whatever the mix, under preemption and chunked prefill, with padding in every other step."""
    options = OPTIONS | pool
    want, wanted = generate(LLM(str(checkpoints[family]), **options), params)
    llm = LLM(str(checkpoints[family]), **options)
    emulate_gpu(llm.engine)
    got, pieces = generate(llm, params)
    for mine, plain in zip(got, want, strict=True):
        for one, other in zip(mine, plain, strict=True):
            assert (one.token_ids, one.text) == (other.token_ids, other.text)
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            assert one.indexer_topk == other.indexer_topk
            for here, there in zip(one.logprobs or [], other.logprobs or [], strict=True):
                assert here.keys() == there.keys()
    assert sum(len(p.token_ids) for p in pieces) == sum(len(p.token_ids) for p in wanted)
    assert sum(p.finished for p in pieces) == len(params)
    stats = llm.engine.stats()
    assert 0 < stats.graph_steps <= stats.decode_steps
    if "num_pages" in pool:
        assert stats.preemptions > 0
    if params is MIXED:
        assert stats.graph_steps == stats.decode_steps
        assert stats.padding_rows > 0 or pool


def spy_on(llm: LLM, events: list[str]) -> None:
    runner = llm.engine.runner
    execute = runner.execute

    def spied(chunks: list[Chunk]) -> LaunchedStep:
        events.append("launch")
        launched = execute(chunks)

        def read() -> Any:
            events.append("read")
            return launched.read()

        return replace(launched, read=read)

    runner.execute = spied  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]),
        ({"logprobs": 0}, ["launch", "read"] * 4),
        ({"frequency_penalty": 0.5}, ["launch", "read"] * 4),
    ],
)
def test_a_step_is_launched_before_the_last_one_is_read(
    params: dict[str, Any], want: list[str], checkpoints: dict[str, Path]
) -> None:
    """Unless more than its tokens is wanted; never one for a token that nobody wants."""
    events: list[str] = []
    llm = LLM(str(checkpoints["dsv32"]), **OPTIONS)
    emulate_gpu(llm.engine)
    spy_on(llm, events)
    llm.generate([prompt(20)], SamplingParams(max_tokens=4, ignore_eos=True, **params))
    assert events == want


def aborted_after(steps: int) -> Callable[[LLM], list[Request]]:
    def run(llm: LLM) -> list[Request]:
        engine = llm.engine
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        requests = [engine.make_request(list(p), params) for p in PROMPTS]
        for request in requests:
            engine.add(request)
        for _ in range(steps):
            engine.step()
        for request in requests[::2]:
            engine.abort(request)
        while engine.has_work:
            engine.step()
            engine.scheduler.check()
        return requests

    return run


@pytest.mark.parametrize("steps", range(1, 6))
def test_aborts_while_a_step_is_in_flight(steps: int, checkpoints: dict[str, Path]) -> None:
    """The others' tokens are those without; the aborted take nothing any more."""
    plain = LLM(str(checkpoints["dsv32"]), **OPTIONS)
    want, _ = generate(plain, [SamplingParams(max_tokens=12, ignore_eos=True)] * len(PROMPTS))
    llm = LLM(str(checkpoints["dsv32"]), **OPTIONS)
    emulate_gpu(llm.engine)
    requests = aborted_after(steps)(llm)
    for request, outputs in zip(requests, want, strict=True):
        tokens = request.output_token_ids
        if request in requests[::2]:
            assert request.finish_reason == "abort"
            assert len(tokens) == steps - 1
        else:
            assert request.finish_reason == "length"
            assert len(tokens) == 12
        assert tokens == outputs[0].token_ids[: len(tokens)]
    assert llm.engine.block_manager.num_free == OPTIONS["num_pages"]


def test_pages_of_decoded_tokens_are_cached_once_these_are_known(
    checkpoints: dict[str, Path],
) -> None:
    """A follow-up finds all full pages of prompt and output, as in the plain engine."""
    cached = []
    for on_gpu in (False, True):
        llm = LLM(str(checkpoints["dsv32"]), **OPTIONS)
        if on_gpu:
            emulate_gpu(llm.engine)
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        first = llm.generate([prompt(60)], params)[0]
        follow_up = [*first.prompt_token_ids, *first.outputs[0].token_ids, 9, 10]
        cached.append(llm.generate([follow_up], SamplingParams(max_tokens=2))[0].num_cached_tokens)
    assert cached == [128, 128]


def test_an_emulated_graph_forgets(checkpoints: dict[str, Path]) -> None:
    """The emulation is strict: what a replay gave out is gone after the next."""
    llm = LLM(str(checkpoints["dsv32"]), **OPTIONS)
    graphs = emulate_gpu(llm.engine)
    step, _ = decode(llm, [3])
    ids, logits = graphs.replay(step)
    graphs.replay(step)
    assert ids.tolist() == [-1]
    assert logits.isnan().all()
