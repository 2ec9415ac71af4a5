"""Preference losses without a reference model, and losses of ranked lists and single tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, finish, harmless_where_zero
from mintjax.losses._scores import held, ramp, smoothed
from mintjax.losses._sigmoids import log1mexp, log_sigmoid


def cpo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    nll_weight: ArrayLike = 1.0,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Contrastive preference optimisation: DPO under a uniform reference, and the likelihood.

    ``loss = -(1 - e) * log sigmoid(beta * m) - e * log sigmoid(-beta * m) - nll_weight *
    chosen_scores / chosen_lengths`` with ``m = chosen_scores - rejected_scores`` and
    ``e = label_smoothing``.

    When to use it: no memory or time for a reference model; the likelihood keeps the model near its
    data in its place.

    What others do: the paper sums the NLL over an answer. TRL takes its mean over all tokens of the
    batch, prompts among them; Liger, over the answers.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        chosen_lengths: number of tokens in each chosen sum; same shape. A length of 0 counts as 1.
        beta: scale of the margin; a scalar, or one per pair.
        nll_weight: of the likelihood of the chosen answer; a scalar, or one per pair.
        label_smoothing: ``e``, the probability that a label is wrong, in [0, 1/2); a scalar, or one
            per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.cpo([-3.0], [-6.0], [3.0])
        Array([1.554], dtype=float32)

    Reference:
        Xu et al. 2024, "Contrastive Preference Optimization: Pushing the Boundaries of LLM
        Performance in Machine Translation", eq. 3 and the objective after it.
    """
    chosen, rejected, lengths, beta, weight, smoothing = aligned(
        where,
        chosen_scores,
        rejected_scores=rejected_scores,
        chosen_lengths=chosen_lengths,
        beta=beta,
        nll_weight=nll_weight,
        label_smoothing=label_smoothing,
    )
    nll = weight * harmless_where_zero(weight, chosen / jnp.maximum(lengths, 1))
    return finish(smoothed(beta * (chosen - rejected), smoothing) - nll, where, chosen_scores)


def alphapo(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    chosen_lengths: ArrayLike,
    rejected_lengths: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 1.0,
    alpha: ArrayLike = 0.25,
    where: ArrayLike | None = None,
) -> jax.Array:
    """SimPO with a bent reward: the shape of the reward decides how hard both answers are pushed.

    ``loss = -log sigmoid(reward_c - reward_r - gamma)`` with ``reward = beta * (1 - p**-alpha) /
    alpha``, where ``log p`` is the mean logprob per token; ``alpha = 0`` is :func:`simpo`. An
    exponent ``-alpha * log p`` that would overflow is held at 80 (638 in float64).

    When to use it: SimPO lowers the likelihood of chosen answers too far, or not far enough.

    What others do: TRL has it as ``alpha`` of its CPO trainer, with SimPO's loss; it takes the
    power of a probability, which overflows.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        chosen_lengths: number of tokens in each sum; same shape. A length of 0 counts as 1.
        rejected_lengths: of the rejected answers; same shape.
        beta: scale of the reward; a scalar, or one per pair.
        gamma: the margin, in units of the reward; a scalar, or one per pair.
        alpha: bend of the reward; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.alphapo([-3.0], [-6.0], [3.0], [2.0])
        Array([0.0035], dtype=float32)

    Reference:
        Gupta et al. 2025, "AlphaPO: Reward Shape Matters for LLM Alignment", the definition of its
        reward and loss.
    """
    chosen, rejected, long, short, beta, gamma, alpha = aligned(
        where,
        chosen_scores,
        rejected_scores=rejected_scores,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta=beta,
        gamma=gamma,
        alpha=alpha,
    )
    won = bent_reward(chosen / jnp.maximum(long, 1), alpha=alpha)
    lost = bent_reward(rejected / jnp.maximum(short, 1), alpha=alpha)
    return finish(-log_sigmoid(beta * (won - lost) - gamma), where, chosen_scores)


