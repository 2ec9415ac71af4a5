"""Custom JAX losses for models that train elsewhere: on Tinker, MinT, SkyRL, or the one inside."""

import importlib
from typing import TYPE_CHECKING, Any

from mintjax import errors, gradients, types
from mintjax.client import (
    APIFuture,
    RestClient,
    RetryPolicy,
    SamplingClient,
    ServiceClient,
    TrainingClient,
)
from mintjax.client.connection import installed_version
from mintjax.gradients import LogprobGradients, value_and_logprob_grads
from mintjax.left_out import NAMES, missing
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch
from mintjax.remote.callback import remote_jit
from mintjax.remote.logprobs import RemoteLogprobs, remote_logprobs
from mintjax.remote.optimizer import remote_optimizer
from mintjax.step.reduction import Reduction
from mintjax.tensors import TensorData
from mintjax.types import (
    AdamParams,
    CustomStepOutput,
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    LoraConfig,
    ModelInput,
    OptimStepResponse,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    datum,
    with_column,
)

if TYPE_CHECKING:
    __version__: str
    from mintjax import losses, objectives

__all__ = [
    "APIFuture",
    "AdamParams",
    "Batch",
    "CustomStepOutput",
    "Datum",
    "EncodedTextChunk",
    "ForwardBackwardOutput",
    "ImageChunk",
    "LogprobGradients",
    "LoraConfig",
    "ModelInput",
    "OptimStepResponse",
    "Ragged",
    "Reduction",
    "RemoteLogprobs",
    "RestClient",
    "RetryPolicy",
    "SampleResponse",
    "SampledSequence",
    "SamplingClient",
    "SamplingParams",
    "ServiceClient",
    "TensorData",
    "TrainingClient",
    "datum",
    "errors",
    "gradients",
    "losses",
    "objectives",
    "remote_jit",
    "remote_logprobs",
    "remote_optimizer",
    "types",
    "value_and_logprob_grads",
    "with_column",
]

_ERRORS_OF_THE_SDK = {
    **{name: name for name in ("APIError", "APIConnectionError", "APIStatusError")},
    **{name: name for name in ("APITimeoutError", "AuthenticationError", "BadRequestError")},
    **{name: name for name in ("BillingError", "InternalServerError", "NotFoundError")},
    **{name: name for name in ("RateLimitError", "RequestFailedError")},
    "APIResponseValidationError": "APIResponseError",
    "ConflictError": "BadRequestError",
    "PermissionDeniedError": "AuthenticationError",
    "TinkerError": "MintjaxError",
    "UnprocessableEntityError": "BadRequestError",
}
_TYPES_OF_THE_SDK = (
    *("Checkpoint", "CheckpointType", "ModelID", "ModelInputChunk", "ParsedCheckpointTinkerPath"),
    *("StopReason", "TensorDtype", "TrainingRun"),
)
_ON_FIRST_USE = ("bench", "interop", "local", "losses", "mint", "objectives", "testing")


def __getattr__(name: str) -> Any:
    """Imports a module on its first use, because these are large or need an extra."""
    if name == "__version__":
        return installed_version()
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"mintjax.{name}")
    if name in _ERRORS_OF_THE_SDK:
        return getattr(errors, _ERRORS_OF_THE_SDK[name])
    if name in _TYPES_OF_THE_SDK:
        return getattr(types, name)
    raise missing("module 'mintjax'", name, NAMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
