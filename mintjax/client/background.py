"""The thread whose event loop does everything that a client does over the network."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from mintjax.client.futures import APIFuture
from mintjax.errors import ClosedError

T = TypeVar("T")

_SECONDS_TO_CLOSE = 0.8


class Carried(Exception):
    """Takes an exception of the user's through coroutines, which would rewrite a StopIteration."""


def begin(future: Future[Any]) -> None:
    """Marks a request as under way, so that it can no longer be cancelled.

    Raises:
        CancelledError: it was cancelled before, or the client closed.
    """
    if future.done() or not (future.running() or future.set_running_or_notify_cancel()):
        raise CancelledError


class Background:
    """An event loop in a daemon thread; started by its construction, ended by :meth:`close`.

    Args:
        at_end: awaited in the loop before it ends, to release what lives there.

    Attributes:
        thread: the thread.
    """

    def __init__(self, at_end: Callable[[], Awaitable[object]]) -> None:
        self._at_end = at_end
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._futures: set[Future[Any]] = set()
        self._closed = False
        self._pid = os.getpid()
        self.thread = threading.Thread(target=self._serve, name="mintjax-client", daemon=True)
        self.thread.start()

    def start(
        self, run: Callable[[APIFuture[T]], Coroutine[Any, Any, T]], future: APIFuture[T]
    ) -> APIFuture[T]:
        """Runs a coroutine in the loop; calls of one thread start in their order.

        Args:
            run: gets the future, for :func:`begin`.
            future: what the result will be put into.

        Raises:
            ClosedError: the client was closed, or belongs to the process this one was forked from.
        """
        if os.getpid() != self._pid:
            raise ClosedError("a client does not survive os.fork(); make one in the new process")
        self._futures.add(future)  # before the check, so that close() ends it or the check sees it
        future.add_done_callback(self._futures.discard)

        def spawn() -> None:
            if not self._closed:
                self.keep_running(_drive(run, future))

        with suppress(RuntimeError):  # the loop is closed; the check below says so
            self._loop.call_soon_threadsafe(spawn)
        if self._closed:
            self._futures.discard(future)
            raise ClosedError("the client is closed; make a new ServiceClient")
        return future

    def keep_running(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Starts a task that ends with the loop; only from within the loop."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Ends every future with ClosedError, and the thread, within a second.

        To be called once; the connection's finalizer sees to it.
        """
        self._closed = True
        if os.getpid() != self._pid:
            return  # and touch no lock: in a forked process, its holder may be gone
        for future in list(self._futures):
            _fail(future, ClosedError("the client was closed before this was answered"))
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self.thread:
            self.thread.join(_SECONDS_TO_CLOSE)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            with suppress(Exception):
                self._loop.run_until_complete(asyncio.wait_for(self._finish(), 0.5))
        finally:
            self._loop.close()

    async def _finish(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._at_end()
        await self._loop.shutdown_asyncgens()


async def _drive(
    run: Callable[[APIFuture[T]], Coroutine[Any, Any, T]], future: APIFuture[T]
) -> None:
    try:
        result = await run(future)
    except Carried as carried:
        _fail(future, carried.args[0])
    except BaseException as error:
        _fail(future, error)
    else:
        with suppress(InvalidStateError):  # cancelled or closed meanwhile
            future.set_result(result)


async def in_daemon_thread(work: Callable[[], T], name: str) -> T:
    """Runs a function in a thread that the interpreter, when it ends, does not wait for.

    ``asyncio.to_thread`` would have it wait: Python joins the threads of every executor.

    Args:
        work: the function; runs in a copy of the caller's context.
        name: of the thread.
    """
    loop, done = asyncio.get_running_loop(), asyncio.Event()
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(work))
        except BaseException as error:
            outcome.set_exception(error)
        with suppress(RuntimeError):  # the loop has been closed: nobody is waiting
            loop.call_soon_threadsafe(done.set)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _working.add(thread)
    thread.start()
    await done.wait()
    return outcome.result()


_working: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_SECONDS_TO_END = 0.5  # for Python code that is told to end
_SECONDS_IN_XLA = 30.0


def _end_work() -> None:
    """Tells running objectives to end, and waits for those that are within JAX.

    A thread that comes back from XLA into an interpreter that has ended takes the process down
    (https://github.com/python/cpython/issues/87135). One that sleeps or waits is left alone.
    """
    threads = [thread for thread in _working if thread.is_alive()]
    for thread in threads:
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
    started = time.monotonic()
    while threads and time.monotonic() - started < _SECONDS_IN_XLA:
        threads[0].join(0.01)
        frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        late = time.monotonic() - started > _SECONDS_TO_END
        threads = [
            thread
            for thread in threads
            if thread.is_alive() and (not late or _calls_jax(frames.get(thread.ident or 0)))
        ]


def _calls_jax(frame: FrameType | None) -> bool:
    # A compiled function has no frame of its own: the one above it is its caller's.
    folders = Path(frame.f_code.co_filename).parts if frame is not None else ()
    return not {"jax", "jaxlib", "mintjax"}.isdisjoint(folders)


atexit.register(_end_work)


def _fail(future: Future[Any], error: BaseException) -> None:
    with suppress(InvalidStateError):  # as above
        future.set_exception(error)
