"""Evaluate a jaxpr with NumPy: for programs too short-lived to be worth compiling.

XLA compiles for shapes, and a loop over rows has new shapes every step: to compile it takes
seconds, to run it once in NumPy milliseconds. What has no rule here is run by JAX.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax.gradients import indexing
from mintjax.gradients.flat import (
    CALLS,
    Equation,
    Flat,
    replace_sizes,
    symbolic_sizes,
)

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr

Array: TypeAlias = Any  # np.ndarray
Rule: TypeAlias = Callable[..., Any]


def evaluate(closed: ClosedJaxpr, arguments: Sequence[Array]) -> list[npt.NDArray[Any]]:
    """Computes the outputs of a closed jaxpr for NumPy arguments, as NumPy arrays."""
    with np.errstate(all="ignore"):
        return _run(closed.jaxpr, closed.consts, arguments)


class Unsupported(Exception):
    """An equation has sizes that are symbols, and no rule here.

    Args:
        equation: this.
    """

    def __init__(self, equation: Equation) -> None:
        super().__init__(equation.name)
        self.equation = equation


class _Text(str):
    """The text of a symbolic size, which is faster to look up than the size."""

    __slots__ = ()


def _texts(value: Any) -> list[str]:
    if type(value) is _Text:
        return [value]
    if type(value) in (tuple, list):
        return [text for item in value for text in _texts(item)]
    return []


def _filled(value: Any, known: Mapping[str, int]) -> Any:
    if type(value) is _Text:
        return known[value]
    if type(value) is tuple:
        return tuple([_filled(item, known) for item in cast("Sequence[Any]", value)])
    return value


class Step(NamedTuple):
    """An equation that is ready to be evaluated.

    Args:
        rule: computes it.
        inputs: the slots that it reads.
        outputs: the slots that it writes.
        params: of the rule, with symbolic sizes as texts.
        texts: these sizes.
        dtypes: of the outputs.
        several: whether the rule gives a list.
    """

    rule: Rule
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: list[Any]
    texts: list[str]
    dtypes: list[Any]
    several: bool

    def compute(self, operands: Sequence[Array], known: Mapping[str, int]) -> list[Array]:
        """Computes the outputs.

        Args:
            operands: the inputs.
            known: the sizes that ``texts`` names.
        """
        params = self.params
        if self.texts:
            params = [_filled(value, known) for value in params]
        result = self.rule(*operands, *params)
        results = result if self.several else (result,)
        return [np.asarray(value, dtype) for value, dtype in zip(results, self.dtypes, strict=True)]


def rule_of(flat: Flat, equation: Equation) -> Rule | None:
    """Gives the rule that computes an equation from the parameters in :data:`READ`, if any."""
    dtype = flat.avals[equation.outputs[0]].dtype
    return _rule(equation.name, equation.params, dtype)


def _rule(name: str, params: Mapping[str, Any], dtype: Any) -> Rule | None:
    if name == "scatter" and not _puts_alone(params):
        return None
    is_checked = name in _COUNTING and dtype.kind in "iu" and dtype not in _WRAPPING
    return _checked(name, np.dtype(dtype)) if is_checked else _RULES.get(name)


@functools.cache
def _checked(name: str, dtype: np.dtype[Any]) -> Rule:
    """Makes a rule of integers that computes them with 64 bits."""
    rule = _RULES[name]

    def checked(*given: Any) -> Array:
        wide: list[Any] = [
            x.astype(np.int64) if isinstance(x, np.ndarray | np.generic) else x for x in given
        ]
        return narrowed(np.asarray(rule(*wide)), dtype)

    return checked


def narrowed(x: Array, dtype: Any) -> Array:
    """Converts integers of 64 bits.

    Raises:
        OverflowError: one does not fit.
    """
    found = x.astype(dtype)
    if (found != x).any():
        raise OverflowError(
            f"an integer that a loop over rows computes does not fit {dtype}, which JAX has for "
            "it, and would wrap; make it a float before, or call "
            'jax.config.update("jax_enable_x64", True)'
        )
    return found


def step_of(flat: Flat, equation: Equation) -> Step:
    """Readies an equation to be evaluated.

    Raises:
        Unsupported: it has symbolic sizes and no rule here.
    """
    rule = rule_of(flat, equation)
    params = [equation.params[key] for key in READ.get(equation.name, ())]
    if rule is None:
        slots = (*equation.inputs, *equation.outputs)
        shapes = [flat.avals[slot].shape for slot in slots]
        if symbolic_sizes(shapes) or symbolic_sizes(list(equation.params.values())):
            raise Unsupported(equation)
        rule, params = functools.partial(_bound, equation), []
    dtypes = [flat.avals[slot].dtype for slot in equation.outputs]
    params = [replace_sizes(value, lambda size: _Text(str(size))) for value in params]
    several = equation.primitive.multiple_results
    return Step(rule, equation.inputs, equation.outputs, params, _texts(params), dtypes, several)


def _bound(equation: Equation, *inputs: Array) -> Any:
    given: Any = equation.primitive.get_bind_params(dict(equation.params))
    functions, params = ((), given) if hasattr(given, "keys") else given  # JAX 0.9 has functions
    return equation.primitive.bind(
        *functions, *(cast("Any", jnp).asarray(x) for x in inputs), **params
    )


def _run(jaxpr: Any, consts: Sequence[Array], arguments: Sequence[Array]) -> list[Array]:
    from jax.extend.core import Literal  # late: it imports Pallas, which takes its time

    values: dict[Any, Array] = {}
    values.update(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Array:
        if isinstance(atom, Literal):
            return np.asarray(atom.val, cast("Any", atom).aval.dtype)
        return values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        outputs = _apply(jaxpr, equation, inputs)
        for variable, value in zip(equation.outvars, outputs, strict=True):
            values[variable] = value
    return [read(atom) for atom in jaxpr.outvars]


def _apply(jaxpr: Any, equation: Any, inputs: list[Array]) -> list[Array]:
    name, parameters = equation.primitive.name, equation.params
    inner = parameters.get("jaxpr") or parameters.get("call_jaxpr")
    if name in CALLS and inner is not None:
        if hasattr(inner, "consts"):
            return _run(inner.jaxpr, inner.consts, inputs)
        return _run(inner, (), inputs)
    rule = _rule(name, parameters, equation.outvars[0].aval.dtype)
    if rule is None:
        return _by_jax(jaxpr, equation, inputs)
    result = rule(*inputs, *(parameters[key] for key in READ.get(name, ())))
    results = result if equation.primitive.multiple_results else [result]
    return [
        np.asarray(value, variable.aval.dtype)
        for value, variable in zip(results, equation.outvars, strict=True)
    ]


def _by_jax(jaxpr: Any, equation: Any, inputs: list[Array]) -> list[Array]:
    from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

    named = {
        variable: value
        for variable, value in zip(equation.invars, inputs, strict=True)
        if not isinstance(variable, Literal)
    }
    alone = jaxpr.replace(
        constvars=[],
        invars=list(named),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    run = cast("Rule", jaxpr_as_fun(ClosedJaxpr(alone, ())))
    results: list[Any] = run(*named.values())
    return [np.asarray(result) for result in results]


def _dim_as_value(dim: int) -> Array:
    return narrowed(np.asarray(dim), jax.dtypes.canonicalize_dtype(np.int64))


def _starts(x: Array, sizes: Sequence[int], at: Sequence[Array]) -> tuple[slice, ...]:
    """Makes the slices of a window that is moved to lie within the array, as JAX moves it."""
    lows = [min(max(int(i), 0), n - m) for i, n, m in zip(at, x.shape, sizes, strict=True)]
    return tuple(slice(low, low + size) for low, size in zip(lows, sizes, strict=True))


def _dynamic_slice(x: Array, *at_and_sizes: Any) -> Array:
    *at, sizes = at_and_sizes
    return x[_starts(x, sizes, at)]


def _dynamic_update_slice(x: Array, update: Array, *at: Array) -> Array:
    out = np.array(x)
    out[_starts(x, update.shape, at)] = update
    return out


def _put(out: Array, at: Any, updates: Array) -> None:
    out[at] = updates


def _puts_alone(params: Mapping[str, Any]) -> bool:
    """Tells whether a scatter puts its updates as they are, not what a function makes of them."""
    inner = params["update_jaxpr"]
    return inner is None or not getattr(inner, "jaxpr", inner).eqns


def _sort(*operands_and_params: Any) -> list[Array]:
    *operands, axis, keys = operands_and_params
    if len(operands) == 1:
        return [np.sort(operands[0], axis, kind="stable")]
    if keys == 1:
        order = np.argsort(operands[0], axis, kind="stable")
    else:
        order = np.lexsort(operands[keys - 1 :: -1], axis)
    return [np.take_along_axis(x, order, axis) for x in operands]


def _top_k(x: Array, count: int, axis: int) -> list[Array]:
    # JAX takes the first of equal numbers first, and NaN before all numbers.
    order = np.flip(np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    order = np.take(x.shape[axis] - 1 - order, range(count), axis)
    return [np.take_along_axis(x, order, axis), order]


def _round(x: Array, method: Any) -> Array:
    if int(method) == int(jax.lax.RoundingMethod.TO_NEAREST_EVEN):
        return np.rint(x)
    whole = np.trunc(x)
    return cast("Array", np.where(np.abs(x - whole) >= 0.5, whole + np.sign(x), whole))


def _by_jax_padded(function: Rule) -> Rule:
    """Makes a rule of an element-wise function of JAX, which compiles it for a few sizes."""

    def rule(x: Array) -> Array:
        padded = np.zeros(1 << max(x.size - 1, 127).bit_length(), x.dtype)
        padded[: x.size] = x.ravel()
        return np.asarray(function(padded))[: x.size].reshape(x.shape)

    return rule


def _stack(*pieces_and_axis: Any) -> Array:
    *pieces, axis = pieces_and_axis
    return np.stack(pieces, axis)


def _unstack(x: Array, axis: int) -> list[Array]:
    return list(np.moveaxis(x, axis, 0))


def _broadcast_in_dim(
    x: Array, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...]
) -> Array:
    kept = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions, strict=True):
        kept[axis] = size
    return np.broadcast_to(x.reshape(kept), shape)


_WHOLE = (0.0, 1.0, 2.0)
_MANY = 4096  # numbers, from which on a choice by bits is faster than np.where


def _choose(which: Array, no: Array, yes: Array) -> Array:
    """Chooses by bits or by arithmetic, exactly, in a fraction of the time of ``np.where``."""
    kind = {4: np.int32, 8: np.int64}.get(no.dtype.itemsize)
    if which.size < _MANY or kind is None or no.dtype != yes.dtype:
        return cast("Array", np.where(which, yes, no))
    if no.size == yes.size == 1 and no.dtype.kind == "f":
        low, high = no.item(), yes.item()
        # JAX's derivatives choose between 0, 1 and 2, of which sums are exact.
        if low in _WHOLE and high in _WHOLE and min(math.copysign(1, x) for x in (low, high)) > 0:
            out = which.astype(no.dtype)
            if high - low != 1:
                out *= high - low
            if low:
                out += low
            return out
    bits, others = no.view(kind), yes.view(kind)
    mask = np.negative(which.view(np.int8)).astype(kind)
    return (bits ^ ((bits ^ others) & mask)).view(no.dtype)


def _select_n(which: Array, *cases: Array) -> Array:
    if which.dtype == np.bool_:
        return _choose(which, *cases)
    chosen: Array = cases[0]
    for i, case in enumerate(cases[1:], start=1):
        chosen = cast("Array", np.where(which == i, case, chosen))
    return chosen


def _slice(
    x: Array,
    start_indices: tuple[int, ...],
    limit_indices: tuple[int, ...],
    strides: tuple[int, ...] | None,
) -> Array:
    steps = strides or (1,) * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _split(x: Array, sizes: tuple[int, ...], axis: int) -> list[Array]:
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _pad(x: Array, fill: Array, padding_config: tuple[tuple[int, int, int], ...]) -> Array:
    shape = [
        low + high + size + max(size - 1, 0) * between
        for size, (low, high, between) in zip(x.shape, padding_config, strict=True)
    ]
    room = [
        size + max(low, 0) + max(high, 0) - (low + high) if min(low, high) < 0 else size
        for size, (low, high, _) in zip(shape, padding_config, strict=True)
    ]
    out = np.full(room, fill, x.dtype)
    place = tuple(
        slice(max(low, 0), max(low, 0) + size + max(size - 1, 0) * between, between + 1)
        for size, (low, _, between) in zip(x.shape, padding_config, strict=True)
    )
    out[place] = x
    cut = tuple(
        slice(max(-low, 0), max(-low, 0) + size)
        for size, (low, _, _) in zip(shape, padding_config, strict=True)
    )
    return out[cut]


def _dot_general(a: Array, b: Array, dimension_numbers: Any) -> Array:
    (ca, cb), (ba, bb) = dimension_numbers
    letters = iter(range(a.ndim + b.ndim))
    la: list[Any] = [next(letters) for _ in range(a.ndim)]
    lb: list[Any] = [next(letters) for _ in range(b.ndim)]
    for i, j in [*zip(ca, cb, strict=True), *zip(ba, bb, strict=True)]:
        lb[j] = la[i]
    if a.ndim == b.ndim == 1 and ca:
        return np.dot(a, b)
    free_a = [la[i] for i in range(a.ndim) if i not in (*ca, *ba)]
    free_b = [lb[j] for j in range(b.ndim) if j not in (*cb, *bb)]
    return np.einsum(a, la, b, lb, [*(la[i] for i in ba), *free_a, *free_b])


def _integer_pow(x: Array, y: int) -> Array:
    return x**y if y >= 0 else 1 / x**-y


def _cumulative(accumulate: Rule) -> Rule:
    def rule(x: Array, axis: int, reverse: bool) -> Array:
        if reverse:
            return np.flip(accumulate(np.flip(x, axis), axis=axis), axis)
        return accumulate(x, axis=axis)

    return rule


def _first_axis(find: Rule) -> Rule:
    def rule(x: Array, axes: tuple[int, ...]) -> Array:
        return find(x, axes[0])

    return rule


def _concatenate(*pieces_and_axis: Any) -> Array:
    *pieces, axis = pieces_and_axis
    return np.concatenate(pieces, axis)


def _same(x: Array) -> Array:
    return x


def _all_the_same(*values: Array) -> tuple[Array, ...]:
    return values


def _clamp(low: Array, x: Array, high: Array) -> Array:
    return np.minimum(np.maximum(x, low), high)


def _div(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    below = a // b
    whole = below + ((a % b != 0) & ((a < 0) != (b < 0)))
    return cast("Array", np.where(b == 0, -1, whole))  # as XLA has it


def _rem(a: Array, b: Array) -> Array:
    return cast("Array", np.where((b == 0) & (a.dtype.kind != "f"), a, np.fmod(a, b)))


def _convert(x: Array, dtype: Any) -> Array:
    if x.dtype.kind == "f" and dtype.kind in "iu":  # NumPy leaves open what a large number becomes
        bounds = np.iinfo(dtype)
        inside = np.nan_to_num(np.clip(x, bounds.min, np.nextafter(x.dtype.type(bounds.max), 0)))
        whole = inside.astype(dtype)
        return cast("Array", np.where(x >= bounds.max, bounds.max, whole)).astype(dtype)
    return x


def _one_minus_square(x: Array) -> Array:
    """Computes ``1 - x**2`` as JAX 0.12 and newer do, exactly near 1 and -1."""
    return (1 + x) * (1 - x)


def _logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _rsqrt(x: Array) -> Array:
    return 1 / np.sqrt(x)


def _iota(shape: tuple[int, ...], axis: int) -> Array:
    return np.broadcast_to(np.indices(shape, sparse=True)[axis], shape)


_RULES: dict[str, Rule] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "argmax": _first_axis(np.argmax),
    "argmin": _first_axis(np.argmin),
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "broadcast_in_dim": _broadcast_in_dim,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "convert_element_type": _convert,
    "copy": _same,
    "copy_p": _same,
    "cos": np.cos,
    "cosh": np.cosh,
    "cumlogsumexp": _cumulative(np.logaddexp.accumulate),
    "cummax": _cumulative(np.maximum.accumulate),
    "cummin": _cumulative(np.minimum.accumulate),
    "cumprod": _cumulative(np.cumprod),
    "cumsum": _cumulative(np.cumsum),
    "div": _div,
    "digamma": _by_jax_padded(jax.lax.digamma),
    "dim_as_value": _dim_as_value,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "eq": np.equal,
    "erf": _by_jax_padded(jax.lax.erf),
    "erf_inv": _by_jax_padded(jax.lax.erf_inv),
    "erfc": _by_jax_padded(jax.lax.erfc),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "gather": indexing.gather,
    "ge": np.greater_equal,
    "gt": np.greater,
    "integer_pow": _integer_pow,
    "is_finite": np.isfinite,
    "iota": _iota,
    "le": np.less_equal,
    "lgamma": _by_jax_padded(jax.lax.lgamma),
    "log": np.log,
    "log1p": np.log1p,
    "logistic": _logistic,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "one_minus_square": _one_minus_square,
    "optimization_barrier": _all_the_same,
    "or": np.bitwise_or,
    "pad": _pad,
    "pow": np.power,
    "reduce_and": np.all,
    "reduce_max": np.max,
    "reduce_min": np.min,
    "reduce_or": np.any,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "rem": _rem,
    "reshape": np.reshape,
    "rev": np.flip,
    "rsqrt": _rsqrt,
    "round": _round,
    "scatter": indexing.scatter(_put),
    "scatter-add": indexing.scatter(np.add.at),
    "scatter-max": indexing.scatter(np.maximum.at),
    "scatter-min": indexing.scatter(np.minimum.at),
    "scatter-mul": indexing.scatter(np.multiply.at),
    "select_n": _select_n,
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "sqrt": np.sqrt,
    "square": np.square,
    "squeeze": np.squeeze,
    "stack": _stack,
    "stop_gradient": _same,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    "tile": np.tile,
    "top_k": _top_k,
    "transpose": np.transpose,
    "unstack": _unstack,
    "xor": np.bitwise_xor,
}

_COUNTING = frozenset(
    {
        *("abs", "add", "add_any", "cumprod", "cumsum", "div", "dot_general", "integer_pow", "mul"),
        *("neg", "reduce_prod", "reduce_sum", "scatter-add", "scatter-mul", "square", "sub"),
    }
)
"""Primitives whose results can be larger than their operands."""

_WRAPPING = (np.uint32, np.uint64, np.int64)
"""Integers that are not checked: of random bits, which wrap, and of all the bits that there are."""

READ: dict[str, tuple[str, ...]] = {
    "argmax": ("axes",),
    "argmin": ("axes",),
    "broadcast_in_dim": ("shape", "broadcast_dimensions"),
    "concatenate": ("dimension",),
    "convert_element_type": ("new_dtype",),
    "dim_as_value": ("dim",),
    "dot_general": ("dimension_numbers",),
    "dynamic_slice": ("slice_sizes",),
    "gather": ("slice_sizes", "dimension_numbers", "mode", "fill_value"),
    "integer_pow": ("y",),
    "iota": ("shape", "dimension"),
    "pad": ("padding_config",),
    "reshape": ("new_sizes",),
    "rev": ("dimensions",),
    "round": ("rounding_method",),
    "sort": ("dimension", "num_keys"),
    "stack": ("axis",),
    "slice": ("start_indices", "limit_indices", "strides"),
    "split": ("sizes", "axis"),
    "squeeze": ("dimensions",),
    "tile": ("reps",),
    "top_k": ("k", "axis"),
    "transpose": ("permutation",),
    "unstack": ("axis",),
    **{name: ("axes",) for name in _RULES if name.startswith("reduce_")},
    **{name: ("dimension_numbers", "mode") for name in _RULES if name.startswith("scatter")},
    **{name: ("axis", "reverse") for name in _RULES if name.startswith("cum")},
}
"""The parameters of an equation that its rule reads; the others choose among equal results."""
