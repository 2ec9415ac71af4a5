"""The lengths of rows in a program that is evaluated by groups: as texts, and as numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mintjax.gradients.flat import SIZE_FUNCTIONS, is_symbolic, size_code, size_of

Rows: TypeAlias = tuple[int, ...]

FIXED, MIXED = -1, -2
"""These stand in the place of a row's number where there is none, and where there are several."""


class Text(str):
    """A size in the length ``n`` of a row, such as ``n - 1``."""

    __slots__ = ()


class Cuts(NamedTuple):
    """The places of values of several lengths that lie one after the other.

    Args:
        lengths: of each.
        at: where each begins, and the end of the last.
        places: the same as an array.
    """

    lengths: npt.NDArray[np.int64]
    at: list[int]
    places: npt.NDArray[np.int64]


class Sizes:
    """The lengths of a batch's rows, and what follows from them, each computed once."""

    def __init__(self, lengths: npt.NDArray[np.int64]) -> None:
        self._lengths = lengths
        self._sizes: dict[str, npt.NDArray[np.int64]] = {"n": lengths}
        self._cuts: dict[Any, Cuts] = {}
        self._ones: dict[str, int] = {}

    def one(self, text: str) -> int:
        """Computes a size that names its rows, such as ``n0 + n1``."""
        if text not in self._ones:
            symbols = {f"n{row}": int(self._lengths[int(row)]) for row in _SYMBOL.findall(text)}
            self._ones[text] = size_of(text, symbols)
        return self._ones[text]

    def of(self, text: str) -> npt.NDArray[np.int64]:
        """Computes a size for every row."""
        if text not in self._sizes:
            size = eval(size_code(text), _OF_ARRAYS, {"n": self._lengths})
            self._sizes[text] = size
        return self._sizes[text]

    def cuts(self, rows: Rows, text: str) -> Cuts:
        """Lays values of some rows one after the other."""
        key = (rows, text)
        if key not in self._cuts:
            lengths = self.of(text)[list(rows)]
            places = np.concatenate([[0], np.cumsum(lengths)])
            self._cuts[key] = Cuts(lengths, places.tolist(), places)
        return self._cuts[key]


_OF_ARRAYS = {**SIZE_FUNCTIONS, "max": np.maximum, "min": np.minimum}
_SYMBOL = re.compile(r"\bn(\d+)\b")


def join_rows(a: int, b: int) -> int:
    """Returns the row of two things, given that of each."""
    if a == b or b == FIXED:
        return a
    return b if a == FIXED else MIXED


def without_row(value: Any) -> tuple[int, Any]:
    """Takes the row out of a parameter or a shape.

    Returns:
        The row whose length stands in it, and the same with sizes as texts in ``n``.
    """
    if type(value) is tuple:
        row, items = FIXED, list[Any]()
        for item in cast("tuple[Any, ...]", value):
            own, blank = without_row(item)
            row = join_rows(row, own)
            items.append(blank)
        return row, tuple(items)
    if isinstance(value, np.integer):
        return FIXED, int(cast("int", value))
    if not is_symbolic(value):
        return FIXED, value
    text = str(value)
    symbols = set(_SYMBOL.findall(text))
    row = int(symbols.pop()) if len(symbols) == 1 else MIXED
    return row, Text(_SYMBOL.sub("n", text) if row >= 0 else text)


def filled(value: Any, size: Callable[[str], int]) -> Any:
    """Puts numbers in the place of symbolic sizes, in a parameter of an operation.

    Args:
        value: the parameter, as :func:`without_row` gives it: tuples are looked into.
        size: gives the number that a size's text stands for.
    """
    if type(value) is Text:
        return size(value)
    if type(value) is tuple:
        return tuple([filled(item, size) for item in cast("tuple[Any, ...]", value)])
    return value


def has_text(value: Any) -> bool:
    """Tells whether a parameter holds a symbolic size, which :func:`filled` would replace."""
    if type(value) is tuple:
        return any(map(has_text, cast("tuple[Any, ...]", value)))
    return type(value) is Text
