"""What a server tells of its work: metrics, the schema, logs."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from minidsv.server.logs import TextFormatter
from minidsv.server.options import ServerOptions
from served import ENDLESS, SHORT, Served, metrics, serving, wait_until


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


def test_metrics_equal_what_was_answered() -> None:
    with serving(max_num_batched_tokens=8) as served:
        before = metrics(served)
        assert before["num_requests_running"] == before["prompt_tokens_total"] == 0
        answers = [
            served.generate(input_ids=[5] * n, sampling_params=SHORT | {"max_new_tokens": n}).json()
            for n in range(1, 20, 3)
        ]
        after = metrics(served)
    usages = [answer["meta_info"] for answer in answers]
    count, made = len(usages), sum(usage["completion_tokens"] for usage in usages)
    prompts = sum(usage["prompt_tokens"] for usage in usages)
    assert after["prompt_tokens_total"] == prompts
    assert after["generation_tokens_total"] == made
    assert after["request_success_total:length"] == count
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[name] == 0
    for name in (
        "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_params_max_tokens",
    ):  # fmt: skip
        assert after[f"{name}_count"] == count, name
    assert after["inter_token_latency_seconds_count"] == made - count
    # The last token of an answer is never computed.
    assert after["iteration_tokens_total_sum"] == prompts + made - count
    assert after["request_params_max_tokens_sum"] == sum(range(1, 20, 3))
    phases = ("queue_time", "prefill_time", "decode_time")
    whole = sum(after[f"request_{phase}_seconds_sum"] for phase in phases)
    assert whole == pytest.approx(after["e2e_request_latency_seconds_sum"], abs=1e-6)


def test_prompt_of_several_outputs_counts_once(served: Served) -> None:
    before = metrics(served)
    body = {
        "model": "tiny",
        "prompt": [[5] * 7, [6] * 4],
        "n": 3,
        "max_tokens": 2,
        "temperature": 1,
    }
    usage = served.client.post("/v1/completions", json=body).json()["usage"]
    after = metrics(served)
    grown = {name: after[name] - before[name] for name in before}
    assert grown["prompt_tokens_total"] == usage["prompt_tokens"] == 11
    assert grown["generation_tokens_total"] == usage["completion_tokens"]
    assert (grown["request_params_n_count"], grown["request_params_n_sum"]) == (2, 6)


def test_prefix_cache_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving() as served:
        answers = [served.generate(input_ids=[7] * 130, sampling_params=SHORT) for _ in range(2)]
        samples = metrics(served)
    assert samples["prefix_cache_queries_total"] == 2 * 130
    cached = [answer.json()["meta_info"]["cached_tokens"] for answer in answers]
    assert samples["prefix_cache_hits_total"] == sum(cached) == 128
    logged = [r.fields["cached_tokens"] for r in caplog.records if r.msg == "%s %s"]  # type: ignore[attr-defined]
    assert logged == cached


def test_schema_documents_every_error(served: Served) -> None:
    schema = served.client.get("/openapi.json").json()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            missing = {"400", "401", "408", "413", "500", "503"} - operation["responses"].keys()
            assert not missing, path
            assert "422" not in operation["responses"], path


def test_gauges_show_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(max_num_seqs=1) as served:
        body = {"input_ids": [5] * 100, "sampling_params": ENDLESS}
        with served.send(**body), served.send(**body):
            wait_until(lambda: served.engine.scheduler.running and served.engine.scheduler.waiting)
            samples = metrics(served)
            assert samples["num_requests_running"] == samples["num_requests_waiting"] == 1
            assert samples["kv_cache_usage_perc"] > 0


def test_openmetrics_is_served_to_who_asks(served: Served) -> None:
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    response = served.client.get("/metrics", headers=headers)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


def test_one_log_line_a_call(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    secret, headers = "whisper", {"X-Request-Id": "mine"}
    with caplog.at_level(logging.INFO):
        body = {"text": secret, "sampling_params": SHORT, "stream": True}
        served.client.post("/generate", json=body, headers=headers)
        served.client.get("/nowhere?" + secret, headers={"X-Request-Id": "lost"})
        served.client.get("/health")
        wait_until(lambda: len(caplog.records) >= 2)
    first, second = (record for record in caplog.records if record.name == "minidsv.server.logs")
    fields: dict[str, Any] = first.fields  # type: ignore[attr-defined]
    times = [fields.pop(name) for name in ("queue_ms", "ttft_ms", "total_ms")]
    assert times == sorted(times)
    assert times[0] >= 0
    assert first.getMessage() == "POST /generate"
    prompt = len(served.engine.tokenizer.encode(secret))
    assert fields == {
        "id": "mine", "status": 200, "finish": "length",
        "prompt_tokens": prompt, "cached_tokens": 0, "generated_tokens": 4,
    }  # fmt: skip
    assert second.fields | {"total_ms": 0} == {"id": "lost", "status": 404, "total_ms": 0}  # type: ignore[attr-defined]
    assert not any(secret in TextFormatter().format(r) + str(vars(r)) for r in (first, second))


def test_status_lines_only_under_load(caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[dict[str, Any]]:
        return [r.fields for r in caplog.records if r.getMessage() == "status"]  # type: ignore[attr-defined]

    options = ServerOptions(status_seconds=0.05)
    with caplog.at_level(logging.INFO), serving(options) as served:
        time.sleep(0.2)
        assert not lines()
        with served.send(text="a", sampling_params=ENDLESS):
            wait_until(lambda: len(lines()) >= 3)
        wait_until(lambda: served.idle)
    line = lines()[1]
    assert (line["running"], line["waiting"]) == (1, 0)
    assert line["tokens_per_s"] > 0
    assert 0 < line["kv_cache_usage"] <= 1
