"""What was found out about a trainer is held against what it does, at every step."""

from __future__ import annotations

import dataclasses
import logging
import threading

import httpx
import numpy as np
import pytest

from mintjax import AdamParams, Datum, ModelInput, ServiceClient, objectives
from mintjax.client import remembered
from mintjax.errors import UnknownReductionError
from mintjax.local import DIALECTS, Dialect, Engine, trainer
from mintjax.local.app import application
from mintjax.local.engine import Engine as EngineType
from mintjax.step.reduction import SUM, Reduction
from mintjax.tensors import TensorData

from ..data import flat
from .double import ADDRESS, Answer

NANO = "mintjax/nano"
UNSTATED = Dialect(states_reduction=False)
OF_REQUEST = Reduction(per_request="weights")
OF_SEQUENCE = Reduction("weights", per_step="datums")
PAIRWISE = objectives.bradley_terry()


def make(sizes=(9, 4, 12, 6), seed=5):
    """Datums for every objective here, with ratios on both sides of the bounds."""
    rng = np.random.default_rng(seed)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n).tolist()),
            {
                "target_tokens": rng.integers(0, 256, n),
                "weights": np.ones(n, np.float32),
                "logprobs": rng.normal(-5.55, 0.2, n).astype(np.float32),
                "advantages": rng.normal(0, 1, n).astype(np.float32),
            },
        )
        for n in sizes
    ]


def accumulated(service, engine, objective=PAIRWISE, data=None):
    with service.create_lora_training_client(NANO, 4, seed=1) as model:
        output = model.forward_backward_custom(data or make(), objective).result()
        return flat(engine.gradient(model.model_id)), output


def close(got, expected):
    return np.linalg.norm(got - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.fixture(scope="module")
def true(engine):
    """The gradient of an objective, by a trainer that sums."""
    found = {}

    def gradient(objective=PAIRWISE):
        if repr(objective) not in found:
            with trainer(engine) as service:
                found[repr(objective)] = accumulated(service, engine, objective)[0]
        return found[repr(objective)]

    return gradient


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "mintjax.client")
    return lambda words: [r.getMessage() for r in caplog.records if words in r.getMessage()]


def averages(monkeypatch, concerns, reports_mean=False):
    """Makes the embedded trainer divide some losses by the number of their tokens."""
    plain = EngineType.forward_backward

    def forward_backward(self, model_id, data, loss_fn, config=None, *rest):
        if not concerns(loss_fn):
            return plain(self, model_id, data, loss_fn, config, *rest)
        tokens = sum(datum.model_input.length for datum in data)
        name = "weights" if loss_fn == "cross_entropy" else "advantages"
        scaled = [
            Datum(
                d.model_input,
                {**d.loss_fn_inputs, name: np.asarray(d.loss_fn_inputs[name], np.float32) / tokens},
            )
            for d in data
        ]
        output = plain(self, model_id, scaled, loss_fn, config, *rest)
        if not reports_mean:
            output.metrics["loss:sum"] *= tokens
        return output

    monkeypatch.setattr(EngineType, "forward_backward", forward_backward)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo"])
def test_a_trainer_that_averages_losses_of_policies_only(loss_fn, true, monkeypatch):
    """It reports sums all the same. Cross-entropy was measured, and so only it is used."""
    objective = getattr(objectives, loss_fn)()
    expected = true(objective)
    averages(monkeypatch, lambda name: name != "cross_entropy")
    with Engine() as engine, trainer(engine, like=UNSTATED) as service:
        got, output = accumulated(service, engine, objective)
        assert output.route == "two_pass"
        assert close(got, expected)


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro"])
def test_a_sum_that_is_promised_is_held_against_what_is_reported_of_every_loss(
    loss_fn, true, monkeypatch
):
    objective = getattr(objectives, loss_fn)()
    with Engine() as engine, trainer(engine) as service:
        got, output = accumulated(service, engine, objective)
        assert output.route == "by_name"
        assert close(got, true(objective))
    averages(monkeypatch, lambda name: name != "cross_entropy", reports_mean=True)
    with (
        Engine() as engine,
        trainer(engine) as service,
        pytest.raises(UnknownReductionError, match="is not the sum of the losses"),
    ):
        accumulated(service, engine, objective)


def test_a_promise_that_was_broken_is_not_believed_again(true, monkeypatch, lines):
    expected = true()
    averages(monkeypatch, lambda name: True, reports_mean=True)
    with Engine() as engine, trainer(engine) as service:  # which says that it sums
        with pytest.raises(UnknownReductionError, match="measures the trainer anew"):
            accumulated(service, engine)
        got, _ = accumulated(service, engine)
        assert close(got, expected)
        [line] = lines("measured by")
        assert "divided by the number of tokens of the request" in line


