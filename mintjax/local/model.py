"""The model that the embedded trainer trains: a small decoder-only transformer with LoRA.

Pure functions over pytrees of float32 arrays. Layers are stacked on the first axis and scanned, so
that compile time does not grow with depth.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mintjax.local.tokenizer import VOCAB_SIZE
from mintjax.types import LoraConfig

Weights = dict[str, Any]
"""A nested dict of float32 arrays."""

LORA_ALPHA = 32.0
"""An adapter counts ``LORA_ALPHA / rank``, so that the learning rate need not follow the rank."""

_ATTENTION = ("query", "key", "value", "out")
_MLP = ("gate", "up", "down")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a base model.

    Args:
        name: what clients ask for.
        width: of the residual stream.
        num_layers: transformer blocks.
        num_heads: attention heads; ``width / num_heads`` must be even.
        hidden: of the feed-forward layer.
        max_context_length: in tokens.
        seed: of the base weights.
    """

    name: str
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    max_context_length: int = 2048
    seed: int = 0


BASE_MODELS = {
    config.name: config
    for config in (
        ModelConfig("mintjax/nano", width=32, num_layers=1, num_heads=2, hidden=64),
        ModelConfig("mintjax/tiny", width=128, num_layers=2, num_heads=4, hidden=256),
        ModelConfig("mintjax/small", width=256, num_layers=4, num_heads=4, hidden=640),
    )
}
"""The base models on offer, by name."""


class Cache(NamedTuple):
    """Keys and values of what was read so far, each ``[layers, batch, length, heads, dim]``."""

    keys: Array
    values: Array


@functools.cache
def base_weights(config: ModelConfig) -> Weights:
    """Draws the base weights of a model; the same config gives the same weights everywhere."""
    with jax.ensure_compile_time_eval():  # what is kept must be no tracer of the first caller's
        return _base_weights(config)


def _base_weights(config: ModelConfig) -> Weights:
    width, hidden, layers = config.width, config.hidden, config.num_layers
    residual = 1 / math.sqrt(2 * layers)  # keeps the stream's variance at 1 whatever the depth

    def normal(name: str, *shape: int, gain: float = 1.0) -> Array:
        return _normal(config.seed, name, shape, gain / math.sqrt(shape[-2]))

    return {
        "embed": _normal(config.seed, "embed", (VOCAB_SIZE, width), 1.0),
        "layers": {
            "attention_norm": jnp.ones((layers, width)),
            "query": normal("query", layers, width, width),
            "key": normal("key", layers, width, width),
            "value": normal("value", layers, width, width),
            "out": normal("out", layers, width, width, gain=residual),
            "mlp_norm": jnp.ones((layers, width)),
            "gate": normal("gate", layers, width, hidden),
            "up": normal("up", layers, width, hidden),
            "down": normal("down", layers, hidden, width, gain=residual),
        },
        "final_norm": jnp.ones(width),
        "unembed": normal("unembed", width, VOCAB_SIZE, gain=0.5),
    }


def lora_weights(config: ModelConfig, lora: LoraConfig) -> Weights:
    """Draws the adapters of a model: ``a`` normal, ``b`` zero, so that training starts at the base.

    Args:
        config: the base model.
        lora: rank, seed (0 if None) and which matrices to adapt.

    Returns:
        The layout of :func:`base_weights` with only the adapted matrices, each a dict of
        ``a: [..., inputs, rank]`` and ``b: [..., rank, outputs]``.

    Reference: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models.
    """
    base = base_weights(config)
    seed = lora.seed or 0

    def adapter(name: str, shape: tuple[int, ...]) -> dict[str, Array]:
        *stack, inputs, outputs = shape
        return {
            "a": _normal(seed, name, (*stack, inputs, lora.rank), 1 / math.sqrt(inputs)),
            "b": jnp.zeros((*stack, lora.rank, outputs)),
        }

    names = (_ATTENTION if lora.train_attn else ()) + (_MLP if lora.train_mlp else ())
    adapters: Weights = {
        "layers": {name: adapter(name, base["layers"][name].shape) for name in names}
    }
    if lora.train_unembed:
        adapters["unembed"] = adapter("unembed", base["unembed"].shape)
    return adapters


