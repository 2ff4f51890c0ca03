"""Exchange: one HTTP call from its arrival to its last byte, and the requests that run for it."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import Request as HttpRequest
from starlette.types import Receive

from minidsv.engine import StepOutput
from minidsv.request import Request
from minidsv.server.errors import ServerError


@dataclass(eq=False, slots=True)
class Run:
    """One request of an exchange, and when it got how far (`time.monotonic`)."""

    request: Request
    exchange: "Exchange"
    started: float | None = None  # its first step began
    first: float | None = None  # its first output came
    last: float | None = None  # its newest output came


class Exchange:
    """Outputs of the call's requests on their way to its handler.

    Iterate for lists of StepOutput: all that came since the last turn, of whichever request. The
    iteration ends when every request has, and raises ServerError where that is not to be.
    """

    def __init__(self, request_id: str):
        self.id = request_id
        self.arrived = time.monotonic()
        self.runs: list[Run] = []
        self.error: ServerError | None = None  # what ended it early
        self._unfinished: set[Request] = set()
        self._abort: Callable[[list[Request]], None] = lambda _: None
        self._outputs: list[StepOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def begin(
        self,
        requests: Sequence[Request],
        abort: Callable[[list[Request]], None],
        receive: Receive,
        timeout: float,
    ) -> None:
        """`requests` go to the engine: from here on a disconnect aborts them, and so do `timeout`
        seconds from the call's arrival (0: they never do)."""
        self.runs = [Run(request, self) for request in requests]
        self._unfinished, self._abort = set(requests), abort
        self._watcher = asyncio.create_task(self._watch(receive))
        if timeout:
            left = self.arrived + timeout - time.monotonic()
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(left, self.fail, too_late(timeout))

    def push(self, output: StepOutput) -> None:
        self._outputs.append(output)
        if output.finished:
            self._unfinished.discard(output.request)
        self._wake()

    def fail(self, error: ServerError) -> None:
        """End the call early: what runs is aborted, the handler gets `error` after what came."""
        if self._unfinished:
            self.error = error
            self.close()
            self._wake()

    def close(self) -> None:
        """Abort what still runs; called at the end of every HTTP call."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._unfinished:
            self._abort(list(self._unfinished))
            self._unfinished.clear()

    def __aiter__(self) -> "Exchange":
        return self

    async def __anext__(self) -> list[StepOutput]:
        while not self._outputs:
            if self.error is not None:
                raise self.error
            if not self._unfinished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _watch(self, receive: Receive) -> None:
        """The body has been read, so all that can still come is the end of the connection."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.fail(ServerError(499, "the client has gone"))


def too_late(timeout: float) -> ServerError:
    return ServerError(
        504,
        f"not done within the server's limit of {timeout:g} s",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


def exchange_of(http: HttpRequest) -> Exchange:
    """The exchange that the gate (gate.py) made for this call."""
    exchange: Exchange = http.state.exchange
    return exchange
