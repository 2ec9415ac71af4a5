"""Padded arrays as rows, and back: the padding is never seen, and the rows are the same."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Batch, Datum, ModelInput, Ragged
from mintjax.errors import DataError

from ..examples import examples

B, T = 3, 5
FEW = settings(max_examples=examples(6))
BAD = np.float32([np.nan, np.inf, -np.inf])


@st.composite
def padded(draw, width=T, trailing=(), dtype=np.float32):
    """Values with poison at padding, and a mask."""
    kind = draw(st.sampled_from(["prefix", "left", "holes"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = rng.integers(0, width + 1, B)
    mask = np.arange(width) < lengths[:, None]
    if kind == "left":
        mask = mask[:, ::-1].copy()
    elif kind == "holes":
        mask = rng.random((B, width)) < 0.6
    values = rng.normal(size=(B, width, *trailing)).astype(dtype)
    if np.issubdtype(dtype, np.floating):
        values[~mask] = rng.choice(BAD, (int((~mask).sum()), *trailing))
    else:
        values = rng.integers(-99, 99, values.shape).astype(dtype)
    return values, mask


def rows_of(values, mask):
    """The same rows, cut by NumPy."""
    return [row[keep] for row, keep in zip(values, mask, strict=True)]


def is_prefix(mask):
    return (mask == (np.arange(mask.shape[1]) < mask.sum(1)[:, None])).all()


@given(padded(), st.booleans())
@FEW
def test_rows_are_what_the_mask_marks(example, on_device):
    values, mask = example
    given_values = jnp.asarray(values) if on_device else values
    ragged = Ragged.from_padded(given_values, mask)
    for got, want in zip(ragged.to_rows(), rows_of(values, mask), strict=True):
        np.testing.assert_array_equal(got, want)
    if is_prefix(mask):
        again = Ragged.from_padded(given_values, lengths=mask.sum(1))
        np.testing.assert_array_equal(again.to_packed()[0], ragged.to_packed()[0])
        np.testing.assert_array_equal(again.to_padded(), np.where(mask, values, 0))
    np.testing.assert_array_equal(ragged.to_padded(mask), np.where(mask, values, 0))


@jax.jit
def all_reductions(ragged, other):
    """Everything that could see padding, of a Ragged and of it beside another of its lengths."""
    both = ragged * 2 - other
    return {
        "sum": both.sum(),
        "mean": both.mean(),
        "var": both.var(),
        "max": both.max(),
        "min": both.min(),
        "logsumexp": both.logsumexp(),
        "dot": ragged.dot(other),
        "total": both.map(jnp.exp).total(),
        "count": both.count(),
        "where": both.sum(other > 0),
        "cumsum": both.cumsum().total(),
        "half": both[::2].mean(),
    }


@jax.jit
def reductions_of_padded(values, other, mask):
    return all_reductions(Ragged.from_padded(values, mask), Ragged.from_padded(other, mask))


@jax.jit
def reductions_of_prefixes(values, other, lengths):
    one, two = Ragged.from_padded(values, lengths=lengths), Ragged.from_padded(other, lengths)
    return all_reductions(one, two)


@pytest.mark.parametrize("width", [5, 130])
@given(data=st.data())
@FEW
def test_traced_masks_and_lengths_give_the_reductions_of_rows(width, data):
    values, mask = data.draw(padded(width))
    other = np.where(mask, np.flip(np.nan_to_num(values, posinf=0, neginf=0)), np.nan)
    want = all_reductions(
        Ragged.from_rows(rows_of(values, mask)), Ragged.from_rows(rows_of(other, mask))
    )
    got = reductions_of_padded(values, other, mask)
    results = [got]
    if is_prefix(mask):
        results.append(reductions_of_prefixes(values, other, mask.sum(1)))
    for result in results:
        for name, expected in want.items():
            np.testing.assert_allclose(result[name], expected, rtol=2e-5, atol=2e-5, err_msg=name)


@jax.jit
@jax.grad
def slope(values, mask):
    ragged = Ragged.from_padded(values, mask)
    return ragged.map(jnp.exp).total() + (ragged.logsumexp() * ragged.mean()).sum()


@given(padded())
@FEW
def test_the_gradient_is_that_of_rows_and_zero_at_padding(example):
    values, mask = example
    mask[:, 2], values[:, 2] = True, 0.5  # logsumexp of no tokens is infinite
    got = np.asarray(slope(values, mask))
    assert (got[~mask] == 0).all()
    for row, found in zip(rows_of(values, mask), rows_of(got, mask), strict=True):
        total = np.exp(row).sum()
        want = np.exp(row) * (1 + row.mean() / total) + np.log(total) / len(row)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32", "int64", "bool", "uint8"])
@pytest.mark.parametrize("trailing", [(), (2,)])
def test_every_dtype_and_trailing_axis_comes_back_under_jit(dtype, trailing):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, (B, T, *trailing)).astype(jnp.dtype(dtype))
    mask = rng.random((B, T)) < 0.5
    lengths = np.int8([0, 5, 2])

    @jax.jit
    def back(values, mask, lengths):
        prefix = Ragged.from_padded(values, lengths).to_padded(fill=1)
        return prefix, Ragged.from_padded(values, mask).sum()

    prefix, sums = back(values, mask, lengths)
    real = (np.arange(T) < lengths[:, None]).reshape(B, T, *(1 for _ in trailing))
    np.testing.assert_array_equal(prefix, np.where(real, values, 1))
    assert prefix.dtype == jax.dtypes.canonicalize_dtype(dtype)
    want = [row.astype(np.float64).sum() for row in rows_of(values, mask)]
    np.testing.assert_array_equal(sums, want)


def test_sums_of_16_bits_are_taken_in_32():
    values = jnp.full((1, 3000), -30, jnp.bfloat16)
    loss, slope = jax.jit(jax.value_and_grad(lambda v: Ragged.from_padded(v, [2999]).total()))(
        values
    )
    assert loss.dtype == jnp.float32
    assert loss == -30 * 2999
    assert slope.dtype == jnp.bfloat16
    assert slope.sum(dtype=jnp.float32) == 2999


def test_rows_of_a_padded_array_may_be_longer_than_a_tile_and_are_cut_nowhere():
    values = np.arange(2 * 300, dtype=np.float32).reshape(2, 300)
    lengths = np.array([300, 129])
    back = jax.jit(lambda v, n: (Ragged.from_padded(v, n) * 2).to_padded(fill=-1))(values, lengths)
    real = np.arange(300) < lengths[:, None]
    np.testing.assert_array_equal(back, np.where(real, 2 * values, -1))


def test_a_length_chooses_the_width_and_a_row_that_does_not_fit_is_seen():
    ragged = Ragged.from_rows([np.float32([1, 2, 3]), np.float32([4])])
    assert ragged.to_padded().tolist() == [[1, 2, 3], [4, 0, 0]]
    assert ragged.to_padded(length=4, fill=9).tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert ragged.to_padded([[1, 1, 1], [0, 0, 1]]).tolist() == [[1, 2, 3], [0, 0, 4]]
    with pytest.raises(ValueError, match="row 0 has 3 tokens, which 2 places do not fit"):
        ragged.to_padded(length=2)
    with pytest.raises(ValueError, match="row 1 has 1 tokens, which another number"):
        ragged.to_padded([[1, 1, 1], [0, 1, 1]])
    cut = jax.jit(lambda r: r.to_padded(length=2))
    np.testing.assert_array_equal(cut(ragged), [[np.nan, np.nan], [4, 0]])
    with pytest.raises(TypeError, match="lengths are traced, so that a row that does not fit"):
        cut(ragged.astype(jnp.int32))
    with pytest.raises(TypeError, match="give the length T"):
        jax.jit(Ragged.to_padded)(ragged)


def test_vmap_over_batches_is_a_loop_over_them():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, B, T)).astype(np.float32)
    lengths = rng.integers(0, T + 1, (4, B))

    def loss(values, lengths):
        ragged = Ragged.from_padded(values, lengths=lengths)
        return (ragged.map(jnp.exp).sum() * ragged.mean()).sum()

    together = jax.jit(jax.vmap(jax.value_and_grad(loss)))(values, lengths)
    one = jax.jit(jax.value_and_grad(loss))
    for i in range(4):
        for got, want in zip(together, one(values[i], lengths[i]), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-6)
    with pytest.raises(ValueError, match="split, stacked or replaced its leaves"):
        _ = jax.vmap(lambda v, n: Ragged.from_padded(v, lengths=n))(values, lengths).lengths


def test_lengths_that_are_impossible_are_refused_or_seen():
    values = np.ones((2, 3), np.float32)
    for lengths in ([4, 1], [-1, 1]):
        with pytest.raises(ValueError, match=r"row 0 is .* of 3 positions"):
            Ragged.from_padded(values, lengths=lengths)
        sums = jax.jit(lambda n: Ragged.from_padded(values, lengths=n).sum())(np.array(lengths))
        np.testing.assert_array_equal(sums, [np.nan, 1])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.ones((2, 3)), {}, "either a mask .* or lengths"),
        (np.ones((2, 3)), {"mask": np.ones((2, 3), bool), "lengths": [1, 1]}, "either a mask"),
        (np.ones((2, 3)), {"mask": np.full((2, 3), 0.5)}, "a fraction of a token"),
        (np.ones((2, 3)), {"mask": np.full((2, 3), 2)}, "holds 0 and 1 only"),
        (np.ones((2, 3)), {"mask": np.ones((3, 2), bool)}, r"\[B, T\] = \[2, 3\].* bool \[3, 2\]"),
        (np.ones((2, 3)), {"lengths": [1.0, 2.0]}, "lengths are integers"),
        (np.ones((2, 3)), {"lengths": [1]}, r"these are int64 \[1\]"),
        (np.ones(3), {"lengths": [1]}, "must be a padded array"),
        (np.ones((2, 0)), {"lengths": [0, 0]}, "must be a padded array"),
        (np.full((1, 1), 2**40), {"lengths": [1]}, "beyond 32 bits"),
    ],
)
def test_what_does_not_fit_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        Ragged.from_padded(values, **options)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec as P, Mesh
from mintjax import Ragged, objectives
mesh = Mesh(np.array(jax.devices()), ("x",))
rng = np.random.default_rng(0)
lp = rng.normal(size=(8, 6)).astype(np.float32) - 3
columns = {"weights": np.ones((8, 6), np.float32), "ref_logprobs": lp * 0.9}
lengths = np.array([6, 1, 3, 4, 2, 2, 5, 6])
def loss(lp, columns, lengths):
    return objectives.dpo()({**columns, "lengths": lengths}, lp)[0]
step = jax.jit(jax.value_and_grad(loss))
want = step(lp, columns, lengths)
put = lambda tree: jax.device_put(tree, NamedSharding(mesh, P("x")))
for got, plain in zip(step(put(lp), put(columns), put(lengths)), want):
    np.testing.assert_allclose(got, plain, rtol=1e-5)
def mean(lp, columns, lengths):
    return jax.lax.pmean(loss(lp, columns, lengths), "x")
sharded = jax.shard_map(mean, mesh=mesh, in_specs=P("x"), out_specs=P())
for got, plain in zip(jax.jit(jax.value_and_grad(sharded))(lp, columns, lengths), want):
    np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-6)
def refused(fn, words):
    try:
        fn()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
rows = Ragged.from_rows(list(lp))
for make in (jax.shard_map, lambda f, **k: jax.jit(jax.shard_map(f, **k))):
    split = make(lambda r: r.sum(), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    refused(lambda: split(rows), "the rows of a mintjax.Ragged cannot be split over devices")
one, other = (Ragged.from_rows([jax.device_put(lp[0], d)]) for d in jax.devices()[:2])
refused(lambda: one + other, "lie on several devices")
refused(lambda: Ragged.from_rows([put(lp[:, 0]), lp[:, 1]]).sum(), "lie on several devices")
print("agreed")
"""


