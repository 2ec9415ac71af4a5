"""The value, the metrics and the per-datum gradients of an objective."""

from mintjax.gradients.evaluate import (
    LogprobGradients,
    Objective,
    Stats,
    loss_and_metrics,
    stats,
    value_and_logprob_grads,
)

__all__ = [
    "LogprobGradients",
    "Objective",
    "Stats",
    "loss_and_metrics",
    "stats",
    "value_and_logprob_grads",
]
