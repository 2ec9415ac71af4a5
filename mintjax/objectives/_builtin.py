"""The five losses that trainers serve by name, as objectives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mintjax import losses
from mintjax.objectives._base import (
    Array,
    LossObjective,
    floats_only,
    objective,
    on_tokens,
    static,
    token_mask,
    weighted,
)
from mintjax.objectives._reduce import Aggregation, aggregate
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch
from mintjax.types import LossFnName


@objective
class cross_entropy(LossObjective):
    """Sum over tokens of :func:`mintjax.losses.cross_entropy`.

    Reads ``weights``. Metric: ``mean_nll``, the loss per unit of weight, in nats.
    """

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """``("cross_entropy", {})``."""
        return "cross_entropy", {}

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The loss, and its metric."""
        weights = on_tokens(self.column(data, "weights"), logprobs)
        where = token_mask(data, logprobs)
        loss = jnp.sum(losses.cross_entropy(logprobs.tiles, weights, where=where))
        mass = jnp.sum(jnp.where(where, weights, 0))
        mean = jax.lax.stop_gradient(loss) / jnp.where(mass == 0, 1, mass)
        return loss, {"mean_nll": mean}


class PolicyObjective(LossObjective):
    """What the losses share that weigh each token's advantage by an importance ratio.

    Reads ``logprobs`` (of the sampling policy), ``advantages``, and, if there are any, ``weights``
    as a mask (one that is neither 0 nor 1 is a factor). Metrics: those of
    :func:`mintjax.losses.policy_summary`.
    """

    aggregation: Aggregation

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """The loss of each token; all arguments have one shape."""
        raise NotImplementedError

    def bounds(self) -> dict[str, Any]:
        """The thresholds of the ratio that it has, as keyword arguments of the loss."""
        names = ("clip_low_threshold", "clip_high_threshold")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def bounds_given(self, sampling: Array) -> dict[str, Any]:
        """The thresholds that the metrics go by, which may depend on the sampling logprobs."""
        return self.bounds()

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """The loss, and its metrics."""
        sampling = on_tokens(self.column(data, "logprobs"), logprobs)
        advantages = on_tokens(self.column(data, "advantages"), logprobs)
        where = token_mask(data, logprobs)
        # Padding repeats real tokens: only what weights hide must be kept out of the arithmetic.
        hidden = where if "weights" in data else None
        values = self.token_losses(logprobs.tiles, sampling, advantages, hidden)
        values = jnp.where(where, values, 0)
        bounds = self.bounds_given(sampling)
        sums = losses.policy_sums(logprobs.tiles, sampling, advantages, **bounds, where=where)
        values = weighted(values, data, logprobs, where)
        return aggregate(values, where, logprobs, self.aggregation), losses.policy_summary(sums)


def named(
    name: LossFnName, me: PolicyObjective, **config: Any
) -> tuple[LossFnName, dict[str, float]] | None:
    """The builtin name and config of a policy objective, if a trainer reduces as it does."""
    sent = floats_only(config)
    return None if sent is None or me.aggregation != "sum" else (name, sent)


@objective
class importance_sampling(PolicyObjective):
    """:func:`mintjax.losses.importance_sampling` over a batch.

    Args:
        aggregation: how tokens' losses become one; trainers sum.
    """

    aggregation: Aggregation = static(default="sum")

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """``("importance_sampling", {})``, if it sums."""
        return named("importance_sampling", self)

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """``-r * A``."""
        return losses.importance_sampling(target, sampling, advantages, where=where)


@objective
class ppo(PolicyObjective):
    """:func:`mintjax.losses.ppo` over a batch.

    Args:
        clip_low_threshold: least ratio.
        clip_high_threshold: greatest ratio.
        aggregation: how tokens' losses become one; trainers sum.
    """

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2
    aggregation: Aggregation = static(default="sum")

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """``("ppo", thresholds)``, if it sums."""
        return named("ppo", self, **self.bounds())

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """``-min(r * A, clip(r) * A)``."""
        return losses.ppo(target, sampling, advantages, **self.bounds(), where=where)


@objective
class cispo(PolicyObjective):
    """:func:`mintjax.losses.cispo` over a batch.

    Args:
        clip_low_threshold: least importance weight.
        clip_high_threshold: greatest importance weight.
        aggregation: how tokens' losses become one; trainers sum.
    """

    clip_low_threshold: float = 0.8
    clip_high_threshold: float = 1.2
    aggregation: Aggregation = static(default="sum")

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """``("cispo", thresholds)``, if it sums."""
        return named("cispo", self, **self.bounds())

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """``-sg(clip(r)) * lp * A``."""
        return losses.cispo(target, sampling, advantages, **self.bounds(), where=where)


@objective
class dro(PolicyObjective):
    """:func:`mintjax.losses.dro` over a batch.

    Args:
        beta: strength of the pull to the sampling policy.
        aggregation: how tokens' losses become one; trainers sum.
    """

    beta: float = 0.05
    aggregation: Aggregation = static(default="sum")

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """``("dro", {"beta": ...})``, if it sums."""
        return named("dro", self, beta=self.beta)

    def token_losses(
        self, target: Array, sampling: Array, advantages: Array, where: Array | None
    ) -> Array:
        """``-(lp * A - beta / 2 * (lp - q)**2)``."""
        return losses.dro(target, sampling, advantages, beta=self.beta, where=where)
