import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import Batch, Datum, ModelInput, Ragged, value_and_logprob_grads
from mintjax.ragged import RowAccessError

from ..examples import THOROUGH, examples, some

# Few numbers of rows and tiles, so that few programs are compiled for many examples.
lengths = st.sampled_from([1, 3, 4] if THOROUGH else [1, 3]).flatmap(
    lambda rows: st.lists(st.integers(1, 256), min_size=rows, max_size=rows)
)


def rows_of(sizes, seed=0, trailing=()):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, *trailing)).astype(np.float32) for n in sizes]


def assert_rows(ragged, expected, **tolerance):
    flat = np.asarray(ragged.tiles).reshape(-1, *ragged.trailing_shape)
    starts, counts = np.asarray(ragged.layout.row_start), np.asarray(ragged.lengths)
    assert len(ragged) == len(expected)
    for start, count, want in zip(starts, counts, expected, strict=True):
        got = flat[start : start + count]  # not ragged[i], whose slice JAX compiles for each length
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, **{"rtol": 2e-5, "atol": 1e-5, **tolerance})


REDUCTIONS = {
    "sum": (lambda x: x.sum(), np.sum),
    "mean": (lambda x: x.mean(), np.mean),
    "var": (lambda x: x.var(), np.var),
    "std": (lambda x: x.std(), np.std),
    "max": (lambda x: x.max(), np.max),
    "min": (lambda x: x.min(), np.min),
    "logsumexp": (lambda x: x.logsumexp(), lambda r: np.log(np.exp(r.astype(np.float64)).sum())),
    "count": (lambda x: x.count(), np.size),
    "dot": (lambda x: x.dot(x * 2 + 1), lambda r: (r * (2 * r + 1)).sum()),
    "first": (lambda x: x.first(), lambda r: r[0]),
    "last": (lambda x: x.last(), lambda r: r[-1]),
}


EAGER = some(REDUCTIONS, 3)  # the others are compiled whole


@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, True) for name in REDUCTIONS), *((n, False) for n in EAGER)]
)
@settings(max_examples=examples(5))
@given(sizes=lengths)
def test_a_reduction_gives_each_row_what_numpy_gives_it(name, compiled, sizes):
    reduce, oracle = REDUCTIONS[name]
    rows = rows_of(sizes)
    got = (jax.jit(reduce) if compiled else reduce)(Ragged.from_rows(rows))
    np.testing.assert_allclose(got, [oracle(row) for row in rows], rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["sum", "mean", "var", "max", "min", "logsumexp", "count"])
def test_a_reduction_takes_all_of_a_row_with_candidates(name):
    rows = rows_of([3, 130, 1], trailing=(4,))
    reduce, oracle = REDUCTIONS[name]
    got = reduce(Ragged.from_rows(rows))
    np.testing.assert_allclose(got, [oracle(row) for row in rows], rtol=1e-5)


@settings(max_examples=examples(5))
@given(sizes=lengths, masked=st.booleans(), dtype=st.sampled_from([np.float32, np.int32]))
def test_several_at_once_are_one_by_one(sizes, masked, dtype):
    def parts(mine, other):
        return {"sum": mine + other, "shared": (mine * other).astype(dtype)}

    x = Ragged.from_rows([(9 * row).astype(dtype) for row in rows_of(sizes)])
    per_row = jnp.arange(len(sizes), dtype=dtype)
    where = Ragged.from_rows([row > 0 for row in rows_of(sizes, 5)]) if masked else None
    together = x.map_terms(parts, per_row)
    totals = x.total_terms(together, where)
    for name, term in together.items():
        alone = x.map(lambda *arrays, name=name: parts(*arrays)[name], per_row)
        for got, row in zip(term, alone, strict=True):
            np.testing.assert_array_equal(got, row)
        assert totals[name] == alone.total(where)
        assert totals[name].dtype == alone.total(where).dtype


def test_a_function_that_gives_less_than_a_number_per_token_is_refused_by_name():
    with pytest.raises(TypeError, match="'sum' of map needs a function that keeps one result"):
        Ragged.from_rows(rows_of([3, 2])).map_terms(lambda x: {"same": x, "sum": x.sum()})


@given(sizes=lengths, seed=st.integers(0, 99))
def test_where_is_the_same_as_leaving_numbers_out(sizes, seed):
    rows = rows_of(sizes, seed)
    keep = [row > -0.5 for row in rows_of(sizes, seed + 100)]
    x, where = Ragged.from_rows(rows), Ragged.from_rows(keep)
    kept = [row[k] for row, k in zip(rows, keep, strict=True)]
    np.testing.assert_allclose(x.sum(where), [k.sum() for k in kept], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x.count(where), [k.size for k in kept])
    means = [k.mean() if k.size else 0 for k in kept]
    np.testing.assert_allclose(x.mean(where), means, rtol=1e-5, atol=1e-6)
    largest = [k.max() if k.size else -np.inf for k in kept]
    np.testing.assert_array_equal(x.max(where), largest)
    total = np.concatenate(kept).sum()
    np.testing.assert_allclose(x.total(where), total, rtol=1e-4, atol=1e-4)


@settings(max_examples=examples(5))
@given(sizes=lengths)
def test_arithmetic_is_numpys_row_by_row(sizes):
    rows = rows_of(sizes)
    x = Ragged.from_rows(rows)
    per_row = np.arange(len(rows), dtype=np.float32) + 1
    assert_rows(2 - x / 3 + x * x, [2 - r / 3 + r * r for r in rows])
    assert_rows(per_row * x, [p * r for p, r in zip(per_row, rows, strict=True)])
    assert_rows(jnp.asarray(per_row) - x, [p - r for p, r in zip(per_row, rows, strict=True)])
    assert_rows(x - x.mean(), [r - r.mean() for r in rows])
    assert_rows(jnp.float32(0.5) * x, [0.5 * r for r in rows])
    assert_rows(1 / abs(x), [1 / abs(r) for r in rows], rtol=1e-4)
    assert_rows((x**2).astype(jnp.int32), [(r**2).astype(np.int32) for r in rows])
    assert_rows(
        ((x > 0) & ~(x >= 1)) | (x == x.min()),
        [((r > 0) & ~(r >= 1)) | (r == r.min()) for r in rows],
    )
    assert_rows(x.cumsum(), [np.cumsum(r) for r in rows], rtol=1e-4, atol=1e-4)
    assert_rows(x.map(jnp.exp), [np.exp(r) for r in rows])


@settings(max_examples=examples(5))
@given(sizes=lengths, start=st.integers(-5, 5), step=st.sampled_from([-2, -1, 1, 2, 3]))
def test_a_slice_takes_those_rows(sizes, start, step):
    rows = rows_of(sizes)
    x = Ragged.from_rows(rows)
    index = slice(start, None, step)
    if not rows[index]:
        with pytest.raises(ValueError, match="selects none"):
            x[index]
        return
    assert_rows(x[index], rows[index], rtol=0, atol=0)
    traced = jax.jit(lambda x: (x[index].sum(), x[index].max(), x[index]))(x)
    np.testing.assert_allclose(traced[0], [r.sum() for r in rows[index]], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(traced[1], [r.max() for r in rows[index]])
    assert_rows(traced[2] + x[index], [r + r for r in rows[index]])


def test_it_is_a_sequence_of_its_rows():
    rows = rows_of([2, 5, 3])
    x = Ragged.from_rows(rows)
    a, b, c = x
    assert (len(x), len(a), len(b), len(c)) == (3, 2, 5, 3)
    np.testing.assert_array_equal(x[-1], rows[2])
    with pytest.raises(IndexError):
        x[3]
    assert [len(r) for r in x[::2]] == [2, 3]


def test_rows_and_packed_values_come_back_and_share_memory():
    values = np.arange(10, dtype=np.float32)
    x = Ragged.from_packed(values, [0, 4, 4, 10])
    assert x[0].base is values
    packed, offsets = (x + 0).to_packed()
    np.testing.assert_array_equal(packed, values)
    np.testing.assert_array_equal(offsets, [0, 4, 4, 10])
    np.testing.assert_allclose(x.sum(), [6, 0, 39])
    np.testing.assert_array_equal(x.max(), [3, -np.inf, 9])
    np.testing.assert_array_equal(x.logsumexp()[1], -np.inf)
    for offsets in ([0], [0, 4], [1, 10], [0, 6, 4, 10], [[0, 10]]):
        with pytest.raises(ValueError, match="offsets"):
            Ragged.from_packed(values, offsets)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda x: jnp.mean(x), r"x\.mean\(\)"),
        (lambda x: jnp.exp(x), r"x\.map\(fn\)"),
        (lambda x: np.asarray(x), r"x\.sum\(\)"),
        (lambda x: x.map(lambda a: a.sum()), "one result per token"),
        (lambda x: x * [1.0, 2.0], "another Ragged, a scalar"),
    ],
)
def test_what_would_count_padding_is_a_type_error_that_names_the_method(misuse, message):
    with pytest.raises(TypeError, match=message):
        misuse(Ragged.from_rows(rows_of([2, 3])))


