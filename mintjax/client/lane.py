"""The order of one model's requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from mintjax import wire
from mintjax.client.background import Carried, begin
from mintjax.client.connection import Connection
from mintjax.client.encodings import encode
from mintjax.client.futures import APIFuture
from mintjax.client.polling import Accepted, retrieve
from mintjax.client.settings import Progress
from mintjax.errors import AmbiguousRequestError, APIError, ClosedError, NotSentError

T = TypeVar("T")

Finish = Callable[[], Awaitable[T]]
"""What is left to do once a request no longer holds its place in the line."""


class Lane:
    """Requests of one model take effect in the order in which they were submitted.

    A request has its place in the line from the moment of its submission, and leaves it when the
    trainer has accepted all that belongs to it; its result is waited for outside. A number is
    given out only to a request that is being sent, and given back when the trainer refuses it.

    Args:
        connection: the session; every future keeps it, so that it outlives its requests.
        model_id: the model.
    """

    def __init__(self, connection: Connection, model_id: str) -> None:
        self.model_id = model_id
        self._connection = connection
        self._transport = connection.transport
        self._pipelined = connection.settings.pipelined
        self._turn = asyncio.Lock()  # first come, first served
        self._idle = asyncio.Event()
        self._under_way = 0
        self._next_seq = 1
        self._doubt: str | None = None
        self._failures = 0
        self._failures_seen = 0
        self._failure = ""
        self._closed = False
        self._computing = threading.local()

    def submit(
        self, send: Callable[[Future[Any]], Awaitable[Finish[T]]], *, mutates: bool = False
    ) -> APIFuture[T]:
        """Take the next place in the line.

        Args:
            send: called when its turn comes, with the future, to send what is to be sent.
            mutates: it changes the model. If the trainer fails it, what was submitted before the
                user saw that error is not sent: it was meant for another model than this now is.

        Raises:
            ClosedError: the model was unloaded, or the client closed.
            AmbiguousRequestError: what an earlier request has done to the model is unknown.
            RuntimeError: called by an objective, whose own step would have to end first.
        """
        if getattr(self._computing, "active", False):
            raise RuntimeError(
                "an objective cannot submit requests to the model that is being trained with it: "
                "they would wait for its own step to end"
            )
        if self._closed:
            raise ClosedError(f"model {self.model_id} was unloaded; create a new training client")
        self._raise_doubt()

        seen = self._failures_seen

        async def run(future: Future[T]) -> T:
            try:
                async with self._turn:
                    self._raise_doubt()
                    if seen < self._failures and not future.cancelled():
                        raise NotSentError(f"not sent, because {self._failure}; submit it again?")
                    finish = await send(future)
                    if not self._pipelined:
                        return await finish()
                    self._under_way += 1
                try:
                    return await finish()
                finally:
                    self._under_way -= 1
                    if not self._under_way:
                        self._idle.set()
            except APIError as error:
                if mutates and not isinstance(error, NotSentError):
                    self._failures += 1
                    self._failure = f"a request before it failed ({error})"
                raise

        background = self._connection.background
        future = background.start(run)
        return APIFuture(future, background.is_current_thread, self._connection, self._user_saw)

    def request(
        self,
        path: str,
        message: Callable[[int], Any],
        as_type: type[T],
        *,
        mutates: bool,
        before: Callable[[], None] = lambda: None,
    ) -> APIFuture[T]:
        """Submit a request that needs only its number; ``message(seq_id)`` is what it says.

        ``before`` is called when its turn has come; what it raises, the future raises.
        """

        async def send(future: Future[Any]) -> Finish[T]:
            begin(future)
            before()
            accepted = await self.post(path, message, mutates=mutates)
            return lambda: self.result(accepted, as_type)

        return self.submit(send, mutates=mutates)

    async def post(
        self, path: str, message: Callable[[int], Any], *, mutates: bool = False
    ) -> Accepted:
        """Send the next request of the model; its turn must have come.

        Raises:
            APIError: it was refused (its number is used for the next one), or it is not known
                whether it was applied (nothing more can be sent).
        """
        self._raise_doubt()
        seq_id = self._next_seq
        body = encode(path, message(seq_id), self._connection.limits)
        key = self._transport.new_key()
        try:
            answer = await self._transport.call(
                body.path,
                body.content,
                wire.UntypedFuture,
                "POST",
                mutates,
                key,
                self.model_id,
                body.headers,
            )
        except APIError as error:
            if self._connection.takes_protobuf(body, error):
                return await self.post(path, message, mutates=mutates)
            if error.may_have_been_applied:
                self.in_doubt(f"{path} (number {seq_id}) may or may not have been applied: {error}")
            raise
        self._next_seq = seq_id + 1
        self._transport.tell(
            Progress("accepted", path, self.model_id, answer.request_id, detail=str(body))
        )
        return Accepted(path, body, key, answer.request_id, self.model_id, mutates)

    async def post_all(
        self,
        path: str,
        messages: Sequence[Callable[[int], Any]],
        as_type: type[T],
        *,
        mutates: bool = False,
    ) -> Callable[[], Awaitable[list[T]]]:
        """Send the parts of one request one after another; what is returned waits for them all.

        A part that fails beside others that are applied leaves the model in doubt.
        """
        sent: list[Accepted] = []
        done: list[T] = []
        for i, message in enumerate(messages):
            try:
                accepted = await self.post(path, message, mutates=mutates)
                if not self._pipelined:
                    done.append(await self.result(accepted, as_type))
            except APIError as error:
                if mutates and i > 0:
                    self._part_failed(path, error, f"part {i + 1}", len(messages))
                raise
            sent.append(accepted)

        async def finish() -> list[T]:
            if not self._pipelined:
                return done
            results = await asyncio.gather(
                *(self.result(accepted, as_type) for accepted in sent), return_exceptions=True
            )
            failed = [r for r in results if isinstance(r, BaseException)]
            if failed and mutates and len(failed) < len(results):
                self._part_failed(path, failed[0], f"{len(failed)} parts", len(results))
            if failed:
                raise failed[0]
            return [r for r in results if not isinstance(r, BaseException)]

        return finish

    async def result(self, accepted: Accepted, as_type: type[T]) -> T:
        """Wait for the result of an accepted request."""
        return await retrieve(self._transport, accepted, as_type)

    async def compute(self, work: Callable[[], T]) -> T:
        """Run a user's function in a worker thread, while holding the place in the line."""

        def guarded() -> T | Carried:
            self._computing.active = True
            try:
                return work()
            except BaseException as error:
                return Carried(error)
            finally:
                self._computing.active = False

        outcome = await asyncio.to_thread(guarded)
        if isinstance(outcome, Carried):
            raise outcome
        return outcome

    async def idle(self) -> None:
        """Wait until every request that has left the line has its result."""
        while self._under_way:
            self._idle.clear()
            await self._idle.wait()

    def in_doubt(self, reason: str) -> None:
        """Send nothing more: nobody knows what the model is now."""
        self._doubt = self._doubt or reason

    def close(self) -> None:
        """Take no more submissions."""
        self._closed = True

    def _user_saw(self, error: BaseException) -> None:
        if isinstance(error, APIError):
            self._failures_seen = self._failures

    def _part_failed(self, path: str, error: BaseException, which: str, parts: int) -> None:
        reason = (
            f"{path} was sent in {parts} parts for its size, and {which} failed: the gradients of "
            "the others are, or may be, accumulated in the trainer"
        )
        error.add_note(reason)
        self.in_doubt(f"{reason} ({error})")

    def _raise_doubt(self) -> None:
        if self._doubt is not None:
            error = AmbiguousRequestError(
                f"nothing more can be sent to model {self.model_id}: {self._doubt}. Go on from the "
                "last checkpoint, with create_training_client_from_state_with_optimizer"
            )
            error.may_have_been_applied = True
            raise error
