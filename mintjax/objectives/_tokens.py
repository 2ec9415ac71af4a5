"""Objectives made of one loss per token: policy losses, regularisers, losses over candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np

from mintjax import losses
from mintjax.errors import DataError
from mintjax.objectives._aggregate import Aggregation, aggregate, check_aggregation, count_parts
from mintjax.objectives._base import (
    Array,
    Loss,
    LossObjective,
    answer_mask,
    define,
    option,
    times_weights,
    together,
    tokenwise,
    tokenwise_terms,
)
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch, as_batch
from mintjax.types import Datum, LossFnName

COLUMNS = {"sampling_logprobs": "logprobs"}
"""The columns that parameters of losses are filled from, where the names differ."""


class TokenObjective(LossObjective):
    """One loss per token, over a batch.

    Args:
        aggregation: how the losses of tokens become one; trainers sum. See
            :data:`mintjax.objectives.Aggregation`.
        max_length: with ``aggregation="fixed_length"``: what each datum's sum is divided by, in
            tokens.
        group_size: with ``aggregation="prompt_mean"``: how many datums in a row answer one prompt.
        step_count: how many tokens (or datums, or prompts: what the aggregation takes the mean
            over) the whole optimizer step has, where it is split into several requests, as
            :meth:`over_step` counts them; None takes the mean over each request by itself.
    """

    aggregation: Aggregation = option("sum", static=True)
    max_length: float | None = option(None)
    group_size: int | None = option(None, static=True)
    step_count: float | None = option(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_aggregation(self.aggregation, self.group_size)

    @property
    def pad_rows_to(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Pads the row count of a batch to whole groups."""
        return self.group_size or 1

    @property
    def couples_datums(self) -> str | None:
        """Says why losses of datums do not add up; None for a sum, or a mean over a whole step."""
        if self.aggregation == "prompt_mean":
            return "the datums of a prompt are averaged together"
        if self.aggregation != "sum" and self.step_count is None:
            return (
                f"aggregation={self.aggregation!r} divides by what all datums hold; the objective "
                "that over_step(data) gives does not"
            )
        return None

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """The name and config of the loss, if it is a sum, as the trainers' are."""
        return super().builtin if self.aggregation == "sum" else None

    def over_step(self, data: Batch | Sequence[Datum]) -> Self:
        """Gives this objective for a step whose data are sent in several requests.

        Args:
            data: all datums of the step, with ``weights`` if the requests have them.

        Returns:
            The same objective with ``step_count`` set: over the requests of the step, its losses
            and gradients add up to those of one request with all the data.

        Raises:
            DataError: the datums do not divide into groups.

        Example:
            >>> import mintjax
            >>> from mintjax import objectives
            >>> tokens = mintjax.ModelInput.from_ints([0, 1, 2])
            >>> data = [mintjax.Datum(tokens, {"target_tokens": [1, 2, 3]})] * 4
            >>> objectives.ppo(aggregation="token_mean").over_step(data).step_count
            12.0
        """
        batch = as_batch(data)
        ones = Ragged.from_rows([np.ones(length, np.float32) for length in batch.lengths])
        where = answer_mask(batch, ones)
        count = count_parts(ones, where, self.aggregation, group_size=self.group_size)
        return dataclasses.replace(cast("Any", self), step_count=max(float(count), 1.0))

    def inputs(self, data: Batch, logprobs: Ragged, where: Ragged | None) -> list[Any]:
        """Reads what the loss is given beside the logprobs: columns, under the names it has."""
        return [self.column(data, COLUMNS.get(name, name)) for name in self.reads]

    def reduce(self, values: Ragged, where: Ragged | None) -> Array:
        """Reduces the losses of tokens to a scalar."""
        return aggregate(
            values,
            where,
            self.aggregation,
            max_length=self.max_length,
            group_size=self.group_size,
            step_count=self.step_count,
        )


