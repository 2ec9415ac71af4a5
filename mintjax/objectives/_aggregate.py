"""From the losses of a batch's tokens to a scalar."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp

from mintjax.errors import DataError
from mintjax.losses._settings import check_count
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
        ValueError: ``how`` lacks what it needs.
    """
    sums = values.sum(where)
    if how == "sum":
        return jnp.sum(sums)
    counts = values.count(where).astype(sums.dtype)
    if how == "token_mean" or how == "sequence_sum":
        parts = sums
    elif how == "sequence_mean":
        parts = sums / jnp.maximum(counts, 1)
    elif how == "fixed_length":
        if max_length is None:
            raise ValueError('aggregation="fixed_length" needs max_length, in tokens')
        parts = sums / jnp.asarray(max_length, sums.dtype)
    else:
        parts = by_prompt(sums, group_size) / jnp.maximum(by_prompt(counts, group_size), 1)
    over = step_count
    if over is None:
        over = jnp.maximum(count_parts(values, where, how, group_size=group_size), 1)
    return jnp.sum(parts) / jnp.asarray(over).astype(sums.dtype)


def check_aggregation(how: str, group_size: int | None) -> None:
    """Checks what says how to aggregate.

    Raises:
        ValueError: ``how`` is no name of an aggregation, or ``group_size`` is no number of datums.
    """
    if how not in get_args(Aggregation):
        raise ValueError(f"aggregation must be one of {get_args(Aggregation)}, not {how!r}")
    if group_size is not None:
        check_count(group_size, "group_size")


def count_parts(
    values: Ragged, where: Ragged | None, how: Aggregation, *, group_size: int | None = None
) -> Array:
    """Counts what :func:`aggregate` takes the mean over: tokens, datums or prompts; 1 for a sum.

    Args:
        values: one number per token.
        where: as there.
        how: as there.
        group_size: as there.

    Returns:
        A scalar.

    Raises:
        DataError: the datums do not divide into groups.
        ValueError: ``group_size`` is needed.
    """
    counts = values.count(where).astype(jnp.float32)
    if how == "sum":
        return jnp.ones(())
    if how == "token_mean":
        return jnp.sum(counts)
    if how == "fixed_length":
        return row_count(values)
    if how == "prompt_mean":
        counts = by_prompt(counts, group_size)
    return jnp.sum((counts > 0).astype(jnp.float32))


def by_prompt(per_datum: Array, group_size: int | None) -> Array:
    """Sums one number per datum over the datums of each prompt.

    Raises:
        DataError: the datums do not divide into groups.
        ValueError: ``group_size`` is None.
    """
    if group_size is None:
        raise ValueError('aggregation="prompt_mean" needs group_size, in datums')
    if len(per_datum) % group_size:
        raise DataError(f"{len(per_datum)} datums do not divide into groups of {group_size}")
    return per_datum.reshape(-1, group_size).sum(axis=1)
