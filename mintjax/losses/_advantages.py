"""Advantages from the rewards of a group: several answers to one prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, count, finish, keep


def group_mean_centred(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Reward less the mean of its group.

    ``A_i = r_i - mean(r)``

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        where: same shape, boolean; answers that are False get 0 and do not count in the mean.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.group_mean_centred([1.0, 0.0, 0.0, 1.0])
        Array([ 0.5, -0.5, -0.5,  0.5], dtype=float32)

    Reference:
        Shao et al. 2024, "DeepSeekMath", section 4.1.2, without the division.
    """
    return finish(centred(rewards, where), where, rewards)


def rloo(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Reward less the mean of the others in its group: REINFORCE, leave one out.

    ``A_i = r_i - mean_{j != i}(r_j) = G / (G - 1) * (r_i - mean(r))``. A group of one has nothing
    to compare with and gets 0.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        where: same shape, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.rloo([1.0, 0.0, 0.0, 0.0])
        Array([ 1.   , -0.333, -0.333, -0.333], dtype=float32)

    Reference:
        Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; for language models
        Ahmadian et al. 2024, "Back to Basics".
    """
    above = centred(rewards, where)
    answers = count(above, where)
    return finish(above * (answers / jnp.maximum(answers - 1, 1)), where, rewards)


def grpo(
    rewards: ArrayLike,
    *,
    scale_by_std: bool = True,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Group-relative advantage: reward less the group's mean, over its standard deviation.

    ``A_i = (r_i - mean(r)) / (std(r) + epsilon)``, the standard deviation that of a sample (over
    ``G - 1``), as the common implementations take it. A group whose rewards agree gets 0.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        scale_by_std: divide by the standard deviation; without, questions of any spread of rewards
            count alike.
        epsilon: keeps the quotient finite, in units of the reward.
        where: same shape, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages: in standard deviations, or in units of the reward; shape and dtype of
        ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.grpo([1.0, 0.0])
        Array([ 0.707, -0.707], dtype=float32)

    Reference:
        Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
        Language Models", section 4.1.2.
    """
    above = centred(rewards, where)
    if scale_by_std:
        above = above / (sample_std(above, where) + epsilon)
    return finish(above, where, rewards)


def dr_grpo(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """GRPO "done right": :func:`group_mean_centred`, under its paper's name.

    ``A_i = r_i - mean(r)``: no division by the standard deviation, which weighs easy and hard
    questions up. The other half of the method is an aggregation that does not divide by a
    sequence's own length: :func:`fixed_length_mean`.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        where: same shape, boolean; answers that are False get 0 and do not count in the mean.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Reference:
        Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", section 3.2.
    """
    return group_mean_centred(rewards, where=where)


def centred(rewards: ArrayLike, where: ArrayLike | None) -> jax.Array:
    """Subtracts the mean of each group; exactly 0 where the rewards of a group agree.

    The group's largest reward is subtracted first, because the rounding error of a mean is relative
    to the rewards: 64 rewards of 250.3 would be off from their mean by 1.5e-5, and a division by
    their standard deviation, which is as small, would make an advantage of it.
    """
    (given,) = aligned(where, rewards)
    present = given if where is None else jnp.where(as_mask(where, given.shape), given, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(present, axis=-1, keepdims=True, initial=-jnp.inf))
    below = keep(given - jnp.where(jnp.isfinite(top), top, 0), where)
    return keep(below - _sum(below) / jnp.maximum(count(below, where), 1), where)


def sample_std(above: jax.Array, where: ArrayLike | None) -> jax.Array:
    """The standard deviation of each group, over ``G - 1``, of rewards less their mean."""
    variance = _sum(above * above) / jnp.maximum(count(above, where) - 1, 1)
    # The derivative of a square root at 0 is infinite; the advantages there are 0 and stay so.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=-1, keepdims=True)
