"""Objectives made of one loss per pair, per labelled answer, or per ranked list of answers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mintjax import losses
from mintjax.errors import DataError
from mintjax.losses._reference_free import bent_reward
from mintjax.losses._settings import check_count
from mintjax.objectives._base import Array, Loss, LossObjective, counted, define, option
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch


class SequenceObjective(LossObjective):
    """A loss of whole datums, each scored by the sum of its answer's logprobs."""

    per_token: bool = False

    def scores(self, data: Batch, logprobs: Ragged) -> Array:
        """Sums each datum's logprobs times its weights, ``[B]``; a weight of 0 hides the token."""
        total = -logprobs.map(losses.cross_entropy, self.column(data, "weights")).sum()
        return total / self.lengths(data, logprobs) if self.per_token else total

    def gains(self, data: Batch, logprobs: Ragged) -> Array:
        """Scores what the logprobs gained over the column ``ref_logprobs``, ``[B]``."""
        return self.scores(data, logprobs - self.column(data, "ref_logprobs"))

    def lengths(self, data: Batch, logprobs: Ragged) -> Array:
        """Counts each datum's tokens with a weight other than 0, ``[B]``; at least 1."""
        tokens = logprobs.count(counted(logprobs, self.column(data, "weights")))
        return jnp.maximum(tokens, 1).astype(jnp.float32)


