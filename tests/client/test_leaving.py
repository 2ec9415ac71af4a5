"""The end of a process, of a fork, of a client; and what cannot be taken along."""

from __future__ import annotations

import asyncio
import copy
import inspect
import os
import pickle
import subprocess
import sys
import typing

import pytest

from mintjax.client import APIFuture, SamplingClient, ServiceClient, TrainingClient
from mintjax.errors import APITimeoutError, NotCopyableError
from mintjax.types import ModelInput, SamplingParams

from .data import DATA
from .double import Hold

PREPARE = """
import os, sys, threading, time, warnings
import httpx
from mintjax.client import ServiceClient
from tests.client.data import DATA
from tests.client.double import ADDRESS, Hold, Trainer
trainer = Trainer()
service = ServiceClient(ADDRESS, transport=httpx.ASGITransport(trainer))
client = service.create_lora_training_client("tiny")
"""


def run_script(script):
    # Coverage traces what runs while the interpreter ends, which keeps it from ending.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PREPARE + script],
        env={**plain, "MINT_API_KEY": "", "TINKER_API_KEY": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_interpreter_does_not_wait_for_an_objective():
    """It would for a minute, which is longer than this test has."""
    done = run_script("""
entered = threading.Event()
def objective(data, logprobs):
    entered.set()
    threading.Event().wait()
step = client.forward_backward_custom(DATA, objective)
assert entered.wait(30)
print("end")
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_the_interpreter_does_not_wait_for_a_compilation():
    done = run_script("""
import jax
entered = threading.Event()
def objective(data, logprobs):
    entered.set()
    total = logprobs.sum().sum()
    for i in range(20_000):
        total = jax.numpy.sin(total) * (i + 1.0)
    return total, {}
step = client.forward_backward_custom(DATA, objective)
assert entered.wait(30)
print("end")
""")
    assert (done.returncode, done.stdout) == (0, "end\n")
    # Python may report on stderr that the order to end came within a callback that cannot raise.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
def test_a_forked_process_ends_and_says_what_to_do():
    """Also while the parent's threads are at work, and hold locks that nobody will give back."""
    done = run_script("""
warnings.simplefilter("ignore")
hold = Hold()
trainer.faults["retrieve_future"] = [hold]
pending = client.forward(DATA)
stop = threading.Event()
def busy():
    while not stop.is_set():
        client.get_info()
threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        words = []
        for ask in (pending.result, pending.exception, client.get_info, service.close):
            try: ask()
            except Exception as error: words.append(type(error).__name__)
        assert words == ["ClosedError"] * 3, words
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
stop.set()
for thread in threads: thread.join()
hold.release()
assert pending.result(10).loss_fn_outputs
print("end")
""")
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_nothing_of_a_client_is_copied(service, client, take):
    sampler = service.create_sampling_client(base_model="tiny")
    for each in (service, client, sampler, client.forward(DATA)):
        with pytest.raises(NotCopyableError, match=r"make a new ServiceClient there.*checkpoint"):
            take(each)


def test_waiting_many_times_leaves_nothing_behind(client, trainer):
    hold = Hold()
    trainer.faults["retrieve_future/request-1"] = [hold]
    future = client.forward(DATA)
    before = len(future._done_callbacks)

    async def wait():
        for _ in range(50):
            with pytest.raises(APITimeoutError):
                await future.result_async(0.0001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.0001)
        assert (len(future._done_callbacks), len(future._wakers)) == (before, 0)
        task = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        hold.release()
        return await task

    assert asyncio.run(wait()).loss_fn_outputs


CALLS = [
    (ServiceClient, "create_lora_training_client", ("tiny",)),
    (ServiceClient, "create_training_client_from_state", ("tinker://model-0/weights/a",)),
    (
        ServiceClient,
        "create_training_client_from_state_with_optimizer",
        ("tinker://model-0/weights/a",),
    ),
    (ServiceClient, "create_sampling_client", (None, "tiny")),
    (ServiceClient, "get_server_capabilities", ()),
    (ServiceClient, "get_client_config", ()),
    (TrainingClient, "get_info", ()),
    (TrainingClient, "create_sampling_client", ("tinker://a",)),
    (TrainingClient, "save_weights_and_get_sampling_client", ()),
    (TrainingClient, "forward", (DATA,)),
    (TrainingClient, "save_state", ("a",)),
    (TrainingClient, "logprobs", (DATA,)),
    (SamplingClient, "sample", (ModelInput.from_ints([1, 2]), 1, SamplingParams())),
    (SamplingClient, "compute_logprobs", (ModelInput.from_ints([1, 2]),)),
]


@pytest.mark.parametrize(("kind", "name", "arguments"), CALLS)
def test_annotations_say_what_comes_back(service, client, kind, name, arguments):
    """As in tinker 0.38: what makes or asks for something blocks, what trains returns a future."""
    owners = {ServiceClient: service, TrainingClient: client}
    owner = owners.get(kind) or service.create_sampling_client(base_model="tiny")
    result = getattr(owner, name)(*arguments)
    said = typing.get_type_hints(getattr(kind, name))["return"]
    assert isinstance(result, typing.get_origin(said) or said)
    assert (typing.get_origin(said) is APIFuture) == isinstance(result, APIFuture)
    later = getattr(kind, f"{name}_async", None)
    if later is None:
        return
    assert inspect.iscoroutinefunction(later)
    said = typing.get_type_hints(later)["return"]
    assert isinstance(asyncio.run(later(owner, *arguments)), typing.get_origin(said) or said)


@pytest.mark.parametrize(("kind", "name", "arguments"), CALLS)
def test_signatures_agree_with_annotations(kind, name, arguments):
    for method in (getattr(kind, name), getattr(kind, f"{name}_async", None)):
        if method is None:
            continue
        said = inspect.signature(method).return_annotation
        assert "Limited" not in str(said)
        assert ("APIFuture" in str(said)) == (
            typing.get_origin(typing.get_type_hints(method)["return"]) is APIFuture
        )
