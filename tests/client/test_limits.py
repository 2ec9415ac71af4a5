"""What a server may cost: seconds, memory, the terminal; and what a wait says."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import logging
import math
import resource
import socket
import sys
import zlib

import httpx
import msgspec
import pytest

from mintjax.client import RetryPolicy, ServiceClient, waiting
from mintjax.client.replies import Reply, largest_content, printable, unfold
from mintjax.client.settings import retry_after
from mintjax.errors import (
    APIConnectionError,
    APIError,
    APIResponseError,
    APITimeoutError,
    BadRequestError,
    ConfigError,
    DataError,
    InternalServerError,
    NotFoundError,
    RateLimitError,
    RequestFailedError,
)
from mintjax.types import AdamParams

from .data import DATA
from .double import ADDRESS, KEY, QUICK, Answer, Lose
from .wire import serving_bytes, whole


@pytest.mark.parametrize("spoil", ["head", "body"])
def test_a_dripping_answer_is_no_answer(spoil):
    async def drip(path, request):
        answer = whole(b" " * 10_000)
        if spoil == "body":
            yield answer[:60]
            answer = answer[60:]
        for byte in answer:
            yield bytes([byte])
            await asyncio.sleep(0.01)

    policy = msgspec.structs.replace(QUICK, deadline=0.1, first_contact=0.1)
    with (
        serving_bytes(drip) as url,
        ServiceClient(url, timeout=0.05, retry_policy=policy) as service,
        pytest.raises(APITimeoutError, match="get_server_capabilities"),
    ):
        service.get_server_capabilities()


def test_a_large_answer_has_the_time_that_its_size_takes():
    """Half a megabyte in fifty parts, each of which comes in time."""
    models = [{"model_name": "x" * 9_980}] * 50
    body = json.dumps({"supported_models": models}).encode()

    async def parts(path, request):
        answer = whole(body)
        for at in range(0, len(answer), 10_000):
            yield answer[at : at + 10_000]
            await asyncio.sleep(0.005)

    with serving_bytes(parts) as url, ServiceClient(url, timeout=0.2) as service:
        assert len(service.get_server_capabilities().supported_models) == 50


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("-5", 0.0),
        ("nan", None),
        ("inf", math.inf),
        ("1e9", 1e9),
        ("1e999", math.inf),
        ("", None),
        ("soon", None),
        ("٣", 3.0),
        ("Fri, 31 Dec 9999 23:59:59 -9959", None),
        ("Mon, 01 Jan 0001 00:00:00 +9959", None),
        ("Wed, 21 Oct 2015 07:28:00 +99999999", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_retry_after_of_any_kind(header, seconds):
    given = httpx.Headers([(b"retry-after", header.encode())])
    found = retry_after(given)
    assert found == seconds or (seconds is None and found in (0.0, math.inf)) or header[0] in "FMW"
    assert found is None or found >= 0


@pytest.mark.parametrize("header", ["1e9", "inf", "1e999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_nobody_sleeps_past_the_deadline(client, trainer, header):
    answer = Answer(429, {"detail": "slow down"}, {"retry-after": header})
    trainer.faults["optim_step"] = [answer]
    trainer.faults["retrieve_future"] = [answer]
    with pytest.raises(RateLimitError):
        client.optim_step(AdamParams()).result(5)
    with pytest.raises(RateLimitError):
        client.forward(DATA).result(5)


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 1e10])
def test_a_timeout_without_end(client, timeout):
    assert client.forward(DATA).result(timeout).loss_fn_outputs
    assert client.forward(DATA).exception(timeout) is None
    assert asyncio.run(client.forward(DATA).result_async(timeout)).loss_fn_outputs
    assert client.logprobs(DATA, timeout=timeout)
    assert client.get_info(timeout=timeout).lora_rank == 4


@pytest.mark.parametrize("name", ["deadline", "first_delay", "blocking"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_policy_of_no_time_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        RetryPolicy(**{name: value})


AGAIN = Answer(200, {"type": "try_again", "queue_state": "paused_capacity"})


@pytest.mark.parametrize(
    "block",
    [
        lambda s, c, **t: s.create_lora_training_client("tiny", **t),
        lambda s, c, **t: s.create_training_client_from_state("tinker://model-0/weights/a", **t),
        lambda s, c, **t: c.logprobs(DATA, **t),
        lambda s, c, **t: c.backward(DATA, *[[[-1.0] * 3, [-1.0] * 2]] * 2, **t),
        lambda s, c, **t: c.save_weights_and_get_sampling_client(**t),
        lambda s, c, **t: s.probe("tiny", **t),
        lambda s, c, **t: c.probe(**t),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_what_blocks_has_a_limit(connect, trainer, block, given):
    """Whatever the trainer says, and however often."""
    blocking = 60.0 if given else 0.02
    service = connect(retry_policy=msgspec.structs.replace(QUICK, blocking=blocking))
    client = service.create_lora_training_client("tiny", timeout=10)
    original = trainer.retrieve
    trainer.retrieve = lambda body: AGAIN
    with pytest.raises(APITimeoutError, match=r"timeout=\.\.\., or RetryPolicy\(blocking=\.\.\.\)"):
        block(service, client, **({"timeout": 0.02} if given else {}))
    trainer.retrieve = original


@pytest.mark.parametrize(
    "block",
    [
        lambda s, c: s.get_server_capabilities(timeout=0.02),
        lambda s, c: s.create_sampling_client(base_model="tiny", timeout=0.02),
        lambda s, c: c.create_sampling_client("tinker://a", timeout=0.02),
        lambda s, c: c.get_info(timeout=0.02),
    ],
)
def test_what_is_answered_at_once_has_a_limit(connect, trainer, block):
    service = connect(retry_policy=msgspec.structs.replace(QUICK, deadline=60.0))
    client = service.create_lora_training_client("tiny")
    trainer.refuse = lambda path, body: Answer(503)
    with pytest.raises(APITimeoutError, match=r"timeout=\.\.\."):
        block(service, client)


def test_a_result_has_a_limit(connect, trainer):
    policy = msgspec.structs.replace(QUICK, result=0.02)
    client = connect(retry_policy=policy).create_lora_training_client("tiny")
    trainer.retrieve = lambda body: AGAIN
    with pytest.raises(APITimeoutError, match=r"paused capacity.*RetryPolicy\(result=") as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied


class TestMemory:
    def test_gzip_is_unfolded_within_a_limit(self):
        content = b"0.0," * 1000
        body = gzip.compress(content)
        assert unfold(body, "gzip", 4000) == content
        assert unfold(body + body, "gzip", 8000) == content * 2
        with pytest.raises(APIError, match="limit of 3,999"):
            unfold(body, "gzip", 3999)
        with pytest.raises(DataError, match="too early"):
            unfold(body[:-9], "gzip", 4000)
        with pytest.raises(DataError, match="no gzip"):
            unfold(b"plain", "gzip", 4000)

    def test_the_limit_grows_with_what_came(self):
        assert largest_content(10, 1 << 30) == 64 << 20
        assert largest_content(1 << 20, 1 << 30) == 100 << 20
        assert largest_content(1 << 20, 1000) == 1000

    def test_a_bomb_of_gzip_is_refused(self, client, trainer):
        packer = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
        spaces = b" " * (1 << 20)
        bomb = b"".join([*(packer.compress(spaces) for _ in range(200)), packer.flush()])
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        trainer.faults["retrieve_future"] = [Answer(200, bomb, headers)]
        before = peak()
        with pytest.raises(APIError, match="unfolds to more than"):
            client.forward(DATA).result(10)
        assert peak() - before < 180 << 20

    @pytest.mark.parametrize("times", [1, 1000])
    def test_a_sparse_tensor_stays_small(self, client, trainer, times):
        one = {
            "data": [0.5],
            "dtype": "float32",
            "shape": [1, 2**28 // times],
            "sparse_crow_indices": [0, 1],
            "sparse_col_indices": [0],
        }
        outputs = [{"logprobs": one, **{f"x{i}": one for i in range(times - 1)}}]
        trainer.faults["retrieve_future"] = [Answer(200, {"loss_fn_outputs": outputs})]
        before = peak()
        with pytest.raises(APIError, match=r"unfolds to|beyond the limit"):
            client.forward(DATA).result(10)
        assert peak() - before < 64 << 20


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


STEERS = "\x1b[2J\x1b]0;owned\x07\r\x9b\u202e\x00 no\nforged line"


def test_what_is_shown_cannot_steer_a_terminal():
    shown = printable(STEERS)
    assert shown.replace("\n", "").isprintable()
    assert "\n  forged" in shown
    assert printable("Grüße, 你好\ttab") == "Grüße, 你好\ttab"


def test_control_characters_of_a_trainer_reach_no_terminal(connect, trainer, caplog):
    def check(text):
        assert text.replace("\n", "").replace("\t", "").isprintable(), ascii(text)

    with caplog.at_level(logging.DEBUG, "mintjax"):
        trainer.faults["create_session"] = [
            Answer(200, {"session_id": "s", "warning_message": STEERS})
        ]
        client = connect().create_lora_training_client("tiny")
        trainer.faults["optim_step"] = [Answer(422, {"detail": STEERS})]
        with pytest.raises(BadRequestError) as refused:
            client.optim_step(AdamParams()).result(5)
        trainer.faults["retrieve_future"] = [
            Answer(200, {"type": "try_again", "queue_state": STEERS, "queue_state_reason": STEERS}),
            Answer(200, {"error": STEERS, "category": "server"}),
        ]
        with pytest.raises(RequestFailedError) as failed:
            client.optim_step(AdamParams()).result(5)
        trainer.faults["retrieve_future"] = [Answer(200, {STEERS: 1})] * 10
        with pytest.raises(APIError) as odd:
            client.optim_step(AdamParams()).result(5)
        trainer.faults["optim_step"] = [Answer(200, {"request_id": STEERS})]
        with pytest.raises(APIError) as unknown:
            client.optim_step(AdamParams()).result(5)
    for caught in (refused, failed, odd, unknown):
        check(str(caught.value))
    for record in caplog.records:
        check(record.getMessage())


@pytest.mark.parametrize("depth", [100, 1000, 100_000])
@pytest.mark.parametrize("kind", [b"[", b'{"a":'])
@pytest.mark.parametrize("field", [b"detail", b"error"])
def test_a_detail_nested_deeply(client, trainer, depth, kind, field):
    inner = kind * depth + b"1" + (b"]" if kind == b"[" else b"}") * depth
    body = b'{"%s": %s, "category": "user"}' % (field, inner)
    trainer.faults["optim_step"] = [Answer(422, body)]
    trainer.faults["retrieve_future"] = [Answer(200, body)] * 10
    for future in (client.optim_step(AdamParams()), client.forward(DATA)):
        assert isinstance(future.exception(5), APIError)
    assert Reply(400, httpx.Headers(), body).words != body.decode()


LIES = [{}, {"status": "pending"}, {"detail": "Not Found"}, {"error": "oops"}, {"metrics2": {}}]
OTHERS = [
    {"loss_fn_outputs": [], "metrics": {}},
    {"path": "tinker://a", "metrics": {}},
    {"metrics": {}, "type": "save_weights"},
    {"type": "try_again", "request_id": "another's"},
]


@pytest.mark.parametrize("answer", LIES + OTHERS)
def test_only_its_own_result_is_the_success_of_an_optimizer_step(client, trainer, answer):
    trainer.faults["retrieve_future"] = [Answer(200, answer)]
    assert client.optim_step(AdamParams()).result(5).metrics is None  # asked for again
    trainer.faults["retrieve_future"] = [Answer(200, answer)] * 100
    with pytest.raises(APIError) as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied


@pytest.mark.parametrize("answer", [*LIES, {"metrics": {}}, {"type": "optim_step"}, OTHERS[0]])
def test_only_its_own_result_is_the_success_of_a_load(client, trainer, answer):
    trainer.faults["retrieve_future"] = [Answer(200, answer)] * 100
    with pytest.raises(APIError) as caught:
        client.load_state("tinker://a").result(5)
    assert caught.value.may_have_been_applied


@pytest.mark.parametrize("answer", [{"type": "load_weights"}, {"path": "p"}, {"path": None}])
def test_what_trainers_answer_to_a_load(client, trainer, answer):
    trainer.faults["retrieve_future"] = [Answer(200, answer)]
    client.load_state("tinker://a").result(5)
    assert not trainer.faults["retrieve_future"]


class TestWaiting:
    """After five seconds, here after a few milliseconds."""

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch):
        monkeypatch.setattr(waiting, "FIRST_LINE", 0.005)

    def told(self, caplog):
        return [r.getMessage() for r in caplog.records if ": waiting, " in r.getMessage()]

    def test_a_trainer_that_does_not_exist(self, connect, trainer, caplog):
        trainer.faults["client/config"] = [Lose("unsent")] * 1000
        policy = msgspec.structs.replace(QUICK, first_contact=0.2)
        with pytest.raises(APIError):
            connect(retry_policy=policy).create_lora_training_client("tiny")
        (line,) = self.told(caplog)
        assert "client/config" in line
        assert "refused by the test" in line
        assert "RetryPolicy(first_contact=...)" in line

    def test_a_trainer_that_dies(self, client, trainer, caplog):
        trainer.faults["optim_step"] = [Answer(500, {"detail": "out of memory"})] * 1000
        with pytest.raises(InternalServerError):
            client.optim_step(AdamParams()).result(5)
        (line,) = [line for line in self.told(caplog) if "out of memory" in line]
        assert "optim_step of model model-0" in line
        assert "HTTP 500: out of memory; this goes on for up to 0 s more" in line
        assert "RetryPolicy(deadline=...)" in line
        assert [r.levelno for r in caplog.records if r.getMessage() == line] == [logging.WARNING]

    def test_a_refused_connection_is_named(self, caplog):
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
        policy = msgspec.structs.replace(QUICK, first_contact=0.2)
        with (
            ServiceClient(url, retry_policy=policy) as service,
            pytest.raises(APIConnectionError, match="Connection refused"),
        ):
            service.get_server_capabilities()
        assert "Connection refused" in self.told(caplog)[0]

    def test_throttling(self, client, trainer, caplog):
        slow = Answer(429, {"detail": "slow down"}, {"retry-after": "0.02"})
        trainer.faults["forward"] = [slow, slow]
        client.forward(DATA).result(5)
        assert any("HTTP 429: slow down" in line for line in self.told(caplog))

    def test_a_queue(self, client, trainer, caplog):
        original, times = trainer.retrieve, itertools.count()
        again = Answer(
            200,
            {"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "full"},
        )
        trainer.retrieve = lambda body: again if next(times) < 12 else original(body)
        client.forward(DATA).result(10)
        line = self.told(caplog)[-1]
        assert "its queue is paused capacity: full" in line
        assert "RetryPolicy(result=...)" in line

    def test_many_waits_for_one_reason_are_told_once(self, client, trainer, caplog, monkeypatch):
        trainer.faults["retrieve_future"] = [Answer(503, {"detail": "down"})] * 10_000
        futures = [client.forward(DATA) for _ in range(8)]
        for future in futures:
            with pytest.raises(InternalServerError):
                future.result(5)
        assert sum("503: down" in line for line in self.told(caplog)) == 1
        monkeypatch.setattr(waiting, "NEXT_LINE", 0.02)
        with pytest.raises(InternalServerError):
            client.forward(DATA).result(5)
        assert sum("503: down" in line for line in self.told(caplog)) > 2

    def test_what_is_quick_is_not_told(self, client, caplog):
        for _ in range(3):
            client.forward(DATA).result(5)
        assert self.told(caplog) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("https_proxy", "nonsense://a"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
    ],
)
def test_an_unusable_environment_names_the_variable(monkeypatch, variable, value):
    for name in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"environment variable {variable} cannot be used"):
        ServiceClient("https://trainer.example", KEY)
    ServiceClient(ADDRESS).close()  # a trainer on this machine is reached without them


def test_an_unreachable_proxy_is_named(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    policy = msgspec.structs.replace(QUICK, first_contact=0.01)
    with (
        ServiceClient("https://trainer.example", KEY, retry_policy=policy) as service,
        pytest.raises(APIConnectionError, match="by way of the proxy that HTTPS_PROXY names"),
    ):
        service.get_server_capabilities()


@pytest.mark.parametrize("names", ["session-1", "model-0"])
def test_a_restarted_trainer_is_named(client, trainer, names):
    trainer.faults["optim_step"] = [Answer(404, {"detail": f"there is no {names!r}"})]
    with pytest.raises(NotFoundError, match=r"was restarted.*create_training_client_from_state"):
        client.optim_step(AdamParams()).result(5)
    gone = Answer(404, {"detail": "there is no request 'request-1'"})
    trainer.faults["retrieve_future/request-1"] = [gone]
    with pytest.raises(NotFoundError, match="was restarted") as caught:
        client.optim_step(AdamParams()).result(5)
    assert caught.value.may_have_been_applied
    trainer.faults["get_info"] = [Answer(404, {"detail": "no such path"})]
    with pytest.raises(NotFoundError) as caught:
        client.get_info()
    assert "restarted" not in str(caught.value)


def test_a_session_that_has_ended_is_told_at_once(connect, trainer, caplog):
    lively = msgspec.structs.replace(QUICK, heartbeat=0.005)
    ended = {"detail": "there is no session 'session-1'"}
    trainer.refuse = lambda path, body: Answer(404, ended) if path == "session_heartbeat" else None
    client = connect(retry_policy=lively).create_lora_training_client("tiny")
    while len(trainer.paths("session_heartbeat")) < 4:
        client.forward(DATA).result(5)
    told = [r.getMessage() for r in caplog.records if "heartbeat" in r.getMessage()]
    assert len(told) == 1
    assert "was restarted" in told[0]


def test_an_answer_of_unknown_length_may_have_been_cut():
    """It would be a shorter message that reads as a whole one."""
    future = b'{"request_id": "r"}'

    async def script(path, request):
        if path == "retrieve_future":
            yield b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\n\r\n"
        elif path == "create_model":
            yield whole(future)
        else:
            yield whole(b"{}" if path == "client/config" else b'{"session_id": "s"}')

    with (
        serving_bytes(script) as url,
        ServiceClient(url, retry_policy=QUICK) as service,
        pytest.raises(APIResponseError, match="may have been cut"),
    ):
        service.create_lora_training_client("tiny")
