"""The value, the metrics and the per-datum gradients of an objective."""

from mintjax.gradients.evaluate import (
    LogprobGradients,
    Objective,
    Stats,
    loss_and_metrics,
    stats,
    value_and_logprob_grads,
)
from mintjax.gradients.programs import keep_programs

__all__ = [
    "LogprobGradients",
    "Objective",
    "Stats",
    "keep_programs",
    "loss_and_metrics",
    "stats",
    "value_and_logprob_grads",
]
