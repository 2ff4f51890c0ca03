"""Completion bodies without a server: what they ask of the engine, and what is made of its work."""

from typing import Any

import pytest

from minidsv import LLM, SamplingParams
from minidsv.errors import RequestError
from minidsv.server.completions import CompletionRequest, choices_of, completion_body, make_requests

OPTIONS: dict[str, Any] = {"load_format": "random", "device": "cpu", "num_pages": 64}
PROMPT = "Question: What is the chemical symbol of iron?\nAnswer:"
IDS = [0, 300, 17, 42, 1000]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**OPTIONS)


def answer(llm: LLM, body: dict[str, Any]) -> dict[str, Any]:
    """As an offline program would: parse, run, build."""
    parsed = CompletionRequest.parse(body)
    requests = make_requests(llm.engine, parsed)
    for request in requests:
        llm.engine.add(request)
    while llm.engine.has_work:
        llm.engine.step()
    tokenizer = llm.engine.tokenizer
    return completion_body(parsed, requests, tokenizer, model="m", answer_id="cmpl-1", created=5)


@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "Hi"], IDS, [IDS, [0, 5]]], ids=str)
def test_prompt_forms_give_the_texts_of_llm(prompt: Any, llm: LLM) -> None:
    want = llm.generate(prompt, SamplingParams(max_tokens=6, ignore_eos=True))
    got = answer(llm, {"prompt": prompt, **GREEDY, "return_token_ids": True})
    outputs = [output.outputs[0] for output in want]
    assert [c["text"] for c in got["choices"]] == [o.text for o in outputs]
    assert [c["token_ids"] for c in got["choices"]] == [o.token_ids for o in outputs]
    assert [c["prompt_token_ids"] for c in got["choices"]] == [o.prompt_token_ids for o in want]
    assert [c["index"] for c in got["choices"]] == list(range(len(want)))
    prompt_tokens = sum(len(output.prompt_token_ids) for output in want)
    assert got["usage"]["prompt_tokens"] == prompt_tokens
    assert got["usage"]["completion_tokens"] == 6 * len(want)
    assert got["usage"]["total_tokens"] == prompt_tokens + 6 * len(want)
    assert (got["id"], got["object"], got["created"]) == ("cmpl-1", "text_completion", 5)


@pytest.mark.parametrize("prompt", [PROMPT, IDS], ids=["text", "ids"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_echo_with_logprobs(prompt: Any, count: int, llm: LLM) -> None:
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    choice = answer(llm, body | {"echo": True, "logprobs": count})["choices"][0]
    params = SamplingParams(max_tokens=2, ignore_eos=True, logprobs=count, prompt_logprobs=count)
    want = llm.generate(prompt, params)[0]
    echoed = prompt if isinstance(prompt, str) else llm.engine.tokenizer.decode(IDS)
    assert choice["text"] == echoed + want.outputs[0].text
    assert want.prompt_logprobs is not None
    assert want.outputs[0].logprobs is not None
    ids = want.prompt_token_ids + want.outputs[0].token_ids
    known = want.prompt_logprobs + want.outputs[0].logprobs
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [llm.engine.tokenizer.token_text(token) for token in ids]
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    for own, best, token, entries in zip(
        logprobs["token_logprobs"], logprobs["top_logprobs"], ids, known, strict=True
    ):
        if entries is not None:
            assert own == entries[token].logprob
            assert own in best.values()
            assert (own == max(best.values())) == (entries[token].rank == 1 or count == 0)
            assert len(best) <= count + 1
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(ids))]


