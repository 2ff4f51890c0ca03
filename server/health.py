"""GET /health, /ready and /metrics: is the engine alive, may requests come, how is it doing."""

from fastapi import APIRouter, Request, Response

from minidsv.server.serving import Serving


def routes(serving: Serving) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """The process lives and the engine's last step was not too long ago."""
        serving.check_health()
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """The model is loaded, and the server is not shutting down."""
        serving.check_ready()
        return {"status": "ready"}

    @router.get("/metrics", response_class=Response)
    async def metrics(http: Request) -> Response:
        """Prometheus' text format."""
        page, content_type = serving.metrics.page(http.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})

    return router
