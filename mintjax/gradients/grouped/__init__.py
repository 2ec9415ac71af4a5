"""Evaluates a loop over rows with one NumPy operation for all rows."""

from mintjax.gradients.grouped.planner import Grouped, prepare

__all__ = ["Grouped", "prepare"]
