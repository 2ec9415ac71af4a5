"""Advantages from the rewards of a group: several answers to one prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, count, finish, keep, too_large_to_square
from mintjax.losses._settings import check_settings


def group_mean_centred(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Reward less the mean of its group.

    ``A_i = r_i - mean(r)``

    When to use it: several answers per prompt, without a critic.

    What others do: the same everywhere, but for a group of one: 0 here, its raw reward in verl and
    SkyRL.

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

    When to use it: as :func:`group_mean_centred`, without the bias that an answer's own reward
    brings.

    What others do: verl and TRL have this form; a group of one gets its raw reward there.

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

    When to use it: prompts of different difficulty, whose rewards shall weigh alike.

    What others do: TRL's epsilon is 1e-4, OpenRLHF's 1e-9; all divide by ``G - 1``. Rounding may
    give a group that agrees an advantage there.

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
    check_settings({"epsilon": epsilon}, of="grpo")
    above = centred(rewards, where)
    if scale_by_std:
        above = above / (sample_std(above, where) + epsilon)
    return finish(above, where, rewards)


def dr_grpo(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """GRPO "done right": :func:`group_mean_centred`, under its paper's name.

    ``A_i = r_i - mean(r)``: no division by the standard deviation, which weighs easy and hard
    questions up. The other half of the method is an aggregation that does not divide by a
    sequence's own length: :func:`fixed_length_mean`.

    When to use it: the division by the standard deviation makes too much of prompts that are nearly
    solved or hopeless.

    What others do: TRL and verl offer it as GRPO without scaling.

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


def maxrl(
    rewards: ArrayLike, *, epsilon: float = 1e-6, where: ArrayLike | None = None
) -> jax.Array:
    """Reward less the mean of its group, over that mean: maximum likelihood by reinforcement.

    ``A_i = (r_i - mean(r)) / (mean(r) + epsilon)``: with rewards of 0 and 1, the gradient is that
    of the log of the probability of success instead of the probability itself.

    When to use it: rewards of 0 and 1, and prompts that the model seldom solves, which weigh more.

    What others do: SkyRL ("maxrl") has this form; it gives a group of one its raw reward.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        epsilon: keeps the quotient finite, in units of the reward.
        where: same shape, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages, in units of the mean reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.maxrl([1.0, 0.0, 0.0, 0.0])
        Array([ 3.0 , -1.0, -1.0, -1.0], dtype=float32)

    Reference:
        Tajwar et al. 2026, "Maximum Likelihood Reinforcement Learning", in the form of SkyRL's
        implementation (authors unconfirmed).
    """
    check_settings({"epsilon": epsilon}, of="maxrl")
    above = centred(rewards, where)
    (given,) = aligned(where, rewards)
    mean = _sum(given) / jnp.maximum(count(given, where), 1)
    scale = mean + epsilon
    return finish(above / jnp.where(scale == 0, 1, scale), where, rewards)


