"""The whole way: what a client's step leaves in the trainer is the gradient of its loss."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import local, losses, objectives
from mintjax.local import model
from mintjax.types import AdamParams

from ..examples import THOROUGH
from .data import batch
from .test_engine import assert_close, assert_identical, norm

DATA = batch([9, 14, 30, 21], seed=3)


@pytest.fixture(scope="module")
def client(engine):
    with local.trainer(engine) as service:
        yield service.create_lora_training_client("mintjax/nano", rank=4, seed=1)


@pytest.fixture
def fresh(engine, client):
    """The client's model, a few steps from its start, with no gradient accumulated."""
    client.forward_backward(DATA, "cross_entropy")
    client.optim_step(AdamParams(learning_rate=3e-3)).result()
    return client


def mean_nll(data, logprobs):
    weights = data["weights"]
    return -(logprobs * weights).total() / weights.total(), {}


def pairwise(data, logprobs):
    scores = logprobs.dot(data["weights"])
    margin = scores[0::2] - scores[1::2]
    return -jax.nn.log_sigmoid(margin / 10).mean(), {"margin": margin.mean()}


def cross_entropy(data, logprobs):
    return logprobs.map(losses.cross_entropy, data["weights"]).total(), {}


@dataclass(frozen=True)
class OfPolicy:
    """A loss of the policy, masked by ``weights`` and summed."""

    name: str

    def __call__(self, data, logprobs):
        loss = getattr(losses, self.name)
        per_token = logprobs.map(loss, data["logprobs"], data["advantages"])
        return (per_token * data["weights"]).total(), {}


POLICY_LOSSES = ("importance_sampling", "ppo", "cispo", "dro")
OBJECTIVES = {
    "mean_nll": mean_nll,
    "pairwise": pairwise,
    "cross_entropy": cross_entropy,
    **{name: OfPolicy(name) for name in POLICY_LOSSES},
    "gspo": objectives.gspo(),
}
# By default ppo stands for the policy losses, because they differ in a formula of one token.
TRIED = [name for name in OBJECTIVES if THOROUGH or name not in {*POLICY_LOSSES} - {"ppo"}]


def composed(name, rows, columns):
    """The same losses on a plain list of rows, without ``Ragged``."""
    if name == "mean_nll":
        total = sum(jnp.sum(row * c["weights"]) for row, c in zip(rows, columns, strict=True))
        return -total / sum(c["weights"].sum() for c in columns)
    if name == "pairwise":
        scores = [jnp.dot(row, c["weights"]) for row, c in zip(rows, columns, strict=True)]
        margins = jnp.stack(scores[0::2]) - jnp.stack(scores[1::2])
        return jnp.mean(jnp.logaddexp(0, -margins / 10))
    total = 0.0
    for row, c in zip(rows, columns, strict=True):
        if name == "cross_entropy":
            total -= jnp.sum(row * c["weights"])
        else:
            mask = {"where": c["weights"] != 0} if name == "gspo" else {}
            per_token = getattr(losses, name)(row, c["logprobs"], c["advantages"], **mask)
            total += jnp.sum(per_token * c["weights"])
    return total


@functools.cache
def true_gradients():
    """``jax.grad`` of every composed loss, in one program: adapters -> list of gradients."""
    config = local.BASE_MODELS["mintjax/nano"]
    base = model.base_weights(config)
    columns = [{k: np.asarray(v) for k, v in d.loss_fn_inputs.items()} for d in DATA]

    tokens, targets = np.zeros((2, len(DATA), 32), np.int64)
    for i, datum in enumerate(DATA):
        tokens[i, : datum.model_input.length] = datum.model_input.to_ints()
        targets[i, : datum.model_input.length] = datum.loss_fn_inputs["target_tokens"]

    def losses_of(lora):
        logprobs = model.logprobs(config, base, lora, tokens, targets)
        rows = [logprobs[i, : datum.model_input.length] for i, datum in enumerate(DATA)]
        return jnp.stack([composed(name, rows, columns) for name in OBJECTIVES])

    return jax.jit(jax.jacrev(losses_of))


@pytest.mark.parametrize("name", TRIED)
def test_what_accumulates_is_the_gradient_of_the_composed_loss(engine, fresh, name):
    lora = engine.model(fresh.model_id).lora
    place = list(OBJECTIVES).index(name)
    expected = jax.tree.map(lambda leaf: leaf[place], true_gradients()(lora))
    fresh.forward_backward_custom(DATA, OBJECTIVES[name]).result()
    actual = engine.gradient(fresh.model_id)
    difference = norm(jax.tree.map(np.subtract, actual, expected))
    assert norm(expected) > 1e-3
    assert difference <= 1e-4 * norm(expected)
    assert_close(actual, expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["cross_entropy", *POLICY_LOSSES, "gspo"])
def test_a_built_in_loss_as_objective_is_that_loss_by_name(engine, fresh, name):
    path = fresh.save_state("before", overwrite=True).result().path
    fresh.forward_backward_custom(DATA, OBJECTIVES[name])
    fresh.optim_step(AdamParams()).result()
    custom = engine.model(fresh.model_id)
    fresh.load_state_with_optimizer(path)
    fresh.forward_backward(DATA, name)
    fresh.optim_step(AdamParams()).result()
    assert_close(custom.lora, engine.model(fresh.model_id).lora, rtol=1e-5)


def test_a_batch_of_2n_is_two_of_n(engine, fresh):
    fresh.forward_backward_custom(DATA, cross_entropy).result()
    whole = engine.gradient(fresh.model_id)
    fresh.load_state(fresh.save_state("here", overwrite=True).result().path)
    fresh.forward_backward_custom(DATA[:2], cross_entropy)
    fresh.forward_backward_custom(DATA[2:], cross_entropy).result()
    assert_close(whole, engine.gradient(fresh.model_id))


def test_a_step_that_fails_in_the_client_leaves_no_trace(engine, fresh):
    before = engine.model(fresh.model_id)

    def broken(data, logprobs):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fresh.forward_backward_custom(DATA, broken).result()
    assert_identical(engine.model(fresh.model_id).lora, before.lora)
    assert norm(engine.gradient(fresh.model_id)) == 0
    fresh.forward_backward_custom(DATA, pairwise).result()
    assert norm(engine.gradient(fresh.model_id)) > 0


def test_preferences_are_learnt(fresh):
    margins = []
    for _ in range(8):
        output = fresh.forward_backward_custom(DATA, pairwise).result()
        margins.append(output.metrics["margin"])
        fresh.optim_step(AdamParams(learning_rate=1e-2)).result()
    assert margins[-1] > margins[0] + 10


def test_only_targets_and_weights_travel(engine, fresh, monkeypatch):
    seen = []
    original = type(engine).forward_backward

    def spy(self, model_id, data, *args, **kwargs):
        seen.extend(set(datum.loss_fn_inputs) for datum in data)
        return original(self, model_id, data, *args, **kwargs)

    monkeypatch.setattr(type(engine), "forward_backward", spy)
    fresh.forward_backward_custom(DATA, objectives.ppo(), single_pass=False).result()
    assert seen == [{"target_tokens", "weights"}] * len(DATA)
