"""A model that was made to measure a trainer is gone afterwards."""

import pytest

from mintjax.errors import MintjaxError
from mintjax.local import Dialect, trainer
from mintjax.step.reduction import SUM

NANO = "mintjax/nano"
UNSTATED = Dialect(states_reduction=False)


def test_throwaway_models_are_unloaded_when_the_trainer_fails(engine, monkeypatch):
    def fail(model_id, params):
        raise RuntimeError("out of memory")

    with trainer(engine, like=UNSTATED) as service:
        before = set(engine.models)
        monkeypatch.setattr(engine, "optim_step", fail)
        with pytest.raises(MintjaxError, match="out of memory"):
            service.probe(NANO)
        assert set(engine.models) == before
        monkeypatch.undo()
        assert service.probe(NANO) == SUM
