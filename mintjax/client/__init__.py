"""The client: sessions, training and sampling over HTTP."""

from mintjax.client.futures import APIFuture as APIFuture
from mintjax.client.sampling import SamplingClient as SamplingClient
from mintjax.client.service import ServiceClient as ServiceClient
from mintjax.client.settings import Progress as Progress
from mintjax.client.settings import RetryPolicy as RetryPolicy
from mintjax.client.training import TrainingClient as TrainingClient
