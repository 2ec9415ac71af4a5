"""Runs, checkpoints and sessions, on the embedded trainer and on a scripted one."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from mintjax.client import RestClient
from mintjax.errors import BadRequestError, DataError, NotFoundError, RequestFailedError
from mintjax.local import Engine, trainer


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Engine(directory=tmp_path_factory.mktemp("checkpoints")) as engine, trainer(engine) as one:
        yield one


def test_a_run_and_its_checkpoints(service):
    rest = service.create_rest_client()
    model = service.create_lora_training_client("mintjax/nano", 4, user_metadata={"run": "one"})
    path = model.save_state("a", ttl_seconds=3600, user_metadata={"step": "1"}).result().path
    sampler = model.save_weights_for_sampler("b").result().path
    run = rest.get_training_run(model.model_id).result()
    assert run == rest.get_training_run_by_tinker_path(path).result()
    assert run.training_run_id == model.model_id
    assert (run.base_model, run.lora_rank) == ("mintjax/nano", 4)
    assert run.user_metadata == {"run": "one"}
    assert run in rest.list_training_runs(limit=1).result().training_runs
    newest, oldest = rest.list_checkpoints(model.model_id).result().checkpoints
    assert (newest.tinker_path, oldest.tinker_path) == (sampler, path)
    assert (newest.checkpoint_type, oldest.checkpoint_type) == ("sampler", "training")
    assert run.last_checkpoint == oldest
    assert oldest.training_run_id == model.model_id
    assert oldest.user_metadata == {"step": "1"}
    assert datetime.now(UTC) - oldest.time < timedelta(hours=1) == oldest.expires_at - oldest.time
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_mlp) == ("mintjax/nano", 4, True)
    page = rest.list_user_checkpoints(limit=1, offset=1).result()
    assert page.checkpoints == [oldest]
    assert page.cursor.total_count == 2

    with pytest.raises(RequestFailedError, match="overwrite=True"):
        model.save_state("a").result()
    model.save_state("a", overwrite=True).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, 7200).result()
    found = rest.list_checkpoints(model.model_id).result().checkpoints[0]
    assert found.public
    assert found.expires_at is not None
    assert found.user_metadata is None
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    found = rest.list_checkpoints(model.model_id).result().checkpoints[0]
    assert (found.public, found.expires_at) == (False, None)
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    rest.delete_checkpoint(model.model_id, found.checkpoint_id).result()
    assert rest.list_checkpoints(model.model_id).result().checkpoints == []
    with pytest.raises(NotFoundError, match="there is no checkpoint"):
        rest.delete_checkpoint_from_tinker_path(path).result()


def test_sessions_and_samplers(service):
    rest = service.create_rest_client()
    service.create_sampling_client(base_model="mintjax/nano")
    [session_id] = rest.list_sessions().result().sessions
    session = asyncio.run(rest.get_session_async(session_id))
    found = rest.get_sampler(session.sampler_ids[-1]).result()
    assert (found.base_model, found.model_path) == ("mintjax/nano", None)
    with pytest.raises(NotFoundError, match="nobody"):
        rest.get_session("nobody").result()


def test_a_copy_is_a_run_of_its_own_in_another_project(service, monkeypatch):
    rest = service.create_rest_client()
    model = service.create_lora_training_client("mintjax/nano", 4, seed=3)
    for path in (
        model.save_state("a", ttl_seconds=3600, user_metadata={"step": "1"}).result().path,
        model.save_weights_for_sampler("a").result().path,
    ):
        copied = rest.copy_weights(path, "archive", ttl_seconds=7200).result()
        run = rest.get_training_run_by_tinker_path(copied).result()
        assert run.training_run_id != model.model_id
        assert copied == path.replace(model.model_id, run.training_run_id)
        [one] = rest.list_checkpoints(run.training_run_id).result().checkpoints
        assert one.expires_at - one.time == timedelta(hours=2)
        [found] = rest.list_training_runs(project_id="archive").result().training_runs
        assert found == run
        assert rest.list_training_runs(project_id="other").result().training_runs == []
        rest.delete_checkpoint_from_tinker_path(copied).result()
    kept = rest.copy_weights(model.save_state("b").result().path, "archive").result()
    again = service.create_training_client_from_state_with_optimizer(kept)
    assert again.get_info().lora_rank == 4
    with pytest.raises(DataError, match="TINKER_PROJECT_ID"):
        service.copy_weights(kept)
    monkeypatch.setenv("TINKER_PROJECT_ID", "of the environment")
    copied = service.copy_weights(kept).result()
    runs = rest.list_training_runs(project_id="of the environment").result().training_runs
    assert [run.last_checkpoint.tinker_path for run in runs] == [copied]
    with pytest.raises(NotFoundError, match="there is no checkpoint"):
        service.copy_weights("tinker://nobody/weights/a").result()
    with pytest.raises(BadRequestError, match="ttl_seconds"):
        rest.copy_weights(kept, "archive", ttl_seconds=1).result()


def test_a_session_moves_into_a_project_with_its_runs(service):
    rest = service.create_rest_client()
    model = service.create_lora_training_client("mintjax/nano", 4)
    [session_id] = rest.list_sessions().result().sessions
    assert rest.list_training_runs(project_id="new").result().training_runs == []
    rest.assign_session_project(session_id, "new").result()
    listed = rest.list_training_runs(project_id="new").result().training_runs
    assert model.model_id in [run.training_run_id for run in listed]
    later = service.create_lora_training_client("mintjax/nano", 4)
    listed = rest.list_training_runs(project_id="new").result().training_runs
    assert later.model_id in [run.training_run_id for run in listed]
    with pytest.raises(NotFoundError, match="nobody"):
        rest.assign_session_project("nobody", "new").result()


class Recorded(httpx.AsyncBaseTransport):
    """Answers everything with nothing at all, and writes down what was asked."""

    def __init__(self):
        self.asked = []

    async def handle_async_request(self, request):
        body = await request.aread()
        self.asked.append((request.method, str(request.url), json.loads(body) if body else None))
        return httpx.Response(204)


def test_what_is_sent():
    transport = Recorded()
    rest = RestClient("http://localhost:1", api_key="tml-a", transport=transport)
    path = "tinker://session:train:0/weights/a%2f?b"
    rest.delete_checkpoint_from_tinker_path(path).result(5)
    rest.set_checkpoint_ttl_from_tinker_path("tinker://m/sampler_weights/a", 3600).result(5)
    rest.publish_checkpoint_from_tinker_path("tinker://m/weights/a").result(5)
    of_m = "http://localhost:1/api/v1/training_runs/m/checkpoints"
    weights = "http://localhost:1/api/v1/training_runs/session:train:0/checkpoints/weights"
    assert transport.asked == [
        ("DELETE", f"{weights}/a%252f%3Fb", None),
        ("PUT", f"{of_m}/sampler_weights/a/ttl", {"ttl_seconds": 3600}),
        ("POST", f"{of_m}/weights/a/publish", None),
    ]
    rest.close()


def test_what_cannot_be_asked():
    rest = RestClient("http://localhost:1", api_key="tml-a", transport=Recorded())
    for call in (
        lambda: rest.list_sessions(limit=0),
        lambda: rest.list_user_checkpoints(offset=-1),
        lambda: rest.get_training_run(""),
        lambda: rest.delete_checkpoint("m", "weights/.."),
    ):
        with pytest.raises(DataError):
            call()
    rest.close()
