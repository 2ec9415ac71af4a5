"""Reads requests with the generated message classes; a request may come from anybody."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt

from mintjax.errors import ConfigError, DataError
from mintjax.protocol import messages
from mintjax.protocol.protobuf.scalars import (
    INT32,
    INT64,
    check_numbers,
    dtype_of,
    numbers,
    widened,
)
from mintjax.tensors import TensorData, first_not_finite
from mintjax.types import Datum, EncodedTextChunk, ModelInput, ModelInputChunk

if TYPE_CHECKING:
    from mintjax.protocol.protobuf import messages_pb2 as pb

Body: TypeAlias = bytes | bytearray | memoryview
Request: TypeAlias = messages.ForwardRequest | messages.ForwardBackwardRequest


def require() -> None:
    """Checks that the package ``protobuf`` is installed.

    Raises:
        ConfigError: it is not; the message says how to install it.
    """
    _messages()


def decode_request(body: Body) -> Request:
    """Decodes a request for a pass, a ``ForwardBackwardRequest``.

    Args:
        body: of the request.

    Returns:
        A ``ForwardRequest`` if the message says ``forward_only``. A ``seq_id`` of 0 and an empty
        config become None. A column without a shape is one-dimensional.

    Raises:
        DataError: the bytes are no such message, or a datum in it is not valid; the error names
            datum and field.
        ConfigError: the extra ``protobuf`` is not installed.
    """
    message = _parse(_messages().ForwardBackwardRequest, body)
    config = {name: float(value) for name, value in message.loss_fn_config.items()}
    texts: dict[str, str] = {}
    for name, value in message.loss_fn_config_v2.items():
        match value.WhichOneof("value"):
            case "number":
                config[name] = float(value.number)
            case "text":
                texts[name] = value.text
            case _:
                raise DataError("it has no value", field=f"loss_fn_config[{name!r}]")
    check_numbers(config, "loss_fn_config")
    data = [_datum(datum, i) for i, datum in enumerate(message.data)]
    given = messages.ForwardBackwardInput(data, message.loss_fn, {**config, **texts} or None)
    kind = messages.ForwardRequest if message.forward_only else messages.ForwardBackwardRequest
    return kind(given, message.model_id, message.seq_id or None)


def number_of(body: Body) -> tuple[str, int] | None:
    """Reads the model and the ``seq_id`` of a request that cannot be served.

    Args:
        body: of the request.

    Returns:
        Both, or None where they cannot be read.
    """
    try:
        message = _parse(_messages().ForwardBackwardRequest, body)
    except DataError:
        return None
    return message.model_id, message.seq_id


def _messages() -> Any:
    try:
        return importlib.import_module("mintjax.protocol.protobuf.messages_pb2")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "google":
            raise
    raise ConfigError('protocol buffers need the package protobuf: pip install "mintjax[protobuf]"')


def _parse(kind: Any, body: Body) -> Any:
    from google.protobuf.message import DecodeError

    message = kind()
    try:
        message.ParseFromString(body if isinstance(body, bytes) else bytes(body))
    except (DecodeError, RecursionError, ValueError) as error:
        raise DataError(f"not a {message.DESCRIPTOR.name}: {error}") from None
    return message


def _datum(message: pb.Datum, position: int) -> Datum:
    chunks: list[ModelInputChunk] = []
    field: str | None = "model_input"
    try:
        for chunk in message.model_input:
            if chunk.WhichOneof("kind") != "encoded_text":
                raise DataError("a chunk is not text; this trainer reads text only")
            tokens = numbers(chunk.encoded_text.tokens, dtype_of(INT32))
            chunks.append(EncodedTextChunk(tokens.tolist()))
        columns: dict[str, TensorData] = {}
        for field, tensor in message.loss_fn_inputs.items():
            columns[field] = _tensor(tensor)
        field = None
        return Datum(ModelInput(chunks), columns)
    except DataError as error:
        raise _placed(error, position, field) from None


def _tensor(message: pb.Tensor) -> TensorData:
    dtype = dtype_of(message.dtype)
    shape = list(message.shape)
    if any(size < 0 for size in shape):
        raise DataError(f"the shape {shape} has a negative size")
    layout = message.WhichOneof("layout")
    if layout is None:
        raise DataError("a tensor holds no numbers, neither dense nor sparse")
    if layout == "dense":
        values = widened(numbers(message.dense, dtype), message.dtype)
        _check_finite(values)
        return TensorData(values, shape=shape or None)
    csr, index = message.sparse_csr, dtype_of(INT64)
    values = widened(numbers(csr.values, dtype), message.dtype)
    _check_finite(values)
    rows, columns = numbers(csr.crow_indices, index), numbers(csr.col_indices, index)
    return TensorData(values, None, shape, rows.tolist(), columns.tolist())


def _check_finite(values: npt.NDArray[Any]) -> None:
    if (at := first_not_finite(values)) is not None:
        raise DataError(f"{values.ravel()[at]} at position {at} is not finite")


def _placed(error: DataError, datum: int, field: str | None) -> DataError:
    placed = DataError(str(error), datum=datum, field=None if error.field else field)
    placed.field = error.field or field
    return placed
