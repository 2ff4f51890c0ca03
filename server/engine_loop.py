"""EngineLoop: the thread that loads the engine and owns it from then on."""

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from minidsv.engine import Engine, StepOutput
from minidsv.request import Request

logger = logging.getLogger(__name__)


class EngineLoop:
    """Runs `engine.step()` while there is work; only its thread touches the engine.

    `deliver`, called in the thread, gets the outputs of each step, and None when no more will come:
    the engine has failed, or `stop` was called.
    """

    def __init__(
        self, load: Callable[[], Engine], deliver: Callable[[list[StepOutput] | None], None]
    ):
        self.engine: Engine | None = None  # None: not loaded yet
        self._load, self._deliver = load, deliver
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="minidsv-engine", daemon=True)

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._failed

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step."""
        self._stopping = True
        self._commands.put(lambda _: None)
        self._thread.join()

    def add(self, requests: Sequence[Request]) -> None:
        self._commands.put(lambda engine: [engine.add(r) for r in requests] and None)

    def abort(self, requests: Sequence[Request]) -> None:
        self._commands.put(lambda engine: [engine.abort(r) for r in requests] and None)

    def _run(self) -> None:
        try:
            self.engine = engine = self._load()
            while not self._stopping:
                self._run_commands(engine)
                outputs = engine.step()
                if outputs:
                    self._deliver(outputs)
            self._run_commands(engine)
        except Exception:
            logger.exception("the engine failed; its requests are answered with an error")
            self._failed = True
        self._deliver(None)

    def _run_commands(self, engine: Engine) -> None:
        """Run what is queued; without work, wait for something."""
        if not engine.has_work and not self._stopping:
            self._commands.get()(engine)
        while True:
            try:
                self._commands.get_nowait()(engine)
            except queue.Empty:
                return
