"""The methods of a trainer that the bridge uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mintjax.types import AdamParams, Datum, ForwardBackwardOutput


class Trainer(Protocol):
    """A model that trains elsewhere: a forward pass, and a backward pass.

    Both block. It must be hashable, by identity as a rule: versions are counted for each. Where it
    has an attribute ``changes``, a count of what has changed its model or what accumulates there, a
    change that did not go through the bridge makes params and gradients stale.
    """

    def logprobs(self, data: Sequence[Datum]) -> Sequence[npt.NDArray[np.float32]]:
        """Computes the log-probabilities of the target tokens, in nats; the model stays as it is.

        Args:
            data: at least one datum, each with ``target_tokens``.

        Returns:
            One array per datum, in order, of the shape of its ``target_tokens``.
        """
        ...

    def backward(
        self,
        data: Sequence[Datum],
        logprobs: Sequence[npt.NDArray[np.float32]],
        grads: Sequence[npt.NDArray[np.float32]],
    ) -> ForwardBackwardOutput:
        """Accumulates ``sum(grads * d logprobs / d weights)``, however it is sent.

        Args:
            data: as :meth:`logprobs` had it.
            logprobs: what that returned.
            grads: the derivative of the loss by each of them, finite, in their shapes.

        Returns:
            The backward pass's output.
        """
        ...


class Step(Protocol):
    """An optimizer step under way."""

    def result(self) -> Any:
        """Waits until it is done."""
        ...


class Optimizer(Protocol):
    """A trainer's optimizer."""

    def optim_step(self, adam_params: AdamParams, /) -> Step:
        """Updates the weights with what has accumulated, and forgets that."""
        ...
