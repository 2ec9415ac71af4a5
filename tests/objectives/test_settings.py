"""Settings, labels and aggregations of objectives."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import Phase, find, settings

import mintjax
from mintjax import losses, objectives, testing
from mintjax.errors import DataError, NonFiniteError

from ..by_numpy import evaluate
from .specimens import SPECIMENS

# What is found is not shrunk, because nobody reads it.
FIRST = settings(max_examples=500, database=None, derandomize=True, phases=[Phase.generate])
EXAMPLE = find(
    testing.batches(max_blocks=6, max_length=20, log_ratios=("small",)),
    lambda e: len(e.data) == 6 and min(map(len, e.logprobs)) > 2,
    settings=FIRST,
)


def column(name: str) -> list[np.ndarray]:
    """One column of the example."""
    return [datum.loss_fn_inputs[name].to_numpy() for datum in EXAMPLE.data]


def with_columns(**columns: Any) -> list[mintjax.Datum]:
    """The example's datums with other columns."""
    return [
        mintjax.Datum(d.model_input, d.loss_fn_inputs | {n: c[i] for n, c in columns.items()})
        for i, d in enumerate(EXAMPLE.data)
    ]


def test_settings_that_make_no_sense_are_refused_when_they_are_given():
    with pytest.raises(ValueError, match="beta of ipo must be above 0, not 0"):
        objectives.ipo(beta=0)
    with pytest.raises(ValueError, match=r"0\.8 means 0\.8"):
        objectives.ppo(clip_high_threshold=0.28)
    with pytest.raises(ValueError, match=r"0\.8 means 0\.8"):
        objectives.gspo(clip_low_threshold=1.1)
    with pytest.raises(TypeError, match=r"beta of dpo must be a number.*weighted_sum"):
        objectives.dpo(beta=lambda step: 0.1)
    with pytest.raises(TypeError, match="epsilon"):
        objectives.ppo(epsilon=0.2)


