"""The trainer's address, the key, and the limits of waiting."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import math
import numbers
import os
import random
import time
from collections.abc import Callable, Generator
from typing import Any, Literal, cast

import httpx
import msgspec

from mintjax.errors import ConfigError
from mintjax.step.reduction import Reduction

DEFAULT_BASE_URL = "https://mint.macaron.xin"


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Limits how long requests are tried and waited for; all times are in seconds.

    Args:
        first_delay: before the first retry; doubled for each one after it, times a random factor
            between a half and one.
        longest_delay: the doubling stops here.
        deadline: for one request in all; for a result, since the trainer last answered.
        first_contact: in place of the deadline, while the trainer has never been reached.
        poll_timeout: how long one question for a result is held open.
        silence: how long a result may be waited for on connections that open and never answer.
        result: how long a result may be waited for in all, while the trainer says "try again".
        broken_result: how long a result is asked for that the trainer fails to give (HTTP 500),
            while it answers other questions.
        blocking: how long a method waits that returns a result rather than a future, where it is
            given no ``timeout``.
        bad_answers: how many answers that are garbage, or a proxy's, to bear with.
        heartbeat: between two signs of life of the session.
        repeat_unanswered: send ``forward_backward`` and ``optim_step`` again when they may have
            been applied already: right where the trainer knows a repeated request by its number or
            key. If False, AmbiguousRequestError is raised instead.

    Raises:
        ConfigError: one of them is negative, or no number.
    """

    first_delay: float = 0.5
    longest_delay: float = 30.0
    deadline: float = 300.0
    first_contact: float = 10.0
    poll_timeout: float = 45.0
    silence: float = 1800.0
    result: float = 86_400.0
    broken_result: float = 20.0
    blocking: float = 1800.0
    bad_answers: int = 3
    heartbeat: float = 10.0
    repeat_unanswered: bool = True

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            if not _is_number(value) or not value >= 0:
                raise ConfigError(f"RetryPolicy({name}={value!r}) must be at least 0")


Event = Literal["accepted", "retry", "waiting", "queue", "done"]


class Progress(msgspec.Struct, frozen=True):
    """Something that has happened to a request; holds nothing of its data.

    Args:
        event: ``"accepted"``, ``"retry"``, ``"waiting"`` (for more than five seconds),
            ``"queue"`` (its state in the trainer has changed), or ``"done"``.
        path: what was asked for, such as ``"optim_step"``.
        model_id: of which model, if any.
        request_id: the trainer's name of the request, once it has one.
        attempt: how many times it, or the question for its result, was sent.
        seconds: since it was first sent.
        detail: how much was sent, and in what encoding; why there is a retry or a wait, and until
            when; the queue's state.
    """

    event: Event
    path: str
    model_id: str | None = None
    request_id: str | None = None
    attempt: int = 1
    seconds: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        what = f"{self.path} of model {self.model_id}" if self.model_id else self.path
        event = f"{self.event}, {self.detail}" if self.detail else self.event
        return f"{what}: {event} (attempt {self.attempt}, {self.seconds:.3f} s)"


class Patience:
    """Exponential delays with jitter, within a deadline."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.started = time.monotonic()
        self.attempts = 1
        self._delays = 0
        self._counted = 0

    @property
    def seconds(self) -> float:
        """Since the start, or since the last :meth:`renew`."""
        return time.monotonic() - self.started

    def renew(self) -> None:
        """Begins anew, because the trainer has answered."""
        self.started, self._delays = time.monotonic(), 0

    async def wait(
        self, deadline: float, retry_after: float | None = None, retries: int | None = None
    ) -> bool:
        """Sleeps until the next attempt is due, or returns False where there is to be none.

        Args:
            deadline: seconds in all.
            retry_after: seconds before which the trainer wants no further attempt, or None.
            retries: how many failures of the kinds that have a limit may be followed by another
                attempt; None for a failure of a kind that has none.
        """
        if retries is not None:
            self._counted += 1
            if self._counted > retries:
                return False
        delay = self._policy.first_delay * 2 ** min(self._delays, 60)
        delay = min(delay, self._policy.longest_delay) * random.uniform(0.5, 1.0)
        delay = max(delay, retry_after or 0.0)
        if self.seconds + delay >= deadline:
            return False
        self._delays += 1
        self.attempts += 1
        await asyncio.sleep(delay)
        return True


def retry_after(headers: httpx.Headers) -> float | None:
    """Reads the seconds to wait from a ``Retry-After`` header, a number or a date, if it is one."""
    given = headers.get("retry-after", "").strip()
    try:
        seconds = float(given)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(given).timestamp()
        except (ArithmeticError, IndexError, TypeError, ValueError):
            return None
        seconds = when - time.time()
    return None if math.isnan(seconds) else max(0.0, seconds)


class ApiKey(httpx.Auth):
    """Adds the key to each request as it leaves, so that nothing else has to hold it."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if self._key:
            request.headers["X-API-Key"] = self._key
        yield request

    def redact(self, text: str) -> str:
        """Takes the key out of a text, should a trainer quote it."""
        return text.replace(self._key, "***") if self._key else text

    def __repr__(self) -> str:
        return "ApiKey(***)"


