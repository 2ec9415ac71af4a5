"""Lays ragged rows out in memory, in whole tiles of 128, so that shapes repeat.

Every row starts on a tile of its own and the number of tiles is rounded up to one of a few sizes,
so that ``jit`` meets the same shapes again although no two batches have the same lengths. The rest
of a row's last tile repeats the row's first token: whatever a function does there it has already
done at a real token, so padding brings no NaN of its own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Array = Any  # a NumPy array, a JAX array or a tracer

_SHIFT = 7
TILE = 1 << _SHIFT
_ALIGNMENT = 64  # bytes; an array that begins at a multiple of it is lent to XLA, not copied


class _Fields(NamedTuple):
    lengths: Array
    row_start: Array
    tile_row: Array
    tile_count: Array
    row_mask: Array | None = None


class Layout(_Fields):
    """The places of rows in a tiled buffer.

    Args:
        lengths: tokens of each row, int32 ``[B]``.
        row_start: flat position of each row's first token, int32 ``[B]``.
        tile_row: the row that each tile belongs to, or counts as if it has no token of its own,
            int32 ``[tiles]``.
        tile_count: how many tokens each tile has of its own, int32 ``[tiles]``; none if 0 or less.
        row_mask: which rows are real, bool ``[B]``, or None where all are.

    Attributes:
        origin: the layout and the rows that this one was chosen from, if it was.
        width: T, where the rows were padded arrays ``[B, T]``.
    """

    origin: tuple[Layout, bytes] | None = None
    width: int | None = None

    def agrees_with(self, other: Layout) -> bool:
        """Tells whether both are known to be the same layout, although lengths may be traced."""
        if self is other or all(a is b for a, b in zip(self, other, strict=True)):
            return True
        if self.origin is None or other.origin is None:
            return False
        return self.origin[1] == other.origin[1] and self.origin[0].agrees_with(other.origin[0])


class Place(NamedTuple):
    """The places of a batch's rows, for a compiled function and for the packing.

    Args:
        table: what :func:`read_table` makes a layout of, in one array, for each that a compiled
            function takes has its cost: int32 ``[3 * B + tiles]``. Of each row its length; then
            where each starts; then 1 if it is real; then the row that each tile belongs to.
        starts: flat position of each row's first token, those of spare rows among them.
        tiles: how many there are.
    """

    table: npt.NDArray[np.int32]
    starts: list[int]
    tiles: int


def bucket(size: int) -> int:
    """Rounds ``size`` up to one of 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ...

    Each power of two is reached in four equal steps, from 256 on in eight: large batches vary less
    in size, and pay more for what is left empty.
    """
    if size <= 8:
        return 8
    power = 1 << (size - 1).bit_length() - 1
    step = power // (8 if power >= 256 else 4)
    return -(-size // step) * step


def place(lengths: Sequence[int], spare: int = 0) -> Place:
    """Lays rows of these lengths out, one after another, in a bucketed number of tiles.

    Args:
        lengths: tokens of each row, ``[B]``.
        spare: how many empty rows to pad the batch with.
    """
    own = np.array([*lengths, *[0] * spare], np.int32)
    tiles = own + (TILE - 1) >> _SHIFT
    ends = np.cumsum(tiles, dtype=np.int32)
    starts = (ends - tiles) << _SHIFT
    used = int(ends[-1])
    count = bucket(used)
    real = np.arange(own.size) < len(lengths)
    rows = np.repeat(np.arange(own.size, dtype=np.int32), tiles)
    rest = np.full(count - used, own.argmax(), np.int32)
    table = np.concatenate([own, starts, real, rows, rest], dtype=np.int32)
    return Place(table, starts.tolist(), count)


def read_table(table: Array, tiles: int, *, padded: bool) -> Layout:
    """Reads the layout that the ``table`` of a :class:`Place` of so many tiles holds.

    Args:
        table: as there.
        tiles: as there.
        padded: whether some rows may not be real.
    """
    xp: Any = jnp if isinstance(table, jax.Array) else np
    length, start, real = table[:-tiles].reshape(3, -1)
    tile_row = table[-tiles:]
    ends = xp.take(start + length, tile_row, mode="clip")
    count = xp.minimum(ends - (xp.arange(tiles, dtype=xp.int32) << _SHIFT), TILE)
    return Layout(length, start, tile_row, count, real != 0 if padded else None)


def layout_of(lengths: Sequence[int]) -> Layout:
    """Lays out rows of these lengths."""
    table, _, tiles = place(lengths)
    return read_table(table, tiles, padded=False)


def empty(size: int, trailing: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """Makes a flat buffer for so many tokens, aligned; what is in it is arbitrary."""
    shape = (size, *trailing)
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(needed + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + needed].view(dtype).reshape(shape)


def pack(
    columns: Sequence[Sequence[Array]], lengths: Sequence[int], flat: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Copies NumPy rows into a tiled buffer; zeros lie between them, until :func:`fill` fills them.

    Args:
        columns: one array per row, of the buffer's dtype or one that converts to it, in each.
        lengths: tokens of each row.
        flat: a buffer for all columns, one after another, as :func:`empty` makes it.

    Returns:
        The buffer as tiles, ``[columns, tiles, TILE, ...]``.
    """
    size = len(flat) // len(columns)
    parts = pieces(columns[0], lengths, size, flat.dtype)
    for part, rows in zip(flat.reshape(-1, size, *flat.shape[1:]), columns, strict=True):
        parts[: 2 * len(rows) : 2] = rows  # what lies between them is the same in each column
        np.concatenate(parts, out=part)
    return flat.reshape(len(columns), -1, TILE, *flat.shape[1:])


