"""The trainer over HTTP: what each request gets, and what each mistake gets."""

from __future__ import annotations

import base64
import json
import threading
import time

import numpy as np
import pytest
from safetensors import SafetensorError

from mintjax.local import app as app_module
from mintjax.local import checkpoints
from mintjax.local.sequencer import Sequencer
from mintjax.protocol import messages
from mintjax.types import AdamParams, LoraConfig, ModelInput, SamplingParams

from .conftest import BASE_MODEL
from .data import LOSSES, batch
from .http import as_json, serving


@pytest.fixture(scope="module")
def http(engine):
    with serving(engine) as http:
        yield http


@pytest.fixture(scope="module")
def session_id(http):
    return http.post("create_session", messages.CreateSessionRequest("1")).json()["session_id"]


@pytest.fixture
def model_id(http, session_id):
    request = messages.CreateModelRequest(session_id, 0, BASE_MODEL, LoraConfig(4, seed=1))
    return http.call("create_model", request)["model_id"]


@pytest.fixture(scope="module")
def sampling_session_id(http, session_id):
    request = messages.CreateSamplingSessionRequest(session_id, 0, base_model=BASE_MODEL)
    return http.post("create_sampling_session", request).json()["sampling_session_id"]


def forward_backward(model_id, data=None, loss_fn="cross_entropy", config=None, seq_id=None):
    given = messages.ForwardBackwardInput(data or batch(), loss_fn, config)
    return messages.ForwardBackwardRequest(given, model_id, seq_id)


