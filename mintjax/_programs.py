"""Compiled gradients of objectives, kept so that the next batch finds them."""

from __future__ import annotations

import functools
import threading
import time
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax import _tiles
from mintjax._dataflow import inputs_used
from mintjax._tiles import Layout, Place
from mintjax.batch import Batch
from mintjax.errors import ObjectiveError
from mintjax.ragged import Ragged

Array: TypeAlias = Any
Objective: TypeAlias = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
_LOGPROBS = ""  # their name among the columns, where "logprobs" are the sampling policy's
_KEPT = 64  # programs held at a time, the least recently used dropped first


class Stats(NamedTuple):
    """How often the work that a cache should save was done, since the process began.

    Args:
        compilations: programs that XLA compiled.
        objectives: objectives (by structure) or functions (by identity) that were new.
        row_by_row_steps: steps whose objective took rows one by one.
    """

    compilations: int
    objectives: int
    row_by_row_steps: int


_counts = dict.fromkeys(Stats._fields, 0)


def stats() -> Stats:
    """What was compiled so far in this process.

    Returns:
        The counts as they are now; take the difference of two to see what a step compiled.
    """
    return Stats(**_counts)


def count(what: str) -> None:
    """Count one of what :class:`Stats` names."""
    _counts[what] += 1


@jax.tree_util.register_pytree_node_class
class Summary:
    """Loss and metrics as one array, so that one transfer brings them all.

    Args:
        values: ``[1 + metrics]``, the loss first.
        names: of the metrics.
    """

    def __init__(self, values: Array, names: tuple[str, ...]) -> None:
        self.values = values
        self.names = names

    def tree_flatten(self) -> tuple[tuple[Array], tuple[str, ...]]:
        """The leaves, for JAX."""
        return (self.values,), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: tuple[Array]) -> Summary:
        """The inverse of :meth:`tree_flatten`."""
        return cls(children[0], names)

    def read(self) -> tuple[float, dict[str, float]]:
        """The loss, and all metrics with ``"loss"`` first; the objective's own "loss" wins."""
        loss, *metrics = np.asarray(self.values).tolist()
        return loss, {"loss": loss, **dict(zip(self.names, metrics, strict=True))}


def evaluate(objective: Objective, data: Batch, logprobs: Ragged) -> tuple[Array, Summary]:
    """Call an objective and hold what it returns against the contract.

    Raises:
        ObjectiveError: it did not return a scalar and a dict of scalars.
    """
    returned = cast("Any", objective(data, logprobs))
    if not (isinstance(returned, tuple) and len(cast("tuple[Any, ...]", returned)) == 2):
        raise ObjectiveError(
            f"{name_of(objective)} must return (loss, metrics), not {_describe(returned)}"
        )
    loss, metrics = cast("tuple[Any, Any]", returned)
    if not hasattr(loss, "shape") or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ObjectiveError(
            f"the loss of {name_of(objective)} must be a floating-point scalar computed from the "
            f"logprobs, not {_describe(loss)}"
        )
    if loss.shape != ():
        raise ObjectiveError(
            f"the loss of {name_of(objective)} must be a scalar, not an array of shape "
            f"{loss.shape}; reduce it with .sum() or .mean()"
        )
    if not isinstance(metrics, Mapping):
        raise ObjectiveError(
            f"the metrics of {name_of(objective)} must be a dict, not {_describe(metrics)}"
        )
    named = {str(k): _scalar(k, v) for k, v in cast("Mapping[Any, Any]", metrics).items()}
    values = [jnp.asarray(value, loss.dtype) for value in (loss, *named.values())]
    return loss, Summary(jax.lax.stop_gradient(jnp.stack(values)), tuple(named))


def _scalar(name: Any, value: Any) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise ObjectiveError(f"metric {name!r} must be a number, not {_describe(value)}") from None
    if array.size != 1:
        raise ObjectiveError(
            f"metric {name!r} must be a scalar, not an array of shape {array.shape}"
        )
    return array.reshape(())


