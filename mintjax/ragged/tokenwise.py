"""Refuses functions that mix tokens, where each token must be treated by itself."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

_AXES = ("axes", "axis", "dimension", "dimensions")  # of reductions, running sums, sorts, reversals


def check_tokenwise(
    fn: Callable[..., Any], tiles: Any, others: Callable[[], Iterable[Any]]
) -> None:
    """Checks that a function keeps tokens apart, by the operations that its trace holds.

    Tokens lie along the first two axes, beside padding and other rows. A sum, a running sum, a
    sort or a reversal along these would count both. Functions of mintjax's own, and those that JAX
    cannot trace, are not looked at.

    Args:
        fn: takes all of these. What wraps another function names it as ``checked_as``.
        tiles: ``[tiles, 128, ...]``.
        others: gives what else it takes, where that is to be known.

    Raises:
        TypeError: an operation goes along one of the first two axes.
    """
    if _is_own(fn):
        return
    arrays = [tiles, *others()]
    key = tuple(getattr(array, "ndim", 0) for array in arrays)
    if key in _passed(fn):
        return
    try:
        jaxpr: Any = jax.make_jaxpr(fn)(*arrays).jaxpr
    except Exception:  # a function of NumPy's; or one that raises, which is told when it is called
        return
    found = next(_mixing(jaxpr, tuple(tiles.shape[:2])), None)
    if found is not None:
        raise TypeError(
            f"map needs a function that treats every token by itself; this one takes {found} along "
            "the tokens, which would mix rows and count what lies between them. Use reductions of "
            "the Ragged: x - x.max(), x / x.sum(), x.cumsum(), and for a softmax "
            "(x - x.logsumexp()).map(jnp.exp). objectives.batch_policy is for a loss of all tokens"
        )
    _passed(fn).add(key)


_known: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def _passed(fn: Any) -> set[Any]:
    """Returns the numbers of axes of arguments that a function was found right for."""
    try:
        return _known.setdefault(fn, set())
    except TypeError:  # it cannot be a key
        return set()


def _is_own(fn: Any) -> bool:
    fn = getattr(fn, "checked_as", fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    return (getattr(fn, "__module__", None) or "").partition(".")[0] == "mintjax"


def _mixing(jaxpr: Any, leading: tuple[int, ...]) -> Iterator[str]:
    """Names operations that go along the first two axes of arrays of that shape.

    Where the trace flattens such arrays, so do those that go along all tokens in one axis.
    """
    flat = (math.prod(leading),)

    def shape_of(atom: Any) -> tuple[Any, ...]:
        return tuple(getattr(atom.aval, "shape", ()))

    flattens = any(
        equation.primitive.name == "reshape"
        and shape_of(equation.invars[0])[:2] == leading
        and shape_of(equation.outvars[0])[:1] == flat
        for equation in jaxpr.eqns
    )

    def lies_so(atom: Any) -> bool:
        shape = shape_of(atom)
        return shape[:2] == leading or (flattens and shape[:1] == flat)

    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        for inner in jax.tree.leaves(list(params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _mixing(inner, leading)
        if name == "concatenate":
            if params["dimension"] < 2 and lies_so(equation.outvars[0]):
                yield "parts put together"
        elif name.startswith(("reduce_", "arg", "cum", "sort", "rev")) and any(
            map(lies_so, equation.invars)
        ):
            given = [params[axis] for axis in _AXES if axis in params]
            if any(0 in np.atleast_1d(axis) or 1 in np.atleast_1d(axis) for axis in given):
                yield f"a {name}"
