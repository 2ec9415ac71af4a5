"""What a trainer divides losses by is told from its movements, or it is not guessed at."""

import numpy as np
import pytest

from mintjax.errors import UnknownReductionError
from mintjax.local import Engine, trainer
from mintjax.step.probe import EXPERIMENTS, confirm_reduction, measure_reduction, predicted
from mintjax.step.reduction import MEMBERS, Reduction

from ..examples import some
from .linear import LinearTrainer, floored

SKYRL = Reduction("weights", per_step="datums")
HATCHERY = Reduction(per_request="weights")


@pytest.mark.parametrize("reduction", [Reduction(), SKYRL, HATCHERY], ids=str)
def test_the_embedded_trainer_is_measured_as_what_it_is(reduction):
    with Engine(reduction=reduction) as engine, trainer(engine) as service:
        assert service.probe("mintjax/nano") == reduction
        assert not engine.models  # the throwaway one is unloaded


@pytest.mark.parametrize("reduction", some(MEMBERS, 5), ids=str)
def test_every_reduction_is_told_apart_from_all_others(reduction):
    found = measure_reduction(LinearTrainer(floored(reduction)))
    assert found.reduction == reduction
    assert found.error < 1e-2
    assert found.reports_sum is None


def test_any_two_reductions_differ_by_half_on_some_step():
    steps = np.log([[predicted(member, e) for e in EXPERIMENTS] for member in MEMBERS])
    flat = steps.reshape(len(MEMBERS), -1)
    apart = np.abs(flat[:, None] - flat).max(axis=-1)[~np.eye(len(MEMBERS), dtype=bool)]
    assert np.exp(apart.min()) >= 1.5


UNKNOWN = {
    "the square root of tokens": lambda rs: [[np.sqrt(len(row)) for row in r] for r in rs],
    "twice the tokens beyond 20": lambda rs: [[max(20, len(row)) for row in r] for r in rs],
    "the longest row": lambda rs: [[max(map(len, r)) for _ in r] for r in rs],
    "the first datum only": lambda rs: [[1 if i == 0 else 1e9 for i in range(len(r))] for r in rs],
    "the last request only": lambda rs: [[1 if r is rs[-1] else 1e9 for _ in r] for r in rs],
    "squares of weights": lambda rs: [[max(1.0, float((row**2).sum())) for row in r] for r in rs],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_trainer_that_fits_no_reduction_is_not_guessed_at(name):
    with pytest.raises(UnknownReductionError, match="none of the reductions known here"):
        measure_reduction(LinearTrainer(UNKNOWN[name]))


@pytest.mark.parametrize("kept", [Reduction(), SKYRL, HATCHERY, MEMBERS[58]], ids=str)
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_was_kept_is_not_confirmed_by_a_trainer_that_fits_no_reduction(name, kept):
    with pytest.raises(UnknownReductionError):
        confirm_reduction(LinearTrainer(UNKNOWN[name]), kept)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (LinearTrainer(floored(Reduction()), noise=1.0), "told|known here"),
        (LinearTrainer(lambda rs: [[np.inf for _ in r] for r in rs]), "a step moved a logprob by"),
        (LinearTrainer(lambda rs: [[np.nan for _ in r] for r in rs]), "moved a logprob by nan"),
        (LinearTrainer(floored(Reduction()), gain=1.3), "times as far the second time|known here"),
    ],
)
def test_what_cannot_be_measured_is_refused(trainer, message):
    with pytest.raises(UnknownReductionError, match=message):
        measure_reduction(trainer)


def test_noise_of_16_bits_is_outweighed_by_longer_steps():
    found = measure_reduction(LinearTrainer(floored(SKYRL), noise=5e-4))
    assert found.reduction == SKYRL


@pytest.mark.parametrize("reduction", [SKYRL, HATCHERY], ids=str)
def test_a_trainer_that_refuses_a_large_eps_is_measured_within_its_limit(reduction):
    linear = LinearTrainer(floored(reduction), most_eps=1.0)
    linear.features = lambda datum, plain=linear.features: 0.05 * plain(datum)
    assert measure_reduction(linear).reduction == reduction


def as_carried(reduction):
    """The reduction as a gradient meets it, which is carried with weights of 1 if by advantages."""
    if reduction.loss_fn == "cross_entropy":
        return reduction, "cross_entropy"
    counts = {"weighted_tokens": "weights", "sequences": "datums"}
    units = (reduction.per_sequence, reduction.per_request, reduction.per_step)
    sequence, request, step = (counts.get(unit, unit) for unit in units)
    return Reduction(sequence, per_request=request, per_step=step), "importance_sampling"


@pytest.mark.parametrize("now", [Reduction(), SKYRL, HATCHERY, MEMBERS[58]], ids=str)
def test_what_was_once_measured_is_confirmed_only_where_it_still_holds(now):
    assert confirm_reduction(LinearTrainer(floored(now)), now).error < 1e-2
    for other in MEMBERS:
        if as_carried(other) != as_carried(now):
            with pytest.raises(UnknownReductionError):
                confirm_reduction(LinearTrainer(floored(now)), other)
