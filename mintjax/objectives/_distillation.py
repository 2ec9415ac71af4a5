"""Losses over ``[T, K]`` candidates as objectives."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from mintjax import losses
from mintjax.errors import DataError
from mintjax.objectives._base import Array, LossObjective, objective, on_tokens, static, token_mask
from mintjax.objectives._reduce import Aggregation, aggregate
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch


class CandidateObjective(LossObjective):
    """What the losses over candidates share.

    Reads a column of the candidates' shape and, if there are any, ``weights`` as a mask: of
    candidates where they are ``[T, K]``, of positions where ``[T]``. Metric: ``mean``, the loss per
    position.
    """

    aggregation: Aggregation
    reads: ClassVar[str]

    def position_losses(self, target: Array, given: Array, where: Array) -> Array:
        """The loss of each position: ``[..., K]`` to ``[...]``."""
        raise NotImplementedError

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The loss, and its metric.

        Raises:
            DataError: the logprobs have no axis of candidates.
        """
        if not logprobs.trailing_shape:
            raise DataError(
                f"{type(self).__name__} needs [T, K] logprobs, of K candidates at every position; "
                "these are [T]. Give target_tokens of shape [T, K].",
                field="target_tokens",
            )
        given = on_tokens(self.column(data, self.reads), logprobs)
        where = token_mask(data, logprobs)
        values = self.position_losses(logprobs.tiles, given, where)
        positions = jnp.any(where, axis=-1)
        mean = losses.token_mean(jax.lax.stop_gradient(values), where=positions)
        return aggregate(values, positions, logprobs, self.aggregation), {"mean": mean}


@objective
class distillation_forward_kl(CandidateObjective):
    """:func:`mintjax.losses.distillation_forward_kl` over a batch; reads ``teacher_logprobs``.

    Args:
        renormalise: make the candidates' probabilities sum to 1 first.
        aggregation: how positions' losses become one.
    """

    renormalise: bool = static(default=False)
    aggregation: Aggregation = static(default="sum")
    reads: ClassVar[str] = "teacher_logprobs"

    def position_losses(self, target: Array, given: Array, where: Array) -> Array:
        """KL(teacher || student)."""
        return losses.distillation_forward_kl(
            target, given, renormalise=self.renormalise, where=where
        )


@objective
class distillation_reverse_kl(CandidateObjective):
    """:func:`mintjax.losses.distillation_reverse_kl` over a batch; reads ``teacher_logprobs``.

    Args:
        renormalise: make the candidates' probabilities sum to 1 first.
        aggregation: how positions' losses become one.
    """

    renormalise: bool = static(default=False)
    aggregation: Aggregation = static(default="sum")
    reads: ClassVar[str] = "teacher_logprobs"

    def position_losses(self, target: Array, given: Array, where: Array) -> Array:
        """KL(student || teacher)."""
        return losses.distillation_reverse_kl(
            target, given, renormalise=self.renormalise, where=where
        )


@objective
class brier_score(CandidateObjective):
    """:func:`mintjax.losses.brier_score` over a batch; reads ``outcomes``.

    Args:
        renormalise: make the answers' probabilities sum to 1 first.
        aggregation: how positions' scores become one.
    """

    renormalise: bool = static(default=False)
    aggregation: Aggregation = static(default="sum")
    reads: ClassVar[str] = "outcomes"

    def position_losses(self, target: Array, given: Array, where: Array) -> Array:
        """``sum_k (p_k - y_k)**2``."""
        return losses.brier_score(target, given, renormalise=self.renormalise, where=where)
