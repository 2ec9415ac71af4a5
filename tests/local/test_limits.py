"""What is beyond a limit is refused by its name, and the trainer goes on."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time

import numpy as np
import pytest

from mintjax.cli._serve import serve
from mintjax.errors import ConfigError
from mintjax.local import Limits, compute
from mintjax.local.app import application
from mintjax.protocol import messages
from mintjax.types import AdamParams, Datum, LoraConfig, ModelInput

from .conftest import BASE_MODEL
from .data import batch
from .http import Http, as_json, serving


def open_session(http: Http) -> str:
    return http.post("create_session", {"sdk_version": "1"}).json()["session_id"]


def create_model(http, session_id, rank=2, **headers):
    request = messages.CreateModelRequest(session_id, 0, BASE_MODEL, LoraConfig(rank, seed=1))
    return http.post("create_model", request, **headers)


def a_pass(model_id, data):
    given = messages.ForwardBackwardInput(data, "cross_entropy")
    return messages.ForwardRequest(given, model_id)


def say_how_to_raise(detail: str, name: str) -> bool:
    return detail.startswith(f"{name}: ") and f"--{name.replace('_', '-')}" in detail


@pytest.fixture(scope="module")
def limits():
    return Limits(
        max_sessions=2,
        max_models=2,
        max_samplers=1,
        max_rank=4,
        max_datum_tokens=40,
        max_targets=200,
        max_candidates=3,
        max_body_bytes=100_000,
    )


@pytest.fixture(scope="module")
def http(engine, limits):
    with serving(engine, limits=limits) as http:
        yield http


@pytest.fixture(scope="module")
def session_id(http):
    return open_session(http)


@pytest.fixture(scope="module")
def model_id(http, session_id):
    return http.result(create_model(http, session_id))["model_id"]


@pytest.mark.parametrize("field", dataclasses.fields(Limits), ids=lambda field: field.name)
def test_each_is_above_0_and_an_option_of_the_command(field):
    for value in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match=field.name):
            Limits(**{field.name: value})
    assert inspect.signature(serve).parameters[field.name].default == field.default


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("max_datum_tokens", batch([41])),
        ("max_candidates", batch([3], candidates=4)),
        ("max_targets", batch([40] * 6)),
        ("max_targets", batch([40] * 2, candidates=3)),
    ],
)
def test_of_a_pass(http, model_id, name, data):
    answer = http.post("forward", a_pass(model_id, data))
    assert answer.status_code == 400
    assert say_how_to_raise(answer.json()["detail"], name)
    assert "metrics" in http.call("forward", a_pass(model_id, batch([40, 3])))


def test_of_the_rank(http, session_id):
    answer = create_model(http, session_id, rank=5)
    assert answer.status_code == 400
    assert say_how_to_raise(answer.json()["detail"], "max_rank")


def test_of_a_body(http, model_id):
    for headers in ({}, {"Transfer_Encoding": "chunked"}):
        body = b" " * 100_001
        content = body if not headers else _in_parts(body)
        answer = http.send(
            "POST", "forward", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert say_how_to_raise(answer.json()["detail"], "max_body_bytes")


async def _in_parts(body):
    yield body[:50_000]
    yield body[50_000:]


def test_of_sessions_models_and_samplers(engine, limits):
    with serving(engine, limits=limits) as http:
        session_id = open_session(http)
        open_session(http)
        answer = http.post("create_session", {"sdk_version": "1"})
        assert answer.status_code == 400
        assert say_how_to_raise(answer.json()["detail"], "max_sessions")

        first = create_model(http, session_id, X_Idempotency_Key="a")
        second = create_model(http, session_id, X_Idempotency_Key="b")
        made = [http.result(one)["model_id"] for one in (first, second)]
        answer = create_model(http, session_id, X_Idempotency_Key="c")
        assert answer.status_code == 400
        assert say_how_to_raise(answer.json()["detail"], "max_models")
        # The same request again, because its answer was lost, has its result all the same.
        again = create_model(http, session_id, X_Idempotency_Key="b")
        assert http.result(again)["model_id"] == made[1]
        http.call("unload_model", {"model_id": made[0]})
        made.append(http.result(create_model(http, session_id))["model_id"])

        request = messages.CreateSamplingSessionRequest(session_id, 0, base_model=BASE_MODEL)
        assert http.post("create_sampling_session", request).status_code == 200
        answer = http.post("create_sampling_session", request)
        assert answer.status_code == 400
        assert say_how_to_raise(answer.json()["detail"], "max_samplers")

        http.post(f"sessions/{session_id}/finish", {})
        assert made[1] not in engine.models or _ends(http, made[1])
        open_session(http)


def _ends(http: Http, model_id: str) -> bool:
    """Whether a model is let go, once what was submitted before has taken effect."""
    session_id = open_session(http)
    created = http.result(create_model(http, session_id))["model_id"]
    http.post(f"sessions/{session_id}/finish", {})
    return created != model_id and http.post("get_info", {"model_id": model_id}).status_code == 404


def test_clients_that_are_gone_are_let_go(engine, monkeypatch):
    with serving(engine, limits=Limits(session_seconds=100)) as http:
        gone, there = open_session(http), open_session(http)
        models = [http.result(create_model(http, one))["model_id"] for one in (gone, there)]
        now = time.monotonic()
        monkeypatch.setattr("mintjax.local.sessions.time.monotonic", lambda: now + 99)
        assert http.post("session_heartbeat", {"session_id": there}).status_code == 200
        assert set(models) <= engine.models.keys()
        monkeypatch.setattr("mintjax.local.sessions.time.monotonic", lambda: now + 101)
        # Any request of a model is a sign of life, too.
        assert "metrics" in http.call("forward", a_pass(models[1], batch([3])))
        assert models[0] not in engine.models
        answer = http.post("session_heartbeat", {"session_id": gone})
        assert answer.status_code == 410
        assert "has ended" in answer.json()["detail"]
        monkeypatch.setattr("mintjax.local.sessions.time.monotonic", lambda: now + 190)
        assert http.post("get_info", {"model_id": models[1]}).status_code == 200


def test_a_missing_number_is_waited_for_as_long_as_is_said(engine, model_id):
    with (
        application(engine, limits=Limits(missing_seconds=0.01), poll_seconds=0.02) as app,
    ):
        http = Http(app, None)
        step = messages.OptimStepRequest(model_id, AdamParams(), 7)
        failed = http.call("optim_step", step)
        http.close()
    assert failed["category"] == "user"
    assert re.search(r"seq_id 1, .* within 0.01 s", failed["error"])


def test_many_candidates_are_cut_into_groups_of_bounded_size(make_model, engine, monkeypatch):
    """A group holds some twenty arrays as large as its targets."""
    data = batch([20, 30, 10, 25, 31, 7], candidates=5)
    model = engine.model(make_model())

    def run():
        options = {"per_sequence": None, "backward": True}
        return compute.run(model.config, model.lora, data, "ppo", None, **options)

    whole = run()
    monkeypatch.setattr(compute, "_MAX_TARGETS", 2 * 32 * 5)
    groups = list(compute._groups(data, "cross_entropy"))
    assert [len(group.indices) for group in groups] == [2, 2, 2]
    assert all(group.targets.size <= 2 * 32 * 5 for group in groups)
    parts = run()
    for one, other in zip(whole.logprobs, parts.logprobs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    np.testing.assert_allclose(whole.losses, parts.losses, rtol=1e-4, atol=1e-5)


def test_datums_of_one_request_share_the_number_of_candidates(http, model_id):
    data = [*batch([3], candidates=2), *batch([3], candidates=3)]
    answer = http.post("forward", a_pass(model_id, data))
    assert answer.status_code == 400


def test_sizes_are_looked_at_before_anything_is_computed(http, model_id):
    """Few bytes may stand for many numbers."""
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1, 2], "weights": [1.0, 1.0]})
    message = as_json(a_pass(model_id, [datum]))
    sparse = {
        "data": [1.0],
        "dtype": "float32",
        "shape": [2, 100_000],
        "sparse_crow_indices": [0, 1, 1],
        "sparse_col_indices": [0],
    }
    inputs = message["forward_input"]["data"][0]["loss_fn_inputs"]
    inputs["target_tokens"] = sparse | {"dtype": "int64", "data": [1]}
    inputs["weights"] = sparse
    answer = http.post("forward", message)
    assert answer.status_code == 400
    assert say_how_to_raise(answer.json()["detail"], "max_candidates")