def test_a_ragged_is_no_array():
    with pytest.raises((TypeError, ValueError)):  # some JAX refuses the layout first
        jnp.asarray(Ragged.from_rows(rows_of([2, 3])))


def test_what_does_not_fit_says_where():
    x = Ragged.from_rows(rows_of([2, 3]))
    with pytest.raises(ValueError, match="row 1 has 3 tokens here and 4 there"):
        x + Ragged.from_rows(rows_of([2, 4]))
    with pytest.raises(ValueError, match="2 rows do not combine with 3"):
        x + Ragged.from_rows(rows_of([2, 3, 4]))
    with pytest.raises(ValueError, match=r"one value per row, shape \(2,\), not \(3,\)"):
        x + np.ones(3, np.float32)
    with pytest.raises(ValueError, match="row 1 has shape"):
        Ragged.from_rows([np.ones(2), np.ones((2, 2))])
    with pytest.raises(ValueError, match="row 1 is float32, row 0 is float64"):
        Ragged.from_rows([np.ones(2), np.ones(2, np.float32)])
    with pytest.raises(ValueError, match="at least one row"):
        Ragged.from_rows([])


def test_rows_cannot_be_taken_under_jit_and_the_error_names_the_way_out():
    x = Ragged.from_rows(rows_of([2, 3]))
    with pytest.raises(RowAccessError, match=r"x\.sum\(\)"):
        jax.jit(lambda x: sum(row.sum() for row in x))(x)
    assert isinstance(RowAccessError(), mintjax.errors.MintjaxError)


@jax.jit
@jax.grad
def gradient_of_some_reductions(tiles, layout):
    x = Ragged(tiles, layout)
    return (x.logsumexp() * x.mean()).sum() + x.max().sum()


@given(sizes=lengths)
def test_gradients_reach_tokens_and_not_padding(sizes):
    rows = rows_of(sizes)
    x = Ragged.from_rows(rows)

    def by_hand(row):
        softmax = np.exp(row) / np.exp(row).sum()
        logsumexp = np.log(np.exp(row).sum())
        return softmax * row.mean() + logsumexp / row.size + (row == row.max())

    got = Ragged(gradient_of_some_reductions(x.tiles, x.layout), x.layout)
    expected = [by_hand(row) for row in rows]
    assert_rows(got, expected, rtol=1e-4)
    np.testing.assert_allclose(np.sum(got.tiles), sum(e.sum() for e in expected), rtol=1e-3)


def test_padding_brings_no_nan_of_its_own():
    x = Ragged.from_rows([np.full(3, 2.0, np.float32), np.full(200, 4.0, np.float32)])
    with jax.debug_nans(True):
        grads = jax.grad(lambda t: Ragged(t, x.layout).map(jnp.log).total())(x.tiles)
    assert_rows(Ragged(grads, x.layout), [np.full(3, 0.5), np.full(200, 0.25)])


