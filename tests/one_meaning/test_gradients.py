"""However logprobs are laid out and evaluated, the gradient is the one that float64 has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax import Batch, Ragged, value_and_logprob_grads
from mintjax.errors import MintjaxError

from ..examples import THOROUGH, parts, share
from .situations import OURS, OWN, Case, Situation, candidates_of, situations

TOLERANCE = 2e-5


class Outcome(NamedTuple):
    """What came of a step: numbers, or the type of an error."""

    loss: float
    metrics: dict[str, float]
    grads: list[Any]


def packed(rows: list[Any]) -> Ragged:
    return Ragged.from_packed(np.concatenate(rows), np.cumsum([0, *map(len, rows)]))


def by_columns(objective: Any, situation: Situation) -> Any:
    rows = Ragged.from_rows(situation.logprobs)
    return value_and_logprob_grads(objective, situation.data, rows)


def by_lists(objective: Any, situation: Situation) -> Any:
    rows = [row.tolist() for row in situation.logprobs]
    return value_and_logprob_grads(objective, Batch(situation.data), rows)


def by_packed(objective: Any, situation: Situation) -> Any:
    return value_and_logprob_grads(objective, situation.data, packed(situation.logprobs))


def eagerly(objective: Any, situation: Situation) -> Any:
    with jax.disable_jit():
        return value_and_logprob_grads(objective, situation.data, situation.logprobs)


def in_doubles(objective: Any, situation: Situation) -> Any:
    with jax.enable_x64(True):
        rows = [row.astype(np.float64) for row in situation.logprobs]
        return value_and_logprob_grads(objective, situation.data, rows)


def of_rows(jit: bool) -> Callable[[Any, Situation], Any]:
    """Differentiate with respect to a list of rows, as plain JAX code would."""

    def way(objective: Any, situation: Situation) -> Any:
        def loss(rows: list[Any]) -> Any:
            return objective(Batch(situation.data), Ragged.from_rows(rows))

        both = jax.value_and_grad(loss, has_aux=True)
        rows = [jax.numpy.asarray(row) for row in situation.logprobs]
        (value, metrics), grads = (jax.jit(both) if jit else both)(rows)
        metrics = {name: float(metric) for name, metric in metrics.items()}
        return float(value), {"loss": float(value), **metrics}, [np.asarray(g) for g in grads]

    return way


WAYS: dict[str, Callable[[Any, Situation], Any]] = {
    "lists": by_lists,
    "packed": by_packed,
    "rows, jitted": of_rows(jit=True),
}
if THOROUGH:  # XLA compiles each operation of these
    WAYS |= {"eager": eagerly, "rows": of_rows(jit=False)}
OFTEN = ["lists", "packed"] * 20 * THOROUGH
"""Ways that find what is compiled are drawn more often where there are many examples."""


def outcome(way: Callable[[Any, Situation], Any], objective: Any, situation: Situation) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Outcome(*way(objective, situation))
    except MintjaxError as error:
        return type(error)


def assert_same(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, type) or isinstance(found, type):
        assert found is expected, (name, found, expected)
        return
    scale = max(1.0, *(np.abs(g).max(initial=0) for g in expected.grads))
    for i, (got, want) in enumerate(zip(found.grads, expected.grads, strict=True)):
        assert got.shape == want.shape, (name, i)
        np.testing.assert_allclose(
            got, want, rtol=TOLERANCE, atol=TOLERANCE * scale, err_msg=f"{name}, datum {i}"
        )
    assert found.loss == pytest.approx(expected.loss, rel=TOLERANCE, abs=TOLERANCE * scale), name
    assert found.metrics.keys() == expected.metrics.keys(), name
    for key, value in expected.metrics.items():
        close = pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True)
        assert found.metrics[key] == close, (name, key)


def law(data: st.DataObject, case: Case) -> None:
    """Several batches through one objective, whose caches are met again."""
    objective = case.objective()
    candidates = data.draw(candidates_of(case), label="candidates")
    for _ in range(data.draw(st.integers(1, 3), label="batches")):
        situation = data.draw(situations(case, candidates), label="batch")
        expected = outcome(in_doubles, objective, situation)
        if case.by_hand is not None and not isinstance(expected, type):
            loss, grads = case.by_hand(situation.exact, situation.logprobs)
            by_hand = Outcome(loss, {**expected.metrics, "loss": loss}, grads)
            assert_same(expected, by_hand, "float64 against the gradient by hand")
        assert_same(outcome(by_columns, objective, situation), expected, "columns")
        way = data.draw(st.sampled_from([*WAYS, *OFTEN]), label="way")
        assert_same(outcome(WAYS[way], objective, situation), expected, way)


def check(names: list[str], cases: Mapping[str, Case]) -> None:
    """Holds the law for some of the cases, with their share of the examples."""

    @share(3, cases)  # each example compiles
    @given(data=st.data(), name=st.sampled_from(names))
    def holds(data: st.DataObject, name: str) -> None:
        law(data, cases[name])

    holds()


@pytest.mark.parametrize("names", parts(OWN))
def test_a_users_function_has_the_gradient_of_float64_in_every_layout(names: list[str]) -> None:
    check(names, OWN)


@pytest.mark.parametrize("names", parts(OURS))
def test_an_objective_has_the_gradient_of_float64_in_every_layout(names: list[str]) -> None:
    check(names, OURS)
