"""How datums are cut into few shapes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mintjax.local.compute import length_bucket, row_bucket


@given(st.integers(1, 100_000))
def test_a_length_fits_its_bucket_and_wastes_at_most_half(length):
    bucket = length_bucket(length)
    assert length <= bucket <= max(32, 2 * length)


@given(st.integers(1, 100_000))
def test_a_bucket_is_its_own(length):
    assert length_bucket(length_bucket(length)) == length_bucket(length)


def test_lengths_up_to_the_context_need_few_shapes():
    assert len({length_bucket(length) for length in range(1, 2049)}) <= 12


@given(st.integers(1, 100_000))
def test_rows_fit_their_bucket(rows):
    assert rows <= row_bucket(rows) <= max(4, 2 * rows)
