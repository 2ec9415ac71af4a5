"""Scripts that were written for the official SDK run with ``import mintjax as tinker``.

The scripts are the flow of the SDK's quickstart, and the part of tinker-cookbook's DPO that calls
the SDK. They run with mintjax and, where it is installed, with the SDK, on one trainer.
"""

import asyncio
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import mintjax
from mintjax import left_out
from mintjax.protocol.messages import ClientConfigResponse

CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "APIFuture")


def made(client):
    """The client of what a method that makes one returns; until 0.22 that is the client itself."""
    return client.result() if hasattr(client, "result") else client


def quickstart(tinker, service):
    types = tinker.types
    model = made(service.create_lora_training_client(base_model="mintjax/nano", rank=4, seed=1))

    def example(prompt, completion):
        tokens = list(prompt) + list(completion)
        weights = [0] * len(prompt) + [1] * len(completion)
        return types.Datum(
            model_input=types.ModelInput.from_ints(tokens=tokens[:-1]),
            loss_fn_inputs={"weights": weights[1:], "target_tokens": tokens[1:]},
        )

    examples = [example(b"banana split", b" anana-bay"), example(b"chess", b" ess-chay")]
    weights = np.concatenate([one.loss_fn_inputs["weights"].tolist() for one in examples])
    for _ in range(2):
        fwdbwd_future = model.forward_backward(examples, "cross_entropy")
        optim_future = model.optim_step(types.AdamParams(learning_rate=1e-2))
        fwdbwd_result = fwdbwd_future.result()
        optim_future.result()
        rows = [output["logprobs"].tolist() for output in fwdbwd_result.loss_fn_outputs]
        yield float(-np.dot(np.concatenate(rows), weights) / weights.sum())
        yield fwdbwd_result.metrics["loss:sum"]

    async def one_more():
        backward = await model.forward_backward_async(examples, loss_fn="cross_entropy")
        step = await model.optim_step_async(types.AdamParams(learning_rate=1e-2))
        result = await backward
        await step
        return result.metrics["loss:sum"]

    yield asyncio.run(one_more())
    sampler = made(model.save_weights_and_get_sampling_client(name="pig-latin"))
    prompt = types.ModelInput.from_ints(list(b"coffee break"))
    params = types.SamplingParams(max_tokens=6, temperature=0.0, stop=["\n"])
    result = sampler.sample(prompt=prompt, sampling_params=params, num_samples=2).result()
    for sequence in result.sequences:
        yield from map(float, sequence.tokens)
        yield from map(float, sequence.logprobs_np)
    scored = sampler.sample(
        prompt=prompt, sampling_params=params, num_samples=1, topk_prompt_logprobs=3
    ).result()
    assert scored.topk_prompt_logprobs[0] is None
    for row in scored.topk_prompt_logprobs[1:]:
        yield from (float(number) for pair in row for number in pair)
    path = model.save_state("kept", ttl_seconds=3600, overwrite=True).result().path
    before = model.forward(examples, "cross_entropy").result().metrics["loss:sum"]
    model.forward_backward(examples, "cross_entropy").result()
    model.optim_step(adam_params=types.AdamParams(learning_rate=1e-2)).result()
    model.load_state_with_optimizer(path).result()
    yield model.forward(examples, "cross_entropy").result().metrics["loss:sum"] - before
    for make in (
        service.create_training_client_from_state_with_optimizer,
        service.create_training_client_from_state,
    ):
        resumed = made(make(path))
        for _ in range(2):  # the second shows the optimizer's state
            yield resumed.forward_backward(examples, "cross_entropy").result().metrics["loss:sum"]
            resumed.optim_step(types.AdamParams(learning_rate=1e-2)).result()


