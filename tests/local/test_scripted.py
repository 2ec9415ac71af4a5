import numpy as np
import pytest

from mintjax import AdamParams, Datum, ModelInput, objectives, value_and_logprob_grads
from mintjax.errors import RequestFailedError
from mintjax.local import scripted_trainer

DATA = [
    Datum(
        ModelInput.from_ints(range(length)),
        {
            "target_tokens": np.arange(length),
            "weights": np.ones(length, np.float32),
            "logprobs": np.full(length, -1.5, np.float32),
            "advantages": np.linspace(-1, 2, length, dtype=np.float32),
        },
    )
    for length in (3, 1, 4, 2)
]


def logprobs(datum):
    return -np.arange(1, len(datum.loss_fn_inputs["target_tokens"]) + 1) / 4


@pytest.mark.parametrize("name", ["bradley_terry", "ppo", "cross_entropy"])
@pytest.mark.parametrize("single_pass", [True, False])
def test_a_custom_step_arrives_as_the_gradient_of_its_objective(name, single_pass):
    objective = getattr(objectives, name)()
    expected = value_and_logprob_grads(objective, DATA, [logprobs(datum) for datum in DATA])
    with scripted_trainer(logprobs) as (service, script):
        model = service.create_lora_training_client("mintjax/nano", rank=1)
        step = model.forward_backward_custom(DATA, objective, single_pass=single_pass).result()
        model.optim_step(AdamParams(learning_rate=0.5)).result()
    assert step.metrics["loss"] == pytest.approx(expected.loss)
    ((one,), adam), *more = script.steps
    assert not more
    assert not script.passes
    assert adam.learning_rate == 0.5
    for got, want in zip(one.grads, expected.grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_logprobs_of_another_shape_are_refused():
    with scripted_trainer(lambda datum: [-1.0]) as (service, script):
        model = service.create_lora_training_client("mintjax/nano", rank=1)
        with pytest.raises(RequestFailedError, match=r"shape \[1\], where target_tokens has \[3\]"):
            model.forward(DATA, "cross_entropy").result()
    assert not script.passes
