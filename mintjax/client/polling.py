"""Waiting for the result of a request that the trainer has accepted."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, TypeVar

import msgspec

from mintjax import errors, wire
from mintjax.client.encodings import Body
from mintjax.client.settings import Event, Patience, Progress, retry_after
from mintjax.client.transport import NoReply, Reply, Transport
from mintjax.errors import APIError, APIResponseError

T = TypeVar("T")

_PATH = "retrieve_future"
_FAST_ANSWER = 0.5  # seconds; a trainer that does not hold the question open is asked less often


class Accepted(msgspec.Struct):
    """A request that the trainer has taken on, with what it takes to send it again."""

    path: str
    body: Body
    key: str
    request_id: str
    model_id: str | None = None
    mutates: bool = False
    sent_at: float = msgspec.field(default_factory=time.monotonic)


class _Envelope(msgspec.Struct):
    type: str | None = None
    status: str | None = None
    response_payload_size: int | None = None
    queue_state: str | None = None
    queue_state_reason: str | None = None
    error: Any = None
    category: Any = None


class _Retrieval:
    """The questions for one result: how often has what happened."""

    def __init__(self, transport: Transport, accepted: Accepted) -> None:
        self.transport = transport
        self.policy = transport.policy
        self.accepted = accepted
        self.patience = Patience(transport.policy)
        self.metadata_only = True
        self.bad_answers = 0
        self.quick_answers = 0
        self.queue_state = "active"
        self.asked_at = 0.0

    async def ask(self, as_type: type[T]) -> T | None:
        """Ask once; None where it is to be asked again."""
        question = wire.FutureRetrieveRequest(self.accepted.request_id, self.metadata_only)
        self.asked_at = time.monotonic()
        try:
            reply = await self.transport.exchange(
                _PATH, wire.encode(question), self.accepted.body.accept, self.policy.poll_timeout
            )
        except NoReply as none:
            return await self.pause(none.error)
        if not reply.ok:
            return await self.refused(reply)
        result = f"{_PATH} ({self.accepted.path})"
        try:
            if reply.is_protobuf:
                return self.transport.decode(result, reply.body, as_type, as_protobuf=True)
            envelope = self.transport.decode(_PATH, reply.body, _Envelope)
            if envelope.type == "try_again":
                return await self.not_yet(envelope)
            if envelope.status == "complete_metadata" and self.metadata_only:
                self.metadata_only = False
                return self.transport.check_size(envelope.response_payload_size or 0)
            if envelope.error is not None:
                known = envelope.category in ("user", "server")
                raise errors.RequestFailedError(
                    self.transport.redact(str(envelope.error)),
                    request_id=self.accepted.request_id,
                    category=envelope.category if known else "unknown",
                )
            return self.transport.decode(result, reply.body, as_type)
        except APIResponseError as garbled:
            return await self.bear(garbled)

    async def refused(self, reply: Reply) -> None:
        """Act on a status other than success."""
        error = self.transport.refusal(reply)
        if reply.status == 408:  # a try_again in other clothes
            try:
                envelope = self.transport.decode(_PATH, reply.body, _Envelope)
            except APIResponseError:
                envelope = _Envelope()
            await self.not_yet(envelope)
        elif reply.status == 410:
            done = self.accepted
            if done.mutates and not self.policy.repeat_unanswered:
                self.give_up(error)
            await self.pause(error)
            body = done.body
            again = await self.transport.call(
                body.path,
                body.content,
                wire.UntypedFuture,
                "POST",
                True,
                done.key,
                done.model_id,
                body.headers,
            )
            done.request_id = again.request_id
        elif reply.status in (409, 429) or reply.status >= 500:
            await self.pause(error, retry_after(reply.headers))
        elif reply.is_bare_400:
            await self.bear(error)
        else:
            error.may_have_been_applied = True
            raise error

    async def not_yet(self, envelope: _Envelope) -> None:
        """Tell of a new queue state, and ask again: at once, if the trainer held the question."""
        self.patience.renew()
        state = envelope.queue_state or "active"
        if state != self.queue_state:
            self.queue_state = state
            level = logging.INFO if state == "active" else logging.WARNING
            reason = f": {envelope.queue_state_reason}" if envelope.queue_state_reason else ""
            self.tell("queue", f"{state.replace('_', ' ')}{reason}", level)
        held = time.monotonic() - self.asked_at >= _FAST_ANSWER
        self.quick_answers = 0 if held else min(self.quick_answers + 1, 12)
        await asyncio.sleep(0 if held else min(0.1, 0.0005 * 2**self.quick_answers))

    async def bear(self, error: APIError) -> None:
        """Bear with an answer that is no protocol's, a few times."""
        self.bad_answers += 1
        if self.bad_answers > self.policy.bad_answers:
            error.may_have_been_applied = True
            raise error
        await self.pause(error)

    async def pause(self, error: APIError, after: float | None = None) -> None:
        """Let a while go by after a failed attempt, or raise its error when that takes too long."""
        unanswered = isinstance(error, errors.APITimeoutError)  # held for longer than we asked
        deadline = self.policy.silence if unanswered else self.policy.deadline
        if not await self.patience.wait(deadline, after):
            self.give_up(error)
        self.tell("retry", str(error), logging.INFO)

    def give_up(self, error: APIError) -> None:
        """Raise for a result that never came."""
        done = self.accepted
        if done.mutates:
            error = errors.AmbiguousRequestError(
                f"the trainer accepted {done.path} (request {done.request_id}), and its "
                f"result never came ({error}); it has probably been applied. Compare a forward "
                "pass with what you expect, or go on from a checkpoint"
            )
        error.may_have_been_applied = True
        raise error

    def tell(self, event: Event, detail: str, level: int) -> None:
        """Tell of the request."""
        of, seconds = self.accepted, time.monotonic() - self.accepted.sent_at
        attempt = self.patience.attempts
        self.transport.tell(
            Progress(event, of.path, of.model_id, of.request_id, attempt, seconds, detail), level
        )


async def retrieve(transport: Transport, accepted: Accepted, as_type: type[T]) -> T:
    """Ask for a result until it is there.

    Raises:
        RequestFailedError: the request was run and failed.
        AmbiguousRequestError: it changes the model, and its result never came.
        APIError: the trainer does not answer, or not in the protocol.
    """
    retrieval = _Retrieval(transport, accepted)
    while (result := await retrieval.ask(as_type)) is None:
        pass
    retrieval.tell("done", "", logging.DEBUG)
    return result
