"""From the losses of tokens to one number: what each token, and each sequence, weighs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, keep


def token_mean(losses: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """The mean over all unmasked tokens: every token weighs the same, long sequences more.

    ``sum(losses) / count(where)``; 0 if there are none.

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
    (losses,) = aligned(where, losses)
    sequences = losses.size // max(losses.shape[-1], 1)
    return jnp.sum(losses) / (max(sequences, 1) * jnp.asarray(max_length, losses.dtype))
