"""The trainer on a socket, in a process of its own, and inside this one."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from mintjax import local
from mintjax.client import ServiceClient
from mintjax.errors import AuthenticationError, ConfigError
from mintjax.local import app
from mintjax.local.access import check_exposure
from mintjax.types import AdamParams, ModelInput, SamplingParams

from .data import batch

ENV = {**os.environ, "PYTHONPATH": str(Path(local.__file__).parents[2])}
PROMPT = ModelInput.from_ints(local.tokenizer.encode("to be"))


def train(service):
    """One of every kind of call, by the client; returns what the last forward pass gave."""
    client = service.create_lora_training_client("mintjax/nano", rank=4, seed=1)
    client.forward_backward(batch(), "cross_entropy")
    client.optim_step(AdamParams(learning_rate=1e-2))
    saved = client.save_state("here").result()
    trained = client.forward(batch(), "cross_entropy").result().metrics["loss:sum"]
    resumed = service.create_training_client_from_state_with_optimizer(saved.path)
    assert resumed.forward(batch(), "cross_entropy").result().metrics["loss:sum"] == trained
    sampler = resumed.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=4, temperature=0.0)
    assert sampler.sample(PROMPT, 1, params).result().sequences[0].tokens
    logprobs = sampler.compute_logprobs(PROMPT).result()
    assert len(logprobs) == PROMPT.length
    return trained


@pytest.fixture(scope="module")
def expected(engine):
    with local.trainer(engine) as service:
        return train(service)


def test_on_a_socket_as_in_process(engine, expected):
    with local.running_server(engine) as url, ServiceClient(url, "sk-any") as service:
        assert train(service) == expected


def test_a_trainer_of_its_own(expected):
    with local.trainer(api_key="sk-mine") as service:
        assert train(service) == expected


def test_a_wrong_key_is_the_client_s_error(engine):
    with (
        local.running_server(engine, api_key="sk-right") as url,
        ServiceClient(url, "sk-wrong") as service,
        pytest.raises(AuthenticationError, match="X-API-Key"),
    ):
        service.create_lora_training_client("mintjax/nano")


def test_the_port_is_free_again(engine):
    with local.running_server(engine) as url:
        port = httpx.URL(url).port or 0
        assert httpx.get(f"{url}/api/v1/healthz").json() == {"status": "ok"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/api/v1/healthz")
    with local.running_server(engine, port=port) as again:
        assert again == url


def test_answers_are_not_held_back_to_be_sent_with_more(engine, monkeypatch):
    delayed: list[bool] = []
    connection_made = H11Protocol.connection_made

    def note(self, transport):
        accepted = transport.get_extra_info("socket")
        delayed.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0)
        connection_made(self, transport)

    monkeypatch.setattr(H11Protocol, "connection_made", note)
    with local.running_server(engine) as url:
        httpx.get(f"{url}/api/v1/healthz")
    assert delayed == [False]


def test_the_log_files_of_the_process_stay_open(engine, tmp_path):
    handler = logging.FileHandler(tmp_path / "training.log", mode="w")
    log = logging.getLogger("of a user")
    log.addHandler(handler)
    try:
        log.error("before")
        with local.running_server(engine):
            log.error("while it runs")
        log.error("after")
    finally:
        log.removeHandler(handler)
        handler.close()
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert lines == ["before", "while it runs", "after"]


def test_a_port_that_is_taken(engine):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"), local.running_server(engine, port=port):
            pass


def test_closing_ends_those_who_wait_for_a_result(engine, monkeypatch):
    """A request whose turn never comes must not hold up the end of the server."""
    waiting, wait = threading.Event(), app._wait

    async def told(*arguments):
        waiting.set()
        await wait(*arguments)

    monkeypatch.setattr(app, "_wait", told)
    with ThreadPoolExecutor(1) as pool:
        with local.running_server(engine) as url, ServiceClient(url, "sk-any") as service:
            client = service.create_lora_training_client("mintjax/nano", rank=4)
            waiting.clear()
            held = {"model_id": client.model_id, "adam_params": {}, "seq_id": 99}
            accepted = httpx.post(f"{url}/api/v1/optim_step", json=held).json()
            poll = pool.submit(httpx.post, f"{url}/api/v1/retrieve_future", json=accepted)
            assert waiting.wait(10)
        assert poll.result(10).json()["error"].startswith("it was not run")


def test_serving_from_a_thread_leaves_signals_alone_and_ends_with_its_error(engine):
    def refuse(url):
        urls.append(url)
        raise LookupError("mine")

    urls, before = [], signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool, pytest.raises(LookupError, match="mine"):
        pool.submit(local.serve, port=0, engine=engine, announce=refuse).result(20)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{urls[0]}/api/v1/healthz")


def import_without(missing, monkeypatch):
    """Imports the package anew, as if it had not been imported, and one module were not there."""
    for name in list(sys.modules):
        if f"{name}.".startswith(("mintjax.local.", f"{missing}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    importlib.import_module("mintjax.local")


def test_what_is_broken_is_not_blamed_on_the_extra(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"import of mintjax\.local\.engine halted"):
        import_without("mintjax.local.engine", monkeypatch)


def test_without_its_extra_it_says_what_to_install(monkeypatch):
    with pytest.raises(ImportError, match=r'pip install "mintjax\[local\]"'):
        import_without("starlette", monkeypatch)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_serving_until_it_is_told_to_stop(sent):
    script = textwrap.dedent("""
        from mintjax import local
        with local.Engine() as engine:
            print(engine.directory)
            local.serve(port=0, engine=engine, announce=lambda url: print(url, flush=True))
        print("ended")
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    ) as process:
        assert process.stdout is not None
        directory, url = process.stdout.readline().strip(), process.stdout.readline().strip()
        assert httpx.get(f"{url}/api/v1/healthz", timeout=10).json() == {"status": "ok"}
        process.send_signal(sent)
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "ended\n", "")
    assert not Path(directory).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_it_stops_although_a_sample_is_under_way():
    """The sample never ends of itself, so only heeding the signal ends the process."""
    script = textwrap.dedent("""
        from mintjax import local

        class Endless(local.Engine):
            def sample_in_slices(self, *args, **kwargs):
                print("under way", flush=True)
                while True:
                    yield

        with Endless() as engine:
            local.serve(port=0, engine=engine, announce=lambda url: print(url, flush=True))
        print("ended")
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    ) as process:
        assert process.stdout is not None
        try:
            with httpx.Client(base_url=process.stdout.readline().strip(), timeout=20) as http:
                session = http.post("/api/v1/create_session", json={"sdk_version": "1"}).json()
                opened = {"session_id": session["session_id"], "base_model": "mintjax/nano"}
                asked = {
                    **http.post(
                        "/api/v1/create_sampling_session",
                        json={**opened, "sampling_session_seq_id": 0},
                    ).json(),
                    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [65]}]},
                    "sampling_params": {"max_tokens": 4},
                }
                assert http.post("/api/v1/asample", json=asked).status_code == 200
                assert process.stdout.readline() == "under way\n"
                process.send_signal(signal.SIGTERM)
                output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, output, errors) == (0, "ended\n", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "gpu-box"])
def test_a_network_is_let_in_with_a_key_or_if_that_is_meant(engine, host):
    with pytest.raises(ConfigError, match="MINTJAX_SERVE_API_KEY"):
        local.serve(host, 0, engine=engine)
    for api_key, open_to_all in (("sk-mine", False), (None, True)):
        check_exposure(host, api_key, open_to_all)
    for loopback in ("127.0.0.1", "localhost", "::1"):
        check_exposure(loopback, None, False)
