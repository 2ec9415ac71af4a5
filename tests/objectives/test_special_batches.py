"""Every objective and its metrics on batches where formulas break, against float64.

Logprobs are 0, or equal to those of the other policy, or far from them; datums have one token, no
token that counts, or weights other than 0 and 1, and all datums of a prompt may be masked.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import objectives

from ..by_numpy import interpret
from ..examples import examples, some

LOGPROBS = np.array([0.0, -0.0, -1e-8, -1.2e-7, -1e-4, -0.5, -0.7, -1.0, -5.0, -80.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plackett_luce": {"group_size": 3},
    "worst_group": {"num_groups": 3},
    "conditional_value_at_risk": {"share": 1.0},
}
NAMES = [n for n in objectives.__all__ if "loss" in getattr(getattr(objectives, n), "__dict__", ())]
PROMPTS: dict[str, Any] = {"aggregation": "prompt_mean", "group_size": 3}
OBJECTIVES: dict[str, Any] = {
    **{name: getattr(objectives, name)(**OPTIONS.get(name, {})) for name in NAMES},
    "smoothed dpo": objectives.dpo(label_smoothing=0.5),
    "dpo at beta 0": objectives.dpo(beta=0.0),
    "ppo by prompts": objectives.ppo(**PROMPTS),
    "gmpo by prompts": objectives.gmpo(**PROMPTS),
    "ppo by length": objectives.ppo(aggregation="fixed_length", max_length=7.0),
    "jsd by datums": objectives.generalised_jsd(aggregation="sequence_mean"),
    "kl_k2 by tokens": objectives.kl_k2(aggregation="token_mean"),
    "a sum": objectives.dpo() + 0.1 * objectives.kl_k3(),
}
OVER_CANDIDATES = {"brier_score", "jsd by datums"} | {
    n for n in NAMES if "distil" in n or "jsd" in n
}


@st.composite
def batches(draw: st.DrawFn, candidates: int | None) -> tuple[dict[str, list[np.ndarray]], list]:
    """Twelve datums: columns by name, and logprobs, in float64 that float32 can hold."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = draw(st.sampled_from([0.0, 0.7, 1.0]))
    nothing = draw(st.sampled_from([-np.inf, np.nan, -1e30]))
    longest = draw(st.sampled_from([1, 5]))
    masked_prompt = draw(st.integers(0, 3))
    data: dict[str, list[np.ndarray]] = {}
    rows = []
    for i in range(12):
        shape: tuple[int, ...] = (int(rng.integers(1, longest + 1)),)
        shape = shape if candidates is None else (*shape, candidates)
        counts = (rng.random(shape) < kept) & (i // 3 != masked_prompt)
        row, q, ref = (rng.choice(LOGPROBS, shape) for _ in range(3))
        q, ref = (np.where(rng.random(shape) < 0.5, row, other) for other in (q, ref))
        columns = {
            "logprobs": np.where(counts, q, nothing),
            "ref_logprobs": np.where(counts, ref, nothing),
            "teacher_logprobs": np.where(counts, ref, nothing),
            "advantages": np.where(counts, rng.choice([0.0, -0.0, 1.0, -1.0, 2.5], shape), nothing),
            "outcomes": (rng.random(shape) < 0.5) * 1.0,
            "noise": rng.random(shape),
            "weights": counts * rng.choice([1.0, 0.5, 2.0], shape),
            "desirable": np.full(shape, i % 2 * 1.0),
            "groups": np.full(shape, i % 3 * 1.0),
        }
        for name, column in columns.items():
            data.setdefault(name, []).append(column.astype(np.float32))
        rows.append(np.where(counts, row, nothing).astype(np.float32))
    return data, rows


def everything(objective: Any, data: Any, rows: list, dtype: Any) -> dict[str, np.ndarray]:
    """Loss, metrics and gradient by name, computed in a dtype."""

    def compute(rows: list) -> Any:
        columns = {key: [c.astype(dtype) for c in column] for key, column in data.items()}
        of_rows = jax.value_and_grad(lambda rows: objective(columns, rows), has_aux=True)
        (loss, metrics), slopes = of_rows(rows)
        flat = jnp.concatenate([slope.reshape(-1) for slope in slopes])
        return {"loss": loss, "gradient": flat, **metrics}

    found = interpret(compute, [row.astype(dtype) for row in rows])
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


@pytest.mark.parametrize("name", some(OBJECTIVES, 12))
@given(data=st.data())
@settings(max_examples=examples(1))
def test_an_objective_is_right_where_formulas_break(name, data):
    objective = OBJECTIVES[name]
    candidates = data.draw(st.sampled_from([1, 3])) if name in OVER_CANDIDATES else None
    columns, rows = data.draw(batches(candidates))
    found = everything(objective, columns, rows, np.float32)
    with jax.enable_x64(True):
        exact = [
            everything(objective, columns, [row + shift for row in rows], np.float64)
            for shift in (np.float64(0), 1e-7, -1e-7)
        ]
    assert set(found) == set(exact[0])
    for what, value in found.items():
        if "accuracy" in what:  # a pair that is even falls on either side
            continue
        low, high = (end([one[what] for one in exact], axis=0) for end in (np.min, np.max))
        room = 1e-4 * np.maximum(np.abs(low), np.abs(high)) + 1e-5
        too_large = np.maximum(np.abs(low), np.abs(high)) > 1e30
        right = (value >= low - room) & (value <= high + room) | too_large
        assert right.all(), (what, value[~right], low[~right], high[~right])
