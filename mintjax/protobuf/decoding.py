"""Reading the messages of ``messages.proto``, none of which is trusted."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from mintjax import wire
from mintjax.errors import ConfigError, DataError
from mintjax.tensors import TensorData, first_not_finite
from mintjax.types import Datum, EncodedTextChunk, ForwardBackwardOutput, ModelInput

if TYPE_CHECKING:
    from mintjax.protobuf import messages_pb2 as messages

Body: TypeAlias = bytes | bytearray | memoryview
Request: TypeAlias = wire.ForwardRequest | wire.ForwardBackwardRequest

_DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<i8"), 3: np.dtype("<i4"), 4: np.dtype("<u2")}
_INT32, _BFLOAT16 = 3, 4
_INDEX = _DTYPES[2]
_MOST_DATUMS = 1 << 20
"""A record without fields may claim any number; each costs memory."""


def require() -> None:
    """Make sure that there is what it takes to read.

    Raises:
        ConfigError: the extra is not installed; the message says how to install it.
    """
    _messages()


def decode_request(body: Body) -> Request:
    """Decode a request for a pass, a ``ForwardBackwardRequest``.

    Args:
        body: of the request.

    Returns:
        A ``ForwardRequest`` if it says ``forward_only``. A ``seq_id`` of 0 is none; an empty config
        is none; a column without a shape is flat.

    Raises:
        DataError: it is no such message, or describes no datums; names datum and field.
        ConfigError: the extra ``protobuf`` is not installed.
    """
    message = _parse(_messages().ForwardBackwardRequest, body)
    config = {name: float(value) for name, value in message.loss_fn_config.items()}
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise DataError("only numbers are read here", field=f"loss_fn_config[{name!r}]")
        config[name] = float(value.number)
    _check_numbers(config, "loss_fn_config")
    data = [_datum(datum, i) for i, datum in enumerate(message.data)]
    given = wire.ForwardBackwardInput(data, message.loss_fn, config or None)
    kind = wire.ForwardRequest if message.forward_only else wire.ForwardBackwardRequest
    return kind(given, message.model_id, message.seq_id or None)


def number_of(body: Body) -> tuple[str, int] | None:
    """The model and the ``seq_id`` of a request that cannot be served.

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


def decode_output(body: Body) -> ForwardBackwardOutput:
    """Decode the result of a pass, a ``ForwardBackwardOutput``.

    Args:
        body: of the answer.

    Returns:
        The arrays of one field are views of one buffer, read-only; ``Ragged.from_rows`` takes them
        as they are. int32 is widened to int64, bfloat16 to float32.

    Raises:
        DataError: it is no such message, or describes no arrays, or holds a number that is not
            finite; names datum and field.
        ConfigError: the extra ``protobuf`` is not installed.
    """
    message = _parse(_messages().ForwardBackwardOutput, body)
    outputs: list[dict[str, TensorData]] = []
    for record in message.loss_fn_outputs:
        outputs += _record(record, len(outputs))
    metrics = {name: float(value) for name, value in message.metrics.items()}
    _check_numbers(metrics, "metrics")
    return ForwardBackwardOutput(
        loss_fn_outputs=outputs,
        metrics=metrics,
        loss_fn_output_type=message.loss_fn_output_type.rpartition(":")[2] or "ArrayRecord",
    )


def _messages() -> Any:
    try:
        return importlib.import_module("mintjax.protobuf.messages_pb2")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "google":
            raise
    raise ConfigError('protocol buffers take the package protobuf: pip install "mintjax[protobuf]"')


def _parse(kind: Any, body: Body) -> Any:
    from google.protobuf.message import DecodeError

    message = kind()
    try:
        message.ParseFromString(body if isinstance(body, bytes) else bytes(body))
    except (DecodeError, RecursionError, ValueError) as error:
        raise DataError(f"not a {message.DESCRIPTOR.name}: {error}") from None
    return message


def _datum(message: messages.Datum, position: int) -> Datum:
    chunks: list[EncodedTextChunk] = []
    field: str | None = "model_input"
    try:
        for chunk in message.model_input:
            if chunk.WhichOneof("kind") != "encoded_text":
                raise DataError("a chunk that is no text cannot be read here")
            tokens = _numbers(chunk.encoded_text.tokens, _DTYPES[_INT32])
            chunks.append(EncodedTextChunk(tokens.tolist()))
        columns: dict[str, TensorData] = {}
        for field, tensor in message.loss_fn_inputs.items():
            columns[field] = _tensor(tensor)
        field = None
        return Datum(ModelInput(chunks), columns)
    except DataError as error:
        raise _placed(error, position, field) from None