class CrossEntropyObjective(TokenObjective):
    """The loss that supervised learning sums, over a batch.

    Reads ``weights``. Metrics: ``mean_nll``, the negative log-likelihood per unit of weight, in
    nats, and ``weight_sum``, by which those of several requests are weighed.
    """

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Computes the loss, and the mean for the metric."""
        weights = self.column(data, "weights")
        loss = self.reduce(logprobs.map(self.apply, weights), answer_mask(data, logprobs))
        mass = logprobs.map(_spread, weights).total()
        nll = jax.lax.stop_gradient(logprobs.map(losses.cross_entropy, weights).total())
        return loss, {"mean_nll": nll / jnp.where(mass == 0, 1, mass), "weight_sum": mass}


def _spread(mine: Array, other: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(other).astype(mine.dtype), mine.shape)


class PolicyObjective(TokenObjective):
    """A policy loss over a batch.

    Reads ``logprobs`` (of the sampling policy), ``advantages`` (one per token, or one per datum)
    and, if there are any, ``weights`` as a mask (one that is neither 0 nor 1 is a factor).
    Metrics: those of :func:`mintjax.losses.policy_summary`, and ``tokens``, by whose number those
    of several requests are weighed. Two of these are no means: ``ratio_std**2 + mean_ratio**2`` is
    one, and ``effective_sample_size`` is ``mean_ratio**2`` over it.
    """

    clips_as: ClassVar[str | None] = None
    """The loss whose rule in :func:`mintjax.losses.clipped_tokens` holds; its own if None."""

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Computes the loss, and its metrics."""
        where = answer_mask(data, logprobs)
        inputs = self.inputs(data, logprobs, where)
        values = times_weights(self.losses_of(logprobs, inputs, where), data)
        return self.reduce(values, where), self.watch(logprobs, inputs, where)

    def losses_of(self, logprobs: Ragged, inputs: list[Any], where: Ragged | None) -> Ragged:
        """Computes the loss of each token."""
        return tokenwise(self.apply, logprobs, inputs, where)

    def watch(self, logprobs: Ragged, inputs: list[Any], where: Ragged | None) -> dict[str, Array]:
        """Summarises how far the policy is from the one that sampled."""
        bounds = {name: getattr(self, name) for name in self.settings if name.endswith("threshold")}
        rule = self.clips_as or type(self).loss.__name__

        def terms(
            target: Array, sampling: Array, advantages: Array, *_: Array, where: Array = None
        ) -> dict[str, Array]:
            clipped = losses.clipped_tokens(
                rule, target, sampling, advantages, where=where, **bounds
            )
            ratio_bounds = {
                "clip_low_threshold": bounds.get("clip_low_threshold", 0.0),
                "clip_high_threshold": bounds.get(
                    "clip_high_threshold", bounds.get("truncation_threshold", jnp.inf)
                ),
            }
            return losses.policy_terms(
                target, sampling, advantages, **ratio_bounds, clipped=clipped, where=where
            )

        parts = tokenwise_terms(terms, logprobs, inputs, where)
        tokens = logprobs.total_count(where).astype(parts["ratio"].dtype)
        summed = ("clipped", "outside", "ratio", "ratio_squared", "excess", "kl_k3")
        sums = logprobs.total_terms({name: parts[name] for name in summed}, where)
        summary = losses.policy_summary({"tokens": tokens, **sums})
        # Around their own mean, because a difference of two sums of squares has fewer digits.
        count = jnp.maximum(tokens, 1)
        off_mean = parts["excess"] - sums["excess"] / count
        variance = (off_mean * off_mean).total(where) / count
        return summary | {"ratio_std": jnp.sqrt(variance), "tokens": tokens}


class SequencePolicyObjective(PolicyObjective):
    """A policy loss whose ratio is that of a whole sequence, over a batch; each datum is one.

    Reads ``logprobs`` (of the sampling policy), ``advantages`` (one per token, or one per datum)
    and, if there are any, ``weights`` as a mask (one that is neither 0 nor 1 is a factor).
    Metrics: those of :func:`mintjax.losses.policy_summary` of the sequences' ratios, each counted
    once per token, and ``tokens``, by whose number those of several requests are weighed.
    """

    def inputs(self, data: Batch, logprobs: Ragged, where: Ragged | None) -> list[Any]:
        """Reads the columns, with the log-ratios of sequences in the place of ``logprobs``."""
        sampling, *others = (
            self.column(data, {"sequence_log_ratios": "logprobs"}.get(name, name))
            for name in self.reads
        )
        shifts = tokenwise(losses.kl_k1, logprobs, [sampling], where)
        mean = shifts.mean(where)
        if self.summed:
            mean = shifts.sum(where)
        return [jax.lax.stop_gradient(mean), *others]

    summed: ClassVar[bool] = False
    """True for a loss that takes the sum of the tokens' log-ratios, not their mean."""

    def watch(self, logprobs: Ragged, inputs: list[Any], where: Ragged | None) -> dict[str, Array]:
        """Summarises how far the sequences are from the policy that sampled them."""
        spread = logprobs.map(_spread, inputs[0])
        return super().watch(spread, [0.0, *inputs[1:]], where)