def dpo(tinker, service):
    """The step of ``tinker_cookbook.preference.train_dpo``."""
    import torch
    import torch.nn.functional as F

    model = made(service.create_lora_training_client("mintjax/nano", 4, 2))
    reference = made(model.save_weights_and_get_sampling_client())

    def compute_dpo_loss(logprobs, ref_logprobs, beta):
        log_ratio = torch.stack(logprobs) - torch.stack(ref_logprobs)
        margins = beta * (log_ratio[0::2] - log_ratio[1::2])
        loss = -F.logsigmoid(margins).mean()
        return loss, {"dpo_loss": loss.item(), "margin": margins.mean().item()}

    data = []
    for answer in (b"Blue.", b"Loud!", b"Four.", b"Maybe!!"):
        tokens = list(b"Sky? " + answer)
        inputs = {"target_tokens": tokens[1:], "weights": [0.0] * 4 + [1.0] * len(answer)}
        data.append(tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), inputs))
    full = [
        datum.model_input.append_int(int(datum.loss_fn_inputs["target_tokens"].data[-1]))
        for datum in data
    ]

    async def compute_all_ref_logprobs():
        return await asyncio.gather(*[reference.compute_logprobs_async(one) for one in full])

    ref_rows = [torch.tensor(row[1:]) for row in asyncio.run(compute_all_ref_logprobs())]

    def dpo_loss_fn(data, logprobs_list):
        weights = [torch.tensor(datum.loss_fn_inputs["weights"].data) for datum in data]
        return compute_dpo_loss(
            [torch.dot(row.float(), w) for row, w in zip(logprobs_list, weights, strict=True)],
            [torch.dot(row.float(), w) for row, w in zip(ref_rows, weights, strict=True)],
            beta=0.1,
        )

    for _ in range(3):
        metrics = model.forward_backward_custom(data, dpo_loss_fn).result().metrics
        model.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
        yield from (metrics["dpo_loss"], metrics["margin"])
        if "surrogate_loss:sum" in metrics:  # since 0.38
            yield from (metrics["loss:sum"], metrics["surrogate_loss:sum"])
        else:
            yield from (metrics["dpo_loss"], metrics["loss:sum"])


def administration(tinker, service):
    """What is kept is listed, published, expires and is deleted."""
    model = made(service.create_lora_training_client("mintjax/nano", 4, 3))
    rest = service.create_rest_client()
    path = model.save_state("listed", ttl_seconds=3600).result().path
    sampler = model.save_weights_for_sampler("listed-too").result().path
    run = rest.get_training_run_by_tinker_path(path).result()
    yield run.lora_rank
    yield run.last_checkpoint.tinker_path == path
    rest.publish_checkpoint_from_tinker_path(path).result()
    first, second = rest.list_checkpoints(run.training_run_id).result().checkpoints
    yield from (first.tinker_path == sampler, second.public, second.expires_at is not None)
    rest.unpublish_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    [left] = rest.list_checkpoints(run.training_run_id).result().checkpoints
    yield from (left.public, left.expires_at is None)
    yield left.checkpoint_id in [
        one.checkpoint_id for one in rest.list_user_checkpoints().result().checkpoints
    ]
    info = rest.get_weights_info_by_tinker_path(path).result()
    yield from (info.lora_rank, info.base_model == "mintjax/nano")
    owners = [
        session_id
        for session_id in rest.list_sessions().result().sessions
        if run.training_run_id in rest.get_session(session_id).result().training_run_ids
    ]
    yield len(owners)


def tokens(tinker, service):
    """What only the newest sampler can be asked for."""
    sampler = made(service.create_sampling_client(base_model="mintjax/nano"))
    result = sampler.sample(
        prompt=tinker.ModelInput.from_ints([1, 2, 3, 4]),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens=2, temperature=0.0),
        include_prompt_logprobs=True,
        topk_sample_logprobs=2,
        target_prompt_logprobs=tinker.TensorData(
            data=[5, -1, -1, 7, 8, 9], dtype="int64", shape=[3, 2]
        ),
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=2,
    ).result()
    yield from (logprob or 0.0 for logprob in result.prompt_logprobs)
    yield from (float(x) for row in result.sequences[0].topk_logprobs for pair in row for x in pair)
    drawn = result.prompt_alt_tokens
    for one in (result.target_prompt_logprobs, drawn.tokens, drawn.logprobs):
        yield from one.to_numpy().ravel().tolist()
    d = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={
            "target_tokens": [2, 3, 4],
            "logprobs": [0.0, -5.0, -5.0],
            "advantages": [0.0, 1.0, 1.0],
        },
    )
    model = made(service.create_lora_training_client("mintjax/nano", 4, 3))
    yield model.forward_backward([d], "gspo").result().metrics["loss:sum"]


