"""Policy losses, weights and masks of whole sequences."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import (
    aligned,
    check_bounds,
    count,
    finish,
    harmless_where_zero,
    keep,
)
from mintjax.losses._builtin import ppo
from mintjax.losses._policy import gspo
from mintjax.losses._surrogates import ratio_surrogate

Level: TypeAlias = Literal["token", "sequence_sum", "sequence_mean"]
"""Of which log-ratio :func:`importance_weights` takes the exponential: each token's, the sum over
its sequence, or the mean over its sequence."""

# The bounds of a sequence's log-ratio in VESPO, of which the lower one is log(1e-8).
_LEAST, _GREATEST = -18.420681, 20.0


def gmpo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.67,
    clip_high_threshold: ArrayLike = 1.49,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Geometric-mean policy optimisation: one ratio per sequence, of clipped token ratios.

    ``loss = -exp(mean_t(l_t)) * A`` over the unmasked tokens of the last axis, with ``l_t`` the
    log-ratio ``target_logprobs - sampling_logprobs``, at most ``log high`` where ``A > 0`` and at
    least ``log low`` where ``A < 0``.

    When to use it: outlier tokens upset the arithmetic mean; the geometric mean takes wide bounds.

    What others do: TRL (experimental) and verl ("geo_mean") give the bounds as distances of
    log-ratios, 0.4 in the paper: ``exp(-0.4)`` is 0.67 and ``exp(0.4)`` 1.49 here. verl takes the
    mean of the advantages of a sequence.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats: ``[..., T]``, the
            last axis along one sequence.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A`` of each sequence, given for each of its tokens: same shape, or
            ``[..., 1]``, or a scalar.
        clip_low_threshold: least ratio of a token; a scalar, or one per token.
        clip_high_threshold: greatest ratio of a token; a scalar, or one per token.
        where: same shape, boolean; positions that are False have gradient 0 and do not count.

    Returns:
        The loss of each sequence, in units of the advantage: ``[...]``, dtype of
        ``target_logprobs``. It is 0 for a sequence that is masked whole.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.gmpo([[-1.0, -2.0]], [[-1.1, -3.0]], 1.0)
        Array([-1.283], dtype=float32)

    Reference:
        Zhao et al. 2025, "Geometric-Mean Policy Optimization" (arXiv:2507.20673), eq. 5 (the
        equation's number is not confirmed).
    """
    log_ratios = gmpo_log_ratios(
        target_logprobs,
        sampling_logprobs,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        where=where,
    )
    held, advantages = aligned(where, log_ratios, advantages=advantages)
    tokens = jnp.maximum(count(held, where)[..., 0], 1)
    advantage = jnp.sum(advantages, axis=-1) / tokens
    ratio = jnp.exp(jnp.sum(held, axis=-1) / tokens)
    return finish(-harmless_where_zero(advantage, ratio) * advantage, None, target_logprobs)