class GeometricPolicyObjective(PolicyObjective):
    """A policy loss with one ratio per sequence, the geometric mean of those of its tokens.

    Each datum is one sequence. Reads ``logprobs`` (of the sampling policy), ``advantages`` (one per
    token, of which the mean counts, or one per datum) and, if there are any, ``weights`` as a mask.
    The loss is the mean over datums. Metrics: those of :func:`mintjax.losses.policy_summary`, and
    ``tokens``, by whose number those of several requests are weighed.
    """

    aggregation: Aggregation = option("sequence_mean", static=True)

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Computes the loss, and its metrics."""
        where = answer_mask(data, logprobs)
        inputs = self.inputs(data, logprobs, where)
        ratio = jnp.exp(tokenwise(self.apply, logprobs, inputs, where).mean(where))
        advantage = logprobs.map(_spread, inputs[1]).mean(where)
        # Every token gets the loss of its sequence, so that each way to aggregate has its meaning.
        loss = jnp.where(advantage == 0, 0, -jnp.where(advantage == 0, 0, ratio) * advantage)
        values = logprobs.map(_spread, loss)
        return self.reduce(values, where), self.watch(logprobs, inputs, where)


class BatchPolicyObjective(PolicyObjective):
    """A policy loss that looks at all tokens of a batch together.

    Reads ``logprobs`` (of the sampling policy), ``advantages`` (one per token, or one per datum),
    further columns that the loss names (one number per token, such as ``noise``) and, if there are
    any, ``weights`` as a mask (one that is neither 0 nor 1 is a factor). Of a step in several
    requests, each request is looked at by itself. Metrics: those of
    :func:`mintjax.losses.policy_summary`, whose ``clip_fraction`` counts tokens that the loss drew
    too, and ``tokens``, by whose number those of several requests are weighed.
    """

    drawn: ClassVar[Loss | None] = None
    """Marks the tokens that the loss leaves without a gradient beside those that it clips."""

    @property
    def couples_datums(self) -> str | None:
        """Says that the loss of a token depends on those of other datums."""
        return "the loss of a token depends on those of other datums"

    def losses_of(self, logprobs: Ragged, inputs: list[Any], where: Ragged | None) -> Ragged:
        """Computes the loss of each token, from all of them."""
        return together(self.apply, logprobs, inputs, where)

    def watch(self, logprobs: Ragged, inputs: list[Any], where: Ragged | None) -> dict[str, Array]:
        """Summarises how far the policy is from the one that sampled."""
        metrics = super().watch(logprobs, inputs, where)
        mark = type(self).drawn
        if mark is None:
            return metrics
        settings = {name: getattr(self, name) for name in self.settings}
        drawn = together(partial(mark, **settings), logprobs, inputs, where)
        number = drawn.astype(jnp.float32).total(where)
        share = number / jnp.maximum(metrics["tokens"], 1)
        return metrics | {"clip_fraction": metrics["clip_fraction"] + share}


class PenaltyObjective(TokenObjective):
    """A regulariser over a batch: every token of every datum pays, with a true gradient.

    Reads ``ref_logprobs``, where the loss has a reference, and, if there are any, ``weights`` as a
    mask. Metrics: ``mean``, the penalty per token, and ``tokens``, their number.
    """

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Computes the penalty, and its metrics."""
        where = answer_mask(data, logprobs)
        values = tokenwise(self.apply, logprobs, self.inputs(data, logprobs, where), where)
        return self.reduce(values, where), _mean(values, where)


