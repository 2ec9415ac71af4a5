"""Losses on log-probabilities: pure functions of arrays, unreduced, any batch shape."""

from mintjax.losses._advantages import dr_grpo, group_mean_centred, grpo, rloo
from mintjax.losses._aggregation import fixed_length_mean, sequence_mean, token_mean
from mintjax.losses._builtin import cispo, cross_entropy, dro, importance_sampling, ppo
from mintjax.losses._clipping import clipped_tokens
from mintjax.losses._conventions import CONVENTIONS, FORMULAS, Convention, Formula, describe
from mintjax.losses._diagnostics import (
    POLICY_TERMS,
    policy_summary,
    policy_sums,
    policy_terms,
    preference_summary,
    preference_sums,
)
from mintjax.losses._distillation import (
    brier_score,
    distillation_forward_kl,
    distillation_reverse_kl,
)
from mintjax.losses._penalties import kl_k1, kl_k2, kl_k3, l2_to_reference, sampled_entropy
from mintjax.losses._policy import (
    dppo,
    dual_clip_ppo,
    gspo,
    gspo_token,
    truncated_importance_sampling,
)
from mintjax.losses._preference import bradley_terry, dpo, ipo, kto, orpo, simpo

__all__ = [
    "CONVENTIONS",
    "FORMULAS",
    "POLICY_TERMS",
    "Convention",
    "Formula",
    "bradley_terry",
    "brier_score",
    "cispo",
    "clipped_tokens",
    "cross_entropy",
    "describe",
    "distillation_forward_kl",
    "distillation_reverse_kl",
    "dpo",
    "dppo",
    "dr_grpo",
    "dro",
    "dual_clip_ppo",
    "fixed_length_mean",
    "group_mean_centred",
    "grpo",
    "gspo",
    "gspo_token",
    "importance_sampling",
    "ipo",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto",
    "l2_to_reference",
    "orpo",
    "policy_summary",
    "policy_sums",
    "policy_terms",
    "ppo",
    "preference_summary",
    "preference_sums",
    "rloo",
    "sampled_entropy",
    "sequence_mean",
    "simpo",
    "token_mean",
    "truncated_importance_sampling",
]
