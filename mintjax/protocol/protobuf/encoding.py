"""Writes the messages of ``messages.proto``.

A message is a list of parts that are joined once, so the numbers of a batch are copied once. The
format allows fields in any order. Here the numbers come last, so that everything before them is one
small head, which can be kept and used again.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError
from mintjax.protocol import messages
from mintjax.protocol.messages import SparseTensor
from mintjax.tensors import TensorData, as_travels, check_finite, first_not_finite
from mintjax.types import (
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    SampleResponse,
    TopkLogprobs,
    TopkRow,
)

Part: TypeAlias = bytes | memoryview
Request: TypeAlias = messages.ForwardRequest | messages.ForwardBackwardRequest
Column: TypeAlias = tuple[str, np.dtype[Any], tuple[int, ...]]  # name, dtype, shape of an entry

_DTYPES = {np.dtype("<f4"): 1, np.dtype("<i8"): 2}


class EncodedData(bytes):
    """Datums encoded by :func:`encode_datum`, one after another.

    A request that is encoded may hold it in place of its list of datums.
    """


def encode_request(request: Request) -> bytes:
    """Encodes a request for a pass, as ``ForwardBackwardRequest``.

    Args:
        request: its data may be :class:`EncodedData`.

    Returns:
        The message.

    Raises:
        NonFiniteError: a number is NaN or infinite, which the protocol does not allow; the error
            names datum and position.
        DataError: a token or a ``seq_id`` does not fit in int32.
    """
    if isinstance(request, messages.ForwardRequest):
        given, forward_only = request.forward_input, True
    else:
        given, forward_only = request.forward_backward_input, False
    parts: list[Part] = [_text(b"\x0a", request.model_id)]
    if request.seq_id is not None:
        if not 0 <= request.seq_id < 2**31:
            raise DataError(f"{request.seq_id} does not fit in int32", field="seq_id")
        parts += [b"\x10", _varint(request.seq_id)]
    if isinstance(given.data, EncodedData):
        parts.append(given.data)
    else:
        for i, datum in enumerate(given.data):
            parts += _datum(datum, i)
    parts.append(_text(b"\x22", given.loss_fn))
    for name, value in (given.loss_fn_config or {}).items():
        key = _text(b"\x0a", name)
        if isinstance(value, str):
            parts.append(_message(b"\x3a", key, _message(b"\x12", _text(b"\x12", value))))
            continue
        number = struct.pack("<d", value)
        parts.append(_message(b"\x2a", key, b"\x11", number))
        parts.append(_message(b"\x3a", key, _message(b"\x12", b"\x09", number)))
    if forward_only:
        parts.append(b"\x30\x01")
    return b"".join(parts)


def encode_datum(datum: Datum, position: int = 0) -> bytes:
    """Encodes one datum, for :class:`EncodedData`.

    Args:
        datum: the datum.
        position: its position in the batch, which errors name.

    Returns:
        The field ``data`` of a request, with its tag and length.

    Raises:
        NonFiniteError: a number is NaN or infinite.
        DataError: a token does not fit in int32.
    """
    return b"".join(_datum(datum, position))


def encode_output(output: ForwardBackwardOutput, *, finite: bool = True) -> bytes:
    """Encodes the result of a pass, as ``ForwardBackwardOutput``.

    Consecutive datums whose fields have the same names, dtypes and trailing shapes share a record.
    A number without an axis becomes an array of one number.

    Args:
        output: the result of a pass.
        finite: whether to refuse NaN and infinities, which some trainers send.

    Returns:
        The message.

    Raises:
        NonFiniteError: a number is NaN or infinite; the error names datum and position.
    """
    parts: list[Part] = [_text(b"\x0a", output.loss_fn_output_type)]
    run: list[Mapping[str, npt.NDArray[Any]]] = []
    kind: list[Column] = []
    for i, one in enumerate(output.loss_fn_outputs):
        this = [(name, array.dtype, array.shape[1:]) for name, array in one.items()]
        if run and this != kind:
            parts += _record(run, kind, i - len(run), finite)
            run = []
        kind = this
        run.append(one)
    if run:
        parts += _record(run, kind, len(output.loss_fn_outputs) - len(run), finite)
    for name, value in output.metrics.items():
        parts.append(_message(b"\x1a", _text(b"\x0a", name), b"\x11", struct.pack("<d", value)))
    return b"".join(parts)


def encode_sample(response: SampleResponse) -> bytes:
    """Encodes the answer to a request for samples, as ``SampleResponse``.

    The format marks a prompt token without a logprob by NaN.

    Args:
        response: the samples; a :class:`~mintjax.protocol.messages.SparseSampleResponse` where
            the targets are sparse.

    Returns:
        The message.
    """
    parts: list[bytes] = []
    for sequence in response.sequences:
        tokens = _bytes(b"\x12", np.asarray(sequence.tokens, "<i4").tobytes())
        fields = [b"\x08\x01" if sequence.stop_reason == "length" else b"", tokens]
        if sequence.logprobs is not None:
            fields.append(_bytes(b"\x1a", np.asarray(sequence.logprobs, "<f4").tobytes()))
        fields += _topk(b"\x22", sequence.topk_logprobs)
        parts.append(_message(b"\x0a", *fields))
    if response.prompt_logprobs is not None:
        prompt = [math.nan if one is None else one for one in response.prompt_logprobs]
        parts.append(_bytes(b"\x12", np.asarray(prompt, "<f4").tobytes()))
    parts += _topk(b"\x1a", response.topk_prompt_logprobs)
    if response.prompt_cache_hit_tokens:
        parts.append(b"\x20" + _varint(response.prompt_cache_hit_tokens))
    targets: TensorData | SparseTensor | None = response.target_prompt_logprobs
    if isinstance(targets, SparseTensor):
        parts.append(_sparse(b"\x2a", targets))
    elif targets is not None:
        parts.append(_dense(b"\x2a", targets))
    if response.prompt_alt_tokens is not None:
        drawn = response.prompt_alt_tokens
        parts.append(
            _message(b"\x32", _dense(b"\x0a", drawn.tokens), _dense(b"\x12", drawn.logprobs))
        )
    return b"".join(parts)


def _topk(tag: bytes, rows: Sequence[TopkRow] | None) -> list[bytes]:
    if rows is None:
        return []
    topk = TopkLogprobs.from_rows(rows)
    length, width = topk.token_ids.shape
    numbers = (
        _bytes(b"\x0a", topk.token_ids.astype("<i4").tobytes()),
        _bytes(b"\x12", topk.logprobs.astype("<f4").tobytes()),
    )
    return [_message(tag, *numbers, b"\x18" + _varint(width), b"\x20" + _varint(length))]


def _dense(tag: bytes, tensor: TensorData) -> bytes:
    values = np.ascontiguousarray(as_travels(tensor))
    return _message(tag, _bytes(b"\x0a", values.tobytes()), _about(values.dtype, tensor.shape))


def _sparse(tag: bytes, tensor: SparseTensor) -> bytes:
    values = np.asarray(tensor.data, tensor.dtype)
    fields = (
        _bytes(b"\x0a", values.tobytes()),
        _bytes(b"\x12", np.asarray(tensor.sparse_crow_indices, "<i8").tobytes()),
        _bytes(b"\x1a", np.asarray(tensor.sparse_col_indices, "<i8").tobytes()),
    )
    about = _about(values.dtype, tuple(tensor.shape))
    return _message(tag, _message(b"\x12", *fields), about)


def _datum(datum: Datum, position: int) -> list[Part]:
    parts: list[Part] = [b""]
    size = 0
    for chunk in datum.model_input.chunks:
        if isinstance(chunk, ImageChunk):
            head, content = _head_of_image(chunk), chunk.data
        else:
            content = _int32(chunk, position)
            head = _head_of_tokens(len(content))
        size += len(head) + len(content)
        parts += (head, content)
    for name, column in datum.loss_fn_inputs.items():
        values = np.ascontiguousarray(as_travels(column))
        if first_not_finite(values) is not None:
            check_finite(values, position, f"input {name!r}")
        head = _head_of_column(name, values.dtype, column.shape, values.nbytes)
        size += len(head) + values.nbytes
        parts += (head, values.data)
    parts[0] = b"\x1a" + _varint(size)
    return parts


def _record(
    run: list[Mapping[str, npt.NDArray[Any]]], kind: list[Column], first: int, finite: bool
) -> list[Part]:
    parts: list[Part] = [b"", b"\x18", _varint(len(run)), _text(b"\x0a", "ArrayRecord")]
    for name, dtype, trailing in kind:
        rows = [np.ascontiguousarray(one[name]) for one in run]
        for i, row in enumerate(rows):
            if finite and first_not_finite(row) is not None:
                check_finite(row, first + i, f"output {name!r}")
        offsets = np.cumsum([0, *(row.nbytes for row in rows)], dtype="<i8")
        about = _bytes(b"\x12", offsets.tobytes()) + _about(dtype, trailing)
        parts.append(_head(name, about, int(offsets[-1])))
        parts += [row.data for row in rows]
    parts[0] = b"\x12" + _varint(sum(_size(part) for part in parts))
    return parts


def _int32(chunk: EncodedTextChunk, position: int) -> bytes:
    tokens = chunk.tokens
    try:
        return struct.pack(f"<{len(tokens)}i", *tokens)
    except struct.error:
        raise DataError(
            f"one of {len(tokens)} tokens does not fit in int32",
            datum=position,
            field="model_input",
        ) from None


@functools.lru_cache(maxsize=4096)
def _head_of_tokens(size: int) -> bytes:
    """Makes the head of a text chunk whose tokens, ``size`` bytes, follow."""
    head = b"\x0a" + _varint(size)
    for _ in range(2):
        head = b"\x0a" + _varint(len(head) + size) + head
    return head


def _head_of_image(chunk: ImageChunk) -> bytes:
    """Makes the head of an image's chunk, whose bytes follow."""
    head = _text(b"\x12", chunk.format)
    if chunk.expected_tokens is not None:
        head += b"\x18" + _varint(chunk.expected_tokens)
    head += b"\x0a" + _varint(len(chunk.data))
    for tag in (b"\x12", b"\x0a"):
        head = tag + _varint(len(head) + len(chunk.data)) + head
    return head


@functools.lru_cache(maxsize=4096)
def _head_of_column(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], size: int) -> bytes:
    return _head(name, _about(dtype, shape), size)


def _head(name: str, about: bytes, size: int) -> bytes:
    """Makes the head of a named tensor, an entry of field 2, whose ``size`` bytes follow."""
    about += b"\x0a" + _varint(size)
    entry = _text(b"\x0a", name) + b"\x12" + _varint(len(about) + size) + about
    return b"\x12" + _varint(len(entry) + size) + entry


def _about(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Writes fields 3 and 4 of a tensor: its dtype and its shape."""
    sizes = b"".join(map(_varint, shape))
    return b"\x18" + _varint(_DTYPES[dtype]) + (_bytes(b"\x22", sizes) if shape else b"")


def _message(tag: bytes, *fields: bytes) -> bytes:
    return _bytes(tag, b"".join(fields))


def _text(tag: bytes, text: str) -> bytes:
    return _bytes(tag, text.encode())


def _bytes(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SMALL[number]
    low: list[int] = []
    while number >= 0x80:
        low.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*low, number])


_SMALL = [bytes([number]) for number in range(0x80)]


def _size(part: Part) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes
