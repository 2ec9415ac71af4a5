"""Measures the time that the client takes in a training step, for any objective.

The command ``mintjax bench`` and the scripts in ``benchmarks/`` use it.
"""

from mintjax.bench._clock import Timing, interleaved
from mintjax.bench._machine import Machine, machine
from mintjax.bench._plot import plot
from mintjax.bench._report import Report, Result, Settings, run
from mintjax.bench._steps import StepTimes, time_steps
from mintjax.bench._subject import load_objective
from mintjax.bench._synthetic import Arrays, Synthetic
from mintjax.bench._torch import counterpart

__all__ = [
    "Arrays",
    "Machine",
    "Report",
    "Result",
    "Settings",
    "StepTimes",
    "Synthetic",
    "Timing",
    "counterpart",
    "interleaved",
    "load_objective",
    "machine",
    "plot",
    "run",
    "time_steps",
]
