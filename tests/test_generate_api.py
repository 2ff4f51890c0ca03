"""POST /generate beyond text: log-probabilities, several answers, scoring alone."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from minidsv import LLM, SamplingParams
from minidsv.server.sglang import Answer, GenerateRequest, make_requests
from served import OPTIONS, Served, assert_error, events, serving

IDS = [0, 300, 17, 42, 1000]
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**OPTIONS)


def entries(llm: LLM, tokens: list[int], known: list[Any]) -> list[list[Any]]:
    """[logprob, id, text] of each token, as SGLang lists them."""
    return [
        [None, token, None] if at is None else [at[token].logprob, token, at[token].decoded_token]
        for token, at in zip(tokens, known, strict=True)
    ]


@pytest.mark.parametrize("start", [None, -1, 0, 1, 4, 5])
@pytest.mark.parametrize("top", [0, 2])
def test_logprobs(start: int | None, top: int, served: Served, llm: LLM) -> None:
    scored = None if start in (None, -1) else top
    params = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=top, prompt_logprobs=scored)
    want = llm.generate(IDS, params)[0]
    assert want.outputs[0].logprobs is not None
    body = {"input_ids": IDS, "sampling_params": GREEDY, "return_logprob": True}
    body |= {"logprob_start_len": start, "top_logprobs_num": top, "return_text_in_logprobs": True}
    meta = served.generate(**body).json()["meta_info"]
    first = len(IDS) if start in (None, -1) else start
    known = [None, *(want.prompt_logprobs or [])[first + 1 :]][: len(IDS) - first]
    assert meta["input_token_logprobs"] == entries(llm, IDS[first:], known)
    output = want.outputs[0]
    assert meta["output_token_logprobs"] == entries(llm, output.token_ids, output.logprobs)
    assert ("output_top_logprobs" in meta) == (top > 0)
    if top:
        assert [at and len(at) for at in meta["input_top_logprobs"]] == [
            None if at is None else top for at in known
        ]
        for best, at in zip(meta["output_top_logprobs"], output.logprobs, strict=True):
            ranked = sorted(at.items(), key=lambda item: item[1].rank)[:top]
            assert best == [[e.logprob, token, e.decoded_token] for token, e in ranked]


def test_texts_are_left_out_unless_asked_for(served: Served) -> None:
    body = {"input_ids": IDS, "sampling_params": GREEDY, "return_logprob": True}
    meta = served.generate(**body).json()["meta_info"]
    assert [text for _, _, text in meta["output_token_logprobs"]] == [None] * 4
    assert meta["input_token_logprobs"] == []


def test_entries_are_encoded_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many events repeat them."""
    body = GenerateRequest.model_validate(
        {"input_ids": IDS, "sampling_params": GREEDY, "return_logprob": True}
        | {"logprob_start_len": 0}
    )
    (request,) = make_requests(llm.engine, body, "r")
    llm.engine.add(request)
    answer, encoded = Answer(body, request, request), []
    entry = Answer._entry
    monkeypatch.setattr(Answer, "_entry", lambda *of: encoded.append(of) or entry(*of))
    while llm.engine.has_work:
        for output in llm.engine.step():
            answer.add(output)
            events = [json.loads(answer.json()) for _ in range(2)]
    assert len(events[1]["meta_info"]["output_token_logprobs"]) == 4
    assert len(encoded) == len(IDS) - 1 + 4


def test_streamed_logprobs_grow(served: Served) -> None:
    body = {"input_ids": IDS, "sampling_params": GREEDY, "return_logprob": True}
    body |= {"top_logprobs_num": 1, "logprob_start_len": 0}
    whole = served.generate(**body).json()["meta_info"]
    parts = [part["meta_info"] for part in events(served.generate(**body, stream=True))]
    for name in ("output_token_logprobs", "output_top_logprobs"):
        assert [part[name] for part in parts] == [whole[name][: n + 1] for n in range(4)]
    for name in ("input_token_logprobs", "input_top_logprobs"):
        assert [part[name] for part in parts] == [whole[name]] * 4


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_several_answers(stream: bool, served: Served, llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=5, temperature=1, seed=4, ignore_eos=True)
    want = [output.token_ids for output in llm.generate(IDS, params)[0].outputs]
    sampling = {"n": 3, "max_new_tokens": 5, "sampling_seed": 4, "ignore_eos": True}
    response = served.generate(input_ids=IDS, sampling_params=sampling, stream=stream)
    answers = events(response) if stream else response.json()
    last = {answer["index"]: answer["output_ids"] for answer in answers}
    assert [last[index] for index in range(3)] == want
    assert len(answers) == (15 if stream else 3)


def test_scoring_alone(served: Served) -> None:
    body = {"input_ids": IDS, "return_logprob": True, "logprob_start_len": 0}
    scored = served.generate(**body, sampling_params=GREEDY).json()["meta_info"]
    for stream in (False, True):
        sampling = GREEDY | {"max_new_tokens": 0}
        response = served.generate(**body, sampling_params=sampling, stream=stream)
        (answer,) = events(response) if stream else [response.json()]
        assert (answer["text"], answer["output_ids"]) == ("", [])
        assert answer["meta_info"]["input_token_logprobs"] == scored["input_token_logprobs"]
        assert answer["meta_info"]["output_token_logprobs"] == []
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


@pytest.mark.parametrize(
    ("field", "value"),
    [("logprob_start_len", 0), ("top_logprobs_num", 1), ("return_text_in_logprobs", True)],
)
def test_options_of_return_logprob_need_it(field: str, value: Any, served: Served) -> None:
    assert_error(served.generate(text="a", **{field: value}), 400, field, "return_logprob: true")


def test_a_start_behind_the_prompt_is_refused(served: Served) -> None:
    body = {"input_ids": IDS, "return_logprob": True, "logprob_start_len": 6}
    assert_error(served.generate(**body), 400, "logprob_start_len", "6", "5 tokens")
