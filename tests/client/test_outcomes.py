"""Which end of an attempt frees a number, and which may have been applied: every row."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest

from mintjax.client.outcomes import Ending, ending_of, verdict
from mintjax.errors import APIError, MintjaxError, NotSentError
from mintjax.types import AdamParams

from .data import DATA
from .double import QUICK, Answer, Lose

KEY_HEADER = "x-idempotency-key"
OWN = {"detail": "the trainer's own words"}

ROWS: dict[Ending, list[Any]] = {
    "unsent": [Lose("unsent")],
    "cut": [Lose("before"), Lose("after")],
    "unreadable": [
        Answer(200, b"\xff"),
        Answer(200, {"status": "pending"}),
        Answer(200, b"gar", {"Content-Encoding": "gzip"}),
        Answer(200, {"request_id": "request-0"}),  # which was that of create_model
        Answer(200, {"request_id": "new"}, {"X-Idempotency-Key": "another's"}),
        Answer(422, OWN, {"X-Idempotency-Key": "another's"}),
    ],
    "unavailable": [
        Answer(503, OWN),
        Answer(501),
        Answer(501, {"detail": "Not Implemented"}),
        Answer(408),
        Answer(425),
        Answer(409),
        Answer(429),
        Answer(429, b"", {"Retry-After": "1e9"}),
        Answer(429, {"error": "a gateway's"}),
    ],
    "throttled": [Answer(429, OWN), Answer(429, OWN, {"Retry-After": "1e9"})],
    "conflict": [Answer(409, OWN)],
    "refused": [Answer(status, OWN) for status in (400, 404, 413, 422, 501)],
    "foreign": [
        Answer(410),
        Answer(410, OWN),
        Answer(400),
        Answer(400, {"message": "a gateway's"}),
        Answer(404, b"<html>no upstream</html>"),
        Answer(404, {"detail": "Not Found"}),
        Answer(413, {"error": "a gateway's"}),
        Answer(302, headers={"location": "https://login.example"}),
    ],
}
FREES = {"unsent", "throttled", "refused"}


def test_every_ending_is_a_row():
    assert set(ROWS) == set(get_args(Ending))


@pytest.mark.parametrize("ending", ROWS)
def test_doubt_is_never_taken_away(ending):
    assert verdict(ending, True).in_doubt
    assert verdict(ending, False).in_doubt == (ending not in FREES)


@pytest.mark.parametrize(
    ("status", "detail", "ending"),
    [
        (422, "no", "refused"),
        (404, "Not Found", "foreign"),
        (404, "", "foreign"),
        (410, "gone", "foreign"),
        (409, "this number is taken", "conflict"),
        (409, "Conflict", "unavailable"),
        (429, "slow down", "throttled"),
        (429, "Too Many Requests", "unavailable"),
        (500, "broken", "unavailable"),
        (501, "loss_fn 'dro' is not implemented", "refused"),
        (501, "Not Implemented", "unavailable"),
        (599, "", "unavailable"),
        (100, "", "foreign"),
        (302, "elsewhere", "foreign"),
    ],
)
def test_what_a_status_says(status, detail, ending):
    assert ending_of(status, detail) == ending


FAULTS = [(ending, fault) for ending, faults in ROWS.items() for fault in faults]


@pytest.mark.parametrize(("ending", "fault"), FAULTS)
@pytest.mark.parametrize("act", [False, True])
def test_a_number_is_freed_only_by_a_certain_refusal(client, trainer, ending, fault, act):
    """Whether or not the request had been applied, which the client cannot know."""
    if isinstance(fault, Answer) and ending not in FREES:
        fault = Answer(fault.status, fault.body, fault.headers, act)
    trainer.faults["optim_step"] = [fault] * 1000
    with pytest.raises(APIError) as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied == (ending not in FREES)
    assert caught.value.may_have_been_applied or trainer.models["model-0"] == []
    trainer.faults.clear()
    if ending not in FREES:
        with pytest.raises(MintjaxError, match="nothing more can be sent"):
            client.forward_backward(DATA)
        return
    client.forward_backward(DATA).result(5)
    assert trainer.bodies("forward_backward")[-1]["seq_id"] == 1
    assert [op[0] for op in trainer.models["model-0"]] == ["forward_backward"]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (a[1], b[1])
        for a, b in itertools.product(FAULTS, [("refused", Answer(422, OWN)), FAULTS[-1]])
        if a[0] not in FREES
    ],
)
def test_a_refusal_after_a_doubt_frees_nothing(client, trainer, first, then):
    trainer.faults["optim_step"] = [first, *[then] * 1000]
    with pytest.raises(APIError) as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied


@pytest.mark.parametrize("first", [Lose("unsent"), Answer(429, OWN)])
def test_a_refusal_after_what_left_no_doubt_frees_the_number(client, trainer, first):
    trainer.faults["optim_step"] = [first, Answer(422, OWN)]
    with pytest.raises(APIError) as caught:
        client.optim_step(AdamParams()).result(5)
    assert not caught.value.may_have_been_applied
    client.optim_step(AdamParams()).result(5)
    assert len(trainer.models["model-0"]) == 1


def squared(data, logprobs):
    return (logprobs.sum() ** 2).mean(), {}


def says_no_endpoint(fault):
    """After which passes are protocol buffers, which this trainer does not read."""
    return isinstance(fault, Answer) and fault.body == {"detail": "Not Found"}


@pytest.mark.parametrize(
    ("ending", "fault"), [(e, fault) for e, fault in FAULTS if not says_no_endpoint(fault)]
)
def test_a_forward_pass_in_doubt_is_asked_again_before_the_next_request(
    client, trainer, ending, fault
):
    trainer.faults["forward"] = [fault] * 1000
    step = client.forward_backward_custom(DATA, squared)
    with pytest.raises(APIError) as caught:
        step.result(30)
    assert not caught.value.may_have_been_applied  # it changes nothing
    if ending == "unsent":
        return
    with pytest.raises(APIError) as caught:
        client.forward(DATA).result(5)
    assert not caught.value.may_have_been_applied
    assert len(set(numbers(trainer, "forward"))) == 1
    trainer.faults.clear()
    client.optim_step(AdamParams()).result(5)
    used = [number for path in ("forward", "optim_step") for number in numbers(trainer, path)]
    assert sorted(set(used)) == ([1] if ending in FREES else [1, 2])


def numbers(trainer, path):
    return [body["seq_id"] for body in trainer.bodies(path)]


def test_what_was_accepted_is_never_freed(client, trainer):
    """Its promise is gone; the request is sent again, and refused."""
    trainer.faults["optim_step"] = [None, Answer(422, OWN)]
    trainer.faults["retrieve_future/request-1"] = [Answer(410)]
    with pytest.raises(APIError) as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied
    assert len(trainer.models["model-0"]) == 1


def test_an_echoing_trainer_is_not_impersonated(client, trainer, monkeypatch):
    """Once a trainer has repeated a key, who does not is somebody else."""
    act = trainer.act

    def echo(path, body, headers):
        answer = act(path, body, headers)
        return Answer(
            answer.status, answer.body, {"X-Idempotency-Key": headers["x-idempotency-key"]}
        )

    monkeypatch.setattr(trainer, "act", echo)
    client.forward(DATA).result(5)
    trainer.faults["optim_step"] = [Answer(422, OWN)] * (QUICK.bad_answers + 1)
    with pytest.raises(APIError) as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied


def test_a_line_in_doubt_withholds_what_stands_behind(client, trainer):
    trainer.faults["optim_step"] = [Answer(410)] * 1000
    first = client.optim_step(AdamParams())
    behind = [client.forward_backward(DATA), client.optim_step(AdamParams())]
    assert first.exception(5).may_have_been_applied
    for future in behind:
        error = future.exception(5)
        assert isinstance(error, NotSentError)
        assert not error.may_have_been_applied
