"""Diagnostics of training, as sums over tokens or pairs, so that chunks add up."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, keep
from mintjax.losses._settings import check_bounds

# Beyond this log-ratio the numbers below have said all they can, and squares would overflow.
_LARGEST_LOG_RATIO = 20.0
_LARGEST_RATIO = math.exp(_LARGEST_LOG_RATIO)
_SMALLEST_RATIO = math.exp(-_LARGEST_LOG_RATIO)

POLICY_TERMS = (
    "tokens",
    "clipped",
    "outside",
    "ratio",
    "ratio_squared",
    "excess",
    "excess_squared",
    "kl_k1",
    "kl_k3",
)
"""The names of the sums in :func:`policy_sums`."""


def policy_sums(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike = 0.0,
    *,
    clip_low_threshold: ArrayLike = 0.0,
    clip_high_threshold: ArrayLike = jnp.inf,
    clipped: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Sums over tokens what tells how far a policy is from the one that sampled.

    With ``d = target_logprobs - sampling_logprobs``, held within [-20, 20], and ``r = exp(d)``:
    ``tokens``, their number; ``clipped``, how many of them the loss clips: by default those where
    the clipped surrogate of :func:`ppo` has no gradient (``r > high`` and ``A > 0``, or ``r < low``
    and ``A < 0``); ``outside``, how many ratios lie outside ``[low, high]``; ``ratio`` and
    ``ratio_squared``; ``excess``, the sum of ``r - 1``, and ``excess_squared``, of its square;
    ``kl_k1``, the sum of ``-d``, and ``kl_k3``, of ``r - 1 - d``: estimates of
    KL(sampler || model) from the sampler's tokens. No gradient passes.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        clip_low_threshold: least ratio; a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        clipped: which tokens the loss clips, as :func:`clipped_tokens` tells of each loss; same
            shape, boolean. None takes the rule of :func:`ppo`.
        where: same shape, boolean; which tokens count.

    Returns:
        Scalars by name, float32 or float64. Those of two chunks of data, added, are those of both
        together.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Reference:
        Schulman 2020, "Approximating KL Divergence".
    """
    terms = policy_terms(
        target_logprobs,
        sampling_logprobs,
        advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
        clipped=clipped,
        where=where,
    )
    return _sum_each(terms)


def _sum_each(values: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.sum(value) for name, value in values.items()}


