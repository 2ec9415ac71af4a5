"""Loss, metrics and per-datum gradients of an objective with respect to the logprobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError, NonFiniteError
from mintjax.gradients.compiled import Program, with_program
from mintjax.gradients.contract import Objective, name_of
from mintjax.gradients.counts import Stats, stats
from mintjax.gradients.identity import Identity
from mintjax.gradients.torch import torch_objective
from mintjax.ragged import Ragged, RowAccessError
from mintjax.ragged.batch import Batch, as_batch, check_shapes
from mintjax.ragged.transfers import transfers_allowed
from mintjax.tensors import first_row_not_finite, numbers_of
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


class LogprobGradients(NamedTuple):
    """The result of :func:`value_and_logprob_grads`.

    Args:
        loss: the objective's value.
        metrics: the objective's metrics, ``"loss"`` among them: floats, and NumPy arrays ``[B]`` of
            those that have one number per datum.
        grads: ``d loss / d logprobs``, one array per datum, in order, in the shape of its logprobs;
            to be read only, as JAX's arrays are.
    """

    loss: float
    metrics: dict[str, Any]
    grads: list[npt.NDArray[Any]]


def value_and_logprob_grads(
    objective: Objective,
    data: Sequence[Datum] | Batch,
    logprobs: Sequence[npt.ArrayLike] | Ragged,
) -> LogprobGradients:
    """Computes the value of an objective, its metrics, and its gradient at each token.

    ``grads[i] = d loss / d logprobs[i]``, by ``jax.value_and_grad`` under a cached ``jit``. Rows
    are laid out so that batches of other lengths meet the same compiled program; an objective that
    takes rows one by one is traced once for all lengths and evaluated with NumPy, all rows at once:
    the same numbers. :func:`mintjax.gradients.stats` counts such steps.

    Args:
        objective: ``(data, logprobs) -> (loss, metrics)``: a scalar, and a dict of scalars or of
            arrays ``[B]`` with one number per datum, such as a histogram is drawn from. A pure
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
        ObjectiveError: the objective did not return a scalar and such a dict.
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
    what = name_of(objective)
    if not np.isfinite(result.loss):
        raise _loss_not_finite(what, batch, rows, result.loss)
    found = None if finite else first_row_not_finite(result.grads)
    if found is not None:
        raise not_finite(what, batch, rows, result.grads, found)
    return result


def loss_and_metrics(
    objective: Objective,
    data: Sequence[Datum] | Batch,
    logprobs: Sequence[npt.ArrayLike] | Ragged,
) -> tuple[float, dict[str, Any]]:
    """Computes an objective and its metrics, by the program that has its gradient too.

    Args and errors are those of :func:`value_and_logprob_grads`, except that nothing need be
    finite.

    Returns:
        The loss, and the metrics with ``"loss"`` among them.
    """
    batch = as_batch(data)
    return _evaluate(objective, batch, _logprob_rows(batch, logprobs))[0][:2]


def _evaluate(
    objective: Objective, batch: Batch, rows: Sequence[npt.NDArray[Any]]
) -> tuple[LogprobGradients, bool]:
    """Computes the result, and whether its gradients are known to be finite."""
    if isinstance(objective, torch_objective):
        return LogprobGradients(*objective.evaluate(batch, rows)), False
    with transfers_allowed(), _untraced():
        outcome = _in_columns_or_rows(
            objective,
            lambda program, identity: program.run(identity, batch, rows),
            lambda program, identity: program.loops.run(objective, identity, batch, rows),
        )
        loss = np.asarray(outcome.loss).item()
        metrics = {name: _as_plain(value) for name, value in outcome.metrics.items()}
    return LogprobGradients(loss, {"loss": loss, **metrics}, outcome.grads), bool(outcome.finite)


@contextlib.contextmanager
def _untraced() -> Generator[None]:
    """Says so where numbers are asked for while JAX traces what calls this.

    Raises:
        DataError: JAX has no numbers yet.
    """
    try:
        yield
    except jax.errors.TracerArrayConversionError as error:
        raise DataError(
            "value_and_logprob_grads gives numbers, so it cannot be called within jax.jit, "
            "jax.grad or jax.vmap; there, take jax.value_and_grad of objective(data, logprobs)",
            field="logprobs",
        ) from error


def _as_plain(metric: Any) -> float | npt.NDArray[Any]:
    array = np.asarray(metric)
    return np.array(array) if array.ndim else float(array)


