"""The gradients that accumulate in one model on the trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mintjax.client.connection import Connection
from mintjax.client.gradient_steps import GRADIENT_PATH, LOGPROBS_PATH, GradientStep
from mintjax.client.lane import PlaceInLine
from mintjax.client.passes import Pass
from mintjax.client.reductions import Measure, reduction_of
from mintjax.errors import APIError, RequestFailedError, UnknownReductionError
from mintjax.protocol import messages
from mintjax.step.accumulated import Accumulated, Sent
from mintjax.step.reduction import Reduction
from mintjax.types import Datum, ForwardBackwardOutput, OptimStepResponse

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")


class AccumulatedGradients:
    """Sends what adds to a model's accumulated gradient or clears it, and counts by its outcome.

    Args:
        connection: the session.
        model_id: the trainer's name of the model.
        measure: measures what the trainer divides losses by.
    """

    def __init__(self, connection: Connection, model_id: str, measure: Measure) -> None:
        self.connection = connection
        self.model_id = model_id
        self._measure = measure
        self._accumulated = Accumulated()

    async def reduction(self, data: Sequence[Datum]) -> Reduction | None:
        """Says what the trainer divides losses by, and measures it if nobody has.

        Args:
            data: of the custom step.

        Returns:
            None where it need not be known, because the trainer takes gradients of logprobs.

        Raises:
            UnknownReductionError: it cannot be told.
        """
        one_target = all(datum.loss_fn_inputs["target_tokens"].ndim == 1 for datum in data)
        return await reduction_of(self.connection, self._measure, one_target)

    async def datums_in_step(
        self, place: PlaceInLine, reduction: Reduction, datums: int, announced: int | None
    ) -> int:
        """Says how many datums a custom step's gradient must be scaled for.

        Where the trainer divides by an amount of all requests since the optimizer step, it first
        waits until each of them has its outcome.

        Raises:
            DataError: more are accumulated, or to come, than were announced.
        """
        if reduction.per_step is None:
            return datums
        await place.alone()
        return self._accumulated.datums_in_step(datums, announced)

    async def send(
        self, place: PlaceInLine, given: Pass, *, leave: bool = True, scaled_for: int | None = None
    ) -> ForwardBackwardOutput:
        """Sends a pass, and waits for its result.

        Args:
            place: the pass's place in the line.
            given: the pass.
            leave: leave the line once the trainer has accepted it.
            scaled_for: how many datums its gradient was scaled for, if it depends on their number.

        Raises:
            APIError: the trainer refuses it, or fails.
        """
        sent = Sent(given.datums, scaled_for) if given.backward else None
        requests, output = given.messages(self.model_id), ForwardBackwardOutput
        parts = await self._send(place, sent, given.path, requests, output, leave, given.check)
        return given.output(parts)

    async def ask_logprobs(
        self, place: PlaceInLine, step: GradientStep
    ) -> list[npt.NDArray[np.float32]]:
        """Asks for the logprobs of a custom step that the trainer takes by its gradient.

        Raises:
            APIError: the trainer refuses, or fails.
        """
        questions = step.questions(self.model_id)
        answer = messages.CustomStepLogprobs
        return step.read(
            await self._send(place, None, LOGPROBS_PATH, questions, answer, False, step.check)
        )

    async def send_gradient(
        self, place: PlaceInLine, step: GradientStep, grads: Sequence[npt.NDArray[Any]]
    ) -> ForwardBackwardOutput:
        """Sends the gradient by the logprobs that :meth:`ask_logprobs` gave.

        Raises:
            NonFiniteError: it is not finite; nothing was sent.
            APIError: the trainer refuses, or fails.
            UnknownReductionError: it says that it has added something else.
        """
        requests, answer = step.gradients(self.model_id, grads), messages.CustomStepGradient
        parts = await self._send(place, Sent(step.datums), GRADIENT_PATH, requests, answer)
        try:
            return step.output(grads, parts)
        except UnknownReductionError:
            self.connection.facts.takes_gradients = False
            raise

    async def optim_step(self, place: PlaceInLine, message: Any) -> OptimStepResponse:
        """Takes the optimizer step, after which nothing is accumulated.

        Raises:
            DataError: the trainer would divide by another number than gradients were scaled for.
            APIError: the trainer refuses it, or fails.
        """
        reduction = self.connection.facts.reduction
        if reduction is not None and reduction.per_step is not None:
            await place.alone()
            self._accumulated.check_step()
        place.begin()
        answer = await self.clear(place, "optim_step", message, OptimStepResponse)
        self._tell_of_rate(message.adam_params.learning_rate, answer.metrics or {})
        return answer

    def _tell_of_rate(self, sent: float, metrics: Mapping[str, float]) -> None:
        """Tells the user, once, where the trainer reports another learning rate than was sent."""
        told = self.connection.facts.told
        for name, used in metrics.items():
            wrong = name.endswith("learning_rate") and not abs(used - sent) <= 1e-3 * abs(sent)
            if wrong and "learning_rate" not in told:
                told.add("learning_rate")
                logger.warning(
                    "%s reports a learning rate of %g (%s), where %g was sent",
                    self.connection.transport.address,
                    used,
                    name,
                    sent,
                )

    async def clear(self, place: PlaceInLine, path: str, message: Any, as_type: type[T]) -> T:
        """Sends a request that leaves nothing accumulated when it succeeds."""
        return (await self._send(place, Sent(clears=True), path, [message], as_type))[0]

    async def _send(
        self,
        place: PlaceInLine,
        sent: Sent | None,
        path: str,
        requests: Sequence[Any],
        as_type: type[T],
        leave: bool = True,
        check: Callable[[int, T], None] = lambda part, result: None,
    ) -> list[T]:
        if sent is None:
            return await place.request(
                path, requests, as_type, mutates=False, leave=leave, check=check
            )
        try:
            parts = await place.request(
                path,
                requests,
                as_type,
                mutates=True,
                leave=leave,
                check=check,
                accepted=lambda: self._accumulated.accepted(sent),
            )
        except BaseException as error:
            if isinstance(error, RequestFailedError) and not error.may_have_been_applied:
                self._accumulated.failed(sent)
            else:  # also where the client closes, or the answer cannot be read
                self._accumulated.lost(sent)
            raise
        self._accumulated.applied(sent)
        return parts


def refuses_loss(error: APIError) -> bool:
    """Tells whether a trainer does not serve a loss, and has applied nothing."""
    if error.may_have_been_applied:
        return False
    if isinstance(error, RequestFailedError):
        return error.category == "user"
    return getattr(error, "status_code", 0) in (400, 404, 422, 501)
