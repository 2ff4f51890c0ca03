"""Captured decode steps on a GPU: bit for bit what runs without the graph, and never waiting."""

from functools import cache
from typing import Any

import pytest
import torch
from test_graph import MIXED, PROMPTS, READ_AT_ONCE, decode

from builders import prompt
from minidsv import LLM, SamplingParams
from minidsv.graph import DecodeGraphs
from minidsv.kernels.specs import SPECS

pytestmark = pytest.mark.gpu
CACHES = [("bfloat16", "bfloat16"), ("fp8", "fp8"), ("fp8_flat", "fp8")]
OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "backend": "triton",
    "num_pages": 60,
    "max_model_len": 2000,
    "max_num_seqs": 11,
    "max_num_batched_tokens": 512,
}


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs SM 9.0")


@cache
def shared_llm() -> LLM:
    return LLM(**OPTIONS)


@pytest.fixture
def llm() -> LLM:
    """One for all; made inside a test, where the device can be seen."""
    return shared_llm()


def graphs_of(llm: LLM) -> DecodeGraphs:
    graphs = llm.engine.runner.graphs
    assert graphs is not None
    return graphs


@pytest.mark.parametrize(("kv", "index"), CACHES)
def test_a_replay_is_the_eager_step(kv: str, index: str) -> None:
    """Bit for bit at the padded size, on every path, after batches of other sizes."""
    llm = LLM(kv_cache_dtype=kv, index_cache_dtype=index, **OPTIONS)
    graphs = graphs_of(llm)
    assert llm.engine.config.pdl == "on"
    for lengths in ([5], [40, 100, 90], [130] * 8, [700], [1, 300, 500, 129, 600]):
        step, requests = decode(llm, lengths)
        want = [x.clone() for x in graphs.eager(step)]
        for _ in range(20):
            got = graphs.replay(step)
            assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True))
        for request in requests:
            llm.engine.block_manager.free(request)


@pytest.mark.parametrize("params", [MIXED, MIXED + READ_AT_ONCE], ids=["tokens", "more"])
def test_outputs_with_and_without_the_graph(
    params: list[SamplingParams], llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, banned tokens, seeded draws, penalties: equal tokens at equal padded sizes."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    replayed = llm.generate(prompts, params)
    monkeypatch.setattr(DecodeGraphs, "replay", DecodeGraphs.eager)
    eager = llm.generate(prompts, params)
    for mine, other in zip(replayed, eager, strict=True):
        assert mine.outputs[0].token_ids == other.outputs[0].token_ids
    stats = llm.engine.stats()
    assert stats.graph_steps > 0.5 * stats.decode_steps


def test_a_decode_step_is_launched_without_waiting(llm: LLM) -> None:
    """Whatever its rows ask of the sampler."""
    engine = llm.engine
    params = [p for p in MIXED if p.max_tokens and p.max_tokens > 8]
    requests = [engine.make_request(list(PROMPTS[i]), p) for i, p in enumerate(params)]
    for request in requests:
        engine.add(request)
    for _ in range(4):
        engine.step()
    chunks = engine.scheduler.schedule()
    assert all(chunk.num_tokens == 1 for chunk in chunks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.runner.execute(chunks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for request in requests:
            engine.abort(request)
        while engine.has_work:
            engine.step()


def test_nothing_compiles_in_a_request(llm: LLM) -> None:
    """Lengths that no warm-up step has had; Triton keeps what it compiled by specialisation."""

    def compiled() -> int:
        return sum(len(c[0]) for spec in SPECS for c in spec.kernel.device_caches.values())

    before = compiled()
    prompts = [prompt(n, seed=n) for n in (1, 2, 5, 33, 129, 400, 700, 1500)]
    llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    assert compiled() == before > 0


def test_padding_touches_nothing_live(llm: LLM) -> None:
    """Replays of every size leave all slots but the rows' own and the dummy page's as they were."""
    runner, graphs = llm.engine.runner, graphs_of(llm)
    step, requests = decode(llm, [130, 200, 90])
    own = step.slot_mapping
    for buffer in [*runner.cache.latent, *(b for b in runner.cache.index if b is not None)]:
        rows = buffer.view(torch.uint8).view(runner.num_pages + 1, -1)
        before = rows.clone()
        graphs.replay(step)
        changed = (rows != before).any(1).nonzero().flatten().tolist()
        assert set(changed) <= {*(own // 64).tolist(), runner.num_pages}
    for request in requests:
        llm.engine.block_manager.free(request)


def test_a_chunk_of_one_token_is_a_decode_step(llm: LLM) -> None:
    """A prompt of one token replays a graph too."""
    before = llm.engine.stats().graph_steps
    llm.generate([[5]], SamplingParams(max_tokens=1))
    assert llm.engine.stats().graph_steps == before + 1
