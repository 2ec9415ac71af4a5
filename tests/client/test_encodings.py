"""Protocol buffers between the client and a trainer that asks for them, or insists."""

from __future__ import annotations

import httpx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

pytest.importorskip("safetensors")

from mintjax.client import ServiceClient
from mintjax.client.encodings import Encoding
from mintjax.client.transport import Request
from mintjax.errors import (
    APIResponseError,
    APIStatusError,
    BadRequestError,
    ConfigError,
    DataError,
)
from mintjax.local import Dialect, Engine
from mintjax.local.app import application
from mintjax.objectives import bradley_terry
from mintjax.protocol import messages, protobuf, zstd
from mintjax.tensors import TensorData
from mintjax.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput

from .data import DATA
from .double import ADDRESS, KEY, QUICK, Answer, Trainer
from .faults import BadConnection
from .test_against_trainer import PATIENT, new_model, same, state, train

MODEL = "mintjax/nano"
PROTOBUF = protobuf.MEDIA_TYPE
INSISTS = Dialect(json_passes=False)
PLAIN = messages.ClientConfigResponse()
ASKS = messages.ClientConfigResponse(proto_write_fwdbwd=True, fwdbwd_max_chunk_len=3)
ASKS_COMPRESSED = messages.ClientConfigResponse(proto_write_fwdbwd=True, proto_compress_fwdbwd=True)
TRAINERS = {
    "json": {"config": PLAIN},
    "asks": {"config": ASKS},
    "compressed": {"config": ASKS_COMPRESSED},
    "insists": {"dialect": INSISTS},
    "insists in parts": {
        "dialect": INSISTS,
        "config": messages.ClientConfigResponse(fwdbwd_max_chunk_len=3),
    },
}


@pytest.fixture(scope="module")
def engine():
    with Engine() as engine:
        yield engine


def batch():
    rng = np.random.default_rng(0)

    def one(length):
        tokens = rng.integers(0, 256, length + 1)
        weights = (np.arange(length) >= length // 3).astype(np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        return Datum(ModelInput.from_ints(tokens[:-1]), inputs)

    return [one(length) for length in (5, 9, 7, 6)]


def trained(engine, progress=None, **options):
    """Weights after a step of a loss by name and one with an objective, and what they returned."""
    with application(engine, **options) as app:
        transport = httpx.ASGITransport(app)
        with ServiceClient(ADDRESS, KEY, transport=transport, on_progress=progress) as service:
            client = service.create_lora_training_client(MODEL, rank=4, seed=1)
            outputs = []
            for submit in (
                lambda: client.forward_backward(batch(), "cross_entropy"),
                lambda: client.forward_backward_custom(batch(), bradley_terry()),
            ):
                outputs.append(submit().result(60))
                client.optim_step(AdamParams(learning_rate=1e-2)).result(60)
            outputs.append(client.forward(batch()).result(60))
            weights = jax.tree.leaves(engine.model(client.model_id).lora)
            return [np.asarray(leaf).tobytes() for leaf in weights], outputs


@pytest.fixture(scope="module")
def in_json(engine):
    return trained(engine, **TRAINERS["json"])


@pytest.mark.parametrize("name", ["asks", "compressed", "insists", "insists in parts"])
def test_either_encoding_trains_to_the_same_bit(engine, in_json, name):
    if "parts" in name or name == "asks":  # sums of parts are rounded in another order
        in_json = trained(engine, config=messages.ClientConfigResponse(fwdbwd_max_chunk_len=3))
    seen = []
    weights, outputs = trained(engine, seen.append, **TRAINERS[name])
    assert weights == in_json[0]
    for mine, theirs in zip(outputs, in_json[1], strict=True):
        assert mine.metrics == theirs.metrics
        for one, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            np.testing.assert_array_equal(one, other)
    sent = [one.detail for one in seen if one.event == "accepted" and "forward" in one.path]
    assert sent
    assert all(f"bytes of {PROTOBUF}" in detail for detail in sent)
    assert all(("zstd" in detail) == (name == "compressed") for detail in sent)


def test_a_bad_connection_changes_not_one_bit(engine):
    states, met = [], 0
    for seed, share in enumerate([0.0, 0.1, 0.2, 0.3]):
        config = ASKS_COMPRESSED if share else PLAIN
        with application(engine, config=config, poll_seconds=1.0) as app:
            bad = BadConnection(httpx.ASGITransport(app), seed, share)
            with ServiceClient(ADDRESS, transport=bad, retry_policy=PATIENT) as service:
                client = new_model(service)
                train(client)
                states.append(state(engine, client))
                met += len(bad.met)
    assert met > 10
    assert all(same(one, states[0]) for one in states)


def test_a_forward_pass_may_come_first_where_there_is_no_endpoint_for_it(engine, caplog):
    caplog.set_level("INFO", "mintjax.client")
    logprobs = []
    for options in (TRAINERS["json"], TRAINERS["insists"]):
        with application(engine, **options) as app:
            transport = httpx.ASGITransport(app)
            with ServiceClient(ADDRESS, KEY, transport=transport) as service:
                client = service.create_lora_training_client(MODEL, rank=4, seed=1)
                logprobs.append(client.forward(batch()).result(60).logprobs)
                client.forward(batch()).result(60)
    for one, other in zip(*logprobs, strict=True):
        np.testing.assert_array_equal(one, other)
    told = [record for record in caplog.records if "protocol buffers" in record.getMessage()]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("path", "status", "words", "may_be"),
    [
        ("forward", 404, "Not Found", True),
        ("forward", 404, "model_id: there is no model 'm'", False),
        ("forward_backward", 404, "Not Found", False),
        ("forward_backward", 415, "content-type", True),
        ("forward_backward", 400, "bad", True),
        ("forward", 422, "bad", True),
        ("optim_step", 415, "content-type", False),
        ("forward", 500, "Not Found", False),
    ],
)
def test_only_some_refusals_may_be_of_json(path, status, words, may_be):
    encoding, refusal = Encoding(), APIStatusError(status, words)
    request = Request(path, b"{}", "m", mutates=False)
    assert encoding.may_be_refused_as_json(request, refusal) is may_be
    encoding.accepted(Request("optim_step"))
    assert encoding.may_be_refused_as_json(request, refusal) is may_be
    encoding.accepted(Request("forward"))
    assert not encoding.may_be_refused_as_json(request, refusal)


