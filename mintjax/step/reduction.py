"""What a trainer makes of the losses of tokens before it accumulates their gradient."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reduction:
    """What a trainer makes of the tokens' losses before it accumulates their gradient.

    Args:
        per_sequence: it divides each datum's loss by the sum of its ``weights``.
        over_datums: it divides the gradient by the number of datums accumulated before the
            optimizer step.
    """

    per_sequence: bool = False
    over_datums: bool = False

    @property
    def sums(self) -> bool:
        """Whether it does neither: the loss of a request is the sum over its tokens."""
        return not (self.per_sequence or self.over_datums)

    @property
    def loss_fn(self) -> str:
        """The loss whose data carry a gradient to this trainer."""
        return "importance_sampling" if self.per_sequence else "cross_entropy"


SUM = Reduction()
"""What Tinker, MinT and the embedded trainer do."""
