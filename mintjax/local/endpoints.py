"""Handles each request of the protocol: checks it, then answers, or queues its work."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import msgspec

from mintjax.errors import BadRequestError, DataError, NotFoundError
from mintjax.local import optimizer, sampling
from mintjax.local.access import Access
from mintjax.local.administration import Administration, check_ttl
from mintjax.local.checkpoints import CheckpointPath, check_name
from mintjax.local.custom_losses import LOSS_FN, CustomLosses
from mintjax.local.engine import Engine, check_create
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.local.model import BASE_MODELS
from mintjax.local.sequencer import Sequencer
from mintjax.local.sessions import Sessions
from mintjax.local.slices import Slices
from mintjax.local.store import Note
from mintjax.protocol import messages
from mintjax.runs import GetSamplerResponse, OptimizerConfig, WeightsInfoResponse
from mintjax.step.reduction import SUM
from mintjax.types import (
    GetInfoResponse,
    LoadWeightsResponse,
    LoraConfig,
    ModelData,
    SaveWeightsResponse,
    ServerCapabilities,
    SupportedModel,
)

logger = logging.getLogger("mintjax.local")

Answer = msgspec.Struct | dict[str, Any]
Run = Callable[[], "Answer | Slices[Answer]"]
"""Runs in the trainer's thread, when the request's turn has come."""

MAX_NUMBER = 2**53
"""Numbers of models, which become part of their ids, are below this."""


class Endpoints:
    """The requests of the protocol, one method each, without HTTP.

    A method that returns a :data:`Run` has checked its request; it raises ``DataError`` or
    ``NotFoundError`` instead if the request cannot be run.

    Args:
        engine: the trainer.
        sequencer: what brings its requests into order.
        access: gives out tokens.
        config: what is asked of clients.
        states_reduction: say in ``client/config`` what the engine divides losses by.
        limits: bounds on what clients can make the trainer hold.
        logprobs_as_drawn: samples come with logprobs of the distribution that they are drawn from.
    """

    def __init__(
        self,
        engine: Engine,
        sequencer: Sequencer,
        access: Access,
        config: messages.ClientConfigResponse,
        states_reduction: bool = True,
        limits: Limits = DEFAULT_LIMITS,
        logprobs_as_drawn: bool = False,
    ) -> None:
        self.engine = engine
        self._sequencer = sequencer
        self._access = access
        stated = messages.StatedReduction(**dataclasses.asdict(engine.reduction))
        self._config = msgspec.structs.replace(
            config,
            mintjax_reduction=stated if states_reduction else None,
            custom_loss_server_side=config.custom_loss_server_side and engine.reduction == SUM,
        )
        self._limits = limits
        self._logprobs_as_drawn = logprobs_as_drawn
        self._sessions = Sessions(limits)
        self.administration = Administration(engine, self._sessions)
        self._inflight: dict[str, str] = {}
        sums = engine.reduction == SUM
        self._losses = CustomLosses(engine, self._sessions, limits) if sums else None

    def note_sender(self, message: object) -> None:
        """Notes that the client of a message is there, and lets go of those that are gone."""
        owners = ("session_id", "model_id", "sampling_session_id")
        self._sessions.seen(**{name: getattr(message, name, None) for name in owners})
        for session_id in self._sessions.gone():
            logger.info("session %s is let go, because its client sends nothing", session_id)
            self._end_session(session_id)

    def _end_session(self, session_id: str) -> None:
        if self._losses is not None:
            self._losses.end(session_id)
        left = self._sessions.end(session_id)
        for model_id in left.model_ids:
            self._sequencer.submit(partial(self._let_go, model_id))
        for source in left.sources:
            self._sequencer.submit(partial(self._let_go_of_sampler, source))

    def _let_go(self, model_id: str) -> bytes:
        with suppress(NotFoundError):
            self.engine.unload_model(model_id)
        self._inflight.pop(model_id, None)
        self._sequencer.drop(model_id)
        return b"{}"

    def _let_go_of_sampler(self, source: str) -> bytes:
        if source not in BASE_MODELS:
            with suppress(NotFoundError):
                self.engine.store.remove_unlisted(source)
        return b"{}"

    def client_config(self) -> Answer:
        """Answers ``client/config``; one of the flags asks that keys be exchanged for tokens."""
        return {"pjwt_auth_enabled": True, **msgspec.to_builtins(self._config)}

    def client_dynamic_config(self) -> Answer:
        """Answers ``client/dynamic_config``, for which clients ask again every five minutes."""
        return {
            "refresh_interval_sec": 300,
            "sample_cancel_enabled": True,
            "sample_cancel_max_batch_size": 64,
        }

    def telemetry(self) -> Answer:
        """Answers ``telemetry``, and forgets it."""
        return {"status": "accepted"}

    def healthz(self) -> Answer:
        """Answers ``healthz``."""
        return {"status": "ok"}

    def get_server_capabilities(self) -> Answer:
        """Answers ``get_server_capabilities``."""
        return ServerCapabilities(
            supported_models=[
                SupportedModel(model_name=config.name, max_context_length=config.max_context_length)
                for config in BASE_MODELS.values()
            ]
        )

    def create_session(self, request: messages.CreateSessionRequest) -> Answer:
        """Answers ``create_session``."""
        self._check_metadata(request.user_metadata, request.display_name, request.project_id)
        opened = self._sessions.open(
            request.display_name or None, request.user_metadata, request.project_id or None
        )
        return messages.CreateSessionResponse(opened)

    def _check_metadata(self, *said: object) -> None:
        size = len(msgspec.json.encode([one for one in said if one]))
        self._limits.check("max_metadata_bytes", size, f"user_metadata has {size} bytes")

    def session_heartbeat(self, request: messages.SessionHeartbeatRequest) -> Answer:
        """Answers ``session_heartbeat``."""
        self._sessions.get(request.session_id)
        return {"type": "session_heartbeat"}

    def finish_session(self, session_id: str) -> Answer:
        """Answers ``POST sessions/<id>/finish``, and lets go of its models and samplers."""
        self._end_session(session_id)
        return {"session_id": session_id, "status": "finished"}

    def join_sampling_session(self, request: messages.JoinSamplingSessionRequest) -> Answer:
        """Answers ``join_sampling_session``, with a number that no other copy of the client has."""
        return {"client_counter": self._sessions.join(request.sampling_session_id)}

    def check_sampler(self, sampling_session_id: str) -> None:
        """Checks that there is a sampling session.

        Raises:
            NotFoundError: there is none of that id.
        """
        self._sessions.source(sampling_session_id)

    def get_sampler(self, sampler_id: str) -> Answer:
        """Answers ``GET samplers/<id>``."""
        source = self._sessions.source(sampler_id)
        return GetSamplerResponse(
            sampler_id=sampler_id,
            base_model=self._base_model(source),
            model_path=None if source in BASE_MODELS else source,
        )

    def get_info(self, request: messages.ModelRequest) -> Answer:
        """Answers ``get_info``."""
        model = self.engine.model(request.model_id)
        tokenizer_id = self.engine.store.tokenizer_folder().as_posix()
        return GetInfoResponse(
            model_id=request.model_id,
            model_data=ModelData(
                model_name=model.config.name, arch="transformer", tokenizer_id=tokenizer_id
            ),
            lora_rank=model.lora_config.rank,
        )

    def weights_info(self, request: messages.WeightsInfoRequest) -> Answer:
        """Answers ``weights_info``: what it takes to make a model that can load a checkpoint."""
        made_from = self.engine.describe_checkpoint(request.tinker_path, field="tinker_path")
        lora = made_from.lora_config
        return WeightsInfoResponse(
            base_model=made_from.base_model,
            lora_rank=lora.rank,
            train_unembed=lora.train_unembed,
            train_mlp=lora.train_mlp,
            train_attn=lora.train_attn,
        )

    def create_sampling_session(self, request: messages.CreateSamplingSessionRequest) -> Answer:
        """Answers ``create_sampling_session``, from a checkpoint, else from a base model."""
        source = request.model_path or request.base_model
        if source is None:
            raise DataError("pass model_path, or base_model", field="model_path")
        if request.model_path is not None:
            self.engine.describe_checkpoint(request.model_path, field="model_path")
        else:
            check_create(source, LoraConfig(1))
        opened = self._sessions.open_sampling(request.session_id, source)
        return messages.CreateSamplingSessionResponse(opened)

    def create_model(self, request: messages.CreateModelRequest) -> Run:
        """Answers ``create_model``."""
        self._sessions.get(request.session_id)
        self._sessions.check_room_for_model()
        lora_config = request.lora_config or LoraConfig(32)
        check_create(request.base_model, lora_config, self._limits)
        _check_optimizer(request.optimizer_config, "optimizer_config")
        self._check_metadata(request.user_metadata)

        def run() -> Answer:
            model_id = self.engine.create_model(request.base_model, lora_config)
            with self._unloaded_on_error(model_id):
                metadata = request.user_metadata or None
                self._sessions.add_model(request.session_id, model_id, metadata)
            return messages.CreateModelResponse(model_id)

        return run

    @contextmanager
    def _unloaded_on_error(self, model_id: str) -> Generator[None]:
        try:
            yield
        except BaseException:
            self.engine.unload_model(model_id)
            raise

    def unload_model(self, request: messages.ModelRequest) -> Run:
        """Answers ``unload_model``, after what was submitted before it."""
        self.engine.model(request.model_id)

        def run() -> Answer:
            self.engine.unload_model(request.model_id)
            self._sessions.remove_model(request.model_id)
            self._inflight.pop(request.model_id, None)
            self._sequencer.drop(request.model_id)
            return {"model_id": request.model_id, "type": "unload_model"}

        return run

    def forward(self, request: messages.ForwardRequest) -> Run:
        """Answers ``forward``."""
        given = request.forward_input
        if given.loss_fn == LOSS_FN and self._losses is not None:
            return self._losses.run_pass(request.model_id, given, backward=False)
        arguments = (request.model_id, given.data, given.loss_fn, _numbers(given.loss_fn_config))
        self.engine.check_pass(*arguments, limits=self._limits)
        return lambda: self.engine.forward(*arguments)

    def forward_backward(self, request: messages.ForwardBackwardRequest) -> Run:
        """Answers ``forward_backward``."""
        given = request.forward_backward_input
        if given.loss_fn == LOSS_FN and self._losses is not None:
            return self._losses.run_pass(request.model_id, given, backward=True)
        arguments = (request.model_id, given.data, given.loss_fn, _numbers(given.loss_fn_config))
        self.engine.check_pass(*arguments, limits=self._limits)
        return lambda: self.engine.forward_backward(*arguments)

    def create_custom_loss(self, request: messages.CreateCustomLossRequest) -> Run:
        """Answers ``create_custom_loss``, with a loss that passes of the same session can name."""
        if self._losses is None:
            raise BadRequestError(
                400, "custom losses are sums over datums, which this trainer divides"
            )
        return self._losses.create(request)

    def optim_step(self, request: messages.OptimStepRequest) -> Run:
        """Answers ``optim_step``."""
        self.engine.model(request.model_id)
        _check_optimizer(request.optimizer_params, "optimizer_params")
        params = request.adam_params
        if params is msgspec.UNSET:
            raise DataError("an optimizer step needs them", field="adam_params")
        optimizer.check_params(params)
        return lambda: self.engine.optim_step(request.model_id, params)

    def save_weights(self, request: messages.SaveWeightsRequest) -> Run:
        """Answers ``save_weights``."""
        self.engine.model(request.model_id)
        if request.path is not None:
            check_name(request.path)
        note = self._note(request)
        overwrite = request.overwrite is not False
        return lambda: SaveWeightsResponse(
            path=self.engine.save_weights(
                request.model_id, request.path, note=note, overwrite=overwrite
            )
        )

    def save_weights_external(self, request: messages.SaveWeightsExternalRequest) -> Run:
        """Refuses ``save_weights_external``."""
        raise no_other_format()

    def _note(
        self, request: messages.SaveWeightsRequest | messages.SaveWeightsForSamplerRequest
    ) -> Note:
        """Collects what a client wants kept with a checkpoint."""
        self._check_metadata(request.user_metadata)
        check_ttl(request.ttl_seconds)
        of_run = self._sessions.run(request.model_id).user_metadata
        return Note(
            request.user_metadata, None if of_run is None else dict(of_run), request.ttl_seconds
        )

    def load_weights(self, request: messages.LoadWeightsRequest) -> Run:
        """Answers ``load_weights``, into a model or into a new one of a session.

        Whether there is such a checkpoint is only known in its turn.
        """
        path = request.path
        CheckpointPath.parse(path, field="path")
        _check_optimizer(request.optimizer_config, "optimizer_config")
        self._check_metadata(request.user_metadata)
        if (made := model_made_by_load(request)) is not None:
            return self._load_new(request, *made)
        if not request.model_id:
            raise DataError("pass it, or session_id and model_seq_id", field="model_id")
        model_id = request.model_id
        self.engine.model(model_id)

        def run() -> Answer:
            self.engine.load_weights(model_id, path, with_optimizer=request.optimizer)
            return LoadWeightsResponse(path=path)

        return run

    def _load_new(
        self, request: messages.LoadWeightsRequest, session_id: str, model_id: str
    ) -> Run:
        self._sessions.get(session_id)
        self._sessions.check_room_for_model()
        if model_id in self.engine.models:
            raise DataError(f"there is a model {model_id} already", field="model_seq_id")

        def run() -> Answer:
            saved = self.engine.describe_checkpoint(request.path, field="path")
            if request.base_model and request.base_model != saved.base_model:
                raise DataError(
                    f"{request.path} holds adapters of {saved.base_model}, which do not fit "
                    f"{request.base_model}",
                    field="base_model",
                )
            check_create(saved.base_model, saved.lora_config, self._limits)
            self.engine.create_model(saved.base_model, saved.lora_config, model_id)
            with self._unloaded_on_error(model_id):
                self.engine.load_weights(model_id, request.path, with_optimizer=request.optimizer)
                self._sessions.add_model(session_id, model_id, request.user_metadata or None)
            return LoadWeightsResponse(path=request.path)

        return run

    def save_weights_for_sampler(self, request: messages.SaveWeightsForSamplerRequest) -> Run:
        """Answers ``save_weights_for_sampler``, under a name, or for a session that it opens."""
        self.engine.model(request.model_id)
        if request.path is not None:
            check_name(request.path)
        if request.kind == "inflight" and request.path is not None:
            raise DataError("weights that change have no path", field="path")
        note = self._note(request)

        def run() -> Answer:
            name = request.path
            if request.kind == "inflight":  # the place of all of this model's such samplers
                name = self._inflight.setdefault(request.model_id, f"inflight-{uuid.uuid4().hex}")
            path = self.engine.save_weights_for_sampler(
                request.model_id, name, note=note, listed=request.path is not None
            )
            if request.path is not None:
                return messages.SaveWeightsForSamplerResponse(path=path)
            session_id = self._sessions.run(request.model_id).session_id
            opened = self._sessions.open_sampling(session_id, path)
            return messages.SaveWeightsForSamplerResponse(sampling_session_id=opened)

        return run

    def asample(self, request: messages.SampleRequest) -> Run:
        """Answers ``asample``."""
        if request.sampling_session_id is None:
            raise DataError(
                "make one first, with create_sampling_session", field="sampling_session_id"
            )
        source = self._sessions.source(request.sampling_session_id)
        prompt, wanted = request.prompt.to_ints(), sampling.wanted_of(request)
        wanted = dataclasses.replace(wanted, as_drawn=self._logprobs_as_drawn)
        sampling.check_request(
            BASE_MODELS[self._base_model(source)],
            prompt,
            request.sampling_params,
            request.num_samples,
            wanted,
            self._limits,
        )
        return lambda: self.engine.sample_in_slices(
            source,
            prompt,
            request.sampling_params,
            num_samples=request.num_samples,
            wanted=wanted,
        )

    def _base_model(self, source: str) -> str:
        if source in BASE_MODELS:
            return source
        return self.engine.describe_checkpoint(source, field="model_path").base_model


def no_other_format() -> BadRequestError:
    """Makes the refusal of archives and of weights for other libraries."""
    return BadRequestError(
        400,
        "this trainer makes no archives and no external weights, because its models are in no "
        "other library; its checkpoints are safetensors files in the folder that `mintjax serve "
        "--directory` names",
    )


def model_made_by_load(request: messages.LoadWeightsRequest) -> tuple[str, str] | None:
    """Names the session and the id of the model that a ``load_weights`` makes; None if none.

    Clients take the id for granted; the answer does not say it.

    Raises:
        DataError: it names a model too, or the number of the new one is missing or no number.
    """
    session_id, number = request.session_id, request.model_seq_id
    if not session_id:
        return None
    if request.model_id:
        raise DataError("pass model_id, or session_id and model_seq_id", field="session_id")
    if not isinstance(number, int) or not 0 <= number < MAX_NUMBER:
        raise DataError(f"it must be 0 to {MAX_NUMBER - 1}", field="model_seq_id")
    return session_id, f"{session_id}:train:{number}"


def _check_optimizer(config: OptimizerConfig | msgspec.UnsetType | None, field: str) -> None:
    if config and config.type != "adamw":
        raise DataError(
            f"this trainer has the optimizer 'adamw' only, not {config.type!r}", field=field
        )


def _numbers(config: Mapping[str, float | str] | None) -> dict[str, float] | None:
    """Checks that the options of a loss that trainers have by name are numbers.

    Raises:
        DataError: one is a text.
    """
    numbers: dict[str, float] = {}
    for name, value in (config or {}).items():
        if isinstance(value, str):
            raise DataError(f"{value[:80]!r} is no number", field=f"loss_fn_config[{name!r}]")
        numbers[name] = value
    return None if config is None else numbers
