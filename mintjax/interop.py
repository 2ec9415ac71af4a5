"""Losses and objects of other libraries, used as they are; objectives, used by other libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import msgspec
import numpy as np

from mintjax.errors import DataError
from mintjax.gradients import Objective, value_and_logprob_grads
from mintjax.gradients.torch import torch_objective
from mintjax.ragged.batch import Batch, as_batch
from mintjax.tensors import numbers_of, to_tensor
from mintjax.types import Datum

__all__ = ["sdk_loss", "torch_objective"]

SdkLoss: TypeAlias = Callable[[Sequence[Any], Sequence[Any]], tuple[Any, dict[str, Any]]]
"""``(data: list[tinker.Datum], logprobs: list[torch.Tensor]) -> (torch scalar, metrics)``."""


class _SeenDatum(Datum, frozen=True, eq=False):
    """A datum of the official SDK, whose model input stays as it is, because the SDK sends it."""

    def __post_init__(self) -> None:
        given = cast("Mapping[str, Any]", self.loss_fn_inputs)
        columns = {name: to_tensor(name, value) for name, value in given.items()}
        msgspec.structs.force_setattr(self, "loss_fn_inputs", columns)


def sdk_loss(objective: Objective, data: Sequence[Datum] | Batch | None = None) -> SdkLoss:
    """Makes the callback that the official SDK's ``forward_backward_custom`` takes.

    ::

        training_client.forward_backward_custom(data, mintjax.interop.sdk_loss(objective))

    The objective and its gradient are computed by JAX. What the callback returns is a torch scalar
    whose ``backward()`` gives each row of logprobs that gradient, zeros where the objective does
    not read the row. It can be scaled, and added to a loss of torch's own. Torch is imported when
    the callback is called.

    Args:
        objective: ``(data, logprobs) -> (scalar loss, dict of metrics)``, as
            :func:`mintjax.value_and_logprob_grads` takes it. It sees every column of
            ``loss_fn_inputs`` as it would in a :class:`mintjax.Datum`.
        data: the datums that the objective reads in place of the SDK's, in the same order. They
            are for an SDK that takes ``target_tokens`` and ``weights`` only, as 0.22 does.

    Returns:
        A function of the SDK's list of datums and its list of torch rows. The metrics are floats,
        ``"loss"`` among them, and NumPy arrays of those with one number per datum.

    Raises:
        ImportError: from the callback, if torch is missing.
        DataError: from the callback; ``data`` are not those that the SDK has.
        NonFiniteError: from the callback; the loss or a gradient is not finite.

    Example:
        >>> import mintjax
        >>> from mintjax import interop, objectives
        >>> loss = interop.sdk_loss(objectives.ppo(clip_high_threshold=1.3))
        >>> callable(loss)
        True
    """

    own = None if data is None else as_batch(data)

    def loss(data: Sequence[Any], logprobs: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        batch = Batch([_SeenDatum(datum.model_input, datum.loss_fn_inputs) for datum in data])
        if own is not None:
            _check_same_targets(own, batch)
            batch = own
        result = value_and_logprob_grads(objective, batch, [numbers_of(row) for row in logprobs])
        return _with_gradient()(result.loss, result.grads, *logprobs), result.metrics

    return loss


def _check_same_targets(own: Batch, sent: Batch) -> None:
    if len(own) != len(sent):
        raise DataError(f"the objective reads {len(own)} datums, and the SDK has {len(sent)}")
    name = "target_tokens"
    for i, (ours, theirs) in enumerate(zip(own.rows(name), sent.rows(name), strict=True)):
        if not np.array_equal(ours, theirs):
            raise DataError("it differs from that of the SDK's datum", datum=i, field=name)


@functools.cache
def _with_gradient() -> Callable[..., Any]:
    """Makes the torch function of some rows whose value and gradient are those it is given."""
    import torch as untyped  # pyright: ignore

    torch = cast("Any", untyped)

    class WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: float, grads: Sequence[Any], *rows: Any) -> Any:
            ctx.grads = grads
            ctx.devices = [row.device for row in rows]
            return rows[0].new_tensor(value)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, by_loss: Any) -> tuple[Any, ...]:
            # NumPy scales one buffer of all rows, because torch would wake a thread for each core.
            flat = np.concatenate(ctx.grads)
            flat *= by_loss.item()
            parts = torch.from_numpy(flat).split([len(grad) for grad in ctx.grads])
            if any(device.type != "cpu" for device in ctx.devices):
                parts = [part.to(device) for part, device in zip(parts, ctx.devices, strict=True)]
            return None, None, *parts  # autograd gives each the dtype of its row

    return WithGradient.apply
