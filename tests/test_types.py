import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mintjax import Datum, ModelInput, TensorData
from mintjax.errors import DataError
from mintjax.types import EncodedTextChunk


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


def test_what_was_computed_from_a_column_is_a_column_of_the_protocol():
    column = TensorData([1.0, -1.0])
    computed = {"mask": column > 0, "wide": column * np.ones(2)}
    datum = Datum(ModelInput.from_ints([1, 2]), computed)
    assert datum.loss_fn_inputs["mask"].dtype == "bool"  # travels as int64
    assert datum.loss_fn_inputs["wide"].dtype == "float32"


def test_a_datum_gives_columns_the_types_of_the_protocol():
    datum = Datum(
        ModelInput.from_ints(np.array([1, 2])),
        {
            "target_tokens": ModelInput.from_ints([2, 3]),
            "weights": [0, 1],
            "advantages": jnp.ones(2),
            "mine": [1, 2],
        },
    )
    types = {name: column.dtype.name for name, column in datum.loss_fn_inputs.items()}
    assert types == {
        "target_tokens": "int64",
        "weights": "float32",
        "advantages": "float32",
        "mine": "int64",
    }
    with pytest.raises(DataError, match=r"field 'target_tokens'.*0.5 is no integer"):
        Datum(ModelInput.from_ints([1]), {"target_tokens": [0.5]})


def test_model_input_refuses_what_are_no_tokens():
    assert ModelInput.from_ints(range(3)).to_ints() == [0, 1, 2]
    assert ModelInput([EncodedTextChunk([1]), EncodedTextChunk([2, 3])]).length == 3
    assert ModelInput.from_ints([]).length == 0
    for bad in ([[1]], [1.5], 3, ["a"]):
        with pytest.raises(DataError, match="model_input"):
            ModelInput.from_ints(bad)
    with pytest.raises(DataError, match="token -1 at position 1 is negative"):
        ModelInput.from_ints([1, -1])


@pytest.mark.parametrize("dtype", [None, "float32", "int64"])
def test_text_is_no_column_whatever_dtype_is_asked_for(dtype):
    with pytest.raises(DataError, match="a column must hold numbers, not "):
        TensorData(["1", "2"], dtype)
