"""The embedded trainer as one of the real ones: our client's whole script on each of them."""

from __future__ import annotations

import numpy as np
import pytest

from mintjax import AdamParams, Datum, ModelInput, SamplingParams, objectives
from mintjax.client import RetryPolicy, ServiceClient, waiting
from mintjax.errors import (
    AmbiguousRequestError,
    APIError,
    BadRequestError,
    ConfigError,
    InternalServerError,
    RequestFailedError,
)
from mintjax.local import DIALECTS, Dialect, Engine, running_server, trainer
from mintjax.local.tokenizer import VOCAB_SIZE
from mintjax.step.reduction import SUM

from ..data import flat

NANO = "mintjax/nano"
PAIRWISE = objectives.bradley_terry()
NAMES = list(DIALECTS)


def those_with(field):
    """Runs a test on the dialects that differ in something."""
    names = [name for name in NAMES if getattr(DIALECTS[name], field)]
    return pytest.mark.parametrize("playing", names, indirect=True)


def data(*sizes, seed=5):
    rng = np.random.default_rng(seed)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n).tolist()),
            {"target_tokens": rng.integers(0, 256, n), "weights": rng.uniform(0.5, 2, n)},
        )
        for n in sizes or (4, 9, 6, 12)
    ]


def rl_data():
    """Ratios on both sides of every pair of bounds that a trainer has."""
    rng = np.random.default_rng(7)
    return [
        Datum(
            d.model_input,
            {
                "target_tokens": d.loss_fn_inputs["target_tokens"],
                "logprobs": rng.normal(-5.55, 0.2, d.model_input.length).astype(np.float32),
                "advantages": rng.normal(0, 1, d.model_input.length).astype(np.float32),
            },
        )
        for d in data()
    ]


class Playing:
    """A trainer that plays a dialect, its engine, and a client that is told nothing of it."""

    def __init__(self, name, engine, service):
        self.name, self.engine, self.service = name, engine, service

    def model(self):
        return self.service.create_lora_training_client(NANO, 4, seed=1)

    def gradient(self, model):
        return flat(self.engine.gradient(model.model_id))


@pytest.fixture(scope="module")
def own():
    with Engine() as engine, trainer(engine) as service:
        yield Playing("own", engine, service)


@pytest.fixture(scope="module", params=NAMES)
def playing(request):
    dialect = DIALECTS[request.param]
    with (
        Engine(reduction=dialect.reduction) as engine,
        trainer(engine, like=request.param) as service,
    ):
        yield Playing(request.param, engine, service)


def test_a_script_runs_as_on_the_embedded_trainer(playing, own):
    offered = playing.service.get_server_capabilities().supported_models
    assert offered == own.service.get_server_capabilities().supported_models
    assert playing.service.probe(NANO) == DIALECTS[playing.name].reduction
    gradients, losses = [], []
    for where in (own, playing):
        with where.model() as model:
            update = model.forward_backward_custom(data(), PAIRWISE).result()
            gradients.append(where.gradient(model))
            losses.append(update.metrics["loss"])
            model.optim_step(AdamParams(learning_rate=1e-3)).result()
            saved = model.save_state("kept").result().path
            rows = model.logprobs(data())
            sampler = model.save_weights_and_get_sampling_client()
            answer = sampler.sample(
                ModelInput.from_ints([1, 2, 3]),
                2,
                SamplingParams(max_tokens=3, seed=1, stop="~~~~"),
            ).result()
            assert [len(one.logprobs) for one in answer.sequences] == [3, 3]
        again = where.service.create_training_client_from_state_with_optimizer(saved)
        np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(again.logprobs(data())))
        again.unload().result()
        by_path = where.service.create_sampling_client(base_model=NANO)
        assert len(by_path.compute_logprobs(ModelInput.from_ints([1, 2, 3])).result()) == 3
    assert not playing.engine.models
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    error = np.linalg.norm(gradients[1] - gradients[0]) / np.linalg.norm(gradients[0])
    assert error <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_first_request_may_be_of_any_kind(name):
    """Nothing has told the client before which encoding the trainer reads."""
    for first in ("forward", "forward_backward"):
        with trainer(like=name) as service, service.create_lora_training_client(NANO, 4) as model:
            output = getattr(model, first)(data(), "cross_entropy").result()
        lengths = [datum.model_input.length for datum in data()]
        assert [len(row) for row in output.logprobs] == lengths


def test_losses_by_name_are_served_or_refused_at_once(playing):
    dialect = DIALECTS[playing.name]
    for loss_fn in ("importance_sampling", "ppo", "cispo", "dro", "gspo"):
        words = dialect.refused_losses.get(loss_fn, (0, dialect.failing_losses.get(loss_fn)))[1]
        with playing.model() as model:
            passed = model.forward_backward(rl_data(), loss_fn)
            if words is None:
                passed.result()
                continue
            with pytest.raises(APIError) as refused:
                passed.result(20)
            assert words in str(refused.value)
            model.forward(data()).result(20)  # nothing waits behind what was refused


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro"])
def test_an_objective_is_the_same_whatever_a_trainer_calls_by_its_name(playing, own, loss_fn):
    """Trainers have other hyperparameters by default, other reductions, and other losses."""
    gradients = []
    for where in (own, playing):
        with where.model() as model:
            model.forward_backward_custom(rl_data(), getattr(objectives, loss_fn)()).result()
            gradients.append(where.gradient(model))
    error = np.linalg.norm(gradients[1] - gradients[0]) / np.linalg.norm(gradients[0])
    assert error <= 1e-5


