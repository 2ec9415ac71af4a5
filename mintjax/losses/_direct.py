"""Kin of DPO: other margins, other weights, other divergences from the reference."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, count, finish, harmless_where_zero
from mintjax.losses._scores import gains, held, margins, smoothed
from mintjax.losses._settings import Range, check_range
from mintjax.losses._sigmoids import log_sigmoid

Divergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js", "alpha"]
"""The divergence from the reference that :func:`f_dpo` bounds."""


def length_normalised_dpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    beta: ArrayLike = 5.0,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DPO of mean log-ratios per token, so that a long answer does not win by its length.

    ``loss = -(1 - e) * log sigmoid(beta * m) - e * log sigmoid(-beta * m)`` with
    ``m = (chosen_scores - ref_chosen_scores) / chosen_lengths - (rejected_scores -
    ref_rejected_scores) / rejected_lengths`` and ``e = label_smoothing``.

    When to use it: answers of very different lengths, where DPO makes the model talk longer. The
    scale of a mean is a hundredth of that of a sum, hence the large ``beta``.

    What others do: TRL calls it ``sigmoid_norm``, with the ``beta`` of DPO as default.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        chosen_lengths: number of tokens in each sum; same shape. A length of 0 counts as 1.
        rejected_lengths: of the rejected answers; same shape.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        label_smoothing: ``e``, the probability that a label is wrong, in [0, 1/2); a scalar, or one
            per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.length_normalised_dpo([-3.0], [-6.0], [-4.0], [-4.0], [2.0], [4.0], beta=1.0)
        Array([0.313], dtype=float32)

    Reference:
        Lambert et al. 2024, "Tülu 3: Pushing Frontiers in Open Language Model Post-Training",
        section 5.1; named in Meng et al. 2024, "SimPO", among its baselines.
    """
    won, lost, beta, long, short, smoothing = gains(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        label_smoothing=label_smoothing,
    )
    margin = won / jnp.maximum(long, 1) - lost / jnp.maximum(short, 1)
    return finish(smoothed(beta * margin, smoothing), where, chosen_scores)


def robust_dpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DPO that is unbiased where a known share of the labels is flipped.

    ``loss = (-(1 - e) * log sigmoid(beta * m) + e * log sigmoid(-beta * m)) / (1 - 2 * e)`` with
    the margin ``m`` of :func:`dpo` and ``e = label_smoothing``. It may be negative, and it is not
    bounded below.

    When to use it: the rate of wrong labels is known. :func:`dpo` with ``label_smoothing`` is the
    conservative form instead, which is biased, and bounded.

    What others do: TRL ("robust") and Liger have this form.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        label_smoothing: ``e``, the probability that a label is wrong, in [0, 1/2); a scalar, or one
            per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.robust_dpo([-3.0], [-6.0], [-4.0], [-4.0])
        Array([0.517], dtype=float32)

    Reference:
        Chowdhury et al. 2024, "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        section 3.1.
    """
    check_range(label_smoothing, Range(0, 0.5, below=True), "label_smoothing of robust_dpo", where)
    logits, smoothing = margins(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        label_smoothing=label_smoothing,
    )
    flipped = harmless_where_zero(smoothing, log_sigmoid(-logits))
    loss = -(1 - smoothing) * log_sigmoid(logits) + smoothing * flipped
    return finish(loss / (1 - 2 * smoothing), where, chosen_scores)


def rpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    nll_weight: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DPO plus the likelihood of the chosen answer: iterative reasoning preference optimisation.

    ``loss = -log sigmoid(beta * m) - nll_weight * chosen_scores / chosen_lengths`` with the margin
    ``m`` of :func:`dpo`.

    When to use it: DPO lowers the likelihood of chosen and rejected answers alike, as it does in
    reasoning, where both share most of their steps.

    What others do: TRL has ``rpo_alpha`` (or the loss ``sft`` beside ``sigmoid``), whose NLL is the
    mean over all tokens of the batch instead of the mean of each answer's.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        chosen_lengths: number of tokens in each chosen sum; same shape. A length of 0 counts as 1.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        nll_weight: the paper's alpha; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.rpo([-3.0], [-6.0], [-4.0], [-4.0], [3.0])
        Array([1.554], dtype=float32)

    Reference:
        Pang et al. 2024, "Iterative Reasoning Preference Optimization", eq. 1 (equation number
        unconfirmed); as RPO in Nvidia 2024, "Nemotron-4 340B Technical Report", for the name only:
        its loss differs.
    """
    logits, chosen, lengths, weight = margins(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        chosen=chosen_scores,
        chosen_lengths=chosen_lengths,
        nll_weight=nll_weight,
    )
    nll = weight * harmless_where_zero(weight, chosen / jnp.maximum(lengths, 1))
    return finish(-log_sigmoid(logits) - nll, where, chosen_scores)


def wpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    chosen_log_weights: ArrayLike,
    rejected_log_weights: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DPO that weighs each pair by how likely the model itself is to write its two answers.

    ``loss = sg(exp(chosen_log_weights + rejected_log_weights)) * dpo`` with ``sg`` the
    stop-gradient: off-policy pairs count as much as they would on-policy.

    When to use it: the pairs come from other models than the one in training.

    What others do: TRL (``use_weighting``) takes as log-weight the mean over an answer's tokens of
    ``logprob - log sum_v p(v)**2``, the paper's sampled alignment, which needs the whole
    distribution; :func:`wpo_log_weight` takes the second part as a column, or leaves it out.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        chosen_log_weights: log-weights of the chosen answers, as :func:`wpo_log_weight` gives them;
            same shape, or a scalar. No gradient passes.
        rejected_log_weights: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        label_smoothing: ``e``, the probability that a label is wrong, in [0, 1/2); a scalar, or one
            per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.wpo([-3.0], [-6.0], [-4.0], [-4.0], -0.5, -0.5)
        Array([0.204], dtype=float32)

    Reference:
        Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", eq. 2 for the
        weights.
    """
    logits, won, lost, smoothing = margins(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        chosen_log_weights=chosen_log_weights,
        rejected_log_weights=rejected_log_weights,
        label_smoothing=label_smoothing,
    )
    weight = jnp.exp(jax.lax.stop_gradient(won + lost))
    loss = smoothed(logits, smoothing)
    return finish(weight * harmless_where_zero(weight, loss), where, chosen_scores)


def wpo_log_weight(
    target_logprobs: ArrayLike,
    log_collisions: ArrayLike = 0.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Computes the log-weight of an answer in :func:`wpo`: how likely the model is to write it.

    ``mean_t(target_logprobs - log_collisions)`` over the unmasked tokens of the last axis, where
    ``log_collisions`` is ``log sum_v p(v)**2`` of each token's distribution.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats: ``[..., T]``.
        log_collisions: of each position; same shape, or a scalar. 0 leaves the alignment out.
        where: same shape, boolean; which tokens count.

    Returns:
        The log-weight of each answer, in nats: ``[...]``. No gradient passes.

    Raises:
        ValueError: the shapes do not fit.

    Reference:
        Zhou et al. 2024, "WPO: Enhancing RLHF with Weighted Preference Optimization", eq. 2.
    """
    logprobs, collisions = aligned(where, target_logprobs, log_collisions=log_collisions)
    tokens = jnp.maximum(count(logprobs, where)[..., 0], 1)
    mean = jnp.sum(logprobs - collisions, axis=-1) / tokens
    return finish(jax.lax.stop_gradient(mean), None, target_logprobs)


def f_dpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    divergence: Divergence = "js",
    alpha: ArrayLike = 0.5,
    where: ArrayLike | None = None,
) -> jax.Array:
    """DPO under another divergence from the reference than the reverse KL.

    ``loss = -log sigmoid(beta * (f'(c) - f'(r)))`` where ``c`` and ``r`` are the probability ratios
    of the chosen and the rejected answer to the reference, and ``f'(u)`` is ``log u`` for
    ``"reverse_kl"`` (which is :func:`dpo`), ``1 - 1 / u`` for ``"forward_kl"``,
    ``log(2 * u / (1 + u))`` for ``"js"`` and ``(u**(alpha - 1) - 1) / (alpha - 1)`` for
    ``"alpha"``. It is computed from the log-ratios; an exponent that would overflow is
    held at 80 (638 in float64).

    When to use it: the reverse KL lets the model give up modes of the reference; ``"js"`` and
    ``"alpha"`` keep more of its diversity, ``"forward_kl"`` most.

    What others do: TRL has the four, the last two as ``js_divergence`` and ``alpha_divergence``; it
    holds the exponent at 80 for the last one only.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        divergence: its name.
        alpha: of ``"alpha"``; a scalar, or one per pair. 1 is the reverse KL, 0 the forward KL.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit, or there is no such divergence.

    Example:
        >>> from mintjax import losses
        >>> losses.f_dpo([-3.0], [-6.0], [-4.0], [-4.0], divergence="js")
        Array([0.607], dtype=float32)

    Reference:
        Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with
        Diverse Divergence Constraints", eq. 13 (equation number unconfirmed), and its table of
        divergences.
    """
    if divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
        raise ValueError(f"divergence must be reverse_kl, forward_kl, js or alpha: {divergence!r}")
    scores = chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores
    won, lost, beta, power = gains(where, *scores, beta, alpha=alpha)
    won, lost = (_slope_of_divergence(gain, divergence, power - 1) for gain in (won, lost))
    return finish(-log_sigmoid(beta * (won - lost)), where, chosen_scores)


def _slope_of_divergence(log_ratio: jax.Array, name: Divergence, power: jax.Array) -> jax.Array:
    if name == "forward_kl":
        return -jnp.expm1(held(-log_ratio))
    if name == "js":
        return jnp.log(jnp.full((), 2, log_ratio.dtype)) + log_sigmoid(log_ratio)
    if name == "alpha":
        curved = jnp.abs(power) > 1e-6
        safe = jnp.where(curved, power, 1)
        return jnp.where(curved, jnp.expm1(held(safe * log_ratio)) / safe, log_ratio)
    return log_ratio
