"""Copies of datums, so that what a caller does to the originals changes nothing."""

from __future__ import annotations

from collections.abc import Iterable

from mintjax.ragged.batch import Batch
from mintjax.types import Datum, EncodedTextChunk, ModelInput


def snapshot(data: Iterable[Datum]) -> Batch:
    """Copies tokens and columns as they are now.

    Args:
        data: at least one datum.

    Returns:
        A batch that shares no memory with the data.

    Raises:
        DataError: there is no datum.
    """
    return Batch([_copy(datum) for datum in data])


def _copy(datum: Datum) -> Datum:
    chunks = [EncodedTextChunk(list(chunk.tokens)) for chunk in datum.model_input.chunks]
    columns = {name: column.copy() for name, column in datum.loss_fn_inputs.items()}
    return Datum(ModelInput(chunks), columns)
