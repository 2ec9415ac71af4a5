"""Requests as the official client 0.38 sends them, over a socket."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from mintjax.local import Engine, Limits, running_server
from mintjax.protocol import messages, protobuf
from mintjax.types import SampleResponse

from .conftest import BASE_MODEL

ADAM = {"type": "adamw"}
LORA = {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}


class Client:
    """The official client's requests, as they go over the wire."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session_id = self.ask(
            "create_session",
            {
                "tags": [],
                "user_metadata": {"owner": "me"},
                "sdk_version": "0.38.0",
                "project_id": None,
                "display_name": "a name",
                "type": "create_session",
            },
        )["session_id"]
        self._models = 0
        self._requests: dict[str, int] = {}

    def send(self, path: str, body: Any, method: str = "POST") -> httpx.Response:
        return self.http.request(method, f"/api/v1/{path}", json=body)

    def ask(self, path: str, body: Any = None, method: str = "POST", **params: Any) -> Any:
        """The answer to a request that is answered at once."""
        answer = self.http.request(method, f"/api/v1/{path}", json=body, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, accepted: httpx.Response) -> Any:
        assert accepted.status_code == 200, accepted.text
        while True:
            question = {"request_id": accepted.json()["request_id"], "allow_metadata_only": True}
            result = self.ask("retrieve_future", question)
            if result.get("type") != "try_again":
                return result

    def call(self, path: str, body: Any) -> Any:
        return self.result(self.send(path, body))

    def of_model(self, endpoint: str, model_id: str, **body: Any) -> Any:
        """The result of the next request of a model."""
        number = self._requests[model_id] = self._requests.get(model_id, 0) + 1
        request = {"model_id": model_id, "seq_id": number, "type": endpoint}
        return self.call(endpoint, request | body)

    def create_model_request(self, **changes: Any) -> dict[str, Any]:
        self._models += 1
        return {
            "session_id": self.session_id,
            "model_seq_id": self._models - 1,
            "base_model": BASE_MODEL,
            "lora_config": LORA,
            "optimizer_config": ADAM,
            "type": "create_model",
        } | changes

    def create_model(self, **changes: Any) -> str:
        return self.call("create_model", self.create_model_request(**changes))["model_id"]

    def load_request(self, saved: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        """The id that the client takes for granted, and the request that makes the model."""
        self._models += 1
        number = self._models - 1
        body = {
            "session_id": self.session_id,
            "model_seq_id": number,
            "path": saved,
            "optimizer": True,
            "type": "load_weights",
        }
        return f"{self.session_id}:train:{number}", body | changes

    def step(self, model_id: str, **adam_params: float) -> dict[str, Any]:
        datum = {
            "model_input": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
                "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
            },
        }
        given = {"data": [datum], "loss_fn": "cross_entropy"}
        done = self.of_model("forward_backward", model_id, forward_backward_input=given)
        self.of_model("optim_step", model_id, adam_params={"learning_rate": 1e-2, **adam_params})
        return done["metrics"]


@contextmanager
def clients(engine, **options) -> Generator[Client]:
    with running_server(engine, **options) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield Client(http)


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


def sample_request(opened: str, number: int, **params: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": opened,
        "seq_id": number,
        "num_samples": 1,
        "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2, "temperature": 1.0, "top_k": -1, "top_p": 1.0}
        | params,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "type": "sample",
    }


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


@pytest.fixture
def runs(tmp_path):
    """A trainer whose checkpoints nobody else has seen, and its first model."""
    with Engine(directory=tmp_path) as engine, clients(engine) as client:
        yield client, client.create_model(user_metadata={"run": "one"})


def checkpoints_of(client, model_id):
    path = f"training_runs/{model_id}/checkpoints"
    return client.ask(path, method="GET")["checkpoints"]


