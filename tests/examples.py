"""Numbers of examples that property tests try: few by default, many under the thorough profile."""

from collections.abc import Iterable
from typing import TypeVar

from hypothesis import settings

T = TypeVar("T")

THOROUGH = not settings.default.derandomize
"""Whether the tests run under ``--hypothesis-profile=thorough``, with fresh randomness."""


def examples(few: int) -> int:
    """Gives the number of examples for a test whose examples are slow.

    Args:
        few: under the default profile; the thorough profile has its own number.
    """
    return settings.default.max_examples if THOROUGH else few


def some(cases: Iterable[T], every: int) -> list[T]:
    """Takes some of the cases that a slow test is made for; the thorough profile has them all.

    Args:
        cases: all of them.
        every: 3 for the first, the fourth, the seventh, ...
    """
    return [*cases] if THOROUGH else [*cases][::every]


def parts(cases: Iterable[T]) -> list[list[T]]:
    """Divides cases among tests of one law, where there are many examples.

    Each test forgets its programs before the next begins, because all together would fill memory.
    By default, and for some hundred examples, one test has all cases.
    """
    listed = [*cases]
    few = settings.default.max_examples < 1000
    number = 1 if few else -(-len(listed) // 5)
    return [listed[part::number] for part in range(number)]


def share(few: int, cases: Iterable[object]) -> settings:
    """Gives each part of a law its share of the examples.

    Args:
        few: of all parts together under the default profile; the thorough one has its own number.
        cases: as :func:`parts` takes them.
    """
    return settings(max_examples=max(1, examples(few) // len(parts(cases))))
