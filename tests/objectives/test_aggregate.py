"""From tokens to one number, over one request and over a step that is split into several."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import objectives

from ..by_numpy import evaluate
from ..examples import examples

# One objective of each family: a ratio per token, per sequence, and per geometric mean.
FAMILIES = {"ppo": objectives.ppo, "gspo": objectives.gspo, "gmpo": objectives.gmpo}
BOUNDS: dict[str, Any] = {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}
PER_TOKEN = [
    name
    for name in objectives.__all__
    if hasattr(getattr(objectives, name), "aggregation") and name != "TokenObjective"
]
Rows = list[np.ndarray]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[mintjax.Datum], Rows]:
    """Two prompts with three answers each, some of which are masked in part or whole."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(1, 9), min_size=6, max_size=6))
    kept = draw(st.sampled_from([0.0, 0.5, 1.0]))
    data, logprobs = [], []
    for length in lengths:
        row = -rng.gamma(1.0, 1.0, length).astype(np.float32)
        columns = {
            "target_tokens": np.zeros(length, np.int32),
            "logprobs": row + rng.normal(0, 0.4, length).astype(np.float32),
            "advantages": np.full(length, rng.normal(), np.float32),
            "ref_logprobs": row + rng.normal(0, 0.4, length).astype(np.float32),
            "desirable": np.full(length, rng.integers(0, 2), np.float32),
            "weights": (rng.random(length) < kept).astype(np.float32),
        }
        data.append(mintjax.Datum(mintjax.ModelInput.from_ints(range(length)), columns))
        logprobs.append(row)
    return data, logprobs


@pytest.mark.parametrize("how", get_args(objectives.Aggregation))
@given(step=steps(), family=st.sampled_from(sorted(FAMILIES)))
@settings(max_examples=examples(1))
def test_a_step_in_two_requests_is_the_same_step(how, step, family):
    data, logprobs = step
    make = FAMILIES[family]
    objective = make(aggregation=how, max_length=50.0, group_size=3, **BOUNDS)
    whole, _ = objective(data, logprobs)
    part = objective.over_step(data)
    pieces = [part(data[i:j], logprobs[i:j])[0] for i, j in ((0, 3), (3, 6))]
    np.testing.assert_allclose(sum(map(float, pieces)), float(whole), rtol=2e-5, atol=1e-6)


@given(step=steps())
@settings(max_examples=examples(2))
def test_a_sum_of_terms_over_the_step_is_the_sum_of_its_requests(step):
    data, logprobs = step
    both = objectives.ppo(aggregation="token_mean") + 0.5 * objectives.kl_k2(
        aggregation="sequence_mean"
    )
    part = both.over_step(data)
    pieces = [part(data[i:j], logprobs[i:j])[0] for i, j in ((0, 3), (3, 6))]
    whole = float(both(data, logprobs)[0])
    np.testing.assert_allclose(sum(map(float, pieces)), whole, rtol=2e-5, atol=1e-6)


def test_a_sum_with_a_term_that_cannot_be_split_says_which():
    both = objectives.ppo() + objectives.dpo()
    with pytest.raises(mintjax.errors.ObjectiveError, match="the term 'dpo' has no over_step"):
        both.over_step([mintjax.datum([1], [2])] * 2)


# What each metric is a mean over; of all but those named, the count of the objective.
COUNTS = {
    "ppo": "tokens",
    "gspo": "tokens",
    "gmpo": "tokens",
    "kl_k2": "tokens",
    "cross_entropy": "weight_sum",
    "dpo": "pairs",
    "simpo": "pairs",
    "plackett_luce": "lists",
    "kto": "desirable",
    "conditional_value_at_risk": "datums",
}
OF_OTHERS = {"mean_reward_undesirable": "undesirable"}
OF_THE_REQUEST = {"kl", *COUNTS.values(), *OF_OTHERS.values()}


@pytest.mark.parametrize("name", COUNTS)
@given(step=steps())
@settings(max_examples=examples(1))
def test_metrics_of_requests_give_those_of_the_step(name, step):
    data, logprobs = step
    options = {"group_size": 2} if name == "plackett_luce" else {}
    objective = getattr(objectives, name)(**options)
    measured = []
    for i, j in ((0, 6), (0, 2), (2, 6)):
        found = evaluate(lambda rows, part=data[i:j]: objective(part, rows)[1], logprobs[i:j])
        measured.append({key: float(value) for key, value in found.items()})
    whole, *parts = (_with_second_moment(metrics) for metrics in measured)
    assert COUNTS[name] in whole
    for what in set(whole) - OF_THE_REQUEST:
        counts = np.array([part[OF_OTHERS.get(what, COUNTS[name])] for part in parts])
        values = np.array([part[what] for part in parts])
        mean = (counts * values).sum() / max(counts.sum(), 1e-9)
        assert mean == pytest.approx(whole[what], rel=1e-4, abs=1e-5), what
    if "ratio_std" in measured[0] and whole["tokens"]:
        square = whole["second moment"]
        assert measured[0]["effective_sample_size"] == pytest.approx(
            whole["mean_ratio"] ** 2 / square, rel=1e-4
        )


def _with_second_moment(metrics: dict[str, float]) -> dict[str, float]:
    """What PolicyObjective says is a mean, in the place of what is none."""
    metrics = dict(metrics)
    if "ratio_std" in metrics:
        metrics.pop("effective_sample_size")
        metrics["second moment"] = metrics.pop("ratio_std") ** 2 + metrics["mean_ratio"] ** 2
    return metrics


@pytest.mark.parametrize("name", PER_TOKEN)
def test_every_objective_of_tokens_has_every_aggregation(name):
    for how in get_args(objectives.Aggregation):
        objective = getattr(objectives, name)(aggregation=how, max_length=50.0, group_size=3)
        assert objective.aggregation == how
        assert objective.pad_rows_to == 3


def test_a_step_of_prompts_that_are_cut_short_is_refused():
    tokens = mintjax.ModelInput.from_ints([0, 1])
    data = [mintjax.Datum(tokens, {"target_tokens": [1, 2]})] * 4
    cut = objectives.ppo(aggregation="prompt_mean", group_size=3)
    with pytest.raises(mintjax.errors.DataError, match="4 datums do not divide into groups of 3"):
        cut.over_step(data)
