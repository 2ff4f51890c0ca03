"""The client of scripts/bench_serving.py, a process without torch: streams beside each other.

    {"port": 8000, "groups": [[request body]], "limit": seconds} | python scripts/bench_client.py

Waits for the server, warms it up with the first group, streams every group and prints JSON:
{"groups": [[{"output_ids", "times"}]], "metrics": the page}. Its only waits are within `limit`.
"""

import asyncio
import json
import sys
import time
import urllib.request
from typing import Any

DATA, DONE = b"data: ", b"data: [DONE]"
# No proxy from the environment: the server is on this machine.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def say(message: str) -> None:
    print(f"client: {message}", file=sys.stderr, flush=True)


def get(port: int, path: str) -> str:
    with OPENER.open(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return str(response.read().decode())


def wait_until_ready(port: int, limit: float) -> None:
    deadline = time.monotonic() + limit
    while True:
        try:
            get(port, "/ready")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server is not ready after {limit:g} s: {error}") from None
        time.sleep(0.05)


async def stream(port: int, body: str) -> dict[str, Any]:
    """One streamed answer: its tokens and the time of each event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = "POST /generate HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    status = await reader.readline()
    if b" 200 " not in status:
        writer.write_eof()
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(4096))[-300:]!r}")
    times, last = list[float](), b"{}"
    while not (line := await reader.readline()).startswith(DONE):
        if line.startswith(DATA):
            times.append(time.perf_counter())
            last = line[len(DATA) :]
        elif not line:
            raise RuntimeError(f"cut off after {len(times)} events")
    writer.close()
    answer = json.loads(last)
    if "output_ids" not in answer:
        raise RuntimeError(f"the stream ended with {last[:300]!r}")
    return {"output_ids": answer["output_ids"], "times": times}


async def streams(port: int, bodies: list[str]) -> list[dict[str, Any]]:
    return await asyncio.gather(*(stream(port, body) for body in bodies))


async def ask(port: int, groups: list[list[str]], limit: float) -> list[list[dict[str, Any]]]:
    async with asyncio.timeout(limit):
        await streams(port, groups[0])
        say("the server is warm")
        answers = []
        for bodies in groups:
            answers.append(await streams(port, bodies))
            say(f"concurrency {len(bodies)} done")
        return answers


def main() -> None:
    task = json.load(sys.stdin)
    port, limit = task["port"], task["limit"]
    wait_until_ready(port, limit)
    say("the server is ready")
    answers = asyncio.run(ask(port, task["groups"], limit))
    json.dump({"groups": answers, "metrics": get(port, "/metrics")}, sys.stdout)


if __name__ == "__main__":
    main()
