"""Streamed /generate beside LLM.generate on one engine: what serving adds to a decode step.

    python scripts/bench_serving.py --model configs/mini.json --load-format random

First `LLM.generate` on as many random prompts; CUDA events around each replay of a graph give the
replay's time and the device's idle time between two. Then the server over the same engine, and a
client in a process of its own (bench_client.py). A streamed answer that is not the one generate
gave fails the run. Only where batches round otherwise, on a GPU, and streams form batches of other
sizes than generate does, may the two part at a near tie, at most TIE apart in log-probability; with
random weights, which make chaos of any rounding (docs/LOG.md), anywhere. Prints a table, and JSON
as its last line; progress goes to standard error.
"""

import faulthandler
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from prometheus_client.parser import text_string_to_metric_families

from minidsv import LLM, SamplingParams
from minidsv.bench import provenance
from minidsv.bench_rig import model_name
from minidsv.cli import engine_options, run_app
from minidsv.engine_config import EngineConfig
from minidsv.graph import DecodeGraphs
from minidsv.llm import CompletionOutput
from minidsv.server.options import ServerOptions
from minidsv.server.process import serve

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
CLIENT = Path(__file__).with_name("bench_client.py")
STUCK_SECONDS = 4  # less than the server waits for its engine's thread
TIE = 0.5  # nats; random prompts leave a trained model unsure
BEST = 20  # tokens among which a tie is looked for
BEGAN = time.monotonic()


def say(message: str) -> None:
    print(f"[{time.monotonic() - BEGAN:5.1f} s] {message}", file=sys.stderr, flush=True)


