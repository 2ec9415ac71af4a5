"""Find out, by a few steps on a throwaway model, what a trainer makes of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mintjax.errors import MintjaxError
from mintjax.step.reduction import Reduction
from mintjax.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput

_EPS = 1e3  # far above any gradient, so that a step of Adam is linear in it
_RATE = 1e-4
_TOKENS = (5, 17, 42, 7, 99, 23, 64, 31)


class _Future(Protocol):
    def result(self, timeout: float | None = None) -> Any: ...


class Trains(Protocol):
    """The methods of a training client that the measurement uses."""

    def forward(self, data: Sequence[Datum], loss_fn: str) -> _Future: ...
    def forward_backward(self, data: Sequence[Datum], loss_fn: str) -> _Future: ...
    def optim_step(self, adam_params: AdamParams, /) -> _Future: ...


def measure_reduction(model: Trains) -> Reduction:
    """Measures how a trainer reduces losses, by how far a datum's logprobs move.

    One step of Adam with ``eps`` far above any gradient, and without memory, moves the weights in
    proportion to the gradient, and so the datum's logprob in proportion too. Compared are the moves
    for weights of 1, for weights of 2, and for the same datum twice. A trainer that sums moves
    1 : 2 : 2; one that divides by the sum of weights and averages over datums 1 : 1 : 1.

    Args:
        model: a throwaway model; it is changed.

    Raises:
        MintjaxError: the moves fit neither; the message gives them.
    """
    single = _move(model, [_datum(1.0)])
    heavier = _move(model, [_datum(2.0)]) / single
    twice = _move(model, [_datum(1.0)] * 2) / single
    again = _move(model, [_datum(1.0)]) / single
    measured = f"twice the weight moves {heavier:.3f}, twice the datum {twice:.3f}"
    if not abs(again - 1) < 0.1:
        raise MintjaxError(
            f"cannot tell how this trainer reduces losses: the same step moved {again:.3f} times "
            f"as far the second time ({measured})"
        )
    answers: list[bool] = []
    for ratio in (heavier, twice):
        if abs(ratio - 2) < 0.2:
            answers.append(False)
        elif abs(ratio - 1) < 0.1:
            answers.append(True)
        else:
            raise MintjaxError(
                f"cannot tell how this trainer reduces losses: {measured}; a sum gives 2, a mean 1"
            )
    return Reduction(per_sequence=answers[0], over_datums=answers[1])


def _datum(weight: float) -> Datum:
    tokens = list(_TOKENS)
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": np.full(len(tokens) - 1, weight, np.float32)},
    )


def _move(model: Trains, data: list[Datum]) -> float:
    """Measures how far one step on these data moves the datum's logprob, in nats."""
    before = _score(model)
    model.forward_backward(data, "cross_entropy")
    model.optim_step(
        AdamParams(learning_rate=_RATE * _EPS, beta1=0.0, beta2=0.0, eps=_EPS)
    ).result()
    moved = _score(model) - before
    if not (np.isfinite(moved) and abs(moved) > 1e-4):
        raise MintjaxError(
            f"cannot tell how this trainer reduces losses: a step moved the logprob by {moved:.2g}"
        )
    return moved


def _score(model: Trains) -> float:
    output: ForwardBackwardOutput = model.forward([_datum(1.0)], "cross_entropy").result()
    return float(output.logprobs[0].astype(np.float64).sum())
