"""Passes as protocol buffers: what the trainer makes of them is what it makes of JSON."""

from __future__ import annotations

import numpy as np
import pytest

from mintjax.local import Dialect
from mintjax.local.app import application
from mintjax.local.limits import Limits
from mintjax.protocol import messages, protobuf, zstd
from mintjax.protocol.protobuf import messages_pb2 as pb
from mintjax.types import AdamParams, LoraConfig, ModelInput, SamplingParams

from .conftest import BASE_MODEL
from .data import batch
from .http import serving

PROTOBUF = protobuf.MEDIA_TYPE
INSISTS = Dialect(json_passes=False)
ASKING = messages.ClientConfigResponse(
    proto_write_fwdbwd=True, proto_compress_fwdbwd=True, fwdbwd_max_chunk_len=7
)


@pytest.fixture(scope="module")
def http(engine):
    with serving(engine) as http:
        yield http


@pytest.fixture
def make_model(http):
    session_id = http.post("create_session", messages.CreateSessionRequest("1")).json()[
        "session_id"
    ]

    def make_model():
        request = messages.CreateModelRequest(session_id, 0, BASE_MODEL, LoraConfig(4, seed=1))
        return http.call("create_model", request)["model_id"]

    return make_model


def a_pass(kind, model_id, seq_id=None, data=None):
    given = messages.ForwardBackwardInput(data or batch(), "ppo", {"clip_low_threshold": 0.9})
    return kind(given, model_id, seq_id)


def post(http, request, path="forward_backward", **headers):
    body = request if isinstance(request, bytes) else protobuf.encode_request(request)
    return http.post(path, body, Content_Type=PROTOBUF, **headers)


def retrieve(http, accepted, accept):
    assert accepted.status_code == 200, accepted.text
    question = {"request_id": accepted.json()["request_id"]}
    while True:
        answer = http.post("retrieve_future", question, Accept=accept)
        if answer.headers["content-type"] == PROTOBUF or "type" not in answer.json():
            return answer


class TestPasses:
    def test_either_encoding_trains_to_the_same_bit(self, http, make_model, engine):
        one, other = make_model(), make_model()
        in_json = http.call("forward_backward", a_pass(messages.ForwardBackwardRequest, one, 1))
        body = protobuf.encode_request(a_pass(messages.ForwardBackwardRequest, other, 1))
        accepted = post(http, zstd.compress(body), Content_Encoding="zstd")
        answer = retrieve(http, accepted, f"{PROTOBUF}, application/json")
        assert answer.headers["content-type"] == PROTOBUF
        output = protobuf.decode_output(answer.content)
        assert output.metrics == in_json["metrics"]
        for mine, theirs in zip(output.logprobs, in_json["loss_fn_outputs"], strict=True):
            assert mine.tobytes() == np.float32(theirs["logprobs"]["data"]).tobytes()
        for model_id in (one, other):
            http.call("optim_step", messages.OptimStepRequest(model_id, AdamParams(), 2))
        trained = [engine.model(model_id).lora["unembed"]["b"] for model_id in (one, other)]
        assert np.asarray(trained[0]).tobytes() == np.asarray(trained[1]).tobytes()

    def test_forward_only_leaves_no_gradient(self, http, make_model, engine):
        model_id = make_model()
        in_json = http.call("forward", a_pass(messages.ForwardRequest, model_id))
        answer = retrieve(http, post(http, a_pass(messages.ForwardRequest, model_id)), PROTOBUF)
        assert engine.model(model_id).num_datums == 0
        assert protobuf.decode_output(answer.content).metrics == in_json["metrics"]

    @pytest.mark.parametrize("accept", ["application/json", "*/*"])
    def test_who_does_not_accept_them_gets_json(self, http, make_model, accept):
        accepted = post(http, a_pass(messages.ForwardRequest, make_model()))
        answer = retrieve(http, accepted, accept)
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["metrics"].keys() == {"loss:sum"}
        again = retrieve(http, accepted, PROTOBUF)
        assert protobuf.decode_output(again.content).metrics == answer.json()["metrics"]

    def test_json_stays_json_for_who_accepts_both(self, http, make_model):
        accepted = http.post("forward", a_pass(messages.ForwardRequest, make_model()))
        answer = retrieve(http, accepted, f"{PROTOBUF}, application/json")
        assert answer.headers["content-type"] == "application/json"


