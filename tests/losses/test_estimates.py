"""Advantages, aggregations and diagnostics, against NumPy."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mintjax import losses as library

from ..by_numpy import evaluated

losses = evaluated(library)

REWARDS = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.5, -3.0, 1.0, 7.0]], np.float32)
WHERE = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]], bool)


def test_group_mean_centred():
    expected = REWARDS - REWARDS.mean(-1, keepdims=True)
    np.testing.assert_allclose(losses.group_mean_centred(REWARDS), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.dr_grpo(REWARDS), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.grpo(REWARDS, scale_by_std=False), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e18, 1e30])
def test_rewards_of_any_scale_have_the_same_standing(scale):
    rewards = np.float32([3.0, -1.0, 0.5, 2.0, 2.0, -4.0])
    large = (scale * rewards).astype(np.float32)
    for function in (losses.grpo, losses.pass_at_k, losses.whiten):
        standing = np.asarray(function(rewards, epsilon=0.0))
        np.testing.assert_allclose(function(large, epsilon=0.0), standing, rtol=1e-5, atol=1e-6)
    kept = np.abs(rewards - rewards.mean()) <= 1.2 * rewards.std(ddof=1)
    np.testing.assert_array_equal(losses.advantage_filter(large, deviations=1.2), kept)


def test_rloo_leaves_each_out():
    expected = np.empty_like(REWARDS)
    for g, group in enumerate(REWARDS):
        for i in range(4):
            expected[g, i] = group[i] - np.delete(group, i).mean()
    np.testing.assert_allclose(losses.rloo(REWARDS), expected, rtol=1e-5, atol=1e-6)


def test_grpo_divides_by_the_sample_deviation():
    std = REWARDS.std(-1, ddof=1, keepdims=True)
    expected = (REWARDS - REWARDS.mean(-1, keepdims=True)) / (std + 1e-6)
    np.testing.assert_allclose(losses.grpo(REWARDS), expected, rtol=1e-5)


ESTIMATORS = [losses.group_mean_centred, losses.rloo, losses.grpo, losses.dr_grpo]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_ignore_what_is_masked(estimator):
    poisoned = np.where(WHERE, REWARDS, np.nan)
    with jax.debug_nans(True):
        result = np.asarray(estimator(poisoned, where=WHERE))
    kept = estimator(REWARDS[:1, [0, 1, 3]])
    np.testing.assert_allclose(result[0, [0, 1, 3]], kept[0], rtol=1e-6)
    assert (result[~WHERE] == 0).all()
    assert result[2, 2] == 0  # a group of one


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_have_finite_gradients_where_rewards_agree(estimator):
    grads = jax.grad(lambda r: (estimator(r) * np.arange(12.0).reshape(3, 4)).sum())(REWARDS)
    assert np.isfinite(grads).all()


VALUES = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
TOKENS = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], bool)


def test_aggregations():
    poisoned = np.where(TOKENS, VALUES, np.nan)
    kept = VALUES[TOKENS]
    np.testing.assert_allclose(losses.token_mean(poisoned, where=TOKENS), kept.mean(), rtol=1e-6)
    means = [VALUES[0][TOKENS[0]].mean(), VALUES[2][TOKENS[2]].mean()]
    np.testing.assert_allclose(
        losses.sequence_mean(poisoned, where=TOKENS), np.mean(means), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.fixed_length_mean(poisoned, 10, where=TOKENS), kept.sum() / 30, rtol=1e-6
    )


@pytest.mark.parametrize("mean", [losses.token_mean, losses.sequence_mean])
def test_the_mean_of_nothing_is_zero(mean):
    assert mean(VALUES, where=np.zeros_like(TOKENS)) == 0


def policy_batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logprobs of model and sampler, and advantages: a small batch."""
    target, sampling, advantages = np.random.default_rng(1).normal(0, 0.4, (3, 8, 6))
    return target, sampling, advantages


def policy(rows: slice, where: np.ndarray | None = None) -> dict[str, jax.Array]:
    """The sums over some rows of a small batch."""
    target, sampling, advantages = policy_batch()
    mask = None if where is None else where[rows]
    return losses.policy_sums(
        target[rows],
        sampling[rows],
        advantages[rows],
        clip_low_threshold=0.8,
        clip_high_threshold=1.2,
        where=mask,
    )


def test_policy_sums_add_up_over_chunks():
    whole, first, rest = policy(slice(None)), policy(slice(0, 4)), policy(slice(4, None))
    for name, value in whole.items():
        np.testing.assert_allclose(first[name] + rest[name], value, rtol=1e-5, atol=1e-6)


