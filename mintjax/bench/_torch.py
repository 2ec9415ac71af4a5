"""The same objectives in torch, on lists of rows, as users of the official SDK write them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mintjax import objectives
from mintjax.bench._synthetic import Arrays
from mintjax.errors import ConfigError

Tensor: TypeAlias = Any
Rows: TypeAlias = Sequence[Tensor]
TorchLoss: TypeAlias = Callable[..., Tensor]
"""``(rows of logprobs, *, column=rows, ...) -> scalar``, all of them tensors."""


def counterpart(objective: Any) -> tuple[TorchLoss, tuple[str, ...]] | None:
    """Finds the torch loss that computes what an objective does, with its hyperparameters.

    Args:
        objective: one of ``mintjax.objectives``.

    Returns:
        The loss, and the columns it takes; None if there is none for this objective.

    Raises:
        ConfigError: torch is missing.
    """
    for kind, (make, columns) in _COUNTERPARTS.items():
        if type(objective) is kind:
            return make(import_torch(), objective), columns
    return None


def gradient(loss: TorchLoss, columns: Sequence[str]) -> Callable[[Arrays], list[Any]]:
    """Makes a function that computes a counterpart's gradient, from and to NumPy arrays.

    Args:
        loss: the torch loss.
        columns: those that it takes.

    Returns:
        A function that gives one array for each row of logprobs.
    """
    torch = import_torch()

    def run(arrays: Arrays) -> list[npt.NDArray[np.float32]]:
        leaves = [torch.from_numpy(row).requires_grad_(True) for row in arrays.logprobs]
        rows = {
            name: [torch.from_numpy(np.asarray(d.loss_fn_inputs[name])) for d in arrays.data]
            for name in columns
        }
        loss(leaves, **rows).backward()
        return [leaf.grad.numpy() for leaf in leaves]

    return run


def import_torch() -> Any:
    """Imports the module ``torch``.

    Raises:
        ConfigError: it is missing.
    """
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError:
        raise ConfigError("torch is not installed: pip install torch") from None


def _scores(torch: Any, rows: Rows, weights: Rows) -> list[Tensor]:
    return [torch.dot(row, w) for row, w in zip(rows, weights, strict=True)]


def _preference(torch: Any, scores: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2]).mean()


def _bradley_terry(torch: Any, objective: Any) -> TorchLoss:
    def loss(rows: Rows, *, weights: Rows) -> Tensor:
        return _preference(torch, torch.stack(_scores(torch, rows, weights)))

    return loss


def _dpo(torch: Any, objective: Any) -> TorchLoss:
    def loss(rows: Rows, *, weights: Rows, ref_logprobs: Rows) -> Tensor:
        scores, references = (_scores(torch, r, weights) for r in (rows, ref_logprobs))
        gains = torch.stack([s - r for s, r in zip(scores, references, strict=True)])
        rewards, smoothing = objective.beta * gains, objective.label_smoothing
        loss = (1 - smoothing) * _preference(torch, rewards)
        return loss + smoothing * _preference(torch, -rewards) if smoothing else loss

    return loss


def _cross_entropy(torch: Any, objective: Any) -> TorchLoss:
    def loss(rows: Rows, *, weights: Rows) -> Tensor:
        return -torch.stack(_scores(torch, rows, weights)).sum()

    return loss


def _policy(token_loss: Callable[..., Tensor]) -> Callable[[Any, Any], TorchLoss]:
    def make(torch: Any, objective: Any) -> TorchLoss:
        def loss(rows: Rows, *, logprobs: Rows, advantages: Rows) -> Tensor:
            tokens = zip(rows, logprobs, advantages, strict=True)
            return torch.stack([token_loss(torch, objective, *row).sum() for row in tokens]).sum()

        return loss

    return make


def _importance_sampling(torch: Any, me: Any, lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
    return -(torch.exp(lp - q) * a)


def _ppo(torch: Any, me: Any, lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
    ratio = torch.exp(lp - q)
    clipped = torch.clamp(ratio, me.clip_low_threshold, me.clip_high_threshold)
    return -torch.min(ratio * a, clipped * a)


def _cispo(torch: Any, me: Any, lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
    ratio = torch.exp(lp - q)
    return -(torch.clamp(ratio, me.clip_low_threshold, me.clip_high_threshold).detach() * lp * a)


def _dro(torch: Any, me: Any, lp: Tensor, q: Tensor, a: Tensor) -> Tensor:
    return -(lp * a - 0.5 * me.beta * (lp - q) ** 2)


_TOKENS = ("logprobs", "advantages")
_COUNTERPARTS: dict[type, tuple[Callable[[Any, Any], TorchLoss], tuple[str, ...]]] = {
    objectives.cross_entropy: (_cross_entropy, ("weights",)),
    objectives.importance_sampling: (_policy(_importance_sampling), _TOKENS),
    objectives.ppo: (_policy(_ppo), _TOKENS),
    objectives.cispo: (_policy(_cispo), _TOKENS),
    objectives.dro: (_policy(_dro), _TOKENS),
    objectives.bradley_terry: (_bradley_terry, ("weights",)),
    objectives.dpo: (_dpo, ("weights", "ref_logprobs")),
}
