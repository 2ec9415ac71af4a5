"""Losses that clients have uploaded as graphs of ``torch.fx``, read and evaluated without torch.

A graph is anybody's input. It is plain data: each node names an operation of :data:`FUNCTIONS` or
:data:`METHODS`, and nothing else is ever called. The graph is traced by JAX once for all lengths,
with its gradient, and evaluated with NumPy datum by datum. Sizes are computed before arrays are
made, so that a graph cannot make the trainer hold more than its limits say.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import export

from mintjax.errors import DataError, MintjaxError
from mintjax.gradients.flat import Flat, flatten, size_of
from mintjax.gradients.interpreted import Step, Unsupported, step_of
from mintjax.local.graph_checks import check_inputs, check_nodes
from mintjax.local.jax_settings import own_settings
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.local.torch_functions import FUNCTIONS, METHODS, Dtype
from mintjax.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode

Array: TypeAlias = Any


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
        check_inputs(self.inputs)
        limits.check("max_loss_nodes", len(graph.nodes), f"the graph has {len(graph.nodes)} nodes")
        check_nodes(graph.nodes, self.inputs)
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
                return Dtype(held)

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
