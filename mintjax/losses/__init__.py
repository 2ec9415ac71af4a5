"""Losses on log-probabilities: pure functions of arrays, per token, unreduced, any batch shape."""

from mintjax.losses._builtin import cispo as cispo
from mintjax.losses._builtin import cross_entropy as cross_entropy
from mintjax.losses._builtin import dro as dro
from mintjax.losses._builtin import importance_sampling as importance_sampling
from mintjax.losses._builtin import ppo as ppo
