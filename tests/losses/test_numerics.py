"""Numbers that rounding, overflow or a misread hyperparameter used to get wrong."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import losses

from ..by_numpy import evaluate
from ..examples import some
from . import cases

GROUPS = [losses.grpo, losses.rloo, losses.group_mean_centred, losses.dr_grpo]


@pytest.mark.parametrize("estimator", GROUPS)
@pytest.mark.parametrize("reward", [250.3, 0.1, 1e-30, -7.7, 3e30])
@pytest.mark.parametrize("size", some([1, 2, 3, 64, 1000], 2))
def test_a_group_whose_rewards_agree_has_no_advantage(estimator, reward, size):
    rewards = np.full(size, reward, np.float32)
    assert (np.asarray(estimator(rewards)) == 0).all()
    assert (np.asarray(estimator(rewards, where=np.arange(size) % 3 != 1)) == 0).all()


@pytest.mark.parametrize("estimator", GROUPS)
def test_xla_leaves_a_group_whose_rewards_agree_without_an_advantage(estimator):
    rewards = np.repeat(np.float32([[250.3], [0.1], [1e-30], [-7.7], [3e30]]), 61, axis=1)
    assert (np.asarray(jax.jit(estimator)(rewards)) == 0).all()


def test_rewards_far_from_zero_keep_the_digits_of_their_differences():
    rewards = np.float32(4096.0) + np.arange(5, dtype=np.float32) / 1024
    np.testing.assert_allclose(losses.grpo(rewards), [-1.2649, -0.63246, 0, 0.63246, 1.2649], 2e-3)
    exactly = losses.group_mean_centred(rewards)
    np.testing.assert_array_equal(exactly, np.arange(-2, 3, dtype=np.float32) / 1024)


ORPO = jax.jit(jax.value_and_grad(losses.orpo, argnums=(0, 1)))


@pytest.mark.parametrize("chosen", [0.0, 1e-7, -1e-9, -1e-30, -3e-8])
def test_orpo_of_a_certain_chosen_answer(chosen):
    value, (slope, _) = ORPO(chosen, -1.0, 1.0, 1.0)
    # -log sigmoid(log odds) has the slope -p_r / (1 - p_r) where the chosen answer is certain.
    assert abs(value) < 1e-6
    assert slope == pytest.approx(-1 - 0.1 * np.exp(-1) / -np.expm1(-1), rel=1e-4)


@pytest.mark.parametrize("rejected", [0.0, 1e-7, -1e-9, -1e-30])
def test_orpo_of_a_certain_rejected_answer(rejected):
    value, (_, slope) = ORPO(-1.0, rejected, 1.0, 1.0)
    eps = 2.0**-23  # a probability that rounds to 1 counts as exp(-eps)
    odds = -1 - np.log(-np.expm1(-1)) + np.log(eps)
    assert value == pytest.approx(1 + 0.1 * np.log1p(np.exp(-odds)), rel=1e-5)
    assert 0 < slope < 0.101 / eps
    assert np.isfinite(slope)


def test_ipo_has_no_target_without_beta():
    for beta in (0, -0.1, [0.1, 0.0]):
        with pytest.raises(ValueError, match="beta of ipo must be above 0"):
            losses.ipo([-3.0, -3.0], -6.0, -4.0, -4.0, beta=beta)
    masked = losses.ipo([-3.0, -3.0], -6.0, -4.0, -4.0, beta=0.125, where=[True, False])
    np.testing.assert_array_equal(masked, [1.0, 0.0])  # (3 - 4)**2


@pytest.mark.parametrize("bad", [0, -1, False, 0.0, -1.0])
def test_kto_reads_a_label_alike_as_a_scalar_and_as_a_column(bad):
    one = losses.kto(-3.0, -4.0, bad, 0.0)
    column = losses.kto([-3.0, -3.0], -4.0, [bad, True], 0.0)
    assert one == column[0]
    assert one == pytest.approx(1 / (1 + np.exp(-0.1)), rel=1e-6)  # a bad answer that gained
    assert column[1] == pytest.approx(1 / (1 + np.exp(0.1)), rel=1e-6)
    assert jax.jit(losses.kto)(-3.0, -4.0, bad, 0.0) == one


@pytest.mark.parametrize("label", [2, 0.5, np.nan, [1.0, 0.3]])
def test_kto_refuses_what_is_no_label(label):
    with pytest.raises(ValueError, match="desirable must be 1"):
        losses.kto([-3.0, -3.0], -4.0, label, 0.0)
    losses.kto([-3.0, -3.0], -4.0, [1.0, 0.3], 0.0, where=[True, False])


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 0.3])
def test_the_spread_of_ratios_is_no_rounding_noise(scale):
    d = (scale * np.sin(np.arange(1000))).astype(np.float32)
    summary = losses.policy_summary(losses.policy_sums(d, np.zeros_like(d)))
    ratios = np.exp(d.astype(np.float64))
    np.testing.assert_allclose(summary["ratio_std"], ratios.std(), rtol=2e-5)
    equal = losses.policy_summary(losses.policy_sums(np.zeros(1000, np.float32), 0.0))
    assert equal["ratio_std"] == 0
    assert equal["effective_sample_size"] == 1


@pytest.mark.parametrize(
    "loss", [losses.ppo, losses.cispo, losses.dual_clip_ppo, losses.gspo, losses.gspo_token]
)
def test_thresholds_that_are_an_epsilon_are_refused(loss):
    with pytest.raises(ValueError, match=r"0\.8 means 0.8, not 1 - 0\.8"):
        loss([-1.0], [-1.0], 1.0, clip_low_threshold=0.8, clip_high_threshold=0.28)
    with pytest.raises(ValueError, match="clip_low_threshold is"):
        loss([-1.0], [-1.0], 1.0, clip_low_threshold=1.3, clip_high_threshold=1.2)
    loss([-1.0], [-1.0], 1.0, clip_low_threshold=1.0, clip_high_threshold=1.0)


CLIPPING = {
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "dual_clip_ppo": {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
        "dual_clip_threshold": 1.5,
    },
    "dppo": {"divergence_threshold": 0.05},
    "stable_reinforce": {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.2,
        "least_ratio_threshold": 0.7,
        "greatest_ratio_threshold": 1.5,
    },
}


@pytest.mark.parametrize("name", CLIPPING)
def test_the_tokens_that_are_clipped_are_those_without_a_gradient(name):
    rng = np.random.default_rng(4)
    target = -rng.gamma(1.0, 0.7, 500).astype(np.float32)
    sampling = target - rng.normal(0, 0.5, 500).astype(np.float32)
    advantages = rng.normal(size=500).astype(np.float32)
    loss = getattr(losses, name)

    @jax.jit
    def both(target: Any) -> Any:
        slope = jax.grad(lambda t: loss(t, sampling, advantages, **CLIPPING[name]).sum())(target)
        return slope, losses.clipped_tokens(name, target, sampling, advantages, **CLIPPING[name])

    slope, clipped = both(target)
    assert 50 < np.sum(clipped) < 450
    np.testing.assert_array_equal(clipped, np.asarray(slope) == 0)


@pytest.mark.parametrize("name", ["cispo", "truncated_importance_sampling"])
def test_the_weights_that_are_clipped_are_those_at_a_bound(name):
    names = {"cispo": ("clip_low_threshold", "clip_high_threshold")}
    bounds = dict(zip(names.get(name, ("truncation_threshold",)), (0.7, 1.3), strict=False))
    d = np.linspace(-1, 1, 101, dtype=np.float32)

    @jax.jit
    def both(target: Any) -> Any:
        slope = jax.grad(lambda t: getattr(losses, name)(t, -d, 1.0, **bounds).sum())(target)
        return slope, losses.clipped_tokens(name, target, -d, -1.0, **bounds)

    slope, clipped = both(np.zeros_like(d))
    at_a_bound = np.isin(-np.asarray(slope), np.float32(list(bounds.values())))
    np.testing.assert_array_equal(clipped, at_a_bound)
    assert clipped.sum() > 20


@pytest.mark.parametrize("name", cases.ALL)
def test_weights_are_no_mask(name):
    case = cases.ALL[name]
    inputs = cases.arrays(case, (3, 4))
    with pytest.raises(TypeError, match="where must be boolean, not float32"):
        case.loss(*inputs, where=np.full((3, 4), 0.5, np.float32))


@pytest.mark.parametrize("name", cases.ALL)
def test_promotion_may_be_strict(name):
    case = cases.ALL[name]
    first, *others = cases.arrays(case, (3, 4), dtype=np.float64)

    def masked(first: Any, where: Any) -> Any:
        return case.loss(first, *others, where=where).sum()

    with jax.numpy_dtype_promotion("strict"):
        for where in (np.eye(3, 4) == 0, np.ones((3, 4), np.int32)):
            grad = jax.eval_shape(jax.grad(masked), first.astype(np.float32), where)
            assert grad.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_16_bit_numbers_are_taken_in_32(dtype):
    @jax.jit
    def found(rows: Any, sampling: Any, teacher: Any) -> Any:
        gspo = losses.gspo(rows, rows - 1, 1.0, clip_low_threshold=0.8, clip_high_threshold=3.0)
        return {
            "token_mean": losses.token_mean(rows),
            "sequence_mean": losses.sequence_mean(rows),
            "fixed_length_mean": losses.fixed_length_mean(rows, 1),
            "kl_k1": losses.policy_sums(rows, sampling)["kl_k1"],
            "grpo": losses.grpo(rows),
            "gspo": gspo.astype(jnp.float32),
            "forward_kl": losses.distillation_forward_kl(teacher, jnp.zeros(3000)),
            "gmpo": losses.gmpo(rows, jnp.float32(-35.0119), 1.0, clip_high_threshold=1000.0),
            "luspo": losses.luspo(rows, rows, 1.0032),
        }

    rows, sampling, teacher = np.full((2, 3000), -30.0), -31.0, np.full(3000, -10.0)
    got = found(*(jnp.asarray(x, dtype) for x in (rows, sampling, teacher)))
    expected = {
        "token_mean": -30,
        "sequence_mean": -30,
        "fixed_length_mean": -90000,
        "kl_k1": -6000,
        "grpo": 0,
        "forward_kl": 30000,
        "gmpo": -np.exp(5.0119),
        "luspo": -3009.6,
    }
    np.testing.assert_allclose(got.pop("gspo"), -np.e, rtol=5e-3)
    assert got.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_array_equal(got[name], np.asarray(number, got[name].dtype), name)


@pytest.mark.parametrize("infinity", [np.inf, -np.inf, np.nan])
def test_an_infinity_behind_a_weight_of_zero_is_nothing(infinity):
    value, slope = jax.value_and_grad(lambda t: losses.cross_entropy(t, [0.0, 2.0]).sum())(
        np.array([infinity, -1.0], np.float32)
    )
    assert value == 2
    np.testing.assert_array_equal(slope, [0, -2])


@pytest.mark.parametrize("name", cases.ALL)
def test_nothing_at_all_is_no_error(name):
    case = cases.ALL[name]
    inputs = cases.arrays(case, (2, 0))
    if name == "generalised_jsd":  # takes the largest of nothing, for which NumPy has no number
        assert np.asarray(case.loss(*inputs)).sum() == 0
    else:
        assert evaluate(case.loss, *inputs).sum() == 0


def test_an_easy_token_of_weight_zero_may_have_any_logprob():
    slope = jax.grad(lambda t: losses.focal_cross_entropy(t, np.float32([0, 2])).sum())
    for anything in (np.nan, -np.inf, np.inf):
        found = slope(np.float32([anything, -1.0]))
        np.testing.assert_allclose(found, [0, -2 * (1 - np.exp(-1)) ** 2], rtol=1e-6)


def test_a_token_that_the_sampler_was_certain_of_can_leave_the_region_of_dppo_kl():
    sampling = jnp.array([0.0, 0.0, -0.1], jnp.float32)
    target = jnp.array([-0.5, 0.0, -0.1], jnp.float32)
    marks = [
        run(losses.dppo_kl)(target, sampling, -jnp.ones(3, jnp.float32))
        for run in (lambda f: f, jax.jit)
    ]
    np.testing.assert_allclose(marks[0], marks[1], rtol=1e-6)
    # q log(q / p) = 0.5 is above the threshold, so the first has lost its loss.
    np.testing.assert_allclose(marks[0], [0, 1, 1], rtol=1e-6)


def k3_corrected(target: float, reference: float, sampling: float) -> list[float]:
    """Value and slope by the logprob, in numbers of any size."""
    d = reference - target
    beyond = np.exp(reference - sampling) * (1 - (1 + d) * np.exp(-d)) if d > 1 else None
    near = np.exp(target - sampling) * (np.expm1(d) - d) if d else 0.0
    return [near if beyond is None else beyond, -np.exp(target - sampling) * d]


@pytest.mark.parametrize(
    "logprobs",
    [
        (-100.0, 0.0, -17.0),
        (-200.0, -1.0, -2.0),
        (-9.0, -1.0, -1.5),
        (-8.9, -1.0, -1.5),
        (0.0, 0.0, -100.0),
        (-1.0, -1.5, -1.25),
        (-0.5, -90.0, -1.0),
        (-3.0, -1.0, -85.0),
    ],
)
def test_the_corrected_k3_overflows_only_where_its_value_does(logprobs):
    given = [np.float32(x) for x in logprobs]
    value, slopes = jax.value_and_grad(losses.kl_k3_corrected, argnums=(0, 1, 2))(*given)
    expected = k3_corrected(*map(float, given))
    np.testing.assert_allclose([value, slopes[0]], expected, rtol=3e-5, atol=1e-30)
    # A shift of all three changes nothing, and the sampler's logprob divides.
    np.testing.assert_allclose(slopes[2], -value, rtol=1e-6)
    np.testing.assert_allclose(sum(slopes), 0, atol=2e-6 * np.abs(slopes).max())


def test_a_ratio_that_overflows_counts_for_nothing_without_an_advantage():
    bounds = {"clip_low_threshold": 0.0, "clip_high_threshold": np.inf}
    value, slope = jax.value_and_grad(losses.masked_importance_sampling)(
        -1.0, -101.0, 0.0, **bounds
    )
    assert value == slope == 0
