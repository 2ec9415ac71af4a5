"""Policy objectives that look at all tokens of a batch together: clip_cov and kl_cov."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import mintjax
from mintjax import losses, objectives, testing

LENGTHS = (3, 140, 1, 60)  # more and less than a tile of the layout
RNG = np.random.default_rng(3)
ROWS = [-RNG.gamma(1.0, 1.0, n).astype(np.float32) for n in LENGTHS]


def column(make: Any) -> list[np.ndarray]:
    """One array for each row."""
    return [np.asarray(make(row), np.float32) for row in ROWS]


COLUMNS = {
    "logprobs": column(lambda row: row + RNG.normal(0, 0.4, row.shape)),
    "advantages": column(lambda row: RNG.normal(size=row.shape)),
    "noise": column(lambda row: RNG.random(row.shape)),
    "weights": column(lambda row: RNG.random(row.shape) < 0.7),
}
DATA = [
    mintjax.Datum(
        mintjax.ModelInput.from_ints(range(len(row))),
        {"target_tokens": np.zeros(len(row), np.int32)}
        | {name: rows[i] for name, rows in COLUMNS.items()},
    )
    for i, row in enumerate(ROWS)
]
LP, Q, A, NOISE, W = (np.concatenate(rows) for rows in (ROWS, *(COLUMNS[name] for name in COLUMNS)))
CASES = {
    "clip_cov": (
        objectives.clip_cov(covariance_low=0.0, share=0.05),
        lambda lp: losses.clip_cov(
            lp, Q, A, NOISE, covariance_low=0.0, share=0.05, where=W != 0
        ).sum(),
    ),
    "kl_cov": (
        objectives.kl_cov(share=0.05),
        lambda lp: losses.kl_cov(lp, Q, A, share=0.05, where=W != 0).sum(),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_all_rows_are_one_batch_of_tokens(name):
    objective, whole = CASES[name]
    result = mintjax.value_and_logprob_grads(objective, DATA, ROWS)
    value, grad = jax.jit(jax.value_and_grad(whole))(LP)
    assert result.loss == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(np.concatenate(result.grads), grad, rtol=1e-5, atol=1e-6)
    plain = mintjax.value_and_logprob_grads(objectives.ppo(), DATA, ROWS)
    assert result.loss != pytest.approx(plain.loss, rel=1e-3)
    testing.check_permutation(objective, DATA, ROWS)
    if name == "kl_cov":  # the same frame; each law costs a program
        testing.check_padding_invariance(objective, DATA, ROWS)
        testing.check_masked_equals_removed(objective, DATA, ROWS)


def test_clip_fraction_counts_the_tokens_without_a_gradient():
    for name, (objective, _) in CASES.items():
        result = mintjax.value_and_logprob_grads(objective, DATA, ROWS)
        idle = (np.concatenate(result.grads) == 0) & (W != 0)
        assert result.metrics["clip_fraction"] == pytest.approx(idle.sum() / (W != 0).sum()), name
        assert idle.any() == (name == "clip_cov")


def test_a_batch_without_weights_is_looked_at_whole():
    data = [
        mintjax.Datum(d.model_input, {n: c for n, c in d.loss_fn_inputs.items() if n != "weights"})
        for d in DATA
    ]
    loss, _ = objectives.kl_cov(share=0.05)(data, ROWS)
    assert float(loss) == pytest.approx(float(losses.kl_cov(LP, Q, A, share=0.05).sum()), rel=1e-5)
