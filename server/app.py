"""The FastAPI application, put together from its routers."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from minidsv import __version__
from minidsv.engine import Engine
from minidsv.server import errors, generate, health, models, openai_routes, page, tokenize
from minidsv.server.auth import BearerKeys
from minidsv.server.gate import Gate
from minidsv.server.logs import report_status
from minidsv.server.options import ServerOptions
from minidsv.server.serving import Serving

ROUTERS = (
    health.routes,
    generate.routes,
    openai_routes.routes,
    models.routes,
    tokenize.routes,
)


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The schema without the 422 that FastAPI adds to each route: here those are 400."""
        schema = super().openapi()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return schema


def create_app(load: Callable[[], Engine], options: ServerOptions | None = None) -> FastAPI:
    """The application over an engine, which `load` makes at startup, in the engine's thread.

    Its `state.serving` is the Serving that the routes share. Raises ConfigError for bad keys.
    """
    serving = Serving(load, options or ServerOptions())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        serving.start()
        status = asyncio.create_task(report_status(serving))
        yield
        status.cancel()
        await asyncio.to_thread(serving.stop)

    app = _App(
        title="minidsv",
        version=__version__,
        lifespan=lifespan,
        responses=errors.RESPONSES,
        docs_url=None,  # they would load their scripts from elsewhere
        redoc_url=None,
    )
    app.state.serving = serving
    errors.install(app)
    keys = BearerKeys(serving.options)
    app.add_middleware(
        Gate,
        keys=keys,
        max_body_bytes=serving.options.max_body_bytes,
        max_body_seconds=serving.options.max_body_seconds,
    )
    for routes in ROUTERS:
        app.include_router(routes(serving))
    app.include_router(page.routes())
    return app