def test_policy_summary_is_what_it_says():
    target, sampling, advantages = policy_batch()
    where = np.random.default_rng(2).random((8, 6)) < 0.7
    d = (target - sampling)[where]
    r, a = np.exp(d), advantages[where]
    expected = {
        "clip_fraction": np.mean(((r > 1.2) & (a > 0)) | ((r < 0.8) & (a < 0))),
        "outside_fraction": np.mean((r > 1.2) | (r < 0.8)),
        "mean_ratio": r.mean(),
        "ratio_std": r.std(),
        "approx_kl": np.mean(r - 1 - d),
        "effective_sample_size": r.sum() ** 2 / (r**2).sum() / r.size,
    }
    summary = losses.policy_summary(policy(slice(None), where))
    assert summary.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(summary[name], value, rtol=2e-5)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (7, 2), (8, 3), (0,)])
@pytest.mark.parametrize("masked", [False, True])
def test_policy_sums_take_any_shape(shape, masked):
    rng = np.random.default_rng(3)
    target, sampling, advantages = rng.standard_normal((3, *shape)).astype(np.float32)
    where = rng.random(shape) < 0.5 if masked else None
    sums = losses.policy_sums(target, sampling, advantages, where=where)
    kept = np.ones(shape, bool) if where is None else where
    d = (target - sampling).astype(np.float64)[kept]
    assert sums["tokens"] == kept.sum()
    for name, values in {"ratio": np.exp(d), "kl_k1": -d, "kl_k3": np.expm1(d) - d}.items():
        np.testing.assert_allclose(sums[name], values.sum(), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 0.1, 0.124, 0.126, 0.5, 2.0])
def test_a_small_divergence_is_not_lost_in_rounding(scale):
    d = (scale * np.linspace(-1, 1, 101)).astype(np.float32)
    sums = losses.policy_sums(d, np.zeros_like(d))
    wide = d.astype(np.float64)
    np.testing.assert_allclose(sums["kl_k3"], (np.expm1(wide) - wide).sum(), rtol=2e-5)


def test_diagnostics_stay_finite_and_carry_no_gradient():
    target = np.array([300.0, -300.0, 0.0], np.float32)

    def clip_fraction(target: jax.Array) -> jax.Array:
        summary = losses.policy_summary(losses.policy_sums(target, 0.0, 1.0))
        assert len(summary) == 6
        return sum(summary.values(), start=jax.numpy.zeros(()))

    with jax.debug_nans(True):
        value, grad = jax.value_and_grad(clip_fraction)(target)
    assert np.isfinite(value)
    assert (grad == 0).all()


def test_preference_summary_counts_pairs():
    chosen, rejected = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 5.0, 1.0])
    summary = losses.preference_summary(losses.preference_sums(chosen, rejected))
    assert {name: float(value) for name, value in summary.items()} == {
        "pair_accuracy": 0.5,
        "mean_margin": 0.5,
        "mean_chosen": 2.5,
        "mean_rejected": 2.0,
    }
    nothing = losses.preference_sums(chosen, rejected, where=np.zeros(4, bool))
    assert set(map(float, losses.preference_summary(nothing).values())) == {0.0}


def test_describe_has_every_trainer_and_loss():
    text = losses.describe()
    for row in losses.CONVENTIONS:
        assert row.trainer in text
        for name in row.losses:
            assert name in text
    tuft = next(line for line in text.splitlines() if "TuFT" in line)
    assert "0.9 / 1.1" in tuft
    assert "0.01" in tuft


def test_a_weight_has_a_derivative_too():
    logprobs, weights = np.array([-0.5, -2.0, -np.inf]), np.array([1.0, 0.5, 0.0])
    tangents = (np.zeros(3), np.ones(3))
    value, slope = jax.jvp(losses.cross_entropy, (logprobs, weights), tangents)
    np.testing.assert_allclose(value, [0.5, 1.0, 0.0])
    np.testing.assert_allclose(slope[:2], [0.5, 2.0])


def test_a_brier_score_may_be_of_probabilities_that_sum_to_one():
    logprobs, outcomes = np.log([[0.2, 0.3], [0.1, 0.4]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    expected = [0.6**2 + 0.6**2, 0.2**2 + 0.2**2]
    score = losses.brier_score(logprobs, outcomes, renormalise=True)
    np.testing.assert_allclose(score, expected, rtol=1e-5)