def test_one_rows_nan_stays_in_that_row():
    rows = rows_of([5, 400, 7])
    rows[1][300] = np.nan
    x = Ragged.from_rows(rows)
    for reduce, _ in REDUCTIONS.values():
        assert np.isfinite(np.asarray(reduce(x))[[0, 2]]).all()
    assert np.isnan(x.sum()[1])
    rows[1][300] = np.inf
    assert Ragged.from_rows(rows).sum()[1] == np.inf


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_long_row_sum_is_as_accurate_as_a_pairwise_one(scale):
    errors = []
    for seed in range(20):
        row = -scale * np.abs(rows_of([32768], seed)[0])
        true = row.astype(np.float64).sum()
        x = Ragged.from_rows([row, row[:100]])
        errors.append((abs(float(x.sum()[0]) - true), abs(float(row.sum()) - true)))
    ours, numpys = np.mean(errors, axis=0)
    assert ours <= numpys


def test_shapes_repeat_when_lengths_do_not():
    rng = np.random.default_rng(0)
    shapes = {Ragged.from_rows(rows_of(rng.integers(50, 2049, 64))).tiles.shape for _ in range(100)}
    assert len(shapes) <= 4


def test_repr_says_what_it_holds_and_not_the_numbers():
    assert repr(Ragged.from_rows(rows_of([2, 3]))) == "Ragged(rows=2, lengths=[2 3], dtype=float32)"


@pytest.mark.parametrize("name", ["sum", "mean", "max", "min", "logsumexp", "var", "last"])
def test_rows_of_doubles_are_taken_as_jax_takes_them(name):
    rows = [np.array([-1.0, -2.0]), np.array([-3.0])]
    plain = Ragged.from_rows([row.astype(np.float32) for row in rows])
    np.testing.assert_array_equal(
        getattr(Ragged.from_rows(rows), name)(), getattr(plain, name)(), strict=True
    )


def test_arrays_of_other_layouts_are_brought_to_one():
    rows = rows_of([3, 5, 2, 5])
    x = Ragged.from_rows(rows)
    assert_rows(x[1:3] + Ragged.from_rows(rows[1:3]), [r + r for r in rows[1:3]])
    assert_rows(Ragged.from_rows(rows[1:3]) - x[1:3], [r - r for r in rows[1:3]])


def test_numbers_of_tokens_spread_over_candidates():
    rows = rows_of([3, 5])
    wide = [np.stack([row, 2 * row], axis=1) for row in rows]
    x, y = Ragged.from_rows(rows), Ragged.from_rows(wide)
    expected = [row[:, None] * both for row, both in zip(rows, wide, strict=True)]
    assert_rows(x * y, expected)
    assert_rows(y * x, expected)


def test_every_operator_is_that_of_arrays():
    rows = rows_of([3, 5])
    x = Ragged.from_rows(rows)
    assert_rows(1 + x, [1 + r for r in rows])
    assert_rows(x <= rows[0][0], [r <= rows[0][0] for r in rows])
    assert_rows(x < rows[0][0], [r < rows[0][0] for r in rows])
    assert_rows(x != rows[0][0], [r != rows[0][0] for r in rows])


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_that_were_chosen_stand_beside_rows_that_were_made(wrap):
    rows = rows_of([3, 300, 5, 7, 9, 11, 2, 1, 1])  # as many tiles as the chosen ones alone take
    chosen = (Ragged.from_rows(rows) * 2)[1:4]
    made = (Ragged.from_rows(rows_of([300, 5, 7], seed=1) + rows_of([1] * 6)) * 1)[:3]
    add = wrap(lambda a, b: a + b)
    expected = [2 * a + b for a, b in zip(rows[1:4], rows_of([300, 5, 7], seed=1), strict=True)]
    for got in (add(chosen, made), add(made, chosen)):
        assert_rows(got, expected)


