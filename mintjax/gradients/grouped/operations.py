"""One NumPy operation for the equations of all rows that are alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from mintjax.gradients import interpreted
from mintjax.gradients.flat import Equation, Slot
from mintjax.gradients.grouped.arrays import Arrays
from mintjax.gradients.grouped.sizes import Cuts, Rows, Sizes, Text, filled, has_text
from mintjax.gradients.grouped.steps import Array, Compute, Kind, Value


class Known(NamedTuple):
    """An equation, and all by which it is one of a group.

    Args:
        equation: in the program.
        inputs: its operands, of which those that are the same are one.
        row: the row whose length it has; :data:`FIXED` or :data:`MIXED`.
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


class Operand(NamedTuple):
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


class Job(NamedTuple):
    """A group that is to be one operation.

    Args:
        group: its members, in order.
        name: of the primitive.
        rule: for one of them.
        params: of the rule, with sizes as texts.
        operands: of all of them.
        rows: of each, :data:`FIXED` where there is none.
        shape: of the result of one of them, with sizes as texts.
        dtype: of the result.
    """

    group: Sequence[Known]
    name: str
    rule: interpreted.Rule
    params: tuple[Any, ...]
    operands: Sequence[Operand]
    rows: Rows
    shape: tuple[Any, ...]
    dtype: Any


