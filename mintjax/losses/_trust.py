"""Policy losses per token with trust regions of their own: gates, divergences, masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish, harmless_where_zero, torch_clip
from mintjax.losses._builtin import ppo
from mintjax.losses._settings import check_bounds
from mintjax.losses._sigmoids import sigmoid
from mintjax.losses._surrogates import clipped_surrogate, ratio_surrogate


def dapo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.8,
    clip_high_threshold: ArrayLike = 1.28,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`ppo` with more room above: the asymmetric clip of DAPO ("clip higher").

    ``loss = -min(r * A, clip(r, low, high) * A)`` with
    ``r = exp(target_logprobs - sampling_logprobs)``.

    When to use it: entropy collapses under a symmetric clip, which holds unlikely tokens down. The
    rest of the method: :func:`mintjax.losses.token_mean`, :func:`mintjax.losses.group_varies` and
    :func:`mintjax.losses.overlong_penalty`.

    What others do: TRL and verl name the same bounds 0.2 and 0.28.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        clip_low_threshold: least ratio (0.8 means 0.8, not 1 - 0.8); a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.dapo([-1.0, -1.0], [-1.5, -1.5], [1.0, -1.0])
        Array([-1.28 ,  1.649], dtype=float32)

    Reference:
        Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        section 3.1.
    """
    return ppo(
        target_logprobs,
        sampling_logprobs,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        where=where,
    )


def sapo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    positive_temperature: ArrayLike = 1.0,
    negative_temperature: ArrayLike = 1.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Soft adaptive policy optimisation: a smooth gate on the ratio in place of the clip.

    ``loss = -(4 / tau) * sigmoid(tau * (r - 1)) * A`` with
    ``r = exp(target_logprobs - sampling_logprobs)`` and ``tau`` the positive temperature where
    ``A > 0``, the negative one elsewhere. At ``r = 1`` the slope is that of ``-r * A``; it fades to
    both sides.

    When to use it: tokens that drift a little should lose their gradient by degrees. Tokens with a
    negative advantage fade faster, because they raise the odds of everything else.

    What others do: TRL, verl and SkyRL have this form and take the mean over tokens, then over
    sequences; verl and SkyRL hold the log-ratio within 20.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        positive_temperature: of tokens whose advantage is positive, above 0; a scalar, or one per
            token.
        negative_temperature: of the others, above 0; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or a temperature is not above 0.

    Example:
        >>> from mintjax import losses
        >>> losses.sapo([-1.0, -1.0], [-1.0, -3.0], 1.0)
        Array([-2.   , -3.993], dtype=float32)

    Reference:
        Gao et al. 2025, "Soft Adaptive Policy Optimization" (arXiv:2511.20347), eq. 5.
    """
    target, sampling, advantages, warm, cool = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        positive_temperature=positive_temperature,
        negative_temperature=negative_temperature,
    )
    tau = jnp.where(advantages > 0, warm, cool)
    tau = jnp.where(tau > 0, tau, 1)  # masking left 0
    log_ratio = target - sampling
    # The gate is open to the last digit long before the ratio overflows.
    open_wide = jax.lax.stop_gradient(log_ratio) > 30 - jnp.log(tau)
    ratio = jnp.exp(jnp.where(open_wide, 0, log_ratio))
    gate = jnp.where(open_wide, 1, sigmoid(tau * (ratio - 1)))
    return finish(-4 * gate * (advantages / tau), where, target_logprobs)


def dppo_kl(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    divergence_threshold: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`dppo` whose trust region is a bound of the KL divergence instead of total variation.

    ``loss = -m * r * A`` with ``r = exp(target_logprobs - sampling_logprobs)``; ``m`` is 0 where
    the token has moved the way the advantage asks for and the divergence of "this token or any
    other" has passed the threshold: ``q * log(q / p) + (1 - q) * log((1 - q) / (1 - p)) >
    threshold`` with ``q = exp(sampling_logprobs)`` and ``p = exp(target_logprobs)``.

    When to use it: as :func:`dppo`; the KL minds likely tokens more.

    What others do: verl truncates the ratio at ``c = clip_ratio_c``, which is 3 by default, and
    puts ``log p`` in its place (``-m * sg(min(r, c)) * log p * A``, the same gradient up to there);
    both verl and SkyRL add 1e-8 to the complements.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        divergence_threshold: greatest divergence, in nats; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.dppo_kl([-6.0, -0.1], [-8.0, -0.5], 1.0)
        Array([-7.389, -0.   ], dtype=float32)

    Reference:
        Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning"
        (arXiv:2602.04879), eq. 14 (DPPO-Binary-KL).
    """
    target, sampling, advantages, threshold = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        divergence_threshold=divergence_threshold,
    )
    left = left_by_kl(target, sampling, advantages, threshold)
    log_ratio = jnp.where(left, 0, target - sampling)
    values = -ratio_surrogate(log_ratio, jnp.where(left, 0, advantages))
    return finish(values, where, target_logprobs)


