"""The eval's command line and servers. Items and records: test_eval_items."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

from test_eval_items import invoke, items_of, write_csv

import eval_items
import eval_records
import eval_scoring
import eval_sources
from eval_backends import HTTPOptions
from eval_http import HTTPBackend
from eval_run import Settings, run
from minidsv.errors import ConfigError
from served import Served, serving
from stub_server import Fault, stub_server


def last_json(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def test_a_server_that_stumbles(tmp_path: Path) -> None:
    """429, 5xx and a dead line are tried again; nothing of it counts as wrong."""
    path = write_csv(tmp_path / "q.csv", 4)
    prompts = [i.prompt for i in items_of(tmp_path)]
    again = {"Retry-After": "0"}
    faults = {prompts[0]: [Fault(429, again), Fault(503, again)], prompts[1]: [Fault(hang_up=True)]}
    with stub_server(answer=lambda _: "Answer: A", faults=faults) as stub:
        common = ("--csv", str(path), "--base-url", stub.url, "--model", "stub")
        result = invoke(*common, "--api-key", "k", "--max-tokens", "7", "--repeats", "24")
    assert result.exit_code == 0, result.stderr
    assert last_json(result)["accuracy"] == pytest.approx(0.25)
    assert last_json(result)["errors"] == 0
    assert {b["max_tokens"] for b in stub.bodies} == {7}
    assert {h["authorization"] for h in stub.headers} == {"Bearer k"}


@pytest.mark.parametrize("status", [400, 500])
def test_requests_that_fail(status: int, tmp_path: Path) -> None:
    """They end the run, or are left out and counted; a rerun asks for them again."""
    path, records = write_csv(tmp_path / "q.csv", 6), tmp_path / "r.jsonl"
    bad = items_of(tmp_path)[2].prompt
    with stub_server(answer=lambda _: "Answer: A", faults={bad: [Fault(status)] * 2}) as stub:
        common = ("--csv", str(path), "--base-url", stub.url, "--model", "stub", "--retries", "0")
        common = (*common, "--records", str(records), "--concurrency", "1")
        stopped = invoke(*common)
        assert stopped.exit_code == 3
        assert f"{status}: " in stopped.stderr
        assert "rec2" in stopped.stderr
        other = invoke(*common, "--max-tokens", "5")
        assert other.exit_code == 2
        assert "max_tokens is 4096 there and 5 here" in other.stderr
        counted = invoke(*common[:-4], "--max-errors", "1")
        assert counted.exit_code == 3
        assert last_json(counted)["errors"] == pytest.approx(1 / 6)
        assert last_json(counted)["items"] == 5
        assert invoke(*common).exit_code == 0


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(load_format="auto", num_pages=200) as live:
        yield live


def test_our_own_server_scores_as_the_engine_does(served: Served) -> None:
    url = str(served.client.base_url)
    result = invoke("parity", "--a", url, "--b", "device=cpu", "--limit", "6", "--tier", "fp32")
    assert result.exit_code == 0, result.output
    assert last_json(result)["divergences"] == 0
    refused = invoke("parity", "--a", url, "--b", url)
    assert refused.exit_code == 2
    assert "--tier" in refused.stderr


def test_scores_by_echo(served: Served) -> None:
    """A choice's score is the same from the best tokens, over HTTP and in process."""
    backends = [
        HTTPBackend(str(served.client.base_url) + "/v1/", HTTPOptions()),
        eval_sources.read_conf("device=cpu", HTTPOptions()).open(),
        eval_sources.read_conf("transformers", HTTPOptions()).open(),
    ]
    problem = next(p for p in eval_items.bundled_problems(0) if p.topic == "facts")
    (item,) = eval_items.make_items([problem], 1)
    rows = [[b.score(item.prompt, choice) for choice in eval_scoring.CHOICES] for b in backends]
    file = eval_records.RecordFile(None, {})
    run([item], backends[1], Settings("loglikelihood", top_logprobs=1280), file)
    rows.append(list(file.records[item.key].scores or ()))
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], abs=1e-4)
    long = [
        b.score("Question: What is the capital of Italy?\nAnswer:", " Rome\n") for b in backends
    ]
    assert long[1:] == pytest.approx([long[0]] * 2, abs=1e-4)
    for backend in backends:
        backend.close()


def test_chat(served: Served, tmp_path: Path) -> None:
    """Generative over /v1/chat/completions; scores of choices cannot be had there."""
    path, url = write_csv(tmp_path / "q.csv", 3), str(served.client.base_url)
    result = invoke("--csv", str(path), "--base-url", url, "--chat", "--max-tokens", "4")
    assert result.exit_code == 0, result.stderr
    assert last_json(result)["truncated"] + last_json(result)["no_answer"] > 0
    refused = invoke("--base-url", url, "--chat", "--limit", "2")
    assert refused.exit_code == 3
    assert "--chat" in refused.stderr


