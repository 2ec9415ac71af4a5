"""Functions and methods of torch, computed by JAX on what torch would be given."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = Any

_python: Any = operator
_numpy: Any = jnp

_LARGEST_PRODUCT = 16  # larger exponents are no products


class Dtype(NamedTuple):
    """A dtype as an argument of a function.

    Args:
        name: one of :data:`DTYPES`.
    """

    name: str


def _array(value: Any) -> Array:
    """Takes an operand, which is an array or a number."""
    if isinstance(value, bool | int | float):
        return value
    if type(value) in (str, list, tuple, dict, slice, Dtype, type(None)):
        raise TypeError(f"an operand is a {type(value).__name__}, where a tensor is due")
    return value


def _tensor(value: Any) -> Array:
    return jnp.asarray(_array(value))


def _float(value: Any) -> Array:
    tensor = _tensor(value)
    return tensor if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor.astype(jnp.float32)


def _unary(function: Callable[[Array], Array]) -> Callable[..., Array]:
    def apply(input: Any) -> Array:
        return function(_float(input))

    return apply


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def apply(input: Any, other: Any) -> Array:
        return function(
            _tensor(input) if _both_numbers(input, other) else _array(input), _array(other)
        )

    return apply


def _both_numbers(first: Any, second: Any) -> bool:
    return isinstance(first, bool | int | float) and isinstance(second, bool | int | float)


def _logical(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def apply(input: Any, other: Any) -> Array:
        return function(_tensor(input).astype(bool), _tensor(other).astype(bool))

    return apply


def _bitwise(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def apply(input: Any, other: Any) -> Array:
        return function(_mask(input), _mask(other))

    return apply


def _mask(value: Any) -> Array:
    tensor = _tensor(value)
    if tensor.dtype != np.bool_:
        raise TypeError(f"&, |, ^ and ~ are served of booleans, not of {tensor.dtype}")
    return tensor


def _neg(input: Any) -> Array:
    return -_array(input)


def _abs(input: Any) -> Array:
    tensor = _float(input)
    # The derivative at 0 is 0 in torch, and 1 in JAX.
    return tensor * jax.lax.stop_gradient(jnp.sign(tensor))


def _logical_not(input: Any) -> Array:
    return ~_tensor(input).astype(bool)


def _invert(input: Any) -> Array:
    return ~_mask(input)


def _pow(input: Any, exponent: Any) -> Array:
    if type(exponent) is int and abs(exponent) <= _LARGEST_PRODUCT:
        return _float(input) ** exponent
    return _float(input) ** _float(exponent)


def _where(condition: Any, input: Any, other: Any) -> Array:
    mask = _mask(condition)
    if _both_numbers(input, other):
        kind = jnp.float32 if isinstance(input, float) or isinstance(other, float) else None
        return jnp.where(mask, jnp.asarray(input, kind), jnp.asarray(other, kind))
    return jnp.where(mask, _array(input), _array(other))


def _clamp(input: Any, min: Any = None, max: Any = None) -> Array:
    if min is None and max is None:
        raise TypeError("one of min and max is due")
    tensor = _float(input)
    result = tensor
    # The derivative at a bound is that of the tensor in torch, and half of it in JAX.
    if min is not None:
        low = _float(min)
        result = jnp.where(tensor < low, low, result)
    if max is not None:
        high = _float(max)
        beyond = tensor > high if min is None else (tensor > high) | (_float(min) > high)
        result = jnp.where(beyond, high, result)
    return result


def _axes(tensor: Array, dim: Any) -> tuple[int, ...] | None:
    if dim is None:
        return None
    given = cast("Sequence[Any]", dim if isinstance(dim, list | tuple) else [dim])
    if not given:
        return None
    axes = [_axis(tensor.ndim, one) for one in given]
    if len(set(axes)) < len(axes):
        raise ValueError("a dimension is named twice")
    return tuple(axes)


def _axis(ndim: int, dim: Any) -> int:
    if not isinstance(dim, int) or isinstance(dim, bool) or not -max(ndim, 1) <= dim < max(ndim, 1):
        raise ValueError(f"{dim!r} is no dimension of a tensor of {ndim}")
    return dim % max(ndim, 1)


def _reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    def apply(input: Any, dim: Any = None, keepdim: bool = False) -> Array:
        tensor = _tensor(input)
        axes = _axes(tensor, dim) if tensor.ndim else None
        return function(tensor, axis=axes, keepdims=keepdim)

    return apply


def _mean_of(tensor: Array, axis: Any, keepdims: bool) -> Array:
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise TypeError(f"the mean of {tensor.dtype} is not defined; take .float() before")
    return jnp.mean(tensor, axis=axis, keepdims=keepdims)


def _sum_of(tensor: Array, axis: Any, keepdims: bool) -> Array:
    if tensor.dtype == np.bool_:
        tensor = tensor.astype(jnp.int32)
    return jnp.sum(tensor, axis=axis, keepdims=keepdims)


def _by_axis(function: Callable[..., Array]) -> Callable[..., Array]:
    def apply(input: Any, dim: Any) -> Array:
        tensor = _float(input)
        return function(tensor, axis=_axis(tensor.ndim, dim))

    return apply


def _functional_softmax(function: Callable[..., Array]) -> Callable[..., Array]:
    def apply(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Array:
        if dim is None or dtype is not None:
            raise TypeError("a softmax with dim and without dtype is served")
        return _by_axis(function)(input, dim)

    return apply


def _functional_relu(input: Any, inplace: bool = False) -> Array:
    if inplace:
        raise TypeError("nothing is changed in place here")
    return jax.nn.relu(_float(input))


def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Array:
    tensor = _float(input)
    return cast("Any", jax.nn.logsumexp)(tensor, axis=_axes(tensor, dim), keepdims=keepdim)


def _cumsum(input: Any, dim: Any) -> Array:
    tensor = _float(input)
    return jnp.cumsum(tensor, axis=_axis(tensor.ndim, dim))


def _log_sigmoid(input: Any) -> Array:
    return -jax.nn.softplus(-_float(input))


def _softplus(input: Any, beta: float = 1, threshold: float = 20) -> Array:
    if beta <= 0:
        raise ValueError("beta is above 0")
    scaled = _float(input) * beta
    linear = scaled > threshold
    return jnp.where(linear, scaled, jax.nn.softplus(jnp.where(linear, 0.0, scaled))) / beta


def _ones_like(input: Any) -> Array:
    return jnp.ones_like(_tensor(input))


def _zeros_like(input: Any) -> Array:
    return jnp.zeros_like(_tensor(input))


def _full_like(input: Any, fill_value: Any) -> Array:
    return jnp.full_like(_tensor(input), _array(fill_value))


def _detach(input: Any) -> Array:
    return jax.lax.stop_gradient(_tensor(input))


def _unsqueeze(input: Any, dim: Any) -> Array:
    tensor = _tensor(input)
    return jnp.expand_dims(tensor, _axis(tensor.ndim + 1, dim))


def _squeeze(input: Any, dim: Any) -> Array:
    tensor = _tensor(input)
    axis = _axis(tensor.ndim, dim)
    return jnp.squeeze(tensor, axis) if tensor.ndim and tensor.shape[axis] == 1 else tensor


def _getitem(input: Any, index: Any) -> Any:
    if isinstance(input, tuple):
        shape = cast("tuple[Any, ...]", input)
        if not isinstance(index, int):
            raise TypeError("of a shape, one size at a time is served")
        return jnp.asarray(shape[index])
    parts = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
    for part in parts:
        if isinstance(part, slice):
            whole = cast("Any", part)
            ends: tuple[Any, ...] = (whole.start, whole.stop, whole.step)
            if not all(end is None or type(end) is int for end in ends):
                raise TypeError("a slice of whole numbers is served")
        elif part is not None and part is not ... and not (type(part) is int and part in (0, -1)):
            raise TypeError(
                "an index by 0, -1 (the first and the last), slices, None, ... is served"
            )
    return _tensor(input)[index]


def _getattr(input: Any, name: Any) -> Any:
    if name != "shape":
        raise TypeError(f"of attributes, shape is served, not {str(name)[:80]!r}")
    return tuple(_tensor(input).shape)


def _size(input: Any, dim: Any = None) -> Any:
    tensor = _tensor(input)
    shape = tuple(tensor.shape)
    return shape if dim is None else jnp.asarray(shape[_axis(tensor.ndim, dim)])


def _numel(input: Any) -> Array:
    return jnp.sum(jnp.ones(_tensor(input).shape, jnp.int32))


def _dot(input: Any, tensor: Any) -> Array:
    first, second = _tensor(input), _tensor(tensor)
    if first.ndim != 1 or second.ndim != 1:
        raise ValueError("a dot product is of two tensors of one dimension")
    return jnp.sum(first * second)


def _to(input: Any, dtype: Any) -> Array:
    if not isinstance(dtype, Dtype):
        raise TypeError("a conversion to a dtype is served")
    return _tensor(input).astype(DTYPES[dtype.name])


def _as_float(input: Any) -> Array:
    return _tensor(input).astype(jnp.float32)


def _as_bool(input: Any) -> Array:
    return _tensor(input).astype(bool)


DTYPES: dict[str, Any] = {"float32": jnp.float32, "bool": jnp.bool_, "int64": jnp.int32}
"""The dtypes that a graph may name, and those that JAX has for them here."""

_TENSORS: dict[str, Callable[..., Any]] = {
    "abs": _abs,
    "add": _binary(_python.add),
    "all": _reduction(_numpy.all),
    "amax": _reduction(_numpy.max),
    "amin": _reduction(_numpy.min),
    "any": _reduction(_numpy.any),
    "ceil": _unary(jnp.ceil),
    "clamp": _clamp,
    "clip": _clamp,
    "cos": _unary(jnp.cos),
    "cumsum": _cumsum,
    "detach": _detach,
    "div": _binary(_python.truediv),
    "dot": _dot,
    "eq": _binary(_python.eq),
    "exp": _unary(jnp.exp),
    "expm1": _unary(jnp.expm1),
    "floor": _unary(jnp.floor),
    "ge": _binary(_python.ge),
    "gt": _binary(_python.gt),
    "isfinite": _unary(jnp.isfinite),
    "isnan": _unary(jnp.isnan),
    "le": _binary(_python.le),
    "log": _unary(jnp.log),
    "log1p": _unary(jnp.log1p),
    "log_softmax": _by_axis(jax.nn.log_softmax),
    "logical_and": _logical(_python.and_),
    "logical_not": _logical_not,
    "logical_or": _logical(_python.or_),
    "logical_xor": _logical(_python.xor),
    "logsumexp": _logsumexp,
    "lt": _binary(_python.lt),
    "maximum": _binary(jnp.maximum),
    "mean": _reduction(_mean_of),
    "minimum": _binary(jnp.minimum),
    "mul": _binary(_python.mul),
    "ne": _binary(_python.ne),
    "neg": _neg,
    "numel": _numel,
    "pow": _pow,
    "relu": _unary(jax.nn.relu),
    "rsqrt": _unary(jax.lax.rsqrt),
    "sigmoid": _unary(jax.nn.sigmoid),
    "sign": _unary(jnp.sign),
    "sin": _unary(jnp.sin),
    "softmax": _by_axis(jax.nn.softmax),
    "sqrt": _unary(jnp.sqrt),
    "square": _unary(jnp.square),
    "squeeze": _squeeze,
    "sub": _binary(_python.sub),
    "sum": _reduction(_sum_of),
    "tanh": _unary(jnp.tanh),
    "unsqueeze": _unsqueeze,
    "where": _where,
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"torch.{name}": function for name, function in _TENSORS.items() if name != "detach"},
    "builtins.getattr": _getattr,
    "getattr": _getattr,
    "operator.abs": _abs,
    "operator.add": _TENSORS["add"],
    "operator.and_": _bitwise(_python.and_),
    "operator.eq": _TENSORS["eq"],
    "operator.ge": _TENSORS["ge"],
    "operator.getitem": _getitem,
    "operator.gt": _TENSORS["gt"],
    "operator.invert": _invert,
    "operator.le": _TENSORS["le"],
    "operator.lt": _TENSORS["lt"],
    "operator.mul": _TENSORS["mul"],
    "operator.ne": _TENSORS["ne"],
    "operator.neg": _neg,
    "operator.or_": _bitwise(_python.or_),
    "operator.pow": _pow,
    "operator.sub": _TENSORS["sub"],
    "operator.truediv": _TENSORS["div"],
    "operator.xor": _bitwise(_python.xor),
    "torch._C._nn.log_sigmoid": _log_sigmoid,
    "torch._C._nn.softplus": _softplus,
    "torch.full_like": _full_like,
    "torch.nn.functional.log_softmax": _functional_softmax(jax.nn.log_softmax),
    "torch.nn.functional.relu": _functional_relu,
    "torch.nn.functional.softmax": _functional_softmax(jax.nn.softmax),
    "torch.ones_like": _ones_like,
    "torch.zeros_like": _zeros_like,
}
"""The functions that a graph may call, by the names that ``torch.fx`` has for them."""

METHODS: dict[str, Callable[..., Any]] = {
    **{name: function for name, function in _TENSORS.items() if name != "where"},
    "bool": _as_bool,
    "float": _as_float,
    "size": _size,
    "to": _to,
}
"""The methods of tensors that a graph may call."""
