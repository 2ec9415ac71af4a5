"""Hyperparameters that make no sense are refused, and the message names them."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mintjax
from mintjax import losses, objectives
from mintjax.losses._settings import RANGES, Range, known

from . import cases

WORDS = {"divergence", "level", "renormalise", "scale_by_std", "shift_mean", "drop", "chunk_size"}
FREE = {"covariance_low", "covariance_high", "bins"}
SETTINGS = {
    (name, parameter.name)
    for name in losses.__all__
    if inspect.isfunction(getattr(losses, name)) and name not in ("conventions", "clipped_tokens")
    for parameter in inspect.signature(getattr(losses, name)).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("where", "clipped")
}
OF_CASES = sorted((n, s) for n, s in SETTINGS if n in cases.ALL and s in RANGES)


def outside(allowed: Range) -> list[float]:
    """Numbers just beyond both ends of a range, and NaN."""
    least = [] if allowed.least == -np.inf else [allowed.least - (not allowed.above)]
    most = [] if allowed.most == np.inf else [allowed.most + (not allowed.below)]
    return [*least, *most, np.nan]


def test_every_number_that_a_loss_takes_has_a_range():
    assert {setting for _, setting in SETTINGS} - WORDS - FREE <= set(RANGES)
    used = {
        *inspect.signature(losses.overlong_penalty).parameters,
        "share",
        "max_length",
        "step_count",
    }
    assert set(RANGES) <= {setting for _, setting in SETTINGS} | used


@pytest.mark.parametrize(("name", "setting"), OF_CASES)
def test_a_setting_out_of_its_range_is_refused(name, setting):
    case = cases.ALL[name]
    inputs = cases.arrays(case, (2, 3))
    for bad in outside(RANGES[setting]):
        with pytest.raises(ValueError, match=rf"{setting}\b.* (must be|is {bad:g})"):
            case.loss(*inputs, **{setting: bad})
        with pytest.raises(ValueError, match=setting):
            case.loss(*inputs, **{setting: np.array([[bad] * 3, [bad] * 3])})
    jax.eval_shape(lambda value: case.loss(*inputs, **{setting: value}), jnp.float32(0.25))


def test_a_setting_behind_the_mask_is_not_looked_at():
    where = np.array([True, False])
    beta = np.array([0.1, np.nan])
    scores = np.array([-1.0, -2.0])
    value = losses.dpo(scores, -3.0, -2.0, -2.0, beta=beta, where=where)
    assert value[0] == losses.dpo(scores, -3.0, -2.0, -2.0, where=where)[0]
    with pytest.raises(ValueError, match="beta must be at least 0"):
        losses.dpo(scores, -3.0, -2.0, -2.0, beta=beta, where=~where)


BAD: list[tuple[str, Any]] = [
    ("epsilon of grpo", lambda: losses.grpo([1.0, 0.0], epsilon=-1e-6)),
    ("epsilon of maxrl", lambda: losses.maxrl([1.0, 0.0], epsilon=np.nan)),
    ("epsilon of pass_at_k", lambda: losses.pass_at_k([1.0, 0.0], epsilon=-1.0)),
    ("epsilon of whiten", lambda: losses.whiten([1.0, 0.0], epsilon=-1.0)),
    ("epsilon of grpo", lambda: losses.gdpo([[1.0, 0.0]], epsilon=-1.0)),
    ("deviations", lambda: losses.advantage_filter([1.0, 0.0], deviations=-1.0)),
    ("share of conditional", lambda: losses.conditional_value_at_risk([1.0], 0.0)),
    ("share of conditional", lambda: losses.conditional_value_at_risk([1.0], 1.5)),
    ("share must be", lambda: losses.kl_cov([-1.0], [-1.0], 1.0, share=0.0)),
    ("covariance_low is 6", lambda: losses.clip_cov([-1.0], [-1.0], 1.0, 0.5, covariance_low=6.0)),
    ("gamma must be", lambda: losses.focal_weights([-1.0], gamma=-1.0)),
    ("max_length of", lambda: losses.fixed_length_mean([[1.0]], 0)),
    ("group_size must be an", lambda: losses.prompt_mean([[1.0]], 0)),
    ("group_size must be an", lambda: losses.prompt_mean([[1.0]], 1.0)),
    ("do not divide", lambda: losses.prompt_mean([[1.0]] * 3, 2)),
    ("num_groups must be", lambda: losses.worst_group([1.0], [0], 0)),
    ("bins must be", lambda: losses.calibration_sums([0.5], [1.0], bins=0)),
    ("vocab_size must be", lambda: losses.entropy_bounds([-1.0, -2.0], 1)),
    ("buffer is 300", lambda: losses.overlong_penalty([9], max_length=200, buffer=300)),
    ("buffer must be above 0", lambda: losses.overlong_penalty([9], max_length=200, buffer=0)),
    ("lower must be", lambda: losses.importance_weights([-1.0], [-1.0], lower=-1.0)),
    ("level must be", lambda: losses.importance_weights([-1.0], [-1.0], level="sentence")),
    ("divergence must be", lambda: losses.f_dpo([-1.0], -1.0, -1.0, -1.0, divergence="kl")),
    ("label_smoothing of robust", lambda: losses.robust_dpo(-1.0, -1.0, 0, 0, label_smoothing=0.5)),
    (
        "a temperature needs",
        lambda: losses.generalised_jsd([[-1.0]], [[-1.0]], temperature=2.0, renormalise=False),
    ),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_what_makes_no_sense_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


OBJECTIVES: list[tuple[str, Any]] = [
    ("beta of dpo must be at least 0, not -0.1", lambda: objectives.dpo(beta=-0.1)),
    ("beta of kto must be at least 0, not nan", lambda: objectives.kto(beta=np.nan)),
    ("beta of plackett_luce", lambda: objectives.plackett_luce(beta=-1.0)),
    ("label_smoothing of dpo", lambda: objectives.dpo(label_smoothing=0.7)),
    ("clip_high_threshold of ppo", lambda: objectives.ppo(clip_high_threshold=np.nan)),
    ("dual_clip_threshold of", lambda: objectives.dual_clip_ppo(dual_clip_threshold=0.2)),
    ("gamma of focal_cross", lambda: objectives.focal_cross_entropy(gamma=-2.0)),
    ("share of conditional", lambda: objectives.conditional_value_at_risk(share=0)),
    ("share of conditional", lambda: objectives.conditional_value_at_risk(share=1.2)),
    ("max_length of ppo", lambda: objectives.ppo(aggregation="fixed_length", max_length=0)),
    ("step_count of ppo", lambda: objectives.ppo(aggregation="token_mean", step_count=-3)),
    ("group_size must be", lambda: objectives.ppo(aggregation="prompt_mean", group_size=0)),
    ("group_size of plackett", lambda: objectives.plackett_luce(group_size=1)),
    ("aggregation must be one of", lambda: objectives.ppo(aggregation="token-mean")),
    ("aggregation must be one of", lambda: objectives.kl_k2(aggregation="mean")),
]


@pytest.mark.parametrize(("message", "make"), OBJECTIVES, ids=[m for m, _ in OBJECTIVES])
def test_an_objective_refuses_what_makes_no_sense_when_it_is_made(message, make):
    with pytest.raises(ValueError, match=message):
        make()


def steep(
    target_logprobs: Any,
    sampling_logprobs: Any,
    advantages: Any,
    *,
    beta: Any = -2.0,
    where: Any = None,
) -> Any:
    """A loss of a user's own, whose beta is a slope."""
    return beta * target_logprobs * advantages


