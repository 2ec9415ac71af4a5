"""Futures, threads, event loops, and the end of a client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import math
import os
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from mintjax.client import ServiceClient
from mintjax.errors import (
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    ClosedError,
    ConfigError,
    DataError,
    MintjaxError,
    RequestFailedError,
)
from mintjax.protocol import protobuf
from mintjax.types import (
    AdamParams,
    ModelInput,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    SupportedModel,
)

from .data import DATA
from .double import ADDRESS, Answer, Hold

ADAM = AdamParams()


@pytest.fixture
def held(trainer):
    """The first result is held back."""
    hold = Hold()
    trainer.faults["retrieve_future/request-1"] = [hold]
    yield hold
    hold.release()


@pytest.mark.parametrize("timeout", ["5", math.nan, [5]])
def test_a_timeout_is_a_number_of_seconds(client, held, timeout):
    future = client.forward(DATA)
    for wait in (future.result, future.exception, lambda t: asyncio.run(future.result_async(t))):
        with pytest.raises(ConfigError, match="timeout must be a number of seconds, or None"):
            wait(timeout)
    with pytest.raises(ConfigError, match="timeout"):
        client.get_info(timeout=timeout)
    with pytest.raises(APITimeoutError):
        future.result(np.float32(0.01))
    held.release()
    future.result(5)


def test_a_timeout_leaves_the_request_running(client, held):
    future = client.forward(DATA)
    for _ in range(2):
        with pytest.raises(TimeoutError, match="still running"):
            future.result(0.01)
    with pytest.raises(APITimeoutError):
        future.exception(0.01)
    assert not future.done()
    held.release()
    assert future.result(5) is future.result()
    assert future.exception() is None
    assert repr(future) == "<APIFuture done>"


def test_awaiting_with_a_timeout_leaves_the_request_running(client, held):
    future = client.forward(DATA)

    async def wait():
        with pytest.raises(TimeoutError, match="still running"):
            await future.result_async(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(future, 0.01)
        task = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.release()
        return await future

    assert len(asyncio.run(wait()).loss_fn_outputs) == 2


def test_what_waits_for_futures_takes_these(client, held):
    first, second = client.forward(DATA), client.forward(DATA)
    done, waiting = concurrent.futures.wait([first, second], return_when="FIRST_COMPLETED")
    assert (done, waiting) == ({second}, {first})
    held.release()
    assert set(concurrent.futures.as_completed([first, second], 5)) == {first, second}


def test_a_loop_that_ends_first_hurts_nobody(client, held):
    future = client.forward(DATA)

    async def glance():
        with pytest.raises(TimeoutError):
            await future.result_async(0.001)

    asyncio.run(glance())
    held.release()
    assert len(future.result(5).loss_fn_outputs) == 2


def test_an_error_reaches_every_waiter(client, trainer):
    trainer.output = lambda *_: {"error": "no", "category": "server"}
    future = client.forward(DATA)

    async def wait():
        await future

    for _ in range(2):
        with pytest.raises(RequestFailedError):
            asyncio.run(wait())
        with pytest.raises(RequestFailedError):
            future.result(5)
    assert isinstance(future.exception(), RequestFailedError)


def test_a_cancelled_future_says_so(client, trainer):
    hold = Hold()
    trainer.faults["forward"] = [hold]
    first, second = client.forward(DATA), client.forward(DATA)
    assert second.cancel()
    hold.release()

    async def wait():
        await second

    with pytest.raises(concurrent.futures.CancelledError):
        second.result()
    with pytest.raises(concurrent.futures.CancelledError):
        asyncio.run(wait())
    assert repr(second) == "<APIFuture cancelled>"
    first.result(5)


def test_waiting_in_the_clients_own_loop_is_refused(client, held):
    first = client.forward(DATA)
    caught = concurrent.futures.Future()

    def callback(done):
        try:
            client.forward(DATA).result()
        except RuntimeError as error:
            caught.set_result(str(error))

    first.add_done_callback(callback)
    held.release()  # only now can the callback run, in the client's loop
    assert "wait for itself" in caught.result(5)


def test_closing_ends_every_future_at_once(connect, trainer, caplog):
    service = connect()
    clients = [service.create_lora_training_client("tiny") for _ in range(3)]
    hold = Hold()
    trainer.faults["retrieve_future"] = [hold] * 1000
    futures = [c.forward_backward(DATA) for c in clients for _ in range(20)]
    futures += [c.optim_step(ADAM) for c in clients]
    errors = []

    def other():
        try:
            service.create_lora_training_client("tiny")
        except ClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    service.close()
    for future in futures:
        with pytest.raises(ClosedError):
            future.result(0)
    thread.join(5)
    assert len(errors) == 1
    hold.release()
    assert not service._connection.background.thread.is_alive()
    service.close()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    for late in (lambda: clients[0].forward(DATA), service.get_server_capabilities):
        with pytest.raises(ClosedError):
            late()


def test_closing_while_a_loss_is_computed(connect):
    service = connect()
    client = service.create_lora_training_client("tiny")
    entered, leave = threading.Event(), threading.Event()

    def objective(data, logprobs):
        entered.set()
        leave.wait(10)
        return logprobs.sum().sum(), {}

    step = client.forward_backward_custom(DATA, objective)
    assert entered.wait(10)
    service.close()
    with pytest.raises(ClosedError):
        step.result(0)
    leave.set()


def test_closing_from_the_clients_own_thread(connect):
    service = connect()
    client = service.create_lora_training_client("tiny")
    client.forward(DATA).add_done_callback(lambda _: service.close())
    service._connection.background.thread.join(5)
    with pytest.raises(ClosedError):
        client.forward(DATA)


def test_a_forgotten_client_ends_its_thread(connect, trainer):
    import httpx

    service = ServiceClient(ADDRESS, transport=httpx.ASGITransport(trainer))
    client = service.create_lora_training_client("tiny")
    thread, gone = service._connection.background.thread, weakref.ref(service._connection)
    del service
    future = client.forward(DATA)  # what it made keeps the connection
    del client
    assert len(future.result(5).loss_fn_outputs) == 2
    del future
    for _ in range(50):
        gc.collect()
        thread.join(0.1)
        if not thread.is_alive():
            break
    assert gone() is None
    assert not thread.is_alive()


def run_script(script):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "MINT_API_KEY": "", "TINKER_API_KEY": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_open_client_does_not_keep_the_interpreter_from_ending():
    done = run_script(
        "import mintjax.client as c\n"
        "s = c.ServiceClient('http://127.0.0.1:9')\n"
        "f = s._connection.start(lambda: s._connection.session())\n"
        "print('end')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
def test_a_forked_process_is_told_to_make_its_own():
    done = run_script(
        "import os, warnings\n"
        "import mintjax.client as c\n"
        "s = c.ServiceClient('http://127.0.0.1:9')\n"
        "warnings.simplefilter('ignore')\n"
        "if os.fork():\n"
        "    os.wait()\n"
        "else:\n"
        "    try: s.get_server_capabilities()\n"
        "    except c.service.ConfigError.__mro__[1] as e: print(e)\n"
    )
    assert "os.fork()" in done.stdout, done.stderr


def test_threads_and_tasks_share_a_client(service, trainer):
    clients = [service.create_lora_training_client("tiny") for _ in range(4)]

    def thread(k):
        client = clients[k % 4]
        outputs = [client.forward(DATA[k % 2 : k % 2 + 1]) for _ in range(5)]
        client.forward_backward(DATA).result(20)
        return [output.result(20).logprobs[0].shape for output in outputs]

    async def task(k):
        return (await clients[k % 4].optim_step(ADAM)).metrics

    async def tasks():
        return await asyncio.gather(*(task(k) for k in range(16)))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        shapes = list(pool.map(thread, range(16)))
    assert asyncio.run(tasks()) == [None] * 16
    assert shapes == [[(3,)] * 5 if k % 2 == 0 else [(2,)] * 5 for k in range(16)]
    for ops in trainer.models.values():
        assert [op[0] for op in ops].count("optim_step") == 4


def test_sampling(service):
    sampler = service.create_sampling_client(base_model="tiny")
    params = SamplingParams(max_tokens=2)
    answers = [sampler.sample(ModelInput.from_ints([1, 2]), 3, params, True) for _ in range(10)]
    assert all(len(a.result(5).sequences) == 3 for a in answers)
    assert answers[0].result().prompt_logprobs == [None, -0.5]
    assert sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3])).result(5) == [None, -0.5, -0.5]


def test_prompt_logprobs_are_one_for_each_token(service, trainer):
    sampler = service.create_sampling_client(base_model="tiny")
    sequence = {"tokens": [1], "logprobs": [-1.0], "stop_reason": "length"}
    for given, words in (([None], "returned 1 prompt"), (None, "returned 0 prompt")):
        answer = {"sequences": [sequence], "prompt_logprobs": given}
        trainer.faults["retrieve_future"] = [Answer(200, answer)] * 10
        with pytest.raises(APIResponseError, match=words):
            sampler.compute_logprobs(ModelInput.from_ints([1, 2])).result(5)
        trainer.faults.clear()


def test_base_models_are_read_under_either_name(service, trainer):
    models = [{"model_name": "a", "max_context_length": 8}, {"model_id": "b"}]  # as hatchery has it
    trainer.faults["get_server_capabilities"] = [Answer(200, {"supported_models": models})]
    assert service.get_server_capabilities().supported_models == [
        SupportedModel(model_name="a", max_context_length=8),
        SupportedModel(model_name="b"),
    ]
    trainer.faults["get_server_capabilities"] = [Answer(200, {"supported_models": [{}]})] * 9
    with pytest.raises(APIResponseError, match="gives no name to model 0"):
        service.get_server_capabilities()


def test_a_first_prompt_token_that_is_left_out_has_no_logprob(service, trainer):
    sampler = service.create_sampling_client(base_model="tiny")
    sequence = {"tokens": [1], "logprobs": [-1.0], "stop_reason": "length"}
    answer = {"sequences": [sequence], "prompt_logprobs": [-0.5, -0.25]}  # as SkyRL's JAX backend
    trainer.faults["retrieve_future"] = [Answer(200, answer)]
    prompt = ModelInput.from_ints([1, 2, 3])
    assert sampler.compute_logprobs(prompt).result(5) == [None, -0.5, -0.25]


def test_samples_are_read_by_their_content_type(service, trainer):
    sampler = service.create_sampling_client(base_model="tiny")
    samples = SampleResponse(
        sequences=[SampledSequence(tokens=[7], logprobs=[-1.5], stop_reason="stop")],
        prompt_logprobs=[None, -0.5],
    )
    headers = {"Content-Type": protobuf.MEDIA_TYPE}  # whatever was asked for, as SkyRL 0.4 answers
    body = protobuf.encode_sample(samples)
    trainer.faults["retrieve_future"] = [Answer(200, body, headers)]
    prompt, params = ModelInput.from_ints([1, 2]), SamplingParams(max_tokens=1)
    assert sampler.sample(prompt, 1, params, True).result(5) == samples
    trainer.faults["retrieve_future"] = [Answer(200, body[:-1], headers)] * 10
    with pytest.raises(APIResponseError, match="not a SampleResponse"):
        sampler.sample(prompt, 1, params, True).result(5)


@pytest.mark.parametrize(
    ("sequences", "prompt_logprobs", "words"),
    [
        ([], [None, -1.0], "0 sequences for 1"),
        ([{"tokens": [1, 2], "logprobs": [-1.0]}], [None, -1.0], "1 logprobs for 2 tokens"),
        ([{"tokens": [1], "logprobs": [5.0]}], [None, -1.0], "a logprob of 5"),
        ([{"tokens": [1]}], [None, 1e30], r"a logprob of 1e\+30"),
    ],
)
def test_a_sample_is_checked(service, trainer, sequences, prompt_logprobs, words):
    sampler = service.create_sampling_client(base_model="tiny")
    answer = {"sequences": sequences, "prompt_logprobs": prompt_logprobs}
    trainer.faults["retrieve_future"] = [Answer(200, answer)] * 10
    future = sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=2), True)
    with pytest.raises(APIResponseError, match=words):
        future.result(5)


@pytest.mark.parametrize(
    ("prompt", "num_samples", "params", "field"),
    [
        ([], 1, {}, "prompt"),
        ([1], 0, {}, "num_samples"),
        ([1], 1, {"temperature": float("nan")}, "temperature"),
        ([1], 1, {"top_p": 0.0}, "top_p"),
        ([1], 1, {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_sampled(service, prompt, num_samples, params, field):
    sampler = service.create_sampling_client(base_model="tiny")
    with pytest.raises(ValueError, match=field):
        sampler.sample(ModelInput.from_ints(prompt), num_samples, SamplingParams(**params))


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs"),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k"),
        ({"prompt_logprobs_last_n": 1}, "include_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 2, "include_prompt_logprobs": True}, "prompt_logprobs_last_n"),
        ({"target_prompt_logprobs": [1]}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": [[1], [2]]}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": [[0.5]]}, "target_prompt_logprobs"),
        ({"target_prompt_logprobs": [[-2]]}, "target_prompt_logprobs"),
    ],
)
def test_what_cannot_be_asked_of_tokens(service, wanted, field):
    sampler = service.create_sampling_client(base_model="tiny")
    with pytest.raises(ValueError, match=field):
        sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(), **wanted)


@pytest.mark.parametrize(
    ("wanted", "given", "words"),
    [
        ({"topk_prompt_logprobs": 1}, {}, "nothing for topk_prompt_logprobs"),
        (
            {"topk_prompt_logprobs": 1},
            {"topk_prompt_logprobs": [None]},
            r"of shape \[1\], not \[2\]",
        ),
        ({"topk_sample_logprobs": 1}, {}, "nothing for topk_sample_logprobs"),
        ({"target_prompt_logprobs": [[3]]}, {}, "nothing for target_prompt_logprobs"),
        ({"prompt_alt_tokens_k": 1}, {}, "nothing for prompt_alt_tokens_k"),
        (
            {"prompt_logprobs_last_n": 1, "include_prompt_logprobs": True},
            {"prompt_logprobs": [None, -0.5, -0.5]},
            "may not know prompt_logprobs_last_n",
        ),
    ],
)
def test_a_trainer_that_does_not_know_what_was_asked_for(service, trainer, wanted, given, words):
    sampler = service.create_sampling_client(base_model="tiny")
    prompt = ModelInput.from_ints([1, 2, 3] if "prompt_logprobs" in given else [1, 2])
    answer = {"sequences": [{"tokens": [1], "logprobs": [-1.0]}], **given}
    trainer.faults["retrieve_future"] = [Answer(200, answer)] * 10
    future = sampler.sample(prompt, 1, SamplingParams(max_tokens=1), **wanted)
    with pytest.raises(APIResponseError, match=words):
        future.result(5)


def test_what_is_not_asked_for_is_not_sent(service, trainer):
    sampler = service.create_sampling_client(base_model="tiny")
    sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=1)).result(5)
    [body] = trainer.bodies("asample")
    assert not [name for name in body if "topk" in name or "target" in name or "_n" in name[-2:]]


def test_a_sampling_client_needs_a_model(service):
    with pytest.raises(ValueError, match="model_path"):
        service.create_sampling_client()


@pytest.mark.parametrize("optimizer", [False, True])
def test_a_training_client_from_a_checkpoint(service, trainer, optimizer):
    make = (
        service.create_training_client_from_state_with_optimizer
        if optimizer
        else service.create_training_client_from_state
    )
    client = make("tinker://model-0/weights/a")
    assert trainer.bodies("create_model")[0]["lora_config"]["rank"] == 4
    (load,) = trainer.bodies("load_weights")
    assert (load["model_id"], load["optimizer"]) == (client.model_id, optimizer)


@pytest.mark.parametrize("metadata", [None, {}, {"run": "a"}])
def test_metadata_that_are_not_given_are_left_out(service, trainer, metadata):
    service.create_lora_training_client("tiny", user_metadata=metadata)
    (body,) = trainer.bodies("create_model")
    given = {"user_metadata": body["user_metadata"]} if "user_metadata" in body else {}
    assert given == ({} if metadata is None else {"user_metadata": metadata})


def test_a_trainer_without_weights_info(service, trainer):
    trainer.refuse = lambda path, body: Answer(404) if path == "weights_info" else None
    service.create_training_client_from_state("tinker://model-7/weights/a")
    assert trainer.bodies("get_info")[0]["model_id"] == "model-7"
    assert trainer.bodies("create_model")[0]["lora_config"]["rank"] == 4


@pytest.mark.parametrize(("path", "status"), [("tinker://m/a", 403), ("elsewhere", 404)])
def test_a_checkpoint_of_which_nothing_is_known(service, trainer, path, status):
    trainer.refuse = lambda at, body: Answer(status) if at == "weights_info" else None
    with pytest.raises(APIStatusError, match="no detail") as caught:
        service.create_training_client_from_state(path)
    assert caught.value.status_code == status
    assert not trainer.paths("get_info", "create_model")


def test_a_probe_without_a_model_to_make(service, trainer, monkeypatch):
    for name in ("MINT_BASE_MODEL", "TINKER_BASE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    trainer.faults["get_server_capabilities"] = [Answer(200, {"supported_models": []})]
    with pytest.raises(DataError, match=r"base_model.*names none"):
        service.probe()
    with pytest.raises(MintjaxError, match="moved a logprob by 0"):
        service.probe()  # of a model that never learns
    assert trainer.bodies("create_model")[0]["base_model"] == "tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank"), ({"train_mlp": 0, "train_attn": 0, "train_unembed": 0}, "train")],
)
def test_what_cannot_be_trained(service, trainer, options, message):
    with pytest.raises(ValueError, match=message):
        service.create_lora_training_client("tiny", **options)
    assert trainer.requests == []
