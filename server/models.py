"""GET /v1/models and GET /version: what is served, and the refusal of any other model."""

import time
from typing import Any

from fastapi import APIRouter

from minidsv import __version__
from minidsv.server.errors import ServerError
from minidsv.server.serving import Serving


def routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["model"])
    created = int(time.time())

    def card() -> dict[str, Any]:
        return {
            "id": serving.model_name,
            "object": "model",
            "created": created,
            "owned_by": "minidsv",
            "max_model_len": serving.engine.intake.max_request_tokens,
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(serving, model)
        return card()

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return router


def check_model(serving: Serving, name: str | None) -> None:
    """Raise ServerError 404 for a model that is not served; a body may leave the name out."""
    if name is not None and name != serving.model_name:
        raise ServerError(
            404,
            f"model: {name!r} does not exist; this server has {serving.model_name!r}",
            "invalid_request_error",
            "model",
            "model_not_found",
        )
