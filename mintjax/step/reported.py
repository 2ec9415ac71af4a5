"""Holds the loss that a trainer reports against the sum of the losses that were sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError
from mintjax.types import Datum, ForwardBackwardOutput

_TOLERANCE = 1e-2  # of the sum of absolute values; logprobs may have been rounded to 16 bits

Floats = npt.NDArray[np.float64]


def returns_the_sum(
    loss_fn: str,
    data: Sequence[Datum],
    output: ForwardBackwardOutput,
    config: Mapping[str, Any] | None = None,
) -> bool | None:
    """Tells whether a pass reports, as ``loss:sum``, the sum of the losses of its tokens.

    Args:
        loss_fn: the trainer's loss.
        data: what was sent; weights beside advantages are all 1.
        output: what came back. The losses are computed from its logprobs.
        config: the hyperparameters that were sent.

    Returns:
        None where the trainer reports no ``loss:sum``, or the losses are not known here.
    """
    reported = output.metrics.get("loss:sum")
    formula = _FORMULAS.get(loss_fn)
    if reported is None or formula is None:
        return None
    try:
        logprobs = _joined(output.logprobs)
    except DataError:
        return None
    inputs = [datum.loss_fn_inputs for datum in data]
    try:
        columns = {name: _joined([one[name] for one in inputs]) for name in _READS[loss_fn]}
    except KeyError:
        return None
    if any(column.shape != logprobs.shape for column in columns.values()):
        return None
    with np.errstate(all="ignore"):
        losses = formula(logprobs, columns, config or {})
        size = np.abs(losses).sum()
        return bool(abs(reported - losses.sum()) <= _TOLERANCE * size + 1e-6)


def _joined(rows: Sequence[npt.NDArray[Any]]) -> Floats:
    return np.concatenate([row.ravel() for row in rows]).astype(np.float64)


Formula = Callable[[Floats, Mapping[str, Floats], Mapping[str, float]], Floats]


def _ratio(logprobs: Floats, columns: Mapping[str, Floats]) -> Floats:
    return np.exp(logprobs - columns["logprobs"])


def _cross_entropy(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, float]
) -> Floats:
    return -columns["weights"] * logprobs


def _importance_sampling(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, float]
) -> Floats:
    return -_ratio(logprobs, columns) * columns["advantages"]


_FORMULAS: dict[str, Formula] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
}
_SAMPLED = ("logprobs", "advantages")
_READS = {"cross_entropy": ("weights",), "importance_sampling": _SAMPLED}
