"""The client and the embedded trainer: over a socket, and over a connection that breaks."""

from __future__ import annotations

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors")

import httpx
import msgspec

from mintjax.client import ServiceClient
from mintjax.errors import AuthenticationError, BadRequestError, MintjaxError, NotFoundError
from mintjax.local import Engine, running_server
from mintjax.local.app import application
from mintjax.types import AdamParams, Datum, ImageChunk, ModelInput, SamplingParams

from ..examples import THOROUGH
from .double import QUICK
from .faults import BadConnection

MODEL = "mintjax/nano"
KEY = "sk-key"
PATIENT = msgspec.structs.replace(
    QUICK,
    deadline=120.0,
    first_contact=120.0,
    poll_timeout=60.0,
    silence=120.0,
    bad_answers=50,
    longest_delay=0.01,
)
SEEDS_PER_TEST = 10
SEEDS = 200 if THOROUGH else 10


@pytest.fixture(scope="module")
def url(engine):
    with running_server(engine, api_key=KEY) as url:
        yield url


@pytest.fixture
def service(url):
    with ServiceClient(url, KEY) as service:
        yield service


def batch(seed):
    rng = np.random.default_rng(seed)

    def one(length):
        tokens = rng.integers(0, 256, length + 1)
        inputs = {
            "target_tokens": tokens[1:],
            "weights": (np.arange(length) >= length // 3).astype(np.float32),
            "logprobs": np.full(length, -5.5, np.float32),
            "advantages": rng.normal(size=length).astype(np.float32),
        }
        return Datum(ModelInput.from_ints(tokens[:-1]), inputs)

    return [one(length) for length in (5, 9, 7, 6)]


def preference(data, logprobs):
    scores = (logprobs * data["weights"]).sum()
    margin = scores[0::2] - scores[1::2]
    return -jax.nn.log_sigmoid(margin).mean(), {"margin": margin.mean()}


def test_a_run_over_a_socket(service, engine):
    assert MODEL in {m.model_name for m in service.get_server_capabilities().supported_models}
    with service.create_lora_training_client(MODEL, rank=4, seed=1) as client:
        data = batch(0)
        steps = []
        for _ in range(3):
            steps.append(client.forward_backward_custom(data, preference))
            update = client.optim_step(AdamParams(learning_rate=1e-2))
        losses = [step.result(60).metrics["loss"] for step in steps]
        update.result(60)
        assert losses[2] < losses[1] < losses[0]
        path = client.save_state("here").result(60).path
        logprobs = client.forward(data).result(60).logprobs
        again = service.create_training_client_from_state_with_optimizer(path)
        for a, b in zip(logprobs, again.forward(data).result(60).logprobs, strict=True):
            np.testing.assert_array_equal(a, b)
        sampler = client.save_weights_and_get_sampling_client()
        prompt = data[0].model_input
        params = SamplingParams(max_tokens=3, seed=1)
        assert len(sampler.sample(prompt, 2, params).result(60).sequences) == 2
        scored = sampler.compute_logprobs(prompt).result(60)
        np.testing.assert_allclose(scored[1:], logprobs[0][:-1], atol=1e-5)
        model_id = client.model_id
    assert model_id not in engine.models
    again.unload().result(60)


def test_a_teachers_likeliest_tokens_become_a_students_candidates(service):
    with service.create_lora_training_client(MODEL, rank=4, seed=1) as model:
        model.forward_backward(batch(0), "cross_entropy")
        model.optim_step(AdamParams(learning_rate=1e-2))
        teacher = model.save_weights_and_get_sampling_client()
        tokens = [10, 20, 30, 40, 50]
        whole, once = ModelInput.from_ints(tokens), SamplingParams(max_tokens=1, seed=1)
        asked = teacher.sample(
            whole, 1, once, True, topk_prompt_logprobs=3, topk_sample_logprobs=2
        ).result(60)
        candidates = asked.topk_prompt_logprobs_np
        assert candidates.token_ids.shape == (5, 3)
        columns = {"target_tokens": candidates.token_ids[1:], "weights": np.ones((4, 3))}
        datum = Datum(ModelInput.from_ints(tokens[:-1]), columns)
        [logprobs] = model.forward([datum]).result(60).logprobs
        np.testing.assert_allclose(logprobs, candidates.logprobs[1:], atol=1e-5)
        assert asked.sequences[0].topk_logprobs_np.logprobs.shape == (1, 2)
        # The other way round, for candidates that somebody else has chosen.
        targets = candidates.token_ids[1:].copy()
        targets[0, 0] = -1
        expected = candidates.logprobs[1:].copy()
        expected[0, 0] = 0
        asked = teacher.sample(
            whole, 1, once, target_prompt_logprobs=targets, prompt_alt_tokens_k=2
        ).result(60)
        np.testing.assert_allclose(asked.target_prompt_logprobs, expected, atol=1e-5)
        drawn = asked.prompt_alt_tokens
        columns = {"target_tokens": drawn.tokens, "weights": np.ones((4, 2))}
        datum = Datum(ModelInput.from_ints(tokens[:-1]), columns)
        [logprobs] = model.forward([datum]).result(60).logprobs
        np.testing.assert_allclose(logprobs, drawn.logprobs, atol=1e-5)
        few = teacher.sample(whole, 1, once, True, 3, prompt_logprobs_last_n=2).result(60)
        assert [one is None for one in few.prompt_logprobs] == [True] * 3 + [False] * 2
        assert teacher.compute_logprobs(whole, 2).result(60) == few.prompt_logprobs
        np.testing.assert_allclose(
            few.topk_prompt_logprobs_np.logprobs[3:], candidates.logprobs[3:], atol=1e-5
        )


def test_the_gradient_is_that_of_the_composed_loss(service, engine):
    """The custom path with cross-entropy as objective gives what cross-entropy by name does."""
    clients = [service.create_lora_training_client(MODEL, rank=4, seed=2) for _ in range(2)]
    data = batch(1)

    def negative(data, logprobs):
        return -(logprobs * data["weights"]).sum().sum(), {}

    custom = clients[0].forward_backward_custom(data, negative).result(60)
    named = clients[1].forward_backward(data, "cross_entropy").result(60)
    assert custom.metrics["loss"] == pytest.approx(named.metrics["loss:sum"], rel=1e-5)
    gradients = [jax.tree.leaves(engine.gradient(client.model_id)) for client in clients]
    assert any(jnp.abs(leaf).max() > 0 for leaf in gradients[0])
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda d: d.loss_fn_inputs.pop("advantages"), BadRequestError, "advantages"),
        (lambda d: d.loss_fn_inputs["target_tokens"].fill(10**6), BadRequestError, "vocabulary"),
    ],
)
def test_the_trainers_refusals_are_typed(service, spoil, error, message):
    client = service.create_lora_training_client(MODEL, rank=4)
    data = batch(2)
    spoil(data[1])
    with pytest.raises(error, match=message):
        client.forward_backward(data, "ppo").result(60)
    client.forward_backward(batch(2), "ppo").result(60)


