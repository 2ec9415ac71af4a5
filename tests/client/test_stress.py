"""Everything at once, and closing in the middle of it."""

from __future__ import annotations

import pytest

from mintjax.client import ServiceClient
from mintjax.errors import ClosedError

from ..examples import THOROUGH
from .data import DATA
from .double import Hold
from .stress import Crowd, Forgetful, serving, stress


def test_a_crowd_on_one_service_client_gets_its_own_answers():
    requests = 3000 if THOROUGH else 100
    report = stress(requests=requests, threads=32, tasks=32, models=8)
    assert report.errors == []
    assert report.requests >= requests
    assert report.steps > 0
    assert report.futures_left == 0
    if THOROUGH:  # a few requests are no warm-up of so many threads
        assert report.end - report.warm < 32 * 2**20


def test_closing_in_the_middle_ends_everything():
    trainer = Forgetful()
    with serving(trainer) as address, ServiceClient(address, "tml-stress") as service:
        crowd = Crowd(service, threads=32, tasks=32, models=8)
        crowd.compile()
        crowd.start()
        trainer.wait_for(200)
        service.close()
        crowd.join()
    assert len(crowd.errors) == 64  # one for each member, of what it had under way
    assert {type(error) for error in crowd.errors} == {ClosedError}


def test_closing_ends_what_a_trainer_holds(service, trainer):
    clients = [service.create_lora_training_client("tiny") for _ in range(4)]
    holds = [Hold() for _ in range(4)]
    trainer.faults["retrieve_future"] = list(holds)
    futures = [client.forward(DATA) for client in clients for _ in range(8)]
    service.close()
    for future in futures:
        with pytest.raises(ClosedError, match="closed"):
            future.result(0)
    for hold in holds:
        hold.release()
