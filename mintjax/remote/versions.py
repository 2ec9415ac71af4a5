"""Counts a remote model's optimizer steps, and the backward passes since the last one."""

from __future__ import annotations

import math
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mintjax.errors import StaleError

_CYCLE = 4096


class Versions:
    """The count for one trainer, of what went through the bridge.

    A token is the version as a float32. A receipt is what a backward pass has for a gradient: a
    number above zero that differs from version to version and adds up over passes, exactly so for
    up to 2048 of them, so that a sum of receipts shows which passes it is of.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._version = 0
        self._passes = 0

    @property
    def token(self) -> np.float32:
        """The present version."""
        return np.float32(self._version)

    def check(self, token: Any) -> None:
        """See that a token is of the present version.

        Raises:
            StaleError: it is not.
        """
        if float(token) != self._version:
            raise StaleError(
                f"params of version {float(token):g}, where the trainer's model is at version "
                f"{self._version}; nothing was sent. Go on with what optax.apply_updates returned "
                "for the last update, or with remote.params"
            )

    def receipt(self) -> np.float32:
        """Count a backward pass at the present version."""
        with self._lock:
            self._passes += 1
            return np.float32(self._unit())

    def check_receipts(self, receipts: Any) -> None:
        """See that a sum of receipts is of all that has accumulated at the present version.

        Raises:
            StaleError: it is not.
        """
        given = float(receipts)
        if self._passes == 0:
            why = "no backward pass was run" if given == 0 else "these gradients are stale"
            raise StaleError(
                f"{why}: nothing has accumulated at version {self._version} of the trainer's "
                "model; nothing was sent. Differentiate a loss of remote(params) first"
            )
        if not math.isclose(given, self._passes * self._unit(), rel_tol=1e-5):
            raise StaleError(
                f"these gradients are not those of version {self._version}: "
                f"{self._passes} backward passes have accumulated in the trainer, and it would "
                "apply them all; nothing was sent. Pass the plain sum of their gradients, neither "
                "those of an older version nor scaled; to drop what has accumulated, load a "
                "checkpoint and call init again"
            )

    def step(self) -> None:
        """Count an optimizer step."""
        with self._lock:
            self._version += 1
            self._passes = 0

    def forget(self) -> None:
        """Take what has accumulated as gone."""
        with self._lock:
            self._passes = 0

    def _unit(self) -> float:
        return 1.0 + self._version % _CYCLE / _CYCLE


_versions: WeakKeyDictionary[Any, Versions] = WeakKeyDictionary()
_lock = threading.Lock()


def versions_of(trainer: Any) -> Versions:
    """The one count there is for a trainer."""
    with _lock:
        return _versions.setdefault(trainer, Versions())
