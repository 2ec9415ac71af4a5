"""Losses as objectives: ``(data, logprobs) -> (scalar, metrics)``, values that compose.

``ppo(clip_high_threshold=1.3)`` is a value to hold, compare, print and call. Each objective says
which columns of ``loss_fn_inputs`` it reads: ``logprobs`` (of the sampling policy), ``advantages``,
``ref_logprobs`` (of a reference model), ``weights`` (a mask, where nothing else is said).
"""

from mintjax.objectives._base import LossObjective
from mintjax.objectives._builtin import cispo, cross_entropy, dro, importance_sampling, ppo
from mintjax.objectives._combine import WeightedSum, weighted_sum
from mintjax.objectives._distillation import (
    brier_score,
    distillation_forward_kl,
    distillation_reverse_kl,
)
from mintjax.objectives._penalties import kl_k1, kl_k2, kl_k3, l2_to_reference, sampled_entropy
from mintjax.objectives._policy import dppo, dual_clip_ppo, gspo, truncated_importance_sampling
from mintjax.objectives._preference import bradley_terry, dpo, ipo, kto, orpo, simpo

__all__ = [
    "LossObjective",
    "WeightedSum",
    "bradley_terry",
    "brier_score",
    "cispo",
    "cross_entropy",
    "distillation_forward_kl",
    "distillation_reverse_kl",
    "dpo",
    "dppo",
    "dro",
    "dual_clip_ppo",
    "gspo",
    "importance_sampling",
    "ipo",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto",
    "l2_to_reference",
    "orpo",
    "ppo",
    "sampled_entropy",
    "simpo",
    "truncated_importance_sampling",
    "weighted_sum",
]
