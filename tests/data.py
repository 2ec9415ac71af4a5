"""Datums that many tests train on, and their gradients as one array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mintjax import Datum, ModelInput


def make_datums(
    seed: int = 0, sizes: Sequence[int] = (5, 17, 9, 12), **columns: Callable[[int], Any]
) -> list[Datum]:
    """Makes datums of so many tokens, with the columns that most objectives read.

    Args:
        seed: of the numbers.
        sizes: tokens of each datum.
        columns: further columns, or others in the place of these, as functions of the size.
    """
    rng = np.random.default_rng(seed)
    return [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, n)),
            {
                "target_tokens": rng.integers(0, 256, n),
                "weights": (np.arange(n) > 1).astype(np.float32),
                "advantages": rng.standard_normal(n),
                "logprobs": -5.5 + 0.3 * rng.standard_normal(n),
                "ref_logprobs": -5.5 + 0.3 * rng.standard_normal(n),
                **{name: make(n) for name, make in columns.items()},
            },
        )
        for n in sizes
    ]


def flat(tree: Any) -> Any:
    """Joins the arrays of a pytree into one."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
