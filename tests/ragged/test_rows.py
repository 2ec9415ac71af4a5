"""A Ragged is a sequence of rows, and a number at each of their tokens."""

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

from ..examples import examples
from .data import assert_rows, lengths, ragged, rows_of


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


def test_every_operator_is_that_of_arrays():
    rows = rows_of([3, 5])
    x = Ragged.from_rows(rows)
    assert_rows(1 + x, [1 + r for r in rows])
    assert_rows(x <= rows[0][0], [r <= rows[0][0] for r in rows])
    assert_rows(x < rows[0][0], [r < rows[0][0] for r in rows])
    assert_rows(x != rows[0][0], [r != rows[0][0] for r in rows])


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
