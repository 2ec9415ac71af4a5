"""Describes the machine and the versions of a measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import msgspec

_PACKAGES = ("mintjax", "jax", "jaxlib", "numpy", "msgspec", "httpx", "torch", "tinker")


class Machine(msgspec.Struct, kw_only=True):
    """The machine, the versions and the date of a measurement.

    Args:
        cpu: the model of the processor, as the system names it.
        cores: the number of cores that this process may use.
        system: operating system and architecture.
        python: the version of Python.
        packages: the versions of the installed packages that matter.
        date: the date in UTC, ``YYYY-MM-DD``.
    """

    cpu: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    date: str


def machine() -> Machine:
    """Describes this machine, the installed packages and today's date.

    Returns:
        The description, to be kept beside a measurement.
    """
    return Machine(
        cpu=_cpu(),
        cores=_cores(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages=_versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
