import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Batch, Ragged, objectives
from mintjax.bench import Synthetic
from mintjax.errors import ConfigError, DataError

from ..by_numpy import evaluate


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(0, 30), st.integers(1, 9), st.none() | st.integers(1, 4))
def test_batches_have_the_lengths_and_shapes_asked_for(low, more, datums, candidates):
    source = Synthetic(["weights", "reward:datum"], (low, low + more), candidates=candidates)
    data, logprobs = source.batch(datums)
    assert len(data) == len(logprobs) == datums
    for datum, row in zip(data, logprobs, strict=True):
        assert low <= datum.model_input.length <= low + more
        shape = (datum.model_input.length, *([] if candidates is None else [candidates]))
        assert row.shape == shape == datum.loss_fn_inputs["target_tokens"].shape
        assert (row <= 0).all()
        assert datum.loss_fn_inputs["weights"].shape == shape
        assert datum.loss_fn_inputs["reward"].shape == ()


def test_columns_hold_what_their_names_say():
    source = Synthetic(["weights", "ref_logprobs", "desirable:datum", "advantages"], (200, 200))
    data, logprobs = source.batch(40)
    weights = np.stack([datum.loss_fn_inputs["weights"] for datum in data])
    assert set(np.unique(weights)) == {0, 1}
    assert (np.diff(weights, axis=1) >= 0).all(), "a prompt of zeros, then an answer of ones"
    reference = np.concatenate([datum.loss_fn_inputs["ref_logprobs"] for datum in data])
    assert (reference <= 0).all()
    assert 0 < np.abs(reference - np.concatenate(logprobs)).mean() < 0.3
    assert {float(datum.loss_fn_inputs["desirable"]) for datum in data} == {0.0, 1.0}
    advantages = np.concatenate([datum.loss_fn_inputs["advantages"] for datum in data])
    assert abs(advantages.mean()) < 0.1 < abs(advantages.std())


def test_a_seed_gives_the_same_again_and_each_batch_is_another():
    first, second = (Synthetic(["weights"], (3, 30), seed=4) for _ in range(2))
    one, other = first.batch(3), second.batch(3)
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        np.testing.assert_array_equal(a, b)
    lengths = [tuple(map(len, first.batch(3).logprobs)) for _ in range(5)]
    assert len(set(lengths)) > 1


@pytest.mark.parametrize(
    ("objective", "columns"),
    [
        (objectives.cross_entropy(), {"weights"}),
        (objectives.ppo(), {"logprobs", "advantages"}),
        (objectives.dpo(), {"weights", "ref_logprobs"}),
        (objectives.kto(), {"weights", "ref_logprobs", "desirable:datum"}),
        (
            objectives.weighted_sum({"ppo": objectives.ppo(), "kl": objectives.kl_k3()}),
            {"logprobs", "advantages", "ref_logprobs"},
        ),
    ],
)
def test_the_columns_that_an_objective_reads_are_found(objective, columns):
    source = Synthetic()
    source.complete(objective, 4)
    assert set(source.columns) == columns
    data, logprobs = source.batch(4)
    loss = evaluate(lambda: objective(Batch(data), Ragged.from_rows(logprobs))[0])
    assert np.isfinite(loss)


def test_the_columns_of_a_loop_over_rows_are_found():
    def loop(data, logprobs):
        rows = zip(data, logprobs, strict=True)
        return sum(jnp.dot(row, datum.loss_fn_inputs["mine"]) for datum, row in rows), {}

    source = Synthetic(["weights"])
    source.complete(loop, 2)
    assert source.columns == ("weights", "mine")


def test_what_is_no_missing_column_reaches_the_caller():
    def wrong(data, logprobs):
        return {}["here"], {}

    source = Synthetic()
    with pytest.raises(KeyError, match="here"):
        source.complete(wrong, 2)
    with pytest.raises(DataError, match="the last one has no partner"):
        source.complete(objectives.bradley_terry(), 3)
    with pytest.raises(DataError, match=r"needs \[T, K\] logprobs"):
        source.complete(objectives.brier_score(), 2)


@pytest.mark.parametrize(
    ("columns", "lengths", "message"),
    [((), (0, 3), "lengths 0:3"), ((), (5, 3), "lengths 5:3"), (("a:token",), (1, 2), "a:token")],
)
def test_what_cannot_be_made_is_refused(columns, lengths, message):
    with pytest.raises(ConfigError, match=message):
        Synthetic(columns, lengths)
