"""Bytes as tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.local import tokenizer


@given(st.text())
def test_text_survives(text):
    tokens = tokenizer.encode(text)
    assert all(0 <= token < 256 for token in tokens)
    assert tokenizer.decode([tokenizer.BEGIN, *tokens, tokenizer.END]) == text


@pytest.fixture(scope="module")
def of_transformers(engine):
    """The tokenizer as transformers reads it, without asking any hub."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    return transformers.AutoTokenizer.from_pretrained(engine.store.tokenizer_folder().as_posix())


@given(text=st.lists(st.text() | st.sampled_from(["<begin>", "<end>"])).map("".join))
def test_transformers_reads_the_same_tokens(of_transformers, text):
    tokens = tokenizer.encode(text)
    assert of_transformers.encode(text) == tokens
    assert of_transformers.decode(tokens) == text
    assert of_transformers.decode([tokenizer.BEGIN, *tokens], skip_special_tokens=True) == text


def test_transformers_knows_the_begin_and_the_end(of_transformers):
    assert of_transformers.bos_token_id == tokenizer.BEGIN
    assert of_transformers.eos_token_id == tokenizer.END
    assert len(of_transformers) == tokenizer.VOCAB_SIZE


def test_what_is_no_text_shows():
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
