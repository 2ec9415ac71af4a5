"""Custom JAX losses for models that train elsewhere: on Tinker, MinT, SkyRL, or the one inside."""

import importlib
from typing import TYPE_CHECKING, Any

from mintjax import errors as errors
from mintjax import gradients as gradients
from mintjax.batch import Batch as Batch
from mintjax.bridge import RemoteLogprobs as RemoteLogprobs
from mintjax.bridge import remote_logprobs as remote_logprobs
from mintjax.client import APIFuture as APIFuture
from mintjax.client import RetryPolicy as RetryPolicy
from mintjax.client import SamplingClient as SamplingClient
from mintjax.client import ServiceClient as ServiceClient
from mintjax.client import TrainingClient as TrainingClient
from mintjax.gradients import LogprobGradients as LogprobGradients
from mintjax.gradients import value_and_logprob_grads as value_and_logprob_grads
from mintjax.ragged import Ragged as Ragged
from mintjax.remote_optimizer import remote_optimizer as remote_optimizer
from mintjax.surrogates import Reduction as Reduction
from mintjax.tensors import TensorData as TensorData
from mintjax.types import AdamParams as AdamParams
from mintjax.types import CustomStepOutput as CustomStepOutput
from mintjax.types import Datum as Datum
from mintjax.types import ForwardBackwardOutput as ForwardBackwardOutput
from mintjax.types import LoraConfig as LoraConfig
from mintjax.types import ModelInput as ModelInput
from mintjax.types import OptimStepResponse as OptimStepResponse
from mintjax.types import SampleResponse as SampleResponse
from mintjax.types import SamplingParams as SamplingParams

if TYPE_CHECKING:
    from mintjax import losses as losses
    from mintjax import objectives as objectives


def __getattr__(name: str) -> Any:
    """Import the libraries of losses when they are first used: they are large."""
    if name in ("losses", "objectives"):
        return importlib.import_module(f"mintjax.{name}")
    raise AttributeError(f"module 'mintjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "losses", "objectives"})
