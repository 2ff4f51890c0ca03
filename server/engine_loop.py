"""EngineLoop: the thread that owns the engine, and the asyncio side of its requests."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable

from minidsv.engine import Engine, StepOutput
from minidsv.request import Request

logger = logging.getLogger(__name__)


class EngineFailed(Exception):
    """The engine raised, or is shutting down; it serves no more requests."""


class EngineLoop:
    """Runs `engine.step()` while there is work; only its thread touches the engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Request, _Stream] = {}  # of the engine thread
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="minidsv-engine", daemon=True)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._failed

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort what runs and end the thread."""

        def command() -> None:
            self._stopping = True
            for request in self._streams:
                self.engine.abort(request)
            self._end_streams()

        self._commands.put(command)
        self._thread.join()

    async def run(self, request: Request) -> AsyncGenerator[StepOutput]:
        """Queue `request` and yield its outputs; leaving early aborts it. Raises EngineFailed."""
        if not self.healthy:
            raise EngineFailed
        stream = _Stream(asyncio.get_running_loop())
        self._commands.put(lambda: self._add(request, stream))
        try:
            while True:
                output = await stream.outputs.get()
                if output is None:
                    raise EngineFailed
                yield output
                if output.finished:
                    return
        finally:
            self._commands.put(lambda: self._abort(request))

    def _add(self, request: Request, stream: "_Stream") -> None:
        if self._failed or self._stopping:
            stream.put(None)
            return
        self._streams[request] = stream
        self.engine.add(request)

    def _abort(self, request: Request) -> None:
        if self._streams.pop(request, None) is not None:
            self.engine.abort(request)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._run_commands()
                if not self._failed:
                    self._step()
            except Exception:
                logger.exception("the engine failed; its requests are answered with an error")
                self._failed = True
                self._end_streams()

    def _step(self) -> None:
        for output in self.engine.step():
            self._streams[output.request].put(output)
            if output.finished:
                del self._streams[output.request]

    def _end_streams(self) -> None:
        for stream in self._streams.values():
            stream.put(None)
        self._streams.clear()

    def _run_commands(self) -> None:
        """Run what is queued; without work, wait for something."""
        if self._failed or not self.engine.has_work:
            self._commands.get()()
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return


class _Stream:
    """Outputs of one request on their way to its handler; None: the engine failed or stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self.outputs: asyncio.Queue[StepOutput | None] = asyncio.Queue()

    def put(self, output: StepOutput | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has closed: a forced exit
            self._loop.call_soon_threadsafe(self.outputs.put_nowait, output)