class TestTraining:
    @pytest.mark.parametrize("loss_fn", LOSSES)
    def test_forward_and_backward(self, http, model_id, loss_fn):
        given = messages.ForwardBackwardInput(batch(), loss_fn)
        forward = http.call("forward", messages.ForwardRequest(given, model_id, 1))
        backward = http.call(
            "forward_backward", messages.ForwardBackwardRequest(given, model_id, 2)
        )
        for one, other in zip(forward["loss_fn_outputs"], backward["loss_fn_outputs"], strict=True):
            np.testing.assert_allclose(
                one["logprobs"]["data"], other["logprobs"]["data"], atol=1e-5
            )
        shapes = [output["logprobs"]["shape"] for output in backward["loss_fn_outputs"]]
        assert shapes == [[datum.model_input.length] for datum in batch()]
        assert backward["metrics"].keys() == {"loss:sum"}

    def test_a_step(self, http, model_id, engine):
        before = engine.model(model_id).lora
        http.post("forward_backward", forward_backward(model_id, seq_id=1))
        step = http.call("optim_step", messages.OptimStepRequest(model_id, AdamParams(), 2))
        assert step["metrics"]["grad_norm"] > 0
        after = engine.model(model_id).lora
        assert not np.array_equal(before["unembed"]["b"], after["unembed"]["b"])

    def test_defaults_of_adam_are_the_protocol_s(self, http, model_id):
        request = {"adam_params": {}, "model_id": model_id, "type": "optim_step"}
        assert "metrics" in http.call("optim_step", request)

    def test_arrival_out_of_order(self, http, model_id, engine):
        second = http.post("optim_step", messages.OptimStepRequest(model_id, AdamParams(), 2))
        assert engine.model(model_id).num_datums == 0
        first = http.post("forward_backward", forward_backward(model_id, seq_id=1))
        assert http.result(second)["metrics"]["grad_norm"] > 0
        assert http.result(first)["metrics"].keys() == {"loss:sum"}

    def test_a_number_seen_again_is_not_applied_again(self, http, model_id, engine):
        request = forward_backward(model_id, seq_id=1)
        first, again = (http.post("forward_backward", request) for _ in range(2))
        assert http.result(first) == http.result(again)
        assert engine.model(model_id).num_datums == len(batch())

    def test_nor_with_another_content(self, http, model_id, engine):
        first = http.post("forward_backward", forward_backward(model_id, seq_id=1))
        other = forward_backward(model_id, batch(seed=1), seq_id=1)
        answer = http.post("forward_backward", other)
        assert answer.status_code == 409
        assert "came before, with another content" in answer.json()["detail"]
        step = messages.OptimStepRequest(model_id, AdamParams(), 1)
        assert http.post("optim_step", step).status_code == 409
        http.result(first)
        assert engine.model(model_id).num_datums == len(batch())

    def test_nor_is_a_key(self, http, model_id, engine):
        request = forward_backward(model_id)
        for key in ("a", "a", "b"):
            http.result(
                http.post("forward_backward", request, X_Idempotency_Key=f"{model_id}-{key}")
            )
        assert engine.model(model_id).num_datums == 2 * len(batch())

    def test_checkpoints(self, http, model_id, session_id):
        http.call("forward_backward", forward_backward(model_id))
        http.call("optim_step", messages.OptimStepRequest(model_id, AdamParams()))
        saved = http.call("save_weights", messages.SaveWeightsRequest(model_id, "kept"))
        assert saved == {"path": f"tinker://{model_id}/weights/kept"}
        request = messages.LoadWeightsRequest(model_id=model_id, path=saved["path"], optimizer=True)
        loaded = http.call("load_weights", request)
        assert loaded["path"] == saved["path"]
        info = http.post("weights_info", {"tinker_path": saved["path"]}).json()
        assert info == {
            "base_model": BASE_MODEL,
            "is_lora": True,
            "lora_rank": 4,
            "train_unembed": True,
            "train_mlp": True,
            "train_attn": True,
            "optimizer_config": {"type": "adamw"},
        }

    def test_a_checkpoint_without_a_name_is_given_one(self, http, model_id):
        request = {"model_id": model_id, "seq_id": 1}
        path = http.call("save_weights", request)["path"]
        assert path.startswith(f"tinker://{model_id}/weights/")
        assert path != http.call("save_weights", request | {"seq_id": 2})["path"]
        assert (
            http.call("load_weights", messages.LoadWeightsRequest(model_id=model_id, path=path))[
                "path"
            ]
            == path
        )

    def test_a_checkpoint_that_is_not_there(self, http, model_id):
        path = f"tinker://{model_id}/weights/nothing"
        failed = http.call(
            "load_weights", messages.LoadWeightsRequest(model_id=model_id, path=path)
        )
        assert failed["category"] == "user"
        assert path in failed["error"]

    def test_info(self, http, model_id):
        info = http.post("get_info", {"model_id": model_id}).json()
        assert info["model_data"]["model_name"] == BASE_MODEL
        assert info["model_data"]["tokenizer_id"].endswith("/mintjax/bytes")
        assert info["lora_rank"] == 4

    def test_unloading(self, http, model_id):
        waiting = http.post("forward_backward", forward_backward(model_id, seq_id=2))
        assert http.call("unload_model", {"model_id": model_id})["model_id"] == model_id
        assert http.post("get_info", {"model_id": model_id}).status_code == 404
        assert http.result(waiting)["category"] == "user"

    def test_a_failure_of_the_trainer_s_own(self, http, model_id, engine, monkeypatch, caplog):
        def fail(*_):
            raise RuntimeError("a bug")

        monkeypatch.setattr(engine, "optim_step", fail)
        failed = http.call("optim_step", messages.OptimStepRequest(model_id, AdamParams()))
        assert failed == {"error": "internal error: RuntimeError: a bug", "category": "server"}
        assert "optim_step failed" in caplog.text

    @pytest.mark.parametrize(
        "failure", [OSError(28, "No space left"), SafetensorError("I/O error")]
    )
    def test_a_disk_that_is_full(self, http, model_id, monkeypatch, caplog, failure):
        def fail(*_, **__):
            raise failure

        monkeypatch.setattr(checkpoints, "save_file", fail)
        failed = http.call("save_weights", messages.SaveWeightsRequest(model_id, "here"))
        assert failed["category"] == "server"
        assert failed["error"].startswith("cannot write ")
        assert "model" in failed["error"]
        assert "another directory" in failed["error"]
        assert "internal error" not in failed["error"]
        assert "Traceback" not in caplog.text
        monkeypatch.undo()
        assert http.call("save_weights", messages.SaveWeightsRequest(model_id, "here"))["path"]


class TestNaN:
    def test_is_contained(self, http, model_id, engine):
        http.call("forward_backward", forward_backward(model_id, seq_id=1))
        before = engine.model(model_id)
        message = as_json(forward_backward(model_id, loss_fn="importance_sampling", seq_id=2))
        datum = message["forward_backward_input"]["data"][3]
        del datum["loss_fn_inputs"]["weights"]
        length = datum["loss_fn_inputs"]["logprobs"]["shape"][0]
        datum["loss_fn_inputs"]["logprobs"]["data"] = [-1000.0] * length
        failed = http.call("forward_backward", message)
        assert failed["category"] == "user"
        assert "datum 3" in failed["error"]
        assert engine.model(model_id) is before
        third = http.call("forward_backward", forward_backward(model_id, seq_id=3))
        assert np.isfinite(third["metrics"]["loss:sum"])


