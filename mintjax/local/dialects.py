"""The ways in which real trainers differ from the embedded one, which can play them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from mintjax.errors import BadRequestError, ConfigError, MintjaxError
from mintjax.local.endpoints import Answer, Run
from mintjax.local.engine import Engine
from mintjax.local.slices import Slices
from mintjax.local.tokenizer import VOCAB_SIZE
from mintjax.protocol import messages
from mintjax.step.reduction import SUM, Reduction
from mintjax.tensors import TensorData
from mintjax.types import AdamParams, Datum, ForwardBackwardOutput

Refusal: TypeAlias = tuple[int, str]
"""An HTTP status and the words of ``detail``."""

_SKYRL_NAMES = r"[a-zA-Z0-9_-]+"
_NOT_OF_SKYRL_TX = "Input should be 'cross_entropy', 'importance_sampling' or 'ppo'"
_IN_SKYRL_TX = "body.forward_backward_input.loss_fn: "
_OF_SKYRL = "'cross_entropy', 'importance_sampling', 'ppo', 'gspo', 'cispo', 'ppo_critic' or 'dppo'"
_BOUNDS_OF_TUFT = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
_OF_HATCHERY = "cispo, cross_entropy, dapo, grpo, gspo, importance_sampling, orpo, ppo"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The differences between a trainer and the embedded one, whose own way is each default.

    Args:
        reduction: what it divides losses by; whatever the engine does if None.
        states_reduction: it says so in ``client/config``; elsewhere clients have to measure it.
        json_passes: it reads passes in JSON, too. Elsewhere they are refused (415), and have to
            come as protocol buffers, and ``forward`` is not found (404).
        always_protobuf: it answers passes and samples in protocol buffers, whatever ``Accept``
            says.
        missing: paths that it does not have.
        refused_losses: the losses that it refuses when it is asked for them.
        failing_losses: the losses that it accepts and that then fail, with its words.
        loss_defaults: hyperparameters where a request gives none, if they differ.
        failed: how a failed request is told: as a future's ``error``, as an HTTP status with those
            words after a prefix, or as an ``error`` whose category is none of the protocol's.
        unknown_tokens: what becomes of a token beyond the vocabulary: it is refused at once, or
            the pass fails, or its logprob is no number, which JSON cannot say (500).
        max_tokens_required: a request to sample has to say how many tokens at most.
        top_k: how many of the likeliest tokens a sample is drawn from where a request says nothing,
            or -1; all if None.
        logprobs_as_drawn: samples come with logprobs of the distribution that they are drawn from,
            by temperature, top_k and top_p, in place of the model's.
        stop_as_list: a single string as ``stop`` is refused.
        names: the names that a checkpoint may have; a name that is taken is refused (409).
        loads_first: ``load_weights`` only as a model's first request.
        adapters: places for models, one of them for the base; one model more fails when it is made.
        refuses_nulls: a null in ``create_model`` is refused.
        adam_limits: of ``optim_step``, each above 0 and at most this.
        calls_models: the field of a base model's name in ``get_server_capabilities``.
        query_only: paths whose arguments are read from the query.
        answered_at_once: paths that are answered with a result, where others give a future.
        answered_later: paths that are answered with a future, where others give a result.
        takes_gradients: it has ``forward_backward_custom_step1`` and ``_step2``.
    """

    reduction: Reduction | None = None
    states_reduction: bool = True
    json_passes: bool = True
    always_protobuf: bool = False
    missing: frozenset[str] = frozenset()
    refused_losses: Mapping[str, Refusal] = field(default_factory=dict[str, Refusal])
    failing_losses: Mapping[str, str] = field(default_factory=dict[str, str])
    loss_defaults: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )
    failed: Literal["error", "user_error"] | tuple[int, str] = "error"
    unknown_tokens: Literal["refused", "fails", "no number"] = "refused"
    max_tokens_required: bool = False
    top_k: int | None = None
    logprobs_as_drawn: bool = False
    stop_as_list: bool = False
    names: str | None = None
    loads_first: bool = False
    adapters: int | None = None
    refuses_nulls: bool = False
    adam_limits: Mapping[str, float] = field(default_factory=dict[str, float])
    calls_models: str = "model_name"
    query_only: frozenset[str] = frozenset()
    answered_at_once: frozenset[str] = frozenset()
    answered_later: frozenset[str] = frozenset()
    takes_gradients: bool = False

    @property
    def not_found(self) -> frozenset[str]:
        """The paths that the embedded trainer has and this one has not."""
        return self.missing if self.json_passes else self.missing | {"forward"}


_NOT_SELF_HOSTED = frozenset({"sessions/{session_id}/finish", "cancel_future"})

OWN = Dialect()
"""The embedded trainer's own way."""

