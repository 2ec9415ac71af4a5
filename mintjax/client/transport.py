"""One request and its answer: retries, deadlines, and what each status means."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar, cast

import httpx
import msgspec

from mintjax import errors
from mintjax.client.outcomes import Ending, Repeats, ending_of, verdict
from mintjax.client.replies import (
    CODING,
    Reply,
    check_sparse,
    largest_content,
    printable,
    unfold,
)
from mintjax.client.settings import Event, Patience, Progress, RetryPolicy, Settings, retry_after
from mintjax.client.waiting import Notices, Wait
from mintjax.errors import APIError, APIResponseError, APIStatusError
from mintjax.protocol import messages, protobuf
from mintjax.types import ForwardBackwardOutput, SampleResponse

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")

_HEADERS = {"Content-Type": "application/json", "Accept-Encoding": CODING}
_KEY_HEADER = "X-Idempotency-Key"
_SLOWEST = 20_000  # bytes per second, up or down; what is slower counts as no answer
_SECONDS_FOR_FAREWELL = 0.3
_LEAST_ATTEMPT = 1.0  # seconds for an attempt, however near the deadline is
_REMEMBERED_IDS = 10_000
_AWAY = (502, 503)
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_CHANGE_NOTHING = frozenset(
    {"client/config", "forward", "get_info", "get_server_capabilities", "session_heartbeat"}
    | {"weights_info"}
)
_KINDS: dict[int, type[APIStatusError]] = {
    401: errors.AuthenticationError,
    402: errors.BillingError,
    403: errors.AuthenticationError,
    404: errors.NotFoundError,
    429: errors.RateLimitError,
}
_ONCE = frozenset({"forward_backward_custom_step2"})
_NAMED = frozenset({"save_weights", "save_weights_for_sampler"})
RECOVERY = "go on from the last checkpoint, with create_training_client_from_state_with_optimizer"


class Request(msgspec.Struct):
    """A request, with all that it takes to send it again.

    Args:
        path: below ``/api/v1/``.
        body: its content.
        model_id: of the model whose numbered request it is; None for one without a number.
        mutates: it changes the model, so that twice is not once.
        address: where it goes, if not to ``path``: passes as protocol buffers go to one place.
        method: of HTTP.
        headers: of HTTP, such as the media type of content that is not JSON.
        key: the idempotency key.
        started: when it was made, in seconds.
        request_id: the trainer's name for it, once accepted.
        in_doubt: the trainer has it, or may have it; see :func:`~mintjax.client.outcomes.verdict`.
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
    in_doubt: bool = False

    def is_given_up_in_doubt(self, policy: RetryPolicy) -> bool:
        """Tells whether it is not sent again once it may have been applied.

        A trainer takes the gradient of a custom step once, and fails its repetition.
        """
        return self.mutates and (self.path in _ONCE or not policy.repeat_unanswered)

    @property
    def may_have_been_applied(self) -> bool:
        """Tells whether it may have changed something on the trainer."""
        return self.in_doubt and self.path not in _CHANGE_NOTHING


