"""What a trainer must report of its losses is what mintjax's own losses say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax import Datum, ModelInput, losses, objectives
from mintjax.step.reported import returns_the_sum
from mintjax.tensors import TensorData
from mintjax.types import ForwardBackwardOutput

POLICIES = ["importance_sampling", "ppo", "cispo", "dro"]
CONFIGS = {
    "ppo": {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4},
    "cispo": {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1},
    "dro": {"beta": 0.3},
}


def batch(seed, sizes, shift=0.4):
    rng = np.random.default_rng(seed)
    data, rows = [], []
    for n in sizes:
        rows.append(rng.normal(-3, 1, n).astype(np.float32))
        columns = {
            "target_tokens": np.ones(n, np.int64),
            "weights": rng.normal(0, 1, n).astype(np.float32),
            "logprobs": rows[-1] + rng.normal(0, shift, n).astype(np.float32),
            "advantages": rng.normal(0, 1, n).astype(np.float32),
        }
        data.append(Datum(ModelInput.from_ints([1] * n), columns))
    return data, rows


def sum_of(loss_fn, data, rows, config):
    """The sum by mintjax's own loss, of arrays of one length, so that it compiles once."""
    names = ("weights",) if loss_fn == "cross_entropy" else ("logprobs", "advantages")
    columns = [[datum.loss_fn_inputs[name] for datum in data] for name in names]
    joined = [np.concatenate(one) for one in (rows, *columns)]
    length = len(joined[0])
    padded = [np.pad(one, (0, 40 - length)) for one in joined]
    given = getattr(losses, loss_fn)(*padded, **(config or {}))
    return float(np.asarray(given, np.float64)[:length].sum())


def output(rows, total):
    outputs = [{"logprobs": TensorData(row)} for row in rows]
    return ForwardBackwardOutput(loss_fn_outputs=outputs, metrics={"loss:sum": total})


@given(
    loss_fn=st.sampled_from(["cross_entropy", *POLICIES]),
    given_config=st.booleans(),
    seed=st.integers(0, 999),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    scale=st.sampled_from([1.0, 1e-9, 1e6]),
)
def test_the_sum_is_that_of_the_losses(loss_fn, given_config, seed, sizes, scale):
    data, rows = batch(seed, sizes)
    for datum in data:
        for name in ("weights", "advantages"):
            datum.loss_fn_inputs[name] *= np.float32(scale)
    config = CONFIGS.get(loss_fn) if given_config else None
    if loss_fn == "dro":
        config = {"beta": 0.05 * scale}
    total = sum_of(loss_fn, data, rows, config)
    assert returns_the_sum(loss_fn, data, output(rows, total), config)
    size = sum_of(loss_fn, *batch_of_one_sign(data, rows), config)
    wrong = total + 0.3 * abs(size) + 1e-30
    assert returns_the_sum(loss_fn, data, output(rows, wrong), config) is False


def batch_of_one_sign(data, rows):
    """The same, where nothing cancels."""
    columns = [
        {
            **datum.loss_fn_inputs,
            "weights": np.abs(datum.loss_fn_inputs["weights"]),
            "advantages": np.abs(datum.loss_fn_inputs["advantages"]),
        }
        for datum in data
    ]
    return [Datum(d.model_input, one) for d, one in zip(data, columns, strict=True)], rows


@given(loss_fn=st.sampled_from(POLICIES), seed=st.integers(0, 999))
def test_logprobs_that_were_rounded_on_their_way_are_no_contradiction(loss_fn, seed):
    data, rows = batch(seed, [1])  # of one token, so that errors do not cancel
    total = sum_of(loss_fn, data, rows, None)
    rounded = [(row.view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32) for row in rows]
    assert returns_the_sum(loss_fn, data, output(rounded, total))


@pytest.mark.parametrize("loss_fn", POLICIES)
def test_defaults_are_those_of_the_objectives(loss_fn):
    name, config = getattr(objectives, loss_fn)().builtin
    assert name == loss_fn
    data, rows = batch(3, [40], shift=0.6)
    assert returns_the_sum(loss_fn, data, output(rows, sum_of(loss_fn, data, rows, config)), {})


def test_what_is_not_known_is_not_judged():
    data, rows = batch(0, [3])
    assert returns_the_sum("gspo", data, output(rows, 1.0)) is None
    silent = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData(rows[0])}])
    assert returns_the_sum("ppo", data, silent) is None
