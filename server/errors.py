"""What the server answers when it does not answer: OpenAI's nested error shape, everywhere."""

import math
import random
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from minidsv.errors import RequestError
from minidsv.server.protocol import validation_reason

RETRY_MS = (1000, 4000)
FAILED = "the engine has failed; see the server's log"


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


def unavailable(reason: str) -> ServerError:
    """503: another time, or another server, may do.

    Clients that were refused together are told different times, or they would come back together:
    openai's obeys to the millisecond (Retry-After-Ms), others to the second.
    """
    wait_ms = random.randint(*RETRY_MS)
    headers = {"Retry-After": str(math.ceil(wait_ms / 1000)), "Retry-After-Ms": str(wait_ms)}
    return ServerError(503, f"{reason}; try again", headers=headers)


def engine_failed() -> ServerError:
    """For those who come later, to whom another server may be of use."""
    return unavailable(FAILED)


def engine_failed_running() -> ServerError:
    """For those who ran: one of them may have done it, and would do it again."""
    return ServerError(500, FAILED, headers={"x-should-retry": "false"})


def bug() -> ServerError:
    """The answer to an exception that nobody expected; a retry would raise it again."""
    headers = {"x-should-retry": "false"}
    return ServerError(500, "internal error; see the server's log", headers=headers)


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What `error_body` makes, for the schema."""

    error: Error


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in (
        (400, "The request is refused; `param` names the field."),
        (401, "No accepted key."),
        (404, "No such path or model."),
        (405, "Not with this method."),
        (408, "The body did not come in time."),
        (413, "The body is too long."),
        (500, "A bug, or the engine failed while it ran the request."),
        (503, "Starting, full or shutting down; see Retry-After."),
        (504, "Not done within the server's time limit."),
    )
}
"""What any route may answer beside its own, for the schema."""


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
    param, reason = validation_reason(error.errors()[0])
    message = f"{param or 'body'}: {reason}"
    return JSONResponse(error_body(message, "invalid_request_error", param), 400)


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))
