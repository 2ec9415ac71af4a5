"""Bytes as tokens."""

from hypothesis import given
from hypothesis import strategies as st

from mintjax.local import tokenizer


@given(st.text())
def test_text_survives(text):
    tokens = tokenizer.encode(text)
    assert all(0 <= token < 256 for token in tokens)
    assert tokenizer.decode([tokenizer.BEGIN, *tokens, tokenizer.END]) == text


def test_what_is_no_text_shows():
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
