"""Counts the work of this process that caches should save."""

from __future__ import annotations

from typing import NamedTuple


class Stats(NamedTuple):
    """Counts of the work that a cache should save, since the process began.

    Args:
        compilations: programs that XLA compiled.
        objectives: objectives that were new: mintjax's own by structure, others by value.
        loops_grouped: steps whose objective took rows one by one, evaluated from one trace for all
            lengths, with the operations of all rows together.
        loops_interpreted: such steps in which most operations are of one row alone, so that each
            takes its time.
        loops_traced: such steps for which the objective was traced anew, which is slow.
    """

    compilations: int
    objectives: int
    loops_grouped: int
    loops_interpreted: int
    loops_traced: int


_counts = dict.fromkeys(Stats._fields, 0)


def stats() -> Stats:
    """Counts what was compiled so far in this process.

    Returns:
        The counts as they are now; take the difference of two to see what a step compiled.
    """
    return Stats(**_counts)


def count(what: str) -> None:
    """Adds one to a count that :class:`Stats` names."""
    _counts[what] += 1