@pytest.mark.parametrize("sizes", [[3, 3, 5, 5], [1, 1, 300, 300, 128, 128]])
def test_two_slices_meet_row_by_row(sizes):
    """Compiled or not, though the rows of each stay where they were among those of the other."""

    def contrast(data, logprobs):
        return ((logprobs[0::2] - 2 * logprobs[1::2]) ** 2).total(), {}

    rows = rows_of(sizes)
    data = [Datum(ModelInput.from_ints(range(n)), {"target_tokens": np.arange(n)}) for n in sizes]
    result = mintjax.value_and_logprob_grads(contrast, data, rows)
    margins = [a - 2 * b for a, b in zip(rows[0::2], rows[1::2], strict=True)]
    assert result.loss == pytest.approx(sum((m**2).sum() for m in margins), rel=1e-5)
    expected = [grad for m in margins for grad in (2 * m, -4 * m)]
    for got, want in zip(result.grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    x = Ragged.from_rows(rows)
    assert_rows(x[0::2] - 2 * x[1::2], margins)


def test_rows_of_other_lengths_do_not_combine_in_a_compiled_program():
    few, many = (Ragged.from_rows(rows_of(sizes)) for sizes in ([3, 4], [3, 900]))
    with pytest.raises(ValueError, match="rows of different lengths do not combine"):
        jax.jit(lambda a, b: a + b)(few, many)


def ragged(*rows, dtype=np.float32):
    return Ragged.from_rows([np.array(row, dtype) for row in rows])


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: bool(x),
        lambda x: min(x, x + 1),
        lambda x: -1 < x < 2,
        lambda x: x or 0,
        lambda x: not x,
    ],
)
def test_a_ragged_has_no_truth(ask):
    with pytest.raises(TypeError, match=r"`\(a < x\) & \(x < b\)`"):
        ask(ragged([1, 2], [3]))


def test_a_weight_is_no_mask():
    x, weights = ragged([1, 2], [3]), ragged([0.5, 1], [1])
    for reduce in (x.sum, x.mean, x.count, x.max, x.total, x.logsumexp):
        with pytest.raises(TypeError, match=r"boolean or integer, not float32.*weights != 0"):
            reduce(where=weights)


def test_rows_are_not_chosen_by_a_truth_value():
    for index in (True, np.bool_(False)):
        with pytest.raises(TypeError, match=r"x\[i\] is a row"):
            ragged([1, 2], [3])[index]


def test_sums_of_numpy_are_told_that_they_would_be_of_rows():
    for function in (np.sum, np.mean, np.max):
        with pytest.raises(TypeError, match=r"not the axis None.*x\.total\(\)"):
            function(ragged([1, 2], [3]))


def test_rows_hold_numbers_that_can_be_seen():
    with pytest.raises(ValueError, match="not object; is one of them None"):
        Ragged.from_rows([[None, 1.0]])
    masked = np.ma.array([[1.0, 2.0], [3.0, 4.0]], mask=[[0, 1], [0, 0]])
    for make in (Ragged.from_rows, lambda rows: Ragged.from_padded(rows, lengths=[2, 2])):
        with pytest.raises(ValueError, match="masked array hides"):
            make(masked)
    nothing_hidden = np.ma.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(Ragged.from_rows(nothing_hidden).sum(), [3, 7])
    with pytest.raises(ValueError, match="integers that rise"):
        Ragged.from_packed(np.arange(4.0), [0.0, 1.5, 4.0])


def test_rows_whose_traced_lengths_differ_are_nan_and_the_others_right():
    x, y = ragged([1, 2], [3, 4, 5]), ragged([10, 20], [30, 40])
    np.testing.assert_array_equal(jax.jit(lambda a, b: (a + b).sum())(x, y), [33, np.nan])
    np.testing.assert_array_equal(jax.jit(lambda a, b: a.sum(where=b != 0))(x, y), [3, np.nan])
    np.testing.assert_array_equal(jax.jit(lambda a, b: a.map(jnp.add, b).max())(x, y), [22, np.nan])
    with pytest.raises(TypeError, match="lengths of both Ragged are traced"):
        jax.jit(lambda a, b: a > b)(x, y)
    with pytest.raises(TypeError, match="lengths of both Ragged are traced"):
        jax.jit(lambda a, b: a.count(where=b != 0))(x, y)


