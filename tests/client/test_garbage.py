"""Whatever comes back: a right answer or a typed error, never a crash, a hang or a wrong number."""

from __future__ import annotations

import json
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mintjax.client import ServiceClient
from mintjax.errors import APIError, APIResponseError, DataError
from mintjax.types import AdamParams, ModelInput, SamplingParams

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
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["float32", "int64", "try", "logprobs", "complete_metadata"])
)
NAMES = ["type", "error", "status", "category", "data", "dtype", "shape", "metrics", "logprobs"]
NAMES += ["loss_fn_outputs", "request_id", "model_id", "sequences", "detail"]
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
    """A true answer in which one place, or a few bytes, are not what they were."""
    answer: Any = json.loads(json.dumps(TRUE))
    place = draw(st.sampled_from(places(TRUE)))
    if not place:
        return json.dumps(draw(JSON)).encode()
    holder = answer
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = draw(JSON)
    body = bytearray(json.dumps(answer).encode())
    for at in draw(st.lists(st.integers(0, len(body) - 1), max_size=2)):
        body[at] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body)


@pytest.fixture(scope="module")
def trainer():
    return Trainer()


@pytest.fixture(scope="module")
def service(trainer):
    policy = msgspec.structs.replace(QUICK, bad_answers=0, deadline=0.0)
    with ServiceClient(ADDRESS, transport=httpx.ASGITransport(trainer), retry_policy=policy) as s:
        yield s


@pytest.fixture(scope="module")
def client(service):
    return service.create_lora_training_client("tiny")


def meaning(body: bytes) -> Any:
    """What a plain JSON reader makes of the answer."""
    return json.loads(body.decode(errors="replace"))


@given(body=damaged() | st.binary(max_size=60), status=st.sampled_from([200] * 6 + [400, 404, 500]))
@example(body=json.dumps(TRUE).encode(), status=200)
@example(body=b'{"loss_fn_outputs": [{"logprobs": {"data": [1e999]}}]}', status=200)
def test_any_result_of_a_pass(client, trainer, body, status):
    trainer.faults["retrieve_future"] = [Answer(status, body)]
    try:
        output = client.forward(DATA).result(10)
        rows = output.logprobs
    except (APIError, DataError):  # the latter: there are none
        return
    finally:
        trainer.faults.clear()
    if status != 200 or meaning(body).get("type") == "try_again":
        return  # asked again, and answered well
    for one, row, datum in zip(meaning(body)["loss_fn_outputs"], rows, DATA, strict=True):
        assert row.shape == datum.loss_fn_inputs["target_tokens"].shape
        assert np.isfinite(row).all()
        np.testing.assert_array_equal(row.ravel(), np.float32(one["logprobs"]["data"]))


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
