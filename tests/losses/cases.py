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
LENGTHS = ("chosen_lengths", "rejected_lengths")
LENGTH_PAIR = (*PAIR, *LENGTHS)


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
    "bco": Case(losses.bco, ("scores", "ref_scores", "desirable", "reward_shift")),
    "dapo": Case(losses.dapo, POLICY),
    "sapo": Case(losses.sapo, POLICY),
    "stable_reinforce": Case(losses.stable_reinforce, POLICY),
    "focal_cross_entropy": Case(losses.focal_cross_entropy, ("target_logprobs", "weights")),
    "dppo_kl": Case(losses.dppo_kl, POLICY),
    "masked_importance_sampling": Case(losses.masked_importance_sampling, POLICY),
    "vespo_token": Case(losses.vespo_token, ("target_logprobs", "sequence_log_ratios", POLICY[2])),
    "gmpo_log_ratios": Case(losses.gmpo_log_ratios, POLICY),
    "kl_abs": Case(losses.kl_abs, REFERENCE),
    "kl_k3_straight_through": Case(losses.kl_k3_straight_through, REFERENCE),
    "kl_k3_corrected": Case(losses.kl_k3_corrected, (*REFERENCE, "sampling_logprobs")),
    "unlikelihood": Case(losses.unlikelihood, ("target_logprobs",)),
    "kl_in_reward": Case(losses.kl_in_reward, ("rewards", "sampling_logprobs", "ref_logprobs")),
    "length_normalised_dpo": Case(losses.length_normalised_dpo, (*REF_PAIR, *LENGTHS), 2),
    "rpo": Case(losses.rpo, (*REF_PAIR, "chosen_lengths"), 2),
    "wpo": Case(losses.wpo, (*REF_PAIR, "chosen_log_weights", "rejected_log_weights"), 2),
    **{
        name: Case(getattr(losses, name), REF_PAIR, 2)
        for name in (
            "robust_dpo",
            "hinge",
            "exo_pair",
            "discopop",
            "f_dpo",
            "apo_zero",
            "apo_down",
            "nca_pair",
            "bco_pair",
            "sppo",
        )
    },
    "cpo": Case(losses.cpo, (*PAIR, "chosen_lengths"), 2),
    "alphapo": Case(losses.alphapo, LENGTH_PAIR, 2),
    "slic": Case(losses.slic, PAIR, 2),
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
    "generalised_jsd": Case(losses.generalised_jsd, ("target_logprobs", "teacher_logprobs")),
    "gmpo": Case(losses.gmpo, POLICY),
    "luspo": Case(losses.luspo, POLICY),
    "vespo": Case(losses.vespo, POLICY),
    "plackett_luce": Case(losses.plackett_luce, ("scores",)),
    "discounted_returns": Case(losses.discounted_returns, ("rewards",)),
    "gae": Case(losses.gae, ("rewards", "values")),
}
ALL = ELEMENTWISE | OVER_THE_LAST_AXIS
STOPS_GRADIENTS = frozenset(
    {
        "cispo",
        "truncated_importance_sampling",
        "masked_importance_sampling",
        "gspo",
        "gspo_token",
        "luspo",
        "vespo",
        "vespo_token",
        "focal_cross_entropy",
        "kl_k3_straight_through",
    }
)


def arrays(case: Case, shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> list[Any]:
    """Inputs of a case, of one shape: ordinary numbers, and ratios inside and outside the clips."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {
        "weights": rng.normal(size=shape),
        "advantages": rng.normal(size=shape),
        "sequence_log_ratios": rng.normal(0, 1e-3, size=shape),
        "desirable": rng.random(shape) < 0.5,
        "kl": np.full(shape, 0.3),
        "reward_shift": np.full(shape, 0.1),
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
