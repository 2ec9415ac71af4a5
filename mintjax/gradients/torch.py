"""Losses written for torch, as objectives: to move one loss at a time."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mintjax.errors import ObjectiveError
from mintjax.gradients.contract import warn_of_no_gradient
from mintjax.ragged.batch import Batch
from mintjax.tensors import numbers_of

TorchLoss = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
"""``(data: list[Datum], logprobs: list[torch.Tensor]) -> (torch scalar, metrics)``."""


def torch_if_written_for_it(loss: Any) -> Any:
    """Makes a :class:`torch_objective` of a function that names torch, and leaves others alone.

    A function names torch where its code reads a global, a closure variable or an attribute that is
    torch's, calls ``to_torch``, or imports torch; or where a function of the user's that it reaches
    by name does. Functions of installed packages are not looked into, unless the loss is one.

    Args:
        loss: an objective, or a loss for the official SDK.

    Returns:
        What evaluates it as it is meant.
    """
    kind = cast("type[Any]", type(loss))
    called: Any = loss if issubclass(kind, _FUNCTIONS) else getattr(kind, "__call__", None)  # noqa: B004
    home = _home(called)
    named = home not in _NEVER_TORCH and _names_torch(called, home, set())
    return torch_objective(loss) if named else loss


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_NEVER_TORCH = ("jax", "mintjax", "optax")


def _home(value: Any) -> str:
    """Names the package that something was defined in."""
    if isinstance(value, functools.partial):
        return _home(cast("functools.partial[Any]", value).func)
    name = value.__name__ if isinstance(value, types.ModuleType) else ""
    return str(getattr(value, "__module__", None) or name).partition(".")[0]


def _names_torch(value: Any, home: str, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, functools.partial):
        return _names_torch(cast("functools.partial[Any]", value).func, home, seen)
    if isinstance(value, types.MethodType):
        value = value.__func__
    if _home(value) == "torch":
        return True
    if not isinstance(value, types.FunctionType) or (_home(value) != home and _installed(value)):
        return False
    names = _names_in(value.__code__)
    if "to_torch" in names or "torch" in names:
        return True
    reached = [value.__globals__[name] for name in names if name in value.__globals__]
    for cell in value.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            reached.append(cell.cell_contents)
    return any(_names_torch(one, home, seen) for one in reached)


def _installed(function: types.FunctionType) -> bool:
    path = function.__code__.co_filename
    return "-packages" in path or _home(function) in sys.stdlib_module_names


def _names_in(code: types.CodeType) -> set[str]:
    """Collects the global names and attributes that a function's code reads."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {*code.co_names}.union(*map(_names_in, inner))


class torch_objective:
    """A torch loss as an objective, at torch's own speed: its gradient is torch's, JAX has no part.

    It can be passed wherever an objective is evaluated by mintjax (``value_and_logprob_grads``,
    ``forward_backward_custom``), but not traced: it is no part of a JAX function.

    Args:
        fn: ``(data, logprobs) -> (loss, metrics)``, as the official SDK takes it: a list of datums
            and a list of float32 leaves that require a gradient, one per datum; a scalar tensor and
            a dict of numbers or one-element tensors. A datum's ``loss_fn_inputs`` are
            :class:`~mintjax.TensorData`, with ``to_torch()``.

    Raises:
        ImportError: when first evaluated, if torch is missing: ``pip install torch``.
    """

    def __init__(self, fn: TorchLoss) -> None:
        self.fn = fn

    def __repr__(self) -> str:
        return f"torch_objective({getattr(self.fn, '__qualname__', self.fn)})"

    def __call__(self, data: Any, logprobs: Any) -> Any:
        """Refuses to be traced.

        Raises:
            ObjectiveError: always.
        """
        raise ObjectiveError(
            f"{self!r} is torch's and cannot be traced by JAX; pass it to forward_backward_custom "
            "or value_and_logprob_grads as it is, not inside another objective"
        )

    def evaluate(
        self, data: Batch, rows: Sequence[npt.NDArray[Any]]
    ) -> tuple[float, dict[str, Any], list[npt.NDArray[Any]]]:
        """Loss, metrics and gradient, by ``loss.backward()``.

        Args:
            data: B datums.
            rows: their logprobs, in nats.

        Returns:
            The loss, the metrics as floats and arrays ``[B]``, and one gradient per datum; zeros
            for a row that the loss does not read.

        Raises:
            ObjectiveError: the loss is no scalar tensor, or there is no dict of numbers beside it.
        """
        import torch as untyped  # pyright: ignore

        torch = cast("Any", untyped)
        leaves = [torch.tensor(row, requires_grad=True) for row in rows]
        returned: Any = self.fn(list(data), leaves)
        if not (isinstance(returned, tuple) and len(cast("tuple[Any, ...]", returned)) == 2):
            raise ObjectiveError(f"{self!r} must return (loss, metrics), not {returned!r:.80}")
        loss, metrics = cast("tuple[Any, Mapping[Any, Any]]", returned)
        if not isinstance(cast("object", metrics), Mapping):
            raise ObjectiveError(f"the metrics of {self!r} must be a dict, not {metrics!r:.80}")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ObjectiveError(f"the loss of {self!r} must be a torch scalar, not {loss!r:.80}")
        if loss.requires_grad:
            loss.sum().backward()
        else:
            warn_of_no_gradient(self)
        grads = [
            np.zeros_like(row) if leaf.grad is None else leaf.grad.numpy()
            for row, leaf in zip(rows, leaves, strict=True)
        ]
        value = float(loss.detach())
        numbers = {str(name): self._plain(name, m, len(rows)) for name, m in metrics.items()}
        return value, {"loss": value, **numbers}, grads

    def _plain(self, name: Any, metric: Any, datums: int) -> float | npt.NDArray[Any]:
        try:
            if getattr(metric, "shape", None) == (datums,):
                return np.array(numbers_of(metric))
            return float(metric.detach() if hasattr(metric, "detach") else metric)
        except (TypeError, ValueError, RuntimeError):
            raise ObjectiveError(
                f"metric {name!r} of {self!r} must be a number, or an array of one number per "
                f"datum, ({datums},), not {metric!r:.80}"
            ) from None