class TestSampling:
    def sample(self, http, sampling_session_id, **options):
        request = messages.SampleRequest(
            ModelInput.from_ints([65, 66]),
            SamplingParams(max_tokens=4, seed=1),
            sampling_session_id,
            **options,
        )
        return http.call("asample", request)

    def test_from_a_base_model(self, http, sampling_session_id):
        answer = self.sample(http, sampling_session_id, num_samples=2, prompt_logprobs=True)
        assert len(answer["sequences"]) == 2
        assert answer["sequences"][0]["stop_reason"] in ("stop", "length")
        assert answer["prompt_logprobs"][0] is None

    def test_a_repeated_request_has_the_same_answer(self, http, sampling_session_id):
        request = messages.SampleRequest(
            ModelInput.from_ints([65]),
            SamplingParams(max_tokens=1),
            sampling_session_id,
            num_samples=2,
        )
        first, second = (http.post("asample", request, X_Idempotency_Key="k") for _ in range(2))
        assert first.json() == second.json()
        assert len(first.json()["sample_sequence_ids"]) == 2

    def test_from_a_path(self, http, session_id, model_id):
        saved = http.call(
            "save_weights_for_sampler", messages.SaveWeightsForSamplerRequest(model_id, "here")
        )
        request = messages.CreateSamplingSessionRequest(session_id, 1, model_path=saved["path"])
        opened = http.post("create_sampling_session", request).json()["sampling_session_id"]
        assert self.sample(http, opened)["sequences"][0]["tokens"]
        sampler = http.send("GET", f"samplers/{opened}").json()
        assert sampler["base_model"] == BASE_MODEL
        assert sampler["model_path"] == saved["path"]

    def test_from_a_session_of_its_own(self, http, model_id, session_id):
        request = messages.SaveWeightsForSamplerRequest(
            model_id, sampling_session_seq_id=5, seq_id=1
        )
        opened = http.call("save_weights_for_sampler", request)["sampling_session_id"]
        assert self.sample(http, opened)["sequences"][0]["tokens"]
        session = http.send("GET", f"sessions/{session_id}").json()
        assert opened in session["sampler_ids"]
        assert model_id in session["training_run_ids"]


class Endless:
    """A sample of the engine that never ends of itself."""

    def __init__(self):
        self.begun, self.ended = threading.Event(), threading.Event()

    def __call__(self, *args, **kwargs):
        try:
            while True:
                self.begun.set()
                yield
        finally:
            self.ended.set()


@pytest.fixture
def slices(engine, monkeypatch):
    endless = Endless()
    monkeypatch.setattr(engine, "sample_in_slices", endless)
    return endless


class TestFutures:
    def test_says_try_again_and_why(self, engine, model_id):
        with serving(engine, poll_seconds=0.01) as quick:
            accepted = quick.post("forward_backward", forward_backward(model_id, seq_id=2))
            request_id = accepted.json()["request_id"]
            answer = quick.post("retrieve_future", {"request_id": request_id}).json()
        assert answer == {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "active",
            "queue_state_reason": "seq_id 1 has not arrived",
        }

    def test_a_long_sample_is_cancelled_while_others_are_answered(
        self, http, session_id, sampling_session_id, slices
    ):
        """The sample goes on until it is cancelled; its end is waited for, not its length."""
        prompt, params = ModelInput.from_ints([65]), SamplingParams(max_tokens=4, seed=1)
        long = http.post("asample", messages.SampleRequest(prompt, params, sampling_session_id))
        assert slices.begun.wait(20)
        create = messages.CreateModelRequest(session_id, 77, BASE_MODEL, LoraConfig(4, seed=1))
        other = http.call("create_model", create)["model_id"]
        assert "metrics" in http.call("optim_step", messages.OptimStepRequest(other, AdamParams()))
        assert not slices.ended.is_set()
        assert http.post("cancel_future", long.json()).status_code == 200
        assert slices.ended.wait(20)
        assert "cancelled" in http.result(long)["error"]
        assert http.post("cancel_future", {"request_id": "nobody's"}).status_code == 404

    def test_an_unknown_one(self, http):
        answer = http.post("retrieve_future", {"request_id": "nobody's"})
        assert answer.status_code == 404
        assert "nobody's" in answer.json()["detail"]

    def test_one_asked_for_twice(self, http, model_id):
        """A result stays for those whose connection broke."""
        accepted = http.post("optim_step", messages.OptimStepRequest(model_id, AdamParams(), 1))
        assert http.result(accepted) == http.result(accepted)

    def test_one_asked_for_too_late(self, engine, model_id, monkeypatch):
        monkeypatch.setattr(app_module, "Sequencer", lambda: Sequencer(max_results=1))
        with serving(engine) as forgetful:
            steps = [
                forgetful.post(
                    "optim_step", messages.OptimStepRequest(model_id, AdamParams(), seq_id)
                )
                for seq_id in (1, 2, 3)
            ]
            forgetful.result(steps[-1])
            answer = forgetful.post("retrieve_future", steps[0].json())
        assert answer.status_code == 404
        assert "no longer kept" in answer.json()["detail"]