def constant_logprob_grads(
    objective: Objective, data: Sequence[Datum] | Batch
) -> list[npt.NDArray[Any]] | None:
    """Computes the gradient of an objective, if it is the same whatever the logprobs are.

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
    with transfers_allowed():
        depends = _in_columns_or_rows(
            objective,
            lambda program, identity: program.needs_logprobs(identity, batch, rows),
            lambda program, identity: program.loops.needs_logprobs(
                objective, identity, batch, rows
            ),
        )
    return None if depends else value_and_logprob_grads(objective, batch, rows).grads


def _in_columns_or_rows(
    objective: Objective,
    columns: Callable[[Program, Identity], T],
    rows: Callable[[Program, Identity], T],
) -> T:
    def work(program: Program, identity: Identity) -> T:
        if not program.takes_rows:
            try:
                return columns(program, identity)
            except RowAccessError:
                program.takes_rows = True
        return rows(program, identity)

    return with_program(objective, work)


def _logprob_rows(
    batch: Batch, logprobs: Sequence[npt.ArrayLike] | Ragged
) -> list[npt.NDArray[Any]]:
    with _untraced():
        rows: list[npt.NDArray[Any]] = [
            row if type(row) is np.ndarray else np.asarray(numbers_of(row)) for row in logprobs
        ]
    if len(rows) != len(batch):
        raise DataError(f"{len(rows)} rows of logprobs for {len(batch)} datums", field="logprobs")
    check_shapes("logprobs", rows, batch.lengths)
    if not rows[0].ndim:
        raise DataError("a row of logprobs needs an axis of tokens", datum=0, field="logprobs")
    dtypes = {row.dtype for row in rows}
    if len(dtypes) == 1 and rows[0].dtype.kind == "f" and rows[0].dtype.isnative:
        return rows
    for i, row in enumerate(rows):
        if row.dtype.kind not in "fiub" and row.dtype.name != "bfloat16":
            raise DataError(
                f"logprobs must be numbers, not {row.dtype.name}; is one of them None?",
                datum=i,
                field="logprobs",
            )
    wide = any(dtype.kind == "f" and dtype.itemsize > 4 for dtype in dtypes)
    return [row.astype(np.float64 if wide else np.float32) for row in rows]


def _loss_not_finite(
    what: str, batch: Batch, logprobs: Sequence[npt.NDArray[Any]], loss: float
) -> NonFiniteError:
    """Makes the error of a loss that is not finite; it names the input that is not, if one is."""
    found = _culprit(batch, logprobs)
    where = f", and {found[2]}" if found else ""
    return NonFiniteError(
        f"the loss of {what} is {loss}{where}. Nothing was sent. {_MASK}",
        datum=found[0] if found else None,
        position=found[1] if found else None,
    )


def not_finite(
    what: str,
    batch: Batch,
    logprobs: Sequence[npt.NDArray[Any]],
    grads: Sequence[npt.NDArray[Any]],
    at: tuple[int, int],
) -> NonFiniteError:
    """Makes the error of a gradient that is not finite.

    It names the input that is not finite, if there is one, because a loss that couples datums
    spreads it to others; and otherwise the first token whose gradient is not.

    Args:
        what: the objective's name.
        batch: B datums.
        logprobs: of each, in nats.
        grads: of each, in the shape of its logprobs.
        at: the datum and the flat position of the first gradient that is not finite.
    """
    i, position = at
    grad = grads[i]
    index = np.unravel_index(position, grad.shape)
    where = f"{index[0]}" if grad.ndim == 1 else f"{tuple(map(int, index))}"
    inputs = {name: value[index[: value.ndim]] for name, value in batch[i].loss_fn_inputs.items()}
    shown = ", ".join(f"{name} {value}" for name, value in inputs.items())
    found = _culprit(batch, logprobs)
    if found is not None:
        i, position, words = found
        words = f"{words}, so "
    else:
        words = ""
    return NonFiniteError(
        f"{words}the gradient of {what} is {grad[index]} at datum {at[0]}, position {where}, where "
        f"the logprob is {logprobs[at[0]][index]} and the inputs are: {shown or 'none'}. Nothing "
        f"was sent. {_MASK}",
        datum=i,
        position=position,
    )


_MASK = (
    "Mask such tokens before an operation that overflows or divides by zero, as in "
    "jnp.where(mask, f(jnp.where(mask, x, 0)), 0)."
)


def _culprit(batch: Batch, logprobs: Sequence[npt.NDArray[Any]]) -> tuple[int, int, str] | None:
    """Finds the first number given that is not finite, and takes one with a weight of 0 last.

    Returns:
        Its datum, its flat position there, and words for it.
    """
    hidden: tuple[int, int, str] | None = None
    for i, (datum, row) in enumerate(zip(batch, logprobs, strict=True)):
        weights = datum.loss_fn_inputs.get("weights")
        for name, values in [("logprob", row), *datum.loss_fn_inputs.items()]:
            flat = np.asarray(values)
            if flat.dtype.kind != "f":
                continue
            bad = ~np.isfinite(flat)
            if not bad.any():
                continue
            counts = bad
            if weights is not None and weights.ndim == flat.ndim and name != "weights":
                counts = bad & (np.asarray(weights) != 0)
            position = int(np.argmax(counts if counts.any() else bad))
            words = f"the {name} at datum {i}, position {position}, is {flat.ravel()[position]}"
            if counts.any():
                return i, position, words
            hidden = hidden or (i, position, words)
    return hidden
