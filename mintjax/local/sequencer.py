"""Requests take effect one at a time, in the order their numbers give, each at most once."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from mintjax.local.slices import Slices

Work: TypeAlias = Callable[[], bytes | Slices[bytes]]
"""Makes the result of a request, at once or in slices."""

MAX_RESULTS = 4096
MAX_RESULT_BYTES = 512 * 1024 * 1024
MAX_INTERLEAVED = 4
"""How many requests are under way at once of those that are done in slices; each has a cache."""


class ForgottenError(LookupError):
    """The request took effect and its result was given out, too long ago to be kept."""


class UnknownRequestError(LookupError):
    """No request has that id."""


class OtherContentError(ValueError):
    """A number, or a key, came again with another content than before."""


class MissingNumberError(RuntimeError):
    """A request was given up, because the number before it did not arrive.

    Args:
        number: the one that is missing.
    """

    def __init__(self, number: int, seconds: float) -> None:
        super().__init__(
            f"it was not run: seq_id {number}, which comes before it, has not arrived within "
            f"{seconds:g} s. Send that one, then this one again"
        )
        self.number = number


@dataclass
class _Line:
    """The numbered requests of one model."""

    next: int = 1
    waiting: dict[int, str] = field(default_factory=dict[int, str])
    waiting_since: float = 0.0
    rejected: set[int] = field(default_factory=set[int])


@dataclass
class _Request:
    work: Work | None  # None once it has run, because it holds the request's data
    result: Future[bytes]
    key: Hashable | None
    digest: bytes
    interleaved: bool
    group: Hashable | None


class Finished(NamedTuple):
    """A request of a group that has a result, or has failed.

    Args:
        at: its place among all that have finished, from 1 on.
        request_id: of the request.
        size: of the result, in bytes; None if it failed.
    """

    at: int
    request_id: str
    size: int | None


class Sequencer:
    """A queue in front of one worker thread.

    A numbered request waits until every smaller number of its line has taken effect or was
    rejected; others take effect in the order of arrival. What was seen before, by line and number
    or by key, is not run again: its first id is returned if the content is the same, and it is
    refused if not. Results are kept until they were asked for, and then as long as there is room.

    Any thread may call any method. A work that raises fails its own request only. Work that is
    interleaved lets other requests run between its slices; all other work is done in one go, but
    ends between two slices when the sequencer is closed.

    Args:
        max_results: how many results to keep.
        max_result_bytes: how many bytes of them.
    """

    def __init__(
        self, *, max_results: int = MAX_RESULTS, max_result_bytes: int = MAX_RESULT_BYTES
    ) -> None:
        self._max_results = max_results
        self._max_result_bytes = max_result_bytes
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}
        self._requests: dict[str, _Request] = {}
        self._keys: dict[Hashable, str] = {}
        self._retrieved: OrderedDict[str, int] = (
            OrderedDict()
        )  # sizes; the first are forgotten first
        self._unretrieved: OrderedDict[str, int] = (
            OrderedDict()
        )  # these only when none is left there
        self._result_bytes = 0
        self._prefix = uuid.uuid4().hex[:8]
        self._num_unnumbered = 0
        self._cancelled: set[str] = set()
        self._num_finished = 0
        self._finished: dict[str, Finished] = {}  # of those that have a group, in order
        self._watchers: set[tuple[Hashable, Future[None]]] = set()
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._closed = False
        self._worker = threading.Thread(target=self._run, name="mintjax-trainer", daemon=True)
        self._worker.start()

    def submit(
        self,
        work: Work,
        *,
        line: str | None = None,
        number: int | None = None,
        key: Hashable | None = None,
        content: bytes = b"",
        interleaved: bool = False,
        group: Hashable | None = None,
    ) -> str:
        """Takes in a request.

        Args:
            work: makes the result; called once, in the worker thread, when its turn has come.
            line: whose order counts.
            number: the place in that line, from 1 on; None to go by arrival.
            key: the same for every attempt at one request.
            content: the request as it was sent; the same for every attempt at one request.
            interleaved: other requests may run between the slices of this one. Only for a request
                without a number, whose effect nothing else waits for.
            group: what :meth:`finished` lists the request under; None not to list it.

        Returns:
            The request's id; that of the first attempt if this is another one.

        Raises:
            OtherContentError: the number or the key was seen before, with another content.
        """
        digest = _digest(content)
        with self._lock:
            if key is not None and key in self._keys:
                self._check_content(self._keys[key], digest, f"key {key!r}")
                return self._keys[key]
            if line is None or number is None:
                self._num_unnumbered += 1
                request_id = f"{self._prefix}:{self._num_unnumbered}"
                self._add(request_id, work, key, digest, interleaved, group)
                self._ready.put(request_id)
                return request_id
            state = self._lines.setdefault(line, _Line())
            request_id = f"{self._prefix}:{line}:{number}"
            seen_before = number in state.waiting or (
                number < state.next and number not in state.rejected
            )
            if seen_before:
                self._check_content(request_id, digest, f"number {number}")
                return request_id
            self._add(request_id, work, key, digest, group=group)
            state.rejected.discard(number)
            if number < state.next:  # rejected at first, and others did not wait for it
                self._ready.put(request_id)
            else:
                state.waiting[number] = request_id
                self._advance(state)
            return request_id

    def find(self, key: Hashable | None, content: bytes) -> str | None:
        """Returns the id of the request that came with a key before; None if none did.

        Raises:
            OtherContentError: it had another content.
        """
        if key is None:
            return None
        digest = _digest(content)
        with self._lock:
            request_id = self._keys.get(key)
            if request_id is not None:
                self._check_content(request_id, digest, f"key {key!r}")
            return request_id

    def reject(self, line: str, number: int) -> None:
        """Says that the request of this number was refused, so that none waits for it.

        It may still be submitted, with better content.
        """
        with self._lock:
            state = self._lines.setdefault(line, _Line())
            if number >= state.next and number not in state.waiting:
                state.rejected.add(number)
                self._advance(state)

    def result(self, request_id: str) -> Future[bytes]:
        """Returns the result of a request, perhaps still to come.

        Raises:
            ForgottenError: it was retrieved long ago.
            UnknownRequestError: there never was such a request.
        """
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                return request.result
            if self._took_effect(request_id):
                raise ForgottenError(request_id)
        raise UnknownRequestError(request_id)

    def retrieved(self, request_id: str) -> None:
        """Says that a result was given out, so that it may be forgotten before the others."""
        with self._lock:
            if request_id in self._unretrieved:
                self._retrieved[request_id] = self._unretrieved.pop(request_id)

    def finished(self, group: Hashable, after: int) -> list[Finished]:
        """Lists the requests of a group that have finished and are still kept.

        Args:
            group: as the requests were submitted with.
            after: only those behind this place.
        """
        with self._lock:
            return self._list(group, after)

    @contextmanager
    def watching(self, group: Hashable, after: int) -> Generator[Future[None]]:
        """Gives a future that is done once :meth:`finished` has something to list."""
        watcher: tuple[Hashable, Future[None]] = (group, Future())
        with self._lock:
            if self._list(group, after) or self._closed:
                watcher[1].set_result(None)
            else:
                self._watchers.add(watcher)
        try:
            yield watcher[1]
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    def waits_for(self, request_id: str) -> int | None:
        """Returns the number that this request's line is waiting for, if that holds it up."""
        with self._lock:
            _, line, number = self._parts(request_id)
            state = self._lines.get(line)
            return state.next if state is not None and number in state.waiting else None

    def give_up(self, request_id: str, seconds: float) -> None:
        """Fails what waits in a request's line, if its next number has not come for so long.

        The numbers that are given up may be submitted again, as those that were rejected.
        """
        with self._lock:
            _, line, number = self._parts(request_id)
            state = self._lines.get(line)
            if state is None or number not in state.waiting:
                return
            if time.monotonic() - state.waiting_since < seconds:
                return
            given_up, missing = state.waiting, state.next
            state.waiting = {}
            for number, waiting in given_up.items():
                request = self._requests[waiting]
                request.work = None
                self._keys.pop(request.key, None)
                if not request.result.done():
                    request.result.set_exception(MissingNumberError(missing, seconds))
                state.rejected.add(number)
                self._keep(waiting, None)

    def cancel(self, request_id: str) -> None:
        """Cancels a request that is interleaved, before it begins or between two slices.

        Any other is left as it is, because later requests count on its effect.

        Raises:
            UnknownRequestError: there never was such a request, or it is forgotten.
        """
        with self._lock:
            if request_id not in self._requests:
                raise UnknownRequestError(request_id)
            request = self._requests[request_id]
            if not request.interleaved or request.result.done():
                return
            if request.result.cancel():
                request.work = None
                self._keep(request_id, None)
            else:  # it is under way
                self._cancelled.add(request_id)

    def drop(self, line: str) -> None:
        """Forgets a line; what still waits in it is cancelled."""
        with self._lock:
            state = self._lines.pop(line, _Line())
            for request_id in state.waiting.values():
                self._cancel(self._requests[request_id])
                self._keep(request_id, None)

    def close(self) -> None:
        """Ends the request under way between two slices, cancels the others, stops the worker."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ready.put(None)
        self._worker.join()
        with self._lock:
            for request in self._requests.values():
                self._cancel(request)
            watchers, self._watchers = self._watchers, set()
        for _, future in watchers:
            future.set_result(None)

    def _check_content(self, request_id: str, digest: bytes, named: str) -> None:
        request = self._requests.get(request_id)  # None once it is forgotten
        if request is not None and request.digest != digest:
            raise OtherContentError(
                f"{named} came before, with another content; that request took effect, this one "
                "did not"
            )

    def _add(
        self,
        request_id: str,
        work: Work,
        key: Hashable | None,
        digest: bytes,
        interleaved: bool = False,
        group: Hashable | None = None,
    ) -> None:
        self._requests[request_id] = _Request(work, Future(), key, digest, interleaved, group)
        if key is not None:
            self._keys[key] = request_id
        if self._closed:
            self._cancel(self._requests[request_id])

    @staticmethod
    def _cancel(request: _Request) -> None:
        request.work = None
        request.result.cancel()

    @staticmethod
    def _parts(request_id: str) -> tuple[str, str, int]:
        prefix, _, rest = request_id.partition(":")
        line, _, number = rest.rpartition(":")
        return prefix, line, int(number) if number.isdecimal() and number.isascii() else 0

    def _took_effect(self, request_id: str) -> bool:
        prefix, line, number = self._parts(request_id)
        if prefix != self._prefix or number < 1:
            return False
        if not line:
            return number <= self._num_unnumbered
        state = self._lines.get(line)
        return state is not None and number < state.next and number not in state.rejected

    def _advance(self, line: _Line) -> None:
        line.waiting_since = time.monotonic()
        while line.waiting:
            if line.next in line.waiting:
                self._ready.put(line.waiting.pop(line.next))
            elif line.next not in line.rejected:
                return
            line.next += 1

    def _run(self) -> None:
        queued: deque[str] = deque()  # interleaved, not begun
        under_way: deque[tuple[str, Slices[bytes]]] = deque()
        while True:
            request_id = self._next(wait=not (queued or under_way))
            if request_id is None:
                for begun, slices in under_way:
                    self._advanced(begun, slices)  # which only ends it, now that all is closed
                return
            if request_id and self._requests[request_id].interleaved:
                queued.append(request_id)
            elif request_id:
                self._execute(request_id)
            while queued and len(under_way) < MAX_INTERLEAVED:
                begun = queued.popleft()
                if (slices := self._begin(begun)) is not None:
                    under_way.append((begun, slices))
            if under_way:
                begun, slices = under_way.popleft()
                if not self._advanced(begun, slices):
                    under_way.append((begun, slices))

    def _next(self, *, wait: bool) -> str | None:
        """Finds the next request; "" if there is none, None at the end."""
        try:
            return self._ready.get(block=wait)
        except queue.Empty:
            return ""

    def _execute(self, request_id: str) -> None:
        slices = self._begin(request_id)
        while slices is not None and not self._advanced(request_id, slices):
            pass

    def _begin(self, request_id: str) -> Slices[bytes] | None:
        """Begins a request; None if it has ended thereby, else the slices that are to be done."""
        with self._lock:
            request = self._requests[request_id]
            work, request.work = request.work, None
            if self._closed or work is None or not request.result.set_running_or_notify_cancel():
                return None
        try:
            result = work()
        except BaseException as error:  # the worker must outlive whatever a request does
            self._fail(request_id, error)
            return None
        if isinstance(result, Generator):
            return result
        self._succeed(request_id, result)
        return None

    def _advanced(self, request_id: str, slices: Slices[bytes]) -> bool:
        """Does one slice; returns whether the request has ended."""
        with self._lock:
            stopped = self._closed or request_id in self._cancelled
        if stopped:
            slices.close()
            self._cancelled.discard(request_id)
            self._fail(request_id, CancelledError())
            return True
        try:
            next(slices)
        except StopIteration as end:
            self._succeed(request_id, end.value)
        except BaseException as error:  # the worker must outlive whatever a request does
            self._fail(request_id, error)
        else:
            return False
        return True

    def _succeed(self, request_id: str, result: bytes) -> None:
        self._requests[request_id].result.set_result(result)
        with self._lock:
            self._keep(request_id, len(result))

    def _fail(self, request_id: str, error: BaseException) -> None:
        # Without the traceback, because its frames hold the data.
        self._requests[request_id].result.set_exception(error.with_traceback(None))
        with self._lock:
            self._keep(request_id, None)

    def _list(self, group: Hashable, after: int) -> list[Finished]:
        of_group = (
            one for one in self._finished.values() if self._requests[one.request_id].group == group
        )
        return [one for one in of_group if one.at > after]

    def _finish(self, request_id: str, size: int | None) -> None:
        """Lists a request as finished; its result is there already."""
        group = self._requests[request_id].group
        if group is None:
            return
        self._num_finished += 1
        self._finished[request_id] = Finished(self._num_finished, request_id, size)
        for watcher in [one for one in self._watchers if one[0] == group]:
            self._watchers.discard(watcher)
            watcher[1].set_result(None)

    def _keep(self, request_id: str, size: int | None) -> None:
        self._finish(request_id, size)
        size = size or 0
        self._unretrieved[request_id] = size
        self._result_bytes += size
        while (
            len(self._retrieved) + len(self._unretrieved) > self._max_results
            or self._result_bytes > self._max_result_bytes
        ):
            forgotten, freed = (self._retrieved or self._unretrieved).popitem(last=False)
            self._result_bytes -= freed
            self._keys.pop(self._requests.pop(forgotten).key, None)
            self._finished.pop(forgotten, None)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
