"""Numbers as the messages hold them: little-endian bytes in one of four dtypes."""

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
    """The dtype of a ``DType``; bfloat16, which NumPy does not have, as the bits.

    Raises:
        DataError: there is none of that number.
    """
    if code not in _DTYPES:
        raise DataError(f"there is no dtype of number {code}", field=field)
    return np.dtype(_DTYPES[code])


def numbers(content: bytes | memoryview, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers that some bytes are: a view of them, ``[N]``.

    Raises:
        DataError: they are not whole numbers of that size.
    """
    if len(content) % dtype.itemsize:
        raise DataError(f"{len(content)} bytes are no numbers of {dtype.itemsize} bytes each")
    return np.frombuffer(content, dtype)


def widened(values: npt.NDArray[Any], code: int) -> npt.NDArray[Any]:
    """The same numbers as float32 or int64, the two dtypes that are kept."""
    if code == BFLOAT16:  # the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<i8") if code == INT32 else values


def check_numbers(named: Mapping[str, float], field: str) -> None:
    """Refuse a NaN or an infinity among some numbers by name.

    Raises:
        DataError: there is one; names it.
    """
    for name, value in named.items():
        if not math.isfinite(value):
            raise DataError(f"{value} is not finite", field=f"{field}[{name!r}]")
