"""Transfers between host and device that a function needs, under a guard that a user has set."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

_FREE: AbstractContextManager[None] = nullcontext()


def transfers_allowed() -> AbstractContextManager[None]:
    """Allows transfers within a block, because a guard is for those that nobody asked for.

    Data come from NumPy and results go there. Where no guard is set the block changes nothing,
    because entering JAX's own context takes some 10 us.
    """
    config: Any = jax.config
    guards = (
        config.jax_transfer_guard_host_to_device,
        config.jax_transfer_guard_device_to_host,
        config.jax_transfer_guard_device_to_device,
    )
    return _FREE if guards == (None, None, None) else jax.transfer_guard("allow")
