"""From the losses of a batch's tokens to a scalar."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp

from mintjax.errors import DataError
from mintjax.objectives._base import Array, row_count
from mintjax.ragged import Ragged

Aggregation: TypeAlias = Literal[
    "sum", "token_mean", "sequence_mean", "sequence_sum", "fixed_length", "prompt_mean"
]
"""``"sum"`` over tokens, as trainers have it; ``"token_mean"``: every token weighs the same;
``"sequence_mean"``: every datum does, and within it every token; ``"sequence_sum"``: the mean over
datums of their sums; ``"fixed_length"``: that, over ``max_length``; ``"prompt_mean"``: every group
of ``group_size`` datums weighs the same, and within it every token."""


def aggregate(
    values: Ragged,
    where: Ragged | None,
    how: Aggregation,
    *,
    max_length: Array = None,
    group_size: int | None = None,
    step_count: Array = None,
) -> Array:
    """Reduces one loss per token to a scalar.

    Args:
        values: the losses.
        where: which tokens count, or None for all.
        how: see :data:`Aggregation`.
        max_length: for ``"fixed_length"``: what each datum's sum is divided by.
        group_size: for ``"prompt_mean"``: how many datums in a row answer one prompt.
        step_count: how many tokens (or datums, or prompts: what ``how`` takes the mean over) the
            whole step has, where it is split into several requests. None counts those of this
            batch.

    Returns:
        A scalar. A datum without a token that counts is none, but in ``"fixed_length"``.

    Raises:
        DataError: the datums do not divide into groups.
        ValueError: ``how`` is none of these, or lacks what it needs.
    """
    if how not in get_args(Aggregation):
        raise ValueError(
            "aggregation must be sum, token_mean or sequence_mean, or sequence_sum, fixed_length "
            f"or prompt_mean, not {how!r}"
        )
    sums, counts = values.sum(where), values.count(where).astype(jnp.float32)
    present = (counts > 0).astype(jnp.float32)
    if how == "sum":
        return jnp.sum(sums)
    if how == "token_mean":
        found, parts = jnp.sum(counts), sums
    elif how == "sequence_mean":
        found, parts = jnp.sum(present), sums / jnp.maximum(counts, 1).astype(sums.dtype)
    elif how == "sequence_sum":
        found, parts = jnp.sum(present), sums
    elif how == "fixed_length":
        if max_length is None:
            raise ValueError('aggregation="fixed_length" needs max_length, in tokens')
        found, parts = row_count(values), sums / jnp.asarray(max_length, sums.dtype)
    else:
        if group_size is None:
            raise ValueError('aggregation="prompt_mean" needs group_size, in datums')
        if len(values) % group_size:
            raise DataError(f"{len(values)} datums do not divide into groups of {group_size}")
        tokens = counts.reshape(-1, group_size).sum(axis=1)
        parts = sums.reshape(-1, group_size).sum(axis=1)
        parts = parts / jnp.maximum(tokens, 1).astype(sums.dtype)
        found = jnp.sum((tokens > 0).astype(jnp.float32))
    over = jnp.maximum(found, 1) if step_count is None else jnp.asarray(step_count)
    return jnp.sum(parts) / over.astype(sums.dtype)
