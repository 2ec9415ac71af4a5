"""The thread whose event loop does everything that a client does over the network."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from mintjax.errors import ClosedError

T = TypeVar("T")

_SECONDS_TO_CLOSE = 0.8


class Withdrawn(Exception):
    """The future was cancelled before anything was sent for it."""


class Carried(Exception):
    """Takes an exception of the user's through coroutines, which would rewrite a StopIteration."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def begin(future: Future[Any]) -> None:
    """From here on the request can no longer be cancelled.

    Raises:
        Withdrawn: it was cancelled before, or the client closed.
    """
    if future.done() or not (future.running() or future.set_running_or_notify_cancel()):
        raise Withdrawn


class Background:
    """An event loop in a daemon thread; started by its construction, ended by :meth:`close`.

    Args:
        at_end: awaited in the loop before it ends, to release what lives there.
    """

    def __init__(self, at_end: Callable[[], Awaitable[object]]) -> None:
        self._at_end = at_end
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._futures: set[Future[Any]] = set()
        self._closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="mintjax-client", daemon=True)
        self._thread.start()

    def is_current_thread(self) -> bool:
        """Whether the caller runs in the loop's own thread."""
        return threading.current_thread() is self._thread

    def start(self, run: Callable[[Future[T]], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run a coroutine in the loop; calls of one thread start in their order.

        Args:
            run: gets the future that its result will be put into, for :func:`begin`.

        Raises:
            ClosedError: the client was closed, or belongs to the process this one was forked from.
        """
        if os.getpid() != self._pid:
            raise ClosedError("a client does not survive os.fork(); make one in the new process")
        future: Future[T] = Future()
        self._futures.add(future)  # before the check, so that close() ends it or the check sees it
        future.add_done_callback(self._futures.discard)
        with suppress(RuntimeError):  # the loop is closed; the check below says so
            self._loop.call_soon_threadsafe(self._spawn, run, future)
        if self._closed:
            self._futures.discard(future)
            raise ClosedError("the client is closed; make a new ServiceClient")
        return future

    def close(self) -> None:
        """End every future with ClosedError and the thread with them; within a second."""
        if self._closed:
            return
        self._closed = True
        for future in list(self._futures):
            _settle(future, error=ClosedError("the client was closed before this was answered"))
        if os.getpid() != self._pid:
            return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop)
        if not self.is_current_thread():
            self._thread.join(_SECONDS_TO_CLOSE)

    def _spawn(
        self,
        run: Callable[[Future[T]], Coroutine[Any, Any, T]],
        future: Future[T],
    ) -> None:
        if self._closed:
            return
        self.keep_running(_drive(run, future))

    def keep_running(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Start a task that ends with the loop; only from within the loop."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._loop.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            with suppress(Exception):
                self._loop.run_until_complete(asyncio.wait_for(self._finish(), 0.5))
        finally:
            self._loop.close()

    async def _finish(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._at_end()
        await self._loop.shutdown_asyncgens()


async def _drive(
    run: Callable[[Future[T]], Coroutine[Any, Any, T]],
    future: Future[T],
) -> None:
    try:
        result = await run(future)
    except Withdrawn:
        return
    except Carried as carried:
        _settle(future, error=carried.error)
    except asyncio.CancelledError:
        _settle(future, error=ClosedError("the client was closed before this was answered"))
    except BaseException as error:
        _settle(future, error=error)
    else:
        _settle(future, result=result)


def _settle(
    future: Future[Any],
    *,
    result: Any = None,
    error: BaseException | None = None,
) -> None:
    with suppress(InvalidStateError):  # cancelled or closed meanwhile
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
