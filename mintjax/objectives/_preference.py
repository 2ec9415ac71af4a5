"""Preference losses as objectives: scores of whole datums, in pairs or by label."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mintjax import losses
from mintjax.errors import DataError
from mintjax.objectives._base import Array, LossObjective, objective, static
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch


class SequenceObjective(LossObjective):
    """What the losses share that score each datum by ``dot(logprobs, weights)``."""

    def scores(self, data: Batch, logprobs: Ragged) -> Array:
        """The weighted sum of each datum's logprobs, ``[B]``; a weight of 0 hides what it meets."""
        weights = self.column(data, "weights")
        return -logprobs.map(losses.cross_entropy, weights).sum()

    def gains(self, data: Batch, logprobs: Ragged) -> Array:
        """The same of what the logprobs gained over the column ``ref_logprobs``."""
        return self.scores(data, logprobs - self.column(data, "ref_logprobs"))

    def lengths(self, data: Batch, logprobs: Ragged) -> Array:
        """How many of each datum's tokens have a weight other than 0, ``[B]``."""
        return logprobs.count(where=self.column(data, "weights") != 0)


class PairObjective(SequenceObjective):
    """A mean over pairs: datums 0 and 1, 2 and 3, ... are a chosen and a rejected answer.

    Reads ``weights``: 1 on the tokens of the answer, 0 on those of the prompt. Metrics:
    ``pair_accuracy``, ``mean_margin``, ``mean_chosen`` and ``mean_rejected``, of what the loss
    compares (see :meth:`rewards`).
    """

    row_multiple: ClassVar[int | None] = 2

    def rewards(self, data: Batch, logprobs: Ragged) -> Array:
        """What is compared within a pair, for the metrics: ``[B]``."""
        return self.scores(data, logprobs)

    def pair_losses(self, data: Batch, logprobs: Ragged, where: Array) -> Array:
        """The loss of each pair, ``[P]``; 0 where there is none."""
        raise NotImplementedError

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The mean loss, and its metrics.

        Raises:
            DataError: an odd number of datums.
        """
        if len(data) % 2:
            raise DataError(
                f"{type(self).__name__} needs pairs, chosen, rejected, chosen, rejected, ..., but "
                f"there are {len(data)} datums; the last one has no partner"
            )
        where = logprobs.row_mask[0::2]
        values = self.pair_losses(data, logprobs, where)
        rewards = self.rewards(data, logprobs)
        sums = losses.preference_sums(rewards[0::2], rewards[1::2], where=where)
        return jnp.sum(values) / jnp.maximum(sums["pairs"], 1), losses.preference_summary(sums)


@objective
class bradley_terry(PairObjective):
    """Mean over pairs of :func:`mintjax.losses.bradley_terry`: the pairwise preference loss.

    Reads ``weights``.
    """

    def pair_losses(self, data: Batch, logprobs: Ragged, where: Array) -> Array:
        """``-log sigmoid(s_c - s_r)``."""
        scores = self.scores(data, logprobs)
        return losses.bradley_terry(scores[0::2], scores[1::2], where=where)


class _ReferencePairs(PairObjective):
    beta: float
    reference_free: bool = False

    def rewards(self, data: Batch, logprobs: Ragged) -> Array:
        """The implicit reward ``beta * (s - ref)``."""
        return self.beta * self.gains(data, logprobs)

    def gains(self, data: Batch, logprobs: Ragged) -> Array:
        """``s - ref``."""
        free = self.reference_free
        return self.scores(data, logprobs) if free else super().gains(data, logprobs)

    def quadruples(self, data: Batch, logprobs: Ragged) -> tuple[Array, Array, Array, Array]:
        """What chosen and rejected gained, then what the reference did, nothing: each ``[P]``.

        The losses look at the difference only, and its sum over tokens is one sum, not two.
        """
        gains = self.gains(data, logprobs)
        nothing = jnp.zeros_like(gains[0::2])
        return gains[0::2], gains[1::2], nothing, nothing


@objective
class dpo(_ReferencePairs):
    """Mean over pairs of :func:`mintjax.losses.dpo`.

    Reads ``weights`` and ``ref_logprobs``. The metrics are those of the implicit rewards
    ``beta * (s - ref)``.

    Args:
        beta: strength of the pull to the reference.
        label_smoothing: the probability that a label is wrong.
        reference_free: take the reference for uniform, and read no ``ref_logprobs``.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = static(default=False)

    def pair_losses(self, data: Batch, logprobs: Ragged, where: Array) -> Array:
        """``-log sigmoid(beta * margin)``, smoothed."""
        scores = self.quadruples(data, logprobs)
        return losses.dpo(
            *scores, beta=self.beta, label_smoothing=self.label_smoothing, where=where
        )


