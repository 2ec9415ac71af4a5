"""Policy losses that treat the tokens apart whose update costs the most entropy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish, keep
from mintjax.losses._builtin import ppo
from mintjax.losses._settings import check_order, check_settings
from mintjax.losses._surrogates import ratio_surrogate


def clip_cov(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    noise: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.8,
    clip_high_threshold: ArrayLike = 1.2,
    covariance_low: ArrayLike = 1.0,
    covariance_high: ArrayLike = 5.0,
    share: float = 2e-4,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`ppo` without the gradient of a few random tokens that cost the most entropy.

    ``loss = 0`` for at most ``max(1, floor(share * N))`` of the N unmasked tokens, chosen at random
    among those that are not clipped and whose covariance ``(A - mean A) * (target_logprobs - mean
    target_logprobs)`` lies between the bounds; elsewhere ``-min(r * A, clip(r, low, high) * A)``.
    All tokens that are given are looked at together.

    When to use it: entropy collapses, because likely tokens with a high advantage drive it down.

    What others do: verl and SkyRL draw the tokens themselves; here ``noise`` decides, so that the
    loss is a function of its arguments.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        noise: numbers that are drawn anew each step, such as uniform ones; same shape. Among the
            tokens that may be chosen, those with the smallest are.
        clip_low_threshold: least ratio (0.8 means 0.8, not 1 - 0.8); a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        covariance_low: least covariance of a token that may be chosen; a scalar.
        covariance_high: greatest covariance; a scalar.
        share: of tokens.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.clip_cov([-0.5, -4.0], [-0.5, -4.0], [2.0, -2.0], [0.1, 0.9])
        Array([0., 2.], dtype=float32)

    Reference:
        Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
        Models" (arXiv:2505.22617), eq. 11 and 12, with the covariance of eq. 10.
    """
    values = ppo(
        target_logprobs,
        sampling_logprobs,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        where=where,
    )
    drawn = drawn_tokens(
        target_logprobs,
        sampling_logprobs,
        advantages,
        noise,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        covariance_low=covariance_low,
        covariance_high=covariance_high,
        share=share,
        where=where,
    )
    (free,) = aligned(where, values)
    return finish(jnp.where(drawn, 0, free), where, target_logprobs)


def drawn_tokens(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    noise: ArrayLike,
    *,
    clip_low_threshold: ArrayLike,
    clip_high_threshold: ArrayLike,
    covariance_low: ArrayLike,
    covariance_high: ArrayLike,
    share: float,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Marks the tokens that :func:`clip_cov` leaves without a gradient."""
    check_order(
        covariance_low,
        covariance_high,
        ("covariance_low", "covariance_high"),
        "so no token lies between them",
    )
    target, sampling, advantages, noise, low, high, least, most = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        noise=noise,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        covariance_low=covariance_low,
        covariance_high=covariance_high,
    )
    ratio = jnp.exp(jax.lax.stop_gradient(target - sampling))
    clipped = jnp.where(advantages > 0, ratio > high, (ratio < low) & (advantages < 0))
    covariance = _covariance(target, advantages, where)
    present = keep(jnp.ones(target.shape, bool), where)
    eligible = present & ~clipped & (covariance > least) & (covariance < most)
    return _smallest(jnp.where(eligible, noise, jnp.inf), present, share) & eligible


def kl_cov(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    penalty_weight: ArrayLike = 1.0,
    share: float = 2e-4,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Policy gradient with a penalty on the few tokens that cost the most entropy.

    ``loss = -r * A``, and ``+ penalty_weight * |target_logprobs - sampling_logprobs|`` for the
    ``max(1, floor(share * N))`` of the N unmasked tokens whose covariance ``(A - mean A) *
    (target_logprobs - mean target_logprobs)`` is largest. All tokens that are given are looked at
    together.

    When to use it: as :func:`clip_cov`, without chance.

    What others do: verl and SkyRL have this form; the slope of the penalty at 0 is 0 here and
    there.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        penalty_weight: of the penalty; a scalar, or one per token.
        share: of tokens.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_cov([-0.5, -5.0], [-1.0, -5.0], [2.0, -2.0])
        Array([-2.797,  2.   ], dtype=float32)

    Reference:
        Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
        Models" (arXiv:2505.22617), the definition of KL-Cov, with the covariance of eq. 10.
    """
    target, sampling, advantages, weight = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        penalty_weight=penalty_weight,
    )
    covariance = _covariance(target, advantages, where)
    present = keep(jnp.ones(target.shape, bool), where)
    chosen = _smallest(jnp.where(present, -covariance, jnp.inf), present, share) & present
    log_ratio = target - sampling
    penalty = jnp.where(chosen, weight * jnp.sign(log_ratio) * log_ratio, 0)
    return finish(penalty - ratio_surrogate(log_ratio, advantages), where, target_logprobs)


def _covariance(target: jax.Array, advantages: jax.Array, where: ArrayLike | None) -> jax.Array:
    """Computes each token's part in the covariance with the advantages, without a gradient."""
    tokens = jnp.maximum(jnp.sum(keep(jnp.ones_like(target), where)), 1)
    off_mean = jax.lax.stop_gradient(target - jnp.sum(target) / tokens)
    return off_mean * jax.lax.stop_gradient(advantages - jnp.sum(advantages) / tokens)


def _smallest(values: jax.Array, present: jax.Array, share: float) -> jax.Array:
    """Marks the ``max(1, floor(share * N))`` smallest values, N the number of those present."""
    check_settings({"share": share})
    ranks = jnp.argsort(jnp.argsort(values.reshape(-1))).reshape(values.shape)
    number = jnp.maximum(jnp.floor(share * jnp.sum(present.astype(jnp.float32))), 1)
    return ranks < number
