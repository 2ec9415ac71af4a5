"""Python's operators, in terms of one function of two operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self


class Operators:
    """Arithmetic, comparison and logic, number by number.

    What has it says in :meth:`_binary` what an operator does with another operand, and in
    :meth:`_unary` what one does alone.
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that `array * this` comes here
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def _unary(self, op: Callable[[Any], Any]) -> Self:
        raise NotImplementedError

    def _binary(self, other: Any, op: Callable[[Any, Any], Any]) -> Self:
        raise NotImplementedError

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "the truth of many numbers is ambiguous: instead of `x or y`, `not x`, `a < x < b` and "
            "`min(a, b)` write `x | y`, `~x`, `(a < x) & (x < b)` and `a.map(jnp.minimum, b)`; "
            "`len(x)` is the number of rows"
        )

    def __add__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a * b)

    def __rmul__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a / b)

    def __rtruediv__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: b / a)

    def __pow__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a**b)

    def __lt__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a < b)

    def __le__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a >= b)

    def __eq__(self, other: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._binary(other, lambda a, b: a == b)

    def __ne__(self, other: Any) -> Self:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._binary(other, lambda a, b: a != b)

    def __and__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a & b)

    def __or__(self, other: Any) -> Self:
        return self._binary(other, lambda a, b: a | b)

    def __invert__(self) -> Self:
        return self._unary(lambda a: ~a)

    def __neg__(self) -> Self:
        return self._unary(lambda a: -a)

    def __abs__(self) -> Self:
        return self._unary(abs)