class Operations(Arrays):
    """Makes the step of a group."""

    # Groups of a fixed shape

    def _of_stacks(self, job: Job) -> Value | None:
        count, shape = len(job.group), cast("tuple[int, ...]", job.shape)
        kind = Kind(None, "", shape, count)
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

        def compute(_: Sizes, *values: Array) -> Array:
            values = tuple(
                np.broadcast_to(x, (count, *x.shape)) if same else x
                for x, same in zip(values, shared, strict=True)
            )
            return np.asarray(job.rule(*values, *params), job.dtype)

        return self._step(compute, reads, kind)

    def _slices(self, job: Job, kind: Kind) -> Value:
        starts: Array = np.array([found.start for found in job.group])
        (_, *lows), (size, *highs), _ = job.params
        others = tuple(map(slice, lows, highs))
        at = cast("Array", starts[:, None] + np.arange(size))
        shared = job.operands[0].form == "shared"
        if shared and size == 1 and starts.tolist() == list(range(starts[0], starts[-1] + 1)):

            def compute(_: Sizes, x: Array) -> Array:  # without a copy
                return x[slice(starts[0], starts[-1] + 1), *others][:, None]
        elif shared:

            def compute(_: Sizes, x: Array) -> Array:
                return x[slice(None), *others][at]
        else:
            members = np.arange(len(starts))[:, None]

            def compute(_: Sizes, x: Array) -> Array:
                return x[slice(None), slice(None), *others][members, at]

        return self._step(compute, [job.operands[0].value], kind)

    # Groups of rows

    def _of_rows(self, job: Job) -> Value:
        if job.name == "dim_as_value":
            return self._lengths_of(job)
        ragged = bool(job.shape) and type(job.shape[0]) is Text
        if ragged:
            kind = Kind(job.rows, str(job.shape[0]), tuple(job.shape[1:]), len(job.rows))
            made = self._to_rows(job, kind)
        else:
            kind = Kind(None, "", cast("tuple[int, ...]", job.shape), len(job.rows))
            made = self._from_rows(job, kind)
        return self._one_by_one(job, kind) if made is None else made

    def _to_rows(self, job: Job, kind: Kind) -> Value | None:
        if job.name in _ELEMENTWISE or (job.name == "dot_general" and _scales(job)):
            return self._elements(job, kind)
        match job.name:
            case "broadcast_in_dim":
                return self._broadcast(job, kind)
            case "gather":
                made = self._gathered_rows(job, kind)
                return self._indexed(job, kind) if made is None else made
            case "scatter-add":
                made = self._scattered(job, kind)
                return self._indexed(job, kind) if made is None else made
            case "scatter" | "scatter-max" | "scatter-min" | "scatter-mul":
                return self._indexed(job, kind)
            case "dynamic_update_slice":
                return self._updated(job, kind)
            case "iota" if len(job.shape) == 1:
                return self._counted(job, kind)
            case _:
                return self._along(job, kind)

    def _from_rows(self, job: Job, kind: Kind) -> Value | None:
        if job.operands[0].form != "rows":
            return None
        if job.name in _REDUCING:
            return self._reduced(job, kind)
        if job.name == "dot_general":
            return self._dot(job, kind)
        if job.name in ("dynamic_slice", "gather"):
            return self._picked(job, kind)
        return None

    def _one_by_one(self, job: Job, kind: Kind) -> Value:
        """Operations along a row, one row after the other."""
        reads = [self.full(operand.value, job.rows) for operand in job.operands]
        forms = [(operand.form, str(next(iter(operand.shape), ""))) for operand in job.operands]
        rows, params = job.rows, job.params
        join: Any = np.stack if kind.rows is None else np.concatenate

        def compute(sizes: Sizes, *values: Array) -> Array:
            operands: list[Any] = []
            for x, (form, size) in zip(values, forms, strict=True):
                if form == "rows":
                    x = [x[a:b] for a, b in itertools.pairwise(sizes.cuts(rows, size).at)]
                operands.append(itertools.repeat(x) if form == "shared" else x)

            def result(row: int, *own: Array) -> Array:
                return job.rule(*own, *filled(params, lambda text: int(sizes.of(text)[row])))

            return np.asarray(join(list(map(result, rows, *operands))), job.dtype)

        return self._step(compute, reads, kind)

    def _lengths_of(self, job: Job) -> Value:
        text, rows = job.params[0], list(job.rows)

        def compute(sizes: Sizes) -> Array:
            return interpreted.narrowed(sizes.of(text)[rows], job.dtype)

        return self._step(compute, [], Kind(None, "", (), len(rows)))

    def _flat_rows(self, operand: Operand, job: Job) -> tuple[Value, str]:
        """Returns an operand of rows with all its numbers, and the size of each row in it."""
        return self.full(operand.value, job.rows), str(operand.shape[0])

    def _elements(self, job: Job, kind: Kind) -> Value:
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
        def repeated(sizes: Sizes, *values: Array) -> Array:
            total = sizes.cuts(job.rows, kind.size).at[-1]
            return np.broadcast_to(compute(sizes, *values), (total, *kind.trailing))

        return self._step(repeated, reads, kind)

    def _broadcast(self, job: Job, kind: Kind) -> Value:
        operand, dims = job.operands[0], job.params[1]
        value, trailing = operand.value, kind.trailing
        if (operand.form == "shared" and not operand.shape) or self.kinds[value].uniform:
            return self._step(_itself, [value], kind._replace(uniform=True))
        if operand.form == "shared":

            def compute(sizes: Sizes, x: Array) -> Array:
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

        def along(_: Sizes, x: Array) -> Array:
            return job.rule(x, (len(x), *trailing), dims)

        return self._step(along, [value], kind)

    def _along(self, job: Job, kind: Kind) -> Value | None:
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

    def _reduced(self, job: Job, kind: Kind) -> Value:
        value, size = self._flat_rows(job.operands[0], job)
        rest = tuple(axis for axis in job.params[0] if axis)
        reduce, empty = _REDUCING[job.name]

        def compute(sizes: Sizes, x: Array) -> Array:
            if rest:
                x = job.rule(x, rest)
            return _by_rows(reduce, empty, x, sizes.cuts(job.rows, size), job.dtype)

        return self._step(compute, [value], kind)

    def _dot(self, job: Job, kind: Kind) -> Value | None:
        a, b = job.operands
        if job.params[0] != (((0,), (0,)), ((), ())) or len(a.shape) > 1 or len(b.shape) > 1:
            return None
        if b.form != "rows" or job.dtype.kind != "f":
            return None
        (x, size), (y, _) = self._flat_rows(a, job), self._flat_rows(b, job)

        def compute(sizes: Sizes, x: Array, y: Array) -> Array:
            return _by_rows(np.add, 0, x * y, sizes.cuts(job.rows, size), job.dtype)

        return self._step(compute, [x, y], kind)

    def _counted(self, job: Job, kind: Kind) -> Value:
        def compute(sizes: Sizes) -> Array:
            cuts = sizes.cuts(job.rows, kind.size)
            counted = np.arange(cuts.at[-1]) - np.repeat(cuts.places[:-1], cuts.lengths)
            return np.asarray(counted, job.dtype)

        return self._step(compute, [], kind)

    def _picked(self, job: Job, kind: Kind) -> Value | None:
        """Takes a window of fixed size of each row."""
        operand, at = job.operands[0], job.operands[1]
        window = _window(job, operand.shape)
        if window is None or type(window.size) is Text:
            return None
        value, length = self._flat_rows(operand, job)

        def compute(sizes: Sizes, x: Array, *starts: Array) -> Array:
            cuts = sizes.cuts(job.rows, length)
            places = _places(cuts, window.size, window.start, starts)
            return x[slice(None), *window.others][places].reshape(len(job.rows), *kind.trailing)

        reads = [value] if window.start is not None else [value, at.value]
        return self._step(compute, reads, kind)

    def _gathered_rows(self, job: Job, kind: Kind) -> Value | None:
        """Takes a window of each row that is as long as the row, or shorter by a number."""
        operand = job.operands[0]
        window = _window(job, operand.shape)
        if window is None or type(window.size) is not Text or window.start is None:
            return None
        value, length = self._flat_rows(operand, job)
        start = window.start

        def compute(sizes: Sizes, x: Array) -> Array:
            x = x[slice(None), *window.others]
            if kind.size != length:
                cuts, ours = sizes.cuts(job.rows, length), sizes.cuts(job.rows, kind.size)
                lows = np.minimum(max(start, 0), cuts.lengths - ours.lengths) + cuts.places[:-1]
                ends = lows + ours.lengths
                pieces = [x[a:b] for a, b in zip(lows.tolist(), ends.tolist(), strict=True)]
                x = np.concatenate(pieces)
            return x.reshape(-1, *kind.trailing)

        return self._step(compute, [value], kind)

    def _indexed(self, job: Job, kind: Kind) -> Value | None:
        """Takes or changes tokens of each row, by indices that are rows, too."""
        if any(operand.form != "rows" for operand in job.operands):
            return None
        flat = [self._flat_rows(operand, job) for operand in job.operands]
        reads, (length, size) = [value for value, _ in flat], (flat[0][1], flat[1][1])
        index = _index_of(job)
        if index.batched and length == size:  # each token has an index of its own

            def batched(_: Sizes, *values: Array) -> Array:
                return np.asarray(job.rule(*values, *job.params), job.dtype)

            return self._step(batched, reads, kind)
        if index.axis is None or index.batched:
            return None
        axis = index.axis

        def compute(sizes: Sizes, x: Array, at: Array, *updates: Array) -> Array:
            cuts, theirs = sizes.cuts(job.rows, length), sizes.cuts(job.rows, size).lengths
            behind = (-1,) + (1,) * (at.ndim - 2)
            first = cast("Array", np.repeat(cuts.places[:-1], theirs)).reshape(behind)
            last = cast("Array", np.repeat(cuts.lengths, theirs)).reshape(behind) - 1
            if (last < 0).any():
                raise IndexError("an index of a row that is empty")
            at = at.astype(np.int64)
            own = at[..., axis]
            moved = np.minimum(np.maximum(own, 0), last)
            place = first + moved
            at[..., axis] = place if index.moves else np.where(moved == own, place, -1)
            return np.asarray(job.rule(x, at, *updates, *job.params), job.dtype)

        return self._step(compute, reads, kind)

    def _scattered(self, job: Job, kind: Kind) -> Value | None:
        """Adds to a window of each row."""
        operand, _, update = job.operands
        window = _window(job, operand.shape, update.shape)
        if operand.form != "rows" or update.form != "rows" or window is None:
            return None
        if window.start is None or type(window.size) is not Text:
            return None
        (value, _), (added, size), start = (
            self._flat_rows(operand, job),
            self._flat_rows(update, job),
            window.start,
        )

        def compute(sizes: Sizes, x: Array, update: Array) -> Array:
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

    def _updated(self, job: Job, kind: Kind) -> Value | None:
        """Replaces a window of fixed size of each row."""
        operand, update, at = job.operands[:3]
        window = _window(job, operand.shape, update.shape)
        if operand.form != "rows" or update.form == "rows" or window is None:
            return None
        if type(window.size) is Text:
            return None
        value, length = self._flat_rows(operand, job)

        def compute(sizes: Sizes, x: Array, update: Array, *starts: Array) -> Array:
            out = np.array(x)
            cuts = sizes.cuts(job.rows, length)
            out[_places(cuts, window.size, window.start, starts)] = update
            return out

        return self._step(compute, [value, update.value, at.value], kind)


