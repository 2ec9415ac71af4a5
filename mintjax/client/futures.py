"""Results that are still to come."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import math
import numbers
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, Generic, NoReturn, ParamSpec, Self, TypeVar

from mintjax.errors import APITimeoutError, ClosedError, ConfigError, NotCopyableError
from mintjax.left_out import SdkMethods

P = ParamSpec("P")
T = TypeVar("T")


class NotCopyable:
    """Refuses ``copy.copy``, ``copy.deepcopy`` and ``pickle``, and says what to do instead."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotCopyableError(
            f"{type(self).__name__} cannot be copied or pickled, because it shares a thread, "
            "connections and the order of requests. Within this process, use it from wherever it "
            "is needed. In another process, make a new ServiceClient there, and give it the path "
            "of a checkpoint: create_training_client_from_state_with_optimizer(path), or "
            "create_sampling_client(model_path=path)"
        )


class MadeClient(NotCopyable, SdkMethods):
    """A client whose ``result()``, and which awaited, is itself.

    The official SDK returns a future of a client. Here a method that makes one waits for it, and a
    script that asks for the result goes on as it is.
    """

    def result(self, timeout: float | None = None) -> Self:
        """Returns itself at once."""
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """Returns itself at once."""
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()


class APIFuture(NotCopyable, concurrent.futures.Future[T]):
    """The result of a request, for threads and for asyncio alike.

    ``future.result()`` blocks; ``await future`` works in any event loop. Both may be called any
    number of times, from anywhere. It is a ``concurrent.futures.Future``, so that what waits for
    those takes it too. ``cancel()`` withdraws the request, and is True, as long as nothing that
    changes the model has been sent for it; a sample can be withdrawn until it is there. Callbacks
    run in the client's thread; they must not block.

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
        self._pid = os.getpid()
        self._wakers = wakers = set[Callable[[], object]]()
        # One callback for all who wait, because a future never lets go of one.
        self.add_done_callback(lambda _: [wake() for wake in list(wakers)])

    def result(self, timeout: float | None = None) -> T:
        """Waits for the result.

        Args:
            timeout: seconds to wait at most; if None, until the request has its result or has
                failed, which takes no longer than ``RetryPolicy(result=...)`` allows.

        Raises:
            APITimeoutError: no result yet (a ``TimeoutError``). The request goes on; ask again.
            concurrent.futures.CancelledError: it was cancelled.
            ConfigError: the timeout is no number.
            ClosedError: this process was forked from the one that waits for the result.
            RuntimeError: called in the client's own event loop, which would wait for itself.
        """
        self.exception(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits as :meth:`result` does, and returns the error, or None where there is none.

        Raises:
            ConfigError: the timeout is no number.
            ClosedError: this process was forked from the one that waits for the result.
            RuntimeError: called in the client's own event loop, which would wait for itself.
        """
        if os.getpid() != self._pid and self._state != "FINISHED":  # no lock: its holder is gone
            raise ClosedError("a future does not survive os.fork(); ask in the process it is from")
        timeout = _seconds(timeout)
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

    def cancel(self) -> bool:
        """Withdraws the request, unless something that changes the model was sent for it.

        Returns:
            Whether it was, now or before.
        """
        withdrawn = super().cancel()
        # Those that wait for several futures are told by this call only.
        with self._condition:
            if self._state == "CANCELLED":
                self.set_running_or_notify_cancel()
        return withdrawn

    async def result_async(self, timeout: float | None = None) -> T:
        """Waits for the result without blocking the running event loop; see :meth:`result`.

        Cancelling the task that waits leaves the request running, as a timeout does.
        """
        timeout = _seconds(timeout)
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # that loop has been closed: nobody is waiting
                loop.call_soon_threadsafe(done.set)

        self._wakers.add(wake)
        try:
            with suppress(TimeoutError):
                if not self.done():  # asked once the waker can be seen, so that it is not missed
                    await asyncio.wait_for(done.wait(), timeout)
        finally:
            self._wakers.discard(wake)
        if not self.done():
            raise _late(timeout)
        return self.result()

    async def coroutine(self) -> T:
        """Waits for the result, as a coroutine, which ``asyncio.create_task`` asks for."""
        return await self.result_async()

    def future(self) -> concurrent.futures.Future[T]:
        """Returns itself, because it is a ``concurrent.futures.Future``."""
        return self

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled() else "done" if self.done() else "pending"
        return f"<APIFuture {state}>"


def _seconds(timeout: Any) -> float | None:
    """Reads a timeout, and takes one that threads cannot wait for as none.

    Raises:
        ConfigError: it is no number.
    """
    if timeout is None:
        return None
    seconds = float(timeout) if isinstance(timeout, numbers.Real) else math.nan
    if math.isnan(seconds):
        raise ConfigError(f"timeout must be a number of seconds, or None, not {timeout!r}")
    return None if seconds > threading.TIMEOUT_MAX else seconds


def _late(timeout: float | None) -> APITimeoutError:
    return APITimeoutError(
        f"no result within {timeout} s; the request is still running, ask for it again"
    )


def submitted(method: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Makes a coroutine function of a method, which the official SDK's users await."""

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return method(*args, **kwargs)

    return call


def awaited(
    method: Callable[P, APIFuture[T]], returns: type[T] | Any
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Makes a coroutine function that returns the result of a method.

    Args:
        method: returns a future.
        returns: what the future holds, for the annotation.
    """

    @functools.wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return await method(*args, **kwargs)

    return _annotated(call, returns)


class Limited(Generic[T]):
    """A future that a method waits for, and no longer than a limit.

    Args:
        future: of the result.
        limit: in seconds.
    """

    def __init__(self, future: APIFuture[T], limit: float) -> None:
        self.future = future
        self.limit = limit


def both(
    method: Callable[P, Limited[T]], returns: type[T]
) -> tuple[Callable[P, T], Callable[P, Coroutine[Any, Any, T]]]:
    """Makes a method that blocks until the result is there, and a coroutine function.

    Args:
        method: returns a future and how long to wait for it.
        returns: what the future holds, for the annotation.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return wait(method(*args, **kwargs))

    @functools.wraps(method)
    async def call_async(*args: P.args, **kwargs: P.kwargs) -> T:
        limited = method(*args, **kwargs)
        try:
            return await limited.future.result_async(limited.limit)
        except APITimeoutError as error:
            raise _too_long(limited, error) from None

    return _annotated(call, returns), _annotated(call_async, returns)


def wait(limited: Limited[T]) -> T:
    """Waits for a result.

    Raises:
        APITimeoutError: it takes too long; the message says how to wait longer.
    """
    try:
        return limited.future.result(limited.limit)
    except APITimeoutError as error:
        raise _too_long(limited, error) from None


def _too_long(limited: Limited[Any], error: APITimeoutError) -> APITimeoutError:
    if limited.future.done():  # the request's own error
        return error
    return APITimeoutError(
        f"no result after {limited.limit} s; pass timeout=..., or RetryPolicy(blocking=...), to "
        "wait longer. The request goes on meanwhile"
    )


C = TypeVar("C", bound=Callable[..., Any])


def _annotated(call: C, returns: Any) -> C:
    # What wraps copies says that a future comes back.
    call.__annotations__ = {**call.__annotations__, "return": returns}
    call.__signature__ = inspect.signature(call).replace(return_annotation=returns)  # pyright: ignore[reportFunctionMemberAccess]
    return call
