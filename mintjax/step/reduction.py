"""The divisors of token losses that a trainer applies before it accumulates a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Unit: TypeAlias = Literal["weights", "tokens", "weighted_tokens", "datums", "sequences"]
"""What is counted: the sum of the weights; all tokens; the tokens whose weight is not 0; the
datums; the datums of which some weight is not 0."""

_INDEPENDENT_OF_WEIGHTS = (None, "datums", "tokens")


@dataclass(frozen=True, init=False)
class Reduction:
    """The divisors that a trainer applies to the sum of token losses; none, if no field is given.

    The gradient that an optimizer step uses is, over requests ``r`` since the step before it,
    datums ``i`` and tokens ``t``::

        sum_r sum_i sum_t d loss[t] / (per_sequence[i] * per_request[r] * per_step)

    Args:
        per_sequence: the amount by which each datum's loss is divided: ``"weights"`` (True means
            this), ``"tokens"`` or ``"weighted_tokens"`` of the datum.
        over_datums: the same as ``per_step="datums"``.
        per_request: the amount in a whole request by which its gradient is divided.
        per_step: the amount in all requests since the last optimizer step by which the gradient
            is divided.

    Example:
        >>> Reduction(per_sequence="weights", per_step="datums")  # SkyRL's JAX backend
        Reduction(per_sequence='weights', per_request=None, per_step='datums')
        >>> Reduction().sums  # Tinker, MinT
        True
    """

    per_sequence: Unit | None
    per_request: Unit | None
    per_step: Unit | None

    def __init__(
        self,
        per_sequence: Unit | bool | None = None,
        over_datums: bool = False,
        *,
        per_request: Unit | None = None,
        per_step: Unit | None = None,
    ) -> None:
        sequence = "weights" if per_sequence is True else per_sequence or None
        step = per_step or ("datums" if over_datums else None)
        for name, value in (
            ("per_sequence", sequence),
            ("per_request", per_request),
            ("per_step", step),
        ):
            object.__setattr__(self, name, value)

    @property
    def over_datums(self) -> bool:
        """Tells whether a gradient is divided by the number of datums since the optimizer step."""
        return self.per_step == "datums"

    @property
    def sums(self) -> bool:
        """Tells whether nothing is divided: the loss of a request is the sum over its tokens."""
        return self.per_sequence is None and self.per_request is None and self.per_step is None

    @property
    def loss_fn(self) -> str:
        """The loss whose data carry a gradient to this trainer.

        ``"cross_entropy"`` carries it in the weights, so it serves where no divisor depends on
        the weights; else ``"importance_sampling"`` carries it in the advantages.
        """
        units = (self.per_sequence, self.per_request, self.per_step)
        free = all(unit in _INDEPENDENT_OF_WEIGHTS for unit in units)
        return "cross_entropy" if free else "importance_sampling"

    def __str__(self) -> str:
        places: list[tuple[Unit | None, str]] = [
            (self.per_sequence, "the sequence"),
            (self.per_request, "the request"),
            (self.per_step, "all requests since the optimizer step"),
        ]
        divisors = [f"{_WORDS[unit]} of {where}" for unit, where in places if unit is not None]
        return "the sum, divided by " + " and by ".join(divisors) if divisors else "the sum"


SUM = Reduction()
"""What Tinker, MinT and the embedded trainer do."""

_UNITS: tuple[Unit, ...] = get_args(Unit)
_UNITS_OF_A_DATUM: tuple[Unit, ...] = ("weights", "tokens", "weighted_tokens")

MEMBERS = tuple(
    Reduction(sequence, per_request=request, per_step=step)
    for sequence, request, step in itertools.product(
        (None, *_UNITS_OF_A_DATUM), (None, *_UNITS), (None, *_UNITS)
    )
)
"""All reductions that are known here: every product of the divisors."""

_WORDS: dict[Unit, str] = {
    "weights": "the sum of weights",
    "tokens": "the number of tokens",
    "weighted_tokens": "the number of tokens with a weight other than 0",
    "datums": "the number of datums",
    "sequences": "the number of datums with a weight other than 0",
}


def amount(unit: Unit | None, weights: Sequence[npt.NDArray[Any]]) -> float:
    """Counts a unit in some datums.

    Args:
        unit: what to count; None counts 1.
        weights: of each datum, ``[T]`` or ``[T, K]``.

    Returns:
        The amount, without any floor that a trainer may put below it.
    """
    match unit:
        case None:
            return 1.0
        case "datums":
            return float(len(weights))
        case "sequences":
            return float(sum(bool(np.any(row)) for row in weights))
        case "tokens":
            return float(sum(len(row) for row in weights))
        case "weighted_tokens":
            return float(sum(np.count_nonzero(row) for row in weights))
        case "weights":
            return float(sum(row.sum(dtype=np.float64) for row in weights))


def divisors(
    reduction: Reduction, requests: Sequence[Sequence[npt.NDArray[Any]]]
) -> list[list[float]]:
    """Computes the number by which each datum's loss is divided, in all.

    Args:
        reduction: of the trainer.
        requests: the weights of each datum, by request, of all requests between two optimizer
            steps.

    Returns:
        One number per datum, by request, without any floor that a trainer may put below it.
    """
    step = amount(reduction.per_step, [row for request in requests for row in request])
    return [
        [
            step * amount(reduction.per_request, request) * amount(reduction.per_sequence, [row])
            for row in request
        ]
        for request in requests
    ]
