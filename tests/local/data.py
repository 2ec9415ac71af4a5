"""Datums of random bytes, with whatever columns a test needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mintjax.types import Datum, ModelInput

LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo")
LENGTHS = (3, 17, 32, 8, 30, 5)
"""All of one bucket, for every other one costs the time to compile it."""


def batch(
    lengths: Sequence[int] = LENGTHS, *, seed: int = 0, candidates: int | None = None
) -> list[Datum]:
    """Datums with every column of the losses; ``logprobs`` are near an untrained model's."""
    source = np.random.default_rng(seed)

    def datum(length: int) -> Datum:
        shape = (length,) if candidates is None else (length, candidates)
        return Datum(
            ModelInput.from_ints(source.integers(0, 256, length)),
            {
                "target_tokens": source.integers(0, 256, shape),
                "weights": source.integers(0, 2, shape).astype(np.float32),
                "logprobs": source.normal(-5.6, 0.3, shape),
                "advantages": source.normal(0, 1, shape),
            },
        )

    return [datum(length) for length in lengths]


def with_columns(datum: Datum, **columns: Any) -> Datum:
    """A datum with some columns in the place of its own; None removes one."""
    inputs = {**datum.loss_fn_inputs, **columns}
    return Datum(datum.model_input, {k: v for k, v in inputs.items() if v is not None})
