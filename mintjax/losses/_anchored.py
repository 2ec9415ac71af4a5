"""Losses that look at the two answers of a pair one by one, each against its reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, finish
from mintjax.losses._scores import gains, labels
from mintjax.losses._settings import check_positive
from mintjax.losses._sigmoids import log_sigmoid, sigmoid


def apo_zero(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Anchored preference optimisation that raises the chosen and lowers the rejected answer.

    ``loss = sigmoid(-beta * c) + sigmoid(beta * r)`` with the log-ratios
    ``c = chosen_scores - ref_chosen_scores`` and ``r = rejected_scores - ref_rejected_scores``.

    When to use it: the chosen answers are better than what the model writes. DPO only asks for the
    difference, and may lower both.

    What others do: TRL and Liger ("apo_zero") have this form.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, between 0 and 2; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.apo_zero([-3.0], [-6.0], [-4.0], [-4.0])
        Array([0.925], dtype=float32)

    Reference:
        D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions:
        Addressing Underspecification in Alignment", eq. 7.
    """
    won, lost, beta = gains(
        where, chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores, beta
    )
    return finish(sigmoid(-beta * won) + sigmoid(beta * lost), where, chosen_scores)


def apo_down(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Anchored preference optimisation that lowers both answers, the rejected one more.

    ``loss = sigmoid(beta * c) + sigmoid(-beta * (c - r))`` with the log-ratios
    ``c = chosen_scores - ref_chosen_scores`` and ``r = rejected_scores - ref_rejected_scores``.

    When to use it: the model already writes better answers than the chosen ones.

    What others do: TRL and Liger ("apo_down") have this form.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, between 0 and 2; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.apo_down([-3.0], [-6.0], [-4.0], [-4.0])
        Array([0.951], dtype=float32)

    Reference:
        D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions:
        Addressing Underspecification in Alignment", eq. 8.
    """
    won, lost, beta = gains(
        where, chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores, beta
    )
    return finish(sigmoid(beta * won) + sigmoid(-beta * (won - lost)), where, chosen_scores)


def nca_pair(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Noise contrastive alignment of a pair, which keeps the chosen likelihood from falling.

    ``loss = -log sigmoid(beta * c) - log sigmoid(-beta * c) / 2 - log sigmoid(-beta * r) / 2`` with
    the log-ratios ``c = chosen_scores - ref_chosen_scores`` and
    ``r = rejected_scores - ref_rejected_scores``.

    When to use it: absolute likelihoods matter, such as in reasoning and mathematics.

    What others do: TRL and Liger ("nca_pair") have this form.

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
        >>> losses.nca_pair([-3.0], [-6.0], [-4.0], [-4.0])
        Array([1.316], dtype=float32)

    Reference:
        Chen et al. 2024, "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        the pairwise case.
    """
    won, lost, beta = gains(
        where, chosen_scores, rejected_scores, ref_chosen_scores, ref_rejected_scores, beta
    )
    contrast = log_sigmoid(-beta * won) + log_sigmoid(-beta * lost)
    return finish(-log_sigmoid(beta * won) - 0.5 * contrast, where, chosen_scores)


def bco_pair(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    reward_shift: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Binary classifier optimisation of a pair: chosen answers are good, rejected ones bad.

    ``loss = -log sigmoid(beta * c - d) - log sigmoid(-(beta * r - d))`` with the log-ratios
    ``c = chosen_scores - ref_chosen_scores``, ``r = rejected_scores - ref_rejected_scores`` and
    ``d = reward_shift``.

    When to use it: to compare with DPO on pairs; :func:`bco` is the same of single answers.

    What others do: TRL and Liger ("bco_pair") leave the shift at 0. The paper takes the running
    mean of the rewards of chosen and rejected answers.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar, or one per pair.
        reward_shift: the paper's delta, in units of the reward; a scalar, or one per pair. No
            gradient passes.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.bco_pair([-3.0], [-6.0], [-4.0], [-4.0])
        Array([1.242], dtype=float32)

    Reference:
        Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", the
        definition of L_BCO.
    """
    won, lost, beta, shift = gains(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        reward_shift=reward_shift,
    )
    shift = jax.lax.stop_gradient(shift)
    loss = -log_sigmoid(beta * won - shift) - log_sigmoid(shift - beta * lost)
    return finish(loss, where, chosen_scores)


def sppo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 1e-3,
    win_probability: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Self-play preference optimisation: each log-ratio is drawn to its probability of winning.

    ``loss = (c - (p - 1/2) / beta)**2 + (r - (1/2 - p) / beta)**2`` with the log-ratios
    ``c = chosen_scores - ref_chosen_scores``, ``r = rejected_scores - ref_rejected_scores`` and
    ``p = win_probability``.

    When to use it: rounds of self-play with a judge that gives probabilities.

    What others do: TRL and Liger ("sppo_hard") take ``p = 1``, with the ``beta`` of DPO as default.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: one over the paper's eta, above 0; a scalar, or one per pair.
        win_probability: that the chosen answer beats the rejected one; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats squared; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit, or ``beta`` is not above 0.

    Example:
        >>> from mintjax import losses
        >>> losses.sppo([-3.0], [-6.0], [-4.0], [-4.0], beta=0.1)
        Array([25.], dtype=float32)

    Reference:
        Wu et al. 2024, "Self-Play Preference Optimization for Language Model Alignment", eq. 4.7.
    """
    check_positive("sppo", beta=beta)
    won, lost, beta, chance = gains(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        win_probability=win_probability,
    )
    target = (chance - 0.5) / jnp.where(beta > 0, beta, 1)  # masking left 0
    return finish((won - target) ** 2 + (lost + target) ** 2, where, chosen_scores)


def bco(
    scores: ArrayLike,
    ref_scores: ArrayLike,
    desirable: ArrayLike,
    reward_shift: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Binary classifier optimisation: single answers labelled good or bad, no pairs.

    ``loss = -w * log sigmoid(sign * (beta * (scores - ref_scores) - reward_shift))`` where ``sign``
    is 1 and ``w`` is ``desirable_weight`` where the answer is desirable, -1 and
    ``undesirable_weight`` where it is not.

    When to use it: as :func:`kto`, whose loss levels off at both ends; this one keeps pulling on
    answers that are judged wrong by far.

    What others do: the paper's weights for prompts that differ between good and bad answers
    (underlying distribution matching) go into the two weights.

    Args:
        scores: sum of the logprobs of each answer under the model in training, in nats; any shape,
            such as ``[B]``.
        ref_scores: under the reference model; same shape, or a scalar.
        desirable: whether the answer is a good one; same shape, or a scalar. True or 1 is good;
            False, 0 or -1 is bad.
        reward_shift: the paper's delta, in units of the reward: the mean of the rewards
            ``beta * (scores - ref_scores)`` of good and of bad answers. A scalar, or one per
            answer. No gradient passes.
        beta: strength of the pull to the reference; a scalar, or one per answer.
        desirable_weight: of good answers; a scalar, or one per answer.
        undesirable_weight: of bad answers; a scalar, or one per answer.
        where: same shape, boolean; answers that are False give 0 and have gradient 0.

    Returns:
        The loss of each answer, in nats; shape and dtype of ``scores``.

    Raises:
        ValueError: the shapes do not fit, or a label is none of 1, 0 and -1.

    Example:
        >>> from mintjax import losses
        >>> losses.bco([-3.0], [-4.0], [True], 0.0)
        Array([0.644], dtype=float32)

    Reference:
        Jung et al. 2024, "Binary Classifier Optimization for Large Language Model Alignment", the
        definition of L_BCO.
    """
    gained, reference, label, shift, beta, good, bad = aligned(
        where,
        scores,
        ref_scores=ref_scores,
        desirable=labels(desirable, where),
        reward_shift=reward_shift,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    reward = beta * (gained - reference) - jax.lax.stop_gradient(shift)
    signed = jnp.where(label > 0, reward, -reward)
    weight = jnp.where(label > 0, good, bad) + 0 * label
    return finish(-weight * log_sigmoid(signed), where, scores)