def gmpo_log_ratios(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.67,
    clip_high_threshold: ArrayLike = 1.49,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The clipped log-ratios of tokens that :func:`gmpo` takes the mean of, in any layout.

    ``l = min(d, log high)`` where ``A > 0``, ``max(d, log low)`` where ``A < 0`` and ``d``
    elsewhere, with ``d = target_logprobs - sampling_logprobs``.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or a scalar.
        clip_low_threshold: least ratio; a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The log-ratio of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Reference:
        Zhao et al. 2025, "Geometric-Mean Policy Optimization" (arXiv:2507.20673), eq. 5 (the
        equation's number is not confirmed).
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
    log_ratio = target - sampling
    least, greatest = jnp.log(jnp.where(low > 0, low, 1)), jnp.log(jnp.where(high > 0, high, 1))
    above = (advantages > 0) & (log_ratio > greatest)
    below = (advantages < 0) & (low > 0) & (log_ratio < least)
    held = jnp.where(above, greatest, jnp.where(below, least, log_ratio))
    return finish(held, where, target_logprobs)


def luspo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    clip_low_threshold: ArrayLike = 0.9997,
    clip_high_threshold: ArrayLike = 1.0004,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Length-unbiased sequence policy optimisation: :func:`gspo`, summed over each sequence.

    ``loss = sum_t(-min(r_t * A, clip(r_t, low, high) * A))`` with the ratios ``r_t`` of
    :func:`gspo`: a sequence of T tokens weighs T times its loss under GSPO, whose mean over tokens
    favours short answers.

    When to use it: answers grow shorter under GSPO.

    What others do: TRL ("luspo") has this form and takes the mean over sequences.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats: ``[..., T]``, the
            last axis along one sequence.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or ``[..., 1]``, or a scalar.
        clip_low_threshold: least sequence ratio; a scalar, or one per token.
        clip_high_threshold: greatest sequence ratio; a scalar, or one per token.
        where: same shape, boolean; positions that are False have gradient 0 and do not count.

    Returns:
        The loss of each sequence, in units of the advantage: ``[...]``, dtype of
        ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Example:
        >>> from mintjax import losses
        >>> losses.luspo([[-1.0, -2.0]], [[-1.1, -1.9]], 1.0)
        Array([-2.], dtype=float32)

    Reference:
        Liu et al. 2026, "Length-Unbiased Sequence Policy Optimization", as TRL's paper index has it
        (authors and equation are not confirmed).
    """
    tokens = gspo(
        target_logprobs,
        sampling_logprobs,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        where=where,
    )
    (values,) = aligned(where, tokens)
    return finish(jnp.sum(values, axis=-1), None, target_logprobs)


def vespo(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    positive_power: ArrayLike = 2.0,
    positive_decay: ArrayLike = 3.0,
    negative_power: ArrayLike = 3.0,
    negative_decay: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Variational sequence-level soft policy optimisation: a gamma-shaped weight per sequence.

    ``loss = -sg(w**k * exp(lambda * (1 - w))) * target_logprobs * A`` where ``log w`` is the sum
    over the unmasked tokens of the last axis of ``target_logprobs - sampling_logprobs``, held
    within [-18.42, 20], ``sg`` the stop-gradient, and the power ``k`` and the decay ``lambda`` are
    the positive ones where ``A >= 0``, the negative ones elsewhere. The weight is 1 at ``w = 1``
    and fades to both sides.

    When to use it: samples that are many steps old, or asynchronous training.

    What others do: TRL ("vespo") has this form, and holds each token's log-ratio within 20 besides.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats: ``[..., T]``, the
            last axis along one sequence.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or ``[..., 1]``, or a scalar.
        positive_power: ``k`` where the advantage is not negative; a scalar, or one per token.
        positive_decay: ``lambda`` there; a scalar, or one per token.
        negative_power: ``k`` where the advantage is negative; a scalar, or one per token.
        negative_decay: ``lambda`` there; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.vespo([[-1.0, -2.0]], [[-1.1, -1.9]], 1.0)
        Array([[1., 2.]], dtype=float32)

    Reference:
        Shen et al. 2026, "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable
        Off-Policy LLM Training" (arXiv:2602.10693), in the form of TRL's implementation.
    """
    target, sampling = aligned(where, target_logprobs, sampling_logprobs=sampling_logprobs)
    log_ratio = jnp.sum(target - sampling, axis=-1, keepdims=True)
    return vespo_token(
        target_logprobs,
        log_ratio,
        advantages,
        positive_power=positive_power,
        positive_decay=positive_decay,
        negative_power=negative_power,
        negative_decay=negative_decay,
        where=where,
    )


def vespo_token(
    target_logprobs: ArrayLike,
    sequence_log_ratios: ArrayLike,
    advantages: ArrayLike,
    *,
    positive_power: ArrayLike = 2.0,
    positive_decay: ArrayLike = 3.0,
    negative_power: ArrayLike = 3.0,
    negative_decay: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`vespo` of tokens whose sequence's log-ratio is known, for sequences in any layout.

    ``loss = -sg(w**k * exp(lambda * (1 - w))) * target_logprobs * A`` with
    ``log w = sequence_log_ratios``.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sequence_log_ratios: the sum of ``target_logprobs - sampling_logprobs`` over the token's
            sequence; same shape, or one that differs from it by dimensions of 1. No gradient
            passes.
        advantages: ``A``; same shape, or a scalar.
        positive_power: ``k`` where the advantage is not negative; a scalar, or one per token.
        positive_decay: ``lambda`` there; a scalar, or one per token.
        negative_power: ``k`` where the advantage is negative; a scalar, or one per token.
        negative_decay: ``lambda`` there; a scalar, or one per token.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times advantage; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Reference:
        Shen et al. 2026, "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable
        Off-Policy LLM Training" (arXiv:2602.10693), in the form of TRL's implementation.
    """
    target, log_ratio, advantages, up_k, up_decay, down_k, down_decay = aligned(
        where,
        target_logprobs,
        sequence_log_ratios=sequence_log_ratios,
        advantages=advantages,
        positive_power=positive_power,
        positive_decay=positive_decay,
        negative_power=negative_power,
        negative_decay=negative_decay,
    )
    power = jnp.where(advantages >= 0, up_k, down_k)
    decay = jnp.maximum(jnp.where(advantages >= 0, up_decay, down_decay), 1e-4)
    held = jnp.clip(jax.lax.stop_gradient(log_ratio), _LEAST, _GREATEST)
    weight = jnp.exp(power * held - decay * jnp.expm1(held))
    coefficients = weight * advantages
    values = -coefficients * harmless_where_zero(coefficients, target)
    return finish(values, where, target_logprobs)


def importance_weights(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    *,
    level: Level = "token",
    lower: ArrayLike = 0.0,
    upper: ArrayLike = 2.0,
    drop: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Importance weights of tokens or sequences, truncated or dropped outside an interval.

    ``w = exp(d)`` with ``d`` each token's ``target_logprobs - sampling_logprobs``, or its sum or
    mean over the unmasked tokens of the last axis; then ``clip(w, lower, upper)``, or, with
    ``drop``, 0 where ``w`` lies outside.

    When to use it: to multiply any policy loss by, where sampler and trainer differ (another
    engine, another precision) beside what the loss's own ratio measures. The sum is unbiased and of
    high variance; the mean (a geometric mean of ratios) is biased and of low variance.

    What others do: verl and TRL truncate from above only, or drop on both sides (IcePop); they hold
    the log-ratio within 20 first.

    Args:
        target_logprobs: log-probabilities under the policy that the tokens stand for, in nats:
            ``[..., T]``.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        level: see :data:`Level`.
        lower: least weight; a scalar, or one per token.
        upper: greatest weight; a scalar, or one per token.
        drop: whether weights outside become 0 instead of the bound.
        where: same shape, boolean; positions that are False give 0 and do not count.

    Returns:
        The weight of each token, which has no unit: shape and dtype of ``target_logprobs``. No
        gradient passes.

    Raises:
        ValueError: the shapes do not fit, there is no such level, or ``lower`` is above ``upper``.

    Example:
        >>> from mintjax import losses
        >>> losses.importance_weights([-1.0, -1.0], [-1.5, -3.0], level="sequence_mean", upper=5.0)
        Array([3.49, 3.49], dtype=float32)

    Reference:
        Ionides 2008, "Truncated Importance Sampling"; Yao et al. 2025, "Your Efficient RL Framework
        Secretly Brings You Off-Policy RL Training".
    """
    if level not in ("token", "sequence_sum", "sequence_mean"):
        raise ValueError(f"level must be token, sequence_sum or sequence_mean, not {level!r}")
    check_bounds(lower, upper, ("lower", "upper"))
    target, sampling, low, high = aligned(
        where, target_logprobs, sampling_logprobs=sampling_logprobs, lower=lower, upper=upper
    )
    log_ratio = jax.lax.stop_gradient(target - sampling)
    if level != "token":
        summed = jnp.sum(log_ratio, axis=-1, keepdims=True)
        tokens = jnp.maximum(count(log_ratio, where), 1)
        summed = summed / tokens if level == "sequence_mean" else summed
        log_ratio = jnp.broadcast_to(summed, log_ratio.shape)
    weight = jnp.exp(log_ratio)
    inside = (weight >= low) & (weight <= high)
    bounded = jnp.where(inside, weight, 0) if drop else jnp.clip(weight, low, high)
    return finish(bounded, where, target_logprobs)


def off_policy_mask(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike,
    *,
    divergence_threshold: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Marks the sequences worth learning from: those that are good, or still near the policy.

    A sequence is kept where ``A >= 0`` or ``mean_t(sampling_logprobs - target_logprobs) <=
    threshold``, over the unmasked tokens of the last axis.

    When to use it: as ``where`` of a policy loss on samples that are some steps old: bad answers
    that the model would no longer write teach it little, and upset it.

    What others do: TRL (``off_policy_mask_threshold``) has this form; a token that the sampler
    could not score counts as no divergence there.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats: ``[..., T]``, the
            last axis along one sequence.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: ``A``; same shape, or ``[..., 1]``, or a scalar.
        divergence_threshold: the paper's delta, in nats per token; a scalar.
        where: same shape, boolean; which tokens count.

    Returns:
        One boolean per token, which has no unit and no gradient: the shape of ``target_logprobs``.
        Masked positions are False.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.off_policy_mask([[-2.0], [-2.0]], [[-1.0], [-1.0]], [[1.0], [-1.0]])
        Array([[ True],
               [False]], dtype=bool)

    Reference:
        DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
        the section on off-policy sequence masking.
    """
    target, sampling, advantages, threshold = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        divergence_threshold=divergence_threshold,
    )
    away = jax.lax.stop_gradient(sampling - target)
    mean = jnp.sum(away, axis=-1, keepdims=True) / jnp.maximum(count(away, where), 1)
    return keep((advantages >= 0) | (mean <= threshold), where)


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
        Models" (arXiv:2505.22617), the definition of Clip-Cov (the equation's number is not
        confirmed).
    """
    values = ppo(
        target_logprobs,
        sampling_logprobs,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        where=where,
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
    chosen = _smallest(jnp.where(eligible, noise, jnp.inf), present, share) & eligible
    (free,) = aligned(where, values)
    return finish(jnp.where(chosen, 0, free), where, target_logprobs)


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
        Models" (arXiv:2505.22617), the definition of KL-Cov (the equation's number is not
        confirmed).
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
    """Each token's part in the covariance of logprobs and advantages, without a gradient."""
    tokens = jnp.maximum(jnp.sum(keep(jnp.ones_like(target), where)), 1)
    off_mean = jax.lax.stop_gradient(target - jnp.sum(target) / tokens)
    return off_mean * jax.lax.stop_gradient(advantages - jnp.sum(advantages) / tokens)


def _smallest(values: jax.Array, present: jax.Array, share: float) -> jax.Array:
    """Marks the ``max(1, floor(share * N))`` smallest values, N the number of those present."""
    ranks = jnp.argsort(jnp.argsort(values.reshape(-1))).reshape(values.shape)
    number = jnp.maximum(jnp.floor(share * jnp.sum(present.astype(jnp.float32))), 1)
    return ranks < number
