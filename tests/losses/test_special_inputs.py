"""Every loss where formulas break: certainty, equal policies, bounds, far policies, nothing left.

A second evaluation in float64 says what is right. In float32 a loss must be what it is there for
some logprobs within rounding of the given ones, so that a token at a bound may fall on either side.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..by_numpy import interpret
from ..examples import THOROUGH, examples, some
from . import cases

LOGPROBS = [0.0, -0.0, -1e-30, -1e-8, -1.2e-7, -1e-4, -0.1, -0.5, -0.6931472, -1.0, -5.0, -60.0]
SCORES = [0.0, -1e-6, -0.5, -0.6931472, -3.0, -3.5, -10.0, -60.0]
NUMBERS: dict[str, list[float]] = {
    "advantages": [0.0, -0.0, 1.0, -1.0, 0.5, -2.5, 1e4],
    "weights": [0.0, -0.0, 1.0, -1.0, 0.5, 2.0],
    "sequence_log_ratios": [0.0, -0.0, 1e-4, -1e-4, 0.3, -0.3, 20.0, -20.0],
    "desirable": [0.0, 1.0, -1.0],
    "kl": [0.0, -1.0, 0.3, 5.0],
    "reward_shift": [0.0, 0.1, -3.0],
    "outcomes": [0.0, 1.0, 0.5],
    "chosen_lengths": [0.0, 1.0, 7.0, 5e4],
    "rejected_lengths": [0.0, 1.0, 5.0, 5e4],
    "chosen_log_weights": [0.0, -0.5, -100.0],
    "rejected_log_weights": [0.0, -0.5, -100.0],
    "rewards": [0.0, -0.0, 1.0, 0.1, 250.3, -7.7],
    "values": [0.0, 1.0, -3.0],
}
SAME = {  # what half of the time equals another input
    "sampling_logprobs": "target_logprobs",
    "ref_logprobs": "target_logprobs",
    "teacher_logprobs": "target_logprobs",
    "rejected_scores": "chosen_scores",
    "ref_chosen_scores": "chosen_scores",
    "ref_rejected_scores": "rejected_scores",
}
EDGES: dict[str, list[Any]] = {
    "beta": [0.0, 1.0],
    "label_smoothing": [0.0, 0.5],
    "renormalise": [False, True],
    "divergence": ["forward_kl", "alpha", "reverse_kl"],
    "clip_high_threshold": [np.inf],
    "truncation_threshold": [1.0, np.inf],
    "divergence_threshold": [0.0, np.inf],
    "gamma": [0.0],
    "nll_weight": [0.0],
}
NOT_AT_0 = {("ipo", "beta"), ("sppo", "beta"), ("exo_pair", "label_smoothing")}
NOT_AT_HALF = {("robust_dpo", "label_smoothing")}
# XLA sees a whole loss at once, and has reordered what looks like compensated arithmetic.
COMPILED = {"dppo_kl", "kl_k3_corrected", "exo_pair", "orpo"}
NAMES = sorted({*some(cases.ALL, 3), *COMPILED})
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@st.composite
def settings_of(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """No settings, or one at an edge of its range."""
    taken = inspect.signature(cases.ALL[name].loss).parameters
    edges = [(key, value) for key in EDGES if key in taken for value in EDGES[key]]
    edges = [
        (key, value)
        for key, value in edges
        if not (value == 0 and (name, key) in NOT_AT_0)
        and not (value == 0.5 and (name, key) in NOT_AT_HALF)
    ]
    chosen = draw(st.sampled_from([None, *edges]))
    return {} if chosen is None else dict([chosen])


def inputs_of(
    case: cases.Case, shape: tuple[int, ...], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for name in case.inputs:
        usual = LOGPROBS if name.endswith("logprobs") else SCORES
        made[name] = rng.choice(np.array(NUMBERS.get(name, usual)), shape)
        if SAME.get(name) in made:
            made[name] = np.where(rng.random(shape) < 0.5, made[SAME[name]], made[name])
    return made


def value_and_slopes(case: cases.Case, inputs: list[Any], where: Any, named: Any) -> list[Any]:
    """The loss, and its gradient by each differentiable input."""

    def loss(*differentiable: Any) -> Any:
        return case.loss(*differentiable, *inputs[case.differentiable :], where=where, **named)

    value, pull = jax.vjp(loss, *inputs[: case.differentiable])
    return [value, *pull(jnp.ones_like(value))]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=examples(1))
def test_a_loss_is_right_where_formulas_break(name, data):
    case = cases.ALL[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    dtype = data.draw(st.sampled_from(sorted(UNIT, reverse=True)), "dtype")
    named = data.draw(settings_of(name), "settings")
    shape = (60, 8) if name in cases.OVER_THE_LAST_AXIS else (400,)
    inputs = inputs_of(case, shape, rng)
    where = None
    if data.draw(st.booleans(), "masked"):
        where = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.1, 0.6]), "kept")
        where[:2], where[1:2] = False, np.arange(where[1:2].size) == 0  # none, and one
        nothing = data.draw(st.sampled_from([np.nan, -np.inf, np.inf, 6e4]), "behind the mask")
        inputs = {key: np.where(where, array, nothing) for key, array in inputs.items()}
    rounded = [jnp.asarray(array, dtype) for array in inputs.values()]
    exact = [np.asarray(array, np.float64) for array in rounded]
    largest = np.max([np.where(np.isfinite(a), np.abs(a), 0) for a in exact], axis=0)
    scale = np.minimum(largest, 100)  # of logprobs and scores; advantages may be larger

    with jax.enable_x64(True):
        near = [np.stack([array] * 5) for array in exact]
        for i, step in enumerate((1, -1, 1, -1), start=1):
            near[0][i] += step * (3e-7 * scale if i < 3 else 3e-8)
        repeated = None if where is None else np.stack([where] * 5)
        around = interpret(lambda *xs: value_and_slopes(case, [*xs], repeated, named), *near)
    ways = [interpret(lambda *xs: value_and_slopes(case, [*xs], where, named), *rounded)]
    if name in COMPILED or (THOROUGH and data.draw(st.integers(0, 4), "compiled") == 0):
        ways.append(jax.jit(lambda *xs: value_and_slopes(case, [*xs], where, named))(*rounded))
    for found in ways:
        for which, (one, all_near) in enumerate(zip(found, around, strict=True)):
            got = np.asarray(one, np.float64)
            low, high = np.min(all_near, axis=0), np.max(all_near, axis=0)
            size = np.maximum(np.abs(low), np.abs(high))
            # Of an exponential, the rounding of its argument, up to 160, comes on top.
            room = (1e-5 + 2 * UNIT[dtype]) * size
            if got.shape == shape[:-1]:
                # The value is a sum, whose terms may cancel; each is about its slope.
                terms = np.max(np.abs(around[1]), axis=0).sum(axis=-1)
                room = np.maximum(room, 2 * UNIT["float32"] * terms)
            room = np.maximum(room, 2e-6 if dtype == "float32" else 1e-4)
            too_large = size > float(jnp.finfo(dtype).max) / 2
            right = (got >= low - room) & (got <= high + room)
            assert (right | too_large).all(), (which, _worst(got, low, high, ~(right | too_large)))


def _worst(got: np.ndarray, low: np.ndarray, high: np.ndarray, wrong: np.ndarray) -> Any:
    """The first that is wrong: where, what, and between what it should lie."""
    at = tuple(np.argwhere(wrong)[0])
    return at, got[at], low[at], high[at]
