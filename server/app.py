"""The FastAPI application, put together from its routers, and the process that serves it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from minidsv import __version__
from minidsv.engine import Engine
from minidsv.server import errors, generate, health
from minidsv.server.gate import Gate
from minidsv.server.options import ServerOptions
from minidsv.server.serving import Serving

GRACE_SECONDS = 20  # what runs at a SIGTERM or Ctrl-C may go on for so long
ROUTERS = (health.routes, generate.routes)


def run(engine: Engine, host: str, port: int) -> None:
    """Serve until interrupted."""
    app = create_app(lambda: engine)
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=GRACE_SECONDS)


def create_app(load: Callable[[], Engine], options: ServerOptions | None = None) -> FastAPI:
    """The application over an engine, which `load` makes at startup, in the engine's thread."""
    serving = Serving(load, options or ServerOptions())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        yield
        await asyncio.to_thread(serving.stop)

    app = FastAPI(title="minidsv", version=__version__, lifespan=lifespan)
    errors.install(app)
    app.add_middleware(Gate)
    for routes in ROUTERS:
        app.include_router(routes(serving))
    return app
