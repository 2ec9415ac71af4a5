"""Finds the inputs of a jaxpr that an output depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mintjax.gradients.flat import CALLS


def inputs_used(jaxpr: Any, outputs: Iterable[int]) -> set[int]:
    """The positions of the inputs that the given outputs are computed from.

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
