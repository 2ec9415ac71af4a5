"""Sampling from the model, with a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from mintjax.errors import DataError
from mintjax.local import model
from mintjax.local.compute import MAX_ROWS, length_bucket, row_bucket
from mintjax.local.model import Cache, ModelConfig, Weights
from mintjax.local.slices import Slices, finish
from mintjax.local.tokenizer import END, VOCAB_SIZE, to_bytes
from mintjax.types import SampledSequence, SampleResponse, SamplingParams

MAX_SAMPLES = 1024


def check_request(
    config: ModelConfig, prompt: Sequence[int], params: SamplingParams, num_samples: int
) -> None:
    """Check what :func:`sample` would be given.

    Raises:
        DataError: naming the field, and what to do.
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
    if not isinstance(params.stop, str | None) and not all(
        isinstance(stop, str) or 0 <= stop < VOCAB_SIZE for stop in params.stop
    ):
        raise DataError(
            f"a stop token is outside the vocabulary of {VOCAB_SIZE}",
            field="sampling_params.stop",
        )


def sample(
    config: ModelConfig,
    weights: Weights,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    num_samples: int = 1,
    prompt_logprobs: bool = False,
) -> SampleResponse:
    """Continues a prompt; :func:`sample_in_slices` in one go, with the same arguments."""
    return finish(
        sample_in_slices(
            config,
            weights,
            prompt,
            params,
            num_samples=num_samples,
            prompt_logprobs=prompt_logprobs,
        )
    )


def sample_in_slices(
    config: ModelConfig,
    weights: Weights,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    num_samples: int = 1,
    prompt_logprobs: bool = False,
) -> Slices[SampleResponse]:
    """Continue a prompt, several times.

    With a seed, sample ``i`` is the same however many are asked for beside it.

    Args:
        config: the model's shape.
        weights: adapted already.
        prompt: token ids, checked by :func:`check_request`, as is what follows.
        params: how to sample.
        num_samples: how many continuations.
        prompt_logprobs: also give the logprob of each token of the prompt.
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
            config, weights, prompt_log_p[-1], cache, len(prompt), limit, params, generators
        )
    given = prompt_log_p[np.arange(len(prompt) - 1), list(prompt[1:])]
    return SampleResponse(
        sequences=sequences, prompt_logprobs=[None, *given.tolist()] if prompt_logprobs else None
    )


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
) -> Slices[list[SampledSequence]]:
    rows = row_bucket(len(generators))
    cache = Cache(*(jnp.repeat(leaf, rows, axis=1) for leaf in prompt_cache))
    sequences = [SampledSequence(tokens=[], logprobs=[]) for _ in generators]
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
            sequence.logprobs.append(float(log_p[row, token]))
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
    order = np.argsort(-log_p, kind="stable")
    scaled = log_p[order].astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled[0])
    if params.top_k != -1:
        p[params.top_k :] = 0
    p /= p.sum()
    p[np.cumsum(p) - p >= params.top_p] = 0  # keeps the token that reaches top_p
    cumulative = np.cumsum(p)
    drawn = int(np.count_nonzero(cumulative <= generator.random() * cumulative[-1]))
    return int(order[min(drawn, int(np.flatnonzero(p)[-1]))])


def _stops(tokens: list[int], stop: str | Sequence[str | int] | None) -> bool:
    if tokens[-1] == END:
        return True
    for one in [stop] if isinstance(stop, str) else stop or []:
        if tokens[-1] == one if isinstance(one, int) else one and one.encode() in to_bytes(tokens):
            return True
    return False
