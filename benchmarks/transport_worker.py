"""One implementation of the client's side of the wire, in a process of its own.

    python benchmarks/transport_worker.py IMPLEMENTATION DATUMS LENGTH

``mintjax-json``, ``mintjax-protobuf``, ``sdk`` (whichever ``tinker`` this Python has) or ``copy``.
Reads ``time OPERATION`` or ``memory OPERATION`` by the line, and answers each with one of JSON. The
first: ``seconds``, by the clock; ``cpu``, those of the processor; ``bytes`` of the body; ``sum``,
of the numbers that came out, which must be the same everywhere. The second: ``peak``, the memory in
use at most beyond that before (from /proc, so Linux only). It imports only what its implementation
needs, so that it runs in the environment of any SDK.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Operation = Callable[[], tuple[Any, Sequence[Any]]]
"""Gives a body, or None, and the arrays that came out."""


class Numbers:
    """A batch of equally long datums, and the logprobs that come back."""

    def __init__(self, datums: int, length: int) -> None:
        rng = np.random.default_rng(0)
        size = (datums, length)
        self.tokens = rng.integers(0, 150_000, size)
        self.targets = rng.integers(0, 150_000, size)
        # Small, so that the sigmoid of a margin of sums is not all zeros and ones.
        self.weights = ((rng.random(size) < 0.7) / length).astype(np.float32)
        self.carried = (1e-3 * rng.standard_normal(size)).astype(np.float32)
        self.logprobs = -rng.exponential(size=size).astype(np.float32)


def mintjax_side(numbers: Numbers, encoding: str) -> dict[str, Operation]:
    """The functions by which mintjax's client encodes and decodes a pass."""
    import mintjax
    from mintjax import Datum, ModelInput, objectives
    from mintjax.protocol import messages, protobuf
    from mintjax.step.carrier import carrier
    from mintjax.step.reduction import SUM
    from mintjax.types import ForwardBackwardOutput

    def data(weights: np.ndarray) -> list[Datum]:
        rows = zip(numbers.tokens, numbers.targets, weights, strict=True)
        return [
            Datum(ModelInput.from_ints(x), {"target_tokens": y, "weights": w}) for x, y, w in rows
        ]

    outputs = [{"logprobs": mintjax.TensorData(row)} for row in numbers.logprobs]
    output = ForwardBackwardOutput(loss_fn_outputs=outputs, metrics={"loss:sum": 1.0})
    write, answer = messages.encode, messages.encode(output)
    by_protobuf = encoding == "protobuf"
    if by_protobuf:
        write, answer = protobuf.encode_request, protobuf.encode_output(output)
    given, weighted = data(numbers.carried), data(numbers.weights)
    objective = objectives.bradley_terry()

    def read(body: bytes) -> ForwardBackwardOutput:
        return protobuf.decode_output(body) if by_protobuf else messages.decode(body, type(output))

    def request(batch: list[Datum]) -> bytes:
        message = messages.ForwardBackwardInput(batch, "cross_entropy")
        return write(messages.ForwardBackwardRequest(message, "model", 1))

    def custom_step() -> tuple[bytes, Sequence[Any]]:
        rows = read(answer).logprobs
        result = mintjax.value_and_logprob_grads(objective, weighted, rows)
        carried = carrier(SUM, weighted, rows, result.grads, len(weighted))
        return request(carried), [datum.loss_fn_inputs["weights"] for datum in carried]

    return {
        "encode": lambda: (request(given), ()),
        "decode": lambda: (answer, read(answer).logprobs),
        "custom_step": custom_step,
    }