def test_the_bridge_holds_the_sum_too(monkeypatch):
    averages(monkeypatch, lambda name: True, reports_mean=True)
    with (
        Engine() as engine,
        trainer(engine) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
    ):
        rows = model.logprobs(make())
        with pytest.raises(UnknownReductionError, match="is not the sum of the losses"):
            model.backward(make(), rows, rows)


@pytest.mark.parametrize("was", [SUM, OF_REQUEST], ids=str)
def test_a_report_that_changes_is_a_trainer_that_has_changed(was, true, monkeypatch):
    """Also where the trainer divides, and reported sums while it was measured."""
    expected = true()
    with Engine(reduction=was) as engine, trainer(engine, like=UNSTATED) as service:
        assert close(accumulated(service, engine)[0], expected)
        averages(monkeypatch, lambda name: True, reports_mean=True)
        with pytest.raises(UnknownReductionError, match="is not the sum of the losses"):
            accumulated(service, engine)
        if was == SUM:  # the other is then divided twice, which is none of those known here
            assert close(accumulated(service, engine)[0], expected)


def reports_tokens(monkeypatch):
    """Makes the embedded trainer return each token's loss, as SkyRL does; it may clip advantages.

    Returns:
        A dict, whose ``clip`` is the largest advantage that it takes as it is.
    """
    plain, settings = EngineType.forward_backward, {"clip": np.inf}

    def forward_backward(self, model_id, data, loss_fn, *rest):
        if loss_fn == "importance_sampling":
            data = [
                Datum(
                    d.model_input,
                    {
                        **d.loss_fn_inputs,
                        "advantages": np.clip(
                            d.loss_fn_inputs["advantages"], -settings["clip"], settings["clip"]
                        ),
                    },
                )
                for d in data
            ]
        output = plain(self, model_id, data, loss_fn, *rest)
        for datum, one in zip(data, output.loss_fn_outputs, strict=True):
            inputs, logprobs = datum.loss_fn_inputs, np.asarray(one["logprobs"])
            losses = -inputs["weights"] * logprobs
            if loss_fn == "importance_sampling":
                losses = -np.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]
            one["elementwise_loss"] = TensorData(losses.astype(np.float32))
        return output

    monkeypatch.setattr(EngineType, "forward_backward", forward_backward)
    return settings


def test_losses_of_tokens_are_held_against_what_was_sent(true, monkeypatch):
    """SkyRL reports no sum. A clip of large advantages is found when it first clips one."""
    expected = true()
    settings = reports_tokens(monkeypatch)
    with Engine(reduction=OF_SEQUENCE) as engine, trainer(engine, like=UNSTATED) as service:
        got, output = accumulated(service, engine)
        assert "loss:sum" not in {name for name in output.metrics if "surrogate" in name}
        assert close(got, expected)
        settings["clip"] = 0.1
        with pytest.raises(UnknownReductionError, match="is not the sum of the losses"):
            accumulated(service, engine)


class Interrupted(httpx.ASGITransport):
    """Refuses connections while it is told to, as a trainer that is being restarted does."""

    down = 0

    async def handle_async_request(self, request):
        if self.down:
            self.down -= 1
            raise httpx.ConnectError("Connection refused")
        return await super().handle_async_request(request)


@pytest.mark.parametrize("now", [SUM, OF_REQUEST, OF_SEQUENCE], ids=str)
def test_a_trainer_that_was_away_is_measured_again(now, true, lines):
    """It kept its sessions in a file, as SkyRL does, and is started with other settings."""
    expected = true()
    with (
        Engine(reduction=OF_REQUEST) as engine,
        application(engine, dialect=UNSTATED) as app,
        ServiceClient(ADDRESS, transport=(network := Interrupted(app))) as service,
    ):
        assert close(accumulated(service, engine)[0], expected)
        engine.reduction = now
        network.down = 1
        assert close(accumulated(service, engine)[0], expected)
        first, second = (int(one.split("by ")[-1].split()[0]) for one in lines("measured by"))
        assert (second < first) == (now == OF_REQUEST)  # it is confirmed, or measured anew
        assert close(accumulated(service, engine)[0], expected)
        assert len(lines("measured by")) == 2


@pytest.mark.parametrize(
    ("status", "headers", "outages"),
    [(502, {}, 1), (503, {}, 1), (503, {"retry-after": "0"}, 0), (500, {}, 0), (429, {}, 0)],
)
def test_who_is_only_busy_was_not_away(connect, trainer, status, headers, outages):
    service = connect()
    model = service.create_lora_training_client("tiny")
    trainer.faults["forward"] = [Answer(status, {"detail": "no"}, headers)]
    model.forward(make()).result(10)
    assert service._connection.transport.outages == outages


HATCHERY = DIALECTS["hatchery-0.3"]


