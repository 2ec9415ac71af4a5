"""Logprobs of target tokens, from the logits or from the hidden states of a model of one's own."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Array = Any  # a NumPy array, a JAX array or a tracer

_CHUNK = 2**25  # logits at a time, of which some copies of 128 MiB are held


def target_logprobs(logits: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Log-probabilities of target tokens under the softmax of logits.

    ``log p(target) = logits[target] - logsumexp(logits)``, computed in at least float32 around the
    largest logit, so that it is exact near 0 too.

    When to use it: the model runs here, and its logits fit into memory. The logits at a position
    are those of the next token: ``target_logprobs(logits[:, :-1], tokens[:, 1:])``.

    What others do: TRL's ``selective_log_softmax`` goes row by row to save memory, and computes in
    16 bits where the logits have 16.

    Args:
        logits: unnormalised log-probabilities, ``[..., V]``; -inf is a token that cannot come.
        targets: ids of tokens, integers ``[...]``, or of K candidates at every position,
            ``[..., K]``. Leading axes are those of the logits.

    Returns:
        Logprobs in nats, of the shape of ``targets``: float32, or float64 if ``logits`` is. NaN
        where a target is outside the vocabulary, as the -100 at ignored positions is: leave those
        out by a mask, such as that of :meth:`mintjax.Ragged.from_padded`.

    Raises:
        TypeError: ``targets`` are no integers.
        ValueError: the shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from mintjax import losses
        >>> losses.target_logprobs(jnp.zeros((2, 4)), jnp.array([1, 3])).round(4)
        Array([-1.3863, -1.3863], dtype=float32)

    Reference:
        The definition of the softmax; targets as in the trainers' ``target_tokens``.
    """
    logits, targets = jnp.asarray(logits), jnp.asarray(targets)
    _check(targets, logits.shape[:-1], "logits")
    return _picked(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), targets)