def sdk_side(numbers: Numbers) -> dict[str, Operation]:
    """The functions by which the official client does so, from its ``training_client.py``."""
    import torch
    from tinker import types

    version = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("tinker"))[:2]))
    write, read, answer = (_sdk_protobuf if version >= (0, 25) else _sdk_json)(numbers.logprobs)

    def data(weights: np.ndarray) -> list[Any]:
        return [
            types.Datum(
                model_input=types.ModelInput.from_ints(x.tolist()),
                loss_fn_inputs={
                    "target_tokens": types.TensorData.from_numpy(y),
                    "weights": types.TensorData.from_numpy(w),
                },
            )
            for x, y, w in zip(numbers.tokens, numbers.targets, weights, strict=True)
        ]

    given, weighted = data(numbers.carried), data(numbers.weights)

    def request(batch: list[Any]) -> bytes:
        message = types.ForwardBackwardInput(
            data=batch, loss_fn="cross_entropy", loss_fn_config=None
        )
        return write(
            types.ForwardBackwardRequest(forward_backward_input=message, model_id="model", seq_id=1)
        )

    def objective(batch: list[Any], logprobs: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(batch, logprobs, strict=True)
        scores = [torch.dot(row, d.loss_fn_inputs["weights"].to_torch()) for d, row in pairs]
        margins = torch.stack(scores[0::2]) - torch.stack(scores[1::2])
        return -torch.nn.functional.logsigmoid(margins).mean()

    def custom_step() -> tuple[bytes, Sequence[Any]]:
        leaves = []
        for out in read(answer).loss_fn_outputs:
            leaf = torch.tensor(out["logprobs"].data)
            if out["logprobs"].shape is not None:
                leaf = leaf.reshape(out["logprobs"].shape)
            leaves.append(leaf.clone().detach().requires_grad_(True))
        objective(weighted, leaves).backward()
        carried = [
            types.Datum(
                model_input=datum.model_input,
                loss_fn_inputs={
                    "target_tokens": datum.loss_fn_inputs["target_tokens"],
                    "weights": -leaf.grad,
                },
            )
            for datum, leaf in zip(weighted, leaves, strict=True)
        ]
        body = request(carried)
        return body, [datum.loss_fn_inputs["weights"].to_numpy() for datum in carried]

    def decode() -> tuple[bytes, Sequence[Any]]:
        return answer, [out["logprobs"].to_numpy() for out in read(answer).loss_fn_outputs]

    return {
        "encode": lambda: (request(given), ()),
        "decode": decode,
        "custom_step": custom_step,
    }


def _sdk_json(logprobs: np.ndarray) -> tuple[Any, Any, bytes]:
    import httpx
    import orjson
    from tinker import types
    from tinker._compat import model_dump
    from tinker.lib._pydantic_conv import deserialize_json_response, to_pydantic_request

    def write(request: Any) -> bytes:
        message = to_pydantic_request(request)
        body = model_dump(message, exclude_unset=False, exclude_none=True, mode="json")
        return httpx.Request("POST", "http://localhost/", json=body).content

    def read(body: bytes) -> Any:
        return deserialize_json_response(orjson.loads(body), types.ForwardBackwardOutput)

    rows = [
        {"logprobs": {"data": row, "dtype": "float32", "shape": [row.size]}} for row in logprobs
    ]
    message = {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": rows,
        "metrics": {"loss:sum": 1.0},
    }
    return write, read, orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)


def _sdk_protobuf(logprobs: np.ndarray) -> tuple[Any, Any, bytes]:
    from tinker import types
    from tinker.proto import tinker_public_pb2 as messages
    from tinker.proto.request_conv import forward_backward_request_to_proto
    from tinker.proto.response_conv import deserialize_proto_response

    def write(request: Any) -> bytes:
        message = forward_backward_request_to_proto(request)
        message.forward_only = False
        return message.SerializeToString()

    def read(body: bytes) -> Any:
        return deserialize_proto_response(body, types.ForwardBackwardOutput)

    rows, length = logprobs.shape
    record = messages.ArrayRecord(type_tag="ArrayRecord", num_datums=rows)
    field = record.fields["logprobs"]
    field.data = logprobs.tobytes()
    field.offsets = (4 * length * np.arange(rows + 1)).tobytes()
    field.dtype = messages.DTYPE_FLOAT32
    message = messages.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record], metrics={"loss:sum": 1.0}
    )
    return write, read, message.SerializeToString()


def copy_side(numbers: Numbers) -> dict[str, Operation]:
    """The floor: NumPy copies the same numbers once, and says nothing of what they are."""
    tokens = numbers.tokens.astype(np.int32)
    rows = list(zip(tokens, numbers.targets, numbers.carried, strict=True))
    answer = numbers.logprobs.tobytes()

    def encode() -> tuple[bytes, Sequence[Any]]:
        return b"".join(column.data for row in rows for column in row), ()

    def decode() -> tuple[bytes, Sequence[Any]]:
        return answer, np.frombuffer(answer, np.float32).copy().reshape(len(rows), -1)

    return {"encode": encode, "decode": decode}


def memory_in_use(kind: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at most) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return 1024 * int(line.split()[1])
    return 0


def peak_of(operation: Operation) -> int:
    """Measures how much more memory is in use, at most, while it runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else it would be served from what others have freed
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_in_use("VmRSS")
    operation()
    return memory_in_use("VmHWM") - before


def main() -> None:
    """Serve until the input ends."""
    implementation, datums, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    numbers = Numbers(datums, length)
    name, _, encoding = implementation.partition("-")
    sides: dict[str, Callable[[], dict[str, Operation]]] = {
        "mintjax": lambda: mintjax_side(numbers, encoding),
        "sdk": lambda: sdk_side(numbers),
        "copy": lambda: copy_side(numbers),
    }
    operations = sides[name]()
    print(json.dumps(list(operations)), flush=True)
    for line in sys.stdin:
        what, which = line.split()
        operation = operations[which]
        reply: dict[str, Any] = {}
        if what == "memory":
            operation()
            reply["peak"] = peak_of(operation)
        else:
            start, busy = time.perf_counter(), time.process_time()
            body, arrays = operation()
            reply["seconds"] = time.perf_counter() - start
            reply["cpu"] = time.process_time() - busy
            reply["bytes"] = len(body)
            reply["sum"] = float(sum(np.abs(np.asarray(x, np.float64)).sum() for x in arrays))
            del body, arrays
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
