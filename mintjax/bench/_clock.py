"""Several implementations on the same batches, one after the other, by the clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import msgspec
import numpy as np

from mintjax import gradients

T = TypeVar("T")


class Timing(msgspec.Struct, kw_only=True):
    """The times of an implementation, step by step.

    Args:
        seconds: of each step, those of the warm-up among them.
        compilations: programs that mintjax had compiled in each step.
        warm_up: how many steps at the beginning do not count.
    """

    seconds: list[float]
    compilations: list[int]
    warm_up: int

    def quantile(self, q: float) -> float:
        """The ``q``-quantile of the steps after the warm-up, in seconds; 0.5 is the median."""
        return float(np.quantile(self.seconds[self.warm_up :], q))


def interleaved(
    implementations: Mapping[str, Callable[[T], object]],
    batches: Iterable[T],
    *,
    warm_up: int,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time implementations on the same batches, in turn.

    Each batch is given to all before the next is made, in an order that is drawn anew each time, so
    that what else the machine does, and what one leaves in the caches to the next, falls on all
    alike. (Were they to take turns at the beginning, each would still follow the same one.)

    Args:
        implementations: by name: functions of a batch.
        batches: one for each step; made outside of what is timed.
        warm_up: how many steps at the beginning do not count.
        on_step: called after each step.

    Returns:
        The timing of each, by name.
    """
    names = list(implementations)
    timings = {name: Timing(seconds=[], compilations=[], warm_up=warm_up) for name in names}
    draw = random.Random(0)
    for batch in batches:
        for name in draw.sample(names, len(names)):
            compiled = gradients.stats().compilations
            start = time.perf_counter()
            implementations[name](batch)
            timings[name].seconds.append(time.perf_counter() - start)
            timings[name].compilations.append(gradients.stats().compilations - compiled)
        on_step()
    return timings
