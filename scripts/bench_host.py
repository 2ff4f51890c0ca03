"""What the host costs: the real engine, scheduler, detokeniser and server over a model that
computes nothing, on a device that takes its time beside the host, as a GPU does: the engine
launches a step before it reads the one before. Prints a table, and JSON as its last line.

Two processes: the server, and a client on raw sockets that only counts. Throughput is that of 64
streams at once; the time added to a token is that of one stream, less what the device pretends to
take.

    python scripts/bench_host.py --pin        # a core for each process
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minidsv.batch import StepBatch
from minidsv.engine import Engine
from minidsv.engine_config import EngineConfig
from minidsv.runner import LaunchedStep, ModelRunner, StepResult
from minidsv.scheduler import Chunk
from minidsv.server.options import ServerOptions
from minidsv.server.process import serve

PROMPT = [5] * 16
ROWS = 4096
EVENT, DONE = b"data: {", b"data: [DONE]"


class FakeModel:
    """Logits out of a table, by position."""

    def __init__(self, vocab_size: int):
        self.logits = torch.randn(ROWS, vocab_size, generator=torch.Generator().manual_seed(0))

    def greedy(self, step: StepBatch) -> tuple[Tensor, Tensor]:
        logits = self.logits[step.positions[step.logits_index] % ROWS]
        return logits.argmax(-1), logits


def take_time(runner: ModelRunner, seconds: float) -> None:
    """Let steps take `seconds` each, one after the other, from their launch on."""
    execute, free_at = runner.execute, time.perf_counter()

    def slow(chunks: Sequence[Chunk]) -> LaunchedStep:
        nonlocal free_at
        launched = execute(chunks)
        free_at = done_at = max(time.perf_counter(), free_at) + seconds

        def read() -> StepResult:
            time.sleep(max(0, done_at - time.perf_counter()))
            return launched.read()

        return replace(launched, read=read)

    runner.runs_ahead = True
    runner.execute = slow  # type: ignore[method-assign]


class Stream(asyncio.Protocol):
    """One streamed answer: counts its events and notes when each piece of them came."""

    def __init__(self, request: bytes):
        self.request, self.tail = request, b""
        self.events, self.times = 0, list[float]()
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        data = self.tail + data
        count = data.count(EVENT)
        if count:
            self.events += count
            self.times.append(time.perf_counter())
        if DONE in data:
            self.transport.close()
            self.done.set_result(None)
        self.tail = data[data.rfind(b"\n", -len(DONE)) + 1 :][-len(DONE) :]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"cut off after {self.events} events: {error}"))


def request_bytes(path: str, tokens: int) -> bytes:
    sampling = {"ignore_eos": True, "temperature": 0}
    if path == "/generate":
        sampling["max_new_tokens"] = tokens
        body = {"input_ids": PROMPT, "stream": True, "sampling_params": sampling}
    else:
        body = {"model": "tiny", "prompt": PROMPT, "stream": True, "max_tokens": tokens, **sampling}
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def run_streams(port: int, path: str, count: int, tokens: int) -> tuple[float, list[Stream]]:
    """Seconds until `count` streams that begin together have all ended."""
    loop, request = asyncio.get_running_loop(), request_bytes(path, tokens)
    begin = time.perf_counter()
    pairs = await asyncio.gather(
        *(loop.create_connection(lambda: Stream(request), "127.0.0.1", port) for _ in range(count))
    )
    streams = [stream for _, stream in pairs]
    await asyncio.gather(*(stream.done for stream in streams))
    seconds = time.perf_counter() - begin
    wrong = [stream.events for stream in streams if stream.events != tokens]
    if wrong:
        raise RuntimeError(f"{wrong} events came in place of {tokens} a stream")
    return seconds, streams


def serve_fake(port: int, seconds: float, core: int | None) -> None:
    """The server's process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)

    def load() -> Engine:
        engine = Engine(EngineConfig(device="cpu"))
        model: Any = FakeModel(engine.model_config.vocab_size)
        engine.runner.model = model
        take_time(engine.runner, seconds)
        return engine

    sys.exit(serve(load, ServerOptions(port=port, log_level="warning")))


class Server:
    """A server's process, ready inside `with`."""

    def __init__(self, seconds: float, core: int | None):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve_fake, args=(self.port, seconds, core))

    @property
    def cpu_seconds(self) -> float:
        """Taken so far, by all threads."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> "Server":
        self.process.start()
        while self.process.is_alive():
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready")
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server has ended")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()


def throughput(args: argparse.Namespace, core: int | None) -> dict[str, float]:
    """Tokens a second of many streams, and the server's processor time a token."""
    with Server(0, core) as server:
        asyncio.run(run_streams(server.port, args.path, args.connections, 32))
        cpu, runs = server.cpu_seconds, []
        for _ in range(args.repeat):
            run = run_streams(server.port, args.path, args.connections, args.tokens)
            runs.append(asyncio.run(run)[0])
        cpu = server.cpu_seconds - cpu
    total = args.connections * args.tokens
    return {
        "tokens_per_s": total / statistics.median(runs),
        "best_tokens_per_s": total / min(runs),
        "server_us_per_token": 1e6 * cpu / total / args.repeat,
    }


def added(args: argparse.Namespace, core: int | None) -> dict[str, float]:
    """Milliseconds that the host adds to a token of a lone stream, and to its first one."""
    step = args.step_ms / 1e3
    with Server(step, core) as server:
        asyncio.run(run_streams(server.port, args.path, 1, 32))
        between, first = [], []
        for _ in range(args.repeat):
            begin = time.perf_counter()
            _, (stream,) = asyncio.run(run_streams(server.port, args.path, 1, args.tokens))
            times = stream.times
            first.append(times[0] - begin - step)
            between += [b - a - step for a, b in pairwise(times)]
    between.sort()
    return {
        "added_ms": 1e3 * statistics.median(between),
        "added_ms_p99": 1e3 * between[len(between) * 99 // 100],
        "added_ms_first": 1e3 * statistics.median(first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--path", default="/v1/completions", choices=["/v1/completions", "/generate"]
    )
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="a stream")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=5, help="the lone stream's device")
    parser.add_argument("--pin", action="store_true", help="one core for each process")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    core = cores[0] if args.pin else None
    if args.pin:
        os.sched_setaffinity(0, {cores[1]})
    result = throughput(args, core) | added(args, core)
    table = Table("what", "figure")
    for name, label, unit in (
        ("tokens_per_s", f"{args.connections} streams of {args.path}, median", ",.0f} tokens/s"),
        ("best_tokens_per_s", "best run", ",.0f} tokens/s"),
        ("server_us_per_token", "the server's processor time a token", ".1f} us"),
        ("added_ms", f"added to a token of {args.step_ms:g} ms, median", ".2f} ms"),
        ("added_ms_p99", "99 %", ".2f} ms"),
        ("added_ms_first", "added to the first token, median", ".2f} ms"),
    ):
        table.add_row(label, ("{:" + unit).format(result[name]))
    Console().print(table)
    print(json.dumps(vars(args) | {k: round(v, 3) for k, v in result.items()}))


if __name__ == "__main__":
    main()
