"""Rows of the same lengths meet token by token, wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mintjax
from mintjax import Datum, ModelInput, Ragged

from .data import assert_rows, ragged, rows_of


def test_arrays_of_other_layouts_are_brought_to_one():
    rows = rows_of([3, 5, 2, 5])
    x = Ragged.from_rows(rows)
    assert_rows(x[1:3] + Ragged.from_rows(rows[1:3]), [r + r for r in rows[1:3]])
    assert_rows(Ragged.from_rows(rows[1:3]) - x[1:3], [r - r for r in rows[1:3]])


def test_numbers_of_tokens_spread_over_candidates():
    rows = rows_of([3, 5])
    wide = [np.stack([row, 2 * row], axis=1) for row in rows]
    x, y = Ragged.from_rows(rows), Ragged.from_rows(wide)
    expected = [row[:, None] * both for row, both in zip(rows, wide, strict=True)]
    assert_rows(x * y, expected)
    assert_rows(y * x, expected)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_that_were_chosen_stand_beside_rows_that_were_made(wrap):
    rows = rows_of([3, 300, 5, 7, 9, 11, 2, 1, 1])  # as many tiles as the chosen ones alone take
    chosen = (Ragged.from_rows(rows) * 2)[1:4]
    made = (Ragged.from_rows(rows_of([300, 5, 7], seed=1) + rows_of([1] * 6)) * 1)[:3]
    add = wrap(lambda a, b: a + b)
    expected = [2 * a + b for a, b in zip(rows[1:4], rows_of([300, 5, 7], seed=1), strict=True)]
    for got in (add(chosen, made), add(made, chosen)):
        assert_rows(got, expected)


@pytest.mark.parametrize("sizes", [[3, 3, 5, 5], [1, 1, 300, 300, 128, 128]])
def test_two_slices_meet_row_by_row(sizes):
    """Compiled or not, though the rows of each stay where they were among those of the other."""

    def contrast(data, logprobs):
        return ((logprobs[0::2] - 2 * logprobs[1::2]) ** 2).total(), {}

    rows = rows_of(sizes)
    data = [Datum(ModelInput.from_ints(range(n)), {"target_tokens": np.arange(n)}) for n in sizes]
    result = mintjax.value_and_logprob_grads(contrast, data, rows)
    margins = [a - 2 * b for a, b in zip(rows[0::2], rows[1::2], strict=True)]
    assert result.loss == pytest.approx(sum((m**2).sum() for m in margins), rel=1e-5)
    expected = [grad for m in margins for grad in (2 * m, -4 * m)]
    for got, want in zip(result.grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    x = Ragged.from_rows(rows)
    assert_rows(x[0::2] - 2 * x[1::2], margins)


def test_rows_of_other_lengths_do_not_combine_in_a_compiled_program():
    few, many = (Ragged.from_rows(rows_of(sizes)) for sizes in ([3, 4], [3, 900]))
    with pytest.raises(ValueError, match="rows of different lengths do not combine"):
        jax.jit(lambda a, b: a + b)(few, many)


def test_rows_whose_traced_lengths_differ_are_nan_and_the_others_right():
    x, y = ragged([1, 2], [3, 4, 5]), ragged([10, 20], [30, 40])
    np.testing.assert_array_equal(jax.jit(lambda a, b: (a + b).sum())(x, y), [33, np.nan])
    np.testing.assert_array_equal(jax.jit(lambda a, b: a.sum(where=b != 0))(x, y), [3, np.nan])
    np.testing.assert_array_equal(jax.jit(lambda a, b: a.map(jnp.add, b).max())(x, y), [22, np.nan])
    with pytest.raises(TypeError, match="lengths of both Ragged are traced"):
        jax.jit(lambda a, b: a > b)(x, y)
    with pytest.raises(TypeError, match="lengths of both Ragged are traced"):
        jax.jit(lambda a, b: a.count(where=b != 0))(x, y)


def test_the_same_slice_of_two_columns_is_one_layout():
    def count(x):
        mask = x > 1
        return x[0::2].count(where=mask[0::2]), (x[0::2] > 2 * mask[0::2]).sum()

    counts, above = jax.jit(count)(ragged([1, 2], [3], [4, 0]))
    assert (counts.tolist(), above.tolist()) == ([1, 1], [1, 1])
