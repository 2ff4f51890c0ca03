"""Serving: what the routes share: the engine behind its thread, its name, and who may enter."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from fastapi import Request as HttpRequest

from minidsv.engine import Engine, StepOutput
from minidsv.request import Request
from minidsv.server.engine_loop import EngineLoop
from minidsv.server.errors import ServerError
from minidsv.server.exchange import Exchange, exchange_of
from minidsv.server.options import ServerOptions

RETRY_SECONDS = 5  # what Retry-After tells clients that come too early, too late or too many


class Serving:
    """Lives on the event loop; the engine lives in the EngineLoop's thread."""

    def __init__(self, load: Callable[[], Engine], options: ServerOptions):
        self.options = options
        self._loop = EngineLoop(load, self._from_thread)
        self._exchanges: dict[Request, Exchange] = {}  # of the requests that run

    def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._loop.start()

    def stop(self) -> None:
        """Abort what runs and end the thread; blocks until its step is done."""
        self._loop.stop()

    @property
    def healthy(self) -> bool:
        return self._loop.healthy

    @property
    def engine(self) -> Engine:
        """The loaded engine. Raises ServerError 503 before."""
        if self._loop.engine is None:
            raise unavailable("the model is being loaded")
        return self._loop.engine

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        model = self.engine.config.model
        default = "tiny" if model is None else Path(model).resolve().name
        return self.options.served_model_name or default

    def run(self, http: HttpRequest, requests: Sequence[Request]) -> Exchange:
        """Admit and start all requests of an HTTP call; iterate the result for their outputs.

        Raises ServerError 503 if the server is full, starting or draining. The requests are aborted
        when the call ends, whichever way.
        """
        if not self._loop.healthy:
            raise engine_failed()
        exchange = exchange_of(http)
        exchange.begin(requests, self._abort, http.receive)
        self._exchanges.update(dict.fromkeys(requests, exchange))
        self._loop.add(requests)
        return exchange

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self._exchanges.pop(request, None)
        self._loop.abort(requests)

    def _from_thread(self, outputs: list[StepOutput] | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has closed: a forced exit
            self._events.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[StepOutput] | None) -> None:
        """A step's outputs to their exchanges; None: there will be no more."""
        if outputs is None:
            for exchange in set(self._exchanges.values()):
                exchange.fail(engine_failed())
            return
        for output in outputs:
            exchange = self._exchanges.get(output.request)
            if exchange is not None:
                exchange.push(output)
                if output.finished:
                    del self._exchanges[output.request]


def unavailable(reason: str) -> ServerError:
    return ServerError(503, f"{reason}; try again", headers={"Retry-After": str(RETRY_SECONDS)})


def engine_failed() -> ServerError:
    return ServerError(503, "the engine has failed; see the server's log")
