"""A tensor takes numbers of any kind, and says which of them is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mintjax import TensorData
from mintjax.errors import DataError
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


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ([0.5, 1.0], "float32"),
        ([1, 2], "int64"),
        ([True, False], "bool"),
        (np.ones(2), "float32"),
        (np.ones(2, np.int32), "int64"),
        (jnp.ones(2, jnp.bfloat16), "float32"),
        ([], "float32"),
    ],
)
def test_tensor_data_takes_numbers_of_any_kind(given, dtype):
    tensor = TensorData(given)
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor, np.asarray(given, dtype))
    assert tensor.data == np.asarray(given, dtype).tolist()
    assert type(tensor.to_numpy()) is np.ndarray


def test_tensor_data_is_an_array_for_jax():
    tensor = TensorData([1.0, 2.0])
    assert jnp.dot(jnp.ones(2), tensor) == 3
    assert isinstance(tensor * jnp.ones(2), jnp.ndarray)
    assert TensorData([1, 2, 3, 4], "float32", [2, 2]).shape == (2, 2)


def test_tensor_data_from_numpy_shares_memory():
    array = np.ones(3, np.float32)
    assert np.shares_memory(TensorData.from_numpy(array), array)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"],), "must hold numbers, not str"),
        (([[1], [1, 2]],), "this nested list is ragged"),
        (([1.5], "int64"), "1.5 is no integer"),
        (([np.nan], "int64"), "nan is no integer"),
        (([2.0**53], "int64"), "is no integer"),
        (([2**63], "int64"), "beyond int64"),
        (([1], "float64"), "dtype must be 'float32' or 'int64'"),
        (([1, 2, 3], "int64", [2, 2]), r"3 numbers do not fill the shape \[2, 2\]"),
        (([1j],), "must hold numbers, not complex128"),
        (([None, -1.0],), "must hold numbers, not None"),
        ((jax.random.key(0),), "NumPy cannot hold this: JAX array with PRNGKey"),
    ],
)
def test_tensor_data_says_what_it_cannot_hold(arguments, message):
    with pytest.raises(DataError, match=message):
        TensorData(*arguments)


@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(1, 5), st.integers(1, 5)), elements=st.integers(0, 2)
    )
)
def test_sparse_data_is_made_dense(dense):
    rows, columns = np.nonzero(dense)
    pointers = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    tensor = TensorData(dense[rows, columns], "int64", dense.shape, pointers, columns)
    np.testing.assert_array_equal(tensor, dense)


@pytest.mark.parametrize(
    ("crow", "col", "shape"),
    [
        ([0, 1], None, [1, 2]),
        ([0, 1], [0], None),
        ([0, 2], [0], [1, 2]),
        ([1, 1], [0], [1, 2]),
        ([0, 1], [2], [1, 2]),
        ([0, 1], [-1], [1, 2]),
        ([0, 1, 0], [0], [2, 2]),
        ([0, 1, 1], [0], [1, 2]),
        ([0, 1], [0], [1, 2**40]),
    ],
)
def test_sparse_indices_that_describe_no_matrix_are_refused(crow, col, shape):
    with pytest.raises(DataError, match="sparse"):
        TensorData([1.0], "float32", shape, crow, col)


def test_columns_of_a_sparse_matrix_must_rise():
    with pytest.raises(DataError, match="rise within each row"):
        TensorData([1.0, 2.0], "float32", [1, 2], [0, 2], [1, 1])
    with pytest.raises(DataError, match="rise within each row"):
        TensorData([1.0, 2.0], "float32", [1, 2], [0, 2], [1, 0])


@pytest.mark.parametrize("dtype", [None, "float32", "int64"])
def test_text_is_no_column_whatever_dtype_is_asked_for(dtype):
    with pytest.raises(DataError, match="a column must hold numbers, not "):
        TensorData(["1", "2"], dtype)


def test_a_masked_array_that_hides_nothing_is_taken():
    given = np.ma.array([1.0, 2.0])
    assert TensorData(given).tolist() == [1, 2]