def _tensor(message: messages.Tensor) -> TensorData:
    dtype = _dtype(message.dtype)
    shape = list(message.shape)
    if any(size < 0 for size in shape):
        raise DataError(f"the shape {shape} has a negative size")
    layout = message.WhichOneof("layout")
    if layout is None:
        raise DataError("a tensor without numbers, dense or sparse")
    if layout == "dense":
        values = _widened(_numbers(message.dense, dtype), message.dtype)
        _check_finite(values)
        return TensorData(values, shape=shape or None)
    csr = message.sparse_csr
    values = _widened(_numbers(csr.values, dtype), message.dtype)
    _check_finite(values)
    rows, columns = _numbers(csr.crow_indices, _INDEX), _numbers(csr.col_indices, _INDEX)
    return TensorData(values, None, shape, rows.tolist(), columns.tolist())


def _record(message: messages.ArrayRecord, first: int) -> list[dict[str, TensorData]]:
    fields = dict(message.fields.items())
    count = message.num_datums
    if not count and fields:  # written before there was such a number
        count = max(0, len(next(iter(fields.values())).offsets) // 8 - 1)
    if not 0 <= count <= _MOST_DATUMS - first:
        raise DataError(f"a record of {count} datums, after {first} others")
    names = list(fields)
    columns = [_rows(fields[name], name, count, first) for name in names]
    if len(names) == 1:
        name = names[0]
        return [{name: row} for row in columns[0]]
    if not names:
        return [{} for _ in range(count)]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _rows(message: messages.BatchedTensor, name: str, count: int, first: int) -> list[TensorData]:
    dtype = _dtype(message.dtype, name)
    trailing = tuple(message.trailing_shape)
    try:
        content = message.data  # a copy, each time it is asked for
        values = _numbers(content, dtype)
        offsets = _numbers(message.offsets, _INDEX)
        per_entry = dtype.itemsize * math.prod(trailing)
        if any(size < 0 for size in trailing) or len(trailing) > 8:
            raise DataError(f"entries of shape {list(trailing)}")
        if (
            offsets.size != count + 1
            or offsets[0] != 0
            or offsets[-1] != len(content)
            or (offsets[1:] < offsets[:-1]).any()
            or (offsets % per_entry if 0 < per_entry < 2**62 else offsets).any()
        ):
            raise DataError(
                f"the offsets do not cut {len(content)} bytes into {count} rows of "
                f"{dtype.name}{list(trailing)}"
            )
        values = _widened(values, message.dtype)
        values = values.reshape(-1 if per_entry and values.size else 0, *trailing)
    except (DataError, ValueError) as error:
        raise DataError(str(error), field=name) from None
    bounds: list[int] = (offsets // max(per_entry, 1)).tolist()
    if (at := first_not_finite(values)) is not None:
        entry = at // (values.size // len(values))
        row = int(np.searchsorted(bounds, entry, side="right")) - 1
        raise DataError(f"{values.ravel()[at]} is not finite", datum=first + row, field=name)
    tensors = values.view(TensorData)
    return [cast(TensorData, tensors[a:b]) for a, b in itertools.pairwise(bounds)]


def _dtype(code: int, field: str | None = None) -> np.dtype[Any]:
    if code not in _DTYPES:
        raise DataError(f"there is no dtype of number {code}", field=field)
    return _DTYPES[code]


def _numbers(content: bytes, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if len(content) % dtype.itemsize:
        raise DataError(f"{len(content)} bytes are no numbers of {dtype.itemsize} bytes each")
    return np.frombuffer(content, dtype)


def _widened(values: npt.NDArray[Any], code: int) -> npt.NDArray[Any]:
    """The numbers as one of the two dtypes that are kept."""
    if code == _BFLOAT16:  # the upper half of a float32
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<i8") if code == _INT32 else values


def _check_finite(values: npt.NDArray[Any]) -> None:
    if (at := first_not_finite(values)) is not None:
        raise DataError(f"{values.ravel()[at]} at position {at} is not finite")


def _check_numbers(numbers: Mapping[str, float], field: str) -> None:
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise DataError(f"{value} is not finite", field=f"{field}[{name!r}]")


def _placed(error: DataError, datum: int, field: str | None) -> DataError:
    placed = DataError(str(error), datum=datum, field=None if error.field else field)
    placed.field = error.field or field
    return placed
