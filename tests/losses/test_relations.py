"""Losses that are special cases, sums or limits of one another, and values worked out by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import losses as library

from ..by_numpy import evaluated

losses = evaluated(library)

RNG = np.random.default_rng(11)
C, R, REF_C, REF_R = (-RNG.gamma(2.0, 8.0, (4, 40))).astype(np.float32)
N = RNG.integers(1, 50, 40).astype(np.float32)
SCORES = (C, R, REF_C, REF_R)


def test_a_list_of_two_is_a_pair():
    lists = np.stack([C, R], -1)
    np.testing.assert_allclose(
        losses.plackett_luce(lists), losses.bradley_terry(C, R), rtol=1e-5, atol=1e-6
    )


def test_a_list_is_the_sum_of_choices_from_what_is_left():
    scores = RNG.normal(size=(5, 4)).astype(np.float32)
    expected = sum(-jax.nn.log_softmax(scores[:, i:], axis=1)[:, 0] for i in range(4))
    np.testing.assert_allclose(losses.plackett_luce(scores), expected, rtol=1e-5)
    kept = np.array([True, False, True, True])
    shorter = losses.plackett_luce(scores[:, kept])
    masked = losses.plackett_luce(scores, where=np.broadcast_to(kept, scores.shape))
    np.testing.assert_allclose(masked, shorter, rtol=1e-6)


def test_dpo_is_what_others_are_without_their_additions():
    dpo = losses.dpo(*SCORES)
    same = {
        "rpo": losses.rpo(*SCORES, N, nll_weight=0.0),
        "f_dpo": losses.f_dpo(*SCORES, divergence="reverse_kl"),
        "alpha of 1": losses.f_dpo(*SCORES, divergence="alpha", alpha=1.0),
        "robust": losses.robust_dpo(*SCORES, label_smoothing=0.0),
        "wpo": losses.wpo(*SCORES, 0.0, 0.0),
        "one token": losses.length_normalised_dpo(*SCORES, 1.0, 1.0, beta=0.1),
        "cpo": losses.cpo(C - REF_C, R - REF_R, N, nll_weight=0.0),
    }
    for name, values in same.items():
        np.testing.assert_allclose(values, dpo, rtol=2e-5, atol=1e-6, err_msg=name)


def test_rpo_adds_the_mean_likelihood_of_the_chosen_answer():
    np.testing.assert_allclose(
        losses.rpo(*SCORES, N, nll_weight=0.5), losses.dpo(*SCORES) - 0.5 * C / N, rtol=1e-5
    )


def test_an_alpha_of_zero_is_the_forward_kl_and_simpo():
    forward = losses.f_dpo(*SCORES, divergence="forward_kl")
    alpha = losses.f_dpo(*SCORES, divergence="alpha", alpha=0.0)
    np.testing.assert_allclose(alpha, forward, rtol=1e-5)
    with pytest.raises(ValueError, match="divergence must be"):
        losses.f_dpo(*SCORES, divergence="hellinger")  # pyright: ignore[reportArgumentType]
    bent = losses.alphapo(C, R, N, N, alpha=0.0)
    np.testing.assert_allclose(bent, losses.simpo(C, R, N, N), rtol=1e-6)
    slightly = losses.alphapo(C, R, N, N, alpha=1e-4)
    np.testing.assert_allclose(slightly, losses.simpo(C, R, N, N), rtol=0.1)


def test_what_counterparts_are_called_here_is_what_they_are():
    good, bad = losses.kto(C, REF_C, 1, 0.0, beta=0.3), losses.kto(R, REF_R, 0, 0.0, beta=0.3)
    np.testing.assert_allclose(
        good + bad, losses.apo_zero(C, R, REF_C, REF_R, beta=0.3), rtol=1e-6
    )  # TRL's apo_zero_unpaired, of answers that happen to be pairs
    hinge = np.maximum(1 - 0.3 * (np.asarray(C) - np.asarray(R)), 0)  # TRL's CPO
    np.testing.assert_allclose(losses.slic(0.3 * C, 0.3 * R), hinge, rtol=1e-5, atol=1e-6)


def test_slic_is_the_hinge_without_a_reference():
    np.testing.assert_allclose(losses.slic(C, R), losses.hinge(C, R, 0.0, 0.0, beta=1.0), rtol=1e-6)
    assert losses.slic(-2.0, -3.0) == 0
    assert jax.grad(losses.slic)(-2.0, -3.0) == 0  # at the bend


def test_a_pair_of_bco_is_a_good_and_a_bad_answer():
    both = losses.bco(C, REF_C, True, 0.3) + losses.bco(R, REF_R, False, 0.3)
    np.testing.assert_allclose(losses.bco_pair(*SCORES, reward_shift=0.3), both, rtol=1e-6)


def test_sppo_of_a_draw_pulls_to_the_reference():
    even = losses.sppo(*SCORES, beta=0.1, win_probability=0.5)
    np.testing.assert_allclose(even, (C - REF_C) ** 2 + (R - REF_R) ** 2, rtol=1e-6)


def test_exo_and_discopop_stay_finite_where_a_pair_is_lost_by_far():
    margins = np.array([-1e4, -1e3, 0.0, 1e3, 1e4], np.float32)
    for loss in (losses.exo_pair, losses.discopop, losses.nca_pair, losses.apo_zero):
        both = jax.jit(jax.value_and_grad(lambda c, f=loss: f(c, 0.0, 0.0, 0.0).sum()))
        value, grad = both(margins)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_unlikelihood_is_the_likelihood_of_everything_else():
    p = np.array([0.01, 0.5, 0.99], np.float32)
    np.testing.assert_allclose(losses.unlikelihood(np.log(p)), -np.log(1 - p), rtol=2e-5)
    value, slope = jax.jit(jax.value_and_grad(losses.unlikelihood))(0.0)
    assert np.isfinite(value)
    assert 0 < slope < 1e7


LP, Q, A = (
    np.float32(x)
    for x in (-RNG.gamma(1.0, 1.0, (3, 6)), -RNG.gamma(1.0, 1.0, (3, 6)), RNG.normal(size=(3, 6)))
)
WHERE = RNG.random((3, 6)) < 0.7


def test_gmpo_is_the_exponential_of_the_mean_of_its_clipped_log_ratios():
    held = np.asarray(losses.gmpo_log_ratios(LP, Q, A[:, :1], where=WHERE))
    mean = held.sum(1) / WHERE.sum(1)
    expected = -np.exp(mean) * A[:, 0]
    np.testing.assert_allclose(losses.gmpo(LP, Q, A[:, :1], where=WHERE), expected, rtol=1e-5)


def test_luspo_is_the_sum_of_gspo():
    bounds = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
    tokens = losses.gspo(LP, Q, A, **bounds, where=WHERE)
    np.testing.assert_allclose(
        losses.luspo(LP, Q, A, **bounds, where=WHERE), np.sum(tokens, axis=1), rtol=1e-6
    )


def test_the_weight_of_vespo_is_one_on_policy_and_fades_to_both_sides():
    shift = np.array([-3.0, 0.0, 1.0], np.float32)[:, None]
    weights = -np.asarray(losses.vespo_token(np.full((3, 1), -1.0), shift, 1.0))[:, 0] / -1.0
    assert weights[1] == 1
    assert abs(weights[0]) < 0.1
    assert abs(weights[2]) < 0.1


@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean"])
def test_importance_weights_are_truncated_or_dropped(level):
    d = np.where(WHERE, LP - Q, 0)
    if level != "token":
        d = np.broadcast_to(d.sum(1, keepdims=True), d.shape)
    if level == "sequence_mean":
        d = d / WHERE.sum(1, keepdims=True)
    raw = np.exp(d)
    held = losses.importance_weights(LP, Q, level=level, lower=0.5, upper=1.5, where=WHERE)
    np.testing.assert_allclose(held, np.where(WHERE, np.clip(raw, 0.5, 1.5), 0), rtol=1e-5)
    dropped = losses.importance_weights(
        LP, Q, level=level, lower=0.5, upper=1.5, drop=True, where=WHERE
    )
    inside = (raw >= 0.5) & (raw <= 1.5) & WHERE
    np.testing.assert_allclose(dropped, np.where(inside, raw, 0), rtol=1e-5)


def test_sequences_are_kept_that_are_good_or_near():
    q = np.array([[-1.0, -1.0]] * 4, np.float32)
    lp = q - np.array([[0.0], [0.04], [0.06], [0.06]], np.float32)
    a = np.array([[-1.0], [-1.0], [-1.0], [1.0]], np.float32)
    kept = losses.off_policy_mask(lp, q, a)
    np.testing.assert_array_equal(kept[:, 0], [True, True, False, True])


def test_advantages_of_several_rewards_are_added_after_they_are_scaled():
    rewards = RNG.normal(size=(2, 3, 4)).astype(np.float32) * np.float32([[[1.0]], [[100.0]]])
    expected = losses.grpo(rewards[0]) + 0.5 * losses.grpo(rewards[1])
    np.testing.assert_allclose(losses.gdpo(rewards, [1.0, 0.5]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"rewards must be \[K, ..., G\]"):
        losses.gdpo([1.0, 2.0])
    with pytest.raises(ValueError, match="there are 2 rewards"):
        losses.gdpo(rewards, [1.0, 0.5, 0.25])


def test_distillation_discounts_what_a_token_leads_to():
    gap = (Q - LP).astype(np.float64)
    expected = np.zeros_like(gap)
    for t in range(6):
        factors = 0.9 ** np.arange(6 - t)
        expected[:, t] = A[:, t] - 0.5 * (factors * gap[:, t:]).sum(1)
    found = losses.on_policy_distillation(A, Q, LP, beta=0.5, discount=0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_entropy_lies_within_its_bounds():
    p = RNG.dirichlet(np.full(50, 0.3), 20)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    top = np.log(-np.sort(-p, axis=1)[:, :8])
    low, high = losses.entropy_bounds(top, 50)
    assert (np.asarray(low) <= entropy + 1e-5).all()
    assert (np.asarray(high) >= entropy - 1e-5).all()
    exact = losses.entropy_bounds(np.log([[0.25, 0.25, 0.5]]), 3)
    np.testing.assert_allclose(exact, 1.0397, rtol=1e-3)


def test_the_jsd_is_symmetric_at_one_half_and_ends_in_the_divergences():
    student, teacher = (
        jax.nn.log_softmax(RNG.normal(size=(5, 4)).astype(np.float32)) for _ in "ab"
    )
    np.testing.assert_allclose(
        losses.generalised_jsd(student, teacher),
        losses.generalised_jsd(teacher, student),
        rtol=1e-5,
    )
    ends = {0.0: losses.distillation_forward_kl, 1.0: losses.distillation_reverse_kl}
    for beta, divergence in ends.items():
        np.testing.assert_allclose(
            losses.generalised_jsd(student, teacher, beta=beta),
            divergence(student, teacher),
            rtol=1e-5,
            atol=1e-6,
        )
    with pytest.raises(ValueError, match="at least 0 and at most 1"):
        losses.generalised_jsd(student, teacher, beta=1.5)
    with pytest.raises(ValueError, match="a temperature needs renormalise"):
        losses.generalised_jsd(student, teacher, temperature=2.0, renormalise=False)


LOSSES = RNG.gamma(1.0, 1.0, 101).astype(np.float32)


def test_robust_means():
    ordered = -np.sort(-LOSSES)
    half = losses.conditional_value_at_risk(LOSSES, 10 / 101)
    np.testing.assert_allclose(half, ordered[:10].mean(), rtol=1e-4)
    np.testing.assert_allclose(
        losses.conditional_value_at_risk(LOSSES, 1.0), LOSSES.mean(), rtol=1e-5
    )
    some = np.arange(101) < 50
    np.testing.assert_allclose(
        losses.conditional_value_at_risk(LOSSES, 1.0, where=some), LOSSES[:50].mean(), rtol=1e-5
    )
    groups = np.arange(101) % 3
    means = [LOSSES[groups == g].mean() for g in range(3)]
    np.testing.assert_allclose(losses.worst_group(LOSSES, groups, 3), max(means), rtol=1e-5)
    slope = jax.jit(jax.grad(lambda x: losses.worst_group(x, groups, 3)))(LOSSES)
    worst = int(np.argmax(means))
    np.testing.assert_allclose(slope, (groups == worst) / np.sum(groups == worst), rtol=1e-5)
    assert losses.worst_group(LOSSES, groups, 3, where=np.zeros(101, bool)) == 0


def test_focal_weights_fade_where_the_model_is_sure():
    p = np.array([0.1, 0.5, 0.9], np.float32)
    np.testing.assert_allclose(losses.focal_weights(np.log(p)), (1 - p) ** 2, rtol=1e-5)
    assert jax.grad(lambda x: losses.focal_weights(x).sum())(jnp.log(p)).sum() == 0


def test_focal_cross_entropy_is_the_cross_entropy_of_faded_weights():
    lp, weights = -RNG.gamma(1.0, 1.0, (2, 50)).astype(np.float32)
    faded = weights * np.asarray(losses.focal_weights(lp, gamma=1.5))
    slope = jax.jit(jax.grad(lambda x: losses.focal_cross_entropy(x, weights, gamma=1.5).sum()))
    value = losses.focal_cross_entropy(lp, weights, gamma=1.5)
    np.testing.assert_allclose(value, losses.cross_entropy(lp, faded), rtol=1e-6)
    np.testing.assert_allclose(slope(lp), -faded, rtol=1e-6)


def test_stable_reinforce_is_ppo_but_for_ratios_out_of_all_proportion():
    d = np.linspace(-100, 100, 401).astype(np.float32)
    for advantage in (1.0, -1.0, 0.0):
        value, back = jax.vjp(lambda lp, a=advantage: losses.stable_reinforce(lp, 0.0, a), d)
        slope = np.asarray(back(jnp.ones_like(value))[0])
        held = np.exp(np.clip(d.astype(np.float64), np.log(1e-3), np.log(1e3)))
        np.testing.assert_allclose(
            value,
            -np.minimum(held * advantage, np.clip(held, 0.8, 1.2) * advantage),
            rtol=1e-5,
        )
        inside = (d > np.log(1e-3)) & (d < np.log(1e3))
        moving = inside & (held <= 1.2 if advantage > 0 else held >= 0.8)
        np.testing.assert_allclose(slope, np.where(moving, -held * advantage, 0), rtol=1e-5)


def test_outliers_are_filtered_by_the_deviation_of_what_counts():
    advantages = RNG.normal(size=(20, 30)).astype(np.float32)
    advantages[3, 4] = 40.0
    where = RNG.random((20, 30)) < 0.8
    where[3, 4] = True
    kept = advantages[where].astype(np.float64)
    far = np.abs(advantages - kept.mean()) > 2.0 * kept.std(ddof=1)
    found = losses.advantage_filter(advantages, deviations=2.0, where=where)
    np.testing.assert_array_equal(found, where & ~far)
    assert not found[3, 4]
    assert losses.advantage_filter(np.full(5, 250.3, np.float32)).all()


def test_calibration_adds_up_over_chunks():
    chances = RNG.random(500)
    came = RNG.random(500) < chances
    whole = losses.calibration_sums(chances, came)
    first = losses.calibration_sums(chances[:200], came[:200])
    rest = losses.calibration_sums(chances[200:], came[200:])
    for name, value in whole.items():
        np.testing.assert_allclose(first[name] + rest[name], value, rtol=1e-5)
    bins = np.minimum((chances * 10).astype(int), 9)
    gaps = [abs(chances[bins == b].sum() - came[bins == b].sum()) for b in range(10)]
    summary = losses.calibration_summary(whole)
    np.testing.assert_allclose(summary["expected_calibration_error"], sum(gaps) / 500, rtol=1e-4)
    nothing = losses.calibration_sums(chances, came, where=np.zeros(500, bool))
    assert losses.calibration_summary(nothing)["expected_calibration_error"] == 0


def test_groups_that_agree_teach_nothing():
    varies = losses.group_varies(np.float32([[0.1, 0.1, 0.1], [0.1, 0.1, 0.2]]))
    np.testing.assert_array_equal(varies, [[False] * 3, [True] * 3])


def test_prompts_weigh_the_same_however_long_their_answers():
    values = RNG.normal(size=(4, 5)).astype(np.float32)
    where = RNG.random((4, 5)) < 0.6
    where[2:] = False
    expected = values[:2][where[:2]].mean()
    np.testing.assert_allclose(losses.prompt_mean(values, 2, where=where), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="do not divide into groups of 3"):
        losses.prompt_mean(values, 3)


def test_wpo_weighs_an_answer_by_its_mean_logprob():
    expected = (LP * WHERE).sum(1) / WHERE.sum(1)
    np.testing.assert_allclose(losses.wpo_log_weight(LP, where=WHERE), expected, rtol=1e-5)
    np.testing.assert_allclose(
        losses.wpo_log_weight(LP, -0.5, where=WHERE), expected + 0.5, rtol=1e-5
    )
