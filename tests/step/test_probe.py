import types

import numpy as np
import pytest

from mintjax.errors import MintjaxError
from mintjax.local import Engine, trainer
from mintjax.step.probe import measure_reduction
from mintjax.step.reduction import Reduction
from mintjax.tensors import TensorData
from mintjax.types import ForwardBackwardOutput


@pytest.mark.parametrize(
    ("normalise", "reduction"), [(False, Reduction()), (True, Reduction(True, True))]
)
def test_the_embedded_trainer_is_measured_as_what_it_is(normalise, reduction):
    with (
        Engine(normalise=normalise) as engine,
        trainer(engine) as service,
        service.create_lora_training_client("mintjax/nano", 4, seed=0) as model,
    ):
        assert measure_reduction(model) == reduction


class LinearTrainer:
    """Moves a datum's logprob by what ``move`` says of the weights of the datums it is given."""

    def __init__(self, move):
        self.move = move
        self.logprob = -10.0
        self.pending = 0.0

    def forward(self, data, loss_fn):
        row = TensorData(np.full(7, self.logprob / 7))
        return done(ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": row}]))

    def forward_backward(self, data, loss_fn):
        self.pending = self.move([float(d.loss_fn_inputs["weights"][0]) for d in data])
        return done(None)

    def optim_step(self, adam_params):
        self.logprob += self.pending
        return done(None)


def done(value):
    return types.SimpleNamespace(result=lambda timeout=None: value)


@pytest.mark.parametrize(
    ("move", "reduction"),
    [
        (sum, Reduction()),
        (np.mean, Reduction(over_datums=True)),
        (len, Reduction(per_sequence=True)),
        (lambda w: 1.0, Reduction(per_sequence=True, over_datums=True)),
    ],
)
def test_every_convention_is_told_apart(move, reduction):
    assert measure_reduction(LinearTrainer(move)) == reduction


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (lambda w: sum(x**2 for x in w), "twice the weight moves 4.000"),
        (lambda w: 0.0, "a step moved the logprob by 0"),
        (lambda w: np.nan, "a step moved the logprob by nan"),
    ],
)
def test_a_trainer_that_fits_no_convention_is_not_guessed_at(move, message):
    with pytest.raises(MintjaxError, match=message):
        measure_reduction(LinearTrainer(move))


def test_a_trainer_that_drifts_is_not_guessed_at():
    steps = iter(range(1, 9))
    with pytest.raises(MintjaxError, match=r"the same step moved 4\.000 times as far"):
        measure_reduction(LinearTrainer(lambda w: float(next(steps))))
