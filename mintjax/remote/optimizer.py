"""A remote model's optimizer with optax's interface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]

from mintjax.errors import TransformationError
from mintjax.ragged.transfers import transfers_allowed
from mintjax.remote import callback
from mintjax.remote.trainer import Optimizer
from mintjax.remote.versions import versions_of
from mintjax.tensors import finite_floats
from mintjax.types import AdamParams

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer
Hyperparameter: TypeAlias = float | Callable[[Any], Any]
"""A number, or an optax schedule: a function of the number of steps taken."""


class RemoteOptimizerState(NamedTuple):
    """The optimizer's state on this side; the moments are on the trainer.

    Args:
        count: how many steps it has taken, an int32 scalar.
    """

    count: Array


def remote_optimizer(
    trainer: Optimizer,
    learning_rate: Hyperparameter = 1e-4,
    *,
    beta1: Hyperparameter = 0.9,
    beta2: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-12,
    weight_decay: Hyperparameter = 0.0,
    grad_clip_norm: Hyperparameter = 0.0,
) -> optax.GradientTransformation:
    """Makes AdamW on the trainer, for the params and gradients of :func:`mintjax.remote_logprobs`.

    The loop is any JAX loop; ``update`` runs ``optim_step``, and ``apply_updates`` adds one to the
    version that ``params`` stands for::

        optimizer = remote_optimizer(trainer, optax.linear_schedule(1e-3, 0.0, 100))
        params = remote.params
        state = optimizer.init(params)
        for data in batches:
            remote = remote_logprobs(trainer, data)
            grads = jax.grad(lambda p: objective(data, remote(p))[0])(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)

    ``update`` applies all backward passes since the last one, so it wants a gradient of all: the
    plain sum, where there were several. It raises ``StaleError``, and sends nothing, if there was
    none, if the gradients are of an older version of the model, scaled, clipped or averaged, or of
    only some of the passes, or if ``params`` are not of the present version. It works under
    ``jit``.

    Call ``init`` before the first gradient, and again, with ``remote.params``, once a checkpoint
    was loaded: what has accumulated before is taken as gone. ``params`` may be a pytree with the
    token as its one leaf, as ``optax.multi_transform`` makes it for params of which only some are
    remote.

    Args:
        trainer: has ``optim_step``, such as a training client.
        learning_rate: step size; a number or an optax schedule, as are all others.
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of squared gradients.
        eps: added to the denominator, outside the square root.
        weight_decay: decoupled, in units of the learning rate.
        grad_clip_norm: the largest global gradient norm; 0 for none.

    Returns:
        optax's ``init`` and ``update``.

    Raises:
        DataError: a hyperparameter is no finite number; from ``update``, one of a schedule.
        TransformationError: from ``init``, inside ``optax.chain``, ``optax.MultiSteps`` and their
            like, which would change the receipt in place of the gradient. ``multi_transform``,
            ``masked`` and ``apply_if_finite`` work.
    """
    given = {
        "learning_rate": learning_rate,
        "beta1": beta1,
        "beta2": beta2,
        "eps": eps,
        "weight_decay": weight_decay,
        "grad_clip_norm": grad_clip_norm,
    }
    schedules = {name: value for name, value in given.items() if callable(value)}
    numbers = finite_floats({k: v for k, v in given.items() if not callable(v)})
    versions = versions_of(trainer)

    def start(token: Array) -> np.int32:
        versions.check(token)
        versions.forget()
        return np.int32(0)

    def init(params: Any) -> RemoteOptimizerState:
        _refuse_wrappers()
        count = jax.ShapeDtypeStruct((), np.int32)
        return RemoteOptimizerState(callback.call(start, count, _token(params)))

    def step(token: Array, receipts: Array, *scheduled: Array) -> np.float32:
        versions.check(token)
        versions.check_receipts(receipts)
        now = {**numbers, **finite_floats(dict(zip(schedules, scheduled, strict=True)))}
        with versions.own_change():
            trainer.optim_step(AdamParams(**now)).result()
        versions.step()
        return np.float32(1)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RemoteOptimizerState]:
        token, receipts = _token(params), _token(updates)
        # A schedule is JAX code, which has no place in a callback.
        with transfers_allowed():  # of its constants
            scheduled = [schedule(state.count) for schedule in schedules.values()]
            count = state.count + 1
        result = jax.ShapeDtypeStruct((), np.float32)
        one = callback.call(step, result, token, receipts, *scheduled)
        tree = cast("Any", jax.tree.structure(params))
        return tree.unflatten([one]), RemoteOptimizerState(count)

    return optax.GradientTransformation(init, update)


_PASS_GRADIENTS_ON = (
    "multi_transform.",
    "partition.",
    "masked.",
    "apply_if_finite.",
    "GradientTransformation",
)


def _refuse_wrappers() -> None:
    """Refuses transformations of optax that would work on the receipt in place of the gradient.

    The gradient itself stays on the trainer, so what clips, scales, averages or skips it here would
    do nothing, or would make the trainer step at the wrong time. They cannot be seen from
    ``update``, where a receipt that was not changed looks right. They call ``init``, so its callers
    are looked at.
    """
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        name = frame.f_code.co_qualname
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("optax.") and not name.startswith(_PASS_GRADIENTS_ON):
            raise TransformationError(
                f"remote_optimizer cannot be used inside optax's {name.partition('.')[0]}, because "
                "the gradient is on the trainer and only a receipt of it is here; nothing was "
                "sent. To clip, pass grad_clip_norm=; for schedules, pass them as "
                "learning_rate= and the like; to accumulate, run several backward passes, add "
                "their gradients, and call update once"
            )
        frame = frame.f_back


def _token(tree: Any) -> Array:
    leaves = jax.tree.leaves(tree)
    if len(leaves) != 1 or jnp.shape(leaves[0]) != ():
        raise TypeError(
            "a remote optimizer needs the params of a remote model and their gradient, each a "
            f"scalar, not {tree!r}"
        )
    return leaves[0]
