"""Arrays that hold the values of many rows, and how they are put together."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mintjax.gradients.flat import Flat, Slot
from mintjax.gradients.grouped.sizes import FIXED, Rows, Sizes, without_row
from mintjax.gradients.grouped.steps import Array, Compute, Kind, Step, Value, room


class Place(NamedTuple):
    """The place of a slot: an array, and which of its members it is; None if it is all of it."""

    value: Value
    member: int | None


class Arrays:
    """The arrays of a program, and which of them holds each slot of a flat program."""

    def __init__(self, flat: Flat) -> None:
        self.steps: list[Step] = []
        self.constants: dict[Value, Array] = {}
        self.kinds: list[Kind] = []
        self._flat = flat
        self._shapes: dict[Slot, tuple[int, tuple[Any, ...]]] = {}
        self._places: dict[Slot, Place] = {}
        self._alias: dict[Slot, Slot] = {}
        self._classes: dict[Slot, tuple[Any, ...]] = {}
        self._folded = dict(flat.constants)
        self._made: dict[Any, Any] = {}

    def _value(self, kind: Kind) -> Value:
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def _step(
        self, compute: Compute, reads: Sequence[Value], kind: Kind, *, by_tokens: bool = False
    ) -> Value:
        """Adds a step that writes one array."""
        value = self._value(kind)
        along = (kind.rows, kind.size) if by_tokens and kind.rows and not kind.uniform else None
        self.steps.append(Step(compute, tuple(reads), (value,), several=False, along=along))
        return value

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _shape(self, slot: Slot) -> tuple[int, tuple[Any, ...]]:
        if slot not in self._shapes:
            self._shapes[slot] = without_row(tuple(self._flat.avals[slot].shape))
        return self._shapes[slot]

    def _is_ragged(self, slot: Slot) -> bool:
        return self._shape(slot)[0] != FIXED

    def _dtype(self, slot: Slot) -> Any:
        return self._flat.avals[slot].dtype

    def _same(self, slot: Slot) -> Slot:
        while slot in self._alias:
            slot = self._alias[slot]
        return slot

    def take(self, slots: Sequence[Slot], parameter: bool) -> Compute:
        """Makes room for inputs, and gives the function that makes one array of them."""
        _, shape = self._shape(slots[0])
        dtype = self._dtype(slots[0])
        # Integers keep their bits: lengths.py refuses what computes with them.
        floats = dtype if dtype.kind == "f" else None
        if parameter:
            value = self._value(Kind())
            self._places[slots[0]] = Place(value, None)
            self._classes[slots[0]] = ("whole", slots[0])
            return operator.itemgetter(0)
        count = len(slots)
        ragged = self._is_ragged(slots[0])
        rows, size = (tuple(range(count)), str(shape[0])) if ragged else (None, "")
        trailing = tuple(shape[1:]) if ragged else shape
        value = self._value(Kind(rows, size, trailing, count))
        for i, slot in enumerate(slots):
            self._places[slot] = Place(value, i)
            self._classes[slot] = ("input", value)

        def laid_out(x: Any) -> Array:
            total = sum(map(len, x))
            own = room(value, total, trailing, floats or x[0].dtype)
            return np.concatenate(x, out=own, casting="unsafe")

        def stacked(x: Any) -> Array:
            return np.asarray(x, floats)

        return laid_out if ragged else stacked

    def whole(self, slot: Slot) -> Value:
        """Returns an array that is the value of one slot."""
        slot = self._same(slot)
        if slot in self._folded and slot not in self._places:
            value = self._value(Kind())
            self.constants[value] = np.asarray(self._folded[slot])
            self._places[slot] = Place(value, None)
        value, index = self._places[slot]
        if index is None:
            return value
        return self._once(("whole", slot), lambda: self._pick(value, index))

    def _pick(self, value: Value, index: int) -> Value:
        kind = self.kinds[value]
        if kind.rows is None:
            return self._step(member_of(index), [value], Kind())
        rows, size, trailing = kind.rows, kind.size, kind.trailing

        def compute(sizes: Sizes, x: Array) -> Array:
            at = sizes.cuts(rows, size).at
            if kind.uniform:
                return np.broadcast_to(x, (at[index + 1] - at[index], *trailing))
            return x[at[index] : at[index + 1]]

        return self._step(compute, [value], Kind())

    def together(self, slots: Sequence[Slot], rows: Rows) -> Value:
        """Joins values that are as long as their rows, one after the other."""
        slots = [self._same(slot) for slot in slots]
        return self._once(("together", *slots), lambda: self._gather(slots, rows))

    def _gather(self, slots: Sequence[Slot], rows: Rows) -> Value:
        places = [self._places[slot] for slot in slots]
        size, trailing = self._ragged_kind(slots[0])
        found, *others = {place.value for place in places}
        kind = self.kinds[found]
        in_order = all(place == (found, i) for i, place in enumerate(places))
        if not others and (kind.uniform or (kind.rows == rows and in_order)):
            return found
        kinds = [self.kinds[value] for value in (found, *others)]
        number = {value: k for k, value in enumerate((found, *others))}
        where = [(number[place.value], place.member) for place in places]

        def compute(sizes: Sizes, *values: Array) -> Array:
            pieces: list[Array] = []
            cuts = [sizes.cuts(kind.rows, kind.size).at if kind.rows else [] for kind in kinds]
            for k, i in where:
                if i is None:
                    pieces.append(values[k])
                    continue
                low, high = cuts[k][i], cuts[k][i + 1]
                if kinds[k].uniform:
                    pieces.append(np.broadcast_to(values[k], (high - low, *trailing)))
                else:
                    pieces.append(values[k][low:high])
            return np.concatenate(pieces)

        return self._step(compute, list(number), Kind(rows, size, trailing, len(slots)))

    def _ragged_kind(self, slot: Slot) -> tuple[str, tuple[int, ...]]:
        _, (size, *trailing) = self._shape(slot)
        return str(size), tuple(trailing)

    def full(self, value: Value, rows: Rows) -> Value:
        """Returns an array with all its numbers, which a uniform one spares."""
        kind = self.kinds[value]
        if not kind.uniform:
            return value

        def compute(sizes: Sizes, x: Array) -> Array:
            return np.full((sizes.cuts(rows, kind.size).at[-1], *kind.trailing), x)

        made = kind._replace(uniform=False, rows=rows, members=len(rows))
        return self._once(("full", value, rows), lambda: self._step(compute, [value], made))

    def stack(self, slots: Sequence[Slot]) -> Value:
        """Stacks values of one fixed shape."""
        slots = [self._same(slot) for slot in slots]
        key = ("stack", *slots)
        return self._once(key, lambda: self._stack(slots))

    def _stack(self, slots: list[Slot]) -> Value:
        shape = self._shape(slots[0])[1]
        kind = Kind(None, "", shape, len(slots))
        if all(slot in self._folded for slot in slots):
            value = self._value(kind)
            self.constants[value] = np.stack([self._folded[slot] for slot in slots])
            return value
        runs: list[tuple[Value, list[int]]] = []  # members of one array that follow each other
        for slot in slots:
            place = self._places.get(slot)
            if place is None or place.member is None:
                runs.append((self.whole(slot), []))
            elif runs and runs[-1][0] == place.value and runs[-1][1]:
                runs[-1][1].append(place.member)
            else:
                runs.append((place.value, [place.member]))
        (first, indices), *others = runs
        if not others and indices and indices == list(range(self.kinds[first].members)):
            return first
        chosen = [chosen_by(indices) if indices else None for _, indices in runs]  # None is an axis

        def compute(_: Sizes, *values: Array) -> Array:
            parts = [x[at] for x, at in zip(values, chosen, strict=True)]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return self._step(compute, [value for value, _ in runs], kind)

    def _spread(self, value: Value, trailing: tuple[int, ...], rows: Rows, size: str) -> Value:
        """Repeats each member of a stack for as long as its row is."""
        shape = (len(rows), *trailing)

        def compute(sizes: Sizes, x: Array) -> Array:
            return np.repeat(x.reshape(shape), sizes.cuts(rows, size).lengths, 0)

        kind = Kind(rows, size, trailing, len(rows))
        key = ("spread", value, trailing, rows, size)
        return self._once(key, lambda: self._step(compute, [value], kind))


def member_of(index: int) -> Compute:
    """Makes the operation that takes one member of a group: ``[rows, ...]`` to ``[...]``."""

    def compute(_: Sizes, x: Array) -> Array:
        return x[index]

    return compute


def shaped_as(shape: tuple[int, ...]) -> Compute:
    """Makes the operation that gives an array of fixed size another shape, ``shape``."""

    def compute(_: Sizes, x: Array) -> Array:
        return x.reshape(shape)

    return compute


def chosen_by(indices: list[int]) -> Any:
    """Makes an index for members, a slice where that is enough, because that copies nothing."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step and all(b - a == step for a, b in itertools.pairwise(indices)):
        end = indices[-1] + (1 if step > 0 else -1)
        return slice(indices[0], end if end >= 0 else None, step)
    return np.array(indices)
