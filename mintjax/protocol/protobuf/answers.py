"""Reading the result of a pass, which may be anybody's, without copying its numbers.

The message classes would copy them twice, and fresh memory costs more than all else that there is
to do. What is here takes a message for what it is, numbered fields one after another, of which only
the large one has to stay where it is.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import msgspec

from mintjax.errors import DataError
from mintjax.protocol.protobuf.scalars import (
    FLOAT32,
    INT32,
    INT64,
    check_numbers,
    dtype_of,
    numbers,
    widened,
)
from mintjax.tensors import TensorData, first_not_finite
from mintjax.types import ForwardBackwardOutput, SampledSequence, SampleResponse

Field: TypeAlias = tuple[int, int, Any]  # number, wire type, an int or the bytes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_STOP_REASONS: dict[int, Literal["stop", "length"]] = {0: "stop", 1: "length"}
_MOST_DATUMS = 1 << 20
"""A record without fields may claim any number; each costs memory."""


class _Tensor(msgspec.Struct):
    """A ``BatchedTensor``; a field that is given twice adds to what was there."""

    data: memoryview = memoryview(b"")
    offsets: memoryview = memoryview(b"")
    dtype: int = 0
    trailing: list[int] = msgspec.field(default_factory=list[int])


def decode_output(body: bytes | bytearray | memoryview) -> ForwardBackwardOutput:
    """Decode the result of a pass, a ``ForwardBackwardOutput``.

    Args:
        body: of the answer.

    Returns:
        The arrays of one field are views of the body, read-only if it is; ``Ragged.from_rows``
        takes them as they are, and whether they are finite is for whoever uses them to see. int32
        is widened to int64, bfloat16 to float32.

    Raises:
        DataError: it is no such message, or describes no arrays, or a metric is not finite; names
            the field.
    """
    kind = "ArrayRecord"
    outputs: list[dict[str, TensorData]] = []
    metrics: dict[str, float] = {}
    for field in _fields(memoryview(body)):
        match field:
            case (1, 2, text):
                kind = _text(text).rpartition(":")[2] or kind
            case (2, 2, record):
                outputs += _record(record, len(outputs))
            case (3, 2, entry):
                name, value = _metric(entry)
                metrics[name] = value
            case _:
                pass
    check_numbers(metrics, "metrics")
    return ForwardBackwardOutput(loss_fn_outputs=outputs, metrics=metrics, loss_fn_output_type=kind)


def decode_sample(body: bytes | bytearray | memoryview) -> SampleResponse:
    """Decode what was sampled, a ``SampleResponse``.

    Fields that are not read here, such as the k likeliest tokens, are passed over.

    Args:
        body: of the answer.

    Returns:
        The samples. A prompt token whose logprob is NaN has None.

    Raises:
        DataError: it is no such message, or a logprob of a sampled token is not finite.
    """
    sequences: list[SampledSequence] = []
    prompt: list[float | None] | None = None
    for field in _fields(memoryview(body), "SampleResponse"):
        match field:
            case (1, 2, sequence):
                sequences.append(_sequence(sequence))
            case (2, 2, logprobs):
                row = numbers(logprobs, dtype_of(FLOAT32))
                prompt = [None if math.isnan(one) else one for one in row.tolist()]
            case _:
                pass
    return SampleResponse(sequences=sequences, prompt_logprobs=prompt)


def _sequence(message: memoryview) -> SampledSequence:
    result = SampledSequence(tokens=[], stop_reason="stop")  # which is the format's own default
    for field in _fields(message, "SampleResponse"):
        match field:
            case (1, 0, reason):
                if reason not in _STOP_REASONS:
                    raise DataError(f"a stop reason of {reason}", field="stop_reason")
                result.stop_reason = _STOP_REASONS[reason]
            case (2, 2, tokens):
                result.tokens = numbers(tokens, dtype_of(INT32)).tolist()
            case (3, 2, logprobs):
                row = numbers(logprobs, dtype_of(FLOAT32))
                if (at := first_not_finite(row)) is not None:
                    raise DataError(f"{row[at]} at position {at} is not finite", field="logprobs")
                result.logprobs = row.tolist()
            case _:
                pass
    return result


def _record(record: memoryview, first: int) -> list[dict[str, TensorData]]:
    count = 0
    tensors: dict[str, _Tensor] = {}
    for field in _fields(record):
        match field:
            case (1, 2, tag):
                _text(tag)  # of no use here, but no garbage either
            case (2, 2, entry):
                name, tensor = _named(entry)
                tensors[name] = tensor
            case (3, 0, number):
                count = _signed(number)
            case _:
                pass
    if not count and tensors:  # written before there was such a number
        count = max(0, len(next(iter(tensors.values())).offsets) // 8 - 1)
    if not 0 <= count <= _MOST_DATUMS - first:
        raise DataError(f"a record of {count} datums, after {first} others")
    columns = [_rows(tensor, name, count) for name, tensor in tensors.items()]
    if len(columns) == 1:
        [name] = tensors
        return [{name: row} for row in columns[0]]
    if not columns:
        return [{} for _ in range(count)]
    return [dict(zip(tensors, row, strict=True)) for row in zip(*columns, strict=True)]


def _rows(tensor: _Tensor, name: str, count: int) -> list[TensorData]:
    dtype = dtype_of(tensor.dtype, name)
    trailing, size = tuple(tensor.trailing), len(tensor.data)
    try:
        values = numbers(tensor.data, dtype)
        offsets = numbers(tensor.offsets, dtype_of(INT64))
        per_entry = dtype.itemsize * math.prod(trailing)
        if any(side < 0 for side in trailing) or len(trailing) > 8:
            raise DataError(f"entries of shape {list(trailing)}")
        if (
            offsets.size != count + 1
            or offsets[0] != 0
            or offsets[-1] != size
            or (offsets[1:] < offsets[:-1]).any()
            or (offsets % per_entry if 0 < per_entry < 2**62 else offsets).any()
        ):
            raise DataError(
                f"the offsets do not cut {size} bytes into {count} rows of "
                f"{dtype.name}{list(trailing)}"
            )
        values = widened(values, tensor.dtype)
        values = values.reshape(-1 if per_entry and values.size else 0, *trailing)
    except (DataError, ValueError) as error:
        raise DataError(str(error), field=name) from None
    bounds: list[int] = (offsets // max(per_entry, 1)).tolist()
    rows: Any = values.view(TensorData)
    return list(map(rows.__getitem__, map(slice, bounds, bounds[1:])))


def _named(entry: memoryview) -> tuple[str, _Tensor]:
    name, tensor = "", _Tensor()
    for field in _fields(entry):
        match field:
            case (1, 2, text):
                name = _text(text)
            case (2, 2, message):
                _fill(tensor, message)
            case _:
                pass
    return name, tensor


def _fill(tensor: _Tensor, message: memoryview) -> None:
    for field in _fields(message):
        match field:
            case (1, 2, data):
                tensor.data = data
            case (2, 2, offsets):
                tensor.offsets = offsets
            case (3, 0, code):
                tensor.dtype = code
            case (4, 2, packed):
                at = 0
                while at < len(packed):
                    number, at = _varint(packed, at)
                    tensor.trailing.append(_signed(number))
            case (4, 0, number):
                tensor.trailing.append(_signed(number))
            case _:
                pass


def _metric(entry: memoryview) -> tuple[str, float]:
    name, value = "", 0.0
    for field in _fields(entry):
        match field:
            case (1, 2, text):
                name = _text(text)
            case (2, 1, number):
                [value] = struct.unpack("<d", number)
            case _:
                pass
    return name, value


def _fields(message: memoryview, kind: str = "ForwardBackwardOutput") -> Iterator[Field]:
    """The fields of a message, in the order in which they come; ``kind`` is for its errors."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at, kind)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at, kind)
        else:
            if wire == _BYTES:
                size, at = _varint(message, at, kind)
            elif wire in _SIZES:
                size = _SIZES[wire]
            else:
                raise DataError(f"not a {kind}: a field of wire type {wire}")
            value = message[at : at + size]
            at += size
        if at > len(message) or not 0 < number < 2**29:
            raise DataError(f"not a {kind}: it ends within a field, or is garbage")
        yield number, wire, value


def _varint(message: memoryview, at: int, kind: str = "ForwardBackwardOutput") -> tuple[int, int]:
    """An unsigned number of at most 64 bits, and where it ends."""
    number = 0
    for shift, byte in enumerate(message[at : at + 10]):
        number |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return number & 0xFFFF_FFFF_FFFF_FFFF, at + shift + 1
    raise DataError(f"not a {kind}: it ends within a number")


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _text(content: memoryview) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError:
        raise DataError("not a ForwardBackwardOutput: a name that is no UTF-8") from None
