"""Regularisers as objectives: every token of every datum pays, with a true gradient."""

from __future__ import annotations

from typing import ClassVar

import jax

from mintjax import losses
from mintjax.objectives._base import Array, LossObjective, objective, on_tokens, static, token_mask
from mintjax.objectives._reduce import Aggregation, aggregate
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch


class PenaltyObjective(LossObjective):
    """What the regularisers share.

    Reads ``ref_logprobs`` and, if there are any, ``weights`` as a mask. Metric: ``mean``, the
    penalty per token.
    """

    aggregation: Aggregation
    needs_reference: ClassVar[bool] = True

    def token_losses(self, target: Array, reference: Array, where: Array) -> Array:
        """The penalty of each token; all arguments have one shape."""
        raise NotImplementedError

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The penalty, and its metric."""
        tiles = logprobs.tiles
        reference = tiles
        if self.needs_reference:
            reference = on_tokens(self.column(data, "ref_logprobs"), logprobs)
        where = token_mask(data, logprobs)
        values = self.token_losses(tiles, reference, where)
        mean = losses.token_mean(jax.lax.stop_gradient(values), where=where)
        return aggregate(values, where, logprobs, self.aggregation), {"mean": mean}


@objective
class kl_k1(PenaltyObjective):
    """:func:`mintjax.losses.kl_k1` over a batch.

    Args:
        aggregation: how tokens' penalties become one.
    """

    aggregation: Aggregation = static(default="sum")

    def token_losses(self, target: Array, reference: Array, where: Array) -> Array:
        """``lp - ref``."""
        return losses.kl_k1(target, reference, where=where)


@objective
class kl_k2(PenaltyObjective):
    """:func:`mintjax.losses.kl_k2` over a batch.

    Args:
        aggregation: how tokens' penalties become one.
    """

    aggregation: Aggregation = static(default="sum")

    def token_losses(self, target: Array, reference: Array, where: Array) -> Array:
        """``(lp - ref)**2 / 2``."""
        return losses.kl_k2(target, reference, where=where)


@objective
class kl_k3(PenaltyObjective):
    """:func:`mintjax.losses.kl_k3` over a batch.

    Args:
        aggregation: how tokens' penalties become one.
    """

    aggregation: Aggregation = static(default="sum")

    def token_losses(self, target: Array, reference: Array, where: Array) -> Array:
        """``exp(d) - 1 - d``, ``d = ref - lp``."""
        return losses.kl_k3(target, reference, where=where)


@objective
class l2_to_reference(PenaltyObjective):
    """:func:`mintjax.losses.l2_to_reference` over a batch.

    Args:
        aggregation: how tokens' penalties become one.
    """

    aggregation: Aggregation = static(default="sum")

    def token_losses(self, target: Array, reference: Array, where: Array) -> Array:
        """``(lp - ref)**2``."""
        return losses.l2_to_reference(target, reference, where=where)


@objective
class sampled_entropy(PenaltyObjective):
    """:func:`mintjax.losses.sampled_entropy` over a batch: an estimate, to watch.

    Reads no ``ref_logprobs``. See the function for what its gradient does not do.

    Args:
        aggregation: how tokens' estimates become one.
    """

    aggregation: Aggregation = static(default="sum")
    needs_reference: ClassVar[bool] = False

    def token_losses(self, target: Array, reference: Array, where: Array) -> Array:
        """``-lp``."""
        return losses.sampled_entropy(target, where=where)
