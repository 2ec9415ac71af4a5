"""How every loss reads its arguments: one dtype, one shape, and nothing behind the mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike


def aligned(
    where: ArrayLike | None, target_logprobs: ArrayLike, **others: ArrayLike
) -> tuple[jax.Array, ...]:
    """All inputs of a loss in the dtype and shape of ``target_logprobs``, 0 where masked.

    Each must have that shape, or be a scalar, or have 1 in place of a dimension. Fewer dimensions
    are refused: ``[T]`` beside ``[T, K]`` is a mistake that plain broadcasting hides whenever T
    equals K.

    The mask comes before everything else, for ``exp``, a square or a product of what it hides would
    leave ``0 * inf`` in the gradient.

    Args:
        where: the mask, or None for all positions.
        target_logprobs: any shape; integers are taken as floats.
        others: further inputs by name.

    Returns:
        ``target_logprobs`` and the others, in the order given.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    first = _array(target_logprobs)
    dtype = jax.dtypes.canonicalize_dtype(first.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.result_type(0.0)
    columns = [first, *map(_array, others.values())]
    for name, column in zip(others, columns[1:], strict=True):
        _check_shape(column, first.shape, name)
    if where is not None:
        mask = _mask(where, first.shape)
        columns = [jnp.where(mask, column, 0) for column in columns]
    return tuple(jnp.broadcast_to(_as_dtype(column, dtype), first.shape) for column in columns)


def keep(values: jax.Array, where: ArrayLike | None) -> jax.Array:
    """``values`` where the mask holds, 0 elsewhere."""
    return values if where is None else jnp.where(_mask(where, values.shape), values, 0)


def _array(values: ArrayLike) -> jax.Array | np.ndarray:
    return values if isinstance(values, jax.Array) else np.asarray(values)


def _as_dtype(column: jax.Array | np.ndarray, dtype: DTypeLike) -> jax.Array:
    # A conversion that changes nothing is an operation too, and jax_debug_nans would stop at a NaN
    # that it passes on.
    if isinstance(column, jax.Array) and column.dtype == dtype:
        return column
    return jnp.asarray(column).astype(dtype)


def _mask(where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    mask = _array(where)
    _check_shape(mask, shape, "where")
    return jnp.broadcast_to(jnp.asarray(mask) != 0, shape)


def _check_shape(column: jax.Array | np.ndarray, shape: tuple[int, ...], name: str) -> None:
    same_rank = column.ndim == len(shape)
    fits = same_rank and all(
        n in (1, wanted) for n, wanted in zip(column.shape, shape, strict=True)
    )
    if column.ndim and not fits:
        raise ValueError(
            f"{name} has shape {column.shape}, which does not fit the shape {shape} of "
            "target_logprobs: give one value per token, or a scalar"
        )


def torch_clip(values: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """``values`` held within ``[low, high]``, with torch's derivative: 1 at the bounds themselves.

    ``jnp.clip`` has 1/2 there and ``lax.clamp`` 0, and on-policy ratios of exactly 1 meet a
    one-sided threshold of 1.
    """
    return jnp.where(values < low, low, jnp.where(values > high, high, values))


@jax.custom_jvp
def product(coefficients: jax.Array, values: jax.Array) -> jax.Array:
    """``coefficients * values``, 0 where the coefficient is 0 however large the value grows.

    Its derivative by ``values`` is the coefficients, and does not look at the values at all.
    """
    return coefficients * harmless_where_zero(coefficients, values)


def _product_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> Any:
    coefficients, values = primals
    out = product(coefficients, values)
    tangent = jnp.zeros_like(out)
    if not isinstance(tangents[1], SymbolicZero):
        tangent = coefficients * tangents[1]
    if not isinstance(tangents[0], SymbolicZero):
        tangent = tangent + tangents[0] * harmless_where_zero(coefficients, values)
    return out, tangent


product.defjvp(_product_jvp, symbolic_zeros=True)


def harmless_where_zero(coefficients: jax.Array, values: jax.Array) -> jax.Array:
    """``values``, but 0 where they are not finite and their coefficient is 0.

    The limit of ``coefficient * value`` for a coefficient of exactly 0 is 0 however large the value
    grows, where IEEE arithmetic says NaN.
    """
    return jnp.where((coefficients == 0) & ~jnp.isfinite(values), 0, values)
