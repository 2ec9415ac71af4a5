"""Keeps the facts that the client has found out about a trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from mintjax.step.reduction import Reduction


@dataclass
class TrainerFacts:
    """Holds what one connection has found out about its trainer.

    Args:
        reduction: what it divides losses by, once that is known.
        takes_gradients: it has requests of its own that take the gradient of logprobs as it is.
            None where nobody has asked yet.
        unknown: why that cannot be told, if it was measured in vain.
        sums_reported: the trainer reports the sum of what was sent, as ``loss:sum``, so that a
            report of something else is a contradiction. None where nobody has looked yet.
        refused: losses that it does not serve by name.
        served: losses that it has served by name.
    """

    reduction: Reduction | None = None
    takes_gradients: bool | None = None
    unknown: str | None = None
    sums_reported: bool | None = None
    refused: set[str] = field(default_factory=set[str])
    served: set[str] = field(default_factory=set[str])