def policy_terms(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike = 0.0,
    *,
    clip_low_threshold: ArrayLike = 0.0,
    clip_high_threshold: ArrayLike = jnp.inf,
    clipped: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Gives each token's part in the sums of :func:`policy_sums`.

    With ``d = target_logprobs - sampling_logprobs``: 1 for ``tokens``, ``exp(d)`` for ``ratio``,
    ``-d`` for ``kl_k1``, and so on. No gradient passes.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        clip_low_threshold: least ratio; a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        clipped: which tokens the loss clips, as :func:`clipped_tokens` tells of each loss; same
            shape, boolean. None takes the rule of :func:`ppo`.
        where: same shape, boolean; which tokens count.

    Returns:
        Arrays by the names :data:`POLICY_TERMS`, in the shape of ``target_logprobs``, 0 where
        masked: counts, and ratios and nats.

    Raises:
        ValueError: the shapes do not fit, or the low threshold is above the high one.

    Reference:
        Schulman 2020, "Approximating KL Divergence".
    """
    check_bounds(clip_low_threshold, clip_high_threshold)
    arrays = aligned(
        where,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
    )
    target, sampling, advantages, low, high = map(jax.lax.stop_gradient, arrays)
    difference = target - sampling
    log_ratio = jnp.clip(difference, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    # The exponential of what is not clipped is the one that the loss needs too: one of them is run.
    ratio = jnp.clip(jnp.exp(difference), _SMALLEST_RATIO, _LARGEST_RATIO)
    # exp(d) - 1 - d, which cancels near 0, where a series of four terms keeps its digits.
    series = 1 + log_ratio / 3 * (1 + log_ratio / 4 * (1 + log_ratio / 5 * (1 + log_ratio / 6)))
    near = jnp.abs(log_ratio) < 0.125
    beyond_linear = jnp.where(near, 0.5 * log_ratio * log_ratio * series, ratio - 1 - log_ratio)
    excess = jnp.where(near, log_ratio + beyond_linear, ratio - 1)
    if clipped is None:
        clipped = jnp.where(advantages > 0, ratio > high, (ratio < low) & (advantages < 0))
    terms = {
        "tokens": jnp.ones_like(ratio),
        "clipped": as_mask(clipped, ratio.shape),
        "outside": (ratio > high) | (ratio < low),
        "ratio": ratio,
        "ratio_squared": ratio * ratio,
        "excess": excess,
        "excess_squared": excess * excess,
        "kl_k1": -log_ratio,
        "kl_k3": beyond_linear,
    }
    return {name: keep(term.astype(ratio.dtype), where) for name, term in terms.items()}


def policy_summary(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Summarises :func:`policy_sums`, added over all chunks.

    Args:
        sums: as returned there; ``kl_k1`` is not read, and may be missing.

    Returns:
        ``clip_fraction`` = clipped / tokens, ``outside_fraction``, ``mean_ratio``, ``approx_kl``
        (k3, in nats per token), ``effective_sample_size`` = ``sum(r)**2 / sum(r**2) / tokens``,
        between 0 and 1, and ``ratio_std``, if ``sums`` has ``excess_squared``. All are 0 for no
        tokens.

    Reference:
        Kong 1992, "A Note on Importance Sampling Using Standardized Weights".
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    mean = sums["ratio"] / tokens
    square = sums["ratio_squared"] / tokens
    summary = {
        "clip_fraction": sums["clipped"] / tokens,
        "outside_fraction": sums["outside"] / tokens,
        "mean_ratio": mean,
        "approx_kl": sums["kl_k3"] / tokens,
        "effective_sample_size": mean * mean / jnp.where(square > 0, square, 1),
    }
    if "excess_squared" in sums:
        # From ratios less 1, because on-policy the mean of their squares and the square of their
        # mean are both 1, and their difference would be rounding error.
        shift = sums["excess"] / tokens
        variance = sums["excess_squared"] / tokens - shift * shift
        summary["ratio_std"] = jnp.sqrt(jnp.maximum(variance, 0))
    return summary


def preference_sums(
    chosen_scores: ArrayLike, rejected_scores: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Sums over pairs what tells how well the model ranks them.

    ``pairs``, their number; ``correct``, how many have a margin ``chosen_scores - rejected_scores``
    above 0; ``margin``; ``chosen`` and ``rejected``, the scores. No gradient passes.

    Args:
        chosen_scores: score, or implicit reward, of each pair's chosen answer; any shape.
        rejected_scores: of the rejected answers; same shape.
        where: same shape, boolean; which pairs count.

    Returns:
        Scalars by name. Those of two chunks of data, added, are those of both together.

    Raises:
        ValueError: the shapes do not fit.
    """
    arrays = aligned(where, chosen_scores, rejected_scores=rejected_scores)
    chosen, rejected = map(jax.lax.stop_gradient, arrays)
    margin = chosen - rejected
    per_pair = {
        "pairs": jnp.ones_like(margin),
        "correct": (margin > 0).astype(margin.dtype),
        "margin": margin,
        "chosen": chosen,
        "rejected": rejected,
    }
    return _sum_each({name: keep(values, where) for name, values in per_pair.items()})


def preference_summary(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Summarises :func:`preference_sums`, added over all chunks.

    Args:
        sums: as returned there.

    Returns:
        ``pair_accuracy`` = correct / pairs, ``mean_margin``, ``mean_chosen`` and ``mean_rejected``,
        in units of the scores. All are 0 for no pairs.
    """
    pairs = jnp.maximum(sums["pairs"], 1)
    return {
        "pair_accuracy": sums["correct"] / pairs,
        "mean_margin": sums["margin"] / pairs,
        "mean_chosen": sums["chosen"] / pairs,
        "mean_rejected": sums["rejected"] / pairs,
    }
