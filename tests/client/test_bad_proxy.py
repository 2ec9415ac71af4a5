"""Never applied twice, never lost, never silent: a bad proxy between the client and a trainer.

Six pipelined steps in each scenario. After an error the test does what README tells a user to do,
and in the end the weights are those of the six steps, bit for bit.
"""

from __future__ import annotations

import jax
import msgspec
import numpy as np
import pytest

pytest.importorskip("safetensors")

from mintjax.client import ServiceClient, TrainingClient
from mintjax.errors import APIError, MintjaxError, NotSentError
from mintjax.local import running_server
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.types import AdamParams, Datum, ModelInput

from ..examples import THOROUGH
from .double import QUICK
from .proxy import BadProxy

MODEL = "mintjax/nano"
PATIENT = msgspec.structs.replace(
    QUICK, deadline=30.0, first_contact=30.0, poll_timeout=1.0, silence=30.0, bad_answers=6
)
HASTY = msgspec.structs.replace(PATIENT, deadline=0.02, silence=0.02, bad_answers=1)
STEPS = 6
SCENARIOS = 250 if THOROUGH else 5  # in each encoding
PER_TEST = 10 if THOROUGH else 5


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

    return [one(length) for length in (5, 9)]


BATCHES = [
    batch(seed) for seed in range(STEPS)
]  # all of one shape, so that answers can be mixed up


def preference(data, logprobs):
    scores = (logprobs * data["weights"]).sum()
    return -jax.nn.log_sigmoid(scores[0] - scores[1]), {"margin": scores[0] - scores[1]}


def requests():
    """What a user submits: six steps, each a gradient and an update."""
    for i, data in enumerate(BATCHES):
        if i % 3 == 2:
            yield lambda client, data=data: client.forward_backward_custom(data, preference)
        else:
            yield lambda client, data=data: client.forward_backward(data, "ppo")
        params = AdamParams(learning_rate=1e-2 / (1 + i))
        yield lambda client, params=params: client.optim_step(params)


def state(engine, client):
    model = engine.model(client.model_id)
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves((model.lora, model.optimizer, model.gradient))
    ]


def results(futures):
    return [future.result(60) for future in futures]


@pytest.fixture(scope="module", params=["json", "protobuf"])
def proxy(request, engine):
    config = ClientConfigResponse(proto_write_fwdbwd=request.param == "protobuf")
    with running_server(engine, config=config) as url:
        proxy = BadProxy(url)
        yield proxy
        proxy.close()


@pytest.fixture(scope="module")
def settle(proxy):
    """Waits until the trainer has done all that has reached it."""
    with ServiceClient(proxy.url) as service:
        sampler = service.create_sampling_client(base_model=MODEL)
        yield lambda: sampler.compute_logprobs(ModelInput.from_ints([1, 2])).result(60)


@pytest.fixture(scope="module")
def undisturbed(engine, proxy):
    """A checkpoint, what the six steps from it return, and the model that they make."""
    with ServiceClient(proxy.url) as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=3)
        checkpoint = client.save_state("first").result(60).path
        answers = results([submit(client) for submit in requests()])
        made = state(engine, client)
        engine.unload_model(client.model_id)
        return checkpoint, answers, made


class Scenario:
    """One user, who does what README says under "When something goes wrong"."""

    def __init__(self, service: ServiceClient, checkpoint: str) -> None:
        self.service = service
        self.checkpoint = checkpoint
        self.models: list[str] = []
        self.errors: list[MintjaxError] = []
        self.client: TrainingClient
        self.go_on_from_the_checkpoint()

    def train(self):
        """Submit everything; after an error, what is left of it; until all of it has succeeded."""
        todo = list(requests())
        answers = [None] * len(todo)
        start = 0
        while start < len(todo):
            failed = self.attempt(todo[start:], answers, start)
            if failed is None:
                return answers
            position, error = failed
            self.errors.append(error)
            assert len(self.errors) < 100, self.errors
            if error.may_have_been_applied:
                self.go_on_from_the_checkpoint()
                start = 0
            else:
                start = position
        return answers

    def attempt(self, submits, answers, offset):
        """The position and error of the first request that failed; those behind were withheld."""
        futures = []
        first = None
        for submit in submits:
            try:
                futures.append(submit(self.client))
            except APIError as error:  # nothing more can be sent
                first = (offset + len(futures), error)
                break
        for i, future in enumerate(futures):
            error = future.exception(60)
            if error is None:
                if first is None or first[0] > offset + i:
                    answers[offset + i] = future.result()
                else:
                    assert first[1].may_have_been_applied  # its result was lost, not its effect
            elif first is None or first[0] > offset + i:
                assert isinstance(error, MintjaxError), repr(error)
                first = (offset + i, error)
            elif not first[1].may_have_been_applied:
                assert isinstance(error, NotSentError)
        return first

    def go_on_from_the_checkpoint(self):
        for _ in range(50):
            try:
                make = self.service.create_training_client_from_state_with_optimizer
                self.client = make(self.checkpoint)
            except MintjaxError as error:
                self.errors.append(error)
            else:
                self.models.append(self.client.model_id)
                return
        raise AssertionError(self.errors)


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        assert one.metrics.keys() == other.metrics.keys()
        if one.metrics:
            for name, value in other.metrics.items():
                assert one.metrics[name] == value, name
        if hasattr(one, "logprobs"):
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("first", range(0, SCENARIOS, PER_TEST))
def test_the_weights_are_those_of_the_steps(engine, proxy, settle, undisturbed, first):
    checkpoint, answers, made = undisturbed
    doubts = 0
    for seed in range(first, first + PER_TEST):
        hasty, share, most = seed % 2, (0.05, 0.15, 0.3, 0.6)[seed % 4], (1, 3, 10)[seed % 3]
        policy = HASTY if hasty else PATIENT
        with ServiceClient(proxy.url, retry_policy=policy, timeout=0.4) as service:
            proxy.begin(seed, 0.0, 0)
            scenario = Scenario(service, checkpoint)
            proxy.begin(seed, share, most)
            try:
                got = scenario.train()
                proxy.flush()
                settle()
                same(got, answers)
                for a, b in zip(state(engine, scenario.client), made, strict=True):
                    np.testing.assert_array_equal(a, b)
            except BaseException as error:
                error.add_note(f"seed {seed}, hasty {hasty}: {proxy.met} {scenario.errors}")
                raise
            doubts += sum(getattr(e, "may_have_been_applied", False) for e in scenario.errors)
            for model in scenario.models:
                engine.unload_model(model)
    assert doubts < 5 * PER_TEST
