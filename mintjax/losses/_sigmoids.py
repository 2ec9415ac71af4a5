"""The logistic function and its relatives, with values and slopes that keep their digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_LEAST = 2.0**-23


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
    """``1 / (1 + exp(-x))``.

    The slope of ``jax.nn.sigmoid`` is ``s * (1 - s)``, which is 0 in float32 from x = 17 on; this
    one's is ``sigmoid(x) * sigmoid(-x)``.
    """
    shrinking = jnp.exp(-jnp.abs(x))
    return jnp.where(x < 0, shrinking, jnp.ones_like(x)) / (1 + shrinking)


@sigmoid.defjvp
def _sigmoid_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    smaller = sigmoid(-jnp.abs(x))
    return sigmoid(x), dx * (smaller - smaller * smaller)


@jax.custom_jvp
def log_sigmoid(x: jax.Array) -> jax.Array:
    """``log(1 / (1 + exp(-x)))``, whose slope is ``sigmoid(-x)``."""
    return jnp.minimum(x, 0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


@log_sigmoid.defjvp
def _log_sigmoid_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return log_sigmoid(x), dx * sigmoid(-x)


def log1mexp(logprobs: jax.Array) -> jax.Array:
    """``log(1 - exp(logprobs))``: the log-probability of everything else.

    A logprob above ``-2**-23``, which is 0 within the rounding of float32, counts as ``-2**-23``,
    because a probability of 1 has no complement to take the logarithm of. The slope there is that
    at ``-2**-23``, so that a gradient still points away from it.
    """
    return _log1mexp(_below_certainty(logprobs))


def log_odds(logprobs: jax.Array) -> jax.Array:
    """``log(p / (1 - p))`` of ``logprobs = log p``, with certainty as in :func:`log1mexp`."""
    logprobs = _below_certainty(logprobs)
    return logprobs - _log1mexp(logprobs)


def _below_certainty(logprobs: jax.Array) -> jax.Array:
    return logprobs - jax.lax.stop_gradient(jnp.maximum(logprobs + _LEAST, 0))


@jax.custom_jvp
def _log1mexp(x: jax.Array) -> jax.Array:
    near = x > -0.6931472
    close = jnp.log(-jnp.expm1(jnp.where(near, x, -1)))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(near, close, far)


@_log1mexp.defjvp
def _log1mexp_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _log1mexp(x), dx * (-1 / jnp.expm1(-x))
