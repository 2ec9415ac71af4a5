"""The client: sessions, training and sampling over HTTP."""

from mintjax.client.futures import APIFuture
from mintjax.client.rest import RestClient
from mintjax.client.sampling import SamplingClient
from mintjax.client.service import ServiceClient
from mintjax.client.settings import Progress, RetryPolicy
from mintjax.client.training import TrainingClient

__all__ = [
    "APIFuture",
    "Progress",
    "RestClient",
    "RetryPolicy",
    "SamplingClient",
    "ServiceClient",
    "TrainingClient",
]
