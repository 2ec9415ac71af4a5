"""What to watch in training, as sums over tokens or pairs, so that chunks add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, keep

# Beyond this log-ratio the numbers below have said all they can, and squares would overflow.
_LARGEST_LOG_RATIO = 20.0


def policy_sums(
    target_logprobs: ArrayLike,
    sampling_logprobs: ArrayLike,
    advantages: ArrayLike = 0.0,
    *,
    clip_low_threshold: ArrayLike = 0.0,
    clip_high_threshold: ArrayLike = jnp.inf,
    where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
    """Sums over tokens of what tells how far a policy is from the one that sampled.

    With ``d = target_logprobs - sampling_logprobs``, held within [-20, 20], and ``r = exp(d)``:
    ``tokens``, their number; ``clipped``, how many lie where the clipped surrogate of :func:`ppo`
    has no gradient (``r > high`` and ``A > 0``, or ``r < low`` and ``A < 0``); ``outside``, how
    many ratios lie outside ``[low, high]``; ``ratio`` and ``ratio_squared``; ``kl_k1``, the sum of
    ``-d``, and ``kl_k3``, of ``r - 1 - d``: estimates of KL(sampler || model) from the sampler's
    tokens. No gradient passes.

    Args:
        target_logprobs: log-probabilities under the model in training, in nats; any shape.
        sampling_logprobs: of the same tokens under the policy that sampled them; same shape.
        advantages: same shape, or a scalar.
        clip_low_threshold: least ratio; a scalar, or one per token.
        clip_high_threshold: greatest ratio; a scalar, or one per token.
        where: same shape, boolean; which tokens count.

    Returns:
        Scalars by name. Those of two chunks of data, added, are those of both together.

    Raises:
        ValueError: the shapes do not fit.

    Reference:
        Schulman 2020, "Approximating KL Divergence".
    """
    # Nothing here is differentiated, so that masking the results is enough, and the ratio is held
    # in bounds behind the exponential, which the loss beside it takes of the same numbers.
    arrays = aligned(
        None,
        target_logprobs,
        sampling_logprobs=sampling_logprobs,
        advantages=advantages,
        clip_low_threshold=clip_low_threshold,
        clip_high_threshold=clip_high_threshold,
    )
    arrays = tuple(map(jax.lax.stop_gradient, arrays))
    # Behind a barrier, or XLA would take the exponential anew for each of the sums.
    ratio = jax.lax.optimization_barrier(jnp.exp(arrays[0] - arrays[1]))
    mask = () if where is None else (jnp.broadcast_to(jnp.asarray(where) != 0, ratio.shape),)
    return _sum_terms(_policy_terms, ratio, *arrays, *mask)


def _policy_terms(
    unbounded: jax.Array,
    target: jax.Array,
    sampling: jax.Array,
    advantages: jax.Array,
    low: jax.Array,
    high: jax.Array,
    where: jax.Array | None = None,
) -> dict[str, jax.Array]:
    log_ratio = jnp.clip(target - sampling, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    bound = math.exp(_LARGEST_LOG_RATIO)
    ratio = jnp.clip(unbounded, 1 / bound, bound)
    # exp(d) - 1 - d, which cancels near 0, where four terms of its series are as good as it gets.
    series = 1 + log_ratio / 3 * (1 + log_ratio / 4 * (1 + log_ratio / 5 * (1 + log_ratio / 6)))
    near = 0.5 * log_ratio * log_ratio * series
    terms = {
        "tokens": jnp.ones_like(ratio),
        "clipped": jnp.where(advantages > 0, ratio > high, (ratio < low) & (advantages < 0)),
        "outside": (ratio > high) | (ratio < low),
        "ratio": ratio,
        "ratio_squared": ratio * ratio,
        "kl_k1": -log_ratio,
        "kl_k3": jnp.where(jnp.abs(log_ratio) < 0.125, near, ratio - 1 - log_ratio),
    }
    return {name: keep(term.astype(ratio.dtype), where) for name, term in terms.items()}


def _sum_terms(
    terms: Callable[..., dict[str, jax.Array]], *arrays: jax.Array
) -> dict[str, jax.Array]:
    """The sums of what an element-wise function gives, in one pass over its arguments.

    Four parts of them are added up first: XLA does that in the loop that computes the terms, where
    for a sum it would write each of them to memory and read it again.
    """
    whole = [jnp.atleast_1d(array) for array in arrays]
    parts = 1 if whole[0].shape[0] % 4 else 4
    quarters = [terms(*part) for part in zip(*(jnp.split(a, parts) for a in whole), strict=True)]
    return _sum_each({name: sum(part[name] for part in quarters) for name in quarters[0]})


def _sum_each(values: Mapping[str, Any]) -> dict[str, jax.Array]:
    stacked = jnp.stack(list(values.values()))
    return dict(zip(values, stacked.reshape(len(values), -1).sum(axis=1), strict=True))


def policy_summary(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What :func:`policy_sums`, added over all chunks, amount to.

    Args:
        sums: as returned there.

    Returns:
        ``clip_fraction`` = clipped / tokens, ``outside_fraction``, ``mean_ratio``, ``ratio_std``,
        ``approx_kl`` (k3, in nats per token) and ``effective_sample_size`` =
        ``sum(r)**2 / sum(r**2) / tokens``, between 0 and 1. All are 0 for no tokens.

    Reference:
        Kong 1992, "A Note on Importance Sampling Using Standardized Weights".
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    mean = sums["ratio"] / tokens
    square = sums["ratio_squared"] / tokens
    return {
        "clip_fraction": sums["clipped"] / tokens,
        "outside_fraction": sums["outside"] / tokens,
        "mean_ratio": mean,
        "ratio_std": jnp.sqrt(jnp.maximum(square - mean * mean, 0)),
        "approx_kl": sums["kl_k3"] / tokens,
        "effective_sample_size": mean * mean / jnp.where(square > 0, square, 1),
    }


def preference_sums(
    chosen_scores: ArrayLike, rejected_scores: ArrayLike, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """Sums over pairs of what tells how well the model ranks them.

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
    """What :func:`preference_sums`, added over all chunks, amount to.

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
