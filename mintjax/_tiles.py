"""Where the numbers of ragged rows lie in memory: whole tiles of 128, so that shapes repeat.

Every row starts on a tile of its own and the number of tiles is rounded up to one of a few sizes,
so that ``jit`` meets the same shapes again although no two batches have the same lengths. What
fills the rest of a row's last tile is a copy of one of its own tokens: whatever a function does
there it has already done at a real token, so padding brings no NaN of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Array = Any  # a NumPy array, a JAX array or a tracer

TILE = 128
_ALIGNMENT = 64  # bytes; an array that begins at a multiple of it is lent to XLA, not copied


class Layout(NamedTuple):
    """Which tokens of a tiled buffer belong to which row.

    Args:
        lengths: tokens of each row, int32 ``[B]``.
        row_start: flat position of each row's first token, int32 ``[B]``.
        tile_row: the row that each tile belongs to, int32 ``[tiles]``.
        tile_count: how many tokens of each tile are real, int32 ``[tiles]``; 0 or less for a spare
            tile.
        row_mask: which rows are real, bool ``[B]``, or None where all are.
    """

    lengths: Array
    row_start: Array
    tile_row: Array
    tile_count: Array
    row_mask: Array | None = None


def bucket(size: int) -> int:
    """The smallest size at least ``size`` of a series: 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...

    Each power of two is reached in four equal steps, from 256 on in eight: large batches vary less
    in size, and pay more for what is left empty.
    """
    if size <= 8:
        return 8
    power = 1 << (size - 1).bit_length() - 1
    step = power // (8 if power >= 256 else 4)
    return -(-size // step) * step


def layout_of(lengths: Sequence[int] | npt.NDArray[Any], rows: int | None = None) -> Layout:
    """Lay rows of these lengths out, one after another, in a bucketed number of tiles.

    Args:
        lengths: tokens of each row, ``[B]``.
        rows: pad the batch with empty rows up to so many; none are added if None.
    """
    count = len(lengths)
    length = np.zeros(rows or count, np.int32)
    length[:count] = lengths
    tiles = (length + (TILE - 1)) // TILE
    ends = tiles.cumsum(dtype=np.int32)
    row_start = (ends - tiles) * TILE
    total = bucket(int(ends[-1]))
    tiles[-1] += total - ends[-1]  # the spare ones, behind the last row's end
    numbers = np.arange(max(total, len(length)), dtype=np.int32)
    tile_row = numbers[: len(length)].repeat(tiles)
    tile_count = np.minimum((row_start + length)[tile_row] - numbers[:total] * TILE, TILE)
    row_mask = None if rows is None else numbers[:rows] < count
    return Layout(length, row_start, tile_row, tile_count, row_mask)


def empty(layout: Layout, trailing: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """A flat buffer for the tiles of a layout, aligned; what is in it is arbitrary."""
    shape = (len(layout.tile_row) * TILE, *trailing)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


@functools.cache
def _cycle(length: int) -> npt.NDArray[np.int64]:
    """Where a repeated row of this length is read; np.resize would take 30 times as long."""
    return np.arange(TILE) % length


def pack(
    rows: Sequence[Array], layout: Layout, dtype: Any, flat: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Copy NumPy rows into a tiled buffer, and fill what lies between them with their own tokens.

    The gap behind a row repeats its first tokens, and a spare tile the first of all: the same ones
    in every column, so that a function of several meets nothing there that it has not met.

    Args:
        rows: one array per row.
        layout: where they go.
        dtype: what they are converted to.
        flat: the buffer, as :func:`empty` makes it; a new one if None.
    """
    if flat is None:
        flat = empty(layout, rows[0].shape[1:], dtype)
    pieces: list[Array] = []
    for row in rows:
        pieces.append(row)
        gap = -len(row) % TILE
        if gap:
            pieces.append(row[:gap] if gap <= len(row) else row[_cycle(len(row))[:gap]])
    used = int(layout.row_start[-1]) + -(-int(layout.lengths[-1]) // TILE) * TILE
    np.concatenate(pieces, out=flat[:used], casting="same_kind")
    flat[used:] = flat[0] if used else 0
    return flat.reshape(-1, TILE, *flat.shape[1:])


def mask(layout: Layout) -> Array:
    """Which positions hold a token: bool ``[tiles, TILE]``."""
    xp: Any = jnp if isinstance(layout.tile_count, jax.Array) else np
    return xp.arange(TILE, dtype=xp.int32)[None, :] < layout.tile_count[:, None]


def widen(per_token: Array, like: Array) -> Array:
    """Give an array over ``[tiles, TILE]`` the trailing axes of ``like``, each of size one."""
    return per_token.reshape(per_token.shape + (1,) * (like.ndim - per_token.ndim))


def select_rows(layout: Layout, index: npt.NDArray[np.int64]) -> Layout:
    """The layout of some of the rows, over the same buffer. ``index``: their numbers, ``[b]``."""
    inverse = np.full(layout.lengths.shape[0], -1, np.int32)
    inverse[index] = np.arange(index.size, dtype=np.int32)
    if isinstance(layout.tile_row, np.ndarray):
        row = inverse[layout.tile_row]
        tile_row, tile_count = np.maximum(row, 0), np.where(row < 0, 0, layout.tile_count)
    else:
        row = jnp.asarray(inverse)[layout.tile_row]
        tile_row, tile_count = jnp.maximum(row, 0), jnp.where(row < 0, 0, layout.tile_count)
    row_mask = None if layout.row_mask is None else layout.row_mask[index]
    return Layout(layout.lengths[index], layout.row_start[index], tile_row, tile_count, row_mask)


def hide_others(tiles: Array, chosen: Layout) -> Array:
    """The buffer with rows that were not chosen overwritten by one that was.

    A function of what was chosen is not to meet what was not: where it is infinite there, its
    gradient would be ``0 * inf``.
    """
    tiles = jnp.asarray(tiles)
    shown = tiles[chosen.row_start[0] // TILE]
    mine = widen(chosen.tile_count > 0, tiles)
    return jnp.where(mine, tiles, jax.lax.stop_gradient(shown))


def move(tiles: Array, source: Layout, to: Layout) -> Array:
    """Rows that lie as one layout says, as another says of rows of the same lengths.

    Chosen rows stay where they were, so that those of two slices lie in different places; whether
    they do cannot be seen where layouts are traced. Where they do not, nothing moves.
    """
    ahead = (jnp.asarray(source.row_start) - to.row_start) // TILE
    number = jnp.arange(to.tile_row.shape[0], dtype=jnp.int32) + to_tiles(ahead, to)
    return jnp.take(jnp.asarray(tiles), number, axis=0, mode="clip")


def to_tiles(per_row: Array, layout: Layout) -> Array:
    """One value per row, ``[B, ...]``, to one per tile, ``[tiles, ...]``."""
    return jnp.take(jnp.asarray(per_row), layout.tile_row, axis=0, mode="clip")


def row_sums(tiles: Array, layout: Layout) -> Array:
    """Sum what is in the tiles over each row: ``[tiles, TILE, ...]`` to ``[B]``.

    The positions outside the rows must hold zeros. Adding a long row's tile sums one after another
    in float32 would lose digits, so each is split into a part whose sum is exact and a small rest
    (Rump, Ogita and Oishi 2008, "Accurate floating-point summation", algorithm 3.3).
    """
    rows = layout.lengths.shape[0]
    sums = _tile_sums(tiles)
    if not jnp.issubdtype(sums.dtype, jnp.floating):
        return jax.ops.segment_sum(sums, layout.tile_row, rows)
    fixed = jax.lax.stop_gradient(sums)
    largest = jax.ops.segment_max(jnp.abs(fixed), layout.tile_row, rows)
    _, exponent = jnp.frexp(jnp.maximum(largest, 0) * (tiles.shape[0] + 2))
    unit = to_tiles(jnp.ldexp(jnp.ones((), sums.dtype), exponent), layout)
    coarse = (unit + fixed) - unit
    coarse = jnp.where(jnp.isfinite(coarse), coarse, 0)
    exact = jax.ops.segment_sum(coarse, layout.tile_row, rows)
    return exact + jax.ops.segment_sum(sums - coarse, layout.tile_row, rows)


def _tile_sums(tiles: Array) -> Array:
    """Sum each tile, in two levels: ``[tiles, TILE, ...]`` to ``[tiles]``."""
    lanes = tiles.reshape(tiles.shape[0], TILE // 16, -1)
    return lanes.sum(axis=2).sum(axis=1)
