"""Losses as objectives: ``(data, logprobs) -> (scalar, metrics)``, values that compose.

``ppo(clip_high_threshold=1.3)`` is a value to hold, compare, print and call. Each objective says
which columns of ``loss_fn_inputs`` it reads: ``logprobs`` (of the sampling policy), ``advantages``,
``ref_logprobs`` (of a reference model), ``weights`` (a mask, where nothing else is said).
"""

from mintjax.objectives._base import LossObjective as LossObjective
from mintjax.objectives._builtin import cispo as cispo
from mintjax.objectives._builtin import cross_entropy as cross_entropy
from mintjax.objectives._builtin import dro as dro
from mintjax.objectives._builtin import importance_sampling as importance_sampling
from mintjax.objectives._builtin import ppo as ppo
from mintjax.objectives._combine import WeightedSum as WeightedSum
from mintjax.objectives._combine import weighted_sum as weighted_sum
from mintjax.objectives._distillation import brier_score as brier_score
from mintjax.objectives._distillation import distillation_forward_kl as distillation_forward_kl
from mintjax.objectives._distillation import distillation_reverse_kl as distillation_reverse_kl
from mintjax.objectives._penalties import kl_k1 as kl_k1
from mintjax.objectives._penalties import kl_k2 as kl_k2
from mintjax.objectives._penalties import kl_k3 as kl_k3
from mintjax.objectives._penalties import l2_to_reference as l2_to_reference
from mintjax.objectives._penalties import sampled_entropy as sampled_entropy
from mintjax.objectives._policy import dppo as dppo
from mintjax.objectives._policy import dual_clip_ppo as dual_clip_ppo
from mintjax.objectives._policy import gspo as gspo
from mintjax.objectives._policy import (
    truncated_importance_sampling as truncated_importance_sampling,
)
from mintjax.objectives._preference import bradley_terry as bradley_terry
from mintjax.objectives._preference import dpo as dpo
from mintjax.objectives._preference import ipo as ipo
from mintjax.objectives._preference import kto as kto
from mintjax.objectives._preference import orpo as orpo
from mintjax.objectives._preference import simpo as simpo
