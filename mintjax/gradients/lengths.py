"""Traces an objective that takes rows one by one, for all lengths at once.

The length of each row is a symbol (``jax.export.symbolic_shape``), shared by a datum's columns, and
every column is an argument. So one trace is good for every batch of as many datums with columns of
the same kinds, as long as the objective does not choose by a length: what needs a length as a
Python number, as ``range`` does, or compares one with a number, is not traced so. Where each row
has :data:`LONG` tokens, the symbols say so, and ``len(row) > 1`` is no choice.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import export

from mintjax.errors import DataError
from mintjax.gradients.contract import Metrics, evaluate, warn_of_no_gradient
from mintjax.gradients.dependence import are_zero
from mintjax.gradients.flat import Flat, flatten, is_symbolic, symbolic_sizes
from mintjax.gradients.identity import Identity
from mintjax.ragged.batch import Batch
from mintjax.types import Datum, ModelInput

Array: TypeAlias = Any


LONG = 16
"""Rows of so many tokens have symbols of their own."""


class NotForAllLengths(Exception):
    """An objective cannot be traced for all lengths at once; the message says why.

    Attributes:
        kinds: of the columns that were read before that, as in :class:`Trace`.
        line: the file and the line that choose by a length, if that is why.
    """

    kinds: Mapping[str, Any] = {}
    line: tuple[str, int] | None = None


class Trace(NamedTuple):
    """The gradient of an objective for one number of rows, of any lengths.

    Args:
        flat: its program. The inputs are the rows of logprobs, the parameters of the objective, and
            of each column in ``kinds`` the rows, in order. The outputs are leaves of ``tree``.
        tree: of ``((loss, metrics), gradients)``.
        kinds: of each column that it reads, what :func:`kind_of` gives.
        symbols: the names of the rows' lengths, in order.
        parameters: how many parameters there are.
    """

    flat: Flat
    tree: Any
    kinds: dict[str, Any]
    symbols: list[str]
    parameters: int

    @property
    def needs_logprobs(self) -> bool:
        """Tells whether the gradient depends on the logprobs."""
        rows = len(self.symbols)
        needed = set(self.flat.outputs[-rows:])
        for equation in reversed(self.flat.equations):
            if needed.intersection(equation.outputs):
                needed.update(equation.inputs)
        return bool(needed.intersection(self.flat.inputs[:rows]))

    def arguments(self, batch: Batch, rows: Sequence[Array], identity: Identity) -> list[Any]:
        """Lists the inputs of the program for a batch; the rows of a column are a list."""
        parameters = [[jnp_like(value)] for value in identity.parameters]
        return [rows, *parameters, *(batch.rows(name) for name in self.kinds)]


def jnp_like(value: Any) -> Array:
    """Gives a number as a NumPy array of the dtype that JAX has for it."""
    return np.asarray(value, jax.dtypes.canonicalize_dtype(np.result_type(value)))


def kind_of(batch: Batch, name: str) -> Any:
    """Reads a column's trailing shape, None if it holds one number per datum, and its dtype.

    Returns:
        None if the datums differ in it, if one lacks it, or if JAX cannot hold its numbers.
    """
    try:
        given = batch.given_rows(name)
        if len({row.dtype for row in given}) > 1:
            return None
        row = batch.rows(name)[0]
    except DataError:
        return None
    return (row.shape[1:] if row.ndim else None, row.dtype)


def trace(identity: Identity, batch: Batch, rows: Sequence[Array]) -> Trace:
    """Traces the value and the gradient of an objective for all lengths at once.

    Args:
        identity: of the objective.
        batch: B datums of the same columns, whose names and kinds are read.
        rows: their logprobs, of which the dtype and the trailing shape are read, and whether all
            are long.

    Raises:
        NotForAllLengths: the objective needs a length as a number, the value of a column, or
            something else that a datum of this kind does not have; or it raised an exception.
    """
    with _lock:
        return _trace(identity, batch, rows, _symbols[are_long(rows)])


def are_long(rows: Sequence[Array]) -> bool:
    """Tells whether each row has :data:`LONG` tokens."""
    return min(map(len, rows)) >= LONG


def _trace(identity: Identity, batch: Batch, rows: Sequence[Array], symbols: _Symbols) -> Trace:
    names = batch.names
    kinds = {name: kind for name in names if (kind := kind_of(batch, name)) is not None}
    notes = _Notes()
    sizes = symbols.first(len(rows))

    def shaped(size: Any, kind: Any) -> Any:
        trailing, dtype = kind
        shape = () if trailing is None else (size, *trailing)
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))

    row_kind = (rows[0].shape[1:], rows[0].dtype)
    logprobs = [shaped(size, row_kind) for size in sizes]
    columns = {name: [shaped(size, kind) for size in sizes] for name, kind in kinds.items()}

    def value(
        rows: Sequence[Any], parameters: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> tuple[Any, Metrics]:
        each = [{name: column[i] for name, column in columns.items()} for i in range(len(rows))]
        datums = [
            _datum(_Columns(names, own, notes), _Unread(size, notes))
            for own, size in zip(each, sizes, strict=True)
        ]
        data = cast("Any", _Data(names, datums, notes))
        return evaluate(identity.rebuild(parameters), data, cast("Any", _Rows(rows)))

    make: Any = jax.make_jaxpr(jax.value_and_grad(value, has_aux=True), return_shape=True)
    _observe(type(cast("object", sizes[0])))
    try:
        with _watch:
            closed, shape = _with_len(lambda: make(logprobs, identity.parameters, columns))
    except Exception as error:
        raise _refusal(batch, notes, _reason(error)) from error
    finally:
        if _watch.seen:
            symbols.renew()
    if notes.refused:
        raise _refusal(batch, notes, notes.refused)
    if _watch.seen:
        raise _choice(_watch.seen)
    if are_zero(closed.jaxpr, range(-len(rows), 0)):
        warn_of_no_gradient(identity.rebuild(identity.parameters))
    flat = flatten(closed)
    tree = cast("Any", jax.tree_util.tree_structure(shape))
    if symbolic_sizes([flat.avals[slot].shape for slot in flat.outputs[: -len(rows)]]):
        raise NotForAllLengths("its results have a length")
    kept = {name: kind for name, kind in kinds.items() if name in notes.read}
    flat = _keep_columns(flat, list(kinds), kept, len(rows), len(identity.parameters))
    return Trace(flat, tree, kept, list(map(str, sizes)), len(identity.parameters))


def _refusal(batch: Batch, notes: _Notes, reason: str) -> NotForAllLengths:
    error = NotForAllLengths(notes.refused or reason)
    error.kinds = {name: kind_of(batch, name) for name in notes.read}
    return error


def _keep_columns(
    flat: Flat, given: list[str], kept: Mapping[str, Any], rows: int, parameters: int
) -> Flat:
    """Drops the inputs of columns that were not read; JAX orders those of a dict by name."""
    first = rows + parameters
    place = {name: first + k * rows for k, name in enumerate(sorted(given))}
    chosen = [slot for name in kept for slot in flat.inputs[place[name] : place[name] + rows]]
    return flat._replace(inputs=[*flat.inputs[:first], *chosen])


# What stands for a batch while it is traced


class _Notes:
    """Remembers what was read of the datums, and what was asked for that they do not have here."""

    def __init__(self) -> None:
        self.read: dict[str, None] = {}
        self.refused = ""

    def refuse(self, reason: str) -> NoReturn:
        self.refused = self.refused or reason
        raise NotForAllLengths(reason)


class _Rows(Sequence[Any]):
    """The rows of logprobs, as a list gives them, and nothing else."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Rows(self._rows[index])
        return self._rows[operator.index(index)]


