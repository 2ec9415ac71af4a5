"""Policy-gradient losses that trainers do not serve by name, per token and unreduced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, finish, harmless_where_zero
from mintjax.losses._settings import check_bounds
from mintjax.losses._surrogates import clipped_surrogate, ratio_surrogate


def dual_clip_ppo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.8,
    clip_high_threshold: ArrayLike = 1.2,
    dual_clip_threshold: ArrayLike = 3.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """PPO whose loss is bounded where the advantage is negative and the ratio large.

    ``loss = -max(min(r * A, clip(r, low, high) * A), c * A)`` where ``A < 0``, and :func:`ppo`
    elsewhere, with ``r = exp(target_logprobs - sampling_logprobs)``.

    When to use it: very off-policy samples, where a negative advantage times a large ratio would
    dominate.

    What others do: verl's ``vanilla`` is this loss, with 3 as default; TRL calls the bound
    ``delta``.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        clip_low_threshold: least ratio; a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        dual_clip_threshold: ``c``, above ``clip_high_threshold``; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.dual_clip_ppo([-1.0, -1.0], [-1.5, -5.0], -1.0)
        Array([1.649, 3.   ], dtype=float32)

    Reference:
        Ye et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
        section "Dual-clip PPO".
    """
    check_bounds(clip_low_threshold, clip_high_threshold)
    target, sampling, advantages, low, high, dual = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        dual_clip_threshold=dual_clip_threshold,
    )
    log_ratio = target - sampling
    bounded = (advantages < 0) & (jnp.exp(jax.lax.stop_gradient(log_ratio)) > dual)
    surrogate = clipped_surrogate(jnp.where(bounded, 0, log_ratio), advantages, low, high)
    floor = dual * advantages
    raised = jnp.where(advantages < 0, jnp.maximum(surrogate, floor), surrogate)
    return finish(-jnp.where(bounded, floor, raised), where, target_logprobs)


def dppo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    divergence_threshold: ArrayLike = 0.15,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Divergence PPO: the trust region bounds how far a probability moves, not its ratio.

    ``loss = -m * r * advantages`` with ``r = exp(target_logprobs - sampling_logprobs)``. With the
    shift ``s = exp(target_logprobs) - exp(sampling_logprobs)``, the total variation between the two
    policies if this token and "any other" were all there is, ``m`` is 0 where ``s`` has passed the
    threshold in the direction the advantage asks for (``s > threshold`` and ``A > 0``, or
    ``s < -threshold`` and ``A < 0``), and 1 elsewhere. An unlikely token may thus multiply its
    probability, where :func:`ppo` would clip it; a likely one is held sooner.

    When to use it: large vocabularies, where PPO clips unlikely tokens that have hardly moved.

    What others do: verl ("dppo_tv") truncates the ratio at ``clip_ratio_c``, which is 3 by default,
    and puts ``log p`` in its place, with the same gradient up to there; SkyRL has this form. Both
    take 0.2 as the threshold, and one for each sign of the advantage.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        divergence_threshold: greatest shift, a probability; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.dppo([-6.0, -0.1], [-8.0, -0.5], 1.0)
        Array([-7.389, -0.   ], dtype=float32)

    Reference:
        Qi et al. 2026, "Rethinking the Trust Region in LLM Reinforcement Learning"
        (arXiv:2602.04879), eq. 13 (DPPO-Binary-TV), with the threshold of the authors'
        recipe.
    """
    target, sampling, advantages, threshold = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        divergence_threshold=divergence_threshold,
    )
    shift = jax.lax.stop_gradient(jnp.exp(target) - jnp.exp(sampling))
    left = jnp.where(advantages > 0, shift > threshold, shift < -threshold)
    log_ratio = jnp.where(left, 0, target - sampling)
    values = -ratio_surrogate(log_ratio, jnp.where(left, 0, advantages))
    return finish(values, where, target_logprobs)