def test_the_bundled_run(tmp_path: Path) -> None:
    args = ("--limit", "8", "--seed", "2", "--records", str(tmp_path / "r.jsonl"))
    result = invoke(*args)
    assert result.exit_code == 0, result.stderr
    found = last_json(result)
    assert (found["accuracy"], found["items"]) == (1.0, 8)
    assert sum(topic["items"] for topic in found["topics"].values()) == 8
    first = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[1])
    assert sorted(first["order"]) == [0, 1, 2, 3]
    assert invoke("--limit", "8", "--protocol", "generative", "--max-tokens", "4").exit_code == 0
    assert invoke("--limit", "4", "--min-accuracy", "1.01").exit_code == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--engine", "colour=red"], ["colour=red", "kv_cache_dtype"]),
        (["--engine", "num_pages=many"], ["num_pages", "'many'", "integer"]),
        (["--engine", "device=cpu,device=cpu"], ["device", "twice"]),
        (["--engine", "kv_cache_dtype=int3"], ["kv_cache_dtype", "'int3'"]),
        (["--engine", "model=/nowhere"], ["/nowhere"]),
        (["--temperature", "1"], ["--temperature", "loglikelihood"]),
        (["--engine", "device=cpu", "--base-url", "http://x"], ["--engine", "--base-url"]),
        (["--chat"], ["--chat", "--base-url"]),
        (["--base-url", "http://x", "--api-key", "ключ"], ["--api-key", "ASCII"]),
        (["parity", "--a", "device=cpu", "--b", "device=cuda:9"], ["device", "cuda:9"]),
        (["parity", "--a", "device=cpu", "--b", "pdl=on"], ["pdl", "'on'"]),
        (["parity", "--a", "device=cpu", "--b", "transformers=/nowhere"], ["/nowhere"]),
    ],
)
def test_refusals_come_before_the_first_item(args: list[str], words: list[str]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words)
    assert not result.stdout


def test_no_server(tmp_path: Path) -> None:
    result = invoke("parity", "--a", "device=cpu", "--b", "http://127.0.0.1:9", "--retries", "0")
    assert result.exit_code == 3
    assert "127.0.0.1:9" in result.stderr


def test_conf_values() -> None:
    config = eval_sources.engine_config(" device=cpu, num_pages=7 ,enable_prefix_caching=false")
    assert (config.device, config.num_pages, config.enable_prefix_caching) == ("cpu", 7, False)
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        eval_sources.engine_config("enable_prefix_caching=no")


CHOICE = {"text": "Answer: A", "finish_reason": "stop"}
LOGPROBS = {"tokens": [" A"], "token_logprobs": [-1.0], "top_logprobs": [{" A": -1.0}]}
MALFORMED = [
    {},
    {"choices": []},
    {"choices": ["x"]},
    {"choices": [{"text": None}]},
    {"choices": [CHOICE]},
    {"choices": [CHOICE | {"logprobs": LOGPROBS | {"tokens": []}}]},
    {"choices": [CHOICE | {"logprobs": LOGPROBS | {"token_logprobs": [math.nan]}}]},
    {"choices": [CHOICE | {"logprobs": LOGPROBS | {"top_logprobs": [{" A": "-1"}, 5]}}]},
]


@pytest.mark.parametrize("answer", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_answers_are_errors_not_letters(answer: Any, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "q.csv", 2)
    fault = Fault(200, content=json.dumps(answer).encode())
    prompts = [
        i.prompt for i in eval_items.make_items(eval_items.read_gpqa(path, "loglikelihood"), 1)
    ]
    with stub_server(faults={prompt: [fault] for prompt in prompts}) as stub:
        result = invoke(
            *("--csv", str(path), "--base-url", stub.url, "--model", "stub", "--retries", "0"),
            *("--protocol", "loglikelihood"),
        )
    assert result.exit_code == 3
    assert stub.url in result.stderr or "logprobs" in result.stderr


def test_a_prompt_that_the_engine_refuses_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "q.csv", 3, Question="word " * 30000)
    result = invoke("--csv", str(path), "--protocol", "loglikelihood", "--max-errors", "1")
    assert result.exit_code == 3
    assert last_json(result)["items"] == 2
    assert "too many" in last_json(result)["last_error"]


def test_an_unwritable_file_is_no_red_verdict(tmp_path: Path) -> None:
    for args in (["--records", str(tmp_path)], ["parity", "--a", "", "--b", "", "--out", "/no/x"]):
        result = invoke(*args, "--limit", "1")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
