"""The values that travel between client and trainer, under the names of the Tinker SDK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax import runs
from mintjax.datums import Datum, as_datum, as_datums, datum, with_column
from mintjax.errors import DataError
from mintjax.left_out import NAMES, missing
from mintjax.model_input import (
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    ModelInputChunk,
    as_model_input,
)
from mintjax.samples import (
    NO_LOGPROB,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    StopReason,
    TopkLogprobs,
    TopkRow,
)
from mintjax.tensors import TensorData

__all__ = [
    "NO_LOGPROB",
    "AdamParams",
    "CustomStepOutput",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "GetInfoResponse",
    "ImageChunk",
    "LoadWeightsResponse",
    "LoraConfig",
    "ModelData",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "PromptAltTokens",
    "SampleResponse",
    "SampledSequence",
    "SamplingParams",
    "SaveWeightsResponse",
    "ServerCapabilities",
    "StopReason",
    "SupportedModel",
    "TopkLogprobs",
    "TopkRow",
    "as_datum",
    "as_datums",
    "as_model_input",
    "as_params",
    "datum",
    "with_column",
]

LossFnName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
LossFnType: TypeAlias = str
TensorDtype = Literal["float32", "int64"]
ModelID: TypeAlias = str


P = TypeVar("P", bound=msgspec.Struct)


def as_params(kind: type[P], value: Any) -> P:
    """Takes another library's parameters of the optimizer or of sampling, by their attributes.

    Args:
        kind: :class:`AdamParams` or :class:`SamplingParams`.
        value: one of these, which stays itself, or what has such attributes, such as the official
            SDK's.

    Returns:
        The same parameters; what ``value`` lacks has its default.

    Raises:
        DataError: it has none of them, or sets one that this client would not send.
    """
    if isinstance(value, kind):
        return value
    names = kind.__struct_fields__
    given = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if not given:
        raise DataError(f"{value!r:.80} has nothing of {kind.__name__}; pass one of mintjax's")
    others = {
        name: one
        for name, one in _all_fields(value).items()
        if name not in given and one is not None
    }
    if others:
        raise DataError(
            f"{type(value).__name__} sets {', '.join(sorted(others))}, which this client does not "
            f"send; it has {', '.join(names)}"
        )
    return kind(**given)


def _all_fields(value: Any) -> dict[str, Any]:
    if hasattr(value, "model_dump"):  # pydantic's
        return value.model_dump()
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    return dict(getattr(value, "__dict__", {}))


class AdamParams(msgspec.Struct, frozen=True, kw_only=True):
    """One AdamW step, with the update of ``torch.optim.AdamW``.

    Args:
        learning_rate: step size.
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of squared gradients.
        eps: added to the denominator, outside the square root.
        weight_decay: decoupled: each weight loses ``learning_rate * weight_decay`` of itself.
        grad_clip_norm: the largest global gradient norm, in the units of the gradient; 0 for none.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class LoraConfig(msgspec.Struct, frozen=True):
    """The low-rank adapters that a model is trained with.

    Args:
        rank: inner dimension of the two factors, at least 1.
        seed: of the adapters' initial values; the trainer chooses one if None.
        train_unembed: adapt the output projection.
        train_mlp: adapt the feed-forward layers.
        train_attn: adapt the attention projections.
    """

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class ForwardBackwardOutput(msgspec.Struct, kw_only=True, eq=False):
    """The result of a forward or forward-backward pass.

    Args:
        loss_fn_outputs: one dict of arrays per datum, in the order of the data; ``"logprobs"`` has
            the shape of that datum's ``target_tokens``, in nats.
        metrics: numbers by name. A trainer's own end in how they combine (``"loss:sum"``). A custom
            step has the objective's, the loss as ``"loss"`` and ``"loss:sum"``, and the trainer's
            sum as ``"surrogate_loss:sum"``.
        loss_fn_output_type: what the trainer calls its records.
    """

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    loss_fn_output_type: str = "ArrayRecord"

    @property
    def logprobs(self) -> list[npt.NDArray[np.float32]]:
        """The target tokens' log-probabilities: one float32 array per datum, in order.

        Raises:
            DataError: the trainer returned no logprobs for a datum.
        """
        try:
            return [output["logprobs"].view(np.ndarray) for output in self.loss_fn_outputs]
        except KeyError:
            lack = ["logprobs" not in output for output in self.loss_fn_outputs]
        raise DataError(
            "the trainer returned no logprobs", datum=lack.index(True), field="logprobs"
        )


