"""The laws that a loss must obey, as functions that raise :class:`LawError`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax.errors import NonFiniteError
from mintjax.gradients import Objective, value_and_logprob_grads
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch
from mintjax.types import Datum, ModelInput

Array: TypeAlias = npt.NDArray[Any]
Rows: TypeAlias = Sequence[Array]
Reference: TypeAlias = Callable[[list[Mapping[str, Array]], list[Array], list[Array]], float]
"""``(columns of each datum, logprobs, at) -> loss`` in NumPy; see :func:`check_gradient`."""


class LawError(AssertionError):
    """An objective breaks a law; the message names the law, the datum and the token."""


def check_gradient(
    objective: Objective,
    data: Sequence[Datum],
    logprobs: Rows,
    *,
    reference: Reference | None = None,
    step: float = 1e-5,
    rtol: float = 1e-5,
) -> None:
    """Checks the gradient against central differences in float64.

    The differences are taken in one random direction, and at the token of the largest gradient.
    Where a loss has a kink within ``step``, any slope between those of its two sides is right.

    Args:
        objective: the objective.
        data: the datums.
        logprobs: the logprobs of their tokens.
        reference: the same loss, written independently in NumPy: ``(columns, logprobs, at) ->
            loss``, with a dict of float64 columns and two float64 arrays for each datum. Then the
            differences are those of the reference, and its value must be the objective's. ``at``
            holds the logprobs at which the gradient is taken; use it where the objective stops the
            gradient. Only a reference finds a wrong sign or a missing stop-gradient.
        step: the step of the difference, in nats.
        rtol: the tolerance, relative to ``sum_t |gradient_t * direction_t|``.

    Raises:
        LawError: the derivative or the value differs.
    """
    at = [np.asarray(row, np.float64) for row in logprobs]
    loss, grads = _evaluate(objective, data, at, "check_gradient")
    value = _differenced(objective, data, at, reference)
    centre = value(at)
    if not _close(loss, centre, 1e-9 * (1 + abs(centre))):
        raise LawError(f"check_gradient: the loss is {loss}, the reference says {centre}")
    sizes = [row.size for row in at]
    flat = np.concatenate([grad.ravel() for grad in grads])
    rng = np.random.default_rng(0)
    everywhere = np.where(np.isfinite(np.concatenate([a.ravel() for a in at])), 1.0, 0.0)
    steepest = int(np.argmax(np.abs(flat)))
    for direction in (
        everywhere * rng.uniform(-1, 1, flat.size),
        np.eye(1, flat.size, steepest)[0],
    ):
        steps = [
            d.reshape(row.shape) * step
            for d, row in zip(np.split(direction, np.cumsum(sizes)[:-1]), at, strict=True)
        ]
        after = value([a + s for a, s in zip(at, steps, strict=True)])
        before = value([a - s for a, s in zip(at, steps, strict=True)])
        slope = float(flat @ direction)
        sides = (after - centre) / step, (centre - before) / step
        room = rtol * float(np.abs(flat) @ np.abs(direction))
        room += 1e-15 * (abs(after) + abs(before) + abs(centre)) / step
        central = (after - before) / (2 * step)
        if abs(slope - central) <= room or min(sides) - room <= slope <= max(sides) + room:
            continue
        where = _where(data, logprobs, int(np.argmax(np.abs(direction))))
        raise LawError(
            f"check_gradient: the gradient gives a slope of {slope}, differences give {central} "
            f"(within {room:.2g}); the direction is steepest at {where}"
        )


def check_permutation(
    objective: Objective, data: Sequence[Datum], logprobs: Rows, *, block: int = 1
) -> None:
    """Checks that the order of datums does not matter: same loss, gradients in the new order.

    Args:
        objective: the objective.
        data: the datums.
        logprobs: the logprobs of their tokens.
        block: the number of datums that stay together: 2 for pairs, G for groups of G.

    Raises:
        LawError: the loss or a gradient changed.
    """
    order = np.random.default_rng(0).permutation(len(data) // block)
    if (order == np.arange(len(order))).all():
        order = order[::-1]
    rows = [block * int(b) + j for b in order for j in range(block)]
    loss, grads = _evaluate(objective, data, logprobs, "check_permutation")
    moved = [data[i] for i in rows], [logprobs[i] for i in rows]
    other, other_grads = _evaluate(objective, *moved, "check_permutation")
    back = dict(zip(rows, other_grads, strict=True))
    restored = [back[i] for i in sorted(back)]
    ways = ("as it is", "with the datums in another order")
    _same("check_permutation", data, logprobs, (loss, grads), (other, restored), ways)


def check_padding_invariance(objective: Objective, data: Sequence[Datum], logprobs: Rows) -> None:
    """Checks that other numbers in the padding between rows change nothing.

    Args:
        objective: the objective.
        data: the datums.
        logprobs: the logprobs of their tokens.

    Raises:
        LawError: the loss or a gradient changed.
    """
    plain = _evaluate(objective, data, logprobs, "check_padding_invariance")
    for fill in (-40.0, 3.0):
        other = _evaluate(_Refilled(objective, fill), data, logprobs, "check_padding_invariance")
        _same(
            "check_padding_invariance",
            data,
            logprobs,
            plain,
            other,
            ("as it is", "with other padding"),
        )


def check_masked_equals_removed(
    objective: Objective, data: Sequence[Datum], logprobs: Rows, *, mask: str = "weights"
) -> None:
    """Checks that a token whose mask is 0 counts as little as one that is not there.

    Its gradient must be 0, and all else must be as without it.

    Args:
        objective: the objective.
        data: the datums; one that is masked as a whole stays, with no token.
        logprobs: the logprobs of their tokens.
        mask: the column that is 0 where a token does not count.

    Raises:
        LawError: the loss or a gradient changed.
    """
    name = "check_masked_equals_removed"
    loss, grads = _evaluate(objective, data, logprobs, name)
    kept = [_present(datum, mask) for datum in data]
    without = [_only(datum, keep) for datum, keep in zip(data, kept, strict=True)]
    rows = [np.asarray(row)[keep] for row, keep in zip(logprobs, kept, strict=True)]
    other, other_grads = _evaluate(objective, without, rows, name)
    restored: list[Array] = []
    for grad, keep, there in zip(grads, kept, other_grads, strict=True):
        full = np.zeros_like(grad)
        full[keep] = there
        restored.append(full)
    _same(
        name,
        data,
        logprobs,
        (loss, grads),
        (other, restored),
        ("with the tokens masked", "with them removed"),
    )


def check_chunk_additivity(
    objective: Objective, data: Sequence[Datum], logprobs: Rows, *, block: int = 1
) -> None:
    """Checks that the loss of a batch is the sum of the losses of its parts.

    This holds for losses that sum over tokens or datums, and not for means.

    Args:
        objective: the objective.
        data: the datums.
        logprobs: the logprobs of their tokens.
        block: the number of datums that stay together.

    Raises:
        LawError: the loss is not the sum, or a gradient is another in a part.
    """
    cut = block * ((len(data) // block + 1) // 2)
    loss, grads = _evaluate(objective, data, logprobs, "check_chunk_additivity")
    total, parts = 0.0, list[Array]()
    for chunk in (slice(None, cut), slice(cut, None)):
        if data[chunk]:
            part = _evaluate(objective, data[chunk], logprobs[chunk], "check_chunk_additivity")
            total, parts = total + part[0], parts + part[1]
    _same(
        "check_chunk_additivity",
        data,
        logprobs,
        (loss, grads),
        (total, parts),
        ("as one batch", "as a sum over chunks"),
    )


def check_finite(objective: Objective, data: Sequence[Datum], logprobs: Rows) -> None:
    """Checks that loss, metrics and gradients are finite in float32.

    Args:
        objective: the objective.
        data: the datums.
        logprobs: the logprobs of their tokens.

    Raises:
        LawError: one is NaN or infinite.
    """
    rows = [np.asarray(row, np.float32) for row in logprobs]
    try:
        result = value_and_logprob_grads(objective, data, rows)
    except NonFiniteError as error:
        raise LawError(f"check_finite: {error}") from None
    bad = {name: value for name, value in result.metrics.items() if not np.isfinite(value).all()}
    if bad:
        raise LawError(f"check_finite: {bad}")


# Evaluating an objective


def _evaluate(
    objective: Objective, data: Sequence[Datum], logprobs: Rows, law: str
) -> tuple[float, list[Array]]:
    """Computes loss and gradients in float64, so that a law can compare ten digits."""
    with jax.enable_x64(True):
        rows = [np.asarray(row, np.float64) for row in logprobs]
        try:
            result = value_and_logprob_grads(objective, data, rows)
        except NonFiniteError as error:
            raise LawError(f"{law}: {error}") from None
    return result.loss, result.grads


def _differenced(
    objective: Objective, data: Sequence[Datum], at: list[Array], reference: Reference | None
) -> Callable[[list[Array]], float]:
    if reference is None:
        return lambda rows: _evaluate(objective, data, rows, "check_gradient")[0]
    columns: list[Mapping[str, Array]] = [
        {name: np.asarray(value, np.float64) for name, value in datum.loss_fn_inputs.items()}
        for datum in data
    ]
    return lambda rows: float(reference(columns, rows, at))


def _present(datum: Datum, mask: str) -> Array:
    keep = datum.loss_fn_inputs[mask].to_numpy() != 0
    return keep.any(axis=tuple(range(1, keep.ndim)))


def _only(datum: Datum, keep: Array) -> Datum:
    tokens = np.asarray(datum.model_input.to_ints(), np.int64)[keep]
    columns: Any = {
        name: value.to_numpy()[keep] if value.ndim else value
        for name, value in datum.loss_fn_inputs.items()
    }
    return Datum(ModelInput.from_ints(tokens), columns)


def _close(a: float, b: float, room: float) -> bool:
    return abs(a - b) <= room or a == b


def _same(
    law: str,
    data: Sequence[Datum],
    logprobs: Rows,
    expected: tuple[float, list[Array]],
    other: tuple[float, list[Array]],
    ways: tuple[str, str],
) -> None:
    flat, flat_other = (
        np.concatenate([g.ravel() for g in grads]) for _, grads in (expected, other)
    )
    # A sum in another order differs by rounding, relative to the size of its terms.
    room = 1e-9 * (1 + float(np.abs(flat).sum()))
    if not _close(expected[0], other[0], room + 1e-9 * abs(expected[0])):
        raise LawError(f"{law}: the loss is {expected[0]} {ways[0]} and {other[0]} {ways[1]}")
    off = np.abs(flat - flat_other) > 1e-9 * (np.abs(flat).max(initial=0.0) + 1e-6)
    if off.any():
        i = int(np.argmax(off))
        raise LawError(
            f"{law}: the gradient is {flat[i]} {ways[0]} and {flat_other[i]} {ways[1]}, at "
            f"{_where(data, logprobs, i)}"
        )


def _where(data: Sequence[Datum], logprobs: Rows, flat: int) -> str:
    """Describes a position among all tokens: its datum, its token, and the inputs there."""
    ends = np.cumsum([np.size(row) for row in logprobs])
    i = int(np.searchsorted(ends, flat, side="right"))
    row = np.asarray(logprobs[i])
    index = np.unravel_index(flat - int(ends[i]) + row.size, row.shape)
    inputs = {
        name: value.to_numpy()[index[: value.ndim]]
        for name, value in data[i].loss_fn_inputs.items()
        if name != "target_tokens"
    }
    shown = ", ".join(f"{name} {value}" for name, value in inputs.items())
    at = ", ".join(map(str, index))
    return f"datum {i}, position {at} (logprob {row[index]}, {shown})"


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Refilled:
    """An objective that gets other numbers in the padding."""

    inner: Objective
    fill: float

    @property
    def pad_rows_to(self) -> int | None:
        return getattr(self.inner, "pad_rows_to", None)

    def __call__(self, data: Batch, logprobs: Ragged) -> Any:
        columns = Batch.of_columns(data.names, len(data), lambda name: self._fill(data[name]))
        return self.inner(columns, self._fill(logprobs))

    def _fill(self, column: Any) -> Any:
        if not isinstance(column, Ragged):
            return column
        tiles = jnp.asarray(column.tiles)
        inside = tiling.widen(tiling.mask(column.layout), tiles)
        fill = jnp.asarray(self.fill).astype(tiles.dtype)
        return Ragged(jnp.where(inside, tiles, fill), column.layout)

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        if self._is_tree():
            return (self.inner, self.fill), None
        return (self.fill,), self.inner

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any, ...]) -> _Refilled:
        return cls(*children) if aux is None else cls(aux, *children)

    def _is_tree(self) -> bool:
        leaves = jax.tree_util.tree_leaves(self.inner)
        return not (len(leaves) == 1 and leaves[0] is self.inner)
