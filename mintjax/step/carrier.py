"""Carries a gradient with respect to logprobs, as the data of a loss that has that gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError
from mintjax.step.reduction import Reduction, divisors
from mintjax.tensors import TensorData
from mintjax.types import Datum

FORWARD_LOSS_FN = "cross_entropy"
"""The loss that a forward pass is asked for; only its logprobs are used."""


def forward_data(data: Sequence[Datum]) -> list[Datum]:
    """Makes the data of a forward pass: targets, and weights of one.

    The user's own weights stay here, because a forward pass needs none and a trainer may refuse
    their shape.

    Args:
        data: the datums, each with ``target_tokens``.

    Returns:
        New datums with these two inputs only.
    """

    def one(datum: Datum) -> Datum:
        targets = datum.loss_fn_inputs["target_tokens"]
        return Datum(datum.model_input, {"target_tokens": targets, "weights": _ones(targets)})

    return [one(datum) for datum in data]


def carrier(
    reduction: Reduction,
    data: Sequence[Datum],
    logprobs: Sequence[npt.NDArray[Any]] | None,
    grads: Sequence[npt.NDArray[Any]],
    datums_in_step: int,
    sizes: Sequence[int] | None = None,
) -> list[Datum]:
    """Makes datums for which the trainer's ``reduction.loss_fn`` has the given gradient.

    Every divisor of the trainer is undone by a factor. Where no divisor depends on the weights,
    ``cross_entropy = -sum(weights * lp)`` carries ``weights = -grad * factor``. Elsewhere a
    cross-entropy would be divided by an amount of its own message. There
    ``importance_sampling = -sum(exp(lp - q) * A)`` is taken at ``q = lp``, where the ratio is 1
    and the gradient is ``-A``. It carries ``A = -grad * factor``, and weights of one make the
    divisors known.

    Args:
        reduction: the trainer's.
        data: the datums; ``target_tokens`` is read.
        logprobs: of the targets under the model as it is, in nats; needed for
            ``importance_sampling`` only.
        grads: ``d loss / d logprobs``, in the shape of ``target_tokens``.
        datums_in_step: how many datums are accumulated before the optimizer step, these included.
        sizes: how many of the datums each request takes, in order; one request takes all if None.
            They matter only where the trainer divides by an amount of a request.

    Returns:
        New datums with the inputs of ``reduction.loss_fn``.

    Raises:
        DataError: no factor is known to undo the divisors; the message says why.
    """
    targets = [datum.loss_fn_inputs["target_tokens"] for datum in data]
    factors = _factors(reduction, targets, datums_in_step, sizes or [len(targets)])
    result: list[Datum] = []
    for i, (datum, grad) in enumerate(zip(data, grads, strict=True)):
        carried = TensorData.from_numpy(np.asarray(grad, np.float32) * np.float32(-factors[i]))
        inputs = {"target_tokens": targets[i]}
        if reduction.loss_fn == "cross_entropy":
            inputs["weights"] = carried
        else:
            assert logprobs is not None
            inputs["weights"] = _ones(targets[i])
            inputs["logprobs"] = TensorData.from_numpy(logprobs[i])
            inputs["advantages"] = carried
        result.append(Datum(datum.model_input, inputs))
    return result


def _factors(
    reduction: Reduction,
    targets: Sequence[npt.NDArray[Any]],
    datums_in_step: int,
    sizes: Sequence[int],
) -> list[float]:
    """Computes the factor of each datum's gradient."""
    units = {reduction.per_sequence, reduction.per_request, reduction.per_step}
    wide = next((i for i, row in enumerate(targets) if row.ndim > 1), None)
    if "tokens" in units and wide is not None:
        raise DataError(
            "this trainer divides by the number of tokens; with several candidates at each token, "
            "it is not known what it counts. Use targets of shape [T]",
            datum=wide,
            field="target_tokens",
        )
    others = datums_in_step - len(targets)
    if others and reduction.per_step not in (None, "datums"):
        raise DataError(
            f"this trainer divides by {reduction.per_step} of all requests since the optimizer "
            "step, which are not known beforehand. Send one custom step before each optimizer "
            "step",
            field="datums_in_step",
        )
    weights = iter([np.ones(row.shape, np.float32) for row in targets])
    requests = [list(itertools.islice(weights, size)) for size in sizes]
    factors = list(itertools.chain.from_iterable(divisors(reduction, requests)))
    if others and reduction.per_step == "datums":
        factors = [factor / len(targets) * datums_in_step for factor in factors]
    return factors


def _ones(targets: npt.NDArray[Any]) -> TensorData:
    return TensorData.from_numpy(np.ones(targets.shape, np.float32))
