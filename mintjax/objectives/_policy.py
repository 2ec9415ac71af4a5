"""Policy losses that trainers do not serve by name, as objectives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from mintjax import losses
from mintjax.objectives._base import Array, objective, on_tokens, static, token_mask, weighted
from mintjax.objectives._builtin import PolicyObjective
from mintjax.objectives._reduce import Aggregation, aggregate
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch


@objective
class dual_clip_ppo(PolicyObjective):
    """:func:`mintjax.losses.dual_clip_ppo` over a batch.

    Args:
        clip_low_threshold: least ratio.
        clip_high_threshold: greatest ratio.
        dual_clip_threshold: greatest ratio where the advantage is negative.
        aggregation: how tokens' losses become one.
    """

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2
    dual_clip_threshold: float = 3.0
    aggregation: Aggregation = static(default="sum")

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """PPO's, bounded where the advantage is negative."""
        return losses.dual_clip_ppo(
            target,
            sampling,
            advantages,
            **self.bounds(),
            dual_clip_threshold=self.dual_clip_threshold,
            where=where,
        )


@objective
class dppo(PolicyObjective):
    """:func:`mintjax.losses.dppo` over a batch.

    The metric ``clip_fraction`` is that of the tokens which have left the trust region.

    Args:
        divergence_threshold: greatest shift of a token's probability.
        aggregation: how tokens' losses become one.
    """

    divergence_threshold: float = 0.15
    aggregation: Aggregation = static(default="sum")

    def bounds_given(self, sampling: Array) -> dict[str, Any]:
        """The ratios at which a token's probability has shifted by the threshold."""
        relative = self.divergence_threshold * jnp.exp(-sampling)
        return {"clip_low_threshold": 1 - relative, "clip_high_threshold": 1 + relative}

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """``-r * A`` within the trust region."""
        return losses.dppo(
            target,
            sampling,
            advantages,
            divergence_threshold=self.divergence_threshold,
            where=where,
        )


@objective
class truncated_importance_sampling(PolicyObjective):
    """:func:`mintjax.losses.truncated_importance_sampling` over a batch.

    Args:
        truncation_threshold: greatest importance weight.
        aggregation: how tokens' losses become one.
    """

    truncation_threshold: float = 2.0
    aggregation: Aggregation = static(default="sum")

    def bounds(self) -> dict[str, Any]:
        """The threshold, for the metrics."""
        return {"clip_high_threshold": self.truncation_threshold}

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """``-sg(min(r, c)) * lp * A``."""
        return losses.truncated_importance_sampling(
            target,
            sampling,
            advantages,
            truncation_threshold=self.truncation_threshold,
            where=where,
        )


@objective
class gspo(PolicyObjective):
    """:func:`mintjax.losses.gspo` over a batch, each datum one sequence.

    The metrics are those of the sequences' ratios, each counted once per token.

    Args:
        clip_low_threshold: least ratio of a sequence.
        clip_high_threshold: greatest ratio of a sequence.
        aggregation: how tokens' losses become one; the paper takes ``"sequence_mean"``.
    """

    clip_low_threshold: float = 0.9997
    clip_high_threshold: float = 1.0004
    aggregation: Aggregation = static(default="sum")

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The loss, and its metrics."""
        sampling = on_tokens(self.column(data, "logprobs"), logprobs)
        advantages = on_tokens(self.column(data, "advantages"), logprobs)
        where = token_mask(data, logprobs)
        bounds = self.bounds()
        log_ratio = on_tokens(self._sequence_log_ratio(sampling, where, logprobs), logprobs)
        values = losses.gspo_token(logprobs.tiles, log_ratio, advantages, **bounds, where=where)
        sums = losses.policy_sums(
            log_ratio, jnp.zeros_like(log_ratio), advantages, **bounds, where=where
        )
        values = weighted(values, data, logprobs, where)
        return aggregate(values, where, logprobs, self.aggregation), losses.policy_summary(sums)

    @staticmethod
    def _sequence_log_ratio(sampling: Array, where: Array, logprobs: Ragged) -> Array:
        """The mean over each row's tokens of ``lp - q``: ``[B]``."""
        difference = losses.kl_k1(logprobs.tiles, sampling, where=where)
        count = tiling.row_sums(jnp.where(where, 1, 0).astype(difference.dtype), logprobs.layout)
        return tiling.row_sums(difference, logprobs.layout) / jnp.maximum(count, 1)
