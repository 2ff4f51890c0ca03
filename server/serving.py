"""Serving: what the routes share: the engine behind its thread, its name, and who may enter."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fastapi import Request as HttpRequest

from minidsv.engine import Engine
from minidsv.errors import MinidsvError
from minidsv.request import Request
from minidsv.server.engine_loop import EngineLoop, Step
from minidsv.server.errors import ServerError, engine_failed, engine_failed_running, unavailable
from minidsv.server.exchange import Exchange, Run, exchange_of
from minidsv.server.metrics import Metrics
from minidsv.server.options import ServerOptions

logger = logging.getLogger(__name__)

DRAIN_POLL_SECONDS = 0.02
LOADING = "the model is being loaded"


class Serving:
    """Lives on the event loop, as does all that it calls; the engine lives in its own thread."""

    def __init__(self, load: Callable[[], Engine], options: ServerOptions):
        self.options = options
        self.draining = False
        self.has_ended = asyncio.Event()  # the engine's thread has ended
        self.error: BaseException | None = None  # what ended it
        self._engine: Engine | None = None
        self._metrics: Metrics | None = None
        self._loop = EngineLoop(load, self)
        self._runs: dict[Request, Run] = {}
        self._queued_tokens: dict[Request, int] = {}  # prompt tokens of requests not yet started

    def start(self) -> None:
        self._loop.start()

    def stop(self) -> None:
        """End the engine's thread; blocks for the rest of its step."""
        if self._engine is not None:
            self._loop.stop()

    @property
    def is_stuck(self) -> bool:
        """After `stop`: the thread is still inside a load or a step."""
        return self._loop.is_alive

    @property
    def is_loaded(self) -> bool:
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The loaded engine. Raises ServerError 503 before it is."""
        if self._engine is None:
            raise unavailable(LOADING)
        return self._engine

    @property
    def metrics(self) -> Metrics:
        """Raises ServerError 503 before the model is loaded."""
        if self._metrics is None:
            raise unavailable(LOADING)
        return self._metrics

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        model = self.engine.config.model
        default = "tiny" if model is None else Path(model).resolve().name
        return self.options.served_model_name or default

    def check_health(self) -> None:
        """Raise ServerError 503 if the engine has failed or its step takes too long."""
        if self.error is not None:
            raise engine_failed()
        if self._loop.step_seconds > self.options.stall_seconds:
            raise unavailable(f"an engine step has run for {self._loop.step_seconds:.1f} s")

    def check_ready(self) -> None:
        """Raise ServerError 503 unless requests may come."""
        self.check_health()
        if self.draining:
            raise unavailable("the server is shutting down")
        if not self.is_loaded:
            raise unavailable(LOADING)

    def run(self, http: HttpRequest, requests: Sequence[Request]) -> Exchange:
        """Admit and start all requests of an HTTP call; iterate the result for their outputs.

        Raises ServerError 503 if the server is full, starting or draining. The requests are aborted
        when the call ends, whichever way.
        """
        self._admit(requests)
        exchange = exchange_of(http)
        exchange.begin(requests, self._abort, http.receive, self.options.request_timeout)
        for run in exchange.runs:
            self._runs[run.request] = run
            self._queued_tokens[run.request] = len(run.request.prompt_token_ids)
            self.metrics.admitted(run)
        self._loop.add(requests)
        return exchange

    async def drain(self, hurry: asyncio.Event) -> None:
        """Refuse what is new, let what runs go on for `drain_seconds` or until `hurry` is set, then
        abort it."""
        self.draining = True
        deadline = time.monotonic() + self.options.drain_seconds
        while self._runs and time.monotonic() < deadline and not hurry.is_set():
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        self._fail_all(unavailable("the server is shutting down"))

    def _admit(self, requests: Sequence[Request]) -> None:
        """Raise ServerError if these may not enter; an empty queue takes prompts of any length."""
        try:
            self.check_ready()
        except ServerError:
            self.metrics.rejected("draining" if self.draining else "unhealthy")
            raise
        most, most_tokens = self.options.max_queued_requests, self.options.max_queued_tokens
        if len(requests) > most:
            message = f"{len(requests)} prompts and outputs in one call; accepted: at most {most}"
            raise ServerError(400, message, "invalid_request_error")
        waiting = len(self._queued_tokens)
        tokens = sum(self._queued_tokens.values())
        tokens += sum(len(request.prompt_token_ids) for request in requests)
        if waiting + len(requests) > most:
            limit = f"{waiting} requests wait of at most {most}"
        elif waiting and tokens > most_tokens:
            limit = f"{tokens} prompt tokens would wait, more than {most_tokens}"
        else:
            return
        self.metrics.rejected("queue_full")
        raise unavailable(f"the queue is full: {limit}")

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            del self._runs[request]
            self._queued_tokens.pop(request, None)
            self.metrics.ended("abort" if self.error is None else "error")
        self._loop.abort(requests)

    def _fail_all(self, error: ServerError) -> None:
        for exchange in {run.exchange for run in self._runs.values()}:
            exchange.fail(error)

    def loaded(self, engine: Engine) -> None:
        self._engine = engine
        self._metrics = Metrics(self.model_name, engine.stats)
        logger.info("ready: %s, %s", self.model_name, engine.runner.describe())

    def stepped(self, step: Step) -> None:
        """Hand a step's outputs to their exchanges, all in one turn of the event loop."""
        for request in step.started:
            if (run := self._runs.get(request)) is not None:
                del self._queued_tokens[request]
                self.metrics.started(run, step.began)
        self.metrics.stepped(step)
        for output in step.outputs:
            run = self._runs.get(output.request)
            if run is None:
                continue  # aborted while the step ran
            self.metrics.output(run, step.ended, output.finished)
            if output.finished:
                del self._runs[output.request]
            run.exchange.push(output)

    def ended(self, error: BaseException | None) -> None:
        self.error = error
        if error is not None and not isinstance(error, MinidsvError):
            logger.error("the engine failed and cannot go on", exc_info=error)
        self._fail_all(engine_failed_running())
        self.has_ended.set()