class TestCheckpoints:
    def test_are_listed_with_what_was_said_of_them(self, runs):
        client, model_id = runs
        before = datetime.now(UTC)
        said = {"user_metadata": {"step": "1"}, "ttl_seconds": 3600, "overwrite": False}
        first = client.of_model("save_weights", model_id, path="a", **said)["path"]
        client.of_model("save_weights", model_id, path="b", overwrite=False)
        save = "save_weights_for_sampler"
        sampler = client.of_model(save, model_id, path="c", kind="snapshot")["path"]
        client.of_model(save, model_id, sampling_session_seq_id=0, kind="snapshot")
        listed = checkpoints_of(client, model_id)
        assert [one["checkpoint_id"] for one in listed] == [
            "sampler_weights/c",
            "weights/b",
            "weights/a",
        ]
        assert [one["checkpoint_type"] for one in listed] == ["sampler", "training", "training"]
        made = listed[2]
        assert made["tinker_path"] == first
        assert made["user_metadata"] == {"step": "1"}
        assert made["size_bytes"] > 100
        assert made["public"] is False
        when, ends = (datetime.fromisoformat(made[name]) for name in ("time", "expires_at"))
        assert before <= when <= datetime.now(UTC)
        assert ends - when == timedelta(seconds=3600)
        assert listed[1]["expires_at"] is None
        everything = client.ask("checkpoints", method="GET", limit=2, offset=1)
        assert everything["checkpoints"] == listed[1:]
        assert everything["cursor"] == {"offset": 1, "limit": 2, "total_count": 3}

        run = client.ask(f"training_runs/{model_id}", method="GET", access_scope="owned")
        assert run["training_run_id"] == model_id
        assert (run["base_model"], run["lora_rank"]) == (BASE_MODEL, LORA["rank"])
        assert run["user_metadata"] == {"run": "one"}
        assert run["last_checkpoint"] == listed[1]
        assert run["last_sampler_checkpoint"]["tinker_path"] == sampler
        client.call("unload_model", {"model_id": model_id, "type": "unload_model"})
        again = client.ask(f"training_runs/{model_id}", method="GET")
        assert again == run | {"last_request_time": again["last_request_time"]}
        info = client.ask("weights_info", {"tinker_path": first})
        assert (info["base_model"], info["lora_rank"]) == (BASE_MODEL, LORA["rank"])
        assert info["optimizer_config"] == ADAM

    def test_are_not_replaced_unless_it_is_said(self, runs):
        client, model_id = runs
        path = client.of_model("save_weights", model_id, path="a", user_metadata={"n": "1"})["path"]
        failed = client.of_model("save_weights", model_id, path="a", overwrite=False)
        assert failed["category"] == "user"
        assert path in failed["error"]
        assert "overwrite" in failed["error"]
        [kept] = checkpoints_of(client, model_id)
        client.of_model("save_weights", model_id, path="a", overwrite=True)
        [replaced] = checkpoints_of(client, model_id)
        assert kept["user_metadata"] == {"n": "1"}
        assert replaced["user_metadata"] is None  # the mapping is replaced too
        client.of_model("save_weights", model_id, path="a")  # as clients that know no overwrite

    def test_are_published_and_expire_and_are_deleted(self, runs, monkeypatch):
        client, model_id = runs
        path = client.of_model("save_weights", model_id, path="a")["path"]
        client.of_model("save_weights", model_id, path="b", ttl_seconds=7200)
        one = f"training_runs/{model_id}/checkpoints/weights/a"
        for _ in "ab":
            client.ask(f"{one}/publish")
            assert checkpoints_of(client, model_id)[1]["public"] is True
        client.ask(f"{one}/ttl", {"ttl_seconds": 3600}, "PUT")
        client.ask(f"{one}/publish", method="DELETE")
        a = checkpoints_of(client, model_id)[1]
        assert a["public"] is False
        assert a["expires_at"] is not None
        client.ask(f"{one}/ttl", {"ttl_seconds": None}, "PUT")
        assert checkpoints_of(client, model_id)[1]["expires_at"] is None
        client.ask(f"{one}/ttl", {"ttl_seconds": 3600}, "PUT")
        client.ask(f"{one}/publish")
        now = time.time()
        monkeypatch.setattr("mintjax.local.checkpoints.time.time", lambda: now + 3601)
        assert [one["checkpoint_id"] for one in checkpoints_of(client, model_id)] == ["weights/b"]
        failed = client.of_model("load_weights", model_id, path=path, optimizer=True)
        assert "there is no checkpoint" in failed["error"]
        assert client.send("weights_info", {"tinker_path": path}).status_code == 404
        # Another of that name has nothing of what was said of the first.
        client.of_model("save_weights", model_id, path="a", overwrite=False)
        a = checkpoints_of(client, model_id)[0]
        assert (a["checkpoint_id"], a["public"], a["expires_at"]) == ("weights/a", False, None)
        client.ask(one, method="DELETE")
        assert client.send(one, None, "DELETE").status_code == 404
        assert [one["checkpoint_id"] for one in checkpoints_of(client, model_id)] == ["weights/b"]

    def test_that_have_expired_are_removed(self, tmp_path, monkeypatch):
        with Engine(directory=tmp_path) as engine, clients(engine) as client:
            model_id = client.create_model()
            client.of_model("save_weights", model_id, path="a", ttl_seconds=3600)
            client.of_model("save_weights", model_id, path="b", ttl_seconds=10_000)
            now = time.time()
            monkeypatch.setattr("mintjax.local.checkpoints.time.time", lambda: now + 3601)
            client.of_model("save_weights", model_id, path="c")
            names = {file.name for file in tmp_path.rglob("*.safetensors")}
            assert names == {"b.safetensors", "c.safetensors"}
            monkeypatch.setattr("mintjax.local.checkpoints.time.time", lambda: now + 10_001)
        with Engine(directory=tmp_path):
            assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["c.safetensors"]

    @pytest.mark.parametrize(
        ("method", "path", "body", "status"),
        [
            ("GET", "training_runs/nobody", None, 404),
            ("GET", "training_runs/nobody/checkpoints", None, 404),
            ("GET", "training_runs/..%2F..", None, 404),
            ("GET", f"training_runs/{'a' * 5000}", None, 404),
            ("GET", "training_runs/*/checkpoints", None, 404),
            ("GET", "training_runs?limit=0", None, 422),
            ("GET", "training_runs?limit=-1", None, 422),
            ("GET", "training_runs?offset=-1", None, 422),
            ("GET", "checkpoints?limit=many", None, 422),
            ("GET", f"sessions?limit={2**53}", None, 200),
            ("GET", f"checkpoints?offset={2**53}", None, 200),
            ("GET", f"checkpoints?offset={2**70}", None, 422),
            ("GET", "sessions/nobody", None, 404),
            ("DELETE", "training_runs/nobody/checkpoints/weights/a", None, 404),
            ("DELETE", "training_runs/nobody/checkpoints/secrets/a", None, 400),
            ("DELETE", "training_runs/nobody/checkpoints/weights/%2e%2e", None, 400),
            ("DELETE", "training_runs/nobody/checkpoints/weights/.a", None, 400),
            ("DELETE", "training_runs/%2e%2e/checkpoints/weights/a", None, 400),
            ("DELETE", "training_runs/..%00/checkpoints/weights/a", None, 400),
            ("POST", "training_runs/nobody/checkpoints/weights/a/publish", None, 404),
            ("PUT", "training_runs/nobody/checkpoints/weights/a/ttl", {"ttl_seconds": 3600}, 404),
            ("PUT", "training_runs/nobody/checkpoints/weights/a/ttl", {"ttl_seconds": 3599}, 400),
            ("PUT", "training_runs/nobody/checkpoints/weights/a/ttl", {"ttl_seconds": 10**9}, 400),
            ("PUT", "training_runs/nobody/checkpoints/weights/a/ttl", {"ttl_seconds": "a"}, 422),
            ("PUT", "training_runs/nobody/checkpoints/weights/a/ttl", {}, 422),
        ],
    )
    def test_what_is_not_there_or_cannot_be(self, client, method, path, body, status):
        answer = client.send(path, body, method)
        assert answer.status_code == status, answer.text

    @pytest.mark.parametrize(
        ("path", "change", "named"),
        [
            ("save_weights", {"ttl_seconds": 3599}, "ttl_seconds"),
            ("save_weights", {"user_metadata": {"a": "b" * 20_000}}, "max_metadata_bytes"),
            ("save_weights", {"user_metadata": {"a": 1}}, "user_metadata"),
            ("save_weights_for_sampler", {"ttl_seconds": 10**9}, "ttl_seconds"),
            ("save_weights_for_sampler", {"kind": "inflight"}, "path"),
            ("save_weights_for_sampler", {"kind": "frozen"}, "kind"),
        ],
    )
    def test_what_cannot_be_said_of_them(self, client, trained, path, change, named):
        body = {"model_id": trained[0], "path": "never", "type": path} | change
        answer = client.send(path, body)
        assert answer.status_code in (400, 422)
        assert named in answer.json()["detail"]

    def test_of_weights_that_change_are_sampled_as_they_are_now(self, runs):
        client, model_id = runs

        def saved(kind):
            body = {"sampling_session_seq_id": 0, "kind": kind}
            answer = client.of_model("save_weights_for_sampler", model_id, **body)
            return answer["sampling_session_id"]

        def logprobs(opened):
            request = sample_request(opened, 0) | {"prompt_logprobs": True}
            return client.call("asample", request)["prompt_logprobs"][1:]

        kept, first = saved("snapshot"), saved("inflight")
        before = logprobs(kept)
        assert logprobs(first) == before
        client.step(model_id)
        assert logprobs(first) == before
        second = saved("inflight")
        assert logprobs(first) == logprobs(second) != before
        assert logprobs(kept) == before
        assert checkpoints_of(client, model_id) == []

    def test_of_runs_of_one_project(self, runs):
        client, model_id = runs
        project = {"tags": [], "sdk_version": "0.38.0", "project_id": "p"}
        client.session_id = client.ask("create_session", project)["session_id"]
        other = client.create_model()
        listed = client.ask("training_runs", method="GET", project_id="p")
        assert [one["training_run_id"] for one in listed["training_runs"]] == [other]
        listed = client.ask("training_runs", method="GET", limit=1)
        assert len(listed["training_runs"]) == 1
        assert listed["cursor"]["total_count"] == 2
        assert {one["training_run_id"] for one in listed["training_runs"]} <= {other, model_id}
        assert client.session_id in client.ask("sessions", method="GET", limit=1)["sessions"]


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
