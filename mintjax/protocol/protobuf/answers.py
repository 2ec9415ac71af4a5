"""Reads the answers of a trainer without copying their numbers.

The generated message classes would copy the numbers twice, and the new memory would take more time
than the rest of the reading. So this module reads the bytes itself: a message is a sequence of
numbered fields, and an array is a view of its field. An answer may come from anybody, so every
length and every offset in it is checked.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import msgspec
import numpy.typing as npt

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
from mintjax.types import (
    ForwardBackwardOutput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TopkLogprobs,
    TopkRow,
)

Field: TypeAlias = tuple[int, int, Any]  # number, wire type, an int or the bytes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_STOP_REASONS: dict[int, Literal["stop", "length"]] = {0: "stop", 1: "length"}
_MOST_DATUMS = 1 << 20
"""The limit on datums, because a record may claim any number of them in a few bytes."""


class _Tensor(msgspec.Struct):
    """A ``BatchedTensor``; a list that comes in two parts is joined."""

    data: memoryview = memoryview(b"")
    offsets: memoryview = memoryview(b"")
    dtype: int = 0
    trailing: list[int] = msgspec.field(default_factory=list[int])


def decode_output(body: bytes | bytearray | memoryview) -> ForwardBackwardOutput:
    """Decodes the result of a pass, a ``ForwardBackwardOutput``.

    Args:
        body: of the answer.

    Returns:
        The output. Its arrays are views of the body, and read-only where the body is. They are not
        checked for NaN, because the code that uses them checks. int32 becomes int64, and bfloat16
        becomes float32.

    Raises:
        DataError: the bytes are no such message, an array in it is not valid, or a metric is not
            finite; the error names the field.
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
    """Decodes the answer to a request for samples, a ``SampleResponse``.

    Unknown fields are skipped.

    Args:
        body: of the answer.

    Returns:
        The samples. The logprob of a prompt token is None where the trainer sent NaN.

    Raises:
        DataError: the bytes are no such message, or a logprob of a sampled token is not finite.
    """
    sequences: list[SampledSequence] = []
    prompt: list[float | None] | None = None
    result = SampleResponse(sequences=sequences)
    for field in _fields(memoryview(body), "SampleResponse"):
        match field:
            case (1, 2, sequence):
                sequences.append(_sequence(sequence))
            case (2, 2, logprobs):
                row = numbers(logprobs, dtype_of(FLOAT32))
                prompt = [None if math.isnan(one) else one for one in row.tolist()]
            case (3, 2, topk):
                result.topk_prompt_logprobs = _topk(topk)
            case (4, 0, number):
                result.prompt_cache_hit_tokens = _signed(number)
            case (5, 2, tensor):
                result.target_prompt_logprobs = _tensor(tensor, "target_prompt_logprobs")
            case (6, 2, drawn):
                result.prompt_alt_tokens = _alternatives(drawn)
            case _:
                pass
    result.prompt_logprobs = prompt
    return result


def _topk(message: memoryview) -> list[TopkRow]:
    token_ids, logprobs = memoryview(b""), memoryview(b"")
    width = length = 0
    for field in _fields(message, "SampleResponse"):
        match field:
            case (1, 2, content):
                token_ids = content
            case (2, 2, content):
                logprobs = content
            case (3, 0, number):
                width = number
            case (4, 0, number):
                length = number
            case _:
                pass
    ids, row = numbers(token_ids, dtype_of(INT32)), numbers(logprobs, dtype_of(FLOAT32))
    if not ids.size == row.size == width * length or length > _MOST_DATUMS:
        raise DataError(
            f"{ids.size} tokens and {row.size} logprobs at {length} positions of {width} each",
            field="topk_logprobs",
        )
    _check_finite(row)
    shape = (length, width)
    return TopkLogprobs(ids.reshape(shape), row.reshape(shape)).to_rows()


def _check_finite(row: npt.NDArray[Any]) -> None:
    if (at := first_not_finite(row)) is not None:
        raise DataError(f"{row[at]} at position {at} is not finite", field="logprobs")


def _alternatives(message: memoryview) -> PromptAltTokens:
    tensors: dict[int, TensorData] = {}
    for number, wire, content in _fields(message, "SampleResponse"):
        if number in (1, 2) and wire == _BYTES:
            tensors[number] = _tensor(content, "prompt_alt_tokens")
    if tensors.keys() != {1, 2} or tensors[1].shape != tensors[2].shape:
        raise DataError("tokens and logprobs do not go together", field="prompt_alt_tokens")
    return PromptAltTokens(tokens=tensors[1], logprobs=tensors[2])


def _tensor(message: memoryview, name: str) -> TensorData:
    """Reads a ``Tensor``, and makes a sparse one dense."""
    code, shape = 0, list[int]()
    parts: dict[int, memoryview] = {}
    for field in _fields(message, "SampleResponse"):
        match field:
            case (1, 2, dense):
                parts = {0: dense}
            case (2, 2, sparse):
                parts = {n: one for n, wire, one in _fields(sparse) if wire == _BYTES}
                parts = {n: parts.get(n, memoryview(b"")) for n in (1, 2, 3)}
            case (3, 0, number):
                code = number
            case (4, 2, packed):
                shape += _packed(packed)
            case (4, 0, number):
                shape.append(_signed(number))
            case _:
                pass
    dtype = dtype_of(code, name)
    try:
        if min(shape, default=0) < 0:
            raise DataError(f"a shape of {shape}")
        values = widened(numbers(parts.get(0, parts.get(1, memoryview(b""))), dtype), code)
        if (at := first_not_finite(values)) is not None:
            raise DataError(f"{values[at]} at position {at} is not finite")
        if 1 not in parts:
            return TensorData(values, shape=shape)
        crow, col = (numbers(parts[n], dtype_of(INT64)).tolist() for n in (2, 3))
        return TensorData(values, None, shape, crow, col)
    except DataError as error:
        raise DataError(str(error), field=name) from None


def _packed(content: memoryview) -> Iterator[int]:
    at = 0
    while at < len(content):
        number, at = _varint(content, at)
        yield _signed(number)


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
                _check_finite(row)
                result.logprobs = row.tolist()
            case (4, 2, topk):
                result.topk_logprobs = _topk(topk)
            case _:
                pass
    return result


def _record(record: memoryview, first: int) -> list[dict[str, TensorData]]:
    count = 0
    tensors: dict[str, _Tensor] = {}
    for field in _fields(record):
        match field:
            case (1, 2, tag):
                _text(tag)  # not used, but it must be text
            case (2, 2, entry):
                name, tensor = _named(entry)
                tensors[name] = tensor
            case (3, 0, number):
                count = _signed(number)
            case _:
                pass
    if not count and tensors:  # older trainers do not send the count
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
                tensor.trailing += _packed(packed)
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
    """Yields the fields of a message in their order; ``kind`` names the message in errors."""
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
            raise DataError(f"not a {kind}: it ends within a field, or its bytes are no fields")
        yield number, wire, value


def _varint(message: memoryview, at: int, kind: str = "ForwardBackwardOutput") -> tuple[int, int]:
    """Reads an unsigned number of at most 64 bits; also returns the position after it."""
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
        raise DataError("not a ForwardBackwardOutput: a name is not UTF-8") from None
