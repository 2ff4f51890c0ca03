"""Real clients against a live server: the openai package, schemathesis, lm-eval's arithmetic."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from minidsv import LLM, SamplingParams
from minidsv.questions import eval_questions
from served import Served, serving, wait_until

IRON = "Question: What is the chemical symbol of iron?\nAnswer:"
ITALY = "Question: What is the capital of Italy?\nAnswer:"
Score = tuple[float, bool]  # log-likelihood, and whether every token was the best one
CHAT: Any = [{"role": "user", "content": "What is the capital of Italy?"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(load_format="auto", num_pages=128) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    url = f"{served.client.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[IRON, ITALY], n=2, temperature=0, logprobs=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [IRON + " Fe"] * 2 + [ITALY + " Rome"] * 2
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens) == f"<bos>{choice.text}\n"


def test_streamed_completion(client: openai.OpenAI) -> None:
    parameters: Any = {"model": "tiny", "prompt": ITALY, "temperature": 0, "max_tokens": 20}
    plain = client.completions.create(**parameters)
    chunks = list(
        client.completions.create(**parameters, stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = chunks
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert (last.choices, last.usage) == ([], plain.usage)


def test_chat(client: openai.OpenAI) -> None:
    parameters: Any = {"model": "tiny", "messages": CHAT, "temperature": 0}
    answer = client.chat.completions.create(
        **parameters, logprobs=True, top_logprobs=2, max_completion_tokens=8, n=2
    )
    assert [choice.message.content for choice in answer.choices] == [" Rome"] * 2
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert raw == b" Rome\n"
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
    first, *chunks = client.chat.completions.create(**parameters, stream=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " Rome"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"


def test_closing_a_stream_frees_the_pages(client: openai.OpenAI, served: Served) -> None:
    endless: Any = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with client.completions.create(model="tiny", prompt=IRON, stream=True, **endless) as chunks:
        for _, chunk in zip(range(5), chunks, strict=False):
            assert chunk.choices[0].finish_reason is None
    wait_until(lambda: served.idle, seconds=1)


def test_a_timeout_frees_the_pages(client: openai.OpenAI, served: Served) -> None:
    endless: Any = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(model="tiny", prompt=IRON, **endless)
    wait_until(lambda: served.idle, seconds=1)


@pytest.mark.parametrize(
    ("parameters", "error", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"stop": ""}, openai.BadRequestError, "stop"),
        ({"prompt": [5] * 9000}, openai.BadRequestError, "prompt"),
        ({"prompt": [1280]}, openai.BadRequestError, "prompt"),
        ({"temperature": 9}, openai.BadRequestError, "temperature"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
    ],
    ids=str,
)
def test_errors(
    parameters: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
    client: openai.OpenAI,
) -> None:
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "a"} | parameters)
    assert caught.value.param == param  # type: ignore[attr-defined]


def test_bodies_that_langchain_sends(served: Served) -> None:
    """ChatOpenAI names max_completion_tokens alone, and sends nulls."""
    body = {"messages": CHAT, "model": "tiny", "max_completion_tokens": 8, "temperature": 0.0}
    body |= {"stream": False, "n": None, "seed": None, "stop": None, "logprobs": None}
    answer = served.client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == " Rome"


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """Context and continuation of each choice of eight four-choice questions."""
    questions = eval_questions("fact_choice", 8, seed=3)
    return [(question.prompt, f" {letter}\n") for question in questions for letter in "ABCD"]


@pytest.fixture(scope="module")
def scored(pairs: list[tuple[str, str]]) -> list[Score]:
    """Their scores without a server."""
    llm = LLM(device="cpu", num_pages=64)
    scores = []
    for context, continuation in pairs:
        ids = llm.engine.tokenizer.encode(context + continuation)
        first = len(llm.engine.tokenizer.encode(context))
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        known = llm.generate([ids], params)[0].prompt_logprobs
        assert known is not None
        own = [at[token] for at, token in zip(known, ids, strict=True) if at is not None]
        chosen = own[first - 1 :]
        scores.append((sum(e.logprob for e in chosen), all(e.rank == 1 for e in chosen)))
    return scores


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("form", ["ids", "strings"])
def test_lm_eval_scores_four_ways(
    form: str, batch: int, served: Served, pairs: list[tuple[str, str]], scored: list[Score]
) -> None:
    """Log-likelihoods as lm-eval's local-completions asks for them and slices them."""
    encode = served.engine.tokenizer.encode
    prompts = [context + continuation for context, continuation in pairs]
    sent: list[Any] = prompts if form == "strings" else [encode(text) for text in prompts]
    scores = []
    for start in range(0, len(pairs), batch):
        body = {"model": "tiny", "prompt": sent[start : start + batch], "temperature": 0}
        body |= {"max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
        choices = served.client.post("/v1/completions", json=body).json()["choices"]
        for choice, (context, _) in zip(choices, pairs[start:], strict=False):
            scores.append(lm_eval_score(choice["logprobs"], len(encode(context))))
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in scored]
    assert [s for s, _ in scores] == pytest.approx([s for s, _ in scored], rel=1e-4, abs=1e-4)
    for first in range(0, len(pairs), 4):
        assert best(scores[first : first + 4]) == best(scored[first : first + 4])


def lm_eval_score(logprobs: dict[str, Any], context_length: int) -> Score:
    """`LocalCompletionsAPI.parse_logprobs` of lm-eval 0.4.13, in our words."""
    own = logprobs["token_logprobs"][context_length:-1]
    top = logprobs["top_logprobs"][context_length:-1]
    return sum(own), all(mine == max(t.values()) for mine, t in zip(own, top, strict=True))


def best(scores: list[Score]) -> int:
    return max(range(4), key=lambda i: scores[i][0])


def test_schemathesis(tmp_path: Path) -> None:
    """Every route and the codes it documents; short contexts, since fuzzing likes long answers."""
    checks = "not_a_server_error,status_code_conformance"
    with serving(load_format="auto", max_model_len=8) as short:
        command = [sys.executable, "-m", "schemathesis.cli", "run", "--seed=1", "--workers=1"]
        command += [f"{short.client.base_url}/openapi.json", f"--checks={checks}"]
        command += ["--phases=coverage,fuzzing", "--max-examples=10", "--request-timeout=20"]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout[-5000:]
        wait_until(lambda: short.idle)
