"""A datum holds columns as the protocol has them, from whatever they are made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mintjax
from mintjax import Datum, ModelInput, TensorData
from mintjax.errors import DataError
from mintjax.protocol import messages


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


@pytest.mark.parametrize("columns", [{"": [1]}, {1: [1], "1": [2]}])
def test_columns_have_names_of_their_own(columns):
    with pytest.raises(DataError, match="need different names"):
        Datum(ModelInput.from_ints([1]), columns)