DIALECTS: Mapping[str, Dialect] = {
    "skyrl-tx-0.3": Dialect(
        reduction=Reduction("weights", per_step="datums"),
        states_reduction=False,
        missing=frozenset({"client/config"}) | _NOT_SELF_HOSTED,
        refused_losses=dict.fromkeys(
            ("cispo", "dro", "gspo"), (422, _IN_SKYRL_TX + _NOT_OF_SKYRL_TX)
        ),
        failed=(400, ""),
        unknown_tokens="no number",
        max_tokens_required=True,
        stop_as_list=True,
        names=_SKYRL_NAMES,
        adapters=8,
    ),
    "skyrl-0.4": Dialect(
        reduction=Reduction("weights", per_step="datums"),
        states_reduction=False,
        json_passes=False,
        missing=_NOT_SELF_HOSTED,
        always_protobuf=True,
        refused_losses={
            "dro": (422, f"forward_backward_input.loss_fn: Input should be {_OF_SKYRL}")
        },
        failing_losses={
            "gspo": "Loss functions ['gspo'] are not supported by the JAX backend",
        },
        failed=(400, ""),
        unknown_tokens="no number",
        max_tokens_required=True,
        stop_as_list=True,
        names=_SKYRL_NAMES,
        loads_first=True,
        adapters=8,
    ),
    "tuft-0.2": Dialect(
        reduction=SUM,
        states_reduction=False,
        json_passes=False,
        missing=_NOT_SELF_HOSTED,
        refused_losses={"gspo": (422, "Invalid protobuf request: Unsupported loss_fn: 'gspo'")},
        loss_defaults={"ppo": _BOUNDS_OF_TUFT, "cispo": _BOUNDS_OF_TUFT},
        failed=(422, "Future failed: Server error: "),
        unknown_tokens="fails",
    ),
    "hatchery-0.3": Dialect(
        reduction=Reduction(per_request="weights"),
        states_reduction=False,
        missing=_NOT_SELF_HOSTED,
        refused_losses={
            "dro": (
                501,
                "loss_fn 'dro' is declared by Tinker but not yet implemented server-side. "
                f"Supported: {_OF_HATCHERY}",
            )
        },
        failed="user_error",
        unknown_tokens="fails",
        top_k=50,  # transformers' default, which a request's -1 leaves as it is
        logprobs_as_drawn=True,
        refuses_nulls=True,
        adam_limits={"learning_rate": 10.0, "eps": 1.0},
        calls_models="model_id",
        query_only=frozenset({"unload_model"}),
        answered_at_once=frozenset({"unload_model"}),
        answered_later=frozenset({"create_sampling_session"}),
        takes_gradients=True,
    ),
}
"""The dialects of trainers, by name and version, as ``mintjax serve --like`` has them.

``python -m benchmarks.real_trainers`` starts the trainers themselves.
"""


