"""Models of the smallest base, and a trainer that averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from mintjax.local import Engine
from mintjax.step.reduction import Reduction
from mintjax.types import LoraConfig

BASE_MODEL = "mintjax/nano"


@pytest.fixture(scope="session")
def normalising_engine() -> Iterator[Engine]:
    with Engine(reduction=Reduction("weights", per_step="datums")) as engine:
        yield engine


@pytest.fixture
def make_model(engine: Engine) -> Callable[[], str]:
    """Makes models of the smallest base, each with the same adapters; gives their ids."""

    def make_model() -> str:
        return engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))

    return make_model


@pytest.fixture
def model_id(make_model: Callable[[], str]) -> str:
    return make_model()
