"""A reduction gives what NumPy gives of each row, and no number of the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Ragged

from ..examples import examples, some
from .data import assert_rows, lengths, ragged, rows_of

REDUCTIONS = {
    "sum": (lambda x: x.sum(), np.sum),
    "mean": (lambda x: x.mean(), np.mean),
    "var": (lambda x: x.var(), np.var),
    "std": (lambda x: x.std(), np.std),
    "max": (lambda x: x.max(), np.max),
    "min": (lambda x: x.min(), np.min),
    "logsumexp": (lambda x: x.logsumexp(), lambda r: np.log(np.exp(r.astype(np.float64)).sum())),
    "count": (lambda x: x.count(), np.size),
    "dot": (lambda x: x.dot(x * 2 + 1), lambda r: (r * (2 * r + 1)).sum()),
    "first": (lambda x: x.first(), lambda r: r[0]),
    "last": (lambda x: x.last(), lambda r: r[-1]),
}


EAGER = some(REDUCTIONS, 3)  # the others are compiled whole


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, True) for name in REDUCTIONS), *((n, False) for n in EAGER)]
)
@settings(max_examples=examples(5))
@given(sizes=lengths)
def test_a_reduction_gives_each_row_what_numpy_gives_it(name, compiled, sizes):
    reduce, oracle = REDUCTIONS[name]
    rows = rows_of(sizes)
    got = (jax.jit(reduce) if compiled else reduce)(Ragged.from_rows(rows))
    np.testing.assert_allclose(got, [oracle(row) for row in rows], rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["sum", "mean", "var", "max", "min", "logsumexp", "count"])
def test_a_reduction_takes_all_of_a_row_with_candidates(name):
    rows = rows_of([3, 130, 1], trailing=(4,))
    reduce, oracle = REDUCTIONS[name]
    got = reduce(Ragged.from_rows(rows))
    np.testing.assert_allclose(got, [oracle(row) for row in rows], rtol=1e-5)


@given(sizes=lengths, seed=st.integers(0, 99))
def test_where_is_the_same_as_leaving_numbers_out(sizes, seed):
    rows = rows_of(sizes, seed)
    keep = [row > -0.5 for row in rows_of(sizes, seed + 100)]
    x, where = Ragged.from_rows(rows), Ragged.from_rows(keep)
    kept = [row[k] for row, k in zip(rows, keep, strict=True)]
    np.testing.assert_allclose(x.sum(where), [k.sum() for k in kept], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x.count(where), [k.size for k in kept])
    means = [k.mean() if k.size else 0 for k in kept]
    np.testing.assert_allclose(x.mean(where), means, rtol=1e-5, atol=1e-6)
    largest = [k.max() if k.size else -np.inf for k in kept]
    np.testing.assert_array_equal(x.max(where), largest)
    total = np.concatenate(kept).sum()
    np.testing.assert_allclose(x.total(where), total, rtol=1e-4, atol=1e-4)


@jax.jit
@jax.grad
def gradient_of_some_reductions(tiles, layout):
    x = Ragged(tiles, layout)
    return (x.logsumexp() * x.mean()).sum() + x.max().sum()


@given(sizes=lengths)
def test_gradients_reach_tokens_and_not_padding(sizes):
    rows = rows_of(sizes)
    x = Ragged.from_rows(rows)

    def by_hand(row):
        softmax = np.exp(row) / np.exp(row).sum()
        logsumexp = np.log(np.exp(row).sum())
        return softmax * row.mean() + logsumexp / row.size + (row == row.max())

    got = Ragged(gradient_of_some_reductions(x.tiles, x.layout), x.layout)
    expected = [by_hand(row) for row in rows]
    assert_rows(got, expected, rtol=1e-4)
    np.testing.assert_allclose(np.sum(got.tiles), sum(e.sum() for e in expected), rtol=1e-3)


def test_padding_brings_no_nan_of_its_own():
    x = Ragged.from_rows([np.full(3, 2.0, np.float32), np.full(200, 4.0, np.float32)])
    with jax.debug_nans(True):
        grads = jax.grad(lambda t: Ragged(t, x.layout).map(jnp.log).total())(x.tiles)
    assert_rows(Ragged(grads, x.layout), [np.full(3, 0.5), np.full(200, 0.25)])


def test_one_rows_nan_stays_in_that_row():
    rows = rows_of([5, 400, 7])
    rows[1][300] = np.nan
    x = Ragged.from_rows(rows)
    for reduce, _ in REDUCTIONS.values():
        assert np.isfinite(np.asarray(reduce(x))[[0, 2]]).all()
    assert np.isnan(x.sum()[1])
    rows[1][300] = np.inf
    assert Ragged.from_rows(rows).sum()[1] == np.inf


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_long_row_sum_is_as_accurate_as_a_pairwise_one(scale):
    errors = []
    for seed in range(20):
        row = -scale * np.abs(rows_of([32768], seed)[0])
        true = row.astype(np.float64).sum()
        x = Ragged.from_rows([row, row[:100]])
        errors.append((abs(float(x.sum()[0]) - true), abs(float(row.sum()) - true)))
    ours, numpys = np.mean(errors, axis=0)
    assert ours <= numpys


def test_a_weight_is_no_mask():
    x, weights = ragged([1, 2], [3]), ragged([0.5, 1], [1])
    for reduce in (x.sum, x.mean, x.count, x.max, x.total, x.logsumexp):
        with pytest.raises(TypeError, match=r"boolean or integer, not float32.*weights != 0"):
            reduce(where=weights)


def test_an_empty_row_has_no_first_and_no_last_token():
    x = ragged([], [5, 6])
    for end, there in ((Ragged.first, 5), (Ragged.last, 6)):
        with pytest.raises(ValueError, match="row 0 has no token"):
            end(x)
        np.testing.assert_array_equal(jax.jit(end)(x), [np.nan, there])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.int64, np.float32])
def test_least_and_greatest_of_any_dtype(dtype):
    x = ragged([1, 0, 1], [1, 1], dtype=dtype)
    assert x.min().tolist() == [0, 1]
    assert x.max().tolist() == [1, 1]
    nothing = x.min(where=x > 1)
    info = jnp.inf if dtype is np.float32 else True if dtype is bool else None
    if info is None:
        info = jnp.iinfo(nothing.dtype).max
    assert nothing.tolist() == [info, info]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_sums_of_16_bits_are_taken_in_32(dtype):
    x = ragged([-30] * 3000, [1], dtype=dtype)
    assert x.sum().tolist() == [-90000, 1]
    assert x.mean().tolist() == [-30, 1]
    assert x.cumsum().last().tolist() == [-90000, 1]
    assert ragged([1] * 300, dtype=np.uint8).sum().tolist() == [300]


def test_a_weight_of_0_hides_an_infinite_logprob_from_value_and_gradient():
    x, weights = ragged([-np.inf, -2], [np.nan, -3]), ragged([0, 2], [0, 1], dtype=np.int32)
    assert x.dot(weights).tolist() == [-4, -3]
    grads = jax.grad(lambda t: Ragged(t, x.layout).dot(weights).sum())(x.tiles)
    assert [row.tolist() for row in Ragged(grads, x.layout)] == [[0, 2], [0, 1]]


def test_the_last_axis_is_the_row_and_other_axes_are_refused():
    x = ragged([1, 2], [3])
    assert x.sum(-1).tolist() == [3, 3]
    assert x.mean(-1).tolist() == [1.5, 3]
    for wrong in (0, 1, [1.0], np.ones(2)):
        with pytest.raises(TypeError, match=r"x\.sum\(where=mask\)"):
            x.sum(wrong)
    with pytest.raises(TypeError, match="over the candidates of each token"):
        Ragged.from_rows(rows_of([2], trailing=(3,))).sum(-1)


def test_a_mask_is_a_weight_under_strict_promotion_too():
    x = Ragged.from_rows([np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)])
    with jax.numpy_dtype_promotion("strict"):
        assert x.dot(x > 1).tolist() == [2.0, 3.0]
        assert jax.jit(lambda x: x.dot(x > 1))(x).tolist() == [2.0, 3.0]


@settings(max_examples=examples(6))
@given(
    rows=st.lists(st.lists(st.floats(-9, 9, width=32), max_size=4), min_size=1, max_size=3),
    q=st.floats(0, 1, width=32),
    data=st.data(),
)
def test_a_quantile_is_numpys_of_all_that_counts(rows, q, data):
    arrays = [np.array(row, np.float32) for row in rows]
    masks = [np.array([data.draw(st.booleans()) for _ in row], bool) for row in rows]
    x, where = Ragged.from_rows(arrays), Ragged.from_rows(masks)
    for numbers, marked in ((np.concatenate(arrays), None), (masked(arrays, masks), where)):
        found = x.quantile(q, marked)
        if numbers.size:
            np.testing.assert_allclose(found, np.quantile(numbers, q), rtol=1e-5, atol=1e-5)
        else:
            assert np.isnan(found)


def masked(arrays, masks):
    return np.concatenate([row[mask] for row, mask in zip(arrays, masks, strict=True)])


def test_a_quantile_of_what_is_not_finite():
    x = Ragged.from_rows([np.array([1, np.inf], np.float32), np.array([np.inf], np.float32)])
    np.testing.assert_array_equal(
        x.quantile(np.array([0.0, 0.9, 1.0], np.float32)), [1, np.inf, np.inf]
    )
    assert np.isnan(Ragged.from_rows([np.array([1, np.nan], np.float32)]).quantile(0.0))
    assert Ragged.from_rows([np.array([1, 2])]).quantile(0.5) == 1.5


@pytest.mark.parametrize("q", [-0.1, 1.001, np.nan])
def test_a_quantile_outside_all_numbers_is_refused_or_nan(q):
    x = Ragged.from_rows([np.array([1, 2, 2], np.float32)])
    with pytest.raises(ValueError, match=r"of numbers in \[0, 1\]"):
        x.quantile([0.5, q])
    assert np.isnan(jax.jit(x.quantile)(q))
