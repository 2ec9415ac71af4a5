"""Waiting for the result of a request that the trainer has accepted."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec

from mintjax import errors
from mintjax.client.settings import Patience
from mintjax.client.transport import Failure, Reply, Request, Transport
from mintjax.errors import APIResponseError
from mintjax.protocol import messages, protobuf
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


async def retrieve(transport: Transport, request: Request, as_type: type[T]) -> T:
    """Ask for the result of an accepted request until it is there.

    Raises:
        RequestFailedError: the request was run and failed.
        AmbiguousRequestError: it changes the model, and its result never came.
        APIError: the trainer does not answer, or not in the protocol.
    """
    policy, patience = transport.policy, Patience(transport.policy)
    headers = {"Accept": f"{protobuf.MEDIA_TYPE}, application/json"} if request.headers else {}
    metadata_only, quick_answers, queue_state = True, 0, "active"
    while True:
        asked = messages.FutureRetrieveRequest(request.request_id, metadata_only)
        question = Request(_PATH, messages.encode(asked), headers=headers)
        read = partial(_read, transport, request, as_type, metadata_only)
        answer = await transport.attempt(question, read, policy.poll_timeout)
        if isinstance(answer, Failure) and answer.reply and answer.status == 408:
            reply, answer = answer.reply, _NotYet()  # a try_again in other clothes
            with suppress(APIResponseError):
                answer = transport.decode(_PATH, _NotYet, reply)
            answer.type = "try_again"
        if isinstance(answer, Failure):
            await _pause(transport, request, answer, patience)
        elif not isinstance(answer, _NotYet):
            transport.tell("done", request, patience.attempts)
            return answer
        elif answer.type != "try_again":
            metadata_only = False
            transport.check_size(answer.response_payload_size or 0)
        else:
            patience.renew()
            if (state := answer.queue_state or "active") != queue_state:
                queue_state = state
                level = logging.INFO if state == "active" else logging.WARNING
                reason = f": {answer.queue_state_reason}" if answer.queue_state_reason else ""
                detail = f"{state.replace('_', ' ')}{reason}"
                transport.tell("queue", request, patience.attempts, detail, level)
            held = time.monotonic() - question.started >= _FAST_ANSWER
            quick_answers = 0 if held else min(quick_answers + 1, 12)
            await asyncio.sleep(0 if held else min(0.1, 0.0005 * 2**quick_answers))


def _read(
    transport: Transport, request: Request, as_type: type[T], metadata_only: bool, reply: Reply
) -> T | _NotYet:
    """The result, or what came in its place."""
    result = f"{_PATH} ({request.path})"
    large = as_type is ForwardBackwardOutput and len(reply.body) > _LARGEST_EXCUSE
    if reply.is_protobuf or large:
        return transport.decode(result, as_type, reply)
    answer = transport.decode(_PATH, _NotYet, reply)
    if answer.type == "try_again" or (metadata_only and answer.status == "complete_metadata"):
        return answer
    if answer.error is not None:
        raise errors.RequestFailedError(
            transport.redact(str(answer.error)),
            request_id=request.request_id,
            category=answer.category if answer.category in ("user", "server") else "unknown",
        )
    return transport.decode(result, as_type, reply)


async def _pause(
    transport: Transport, request: Request, failure: Failure, patience: Patience
) -> None:
    """Let a while go by after a failed attempt, or raise its error when that takes too long."""
    policy = transport.policy
    held_open = isinstance(failure.error, errors.APITimeoutError)  # for longer than we asked
    deadline = policy.silence if held_open else policy.deadline
    failure.unclear = True
    gone = failure.status == 410
    if gone:  # the request may be sent again
        failure.bear = None
        if request.mutates and not policy.repeat_unanswered:
            deadline = 0.0
    await transport.pause(request, failure, patience, deadline)
    if gone:
        request.request_id = (await transport.call(request, messages.UntypedFuture)).request_id
