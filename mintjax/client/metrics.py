"""Metrics of the parts of a batch as those of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def combine_metrics(
    parts: Sequence[Mapping[str, float]], counts: Sequence[int]
) -> dict[str, float]:
    """Combines metrics of several chunks by the suffix of their names.

    ``sum``, ``mean`` (weighted by datums), ``min``, ``max``, ``slack`` (max - weighted mean),
    ``hash2``. Values that cannot be combined (``unique``, unknown suffixes, none) are all kept,
    where they differ: as ``name``, ``name_1``, ``name_2``, ...

    Args:
        parts: each chunk's metrics; a name need not be in all of them.
        counts: each chunk's number of datums.
    """
    if len(parts) == 1:
        return dict(parts[0])
    result: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        present = [(part[name], n) for part, n in zip(parts, counts, strict=True) if name in part]
        values = np.array([value for value, _ in present])
        weights = np.array([n for _, n in present])
        reduce = _REDUCTIONS.get(name.rpartition(":")[2])
        if reduce is not None:
            result[name] = float(reduce(values, weights))
            continue
        same = bool((values == values[0]).all()) and not name.endswith(":unique")
        for i, value in enumerate(values[:1] if same else values):
            result[f"{name}_{i}" if i else name] = float(value)
    return result


def _hash(values: np.ndarray[Any, Any], _: object) -> float:
    return float(hash(tuple(sorted(int(value) for value in values))))


def _mean(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> float:
    return float(np.average(values, weights=weights))


_REDUCTIONS: dict[str, Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float]] = {
    "sum": lambda values, _: float(values.sum()),
    "mean": _mean,
    "min": lambda values, _: float(values.min()),
    "max": lambda values, _: float(values.max()),
    "slack": lambda values, weights: float(values.max()) - _mean(values, weights),
    "hash2": _hash,
    "hash_unordered": _hash,
}
