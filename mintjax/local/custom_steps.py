"""Serves a custom step in two requests: one gives the logprobs, the other takes their gradient."""

from __future__ import annotations

import msgspec
import numpy as np

from mintjax.errors import BadRequestError, DataError
from mintjax.local.endpoints import Run
from mintjax.local.engine import Engine
from mintjax.local.limits import Limits
from mintjax.protocol import messages
from mintjax.step.carrier import FORWARD_LOSS_FN, forward_data
from mintjax.types import Datum

STEP1, STEP2 = "forward_backward_custom_step1", "forward_backward_custom_step2"

MOST_KEPT = 256
"""First requests that are kept; where there are more, the oldest are forgotten."""


class CustomSteps:
    """The two requests, as hatchery has them; what the first got is kept until the second.

    Args:
        engine: the trainer.
        limits: bounds on the data.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self._kept: dict[tuple[str, str], list[Datum]] = {}

    def step1(self, request: messages.CustomStepRequest) -> Run:
        """Answers ``forward_backward_custom_step1``: the targets' logprobs, a row per datum.

        Raises:
            DataError: the data cannot be used.
            NotFoundError: there is no such model.
        """
        given = request.forward_backward_input
        if given.data is msgspec.UNSET or not given.data:
            raise DataError("data must not be empty", field="forward_backward_input")
        data = forward_data(given.data)
        for i, datum in enumerate(data):
            if datum.loss_fn_inputs["target_tokens"].ndim != 1:
                raise DataError("its shape must be [T] here", datum=i, field="target_tokens")
        self._engine.check_pass(request.model_id, data, FORWARD_LOSS_FN, limits=self._limits)

        def run() -> messages.CustomStepLogprobs:
            models = self._engine.models
            for key in [key for key in self._kept if key[0] not in models]:
                del self._kept[key]
            output = self._engine.forward(request.model_id, data, FORWARD_LOSS_FN)
            self._kept[request.model_id, given.custom_id] = data
            while len(self._kept) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            return messages.CustomStepLogprobs([row.tolist() for row in output.logprobs])

        return run

    def step2(self, request: messages.CustomStepRequest) -> Run:
        """Answers ``forward_backward_custom_step2``: adds the gradient, once per first request.

        Raises:
            DataError: there is no gradient.
            NotFoundError: there is no such model.
        """
        given = request.forward_backward_input
        if given.grad_logprobs is msgspec.UNSET:
            raise DataError("grad_logprobs required", field="forward_backward_input")
        grads = [np.asarray(row, np.float32) for row in given.grad_logprobs]
        self._engine.model(request.model_id)

        def run() -> messages.CustomStepGradient:
            data = self._kept.get((request.model_id, given.custom_id))
            if data is None:
                raise BadRequestError(400, f"no cached forward for custom_id={given.custom_id!r}")
            wanted = [datum.loss_fn_inputs["target_tokens"].shape for datum in data]
            if [row.shape for row in grads] != wanted:
                raise BadRequestError(400, "grad_logprobs are not shaped as the logprobs")
            surrogate = self._engine.accumulate(request.model_id, data, grads)
            del self._kept[request.model_id, given.custom_id]
            return messages.CustomStepGradient(surrogate, {"surrogate": surrogate})

        return run
