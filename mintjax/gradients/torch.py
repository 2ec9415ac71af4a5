"""Losses written for torch, as objectives: to move one loss at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mintjax.errors import ObjectiveError
from mintjax.ragged.batch import Batch

TorchLoss = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
"""``(data: list[Datum], logprobs: list[torch.Tensor]) -> (torch scalar, metrics)``."""


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
        """Refuse to be traced.

        Raises:
            ObjectiveError: always.
        """
        raise ObjectiveError(
            f"{self!r} is torch's and cannot be traced by JAX; pass it to forward_backward_custom "
            "or value_and_logprob_grads as it is, not inside another objective"
        )

    def evaluate(
        self, data: Batch, rows: Sequence[npt.NDArray[Any]]
    ) -> tuple[float, dict[str, float], list[npt.NDArray[Any]]]:
        """Loss, metrics and gradient, by ``loss.backward()``.

        Args:
            data: B datums.
            rows: their logprobs, in nats.

        Returns:
            The loss, the metrics as floats, and one gradient per datum; zeros for a row that the
            loss does not read.

        Raises:
            ObjectiveError: the loss is no scalar tensor, or a metric no number.
        """
        import torch as untyped  # pyright: ignore

        torch = cast("Any", untyped)
        leaves = [torch.tensor(row, requires_grad=True) for row in rows]
        loss, metrics = self.fn(list(data), leaves)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ObjectiveError(f"the loss of {self!r} must be a torch scalar, not {loss!r:.80}")
        if loss.requires_grad:
            loss.sum().backward()
        grads = [
            np.zeros_like(row) if leaf.grad is None else leaf.grad.numpy()
            for row, leaf in zip(rows, leaves, strict=True)
        ]
        value = float(loss.detach())
        numbers = {str(name): self._number(name, metric) for name, metric in metrics.items()}
        return value, {"loss": value, **numbers}, grads

    def _number(self, name: Any, metric: Any) -> float:
        try:
            return float(metric.detach() if hasattr(metric, "detach") else metric)
        except (TypeError, ValueError, RuntimeError):
            raise ObjectiveError(
                f"metric {name!r} of {self!r} must be a number, not {metric!r:.80}"
            ) from None
