"""Custom JAX losses for models that train elsewhere: on Tinker, MinT, SkyRL, or the one inside."""

from mintjax import errors as errors
from mintjax import gradients as gradients
from mintjax import losses as losses
from mintjax import objectives as objectives
from mintjax.batch import Batch as Batch
from mintjax.client import APIFuture as APIFuture
from mintjax.client import RetryPolicy as RetryPolicy
from mintjax.client import SamplingClient as SamplingClient
from mintjax.client import ServiceClient as ServiceClient
from mintjax.client import TrainingClient as TrainingClient
from mintjax.gradients import LogprobGradients as LogprobGradients
from mintjax.gradients import value_and_logprob_grads as value_and_logprob_grads
from mintjax.ragged import Ragged as Ragged
from mintjax.types import AdamParams as AdamParams
from mintjax.types import Datum as Datum
from mintjax.types import ForwardBackwardOutput as ForwardBackwardOutput
from mintjax.types import LoraConfig as LoraConfig
from mintjax.types import ModelInput as ModelInput
from mintjax.types import OptimStepResponse as OptimStepResponse
from mintjax.types import SampleResponse as SampleResponse
from mintjax.types import SamplingParams as SamplingParams
from mintjax.types import TensorData as TensorData
