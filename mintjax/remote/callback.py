"""Calls of host functions from JAX programs: each happens once, in order, and its errors arrive."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback

from mintjax.errors import TransformationError
from mintjax.ragged.transfers import transfers_allowed

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer


P = ParamSpec("P")
T = TypeVar("T")

_FAILED: type[Exception] = cast("Any", jax.errors).JaxRuntimeError  # JAX gives it no type
_heard_by: dict[int, list[BaseException]] = {}
"""What callbacks raised, for each call of a function of :func:`remote_jit` that is under way."""


def remote_jit(function: Callable[P, T], **options: Any) -> Callable[P, T]:
    """Compiles a function that calls a remote model, as ``jax.jit`` does, with errors that are its.

    A program that ``jax.jit`` compiled fails with a ``jax.errors.JaxRuntimeError``, whose text is a
    traceback that ends with the words of the error. Here the error itself is raised, such as a
    :class:`mintjax.APIError`. Each call waits for its results, because a program may fail after it
    gave them. A training loop that reads its loss waits anyway.

    Args:
        function: as for ``jax.jit``.
        options: those of ``jax.jit``.

    Returns:
        The compiled function.

    Raises:
        Exception: from the compiled function: whatever a trainer raises, as it is.

    Example:
        >>> import mintjax
        >>> mintjax.remote_jit(lambda x: 2 * x)(1.5)
        Array(3., dtype=float32, weak_type=True)
    """
    compiled = cast("Callable[P, T]", jax.jit(function, **options))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        heard: list[BaseException] = []
        _heard_by[id(heard)] = heard
        try:
            return cast("Any", jax).block_until_ready(compiled(*args, **kwargs))
        except _FAILED as error:
            text = str(error)
            for own in reversed(heard):
                words = str(own).partition("\0")[0]  # JAX's text ends there
                if type(own).__name__ in text and words in text:  # it may be another program's
                    raise own from None
            raise
        finally:
            del _heard_by[id(heard)]

    return call


def call(fn: Callable[..., Array], result: jax.ShapeDtypeStruct, *args: Array) -> jax.Array:
    """Calls ``fn(*args)``, now or, if something is traced, each time the program runs.

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

    def heard(*args: Array) -> Array:
        try:
            return fn(*args)
        except BaseException as error:
            for errors in list(_heard_by.values()):
                errors.append(error)
            raise

    @custom_vmap
    def staged(*args: Array) -> Array:
        return io_callback(heard, result, *args, ordered=True)

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
