"""The part of torch that ``torch_objective`` and linear losses use, where torch is not installed.

It differentiates for real, by a tape, so that a gradient which is read wrongly is a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np


class Tensor:
    """An array, and for each tensor that it was computed from what pulls a gradient back to it."""

    def __init__(self, array: Any, requires_grad: bool = False, pulls: Sequence[Any] = ()) -> None:
        self.array = np.asarray(array, np.float32)
        self.pulls: list[tuple[Tensor, Callable[[Any], Any]]] = list(pulls)
        self.requires_grad = requires_grad or any(of.requires_grad for of, _ in self.pulls)
        self.grad: Tensor | None = None

    def requires_grad_(self, wanted: bool) -> Tensor:
        self.requires_grad = wanted
        return self

    def __add__(self, other: Any) -> Tensor:
        other = other if isinstance(other, Tensor) else Tensor(other)
        pulls = [(self, lambda g: g), (other, lambda g: g)]
        return Tensor(self.array + other.array, pulls=pulls)

    __radd__ = __add__

    def __neg__(self) -> Tensor:
        return Tensor(-self.array, pulls=[(self, lambda g: -g)])

    def sum(self) -> Tensor:
        ones = np.ones_like(self.array)
        return Tensor(self.array.sum(), pulls=[(self, lambda g: g * ones)])

    def backward(self, gradient: Any = 1.0) -> None:
        if not self.requires_grad:
            return
        if not self.pulls:
            self.grad = Tensor(gradient if self.grad is None else self.grad.array + gradient)
        for of, pull in self.pulls:
            of.backward(pull(gradient))

    def numel(self) -> int:
        return self.array.size

    def detach(self) -> Tensor:
        return Tensor(self.array)

    def numpy(self) -> np.ndarray:
        return self.array

    def __float__(self) -> float:
        return float(self.array)


def dot(a: Tensor, b: Tensor) -> Tensor:
    pulls = [(a, lambda g: g * b.array), (b, lambda g: g * a.array)]
    return Tensor(a.array @ b.array, pulls=pulls)


def stack(rows: Sequence[Tensor]) -> Tensor:
    pulls = [(row, lambda g, i=i: g[i]) for i, row in enumerate(rows)]
    return Tensor(np.stack([row.array for row in rows]), pulls=pulls)


def module() -> ModuleType:
    """What ``import torch`` shall give."""
    torch: Any = ModuleType("torch")
    torch.Tensor = torch.tensor = torch.from_numpy = Tensor
    torch.dot, torch.stack = dot, stack
    return torch
