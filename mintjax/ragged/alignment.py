"""Brings what stands beside rows in tiles to the places of these rows."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mintjax.ragged import tiling
from mintjax.ragged.tiling import Layout

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer


def lift(value: Any, tiles: Array, layout: Layout) -> Array:
    """Brings a scalar, or one value per row, to a shape that broadcasts against tiles.

    Args:
        value: a scalar, or an array ``[B]``.
        tiles: of the B rows.
        layout: of these rows.

    Raises:
        TypeError: it is a list.
        ValueError: it is an array of another shape, or lies on other devices.
    """
    if isinstance(value, (list, tuple)):
        raise TypeError(
            "combine a Ragged with another Ragged, a scalar or an array [B]: for a list, "
            "Ragged.from_rows(rows) gives one value per token, jnp.asarray(values) one per row"
        )
    if np.ndim(value) == 0:
        return value
    per_row, num_rows = jnp.asarray(value), int(layout.lengths.shape[0])
    if per_row.shape != (num_rows,):
        raise ValueError(
            f"an array beside a Ragged of {num_rows} rows must hold one value per row, "
            f"shape ({num_rows},), not {per_row.shape}"
        )
    check_devices(tiles, per_row)
    return tiling.widen(tiling.to_tiles(per_row, layout)[:, None], tiles)


def align(theirs: Array, source: Layout, tiles: Array, layout: Layout) -> Array:
    """Brings tiles of other rows of the same lengths to the places of these.

    Args:
        theirs: tiles of the other rows.
        source: their layout.
        tiles: of these rows.
        layout: of these rows.

    Returns:
        What broadcasts against ``tiles``.

    Raises:
        ValueError: the lengths differ, cannot be compared, or the arrays lie on several devices.
    """
    check_devices(tiles, theirs)
    if not layout.agrees_with(source):
        if layout.lengths.shape != source.lengths.shape:
            raise ValueError(
                f"{layout.lengths.shape[0]} rows do not combine with {source.lengths.shape[0]}"
            )
        traced = any(isinstance(x, jax.core.Tracer) for x in (layout.lengths, source.lengths))
        same = layout.tile_row.shape == source.tile_row.shape
        if not traced:
            a, b = np.asarray(layout.lengths), np.asarray(source.lengths)
            if (a != b).any():
                i = int(np.argmax(a != b))
                raise ValueError(f"row {i} has {a[i]} tokens here and {b[i]} there")
            same = same and np.array_equal(layout.row_start, source.row_start)
        elif not same:
            raise ValueError(
                "rows of different lengths do not combine, nor do those of padded arrays of "
                "different T, or padded and other rows, while their lengths are traced"
            )
        if traced or not same:
            theirs = tiling.move(theirs, source, layout)
    return tiling.widen(theirs, tiles) if theirs.ndim < tiles.ndim else theirs


def poison(result: Array, layout: Layout, other: Layout) -> Array:
    """Puts NaN into rows whose lengths differ from another's, where one of both is traced.

    Args:
        result: tiles that were computed from both.
        layout: of the result.
        other: the layout of the other operand.

    Raises:
        TypeError: the lengths cannot be compared before the program runs, and the result has a
            dtype that holds no NaN.
    """
    lengths = layout.lengths, other.lengths
    if layout.agrees_with(other) or not any(isinstance(n, jax.core.Tracer) for n in lengths):
        return result
    if not jnp.issubdtype(result.dtype, jnp.inexact):
        raise TypeError(
            f"the lengths of both Ragged are traced, so that a mismatch could not be seen "
            f"in a result of dtype {result.dtype}. Give both the same layout: compute one "
            "from the other, or pass one and read the other as a column of the batch; or "
            "convert one with .astype(jnp.float32) and combine the floats."
        )
    same = tiling.to_tiles(lengths[0] == lengths[1], layout)
    nan = jnp.asarray(jnp.nan, result.dtype)
    return jnp.where(same.reshape(-1, *(1,) * (result.ndim - 1)), result, nan)


def check_devices(*arrays: Array, whole: bool = False) -> None:
    """Refuses arrays that do not lie on the same devices.

    Args:
        arrays: of which those that are not traced are looked at.
        whole: whether each must lie on one device as a whole.

    Raises:
        ValueError: names the devices.
    """
    placed: list[set[Any]] = [
        array.devices()
        for array in arrays
        if isinstance(array, jax.Array)
        and not isinstance(array, jax.core.Tracer)
        and array.committed
    ]
    if any(devices != placed[0] or (whole and len(devices) > 1) for devices in placed):
        names = ", ".join(sorted({str(device) for devices in placed for device in devices}))
        raise ValueError(
            f"the rows of a Ragged lie on several devices ({names}); bring them to one by "
            "jax.device_put, or give padded arrays that are sharded over their rows to "
            "Ragged.from_padded"
        )
