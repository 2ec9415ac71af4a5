"""AdamW on the adapters, with hyperparameters that may change at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]
from jax import Array

from mintjax.errors import DataError
from mintjax.local.model import Weights
from mintjax.types import AdamParams


def init(lora: Weights) -> Any:
    """Optax's state for these adapters: both moments zero, no step taken."""
    return _adamw(math.inf, {"learning_rate": 0.0}).init(lora)


def check_params(params: AdamParams) -> None:
    """Checks the hyperparameters of a step.

    Raises:
        DataError: naming the one that is out of range.
    """
    for name in ("beta1", "beta2"):
        value = getattr(params, name)
        if not 0 <= value < 1:
            raise DataError(f"{value} is not in [0, 1)", field=f"adam_params.{name}")
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name)
        if not 0 <= value < math.inf:
            raise DataError(
                f"{value} is not a finite number of at least 0", field=f"adam_params.{name}"
            )


def step(
    lora: Weights, state: Any, gradient: Weights, divisor: float, params: AdamParams
) -> tuple[Weights, Any, float]:
    """Takes one step of ``torch.optim.AdamW``, after clipping by global norm.

    Args:
        lora: the adapters.
        state: from :func:`init`, or an earlier step.
        gradient: in the layout of ``lora``.
        divisor: divides the gradient, before clipping.
        params: this step's hyperparameters.

    Returns:
        New adapters, new state, and the norm of the divided gradient before clipping.

    Reference: Loshchilov & Hutter 2019, Decoupled Weight Decay Regularization.
    """
    hyperparameters = {
        "learning_rate": params.learning_rate,
        "b1": params.beta1,
        "b2": params.beta2,
        "eps": params.eps,
        "weight_decay": params.weight_decay,
    }
    clip = params.grad_clip_norm or math.inf
    arguments = (lora, state, gradient, divisor, clip, hyperparameters)
    lora, state, length = cast(tuple[Weights, Any, Array], _step(*arguments))
    return lora, state, float(length)


def divided(tree: Weights, divisor: Array | float) -> Weights:
    """Divides each number of the tree."""

    def divide(leaf: Array) -> Array:
        return leaf / divisor

    return jax.tree.map(divide, tree)


def norm(tree: Weights) -> float:
    """Computes the square root of the sum of all squares."""
    return float(_norm(tree))


def all_finite(tree: Any) -> bool:
    """Tells whether no leaf of the tree holds a NaN or an infinity."""
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))


_norm: Callable[[Weights], Array] = jax.jit(optax.tree.norm)


def _adamw(clip: Array | float, hyperparameters: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(**hyperparameters))


@jax.jit
def _step(
    lora: Weights,
    state: Any,
    gradient: Weights,
    divisor: Array,
    clip: Array,
    hyperparameters: Mapping[str, Array],
) -> tuple[Weights, Any, Array]:
    gradient = divided(gradient, divisor)
    updates, state = _adamw(clip, hyperparameters).update(gradient, state, lora)
    new_lora: Any = optax.apply_updates(lora, updates)
    return new_lora, state, optax.tree.norm(gradient)
