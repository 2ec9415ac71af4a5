"""From the losses of tokens to one number: what each token, and each sequence, weighs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, keep
from mintjax.losses._settings import check_count, check_settings


def token_mean(losses: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean over all unmasked tokens: every token weighs the same, long sequences more.

    ``sum(losses) / count(where)``; 0 if there are none.

    When to use it: DAPO's mean; long answers weigh more.

    What others do: TRL: bnpo and dapo; verl: token-mean.

    Args:
        losses: per token; any shape.
        where: same shape, boolean; which tokens count.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.token_mean([[1.0, 2.0], [3.0, 0.0]], where=[[True, True], [True, False]])
        Array(2., dtype=float32)

    Reference:
        Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        section 3.3.
    """
    (losses,) = aligned(where, losses)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(keep(jnp.ones_like(losses), where)), 1)


def sequence_mean(losses: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean over sequences of the mean over their tokens: every sequence weighs the same.

    ``mean_i(sum_t(losses_it) / count_i)``. A sequence that is masked whole is no sequence.

    When to use it: GRPO's mean; every answer weighs the same.

    What others do: TRL counts sequences that are masked whole; verl does not.

    Args:
        losses: per token: ``[..., T]``, the last axis along one sequence.
        where: same shape, boolean; which tokens count.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.sequence_mean([[1.0, 2.0], [3.0, 0.0]], where=[[True, True], [True, False]])
        Array(2.25, dtype=float32)

    Reference:
        Shao et al. 2024, "DeepSeekMath", eq. 3.
    """
    (losses,) = aligned(where, losses)
    tokens = count(losses, where)[..., 0]
    means = jnp.sum(losses, axis=-1) / jnp.maximum(tokens, 1)
    return jnp.sum(means) / jnp.maximum(jnp.sum((tokens > 0).astype(means.dtype)), 1)


def fixed_length_mean(
    losses: ArrayLike, max_length: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The sum over tokens, divided by the number of sequences and one fixed length.

    ``sum(losses) / (B * max_length)``: no token's weight depends on how long its sequence became.

    When to use it: Dr. GRPO's mean: no length weighs more or less.

    What others do: TRL divides by ``max_completion_length``; verl leaves sequences out that are
    masked whole.

    Args:
        losses: per token: ``[..., T]``, the last axis along one sequence; ``[T]`` is one sequence.
        max_length: the constant, such as the most tokens that may be sampled.
        where: same shape, boolean; which tokens count. Every sequence counts, masked whole or not.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.fixed_length_mean([[1.0, 2.0], [3.0, 0.0]], 4)
        Array(0.75, dtype=float32)

    Reference:
        Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective", section 3.2.
    """
    check_settings({"max_length": max_length}, of="fixed_length_mean")
    (losses,) = aligned(where, losses)
    sequences = losses.size // max(losses.shape[-1], 1)
    return jnp.sum(losses) / (max(sequences, 1) * jnp.asarray(max_length, losses.dtype))


def sequence_sum(losses: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean over sequences of the sum over their tokens: long sequences weigh more.

    ``mean_i(sum_t(losses_it))``. A sequence that is masked whole is no sequence.

    When to use it: the answer is one action, as in RLOO.

    What others do: verl: seq-mean-token-sum; TRL: luspo.

    Args:
        losses: per token: ``[..., T]``, the last axis along one sequence.
        where: same shape, boolean; which tokens count.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.sequence_sum([[1.0, 2.0], [3.0, 0.0]], where=[[True, True], [True, False]])
        Array(3., dtype=float32)

    Reference:
        verl's ``seq-mean-token-sum``; Ahmadian et al. 2024, "Back to Basics", where the action is
        the whole answer.
    """
    (losses,) = aligned(where, losses)
    present = (count(losses, where)[..., 0] > 0).astype(losses.dtype)
    return jnp.sum(losses) / jnp.maximum(jnp.sum(present), 1)


def prompt_mean(losses: ArrayLike, group_size: int, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean over prompts of the mean over all tokens that answer them.

    ``mean_g(sum_{i in g, t}(losses_it) / count_g)`` over groups of ``group_size`` sequences. A
    group that is masked whole is no group.

    When to use it: prompts shall weigh the same, however long their answers.

    What others do: DAPO's formula has this mean, its code :func:`token_mean`.

    Args:
        losses: per token, of shape ``[B, T]``, the last axis along one sequence; sequences that
            answer one prompt stand in a row.
        group_size: how many sequences answer one prompt.
        where: same shape, boolean; which tokens count.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit, or the sequences do not divide into groups.

    Example:
        >>> from mintjax import losses
        >>> losses.prompt_mean([[1.0, 2.0], [3.0, 0.0]], 2, where=[[True, True], [True, False]])
        Array(2., dtype=float32)

    Reference:
        Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", eq. 8,
        whose mean over tokens is within the expectation over prompts.
    """
    check_count(group_size, "group_size")
    (losses,) = aligned(where, losses)
    if losses.ndim != 2 or losses.shape[0] % group_size:
        raise ValueError(
            f"losses of shape {losses.shape} do not divide into groups of {group_size}"
        )
    tokens = count(losses, where).reshape(-1, group_size).sum(axis=1)
    means = losses.sum(axis=1).reshape(-1, group_size).sum(axis=1) / jnp.maximum(tokens, 1)
    present = (tokens > 0).astype(losses.dtype)
    return jnp.sum(means) / jnp.maximum(jnp.sum(present), 1)
