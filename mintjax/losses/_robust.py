"""Losses and means for the worst: the worst group, the worst share, the hard examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, finish, keep, product
from mintjax.losses._settings import check_count, check_settings


def worst_group(
    losses: ArrayLike, groups: ArrayLike, num_groups: int, *, where: ArrayLike | None = None
) -> jax.Array:
    """The largest of the mean losses of several groups.

    ``max_g(mean of the losses of group g)``; a group without losses does not count. The gradient is
    that of the worst group alone.

    When to use it: no group of examples (a language, a source, a difficulty) shall fall behind.

    What others do: group DRO moves weights between groups from step to step instead; this is its
    limit for one step.

    Args:
        losses: one per example; any shape.
        groups: the number of each example's group, from 0 on; same shape, integers.
        num_groups: how many groups there are.
        where: same shape, boolean; which examples count.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.worst_group([1.0, 3.0, 5.0], [0, 0, 1], 2)
        Array(5., dtype=float32)

    Reference:
        Sagawa et al. 2019, "Distributionally Robust Neural Networks for Group Shifts", eq. 3
        (equation number unconfirmed).
    """
    check_count(num_groups, "num_groups")
    (values,) = aligned(where, losses)
    (numbers,) = aligned(where, groups)
    if numbers.shape != values.shape:
        raise ValueError(f"groups has shape {numbers.shape}, the losses have {values.shape}")
    ones = keep(jnp.ones_like(values), where).reshape(-1)
    index = numbers.astype(jnp.int32).reshape(-1)
    sums = jnp.zeros(num_groups, values.dtype).at[index].add(values.reshape(-1))
    counts = jnp.zeros(num_groups, values.dtype).at[index].add(ones)
    means = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), -jnp.inf)
    top = jnp.argmax(means)
    return jnp.where(counts[top] > 0, sums[top] / jnp.maximum(counts[top], 1), 0)


def conditional_value_at_risk(
    losses: ArrayLike, share: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """The mean of the largest losses: of the worst ``share`` of the examples.

    ``min_t(t + sum(max(0, losses - t)) / (share * N))`` over N unmasked losses, which is the mean
    of the ``share * N`` largest, the last of them in part. ``share = 1`` is the mean.

    When to use it: rare failures matter more than the average.

    What others do: the minimum over ``t`` is often trained beside the model; here it is exact.

    Args:
        losses: one per example; any shape.
        share: of the examples, above 0 and at most 1; a scalar.
        where: same shape, boolean; which examples count.

    Returns:
        A scalar, in units of the losses: float32, or float64 if the losses are.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.conditional_value_at_risk([1.0, 2.0, 3.0, 4.0], 0.5)
        Array(3.5, dtype=float32)

    Reference:
        Rockafellar & Uryasev 2000, "Optimization of Conditional Value-at-Risk"; for groups of
        examples Levy et al. 2020, "Large-Scale Methods for Distributionally Robust Optimization".
    """
    check_settings({"share": share}, of="conditional_value_at_risk")
    (values,) = aligned(where, losses)
    flat = values.reshape(-1)
    present = jnp.ones(flat.shape, bool)
    if where is not None:
        present = as_mask(where, values.shape).reshape(-1)
    ordered = -jnp.sort(jnp.where(present, -flat, jnp.inf))
    ordered = jnp.where(jnp.isneginf(ordered), 0, ordered)
    number = jnp.sum(present.astype(flat.dtype))
    wanted = jnp.asarray(share, flat.dtype) * number
    weights = jnp.clip(wanted - jnp.arange(flat.size, dtype=flat.dtype), 0, 1)
    return jnp.sum(jax.lax.stop_gradient(weights) * ordered) / jnp.where(wanted > 0, wanted, 1)


def focal_weights(
    target_logprobs: ArrayLike, *, gamma: ArrayLike = 2.0, where: ArrayLike | None = None
) -> jax.Array:
    """Weights that fade where the model is already sure.

    ``(1 - exp(target_logprobs))**gamma``, without a gradient.

    When to use it: as weights of :func:`cross_entropy`, so that easy tokens or answers do not drown
    the hard ones.

    What others do: the focal loss differentiates its weight too; here it is held constant, so that
    any loss can be weighed.

    Args:
        target_logprobs: log-probabilities of tokens, or of answers, in nats; any shape.
        gamma: how fast they fade, at least 0; a scalar, or one per token.
        where: same shape, boolean; positions that are False get 0.

    Returns:
        A weight between 0 and 1 for each token; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.focal_weights([-0.1, -3.0])
        Array([0.009, 0.903 ], dtype=float32)

    Reference:
        Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4 (equation number
        unconfirmed).
    """
    logprobs, gamma = aligned(where, target_logprobs, gamma=gamma)
    unsure = jnp.maximum(-jnp.expm1(jax.lax.stop_gradient(logprobs)), 0)
    return finish(unsure**gamma, where, target_logprobs)


def focal_cross_entropy(
    target_logprobs: ArrayLike,
    weights: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """:func:`cross_entropy` whose tokens weigh less where the model is already sure.

    ``-weights * sg((1 - exp(target_logprobs))**gamma) * target_logprobs`` with ``sg`` the
    stop-gradient: :func:`cross_entropy` with the weights of :func:`focal_weights` besides.

    When to use it: most tokens are easy, and few decide whether an answer is right.

    What others do: the focal loss differentiates its weight too, which pulls on hard tokens less.

    Args:
        target_logprobs: log-probabilities of the target tokens, in nats; any shape.
        weights: of each token; same shape, or a scalar.
        gamma: how fast the weights fade, at least 0; a scalar, or one per token. 0 is
            :func:`cross_entropy`.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats times weight; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.focal_cross_entropy([-0.1, -3.0], 1.0)
        Array([9.056e-04, 2.709e+00], dtype=float32)

    Reference:
        Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4 (equation number
        unconfirmed), with the weight held constant.
    """
    logprobs, weights, gamma = aligned(where, target_logprobs, weights=weights, gamma=gamma)
    known = jnp.where(weights == 0, 0, logprobs)  # as in cross_entropy, it may be anything there
    faded = weights * focal_weights(known, gamma=gamma)
    return finish(-product(faded, logprobs), where, target_logprobs)
