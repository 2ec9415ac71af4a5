"""Compiled gradients of objectives, kept so that the next batch finds them."""

from __future__ import annotations

import functools
import itertools
import threading
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax.errors import ObjectiveError
from mintjax.gradients.contract import (
    Metrics,
    Objective,
    Outcome,
    evaluate,
    name_of,
    warn_of_no_gradient,
)
from mintjax.gradients.counts import count
from mintjax.gradients.dependence import are_zero, inputs_used
from mintjax.gradients.identity import Identity, identify, traces_of
from mintjax.gradients.loops import Loops
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch
from mintjax.ragged.tiling import Layout, Place

Array: TypeAlias = Any
T = TypeVar("T")

_LOGPROBS = ""  # their name among the columns, where "logprobs" are the sampling policy's
_KEPT = 64  # programs held at a time, the oldest dropped first


class Plan(NamedTuple):
    """The findings of one trace of an objective.

    Args:
        kinds: of each column that it reads, the trailing shape and the dtype.
        needs_logprobs: whether its gradient depends on the logprobs.
        run: its compiled gradient: ``(parameters, table, blocks) -> (scalars, names, others,
            grads)``, of a place's table and of :func:`_blocks` of the columns and the logprobs: in
            one array, because each that a program returns has its cost, the loss, 1 if the gradient
            is finite, and the metrics that are scalars of the loss's dtype; a dict with the names
            of these; all other metrics by name; the gradient.
    """

    kinds: dict[str, Any]
    needs_logprobs: bool
    run: Callable[..., Any]


_numbers = itertools.count()
_tracing = threading.local()
"""The objective that a trace in this thread calls; equal keys mean the same to every program."""


class Program:
    """An objective's compiled gradient, for batches of any lengths.

    Args:
        pad_rows_to: pads the row count of a batch to a multiple of this, for an objective that
            minds ``Ragged.row_mask``; None disables padding.
    """

    def __init__(self, pad_rows_to: int | None) -> None:
        self.number = next(_numbers)
        self.takes_rows = False
        self.loops = Loops()
        self._pad_rows_to = pad_rows_to
        self._plans: dict[Any, list[Plan]] = {}

    def run(self, identity: Identity, batch: Batch, rows: Sequence[npt.NDArray[Any]]) -> Outcome:
        """Computes the loss, the metrics and the gradient with respect to each row.

        Raises:
            RowAccessError: the objective takes rows one by one.
        """
        read = functools.cache(batch.rows)
        place, plan = self._prepare(identity, batch, rows, read)
        columns = {_LOGPROBS: rows} | {name: read(name) for name in plan.kinds}
        blocks = _blocks(columns, batch.lengths, place, rows[0].dtype, _workspace)
        _tracing.rebuild = identity.rebuild
        scalars, names, others, grads = plan.run(identity.parameters, place.table, blocks)
        loss, finite, *values = np.asarray(scalars)
        buffer = np.asarray(grads).reshape(-1, *rows[0].shape[1:])
        cuts = zip(place.starts, batch.lengths, strict=False)
        metrics = dict(zip(names, values, strict=True)) | {
            name: value[: len(batch)] if value.ndim else value for name, value in others.items()
        }
        return Outcome(
            loss, metrics, bool(finite), [buffer[start : start + length] for start, length in cuts]
        )

    def needs_logprobs(
        self, identity: Identity, batch: Batch, rows: Sequence[npt.NDArray[Any]]
    ) -> bool:
        """Tells whether the gradient depends on the logprobs, whose shapes ``rows`` has.

        Raises:
            RowAccessError: the objective takes rows one by one.
        """
        return self._prepare(identity, batch, rows, batch.rows)[-1].needs_logprobs

    def _prepare(
        self,
        identity: Identity,
        batch: Batch,
        rows: Sequence[npt.NDArray[Any]],
        read: Callable[[str], list[Any]],
    ) -> tuple[Place, Plan]:
        """Finds the plan of a trace that saw what this batch shows: its sizes, names and kinds."""
        multiple = self._pad_rows_to
        # A batch that does not divide is not padded: the objective shall see it and say so.
        padded = multiple is not None and not len(batch) % multiple
        spare = _spare(len(batch), multiple) if multiple and padded else 0
        place = tiling.place(batch.lengths, spare)
        size = len(batch) + spare
        key = (
            batch.names,
            padded,
            size,
            place.tiles,
            rows[0].shape[1:],
            rows[0].dtype,
            identity.parameter_kinds,
        )
        plans = self._plans.setdefault(key, [])
        for plan in plans:
            if all(_kind(read(name)) == kind for name, kind in plan.kinds.items()):
                return place, plan
        plans.append(self._plan(identity, batch, place, rows, padded))
        return place, plans[-1]

    def _plan(
        self,
        identity: Identity,
        batch: Batch,
        place: Place,
        rows: Sequence[npt.NDArray[Any]],
        padded: bool,
    ) -> Plan:
        """Traces once without compiling, to learn what is read."""
        names, dtype = batch.names, rows[0].dtype
        kinds: dict[str, Any] = {}

        def gradient(
            parameters: Sequence[Any], table: Array, column: Callable[[str], Array]
        ) -> Any:
            layout = tiling.read_table(table, column(_LOGPROBS).shape[0], padded=padded)
            return _gradient(_tracing.rebuild(parameters), names, layout, column)

        def run(
            parameters: Sequence[Any], table: Array, blocks: Mapping[tuple[str, ...], Array]
        ) -> Any:
            count("compilations")
            loss, metrics, grads = gradient(parameters, table, _columns(blocks).__getitem__)
            finite = jnp.isfinite(grads).all().astype(loss.dtype)
            alike = {
                name: value
                for name, value in sorted(metrics.items())  # the order in which JAX returns a dict
                if value.ndim == 0 and value.dtype == loss.dtype
            }
            others = {name: value for name, value in metrics.items() if name not in alike}
            scalars = jnp.stack([loss, finite, *alike.values()])
            return scalars, dict.fromkeys(alike), others, grads

        def look(logprobs: Array, parameters: Sequence[Any], table: Array) -> Array:
            def column(name: str) -> Array:
                if name == _LOGPROBS:
                    return logprobs
                columns = {name: batch.rows(name)}
                kinds[name] = _kind(columns[name])
                return _columns(_blocks(columns, batch.lengths, place, dtype, tiling.empty))[name]

            return gradient(parameters, table, column)[-1]

        shape = (place.tiles, tiling.TILE, *rows[0].shape[1:])
        trace = cast("Callable[..., Any]", jax.make_jaxpr(look))
        _tracing.rebuild = identity.rebuild
        logprobs = jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
        closed = trace(logprobs, identity.parameters, place.table)
        needs_logprobs = 0 in inputs_used(closed.jaxpr, [0])
        if are_zero(closed.jaxpr, [0]):
            warn_of_no_gradient(identity.rebuild(identity.parameters))
        return Plan(kinds, needs_logprobs, jax.jit(run))


