"""Connections to the trainer at the level of bytes: half-sent requests, too many of them."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from mintjax import local
from mintjax.local import Limits

HEALTH = b"GET /api/v1/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = b"POST /api/v1/create_session HTTP/1.1\r\nHost: localhost\r\n"
HALF_BODY = HALF + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"


@contextmanager
def connected(url):
    parsed = httpx.URL(url)
    with socket.create_connection((parsed.host, parsed.port), timeout=20) as connection:
        yield connection


def read_all(connection):
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def read_answer(connection):
    """Reads one answer, of which the connection may stay open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


@pytest.fixture(scope="module")
def hasty(engine):
    with local.running_server(engine, limits=Limits(request_seconds=0.2)) as url:
        yield url


@pytest.mark.parametrize("half", [HALF, HALF_BODY, HALF_BODY.replace(b"Content-", b"X-")])
def test_a_request_that_does_not_arrive_whole_is_answered_and_closed(hasty, half):
    with connected(hasty) as connection:
        connection.sendall(half)
        status, answer = read_answer(connection)
        assert status in (408, 415)  # without a length the request is whole, and empty
        if status == 408:
            assert answer["detail"].startswith("request_seconds: ")
            assert "--request-seconds" in answer["detail"]
            assert read_all(connection) == b""
    assert httpx.get(f"{hasty}/api/v1/healthz").status_code == 200


def test_nor_one_that_drips(hasty):
    with connected(hasty) as connection:
        connection.sendall(HALF)
        received = b""
        connection.settimeout(0.02)
        while not received:
            try:
                received = connection.recv(65536)
            except TimeoutError:
                connection.sendall(b"X")
        assert received.startswith(b"HTTP/1.1 408 ")


def test_a_connection_that_says_nothing_is_closed(hasty):
    with connected(hasty) as connection:
        assert read_all(connection) == b""


def test_what_follows_an_answer_has_a_time_of_its_own(hasty):
    with connected(hasty) as connection:
        for _ in range(3):
            connection.sendall(HEALTH)
            assert read_answer(connection) == (200, {"status": "ok"})
        connection.sendall(HALF)
        assert read_answer(connection)[0] == 408


def test_a_request_that_is_whole_may_be_at_work_for_longer(hasty):
    """Whoever waits for a result is not late: the 0.2 s are for sending."""
    with httpx.Client(base_url=f"{hasty}/api/v1") as client:
        post = client.post
        session_id = post("create_session", json={"sdk_version": "1"}).json()["session_id"]
        create = {"session_id": session_id, "model_seq_id": 0, "base_model": "mintjax/small"}
        accepted = post("create_model", json=create).json()
        model_id = post("retrieve_future", json=accepted).json()["model_id"]
        data = [
            {
                "model_input": {"chunks": [{"tokens": [1] * 700, "type": "encoded_text"}]},
                "loss_fn_inputs": {
                    name: {"data": [1] * 700, "dtype": dtype, "shape": [700]}
                    for name, dtype in (("target_tokens", "int64"), ("weights", "float32"))
                },
            }
        ]
        given = {"data": data * 2, "loss_fn": "cross_entropy"}
        accepted = post("forward", json={"model_id": model_id, "forward_input": given}).json()
        answer = post("retrieve_future", json=accepted, timeout=60)
        assert answer.elapsed.total_seconds() > 0.2
        assert "metrics" in answer.json()


def test_a_large_body_that_stops_is_given_up(hasty):
    with connected(hasty) as connection:
        head = HALF + b"Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
        connection.sendall(head + b" " * 500_000)
        assert read_answer(connection)[0] == 408


def test_many_half_sent_requests_make_room_for_the_next(engine):
    with (
        local.running_server(engine, limits=Limits(max_connections=8)) as url,
        ExitStack() as stack,
    ):
        half_sent = [stack.enter_context(connected(url)) for _ in range(40)]
        for connection in half_sent:
            try:
                connection.sendall(HALF)
            except ConnectionError:
                continue
        assert httpx.get(f"{url}/api/v1/healthz").status_code == 200
        closed = half_sent[:33]
        answers = [read_all(connection) for connection in closed]
        told = [answer for answer in answers if answer]
        assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in told)
        assert all(b"--max-connections" in answer for answer in told)


def test_where_all_are_at_work_one_more_is_told_so(engine):
    with (
        local.running_server(engine, limits=Limits(max_connections=1)) as url,
        connected(url) as busy,
    ):
        head = b"POST /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        create = b'{"sdk_version": "1"}'
        busy.sendall(head % b"create_session" + b"Content-Length: 20\r\n\r\n" + create)
        session_id = read_answer(busy)[1]["session_id"]
        model = json.dumps(
            {"session_id": session_id, "model_seq_id": 0, "base_model": "mintjax/nano"}
        ).encode()
        busy.sendall(head % b"create_model" + b"Content-Length: %d\r\n\r\n" % len(model) + model)
        future = json.dumps(read_answer(busy)[1]).encode()
        busy.sendall(
            head % b"retrieve_future" + b"Content-Length: %d\r\n\r\n" % len(future) + future
        )
        model_id = read_answer(busy)[1]["model_id"]
        step = json.dumps({"model_id": model_id, "seq_id": 9, "adam_params": {}}).encode()
        busy.sendall(head % b"optim_step" + b"Content-Length: %d\r\n\r\n" % len(step) + step)
        future = json.dumps(read_answer(busy)[1]).encode()
        # Its number never comes, so that this is at work until the server ends.
        busy.sendall(
            head % b"retrieve_future" + b"Content-Length: %d\r\n\r\n" % len(future) + future
        )
        answer = _until_refused(url)
        assert answer.status_code == 503
        assert "--max-connections" in answer.json()["detail"]


def _until_refused(url):
    """The request at work arrives when it does; until then its connection gives way."""
    while True:
        answer = httpx.get(f"{url}/api/v1/healthz")
        if answer.status_code != 200:
            return answer
