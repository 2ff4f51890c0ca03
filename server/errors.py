"""What the server answers when it does not answer: OpenAI's nested error shape, everywhere."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minidsv.errors import RequestError

logger = logging.getLogger(__name__)


class ServerError(Exception):
    """A refusal, or the end of a request that was running; raised anywhere below a route."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "server_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = error_body(message, kind, param, code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's nested error shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bug() -> ServerError:
    """The answer to an exception that nobody expected; a retry would raise it again."""
    headers = {"x-should-retry": "false"}
    return ServerError(500, "internal error; see the server's log", headers=headers)


def install(app: FastAPI) -> None:
    """Give every error that FastAPI, Starlette or a route raises that shape."""
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(RequestError)(_on_request_error)
    app.exception_handler(HTTPException)(_on_http_error)
    app.exception_handler(ServerError)(_on_server_error)


async def _on_server_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)
    return error.response()


async def _on_request_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    return JSONResponse(error_body(str(error), "invalid_request_error", error.param), 400)


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        param, reason = None, f"{first['msg']} at character {first['loc'][-1]}"
    elif first["type"] in ("missing", "model_attributes_type") and first["loc"] == ("body",):
        param, reason = None, "a JSON object with Content-Type: application/json is needed"
    else:
        param = ".".join(str(part) for part in first["loc"] if part != "body") or None
        reason = first["msg"]
    message = f"{param or 'body'}: {reason}"
    return JSONResponse(error_body(message, "invalid_request_error", param), 400)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))
