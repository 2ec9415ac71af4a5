"""Losses and objects of other libraries, used as they are."""

from mintjax.gradients.torch import torch_objective

__all__ = ["torch_objective"]
