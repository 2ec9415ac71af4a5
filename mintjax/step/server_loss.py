"""Writes a loss as the graph that a trainer runs by itself, after the SDK's ``create_custom_loss``.

Such a trainer takes the loss of one datum as a graph of ``torch.fx`` nodes, and adds it up over the
datums of a pass. What is written here is not the loss alone but its gradient, too, as JAX has it:
with ``v`` the loss and ``g`` its gradient by the logprobs ``x``, both computed of ``x.detach()``,
the graph returns ``v + sum((x - x.detach()) * g)``. Its value is ``v`` and its derivative is ``g``,
whatever rules of derivatives the trainer has: at ties, at the bounds of a clip, and where a
function has a derivative of its own, as with ``jax.custom_jvp``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import numpy as np
from jax import export

from mintjax.gradients.flat import Equation, Flat, flatten, is_symbolic
from mintjax.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode

Array: TypeAlias = Any
Kind: TypeAlias = "tuple[tuple[int, ...] | None, Any]"
"""Of a column: the shape of what stands at a token, None for one number per datum; its dtype."""

MAX_INPUTS = 16
METRIC = "custom/loss:sum"
"""The metric that holds the sum of the losses, whatever else a trainer reports."""

_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_LONGEST_SUM = 1 << 24  # up to here float32 counts


class NotLowered(Exception):
    """A function cannot be written as such a graph; the message says why."""


class ServerLoss(NamedTuple):
    """A loss that a trainer can run.

    Args:
        name: for people.
        inputs: ``logprobs``, and the columns under the names that they travel by.
        graph: of one datum's loss.
        columns: the columns' own names, in the order of ``inputs[1:]``.
    """

    name: str
    inputs: list[CustomLossInput]
    graph: CustomLossGraph
    columns: list[str]


def lower(
    loss: Callable[[Array, Mapping[str, Array]], tuple[Array, Mapping[str, Array]]],
    kinds: Mapping[str, Kind],
    candidates: tuple[int, ...],
    name: str,
) -> ServerLoss:
    """Writes the loss of one datum as a graph.

    Args:
        loss: a function of the logprobs of T tokens, ``[T]`` or ``[T, K]``, and of columns by name,
            that gives a scalar, and the metrics by the names that they have there, scalars too.
            JAX traces it, once for all T.
        kinds: of the columns that it may read.
        candidates: ``()``, or ``(K,)``.
        name: of the loss.

    Returns:
        The loss; only columns that its value depends on are among its inputs.

    Raises:
        NotLowered: an operation has no counterpart, or needs what one datum alone does not have.
        Exception: whatever the loss raises.
    """
    (tokens,) = export.symbolic_shape("n")
    names = sorted(kinds)

    def shaped(kind: Kind) -> Any:
        trailing, dtype = kind
        shape = () if trailing is None else (tokens, *trailing)
        return jax.ShapeDtypeStruct(shape, narrow(dtype))

    metrics: list[str] = []

    def value(logprobs: Array, columns: Mapping[str, Array]) -> tuple[Array, list[Array]]:
        found, reported = loss(logprobs, columns)
        metrics[:] = reported
        return found, jax.lax.stop_gradient(list(reported.values()))

    make = cast("Any", jax.make_jaxpr(jax.value_and_grad(value, has_aux=True)))
    logprobs = jax.ShapeDtypeStruct((tokens, *candidates), np.float32)
    flat = flatten(make(logprobs, {name: shaped(kinds[name]) for name in names}))
    return _Writer(flat, names, kinds, candidates).write(name, metrics)


def narrow(dtype: Any) -> Any:
    """Finds the dtype in which JAX has numbers of this one on a trainer: of 32 bits."""
    kind = np.dtype(dtype).kind
    return np.dtype({"f": np.float32, "i": np.int32, "u": np.int32}.get(kind, dtype))


# Values in the graph


class _Value(NamedTuple):
    """A value of the jaxpr in the graph.

    Args:
        at: the node that has it, or a number.
        axes: the axes of the value in the jaxpr that the tensor has, in order. Along the others it
            is the same everywhere.
    """

    at: str | bool | int | float
    axes: tuple[int, ...] = ()

    @property
    def is_number(self) -> bool:
        return not isinstance(self.at, str)


class _Writer:
    def __init__(
        self,
        flat: Flat,
        names: Sequence[str],
        kinds: Mapping[str, Kind],
        candidates: tuple[int, ...],
    ) -> None:
        self._flat = flat
        self._names = names
        self._kinds = kinds
        self._candidates = candidates
        self._nodes: list[CustomLossNode] = []
        self._values: dict[int, _Value] = {}
        self._tokens: _Value | None = None
        self._whole: set[int] = set()  # slots of integers that came in columns

    def write(self, name: str, metrics: Sequence[str]) -> ServerLoss:
        flat = self._flat
        used = {slot for equation in flat.equations for slot in equation.inputs} | {*flat.outputs}
        slots = dict(zip(self._names, flat.inputs[1:], strict=True))
        read = [column for column in self._names if slots[column] in used]
        travels = travelling_names(read)
        if len(read) >= MAX_INPUTS:
            raise NotLowered(f"it reads {len(read)} columns, where {MAX_INPUTS - 1} are possible")
        inputs = [CustomLossInput("logprobs", cast("Any", 1 + len(self._candidates)))]
        self._node("placeholder", "logprobs", "logprobs")
        for column in read:
            trailing, dtype = self._kinds[column]
            rank = 0 if trailing is None else 1 + len(trailing)
            if rank > 2:
                raise NotLowered(f"the column {column!r} has {rank} axes, where 2 are possible")
            travelling = travels[column]
            inputs.append(CustomLossInput(travelling, cast("Any", rank)))
            self._node("placeholder", travelling, travelling)
            at = travelling
            if np.dtype(dtype).kind == "b":  # travels as integers
                at = self._call("operator.ne", _ref(at), 0)
            self._values[slots[column]] = _Value(at, tuple(range(rank)))
            if np.dtype(dtype).kind in "iu":
                self._whole.add(slots[column])
        own = self._method("detach", "logprobs")
        self._values[flat.inputs[0]] = _Value(own, tuple(range(1 + len(self._candidates))))
        for slot, constant in flat.constants.items():
            if np.size(constant) != 1:
                raise NotLowered(f"it holds an array of {np.size(constant)} numbers of its own")
            self._values[slot] = _Value(_checked(np.asarray(constant).reshape(()).item()))
        for equation in flat.equations:
            self._equation(equation)
        loss, *reported, gradient = (self._values[slot] for slot in flat.outputs)
        value = self._tensor(loss, own)
        moved = self._call("operator.sub", _ref("logprobs"), _ref(own))
        slope = self._aligned(gradient, self._shape(flat.inputs[0]))
        pulled = self._call("operator.mul", _ref(moved), slope)
        if not gradient.is_number:  # a logprob of -inf has a gradient of 0, and is not to be seen
            nothing = self._call("operator.eq", slope, 0.0)
            pulled = self._call("torch.where", _ref(nothing), 0.0, _ref(pulled))
        pulled = self._call("torch.sum", _ref(pulled))
        result = self._call("operator.add", _ref(value), _ref(pulled))
        named = zip(metrics, reported, strict=True)
        numbers = {key: _ref(self._tensor(metric, own)) for key, metric in named}
        returned = {"tuple": [_ref(result), {"dict": {METRIC: _ref(value), **numbers}}]}
        self._nodes.append(CustomLossNode("output", "output", "output", [returned]))
        return ServerLoss(name, inputs, CustomLossGraph(self._nodes), read)

    # Nodes

    def _node(self, op: str, name: str, target: str, *args: Any, **kwargs: Any) -> str:
        self._nodes.append(CustomLossNode(op, name, target, list(args), kwargs))
        return name

    def _call(self, target: str, *args: Any, **kwargs: Any) -> str:
        return self._node("call_function", f"n{len(self._nodes)}", target, *args, **kwargs)

    def _method(self, target: str, of: str, *args: Any) -> str:
        return self._node("call_method", f"n{len(self._nodes)}", target, _ref(of), *args)

    def _tensor(self, value: _Value, like: str) -> str:
        """Gives a value as a tensor, because a loss and a metric have to be tensors."""
        if isinstance(value.at, str):
            return value.at
        zero = self._call("torch.sum", _ref(self._call("torch.zeros_like", _ref(like))))
        return self._call("operator.add", _ref(zero), _argument(value))

    def _shape(self, slot: int) -> tuple[Any, ...]:
        return self._flat.avals[slot].shape

    def _size(self, size: Any) -> _Value:
        """Gives a size of the jaxpr: a number, or T, which the graph counts."""
        if not is_symbolic(size):
            return _Value(int(size))
        if str(size) != "n":
            raise NotLowered(f"it needs an array of {size} tokens, where the datum has n")
        if self._tokens is None:
            ones = self._call("torch.sum", _ref(self._call("torch.ones_like", _ref("logprobs"))))
            count = math.prod(self._candidates)
            self._tokens = _Value(
                ones if count == 1 else self._call("operator.truediv", _ref(ones), float(count))
            )
        return self._tokens

    def _aligned(self, value: _Value, axes: Sequence[Any]) -> Any:
        """Makes an argument broadcast against a tensor which has these axes."""
        if value.is_number:
            return _argument(value)
        return self._inserted(value, tuple(range(len(axes))))

    def _inserted(self, value: _Value, axes: tuple[int, ...]) -> Any:
        at = cast("str", value.at)
        if value.axes:
            later = [axis for axis in axes if axis > value.axes[0]]
            for axis in later:
                if axis not in value.axes:
                    place = len([other for other in axes if value.axes[0] <= other < axis])
                    at = self._call("torch.unsqueeze", _ref(at), place)
        return _ref(at)

    # Equations

    def _equation(self, equation: Equation) -> None:
        name = equation.name
        slot = equation.outputs[0]
        given = [self._values[i] for i in equation.inputs]
        aval = self._flat.avals[slot]
        self._check_dtypes(equation)
        if name in _SAME:
            for out, value in zip(equation.outputs, given, strict=True):
                self._values[out] = value
        elif name in RESHAPING:
            self._values[slot] = self._reshaped(equation, given[0])
        elif name in _REDUCING:
            self._values[slot] = self._reduced(equation, given[0])
        elif name == "dim_as_value":
            self._values[slot] = self._size(equation.params["dim"])
        elif name == "convert_element_type":
            self._values[slot] = self._converted(given[0], equation)
        elif name in POINTWISE:
            if all(value.is_number for value in given):
                self._values[slot] = _Value(_computed(equation, given, aval.dtype))
            else:
                axes = tuple(sorted({axis for value in given for axis in value.axes}))
                args = [
                    _argument(value) if value.is_number else self._inserted(value, axes)
                    for value in given
                ]
                self._values[slot] = _Value(self._pointwise(equation, given, args), axes)
        else:
            raise NotLowered(f"it uses {name}, which has no counterpart")

    def _check_dtypes(self, equation: Equation) -> None:
        """Refuses numbers of 64 bits, and arithmetic of integers, which wrap at other places."""
        for slot in (*equation.inputs, *equation.outputs):
            dtype = self._flat.avals[slot].dtype
            if dtype not in (np.float32, np.int32, np.bool_) and dtype.name != "float0":
                weak = getattr(self._flat.avals[slot], "weak_type", False)
                if not weak:
                    raise NotLowered(f"it computes in {dtype.name}")
        if self._whole.intersection(equation.inputs):
            output = equation.outputs[0]
            if equation.name in (*_SAME, *RESHAPING, "select_n"):
                self._whole.add(output)
            elif equation.name not in (*_COMPARING, "convert_element_type"):
                raise NotLowered("it computes with integers of a column")

    def _pointwise(self, equation: Equation, given: Sequence[_Value], args: list[Any]) -> str:
        name = equation.name
        dtype = self._flat.avals[equation.inputs[0]].dtype
        if name in _LOGICAL and dtype != np.bool_:
            raise NotLowered(f"it uses {name} of integers")
        if name in ("and", "or", "xor") and any(value.is_number for value in given):
            return self._logical(name, given, args)
        if name in ("max", "min"):
            if dtype == np.bool_:
                return self._call(f"torch.logical_{'or' if name == 'max' else 'and'}", *args)
            numbers = [i for i, value in enumerate(given) if value.is_number]
            if numbers:
                bound = {name.replace("max", "lower").replace("min", "upper"): args[numbers[0]]}
                return self._clamped(args[1 - numbers[0]], **bound)
            return self._call(f"torch.{name}imum", *args)
        if name == "clamp":
            low, value, high = given
            if value.is_number:
                raise NotLowered("it clamps a number")
            at = args[1]
            for bound, number, which in ((args[0], low, "lower"), (args[2], high, "upper")):
                if number.is_number:
                    at = _ref(self._clamped(at, **{which: bound}))
                else:
                    function = "torch.maximum" if which == "lower" else "torch.minimum"
                    at = _ref(self._call(function, at, bound))
            return at["ref"]
        if name == "select_n":
            if dtype != np.bool_ or len(given) != 3:
                raise NotLowered("it selects by a number")
            if given[0].is_number:
                chosen = 2 if given[0].at else 1
                one = given[chosen]
                return self._filled(one, args, chosen)
            return self._call("torch.where", args[0], args[2], args[1])
        if name == "integer_pow":
            return self._call("torch.pow", args[0], equation.params["y"])
        if name == "square":
            return self._call("operator.mul", args[0], args[0])
        if name == "div" and not np.issubdtype(dtype, np.floating):
            raise NotLowered("it divides integers")
        if name == "pow" and given[0].is_number:
            return self._call("torch.pow", *args)
        if name == "one_minus_square":  # of JAX 0.12 and newer; so it is exact near 1 and -1
            sides = [self._call(f"operator.{sign}", 1.0, args[0]) for sign in ("sub", "add")]
            return self._call("operator.mul", *map(_ref, sides))
        if name == "exp2":
            return self._call("torch.pow", 2.0, args[0])
        return self._call(POINTWISE[name], *args)

    def _filled(self, one: _Value, args: list[Any], chosen: int) -> str:
        if not one.is_number:
            return args[chosen]["ref"]
        zeros = self._call("torch.zeros_like", args[3 - chosen])
        return self._call("operator.add", _ref(zeros), args[chosen])

    def _clamped(self, at: Any, *, lower: Any = None, upper: Any = None) -> str:
        kwargs = {"min": lower} if upper is None else {"max": upper}
        return self._call("torch.clamp", at, **kwargs)

    def _logical(self, name: str, given: Sequence[_Value], args: list[Any]) -> str:
        number, other = (0, 1) if given[0].is_number else (1, 0)
        fixed, at = bool(given[number].at), args[other]["ref"]
        if (name == "and" and fixed) or (name in ("or", "xor") and not fixed):
            return at
        if name == "xor":
            return self._call("torch.logical_not", _ref(at))
        never = self._call("torch.logical_and", _ref(at), _ref(self._negated(at)))
        return never if name == "and" else self._negated(never)

    def _negated(self, at: str) -> str:
        return self._call("torch.logical_not", _ref(at))

    def _converted(self, value: _Value, equation: Equation) -> _Value:
        new = np.dtype(equation.params["new_dtype"])
        old = self._flat.avals[equation.inputs[0]].dtype
        if value.is_number:
            return _Value(_checked(np.asarray(value.at).astype(new).item()))
        if new == np.bool_:
            if old == np.bool_:
                return value
            return _Value(self._call("operator.ne", _ref(cast("str", value.at)), 0), value.axes)
        if new.kind == "i" and old.kind == "f":
            raise NotLowered("it makes integers of floats")
        if old.kind == new.kind and equation.inputs[0] not in self._whole:
            return value
        if new.kind == "i" and equation.inputs[0] in self._whole:
            self._whole.add(equation.outputs[0])
            return value
        # Integers that are counts are floats in the graph, exact up to 2**24.
        if old.kind == "i" and equation.inputs[0] not in self._whole:
            return value
        return _Value(self._method("to", cast("str", value.at), {"dtype": "float32"}), value.axes)

    def _reshaped(self, equation: Equation, value: _Value) -> _Value:
        before = self._shape(equation.inputs[0])
        after = self._shape(equation.outputs[0])
        if equation.name == "broadcast_in_dim":
            targets: Sequence[int] = equation.params["broadcast_dimensions"]
            moves = dict(enumerate(targets))
        else:
            moves = _moved(before, after)
        if value.is_number:
            return value
        at, axes = cast("str", value.at), list(value.axes)
        for axis in value.axes:
            if axis not in moves:  # of size 1
                at = self._call("torch.squeeze", _ref(at), axes.index(axis))
                axes.remove(axis)
        return _Value(at, tuple(moves[axis] for axis in axes))

    def _reduced(self, equation: Equation, value: _Value) -> _Value:
        name = equation.name
        axes: Sequence[int] = equation.params["axes"]
        shape = self._shape(equation.inputs[0])
        here = [value.axes.index(axis) for axis in axes if axis in value.axes]
        absent = [shape[axis] for axis in axes if axis not in value.axes]
        if name == "reduce_prod":
            raise NotLowered("it uses reduce_prod, which has no counterpart")
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        left = tuple(kept.index(axis) for axis in value.axes if axis not in axes)
        result = value
        if here:
            at = _ref(cast("str", value.at))
            function = _REDUCING[name]
            if name in ("reduce_and", "reduce_or") and len(here) > 1:
                raise NotLowered(f"it uses {name} of several axes")
            dim: Any = here if name in ("reduce_sum", "reduce_max", "reduce_min") else here[0]
            result = _Value(self._call(function, at, dim))
        if name == "reduce_sum":
            for size in absent:
                result = self._multiplied(result, self._size(size))
        return result._replace(axes=left if not result.is_number else ())

    def _multiplied(self, value: _Value, factor: _Value) -> _Value:
        if factor.is_number and factor.at == 1:
            return value
        if value.is_number and factor.is_number:
            return _Value(_checked(float(value.at) * float(factor.at)))
        if value.is_number and value.at == 1:
            return factor
        made = self._call("operator.mul", *(map(_argument, (value, factor))))
        return _Value(made, value.axes)


def travelling_names(columns: Sequence[str]) -> dict[str, str]:
    """Names columns as the graph's inputs may be called.

    ``logprobs`` are those of the targets there, so the sampling policy's, which trainers' own
    losses read under that name, travel as ``sampling_logprobs``.

    Args:
        columns: their own names.

    Returns:
        By each name, the one under which it travels; all differ.
    """
    own = {name for name in columns if _NAME.fullmatch(name) and name != "logprobs"}
    taken, found = set(own), {name: name for name in own}
    for name in columns:
        if name in own:
            continue
        wish = "sampling_logprobs" if name == "logprobs" else "column"
        number = 0
        while (made := wish if not number else f"{wish}_{number}") in taken:
            number += 1
        taken.add(made)
        found[name] = made
    return found


def _moved(before: Sequence[Any], after: Sequence[Any]) -> dict[int, int]:
    """Finds where the axes of an array stand after axes of size 1 were added or dropped.

    Raises:
        NotLowered: it was reshaped otherwise.
    """
    old = [i for i, size in enumerate(before) if is_symbolic(size) or size != 1]
    new = [i for i, size in enumerate(after) if is_symbolic(size) or size != 1]
    if [str(before[i]) for i in old] != [str(after[i]) for i in new]:
        raise NotLowered("it reshapes an array")
    return dict(zip(old, new, strict=True))


def _ref(name: str) -> dict[str, str]:
    return {"ref": name}


def _argument(value: _Value) -> Any:
    if isinstance(value.at, str):
        return _ref(value.at)
    if isinstance(value.at, float) and not math.isfinite(value.at):
        return {"float": str(value.at)}
    return value.at


def _checked(number: Any) -> bool | int | float:
    if isinstance(number, bool | int | float):
        return number
    raise NotLowered(f"it holds a number of type {type(number).__name__}")


def _computed(equation: Equation, given: Sequence[_Value], dtype: Any) -> bool | int | float:
    """Computes an operation on numbers alone."""
    arrays = [jax.numpy.asarray(value.at) for value in given]
    if equation.name == "select_n":
        return given[1 + int(given[0].at)].at  # pyright: ignore[reportReturnType]
    with jax.ensure_compile_time_eval():
        made = equation.primitive.bind(*arrays, **equation.params)
    return _checked(np.asarray(made).astype(dtype).item())


_SAME = frozenset({"stop_gradient", "copy", "copy_p", "optimization_barrier"})
RESHAPING = frozenset({"broadcast_in_dim", "reshape", "squeeze", "expand_dims"})
_REDUCING = {
    "reduce_sum": "torch.sum",
    "reduce_max": "torch.amax",
    "reduce_min": "torch.amin",
    "reduce_and": "torch.all",
    "reduce_or": "torch.any",
    "reduce_prod": "",
}
_COMPARING = {
    "eq": "operator.eq",
    "ne": "operator.ne",
    "lt": "operator.lt",
    "le": "operator.le",
    "gt": "operator.gt",
    "ge": "operator.ge",
}
_LOGICAL = {
    "and": "torch.logical_and",
    "or": "torch.logical_or",
    "xor": "torch.logical_xor",
    "not": "torch.logical_not",
}
POINTWISE: dict[str, str] = {
    **_COMPARING,
    **_LOGICAL,
    "abs": "torch.abs",
    "add": "operator.add",
    "add_any": "operator.add",
    "ceil": "torch.ceil",
    "clamp": "torch.clamp",
    "convert_element_type": "to",
    "copy": "",
    "cos": "torch.cos",
    "div": "operator.truediv",
    "exp": "torch.exp",
    "exp2": "torch.pow",
    "expm1": "torch.expm1",
    "floor": "torch.floor",
    "integer_pow": "torch.pow",
    "is_finite": "torch.isfinite",
    "log": "torch.log",
    "log1p": "torch.log1p",
    "logistic": "torch.sigmoid",
    "max": "torch.maximum",
    "min": "torch.minimum",
    "mul": "operator.mul",
    "neg": "operator.neg",
    "one_minus_square": "operator.mul",
    "pow": "torch.pow",
    "rsqrt": "torch.rsqrt",
    "select_n": "torch.where",
    "sign": "torch.sign",
    "sin": "torch.sin",
    "sqrt": "torch.sqrt",
    "square": "operator.mul",
    "stop_gradient": "",
    "sub": "operator.sub",
    "tanh": "torch.tanh",
}
"""The primitives that treat each number by itself, and the function of torch for each."""
