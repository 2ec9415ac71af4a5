"""Reduces tiles whose padding is masked."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mintjax.losses._arrays import product
from mintjax.ragged import tiling
from mintjax.ragged.tiling import Layout

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer


def running_sums(tiles: Array, layout: Layout) -> Array:
    """Sums each row up to each of its tokens.

    Args:
        tiles: ``[tiles, TILE, ...]``, 0 in the padding.
        layout: of the rows.

    Returns:
        The sums, in the places of ``tiles``.
    """
    within = jnp.cumsum(wide(tiles), axis=1)
    starts = layout.tile_row[1:] != layout.tile_row[:-1]
    starts = tiling.widen(jnp.concatenate([jnp.ones(1, bool), starts]), within[:, -1])

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] | b[0], jnp.where(b[0], b[1], a[1] + b[1])

    last = within[:, -1]
    starts = jnp.broadcast_to(starts, last.shape)
    ends = jax.lax.associative_scan(add, (starts, last))[1]
    before = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    return within + jnp.where(starts, 0, before)[:, None]


def token_at(tiles: Array, layout: Layout, position: Array, row_mask: Array) -> Array:
    """Takes what stands at one token of each row.

    Args:
        tiles: of the rows.
        layout: of the rows.
        position: of the token in the flat buffer, for each row, ``[B]``.
        row_mask: which rows are real, ``[B]``.

    Returns:
        Shape ``[B, ...]``; NaN, or 0 of an integer dtype, in an empty row whose length is traced.

    Raises:
        ValueError: a row has no token.
    """
    lengths, flat = layout.lengths, jnp.asarray(tiles)
    flat = flat.reshape(-1, *flat.shape[2:])
    values = jnp.take(flat, position, axis=0, mode="clip")
    empty = lengths == 0
    if not isinstance(lengths, jax.core.Tracer):
        empty = empty & np.asarray(row_mask)
        if empty.any():
            raise ValueError(
                f"row {int(np.argmax(empty))} has no token, so it has no first or last one"
            )
        return values
    fill = jnp.nan if jnp.issubdtype(values.dtype, jnp.inexact) else 0
    empty = empty & row_mask  # rows that pad a batch stay out of every gradient
    empty = empty.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(empty, jnp.asarray(fill, values.dtype), values)


def quantile(q: Any, numbers: Array, count: Array) -> Array:
    """Interpolates the ``q``-th quantile of those numbers of a buffer that count.

    Args:
        q: a number in [0, 1], or an array of such.
        numbers: the numbers, in any order, and infinity for what does not count.
        count: how many of them count.

    Returns:
        One number for each ``q``; NaN where none counts, one is NaN, or a ``q`` that is traced is
        outside [0, 1].

    Raises:
        ValueError: a ``q`` is outside [0, 1].
    """
    known: list[Any] = [] if isinstance(q, jax.core.Tracer) else np.ravel(q).tolist()
    if not all(0 <= number <= 1 for number in known):
        raise ValueError(f"a quantile is of numbers in [0, 1], not {q}")
    ordered = jnp.sort(numbers)
    place = jnp.asarray(q, ordered.dtype) * jnp.maximum(count - 1, 0).astype(ordered.dtype)
    below = jnp.floor(place).astype(jnp.int32)
    low = jnp.take(ordered, below)
    high = jnp.take(ordered, jnp.ceil(place).astype(jnp.int32))
    part = place - below.astype(place.dtype)
    # Equal infinities have no difference.
    between = jnp.where(low == high, low, low + part * jnp.where(low == high, 0, high - low))
    whole = (count > 0) & ~jnp.isnan(numbers).any()
    possible = (place >= 0) & (place <= jnp.maximum(count - 1, 0))
    return jnp.where(whole & possible, between, jnp.nan)


def weigh(values: Array, weights: Array) -> Array:
    """Multiplies values by weights; a weight of 0 hides what it meets."""
    with jax.numpy_dtype_promotion("standard"):  # a mask is a weight, under a strict promotion too
        dtype = jnp.promote_types(values.dtype, jnp.result_type(weights))
    return product(jnp.asarray(weights).astype(dtype), jnp.asarray(values).astype(dtype))


def wide(values: Array) -> Array:
    """Gives floats of 16 bits 32, because sums would overflow or lose digits."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        return values.astype(jnp.promote_types(values.dtype, jnp.float32))
    return values.astype(jnp.int32) if values.dtype.itemsize < 4 else values


def least(dtype: Any) -> Any:
    """Returns what no number of a dtype is below."""
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf
    return False if dtype == np.dtype(bool) else _integers(dtype).min


def greatest(dtype: Any) -> Any:
    """Returns what no number of a dtype is above."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.inf
    return True if dtype == np.dtype(bool) else _integers(dtype).max


def _integers(dtype: Any) -> Any:
    return jnp.iinfo(jax.dtypes.canonicalize_dtype(dtype))
