"""Times several implementations on the same batches, in turn."""

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
    """The time of each step of an implementation.

    Args:
        seconds: the time of each step, with the warm-up.
        compilations: the number of programs that mintjax compiled in each step.
        warm_up: the number of steps at the beginning that do not count.
    """

    seconds: list[float]
    compilations: list[int]
    warm_up: int

    def quantile(self, q: float) -> float:
        """Returns the ``q``-quantile of steps after the warm-up, in seconds; 0.5: the median."""
        return float(np.quantile(self.seconds[self.warm_up :], q))


def interleaved(
    implementations: Mapping[str, Callable[[T], object]],
    batches: Iterable[T],
    *,
    warm_up: int,
    on_step: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Times implementations on the same batches, in turn.

    Every implementation gets a batch before the next batch is made, in an order that is drawn anew
    for each batch. So other load on the machine, and what one implementation leaves in the caches
    for the next, affects all of them alike.

    Args:
        implementations: functions of a batch, by name.
        batches: one for each step; making them is not timed.
        warm_up: the number of steps at the beginning that do not count.
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
