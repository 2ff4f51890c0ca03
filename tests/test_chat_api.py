"""POST /v1/chat/completions, and the routes around tokens and models."""

from collections.abc import Iterator
from threading import get_ident
from typing import Any

import pytest

from minidsv import __version__
from minidsv.chat import ChatPrompt
from minidsv.engine import StepOutput
from minidsv.request import Request, SamplingParams
from minidsv.server.chat_completions import ChatChoice, ChatRequest
from served import Served, assert_error, events, serving

ASK = {"role": "user", "content": "What is the capital of Italy?"}
BODY: dict[str, Any] = {"messages": [ASK], "temperature": 0}
BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(load_format="auto") as running:
        yield running


def chat(served: Served, **body: Any) -> dict[str, Any]:
    response = served.client.post("/v1/chat/completions", json=BODY | body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(served: Served, **body: Any) -> list[dict[str, Any]]:
    body = BODY | body | {"stream": True}
    return events(served.client.post("/v1/chat/completions", json=body))


@pytest.mark.parametrize(
    "messages",
    [
        [ASK],
        [ASK | {"content": [{"type": "text", "text": ASK["content"]}]}],
        [{"role": "user", "content": "What is the capital of France?"},
         {"role": "assistant", "content": "Paris"}, ASK],
    ],
    ids=["text", "parts", "turns"],
)  # fmt: skip
def test_messages(messages: list[Any], served: Served) -> None:
    answer = chat(served, messages=messages)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " Rome"}
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    rendered = served.client.post("/tokenize", json={"messages": messages}).json()
    assert answer["usage"]["prompt_tokens"] == rendered["count"] == len(rendered["tokens"])
    assert answer["object"] == "chat.completion"


