"""The embedded trainer's tokens: the 256 bytes of UTF-8, then a few that are no byte."""

from __future__ import annotations

from collections.abc import Iterable

TOKENIZER_ID = "mintjax/bytes"
"""What ``get_info`` calls these tokens."""

BEGIN = 256
"""Begins a text."""

END = 257
"""Ends a text; sampling stops after it."""

VOCAB_SIZE = 258
"""Token ids are 0 up to, and without, this."""


def encode(text: str) -> list[int]:
    """The bytes of ``text`` in UTF-8, as token ids; no :data:`BEGIN`, no :data:`END`."""
    return list(text.encode())


def to_bytes(tokens: Iterable[int]) -> bytes:
    """The bytes among ``tokens``."""
    return bytes(token for token in tokens if token < 256)


def decode(tokens: Iterable[int]) -> str:
    """The text of ``tokens``; bytes that are no UTF-8 show as U+FFFD."""
    return to_bytes(tokens).decode(errors="replace")
