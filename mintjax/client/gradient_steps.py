"""A custom step by requests of the trainer's own, which take the gradient of logprobs as it is."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from mintjax.client.passes import check_shapes, chunks
from mintjax.errors import UnknownReductionError
from mintjax.protocol import messages
from mintjax.tensors import TensorData
from mintjax.types import Datum, ForwardBackwardOutput

LOGPROBS_PATH = "forward_backward_custom_step1"
GRADIENT_PATH = "forward_backward_custom_step2"

_TOLERANCE = 1e-2  # of the sum of absolute values; logprobs may have been rounded to 16 bits
_LEAST = 1e-6  # error of a logprob near 0, in nats


class GradientStep:
    """The contents of the two requests, in parts of a size that the trainer takes.

    The first asks for the logprobs of the targets, and the second sends the derivative of a loss by
    each of them. The trainer adds ``sum(grads * d logprobs / d weights)``, whatever it divides its
    own losses by.

    Args:
        limits: the trainer's.
        data: the datums; ``target_tokens``, ``[T]``, is read.
    """

    def __init__(self, limits: messages.ClientConfigResponse, data: Sequence[Datum]) -> None:
        self.datums = len(data)
        self._chunks = chunks([_only_targets(datum) for datum in data], limits, in_protobuf=False)
        self._ids = [uuid.uuid4().hex for _ in self._chunks]
        self._rows: list[npt.NDArray[np.float32]] = []

    def questions(self, model_id: str) -> list[messages.CustomStepRequest]:
        """Makes the requests for the logprobs, still without their numbers."""
        return [
            _request(model_id, messages.CustomStepInput(name, cast("list[Datum]", chunk.data)))
            for name, chunk in zip(self._ids, self._chunks, strict=True)
        ]

    def check(self, part: int, answer: messages.CustomStepLogprobs) -> None:
        """Checks that logprobs can be the answer to a request.

        Raises:
            APIResponseError: there is not one row for each datum, one number for each target, or a
                number is no logprob.
        """
        check_shapes(self._chunks[part], _output(_arrays(answer)))

    def read(self, answers: Sequence[messages.CustomStepLogprobs]) -> list[npt.NDArray[np.float32]]:
        """Joins the logprobs of all requests, each of them checked."""
        self._rows = [row for answer in answers for row in _arrays(answer)]
        return self._rows

    def gradients(
        self, model_id: str, grads: Sequence[npt.NDArray[Any]]
    ) -> list[messages.CustomStepRequest]:
        """Makes the requests that send the gradients, still without their numbers.

        Raises:
            NonFiniteError: a gradient is not finite; the message names the datum.
        """
        return [
            _request(
                model_id,
                messages.CustomStepInput(
                    name,
                    grad_logprobs=cast("list[list[float]]", messages.encode_rows(rows)),
                ),
            )
            for name, rows in zip(self._ids, self._parts(grads), strict=True)
        ]

    def output(
        self, grads: Sequence[npt.NDArray[Any]], answers: Sequence[messages.CustomStepGradient]
    ) -> ForwardBackwardOutput:
        """Holds what the trainer has added against what was sent.

        Raises:
            UnknownReductionError: its sum of gradients times logprobs is another.
        """
        for rows, sent, answer in zip(
            self._parts(self._rows), self._parts(grads), answers, strict=True
        ):
            products = [
                np.asarray(row, np.float64) * grad for row, grad in zip(rows, sent, strict=True)
            ]
            expected = sum(float(one.sum()) for one in products)
            size = sum(float(np.abs(one).sum()) for one in products)
            size += _LEAST / _TOLERANCE * sum(float(np.abs(one).sum()) for one in sent)
            if not abs(answer.surrogate - expected) <= _TOLERANCE * size:
                raise UnknownReductionError(
                    f"the trainer says that gradients times logprobs sum to {answer.surrogate:.6g}"
                    f", where {expected:.6g} was sent. The gradient that it has added may be "
                    "another than the objective's: go on from a checkpoint. The next custom step "
                    "goes another way"
                )
        metrics = answers[0].metrics if len(answers) == 1 else {}
        return _output(self._rows, metrics)

    def _parts(self, rows: Sequence[Any]) -> list[Sequence[Any]]:
        return [rows[one.first : one.first + len(one.shapes)] for one in self._chunks]


def _only_targets(datum: Datum) -> Datum:
    return Datum(datum.model_input, {"target_tokens": datum.loss_fn_inputs["target_tokens"]})


def _request(model_id: str, given: messages.CustomStepInput) -> messages.CustomStepRequest:
    return messages.CustomStepRequest(given, model_id)


def _arrays(answer: messages.CustomStepLogprobs) -> list[npt.NDArray[np.float32]]:
    return [np.asarray(row, np.float32) for row in answer.logprobs]


def _output(
    rows: Sequence[npt.NDArray[np.float32]], metrics: dict[str, float] | None = None
) -> ForwardBackwardOutput:
    return ForwardBackwardOutput(
        loss_fn_outputs=[{"logprobs": TensorData(row)} for row in rows], metrics=metrics or {}
    )