def truncated_importance_sampling(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    truncation_threshold: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """REINFORCE with an importance weight that is cut off above and carries no gradient.

    ``loss = -sg(min(r, c)) * target_logprobs * advantages`` with
    ``r = exp(target_logprobs - sampling_logprobs)`` and ``sg`` the stop-gradient. It corrects for a
    sampler that is not quite the model in training (another engine, another precision, an older
    step) at a variance that stays bounded.

    When to use it: the sampler is not quite the model in training, and every token shall count.

    What others do: TRL and verl weigh another loss by such a ratio:
    :func:`mintjax.losses.importance_weights`.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        truncation_threshold: ``c``, the greatest importance weight; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.truncated_importance_sampling([-1.0, -1.0], [-1.0, -3.0], 1.0)
        Array([1., 2.], dtype=float32)

    Reference:
        Ionides 2008, "Truncated Importance Sampling", eq. 3 (equation number unconfirmed); for
        language models Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy
        RL Training".
    """
    target, sampling, advantages, threshold = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        truncation_threshold=truncation_threshold,
    )
    ratio = jnp.exp(jax.lax.stop_gradient(target - sampling))
    weights = harmless_where_zero(advantages, jnp.minimum(ratio, threshold))
    coefficients = weights * advantages
    values = -coefficients * harmless_where_zero(coefficients, target)
    return finish(values, where, target_logprobs)


def gspo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.9997,
    clip_high_threshold: ArrayLike = 1.0004,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Group sequence policy optimisation: PPO whose ratio is that of the whole sequence.

    ``s = exp(mean_t(sg(target_logprobs) - sampling_logprobs))`` over the unmasked tokens of the
    last axis, ``r_t = s * exp(target_logprobs - sg(target_logprobs))``, and then :func:`ppo` of
    ``r_t``: every token of a sequence is clipped, or none.

    When to use it: mixtures of experts and long answers, where ratios of single tokens are noise.

    What others do: verl, TRL and SkyRL have this form; verl and SkyRL hold the log-ratio at most at
    10. TRL's sequence level has the same gradient.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats: ``[..., T]``, the
            last axis along one sequence.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or ``[..., 1]``, or a scalar.
        clip_low_threshold: least sequence ratio; a scalar, or one per token. The defaults are the
            paper's; ratios of sequences are far closer to 1 than those of tokens.
        clip_high_threshold: greatest sequence ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0, have gradient 0 and do not
            count in the mean.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.gspo([[-1.0, -2.0]], [[-1.1, -1.9]], 1.0)
        Array([[-1., -1.]], dtype=float32)

    Reference:
        Zheng et al. 2025, "Group Sequence Policy Optimization", eq. 5 and 7,
        computed as in eq. 14 and 15 (GSPO-token); the thresholds: section 5.1.
    """
    target, sampling = aligned(where, target_logprobs, sampling_logprobs=sampling_logprobs)
    tokens = jnp.maximum(count(target, where), 1)
    log_ratio = jnp.sum(target - sampling, axis=-1, keepdims=True) / tokens
    return gspo_token(
        target_logprobs,
        log_ratio,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        where=where,
    )


def gspo_token(
    target_logprobs: ArrayLike,
    sequence_log_ratios: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.9997,
    clip_high_threshold: ArrayLike = 1.0004,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`gspo` of tokens whose sequence's log-ratio is known, for sequences in any layout.

    ``r_t = exp(sg(sequence_log_ratios) + target_logprobs - sg(target_logprobs))``,
    ``loss = -min(r_t * A, clip(r_t, low, high) * A)``.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sequence_log_ratios: the mean of ``target_logprobs - sampling_logprobs`` over the token's
            sequence; same shape, or one that differs from it by dimensions of 1. No gradient
            passes through it.
        advantages: ``A``; same shape, or a scalar.
        clip_low_threshold: least sequence ratio; a scalar, or one per token.
        clip_high_threshold: greatest sequence ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in units of the advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Reference:
        Zheng et al. 2025, "Group Sequence Policy Optimization", section 4.3, eq. 14 and 15.
    """
    check_bounds(clip_low_threshold, clip_high_threshold)
    target, log_ratio, advantages, low, high = aligned(
        where,
        target_logprobs,
        sequence_log_ratios=sequence_log_ratios,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
    )
    # lp - sg(lp) is 0 with derivative 1; of an infinite logprob it would be NaN.
    finite = jnp.where(jnp.isfinite(target), target, 0)
    carrier = finite - jax.lax.stop_gradient(finite)
    log_ratio = jax.lax.stop_gradient(log_ratio) + carrier
    return finish(-clipped_surrogate(log_ratio, advantages, low, high), where, target_logprobs)
