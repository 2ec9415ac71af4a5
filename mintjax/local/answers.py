"""Each answer says which request it belongs to."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_KEY = "x-idempotency-key"


class RepeatKeys:
    """ASGI middleware that repeats a request's ``X-Idempotency-Key`` in its answer.

    A client can then tell the answer from one that comes late, twice, or from a proxy.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get(_KEY) if scope["type"] == "http" else None

        async def send_with_key(message: Message) -> None:
            if message["type"] == "http.response.start" and key is not None:
                MutableHeaders(scope=message)[_KEY] = key
            await send(message)

        await self._app(scope, receive, send_with_key)
