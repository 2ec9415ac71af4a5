"""A step with an objective that is computed here: the passes it takes, in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.client.connection import Connection
from mintjax.client.gradient_steps import GradientStep
from mintjax.client.gradients import AccumulatedGradients, refuses_loss
from mintjax.client.lane import PlaceInLine
from mintjax.client.passes import Pass
from mintjax.client.reductions import check_sum
from mintjax.errors import (
    APIError,
    APIResponseError,
    DataError,
    RequestFailedError,
    UnknownReductionError,
)
from mintjax.gradients import (
    LogprobGradients,
    Objective,
    loss_and_metrics,
    value_and_logprob_grads,
)
from mintjax.ragged.batch import Batch
from mintjax.step.carrier import FORWARD_LOSS_FN, carrier, forward_data
from mintjax.step.facts import TrainerFacts
from mintjax.step.routes import Backward, on_server, shortcut
from mintjax.step.server_loss import METRIC
from mintjax.types import CustomStepOutput, ForwardBackwardOutput

logger = logging.getLogger("mintjax.client")

_SUM = "loss:sum"


async def custom_step(
    gradients: AccumulatedGradients,
    place: PlaceInLine,
    data: Batch,
    objective: Objective,
    *,
    single_pass: bool,
    datums_in_step: int | None,
    avoid: frozenset[str] = frozenset(),
) -> CustomStepOutput:
    """Adds the gradient of an objective to what is accumulated in the trainer.

    Where the trainer takes gradients of logprobs, and nobody has said what it divides its losses
    by, the gradient goes as it is. Elsewhere one backward pass does it where
    :func:`mintjax.step.routes.shortcut` finds one, or where the trainer runs the objective itself.
    Else a forward pass gives the logprobs, the
    gradient is computed here, and a backward pass carries it. Where the trainer refuses a loss by
    its name, the step goes on without; if it then succeeds, that trainer is not asked for that loss
    again.

    Args:
        gradients: of the model.
        place: the step's place in the line.
        data: the datums, which nobody else changes.
        objective: the loss; what it raises is raised here, and then nothing is accumulated.
        single_pass: save the forward pass where it is not needed.
        datums_in_step: how many datums are accumulated before the optimizer step in all.
        avoid: losses that this step does not ask for by name.

    Raises:
        DataError: the gradient cannot be carried to this trainer.
        APIError: the trainer refuses, or fails.
    """
    facts, encoding = gradients.connection.facts, gradients.connection.encoding
    reduction = await gradients.reduction(data)
    if reduction is None:
        return await _by_gradient(gradients, place, data, objective)
    total = await gradients.datums_in_step(place, reduction, len(data), datums_in_step)
    all_sum = reduction.sums and facts.is_said
    evaluated: tuple[float, dict[str, Any]] | None = None  # loss and metrics
    rows: list[npt.NDArray[np.float32]] = []
    grads: list[npt.NDArray[Any]] = []
    forward_seconds = 0.0

    def encoded(backward: Backward) -> tuple[Backward, Pass]:
        given = Pass(encoding, backward.data, backward.loss_fn, backward.config, backward=True)
        given.check_scaled_for(reduction)
        return backward, given

    def find() -> tuple[Backward, Pass] | None:
        refused = facts.refused | avoid
        found = shortcut(objective, data, reduction, refused, total, all_sum=all_sum)
        return None if found is None else encoded(found)

    found = await place.compute(find) if single_pass else None
    if found is None and single_pass and encoding.limits.custom_loss_server_side and all_sum:
        there = await _on_server(gradients.connection, place, objective, data, avoid)
        found = None if there is None else await place.compute(partial(encoded, there))
    if found is None:
        given = Pass(encoding, forward_data(data), FORWARD_LOSS_FN, backward=False)
        sent = time.perf_counter()
        rows = logprobs(await gradients.send(place, given, leave=False))
        forward_seconds = time.perf_counter() - sent

        def compute() -> tuple[tuple[float, dict[str, Any]], tuple[Backward, Pass]]:
            result = value_and_logprob_grads(objective, data, rows)
            grads.extend(result.grads)
            carried = carrier(reduction, data, rows, result.grads, total)
            there = Backward("two_pass", reduction.loss_fn, None, carried)
            return result[:2], encoded(there)

        evaluated, found = await place.compute(compute)
    backward, given = found
    place.begin()
    # A loss that this trainer has not served yet may still be refused when it runs. The step then
    # goes another way, so it keeps its place in the line until it knows.
    asked = backward.asks_for
    leave = asked is None or asked in facts.served
    sent = time.perf_counter()
    try:
        scaled_for = None if reduction.per_step is None else total
        output = await gradients.send(place, given, leave=leave, scaled_for=scaled_for)
    except APIError as error:
        too_late = leave and isinstance(error, RequestFailedError)
        if asked is None or too_late or not refuses_loss(error):
            raise
        logger.info("the trainer refuses %s; its gradient is sent: %s", asked, error)
        again = await custom_step(
            gradients,
            place,
            data,
            objective,
            single_pass=single_pass,
            datums_in_step=datums_in_step,
            avoid=avoid | {asked},
        )
        if backward.route == "server":
            gradients.connection.losses.refused(asked)
        elif asked not in facts.served:
            facts.refused.add(asked)
        return again
    backward_seconds = time.perf_counter() - sent
    if asked is not None:
        facts.served.add(asked)
    reported = output.metrics
    if backward.route == "server":
        rows = logprobs(output)
        result = await place.compute(lambda: value_and_logprob_grads(objective, data, rows))
        evaluated = result[:2]
        reported = _check_server_sum(output, result)
    if evaluated is None:
        rows = logprobs(output)
        evaluated = await place.compute(lambda: loss_and_metrics(objective, data, rows))
    check_sum(gradients.connection, backward, output)
    if backward.route == "two_pass":
        _tell_of_drift(facts, rows, grads, output)
    return CustomStepOutput(
        loss_fn_outputs=output.loss_fn_outputs,
        metrics=_named(reported, *evaluated),
        loss_fn_output_type=output.loss_fn_output_type,
        route=backward.route,
        forward_seconds=forward_seconds,
        client_seconds=place.computing_seconds,
        backward_seconds=backward_seconds,
    )


async def _on_server(
    connection: Connection,
    place: PlaceInLine,
    objective: Objective,
    data: Batch,
    avoid: frozenset[str],
) -> Backward | None:
    """Finds the pass in which the trainer runs the objective, and uploads that if need be."""
    losses = connection.losses
    named = await place.compute(lambda: losses.written(objective, data))
    if named is None:
        return None
    loss_id = await losses.loss_id(named, await connection.session(), connection.run)
    if loss_id is None or loss_id in avoid:
        return None
    return await place.compute(lambda: on_server(named.loss, loss_id, data))


async def _by_gradient(
    gradients: AccumulatedGradients, place: PlaceInLine, data: Batch, objective: Objective
) -> CustomStepOutput:
    """Takes the step by the trainer's own requests: logprobs come, and their gradient goes."""
    step = GradientStep(gradients.connection.encoding.limits, data)
    sent = time.perf_counter()
    rows = await gradients.ask_logprobs(place, step)
    forward_seconds = time.perf_counter() - sent
    result = await place.compute(lambda: value_and_logprob_grads(objective, data, rows))
    place.begin()
    sent = time.perf_counter()
    output = await gradients.send_gradient(place, step, result.grads)
    return CustomStepOutput(
        loss_fn_outputs=output.loss_fn_outputs,
        metrics=_named(output.metrics, *result[:2]),
        loss_fn_output_type=output.loss_fn_output_type,
        route="by_gradient",
        forward_seconds=forward_seconds,
        client_seconds=place.computing_seconds,
        backward_seconds=time.perf_counter() - sent,
    )


