"""Requests take effect one at a time, in the order their numbers give, each at most once."""

from __future__ import annotations

import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

Work = Callable[[], bytes]

MAX_RESULTS = 4096
MAX_RESULT_BYTES = 512 * 1024 * 1024


class ForgottenError(LookupError):
    """The request took effect and its result was given out, too long ago to be kept."""


class UnknownRequestError(LookupError):
    """No request has that id."""


@dataclass
class _Line:
    """The numbered requests of one model."""

    next: int = 1
    waiting: dict[int, str] = field(default_factory=dict[int, str])
    rejected: set[int] = field(default_factory=set[int])


@dataclass
class _Request:
    work: Work | None  # None once it has run, for it holds the request's data
    result: Future[bytes]
    key: Hashable | None


class Sequencer:
    """A queue in front of one worker thread.

    A numbered request waits until every smaller number of its line has taken effect or was
    rejected; others take effect in the order of arrival. What was seen before, by line and number
    or by key, is not run again: its first id is returned. Results are kept until they were asked
    for, and then as long as there is room.

    Any thread may call any method. A work that raises fails its own request only.

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
    ) -> str:
        """Take in a request.

        Args:
            work: makes the result; called once, in the worker thread, when its turn has come.
            line: whose order counts.
            number: the place in that line, from 1 on; None to go by arrival.
            key: the same for every attempt at one request.

        Returns:
            The request's id; that of the first attempt if this is another one.
        """
        with self._lock:
            if key is not None and key in self._keys:
                return self._keys[key]
            if line is None or number is None:
                self._num_unnumbered += 1
                request_id = f"{self._prefix}:{self._num_unnumbered}"
                self._add(request_id, work, key)
                self._ready.put(request_id)
                return request_id
            state = self._lines.setdefault(line, _Line())
            request_id = f"{self._prefix}:{line}:{number}"
            seen_before = number in state.waiting or (
                number < state.next and number not in state.rejected
            )
            if not seen_before:
                self._add(request_id, work, key)
                state.rejected.discard(number)
                if number < state.next:  # rejected at first, and others did not wait for it
                    self._ready.put(request_id)
                else:
                    state.waiting[number] = request_id
                    self._advance(state)
            return request_id

    def reject(self, line: str, number: int) -> None:
        """Say that the request of this number was refused, so that none waits for it.

        It may still be submitted, with better content.
        """
        with self._lock:
            state = self._lines.setdefault(line, _Line())
            if number >= state.next and number not in state.waiting:
                state.rejected.add(number)
                self._advance(state)

    def result(self, request_id: str) -> Future[bytes]:
        """The result of a request, perhaps still to come.

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
        """Say that a result was given out, so that it may be forgotten before the others."""
        with self._lock:
            if request_id in self._unretrieved:
                self._retrieved[request_id] = self._unretrieved.pop(request_id)

    def waits_for(self, request_id: str) -> int | None:
        """The number that this request's line is waiting for, if that holds it up."""
        with self._lock:
            _, line, number = self._parts(request_id)
            state = self._lines.get(line)
            return state.next if state is not None and number in state.waiting else None

    def drop(self, line: str) -> None:
        """Forget a line; what still waits in it is cancelled."""
        with self._lock:
            state = self._lines.pop(line, _Line())
            for request_id in state.waiting.values():
                self._cancel(self._requests[request_id])
                self._keep(request_id, 0)

    def close(self) -> None:
        """Finish the request under way, cancel the others, stop the worker."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ready.put(None)
        self._worker.join()
        with self._lock:
            for request in self._requests.values():
                self._cancel(request)

    def _add(self, request_id: str, work: Work, key: Hashable | None) -> None:
        self._requests[request_id] = _Request(work, Future(), key)
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
        while line.waiting:
            if line.next in line.waiting:
                self._ready.put(line.waiting.pop(line.next))
            elif line.next not in line.rejected:
                return
            line.next += 1

    def _run(self) -> None:
        while (request_id := self._ready.get()) is not None:
            self._execute(request_id)

    def _execute(self, request_id: str) -> None:
        with self._lock:
            request = self._requests[request_id]
            work, request.work = request.work, None
            if self._closed or work is None or not request.result.set_running_or_notify_cancel():
                return
        size = 0
        try:
            result = work()
            size = len(result)
            request.result.set_result(result)
        except BaseException as error:  # the worker must outlive whatever a request does
            request.result.set_exception(error.with_traceback(None))  # frames hold the data
        with self._lock:
            self._keep(request_id, size)

    def _keep(self, request_id: str, size: int) -> None:
        self._unretrieved[request_id] = size
        self._result_bytes += size
        while (
            len(self._retrieved) + len(self._unretrieved) > self._max_results
            or self._result_bytes > self._max_result_bytes
        ):
            forgotten, freed = (self._retrieved or self._unretrieved).popitem(last=False)
            self._result_bytes -= freed
            self._keys.pop(self._requests.pop(forgotten).key, None)