class TestSampling:
    def test_who_reads_nothing_else_gets_a_protocol_buffer(self, http):
        session = http.post("create_session", messages.CreateSessionRequest("1")).json()[
            "session_id"
        ]
        request = messages.CreateSamplingSessionRequest(session, 0, base_model=BASE_MODEL)
        opened = http.post("create_sampling_session", request).json()["sampling_session_id"]
        params = SamplingParams(max_tokens=3, seed=1)
        sample = messages.SampleRequest(
            ModelInput.from_ints([1, 2]), params, opened, 0, 2, prompt_logprobs=True
        )
        accepted = http.post("asample", sample)
        assert len(set(accepted.json()["sample_sequence_ids"])) == 2
        in_json = retrieve(http, accepted, "application/json").json()
        answer = retrieve(http, accepted, PROTOBUF)
        message = pb.SampleResponse.FromString(answer.content)
        assert len(message.sequences) == len(in_json["sequences"]) == 2
        for one, other in zip(message.sequences, in_json["sequences"], strict=True):
            assert np.frombuffer(one.tokens, "<i4").tolist() == other["tokens"]
            assert np.frombuffer(one.logprobs, "<f4").tolist() == [
                float(np.float32(value)) for value in other["logprobs"]
            ]
            name = pb.StopReason.Name(one.stop_reason)
            assert name == f"STOP_REASON_{other['stop_reason'].upper()}"
        first, second = np.frombuffer(message.prompt_logprobs, "<f4")
        assert np.isnan(first)
        assert in_json["prompt_logprobs"] == [None, pytest.approx(float(second))]


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"\xff\xff", "not a ForwardBackwardRequest"),
            (b"\x1a\x06\x0a\x04\x12\x02\x0a\x00", "datum 0"),
            (b"", "model"),
        ],
    )
    def test_a_body_that_is_none(self, http, body, words):
        answer = post(http, body)
        assert answer.status_code in (404, 422)
        assert words in answer.json()["detail"]

    def test_the_number_of_what_is_refused_is_not_waited_for(self, http, make_model):
        model_id = make_model()
        spoilt = a_pass(messages.ForwardBackwardRequest, model_id, 1)
        spoilt.forward_backward_input.data[1].loss_fn_inputs.pop("target_tokens")
        assert post(http, spoilt).status_code == 400
        body = protobuf.encode_request(a_pass(messages.ForwardBackwardRequest, model_id, 2))
        assert post(http, body + b"\x1a\x06\x0a\x04\x12\x02\x0a\x00").status_code == 422
        step = http.call("optim_step", messages.OptimStepRequest(model_id, AdamParams(), 3))
        assert "metrics" in step

    @pytest.mark.parametrize("path", ["forward", "optim_step", "create_session"])
    def test_only_forward_backward_takes_them(self, http, path):
        answer = post(http, b"", path)
        assert answer.status_code == 415
        assert PROTOBUF in answer.json()["detail"]

    def test_a_bomb_is_too_large(self, engine):
        bomb = zstd.compress(bytes(1_000_000))
        assert len(bomb) < 1000
        with serving(engine, limits=Limits(max_body_bytes=1000)) as http:
            answer = post(http, bomb, Content_Encoding="zstd")
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["detail"]
        assert "--max-body-bytes" in answer.json()["detail"]

    @pytest.mark.parametrize(("encoding", "status"), [("zstd", 400), ("br", 415)])
    def test_a_body_that_is_not_compressed_as_it_says(self, http, encoding, status):
        answer = post(http, b"not compressed", Content_Encoding=encoding)
        assert answer.status_code == status


class TestConfig:
    def test_it_asks_for_nothing_unless_told(self, http):
        flags = http.post("client/config", {"sdk_version": "1"}).json()
        assert not flags["proto_write_fwdbwd"]
        assert not flags["proto_compress_fwdbwd"]

    def test_what_it_asks_for_can_be_chosen(self, engine):
        with serving(engine, config=ASKING) as http:
            flags = http.post("client/config", {"sdk_version": "1"}).json()
        assert flags["proto_write_fwdbwd"]
        assert flags["proto_compress_fwdbwd"]
        assert flags["fwdbwd_max_chunk_len"] == 7

    def test_json_may_be_refused(self, engine, model_id):
        with serving(engine, dialect=INSISTS) as http:
            answer = http.post("forward", a_pass(messages.ForwardRequest, model_id))
            assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})
            answer = http.post(
                "forward_backward", a_pass(messages.ForwardBackwardRequest, model_id)
            )
            assert answer.status_code == 415
            assert PROTOBUF in answer.json()["detail"]
            answer = retrieve(http, post(http, a_pass(messages.ForwardRequest, model_id)), PROTOBUF)
        assert answer.headers["content-type"] == PROTOBUF

    @pytest.mark.parametrize("options", [{"config": ASKING}, {"dialect": INSISTS}])
    def test_it_does_not_ask_for_what_it_cannot_read(self, engine, monkeypatch, options):
        def missing():
            raise RuntimeError("missing")

        monkeypatch.setattr(protobuf, "require", missing)
        with pytest.raises(RuntimeError, match="missing"), application(engine, **options):
            pass