class CandidateObjective(TokenObjective):
    """A loss over the candidates at every position, over a batch.

    Reads a column of the candidates' shape and, if there are any, ``weights`` as a mask: of
    candidates where they are ``[T, K]``, of positions where ``[T]``. Metrics: ``mean``, the loss
    per position, and ``tokens``, the number of positions.
    """

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Computes the loss, and its metrics.

        Raises:
            DataError: the logprobs have no axis of candidates.
        """
        if not logprobs.trailing_shape:
            raise DataError(
                f"{type(self).__name__} needs [T, K] logprobs, of K candidates at every position; "
                "these are [T]. Give target_tokens of shape [T, K].",
                field="target_tokens",
            )
        where = answer_mask(data, logprobs)
        values = tokenwise(self.apply, logprobs, self.inputs(data, logprobs, where), where)
        positions = None if where is None else where.map(partial(jnp.any, axis=-1))
        return self.reduce(values, positions), _mean(values, positions)


def _mean(values: Ragged, where: Ragged | None) -> dict[str, Array]:
    tokens = jnp.sum(values.count(where)).astype(jnp.float32)
    total = jax.lax.stop_gradient(values.total(where))
    return {"mean": total / jnp.maximum(tokens, 1).astype(total.dtype), "tokens": tokens}


def policy(loss: Loss, name: str | None = None, **fixed: Any) -> type[PolicyObjective]:
    """Makes an objective of a policy loss.

    Args:
        loss: ``(target_logprobs, sampling_logprobs, advantages, ..., *, settings, where)``, one
            number per token. A further positional parameter is the column of that name.
        name: of the objective; that of the loss if None.
        fixed: defaults of settings that differ from the loss's; ``served_as``, the name under which
            trainers serve it.

    Returns:
        A class whose instances are objectives: ``policy(my_loss)(tau=0.5)``.

    Example:
        >>> from mintjax import losses, objectives
        >>> wide = objectives.policy(losses.ppo, "wide", clip_high_threshold=1.5)
        >>> wide(max_length=100).clip_high_threshold
        1.5
    """
    return define(PolicyObjective, loss, name, **fixed)


def sequence_policy(loss: Loss, name: str | None = None, **fixed: Any) -> type[PolicyObjective]:
    """Makes an objective of a policy loss of tokens that is given its sequence's log-ratio.

    Args:
        loss: ``(target_logprobs, sequence_log_ratios, advantages, *, settings, where)``.
        name: of the objective; that of the loss if None.
        fixed: as for :func:`policy`; ``summed=True`` for the sum of the tokens' log-ratios, where
            the default is their mean.

    Returns:
        A class whose instances are objectives.
    """
    return define(SequencePolicyObjective, loss, name, **fixed)


def batch_policy(loss: Loss, name: str | None = None, **fixed: Any) -> type[PolicyObjective]:
    """Makes an objective of a policy loss that looks at all tokens of a batch together.

    Args:
        loss: as for :func:`policy`; it must count unmasked positions only.
        name: of the objective; that of the loss if None.
        fixed: as for :func:`policy`.

    Returns:
        A class whose instances are objectives.
    """
    return define(BatchPolicyObjective, loss, name, **fixed)


def penalty(loss: Loss, name: str | None = None, **fixed: Any) -> type[PenaltyObjective]:
    """Makes an objective of a regulariser.

    Args:
        loss: ``(target_logprobs, ..., *, settings, where)``, one number per token. Each further
            positional parameter is the column of that name, such as ``ref_logprobs``.
        name: of the objective; that of the loss if None.
        fixed: defaults of settings that differ from the loss's.

    Returns:
        A class whose instances are objectives.
    """
    return define(PenaltyObjective, loss, name, **fixed)


def candidates(loss: Loss, name: str | None = None, **fixed: Any) -> type[CandidateObjective]:
    """Makes an objective of a loss over K candidates at every position.

    Args:
        loss: ``(target_logprobs, ..., *, settings, where)``, from ``[..., K]`` to ``[...]``. Each
            further positional parameter is the column of that name, such as ``teacher_logprobs``.
        name: of the objective; that of the loss if None.
        fixed: defaults of settings that differ from the loss's.

    Returns:
        A class whose instances are objectives.
    """
    return define(CandidateObjective, loss, name, **fixed)
