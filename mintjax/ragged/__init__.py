"""Rows of different lengths as one value, and batches of datums that are read by column."""

from mintjax.ragged.batch import Batch
from mintjax.ragged.rows import Ragged, RowAccessError

__all__ = ["Batch", "Ragged", "RowAccessError"]
