"""Custom JAX losses for models that train elsewhere."""

from mintjax import gradients as gradients
from mintjax.batch import Batch as Batch
from mintjax.gradients import value_and_logprob_grads as value_and_logprob_grads
from mintjax.ragged import Ragged as Ragged
from mintjax.types import AdamParams as AdamParams
from mintjax.types import Datum as Datum
from mintjax.types import ForwardBackwardOutput as ForwardBackwardOutput
from mintjax.types import LoraConfig as LoraConfig
from mintjax.types import ModelInput as ModelInput
from mintjax.types import SamplingParams as SamplingParams
from mintjax.types import TensorData as TensorData
