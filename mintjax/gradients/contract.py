"""The contract of an objective: what it must return, and errors that say how it was broken."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax.errors import ObjectiveError
from mintjax.objectives._contract import check_callable, check_returned, describe, name_of
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
    check_callable(objective)
    try:
        returned = cast("Any", objective(data, logprobs))
    except _NOT_TRACEABLE as error:
        raise ObjectiveError(_untraceable(objective, error)) from error
    loss, metrics = check_returned(objective, returned)
    named = {str(name): _metric(name, value, len(data)) for name, value in metrics.items()}
    if len(named) < len(metrics):
        raise ObjectiveError(f"metrics of one name would be mixed up: {[*metrics]}")
    return loss, jax.lax.stop_gradient(named)


def warn_of_no_gradient(objective: Any) -> None:
    """Warns of a gradient that is 0 whatever the numbers are."""
    warnings.warn(
        f"the gradient of {name_of(objective)} is 0 whatever the logprobs are, so that the step "
        "changes nothing: its loss is not computed from the logprobs that it is called with, but "
        'perhaps from a column, such as data["logprobs"], or behind jax.lax.stop_gradient or '
        "detach()",
        stacklevel=2,
    )


def users_line(error: BaseException) -> traceback.FrameSummary | None:
    """Finds the line of the user's own code that led to an error: the last outside libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_librarys(frame.filename)]
    return own[-1] if own else None


def is_librarys(file: str) -> bool:
    """Tells whether a file is JAX's or mintjax's."""
    return file.startswith(_LIBRARIES)


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
        array = jnp.asarray(_in_range(value))
    except (TypeError, ValueError, OverflowError):
        raise ObjectiveError(f"metric {name!r} must be a number, not {describe(value)}") from None
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)):
        raise ObjectiveError(f"metric {name!r} must be a real number, not {describe(array)}")
    if array.shape == (datums,):
        return array
    if array.size != 1:
        raise ObjectiveError(
            f"metric {name!r} must be a scalar, or an array of one number per datum, ({datums},), "
            f"not an array of shape {array.shape}"
        )
    return array.reshape(())


def _in_range(value: Any) -> Any:
    """Makes a number of Python's or NumPy's a float where JAX would wrap it around."""
    if not isinstance(value, int | float | np.ndarray | np.generic):
        return value
    array: Any = np.asarray(cast("Any", value))
    exact = jax.dtypes.canonicalize_dtype(array.dtype) if array.dtype.kind in "iu" else None
    if exact is not None and array.size:
        limits = jnp.iinfo(exact)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            return array.astype(np.float32)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    return array