IMAGE = {"type": "image", "data": "YQ==", "format": "png", "expected_tokens": 3}
BAD_PASSES = {
    "no data": (lambda m: m["data"].clear(), 400, "datum"),
    "no tokens": (lambda m: m["data"][1]["model_input"]["chunks"].clear(), 400, "model_input"),
    "no chunks": (lambda m: m["data"][1].pop("model_input"), 422, "model_input"),
    "a negative token": (
        lambda m: m["data"][1]["model_input"]["chunks"][0]["tokens"].__setitem__(0, -1),
        422,
        "negative",
    ),
    "a token beyond the vocabulary": (
        lambda m: m["data"][1]["model_input"]["chunks"][0]["tokens"].__setitem__(0, 258),
        400,
        "datum 1, field 'model_input'",
    ),
    "a token that is no integer": (
        lambda m: m["data"][1]["model_input"]["chunks"][0]["tokens"].__setitem__(0, "a"),
        422,
        "tokens",
    ),
    "sound": (
        lambda m: m["data"][1]["model_input"]["chunks"][0].update(type="dmel"),
        422,
        "chunks",
    ),
    "an image": (
        lambda m: m["data"][1]["model_input"].update(chunks=[IMAGE]),
        400,
        "datum 1, field 'model_input': this trainer reads text only",
    ),
    "no targets": (
        lambda m: m["data"][1]["loss_fn_inputs"].pop("target_tokens"),
        400,
        "datum 1, field 'target_tokens'",
    ),
    "a negative target": (
        lambda m: m["data"][1]["loss_fn_inputs"]["target_tokens"]["data"].__setitem__(0, -1),
        400,
        "datum 1, field 'target_tokens'",
    ),
    "a target beyond the vocabulary": (
        lambda m: m["data"][1]["loss_fn_inputs"]["target_tokens"]["data"].__setitem__(0, 258),
        400,
        "datum 1, field 'target_tokens'",
    ),
    "too few targets": (
        lambda m: m["data"][1]["loss_fn_inputs"]["target_tokens"].update(data=[1], shape=[1]),
        400,
        "datum 1, field 'target_tokens'",
    ),
    "too many weights": (
        lambda m: m["data"][1]["loss_fn_inputs"]["weights"].update(data=[1.0] * 99, shape=[99]),
        400,
        "datum 1, field 'weights'",
    ),
    "weights of another width": (
        lambda m: m["data"][1]["loss_fn_inputs"].update(
            weights={"data": [1.0] * 34, "dtype": "float32", "shape": [17, 2]}
        ),
        400,
        "field 'weights'",
    ),
    "weights for candidates where there are none": (
        lambda m: [
            columns["weights"].update(
                data=columns["weights"]["data"] * 2, shape=[len(columns["weights"]["data"]), 2]
            )
            for columns in (datum["loss_fn_inputs"] for datum in m["data"])
        ],
        400,
        "datum 0, field 'weights'",
    ),
    "candidates of candidates": (
        lambda m: [
            datum["loss_fn_inputs"]["target_tokens"]["shape"].extend([1, 1]) for datum in m["data"]
        ],
        400,
        "datum 0, field 'target_tokens'",
    ),
    "no weights": (
        lambda m: m["data"][1]["loss_fn_inputs"].pop("weights"),
        400,
        "datum 1, field 'weights'",
    ),
    "a weight that is null": (
        lambda m: m["data"][1]["loss_fn_inputs"]["weights"]["data"].__setitem__(0, None),
        422,
        "datum 1, field 'weights'",
    ),
    "a weight beyond float32": (
        lambda m: m["data"][1]["loss_fn_inputs"]["weights"]["data"].__setitem__(0, 1e39),
        400,
        "datum 1, field 'weights'",
    ),
    "data that do not fill their shape": (
        lambda m: m["data"][1]["loss_fn_inputs"]["weights"].update(shape=[3]),
        422,
        "weights",
    ),
    "a dtype of another world": (
        lambda m: m["data"][1]["loss_fn_inputs"]["weights"].update(dtype="complex64"),
        422,
        "dtype",
    ),
    "a loss that is none": (lambda m: m.update(loss_fn="hinge"), 400, "loss_fn"),
    "an option that is none": (
        lambda m: m.update(loss_fn="ppo", loss_fn_config={"beta": 1.0}),
        400,
        "loss_fn_config",
    ),
    "bounds in the wrong order": (
        lambda m: m.update(
            loss_fn="ppo", loss_fn_config={"clip_low_threshold": 2, "clip_high_threshold": 1}
        ),
        400,
        "loss_fn_config",
    ),
    "a negative penalty": (
        lambda m: m.update(loss_fn="dro", loss_fn_config={"beta": -0.1}),
        400,
        "beta of dro must be at least 0 and finite, not -0.1",
    ),
    "an option that is no number": (
        lambda m: m.update(loss_fn="dro", loss_fn_config={"beta": "much"}),
        400,
        "loss_fn_config",
    ),
    "no advantages": (
        lambda m: (m.update(loss_fn="ppo"), m["data"][1]["loss_fn_inputs"].pop("advantages")),
        400,
        "datum 1, field 'advantages'",
    ),
    "a text that is too long": (
        lambda m: (
            m["data"][1]["model_input"]["chunks"][0].update(tokens=[1] * 2049),
            m["data"][1]["loss_fn_inputs"]["target_tokens"].update(data=[1] * 2049, shape=[2049]),
            m["data"][1]["loss_fn_inputs"]["weights"].update(data=[1.0] * 2049, shape=[2049]),
        ),
        400,
        "datum 1, field 'model_input'",
    ),
}


