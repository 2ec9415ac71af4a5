"""One request and its answer: retries, deadlines, and what each status means."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import httpx
import msgspec

from mintjax import errors
from mintjax.client.settings import Event, Patience, Progress, Settings, retry_after
from mintjax.errors import APIError, APIResponseError, APIStatusError
from mintjax.protocol import messages, protobuf
from mintjax.types import ForwardBackwardOutput

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")

_CODINGS = ("gzip", "deflate")
_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": ", ".join(_CODINGS)}
_SLOWEST_UPLOAD = 20_000  # bytes per second
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_KINDS: dict[int, type[APIStatusError]] = {
    401: errors.AuthenticationError,
    402: errors.BillingError,
    403: errors.AuthenticationError,
    404: errors.NotFoundError,
    429: errors.RateLimitError,
}


class Request(msgspec.Struct):
    """A request, with all that it takes to send it again.

    Args:
        path: below ``/api/v1/``.
        body: its content.
        model_id: what it concerns, for the log.
        mutates: it changes the model, so that twice is not once.
        address: where it goes, if not to ``path``: passes as protocol buffers have but one place.
        method: of HTTP.
        headers: what the content is, where it is not JSON, or what the answer is to be.
        key: the idempotency key.
        started: when it was made, in seconds.
        request_id: the trainer's name for it, once accepted.
    """

    path: str
    body: bytes = b""
    model_id: str | None = None
    mutates: bool = False
    address: str = ""
    method: str = "POST"
    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    key: str = msgspec.field(default_factory=lambda: uuid.uuid4().hex)
    started: float = msgspec.field(default_factory=time.monotonic)
    request_id: str = ""


class Reply(msgspec.Struct):
    """An HTTP answer, read to its end."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def is_protobuf(self) -> bool:
        """Whether it says that it is a protocol buffer."""
        return self.headers.get("content-type", "").lower().startswith(protobuf.MEDIA_TYPE)


class Failure(msgspec.Struct):
    """An attempt that brought no result.

    Args:
        error: what to raise if there is to be no further attempt.
        unclear: whether the request may have been applied.
        bear: how many failures of this kind to bear with; None for any number.
        wait: seconds before which there should be no further attempt, or None.
        reply: what came, if anything.
    """

    error: APIError
    unclear: bool = False
    bear: int | None = 0
    wait: float | None = None
    reply: Reply | None = None

    @property
    def status(self) -> int:
        """Of the reply; 0 if there was none."""
        return self.reply.status if self.reply else 0


