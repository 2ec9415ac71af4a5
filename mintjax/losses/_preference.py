"""Losses on sequence scores: pairs of a chosen and a rejected answer, or single labelled ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import (
    aligned,
    finish,
)
from mintjax.losses._scores import labels, margins, smoothed
from mintjax.losses._sigmoids import log_odds, log_sigmoid, sigmoid


def bradley_terry(
    chosen_scores: ArrayLike, rejected_scores: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Negative log-likelihood that the chosen answer wins, under the Bradley-Terry model.

    ``loss = -log sigmoid(chosen_scores - rejected_scores)``

    When to use it: reward models, and policies whose scores are compared without a reference.

    What others do: the same everywhere.

    Args:
        chosen_scores: score of each pair's chosen answer, such as the sum of its tokens' logprobs,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.bradley_terry([-3.0], [-6.0])
        Array([0.049], dtype=float32)

    Reference:
        Bradley & Terry 1952, "Rank Analysis of Incomplete Block Designs"; as a training loss Ouyang
        et al. 2022, "Training language models to follow instructions with human feedback", eq. 1.
    """
    chosen, rejected = aligned(where, chosen_scores, rejected_scores=rejected_scores)
    return finish(-log_sigmoid(chosen - rejected), where, chosen_scores)


def dpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Direct preference optimisation, conservative where labels may be wrong.

    ``loss = -(1 - e) * log sigmoid(beta * m) - e * log sigmoid(-beta * m)`` with the margin
    ``m = (chosen_scores - ref_chosen_scores) - (rejected_scores - ref_rejected_scores)`` and
    ``e = label_smoothing``. Reference scores of 0 make it reference-free.

    When to use it: pairs, and a reference model near the policy. TR-DPO is this loss with a
    reference that is a schedule: every so many steps (its hard update), save the weights, and take
    the reference scores of what follows from these, such as by a forward pass of all pairs. Its
    soft update, a moving average of weights, needs a trainer that averages weights.

    What others do: TRL, Liger, OpenRLHF and the Tinker cookbook have this form; TRL smooths labels
    in its robust form only. Its ``ld_alpha`` is the weight, in all four scores, of the tokens
    beyond the length of the pair's shorter answer.

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
        >>> losses.dpo([-3.0], [-6.0], [-4.0], [-4.0])
        Array([0.554], dtype=float32)

    Reference:
        Rafailov et al. 2023, "Direct Preference Optimization", eq. 7; label smoothing: Mitchell
        2023, "A note on DPO with noisy preferences & relationship to IPO", eq. 3.
    """
    logits, smoothing = margins(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        label_smoothing=label_smoothing,
    )
    return finish(smoothed(logits, smoothing), where, chosen_scores)


def simpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Simple preference optimisation: no reference, scores per token, a margin to win by.

    ``loss = -log sigmoid(beta * (chosen_scores / chosen_lengths - rejected_scores /
    rejected_lengths) - gamma)``

    When to use it: no reference model, and answers of different lengths.

    What others do: TRL and Liger have this form, the margin as ``gamma`` or as a ratio to ``beta``.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer, in nats; any shape, such as
            ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        chosen_lengths: number of tokens in each sum; same shape. A length of 0 counts as 1.
        rejected_lengths: of the rejected answers; same shape.
        beta: scale of the reward; a scalar, or one per pair.
        gamma: the margin, in units of the reward; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.simpo([-3.0], [-6.0], [3.0], [2.0])
        Array([0.049], dtype=float32)

    Reference:
        Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        eq. 6.
    """
    chosen, rejected, chosen_lengths, rejected_lengths, beta, gamma = aligned(
        where,
        chosen_scores,
        rejected_scores=rejected_scores,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta=beta,
        gamma=gamma,
    )
    margin = _per_token(chosen, chosen_lengths) - _per_token(rejected, rejected_lengths)
    return finish(-log_sigmoid(beta * margin - gamma), where, chosen_scores)


def orpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    odds_ratio_weight: ArrayLike = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Odds-ratio preference optimisation: likelihood of the chosen answer and its odds of winning.

    ``loss = -c - odds_ratio_weight * log sigmoid(log odds(c) - log odds(d))`` where ``c`` and ``d``
    are the mean logprobs of the chosen and the rejected answer, and
    ``log odds(x) = x - log(1 - exp(x))``.

    When to use it: fine-tuning and preferences in one stage, without a reference model.

    What others do: TRL's likelihood is the mean over all tokens of prompt and answer; tunix takes
    the odds of sums. At a mean logprob of 0 theirs are NaN or infinite.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer, in nats; any shape, such as
            ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        chosen_lengths: number of tokens in each sum; same shape. A length of 0 counts as 1.
        rejected_lengths: of the rejected answers; same shape.
        odds_ratio_weight: the paper's lambda; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.orpo([-3.0], [-6.0], [3.0], [2.0])
        Array([1.009], dtype=float32)

    Reference:
        Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", eq. 7,
        with the odds of eq. 4.
    """
    chosen, rejected, chosen_lengths, rejected_lengths, weight = aligned(
        where,
        chosen_scores,
        rejected_scores=rejected_scores,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        odds_ratio_weight=odds_ratio_weight,
    )
    chosen, rejected = _per_token(chosen, chosen_lengths), _per_token(rejected, rejected_lengths)
    return finish(
        -chosen - weight * log_sigmoid(log_odds(chosen) - log_odds(rejected)), where, chosen_scores
    )


def kto(
    scores: ArrayLike,
    ref_scores: ArrayLike,
    desirable: ArrayLike,
    kl: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    desirable_weight: ArrayLike = 1.0,
    undesirable_weight: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Kahneman-Tversky optimisation: single answers labelled good or bad, no pairs.

    ``loss = w * (1 - sigmoid(sign * beta * (scores - ref_scores - z)))`` with ``z = max(kl, 0)``
    held constant; ``sign`` is 1 and ``w`` is ``desirable_weight`` where the answer is desirable, -1
    and ``undesirable_weight`` where it is not.

    When to use it: answers with a thumb up or down, no pairs.

    What others do: TRL and Liger have this form and estimate ``kl`` from mismatched answers. With
    ``kl = 0`` it is TRL's "apo_zero_unpaired".

    Args:
        scores: sum of the logprobs of each answer under the model in training, in nats; any shape,
            such as ``[B]``.
        ref_scores: under the reference model; same shape, or a scalar.
        desirable: whether the answer is a good one; same shape, or a scalar. True or 1 is good;
            False, 0 or -1 is bad.
        kl: an estimate of the divergence of the model from the reference, in nats: the point from
            which gain and loss are felt. The paper takes the mean of ``scores - ref_scores`` over
            answers paired with other questions' prompts. A scalar, or one per answer.
        beta: aversion to risk; a scalar, or one per answer.
        desirable_weight: the paper's lambda_D; a scalar, or one per answer.
        undesirable_weight: the paper's lambda_U; a scalar, or one per answer.
        where: same shape, boolean; answers that are False give 0 and have gradient 0.

    Returns:
        The loss of each answer, between 0 and its weight; shape and dtype of ``scores``.

    Raises:
        ValueError: the shapes do not fit, or a label is none of 1, 0 and -1.

    Example:
        >>> from mintjax import losses
        >>> losses.kto([-3.0], [-4.0], [True], 0.0)
        Array([0.475], dtype=float32)

    Reference:
        Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", eq. 7.
    """
    gained, reference, label, kl, beta, good_weight, bad_weight = aligned(
        where,
        scores,
        ref_scores=ref_scores,
        desirable=labels(desirable, where),
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    gain = gained - reference - jax.lax.stop_gradient(jnp.maximum(kl, 0))
    sign = jnp.where(label > 0, jnp.ones_like(gain), -jnp.ones_like(gain))
    weight = jnp.where(label > 0, good_weight, bad_weight) + 0 * label
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where it is small.
    return finish(weight * sigmoid(-sign * beta * gain), where, scores)


def _per_token(scores: jax.Array, lengths: jax.Array) -> jax.Array:
    return scores / jnp.maximum(lengths, 1)
