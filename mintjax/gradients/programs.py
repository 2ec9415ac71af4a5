"""Keeps compiled programs on disk, because the first step of a process compiles them."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def keep_programs(directory: str | os.PathLike[str]) -> None:
    """Keeps the programs that this process compiles, for itself and for later processes.

    It turns JAX's persistent compilation cache on, for programs of every size and of every
    library in this process. Call it before the first step. JAX reads a program again only where
    its versions, the device and the program are the same, so nothing stale is run. Files are
    never removed.

    Args:
        directory: a folder of your own; made if it is missing. ``~`` is your home.
    """
    path = Path(directory).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
