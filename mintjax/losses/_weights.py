"""Importance weights and masks for samples of another policy."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, finish, keep
from mintjax.losses._settings import check_bounds

Level: TypeAlias = Literal["token", "sequence_sum", "sequence_mean"]
"""Of which log-ratio :func:`importance_weights` takes the exponential: each token's, the sum over
its sequence, or the mean over its sequence."""


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
    """Computes importance weights, truncated or dropped outside an interval.

    ``w = exp(d)`` with ``d`` each token's ``target_logprobs - sampling_logprobs``, or its sum or
    mean over the unmasked tokens of the last axis; then ``clip(w, lower, upper)``, or, with
    ``drop``, 0 where ``w`` lies outside.

    When to use it: to multiply any policy loss by, where sampler and trainer differ (another
    engine, another precision) beside what the loss's own ratio measures. The sum is unbiased and of
    high variance; the mean (a geometric mean of ratios) is biased and of low variance.

    What others do: TRL truncates or drops on both sides, tokens or sums over sequences; by default
    it drops sequences whose ratio is above 3. verl truncates at 2 from above, or drops on both
    sides (IcePop), and holds the log-ratio within 20 first.

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
        DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", eq.
        9.
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
