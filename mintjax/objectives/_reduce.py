"""From the losses of a batch's tokens to a scalar."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax.numpy as jnp

from mintjax import losses
from mintjax.objectives._base import Array
from mintjax.ragged import Ragged, tiling

Aggregation: TypeAlias = Literal["sum", "token_mean", "sequence_mean"]
"""``"sum"`` over tokens, as trainers have it; ``"token_mean"``: every token weighs the same;
``"sequence_mean"``: every datum does."""


def aggregate(values: Array, where: Array, logprobs: Ragged, how: Aggregation) -> Array:
    """Reduce one number per position of ``logprobs.tiles`` to a scalar.

    Args:
        values: the losses, in the shape of the tiles or without its trailing axes; 0 where masked.
        where: which positions count; same shape.
        logprobs: where the rows lie.
        how: see :data:`Aggregation`.

    Raises:
        ValueError: ``how`` is none of these.
    """
    if how == "sum":
        return jnp.sum(values)
    if how == "token_mean":
        return losses.token_mean(values, where=where)
    if how == "sequence_mean":
        return _sequence_mean(values, where, logprobs)
    raise ValueError(f"aggregation must be sum, token_mean or sequence_mean, not {how!r}")


def _sequence_mean(values: Array, where: Array, logprobs: Ragged) -> Array:
    sums = tiling.row_sums(values, logprobs.layout)
    count = tiling.row_sums(jnp.asarray(where).astype(values.dtype), logprobs.layout)
    return losses.token_mean(sums / jnp.maximum(count, 1), where=count > 0)
