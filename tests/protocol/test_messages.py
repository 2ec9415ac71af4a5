"""JSON: to the bit, in the shortest text, and never what JSON does not have."""

from __future__ import annotations

import json
import tracemalloc

import hypothesis.extra.numpy as hnp
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mintjax.errors import DataError, NonFiniteError
from mintjax.protocol import messages
from mintjax.tensors import TensorData
from mintjax.types import Datum, ForwardBackwardOutput, ModelInput

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
tensors = hnp.arrays(np.float32, shapes, elements=finite) | hnp.arrays(
    np.int64, shapes, elements=integers
)


@given(st.lists(st.integers(0, 10**6), max_size=20), tensors)
def test_what_is_encoded_is_decoded_to_the_bit(tokens, column):
    datum = Datum(ModelInput.from_ints(tokens), {"mine": column})
    message = messages.ForwardBackwardInput([datum], "cross_entropy", {"beta": 0.1})
    back = messages.decode(messages.encode(message), messages.ForwardBackwardInput)
    assert back.data[0].model_input == datum.model_input
    got = back.data[0].loss_fn_inputs["mine"]
    assert (got.dtype, got.shape) == (column.dtype, column.shape)
    assert got.tobytes() == column.tobytes()
    assert back.loss_fn_config == {"beta": 0.1}


def test_no_float32_is_rounded_twice():
    column = np.float32([1.0, 11_420_669 * 2.0**-107, -11_420_669 * 2.0**-107])
    numbers = json.loads(messages.encode(TensorData(column)))["data"]
    assert np.float32(numbers).tobytes() == column.tobytes()
    assert str(column[1]) == "7.038531e-26"
    assert np.float32(7.038531e-26) != column[1]


@given(finite)
@example(np.float32(0.1))
@example(np.finfo(np.float32).max)
@example(np.finfo(np.float32).smallest_subnormal)
@example(-0.0)
def test_a_float32_is_written_in_the_fewest_digits_that_tell_it(value):
    text = json.loads(messages.encode(TensorData([value])), parse_float=str)["data"][0]
    digits = text.lower().partition("e")[0].replace(".", "").strip("-0")
    fewest = np.format_float_scientific(np.float32(value), unique=True, trim="-")
    assert len(digits) == len(fewest.partition("e")[0].replace(".", "").strip("-0"))
    assert np.float32(text) == np.float32(value)


