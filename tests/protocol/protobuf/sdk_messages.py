"""Messages of a pass by ``tinker==0.38.0``'s own classes, held against those of mintjax.

    python tests/protobuf/sdk_messages.py write > tests/protobuf/golden.json
    python tests/protobuf/sdk_messages.py read < bodies.json

Run with a Python that has ``tinker==0.38.0``; ``benchmarks/real_client.py`` says how to make one,
and runs both. ``write`` prints a request and an output, in hex, with the values that are in them;
``read`` takes a list of the two, in hex, and prints their values. Values are plain JSON, floats in
their shortest text.
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import numpy as np

SOURCE = random.Random(0)
FLOATS = [0.0, -0.0, 0.1, -1.5, 3.4028235e38, 1e-45, -7.25]
INTEGERS = [0, 1, -1, 2**31, -(2**63), 2**63 - 1]


def numbers(kind: str, size: int) -> list[Any]:
    """Numbers of a dtype, the awkward ones among them."""
    if kind == "int64":
        return [SOURCE.choice(INTEGERS) for _ in range(size)]
    return [float(np.float32(SOURCE.choice(FLOATS))) for _ in range(size)]


def plain(values: Any, shape: Any) -> dict[str, Any]:
    """A tensor's values, told apart to the bit."""
    flat = np.asarray(values).ravel()
    text = [repr(one) for one in flat.tolist()]
    return {"dtype": flat.dtype.name, "shape": [int(n) for n in shape], "values": text}


def count(value: Any) -> int:
    """How many leaves there are."""
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list) else 1


# With mintjax


def request_of_mintjax() -> Any:
    """A random request."""
    from mintjax.protocol import messages
    from mintjax.types import Datum, EncodedTextChunk, ModelInput

    def datum() -> Datum:
        length = SOURCE.randrange(1, 200)
        tokens = [SOURCE.randrange(2**31) for _ in range(length)]
        chunks = [EncodedTextChunk(tokens[:3]), EncodedTextChunk(tokens[3:])]
        columns = {
            "target_tokens": np.array(numbers("int64", length), np.int64),
            "weights": np.array(numbers("float32", length), np.float32),
            "candidates": np.array(numbers("float32", 2 * length), np.float32).reshape(-1, 2),
        }
        return Datum(ModelInput(chunks), columns)

    config = {"clip_low_threshold": 0.8, "beta": 1e-3}
    given = messages.ForwardBackwardInput([datum() for _ in range(32)], "ppo", config)
    return messages.ForwardRequest(given, "model-\u00e9", 17)


