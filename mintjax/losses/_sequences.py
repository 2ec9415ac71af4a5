"""Policy losses whose ratio is that of a whole sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, finish, harmless_where_zero
from mintjax.losses._policy import gspo
from mintjax.losses._settings import check_bounds

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
        Zhao et al. 2025, "Geometric-Mean Policy Optimization" (arXiv:2507.20673), eq. 5 (equation
        number unconfirmed).
    """
    (wide,) = aligned(where, target_logprobs)  # 16 bits are too few for terms of a sum
    log_ratios = gmpo_log_ratios(
        wide,
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
    """Computes the clipped log-ratios of tokens that :func:`gmpo` takes the mean of, in any layout.

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
        Zhao et al. 2025, "Geometric-Mean Policy Optimization" (arXiv:2507.20673), eq. 5 (equation
        number unconfirmed).
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
        (authors unconfirmed).
    """
    (wide,) = aligned(where, target_logprobs)  # 16 bits are too few for terms of a sum
    tokens = gspo(
        wide,
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
