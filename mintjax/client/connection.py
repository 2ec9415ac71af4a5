"""A session with a trainer: what a service client and all that it makes have in common."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import msgspec

from mintjax import wire
from mintjax.client.background import Background, begin
from mintjax.client.encodings import Body
from mintjax.client.futures import APIFuture
from mintjax.client.polling import Accepted, retrieve
from mintjax.client.settings import Settings
from mintjax.client.transport import Transport
from mintjax.errors import APIError, APIResponseError, AuthenticationError, BillingError
from mintjax.surrogates import Reduction

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")

_WARN_WITHOUT_HEARTBEAT = 120.0


class Connection:
    """One session, its thread and its counters; the thread ends with it, or at :meth:`close`.

    Args:
        settings: which trainer, and how.

    Attributes:
        reduction: what the trainer makes of losses, once that was measured.
        refused: losses that it does not serve by name.
        warned: whether the user was warned that nothing was measured.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._version = _version()
        self.transport = Transport(settings, self._version)
        self.limits = wire.ClientConfigResponse()
        self.reduction: Reduction | None = None
        self.refused: set[str] = set()
        self.warned = False
        self.model_numbers = itertools.count()
        self.sampling_numbers = itertools.count()
        self._session_id: str | None = None
        self._opening = asyncio.Lock()
        self.background = Background(self.transport.aclose)
        self.close = weakref.finalize(self, self.background.close)

    def start(self, run: Callable[[], Coroutine[Any, Any, T]]) -> APIFuture[T]:
        """Run something that has no place in a line.

        Raises:
            ClosedError: the client was closed.
        """

        async def begun(future: Future[T]) -> T:
            begin(future)
            return await run()

        future = self.background.start(begun)
        return APIFuture(future, self.background.is_current_thread, self)

    async def accepted(self, path: str, message: Any, as_type: type[T]) -> T:
        """Send a request that has no place in a line, and wait for its result."""
        body, key = wire.encode(message), self.transport.new_key()
        answer = await self.transport.call(path, body, wire.UntypedFuture, key=key)
        accepted = Accepted(path, Body(path, body), key, answer.request_id)
        return await retrieve(self.transport, accepted, as_type)

    def takes_protobuf(self, body: Body, refusal: APIError) -> bool:
        """Whether a pass was refused for its encoding; from then on they are protocol buffers."""
        refused = body.path in ("forward", "forward_backward") and not body.headers
        if not refused or getattr(refusal, "status_code", 0) != 415:
            return False
        logger.info("passes are sent as protocol buffers from now on: %s", refusal)
        self.limits = msgspec.structs.replace(self.limits, proto_write_fwdbwd=True)
        return True

    async def session(self) -> str:
        """The session's id; the first call opens it.

        Raises:
            APIError: the trainer cannot be reached, or refuses; the next call tries again.
        """
        async with self._opening:
            if self._session_id is None:
                self.limits = await self._client_config()
                request = wire.CreateSessionRequest(
                    self._version, user_metadata=self.settings.user_metadata or {}
                )
                answer = await self.transport.call(
                    "create_session", wire.encode(request), wire.CreateSessionResponse
                )
                for kind in ("info", "warning", "error"):
                    if message := getattr(answer, f"{kind}_message"):
                        getattr(logger, kind)("the trainer says: %s", message)
                self._session_id = answer.session_id
                self.background.keep_running(_heartbeat(self.transport, answer.session_id))
            return self._session_id

    async def _client_config(self) -> wire.ClientConfigResponse:
        request = wire.encode(wire.ClientConfigRequest(self._version))
        try:
            return await self.transport.call("client/config", request, wire.ClientConfigResponse)
        except (AuthenticationError, BillingError):
            raise
        except APIResponseError as error:
            logger.info("no use of client/config: %s", error)
        except APIError as error:
            if not getattr(error, "status_code", 0):
                raise
        return wire.ClientConfigResponse()  # small trainers have no such endpoint


async def _heartbeat(transport: Transport, session_id: str) -> None:
    body = wire.encode(wire.SessionHeartbeatRequest(session_id))
    last, warned = time.monotonic(), False
    while True:
        await asyncio.sleep(transport.policy.heartbeat)
        if await transport.sign_of_life("session_heartbeat", body):
            last, warned = time.monotonic(), False
        elif time.monotonic() - last > _WARN_WITHOUT_HEARTBEAT and not warned:
            warned = True
            logger.warning(
                "no heartbeat has reached %s for %.0f s; the session may end there",
                transport.address,
                time.monotonic() - last,
            )


def _version() -> str:
    try:
        return importlib.metadata.version("mintjax")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"
