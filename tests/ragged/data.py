"""Rows to try things on."""

import numpy as np
from hypothesis import strategies as st

from mintjax import Ragged

from ..examples import THOROUGH

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


def ragged(*rows, dtype=np.float32):
    return Ragged.from_rows([np.array(row, dtype) for row in rows])
