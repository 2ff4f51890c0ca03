"""`minidsv bench --wall`: the whole engine by the host's clock, scheduling and text included.

Requests of distinct random prompts arrive at once. Prefill is the time to the last one's first
token, the median of ROUNDS, decode the median of the steps in which every request gets one more.
Where the engine replays a graph, that graph is timed by events too: what a step takes beyond it,
the device idles, samples or moves the step's rows.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minidsv.bench import Result, shown
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import WARMUP, model_name
from minidsv.bench_timing import times_us
from minidsv.block_manager import pages_for
from minidsv.engine import Engine
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.graph import GraphKey
from minidsv.request import Request, SamplingParams
from minidsv.threads import limit_threads

ROUNDS = 3  # prefills


@dataclass(frozen=True)
class WallRow:
    """What was measured of the engine at a batch and context."""

    batch: int
    context: int  # tokens of a prompt
    prefill_ms: float
    us: float  # a decode step
    graph_us: float | None  # of its graph alone

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.us * 1e6

    @property
    def beside_graph(self) -> float | None:
        """The share of a step in which its graph does not run."""
        return None if self.graph_us is None else 1 - self.graph_us / self.us


def run(config: EngineConfig, options: BenchOptions) -> Result:
    """Measure and print every row."""
    engine = Engine(config)
    limit_threads(engine.config.device, engine.runner.weight_bytes)
    print(f"{engine.runner.describe()}\n{HEADING}", flush=True)
    rows = []
    for batch in options.batches:
        for context in options.contexts:
            row = measure_wall(engine, batch, context, options.timed_steps)
            derived = {"tokens_per_s": row.tokens_per_s, "beside_graph": row.beside_graph}
            rows.append(asdict(row) | derived)
            print(line(row), flush=True)
    setting: dict[str, Any] = {"model": model_name(engine.config), "engine": asdict(engine.config)}
    setting["replays"] = options.timed_steps
    return Result(engine.config.device, setting | {"rows": rows}, True)


def measure_wall(engine: Engine, batch: int, context: int, replays: int) -> WallRow:
    """Raises ConfigError and RequestError where the engine cannot run such requests together."""
    max_tokens = _most_tokens(engine, batch, context) + WARMUP + replays
    _check_room(engine, batch, context + max_tokens)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prefills, steps, graph_us = [], list[float](), None
    for tag in range(ROUNDS):
        ids = prompts(engine, batch, context, tag)
        requests = [engine.make_request(tokens, params) for tokens in ids]
        try:
            prefills.append(_prefill_ms(engine, requests))
            if tag == ROUNDS - 1:
                steps = [_step_us(engine, requests) for _ in range(WARMUP + replays)]
                graph_us = replay_us(engine, requests, replays)
        finally:
            for request in requests:
                engine.abort(request)
    us = statistics.median(steps[WARMUP:])
    return WallRow(batch, context, statistics.median(prefills), us, graph_us)


def _prefill_ms(engine: Engine, requests: list[Request]) -> float:
    start = time.perf_counter()
    for request in requests:
        engine.add(request)
    while not all(request.output_token_ids for request in requests):
        engine.step()
    return (time.perf_counter() - start) * 1e3


def replay_us(engine: Engine, requests: list[Request], replays: int) -> float | None:
    """The graph of the step that the requests have just made, again and again.

    It rewrites the rows of that step with what they hold.
    """
    graphs, longest = engine.runner.graphs, max(r.num_computed_tokens for r in requests)
    if graphs is None:
        return None
    rows = next(size for size in graphs.buckets if size >= len(requests))
    key = GraphKey(rows, 1, next(bound for bound in graphs.bounds if bound >= longest))
    replay = graphs.graphs[key].replay
    return statistics.median(times_us(replay, lambda: None, replays, engine.runner.device))


def _most_tokens(engine: Engine, batch: int, context: int) -> int:
    """Tokens that the first request may get until the last one has its first."""
    return batch * -(-context // engine.config.max_num_batched_tokens) + 1


def _check_room(engine: Engine, batch: int, tokens: int) -> None:
    """Nobody waits or is preempted."""
    most, pages = engine.config.max_num_seqs, batch * pages_for(tokens)
    if batch > most:
        raise ConfigError(f"batch: {batch} is more than max_num_seqs {most}")
    if pages > engine.runner.num_pages:
        raise ConfigError(
            f"num_pages: {batch} requests of up to {tokens} tokens take {pages} pages, and there "
            f"are {engine.runner.num_pages}"
        )


def _step_us(engine: Engine, requests: list[Request]) -> float:
    before = sum(len(request.output_token_ids) for request in requests)
    start = time.perf_counter()
    engine.step()
    us = (time.perf_counter() - start) * 1e6
    gained = sum(len(request.output_token_ids) for request in requests) - before
    assert gained == len(requests), f"a step brought {gained} tokens to {len(requests)} requests"
    return us


def prompts(engine: Engine, batch: int, context: int, tag: int) -> list[list[int]]:
    """Random and distinct, so that no prefix is shared, not with those of another call either."""
    seed = engine.config.seed + tag + (batch << 8) + (context << 24)
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, context)
    ids: list[list[int]] = torch.randint(
        engine.model_config.vocab_size, shape, generator=generator
    ).tolist()
    return ids


HEADING = (
    f"{'batch':>5} {'context':>8} {'prefill ms':>11} {'us a step':>11} {'tokens/s':>11} "
    f"{'us a graph':>11} {'beside it':>9}"
)


def line(row: WallRow) -> str:
    """A row's numbers as they are printed, under HEADING."""
    return (
        f"{row.batch:5} {row.context:8} {row.prefill_ms:11,.1f} {row.us:11,.1f} "
        f"{row.tokens_per_s:11,.1f} {shown(row.graph_us, ',.1f'):>11} "
        f"{shown(row.beside_graph, '.1%'):>9}"
    )
