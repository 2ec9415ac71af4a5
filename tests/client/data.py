"""Two datums of different lengths."""

from __future__ import annotations

from typing import Any

from mintjax.types import Datum, ModelInput


def datum(tokens: list[int], targets: list[int], weights: Any = None) -> Datum:
    inputs: dict[str, Any] = {"target_tokens": targets}
    if weights is not None:
        inputs["weights"] = weights
    return Datum(ModelInput.from_ints(tokens), inputs)


DATA = [datum([1, 2, 3], [2, 3, 4], [0.0, 1.0, 1.0]), datum([1, 2], [2, 3], [0.0, 1.0])]
