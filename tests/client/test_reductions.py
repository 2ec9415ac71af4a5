"""A trainer that nobody has measured gets no gradient of a custom loss on trust."""

import json
import logging

import httpx
import numpy as np
import pytest

from mintjax import Datum, ModelInput, ServiceClient, objectives
from mintjax.client import remembered
from mintjax.client.reductions import PROMISE_A_SUM
from mintjax.errors import DataError, UnknownReductionError
from mintjax.local import Dialect, Engine, running_server, trainer
from mintjax.local.engine import Engine as EngineType
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.step.reduction import SUM, Reduction

from ..data import flat
from .double import ADDRESS, KEY, QUICK, Trainer

NANO = "mintjax/nano"
UNSTATED = Dialect(states_reduction=False)
HATCHERY = Reduction(per_request="weights")
PAIRWISE = objectives.bradley_terry()


def make(sizes=(4, 9, 6, 12)):
    rng = np.random.default_rng(5)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n).tolist()),
            {"target_tokens": rng.integers(0, 256, n), "weights": np.ones(n, np.float32)},
        )
        for n in sizes
    ]


def accumulated(service, engine, data):
    with service.create_lora_training_client(NANO, 4, seed=1) as model:
        model.forward_backward_custom(data, PAIRWISE).result()
        return flat(engine.gradient(model.model_id))


@pytest.fixture(scope="module")
def true_gradient(engine):
    with trainer(engine) as service:
        return accumulated(service, engine, make())


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "mintjax.client")
    return lambda words: [r.getMessage() for r in caplog.records if words in r.getMessage()]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    "reduction", [Reduction("weights", per_step="datums"), HATCHERY, SUM], ids=str
)
def test_the_first_custom_step_measures_once_and_goes_on(reduction, true_gradient, lines):
    """Also where a trainer returns a loss:sum, as this one does unless it divides by sequence."""
    with (
        Engine(reduction=reduction) as engine,
        trainer(engine, like=UNSTATED) as service,
    ):
        for _ in range(2):
            got = accumulated(service, engine, make())
            assert np.linalg.norm(got - true_gradient) <= 1e-3 * np.linalg.norm(true_gradient)
        assert not engine.models
    [line] = lines("measured by")
    assert "steps on a throwaway model in" in line
    assert "moved as predicted within" in line
    assert str(reduction) in line


def test_a_trainer_of_our_own_is_believed_and_nothing_is_measured(true_gradient, lines):
    with Engine(reduction=HATCHERY) as engine, trainer(engine) as service:
        got = accumulated(service, engine, make())
    assert np.linalg.norm(got - true_gradient) <= 1e-3 * np.linalg.norm(true_gradient)
    assert not lines("throwaway")


def divide_by_the_longest(monkeypatch):
    """Makes the embedded trainer divide by what no reduction known here does."""
    plain = EngineType.forward_backward

    def forward_backward(self, model_id, data, loss_fn, *rest):
        longest = max(datum.model_input.length for datum in data)
        data = [
            Datum(
                d.model_input,
                {
                    **d.loss_fn_inputs,
                    "weights": np.asarray(d.loss_fn_inputs["weights"], np.float32) / longest,
                },
            )
            for d in data
        ]
        return plain(self, model_id, data, loss_fn, *rest)

    monkeypatch.setattr(EngineType, "forward_backward", forward_backward)


def test_an_unknown_reduction_is_refused_and_nothing_is_sent(engine, monkeypatch):
    divide_by_the_longest(monkeypatch)
    with (
        trainer(engine, like=UNSTATED) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
    ):
        before = len(engine.models)
        for _ in range(2):
            with pytest.raises(UnknownReductionError, match="none of the reductions known here"):
                model.forward_backward_custom(make(), PAIRWISE).result()
        assert engine.model(model.model_id).num_datums == 0
        assert len(engine.models) == before  # throwaway models are unloaded after a failure, too
        model.forward_backward(make(), "cross_entropy").result()  # the trainer's own losses go on


def test_the_user_says_it_by_hand(true_gradient, lines):
    with Engine(reduction=HATCHERY) as engine, running_server(engine) as url:
        with ServiceClient(url, reduction=HATCHERY) as service:
            got = accumulated(service, engine, make())
        assert np.linalg.norm(got - true_gradient) <= 1e-3 * np.linalg.norm(true_gradient)
        assert not lines("throwaway")