class PairObjective(SequenceObjective):
    """A preference loss, as a mean over pairs.

    Datums 0 and 1, 2 and 3, ... are a chosen and a rejected answer. Reads ``weights``: 1 on the
    tokens of the answer, 0 on those of the prompt; and ``ref_logprobs``, where the loss has a
    reference. Metrics: ``pair_accuracy``, ``mean_margin``, ``mean_chosen`` and ``mean_rejected`` of
    the rewards that the loss compares, and ``pairs``, by whose number those of several requests are
    weighed.

    Args:
        per_token: score answers by the mean logprob of their tokens instead of the sum.
        reference_free: take the reference for uniform, and read no ``ref_logprobs``.
    """

    pad_rows_to: ClassVar[int | None] = 2
    exact: ClassVar[bool] = False
    """True for a loss that looks at scores and references by themselves. For others the differences
    are summed token by token, because a difference of sums has fewer digits."""
    reward: ClassVar[Callable[..., Array] | None] = None
    """The reward of a score, if it is not ``beta`` times it."""
    per_token: bool = option(False, static=True)
    reference_free: bool = option(False, static=True)

    def rewards(self, data: Batch, logprobs: Ragged) -> Array:
        """Rewards each datum as the loss does, ``[B]``, for the metrics."""
        compared = "ref_chosen_scores" in self.reads and not self.reference_free
        rewards = self.gains(data, logprobs) if compared else self.scores(data, logprobs)
        if "rejected_lengths" in self.reads and not self.per_token:
            rewards = rewards / self.lengths(data, logprobs).astype(rewards.dtype)
        reward = type(self).reward
        if reward is not None:
            settings = {name: getattr(self, name) for name in self.settings}
            return reward(rewards, **settings)
        return getattr(self, "beta", 1.0) * rewards

    def inputs(self, data: Batch, logprobs: Ragged) -> list[Array]:
        """Scores the batch: one ``[P]`` array for each positional parameter of the loss."""
        compared = "ref_chosen_scores" in self.reads and not self.reference_free
        known: dict[str, Array] = {}
        if compared and not self.exact:
            known["scores"] = self.gains(data, logprobs)
        else:
            known["scores"] = self.scores(data, logprobs)
        known["ref_scores"] = jnp.zeros_like(known["scores"])
        if compared and self.exact:
            reference = self.column(data, "ref_logprobs")
            known["ref_scores"] = self.scores(data, reference)
        found: list[Array] = []
        for name in ("chosen_scores", *self.reads):
            side = 0 if "chosen" in name else 1
            what = name.replace("chosen_", "").replace("rejected_", "")
            if what == "lengths" and what not in known:
                known[what] = self.lengths(data, logprobs)
            if what not in known:
                known[what] = self.extra(data, logprobs, what)
            found.append(known[what][side::2])
        return found

    def extra(self, data: Batch, logprobs: Ragged, what: str) -> Array:
        """Reads what a loss is given of each answer besides: a column with one number per datum."""
        return jnp.asarray(self.column(data, what))

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Takes the mean over pairs, and the metrics.

        Raises:
            DataError: an odd number of datums.
        """
        if len(data) % 2:
            raise DataError(
                f"{type(self).__name__} needs pairs, chosen, rejected, chosen, rejected, ..., but "
                f"there are {len(data)} datums; the last one has no partner"
            )
        where = jnp.asarray(logprobs.row_mask)[0::2]
        values = self.apply(*self.inputs(data, logprobs), where=where)
        rewards = self.rewards(data, logprobs)
        sums = losses.preference_sums(rewards[0::2], rewards[1::2], where=where)
        metrics = losses.preference_summary(sums) | {"pairs": sums["pairs"]}
        return jnp.sum(values) / jnp.maximum(sums["pairs"], 1), metrics


class WeightedPairObjective(PairObjective):
    """A preference loss whose pairs are weighed by how likely the model itself is to write them.

    Datums 0 and 1, 2 and 3, ... are a chosen and a rejected answer. Reads ``weights``: 1 on the
    tokens of the answer, 0 on those of the prompt; ``ref_logprobs``; and, if there is one,
    ``log_collisions``, ``log sum_v p(v)**2`` of each token's distribution. Metrics:
    ``pair_accuracy``, ``mean_margin``, ``mean_chosen`` and ``mean_rejected`` of the rewards that
    the loss compares, and ``pairs``, by whose number those of several requests are weighed.
    """

    def extra(self, data: Batch, logprobs: Ragged, what: str) -> Array:
        """Takes the mean logprob of each answer, less its alignment, as its log-weight."""
        aligned = logprobs - data["log_collisions"] if "log_collisions" in data else logprobs
        total = -aligned.map(losses.cross_entropy, counted(logprobs, self.column(data, "weights")))
        mean = total.sum() / self.lengths(data, logprobs).astype(total.dtype)
        return jax.lax.stop_gradient(mean)


class LabelledObjective(SequenceObjective):
    """A loss of single labelled answers, as a mean over datums.

    Reads ``weights``, ``ref_logprobs`` and ``desirable``: one number per datum (or per token, of
    which the largest counts), 1 for a good answer, 0 or -1 for a bad one. Metrics: the point of
    reference, ``mean_reward_desirable`` and ``mean_reward_undesirable``, of ``beta * (s - ref)``,
    and ``desirable`` and ``undesirable``, the numbers of answers, by which those of several
    requests are weighed.

    Args:
        kl: the point of reference, in nats. None estimates it from the batch, as the mean of
            ``s - ref`` and at least 0; the paper has it from answers to other prompts, which a
            training loop can measure and pass.
        reward_shift: the point of reference, in units of the reward. None estimates it from the
            batch, as the middle between the mean rewards of good and of bad answers.
    """

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Takes the mean over datums, and the metrics."""
        label = self.column(data, "desirable")
        label = label.max() if isinstance(label, Ragged) else label
        where = jnp.asarray(logprobs.row_mask)
        gains = self.gains(data, logprobs)
        gain = jax.lax.stop_gradient(gains)
        rewards: Any = self.beta * gain
        desirable = where & (jnp.asarray(label) > 0)
        undesirable = where & ~desirable
        good = losses.token_mean(rewards, where=desirable)
        bad = losses.token_mean(rewards, where=undesirable)
        (point,) = self.reads[2:]
        given = getattr(self, point)
        if given is None:
            batch_kl = jnp.maximum(losses.token_mean(gain, where=where), 0)
            given = batch_kl if point == "kl" else (good + bad) / 2
        elif point == "kl":
            given = jnp.maximum(jnp.asarray(given), 0)
        values = self.apply(gains, jnp.zeros_like(gains), label, given, where=where)
        metrics = {
            point: given,
            "mean_reward_desirable": good,
            "mean_reward_undesirable": bad,
            "desirable": jnp.sum(desirable.astype(jnp.float32)),
            "undesirable": jnp.sum(undesirable.astype(jnp.float32)),
        }
        return losses.token_mean(values, where=where), metrics


