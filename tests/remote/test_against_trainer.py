"""The bridge on the embedded trainer: its gradient is that of the two phases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mintjax
from mintjax import AdamParams, Batch, objectives
from mintjax.errors import StaleError
from mintjax.local import trainer
from mintjax.remote.logprobs import remote_logprobs
from mintjax.remote.optimizer import remote_optimizer

from .double import make


@pytest.fixture(scope="module")
def service(engine):
    with trainer(engine) as service:
        yield service


@pytest.fixture
def client(service, data):
    """A model that one step has taken away from its initial point, where half the gradient is 0."""
    with service.create_lora_training_client("mintjax/nano", 4, seed=1) as client:
        client.backward(data, [], [-np.ones(n) for n in data.lengths])
        client.optim_step(AdamParams(learning_rate=1e-2)).result()
        yield client


@pytest.fixture
def data():
    return Batch(make((5, 7, 3, 8), seed=3))


def accumulated(engine, client):
    """What the trainer's optimizer would use, as one vector; it is forgotten."""
    leaves = jax.tree.leaves(engine.gradient(client.model_id))
    client.optim_step(AdamParams(learning_rate=0.0)).result()
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.mark.parametrize(
    ("objective", "compiled"),
    [
        (objectives.bradley_terry(), True),
        (objectives.dro(), False),
    ],
)
def test_what_accumulates_is_what_the_two_phases_give(objective, compiled, engine, client, data):
    model = client
    rows = model.logprobs(data)
    two_phase = mintjax.value_and_logprob_grads(objective, data, rows)
    model.backward(data, rows, two_phase.grads)
    want = accumulated(engine, client)
    assert np.linalg.norm(want) > 0

    remote = remote_logprobs(model, data)
    step = jax.value_and_grad(lambda p: objective(data, remote(p)), has_aux=True)
    (loss, metrics), receipt = (jax.jit(step) if compiled else step)(remote.params)
    assert receipt > 1000
    got = accumulated(engine, client)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
    assert loss == pytest.approx(two_phase.loss, rel=1e-6)
    assert set(metrics) | {"loss"} == set(two_phase.metrics)
    assert remote.output is not None
    assert "loss:sum" in remote.output.metrics


def test_two_uses_accumulate_in_the_trainer(engine, client, data):
    remote = remote_logprobs(client, data)

    def loss(params):
        return remote(params).map(jnp.square).total()

    jax.grad(loss)(remote.params)
    once = accumulated(engine, client)
    jax.grad(lambda p: loss(p) + loss(p))(remote.params)
    twice = accumulated(engine, client)
    assert np.linalg.norm(twice - 2 * once) <= 1e-6 * np.linalg.norm(twice)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_through_the_bridge_is_training(compiled, client, data):
    """The trainer computes in JAX too, in this process, while a compiled step waits for it."""
    model = client
    objective = objectives.bradley_terry()
    remote = remote_logprobs(model, data)
    optimizer = remote_optimizer(model, optax.linear_schedule(1e-2, 1e-3, 8), grad_clip_norm=10.0)

    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: objective(data, remote(p))[0])(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step) if compiled else step
    params = remote.params
    state = optimizer.init(params)
    losses = []
    for _ in range(8):
        params, state, loss = step(params, state)
        losses.append(loss)  # not waited for: steps line up behind each other
    assert params == 8
    assert losses[-1] < 0.5 * losses[0]


CHANGES = {
    "an optimizer step": lambda client, data: client.optim_step(AdamParams(learning_rate=1e-2)),
    "a backward pass": lambda client, data: client.forward_backward(data),
    "a custom step": lambda client, data: client.forward_backward_custom(data, objectives.dro()),
    "a checkpoint": lambda client, data: client.load_state(client.save_state("a").result().path),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_client_changes_itself_makes_params_and_gradients_stale(name, client, data):
    remote, optimizer = remote_logprobs(client, data), remote_optimizer(client, 1e-2)
    params = remote.params
    state = optimizer.init(params)
    client.forward(data).result()
    client.logprobs(data)
    grads = jax.grad(lambda params: remote(params).total())(params)
    CHANGES[name](client, data).result()
    with pytest.raises(StaleError, match="or of calls of the training client itself"):
        optimizer.update(grads, state, params)
    with pytest.raises(StaleError, match="version 0, where the trainer's model is at version 1"):
        remote(params)
    state = optimizer.init(remote.params)
    grads = jax.grad(lambda params: remote(params).total())(remote.params)
    assert optimizer.update(grads, state, remote.params)[0] == 1


def test_what_the_trainer_refuses_is_its_own_error(client):
    data = make((4,))
    data[0].loss_fn_inputs["target_tokens"][2] = 100_000
    remote = remote_logprobs(client, data)
    with pytest.raises(mintjax.errors.APIStatusError, match="target_tokens"):
        jax.grad(lambda p: remote(p).total())(remote.params)
