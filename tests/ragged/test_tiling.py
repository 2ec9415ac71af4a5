"""Rows are copied to where they belong, and padding is what they hold already."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.ragged import tiling

lengths = st.lists(st.integers(0, 300), min_size=1, max_size=6)


def packed(columns, sizes, dtype, spare=0):
    place = tiling.place(sizes, spare)
    flat = tiling.empty(len(columns) * place.tiles * tiling.TILE, columns[0][0].shape[1:], dtype)
    flat[:] = 99  # what an earlier batch left there
    layout = tiling.read_table(place.table, place.tiles, padded=True)
    return place, [tiling.fill(tiles, layout) for tiles in tiling.pack(columns, sizes, flat)]


def numbered(sizes, trailing=()):
    """Rows of which no two numbers are the same."""
    ends = [0, *itertools.accumulate(sizes)]
    whole = np.arange(ends[-1], dtype=np.float32) + 1000
    rows = [whole[a:b] for a, b in itertools.pairwise(ends)]
    return [
        np.broadcast_to(row.reshape(-1, *(1 for _ in trailing)), (row.size, *trailing))
        for row in rows
    ]


@given(sizes=lengths, spare=st.integers(0, 3), trailing=st.sampled_from([(), (2,)]))
def test_every_number_is_where_the_layout_says_and_padding_is_the_first_of_the_row(
    sizes, spare, trailing
):
    rows = numbered(sizes, trailing)
    place, [tiles] = packed([rows], sizes, np.float32, spare)
    layout = tiling.read_table(place.table, place.tiles, padded=True)
    flat = tiles.reshape(-1, *trailing)
    owner = np.repeat(layout.tile_row, tiling.TILE)
    inside = tiling.mask(layout).ravel()
    assert inside.sum() == sum(sizes)
    assert layout.row_mask.tolist() == [True] * len(sizes) + [False] * spare
    assert layout.row_start.tolist() == place.starts
    for i, (row, start) in enumerate(zip(rows, place.starts, strict=False)):
        np.testing.assert_array_equal(flat[start : start + len(row)], row)
        # Whatever counts as a row's and is no token of it is its first token.
        assert (flat[(owner == i) & ~inside] == (row[0] if len(row) else 0)).all()
    spare_tiles = layout.tile_count <= 0
    longest = sizes.index(max(sizes))
    assert (layout.tile_row[spare_tiles] == longest).all()
    assert (tiles[spare_tiles] == (rows[longest][0] if sum(sizes) else 0)).all()
    np.testing.assert_array_equal(jax.jit(tiling.fill)(tiles, layout), tiles)


@given(sizes=lengths.filter(sum))
def test_columns_are_padded_alike(sizes):
    rows = numbered(sizes)
    _, [tiles, doubled] = packed([rows, [row * 2 for row in rows]], sizes, np.float32)
    np.testing.assert_array_equal(doubled, tiles * 2)
    _, [tripled] = packed([[row.astype(np.int64) * 3 for row in rows]], sizes, np.int64)
    np.testing.assert_array_equal(tripled, tiles * 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool, jnp.bfloat16])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[::2], np.flip, lambda x: x.copy()])
def test_rows_of_any_kind_are_copied(dtype, view):
    rows = [view(np.arange(n).astype(dtype)) for n in (3, 260)]
    for row in rows:
        row.flags.writeable = False
    sizes = [len(row) for row in rows]
    place, [tiles] = packed([rows], sizes, dtype)
    for row, start in zip(rows, place.starts, strict=True):
        assert tiles.ravel()[start : start + len(row)].tolist() == row.tolist()


def test_a_row_of_another_dtype_converts_or_is_refused():
    rows = [np.ones(3, np.float32), np.ones(2, np.float16)]
    place, [tiles] = packed([rows], [3, 2], np.float32)
    assert tiles.ravel()[place.starts[1]] == 1.0
    with pytest.raises(TypeError, match="same_kind"):
        packed([[np.ones(3, np.int64), np.ones(2, np.float32)]], [3, 2], np.int64)


def test_sums_of_rows_of_very_different_sizes_do_not_meet():
    rng = np.random.default_rng(0)
    sizes = [32768, 5, 20000, 300]
    scales = [1e-6, 1e6, 1.0, 1e-30]
    rows = [
        s * np.abs(rng.standard_normal(n)).astype(np.float32)
        for n, s in zip(sizes, scales, strict=True)
    ]
    layout = tiling.layout_of(sizes)
    tiles = np.where(tiling.mask(layout), tiling.pack_anew(rows, layout, np.float32), 0)
    sums = jax.jit(tiling.row_sums)(tiles, layout)
    exact = [row.astype(np.float64).sum() for row in rows]
    np.testing.assert_allclose(sums, exact, rtol=1e-6)


def total(tiles):
    return tiling.totals([tiles])[0]


@given(sizes=lengths, seed=st.integers(0, 99), whole=st.booleans())
def test_a_total_is_the_sum_of_all_rows(sizes, seed, whole):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-6, 6, len(sizes))
    rows = [rng.standard_normal(n) * s for n, s in zip(sizes, scale, strict=True)]
    rows = [np.asarray(row, np.int32 if whole else np.float32) for row in rows]
    layout = tiling.layout_of(sizes)
    tiles = np.where(tiling.mask(layout), tiling.pack_anew(rows, layout, rows[0].dtype), 0)
    exact = np.concatenate(rows).astype(np.float64)
    slack = 0 if whole else 1e-6 * np.abs(exact).sum()
    found = jax.jit(total)(tiles)
    assert found.dtype == rows[0].dtype
    np.testing.assert_allclose(float(found), exact.sum(), rtol=0, atol=slack)
    sums = float(tiling.row_sums(tiles, layout).sum())
    np.testing.assert_allclose(float(found), sums, rtol=0, atol=slack)
    several = jax.jit(tiling.totals)([tiles, tiles * 0, -tiles])
    expected = exact.sum() * np.array([1, 0, -1])
    np.testing.assert_allclose(several, expected, rtol=0, atol=slack)


def test_sums_have_derivatives_of_every_kind():
    layout = tiling.layout_of([130, 3])
    tiles = np.where(tiling.mask(layout), 1.5, 0).astype(np.float32)
    tangent = np.where(tiling.mask(layout), 2.0, 0).astype(np.float32)
    _, forward = jax.jvp(lambda t: tiling.row_sums(t, layout), (tiles,), (tangent,))
    assert forward.tolist() == [260.0, 6.0]

    def squares(t):
        return (tiling.row_sums(t, layout) ** 2).sum()

    assert float(jax.jvp(total, (tiles,), (tangent,))[1]) == 266.0
    assert (jax.grad(lambda t: total(t) ** 2)(tiles) == 2 * 1.5 * 133).all()
    gradient = np.asarray(jax.grad(squares)(tiles))
    np.testing.assert_array_equal(gradient[:, 0], np.array([390, 9])[layout.tile_row])
    _, second = jax.jvp(jax.grad(squares), (tiles,), (tangent,))
    assert float(second[0, 0]) == 520.0
