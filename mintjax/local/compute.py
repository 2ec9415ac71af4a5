"""Forward and backward passes over datums of any length, in a bounded number of shapes.

XLA compiles once per shape, so datums are sorted by length, cut into groups and padded to one of a
few sizes. Padding is inert: attention is causal, and a mask keeps it out of every loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from mintjax.errors import NonFiniteError
from mintjax.local import loss_fns, model
from mintjax.local.model import ModelConfig, Weights
from mintjax.step.reduction import Unit
from mintjax.types import Datum

MAX_ROWS = 32
_MAX_TOKENS = 8192
_MAX_SCORES = 1 << 22  # rows * length ** 2: what attention holds for one head
_MAX_TARGETS = 1 << 20  # rows * length * candidates: some twenty arrays are of this size


class PassResult(NamedTuple):
    """The result of a pass over some datums."""

    logprobs: list[npt.NDArray[np.float32]]
    """One array per datum, in order, the shape of its ``target_tokens``; in nats."""
    losses: npt.NDArray[np.float32]
    """The loss of each datum, ``[datums]``."""
    gradient: Weights | None
    """Of the sum of ``losses``, in the layout of the adapters; None after a forward pass."""


class _Rows(NamedTuple):
    indices: list[int]
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    columns: loss_fns.Columns


def run(
    config: ModelConfig,
    lora: Weights,
    data: Sequence[Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float] | None,
    *,
    per_sequence: Unit | None,
    backward: bool,
) -> PassResult:
    """Computes a built-in loss of the data and, if asked for, its gradient in the adapters.

    Args:
        config: the model's shape.
        lora: the adapters.
        data: checked by :func:`mintjax.local.loss_fns.check_request`.
        loss_fn: name of the loss.
        loss_fn_config: its options.
        per_sequence: divides each datum's loss, as :class:`~mintjax.step.reduction.Reduction` has
            it.
        backward: take the gradient too.

    Raises:
        NonFiniteError: the loss of a datum, or its gradient at a logprob, is not finite. The
            gradient in the adapters is not looked at.
    """
    base = model.base_weights(config)
    options = loss_fns.options(loss_fn, loss_fn_config)
    number = list(loss_fns.REQUIRED_INPUTS).index(loss_fn)
    logprobs: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(data)
    losses = np.zeros(len(data), np.float32)
    gradient: Weights | None = None
    compute = _forward_backward if backward else _forward
    for rows in _groups(data, loss_fn):
        divisors = loss_fns.row_divisors(rows.columns, per_sequence)
        arguments = (rows.tokens, rows.targets, rows.columns, divisors, number, options)
        outputs = compute(config, base, lora, *arguments)
        row_logprobs, row_losses, row_finite = jax.device_get(outputs[:3])
        _check_finite(rows.indices, row_finite, loss_fn)
        for row, i in enumerate(rows.indices):
            shape = data[i].loss_fn_inputs["target_tokens"].shape
            logprobs[i] = row_logprobs[row, : shape[0]].reshape(shape)
            losses[i] = row_losses[row]
        if backward:
            gradient = outputs[3] if gradient is None else add(gradient, outputs[3])
    return PassResult(logprobs, losses, gradient)


def pull_back(
    config: ModelConfig,
    lora: Weights,
    data: Sequence[Datum],
    derivative: Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]],
) -> tuple[list[npt.NDArray[np.float32]], Weights]:
    """Computes logprobs, and the gradient of a function of them in the adapters, by one pass.

    What the forward pass of a group of datums has computed is kept until its backward pass.

    Args:
        config: the model's shape.
        lora: the adapters.
        data: at least one, checked as for :func:`run`.
        derivative: of the function by a datum's logprobs, given its place and the logprobs, in
            the shape of its ``target_tokens``.

    Returns:
        The logprobs of each datum, in order, and the gradient of the function.
    """
    base = model.base_weights(config)
    logprobs: list[npt.NDArray[np.float32]] = [np.empty(0, np.float32)] * len(data)
    gradient: Weights | None = None
    for rows in _groups(data, "cross_entropy"):
        outputs, pull = _forward_keeping(config, base, lora, rows.tokens, rows.targets)
        padded = np.asarray(outputs)
        slopes = np.zeros_like(padded)
        for row, i in enumerate(rows.indices):
            shape = data[i].loss_fn_inputs["target_tokens"].shape
            own = (row, slice(shape[0]))
            logprobs[i] = padded[own].reshape(shape)
            slopes[own] = derivative(i, logprobs[i]).reshape(slopes[own].shape)
        (part,) = _pull(pull, slopes)
        gradient = part if gradient is None else add(gradient, part)
    return logprobs, cast("Weights", gradient)


def length_bucket(length: int) -> int:
    """Rounds ``length`` tokens up to a power of two, or one and a half times one."""
    power = max(32, 1 << (length - 1).bit_length())
    three_quarters = power * 3 // 4
    return three_quarters if power > 64 and length <= three_quarters else power


def row_bucket(rows: int) -> int:
    """Rounds ``rows`` up to a power of two, 4 at least."""
    return max(4, 1 << (rows - 1).bit_length())


def add(first: Weights, second: Weights) -> Weights:
    """Adds two trees of one layout."""
    return jax.tree.map(jnp.add, first, second)


_Outputs = tuple[Array, Array, Array, Weights]


def _loss_and_gradient(
    config: ModelConfig,
    base: Weights,
    lora: Weights,
    tokens: Array,
    targets: Array,
    columns: loss_fns.Columns,
    divisors: Array,
    loss_fn: Array,
    options: Mapping[str, Mapping[str, Array]],
) -> _Outputs:
    def total(logprobs: Array) -> tuple[Array, Array]:
        rows = _row_losses(logprobs, columns, divisors, loss_fn, options)
        return rows.sum(), rows

    logprobs, pull_back = _logprobs_and_pull(config, base, lora, tokens, targets)
    (_, losses), cotangent = jax.value_and_grad(total, has_aux=True)(logprobs)
    finite = jnp.isfinite(losses) & jnp.isfinite(cotangent).all(axis=(1, 2))
    (gradient,) = pull_back(cotangent)
    return logprobs, losses, finite, gradient


def _loss(
    config: ModelConfig,
    base: Weights,
    lora: Weights,
    tokens: Array,
    targets: Array,
    columns: loss_fns.Columns,
    divisors: Array,
    loss_fn: Array,
    options: Mapping[str, Mapping[str, Array]],
) -> _Outputs:
    logprobs = model.logprobs(config, base, lora, tokens, targets)
    losses = _row_losses(logprobs, columns, divisors, loss_fn, options)
    return logprobs, losses, jnp.isfinite(losses), {}


_forward_backward: Callable[..., _Outputs] = jax.jit(_loss_and_gradient, static_argnames="config")
_forward: Callable[..., _Outputs] = jax.jit(_loss, static_argnames="config")


def _logprobs_and_pull(
    config: ModelConfig, base: Weights, lora: Weights, tokens: Array, targets: Array
) -> tuple[Array, Callable[[Array], tuple[Weights]]]:
    def read(lora: Weights) -> Array:
        return model.logprobs(config, base, lora, tokens, targets)

    return cast("Any", jax.vjp)(read, lora)


_forward_keeping: Callable[..., Any] = jax.jit(_logprobs_and_pull, static_argnames="config")


def _pulled(pull: Callable[[Array], tuple[Weights]], slopes: Array) -> tuple[Weights]:
    return pull(slopes)


_pull: Callable[..., tuple[Weights]] = jax.jit(_pulled)


def _row_losses(
    logprobs: Array,
    columns: loss_fns.Columns,
    divisors: Array,
    loss_fn: Array,
    options: Mapping[str, Mapping[str, Array]],
) -> Array:
    losses = loss_fns.token_losses(loss_fn, options, logprobs, columns)
    return losses.sum(axis=(1, 2)) / divisors


def _groups(data: Sequence[Datum], loss_fn: str) -> Iterator[_Rows]:
    lengths = [datum.model_input.length for datum in data]
    candidates = math.prod(data[0].loss_fn_inputs["target_tokens"].shape[1:])
    longest_first = sorted(range(len(data)), key=lambda i: -lengths[i])
    while longest_first:
        length = length_bucket(lengths[longest_first[0]])
        bounds = (_MAX_TOKENS // length, _MAX_SCORES // length**2)
        limit = max(1, min(MAX_ROWS, *bounds, _MAX_TARGETS // (length * candidates)))
        group, longest_first = longest_first[:limit], longest_first[limit:]
        rows = min(limit, row_bucket(len(group)))
        yield _pad([data[i] for i in group], loss_fn, group, length, rows)


def _pad(data: Sequence[Datum], loss_fn: str, indices: list[int], length: int, rows: int) -> _Rows:
    target_shape = data[0].loss_fn_inputs["target_tokens"].shape
    shape = (rows, length, target_shape[1] if len(target_shape) == 2 else 1)
    tokens = np.zeros((rows, length), np.int32)
    targets = np.zeros(shape, np.int32)
    weights, sampling_logprobs, advantages = (np.zeros(shape, np.float32) for _ in range(3))
    real = np.zeros(shape, np.bool_)
    for row, datum in enumerate(data):
        ids, inputs = datum.model_input.to_ints(), datum.loss_fn_inputs
        here = (row, slice(len(ids)))
        column_shape = (len(ids), shape[2])
        tokens[here] = ids
        targets[here] = inputs["target_tokens"].reshape(column_shape)
        real[here] = True
        for name, column in (("logprobs", sampling_logprobs), ("advantages", advantages)):
            if name in inputs:
                column[here] = inputs[name].reshape(column_shape)
        if "weights" in inputs:
            weights[here] = inputs["weights"].reshape(column_shape)
        else:
            own = (sampling_logprobs[here], advantages[here])
            weights[here] = loss_fns.default_weights(loss_fn, *own)
    columns = loss_fns.Columns(weights, sampling_logprobs, advantages, real)
    return _Rows(indices, tokens, targets, columns)


def _check_finite(indices: list[int], finite: npt.NDArray[np.bool_], loss_fn: str) -> None:
    bad = [i for row, i in enumerate(indices) if not finite[row]]
    if bad:
        raise NonFiniteError(
            f"datum {min(bad)}: {loss_fn} or its gradient is not finite; nothing was applied. Look "
            "for large advantages or weights, or logprobs far from the model's own",
            datum=min(bad),
        )
