"""Faults on the way: what is sent again, what is final, and what is left in doubt."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time

import httpx
import msgspec
import pytest

from mintjax.client import RetryPolicy
from mintjax.client.settings import Patience, retry_after
from mintjax.errors import (
    AmbiguousRequestError,
    APIConnectionError,
    APIError,
    APIResponseError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    BillingError,
    InternalServerError,
    NotFoundError,
    NotSentError,
    RateLimitError,
    RequestFailedError,
)
from mintjax.protocol import messages
from mintjax.types import AdamParams

from .data import DATA
from .double import ADDRESS, QUICK, Answer, Hold, Lose

ADAM = AdamParams()


def sent(trainer, path):
    return [
        (body["seq_id"], headers["x-idempotency-key"])
        for at, body, headers in trainer.requests
        if at == path
    ]


PASSING = {
    "unreachable": Lose("unsent"),
    "lost before": Lose("before"),
    "lost after": Lose("after"),
    **{str(status): Answer(status) for status in (400, 408, 409, 429, 500, 502, 503, 504)},
    "after, 500": Answer(500, act=True),
    "after, garbage": Answer(200, b"\xff\x00garbage", act=True),
    "after, truncated": Answer(200, b'{"request_id": "requ', act=True),
    "another type": Answer(200, [1, 2, 3]),
    "retry-after": Answer(429, headers={"retry-after": "0.01"}),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("path", ["forward", "forward_backward", "optim_step"])
def test_a_passing_fault_changes_nothing(client, trainer, path, fault):
    trainer.faults[path] = [PASSING[fault]] * 2
    submit = {
        "forward": lambda: client.forward(DATA),
        "forward_backward": lambda: client.forward_backward(DATA),
        "optim_step": lambda: client.optim_step(ADAM),
    }
    future = submit[path]()
    client.save_state("after").result(5)
    future.result(5)
    attempts = sent(trainer, path)
    assert len(set(attempts)) == 1
    assert attempts[0][0] == 1
    applied = [] if path == "forward" else [path]
    assert [op[0] for op in trainer.models["model-0"]] == [*applied, "save_weights"]


@pytest.mark.parametrize("fault", [*PASSING, "410"])
def test_a_passing_fault_while_waiting_for_the_result(client, trainer, fault):
    trainer.faults["retrieve_future"] = [PASSING.get(fault, Answer(410))] * 2
    client.optim_step(ADAM).result(5)
    assert [op[0] for op in trainer.models["model-0"]] == ["optim_step"]
    assert len(set(sent(trainer, "optim_step"))) == 1
    assert len(sent(trainer, "optim_step")) == (3 if fault == "410" else 1)


def test_a_large_result_is_asked_for_in_full(client, trainer):
    trainer.faults["retrieve_future"] = [
        Answer(200, {"status": "complete_metadata", "response_payload_size": 100})
    ]
    client.forward(DATA).result(5)
    asked = [body.get("allow_metadata_only", False) for body in trainer.bodies("retrieve_future")]
    assert asked[-2:] == [True, False]


@pytest.mark.parametrize("known_beforehand", [True, False])
def test_a_result_that_is_too_large_is_not_read(connect, trainer, known_beforehand):
    client = connect(max_response_bytes=5000).create_lora_training_client("tiny")
    trainer.faults["retrieve_future"] = [
        Answer(200, {"status": "complete_metadata", "response_payload_size": 6000})
        if known_beforehand
        else Answer(200, b" " * 6000)
    ]
    with pytest.raises(APIError, match="max_response_bytes"):
        client.forward(DATA).result(5)
    client.forward(DATA).result(5)


def test_an_answer_in_a_coding_that_was_not_asked_for_is_not_unfolded(client, trainer):
    trainer.faults["retrieve_future"] = [Answer(200, b"(", {"Content-Encoding": "zstd"})]
    with pytest.raises(APIError, match="'zstd', which was not asked for"):
        client.forward(DATA).result(5)


def test_progress_is_told_and_holds_nothing_of_the_data(connect, trainer, caplog):
    told = []
    client = connect(on_progress=told.append).create_lora_training_client("tiny")
    told.clear()
    trainer.faults["forward"] = [Answer(503)]
    trainer.faults["retrieve_future"] = [
        Answer(200, {"type": "try_again", "queue_state": "paused_rate_limit"}),
        Answer(502),
    ]
    with caplog.at_level(logging.DEBUG, "mintjax"):
        client.forward(DATA).result(5)
    events = [(p.event, p.path, p.model_id, p.request_id, p.attempt) for p in told]
    assert events == [
        ("retry", "forward", "model-0", None, 2),
        ("accepted", "forward", "model-0", "request-1", 1),
        ("queue", "forward", "model-0", "request-1", 1),
        ("retry", "forward", "model-0", "request-1", 2),
        ("done", "forward", "model-0", "request-1", 2),
    ]
    records = [r for r in caplog.records if r.name == "mintjax.client"]
    assert [vars(r)["request_id"] for r in records] == [event[3] for event in events]
    assert all(str(DATA[0].model_input.to_ints()) not in r.getMessage() for r in records)


def test_a_callback_that_raises_hurts_nobody(connect, trainer, caplog):
    def broken(progress):
        raise ValueError("mine")

    client = connect(on_progress=broken).create_lora_training_client("tiny")
    client.forward(DATA).result(5)
    assert "on_progress failed" in caplog.text


def test_a_storm_of_try_again(client, trainer):
    trainer.faults["retrieve_future"] = [Answer(200, {"type": "try_again"})] * 20
    assert len(client.forward(DATA).result(20).loss_fn_outputs) == len(DATA)
    assert trainer.faults["retrieve_future"] == []


def test_a_change_of_the_queue_is_told_once(client, trainer, caplog):
    def wait(state, status=200):
        return Answer(
            status, {"type": "try_again", "queue_state": state, "queue_state_reason": "why"}
        )

    paused = "paused_capacity"
    trainer.faults["retrieve_future"] = [wait(paused)] * 3 + [wait(paused, 408), wait("active")]
    with caplog.at_level(logging.INFO, "mintjax"):
        client.forward(DATA).result(5)
    told = [r.getMessage() for r in caplog.records if "queue" in r.getMessage()]
    assert len(told) == 2
    assert "paused capacity: why" in told[0]
    assert "model-0" in told[0]


FINAL = {
    400: BadRequestError,
    401: AuthenticationError,
    402: BillingError,
    403: AuthenticationError,
    404: NotFoundError,
    413: BadRequestError,
    422: BadRequestError,
}


@pytest.mark.parametrize("status", FINAL)
def test_a_final_status_shows_the_trainers_words_and_gives_the_number_back(client, trainer, status):
    trainer.faults["optim_step"] = [Answer(status, {"detail": "these words"})]
    with pytest.raises(FINAL[status], match=f"HTTP {status}.*these words") as caught:
        client.optim_step(ADAM).result(5)
    assert not caught.value.may_have_been_applied
    client.optim_step(ADAM).result(5)
    assert [seq for seq, _ in sent(trainer, "optim_step")] == [1, 1]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("rank is too large", "rank is too large"),
        ({"msg": "too large", "loc": ["body", "rank"]}, "body.rank: too large"),
        ({"msg": "too large"}, "too large"),
        ({"rank": 7}, "{'rank': 7}"),
    ],
)
def test_what_a_validator_says_is_put_into_words(client, trainer, item, words):
    trainer.faults["optim_step"] = [Answer(422, {"detail": [item, "and more"]})]
    with pytest.raises(BadRequestError) as caught:
        client.optim_step(ADAM).result(5)
    assert f"{words}; and more" in str(caught.value)


def test_a_load_that_is_refused_says_how_some_trainers_load(client, trainer):
    detail = "LoadWeights is not permitted with seq_id 3"  # SkyRL 0.4
    trainer.faults["load_weights"] = [Answer(400, {"detail": detail})]
    with pytest.raises(BadRequestError, match=f"{detail}.*create_training_client_from_state"):
        client.load_state("tinker://a/weights/b").result(5)


def test_a_result_that_the_trainer_cannot_write_says_where_to_look(client, trainer):
    trainer.faults["retrieve_future"] = [Answer(500, b"Internal Server Error")] * 100
    with pytest.raises(APIError, match=r"the trainer's log says why.*vocabulary"):
        client.forward(DATA).result(5)


def test_billing_is_named(client, trainer):
    trainer.faults["optim_step"] = [Answer(402, {"detail": "top up"})]
    with pytest.raises(BillingError, match="billing is paused"):
        client.optim_step(ADAM).result(5)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_final_status_of_a_result(client, trainer, status):
    trainer.faults["retrieve_future/request-1"] = [Answer(status, {"detail": "these words"})]
    with pytest.raises(FINAL[status], match="these words"):
        client.forward(DATA).result(5)
    client.forward(DATA).result(5)


def test_a_trainer_without_room_for_a_model_says_what_takes_it_up(service, trainer):
    words = "Maximum number of LoRA adapters (8) reached"  # skyrl-tx 0.3
    trainer.faults["retrieve_future"] = [Answer(400, {"detail": words})]
    with pytest.raises(BadRequestError, match="not unloaded take up their places") as caught:
        service.create_lora_training_client("tiny")
    assert words in str(caught.value)
    assert "checkpoint" not in str(caught.value)  # there is nothing to go on from


def test_a_failure_that_is_told_by_a_status_is_not_called_probable(client, trainer):
    words = "Loss functions ['gspo'] are not supported by the JAX backend"  # SkyRL 0.4
    trainer.faults["retrieve_future/request-1"] = [Answer(400, {"detail": words})]
    with pytest.raises(BadRequestError) as caught:
        client.forward_backward(DATA, "gspo").result(5)
    assert "forward_backward may or may not have been applied" in str(caught.value)
    assert caught.value.may_have_been_applied


def test_a_proxys_400_is_borne_with_only_so_often(client, trainer):
    trainer.faults["optim_step"] = [Answer(400)] * 10
    with pytest.raises(BadRequestError):
        client.optim_step(ADAM).result(5)
    assert len(sent(trainer, "optim_step")) == 1 + QUICK.bad_answers


def test_rate_limits_are_waited_for_and_then_named(client, trainer):
    trainer.faults["optim_step"] = [Answer(429, {"detail": "slow down"}, {"retry-after": "60"})]
    with pytest.raises(RateLimitError, match="slow down"):
        client.optim_step(ADAM).result(5)  # a minute is beyond the deadline
    client.optim_step(ADAM).result(5)
    assert [seq for seq, _ in sent(trainer, "optim_step")] == [1, 1]


def test_a_redirect_is_not_followed(client, trainer):
    elsewhere = Answer(307, headers={"location": "https://elsewhere.example"})
    trainer.faults["get_info"] = [elsewhere]
    with pytest.raises(APIResponseError, match="not followed"):
        client.get_info()
    trainer.faults["optim_step"] = [elsewhere] * 10
    with pytest.raises(AmbiguousRequestError, match="not followed"):
        client.optim_step(ADAM).result(5)
    assert len(sent(trainer, "optim_step")) == 1 + QUICK.bad_answers


def test_an_unreachable_trainer_is_named(connect, trainer):
    trainer.faults["client/config"] = [Lose("unsent")] * 1000
    with pytest.raises(APIConnectionError, match=rf"{ADDRESS}.*attempts in \d"):
        connect().create_lora_training_client("tiny")
    trainer.faults.clear()


def test_the_same_client_reaches_a_trainer_that_starts_later(service, trainer):
    trainer.faults["client/config"] = [Lose("unsent")] * 1000
    with pytest.raises(APIConnectionError):
        service.create_lora_training_client("tiny")
    trainer.faults.clear()
    assert service.create_lora_training_client("tiny").model_id == "model-0"


def test_no_connection_at_all_gives_the_number_back(client, trainer):
    trainer.faults["optim_step"] = [Lose("unsent")] * 1000
    with pytest.raises(APIConnectionError) as caught:
        client.optim_step(ADAM).result(5)
    assert not caught.value.may_have_been_applied
    trainer.faults.clear()
    client.optim_step(ADAM).result(5)
    assert sent(trainer, "optim_step")[0][0] == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Lose("after"), AmbiguousRequestError),
        (Answer(200, b"garbage", act=True), AmbiguousRequestError),
        (Answer(503, {"detail": "down"}), InternalServerError),
    ],
)
def test_a_request_in_doubt_ends_the_line(client, service, trainer, fault, error):
    trainer.faults["optim_step"] = [fault] * 1000
    step = client.optim_step(ADAM)
    behind = client.forward(DATA)
    with pytest.raises(error) as caught:
        step.result(5)
    assert caught.value.may_have_been_applied
    with pytest.raises(NotSentError, match=r"optim_step.*checkpoint") as withheld:
        behind.result(5)
    assert not withheld.value.may_have_been_applied
    with pytest.raises(AmbiguousRequestError, match=r"optim_step.*checkpoint"):
        client.forward(DATA)
    assert trainer.bodies("forward") == []
    another = service.create_lora_training_client("tiny")
    another.forward(DATA).result(5)


@pytest.mark.parametrize("status", [401, 422])
def test_a_refusal_after_a_lost_attempt(client, trainer, status):
    """The lost attempt may still be under way."""
    trainer.faults["optim_step"] = [Lose("before"), Answer(status, {"detail": "no"})]
    with pytest.raises(FINAL[status]) as caught:
        client.optim_step(ADAM).result(5)
    assert caught.value.may_have_been_applied
    with pytest.raises(AmbiguousRequestError):
        client.optim_step(ADAM)


def test_policy_may_forbid_to_repeat_what_may_have_been_applied(connect, trainer):
    careful = msgspec.structs.replace(QUICK, repeat_unanswered=False)
    client = connect(retry_policy=careful).create_lora_training_client("tiny")
    trainer.faults["forward"] = [Lose("after")]
    client.forward(DATA).result(5)
    trainer.faults["forward_backward"] = [
        Lose("unsent"),
        Answer(429, {"detail": "slow down"}),
        Lose("after"),
    ]
    with pytest.raises(AmbiguousRequestError, match="may or may not"):
        client.forward_backward(DATA).result(5)
    assert len(sent(trainer, "forward_backward")) == 2
    with pytest.raises(AmbiguousRequestError):
        client.optim_step(ADAM)


def test_a_result_that_never_comes(client, trainer):
    trainer.faults["retrieve_future/request-1"] = [Lose("before")] * 1000
    with pytest.raises(AmbiguousRequestError, match="probably been applied"):
        client.optim_step(ADAM).result(5)
    client.save_state("after").result(5)


def test_a_result_that_cannot_be_read(client, trainer):
    trainer.faults["retrieve_future/request-1"] = [Answer(200, b"garbage")] * 1000
    with pytest.raises(AmbiguousRequestError, match="probably been applied") as caught:
        client.optim_step(ADAM).result(5)
    assert caught.value.may_have_been_applied
    trainer.faults["retrieve_future/request-2"] = [Answer(200, b"garbage")] * 1000
    with pytest.raises(APIResponseError, match="not a"):
        client.forward(DATA).result(5)


def test_a_trainer_that_does_not_answer_in_time(connect, trainer):
    impatient = msgspec.structs.replace(QUICK, deadline=0.05)
    service = connect(retry_policy=impatient, timeout=0.02)
    held = Hold()
    trainer.faults["get_server_capabilities"] = [held] * 100
    with pytest.raises(APITimeoutError, match="get_server_capabilities"):
        service.get_server_capabilities()
    held.release()


def test_a_failed_request_is_not_repeated(client, trainer):
    trainer.faults["retrieve_future/request-1"] = [
        Answer(200, {"error": "bad loss", "category": "user"})
    ]
    with pytest.raises(RequestFailedError, match=r"bad loss.*request-1.*user"):
        client.optim_step(ADAM).result(5)
    assert len(sent(trainer, "optim_step")) == 1


@pytest.mark.parametrize("fault", [None, Answer(500), Answer(200, b"x")])
def test_a_trainer_may_have_no_config(connect, trainer, fault):
    trainer.faults["client/config"] = [fault] * 1000 if fault else []
    trainer.config = {"fwdbwd_max_chunk_len": 1, "unknown": True}
    client = connect().create_lora_training_client("tiny")
    client.forward(DATA).result(5)
    assert len(trainer.bodies("forward")) == (2 if fault is None else 1)


def test_a_wrong_key_is_refused_before_anything_else(connect, trainer):
    trainer.key = "another"
    with pytest.raises(AuthenticationError, match="API key"):
        connect().create_lora_training_client("tiny")
    assert trainer.paths() == ["client/config"]


def test_session_messages_reach_the_log(connect, trainer, caplog):
    trainer.faults["create_session"] = [
        Answer(200, {"session_id": "s", "warning_message": "old", "info_message": "hello"})
    ]
    with caplog.at_level(logging.INFO, "mintjax"):
        connect().create_lora_training_client("tiny")
    levels = {r.getMessage(): r.levelname for r in caplog.records if "says" in r.getMessage()}
    assert levels == {"the trainer says: hello": "INFO", "the trainer says: old": "WARNING"}


def test_a_session_names_the_sdk_whose_protocol_it_speaks(service, trainer):
    service.get_client_config()
    for path in ("client/config", "create_session"):
        assert trainer.bodies(path)[0]["sdk_version"] == messages.SDK_VERSION


def test_a_session_shows_signs_of_life(connect, trainer):
    lively = msgspec.structs.replace(QUICK, heartbeat=0.005)
    client = connect(retry_policy=lively).create_lora_training_client("tiny")
    trainer.faults["session_heartbeat"] = [Lose("before"), Answer(500)]
    while trainer.paths("session_heartbeat")[4:] == []:
        client.forward(DATA).result(5)
    assert trainer.bodies("session_heartbeat")[0]["session_id"] == "session-1"


def test_silence_is_told_once(connect, trainer, caplog, monkeypatch):
    monkeypatch.setattr("mintjax.client.connection._WARN_WITHOUT_HEARTBEAT", 0.0)
    lively = msgspec.structs.replace(QUICK, heartbeat=0.005)
    trainer.refuse = lambda path, body: Answer(500) if path == "session_heartbeat" else None
    client = connect(retry_policy=lively).create_lora_training_client("tiny")
    while trainer.paths("session_heartbeat")[4:] == []:
        client.forward(DATA).result(5)
    told = [record for record in caplog.records if "no heartbeat has reached" in record.message]
    assert [record.levelname for record in told] == ["WARNING"]


def test_retry_after_is_a_number_or_a_date():
    def header(value):
        return httpx.Headers({"retry-after": value})

    assert retry_after(header("2.5")) == 2.5
    assert retry_after(httpx.Headers()) is None
    assert retry_after(header("soon")) is None
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert retry_after(header(date)) == pytest.approx(100, abs=3)
    assert retry_after(header("Wed, 21 Oct 2015 07:28:00 GMT")) == 0.0


def test_delays_double_with_jitter_up_to_a_bound(monkeypatch):
    delays = []

    async def sleep(delay):
        delays.append(delay)

    monkeypatch.setattr("asyncio.sleep", sleep)
    patience = Patience(RetryPolicy(first_delay=0.5, longest_delay=8.0))

    def wait(**options):
        return asyncio.run(patience.wait(300, **options))

    assert all(wait() for _ in range(7))
    for delay, most in zip(delays, [0.5, 1, 2, 4, 8, 8, 8], strict=True):
        assert most / 2 <= delay <= most
    assert len(set(delays)) == 7
    assert wait(retry_after=100)
    assert delays[-1] == 100
    assert not wait(retry_after=301)


def test_what_a_trainer_offers(service):
    assert service.get_server_capabilities().supported_models[0].model_name == "tiny"
