"""Work that is done a slice at a time, so that other work can be done, or all be ended, between."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TypeAlias, TypeVar

T = TypeVar("T")

Slices: TypeAlias = Generator[None, None, T]
"""Yields after each slice; returns the result."""


def finish(slices: Slices[T]) -> T:
    """Does all slices, and returns the result."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def each_under(
    context: Callable[[], AbstractContextManager[object]], slices: Slices[T]
) -> Slices[T]:
    """Does each slice within a context of its own, because work of others runs between them."""
    while True:
        with context():
            try:
                next(slices)
            except StopIteration as end:
                return end.value
        yield
