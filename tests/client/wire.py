"""A server that answers each request with the bytes that a test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager, suppress

from .proxy import close, read_message

Script = Callable[[str, bytes], AsyncIterator[bytes]]
"""Of the path and the request: the parts of the answer; the connection ends with the last."""


def whole(body: bytes, status: int = 200, *headers: bytes) -> bytes:
    """An answer that says how long it is."""
    length = b"content-length: %d" % len(body)
    return b"\r\n".join([b"HTTP/1.1 %d Whatever" % status, length, *headers, b"", body])


@contextmanager
def serving_bytes(script: Script) -> Generator[str]:
    """The server; its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            request = await read_message(reader)
            if request:
                path = request.split(b" ", 2)[1].decode().removeprefix("/api/v1/")
                async for part in script(path, request):
                    writer.write(part)
                    await writer.drain()
        tasks.discard(task)
        await close(writer)

    async def stop(server: asyncio.Server) -> None:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def run(coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    server = run(asyncio.start_server(serve, "127.0.0.1", 0))
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        run(stop(server))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
