"""Other shapes than the logistic one, of a pair's margin over a reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import as_mask, finish, harmless_where_zero
from mintjax.losses._scores import gains, margins, ramp
from mintjax.losses._settings import check_positive
from mintjax.losses._sigmoids import log_sigmoid, sigmoid


def ipo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Identity preference optimisation: the margin is drawn to a target instead of to infinity.

    ``loss = (m - 1 / (2 * beta))**2`` with
    ``m = (chosen_scores - ref_chosen_scores) - (rejected_scores - ref_rejected_scores)``.

    When to use it: DPO overfits pairs that are always won. Scores may be sums or means per token:
    see below.

    What others do: eq. 17 and OpenRLHF take sums of logprobs, TRL and torchtune means per token,
    which the authors confirmed as what they ran: pass means, or ``objectives.ipo(per_token=True)``.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: the paper's tau, above 0; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats squared; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit, or ``beta`` is not above 0.

    Example:
        >>> from mintjax import losses
        >>> losses.ipo([-3.0], [-6.0], [-4.0], [-4.0])
        Array([4.], dtype=float32)

    Reference:
        Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human
        Preferences", eq. 17.
    """
    check_positive("ipo", beta=beta)
    won, lost, beta = gains(
        where, chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores, beta
    )
    if where is not None:  # masking left 0 in the place of beta
        beta = jnp.where(as_mask(where, beta.shape), beta, 1)
    return finish((won - lost - 1 / (2 * beta)) ** 2, where, chosen_scores)


def hinge(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Hinge loss of the margin over the reference, which is 0 once it is won by enough.

    ``loss = max(0, 1 - beta * m)`` with the margin ``m`` of :func:`dpo`. The slope at the bend is
    0, as torch's ``relu`` has it.

    When to use it: pairs that are won should pull no longer; without a reference it is
    :func:`slic`.

    What others do: TRL ("hinge") has this form.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.hinge([-3.0], [-6.0], [-4.0], [-4.0])
        Array([0.7], dtype=float32)

    Reference:
        Liu et al. 2023, "Statistical Rejection Sampling Improves Preference Optimization", eq. 10
        (equation number unconfirmed), RSO-hinge.
    """
    (logits,) = margins(
        where, chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores, beta
    )
    return finish(ramp(1 - logits), where, chosen_scores)


def exo_pair(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 1e-3,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Reverse KL from the model's preference to the smoothed label: efficient exact optimisation.

    ``loss = sigmoid(z) * (log sigmoid(z) - log(1 - e)) + sigmoid(-z) * (log sigmoid(-z) - log e)``
    with ``z = beta * m``, the margin ``m`` of :func:`dpo` and ``e = label_smoothing``.

    When to use it: DPO's forward KL covers both answers; this seeks the mode, and levels off where
    a pair is lost by far, so that hopeless pairs pull little.

    What others do: TRL and Liger ("exo_pair") have this form; their default of the smoothing is 0,
    which they refuse here, and they name the paper's 1e-3.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        label_smoothing: ``e``, above 0 and below 1; a scalar, or one per pair. The loss is infinite
            at 0.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit, or ``label_smoothing`` is not above 0.

    Example:
        >>> from mintjax import losses
        >>> losses.exo_pair([-3.0], [-6.0], [-4.0], [-4.0])
        Array([2.259], dtype=float32)

    Reference:
        Ji et al. 2024, "Towards Efficient Exact Optimization of Language Model Alignment", eq. 16.
    """
    check_positive("exo_pair", label_smoothing=label_smoothing)
    logits, smoothing = margins(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        label_smoothing=label_smoothing,
    )
    smoothing = jnp.where(smoothing > 0, smoothing, 0.5)  # masking left 0
    won, lost = sigmoid(logits), sigmoid(-logits)
    right = harmless_where_zero(won, log_sigmoid(logits)) - jnp.log1p(-smoothing)
    wrong = harmless_where_zero(lost, log_sigmoid(-logits)) - jnp.log(smoothing)
    return finish(won * right + lost * wrong, where, chosen_scores)


def discopop(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    temperature: ArrayLike = 0.05,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The loss that a language model discovered: a blend of logistic and exponential.

    ``loss = -(1 - g) * log sigmoid(z) + g * exp(-z)`` with ``z = beta * m``, the margin ``m`` of
    :func:`dpo`, and the gate ``g = sigmoid(z / temperature)``. The product ``g * exp(-z)`` is taken
    in one exponential, which does not overflow where the pair is lost by far.

    When to use it: to compare with; it is not convex, and nearly flat around small margins.

    What others do: TRL ("discopop") has this form and multiplies the two factors, which overflows.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        temperature: the paper's tau, above 0; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit, or ``temperature`` is not above 0.

    Example:
        >>> from mintjax import losses
        >>> losses.discopop([-3.0], [-6.0], [-4.0], [-4.0])
        Array([0.740], dtype=float32)

    Reference:
        Lu et al. 2024, "Discovering Preference Optimization Algorithms with and for Large Language
        Models", eq. 5 (LRML).
    """
    logits, tau = margins(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        temperature=temperature,
    )
    tau = jnp.where(tau > 0, tau, 1)  # masking left 0
    opened, closed = sigmoid(logits / tau), sigmoid(-logits / tau)
    logistic = -log_sigmoid(logits)
    lost = jax.lax.stop_gradient(logits) < -60
    settled = jnp.where(jnp.isinf(logits), 0, logits)
    exponential = jnp.exp(jnp.where(lost, settled / tau, 0) - settled)
    exponential = jnp.where(jnp.isinf(logits), 0, exponential)
    gap = exponential + jnp.where(lost, logistic, -logistic)
    blend = jnp.where(lost, 0, logistic) + jnp.where(lost, closed, opened) * gap
    return finish(blend, where, chosen_scores)
