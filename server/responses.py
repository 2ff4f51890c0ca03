"""EventStream: a response of server-sent events that ends well whatever happens below it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minidsv.server.errors import ServerError, bug

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
PING_SECONDS = 15  # a silence that proxies bear


def event(payload: dict[str, Any]) -> bytes:
    """One server-sent event with a JSON payload."""
    return b"data: " + json.dumps(payload, allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields (whole events, several in one piece if they came together),
    comments while nothing comes, the error that ends it early as one more event, then [DONE]."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes]):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._silent = events, True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        pings = asyncio.create_task(self._ping(send))
        try:
            async for piece in self._events:
                self._silent = False
                await _send(send, piece)
        except ServerError as error:
            await _send(send, event(error.body))
        except Exception:
            logger.exception("a stream failed")
            await _send(send, event(bug().body))
        finally:
            pings.cancel()
        await _send(send, DONE, more=False)

    async def _ping(self, send: Send) -> None:
        while True:
            self._silent = True
            await asyncio.sleep(PING_SECONDS)
            if self._silent:
                await _send(send, PING)


async def _send(send: Send, piece: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": more})