@pytest.mark.parametrize(
    "view", [lambda x: x[::2], lambda x: x.T, lambda x: x[:, 1:], lambda x: x[0, 0], np.flip]
)
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_views_are_written_in_the_order_of_their_rows(view, dtype):
    array = view(np.arange(12, dtype=dtype).reshape(4, 3))
    sent = json.loads(messages.encode(TensorData(array)))
    name = np.dtype(dtype).name
    assert sent == {"data": array.ravel().tolist(), "dtype": name, "shape": list(array.shape)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_what_json_cannot_say_is_refused(bad):
    with pytest.raises(NonFiniteError, match=r"at position 3 of a tensor") as caught:
        messages.encode(TensorData([[0.0, 1.0], [2.0, bad]]))
    assert caught.value.position == 3
    with pytest.raises(TypeError, match="cannot encode complex"):
        messages.encode(1j)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (b"3", "Expected `object`"),
        (b'{"data": 3, "dtype": "float32"}', "Expected `array`, got `int`"),
        (b'{"dtype": "float32"}', "Expected `array`, got `null`"),
        (b'{"data": [1, "a"], "dtype": "float32"}', r"`float`, got `str` - at `\$\[1\]` of data"),
        (b'{"data": [0.5, true], "dtype": "float32"}', r"`float`, got `bool` - at `\$\[1\]`"),
        (b'{"data": [false, 0.5], "dtype": "float32"}', r"`float`, got `bool` - at `\$\[0\]`"),
        (b'{"data": {}, "dtype": "float32"}', "Expected `array`, got `object`"),
        (b'{"data": [1, true, "a"], "dtype": "int64"}', r"got `bool` - at `\$\[1\]` of data"),
        (b'{"data": [1, null], "dtype": "float32"}', "of data; null is what"),
        (b'{"data": [[1], 2], "dtype": "int64"}', "got `array`"),
        (b'{"data": [1], "dtype": "float16"}', "float16"),
        (b'{"data": [1]}', "missing required field `dtype`"),
        (b'{"data": [1, 2], "dtype": "int64", "shape": [3]}', "do not fill"),
        (b'{"data": [1, 2], "dtype": "int64", "shape": [-1]}', ">= 0"),
        (b'{"data": [], "dtype": "int64", "shape": [%d, 0]}' % 2**70, "shape"),
        (b'{"data": [1.5], "dtype": "int64"}', "no integer"),
        (b'{"data": [9007199254740993.0], "dtype": "int64"}', "no integer"),
        (b'{"data": [9223372036854775808], "dtype": "int64"}', "beyond int64"),
        (b'{"data": [-9223372036854775809, 0.0], "dtype": "int64"}', "no integer"),
        (b'{"data": [1%s], "dtype": "float32"}' % (b"0" * 400), "out of range"),
    ],
)
def test_a_bad_tensor_is_named_by_its_place(tensor, message):
    datum = b'{"model_input": {"chunks": []}, "loss_fn_inputs": {"w": %s}}'
    body = b'{"loss_fn": "ppo", "data": [' + datum + b"]}"
    with pytest.raises(DataError, match=rf"{message}.*\$\.data\[0\]\.loss_fn_inputs"):
        messages.decode(body % tensor, messages.ForwardBackwardInput)


def test_integers_may_come_as_floats_and_the_reverse():
    whole = messages.decode(b'{"data": [1, 2.0, -3e2], "dtype": "int64"}', TensorData)
    np.testing.assert_array_equal(whole, [1, 2, -300])
    assert whole.dtype == np.int64
    mixed = messages.decode(b'{"data": [1, 0.1, 16777217], "dtype": "float32"}', TensorData)
    np.testing.assert_array_equal(mixed, np.float32([1, 0.1, 16777217]))


@given(st.binary(max_size=40))
def test_bytes_that_are_no_message_are_a_data_error(body):
    with pytest.raises(DataError, match="not a ForwardBackwardInput"):
        messages.decode(body, messages.ForwardBackwardInput)
    with pytest.raises(DataError):
        messages.decode(b"[" * 100_000, messages.ForwardBackwardInput)


@pytest.fixture(scope="module")
def wide_data():
    rng = np.random.default_rng(0)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 150_000, 1024)),
            {
                "target_tokens": rng.integers(0, 150_000, 1024),
                "weights": rng.standard_normal(1024),
            },
        )
        for _ in range(64)
    ]


def peak(function):
    """What ``function()`` returns, and how many bytes it had in use at most."""
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_direction_takes_three_times_the_body(wide_data):
    message = messages.ForwardBackwardInput(wide_data, "cross_entropy")
    body, used = peak(lambda: messages.encode(message))
    assert used <= 3 * len(body)
    outputs = [{"logprobs": datum.loss_fn_inputs["weights"]} for datum in wide_data]
    body = messages.encode(ForwardBackwardOutput(loss_fn_outputs=outputs))
    back, used = peak(lambda: messages.decode(body, ForwardBackwardOutput))
    assert used <= 3 * len(body)
    np.testing.assert_array_equal(back.logprobs, [o["logprobs"] for o in outputs])


def test_a_fragment_is_sent_as_it_is():
    assert messages.encode({"data": msgspec.Raw(b"[1]")}) == b'{"data":[1]}'


def test_a_type_that_json_does_not_have_is_named():
    with pytest.raises(DataError, match="not a complex: cannot decode complex"):
        messages.decode(b"1", complex)


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(DataError, match="a text cannot be sent"):
        messages.encode(messages.ModelRequest("\ud800", "get_info"))
