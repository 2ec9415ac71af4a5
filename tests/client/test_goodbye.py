"""A client that ends tells the trainer, and withdraws what nobody waits for."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from contextlib import nullcontext

import httpx
import pytest

from mintjax import ModelInput, SamplingParams
from mintjax.client import ServiceClient
from mintjax.errors import ClosedError
from mintjax.local import DIALECTS, Engine, running_server, trainer
from mintjax.local.app import application
from mintjax.step.reduction import SUM

from .data import DATA
from .double import ADDRESS, QUICK, Hold, Lose

NANO = "mintjax/nano"
PROMPT = ModelInput.from_ints([1, 2, 3])


def finish_of(double):
    return [(p, body) for p, body, _ in double.requests if p.endswith("/finish")]


def test_a_session_is_finished_and_its_models_are_let_go(engine):
    with running_server(engine) as url:
        service = ServiceClient(url)
        model = service.create_lora_training_client(NANO, 4)
        assert model.model_id in engine.models
        closed = service.close("success", "training is complete")
        assert closed.result() is None
        assert asyncio.run(_awaited(closed)) is None
        with ServiceClient(url) as another:  # what is sent after it finds the model gone
            another.create_lora_training_client(NANO, 4)
            assert model.model_id not in engine.models


async def _awaited(future):
    return await future


@pytest.mark.parametrize(
    ("raised", "status"),
    [(None, "success"), (ValueError, "errored"), (KeyboardInterrupt, "interrupted")],
)
def test_how_a_block_ended_is_told(connect, trainer, raised, status):
    service = connect()
    service.create_lora_training_client("tiny")
    with nullcontext() if raised is None else pytest.raises(raised), service:
        if raised is not None:
            raise raised
    [(path, body)] = finish_of(trainer)
    assert path == "sessions/session-1/finish"
    assert body == {"reason": {"type": status}, "detail": None}
    service.close()
    assert len(finish_of(trainer)) == 1


def test_a_client_without_a_session_says_nothing(connect, trainer):
    connect().close()
    assert trainer.requests == []


@pytest.mark.parametrize("fault", [Lose(), Lose("after"), Hold()], ids=["lost", "cut", "hangs"])
def test_a_trainer_that_does_not_answer_delays_nothing(connect, trainer, fault, caplog):
    service = connect()
    model = service.create_lora_training_client("tiny")
    hold = Hold()
    trainer.faults["forward"] = [hold]
    pending = model.forward(DATA)
    trainer.faults["sessions/session-1/finish"] = [fault]
    service.close()
    with pytest.raises(ClosedError):
        pending.result(0)
    assert not service._connection.background.thread.is_alive()
    assert not [one for one in caplog.records if one.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("name", DIALECTS)
def test_real_trainers_have_no_such_request_and_nobody_is_told(name, caplog):
    with trainer(like=name) as service:
        service.create_sampling_client(base_model=NANO)
    assert not [one for one in caplog.records if one.levelname in ("WARNING", "ERROR")]


class Watched(httpx.ASGITransport):
    """Keeps what was asked."""

    def __init__(self, app):
        super().__init__(app)
        self.asked = []

    async def handle_async_request(self, request):
        path = request.url.path.removeprefix("/api/v1/")
        response = await super().handle_async_request(request)
        self.asked.append((path, response.status_code))
        return response

    def statuses(self, path):
        return [status for at, status in self.asked if at == path]


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("like", [None, "skyrl-0.4"])
def test_a_sample_that_nobody_waits_for_is_withdrawn(like):
    dialect = DIALECTS[like] if like else None
    options = {"dialect": dialect} if dialect else {}
    with (
        Engine(reduction=dialect.reduction if dialect else SUM) as engine,
        application(engine, **options) as app,
        ServiceClient(ADDRESS, transport=(watched := Watched(app))) as service,
    ):
        sampler = service.create_sampling_client(base_model=NANO)
        endless = SamplingParams(max_tokens=200, temperature=1.0)
        future = sampler.sample(PROMPT, 64, endless)
        wait_until(lambda: watched.statuses("asample"))
        assert future.cancel()
        assert future.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(5)
        assert concurrent.futures.wait([future], 5).not_done == set()
        wait_until(lambda: watched.statuses("cancel_future"))
        assert watched.statuses("cancel_future") == [200 if like is None else 404]
        short = SamplingParams(max_tokens=1)
        assert len(sampler.sample(PROMPT, 1, short).result(30).sequences) == 1


def test_a_sample_that_was_never_sent_is_not_withdrawn(connect, trainer):
    sampler = connect().create_sampling_client(base_model="tiny")
    hold = Hold()
    trainer.faults["asample"] = [hold]
    first = sampler.sample(PROMPT, 1, SamplingParams(max_tokens=1))
    assert first.cancel()
    hold.release()
    sampler.sample(PROMPT, 1, SamplingParams(max_tokens=1)).result(10)
    assert "cancel_future" not in trainer.paths()


def test_what_waits_for_futures_sees_those_that_are_cancelled(connect, trainer):
    model = connect(retry_policy=QUICK).create_lora_training_client("tiny")
    hold = Hold()
    trainer.faults["forward"] = [hold]
    first, second = model.forward(DATA), model.forward(DATA)
    assert second.cancel()
    assert second.cancel()  # again, with the same answer
    assert concurrent.futures.wait([second], 5).not_done == set()
    assert list(concurrent.futures.as_completed([second], 5)) == [second]
    hold.release()
    first.result(5)
