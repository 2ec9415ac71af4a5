"""Objectives of tokens, one line each: the losses that trainers serve, and those they do not."""

from __future__ import annotations

from mintjax import losses
from mintjax.losses._covariance import drawn_tokens
from mintjax.objectives._base import define
from mintjax.objectives._tokens import (
    CrossEntropyObjective,
    GeometricPolicyObjective,
    batch_policy,
    candidates,
    penalty,
    policy,
    sequence_policy,
)

focal_cross_entropy = define(CrossEntropyObjective, losses.focal_cross_entropy)
cross_entropy = define(CrossEntropyObjective, losses.cross_entropy, served_as="cross_entropy")

importance_sampling = policy(losses.importance_sampling, served_as="importance_sampling")
ppo = policy(losses.ppo, served_as="ppo")
cispo = policy(losses.cispo, served_as="cispo")
dro = policy(losses.dro, served_as="dro")
dual_clip_ppo = policy(losses.dual_clip_ppo)
dppo = policy(losses.dppo)
truncated_importance_sampling = policy(losses.truncated_importance_sampling)
dppo_kl = policy(losses.dppo_kl)
dapo = policy(losses.dapo, aggregation="token_mean")
stable_reinforce = policy(losses.stable_reinforce, aggregation="sequence_mean")
clip_cov = batch_policy(losses.clip_cov, clips_as="ppo", drawn=staticmethod(drawn_tokens))
kl_cov = batch_policy(losses.kl_cov)
sapo = policy(losses.sapo, aggregation="sequence_mean")
masked_importance_sampling = policy(losses.masked_importance_sampling)
gspo = sequence_policy(losses.gspo_token, "gspo", clips_as="gspo")
luspo = sequence_policy(losses.gspo_token, "luspo", clips_as="gspo", aggregation="sequence_sum")
vespo = sequence_policy(losses.vespo_token, "vespo", summed=True)
gmpo = define(GeometricPolicyObjective, losses.gmpo_log_ratios, "gmpo", clips_as="gmpo")
kl_abs = penalty(losses.kl_abs)
kl_k3_straight_through = penalty(losses.kl_k3_straight_through)
kl_k3_corrected = penalty(losses.kl_k3_corrected)
unlikelihood = penalty(losses.unlikelihood)

kl_k2 = penalty(losses.kl_k2)
kl_k3 = penalty(losses.kl_k3)
l2_to_reference = penalty(losses.l2_to_reference)
sampled_entropy = penalty(losses.sampled_entropy)

distillation_forward_kl = candidates(losses.distillation_forward_kl)
distillation_reverse_kl = candidates(losses.distillation_reverse_kl)
generalised_jsd = candidates(losses.generalised_jsd)
brier_score = candidates(losses.brier_score)
