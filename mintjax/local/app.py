"""The embedded trainer over HTTP: an ASGI application that speaks the protocol."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mintjax import wire
from mintjax.errors import APIStatusError, BadRequestError, DataError, MintjaxError
from mintjax.local.access import Access
from mintjax.local.endpoints import Answer, Endpoints, Run, WeightsInfoRequest
from mintjax.local.engine import Engine
from mintjax.local.sequencer import ForgottenError, Sequencer, UnknownRequestError
from mintjax.tensors import TensorData

M = TypeVar("M")

logger = logging.getLogger("mintjax.local")

MAX_BODY_BYTES = 256 * 1024 * 1024


@contextmanager
def application(
    engine: Engine, *, api_key: str | None = None, poll_seconds: float = 20.0
) -> Generator[Starlette]:
    """An ASGI application in front of an engine, for as long as the block lasts.

    Args:
        engine: the trainer; nothing else may run it meanwhile.
        api_key: required of every request if given.
        poll_seconds: how long ``retrieve_future`` waits for a result before it says try again.
    """
    sequencer = Sequencer()
    access = Access(api_key)
    try:
        yield _Http(Endpoints(engine, sequencer, access), sequencer, access, poll_seconds).app()
    finally:
        sequencer.close()


class _Numbered(msgspec.Struct):
    model_id: str
    seq_id: int


class _ColumnsOfDatum(msgspec.Struct):
    loss_fn_inputs: dict[str, msgspec.Raw]


class _ColumnsOfData(msgspec.Struct):
    data: list[_ColumnsOfDatum]


class _Columns(msgspec.Struct):
    forward_input: _ColumnsOfData | None = None
    forward_backward_input: _ColumnsOfData | None = None


class _Http:
    def __init__(
        self, endpoints: Endpoints, sequencer: Sequencer, access: Access, poll_seconds: float
    ) -> None:
        self._do = endpoints
        self._sequencer = sequencer
        self._access = access
        self._poll_seconds = poll_seconds

    def app(self) -> Starlette:
        do = self._do
        routes = [
            self._get("healthz", do.healthz),
            self._get("get_server_capabilities", do.get_server_capabilities),
            self._get("sessions/{session_id}", do.get_session),
            self._get("samplers/{sampler_id}", do.get_sampler),
            self._post("client/config", None, lambda _: do.client_config()),
            self._post("auth/token", None, lambda _: do.auth_token()),
            self._post("telemetry", None, lambda _: do.telemetry()),
            self._post("create_session", wire.CreateSessionRequest, do.create_session),
            self._post("session_heartbeat", wire.SessionHeartbeatRequest, do.session_heartbeat),
            self._post("get_info", wire.ModelRequest, do.get_info),
            self._post("weights_info", WeightsInfoRequest, do.weights_info),
            self._post(
                "create_sampling_session",
                wire.CreateSamplingSessionRequest,
                do.create_sampling_session,
            ),
            self._queued("create_model", wire.CreateModelRequest, do.create_model),
            self._queued("unload_model", wire.ModelRequest, do.unload_model),
            self._queued("forward", wire.ForwardRequest, do.forward),
            self._queued("forward_backward", wire.ForwardBackwardRequest, do.forward_backward),
            self._queued("optim_step", wire.OptimStepRequest, do.optim_step),
            self._queued("save_weights", wire.SaveWeightsRequest, do.save_weights),
            self._queued("load_weights", wire.LoadWeightsRequest, do.load_weights),
            self._queued(
                "save_weights_for_sampler",
                wire.SaveWeightsForSamplerRequest,
                do.save_weights_for_sampler,
            ),
            self._queued("asample", wire.SampleRequest, do.asample),
            self._route("retrieve_future", "POST", self._retrieve_future),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_route})

    def _get(self, path: str, answer: Callable[..., Answer]) -> Route:
        async def respond(request: Request) -> Response:
            return _json(answer(**request.path_params))

        return self._route(path, "GET", respond)

    def _post(self, path: str, as_type: type[M] | None, answer: Callable[[M], Answer]) -> Route:
        """A request that is answered at once; ``as_type`` None for one whose body says nothing."""

        async def respond(request: Request) -> Response:
            body = await _body(request)
            message: Any = None if as_type is None else _decode(request, body, as_type)
            return _json(answer(message))

        return self._route(path, "POST", respond)

    def _queued(self, path: str, as_type: type[M], prepare: Callable[[M], Run]) -> Route:
        """A request that takes effect in its turn, and whose result is fetched later."""

        async def respond(request: Request) -> Response:
            body = await _body(request)
            try:
                message = _decode(request, body, as_type)
                run = prepare(message)
                line, number = _place(message)
            except MintjaxError:
                self._reject(body)
                raise
            header = request.headers.get("x-idempotency-key")
            request_id = self._sequencer.submit(
                partial(_work, path, run),
                line=line,
                number=number,
                key=None if header is None else (path, header),
            )
            return _json(wire.UntypedFuture(request_id))

        return self._route(path, "POST", respond)

    def _route(
        self, path: str, method: str, respond: Callable[[Request], Awaitable[Response]]
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            if path != "healthz" and not self._access.allows(request.headers.get("x-api-key")):
                return _refusal(401, "X-API-Key: missing or wrong; this trainer requires its key")
            try:
                return await respond(request)
            except APIStatusError as error:
                return _refusal(error.status_code, error.message)
            except MintjaxError as error:
                return _refusal(400, str(error))
            except Exception as error:
                logger.exception("%s failed", path)
                return _refusal(500, f"internal error: {_said(error)}")

        return Route(f"/api/v1/{path}", endpoint, methods=[method])

    async def _retrieve_future(self, request: Request) -> Response:
        question = _decode(request, await _body(request), wire.FutureRetrieveRequest)
        request_id = question.request_id
        try:
            future = self._sequencer.result(request_id)
        except UnknownRequestError:
            return _refusal(404, f"request_id: there is no request {request_id!r}")
        except ForgottenError:
            # Not 410, which invites to send the request again: it took effect.
            return _refusal(404, f"request_id: the result of {request_id!r} is no longer kept")
        if not future.done():
            await _wait(future, self._poll_seconds)
        if not future.done():
            awaited = self._sequencer.waits_for(request_id)
            reason = None if awaited is None else f"seq_id {awaited} has not arrived"
            return _json(wire.TryAgain(request_id, "active", reason))
        self._sequencer.retrieved(request_id)
        return _outcome(future)

    def _reject(self, body: bytes) -> None:
        """Let no later request wait for the number of one that was refused."""
        try:
            refused = msgspec.json.decode(body, type=_Numbered)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return
        if refused.model_id in self._do.engine.models:
            self._sequencer.reject(refused.model_id, refused.seq_id)


def _place(message: Any) -> tuple[str | None, int | None]:
    """The line that a request stands in, and its number there, if it has one."""
    line: str | None = getattr(message, "model_id", None)
    number: int | None = getattr(message, "seq_id", None)
    if line is None or number is None:
        return None, None
    if number < 1:
        raise DataError(f"{number} is below 1, the first", field="seq_id")
    return line, number


def _work(path: str, run: Run) -> bytes:
    try:
        return wire.encode(run())
    except MintjaxError:
        raise
    except Exception:
        logger.exception("%s failed", path)
        raise


async def _wait(future: Future[bytes], seconds: float) -> None:
    # Not asyncio.wrap_future, which cancels what it wraps and complains of failures not looked at.
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[bytes]) -> None:
        with suppress(RuntimeError):  # the loop of a client that has gone may be closed
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), seconds)


def _outcome(future: Future[bytes]) -> Response:
    if future.cancelled():
        error = wire.FutureError(
            "it was not run: the model was unloaded, or the trainer closed", "user"
        )
        return _json(error)
    failure = future.exception()
    if failure is None:
        return Response(future.result(), media_type="application/json")
    if isinstance(failure, APIStatusError):
        return _json(wire.FutureError(failure.message, "user"))
    if isinstance(failure, MintjaxError):
        return _json(wire.FutureError(str(failure), "user"))
    return _json(wire.FutureError(f"internal error: {_said(failure)}", "server"))


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise BadRequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return bytes(body)


def _decode(request: Request, body: bytes, as_type: type[M]) -> M:
    for header, allowed in (("content-type", "application/json"), ("content-encoding", "identity")):
        given = request.headers.get(header, allowed)
        if given.partition(";")[0].strip().lower() != allowed:
            raise BadRequestError(415, f"{header}: this trainer reads {allowed}, not {given}")
    try:
        return wire.decode(body, as_type)
    except DataError as error:
        raise BadRequestError(422, _column_at_fault(body) or str(error)) from None


def _column_at_fault(body: bytes) -> str | None:
    """Name the column that cannot be read; a decoder only says that there is one."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = msgspec.json.decode(body, type=_Columns)
        given = message.forward_input or message.forward_backward_input or _ColumnsOfData([])
        for i, datum in enumerate(given.data):
            for name, value in datum.loss_fn_inputs.items():
                try:
                    wire.decode(value, TensorData)
                except DataError as error:
                    return str(DataError(str(error), datum=i, field=name))
    return None


def _json(answer: Answer) -> Response:
    return Response(wire.encode(answer), media_type="application/json")


def _refusal(status: int, detail: str) -> Response:
    return Response(msgspec.json.encode({"detail": detail}), status, media_type="application/json")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return _refusal(status, f"{request.method} {request.url.path} is not served here")
