"""Sampling from the model, with a cache of keys and values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import numpy.typing as npt
from jax import Array

from mintjax.errors import DataError
from mintjax.local import model
from mintjax.local.compute import MAX_ROWS, length_bucket, row_bucket
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.local.model import Cache, ModelConfig, Weights
from mintjax.local.slices import Slices
from mintjax.local.tokenizer import END, VOCAB_SIZE, to_bytes
from mintjax.protocol.messages import (
    PromptTargets,
    SampleRequest,
    SparseSampleResponse,
    SparseTensor,
)
from mintjax.tensors import TensorData
from mintjax.types import (
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    SamplingParams,
    TopkRow,
)

MAX_SAMPLES = 1024


class Places(NamedTuple):
    """Tokens at places of a prompt of n tokens, whose logprobs are asked for.

    Args:
        rows: int64, shape ``[N]``; row i is the place behind the prompt's first i + 1 tokens.
        tokens: int64, shape ``[N]``; -1 for none.
        layout: as they were asked for, and are answered.
    """

    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    layout: PromptTargets


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Names what a request asks of tokens, beside the samples.

    Args:
        prompt_logprobs: the logprob of each token of the prompt.
        last: only those of the last so many tokens, also of ``topk_prompt``; all if None.
        topk_prompt: the k likeliest tokens at each place of the prompt.
        topk_sample: the k likeliest tokens at each sampled token.
        places: the logprobs of these tokens.
        alternatives: draws at each place of the prompt.
        as_drawn: give each sampled token the logprob of the distribution that it was drawn from,
            by temperature, top_k and top_p, in place of the model's.
    """

    prompt_logprobs: bool = False
    last: int | None = None
    topk_prompt: int = 0
    topk_sample: int = 0
    places: Places | None = None
    alternatives: int = 0
    as_drawn: bool = False


NOTHING = Wanted()


def wanted_of(request: SampleRequest) -> Wanted:
    """Reads what a request asks for of tokens.

    Raises:
        DataError: targets that are no matrix of tokens for this prompt.
    """
    targets = request.target_prompt_logprobs or None
    return Wanted(
        bool(request.prompt_logprobs),
        None if request.prompt_logprobs_last_n is msgspec.UNSET else request.prompt_logprobs_last_n,
        request.topk_prompt_logprobs or 0,
        request.topk_sample_logprobs or 0,
        None if targets is None else _places(targets, request.prompt.length),
        request.prompt_alt_tokens_k or 0,
    )


def _places(targets: PromptTargets, length: int) -> Places:
    field = "target_prompt_logprobs"
    tokens = np.asarray(targets.data, np.int64)
    if len(targets.shape) != 2 or targets.shape[0] != length - 1:
        raise DataError(
            f"shape {targets.shape} does not fit a prompt of {length} tokens; it must be "
            f"[{length - 1}, K]",
            field=field,
        )
    num_rows, width = targets.shape
    crow, col = targets.sparse_crow_indices, targets.sparse_col_indices
    if not crow and not col:
        if tokens.size != num_rows * width:
            raise DataError(f"{tokens.size} tokens do not fill {targets.shape}", field=field)
        return Places(np.repeat(np.arange(num_rows), width), tokens, targets)
    pointers, columns = np.asarray(crow or [], np.int64), np.asarray(col or [], np.int64)
    counts = np.diff(pointers)
    if (
        pointers.shape != (num_rows + 1,)
        or pointers[0] != 0
        or (counts < 0).any()
        or not pointers[-1] == columns.size == tokens.size
        or (columns >= width).any()
    ):
        raise DataError("the sparse indices describe no matrix", field=field)
    return Places(np.repeat(np.arange(num_rows), counts), tokens, targets)


