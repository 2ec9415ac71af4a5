"""A trainer whose logprobs are linear in its weights, so that its gradients are known exactly."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mintjax.errors import BadRequestError
from mintjax.step.reduction import Reduction, amount
from mintjax.tensors import TensorData
from mintjax.types import ForwardBackwardOutput

Divide = Callable[[Sequence[Sequence[Any]]], Sequence[Sequence[float]]]


def done(value: Any) -> Any:
    return types.SimpleNamespace(result=lambda timeout=None: value)


def floored(reduction: Reduction) -> Divide:
    """The divisors of a reduction, each amount at least 1."""

    def divide(requests):
        step = max(1.0, amount(reduction.per_step, [row for r in requests for row in r]))
        return [
            [
                step
                * max(1.0, amount(reduction.per_request, request))
                * max(1.0, amount(reduction.per_sequence, [row]))
                for row in request
            ]
            for request in requests
        ]

    return divide


@functools.cache
def features(tokens: tuple[int, ...], targets: tuple[int, ...], size: int) -> np.ndarray:
    rows = [
        np.random.default_rng([*tokens[: i + 1], target]).standard_normal(size)
        for i, target in enumerate(targets)
    ]
    return 0.1 * np.array(rows) + 0.02


class LinearTrainer:
    """The logprob of a token is linear in weights whose features depend on the tokens up to it.

    Args:
        divide: gives each datum's divisor, from the weights of all since the optimizer step.
        most_eps: refuse a larger ``eps``.
        noise: of each logprob, in nats.
        gain: by which each step moves further than the one before.
    """

    def __init__(
        self,
        divide: Divide,
        *,
        most_eps: float = 1e9,
        noise: float = 0.0,
        gain: float = 1.0,
        size: int = 8,
    ) -> None:
        self.divide, self.most_eps, self.noise, self.gain = divide, most_eps, noise, gain
        self.size = 64
        self.weights = np.zeros(self.size)
        self.requests: list[list[tuple[Any, Any]]] = []
        self.steps = 0
        self.rng = np.random.default_rng(3)

    def features(self, datum):
        targets = datum.loss_fn_inputs["target_tokens"].tolist()
        return features(tuple(datum.model_input.to_ints()), tuple(targets), self.size)

    def logprobs(self, datum):
        exact = -5.0 + self.features(datum) @ self.weights
        return exact + self.noise * self.rng.standard_normal(exact.shape)

    def forward(self, data, loss_fn):
        rows = [TensorData(self.logprobs(datum).astype(np.float32)) for datum in data]
        return done(ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": row} for row in rows]))

    def forward_backward(self, data, loss_fn):
        request = []
        for datum in data:
            inputs = datum.loss_fn_inputs
            weights = np.asarray(inputs["weights"], np.float64)
            slopes = -weights
            if loss_fn == "importance_sampling":
                ratio = np.exp(self.logprobs(datum) - inputs["logprobs"])
                slopes = -weights * ratio * inputs["advantages"]
            request.append((weights, slopes @ self.features(datum)))
        self.requests.append(request)
        return self.forward(data, loss_fn)

    def gradient(self):
        """What the next optimizer step would use."""
        by = self.divide([[weights for weights, _ in request] for request in self.requests])
        pairs = zip(self.requests, by, strict=True)
        return sum(
            gradient / divisor
            for request, row in pairs
            for (_, gradient), divisor in zip(request, row, strict=True)
        )

    def optim_step(self, adam_params):
        if adam_params.eps > self.most_eps:
            raise BadRequestError(422, "eps: Input should be less than or equal to 1")
        gradient = self.gradient()
        size = adam_params.learning_rate * self.gain**self.steps
        self.weights -= size * gradient / (np.abs(gradient) + adam_params.eps)
        self.requests.clear()
        self.steps += 1
        return done(None)
