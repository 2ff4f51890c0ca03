"""GET /health and GET /ready: is the engine alive, may requests come."""

from fastapi import APIRouter

from minidsv.server.serving import Serving, engine_failed


def routes(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        if not serving.healthy:
            raise engine_failed()
        return {"status": "ok"}

    return router
