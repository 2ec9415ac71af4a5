"""Waiting for the result of a request that the trainer has accepted."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from mintjax import errors, protobuf, wire
from mintjax.client.settings import Event, Patience
from mintjax.client.transport import Failure, Reply, Request, Transport
from mintjax.errors import APIResponseError
from mintjax.types import ForwardBackwardOutput

T = TypeVar("T")

_PATH = "retrieve_future"
_FAST_ANSWER = 0.5  # seconds; a trainer that does not hold the question open is asked less often
_LARGEST_EXCUSE = 1 << 20  # bytes; an answer to a pass that is larger has its result in it


class _NotYet(msgspec.Struct):
    """What comes in place of a result."""

    type: str | None = None
    status: str | None = None
    response_payload_size: int | None = None
    queue_state: str | None = None
    queue_state_reason: str | None = None
    error: Any = None
    category: Any = None


class _Retrieval:
    """The questions for one result: how often has what happened."""

    def __init__(self, transport: Transport, request: Request) -> None:
        self.transport = transport
        self.request = request
        self.patience = Patience(transport.policy)
        self.metadata_only = True
        self.quick_answers = 0
        self.queue_state = "active"

    async def ask(self, as_type: type[T]) -> T | None:
        """Ask once; None where it is to be asked again."""
        asked = wire.FutureRetrieveRequest(self.request.request_id, self.metadata_only)
        headers = {"Accept": f"{protobuf.MEDIA_TYPE}, application/json"}
        question = Request(
            _PATH, wire.encode(asked), headers=headers if self.request.headers else {}
        )
        answer = await self.transport.attempt(
            question, lambda reply: self.read(reply, as_type), self.transport.policy.poll_timeout
        )
        if isinstance(answer, Failure) and answer.reply and answer.status == 408:
            reply, answer = answer.reply, _NotYet()  # a try_again in other clothes
            with suppress(APIResponseError):
                answer = self.transport.decode(_PATH, reply, _NotYet)
            answer.type = "try_again"
        if isinstance(answer, Failure):
            await self.pause(answer)
        elif not isinstance(answer, _NotYet):
            return answer
        elif answer.type == "try_again":
            await self.wait(answer, question)
        else:
            self.metadata_only = False
            self.transport.check_size(answer.response_payload_size or 0)
        return None

    def read(self, reply: Reply, as_type: type[T]) -> T | _NotYet:
        """The result, or what came in its place."""
        result = f"{_PATH} ({self.request.path})"
        large = as_type is ForwardBackwardOutput and len(reply.body) > _LARGEST_EXCUSE
        if reply.is_protobuf or large:
            return self.transport.decode(result, reply, as_type)
        answer = self.transport.decode(_PATH, reply, _NotYet)
        withheld = answer.status == "complete_metadata" and self.metadata_only
        if answer.type == "try_again" or withheld:
            return answer
        if answer.error is not None:
            known = answer.category in ("user", "server")
            raise errors.RequestFailedError(
                self.transport.redact(str(answer.error)),
                request_id=self.request.request_id,
                category=answer.category if known else "unknown",
            )
        return self.transport.decode(result, reply, as_type)

    async def wait(self, answer: _NotYet, question: Request) -> None:
        """Tell of a new queue state, and ask again: at once, if the trainer held the question."""
        self.patience.renew()
        state = answer.queue_state or "active"
        if state != self.queue_state:
            self.queue_state = state
            level = logging.INFO if state == "active" else logging.WARNING
            reason = f": {answer.queue_state_reason}" if answer.queue_state_reason else ""
            self.tell("queue", f"{state.replace('_', ' ')}{reason}", level)
        held = time.monotonic() - question.started >= _FAST_ANSWER
        self.quick_answers = 0 if held else min(self.quick_answers + 1, 12)
        await asyncio.sleep(0 if held else min(0.1, 0.0005 * 2**self.quick_answers))

    async def pause(self, failure: Failure) -> None:
        """Let a while go by after a failed attempt, or raise its error when that takes too long."""
        request, policy = self.request, self.transport.policy
        gone = failure.status == 410
        if gone:  # the request may be sent again
            failure.bear = None
        held_open = isinstance(failure.error, errors.APITimeoutError)  # for longer than we asked
        deadline = policy.silence if held_open else policy.deadline
        again = policy.repeat_unanswered or not (gone and request.mutates)
        if not (again and await self.patience.wait(deadline, failure.wait, failure.bear)):
            error = failure.error
            if request.mutates and failure.bear is None:
                error = errors.AmbiguousRequestError(
                    f"the trainer accepted {request.path} (request {request.request_id}), and its "
                    f"result never came ({error}); it has probably been applied. Compare a forward "
                    "pass with what you expect, or go on from a checkpoint"
                )
            error.may_have_been_applied = True
            raise error
        self.tell("retry", str(failure.error), logging.INFO)
        if gone:
            again_as = await self.transport.call(request, wire.UntypedFuture)
            request.request_id = again_as.request_id

    def tell(self, event: Event, detail: str, level: int) -> None:
        """Tell of the request."""
        self.transport.tell(event, self.request, self.patience.attempts, detail, level)


async def retrieve(transport: Transport, request: Request, as_type: type[T]) -> T:
    """Ask for the result of an accepted request until it is there.

    Raises:
        RequestFailedError: the request was run and failed.
        AmbiguousRequestError: it changes the model, and its result never came.
        APIError: the trainer does not answer, or not in the protocol.
    """
    retrieval = _Retrieval(transport, request)
    while (result := await retrieval.ask(as_type)) is None:
        pass
    retrieval.tell("done", "", logging.DEBUG)
    return result
