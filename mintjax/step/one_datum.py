"""Datums as an objective sees them, for one that is a sum over datums of what each alone makes.

Only what an objective does with each datum by itself is possible here. The place of a datum among
others cannot be read. What an objective is made of is looked at with a number of datums that is a
symbol; what a trainer is to run is the same with one datum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from mintjax.gradients import Objective
from mintjax.gradients.flat import flatten, is_symbolic
from mintjax.gradients.lengths import kind_of, no_choices_by
from mintjax.objectives import WeightedSum
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch
from mintjax.step.additive import Other, ways
from mintjax.step.server_loss import (
    POINTWISE,
    RESHAPING,
    Kind,
    NotLowered,
    ServerLoss,
    lower,
    narrow,
)
from mintjax.types import Datum

Array: TypeAlias = Any
LossOfDatums: TypeAlias = Callable[[Array, Mapping[str, Array]], tuple[Array, Mapping[str, Any]]]
"""Of logprobs ``[B, T]`` or ``[B, T, K]``, and of columns by name, ``[B, T]``, ``[B, T, K]`` or
``[B]``, with datums of T tokens each: the loss, and metrics."""


class NotPerDatum(NotLowered):
    """An objective is not a sum over datums; the message says why."""


def server_loss(objective: Objective, batch: Batch) -> ServerLoss:
    """Writes an objective as a loss that a trainer runs on each datum, and adds up.

    Args:
        objective: the objective, with the numbers that it has now.
        batch: the data, of which only the names, dtypes and trailing shapes of columns are read.

    Returns:
        The loss. Its metrics are those of the objective that are sums or means over datums.

    Raises:
        NotLowered: it is not a sum over datums, or does what a graph cannot say.
    """
    candidates = batch.rows("target_tokens")[0].shape[1:]
    kinds = {name: kind for name in batch.names if (kind := kind_of(batch, name)) is not None}
    try:
        with jax.enable_x64(False), jax.transfer_guard("allow"):
            loss = _of_datums(objective, batch.names)
            metrics = _metrics_of_sum(loss, kinds, candidates)
            name = getattr(objective, "__name__", type(objective).__name__)
            try:
                return lower(_of_one(loss, metrics), kinds, candidates, name)
            except NotLowered:  # perhaps for a metric's sake
                return lower(_of_one(loss, {}), kinds, candidates, name)
    except Exception as error:
        raise _refusal(objective, error) from error


def _refusal(objective: Objective, error: Exception) -> NotLowered:
    known = getattr(objective, "couples_datums", None)
    if isinstance(known, str) and not isinstance(objective, WeightedSum):
        return NotPerDatum(known)
    if isinstance(error, NotLowered):
        return error
    cause = error.__cause__ or error
    first = (str(cause).splitlines() or [""])[0]
    return NotLowered(f"{type(cause).__name__}: {first[:200]}")


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


def _of_datums(objective: Objective, names: frozenset[str]) -> LossOfDatums:
    """Gives an objective as a function of arrays.

    Args:
        objective: the objective. The weights of a weighted sum are read at its step.
        names: of the columns that the batch has.
    """
    if isinstance(objective, WeightedSum) and type(objective) is WeightedSum:
        summed, step = objective, 0 if objective.step is None else objective.step
        weights = [weight(step) if callable(weight) else weight for weight in summed.weights]
        terms = [_of_datums(term, names) for term in summed.terms]

        def weighted(
            logprobs: Array, columns: Mapping[str, Array]
        ) -> tuple[Array, Mapping[str, Any]]:
            parts: list[Array] = []
            metrics: dict[str, Any] = {}
            for name, weight, term in zip(summed.names, weights, terms, strict=True):
                value, reported = term(logprobs, columns)
                parts.append(jnp.asarray(weight, jnp.float32) * value)
                metrics |= {f"{name}/{key}": metric for key, metric in reported.items()}
            return sum(parts[1:], parts[0]), metrics

        return weighted

    def value(logprobs: Array, columns: Mapping[str, Array]) -> tuple[Array, Mapping[str, Any]]:
        returned: Any = objective(_Datums(names, columns), cast("Any", _Rows(logprobs)))
        loss, metrics = returned
        if jnp.shape(loss) != ():
            raise NotPerDatum("its loss is no scalar")
        return jnp.asarray(loss), metrics

    return value


def _metrics_of_sum(
    loss: LossOfDatums, kinds: Mapping[str, Kind], candidates: tuple[int, ...]
) -> dict[str, str]:
    """Shows that a loss is a sum over datums, and finds which metrics are sums or means of them.

    Both the value and the gradient are looked at, because a function may have a derivative of its
    own, which could mix datums.

    Returns:
        By the name of a metric in the objective, the one that it has on the trainer.

    Raises:
        NotPerDatum: the loss is no such sum.
        Exception: whatever the objective raises.
    """
    datums, tokens = export.symbolic_shape("b, n")

    def shaped(kind: Kind) -> Any:
        trailing, dtype = kind
        shape = (datums,) if trailing is None else (datums, tokens, *trailing)
        return jax.ShapeDtypeStruct(shape, narrow(dtype))

    names: list[str] = []

    def value(logprobs: Array, columns: Mapping[str, Array]) -> tuple[Array, list[Array]]:
        found, metrics = loss(logprobs, columns)
        scalars = {str(name): metric for name, metric in metrics.items() if jnp.shape(metric) == ()}
        names[:] = scalars
        return found, [jnp.asarray(metric) for metric in scalars.values()]

    make = cast("Any", jax.make_jaxpr(jax.value_and_grad(value, has_aux=True)))
    logprobs = jax.ShapeDtypeStruct((datums, tokens, *candidates), np.float32)
    with no_choices_by(datums):
        flat = flatten(make(logprobs, {name: shaped(kind) for name, kind in kinds.items()}))
    whole, *others, gradient = ways(flat, str(datums))
    for way, expected in ((whole, "sum"), (gradient, "each")):
        if isinstance(way, Other):
            raise NotPerDatum(way.why)
        if way != expected:
            raise NotPerDatum(f"it is no sum over datums but a {way}")
    endings = {"sum": "sum", "count": "sum", "mean": "mean"}
    return {
        name: f"custom/{name}:{endings[way]}"
        for name, way in zip(names, others, strict=True)
        if not isinstance(way, Other) and way in endings and _METRIC.fullmatch(name)
    }


_METRIC = re.compile(r"(?!loss$)[a-z0-9_./-]{1,64}")
"""The names that a metric may have there; ``loss`` is that of the loss itself."""


def _of_one(
    loss: LossOfDatums, metrics: Mapping[str, str]
) -> Callable[[Array, Mapping[str, Array]], tuple[Array, dict[str, Array]]]:
    """Gives what one datum makes of a loss and of some metrics."""

    def value(logprobs: Array, columns: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        found, reported = loss(
            jnp.expand_dims(logprobs, 0),
            {name: jnp.expand_dims(column, 0) for name, column in columns.items()},
        )
        return found, {
            there: jnp.asarray(reported[name], jnp.float32) for name, there in metrics.items()
        }

    return value


class _Datums(Batch):
    """A batch of B datums that are all of T tokens."""

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
        return _Rows(column) if column.ndim > 1 else column

    return read


class _Rows(Ragged):
    """Rows of T tokens each, ``[B, T]`` or ``[B, T, K]``, which hold nothing but tokens."""

    __slots__ = ()

    def __init__(self, values: Array) -> None:
        super().__init__(values, cast("Any", None))

    @property
    def num_rows(self) -> int:
        _refuse("the number of datums")

    @property
    def lengths(self) -> Array:
        return _Rows(jnp.ones(self.tiles.shape[:2], jnp.int32)).sum()

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
        return tuple(self.tiles.shape[2:])

    def __repr__(self) -> str:
        return f"_Rows({self.tiles.shape}, {self.dtype})"

    def map_terms(self, fn: Callable[..., Mapping[str, Array]], *others: Any) -> dict[str, Ragged]:
        inputs = [self.tiles, *(self._lift(other) for other in others)]
        _check_tokenwise(lambda *tiles: list(fn(*tiles).values()), inputs)
        results = {name: jnp.asarray(term) for name, term in fn(*inputs).items()}
        if any(result.shape[:2] != self.tiles.shape[:2] for result in results.values()):
            raise TypeError("map needs a function that keeps one result per token")
        return {name: _Rows(result) for name, result in results.items()}

    def astype(self, dtype: Any) -> Ragged:
        return _Rows(jnp.asarray(self.tiles).astype(dtype))

    def _lift(self, other: Any) -> Array:
        if isinstance(other, Ragged):
            return self._align(other)
        if jnp.ndim(other) == 0:
            return other
        if jnp.shape(other) != self.tiles.shape[:1]:
            raise NotPerDatum("it combines rows with an array that is not one value per datum")
        return jnp.expand_dims(other, range(1, self.tiles.ndim))

    def _align(self, other: Ragged) -> Array:
        if not isinstance(other, _Rows):
            raise NotPerDatum("it makes a Ragged of its own")
        tiles = jnp.asarray(other.tiles)
        return tiles[..., None] if tiles.ndim < self.tiles.ndim else tiles

    def _unary(self, op: Callable[[Array], Array]) -> Ragged:
        return _Rows(op(self.tiles))

    def _binary(self, other: Any, op: Callable[[Array, Array], Array]) -> Ragged:
        lifted, mine = self._lift(other), jnp.asarray(self.tiles)
        if jnp.ndim(lifted) > mine.ndim:
            mine = mine[..., None]
        return _Rows(op(mine, lifted))

    def _masked(self, where: Ragged | None, fill: Any) -> Array:
        where, tiles = self._checked(where), jnp.asarray(self.tiles)
        if where is None:
            return tiles
        keep = jnp.asarray(self._align(where)).astype(bool)
        return jnp.where(keep, tiles, jnp.asarray(fill, tiles.dtype))

    def sum(self, where: Ragged | None = None) -> Array:
        return _over_row(jnp.sum, self._masked(where, 0))

    def count(self, where: Ragged | None = None) -> Array:
        return _Rows(jnp.ones(self.tiles.shape, jnp.int32)).sum(where)

    def total_terms(
        self, terms: Mapping[str, Ragged], where: Ragged | None = None
    ) -> dict[str, Array]:
        return {name: jnp.sum(term._masked(where, 0)) for name, term in terms.items()}

    def total_count(self, where: Ragged | None = None) -> Array:
        return jnp.sum(self.count(where))

    def max(self, where: Ragged | None = None) -> Array:
        return _over_row(jnp.max, self._masked(where, -jnp.inf))

    def min(self, where: Ragged | None = None) -> Array:
        return _over_row(jnp.min, self._masked(where, jnp.inf))

    def logsumexp(self, where: Ragged | None = None) -> Array:
        top = jax.lax.stop_gradient(self.max(where))
        shift = jnp.where(jnp.isfinite(top), top, 0)
        centred = _Rows(self._masked(where, -jnp.inf)) - shift
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


def _over_row(reduce: Callable[..., Array], values: Array) -> Array:
    return reduce(values, axis=tuple(range(1, values.ndim)))


def _check_tokenwise(fn: Callable[..., Any], inputs: list[Array]) -> None:
    """Checks that a function treats every token by itself, as one for ``map`` must.

    Raises:
        NotPerDatum: it does something else along the axis of tokens.
    """
    flat = flatten(cast("Any", jax.make_jaxpr)(fn)(*inputs))
    for equation in flat.equations:
        shapes = [flat.avals[slot].shape for slot in equation.inputs]
        rows = [shape[:2] for shape in shapes if len(shape) > 1 and is_symbolic(shape[1])]
        if not rows or equation.name in POINTWISE:
            continue
        if equation.name.startswith("reduce_") and not {0, 1} & {*equation.params.get("axes", ())}:
            continue
        written = flat.avals[equation.outputs[0]].shape[:2]
        dimensions = equation.params.get("broadcast_dimensions", (0, 1))
        if equation.name in RESHAPING and written == rows[0] and tuple(dimensions[:2]) == (0, 1):
            continue
        raise NotPerDatum(f"a loss of tokens does {equation.name} along the axis of tokens")
