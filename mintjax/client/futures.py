"""Results that are still to come."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from mintjax.errors import APITimeoutError

P = ParamSpec("P")
T = TypeVar("T")


class APIFuture(concurrent.futures.Future[T]):
    """The result of a request, for threads and for asyncio alike.

    ``future.result()`` blocks; ``await future`` works in any event loop. Both may be called any
    number of times, from anywhere. It is a ``concurrent.futures.Future``, so that what waits for
    those takes it too. ``cancel()`` withdraws the request, and is True, as long as nothing that
    changes the model has been sent for it. Callbacks run in the client's thread; they must not
    block.

    Args:
        thread: the client's, in which nobody can wait.
        keep_alive: a client that nobody else holds lives until it has its results.
        seen: told of an error when somebody gets it.
    """

    def __init__(
        self,
        thread: threading.Thread,
        keep_alive: object,
        seen: Callable[[BaseException], None] | None = None,
    ) -> None:
        super().__init__()
        self._thread = thread
        self._keep_alive = keep_alive
        self._seen = seen

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result.

        Args:
            timeout: seconds to wait at most; no limit if None.

        Raises:
            APITimeoutError: no result yet (a ``TimeoutError``). The request goes on; ask again.
            concurrent.futures.CancelledError: it was cancelled.
            RuntimeError: called in the client's own event loop, which would wait for itself.
        """
        self.exception(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait as :meth:`result` does, and return the error, or None where there is none.

        Raises:
            RuntimeError: called in the client's own event loop, which would wait for itself.
        """
        if not self.done() and threading.current_thread() is self._thread:
            raise RuntimeError(
                "in the client's own event loop this would wait for itself for ever; await the "
                "future, or wait in another thread"
            )
        with suppress(TimeoutError):
            error = super().exception(timeout)
            if error is not None and self._seen is not None:
                self._seen(error)
            return error
        raise _late(timeout)

    async def result_async(self, timeout: float | None = None) -> T:
        """Wait for the result without blocking the running event loop; see :meth:`result`.

        Cancelling the task that waits leaves the request running, as a timeout does.
        """
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def wake(_: object) -> None:
            with suppress(RuntimeError):  # that loop has been closed: nobody is waiting
                loop.call_soon_threadsafe(done.set)

        self.add_done_callback(wake)
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), timeout)
        if not self.done():
            raise _late(timeout)
        return self.result()

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "done" if self.done() else "pending"
        return f"<APIFuture {state}>"


def _late(timeout: float | None) -> APITimeoutError:
    return APITimeoutError(
        f"no result within {timeout} s; the request is still running, ask for it again"
    )


def submitted(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The method as a coroutine function, which the official SDK's users await."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return call


def awaited(method: Callable[P, APIFuture[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The method as a coroutine function that returns the result."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return call


def both(
    method: Callable[P, APIFuture[T]],
) -> tuple[Callable[P, T], Callable[P, Coroutine[Any, Any, T]]]:
    """The method, returning when the result is there; for threads, and as :func:`awaited`."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs).result()

    return call, awaited(method)