Route = Literal["two_pass", "one_pass", "by_name", "server", "by_gradient"]
"""How a custom step reached the trainer: a forward and a backward pass; a backward pass alone, for
a gradient that does not depend on the logprobs; a loss of the trainer's own; a backward pass alone
with the objective itself, which the trainer runs as the graph that it was sent before; or requests
of the trainer's own that give the logprobs and take their gradient as it is, as hatchery has
them."""


class CustomStepOutput(ForwardBackwardOutput, kw_only=True, eq=False):
    """The result of a step with an objective, with its route and times.

    Args:
        metrics: the objective's, floats and arrays ``[B]``, and the trainer's.
        route: see :data:`Route`.
        forward_seconds: from the forward pass's sending to its result; 0 if there was none.
        client_seconds: for loss, gradient and the encoding of what carries it, here.
        backward_seconds: from the backward pass's sending to its result.
    """

    route: Route
    metrics: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    forward_seconds: float
    client_seconds: float
    backward_seconds: float


class OptimStepResponse(msgspec.Struct, kw_only=True):
    """The result of an optimizer step.

    Args:
        metrics: numbers by name, or None where the trainer reports none.
    """

    metrics: dict[str, float] | None = None


class SaveWeightsResponse(msgspec.Struct, kw_only=True):
    """The path of a saved checkpoint.

    Args:
        path: ``tinker://<model>/weights/<name>``, or ``.../sampler_weights/<name>``.
    """

    path: str


class LoadWeightsResponse(msgspec.Struct, kw_only=True):
    """The path of a loaded checkpoint.

    Args:
        path: the checkpoint's path, where the trainer repeats it.
    """

    path: str | None = None


class ModelData(msgspec.Struct, kw_only=True):
    """The description of a model.

    Args:
        model_name: the base model.
        arch: its architecture, where the trainer says so.
        tokenizer_id: the tokenizer that its token ids belong to.
    """

    model_name: str
    arch: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(msgspec.Struct, kw_only=True):
    """The trainer's description of one model in training.

    Args:
        model_id: the trainer's name of it.
        model_data: what it was made from.
        lora_rank: the rank of its adapters.
    """

    model_id: str
    model_data: ModelData
    lora_rank: int | None = None


class SupportedModel(msgspec.Struct, kw_only=True):
    """A base model that a trainer offers.

    Args:
        model_name: its name.
        max_context_length: in tokens, where the trainer says so.
    """

    model_name: str
    max_context_length: int | None = None


class ServerCapabilities(msgspec.Struct, kw_only=True):
    """The base models that a trainer offers.

    Args:
        supported_models: its base models.
    """

    supported_models: list[SupportedModel]


GetServerCapabilitiesResponse: TypeAlias = ServerCapabilities
SaveWeightsForSamplerResponse: TypeAlias = SaveWeightsResponse
Checkpoint: TypeAlias = runs.Checkpoint
CheckpointsListResponse: TypeAlias = runs.CheckpointsListResponse
CheckpointType: TypeAlias = runs.CheckpointType
Cursor: TypeAlias = runs.Cursor
GetSamplerResponse: TypeAlias = runs.GetSamplerResponse
GetSessionResponse: TypeAlias = runs.GetSessionResponse
ListSessionsResponse: TypeAlias = runs.ListSessionsResponse
ParsedCheckpointTinkerPath: TypeAlias = runs.ParsedCheckpointTinkerPath
TrainingRun: TypeAlias = runs.TrainingRun
TrainingRunsResponse: TypeAlias = runs.TrainingRunsResponse
WeightsInfoResponse: TypeAlias = runs.WeightsInfoResponse


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        raise missing("module 'mintjax.types'", name, NAMES)
