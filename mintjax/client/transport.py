"""One request and its answer: retries, deadlines, and what each status means."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import httpx
import msgspec

from mintjax import errors, protobuf, wire
from mintjax.client.settings import Patience, Progress, Settings, retry_after
from mintjax.errors import APIError, APIResponseError, APIStatusError
from mintjax.types import ForwardBackwardOutput

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")

_SLOWEST_UPLOAD = 20_000  # bytes per second
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_JUDGED_ON_ITS_MERITS = (400, 404, 413, 415, 422)


class Reply(msgspec.Struct):
    """An HTTP answer, read to its end."""

    status: int
    headers: httpx.Headers
    body: bytes

    @property
    def ok(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300

    @property
    def is_protobuf(self) -> bool:
        """Whether it says that it is a protocol buffer."""
        return self.headers.get("content-type", "").lower().startswith(protobuf.MEDIA_TYPE)

    @property
    def is_bare_400(self) -> bool:
        """Whether this is a proxy's 400, which says nothing, and not the trainer's."""
        return self.status == 400 and not detail(self.body)


class NoReply(Exception):
    """There was none.

    Args:
        error: what to raise if there is to be no further attempt.
        sent: whether the request may have reached the trainer.
    """

    def __init__(self, error: APIError, *, sent: bool) -> None:
        super().__init__()
        self.error = error
        self.sent = sent


class TooLarge(APIError):
    """An answer beyond the limit; asking again would not help."""


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
            headers={"User-Agent": f"mintjax/{version}", "Content-Type": "application/json"},
            follow_redirects=False,
            transport=settings.transport,
            trust_env=settings.url.scheme == "https",  # no proxy may read what goes in clear text
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )

    def tell(self, progress: Progress, level: int = logging.DEBUG) -> None:
        """Log what has happened to a request, and call the user's callback."""
        logger.log(
            level,
            "%s%s: %s%s (attempt %d, %.3f s)",
            progress.path,
            f" of model {progress.model_id}" if progress.model_id else "",
            progress.event,
            f", {progress.detail}" if progress.detail else "",
            progress.attempt,
            progress.seconds,
            extra=msgspec.structs.asdict(progress),
        )
        if self._settings.on_progress is not None:
            try:
                self._settings.on_progress(progress)
            except Exception:
                logger.exception("on_progress failed")

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def call(
        self,
        path: str,
        body: bytes,
        as_type: type[T],
        method: str = "POST",
        mutates: bool = False,
        key: str | None = None,
        model_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """Send a request until it is answered, and decode the answer.

        Args:
            path: below ``/api/v1/``.
            body: its content.
            as_type: what the answer is.
            mutates: it changes the model, so that twice is not once.
            key: idempotency key of a request that has been sent before.
            model_id: what it concerns, for the log.
            headers: what the content is, where it is not JSON.

        Raises:
            APIError: the trainer refused, or the deadline has passed; ``may_have_been_applied``
                says whether the request may have taken effect.
        """
        headers = {"X-Idempotency-Key": key or self.new_key(), **(headers or {})}
        patience = Patience(self.policy)
        in_doubt, bad_answers = False, 0
        while True:
            wait: float | None = None
            deadline = self.policy.deadline
            try:
                reply = await self.exchange(
                    path, body, headers, self._settings.timeout, method=method
                )
            except NoReply as none:
                error, unclear, again = none.error, none.sent, True
                if not self._reached:
                    deadline = min(deadline, self.policy.first_contact)
            else:
                if reply.ok:
                    try:
                        return self.decode(path, reply.body, as_type)
                    except APIResponseError as garbled:
                        error = garbled
                else:
                    error = self.refusal(reply)
                unclear, again, wait = _verdict(reply)
                if reply.ok or reply.is_bare_400:
                    bad_answers += 1
                    again = bad_answers <= self.policy.bad_answers
                elif reply.status in _JUDGED_ON_ITS_MERITS:
                    in_doubt = False  # a trainer that had applied it would have said so
            in_doubt |= unclear
            again &= not (in_doubt and mutates and not self.policy.repeat_unanswered)
            if not again or not await patience.wait(deadline, wait):
                raise self._final(error, path, patience, in_doubt, mutates)
            self.tell(patience.retry(path, error, model_id), logging.INFO)

    async def sign_of_life(self, path: str, body: bytes) -> bool:
        """One attempt, of which only the success matters."""
        try:
            return (await self.exchange(path, body, {}, self._settings.timeout)).ok
        except (NoReply, APIError):
            return False

    @staticmethod
    def new_key() -> str:
        """An idempotency key."""
        return uuid.uuid4().hex

    async def exchange(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        timeout: float,
        *,
        method: str = "POST",
    ) -> Reply:
        """One attempt.

        Raises:
            NoReply: no complete answer came.
        """
        limits = httpx.Timeout(timeout, connect=min(timeout, 15.0))
        failure: tuple[type[Exception], str]
        try:
            async with asyncio.timeout(timeout + len(body) / _SLOWEST_UPLOAD) as answering:
                async with self._http.stream(
                    method, path, content=body or None, headers=dict(headers), timeout=limits
                ) as response:
                    if not answering.expired():  # just now; then the next await ends it
                        answering.reschedule(None)  # httpx watches the rest, part by part
                    content = await self._read(response)
            self._reached = True
            return Reply(response.status_code, response.headers, content)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as caught:
            failure = (type(caught), str(caught) or type(caught).__name__)
        # Outside the handler: httpx's exceptions hold the request, and with it the key.
        kind, words = failure
        words = self.redact(words)
        if issubclass(kind, (httpx.TimeoutException, TimeoutError)):
            error = errors.APITimeoutError(f"{self.address}: no answer to {path} ({kind.__name__})")
        else:
            error = errors.APIConnectionError(f"{self.address}: no answer to {path} ({words})")
        raise NoReply(error, sent=not issubclass(kind, _UNSENT))

    async def _read(self, response: httpx.Response) -> bytes:
        content = bytearray()
        async for part in response.aiter_bytes():
            content += part
            self.check_size(len(content))
        return bytes(content)

    def check_size(self, size: int) -> None:
        """Refuse an answer beyond the limit.

        Raises:
            TooLarge: it is.
        """
        if size > self._settings.max_response_bytes:
            error = TooLarge(
                f"an answer of {size:,} bytes or more is beyond the limit of "
                f"{self._settings.max_response_bytes:,}; pass max_response_bytes to allow it"
            )
            error.may_have_been_applied = True
            raise error

    def redact(self, text: str) -> str:
        """The text without the API key."""
        return self._settings.key.redact(text)

    def decode(self, path: str, body: bytes, as_type: type[T], *, as_protobuf: bool = False) -> T:
        """Decode an answer: JSON, or the result of a pass as a protocol buffer.

        Raises:
            APIResponseError: it is not of that type; the message says at which field.
        """
        try:
            if as_protobuf and as_type is ForwardBackwardOutput:
                return cast("T", protobuf.decode_output(body))
            return wire.decode(body, as_type)
        except (errors.DataError, errors.ConfigError) as error:
            words = self.redact(str(error))
        raise APIResponseError(f"{self.address}: the answer to {path} is {words}")

    def refusal(self, reply: Reply) -> APIError:
        """The typed error of a status other than success, with the trainer's own words."""
        words = self.redact(detail(reply.body)) or "no detail given"
        status = reply.status
        if status < 400:
            return APIResponseError(
                f"{self.address} answered with HTTP {status}, which is not followed: the API key "
                "goes to no other address. Is base_url the trainer's own?"
            )
        if status == 402:
            return errors.BillingError(402, f"billing is paused for this account: {words}")
        if status in (401, 403):
            return errors.AuthenticationError(
                status, f"{words} (is the API key the one for this server?)"
            )
        kinds: dict[int, type[APIStatusError]] = {
            404: errors.NotFoundError,
            429: errors.RateLimitError,
        }
        default = errors.BadRequestError if status < 500 else errors.InternalServerError
        return kinds.get(status, default)(status, words)

    def _final(
        self, error: APIError, path: str, patience: Patience, in_doubt: bool, mutates: bool
    ) -> APIError:
        tried = f"{patience.attempts} attempts in {patience.seconds:.1f} s"
        if in_doubt and mutates and not isinstance(error, APIStatusError):
            error = errors.AmbiguousRequestError(
                f"{path} was sent and not answered ({tried}; last: {error}). It may or may not "
                "have been applied: compare a forward pass with what you expect, or go on from a "
                "checkpoint with create_training_client_from_state"
            )
        elif isinstance(error, errors.APIConnectionError):
            error = type(error)(f"{error}; {tried}")
        elif patience.attempts > 1:
            error.add_note(tried)
        error.may_have_been_applied = in_doubt
        return error


def _verdict(reply: Reply) -> tuple[bool, bool, float | None]:
    """Of a reply that is not the result: may it have been applied? retry? not before?"""
    status = reply.status
    wait = retry_after(reply.headers)
    if status == 429:
        return False, True, wait
    if status in (408, 409) or status >= 500:
        return True, True, wait
    if reply.ok:  # and yet not to be decoded
        return True, True, None
    return False, reply.is_bare_400, None


def detail(body: bytes) -> str:
    """The words in which a trainer refuses, or nothing."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    if not isinstance(answer, dict):
        return ""
    answer = cast("dict[str, Any]", answer)
    words = answer.get("detail") or answer.get("error") or answer.get("message") or ""
    if isinstance(words, list):  # FastAPI's own validation errors
        words = "; ".join(_validation_error(item) for item in cast("list[Any]", words))
    return str(words)[:2000]


def _validation_error(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    error = cast("dict[str, Any]", item)
    location = error.get("loc")
    where = ".".join(map(str, cast("list[Any]", location))) if isinstance(location, list) else ""
    return f"{where}: {error.get('msg', error)}" if where else str(error.get("msg", error))
