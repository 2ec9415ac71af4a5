"""Trainers for the bridge: one that only records, and one that goes through a training client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mintjax.tensors import TensorData
from mintjax.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput


def make(
    lengths: Sequence[int] = (3, 7, 5, 4), *, seed: int = 0, trailing: tuple[int, ...] = ()
) -> list[Datum]:
    """Datums with every column that an objective of the tests reads."""
    rng = np.random.default_rng(seed)

    def one(length: int) -> Datum:
        shape = (length, *trailing)
        columns = {
            "target_tokens": rng.integers(0, 256, shape),
            "weights": np.broadcast_to(np.arange(length) > 0, shape[::-1]).T,
            "advantages": rng.standard_normal(shape),
            "logprobs": -5.5 + 0.3 * rng.standard_normal(shape),
        }
        return Datum(ModelInput.from_ints(rng.integers(0, 256, length)), columns)

    return [one(length) for length in lengths]


class Done:
    def result(self) -> None:
        return None


class Double:
    """Records what reaches it. Each optimizer step lowers every logprob by one.

    Attributes:
        failure: what the method of that name raises.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.grads: list[list[np.ndarray[Any, Any]]] = []
        self.steps: list[Any] = []
        self.failure: dict[str, BaseException] = {}

    def logprobs(self, data: Sequence[Datum]) -> list[np.ndarray[Any, Any]]:
        self._called("logprobs")
        offset = np.float32(len(self.steps))
        return [datum.loss_fn_inputs["logprobs"].to_numpy() - offset for datum in data]

    def backward(
        self,
        data: Sequence[Datum],
        logprobs: Sequence[np.ndarray[Any, Any]],
        grads: Sequence[np.ndarray[Any, Any]],
    ) -> ForwardBackwardOutput:
        self._called("backward")
        self.grads.append([np.array(grad) for grad in grads])
        outputs = [{"logprobs": TensorData.from_numpy(np.array(row))} for row in logprobs]
        total = sum(float(-(row * grad).sum()) for row, grad in zip(logprobs, grads, strict=True))
        return ForwardBackwardOutput(loss_fn_outputs=outputs, metrics={"loss:sum": total})

    def optim_step(self, adam_params: AdamParams) -> Done:
        self._called("optim_step")
        self.steps.append(adam_params)
        return Done()

    def taken(self) -> list[str]:
        """The calls since the last time this was asked."""
        calls, self.calls = self.calls, []
        return calls

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failure:
            raise self.failure[name]


def _weighted(data: Sequence[Datum], weights: Sequence[np.ndarray[Any, Any]]) -> list[Datum]:
    return [
        Datum(
            datum.model_input,
            {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": weight},
        )
        for datum, weight in zip(data, weights, strict=True)
    ]
