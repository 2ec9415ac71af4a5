"""The two requests of a custom step: what the first keeps, and what the second adds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax.errors import BadRequestError
from mintjax.local import Dialect, Engine, Limits, custom_steps
from mintjax.local.custom_steps import STEP1, STEP2
from mintjax.protocol import messages
from mintjax.step.carrier import carrier
from mintjax.step.reduction import SUM, Reduction
from mintjax.types import Datum, LoraConfig, ModelInput

from .conftest import BASE_MODEL
from .http import serving


def datum(length, seed=0):
    rng = np.random.default_rng(seed)
    targets = {"target_tokens": rng.integers(0, 256, length)}
    return Datum(ModelInput.from_ints(rng.integers(0, 256, length)), targets)


@settings(max_examples=5)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    reduction=st.sampled_from([SUM, Reduction(per_request="weights"), Reduction("weights")]),
)
def test_a_gradient_is_added_as_it_is_whatever_losses_are_divided_by(sizes, seed, reduction):
    rng = np.random.default_rng(seed)
    data = [datum(n, seed) for n in sizes]
    grads = [rng.normal(0, 1, n).astype(np.float32) for n in sizes]
    found = []
    for engine in (Engine(), Engine(reduction=reduction)):
        with engine:
            model_id = engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))
            if not found:
                carried = carrier(SUM, data, None, grads, len(data))
                output = engine.forward_backward(model_id, carried, "cross_entropy")
                expected = output.metrics["loss:sum"]
            else:
                assert engine.accumulate(model_id, data, grads) == expected
            found.append([np.asarray(leaf) for leaf in jax.tree.leaves(engine.gradient(model_id))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_first_request_serves_once(engine):
    with serving(engine, dialect=Dialect(takes_gradients=True)) as http:
        session = http.post("create_session", messages.CreateSessionRequest("1")).json()
        asked = messages.CreateModelRequest(session["session_id"], 0, BASE_MODEL, LoraConfig(4))
        model_id = http.call("create_model", asked)["model_id"]

        def call(path, **given):
            step = messages.CustomStepInput("a", **given)
            return http.call(path, messages.CustomStepRequest(step, model_id))

        [row] = call(STEP1, data=[datum(2)])["logprobs"]
        assert len(row) == 2
        assert "not shaped" in call(STEP2, grad_logprobs=[[1.0]])["error"]
        assert call(STEP2, grad_logprobs=[[1.0, 2.0]])["surrogate"] == pytest.approx(
            row[0] + 2 * row[1]
        )
        assert "no cached forward" in call(STEP2, grad_logprobs=[[1.0, 2.0]])["error"]


def test_the_oldest_first_requests_are_forgotten(engine, monkeypatch):
    monkeypatch.setattr(custom_steps, "MOST_KEPT", 2)
    model_id = engine.create_model(BASE_MODEL, LoraConfig(4))
    steps = custom_steps.CustomSteps(engine, Limits())

    def request(name, **given):
        return messages.CustomStepRequest(messages.CustomStepInput(name, **given), model_id)

    for name in "abc":
        steps.step1(request(name, data=[datum(2)]))()
    with pytest.raises(BadRequestError, match="'a'"):
        steps.step2(request("a", grad_logprobs=[[1.0, 2.0]]))()
    for name in "bc":
        steps.step2(request(name, grad_logprobs=[[1.0, 2.0]]))()