def divides_gradients(monkeypatch):
    """Makes the trainer's own requests divide by the number of datums, and say nothing of it."""
    plain = EngineType.accumulate

    def accumulate(self, model_id, data, grads):
        return plain(self, model_id, data, [grad / len(data) for grad in grads]) * len(data)

    monkeypatch.setattr(EngineType, "accumulate", accumulate)


def test_requests_that_take_gradients_are_tried_before_they_are_trusted(true, monkeypatch, lines):
    expected = true()
    divides_gradients(monkeypatch)
    dialect = dataclasses.replace(HATCHERY, adam_limits={})  # so that one model is enough
    with (
        Engine(reduction=HATCHERY.reduction) as engine,
        trainer(engine, like=dialect) as service,
    ):
        got, output = accumulated(service, engine)
        assert output.route == "two_pass"
        assert close(got, expected)
    assert len(lines("do not add the gradients that they are sent")) == 1


def test_requests_that_take_gradients_are_tried_again_after_the_trainer_was_away(true, monkeypatch):
    expected = true()
    with (
        Engine(reduction=HATCHERY.reduction) as engine,
        application(engine, dialect=dataclasses.replace(HATCHERY, adam_limits={})) as app,
        ServiceClient(ADDRESS, transport=(network := Interrupted(app))) as service,
    ):
        assert accumulated(service, engine)[1].route == "by_gradient"
        divides_gradients(monkeypatch)
        network.down = 1
        got, output = accumulated(service, engine)
        assert output.route == "two_pass"
        assert close(got, expected)


def test_requests_that_take_gradients_are_tried_once(true, lines):
    with (
        Engine(reduction=HATCHERY.reduction) as engine,
        trainer(engine, like=HATCHERY) as service,
    ):
        for _ in range(2):
            got, output = accumulated(service, engine)
            assert output.route == "by_gradient"
            assert close(got, true())
    [line] = lines("takes gradients of logprobs")
    assert "steps on a throwaway model have shown" in line
    assert not lines("makes of the losses")


def test_passes_that_disagree_are_told_once(monkeypatch, lines):
    """As those of a trainer do that drops out, or whose model somebody else trains."""
    plain = EngineType.forward

    def forward(self, model_id, *rest):
        output = plain(self, model_id, *rest)
        for one in output.loss_fn_outputs:
            one["logprobs"] = TensorData(one["logprobs"].to_numpy() - np.float32(0.5))
        return output

    with Engine() as engine, trainer(engine) as service:
        accumulated(service, engine)
        assert not lines("disagree")
        monkeypatch.setattr(EngineType, "forward", forward)
        for _ in range(2):
            accumulated(service, engine)
    [line] = lines("disagree")
    assert "0.5 nats" in line


def test_another_learning_rate_than_the_one_sent_is_told_once(monkeypatch, lines):
    plain = EngineType.optim_step

    def optim_step(self, model_id, params):
        answer = plain(self, model_id, params)
        answer.metrics = {"skyrl.ai/learning_rate": params.learning_rate / 2}
        return answer

    monkeypatch.setattr(EngineType, "optim_step", optim_step)
    with (
        Engine() as engine,
        trainer(engine) as service,
        service.create_lora_training_client(NANO, 4) as model,
    ):
        for _ in range(2):
            model.forward_backward(make(), "cross_entropy").result()
            model.optim_step(AdamParams(learning_rate=1e-3)).result()
    [line] = lines("learning rate")
    assert "0.0005" in line
    assert "0.001 " in line


def test_a_home_that_cannot_be_found_changes_nothing(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(remembered.sys, "platform", "linux")

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(remembered.Path, "home", nowhere)
    remembered.remember("http://x", OF_REQUEST)
    assert remembered.reduction_of("http://x") is None


def test_a_cache_that_many_write_is_whole_at_any_time(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered.remember("http://kept", OF_REQUEST)
    ended = threading.Event()

    def write(name):
        for _ in range(40):
            remembered.remember(name, OF_SEQUENCE)
            remembered.remember(name, None)

    writers = [threading.Thread(target=write, args=(f"http://{i}",)) for i in range(3)]
    for writer in writers:
        writer.start()
    while not ended.is_set():
        if not any(writer.is_alive() for writer in writers):
            ended.set()
        # An entry of another's may be lost, which costs a measurement; none is ever another one.
        found = remembered.reduction_of("http://kept")
        assert found is None or found[0] == OF_REQUEST
        assert b"kept" in remembered.cache_file().read_bytes()
    assert [path.name for path in remembered.cache_file().parent.iterdir()] == ["reductions.json"]


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered.remember("http://x", OF_REQUEST)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered.os, "replace", full)
    remembered.remember("http://x", OF_SEQUENCE)
    assert remembered.reduction_of("http://x")[0] == OF_REQUEST
    assert [path.name for path in remembered.cache_file().parent.iterdir()] == ["reductions.json"]
