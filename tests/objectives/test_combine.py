"""Weighted sums of objectives."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import objectives, testing
from mintjax.errors import ObjectiveError
from mintjax.gradients import stats

from ..examples import examples

EXAMPLE = find(
    testing.batches(block=2, max_blocks=2, max_length=20, log_ratios=("small",)),
    lambda e: len(e.data) == 4,
    settings=settings(database=None, derandomize=True, phases=[Phase.generate]),  # not shrunk
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


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda d, lp: (lp.sum(), {}), r"must be a scalar, not an array of shape \(4,\)"),
        (lambda d, lp: lp.total(), r"must return \(loss, metrics\)"),
        (lambda d, lp: lp[:2].sum(), r"must return \(loss, metrics\)"),
        (lambda d, lp: (1, {}), "must be a floating-point scalar"),
        (objectives.dpo, "dpo is a class"),
    ],
)
def test_a_term_is_held_against_the_contract(term, message):
    for terms in ({"own": term}, {"own": term, "same": term, "kl": objectives.kl_k3()}):
        with pytest.raises(ObjectiveError, match=message):
            mintjax.value_and_logprob_grads(objectives.weighted_sum(terms), *EXAMPLE)


@pytest.mark.parametrize("weight", [None, "0.1", 1j, np.ones(2), [0.1], objectives.dpo()])
def test_a_weight_is_a_real_number(weight):
    for make in (
        lambda: objectives.weighted_sum(TERMS, {"own": weight}),
        lambda: objectives.kl_k3() * weight,
    ):
        with pytest.raises(TypeError, match="by a number or by a schedule of the step"):
            make()


def test_a_quotient_is_the_product_with_the_inverse():
    half = (objectives.dpo() + objectives.kl_k3()) / 4
    assert half.weights == (0.25, 0.25)
    assert (objectives.dpo() / np.float32(2)).weights == (0.5,)
    for bad in (0, np.nan, np.inf):
        with pytest.raises(ValueError, match="divided by a finite number but 0"):
            objectives.dpo() / bad
    for bad in ("2", objectives.dpo(), None):
        with pytest.raises(TypeError, match="divided by a number"):
            objectives.dpo() / bad


@pytest.mark.parametrize("weight", [np.nan, np.float32(np.inf)])
def test_a_weight_is_finite(weight):
    with pytest.raises(ValueError, match="must be finite"):
        objectives.weighted_sum(TERMS, {"own": weight})


def test_terms_whose_metrics_would_be_mixed_up_are_refused():
    inner = objectives.weighted_sum({"b": objectives.kl_k3()})
    both = objectives.weighted_sum({"a": inner, "a/b": objectives.dpo()})
    with pytest.raises(ObjectiveError, match=r"two terms report .*'a/b/loss'"):
        mintjax.value_and_logprob_grads(both, *EXAMPLE)


def test_metrics_of_a_term_do_not_stand_in_for_its_value_and_weight():
    def term(data, logprobs):
        return logprobs.total(), {"loss": 7.0, "weight": 8.0, "kept": 9.0}

    terms = {"own": term, "nll": objectives.cross_entropy()}
    sum_of = objectives.weighted_sum(terms, {"own": 0.5, "nll": 0.25})
    metrics = mintjax.value_and_logprob_grads(sum_of, *EXAMPLE).metrics
    total = sum(float(np.sum(row)) for row in EXAMPLE[1])
    assert metrics["own/loss"] == pytest.approx(total, rel=1e-5)
    assert (metrics["own/weight"], metrics["nll/weight"], metrics["own/kept"]) == (0.5, 0.25, 9.0)


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
    assert objectives.weighted_sum(groups).pad_rows_to == 6


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
    assert BOTH.pad_rows_to == 1
    assert objectives.weighted_sum({"dpo": objectives.dpo(), "ppo": BOTH}).pad_rows_to == 2
    assert objectives.weighted_sum(TERMS).pad_rows_to is None


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="at least one term"):
        objectives.weighted_sum({})
    with pytest.raises(ValueError, match=r"weights for \['kk'\]"):
        objectives.weighted_sum({"kl": objectives.kl_k2()}, {"kk": 1.0})


@given(testing.batches(max_length=120, poison=True))
@settings(max_examples=examples(2))
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


def halving(step: Any) -> Any:
    return 2.0**-step


SUMMANDS = {name: getattr(objectives, name)() for name in ("dpo", "kl_k2", "kl_k3", "ppo")}
NUMBERS = st.sampled_from([2, -0.5, 0.1, np.float32(3), np.array(0.25), jnp.float32(1.5)])


@st.composite
def sums(draw: st.DrawFn) -> tuple[Any, dict[str, float]]:
    """A sum written with operators, and the weights that its terms have at step 3."""
    names = draw(st.lists(st.sampled_from(sorted(SUMMANDS)), min_size=1, unique=True))
    total, weights = None, {}
    for name in names:
        term, weight, moving = SUMMANDS[name], 1.0, False
        for _ in range(draw(st.integers(0, 2))):
            factor = draw(NUMBERS if moving else NUMBERS | st.just(halving))
            moving = moving or factor is halving
            term = factor * term if draw(st.booleans()) else term * factor
            weight *= 2.0**-3 if factor is halving else float(factor)
        way = draw(st.sampled_from("+-")) if total is not None else "+"
        weights[name] = -weight if way == "-" else weight
        total = term if total is None else total + term if way == "+" else total - term
        if draw(st.booleans()):
            total = draw(st.sampled_from([sum([total]), total * -1 * -1]))
    return total, weights


@given(sums())
def test_operators_make_the_weighted_sum_of_the_same_terms_and_weights(case: Any):
    total, weights = case
    total = 0 + total
    whole = objectives.weighted_sum({name: SUMMANDS[name] for name in weights}, weights)
    assert (total.names, total.terms) == (whole.names, whole.terms)
    found = [float(weight(3) if callable(weight) else weight) for weight in total.weights]
    np.testing.assert_allclose(found, whole.weights, rtol=1e-6)


def test_a_sum_written_with_operators_is_evaluated_as_one_that_is_named():
    total = objectives.dpo() + halving * objectives.kl_k2() * 0.5 - objectives.kl_k3()
    terms = {name: SUMMANDS[name] for name in ("dpo", "kl_k2", "kl_k3")}
    whole = objectives.weighted_sum(terms, {"kl_k2": 0.0625, "kl_k3": -1.0})
    found, expected = (
        mintjax.value_and_logprob_grads(objective.at_step(3), *EXAMPLE)
        for objective in (total, whole)
    )
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for mine, other in zip(found.grads, expected.grads, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_another_factor_or_step_of_a_sum_runs_the_same_program():
    def total(factor: float) -> Any:
        return objectives.dpo() + factor * (halving * objectives.kl_k2())

    mintjax.value_and_logprob_grads(total(1.0).at_step(0), *EXAMPLE)
    before = stats().compilations
    for factor, step in ((0.5, 1), (0.25, 2)):
        result = mintjax.value_and_logprob_grads(total(factor).at_step(step), *EXAMPLE)
        assert result.metrics["kl_k2/weight"] == pytest.approx(factor * 2.0**-step)
    assert stats().compilations == before


def test_what_cannot_be_added_or_multiplied_says_what_to_write():
    dpo, kl = objectives.dpo(), objectives.kl_k2()
    for add in (lambda: dpo + mean_logprob, lambda: mean_logprob + dpo, lambda: dpo - mean_logprob):
        with pytest.raises(TypeError, match=r'a plain function is none.*weighted_sum\(\{"dpo"'):
            add()
    with pytest.raises(TypeError, match=r"and 1\.5 is none"):
        dpo + 1.5
    with pytest.raises(ValueError, match=r"both sides of \+ have a term called 'kl_k2'.*names"):
        dpo + kl + kl
    for factor in (dpo, np.ones(3), [1.0]):
        with pytest.raises(TypeError, match=r"by a number or by a schedule.*column weights"):
            factor * kl
    with pytest.raises(TypeError, match="multiply the schedules in one function"):
        halving * (halving * kl)
    with pytest.raises(ValueError, match=r"at the steps \[1, 2\]: add first"):
        (halving * kl).at_step(1) + (halving * objectives.kl_k3()).at_step(2)
