"""The five losses of ``benchmarks.gradient_cost`` as loops over a list, as users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def sequence_logprob(logprobs: Any, weights: Any) -> Any:
    return jnp.dot(logprobs.flatten().astype(jnp.float32), jnp.asarray(weights, jnp.float32))


def bradley_terry(data: Any, logprobs_list: Any) -> Any:
    """Computes the pairwise example of the official documentation, with jnp in place of torch."""
    if len(data) % 2 != 0:
        raise ValueError("Expected (chosen, rejected) pairs.")
    chosen_scores: list[Any] = []
    rejected_scores: list[Any] = []
    for chosen_datum, rejected_datum, chosen_logprobs, rejected_logprobs in zip(
        data[::2], data[1::2], logprobs_list[::2], logprobs_list[1::2], strict=True
    ):
        chosen_scores.append(
            sequence_logprob(chosen_logprobs, chosen_datum.loss_fn_inputs["weights"])
        )
        rejected_scores.append(
            sequence_logprob(rejected_logprobs, rejected_datum.loss_fn_inputs["weights"])
        )
    chosen_scores_array = jnp.stack(chosen_scores)
    rejected_scores_array = jnp.stack(rejected_scores)
    margins = chosen_scores_array - rejected_scores_array
    loss = -jax.nn.log_sigmoid(margins).mean()
    metrics = {
        "loss": loss,
        "pair_accuracy": (margins > 0).astype(jnp.float32).mean(),
        "mean_margin": margins.mean(),
    }
    return loss, metrics


def dpo(data: Any, logprobs_list: Any) -> Any:
    scores: list[Any] = []
    for datum, lp in zip(data, logprobs_list, strict=True):
        inputs = datum.loss_fn_inputs
        scores.append(((lp - inputs["ref_logprobs"]) * inputs["weights"]).sum())
    margins = [0.1 * (a - b) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    return -jax.nn.log_sigmoid(jnp.stack(margins)).mean(), {}


def ppo(data: Any, logprobs_list: Any) -> Any:
    total: Any = 0.0
    clipped: list[Any] = []
    for datum, lp in zip(data, logprobs_list, strict=True):
        ratio = jnp.exp(lp - datum.loss_fn_inputs["logprobs"])
        advantages = datum.loss_fn_inputs["advantages"]
        bounded = jnp.clip(ratio, 0.8, 1.2)
        total = total - jnp.minimum(ratio * advantages, bounded * advantages).sum()
        clipped.append((ratio != bounded).mean())
    return total, {"clipped": jnp.stack(clipped).mean()}


def cispo(data: Any, logprobs_list: Any) -> Any:
    total: Any = 0.0
    for datum, lp in zip(data, logprobs_list, strict=True):
        ratio = jnp.clip(jnp.exp(lp - datum.loss_fn_inputs["logprobs"]), 0.8, 1.2)
        weight = jax.lax.stop_gradient(ratio) * datum.loss_fn_inputs["advantages"]
        total = total - (weight * lp).sum()
    return total, {}


def dro(data: Any, logprobs_list: Any) -> Any:
    losses: list[Any] = []
    for datum, lp in zip(data, logprobs_list, strict=True):
        squares = (lp - datum.loss_fn_inputs["logprobs"]) ** 2
        losses.append(-(lp * datum.loss_fn_inputs["advantages"] - 0.025 * squares).sum())
    return sum(losses), {}


LISTS: dict[str, Callable[[Any, Any], Any]] = {
    loss.__name__: loss for loss in (bradley_terry, dpo, ppo, cispo, dro)
}