class TestBadInput:
    @pytest.mark.parametrize("path", ["forward", "forward_backward"])
    @pytest.mark.parametrize(("spoil", "status", "named"), BAD_PASSES.values(), ids=BAD_PASSES)
    def test_a_pass(self, http, model_id, engine, path, spoil, status, named):
        message = as_json(forward_backward(model_id, seq_id=1))
        given = message.pop("forward_backward_input")
        spoil(given)
        before = engine.model(model_id)
        answer = http.post(path, {**message, f"{path}_input": given})
        assert answer.status_code == status
        assert named in answer.json()["detail"]
        assert engine.model(model_id) is before
        # The number can be used again, and the line goes on.
        http.post("forward_backward", forward_backward(model_id, seq_id=1))
        step = http.call("optim_step", messages.OptimStepRequest(model_id, AdamParams(), 2))
        assert step["metrics"]["grad_norm"] > 0

    def test_a_number_left_out_after_a_refusal(self, http, model_id):
        waiting = http.post("forward_backward", forward_backward(model_id, seq_id=2))
        refused = http.post("forward_backward", forward_backward(model_id, loss_fn="?", seq_id=1))
        assert refused.status_code == 400
        assert http.result(waiting)["metrics"].keys() == {"loss:sum"}

    @pytest.mark.parametrize(
        ("path", "change", "status", "named"),
        [
            ("optim_step", {"adam_params": {"beta1": 1.0}}, 400, "adam_params.beta1"),
            ("optim_step", {"adam_params": {"learning_rate": -1.0}}, 400, "learning_rate"),
            ("optim_step", {"adam_params": {"learning_rate": "fast"}}, 422, "learning_rate"),
            ("optim_step", {}, 400, "adam_params"),
            ("optim_step", {"adam_params": {}, "seq_id": 0}, 400, "seq_id"),
            ("optim_step", {"adam_params": {}, "seq_id": "one"}, 422, "seq_id"),
            ("save_weights", {"path": "../../etc/passwd"}, 400, "path"),
            ("save_weights_for_sampler", {"path": "a/b"}, 400, "path"),
            ("load_weights", {"path": "tinker://../weights/x", "session_id": None}, 400, "path"),
            ("load_weights", {}, 422, "path"),
            ("create_model", {"base_model": "gpt-9"}, 404, "base_model"),
            ("create_model", {"lora_config": {"rank": 0}}, 400, "lora_config.rank"),
            ("create_model", {"lora_config": {"rank": 10**9}}, 400, "max_rank: lora_config.rank"),
            (
                "create_model",
                {
                    "lora_config": {
                        "rank": 1,
                        "train_mlp": False,
                        "train_attn": False,
                        "train_unembed": False,
                    }
                },
                400,
                "lora_config",
            ),
            ("create_model", {"session_id": "nobody's"}, 404, "session_id"),
            ("session_heartbeat", {"session_id": "nobody's"}, 404, "session_id"),
            ("create_sampling_session", {}, 400, "model_path"),
            ("create_sampling_session", {"model_path": "x"}, 400, "model_path"),
            ("create_sampling_session", {"model_path": "tinker://a/weights/b"}, 404, "tinker://"),
            ("create_sampling_session", {"base_model": "gpt-9"}, 404, "base_model"),
            ("weights_info", {"tinker_path": "tinker://a/weights/../b"}, 400, "tinker_path"),
            ("retrieve_future", {"request_id": None}, 422, "request_id"),
        ],
    )
    def test_other_requests(self, http, model_id, session_id, path, change, status, named):
        defaults = {
            "model_id": model_id,
            "session_id": session_id,
            "model_seq_id": 1,
            "sampling_session_seq_id": 1,
            "base_model": BASE_MODEL if path == "create_model" else None,
        }
        answer = http.post(path, {**defaults, **change})
        assert answer.status_code == status
        assert named in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("change", "status", "named"),
        [
            ({"prompt": {"chunks": []}}, 400, "prompt"),
            ({"num_samples": 0}, 400, "num_samples"),
            ({"sampling_params": {"temperature": -1}}, 400, "temperature"),
            ({"sampling_params": {"max_tokens": 10**9}}, 400, "max_tokens"),
            ({"sampling_params": {"stop": 3}}, 422, "stop"),
            ({"sampling_session_id": None}, 400, "sampling_session_id"),
            ({"sampling_session_id": "nobody's"}, 404, "sampling_session_id"),
        ],
    )
    def test_sampling(self, http, sampling_session_id, change, status, named):
        request = {
            "prompt": {"chunks": [{"tokens": [65], "type": "encoded_text"}]},
            "sampling_params": {},
            "sampling_session_id": sampling_session_id,
            **change,
        }
        answer = http.post("asample", request)
        assert answer.status_code == status
        assert named in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            (
                "forward",
                messages.ForwardRequest(messages.ForwardBackwardInput(batch(), "ppo"), "nobody"),
            ),
            ("forward_backward", forward_backward("nobody", seq_id=1)),
            ("optim_step", messages.OptimStepRequest("nobody", AdamParams(), 1)),
            ("save_weights", messages.SaveWeightsRequest("nobody", "x")),
            ("save_weights_for_sampler", messages.SaveWeightsForSamplerRequest("nobody", "x")),
            (
                "load_weights",
                messages.LoadWeightsRequest(model_id="nobody", path="tinker://a/weights/b"),
            ),
            ("get_info", messages.ModelRequest("nobody")),
            ("unload_model", messages.ModelRequest("nobody")),
        ],
    )
    def test_an_unknown_model(self, http, path, message):
        answer = http.post(path, message)
        assert answer.status_code == 404
        assert "nobody" in answer.json()["detail"]

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
    def test_a_body_that_is_none(self, http, body):
        for path in ("forward_backward", "retrieve_future", "create_session"):
            answer = http.post(path, body)
            assert answer.status_code == 422
            assert answer.json()["detail"]

    def test_a_body_that_does_not_say_what_it_is(self, http):
        for path in ("forward_backward", "create_session", "retrieve_future"):
            answer = http.send("POST", path, content=b"{}")
            assert answer.status_code == 415
            assert "application/json" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "headers",
        [{"Content_Type": "application/xml"}, {"Content_Encoding": "br"}],
    )
    def test_an_encoding_that_is_not_read(self, http, headers):
        answer = http.post("forward_backward", forward_backward("m"), **headers)
        assert answer.status_code == 415
        assert next(iter(headers.values())) in answer.json()["detail"]

    def test_a_path_that_is_none(self, http):
        for method, path in (("POST", "nothing"), ("GET", "forward")):
            answer = http.send(method, path)
            assert answer.status_code in (404, 405)
            assert f"/api/v1/{path}" in answer.json()["detail"]

    def test_a_bug_is_a_500_that_says_so(self, http, engine, monkeypatch, caplog):
        def fail(*_):
            raise RuntimeError("a bug")

        monkeypatch.setattr(engine, "model", fail)
        answer = http.post("get_info", {"model_id": "m"})
        assert answer.status_code == 500
        assert "RuntimeError: a bug" in answer.json()["detail"]
        assert "get_info failed" in caplog.text


