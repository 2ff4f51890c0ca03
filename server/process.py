"""The process that serves: its socket, its signals, its exit code."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from minidsv.engine import Engine
from minidsv.errors import ConfigError, MinidsvError
from minidsv.server import logs
from minidsv.server.app import create_app
from minidsv.server.options import ServerOptions
from minidsv.server.serving import Serving

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5  # for the last bytes of answers that have ended
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def serve(load: Callable[[], Engine], options: ServerOptions) -> int:
    """Serve until a signal; returns the exit code: 0, or 1 if the engine failed.

    The first signal drains: new requests get 503, what runs may go on for `drain_seconds`. A second
    one ends that. Raises MinidsvError for bad options or a model that cannot be loaded.
    """
    logs.setup(options)
    app = create_app(load, options)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    with _listen(options) as listener:
        logger.info("listening on http://%s:%d", options.host, listener.getsockname()[1])
        serving: Serving = app.state.serving
        asyncio.run(_serve(_Server(config), serving, listener))
    if isinstance(serving.error, MinidsvError):
        raise serving.error
    code = 0 if serving.error is None else 1
    if serving.is_stuck:  # the interpreter's own end would pull torch away from under the thread
        logging.shutdown()
        os._exit(code)
    return code


class _Server(uvicorn.Server):
    """uvicorn's own way with signals closes the socket first, so that no probe sees the drain, and
    ends the process by the signal."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: uvicorn.Server, serving: Serving, listener: socket.socket) -> None:
    first, second = asyncio.Event(), asyncio.Event()
    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (second if first.is_set() else first).set()
        )
    run = asyncio.create_task(server.serve(sockets=[listener]))
    ends = [asyncio.create_task(event.wait()) for event in (first, serving.has_ended)]
    await asyncio.wait([run, *ends], return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        end.cancel()
    await serving.drain(hurry=second)
    server.should_exit = True
    await run


def _listen(options: ServerOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise ConfigError(f"port: cannot listen on {where}: {error}") from None
    # Accepted sockets inherit it. asyncio sets it for those alone that name their protocol, and
    # without it an event waits for the client's delayed ACK of the one before, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
