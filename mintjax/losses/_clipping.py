"""The tokens that each policy loss clips, for its ``clip_fraction``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish
from mintjax.losses._trust import left_by_kl


def clipped_tokens(
    loss: str,
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    where: ArrayLike | None = None,
    **settings: Any,
) -> jax.Array:
    """Tells the tokens whose gradient a policy loss cuts off or whose weight it holds at a bound.

    ``ppo``, ``dapo``, ``gspo``, ``luspo`` and ``gmpo`` clip ``r > high`` where ``A > 0`` and
    ``r < low`` where ``A < 0``; ``dual_clip_ppo`` clips ``r > dual_clip_threshold`` where ``A < 0``
    besides; ``cispo``, ``truncated_importance_sampling`` and ``masked_importance_sampling`` clip
    every weight outside their bounds; ``dppo`` and ``dppo_kl`` clip what has left their trust
    region; ``stable_reinforce`` clips as ``ppo`` does, and what its exponential is held at. A loss
    without bounds, such as ``sapo``, clips nothing. The tokens that ``clip_cov`` draws are not
    among these.

    Args:
        loss: the name of the loss.
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        where: same shape, boolean; positions that are False are not clipped.
        settings: the thresholds of the loss, under the names that it has for them.

    Returns:
        One boolean per token, which has no unit and no gradient: the shape of
        ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.clipped_tokens("cispo", [-1.0, -1.0], [-1.0, -1.5], 0.0, clip_high_threshold=1.2)
        Array([False,  True], dtype=bool)

    Reference:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", figure 1, for ``ppo``; the
        others: that of each loss.
    """
    names = [name for name in settings if name.endswith("_threshold")]
    target, sampling, advantages, *thresholds = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        **{name: settings[name] for name in names},
    )
    tokens = _Tokens(target, sampling, advantages, dict(zip(names, thresholds, strict=True)))
    clipped = _CLIPPED.get(loss, _nothing)(tokens)
    return finish(clipped.astype(target.dtype), where, target) != 0


class _Tokens:
    """The numbers that a rule of clipping looks at."""

    def __init__(
        self,
        target: jax.Array,
        sampling: jax.Array,
        advantages: jax.Array,
        at: dict[str, jax.Array],
    ) -> None:
        self.target = jax.lax.stop_gradient(target)
        self.sampling = jax.lax.stop_gradient(sampling)
        self.advantages = jax.lax.stop_gradient(advantages)
        self.ratio = jnp.exp(self.target - self.sampling)
        self.at = at

    def below(self, name: str = "clip_low_threshold") -> jax.Array:
        """Marks the ratios below a threshold, if there is such."""
        return self.ratio < self.at[name] if name in self.at else jnp.zeros(self.ratio.shape, bool)

    def above(self, name: str = "clip_high_threshold") -> jax.Array:
        """Marks the ratios above a threshold, if there is such."""
        return self.ratio > self.at[name] if name in self.at else jnp.zeros(self.ratio.shape, bool)


def _nothing(tokens: _Tokens) -> jax.Array:
    return jnp.zeros(tokens.ratio.shape, bool)


def _surrogate(tokens: _Tokens) -> jax.Array:
    raised = tokens.above() & (tokens.advantages > 0)
    return raised | (tokens.below() & (tokens.advantages < 0))


def _dual(tokens: _Tokens) -> jax.Array:
    bounded = tokens.above("dual_clip_threshold") & (tokens.advantages < 0)
    return _surrogate(tokens) | bounded


def _stable(tokens: _Tokens) -> jax.Array:
    held = tokens.below("least_ratio_threshold") | tokens.above("greatest_ratio_threshold")
    return _surrogate(tokens) | held


def _outside(tokens: _Tokens) -> jax.Array:
    return tokens.below() | tokens.above()


def _truncated(tokens: _Tokens) -> jax.Array:
    return tokens.above("truncation_threshold")


def _total_variation(tokens: _Tokens) -> jax.Array:
    shift = jnp.exp(tokens.target) - jnp.exp(tokens.sampling)
    threshold = tokens.at["divergence_threshold"]
    risen = (shift > threshold) & (tokens.advantages > 0)
    return risen | ((shift < -threshold) & (tokens.advantages < 0))


def _kl(tokens: _Tokens) -> jax.Array:
    threshold = tokens.at["divergence_threshold"]
    return left_by_kl(tokens.target, tokens.sampling, tokens.advantages, threshold)


_CLIPPED: dict[str, Callable[[_Tokens], jax.Array]] = {
    "ppo": _surrogate,
    "gspo": _surrogate,
    "dual_clip_ppo": _dual,
    "stable_reinforce": _stable,
    "cispo": _outside,
    "truncated_importance_sampling": _truncated,
    "masked_importance_sampling": _outside,
    "dppo": _total_variation,
    "dppo_kl": _kl,
    "dapo": _surrogate,
    "luspo": _surrogate,
    "gmpo": _surrogate,
}
