"""Objectives of tokens, one line each: the losses that trainers serve, and those they do not."""

from __future__ import annotations

from mintjax import losses
from mintjax.objectives._base import define
from mintjax.objectives._tokens import (
    CrossEntropyObjective,
    candidates,
    penalty,
    policy,
    sequence_policy,
)

cross_entropy = define(CrossEntropyObjective, losses.cross_entropy, served_as="cross_entropy")

importance_sampling = policy(losses.importance_sampling, served_as="importance_sampling")
ppo = policy(losses.ppo, served_as="ppo")
cispo = policy(losses.cispo, served_as="cispo")
dro = policy(losses.dro, served_as="dro")
dual_clip_ppo = policy(losses.dual_clip_ppo)
dppo = policy(losses.dppo)
truncated_importance_sampling = policy(losses.truncated_importance_sampling)
gspo = sequence_policy(losses.gspo_token, "gspo", clips_as="gspo")

kl_k2 = penalty(losses.kl_k2)
kl_k3 = penalty(losses.kl_k3)
l2_to_reference = penalty(losses.l2_to_reference)
sampled_entropy = penalty(losses.sampled_entropy)

distillation_forward_kl = candidates(losses.distillation_forward_kl)
distillation_reverse_kl = candidates(losses.distillation_reverse_kl)
brier_score = candidates(losses.brier_score)
