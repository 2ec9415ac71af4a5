"""Whatever happened to requests before, what accumulates is the gradient of those that succeeded.

A model of the trainer is kept beside it: the sum of the float64 gradients of the steps that
succeeded, and how many datums they had. Steps succeed, are refused, fail late, are cancelled and
are submitted behind others, in any order; after each the trainer must hold what the model holds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from mintjax import AdamParams, Datum, ModelInput, TrainingClient, value_and_logprob_grads
from mintjax.client.futures import APIFuture
from mintjax.errors import APIError, DataError, NonFiniteError, NotSentError, RequestFailedError
from mintjax.local import Engine, trainer
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.step.reduction import Reduction

from ..data import flat
from ..examples import examples
from .situations import CASES

NANO = "mintjax/nano"
ANNOUNCED = 8
"""Datums before an optimizer step, as announced to the averaging trainer."""

NOTHING_MOVES = AdamParams(learning_rate=0.0)
SECONDS = 60


class Faulty(Engine):
    """The embedded trainer, whose next mutating request can be made to fail."""

    fault: Exception | None = None

    def forward_backward(self, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super().forward_backward(*args, **kwargs)

    def optim_step(self, *args: Any, **kwargs: Any) -> Any:
        self._fail()
        return super().optim_step(*args, **kwargs)

    def _fail(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault


def batch(seed: int, rows: int) -> list[Datum]:
    """Some datums with every column that the objectives below read."""
    random = np.random.default_rng([seed, rows])
    data = []
    for length in random.integers(1, 5, rows):
        columns = {
            "target_tokens": random.integers(0, 200, length),
            "weights": random.integers(0, 3, length) / 2,
            "advantages": random.integers(-2, 3, length) / 2,
            "logprobs": -random.integers(1, 40, length) / 8,
        }
        data.append(Datum(ModelInput.from_ints(range(1, length + 1)), columns))
    return data


OBJECTIVES = {
    name: CASES[name].objective()
    for name in ("reinforce", "pairwise", "pairwise_loop", "cross_entropy", "ppo", "bradley_terry")
}
"""By name, in one pass, and in two; columns and rows."""

BATCHES = [batch(seed, rows) for seed, rows in ((0, 2), (1, 2), (2, 4), (3, 4))]


class Steps(RuleBasedStateMachine):
    """Requests to one model, beside what it should hold."""

    trainers: dict[str, tuple[Faulty, TrainingClient]]
    references: dict[tuple[str, int], Any]

    @initialize(kind=st.sampled_from(["sums", "sums, protobuf", "averages"]))
    def begin(self, kind: str) -> None:
        self.engine, self.model = self.trainers[kind]
        self.averages = kind == "averages"
        self.engine.fault = None
        self.clear()

    def clear(self) -> None:
        """Empties what an example before has left, whatever the client thinks of it."""
        saved = self.engine.save_weights(self.model.model_id, "clear")
        self.model.load_state(saved).result(SECONDS)
        self.expected: Any = 0.0
        self.held = 0

    def reference(self, name: str, which: int) -> Any:
        """The accumulated gradient that a summing trainer has for that of float64."""
        key = (name, which)
        if key not in self.references:
            engine, model = self.trainers["reference"]
            rows = [row.astype(np.float64) for row in model.logprobs(BATCHES[which])]
            with jax.enable_x64(True):
                grads = value_and_logprob_grads(OBJECTIVES[name], BATCHES[which], rows).grads
            carried = [
                Datum(
                    datum.model_input,
                    {
                        "target_tokens": datum.loss_fn_inputs["target_tokens"],
                        "weights": -np.asarray(grad, np.float32),
                    },
                )
                for datum, grad in zip(BATCHES[which], grads, strict=True)
            ]
            engine.forward_backward(model.model_id, carried, "cross_entropy")
            self.references[key] = flat(engine.gradient(model.model_id))
            model.optim_step(NOTHING_MOVES).result(SECONDS)
        return self.references[key]

    def submit(self, name: str, which: int) -> APIFuture[Any]:
        announced = {"datums_in_step": ANNOUNCED} if self.averages else {}
        return self.model.forward_backward_custom(BATCHES[which], OBJECTIVES[name], **announced)

    def fits(self, datums: int) -> bool:
        return not self.averages or self.held + datums <= ANNOUNCED

    def settle(self, future: APIFuture[Any], name: str, which: int) -> None:
        """Waits for a step, which must succeed if the trainer can take it."""
        datums = len(BATCHES[which])
        if not self.fits(datums):
            with pytest.raises(DataError, match="announced"):
                future.result(SECONDS)
            return
        future.result(SECONDS)
        self.expected = self.expected + self.reference(name, which)
        self.held += datums

    names = st.sampled_from(list(OBJECTIVES))
    batches = st.integers(0, len(BATCHES) - 1)

    @rule(name=names, which=batches)
    def step(self, name: str, which: int) -> None:
        self.settle(self.submit(name, which), name, which)

    @rule(first=st.tuples(names, batches), second=st.tuples(names, batches))
    def steps_at_once(self, first: tuple[str, int], second: tuple[str, int]) -> None:
        futures = [self.submit(*first), self.submit(*second)]
        self.settle(futures[0], *first)
        self.settle(futures[1], *second)

    @rule(which=batches)
    def objective_raises(self, which: int) -> None:
        def objective(data: Any, logprobs: Any) -> Any:
            raise KeyError("a mistake of the user's")

        if self.fits(len(BATCHES[which])):
            announced = {"datums_in_step": ANNOUNCED} if self.averages else {}
            future = self.model.forward_backward_custom(BATCHES[which], objective, **announced)
            with pytest.raises(KeyError):
                future.result(SECONDS)

    @rule()
    def refused_at_once(self) -> None:
        beyond = Datum(
            ModelInput.from_ints([1, 2]), {"target_tokens": np.array([1, 10**6]), "weights": 1.0}
        )
        try:
            future = self.model.forward_backward([beyond], "cross_entropy")
        except DataError:
            return
        with pytest.raises((APIError, DataError)):
            future.result(SECONDS)

    def may_fail(self, future: APIFuture[Any], name: str, which: int) -> None:
        """Waits for a step that may fail; it counts if it does not."""
        try:
            future.result(SECONDS)
        except (RequestFailedError, NotSentError):
            return
        except DataError:
            assert not self.fits(len(BATCHES[which]))
            return
        self.expected = self.expected + self.reference(name, which)
        self.held += len(BATCHES[which])

    @rule(name=names, which=batches, known=st.booleans())
    def fails_late(self, name: str, which: int, known: bool) -> None:
        if self.fits(len(BATCHES[which])):
            self.engine.fault = (NonFiniteError if known else RuntimeError)("made on purpose")
            # A loss that is asked for by its name, and refused, is sent as a gradient instead.
            self.may_fail(self.submit(name, which), name, which)
            assert self.engine.fault is None

    @rule(first=st.tuples(names, batches), second=st.tuples(names, batches))
    def fails_late_before_another(self, first: tuple[str, int], second: tuple[str, int]) -> None:
        if self.fits(len(BATCHES[first[1]])):
            self.engine.fault = NonFiniteError("made on purpose")
            futures = [self.submit(*first), self.submit(*second)]
            self.may_fail(futures[0], *first)
            self.may_fail(futures[1], *second)

    @rule(first=batches, second=st.tuples(names, batches))
    def cancelled_while_it_waits(self, first: int, second: tuple[str, int]) -> None:
        if not self.fits(len(BATCHES[first])):
            return
        started, go_on = threading.Event(), threading.Event()

        def slow(data: Any, logprobs: Any) -> Any:
            started.set()
            assert go_on.wait(SECONDS)
            return OBJECTIVES["pairwise"](data, logprobs)

        announced = {"datums_in_step": ANNOUNCED} if self.averages else {}
        held = self.model.forward_backward_custom(BATCHES[first], slow, **announced)
        assert started.wait(SECONDS)
        cancelled = self.submit(*second)
        assert cancelled.cancel()
        go_on.set()
        self.settle(held, "pairwise", first)
        assert cancelled.cancelled()

    # No precondition: what is held may depend on a race, and then Hypothesis would draw otherwise.
    @rule(known=st.booleans())
    def optimizer_step_fails(self, known: bool) -> None:
        if self.held and (not self.averages or self.held == ANNOUNCED):
            self.engine.fault = (NonFiniteError if known else RuntimeError)("made on purpose")
            with pytest.raises(RequestFailedError):
                self.model.optim_step(NOTHING_MOVES).result(SECONDS)

    @rule()
    def optimizer_step(self) -> None:
        future = self.model.optim_step(NOTHING_MOVES)
        if self.averages and self.held not in (0, ANNOUNCED):
            with pytest.raises(DataError, match=f"{ANNOUNCED} datums were announced"):
                future.result(SECONDS)
            return
        future.result(SECONDS)
        self.expected, self.held = 0.0, 0

    @invariant()
    def holds_what_succeeded(self) -> None:
        if not hasattr(self, "model"):
            return
        accumulated = flat(self.engine.gradient(self.model.model_id))
        if self.averages and self.held:  # it divides by what it holds, not by what is to come
            accumulated = accumulated * (self.held / ANNOUNCED)
        error = np.linalg.norm(accumulated - self.expected)
        assert error <= 1e-4 * max(float(np.linalg.norm(self.expected)), 1e-2)


@pytest.fixture(scope="module")
def trainers() -> Iterator[dict[str, tuple[Faulty, TrainingClient]]]:
    """A summing trainer in JSON and in protocol buffers, an averaging one, and one to compare."""
    made: dict[str, tuple[Faulty, TrainingClient]] = {}
    kinds = {
        "sums": (False, False),
        "sums, protobuf": (False, True),
        "averages": (True, False),
        "reference": (False, False),
    }
    with ExitStack() as stack:
        for kind, (normalise, protobuf) in kinds.items():
            divides = Reduction("weights", per_step="datums") if normalise else Reduction()
            engine = stack.enter_context(Faulty(reduction=divides))
            config = ClientConfigResponse(proto_write_fwdbwd=protobuf)
            service = stack.enter_context(trainer(engine, config=config))
            service.probe(NANO)
            made[kind] = (engine, service.create_lora_training_client(NANO, 4, seed=1))
        yield made


@pytest.mark.filterwarnings("ignore")  # of loops over rows, in the thread of an objective
def test_after_any_sequence_the_trainer_holds_the_gradients_that_succeeded(
    trainers: dict[str, tuple[Faulty, TrainingClient]],
) -> None:
    chosen = settings(
        max_examples=examples(4),
        stateful_step_count=12,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    made = type("Made", (Steps,), {"trainers": trainers, "references": {}})
    run_state_machine_as_test(made, settings=chosen)
