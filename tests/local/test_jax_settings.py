"""A user's settings of JAX are not the embedded trainer's."""

import jax
import numpy as np
import pytest

from mintjax import AdamParams, Datum, ModelInput, SamplingParams, local, objectives

SETTINGS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_transfer_guard": "disallow",
}
DATA = [
    Datum(
        ModelInput.from_ints([1, 2, 3]),
        {
            "target_tokens": [2, 3, 4],
            "weights": [0.0, 1.0, 1.0],
            "logprobs": [-1.0, -1.0, -1.0],
            "advantages": [1.0, -1.0, 0.5],
        },
    )
] * 2


def steps(service):
    """Trains, saves, loads and samples; returns what came of it."""
    model = service.create_lora_training_client("mintjax/nano", 4, seed=0)
    losses = []
    for objective in (objectives.ppo(), objectives.dpo(reference_free=True)):
        losses.append(model.forward_backward_custom(DATA, objective).result().metrics["loss"])
        model.optim_step(AdamParams(learning_rate=1e-2)).result()
    model.load_state_with_optimizer(model.save_state("s").result().path).result()
    sampler = model.save_weights_and_get_sampling_client()
    greedy = SamplingParams(max_tokens=3, temperature=0.0)
    return losses, sampler.sample(ModelInput.from_ints([1, 2]), 1, greedy).result().sequences


@pytest.fixture
def users_settings():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, "allow" if value is None else value)


@pytest.fixture(scope="module")
def usual():
    with local.trainer() as service:
        return steps(service)


@pytest.mark.usefixtures("usual", "users_settings")
def test_training_and_sampling_are_the_same_under_any_settings(usual):
    with local.trainer() as service:
        losses, (sequence,) = steps(service)
    assert losses == pytest.approx(usual[0], rel=1e-5)
    assert sequence.tokens == usual[1][0].tokens
    np.testing.assert_allclose(sequence.logprobs, usual[1][0].logprobs, rtol=1e-4)
