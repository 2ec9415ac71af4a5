"""Objectives as values: comparable, printable, traced, named where a trainer serves them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import Phase, find, settings

import mintjax
from mintjax import losses, objectives, testing
from mintjax.errors import DataError
from mintjax.gradients import stats

from ..by_numpy import evaluate

OBJECTIVES = {
    name: value
    for name, value in vars(objectives).items()
    if isinstance(value, type) and dataclasses.is_dataclass(value) and name != "WeightedSum"
}
# What is found is not shrunk, because nobody reads it.
FIRST = settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate])
EXAMPLE = find(
    testing.batches(max_blocks=4, max_length=20, log_ratios=("small",)),
    lambda e: len(e.data) == 4 and min(map(len, e.logprobs)) > 2,
    settings=FIRST,
)


def row_columns(name: str) -> list[np.ndarray]:
    """One column of the example."""
    return [datum.loss_fn_inputs[name].to_numpy() for datum in EXAMPLE.data]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_a_value(name):
    make = OBJECTIVES[name]
    one, other = make(), make()
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one).startswith(f"{name}(")
    field = next((f.name for f in dataclasses.fields(one) if isinstance(f.default, float)), None)
    if field is not None:
        changed = dataclasses.replace(one, **{field: 0.75})
        assert changed != one
        assert f"{field}=0.75" in repr(changed)
        assert jax.tree.structure(changed) == jax.tree.structure(one)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.beta = 3.0


def test_another_threshold_runs_the_same_program():
    sampling = np.full(20, -1.0)
    inputs = {"target_tokens": np.zeros(20), "logprobs": sampling, "advantages": np.ones(20)}
    data = [mintjax.Datum(mintjax.ModelInput.from_ints(range(20)), inputs)]
    logprobs = [np.linspace(-1.0, -0.5, 20, dtype=np.float32)]  # ratios from 1 to 1.65
    mintjax.value_and_logprob_grads(objectives.ppo(), data, logprobs)
    before = stats().compilations
    results = [
        mintjax.value_and_logprob_grads(
            objectives.ppo(clip_high_threshold=high), data, logprobs
        ).loss
        for high in (1.05, 1.3, 1.5)
    ]
    assert stats().compilations == before
    assert results[0] > results[1] > results[2]


BUILTIN = [
    (objectives.cross_entropy(), ("cross_entropy", {})),
    (objectives.importance_sampling(), ("importance_sampling", {})),
    (
        objectives.ppo(clip_high_threshold=1.3),
        ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.3}),
    ),
    (objectives.cispo(), ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2})),
    (objectives.dro(beta=1), ("dro", {"beta": 1.0})),
    (objectives.ppo(aggregation="token_mean"), None),
    (objectives.dro(beta=np.ones(3)), None),  # pyright: ignore[reportArgumentType]
    (objectives.dpo(), None),
]


@pytest.mark.parametrize(("objective", "expected"), BUILTIN, ids=str)
def test_what_a_trainer_serves_is_named(objective, expected):
    assert objective.builtin == expected


NEEDS = {
    "cross_entropy": ("weights",),
    "ppo": ("logprobs", "advantages"),
    "gspo": ("logprobs", "advantages"),
    "bradley_terry": ("weights",),
    "dpo": ("weights", "ref_logprobs"),
    "kto": ("weights", "ref_logprobs", "desirable"),
    "kl_k3": ("ref_logprobs",),
}


@functools.cache
def pair_without(column: str) -> testing.Example:
    """Two datums with all columns but one."""
    made = {"weights", "advantages", "logprobs", "ref_logprobs", "desirable"} - {column}
    return find(
        testing.batches(block=2, max_blocks=1, columns=sorted(made)),
        lambda e: True,
        settings=FIRST,
    )


@pytest.mark.parametrize(("name", "column"), [(n, c) for n, cs in NEEDS.items() for c in cs])
def test_a_missing_column_is_named_with_who_wants_it(name, column):
    with pytest.raises(DataError, match=rf"'{column}'.*objective {name} reads it"):
        mintjax.value_and_logprob_grads(OBJECTIVES[name](), *pair_without(column))


@pytest.mark.parametrize("name", ["bradley_terry", "dpo", "ipo", "simpo", "orpo"])
def test_an_odd_number_of_datums_is_refused(name):
    data, logprobs = EXAMPLE
    with pytest.raises(DataError, match=f"{name} needs pairs.*3 datums"):
        mintjax.value_and_logprob_grads(OBJECTIVES[name](), data[:3], logprobs[:3])


@pytest.mark.parametrize("name", ["distillation_forward_kl", "brier_score"])
def test_losses_over_candidates_need_candidates(name):
    data = [
        mintjax.Datum(d.model_input, d.loss_fn_inputs | {OBJECTIVES[name].reads: row})
        for d, row in zip(EXAMPLE.data, EXAMPLE.logprobs, strict=True)
    ]
    with pytest.raises(DataError, match=r"needs \[T, K\] logprobs"):
        mintjax.value_and_logprob_grads(OBJECTIVES[name](), data, EXAMPLE.logprobs)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match=r"aggregation must be one of .*'token_mean'"):
        objectives.ppo(aggregation="average")


@pytest.mark.parametrize("name", ["ppo", "kl_k3"])
def test_aggregations_are_those_of_the_losses(name):
    per_row: list[Any] = []
    for row, q, ref, a, w in zip(
        EXAMPLE.logprobs,
        *map(row_columns, ("logprobs", "ref_logprobs", "advantages", "weights")),
        strict=True,
    ):
        where = w != 0
        if name == "ppo":
            loss = evaluate(lambda *row: losses.ppo(*row[:3], where=row[3]), row, q, a, where)
        else:
            loss = evaluate(lambda *row: losses.kl_k3(*row[:2], where=row[2]), row, ref, where)
        per_row.append(loss[where])
    expected = {
        "sum": np.concatenate(per_row).sum(),
        "token_mean": np.concatenate(per_row).mean(),
        "sequence_mean": np.mean([row.mean() for row in per_row if row.size]),
    }
    for how, value in expected.items():
        loss = mintjax.value_and_logprob_grads(OBJECTIVES[name](aggregation=how), *EXAMPLE).loss
        np.testing.assert_allclose(loss, value, rtol=2e-5)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_a_weight_other_than_one_is_a_factor(name):
    data = [
        mintjax.Datum(
            d.model_input,
            d.loss_fn_inputs | {"weights": d.loss_fn_inputs["weights"].to_numpy() * 0.25},
        )
        for d in EXAMPLE.data
    ]
    quarter = mintjax.value_and_logprob_grads(OBJECTIVES[name](), data, EXAMPLE.logprobs)
    whole = mintjax.value_and_logprob_grads(OBJECTIVES[name](), *EXAMPLE)
    assert quarter.loss == pytest.approx(whole.loss / 4, rel=1e-6)


def test_metrics_are_the_diagnostics():
    where = [w != 0 for w in row_columns("weights")]
    picked = [
        np.concatenate([x[keep] for x, keep in zip(rows, where, strict=True)])
        for rows in (EXAMPLE.logprobs, row_columns("logprobs"), row_columns("advantages"))
    ]
    sums = losses.policy_sums(*picked, clip_low_threshold=0.8, clip_high_threshold=1.2)
    metrics = mintjax.value_and_logprob_grads(objectives.ppo(), *EXAMPLE).metrics
    for name, value in losses.policy_summary(sums).items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7)


def test_dppo_counts_the_tokens_that_left_the_trust_region():
    objective = objectives.dppo(divergence_threshold=0.01)
    left, tokens = 0, 0
    for row, q, a, w in zip(
        EXAMPLE.logprobs,
        *map(row_columns, ("logprobs", "advantages", "weights")),
        strict=True,
    ):
        where = w != 0
        loss = np.asarray(losses.dppo(row, q, a, divergence_threshold=0.01, where=where))
        left += int((where & (a != 0) & (loss == 0)).sum())
        tokens += int(where.sum())
    metrics = mintjax.value_and_logprob_grads(objective, *EXAMPLE).metrics
    assert left > 0
    assert metrics["clip_fraction"] == pytest.approx(left / tokens)


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_what_weights_hide_may_be_infinite_for_the_model_and_its_reference(name):
    def result(hidden: float) -> Any:
        inputs = {
            "target_tokens": [1, 2, 3],
            "weights": [0.0, 1.0, 1.0],
            "ref_logprobs": [hidden, -1.5, -0.5],
        }
        tokens = mintjax.ModelInput.from_ints([0, 1, 2])
        data = [
            mintjax.Datum(tokens, inputs | {"desirable": np.full(3, good)}) for good in (1.0, 0.0)
        ]
        logprobs = [[hidden, -1.0, -2.0], [hidden, -0.25, -1.0]]
        return mintjax.value_and_logprob_grads(OBJECTIVES[name](), data, logprobs)

    plain, infinite = result(-1.0), result(-np.inf)
    assert infinite.loss == plain.loss
    assert infinite.metrics == plain.metrics
    np.testing.assert_array_equal(infinite.grads, plain.grads)


def test_kto_takes_its_point_of_reference_from_the_batch_or_from_you():
    data = [
        mintjax.Datum(d.model_input, d.loss_fn_inputs | {"desirable": np.full(len(row), i % 2)})  # pyright: ignore[reportArgumentType]
        for i, (d, row) in enumerate(zip(EXAMPLE.data, EXAMPLE.logprobs, strict=True))
    ]
    from_batch = mintjax.value_and_logprob_grads(objectives.kto(), data, EXAMPLE.logprobs)
    given = objectives.kto(kl=from_batch.metrics["kl"])
    same = mintjax.value_and_logprob_grads(given, data, EXAMPLE.logprobs)
    np.testing.assert_allclose(same.loss, from_batch.loss, rtol=1e-6)
    far = mintjax.value_and_logprob_grads(objectives.kto(kl=50.0), data, EXAMPLE.logprobs)
    assert far.metrics["kl"] == 50.0
    assert far.loss != from_batch.loss


def test_a_column_that_only_some_datums_have_is_named_with_the_objective():
    first, *others = EXAMPLE.data
    without = {n: c for n, c in first.loss_fn_inputs.items() if n != "advantages"}
    data = [*others, mintjax.Datum(first.model_input, without)]
    rows = [*EXAMPLE.logprobs[1:], EXAMPLE.logprobs[0]]
    with pytest.raises(DataError, match=r"datum 3, field 'advantages'.*ppo reads it"):
        objectives.ppo()(data, rows)
