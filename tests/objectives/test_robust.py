"""Robust means of the datums' losses, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import objectives, testing
from mintjax.errors import DataError

from ..examples import examples

GROUPS = [0, 1, 0, 2, 1, 1]


def batch(seed: int) -> tuple[list[mintjax.Datum], list[np.ndarray], np.ndarray]:
    """Six answers of three groups, one of them masked whole, and the mean NLL of each."""
    rng = np.random.default_rng(seed)
    data, rows, nll = [], [], []
    for i, group in enumerate(GROUPS):
        length = int(rng.integers(1, 9))
        row = -rng.gamma(1.0, 1.0, length).astype(np.float32)
        weights = np.ones(length, np.float32)
        weights[: length // 2] = 0
        weights *= i != 2
        columns: dict[str, Any] = {"target_tokens": np.zeros(length, np.int32)}
        columns |= {"weights": weights, "groups": np.full(length, group)}
        data.append(mintjax.Datum(mintjax.ModelInput.from_ints(range(length)), columns))
        rows.append(row)
        nll.append(-row[weights != 0].mean() if weights.any() else np.nan)
    return data, rows, np.array(nll)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=examples(3))
def test_the_worst_group_alone_is_trained_on(seed):
    data, rows, nll = batch(seed)
    objective = objectives.worst_group(num_groups=3)
    result = mintjax.value_and_logprob_grads(objective, data, rows)
    means = [np.nanmean(nll[np.array(GROUPS) == group]) for group in range(3)]
    assert result.loss == pytest.approx(max(means), rel=1e-5)
    assert result.metrics["mean_nll"] == pytest.approx(np.nanmean(nll), rel=1e-5)
    assert result.metrics["datums"] == 5
    for group, grad, mean in zip(GROUPS, result.grads, nll, strict=True):
        assert (grad != 0).any() == (group == int(np.argmax(means)) and not np.isnan(mean))
    testing.check_gradient(objective, data, rows)


@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 1.0))
@settings(max_examples=examples(3))
def test_the_worst_share_is_the_mean_of_the_largest(seed, share):
    data, rows, nll = batch(seed)
    objective = objectives.conditional_value_at_risk(share=share)
    result = mintjax.value_and_logprob_grads(objective, data, rows)
    ordered = -np.sort(-nll[~np.isnan(nll)])
    weights = np.clip(share * len(ordered) - np.arange(len(ordered)), 0, 1)
    assert result.loss == pytest.approx((weights * ordered).sum() / weights.sum(), rel=1e-4)
    testing.check_permutation(objective, data, rows)
    testing.check_padding_invariance(objective, data, rows)


def test_a_share_of_one_is_the_mean_of_means():
    data, rows, nll = batch(0)
    result = mintjax.value_and_logprob_grads(
        objectives.conditional_value_at_risk(share=1.0), data, rows
    )
    assert result.loss == pytest.approx(np.nanmean(nll), rel=1e-5)


def test_groups_are_asked_for():
    data, rows, _ = batch(0)
    without = [
        mintjax.Datum(d.model_input, {n: c for n, c in d.loss_fn_inputs.items() if n != "groups"})
        for d in data
    ]
    with pytest.raises(DataError, match=r"'groups'.*worst_group reads it"):
        mintjax.value_and_logprob_grads(objectives.worst_group(num_groups=3), without, rows)


def test_focal_cross_entropy_fades_and_reports_the_plain_likelihood():
    data, rows, _ = batch(1)
    result = mintjax.value_and_logprob_grads(objectives.focal_cross_entropy(gamma=1.5), data, rows)
    weights = np.concatenate([d.loss_fn_inputs["weights"].to_numpy() for d in data])
    lp = np.concatenate(rows).astype(np.float64)
    expected = -(weights * (1 - np.exp(lp)) ** 1.5 * lp).sum()
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.metrics["mean_nll"] == pytest.approx(-(weights * lp).sum() / weights.sum())
    plain = mintjax.value_and_logprob_grads(objectives.focal_cross_entropy(gamma=0.0), data, rows)
    same = mintjax.value_and_logprob_grads(objectives.cross_entropy(), data, rows)
    assert plain.loss == pytest.approx(same.loss, rel=1e-6)