def test_sharded_arrays_give_the_same_and_split_rows_are_refused():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "agreed" in done.stdout


# Transfer guards and strict promotion


@pytest.fixture
def guarded():
    with jax.transfer_guard("disallow"), jax.numpy_dtype_promotion("strict"):
        yield


def test_nothing_of_a_ragged_trips_a_transfer_guard(guarded):
    rows = [np.float32([1, 2, 3]), np.float32([4])]
    ragged = Ragged.from_rows(rows)
    values = np.float32([[1, 2, 3], [4, np.nan, np.nan]])
    padded = Ragged.from_padded(values, lengths=np.array([3, 1]))
    for each in (ragged, padded):
        assert each.to_rows()[0].tolist() == [1, 2, 3]
        assert jax.jit(lambda r: (r - r.mean())[::2].sum())(each).tolist() == [0]
        assert float((each * 2.0 - each.mean()).total()) == 2 * 10 - (3 * 2 + 4)
    results = [ragged.var(), ragged.max(), ragged.logsumexp(), ragged.first(), ragged.dot(ragged)]
    results += [ragged[::2].sum(), ragged.cumsum().total(), ragged.count(ragged > 1.5)]
    assert all(isinstance(result, jax.Array) for result in results)


# Batches of padded arrays


def columns(seed=0, rows=2, width=4):
    rng = np.random.default_rng(seed)
    return {
        "weights": rng.random((rows, width)).astype(np.float32),
        "teacher_logprobs": rng.random((rows, width, 3)).astype(np.float32),
        "advantages": rng.random(rows).astype(np.float32),
    }


