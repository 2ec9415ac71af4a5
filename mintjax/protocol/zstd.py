"""Bodies compressed with Zstandard, as ``Content-Encoding: zstd`` has them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from mintjax.errors import ConfigError, DataError

_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


class TooLargeError(DataError):
    """A compressed body unfolds to more than the limit."""


def require() -> None:
    """Make sure that there is what it takes.

    Raises:
        ConfigError: the extra is not installed; the message says how to install it.
    """
    _zstd()


def compress(body: bytes) -> bytes:
    """Compress, at Zstandard's default level.

    Raises:
        ConfigError: the extra ``protobuf`` is not installed.
    """
    return _zstd().compress(body)


def decompress(body: bytes, limit: int) -> bytes:
    """The content of a compressed body, of which no more than the limit is ever unfolded.

    Args:
        body: one or more whole frames.
        limit: the largest content to accept, in bytes.

    Raises:
        TooLargeError: the content is larger than that.
        DataError: the body is not compressed so, or not complete.
        ConfigError: the extra ``protobuf`` is not installed.
    """
    zstd = _zstd()
    parts: list[bytes] = []
    room = limit
    while body:
        frame = zstd.ZstdDecompressor()
        try:
            part = frame.decompress(body, max_length=room + 1)
        except zstd.ZstdError as error:
            raise DataError(f"the body is no Zstandard: {error}") from None
        room -= len(part)
        if room < 0:
            raise TooLargeError(f"the body unfolds to more than {limit} bytes")
        if not frame.eof:
            raise DataError("the body ends within a Zstandard frame")
        parts.append(part)
        body = frame.unused_data
    return b"".join(parts)


def _zstd() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ModuleNotFoundError:
        pass
    raise ConfigError(f'Zstandard needs {_MODULE}, of: pip install "mintjax[protobuf]"')