def check_request(
    config: ModelConfig,
    prompt: Sequence[int],
    params: SamplingParams,
    num_samples: int,
    wanted: Wanted = NOTHING,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Checks what :func:`sample_in_slices` would be given.

    Raises:
        DataError: naming the field, and what to do.
        BadRequestError: beyond a limit.
    """
    if not prompt:
        raise DataError("it has no token; begin with at least one", field="prompt")
    for at, token in enumerate(prompt):
        if not 0 <= token < VOCAB_SIZE:
            raise DataError(
                f"token {token} at position {at} is outside the vocabulary of {VOCAB_SIZE}",
                field="prompt",
            )
    room = config.max_context_length - len(prompt)
    if room < 1:
        raise DataError(
            f"{len(prompt)} tokens leave no room; the model reads {config.max_context_length}",
            field="prompt",
        )
    ranges = {
        "num_samples": (num_samples, 1 <= num_samples <= MAX_SAMPLES, f"1 to {MAX_SAMPLES}"),
        "sampling_params.max_tokens": (
            params.max_tokens,
            params.max_tokens is None or 1 <= params.max_tokens <= room,
            f"1 to {room}, what the context has left",
        ),
        "sampling_params.temperature": (
            params.temperature,
            0 <= params.temperature < math.inf,
            "[0, inf)",
        ),
        "sampling_params.top_k": (params.top_k, params.top_k == -1 or params.top_k >= 1, "-1, 1.."),
        "sampling_params.top_p": (params.top_p, 0 < params.top_p <= 1, "(0, 1]"),
        "sampling_params.seed": (params.seed, params.seed is None or params.seed >= 0, "0.."),
    }
    for field, (value, fits, allowed) in ranges.items():
        if not fits:
            raise DataError(f"{value} is not in {allowed}", field=field)
    stops = _listed(params.stop)
    if "" in stops:
        raise DataError("an empty text is never found", field="sampling_params.stop")
    if not all(isinstance(stop, str) or 0 <= stop < VOCAB_SIZE for stop in stops):
        raise DataError(
            f"a stop token is outside the vocabulary of {VOCAB_SIZE}",
            field="sampling_params.stop",
        )
    _check_wanted(len(prompt), room, params, num_samples, wanted, limits)


def _check_wanted(
    length: int,
    room: int,
    params: SamplingParams,
    num_samples: int,
    wanted: Wanted,
    limits: Limits,
) -> None:
    new = num_samples * (room if params.max_tokens is None else params.max_tokens)
    widths = {
        "topk_prompt_logprobs": (wanted.topk_prompt, length),
        "topk_sample_logprobs": (wanted.topk_sample, new),
        "prompt_alt_tokens_k": (wanted.alternatives, length),
    }
    for field, (width, rows) in widths.items():
        if width < 0:
            raise DataError(f"{width} is below 0", field=field)
        limits.check("max_candidates", width, f"{field} is {width}")
        held = width * rows
        limits.check("max_targets", held, f"{field} asks for {held} tokens")
    if wanted.last is not None:
        if not wanted.prompt_logprobs:
            raise DataError("ask for prompt_logprobs too", field="prompt_logprobs_last_n")
        if not 1 <= wanted.last < length:
            raise DataError(
                f"{wanted.last} is not in 1 to {length - 1}", field="prompt_logprobs_last_n"
            )
    if wanted.places is not None:
        tokens = wanted.places.tokens
        width = wanted.places.layout.shape[1]
        limits.check("max_candidates", width, f"target_prompt_logprobs has {width} columns")
        wrong = tokens[(tokens < -1) | (tokens >= VOCAB_SIZE)]
        if wrong.size:
            raise DataError(
                f"token {wrong[0]} is outside the vocabulary of {VOCAB_SIZE}, and is not -1",
                field="target_prompt_logprobs",
            )


def sample_in_slices(
    config: ModelConfig,
    weights: Weights,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    num_samples: int = 1,
    wanted: Wanted = NOTHING,
) -> Slices[SampleResponse]:
    """Continues a prompt, several times.

    With a seed, sample ``i`` is the same however many are asked for beside it.

    Args:
        config: the model's shape.
        weights: adapted already.
        prompt: token ids, checked by :func:`check_request`, as is what follows.
        params: how to sample.
        num_samples: how many continuations.
        wanted: what is asked for of tokens, beside the samples.
    """
    room = config.max_context_length - len(prompt)
    limit = room if params.max_tokens is None else params.max_tokens
    padded = np.zeros((1, length_bucket(len(prompt))), np.int32)
    padded[0, : len(prompt)] = prompt
    log_p, cache = _read(config, weights, padded, length_bucket(len(prompt) + limit))
    prompt_log_p = np.asarray(log_p[0, : len(prompt)])
    seeds = np.random.SeedSequence(params.seed).spawn(num_samples)
    sequences: list[SampledSequence] = []
    for begin in range(0, num_samples, MAX_ROWS):
        generators = [np.random.default_rng(seed) for seed in seeds[begin : begin + MAX_ROWS]]
        sequences += yield from _continue(
            config,
            weights,
            prompt_log_p[-1],
            cache,
            len(prompt),
            limit,
            params,
            generators,
            wanted,
        )
    return _with_wanted(SampleResponse(sequences=sequences), prompt, prompt_log_p, params, wanted)


def _with_wanted(
    response: SampleResponse,
    prompt: Sequence[int],
    log_p: npt.NDArray[np.float32],
    params: SamplingParams,
    wanted: Wanted,
) -> SampleResponse:
    """Adds what is wanted of the prompt; row i of ``log_p`` is the place behind token i."""
    log_p = log_p[:-1]
    left_out = 1 if wanted.last is None else len(prompt) - wanted.last
    nothing = [None] * left_out
    if wanted.prompt_logprobs:
        given = log_p[np.arange(len(prompt) - 1), list(prompt[1:])]
        response.prompt_logprobs = [*nothing, *given[left_out - 1 :].tolist()]
    if wanted.topk_prompt:
        rows = _likeliest(log_p[left_out - 1 :], wanted.topk_prompt)
        response.topk_prompt_logprobs = [*nothing, *rows]
    if wanted.alternatives:
        response.prompt_alt_tokens = _alternatives(log_p, params, wanted.alternatives)
    if wanted.places is None:
        return response
    rows, tokens, layout = wanted.places
    found = np.where(tokens < 0, np.float32(0), log_p[rows, tokens])
    crow, col = layout.sparse_crow_indices, layout.sparse_col_indices
    if not crow and not col:
        response.target_prompt_logprobs = TensorData(found, shape=layout.shape)
        return response
    sparse = SparseTensor(
        data=found.tolist(),
        dtype="float32",
        shape=layout.shape,
        sparse_crow_indices=crow or [],
        sparse_col_indices=col or [],
    )
    fields: dict[str, Any] = msgspec.structs.asdict(response) | {"target_prompt_logprobs": sparse}
    return SparseSampleResponse(**fields)


def _likeliest(log_p: npt.NDArray[np.float32], k: int) -> list[TopkRow]:
    """Finds the k likeliest tokens of each row, in order; of equal ones the smaller id."""
    order = np.argsort(-log_p, axis=-1, kind="stable")[..., :k]
    found = np.take_along_axis(log_p, order, axis=-1)
    rows = zip(order.tolist(), found.tolist(), strict=True)
    return [list(zip(ids, logprobs, strict=True)) for ids, logprobs in rows]


def _alternatives(
    log_p: npt.NDArray[np.float32], params: SamplingParams, k: int
) -> PromptAltTokens:
    """Draws k tokens at each place, with replacement, at the temperature."""
    tokens = np.empty((len(log_p), k), np.int64)
    if params.temperature == 0:
        tokens[:] = log_p.argmax(-1)[:, None]
    else:
        # Beside the streams of the sequences, which are those of 0 to MAX_SAMPLES - 1.
        seed = np.random.SeedSequence(params.seed, spawn_key=(MAX_SAMPLES,))
        drawn = np.random.default_rng(seed).random((len(log_p), k))
        scaled = log_p.astype(np.float64) / params.temperature
        cumulative = np.exp(scaled - scaled.max(-1, keepdims=True)).cumsum(-1)
        for i, row in enumerate(cumulative):
            # The first token whose sum is above the number that was drawn; one of probability 0
            # has the sum of the one before it. A product may be rounded up to the whole.
            tokens[i] = row.searchsorted(drawn[i] * row[-1], side="right")
        np.minimum(tokens, cumulative.argmax(-1)[:, None], out=tokens)
    logprobs = np.take_along_axis(log_p, tokens, axis=-1)
    return PromptAltTokens(tokens=TensorData(tokens), logprobs=TensorData(logprobs))


def _read_prompt(
    config: ModelConfig, weights: Weights, tokens: Array, cache_length: int
) -> tuple[Array, Cache]:
    cache = model.empty_cache(config, 1, max(cache_length, tokens.shape[1]))
    logits, cache = model.logits(config, weights, tokens, cache)
    return jax.nn.log_softmax(logits), cache


def _read_one(
    config: ModelConfig, weights: Weights, tokens: Array, cache: Cache, position: Array
) -> tuple[Array, Cache]:
    logits, cache = model.logits(config, weights, tokens[:, None], cache, position)
    return jax.nn.log_softmax(logits[:, 0]), cache


_read: Callable[..., tuple[Array, Cache]] = jax.jit(
    _read_prompt, static_argnames=("config", "cache_length")
)
_next: Callable[..., tuple[Array, Cache]] = jax.jit(
    _read_one, static_argnames="config", donate_argnames="cache"
)


def _continue(
    config: ModelConfig,
    weights: Weights,
    first_log_p: npt.NDArray[np.float32],
    prompt_cache: Cache,
    position: int,
    limit: int,
    params: SamplingParams,
    generators: list[np.random.Generator],
    wanted: Wanted,
) -> Slices[list[SampledSequence]]:
    rows, topk = row_bucket(len(generators)), wanted.topk_sample
    cache = Cache(*(jnp.repeat(leaf, rows, axis=1) for leaf in prompt_cache))
    sequences = [
        SampledSequence(tokens=[], logprobs=[], topk_logprobs=[] if topk else None)
        for _ in generators
    ]
    active = list(range(len(generators)))
    log_p = np.broadcast_to(first_log_p, (rows, VOCAB_SIZE))
    tokens = np.zeros(rows, np.int32)
    for step in range(limit):
        if step:
            # A copy: the CPU backend may read a NumPy argument after the call has returned.
            log_p, cache = _next(config, weights, tokens.copy(), cache, position + step - 1)
            log_p = np.asarray(log_p)
        for row in list(active):
            tokens[row] = token = _draw(log_p[row], params, generators[row])
            sequence = sequences[row]
            sequence.tokens.append(token)
            assert sequence.logprobs is not None
            logprob = _drawn_logprob if wanted.as_drawn else _logprob
            sequence.logprobs.append(logprob(log_p[row], params, token))
            if sequence.topk_logprobs is not None:
                sequence.topk_logprobs += _likeliest(log_p[row : row + 1], topk)
            if _stops(sequence.tokens, params.stop):
                sequence.stop_reason = "stop"
                active.remove(row)
        if not active:
            break
        yield
    return sequences


def _draw(
    log_p: npt.NDArray[np.float32], params: SamplingParams, generator: np.random.Generator
) -> int:
    if params.temperature == 0:
        return int(np.argmax(log_p))
    order, p = _kept(log_p, params)
    cumulative = np.cumsum(p)
    drawn = int(np.count_nonzero(cumulative <= generator.random() * cumulative[-1]))
    return int(order[min(drawn, int(np.flatnonzero(p)[-1]))])


def _kept(
    log_p: npt.NDArray[np.float32], params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Computes what is drawn from: tokens, the likeliest first, and their shares, not normed."""
    order = np.argsort(-log_p, kind="stable")
    scaled = log_p[order].astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled[0])
    if params.top_k != -1:
        p[params.top_k :] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= params.top_p] = 0  # keeps the token that reaches top_p
    return order, p


def _logprob(log_p: npt.NDArray[np.float32], params: SamplingParams, token: int) -> float:
    return float(log_p[token])


def _drawn_logprob(log_p: npt.NDArray[np.float32], params: SamplingParams, token: int) -> float:
    if params.temperature == 0:
        return float(log_p[token])
    order, p = _kept(log_p, params)
    return float(np.log(p[order == token][0] / p.sum()))


def _stops(tokens: list[int], stop: str | Sequence[str | int] | None) -> bool:
    if tokens[-1] == END:
        return True
    for one in _listed(stop):
        if tokens[-1] == one if isinstance(one, int) else one.encode() in to_bytes(tokens):
            return True
    return False


def _listed(stop: str | Sequence[str | int] | None) -> Sequence[str | int]:
    return [stop] if isinstance(stop, str) else stop or []
