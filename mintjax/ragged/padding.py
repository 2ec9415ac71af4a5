"""Padded arrays as rows in tiles, and back.

A padded array ``[B, T]`` becomes a buffer in which every row has the same number of tiles, so that
its shape is known although lengths are traced. What stands at padding is overwritten by the row's
own first token: no function meets it, whatever it is, and no derivative reaches it.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mintjax.ragged.tiling import TILE, Layout
from mintjax.tensors import numbers_of

Array = Any  # a NumPy array, a JAX array or a tracer


class Places(NamedTuple):
    """The places of the tokens of padded arrays ``[B, T]``.

    Args:
        layout: of the rows in tiles.
        order: the position of each row's first token, of its second, ..., int ``[B, T]``; None
            where these are the first positions.
        valid: which rows have a length that is possible, bool ``[B]``; None where all have.
    """

    layout: Layout
    order: Array | None
    valid: Array | None


def places(shape: tuple[int, int], mask: Array = None, lengths: Array = None) -> Places:
    """Finds where the tokens of padded arrays are.

    Args:
        shape: ``(B, T)``.
        mask: marks the tokens, bool or integer ``[B, T]``, anywhere in a row; or, as integers
            ``[B]``, the lengths.
        lengths: how many tokens stand at the beginning of each row, integers ``[B]``.

    Raises:
        ValueError: neither or both are given, one is of another shape or dtype, or a length that is
            not traced is negative or above T.
    """
    if (mask is None) == (lengths is None):
        raise ValueError(
            "tell padding from tokens: give either a mask [B, T], true at tokens, or lengths [B], "
            "the number of tokens at the beginning of each row"
        )
    given = as_array(lengths if mask is None else mask)
    if mask is not None and given.shape == shape:
        if given.dtype.kind not in "bi" and given.dtype.kind != "u":
            raise ValueError(
                f"a mask is boolean or 0 and 1 in an integer dtype, not {given.dtype}, because a "
                "fraction of a token has no meaning; pass weights as a column"
            )
        return _by_mask(given, shape)
    if given.shape != shape[:1] or given.dtype.kind not in "iu":
        what = "lengths are integers [B]"
        if mask is not None:
            what = f"a mask is boolean [B, T] = {list(shape)}, and " + what
        raise ValueError(f"{what}; these are {given.dtype} {list(given.shape)}")
    return _by_lengths(given, shape[1])


def _by_mask(mask: Array, shape: tuple[int, int]) -> Places:
    known = _value(mask)
    if known is not None:
        mask = known
        if known.dtype.kind != "b" and not np.isin(known, (0, 1)).all():
            raise ValueError("a mask in an integer dtype holds 0 and 1 only")
        counts = (known != 0).sum(axis=1)
        if ((known != 0) == (np.arange(shape[1]) < counts[:, None])).all():
            return _by_lengths(counts, shape[1])
    real, xp = mask != 0, _library(mask)
    order = (
        np.argsort(~real, axis=1, kind="stable")
        if xp is np
        else jnp.argsort(~real, axis=1, stable=True)
    )
    counts = xp.sum(real, axis=1, dtype=xp.int32)
    return Places(_layout(counts, shape[1]), order, None)


def _by_lengths(lengths: Array, width: int) -> Places:
    known = _value(lengths)
    if known is None:
        lengths = lengths.astype(jnp.int32)
        valid = (lengths >= 0) & (lengths <= width)
        # An impossible row counts as full, so that the NaN put into it is seen.
        lengths = jnp.where(valid, lengths, jnp.int32(width))
        return Places(_layout(lengths, width), None, valid)
    if ((known < 0) | (known > width)).any():
        i = int(np.argmax((known < 0) | (known > width)))
        raise ValueError(f"row {i} is {known[i]} tokens long, of {width} positions")
    return Places(_layout(known, width), None, None)


def _layout(lengths: Array, width: int) -> Layout:
    """Lays rows of at most ``width`` tokens out, each in as many tiles as the longest may need."""
    xp = _library(lengths)
    rows, tiles = lengths.shape[0], -(-width // TILE)
    lengths = lengths.astype(xp.int32)
    own = np.repeat(np.arange(rows, dtype=np.int32), tiles)
    first = np.tile(np.arange(tiles, dtype=np.int32) * TILE, rows)
    count = xp.clip(lengths[own] - first, -TILE, TILE)
    # A row without a token counts as the longest, whose token it is filled with.
    row = xp.where(lengths[own] > 0, own, xp.argmax(lengths).astype(xp.int32))
    start = np.arange(rows, dtype=np.int32) * (tiles * TILE)
    layout = Layout(lengths, start, row, count)
    layout.width = width
    return layout


def check_padded(values: Array, name: str = "values") -> Array:
    """Returns a padded array as an array.

    Raises:
        ValueError: it is not of shape ``[B, T]`` or ``[B, T, K]``, with at least one row and one
            position; or it holds an integer that JAX would wrap.
    """
    array = as_array(values)
    if array.ndim not in (2, 3) or 0 in array.shape[:2]:
        raise ValueError(f"{name} must be a padded array [B, T] or [B, T, K], not {array.shape}")
    return narrow(array, name)


def narrow(array: Array, name: str) -> Array:
    """Converts 64-bit integers of NumPy's to the 32 bits that JAX has.

    Raises:
        ValueError: one does not fit.
    """
    dtype: Any = jax.dtypes.canonicalize_dtype(array.dtype)
    if isinstance(array, jax.Array) or array.dtype.kind not in "iu" or dtype == array.dtype:
        return array
    bounds = np.iinfo(dtype)
    if array.size and (array.min() < bounds.min or array.max() > bounds.max):
        raise ValueError(
            f"{name} holds an integer beyond 32 bits, which JAX would wrap; number the ids anew "
            'from 0, or call jax.config.update("jax_enable_x64", True)'
        )
    return array.astype(dtype)


def to_tiles(values: Array, where: Places) -> Array:
    """Lays a padded array ``[B, T, ...]`` into tiles, ``[tiles, TILE, ...]``."""
    layout, order, valid = where
    xp = _library(values, layout.lengths, order)
    values = xp.asarray(values)
    rows, width, *trailing = values.shape
    ones = (1,) * len(trailing)
    if order is not None:
        values = xp.take_along_axis(values, order.reshape(rows, width, *ones), axis=1)
    lengths = xp.asarray(layout.lengths)
    own = np.arange(rows, dtype=np.int32)
    has_token = lengths > 0
    first = values[:, 0][xp.where(has_token, own, xp.argmax(lengths).astype(xp.int32))]
    zero = xp.zeros((), values.dtype)
    first = xp.where(has_token.any(), first, zero)
    first = first if xp is np else jax.lax.stop_gradient(first)
    real = (_numbers(width) < lengths[:, None]).reshape(rows, width, *ones)
    values = xp.where(real, values, first[:, None])
    if valid is not None and jnp.issubdtype(values.dtype, jnp.inexact):
        nan = jnp.asarray(jnp.nan, values.dtype)
        values = jnp.where(valid.reshape(rows, 1, *ones), values, nan)
    gap = xp.broadcast_to(first[:, None], (rows, -width % TILE, *trailing))
    return xp.concatenate([values, gap], axis=1).reshape(-1, TILE, *trailing)


def from_tiles(
    tiles: Array, layout: Layout, *, mask: Array = None, length: int | None = None, fill: Any = 0
) -> Array:
    """Gives rows in tiles as a padded array ``[B, T, ...]``.

    Args:
        tiles: ``[tiles, TILE, ...]``.
        layout: of the rows.
        mask: where to put the tokens, ``[B, T]``; at the beginning of each row if None.
        length: T, where there is no mask; that of the padded arrays the rows came from if None, and
            that of the longest row if they came from elsewhere.
        fill: what stands at padding.

    Raises:
        ValueError: rows are longer than ``length``, or do not fill the mask.
        TypeError: lengths are traced, and T is not known, or a row that does not fit could not be
            marked because the dtype has no NaN.
    """
    xp = _library(tiles, layout.lengths, mask)
    if (
        not isinstance(fill, jax.core.Tracer)
        and tiles.dtype.kind in "iub"
        and fill != int(np.nan_to_num(fill))
    ):
        raise ValueError(f"fill={fill} is no {tiles.dtype}, in which the rows are")
    lengths = xp.asarray(layout.lengths)
    if mask is None:
        rank = _numbers(_width(layout, length))
        where = rank < lengths[:, None]
        fits = lengths <= rank.shape[1]
        sure = layout.width is not None and rank.shape[1] >= layout.width
    else:
        if length is not None:
            raise ValueError("give either a mask or a length; the mask's second axis is the length")
        where = as_array(mask) != 0
        if where.ndim != 2 or where.shape[0] != lengths.shape[0]:
            raise ValueError(f"a mask [B, T] of {lengths.shape[0]} rows, not {where.shape}")
        rank = xp.cumsum(where, axis=1, dtype=xp.int32) - 1
        fits, sure = lengths == xp.sum(where, axis=1, dtype=xp.int32), False
    known = _value(fits)
    if known is not None and not known.all():
        i = int(np.argmin(known))
        room = rank.shape[1] if mask is None else "another number of"
        raise ValueError(
            f"row {i} has {np.asarray(lengths)[i]} tokens, which {room} places do not fit"
        )
    position = layout.row_start[:, None] + xp.clip(rank, 0, xp.maximum(lengths - 1, 0)[:, None])
    flat = xp.asarray(tiles).reshape(-1, *tiles.shape[2:])
    ones = (1,) * (flat.ndim - 1)
    found = flat[position] if xp is np else jnp.take(flat, position, axis=0, mode="clip")
    padded = xp.where(where.reshape(*where.shape, *ones), found, xp.asarray(fill, found.dtype))
    if known is not None or sure:
        return padded
    if not jnp.issubdtype(padded.dtype, jnp.inexact):
        raise TypeError(
            "lengths are traced, so that a row that does not fit could not be marked in "
            f"{padded.dtype}, which holds no NaN; convert the Ragged with .astype(jnp.float32), or "
            "give length= at least that of the padded arrays it came from"
        )
    nan = jnp.asarray(jnp.nan, padded.dtype)
    return jnp.where(fits.reshape(-1, 1, *ones), padded, nan)


def _numbers(count: int) -> Array:
    """Counts from 0 on, int32 ``[1, count]``."""
    return cast("Any", np.arange(count, dtype=np.int32)[None, :])


def _width(layout: Layout, length: int | None) -> int:
    if length is not None:
        return operator.index(length)
    if layout.width is not None:
        return layout.width
    known = _value(layout.lengths)
    if known is None:
        raise TypeError("lengths are traced, so give the length T of the padded array: length=T")
    return max(1, int(known.max()))


def as_array(values: Any) -> Array:
    """Returns an array as it is, and a list or another library's tensor as an array.

    Raises:
        DataError: a masked array hides a number.
    """
    values = values if isinstance(values, jax.Array) else numbers_of(values)
    return cast("Any", values if hasattr(values, "shape") else np.asarray(values))


def _library(*arrays: Array) -> Any:
    """Chooses NumPy where nothing is JAX's."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _value(array: Array) -> Any:
    """Gives the value of an array as NumPy's, or None where it is traced."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)
