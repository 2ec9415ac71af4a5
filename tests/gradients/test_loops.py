"""A loop over rows has the gradient of float64 and of its columns, however it is evaluated."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import Batch, Datum, ModelInput, value_and_logprob_grads
from mintjax.gradients import lengths, loops

from ..examples import examples
from .loop_forms import FORMS, Form

FEW = settings(max_examples=examples(2))
LENGTHS = st.one_of(st.integers(1, 4), st.sampled_from([127, 128, 129, 200]))
LONG = st.sampled_from([16, 17, 128, 200])


def batch_of(lengths: list[int], seed: int, candidates: bool) -> tuple[list[Datum], list[Any]]:
    rng = np.random.default_rng(seed)
    data: list[Datum] = []
    logprobs: list[Any] = []
    for n in lengths:
        shape = (n, 3) if candidates else (n,)
        lp = -rng.exponential(size=shape).astype(np.float32)
        inputs: dict[str, Any] = {
            "target_tokens": rng.integers(0, 5, shape),
            "weights": rng.choice([0.0, 0.5, 1.0], n).astype(np.float32),
            "logprobs": lp + 0.3 * rng.standard_normal(shape).astype(np.float32),
            "advantages": rng.standard_normal(n).astype(np.float32),
            "reward": np.float32(rng.standard_normal()),
        }
        data.append(Datum(ModelInput.from_ints(range(1, n + 1)), inputs))
        logprobs.append(lp)
    return data, logprobs


def in_doubles(form: Form, data: list[Datum], logprobs: list[Any]) -> Any:
    """Plain JAX, on the rows as they are."""
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = jax.value_and_grad(lambda rows: form.loop(Batch(data), rows), has_aux=True)
        (value, found), grads = loss([jnp.asarray(row, np.float64) for row in logprobs])
    return float(value), {name: float(m) for name, m in found.items()}, map(np.asarray, grads)


def assert_same(found: Any, expected: Any, name: str) -> None:
    value, metrics, grads = expected
    scale = max(1.0, abs(value))
    assert found.loss == pytest.approx(value, rel=1e-4, abs=1e-4 * scale), name
    for got, want in zip(found.grads, grads, strict=True):
        scale = max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=5e-5 * scale, err_msg=name)
    for key, metric in metrics.items():
        assert found.metrics[key] == pytest.approx(metric, rel=1e-3, abs=1e-3), (name, key)


@FEW
@given(st.data(), st.sampled_from(list(FORMS)))
def test_a_loop_means_what_its_columns_and_float64_mean(data: st.DataObject, name: str) -> None:
    form = FORMS[name]
    blocks = data.draw(st.integers(1, 8 // form.block // 2), label="blocks")
    for _ in range(3):  # the first is interpreted, the others may be compiled
        rows = blocks * form.block
        sizes = data.draw(
            st.one_of(st.lists(each, min_size=rows, max_size=rows) for each in (LENGTHS, LONG)),
            label="lengths",
        )
        batch = batch_of(sizes, data.draw(st.integers(0, 99), label="seed"), form.candidates)
        expected = in_doubles(form, *batch)
        before = mintjax.gradients.stats()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is traced anew for every batch")
            warnings.filterwarnings("ignore", ".*Explicitly requested dtype")
            found = value_and_logprob_grads(form.loop, *batch)
        expected = (expected[0], expected[1], list(expected[2]))
        assert_same(found, expected, name)
        after = mintjax.gradients.stats()
        traced = form.traced and not (form.if_short and lengths.are_long(batch[1]))
        assert after.loops_traced - before.loops_traced == traced
        if form.columns is not None:
            assert_same(value_and_logprob_grads(form.columns, *batch), expected, "columns")


def test_a_trace_is_used_again_for_other_lengths() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        return sum((lp * lp).sum() for lp in logprobs), {}

    before = mintjax.gradients.stats()
    for sizes in ([3, 4], [200, 1], [5, 6]):
        data, logprobs = batch_of(sizes, 0, candidates=False)
        result = value_and_logprob_grads(loss, data, logprobs)
        for got, lp in zip(result.grads, logprobs, strict=True):
            np.testing.assert_allclose(got, 2 * lp, rtol=1e-6)
    assert mintjax.gradients.stats().loops_traced == before.loops_traced


def test_an_operation_that_numpy_has_no_rule_for_is_run_by_jax() -> None:
    def best_two(data: Any, logprobs: Any) -> Any:
        scores = jnp.stack([(lp * lp).sum() for lp in logprobs])
        return jax.lax.top_k(scores, 2)[0].sum(), {}

    for seed in (0, 1):
        data, logprobs = batch_of([3, 4, 5], seed, candidates=False)
        worst = np.argmin([(lp * lp).sum() for lp in logprobs])
        result = value_and_logprob_grads(best_two, data, logprobs)
        for i, (got, lp) in enumerate(zip(result.grads, logprobs, strict=True)):
            np.testing.assert_allclose(got, (i != worst) * 2 * lp, rtol=1e-6)


def test_traces_for_many_numbers_of_rows_are_bounded_and_right(monkeypatch: Any) -> None:
    monkeypatch.setattr(loops, "_KEPT", 2)
    kept: list[int] = []
    made = loops.Loops.run

    def run(self: Any, *arguments: Any) -> Any:
        outcome = made(self, *arguments)
        kept.append(len(self._plans))
        return outcome

    monkeypatch.setattr(loops.Loops, "run", run)

    def loss(data: Any, logprobs: Any) -> Any:
        return sum((lp * lp).sum() for lp in logprobs), {}

    for rows in (1, 2, 3, 1, 4, 2):
        data, logprobs = batch_of([3] * rows, rows, candidates=False)
        result = value_and_logprob_grads(loss, data, logprobs)
        for got, lp in zip(result.grads, logprobs, strict=True):
            np.testing.assert_allclose(got, 2 * lp, rtol=1e-6)
    assert kept == [1, 2, 2, 2, 2, 2]


def test_a_closed_over_value_that_changes_is_seen() -> None:
    factors = np.ones(2)

    def loss(data: Any, logprobs: Any) -> Any:
        return sum((lp * f).sum() for lp, f in zip(logprobs, factors, strict=True)), {}

    for new in (1.0, 2.0, 3.0):
        factors[0] = new
        data, logprobs = batch_of([3, 4], 0, candidates=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*made anew for the third time")
            result = value_and_logprob_grads(loss, data, logprobs)
        assert result.grads[0].tolist() == [new] * 3


class Scaled:
    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, data: Any, logprobs: Any) -> Any:
        return sum((lp * self.factor).sum() for lp in logprobs), {}


def test_a_float_attribute_that_changes_is_an_argument() -> None:
    scaled = Scaled()
    before = mintjax.gradients.stats()
    for factor in (1.0, 2.0, 3.0):
        scaled.factor = factor
        result = value_and_logprob_grads(scaled, *batch_of([3, 4], 0, candidates=False))
        assert result.grads[1].tolist() == [factor] * 4
    assert mintjax.gradients.stats().objectives - before.objectives == 1


@jax.jit
def _dear_alone(lp: Any) -> Any:
    return lp.sum() * (5.0 if lp.shape[0] == 1 else 1.0)


def test_a_choice_that_jax_remembers_is_seen_for_every_number_of_rows() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        hidden = globals()["_dear_alone"]  # so that it does not count as the objective's own
        return sum(hidden(lp) for lp in logprobs), {}

    for sizes in ([1, 3, 2], [1, 3], [1]):
        data, logprobs = batch_of(sizes, 0, candidates=False)
        with pytest.warns(UserWarning, match="chooses by the length of a row"):
            result = value_and_logprob_grads(loss, data, logprobs)
        assert [grad[0] for grad in result.grads] == [5.0 if n == 1 else 1.0 for n in sizes]


def test_what_is_traced_for_each_batch_is_warned_about_at_the_line_that_makes_it_so() -> None:
    def mean(data: Any, logprobs: Any) -> Any:
        return sum(lp[t] for lp in logprobs for t in range(len(lp))), {}

    batch = batch_of([3, 4], 0, candidates=False)
    with pytest.warns(UserWarning, match=r"mean takes rows one by one .* needs the length") as told:
        value_and_logprob_grads(mean, *batch)
    assert told[0].filename == __file__
    assert told[0].lineno == mean.__code__.co_firstlineno + 1
    value_and_logprob_grads(mean, *batch)  # warnings are errors here


@pytest.mark.parametrize("fails", [False, True])
def test_len_is_pythons_own_again_after_a_trace(fails: bool) -> None:
    seen: list[Any] = []

    def loss(data: Any, logprobs: Any) -> Any:
        seen.append(type(len(logprobs[0])))
        if fails:
            raise KeyError
        return sum(lp.sum() / len(lp) for lp in logprobs), {}

    with warnings.catch_warnings(), contextlib.suppress(KeyError):
        warnings.simplefilter("ignore")
        value_and_logprob_grads(loss, *batch_of([3, 4], 0, candidates=False))
    assert seen[0] is not int  # a symbol stood for it
    assert "len" not in globals()


def test_a_power_of_two_beyond_32_bits_is_that_of_python() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        return sum((lp * float(2 ** lp.shape[0])).sum() for lp in logprobs), {}

    with pytest.warns(UserWarning, match="traced anew"):
        found = value_and_logprob_grads(loss, *batch_of([40, 3], 0, candidates=False))
    assert [grad[0] for grad in found.grads] == [2.0**40, 8.0]


def test_a_product_of_lengths_beyond_32_bits_is_an_error() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        return sum((lp * lp.shape[0] ** 4).sum() for lp in logprobs), {}

    value_and_logprob_grads(loss, *batch_of([3, 4], 0, candidates=False))
    with pytest.raises(OverflowError, match="does not fit int32"):
        value_and_logprob_grads(loss, *batch_of([3, 300], 0, candidates=False))


@pytest.mark.filterwarnings("ignore:.*made anew for the third time")
@pytest.mark.parametrize(
    "of",
    [
        lambda ids: ids * 2**20,
        lambda ids: -(ids**3) - ids**2,
        lambda ids: jnp.cumsum(ids * 2**17),
        lambda ids: (ids * 2**17).sum(),
        lambda ids: jnp.zeros(2, ids.dtype).at[0].add(ids[0] * 2**18).at[0].add(ids[0] * 2**18),
        lambda ids: jnp.dot(ids, ids * 2**6),
        lambda ids: ids[0] * 2**17 + ids[1] * 2**17 + ids[2] * 2**17 + ids[-1] * 2**17,
    ],
)
def test_integers_that_would_wrap_are_an_error(of: Any) -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        rows = zip(data, logprobs, strict=True)
        return sum((of(d.loss_fn_inputs["id"]) * lp[0]).sum() for d, lp in rows), {}

    for ids in (3, 5000, 4):
        data, logprobs = batch_of([3, 4], 0, candidates=False)
        data = mintjax.with_column(data, "id", [np.full(len(lp), ids) for lp in logprobs])
        if ids == 5000:
            with pytest.raises(OverflowError, match="does not fit int32"):
                value_and_logprob_grads(loss, data, logprobs)
            continue
        found = value_and_logprob_grads(loss, data, logprobs)
        for grad, lp in zip(found.grads, logprobs, strict=True):
            assert grad[0] == np.sum(of(jnp.full(len(lp), ids)))


def test_a_warning_points_at_the_line_of_what_is_slow() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        total = sum(lp.sum() for lp in logprobs)
        kept = [lp for d, lp in zip(data, logprobs, strict=True) if np.all(d.loss_fn_inputs["x"])]
        return total + sum(lp.sum() for lp in kept), {}

    data, logprobs = batch_of([3, 4], 0, candidates=False)
    data = mintjax.with_column(data, "x", [np.ones(3), np.ones(4)])
    with pytest.warns(UserWarning, match="needs the values of a row or a column") as told:
        value_and_logprob_grads(loss, data, logprobs)
    assert (told[0].filename, told[0].lineno) == (__file__, loss.__code__.co_firstlineno + 2)


def test_datums_that_differ_in_their_columns_are_each_looked_at() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        rows = zip(data, logprobs, strict=True)
        return sum(lp.sum() * (2.0 if "extra" in d.loss_fn_inputs else 1.0) for d, lp in rows), {}

    for extras in ((0, 1), (0,), (1,), ()):
        data, logprobs = batch_of([3, 4], 0, candidates=False)
        for i in extras:
            data[i].loss_fn_inputs["extra"] = mintjax.TensorData(np.ones(len(logprobs[i])))
        result = value_and_logprob_grads(loss, data, logprobs)
        assert [grad[0] for grad in result.grads] == [1.0 + (i in extras) for i in (0, 1)]


@pytest.mark.parametrize("name", ["spread over candidates", "spread over tokens"])
def test_a_gradient_with_an_axis_of_one_number_has_the_shape_of_its_row(name):
    data, logprobs = batch_of([1, 3, 2], 0, candidates=True)
    found = value_and_logprob_grads(FORMS[name].loop, data, logprobs).grads
    for grad, row in zip(found, logprobs, strict=True):
        assert grad.shape == row.shape


@pytest.mark.filterwarnings("ignore")  # of loops that are traced anew, and functions made anew
@pytest.mark.parametrize("far", [2**33, 2**31, 2**31 - 9])
def test_an_integer_of_numpy_that_jax_would_wrap_is_refused(far):
    tokens = mintjax.ModelInput.from_ints([1, 2])
    data = [mintjax.Datum(tokens, {"ids": np.array([1, 2])})] * 2

    def objective(data, logprobs):
        total = 0.0
        for datum, row in zip(data, logprobs, strict=True):
            ids = np.asarray(datum.loss_fn_inputs["ids"]) + far  # so each batch is traced
            total = total + (ids * row).sum()
        return total, {}

    rows = [np.array([-1.0, -2.0], np.float32)] * 2
    for _ in range(2):
        if far + 2 < 2**31:
            result = mintjax.value_and_logprob_grads(objective, data, rows)
            np.testing.assert_allclose(result.grads[0], np.array([1, 2]) + far)
        else:
            with pytest.raises(OverflowError, match="does not fit int32"):
                mintjax.value_and_logprob_grads(objective, data, rows)