def _elementwise(job: Job, shapes: Sequence[tuple[int, ...] | None]) -> Compute:
    rule, params, dtype = job.rule, job.params, job.dtype

    def plain(_: Sizes, *values: Array) -> Array:
        return np.asarray(rule(*values, *params), dtype)

    def reshaped(_: Sizes, *values: Array) -> Array:
        shaped = [
            x if shape is None else x.reshape(shape)
            for x, shape in zip(values, shapes, strict=True)
        ]
        return np.asarray(rule(*shaped, *params), dtype)

    return reshaped if any(shape is not None for shape in shapes) else plain


def _itself(_: Sizes, x: Array) -> Array:
    return x


def _by_rows(reduce: Any, empty: Any, x: Array, cuts: Cuts, dtype: Any) -> Array:
    """Reduces the first axis, row by row."""
    if x.dtype.kind == "i":
        return interpreted.narrowed(_reduceat(reduce, empty, x.astype(np.int64), cuts), dtype)
    return np.asarray(_reduceat(reduce, empty, x, cuts), dtype)


def _reduceat(reduce: Any, empty: Any, x: Array, cuts: Cuts) -> Array:
    places = cuts.places[:-1]
    if cuts.lengths.all():
        return reduce.reduceat(x, places, 0)
    some = cuts.lengths > 0  # reduceat gives the next number for an empty row
    out = np.full((len(places), *x.shape[1:]), empty, x.dtype)
    if some.any():
        out[some] = reduce.reduceat(x, places[some], 0)
    return out


