"""Batches on their way to the trainer, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec
import numpy as np

from mintjax.client.encodings import Encoding, encoded, joined
from mintjax.client.metrics import combine_metrics
from mintjax.errors import APIResponseError, DataError
from mintjax.protocol import messages
from mintjax.protocol.protobuf import EncodedData
from mintjax.step.reduction import Reduction
from mintjax.tensors import TensorData, first_row_not_finite
from mintjax.types import Datum, ForwardBackwardOutput

Shape = tuple[int, ...]

MAX_LOGPROB = 0.25
"""The largest logprob that a trainer may return; 16-bit arithmetic can round one to above 0."""


class Chunk(msgspec.Struct):
    """Some datums of a batch, encoded when they were handed over.

    Args:
        data: their JSON, or their protocol buffers.
        shapes: of the target tokens of each.
        first: position of the first in the batch.
    """

    data: msgspec.Raw | EncodedData
    shapes: list[Shape | None]
    first: int


def chunks(
    data: Sequence[Datum], limits: messages.ClientConfigResponse, *, in_protobuf: bool
) -> list[Chunk]:
    """Encodes a batch as it is now, in requests of a size that the trainer takes.

    Raises:
        NonFiniteError: a number that no encoding carries; the message names its place.
        DataError: a token that the encoding does not carry.
    """
    datums = [encoded(datum, i, in_protobuf) for i, datum in enumerate(data)]
    starts, size = [0], 0
    for i, one in enumerate(datums):
        too_long = i - starts[-1] >= limits.fwdbwd_max_chunk_len
        too_big = size + len(one) > limits.fwdbwd_max_chunk_bytes_count
        if i > starts[-1] and (too_long or too_big):
            starts.append(i)
            size = 0
        size += len(one)

    def chunk(start: int, end: int) -> Chunk:
        shapes = [_target_shape(datum) for datum in data[start:end]]
        return Chunk(joined(datums[start:end], in_protobuf), shapes, start)

    return [chunk(*ends) for ends in itertools.pairwise([*starts, len(datums)])]


class Pass:
    """A pass over a batch, encoded as the batch was when this was made.

    Args:
        encoding: the trainer's.
        data: the batch.
        loss_fn: the loss to take of it.
        config: its hyperparameters.
        backward: add the gradient to what is accumulated.

    Raises:
        NonFiniteError: a number that no encoding carries; the message names its place.
        DataError: a token that the encoding does not carry.
    """

    def __init__(
        self,
        encoding: Encoding,
        data: Sequence[Datum],
        loss_fn: str,
        config: Mapping[str, float | str] | None = None,
        *,
        backward: bool,
    ) -> None:
        self.loss_fn = loss_fn
        self.backward = backward
        self.path = "forward_backward" if backward else "forward"
        self.datums = len(data)
        self._config = None if config is None else dict(config)
        self._chunks = chunks(data, encoding.limits, in_protobuf=encoding.in_protobuf)

    def check_scaled_for(self, reduction: Reduction) -> None:
        """Checks that the pass is divided by what its gradient was scaled for.

        Raises:
            DataError: the trainer divides by an amount of a request, and there are several.
        """
        if reduction.per_request is not None and len(self._chunks) > 1:
            raise DataError(
                f"this trainer divides by {reduction.per_request} of a request, and these datums "
                f"are too many for one: they would go in {len(self._chunks)} requests. Send fewer "
                "in a custom step"
            )

    def messages(
        self, model_id: str
    ) -> list[messages.ForwardRequest | messages.ForwardBackwardRequest]:
        """Makes the requests, still without their numbers."""
        kind = messages.ForwardBackwardRequest if self.backward else messages.ForwardRequest
        inputs = [
            messages.ForwardBackwardInput(
                cast("list[Datum]", chunk.data), self.loss_fn, self._config
            )
            for chunk in self._chunks
        ]
        return [kind(given, model_id) for given in inputs]

    def check(self, part: int, output: ForwardBackwardOutput) -> None:
        """Checks that an output can be that of a request, before it counts as the answer.

        Args:
            part: which of the requests.
            output: what was answered.

        Raises:
            APIResponseError: there is not one record for each datum, logprobs are not shaped as
                the targets, or a number is none that it can be.
        """
        check_shapes(self._chunks[part], output)

    def output(self, parts: Sequence[ForwardBackwardOutput]) -> ForwardBackwardOutput:
        """Joins the outputs of all requests, each of them checked, to that of the batch."""
        counts = [len(chunk.shapes) for chunk in self._chunks]
        return ForwardBackwardOutput(
            loss_fn_outputs=[one for output in parts for one in output.loss_fn_outputs],
            metrics=combine_metrics([output.metrics for output in parts], counts),
            loss_fn_output_type=parts[0].loss_fn_output_type,
        )


def _target_shape(datum: Datum) -> Shape | None:
    targets = datum.loss_fn_inputs.get("target_tokens")
    return None if targets is None else targets.shape


def _check_finite(first: int, outputs: Sequence[Mapping[str, TensorData]]) -> None:
    places = [(i, name) for i, one in enumerate(outputs) for name in one]
    if places and (found := first_row_not_finite([outputs[i][name] for i, name in places])):
        (i, name), at = places[found[0]], found[1]
        value = outputs[i][name].ravel()[at]  # infinite is what JSON beyond float32 becomes
        raise APIResponseError(f"datum {first + i}: the trainer returned {value} in {name!r}[{at}]")


def _check_probable(first: int, rows: Sequence[TensorData | None]) -> None:
    given = [(i, row) for i, row in enumerate(rows) if row is not None and row.size]
    if not given or max(float(row.max()) for _, row in given) <= MAX_LOGPROB:
        return
    i, row = next((i, row) for i, row in given if float(row.max()) > MAX_LOGPROB)
    raise APIResponseError(
        f"datum {first + i}: the trainer returned a logprob of {float(row.max()):g}, which is no "
        "logarithm of a probability"
    )


def check_shapes(chunk: Chunk, output: ForwardBackwardOutput) -> None:
    """Checks that an output can be that of a chunk.

    Raises:
        APIResponseError: it cannot; see :meth:`Pass.check`.
    """
    if len(output.loss_fn_outputs) != len(chunk.shapes):
        raise APIResponseError(
            f"the trainer returned {len(output.loss_fn_outputs)} outputs for "
            f"{len(chunk.shapes)} datums"
        )
    _check_finite(chunk.first, output.loss_fn_outputs)
    for i, (shape, one) in enumerate(zip(chunk.shapes, output.loss_fn_outputs, strict=True)):
        logprobs = one.get("logprobs")
        if logprobs is not None and logprobs.dtype != np.float32:
            raise APIResponseError(
                f"datum {chunk.first + i}: the trainer returned logprobs of {logprobs.dtype.name}"
            )
        if logprobs is None or shape is None or logprobs.shape == shape:
            continue
        if logprobs.ndim != 1 or logprobs.size != int(np.prod(shape)):
            raise APIResponseError(
                f"datum {chunk.first + i}: the trainer returned logprobs of shape "
                f"{list(logprobs.shape)} for target_tokens of shape {list(shape)}"
            )
        one["logprobs"] = TensorData.from_numpy(logprobs.reshape(shape))  # it sent no shape
    _check_probable(chunk.first, [one.get("logprobs") for one in output.loss_fn_outputs])