def drive(tinker, url, newest):
    """All numbers that the scripts come to."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-test", user_metadata={"a": "b"})
    scripts = [quickstart, administration, *([tokens] if newest else []), dpo]
    numbers = [float(number) for script in scripts for number in script(tinker, service)]
    if "status" in inspect.signature(getattr(service, "close", drive)).parameters:  # since 0.38
        service.close("success", detail="all numbers are there").result()
    return numbers


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def numbers(engine):
    """What mintjax comes to, and what the SDK does, in a process of its own; None without it."""
    pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")
    local = pytest.importorskip("mintjax.local", reason="needs the extra local")
    run = "import json, sys, tinker; from tests.test_sdk_script import drive;"
    run += "print(json.dumps(drive(tinker, sys.argv[1], sys.argv[2] == 'newest')))"
    try:
        newest = not importlib.metadata.version("tinker").startswith("0.22.")
    except importlib.metadata.PackageNotFoundError:
        newest = True
    config = ClientConfigResponse(proto_write_fwdbwd=True, sample_use_retrieve_futures=True)
    with (
        local.running_server(engine, api_key="tml-test", config=config) as url,
        # In a process of its own, because the SDK leaves sockets and threads behind.
        subprocess.Popen(
            [sys.executable, "-c", run, url, "newest" if newest else ""], **PIPES
        ) as sdk,
    ):
        ours = drive(mintjax, url, newest)
        theirs, said = sdk.communicate()
    assert not sdk.returncode or "No module named 'tinker'" in said
    return ours, json.loads(theirs) if theirs else None


def test_the_scripts_run_and_learn(numbers):
    ours, _ = numbers
    assert np.isfinite(ours).all()
    assert ours[2] < ours[0]  # the quickstart's loss
    assert ours[-4] < ours[-12] == pytest.approx(np.log(2), rel=1e-4)  # DPO's


def test_the_sdk_comes_to_the_same_numbers(numbers):
    pytest.importorskip("tinker", reason="needs the official SDK: pip install tinker")
    ours, theirs = numbers
    assert theirs is not None
    np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def sdk():
    return pytest.importorskip("tinker", reason="needs the official SDK: pip install tinker")


def test_every_name_of_the_sdk_is_there_or_says_what_to_do(sdk):
    for module, ours in ((sdk, mintjax), (sdk.types, mintjax.types)):
        public = sdk.__all__ if module is sdk else [n for n in sdk.__all__ if hasattr(module, n)]
        for name in public:
            if name in left_out.NAMES:
                with pytest.raises(AttributeError, match="The official SDK has it; here, "):
                    getattr(ours, name)
            elif not name.startswith("__"):
                assert getattr(ours, name) is not None


ELSEWHERE = {
    "default_headers_overrides": "transport=",
    "base_model": "SamplingClient",
    "status": "close() takes none",
    "detail": "close() takes none",
    "kwargs": "errors here",
    "self": "",
}


@pytest.mark.parametrize("kind", CLIENTS)
def test_every_method_of_the_sdk_takes_the_same_arguments(sdk, kind):
    if not hasattr(sdk, kind):
        pytest.skip(f"{kind} has no name in the SDK {sdk.__version__}")
    theirs, ours = getattr(sdk, kind), getattr(mintjax, kind)
    newest = not sdk.__version__.startswith("0.22")
    for name, method in vars(theirs).items():
        if name.startswith("_") or name in left_out.METHODS:
            continue
        if name == "create":  # takes what no script has
            continue
        there = list(inspect.signature(method).parameters)
        here = list(inspect.signature(getattr(ours, name)).parameters)
        left = [n for n in there if n not in here and n not in ELSEWHERE]
        assert not left, (name, left)
        if newest:
            common = [n for n in there if n in here]
            assert here[: len(common)] == common, name


def test_what_is_left_out_says_what_to_do():
    with mintjax.ServiceClient("http://localhost", api_key="tml-a") as service:
        with pytest.raises(AttributeError, match=r"create_custom_loss'.*pass an objective"):
            _ = service.create_custom_loss
        with pytest.raises(AttributeError, match=r"has no attribute 'create'$"):
            _ = service.create
    with pytest.raises(AttributeError, match=r"^module 'mintjax' has no attribute 'RestKlient'$"):
        _ = mintjax.RestKlient
    for name, value in left_out.ARGUMENTS.items():
        left_out.refuse(**{name: None})
        with pytest.raises(mintjax.errors.DataError, match=re.escape(value)):
            left_out.refuse(**{name: object()})
    with pytest.raises(mintjax.errors.ConfigError, match="user_metadata="):
        mintjax.ServiceClient({"a": "b"}, api_key="tml-a")
