"""The remote model's logprobs as a differentiable JAX function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import numpy as np
import numpy.typing as npt
from jax.interpreters.ad import JVPTracer

from mintjax.errors import DataError, TransformationError
from mintjax.gradients.evaluate import not_finite
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch, check_data
from mintjax.remote import callback
from mintjax.remote.trainer import Trainer
from mintjax.remote.versions import versions_of
from mintjax.tensors import first_row_not_finite
from mintjax.types import Datum, ForwardBackwardOutput

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer
_SCALAR = jax.ShapeDtypeStruct((), np.float32)


class RemoteLogprobs:
    """The logprobs of some data as a function of the remote model's params.

    :func:`remote_logprobs` makes one, and says what can be done with it.
    """

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self._trainer = trainer
        self._versions = versions_of(trainer)
        self._batch = batch
        self._data = list(batch)
        self._layout = batch.layout
        self._shapes = [datum.loss_fn_inputs["target_tokens"].shape for datum in self._data]
        self._output: ForwardBackwardOutput | None = None
        trailing = self._shapes[0][1:]
        result = jax.ShapeDtypeStruct(
            (len(self._layout.tile_row), tiling.TILE, *trailing), np.float32
        )

        def primal(token: Array) -> Array:
            return callback.call(self._forward, result, token)

        def forward(token: Array) -> tuple[Array, tuple[Array, Array]]:
            tiles = primal(token)
            return tiles, (token, tiles)

        def backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array]:
            return (callback.call(self._backward, _SCALAR, *residuals, cotangent),)

        tiles = cast("Any", jax.custom_vjp(primal))
        tiles.defvjp(forward, backward)
        self._tiles: Callable[[Array], Array] = tiles

    @property
    def params(self) -> jax.Array:
        """The token that stands for the model's weights as they are now: a float32 scalar.

        It counts the optimizer steps taken through :func:`mintjax.remote_optimizer`.
        """
        jax.effects_barrier()  # a compiled program may still be on its way to its callbacks
        return jax.device_put(self._versions.token)

    @property
    def batch(self) -> Batch:
        """The data, as objectives of one's own want to see them: by column."""
        return self._batch

    @property
    def output(self) -> ForwardBackwardOutput | None:
        """The trainer's output of the last backward pass; None before the first.

        Its metrics are the trainer's own: those of the objective are what ``jax.value_and_grad``
        with ``has_aux=True`` returns.
        """
        jax.effects_barrier()  # as above
        return self._output

    def __call__(self, params: Array) -> Ragged:
        """The logprobs of the target tokens, by a forward pass.

        Args:
            params: the token, a float32 scalar: :attr:`params`, or what ``optax.apply_updates``
                made of it.

        Returns:
            One row per datum, float32, in nats, of the shape of its ``target_tokens``. Lengths are
            not traced, so rows can be taken one by one under ``jit`` too.

        Raises:
            TypeError: ``params`` is no such scalar.
            StaleError: the trainer's model is at another version.
            TransformationError: a transformation that no trainer can follow.
            Exception: whatever the trainer raises, as it is; its message only, under ``jit``.
        """
        if getattr(params, "shape", None) != () or params.dtype != np.float32:
            raise TypeError(
                f"params must be a float32 scalar, such as remote.params, not {params!r}"
            )
        if isinstance(params, JVPTracer):
            raise TransformationError(
                "a remote model has derivatives in reverse mode only: use jax.grad, jax.vjp or "
                "jax.value_and_grad instead of jvp, jacfwd or linearize"
            )
        return Ragged(self._tiles(params), self._layout)

    def _forward(self, token: Array) -> npt.NDArray[np.float32]:
        self._versions.check(token)
        rows = [np.asarray(row, np.float32) for row in self._trainer.logprobs(self._data)]
        if len(rows) != len(self._data):
            raise DataError(
                f"the trainer returned {len(rows)} rows for {len(self._data)} datums",
                field="logprobs",
            )
        for i, (row, shape) in enumerate(zip(rows, self._shapes, strict=True)):
            if row.shape != shape:
                raise DataError(
                    f"the trainer returned shape {list(row.shape)} for targets of shape "
                    f"{list(shape)}",
                    datum=i,
                    field="logprobs",
                )
        return tiling.pack_anew(rows, self._layout, np.float32)

    def _backward(self, token: Array, tiles: Array, cotangent: Array) -> np.float32:
        self._versions.check(token)
        logprobs, grads = self._rows(tiles), self._rows(cotangent)
        found = first_row_not_finite(grads)
        if found is not None:
            raise not_finite("the loss", self._batch, logprobs, grads, found)
        self._output = self._trainer.backward(self._data, logprobs, grads)
        return self._versions.receipt()

    def _rows(self, tiles: Array) -> list[npt.NDArray[np.float32]]:
        return Ragged(np.asarray(tiles), self._layout).to_rows()


def remote_logprobs(trainer: Trainer, data: Sequence[Datum] | Batch) -> RemoteLogprobs:
    """A model that trains elsewhere as a function that JAX can differentiate.

    ``remote(params)`` runs a forward pass, and the backward rule of what is computed from it runs a
    backward pass, which adds ``d loss / d weights`` to what accumulates in the trainer::

        remote = remote_logprobs(trainer, data)
        (loss, metrics), grads = jax.value_and_grad(
            lambda params: objective(data, remote(params)), has_aux=True
        )(remote.params)

    ``params`` and ``grads`` are float32 scalars that stand for the weights and their gradient,
    which stay on the trainer: a count of versions, and a receipt for
    :func:`mintjax.remote_optimizer`.
    Each ``remote(params)`` is one forward pass; each that the loss depends on is one backward pass,
    however often its logprobs are used. Passes add up, so do receipts. Where the loss does not
    depend on the logprobs there is no backward pass; a datum that it ignores travels with zeros.

    ``jit``, ``scan`` and ``cond`` work, over all or part of it: nothing is sent while tracing, and
    passes keep their order. ``vmap`` over anything but ``params`` works too; a batch of cotangents,
    as ``jacrev`` has it, is one backward pass each, all of which add up in the trainer. Batched
    params, ``jvp``, ``jacfwd`` and derivatives of derivatives are a ``TransformationError``;
    ``jax.checkpoint`` around it is JAX's own ``NotImplementedError``.

    Args:
        trainer: a :class:`~mintjax.remote.trainer.Trainer`, such as a training client.
        data: at least one datum, each with ``target_tokens``. Pass ``remote.batch`` to the
            objective to have its columns laid out once.

    Returns:
        A function from ``params`` to the logprobs, in nats, as a Ragged; its own ``params`` is
        where to start.

    Raises:
        DataError: the data cannot be used.
    """
    return RemoteLogprobs(trainer, check_data(data, ("target_tokens", "weights")))
