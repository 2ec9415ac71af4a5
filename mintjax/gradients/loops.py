"""Computes the gradient of an objective that takes rows one by one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np
import numpy.typing as npt

from mintjax.gradients import grouped, interpreted, lengths
from mintjax.gradients.contract import (
    Metrics,
    Objective,
    Outcome,
    evaluate,
    is_librarys,
    name_of,
    users_line,
)
from mintjax.gradients.counts import count
from mintjax.gradients.dependence import inputs_used
from mintjax.gradients.identity import Identity
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch

Array: TypeAlias = Any
Rows: TypeAlias = Sequence[npt.NDArray[Any]]


_KEPT = 64
"""How many kinds of batches an objective has traces for at a time; the oldest is dropped first."""


class _Plan(NamedTuple):
    """The trace of an objective for one number of rows, if it has one.

    Args:
        kinds: of each column that it reads; the plan is good for batches of the same.
        trace: for all lengths; None if there is none.
        program: evaluates the trace with NumPy.
    """

    kinds: Mapping[str, Any]
    trace: lengths.Trace | None = None
    program: grouped.Grouped | None = None


class Loops:
    """Keeps the traces of an objective that takes rows one by one.

    An objective is traced once for each number of rows, for all lengths at once where it can be
    (:mod:`mintjax.gradients.lengths`), and otherwise anew for each batch.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, list[_Plan]] = {}

    def run(self, objective: Objective, identity: Identity, batch: Batch, rows: Rows) -> Outcome:
        """Computes the loss, the metrics and the gradient with respect to each row."""
        rows = _canonical(rows)
        plan = self._find(objective, identity, batch, rows)
        if plan is not None and plan.trace is not None and plan.program is not None:
            return _by_groups(plan.trace, plan.program, identity, batch, rows)
        count("loops_traced")
        closed, tree = _trace_batch(objective, identity, batch, rows)
        (loss, metrics), grads = tree.unflatten(interpreted.evaluate(closed, rows))
        return Outcome(loss, metrics, False, [np.array(grad) for grad in grads])

    def needs_logprobs(
        self, objective: Objective, identity: Identity, batch: Batch, rows: Rows
    ) -> bool:
        """Tells whether the gradient depends on the logprobs, whose shapes ``rows`` has."""
        rows = _canonical(rows)
        plan = self._find(objective, identity, batch, rows)
        if plan is not None and plan.trace is not None:
            return plan.trace.needs_logprobs
        closed, tree = _trace_batch(objective, identity, batch, rows)
        outputs = range(tree.num_leaves - len(rows), tree.num_leaves)
        return bool(inputs_used(closed.jaxpr, outputs))

    def _find(
        self, objective: Objective, identity: Identity, batch: Batch, rows: Rows
    ) -> _Plan | None:
        if not all(map(len, rows)):
            return None  # a symbol stands for a length of at least one
        if any(datum.loss_fn_inputs.keys() != batch.names for datum in batch):
            return None  # what stands for datums in a trace has the same columns in each
        key = (
            batch.names,
            len(rows),
            lengths.are_long(rows),
            rows[0].shape[1:],
            rows[0].dtype,
            jax.dtypes.canonicalize_dtype(np.int64),
            identity.parameter_kinds,
        )
        plans = self._plans.setdefault(key, [])
        for plan in plans:
            if all(lengths.kind_of(batch, name) == kind for name, kind in plan.kinds.items()):
                return plan
        try:
            trace = lengths.trace(identity, batch, rows)
            program = grouped.prepare(trace.flat, len(rows), trace.parameters)
            plan = _Plan(trace.kinds, trace, program)
        except lengths.NotForAllLengths as error:
            _warn(objective, str(error), error)
            plan = _Plan(error.kinds)
        except interpreted.Unsupported as error:
            _warn(objective, f"JAX's {error} is not known for symbolic lengths", error)
            plan = _Plan({})
        plans.append(plan)
        while len(self._plans) > _KEPT:
            del self._plans[next(iter(self._plans))]
        return plan


def _by_groups(
    trace: lengths.Trace, program: grouped.Grouped, identity: Identity, batch: Batch, rows: Rows
) -> Outcome:
    sizes = list(map(len, rows))
    results, flat = program.run(trace.arguments(batch, rows, identity), sizes)
    few = 2 * program.operations <= len(trace.flat.equations)
    count("loops_grouped" if few else "loops_interpreted")
    ends = itertools.accumulate(sizes)
    grads = [flat[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    (loss, metrics), grads = trace.tree.unflatten([*results, *grads])
    return Outcome(loss, metrics, bool(np.isfinite(flat).all()), grads)


def _canonical(rows: Rows) -> list[npt.NDArray[Any]]:
    return [row.astype(jax.dtypes.canonicalize_dtype(row.dtype), copy=False) for row in rows]


def _trace_batch(
    objective: Objective, identity: Identity, batch: Batch, rows: Rows
) -> tuple[Any, Any]:
    """Traces value and gradient for one batch; returns the jaxpr and the outputs' structure."""

    def value(rows: Sequence[Any]) -> tuple[Any, Metrics]:
        return evaluate(objective, batch, Ragged.from_rows(rows))

    trace: Any = jax.make_jaxpr(jax.value_and_grad(value, has_aux=True), return_shape=True)
    closed, shape = trace(rows)
    _check_integers(value, closed, rows)
    return closed, cast("Any", jax.tree_util.tree_structure(shape))


def _check_integers(value: Any, closed: Any, rows: Rows) -> None:
    """Refuses NumPy's integers beyond 32 bits that meet a traced value, because JAX wraps them.

    JAX says nothing of it, so a second trace, which has 64 bits, shows what JAX was given.

    Raises:
        OverflowError: one does not fit.
    """
    wide_already = jax.dtypes.canonicalize_dtype(np.int64) == np.int64
    if wide_already or not any(np.asarray(const).dtype.kind in "iu" for const in closed.consts):
        return
    try:
        with jax.enable_x64(True):
            consts: list[Any] = cast("Any", jax.make_jaxpr(value)(rows)).consts
    except Exception:  # a function that takes 32 bits only cannot be traced with 64
        return
    for const in consts:
        array = np.asarray(const)
        if array.ndim and array.dtype == np.int64:
            interpreted.narrowed(array, np.dtype(np.int32))


def _warn(objective: Objective, reason: str, error: BaseException) -> None:
    message = (
        f"{name_of(objective)} takes rows one by one and is traced anew for every batch, which can "
        f"cost a hundred times as much, because {reason}."
    )
    line = _line_of(error)
    if line is None:
        warnings.warn(message, stacklevel=2)
    else:
        warnings.warn_explicit(message, UserWarning, *line)


def _line_of(error: BaseException) -> tuple[str, int] | None:
    """Finds the line of the user's own code that led to an error, or to what caused it."""
    if isinstance(error, lengths.NotForAllLengths) and error.line is not None:
        return error.line
    if isinstance(error, interpreted.Unsupported):
        calls = error.equation.calls
        for frame in () if calls is None else calls.frames:
            if not is_librarys(frame.file_name):
                return frame.file_name, frame.line_num
    cause: BaseException | None = error
    while cause is not None:
        line = users_line(cause)
        if line is not None and line.lineno is not None:
            return line.filename, line.lineno
        cause = cause.__cause__
    return None
