"""Bounds the open connections of the embedded trainer, and the time that a request may take."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import h11
import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mintjax.local.limits import Limits


class Connection(H11Protocol):
    """Speaks HTTP on one connection, as uvicorn does, within limits.

    A request that does not arrive whole in time is answered 408. Where too many connections are
    open, the one that has waited longest for its request is closed for the new one. Where all are
    at work, the request of the new one is answered 503.

    Args:
        limits: the bounds.
        arguments: uvicorn's own.
    """

    def __init__(self, limits: Limits, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self.waiting_since = time.monotonic()
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection, in the place of another if there are too many."""
        others = [
            other
            for other in self.connections
            if isinstance(other, Connection) and not other.transport.is_closing()
        ]
        if len(others) >= self._limits.max_connections:
            waiting = [other for other in others if not other.at_work]
            refusal = self._limits.refusal("max_connections", "too many connections are open")
            if waiting:
                min(waiting, key=_waiting_since).end(503, refusal)
            else:
                self.app = _Unavailable(refusal)  # pyright: ignore[reportAttributeAccessIssue]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request."""
        if self._deadline is None and not self.at_work:
            self._wait()
        super().data_received(data)
        if self.at_work:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """Begins to wait for the next request, which may be there already."""
        self.waiting_since = time.monotonic()
        super().on_response_complete()
        if self.at_work:
            self._stop_waiting()

    @property
    def at_work(self) -> bool:
        """Tells if a request has arrived whole and its answer is still to come."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.more_body and not cycle.response_complete

    def end(self, status: int, detail: str) -> None:
        """Closes the connection, with an answer if a request has begun that has none."""
        if self.transport.is_closing():
            return
        begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        if begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = msgspec.json.encode({"detail": detail})
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self) -> None:
        self._stop_waiting()
        self.waiting_since = time.monotonic()
        self._deadline = self.loop.call_later(self._limits.request_seconds, self._late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        self.end(408, self._limits.refusal("request_seconds", "the request did not arrive whole"))


def _waiting_since(connection: Connection) -> float:
    return connection.waiting_since


class _Unavailable:
    """An application that refuses every request, and closes the connection."""

    def __init__(self, detail: str) -> None:
        self._detail = detail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = msgspec.json.encode({"detail": self._detail})
        headers = {"connection": "close"}
        refusal = Response(body, 503, headers, media_type="application/json")
        await refusal(scope, receive, send)
