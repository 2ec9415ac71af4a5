"""What an objective is: a frozen value that reads columns and gives a scalar with metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp

from mintjax.errors import DataError
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch, as_batch
from mintjax.types import Datum, LossFnName

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer
Metrics: TypeAlias = Mapping[str, Array]


class LossObjective:
    """A loss as a function of a batch and the logprobs of its tokens.

    It is a value: frozen, comparable, printable, and a JAX pytree whose numbers are leaves. They
    are traced, so an objective with another threshold runs the same compiled program.
    """

    row_multiple: ClassVar[int | None] = 1
    """That the batch may be padded with empty rows, to a multiple of so many; see
    ``Ragged.row_mask``."""

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """The name and config under which a trainer computes the same loss, if there are such."""
        return None

    def __call__(
        self, data: Batch | Sequence[Datum], logprobs: Ragged | Sequence[Array]
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of a batch, and what to watch.

        Args:
            data: the datums, with the columns that this objective reads.
            logprobs: of each datum's target tokens, in nats, ``[T_i]`` or ``[T_i, K]`` each.

        Returns:
            A scalar, and scalars by name.

        Raises:
            DataError: a column is missing, or the batch does not divide as it must.
        """
        rows = logprobs if isinstance(logprobs, Ragged) else Ragged.from_rows(logprobs)
        return self.evaluate(as_batch(data), rows)

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """:meth:`__call__`, of ``data`` as a Batch and ``logprobs`` as a Ragged."""
        raise NotImplementedError

    def column(self, data: Batch, name: str) -> Any:
        """The column ``name`` of the data.

        Raises:
            DataError: a datum lacks it; the message names the column and this objective.
        """
        me = type(self).__name__
        if name not in data:
            raise DataError(
                f"the objective {me} reads it; add it to loss_fn_inputs of every datum",
                datum=0,
                field=name,
            )
        try:
            return data[name]
        except DataError as error:
            raise DataError(
                f"the objective {me} reads it ({error})", datum=error.datum, field=name
            ) from None


_T = TypeVar("_T", bound=type[LossObjective])


def static(*, default: Any) -> Any:
    """A field that is part of an objective's structure: another value is another program."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(static,))
def objective(cls: _T) -> _T:
    """Make a subclass of :class:`LossObjective` a frozen dataclass whose numbers are leaves."""
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cast("Any", made))
    jax.tree_util.register_dataclass(
        made,
        data_fields=[field.name for field in fields if not field.metadata.get("static")],
        meta_fields=[field.name for field in fields if field.metadata.get("static")],
    )
    return made


def token_mask(data: Batch, logprobs: Ragged) -> Array:
    """Which positions of ``logprobs.tiles`` count: tokens whose ``weights``, if any, are not 0."""
    tiles = logprobs.tiles
    inside = tiling.widen(tiling.mask(logprobs.layout), tiles)
    if "weights" in data:
        inside = inside & (on_tokens(data["weights"], logprobs) != 0)
    return jnp.broadcast_to(inside, tiles.shape)


def weighted(values: Array, data: Batch, logprobs: Ragged, where: Array) -> Array:
    """Losses of tokens times their ``weights``, if there are any; 0 where masked.

    In a policy loss the weights are a mask; one that is neither 0 nor 1 is a factor, as it is on
    the trainers that read them.
    """
    if "weights" not in data:
        return values
    return values * jnp.where(where, on_tokens(data["weights"], logprobs), 0)


def on_tokens(values: Any, logprobs: Ragged) -> Array:
    """A column, or one value per datum, in the shape of ``logprobs.tiles``."""
    if isinstance(values, Ragged) and values.layout is logprobs.layout:
        tiles = tiling.widen(values.tiles, logprobs.tiles)
        return jnp.broadcast_to(tiles, logprobs.tiles.shape)

    def spread(mine: Array, other: Array) -> Array:
        return jnp.broadcast_to(other, mine.shape)

    return logprobs.map(spread, values).tiles


def floats_only(config: Mapping[str, Any]) -> dict[str, float] | None:
    """A loss's config as it can travel, or None if a number in it is traced or an array."""
    if all(isinstance(value, int | float) for value in config.values()):
        return {name: float(value) for name, value in config.items()}
    return None