_TOLERANCE = 1e-2  # of a logprob, which may have been rounded to 16 bits


def _check_server_sum(output: ForwardBackwardOutput, result: LogprobGradients) -> dict[str, float]:
    """Holds the loss that the trainer has computed against the one that is computed here.

    Both are of the same logprobs, which may have been rounded on their way.

    Returns:
        The trainer's metrics but for those of the objective, all of which are computed here.

    Raises:
        UnknownReductionError: they differ.
    """
    others = {
        name: value
        for name, value in output.metrics.items()
        if name != _SUM and not name.startswith("custom/")
    }
    reported = output.metrics.get(METRIC, output.metrics.get(_SUM))
    if reported is None:
        return others
    slope = sum(float(np.abs(grad).sum()) for grad in result.grads)
    if not abs(reported - result.loss) <= _TOLERANCE * (slope + abs(result.loss)) + 1e-6:
        raise UnknownReductionError(
            f"the trainer has run the objective itself and reports {reported:.6g}, where its loss "
            f"is {result.loss:.6g}. The gradient that it has added may be another than the "
            "objective's: go on from a checkpoint, with single_pass=False"
        )
    return others


def _named(
    trainers: Mapping[str, float], loss: float, objectives: Mapping[str, Any]
) -> dict[str, Any]:
    """Joins metrics; those of the objective win, but ``"loss:sum"`` is always its loss.

    As in the official SDK, the trainer's sum is that of what carried the gradient.
    """
    carried = {f"surrogate_{_SUM}" if name == _SUM else name: trainers[name] for name in trainers}
    return {**carried, **objectives, _SUM: loss}


def logprobs(output: ForwardBackwardOutput) -> list[npt.NDArray[np.float32]]:
    """Takes the logprobs out of a pass's output, one array per datum.

    Raises:
        APIResponseError: the trainer returned none for a datum.
    """
    try:
        return output.logprobs
    except DataError as error:
        words = str(error)
    raise APIResponseError(words)


_MOST_DRIFT = 0.1  # nats; 16-bit arithmetic and mixtures of experts differ by less on average


def _tell_of_drift(
    facts: TrainerFacts,
    rows: Sequence[npt.NDArray[np.float32]],
    grads: Sequence[npt.NDArray[Any]],
    output: ForwardBackwardOutput,
) -> None:
    """Tells the user, once, where both passes of a step give other logprobs.

    The gradient was computed for those of the first, and the trainer took it at the second.
    """
    try:
        pairs = list(zip(rows, output.logprobs, grads, strict=True))
    except (DataError, ValueError):
        return
    weight = sum(float(np.abs(grad).sum()) for _, _, grad in pairs)
    moved = sum(float(np.abs((one - other) * grad).sum()) for one, other, grad in pairs)
    if moved > _MOST_DRIFT * weight and "drift" not in facts.told:
        facts.told.add("drift")
        logger.warning(
            "the two passes of a custom step disagree about logprobs, by %.2g nats on average, so "
            "the gradient is of another model than the one that it is added to. The trainer may "
            "drop out, or somebody else may train this model",
            moved / weight,
        )
