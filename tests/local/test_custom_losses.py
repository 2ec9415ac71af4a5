"""Uploaded losses over HTTP: who may use them, what they read, and what accumulates."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import objectives, value_and_logprob_grads
from mintjax.local import Engine, Limits, running_server
from mintjax.protocol import messages, protobuf
from mintjax.ragged.batch import Batch
from mintjax.step.carrier import FORWARD_LOSS_FN, carrier, forward_data
from mintjax.step.one_datum import data_for, server_loss
from mintjax.step.reduction import SUM, Reduction
from mintjax.types import Datum

from ..data import flat
from .data import batch, with_columns
from .http import serving


@pytest.fixture(scope="module")
def engine():
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def http(engine):
    with serving(engine, limits=Limits(max_losses=3)) as http:
        yield http


def open_session(http):
    request = messages.CreateSessionRequest(sdk_version="0")
    return http.post("create_session", request).json()["session_id"]


def make_model(http, session_id):
    made = messages.CreateModelRequest(session_id, 0, "mintjax/nano", None)
    return http.call("create_model", made)["model_id"]


@pytest.fixture
def session_id(http):
    return open_session(http)


@pytest.fixture
def model_id(http, session_id):
    return make_model(http, session_id)


DATA = batch([3, 5])
PPO = objectives.ppo(clip_high_threshold=1.02)
LOSS = server_loss(PPO, Batch(DATA))


def upload(session_id, number=0, loss=LOSS):
    return messages.CreateCustomLossRequest(session_id, number, loss.name, loss.inputs, loss.graph)


def a_pass(model_id, loss_id, data=None, **named):
    data = data_for(LOSS, Batch(DATA)) if data is None else data
    config = {"loss_id": loss_id, **named}
    given = messages.ForwardBackwardInput(data, "custom", config)
    return messages.ForwardBackwardRequest(given, model_id)


def test_a_pass_adds_the_gradient_of_the_objective(engine, http, session_id, model_id):
    loss_id = http.call("create_custom_loss", upload(session_id))["loss_id"]
    output = http.call("forward_backward", a_pass(model_id, loss_id))
    found = flat(engine.gradient(model_id))
    other = make_model(http, session_id)
    forward = engine.forward(other, forward_data(DATA), FORWARD_LOSS_FN)
    expected = value_and_logprob_grads(PPO, DATA, forward.logprobs)
    engine.forward_backward(
        other, carrier(SUM, DATA, None, expected.grads, len(DATA)), FORWARD_LOSS_FN
    )
    wanted = flat(engine.gradient(other))
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)
    assert output["metrics"]["loss:sum"] == pytest.approx(expected.loss, rel=1e-5)
    assert output["metrics"]["custom/loss:sum"] == pytest.approx(expected.loss, rel=1e-5)
    for row, one in zip(forward.logprobs, output["loss_fn_outputs"], strict=True):
        assert one["logprobs"]["data"] == pytest.approx(row.tolist(), rel=1e-6)


def test_a_protocol_buffer_names_a_loss_too(engine, http, session_id, model_id):
    loss_id = http.call("create_custom_loss", upload(session_id))["loss_id"]
    body = protobuf.encode_request(a_pass(model_id, loss_id))
    header = {"Content-Type": protobuf.MEDIA_TYPE}
    accepted = http.send("POST", "forward_backward", content=body, headers=header)
    assert "custom/loss:sum" in http.result(accepted)["metrics"]
    assert flat(engine.gradient(model_id)).any()


def test_a_number_has_one_loss(http, session_id):
    first = http.call("create_custom_loss", upload(session_id))
    assert http.call("create_custom_loss", upload(session_id)) == first
    other = server_loss(objectives.ppo(), Batch(DATA))
    answer = http.post("create_custom_loss", upload(session_id, loss=other))
    assert answer.status_code == 400
    assert "custom_loss_seq_id" in answer.json()["detail"]


def test_a_session_has_so_many_losses(http, session_id):
    for number in range(3):
        http.call("create_custom_loss", upload(session_id, number))
    answer = http.post("create_custom_loss", upload(session_id, 3))
    assert answer.status_code == 400
    assert "max_losses" in answer.json()["detail"]


def refusal(http, path, request):
    answer = http.post(path, request)
    assert answer.status_code in (400, 404, 410, 422), answer.text
    return answer.json()["detail"]


def test_a_loss_is_of_its_session_while_that_lasts(http, session_id, model_id):
    loss_id = http.call("create_custom_loss", upload(session_id))["loss_id"]
    stranger = make_model(http, open_session(http))
    assert "no loss" in refusal(http, "forward_backward", a_pass(stranger, loss_id))
    assert "no loss" in refusal(http, "forward_backward", a_pass(model_id, "loss-0"))
    assert http.post(f"sessions/{session_id}/finish", {}).status_code == 200
    assert "has ended" in refusal(http, "create_custom_loss", upload(session_id))


def without(name):
    return [with_columns(one, **{name: None}) for one in data_for(LOSS, Batch(DATA))]


def with_all(**columns):
    return [with_columns(one, **columns) for one in data_for(LOSS, Batch(DATA))]


SPOILT = {
    "no data": ([], "no datum"),
    "no targets": (without("target_tokens"), "target_tokens"),
    "no column": (without("advantages"), "loss 'ppo' reads it"),
    "a number for a row": (with_all(advantages=np.float32(1)), "rank 1"),
    "candidates": (batch([3], candidates=2), "rank 1"),
    "a large integer": (
        [
            with_columns(
                data_for(LOSS, Batch(DATA))[0], sampling_logprobs=-np.array([1, 2, 2**24 + 1])
            )
        ],
        "beyond 16777216",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_data_that_a_loss_cannot_read_are_refused(http, session_id, model_id, name):
    data, reason = SPOILT[name]
    loss_id = http.call("create_custom_loss", upload(session_id))["loss_id"]
    assert reason in refusal(http, "forward_backward", a_pass(model_id, loss_id, data))


def test_a_loss_takes_its_id_alone(http, session_id, model_id):
    loss_id = http.call("create_custom_loss", upload(session_id))["loss_id"]
    assert "nothing else" in refusal(http, "forward_backward", a_pass(model_id, loss_id, beta=0.1))
    assert "nothing else" in refusal(http, "forward_backward", a_pass(model_id, 3.0))


def test_a_graph_that_is_none_is_answered_400(http, session_id):
    spoilt = upload(session_id)
    nodes = [messages.CustomLossNode("call_function", "a", "os.system", ["ls"]), *LOSS.graph.nodes]
    spoilt.graph = messages.CustomLossGraph(nodes)
    answer = http.post("create_custom_loss", spoilt)
    assert answer.status_code == 400
    assert "'os.system' is not served" in answer.json()["detail"]


def test_what_is_not_finite_adds_nothing(engine, http, session_id, model_id):
    loss_id = http.call("create_custom_loss", upload(session_id))["loss_id"]
    data = with_all()
    data[1] = with_columns(data[1], sampling_logprobs=np.full(5, -500, np.float32))
    answer = http.call("forward_backward", a_pass(model_id, loss_id, data))
    assert "datum 1" in answer["error"]
    assert not flat(engine.gradient(model_id)).any()


def test_a_metric_that_is_not_finite_is_left_out(http, session_id, model_id):
    def loss(data, logprobs):
        return logprobs.total(), {"none": logprobs.map(jnp.log).total()}

    made = server_loss(loss, Batch(DATA))
    loss_id = http.call("create_custom_loss", upload(session_id, loss=made))["loss_id"]
    data = data_for(made, Batch(DATA))
    metrics = http.call("forward_backward", a_pass(model_id, loss_id, data))["metrics"]
    assert set(metrics) == {"loss:sum", "custom/loss:sum"}


def test_a_trainer_that_averages_has_none():
    averages = Reduction("weights", per_step="datums")
    with Engine(reduction=averages) as engine, serving(engine) as http:
        assert not http.post("client/config", {}).json()["custom_loss_server_side"]
        session_id = open_session(http)
        assert "divides" in refusal(http, "create_custom_loss", upload(session_id))


def test_a_trainer_that_sums_offers_them(http):
    assert http.post("client/config", {}).json()["custom_loss_server_side"]
    assert isinstance(DATA[0], Datum)


def of_sdk(torch, logprobs, weights, scale, old):
    """A loss as a user of the official SDK writes it."""
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 0.95, 1.05)
    value = -(torch.minimum(ratio * scale, clipped * scale) * weights).sum()
    return value, {"custom/ratio:mean": ratio.mean(), "custom/weight:sum": weights.sum()}


def test_a_loss_of_the_official_sdk_accumulates_what_its_own_two_passes_do():
    """Only versions from 0.38 on upload losses."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tinker = pytest.importorskip("tinker")
        pytest.importorskip("tinker.lib.public_interfaces.custom_loss")
        sdk = tinker.types

        def loss(logprobs, weights, scale, old):
            return of_sdk(torch, logprobs, weights, scale, old)

        def here(data, rows):
            columns = [
                [datum.loss_fn_inputs[name].to_torch() for name in ("weights", "scale", "old")]
                for datum in data
            ]
            values = [loss(row, *own)[0] for row, own in zip(rows, columns, strict=True)]
            return sum(values), {}

        def tensor(value, dtype="float32"):
            return sdk.TensorData(data=np.array(value), dtype=dtype, shape=list(np.shape(value)))

        data = [
            sdk.Datum(
                model_input=sdk.ModelInput.from_ints(one.model_input.to_ints()),
                loss_fn_inputs={
                    "target_tokens": tensor(one.loss_fn_inputs["target_tokens"], "int64"),
                    "weights": tensor(one.loss_fn_inputs["weights"]),
                    "scale": tensor(np.float32(i - 0.5)),
                    "old": tensor(one.loss_fn_inputs["logprobs"].astype(np.float32)),
                },
            )
            for i, one in enumerate(DATA)
        ]
        ranks = {"logprobs": 1, "weights": 1, "scale": 0, "old": 1}
        with Engine() as engine, running_server(engine=engine) as url:
            service = tinker.ServiceClient(base_url=url, api_key="tml-any")
            handle = service.create_custom_loss(loss, ranks).result(timeout=60)
            model = service.create_lora_training_client("mintjax/nano", rank=4, seed=1).result()
            found: list = []
            for each in (handle, here):
                output = model.forward_backward_custom(data, each).result(timeout=60)
                (model_id,) = engine.models
                found.append((flat(engine.gradient(model_id)), output.metrics))
                model.optim_step(sdk.AdamParams(learning_rate=0.0)).result(timeout=60)
    (there, metrics), (own, expected) = found
    assert handle.loss_id is not None
    assert np.linalg.norm(there - own) <= 1e-5 * np.linalg.norm(own)
    assert metrics["loss:sum"] == pytest.approx(expected["loss:sum"], rel=1e-5)
    assert metrics["custom/weight:sum"] == sum(d.loss_fn_inputs["weights"].sum() for d in DATA)