def bent_reward(mean_logprobs: jax.Array, *, alpha: ArrayLike) -> jax.Array:
    """Computes ``(1 - p**-alpha) / alpha`` of ``log p``, which is ``log p`` for ``alpha = 0``."""
    alpha = jnp.broadcast_to(jnp.asarray(alpha, mean_logprobs.dtype), mean_logprobs.shape)
    safe = jnp.where(alpha == 0, 1, alpha)
    return jnp.where(alpha == 0, mean_logprobs, -jnp.expm1(held(-safe * mean_logprobs)) / safe)


def slic(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    *,
    margin: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Sequence likelihood calibration: the chosen answer must lead by a margin, then it rests.

    ``loss = max(0, margin - chosen_scores + rejected_scores)``. The slope at the bend is 0. The
    method adds the likelihood of the fine-tuning data: a term of a weighted sum.

    When to use it: no reference model, and pairs that are won should pull no longer.

    What others do: TRL has :func:`hinge`, with a reference, and, in its CPO trainer,
    ``max(0, 1 - beta * m)`` without one.

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats; any shape, such as ``[P]``.
        rejected_scores: of the rejected answers; same shape.
        margin: the paper's delta, in nats; a scalar, or one per pair.
        where: same shape, boolean; pairs that are False give 0 and have gradient 0.

    Returns:
        The loss of each pair, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.slic([-3.0, -3.0], [-6.0, -3.5])
        Array([0. , 0.5], dtype=float32)

    Reference:
        Zhao et al. 2023, "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", section 2.
    """
    chosen, rejected, margin = aligned(
        where, chosen_scores, rejected_scores=rejected_scores, margin=margin
    )
    return finish(ramp(margin - chosen + rejected), where, chosen_scores)


def plackett_luce(scores: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Negative log-likelihood of a whole ranking, best first: Bradley-Terry for lists.

    ``loss = sum_i (logsumexp(scores_i, ..., scores_N) - scores_i)``: the best answer wins against
    all, the second against the rest, and so on. Two answers are :func:`bradley_terry`.

    When to use it: more than two answers per prompt are ranked. With scores
    ``beta * (s - ref)`` it is listwise DPO.

    What others do: OpenRLHF and TRL cut a list into pairs, which count some comparisons twice.

    Args:
        scores: one per answer, in nats, best first: ``[..., N]``, the last axis along one list.
        where: same shape, boolean; answers that are False are left out of the ranking.

    Returns:
        The loss of each list, in nats: ``[...]``, dtype of ``scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.plackett_luce([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]).tolist()
        [0.721, 3.721]

    Reference:
        Plackett 1975, "The Analysis of Permutations"; for language models Rafailov et al. 2023,
        "Direct Preference Optimization", appendix A.3.
    """
    (given,) = aligned(where, scores)
    present = jnp.ones(given.shape, bool) if where is None else as_mask(where, given.shape)
    # An absent answer scores so low that it adds nothing; -inf would be inf - inf in the gradient.
    low = jnp.where(present, given, jnp.full((), -1e30, given.dtype))
    onwards = jax.lax.cumlogsumexp(low, axis=given.ndim - 1, reverse=True)
    rest = jnp.concatenate([onwards[..., 1:], jnp.full_like(low[..., :1], -1e30)], axis=-1)
    # log(exp(s) + exp(rest)) - s, by the form that keeps its digits where the answer wins by far.
    loss = jnp.sum(jnp.where(present, -log_sigmoid(low - rest), 0), axis=-1)
    return finish(loss, None, scores)


def unlikelihood(target_logprobs: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """Negative log-probability of not writing a token.

    ``loss = -log(1 - exp(target_logprobs))``. A logprob above ``-2**-23`` counts as that.

    When to use it: tokens that shall not be written, such as repetitions, in answers that are
    right otherwise.

    What others do: fairseq clamps the complement at 1e-5, where its gradient is 0.

    Args:
        target_logprobs: log-probabilities of the unwanted tokens, in nats; any shape.
        where: same shape, boolean; positions that are False give 0 and have gradient 0.

    Returns:
        The loss of each token, in nats; shape and dtype of ``target_logprobs``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.unlikelihood([-0.5, -5.0])
        Array([0.933, 0.007], dtype=float32)

    Reference:
        Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training", eq. 4 (equation
        number unconfirmed).
    """
    (target,) = aligned(where, target_logprobs)
    return finish(-log1mexp(target), where, target_logprobs)
