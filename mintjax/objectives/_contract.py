"""The contract of an objective: what it is and returns, and errors that say how it was broken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mintjax.errors import ObjectiveError


def name_of(objective: Any) -> str:
    """Gives the words by which a message calls an objective."""
    return getattr(objective, "__qualname__", None) or repr(objective)


def check_callable(objective: Any) -> None:
    """Checks that an objective can be one, before it is called.

    Raises:
        ObjectiveError: it cannot be called, or is a class, or a loss of arrays.
    """
    if isinstance(objective, type):
        raise ObjectiveError(
            f"{name_of(objective)} is a class; an objective is one of its objects: "
            f"{objective.__name__}()"
        )
    if not callable(objective):
        raise ObjectiveError(
            f"an objective is a function (data, logprobs) -> (loss, metrics), not {objective!r}"
        )
    if str(getattr(objective, "__module__", "")).startswith("mintjax.losses."):
        name = name_of(objective)
        raise ObjectiveError(
            f"losses.{name} is a loss of arrays, not an objective: objectives.{name}() may be the "
            f"objective of that name, and objectives.policy(losses.{name}) makes one"
        )


def check_returned(objective: Any, returned: Any) -> tuple[Any, Mapping[Any, Any]]:
    """Checks that an objective has returned a scalar and a mapping.

    Args:
        objective: for the message.
        returned: what it has returned.

    Returns:
        The loss and the metrics.

    Raises:
        ObjectiveError: it has returned something else.
    """
    if not (isinstance(returned, tuple) and len(cast("tuple[Any, ...]", returned)) == 2):
        raise ObjectiveError(
            f"{name_of(objective)} must return (loss, metrics), not {describe(returned)}"
        )
    loss, metrics = cast("tuple[Any, Any]", returned)
    is_array = isinstance(cast("object", loss), jax.Array | np.ndarray | np.generic)
    if not is_array or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ObjectiveError(
            f"the loss of {name_of(objective)} must be a floating-point scalar computed from the "
            f"logprobs, not {describe(loss)}"
        )
    if loss.shape != ():
        raise ObjectiveError(
            f"the loss of {name_of(objective)} must be a scalar, not an array of shape "
            f"{loss.shape}; reduce it with .sum() or .mean()"
        )
    if not isinstance(metrics, Mapping):
        raise ObjectiveError(
            f"the metrics of {name_of(objective)} must be a dict, not {describe(metrics)}"
        )
    return loss, cast("Mapping[Any, Any]", metrics)


def describe(value: Any) -> str:
    """Gives the words by which a message calls a value that is not what it should be."""
    kind = "an array" if isinstance(value, jax.Array) else type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return kind