def test_which_encoding_is_used_is_told(engine):
    seen = []
    trained(engine, seen.append, **TRAINERS["json"])
    sent = [one.detail for one in seen if one.event == "accepted"]
    assert all(detail.endswith(" bytes of application/json") for detail in sent)


class Scripted(Trainer):
    """The double, where passes come and go as protocol buffers."""

    def __init__(self, result: bytes, **options):
        super().__init__(**options)
        self.result = result

    async def __call__(self, scope, receive, send):
        path = scope["path"].removeprefix("/api/v1/")
        headers = {k.decode().lower(): v.decode() for k, v in scope["headers"]}
        if headers.get("content-type") == PROTOBUF:
            await _drain(receive)
            self.requests.append((path, {}, headers))
            await _answer(
                send, b'{"request_id": "pass-%d"}' % len(self.requests), "application/json"
            )
        elif path == "retrieve_future" and PROTOBUF in headers.get("accept", ""):
            await _drain(receive)
            await _answer(send, self.result, PROTOBUF)
        else:
            await super().__call__(scope, receive, send)


async def _drain(receive):
    while (await receive()).get("more_body"):
        pass


async def _answer(send, body, media_type):
    headers = [(b"content-type", media_type.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def output(rows=((-1.0, -2.0, -3.0), (-4.0, -5.0))):
    return protobuf.encode_output(
        ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData(row)} for row in rows])
    )


@pytest.fixture
def connect():
    made = []

    def connect(trainer):
        made.append(
            ServiceClient(ADDRESS, KEY, transport=httpx.ASGITransport(trainer), retry_policy=QUICK)
        )
        return made[-1].create_lora_training_client("tiny", rank=4)

    yield connect
    for service in made:
        service.close()


ASKED = {"proto_write_fwdbwd": True}


def test_one_number_is_used_when_json_is_refused(connect):
    trainer = Scripted(output())
    trainer.faults["forward_backward"] = [Answer(415, {"detail": "protobuf only"})]
    client = connect(trainer)
    rows = client.forward_backward(DATA, "cross_entropy").result(10).logprobs
    assert [row.tolist() for row in rows] == [[-1, -2, -3], [-4, -5]]
    keys = [
        headers["x-idempotency-key"]
        for path, _, headers in trainer.requests
        if path == "forward_backward"
    ]
    assert len(set(keys)) == len(keys) == 2
    client.forward(DATA).result(10)
    assert trainer.paths("forward", "forward_backward") == ["forward_backward"] * 3


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_of_any_kind_may_be_one_of_json(connect, status, caplog):
    trainer = Scripted(output())
    trainer.faults["forward_backward"] = [Answer(status, {"detail": "not what I read"})]
    client = connect(trainer)
    client.forward_backward(DATA, "cross_entropy").result(10)
    client.forward(DATA).result(10)
    assert trainer.paths("forward", "forward_backward") == ["forward_backward"] * 3
    [told] = [one for one in caplog.records if one.levelname == "WARNING"]
    assert f"{ADDRESS} reads passes as protocol buffers" in told.getMessage()
    assert "not what I read" in told.getMessage()


@pytest.mark.parametrize("status", [400, 422])
def test_a_users_mistake_is_told_as_what_it_is(connect, status):
    """The trainer reads JSON only, and refuses the first pass for its content."""
    trainer = Trainer()
    mistake = [Answer(status, {"detail": "there is no such loss"})]
    trainer.faults["forward_backward"] = list(mistake)
    client = connect(trainer)
    with pytest.raises(BadRequestError, match=f"HTTP {status}: there is no such loss"):
        client.forward_backward(DATA, "cross_entropy").result(10)
    client.forward_backward(DATA, "cross_entropy").result(10)
    assert [body["seq_id"] for body in trainer.bodies("forward_backward")] == [1, 1]
    trainer.faults["forward_backward"] = list(mistake)
    with pytest.raises(BadRequestError, match="there is no such loss"):
        client.forward_backward(DATA, "cross_entropy").result(10)
    assert trainer.in_protobuf == 1  # once it has read JSON, no other encoding is tried