def test_images_are_refused_by_a_trainer_that_reads_text(service):
    client = service.create_lora_training_client(MODEL, rank=4)
    tokens = ModelInput([ImageChunk(b"bytes", "png", expected_tokens=2)])
    data = [Datum(tokens, {"target_tokens": [1, 2], "weights": [1.0, 1.0]})]
    for loss in ("cross_entropy", lambda data, lp: (lp.total() ** 2, {})):
        go = client.forward_backward if isinstance(loss, str) else client.forward_backward_custom
        with pytest.raises(BadRequestError, match=r"datum 0, .*this trainer reads text only"):
            go(data, loss).result(60)


def test_what_the_trainer_does_not_know(service, url):
    with pytest.raises((NotFoundError, BadRequestError), match="no-such-model"):
        service.create_lora_training_client("no-such-model")
    with ServiceClient(url, "sk-wrong") as other, pytest.raises(AuthenticationError):
        other.create_lora_training_client(MODEL)


def test_a_trainer_that_was_restarted_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    advice = r"was restarted.*new ServiceClient.*create_training_client_from_state_with_optimizer"
    with ServiceClient(url) as service:
        with Engine() as engine, running_server(engine, port=port):
            client = service.create_lora_training_client(MODEL, rank=4)
            client.forward(batch(0)).result(60)
        with Engine() as engine, running_server(engine, port=port):
            with pytest.raises(NotFoundError, match=advice):
                client.optim_step(AdamParams()).result(60)
            with pytest.raises(NotFoundError, match=advice):
                service.create_lora_training_client(MODEL, rank=4)