class TestSmallTalk:
    def test_health(self, http):
        assert http.send("GET", "healthz").json() == {"status": "ok"}

    def test_capabilities(self, http):
        models = http.send("GET", "get_server_capabilities").json()["supported_models"]
        assert {"model_name": BASE_MODEL, "max_context_length": 2048} in models

    def test_telemetry(self, http):
        assert http.post("telemetry", {"anything": 1}).json() == {"status": "accepted"}

    def test_heartbeat(self, http, session_id):
        assert http.post("session_heartbeat", {"session_id": session_id}).status_code == 200

    def test_config(self, http):
        config = http.post("client/config", {"sdk_version": "1"}).json()
        assert config["pjwt_auth_enabled"] is True
        assert config["proto_write_fwdbwd"] is False


@pytest.fixture(scope="module")
def guarded(engine):
    with serving(engine, api_key="sk-secret") as http:
        yield http


class TestAccess:
    @pytest.mark.parametrize("key", ["", "sk-wrong", "sk-secret2", "a.b.c", "é"])
    def test_a_wrong_key(self, guarded, key):
        headers = {"X-API-Key": key.encode()}
        for path in ("create_session", "client/config", "auth/token", "optim_step"):
            answer = guarded.send("POST", path, headers=headers, content=b"{}")
            assert answer.status_code == 401
            assert "sk-secret" not in answer.text
            assert "X-API-Key" in answer.json()["detail"]

    def test_the_right_key(self, guarded):
        assert guarded.post("client/config", {}).status_code == 200

    def test_health_needs_none(self, guarded):
        headers = {"X-API-Key": "sk-wrong"}
        assert guarded.send("GET", "healthz", headers=headers).status_code == 200

    def test_a_token_is_as_good(self, guarded):
        token = guarded.post("auth/token", {}).json()["jwt"]
        claims = token.split(".")[1]
        padded = claims + "=" * (-len(claims) % 4)
        assert json.loads(base64.urlsafe_b64decode(padded))["exp"] > 0
        answer = guarded.post("client/config", {}, X_API_Key=token)
        assert answer.status_code == 200

    def test_a_token_of_another_trainer_is_not(self, guarded, http):
        token = http.post("auth/token", {}).json()["jwt"]
        assert guarded.post("client/config", {}, X_API_Key=token).status_code == 401

    def test_a_token_is_not_good_for_ever(self, guarded, monkeypatch):
        token = guarded.post("auth/token", {}).json()["jwt"]
        monkeypatch.setattr("time.time", lambda: 4e9)
        assert guarded.post("client/config", {}, X_API_Key=token).status_code == 401

    def test_no_key_at_all(self, guarded):
        del guarded.headers["X-API-Key"]
        assert guarded.post("client/config", {}).status_code == 401
        guarded.headers["X-API-Key"] = "sk-secret"

    def test_without_a_key_everybody_is_let_in(self, http):
        assert http.post("client/config", {}, X_API_Key="anything").status_code == 200

    def test_a_token_cannot_be_renewed_with_itself(self, guarded, monkeypatch):
        first = guarded.post("auth/token", {}).json()["jwt"]
        now = time.time()
        monkeypatch.setattr("time.time", lambda: now + 3600)
        second = guarded.post("auth/token", {}, X_API_Key=first).json()["jwt"]
        monkeypatch.setattr("time.time", lambda: now + 25 * 3600)
        assert guarded.post("client/config", {}, X_API_Key=second).status_code == 401

    def test_a_web_page_is_refused(self, http):
        for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example:8000"}):
            answer = http.send("POST", "client/config", headers=headers)
            assert answer.status_code == 403
            assert next(iter(headers)) in answer.json()["detail"]

    def test_with_a_key_any_name_will_do(self, guarded):
        assert guarded.post("client/config", {}, Host="gpu-box").status_code == 200