def _kind(rows: Sequence[npt.NDArray[Any]]) -> Any:
    """Reads a column's trailing shape, None if it holds one number per datum, and its dtype."""
    return (rows[0].shape[1:] if rows[0].ndim else None, rows[0].dtype)


def _gradient(
    objective: Objective, names: frozenset[str], layout: Layout, column: Callable[[str], Array]
) -> tuple[Array, Metrics, Array]:
    def read(name: str) -> Any:
        value = jnp.asarray(column(name))
        return Ragged(tiling.fill(value, layout), layout) if value.ndim > 1 else value

    def value(tiles: Array) -> tuple[Array, Metrics]:
        data = Batch.of_columns(names, layout.lengths.shape[0], read)
        return evaluate(objective, data, Ragged(tiling.fill(tiles, layout), layout))

    (loss, metrics), grads = jax.value_and_grad(value, has_aux=True)(column(_LOGPROBS))
    return loss, metrics, grads


_workspaces = threading.local()


def _workspace(size: int, trailing: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Lends a buffer that this thread has for columns of one kind, and uses again.

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
    """Joins columns of one kind into one array, because each array of a program has its cost.

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
    """Splits the blocks of :func:`_blocks` into columns, by name."""
    return {name: block[i] for names, block in blocks.items() for i, name in enumerate(names)}


def _spare(rows: int, multiple: int) -> int:
    """Computes how many empty rows round this number up to one of a few."""
    return -(-tiling.bucket(rows) // multiple) * multiple - rows


_programs: dict[Any, Program] = {}
_compared: set[type] = set()  # of objects whose attributes an objective's own Python code reads
_seen_code: dict[types.CodeType | type, int] = {}
_lock = threading.Lock()


def with_program(objective: Objective, work: Callable[[Program, Identity], T]) -> T:
    """Calls a function with the program that is kept for an objective, and with its identity.

    An object's floating-point attributes are traced at first. Where its own Python code needs
    their values, as ``if self.coef > 1`` does, they are compared instead.
    """
    if type(objective) not in _compared:
        identity = identify(objective)
        try:
            return _work(work, _program(objective, identity), identity)
        except ObjectiveError as error:
            untraceable = isinstance(error.__cause__, jax.errors.JAXTypeError | TypeError)
            if not (untraceable and identity.parameters and identity.attributes):
                raise
        _compared.add(type(objective))
    identity = identify(objective, trace_attributes=False)
    return _work(work, _program(objective, identity), identity)


def _work(work: Callable[[Program, Identity], T], program: Program, identity: Identity) -> T:
    """Calls a function, and keeps JAX's traces of the user's functions apart by programs."""
    if not identity.keeps_traces:
        return work(program, identity)
    with traces_of(program.number):
        return work(program, identity)


def _program(objective: Objective, identity: Identity) -> Program:
    program = _programs.get(identity.key)
    if program is not None:
        return program
    with _lock:
        if identity.key not in _programs:
            _warn_of_copies(objective)
            count("objectives")
            if len(_programs) == _KEPT:
                del _programs[next(iter(_programs))]
            _programs[identity.key] = Program(getattr(objective, "pad_rows_to", None))
        return _programs[identity.key]


def _warn_of_copies(objective: Any) -> None:
    """Warns where the third value of one function or class is compiled anew."""
    inner = objective
    while isinstance(inner, functools.partial):
        inner = cast("Any", inner).func
    code = getattr(inner, "__code__", None)
    if code is None:
        return
    _seen_code[code] = _seen_code.get(code, 0) + 1
    if _seen_code[code] == 3:
        message = (
            f"{name_of(inner)} has been made anew for the third time with another value, and each "
            "is compiled anew. Pass what changes from step to step as a loss_fn_inputs column, or "
            "keep it as a float attribute of a callable object, which runs the same program."
        )
        warnings.warn_explicit(message, UserWarning, code.co_filename, code.co_firstlineno)
