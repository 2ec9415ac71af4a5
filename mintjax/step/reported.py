"""Holds the loss that a trainer reports against the sum of the losses that were sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError
from mintjax.types import Datum, ForwardBackwardOutput

_TOLERANCE = 1e-2  # of the sum of absolute values; logprobs may have been rounded to 16 bits
_ROUNDING = 2.0**-8  # of a logprob, in 16 bits
_LEAST = 1e-6  # error of a logprob near 0, in nats

Floats = npt.NDArray[np.float64]


def returns_the_sum(
    loss_fn: str,
    data: Sequence[Datum],
    output: ForwardBackwardOutput,
    config: Mapping[str, Any] | None = None,
) -> bool | None:
    """Tells whether a pass reports the sum of the losses of its tokens.

    Args:
        loss_fn: the trainer's loss.
        data: what was sent; weights beside advantages are all 1.
        output: what came back. The losses are computed from its logprobs.
        config: the hyperparameters that were sent.

    Returns:
        None where the trainer reports no loss, or the losses are not known here.
    """
    reported = reported_sum(output)
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
        losses, slopes = formula(logprobs, columns, config or {})
        room = _TOLERANCE * np.abs(losses).sum()
        room += (np.abs(slopes) * (_ROUNDING * np.abs(logprobs) + _LEAST)).sum()
        return bool(abs(reported - losses.sum()) <= room)


def reported_sum(output: ForwardBackwardOutput) -> float | None:
    """Reads the loss that a pass reports.

    Returns:
        ``loss:sum``, else the sum of each token's ``elementwise_loss``, which SkyRL returns; None
        where there is neither.
    """
    if "loss:sum" in output.metrics:
        return output.metrics["loss:sum"]
    rows = [one.get("elementwise_loss") for one in output.loss_fn_outputs]
    if not rows or any(row is None for row in rows):
        return None
    return float(sum(np.asarray(row, np.float64).sum() for row in rows))


def _joined(rows: Sequence[npt.NDArray[Any]]) -> Floats:
    return np.concatenate([row.ravel() for row in rows]).astype(np.float64)


Formula = Callable[[Floats, Mapping[str, Floats], Mapping[str, Any]], tuple[Floats, Floats]]
"""Computes the loss of each token, and by how much it moves with the logprob at most."""


def _ratio(logprobs: Floats, columns: Mapping[str, Floats]) -> Floats:
    return np.exp(logprobs - columns["logprobs"])


def _clipped(ratio: Floats, config: Mapping[str, Any]) -> Floats:
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    return np.clip(ratio, low, high)


def _cross_entropy(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, Any]
) -> tuple[Floats, Floats]:
    return -columns["weights"] * logprobs, columns["weights"]


def _importance_sampling(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, Any]
) -> tuple[Floats, Floats]:
    losses = -_ratio(logprobs, columns) * columns["advantages"]
    return losses, losses


def _ppo(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, Any]
) -> tuple[Floats, Floats]:
    ratio, advantages = _ratio(logprobs, columns), columns["advantages"]
    losses = -np.minimum(ratio * advantages, _clipped(ratio, config) * advantages)
    return losses, losses


def _cispo(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, Any]
) -> tuple[Floats, Floats]:
    slopes = -_clipped(_ratio(logprobs, columns), config) * columns["advantages"]
    losses = slopes * logprobs
    return losses, np.abs(slopes) + np.abs(losses)  # the clipped ratio moves, too


def _dro(
    logprobs: Floats, columns: Mapping[str, Floats], config: Mapping[str, Any]
) -> tuple[Floats, Floats]:
    beta, drift = config.get("beta", 0.05), logprobs - columns["logprobs"]
    losses = -logprobs * columns["advantages"] + 0.5 * beta * drift**2
    return losses, np.abs(columns["advantages"]) + beta * np.abs(drift)


_FORMULAS: dict[str, Formula] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
}
_SAMPLED = ("logprobs", "advantages")
_READS = {name: ("weights",) if name == "cross_entropy" else _SAMPLED for name in _FORMULAS}
