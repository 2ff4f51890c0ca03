"""Cached prefixes against none: the bundled model, page edges, pressure, preemption, aborts."""

import random
from collections.abc import Iterator

import pytest
import torch

from compare import relative_l2
from minidsv import LLM, SamplingParams
from minidsv.errors import ConfigError
from minidsv.questions import eval_questions
from minidsv.request import LogprobDict, Request

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def cold() -> LLM:
    return LLM(num_pages=40, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def warm() -> Iterator[LLM]:
    llm = LLM(num_pages=40)
    yield llm
    llm.engine.scheduler.check()
    assert llm.engine.block_manager.num_free == 40


def text_ids(llm: LLM, length: int, seed: int = 1) -> list[int]:
    """The first tokens of a retrieval question: facts that attention has to look up."""
    tokenizer = llm.engine.tokenizer
    (question,) = eval_questions(
        "retrieval_open", 1, seed, 384, lambda text: len(tokenizer.encode(text)) - 1
    )
    return tokenizer.encode(question.prompt)[:length]


def vector(entries: LogprobDict) -> torch.Tensor:
    return torch.tensor([entry.logprob for _, entry in sorted(entries.items())])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 192, 300])
def test_page_edges(length: int, cold: LLM, warm: LLM) -> None:
    """The same logits (5e-6) and tokens from a cache that is empty, full, or full and longer."""
    ids = text_ids(warm, length, seed=length)
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=-1)
    (want,) = cold.generate([ids], params)
    warm.generate([ids], params)
    longer = [*ids, *want.outputs[0].token_ids]
    for prompt, cached in ((ids, length - 1), (longer[:-1], length + 1), (longer, length + 2)):
        (got,) = warm.generate([prompt], params)
        assert got.num_cached_tokens == cached // 64 * 64
        reference = cold.generate([prompt], params)[0].outputs[0]
        assert got.outputs[0].token_ids == reference.token_ids
        for a, b in zip(got.outputs[0].logprobs or (), reference.logprobs or (), strict=True):
            assert relative_l2(vector(a), vector(b)) < 5e-6
    assert want.num_cached_tokens == 0


def crowd(llm: LLM) -> list[list[int]]:
    """Prompts with two common beginnings of 100 tokens, and two others."""
    return [
        [*text_ids(llm, 100 if seed < 6 else 30, seed=seed % 2), *text_ids(llm, 10 * seed, seed)]
        for seed in range(1, 9)
    ]


@pytest.mark.parametrize("num_pages", [6, 40])
def test_pressure_and_preemption(num_pages: int, cold: LLM) -> None:
    """A pool that holds two or three requests: pages are reused, shared and lost, answers stay."""
    small = LLM(num_pages=num_pages, max_num_batched_tokens=150)
    prompts = crowd(small)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    want = [o.outputs[0].token_ids for o in cold.generate(prompts, params)]
    for _ in range(2):
        got = small.generate(prompts, params)
        assert [o.outputs[0].token_ids for o in got] == want
        small.engine.scheduler.check()
    stats = small.engine.stats()
    assert stats.prefix_cache_hits > 0
    assert (stats.preemptions > 0) == (num_pages < 40)
    assert stats.kv_cache_usage == 0


def test_aborts_among_sharers(cold: LLM) -> None:
    """Requests come and go at random while they share pages; who stays is not touched."""
    engine, rng = LLM(num_pages=12).engine, random.Random(0)
    prompts = crowd(cold)
    want = {i: o.outputs[0].token_ids for i, o in enumerate(cold.generate(prompts, GREEDY))}
    served: list[tuple[int, Request]] = []
    for _ in range(120):
        if len(served) < 60:
            which = rng.randrange(len(prompts))
            served.append((which, engine.make_request(prompts[which], GREEDY)))
            engine.add(served[-1][1])
        if rng.random() < 0.4:
            engine.abort(rng.choice(served)[1])
        engine.step()
        engine.scheduler.check()
    while engine.has_work:
        engine.step()
    ended = [request.finish_reason for _, request in served]
    assert ended.count("abort") > 5
    assert ended.count("length") > 20
    for which, request in served:
        tokens = request.output_token_ids
        assert tokens == want[which][: len(tokens)]
    engine.scheduler.check()
    assert engine.block_manager.num_free == 12


def test_prompt_logprobs_and_logits_beside_the_cache(cold: LLM) -> None:
    """They compute every position; their pages serve others, unless `prompt_logits` took them."""
    warm = LLM(num_pages=7)
    ids = text_ids(warm, 200, seed=77)
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    (scored,), (plain,) = warm.generate([ids], params), warm.generate([ids], GREEDY)
    assert (scored.num_cached_tokens, plain.num_cached_tokens) == (0, 192)
    (again,) = warm.generate([ids], params)
    assert again.num_cached_tokens == 0
    assert again.prompt_logprobs is not None
    assert all(again.prompt_logprobs[1:])
    assert relative_l2(warm.prompt_logits(ids), cold.prompt_logits(ids)) < 5e-6
    assert warm.generate([ids], GREEDY)[0].outputs == plain.outputs
    warm.prompt_logits(text_ids(warm, 300))  # 5 of the 7 pages
    (after,) = warm.generate([ids], GREEDY)
    assert (after.num_cached_tokens, after.outputs) == (128, plain.outputs)


def test_salts_part_tenants(warm: LLM) -> None:
    ids = text_ids(warm, 130, seed=88)
    mine, yours = ({"prompt_token_ids": ids, "cache_salt": salt} for salt in ("mine", "yours"))
    cached = [
        warm.generate(prompt, GREEDY)[0].num_cached_tokens
        for prompt in (mine, yours, ids, mine, yours, ids)
    ]
    assert cached == [0, 0, 0, 128, 128, 128]


def test_the_option(cold: LLM) -> None:
    ids = text_ids(cold, 130, seed=99)
    assert [cold.generate([ids], GREEDY)[0].num_cached_tokens for _ in range(2)] == [0, 0]
    assert cold.engine.stats().prefix_cache_queries == 0
    with pytest.raises(ConfigError, match="enable_prefix_caching: 1 is not True or False"):
        LLM(enable_prefix_caching=1)