def pieces(rows: Sequence[Array], lengths: Sequence[int], size: int, dtype: Any) -> list[Array]:
    """Lists the arrays whose concatenation is the rows in tiles, with zeros between them.

    Args:
        rows: one array per row.
        lengths: tokens of each.
        size: of the tiles, in tokens.
        dtype: of the zeros.
    """
    trailing = rows[0].shape[1:]
    zeros = _zeros(trailing, np.dtype(dtype))
    gaps = [-length % TILE for length in lengths]
    rest = size - sum(lengths) - sum(gaps)
    parts: list[Array] = [None] * (2 * len(rows))
    parts[::2] = rows
    parts[1::2] = [zeros[gap] for gap in gaps]
    return [*parts, np.zeros((rest, *trailing), dtype)]


@functools.lru_cache(maxsize=64)
def _zeros(trailing: tuple[int, ...], dtype: np.dtype[Any]) -> list[npt.NDArray[Any]]:
    """Zeros for every gap that a row can leave in its last tile."""
    zeros = np.zeros((TILE, *trailing), dtype)
    zeros.flags.writeable = False
    return [zeros[:gap] for gap in range(TILE)]


def fill(tiles: Array, layout: Layout) -> Array:
    """Writes the first token of each row over the positions that are nobody's.

    So no function meets anything in the padding that it has not met at a token. A spare tile is
    filled as the longest row, which it counts as. The same token fills a gap in every column.

    Args:
        tiles: ``[tiles, TILE, ...]``.
        layout: of the rows.
    """
    xp: Any = jnp if isinstance(tiles, jax.Array) or isinstance(layout.tile_row, jax.Array) else np
    flat = xp.asarray(tiles).reshape(-1, *tiles.shape[2:])
    start = xp.take(layout.row_start, layout.tile_row, mode="clip")
    first = xp.take(flat, start, axis=0, mode="clip")
    first = first if xp is np else jax.lax.stop_gradient(first)
    return xp.where(widen(mask(layout), tiles), tiles, first[:, None])


_SEAL = 0x52414747  # the last number of a sealed layout; a leaf that was replaced lacks it


class Sealed(NamedTuple):
    """A layout as one leaf of a pytree, which no arithmetic can reach.

    A function that is mapped over all leaves, such as a norm or a scaling, would change the lengths
    of rows without a word. The leaf is an array of JAX's key type, for which arithmetic and
    derivatives are a TypeError.

    Args:
        keys: the numbers of the layout.
        rows: how many rows there are.
        tiles: how many tiles there are.
        padded: whether some rows may not be real.
        width: as the layout has it.
    """

    keys: Array
    rows: int
    tiles: int
    padded: bool
    width: int | None

    def open(self) -> Layout:
        """Gives the layout back.

        Raises:
            ValueError: the leaf was split, stacked or replaced.
        """
        sizes = (self.rows, self.rows, self.rows, self.tiles, self.tiles)
        whole = (
            isinstance(self.keys, jax.Array)
            and jnp.issubdtype(self.keys.dtype, jax.dtypes.prng_key)
            and self.keys.shape == (_key_count(sum(sizes)),)
        )
        table: Array = np.zeros(1, np.int32)
        if whole:
            data = jax.random.key_data(self.keys).reshape(-1)
            table = jax.lax.bitcast_convert_type(data, jnp.int32)
            if not isinstance(table, jax.core.Tracer):
                table = np.asarray(table)
                whole = bool(table[-1] == _SEAL)
        if not whole:
            raise ValueError(
                "this Ragged was made by a function that split, stacked or replaced its leaves, so "
                "its rows are not known. Map over x.tiles, split batches before they are made, or "
                "use a Ragged for each part"
            )
        cuts = [0, *itertools.accumulate(sizes)]
        length, start, real, row, count = (table[a:b] for a, b in itertools.pairwise(cuts))
        layout = Layout(length, start, row, count, real != 0 if self.padded else None)
        layout.width = self.width
        return layout


