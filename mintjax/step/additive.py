"""Tells how the results of a program are made of what it computes for each datum.

A program over B datums whose number is a symbol is looked at, operation by operation. Its arrays
have at most one axis of datums. What treats the datums alike along that axis computes something of
each; a sum over the axis is a sum over datums, and so is what is linear in such sums. This is shown
for every B at once, because no operation may ask for B or for the place of a datum, but for a mean,
which divides by B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from mintjax.gradients.flat import Equation, Flat, is_symbolic
from mintjax.step.server_loss import POINTWISE, RESHAPING


class Other(NamedTuple):
    """A result is made of the datums in another way.

    Args:
        why: the operation by which.
    """

    why: str


Way: TypeAlias = Literal["constant", "each", "sum", "mean", "count"] | Other
"""``"each"``: an array with an axis of datums, of which each alone makes its part. ``"count"``: the
number of datums."""


def ways(flat: Flat, datums: str) -> list[Way]:
    """Finds for each output of a program how it is made of the datums.

    Args:
        flat: the program, whose inputs have an axis of datums each.
        datums: the symbol of their number.
    """
    found: dict[int, Way] = {}
    for slot in flat.constants:
        found[slot] = "constant"
    for slot in flat.inputs:
        found[slot] = "each"
    for equation in flat.equations:
        given: list[Way] = [found[slot] for slot in equation.inputs]
        way = next((one for one in given if isinstance(one, Other)), None)
        if way is None:
            way = _way(flat, equation, given, datums)
        for slot in equation.outputs:
            found[slot] = way
    return [found[slot] for slot in flat.outputs]


def _axes(flat: Flat, slot: int, datums: str) -> list[int]:
    return [i for i, size in enumerate(flat.avals[slot].shape) if str(size) == datums]


def _way(flat: Flat, equation: Equation, given: Sequence[Way], datums: str) -> Way:
    name, (slot, *more) = equation.name, equation.outputs
    if name == "dim_as_value":
        size = equation.params["dim"]
        return "count" if str(size) == datums else Other(f"it asks for {size} as a number")
    axes = _axes(flat, slot, datums)
    sizes = [size for size in flat.avals[slot].shape if is_symbolic(size)]
    named = [size for size in sizes if re.search(rf"\b{datums}\b", str(size))]
    if more or len(axes) > 1 or len(named) > len(axes):
        return Other(f"it arranges the datums anew, by {name}")
    if sizes and not axes:  # such an array would be another for each datum
        return Other(f"it makes an array of tokens, by {name}")
    if {"sum", "mean", "count"}.isdisjoint(given):
        return _of_datums(flat, equation, given, datums, axes)
    if axes:
        return Other(f"it combines a datum with a sum over datums, by {name}")
    return _of_sums(flat, equation, given)


def _of_datums(
    flat: Flat, equation: Equation, given: Sequence[Way], datums: str, axes: Sequence[int]
) -> Way:
    """Finds the way of an operation on arrays with an axis of datums, and on constants."""
    name = equation.name
    if "each" not in given:
        if not axes:
            return "constant"
        return "each" if name == "broadcast_in_dim" else Other(f"it counts datums, by {name}")
    if name in POINTWISE or name in RESHAPING:
        return "each" if axes else Other(f"it takes datums apart, by {name}")
    if not name.startswith("reduce_"):
        return Other(f"it uses {name}")
    if axes:
        return "each"
    # Of an axis of datums that was dropped, only a sum is one over datums.
    return "sum" if name == "reduce_sum" else Other(f"it uses {name} over datums")


def _of_sums(flat: Flat, equation: Equation, given: Sequence[Way]) -> Way:
    """Finds the way of an operation on sums over datums, and on constants."""
    name = equation.name
    first, *others = given
    if name in ("add", "sub", "add_any"):
        held = [flat.constants.get(slot) for slot in equation.inputs]
        terms: list[Way] = [
            way
            for way, value in zip(given, held, strict=True)
            if value is None or np.any(value != 0)
        ]
        if all(way == terms[0] for way in terms) and terms[0] in ("sum", "mean"):
            return terms[0]
    elif name == "mul" and "constant" in given:
        return next(way for way in given if way != "constant")
    elif name == "div" and others == ["constant"]:
        return first
    elif name == "div" and (first, others) == ("sum", ["count"]):
        return "mean"
    elif name == "convert_element_type":
        if np.issubdtype(equation.params["new_dtype"], np.floating):
            return first
    elif name in (*_LINEAR, *RESHAPING):
        return first
    return Other(f"it computes {name} of a sum over datums")


_LINEAR = ("neg", "reduce_sum", "copy", "copy_p", "stop_gradient", "optimization_barrier")
