"""Counts a remote model's optimizer steps, and the backward passes since the last one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from mintjax.errors import StaleError

_EXACT = 2**24  # integers up to here, and their sums, are exact in float32
_MANY = 32  # passes at one version, from which on receipts are small, so that more of them fit


@functools.cache
def _numbers(bits: int) -> Iterator[int]:
    """Gives integers of so many bits, each once before any comes again, in no order."""
    shuffled = np.random.default_rng(bits).permutation(2 ** (bits - 1)) + 2 ** (bits - 1)
    return itertools.cycle(shuffled.tolist())


class Versions:
    """The count for one trainer, of what went through the bridge.

    Where the trainer counts its own changes, one that did not go through the bridge, such as an
    optimizer step of the training client's, is another version too.

    A token is the version as a float32. A receipt is what a backward pass has for a gradient: an
    integer of its own, above 1000, as a float32. Sums of receipts are exact, so that the sum of all
    passes can be told from one that lacks a pass, has one twice, or was scaled, clipped or
    averaged, by however little.

    Args:
        changes: gives the trainer's count of changes.
    """

    def __init__(self, changes: Callable[[], int]) -> None:
        self._changes = changes
        self._seen = changes()
        self._lock = threading.Lock()
        self._version = 0
        self._passes = 0
        self._sum = 0

    @property
    def token(self) -> np.float32:
        """The present version."""
        self._look()
        return np.float32(self._version)

    @contextlib.contextmanager
    def own_change(self) -> Generator[None]:
        """Marks what the trainer does meanwhile as the bridge's."""
        try:
            yield
        finally:
            self._seen = self._changes()

    def _look(self) -> None:
        """Counts a change that did not go through the bridge."""
        now = self._changes()
        if now != self._seen:
            self._seen = now
            self.step()

    def check(self, token: Any) -> None:
        """Checks that a token is of the present version.

        Raises:
            StaleError: it is not.
        """
        self._look()
        if float(token) != self._version:
            raise StaleError(
                f"params of version {float(token):g}, where the trainer's model is at version "
                f"{self._version}, because of updates, or of calls of the training client itself; "
                "nothing was sent. Go on with what optax.apply_updates returned for the last "
                "update, or with remote.params"
            )

    def receipt(self) -> np.float32:
        """Counts a backward pass at the present version.

        Raises:
            StaleError: there were more passes than receipts can tell apart.
        """
        with _lock, self._lock:
            number = next(_numbers(18 if self._passes < _MANY else 11))
            if self._sum + number > _EXACT:
                raise StaleError(
                    f"{self._passes} backward passes at version {self._version} are as many as "
                    "their receipts can be told apart; call update more often, or give several "
                    "datums to one pass"
                )
            self._passes += 1
            self._sum += number
            return np.float32(number)

    def check_receipts(self, receipts: Any) -> None:
        """Checks that a sum of receipts is of all that has accumulated at the present version.

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
        if given != self._sum:
            raise StaleError(
                f"these gradients are not those of version {self._version}: "
                f"{self._passes} backward passes have accumulated in the trainer, and it would "
                "apply them all; nothing was sent. Pass the plain sum of their gradients, each "
                "once: neither those of an older version, nor scaled, clipped or averaged; to drop "
                "what has accumulated, load a checkpoint and call init again"
            )

    def step(self) -> None:
        """Counts an optimizer step."""
        with self._lock:
            self._version += 1
            self._passes = self._sum = 0

    def forget(self) -> None:
        """Takes what has accumulated as gone."""
        with self._lock:
            self._passes = self._sum = 0


_versions: WeakKeyDictionary[Any, Versions] = WeakKeyDictionary()
_lock = threading.Lock()


def versions_of(trainer: Any) -> Versions:
    """Finds the one count there is for a trainer."""
    with _lock:
        if trainer not in _versions:
            alive = weakref.ref(trainer)
            _versions[trainer] = Versions(lambda: getattr(alive(), "changes", 0))
        return _versions[trainer]