def fused_target_logprobs(
    hidden: ArrayLike,
    unembedding: ArrayLike,
    targets: ArrayLike,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """Log-probabilities of target tokens from hidden states, without holding all logits.

    ``log p(target) = target_logprobs(hidden @ unembedding, targets)``, some positions at a time,
    forwards and backwards; the logits are computed twice, and sums and their gradients are float32.

    When to use it: ``[B, T, V]`` does not fit into memory. A float32 vocabulary of 150,000 takes
    0.6 MB per token; this holds ``chunk_size`` tokens of it.

    What others do: Liger's fused linear cross-entropy does the same for the sum of losses; here
    the logprobs come out, so that any loss can follow.

    Args:
        hidden: the last hidden states, after the final norm, ``[..., D]``.
        unembedding: the matrix that makes logits of them, of shape ``[D, V]``: the transpose of a
            table of embeddings ``[V, D]``.
        targets: ids of tokens, integers ``[...]``, or of K candidates at every position,
            ``[..., K]``. Leading axes are those of the hidden states.
        chunk_size: how many positions' logits to hold at a time; None takes as many as make
            2**25 logits.

    Returns:
        Logprobs in nats, of the shape of ``targets``: float32, or float64 if the inputs are. NaN
        where a target is outside the vocabulary. Derivatives by ``hidden`` and ``unembedding`` are
        in reverse mode, once.

    Raises:
        TypeError: ``targets`` are no integers.
        ValueError: the shapes do not fit, or ``chunk_size`` is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> from mintjax import losses
        >>> hidden, unembedding = jnp.ones((2, 3)), jnp.zeros((3, 4))
        >>> losses.fused_target_logprobs(hidden, unembedding, jnp.array([1, 3])).round(4)
        Array([-1.3863, -1.3863], dtype=float32)

    Reference:
        Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training"
        (arXiv:2410.10989), section 3.2, for the sum of the losses.
    """
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    targets = jnp.asarray(targets)
    _check(targets, hidden.shape[:-1], "hidden states")
    if unembedding.ndim != 2 or unembedding.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"the unembedding must be [D, V] with D = {hidden.shape[-1]}, the last axis of the "
            f"hidden states, not {list(unembedding.shape)}"
        )
    size = max(1, _CHUNK // unembedding.shape[1]) if chunk_size is None else chunk_size
    if size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {size}")
    positions = hidden.size // hidden.shape[-1]
    flat = targets.reshape(positions, math.prod(targets.shape[hidden.ndim - 1 :]))
    count = max(1, -(-positions // min(size, max(positions, 1))))
    each = -(-positions // count)
    spare = count * each - positions

    def chunks(array: Array) -> Array:
        padded = jnp.pad(array, ((0, spare), (0, 0)))
        return padded.reshape(count, each, array.shape[1])

    dtype = jnp.promote_types(hidden.dtype, unembedding.dtype)
    rows = chunks(hidden.reshape(positions, hidden.shape[-1]).astype(dtype))
    found: Array = _in_chunks(rows, unembedding.astype(dtype), chunks(flat))
    return found.reshape(count * each, flat.shape[1])[:positions].reshape(targets.shape)


def _mapped(hidden: Array, unembedding: Array, targets: Array) -> Array:
    """Logprobs ``[chunks, C, K]`` from ``[chunks, C, D]``, ``[D, V]`` and ``[chunks, C, K]``."""

    def one(chunk: tuple[Array, Array]) -> Array:
        return _picked(_logits(chunk[0], unembedding), chunk[1])

    return cast("Array", jax.lax.map(one, (hidden, targets)))


def _forward(hidden: Array, unembedding: Array, targets: Array) -> tuple[Array, Any]:
    found: Array = _in_chunks(hidden, unembedding, targets)
    return found, (hidden, unembedding, targets)


def _backward(residuals: Any, cotangent: Array) -> tuple[Array, Array, None]:
    hidden, unembedding, targets = residuals

    def one(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        rows, wanted, weights = chunk
        logits = _logits(rows, unembedding)
        pull = cast("Any", jax.vjp)(partial(_picked, targets=wanted), logits)[1]
        slope: Array = pull(weights)[0].astype(rows.dtype)  # products of 16 bits, summed in 32
        by_hidden = _product(slope, unembedding, (1, 1)).astype(rows.dtype)
        return total + _product(rows, slope, (0, 0)), by_hidden

    start = jnp.zeros(unembedding.shape, cotangent.dtype)
    total, by_hidden = jax.lax.scan(one, start, (hidden, targets, cotangent))
    return by_hidden, total.astype(unembedding.dtype), None


_in_chunks = cast("Any", jax.custom_vjp(_mapped))
_in_chunks.defvjp(_forward, _backward)


def _logits(hidden: Array, unembedding: Array) -> Array:
    return _product(hidden, unembedding, (1, 0))


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Sums the products of two matrices over an axis of each, in at least float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def _picked(logits: Array, targets: Array) -> Array:
    """Logprobs ``[...]`` or ``[..., K]`` of targets, from float logits ``[..., V]``."""
    size = logits.shape[-1]
    known = (targets >= 0) & (targets < size)
    index = jnp.where(known, targets, 0)
    per_position = targets.ndim < logits.ndim
    index = index[..., None] if per_position else index
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    shifted = logits - jnp.where(jnp.isfinite(top), top, jnp.zeros_like(top))
    total = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
    found = jnp.take_along_axis(shifted, index, axis=-1) - total
    found = found[..., 0] if per_position else found
    return jnp.where(known, found, jnp.asarray(jnp.nan, found.dtype))


def _check(targets: Array, leading: tuple[int, ...], beside: str) -> None:
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets are ids of tokens, integers, not {targets.dtype}")
    if targets.shape[: len(leading)] != leading or targets.ndim > len(leading) + 1:
        raise ValueError(
            f"targets must be {list(leading)}, or that and an axis of candidates, because the "
            f"leading axes are those of the {beside}; they are {list(targets.shape)}"
        )
