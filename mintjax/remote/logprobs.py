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
from mintjax.ragged.batch import Batch, as_batch
from mintjax.ragged.checks import check_data
from mintjax.remote import callback
from mintjax.remote.trainer import Trainer
from mintjax.remote.versions import versions_of
from mintjax.tensors import first_row_not_finite
from mintjax.types import Datum, ForwardBackwardOutput, ModelInput

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer
_SCALAR = jax.ShapeDtypeStruct((), np.float32)


class RemoteLogprobs:
    """The logprobs of some data as a function of the remote model's params.

    :func:`remote_logprobs` makes one, and says what can be done with it.
    """

    def __init__(self, trainer: Trainer, batch: Batch | None) -> None:
        self._trainer = trainer
        self._versions = versions_of(trainer)
        self._batch = batch
        self._output: ForwardBackwardOutput | None = None
        self._tiles = None if batch is None else self._function(batch, ())

    def _function(self, batch: Batch, arrays: tuple[Array, ...]) -> Callable[..., Array]:
        """Makes the differentiable function from the token to the tiles of the logprobs.

        Args:
            batch: the data, where they are known while tracing; else its shapes.
            arrays: of :func:`_rebuilt`, which the function takes after the token; none where the
                data are known.
        """
        layout = batch.layout
        trailing = batch["target_tokens"].trailing_shape
        result = jax.ShapeDtypeStruct((len(layout.tile_row), tiling.TILE, *trailing), np.float32)

        def source(arrays: Sequence[Array]) -> Batch:
            return _rebuilt(*arrays) if arrays else batch

        def ask(token: Array, *arrays: Array) -> Array:
            return self._forward(token, source(arrays))

        def send(token: Array, tiles: Array, cotangent: Array, *arrays: Array) -> Array:
            return self._backward(token, tiles, cotangent, source(arrays))

        def primal(token: Array, *arrays: Array) -> Array:
            return callback.call(ask, result, token, *arrays)

        def forward(token: Array, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
            tiles = primal(token, *arrays)
            return tiles, (token, tiles, *arrays)

        def backward(residuals: tuple[Array, ...], cotangent: Array) -> tuple[Array | None, ...]:
            token, tiles, *rest = residuals
            receipt = callback.call(send, _SCALAR, token, tiles, cotangent, *rest)
            return (receipt, *(None for _ in rest))

        tiles = cast("Any", jax.custom_vjp(primal))
        tiles.defvjp(forward, backward)

        def at(token: Array) -> Array:
            return tiles(token, *arrays)

        return at

    @property
    def params(self) -> jax.Array:
        """The token that stands for the model's weights as they are now: a float32 scalar.

        It counts the optimizer steps taken through :func:`mintjax.remote_optimizer`, and what the
        training client's own methods have changed in between.
        """
        jax.effects_barrier()  # a compiled program may still be on its way to its callbacks
        return jax.device_put(self._versions.token)

    @property
    def batch(self) -> Batch:
        """The data, as objectives of one's own want to see them: by column.

        Raises:
            DataError: :func:`remote_logprobs` was given no data.
        """
        if self._batch is None:
            raise DataError("remote_logprobs was given no data; pass a Batch with each call")
        return self._batch

    @property
    def output(self) -> ForwardBackwardOutput | None:
        """The trainer's output of the last backward pass; None before the first.

        Its metrics are the trainer's own: those of the objective are what ``jax.value_and_grad``
        with ``has_aux=True`` returns.
        """
        jax.effects_barrier()  # as above
        return self._output

    def __call__(self, params: Array, data: Batch | Sequence[Datum] | None = None) -> Ragged:
        """Computes the logprobs of the target tokens, by a forward pass.

        Args:
            params: the token, a float32 scalar: :attr:`params`, or what ``optax.apply_updates``
                made of it.
            data: other data than those that this function was made with. As a ``Batch`` that is an
                argument of a compiled function they cost no compilation: lengths are traced, and
                only numbers of datums and of tiles make another program.

        Returns:
            One row per datum, float32, in nats, of the shape of its ``target_tokens``. Lengths are
            not traced, so rows can be taken one by one under ``jit`` too.

        Raises:
            DataError: there are no data, or they cannot be used.
            TypeError: ``params`` is no such scalar.
            StaleError: the trainer's model is at another version.
            TransformationError: a transformation that no trainer can follow.
            Exception: whatever the trainer raises, as it is; under ``jax.jit`` its
                message only, and under :func:`mintjax.remote_jit` as it is.
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
        if data is None:
            tiles = self._function(self.batch, ()) if self._tiles is None else self._tiles
            return Ragged(tiles(params), self.batch.layout)
        batch = as_batch(data)
        if batch.has_datums:
            batch = check_data(batch, ("target_tokens", "weights"))
            return Ragged(self._function(batch, ())(params), batch.layout)
        layout, targets = batch.layout, batch["target_tokens"].tiles
        arrays = (layout.lengths, layout.row_start, batch.tokens.tiles, targets)
        return Ragged(self._function(batch, arrays)(params), layout)

    def _forward(self, token: Array, batch: Batch) -> npt.NDArray[np.float32]:
        self._versions.check(token)
        rows = [np.asarray(row, np.float32) for row in self._trainer.logprobs(list(batch))]
        if len(rows) != len(batch):
            raise DataError(
                f"the trainer returned {len(rows)} rows for {len(batch)} datums",
                field="logprobs",
            )
        for i, (row, targets) in enumerate(zip(rows, batch.rows("target_tokens"), strict=True)):
            if row.shape != targets.shape:
                raise DataError(
                    f"the trainer returned shape {list(row.shape)} for targets of shape "
                    f"{list(targets.shape)}",
                    datum=i,
                    field="logprobs",
                )
        return tiling.pack_anew(rows, batch.layout, np.float32)

    def _backward(self, token: Array, tiles: Array, cotangent: Array, batch: Batch) -> np.float32:
        self._versions.check(token)
        logprobs, grads = _rows(tiles, batch), _rows(cotangent, batch)
        found = first_row_not_finite(grads)
        if found is not None:
            raise not_finite("the loss", batch, logprobs, grads, found)
        with self._versions.own_change():
            self._output = self._trainer.backward(list(batch), logprobs, grads)
        return self._versions.receipt()


def _rows(tiles: Array, batch: Batch) -> list[npt.NDArray[np.float32]]:
    return Ragged(np.asarray(tiles), batch.layout).to_rows()


def _rebuilt(lengths: Array, starts: Array, tokens: Array, targets: Array) -> Batch:
    """Makes datums of the arrays that a compiled program was given.

    Raises:
        DataError: their rows do not lie as those of a batch of datums do.
    """
    lengths, starts = np.asarray(lengths), np.asarray(starts)
    inputs, outputs = (
        np.asarray(tiles).reshape(-1, *tiles.shape[2:]) for tiles in (tokens, targets)
    )
    data = [
        Datum(ModelInput.from_ints(inputs[at : at + n]), {"target_tokens": outputs[at : at + n]})
        for at, n in zip(starts.tolist(), lengths.tolist(), strict=True)
    ]
    batch = check_data(data, ("target_tokens",))
    layout = batch.layout
    if not np.array_equal(layout.row_start, starts) or len(layout.tile_row) != len(tokens):
        raise DataError(
            "a remote model takes whole batches; make a Batch of the datums that are wanted, "
            "instead of a slice within a compiled function"
        )
    return batch


def remote_logprobs(
    trainer: Trainer, data: Sequence[Datum] | Batch | None = None
) -> RemoteLogprobs:
    """Makes a function that JAX can differentiate of a model that trains elsewhere.

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
        data: at least one datum, each with ``target_tokens``. ``remote.batch`` is what objectives
            of one's own read.

    Returns:
        A function from ``params`` to the logprobs, in nats, as a Ragged; its own ``params`` is
        where to start.

    Raises:
        DataError: the data cannot be used.
    """
    batch = None if data is None else check_data(data, ("target_tokens", "weights"))
    return RemoteLogprobs(trainer, batch)
