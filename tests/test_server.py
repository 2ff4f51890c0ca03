"""The HTTP server on a real socket: answers, refusals, disconnects, a failing engine, shutdown."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from minidsv import LLM, SamplingParams
from served import ENDLESS, OPTIONS, Served, assert_error, events, serving, wait_until

PROMPT = "Question: What is the chemical symbol of iron?\nAnswer:"
IDS = [0, 300, 17, 42, 1000]
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**OPTIONS)


@pytest.mark.parametrize("prompt", [{"text": PROMPT}, {"input_ids": IDS}, {"text": ""}], ids=str)
def test_plain_answer_is_that_of_llm(prompt: dict[str, Any], served: Served, llm: LLM) -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    want = llm.generate(prompt.get("text", IDS), params)[0]
    answer = served.generate(**prompt, sampling_params=GREEDY, rid="mine").json()
    assert answer["text"] == want.outputs[0].text
    assert answer["output_ids"] == want.outputs[0].token_ids
    assert answer["meta_info"].pop("e2e_latency") > 0
    assert answer["meta_info"] == {
        "id": "mine",
        "finish_reason": {"type": "length", "length": 24},
        "prompt_tokens": len(want.prompt_token_ids),
        "completion_tokens": 24,
        "cached_tokens": 0,
    }


@pytest.mark.parametrize("prompt", [{"text": PROMPT}, {"input_ids": IDS}], ids=str)
def test_stream_grows_to_the_plain_answer(prompt: dict[str, Any], served: Served) -> None:
    plain = served.generate(**prompt, sampling_params=GREEDY).json()
    parts = events(served.generate(**prompt, sampling_params=GREEDY, stream=True))
    ids, text = plain["output_ids"], plain["text"]
    assert [part["output_ids"] for part in parts] == [ids[: n + 1] for n in range(24)]
    assert all(text.startswith(part["text"]) for part in parts)
    assert len({part["text"] for part in parts}) > 12, "it does not grow"
    assert parts[-1]["text"] == text
    reasons = [part["meta_info"]["finish_reason"] for part in parts]
    assert reasons == [None] * 23 + [plain["meta_info"]["finish_reason"]]


@BOTH_WAYS
def test_stop(stream: bool, served: Served) -> None:
    full = served.generate(text=PROMPT, sampling_params=GREEDY).json()
    word, token = full["text"][20:25], full["output_ids"][5]
    for stop, matched in (({"stop": ["\0", word]}, word), ({"stop_token_ids": [token]}, token)):
        response = served.generate(text=PROMPT, sampling_params=GREEDY | stop, stream=stream)
        answer = events(response)[-1] if stream else response.json()
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": matched}
        assert full["text"].startswith(answer["text"])
        assert word not in answer["text"] or matched == token


def test_selections(served: Served, llm: LLM) -> None:
    """A plain answer has all of them, an event those of its own tokens, other answers none."""
    ids, sampling = list(range(300, 360)), GREEDY | {"max_new_tokens": 8}
    params = SamplingParams(max_tokens=8, ignore_eos=True, return_indexer_topk=True)
    selections = llm.generate([ids], params)[0].outputs[0].indexer_topk
    want = [{"num_keys": s.num_keys, "layers": s.layers} for s in selections]
    assert want[0] == {"num_keys": 60, "layers": "all"}
    assert [len(layer) for layer in want[-1]["layers"]] == [64] * 5
    body = {"input_ids": ids, "sampling_params": sampling}
    plain = served.generate(**body, return_indexer_topk=True).json()
    assert plain["meta_info"]["indexer_topk"] == want
    streamed = events(served.generate(**body, return_indexer_topk=True, stream=True))
    assert [part["meta_info"]["indexer_topk"] for part in streamed] == [[one] for one in want]
    body["sampling_params"] = sampling | {"n": 2}
    for stream in (False, True):
        response = served.generate(**body, return_indexer_topk=True, stream=stream)
        both = events(response) if stream else response.json()
        for index in (0, 1):
            infos = [part["meta_info"] for part in both if part["index"] == index]
            assert [item for info in infos for item in info["indexer_topk"]] == want
    body["sampling_params"] = sampling
    silent = served.generate(**body, return_indexer_topk=False).json()
    assert "indexer_topk" not in silent["meta_info"]


def test_concurrent_requests_answer_as_alone(served: Served, llm: LLM) -> None:
    def ask(i: int) -> str:
        params = {"max_new_tokens": 12, "temperature": 0.5 * (i % 2), "sampling_seed": i}
        response = served.generate(text=prompts[i], sampling_params=params, stream=i < 10)
        return (events(response)[-1] if i < 10 else response.json())["text"]

    prompts = [f"Question {i}: who plays the {'long ' * i}drum?" for i in range(20)]
    params = [SamplingParams(max_tokens=12, temperature=0.5 * (i % 2), seed=i) for i in range(20)]
    alone = [llm.generate(prompts[i], params[i])[0].outputs[0].text for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == alone


# Field -> JSON values that are refused: wrong ones, and those of SGLang's fields that we lack.
FIELDS = {
    "text": ["1", '["a"]', '"\\ud800"', 'null, "input_ids": null', '"a", "input_ids": [3]'],
    "input_ids": ["[]", "[true]", "[1.0]", "[1e400]", "[1280]", "[-1]", "[[3]]", f"[{10**30}]"],
    "rid": ["1", '"\\ud800"'], "stream": ["1", '"yes"'], "sampling_params": ["[]"],
    "input_embeds": ["[[0.5]]"], "image_data": ['"x.png"'], "audio_data": ['"x.wav"'],
    "modalities": ['["image"]'], "return_logprob": ["1"], "logprob_start_len": ["0", "-2"],
    "top_logprobs_num": ["2", "21"], "return_hidden_states": ["true"],
    "session_params": ['{"id": "a"}'],
    "lora_path": ['"a"'], "custom_logit_processor": ['"a"'], "priority": ["3"],
    "background": ["true"], "return_routed_experts": ["true"], "lora_id": ["[" * 900 + "]" * 900],
    "return_indexer_topk": ["1", '"yes"'],
}  # fmt: skip
SAMPLING = {
    "stop": ['""', '["a", ""]', '"\\ud800"', "5", "[5]", json.dumps(["a"] * 17)],
    "temperature": ["NaN", "1e400", "-1", "true", '"1"', f"{10**400}"],
    "top_p": ["0", "1.1", "NaN"], "top_k": ["-2", "1.0"], "ignore_eos": ["1"],
    "sampling_seed": [f"{10**24}", "-1", "1e400", "true"], "stop_token_ids": ["[true]", "[-1]"],
    "max_new_tokens": ["-1", "2.0", "100000", "9" * 4300], "min_new_tokens": ["129"],
    "n": ["0", "true", "129"], "min_p": ["1.1"], "frequency_penalty": ["2.5"],
    "presence_penalty": ["-3"], "repetition_penalty": ["0"],
    "logit_bias": ['{"x": 1}', '{"5": 101}', '{"1280": 1}', "[]"], "json_schema": ['"{}"'],
    "regex": ['"a+"'], "stop_regex": ['"a"'], "ebnf": ['"a"'], "structural_tag": ['"a"'],
    "custom_params": ['{"a": 1}'], "no_stop_trim": ["true"],
    "skip_special_tokens": ["false"], "spaces_between_special_tokens": ["false"],
}  # fmt: skip
NEUTRAL = {"return_logprob": False, "logprob_start_len": -1, "image_data": [], "unknown": [1]}
NEUTRAL_SAMPLING = {
    "n": 1, "min_p": 0.0, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
    "repetition_penalty": 1.0, "skip_special_tokens": True, "no_stop_trim": False, "top_k": -1,
    "stop": [], "spaces_between_special_tokens": True, "unknown": {"this": 1},
}  # fmt: skip
BAD_BODIES = {
    "cut": b'{"text":', "null": b"null", "empty": b"", "not UTF-8": b'{"text": "\xff"}',
    "surrogate in a name": b'{"text": "a", "\\ud800": 1}', "bomb": b"[" * 100_000,
    "bomb inside": b'{"text": "a", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "long integer": b'{"text": "a", "x": ' + b"9" * 5000 + b"}",
}  # fmt: skip


def refused() -> Iterator[Any]:
    for name, value in ((name, value) for name, values in FIELDS.items() for value in values):
        prompt = "" if name in ("text", "input_ids") else '"text": "a", '
        yield pytest.param(f'{{{prompt}"{name}": {value}}}', name, id=f"{name}={value[:20]}")
    for name, value in ((name, value) for name, values in SAMPLING.items() for value in values):
        body = f'{{"text": "a", "sampling_params": {{"{name}": {value}}}}}'
        yield pytest.param(body, f"sampling_params.{name}", id=f"{name}={value[:20]}")


@pytest.mark.parametrize(("body", "name"), list(refused()))
def test_refused_field(body: str, name: str, served: Served) -> None:
    assert_error(served.client.post("/generate", content=body), 400, name)


def test_too_long_is_refused_with_the_numbers(served: Served) -> None:
    response = served.generate(input_ids=[5] * 20481)
    assert_error(response, 400, "input_ids", "20481", "20480")
    response = served.generate(input_ids=[5] * 4000, sampling_params={"max_new_tokens": 97})
    assert_error(response, 400, "sampling_params.max_new_tokens", "4000", "97", "4097", "4096")


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
def test_refused_body(body: bytes, served: Served) -> None:
    assert_error(served.client.post("/generate", content=body), 400, None)


def test_other_content_type_is_refused_with_advice(served: Served) -> None:
    response = served.client.post("/generate", content="{}", headers={"Content-Type": "text/plain"})
    assert_error(response, 400, None, "application/json")


def test_what_asks_for_nothing_is_accepted(served: Served) -> None:
    plain = served.generate(text=PROMPT, sampling_params=GREEDY).json()["text"]
    body = NEUTRAL | {"text": PROMPT, "sampling_params": GREEDY | NEUTRAL_SAMPLING}
    assert served.generate(**body).json()["text"] == plain
    null = {"text": PROMPT, "sampling_params": dict.fromkeys(SAMPLING) | GREEDY}
    assert served.generate(**dict.fromkeys(FIELDS) | null).json()["text"] == plain


@pytest.mark.parametrize("route", ["GET /x 404", "GET /generate 405", "PUT /health 405"])
def test_no_such_route(route: str, served: Served) -> None:
    method, path, status = route.split()
    assert_error(served.client.request(method, path), int(status), None)


@BOTH_WAYS
@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_disconnect_frees_the_pages(
    when: str, stream: bool, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = served.engine.scheduler
    monkeypatch.setattr(scheduler, "max_num_seqs", 1)
    monkeypatch.setattr(scheduler, "max_num_batched_tokens", 1 if when == "prefill" else 8192)
    body = {"input_ids": IDS * 100, "sampling_params": ENDLESS, "stream": stream}
    with served.send(**body) as connection:
        wait_until(lambda: scheduler.running and scheduler.running[0].num_computed_tokens > 2)
        assert not stream or connection.recv(12) == b"HTTP/1.1 200"
        if when == "queued":
            with served.send(**body):
                wait_until(lambda: scheduler.waiting)
            wait_until(lambda: not scheduler.waiting)
            assert len(scheduler.running) == 1
    wait_until(lambda: served.idle)


class Panic(BaseException):
    """As pyo3's PanicException, which a tokenizer may raise."""


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_failing_engine_answers_503(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error("out of order")

    with serving() as served, ThreadPoolExecutor(2) as pool:
        assert served.client.get("/health").json() == {"status": "ok"}
        bodies = [{"text": "a", "sampling_params": ENDLESS, "stream": s} for s in (False, True)]
        running = [pool.submit(served.generate, **body) for body in bodies]
        wait_until(lambda: len(served.engine.scheduler.running) == 2)
        monkeypatch.setattr(served.engine.runner, "execute", fail)
        assert_error(running[0].result(), 500, None, "engine has failed")
        assert running[0].result().headers["x-should-retry"] == "false"
        assert events(running[1].result())[-1] == running[0].result().json()
        for response in (*(served.generate(**b) for b in bodies), served.client.get("/health")):
            assert_error(response, 503, None, "engine has failed")


def test_shutdown_lets_a_request_finish() -> None:
    with serving() as served, ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.generate, text="a", sampling_params=GREEDY, stream=True)
        wait_until(lambda: served.engine.scheduler.running)
        served.stop()
        assert events(running.result())[-1]["meta_info"]["completion_tokens"] == 24
        with pytest.raises(httpx.ConnectError):
            served.client.get("/health")


@BOTH_WAYS
def test_shutdown_aborts_what_outlasts_the_grace(stream: bool) -> None:
    with serving(grace=0) as served:
        with served.send(text="a", sampling_params=ENDLESS, stream=stream):
            wait_until(lambda: served.engine.scheduler.running)
            served.stop()
        assert served.idle
