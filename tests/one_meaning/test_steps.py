"""Whatever way a step takes to the trainer, what accumulates there is the gradient of float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax import AdamParams, Datum, TrainingClient, value_and_logprob_grads
from mintjax.errors import MintjaxError
from mintjax.local import Engine, trainer
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.step.reduction import SUM, Reduction

from ..data import flat
from ..examples import parts, share
from .situations import OURS, OWN, Case, Situation, candidates_of, situations

NANO = "mintjax/nano"
TOLERANCE = 1e-4


class Trainer(NamedTuple):
    """An embedded trainer, and the client's model on it."""

    engine: Engine
    model: TrainingClient


@pytest.fixture(scope="module")
def trainers() -> Iterator[dict[str, Trainer]]:
    """A summing and an averaging trainer, each in JSON and in protocol buffers."""
    made: dict[str, Trainer] = {}
    with ExitStack() as stack:
        averages = Reduction("weights", per_step="datums")
        for reduction, divisors in (("sums", SUM), ("averages", averages)):
            for encoding in ("JSON", "protobuf"):
                engine = stack.enter_context(Engine(reduction=divisors))
                config = ClientConfigResponse(
                    proto_write_fwdbwd=encoding == "protobuf", custom_loss_server_side=True
                )
                service = stack.enter_context(trainer(engine, config=config))
                service.probe(NANO)
                model = service.create_lora_training_client(NANO, 4, seed=1)
                made[f"{reduction}, {encoding}"] = Trainer(engine, model)
        yield made


def forget(trainer: Trainer) -> None:
    """Empty what has accumulated; the weights stay."""
    trainer.model.optim_step(AdamParams(learning_rate=0.0)).result()


def reference(trainer: Trainer, objective: Any, situation: Situation) -> Any:
    """Loss, metrics, the gradient that a summing trainer has for that of float64, and its size."""
    logprobs = trainer.model.logprobs(situation.data)
    with jax.enable_x64(True):
        rows = [row.astype(np.float64) for row in logprobs]
        result = value_and_logprob_grads(objective, situation.data, rows)
    carried = [
        Datum(
            datum.model_input,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": -np.asarray(grad, np.float32),
            },
        )
        for datum, grad in zip(situation.data, result.grads, strict=True)
    ]
    trainer.engine.forward_backward(trainer.model.model_id, carried, "cross_entropy")
    accumulated = flat(trainer.engine.gradient(trainer.model.model_id))
    forget(trainer)
    # Gradients of tokens may cancel in the sum, but the rounding errors of each stay.
    parts = sum(float(np.abs(grad).sum()) for grad in result.grads)
    return result.loss, result.metrics, accumulated, parts


def step(trainer: Trainer, objective: Any, situation: Situation, **options: Any) -> Any:
    """Loss, metrics of the objective, and what one step accumulates."""
    output = trainer.model.forward_backward_custom(situation.data, objective, **options).result()
    accumulated = flat(trainer.engine.gradient(trainer.model.model_id))
    forget(trainer)
    return output.metrics["loss"], output.metrics, accumulated


def outcome(run: Any, trainer: Trainer, *args: Any, **options: Any) -> Any:
    """What came of it: numbers, or the type of an error, after which nothing is accumulated."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(trainer, *args, **options)
    except MintjaxError as error:
        assert not flat(trainer.engine.gradient(trainer.model.model_id)).any()
        return type(error)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(found, type) or isinstance(expected, type):
        assert found is expected
        return
    loss, metrics, gradient, parts = expected
    got_loss, got_metrics, got_gradient = found
    assert got_loss == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    for name, value in metrics.items():
        assert got_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3, nan_ok=True), name
    norm = np.linalg.norm(gradient)
    assert np.linalg.norm(got_gradient - gradient) <= TOLERANCE * max(norm, 1e-2, 1e-2 * parts)


def law(data: st.DataObject, case: Case, trainers: dict[str, Trainer]) -> None:
    """Several batches through one objective, on one of the trainers, by every route."""
    objective = case.objective()
    candidates = data.draw(candidates_of(case), label="candidates")
    summing = trainers["sums, JSON"]
    for _ in range(data.draw(st.integers(1, 3), label="batches")):
        situation = data.draw(situations(case, candidates), label="batch")
        expected = outcome(reference, summing, objective, situation)
        there = trainers[data.draw(st.sampled_from(list(trainers)), label="trainer")]
        assert_same(outcome(step, there, objective, situation), expected)
        assert_same(outcome(step, there, objective, situation, single_pass=False), expected)


def check(names: list[str], cases: Mapping[str, Case], trainers: dict[str, Trainer]) -> None:
    """Holds the law for some of the cases, with their share of the examples."""

    @share(2, cases)  # each example compiles
    @given(data=st.data(), name=st.sampled_from(names))
    def holds(data: st.DataObject, name: str) -> None:
        law(data, cases[name], trainers)

    holds()


@pytest.mark.parametrize("names", parts(OWN))
def test_a_users_function_accumulates_the_gradient_of_float64(
    names: list[str], trainers: dict[str, Trainer]
) -> None:
    check(names, OWN, trainers)


@pytest.mark.parametrize("names", parts(OURS))
def test_an_objective_accumulates_the_gradient_of_float64(
    names: list[str], trainers: dict[str, Trainer]
) -> None:
    check(names, OURS, trainers)
