"""The settings of JAX that the embedded trainer computes under, whatever the user's own are."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import jax


@contextmanager
def own_settings() -> Generator[None]:
    """Computes in 32 bits, with JAX's standard promotion, and with free transfers, in this thread.

    The user's settings are those of their own computations: a trainer elsewhere does not know them.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield
