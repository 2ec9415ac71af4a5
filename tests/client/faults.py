"""A bad connection, made on purpose and repeatable: it stands between a client and a trainer."""

from __future__ import annotations

import asyncio
import random

import httpx

FAULTS = (
    "lost before",
    "lost after",
    "unreachable",
    "late",
    "twice",
    "truncated",
    "garbage",
    "try again",
    "redirected 200",
    *(str(status) for status in (400, 408, 409, 429, 500, 502, 503)),
    *(f"after {status}" for status in (408, 409, 500, 502, 503)),
)


class BadConnection(httpx.AsyncBaseTransport):
    """Passes requests on, but for a share of them that meets with a fault.

    Args:
        inner: the way to the trainer.
        seed: the same seed gives the same faults to the same sequence of requests.
        share: of the requests that meet with one.
        spare: paths that meet with none.
    """

    def __init__(
        self, inner: httpx.AsyncBaseTransport, seed: int, share: float, spare: tuple[str, ...] = ()
    ) -> None:
        self.inner = inner
        self.random = random.Random(seed)
        self.share = share
        self.spare = spare
        self.met: list[tuple[str, str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/v1/")
        if path in self.spare or self.random.random() >= self.share:
            return await self.inner.handle_async_request(request)
        fault = self.random.choice(FAULTS)
        self.met.append((path, fault))
        return await self.meet(fault, request, path)

    async def meet(self, fault: str, request: httpx.Request, path: str) -> httpx.Response:
        if fault == "unreachable":
            raise httpx.ConnectError("refused")
        if fault == "lost before":
            raise httpx.ReadError("broken")
        if fault == "late":
            await asyncio.sleep(self.random.random() * 0.005)
        if fault == "try again" and path == "retrieve_future":
            return answer(200, b'{"type": "try_again", "queue_state": "paused_capacity"}')
        if fault.isdecimal():
            headers = {"retry-after": "0.002"} if self.random.random() < 0.5 else {}
            return answer(int(fault), b"", headers)
        if fault == "garbage" and self.random.random() < 0.5:
            return answer(200, b"<html>\xff not the trainer</html>")
        response = await self.inner.handle_async_request(request)
        body = await response.aread()
        if fault == "twice":
            await self.inner.handle_async_request(request)
        if fault == "lost after":
            raise httpx.RemoteProtocolError("broken")
        if fault.startswith("after"):
            return answer(int(fault.split()[1]), b"")
        if fault == "truncated":
            body = body[: self.random.randrange(len(body))] if body else body
        if fault == "garbage":
            body = b"[" + body
        return answer(response.status_code, body)

    async def aclose(self) -> None:
        await self.inner.aclose()


def answer(status: int, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, content=body, headers=headers)
