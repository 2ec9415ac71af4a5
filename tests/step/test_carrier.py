import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Datum, ModelInput, losses
from mintjax.step.carrier import carrier, forward_data
from mintjax.step.reduction import SUM, Reduction

from ..by_numpy import evaluate
from ..examples import examples

REDUCTIONS = [Reduction(*flags) for flags in itertools.product([False, True], repeat=2)]


def reduced(reduction, datum, logprobs, datums):
    """What a trainer with this convention differentiates, of one datum among ``datums``."""
    inputs = datum.loss_fn_inputs
    if reduction.loss_fn == "cross_entropy":
        values = losses.cross_entropy(logprobs, inputs["weights"])
    else:
        values = losses.importance_sampling(
            logprobs, inputs["logprobs"], inputs["advantages"], where=inputs["weights"] != 0
        )
    loss = values.sum()
    if reduction.per_sequence:
        loss = loss / np.maximum(inputs["weights"].sum(), 1e-9)
    return loss / datums if reduction.over_datums else loss


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@settings(max_examples=examples(8))
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_carried_gradient_is_what_the_trainer_accumulates(reduction, sizes, seed):
    rng = np.random.default_rng(seed)
    shapes = [(n, 2) if seed % 2 else (n,) for n in sizes]
    logprobs = [-rng.exponential(size=s).astype(np.float32) for s in shapes]
    grads = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    data = [
        Datum(ModelInput.from_ints(range(s[0])), {"target_tokens": np.ones(s, int)}) for s in shapes
    ]
    datums = len(data) + 3  # three more in another request before the optimizer step
    carried = carrier(reduction, data, logprobs, grads, datums)
    for datum, row, grad in zip(carried, logprobs, grads, strict=True):
        got = evaluate(jax.grad(lambda lp, d=datum: reduced(reduction, d, lp, datums)), row)
        np.testing.assert_allclose(got, grad, rtol=2e-6)


def test_where_the_trainer_sums_nothing_but_weights_travels():
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "advantages": [1, 2]})
    [sent] = carrier(SUM, [datum], None, [np.array([0.5, -1], np.float32)], 1)
    assert set(sent.loss_fn_inputs) == {"target_tokens", "weights"}
    np.testing.assert_array_equal(sent.loss_fn_inputs["weights"], [-0.5, 1])
    assert SUM.sums
    assert SUM.loss_fn == "cross_entropy"


def test_a_forward_pass_sends_targets_and_weights():
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "logprobs": [0.1, 0.2]})
    [sent] = forward_data([datum])
    assert set(sent.loss_fn_inputs) == {"target_tokens", "weights"}
    np.testing.assert_array_equal(sent.loss_fn_inputs["weights"], [1, 1])


@pytest.mark.parametrize("weights", [[0, 1], 0.5, [[1, 2, 3], [4, 5, 6]]])
def test_a_forward_pass_keeps_the_users_weights_at_home(weights):
    targets = np.ones((2, 3), int)
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": targets, "weights": weights})
    np.testing.assert_array_equal(
        forward_data([datum])[0].loss_fn_inputs["weights"], np.ones((2, 3))
    )
