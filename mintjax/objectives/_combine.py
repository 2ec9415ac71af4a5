"""Weighted sums of named terms, which are objectives again."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp

from mintjax.objectives._base import Array, LossObjective
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch

Term: TypeAlias = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
Schedule: TypeAlias = Callable[[Any], Any]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class WeightedSum(LossObjective):
    """A weighted sum of objectives, as :func:`weighted_sum` makes it.

    Args:
        names: of the terms.
        terms: the objectives, in that order.
        weights: a number or a schedule for each.
        step: what the schedules are given; None if none was ever set, which reads them at step 0
            and warns of it.
        gradient_norms: whether each term reports its gradient's norm.
    """

    names: tuple[str, ...]
    terms: tuple[Term, ...]
    weights: tuple[float | Schedule, ...]
    step: int | None = None
    gradient_norms: bool = False

    @property
    def row_multiple(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Pads the row count to a multiple that suits all terms; None if one is a user's own."""
        multiples = [getattr(term, "row_multiple", None) for term in self.terms]
        return None if None in multiples else math.lcm(*cast("list[int]", multiples))

    def at_step(self, step: int) -> WeightedSum:
        """Gives the same sum with schedules read at this step; it runs the same compiled program.

        Sums among the terms are moved too.
        """
        terms = tuple(
            term.at_step(step) if isinstance(term, WeightedSum) else term for term in self.terms
        )
        return dataclasses.replace(self, terms=terms, step=step)

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Sums the terms, and reports their metrics under ``name/metric``."""
        values, reported = self._terms(data, logprobs)
        weights = jnp.stack([jnp.asarray(weight, values.dtype) for weight in self._weights()])
        metrics: dict[str, Array] = {}
        for i, (name, term_metrics) in enumerate(zip(self.names, reported, strict=True)):
            metrics[f"{name}/loss"] = jax.lax.stop_gradient(values[i])
            metrics[f"{name}/weight"] = weights[i]
            for key, value in term_metrics.items():
                if key != "loss":
                    metrics[f"{name}/{key}"] = value
        if self.gradient_norms:
            norms = self._norms(data, logprobs)
            metrics |= {f"{name}/gradient_norm": norms[i] for i, name in enumerate(self.names)}
        return jnp.sum(weights * values), metrics

    def _weights(self) -> list[Array]:
        named = zip(self.names, self.weights, strict=True)
        schedules = [name for name, weight in named if callable(weight)]
        if schedules and self.step is None:
            warnings.warn(
                f"the weight of {', '.join(map(repr, schedules))} is a schedule, and no step was "
                "set, so it is read at step 0: pass objective.at_step(step) each step",
                stacklevel=2,
            )
        step = 0 if self.step is None else self.step
        return [weight(step) if callable(weight) else weight for weight in self.weights]

    def _terms(self, data: Batch, logprobs: Ragged) -> tuple[Array, list[Mapping[str, Array]]]:
        returned = [term(data, logprobs) for term in self.terms]
        values = [jnp.asarray(value) for value, _ in returned]
        dtype = functools.reduce(jnp.promote_types, (value.dtype for value in values))
        stacked = jnp.stack([value.astype(dtype) for value in values])
        return stacked, [metrics for _, metrics in returned]

    def _norms(self, data: Batch, logprobs: Ragged) -> Array:
        """Takes the norm of each term's gradient, all from one backward pass with a batch axis."""

        def values(tiles: Array) -> Array:
            return self._terms(data, Ragged(tiles, logprobs.layout))[0]

        tiles = jax.lax.stop_gradient(jnp.asarray(logprobs.tiles))
        primal, pull = cast("tuple[Array, Callable[[Array], tuple[Array]]]", jax.vjp(values, tiles))
        (gradients,) = jax.vmap(pull)(jnp.eye(len(self.terms), dtype=primal.dtype))
        return jnp.sqrt(jnp.sum(gradients.reshape(len(self.terms), -1) ** 2, axis=1))

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Gives the leaves, for JAX: numbers, and those of the terms; functions are structure."""
        terms = [_Leaf.of(term) for term in self.terms]
        weights = [_Leaf.of(weight) for weight in self.weights]
        return (terms, weights, self.step), (self.names, self.gradient_norms)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any, ...]) -> WeightedSum:
        """Undoes :meth:`tree_flatten`."""
        terms, weights, step = children
        return cls(
            names=aux[0],
            terms=tuple(_Leaf.open(term) for term in terms),
            weights=tuple(_Leaf.open(weight) for weight in weights),
            step=step,
            gradient_norms=aux[1],
        )


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A plain function inside a pytree, which is structure and known by its identity."""

    function: Callable[..., Any]

    @classmethod
    def of(cls, value: Any) -> Any:
        leaves = jax.tree_util.tree_leaves(value)
        plain = callable(value) and len(leaves) == 1 and leaves[0] is value
        return cls(value) if plain else value

    @staticmethod
    def open(value: Any) -> Any:
        return value.function if isinstance(value, _Leaf) else value

    def tree_flatten(self) -> tuple[tuple[()], Callable[..., Any]]:
        return (), self.function

    @classmethod
    def tree_unflatten(cls, aux: Callable[..., Any], _: tuple[()]) -> _Leaf:
        return cls(aux)


def weighted_sum(
    terms: Mapping[str, Term],
    weights: Mapping[str, float | Schedule] | None = None,
    *,
    gradient_norms: bool = False,
) -> WeightedSum:
    """Sums objectives with weights, which makes an objective again.

    ``loss = sum_k weights[k] * terms[k](data, logprobs)``. Each term's metrics come under its name,
    ``"dpo/pair_accuracy"``, with ``"dpo/loss"``, its own unweighted value, and ``"dpo/weight"``.

    Args:
        terms: objectives by name: mintjax's own, functions ``(data, logprobs) -> (loss, metrics)``,
            or weighted sums.
        weights: by the same names; 1 if absent. A weight may be a schedule of the step, as optax
            has them: make the sum once and pass ``objective.at_step(step)`` each step, because a
            schedule made anew is another program. See :meth:`WeightedSum.at_step`.
        gradient_norms: report ``"dpo/gradient_norm"`` too, the Euclidean norm of the unweighted
            term's gradient with respect to all logprobs. All terms' gradients are taken in one
            batched backward pass.

    Returns:
        The objective; its weights and its terms' numbers are traced, so another value of one runs
        the same compiled program.

    Raises:
        ValueError: no terms, or a weight without a term.

    Example:
        >>> from mintjax import objectives
        >>> both = objectives.weighted_sum(
        ...     {"dpo": objectives.dpo(beta=0.2), "kl": objectives.kl_k3()}, {"kl": 0.01}
        ... )
        >>> both.names
        ('dpo', 'kl')
    """
    weights = {} if weights is None else weights
    if not terms:
        raise ValueError("a weighted sum needs at least one term")
    stray = sorted(set(weights) - set(terms))
    if stray:
        raise ValueError(f"weights for {stray}, but the terms are {sorted(terms)}")
    return WeightedSum(
        names=tuple(terms),
        terms=tuple(terms.values()),
        weights=tuple(weights.get(name, 1.0) for name in terms),
        gradient_norms=gradient_norms,
    )
