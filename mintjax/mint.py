"""The requests that MinT serves beyond the common protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from mintjax.client.futures import APIFuture
from mintjax.client.service import ServiceClient
from mintjax.client.training import TrainingClient
from mintjax.errors import DataError
from mintjax.tensors import TensorData, check_finite, to_tensor
from mintjax.types import ModelInput, as_model_input


class ReverseKLDatum(msgspec.Struct, frozen=True, eq=False):
    """One example of on-policy distillation; columns are taken as :class:`mintjax.Datum` does.

    Args:
        student_input: T tokens, as the model being trained reads them.
        reference_input: T tokens, as the reference model reads them.
        target_tokens: int64, shape ``[T]``: the token that follows each.
        weights: float32, shape ``[T]``.
    """

    student_input: ModelInput
    reference_input: ModelInput
    target_tokens: TensorData
    weights: TensorData

    def __post_init__(self) -> None:
        for name in ("student_input", "reference_input"):
            taken = as_model_input(getattr(self, name))
            msgspec.structs.force_setattr(self, name, taken)
        for name in ("target_tokens", "weights"):
            msgspec.structs.force_setattr(self, name, to_tensor(name, getattr(self, name)))


class ReverseKLLoss(msgspec.Struct, eq=False):
    """The loss of one datum.

    Args:
        loss: in nats.
    """

    loss: TensorData


class ReverseKLOutput(msgspec.Struct, eq=False):
    """The result of :func:`forward_backward_reverse_kl`.

    Args:
        outputs: one per datum, in order.
        metrics: MinT's own.
    """

    outputs: list[ReverseKLLoss]
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])


class InterpolatedCheckpoint(msgspec.Struct):
    """The path of a mixture of checkpoints.

    Args:
        path: a sampler checkpoint's.
    """

    path: str


class _ReverseKLRequest(msgspec.Struct):
    model_id: str
    reference_model_path: str
    data: list[ReverseKLDatum]
    temperature: float
    seq_id: int | None = None
    type: str = "mint_forward_backward_reverse_kl"


class _InterpolateRequest(msgspec.Struct):
    source_paths: list[str]
    coefficients: list[float]
    output_path: str | None
    output_checkpoint_type: str = "sampler"
    type: str = "mint_interpolate_checkpoints"


def forward_backward_reverse_kl(
    training_client: TrainingClient,
    data: Sequence[ReverseKLDatum],
    reference_model_path: str,
    temperature: float = 1.0,
) -> APIFuture[ReverseKLOutput]:
    """Adds the gradient of the KL divergence from a reference model, over the whole vocabulary.

    Args:
        training_client: the model being trained.
        data: at least one datum.
        reference_model_path: a sampler checkpoint.
        temperature: divides both models' logits.

    Returns:
        A future of the losses, in nats, and MinT's metrics.

    Raises:
        DataError: the data cannot be used; nothing was sent.
        NonFiniteError: a weight is not finite; nothing was sent.
    """
    if not data:
        raise DataError("there is no datum; pass at least one")
    if not (math.isfinite(temperature) and temperature > 0):
        raise DataError(f"{temperature}; it must be above 0", field="temperature")
    for i, datum in enumerate(data):
        check_finite(datum.weights, i, "input 'weights'")
        lengths = {datum.student_input.length, datum.reference_input.length}
        if (
            lengths != {datum.target_tokens.size}
            or datum.weights.shape != datum.target_tokens.shape
        ):
            raise DataError("inputs, targets and weights must be equally long", datum=i)
    return training_client.submit(
        "mint/forward_backward_reverse_kl",
        _ReverseKLRequest(training_client.model_id, reference_model_path, list(data), temperature),
        ReverseKLOutput,
        mutates=True,
    )


def interpolate_checkpoints(
    service_client: ServiceClient,
    source_paths: Sequence[str],
    coefficients: Sequence[float],
    output_path: str | None = None,
) -> APIFuture[InterpolatedCheckpoint]:
    """Mixes sampler checkpoints: ``sum_i coefficients[i] * source_paths[i]``.

    Args:
        service_client: a session with MinT.
        source_paths: at least one sampler checkpoint.
        coefficients: one finite number for each.
        output_path: a name for the result; MinT chooses one if None.

    Returns:
        A future of the result's path.

    Raises:
        DataError: there is not one finite coefficient for each path.
    """
    finite = all(math.isfinite(coefficient) for coefficient in coefficients)
    if not source_paths or len(source_paths) != len(coefficients) or not finite:
        raise DataError("it needs one finite number for each path", field="coefficients")
    request = _InterpolateRequest(list(source_paths), list(coefficients), output_path)
    return service_client.submit("mint/checkpoints/interpolate", request, InterpolatedCheckpoint)
