"""Rewards and advantages of tokens: returns, whitening, penalties of length and of divergence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, finish, keep, too_large_to_square
from mintjax.losses._settings import check_order, check_settings


def discounted_returns(
    rewards: ArrayLike, *, discount: ArrayLike = 1.0, where: ArrayLike | None = None
) -> jax.Array:
    """Discounted sum of the rewards from each token on.

    ``G_t = r_t + discount * G_{t+1}`` along the last axis. A masked token, such as one that a tool
    wrote, is stepped over: it adds nothing and takes no discount.

    When to use it: rewards per token, or one at the end of the answer (``where`` it is last). With
    :func:`whiten` after it this is REINFORCE++.

    What others do: verl ("reinforce_plus_plus") has this form.

    Args:
        rewards: one per token: ``[..., T]``.
        discount: the factor per token, in [0, 1]; a scalar.
        where: same shape, boolean; tokens that are False get 0.

    Returns:
        The return of each token, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.discounted_returns([0.0, 0.0, 1.0], discount=0.5)
        Array([0.25, 0.5 , 1.  ], dtype=float32)

    Reference:
        Hu et al. 2025, "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language
        Models" (arXiv:2501.03262), in the form of verl's implementation.
    """
    given, factor = aligned(None, rewards, discount=discount)
    if where is not None:
        factor = jnp.where(as_mask(where, given.shape), factor, 1)
    return finish(_backward(keep(given, where), factor), where, rewards)


def gae(
    rewards: ArrayLike,
    values: ArrayLike,
    *,
    discount: ArrayLike = 1.0,
    decay: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Generalised advantage estimate of each token, from rewards and a critic's values.

    ``A_t = delta_t + discount * decay * A_{t+1}`` with ``delta_t = r_t + discount * V_{t+1} - V_t``
    along the last axis; the value after the last token is 0. A masked token is stepped over.

    When to use it: a value model is there. ``decay = 1`` is the return less the value.

    What others do: verl ("gae") has this form and whitens the result over all tokens: see
    :func:`whiten`.

    Args:
        rewards: one per token: ``[..., T]``.
        values: what the critic expects from each token on; same shape.
        discount: gamma, in [0, 1]; a scalar.
        decay: lambda, in [0, 1]; a scalar.
        where: same shape, boolean; tokens that are False get 0.

    Returns:
        The advantages, in units of the reward; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.gae([0.0, 0.0, 1.0], [0.5, 0.5, 0.5], decay=0.5)
        Array([0.125, 0.25 , 0.5  ], dtype=float32)

    Reference:
        Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage
        Estimation", eq. 16.
    """
    given, value, gamma, lam = aligned(
        where, rewards, values=values, discount=discount, decay=decay
    )
    present = jnp.ones(given.shape, bool) if where is None else as_mask(where, given.shape)
    following = _next_present(value, present)
    delta = given + gamma * following - value
    step = jnp.where(present, gamma * lam, 1)
    return finish(_backward(keep(delta, where), step), where, rewards)


