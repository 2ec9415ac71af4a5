"""Reading of arguments, shared by all losses: one dtype, one shape, nothing behind the mask."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from mintjax.losses._settings import check_settings


def aligned(
    where: ArrayLike | None, target_logprobs: ArrayLike, **others: ArrayLike
) -> tuple[jax.Array, ...]:
    """Brings all inputs of a loss to one shape and dtype, with 0 where they are masked.

    Each input must have the shape of ``target_logprobs``, or be a scalar, or have 1 in place of a
    dimension. Fewer dimensions are refused, because ``[T]`` beside ``[T, K]`` is a mistake that
    plain broadcasting hides whenever T equals K.

    The mask comes before everything else, because ``exp``, a square or a product of a masked
    infinity would leave ``0 * inf`` in the gradient.

    Args:
        where: the mask, or None for all positions.
        target_logprobs: any shape; integers are taken as floats.
        others: further inputs by name.

    Returns:
        ``target_logprobs`` and the others, in the order given: float32, because 16 bits are too few
        for differences and sums of logprobs, or float64 if ``target_logprobs`` is float64.

    Raises:
        TypeError: ``where`` holds floats.
        ValueError: a shape does not fit, or a hyperparameter among the others is out of its range;
            the message names the argument.
    """
    check_settings(others, where)
    first = _array(target_logprobs)
    dtype = jnp.promote_types(_float_dtype(first), jnp.float32)
    columns = [first, *map(_array, others.values())]
    for name, column in zip(others, columns[1:], strict=True):
        _check_shape(column, first.shape, name)
    if where is not None:
        mask = as_mask(where, first.shape)
        columns = [_hide(column, mask) for column in columns]
    return tuple(jnp.broadcast_to(_as_dtype(column, dtype), first.shape) for column in columns)


def keep(values: jax.Array, where: ArrayLike | None) -> jax.Array:
    """Puts 0 where the mask does not hold."""
    return values if where is None else _hide(values, as_mask(where, values.shape))


def finish(values: jax.Array, where: ArrayLike | None, target_logprobs: ArrayLike) -> jax.Array:
    """Puts 0 where the mask does not hold, in the dtype of ``target_logprobs``."""
    return keep(_as_dtype(values, _float_dtype(_array(target_logprobs))), where)


def count(values: jax.Array, where: ArrayLike | None) -> jax.Array:
    """Counts the unmasked positions along the last axis, which stays with size 1."""
    return jnp.sum(keep(jnp.ones_like(values), where), axis=-1, keepdims=True)


def too_large_to_square(values: jax.Array, axis: int | None = None) -> jax.Array:
    """Gives what to divide values by before they are squared: 1, unless a square could overflow.

    A variance that overflows would make every value of its group 0 standard deviations, in silence.
    """
    size = jnp.max(jnp.abs(values), axis=axis, keepdims=axis is not None, initial=0)
    return jax.lax.stop_gradient(jnp.where(size > 1e15, size, 1))


def as_mask(where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Reads a mask: booleans, or integers that count where they are not 0.

    Raises:
        TypeError: it holds floats, which may be weights that a mask would round up to 1.
        ValueError: its shape does not fit.
    """
    mask = _array(where)
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise TypeError(
            f"where must be boolean, not {mask.dtype}: pass where=weights != 0 for a mask, and "
            "multiply the losses by the weights if they are factors"
        )
    _check_shape(mask, shape, "where")
    return jnp.broadcast_to(jnp.asarray(mask).astype(bool), shape)


def _hide(values: jax.Array | np.ndarray, mask: jax.Array) -> jax.Array:
    # The 0 has the dtype of the values, because strict promotion mixes no kinds.
    return jnp.where(mask, values, np.zeros((), values.dtype))


def _array(values: ArrayLike) -> jax.Array | np.ndarray:
    if isinstance(values, jax.Array):
        return values
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(cast("Any", values)):
        raise ValueError(
            "a masked array hides some of its numbers, which would be taken for numbers: give "
            "array.filled(0), and where=~array.mask"
        )
    array = np.asarray(values)
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"a loss is computed of numbers, not {array.dtype}; is one of them None?")
    return array


def _float_dtype(array: jax.Array | np.ndarray) -> Any:
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.result_type(0.0)


def _as_dtype(column: jax.Array | np.ndarray, dtype: DTypeLike) -> jax.Array:
    # A conversion that changes nothing is an operation too, and jax_debug_nans would stop at a NaN
    # that it passes on.
    if isinstance(column, jax.Array) and column.dtype == dtype:
        return column
    return jnp.asarray(column).astype(dtype)


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
    """Holds ``values`` within ``[low, high]``, with torch's derivative: 1 at the bounds themselves.

    ``jnp.clip`` has 1/2 there and ``lax.clamp`` 0, and on-policy ratios of exactly 1 meet a
    one-sided threshold of 1.
    """
    return jnp.where(values < low, low, jnp.where(values > high, high, values))


@jax.custom_jvp
def product(coefficients: jax.Array, values: jax.Array) -> jax.Array:
    """Multiplies; the result is 0 where the coefficient is 0, however large the value grows.

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
    """Puts 0 in place of values that are not finite and whose coefficient is 0.

    The limit of ``coefficient * value`` for a coefficient of exactly 0 is 0 however large the value
    grows, where IEEE arithmetic says NaN.
    """
    return jnp.where((coefficients == 0) & ~jnp.isfinite(values), jnp.zeros_like(values), values)
