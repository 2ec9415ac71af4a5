"""Compresses and decompresses bodies with Zstandard, for ``Content-Encoding: zstd``."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from mintjax.errors import ConfigError, DataError

_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


class TooLargeError(DataError):
    """The content of a compressed body is larger than the limit."""


def require() -> None:
    """Checks that a Zstandard package is installed.

    Raises:
        ConfigError: none is; the message says how to install one.
    """
    _zstd()


def compress(body: bytes) -> bytes:
    """Compresses a body at Zstandard's default level.

    Raises:
        ConfigError: the extra ``protobuf`` is not installed.
    """
    return _zstd().compress(body)


def decompress(body: bytes, limit: int) -> bytes:
    """Decompresses a body, and stops as soon as the content is larger than the limit.

    Args:
        body: one or more whole frames.
        limit: the largest content to accept, in bytes.

    Raises:
        TooLargeError: the content is larger than that.
        DataError: the body is not Zstandard, or it is not complete.
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
            raise DataError(f"the body is not Zstandard: {error}") from None
        room -= len(part)
        if room < 0:
            raise TooLargeError(f"the body is larger than {limit} bytes when it is decompressed")
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
    raise ConfigError(f'Zstandard needs {_MODULE}: pip install "mintjax[protobuf]"')
