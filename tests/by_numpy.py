"""Evaluates functions of JAX with NumPy, because XLA takes longer to compile than a test to run.

XLA evaluates them under the thorough profile. ``tests/gradients/test_interpreted.py`` holds the two
together.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mintjax.gradients.flat import flatten
from mintjax.gradients.interpreted import step_of

from .examples import THOROUGH

MOVES = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze")
"""Operations that compute nothing, many of which JAX leaves out unless it traces."""


def evaluate(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of arrays; under ``jax.debug_nans``, no operation may give a NaN.

    Args:
        function: of pytrees of arrays, which may differentiate or map.
        args: its arguments.
    """
    return function(*args) if THOROUGH else interpret(function, *args)


def interpret(function: Callable[..., Any], *args: Any) -> Any:
    """Does what :func:`evaluate` does by default, under every profile.

    Args:
        function: of pytrees of arrays, which may differentiate or map.
        args: its arguments.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    flat = flatten(closed)
    values = dict(flat.constants)
    for slot, value in zip(flat.inputs, jax.tree.leaves(args), strict=True):
        values[slot] = np.asarray(value, flat.avals[slot].dtype)
    with np.errstate(all="ignore"):
        for equation in flat.equations:
            inputs = [values[slot] for slot in equation.inputs]
            outputs = step_of(flat, equation).compute(inputs, {})
            if jax.config.jax_debug_nans and equation.name not in MOVES:
                assert not any(np.isnan(x).any() for x in outputs), f"nan of {equation.name}"
            values.update(zip(equation.outputs, outputs, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shapes), [values[s] for s in flat.outputs])


def evaluated(module: types.ModuleType) -> Any:
    """A module whose functions are evaluated so, unless JAX traces them."""

    def __getattr__(name: str) -> Any:
        function = getattr(module, name)
        if not isinstance(function, types.FunctionType) or name.startswith("describe"):
            return function

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, named))):
                return function(*args, **named)
            return evaluate(lambda: function(*args, **named))

        return call

    proxy = types.ModuleType(module.__name__)
    proxy.__getattr__ = __getattr__  # pyright: ignore[reportAttributeAccessIssue]
    return proxy