def train(client, after=lambda future: None):
    data = [batch(seed) for seed in range(3)]
    futures = []
    for step in range(10):
        if step % 2:
            futures.append(client.forward_backward_custom(data[step % 3], preference))
        else:
            futures.append(client.forward_backward(data[step % 3], "ppo"))
        after(futures[-1])
        futures.append(client.optim_step(AdamParams(learning_rate=1e-2 / (1 + step))))
        after(futures[-1])
    for future in futures:
        future.result(60)


def new_model(service):
    return service.create_lora_training_client(MODEL, rank=4, seed=3)


def state(engine, client):
    model = engine.model(client.model_id)
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves((model.lora, model.optimizer, model.gradient))
    ]


@pytest.fixture(scope="module")
def app():
    with Engine() as engine, application(engine, poll_seconds=1.0) as app:
        yield engine, app


@pytest.fixture(scope="module")
def undisturbed(app):
    """The model before the run, and after each request that changes it."""
    engine, asgi = app
    with ServiceClient("http://localhost", transport=httpx.ASGITransport(asgi)) as service:
        client = new_model(service)
        states = [state(engine, client)]

        def after(future):
            future.result(60)
            states.append(state(engine, client))

        train(client, after)
        return states


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("first_seed", range(0, SEEDS, SEEDS_PER_TEST))
def test_a_bad_connection_changes_not_one_bit(app, undisturbed, first_seed):
    engine, asgi = app
    met = 0
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        share = (0.05, 0.15, 0.3)[seed % 3]
        bad = BadConnection(httpx.ASGITransport(asgi), seed, share)
        with ServiceClient("http://localhost", transport=bad, retry_policy=PATIENT) as service:
            client = new_model(service)
            train(client)
            met += len(bad.met)
            assert same(state(engine, client), undisturbed[-1]), (seed, bad.met)
            engine.unload_model(client.model_id)
    assert met > 25


@pytest.mark.parametrize("repeat", [True, False])
def test_with_little_patience_a_run_ends_early_and_whole(app, undisturbed, repeat):
    """Whatever was applied is the beginning of the run that was asked for."""
    engine, asgi = app
    ended = set()
    for seed in range(30 if THOROUGH else 12):
        bad = BadConnection(
            httpx.ASGITransport(asgi),
            seed,
            (0.02, 0.1, 0.3)[seed % 3],
            spare=("client/config", "create_session", "create_model"),
        )
        hasty = msgspec.structs.replace(
            QUICK, deadline=0.003, bad_answers=1, repeat_unanswered=repeat
        )
        with ServiceClient("http://localhost", transport=bad, retry_policy=hasty) as service:
            try:
                client = new_model(service)
            except MintjaxError:
                continue
            try:
                train(client)
            except MintjaxError as error:
                ended.add(type(error))
            service._connection.close()  # and the session goes on, so that the model stays
        bad.share = 0.0
        with ServiceClient("http://localhost", transport=bad) as service:
            new_model(service)  # the engine has done all that came before this
        result = state(engine, client)
        assert any(same(result, whole) for whole in undisturbed), (seed, bad.met)
    assert len(ended) > 1
