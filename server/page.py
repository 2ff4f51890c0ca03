"""The page at `/`: files of `server/static/`, for a browser that fetches nothing from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
PATHS = frozenset({"/", *(f"/static/{file.name}" for file in STATIC.iterdir())})  # need no key
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # keep it, but ask: an upgraded server has other files
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes() -> APIRouter:
    """GET / and GET /static/{file}."""
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=STATIC)

    async def respond(file: str, http: Request) -> Response:
        response = await files.get_response(file, http.scope)
        response.headers.update(HEADERS)
        return response

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(http: Request) -> Response:
        return await respond("index.html", http)

    @router.api_route("/static/{file}", methods=["GET", "HEAD"])
    async def static(file: str, http: Request) -> Response:
        return await respond(file, http)

    return router