def whiten(
    values: ArrayLike,
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Values less their mean, over their standard deviation, of everything that is given.

    ``(x - mean(x)) / sqrt(var(x) + epsilon)``, over all unmasked values of all axes, with the
    variance over ``N - 1``.

    When to use it: advantages over a batch, as REINFORCE++ has them. Values that agree become 0.

    What others do: verl, TRL and SkyRL have this form.

    Args:
        values: any shape.
        shift_mean: whether the mean becomes 0, or stays.
        epsilon: keeps the quotient finite, in squares of the unit of the values.
        where: same shape, boolean; values that are False become 0 and do not count.

    Returns:
        The values in standard deviations, which have no unit; shape and dtype of ``values``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.whiten([[1.0, 2.0], [3.0, 2.0]])
        Array([[-1.225,  0.   ],
               [ 1.225,  0.   ]], dtype=float32)

    Reference:
        Hu et al. 2025, "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language
        Models" (arXiv:2501.03262), the normalisation over the global batch.
    """
    check_settings({"epsilon": epsilon}, of="whiten")
    (given,) = aligned(where, values)
    number = jnp.maximum(jnp.sum(keep(jnp.ones_like(given), where)), 1)
    first = jnp.sum(given) / number
    off = keep(given - first, where)
    rest = jnp.sum(off) / number  # what rounding left of the mean
    centred = keep(off - rest, where)
    scale = too_large_to_square(centred)
    near = centred / scale
    variance = jnp.sum(near * near) / jnp.maximum(number - 1, 1)
    scaled = near * jax.lax.rsqrt(variance + epsilon / scale / scale)
    return finish(scaled if shift_mean else scaled + first + rest, where, values)


def advantage_filter(
    advantages: ArrayLike, *, deviations: ArrayLike = 3.0, where: ArrayLike | None = None
) -> jax.Array:
    """Marks the advantages that are no outliers of their batch.

    ``|A - mean| <= deviations * std`` over all that are given, with the standard deviation over
    ``N - 1``. Advantages that all agree are kept.

    When to use it: as ``where`` of a policy loss after :func:`whiten`, which makes a large
    advantage of a small difference where most rewards of a batch agree.

    What others do: StableReinforce drops what lies beyond three deviations; others keep all.

    Args:
        advantages: any shape; all are looked at together.
        deviations: how many standard deviations from the mean are kept; a scalar.
        where: same shape, boolean; advantages that are False are False and do not count.

    Returns:
        One boolean per advantage, which has no unit and no gradient: the shape of ``advantages``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.advantage_filter([0.0] * 11 + [1.0])[-2:]
        Array([ True, False], dtype=bool)

    Reference:
        Zhang et al. 2025, "R1-Reward: Training Multimodal Reward Model Through Stable Reinforcement
        Learning" (arXiv:2505.02835), the advantage filter.
    """
    check_settings({"deviations": deviations}, of="advantage_filter")
    (given,) = aligned(where, advantages)
    fixed = jax.lax.stop_gradient(given)
    ones = keep(jnp.ones_like(fixed), where)
    number = jnp.maximum(jnp.sum(ones), 1)
    off = keep(fixed - jnp.sum(fixed) / number, where)
    off = keep(off - jnp.sum(off) / number, where)  # what rounding left of the mean
    off = off / too_large_to_square(off)
    std = jnp.sqrt(jnp.sum(off * off) / jnp.maximum(number - 1, 1))
    return keep(jnp.abs(off) <= jnp.asarray(deviations, std.dtype) * std, where)


def overlong_penalty(
    lengths: ArrayLike, *, max_length: ArrayLike, buffer: ArrayLike, penalty: ArrayLike = 1.0
) -> jax.Array:
    """Reward to take from answers that are nearly too long.

    ``-penalty * max(0, lengths - (max_length - buffer)) / buffer``: 0 up to the buffer, and
    ``-penalty`` at ``max_length``.

    When to use it: added to the reward, where answers that are cut off would otherwise count as
    wrong. :func:`truncation_mask` leaves them out instead.

    What others do: verl has this form, and lets it grow beyond ``max_length`` too.

    Args:
        lengths: number of tokens of each answer; any shape.
        max_length: the most tokens that may be sampled; a scalar.
        buffer: over how many tokens below it the penalty rises; a scalar, above 0.
        penalty: the greatest, in units of the reward; a scalar.

    Returns:
        What to add to each reward, in units of the reward: float32, the shape of ``lengths``.

    Raises:
        ValueError: the buffer is longer than ``max_length``, or a setting is out of its range.

    Example:
        >>> from mintjax import losses
        >>> losses.overlong_penalty([100, 900, 1000], max_length=1000, buffer=200)
        Array([-0. , -0.5, -1. ], dtype=float32)

    Reference:
        Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", eq. 13.
    """
    check_order(
        buffer,
        max_length,
        ("buffer", "max_length"),
        "so answers would pay before their first token",
    )
    tokens, most, room, worst = aligned(
        None, lengths, max_length=max_length, buffer=buffer, penalty=penalty
    )
    return -worst * jnp.maximum(tokens - (most - room), 0) / room


def truncation_mask(lengths: ArrayLike, *, max_length: ArrayLike) -> jax.Array:
    """Marks the answers that ended by themselves.

    ``lengths < max_length``

    When to use it: to leave answers that were cut off out of a loss (DAPO's overlong filtering),
    whose reward says nothing of what was written.

    What others do: TRL (``mask_truncated_completions``) looks for the end-of-text token.

    Args:
        lengths: number of tokens of each answer; any shape.
        max_length: the most tokens that may be sampled; a scalar.

    Returns:
        One boolean per answer, which has no unit: the shape of ``lengths``.

    Example:
        >>> from mintjax import losses
        >>> losses.truncation_mask([100, 1000], max_length=1000)
        Array([ True, False], dtype=bool)

    Reference:
        Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        section 3.4.
    """
    tokens, most = aligned(None, lengths, max_length=max_length)
    return tokens < most


def kl_in_reward(
    rewards: ArrayLike,
    sampling_logprobs: ArrayLike,
    ref_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Rewards of tokens less what the policy pays for leaving a reference.

    ``r_t - beta * (sampling_logprobs - ref_logprobs)``: the k1 estimate, which belongs into the
    reward and not into the loss, where its gradient has mean 0.

    When to use it: the classic penalty of RLHF. :func:`mintjax.losses.kl_k2` in the loss has the
    same gradient on-policy.

    What others do: verl and TRL have this form; verl offers the other estimators in k1's place.

    Args:
        rewards: one per token: any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them, in nats; same
            shape.
        ref_logprobs: under the reference; same shape, or a scalar.
        beta: units of reward per nat; a scalar, or one per token.
        where: same shape, boolean; tokens that are False get 0.

    Returns:
        The rewards, in their unit; shape and dtype of ``rewards``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.kl_in_reward([0.0, 1.0], [-1.0, -1.0], [-2.0, -1.0], beta=0.1)
        Array([-0.1,  1. ], dtype=float32)

    Reference:
        Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
        eq. 2.
    """
    given, sampling, reference, beta = aligned(
        where,
        rewards,
        sampling_logprobs=sampling_logprobs,
        ref_logprobs=ref_logprobs,
        beta=beta,
    )
    return finish(given - beta * (sampling - reference), where, rewards)


def on_policy_distillation(
    advantages: ArrayLike,
    sampling_logprobs: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 1.0,
    discount: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Advantages less how much likelier the student finds each of its tokens than a teacher does.

    ``A_t - beta * sum_{s >= t}(discount**(s - t) * (sampling_logprobs_s - teacher_logprobs_s))``
    along the last axis: the reverse KL of the student's own tokens as a reward for each of them.

    When to use it: a teacher can score what the student writes. Advantages of 0 distil alone; those
    of a reward distil and reinforce.

    What others do: the Tinker cookbook has this form; it steps over masked tokens with a discount,
    and here too a masked token takes one.

    Args:
        advantages: one per token: ``[..., T]``.
        sampling_logprobs: of the same tokens under the student that sampled them, in nats; same
            shape.
        teacher_logprobs: under the teacher; same shape.
        beta: units of advantage per nat; a scalar.
        discount: of what a token leads to, in [0, 1]; 0 counts each token by itself. A scalar.
        where: same shape, boolean; tokens that are False get 0 and add nothing.

    Returns:
        The advantages, in their unit; shape and dtype of ``advantages``. No gradient passes.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.on_policy_distillation([0.0, 0.0], [-1.0, -1.0], [-3.0, -0.5], discount=0.5)
        Array([-1.75,  0.5 ], dtype=float32)

    Reference:
        Lu & Thinking Machines Lab 2025, "On-Policy Distillation", in the form of the Tinker
        cookbook's recipe.
    """
    given, sampling, teacher, beta, factor = aligned(
        where,
        advantages,
        sampling_logprobs=sampling_logprobs,
        teacher_logprobs=teacher_logprobs,
        beta=beta,
        discount=discount,
    )
    # The factor of a masked token, which masking made 0, is that of the others.
    factor = jnp.broadcast_to(jnp.max(jnp.abs(factor)), factor.shape)
    paid = _backward(keep(sampling - teacher, where), factor)
    return finish(jax.lax.stop_gradient(given - beta * paid), where, advantages)


def _backward(values: jax.Array, factors: jax.Array) -> jax.Array:
    """Computes ``y_t = values_t + factors_t * y_{t+1}`` along the last axis."""

    def join(
        late: tuple[jax.Array, jax.Array], early: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return early[0] * late[0], early[1] + early[0] * late[1]

    pairs = jax.lax.associative_scan(join, (factors, values), reverse=True, axis=values.ndim - 1)
    return pairs[1]


def _next_present(values: jax.Array, present: jax.Array) -> jax.Array:
    """Finds the value of the next unmasked position along the last axis; 0 if there is none."""
    kept = jnp.where(present, values, 0)
    passing = jnp.where(present, 0, 1).astype(values.dtype)
    latest = _backward(kept, passing)  # the nearest one from here on, this one included
    return jnp.concatenate([latest[..., 1:], jnp.zeros_like(latest[..., :1])], axis=-1)
