"""One datum as an objective sees it, for an objective that is a sum over datums.

Only what an objective does with each datum by itself is possible here. The number of datums and the
place of one among others cannot be read, so that nothing that depends on them is traced.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from mintjax.gradients import Objective
from mintjax.gradients.flat import flatten, symbolic_sizes
from mintjax.gradients.lengths import kind_of
from mintjax.objectives import WeightedSum
from mintjax.objectives._base import LossObjective
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch
from mintjax.step.server_loss import POINTWISE, RESHAPING, NotLowered, ServerLoss, lower
from mintjax.types import Datum

Array: TypeAlias = Any
LossOfDatum: TypeAlias = Callable[[Array, Mapping[str, Array]], Array]


class NotPerDatum(NotLowered):
    """An objective is not known to be a sum over datums; the message says why."""


def server_loss(objective: Objective, batch: Batch) -> ServerLoss:
    """Writes an objective as a loss that a trainer runs on each datum, and adds up.

    Args:
        objective: the objective, with the numbers that it has now.
        batch: the data, of which only the names, dtypes and trailing shapes of columns are read.

    Raises:
        NotLowered: it is not known to be a sum over datums, or does what a graph cannot say.
    """
    targets = batch.rows("target_tokens")[0]
    kinds = {name: kind for name in batch.names if (kind := kind_of(batch, name)) is not None}
    try:
        with jax.enable_x64(False), jax.transfer_guard("allow"):
            loss = loss_of_datum(objective, batch.names)
            name = getattr(objective, "__name__", type(objective).__name__)
            return lower(loss, kinds, targets.shape[1:], name)
    except NotLowered:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        first = (str(cause).splitlines() or [""])[0]
        raise NotLowered(f"{type(cause).__name__}: {first[:200]}") from error


def data_for(loss: ServerLoss, batch: Batch) -> list[Datum]:
    """Makes the datums that such a loss reads: their targets, and the columns among its inputs."""
    columns = {
        given.name: [_travelling(row) for row in batch.rows(name)]
        for name, given in zip(loss.columns, loss.inputs[1:], strict=True)
    }
    targets = batch.rows("target_tokens")
    return [
        Datum(
            datum.model_input,
            {"target_tokens": targets[i], **{name: rows[i] for name, rows in columns.items()}},
        )
        for i, datum in enumerate(batch)
    ]


def _travelling(row: Any) -> Array:
    array = np.asarray(row)
    return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)


def loss_of_datum(objective: Objective, names: frozenset[str]) -> LossOfDatum:
    """Gives the loss of one datum, whose sum over datums is the objective.

    It is one by the construction of mintjax's classes: the losses of tokens are computed datum by
    datum, and summed or divided by a number that is the same for all. What a class of a user's own
    overrides is not known to keep to this.

    Args:
        objective: the objective.
        names: of the columns that the batch has.

    Returns:
        A function of logprobs ``[T]`` or ``[T, K]`` and of columns by name, ``[T]``, ``[T, K]`` or
        ``[]``, for T of any size, also a symbolic one. It gives the loss, a scalar. It raises
        NotPerDatum, and whatever tracing raises, where the objective asks for something else.

    Raises:
        NotPerDatum: the objective is not known to be such a sum.
    """
    if isinstance(objective, WeightedSum):
        if type(objective) is not WeightedSum:
            raise NotPerDatum(f"{type(objective).__name__} is a class of its own")
        step = 0 if objective.step is None else objective.step
        weights = [weight(step) if callable(weight) else weight for weight in objective.weights]
        terms = [loss_of_datum(term, names) for term in objective.terms]

        def weighted(logprobs: Array, columns: Mapping[str, Array]) -> Array:
            parts = [
                jnp.asarray(weight, jnp.float32) * term(logprobs, columns)
                for weight, term in zip(weights, terms, strict=True)
            ]
            return sum(parts[1:], parts[0])

        return weighted
    if not isinstance(objective, LossObjective):
        raise NotPerDatum("only mintjax's own objectives are known to be sums over datums")
    coupling = objective.couples_datums
    if coupling is not None:
        raise NotPerDatum(coupling)
    _check_methods(type(objective))

    def value(logprobs: Array, columns: Mapping[str, Array]) -> Array:
        return objective(_OneDatum(names, columns), _OneRow(logprobs))[0]

    return value


_FREE = frozenset({"loss", "watch", "drawn", "builtin", "reward", "over_step", "pad_rows_to"})
"""The members that do not change how the losses of tokens become one."""


def _check_methods(kind: type[LossObjective]) -> None:
    """Checks that no class of a user's own changes how mintjax's computes the loss.

    Raises:
        NotPerDatum: one does, and does not say ``couples_datums`` itself.
    """
    for i, base in enumerate(kind.__mro__):
        if "couples_datums" in vars(base) or base.__module__.startswith("mintjax."):
            return
        for name, member in vars(base).items():
            changes = isinstance(member, types.FunctionType | property | classmethod | staticmethod)
            special = name.startswith("__") and name != "__call__"
            inherited = any(name in vars(above) for above in kind.__mro__[i + 1 :])
            if changes and inherited and not special and name not in _FREE:
                raise NotPerDatum(f"{base.__name__} has a method {name} of its own")


class _OneDatum(Batch):
    """A batch whose columns are those of one datum."""

    def __init__(self, names: frozenset[str], columns: Mapping[str, Array]) -> None:
        made = Batch.of_columns(names, 1, _reader(columns))
        vars(self).update(vars(made))

    def __len__(self) -> int:
        raise NotPerDatum("it asks for the number of datums")


def _reader(columns: Mapping[str, Array]) -> Callable[[str], Any]:
    def read(name: str) -> Any:
        if name not in columns:
            raise NotPerDatum(f"the datums differ in the kind of the column {name!r}")
        column = columns[name]
        return _OneRow(column) if column.ndim else column.reshape(1)

    return read


class _OneRow(Ragged):
    """One row, as a whole: ``[T]`` or ``[T, K]``, which holds nothing but tokens.

    What gives one value per row gives one number, ``[1]``.
    """

    __slots__ = ()

    def __init__(self, values: Array) -> None:
        super().__init__(values, cast("Any", None))

    @property
    def num_rows(self) -> int:
        _refuse("the number of datums")

    @property
    def lengths(self) -> Array:
        return self.count()

    @property
    def layout(self) -> Any:
        _refuse("the places of tokens in memory")

    @property
    def _layout(self) -> Any:
        _refuse("the places of tokens in memory")

    @property
    def row_mask(self) -> Array:
        _refuse("the number of datums")

    @property
    def trailing_shape(self) -> tuple[int, ...]:
        return tuple(self.tiles.shape[1:])

    def __repr__(self) -> str:
        return f"_OneRow({self.tiles.shape}, {self.dtype})"

    def map_terms(self, fn: Callable[..., Mapping[str, Array]], *others: Any) -> dict[str, Ragged]:
        inputs = [self.tiles, *(self._lift(other) for other in others)]
        _check_tokenwise(fn, inputs, self.tiles.shape[0])
        results = {name: jnp.asarray(term) for name, term in fn(*inputs).items()}
        if any(result.shape[:1] != self.tiles.shape[:1] for result in results.values()):
            raise TypeError("map needs a function that keeps one result per token")
        return {name: _OneRow(result) for name, result in results.items()}

    def astype(self, dtype: Any) -> Ragged:
        return _OneRow(jnp.asarray(self.tiles).astype(dtype))

    def _lift(self, other: Any) -> Array:
        if isinstance(other, Ragged):
            return self._align(other)
        if jnp.ndim(other) == 0:
            return other
        if jnp.shape(other) != (1,):
            raise NotPerDatum("it combines rows with an array that is not one value per datum")
        return jnp.reshape(other, (1,) * self.tiles.ndim)

    def _align(self, other: Ragged) -> Array:
        if not isinstance(other, _OneRow):
            raise NotPerDatum("it makes a Ragged of its own")
        tiles = jnp.asarray(other.tiles)
        return tiles[:, None] if tiles.ndim < self.tiles.ndim else tiles

    def _unary(self, op: Callable[[Array], Array]) -> Ragged:
        return _OneRow(op(self.tiles))

    def _binary(self, other: Any, op: Callable[[Array, Array], Array]) -> Ragged:
        lifted, mine = self._lift(other), jnp.asarray(self.tiles)
        if jnp.ndim(lifted) > mine.ndim:
            mine = mine[:, None]
        return _OneRow(op(mine, lifted))

    def _masked(self, where: Ragged | None, fill: Any) -> Array:
        where, tiles = self._checked(where), jnp.asarray(self.tiles)
        if where is None:
            return tiles
        keep = jnp.asarray(self._align(where)).astype(bool)
        return jnp.where(keep, tiles, jnp.asarray(fill, tiles.dtype))

    def sum(self, where: Ragged | None = None) -> Array:
        return jnp.sum(self._masked(where, 0)).reshape(1)

    def count(self, where: Ragged | None = None) -> Array:
        return _OneRow(jnp.ones(self.tiles.shape, jnp.int32)).sum(where)

    def total_terms(
        self, terms: Mapping[str, Ragged], where: Ragged | None = None
    ) -> dict[str, Array]:
        return {name: jnp.sum(term._masked(where, 0)) for name, term in terms.items()}

    def total_count(self, where: Ragged | None = None) -> Array:
        return jnp.sum(self.count(where))

    def max(self, where: Ragged | None = None) -> Array:
        return jnp.max(self._masked(where, -jnp.inf)).reshape(1)

    def min(self, where: Ragged | None = None) -> Array:
        return jnp.min(self._masked(where, jnp.inf)).reshape(1)

    def logsumexp(self, where: Ragged | None = None) -> Array:
        top = jax.lax.stop_gradient(self.max(where))
        shift = jnp.where(jnp.isfinite(top), top, 0)
        centred = _OneRow(self._masked(where, -jnp.inf)) - shift
        return jnp.log(centred.map(jnp.exp).sum()) + shift

    def cumsum(self, axis: int = -1) -> Ragged:
        _refuse("running sums")

    def quantile(self, q: Any, where: Ragged | None = None) -> Array:
        _refuse("quantiles")

    def first(self) -> Array:
        _refuse("the first token")

    def last(self) -> Array:
        _refuse("the last token")

    def _select(self, index: slice) -> Ragged:
        _refuse("the datums of a slice")

    def _row_tuple(self) -> tuple[Array, ...]:
        _refuse("rows one by one")

    def to_padded(self, mask: Array = None, *, length: int | None = None, fill: Any = 0) -> Array:
        _refuse("padded arrays")

    def tree_flatten(self) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        _refuse("the leaves of a Ragged")


def _refuse(what: str) -> NoReturn:
    raise NotPerDatum(f"it asks for {what}")


def _check_tokenwise(fn: Callable[..., Array], inputs: list[Array], tokens: Any) -> None:
    """Checks that a function treats every token by itself, as one for ``map`` must.

    Raises:
        NotPerDatum: it does something else along the axis of tokens.
    """
    flat = flatten(cast("Any", jax.make_jaxpr)(fn)(*inputs))
    for equation in flat.equations:
        given = [flat.avals[slot].shape for slot in equation.inputs]
        lengths = [shape[0] for shape in given if shape and symbolic_sizes(shape[:1])]
        if not lengths or equation.name in POINTWISE:
            continue
        if equation.name.startswith("reduce_") and 0 not in equation.params.get("axes", (0,)):
            continue
        written = flat.avals[equation.outputs[0]].shape[:1]
        dimensions = equation.params.get("broadcast_dimensions", (0,))
        if equation.name in RESHAPING and written == (lengths[0],) and dimensions[0] == 0:
            continue
        raise NotPerDatum(f"a loss of tokens does {equation.name} along the axis of tokens")
