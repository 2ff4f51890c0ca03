"""Load on the bundled model: many streams, random aborts, a pool that is too small.

In CI 40 streams and 100 aborts; `--load 10` makes it ten times as many.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest

from builders import prompt
from emulated import emulate_gpu
from minidsv import LLM, SamplingParams
from minidsv.server.options import ServerOptions
from served import Served, metrics, serving, wait_until

TRAINED: dict[str, Any] = {"load_format": "auto", "device": "cpu"}


@pytest.fixture(scope="module")
def scale(request: pytest.FixtureRequest) -> int:
    factor: int = request.config.getoption("--load")
    return factor


@pytest.fixture(scope="module", params=["plain", "as on a GPU"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    options = ServerOptions(max_queued_requests=10**6, max_queued_tokens=10**9)
    with serving(options, **TRAINED, num_pages=256, max_num_batched_tokens=256) as running:
        if request.param == "as on a GPU":
            emulate_gpu(running.engine)
        yield running


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(**TRAINED, num_pages=64)


Job = tuple[list[int], dict[str, Any]]


def job(i: int) -> Job:
    """Prompt and sampling of the i-th request; two of three are greedy."""
    draw = random.Random(i)
    prompt = [draw.randrange(3, 1280) for _ in range(draw.randrange(1, 70))]
    greedy = i % 3 < 2
    return prompt, {
        "max_new_tokens": draw.randrange(4, 20),
        "ignore_eos": True,
        "temperature": 0.0 if greedy else 0.7,
        "sampling_seed": i,
    }


def alone(llm: LLM, jobs: list[Job]) -> list[list[int]]:
    """Tokens of each job, computed one after the other."""
    params = [
        SamplingParams(
            max_tokens=sampling["max_new_tokens"],
            ignore_eos=True,
            temperature=sampling["temperature"],
            seed=sampling["sampling_seed"],
        )
        for _, sampling in jobs
    ]
    outputs = [llm.generate(ids, one)[0] for (ids, _), one in zip(jobs, params, strict=True)]
    return [output.outputs[0].token_ids for output in outputs]


@asynccontextmanager
async def stream(served: Served, **body: Any) -> AsyncIterator[asyncio.StreamReader]:
    """A streamed /generate on a connection of its own; leaving cuts it off."""
    url, content = served.client.base_url, json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = "POST /generate HTTP/1.1\r\nHost: test\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    try:
        yield reader
    finally:
        writer.transport.abort()


async def tokens_of(served: Served, ids: list[int], sampling: dict[str, Any]) -> list[int]:
    async with stream(served, input_ids=ids, sampling_params=sampling) as reader:
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], head
    text = b"".join(body.split(b"\r\n")[1::2])  # size, chunk, size, chunk, ...
    *blocks, done, rest = text.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    last = json.loads(blocks[-1].removeprefix(b"data: "))
    tokens: list[int] = last["output_ids"]
    return tokens


def test_streams_at_once_answer_as_alone(served: Served, llm: LLM, scale: int) -> None:
    jobs = [job(i) for i in range(40 * scale)]

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(tokens_of(served, *one) for one in jobs))

    assert asyncio.run(all_at_once()) == alone(llm, jobs)
    wait_until(lambda: served.idle)


def test_random_aborts_leave_nothing_behind(served: Served, llm: LLM, scale: int) -> None:
    """Streams cut off while they wait, prefill or decode; those beside them notice nothing."""
    undisturbed = [job(1000 + i) for i in range(5 * scale)]

    async def cut_off(i: int) -> None:
        draw = random.Random(i)
        await asyncio.sleep(draw.random() * 2 * scale)
        ids = [draw.randrange(3, 1280) for _ in range(draw.randrange(1, 400))]
        sampling = {"max_new_tokens": 500, "ignore_eos": True}
        async with stream(served, input_ids=ids, sampling_params=sampling) as reader:
            if draw.random() < 0.5:
                await reader.readuntil(b"\n\n")
            await asyncio.sleep(draw.random() * 0.3)

    async def all_at_once() -> list[list[int]]:
        aborts = [asyncio.create_task(cut_off(i)) for i in range(100 * scale)]
        answers = await asyncio.gather(*(tokens_of(served, *one) for one in undisturbed))
        await asyncio.gather(*aborts)
        return answers

    ended = metrics(served).get("request_success_total:abort", 0)
    assert asyncio.run(all_at_once()) == alone(llm, undisturbed)
    wait_until(lambda: served.idle)
    served.engine.scheduler.check()
    after = metrics(served)
    assert after["request_success_total:abort"] - ended == 100 * scale
    assert after["num_requests_running"] == after["num_requests_waiting"] == 0


def test_a_small_pool_preempts_and_answers_the_same(llm: LLM) -> None:
    jobs = [([5 + i] * 56, job(i)[1] | {"max_new_tokens": 16}) for i in range(20)]

    def ask(one: Job) -> Any:
        return small.generate(input_ids=one[0], sampling_params=one[1]).json()["output_ids"]

    with serving(**TRAINED | {"num_pages": 8}) as small, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, jobs))
        assert metrics(small)["num_preemptions_total"] > 0
        wait_until(lambda: small.idle)
    assert answers == alone(llm, jobs)


def test_graphs_and_steps_launched_ahead() -> None:
    """Concurrent answers are those of the plain engine, and /metrics tells what ran on graphs."""
    sampling = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 1.0}
    bodies = [
        {"input_ids": list(ids), "sampling_params": sampling | {"sampling_seed": seed}}
        for seed, ids in enumerate(prompt(n) for n in (62, 50, 63, 60, 10, 47, 130))
    ]
    with serving(max_model_len=600) as served:
        want = [served.generate(**body).json()["text"] for body in bodies]
    with serving(max_model_len=600) as served, ThreadPoolExecutor(len(bodies)) as pool:
        emulate_gpu(served.engine)
        got = [r.json()["text"] for r in pool.map(lambda body: served.generate(**body), bodies)]
        count = metrics(served)
    assert got == want
    assert count["generation_tokens_total"] == 24 * len(bodies)
    assert count["cuda_graph_steps_total"] == count["decode_steps_total"] >= 23
    assert count["cuda_graph_padding_rows_total"] < count["cuda_graph_rows_total"]