def test_a_batch_of_padded_columns_is_a_pytree_and_compiled_once():
    traces = []

    @jax.jit
    def loss(batch, logprobs):
        traces.append(len(batch))
        assert "weights" in batch
        assert batch.names == {"weights", "teacher_logprobs", "advantages"}
        product = logprobs * batch["weights"] * batch["advantages"]
        return product.total() + batch["teacher_logprobs"].total() + batch[::2]["weights"].total()

    for seed in range(3):
        given = columns(seed)
        lengths = np.array([4 - seed, 1 + seed])
        real = np.arange(4) < lengths[:, None]
        batch = Batch.from_padded(given, lengths=lengths)
        got = loss(batch, Ragged.from_padded(given["weights"], lengths=lengths))
        want = (given["weights"] ** 2 * given["advantages"][:, None])[real].sum()
        want += given["teacher_logprobs"][real].sum() + given["weights"][0][real[0]].sum()
        assert got == pytest.approx(want, rel=1e-5)
    assert traces == [2]


def test_a_batch_says_which_padded_column_does_not_fit():
    for name, bad in {
        "weights": np.ones((2, 3)),
        "advantages": np.ones((2, 1)),
        "ids": np.full((2, 4), 2**40),
        "deep": np.ones((2, 4, 1, 1)),
    }.items():
        with pytest.raises(DataError, match=f"field '{name}'"):
            Batch.from_padded({"teacher": np.ones((2, 4)), name: bad}, lengths=[1, 2])
    with pytest.raises(DataError, match="there is no column"):
        Batch.from_padded({}, lengths=[1, 2])
    alone = Batch.from_padded({"advantages": np.ones(2)}, lengths=[1, 2])
    assert alone["advantages"].tolist() == [1, 1]


