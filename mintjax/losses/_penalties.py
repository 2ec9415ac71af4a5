"""Regularisers: what a policy pays for leaving a reference or losing its entropy, per token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish


def kl_k1(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The plain estimator of KL(model || reference) from the model's own samples.

    ``k1 = target_logprobs - ref_logprobs``. Unbiased, of high variance, negative half of the time.
    As a loss it does nothing on average: its gradient on the model's own samples has mean 0. Use
    :func:`kl_k2` there, or put ``-beta * k1`` into the advantages.

    Args:
        target_logprobs: log-probabilities of sampled tokens under the model, in nats; any shape.
        ref_logprobs: of the same tokens under the reference; same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The estimate of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_k1([-1.0, -1.0], [-1.0, -2.0])
        Array([0., 1.], dtype=float32)

    Reference:
        Schulman 2020, "Approximating KL Divergence", k1.
    """
    target, reference = aligned(where, target_logprobs, ref_logprobs=ref_logprobs)
    return finish(target - reference, where, target_logprobs)


def kl_k2(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The squared estimator of KL(model || reference): the one whose gradient is the KL's.

    ``k2 = (target_logprobs - ref_logprobs)**2 / 2``. Biased and never negative; its gradient on the
    model's own samples is, on average, that of KL(model || reference).

    Args:
        target_logprobs: log-probabilities of sampled tokens under the model, in nats; any shape.
        ref_logprobs: of the same tokens under the reference; same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The estimate of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_k2([-1.0, -1.0], [-1.0, -2.0])
        Array([0. , 0.5], dtype=float32)

    Reference:
        Schulman 2020, "Approximating KL Divergence", k2; its gradient: Tang & Munos 2025, "On a few
        pitfalls in KL divergence gradient estimation for RL".
    """
    target, reference = aligned(where, target_logprobs, ref_logprobs=ref_logprobs)
    difference = target - reference
    return finish(0.5 * difference * difference, where, target_logprobs)


def kl_k3(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The low-variance estimator of KL(model || reference) from the model's own samples.

    ``k3 = exp(d) - 1 - d`` with ``d = ref_logprobs - target_logprobs``. Unbiased and never
    negative; its gradient on the model's own samples is, on average, that of
    KL(reference || model). Small ``d`` keep their digits: the value is a series there.

    Args:
        target_logprobs: log-probabilities of sampled tokens under the model, in nats; any shape.
        ref_logprobs: of the same tokens under the reference; same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The estimate of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_k3([-1.0, -1.0], [-1.0, -2.0])
        Array([0.   , 0.368], dtype=float32)

    Reference:
        Schulman 2020, "Approximating KL Divergence", k3; Shao et al. 2024, "DeepSeekMath", eq. 4.
    """
    target, reference = aligned(where, target_logprobs, ref_logprobs=ref_logprobs)
    return finish(exp_beyond_linear(reference - target), where, target_logprobs)


def sampled_entropy(target_logprobs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """An estimate of the policy's entropy from its own samples; not the entropy.

    ``estimate = -target_logprobs``. The entropy of a token's distribution needs every logprob; this
    needs only the sampled one and is right on average. It is a number to watch: as a loss it does
    nothing on average, for its gradient on the model's own samples has mean 0. To hold the entropy
    up by gradient, add ``kl_k2(target_logprobs, 0.0)``, whose gradient is, on average, that of
    the negative entropy.

    Args:
        target_logprobs: log-probabilities of sampled tokens under the model, in nats; any shape.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The estimate of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.sampled_entropy([-0.5, -2.0])
        Array([0.5, 2. ], dtype=float32)

    Reference:
        Williams & Peng 1991, "Function Optimization Using Connectionist Reinforcement Learning
        Algorithms".
    """
    (target,) = aligned(where, target_logprobs)
    return finish(-target, where, target_logprobs)


def l2_to_reference(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Squared distance of logprobs from the reference's.

    ``loss = (target_logprobs - ref_logprobs)**2``

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        ref_logprobs: of the same tokens under the reference; same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats squared; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.l2_to_reference([-1.0, -1.0], [-1.0, -2.0])
        Array([0., 1.], dtype=float32)

    Reference:
        Kimi Team 2025, "Kimi k1.5: Scaling Reinforcement Learning with LLMs", section 2.3.2, where
        it regularises sequences.
    """
    target, reference = aligned(where, target_logprobs, ref_logprobs=ref_logprobs)
    difference = target - reference
    return finish(difference * difference, where, target_logprobs)


@jax.custom_jvp
def exp_beyond_linear(x: jax.Array) -> jax.Array:
    """``exp(x) - 1 - x``, to a few units in the last place for every x; derivative ``expm1(x)``."""
    small = jnp.abs(x) < 1
    near = jnp.where(small, x, 0)
    series = jnp.ones_like(x)
    # x**2 / 2 * (1 + x/3 * (1 + x/4 * (...))), with as many terms as the dtype can tell.
    for n in range(10 if x.dtype.itemsize <= 4 else 19, 2, -1):
        series = 1 + near * (1 / n) * series
    # Where x is -inf, exp(x) - 1 - x is inf; where it is inf, inf - inf would be NaN.
    beyond = jnp.exp(x) - 1 - jnp.where(x == jnp.inf, 0, x)
    return jnp.where(small, 0.5 * near * near * series, beyond)


@exp_beyond_linear.defjvp
def _exp_beyond_linear_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return exp_beyond_linear(x), jnp.expm1(x) * dx
