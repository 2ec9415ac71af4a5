"""Reading of sequence scores, and the shapes that losses of their margins share."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, harmless_where_zero
from mintjax.losses._settings import known
from mintjax.losses._sigmoids import log_sigmoid


def gains(
    where: ArrayLike | None,
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    beta: ArrayLike,
    **others: ArrayLike,
) -> tuple[jax.Array, ...]:
    """Reads the scores of pairs and settings: the log-ratios of both answers, then the settings."""
    chosen, rejected, ref_chosen, ref_rejected, *rest = aligned(
        where,
        chosen_scores,
        rejected_scores=rejected_scores,
        ref_chosen_scores=ref_chosen_scores,
        ref_rejected_scores=ref_rejected_scores,
        beta=beta,
        **others,
    )
    return chosen - ref_chosen, rejected - ref_rejected, *rest


def margins(
    where: ArrayLike | None,
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    beta: ArrayLike,
    **others: ArrayLike,
) -> tuple[jax.Array, ...]:
    """Reads the scores of pairs and settings: ``beta`` times the margin, then the others.

    The margin is that over the reference, ``(chosen - ref_chosen) - (rejected - ref_rejected)``.
    """
    scores = chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores
    won, lost, strength, *rest = gains(where, *scores, beta, **others)
    return strength * (won - lost), *rest


def labels(desirable: ArrayLike, where: ArrayLike | None = None) -> jax.Array:
    """Reads labels of answers: 1 for a good one, 0 for a bad one, NaN for what is no label.

    Args:
        desirable: 1 or True for a good answer, 0, -1 or False for a bad one; any shape.
        where: which answers count, or None for all.

    Raises:
        ValueError: one is none of 1, 0 and -1 (or True and False).
    """
    given = desirable if isinstance(desirable, jax.Array) else np.asarray(desirable)
    numbers, mask = known(given), known(True if where is None else where)
    wrong = None if numbers is None or mask is None else ~np.isin(numbers, (-1, 0, 1)) & (mask != 0)
    if numbers is not None and wrong is not None and wrong.any():
        raise ValueError(
            f"desirable must be 1 (or True) for a good answer and 0 or -1 (or False) for a bad "
            f"one, not {np.broadcast_to(numbers, wrong.shape)[wrong][0]:g}"
        )
    if numbers is not None and mask is not None:
        return jnp.asarray(np.where(mask != 0, numbers, 0) > 0).astype(jnp.float32)
    signs = jnp.asarray(given).astype(jnp.float32)
    if where is not None:
        signs = jnp.where(as_mask(where, signs.shape), signs, 0)
    # What is traced cannot be refused, so that what is no label makes the loss NaN, which is.
    return jnp.where(jnp.sign(signs) == signs, (signs > 0).astype(jnp.float32), jnp.nan)


def smoothed(logits: jax.Array, smoothing: jax.Array) -> jax.Array:
    """Computes ``-(1 - e) * log sigmoid(z) - e * log sigmoid(-z)``."""
    wrong = harmless_where_zero(smoothing, log_sigmoid(-logits))
    return -((1 - smoothing) * log_sigmoid(logits) + smoothing * wrong)


def ramp(x: jax.Array) -> jax.Array:
    """Computes ``max(0, x)``, with slope 0 at 0."""
    return jnp.where(x > 0, x, jnp.zeros_like(x))


def held(exponent: jax.Array) -> jax.Array:
    """Holds an exponent at most at 9/10 of what overflows (80 in float32)."""
    largest = 0.9 * math.log(float(cast("Any", jnp.finfo(exponent.dtype).max)))
    return jnp.where(exponent > largest, largest, exponent)