def test_a_name_means_what_a_users_own_loss_takes_it_for():
    assert objectives.policy(steep)(beta=-3.0).beta == -3.0
    with pytest.raises(ValueError, match="max_length of steep"):
        objectives.policy(steep)(max_length=-1)


def test_a_temperature_that_is_traced_is_refused_where_it_has_a_value():
    def one(temperature: Any) -> Any:
        student = jnp.array([[-0.5, -1.5]])
        return losses.generalised_jsd(
            student, student - 0.1, renormalise=False, temperature=temperature
        )[0]

    assert jax.jit(one)(1.0) == one(1.0)
    assert np.isnan(jax.jit(one)(2.0))


def test_a_step_without_a_token_that_counts_has_no_loss():
    tokens = mintjax.ModelInput.from_ints([0, 1])
    columns = {
        "target_tokens": [1, 2],
        "weights": [0.0, 0.0],
        "logprobs": [-1.0, -1.0],
        "advantages": [1.0, 1.0],
    }
    data = [mintjax.Datum(tokens, columns)] * 2
    objective = objectives.ppo(aggregation="token_mean").over_step(data)
    assert objective(data, [np.full(2, -1.0, np.float32)] * 2)[0] == 0


def test_what_is_traced_has_no_value_yet():
    seen = []
    jax.eval_shape(lambda x: seen.append(known(x)) or x, 1.0)
    assert seen == [None]
    assert known("js") is None
    assert known(True) == 1
