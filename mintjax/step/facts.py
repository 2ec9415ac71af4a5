"""Keeps the facts that the client has found out about a trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from mintjax.step.reduction import Reduction


@dataclass
class TrainerFacts:
    """Holds what one connection has found out about its trainer.

    Args:
        reduction: what it divides losses by, once that is known.
        is_said: somebody says that: the user, the trainer itself, or its documentation. It then
            holds for all losses; a measurement is of those alone that carry gradients.
        is_contradicted: a result has contradicted what the trainer or its documentation says.
        measured: the reduction, where it was measured on this connection.
        outages: how often the trainer had been away when something was last measured.
        takes_gradients: it has requests of its own that take the gradient of logprobs as it is.
            None where nobody has asked yet.
        gradients_tried: this was tried on a throwaway model.
        unknown: why that cannot be told, if it was measured in vain.
        sums_reported: the trainer reports the sum of what was sent, as ``loss:sum``, so that a
            report of something else is a contradiction. None where nobody has looked yet.
        refused: losses that it does not serve by name.
        served: losses that it has served by name.
        told: what the user was told once, by a word for it.
    """

    reduction: Reduction | None = None
    is_said: bool = False
    is_contradicted: bool = False
    measured: Reduction | None = None
    outages: int = 0
    takes_gradients: bool | None = None
    gradients_tried: bool = False
    unknown: str | None = None
    sums_reported: bool | None = None
    refused: set[str] = field(default_factory=set[str])
    served: set[str] = field(default_factory=set[str])
    told: set[str] = field(default_factory=set[str])