def opo(rewards: ArrayLike, lengths: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Reward less the mean of its group weighed by length: the baseline of least variance.

    ``A_i = r_i - sum_j(l_j * r_j) / sum_j(l_j)`` with ``l`` the lengths.

    When to use it: on-policy, with answers of very different lengths, whose gradients are about as
    large as they are long.

    What others do: verl ("opo") has this form; it gives a group of one its raw reward.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        lengths: number of tokens of each answer; same shape.
        where: same shape, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.opo([1.0, 0.0], [30.0, 10.0])
        Array([ 0.25, -0.75], dtype=float32)

    Reference:
        Hao et al. 2025, "On-Policy RL with Optimal Reward Baseline" (arXiv:2505.23585), the optimal
        baseline.
    """
    above, tokens = aligned(where, centred(rewards, where), lengths=lengths)
    baseline = _sum(tokens * above) / jnp.maximum(_sum(tokens), 1)
    return finish(above - baseline, where, rewards)


def pass_at_k(
    rewards: ArrayLike,
    *,
    scale_by_std: bool = True,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Advantage of the best answer of a group over the second best; 0 for the others.

    ``A_i = (r_i - second largest r) / (std(r) + epsilon)`` for the largest reward, the first of
    several; 0 elsewhere: the gradient of the expected maximum, leave one out.

    When to use it: only the best of k answers counts, as in search or with a verifier.

    What others do: verl ("grpo_passk") has this form and refuses groups of one, which get 0 here.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        scale_by_std: divide by the standard deviation of the group, over ``G - 1``.
        epsilon: keeps the quotient finite, in units of the reward.
        where: same shape, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.pass_at_k([1.0, 0.0, 3.0], scale_by_std=False)
        Array([0., 0., 2.], dtype=float32)

    Reference:
        Tang et al. 2025, "Optimizing Language Models for Inference Time Objectives using
        Reinforcement Learning" (arXiv:2503.19595), the leave-one-out form for pass@k.
    """
    check_settings({"epsilon": epsilon}, of="pass_at_k")
    above = centred(rewards, where)
    present = above == above if where is None else as_mask(where, above.shape)
    ranked = jnp.where(present, above, -jnp.inf)
    best = jnp.argmax(ranked, axis=-1, keepdims=True)
    won = jax.lax.broadcasted_iota(best.dtype, above.shape, above.ndim - 1) == best
    second = jnp.max(jnp.where(won, -jnp.inf, ranked), axis=-1, keepdims=True, initial=-jnp.inf)
    lead = jnp.where(jnp.isfinite(second), above - jnp.where(jnp.isfinite(second), second, 0), 0)
    if scale_by_std:
        lead = lead / (sample_std(above, where) + epsilon)
    return finish(jnp.where(won, lead, 0), where, rewards)


def remax(
    rewards: ArrayLike, greedy_rewards: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Reward less that of the greedy answer to the same prompt.

    ``A_i = r_i - greedy_rewards_i``

    When to use it: one answer per prompt, and a greedy one beside it; no group is needed.

    What others do: verl ("remax") sums per-token rewards to the end of the answer first, as
    :func:`discounted_returns` does.

    Args:
        rewards: one per answer; any shape.
        greedy_rewards: of the greedy answer to the same prompt; same shape, or a scalar.
        where: same shape, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.remax([1.0, 0.0], [0.5, 0.5])
        Array([ 0.5, -0.5], dtype=float32)

    Reference:
        Li et al. 2023, "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for
        Aligning Large Language Models", its algorithm.
    """
    given, greedy = aligned(where, rewards, greedy_rewards=greedy_rewards)
    return finish(given - greedy, where, rewards)


def gdpo(
    rewards: ArrayLike,
    weights: ArrayLike = 1.0,
    *,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Weighted sum of the advantages of several rewards, each normalised in its group by itself.

    ``A_i = sum_k(weights_k * grpo(r_k)_i)``: a reward of large scale does not drown the others. The
    method whitens the result over the batch: :func:`whiten`.

    When to use it: several rewards per answer, such as correctness, format and length.

    What others do: verl ("gdpo") has this form, with the whitening over all tokens.

    Args:
        rewards: of shape ``[K, ..., G]``: K rewards, the last axis along one group.
        weights: one per reward: ``[K]``, or a scalar.
        epsilon: keeps the quotient finite, in units of the reward.
        where: of shape ``[..., G]``, boolean; answers that are False get 0 and do not count.

    Returns:
        The advantages, in standard deviations, which have no unit: ``[..., G]``, dtype of
        ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.gdpo([[1.0, 0.0], [300.0, 100.0]], [1.0, 0.5])
        Array([ 1.061, -1.061], dtype=float32)

    Reference:
        Liu et al. 2026, "GDPO: Group reward-Decoupled Normalization Policy Optimization for
        Multi-reward RL Optimization" (arXiv:2601.05242), steps 1 and 2.
    """
    given = jnp.asarray(rewards)
    if given.ndim < 2:
        raise ValueError(f"rewards must be [K, ..., G], not of shape {given.shape}")
    if where is not None:
        where = jnp.broadcast_to(as_mask(where, given.shape[1:]), given.shape)
    each = grpo(given, epsilon=epsilon, where=where)
    scale = jnp.asarray(weights).astype(each.dtype)
    if scale.ndim and scale.shape != given.shape[:1]:
        raise ValueError(f"weights has shape {scale.shape}; there are {given.shape[0]} rewards")
    return jnp.sum(each * scale.reshape(*scale.shape, *(1,) * (each.ndim - scale.ndim)), axis=0)


def group_varies(rewards: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Marks the groups whose rewards differ: those that teach something.

    ``max(r) > min(r)`` within the group, for each of its answers.

    When to use it: to drop prompts that all answers solve or none does (DAPO's dynamic sampling),
    as ``where`` of a loss or to draw others in their place.

    What others do: TRL, verl and SkyRL drop groups by their standard deviation, whose rounding may
    keep one that agrees.

    Args:
        rewards: one per answer: ``[..., G]``, the last axis along one group.
        where: same shape, boolean; answers that are False are False and do not count.

    Returns:
        One boolean per answer, which has no unit: the shape of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.group_varies([[1.0, 0.0], [1.0, 1.0]])
        Array([[ True,  True],
               [False, False]], dtype=bool)

    Reference:
        Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        section 3.2.
    """
    above = centred(rewards, where)
    varies = jnp.any(above != 0, axis=-1, keepdims=True)
    return keep(jnp.broadcast_to(varies, above.shape), where)


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
    """Computes the standard deviation of each group, over ``G - 1``, of rewards less their mean."""
    scale = too_large_to_square(above, axis=-1)
    scaled = above / scale
    variance = _sum(scaled * scaled) / jnp.maximum(count(above, where) - 1, 1)
    # The derivative of a square root at 0 is infinite; the advantages there are 0 and stay so.
    return scale * jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=-1, keepdims=True)