def dialect_of(like: str | Dialect | None) -> Dialect:
    """Finds a dialect by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if like is None:
        return OWN
    if isinstance(like, Dialect):
        return like
    try:
        return DIALECTS[like]
    except KeyError:
        raise ConfigError(f"like: {like!r} is none of {', '.join(DIALECTS)}") from None


class Player:
    """Plays a dialect: refuses and answers as the trainer does.

    Args:
        dialect: of the trainer.
        engine: the embedded trainer.
    """

    def __init__(self, dialect: Dialect, engine: Engine) -> None:
        self._dialect = dialect
        self._engine = engine
        self._used: set[str] = set()  # models that have had a request
        self._names: set[tuple[str, str, str]] = set()  # of checkpoints, by model and kind

    def prepare(self, path: str, message: Any, prepare: Callable[[Any], Run]) -> Run:
        """Prepares a request that takes effect in its turn.

        Args:
            path: of the request.
            message: its content.
            prepare: does it as the embedded trainer does.

        Raises:
            BadRequestError: the trainer refuses it.
        """
        dialect = self._dialect
        refusal = self._refusal(path, message)
        if refusal is not None:
            raise BadRequestError(*refusal)
        model_id = getattr(message, "model_id", None)
        if isinstance(model_id, str):
            self._used.add(model_id)
        if dialect.top_k is not None:
            _set_top_k(message, dialect.top_k)
        given = _given(message)
        if given is None:
            run = prepare(message)
            return self._making(run) if path == "create_model" and dialect.adapters else run
        words = dialect.failing_losses.get(given.loss_fn)
        unknown = dialect.unknown_tokens != "refused" and _first_unknown(given.data)
        if words is None and not unknown:
            defaults = dialect.loss_defaults.get(given.loss_fn, {})
            given.loss_fn_config = {**defaults, **(given.loss_fn_config or {})} or None
            return prepare(message)
        self._engine.model(message.model_id)
        if words is None and dialect.unknown_tokens == "no number":
            return _fails(NoNumberError()) if dialect.json_passes else _no_numbers(given.data)
        return _fails(BadRequestError(400, words or f"index {unknown} is out of bounds"))

    def answer(self, path: str, answer: Answer) -> Answer:
        """Says an answer that is given at once as the trainer does."""
        if path == "get_server_capabilities" and self._dialect.calls_models != "model_name":
            offered: list[dict[str, Any]] = msgspec.to_builtins(answer)["supported_models"]
            for one in offered:
                one[self._dialect.calls_models] = one.pop("model_name")
            takes = self._dialect.takes_gradients
            return {"supported_models": offered, "supports_forward_backward_custom": takes}
        return answer

    def failure(self, words: str, category: str) -> tuple[int, Answer]:
        """Words the result of a request that has failed: the HTTP status, and the answer."""
        if self._dialect.failed == "error":
            return 200, messages.FutureError(words, category)
        if self._dialect.failed == "user_error":
            return 200, {"type": "request_failed", "error": words, "category": "user_error"}
        status, prefix = self._dialect.failed
        return status, {"detail": prefix + words}

    def _refusal(self, path: str, message: Any) -> Refusal | None:
        dialect, given = self._dialect, _given(message)
        if given is not None:
            return dialect.refused_losses.get(given.loss_fn)
        match message:
            case messages.CreateModelRequest(user_metadata=None) if dialect.refuses_nulls:
                return 422, "body.user_metadata: Input should be a valid dictionary"
            case messages.OptimStepRequest(adam_params=params):
                return _beyond(params, dialect.adam_limits)
            case messages.SampleRequest(sampling_params=params):
                if dialect.stop_as_list and isinstance(params.stop, str):
                    return 422, "body.sampling_params.stop: Input should be a valid list"
                if dialect.max_tokens_required and params.max_tokens is None:
                    return 400, "max_tokens is currently required"
            case messages.LoadWeightsRequest() if dialect.loads_first:
                if message.model_id in self._used:
                    return 400, f"LoadWeights is not permitted with seq_id {message.seq_id}"
            case messages.SaveWeightsRequest() | messages.SaveWeightsForSamplerRequest():
                return self._name_refused(path, message)
            case _:
                pass
        return None

    def _name_refused(
        self,
        path: str,
        message: messages.SaveWeightsRequest | messages.SaveWeightsForSamplerRequest,
    ) -> Refusal | None:
        pattern, name = self._dialect.names, message.path
        if pattern is None or name is None:
            return None
        if not re.fullmatch(pattern, name):
            return 422, f"body.path: String should match pattern '^{pattern}$'"
        taken = (message.model_id, path, name)
        if taken in self._names:
            return 409, f"Checkpoint '{name}' already exists for model '{message.model_id}'"
        self._names.add(taken)
        return None

    def _making(self, run: Run) -> Run:
        def made() -> Answer | Slices[Answer]:
            places = self._dialect.adapters or 0
            if len(self._engine.models) >= places - 1:
                raise BadRequestError(400, f"Maximum number of LoRA adapters ({places}) reached")
            return run()

        return made


class WithNaN(ForwardBackwardOutput):
    """The result of a pass in which some logprobs are no numbers."""


class NoNumberError(MintjaxError):
    """The result holds what is no number, so that it cannot be sent as JSON."""


def _set_top_k(message: Any, top_k: int) -> None:
    """Writes a trainer's default into a request to sample that leaves it open."""
    if isinstance(message, messages.SampleRequest) and message.sampling_params.top_k == -1:
        params = msgspec.structs.replace(message.sampling_params, top_k=top_k)
        message.sampling_params = params


def _given(message: Any) -> messages.ForwardBackwardInput | None:
    if isinstance(message, messages.ForwardRequest):
        return message.forward_input
    if isinstance(message, messages.ForwardBackwardRequest):
        return message.forward_backward_input
    return None


def _first_unknown(data: Sequence[Datum]) -> int | None:
    """Finds a token beyond the vocabulary."""
    for datum in data:
        targets = datum.loss_fn_inputs.get("target_tokens", np.zeros(0, np.int64))
        for token in (*datum.model_input.to_ints(), *targets.ravel().tolist()):
            if token >= VOCAB_SIZE:
                return token
    return None


def _fails(error: MintjaxError) -> Run:
    def run() -> Answer:
        raise error

    return run


def _no_numbers(data: Sequence[Datum]) -> Run:
    rows = [TensorData(np.full(d.loss_fn_inputs["target_tokens"].shape, np.nan)) for d in data]
    return lambda: WithNaN(loss_fn_outputs=[{"logprobs": row} for row in rows])


def _beyond(params: AdamParams | msgspec.UnsetType, limits: Mapping[str, float]) -> Refusal | None:
    for name, most in limits.items():
        value: float = getattr(params, name)
        if value > most:
            return 422, f"body.adam_params.{name}: Input should be less than or equal to {most:g}"
        if value <= 0:
            return 422, f"body.adam_params.{name}: Input should be greater than 0"
    return None
