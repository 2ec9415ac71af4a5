"""Compressed bodies: whole, and never larger than was agreed."""

from __future__ import annotations

import importlib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.errors import ConfigError, DataError
from mintjax.protocol import zstd


@given(st.lists(st.binary(max_size=1000), min_size=1, max_size=3))
def test_frames_are_unfolded_one_after_another(parts):
    body = b"".join(map(zstd.compress, parts))
    content = b"".join(parts)
    assert zstd.decompress(body, len(content)) == content
    if content:
        with pytest.raises(zstd.TooLargeError, match=f"larger than {len(content) - 1} bytes"):
            zstd.decompress(body, len(content) - 1)


def test_a_bomb_is_not_unfolded():
    bomb = zstd.compress(bytes(64 * 1024 * 1024))
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        with pytest.raises(zstd.TooLargeError):
            zstd.decompress(bomb, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@given(st.binary(min_size=1, max_size=500), st.data())
def test_a_body_that_was_cut_is_not_taken_for_less(content, data):
    body = zstd.compress(content)
    cut = body[: data.draw(st.integers(1, len(body) - 1))]
    with pytest.raises(DataError, match="ends within"):
        zstd.decompress(cut, 1000)


@given(st.binary(min_size=1, max_size=100).filter(lambda body: body[1:4] != b"\xb5\x2f\xfd"))
def test_garbage(body):
    with pytest.raises(DataError):
        zstd.decompress(body, 1000)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for call in (zstd.require, lambda: zstd.compress(b"")):
        with pytest.raises(ConfigError, match=r'pip install "mintjax\[protobuf\]"'):
            call()
