"""Which number of which row is not finite, wherever the rows lie."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.tensors import first_row_not_finite

BAD = [np.nan, np.inf, -np.inf]


def apart(sizes):
    return [np.zeros(n, np.float32) for n in sizes]


def of_one_buffer(sizes):
    return np.split(np.zeros(sum(sizes), np.float32), np.cumsum(sizes)[:-1])


def of_bytes(sizes):
    """Views of memory that holds, as far as it knows, small integers."""
    raw = np.zeros(4 * sum(sizes), np.uint8)
    return np.split(raw.view(np.float32), np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("make", [apart, of_one_buffer, of_bytes])
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(sum), data=st.data())
def test_the_first_one_is_found(make, sizes, data):
    rows = make(sizes)
    assert first_row_not_finite(rows) is None
    places = [(i, j) for i, n in enumerate(sizes) for j in range(n)]
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=1))
    for i, j in chosen:
        rows[i][j] = data.draw(st.sampled_from(BAD))
    assert first_row_not_finite(rows) == min(chosen)


def test_what_lies_beside_the_rows_is_not_theirs():
    whole = np.array([1.0, np.nan, 2.0])
    assert first_row_not_finite([whole[:1], whole[2:]]) is None


def test_integers_and_rows_of_several_axes():
    rows = [np.zeros((2, 2), np.float32), np.zeros((1, 2), np.float32)]
    rows[1][0, 1] = np.nan
    assert first_row_not_finite(rows) == (1, 1)
    assert first_row_not_finite([np.arange(3), np.arange(2)]) is None