def test_who_refuses_both_is_believed(connect):
    trainer = Trainer()
    trainer.faults["optim_step"] = [Answer(415, {"detail": "no"})]
    with pytest.raises(BadRequestError, match="415"):
        connect(trainer).optim_step(AdamParams()).result(10)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (b"\xff\xff\xff", "not a ForwardBackwardOutput"),
        (output([[-1.0]]), "1 outputs for 2 datums"),
        (output([[-1.0], [-2.0]]), r"logprobs of shape \[1\]"),
        (b'{"loss_fn_outputs": []}', "not a ForwardBackwardOutput"),
    ],
)
def test_garbage_is_an_error_of_the_answer(connect, result, words):
    client = connect(Scripted(result, config=ASKED))
    with pytest.raises(APIResponseError, match=words):
        client.forward(DATA).result(10)


def test_an_error_is_told_in_json_all_the_same(engine):
    with (
        application(engine, config=ASKS) as app,
        ServiceClient(ADDRESS, KEY, transport=httpx.ASGITransport(app)) as service,
    ):
        client = service.create_lora_training_client(MODEL, rank=4)
        good = client.forward_backward(batch(), "cross_entropy")
        with pytest.raises(BadRequestError, match="nonsense"):
            client.forward_backward(batch(), "nonsense").result(60)
        assert good.result(60).metrics
        assert client.forward(batch()).result(60).metrics
        assert engine.model(client.model_id).num_datums == 4


def test_a_token_that_is_no_int32_is_not_sent(connect):
    trainer = Trainer(config=ASKED)
    client = connect(trainer)
    data = [Datum(ModelInput.from_ints([2**31]), {"target_tokens": [1]})]
    with pytest.raises(DataError, match="datum 0, field 'model_input'"):
        client.forward_backward(data, "cross_entropy")
    assert not trainer.paths("forward_backward")


def test_without_the_extra_nothing_is_sent(connect, monkeypatch):
    def missing(body):
        raise ConfigError('pip install "mintjax[protobuf]"')

    monkeypatch.setattr(zstd, "compress", missing)
    asked = {"proto_write_fwdbwd": True, "proto_compress_fwdbwd": True}
    trainer = Scripted(output(), config=asked)
    client = connect(trainer)
    with pytest.raises(ConfigError, match="pip install"):
        client.forward_backward(DATA, "cross_entropy").result(10)
    assert not trainer.paths("forward_backward")
    monkeypatch.undo()
    assert client.forward_backward(DATA, "cross_entropy").result(10).logprobs


def test_what_was_changed_after_it_was_handed_over_is_sent_as_it_was(connect):
    bodies = []

    class Keeps(Scripted):
        async def __call__(self, scope, receive, send):
            async def kept():
                message = await receive()
                if scope["path"].endswith("forward_backward"):
                    bodies.append(message["body"])
                return message

            await super().__call__(scope, kept, send)

    compressed = {"proto_write_fwdbwd": True, "proto_compress_fwdbwd": True}
    client = connect(Keeps(output(), config=compressed))
    weights = np.ones(3, np.float32)
    first = Datum(DATA[0].model_input, {**DATA[0].loss_fn_inputs, "weights": weights})
    future = client.forward_backward([first, DATA[1]], "cross_entropy")
    weights[:] = 7
    future.result(10)
    request = protobuf.decode_request(zstd.decompress(b"".join(bodies), 10_000))
    assert isinstance(request, messages.ForwardBackwardRequest)
    sent = request.forward_backward_input.data[0].loss_fn_inputs["weights"]
    assert sent.tolist() == [1, 1, 1]
    assert msgspec.structs.asdict(request)["seq_id"] == 1


@pytest.mark.parametrize("config", [{}, ASKED])
@pytest.mark.parametrize("number", [np.float32, np.float64, np.int64, jnp.float32])
def test_scalars_of_numpy_and_jax_are_numbers(connect, config, number):
    sent = []

    class Keeps(Scripted):
        async def __call__(self, scope, receive, send):
            async def kept():
                message = await receive()
                if scope["path"].endswith("forward_backward"):
                    sent.append(message["body"])
                return message

            await super().__call__(scope, kept, send)

    client = connect(Keeps(output(), config=config))
    client.forward_backward(DATA, "ppo", {"clip_high_threshold": number(2)}).result(10)
    read = protobuf.decode_request if config else json_pass
    assert read(b"".join(sent)).forward_backward_input.loss_fn_config == {
        "clip_high_threshold": 2.0
    }


def json_pass(body):
    return messages.decode(body, messages.ForwardBackwardRequest)
