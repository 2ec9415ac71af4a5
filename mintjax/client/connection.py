"""A session with a trainer: what a service client and all that it makes have in common."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import logging
import time
import urllib.parse
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import msgspec

from mintjax.client.background import Background, begin
from mintjax.client.encodings import Encoding
from mintjax.client.futures import APIFuture, Limited
from mintjax.client.polling import retrieve
from mintjax.client.server_losses import ServerLosses
from mintjax.client.settings import Settings
from mintjax.client.transport import Request, Transport
from mintjax.errors import (
    APIResponseError,
    APIStatusError,
    AuthenticationError,
    BillingError,
    NotFoundError,
)
from mintjax.protocol import messages
from mintjax.step.facts import TrainerFacts
from mintjax.types import ServerCapabilities, SupportedModel

P = ParamSpec("P")
T = TypeVar("T")

SessionStatus: TypeAlias = Literal["success", "errored", "interrupted"]
"""How a session has ended."""

logger = logging.getLogger("mintjax.client")


class _Offered(msgspec.Struct):
    model_name: str | None = None
    model_id: str | None = None
    max_context_length: int | None = None


class _Capabilities(msgspec.Struct):
    supported_models: list[_Offered]
    supports_forward_backward_custom: bool = False


_WARN_WITHOUT_HEARTBEAT = 120.0


class Connection:
    """One session, its thread and its counters; the thread ends with it, or at :meth:`close`.

    Args:
        settings: which trainer, and how.

    Attributes:
        facts: what was found out about the trainer.
        losses: those that were uploaded to it.
        encoding: of passes; it holds the trainer's limits.
        measuring: held while that is found out.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.transport = Transport(settings, installed_version())
        self.encoding = Encoding()
        self.facts = TrainerFacts()
        self.losses = ServerLosses()
        self.model_numbers = itertools.count()
        self.sampling_numbers = itertools.count()
        self.measuring = asyncio.Lock()
        self._opening = asyncio.Lock()
        self.background = Background(self.transport.end)
        self.close = weakref.finalize(self, self.background.close)

    def finish(self, status: SessionStatus, detail: str | None = None) -> None:
        """Closes, and tells the trainer that the session has ended, if it was opened.

        Most self-hosted trainers have no such request; what they answer is of no matter.

        Args:
            status: how.
            detail: in words.
        """
        session_id = self.transport.session_id
        if session_id is not None:
            said = messages.FinishSessionRequest(messages.FinishReason(status), detail)
            path = f"sessions/{urllib.parse.quote(session_id, safe='')}/finish"
            self.transport.farewell = Request(path, messages.encode(said))
        self.close()

    def submit(
        self,
        run: Callable[[APIFuture[T]], Coroutine[Any, Any, T]],
        seen: Callable[[BaseException], None] | None = None,
    ) -> APIFuture[T]:
        """Runs something in the client's loop; it gets its future, to :func:`begin` it.

        Args:
            run: what to run.
            seen: told of an error when somebody gets it.

        Raises:
            ClosedError: the client was closed.
        """
        return self.background.start(run, APIFuture(self.background.thread, self, seen))

    def start(
        self, run: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> APIFuture[T]:
        """Runs a coroutine function that has no place in a line; raises as :meth:`submit`."""

        async def begun(future: APIFuture[T]) -> T:
            begin(future)
            return await run(*args, **kwargs)

        return self.submit(begun)

    def start_cancellable(
        self, path: str, message: Any, as_type: type[T], check: Callable[[T], object]
    ) -> APIFuture[T]:
        """Sends a request that changes nothing, and that can be cancelled while it is under way.

        The trainer is then asked to stop its work, which not all of them can.

        Args:
            path: below ``/api/v1/``.
            message: what to send.
            as_type: what the result is.
            check: as :meth:`run` has it.
        """

        async def run(future: APIFuture[T]) -> T:
            task, loop = asyncio.current_task(), asyncio.get_running_loop()
            assert task is not None

            def stop(future: Future[T]) -> None:
                if future.cancelled():
                    with suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(task.cancel)

            request = Request(path, messages.encode(message))
            future.add_done_callback(stop)
            try:
                await self.transport.submit(request)
                return await retrieve(self.transport, request, as_type, check)
            except asyncio.CancelledError:
                if future.cancelled() and request.request_id:
                    self.background.keep_running(_withdraw(self.transport, request.request_id))
                raise

        return self.submit(run)

    def limited(
        self,
        timeout: float | None,
        run: Callable[P, Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Limited[T]:
        """Runs a coroutine function as :meth:`start` does, for a method that waits for it.

        Args:
            timeout: seconds to wait at most; those of the retry policy if None.
            run: what to run.
            args: for it.
            kwargs: for it.
        """
        return self.limit(self.start(run, *args, **kwargs), timeout)

    def limit(self, future: APIFuture[T], timeout: float | None) -> Limited[T]:
        """Puts a limit to how long a future is waited for, as :meth:`limited` does."""
        return Limited(future, self.settings.policy.blocking if timeout is None else timeout)

    async def ask(self, path: str, message: Any, as_type: type[T]) -> T:
        """Sends a request that is answered at once."""
        return await self.transport.call(Request(path, messages.encode(message)), as_type)

    async def run(
        self,
        path: str,
        message: Any,
        as_type: type[T],
        check: Callable[[T], object] = lambda result: None,
    ) -> T:
        """Sends a request that has no place in a line, and waits for its result.

        Args:
            path: below ``/api/v1/``.
            message: what to send.
            as_type: what the result is.
            check: raises APIResponseError where a result cannot be that of the request.
        """
        request = Request(path, messages.encode(message))
        await self.transport.submit(request)
        return await retrieve(self.transport, request, as_type, check)

    async def made(self, path: str, message: Any, as_type: type[T]) -> T:
        """Sends a request that trainers answer at once, and hatchery with a future.

        Args:
            path: below ``/api/v1/``.
            message: what to send.
            as_type: what the result is.
        """
        return await self._answer(Request(path, messages.encode(message)), as_type)

    async def _answer(self, request: Request, as_type: type[T]) -> T:
        answer = await self.transport.call_or_submit(request, as_type)
        return await retrieve(self.transport, request, as_type) if answer is None else answer

    async def capabilities(self) -> ServerCapabilities:
        """Asks which base models the trainer offers; hatchery calls their names ``model_id``.

        Whether it has requests that take gradients is noted by the way.

        Raises:
            APIResponseError: a model has neither name.
        """
        path = "get_server_capabilities"
        answer = await self.transport.call(Request(path, method="GET"), _Capabilities)
        if self.facts.takes_gradients is None:  # else that was tried
            self.facts.takes_gradients = answer.supports_forward_backward_custom
        models: list[SupportedModel] = []
        for i, one in enumerate(answer.supported_models):
            name = one.model_name or one.model_id
            if name is None:
                raise APIResponseError(
                    f"{self.transport.address}: the answer to {path} gives no name to model {i}"
                )
            models.append(
                SupportedModel(model_name=name, max_context_length=one.max_context_length)
            )
        return ServerCapabilities(supported_models=models)

    async def unload(self, model_id: str) -> None:
        """Lets the trainer forget a model.

        Its name is in the body, as trainers have it, and in the query, where hatchery looks for it;
        the others do not look there. Hatchery answers at once, the others with a future.
        """
        path = "unload_model"
        body = messages.encode(messages.ModelRequest(model_id, path))
        address = f"{path}?{urllib.parse.urlencode({'model_id': model_id})}"
        request = Request(path, body, address=address)
        await self._answer(request, dict[str, msgspec.Raw])

    async def session(self) -> str:
        """Opens the session, if this is the first call, and returns its id.

        Raises:
            APIError: the trainer cannot be reached, or refuses; the next call tries again.
        """
        async with self._opening:
            if self.transport.session_id is None:
                self.encoding = Encoding(await self._client_config(), self.transport.address)
                metadata = self.settings.user_metadata or {}
                request = messages.CreateSessionRequest(
                    messages.SDK_VERSION,
                    user_metadata=metadata,
                    project_id=self.settings.project_id or msgspec.UNSET,
                    display_name=self.settings.display_name or msgspec.UNSET,
                )
                answer = await self.ask("create_session", request, messages.CreateSessionResponse)
                for kind in ("info", "warning", "error"):
                    if message := getattr(answer, f"{kind}_message"):
                        words = self.transport.words(message)
                        getattr(logger, kind)("the trainer says: %s", words)
                self.transport.session_id = answer.session_id
                self.background.keep_running(_heartbeat(self.transport, answer.session_id))
            return self.transport.session_id

    async def _client_config(self) -> messages.ClientConfigResponse:
        request = messages.ClientConfigRequest(messages.SDK_VERSION)
        try:
            return await self.ask("client/config", request, messages.ClientConfigResponse)
        except (AuthenticationError, BillingError):
            raise
        except (APIResponseError, APIStatusError) as error:
            logger.info("no use of client/config: %s", error)
        return messages.ClientConfigResponse()  # small trainers have no such endpoint


async def _withdraw(transport: Transport, request_id: str) -> None:
    body = messages.encode(messages.FutureRetrieveRequest(request_id))
    error = await transport.arrives(Request("cancel_future", body))
    logger.debug("request %s is withdrawn: %s", request_id, error or "accepted")


async def _heartbeat(transport: Transport, session_id: str) -> None:
    body = messages.encode(messages.SessionHeartbeatRequest(session_id))
    last, warned = time.monotonic(), False
    while True:
        await asyncio.sleep(transport.policy.heartbeat)
        silence = time.monotonic() - last
        error = await transport.arrives(Request("session_heartbeat", body))
        if error is None:
            last, warned = time.monotonic(), False
        elif not warned and (silence > _WARN_WITHOUT_HEARTBEAT or isinstance(error, NotFoundError)):
            warned = True
            logger.warning(
                "no heartbeat has reached %s for %.0f s; the session may end there: %s",
                transport.address,
                silence,
                error,
            )


def installed_version() -> str:
    """Reads the version of mintjax that is installed; 0.0.0 where it runs from its sources."""
    try:
        return importlib.metadata.version("mintjax")
    except importlib.metadata.PackageNotFoundError:
        return "0.0.0"
