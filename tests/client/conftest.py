"""A scripted trainer, and clients that are quick to lose patience with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mintjax.client import ServiceClient, TrainingClient

from .double import ADDRESS, KEY, QUICK, Trainer


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def connect(trainer: Trainer) -> Iterator[Callable[..., ServiceClient]]:
    """Make service clients of the trainer; they are closed at the end."""
    made: list[ServiceClient] = []

    def connect(**options: Any) -> ServiceClient:
        options = {"retry_policy": QUICK, "api_key": KEY, **options}
        service = ServiceClient(ADDRESS, transport=httpx.ASGITransport(trainer), **options)
        made.append(service)
        return service

    yield connect
    for service in made:
        service.close()


@pytest.fixture
def service(connect: Callable[..., ServiceClient]) -> ServiceClient:
    return connect()


@pytest.fixture
def client(service: ServiceClient) -> TrainingClient:
    return service.create_lora_training_client("tiny", rank=4)
