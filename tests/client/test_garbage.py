"""Whatever comes back: a right answer or a typed error, never a crash, a hang or a wrong number."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mintjax.client import ServiceClient
from mintjax.errors import APIError, APIResponseError, DataError, RequestFailedError
from mintjax.protocol import protobuf
from mintjax.protocol.protobuf import messages_pb2 as messages
from mintjax.tensors import TensorData
from mintjax.types import AdamParams, ForwardBackwardOutput, ModelInput, SamplingParams

from ..examples import examples
from .data import DATA
from .double import ADDRESS, QUICK, Answer, Trainer

TRUE = {
    "loss_fn_output_type": "ArrayRecord",
    "loss_fn_outputs": [
        {"logprobs": {"data": [-1.0, -2.0, -3.0], "dtype": "float32", "shape": [3]}},
        {"logprobs": {"data": [-4.0, -5.0], "dtype": "float32", "shape": [2]}},
    ],
    "metrics": {"loss:sum": 15.0},
}
RICH = {
    "loss_fn_output_type": "ArrayRecord",
    "loss_fn_outputs": [
        {
            "logprobs": {"data": [-1e-7, -2, -3.25], "dtype": "float32"},
            "ranks": {"data": [1, 2**62, -3], "dtype": "int64", "shape": [3]},
            "sparse": {
                "data": [0.5, 2],
                "dtype": "float32",
                "shape": [2, 3],
                "sparse_crow_indices": [0, 1, 2],
                "sparse_col_indices": [2, 0],
            },
        },
        {
            "logprobs": {"data": [-0.1, -16777216.0], "dtype": "float32", "shape": [2]},
            "top": {"data": [1, 2, 3, 4], "dtype": "int64", "shape": [2, 2]},
        },
    ],
    "metrics": {"loss:sum": 1.5e3, "tokens:mean": 2},
    "another": {"field": [1, {"a": None}]},
}
MESSAGE = protobuf.encode_output(
    ForwardBackwardOutput(
        loss_fn_outputs=[
            {
                "logprobs": TensorData([-1e-7, -2.0, -3.25]),
                "ranks": TensorData([1, 2**62, -3]),
                "top": TensorData([[1.0, 2.0]]),
            },
            {
                "logprobs": TensorData([-0.1, -16777216.0]),
                "ranks": TensorData([7]),
                "top": TensorData([[3.0, 4.0], [5.0, 6.0]]),
            },
        ],
        metrics={"loss:sum": 1.5e3, "tokens:mean": 2.0},
    )
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 5)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["float32", "int64", "try_again", "logprobs", "complete_metadata"])
)
NAMES = ["type", "error", "status", "category", "data", "dtype", "shape", "metrics", "logprobs"]
NAMES += ["loss_fn_outputs", "request_id", "model_id", "sequences", "detail", "queue_state"]
NAMES += ["sparse_crow_indices", "sparse_col_indices", "response_payload_size"]
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(NAMES),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else [])
    )
    return [at] + [place for key, item in inner for place in places(item, (*at, key))]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A true answer of which a few places, and then a few bytes, are not what they were."""
    answer: Any = json.loads(json.dumps(draw(st.sampled_from([TRUE, RICH]))))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from(places(answer)))
        if not place:
            return json.dumps(draw(JSON)).encode()
        holder = answer
        for key in place[:-1]:
            holder = holder[key]
        act = draw(st.sampled_from(["replace", "replace", "drop", "add", "swap"]))
        if act == "replace":
            holder[place[-1]] = draw(JSON)
        elif act == "drop":
            del holder[place[-1]]
        elif act == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(NAMES))] = draw(JSON)
        elif act == "add":
            holder.insert(place[-1], draw(LEAVES))
        else:
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else [0, -1]))
            holder[place[-1]], holder[other] = holder[other], holder[place[-1]]
    body = json.dumps(answer).encode()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, to = sorted(draw(st.integers(0, len(body))) for _ in range(2))
        with_what = draw(
            st.sampled_from(
                [b"", b"0", b"-", b",", b"e9", b"]", b"}", b"\xff", b'"', body[at:to] * 2]
            )
            | st.binary(max_size=2)
        )
        body = body[:at] + with_what + body[draw(st.sampled_from([at, at + 1, to])) :]
    return body


