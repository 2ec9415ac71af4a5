"""Evaluates a loop over rows with one NumPy operation where all rows have the same one.

The trace of a loop (:mod:`mintjax.gradients.lengths`) repeats its equations for each row. Equations
of one primitive, with the same parameters but for the length of their own row, whose operands are
members of the same groups, are one group. A group is computed at once: values that are as long as
their rows lie one after the other in one array ``[sum of lengths, ...]``, values of a fixed shape
in a stack ``[members, ...]``. What has no company, or no rule here, is computed alone, as
:mod:`mintjax.gradients.interpreted` does.

A chain of additions is one sum, in float64, and so at least as exact as the chain.
"""

from __future__ import annotations

import itertools
import operator
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mintjax.gradients import interpreted
from mintjax.gradients.flat import (
    SIZE_FUNCTIONS,
    Equation,
    Flat,
    Slot,
    is_symbolic,
    size_code,
    size_of,
)

Array: TypeAlias = Any
Value: TypeAlias = int  # the number of an array
Rows: TypeAlias = tuple[int, ...]
Compute: TypeAlias = Callable[..., Any]  # of the sizes and of the arrays that are read

_FIXED, _MIXED = -1, -2
"""These stand in the place of a row's number where there is none, and where there are several."""


class Grouped(NamedTuple):
    """A program that computes the operations of all rows together.

    Args:
        run: evaluates it. It takes what :meth:`mintjax.gradients.lengths.Trace.arguments` gives,
            and the length of each row; it gives the outputs but for the gradients, and the
            gradients of all rows one after the other.
        operations: how many operations that takes.
    """

    run: Callable[[Sequence[Any], Sequence[int]], tuple[list[Array], Array]]
    operations: int


def prepare(flat: Flat, rows: int, parameters: int, *, piece: int = 32768) -> Grouped:
    """Readies the program of a :class:`mintjax.gradients.lengths.Trace` to be run by groups.

    Args:
        flat: its program; the lengths are the symbols ``n0``, ``n1``, ...
        rows: how many there are.
        parameters: how many parameters the objective has.
        piece: how many numbers to compute at a time, so that what one operation gives the next
            stays in the cache of the processor.

    Raises:
        Unsupported: an equation with symbolic sizes has no rule.
    """
    planner = _Planner(flat, rows)
    inputs = flat.inputs
    blocks = [inputs[:rows], *([slot] for slot in inputs[rows : rows + parameters])]
    blocks += [inputs[at : at + rows] for at in range(rows + parameters, len(inputs), rows)]
    takes = [planner.take(block, 0 < i <= parameters) for i, block in enumerate(blocks)]
    planner.classify()
    planner.emit()
    everywhere = tuple(range(rows))
    results = [planner.whole(slot) for slot in flat.outputs[:-rows]]
    gradient = planner.full(planner.together(flat.outputs[-rows:], everywhere), everywhere)
    constants = planner.constants
    kept = {*results, gradient, *constants}
    steps = _in_pieces(_needed(planner.steps, kept), planner.kinds, kept, piece)
    frees = _frees(steps, kept)

    def run(arguments: Sequence[Any], lengths: Sequence[int]) -> tuple[list[Array], Array]:
        sizes = _Sizes(np.asarray(lengths, np.int64))
        values: list[Any] = [None] * len(planner.kinds)
        for value, constant in constants.items():
            values[value] = constant
        with np.errstate(all="ignore"):
            for value, (take, argument) in enumerate(zip(takes, arguments, strict=True)):
                values[value] = take(argument)
            for step, unused in zip(steps, frees, strict=True):
                found = step.compute(sizes, *[values[value] for value in step.reads])
                arrays = found if step.several else (found,)
                for value, array in zip(step.writes, arrays, strict=True):
                    planner.kinds[value].check(sizes, array)
                    values[value] = array
                for value in unused:
                    values[value] = None
        grads = np.ascontiguousarray(values[gradient])
        if any(np.may_share_memory(grads, room) for room in _rooms.__dict__.values()):
            grads = np.array(grads)
        return [values[value] for value in results], grads

    return Grouped(run, len(steps))


_rooms = threading.local()


def _room(number: int, size: int, trailing: tuple[int, ...], dtype: Any) -> Array:
    """Room for an input, which this thread uses again, because to map new memory takes longer."""
    rooms: dict[Any, Array] = _rooms.__dict__
    key = (number, trailing, dtype)
    if key not in rooms or len(rooms[key]) < size:
        rooms[key] = np.empty((size, *trailing), dtype)
    return rooms[key][:size]


class _Step(NamedTuple):
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


def _frees(steps: Sequence[_Step], kept: set[Value]) -> list[list[Value]]:
    """Lists, for each step, the arrays that none reads after it."""
    frees: list[list[Value]] = []
    seen = set(kept)
    for step in reversed(steps):
        done = {value for value in (*step.reads, *step.writes) if value not in seen}
        seen |= done
        frees.append(list(done))
    return frees[::-1]


def _needed(steps: Sequence[_Step], kept: set[Value]) -> list[_Step]:
    """Drops the steps of which none needs what they write."""
    needed, found = set(kept), list[_Step]()
    for step in reversed(steps):
        if not needed.isdisjoint(step.writes):
            found.append(step)
            needed.update(step.reads)
    return found[::-1]


def _in_pieces(
    steps: Sequence[_Step], kinds: Sequence[_Kind], kept: set[Value], piece: int
) -> list[_Step]:
    """Makes one step of the operations on tokens that can follow each other.

    Args:
        steps: of a program.
        kinds: of the arrays.
        kept: the arrays that are read after the last step.
        piece: how many numbers to compute at a time.
    """
    ordered: list[_Step] = []
    left = list(steps)
    missing = {value for step in steps for value in step.writes}
    while left:
        taken, rest = list[_Step](), list[_Step]()
        for step in left:
            if step.along is None and missing.isdisjoint(step.reads):
                ordered.append(step)
                missing.difference_update(step.writes)
            else:
                rest.append(step)
        along = next((step.along for step in rest if step.along is not None), None)
        left = list[_Step]()
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


