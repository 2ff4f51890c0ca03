"""EngineLoop: the thread that loads the engine and owns it, and its bridge to the event loop."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from minidsv.engine import Engine, StepOutput
from minidsv.request import Request, Status

JOIN_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Step:
    """What one engine step did; times are those of `time.monotonic`."""

    began: float
    ended: float
    started: list[Request]  # left the queue in it
    outputs: list[StepOutput]
    num_tokens: int  # computed


class Listener(Protocol):
    """Whom the thread tells; called on the event loop."""

    def loaded(self, engine: Engine) -> None: ...

    def stepped(self, step: Step) -> None: ...

    def ended(self, error: BaseException | None) -> None:
        """No step will follow: `stop` was called, or the engine raised `error`."""


class EngineLoop:
    """Runs `engine.step()` while there is work; only its thread touches the engine.

    An exception ends the thread for good: nobody knows which requests the broken step had booked,
    what it wrote into the caches, or (CUDA) whether the context still works. Whoever supervises the
    process starts a new one.
    """

    def __init__(self, load: Callable[[], Engine], listener: Listener):
        self._load, self._listener = load, listener
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._queued: list[Request] = []  # of the thread: what no step has taken up yet
        self._step_began: float | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="minidsv-engine", daemon=True)

    @property
    def step_seconds(self) -> float:
        """How long the step that runs has been running; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._events = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step."""
        self._stopping = True
        self._commands.put(lambda _: None)
        self._thread.join(JOIN_SECONDS)

    def add(self, requests: Sequence[Request]) -> None:
        def command(engine: Engine) -> None:
            for request in requests:
                engine.add(request)
                self._queued.append(request)

        self._commands.put(command)

    def abort(self, requests: Sequence[Request]) -> None:
        def command(engine: Engine) -> None:
            for request in requests:
                engine.abort(request)

        self._commands.put(command)

    def _run(self) -> None:
        try:
            engine = self._load()
            self._tell(self._listener.loaded, engine)
            while not self._stopping:
                self._run_commands(engine)
                self._step(engine)
            self._run_commands(engine)
        except BaseException as error:  # a panic of tokenizers is none of Exception
            self._tell(self._listener.ended, error)
        else:
            self._tell(self._listener.ended, None)

    def _run_commands(self, engine: Engine) -> None:
        """Run what is queued; without work, wait for something."""
        if not engine.has_work and not self._stopping:
            self._commands.get()(engine)
        while True:
            try:
                self._commands.get_nowait()(engine)
            except queue.Empty:
                return

    def _step(self, engine: Engine) -> None:
        before = _tokens_computed(engine)
        began = self._step_began = time.monotonic()
        outputs = engine.step()
        ended, self._step_began = time.monotonic(), None
        num_tokens = _tokens_computed(engine) - before
        if num_tokens or outputs:
            step = Step(began, ended, self._started(), outputs, num_tokens)
            self._tell(self._listener.stepped, step)

    def _tell(self, callback: Callable[[Any], None], argument: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has closed: a forced exit
            self._events.call_soon_threadsafe(callback, argument)

    def _started(self) -> list[Request]:
        """Requests that have left the queue; one that waits for a prefix lets others by."""
        started = [r for r in self._queued if r.status is not Status.WAITING]
        self._queued = [r for r in self._queued if r.status is Status.WAITING]
        return started


def _tokens_computed(engine: Engine) -> int:
    stats = engine.stats()
    return stats.prefill_tokens + stats.decode_tokens
