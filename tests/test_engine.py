"""What ends a request: scripted tokens through the real scheduler and detokeniser."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from builders import hf_logits, prompt
from minidsv import LLM, SamplingParams
from minidsv.engine import Engine, StepOutput
from minidsv.llm import CompletionOutput
from minidsv.request import Request
from minidsv.runner import LaunchedStep, StepResult

PAGES = 12


@pytest.fixture(scope="module", params=["read at once", "read a step later"])
def llm(request: pytest.FixtureRequest) -> LLM:
    llm = LLM(load_format="random", num_pages=PAGES, max_model_len=600, max_num_batched_tokens=64)
    llm.engine.runner.runs_ahead = request.param == "read a step later"
    return llm


@pytest.fixture(autouse=True)
def nothing_leaks(llm: LLM) -> Iterator[None]:
    yield
    assert llm.engine.block_manager.num_free == PAGES
    assert not llm.engine.has_work
    assert not llm.engine._texts


def scripted(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, text: str | list[int], **params: Any
) -> tuple[CompletionOutput, str]:
    """Generate with the model replaced by a script; returns the output and the streamed text."""
    ids = llm.engine.tokenizer.encode(text)[1:] if isinstance(text, str) else text

    def execute(chunks: list[Any]) -> LaunchedStep:
        tokens = [ids[c.request.num_sampled_tokens] for c in chunks if c.samples]
        result = StepResult(tokens, [None] * len(tokens), [[] for _ in chunks])
        return LaunchedStep(chunks, True, lambda: result)

    monkeypatch.setattr(llm.engine.runner, "execute", execute)
    pieces: list[StepOutput] = []
    params.setdefault("max_tokens", len(ids))
    output = llm.generate("x", SamplingParams(**params), pieces.append)[0].outputs[0]
    assert [t for p in pieces for t in p.token_ids] == output.token_ids
    assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]
    return output, "".join(p.text for p in pieces)


TEXT = "one two three. four? five"


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        ("three", "one two "),
        (["five", "wo th"], "one t"),
        (["two three.", "ee. f", "wo"], "one t"),
        ("one", ""),
        ("?", "one two three. four"),
        ("absent", TEXT),
        (["e t", " two"], "on"),
        ("five", "one two three. four? "),
    ],
)
def test_stop_strings(
    stop: str | list[str], want: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The match that completes first cuts the text; streaming says the same."""
    output, text = scripted(llm, monkeypatch, TEXT, stop=stop)
    assert output.text == text == want
    if want == TEXT:
        assert (output.finish_reason, output.stop_reason) == ("length", None)
    else:
        assert output.finish_reason == "stop"
        assert output.stop_reason in ([stop] if isinstance(stop, str) else stop)


def test_a_stop_string_over_many_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = [llm.engine.tokenizer.encode(letter)[1] for letter in "abcabcdabcde"]
    output, text = scripted(llm, monkeypatch, letters, stop="abcde")
    assert output.text == text == "abcabcd"
    assert output.token_ids == letters


def test_min_tokens_delays_every_kind_of_stop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (llm.engine.tokenizer.encode(letter)[1] for letter in "ab")
    output, _ = scripted(llm, monkeypatch, [a, b, a, b, a], stop="b", min_tokens=2)
    assert output.text == "aba"
    output, _ = scripted(llm, monkeypatch, [a, b, a, b, a], stop_token_ids=[b], min_tokens=3)
    assert output.token_ids == [a, b, a, b]
    assert output.stop_reason == b


