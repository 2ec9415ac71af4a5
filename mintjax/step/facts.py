"""Keeps the facts that the client has found out about a trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from mintjax.step.reduction import Reduction


@dataclass
class TrainerFacts:
    """Holds what one connection has found out about its trainer.

    Args:
        reduction: what it divides losses by, once that is known.
        refused: losses that it does not serve by name.
        served: losses that it has served by name.
        warned: whether the user was warned that nothing was measured.
    """

    reduction: Reduction | None = None
    refused: set[str] = field(default_factory=set[str])
    served: set[str] = field(default_factory=set[str])
    warned: bool = False
