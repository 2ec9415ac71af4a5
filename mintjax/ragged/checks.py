"""Checks of datums that every trainer needs to hold, before anything is sent or computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mintjax.errors import DataError
from mintjax.ragged.batch import Batch, as_batch
from mintjax.types import Datum, ImageChunk


def check_data(
    data: Sequence[Datum] | Batch,
    columns: Iterable[str] | None = None,
    *,
    required: Sequence[str] = ("target_tokens",),
    vocab_size: int | None = None,
) -> Batch:
    """Checks what every trainer needs to hold, before anything is sent or computed.

    Args:
        data: at least one datum, each with at least one token.
        columns: names of the inputs that will travel; all if None. Those a datum has must be finite
            and as long as its model input.
        required: names of the inputs that every datum must have.
        vocab_size: if given, tokens and targets must be below it.

    Returns:
        The data as a :class:`Batch`.

    Raises:
        DataError: naming the datum, the field, and what to do.
    """
    batch = as_batch(data)
    if 0 in batch.lengths:
        raise DataError(
            "it has no token; a datum needs one", datum=batch.lengths.index(0), field="model_input"
        )
    if vocab_size is not None:
        for i, datum in enumerate(batch):
            _check_vocabulary(i, datum, vocab_size)
    names = batch.names if columns is None else batch.names.intersection(columns)
    for name in sorted(names.union(required)):
        _check_column(name, batch, optional=name not in required, vocab_size=vocab_size)
    return batch


def _check_vocabulary(i: int, datum: Datum, vocab_size: int) -> None:
    start = 0
    for chunk in datum.model_input.chunks:
        tokens = () if isinstance(chunk, ImageChunk) else chunk.tokens
        if tokens and max(tokens) >= vocab_size:
            at = next(t for t, token in enumerate(tokens) if token >= vocab_size)
            raise DataError(
                f"token {tokens[at]} at position {start + at} is outside the vocabulary of "
                f"{vocab_size}",
                datum=i,
                field="model_input",
            )
        start += chunk.length


def _check_column(name: str, batch: Batch, *, optional: bool, vocab_size: int | None) -> None:
    present = [i for i, datum in enumerate(batch) if name in datum.loss_fn_inputs]
    if optional and len(present) < len(batch):
        rows = Batch([batch[i] for i in present]).given_rows(name)
    else:
        rows, present = batch.given_rows(name), range(len(batch))
    for i, row in zip(present, rows, strict=True):
        if row.ndim == 0:
            raise DataError(
                "a single number cannot travel; it needs one for each token", datum=i, field=name
            )
    flat = np.concatenate([row.ravel() for row in rows])
    if flat.dtype.kind == "f":
        bad, why = ~np.isfinite(flat), "is not finite; a request can only hold finite numbers"
    elif name == "target_tokens":
        bad, why = flat < 0, "is negative; a target is the id of a token, and "
        why += "one that shall not count, as -100 elsewhere, is any token with a weight of 0"
        if vocab_size is not None and not bad.any():
            bad, why = flat >= vocab_size, f"is outside the vocabulary of {vocab_size}"
    else:
        return
    if bad.any():
        at = int(np.argmax(bad))
        ends = np.cumsum([row.size for row in rows])
        i = int(np.searchsorted(ends, at, side="right"))
        position = at - int(ends[i]) + rows[i].size
        raise DataError(f"{flat[at]} at position {position} {why}", datum=present[i], field=name)
