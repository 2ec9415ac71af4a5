"""By which route a custom step reaches the trainer, and what it sends there."""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec
import numpy as np

from mintjax.gradients import Objective
from mintjax.gradients.evaluate import constant_logprob_grads
from mintjax.ragged.batch import Batch, check_data
from mintjax.step.carrier import carrier
from mintjax.step.reduction import Reduction
from mintjax.types import Datum, Route


class Carrier(msgspec.Struct, kw_only=True):
    """A backward pass that needs no forward pass in front of it.

    Args:
        route: why it needs none.
        loss_fn: the trainer's loss.
        config: its hyperparameters.
        data: what to send.
    """

    route: Route
    loss_fn: str
    config: dict[str, float] | None
    data: list[Datum]


def without_forward(
    objective: Objective, batch: Batch, reduction: Reduction, datums: int, refused: Container[str]
) -> Carrier | None:
    """The single pass that does the whole step, if there is one.

    Args:
        objective: whatever it raises when it is traced is raised here.
        batch: the data.
        reduction: the trainer's.
        datums: to be accumulated before the optimizer step.
        refused: losses that the trainer has refused.
    """
    grads = constant_logprob_grads(objective, batch)
    builtin = getattr(objective, "builtin", None) if reduction.sums else None
    if builtin is not None and builtin[0] not in refused:
        data = _by_name(builtin[0], batch)
        if data is not None:
            return Carrier(
                route="by_name", loss_fn=builtin[0], config=builtin[1] or None, data=data
            )
    if grads is None or reduction.per_sequence:
        return None
    data = carrier(reduction, batch, None, grads, datums)
    return Carrier(route="one_pass", loss_fn=reduction.loss_fn, config=None, data=data)


def _by_name(loss_fn: str, batch: Batch) -> list[Datum] | None:
    """The data under which the trainer's loss is the objective, if there are such.

    What a trainer makes of ``weights`` beside ``advantages`` differs: it ignores them, or takes
    them for a mask, or for a factor. So they go into the advantages.
    """
    if loss_fn == "cross_entropy":
        names = ["target_tokens", "weights"]
        check_data(batch, names, required=names)
        return [_only(datum, names) for datum in batch]
    names = ["target_tokens", "logprobs", "advantages"]
    if "weights" not in batch.names:
        check_data(batch, names, required=names)
        return [_only(datum, names) for datum in batch]
    columns = zip(*(batch.rows(n) for n in ("weights", "logprobs", "advantages")), strict=True)
    result: list[Datum] = []
    for datum, (weights, sampling, advantages) in zip(batch, columns, strict=True):
        weights = np.broadcast_to(weights, sampling.shape)
        if (weights < 0).any() or (loss_fn == "dro" and (weights != 1).any()):
            return None
        counts = weights != 0
        folded = np.multiply(advantages, weights, where=counts, out=np.zeros_like(sampling))
        inputs = {
            "target_tokens": datum.loss_fn_inputs["target_tokens"],
            "weights": np.ones_like(sampling),
            "logprobs": np.where(counts, sampling, 0),
            "advantages": folded,
        }
        result.append(Datum(datum.model_input, inputs))
    check_data(result)
    return result


def _only(datum: Datum, names: Sequence[str]) -> Datum:
    return Datum(datum.model_input, {name: datum.loss_fn_inputs[name] for name in names})
