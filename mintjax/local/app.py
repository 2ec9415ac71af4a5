"""The embedded trainer over HTTP: an ASGI application that speaks the protocol."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar, cast

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mintjax.errors import (
    APIStatusError,
    BadRequestError,
    DataError,
    MintjaxError,
    NotFoundError,
)
from mintjax.local import bodies
from mintjax.local.access import Access
from mintjax.local.administration import Page
from mintjax.local.answers import RepeatKeys
from mintjax.local.checkpoints import CheckpointPath, StorageError
from mintjax.local.custom_steps import STEP1, STEP2, CustomSteps
from mintjax.local.dialects import OWN, Dialect, NoNumberError, Player
from mintjax.local.endpoints import Answer, Endpoints, Run, model_made_by_load, no_other_format
from mintjax.local.engine import Engine
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.local.sequencer import (
    ForgottenError,
    MissingNumberError,
    OtherContentError,
    Sequencer,
    UnknownRequestError,
)
from mintjax.local.slices import Slices
from mintjax.protocol import messages, protobuf, zstd

M = TypeVar("M")

logger = logging.getLogger("mintjax.local")

REQUESTS_OF_A_COPY = 1_000_000_000
"""A copy of a sampling client numbers its requests from its own number times this."""


@contextmanager
def application(
    engine: Engine,
    *,
    api_key: str | None = None,
    poll_seconds: float = 20.0,
    config: messages.ClientConfigResponse | None = None,
    dialect: Dialect = OWN,
    limits: Limits = DEFAULT_LIMITS,
) -> Generator[Starlette]:
    """Makes an ASGI application in front of an engine, for as long as the block lasts.

    Args:
        engine: the trainer; nothing else may run it meanwhile.
        api_key: required of every request if given.
        poll_seconds: how long ``retrieve_future`` waits for a result before it says try again.
        config: what ``client/config`` asks of clients: protocol buffers, compression, sizes of
            chunks; and whether custom losses run here. The default asks for JSON, and for such
            losses where the dialect has them; what is served does not depend on it.
        dialect: the trainer to play.
        limits: bounds on what clients can make the trainer hold.

    Raises:
        ConfigError: it would ask for what takes the extra ``protobuf`` to read.
    """
    config = config or messages.ClientConfigResponse(custom_loss_server_side=dialect == OWN)
    if config.proto_write_fwdbwd or not dialect.json_passes or dialect.always_protobuf:
        protobuf.require()
    if config.proto_compress_fwdbwd:
        zstd.require()
    sequencer = Sequencer()
    access = Access(api_key)
    endpoints = Endpoints(
        engine,
        sequencer,
        access,
        config,
        dialect.states_reduction,
        limits,
        dialect.logprobs_as_drawn,
    )
    try:
        yield _Http(endpoints, sequencer, access, poll_seconds, dialect, limits).app()
    finally:
        sequencer.close()


class _Http:
    def __init__(
        self,
        endpoints: Endpoints,
        sequencer: Sequencer,
        access: Access,
        poll_seconds: float,
        dialect: Dialect,
        limits: Limits,
    ) -> None:
        self._do = endpoints
        self._sequencer = sequencer
        self._access = access
        self._poll_seconds = poll_seconds
        self._dialect = dialect
        self._player = Player(dialect, endpoints.engine)
        self._limits = limits

    def app(self) -> Starlette:
        do = self._do
        routes = [
            self._get("healthz", do.healthz),
            self._get("get_server_capabilities", do.get_server_capabilities),
            *self._administration(),
            self._post("sessions/{session_id}/finish", None, do.finish_session),
            self._get("samplers/{sampler_id}", do.get_sampler),
            self._post("client/config", None, do.client_config),
            self._post("client/dynamic_config", None, do.client_dynamic_config),
            self._route("auth/token", "POST", self._auth_token),
            self._post("cancel_future", messages.FutureRetrieveRequest, self._cancel_future),
            self._post("telemetry", None, do.telemetry),
            self._post("create_session", messages.CreateSessionRequest, do.create_session),
            self._post("session_heartbeat", messages.SessionHeartbeatRequest, do.session_heartbeat),
            self._post("get_info", messages.ModelRequest, do.get_info),
            self._post("weights_info", messages.WeightsInfoRequest, do.weights_info),
            self._post(
                "create_sampling_session",
                messages.CreateSamplingSessionRequest,
                do.create_sampling_session,
            ),
            self._post(
                "join_sampling_session",
                messages.JoinSamplingSessionRequest,
                do.join_sampling_session,
            ),
            self._queued("create_model", messages.CreateModelRequest, do.create_model),
            self._queued("unload_model", messages.ModelRequest, do.unload_model),
            self._queued("forward", messages.ForwardRequest, do.forward),
            self._queued(
                "forward_backward",
                messages.ForwardBackwardRequest,
                do.forward_backward,
                is_pass=True,
                forward_only=do.forward,
            ),
            self._queued(
                "create_custom_loss", messages.CreateCustomLossRequest, do.create_custom_loss
            ),
            self._queued("optim_step", messages.OptimStepRequest, do.optim_step),
            self._queued("save_weights", messages.SaveWeightsRequest, do.save_weights),
            self._queued("load_weights", messages.LoadWeightsRequest, do.load_weights),
            self._queued(
                "save_weights_external",
                messages.SaveWeightsExternalRequest,
                do.save_weights_external,
            ),
            self._queued(
                "save_weights_for_sampler",
                messages.SaveWeightsForSamplerRequest,
                do.save_weights_for_sampler,
            ),
            self._queued("asample", messages.SampleRequest, do.asample),
            self._route("retrieve_future", "POST", self._retrieve_future),
            self._route("retrieve_futures", "POST", self._retrieve_futures),
        ]
        if self._dialect.takes_gradients:
            custom = CustomSteps(do.engine, self._limits)
            routes += [
                self._queued(STEP1, messages.CustomStepRequest, custom.step1),
                self._queued(STEP2, messages.CustomStepRequest, custom.step2),
            ]
        for path in self._dialect.not_found:
            routes.insert(0, self._route(path, "POST", _not_found))
        return Starlette(
            routes=routes,
            middleware=[Middleware(RepeatKeys)],
            exception_handlers={HTTPException: _no_such_route},
        )

    def _administration(self) -> list[Route]:
        """Routes of the requests that list and change what is kept."""
        do = self._do.administration
        run, checkpoint = "training_runs/{training_run_id}", "checkpoints/{kind}/{name}"

        def publish(path: CheckpointPath) -> None:
            do.publish(path, True)

        def unpublish(path: CheckpointPath) -> None:
            do.publish(path, False)

        async def set_ttl(request: Request) -> Response:
            body = await bodies.content(request, self._limits)
            message = self._read(request, body, messages.TimeToLiveRequest)
            await run_in_threadpool(do.set_ttl, _checkpoint(request), message.ttl_seconds)
            return _json({})

        async def assign_project(request: Request) -> Response:
            body = await bodies.content(request, self._limits)
            message = self._read(request, body, messages.AssignProjectRequest)
            do.assign_project(request.path_params["session_id"], message.project_id)
            return _json({})

        async def copy_weights(request: Request) -> Response:
            body = await bodies.content(request, self._limits)
            message = self._read(request, body, messages.CopyWeightsRequest)
            return _json(await run_in_threadpool(do.copy_weights, message))

        return [
            self._route("sessions/{session_id}/project", "PUT", assign_project),
            self._route("copy_weights", "POST", copy_weights),
            self._route(f"{run}/{checkpoint}/archive", "GET", _no_archives),
            self._listing("sessions", do.list_sessions),
            self._get("sessions/{session_id}", do.get_session),
            self._listing("training_runs", do.list_training_runs),
            self._found(run, do.get_training_run),
            self._found(f"{run}/checkpoints", do.list_checkpoints_of),
            self._listing("checkpoints", do.list_checkpoints, limit=100),
            self._of_checkpoint(f"{run}/{checkpoint}", "DELETE", do.delete),
            self._of_checkpoint(f"{run}/{checkpoint}/publish", "POST", publish),
            self._of_checkpoint(f"{run}/{checkpoint}/publish", "DELETE", unpublish),
            self._route(f"{run}/{checkpoint}/ttl", "PUT", set_ttl),
        ]

    def _listing(self, path: str, answer: Callable[[Page], Answer], limit: int = 20) -> Route:
        async def respond(request: Request) -> Response:
            page = bodies.query(request, Page, {"limit": str(limit)})
            return _json(await run_in_threadpool(answer, page))

        return self._route(path, "GET", respond)

    def _found(self, path: str, answer: Callable[..., Answer]) -> Route:
        """Answers a request by what it reads from files, in a thread."""

        async def respond(request: Request) -> Response:
            return _json(await run_in_threadpool(answer, **request.path_params))

        return self._route(path, "GET", respond)

    def _of_checkpoint(self, path: str, method: str, do: Callable[[CheckpointPath], None]) -> Route:
        async def respond(request: Request) -> Response:
            await run_in_threadpool(do, _checkpoint(request))
            return _json({})

        return self._route(path, method, respond)

    def _get(self, path: str, answer: Callable[..., Answer]) -> Route:
        async def respond(request: Request) -> Response:
            return _json(self._player.answer(path, answer(**request.path_params)))

        return self._route(path, "GET", respond)

    def _post(self, path: str, as_type: type[Any] | None, answer: Callable[..., Answer]) -> Route:
        """Answers a request at once; ``as_type`` is None for one whose body says nothing."""

        async def respond(request: Request) -> Response:
            body = await bodies.content(request, self._limits)
            if as_type is None:
                return _json(answer(**request.path_params))
            given = answer(self._read(request, body, as_type), **request.path_params)
            if path in self._dialect.answered_later:
                work = partial(_work, path, lambda: given, False)
                return _json(messages.UntypedFuture(self._sequencer.submit(work)))
            return _json(given)

        return self._route(path, "POST", respond)

    def _read(self, request: Request, body: bytes, as_type: type[M]) -> M:
        body = bodies.decompressed(request, body, self._limits)
        message = bodies.decode(request, body, as_type)
        self._do.note_sender(message)
        return message

    def _queued(
        self,
        path: str,
        as_type: type[M],
        prepare: Callable[[M], Run],
        *,
        is_pass: bool = False,
        forward_only: Callable[[messages.ForwardRequest], Run] | None = None,
    ) -> Route:
        """Accepts a request that takes effect in its turn, and whose result is fetched later.

        Where a pass may be ``forward_only``, it may be a protocol buffer.
        """

        def accept(request: Request, sent: bytes) -> Response:
            header = request.headers.get("x-idempotency-key")
            key = None if header is None else (path, header)
            content = path.encode() + b"\n" + sent
            known = None
            if as_type is not messages.SampleRequest:  # its answer also names the sequences
                known = self._sequencer.find(key, content)
            if known is not None:
                return _json(messages.UntypedFuture(known))
            body = bodies.decompressed(request, sent, self._limits)
            if path in self._dialect.query_only:
                body = messages.encode(dict(request.query_params))
            as_protobuf = forward_only is not None and bodies.is_protobuf(request)
            try:
                if as_protobuf:
                    message = bodies.decode_pass(body)
                elif is_pass and not self._dialect.json_passes:
                    raise BadRequestError(
                        415, f"content-type: a pass is read as {protobuf.MEDIA_TYPE} only"
                    )
                else:
                    message = bodies.decode(request, body, as_type)
                self._do.note_sender(message)
                if (made := _model_made(message)) is not None:
                    key = made
                    if (known := self._sequencer.find(key, content)) is not None:
                        return _json(messages.UntypedFuture(known))
                is_forward_only = forward_only and isinstance(message, messages.ForwardRequest)
                run = self._player.prepare(
                    path, message, cast("Any", forward_only if is_forward_only else prepare)
                )
                line, number = _place(message)
            except MintjaxError:
                self._reject(bodies.number_of(request, body))
                raise
            request_id = self._sequencer.submit(
                partial(_work, path, run, as_protobuf),
                line=line,
                number=number,
                key=key,
                content=content,
                interleaved=isinstance(message, messages.SampleRequest),
                group=_group(message),
            )
            if path in self._dialect.answered_at_once:
                return _json({"model_id": line, "status": "done"})
            accepted = messages.UntypedFuture(request_id)
            if isinstance(message, messages.SampleRequest):
                names = (f"{request_id}:{i}" for i in range(message.num_samples))
                accepted.sample_sequence_ids = list(names)
            return _json(accepted)

        async def respond(request: Request) -> Response:
            sent = await bodies.content(request, self._limits)
            if len(sent) < bodies.LARGE_BYTES:
                return accept(request, sent)
            return await run_in_threadpool(accept, request, sent)

        return self._route(path, "POST", respond)

    def _route(
        self, path: str, method: str, respond: Callable[[Request], Awaitable[Response]]
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            headers = request.headers
            refused = self._access.web_page(headers.get("host", ""), headers.get("origin"))
            if refused is not None:
                return _refusal(403, refused)
            if path != "healthz" and not self._access.allows(request.headers.get("x-api-key")):
                return _refusal(401, "X-API-Key: missing or wrong; this trainer requires its key")
            try:
                return await respond(request)
            except ClientDisconnect:
                return _refusal(400, "the body ended early")  # which nobody reads
            except OtherContentError as error:
                return _refusal(409, f"seq_id: {error}")
            except APIStatusError as error:
                return _refusal(error.status_code, error.message)
            except MintjaxError as error:
                return _refusal(400, str(error))
            except Exception as error:
                logger.exception("%s failed", path)
                return _refusal(500, f"internal error: {_said(error)}")

        return Route(f"/api/v1/{path}", endpoint, methods=[method])

    async def _retrieve_future(self, request: Request) -> Response:
        body = await bodies.content(request, self._limits)
        question = self._read(request, body, messages.FutureRetrieveRequest)
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
        self._sequencer.give_up(request_id, self._limits.missing_seconds)
        if not future.done():
            awaited = self._sequencer.waits_for(request_id)
            reason = None if awaited is None else f"seq_id {awaited} has not arrived"
            return _json(messages.TryAgain(request_id, "active", reason))
        self._sequencer.retrieved(request_id)
        if _size(future) < bodies.LARGE_BYTES:
            return self._outcome(request, future)
        return await run_in_threadpool(self._outcome, request, future)

    def _outcome(self, request: Request, future: Future[bytes]) -> Response:
        if future.cancelled():
            return self._failed(
                "it was not run: it was cancelled, its model was unloaded, or the trainer closed",
                "user",
            )
        failure = future.exception()
        match failure:
            case None:
                always = self._dialect.always_protobuf
                body, media_type = bodies.acceptable(request, future.result(), always)
                return Response(body, media_type=media_type)
            case NoNumberError():
                return Response("Internal Server Error", 500, media_type="text/plain")
            case CancelledError():
                return self._failed("it was cancelled, or the trainer closed", "user")
            case StorageError():
                return self._failed(str(failure), "server")
            case APIStatusError():
                return self._failed(failure.message, "user")
            case MissingNumberError() | MintjaxError():
                return self._failed(str(failure), "user")
            case _:
                return self._failed(f"internal error: {_said(failure)}", "server")

    def _failed(self, words: str, category: str) -> Response:
        status, answer = self._player.failure(words, category)
        return Response(messages.encode(answer), status, media_type="application/json")

    async def _retrieve_futures(self, request: Request) -> Response:
        body = await bodies.content(request, self._limits)
        question = self._read(request, body, messages.FuturesRetrieveRequest)
        session_id, copy = question.target.sampling_session_id, question.target.cloned_sampler_id
        self._do.check_sampler(session_id)
        group, after = (session_id, copy), question.prev_cursor
        patience = self._poll_seconds if question.timeout is None else question.timeout
        with self._sequencer.watching(group, after) as finished:
            if not finished.done():
                await _wait(finished, min(max(patience, 0.0), self._poll_seconds))
        found = self._sequencer.finished(group, after)
        completions = [
            messages.FutureCompletion(
                one.request_id, "failed" if one.size is None else "finished", one.size
            )
            for one in found
        ]
        cursor = max([after, *(one.at for one in found)])
        return _json(messages.FuturesRetrieveResponse(completions, cursor))

    async def _auth_token(self, request: Request) -> Response:
        return _json({"jwt": self._access.token(request.headers.get("x-api-key"))})

    def _cancel_future(self, question: messages.FutureRetrieveRequest) -> Answer:
        try:
            self._sequencer.cancel(question.request_id)
        except UnknownRequestError:
            raise NotFoundError(
                404, f"request_id: there is no request {question.request_id!r}"
            ) from None
        return {"request_id": question.request_id}

    def _reject(self, refused: tuple[str, int] | None) -> None:
        """Lets no later request wait for the number of one that was refused."""
        if refused is not None and refused[0] in self._do.engine.models:
            self._sequencer.reject(*refused)


def _checkpoint(request: Request) -> CheckpointPath:
    """Reads the checkpoint that a request's address names."""
    parts = request.path_params
    path = "tinker://{training_run_id}/{kind}/{name}".format(**parts)
    return CheckpointPath.parse(path, field="checkpoint_id")


