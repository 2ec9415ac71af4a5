"""Losses that clients have uploaded as graphs of ``torch.fx``, read and evaluated without torch.

A graph is anybody's input. It is plain data: each node names an operation of :data:`FUNCTIONS` or
:data:`METHODS`, and nothing else is ever called. The graph is traced by JAX once for all lengths,
with its gradient, and evaluated with NumPy datum by datum. Sizes are computed before arrays are
made, so that a graph cannot make the trainer hold more than its limits say.
"""

from __future__ import annotations

import collections
import inspect
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import export

from mintjax.errors import DataError, MintjaxError
from mintjax.gradients.flat import Flat, flatten, size_of
from mintjax.gradients.interpreted import Step, Unsupported, step_of
from mintjax.local.jax_settings import own_settings
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode

Array: TypeAlias = Any

_python: Any = operator
_numpy: Any = jnp

MAX_INPUTS = 16
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_INFINITE = ("inf", "-inf", "nan")
_DEEPEST = 8  # lists within lists
_LARGEST_PRODUCT = 16  # larger exponents are no products


class DatumLoss(NamedTuple):
    """The loss of one datum.

    Args:
        loss: its value.
        metrics: by name.
        gradient: of the value by the logprobs, in their shape.
    """

    loss: float
    metrics: dict[str, float]
    gradient: npt.NDArray[np.float32]


class CustomLoss:
    """A loss that a client has uploaded.

    Args:
        name: the client's, for messages.
        inputs: the parameters of the graph, in order.
        graph: of the loss.
        limits: on what the graph may make the trainer hold.

    Raises:
        DataError: it is none, or does what is not served; the message names the node.
        BadRequestError: it has more nodes than may be.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[CustomLossInput],
        graph: CustomLossGraph,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.name = name
        self.inputs = list(inputs)
        self._graph = graph
        self._limits = limits
        _check_inputs(self.inputs)
        limits.check("max_loss_nodes", len(graph.nodes), f"the graph has {len(graph.nodes)} nodes")
        self._parameters = _check_nodes(graph.nodes, self.inputs)
        self._steps: list[Step] | None = None

    @property
    def columns(self) -> list[CustomLossInput]:
        """The columns that it reads."""
        return self.inputs[1:]

    def trace(self) -> None:
        """Traces value and gradient for all lengths.

        Raises:
            DataError: shapes do not fit, or an operation cannot be served for all lengths; the
                message names the node.
        """
        if self._steps is not None:
            return
        with own_settings():
            tokens, candidates = export.symbolic_shape("n, k")
            shapes = [(), (tokens,), (tokens, candidates)]
            # A column's integers are those of the wire, of which JAX has 32 bits here.
            given = [jax.ShapeDtypeStruct(shapes[one.rank], np.float32) for one in self.inputs]
            make = cast("Any", jax.make_jaxpr(self._gradient, return_shape=True))
            try:
                closed, shape = make(*given)
                flat = flatten(closed)
                steps = [step_of(flat, equation) for equation in flat.equations]
            except MintjaxError:
                raise
            except Unsupported as error:
                raise DataError(
                    f"loss {self.name!r} needs {error} of arrays whose size changes from datum to "
                    "datum, which this trainer has not"
                ) from None
            except Exception as error:
                raise _refusal(self.name, error) from None
        self._flat = flat
        self._tree = cast("Any", jax.tree_util.tree_structure(shape))
        self._sizes = _sizes(flat)
        self._frees = _frees(flat)
        self._steps = steps

    def check_sizes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Checks that the evaluation of datums is within the limits.

        Args:
            shapes: of the logprobs of each.

        Raises:
            BadRequestError: it is not.
        """
        self.trace()
        work = 0
        for shape, datums in collections.Counter(shapes).items():
            known = _known(shape)
            for sizes, arrays in self._sizes.items():
                numbers = math.prod(size_of(size, known) for size in sizes)
                self._limits.check(
                    "max_targets", numbers, f"an array of loss {self.name!r} has {numbers} numbers"
                )
                work += numbers * arrays * datums
        self._limits.check(
            "max_targets",
            work / self._limits.max_loss_nodes,
            f"loss {self.name!r} computes {work} numbers, {self._limits.max_loss_nodes} a target",
        )

    def evaluate(self, logprobs: Array, columns: Sequence[Array]) -> DatumLoss:
        """Computes loss, metrics and gradient of one datum.

        Args:
            logprobs: ``[T]`` or ``[T, K]``.
            columns: in the order of :attr:`columns`.
        """
        self.trace()
        given = [np.asarray(one, np.float32) for one in (logprobs, *columns)]
        outputs = self._run(given, _known(given[0].shape))
        (loss, metrics), gradient = jax.tree_util.tree_unflatten(self._tree, outputs)
        return DatumLoss(
            float(loss), {name: float(value) for name, value in metrics.items()}, gradient
        )

    def _run(self, given: Sequence[Array], sizes: dict[str, int]) -> list[Array]:
        steps = cast("list[Step]", self._steps)
        known = {text: size_of(text, sizes) for text in {t for step in steps for t in step.texts}}
        values: dict[int, Array] = dict(self._flat.constants)
        values.update(zip(self._flat.inputs, given, strict=True))
        with np.errstate(all="ignore"):
            for step, unused in zip(steps, self._frees, strict=True):
                found = step.compute([values[slot] for slot in step.inputs], known)
                values.update(zip(step.outputs, found, strict=True))
                for slot in unused:
                    values.pop(slot, None)
        return [values[slot] for slot in self._flat.outputs]

    def _gradient(self, logprobs: Array, *columns: Array) -> Any:
        def value(logprobs: Array) -> Any:
            return _interpret(self._graph.nodes, [logprobs, *columns], self.name)

        return jax.value_and_grad(value, has_aux=True)(logprobs)


