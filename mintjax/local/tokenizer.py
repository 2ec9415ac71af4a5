"""The embedded trainer's tokens: the 256 bytes of UTF-8, then a few that are no byte."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

TOKENIZER_ID = "mintjax/bytes"
"""The end of what ``get_info`` calls these tokens. All of it is a folder on the trainer's machine,
from which transformers reads them there; elsewhere it is no name, which transformers says at once.
"""

BEGIN = 256
"""Begins a text."""

END = 257
"""Ends a text; sampling stops after it."""

VOCAB_SIZE = 258
"""Token ids are 0 up to, and without, this."""


def encode(text: str) -> list[int]:
    """Encodes ``text`` in UTF-8, a token id per byte; without :data:`BEGIN` and :data:`END`."""
    return list(text.encode())


def transformers_files() -> Mapping[str, bytes]:
    """Makes the files, by name, that ``transformers.AutoTokenizer`` reads this tokenizer from."""
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = [
        {"id": token, "content": text, "special": True, **special}
        for token, text in ((BEGIN, "<begin>"), (END, "<end>"))
    ]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    vocabulary = {character: byte for byte, character in enumerate(_characters())}
    model: dict[str, Any] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    fast = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**by_bytes, "use_regex": False},
        "post_processor": None,
        "decoder": {**by_bytes, "use_regex": False},
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<begin>",
        "eos_token": "<end>",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # a text that says "<end>" does not end
    }
    files = {"tokenizer.json": fast, "tokenizer_config.json": settings}
    return {name: json.dumps(content).encode() for name, content in files.items()}


def _characters() -> list[str]:
    """Lists the characters that stand for the bytes in such files, as GPT-2 has them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(0x100)]


def to_bytes(tokens: Iterable[int]) -> bytes:
    """Returns the bytes among ``tokens``."""
    return bytes(token for token in tokens if token < 256)


def decode(tokens: Iterable[int]) -> str:
    """Decodes the text of ``tokens``; bytes that are no UTF-8 show as U+FFFD."""
    return to_bytes(tokens).decode(errors="replace")
