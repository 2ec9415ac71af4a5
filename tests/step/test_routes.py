"""By which route a custom step reaches the trainer, and that each leads to the same place."""

import logging

import jax
import numpy as np
import pytest

from mintjax import AdamParams, Datum, ModelInput, objectives
from mintjax.errors import BadRequestError, DataError
from mintjax.local import Engine, trainer
from mintjax.step.reduction import Reduction

NANO = "mintjax/nano"


def make(seed, sizes=(5, 17, 9, 12), **columns):
    rng = np.random.default_rng(seed)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n)),
            {
                "target_tokens": rng.integers(0, 256, n),
                "weights": (np.arange(n) > 1).astype(np.float32),
                "advantages": rng.standard_normal(n),
                "logprobs": -5.5 + 0.3 * rng.standard_normal(n),
                **{name: make(n) for name, make in columns.items()},
            },
        )
        for n in sizes
    ]


def without(data, name):
    return [
        Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k != name}) for d in data
    ]


def reinforce(data, logprobs):
    weighted = logprobs * data["advantages"]
    return -weighted.total(), {"mean_logprob": logprobs.mean().mean()}


@pytest.fixture(scope="module")
def engine():
    with Engine() as engine:
        engine.passes = []
        for name in ("forward", "forward_backward"):
            watch(engine, name)
        yield engine


def watch(engine, name):
    original = getattr(engine, name)

    def watched(model_id, data, loss_fn, *rest, **named):
        engine.passes.append((name, loss_fn))
        return original(model_id, data, loss_fn, *rest, **named)

    setattr(engine, name, watched)


@pytest.fixture(scope="module")
def service(engine):
    with trainer(engine) as service:
        yield service


@pytest.fixture
def model(service):
    with service.create_lora_training_client(NANO, 4, seed=1) as model:
        yield model


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def gradient(engine, model, data, objective, **options):
    """The accumulated gradient of one step, its output, and the passes that the trainer saw."""
    engine.passes.clear()
    output = model.forward_backward_custom(data, objective, **options).result()
    accumulated = flat(engine.gradient(model.model_id))
    passes = list(engine.passes)
    model.optim_step(AdamParams(learning_rate=0.0)).result()
    return accumulated, output, passes


CASES = {
    "reinforce": (reinforce, "one_pass", "cross_entropy"),
    "cross_entropy": (objectives.cross_entropy(), "by_name", "cross_entropy"),
    "importance_sampling": (objectives.importance_sampling(), "by_name", "importance_sampling"),
    "ppo": (objectives.ppo(clip_high_threshold=1.05), "by_name", "ppo"),
    "cispo": (objectives.cispo(), "by_name", "cispo"),
    "dro": (objectives.dro(beta=0.2), "by_name", "dro"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_request_does_what_two_did(name, engine, model):
    objective, route, loss_fn = CASES[name]
    data = make(1)
    if name == "dro":  # its quadratic term cannot be masked through the advantages
        data = without(data, "weights")
    one, direct, passes = gradient(engine, model, data, objective)
    two, indirect, both = gradient(engine, model, data, objective, single_pass=False)
    assert (direct.route, passes) == (route, [("forward_backward", loss_fn)])
    assert indirect.route == "two_pass"
    assert both == [("forward", "cross_entropy"), ("forward_backward", "cross_entropy")]
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)
    ours = {k: v for k, v in direct.metrics.items() if ":" not in k}
    assert ours == pytest.approx(
        {k: v for k, v in indirect.metrics.items() if ":" not in k}, rel=1e-5, abs=1e-6
    )
    assert direct.forward_seconds == 0
    assert min(indirect.forward_seconds, indirect.client_seconds, indirect.backward_seconds) > 0


@pytest.mark.parametrize(
    "objective",
    [objectives.dro(), objectives.bradley_terry(), objectives.ppo(aggregation="token_mean")],
    ids=repr,
)
def test_what_no_single_request_can_do_takes_two(objective, engine, model):
    _, output, passes = gradient(engine, model, make(1), objective)
    assert output.route == "two_pass"
    assert len(passes) == 2


def test_weights_of_any_size_are_carried_in_the_advantages(engine, model):
    data = make(1, weights=lambda n: np.linspace(0, 2, n))
    one, output, _ = gradient(engine, model, data, objectives.ppo())
    two, _, _ = gradient(engine, model, data, objectives.ppo(), single_pass=False)
    assert output.route == "by_name"
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)
    negative = make(1, weights=lambda n: np.linspace(-1, 2, n))
    assert gradient(engine, model, negative, objectives.ppo())[1].route == "two_pass"


