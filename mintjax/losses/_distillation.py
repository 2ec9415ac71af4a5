"""Losses over K candidate tokens, or K fixed answers, at every position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish, harmless_where_zero, keep


def distillation_forward_kl(
    target_logprobs: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    renormalise: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(teacher || student) over K candidates: the student must cover what the teacher does.

    ``loss = sum_k p_k * (log p_k - log q_k)`` with the teacher's ``p`` and the student's ``q``: as
    given, or renormalised over the candidates. As given, the sum leaves out what lies beyond the
    candidates, and may be negative.

    Args:
        target_logprobs: the student's log-probabilities of the candidates, in nats: ``[..., K]``.
        teacher_logprobs: the teacher's; same shape. -inf is a probability of 0.
        renormalise: make both sum to 1 over the (unmasked) candidates first.
        where: same shape, boolean; candidates that are False are left out.

    Returns:
        The loss of each position, in nats: ``[...]``, dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.distillation_forward_kl([[-0.5, -1.5]], [[-0.7, -0.7]])
        Array([0.298], dtype=float32)

    Reference:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    student, teacher = aligned(where, target_logprobs, teacher_logprobs=teacher_logprobs)
    if renormalise:
        student, teacher = _log_normalise(student, where), _log_normalise(teacher, where)
    return finish(jnp.sum(keep(_kl_terms(teacher, student), where), axis=-1), None, target_logprobs)


def distillation_reverse_kl(
    target_logprobs: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    renormalise: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(student || teacher) over K candidates: the student must stay where the teacher is.

    ``loss = sum_k q_k * (log q_k - log p_k)`` with the teacher's ``p`` and the student's ``q``: as
    given, or renormalised over the candidates.

    Args:
        target_logprobs: the student's log-probabilities of the candidates, in nats: ``[..., K]``.
        teacher_logprobs: the teacher's; same shape.
        renormalise: make both sum to 1 over the (unmasked) candidates first.
        where: same shape, boolean; candidates that are False are left out.

    Returns:
        The loss of each position, in nats: ``[...]``, dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.distillation_reverse_kl([[-0.5, -1.5]], [[-0.7, -0.7]])
        Array([-0.057], dtype=float32)

    Reference:
        Gu et al. 2023, "MiniLLM: Knowledge Distillation of Large Language Models", eq. 1.
    """
    student, teacher = aligned(where, target_logprobs, teacher_logprobs=teacher_logprobs)
    if renormalise:
        student, teacher = _log_normalise(student, where), _log_normalise(teacher, where)
    return finish(jnp.sum(keep(_kl_terms(student, teacher), where), axis=-1), None, target_logprobs)


def brier_score(
    target_logprobs: ArrayLike,
    outcomes: ArrayLike,
    *,
    renormalise: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Squared error of the probabilities of K fixed answers: a proper score, for calibration.

    ``loss = sum_k (exp(target_logprobs_k) - outcomes_k)**2``

    Args:
        target_logprobs: log-probabilities of the answers, in nats: ``[..., K]``.
        outcomes: 1 for the answer that came true, 0 for the others, or their frequencies; same
            shape.
        renormalise: make the probabilities sum to 1 over the (unmasked) answers first.
        where: same shape, boolean; answers that are False are left out.

    Returns:
        The score of each position, between 0 and 2: ``[...]``, dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.brier_score([[-0.5, -1.5]], [[1.0, 0.0]])
        Array([0.205], dtype=float32)

    Reference:
        Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", eq. 2.
    """
    logprobs, outcomes = aligned(where, target_logprobs, outcomes=outcomes)
    if renormalise:
        logprobs = _log_normalise(logprobs, where)
    error = jnp.exp(logprobs) - outcomes
    return finish(jnp.sum(keep(error * error, where), axis=-1), None, target_logprobs)


def _kl_terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """``p * (log p - log q)``, 0 where p is 0, in value and gradient."""
    probability = jnp.exp(log_p)
    log_p = harmless_where_zero(probability, log_p)
    return probability * (log_p - harmless_where_zero(probability, log_q))


def _log_normalise(logprobs: jax.Array, where: ArrayLike | None) -> jax.Array:
    """``log_softmax`` over the unmasked part of the last axis; all masked gives 0."""
    present = keep(jnp.ones_like(logprobs), where) != 0
    top = jnp.max(jnp.where(present, logprobs, -jnp.inf), axis=-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(keep(jnp.exp(logprobs - top), where), axis=-1, keepdims=True)
    return keep(logprobs - top - jnp.log(jnp.where(total == 0, 1, total)), where)
