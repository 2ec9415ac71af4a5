"""A model input counts its tokens, and refuses what has none."""

import pytest

from mintjax import ModelInput
from mintjax.errors import DataError
from mintjax.protocol import messages
from mintjax.types import EncodedTextChunk, ImageChunk


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
        ((b"1", "png", "3"), "expected_tokens is '3'"),
        ((b"1", "png", 2.5), "expected_tokens is 2.5"),
        ((b"1", "png", True), "expected_tokens is True"),
    ],
)
def test_what_is_no_image_is_refused(given, why):
    with pytest.raises(DataError, match=why):
        ImageChunk(*given)