class _Columns(Mapping[str, Any]):
    """The columns of one datum."""

    def __init__(self, names: frozenset[str], columns: Mapping[str, Any], notes: _Notes) -> None:
        self._names = names
        self._columns = columns
        self._notes = notes

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        self._notes.refuse("it goes through all columns of a datum")

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        self._notes.read[name] = None
        if name not in self._columns:
            self._notes.refuse(f"the datums differ in the kind of the column {name!r}")
        return self._columns[name]


class _Unread:
    """Stands for the tokens that a datum's model reads, of which it tells how many there are."""

    def __init__(self, length: Any, notes: _Notes) -> None:
        object.__setattr__(self, "_length", length)
        object.__setattr__(self, "_refuse", notes.refuse)

    def __getattribute__(self, name: str) -> Any:
        if name == "length":
            return object.__getattribute__(self, "_length")
        return object.__getattribute__(self, "_refuse")("it reads the model input of a datum")


def _datum(columns: _Columns, model_input: _Unread) -> Datum:
    made = Datum(ModelInput([]))
    msgspec.structs.force_setattr(made, "loss_fn_inputs", columns)
    msgspec.structs.force_setattr(made, "model_input", model_input)
    return made


class _Data(Sequence[Any]):
    """The datums of a batch, as :class:`mintjax.Batch` gives them one by one."""

    def __init__(self, names: frozenset[str], datums: Sequence[Datum], notes: _Notes) -> None:
        self.names = names
        self._datums = list(datums)
        self._notes = notes

    def __len__(self) -> int:
        return len(self._datums)

    def __contains__(self, item: object) -> bool:
        return item in self.names if isinstance(item, str) else any(item is d for d in self._datums)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._datums)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            rows: list[Any] = [datum.loss_fn_inputs[index] for datum in self._datums]
            if rows[0].ndim:
                self._notes.refuse("it takes rows one by one and whole columns, too")
            return jnp.stack(rows)
        if isinstance(index, slice):
            return _Data(self.names, self._datums[index], self._notes)
        return self._datums[operator.index(index)]


