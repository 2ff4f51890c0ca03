"""Metrics: vLLM's names under `minidsv:`, kept by prometheus-client in a registry of our own."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from minidsv.engine import EngineStats
from minidsv.server.engine_loop import Step
from minidsv.server.exchange import Run

LATENCIES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 900
)  # fmt: skip
COUNTS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))

# Read off the engine when somebody asks: name, help, field of EngineStats, kind.
ENGINE_METRICS: tuple[tuple[str, str, str, type[Any]], ...] = (
    ("num_requests_running", "Requests that run.", "running", GaugeMetricFamily),
    ("num_requests_waiting", "Requests that wait.", "waiting", GaugeMetricFamily),
    ("kv_cache_usage_perc", "Share of pages in use, 0 to 1.", "kv_cache_usage", GaugeMetricFamily),
    (
        "prefix_cache_queries",
        "Prompt tokens looked up.",
        "prefix_cache_queries",
        CounterMetricFamily,
    ),
    ("prefix_cache_hits", "Prompt tokens found.", "prefix_cache_hits", CounterMetricFamily),
    ("num_preemptions", "Requests that lost their pages.", "preemptions", CounterMetricFamily),
    ("decode_steps", "Steps of one token a request.", "decode_steps", CounterMetricFamily),
    ("cuda_graph_steps", "Those that replayed a graph.", "graph_steps", CounterMetricFamily),
    ("cuda_graph_rows", "Rows computed by graphs.", "graph_rows", CounterMetricFamily),
    (
        "cuda_graph_padding_rows",
        "Those of them that were no request's.",
        "padding_rows",
        CounterMetricFamily,
    ),
)


class _EngineCollector:
    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self._model_name, self._stats = model_name, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, help, field, kind in ENGINE_METRICS:
            family = kind(f"minidsv:{name}", help, labels=["model_name"])
            family.add_metric([self._model_name], getattr(stats, field))
            yield family


class Metrics:
    """Counts requests and tokens, and times requests; of the event loop."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]):
        self._registry, self._model_name = CollectorRegistry(), model_name
        self._registry.register(_EngineCollector(model_name, stats))
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._success = self._counter("request_success", "Requests that ended.", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Calls refused.", "reason")
        self._first = self._seconds("time_to_first_token_seconds", "Arrival to first token.")
        self._between = self._seconds("inter_token_latency_seconds", "One token to the next.")
        self._whole = self._seconds("e2e_request_latency_seconds", "Arrival to last token.")
        self._queue = self._seconds("request_queue_time_seconds", "Arrival to first step.")
        self._prefill = self._seconds("request_prefill_time_seconds", "First step to first token.")
        self._decode = self._seconds("request_decode_time_seconds", "First token to last.")
        self._step_tokens = self._counts("iteration_tokens_total", "Tokens computed in a step.")
        self._n = self._counts("request_params_n", "Outputs asked for of a prompt.")
        self._max_tokens = self._counts("request_params_max_tokens", "max_tokens of requests.")

    def page(self, accept: str) -> tuple[bytes, str]:
        """All of it in the format that the Accept header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    @property
    def generated(self) -> float:
        """Tokens generated so far."""
        labels = {"model_name": self._model_name}
        return self._registry.get_sample_value("minidsv:generation_tokens_total", labels) or 0

    def rejected(self, reason: str) -> None:
        self._rejections.labels(self._model_name, reason).inc()

    def admitted(self, run: Run) -> None:
        self._max_tokens.observe(run.request.max_tokens)
        if run.request.index == 0:
            self._n.observe(run.request.params.n)

    def ended(self, reason: str) -> None:
        self._success.labels(self._model_name, reason).inc()

    def started(self, run: Run, began: float) -> None:
        run.started = began
        self._queue.observe(began - run.exchange.arrived)

    def stepped(self, step: Step) -> None:
        if step.num_tokens:  # else it only read what an earlier one computed
            self._step_tokens.observe(step.num_tokens)
        self._generation_tokens.inc(sum(len(output.token_ids) for output in step.outputs))

    def output(self, run: Run, now: float, finished: bool) -> None:
        """`run` got an output at `now`."""
        if run.first is None or run.last is None:
            run.first = now
            self._first.observe(now - run.exchange.arrived)
            self._prefill.observe(now - (run.started or now))
            if run.request.index == 0:  # as in a usage: once a prompt, whatever n is
                self._prompt_tokens.inc(len(run.request.prompt_token_ids))
        else:
            self._between.observe(now - run.last)
        run.last = now
        if finished:
            self._whole.observe(now - run.exchange.arrived)
            self._decode.observe(now - run.first)
            self.ended(run.request.finish_reason or "abort")

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        names = ["model_name", *labels]
        counter = Counter(f"minidsv:{name}", help, names, registry=self._registry)
        return counter if labels else counter.labels(self._model_name)

    def _seconds(self, name: str, help: str) -> Histogram:
        return self._histogram(name, help, LATENCIES)

    def _counts(self, name: str, help: str) -> Histogram:
        return self._histogram(name, help, COUNTS)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"minidsv:{name}"
        histogram = Histogram(full, help, ["model_name"], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)
