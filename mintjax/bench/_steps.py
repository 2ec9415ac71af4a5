"""Times custom steps on a trainer, and the parts of that time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import msgspec

from mintjax.client import TrainingClient
from mintjax.gradients import Objective
from mintjax.types import AdamParams, CustomStepOutput, Datum, Route


class StepTimes(msgspec.Struct, kw_only=True):
    """Medians over custom steps, each with its optimizer step.

    Args:
        datums: B of the last step.
        route: the way of the gradient; see :data:`mintjax.types.Route`.
        steps: the number of measured steps, after the warm-up.
        seconds: the time from submission until the weights were updated.
        forward_seconds: the time of the forward pass; 0 if there was none.
        client_seconds: the time of loss, gradient and encoding on the client.
        backward_seconds: of the backward pass.
        optimizer_seconds: from the backward pass's result until that of the optimizer step.
        client_share: the median share of the client in a step.
    """

    datums: int
    route: Route
    steps: int
    seconds: float
    forward_seconds: float
    client_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    client_share: float


def time_steps(
    model: TrainingClient,
    objective: Objective,
    batches: Iterable[list[Datum]],
    *,
    warm_up: int = 1,
    single_pass: bool = True,
    on_step: Callable[[], object] = lambda: None,
) -> StepTimes:
    """Trains with an objective, and times the parts of each step.

    Args:
        model: the model to train, at a learning rate of 1e-6.
        objective: ``(data, logprobs) -> (loss, metrics)``.
        batches: one for each step; there must be more than ``warm_up``.
        warm_up: the number of steps at the beginning that do not count.
        single_pass: as for ``forward_backward_custom``.
        on_step: called after each step.

    Returns:
        Where the time of the steps that count went, in seconds.

    Raises:
        MintjaxError: a step failed.
        Exception: whatever the objective raises.
    """
    adam = AdamParams(learning_rate=1e-6)
    taken: list[tuple[float, float, CustomStepOutput]] = []
    for data in batches:
        start = time.perf_counter()
        update = model.forward_backward_custom(data, objective, single_pass=single_pass)
        stepped = model.optim_step(adam)
        output = update.result()
        arrived = time.perf_counter()
        stepped.result()
        done = time.perf_counter()
        taken.append((done - start, done - arrived, output))
        on_step()
    counted = taken[warm_up:]
    return StepTimes(
        datums=len(counted[-1][2].loss_fn_outputs),
        route=counted[-1][2].route,
        steps=len(counted),
        seconds=statistics.median(total for total, _, _ in counted),
        forward_seconds=statistics.median(o.forward_seconds for _, _, o in counted),
        client_seconds=statistics.median(o.client_seconds for _, _, o in counted),
        backward_seconds=statistics.median(o.backward_seconds for _, _, o in counted),
        optimizer_seconds=statistics.median(wait for _, wait, _ in counted),
        client_share=statistics.median(o.client_seconds / total for total, _, o in counted),
    )
