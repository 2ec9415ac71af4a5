"""The contract of an objective: what it must return, and errors that say how it was broken."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy.typing as npt

from mintjax.errors import ObjectiveError
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch

Array: TypeAlias = Any
Objective: TypeAlias = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
Metrics: TypeAlias = dict[str, Array]


class Outcome(NamedTuple):
    """The arrays that a program computes.

    Args:
        loss: the objective's value.
        metrics: by name.
        finite: whether the whole gradient is finite.
        grads: with respect to each row.
    """

    loss: Array
    metrics: Metrics
    finite: Array | bool
    grads: list[npt.NDArray[Any]]


_NOT_TRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def evaluate(objective: Objective, data: Batch, logprobs: Ragged) -> tuple[Array, Metrics]:
    """Calls an objective and holds what it returns against the contract.

    Returns:
        The loss, and the metrics as arrays that carry no gradient.

    Raises:
        ObjectiveError: it did not return a scalar and a dict of scalars and arrays ``[B]``, or it
            needs the value of something that JAX traces.
    """
    try:
        returned = cast("Any", objective(data, logprobs))
    except _NOT_TRACEABLE as error:
        raise ObjectiveError(_untraceable(objective, error)) from error
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
    items = cast("Mapping[Any, Any]", metrics).items()
    named = {str(name): _metric(name, value, len(data)) for name, value in items}
    return loss, jax.lax.stop_gradient(named)


def name_of(objective: Any) -> str:
    """Gives the words by which a message calls an objective."""
    return getattr(objective, "__qualname__", None) or repr(objective)


def users_line(error: BaseException) -> traceback.FrameSummary | None:
    """Finds the line of the user's own code that led to an error: the last outside libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    return own[-1] if own else None


_LIBRARIES = (str(Path(str(jax.__file__)).parent), str(Path(__file__).parents[1]))


def _untraceable(objective: Any, error: Exception) -> str:
    if isinstance(error, jax.errors.TracerBoolConversionError):
        what = "takes the truth of a value that JAX traces, which has none yet"
        advice = "Use jnp.where(condition, a, b) instead of `if`, `and`, `or`, `min` or `max`."
    elif isinstance(error, jax.errors.TracerArrayConversionError):
        what = "turns a value that JAX traces into a NumPy array"
        advice = "Use jnp in place of np."
    else:
        what = "needs the number of a value that JAX traces"
        advice = (
            "Return it as a metric, which arrives as a float, instead of calling float(), int() or "
            ".item() on it; choose by jnp.where, and index by jnp.take."
        )
    line = users_line(error)
    where = f"{line.filename}:{line.lineno}: `{line.line}`: " if line else ""
    return f"{where}{name_of(objective)} {what}. {advice}"


def _metric(name: Any, value: Any, datums: int) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        raise ObjectiveError(f"metric {name!r} must be a number, not {_describe(value)}") from None
    if array.shape == (datums,):
        return array
    if array.size != 1:
        raise ObjectiveError(
            f"metric {name!r} must be a scalar, or an array of one number per datum, ({datums},), "
            f"not an array of shape {array.shape}"
        )
    return array.reshape(())


def _describe(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} of shape {value.shape}" if hasattr(value, "shape") else kind
