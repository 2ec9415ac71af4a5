"""A trainer that takes gradients of logprobs gets the one that the plain route brings."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Datum, ModelInput, objectives, remote_logprobs
from mintjax.client import ServiceClient
from mintjax.errors import AmbiguousRequestError, UnknownReductionError
from mintjax.local import DIALECTS, Engine, trainer
from mintjax.local.app import application
from mintjax.protocol import messages
from mintjax.step.reduction import Reduction

from ..examples import THOROUGH
from .double import ADDRESS, QUICK

NANO = "mintjax/nano"
HATCHERY = DIALECTS["hatchery-0.3"]
PAIRWISE = objectives.bradley_terry()
STEP1, STEP2 = "forward_backward_custom_step1", "forward_backward_custom_step2"


def square(data, logprobs):
    """A loss whose gradient depends on every logprob, and none of the trainer's own."""
    return (logprobs**2).dot(data["weights"]).sum(), {}


def make(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n).tolist()),
            {"target_tokens": rng.integers(0, 256, n), "weights": rng.normal(0, 1, n)},
        )
        for n in sizes
    ]


class Watched(httpx.ASGITransport):
    """Keeps the paths that were asked, and may lose the answer to one of them."""

    def __init__(self, app, loses=""):
        super().__init__(app)
        self.paths, self.loses = [], loses

    async def handle_async_request(self, request):
        path = request.url.path.removeprefix("/api/v1/")
        self.paths.append(path)
        response = await super().handle_async_request(request)
        if path == self.loses:
            raise httpx.ReadError("lost by the test")
        return response


@contextmanager
def hatchery(loses="", policy=None, measure=False, **options):
    """A trainer that plays hatchery; gives a model, the trainer's engine and its transport."""
    with (
        Engine(reduction=HATCHERY.reduction) as engine,
        application(engine, dialect=HATCHERY, **options) as app,
    ):
        transport = Watched(app, loses)
        service = ServiceClient(ADDRESS, transport=transport, retry_policy=policy, measure=measure)
        with service:
            yield service.create_lora_training_client(NANO, 4, seed=1), engine, transport


def gradient(engine, model):
    leaves = jax.tree.leaves(engine.gradient(model.model_id))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


@pytest.fixture(scope="module")
def plain():
    with Engine() as engine, trainer(engine) as service:
        yield service, engine


@dataclasses.dataclass(frozen=True)
class Scaled:
    objective: Any
    scale: float

    def __call__(self, data, logprobs):
        loss, metrics = self.objective(data, logprobs)
        return self.scale * loss, metrics


@settings(max_examples=4 if THOROUGH else 2)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    objective=st.sampled_from([square, PAIRWISE]),
    scale=st.sampled_from([1.0, 1e-4, 1e4]),
)
def test_the_gradient_is_that_of_the_plain_route(plain, sizes, seed, objective, scale):
    data, found, losses = make(sizes, seed), [], []
    scaled = Scaled(objective, scale)
    with hatchery() as (theirs, engine, _):
        service = plain[0]
        with service.create_lora_training_client(NANO, 4, seed=1) as ours:
            for model, where in ((ours, plain[1]), (theirs, engine)):
                outputs = [model.forward_backward_custom(part, scaled) for part in (data, data[:2])]
                losses.append([one.result().metrics["loss"] for one in outputs])
                found.append(gradient(where, model))
            assert {one.result().route for one in outputs} == {"by_gradient"}
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)
    error = np.linalg.norm(found[1] - found[0])
    assert error <= 1e-5 * np.linalg.norm(found[0]) + 1e-12


@pytest.mark.parametrize("measure", [True, False])
def test_the_requests_are_tried_once_on_a_throwaway_model(measure):
    with hatchery(measure=measure) as (model, engine, transport):
        for _ in range(2):
            model.forward_backward_custom(make([3, 5]), square).result()
        assert transport.paths.count("create_model") == 1 + measure
        assert transport.paths.count("get_server_capabilities") == 1
        assert [path for path in transport.paths if "forward" in path][-4:] == [STEP1, STEP2] * 2
        assert list(engine.models) == [model.model_id]


def test_a_batch_goes_in_parts_of_the_size_that_the_trainer_takes(plain):
    config, data = messages.ClientConfigResponse(fwdbwd_max_chunk_len=2), make([3, 5, 4])

    def watched(data, logprobs):
        return square(data, logprobs)[0], {"scores": logprobs.sum()}

    with hatchery(config=config) as (model, engine, transport):
        output = model.forward_backward_custom(data, watched).result()
        scores = [row.sum() for row in output.logprobs]
        np.testing.assert_allclose(output.metrics["scores"], scores, rtol=1e-5)
        assert transport.paths.count(STEP2) == 2
        found = gradient(engine, model)
    with plain[0].create_lora_training_client(NANO, 4, seed=1) as ours:
        ours.forward_backward_custom(data, square).result()
        expected = gradient(plain[1], ours)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_the_bridge_goes_the_same_way(plain):
    data, found = make([3, 5]), []
    with hatchery() as (theirs, engine, transport):
        with plain[0].create_lora_training_client(NANO, 4, seed=1) as ours:
            for model, where in ((ours, plain[1]), (theirs, engine)):
                remote = remote_logprobs(model, data)
                grads = jax.grad(lambda p, remote=remote: square(remote.batch, remote(p))[0])
                jax.block_until_ready(grads(remote.params))
                found.append(gradient(where, model))
        assert transport.paths.count(STEP2) == 1
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6 * np.abs(found[0]).max())


def test_a_gradient_whose_answer_is_lost_is_not_sent_again():
    with hatchery(policy=QUICK, loses=STEP2) as (model, _, transport):
        with pytest.raises(AmbiguousRequestError, match="may or may not have been applied"):
            model.forward_backward_custom(make([3, 5]), square).result()
        assert transport.paths.count(STEP2) == 1
    with hatchery(policy=QUICK, loses=STEP1) as (model, _, transport):  # this one changes nothing
        with pytest.raises(ConnectionError):
            model.forward_backward_custom(make([3, 5]), square).result()
        assert transport.paths.count(STEP1) > 1


def test_a_trainer_that_adds_something_else_is_found_out(monkeypatch):
    plain = Engine.accumulate

    def halved(self, model_id, data, grads):
        return plain(self, model_id, data, [grad / 2 for grad in grads])

    with hatchery(measure=True) as (model, _, _):
        assert model.forward_backward_custom(make([3, 5]), square).result().route == "by_gradient"
        monkeypatch.setattr(Engine, "accumulate", halved)
        with pytest.raises(UnknownReductionError, match="sum to"):
            model.forward_backward_custom(make([3, 5]), square).result()
        assert model.forward_backward_custom(make([3, 5]), square).result().route == "two_pass"


def test_several_candidates_go_by_the_trainers_own_losses():
    rng = np.random.default_rng(0)
    wide = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": rng.integers(0, 9, (3, 2))})
    with hatchery() as (model, _, transport):
        model._connection.facts.reduction = HATCHERY.reduction  # as if it had been measured
        output = model.forward_backward_custom(
            [wide], lambda data, logprobs: ((logprobs**2).sum().sum(), {})
        )
        assert output.result().route == "two_pass"
        assert STEP1 not in transport.paths


def test_a_reduction_that_is_said_is_used():
    with hatchery() as (_, _, transport):
        service = ServiceClient(
            ADDRESS, transport=transport, reduction=Reduction(per_request="weights")
        )
        with service, service.create_lora_training_client(NANO, 4) as said:
            assert said.forward_backward_custom(make([3]), square).result().route == "two_pass"