def test_settings_may_be_traced():
    @jax.jit
    def loss(high: Any) -> Any:
        return objectives.ppo(clip_high_threshold=high)(*EXAMPLE)[0]

    expected = mintjax.value_and_logprob_grads(objectives.ppo(), *EXAMPLE).loss
    np.testing.assert_allclose(loss(1.2), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_16_bit_logprobs_are_taken_in_32(dtype):
    row = jax.numpy.full(3000, -30, dtype)
    inputs = {"target_tokens": np.zeros(3000), "weights": np.ones(3000, np.float32)}
    datum = mintjax.Datum(mintjax.ModelInput.from_ints(range(3000)), inputs)
    loss, metrics = jax.jit(lambda row: objectives.cross_entropy()([datum], [row]))(row)
    assert loss == 90000
    assert metrics["mean_nll"] == 30


def test_a_penalty_that_does_nothing_is_no_objective():
    assert not hasattr(objectives, "kl_k1")
    assert losses.kl_k1(-1.0, -2.0) == 1  # the estimate stays, to watch and to put into rewards


LABELLED = {
    "bools": [True, False, True, True, False, False],
    "ones and zeros": [1, 0, 1, 1, 0, 0],
    "signs": [1.0, -1.0, 1.0, 1.0, -1.0, -1.0],
}


def test_labels_of_every_kind_mean_the_same():
    results = [
        mintjax.value_and_logprob_grads(
            objectives.kto(), with_columns(desirable=np.array(labels)), EXAMPLE.logprobs
        )
        for labels in LABELLED.values()
    ]
    for other in results[1:]:
        assert other.loss == results[0].loss
        assert other.metrics == results[0].metrics
        np.testing.assert_array_equal(np.concatenate(other.grads), np.concatenate(results[0].grads))
    assert results[0].metrics["desirable"] == 3


def test_what_is_no_label_is_refused():
    data = with_columns(desirable=np.array([1, 0, 0.3, 1, 0, 1]))
    with pytest.raises((NonFiniteError, ValueError)):
        mintjax.value_and_logprob_grads(objectives.kto(), data, EXAMPLE.logprobs)


CLIPPING = [
    objectives.ppo(clip_low_threshold=0.9, clip_high_threshold=1.1),
    objectives.dual_clip_ppo(
        clip_low_threshold=0.9, clip_high_threshold=1.1, dual_clip_threshold=1.2
    ),
    objectives.dppo(divergence_threshold=0.02),
    objectives.gspo(clip_low_threshold=0.95, clip_high_threshold=1.05),
]


@pytest.mark.parametrize("objective", CLIPPING, ids=str)
def test_clip_fraction_counts_the_tokens_without_a_gradient(objective):
    result = mintjax.value_and_logprob_grads(objective, *EXAMPLE)
    counts = np.concatenate(column("weights")) != 0
    moved = np.concatenate(result.grads)[counts]
    advantages = np.concatenate(column("advantages"))[counts]
    still = (moved == 0) & (advantages != 0)
    assert still.any()
    assert result.metrics["clip_fraction"] == pytest.approx(still.mean())
    assert result.metrics["tokens"] == counts.sum()


def test_clip_fraction_of_cispo_counts_weights_at_a_bound():
    objective = objectives.cispo(clip_low_threshold=0.9, clip_high_threshold=1.1)
    result = mintjax.value_and_logprob_grads(objective, *EXAMPLE)
    counts = np.concatenate(column("weights")) != 0
    log_ratio = np.concatenate(EXAMPLE.logprobs) - np.concatenate(column("logprobs"))
    ratio = np.exp(log_ratio[counts])
    outside = (ratio < 0.9) | (ratio > 1.1)
    assert 0 < outside.mean() < 1
    assert result.metrics["clip_fraction"] == pytest.approx(outside.mean())


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo", "dro"])
def test_one_advantage_for_a_datum_is_that_of_each_of_its_tokens(name):
    objective = getattr(objectives, name)()
    one = with_columns(advantages=np.linspace(-1, 2, 6, dtype=np.float32))
    each = with_columns(
        advantages=[
            np.full(len(row), a, np.float32)
            for row, a in zip(EXAMPLE.logprobs, np.linspace(-1, 2, 6), strict=True)
        ]
    )
    short, long = (
        mintjax.value_and_logprob_grads(objective, data, EXAMPLE.logprobs) for data in (one, each)
    )
    assert short.loss == pytest.approx(long.loss)
    assert short.metrics == pytest.approx(long.metrics)


def sums_and_counts() -> tuple[np.ndarray, np.ndarray]:
    """Of the losses of each datum's tokens under ppo."""
    columns = map(column, ("logprobs", "advantages", "weights"))
    rows = [
        (evaluate(lambda *row: losses.ppo(*row[:3], where=row[3]), lp, q, a, w != 0), w != 0)
        for lp, q, a, w in zip(EXAMPLE.logprobs, *columns, strict=True)
    ]
    sums, counts = zip(*((row.sum(), counted.sum()) for row, counted in rows), strict=True)
    return np.array(sums), np.array(counts)


def test_aggregations_weigh_tokens_datums_and_prompts():
    sums, counts = sums_and_counts()
    present = (counts > 0).sum()
    prompts = [(sums[i : i + 3].sum(), counts[i : i + 3].sum()) for i in (0, 3)]
    expected = {
        "sequence_sum": sums.sum() / present,
        "fixed_length": sums.sum() / (6 * 50),
        "prompt_mean": np.mean([s / n for s, n in prompts if n]),
    }
    options: dict[str, Any] = {"fixed_length": {"max_length": 50}, "prompt_mean": {"group_size": 3}}
    for how, value in expected.items():
        objective = objectives.ppo(aggregation=how, **options.get(how, {}))
        result = mintjax.value_and_logprob_grads(objective, *EXAMPLE)
        assert result.loss == pytest.approx(value, rel=1e-5)
        assert objective.builtin is None


def test_the_gradients_of_a_step_in_several_requests_are_those_of_one():
    _, counts = sums_and_counts()
    data, logprobs = EXAMPLE
    whole_step = objectives.ppo(aggregation="token_mean")
    parts = whole_step.over_step(data)
    assert parts.step_count == counts.sum()
    expected = mintjax.value_and_logprob_grads(whole_step, data, logprobs)
    pieces = [
        mintjax.value_and_logprob_grads(parts, data[i:j], logprobs[i:j])
        for i, j in ((0, 2), (2, 3), (3, 6))
    ]
    assert sum(piece.loss for piece in pieces) == pytest.approx(expected.loss, rel=1e-5)
    grads = [grad for piece in pieces for grad in piece.grads]
    np.testing.assert_allclose(np.concatenate(grads), np.concatenate(expected.grads), rtol=1e-5)


def test_aggregations_that_lack_something_are_refused():
    with pytest.raises(ValueError, match="needs max_length"):
        objectives.ppo(aggregation="fixed_length")(*EXAMPLE)
    with pytest.raises(ValueError, match="needs group_size"):
        objectives.ppo(aggregation="prompt_mean")(*EXAMPLE)
    with pytest.raises(DataError, match="6 datums do not divide into groups of 4"):
        objectives.ppo(aggregation="prompt_mean", group_size=4)(*EXAMPLE)


def my_loss(
    target_logprobs: Any, sampling_logprobs: Any, advantages: Any, *, tau: Any = 2.0, where: Any
) -> Any:
    """A loss of one's own: ``-tanh(r / tau) * A``.

    Args:
        tau: where it levels off.
    """
    log_ratio = jax.numpy.where(where, target_logprobs - sampling_logprobs, 0)
    return jax.numpy.where(where, -jax.numpy.tanh(jax.numpy.exp(log_ratio) / tau) * advantages, 0)


mine = objectives.policy(my_loss, "mine")


def test_a_loss_of_ones_own_is_an_objective_in_one_line():
    assert mine(tau=3.0) == mine(tau=3.0) != mine()
    assert repr(mine(tau=3.0)) == "mine(tau=3.0, aggregation='sum')"
    assert "where it levels off" in (mine.__doc__ or "")
    assert pickle.loads(pickle.dumps(mine(tau=3.0))) == mine(tau=3.0)
    kept = [w != 0 for w in column("weights")]
    lp, q, a = (
        np.concatenate([row[k] for row, k in zip(rows, kept, strict=True)])
        for rows in (EXAMPLE.logprobs, column("logprobs"), column("advantages"))
    )
    result = mintjax.value_and_logprob_grads(mine(tau=3.0), *EXAMPLE)
    assert result.loss == pytest.approx(-(np.tanh(np.exp(lp - q) / 3) * a).sum(), rel=1e-4)
    assert result.metrics["clip_fraction"] == 0


@functools.cache
def smallest(block: int, batches: tuple[tuple[str, Any], ...]) -> testing.Example:
    """The smallest batch of a kind."""
    kinds = testing.batches(block=block, max_blocks=1, max_length=9, **dict(batches))
    return find(kinds, lambda e: True, settings=FIRST)


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_objective_may_be_traced_under_strict_promotion(name):
    specimen = SPECIMENS[name]
    data, logprobs = smallest(max(2, specimen.block), tuple(specimen.batches.items()))
    rows = [np.asarray(row, np.float32) for row in logprobs]
    with jax.numpy_dtype_promotion("strict"):
        loss = jax.eval_shape(lambda rows: specimen.objective(data, rows)[0], rows)
    assert loss.shape == ()
    assert loss.dtype == np.float32


@pytest.mark.parametrize("value", ["0.1", None, 1j])
def test_a_setting_is_a_real_number(value):
    for make in (
        lambda: objectives.dpo(beta=value),
        lambda: objectives.ppo(clip_low_threshold=value),
    ):
        with pytest.raises(TypeError, match="must be a number, not"):
            make()
