"""The losses and their derivatives in float64 NumPy, written apart from the package.

Each function takes arrays and returns the loss and its derivative with respect to the logprobs (or
scores) in training. Products with a coefficient of exactly 0 are 0: the limit, where IEEE says NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]


def f64(*arrays: Any) -> list[np.ndarray]:
    """All as float64."""
    return [np.asarray(array, np.float64) for array in arrays]


def times(a: Any, b: Any) -> np.ndarray:
    """``a * b``, with ``0 * inf = 0``."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, np.multiply(a, b))


def ratio_of(target: np.ndarray, sampling: np.ndarray) -> np.ndarray:
    """``exp(target - sampling)``."""
    with np.errstate(over="ignore"):
        return np.exp(target - sampling)


def clamp(values: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """Within the bounds."""
    return np.minimum(np.maximum(values, low), high)


def cross_entropy(target: Any, weights: Any) -> Pair:
    target, weights = f64(target, weights)
    return -times(weights, target), -weights


def importance_sampling(target: Any, sampling: Any, advantages: Any) -> Pair:
    target, sampling, advantages = f64(target, sampling, advantages)
    value = -times(ratio_of(target, sampling), advantages)
    return value, value


def ppo(target: Any, sampling: Any, advantages: Any, low: Any = 0.8, high: Any = 1.2) -> Pair:
    target, sampling, advantages = f64(target, sampling, advantages)
    ratio = ratio_of(target, sampling)
    free = times(ratio, advantages)
    held = times(clamp(ratio, low, high), advantages)
    # torch: where both are equal, half of each; the clamp has slope 1 at its bounds.
    slope_held = np.where((ratio >= low) & (ratio <= high), free, 0.0)
    slope = np.where(free < held, free, np.where(free > held, slope_held, (free + slope_held) / 2))
    return -np.minimum(free, held), -slope


def dual_clip_ppo(
    target: Any, sampling: Any, advantages: Any, low: Any = 0.8, high: Any = 1.2, dual: Any = 3.0
) -> Pair:
    value, slope = ppo(target, sampling, advantages, low, high)
    bound = -times(np.asarray(dual, np.float64), np.asarray(advantages, np.float64))
    negative = np.asarray(advantages) < 0
    slope = np.where(negative & (value > bound), 0.0, slope)
    slope = np.where(negative & (value == bound), slope / 2, slope)
    return np.where(negative, np.minimum(value, bound), value), slope


def cispo(target: Any, sampling: Any, advantages: Any, low: Any = 0.8, high: Any = 1.2) -> Pair:
    target, sampling, advantages = f64(target, sampling, advantages)
    coefficient = times(clamp(ratio_of(target, sampling), low, high), advantages)
    return -times(coefficient, target), -coefficient


def truncated_importance_sampling(
    target: Any, sampling: Any, advantages: Any, threshold: Any = 2.0
) -> Pair:
    return cispo(target, sampling, advantages, -np.inf, threshold)


def masked_importance_sampling(
    target: Any, sampling: Any, advantages: Any, low: Any = 0.5, high: Any = 2.0
) -> Pair:
    target, sampling, advantages = f64(target, sampling, advantages)
    ratio = ratio_of(target, sampling)
    coefficient = times(np.where((ratio >= low) & (ratio <= high), ratio, 0.0), advantages)
    return -times(coefficient, target), -coefficient


def vespo(target: Any, sampling: Any, advantages: Any) -> Pair:
    """One sequence, with a weight for each sign of its tokens' advantages."""
    target, sampling, advantages = f64(target, sampling, advantages)
    with np.errstate(invalid="ignore"):
        log_w = np.clip((target - sampling).sum(), np.log(1e-8), 20.0) if target.size else 0.0
    k, decay = (np.where(advantages >= 0, a, b) for a, b in ((2.0, 3.0), (3.0, 2.0)))
    coefficient = times(np.exp(k * log_w + decay * (1 - np.exp(log_w))), advantages)
    return -times(coefficient, target), -coefficient


def dppo(target: Any, sampling: Any, advantages: Any, threshold: float = 0.15) -> Pair:
    target, sampling, advantages = f64(target, sampling, advantages)
    shift = np.exp(target) - np.exp(sampling)
    left = np.where(advantages > 0, shift > threshold, shift < -threshold)
    value = -times(ratio_of(target, sampling), np.where(left, 0.0, advantages))
    return value, value


def dro(target: Any, sampling: Any, advantages: Any, beta: Any = 0.05) -> Pair:
    target, sampling, advantages = f64(target, sampling, advantages)
    distance = target - sampling
    square = times(beta / 2, distance * distance)
    with np.errstate(invalid="ignore"):
        value = np.where(np.isinf(square), square, square - times(target, advantages))
    return value, times(beta, distance) - advantages


def gspo(
    target: Any, sampling: Any, advantages: Any, keep: Any, low: Any = 0.8, high: Any = 1.2
) -> Pair:
    """``[B, T]``; the gradient flows through the token's own logprob only."""
    target, sampling, advantages = f64(target, sampling, advantages)
    difference = np.where(keep, target, 0) - np.where(keep, sampling, 0)
    mean = difference.sum(-1, keepdims=True) / np.maximum(np.sum(keep, -1, keepdims=True), 1)
    value, slope = ppo(np.broadcast_to(mean, target.shape), 0.0, advantages, low, high)
    return np.where(keep, value, 0), np.where(keep, slope, 0)


def kl_k1(target: Any, reference: Any) -> Pair:
    target, reference = f64(target, reference)
    return target - reference, np.ones_like(target)


def kl_k2(target: Any, reference: Any) -> Pair:
    target, reference = f64(target, reference)
    return (target - reference) ** 2 / 2, target - reference


def kl_k3(target: Any, reference: Any) -> Pair:
    target, reference = f64(target, reference)
    d = reference - target
    with np.errstate(invalid="ignore", over="ignore"):
        beyond = np.where(d == np.inf, np.inf, np.expm1(d) - d)
        series = d**2 / 2 * (1 + d / 3 * (1 + d / 4 * (1 + d / 5 * (1 + d / 6 * (1 + d / 7)))))
        return np.where(np.abs(d) < 1e-2, series, beyond), -np.expm1(d)


def l2_to_reference(target: Any, reference: Any) -> Pair:
    target, reference = f64(target, reference)
    return (target - reference) ** 2, 2 * (target - reference)


def sampled_entropy(target: Any) -> Pair:
    (target,) = f64(target)
    return -target, -np.ones_like(target)


def softplus(x: np.ndarray) -> np.ndarray:
    """``log(1 + exp(x))``, which is ``-log sigmoid(-x)``."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Without overflow or lost digits."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def bradley_terry(chosen: Any, rejected: Any) -> Triple:
    chosen, rejected = f64(chosen, rejected)
    slope = -sigmoid(rejected - chosen)
    return softplus(rejected - chosen), slope, -slope


def dpo(
    chosen: Any, rejected: Any, ref_c: Any, ref_r: Any, beta: float = 0.1, smoothing: float = 0.0
) -> Triple:
    chosen, rejected, ref_c, ref_r = f64(chosen, rejected, ref_c, ref_r)
    logits = beta * (chosen - ref_c - rejected + ref_r)
    value = (1 - smoothing) * softplus(-logits) + smoothing * softplus(logits)
    slope = beta * (smoothing * sigmoid(logits) - (1 - smoothing) * sigmoid(-logits))
    return value, slope, -slope


def ipo(chosen: Any, rejected: Any, ref_c: Any, ref_r: Any, beta: float = 0.1) -> Triple:
    chosen, rejected, ref_c, ref_r = f64(chosen, rejected, ref_c, ref_r)
    error = chosen - ref_c - rejected + ref_r - 1 / (2 * beta)
    return error**2, 2 * error, -2 * error


def simpo(
    chosen: Any, rejected: Any, n_c: Any, n_r: Any, beta: float = 2.0, gamma: float = 1.0
) -> Triple:
    chosen, rejected, n_c, n_r = f64(chosen, rejected, n_c, n_r)
    n_c, n_r = np.maximum(n_c, 1), np.maximum(n_r, 1)
    logits = beta * (chosen / n_c - rejected / n_r) - gamma
    slope = -beta * sigmoid(-logits)
    return softplus(-logits), slope / n_c, -slope / n_r


def orpo(chosen: Any, rejected: Any, n_c: Any, n_r: Any, weight: float = 0.1) -> Triple:
    """A probability that rounds to 1, which has no odds, stands for ``exp(-2**-23)``."""
    chosen, rejected, n_c, n_r = f64(chosen, rejected, n_c, n_r)
    n_c, n_r = np.maximum(n_c, 1), np.maximum(n_r, 1)
    eps = 2.0**-23
    c, r = np.minimum(chosen / n_c, -eps), np.minimum(rejected / n_r, -eps)
    log_not_c, log_not_r = np.log(-np.expm1(c)), np.log(-np.expm1(r))
    log_odds = c - log_not_c - r + log_not_r
    share = sigmoid(-log_odds)
    slope_c = -1 - weight * share / -np.expm1(c)
    slope_r = weight * share / -np.expm1(r)
    return -chosen / n_c + weight * softplus(-log_odds), slope_c / n_c, slope_r / n_r


def kto(
    scores: Any,
    reference: Any,
    good: Any,
    kl: float,
    beta: float = 0.1,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
) -> Pair:
    scores, reference = f64(scores, reference)
    sign = np.where(good, 1.0, -1.0)
    weight = np.where(good, good_weight, bad_weight)
    x = sign * beta * (scores - reference - max(kl, 0.0))
    return weight * sigmoid(-x), -weight * sign * beta * sigmoid(x) * sigmoid(-x)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def distillation_forward_kl(student: Any, teacher: Any, renormalise: bool = False) -> Pair:
    student, teacher = f64(student, teacher)
    if renormalise:
        student, teacher = log_softmax(student), log_softmax(teacher)
    p = np.exp(teacher)
    with np.errstate(invalid="ignore"):
        value = times(p, teacher - student).sum(-1)
    slope = np.exp(student) * p.sum(-1, keepdims=True) - p if renormalise else -p
    return value, slope


def distillation_reverse_kl(student: Any, teacher: Any, renormalise: bool = False) -> Pair:
    student, teacher = f64(student, teacher)
    if renormalise:
        student, teacher = log_softmax(student), log_softmax(teacher)
    q = np.exp(student)
    with np.errstate(invalid="ignore"):
        terms = times(q, student - teacher)
        value = terms.sum(-1)
        slope = terms - q * value[..., None] if renormalise else terms + q
    return value, slope


def brier_score(student: Any, outcomes: Any) -> Pair:
    student, outcomes = f64(student, outcomes)
    p = np.exp(student)
    return ((p - outcomes) ** 2).sum(-1), 2 * (p - outcomes) * p
