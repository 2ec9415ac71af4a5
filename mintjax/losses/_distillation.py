"""Losses over K candidate tokens, or K fixed answers, at every position."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, finish, harmless_where_zero, keep
from mintjax.losses._settings import UP_TO_1, check_count, check_range, known


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

    When to use it: the student shall cover what the teacher does, from the teacher's or a data
    set's text.

    What others do: TRL's GKD has it as ``beta=0``, over the whole vocabulary.

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

    When to use it: the student shall stay where the teacher is, from its own text.

    What others do: TRL's GKD has it as ``beta=1``, over the whole vocabulary.

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
        Gu et al. 2023, "MiniLLM: Knowledge Distillation of Large Language Models", eq. 1 (equation
        number unconfirmed).
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

    When to use it: calibrated probabilities of a few answers; it is bounded, where a log-score is
    not.

    What others do: scikit-learn halves it for two classes.

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
        Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", eq. 2 (equation
        number unconfirmed).
    """
    logprobs, outcomes = aligned(where, target_logprobs, outcomes=outcomes)
    if renormalise:
        logprobs = _log_normalise(logprobs, where)
    error = jnp.exp(logprobs) - outcomes
    return finish(jnp.sum(keep(error * error, where), axis=-1), None, target_logprobs)


def generalised_jsd(
    target_logprobs: ArrayLike,
    teacher_logprobs: ArrayLike,
    *,
    beta: ArrayLike = 0.5,
    renormalise: bool = True,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Generalised Jensen-Shannon divergence over K candidates, between forward and reverse KL.

    ``loss = beta * KL(p || m) + (1 - beta) * KL(q || m)`` with the teacher's ``p``, the student's
    ``q`` and ``m = beta * p + (1 - beta) * q``; ``beta = 0`` is KL(teacher || student) and
    ``beta = 1`` KL(student || teacher).

    When to use it: distillation on the student's own samples (GKD), between covering the teacher's
    modes and keeping to one.

    What others do: TRL's GKD trainer has this form over the whole vocabulary, with the same two
    limits; Liger names the limits the other way round.

    Args:
        target_logprobs: the student's log-probabilities of the candidates, in nats: ``[..., K]``.
        teacher_logprobs: the teacher's; same shape. -inf is a probability of 0.
        beta: between 0 and 1; a scalar.
        renormalise: make both sum to 1 over the (unmasked) candidates first, at the temperature.
        temperature: divides the logprobs before they are renormalised; a scalar.
        where: same shape, boolean; candidates that are False are left out.

    Returns:
        The loss of each position, in nats: ``[...]``, dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit, ``beta`` is not between 0 and 1, or a temperature is
            not above 0, or given without renormalising.

    Example:
        >>> from mintjax import losses
        >>> losses.generalised_jsd([[-0.5, -1.5]], [[-0.7, -0.7]])
        Array([0.028], dtype=float32)

    Reference:
        Agarwal et al. 2023, "On-Policy Distillation of Language Models: Learning from
        Self-Generated Mistakes", eq. 1.
    """
    check_range(beta, UP_TO_1, "beta of generalised_jsd")
    fixed = known(temperature)
    if not renormalise and fixed is not None and (fixed != 1).any():
        raise ValueError("a temperature needs renormalise=True: it would leave no distribution")
    student, teacher, heat = aligned(
        where, target_logprobs, teacher_logprobs=teacher_logprobs, temperature=temperature
    )
    if renormalise:
        heat = jnp.where(heat == 0, 1, heat)  # masking left 0
        student, teacher = (_log_normalise(x / heat, where) for x in (student, teacher))
    elif fixed is None:  # what is traced cannot be refused, so that it makes the loss NaN, which is
        student = jnp.where((heat == 1) | (heat == 0), student, jnp.nan)
    share = jnp.asarray(beta, student.dtype)
    inner = jnp.where((share > 0) & (share < 1), share, 0.5)
    mixture = _log_mix(student + jnp.log1p(-inner), teacher + jnp.log(inner))
    mixed = inner * _kl_terms(teacher, mixture) + (1 - inner) * _kl_terms(student, mixture)
    at_the_ends = jnp.where(share > 0, _kl_terms(student, teacher), _kl_terms(teacher, student))
    terms = jnp.where(share == inner, mixed, at_the_ends)
    return finish(jnp.sum(keep(terms, where), axis=-1), None, target_logprobs)


def _log_mix(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes ``log(exp(a) + exp(b))``; -inf, without a gradient, where both are."""
    nothing = jnp.isneginf(a) & jnp.isneginf(b)
    mixed = jnp.logaddexp(jnp.where(nothing, 0, a), jnp.where(nothing, 0, b))
    return jnp.where(nothing, -jnp.inf, mixed)


def entropy_bounds(
    target_logprobs: ArrayLike, vocab_size: int, *, where: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Bounds on the entropy of a distribution of which the K most likely tokens are known.

    ``H_K - m * log(min(m, p_K)) <= H <= H_K - m * log(m / (V - K))`` with ``H_K`` the sum of
    ``-p * log p`` over the candidates, ``p_K`` the least of their probabilities, ``m = 1 - sum p``
    the rest, and V the vocabulary: the rest is in as few tokens as may be, or spread over all.

    When to use it: to watch the entropy where a trainer gives the top K logprobs only;
    :func:`sampled_entropy` is an estimate from the sampled token alone.

    What others do: TRL and verl compute the entropy from the whole distribution.

    Args:
        target_logprobs: log-probabilities of the K most likely tokens, in nats: ``[..., K]``.
        vocab_size: how many tokens there are, V.
        where: same shape, boolean; candidates that are False are not known.

    Returns:
        The lower and the upper bound of each position, in nats: ``[...]`` each, dtype of
        ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from mintjax import losses
        >>> losses.entropy_bounds(jnp.log(jnp.array([[0.5, 0.25]])), 6)
        (Array([1.04], dtype=float32), Array([1.386], dtype=float32))

    Reference:
        Cover & Thomas 2006, "Elements of Information Theory", the entropy of a uniform distribution
        as the greatest, applied to the rest.
    """
    (logprobs,) = aligned(where, target_logprobs)
    check_count(vocab_size, "vocab_size", logprobs.shape[-1])
    probability = keep(jnp.exp(logprobs), where)
    inside = -jnp.sum(probability * harmless_where_zero(probability, logprobs), axis=-1)
    number = count(logprobs, where)[..., 0]
    rest = jnp.maximum(1 - jnp.sum(probability, axis=-1), 0)
    seen = jnp.where(keep(jnp.ones_like(logprobs), where) != 0, probability, 1)
    most = jnp.minimum(rest, jnp.min(seen, axis=-1, initial=1))
    safe = jnp.where(rest > 0, rest, 1)
    lower = -rest * jnp.log(jnp.where(rest > 0, most, 1))
    upper = -rest * jnp.log(safe / jnp.maximum(vocab_size - number, 1))
    bounds = (inside + jnp.where(rest > 0, part, 0) for part in (lower, upper))
    below, above = (finish(bound, None, target_logprobs) for bound in bounds)
    return below, above


def calibration_sums(
    probabilities: ArrayLike,
    outcomes: ArrayLike,
    *,
    bins: int = 10,
    where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Sums over forecasts, in bins of equal width, of what tells how well calibrated they are.

    ``count``, how many forecasts fall into each bin of ``floor(probability * bins)``;
    ``probability`` and ``outcome``, their sums. No gradient passes.

    Args:
        probabilities: forecasts between 0 and 1; any shape.
        outcomes: 1 where it came true, 0 where not; same shape.
        bins: how many.
        where: same shape, boolean; which forecasts count.

    Returns:
        Arrays ``[bins]`` by name. Those of two chunks of data, added, are those of both together.

    Raises:
        ValueError: the shapes do not fit.
    """
    check_count(bins, "bins")
    chances, came = aligned(where, probabilities, outcomes=outcomes)
    chances, came = jax.lax.stop_gradient(chances), jax.lax.stop_gradient(came)
    number = jnp.clip(jnp.floor(chances * bins), 0, bins - 1).astype(jnp.int32).reshape(-1)
    ones = keep(jnp.ones_like(chances), where)
    parts = {"count": ones, "probability": keep(chances, where), "outcome": keep(came, where)}
    return {
        name: jnp.zeros(bins, part.dtype).at[number].add(part.reshape(-1))
        for name, part in parts.items()
    }


def calibration_summary(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Summarises :func:`calibration_sums`, added over all chunks.

    Args:
        sums: as returned there.

    Returns:
        ``expected_calibration_error``, the mean over forecasts of how far the mean forecast of a
        bin lies from the frequency in it, and ``maximum_calibration_error``, the largest such
        distance. Both are 0 for no forecasts.

    Reference:
        Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning".
    """
    number = sums["count"]
    apart = jnp.abs(sums["probability"] - sums["outcome"])
    total = jnp.maximum(jnp.sum(number), 1)
    return {
        "expected_calibration_error": jnp.sum(apart) / total,
        "maximum_calibration_error": jnp.max(apart / jnp.maximum(number, 1)),
    }


def _kl_terms(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Computes ``p * (log p - log q)``, 0 where p is 0, in value and gradient."""
    probability = jnp.exp(log_p)
    log_p = harmless_where_zero(probability, log_p)
    return probability * (log_p - harmless_where_zero(probability, log_q))


def _log_normalise(logprobs: jax.Array, where: ArrayLike | None) -> jax.Array:
    """Computes ``log_softmax`` over the unmasked part of the last axis; all masked gives 0."""
    present = keep(jnp.ones_like(logprobs), where) != 0
    top = jnp.max(jnp.where(present, logprobs, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(keep(jnp.exp(logprobs - top), where), axis=-1, keepdims=True)
    return keep(logprobs - top - jnp.log(jnp.where(total == 0, 1, total)), where)