def from_environment(name: str) -> str | None:
    """Reads ``MINT_<name>``, else ``TINKER_<name>``; an empty value counts as none."""
    return os.environ.get(f"MINT_{name}") or os.environ.get(f"TINKER_{name}") or None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a session; :class:`ServiceClient` describes them.

    Raises:
        ConfigError: one of them is of another kind, or out of range.
    """

    url: httpx.URL
    key: ApiKey
    policy: RetryPolicy
    timeout: float
    pipelined: bool = True
    max_response_bytes: int = 1 << 30
    user_metadata: dict[str, str] | None = None
    project_id: str | None = None
    display_name: str | None = None
    transport: httpx.AsyncBaseTransport | None = None
    on_progress: Callable[[Progress], object] | None = None
    reduction: Reduction | None = None
    measure: bool = True

    def __post_init__(self) -> None:
        if not _is_number(self.timeout) or not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, not {self.timeout!r}")
        if not _is_number(self.max_response_bytes) or not self.max_response_bytes > 0:
            raise ConfigError(f"max_response_bytes={self.max_response_bytes!r} must be above 0")
        kept: tuple[Any, Any, Any] = (self.policy, self.reduction, self.on_progress)
        policy, reduction, on_progress = kept
        for name, value, fits in (
            ("retry_policy", policy, isinstance(policy, RetryPolicy)),
            ("reduction", reduction, reduction is None or isinstance(reduction, Reduction)),
            ("on_progress", on_progress, on_progress is None or callable(on_progress)),
        ):
            if not fits:
                raise ConfigError(f"{name} is {value!r}, which is none; leave it out for the usual")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def resolve(
    base_url: str | None, api_key: str | None, *, allow_insecure_http: bool
) -> tuple[httpx.URL, ApiKey]:
    """Finds the trainer's address and the key; arguments win over the environment.

    Raises:
        ConfigError: no such address, no key where one is needed, a key that would travel in clear
            text, or a Tinker key that would go to MinT.
    """
    chosen = base_url or from_environment("BASE_URL")
    if api_key is not None and not isinstance(cast("object", api_key), str):
        raise ConfigError(f"api_key must be a string, not {type(api_key).__name__}")
    key = (api_key or from_environment("API_KEY") or "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the API key holds characters that no HTTP header can carry")
    try:
        url = httpx.URL((chosen or DEFAULT_BASE_URL).strip())
    except httpx.InvalidURL:
        raise ConfigError("base_url is no URL; it looks like https://trainer.example.com") from None
    if url.scheme not in ("https", "http") or not url.host:
        raise ConfigError("base_url must begin with https:// (or http://) and name a host")
    if url.port is not None and not 0 < url.port < 2**16:
        raise ConfigError(f"the port of base_url must be within 1 and 65535, not {url.port}")
    if url.userinfo or url.query or url.fragment:
        raise ConfigError("base_url must hold no user, password, query or fragment")
    local = _is_loopback(url.host)
    if url.scheme == "http" and not local and not allow_insecure_http:
        raise ConfigError(
            f"http://{url.host} would carry the API key and the data in clear text; use https, or "
            "pass allow_insecure_http=True where the network is trusted"
        )
    if chosen is None and key.startswith("tml-"):
        raise ConfigError(
            f"a Tinker key (tml-...) would go to {DEFAULT_BASE_URL}; pass base_url, or set "
            "TINKER_BASE_URL"
        )
    if not key and not local:
        raise ConfigError("no API key: pass api_key, or set MINT_API_KEY or TINKER_API_KEY")
    path = url.path.rstrip("/")
    return url.copy_with(path=path or "/"), ApiKey(key)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