class Transport:
    """Sends requests to one trainer, and knows when to send them again.

    Args:
        settings: which trainer, and how.
        version: the client's.
    """

    def __init__(self, settings: Settings, version: str) -> None:
        self.policy = settings.policy
        self.address = str(settings.url).rstrip("/")
        self._settings = settings
        self._reached = False
        self._http = httpx.AsyncClient(
            base_url=f"{self.address}/api/v1/",
            auth=settings.key,
            headers={"User-Agent": f"mintjax/{version}", **_HEADERS},
            follow_redirects=False,
            transport=settings.transport,
            trust_env=settings.url.scheme == "https",  # no proxy may read what goes in clear text
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )
        self.aclose = self._http.aclose

    def tell(
        self, event: Event, of: Request, attempt: int, detail: str = "", level: int = logging.DEBUG
    ) -> None:
        """Log what has happened to a request, and call the user's callback."""
        seconds, name = time.monotonic() - of.started, of.request_id or None
        progress = Progress(event, of.path, of.model_id, name, attempt, seconds, detail)
        logger.log(level, "%s", progress, extra=msgspec.structs.asdict(progress))
        if self._settings.on_progress is not None:
            try:
                self._settings.on_progress(progress)
            except Exception:
                logger.exception("on_progress failed")

    async def submit(self, request: Request) -> None:
        """Send a request until the trainer has accepted it, for its result to be asked for."""
        request.request_id = (await self.call(request, messages.UntypedFuture)).request_id
        what = ", ".join(request.headers.values()) or "application/json"
        self.tell("accepted", request, 1, f"{len(request.body):,} bytes of {what}")

    async def call(self, request: Request, as_type: type[T]) -> T:
        """Send a request until it is answered, and decode the answer.

        Raises:
            APIError: the trainer refused, or the deadline has passed; ``may_have_been_applied``
                says whether the request may have taken effect.
        """
        patience = Patience(self.policy)
        in_doubt = False
        read = partial(self.decode, request.path, as_type)
        while True:
            outcome = await self.attempt(request, read, self._settings.timeout)
            if not isinstance(outcome, Failure):
                return outcome
            if outcome.status in (400, 404, 413, 415, 422) and outcome.bear == 0:
                in_doubt = False  # a trainer that had applied it would have said so
            in_doubt |= outcome.unclear
            outcome.unclear = in_doubt
            deadline = self.policy.deadline
            if not self._reached:
                deadline = min(deadline, self.policy.first_contact)
            if in_doubt and request.mutates and not self.policy.repeat_unanswered:
                deadline = 0.0
            await self.pause(request, outcome, patience, deadline)

    async def pause(
        self, request: Request, failure: Failure, patience: Patience, deadline: float
    ) -> None:
        """Let a while go by before the next attempt.

        Args:
            request: what is being tried.
            failure: of the last attempt; unclear if any was.
            patience: counts the attempts.
            deadline: seconds for all of them.

        Raises:
            APIError: there is to be no further attempt.
        """
        if await patience.wait(deadline, failure.wait, failure.bear):
            why = str(failure.error)
            return self.tell("retry", request, patience.attempts, why, logging.INFO)
        error, tried = failure.error, f"{patience.attempts} attempts in {patience.seconds:.1f} s"
        what, may = "sent and not answered", "may or may not have"
        answered = isinstance(error, APIStatusError)
        if request.request_id:
            what = f"accepted (request {request.request_id}), and its result never came"
            may, answered = "has probably", answered and failure.bear is not None
        if failure.unclear and request.mutates and not answered:
            error = errors.AmbiguousRequestError(
                f"{request.path} was {what} ({tried}; last: {error}). It {may} been applied: "
                "compare a forward pass with what you expect, or go on from a checkpoint with "
                "create_training_client_from_state"
            )
        elif isinstance(error, errors.APIConnectionError):
            error = type(error)(f"{error}; {tried}")
        elif patience.attempts > 1:
            error.add_note(tried)
        error.may_have_been_applied = failure.unclear
        raise error

    async def arrives(self, request: Request) -> bool:
        """One attempt, of which only the success matters."""
        outcome = await self.attempt(request, lambda reply: reply, self._settings.timeout)
        return not isinstance(outcome, Failure)

    async def attempt(
        self, request: Request, read: Callable[[Reply], T], timeout: float
    ) -> T | Failure:
        """Send a request once.

        Args:
            request: what to send.
            read: makes the result of a successful reply; an APIResponseError that it raises is a
                failure, any other error goes through.
            timeout: seconds for the answer.
        """
        try:
            reply = await self._exchange(request, timeout)
        except APIError as error:
            return Failure(error, unclear=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as caught:
            return self._unanswered(request.path, caught)
        if 200 <= reply.status < 300:
            try:
                return read(reply)
            except APIResponseError as garbled:
                return Failure(garbled, True, self.policy.bad_answers, reply=reply)
        error, wait = self._refusal(reply), retry_after(reply.headers)
        if reply.status in (408, 409, 429) or reply.status >= 500:
            return Failure(error, reply.status != 429, None, wait, reply)
        from_proxy = reply.status == 400 and not _words(reply.body)
        return Failure(error, bear=self.policy.bad_answers if from_proxy else 0, reply=reply)

    async def _exchange(self, request: Request, timeout: float) -> Reply:
        limits = httpx.Timeout(timeout, connect=min(timeout, 15.0))
        headers = {"X-Idempotency-Key": request.key, **request.headers}
        content = bytearray()
        async with asyncio.timeout(timeout + len(request.body) / _SLOWEST_UPLOAD) as answering:
            async with self._http.stream(
                request.method,
                request.address or request.path,
                content=request.body or None,
                headers=headers,
                timeout=limits,
            ) as response:
                if not answering.expired():  # just now; then the next await ends it
                    answering.reschedule(None)  # httpx watches the rest, part by part
                self._check_coding(response.headers)
                async for part in response.aiter_bytes():
                    content += part
                    self.check_size(len(content))
        self._reached = True
        return Reply(response.status_code, response.headers, bytes(content))

    def _unanswered(self, path: str, caught: Exception) -> Failure:
        # The error is raised elsewhere: httpx's exceptions hold the request, and with it the key.
        name = type(caught).__name__
        if isinstance(caught, (httpx.TimeoutException, TimeoutError)):
            kind, words = errors.APITimeoutError, name
        else:
            kind, words = errors.APIConnectionError, self.redact(str(caught)) or name
        error = kind(f"{self.address}: no answer to {path} ({words})")
        return Failure(error, unclear=not isinstance(caught, _UNSENT), bear=None)

    def check_size(self, size: int) -> None:
        """Refuse an answer beyond the limit.

        Raises:
            APIError: it is; asking again would not help.
        """
        if size > self._settings.max_response_bytes:
            error = APIError(
                f"an answer of {size:,} bytes or more is beyond the limit of "
                f"{self._settings.max_response_bytes:,}; pass max_response_bytes to allow it"
            )
            error.may_have_been_applied = True
            raise error

    def _check_coding(self, headers: httpx.Headers) -> None:
        # What comes in one piece is unfolded before its size is known: a thousandfold at most by
        # these, without end by others, which httpx reads as well where their packages are.
        coding = headers.get("content-encoding", "identity").lower()
        if coding not in (*_CODINGS, "identity"):
            error = APIError(f"{self.address} answered in {coding!r}, which was not asked for")
            error.may_have_been_applied = True
            raise error

    def redact(self, text: str) -> str:
        """The text without the API key."""
        return self._settings.key.redact(text)

    def decode(self, path: str, as_type: type[T], reply: Reply) -> T:
        """Decode an answer: JSON, or the result of a pass as a protocol buffer.

        Raises:
            APIResponseError: it is not of that type; the message says at which field.
        """
        try:
            if reply.is_protobuf and as_type is ForwardBackwardOutput:
                return cast("T", protobuf.decode_output(reply.body))
            return messages.decode(reply.body, as_type)
        except (errors.DataError, errors.ConfigError) as error:
            words = self.redact(str(error))
        raise APIResponseError(f"{self.address}: the answer to {path} is {words}")

    def _refusal(self, reply: Reply) -> APIError:
        """The typed error of a status other than success, with the trainer's own words."""
        status, words = reply.status, self.redact(_words(reply.body)) or "no detail given"
        if status < 400:
            return APIResponseError(
                f"{self.address} answered with HTTP {status}, which is not followed: the API key "
                "goes to no other address. Is base_url the trainer's own?"
            )
        if status == 402:
            words = f"billing is paused for this account: {words}"
        if status in (401, 403):
            words += " (is the API key the one for this server?)"
        other = errors.BadRequestError if status < 500 else errors.InternalServerError
        return _KINDS.get(status, other)(status, words)


def _words(body: bytes) -> str:
    """The words in which a trainer refuses, or nothing."""
    try:
        answer = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    words = answer.get("detail") or answer.get("error") or answer.get("message") or ""
    if isinstance(words, list):  # FastAPI's own validation errors
        words = "; ".join(map(_validation_error, cast("list[Any]", words)))
    return str(words)[:2000]


def _validation_error(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    error = cast("dict[str, Any]", item)
    location, words = error.get("loc"), str(error.get("msg", error))
    if not isinstance(location, list):
        return words
    return f"{'.'.join(map(str, cast('list[Any]', location)))}: {words}"
