"""A bad proxy: it stands on a socket before a trainer, and spoils bytes as a seed says."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

GATEWAY = [
    (400, b"", b""),
    (400, b"application/json", b'{"message": "bad request"}'),
    (400, b"application/json", b'{"error": {"code": 400}}'),
    (404, b"text/html", b"<html>no upstream</html>"),
    (404, b"application/json", b'{"detail": "Not Found"}'),
    (410, b"", b""),
    (413, b"text/html", b"too large"),
    (302, b"text/html", b""),
    (408, b"", b""),
    (409, b"", b""),
    (429, b"text/plain", b"slow down"),
    (500, b"text/html", b"<h1>broken</h1>"),
    (502, b"", b""),
    (503, b"application/json", b'{"error": "no healthy upstream"}'),
    (504, b"", b""),
]
RETRY_AFTER = [b"", b"0", b"0.001", b"-5", b"nan", b"1e9", b"Fri, 31 Dec 9999 23:59:59 -9999"]
LIES = [b"{}", b'{"status": "pending"}', b'{"detail": "Not Found"}', b'{"error": "oops"}', b"null"]
LIES += [b'{"request_id": "nobody"', b"\xff\x00", b""]
KINDS = [
    "cut before",
    "cut within the request",
    "cut after",
    "cut within the answer",
    "answer twice at once",
    "answer twice, one late",
    "request twice",
    "request again later",
    "gateway before",
    "gateway after",
    "another status",
    "lies",
    "garbage",
    "shorter than it says",
    "without a length",
    "drip",
    "wait",
]


class BadProxy:
    """Listens on a free port of this machine, in a thread of its own.

    Args:
        upstream: the trainer's address.
    """

    def __init__(self, upstream: str) -> None:
        self._host, self._port = urlsplit(upstream).hostname, urlsplit(upstream).port
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._run(self._listen())
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self.begin(0, 0.0, 0)

    def begin(self, seed: int, share: float, most: int) -> None:
        """Start a scenario.

        Args:
            seed: of what is spoiled.
            share: of the requests that meet with a fault.
            most: faults in all.
        """
        self.random = random.Random(seed)
        self.share = share
        self.left = most
        self.met: list[tuple[str, str]] = []
        self._later: list[bytes] = []

    def flush(self) -> None:
        """Let arrive what was held back, and spoil nothing more."""
        self.left = 0
        self._run(self._deliver_late())

    def close(self) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stale = b""  # an answer that is still to come by this connection
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)  # asyncio itself holds it weakly
        try:
            while request := await read_message(reader):
                path = request.split(b" ", 2)[1].decode().removeprefix("/api/v1/")
                await self._deliver_late()
                if self.left and self.random.random() < self.share:
                    self.left -= 1
                    kind = self.random.choice(KINDS)
                    self.met.append((path, kind))
                else:
                    kind = ""
                answer, end, again = await self._meet(kind, request, writer)
                writer.write(stale + answer)
                await writer.drain()
                stale = again
                if end:
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, as it may
        finally:
            self._tasks.discard(task)
            await close(writer)

    async def _meet(
        self, kind: str, request: bytes, writer: asyncio.StreamWriter
    ) -> tuple[bytes, bool, bytes]:
        """What to answer, whether to close the connection then, and what to say once more later."""
        rng = self.random
        if kind == "cut before":
            return b"", True, b""
        if kind == "cut within the request":
            await self._forward(request[: rng.randrange(1, len(request))], whole=False)
            return b"", True, b""
        if kind == "request again later":
            self._later.append(request)
            return b"", True, b""
        if kind == "gateway before":
            return self._gateway(), False, b""
        if kind == "wait":
            await asyncio.sleep(rng.random() * 0.01)
        answer = await self._forward(request)
        head, _, body = answer.partition(b"\r\n\r\n")
        match kind:
            case "cut after":
                return b"", True, b""
            case "cut within the answer":
                return answer[: rng.randrange(len(answer))], True, b""
            case "answer twice at once":
                return answer + answer, False, b""
            case "answer twice, one late":
                return answer, False, answer
            case "request twice":
                return await self._forward(request), False, b""
            case "gateway after":
                return self._gateway(), False, b""
            case "another status":
                status = rng.choice([201, 302, 400, 404, 410, 422, 429, 500])
                return answer.replace(b"200", b"%d" % status, 1), False, b""
            case "lies":
                return message(head, rng.choice(LIES)), False, b""
            case "garbage":
                at = rng.randrange(len(body) + 1)
                return message(head, body[:at] + rng.choice([b"\xff", b"[", b"}"])), False, b""
            case "shorter than it says":
                return answer[: len(head) + 4 + rng.randrange(len(body) + 1)], True, b""
            case "without a length":
                lines = [line for line in head.split(b"\r\n") if b"ength:" not in line]
                cut = body[: rng.randrange(len(body) + 1)]
                return b"\r\n".join([*lines, b"connection: close", b"", cut]), True, b""
            case "drip":
                with contextlib.suppress(ConnectionError):
                    for byte in answer:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(0.02)
                return b"", True, b""
            case _:
                return answer, False, b""

    def _gateway(self) -> bytes:
        status, media_type, body = self.random.choice(GATEWAY)
        lines = [b"HTTP/1.1 %d Whatever" % status, b"content-length: %d" % len(body)]
        lines += [b"content-type: " + media_type] if media_type else []
        after = self.random.choice(RETRY_AFTER)
        lines += [b"retry-after: " + after] if after else []
        lines += [b"location: http://login.example/"] if status == 302 else []
        return b"\r\n".join([*lines, b"", body])

    async def _deliver_late(self) -> None:
        late, self._later = self._later, []
        for request in late:
            await self._forward(request)

    async def _forward(self, request: bytes, whole: bool = True) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request)
            await writer.drain()
            return await read_message(reader) if whole else b""
        finally:
            await close(writer)


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP message that says how long it is; nothing at the end of the stream."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return head + await reader.readexactly(length)


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def message(head: bytes, body: bytes) -> bytes:
    """The head with another body, of its right length."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])
