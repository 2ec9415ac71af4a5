"""Waiting for the result of a request that the trainer has accepted."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, TypeVar

import msgspec

from mintjax import errors, wire
from mintjax.client.settings import Event, Patience, Progress, retry_after
from mintjax.client.transport import NoReply, Reply, Transport
from mintjax.errors import APIError, APIResponseError

T = TypeVar("T")

_FAST_ANSWER = 0.5  # seconds; a trainer that does not hold the question open is asked less often


class Accepted(msgspec.Struct):
    """A request that the trainer has taken on, with what it takes to send it again."""

    path: str
    body: bytes
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


class _Wait:
    """One wait: how often has what happened."""

    def __init__(self, transport: Transport, accepted: Accepted) -> None:
        self.transport = transport
        self.accepted = accepted
        self.patience = Patience(transport.policy)
        self.metadata_only = True
        self.bad_answers = 0
        self.quick_answers = 0
        self.queue_state = "active"
        self.last_answer = time.monotonic()

    async def pause(self, error: APIError, after: float | None = None) -> None:
        """Let a while go by after a failed attempt, or raise its error when that takes too long."""
        policy = self.transport.policy
        deadline = policy.deadline
        if isinstance(error, errors.APITimeoutError):  # held open for longer than we asked
            deadline = policy.silence
        if not await self.patience.wait(deadline, after):
            self.give_up(error)
        self.tell("retry", str(error), logging.INFO)

    def tell(self, event: Event, detail: str, level: int) -> None:
        """Tell of the request."""
        done = self.accepted
        seconds = time.monotonic() - done.sent_at
        progress = Progress(
            event,
            done.path,
            done.model_id,
            done.request_id,
            self.patience.attempts,
            seconds,
            detail,
        )
        self.transport.tell(progress, level)

    def give_up(self, error: APIError) -> None:
        """Raise for a result that never came."""
        accepted = self.accepted
        if accepted.mutates:
            error = errors.AmbiguousRequestError(
                f"the trainer accepted {accepted.path} (request {accepted.request_id}), and its "
                f"result never came ({error}); it has probably been applied. Compare a forward "
                "pass with what you expect, or go on from a checkpoint"
            )
        error.may_have_been_applied = True
        raise error

    async def bear(self, error: APIError) -> None:
        """Bear with an answer that is no protocol's, a few times."""
        self.bad_answers += 1
        if self.bad_answers > self.transport.policy.bad_answers:
            error.may_have_been_applied = True
            raise error
        await self.pause(error)

    async def not_yet(self, envelope: _Envelope, asked_at: float) -> None:
        """Tell of a new queue state, and ask again: at once, if the trainer held the question."""
        state = envelope.queue_state or "active"
        if state != self.queue_state:
            self.queue_state = state
            level = logging.INFO if state == "active" else logging.WARNING
            reason = f": {envelope.queue_state_reason}" if envelope.queue_state_reason else ""
            self.tell("queue", f"{state.replace('_', ' ')}{reason}", level)
        if time.monotonic() - asked_at >= _FAST_ANSWER:
            self.quick_answers = 0
        elif self.quick_answers < 12:
            self.quick_answers += 1
        await asyncio.sleep(min(0.1, 0.0005 * 2**self.quick_answers) if self.quick_answers else 0)


async def retrieve(transport: Transport, accepted: Accepted, as_type: type[T]) -> T:
    """Ask for a result until it is there.

    Raises:
        RequestFailedError: the request was run and failed.
        AmbiguousRequestError: it changes the model, and its result never came.
        APIError: the trainer does not answer, or not in the protocol.
    """
    wait = _Wait(transport, accepted)
    while True:
        question = wire.encode(
            wire.FutureRetrieveRequest(accepted.request_id, allow_metadata_only=wait.metadata_only)
        )
        asked_at = time.monotonic()
        try:
            reply = await transport.exchange(
                "retrieve_future", question, {}, transport.policy.poll_timeout
            )
        except NoReply as none:
            await wait.pause(none.error)
            continue
        if not reply.ok:
            await _refused(wait, reply, asked_at)
            continue
        try:
            envelope = transport.decode("retrieve_future", reply.body, _Envelope)
            result = _result(transport, wait, envelope, reply, as_type)
        except APIResponseError as garbled:
            await wait.bear(garbled)
            continue
        wait.patience.renew()
        if result is not None:
            wait.tell("done", "", logging.DEBUG)
            return result
        if envelope.type == "try_again":
            await wait.not_yet(envelope, asked_at)


def _result(
    transport: Transport, wait: _Wait, envelope: _Envelope, reply: Reply, as_type: type[T]
) -> T | None:
    if envelope.type == "try_again":
        return None
    if envelope.status == "complete_metadata" and wait.metadata_only:
        wait.metadata_only = False
        transport.check_size(envelope.response_payload_size or 0)
        return None
    if envelope.error is not None:
        raise errors.RequestFailedError(
            transport.redact(str(envelope.error)),
            request_id=wait.accepted.request_id,
            category=envelope.category if envelope.category in ("user", "server") else "unknown",
        )
    return transport.decode(f"retrieve_future ({wait.accepted.path})", reply.body, as_type)


async def _refused(wait: _Wait, reply: Reply, asked_at: float) -> None:
    transport, accepted = wait.transport, wait.accepted
    error = transport.refusal(reply)
    if reply.status == 408:  # a try_again in other clothes
        try:
            envelope = transport.decode("retrieve_future", reply.body, _Envelope)
        except APIResponseError:
            envelope = _Envelope()
        wait.patience.renew()
        await wait.not_yet(envelope, asked_at)
    elif reply.status == 410:
        if accepted.mutates and not transport.policy.repeat_unanswered:
            wait.give_up(error)
        await wait.pause(error)
        again = await transport.call(
            accepted.path, accepted.body, wire.UntypedFuture, mutates=True, key=accepted.key
        )
        accepted.request_id = again.request_id
    elif reply.status == 429 or reply.status == 409 or reply.status >= 500:
        await wait.pause(error, retry_after(reply.headers))
    elif reply.is_bare_400:
        await wait.bear(error)
    else:
        error.may_have_been_applied = True
        raise error