def output_of_mintjax() -> Any:
    """A random output, whose datums do not all have the same trailing shape."""
    from mintjax.tensors import TensorData
    from mintjax.types import ForwardBackwardOutput

    def row(trailing: int) -> dict[str, Any]:
        length = SOURCE.randrange(200)
        logprobs = np.array(numbers("float32", length), np.float32)
        ranks = np.array(numbers("int64", length * trailing), np.int64).reshape(length, trailing)
        return {"logprobs": TensorData(logprobs), "ranks": TensorData(ranks)}

    return ForwardBackwardOutput(
        loss_fn_outputs=[row(1 + i // 8) for i in range(32)],
        metrics={"loss:sum": -0.1, "tokens:max": 1e300},
    )


def plain_request(request: Any) -> dict[str, Any]:
    """The values of a request of mintjax."""
    forward_only = hasattr(request, "forward_input")
    given = request.forward_input if forward_only else request.forward_backward_input
    return {
        "model_id": request.model_id,
        "seq_id": request.seq_id,
        "loss_fn": given.loss_fn,
        "config": dict(sorted((given.loss_fn_config or {}).items())),
        "forward_only": forward_only,
        "data": [
            {
                "tokens": [chunk.tokens for chunk in datum.model_input.chunks],
                "columns": {
                    name: plain(column.to_numpy(), column.shape)
                    for name, column in sorted(datum.loss_fn_inputs.items())
                },
            }
            for datum in given.data
        ],
    }


def plain_output(output: Any) -> dict[str, Any]:
    """The values of an output, of either library."""
    return {
        "type": output.loss_fn_output_type,
        "metrics": dict(sorted(output.metrics.items())),
        "outputs": [
            {name: plain(array.to_numpy(), array.shape) for name, array in sorted(row.items())}
            for row in output.loss_fn_outputs
        ],
    }


# With tinker 0.38


def write() -> dict[str, Any]:
    """A request and an output of the SDK's, and what is in them."""
    from tinker import types  # pyright: ignore[reportMissingImports]
    from tinker.proto import response_conv  # pyright: ignore[reportMissingImports]
    from tinker.proto import tinker_public_pb2 as public_pb  # pyright: ignore[reportMissingImports]
    from tinker.proto.request_conv import (  # pyright: ignore[reportMissingImports]
        forward_backward_request_to_proto,
    )

    def tensor(kind: str, shape: list[int]) -> Any:
        return types.TensorData(data=numbers(kind, math.prod(shape)), dtype=kind, shape=shape)

    def datum(length: int) -> Any:
        tokens = [SOURCE.randrange(2**31) for _ in range(length)]
        columns = {
            "target_tokens": tensor("int64", [length]),
            "weights": tensor("float32", [length]),
            "candidates": types.TensorData(
                data=[0.5, -1.5],
                dtype="float32",
                shape=[length, 3],
                sparse_crow_indices=[0, 1, *[2] * (length - 1)],
                sparse_col_indices=[2, 0],
            ),
        }
        chunks = [types.EncodedTextChunk(tokens=tokens[:1])]
        chunks += [types.EncodedTextChunk(tokens=tokens[1:])]
        return types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs=columns)

    message = forward_backward_request_to_proto(
        types.ForwardBackwardRequest(
            forward_backward_input=types.ForwardBackwardInput(
                data=[datum(2), datum(5)], loss_fn="dro", loss_fn_config={"beta": 0.05}
            ),
            model_id="model",
            seq_id=3,
        )
    )
    message.forward_only = True
    output = public_pb.ForwardBackwardOutput(
        loss_fn_output_type="module:ArrayRecord", metrics={"loss:sum": -2.5}
    )
    dtypes = {"logprobs": (1, "<f4"), "ranks": (2, "<i8"), "small": (3, "<i4"), "half": (4, "<u2")}
    for trailing in ([], [2]):
        record = output.loss_fn_outputs.add(num_datums=3, type_tag="ArrayRecord")
        for name, (code, dtype) in dtypes.items():
            lengths = [4, 0, 3]
            kind = "float32" if code == 1 else "int64"
            values = np.array(numbers(kind, sum(lengths) * math.prod(trailing)))
            if code > 2:
                values %= 2**14
            row_bytes = np.dtype(dtype).itemsize * math.prod(trailing)
            field = record.fields[name]
            field.data, field.dtype = values.astype(dtype).tobytes(), code
            field.offsets = (np.cumsum([0, *lengths]) * row_bytes).astype("<i8").tobytes()
            field.trailing_shape.extend(trailing)
    request, answer = message.SerializeToString(), output.SerializeToString()
    return {
        "request": request.hex(),
        "request_values": read_request(request),
        "output": answer.hex(),
        "output_values": plain_output(response_conv.deserialize_forward_backward_output(answer)),
    }


def read_request(body: bytes) -> dict[str, Any]:
    """The values of a request, by the SDK's classes."""
    from tinker.proto import response_conv  # pyright: ignore[reportMissingImports]
    from tinker.proto import tinker_public_pb2 as public_pb  # pyright: ignore[reportMissingImports]

    message = public_pb.ForwardBackwardRequest.FromString(body)
    config = {name: value.number for name, value in message.loss_fn_config_v2.items()}
    assert config == dict(message.loss_fn_config)

    def column(tensor: Any) -> dict[str, Any]:
        data = response_conv._tensor_data_from_proto(tensor)
        values = data.to_torch().to_dense().numpy() if tensor.HasField("sparse_csr") else None
        return plain(data.to_numpy() if values is None else values, tensor.shape)

    return {
        "model_id": message.model_id,
        "seq_id": message.seq_id,
        "loss_fn": message.loss_fn,
        "config": dict(sorted(config.items())),
        "forward_only": message.forward_only,
        "data": [
            {
                "tokens": [
                    np.frombuffer(chunk.encoded_text.tokens, "<i4").tolist()
                    for chunk in datum.model_input
                ],
                "columns": {
                    name: column(tensor) for name, tensor in sorted(datum.loss_fn_inputs.items())
                },
            }
            for datum in message.data
        ],
    }


def read(bodies: list[str]) -> list[Any]:
    """The values of a request and an output of anybody's, by the SDK's classes."""
    from tinker.proto import response_conv  # pyright: ignore[reportMissingImports]

    request, output = map(bytes.fromhex, bodies)
    return [
        read_request(request),
        plain_output(response_conv.deserialize_forward_backward_output(output)),
    ]


if __name__ == "__main__":
    print(json.dumps(write() if sys.argv[1] == "write" else read(json.load(sys.stdin))))
