"""A custom step, from the loss to the gradient in the trainer, against ``jax.grad`` of it all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mintjax
from mintjax import AdamParams, Datum, Ragged, objectives
from mintjax.local import BASE_MODELS, trainer
from mintjax.local import model as transformer

from .data import make_datums
from .examples import some

CONFIG = BASE_MODELS["mintjax/nano"]


def mean_nll(data, logprobs):
    return -(logprobs * data["weights"]).total() / data["weights"].total(), {}


OBJECTIVES = {
    "cross_entropy": objectives.cross_entropy(),
    "importance_sampling": objectives.importance_sampling(),
    "ppo": objectives.ppo(),
    "cispo": objectives.cispo(clip_high_threshold=1.1),
    "dro": objectives.dro(beta=0.3),
    "bradley_terry": objectives.bradley_terry(),
    "mean_nll": mean_nll,
}


@pytest.fixture(scope="module")
def service(engine):
    with trainer(engine) as service:
        yield service


@pytest.fixture
def model(service):
    """A model that one step has taken away from its initial point, where half the gradient is 0."""
    with service.create_lora_training_client(CONFIG.name, 4, seed=1) as model:
        model.forward_backward(columns(make_datums(0), "target_tokens", "weights"), "cross_entropy")
        model.optim_step(AdamParams(learning_rate=1e-2)).result()
        yield model


def columns(data, *names):
    return [Datum(d.model_input, {name: d.loss_fn_inputs[name] for name in names}) for d in data]


def composed_gradient(engine, model_id, data, objective):
    """``jax.grad`` of the objective through the model, with respect to the adapters."""
    base = transformer.base_weights(CONFIG)
    lengths = [datum.model_input.length for datum in data]

    def padded(rows):  # the model is causal: what follows a row changes nothing in it
        return jnp.asarray([np.pad(row, (0, max(lengths) - len(row))) for row in rows])

    tokens = padded([datum.model_input.to_ints() for datum in data])
    targets = padded([datum.loss_fn_inputs["target_tokens"] for datum in data])

    def loss(lora):
        logprobs = transformer.logprobs(CONFIG, base, lora, tokens, targets)
        rows = [row[:length] for row, length in zip(logprobs, lengths, strict=True)]
        return objective(mintjax.Batch(data), Ragged.from_rows(rows))[0]

    return jax.jit(jax.grad(loss))(engine.model(model_id).lora)


def assert_close(got, want, tolerance):
    got, want = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (got, want))
    assert np.linalg.norm(want) > 0
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


TRUE = {}


@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("name", some(OBJECTIVES, 2))
def test_what_accumulates_is_the_gradient_of_the_whole(name, single_pass, engine, model):
    data = make_datums(3)
    step = model.forward_backward_custom(data, OBJECTIVES[name], single_pass=single_pass)
    output = step.result()
    if name not in TRUE:  # both ways start from the same model
        TRUE[name] = composed_gradient(engine, model.model_id, data, OBJECTIVES[name])
    assert_close(engine.gradient(model.model_id), TRUE[name], 1e-4)
    assert np.isfinite(output.metrics["loss"])


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_a_built_in_loss_as_objective_does_what_it_does_by_name(name, engine, service):
    loss_fn, config = OBJECTIVES[name].builtin
    inputs = ["target_tokens", "weights"]
    if name != "cross_entropy":
        inputs += ["advantages", "logprobs"]
    adapters = []
    for custom in (True, False):
        with service.create_lora_training_client(CONFIG.name, 4, seed=1) as model:
            for seed in (1, 2):
                data = columns(make_datums(seed), *inputs)
                if custom:
                    step = model.forward_backward_custom(data, OBJECTIVES[name], single_pass=False)
                else:
                    step = model.forward_backward(data, loss_fn, config)
                model.optim_step(AdamParams(learning_rate=1e-3, eps=1e-6)).result()
                loss = step.result().metrics["loss" if custom else "loss:sum"]
            adapters.append((engine.model(model.model_id).lora, loss))
    start = transformer.lora_weights(CONFIG, mintjax.LoraConfig(4, 1))
    (custom, custom_loss), (named, named_loss) = adapters
    updates = [jax.tree.map(np.subtract, lora, start) for lora in (custom, named)]
    assert_close(*updates, 1e-3)
    assert custom_loss == pytest.approx(named_loss, rel=1e-4)


@pytest.mark.parametrize("name", ["bradley_terry", "ppo"])
def test_two_batches_accumulate_to_what_one_of_both_gives(name, engine, model):
    # A mean over pairs is halved when there are twice as many.
    scale = 0.5 if name == "bradley_terry" else 1.0
    first, second = make_datums(4), make_datums(5)
    for part in (first, second):
        model.forward_backward_custom(part, OBJECTIVES[name]).result()
    halves = jax.tree.map(lambda g: scale * g, engine.gradient(model.model_id))
    model.optim_step(AdamParams(learning_rate=0.0)).result()
    model.forward_backward_custom(first + second, OBJECTIVES[name]).result()
    assert_close(engine.gradient(model.model_id), halves, 1e-5)


def test_only_targets_and_weights_travel(model, monkeypatch):
    from mintjax.local import engine as engine_module

    seen = []
    original = engine_module.Engine.forward_backward

    def spy(self, model_id, data, *args, **kwargs):
        seen.extend(set(datum.loss_fn_inputs) for datum in data)
        return original(self, model_id, data, *args, **kwargs)

    monkeypatch.setattr(engine_module.Engine, "forward_backward", spy)
    model.forward_backward_custom(make_datums(6), OBJECTIVES["ppo"], single_pass=False).result()
    assert seen
    assert all(names == {"target_tokens", "weights"} for names in seen)


def test_an_objective_that_raises_leaves_the_client_and_the_model_as_they_were(engine, model):
    class Mine(Exception):
        pass

    def failing(data, logprobs):
        raise Mine("here")

    before = engine.model(model.model_id)
    with pytest.raises(Mine, match="here"):
        model.forward_backward_custom(make_datums(7), failing).result()
    assert engine.model(model.model_id) is before
    model.forward_backward_custom(make_datums(7), OBJECTIVES["dro"]).result()
    model.optim_step(AdamParams()).result()


def test_training_lowers_the_loss_and_ranks_the_pairs(service):
    data = columns(make_datums(8, sizes=(20, 20, 30, 30)), "target_tokens", "weights")
    with service.create_lora_training_client(CONFIG.name, 8, seed=0) as model:
        history = []
        for _ in range(12):
            step = model.forward_backward_custom(data, OBJECTIVES["bradley_terry"])
            model.optim_step(AdamParams(learning_rate=1e-2))
            history.append(step.result().metrics)
    assert history[-1]["loss"] < 0.1 * history[0]["loss"]
    assert history[-1]["pair_accuracy"] == 1.0
    assert {"loss", "loss:sum", "pair_accuracy", "mean_margin"} <= set(history[-1])
