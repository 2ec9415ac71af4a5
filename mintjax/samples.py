"""Parameters and results of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax.tensors import TensorData

StopReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of sampling.

    Args:
        max_tokens: at most so many new tokens; as many as fit if None.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; -1 keeps all.
        top_p: keep the likeliest tokens until their probability reaches p.
        seed: the same seed, prompt and parameters give the same tokens.
        stop: end at one of these: strings, or token ids. What stopped it is part of the result.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str | int] | None = None


TopkRow: TypeAlias = list[tuple[int, float]] | None
"""The likeliest tokens at one position, the likeliest first, with their logprobs in nats; None
where none were computed."""

NO_LOGPROB = -99999.0
"""The logprob of an empty cell of :class:`TopkLogprobs`, whose token is 0."""


class TopkLogprobs(msgspec.Struct, frozen=True, eq=False):
    """The likeliest tokens at each position as two matrices.

    A cell that is empty holds token 0 and logprob :data:`NO_LOGPROB`; where nothing was computed
    for a position, its whole row is empty.

    Args:
        token_ids: int32, shape ``[T, K]``, the likeliest first.
        logprobs: float32, shape ``[T, K]``, in nats.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    @classmethod
    def from_rows(cls, rows: Sequence[TopkRow]) -> TopkLogprobs:
        """Makes matrices of rows, as wide as the longest of them."""
        width = max((len(row) for row in rows if row), default=0)
        token_ids = np.zeros((len(rows), width), np.int32)
        logprobs = np.full((len(rows), width), NO_LOGPROB, np.float32)
        for i, row in enumerate(rows):
            if row:
                token_ids[i, : len(row)], logprobs[i, : len(row)] = zip(*row, strict=True)
        return cls(token_ids, logprobs)

    def to_rows(self) -> list[TopkRow]:
        """Makes rows of the matrices, without their empty cells."""
        filled = (self.token_ids != 0) | (self.logprobs != np.float32(NO_LOGPROB))
        rows = zip(self.token_ids.tolist(), self.logprobs.tolist(), filled.sum(1), strict=True)
        return [list(zip(ids[:n], lps[:n], strict=True)) if n else None for ids, lps, n in rows]


class SampledSequence(msgspec.Struct, kw_only=True):
    """One sampled continuation.

    Args:
        tokens: the new tokens.
        logprobs: of each, in nats, under the sampling distribution's model at temperature 1.
        stop_reason: ``"stop"`` (a stop string, stop token or end of text) or ``"length"``.
        topk_logprobs: if asked for, one :data:`TopkRow` per new token.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    stop_reason: StopReason = "length"
    topk_logprobs: list[TopkRow] | None = None

    @property
    def tokens_np(self) -> npt.NDArray[np.int32]:
        """The tokens as an array, shape ``[T]``."""
        return np.asarray(self.tokens, np.int32)

    @property
    def logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """The logprobs as an array, shape ``[T]``, or None where the trainer gave none."""
        return None if self.logprobs is None else np.asarray(self.logprobs, np.float32)

    @property
    def topk_logprobs_np(self) -> TopkLogprobs | None:
        """The likeliest tokens as matrices ``[T, K]``, or None where none were asked for."""
        return None if self.topk_logprobs is None else TopkLogprobs.from_rows(self.topk_logprobs)


class PromptAltTokens(msgspec.Struct, kw_only=True, eq=False):
    """Tokens that were drawn from the model's distribution at each place of a prompt of n tokens.

    Args:
        tokens: int64, shape ``[n - 1, K]``; row i holds alternatives to the token at i + 1.
        logprobs: float32, of the same shape: of each under the model, in nats.
    """

    tokens: TensorData
    logprobs: TensorData


class SampleResponse(msgspec.Struct, kw_only=True):
    """The result of a request to sample.

    Args:
        sequences: one per sample asked for.
        prompt_logprobs: if asked for, one per prompt token, in nats; the first is None, and so are
            those that were left out.
        topk_prompt_logprobs: if asked for, one :data:`TopkRow` per prompt token, as above.
        target_prompt_logprobs: if asked for, float32 of the shape of the targets, ``[n - 1, K]``;
            0 where nothing was asked.
        prompt_alt_tokens: if asked for, draws at each place of the prompt.
        prompt_cache_hit_tokens: tokens of the prompt that a hosted trainer bills as cached.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[TopkRow] | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0

    @property
    def prompt_logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """The prompt's logprobs as an array, shape ``[T]``, with NaN in place of None."""
        given = self.prompt_logprobs
        return None if given is None else np.asarray(given, np.float32)

    @property
    def topk_prompt_logprobs_np(self) -> TopkLogprobs | None:
        """The likeliest tokens as matrices ``[T, K]``, or None where none were asked for."""
        rows = self.topk_prompt_logprobs
        return None if rows is None else TopkLogprobs.from_rows(rows)