@pytest.fixture(scope="module")
def trainer():
    return Trainer()


@pytest.fixture(scope="module")
def service(trainer):
    policy = msgspec.structs.replace(QUICK, bad_answers=0, deadline=0.0, poll_timeout=60.0)
    with ServiceClient(ADDRESS, transport=httpx.ASGITransport(trainer), retry_policy=policy) as s:
        yield s


@pytest.fixture(scope="module")
def client(service):
    return service.create_lora_training_client("tiny")


def meaning(body: bytes) -> Any:
    """What a plain JSON reader makes of the answer."""
    return json.loads(body.decode(errors="replace"))


def array_of(tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What a plain reader of the protocol makes of a tensor."""
    values = np.array([Fraction(number) for number in tensor["data"]], object)
    shape = tensor.get("shape")
    if tensor.get("sparse_crow_indices") is not None:
        dense = np.zeros(shape, object)
        starts = tensor["sparse_crow_indices"]
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            dense[row, tensor["sparse_col_indices"][start:end]] = values[start:end]
        values = dense
    elif shape is not None:
        values = values.reshape(shape)
    return values.astype(float).astype("float32") if tensor["dtype"] == "float32" else values


@settings(max_examples=2 * examples(20))
@given(body=damaged() | st.binary(max_size=60), status=st.sampled_from([200] * 9 + [400, 404, 500]))
@example(body=json.dumps(TRUE).encode(), status=200)
@example(body=json.dumps(RICH).encode(), status=200)
@example(body=b'{"loss_fn_outputs": [{"logprobs": {"data": [1e999]}}]}', status=200)
def test_any_result_of_a_pass(client, trainer, body, status):
    trainer.requests.clear()  # else Hypothesis prints them all
    trainer.faults["retrieve_future"] = [Answer(status, body)]
    try:
        output = client.forward(DATA).result(10)
        rows = output.logprobs
    except (APIError, DataError):  # the latter: there are none
        assert (body, status) not in [(json.dumps(true).encode(), 200) for true in (TRUE, RICH)]
        return
    finally:
        trainer.faults.clear()
    answer = meaning(body) if status == 200 else {}
    if answer.get("type") == "try_again" or answer.get("status") == "complete_metadata":
        return  # asked again, and answered well
    if status != 200:
        raise AssertionError(f"a result out of status {status}")
    for row, datum in zip(rows, DATA, strict=True):
        assert row.shape == datum.loss_fn_inputs["target_tokens"].shape
        assert row.dtype == np.float32
    for one, theirs in zip(output.loss_fn_outputs, answer["loss_fn_outputs"], strict=True):
        assert one.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert one[name].dtype == tensor["dtype"]
            assert np.isfinite(one[name]).all()
            np.testing.assert_array_equal(one[name], array_of(tensor))
    assert output.metrics == answer.get("metrics", {})


@st.composite
def damaged_message(draw: st.DrawFn) -> bytes:
    """A true answer in protocol buffers, of which some fields, or bytes, are not what they were."""
    message = messages.ForwardBackwardOutput.FromString(MESSAGE)
    for _ in range(draw(st.integers(0, 2))):
        record = message.loss_fn_outputs[0]
        field = record.fields[draw(st.sampled_from(["logprobs", "ranks", "top", "new"]))]
        where = draw(st.sampled_from(["data", "offsets", "dtype", "shape", "count", "another"]))
        if where == "data":
            field.data = field.data[draw(st.integers(0, 8)) :] + draw(st.binary(max_size=8))
        elif where == "offsets":
            offsets = np.frombuffer(field.offsets, "<i8").tolist() or [0]
            offsets[draw(st.integers(0, len(offsets) - 1))] = draw(
                st.integers(-9, 30) | st.sampled_from([2**31, 2**62, -(2**63)])
            )
            field.offsets = np.array(offsets, "<i8").tobytes()
        elif where == "dtype":
            field.dtype = draw(st.integers(0, 5))
        elif where == "shape":
            field.trailing_shape[:] = draw(st.lists(st.integers(-1, 3), max_size=3))
        elif where == "count":
            record.num_datums = draw(st.integers(-1, 4) | st.just(2**62))
        else:
            message.loss_fn_outputs.append(record)
    body = message.SerializeToString()
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at, to = sorted(draw(st.integers(0, len(body))) for _ in range(2))
        body = body[:at] + draw(st.binary(max_size=2)) + body[draw(st.sampled_from([at + 1, to])) :]
    return body


def rows_of(field: Any) -> list[np.ndarray[Any, Any]]:
    """What a plain reader of the protocol makes of a field."""
    code = {1: "<f4", 2: "<i8", 3: "<i4", 4: "<u2"}[field.dtype]
    starts = np.frombuffer(field.offsets, "<i8").tolist()
    rows = [np.frombuffer(field.data[a:b], code) for a, b in itertools.pairwise(starts)]
    if field.dtype == 4:
        rows = [(row.astype("<u4") << 16).view("<f4") for row in rows]
    return [row.reshape(-1, *field.trailing_shape) for row in rows]


@settings(max_examples=2 * examples(50))
@given(body=damaged_message() | st.binary(max_size=60))
@example(body=MESSAGE)
def test_any_result_of_a_pass_in_protocol_buffers(client, trainer, body):
    trainer.requests.clear()
    answer = Answer(200, body, {"Content-Type": protobuf.MEDIA_TYPE})
    trainer.faults["retrieve_future"] = [answer]
    try:
        output = client.forward(DATA).result(10)
        rows = output.logprobs
    except (APIError, DataError):
        assert body != MESSAGE
        return
    finally:
        trainer.faults.clear()
    for row, datum in zip(rows, DATA, strict=True):
        assert row.shape == datum.loss_fn_inputs["target_tokens"].shape
        assert row.dtype == np.float32
    message = messages.ForwardBackwardOutput.FromString(body)
    records = message.loss_fn_outputs
    for name in {name for record in records for name in record.fields}:
        theirs = [
            row
            for record in records
            for row in (rows_of(record.fields[name]) if name in record.fields else [])
        ]
        ours = [one[name] for one in output.loss_fn_outputs if name in one]
        for one, other in zip(ours, theirs, strict=True):
            assert np.isfinite(one).all()
            np.testing.assert_array_equal(one, other)
    assert output.metrics == dict(message.metrics)


def test_a_long_error_is_an_error(client, trainer):
    words = "no " * 500_000
    trainer.faults["retrieve_future"] = [Answer(200, {"error": words, "category": "user"})]
    with pytest.raises(RequestFailedError, match="no no"):
        client.optim_step(AdamParams()).result(10)


@given(body=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_any_result_of_a_small_request(client, service, trainer, body):
    sampler = service.create_sampling_client(base_model="tiny")
    params = SamplingParams(max_tokens=1)
    for submit in (
        lambda: client.save_state("s"),
        lambda: sampler.sample(ModelInput.from_ints([1]), 1, params),
        lambda: sampler.compute_logprobs(ModelInput.from_ints([1])),
    ):
        trainer.faults["retrieve_future"] = [Answer(200, body)]
        error = submit().exception(10)
        trainer.faults.clear()
        assert error is None or isinstance(error, APIError)


@given(body=JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=60))
def test_any_answer_to_a_submission(service, trainer, body):
    client = service.create_lora_training_client("tiny")
    for path in ("optim_step", "create_session", "client/config"):
        trainer.faults[path] = [Answer(200, body)] * 2
    error = client.optim_step(AdamParams()).exception(10)
    trainer.faults.clear()
    assert error is None or isinstance(error, APIError)


@pytest.mark.parametrize("body", [b'{"a":' * 100_000, b"[" * 100_000, b'"' + b"a" * 10**6])
@pytest.mark.parametrize("status", [200, 400])
def test_nesting_without_end(client, trainer, body, status):
    trainer.faults["retrieve_future"] = [Answer(status, body)]
    error = client.forward(DATA).exception(10)
    trainer.faults.clear()
    assert isinstance(error, APIError)


def test_a_custom_step_needs_logprobs(client, trainer):
    without = {
        **TRUE,
        "loss_fn_outputs": [{"logprobs": TRUE["loss_fn_outputs"][0]["logprobs"]}, {}],
    }
    trainer.faults["retrieve_future"] = [Answer(200, without)]
    step = client.forward_backward_custom(DATA, lambda data, logprobs: (logprobs.sum().sum(), {}))
    with pytest.raises(APIResponseError, match=r"datum 1.*logprobs"):
        step.result(10)
