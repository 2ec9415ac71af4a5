"""Regularisers: what a policy pays for leaving a reference or losing its entropy, per token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish, harmless_where_zero

# A difference of logprobs from which exp(d) has 1 + d within its third digit.
_FAR = 8.0


def kl_k1(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The plain estimator of KL(model || reference) from the model's own samples.

    ``k1 = target_logprobs - ref_logprobs``. Unbiased, of high variance, negative half of the time.
    As a loss it does nothing on average: its gradient on the model's own samples has mean 0. Use
    :func:`kl_k2` there, or put ``-beta * k1`` into the advantages.

    When to use it: to watch, and in rewards: :func:`mintjax.losses.kl_in_reward`.

    What others do: verl and TRL have this form.

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

    When to use it: a KL penalty in the loss, on-policy.

    What others do: verl ("k2", "mse") has this form.

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

    When to use it: to watch the divergence; as a penalty GRPO's authors took it.

    What others do: verl and SkyRL hold the estimate at most at 10, TRL does not.

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

    When to use it: to watch, where only the logprobs of sampled tokens are known.

    What others do: TRL and verl compute the entropy from the whole distribution.

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

    When to use it: a pull to a reference that does not depend on who sampled.

    What others do: verl's "mse" is half of it: :func:`kl_k2`.

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


def kl_abs(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The absolute difference of logprobs from the reference's.

    ``loss = |target_logprobs - ref_logprobs|``. It is no estimate of the KL divergence. Its slope
    at 0 is 0, as torch has it.

    When to use it: a pull of the same strength however far a token has gone; :func:`kl_k2` pulls in
    proportion.

    What others do: verl and SkyRL ("abs") have this form.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        ref_logprobs: of the same tokens under the reference; same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_abs([-1.0, -1.0], [-1.0, -2.0])
        Array([0., 1.], dtype=float32)

    Reference:
        None in the literature; verl's ``kl_penalty``.
    """
    target, reference = aligned(where, target_logprobs, ref_logprobs=ref_logprobs)
    difference = target - reference
    sign = jax.lax.stop_gradient(jnp.sign(difference))
    return finish(sign * difference, where, target_logprobs)


def kl_k3_straight_through(
    target_logprobs: ArrayLike, ref_logprobs: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The value of :func:`kl_k3` with the gradient of :func:`kl_k2`.

    ``sg(k3) + k2 - sg(k2)`` with ``sg`` the stop-gradient: an unbiased value to watch, and the
    gradient of KL(model || reference).

    When to use it: the KL belongs into the loss, and its value into the logs.

    What others do: verl ("k3+", "low_var_kl+") has this form, with the value at most 10.

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
        >>> losses.kl_k3_straight_through([-1.0, -1.0], [-1.0, -2.0])
        Array([0.   , 0.368], dtype=float32)

    Reference:
        Schulman 2020, "Approximating KL Divergence", k3; its gradient: Tang & Munos 2025, "On a few
        pitfalls in KL divergence gradient estimation for RL".
    """
    target, reference = aligned(where, target_logprobs, ref_logprobs=ref_logprobs)
    difference = reference - target
    value = _value_with_slope(target, exp_beyond_linear(difference), -difference)
    return finish(value, where, target_logprobs)


@jax.custom_jvp
def _value_with_slope(x: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """Gives a value the derivative ``slope`` by ``x``; it does not depend on anything else."""
    return value


@_value_with_slope.defjvp
def _value_with_slope_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]
) -> tuple[jax.Array, jax.Array]:
    return _value_with_slope(*primals), primals[2] * tangents[0]


def kl_k3_corrected(
    target_logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`kl_k3` of tokens that another policy sampled: weighed by the importance ratio.

    ``r * (exp(d) - 1 - d)`` with ``r = exp(target_logprobs - sampling_logprobs)`` and
    ``d = ref_logprobs - target_logprobs``. The gradient passes through both factors, which makes
    it, on average, that of KL(model || reference).

    When to use it: off-policy samples, or to have the right gradient of the KL from k3.

    What others do: TRL has this form, by default (``use_bias_correction_kl``).

    Args:
        target_logprobs: log-probabilities of sampled tokens under the model, in nats; any shape.
        ref_logprobs: of the same tokens under the reference; same shape, or a scalar.
        sampling_logprobs: under the policy that sampled them; same shape, or a scalar.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The estimate of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_k3_corrected([-1.0, -1.0], [-1.0, -2.0], -1.5)
        Array([0.   , 0.607], dtype=float32)

    Reference:
        DeepSeek-AI 2025, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
        the section on the unbiased KL estimate.
    """
    target, reference, sampling = aligned(
        where,
        target_logprobs,
        ref_logprobs=ref_logprobs,
        sampling_logprobs=sampling_logprobs,
    )
    return finish(_k3_corrected(target, reference, sampling), where, target_logprobs)


@jax.custom_jvp
def _k3_corrected(target: jax.Array, reference: jax.Array, sampling: jax.Array) -> jax.Array:
    """Computes ``r * (exp(d) - 1 - d)``, also where only one factor overflows."""
    difference = reference - target
    far = difference > _FAR
    beyond = exp_beyond_linear(jnp.where(far, 0, difference))
    near = harmless_where_zero(beyond, jnp.exp(target - sampling)) * beyond
    # exp(-100) is 0 beside 1, and (1 + inf) * exp(-inf) would be NaN.
    held = jnp.minimum(difference, 100)
    grown = jnp.exp(jnp.where(far, reference - sampling, 0)) * (1 - (1 + held) * jnp.exp(-held))
    return jnp.where(far, grown, near)


def _k3_corrected_jvp(
    primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]
) -> tuple[jax.Array, jax.Array]:
    target, reference, sampling = primals
    value = _k3_corrected(*primals)
    difference = reference - target
    far = difference > _FAR
    ratio = jnp.exp(target - sampling)
    # By target, the slope is r * (exp(d) - 1 - d) - r * (exp(d) - 1), which is -r * d.
    by_target = -harmless_where_zero(difference, ratio) * harmless_where_zero(ratio, difference)
    away = jnp.expm1(jnp.where(far, 0, difference))
    grown = jnp.exp(jnp.where(far, reference - sampling, 0)) * -jnp.expm1(-difference)
    by_reference = jnp.where(far, grown, harmless_where_zero(away, ratio) * away)
    tangent = jnp.zeros_like(value)
    # A slope that nobody asked for may be infinite, and 0 * inf would be NaN.
    for slope, given in zip((by_target, by_reference, -value), tangents, strict=True):
        if not isinstance(given, SymbolicZero):
            tangent = tangent + slope * given
    return value, tangent


_k3_corrected.defjvp(_k3_corrected_jvp, symbolic_zeros=True)


@jax.custom_jvp
def exp_beyond_linear(x: jax.Array) -> jax.Array:
    """Computes ``exp(x) - 1 - x`` to a few units in the last place; slope ``expm1(x)``."""
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
