"""Gate: the ASGI layer around the application that every HTTP call passes, in and out."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minidsv.server.errors import bug
from minidsv.server.exchange import Exchange

logger = logging.getLogger(__name__)


class Gate:
    """Gives each call an Exchange, ends it, and turns a bug below into the answer 500."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def observed_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        exchange = scope.setdefault("state", {})["exchange"] = Exchange()
        try:
            await self.app(scope, receive, observed_send)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            await bug().response()(scope, receive, send)
        finally:
            exchange.close()
