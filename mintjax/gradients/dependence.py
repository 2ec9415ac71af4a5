"""Finds the inputs of a jaxpr that an output depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mintjax.gradients.flat import CALLS


def are_zero(jaxpr: Any, outputs: Iterable[int]) -> bool:
    """Tells whether outputs are filled with a literal 0, as gradients are that nothing reaches.

    Args:
        jaxpr: a ``Jaxpr``.
        outputs: positions among its outputs.
    """
    made = {variable: one for one in jaxpr.eqns for variable in one.outvars}
    found = [made.get(jaxpr.outvars[i]) for i in outputs]
    return all(
        one is not None
        and one.primitive.name == "broadcast_in_dim"
        and getattr(one.invars[0], "val", None) == 0  # of a literal
        for one in found
    )


def inputs_used(jaxpr: Any, outputs: Iterable[int]) -> set[int]:
    """Finds the positions of the inputs that the given outputs are computed from.

    Calls are looked into; loops and branches count as using all they are given.

    Args:
        jaxpr: a ``Jaxpr``.
        outputs: positions among its outputs.
    """
    from jax.extend.core import Literal  # late: it imports Pallas, which takes its time

    needed: set[Any] = {atom for i in outputs if not isinstance(atom := jaxpr.outvars[i], Literal)}
    for equation in reversed(jaxpr.eqns):
        wanted = [i for i, variable in enumerate(equation.outvars) if variable in needed]
        if not wanted:
            continue
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        inner = getattr(inner, "jaxpr", inner)
        operands = equation.invars
        if equation.primitive.name in CALLS and len(inner.invars) == len(operands):
            operands = [operands[i] for i in inputs_used(inner, wanted)]
        needed.update(atom for atom in operands if not isinstance(atom, Literal))
    return {i for i, variable in enumerate(jaxpr.invars) if variable in needed}
