"""Objectives of the worst: a robust mean of the datums' losses in the place of the plain one."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax.numpy as jnp

from mintjax import losses
from mintjax.objectives._base import Array, Loss, counted, define, option
from mintjax.objectives._preference import SequenceObjective
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch


class RobustObjective(SequenceObjective):
    """A robust mean of how unlikely the answers are, over a batch.

    Each datum's loss is its negative log-likelihood per token. Reads ``weights``: 1 on the tokens
    of the answer, 0 on those of the prompt; and a column for each array that the mean looks at,
    such as ``groups``: one number per datum (or per token, of which the largest counts). A datum
    without a token that counts is none. Of a step in several requests, each request has its own
    mean, and they do not add up. Metrics: ``mean_nll``, the plain mean over datums, and ``datums``,
    their number, by which those of several requests are weighed.

    Args:
        per_token: take each datum's loss per token; its sum if False.
        num_groups: how many groups there are.
        share: of the datums, above 0 and at most 1.
    """

    per_token: bool = option(True, static=True)

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Takes the robust mean, and the plain one for the metric."""
        values = -self.scores(data, logprobs)
        tokens = logprobs.count(counted(logprobs, self.column(data, "weights")))
        where = jnp.asarray(logprobs.row_mask) & (tokens > 0)
        looked_at = [self._read(data, name) for name in self.reads]
        metrics = {
            "mean_nll": losses.token_mean(values, where=where),
            "datums": jnp.sum(where.astype(jnp.float32)),
        }
        return self.apply(values, *looked_at, where=where), metrics

    def _read(self, data: Batch, name: str) -> Any:
        if name in {field.name for field in dataclasses.fields(cast("Any", self))}:
            return getattr(self, name)
        column = self.column(data, name)
        return column.max() if isinstance(column, Ragged) else column


def robust(loss: Loss, **options: Any) -> type[RobustObjective]:
    """Makes an objective of a robust mean.

    Args:
        loss: ``(losses, ..., *, settings, where)``, from ``[B]`` to a scalar. A further positional
            parameter is the option of that name, or else the column.
        options: by name, as :func:`mintjax.objectives._base.option` makes them.

    Returns:
        A class whose instances are objectives.
    """
    return define(RobustObjective, loss, extra=options)


worst_group = robust(losses.worst_group, num_groups=option(2, static=True))
conditional_value_at_risk = robust(losses.conditional_value_at_risk, share=option(0.1))