# Lengths that are symbols


class _Symbols:
    """The symbols that stand for lengths, the same in all traces.

    JAX keeps the traces of functions that it compiles, ``jnp.clip`` among them, by the shapes of
    their arguments, and finds them where the symbols are the same. So a trace for another number of
    rows takes a fraction of the time of the first.

    A function that chooses by a length is seen only while it is traced. So the symbols that it has
    met are used no more.

    Args:
        least: how large each of them is, at least.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self.renew()

    def renew(self) -> None:
        """Forgets the symbols."""
        self._sizes: list[Any] = []

    def first(self, count: int) -> list[Any]:
        """Gives ``n0``, ``n1`` and so on."""
        if count > len(self._sizes):
            names = [f"n{i}" for i in range(max(count, 2 * len(self._sizes), 64))]
            least = [f"{name} >= {self._least}" for name in names]
            self._sizes = list(export.symbolic_shape(",".join(names), constraints=least))
        return self._sizes[:count]


_symbols = {False: _Symbols(1), True: _Symbols(LONG)}
_lock = threading.RLock()
"""Held for as long as a trace takes."""


# len(row)


def _with_len(trace: Callable[[], Any]) -> Any:
    """Traces an objective, whose ``len(row)`` gives the symbol of the row's length.

    Python's own ``len`` gives nothing but an ``int``, so it fails for such a row. The module whose
    line has failed then finds another ``len`` among its names, for as long as the trace takes.
    """
    spaces: list[dict[str, Any]] = []
    try:
        while True:
            try:
                return trace()
            except Exception as error:
                space = _asks_for_len(error)
                if space is None or _watch.seen:
                    raise
                spaces.append(space)
                space["len"] = _len
    finally:
        for space in spaces:
            space.pop("len", None)


def _asks_for_len(error: BaseException) -> dict[str, Any] | None:
    """Finds the names of the module whose line failed, if it may be for Python's own ``len``."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    users = [frame for frame in frames if not frame.f_code.co_filename.startswith((*_JAX, _OURS))]
    if not users or not _is_of_a_length(error):
        return None
    names, code = users[-1].f_globals, users[-1].f_code
    return names if "len" in code.co_names and "len" not in names else None


def _len(value: Any) -> Any:
    """Gives the length of anything, of a row that has a symbol for it the symbol."""
    size = next(iter(getattr(value, "shape", ())), None) if _watch.depth else None
    return size if is_symbolic(size) else len(value)


def _is_of_a_length(error: BaseException) -> bool:
    """Tells whether JAX refused to give a symbolic length as a number."""
    return type(error).__name__ == "InconclusiveDimensionOperation" or "_DimExpr" in str(error)


# Choices by a length