def test_the_same_slice_of_two_columns_is_one_layout():
    def count(x):
        mask = x > 1
        return x[0::2].count(where=mask[0::2]), (x[0::2] > 2 * mask[0::2]).sum()

    counts, above = jax.jit(count)(ragged([1, 2], [3], [4, 0]))
    assert (counts.tolist(), above.tolist()) == ([1, 1], [1, 1])


def test_an_empty_row_has_no_first_and_no_last_token():
    x = ragged([], [5, 6])
    for end, there in ((Ragged.first, 5), (Ragged.last, 6)):
        with pytest.raises(ValueError, match="row 0 has no token"):
            end(x)
        np.testing.assert_array_equal(jax.jit(end)(x), [np.nan, there])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.int64, np.float32])
def test_least_and_greatest_of_any_dtype(dtype):
    x = ragged([1, 0, 1], [1, 1], dtype=dtype)
    assert x.min().tolist() == [0, 1]
    assert x.max().tolist() == [1, 1]
    nothing = x.min(where=x > 1)
    info = jnp.inf if dtype is np.float32 else True if dtype is bool else None
    if info is None:
        info = jnp.iinfo(nothing.dtype).max
    assert nothing.tolist() == [info, info]


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_sums_of_16_bits_are_taken_in_32(dtype):
    x = ragged([-30] * 3000, [1], dtype=dtype)
    assert x.sum().tolist() == [-90000, 1]
    assert x.mean().tolist() == [-30, 1]
    assert x.cumsum().last().tolist() == [-90000, 1]
    assert ragged([1] * 300, dtype=np.uint8).sum().tolist() == [300]


def test_a_weight_of_0_hides_an_infinite_logprob_from_value_and_gradient():
    x, weights = ragged([-np.inf, -2], [np.nan, -3]), ragged([0, 2], [0, 1], dtype=np.int32)
    assert x.dot(weights).tolist() == [-4, -3]
    grads = jax.grad(lambda t: Ragged(t, x.layout).dot(weights).sum())(x.tiles)
    assert [row.tolist() for row in Ragged(grads, x.layout)] == [[0, 2], [0, 1]]


def test_the_last_axis_is_the_row_and_other_axes_are_refused():
    x = ragged([1, 2], [3])
    assert x.sum(-1).tolist() == [3, 3]
    assert x.mean(-1).tolist() == [1.5, 3]
    for wrong in (0, 1, [1.0], np.ones(2)):
        with pytest.raises(TypeError, match=r"x\.sum\(where=mask\)"):
            x.sum(wrong)
    with pytest.raises(TypeError, match="over the candidates of each token"):
        Ragged.from_rows(rows_of([2], trailing=(3,))).sum(-1)


class TestAsAPytree:
    """What JAX does to all leaves is right, or is refused: lengths are no numbers of the loss."""

    x = Ragged.from_rows([np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)])

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: jax.tree.map(lambda leaf: leaf * 2, x),
            lambda x: jax.jit(lambda y: jax.tree.map(lambda leaf: leaf + 1, y))(x),
            lambda x: jax.grad(lambda y: y.total())(x),
            optax.tree.norm,
            lambda x: optax.tree.add(x, x),
        ],
    )
    def test_arithmetic_on_all_leaves_is_refused(self, function):
        with pytest.raises((TypeError, NotImplementedError)):
            function(self.x)

    @pytest.mark.parametrize(
        "function",
        [
            lambda x: jax.tree.map(jnp.zeros_like, x),
            lambda x: jax.grad(lambda y: y.total(), allow_int=True)(x),
            lambda x: jax.vmap(lambda scale: x * scale)(jnp.arange(3.0)),
            lambda x: jax.tree.map(lambda leaf: leaf[:1], x),
        ],
    )
    def test_leaves_that_were_replaced_are_no_rows(self, function):
        made = function(self.x)
        assert "unknown rows" in repr(made)
        with pytest.raises(ValueError, match="its rows are not known"):
            made.sum()

    def test_through_transformations_rows_stay_what_they_are(self):
        doubled = jax.jit(lambda x: x * 2)(self.x)
        assert [row.tolist() for row in doubled] == [[2.0, 4.0], [6.0]]
        sums = jax.vmap(lambda scale: (self.x * scale).sum())(jnp.arange(2.0))
        assert sums.tolist() == [[0.0, 0.0], [3.0, 3.0]]
        _, seen = jax.lax.scan(lambda x, _: (x * 2, x.sum()), self.x * 1.0, None, length=2)
        assert seen.tolist() == [[3.0, 3.0], [6.0, 6.0]]
        assert jax.jit(lambda x: x[0::2])(self.x).sum().tolist() == [3.0]
        assert jax.tree.map(lambda leaf: leaf, self.x).lengths.tolist() == [2, 1]

    def test_lengths_stay_traced(self):
        seen = []

        @jax.jit
        def total(x):
            seen.append(x)
            return x.total()

        for rows in ([[1.0], [2.0, 3.0]], [[1.0, 2.0, 3.0], [4.0]]):
            assert total(Ragged.from_rows([np.array(row, np.float32) for row in rows])) == np.sum(
                [sum(row) for row in rows]
            )
        assert len(seen) == 1


