"""What a custom step sends: the forward pass, and the linear loss that carries its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.client.passes import check_finite
from mintjax.errors import APIResponseError, DataError
from mintjax.types import Datum, ForwardBackwardOutput, TensorData

LOSS_FN = "cross_entropy"
SENT = ("target_tokens", "weights")
"""The only inputs that travel; the objective sees them all."""


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """The datums with targets and weights only; weights are ones where there are none."""

    def one(datum: Datum) -> Datum:
        targets = datum.loss_fn_inputs["target_tokens"]
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:
            weights = TensorData.from_numpy(np.ones(targets.shape, np.float32))
        return Datum(datum.model_input, {"target_tokens": targets, "weights": weights})

    return [one(datum) for datum in data]


def logprobs(output: ForwardBackwardOutput) -> list[npt.NDArray[np.float32]]:
    """The forward pass's logprobs, one array per datum.

    Raises:
        APIResponseError: the trainer returned none for a datum.
    """
    try:
        return output.logprobs
    except DataError as error:
        words = str(error)
    raise APIResponseError(words)


def backward_data(data: Sequence[Datum], grads: Sequence[np.ndarray[Any, Any]]) -> list[Datum]:
    """The datums whose cross-entropy has the gradient of the objective.

    ``cross_entropy = -sum(weights * logprobs)``, so ``weights = -d objective / d logprobs``.

    Raises:
        NonFiniteError: a gradient is not finite, or is beyond float32.
    """
    result: list[Datum] = []
    for i, (datum, grad) in enumerate(zip(data, grads, strict=True)):
        weights = TensorData.from_numpy(np.negative(grad))
        check_finite(weights, i, "gradient")
        targets = datum.loss_fn_inputs["target_tokens"]
        result.append(Datum(datum.model_input, {"target_tokens": targets, "weights": weights}))
    return result