def _key_count(numbers: int) -> int:
    """Counts the keys that hold so many numbers and the seal: odd, so that no mesh splits them."""
    return numbers // 2 + 1 | 1


def seal(layout: Layout) -> Sealed:
    """Makes the leaf of a layout."""
    rows, tiles = int(layout.lengths.shape[0]), int(layout.tile_row.shape[0])
    real = np.ones(rows, np.int32) if layout.row_mask is None else layout.row_mask
    parts = (layout.lengths, layout.row_start, real, layout.tile_row, layout.tile_count)
    numbers = 3 * rows + 2 * tiles
    spare = np.full(2 * _key_count(numbers) - numbers, _SEAL, np.int32)
    if any(isinstance(part, jax.Array) for part in parts):
        table = jnp.concatenate([jnp.asarray(part).astype(jnp.int32) for part in (*parts, spare)])
        data = jax.lax.bitcast_convert_type(table.reshape(-1, 2), jnp.uint32)
    else:
        table = np.concatenate([*parts, spare], dtype=np.int32)
        data = jax.device_put(table.view(np.uint32).reshape(-1, 2))
    keys = cast("jax.Array", jax.random.wrap_key_data(data, impl="threefry2x32"))
    return Sealed(keys, rows, tiles, layout.row_mask is not None, layout.width)


def pack_anew(rows: Sequence[Array], layout: Layout, dtype: Any) -> npt.NDArray[Any]:
    """Packs NumPy rows into tiles, in a buffer of their own."""
    flat = empty(len(layout.tile_row) * TILE, rows[0].shape[1:], dtype)
    return fill(pack([rows], layout.lengths.tolist(), flat)[0], layout)


def mask(layout: Layout) -> Array:
    """Marks the positions that hold a token: bool ``[tiles, TILE]``."""
    xp: Any = jnp if isinstance(layout.tile_count, jax.Array) else np
    return xp.arange(TILE, dtype=xp.int32)[None, :] < layout.tile_count[:, None]


def widen(per_token: Array, like: Array) -> Array:
    """Gives an array over ``[tiles, TILE]`` the trailing axes of ``like``, each of size one."""
    return per_token.reshape(per_token.shape + (1,) * (like.ndim - per_token.ndim))


def select_rows(layout: Layout, index: npt.NDArray[np.int64]) -> Layout:
    """Makes the layout of the rows of the numbers ``index``, ``[b]``, over the same buffer."""
    xp: Any = jnp if isinstance(layout.tile_row, jax.Array) else np
    inverse = np.full(layout.lengths.shape[0], -1, np.int32)
    inverse[index] = np.arange(index.size, dtype=np.int32)
    lengths, row = layout.lengths[index], xp.asarray(inverse)[layout.tile_row]
    chosen = (row >= 0) & (layout.tile_count > 0)
    tile_row = xp.where(chosen, row, xp.argmax(lengths).astype(np.int32))
    tile_count = xp.where(chosen, layout.tile_count, 0)
    row_mask = None if layout.row_mask is None else layout.row_mask[index]
    chosen_layout = Layout(lengths, layout.row_start[index], tile_row, tile_count, row_mask)
    chosen_layout.origin = (layout, index.tobytes())
    chosen_layout.width = layout.width
    return chosen_layout


