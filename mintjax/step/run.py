"""A step with an objective of the user's own, whatever the way to the trainer."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from mintjax.errors import APIResponseError, BadRequestError, DataError
from mintjax.gradients import Objective, loss_and_metrics, value_and_logprob_grads
from mintjax.ragged.batch import Batch
from mintjax.step.carrier import carrier
from mintjax.step.reduction import SUM, Reduction
from mintjax.step.routes import without_forward
from mintjax.types import CustomStepOutput, ForwardBackwardOutput, Route

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")

Pass: TypeAlias = Any  # the client's: a batch, encoded


class Turn(Protocol):
    """The step's place among the requests of its model."""

    computing_seconds: float

    def begin(self) -> None:
        """From here on the step can no longer be cancelled."""
        ...

    async def compute(self, work: Callable[[], T]) -> T:
        """Run a function in a worker thread; adds its time to ``computing_seconds``."""
        ...


class Send(Protocol):
    """Sends a pass, and waits for its result."""

    def __call__(self, given: Pass, *, leave: bool) -> Awaitable[ForwardBackwardOutput]:
        """Wait outside the line, once the trainer has accepted the pass, if ``leave``."""
        ...


class Encode(Protocol):
    """Encodes a batch for a pass."""

    def __call__(
        self, data: Any, loss_fn: str, config: dict[str, float] | None = None, *, backward: bool
    ) -> Pass:
        """The pass, as the batch is now."""
        ...


@dataclass
class Findings:
    """What was found out about a trainer.

    Args:
        reduction: what it makes of losses, once that was measured.
        refused: losses that it does not serve by name.
        warned: whether the user was warned that nothing was measured.
    """

    reduction: Reduction | None = None
    refused: set[str] = field(default_factory=set[str])
    warned: bool = False


async def custom_step(
    turn: Turn,
    send: Send,
    encode: Encode,
    forward: Pass,
    data: Batch,
    objective: Objective,
    findings: Findings,
    datums: int,
    single_pass: bool,
) -> CustomStepOutput:
    """Send the passes of one step, from the moment its turn has come.

    Args:
        turn: of the step.
        send: sends a pass.
        encode: encodes one.
        forward: the forward pass, should there be one.
        data: the datums as they are now.
        objective: the loss; what it raises is raised here.
        findings: about the trainer.
        datums: how many are accumulated before the optimizer step, these among them.
        single_pass: save the forward pass where it is not needed.

    Raises:
        APIResponseError: the trainer returned no logprobs for a datum.
    """
    reduction = findings.reduction or SUM
    route: Route = "two_pass"
    forward_seconds, backward, metrics = 0.0, None, None

    def single() -> tuple[Route, Pass | None]:
        found = without_forward(objective, data, reduction, datums, findings.refused)
        if found is None:
            return "two_pass", None
        return found.route, encode(found.data, found.loss_fn, found.config, backward=True)

    def gradient() -> tuple[dict[str, float], Pass]:
        result = value_and_logprob_grads(objective, data, rows)
        carried = carrier(reduction, data, rows, result.grads, datums)
        return result.metrics, encode(carried, reduction.loss_fn, backward=True)

    if single_pass:
        route, backward = await turn.compute(single)
    if backward is None:
        sent = time.perf_counter()
        rows = logprobs(await send(forward, leave=False))
        forward_seconds = time.perf_counter() - sent
        metrics, backward = await turn.compute(gradient)
    turn.begin()
    sent = time.perf_counter()
    try:
        output = await send(backward, leave=True)
    except BadRequestError as error:
        if route != "by_name" or error.may_have_been_applied:
            raise
        logger.info("the trainer refuses %s; its gradient is sent: %s", backward.loss_fn, error)
        findings.refused.add(backward.loss_fn)
        return await custom_step(
            turn, send, encode, forward, data, objective, findings, datums, single_pass
        )
    backward_seconds = time.perf_counter() - sent
    if metrics is None:
        rows = logprobs(output)
        _, metrics = await turn.compute(lambda: loss_and_metrics(objective, data, rows))
    _warn_once(findings, output)
    return CustomStepOutput(
        loss_fn_outputs=output.loss_fn_outputs,
        metrics={**output.metrics, **metrics},  # the objective's win
        loss_fn_output_type=output.loss_fn_output_type,
        route=route,
        forward_seconds=forward_seconds,
        client_seconds=turn.computing_seconds,
        backward_seconds=backward_seconds,
    )


def logprobs(output: ForwardBackwardOutput) -> list[npt.NDArray[np.float32]]:
    """The pass's logprobs, one array per datum.

    Raises:
        APIResponseError: the trainer returned none for a datum.
    """
    try:
        return output.logprobs
    except DataError as error:
        words = str(error)
    raise APIResponseError(words)


def _warn_once(findings: Findings, output: ForwardBackwardOutput) -> None:
    sums = any(name.endswith("loss:sum") for name in output.metrics)
    if findings.reduction is None and not sums and not findings.warned:
        findings.warned = True
        logger.warning(
            "this trainer returns no loss:sum, so it may divide losses by weights or by numbers of "
            "datums, which falsifies the gradient of a custom loss; service.probe() measures it, "
            "and from then on custom steps are right"
        )
