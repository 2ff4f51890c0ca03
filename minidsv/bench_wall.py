"""`minidsv bench --wall`: the whole engine by the host's clock, scheduling and text included.

Requests of distinct random prompts arrive at once. Prefill is the time to the last one's first
token, decode the median of the steps in which every request gets one more.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from minidsv.bench import Result
from minidsv.bench_options import BenchOptions
from minidsv.bench_rig import WARMUP, model_name
from minidsv.block_manager import pages_for
from minidsv.engine import Engine
from minidsv.engine_config import EngineConfig
from minidsv.errors import ConfigError
from minidsv.request import Request, SamplingParams


@dataclass(frozen=True)
class WallRow:
    """What was measured of the engine at a batch and context."""

    batch: int
    context: int  # tokens of a prompt
    prefill_ms: float
    us: float  # a decode step

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.us * 1e6


def run(config: EngineConfig, options: BenchOptions) -> Result:
    """Measure and print every row."""
    engine = Engine(config)
    print(f"{engine.runner.describe()}\n{HEADING}", flush=True)
    rows = []
    for batch in options.batches:
        for context in options.contexts:
            row = measure_wall(engine, batch, context, options.timed_steps)
            rows.append(asdict(row) | {"tokens_per_s": row.tokens_per_s})
            print(line(row), flush=True)
    setting: dict[str, Any] = {"model": model_name(engine.config), "engine": asdict(engine.config)}
    setting["replays"] = options.timed_steps
    return Result(engine.config.device, setting | {"rows": rows}, True)


def measure_wall(engine: Engine, batch: int, context: int, replays: int) -> WallRow:
    """Raises ConfigError and RequestError where the engine cannot run such requests together."""
    max_tokens = _most_tokens(engine, batch, context) + WARMUP + replays
    _check_room(engine, batch, context + max_tokens)
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    requests = [engine.make_request(p, params) for p in prompts(engine, batch, context)]
    try:
        start = time.perf_counter()
        for request in requests:
            engine.add(request)
        while not all(request.output_token_ids for request in requests):
            engine.step()
        prefill = time.perf_counter() - start
        steps = [_step_us(engine, requests) for _ in range(WARMUP + replays)]
    finally:
        for request in requests:
            engine.abort(request)
    return WallRow(batch, context, prefill * 1e3, statistics.median(steps[WARMUP:]))


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


def prompts(engine: Engine, batch: int, context: int) -> list[list[int]]:
    """Random and distinct, so that no prefix is shared, also not with another batch or context."""
    generator = torch.Generator().manual_seed(engine.config.seed + batch + (context << 20))
    shape = (batch, context)
    ids: list[list[int]] = torch.randint(
        engine.model_config.vocab_size, shape, generator=generator
    ).tolist()
    return ids


HEADING = f"{'batch':>5} {'context':>8} {'prefill ms':>11} {'us a step':>11} {'tokens/s':>11}"


def line(row: WallRow) -> str:
    return (
        f"{row.batch:5} {row.context:8} {row.prefill_ms:11,.1f} {row.us:11,.1f} "
        f"{row.tokens_per_s:11,.1f}"
    )