def _known(shape: Sequence[int]) -> dict[str, int]:
    return {"n": shape[0], "k": shape[1] if len(shape) > 1 else 1}


def _sizes(flat: Flat) -> collections.Counter[tuple[str, ...]]:
    """Counts the shapes of all that is computed, as texts of sizes."""
    slots = {slot for equation in flat.equations for slot in equation.outputs}
    return collections.Counter(tuple(map(str, flat.avals[slot].shape)) for slot in slots)


def _frees(flat: Flat) -> list[list[int]]:
    """Lists, for each equation, the slots that none reads after it."""
    seen = {*flat.outputs, *flat.constants}
    frees: list[list[int]] = []
    for equation in reversed(flat.equations):
        used = {*equation.inputs, *equation.outputs} - seen
        seen |= used
        frees.append(list(used))
    return frees[::-1]


def _refusal(name: str, error: Exception) -> DataError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"loss {name!r} cannot be evaluated: {first[:300]}")


# Checks


def _check_inputs(inputs: Sequence[CustomLossInput]) -> None:
    names = [one.name for one in inputs]
    if not names or names[0] != "logprobs" or inputs[0].rank == 0:
        raise DataError("the first input is logprobs, of rank 1 or 2", field="inputs")
    if len(names) > MAX_INPUTS:
        raise DataError(f"{len(names)} inputs, where {MAX_INPUTS} may be", field="inputs")
    for name in names:
        if not _NAME.fullmatch(name):
            raise DataError(
                f"{name[:80]!r} is no lowercase name of letters, digits and _", field="inputs"
            )
    if len(set(names)) < len(names):
        raise DataError("two inputs have one name", field="inputs")


def _check_nodes(nodes: Sequence[CustomLossNode], inputs: Sequence[CustomLossInput]) -> list[str]:
    """Checks everything that can be known without running a node.

    Returns:
        The names of the placeholders.
    """
    known: set[str] = set()
    parameters: list[str] = []
    for i, node in enumerate(nodes):
        where = f"graph.nodes[{i}]"
        if node.name in known:
            raise DataError(f"a second node is named {node.name[:80]!r}", field=where)
        if node.op == "placeholder":
            if node.args or node.kwargs:
                raise DataError("a parameter has no default here", field=where)
            parameters.append(node.target)
        elif node.op == "call_function" and node.target in FUNCTIONS:
            _check_call(FUNCTIONS[node.target], node, where)
        elif node.op == "call_method" and node.target in METHODS:
            _check_call(METHODS[node.target], node, where)
        elif node.op in ("call_function", "call_method"):
            raise DataError(
                f"{node.op} of {node.target[:80]!r} is not served; {', '.join(sorted(FUNCTIONS))} "
                f"are, and of tensors the methods {', '.join(sorted(METHODS))}",
                field=where,
            )
        elif node.op == "output":
            if i != len(nodes) - 1:
                raise DataError("the output is the last node", field=where)
            _check_output(node, where)
        else:
            raise DataError(f"a node of kind {node.op[:80]!r} is not served", field=where)
        for argument in (*node.args, *node.kwargs.values()):
            _check_argument(argument, known, where, _DEEPEST)
        known.add(node.name)
    if not nodes or nodes[-1].op != "output":
        raise DataError("the last node is not the output", field="graph.nodes")
    if parameters != [one.name for one in inputs]:
        raise DataError("the placeholders are not the inputs, in their order", field="graph.nodes")
    return parameters


def _check_call(function: Callable[..., Any], node: CustomLossNode, where: str) -> None:
    try:
        inspect.signature(function).bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise DataError(f"{node.target}: {error}", field=where) from None