def _fused(
    steps: Sequence[_Step], kinds: Sequence[_Kind], elsewhere: set[Value], piece: int
) -> _Step:
    """Makes one step that computes some tokens at a time."""
    if len(steps) == 1:
        return steps[0]
    writes = [step.writes[0] for step in steps]
    reads = list(dict.fromkeys(value for step in steps for value in step.reads))
    reads = [value for value in reads if value not in set(writes)]
    gives = [value for value in writes if value in elsewhere]
    cut = [value for value in reads if kinds[value].rows is not None and not kinds[value].uniform]
    frees = _frees(steps, {*reads, *gives})  # so that the next operation writes where it is warm
    along = cast("tuple[Rows, str]", steps[0].along)
    numbers = max(int(np.prod(kinds[value].trailing)) for value in writes)
    piece = max(1, piece // max(1, numbers))

    def compute(sizes: _Sizes, *arrays: Array) -> list[Array]:
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

    return _Step(compute, tuple(reads), tuple(gives), several=True)


# Lengths


class _Text(str):
    """A size in the length ``n`` of a row, such as ``n - 1``."""

    __slots__ = ()


class _Cuts(NamedTuple):
    """The places of values of several lengths that lie one after the other.

    Args:
        lengths: of each.
        at: where each begins, and the end of the last.
        places: the same as an array.
    """

    lengths: npt.NDArray[np.int64]
    at: list[int]
    places: npt.NDArray[np.int64]


class _Sizes:
    """The lengths of a batch's rows, and what follows from them, each computed once."""

    def __init__(self, lengths: npt.NDArray[np.int64]) -> None:
        self._lengths = lengths
        self._sizes: dict[str, npt.NDArray[np.int64]] = {"n": lengths}
        self._cuts: dict[Any, _Cuts] = {}
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

    def cuts(self, rows: Rows, text: str) -> _Cuts:
        """Lays values of some rows one after the other."""
        key = (rows, text)
        if key not in self._cuts:
            lengths = self.of(text)[list(rows)]
            places = np.concatenate([[0], np.cumsum(lengths)])
            self._cuts[key] = _Cuts(lengths, places.tolist(), places)
        return self._cuts[key]


_OF_ARRAYS = {**SIZE_FUNCTIONS, "max": np.maximum, "min": np.minimum}
_SYMBOL = re.compile(r"\bn(\d+)\b")


def _join(a: int, b: int) -> int:
    """The row of two things, given that of each."""
    if a == b or b == _FIXED:
        return a
    return b if a == _FIXED else _MIXED


def _blank(value: Any) -> tuple[int, Any]:
    """Takes the row out of a parameter or a shape.

    Returns:
        The row whose length stands in it, and the same with sizes as texts in ``n``.
    """
    if type(value) is tuple:
        row, items = _FIXED, list[Any]()
        for item in cast("tuple[Any, ...]", value):
            own, blank = _blank(item)
            row = _join(row, own)
            items.append(blank)
        return row, tuple(items)
    if isinstance(value, np.integer):
        return _FIXED, int(cast("int", value))
    if not is_symbolic(value):
        return _FIXED, value
    text = str(value)
    symbols = set(_SYMBOL.findall(text))
    row = int(symbols.pop()) if len(symbols) == 1 else _MIXED
    return row, _Text(_SYMBOL.sub("n", text) if row >= 0 else text)


def _filled(value: Any, size: Callable[[str], int]) -> Any:
    if type(value) is _Text:
        return size(value)
    if type(value) is tuple:
        return tuple([_filled(item, size) for item in cast("tuple[Any, ...]", value)])
    return value


def _has_text(value: Any) -> bool:
    if type(value) is tuple:
        return any(map(_has_text, cast("tuple[Any, ...]", value)))
    return type(value) is _Text


# The plan


class _Place(NamedTuple):
    """The place of a slot: an array, and which of its members it is; None if it is all of it."""

    value: Value
    member: int | None


class _Kind(NamedTuple):
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

    def check(self, sizes: _Sizes, array: Array) -> None:
        """Checks that an array has this form, because NumPy would repeat a wrong one in silence."""
        if self.uniform or not self.members:
            return
        first = self.members if self.rows is None else sizes.cuts(self.rows, self.size).at[-1]
        if array.shape != (first, *self.trailing):
            raise RuntimeError(
                f"a loop over rows was put together wrongly: {array.shape} in the place of "
                f"{(first, *self.trailing)}. This is a fault of mintjax's; please report it"
            )


class _Known(NamedTuple):
    """An equation, and all by which it is one of a group.

    Args:
        equation: in the program.
        inputs: its operands, of which those that are the same are one.
        row: the row whose length it has; :data:`_FIXED` or :data:`_MIXED`.
        rule: of :mod:`mintjax.gradients.interpreted`; None if it has none.
        params: those that the rule reads, with sizes as texts.
        start: where it begins, if equations that differ only in that are one group.
        parts: into how many equal parts it takes an array, if it does that.
    """

    equation: Equation
    inputs: tuple[Slot, ...]
    row: int
    rule: interpreted.Rule | None
    params: tuple[Any, ...]
    start: int | None = None
    parts: int | None = None


class _Planner:
    """Makes the steps of a grouped program."""

    def __init__(self, flat: Flat, rows: int) -> None:
        self.steps: list[_Step] = []
        self.constants: dict[Value, Array] = {}
        self.kinds: list[_Kind] = []
        self._flat = flat
        self._rows = rows
        self._shapes: dict[Slot, tuple[int, tuple[Any, ...]]] = {}
        self._places: dict[Slot, _Place] = {}
        self._alias: dict[Slot, Slot] = {}
        self._classes: dict[Slot, tuple[Any, ...]] = {}
        self._folded = dict(flat.constants)
        self._groups: list[list[_Known]] = []
        self._depths: list[int] = []
        self._sums: dict[int, list[tuple[int, Slot]]] = {}  # by the output of a chain
        self._made: dict[Any, Any] = {}

    # Values

    def _value(self, kind: _Kind) -> Value:
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def _step(
        self, compute: Compute, reads: Sequence[Value], kind: _Kind, *, by_tokens: bool = False
    ) -> Value:
        """Adds a step that writes one array."""
        value = self._value(kind)
        along = (kind.rows, kind.size) if by_tokens and kind.rows and not kind.uniform else None
        self.steps.append(_Step(compute, tuple(reads), (value,), several=False, along=along))
        return value

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _shape(self, slot: Slot) -> tuple[int, tuple[Any, ...]]:
        if slot not in self._shapes:
            self._shapes[slot] = _blank(tuple(self._flat.avals[slot].shape))
        return self._shapes[slot]

    def _is_ragged(self, slot: Slot) -> bool:
        return self._shape(slot)[0] != _FIXED

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
            value = self._value(_Kind())
            self._places[slots[0]] = _Place(value, None)
            self._classes[slots[0]] = ("whole", slots[0])
            return operator.itemgetter(0)
        count = len(slots)
        ragged = self._is_ragged(slots[0])
        rows, size = (tuple(range(count)), str(shape[0])) if ragged else (None, "")
        trailing = tuple(shape[1:]) if ragged else shape
        value = self._value(_Kind(rows, size, trailing, count))
        for i, slot in enumerate(slots):
            self._places[slot] = _Place(value, i)
            self._classes[slot] = ("input", value)

        def laid_out(x: Any) -> Array:
            total = sum(map(len, x))
            room = _room(value, total, trailing, floats or x[0].dtype)
            return np.concatenate(x, out=room, casting="unsafe")

        def stacked(x: Any) -> Array:
            return np.asarray(x, floats)

        return laid_out if ragged else stacked

    def whole(self, slot: Slot) -> Value:
        """An array that is the value of one slot."""
        slot = self._same(slot)
        if slot in self._folded and slot not in self._places:
            value = self._value(_Kind())
            self.constants[value] = np.asarray(self._folded[slot])
            self._places[slot] = _Place(value, None)
        value, index = self._places[slot]
        if index is None:
            return value
        return self._once(("whole", slot), lambda: self._pick(value, index))

    def _pick(self, value: Value, index: int) -> Value:
        kind = self.kinds[value]
        if kind.rows is None:
            return self._step(_member(index), [value], _Kind())
        rows, size, trailing = kind.rows, kind.size, kind.trailing

        def compute(sizes: _Sizes, x: Array) -> Array:
            at = sizes.cuts(rows, size).at
            if kind.uniform:
                return np.broadcast_to(x, (at[index + 1] - at[index], *trailing))
            return x[at[index] : at[index + 1]]

        return self._step(compute, [value], _Kind())

    def together(self, slots: Sequence[Slot], rows: Rows) -> Value:
        """An array of values that are as long as their rows, one after the other."""
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

        def compute(sizes: _Sizes, *values: Array) -> Array:
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

        return self._step(compute, list(number), _Kind(rows, size, trailing, len(slots)))

    def _ragged_kind(self, slot: Slot) -> tuple[str, tuple[int, ...]]:
        _, (size, *trailing) = self._shape(slot)
        return str(size), tuple(trailing)

    def full(self, value: Value, rows: Rows) -> Value:
        """An array with all its numbers, which a uniform one spares."""
        kind = self.kinds[value]
        if not kind.uniform:
            return value

        def compute(sizes: _Sizes, x: Array) -> Array:
            return np.full((sizes.cuts(rows, kind.size).at[-1], *kind.trailing), x)

        made = kind._replace(uniform=False, rows=rows, members=len(rows))
        return self._once(("full", value, rows), lambda: self._step(compute, [value], made))

    def stack(self, slots: Sequence[Slot]) -> Value:
        """An array whose members are values of one fixed shape."""
        slots = [self._same(slot) for slot in slots]
        key = ("stack", *slots)
        return self._once(key, lambda: self._stack(slots))

    def _stack(self, slots: list[Slot]) -> Value:
        shape = self._shape(slots[0])[1]
        kind = _Kind(None, "", shape, len(slots))
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
        chosen = [_chosen(indices) if indices else None for _, indices in runs]  # None is an axis

        def compute(_: _Sizes, *values: Array) -> Array:
            parts = [x[at] for x, at in zip(values, chosen, strict=True)]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        return self._step(compute, [value for value, _ in runs], kind)

    def _spread(self, value: Value, trailing: tuple[int, ...], rows: Rows, size: str) -> Value:
        """Repeats each member of a stack for as long as its row is."""
        shape = (len(rows), *trailing)

        def compute(sizes: _Sizes, x: Array) -> Array:
            return np.repeat(x.reshape(shape), sizes.cuts(rows, size).lengths, 0)

        kind = _Kind(rows, size, trailing, len(rows))
        key = ("spread", value, trailing, rows, size)
        return self._once(key, lambda: self._step(compute, [value], kind))

    # Which equations are one group

    def classify(self) -> None:
        """Finds the groups."""
        for slot in self._flat.constants:
            self._classes[slot] = self._class_of_constant(slot)
        numbers: dict[Any, int] = {}
        done: dict[Any, tuple[Slot, ...]] = {}
        seen: Counter[Any] = Counter()
        for equation in self._flat.equations:
            found = self._look(equation)
            outputs = equation.outputs
            if equation.name in _ALIASES:
                self._alias.update(zip(outputs, found.inputs, strict=True))
                continue
            dtypes = tuple(self._dtype(slot) for slot in outputs)
            if found.rule is not None and found.row != _MIXED:
                key = (equation.primitive, *found[2:], found.inputs, dtypes)
                same = done.setdefault(key, outputs)
                if same is not outputs:
                    self._alias.update(zip(outputs, same, strict=True))
                    continue
                if self._fold(found):
                    continue
            kind: Any = outputs
            if self._can_be_grouped(found):
                classes = tuple(self._classes[slot] for slot in found.inputs)
                shapes = tuple(self._shape(slot)[1] for slot in outputs)
                kind = (equation.primitive, found.params, classes, dtypes, shapes)
                if found.row >= 0:  # one member for each row
                    seen[kind, found.row] += 1
                    kind = (kind, seen[kind, found.row])
            number = numbers.setdefault(kind, len(numbers))
            if number == len(self._groups):
                self._groups.append([])
                depths = [self._depth_of(slot) for slot in found.inputs]
                self._depths.append(1 + max(depths, default=0))
            self._groups[number].append(found)
            for k, slot in enumerate(outputs):
                self._classes[slot] = ("group", number, 0 if found.parts else k)
        self._find_sums()

    def _class_of_constant(self, slot: Slot) -> tuple[Any, ...]:
        aval = self._flat.avals[slot]
        return ("constant", slot if aval.shape else aval.dtype)

    def _depth_of(self, slot: Slot) -> int:
        kind = self._classes[slot]
        return self._depths[cast("int", kind[1])] if kind[0] == "group" else 0

    def _look(self, equation: Equation) -> _Known:
        inputs = tuple(self._same(slot) for slot in equation.inputs)
        rule = interpreted.rule_of(self._flat, equation)
        names = interpreted.READ.get(equation.name, ())
        row, params = _blank(tuple(equation.params[key] for key in names))
        for slot in (*inputs, *equation.outputs):
            row = _join(row, self._shape(slot)[0])
        start, parts = None, None
        if row == _FIXED and equation.name == "slice" and set(params[2] or (1,)) == {1}:
            (start, *starts), (limit, *limits), _ = params
            params = ((0, *starts), (limit - start, *limits), None)
        if row == _FIXED and equation.name == "unstack":
            parts = len(equation.outputs)
        if row == _FIXED and equation.name == "split" and len(set(params[0])) == 1:
            parts = len(equation.outputs)
        return _Known(equation, inputs, row, rule, params, start, parts)

    def _can_be_grouped(self, found: _Known) -> bool:
        if found.rule is None or found.row == _MIXED:
            return False
        slots = (*found.inputs, *found.equation.outputs)
        # A row's length is the first axis.
        if any(_has_text(self._shape(slot)[1][1:]) for slot in slots):
            return False
        # Sums of 16 bits would not be exact enough.
        dtypes = [self._dtype(slot) for slot in slots]
        return all(dtype.kind in "biu" or dtype in (np.float32, np.float64) for dtype in dtypes)

    def _fold(self, found: _Known) -> bool:
        """Computes what no input changes."""
        if found.row != _FIXED or not all(slot in self._folded for slot in found.inputs):
            return False
        step = interpreted.step_of(self._flat, found.equation)
        with np.errstate(all="ignore"):
            results = step.compute([self._folded[slot] for slot in found.inputs], {})
        for slot, result in zip(found.equation.outputs, results, strict=True):
            self._folded[slot] = result
            self._classes[slot] = self._class_of_constant(slot)
        return True

    def _find_sums(self) -> None:
        """Finds chains of additions, whose links are alone because each has another before it."""
        uses = Counter(self._same(slot) for slot in self._flat.outputs)
        links: dict[Slot, _Known] = {}
        for group in self._groups:
            for found in group:
                uses.update(found.inputs)
            found, output = group[0], group[0].equation.outputs[0]
            shapes = {self._shape(slot)[1] for slot in (*found.inputs, output)}
            adds = found.equation.name in _ADDING and found.row == _FIXED
            if len(group) == 1 and adds and len(shapes) == 1:
                links[output] = found
        self._inner = {
            slot
            for found in links.values()
            for slot in found.inputs
            if slot in links and uses[slot] == 1
        }
        for output, found in links.items():
            if output not in self._inner and not self._inner.isdisjoint(found.inputs):
                self._sums[output] = self._terms(links, output)

    def _terms(self, links: dict[Slot, _Known], output: Slot) -> list[tuple[int, Slot]]:
        terms: list[tuple[int, Slot]] = []
        left = [(1, output)]
        while left:
            sign, slot = left.pop()
            if slot != output and slot not in self._inner:
                terms.append((sign, slot))
                continue
            found = links[slot]
            a, b = found.inputs
            left += [(sign, a), (-sign if found.equation.name == "sub" else sign, b)]
        return terms

    # Steps

    def emit(self) -> None:
        """Makes the steps, group by group."""
        for number in sorted(range(len(self._groups)), key=self._depths.__getitem__):
            group = self._groups[number]
            output = group[0].equation.outputs[0]
            if output in self._inner:
                continue
            if output in self._sums:
                self._add_up(output, self._sums[output])
            elif group[0].parts:
                self._part(group)
            elif not self._meet(group) and (len(group) == 1 or not self._together(group)):
                for found in group:
                    self._alone(found)

    def _alone(self, found: _Known) -> None:
        """Makes the step of an equation without company."""
        step = interpreted.step_of(self._flat, found.equation)
        reads = [self.whole(slot) for slot in found.inputs]
        writes = [self._value(_Kind()) for _ in found.equation.outputs]
        for slot, value in zip(found.equation.outputs, writes, strict=True):
            self._places[slot] = _Place(value, None)

        def compute(sizes: _Sizes, *operands: Array) -> Sequence[Array]:
            return step.compute(operands, {text: sizes.one(text) for text in step.texts})

        self.steps.append(_Step(compute, tuple(reads), tuple(writes), several=True))

    def _meet(self, group: Sequence[_Known]) -> bool:
        """Makes the step of equations that make arrays of many, if that is the same as a stack."""
        first, count = group[0], len(group)
        shapes = {self._shape(slot)[1] for slot in first.inputs}
        row, whole = self._shape(first.equation.outputs[0])
        if first.equation.name not in ("stack", "concatenate") or first.params != (0,):
            return False
        if len(shapes) > 1 or row != _FIXED:
            return False
        value = self.stack([slot for found in group for slot in found.inputs])
        shape = whole if count == 1 else (count, *whole)
        kind = _Kind() if count == 1 else _Kind(None, "", whole, count)
        value = self._step(_shaped(shape), [value], kind)
        for i, found in enumerate(group):
            self._places[found.equation.outputs[0]] = _Place(value, None if count == 1 else i)
        return True

    def _add_up(self, output: Slot, terms: Sequence[tuple[int, Slot]]) -> None:
        """Makes the step of a chain of additions."""
        taken: defaultdict[tuple[Value, int], list[int]] = defaultdict(list)
        reads: list[tuple[Value, int, Any]] = []
        for sign, slot in terms:
            place = self._places.get(slot)
            if place is None or place.member is None:
                reads.append((self.whole(slot), sign, None))
            else:
                taken[place.value, sign].append(place.member)
        for (value, sign), indices in taken.items():
            reads.append((value, sign, _chosen(sorted(indices))))
        dtype = self._dtype(output)
        wide: Any = np.float64 if dtype.kind == "f" else None

        def compute(_: _Sizes, *values: Array) -> Array:
            total: Any = 0
            for x, (_value, sign, at) in zip(values, reads, strict=True):
                part = np.asarray(x, wide) if at is None else x[at].sum(0, dtype=wide)
                total = total + sign * part
            return np.asarray(total, dtype)

        value = self._step(compute, [read[0] for read in reads], _Kind())
        self._places[output] = _Place(value, None)

    def _part(self, group: Sequence[_Known]) -> None:
        """Makes the step that takes arrays apart, whose parts are members of one stack."""
        found, count = group[0], len(group)
        parts, axis = cast("int", found.parts), found.params[-1]
        shape = self._shape(found.equation.outputs[0])[1]
        alone = count == 1
        read = self.whole(found.inputs[0]) if alone else self.stack([g.inputs[0] for g in group])
        splits = found.equation.name == "split"

        def compute(_: _Sizes, x: Array) -> Array:
            x = x.reshape(count, *x.shape[0 if alone else 1 :])
            if splits:
                x = x.reshape(*x.shape[: axis + 1], parts, -1, *x.shape[axis + 2 :])
            return np.moveaxis(x, axis + 1, 1).reshape(count * parts, *shape)

        value = self._step(compute, [read], _Kind(None, "", shape, count * parts))
        for i, found in enumerate(group):
            for k, slot in enumerate(found.equation.outputs):
                self._places[slot] = _Place(value, i * parts + k)

    def _together(self, group: list[_Known]) -> bool:
        """Makes the step of a group, if there is a rule for it."""
        first = group[0]
        if first.row >= 0:
            group.sort(key=lambda found: found.row)
        else:
            group.sort(key=self._order)
        operands = [self._operand(group, k) for k in range(len(first.inputs))]
        output = first.equation.outputs[0]
        job = _Job(
            group=group,
            name=first.equation.name,
            rule=cast("interpreted.Rule", first.rule),
            params=first.params,
            operands=operands,
            rows=tuple(found.row for found in group),
            shape=self._shape(output)[1],
            dtype=self._dtype(output),
        )
        if first.equation.primitive.multiple_results:
            return False
        made = self._of_rows(job) if first.row >= 0 else self._of_stacks(job)
        if made is None:
            return False
        for i, found in enumerate(group):
            self._places[found.equation.outputs[0]] = _Place(made, i)
        return True

    def _order(self, found: _Known) -> tuple[int, ...]:
        """Orders the members of a group as those of its operands are."""
        places = [self._places.get(slot) for slot in found.inputs]
        return tuple(
            [-1 if place is None or place.member is None else place.member for place in places]
        )

    def _operand(self, group: Sequence[_Known], k: int) -> _Operand:
        slots = [found.inputs[k] for found in group]
        shape = self._shape(slots[0])[1]
        if len(set(slots)) == 1:
            return _Operand("shared", self.whole(slots[0]), shape, self._folded.get(slots[0]))
        if self._is_ragged(slots[0]):
            rows = tuple(found.row for found in group)
            return _Operand("rows", self.together(slots, rows), shape)
        return _Operand("stack", self.stack(slots), shape)

    # Groups of a fixed shape

    def _of_stacks(self, job: _Job) -> Value | None:
        count, shape = len(job.group), cast("tuple[int, ...]", job.shape)
        kind = _Kind(None, "", shape, count)
        reads = [operand.value for operand in job.operands]
        if job.name in _ELEMENTWISE:
            shapes: list[tuple[int, ...] | None] = []
            for operand in job.operands:
                lower = len(operand.shape) < len(shape) and operand.form == "stack"
                ones = (1,) * (len(shape) - len(operand.shape))
                shapes.append((count, *ones, *operand.shape) if lower else None)
            return self._step(_elementwise(job, shapes), reads, kind)
        if job.name == "slice":
            return self._slices(job, kind)
        params = _of_stack(job.name, count, job.params)
        if params is None:
            return None
        shared = [operand.form == "shared" for operand in job.operands]

        def compute(_: _Sizes, *values: Array) -> Array:
            values = tuple(
                np.broadcast_to(x, (count, *x.shape)) if same else x
                for x, same in zip(values, shared, strict=True)
            )
            return np.asarray(job.rule(*values, *params), job.dtype)

        return self._step(compute, reads, kind)

    def _slices(self, job: _Job, kind: _Kind) -> Value:
        starts: Array = np.array([found.start for found in job.group])
        (_, *lows), (size, *highs), _ = job.params
        others = tuple(map(slice, lows, highs))
        at = cast("Array", starts[:, None] + np.arange(size))
        shared = job.operands[0].form == "shared"
        if shared and size == 1 and starts.tolist() == list(range(starts[0], starts[-1] + 1)):

            def compute(_: _Sizes, x: Array) -> Array:  # without a copy
                return x[slice(starts[0], starts[-1] + 1), *others][:, None]
        elif shared:

            def compute(_: _Sizes, x: Array) -> Array:
                return x[slice(None), *others][at]
        else:
            members = np.arange(len(starts))[:, None]

            def compute(_: _Sizes, x: Array) -> Array:
                return x[slice(None), slice(None), *others][members, at]

        return self._step(compute, [job.operands[0].value], kind)

    # Groups of rows

    def _of_rows(self, job: _Job) -> Value:
        if job.name == "dim_as_value":
            return self._lengths_of(job)
        ragged = bool(job.shape) and type(job.shape[0]) is _Text
        if ragged:
            kind = _Kind(job.rows, str(job.shape[0]), tuple(job.shape[1:]), len(job.rows))
            made = self._to_rows(job, kind)
        else:
            kind = _Kind(None, "", cast("tuple[int, ...]", job.shape), len(job.rows))
            made = self._from_rows(job, kind)
        return self._one_by_one(job, kind) if made is None else made

    def _to_rows(self, job: _Job, kind: _Kind) -> Value | None:
        if job.name in _ELEMENTWISE or (job.name == "dot_general" and _scales(job)):
            return self._elements(job, kind)
        match job.name:
            case "broadcast_in_dim":
                return self._broadcast(job, kind)
            case "gather":
                return self._gathered_rows(job, kind)
            case "scatter-add":
                return self._scattered(job, kind)
            case "dynamic_update_slice":
                return self._updated(job, kind)
            case "iota" if len(job.shape) == 1:
                return self._counted(job, kind)
            case _:
                return self._along(job, kind)

    def _from_rows(self, job: _Job, kind: _Kind) -> Value | None:
        if job.operands[0].form != "rows":
            return None
        if job.name in _REDUCING:
            return self._reduced(job, kind)
        if job.name == "dot_general":
            return self._dot(job, kind)
        if job.name in ("dynamic_slice", "gather"):
            return self._picked(job, kind)
        return None

    def _one_by_one(self, job: _Job, kind: _Kind) -> Value:
        """Operations along a row, one row after the other."""
        reads = [self.full(operand.value, job.rows) for operand in job.operands]
        forms = [(operand.form, str(next(iter(operand.shape), ""))) for operand in job.operands]
        rows, params = job.rows, job.params
        join: Any = np.stack if kind.rows is None else np.concatenate

        def compute(sizes: _Sizes, *values: Array) -> Array:
            operands: list[Any] = []
            for x, (form, size) in zip(values, forms, strict=True):
                if form == "rows":
                    x = [x[a:b] for a, b in itertools.pairwise(sizes.cuts(rows, size).at)]
                operands.append(itertools.repeat(x) if form == "shared" else x)

            def result(row: int, *own: Array) -> Array:
                return job.rule(*own, *_filled(params, lambda text: int(sizes.of(text)[row])))

            return np.asarray(join(list(map(result, rows, *operands))), job.dtype)

        return self._step(compute, reads, kind)

    def _lengths_of(self, job: _Job) -> Value:
        text, rows = job.params[0], list(job.rows)

        def compute(sizes: _Sizes) -> Array:
            return np.asarray(sizes.of(text)[rows], job.dtype)

        return self._step(compute, [], _Kind(None, "", (), len(rows)))

    def _flat_rows(self, operand: _Operand, job: _Job) -> tuple[Value, str]:
        """An operand of rows with all its numbers, and the size of each row in it."""
        return self.full(operand.value, job.rows), str(operand.shape[0])

    def _elements(self, job: _Job, kind: _Kind) -> Value:
        reads: list[Value] = []
        rank = len(job.shape)
        # The shapes of operands behind the axis of tokens, but for those that are one number.
        behind: list[tuple[int, ...]] = []
        has_tokens = False
        for operand in job.operands:
            value, trailing = operand.value, tuple(operand.shape[1:])
            if operand.form == "stack":
                trailing = trailing if operand.shape else (1,) * (rank - 1)
                value = self._spread(value, trailing, job.rows, kind.size)
            is_number = self.kinds[value].uniform or not operand.shape
            if operand.form == "stack" or not is_number:
                behind.append(trailing)
                has_tokens = has_tokens or operand.form != "shared"
            reads.append(value)
        if job.name == "dot_general":
            job = job._replace(rule=np.multiply, params=())
        compute = _elementwise(job, [None] * len(reads))
        if not behind:
            return self._step(compute, reads, kind._replace(uniform=True), by_tokens=True)
        if has_tokens and np.broadcast_shapes(*behind) == kind.trailing:
            return self._step(compute, reads, kind, by_tokens=True)

        # An axis of one number is repeated for an operand of which one number stands for all.
        def repeated(sizes: _Sizes, *values: Array) -> Array:
            total = sizes.cuts(job.rows, kind.size).at[-1]
            return np.broadcast_to(compute(sizes, *values), (total, *kind.trailing))

        return self._step(repeated, reads, kind)

    def _broadcast(self, job: _Job, kind: _Kind) -> Value:
        operand, dims = job.operands[0], job.params[1]
        value, trailing = operand.value, kind.trailing
        if (operand.form == "shared" and not operand.shape) or self.kinds[value].uniform:
            return self._step(_itself, [value], kind._replace(uniform=True))
        if operand.form == "shared":

            def compute(sizes: _Sizes, x: Array) -> Array:
                total = sizes.cuts(job.rows, kind.size).at[-1]
                return job.rule(x, (total, *trailing), dims)

            return self._step(compute, [value], kind)
        if operand.form == "stack":  # each is repeated along its row
            kept = [1] * len(job.shape)
            for size, axis in zip(operand.shape, dims, strict=True):
                kept[axis] = size
            value = self._spread(value, tuple(kept[1:]), job.rows, kind.size)
            dims = tuple(range(len(kept)))
            if tuple(kept[1:]) == trailing:
                return value

        def along(_: _Sizes, x: Array) -> Array:
            return job.rule(x, (len(x), *trailing), dims)

        return self._step(along, [value], kind)

    def _along(self, job: _Job, kind: _Kind) -> Value | None:
        """Operations that leave the axis of tokens as it is."""
        params = _of_rows(job.name, job.params)
        if params is None or job.operands[0].form != "rows":
            return None
        value, size = self._flat_rows(job.operands[0], job)
        if size != kind.size and job.name != "reshape":
            return None
        others = [operand.value for operand in job.operands[1:]]
        if any(operand.form != "shared" for operand in job.operands[1:]):
            return None
        job = job._replace(params=params)
        return self._step(
            _elementwise(job, [None]), [value, *others], kind, by_tokens=size == kind.size
        )

    def _reduced(self, job: _Job, kind: _Kind) -> Value:
        value, size = self._flat_rows(job.operands[0], job)
        rest = tuple(axis for axis in job.params[0] if axis)
        reduce, empty = _REDUCING[job.name]

        def compute(sizes: _Sizes, x: Array) -> Array:
            if rest:
                x = job.rule(x, rest)
            return np.asarray(_by_rows(reduce, empty, x, sizes.cuts(job.rows, size)), job.dtype)

        return self._step(compute, [value], kind)

    def _dot(self, job: _Job, kind: _Kind) -> Value | None:
        a, b = job.operands
        if job.params[0] != (((0,), (0,)), ((), ())) or len(a.shape) > 1 or len(b.shape) > 1:
            return None
        if b.form != "rows":
            return None
        (x, size), (y, _) = self._flat_rows(a, job), self._flat_rows(b, job)

        def compute(sizes: _Sizes, x: Array, y: Array) -> Array:
            return np.asarray(_by_rows(np.add, 0, x * y, sizes.cuts(job.rows, size)), job.dtype)

        return self._step(compute, [x, y], kind)

    def _counted(self, job: _Job, kind: _Kind) -> Value:
        def compute(sizes: _Sizes) -> Array:
            cuts = sizes.cuts(job.rows, kind.size)
            counted = np.arange(cuts.at[-1]) - np.repeat(cuts.places[:-1], cuts.lengths)
            return np.asarray(counted, job.dtype)

        return self._step(compute, [], kind)

    def _picked(self, job: _Job, kind: _Kind) -> Value | None:
        """A window of fixed size of each row."""
        operand, at = job.operands[0], job.operands[1]
        window = _window(job, operand.shape)
        if window is None or type(window.size) is _Text:
            return None
        value, length = self._flat_rows(operand, job)

        def compute(sizes: _Sizes, x: Array, *starts: Array) -> Array:
            cuts = sizes.cuts(job.rows, length)
            places = _places(cuts, window.size, window.start, starts)
            return x[slice(None), *window.others][places].reshape(len(job.rows), *kind.trailing)

        reads = [value] if window.start is not None else [value, at.value]
        return self._step(compute, reads, kind)

    def _gathered_rows(self, job: _Job, kind: _Kind) -> Value | None:
        """A window of each row that is as long as the row, or shorter by a number."""
        operand = job.operands[0]
        window = _window(job, operand.shape)
        if window is None or type(window.size) is not _Text or window.start is None:
            return None
        value, length = self._flat_rows(operand, job)
        start = window.start

        def compute(sizes: _Sizes, x: Array) -> Array:
            x = x[slice(None), *window.others]
            if kind.size != length:
                cuts, ours = sizes.cuts(job.rows, length), sizes.cuts(job.rows, kind.size)
                lows = np.minimum(max(start, 0), cuts.lengths - ours.lengths) + cuts.places[:-1]
                ends = lows + ours.lengths
                pieces = [x[a:b] for a, b in zip(lows.tolist(), ends.tolist(), strict=True)]
                x = np.concatenate(pieces)
            return x.reshape(-1, *kind.trailing)

        return self._step(compute, [value], kind)

    def _scattered(self, job: _Job, kind: _Kind) -> Value | None:
        """Adds to a window of each row."""
        operand, _, update = job.operands
        window = _window(job, operand.shape, update.shape)
        if operand.form != "rows" or update.form != "rows" or window is None:
            return None
        if window.start is None or type(window.size) is not _Text:
            return None
        (value, _), (added, size), start = (
            self._flat_rows(operand, job),
            self._flat_rows(update, job),
            window.start,
        )

        def compute(sizes: _Sizes, x: Array, update: Array) -> Array:
            out = np.array(x)
            view = out[slice(None), *window.others]
            update = update.reshape(-1, *view.shape[1:])
            if size == kind.size:
                view += update
                return out
            cuts, theirs = sizes.cuts(job.rows, kind.size), sizes.cuts(job.rows, size)
            lows = np.minimum(max(start, 0), cuts.lengths - theirs.lengths) + cuts.places[:-1]
            for low, first, last in zip(lows.tolist(), theirs.at, theirs.at[1:], strict=False):
                view[low : low + last - first] += update[first:last]
            return out

        return self._step(compute, [value, added], kind)

    def _updated(self, job: _Job, kind: _Kind) -> Value | None:
        """Replaces a window of fixed size of each row."""
        operand, update, at = job.operands[:3]
        window = _window(job, operand.shape, update.shape)
        if operand.form != "rows" or update.form == "rows" or window is None:
            return None
        if type(window.size) is _Text:
            return None
        value, length = self._flat_rows(operand, job)

        def compute(sizes: _Sizes, x: Array, update: Array, *starts: Array) -> Array:
            out = np.array(x)
            cuts = sizes.cuts(job.rows, length)
            out[_places(cuts, window.size, window.start, starts)] = update
            return out

        return self._step(compute, [value, update.value, at.value], kind)


class _Operand(NamedTuple):
    """An operand of all members of a group.

    Args:
        form: ``"shared"``, the same for all; ``"stack"``, of a fixed shape; ``"rows"``.
        value: its array.
        shape: of one of them, with sizes as texts.
        constant: what it always is, if it is shared and that is known.
    """

    form: str
    value: Value
    shape: tuple[Any, ...]
    constant: Array | None = None


class _Job(NamedTuple):
    """A group that is to be one operation.

    Args:
        group: its members, in order.
        name: of the primitive.
        rule: for one of them.
        params: of the rule, with sizes as texts.
        operands: of all of them.
        rows: of each, :data:`_FIXED` where there is none.
        shape: of the result of one of them, with sizes as texts.
        dtype: of the result.
    """

    group: Sequence[_Known]
    name: str
    rule: interpreted.Rule
    params: tuple[Any, ...]
    operands: Sequence[_Operand]
    rows: Rows
    shape: tuple[Any, ...]
    dtype: Any


def _elementwise(job: _Job, shapes: Sequence[tuple[int, ...] | None]) -> Compute:
    rule, params, dtype = job.rule, job.params, job.dtype

    def plain(_: _Sizes, *values: Array) -> Array:
        return np.asarray(rule(*values, *params), dtype)

    def reshaped(_: _Sizes, *values: Array) -> Array:
        shaped = [
            x if shape is None else x.reshape(shape)
            for x, shape in zip(values, shapes, strict=True)
        ]
        return np.asarray(rule(*shaped, *params), dtype)

    return reshaped if any(shape is not None for shape in shapes) else plain


def _itself(_: _Sizes, x: Array) -> Array:
    return x


def _member(index: int) -> Compute:
    def compute(_: _Sizes, x: Array) -> Array:
        return x[index]

    return compute


def _shaped(shape: tuple[int, ...]) -> Compute:
    def compute(_: _Sizes, x: Array) -> Array:
        return x.reshape(shape)

    return compute


def _chosen(indices: list[int]) -> Any:
    """An index for members, a slice where that is enough, because that copies nothing."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step and all(b - a == step for a, b in itertools.pairwise(indices)):
        end = indices[-1] + (1 if step > 0 else -1)
        return slice(indices[0], end if end >= 0 else None, step)
    return np.array(indices)


def _by_rows(reduce: Any, empty: Any, x: Array, cuts: _Cuts) -> Array:
    """Reduces the first axis, row by row."""
    places = cuts.places[:-1]
    if cuts.lengths.all():
        return reduce.reduceat(x, places, 0)
    some = cuts.lengths > 0  # reduceat gives the next number for an empty row
    out = np.full((len(places), *x.shape[1:]), empty, x.dtype)
    if some.any():
        out[some] = reduce.reduceat(x, places[some], 0)
    return out


class _Window(NamedTuple):
    """A window of a row.

    Args:
        size: along the row, perhaps as a text.
        start: along the row, if it is the same number for all.
        others: the window's place along the other axes.
    """

    size: Any
    start: int | None
    others: tuple[slice, ...]


def _window(job: _Job, shape: tuple[Any, ...], update: tuple[Any, ...] = ()) -> _Window | None:
    """Reads the window of a gather, of a slice, or of an update."""
    if job.name in ("dynamic_slice", "dynamic_update_slice"):
        sizes = job.params[0] if job.name == "dynamic_slice" else update
        if tuple(sizes[1:]) != tuple(shape[1:]):
            return None
        return _Window(sizes[0], None, ())
    at, numbers = job.operands[1].constant, job.params[-1]
    if at is None or at.ndim != 1:
        return None
    if job.name == "gather":
        sizes, axes = list(job.params[0]), numbers.start_index_map
    else:
        sizes, axes = list(update), numbers.scatter_dims_to_operand_dims
        for axis in sorted(numbers.inserted_window_dims):
            sizes.insert(axis, 1)
    starts = [0] * len(shape)
    for axis, start in zip(axes, at.tolist(), strict=True):
        starts[axis] = start
    # XLA moves a window so that it lies within the array.
    others = [
        slice(low := min(max(start, 0), n - size), low + size)
        for start, size, n in zip(starts[1:], sizes[1:], shape[1:], strict=True)
    ]
    return _Window(sizes[0], starts[0], tuple(others))


def _places(cuts: _Cuts, size: int, start: int | None, starts: Sequence[Array]) -> Array:
    """The places of a window in each row, ``[rows, size]``."""
    first = np.asarray(starts[0] if start is None else start, np.int64)
    low = np.minimum(np.maximum(first, 0), cuts.lengths - size)
    return (cuts.places[:-1] + low)[:, None] + np.arange(size)


def _scales(job: _Job) -> bool:
    """Tells whether a product is one of a number for each row and the row."""
    ranks = sorted(len(operand.shape) for operand in job.operands)
    return job.params[0] == (((), ()), ((), ())) and ranks[0] == 0 and len(job.shape) == ranks[1]


_ALIASES = frozenset({"copy", "copy_p", "optimization_barrier", "stop_gradient"})
_ADDING = frozenset({"add", "add_any", "sub"})

_ELEMENTWISE = frozenset(
    {
        *("abs", "add", "add_any", "and", "ceil", "clamp", "convert_element_type", "cos", "div"),
        *("eq", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le"),
        *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
        *("rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh", "xor"),
    }
)

_REDUCING: dict[str, tuple[Any, Any]] = {
    "reduce_and": (np.logical_and, True),
    "reduce_max": (np.maximum, -np.inf),
    "reduce_min": (np.minimum, np.inf),
    "reduce_or": (np.logical_or, False),
    "reduce_prod": (np.multiply, 1),
    "reduce_sum": (np.add, 0),
}
"""How to reduce rows, and what an empty one gives."""


def _up(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)


def _of_stack(name: str, count: int, params: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The parameters of an operation on a stack of so many members, from those on one of them.

    Returns:
        None if there is no such operation.
    """
    if name in (*_REDUCING, "argmax", "argmin", "rev", "squeeze"):
        return (_up(params[0]),)
    if name in ("concatenate", "stack", *_CUMULATIVE):
        return (params[0] + 1, *params[1:])
    match name, params:
        case "broadcast_in_dim", (shape, dims):
            return (count, *shape), (0, *_up(dims))
        case "dot_general", (((ca, cb), (ba, bb)),):
            return (((_up(ca), _up(cb)), ((0, *_up(ba)), (0, *_up(bb)))),)
        case "pad", (config,):
            return (((0, 0, 0), *config),)
        case "reshape", (shape,):
            return ((count, *shape),)
        case "transpose", (axes,):
            return ((0, *_up(axes)),)
        case _:
            return None


def _of_rows(name: str, params: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The parameters of an operation on all rows, from those on one of them.

    Returns:
        None if there is no such operation, as where it goes along a row.
    """
    if name in (*_REDUCING, "argmax", "argmin", "rev", "squeeze"):
        return None if 0 in params[0] else params
    if name in _CUMULATIVE:
        return params if params[0] > 0 else None
    match name, params:
        case "dot_general", (((along, _), ((), ())),):
            return None if 0 in along else params
        case "reshape", (shape,):
            return None if _has_text(shape[1:]) else ((-1, *shape[1:]),)
        case "transpose", (axes,):
            return params if axes[0] == 0 else None
        case _:
            return None


_CUMULATIVE = ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")
