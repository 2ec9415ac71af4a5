"""Calls of host functions from JAX programs: each happens once, in order, at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

from mintjax.errors import TransformationError
from mintjax.ragged.transfers import transfers_allowed

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer


def call(fn: Callable[..., Array], result: jax.ShapeDtypeStruct, *args: Array) -> jax.Array:
    """``fn(*args)``, now if nothing is being traced, else each time the compiled program runs.

    Args:
        fn: takes arrays and returns a NumPy array. Outside a trace, what it raises passes through.
        result: the shape and dtype of what it returns.
        args: arrays; the first is a scalar that nothing may batch.

    Returns:
        What ``fn`` returned. Under ``vmap`` of arguments other than the first, one result for each,
        from one call for each.

    Raises:
        TransformationError: the first argument is batched, or any is differentiated.
    """
    # Within a trace even constants become tracers when something is computed from them.
    with transfers_allowed():
        first = jnp.array(args[0], copy=True)
    args = (first, *args[1:])
    if not any(isinstance(arg, jax.core.Tracer) for arg in args):
        return jax.device_put(fn(*args))

    @custom_vmap
    def staged(*args: Array) -> Array:
        return io_callback(fn, result, *args, ordered=True)

    @staged.def_vmap
    def _(size: int, batched: list[bool], *args: Array) -> tuple[Array, bool]:  # pyright: ignore[reportUnusedFunction]
        if batched[0]:
            raise TransformationError(
                "the params of a remote model cannot be batched, for the trainer holds one model; "
                "vmap over something else, or loop"
            )
        calls = [
            call(fn, result, *(a[i] if b else a for a, b in zip(args, batched, strict=True)))
            for i in range(size)
        ]
        return jnp.stack(calls), True

    return staged(*_constant(*args))


@jax.custom_jvp
def _constant(*args: Array) -> tuple[Array, ...]:
    return args


@_constant.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise TransformationError(
        "a remote model has first derivatives, in reverse mode: jax.grad, jax.vjp and "
        "jax.value_and_grad, applied once. Use no jvp, jacfwd, hessian or grad of grad, and "
        "stop_gradient where an outer derivative passes through an inner one"
    )
