"""Compiled gradients of objectives, kept so that the next batch finds them."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax.errors import ObjectiveError
from mintjax.gradients.dependence import inputs_used
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch
from mintjax.ragged.tiling import Layout, Place

Array: TypeAlias = Any
Objective: TypeAlias = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
Summary: TypeAlias = dict[tuple[str | None, ...], Array]
"""By the names of the metrics: the loss and these in one array, for each that is read has its
cost."""

_LOGPROBS = ""  # their name among the columns, where "logprobs" are the sampling policy's
_FINITE = None  # in place of a name: 1 if the whole gradient is finite
_KEPT = 64  # programs held at a time, the oldest dropped first


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


def read_summary(summary: Summary) -> tuple[float, dict[str, float], bool]:
    """The loss, all metrics with it as ``"loss"`` first (the objective's own "loss" wins), and
    whether the gradient is known to be finite."""
    ((names, values),) = summary.items()
    loss, *rest = np.asarray(values).tolist()
    metrics: dict[Any, float] = {"loss": loss, **dict(zip(names, rest, strict=True))}
    return loss, metrics, bool(metrics.pop(_FINITE, False))


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
    return loss, {tuple(named): jax.lax.stop_gradient(jnp.stack(values))}


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
        run: its compiled gradient: ``(parameters, table, blocks) -> (summary, grads)``, of a
            place's table and of :func:`_blocks` of the columns and the logprobs.
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
        place, plan = self._prepare(parameters, batch, rows)
        columns = {_LOGPROBS: rows}
        for name in plan.columns:
            columns[name] = batch.rows(name)
        blocks = _blocks(columns, batch.lengths, place, rows[0].dtype, _workspace)
        summary, grads = plan.run(parameters, place.table, blocks)
        _await(grads)
        buffer = np.asarray(grads).reshape(-1, *rows[0].shape[1:])
        cuts = zip(place.starts, batch.lengths, strict=False)
        return summary, [buffer[start : start + length] for start, length in cuts]

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
    ) -> tuple[Place, Plan]:
        multiple = self._row_multiple
        # A batch that does not divide is not padded: the objective shall see it and say so.
        padded = multiple is not None and not len(batch) % multiple
        spare = _spare(len(batch), multiple) if multiple and padded else 0
        place = tiling.place(batch.lengths, spare)
        key = (batch.names, padded, rows[0].shape[1:], rows[0].dtype)
        if key not in self._plans:
            self._plans[key] = self._plan(parameters, batch, place, rows, padded)
        return place, self._plans[key]

    def _plan(
        self,
        parameters: Sequence[Any],
        batch: Batch,
        place: Place,
        rows: Sequence[npt.NDArray[Any]],
        padded: bool,
    ) -> Plan:
        """Trace once without compiling, to learn what is read."""
        names, dtype = batch.names, rows[0].dtype
        read: set[str] = set()

        def gradient(
            parameters: Sequence[Any], table: Array, column: Callable[[str], Array]
        ) -> tuple[Summary, Array]:
            layout = tiling.read_table(table, column(_LOGPROBS).shape[0], padded=padded)
            return _gradient(self._rebuild(parameters), names, layout, column)

        def run(
            parameters: Sequence[Any], table: Array, blocks: Mapping[tuple[str, ...], Array]
        ) -> tuple[Summary, Array]:
            count("compilations")
            columns = _columns(blocks)
            return gradient(parameters, table, columns.__getitem__)

        def look(logprobs: Array, parameters: Sequence[Any], table: Array) -> Array:
            def column(name: str) -> Array:
                if name == _LOGPROBS:
                    return logprobs
                read.add(name)
                columns = {name: batch.rows(name)}
                return _columns(_blocks(columns, batch.lengths, place, dtype, tiling.empty))[name]

            return gradient(parameters, table, column)[1]

        shape = (place.tiles, tiling.TILE, *rows[0].shape[1:])
        trace = cast("Callable[..., Any]", jax.make_jaxpr(look))
        closed = trace(jax.ShapeDtypeStruct(shape, dtype), parameters, place.table)
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
    ((metrics, values),) = summary.items()
    values = jnp.append(values, jnp.isfinite(grads).all())
    return {(*metrics, _FINITE): values}, grads


def _await(array: Array) -> None:
    """Wait for a result without going to sleep, for no longer than waking up would take."""
    if not array.is_ready():
        end = time.perf_counter() + 1e-4
        while time.perf_counter() < end and not array.is_ready():
            pass


_workspaces = threading.local()


def _workspace(size: int, trailing: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """A buffer that this thread has for columns of one kind and uses again.

    A new one each time would cost more than the copying: its pages have to be mapped first. It is
    read until the program has run, which whoever calls waits for.
    """
    kept: dict[Any, npt.NDArray[Any]] = _workspaces.__dict__
    key = (trailing, dtype)
    if key not in kept or len(kept[key]) < size:
        kept[key] = tiling.empty(size, trailing, dtype)
    return kept[key][:size]


def _blocks(
    columns: Mapping[str, Sequence[npt.NDArray[Any]]],
    lengths: Sequence[int],
    place: Place,
    dtype: Any,
    buffer: Callable[..., npt.NDArray[Any]],
) -> dict[tuple[str, ...], npt.NDArray[Any]]:
    """Columns as a program takes them, those of one kind in one array, for each has its cost.

    Args:
        columns: one array per row, in each.
        lengths: tokens of each row.
        place: where to lay them.
        dtype: that all floats are to have.
        buffer: makes a buffer, as :func:`mintjax.ragged.tiling.empty` does.

    Returns:
        By the names of its columns, tiles ``[columns, tiles, TILE, ...]``, or, of columns that hold
        one number per row, ``[columns, B]``.
    """
    kinds: dict[tuple[Any, Any], list[str]] = {}
    for name, rows in columns.items():
        shape, own = rows[0].shape, rows[0].dtype
        kind = (shape[1:] if shape else None, dtype if own.kind == "f" else own)
        kinds.setdefault(kind, []).append(name)
    blocks: dict[tuple[str, ...], npt.NDArray[Any]] = {}
    for (trailing, kept), names in kinds.items():
        alike = [columns[name] for name in names]
        if trailing is None:
            block = np.zeros((len(names), len(place.starts)), kept)
            block[:, : len(lengths)] = alike
        else:
            flat = buffer(len(names) * place.tiles * tiling.TILE, trailing, kept)
            block = tiling.pack(alike, lengths, flat)
        blocks[tuple(names)] = block
    return blocks


def _columns(blocks: Mapping[tuple[str, ...], Array]) -> dict[str, Array]:
    """What :func:`_blocks` joined, by its name."""
    return {name: block[i] for names, block in blocks.items() for i, name in enumerate(names)}


def _spare(rows: int, multiple: int) -> int:
    """How many rows to add to these to have one of few numbers of them."""
    return -(-tiling.bucket(rows) // multiple) * multiple - rows


_programs: dict[Any, Program] = {}
_latest: list[tuple[Any, Any]] = [(object(), None)]  # an objective, and what was found for it
_seen_code: dict[types.CodeType, int] = {}
_lock = threading.Lock()


def program_for(objective: Objective) -> tuple[Program, list[Any]]:
    """The program kept for an objective, and the parameters to run it with.

    An objective that is a pytree (mintjax's own are) is known by its structure, and its leaves are
    parameters; any other is known by its identity, and has none.
    """
    latest, found = _latest[0]
    if objective is latest:  # as in every step of a loop but the first
        return found
    leaves, tree = cast("tuple[list[Any], Any]", jax.tree_util.tree_flatten(objective))
    is_tree = not (len(leaves) == 1 and leaves[0] is objective)
    key, parameters = (tree, leaves) if is_tree else (objective, [])
    program = _programs.get(key)
    if program is None:
        with _lock:
            program = _programs.get(key) or _new_program(objective, key, tree if is_tree else None)
    if not is_tree or _never_changes(objective, leaves, tree):
        _latest[0] = objective, (program, parameters)
    return program, parameters


def _never_changes(objective: Any, leaves: Sequence[Any], tree: Any) -> bool:
    """Whether it is a frozen dataclass, and each leaf a field of it, with no container between."""
    if not getattr(getattr(objective, "__dataclass_params__", None), "frozen", False):
        return False
    fields = {id(getattr(objective, field.name)) for field in dataclasses.fields(objective)}
    return tree.num_nodes == tree.num_leaves + 1 and fields.issuperset(map(id, leaves))


def _new_program(objective: Objective, key: Any, tree: Any | None) -> Program:
    _warn_of_copies(objective)
    count("objectives")
    if len(_programs) == _KEPT:
        del _programs[next(iter(_programs))]
    return _programs.setdefault(key, Program(objective, tree))


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
            stacklevel=6,
        )
