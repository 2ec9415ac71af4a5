"""Computes XLA's gathers and scatters with NumPy.

Reference: https://openxla.org/xla/operation_semantics, "Gather" and "Scatter". An index that is out
of bounds is moved, filled in for, or dropped, as ``jax.lax.GatherScatterMode`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any


def gather(x: Array, at: Array, sizes: Sequence[int], numbers: Any, mode: Any, fill: Any) -> Array:
    """Takes windows out of an array.

    Args:
        x: the array.
        at: where each window begins, ``[..., axes]``.
        sizes: of a window along each axis.
        numbers: a ``jax.lax.GatherDimensionNumbers``.
        mode: ``PROMISE_IN_BOUNDS`` and ``CLIP`` move a window into the array, ``FILL_OR_DROP``
            fills it.
        fill: the number for that.
    """
    starts = _starts(
        at, x.ndim, numbers.start_index_map, _batched(numbers, numbers.start_indices_batching_dims)
    )
    starts, inside = _moved(starts, x.shape, sizes)
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(x.ndim) if axis not in dropped]
    batch = at.ndim - 1
    taken = x[_places(starts, window, sizes, batch)]
    if "FILL" in str(mode) and not inside.all():
        kept = inside.reshape(inside.shape + (1,) * len(window))
        taken = np.where(kept, taken, np.asarray(_filling(x.dtype, fill), x.dtype))
    return np.moveaxis(taken, range(batch, taken.ndim), numbers.offset_dims)


def scatter(put: Callable[[Array, Any, Array], None]) -> Callable[..., Array]:
    """Makes the rule of a scatter.

    Args:
        put: changes an array at an index by updates.

    Returns:
        A function of the array, the beginnings of windows ``[..., axes]``, the updates, a
        ``jax.lax.ScatterDimensionNumbers`` and the mode: ``CLIP`` moves a window into the array,
        others drop it.
    """

    def rule(x: Array, at: Array, updates: Array, numbers: Any, mode: Any) -> Array:
        batch = at.ndim - 1
        updates = np.moveaxis(
            updates, numbers.update_window_dims, range(batch, cast("int", updates.ndim))
        )
        dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        window = [axis for axis in range(x.ndim) if axis not in dropped]
        sizes = [1] * x.ndim
        for axis, size in zip(window, updates.shape[batch:], strict=True):
            sizes[axis] = size
        batched = _batched(numbers, numbers.scatter_indices_batching_dims)
        starts = _starts(at, x.ndim, numbers.scatter_dims_to_operand_dims, batched)
        starts, inside = _moved(starts, x.shape, sizes)
        out = np.array(x)
        if "CLIP" not in str(mode) and not inside.all():
            starts, updates, batch = [start[inside] for start in starts], updates[inside], 1
        if updates.size:
            put(out, _places(starts, window, sizes, batch), updates)
        return out

    return rule


def _batched(numbers: Any, along: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(numbers.operand_batching_dims, along, strict=True))


def _starts(
    at: Array, rank: int, axes: Sequence[int], batched: Sequence[tuple[int, int]]
) -> list[npt.NDArray[np.int64]]:
    """Lists where windows begin along each axis of the array."""
    shape = at.shape[:-1]
    starts = [np.zeros(shape, np.int64) for _ in range(rank)]
    for k, axis in enumerate(axes):
        starts[axis] = at[..., k].astype(np.int64)
    for axis, along in batched:
        counted = cast("Array", np.arange(shape[along])).reshape(
            [-1 if d == along else 1 for d in range(len(shape))]
        )
        starts[axis] = np.broadcast_to(counted, shape)
    return starts


def _moved(
    starts: Sequence[npt.NDArray[np.int64]], shape: Sequence[int], sizes: Sequence[int]
) -> tuple[list[npt.NDArray[np.int64]], npt.NDArray[np.bool_]]:
    """Moves windows into the array, and tells which lay there."""
    inside = np.ones(starts[0].shape, np.bool_)
    moved: list[npt.NDArray[np.int64]] = []
    for start, length, size in zip(starts, shape, sizes, strict=True):
        last = length - size
        if last < 0:
            raise IndexError(f"a window of {size} does not fit an axis of {length}")
        moved.append(np.minimum(np.maximum(start, 0), last))
        inside &= moved[-1] == start
    return moved, inside


def _places(
    starts: Sequence[npt.NDArray[np.int64]], window: Sequence[int], sizes: Sequence[int], batch: int
) -> tuple[Array, ...]:
    """Makes an index for windows: of an array of the shape of ``starts`` and of the window."""
    places: list[Array] = []
    for axis, start in enumerate(starts):
        place = start.reshape(start.shape + (1,) * len(window))
        if axis in window:
            along = [1] * (batch + len(window))
            along[batch + window.index(axis)] = sizes[axis]
            place = place + np.arange(sizes[axis]).reshape(along)
        places.append(place)
    return tuple(places)


def _filling(dtype: Any, fill: Any) -> Any:
    """Returns the number that JAX fills in, if none is given."""
    if fill is not None:
        return fill
    if dtype.kind == "b":
        return True
    if dtype.kind in "iu":
        return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max
    return np.nan
