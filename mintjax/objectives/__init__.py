"""Losses as objectives: ``(data, logprobs) -> (scalar, metrics)``, values that compose.

``ppo(clip_high_threshold=1.3)`` is a value to hold, compare, print and call. Each objective says
which columns of ``loss_fn_inputs`` it reads: ``logprobs`` (of the sampling policy), ``advantages``,
``ref_logprobs`` (of a reference model), ``weights`` (a mask, where nothing else is said).
:func:`policy`, :func:`preference` and their like make an objective of a loss of your own.
"""

from mintjax.objectives._aggregate import Aggregation
from mintjax.objectives._base import LossObjective
from mintjax.objectives._builtin import (
    brier_score,
    cispo,
    cross_entropy,
    distillation_forward_kl,
    distillation_reverse_kl,
    dppo,
    dro,
    dual_clip_ppo,
    gspo,
    importance_sampling,
    kl_k2,
    kl_k3,
    l2_to_reference,
    ppo,
    sampled_entropy,
    truncated_importance_sampling,
)
from mintjax.objectives._combine import WeightedSum, weighted_sum
from mintjax.objectives._preference import bradley_terry, dpo, ipo, kto, orpo, preference, simpo
from mintjax.objectives._tokens import candidates, penalty, policy, sequence_policy

__all__ = [
    "Aggregation",
    "LossObjective",
    "WeightedSum",
    "bradley_terry",
    "brier_score",
    "candidates",
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
    "kl_k2",
    "kl_k3",
    "kto",
    "l2_to_reference",
    "orpo",
    "penalty",
    "policy",
    "ppo",
    "preference",
    "sampled_entropy",
    "sequence_policy",
    "simpo",
    "truncated_importance_sampling",
    "weighted_sum",
]
