"""Values of other libraries that carry what mintjax's own do: imitations, and the official SDK's.

The imitations offer what ``tinker`` 0.22 and 0.38 offer, and no more. They need no package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class EncodedTextChunk:
    tokens: Sequence[int]
    type: str = "encoded_text"

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class ImageChunk:
    expected_tokens: int
    data: bytes = b"\x89PNG"
    format: str = "png"
    type: str = "image"

    @property
    def length(self) -> int:
        return self.expected_tokens


@dataclass(frozen=True)
class DmelChunk:
    dmel: bytes = b"sound"
    type: str = "dmel"


@dataclass(frozen=True)
class ModelInput:
    chunks: list[Any]

    @classmethod
    def from_ints(cls, tokens: list[int]) -> ModelInput:
        return cls(chunks=[EncodedTextChunk(tokens)])

    def to_ints(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def length(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class TensorData:
    numbers: np.ndarray
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None

    @property
    def dtype(self) -> str:
        return self.numbers.dtype.name

    @property
    def data(self) -> list[Any]:
        return self.numbers.ravel().tolist()

    def to_numpy(self) -> np.ndarray:
        assert self.sparse_crow_indices is None  # the SDK needs torch for these
        return self.numbers

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        return cls(array, list(array.shape))


@dataclass(frozen=True)
class Datum:
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = field(default_factory=dict)
    model_input_spans: Any = None


@dataclass
class AdamParams:
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass
class SamplingParams:
    max_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float = 1
    top_k: int = -1
    top_p: float = 1


IMITATION: Any = SimpleNamespace(
    AdamParams=AdamParams,
    Datum=Datum,
    ModelInput=ModelInput,
    SamplingParams=SamplingParams,
    TensorData=TensorData,
)


@pytest.fixture(scope="session", params=["imitation", "tinker"])
def foreign(request: pytest.FixtureRequest) -> Any:
    """The types of another library: of the imitation, and of the official SDK if there is one."""
    if request.param == "imitation":
        return IMITATION
    reason = "needs the official SDK: pip install tinker, any version from 0.22 on"
    return pytest.importorskip("tinker", reason=reason).types
