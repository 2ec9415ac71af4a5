"""Tells the user of waits that get long: what is waited for, why, and until when."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Generic, TypeVar

import msgspec

R = TypeVar("R")

FIRST_LINE = 5.0  # seconds of waiting before the first line
NEXT_LINE = 60.0  # seconds between two lines that give one reason


class Wait(msgspec.Struct, Generic[R]):
    """One request that is waited for.

    Args:
        request: what is waited for.
        why: the reason, as far as it is known.
        started: when the wait began, in seconds of the monotonic clock.
        limit: how many seconds it lasts at most.
        setting: what sets that limit, as the user writes it.
        attempt: how many times it was sent.
    """

    request: R
    why: str
    started: float
    limit: float
    setting: str
    attempt: int = 1

    @property
    def outlook(self) -> str:
        """Says why it waits, how long it will go on, and how to change that."""
        left = self.started + self.limit - time.monotonic()
        end = "without end" if math.isinf(left) else f"for up to {max(left, 0.0):.0f} s more"
        return f"{self.why}; this goes on {end} ({self.setting} changes that)"


class Notices(Generic[R]):
    """All waits of one client; no reason is told twice within a minute.

    Args:
        tell: called with a wait that gets long.
    """

    def __init__(self, tell: Callable[[Wait[R]], object]) -> None:
        self._tell = tell
        self._told: dict[str, float] = {}

    @contextmanager
    def watch(self, wait: Wait[R]) -> Generator[Wait[R]]:
        """Tells of the wait from its fifth second on, for as long as the block lasts."""
        loop = asyncio.get_running_loop()
        handle = loop.call_later(FIRST_LINE, lambda: due())

        def due() -> None:
            nonlocal handle
            now = time.monotonic()
            self._told = {why: at for why, at in self._told.items() if now - at < NEXT_LINE}
            if wait.why not in self._told:
                self._told[wait.why] = now
                self._tell(wait)
            handle = loop.call_later(FIRST_LINE, due)

        try:
            yield wait
        finally:
            handle.cancel()