def adapt(base: Weights, lora: Weights) -> Weights:
    """Computes the weights ``W + (LORA_ALPHA / rank) * a @ b``; others stay as they are.

    Merging first costs less than carrying the adapters through the layers: the matrices here are
    small beside the activations.
    """

    def merge(weight: Array, adapter: dict[str, Array]) -> Array:
        a, b = adapter["a"], adapter["b"]
        return weight + (LORA_ALPHA / a.shape[-1]) * (a @ b)

    layers = dict(base["layers"])
    layers |= {name: merge(layers[name], adapter) for name, adapter in lora["layers"].items()}
    merged = {**base, "layers": layers}
    if "unembed" in lora:
        merged["unembed"] = merge(base["unembed"], lora["unembed"])
    return merged


def empty_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Makes a cache for ``length`` positions of ``batch`` sequences, all still to be written."""
    shape = (config.num_layers, batch, length, config.num_heads, config.width // config.num_heads)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


def logits(
    config: ModelConfig,
    weights: Weights,
    tokens: Array,
    cache: Cache | None = None,
    start: Array | int = 0,
) -> tuple[Array, Cache]:
    """Computes unnormalised log-probabilities of the token that follows each token.

    Pre-norm blocks with RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021) and
    SwiGLU (Shazeer 2020); causal, so that padding on the right changes nothing on its left.

    Args:
        config: the model's shape.
        weights: as :func:`base_weights`, adapted or not.
        tokens: int ``[batch, length]``.
        cache: what earlier calls read; None to read from the first position.
        start: position of ``tokens[:, 0]``; must be 0 without a cache.

    Returns:
        float32 ``[batch, length, VOCAB_SIZE]``, and the cache with these tokens in it.
    """
    length = tokens.shape[1]
    positions = start + jnp.arange(length)
    rotation = _rotation(positions, config.width // config.num_heads)
    key_positions = jnp.arange(length if cache is None else cache.keys.shape[2])
    visible = (key_positions[None, :] <= positions[:, None])[None, None]  # batch, heads

    def block(x: Array, layer: tuple[Weights, Cache | None]) -> tuple[Array, Cache]:
        layer_weights, layer_cache = layer
        read, new_cache = _attention(
            config, layer_weights, _rms_norm(x, layer_weights["attention_norm"]), rotation, visible,
            layer_cache, start,
        )  # fmt: skip
        x = x + read
        return x + _mlp(layer_weights, _rms_norm(x, layer_weights["mlp_norm"])), new_cache

    x, new_cache = jax.lax.scan(block, weights["embed"][tokens], (weights["layers"], cache))
    return _rms_norm(x, weights["final_norm"]) @ weights["unembed"], new_cache


def logprobs(
    config: ModelConfig, base: Weights, lora: Weights, tokens: Array, targets: Array
) -> Array:
    """Log-probabilities of given next tokens, in nats.

    Args:
        config: the model's shape.
        base: from :func:`base_weights`.
        lora: from :func:`lora_weights`, trained or not.
        tokens: int ``[batch, length]``.
        targets: int ``[batch, length]`` or ``[batch, length, candidates]``.

    Returns:
        float32, the shape of ``targets``.
    """
    log_p = jax.nn.log_softmax(logits(config, adapt(base, lora), tokens)[0])
    if targets.ndim == tokens.ndim:
        return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return jnp.take_along_axis(log_p, targets, axis=-1)


def _normal(seed: int, name: str, shape: tuple[int, ...], scale: float) -> Array:
    # Drawn by NumPy, which has nothing to compile for each shape.
    stream = np.random.default_rng(list(hashlib.sha256(f"{seed}/{name}".encode()).digest()))
    return jnp.asarray(scale * stream.standard_normal(shape, np.float32))


def _rms_norm(x: Array, gain: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * gain[None, None]


def _rotation(positions: Array, dim: int) -> tuple[Array, Array]:
    frequencies = 10_000.0 ** (-jnp.arange(0, dim, 2) / dim)
    angles = (positions[:, None] * frequencies[None])[None, :, None]  # batch, heads
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    cos, sin = rotation
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(
    config: ModelConfig,
    weights: Weights,
    x: Array,
    rotation: tuple[Array, Array],
    visible: Array,
    cache: Cache | None,
    start: Array | int,
) -> tuple[Array, Cache]:
    heads = (*x.shape[:-1], config.num_heads, config.width // config.num_heads)
    query, key, value = (jnp.reshape(x @ weights[name], heads) for name in _ATTENTION[:3])
    query, key = _rotate(query, rotation), _rotate(key, rotation)
    if cache is not None:
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        key, value = write(cache.keys, key), write(cache.values, value)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(heads[-1])
    scores = jnp.where(visible, scores, -jnp.inf)
    read = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    return jnp.reshape(read, x.shape) @ weights["out"], Cache(key, value)


def _mlp(weights: Weights, x: Array) -> Array:
    return (jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])) @ weights["down"]