def test_stream(served: Served) -> None:
    body = {"n": 2, "logprobs": True, "return_token_ids": True, "ignore_eos": True}
    body |= {"max_tokens": 5, "stream_options": {"include_usage": True}}
    body["stream_options"]["continuous_usage_stats"] = True
    whole = chat(served, **body | {"stream_options": None})
    *chunks, last = stream(served, **body)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for want in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == want["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        counts = [c["usage"]["completion_tokens"] for c in chunks if c["choices"] == [parts[0]]]
        assert counts == [0], "the role comes before any token"
        assert len(parts) == 6, "the role, then one a step"
        assert "".join(p["delta"]["content"] for p in parts) == want["message"]["content"]
        assert [t for p in parts for t in p["token_ids"]] == want["token_ids"]
        logprobs = [entry for p in parts for entry in p["logprobs"]["content"]]
        assert logprobs == want["logprobs"]["content"]
        assert [p["finish_reason"] for p in parts] == [None] * 5 + ["length"]


@pytest.mark.parametrize("count", [None, 0, 3])
def test_logprobs(count: int | None, served: Served) -> None:
    body = {"logprobs": True, "top_logprobs": count, "return_token_ids": True}
    choice = chat(served, **body)["choices"][0]
    entries = choice["logprobs"]["content"]
    tokenizer = served.engine.tokenizer
    assert [e["token"] for e in entries] == [tokenizer.token_text(t) for t in choice["token_ids"]]
    for entry in entries:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == (count or 0)
        if count:
            assert entry["top_logprobs"][0]["logprob"] == entry["logprob"], "it is greedy"


def test_bytes_of_broken_characters_join(served: Served) -> None:
    """The display strings lose them, the bytes do not."""
    bias = {str(served.engine.tokenizer.token_id("ð")): 100}
    choice = chat(served, logit_bias=bias, max_tokens=2, logprobs=True)["choices"][0]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["\ufffd"] * 2
    assert [entry["bytes"] for entry in choice["logprobs"]["content"]] == [[0xF0]] * 2


@pytest.mark.parametrize(
    ("pieces", "reasoning", "content"),
    [
        (["I th", "ink</th", "ink> so"], "I think", " so"),
        (["a</think>", "b"], "a", "b"),
        (["never </thi"], "never </thi", ""),
    ],
)
def test_reasoning_is_split(
    pieces: list[str], reasoning: str, content: str, served: Served
) -> None:
    """A prompt that ends in <think>, whole and streamed."""
    request = Request("r", [5], SamplingParams(), seed=0, max_tokens=9)
    prompt = ChatPrompt("<think>", [5], in_reasoning=True)
    choice = ChatChoice(ChatRequest(messages=[ASK]), prompt, request, served.engine.tokenizer)
    deltas = []
    for number, piece in enumerate(pieces, 1):
        request.output_token_ids.append(7)
        output = StepOutput(request, piece, [7], finished=number == len(pieces))
        deltas += [c["delta"] for chunk in choice.chunks(output) for c in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == reasoning
    assert "".join(delta["content"] for delta in deltas) == content
    request.text = "".join(pieces)
    message = choice.whole()["message"]
    assert (message["reasoning_content"], message["content"]) == (reasoning, content)


def test_limits(served: Served) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        assert chat(served, **{name: 1})["choices"][0]["finish_reason"] == "length"
    both = {"max_tokens": 1, "max_completion_tokens": 2}
    response = served.client.post("/v1/chat/completions", json=BODY | both)
    assert_error(response, 400, "max_completion_tokens", "contradict")
    response = served.client.post(
        "/v1/chat/completions", json=BODY | {"max_completion_tokens": 5000}
    )
    assert_error(response, 400, "max_completion_tokens", "5000", "4096")


@BOTH_WAYS
def test_no_template(stream: bool, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine.tokenizer, "chat_template", None)
    response = served.client.post("/v1/chat/completions", json=BODY | {"stream": stream})
    assert_error(response, 400, "messages", "no chat template")


def test_a_template_variable_nobody_reads_is_refused(served: Served) -> None:
    body = BODY | {"chat_template_kwargs": {"thinking": True}}
    response = served.client.post("/v1/chat/completions", json=body)
    assert_error(response, 400, "chat_template_kwargs", "thinking")


def test_continued_message(served: Served) -> None:
    messages = [ASK, {"role": "assistant", "content": "Ro"}]
    body = {"messages": messages, "continue_final_message": True}
    ids = served.client.post("/tokenize", json=body).json()["tokens"]
    assert served.engine.tokenizer.decode(ids).endswith("Answer: Ro")


@pytest.mark.parametrize("text", ["Hello wörld", "", "a <eos> b", "日本"], ids=ascii)
@pytest.mark.parametrize("special", [None, True, False])
def test_tokenize_and_back(text: str, special: bool | None, served: Served) -> None:
    body = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
    answer = served.client.post("/tokenize", json=body).json()
    bos = "" if special is False else "<bos>"
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 4096
    back = served.client.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": bos + text}


def test_spelling_tokens_leaves_the_event_loop_free(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, threads = served.engine.tokenizer, set()
    monkeypatch.setattr(tokenizer, "token_text", lambda _: threads.add(get_ident()) or "x")
    body = {"prompt": "a b", "return_token_strs": True}
    assert set(served.client.post("/tokenize", json=body).json()["token_strs"]) == {"x"}
    assert threads.isdisjoint({served.thread.ident})


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [ASK]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [ASK], "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [1280]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {}, "tokens"),
    ],
    ids=str,
)
def test_token_routes_refuse(path: str, body: dict[str, Any], param: str, served: Served) -> None:
    response = served.client.post(path, json=body)
    assert response.json()["error"]["param"] == param
    assert_error(response, 400, param.removesuffix(".0"))


def test_tokenizer_info(served: Served) -> None:
    """What lm-eval's remote tokenizer needs."""
    info = served.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    assert info["tokenizer_class"]
    assert info["chat_template"]


def test_models_and_version(served: Served) -> None:
    (card,) = served.client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 4096)
    assert served.client.get("/v1/models/tiny").json() == card
    assert_error(served.client.get("/v1/models/a/b"), 404, "model", "'a/b'", "'tiny'")
    assert served.client.get("/version").json() == {"version": __version__}
