"""The bodies that the embedded trainer reads, and those that it writes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from mintjax.errors import BadRequestError, ConfigError, DataError
from mintjax.local.dialects import WithNaN
from mintjax.local.endpoints import Answer
from mintjax.local.limits import Limits
from mintjax.protocol import messages, protobuf, zstd
from mintjax.tensors import TensorData
from mintjax.types import ForwardBackwardOutput, SampleResponse

M = TypeVar("M")

LARGE_BYTES = 64 * 1024
"""Larger bodies are read and written in a thread, so that other requests are answered meanwhile."""

JSON = "application/json"


class ProtobufResult(bytes):
    """A result as a protocol buffer, where others are JSON."""


class SampleResult(bytes):
    """The samples, as JSON; nothing in their request says how they will be asked for.

    Attributes:
        as_protobuf: the same as a protocol buffer.
    """

    as_protobuf: bytes


class _Numbered(msgspec.Struct):
    model_id: str
    seq_id: int


class _ColumnsOfDatum(msgspec.Struct):
    loss_fn_inputs: dict[str, msgspec.Raw]


class _ColumnsOfData(msgspec.Struct):
    data: list[_ColumnsOfDatum]


class _Columns(msgspec.Struct):
    forward_input: _ColumnsOfData | None = None
    forward_backward_input: _ColumnsOfData | None = None


def is_protobuf(request: Request) -> bool:
    """Tells whether the content type is that of a protocol buffer."""
    return _given(request, "content-type", JSON) == protobuf.MEDIA_TYPE


async def content(request: Request, limits: Limits) -> bytes:
    """Reads the body of a request, as it was sent.

    Raises:
        BadRequestError: larger than ``limits.max_body_bytes``.
    """
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() else 0
    limits.check("max_body_bytes", size, f"the body has {size} bytes", 413)
    body = bytearray()
    async for part in request.stream():
        body += part
        limits.check("max_body_bytes", len(body), f"the body has {len(body)} bytes or more", 413)
    return bytes(body)


def decompressed(request: Request, body: bytes, limits: Limits) -> bytes:
    """Undoes the ``Content-Encoding`` of a request's body.

    Raises:
        BadRequestError: larger than ``limits.max_body_bytes``; no such compression, or not
            compressed as it says.
    """
    encoding = _given(request, "content-encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise BadRequestError(415, f"content-encoding: this trainer reads zstd, not {encoding}")
    try:
        return zstd.decompress(body, limits.max_body_bytes)
    except zstd.TooLargeError as error:
        raise BadRequestError(413, limits.refusal("max_body_bytes", str(error))) from None
    except DataError as error:
        raise BadRequestError(400, str(error)) from None
    except ConfigError as error:
        raise BadRequestError(415, f"content-encoding: {error}") from None


def decode(request: Request, body: bytes, as_type: type[M]) -> M:
    """Decodes a body as a struct of the protocol.

    A body that does not say that it is JSON is refused, because browsers send such ones for any
    page without asking.

    Raises:
        BadRequestError: it does not say that it is JSON, or is not of that type.
    """
    given = _given(request, "content-type", "a body that does not say what it is")
    if given != JSON:
        raise BadRequestError(415, f"content-type: this is read as {JSON}, not {given}")
    try:
        return messages.decode(body, as_type)
    except DataError as error:
        raise BadRequestError(422, _column_at_fault(body) or str(error)) from None


def query(request: Request, as_type: type[M], defaults: dict[str, str]) -> M:
    """Reads the query of a request as a struct.

    Raises:
        BadRequestError: it is not of that type.
    """
    given = defaults | dict(request.query_params)
    try:
        return msgspec.convert(given, as_type, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequestError(422, f"the query: {error}") from None


def decode_pass(body: bytes) -> messages.ForwardRequest | messages.ForwardBackwardRequest:
    """Decodes a pass that says that it is a protocol buffer.

    Raises:
        BadRequestError: it is none, or cannot be read here.
    """
    try:
        return protobuf.decode_request(body)
    except DataError as error:
        raise BadRequestError(422, str(error)) from None
    except ConfigError as error:
        raise BadRequestError(415, f"content-type: {error}") from None


def number_of(request: Request, body: bytes) -> tuple[str, int] | None:
    """Reads the model and number of a request that is refused, as far as they can be read."""
    if is_protobuf(request):
        with suppress(ConfigError):
            return protobuf.number_of(body)
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        refused = msgspec.json.decode(body, type=_Numbered)
        return refused.model_id, refused.seq_id
    return None


def encode(answer: Answer, *, as_protobuf: bool = False) -> bytes:
    """Encodes a result; as a protocol buffer if that is wanted and there is a message for it."""
    if as_protobuf and isinstance(answer, ForwardBackwardOutput):
        finite = not isinstance(answer, WithNaN)
        return ProtobufResult(protobuf.encode_output(answer, finite=finite))
    content = messages.encode(answer)
    if isinstance(answer, SampleResponse):
        content = SampleResult(content)
        content.as_protobuf = protobuf.encode_sample(answer)
    return content


def acceptable(request: Request, result: bytes, always_protobuf: bool = False) -> tuple[bytes, str]:
    """Encodes a result as the request accepts it, and names its media type.

    Args:
        request: that asks for it.
        result: as :func:`encode` made it.
        always_protobuf: take it that protocol buffers are accepted.
    """
    accepted = always_protobuf or protobuf.MEDIA_TYPE in request.headers.get("accept", "").lower()
    if accepted and isinstance(result, SampleResult):
        return result.as_protobuf, protobuf.MEDIA_TYPE
    if accepted and isinstance(result, ProtobufResult):
        return result, protobuf.MEDIA_TYPE
    if isinstance(result, ProtobufResult):
        return messages.encode(protobuf.decode_output(result)), JSON
    return result, JSON


def _given(request: Request, header: str, default: str) -> str:
    value: Any = request.headers.get(header, default)
    return value.partition(";")[0].strip().lower()


def _column_at_fault(body: bytes) -> str | None:
    """Names the column that cannot be read; a decoder only says that there is one."""
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = msgspec.json.decode(body, type=_Columns)
        given = message.forward_input or message.forward_backward_input or _ColumnsOfData([])
        for i, datum in enumerate(given.data):
            for name, value in datum.loss_fn_inputs.items():
                try:
                    messages.decode(value, TensorData)
                except DataError as error:
                    return str(DataError(str(error), datum=i, field=name))
    return None
