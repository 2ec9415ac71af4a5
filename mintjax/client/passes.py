"""Batches on their way to the trainer, and back: chunks, finite numbers, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from mintjax import wire
from mintjax.errors import APIResponseError, NonFiniteError
from mintjax.protobuf import EncodedData, encode_datum
from mintjax.tensors import TensorData, check_finite
from mintjax.types import Datum, ForwardBackwardOutput

Shape = tuple[int, ...]


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


def chunks(data: Sequence[Datum], limits: wire.ClientConfigResponse) -> list[Chunk]:
    """Encode a batch as it is now, in requests of a size that the trainer takes.

    Raises:
        NonFiniteError: a number that no encoding carries; the message names its place.
        DataError: a token that the encoding does not carry.
    """
    as_protobuf = limits.proto_write_fwdbwd
    result: list[Chunk] = []
    parts: list[bytes] = []
    size = 0

    def close(end: int) -> None:
        nonlocal parts, size
        first = end - len(parts)
        shapes = [_target_shape(datum) for datum in data[first:end]]
        encoded = (
            EncodedData(b"".join(parts))
            if as_protobuf
            else msgspec.Raw(b"[" + b",".join(parts) + b"]")
        )
        result.append(Chunk(encoded, shapes, first))
        parts, size = [], 0

    for i, datum in enumerate(data):
        try:
            encoded = encode_datum(datum, i) if as_protobuf else wire.encode(datum)
        except NonFiniteError:
            for name, column in datum.loss_fn_inputs.items():
                check_finite(column, i, f"input {name!r}")
            raise
        too_long = len(parts) >= limits.fwdbwd_max_chunk_len
        too_big = size + len(encoded) > limits.fwdbwd_max_chunk_bytes_count
        if parts and (too_long or too_big):
            close(i)
        parts.append(encoded)
        size += len(encoded)
    close(len(data))
    return result


def messages(
    parts: Sequence[Chunk],
    model_id: str,
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None,
    *,
    backward: bool,
) -> list[Callable[[int], Any]]:
    """The requests of one pass, each still without its number."""

    def message(chunk: Chunk) -> Callable[[int], Any]:
        config = None if loss_fn_config is None else dict(loss_fn_config)
        given = wire.ForwardBackwardInput(cast("list[Datum]", chunk.data), loss_fn, config)
        kind = wire.ForwardBackwardRequest if backward else wire.ForwardRequest
        return lambda seq_id: kind(given, model_id, seq_id)

    return [message(chunk) for chunk in parts]


def combined(
    parts: Sequence[Chunk], outputs: Sequence[ForwardBackwardOutput]
) -> ForwardBackwardOutput:
    """The outputs of a batch's chunks as that of the batch.

    Raises:
        APIResponseError: there are not as many as datums, or logprobs are not shaped as targets.
    """
    for chunk, output in zip(parts, outputs, strict=True):
        _check_shapes(chunk, output)
    counts = [len(chunk.shapes) for chunk in parts]
    return ForwardBackwardOutput(
        loss_fn_outputs=[one for output in outputs for one in output.loss_fn_outputs],
        metrics=combine_metrics([output.metrics for output in outputs], counts),
        loss_fn_output_type=outputs[0].loss_fn_output_type,
    )


def combine_metrics(
    parts: Sequence[Mapping[str, float]], counts: Sequence[int]
) -> dict[str, float]:
    """Combine metrics of several chunks by the suffix of their names.

    ``sum``, ``mean`` (weighted by datums), ``min``, ``max``, ``slack`` (max - weighted mean),
    ``hash2``. Values that cannot be combined (``unique``, unknown suffixes, none) are all kept,
    where they differ: as ``name``, ``name_1``, ``name_2``, ...

    Args:
        parts: each chunk's metrics; a name need not be in all of them.
        counts: each chunk's number of datums.
    """
    if len(parts) == 1:
        return dict(parts[0])
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        present = [(part[name], n) for part, n in zip(parts, counts, strict=True) if name in part]
        values = np.array([value for value, _ in present])
        weights = np.array([n for _, n in present])
        reduce = _REDUCTIONS.get(name.rpartition(":")[2])
        if reduce is not None:
            result[name] = float(reduce(values, weights))
            continue
        same = bool((values == values[0]).all()) and not name.endswith(":unique")
        for i, value in enumerate(values[:1] if same else values):
            result[f"{name}_{i}" if i else name] = float(value)
    return result


def _hash(values: np.ndarray[Any, Any], _: object) -> float:
    return float(hash(tuple(sorted(int(value) for value in values))))


def _mean(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    return float(np.average(values, weights=weights))


_REDUCTIONS: dict[str, Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float]] = {
    "sum": lambda values, _: float(values.sum()),
    "mean": _mean,
    "min": lambda values, _: float(values.min()),
    "max": lambda values, _: float(values.max()),
    "slack": lambda values, weights: float(values.max()) - _mean(values, weights),
    "hash2": _hash,
    "hash_unordered": _hash,
}


def _target_shape(datum: Datum) -> Shape | None:
    targets = datum.loss_fn_inputs.get("target_tokens")
    return None if targets is None else targets.shape


def _check_shapes(chunk: Chunk, output: ForwardBackwardOutput) -> None:
    if len(output.loss_fn_outputs) != len(chunk.shapes):
        raise APIResponseError(
            f"the trainer returned {len(output.loss_fn_outputs)} outputs for "
            f"{len(chunk.shapes)} datums"
        )
    for i, (shape, one) in enumerate(zip(chunk.shapes, output.loss_fn_outputs, strict=True)):
        for name, array in one.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise APIResponseError(
                    f"datum {chunk.first + i}: the trainer returned a number in {name!r} that is "
                    "beyond float32"
                )
        logprobs = one.get("logprobs")
        if logprobs is None or shape is None or logprobs.shape == shape:
            continue
        if logprobs.ndim != 1 or logprobs.size != int(np.prod(shape)):
            raise APIResponseError(
                f"datum {chunk.first + i}: the trainer returned logprobs of shape "
                f"{list(logprobs.shape)} for target_tokens of shape {list(shape)}"
            )
        one["logprobs"] = TensorData.from_numpy(logprobs.reshape(shape))  # it sent no shape