class ListObjective(SequenceObjective):
    """A loss of ranked lists of answers, as a mean over lists.

    Every ``group_size`` datums in a row answer one prompt, the best first. Reads ``weights``: 1 on
    the tokens of the answer, 0 on those of the prompt; and ``ref_logprobs``, unless it is
    reference-free. Metrics: ``first_accuracy``, how often the best answer has the largest reward
    ``beta * (s - ref)``, and ``lists``, by whose number those of several requests are weighed.

    Args:
        group_size: how many answers a list has.
        beta: scale of the reward.
        per_token: score answers by the mean logprob of their tokens instead of the sum.
        reference_free: take the reference for uniform, and read no ``ref_logprobs``.
    """

    group_size: int = option(4, static=True)
    beta: float = option(0.1)
    per_token: bool = option(False, static=True)
    reference_free: bool = option(False, static=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.group_size, f"group_size of {type(self).__name__}", 2)

    @property
    def pad_rows_to(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Pads the row count of a batch to whole lists."""
        return self.group_size

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Takes the mean over lists, and the metrics.

        Raises:
            DataError: the datums do not divide into lists.
        """
        if len(data) % self.group_size:
            raise DataError(
                f"{type(self).__name__} needs lists of {self.group_size} answers, but "
                f"there are {len(data)} datums"
            )
        free = self.reference_free
        scores = self.scores(data, logprobs) if free else self.gains(data, logprobs)
        rewards = (self.beta * scores).reshape(-1, self.group_size)
        real = jnp.asarray(logprobs.row_mask).reshape(-1, self.group_size)[:, 0]
        values = self.apply(rewards, where=jnp.broadcast_to(real[:, None], rewards.shape))
        fixed = jax.lax.stop_gradient(rewards)
        won = (fixed[:, 0] > jnp.max(fixed[:, 1:], axis=1)).astype(rewards.dtype)
        metrics = {
            "first_accuracy": losses.token_mean(won, where=real),
            "lists": jnp.sum(real.astype(jnp.float32)),
        }
        return losses.token_mean(values, where=real), metrics


def _bent(mean_logprobs: Array, *, beta: Array, alpha: Array, gamma: Array) -> Array:
    """Rewards a mean logprob as :func:`mintjax.losses.alphapo` does."""
    return beta * bent_reward(mean_logprobs, alpha=alpha)


def preference(loss: Loss, name: str | None = None, **fixed: Any) -> type[PairObjective]:
    """Makes an objective of a preference loss.

    Args:
        loss: ``(chosen_scores, rejected_scores, ..., *, settings, where)``, one number per pair.
            The names of its positional parameters say what it is given: ``chosen_scores`` and
            ``rejected_scores``, ``ref_chosen_scores`` and ``ref_rejected_scores``,
            ``chosen_lengths`` and ``rejected_lengths``; ``chosen_x`` and ``rejected_x`` are the
            column ``x``, with one number per datum.
        name: of the objective; that of the loss if None.
        fixed: defaults of settings that differ from the loss's; ``exact=True`` for a loss that
            looks at scores and references by themselves, not only at their differences.

    Returns:
        A class whose instances are objectives: ``preference(my_loss)(beta=0.5)``.

    Example:
        >>> from mintjax import losses, objectives
        >>> tulu = objectives.preference(losses.dpo, "tulu", beta=5.0, per_token=True)
        >>> tulu()
        tulu(beta=5.0, label_smoothing=0.0)
    """
    parameters = inspect.signature(loss).parameters
    omit = [
        option
        for option, does_not_fit in {
            "per_token": "chosen_lengths" in parameters,
            "reference_free": "ref_chosen_scores" not in parameters,
        }.items()
        if does_not_fit
    ]
    family = WeightedPairObjective if "chosen_log_weights" in parameters else PairObjective
    return define(family, loss, name, omit=omit, **fixed)


bradley_terry = preference(losses.bradley_terry)
dpo = preference(losses.dpo)
length_normalised_dpo = preference(losses.length_normalised_dpo)
robust_dpo = preference(losses.robust_dpo)
rpo = preference(losses.rpo, exact=True)
f_dpo = preference(losses.f_dpo)
wpo = preference(losses.wpo)
ipo = preference(losses.ipo, positive=("beta",))
hinge = preference(losses.hinge)
exo_pair = preference(losses.exo_pair, positive=("label_smoothing",))
discopop = preference(losses.discopop)
apo_zero = preference(losses.apo_zero)
apo_down = preference(losses.apo_down)
nca_pair = preference(losses.nca_pair)
bco_pair = preference(losses.bco_pair)
sppo = preference(losses.sppo, positive=("beta",))
aot = preference(losses.aot, exact=True)
aot_unpaired = preference(losses.aot_unpaired)
simpo = preference(losses.simpo)
alphapo = preference(losses.alphapo, reward=_bent)
orpo = preference(losses.orpo)
cpo = preference(losses.cpo)
slic = preference(losses.slic)

kto = define(LabelledObjective, losses.kto, extra={"kl": option(None)})
bco = define(LabelledObjective, losses.bco, extra={"reward_shift": option(None)})

plackett_luce = define(ListObjective, losses.plackett_luce)
