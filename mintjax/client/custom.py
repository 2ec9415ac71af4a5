"""A step with an objective: by which route it goes, and what carries its gradient."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax.batch import Batch, check_data
from mintjax.client.background import Withdrawn, begin
from mintjax.client.connection import Connection
from mintjax.client.lane import Finish
from mintjax.client.passes import Chunk, chunks
from mintjax.errors import APIResponseError, BadRequestError, DataError
from mintjax.gradients import (
    Objective,
    constant_logprob_grads,
    loss_and_metrics,
    value_and_logprob_grads,
)
from mintjax.surrogates import FORWARD_LOSS_FN, SUM, Reduction, carrier, forward_data
from mintjax.types import CustomStepOutput, Datum, ForwardBackwardOutput, Route

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")


class Post(Protocol):
    """Sends a pass of the model; returns what waits for its result."""

    def __call__(
        self,
        parts: Sequence[Chunk],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        *,
        backward: bool,
    ) -> Awaitable[Finish[ForwardBackwardOutput]]:
        """Send; the turn of the pass must have come."""
        ...


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


class Accumulated:
    """How many datums' gradients are in the trainer, where it will divide by their number."""

    def __init__(self) -> None:
        self._datums = 0
        self._announced: int | None = None

    def check(self, datums: int, announced: int | None) -> int:
        """The number to carry a custom step's gradient with.

        Raises:
            DataError: more are in the trainer, or to come, than were announced.
        """
        total = announced or datums
        before = self._announced if self._announced is not None else total
        if self._datums + datums > total or before != total or (self._datums and not announced):
            raise DataError(
                f"this trainer averages over the datums of all passes before an optimizer step, "
                f"so each custom step must be told their number beforehand: {self._datums} are "
                f"accumulated, {datums} are to be added, announced were {announced or 'none'}. "
                "Pass the same datums_in_step to each, or take the optimizer step first",
                field="datums_in_step",
            )
        return total

    def add(self, datums: int, announced: int | None = None) -> None:
        """Note a pass that was sent; ``announced`` is the number its gradient was carried with."""
        self._datums += datums
        self._announced = announced or self._announced

    def step(self) -> None:
        """Note an optimizer step that is about to be sent.

        Raises:
            DataError: other than the announced number of datums are accumulated.
        """
        datums, announced = self._datums, self._announced
        if announced is not None and announced != datums:
            raise DataError(
                f"{announced} datums were announced before this optimizer step and {datums} came; "
                "the trainer would divide by the wrong number. Send the others first",
                field="datums_in_step",
            )
        self.forget()

    def forget(self) -> None:
        """Note that nothing is accumulated any more."""
        self._datums, self._announced = 0, None


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


class CustomStep:
    """One step with an objective, from the moment its turn comes.

    Args:
        data: the datums as they are now.
        objective: the loss.
        single_pass: save the forward pass where it is not needed.
        datums_in_step: as the user announced them.
        connection: knows what the trainer makes of losses.
        accumulated: what is in the trainer.
        post: sends a pass.
        compute: runs a function in a worker thread.

    Raises:
        NonFiniteError: ``weights`` hold a number that cannot travel.
    """

    def __init__(
        self,
        data: Batch,
        objective: Objective,
        single_pass: bool,
        datums_in_step: int | None,
        connection: Connection,
        accumulated: Accumulated,
        post: Post,
        compute: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self._data = data
        self._objective = objective
        self._single_pass = single_pass
        self._datums_in_step = datums_in_step
        self._connection = connection
        self._accumulated = accumulated
        self._post = post
        self._compute = compute
        self._forward = chunks(forward_data(data), connection.limits)

    async def send(self, future: Future[Any]) -> Finish[CustomStepOutput]:
        """Send the passes; what is returned waits for the last one's result."""
        if future.cancelled():
            raise Withdrawn
        reduction = self._connection.reduction or SUM
        datums = len(self._data)
        if reduction.over_datums:
            datums = self._accumulated.check(datums, self._datums_in_step)
        if self._single_pass:
            finish = await self._send_one(future, reduction, datums)
            if finish is not None:
                return finish
        return await self._send_two(future, reduction, datums)

    async def _send_one(
        self, future: Future[Any], reduction: Reduction, datums: int
    ) -> Finish[CustomStepOutput] | None:
        refused = self._connection.refused
        limits = self._connection.limits

        def work() -> tuple[Carrier, list[Chunk]] | None:
            found = without_forward(self._objective, self._data, reduction, datums, refused)
            return None if found is None else (found, chunks(found.data, limits))

        start = time.perf_counter()
        found: tuple[Carrier, list[Chunk]] | None = await self._compute(work)
        if found is None:
            return None
        using, parts = found
        client_seconds = time.perf_counter() - start
        if not future.running():
            begin(future)
        start = time.perf_counter()
        try:
            finish = await self._post(parts, using.loss_fn, using.config, backward=True)
        except BadRequestError as error:
            if using.route != "by_name":
                raise
            logger.info("the trainer refuses %s; its gradient is sent: %s", using.loss_fn, error)
            refused.add(using.loss_fn)
            return await self._send_one(future, reduction, datums)
        self._accumulated.add(len(self._data), datums if reduction.over_datums else None)

        async def whole() -> CustomStepOutput:
            output = await finish()
            arrived = time.perf_counter()
            rows = logprobs(output)
            _, metrics = await self._compute(
                lambda: loss_and_metrics(self._objective, self._data, rows)
            )
            return self._merged(
                output,
                metrics,
                route=using.route,
                forward_seconds=0.0,
                client_seconds=client_seconds + time.perf_counter() - arrived,
                backward_seconds=arrived - start,
            )

        return whole

    async def _send_two(
        self, future: Future[Any], reduction: Reduction, datums: int
    ) -> Finish[CustomStepOutput]:
        start = time.perf_counter()
        finish = await self._post(self._forward, FORWARD_LOSS_FN, None, backward=False)
        rows = logprobs(await finish())
        forward_seconds = time.perf_counter() - start

        def work() -> tuple[dict[str, float], list[Chunk]]:
            result = value_and_logprob_grads(self._objective, self._data, rows)
            data = carrier(reduction, self._data, rows, result.grads, datums)
            return result.metrics, chunks(data, self._connection.limits)

        start = time.perf_counter()
        metrics, parts = await self._compute(work)
        sent = time.perf_counter()
        if not future.running():
            begin(future)
        finish = await self._post(parts, reduction.loss_fn, None, backward=True)
        self._accumulated.add(len(self._data), datums if reduction.over_datums else None)

        async def whole() -> CustomStepOutput:
            output = await finish()
            return self._merged(
                output,
                metrics,
                route="two_pass",
                forward_seconds=forward_seconds,
                client_seconds=sent - start,
                backward_seconds=time.perf_counter() - sent,
            )

        return whole

    def _merged(
        self, output: ForwardBackwardOutput, metrics: dict[str, float], **how: Any
    ) -> CustomStepOutput:
        """The trainer's output with the objective's metrics over its own."""
        connection = self._connection
        sums = any(name.endswith("loss:sum") for name in output.metrics)
        if connection.reduction is None and not sums and not connection.warned:
            connection.warned = True
            logger.warning(
                "this trainer returns no loss:sum, so it may divide losses by weights or by "
                "numbers of datums, which falsifies the gradient of a custom loss; "
                "service.probe() measures it, and from then on custom steps are right"
            )
        return CustomStepOutput(
            loss_fn_outputs=output.loss_fn_outputs,
            metrics={**output.metrics, **metrics},
            loss_fn_output_type=output.loss_fn_output_type,
            **how,
        )