@objective
class ipo(_ReferencePairs):
    """Mean over pairs of :func:`mintjax.losses.ipo`.

    Reads ``weights`` and ``ref_logprobs``. The metrics are those of ``beta * (s - ref)``.

    Args:
        beta: the paper's tau.
    """

    beta: float = 0.1

    def pair_losses(self, data: Batch, logprobs: Ragged, where: Array) -> Array:
        """``(margin - 1 / (2 * beta))**2``."""
        return losses.ipo(*self.quadruples(data, logprobs), beta=self.beta, where=where)


@objective
class simpo(PairObjective):
    """Mean over pairs of :func:`mintjax.losses.simpo`.

    Reads ``weights``. The metrics are those of the rewards ``beta * s / length``.

    Args:
        beta: scale of the reward.
        gamma: the margin, in units of the reward.
    """

    beta: float = 2.0
    gamma: float = 1.0

    def rewards(self, data: Batch, logprobs: Ragged) -> Array:
        """``beta * s / length``."""
        lengths = jnp.maximum(self.lengths(data, logprobs), 1)
        return self.beta * self.scores(data, logprobs) / lengths

    def pair_losses(self, data: Batch, logprobs: Ragged, where: Array) -> Array:
        """``-log sigmoid(reward_c - reward_r - gamma)``."""
        scores, lengths = self.scores(data, logprobs), self.lengths(data, logprobs)
        return losses.simpo(
            scores[0::2],
            scores[1::2],
            lengths[0::2],
            lengths[1::2],
            beta=self.beta,
            gamma=self.gamma,
            where=where,
        )


@objective
class orpo(PairObjective):
    """Mean over pairs of :func:`mintjax.losses.orpo`.

    Reads ``weights``. The metrics are those of the mean logprobs.

    Args:
        odds_ratio_weight: the paper's lambda.
    """

    odds_ratio_weight: float = 0.1

    def rewards(self, data: Batch, logprobs: Ragged) -> Array:
        """``s / length``."""
        return self.scores(data, logprobs) / jnp.maximum(self.lengths(data, logprobs), 1)

    def pair_losses(self, data: Batch, logprobs: Ragged, where: Array) -> Array:
        """The chosen answer's mean NLL, and the odds ratio."""
        scores, lengths = self.scores(data, logprobs), self.lengths(data, logprobs)
        return losses.orpo(
            scores[0::2],
            scores[1::2],
            lengths[0::2],
            lengths[1::2],
            odds_ratio_weight=self.odds_ratio_weight,
            where=where,
        )


@objective
class kto(SequenceObjective):
    """Mean over datums of :func:`mintjax.losses.kto`: labelled answers, no pairs.

    Reads ``weights``, ``ref_logprobs`` and ``desirable``: one number per datum (or per token, of
    which the largest counts), not 0 for a good answer. Metrics: ``kl``, the point of reference,
    and ``mean_reward_desirable`` and ``mean_reward_undesirable``, of ``beta * (s - ref)``.

    Args:
        beta: aversion to risk.
        desirable_weight: the paper's lambda_D.
        undesirable_weight: the paper's lambda_U.
        kl: the point of reference, in nats. None estimates it from the batch, as the mean of
            ``s - ref`` and at least 0; the paper has it from answers to other prompts, which a
            training loop can measure and pass.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl: float | None = None

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The mean loss, and its metrics."""
        label = self.column(data, "desirable")
        label = (label.max() > 0) if isinstance(label, Ragged) else (jnp.asarray(label) != 0)
        where = jnp.asarray(logprobs.row_mask)
        gains = self.gains(data, logprobs)
        gain = jax.lax.stop_gradient(gains)
        kl = self.kl
        kl = jnp.maximum(losses.token_mean(gain, where=where) if kl is None else kl, 0)
        values = losses.kto(
            gains,
            jnp.zeros_like(gains),
            label,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            where=where,
        )
        rewards: Any = self.beta * gain
        metrics = {
            "kl": kl,
            "mean_reward_desirable": losses.token_mean(rewards, where=where & label),
            "mean_reward_undesirable": losses.token_mean(rewards, where=where & ~label),
        }
        return losses.token_mean(values, where=where), metrics
