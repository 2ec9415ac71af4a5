"""A double, its logprobs as a function, and a loss of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mintjax.ragged.batch import Batch
from mintjax.remote.logprobs import RemoteLogprobs, remote_logprobs

from .double import Double, make


@pytest.fixture
def data() -> Batch:
    return Batch(make())


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture
def remote(double: Double, data: Batch) -> RemoteLogprobs:
    return remote_logprobs(double, data)


@pytest.fixture
def loss(remote: RemoteLogprobs, data: Batch) -> Callable[[Any], Any]:
    """``sum(w * lp^2)``, whose derivative by ``lp`` is ``2 * w * lp``."""

    def loss(params: Any) -> Any:
        logprobs = remote(params)
        return (logprobs * logprobs * data["weights"]).total()

    return loss