def test_choices_of_several_prompts_and_n(llm: LLM) -> None:
    """Number prompt_i * n + j; every choice echoes its own prompt, scored once."""
    iron = llm.engine.tokenizer.encode(PROMPT)
    body = {"prompt": [iron, IDS], "n": 3, "seed": 7, "max_tokens": 4, "return_token_ids": True}
    got = answer(llm, body | {"echo": True, "logprobs": 1, "ignore_eos": True})
    choices = got["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    for first, prompt in ((0, iron), (3, IDS)):
        params = SamplingParams(n=3, seed=7, max_tokens=4, temperature=1, ignore_eos=True)
        want = llm.generate(prompt, params)[0]
        group = choices[first : first + 3]
        assert [c["token_ids"] for c in group] == [o.token_ids for o in want.outputs]
        assert len({c["text"] for c in group}) > 1
        scores = [c["logprobs"]["token_logprobs"][: len(want.prompt_token_ids)] for c in group]
        assert scores[0][1] is not None
        assert scores == [scores[0]] * 3
    assert got["usage"]["prompt_tokens"] == len(iron) + len(IDS)
    assert got["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize("echo", [False, True])
def test_no_tokens_at_all(echo: bool, llm: LLM) -> None:
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": echo, "logprobs": 1}
    choice = answer(llm, body)["choices"][0]
    scored = answer(llm, body | {"max_tokens": 1, "echo": True})["choices"][0]["logprobs"]
    assert choice["text"] == (PROMPT if echo else "")
    assert choice["finish_reason"] == "length"
    for name, values in choice["logprobs"].items():
        assert values == (scored[name][:-1] if echo else [])


@pytest.mark.parametrize(
    "options",
    [{"logit_bias": {"300": 100}}, {"min_p": 1.0, "temperature": 1.5}, {"presence_penalty": 2},
     {"frequency_penalty": -2}, {"repetition_penalty": 1.5}, {"top_k": 1, "temperature": 1}],
    ids=str,
)  # fmt: skip
def test_sampling_options_reach_the_engine(options: dict[str, Any], llm: LLM) -> None:
    body = {"prompt": IDS, **GREEDY, "seed": 3, "return_token_ids": True}
    ours = {name: value for name, value in options.items() if name != "logit_bias"}
    bias = {300: 100} if "logit_bias" in options else None
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=3, logit_bias=bias, **ours)
    want = llm.generate(IDS, params)[0].outputs[0].token_ids
    assert answer(llm, body | options)["choices"][0]["token_ids"] == want


def test_parts_join_to_the_whole(llm: LLM) -> None:
    body = {"prompt": PROMPT, **GREEDY, "echo": True, "logprobs": 2, "return_token_ids": True}
    whole = answer(llm, body)["choices"][0]
    requests = make_requests(llm.engine, CompletionRequest.parse(body))
    (choice,) = choices_of(CompletionRequest.parse(body), requests, llm.engine.tokenizer)
    llm.engine.add(choice.request)
    parts = []
    while llm.engine.has_work:
        for output in llm.engine.step():
            parts += [part for chunk in choice.chunks(output) for part in chunk["choices"]]
    assert len(parts) == 6
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [token for part in parts for token in part["token_ids"]] == whole["token_ids"]
    assert ["prompt_token_ids" in part for part in parts] == [True] + [False] * 5
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values
    assert [part["finish_reason"] for part in parts] == [None] * 5 + ["length"]


def test_what_ended_the_text_is_shown_on_request(llm: LLM) -> None:
    full = answer(llm, {"prompt": PROMPT, **GREEDY, "return_token_ids": True})["choices"][0]
    word, token = full["text"][4:7], full["token_ids"][3]
    for stop in ({"stop": word}, {"stop_token_ids": [token]}):
        for shown in (False, True):
            body = {"prompt": PROMPT, **GREEDY, **stop, "include_stop_str_in_output": shown}
            choice = answer(llm, body)["choices"][0]
            matched = choice["stop_reason"]
            text = matched if isinstance(matched, str) else llm.engine.tokenizer.decode([matched])
            assert choice["finish_reason"] == "stop"
            assert choice["text"] == full["text"].partition(text)[0] + (text if shown else "")


def test_tokens_are_named_by_id_on_request(llm: LLM) -> None:
    body = {"prompt": IDS, "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = answer(llm, body | {"return_tokens_as_token_ids": True})["choices"][0]
    assert choice["logprobs"]["tokens"][:5] == [f"token_id:{token}" for token in IDS]
    assert all(key.startswith("token_id:") for key in choice["logprobs"]["top_logprobs"][1])


def test_prompt_logprobs_are_vllms(llm: LLM) -> None:
    body = {"prompt": IDS, "prompt_logprobs": 2, "echo": True, "logprobs": 4, "max_tokens": 1}
    first, *rest = answer(llm, body)["choices"][0]["prompt_logprobs"]
    assert first is None
    for token, entries in zip(IDS[1:], rest, strict=True):
        assert {1, 2, entries[str(token)]["rank"]} == {e["rank"] for e in entries.values()}


def test_defaults_are_openais(llm: LLM) -> None:
    null = dict.fromkeys(CompletionRequest.model_fields) | {"prompt": PROMPT}
    params = CompletionRequest.parse(null).to_params()
    assert params == CompletionRequest.parse({"prompt": PROMPT}).to_params()
    assert (params.temperature, params.top_p, params.max_tokens) == (1, 1, 16)
    assert CompletionRequest.parse({"prompt": "a", "seed": -1}).to_params().seed == 2**63 - 1


REFUSED = {
    "prompt": [1, [], [True], [1.0], [[]], [[1], "a"], ["a", 1], [[1], [True]], "\ud800", [1280],
               ["a", "\ud800"], [[-1]], None, ["a"] * 1025],
    "temperature": [-0.1, 2.1, float("nan"), "1", True], "top_p": [0, 1.1], "top_k": [-2, 1.5],
    "max_tokens": [-1, 1.0, 2**64, 100_000], "min_tokens": [17, -1], "logprobs": [-1, 6, True],
    "stop": ["", ["a", ""], 5, ["a"] * 17], "stop_token_ids": [[-1], [True]], "seed": [2**63, 1.5],
    "stream_options": [{}, [], {"include_usage": True}], "echo": [1], "ignore_eos": ["yes"],
    "suffix": ["x"], "best_of": [2], "response_format": [{"type": "json_object"}], "priority": [1],
    "use_beam_search": [True], "skip_special_tokens": [False], "bad_words": [["a"]],
    "truncate_prompt_tokens": [5], "guided_regex": ["a"], "lora_path": ["a"], "model": [5],
    "n": [0, 129, True], "min_p": [1.1, -0.1], "presence_penalty": [2.1], "repetition_penalty": [0],
    "frequency_penalty": [-2.1], "logit_bias": [{"x": 1}, {"1280": 1}, {"5": 101}, {"-1": 1}, []],
    "return_hidden_states": [True], "prompt_logprobs": [-1, 21], "request_id": ["", "a" * 129],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={str(value)[:20]!a}")
        for name, values in REFUSED.items()
        for value in values
    ],
)
def test_refused(name: str, value: Any, llm: LLM) -> None:
    with pytest.raises(RequestError) as caught:
        make_requests(llm.engine, CompletionRequest.parse({"prompt": "a", name: value}))
    assert caught.value.param.split(".")[0] == name
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "field",
    [{"best_of": 1}, {"suffix": ""}, {"response_format": {"type": "text"}}, {"unknown": [1]},
     {"priority": 0}, {"user": "me"}, {"skip_special_tokens": True}, {"stop": []}],
    ids=str,
)  # fmt: skip
def test_what_asks_for_nothing_is_accepted(field: dict[str, Any], llm: LLM) -> None:
    plain = answer(llm, {"prompt": PROMPT, **GREEDY})
    assert answer(llm, {"prompt": PROMPT, **GREEDY, **field}) == plain


def test_too_many_choices(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"n: 9 prompts of 128 choices .* 1024"):
        make_requests(llm.engine, CompletionRequest.parse({"prompt": ["a"] * 9, "n": 128}))


def test_a_bad_prompt_of_many_is_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"prompt: item 1: .*5000"):
        make_requests(llm.engine, CompletionRequest.parse({"prompt": [[5], [5] * 5000]}))


def test_named_tokens_are_shown_beside_the_best(llm: LLM) -> None:
    """`logprob_token_ids`, at output positions only."""
    body = {"prompt": IDS, "max_tokens": 2, "echo": True, "logprobs": 0, "temperature": 0}
    body["return_tokens_as_token_ids"] = True
    asked = [body, body | {"logprob_token_ids": [7, 9]}]
    plain, named = (answer(llm, b)["choices"][0]["logprobs"]["top_logprobs"] for b in asked)
    assert named[: len(IDS)] == plain[: len(IDS)]
    for one, other in zip(named[len(IDS) :], plain[len(IDS) :], strict=True):
        assert one.keys() == other.keys() | {"token_id:7", "token_id:9"}
