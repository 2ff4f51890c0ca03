"""Gate: the ASGI layer around the application that every HTTP call passes, in and out."""

import asyncio
import logging
import secrets

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minidsv.server.auth import BearerKeys
from minidsv.server.errors import ServerError, bug
from minidsv.server.exchange import Exchange
from minidsv.server.logs import log_call

logger = logging.getLogger(__name__)

MAX_ID_LENGTH = 128


class Gate:
    """Gives each call an Exchange and an X-Request-Id, checks its key, its body's length and the
    time until that is there, turns a bug below into the answer 500, and in the end aborts what
    still runs and logs a line."""

    def __init__(
        self, app: ASGIApp, keys: BearerKeys, max_body_bytes: int, max_body_seconds: float
    ):
        self.app, self.keys = app, keys
        self.max_body_bytes, self.max_body_seconds = max_body_bytes, max_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        exchange = Exchange(_request_id(headers))
        scope.setdefault("state", {})["exchange"] = exchange
        answer = _Answer(send, exchange.id)
        try:
            self.keys.check(scope["path"], headers)
            body = _Body(receive, headers, self.max_body_bytes, self.max_body_seconds)
            await self.app(scope, body.receive, answer.send)
        except ServerError as error:
            await error.response()(scope, receive, answer.send)
        except Exception:
            logger.exception("%s %s: a bug", scope["method"], scope["path"])
            if not answer.status:
                await bug().response()(scope, receive, answer.send)
        finally:
            exchange.close()
            log_call(exchange, scope["method"], scope["path"], answer.status)


class _Answer:
    """The way out: notes the status (0: none yet) and names the call."""

    def __init__(self, send: Send, request_id: str):
        self.status = 0
        self._send, self._header = send, (b"x-request-id", request_id.encode())

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message["headers"], self._header]
        await self._send(message)


class _Body:
    """The way in: no more than so many bytes, announced or not, within so many seconds."""

    def __init__(self, receive: Receive, headers: Headers, limit: int, seconds: float):
        self._receive, self._limit, self._length = receive, limit, 0
        self._seconds = seconds
        self._deadline: float | None = asyncio.get_running_loop().time() + seconds
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise ServerError(413, self._message, "invalid_request_error")

    @property
    def _message(self) -> str:
        return f"the body is longer than the {self._limit} bytes that this server takes"

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:  # HTTPException is the one kind that FastAPI lets through
            raise HTTPException(
                408, f"the body did not come within {self._seconds:g} seconds"
            ) from None
        if message["type"] == "http.request":
            self._length += len(message.get("body", b""))
            if self._length > self._limit:
                raise HTTPException(413, self._message)
            if not message.get("more_body", False):
                self._deadline = None  # what is awaited from here on is that the client leaves
        return message


def _request_id(headers: Headers) -> str:
    """The caller's X-Request-Id if a log can bear it, else a new one."""
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= MAX_ID_LENGTH and all("!" <= c <= "~" for c in given):
        return given
    return secrets.token_hex(16)
