"""How a gradient with respect to logprobs travels: as the data of a loss that has that gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.step.reduction import Reduction
from mintjax.tensors import TensorData
from mintjax.types import Datum

SENT = ("target_tokens", "weights")
"""The only inputs that travel in a custom step; the objective sees them all."""


FORWARD_LOSS_FN = "cross_entropy"
"""The loss that a forward pass is asked for; only its logprobs are used."""


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """What a forward pass needs: targets, and weights, ones where there are none.

    Args:
        data: the datums, each with ``target_tokens``.

    Returns:
        New datums with these two inputs only.
    """

    def one(datum: Datum) -> Datum:
        targets = datum.loss_fn_inputs["target_tokens"]
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:
            weights = TensorData.from_numpy(np.ones(targets.shape, np.float32))
        return Datum(datum.model_input, {"target_tokens": targets, "weights": weights})

    return [one(datum) for datum in data]


def carrier(
    reduction: Reduction,
    data: Sequence[Datum],
    logprobs: Sequence[npt.NDArray[Any]] | None,
    grads: Sequence[npt.NDArray[Any]],
    datums: int,
) -> list[Datum]:
    """Datums for which the trainer's ``reduction.loss_fn`` has the given gradient.

    Where the trainer sums, ``cross_entropy = -sum(weights * lp)`` with ``weights = -grad``. Where
    it divides by the sum of weights, a cross-entropy would be rescaled by its own message. There
    ``importance_sampling = -sum(exp(lp - q) * A)``, taken at ``q = lp``, where the ratio is 1 and
    its gradient ``-A``, carries ``A = -grad * T``, and weights of one make the divisor ``T``.
    A mean over datums is undone by a factor of their number.

    Args:
        reduction: the trainer's.
        data: the datums; ``target_tokens`` is read.
        logprobs: of the targets under the model as it is, in nats; needed where the trainer
            divides by the sum of weights.
        grads: ``d loss / d logprobs``, in the shape of ``target_tokens``.
        datums: how many datums are accumulated before the optimizer step, these among them.

    Returns:
        New datums with the inputs of ``reduction.loss_fn``.
    """
    scale = datums if reduction.over_datums else 1
    result: list[Datum] = []
    for i, (datum, grad) in enumerate(zip(data, grads, strict=True)):
        targets = datum.loss_fn_inputs["target_tokens"]
        inputs = {"target_tokens": targets}
        if reduction.per_sequence:
            assert logprobs is not None
            inputs["weights"] = TensorData.from_numpy(np.ones(targets.shape, np.float32))
            inputs["logprobs"] = TensorData.from_numpy(logprobs[i])
            inputs["advantages"] = TensorData.from_numpy(grad * -float(scale * targets.size))
        else:
            inputs["weights"] = TensorData.from_numpy(
                np.negative(grad) if scale == 1 else grad * -float(scale)
            )
        result.append(Datum(datum.model_input, inputs))
    return result
