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

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from mintjax.gradients import interpreted
from mintjax.gradients.flat import Equation, Flat, Slot
from mintjax.gradients.grouped.arrays import Place, chosen_by, shaped_as
from mintjax.gradients.grouped.operations import Job, Known, Operand, Operations
from mintjax.gradients.grouped.sizes import FIXED, MIXED, Sizes, has_text, join_rows, without_row
from mintjax.gradients.grouped.steps import (
    Array,
    Kind,
    Step,
    Value,
    frees_of,
    in_pieces,
    needed_steps,
    shares_room,
)


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
    planner = _Planner(flat)
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
    steps = in_pieces(needed_steps(planner.steps, kept), planner.kinds, kept, piece)
    frees = frees_of(steps, kept)

    def run(arguments: Sequence[Any], lengths: Sequence[int]) -> tuple[list[Array], Array]:
        sizes = Sizes(np.asarray(lengths, np.int64))
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
        found = [*(values[value] for value in results), grads]
        # What is given out must outlive the next call.
        *others, grads = [np.array(x) if shares_room(x) else x for x in found]
        return others, grads

    return Grouped(run, len(steps))


class _Planner(Operations):
    """Finds the groups of a flat program, and makes their steps in order."""

    def __init__(self, flat: Flat) -> None:
        super().__init__(flat)
        self._groups: list[list[Known]] = []
        self._depths: list[int] = []
        self._sums: dict[int, list[tuple[int, Slot]]] = {}  # by the output of a chain

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
            if found.rule is not None and found.row != MIXED:
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

    def _look(self, equation: Equation) -> Known:
        inputs = tuple(self._same(slot) for slot in equation.inputs)
        rule = interpreted.rule_of(self._flat, equation)
        names = interpreted.READ.get(equation.name, ())
        row, params = without_row(tuple(equation.params[key] for key in names))
        for slot in (*inputs, *equation.outputs):
            row = join_rows(row, self._shape(slot)[0])
        start, parts = None, None
        if row == FIXED and equation.name == "slice" and set(params[2] or (1,)) == {1}:
            (start, *starts), (limit, *limits), _ = params
            params = ((0, *starts), (limit - start, *limits), None)
        if row == FIXED and equation.name == "unstack":
            parts = len(equation.outputs)
        if row == FIXED and equation.name == "split" and len(set(params[0])) == 1:
            parts = len(equation.outputs)
        return Known(equation, inputs, row, rule, params, start, parts)

    def _can_be_grouped(self, found: Known) -> bool:
        if found.rule is None or found.row == MIXED:
            return False
        slots = (*found.inputs, *found.equation.outputs)
        # A row's length is the first axis.
        if any(has_text(self._shape(slot)[1][1:]) for slot in slots):
            return False
        # Sums of 16 bits would not be exact enough.
        dtypes = [self._dtype(slot) for slot in slots]
        return all(dtype.kind in "biu" or dtype in (np.float32, np.float64) for dtype in dtypes)

    def _fold(self, found: Known) -> bool:
        """Computes what no input changes."""
        if found.row != FIXED or not all(slot in self._folded for slot in found.inputs):
            return False
        step = interpreted.step_of(self._flat, found.equation)
        try:
            with np.errstate(all="ignore"):
                results = step.compute([self._folded[slot] for slot in found.inputs], {})
        except OverflowError:  # as when it is run
            return False
        for slot, result in zip(found.equation.outputs, results, strict=True):
            self._folded[slot] = result
            self._classes[slot] = self._class_of_constant(slot)
        return True

    def _find_sums(self) -> None:
        """Finds chains of additions, whose links are alone because each has another before it."""
        uses = Counter(self._same(slot) for slot in self._flat.outputs)
        links: dict[Slot, Known] = {}
        for group in self._groups:
            for found in group:
                uses.update(found.inputs)
            found, output = group[0], group[0].equation.outputs[0]
            shapes = {self._shape(slot)[1] for slot in (*found.inputs, output)}
            adds = found.equation.name in _ADDING and found.row == FIXED
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

    def _terms(self, links: dict[Slot, Known], output: Slot) -> list[tuple[int, Slot]]:
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

    def _alone(self, found: Known) -> None:
        """Makes the step of an equation without company."""
        step = interpreted.step_of(self._flat, found.equation)
        reads = [self.whole(slot) for slot in found.inputs]
        writes = [self._value(Kind()) for _ in found.equation.outputs]
        for slot, value in zip(found.equation.outputs, writes, strict=True):
            self._places[slot] = Place(value, None)

        def compute(sizes: Sizes, *operands: Array) -> Sequence[Array]:
            return step.compute(operands, {text: sizes.one(text) for text in step.texts})

        self.steps.append(Step(compute, tuple(reads), tuple(writes), several=True))

    def _meet(self, group: Sequence[Known]) -> bool:
        """Makes the step of equations that make arrays of many, if that is the same as a stack."""
        first, count = group[0], len(group)
        shapes = {self._shape(slot)[1] for slot in first.inputs}
        row, whole = self._shape(first.equation.outputs[0])
        if first.equation.name not in ("stack", "concatenate") or first.params != (0,):
            return False
        if len(shapes) > 1 or row != FIXED:
            return False
        value = self.stack([slot for found in group for slot in found.inputs])
        shape = whole if count == 1 else (count, *whole)
        kind = Kind() if count == 1 else Kind(None, "", whole, count)
        value = self._step(shaped_as(shape), [value], kind)
        for i, found in enumerate(group):
            self._places[found.equation.outputs[0]] = Place(value, None if count == 1 else i)
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
            reads.append((value, sign, chosen_by(sorted(indices))))
        dtype = self._dtype(output)
        wide: Any = {"f": np.float64, "i": np.int64}.get(dtype.kind)

        def compute(_: Sizes, *values: Array) -> Array:
            total: Any = 0
            for x, (_value, sign, at) in zip(values, reads, strict=True):
                part = np.asarray(x, wide) if at is None else x[at].sum(0, dtype=wide)
                total = total + sign * part
            total = np.asarray(total)
            return interpreted.narrowed(total, dtype) if dtype.kind == "i" else total.astype(dtype)

        value = self._step(compute, [read[0] for read in reads], Kind())
        self._places[output] = Place(value, None)

    def _part(self, group: Sequence[Known]) -> None:
        """Makes the step that takes arrays apart, whose parts are members of one stack."""
        found, count = group[0], len(group)
        parts, axis = cast("int", found.parts), found.params[-1]
        shape = self._shape(found.equation.outputs[0])[1]
        alone = count == 1
        read = self.whole(found.inputs[0]) if alone else self.stack([g.inputs[0] for g in group])
        splits = found.equation.name == "split"

        def compute(_: Sizes, x: Array) -> Array:
            x = x.reshape(count, *x.shape[0 if alone else 1 :])
            if splits:
                x = x.reshape(*x.shape[: axis + 1], parts, -1, *x.shape[axis + 2 :])
            return np.moveaxis(x, axis + 1, 1).reshape(count * parts, *shape)

        value = self._step(compute, [read], Kind(None, "", shape, count * parts))
        for i, found in enumerate(group):
            for k, slot in enumerate(found.equation.outputs):
                self._places[slot] = Place(value, i * parts + k)

    def _together(self, group: list[Known]) -> bool:
        """Makes the step of a group, if there is a rule for it."""
        first = group[0]
        if first.row >= 0:
            group.sort(key=lambda found: found.row)
        else:
            group.sort(key=self._order)
        operands = [self._operand(group, k) for k in range(len(first.inputs))]
        output = first.equation.outputs[0]
        job = Job(
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
            self._places[found.equation.outputs[0]] = Place(made, i)
        return True

    def _order(self, found: Known) -> tuple[int, ...]:
        """Orders the members of a group as those of its operands are."""
        places = [self._places.get(slot) for slot in found.inputs]
        return tuple(
            [-1 if place is None or place.member is None else place.member for place in places]
        )

    def _operand(self, group: Sequence[Known], k: int) -> Operand:
        slots = [found.inputs[k] for found in group]
        shape = self._shape(slots[0])[1]
        if len(set(slots)) == 1:
            return Operand("shared", self.whole(slots[0]), shape, self._folded.get(slots[0]))
        if self._is_ragged(slots[0]):
            rows = tuple(found.row for found in group)
            return Operand("rows", self.together(slots, rows), shape)
        return Operand("stack", self.stack(slots), shape)


_ALIASES = frozenset({"copy", "copy_p", "optimization_barrier", "stop_gradient"})
_ADDING = frozenset({"add", "add_any", "sub"})