def test_eos(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    a, eos = llm.engine.tokenizer.encode("a")[1], 1
    assert eos in llm.engine.eos_token_ids
    output, text = scripted(llm, monkeypatch, [a, eos, a])
    assert (output.text, text, output.token_ids) == ("a", "a", [a, eos])
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    output, _ = scripted(llm, monkeypatch, [a, eos, a], ignore_eos=True)
    assert (output.text, output.finish_reason) == ("aa", "length")
    output, _ = scripted(llm, monkeypatch, [a, eos, a], ignore_eos=True, stop_token_ids=[eos])
    assert (output.text, output.stop_reason) == ("a", eos)


def test_length_wins_only_without_a_stop(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    output, _ = scripted(llm, monkeypatch, "stop", stop="p", max_tokens=1)
    first = llm.engine.tokenizer.decode(output.token_ids)
    assert output.finish_reason == ("stop" if "p" in first else "length")


def test_a_half_character_at_the_end(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = llm.engine.tokenizer.encode("ok 🎉")[1:-1]
    output, text = scripted(llm, monkeypatch, ids)
    assert output.text == text == llm.engine.tokenizer.decode(ids)
    assert output.text.endswith("\ufffd")


def test_times(llm: LLM) -> None:
    """Arrival, first scheduled, first token, finished; a preemption changes none of them."""
    engine = LLM(load_format="random", num_pages=3, max_num_batched_tokens=64).engine
    params = [SamplingParams(max_tokens=m, ignore_eos=True) for m in (70, 60, 0)]
    requests = [engine.make_request([5 + m] * 60, p) for m, p in enumerate(params)]
    queued = engine.make_request([5], params[0])
    for request in (*requests, queued):
        engine.add(request)
    engine.abort(queued)
    first_times: dict[Request, float | None] = {}
    while engine.has_work:
        before = time.monotonic()
        for output in engine.step():
            if output.token_ids and output.request not in first_times:
                first_times[output.request] = output.request.first_token_time
                assert before <= (output.request.first_token_time or 0) <= time.monotonic()
    assert requests[1].num_preemptions > 0
    for request in requests[:2]:
        assert request.first_scheduled_time is not None
        assert request.finished_time is not None
        assert request.arrival_time < request.first_scheduled_time
        assert request.first_scheduled_time < (request.first_token_time or 0)
        assert request.first_token_time == first_times[request] < request.finished_time
    assert requests[2].first_token_time is None
    assert (requests[2].finished_time or 0) > (requests[2].first_scheduled_time or 1e99)
    assert (queued.first_scheduled_time, queued.first_token_time) == (None, None)
    assert (queued.finished_time or 0) > queued.arrival_time


@pytest.mark.parametrize("when", [0, 1, 3])
def test_abort(when: int, llm: LLM) -> None:
    """Aborted while queued, in prefill, in decode; also as the last one running."""
    engine = llm.engine
    first = engine.make_request(list(range(3, 150)), SamplingParams(max_tokens=50, ignore_eos=True))
    second = engine.make_request([5, 6], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add(first)
    engine.add(second)
    for _ in range(when):
        engine.step()
    engine.abort(first)
    engine.abort(first)
    assert first.finish_reason == "abort"
    while engine.has_work:
        assert all(output.request is second for output in engine.step())
    assert second.finish_reason == "length"
    engine.abort(second)
    assert second.finish_reason == "length"
    assert engine.step() == []


def test_an_error_while_generating_leaves_nothing_behind(llm: LLM) -> None:
    def boom(_: StepOutput) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=5), boom)


def run_out(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def test_an_interrupted_step_hurts_nobody_else(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt while the first request's text is made: the second's tokens stay right."""
    engine, params = llm.engine, SamplingParams(max_tokens=6, ignore_eos=True)
    want = llm.generate([7, 8], params)[0].outputs[0].token_ids
    first, second = engine.make_request([5, 6], params), engine.make_request([7, 8], params)
    engine.add(first)
    engine.add(second)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._texts[first], "push", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_out(engine)
    engine.abort(first)
    run_out(engine)
    assert second.output_token_ids == want


def test_logprobs(checkpoints: dict[str, Path], hf_models: dict[str, Any]) -> None:
    """Raw-logit logprobs against transformers; chunks and preemptions lose none."""
    ids = prompt(100)
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=0)
    llm = LLM(str(checkpoints["dsv32"]), num_pages=3, max_num_batched_tokens=33)
    output, other = llm.generate([ids, prompt(62)], params)
    assert llm.engine.scheduler.num_preemptions > 0
    want = hf_logits(hf_models["dsv32"], ids + tuple(output.outputs[0].token_ids)).log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 100
    assert len(other.prompt_logprobs) == 62
    for position in range(1, 100):
        (entry,) = output.prompt_logprobs[position].items()
        assert entry[0] == ids[position]
        assert entry[1].logprob == pytest.approx(float(want[position - 1, ids[position]]), abs=5e-5)
        assert entry[1].rank == 1 + int(
            (want[position - 1] > want[position - 1, ids[position]]).sum()
        )
    for i, entries in enumerate(output.outputs[0].logprobs):
        best = want[99 + i].topk(2)
        assert list(entries) == best.indices.tolist()
        assert [e.rank for e in entries.values()] == [1, 2]
        assert entries[output.outputs[0].token_ids[i]].logprob == max(
            e.logprob for e in entries.values()
        )


def test_seeds(llm: LLM) -> None:
    """A seeded request draws the same in a crowd; unseeded ones follow the engine's seed."""
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=7, ignore_eos=True)
    unseeded = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    alone = llm.generate("hello", params)[0].outputs[0].token_ids
    crowd = llm.generate(["a", "hello", "b c d"], [unseeded, params, SamplingParams()])
    assert crowd[1].outputs[0].token_ids == alone
    again = llm.generate(
        "hello", SamplingParams(temperature=1.0, max_tokens=12, seed=8, ignore_eos=True)
    )
    assert again[0].outputs[0].token_ids != alone
    twins = [
        LLM(load_format="random", num_pages=4).generate(["q", "q"], unseeded) for _ in range(2)
    ]
    assert [o.outputs[0].token_ids for o in twins[0]] == [o.outputs[0].token_ids for o in twins[1]]
    assert twins[0][0].outputs[0].token_ids != twins[0][1].outputs[0].token_ids


def test_logprobs_of_the_whole_vocabulary(llm: LLM) -> None:
    """-1 reports every token; they sum to one, and edits of the logits do not change them."""
    bias = {9: 100.0}
    params = SamplingParams(max_tokens=2, logprobs=-1, prompt_logprobs=-1, logit_bias=bias)
    (result,) = llm.generate([[5, 6, 7]], params)
    assert result.outputs[0].token_ids == [9, 9]
    assert result.prompt_logprobs is not None
    assert result.outputs[0].logprobs is not None
    for entries in [*result.prompt_logprobs[1:], *result.outputs[0].logprobs]:
        assert entries is not None
        assert sorted(entries) == list(range(1280))
        assert sum(math.exp(e.logprob) for e in entries.values()) == pytest.approx(1, abs=1e-4)
        assert [e.rank for e in entries.values()] == list(range(1, 1281))
    raw = llm.prompt_logits([5, 6, 7])[-1].log_softmax(-1)
    assert result.outputs[0].logprobs[0][9].logprob == pytest.approx(float(raw[9]), abs=1e-5)


def test_stats() -> None:
    """Totals count every token once, and again what a preemption costs."""
    llm = LLM(load_format="random", num_pages=4, max_model_len=256, max_num_batched_tokens=64)
    engine = llm.engine
    for length in (100, 60):
        engine.add(
            engine.make_request([5] * length, SamplingParams(max_tokens=80, ignore_eos=True))
        )
    assert (engine.stats().running, engine.stats().waiting) == (0, 2)
    engine.step()
    assert engine.stats().prefill_tokens == 64
    assert engine.stats().kv_cache_usage == pytest.approx(0.5)
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.preemptions > 0
    assert stats.prefill_tokens > 160
    assert 79 <= stats.decode_tokens <= 2 * 79


def test_logprob_token_ids(llm: LLM) -> None:
    """Named tokens are reported beside the best, with their true ranks, and nothing else moves."""
    asked = [7, 900, 7, 0]
    every = llm.generate([5] * 9, SamplingParams(max_tokens=3, logprobs=-1))[0].outputs[0]
    some = SamplingParams(max_tokens=3, logprobs=1, logprob_token_ids=asked)
    plain = SamplingParams(max_tokens=3, logprobs=1)
    named, alone = (o.outputs[0] for o in llm.generate([[5] * 9] * 2, [some, plain]))
    assert named.token_ids == alone.token_ids == every.token_ids
    for row, best, whole in zip(*(o.logprobs or [] for o in (named, alone, every)), strict=True):
        assert row.keys() == best.keys() | set(asked)
        assert [row[t].rank for t in row] == [whole[t].rank for t in row]
        assert [row[t].logprob for t in row] == pytest.approx([whole[t].logprob for t in row])


@pytest.mark.parametrize(
    ("logprobs", "tokens", "words"),
    [(None, [1], "without logprobs"), (0, "7", "list"), (0, [-1], "-1"), (0, [1] * 129, "129")],
)
def test_wrong_logprob_token_ids(logprobs: int | None, tokens: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"logprob_token_ids.*{words}"):
        SamplingParams(logprobs=logprobs, logprob_token_ids=tokens)


def test_a_logprob_token_id_outside_the_vocabulary(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"logprob_token_ids.*99999"):
        llm.generate([5], SamplingParams(logprobs=0, logprob_token_ids=[99999]))