class _Index(NamedTuple):
    """The way in which a gather or a scatter goes along a row.

    Args:
        batched: whether each token has indices of its own.
        axis: the place of the row's axis in an index; None if it is not a token that is indexed.
        moves: whether an index that is out of bounds is moved, or else fails.
    """

    batched: bool
    axis: int | None
    moves: bool


def _index_of(job: Job) -> _Index:
    if job.name == "gather":
        _, numbers, mode, _ = job.params
        batches, axes = numbers.start_indices_batching_dims, list(numbers.start_index_map)
        single, window = numbers.collapsed_slice_dims, numbers.offset_dims
        moves = "FILL" not in str(mode)
    else:
        numbers, mode = job.params
        batches, axes = numbers.scatter_indices_batching_dims, numbers.scatter_dims_to_operand_dims
        single, window = numbers.inserted_window_dims, numbers.update_window_dims
        moves = "CLIP" in str(mode)
    batched = list(zip(numbers.operand_batching_dims, batches, strict=True))
    tokens = 0 in single and 0 in axes and 0 not in window and not batched
    return _Index(
        (0, 0) in batched and 0 not in window, list(axes).index(0) if tokens else None, moves
    )


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


def _window(job: Job, shape: tuple[Any, ...], update: tuple[Any, ...] = ()) -> _Window | None:
    """Reads the window of a gather, of a slice, or of an update."""
    if job.name in ("dynamic_slice", "dynamic_update_slice"):
        sizes = job.params[0] if job.name == "dynamic_slice" else update
        if tuple(sizes[1:]) != tuple(shape[1:]):
            return None
        return _Window(sizes[0], None, ())
    at, (numbers, mode) = job.operands[1].constant, job.params[job.name == "gather" :][:2]
    if at is None or at.ndim != 1 or "PROMISE" not in str(mode):
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


def _places(cuts: Cuts, size: int, start: int | None, starts: Sequence[Array]) -> Array:
    """Computes the places of a window in each row, ``[rows, size]``."""
    first = np.asarray(starts[0] if start is None else start, np.int64)
    low = np.minimum(np.maximum(first, 0), cuts.lengths - size)
    return (cuts.places[:-1] + low)[:, None] + np.arange(size)


def _scales(job: Job) -> bool:
    """Tells whether a product is one of a number for each row and the row."""
    ranks = sorted(len(operand.shape) for operand in job.operands)
    return job.params[0] == (((), ()), ((), ())) and ranks[0] == 0 and len(job.shape) == ranks[1]


_ELEMENTWISE = frozenset(
    {
        *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"),
        *(
            "atanh",
            "cbrt",
            "ceil",
            "clamp",
            "convert_element_type",
            "cos",
            "cosh",
            "digamma",
            "div",
        ),
        *("erf", "erf_inv", "erfc", "lgamma", "rem", "round", "sinh", "tan"),
        *("eq", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le"),
        *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow"),
        *("one_minus_square", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "sub", "tanh"),
        "xor",
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
    """Makes the parameters of an operation on a stack of so many members, from those on one.

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
    """Makes the parameters of an operation on all rows, from those on one of them.

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
            return None if has_text(shape[1:]) else ((-1, *shape[1:]),)
        case "transpose", (axes,):
            return params if axes[0] == 0 else None
        case _:
            return None


_CUMULATIVE = ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")
