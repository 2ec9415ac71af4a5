import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mintjax
from mintjax import Datum, ModelInput, TensorData
from mintjax.errors import DataError
from mintjax.protocol import messages
from mintjax.types import EncodedTextChunk, ImageChunk


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


def test_an_image_counts_as_the_tokens_that_are_expected_of_it():
    image = ImageChunk(b"bytes", "png", expected_tokens=3)
    both = ModelInput.from_ints([1, 2]).append(image).append_int(4)
    assert both.length == 6
    assert ImageChunk("Ynl0ZXM=", "png", 3) == image
    assert messages.decode(messages.encode(both), ModelInput) == both
    assert messages.decode(b'{"chunks": [{"tokens": [1]}]}', ModelInput) == ModelInput.from_ints(
        [1]
    )
    assert "bytes" not in repr(both).replace("<5 bytes>", "")
    with pytest.raises(DataError, match="an image: it has no token ids"):
        both.to_ints()
    with pytest.raises(DataError, match="set expected_tokens"):
        _ = ModelInput([ImageChunk(b"bytes", "png")]).length


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((b"", "png"), "bytes of a file"),
        (([1, 2], "png"), "bytes of a file"),
        (("?", "png"), "not base64"),
        ((b"1", "gif"), "'gif' is neither 'png' nor 'jpeg'"),
        ((b"1", "png", 0), "expected_tokens is 0"),
    ],
)
def test_what_is_no_image_is_refused(given, why):
    with pytest.raises(DataError, match=why):
        ImageChunk(*given)


@pytest.mark.parametrize("dtype", [None, "float32", "int64"])
def test_text_is_no_column_whatever_dtype_is_asked_for(dtype):
    with pytest.raises(DataError, match="a column must hold numbers, not "):
        TensorData(["1", "2"], dtype)


TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@given(prompt=TOKENS, answer=TOKENS, number=st.floats(-9, 9, width=32), whole=st.booleans())
def test_a_datum_of_prompt_and_answer_is_that_written_by_hand(prompt, answer, number, whole):
    tokens, before = prompt + answer, len(prompt) - 1
    entries = [number * (i + 1) for i in range(len(tokens) - 1 if whole else len(answer))]
    made = mintjax.datum(
        prompt, np.array(answer), advantages=number, x=entries, mask=True, per_datum={"r": number}
    )
    by_hand = Datum(
        ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "weights": [0.0] * before + [1.0] * len(answer),
            "advantages": [0.0] * before + [number] * len(answer),
            "x": [0.0] * (len(tokens) - 1 - len(entries)) + entries,
            "mask": [False] * before + [True] * len(answer),
            "r": number,
        },
    )
    assert messages.encode(made) == messages.encode(by_hand)
    assert made.loss_fn_inputs["mask"].dtype == bool


def test_a_datum_refuses_text_and_columns_of_another_length():
    with pytest.raises(DataError, match=r"field 'prompt': it is text; pass the token ids"):
        mintjax.datum("Zürich? ", [1])
    with pytest.raises(DataError, match=r"field 'answer': it has no token"):
        mintjax.datum([1], [])
    with pytest.raises(DataError, match=r"field 'logprobs': 2 entries for an answer of 3 tokens"):
        mintjax.datum([1, 2, 3], [1, 2, 3], logprobs=[0.0, 0.0])
    with pytest.raises(DataError, match=r"field 'prompt': tokens must be .* not float64"):
        mintjax.datum([1.5], [1])
    with pytest.raises(DataError, match=r"field 'target_tokens': the targets are the tokens"):
        mintjax.datum([1, 2], [3], target_tokens=[4])
    with pytest.raises(DataError, match=r"field 'weights': it has a number for each token"):
        mintjax.datum([1, 2], [3], per_datum={"weights": 0.5})
    with pytest.raises(DataError, match=r"field 'reward': shape \[2\], where it is one number"):
        mintjax.datum([1, 2], [3], per_datum={"reward": [1, 2]})
    pairs = mintjax.datum([1], [2, 3], teacher=np.ones((2, 5)))
    assert pairs.loss_fn_inputs["teacher"].shape == (2, 5)


def test_a_column_is_added_and_the_rest_is_shared():
    data = [mintjax.datum([1, 2], [3]), mintjax.datum([1], [2])]
    rows = [np.array([-1, -2], np.float32), np.array([-3], np.float32)]
    made = mintjax.with_column(data, "ref_logprobs", rows)
    for before, after, row in zip(data, made, rows, strict=True):
        assert "ref_logprobs" not in before.loss_fn_inputs
        np.testing.assert_array_equal(after.loss_fn_inputs["ref_logprobs"], row)
        assert after.loss_fn_inputs["weights"] is before.loss_fn_inputs["weights"]
        assert after.model_input is before.model_input
    ragged = mintjax.with_column(mintjax.Batch(data), "x", mintjax.Ragged.from_rows(rows))
    np.testing.assert_array_equal(ragged[1].loss_fn_inputs["x"], rows[1])
    rewards = mintjax.with_column(data, "reward", [1, 0.5])
    np.testing.assert_array_equal(mintjax.Batch(rewards)["reward"], [1, 0.5])
    with pytest.raises(DataError, match=r"field 'x': 1 rows for 2 datums"):
        mintjax.with_column(data, "x", rows[:1])
    with pytest.raises(DataError, match=r"datum 1, field 'x': shape \[2\] does not fit"):
        mintjax.with_column(data, "x", [rows[0], rows[0]])
    with pytest.raises(DataError, match=r"datum 0, field 'x': .* not None, such as a sampler"):
        mintjax.with_column(data, "x", [[None, -1.0], [-2.0]])
    for rows_of_none in ({0: 1, 1: 2}, 0.5):
        with pytest.raises(DataError, match=r"field 'x': it needs one row for each datum"):
            mintjax.with_column(data, "x", rows_of_none)


def _deleted():
    array = jnp.ones(2)
    array.delete()
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: np.ma.array([1.0, 2.0], mask=[0, 1]), "masked array hides.*filled"),
        (_deleted, "NumPy cannot hold this: .*deleted"),
        (lambda: jax.random.key(0), "NumPy cannot hold this: .*key"),
    ],
)
def test_numbers_that_cannot_be_seen_are_refused(make, message):
    with pytest.raises(DataError, match=f"field 'weights': .*{message}"):
        Datum(ModelInput.from_ints([1, 2]), {"weights": make()})


def test_a_traced_column_is_refused():
    with pytest.raises(DataError, match=r"NumPy cannot hold this: .*traced"):
        jax.jit(lambda x: Datum(ModelInput.from_ints([1, 2]), {"weights": x}))(np.ones(2))


def test_a_masked_array_that_hides_nothing_is_taken():
    given = np.ma.array([1.0, 2.0])
    assert TensorData(given).tolist() == [1, 2]


@pytest.mark.parametrize("columns", [{"": [1]}, {1: [1], "1": [2]}])
def test_columns_have_names_of_their_own(columns):
    with pytest.raises(DataError, match="need different names"):
        Datum(ModelInput.from_ints([1]), columns)