@those_with("loss_defaults")
def test_bounds_that_are_not_given_are_the_trainers_own(playing, own):
    bounds, gradients = DIALECTS[playing.name].loss_defaults["ppo"], []
    for where, config in ((own, {}), (own, bounds), (playing, None)):
        with where.model() as model:
            model.forward_backward(rl_data(), "ppo", config).result()
            gradients.append(where.gradient(model))
    assert not np.array_equal(gradients[0], gradients[1])
    np.testing.assert_array_equal(gradients[1], gradients[2])


@those_with("names")
def test_a_checkpoint_whose_name_is_taken_or_refused_is_told_at_once(playing):
    with playing.model() as model:
        model.save_state("twice").result()
        with pytest.raises(BadRequestError, match="'twice' already exists"):
            model.save_state("twice").result(2)
        with pytest.raises(BadRequestError, match="should match pattern"):
            model.save_state("with spaces").result(2)


@those_with("loads_first")
def test_weights_are_loaded_into_new_models_only(playing):
    with playing.model() as model:
        path = model.save_state("mine").result().path
        with pytest.raises(BadRequestError, match="from_state"):
            model.load_state(path).result()


@those_with("adapters")
def test_adapters_that_are_used_up_are_told_with_a_reason(playing):
    made = [playing.model() for _ in range(7)]
    with pytest.raises(BadRequestError, match=r"\(8\) reached .*not unloaded") as refused:
        playing.model()
    assert "may or may not" not in str(refused.value)
    assert not refused.value.may_have_been_applied
    for model in made:
        model.unload().result()
    playing.model().unload().result()


def beyond(token=100_000):
    return [
        Datum(
            ModelInput.from_ints([1, 2, 3]),
            {"target_tokens": [2, 3, token], "weights": [1.0, 1.0, 1.0]},
        )
    ]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("skyrl-tx-0.3", InternalServerError, "token beyond the vocabulary"),
        ("skyrl-0.4", APIError, "returned nan in 'logprobs'"),
        ("tuft-0.2", BadRequestError, "Future failed: .* out of bounds"),
        ("hatchery-0.3", RequestFailedError, "out of bounds"),
    ],
)
def test_a_token_beyond_the_vocabulary_is_told_and_the_model_stays_usable(
    name, error, words, caplog, monkeypatch
):
    monkeypatch.setattr(waiting, "FIRST_LINE", 0.05)
    policy = RetryPolicy(first_delay=0.01, longest_delay=0.02, broken_result=0.2)
    with (
        running_server(like=name) as url,
        ServiceClient(url, retry_policy=policy) as service,
        service.create_lora_training_client(NANO, 4) as model,
    ):
        with pytest.raises(error, match=words):
            model.forward(beyond()).result(10)
        model.forward(data()).result(30)
        with pytest.raises(APIError) as refused:
            model.forward_backward(beyond(), "cross_entropy").result(10)
        told = [one.getMessage() for one in caplog.records if "waiting" in one.getMessage()]
    if name == "skyrl-tx-0.3":  # its result never comes, and may hide a gradient that was added
        assert isinstance(refused.value, AmbiguousRequestError)
        assert any("token beyond the vocabulary" in line for line in told)
        assert any("RetryPolicy(broken_result=...)" in line for line in told)


@those_with("max_tokens_required")
def test_how_many_tokens_has_to_be_said(playing):
    sampler = playing.service.create_sampling_client(base_model=NANO)
    with pytest.raises(BadRequestError, match="max_tokens is currently required"):
        sampler.sample(ModelInput.from_ints([1]), 1, SamplingParams(stop=["a"])).result()


@those_with("logprobs_as_drawn")
def test_samples_are_of_the_likeliest_tokens_with_logprobs_of_what_they_were_drawn_from(
    playing, own
):
    """Hatchery leaves top_k=-1 to transformers, which keep 50; so an RL loss has to say top_k."""
    prompt, count = [1, 2, 3], 40

    def drawn(where, **params):
        sampler = where.service.create_sampling_client(base_model=NANO)
        params = SamplingParams(max_tokens=1, seed=3, **params)
        answer = sampler.sample(ModelInput.from_ints(prompt), count, params).result()
        return {one.tokens[0]: one.logprobs[0] for one in answer.sequences}

    everything = drawn(own)
    fifty = sorted(drawn(own, top_k=50))
    assert sorted(drawn(playing)) == fifty != sorted(everything)
    with own.model() as model:
        wide = Datum(
            ModelInput.from_ints(prompt),
            {"target_tokens": np.tile(np.arange(VOCAB_SIZE), (3, 1))},
        )
        log_p = model.logprobs([wide])[0][-1]
    for params in ({}, {"top_k": 7}, {"temperature": 0.5, "top_k": VOCAB_SIZE}):
        scaled = log_p / params.get("temperature", 1.0)
        kept = np.sort(scaled)[-params.get("top_k", 50) :]
        total = np.log(np.exp(kept - kept.max()).sum()) + kept.max()
        for token, logprob in drawn(playing, **params).items():
            np.testing.assert_allclose(logprob, scaled[token] - total, atol=1e-4)
    plain = {token: log_p[token] for token in everything}
    assert drawn(playing, top_k=VOCAB_SIZE) == pytest.approx(plain, abs=1e-4)


def test_a_dialect_needs_an_engine_of_its_reduction():
    with Engine() as engine:
        with (
            pytest.raises(ConfigError, match="this engine's the sum"),
            trainer(engine, like="hatchery-0.3"),
        ):
            pass
        with trainer(engine, like=Dialect(json_passes=False)):
            pass
    with (
        pytest.raises(ConfigError, match=r"'skyrl' is none of skyrl-tx-0\.3"),
        running_server(like="skyrl"),
    ):
        pass
    assert Dialect().reduction is None
    assert DIALECTS["tuft-0.2"].reduction == SUM