def test_a_batch_of_datums_is_a_pytree_too():
    def datums(lengths):
        return [
            Datum(
                ModelInput.from_ints(range(n)),
                {"target_tokens": np.arange(n), "reward": np.float32(n)},
            )
            for n in lengths
        ]

    traces = []

    @jax.jit
    def read(batch):
        traces.append(1)
        return batch["target_tokens"].sum() * batch["reward"].astype(int), batch.tokens.last()

    for lengths in ([3, 2], [5, 200], [1, 129]):
        sums, last = read(Batch(datums(lengths)))
        assert sums.tolist() == [n * n * (n - 1) // 2 for n in lengths]
        assert last.tolist() == [n - 1 for n in lengths]
    assert len(traces) == 1
    some = datums([2, 3])
    del some[1].loss_fn_inputs["reward"]
    with pytest.raises(DataError, match="datum 1, field 'reward'"):
        read(Batch(some))


@pytest.mark.parametrize("fill", [np.nan, 0.5])
def test_padding_is_filled_with_what_the_dtype_holds(fill):
    ids = Ragged.from_rows([np.array([1, 2, 3]), np.array([4])])
    with pytest.raises(ValueError, match=r"fill=.* is no int"):
        ids.to_padded(fill=fill)
    np.testing.assert_array_equal(ids.to_padded(fill=-100), [[1, 2, 3], [4, -100, -100]])