def hide_others(tiles: Array, chosen: Layout) -> Array:
    """Overwrites the rows that were not chosen by the longest that was.

    A function of what was chosen is not to meet what was not: where it is infinite there, its
    gradient would be ``0 * inf``.
    """
    tiles = jnp.asarray(tiles)
    shown = tiles[jnp.asarray(chosen.row_start)[jnp.argmax(chosen.lengths)] // TILE]
    mine = widen(chosen.tile_count > 0, tiles)
    return jnp.where(mine, tiles, jax.lax.stop_gradient(shown))


def move(tiles: Array, source: Layout, to: Layout) -> Array:
    """Moves rows that lie as one layout says to where another of the same lengths says.

    Chosen rows stay where they were, so that those of two slices lie in different places; whether
    they do cannot be seen where layouts are traced. Where they do not, nothing moves.
    """
    first = jnp.asarray(source.row_start) // TILE
    ahead = jnp.arange(to.tile_row.shape[0], dtype=jnp.int32) - to_tiles(to.row_start // TILE, to)
    number = to_tiles(first, to) + jnp.where(jnp.asarray(to.tile_count) > 0, ahead, 0)
    return jnp.take(jnp.asarray(tiles), number, axis=0, mode="clip")


def to_tiles(per_row: Array, layout: Layout) -> Array:
    """Brings one value per row, ``[B, ...]``, to one per tile, ``[tiles, ...]``."""
    return jnp.take(jnp.asarray(per_row), layout.tile_row, axis=0, mode="clip")


def row_sums(tiles: Array, layout: Layout) -> Array:
    """Sums what is in the tiles over each row: ``[tiles, TILE, ...]`` to ``[B]``.

    The positions outside the rows must hold zeros.
    """
    sums = _tile_sums(tiles)
    if not jnp.issubdtype(sums.dtype, jnp.floating):
        return jax.ops.segment_sum(sums, layout.tile_row, layout.lengths.shape[0])
    return _add_tiles(sums, layout.tile_row, layout.lengths)


@jax.custom_jvp
def _add_tiles(sums: Array, tile_row: Array, lengths: Array) -> Array:
    """Adds the sums of tiles, ``[tiles]``, to those of rows, ``[B]``.

    Adding a long row's one after another in float32 would lose digits, so each is split into a part
    whose sum is exact and a small rest: what is left of it beside a number that no sum of the row's
    can outgrow, and what that number swallows (Rump, Ogita and Oishi 2008, "Accurate floating-point
    summation", algorithm 3.3).
    """
    rows = lengths.shape[0]
    largest = jax.ops.segment_max(jnp.abs(sums), tile_row, rows)
    coarse = _exact_part(sums, jnp.take(largest, tile_row, mode="clip"))
    parts = jax.ops.segment_sum(jnp.stack([coarse, sums - coarse], 1), tile_row, rows)
    return parts[:, 0] + parts[:, 1]


def _exact_part(sums: Array, largest: Array) -> Array:
    beyond = largest * (2 * sums.shape[-1])
    coarse = (beyond + sums) - beyond
    return jnp.where(jnp.isfinite(coarse), coarse, 0)


@_add_tiles.defjvp
def _add_tiles_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]
) -> tuple[Array, Array]:
    _, tile_row, lengths = primals
    return _add_tiles(*primals), jax.ops.segment_sum(tangents[0], tile_row, lengths.shape[0])


def totals(terms: Sequence[Array]) -> Array:
    """Sums everything in the tiles of each, as :func:`row_sums` sums a row.

    Args:
        terms: ``[tiles, TILE, ...]`` each, of one dtype.

    Returns:
        One number for each, ``[terms]``.
    """
    sums = jnp.stack([_tile_sums(tiles) for tiles in terms])
    return _add_all(sums) if jnp.issubdtype(sums.dtype, jnp.floating) else jnp.sum(sums, axis=1)


@jax.custom_jvp
def _add_all(sums: Array) -> Array:
    coarse = _exact_part(sums, jnp.max(jnp.abs(sums), axis=1, keepdims=True))
    return jnp.sum(coarse, axis=1) + jnp.sum(sums - coarse, axis=1)


@_add_all.defjvp
def _add_all_jvp(  # pyright: ignore[reportUnusedFunction]
    primals: tuple[Any], tangents: tuple[Any]
) -> tuple[Array, Array]:
    return _add_all(*primals), jnp.sum(tangents[0], axis=1)


def _tile_sums(tiles: Array) -> Array:
    """Sums each tile, in two levels: ``[tiles, TILE, ...]`` to ``[tiles]``."""
    lanes = tiles.reshape(tiles.shape[0], TILE // 16, -1)
    return lanes.sum(axis=2).sum(axis=1)
