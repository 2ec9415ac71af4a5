"""Loss, metrics and per-datum gradients of an objective with respect to the logprobs."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError, NonFiniteError
from mintjax.gradients import interpreted
from mintjax.gradients.compiled import (
    Objective,
    Program,
    Stats,
    Summary,
    count,
    evaluate,
    name_of,
    program_for,
    read_summary,
    stats,
)
from mintjax.gradients.dependence import inputs_used
from mintjax.gradients.torch import torch_objective
from mintjax.ragged import Ragged, RowAccessError
from mintjax.ragged.batch import Batch, as_batch, check_shapes
from mintjax.tensors import first_row_not_finite
from mintjax.types import Datum

__all__ = [
    "LogprobGradients",
    "Objective",
    "Stats",
    "constant_logprob_grads",
    "loss_and_metrics",
    "stats",
    "value_and_logprob_grads",
]

T = TypeVar("T")

_TYPE_CODE = operator.attrgetter("dtype.char")


class LogprobGradients(NamedTuple):
    """What :func:`value_and_logprob_grads` returns.

    Args:
        loss: the objective's value.
        metrics: the objective's metrics as floats; ``"loss"`` is there too.
        grads: ``d loss / d logprobs``, one array per datum, in order, in the shape of its logprobs;
            to be read only, as JAX's arrays are.
    """

    loss: float
    metrics: dict[str, float]
    grads: list[npt.NDArray[Any]]


def value_and_logprob_grads(
    objective: Objective,
    data: Sequence[Datum] | Batch,
    logprobs: Sequence[npt.ArrayLike] | Ragged,
) -> LogprobGradients:
    """The value of an objective, its metrics, and its gradient at each token.

    ``grads[i] = d loss / d logprobs[i]``, by ``jax.value_and_grad`` under a cached ``jit``. Rows
    are laid out so that batches of other lengths meet the same compiled program; an objective that
    takes rows one by one is evaluated with exact lengths instead: the same numbers, slower.

    Args:
        objective: ``(data, logprobs) -> (loss, metrics)``: a scalar, and a dict of scalars. A pure
            function that JAX can trace. Hold on to it: compiled programs are kept by objective, and
            one that is made anew each step is compiled anew each step.
        data: B datums. The objective sees every ``loss_fn_inputs`` column.
        logprobs: one array per datum, in nats, shape ``[T_i]`` or ``[T_i, K]``; float32, or float64
            under ``jax_enable_x64``.

    Returns:
        ``.loss``, ``.metrics`` and ``.grads``.

    Raises:
        DataError: the logprobs do not fit the data, or the objective reads a column that a datum
            does not have.
        ObjectiveError: the objective did not return a scalar and a dict of scalars.
        NonFiniteError: a gradient is NaN or infinite; names datum, position and inputs there.
        Exception: whatever the objective raises, as it is.

    Example:
        >>> import mintjax
        >>> def mean_nll(data, logprobs):
        ...     weights = data["weights"]
        ...     return -(logprobs * weights).total() / weights.total(), {"rows": len(data)}
        >>> tokens = mintjax.ModelInput.from_ints([7, 8, 9])
        >>> datum = mintjax.Datum(tokens, {"target_tokens": [8, 9, 7], "weights": [0, 1, 1]})
        >>> result = mintjax.value_and_logprob_grads(mean_nll, [datum], [[-3.0, -2.0, -1.0]])
        >>> result.loss, result.metrics
        (1.5, {'loss': 1.5, 'rows': 1.0})
        >>> result.grads
        [array([-0. , -0.5, -0.5], dtype=float32)]
    """
    batch = as_batch(data)
    rows = _logprob_rows(batch, logprobs)
    result, finite = _evaluate(objective, batch, rows)
    found = None if finite else first_row_not_finite(result.grads)
    if found is not None:
        raise not_finite(name_of(objective), batch, rows, result.grads, found)
    return result


def loss_and_metrics(
    objective: Objective,
    data: Sequence[Datum] | Batch,
    logprobs: Sequence[npt.ArrayLike] | Ragged,
) -> tuple[float, dict[str, float]]:
    """The value of an objective and its metrics, by the program that has its gradient too.

    Args and errors are those of :func:`value_and_logprob_grads`, but that a gradient which is not
    finite is none.

    Returns:
        The loss, and the metrics with ``"loss"`` among them.
    """
    batch = as_batch(data)
    return _evaluate(objective, batch, _logprob_rows(batch, logprobs))[0][:2]


def _evaluate(
    objective: Objective, batch: Batch, rows: Sequence[npt.NDArray[Any]]
) -> tuple[LogprobGradients, bool]:
    """The result, and whether its gradients are known to be finite."""
    if isinstance(objective, torch_objective):
        loss, metrics, grads = objective.evaluate(batch, rows)
        finite = False
    else:
        program, parameters = program_for(objective)
        summary, grads = _in_columns_or_rows(
            program,
            objective,
            lambda: program.run(parameters, batch, rows),
            lambda: _row_by_row(objective, batch, rows),
        )
        loss, metrics, finite = read_summary(summary)
    return LogprobGradients(loss, metrics, grads), finite


def constant_logprob_grads(
    objective: Objective, data: Sequence[Datum] | Batch
) -> list[npt.NDArray[Any]] | None:
    """The gradient of an objective, if it is the same whatever the logprobs are.

    So it is where the loss is linear in them: cross-entropy, REINFORCE, a mean. It is told from the
    traced gradient: does any operation that leads to it read the logprobs? Then a step needs no
    forward pass.

    Args:
        objective: as for :func:`value_and_logprob_grads`.
        data: B datums with ``target_tokens``.

    Returns:
        One float32 array per datum in the shape of its ``target_tokens``, or None if the gradient
        depends on the logprobs.

    Raises:
        As :func:`value_and_logprob_grads`.
    """
    if isinstance(objective, torch_objective):
        return None
    batch = as_batch(data)
    rows = [np.zeros(targets.shape, np.float32) for targets in batch.rows("target_tokens")]
    program, parameters = program_for(objective)
    depends = _in_columns_or_rows(
        program,
        objective,
        lambda: program.needs_logprobs(parameters, batch, rows),
        lambda: _row_by_row_needs_logprobs(objective, batch, rows),
    )
    return None if depends else value_and_logprob_grads(objective, batch, rows).grads


def _in_columns_or_rows(
    program: Program, objective: Objective, columns: Callable[[], T], rows: Callable[[], T]
) -> T:
    if not program.takes_rows:
        try:
            return columns()
        except RowAccessError:
            program.takes_rows = True
            _warn_row_by_row(objective)
    return rows()


def _logprob_rows(
    batch: Batch, logprobs: Sequence[npt.ArrayLike] | Ragged
) -> list[npt.NDArray[Any]]:
    rows: list[npt.NDArray[Any]] = [
        row if isinstance(row, np.ndarray) else np.asarray(row) for row in logprobs
    ]
    if len(rows) != len(batch):
        raise DataError(f"{len(rows)} rows of logprobs for {len(batch)} datums", field="logprobs")
    check_shapes("logprobs", rows, batch.lengths)
    if not rows[0].ndim:
        raise DataError("a row of logprobs needs an axis of tokens", datum=0, field="logprobs")
    if set(map(_TYPE_CODE, rows)) == {"f"}:
        return rows
    return [row if row.dtype.kind == "f" else row.astype(np.float32) for row in rows]


def _row_by_row(
    objective: Objective, batch: Batch, rows: Sequence[npt.NDArray[Any]]
) -> tuple[Summary, list[npt.NDArray[Any]]]:
    count("row_by_row_steps")
    closed, tree, rows = _trace_rows(objective, batch, rows)
    (_, summary), grads = tree.unflatten(interpreted.evaluate(closed, rows))
    return summary, [np.array(grad) for grad in grads]


def _row_by_row_needs_logprobs(
    objective: Objective, batch: Batch, rows: Sequence[npt.NDArray[Any]]
) -> bool:
    closed, tree, _ = _trace_rows(objective, batch, rows)
    return bool(inputs_used(closed.jaxpr, range(tree.num_leaves - len(rows), tree.num_leaves)))


def _trace_rows(
    objective: Objective, batch: Batch, rows: Sequence[npt.NDArray[Any]]
) -> tuple[Any, Any, list[npt.NDArray[Any]]]:
    """The jaxpr of value and gradient, the structure of its outputs, and the rows it takes."""

    def value(rows: Sequence[Any]) -> tuple[Any, Summary]:
        return evaluate(objective, batch, Ragged.from_rows(rows))

    rows = [row.astype(jax.dtypes.canonicalize_dtype(row.dtype), copy=False) for row in rows]
    trace: Any = jax.make_jaxpr(jax.value_and_grad(value, has_aux=True), return_shape=True)
    closed, shape = trace(rows)
    return closed, cast("Any", jax.tree_util.tree_structure(shape)), rows


def _warn_row_by_row(objective: Objective) -> None:
    warnings.warn(
        f"{name_of(objective)} takes rows one by one, so every new set of lengths is traced anew, "
        "which can cost a hundred times as much. Use the row reductions instead of a loop: "
        "`(logprobs * data['weights']).sum()` gives one score per datum, and `scores[0::2]` those "
        "of every other one.",
        stacklevel=5,
    )


def not_finite(
    what: str,
    batch: Batch,
    logprobs: Sequence[npt.NDArray[Any]],
    grads: Sequence[npt.NDArray[Any]],
    at: tuple[int, int],
) -> NonFiniteError:
    """The error that names datum, position, logprob and inputs where a gradient is not finite.

    Args:
        what: they are gradients of.
        batch: B datums.
        logprobs: of each, in nats.
        grads: of each, in the shape of its logprobs.
        at: the datum and the flat position there.
    """
    i, position = at
    grad = grads[i]
    index = np.unravel_index(position, grad.shape)
    where = f"{index[0]}" if grad.ndim == 1 else f"{tuple(map(int, index))}"
    inputs = {name: value[index[: value.ndim]] for name, value in batch[i].loss_fn_inputs.items()}
    shown = ", ".join(f"{name} {value}" for name, value in inputs.items())
    return NonFiniteError(
        f"the gradient of {what} is {grad[index]} at datum {i}, position {where}, where the "
        f"logprob is {logprobs[i][index]} and the inputs are: {shown or 'none'}. Nothing was sent. "
        "Mask such tokens before an operation that overflows or divides by zero, as in "
        "jnp.where(mask, f(jnp.where(mask, x, 0)), 0).",
        datum=i,
        position=position,
    )
