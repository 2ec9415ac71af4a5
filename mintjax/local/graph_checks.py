"""Checks of a loss graph that need no node to be run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from mintjax.errors import DataError
from mintjax.local.torch_functions import DTYPES, FUNCTIONS, METHODS
from mintjax.protocol.messages import CustomLossInput, CustomLossNode

MAX_INPUTS = 16
_METRIC = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_INFINITE = ("inf", "-inf", "nan")
_DEEPEST = 8  # lists within lists


def check_inputs(inputs: Sequence[CustomLossInput]) -> None:
    """Checks the names and ranks of a graph's inputs.

    Raises:
        DataError: one of them cannot be.
    """
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


def check_nodes(nodes: Sequence[CustomLossNode], inputs: Sequence[CustomLossInput]) -> None:
    """Checks everything that can be known without running a node.

    Raises:
        DataError: a node is not served; names it.
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
        or (key == "dtype" and isinstance(held, str) and held in DTYPES)
    ):
        raise DataError(f"an argument of kind {key[:80]!r} is not served", field=where)
