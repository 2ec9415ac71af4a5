"""Waiting for the result of a request that the trainer has accepted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec

from mintjax import errors
from mintjax.client.outcomes import verdict
from mintjax.client.replies import Reply, text_of
from mintjax.client.settings import Patience
from mintjax.client.transport import Failure, Request, Transport
from mintjax.client.waiting import Wait
from mintjax.errors import APIResponseError
from mintjax.protocol import messages, protobuf
from mintjax.types import ForwardBackwardOutput

T = TypeVar("T")

_PATH = "retrieve_future"
_FAST_ANSWER = 0.5  # seconds; a trainer that does not hold the question open is asked less often
_MAX_STATUS_BYTES = 1 << 20  # a larger answer to a pass holds its result
_RESULTS = {
    "forward": "loss_fn_outputs",
    "forward_backward": "loss_fn_outputs",
    "forward_backward_custom_step1": "logprobs",
    "forward_backward_custom_step2": "surrogate",
    "optim_step": "metrics",
    "save_weights": "path",
    "load_weights": "path",
    "save_weights_for_sampler": "path",
    "create_model": "model_id",
    "asample": "sequences",
}
"""The field by which the result of each request is known."""
_OTHERS = frozenset(_RESULTS.values()) - {"metrics", "model_id"}  # which may come with any result


_ALIVE = partial(Request, "get_server_capabilities", method="GET")
"""A question that a trainer answers without a look at any request."""


class _NotYet(msgspec.Struct):
    """An answer that comes in place of a result."""

    type: str | None = None
    status: str | None = None
    request_id: str | None = None
    response_payload_size: int | None = None
    queue_state: str | None = None
    queue_state_reason: str | None = None
    error: Any = None
    category: Any = None


async def retrieve(
    transport: Transport,
    request: Request,
    as_type: type[T],
    check: Callable[[T], object] = lambda result: None,
) -> T:
    """Asks for the result of an accepted request until it is there.

    Args:
        transport: how to ask.
        request: what was accepted.
        as_type: what the result is.
        check: raises APIResponseError where a result cannot be that of the request.

    Raises:
        RequestFailedError: the request was run and failed.
        AmbiguousRequestError: it changes the model, and its result never came.
        APITimeoutError: the trainer has said "try again" for too long.
        APIError: the trainer does not answer, or not in the protocol.
    """
    policy, patience = transport.policy, Patience(transport.policy)
    headers = {"Accept": f"{protobuf.MEDIA_TYPE}, application/json"} if request.headers else {}
    metadata_only, quick_answers, queue_state = True, 0, "active"
    broken_since: float | None = None
    started, longest = time.monotonic(), "RetryPolicy(result=...)"
    wait = Wait(request, f"{transport.address} is at work on it", started, policy.result, longest)
    with transport.notices.watch(wait):
        while True:
            asked = messages.FutureRetrieveRequest(request.request_id, metadata_only)
            question = Request(
                _PATH, messages.encode(asked), headers=headers, request_id=request.request_id
            )
            read = partial(_read, transport, request, as_type, check, metadata_only)
            answer = await transport.attempt(question, read, policy.poll_timeout)
            if isinstance(answer, Failure) and answer.reply and answer.status == 408:
                reply, answer = answer.reply, _NotYet()  # a try_again in other clothes
                with suppress(APIResponseError):
                    answer = transport.decode(_PATH, _NotYet, reply)
                answer.type = "try_again"
            if isinstance(answer, Failure):
                now = time.monotonic()
                broken_since = (broken_since or now) if answer.status == 500 else None
                broken = broken_since is not None and now - broken_since >= policy.broken_result
                give_up = broken and await transport.arrives(_ALIVE()) is None
                await _pause(transport, request, answer, patience, wait, give_up)
                wait.attempt = patience.attempts
            elif not isinstance(answer, _NotYet):
                transport.report("done", request, patience.attempts)
                return answer
            elif answer.type != "try_again":
                metadata_only = False
                transport.check_size(answer.response_payload_size or 0)
            else:
                patience.renew()
                broken_since = None
                state = answer.queue_state or "active"
                reason = f": {answer.queue_state_reason}" if answer.queue_state_reason else ""
                detail = transport.words(f"{state.replace('_', ' ')}{reason}")
                wait.why = f"{transport.address} has no result yet; its queue is {detail}"
                wait.started, wait.limit, wait.setting = started, policy.result, longest
                if state != queue_state:
                    queue_state = state
                    level = logging.INFO if state == "active" else logging.WARNING
                    transport.report("queue", request, patience.attempts, detail, level)
                _check_time(transport, request, time.monotonic() - started, wait.why)
                held = time.monotonic() - question.started >= _FAST_ANSWER
                quick_answers = 0 if held else min(quick_answers + 1, 12)
                await asyncio.sleep(0 if held else min(0.1, 0.0005 * 2**quick_answers))


def _check_time(transport: Transport, request: Request, seconds: float, why: str) -> None:
    if seconds < transport.policy.result:
        return
    error = errors.APITimeoutError(
        f"{request.path} (request {request.request_id}) has no result after {seconds:.0f} s: "
        f"{why}; RetryPolicy(result=...) changes how long that is waited for"
    )
    error.may_have_been_applied = request.may_have_been_applied
    raise error


def _read(
    transport: Transport,
    request: Request,
    as_type: type[T],
    check: Callable[[T], object],
    metadata_only: bool,
    reply: Reply,
) -> T | _NotYet:
    """Decodes the result, or what came in its place.

    Raises:
        APIResponseError: it is neither, or belongs to another request.
        RequestFailedError: the request was run and failed.
    """
    result = f"{_PATH} ({request.path})"
    large = as_type is ForwardBackwardOutput and len(reply.body) > _MAX_STATUS_BYTES
    if reply.is_protobuf or large:
        output = transport.decode(result, as_type, reply)
        check(output)
        return output
    answer = transport.decode(_PATH, _NotYet, reply)
    if answer.request_id not in (None, request.request_id):
        raise APIResponseError(
            f"{transport.address}: the answer to {result} is to request "
            f"{transport.words(str(answer.request_id))}"
        )
    if answer.type == "try_again" or (metadata_only and answer.status == "complete_metadata"):
        return answer
    if answer.error is not None:
        words = transport.words(text_of(answer.error))
        if not isinstance(answer.category, str):  # trainers give every failure a category
            raise APIResponseError(f"{transport.address}: somebody answered to {result}: {words}")
        known = answer.category in ("user", "server")
        raise errors.RequestFailedError(
            words,
            request_id=request.request_id,
            category=answer.category if known else "unknown",
        )
    _check_kind(transport, request.path, answer.type, reply)
    output = transport.decode(result, as_type, reply)
    check(output)
    return output


def _check_kind(transport: Transport, path: str, kind: str | None, reply: Reply) -> None:
    """Refuses what is the result of another kind of request, or of none.

    Raises:
        APIResponseError: it is.
    """
    field = _RESULTS.get(path)
    if field is None:
        return
    given = transport.decode(_PATH, dict[str, msgspec.Raw], reply).keys()
    others = (_OTHERS & given) - {field}
    other_type = kind in _RESULTS and kind != path
    if others or other_type or not (field in given or kind == path or _names_session(path, given)):
        what = ", ".join(sorted(map(repr, given))[:8]) or "nothing"
        raise APIResponseError(
            f"{transport.address}: the answer to {_PATH} ({path}) holds {transport.words(what)}; a "
            f"result of {path} holds {field!r}"
        )


def _names_session(path: str, given: Collection[str]) -> bool:
    return path == "save_weights_for_sampler" and "sampling_session_id" in given


async def _pause(
    transport: Transport,
    request: Request,
    failure: Failure,
    patience: Patience,
    wait: Wait[Request],
    give_up: bool,
) -> None:
    """Lets a while go by after a failed attempt, or raises its error when that takes too long."""
    policy = transport.policy
    held_open = isinstance(failure.error, errors.APITimeoutError)  # for longer than we asked
    deadline = policy.silence if held_open else policy.deadline
    wait.why, wait.started, wait.limit = str(failure.error), patience.started, deadline
    wait.setting = f"RetryPolicy({'silence' if held_open else 'deadline'}=...)"
    if failure.status == 500 and policy.broken_result < deadline:
        wait.limit, wait.setting = policy.broken_result, "RetryPolicy(broken_result=...)"
    if give_up:
        deadline = 0.0
    gone = failure.status == 410
    repeats = "never" if failure.final else verdict(failure.ending, in_doubt=True).repeats
    if gone:  # the request may be sent again
        repeats = "until the deadline"
        if request.is_given_up_in_doubt(policy):
            deadline = 0.0
    await transport.pause(request, failure, patience, deadline, repeats)
    if gone:
        await transport.submit(request)