def test_what_a_mask_hides_does_not_travel(engine, model):
    data = make(1, logprobs=lambda n: np.where(np.arange(n) > 1, -5.0, np.nan))
    one, output, _ = gradient(engine, model, data, objectives.ppo())
    two, _, _ = gradient(engine, model, data, objectives.ppo(), single_pass=False)
    assert output.route == "by_name"
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)


def test_a_loss_that_the_trainer_refuses_by_name_is_sent_as_its_gradient(engine, monkeypatch):
    from mintjax.local import endpoints

    check = endpoints.Engine.check_pass

    def refuse(self, model_id, data, loss_fn, *rest, **named):
        if loss_fn == "ppo":
            raise DataError("not served here", field="loss_fn")
        return check(self, model_id, data, loss_fn, *rest, **named)

    monkeypatch.setattr(endpoints.Engine, "check_pass", refuse)
    with (
        trainer(engine) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
    ):
        _, first, _ = gradient(engine, model, make(1), objectives.ppo())
        _, second, passes = gradient(engine, model, make(1), objectives.ppo())
        assert (first.route, second.route) == ("two_pass", "two_pass")
        assert len(passes) == 2
        with pytest.raises(BadRequestError, match="not served here"):
            model.forward_backward(without(make(1), "weights"), "ppo").result()


@pytest.fixture(scope="module")
def averaging():
    with Engine(normalise=True) as engine, trainer(engine) as service:
        yield engine, service


def test_a_trainer_that_averages_is_probed_and_gets_the_true_gradient(averaging, engine, model):
    other, service = averaging
    data = make(2)
    true, _, _ = gradient(engine, model, data, objectives.bradley_terry())
    reduction = service.probe(NANO)
    assert reduction == Reduction(per_sequence=True, over_datums=True)
    for objective in (objectives.bradley_terry(), objectives.ppo(), reinforce):
        want, _, _ = gradient(engine, model, data, objective, single_pass=False)
        with service.create_lora_training_client(NANO, 4, seed=1) as there:
            assert there.probe() == reduction
            output = there.forward_backward_custom(data, objective).result()
            got = flat(other.gradient(there.model_id))
        assert output.route == "two_pass"
        cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
        assert cosine >= 0.9999
        assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(want), rel=1e-3)
    assert np.linalg.norm(true) > 0


def test_several_steps_on_a_trainer_that_averages_are_told_their_number(averaging, engine, model):
    other, service = averaging
    service.probe(NANO)
    first, second = make(2), make(3)
    want = sum(gradient(engine, model, part, reinforce)[0] for part in (first, second))
    with service.create_lora_training_client(NANO, 4, seed=1) as there:
        for part in (first, second):
            there.forward_backward_custom(part, reinforce, datums_in_step=8).result()
        got = flat(other.gradient(there.model_id))
        assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
        there.optim_step(AdamParams()).result()

        there.forward_backward_custom(first, reinforce).result()
        with pytest.raises(DataError, match="4 are accumulated, 4 are to be added"):
            there.forward_backward_custom(second, reinforce).result()
        there.optim_step(AdamParams()).result()

        there.forward_backward_custom(first, reinforce, datums_in_step=8).result()
        with pytest.raises(DataError, match=r"8 datums were announced .* and 4 came"):
            there.optim_step(AdamParams()).result()
        with pytest.raises(DataError, match="announced were 9"):
            there.forward_backward_custom(second, reinforce, datums_in_step=9).result()
        there.forward_backward_custom(second, reinforce, datums_in_step=8).result()
        there.optim_step(AdamParams()).result()


def test_a_trainer_that_was_not_probed_and_shows_no_sum_is_warned_of_once(caplog):
    with (
        Engine(normalise=True) as engine,
        trainer(engine) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
        caplog.at_level(logging.WARNING, "mintjax"),
    ):
        for _ in range(2):
            model.forward_backward_custom(make(1), reinforce).result()
    warned = [record for record in caplog.records if "loss:sum" in record.getMessage()]
    assert len(warned) == 1
    assert "service.probe()" in warned[0].getMessage()
