"""Requests as the official client 0.38 sends them, over a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mintjax.local import Limits
from mintjax.protocol import messages, protobuf
from mintjax.types import SampleResponse

from .conftest import BASE_MODEL
from .official import LORA, Client, clients, sample_request


@pytest.fixture(scope="module")
def client(engine):
    with clients(engine) as client:
        yield client


@pytest.fixture(scope="module")
def trained(client):
    """A model after two steps, and its checkpoint."""
    model_id = client.create_model()
    client.step(model_id)
    client.step(model_id)
    return model_id, client.of_model("save_weights", model_id, path="two", overwrite=True)["path"]


class TestAModelFromACheckpoint:
    @pytest.mark.parametrize("optimizer", [True, False])
    def test_goes_on_as_the_one_that_was_saved(self, client, trained, optimizer):
        trained_id, path = trained
        model_id, request = client.load_request(path, optimizer=optimizer)
        assert client.call("load_weights", request)["path"] == path
        info = client.ask("get_info", {"model_id": model_id, "type": "get_info"})
        assert info["lora_rank"] == LORA["rank"]
        if optimizer:
            reference = trained_id  # which the other case leaves as it is
        else:
            reference = client.create_model()
            body = {"path": path, "optimizer": False}
            client.of_model("load_weights", reference, **body)
        losses = [[client.step(one)["loss:sum"] for _ in "ab"] for one in (model_id, reference)]
        assert losses[0] == losses[1]
        saved = client.of_model("save_weights", model_id, path="again", overwrite=True)["path"]
        assert saved == f"tinker://{model_id}/weights/again"
        assert client.call("load_weights", client.load_request(saved)[1])["path"] == saved
        again = {"path": saved, "optimizer": True}
        assert client.of_model("load_weights", trained_id, **again)["path"] == saved
        client.of_model("load_weights", trained_id, path=path, optimizer=True)

    def test_a_repeat_makes_no_second_one(self, client, trained, engine):
        _, path = trained
        model_id, request = client.load_request(path)
        first = client.send("load_weights", request)
        assert client.send("load_weights", request).json() == first.json()
        client.result(first)
        before = dict(engine.models)
        assert client.send("load_weights", request).json() == first.json()
        assert engine.models == before
        other = client.send("load_weights", request | {"optimizer": False})
        assert other.status_code == 409
        assert model_id in engine.models

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"model_id": "a"}, "session_id"),
            ({"session_id": "nobody's"}, "session_id"),
            ({"model_seq_id": None}, "model_seq_id"),
            ({"model_seq_id": -1}, "model_seq_id"),
            ({"model_seq_id": 2**53}, "model_seq_id"),
            ({"session_id": None}, "model_id"),
            ({"path": "tinker://../weights/x"}, "path"),
            ({"path": "tinker://session-1:train:0/weights/../../x"}, "path"),
            ({"path": "tinker://:train:0/weights/x"}, "path"),
            ({"optimizer_config": {"type": "dimuon", "version": 1}}, "dimuon"),
        ],
    )
    def test_refused_at_once(self, client, trained, change, named):
        answer = client.send("load_weights", client.load_request(trained[1], **change)[1])
        assert answer.status_code in (400, 404)
        assert named in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"path": "tinker://nobody/weights/x"}, "tinker://nobody/weights/x"),
            ({"base_model": "mintjax/tiny"}, "base_model"),
        ],
    )
    def test_refused_in_its_turn(self, client, trained, engine, change, named):
        model_id, request = client.load_request(trained[1], **change)
        failed = client.call("load_weights", request)
        assert named in failed["error"]
        assert failed["category"] == "user"
        assert model_id not in engine.models

    def test_counts_as_a_model(self, engine, trained):
        with clients(engine, limits=Limits(max_models=1, max_rank=4)) as client:
            model_id, request = client.load_request(trained[1])
            client.call("load_weights", request)
            answer = client.send("load_weights", client.load_request(trained[1])[1])
            assert answer.status_code == 400
            assert answer.json()["detail"].startswith("max_models: ")
            client.call("unload_model", {"model_id": model_id, "type": "unload_model"})
            client.call("load_weights", client.load_request(trained[1])[1])
        with clients(engine, limits=Limits(max_rank=3)) as client:
            failed = client.call("load_weights", client.load_request(trained[1])[1])
            assert failed["error"].startswith("max_rank: ")


def open_sampler(client: Client) -> str:
    request = {"session_id": client.session_id, "sampling_session_seq_id": 0}
    request |= {"base_model": BASE_MODEL, "type": "create_sampling_session"}
    return client.ask("create_sampling_session", request)["sampling_session_id"]


class TestRetrieveFutures:
    def poll(self, client, opened, cursor, copy=0, **more):
        target = {"type": "sampling_session", "sampling_session_id": opened}
        target["cloned_sampler_id"] = copy
        request = {"target": target, "prev_cursor": cursor, "retrieved_request_ids": []} | more
        answer = client.ask("retrieve_futures", request)
        return answer["completions"], answer["cursor"]

    def test_tells_of_each_once(self, client):
        opened = open_sampler(client)
        sent = [client.send("asample", sample_request(opened, i)) for i in range(3)]
        copys = client.send("asample", sample_request(opened, 1_000_000_000))
        waiting, cursor, told = {one.json()["request_id"] for one in sent}, 0, []
        while len(told) < 3:
            found, cursor = self.poll(client, opened, cursor)
            told += found
        assert {one["request_id"] for one in told} == waiting
        assert {one["state"] for one in told} == {"finished"}
        for one in told:
            result = client.ask("retrieve_future", {"request_id": one["request_id"]})
            assert len(result["sequences"]) == 1
            assert one["response_payload_uncompressed_size"] > 10
        assert self.poll(client, opened, cursor, timeout=0) == ([], cursor)
        client.result(copys)
        [other], _ = self.poll(client, opened, 0, copy=1)
        assert other["request_id"] == copys.json()["request_id"]

    def test_of_what_was_cancelled_that_it_failed(self, client):
        opened = open_sampler(client)
        sent = client.send("asample", sample_request(opened, 0, max_tokens=500, stop=[]))
        request_id = {"request_id": sent.json()["request_id"]}
        client.ask("cancel_future", request_id)
        found, _ = self.poll(client, opened, 0)
        assert found == [{**request_id, "state": "failed"}]
        assert "cancelled" in client.ask("retrieve_future", request_id)["error"]

    def test_of_no_session_that_is_not_there(self, client):
        target = {"type": "sampling_session", "sampling_session_id": "nobody's"}
        assert client.send("retrieve_futures", {"target": target}).status_code == 404
        target["sampling_session_id"] = open_sampler(client)
        for cursor in (-1, 2**64):
            request = {"target": target, "prev_cursor": cursor}
            assert client.send("retrieve_futures", request).status_code == 422

    def test_copies_of_a_client_get_numbers_of_their_own(self, client):
        join = {"sampling_session_id": open_sampler(client), "type": "join_sampling_session"}
        numbers = [client.ask("join_sampling_session", join)["client_counter"] for _ in range(3)]
        assert numbers == [1, 2, 3]
        join["sampling_session_id"] = "nobody's"
        assert client.send("join_sampling_session", join).status_code == 404


TARGETS = [[5, -1], [-1, 7]]  # of a prompt of three tokens
SPARSE = {
    "data": [5, 7],
    "dtype": "int64",
    "shape": [2, 2],
    "sparse_crow_indices": [0, 1, 2],
    "sparse_col_indices": [0, 1],
}


class TestWhatIsAskedOfTokens:
    """Beside the samples; what the numbers are, ``test_sampling`` says."""

    def wanted(self, **changes: Any) -> dict[str, Any]:
        dense = {"data": [x for row in TARGETS for x in row], "dtype": "int64"}
        return {
            "prompt_logprobs": True,
            "prompt_logprobs_last_n": 1,
            "topk_prompt_logprobs": 2,
            "topk_sample_logprobs": 3,
            "prompt_alt_tokens_k": 4,
            "target_prompt_logprobs": {**dense, "shape": [2, 2]},
        } | changes

    def ask(self, client, opened, **changes):
        request = sample_request(opened, 0, seed=1) | self.wanted(**changes)
        return client.send("asample", request)

    def test_is_given(self, client):
        accepted = self.ask(client, open_sampler(client))
        result = client.result(accepted)
        assert [one is None for one in result["prompt_logprobs"]] == [True, True, False]
        assert [one and len(one) for one in result["topk_prompt_logprobs"]] == [None, None, 2]
        [sequence] = result["sequences"]
        assert [len(one) for one in sequence["topk_logprobs"]] == [3] * len(sequence["tokens"])
        assert result["target_prompt_logprobs"]["shape"] == [2, 2]
        assert result["prompt_alt_tokens"]["tokens"]["shape"] == [2, 4]
        question = {"request_id": accepted.json()["request_id"]}
        headers = {"Accept": "application/x-protobuf"}
        answer = client.http.post("/api/v1/retrieve_future", json=question, headers=headers)
        assert answer.headers["content-type"] == "application/x-protobuf"
        as_protobuf = protobuf.decode_sample(answer.content)
        assert messages.encode(as_protobuf) == messages.encode(
            messages.decode(json.dumps(result).encode(), SampleResponse)
        )

    def test_sparse_targets_are_answered_in_their_layout(self, client):
        opened = open_sampler(client)
        dense = client.result(self.ask(client, opened))["target_prompt_logprobs"]
        accepted = self.ask(client, opened, target_prompt_logprobs=SPARSE)
        sparse = client.result(accepted)["target_prompt_logprobs"]
        assert dense["data"][1] == dense["data"][2] == 0
        expected = pytest.approx(dense["data"][::3], rel=1e-6)
        assert sparse == {**SPARSE, "dtype": "float32", "data": expected}

    def test_older_trainers_requests_ask_for_nothing(self, client):
        request = sample_request(open_sampler(client), 0)
        for name in self.wanted():
            request.pop(name, None)
        result = client.call("asample", request)
        assert all(result[name] is None for name in ("topk_prompt_logprobs", "prompt_logprobs"))

    @pytest.mark.parametrize(
        ("change", "status", "named"),
        [
            ({"prompt_logprobs_last_n": 3}, 400, "prompt_logprobs_last_n"),
            ({"prompt_logprobs_last_n": 0}, 400, "prompt_logprobs_last_n"),
            ({"prompt_logprobs": False}, 400, "prompt_logprobs_last_n"),
            ({"topk_prompt_logprobs": -1}, 400, "topk_prompt_logprobs"),
            ({"topk_prompt_logprobs": 2**70}, 400, "max_candidates: topk_prompt_logprobs"),
            ({"topk_sample_logprobs": 1025}, 400, "max_candidates: topk_sample_logprobs"),
            ({"topk_sample_logprobs": 1024, "num_samples": 1024, "max": 400}, 400, "max_targets"),
            ({"prompt_alt_tokens_k": 1025}, 400, "max_candidates: prompt_alt_tokens_k"),
            ({"target_prompt_logprobs": {"shape": [3, 1], "data": [1, 2, 3]}}, 400, "[2, K]"),
            ({"target_prompt_logprobs": {"shape": [2], "data": [1, 2]}}, 400, "[2, K]"),
            ({"target_prompt_logprobs": {"shape": [2, 1], "data": [1]}}, 400, "do not fill"),
            ({"target_prompt_logprobs": {"shape": [2, 1], "data": [1, 258]}}, 400, "token 258"),
            ({"target_prompt_logprobs": {"shape": [2, 1], "data": [1, -2]}}, 422, "-1"),
            ({"target_prompt_logprobs": {"shape": [2, 1], "data": [1, 2**63]}}, 422, "data"),
            ({"target_prompt_logprobs": {"shape": [2, 0], "data": []}}, 200, ""),
            ({"sparse": {"shape": [2, 2**40]}}, 400, "max_candidates"),
            ({"sparse": {"sparse_crow_indices": [0, 2, 1]}}, 400, "sparse"),
            ({"sparse": {"sparse_crow_indices": [0, 1]}}, 400, "sparse"),
            ({"sparse": {"sparse_col_indices": [0, 2]}}, 400, "sparse"),
            ({"sparse": {"sparse_col_indices": [0]}}, 400, "sparse"),
            ({"sparse": {"sparse_col_indices": None}}, 400, "sparse"),
            ({"sparse": {"sparse_col_indices": [0, -1]}}, 422, "sparse_col_indices"),
        ],
    )
    def test_what_cannot_be_is_refused(self, client, change, status, named):
        if "sparse" in change:
            change = {"target_prompt_logprobs": SPARSE | change["sparse"]}
        request = sample_request(open_sampler(client), 0) | self.wanted(**change)
        request["sampling_params"]["max_tokens"] = request.pop("max", 2)
        answer = client.send("asample", request)
        assert answer.status_code == status
        assert named in answer.json().get("detail", "")


class TestSessions:
    def test_say_what_was_said_of_them(self, client):
        session = client.ask(f"sessions/{client.session_id}", method="GET", access_scope="owned")
        assert session["user_metadata"] == {"owner": "me"}
        assert session["display_name"] == "a name"

    def test_finish_once_and_for_all(self, engine):
        with clients(engine) as client:
            model_id = client.create_model()
            finish = f"sessions/{client.session_id}/finish"
            for _ in range(2):  # the answer to the first may have been lost
                client.ask(finish, {"reason": {"type": "success"}, "detail": "done"})
            beat = {"session_id": client.session_id, "type": "session_heartbeat"}
            assert client.send("session_heartbeat", beat).status_code == 410  # which ends them
            assert client.send("create_model", client.create_model_request()).status_code == 410
            assert client.send("sessions/nobody's/finish", {}).status_code == 404
            other = Client(client.http)
            other.create_model()  # behind which the first is let go
            assert model_id not in engine.models

    def test_what_is_said_of_them_is_bounded(self, engine):
        with clients(engine, limits=Limits(max_metadata_bytes=100)) as client:
            large = {"user_metadata": {"a": "b" * 100}}
            answer = client.send("create_session", {"tags": [], "sdk_version": "0.38.0"} | large)
            assert answer.status_code == 400
            assert answer.json()["detail"].startswith("max_metadata_bytes: ")
            answer = client.send("create_model", client.create_model_request(**large))
            assert answer.json()["detail"].startswith("max_metadata_bytes: ")
            _, load = client.load_request("tinker://a/weights/b", **large)
            answer = client.send("load_weights", load)
            assert answer.json()["detail"].startswith("max_metadata_bytes: ")


def test_flags_that_are_asked_for_again_and_again(client):
    flags = client.ask("client/dynamic_config", {"sdk_version": "0.38.0"})
    assert flags["sample_cancel_enabled"] is True
    assert flags["refresh_interval_sec"] >= 10


class TestTheOptimizer:
    def test_is_adamw_and_no_other(self, client):
        other = {"type": "dimuon", "version": 1}
        answer = client.send("create_model", client.create_model_request(optimizer_config=other))
        assert answer.status_code == 400
        assert "optimizer_config" in answer.json()["detail"]
        model_id = client.create_model()
        step = {"model_id": model_id, "type": "optim_step"}
        answer = client.send("optim_step", step | {"optimizer_params": {"type": "dimuon"}})
        assert answer.status_code == 400
        assert "optimizer_params" in answer.json()["detail"]