class TimedGraph:
    """A captured graph with an event before and behind each replay."""

    def __init__(self, graph: torch.cuda.CUDAGraph, replays: list[tuple[Any, Any]]):
        self._graph, self._replays = graph, replays

    def replay(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        self._replays.append((begin, end))


@dataclass
class Result:
    """Medians in microseconds; None without graphs."""

    concurrency: int
    replay_us: float | None
    idle_share: float | None  # of the time from one replay's begin to the next one's
    generate_us: float  # a step of LLM.generate, wall clock
    itl_us: float  # of the streams, one token to the next
    itl_p99_us: float
    tokens_per_s: float  # of all streams
    different: int  # streamed answers that are not generate's
    widest_tie: float | None  # nats between the tokens where they part, at most; None: not held


def timed(graphs: DecodeGraphs | None) -> list[tuple[Any, Any]]:
    """The replays from now on."""
    replays: list[tuple[Any, Any]] = []
    if graphs is not None:
        for key, graph in graphs.graphs.items():
            graphs.graphs[key] = TimedGraph(graph, replays)  # type: ignore[assignment]
    return replays


def replay_and_idle(replays: list[tuple[Any, Any]]) -> tuple[float | None, float | None]:
    """(median us of a replay, share of the time between replays in which none runs)."""
    if len(replays) < 3:
        return None, None
    torch.cuda.synchronize()
    steady = replays[1:]
    run = statistics.median(1e3 * begin.elapsed_time(end) for begin, end in steady)
    gaps = [1e3 * one[1].elapsed_time(two[0]) for one, two in pairwise(steady)]
    idle = statistics.median(gaps)
    return run, idle / (run + idle)


def prompts_for(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = random.Random(count)
    return [[generator.randrange(3, vocab_size) for _ in range(length)] for _ in range(count)]


def gap(got: list[int], want: CompletionOutput) -> float:
    """Nats between the first token of `got` that differs and the one in its place; 0: none does.

    `want` has log-probabilities; inf if the token is not among them.
    """
    assert want.logprobs is not None
    for token, better, best in zip(got, want.token_ids, want.logprobs, strict=False):
        if token != better:
            return best[better].logprob - best[token].logprob if token in best else math.inf
    return 0.0


@dataclass
class Answer:
    """One streamed answer."""

    output_ids: list[int]
    times: list[float]  # of each event


class Client:
    """scripts/bench_client.py as a process. Its end, whichever that is, ends the server."""

    def __init__(self, task: dict[str, Any], limit: float):
        self._task, self._limit, self._served = json.dumps(task), limit, threading.Event()
        self._failure = "it was ended with the server"
        self._output = ""
        signal.signal(signal.SIGTERM, self._interrupt)  # until the server has handlers of its own
        self._process = subprocess.Popen(
            [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._output, _ = self._process.communicate(self._task, self._limit)
            code = self._process.returncode
            self._failure = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            self._failure = f"not done after {self._limit:g} s"
            self._process.kill()
        if not self._served.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
        if self._failure and not self._served.wait(STUCK_SECONDS):
            say(f"the client failed ({self._failure}), and the server does not end")
            os._exit(1)

    def _interrupt(self, *_: object) -> None:
        raise self._error()

    def _error(self) -> SystemExit:
        return SystemExit(f"error: the client failed: {self._failure}")

    def end(self) -> None:
        """The server has ended."""
        self._served.set()
        if self._thread.is_alive():
            self._process.kill()

    def answers(self) -> tuple[list[list[Answer]], str]:
        """(the streamed answers of each group, the metrics page). Raises SystemExit."""
        if self._failure:
            raise self._error()
        output = json.loads(self._output)
        return [[Answer(**one) for one in group] for group in output["groups"]], output["metrics"]


def serve_and_ask(
    llm: LLM, bodies: list[list[str]], limit: float
) -> tuple[list[list[Answer]], str]:
    """What `Client.answers` gives. Raises SystemExit if server or client fails or is ended."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    client = Client({"port": port, "groups": bodies, "limit": limit}, limit)
    options = ServerOptions(port=port, log_level="warning", drain_seconds=0)
    try:
        code = serve(lambda: llm.engine, options)
    finally:
        client.end()
    if code:
        raise SystemExit(code)
    return client.answers()


def widest_tie(config: EngineConfig, concurrency: int) -> float:
    """How far apart the tokens may be, in nats, at which streams and generate part."""
    if config.device == "cpu" or concurrency == 1:
        return 0.0
    return math.inf if config.load_format == "random" else TIE


def compared(
    timing: tuple[float | None, float | None, float],
    answers: list[Answer],
    wanted: list[CompletionOutput],
    tie: float,
) -> Result:
    """Streams beside `generate`'s (replay, idle share, step). Raises SystemExit if they part."""
    ties = [gap(answer.output_ids, one) for answer, one in zip(answers, wanted, strict=True)]
    different = sum(a.output_ids != w.token_ids for a, w in zip(answers, wanted, strict=True))
    short = sum(len(a.output_ids) != len(w.token_ids) for a, w in zip(answers, wanted, strict=True))
    if short:
        raise SystemExit(f"{short} of {len(ties)} streamed answers are not as long as generate's")
    if max(ties) > tie:
        raise SystemExit(
            f"{different} of {len(ties)} streamed answers differ from generate's, by up to "
            f"{max(ties):.3g} nats where they part"
        )
    gaps = sorted(b - a for answer in answers for a, b in pairwise(answer.times))
    first, last = (f(t for a in answers for t in a.times) for f in (min, max))
    return Result(
        len(answers),
        *timing,
        itl_us=1e6 * statistics.median(gaps),
        itl_p99_us=1e6 * gaps[len(gaps) * 99 // 100],
        tokens_per_s=len(gaps) / (last - first),
        different=different,
        widest_tie=None if tie == math.inf else max(ties),
    )


@app.command(help=__doc__)
@engine_options
def bench_serving(
    *,
    engine: dict[str, Any],
    concurrency: Annotated[list[int], typer.Option(min=1, help="streams at once")] = [1, 8, 64],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(min=1, help="of a random prompt")] = 128,
    tokens: Annotated[int, typer.Option(min=4, help="of an answer")] = 256,
    limit: Annotated[
        float, typer.Option(min=1, help="seconds for the server and its client")
    ] = 300,
) -> None:
    faulthandler.register(signal.SIGTERM, chain=True)  # a run that is cut off says where it stood
    say("building the engine; with a cold cache Triton compiles first")
    llm = LLM(**engine)
    say(f"engine ready: {llm.engine.runner.describe()}")
    runner, model = llm.engine.runner, llm.engine.model_config
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    replays = timed(runner.graphs)
    measured, wanted, times = list[tuple[Any, ...]](), list[list[CompletionOutput]](), list[float]()
    scored = replace(params, logprobs=BEST)
    groups = [prompts_for(count, prompt_tokens, model.vocab_size) for count in concurrency]
    for group in groups:
        llm.generate(group, params)
        replays.clear()
        times.clear()
        llm.generate(group, params, lambda _: times.append(time.perf_counter()))
        steps = times[:: len(group)][tokens // 4 :]
        step_us = 1e6 * statistics.median(b - a for a, b in pairwise(steps))
        measured.append((*replay_and_idle(replays), step_us))
        wanted.append([output.outputs[0] for output in llm.generate(group, scored)])
        say(f"generate: concurrency {len(group)} done")
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body = {"stream": True, "sampling_params": sampling}
    bodies = [[json.dumps(body | {"input_ids": ids}) for ids in group] for group in groups]
    answers, page = serve_and_ask(llm, bodies, limit)
    results = [
        compared(timing, streams, want, widest_tie(llm.engine.config, len(streams)))
        for timing, streams, want in zip(measured, answers, wanted, strict=True)
    ]
    report(llm, results, page)


def report(llm: LLM, results: list[Result], page: str) -> None:
    for r in results:
        fields = ", ".join(f"{k} {v:,.4g}" for k, v in asdict(r).items() if v is not None)
        ratio = "" if r.replay_us is None else f", itl / replay {r.itl_us / r.replay_us:.3f}"
        print(fields + ratio)
    counts = {
        sample.name.removeprefix("minidsv:"): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "graph" in sample.name or "decode_steps" in sample.name
    }
    print(f"{llm.engine.runner.describe()}\n{counts}")
    config = llm.engine.config
    about = provenance(config.device) | {"command": " ".join(["python", *sys.orig_argv[1:]])}
    result = {"kind": "serving", **about, "model": model_name(config), "metrics": counts}
    print(json.dumps(result | {"results": [asdict(r) for r in results]}))


if __name__ == "__main__":
    run_app(app)
