"""The importance-weighted objectives of a log-ratio that policy losses are made of."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from mintjax.losses._arrays import torch_clip


def ratio_surrogate(log_ratio: jax.Array, advantages: jax.Array) -> jax.Array:
    """Computes ``exp(log_ratio) * advantages``, 0 where that is ``inf * 0``."""
    return _exp_unless(_counts_for_nothing(log_ratio, advantages), log_ratio) * advantages


def clipped_surrogate(
    log_ratio: jax.Array, advantages: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """Computes ``min(r * A, clip(r, low, high) * A)`` with ``r = exp(log_ratio)``.

    Which of the two is the smaller is decided on values, and ``exp`` is differentiated only where
    the first one is: an overflowing ratio that is clipped has gradient 0, not ``0 * inf``.
    """
    ratio = jnp.exp(jax.lax.stop_gradient(log_ratio))
    clipped = jnp.where(advantages > 0, ratio > high, ratio < low)
    idle = clipped | _counts_for_nothing(log_ratio, advantages)
    unclipped = _exp_unless(idle, log_ratio) * advantages
    return jnp.where(clipped, torch_clip(ratio, low, high) * advantages, unclipped)


@jax.custom_jvp
def _exp_unless(idle: jax.Array, x: jax.Array) -> jax.Array:
    """Computes ``exp(x)``, and 1 without a gradient where ``idle``, even if ``exp(x)`` overflows.

    That of ``jnp.where(idle, 0, x)`` would be as safe, but a second exponential beside ``exp(x)``.
    """
    return jnp.where(idle, 1, jnp.exp(x))


@_exp_unless.defjvp
def _exp_unless_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any, Any], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
    value = _exp_unless(*primals)
    return value, value * jnp.where(primals[0], 0, tangents[1])


def _counts_for_nothing(log_ratio: jax.Array, advantages: jax.Array) -> jax.Array:
    """Marks advantages of 0 whose ratio overflows, or nearly does."""
    largest = float(cast("Any", jnp.finfo(log_ratio.dtype).max))
    return (advantages == 0) & (log_ratio > math.log(largest) - 1)