def _place(message: Any) -> tuple[str | None, int | None]:
    """Finds the line that a request stands in, and its number there, if it has one."""
    line, number = getattr(message, "model_id", None), getattr(message, "seq_id", None)
    if not isinstance(line, str) or not isinstance(number, int):
        return None, None
    if number < 1:
        raise DataError(f"{number} is below 1, the first", field="seq_id")
    return line, number


def _group(message: Any) -> tuple[str, int] | None:
    """Names the client that samples, or the copy of it, which ``retrieve_futures`` asks about."""
    if not isinstance(message, messages.SampleRequest) or message.sampling_session_id is None:
        return None
    return message.sampling_session_id, (message.seq_id or 0) // REQUESTS_OF_A_COPY


def _model_made(message: Any) -> tuple[str, str] | None:
    """Makes the key of a request that makes a model of an id; repeats may bear other headers."""
    if not isinstance(message, messages.LoadWeightsRequest):
        return None
    return model_made_by_load(message)


def _work(path: str, run: Run, as_protobuf: bool) -> Slices[bytes]:
    try:
        answer = run()
        if isinstance(answer, Generator):
            answer = yield from answer
        return bodies.encode(answer, as_protobuf=as_protobuf)
    except MintjaxError:
        raise
    except Exception:
        logger.exception("%s failed", path)
        raise


async def _wait(future: Future[Any], seconds: float) -> None:
    # Not asyncio.wrap_future, which cancels what it wraps and complains of failures not looked at.
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop of a client that has gone may be closed
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    with suppress(TimeoutError):
        await asyncio.wait_for(done.wait(), seconds)


def _size(future: Future[bytes]) -> int:
    return 0 if future.cancelled() or future.exception() is not None else len(future.result())


def _json(answer: Answer) -> Response:
    return Response(messages.encode(answer), media_type="application/json")


def _refusal(status: int, detail: str) -> Response:
    return Response(msgspec.json.encode({"detail": detail}), status, media_type="application/json")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


async def _no_archives(request: Request) -> Response:
    raise no_other_format()  # 400, because clients send again what is answered with a 501


async def _not_found(request: Request) -> Response:
    return _refusal(404, "Not Found")


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return _refusal(status, f"{request.method} {request.url.path} is not served here")