def test_not_of_a_boolean_column_is_logical():
    data = [
        Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1, 2], "mask": [True, False]}),
        Datum(ModelInput.from_ints([3]), {"target_tokens": [3], "mask": [True]}),
    ]
    assert [row.tolist() for row in ~Batch(data)["mask"]] == [[False, True], [False]]

    def masked(data, logprobs):
        return logprobs.total(where=~data["mask"]), {}

    result = value_and_logprob_grads(masked, data, [[-1.0, -2.0], [-4.0]])
    assert result.loss == -2.0
    assert [grad.tolist() for grad in result.grads] == [[0.0, 1.0], [0.0]]


def test_a_mask_is_a_weight_under_strict_promotion_too():
    x = Ragged.from_rows([np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)])
    with jax.numpy_dtype_promotion("strict"):
        assert x.dot(x > 1).tolist() == [2.0, 3.0]
        assert jax.jit(lambda x: x.dot(x > 1))(x).tolist() == [2.0, 3.0]


@settings(max_examples=examples(6))
@given(
    rows=st.lists(st.lists(st.floats(-9, 9, width=32), max_size=4), min_size=1, max_size=3),
    q=st.floats(0, 1, width=32),
    data=st.data(),
)
def test_a_quantile_is_numpys_of_all_that_counts(rows, q, data):
    arrays = [np.array(row, np.float32) for row in rows]
    masks = [np.array([data.draw(st.booleans()) for _ in row], bool) for row in rows]
    x, where = Ragged.from_rows(arrays), Ragged.from_rows(masks)
    for numbers, marked in ((np.concatenate(arrays), None), (masked(arrays, masks), where)):
        found = x.quantile(q, marked)
        if numbers.size:
            np.testing.assert_allclose(found, np.quantile(numbers, q), rtol=1e-5, atol=1e-5)
        else:
            assert np.isnan(found)


def masked(arrays, masks):
    return np.concatenate([row[mask] for row, mask in zip(arrays, masks, strict=True)])


def test_a_quantile_of_what_is_not_finite():
    x = Ragged.from_rows([np.array([1, np.inf], np.float32), np.array([np.inf], np.float32)])
    np.testing.assert_array_equal(
        x.quantile(np.array([0.0, 0.9, 1.0], np.float32)), [1, np.inf, np.inf]
    )
    assert np.isnan(Ragged.from_rows([np.array([1, np.nan], np.float32)]).quantile(0.0))
    assert Ragged.from_rows([np.array([1, 2])]).quantile(0.5) == 1.5


@pytest.mark.parametrize("q", [-0.1, 1.001, np.nan])
def test_a_quantile_outside_all_numbers_is_refused_or_nan(q):
    x = Ragged.from_rows([np.array([1, 2, 2], np.float32)])
    with pytest.raises(ValueError, match=r"of numbers in \[0, 1\]"):
        x.quantile([0.5, q])
    assert np.isnan(jax.jit(x.quantile)(q))
