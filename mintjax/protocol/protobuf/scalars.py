"""Converts the numbers of messages, which are little-endian bytes of one of four dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4
_DTYPES = {
    FLOAT32: np.dtype("<f4"),
    INT64: np.dtype("<i8"),
    INT32: np.dtype("<i4"),
    BFLOAT16: "<u2",
}


def dtype_of(code: int, field: str | None = None) -> np.dtype[Any]:
    """Returns the NumPy dtype of a ``DType``; for bfloat16, which NumPy lacks, that of its bits.

    Raises:
        DataError: the code stands for no dtype.
    """
    if code not in _DTYPES:
        raise DataError(f"there is no dtype of number {code}", field=field)
    return np.dtype(_DTYPES[code])


def numbers(content: bytes | memoryview, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Views bytes as numbers, ``[N]``.

    Raises:
        DataError: the number of bytes is not a multiple of the dtype's size.
    """
    if len(content) % dtype.itemsize:
        raise DataError(
            f"{len(content)} bytes do not divide into numbers of {dtype.itemsize} bytes"
        )
    return np.frombuffer(content, dtype)


def widened(values: npt.NDArray[Any], code: int) -> npt.NDArray[Any]:
    """Converts bfloat16 to float32 and int32 to int64; others stay."""
    if code == BFLOAT16:  # the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<i8") if code == INT32 else values


def check_numbers(named: Mapping[str, float], field: str) -> None:
    """Checks that numbers are finite.

    Raises:
        DataError: one is NaN or infinite; the error names it.
    """
    for name, value in named.items():
        if not math.isfinite(value):
            raise DataError(f"{value} is not finite", field=f"{field}[{name!r}]")
