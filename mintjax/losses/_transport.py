"""Preference losses of whole distributions: every chosen answer against every rejected one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mintjax.losses._arrays import aligned, as_mask, finish
from mintjax.losses._scores import gains, smoothed


def aot(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Alignment by optimal transport: the sorted margins must dominate the reference's.

    ``loss_i = -(1 - e) * log sigmoid(beta * d_i) - e * log sigmoid(-beta * d_i)`` with ``d_i`` the
    i-th smallest of ``chosen_scores - rejected_scores`` less the i-th smallest of
    ``ref_chosen_scores - ref_rejected_scores``, over the last axis, and ``e = label_smoothing``.

    When to use it: large batches, where the distribution of margins is to improve at every
    quantile, not each pair against itself.

    What others do: TRL calls it "aot" (formerly "aot_pair").

    Args:
        chosen_scores: sum of the logprobs of each pair's chosen answer under the model in training,
            in nats: ``[..., P]``, the last axis along the pairs that are compared.
        rejected_scores: of the rejected answers; same shape.
        ref_chosen_scores: of the chosen answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the rejected answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar.
        label_smoothing: ``e``, in [0, 1/2); a scalar.
        where: same shape, boolean; which pairs count. The losses stand in the order of the margins,
            those of pairs that are False, 0, behind.

    Returns:
        The loss of each quantile, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.aot([-3.0, -2.0], [-6.0, -1.0], [-4.0, -4.0], [-4.0, -5.0]).tolist()
        [0.744, 0.598]

    Reference:
        Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", the
        paired case.
    """
    chosen, rejected, ref_chosen, ref_rejected, beta, smoothing = aligned(
        where,
        chosen_scores,
        rejected_scores=rejected_scores,
        ref_chosen_scores=ref_chosen_scores,
        ref_rejected_scores=ref_rejected_scores,
        beta=beta,
        label_smoothing=label_smoothing,
    )
    margins, present = _sorted(chosen - rejected, where)
    bars, _ = _sorted(ref_chosen - ref_rejected, where)
    loss = smoothed(beta.max() * jnp.where(present, margins - bars, 0), smoothing.max())
    return finish(loss, None if where is None else present, chosen_scores)


def aot_unpaired(
    chosen_scores: ArrayLike,
    rejected_scores: ArrayLike,
    ref_chosen_scores: ArrayLike,
    ref_rejected_scores: ArrayLike,
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Alignment by optimal transport: sorted chosen gains must dominate sorted rejected ones.

    ``loss_i = -(1 - e) * log sigmoid(beta * d_i) - e * log sigmoid(-beta * d_i)`` with ``d_i`` the
    i-th smallest of ``chosen_scores - ref_chosen_scores`` less the i-th smallest of
    ``rejected_scores - ref_rejected_scores``, over the last axis, and ``e = label_smoothing``.

    When to use it: good and bad answers that are no pairs, in equal numbers.

    What others do: TRL calls it "aot_unpaired" (formerly "aot").

    Args:
        chosen_scores: sum of the logprobs of good answers under the model in training, in nats:
            ``[..., P]``, the last axis along the answers that are compared.
        rejected_scores: of bad answers; same shape.
        ref_chosen_scores: of the good answers under the reference model; same shape, or a scalar.
        ref_rejected_scores: of the bad answers; same shape, or a scalar.
        beta: strength of the pull to the reference; a scalar.
        label_smoothing: ``e``, in [0, 1/2); a scalar.
        where: same shape, boolean; which answers count. The losses stand in the order of the gains,
            those of answers that are False, 0, behind.

    Returns:
        The loss of each quantile, in nats; shape and dtype of ``chosen_scores``.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> from mintjax import losses
        >>> losses.aot_unpaired([-3.0, -2.0], [-6.0, -1.0], [-4.0, -4.0], [-4.0, -5.0]).tolist()
        [0.554, 0.798]

    Reference:
        Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", the
        unpaired case.
    """
    won, lost, beta, smoothing = gains(
        where,
        chosen_scores,
        rejected_scores,
        ref_chosen_scores,
        ref_rejected_scores,
        beta,
        label_smoothing=label_smoothing,
    )
    won, present = _sorted(won, where)
    lost, _ = _sorted(lost, where)
    loss = smoothed(beta.max() * jnp.where(present, won - lost, 0), smoothing.max())
    return finish(loss, None if where is None else present, chosen_scores)


def _sorted(values: jax.Array, where: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    """Sorts the last axis, what is masked behind, and marks what is not."""
    if where is None:
        return jnp.sort(values, axis=-1), jnp.ones(values.shape, bool)
    mask = as_mask(where, values.shape)
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)
    number = jnp.sum(mask.astype(jnp.int32), axis=-1, keepdims=True)
    positions = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    present = positions < number
    return jnp.where(present, ordered, 0), present