def stable_reinforce(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.8,
    clip_high_threshold: ArrayLike = 1.2,
    least_ratio_threshold: ArrayLike = 1e-3,
    greatest_ratio_threshold: ArrayLike = 1e3,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`ppo` whose log-ratio is held within bounds before the exponential ("pre-clip").

    ``loss = -min(r * A, clip(r, low, high) * A)`` with
    ``r = exp(clip(target_logprobs - sampling_logprobs, log least, log greatest))``. It differs from
    :func:`ppo` where ``A < 0`` and the ratio is beyond ``greatest``, and where ``A > 0`` and it is
    below ``least``: such a token has no gradient here.

    When to use it: long answers, where a few ratios are so large that a negative advantage makes
    them the whole gradient. The method whitens advantages and drops those beyond three standard
    deviations besides: :func:`mintjax.losses.whiten`, :func:`mintjax.losses.advantage_filter`.

    What others do: :func:`dual_clip_ppo` bounds the same tokens from a ratio of 3 on.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        clip_low_threshold: least ratio (0.8 means 0.8, not 1 - 0.8); a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        least_ratio_threshold: least ratio before that clip, above 0; a scalar, or one per token.
        greatest_ratio_threshold: greatest ratio before that clip; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or a lower threshold is above the upper one.

    Example:
        >>> from mintjax import losses
        >>> losses.stable_reinforce([-1.0, -1.0], [-1.5, -90.0], -1.0)
        Array([   1.649, 1000.   ], dtype=float32)

    Reference:
        Zhang et al. 2025, "R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement
        Learning" (arXiv:2505.02835), the algorithm StableReinforce, in the form of the authors'
        code (yfzhang114/r1_reward on GitHub).
    """
    check_bounds(clip_low_threshold, clip_high_threshold)
    check_bounds(
        least_ratio_threshold,
        greatest_ratio_threshold,
        ("least_ratio_threshold", "greatest_ratio_threshold"),
    )
    target, sampling, advantages, low, high, least, greatest = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        least_ratio_threshold=least_ratio_threshold,
        greatest_ratio_threshold=greatest_ratio_threshold,
    )
    bounds = (jnp.log(jnp.where(bound > 0, bound, 1)) for bound in (least, greatest))
    held = torch_clip(target - sampling, *bounds)
    return finish(-clipped_surrogate(held, advantages, low, high), where, target_logprobs)


def left_by_kl(
    target: jax.Array, sampling: jax.Array, advantages: jax.Array, threshold: jax.Array
) -> jax.Array:
    """Marks the tokens that have left the trust region of :func:`dppo_kl`."""
    target, sampling = jax.lax.stop_gradient(target), jax.lax.stop_gradient(sampling)
    p, q = jnp.exp(target), jnp.exp(sampling)
    shift = jnp.where(q == 0, 0, sampling) - jnp.where(q == 0, 0, target)
    # XLA would compute 1 - q + 1e-8 as (1 + 1e-8) - q, which is 0 in float32 where q is 1.
    others, before = (jnp.maximum(1 - x, 0) + 1e-8 for x in (p, q))
    rest = jnp.log(before / others)
    divergence = q * shift + (1 - q) * rest
    moved = jnp.where(advantages > 0, p > q, (p < q) & (advantages < 0))
    return moved & (divergence > threshold)


def masked_importance_sampling(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.5,
    clip_high_threshold: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """REINFORCE with an importance weight that drops tokens whose ratio is out of bounds: IcePop.

    ``loss = -sg(r if low <= r <= high else 0) * target_logprobs * A`` with
    ``r = exp(target_logprobs - sampling_logprobs)`` and ``sg`` the stop-gradient.

    When to use it: the sampler is another engine or another precision, and a ratio far from 1 tells
    of a token whose logprobs are wrong, which :func:`truncated_importance_sampling` would keep.

    What others do: verl weighs its losses by such a ratio of trainer to sampler ("lower_upper"
    thresholds), beside the ratio of the loss; TRL likewise; SkyRL ("rollout_is") excludes the
    bounds themselves.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        clip_low_threshold: least ratio (0.8 means 0.8, not 1 - 0.8); a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.masked_importance_sampling([-1.0, -1.0], [-1.5, -3.0], 1.0)
        Array([1.649, 0.   ], dtype=float32)

    Reference:
        Ring-1T, Ling team 2025, "Every Step Evolves: Scaling Reinforcement Learning for
        Trillion-Scale Thinking Model", the section on IcePop (the bounds are those of its release
        notes, unconfirmed).
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
    kept = (ratio >= low) & (ratio <= high)
    weights = harmless_where_zero(advantages, jnp.where(kept, ratio, 0))
    coefficients = weights * advantages
    values = -coefficients * harmless_where_zero(coefficients, target)
    return finish(values, where, target_logprobs)
