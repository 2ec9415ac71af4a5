import numpy as np
import pytest

from mintjax import Datum, ModelInput
from mintjax.errors import DataError
from mintjax.ragged.checks import check_data

from .test_batch import datum


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no datum; pass at least one"),
        ([datum(0)], "datum 0, field 'model_input': it has no token"),
        (
            [datum(2), Datum(ModelInput.from_ints([1]), {})],
            "datum 1, field 'target_tokens': it is needed, but this datum has only: nothing. "
            "Add it to loss_fn_inputs of every datum: one number per token, "
            "or a single number per datum",
        ),
        (
            [datum(2), datum(3, weights=np.ones(4))],
            r"datum 1, field 'weights': shape \[4\] does not fit the model input of 3 tokens",
        ),
        ([datum(2, weights=np.ones((2, 2))), datum(2)], r"datum 1.*shape \[2\], where datum 0 has"),
        (
            [datum(2), datum(3, weights=[1, np.nan, 1])],
            "datum 1, field 'weights': nan at position 1 is not finite",
        ),
        ([datum(2, advantages=[1, np.inf])], "field 'advantages': inf at position 1"),
        ([datum(2), datum(2, logprobs=[1, -np.inf])], "datum 1, field 'logprobs': -inf at pos"),
        ([datum(2, weights=[1e39, 0])], "field 'weights': inf at position 0"),
        (
            [datum(3), datum(3, target_tokens=[1, 2, -5])],
            "datum 1, field 'target_tokens': -5 at position 2 is negative",
        ),
        ([datum(3, target_tokens=[0, 1, 9])], "9 at position 2 is outside the vocabulary of 8"),
        ([datum(9)], "field 'model_input': token 8 at position 8 is outside the vocabulary of 8"),
        ([datum(3, reward=2.0)], "field 'reward': a single number cannot travel"),
    ],
)
def test_bad_data_is_named_by_datum_and_field(data, message):
    with pytest.raises(DataError, match=message) as caught:
        check_data(data, vocab_size=8)
    assert isinstance(caught.value, ValueError)


def test_only_what_travels_is_checked():
    data = [datum(2, logprobs=[np.nan, 1], advantages=[1.0], reward=1.0)]
    batch = check_data(data, ["target_tokens", "weights"])
    assert list(batch) == data
    assert check_data(batch, ["weights"]) is batch


def test_whole_numbers_of_ones_own_are_as_they_are():
    assert len(check_data([datum(2, group=np.array([-1, 9]))], vocab_size=8)) == 1


def test_what_a_loss_requires_is_checked():
    with pytest.raises(DataError, match="datum 0, field 'advantages': it is needed"):
        check_data([datum(2)], required=("target_tokens", "advantages"))


def test_targets_outside_the_vocabulary_are_named():
    data = [datum(3), datum(4, target_tokens=[1, 2, 300, 0])]
    with pytest.raises(DataError, match="datum 1, field 'target_tokens': 300 at position 2 is out"):
        check_data(data, vocab_size=256)
