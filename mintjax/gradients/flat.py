"""One list of equations for a jaxpr and all that it calls."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from jax import export

Array: TypeAlias = Any
Slot: TypeAlias = int

CALLS = frozenset(
    {
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "checkpoint",
        "remat2",
    }
)
"""Primitives that evaluate a jaxpr in their parameters and do nothing else, once differentiated."""


class Equation(NamedTuple):
    """One operation.

    Args:
        primitive: JAX's.
        params: its parameters; sizes among them may be symbolic.
        inputs: the slots that it reads.
        outputs: the slots that it writes.
        calls: the calls that led to it, the last first; JAX's ``Traceback``, if it has one.
    """

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    calls: Any = None

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.primitive.name


class Flat(NamedTuple):
    """A program of equations over numbered slots, each written once.

    Args:
        equations: in an order in which they can run.
        inputs: the slots of the arguments.
        outputs: the slots of the results.
        constants: values that no argument changes, by slot.
        avals: the shape and dtype of each slot; a ``ShapedArray`` of JAX.
    """

    equations: list[Equation]
    inputs: list[Slot]
    outputs: list[Slot]
    constants: dict[Slot, Array]
    avals: list[Any]


def flatten(closed: Any) -> Flat:
    """Inlines all calls of a closed jaxpr, merges equal operations, and drops what no output needs.

    The jaxpr must be differentiated already, because rules of derivatives are lost.
    """
    maker = _Maker()
    inputs = [maker.slot(variable.aval) for variable in closed.jaxpr.invars]
    outputs = maker.inline(closed.jaxpr, closed.consts, inputs)
    needed = set(outputs)
    kept: list[Equation] = []
    for equation in reversed(maker.equations):
        if needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.inputs)
    kept.reverse()
    constants = {slot: value for slot, value in maker.constants.items() if slot in needed}
    return Flat(kept, inputs, outputs, constants, maker.avals)


class _Maker:
    def __init__(self) -> None:
        from jax.extend.core import Literal  # late: it imports Pallas, which takes its time

        self._literal = Literal
        self.equations: list[Equation] = []
        self.constants: dict[Slot, Array] = {}
        self.avals: list[Any] = []
        self._literals: dict[Any, Slot] = {}
        self._done: dict[Any, list[Slot]] = {}

    def slot(self, aval: Any) -> Slot:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _of_literal(self, literal: Any) -> Slot:
        value = np.asarray(literal.val, literal.aval.dtype)
        key = (value.dtype, value.shape, value.tobytes())
        if key not in self._literals:
            self._literals[key] = self.slot(literal.aval)
            self.constants[self._literals[key]] = value
        return self._literals[key]

    def inline(self, jaxpr: Any, consts: Sequence[Array], inputs: Sequence[Slot]) -> list[Slot]:
        slots: dict[Any, Slot] = dict(zip(jaxpr.invars, inputs, strict=True))
        for variable, value in zip(jaxpr.constvars, consts, strict=True):
            slots[variable] = self.slot(variable.aval)
            self.constants[slots[variable]] = np.asarray(value)

        def read(atom: Any) -> Slot:
            return self._of_literal(atom) if isinstance(atom, self._literal) else slots[atom]

        for equation in jaxpr.eqns:
            read_here = [read(atom) for atom in equation.invars]
            inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if equation.primitive.name in CALLS and inner is not None:
                consts = getattr(inner, "consts", ())
                written = self.inline(getattr(inner, "jaxpr", inner), consts, read_here)
                slots.update(zip(equation.outvars, written, strict=True))
            else:
                written = self._operation(equation, tuple(read_here))
                slots.update(zip(equation.outvars, written, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _operation(self, equation: Any, inputs: tuple[Slot, ...]) -> list[Slot]:
        """Adds an operation, or returns what an equal one has written.

        A loss and its gradient often take the same exponential. Equal parameters are found by
        their text, because symbolic sizes may refuse to be compared.
        """
        key = None
        if not equation.effects and all(map(_is_plain, equation.params.values())):
            key = (equation.primitive, repr(sorted(equation.params.items())), inputs)
            if key in self._done:
                return self._done[key]
        written = [self.slot(variable.aval) for variable in equation.outvars]
        calls = equation.source_info.traceback
        made = Equation(equation.primitive, equation.params, inputs, tuple(written), calls)
        self.equations.append(made)
        if key is not None:
            self._done[key] = written
        return written


# Sizes that are symbols


def is_symbolic(value: Any) -> bool:
    """Tells whether a size is an expression of symbols, as ``n0 - 1``."""
    return not isinstance(value, int | str | None) and bool(export.is_symbolic_dim(value))


def _is_plain(value: Any) -> bool:
    """Tells whether the text of a parameter says all of it."""
    if isinstance(value, tuple):
        return all(map(_is_plain, cast("tuple[Any, ...]", value)))
    return isinstance(value, int | float | str | np.dtype | None) or is_symbolic(value)


def symbolic_sizes(value: Any) -> list[Any]:
    """Lists the symbolic sizes in a parameter, which may be a tuple of tuples."""
    if isinstance(value, tuple | list):
        return [size for item in cast("Sequence[Any]", value) for size in symbolic_sizes(item)]
    return [value] if is_symbolic(value) else []


def replace_sizes(value: Any, by: Callable[[Any], Any]) -> Any:
    """Copies a parameter with its symbolic sizes replaced."""
    if type(value) is tuple:  # not of a NamedTuple, such as the numbers of a gather's axes
        return tuple(replace_sizes(item, by) for item in cast("Sequence[Any]", value))
    return by(value) if is_symbolic(value) else value


@functools.lru_cache(maxsize=65536)
def size_code(text: str) -> types.CodeType:
    """Compiles a symbolic size from its text, which is the language of ``symbolic_shape``."""
    return compile(text.replace("^", "**"), "<size>", "eval")


SIZE_FUNCTIONS: dict[str, Any] = {
    "__builtins__": {},
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": max,
    "min": min,
}
"""The functions that the text of a symbolic size may call."""


def size_of(text: str, sizes: Mapping[str, int]) -> int:
    """Computes a symbolic size.

    Args:
        text: such as ``"n0 - 1"``.
        sizes: of each symbol.
    """
    return eval(size_code(text), SIZE_FUNCTIONS, sizes)
