"""The logistic function and its relatives, with values and slopes that keep their digits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

_LEAST = 2.0**-23
# log 2, of which the first part is a float32.
_LOG_2_HIGH, _LOG_2_LOW = 0.6931471824645996, -1.904654323148236e-09
# log cosh(s / 2) / s**2 by powers of s**2, fitted at Chebyshev's nodes for s up to 1.4, to 2e-10.
_LOG_COSH = (
    0.125,
    -0.005208333022892475,
    0.0003472179523669183,
    -2.6338311727158725e-05,
    2.1154417026991723e-06,
    -1.6418660209183145e-07,
    8.880100210717501e-09,
)
# (exp(x) - 1 - x) / x**2 by powers of x, fitted in the same way for |x| up to log 2, to 4e-9.
_BEYOND_LINEAR = (
    0.4999999998843391,
    0.16666670037724846,
    0.04166667436619853,
    0.008332772544364129,
    0.0013888088292837626,
    0.00020074275560364713,
    2.5067747022932237e-05,
)


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
    """Computes ``1 / (1 + exp(-x))``.

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
    """Computes ``log(1 / (1 + exp(-x)))``, whose slope is ``sigmoid(-x)``."""
    size = jnp.abs(x)
    beyond = jnp.log1p(jnp.exp(-size))
    if x.dtype.itemsize > 4:
        return jnp.minimum(x, 0) - beyond
    # XLA's log1p is off by 2.5 ulp between 0.41 and 0.8. There log(sigmoid(x)) is taken as
    # x / 2 - log 2 - log cosh(x / 2), the last term as a polynomial of x**2. It rounds less than
    # log1p does up to 1.4, and on the side of larger losses up to 0.89.
    small = (x < 1.4) & (x > -0.89)
    square = jnp.where(small, size * size, 0)
    log_cosh = _polynomial(_LOG_COSH, square) * square
    near = (0.5 * x - _LOG_2_HIGH) - (_LOG_2_LOW + log_cosh)
    return jnp.where(small, near, jnp.minimum(x, 0) - beyond)


@log_sigmoid.defjvp
def _log_sigmoid_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return log_sigmoid(x), dx * sigmoid(-x)


def log1mexp(logprobs: jax.Array) -> jax.Array:
    """Computes ``log(1 - exp(logprobs))``: the log-probability of everything else.

    A logprob above ``-2**-23``, which is 0 within the rounding of float32, counts as ``-2**-23``,
    because a probability of 1 has no complement to take the logarithm of. The slope there is that
    at ``-2**-23``, so that a gradient still points away from it.
    """
    return _log1mexp(_below_certainty(logprobs))


def log_odds(logprobs: jax.Array) -> jax.Array:
    """Computes ``log(p / (1 - p))`` of ``log p``, with certainty as in :func:`log1mexp`."""
    logprobs = _below_certainty(logprobs)
    return logprobs - _log1mexp(logprobs)


def _below_certainty(logprobs: jax.Array) -> jax.Array:
    return logprobs - jax.lax.stop_gradient(jnp.maximum(logprobs + _LEAST, 0))


@jax.custom_jvp
def _log1mexp(x: jax.Array) -> jax.Array:
    near = x > -_LOG_2_HIGH
    close = jnp.log(-_expm1(jnp.where(near, x, -0.5)))
    far = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(near, close, far)


@_log1mexp.defjvp
def _log1mexp_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[jax.Array, jax.Array]:
    # The slope is -1 / (exp(-x) - 1), in which exp(-x) - 1 rounds to exp(-x) for the least
    # logprobs; of these it is taken as -exp(x) / (1 - exp(x)).
    (x,), (dx,) = primals, tangents
    near, far = x > -_LOG_2_HIGH, x < -9
    power = jnp.exp(jnp.where(far, x, -x))
    others = jnp.where(near, _expm1(jnp.where(near, -x, 0.5)), power - 1)
    odds = jnp.where(far, power, 1) / jnp.where(far, 1 - power, others)
    return _log1mexp(x), dx * -odds


def _expm1(x: jax.Array) -> jax.Array:
    """Computes ``exp(x) - 1`` for ``|x|`` up to log 2; XLA's was off by 6 ulp before JAX 0.12."""
    if x.dtype.itemsize > 4:
        return jnp.expm1(x)
    return x + x * x * _polynomial(_BEYOND_LINEAR, x)


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + coefficient
    return value
