"""The order of one model's requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import msgspec

from mintjax.client.background import Carried, begin, in_daemon_thread
from mintjax.client.connection import Connection
from mintjax.client.encodings import is_refusal_of_json
from mintjax.client.futures import APIFuture
from mintjax.client.polling import retrieve
from mintjax.client.transport import RECOVERY, Request
from mintjax.errors import AmbiguousRequestError, APIError, ClosedError, NotSentError

T = TypeVar("T")

_computing: ContextVar[object] = ContextVar("_computing", default=None)
"""The line that is held while this thread computes an objective."""


class Lane:
    """Requests of one model take effect in the order in which they were submitted.

    A request has its place in the line from the moment of its submission, and leaves it when the
    trainer has accepted all that belongs to it; its result is waited for outside. A number is
    given out only to a request that is being sent, and given back when the trainer refuses it.

    Args:
        connection: the session; every future keeps it, so that it outlives its requests.
        model_id: the model.

    Attributes:
        changes: how often something that changes the model was submitted.
    """

    def __init__(self, connection: Connection, model_id: str) -> None:
        self.connection = connection
        self.model_id = model_id
        self.line = asyncio.Lock()  # first come, first served
        self.under_way: set[asyncio.Task[Any]] = set()
        self.changes = 0
        self._next_seq = 1
        self._unsettled: Request | None = None
        self._doubt: str | None = None
        self._failures: list[str] = []
        self._failures_seen = 0
        self._closed = False

    def submit(
        self, run: Callable[[PlaceInLine], Coroutine[Any, Any, T]], *, mutates: bool = False
    ) -> APIFuture[T]:
        """Takes the next place in the line.

        Args:
            run: called when its turn has come.
            mutates: it changes the model. If the trainer fails it, what was submitted before the
                user saw that error is not sent: it was meant for another model than this now is.

        Raises:
            ClosedError: the model was unloaded, or the client closed.
            AmbiguousRequestError: what an earlier request has done to the model is unknown.
            RuntimeError: called by an objective, whose own step would have to end first.

        What stands behind a request in doubt ends with NotSentError.
        """
        if _computing.get() is self:
            raise RuntimeError(
                "an objective cannot submit requests to the model that is being trained with it: "
                "they would wait for its own step to end"
            )
        if self._closed:
            raise ClosedError(f"model {self.model_id} was unloaded; create a new training client")
        self._raise_doubt()
        self.changes += mutates
        seen = self._failures_seen

        async def in_line(future: APIFuture[T]) -> T:
            await self.line.acquire()
            place = PlaceInLine(self, future)
            try:
                if future.cancelled():
                    raise CancelledError
                if self._doubt is not None:
                    raise NotSentError(f"not sent, because {self._doubt}. Then {RECOVERY}")
                if seen < len(self._failures):
                    raise NotSentError(f"not sent, because {self._failures[-1]}; submit it again?")
                return await run(place)
            except APIError as error:
                if mutates and not isinstance(error, NotSentError):
                    self._failures.append(f"a request before it failed ({error})")
                raise
            finally:
                place.leave()

        return self.connection.submit(in_line, self._user_saw)

    async def post(self, path: str, message: Any, mutates: bool) -> Request:
        """Sends the next request of the model; its turn must have come.

        Raises:
            APIError: it was refused (its number is used for the next one), or it is not known
                whether it was applied (nothing more can be sent).
        """
        self._raise_doubt()
        await self._settle()
        number = self._next_seq
        numbered = msgspec.structs.replace(message, seq_id=number)
        encoding = self.connection.encoding
        write = partial(encoding.request, path, numbered, self.model_id, mutates)
        request = write(in_protobuf=encoding.in_protobuf)
        try:
            await self._submit(request)
        except APIError as refusal:
            if not encoding.may_be_refused_as_json(request, refusal):
                raise
            certain = is_refusal_of_json(path, refusal)
            if certain:
                encoding.switch(refusal)
            request = write(in_protobuf=True)
            try:
                await self._submit(request)
            except APIError:
                if certain or request.in_doubt:
                    raise
                raise refusal from None  # refused in both encodings, so it is not the encoding
            if not certain:
                encoding.switch(refusal)
        encoding.accepted(request)
        self._next_seq = number + 1
        return request

    async def _submit(self, request: Request) -> None:
        try:
            await self.connection.transport.submit(request)
        except APIError as error:
            if request.in_doubt and request.mutates:
                self.in_doubt(
                    f"{request.path} (number {self._next_seq}) may or may not have been applied: "
                    f"{error}"
                )
            elif request.in_doubt:
                self._unsettled = request
            raise

    async def _settle(self) -> None:
        """Sends again what was not clearly answered and changes nothing, to use its number.

        Raises:
            APIError: it is still not clearly answered; nothing else was sent.
        """
        if self._unsettled is None:
            return
        try:
            await self.connection.transport.submit(self._unsettled)
        except APIError as error:
            error.add_note(
                f"an earlier {self._unsettled.path}, which was not clearly answered, has to be "
                f"answered first; if it never is, {RECOVERY}"
            )
            error.may_have_been_applied = False
            raise
        self._unsettled = None
        self._next_seq += 1

    def in_doubt(self, reason: str) -> None:
        """Sees to it that nothing more is sent, because nobody knows what the model is now."""
        self._doubt = self._doubt or reason

    def part_failed(self, path: str, error: BaseException, parts: int) -> None:
        """Notes that a request that changes the model was applied in part."""
        reason = (
            f"{path} was sent in {parts} parts for its size, and not all succeeded: the gradients "
            "of some are, or may be, accumulated in the trainer"
        )
        error.add_note(reason)
        self.in_doubt(f"{reason} ({error})")
        if isinstance(error, APIError):
            error.may_have_been_applied = True

    def close(self) -> None:
        """Takes no more submissions."""
        self._closed = True

    def _user_saw(self, error: BaseException) -> None:
        if isinstance(error, APIError):
            self._failures_seen = len(self._failures)

    def _raise_doubt(self) -> None:
        if self._doubt is not None:
            error = AmbiguousRequestError(
                f"nothing more can be sent to model {self.model_id}: {self._doubt}. Now {RECOVERY}"
            )
            error.may_have_been_applied = True
            raise error


class PlaceInLine:
    """A place in the line, from the moment its turn has come.

    Args:
        lane: the line; it is held until :meth:`leave`.
        future: what the result will be put into.

    Attributes:
        future: the same.
        computing_seconds: what :meth:`compute` has taken so far.
    """

    def __init__(self, lane: Lane, future: APIFuture[Any]) -> None:
        self.future = future
        self.computing_seconds = 0.0
        self._lane = lane
        self._holds = True

    def begin(self) -> None:
        """Marks the request as under way, so that it can no longer be cancelled.

        Raises:
            CancelledError: it was cancelled before, or the client closed.
        """
        begin(self.future)

    def leave(self) -> None:
        """Lets the next one have its turn."""
        if self._holds:
            self._holds = False
            self._lane.line.release()

    async def request(
        self,
        path: str,
        messages: Sequence[Any],
        as_type: type[T],
        *,
        mutates: bool,
        check: Callable[[int, T], None] = lambda part, result: None,
        accepted: Callable[[], None] = lambda: None,
        leave: bool = True,
    ) -> list[T]:
        """Sends the parts of one request one after another, and waits for the results of all.

        Args:
            path: below ``/api/v1/``.
            messages: msgspec structs with a ``seq_id``, which is filled in.
            as_type: what each result is.
            mutates: it changes the model; then a part that fails beside others that are applied
                leaves the model in doubt.
            check: called with the position and the result of each part; an APIResponseError that it
                raises says that this is no answer to that part.
            accepted: called when the trainer has accepted all.
            leave: leave the line then.
        """
        lane, transport = self._lane, self._lane.connection.transport
        pipelined = lane.connection.settings.pipelined
        sent: list[Request] = []
        results: list[T] = []
        try:
            for part, message in enumerate(messages):
                request = await lane.post(path, message, mutates)
                if pipelined:
                    sent.append(request)
                else:
                    checked = partial(check, part)
                    results.append(await retrieve(transport, request, as_type, checked))
        except APIError as error:
            if mutates and (sent or results):
                lane.part_failed(path, error, len(messages))
            raise
        accepted()
        if leave and pipelined:
            task = asyncio.current_task()
            assert task is not None
            lane.under_way.add(task)
            task.add_done_callback(lane.under_way.discard)
            self.leave()
        answers = await asyncio.gather(
            *(
                retrieve(transport, request, as_type, partial(check, part))
                for part, request in enumerate(sent)
            ),
            return_exceptions=True,
        )
        failed = [answer for answer in answers if isinstance(answer, BaseException)]
        if failed and mutates and len(failed) < len(answers):
            lane.part_failed(path, failed[0], len(messages))
        if failed:
            raise failed[0]
        return results + [answer for answer in answers if not isinstance(answer, BaseException)]

    async def alone(self) -> None:
        """Waits until all that has left the line has its result."""
        if self._lane.under_way:
            await asyncio.wait(self._lane.under_way)

    async def compute(self, work: Callable[[], T]) -> T:
        """Runs a user's function in a worker thread, while holding the place in the line."""

        def guarded() -> T | Carried:
            _computing.set(self._lane)
            try:
                return work()
            except BaseException as error:
                return Carried(error)

        started = time.perf_counter()
        outcome = await in_daemon_thread(guarded, "mintjax-objective")
        self.computing_seconds += time.perf_counter() - started
        if isinstance(outcome, Carried):
            raise outcome
        return outcome