class Failure(msgspec.Struct):
    """An attempt that brought no result.

    Args:
        error: what to raise if there is to be no further attempt.
        ending: how the attempt ended.
        final: whether another attempt would end in the same way.
        wait: seconds before which there should be no further attempt, or None.
        reply: what came, if anything.
    """

    error: APIError
    ending: Ending
    final: bool = False
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

    Attributes:
        farewell: the last request, which :meth:`end` sends.
        outages: how often the trainer was away: it refused a connection, or whoever stands in front
            of it said so. What comes back may have been started with other settings.

    Raises:
        ConfigError: a variable of the environment about proxies or certificates cannot be used.
    """

    def __init__(self, settings: Settings, version: str) -> None:
        self.policy = settings.policy
        self.address = str(settings.url).rstrip("/")
        self.session_id: str | None = None
        self.notices = Notices[Request](self._tell_of_wait)
        self._settings = settings
        self.outages = 0
        self._reached = False
        self._repeats_keys = False
        self._ids: OrderedDict[str, str] = OrderedDict()
        self._proxies = _given(_PROXIES) if _trusts_environment(settings) else []
        self._http = _http_client(settings, f"{self.address}/api/v1/", version)
        self.farewell: Request | None = None

    async def end(self) -> None:
        """Sends the farewell, if there is one and the trainer takes it at once, and disconnects."""
        try:
            if self.farewell is not None:
                async with asyncio.timeout(_SECONDS_FOR_FAREWELL):
                    error = await self.arrives(self.farewell)
                    logger.debug("%s was sent: %s", self.farewell.path, error or "accepted")
        finally:
            await self._http.aclose()

    def report(
        self, event: Event, of: Request, attempt: int, detail: str = "", level: int = logging.DEBUG
    ) -> None:
        """Logs what has happened to a request, and calls the user's callback."""
        seconds, name = time.monotonic() - of.started, of.request_id or None
        progress = Progress(event, of.path, of.model_id, name, attempt, seconds, detail)
        logger.log(level, "%s", printable(str(progress)), extra=msgspec.structs.asdict(progress))
        if self._settings.on_progress is not None:
            try:
                self._settings.on_progress(progress)
            except Exception:
                logger.exception("on_progress failed")

    def _tell_of_wait(self, wait: Wait[Request]) -> None:
        self.report("waiting", wait.request, wait.attempt, wait.outlook, logging.WARNING)

    async def submit(self, request: Request) -> None:
        """Sends a request until the trainer has accepted it, for its result to be asked for."""
        request.request_id = await self._send(request, partial(self._accepted, request))
        request.in_doubt = True
        what = ", ".join(request.headers.values()) or "application/json"
        self.report("accepted", request, 1, f"{len(request.body):,} bytes of {what}")

    async def call(self, request: Request, as_type: type[T]) -> T:
        """Sends a request until it is answered, and decodes the answer.

        Raises:
            APIError: the trainer refused, or the deadline has passed; ``may_have_been_applied``
                says whether the request may have taken effect.
        """
        return await self._send(request, partial(self.decode, request.path, as_type))

    async def tell(self, request: Request) -> None:
        """Sends a request until it is answered, whatever the answer is; raises as :meth:`call`."""
        await self._send(request, lambda _: None)

    async def call_or_submit(self, request: Request, as_type: type[T]) -> T | None:
        """Sends a request that some trainers answer at once, and others accept for later.

        Returns:
            The answer; None where it was accepted, and its result is to be asked for.
        """

        def read(reply: Reply) -> T | None:
            if "request_id" not in self.decode(request.path, dict[str, msgspec.Raw], reply):
                return self.decode(request.path, as_type, reply)
            request.request_id = self._accepted(request, reply)
            return None

        answer = await self._send(request, read)
        request.in_doubt = answer is None
        return answer

    async def _send(self, request: Request, read: Callable[[Reply], T]) -> T:
        patience = Patience(self.policy)
        setting = "RetryPolicy(deadline=...)"
        why = f"{self.address} has not answered"
        wait = Wait(request, why, patience.started, self.policy.deadline, setting)
        with self.notices.watch(wait):
            while True:
                if not self._reached and self.policy.first_contact < self.policy.deadline:
                    wait.limit, wait.setting = (
                        self.policy.first_contact,
                        "RetryPolicy(first_contact=...)",
                    )
                else:
                    wait.limit, wait.setting = self.policy.deadline, setting
                left = max(wait.limit - patience.seconds, _LEAST_ATTEMPT)
                outcome = await self.attempt(request, read, min(self._settings.timeout, left))
                if not isinstance(outcome, Failure):
                    return outcome
                request.in_doubt, repeats = verdict(outcome.ending, request.in_doubt)
                if outcome.final or self._is_answered(request, outcome):
                    repeats = "never"
                deadline = wait.limit
                if request.in_doubt and request.is_given_up_in_doubt(self.policy):
                    deadline = 0.0
                wait.why = str(outcome.error)
                await self.pause(request, outcome, patience, deadline, repeats)
                wait.attempt = patience.attempts

    def _is_answered(self, request: Request, failure: Failure) -> bool:
        # Nothing depends on a request without a number; an empty 400 is known to pass by itself.
        empty = failure.status == 400 and failure.reply is not None and not failure.reply.words
        return request.model_id is None and failure.ending == "foreign" and not empty

    def _accepted(self, request: Request, reply: Reply) -> str:
        """Decodes the name that the trainer gives the request; no other request has had it."""
        name = self.decode(request.path, messages.UntypedFuture, reply).request_id
        if not name.isprintable():
            raise APIResponseError(f"{self.address}: request_id {name!r} is no name")
        key = self._ids.setdefault(name, request.key)
        if key != request.key:
            raise APIResponseError(
                f"{self.address}: the answer to {request.path} is the one to an earlier request"
            )
        while len(self._ids) > _REMEMBERED_IDS:
            self._ids.popitem(last=False)
        return name

    async def pause(
        self,
        request: Request,
        failure: Failure,
        patience: Patience,
        deadline: float,
        repeats: Repeats,
    ) -> None:
        """Lets a while go by before the next attempt.

        Args:
            request: what is being tried.
            failure: of the last attempt.
            patience: counts the attempts.
            deadline: seconds for all of them.
            repeats: how often to try again after such a failure.

        Raises:
            APIError: there is to be no further attempt.
        """
        retries = {"never": 0, "a few times": self.policy.bad_answers}.get(repeats)
        if await patience.wait(deadline, failure.wait, retries):
            why = str(failure.error)
            return self.report("retry", request, patience.attempts, why, logging.INFO)
        if request.request_id and not request.mutates and failure.status in (400, 422):
            request.in_doubt = False  # its result is that it has failed
        error, tried = failure.error, f"{patience.attempts} attempts in {patience.seconds:.1f} s"
        what, may = "sent and not clearly answered", "may or may not have"
        answered = isinstance(error, APIStatusError)
        if request.request_id:
            what = f"accepted (request {request.request_id}), and its result never came"
            answered = answered and repeats != "until the deadline"
            may = "may or may not have" if answered else "has probably"  # or it says that it failed
        if request.in_doubt and request.mutates and not answered:
            error = errors.AmbiguousRequestError(
                f"{request.path} was {what} ({tried}; last: {error}). It {may} been applied: "
                f"compare a forward pass with what you expect, or {RECOVERY}"
            )
        elif isinstance(error, errors.APIConnectionError):
            error = type(error)(f"{error}; {tried}")
        elif isinstance(error, APIStatusError) and request.may_have_been_applied:
            words = f"{error.message}. {request.path} {may} been applied ({tried})"
            words += f": {RECOVERY}" if request.mutates else ""
            error = type(error)(error.status_code, words)
        elif patience.attempts > 1:
            error.add_note(tried)
        error.may_have_been_applied = request.may_have_been_applied
        raise error

    async def arrives(self, request: Request) -> APIError | None:
        """Sends a request once; returns what that failed with."""
        outcome = await self.attempt(request, lambda _: None, self._settings.timeout)
        return outcome.error if isinstance(outcome, Failure) else None

    async def attempt(
        self, request: Request, read: Callable[[Reply], T], timeout: float
    ) -> T | Failure:
        """Sends a request once.

        Args:
            request: what to send.
            read: makes the result of a successful reply; an APIResponseError that it raises is a
                failure, any other error goes through.
            timeout: seconds for the answer, from its first byte to its last; every 20,000 bytes
                that travel add one.
        """
        try:
            reply = await self._exchange(request, timeout)
        except APIError as error:
            return Failure(error, "unreadable", final=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as caught:
            return self._unanswered(request.path, caught)
        except errors.DataError as error:
            garbled = APIResponseError(f"{self.address}: the answer to {request.path} is {error}")
            return Failure(garbled, "unreadable")
        self._reached = True
        if reply.status in _AWAY and "retry-after" not in reply.headers and not reply.is_ours:
            self.outages += 1  # and it is not the trainer, who asks for time
        self._repeats_keys |= reply.is_ours is True
        certain = reply.is_ours or (reply.is_ours is None and not self._repeats_keys)
        if 200 <= reply.status < 300 or reply.is_ours is False:
            try:
                if not certain:
                    raise APIResponseError(
                        f"{self.address}: the answer to {request.path} is not the trainer's, or is "
                        "the one to another request"
                    )
                return read(reply)
            except APIResponseError as error:
                failure = Failure(error, "unreadable", reply=reply)
        else:
            ending = ending_of(reply.status, reply.detail if certain else "")
            if ending == "conflict" and request.path in _NAMED and "exists" in reply.detail:
                ending = "refused"  # the name is taken, and not the number
            if reply.status == 404 and request.path == "forward" and reply.detail == "Not Found":
                ending = "refused"  # FastAPI's words for an endpoint that a trainer does not have
            error, wait = self._refusal(request, reply), retry_after(reply.headers)
            failure = Failure(error, ending, wait=wait, reply=reply)
        if failure.ending not in ("refused", "throttled"):
            with suppress(Exception):  # whatever else comes by that connection is not to be read
                await reply.hang_up()
        return failure

    async def _exchange(self, request: Request, timeout: float) -> Reply:
        limits = httpx.Timeout(timeout, connect=min(timeout, 15.0))
        headers = {_KEY_HEADER: request.key, **request.headers}
        content = bytearray()
        end = asyncio.get_running_loop().time() + timeout + len(request.body) / _SLOWEST
        async with asyncio.timeout_at(end) as clock:
            async with self._http.stream(
                request.method,
                request.address or request.path,
                content=request.body or None,
                headers=headers,
                timeout=limits,
            ) as response:
                coding = response.headers.get("content-encoding", "identity").lower()
                if response.is_stream_consumed:  # by a transport that is not the network
                    content += response.content
                    coding = "identity"
                else:
                    async for part in response.aiter_raw():
                        content += part
                        self.check_size(len(content))
                        if not clock.expired():  # just now; then the next await ends it
                            clock.reschedule(end + len(content) / _SLOWEST)
        limit = largest_content(len(content), self._settings.max_response_bytes)
        key = response.headers.get(_KEY_HEADER)
        stream = response.extensions.get("network_stream")
        reply = Reply(
            response.status_code,
            response.headers,
            unfold(bytes(content), coding, limit),
            None if key is None else key == request.key,
        )
        if stream is not None:
            reply.hang_up = stream.aclose
            if reply.is_protobuf and not reply.has_an_end:
                raise errors.DataError("a message of unknown length, which may have been cut")
        return reply

    def _unanswered(self, path: str, caught: Exception) -> Failure:
        # The error is raised elsewhere: httpx's exceptions hold the request, and with it the key.
        name = type(caught).__name__
        if isinstance(caught, httpx.ConnectError):
            self.outages += 1
        if isinstance(caught, (httpx.TimeoutException, TimeoutError)):
            kind, words = errors.APITimeoutError, name
        else:
            kind, words = errors.APIConnectionError, self.words(_reason(caught)) or name
        if isinstance(caught, _UNSENT) and self._proxies:
            words += f", by way of the proxy that {' or '.join(self._proxies)} names"
        error = kind(f"{self.address}: no answer to {path} ({words})")
        return Failure(error, "unsent" if isinstance(caught, _UNSENT) else "cut")

    def check_size(self, size: int) -> None:
        """Refuses an answer beyond the limit.

        Raises:
            APIError: it is; asking again would not help.
        """
        if size > self._settings.max_response_bytes:
            raise APIError(
                f"an answer of {size:,} bytes or more is beyond the limit of "
                f"{self._settings.max_response_bytes:,}; pass max_response_bytes to allow it"
            )

    def words(self, text: str) -> str:
        """Takes the API key and control characters out of a trainer's words."""
        return printable(self._settings.key.redact(text))

    def decode(self, path: str, as_type: type[T], reply: Reply) -> T:
        """Decodes an answer: JSON, or the result of a pass or samples as a protocol buffer.

        Raises:
            APIResponseError: it is not of that type; the message says at which field.
            APIError: it would take too much memory.
        """
        try:
            if as_type is ForwardBackwardOutput:
                if reply.is_protobuf:
                    return cast("T", protobuf.decode_output(reply.body))
                largest = self._settings.max_response_bytes
                check_sparse(reply.body, largest_content(len(reply.body), largest))
            if as_type is SampleResponse and reply.is_protobuf:
                return cast("T", protobuf.decode_sample(reply.body))
            return messages.decode(reply.body, as_type)
        except (errors.DataError, errors.ConfigError) as error:
            words = self.words(str(error))
        raise APIResponseError(f"{self.address}: the answer to {path} is {words}")

    def _refusal(self, request: Request, reply: Reply) -> APIError:
        """Makes the typed error of a status other than success, with the trainer's own words."""
        status, words = reply.status, self.words(reply.words) or "no detail given"
        if status < 400:
            return APIResponseError(
                f"{self.address} answered with HTTP {status}, which is not followed: the API key "
                "goes to no other address. Is base_url the trainer's own?"
            )
        if status == 500 and request.path == "retrieve_future" and not reply.words:
            words += (
                "; the trainer's log says why it cannot give this result. One reason is a token "
                "beyond the vocabulary, whose logprob is no number"
            )
        if status == 400 and "adapters" in words:
            words += " (models that were made and not unloaded take up their places)"
        if status == 400 and request.path == "load_weights":
            words += (
                " (a trainer that loads into new models only, such as SkyRL 0.4, takes the path by "
                "create_training_client_from_state or ..._with_optimizer)"
            )
        if status == 402:
            words = f"billing is paused for this account: {words}"
        if status in (401, 403):
            words += " (is the API key the one for this server?)"
        if status == 404 and any(
            name and name in words
            for name in (self.session_id, request.model_id, request.request_id)
        ):
            words += (
                ". The trainer no longer knows what this client made there: it was restarted, or "
                f"has let go of it. Make a new ServiceClient, and {RECOVERY}"
            )
        other = errors.BadRequestError if status < 500 else errors.InternalServerError
        return _KINDS.get(status, other)(status, words)


def _reason(error: BaseException) -> str:
    """Finds the operating system's words, such as "Connection refused", under httpx's."""
    under = error.__cause__ or error.__context__
    if isinstance(under, OSError) and under.strerror:
        code = under.errno or 0
        return os.strerror(code) if code > 0 else under.strerror
    return (_reason(under) if under is not None else "") or str(error)


def _http_client(settings: Settings, base_url: str, version: str) -> httpx.AsyncClient:
    try:
        return httpx.AsyncClient(
            base_url=base_url,
            auth=settings.key,
            headers={"User-Agent": f"mintjax/{version}", **_HEADERS},
            follow_redirects=False,
            transport=settings.transport,
            trust_env=_trusts_environment(settings),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
        )
    except OSError as error:  # ssl.SSLError is one
        variables, words = _CERTIFICATES, str(error)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        variables, words = _PROXIES, str(error)
    raise errors.ConfigError(
        f"the environment variable {' or '.join(_given(variables) or variables)} cannot be used: "
        f"{printable(words)}"
    )


_PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def _trusts_environment(settings: Settings) -> bool:
    return settings.url.scheme == "https"  # no proxy may read what goes in clear text


def _given(variables: tuple[str, ...]) -> list[str]:
    return [name for name in (*variables, *map(str.lower, variables)) if os.environ.get(name)]
