"""Runs, checkpoints and sessions are listed; checkpoints are published, expire and are deleted."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from mintjax.local import Engine

from .conftest import BASE_MODEL
from .official import ADAM, LORA, Client, clients, sample_request


@pytest.fixture(scope="module")
def client(engine):
    with clients(engine) as client:
        yield client


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
    def test_what_cannot_be_said_of_them(self, client, path, change, named):
        body = {"model_id": client.create_model(), "path": "never", "type": path} | change
        answer = client.send(path, body)
        assert answer.status_code in (400, 422)
        assert named in answer.json()["detail"]

    def test_of_samplers_alone_go_with_their_session(self, runs, tmp_path):
        client, model_id = runs
        save = "save_weights_for_sampler"
        path = client.of_model(save, model_id, path="kept")["path"]
        client.of_model(save, model_id, sampling_session_seq_id=0)
        client.of_model(save, model_id, sampling_session_seq_id=1, kind="inflight")
        opened = {"session_id": client.session_id, "sampling_session_seq_id": 2}
        client.ask("create_sampling_session", opened | {"model_path": path})
        assert len(list(tmp_path.rglob("*.safetensors"))) == 3
        client.ask(f"sessions/{client.session_id}/finish", {"reason": {"type": "success"}})
        Client(client.http).create_model()  # behind which all that is done
        assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["kept.safetensors"]

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

    def test_are_copied_as_the_model_of_a_number_of_a_session(self, runs):
        """As the official client takes it for granted, whose copies are made by ``models``."""
        client, model_id = runs
        path = client.of_model("save_weights", model_id, path="a")["path"]
        asked = {"source_path": path, "session_id": client.session_id, "model_seq_id": 7}
        copied = client.ask("copy_weights", asked)["tinker_path"]
        assert copied == f"tinker://{client.session_id}:train:7/weights/a"
        model, request = client.load_request(copied)
        client.call("load_weights", request)
        assert client.ask("get_info", {"model_id": model, "type": "get_info"})["model_id"] == model
        again = client.send("copy_weights", asked)
        assert (again.status_code, "already" in again.text) == (400, True)
        for missing in ({}, {"session_id": client.session_id}):
            answer = client.send("copy_weights", {"source_path": path} | missing)
            assert answer.status_code == 400
            assert "destination_project_id" in answer.json()["detail"]

    def test_are_in_no_archive_and_in_no_other_format(self, client):
        """Clients do not ask again what is answered with 400, and what follows has its turn."""
        model_id = client.create_model()
        path = f"training_runs/{model_id}/checkpoints/weights/a/archive"
        saved = {"model_id": model_id, "path": "a", "seq_id": 1, "type": "save_weights_external"}
        for method, at, body in (("GET", path, None), ("POST", "save_weights_external", saved)):
            answer = client.send(at, body, method)
            assert answer.status_code == 400
            assert "safetensors files in the folder" in answer.json()["detail"]
        request = {"model_id": model_id, "path": "a", "seq_id": 2, "type": "save_weights"}
        assert client.call("save_weights", request)["path"].endswith("/weights/a")

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
