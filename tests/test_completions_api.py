"""POST /v1/completions on a live server with the bundled model: the scenarios of real clients."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from minidsv.engine import Engine
from served import Served, assert_error, events, serving, wait_until

IRON = "Question: What is the chemical symbol of iron?\nAnswer:"
ITALY = "Question: What is the capital of Italy?\nAnswer:"
LONG = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(load_format="auto") as running:
        yield running


@pytest.fixture(scope="module")
def engine(served: Served) -> Engine:
    return served.engine


def complete(served: Served, **body: Any) -> dict[str, Any]:
    response = served.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(served: Served, **body: Any) -> list[dict[str, Any]]:
    return events(served.client.post("/v1/completions", json=body | {"stream": True}))


def joined(chunks: list[dict[str, Any]], choices: int = 1) -> list[str]:
    """The texts of a stream by choice; the numbers run without a gap."""
    texts = [""] * choices
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists"])
def test_prompt_forms(form: str, served: Served, engine: Engine) -> None:
    ids = [engine.tokenizer.encode(text) for text in (IRON, ITALY)]
    prompt = {"text": IRON, "texts": [IRON, ITALY], "ids": ids[0], "lists": ids}[form]
    answer = complete(served, prompt=prompt, temperature=0)
    want = [" Fe", " Rome"][: len(answer["choices"])]
    assert [choice["text"] for choice in answer["choices"]] == want
    assert len(want) == (2 if form in ("texts", "lists") else 1)
    assert answer["model"] == "tiny"


def test_several_prompts_and_choices(served: Served) -> None:
    body = {"prompt": [IRON, ITALY], "n": 2, "max_tokens": 3, "seed": 5, "ignore_eos": True}
    answer = complete(served, **body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    usage = {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42}
    assert answer["usage"] == usage | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert joined(stream(served, **body), 4) == [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}], ids=str)
@pytest.mark.parametrize("running", [False, True], ids=["", "continuous"])
def test_stream(options: dict[str, Any] | None, running: bool, served: Served) -> None:
    if running:
        options = (options or {}) | {"continuous_usage_stats": True}
    plain = complete(served, prompt=ITALY, **LONG)
    chunks = stream(served, prompt=ITALY, **LONG, stream_options=options)
    total = plain["usage"]
    if (options or {}).get("include_usage"):
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == ([], total)
        assert running or all(chunk["usage"] is None for chunk in chunks)
    if running:
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == list(range(1, 25))
        assert chunks[-1]["usage"] == total
    assert len(chunks) == 24, "one event a step"
    assert joined(chunks) == [plain["choices"][0]["text"]]
    assert {chunk["object"] for chunk in chunks} == {plain["object"]} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * 23 + ["length"]


def stops(text: str) -> list[list[str]]:
    """Stop strings of a text: inside, over several tokens, overlapping, its end, none of it."""
    return [[text[5:7]], [text[3:14]], [text[4:12], text[6:9]], [text[-3:]], ["\0"]]


@pytest.mark.parametrize("echo", [False, True], ids=["", "echo"])
def test_stop_strings(echo: bool, served: Served) -> None:
    full = complete(served, prompt=IRON, **LONG)["choices"][0]["text"]
    for stop in stops(full):
        ends = [(full.find(word) + len(word), full.find(word)) for word in stop if word in full]
        want = full[: min(ends)[1]] if ends else full
        body = LONG | {"prompt": [IRON], "stop": stop, "n": 2, "echo": echo}
        answer = complete(served, **body)
        assert [c["text"] for c in answer["choices"]] == [IRON * echo + want] * 2
        assert joined(stream(served, **body), 2) == [IRON * echo + want] * 2
        for choice in answer["choices"]:
            assert choice["finish_reason"] == ("stop" if ends else "length")
            assert choice["stop_reason"] in (stop if ends else [None])


@pytest.mark.parametrize("seed", range(4))
def test_broken_characters(seed: int, served: Served) -> None:
    """Noise from the byte tokens: a stream joins to the whole, however it decodes."""
    bias = {str(served.engine.tokenizer.token_id(byte)): 60 for byte in "ðŁĺĢÃ¶"}
    body = {"prompt": IRON, "temperature": 2, "seed": seed, "logit_bias": bias, "max_tokens": 9}
    plain = complete(served, **body)["choices"][0]["text"]
    assert "\ufffd" in plain
    assert joined(stream(served, **body)) == [plain]


def test_a_cut_character_comes_last(served: Served) -> None:
    first_byte = served.engine.tokenizer.token_id("ð")
    body = {"prompt": "", "temperature": 0, "logit_bias": {str(first_byte): 100}, "max_tokens": 2}
    *before, last = [chunk["choices"][0]["text"] for chunk in stream(served, **body)]
    assert "\ufffd" not in "".join(before)
    assert "\ufffd" in last
    assert complete(served, **body)["choices"][0]["text"] == "".join(before) + last


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_scoring_counts_the_token_behind_the_prompt(
    ignore_eos: bool, served: Served, engine: Engine
) -> None:
    """What lm-eval slices: prompt + 1 entries, though the generated token is EOS."""
    ids = engine.tokenizer.encode(IRON + " Fe")
    body = {"prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    choice = complete(served, **body, ignore_eos=ignore_eos)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(ids) + 1}
    assert logprobs["tokens"][-1] == engine.tokenizer.token_text(engine.eos_token_ids[-1])
    assert choice["finish_reason"] == ("length" if ignore_eos else "stop")
    scored = [len(ids) - 1]
    assert all(
        logprobs["token_logprobs"][i] == max(logprobs["top_logprobs"][i].values()) for i in scored
    )
    alone = complete(served, **body | {"max_tokens": 0})["choices"][0]["logprobs"]
    for name, values in alone.items():
        assert values == logprobs[name][:-1]


def test_a_prompt_alone_streams_as_one_event(served: Served) -> None:
    body = {"prompt": [IRON, ITALY], "max_tokens": 0, "echo": True, "logprobs": 1}
    whole = complete(served, **body)["choices"]
    chunks = stream(served, **body, stream_options={"include_usage": True})
    assert [chunk["choices"] for chunk in chunks] == [[choice] for choice in whole] + [[]]
    assert chunks[-1]["usage"]["completion_tokens"] == 0


def test_cached_tokens(served: Served) -> None:
    def cached(**body: Any) -> int:
        answer = complete(served, prompt=[[9] * 200], max_tokens=1, **body)
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(), cached(), cached(cache_salt="mine"), cached(cache_salt="mine")] == [
        0, 192, 0, 192
    ]  # fmt: skip


def test_a_stream_waits_for_the_scores_of_its_prompt(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second choice has its prompt in the cache; the first one must compute it to score it."""
    monkeypatch.setattr("minidsv.scheduler.MAX_LOGIT_ROWS", 16)
    body = {"prompt": [[9] * 100], "max_tokens": 2, "ignore_eos": True, "n": 2}
    complete(served, **body)
    body |= {"echo": True, "logprobs": 0, "temperature": 0}
    whole = complete(served, **body)["choices"]
    chunks = stream(served, **body)
    for choice in whole:
        parts = [p for c in chunks for p in c["choices"] if p["index"] == choice["index"]]
        tokens = [token for part in parts for token in part["logprobs"]["tokens"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert len(parts) == 2


def test_bodies_that_langchain_sends(served: Served) -> None:
    body = {"model": "tiny", "prompt": [ITALY], "frequency_penalty": 0, "presence_penalty": 0}
    body |= {"max_tokens": 8, "n": 1, "temperature": 0.0, "top_p": 1}
    body |= dict.fromkeys(["seed", "logprobs", "stop", "logit_bias", "stream_options"])
    assert complete(served, **body)["choices"][0]["text"] == " Rome"
    assert joined(stream(served, **body)) == [" Rome"]


def test_seeds_in_a_busy_batch(served: Served) -> None:
    def ask(seed: int) -> str:
        body = {"prompt": f"{seed}", "seed": seed, "temperature": 1.5, "max_tokens": 8}
        return complete(served, **body, ignore_eos=True)["choices"][0]["text"]

    alone = [ask(seed) for seed in range(12)]
    assert len(set(alone)) > 6
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone


ROUTES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}
BOTH_ROUTES = pytest.mark.parametrize("path", ROUTES)
REFUSED = {
    "prompt": ["[1280]", '"\\ud800"', "[true]", "[1.5]", "[]", "[[]]", '["a", [1]]', "[-1]", "7"],
    "messages": ["[]", '"hi"', '[{"role": "tool", "content": "x"}]', '[{"role": "user"}]', "null"],
    "n": ["0", "129"], "temperature": ["NaN", "3", "1e400"], "stop": ['""', '["a", ""]'],
    "seed": [str(10**24)], "max_tokens": ["-1", "99999"], "logit_bias": ['{"a": 1}'],
    "suffix": ['"x"'], "best_of": ["2"], "response_format": ['{"type": "json_object"}'],
    "stream_options": ['{"include_usage": true}'], "top_logprobs": ["2", "21"],
    "tools": ['[{"type": "function", "function": {"name": "f"}}]'], "logprobs": ["6", '"x"'],
    "max_completion_tokens": ["-1", "99999"], "reasoning_effort": ['"high"'],
}  # fmt: skip
ONLY = {
    "/v1/completions": {"prompt", "suffix", "logprobs"},
    "/v1/chat/completions": {
        "messages", "top_logprobs", "tools", "max_completion_tokens", "reasoning_effort"
    },
}  # fmt: skip


def refused() -> Iterator[Any]:
    for path, base in ROUTES.items():
        foreign = set().union(*ONLY.values()) - ONLY[path]
        for name, values in REFUSED.items():
            for value in values if name not in foreign else ():
                fields = {key: json.dumps(default) for key, default in base.items()} | {name: value}
                body = ", ".join(f'"{key}": {text}' for key, text in fields.items())
                yield pytest.param(path, f"{{{body}}}", name, id=f"{path[4:8]}-{name}={value[:20]}")


@pytest.mark.parametrize(("path", "body", "name"), list(refused()))
def test_refused_field(path: str, body: str, name: str, served: Served) -> None:
    response = served.client.post(path, content=body)
    param = response.json()["error"]["param"]
    assert param.split(".")[0].split("[")[0] == name
    assert_error(response, 400, param)


FOREIGN = {
    "/v1/completions": ["return_indexer_topk", "max_completion_tokens", "tools", "top_logprobs",
                        "chat_template_kwargs", "messages", "max_new_tokens", "include_usage"],
    "/v1/chat/completions": ["prompt", "echo", "suffix", "text", "logprob_token_ids"],
    "/generate": ["max_new_tokens", "logprob_token_ids", "echo", "messages", "temperature",
                  "sampling_params.max_tokens", "sampling_params.seed", "best_of"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, names in FOREIGN.items() for name in names]
)
def test_fields_of_other_routes_are_refused(path: str, name: str, served: Served) -> None:
    *parents, last = name.split(".")
    for value, status in (({"x": 3}, 400), (None, 200), ([], 200)):
        fields = {last: value}
        body = (ROUTES | {"/generate": {"text": "a"}})[path]
        body |= dict.fromkeys(parents, fields) if parents else fields
        response = served.client.post(path, json=body | {"unheard_of": 1})
        assert response.status_code == status, response.text
        if status == 400:
            assert_error(response, 400, name, "not supported")


@BOTH_ROUTES
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"prompt": "\xff"}', b"null", b"", b'{"prompt":'], ids=repr
)
def test_refused_body(path: str, content: bytes, served: Served) -> None:
    response = served.client.post(path, content=content)
    assert_error(response, 400, response.json()["error"]["param"])


@BOTH_ROUTES
def test_unknown_model(path: str, served: Served) -> None:
    response = served.client.post(path, json=ROUTES[path] | {"model": "gpt-9"})
    assert_error(response, 404, "model", "'gpt-9'", "'tiny'")


def test_too_long_is_refused_with_the_numbers(served: Served) -> None:
    response = served.client.post("/v1/completions", json={"prompt": [5] * 4090, "max_tokens": 9})
    assert_error(response, 400, "max_tokens", "4090", "4099", "4096")


def test_disconnect_aborts_every_part(served: Served) -> None:
    body = {"prompt": [IRON, ITALY], "n": 2, "max_tokens": 900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        served.client.post("/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: served.idle)
    request = served.client.stream("POST", "/v1/completions", json=body | {"stream": True})
    with request as response:
        next(response.iter_lines())
        assert len(served.engine.scheduler.running) == 4
    wait_until(lambda: served.idle)
