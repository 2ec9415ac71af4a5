"""The steps of a program that is evaluated by groups, and the arrays that they give."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from mintjax.gradients.grouped.sizes import Rows, Sizes

Array: TypeAlias = Any
Value: TypeAlias = int  # the number of an array
Compute: TypeAlias = Callable[..., Any]  # of the sizes and of the arrays that are read

_rooms = threading.local()


def room(number: int, size: int, trailing: tuple[int, ...], dtype: Any) -> Array:
    """Lends room for an input, which this thread uses again, because new memory takes longer."""
    rooms: dict[Any, Array] = _rooms.__dict__
    key = (number, trailing, dtype)
    if key not in rooms or len(rooms[key]) < size:
        rooms[key] = np.empty((size, *trailing), dtype)
    return rooms[key][:size]


def shares_room(array: Array) -> bool:
    """Tells whether an array lies in such room, which the next call overwrites."""
    return any(np.may_share_memory(array, each) for each in _rooms.__dict__.values())


class Kind(NamedTuple):
    """The form of an array.

    Args:
        rows: of the values that lie one after the other in it; None if they have a fixed shape.
        size: of each of these, in the length of its row.
        trailing: the shape of each but for that.
        members: how many there are; 0 if it is one value.
        uniform: whether it is one number that stands for all of them.
    """

    rows: Rows | None = None
    size: str = ""
    trailing: tuple[int, ...] = ()
    members: int = 0
    uniform: bool = False

    def check(self, sizes: Sizes, array: Array) -> None:
        """Checks that an array has this form, because NumPy would repeat a wrong one in silence."""
        if self.uniform or not self.members:
            return
        first = self.members if self.rows is None else sizes.cuts(self.rows, self.size).at[-1]
        if array.shape != (first, *self.trailing):
            raise RuntimeError(
                f"a loop over rows was put together wrongly: {array.shape} in the place of "
                f"{(first, *self.trailing)}. This is a fault of mintjax's; please report it"
            )


class Step(NamedTuple):
    """A step of a program.

    Args:
        compute: of the sizes and of the arrays that it reads.
        reads: these.
        writes: the arrays that it gives.
        several: whether it gives a list.
        along: the rows and the sizes of them, if it does the same to each token.
    """

    compute: Compute
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    several: bool
    along: tuple[Rows, str] | None = None


def frees_of(steps: Sequence[Step], kept: set[Value]) -> list[list[Value]]:
    """Lists, for each step, the arrays that none reads after it."""
    frees: list[list[Value]] = []
    seen = set(kept)
    for step in reversed(steps):
        done = {value for value in (*step.reads, *step.writes) if value not in seen}
        seen |= done
        frees.append(list(done))
    return frees[::-1]


def needed_steps(steps: Sequence[Step], kept: set[Value]) -> list[Step]:
    """Drops the steps of which none needs what they write."""
    needed, found = set(kept), list[Step]()
    for step in reversed(steps):
        if not needed.isdisjoint(step.writes):
            found.append(step)
            needed.update(step.reads)
    return found[::-1]


def in_pieces(
    steps: Sequence[Step], kinds: Sequence[Kind], kept: set[Value], piece: int
) -> list[Step]:
    """Makes one step of the operations on tokens that can follow each other.

    Args:
        steps: of a program.
        kinds: of the arrays.
        kept: the arrays that are read after the last step.
        piece: how many numbers to compute at a time.
    """
    ordered: list[Step] = []
    left = list(steps)
    missing = {value for step in steps for value in step.writes}
    while left:
        taken, rest = list[Step](), list[Step]()
        for step in left:
            if step.along is None and missing.isdisjoint(step.reads):
                ordered.append(step)
                missing.difference_update(step.writes)
            else:
                rest.append(step)
        along = next((step.along for step in rest if step.along is not None), None)
        left = list[Step]()
        for step in rest:
            if step.along == along and missing.isdisjoint(step.reads):
                taken.append(step)
                missing.difference_update(step.writes)
            else:
                left.append(step)
        if taken:
            elsewhere = kept | {value for step in left for value in step.reads}
            ordered.append(_fused(taken, kinds, elsewhere, piece))
    return ordered


def _fused(steps: Sequence[Step], kinds: Sequence[Kind], elsewhere: set[Value], piece: int) -> Step:
    """Makes one step that computes some tokens at a time."""
    if len(steps) == 1:
        return steps[0]
    writes = [step.writes[0] for step in steps]
    reads = list(dict.fromkeys(value for step in steps for value in step.reads))
    reads = [value for value in reads if value not in set(writes)]
    gives = [value for value in writes if value in elsewhere]
    cut = [value for value in reads if kinds[value].rows is not None and not kinds[value].uniform]
    frees = frees_of(steps, {*reads, *gives})  # so that the next operation writes where it is warm
    along = cast("tuple[Rows, str]", steps[0].along)
    numbers = max(int(np.prod(kinds[value].trailing)) for value in writes)
    piece = max(1, piece // max(1, numbers))

    def compute(sizes: Sizes, *arrays: Array) -> list[Array]:
        total = sizes.cuts(*along).at[-1]
        given = dict(zip(reads, arrays, strict=True))
        values, out = dict(given), dict[Value, Array]()
        for low in range(0, max(total, 1), piece):
            for value in cut:
                values[value] = given[value][low : low + piece]
            for step, unused in zip(steps, frees, strict=True):
                values[step.writes[0]] = step.compute(sizes, *[values[v] for v in step.reads])
                for value in unused:
                    del values[value]
            for value in gives:
                found = values[value]
                if total <= piece:
                    out[value] = found
                    continue
                if not low:
                    out[value] = np.empty((total, *found.shape[1:]), found.dtype)
                out[value][low : low + piece] = found
        return [out[value] for value in gives]

    return Step(compute, tuple(reads), tuple(gives), several=True)