def _check_output(node: CustomLossNode, where: str) -> None:
    returned = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    pair = _items(returned)
    second = cast("dict[str, Any]", pair[1]) if len(pair) == 2 and _is_object(pair[1]) else {}
    metrics: Any = second.get("dict")
    if not _is_object(metrics) or not _is_reference(pair[0]):
        raise DataError("the output is a loss and a dict of metrics", field=where)
    for key, value in metrics.items():
        if not _METRIC.fullmatch(key):
            raise DataError(
                f"the metric {key[:100]!r} is not named custom/<name>:sum or custom/<name>:mean",
                field=where,
            )
        if not _is_reference(value):
            raise DataError(f"the metric {key!r} is no node", field=where)


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value).get("tuple")
    return cast("list[Any]", value) if isinstance(value, list) else []


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and set(cast("dict[str, Any]", value)) == {"ref"}


def _check_argument(value: Any, known: set[str], where: str, depth: int) -> None:
    if value is None or isinstance(value, bool | int | float | str):
        return
    if depth == 0:
        raise DataError("an argument is a list within lists within lists", field=where)
    if isinstance(value, list):
        for item in cast("list[Any]", value):
            _check_argument(item, known, where, depth - 1)
        return
    one = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if len(one) != 1:
        raise DataError("an argument is no number, text, list, or object of one key", field=where)
    ((key, held),) = one.items()
    if key == "ref":
        if not isinstance(held, str) or held not in known:
            raise DataError(
                f"it refers to {str(held)[:80]!r}, which no node before is", field=where
            )
    elif key in ("tuple", "slice") and isinstance(held, list):
        if key == "slice" and len(cast("list[Any]", held)) != 3:
            raise DataError("a slice has three parts", field=where)
        _check_argument(held, known, where, depth - 1)
    elif key == "dict" and isinstance(held, dict):
        for item in cast("dict[str, Any]", held).values():
            _check_argument(item, known, where, depth - 1)
    elif not (
        (key == "ellipsis" and held is True)
        or (key == "float" and isinstance(held, str) and held in _INFINITE)
        or (key == "dtype" and isinstance(held, str) and held in _DTYPES)
    ):
        raise DataError(f"an argument of kind {key[:80]!r} is not served", field=where)


# Evaluation


class _Dtype(NamedTuple):
    name: str


def _interpret(nodes: Sequence[CustomLossNode], given: Sequence[Array], name: str) -> Any:
    """Evaluates a graph that was checked, and gives the loss and its metrics."""
    values: dict[str, Any] = {}
    parameters = iter(given)

    def read(argument: Any) -> Any:
        if isinstance(argument, list):
            return [read(item) for item in cast("list[Any]", argument)]
        if not isinstance(argument, dict):
            return argument
        ((key, held),) = cast("dict[str, Any]", argument).items()
        match key:
            case "ref":
                return values[held]
            case "tuple":
                return tuple(map(read, held))
            case "dict":
                return {name: read(item) for name, item in held.items()}
            case "slice":
                return slice(*map(read, held))
            case "ellipsis":
                return ...
            case "float":
                return float(held)
            case _:
                return _Dtype(held)

    for i, node in enumerate(nodes):
        if node.op == "placeholder":
            values[node.name] = next(parameters)
            continue
        if node.op == "output":
            break
        table = FUNCTIONS if node.op == "call_function" else METHODS
        try:
            values[node.name] = table[node.target](
                *map(read, node.args), **{key: read(value) for key, value in node.kwargs.items()}
            )
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"loss {name!r}: {node.target} cannot be evaluated: {first[:300]}",
                field=f"graph.nodes[{i}]",
            ) from None
    result: tuple[Any, dict[str, Any]] = read(nodes[-1].args[0])
    loss, metrics = result
    for what, value in {"the loss": loss, **metrics}.items():
        shape: Any = np.shape(value)
        if shape != () or type(value) is tuple:
            raise DataError(f"loss {name!r}: {what} has shape {shape}, where () is due")
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise DataError(f"loss {name!r}: the loss is no float")
    metrics = {key: jax.lax.stop_gradient(jnp.asarray(value)) for key, value in metrics.items()}
    return jnp.asarray(loss), metrics


def _array(value: Any) -> Array:
    """Takes an operand, which is an array or a number."""
    if isinstance(value, bool | int | float):
        return value
    if type(value) in (str, list, tuple, dict, slice, _Dtype, type(None)):
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
    if not isinstance(dtype, _Dtype):
        raise TypeError("a conversion to a dtype is served")
    return _tensor(input).astype(_DTYPES[dtype.name])


def _as_float(input: Any) -> Array:
    return _tensor(input).astype(jnp.float32)


def _as_bool(input: Any) -> Array:
    return _tensor(input).astype(bool)


_DTYPES: dict[str, Any] = {"float32": jnp.float32, "bool": jnp.bool_, "int64": jnp.int32}

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
