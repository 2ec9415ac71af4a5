"""By which route a custom step reaches the trainer, and what its backward pass sends."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mintjax.gradients import Objective
from mintjax.gradients.evaluate import constant_logprob_grads
from mintjax.ragged.batch import Batch
from mintjax.step.carrier import carrier
from mintjax.step.one_datum import data_for
from mintjax.step.reduction import Reduction
from mintjax.step.server_loss import ServerLoss
from mintjax.types import Datum, Route

SERVER_LOSS_FN = "custom"
"""The name by which a pass asks for a loss that was uploaded."""

_LEAST_SAMPLING_LOGPROB = -80.0  # below it, exp(logprob - sampling logprob) can leave float32

Floats = npt.NDArray[np.float32]


class Backward(NamedTuple):
    """The contents of a backward pass.

    Args:
        route: how the step reaches the trainer.
        loss_fn: the trainer's loss.
        config: its hyperparameters.
        data: the datums, with the inputs of that loss.
    """

    route: Route
    loss_fn: str
    config: dict[str, float | str] | None
    data: list[Datum]

    @property
    def asks_for(self) -> str | None:
        """The loss of the trainer's that it may refuse; None where it is one that all have."""
        match self.route:
            case "by_name":
                return self.loss_fn
            case "server":
                return str((self.config or {})["loss_id"])
            case _:
                return None


def shortcut(
    objective: Objective,
    batch: Batch,
    reduction: Reduction,
    refused: Container[str],
    datums_in_step: int,
    *,
    all_sum: bool,
) -> Backward | None:
    """Finds the backward pass that does the whole step without a forward pass, if there is one.

    The rule, in order:

    1. ``by_name``: the objective's own class says that a trainer's loss is the same, the trainer
       sums all of its losses and has not refused that one, and :func:`by_name` finds data that say
       the same.
    2. ``one_pass``: the gradient does not depend on the logprobs, and what carries it to this
       trainer does not need them.

    Args:
        objective: whatever it raises when it is traced is raised here.
        batch: the data.
        reduction: the trainer's.
        refused: losses that the trainer has refused.
        datums_in_step: how many are accumulated before the optimizer step, these included.
        all_sum: the trainer is known to sum all of its losses, and not only those that carry
            gradients.
    """
    grads = constant_logprob_grads(objective, batch)
    name = _builtin(objective)
    if name is not None and all_sum and name[0] not in refused:
        data = by_name(name[0], batch)
        if data is not None:
            return Backward("by_name", name[0], {**name[1]} or None, data)
    if grads is None or reduction.loss_fn != "cross_entropy":
        return None
    data = carrier(reduction, batch, None, grads, datums_in_step)
    return Backward("one_pass", reduction.loss_fn, None, data)


def on_server(loss: ServerLoss, loss_id: str, batch: Batch) -> Backward | None:
    """Makes the pass in which the trainer runs an objective.

    Args:
        loss: the objective, as it was uploaded.
        loss_id: the trainer's name of it.
        batch: the data.

    Returns:
        None where a column that it reads is not finite, so that it cannot travel.
    """
    data = data_for(loss, batch)
    columns = [column for datum in data for column in datum.loss_fn_inputs.values()]
    if not all(np.isfinite(column).all() for column in columns):
        return None
    return Backward("server", SERVER_LOSS_FN, {"loss_id": loss_id}, data)


def _builtin(objective: Objective) -> tuple[str, dict[str, float]] | None:
    """Finds the trainer's loss that an objective is, if its own class says so.

    A user's subclass that says nothing itself may compute another loss than its base.
    """
    kind = type(objective)
    says = kind.__module__.startswith("mintjax.") or "builtin" in vars(kind)
    return getattr(objective, "builtin", None) if says else None


def by_name(loss_fn: str, batch: Batch) -> list[Datum] | None:
    """Makes the data under which a trainer's loss has the gradient of our objective of that name.

    Every column is spread over the targets as the objective reads it: one number per datum over
    its tokens, one per token over its candidates. Trainers differ in what they make of ``weights``
    beside ``advantages``: nothing, a mask, or a factor. So weights are multiplied into the
    advantages, which is the same where the loss is proportional to a nonnegative advantage's
    scale, as it is in all but ``dro``.

    Returns:
        New datums, or None where no data say the same, or they cannot travel.
    """
    reads = ("weights",) if loss_fn == "cross_entropy" else ("logprobs", "advantages")
    names = {*reads, *({"weights"} & batch.names)}
    result: list[Datum] = []
    for datum in batch:
        targets = datum.loss_fn_inputs["target_tokens"]
        columns: dict[str, Floats] = {}
        for name in names:
            column = _on_targets(datum.loss_fn_inputs.get(name), targets.shape)
            if column is None:
                return None
            columns[name] = column
        if loss_fn != "cross_entropy":
            policy = _policy_inputs(loss_fn, columns)
            if policy is None:
                return None
            columns = policy
        if not all(np.isfinite(column).all() for column in columns.values()):
            return None
        result.append(Datum(datum.model_input, {"target_tokens": targets, **columns}))
    return result


def _policy_inputs(loss_fn: str, columns: dict[str, Floats]) -> dict[str, Floats] | None:
    sampling, advantages = columns["logprobs"], columns["advantages"]
    if "weights" not in columns:
        inputs = columns
    else:
        weights = columns["weights"]
        if not (weights >= 0).all() or (loss_fn == "dro" and (weights != 1).any()):
            return None
        counts = weights != 0
        with np.errstate(over="ignore"):
            folded = np.multiply(advantages, weights, where=counts, out=np.zeros_like(sampling))
        inputs = {
            "weights": np.ones_like(sampling),
            "logprobs": np.where(counts, sampling, 0),
            "advantages": folded,
        }
    return inputs if (inputs["logprobs"] >= _LEAST_SAMPLING_LOGPROB).all() else None


def _on_targets(column: npt.NDArray[Any] | None, shape: tuple[int, ...]) -> Floats | None:
    """Brings a column of a datum to the shape of its targets; None if it does not fit them."""
    if column is None:
        return None
    if column.shape == shape[:1]:
        column = column.reshape(shape[:1] + (1,) * (len(shape) - 1))
    elif column.shape not in ((), shape):
        return None
    return np.broadcast_to(np.asarray(column, np.float32), shape)
