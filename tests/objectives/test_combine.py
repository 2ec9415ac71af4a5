"""Weighted sums of objectives."""

from __future__ import annotations

from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import find, given, settings

import mintjax
from mintjax import objectives, testing
from mintjax.gradients import stats

from ..examples import examples

EXAMPLE = find(
    testing.batches(block=2, max_blocks=2, max_length=20, log_ratios=("small",)),
    lambda e: len(e.data) == 4,
    settings=settings(database=None),
)


def mean_logprob(data: Any, logprobs: Any) -> Any:
    """A user's own term."""
    return logprobs.total() / logprobs.num_rows, {"rows": logprobs.num_rows}


TERMS = {"dpo": objectives.dpo(), "kl": objectives.kl_k3(), "own": mean_logprob}
BOTH = objectives.weighted_sum(
    {"ppo": objectives.ppo(), "kl": objectives.kl_k3()}, {"kl": 0.1}, gradient_norms=True
)


def test_value_gradient_and_metrics_are_the_terms():
    weights = {"kl": 0.3, "own": -2.0}
    whole = mintjax.value_and_logprob_grads(objectives.weighted_sum(TERMS, weights), *EXAMPLE)
    parts = {n: mintjax.value_and_logprob_grads(term, *EXAMPLE) for n, term in TERMS.items()}
    w = {"dpo": 1.0, **weights}
    np.testing.assert_allclose(whole.loss, sum(w[n] * p.loss for n, p in parts.items()), rtol=1e-5)
    for i, grad in enumerate(whole.grads):
        expected = sum(w[n] * p.grads[i] for n, p in parts.items())
        np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
    for name, part in parts.items():
        assert whole.metrics[f"{name}/weight"] == pytest.approx(w[name])
        for key, value in part.metrics.items():
            assert whole.metrics[f"{name}/{key}"] == pytest.approx(value, rel=1e-5)


def test_gradient_norms_are_those_of_the_terms():
    norms = mintjax.value_and_logprob_grads(
        objectives.weighted_sum(TERMS, {"kl": 0.3}, gradient_norms=True), *EXAMPLE
    ).metrics
    for name, term in TERMS.items():
        grads = mintjax.value_and_logprob_grads(term, *EXAMPLE).grads
        expected = np.sqrt(sum((grad**2).sum() for grad in grads))
        assert norms[f"{name}/gradient_norm"] == pytest.approx(expected, rel=1e-5)


def test_schedules_follow_the_step_without_a_new_program():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    objective = objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kl": schedule})
    base = mintjax.value_and_logprob_grads(objective.at_step(0), *EXAMPLE).loss
    before = stats().compilations
    for step in (0, 3, 10):
        result = mintjax.value_and_logprob_grads(objective.at_step(step), *EXAMPLE)
        assert result.metrics["kl/weight"] == pytest.approx(1 - step / 10, abs=1e-6)
        assert result.loss == pytest.approx(base * (1 - step / 10), rel=1e-6, abs=1e-6 * base)
    assert stats().compilations == before


def test_a_schedule_that_was_never_moved_says_so():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    objective = objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kl": schedule})
    with pytest.warns(UserWarning, match=r"'kl' is a schedule.*at_step\(step\)"):
        still = mintjax.value_and_logprob_grads(objective, *EXAMPLE)
    assert still.metrics["kl/weight"] == 1
    outer = objectives.weighted_sum({"inner": objective})
    with pytest.warns(UserWarning, match="read at step 0"):
        mintjax.value_and_logprob_grads(outer, *EXAMPLE)


def test_a_nested_sum_moves_with_the_outer_step():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    inner = objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kl": schedule})
    middle = objectives.weighted_sum({"inner": inner, "ppo": objectives.ppo()})
    outer = objectives.weighted_sum({"middle": middle}, {"middle": schedule})
    result = mintjax.value_and_logprob_grads(outer.at_step(4), *EXAMPLE)
    assert result.metrics["middle/inner/kl/weight"] == pytest.approx(0.6)
    kl = mintjax.value_and_logprob_grads(objectives.kl_k2(), *EXAMPLE).loss
    ppo = mintjax.value_and_logprob_grads(objectives.ppo(), *EXAMPLE).loss
    assert result.loss == pytest.approx(0.6 * (0.6 * kl + ppo), rel=1e-5)


def test_rows_are_padded_for_groups_of_every_size():
    groups = {
        "pairs": objectives.dpo(),
        "threes": objectives.ppo(aggregation="prompt_mean", group_size=3),
    }
    assert objectives.weighted_sum(groups).row_multiple == 6


def test_a_sum_is_a_value_and_nests():
    one = objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kl": 0.5})
    assert one == objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kl": 0.5})
    assert "kl_k2" in repr(one)
    nested = objectives.weighted_sum({"inner": one, "more": objectives.kl_k3()}, {"inner": 2.0})
    result = mintjax.value_and_logprob_grads(nested, *EXAMPLE)
    plain = mintjax.value_and_logprob_grads(objectives.kl_k2(), *EXAMPLE).loss
    assert result.metrics["inner/kl/loss"] == pytest.approx(plain, rel=1e-6)
    assert result.metrics["inner/loss"] == pytest.approx(plain / 2, rel=1e-6)
    assert nested.builtin is None


def test_rows_are_padded_only_if_every_term_minds_them():
    assert BOTH.row_multiple == 1
    assert objectives.weighted_sum({"dpo": objectives.dpo(), "ppo": BOTH}).row_multiple == 2
    assert objectives.weighted_sum(TERMS).row_multiple is None


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="at least one term"):
        objectives.weighted_sum({})
    with pytest.raises(ValueError, match=r"weights for \['kk'\]"):
        objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kk": 1.0})


@given(testing.batches(max_length=120, poison=True))
@settings(max_examples=examples(3))
def test_a_sum_obeys_the_laws(example):
    testing.check_gradient(BOTH, *example)
    testing.check_permutation(BOTH, *example)
    testing.check_padding_invariance(BOTH, *example)
    testing.check_masked_equals_removed(BOTH, *example)
    testing.check_chunk_additivity(BOTH, *example)


def test_a_regulariser_pulls_on_every_datum():
    grads = mintjax.value_and_logprob_grads(objectives.kl_k3(), *EXAMPLE).grads
    for datum, grad in zip(EXAMPLE.data, grads, strict=True):
        counts = datum.loss_fn_inputs["weights"].to_numpy() != 0
        differs = datum.loss_fn_inputs["ref_logprobs"].to_numpy() != 0
        assert (grad[~counts] == 0).all()
        assert counts.any() <= (grad[counts & differs] != 0).any()


def test_a_terms_own_loss_metric_is_not_taken_for_its_value():
    def shouting(data: Any, logprobs: Any) -> Any:
        return logprobs.total(), {"loss": 7.0, "volume": 11.0}

    whole = mintjax.value_and_logprob_grads(objectives.weighted_sum({"it": shouting}), *EXAMPLE)
    assert whole.metrics["it/loss"] == pytest.approx(whole.loss)
    assert whole.metrics["it/volume"] == 11