def _describe(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of shape {value.shape}" if hasattr(value, "shape") else kind


def name_of(objective: Any) -> str:
    """What to call an objective in a message."""
    return getattr(objective, "__qualname__", None) or repr(objective)


class Plan(NamedTuple):
    """What one trace of an objective taught.

    Args:
        columns: the columns that it reads.
        needs_logprobs: whether its gradient depends on the logprobs.
        run: its compiled gradient: ``(parameters, place, columns) -> (summary, grads)``, with the
            logprobs among the columns.
    """

    columns: tuple[str, ...]
    needs_logprobs: bool
    run: Callable[..., tuple[Summary, Array]]


class Program:
    """An objective's compiled gradient, for batches of any lengths.

    Args:
        objective: the objective. If it has a ``row_multiple`` that is not None, it minds
            ``Ragged.row_mask``, and its batches may be padded to a multiple of so many rows.
        tree: its structure, if it is a pytree whose leaves are parameters.
    """

    def __init__(self, objective: Objective, tree: Any | None) -> None:
        self.takes_rows = False
        self._objective = objective
        self._tree = tree
        self._row_multiple: int | None = getattr(objective, "row_multiple", None)
        self._plans: dict[Any, Plan] = {}

    def _rebuild(self, parameters: Sequence[Any]) -> Objective:
        return self._objective if self._tree is None else self._tree.unflatten(parameters)

    def run(
        self, parameters: Sequence[Any], batch: Batch, rows: Sequence[npt.NDArray[Any]]
    ) -> tuple[Summary, list[npt.NDArray[Any]]]:
        """The summary, and the gradient with respect to each row.

        Raises:
            RowAccessError: the objective takes rows one by one.
        """
        place, starts, plan = self._prepare(parameters, batch, rows)
        columns = {_LOGPROBS: rows} | {name: batch.rows(name) for name in plan.columns}
        arrays = _arrays(columns, batch.lengths, place, starts, rows[0].dtype, _workspace)
        summary, grads = plan.run(parameters, place, arrays)
        _await(grads)
        buffer = np.asarray(grads).reshape(-1, *rows[0].shape[1:])
        return summary, [buffer[s : s + n] for s, n in zip(starts, batch.lengths, strict=False)]

    def needs_logprobs(
        self, parameters: Sequence[Any], batch: Batch, rows: Sequence[npt.NDArray[Any]]
    ) -> bool:
        """Whether the gradient depends on the logprobs, whose shapes and dtype ``rows`` has.

        Raises:
            RowAccessError: the objective takes rows one by one.
        """
        return self._prepare(parameters, batch, rows)[-1].needs_logprobs

    def _prepare(
        self, parameters: Sequence[Any], batch: Batch, rows: Sequence[npt.NDArray[Any]]
    ) -> tuple[Place, list[int], Plan]:
        multiple = self._row_multiple
        # A batch that does not divide is not padded: the objective shall see it and say so.
        padded = multiple is not None and not len(batch) % multiple
        spare = _spare(len(batch), multiple) if multiple and padded else 0
        place, starts = _tiles.place(batch.lengths, spare)
        key = (batch.names, padded, rows[0].shape[1:], rows[0].dtype)
        if key not in self._plans:
            self._plans[key] = self._plan(parameters, batch, place, starts, rows, padded)
        return place, starts, self._plans[key]

    def _plan(
        self,
        parameters: Sequence[Any],
        batch: Batch,
        place: Place,
        starts: Sequence[int],
        rows: Sequence[npt.NDArray[Any]],
        padded: bool,
    ) -> Plan:
        """Trace once without compiling, to learn what is read."""
        names, dtype = batch.names, rows[0].dtype
        read: set[str] = set()

        def gradient(
            parameters: Sequence[Any], place: Place, column: Callable[[str], Array]
        ) -> tuple[Summary, Array]:
            layout = place.layout(padded=padded)
            return _gradient(self._rebuild(parameters), names, layout, column)

        def run(
            parameters: Sequence[Any], place: Place, columns: Mapping[str, Array]
        ) -> tuple[Summary, Array]:
            count("compilations")
            return gradient(parameters, place, columns.__getitem__)

        def look(logprobs: Array, parameters: Sequence[Any], traced: Place) -> Array:
            def column(name: str) -> Array:
                if name == _LOGPROBS:
                    return logprobs
                read.add(name)
                columns = {name: batch.rows(name)}
                return _arrays(columns, batch.lengths, place, starts, dtype, _buffer)[name]

            return gradient(parameters, traced, column)[1]

        shape = (len(place.tile_row), _tiles.TILE, *rows[0].shape[1:])
        trace = cast("Callable[..., Any]", jax.make_jaxpr(look))
        closed = trace(jax.ShapeDtypeStruct(shape, dtype), parameters, place)
        needs_logprobs = 0 in inputs_used(closed.jaxpr, [0])
        return Plan(tuple(sorted(read)), needs_logprobs, jax.jit(run))


def _gradient(
    objective: Objective,
    names: frozenset[str],
    layout: Layout,
    column: Callable[[str], Array],
) -> tuple[Summary, Array]:
    def read(name: str) -> Any:
        value = jnp.asarray(column(name))
        return Ragged(value, layout) if value.ndim > 1 else value

    def value(tiles: Array) -> tuple[Array, Summary]:
        data = Batch.of_columns(names, layout.lengths.shape[0], read)
        return evaluate(objective, data, Ragged(tiles, layout))

    (_, summary), grads = jax.value_and_grad(value, has_aux=True)(column(_LOGPROBS))
    return summary, grads


def _await(array: Array) -> None:
    """Wait for a result without going to sleep, for no longer than waking up would take."""
    end = time.perf_counter() + 1e-4
    while not array.is_ready() and time.perf_counter() < end:
        pass


_workspaces = threading.local()


def _workspace(name: str, tiles: int, trailing: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """A buffer that this thread has for a column and uses again.

    A new one each time would cost more than the copying: its pages have to be mapped first. It is
    read until the program has run, which whoever calls waits for.
    """
    kept: dict[Any, npt.NDArray[Any]] = _workspaces.__dict__
    key, size = (name, trailing, dtype), tiles * _tiles.TILE
    if key not in kept or len(kept[key]) < size:
        kept[key] = _tiles.empty(tiles, trailing, dtype)
    return kept[key][:size]


def _buffer(_: str, tiles: int, trailing: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    return _tiles.empty(tiles, trailing, dtype)


def _arrays(
    columns: Mapping[str, Sequence[npt.NDArray[Any]]],
    lengths: Sequence[int],
    place: Place,
    starts: Sequence[int],
    dtype: Any,
    buffer: Callable[..., npt.NDArray[Any]],
) -> dict[str, npt.NDArray[Any]]:
    """Columns as a program takes them: tiles, or one number per row; floats in one ``dtype``."""
    kept = {n: dtype if rows[0].dtype.kind == "f" else rows[0].dtype for n, rows in columns.items()}
    tiled = {name: rows for name, rows in columns.items() if rows[0].ndim}
    tiles = len(place.tile_row)
    flats = [buffer(name, tiles, rows[0].shape[1:], kept[name]) for name, rows in tiled.items()]
    packed = _tiles.pack(list(tiled.values()), lengths, starts, flats)
    arrays = dict(zip(tiled, packed, strict=True))
    for name in columns.keys() - tiled.keys():
        arrays[name] = np.zeros(place.rows.shape[1], kept[name])
        arrays[name][: len(columns[name])] = columns[name]
    return arrays


def _spare(rows: int, multiple: int) -> int:
    """How many rows to add to these to have one of few numbers of them."""
    return -(-_tiles.bucket(rows) // multiple) * multiple - rows


_programs: OrderedDict[Any, Program] = OrderedDict()
_seen_code: dict[types.CodeType, int] = {}
_lock = threading.Lock()


def program_for(objective: Objective) -> tuple[Program, list[Any]]:
    """The program kept for an objective, and the parameters to run it with.

    An objective that is a pytree (mintjax's own are) is known by its structure, and its leaves are
    parameters; any other is known by its identity, and has none.
    """
    leaves, tree = cast("tuple[list[Any], Any]", jax.tree_util.tree_flatten(objective))
    is_tree = not (len(leaves) == 1 and leaves[0] is objective)
    key, parameters = (tree, leaves) if is_tree else (objective, [])
    with _lock:
        program = _programs.get(key)
        if program is not None:
            _programs.move_to_end(key)
            return program, parameters
        _warn_of_copies(objective)
        count("objectives")
        program = Program(objective, tree if is_tree else None)
        _programs[key] = program
        if len(_programs) > _KEPT:
            _programs.popitem(last=False)
        return program, parameters


def _warn_of_copies(objective: Any) -> None:
    inner = objective
    while isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)
    if code is None:
        return
    _seen_code[code] = _seen_code.get(code, 0) + 1
    if _seen_code[code] == 3:
        warnings.warn(
            f"{name_of(inner)} has been made anew for the third time, and each copy is compiled "
            "anew. Make the function, lambda or partial once and use it for every step; what "
            "changes from step to step belongs in a loss_fn_inputs column.",
            stacklevel=4,
        )