def test_measuring_can_be_turned_off_and_that_is_said(true_gradient, lines):
    with (
        Engine(reduction=Reduction("weights", per_step="datums")) as engine,
        running_server(engine, like=UNSTATED) as url,
        ServiceClient(url, measure=False) as service,
    ):
        got = accumulated(service, engine, make())
    assert np.linalg.norm(got - true_gradient) > np.linalg.norm(true_gradient)
    assert len(lines("was not measured")) == 1
    assert not lines("throwaway")


def test_what_was_measured_is_kept_for_other_processes_and_confirmed(
    empty_cache, true_gradient, lines
):
    for reduction in (HATCHERY, HATCHERY, SUM):
        with (
            Engine(reduction=reduction) as engine,
            running_server(engine, port=0, like=UNSTATED) as url,
        ):
            entries = json.loads(remembered.cache_file().read_text()) if lines("steps") else {}
            remembered.cache_file().parent.mkdir(exist_ok=True)
            remembered.cache_file().write_text(json.dumps(dict.fromkeys([url], *entries.values())))
            with ServiceClient(url, KEY) as service:
                got = accumulated(service, engine, make())
        assert KEY not in remembered.cache_file().read_text()
        assert np.linalg.norm(got - true_gradient) <= 1e-3 * np.linalg.norm(true_gradient)
    took = [int(line.split("measured by ")[1].split()[0]) for line in lines("measured by")]
    assert took[1] < took[0]
    assert len(lines("no longer holds")) == 1


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"http://x": {"date": 3}}'])
def test_a_cache_that_cannot_be_read_is_none(empty_cache, content):
    path = remembered.cache_file()
    path.parent.mkdir()
    path.write_bytes(content)
    assert remembered.reduction_of("http://x") is None
    remembered.remember("http://x", HATCHERY)
    assert remembered.reduction_of("http://x")[0] == HATCHERY
    remembered.remember("http://x", None)
    assert remembered.reduction_of("http://x") is None


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remembered.remember("http://x", HATCHERY)
    assert remembered.reduction_of("http://x") is None


@pytest.mark.parametrize("host", PROMISE_A_SUM)
def test_hosted_trainers_are_taken_at_their_word_and_that_is_said(host, monkeypatch, lines):
    double = Trainer(config=None)
    plain = httpx.AsyncClient

    def client(**options):
        return plain(**{**options, "transport": httpx.ASGITransport(double)})

    monkeypatch.setattr(httpx, "AsyncClient", client)
    with ServiceClient(f"https://{host}", KEY, retry_policy=QUICK) as service:
        model = service.create_lora_training_client("tiny", 4)
        for _ in range(2):
            model.forward_backward_custom(make(), PAIRWISE).result()
    assert len(lines("as its documentation says; this was not measured")) == 1
    assert len(double.bodies("create_model")) == 1


def test_a_sum_that_is_not_the_one_that_was_sent_is_an_error():
    def averaged(path, body, result):
        if path == "forward_backward":
            result["metrics"]["loss:sum"] /= 4
        return result

    double = Trainer(output=averaged)
    with ServiceClient(ADDRESS, KEY, transport=httpx.ASGITransport(double)) as service:
        model = service.create_lora_training_client("tiny", 4)
        with pytest.raises(UnknownReductionError, match="is not the sum of the losses"):
            model.forward_backward_custom(make(), PAIRWISE).result()


@pytest.mark.parametrize("way", ["custom step", "backward"])
def test_a_pass_in_several_requests_is_refused_where_each_is_divided_by_itself(way):
    config = ClientConfigResponse(fwdbwd_max_chunk_len=3)
    with (
        Engine(reduction=HATCHERY) as engine,
        trainer(engine, config=config) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
    ):
        rows = model.logprobs(make())
        ways = {
            "custom step": lambda: model.forward_backward_custom(make(), PAIRWISE).result(),
            "backward": lambda: model.backward(make(), rows, rows),
        }
        with pytest.raises(DataError, match="they would go in 2 requests"):
            ways[way]()
        assert engine.model(model.model_id).num_datums == 0
