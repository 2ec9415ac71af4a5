"""The five losses that a trainer runs by name, per token and unreduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish, harmless_where_zero, product, torch_clip
from mintjax.losses._settings import check_bounds
from mintjax.losses._surrogates import clipped_surrogate, ratio_surrogate


def cross_entropy(
    target_logprobs: ArrayLike, weights: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Weighted negative log-likelihood.

    ``loss = -weights * target_logprobs``. A weight of 0 gives 0 whatever the logprob is, -inf
    included.

    When to use it: supervised learning; and, with advantages as weights, REINFORCE.

    What others do: trainers sum over tokens; TRL and Liger take the mean over all tokens of the
    batch.

    Args:
        target_logprobs: log-probabilities of the targets, in nats; any shape, such as ``[T]``,
            ``[B, T]`` or ``[T, K]``.
        weights: same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times weight; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.cross_entropy([-0.5, -2.0], [1.0, 0.0])
        Array([0.5, 0. ], dtype=float32)

    Reference:
        Goodfellow, Bengio & Courville 2016, "Deep Learning", section 6.2.1.1.
    """
    logprobs, weights = aligned(where, target_logprobs, weights=weights)
    return finish(-product(weights, logprobs), where, target_logprobs)


def importance_sampling(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Policy gradient with an importance weight, unclipped.

    ``loss = -r * advantages``, ``r = exp(target_logprobs - sampling_logprobs)``. An advantage of 0
    gives 0 even where the ratio overflows.

    When to use it: one step per batch, or samples that are nearly on-policy: the ratio is
    unbounded.

    What others do: verl ("gpg") leaves the ratio out; SkyRL and the hosted trainers have this form.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.importance_sampling([-1.0, -1.0], [-1.0, -1.5], [1.0, -1.0])
        Array([-1.   ,  1.649], dtype=float32)

    Reference:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 6.
    """
    target, sampling, advantages = aligned(
        where, target_logprobs, sampling_logprobs=sampling_logprobs, advantages=advantages
    )
    return finish(-ratio_surrogate(target - sampling, advantages), where, target_logprobs)


def ppo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.8,
    clip_high_threshold: ArrayLike = 1.2,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Proximal policy optimisation: the clipped, pessimistic surrogate.

    ``loss = -min(r * advantages, clip(r, low, high) * advantages)`` with
    ``r = exp(target_logprobs - sampling_logprobs)``. The derivative of the clip is 1 at its bounds,
    as torch's is.

    When to use it: several steps per batch: tokens that have moved enough pull no longer.

    What others do: TRL, verl and SkyRL's train backend give the bounds as distances from 1; verl
    holds the log-ratio within 20 first.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        clip_low_threshold: least ratio (0.8 means 0.8, not 1 - 0.8); a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.ppo([-1.0, -1.0, -1.0], [-1.0, -1.5, -1.5], [1.0, 1.0, -1.0])
        Array([-1.   , -1.2  ,  1.649], dtype=float32)

    Reference:
        Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    check_bounds(clip_low_threshold, clip_high_threshold)
    target, sampling, advantages, low, high = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
    )
    surrogate = clipped_surrogate(target - sampling, advantages, low, high)
    return finish(-surrogate, where, target_logprobs)


def cispo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.8,
    clip_high_threshold: ArrayLike = 1.2,
    where: ArrayLike | None = None,
) -> jax.Array:
    """REINFORCE with a clipped importance weight that carries no gradient.

    ``loss = -sg(clip(r, low, high)) * target_logprobs * advantages`` with
    ``r = exp(target_logprobs - sampling_logprobs)`` and ``sg`` the stop-gradient: unlike in
    :func:`ppo`, a token whose ratio is clipped keeps its gradient.

    When to use it: the tokens that PPO clips are those that matter, such as rare words at a turn of
    the reasoning.

    What others do: TRL and Liger have no lower bound; verl gives distances from 1.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        clip_low_threshold: least importance weight; a scalar, or one per token.
        clip_high_threshold: greatest importance weight; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.cispo([-1.0, -1.0], [-1.0, -1.5], 1.0)
        Array([1. , 1.2], dtype=float32)

    Reference:
        MiniMax 2025, "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
        eq. 4 and 5.
    """
    check_bounds(clip_low_threshold, clip_high_threshold)
    target, sampling, advantages, low, high = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
    )
    ratio = jnp.exp(jax.lax.stop_gradient(target - sampling))
    coefficients = harmless_where_zero(advantages, torch_clip(ratio, low, high)) * advantages
    values = -coefficients * harmless_where_zero(coefficients, target)
    return finish(values, where, target_logprobs)


def dro(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    beta: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Direct reward optimisation: policy gradient with a quadratic pull to the sampling policy.

    ``loss = -(target_logprobs * advantages - beta / 2 * (target_logprobs - sampling_logprobs)**2)``

    When to use it: offline data, one answer per prompt, without ratios.

    What others do: verl ("dro") and TuFT have this form, with other defaults of ``beta``.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        beta: strength of the pull; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.dro([-1.0, -1.0], [-1.0, -3.0], 1.0)
        Array([1. , 1.1], dtype=float32)

    Reference:
        Richemond et al. 2024, "Offline Regularised Reinforcement Learning for Large Language Models
        Alignment", in the form of Tinker's documentation of ``dro``.
    """
    target, sampling, advantages, beta = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        beta=beta,
    )
    log_ratio = harmless_where_zero(beta, target - sampling)
    # At an infinite log-ratio the square outgrows the linear term, and inf - inf would hide it.
    linear = jnp.where(jnp.isinf(log_ratio), 0, target) * advantages
    values = -(linear - 0.5 * beta * log_ratio * log_ratio)
    return finish(values, where, target_logprobs)
