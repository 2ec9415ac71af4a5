"""Every loss of the package with inputs to try it on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mintjax import losses

POLICY = ("target_logprobs", "sampling_logprobs", "advantages")
REFERENCE = ("target_logprobs", "ref_logprobs")
PAIR = ("chosen_scores", "rejected_scores")
REF_PAIR = (*PAIR, "ref_chosen_scores", "ref_rejected_scores")
LENGTH_PAIR = (*PAIR, "chosen_lengths", "rejected_lengths")


class Case(NamedTuple):
    """A loss, the names of its arrays, and how many of them are differentiated."""

    loss: Callable[..., Any]
    inputs: tuple[str, ...]
    differentiable: int = 1


ELEMENTWISE = {
    "cross_entropy": Case(losses.cross_entropy, ("target_logprobs", "weights")),
    "importance_sampling": Case(losses.importance_sampling, POLICY),
    "ppo": Case(losses.ppo, POLICY),
    "cispo": Case(losses.cispo, POLICY),
    "dro": Case(losses.dro, POLICY),
    "dual_clip_ppo": Case(losses.dual_clip_ppo, POLICY),
    "dppo": Case(losses.dppo, POLICY),
    "truncated_importance_sampling": Case(losses.truncated_importance_sampling, POLICY),
    "gspo_token": Case(losses.gspo_token, ("target_logprobs", "sequence_log_ratios", "advantages")),
    "kl_k1": Case(losses.kl_k1, REFERENCE),
    "kl_k2": Case(losses.kl_k2, REFERENCE),
    "kl_k3": Case(losses.kl_k3, REFERENCE),
    "sampled_entropy": Case(losses.sampled_entropy, ("target_logprobs",)),
    "l2_to_reference": Case(losses.l2_to_reference, REFERENCE),
    "bradley_terry": Case(losses.bradley_terry, PAIR, 2),
    "dpo": Case(losses.dpo, REF_PAIR, 2),
    "ipo": Case(losses.ipo, REF_PAIR, 2),
    "simpo": Case(losses.simpo, LENGTH_PAIR, 2),
    "orpo": Case(losses.orpo, LENGTH_PAIR, 2),
    "kto": Case(losses.kto, ("scores", "ref_scores", "desirable", "kl")),
}
OVER_THE_LAST_AXIS = {
    "gspo": Case(losses.gspo, POLICY),
    "distillation_forward_kl": Case(
        losses.distillation_forward_kl, ("target_logprobs", "teacher_logprobs")
    ),
    "distillation_reverse_kl": Case(
        losses.distillation_reverse_kl, ("target_logprobs", "teacher_logprobs")
    ),
    "brier_score": Case(losses.brier_score, ("target_logprobs", "outcomes")),
}
ALL = ELEMENTWISE | OVER_THE_LAST_AXIS
STOPS_GRADIENTS = frozenset({"cispo", "truncated_importance_sampling", "gspo", "gspo_token"})


def arrays(case: Case, shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> list[Any]:
    """Inputs of a case, of one shape: ordinary numbers, and ratios inside and outside the clips."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {
        "weights": rng.normal(size=shape),
        "advantages": rng.normal(size=shape),
        "sequence_log_ratios": rng.normal(0, 1e-3, size=shape),
        "desirable": rng.random(shape) < 0.5,
        "kl": np.full(shape, 0.3),
        "outcomes": (rng.random(shape) < 0.5) * 1.0,
        "chosen_lengths": np.full(shape, 7.0),
        "rejected_lengths": np.full(shape, 5.0),
    }
    centre = -rng.gamma(1.0, 1.0, size=shape) - 1.0
    out = []
    for name in case.inputs:
        value = made[name] if name in made else centre + rng.normal(0, 0.3, size=shape)
        out.append(value.astype(dtype))
    return out
