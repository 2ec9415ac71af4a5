import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mintjax
from mintjax import Batch, Datum, ModelInput, Ragged, TensorData
from mintjax.errors import DataError
from mintjax.ragged import RowAccessError


def datum(n, **columns):
    inputs = {"target_tokens": np.arange(n), "weights": np.ones(n, np.float32), **columns}
    return Datum(ModelInput.from_ints(range(n)), inputs)


def test_columns_and_rows():
    data = [datum(3, reward=1.0), datum(5, reward=2.0), datum(2, reward=3.0)]
    batch = Batch(data)
    assert isinstance(batch["weights"], Ragged)
    np.testing.assert_array_equal(batch["weights"].sum(), [3, 5, 2])
    np.testing.assert_array_equal(batch["reward"], [1, 2, 3])
    assert batch[1] is data[1]
    assert list(batch[::2]) == [data[0], data[2]]
    np.testing.assert_array_equal(batch[::2]["reward"], [1, 3])
    assert "weights" in batch
    assert "advantages" not in batch
    assert data[0] in batch
    assert repr(batch) == "Batch(3 datums, columns ['reward', 'target_tokens', 'weights'])"


def test_a_column_is_read_anew_from_arrays_that_the_caller_overwrites():
    weights = np.ones(3, np.float32)
    batch = Batch([Datum(ModelInput.from_ints([1, 2, 3]), {"weights": weights})])
    assert batch["weights"].sum().item() == 3
    weights[:] = 2
    assert batch["weights"].sum().item() == 6


def test_a_batch_keeps_its_datums_when_the_list_changes():
    data = [datum(3), datum(2)]
    batch = Batch(data)
    data[1] = datum(5)
    np.testing.assert_array_equal(batch["weights"].sum(), [3, 2])
    assert batch.lengths == [3, 2]


def test_a_generator_of_datums_is_a_batch():
    assert len(Batch(datum(n) for n in (3, 2))) == 2


@pytest.mark.parametrize("data", [datum(3), None, 5])
def test_what_is_no_list_of_datums_is_told(data):
    with pytest.raises(DataError, match="pass a list of datums, not "):
        Batch(data)


@pytest.mark.parametrize(
    "column", [[1.0, 2.0, 3.0], np.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 3.0])]
)
def test_a_column_that_was_assigned_is_made_a_tensor(column):
    one = datum(3)
    one.loss_fn_inputs["weights"] = column
    (row,) = Batch([one]).rows("weights")
    assert (type(row), row.dtype, row.tolist()) == (TensorData, np.float32, [1, 2, 3])
    one.loss_fn_inputs["weights"] = ["a"]
    with pytest.raises(DataError, match="datum 0, field 'weights'"):
        Batch([one])


def test_a_batch_of_columns_has_no_datums_to_give():
    whole = Batch([datum(3, reward=1.0), datum(5, reward=2.0)])
    columns = Batch.of_columns(whole.names, 2, lambda name: whole[name])
    np.testing.assert_array_equal(columns["weights"].sum(), [3, 5])
    assert len(columns[:1]) == 1
    for ask in (lambda: columns[0], lambda: columns.rows("weights"), lambda: columns.lengths):
        with pytest.raises(RowAccessError):
            ask()


def test_a_column_is_one_number_in_all_datums_or_in_none():
    with pytest.raises(DataError, match=r"shape \[3\], where datum 0 has a single number"):
        Batch([datum(2, reward=1.0), datum(3, reward=np.ones(3))])["reward"]


def test_a_snapshot_keeps_what_the_caller_overwrites():
    weights, targets = np.ones(3, np.float32), np.arange(3)
    mine = Datum(ModelInput.from_ints([1, 2, 3]), {"target_tokens": targets, "weights": weights})
    batch = Batch([mine])
    kept = batch.snapshot()
    weights[:] = 7
    targets[:] = 7
    mine.model_input.chunks[0].tokens[0] = 7
    mine.loss_fn_inputs["weights"] = kept[0].loss_fn_inputs["weights"] * 5
    assert kept[0].model_input.to_ints() == [1, 2, 3]
    assert kept[0].loss_fn_inputs["target_tokens"].tolist() == [0, 1, 2]
    assert kept["weights"].sum().tolist() == [3.0]
    with pytest.raises(ValueError, match="read-only"):
        kept[0].loss_fn_inputs["weights"][0] = 1
    assert kept.snapshot() is kept


def test_a_column_of_mixed_kinds_is_float_in_all_datums():
    def summed(data, logprobs):
        return (logprobs * 0 + data["reward"]).total(), {}

    data = [datum(2, reward=1), datum(3, reward=0.5)]
    assert Batch(data)["reward"].tolist() == [1, 0.5]
    rows = [np.zeros(2, np.float32), np.zeros(3, np.float32)]
    assert mintjax.value_and_logprob_grads(summed, data, rows).loss == 3.5
    tokens = [datum(2, x=[1, 2]), datum(2, x=[0.5, 0.25])]
    assert Batch(tokens)["x"].sum().tolist() == [3, 0.75]


def test_ids_beyond_32_bits_are_refused_or_exact():
    data = [datum(1, group=7), datum(1, group=7 + 2**32)]
    with pytest.raises(DataError, match="datum 1, field 'group': it holds an integer beyond 32"):
        Batch(data)["group"]
    with jax.enable_x64(True):
        assert Batch(data)["group"].tolist() == [7, 7 + 2**32]


def test_logprobs_that_are_none_are_refused_and_dtypes_may_mix():
    def total(data, logprobs):
        return logprobs.total(), {}

    data = [datum(2), datum(1)]
    with pytest.raises(DataError, match="is one of them None"):
        mintjax.value_and_logprob_grads(total, data, [[None, -1.0], [-2.0]])
    rows = [np.array([-1, -0.5], np.float16), np.array([-2.25], ">f4")]
    assert mintjax.value_and_logprob_grads(total, data, rows).loss == -3.75


def test_batch_and_ragged_come_from_one_package():
    assert mintjax.ragged.Batch is mintjax.Batch
    assert mintjax.ragged.Ragged is mintjax.Ragged


def test_integers_that_a_float_column_would_round_are_refused():
    def column(first):
        rows = [np.array([first]), np.array([0.5], np.float32)]
        return Batch([Datum(ModelInput.from_ints([1]), {"ids": row}) for row in rows])["ids"]

    np.testing.assert_array_equal(column(2**24).sum(), [2**24, 0.5])
    with pytest.raises(DataError, match=r"datum 0, field 'ids': .*float32 would round"):
        column(2**24 + 1)