class _Watch(threading.local):
    """Sees whether code outside JAX chooses by a symbolic length while this thread traces.

    JAX takes two sizes for different where it cannot tell, so that ``if row.shape[0] == 1`` is
    silently false (jax.readthedocs.io/en/latest/export/shape_poly.html, "Comparison of symbolic
    dimensions is partially supported"). So the methods of a size by which one can choose tell this
    of their callers. An order that cannot be told raises by itself.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.seen: tuple[str, int] | None = None

    def __enter__(self) -> None:
        self.depth += 1
        self.seen = None

    def __exit__(self, *_: object) -> None:
        self.depth -= 1

    def look(self, frame: FrameType, *certain: Callable[[], bool]) -> None:
        """Notes the line of a caller that is not JAX.

        Args:
            frame: of the caller.
            certain: comparisons; there is no choice if one of them holds whatever the sizes are.
        """
        if not self.seen and not _is_jaxs(frame) and not any(map(_holds, certain)):
            self.seen = frame.f_code.co_filename, frame.f_lineno


def _holds(comparison: Callable[[], bool]) -> bool:
    try:
        return comparison()
    except Exception:  # JAX's InconclusiveDimensionOperation, which is not public, or a TypeError
        return False


_watch = _Watch()


@contextlib.contextmanager
def no_choices_by(size: Any) -> Generator[None]:
    """Refuses that code outside JAX chooses by a symbolic size while the block runs.

    Raises:
        NotForAllLengths: it has.
    """
    _observe(type(cast("object", size)))
    with _watch:
        yield
    if _watch.seen:
        raise _choice(_watch.seen)


def _choice(line: tuple[str, int]) -> NotForAllLengths:
    error = NotForAllLengths("it chooses by the length of a row")
    error.line = line
    return error


@functools.cache
def _observe(kind: type) -> None:
    """Makes the class of symbolic sizes tell :data:`_watch` by whom its methods are called."""
    made: Any = kind
    for name in ("__hash__", "__str__", "__repr__", "__int__"):
        setattr(kind, name, _observed(getattr(kind, name), _never))
    made.__eq__ = _observed(made.__eq__, _is, _differs)
    made.__ne__ = _observed(made.__ne__, _is_not, _differs)
    # JAX has no truth of sizes, so that Python takes each for true.
    made.__bool__ = _observed(_truth, _never, _is_not_zero)
    # A power of an integer has 32 bits in JAX, and any number of them in Python.
    made.__rpow__ = _observed(made.__rpow__, _is_of_a_float)


def _never(*_: Any) -> bool:
    return False


def _is(result: bool, *_: Any) -> bool:
    return result


def _is_not(result: bool, *_: Any) -> bool:
    return not result


def _is_of_a_float(_: Any, base: Any) -> bool:
    return not isinstance(base, int)


def _truth(_: Any) -> bool:
    return True


def _differs(size: Any, other: Any) -> bool:
    return _holds(lambda: size > other) or _holds(lambda: size < other)


def _is_not_zero(size: Any) -> bool:
    return _differs(size, 0)


def _observed(
    method: Callable[..., Any],
    is_known: Callable[..., bool],
    is_certain: Callable[..., bool] = _never,
) -> Any:
    """Makes a method tell :data:`_watch` who calls it, unless its result holds for all sizes.

    Args:
        method: of sizes.
        is_known: tells so of a result and the operands, at once.
        is_certain: tells so of all operands, more slowly.
    """

    @functools.wraps(method)
    def observed(self: Any, *others: Any) -> Any:
        result = method(self, *others)
        if _watch.depth and not is_known(result, *others):
            caller = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
            _watch.look(caller, lambda: is_certain(self, *others))
        return result

    return observed


_JAX = tuple(
    str(Path(str(sys.modules[name].__file__)).parent)
    for name in ("jax", "jaxlib")
    if name in sys.modules
)
_OURS = str(Path(__file__).parents[1])
_STANDARD = (sysconfig.get_paths()["stdlib"], "<")


def _is_jaxs(frame: FrameType | None) -> bool:
    """Tells whether JAX called, perhaps through the standard library."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith((*_JAX, _OURS)):
            return True
        if not file.startswith(_STANDARD) or "site-packages" in file:
            return False
        frame = frame.f_back
    return False


def _reason(error: BaseException) -> str:
    """Says in a few words why an objective was not traced for all lengths."""
    cause = error.__cause__ or error
    if isinstance(cause, NotForAllLengths):
        return str(cause)
    if _is_of_a_length(cause):
        return "it needs the length of a row as a number, as `if` and range() do"
    if isinstance(cause, jax.errors.JAXTypeError | jax.errors.JAXIndexError):
        return "it needs the values of a row or a column while it is traced, as `if` and NumPy do"
    first = (str(cause).splitlines() or [""])[0]
    return f"{type(cause).__name__}: {first[:120]}"
