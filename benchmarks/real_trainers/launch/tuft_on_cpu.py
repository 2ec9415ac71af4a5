"""Starts TuFT with its real training backend on the CPU, and its canned sampling.

TuFT gives its Hugging Face backend to a Ray actor that asks for a GPU. This script runs the same
class in the server's process::

    python tuft_on_cpu.py launch --config FILE --host 127.0.0.1 --port N

Its sampling needs vLLM, so the sampling that TuFT has for machines without one stands in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from tuft.backends.base_backend import BaseSamplingBackend
from tuft.backends.hf_training_model import HFTrainingModel
from tuft.backends.sampling_backend import DummySamplingBackend
from tuft.cli import main


class Method:
    """A method under the name by which Ray calls it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    async def remote(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result


class Here:
    """A model in this process, called as an actor is."""

    def __init__(self, model: HFTrainingModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._model, name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.cuda.reset_peak_memory_stats = lambda *_: None  # which a build without CUDA has not
    HFTrainingModel.get_actor = classmethod(lambda cls, config: Here(cls(config)))
    BaseSamplingBackend.create_backend = classmethod(
        lambda cls, config, **_: DummySamplingBackend(config)
    )
    main()
