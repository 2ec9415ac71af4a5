"""Weighted sums of named terms, which are objectives again."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mintjax.errors import ObjectiveError
from mintjax.objectives._base import Array, LossObjective, is_real
from mintjax.objectives._contract import check_callable, check_returned
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch
from mintjax.types import Datum

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
    def pad_rows_to(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Pads the row count to a multiple that suits all terms; None if one is a user's own."""
        multiples = [getattr(term, "pad_rows_to", None) for term in self.terms]
        return None if None in multiples else math.lcm(*cast("list[int]", multiples))

    def at_step(self, step: int) -> WeightedSum:
        """Gives the same sum with schedules read at this step; it runs the same compiled program.

        Sums among the terms are moved too.
        """
        terms = tuple(
            term.at_step(step) if isinstance(term, WeightedSum) else term for term in self.terms
        )
        return dataclasses.replace(self, terms=terms, step=step)

    def over_step(self, data: Batch | Sequence[Datum]) -> WeightedSum:
        """Gives the same sum for a step whose data are sent in several requests.

        Args:
            data: all datums of the step.

        Returns:
            The sum of what each term's ``over_step(data)`` gives.

        Raises:
            ObjectiveError: a term has no ``over_step``, such as a loss of pairs or a function of
                one's own, whose mean over several requests is not known here.
            DataError: the datums do not divide into groups.
        """
        terms: list[Term] = []
        for name, term in zip(self.names, self.terms, strict=True):
            over_step = getattr(term, "over_step", None)
            if over_step is None:
                raise ObjectiveError(
                    f"the term {name!r} has no over_step, because only objectives of tokens know "
                    "how their mean is made; give it a weight of 1 / (number of requests) instead, "
                    "where all requests have as many datums"
                )
            terms.append(over_step(data))
        return dataclasses.replace(self, terms=tuple(terms))

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Sums the terms, and reports their metrics under ``name/metric``.

        Raises:
            ObjectiveError: a term does not return a scalar and a dict, or two have a metric of one
                name.
        """
        values, reported = self._terms(data, logprobs)
        weights = jnp.stack([jnp.asarray(weight, values.dtype) for weight in self._weights()])
        metrics: dict[str, Array] = {}
        for i, (name, term_metrics) in enumerate(zip(self.names, reported, strict=True)):
            own = {f"{name}/{key}": value for key, value in term_metrics.items()}
            own[f"{name}/loss"] = jax.lax.stop_gradient(values[i])
            own[f"{name}/weight"] = weights[i]
            twice = sorted(own.keys() & metrics.keys())
            if twice:
                raise ObjectiveError(
                    f"two terms report {', '.join(map(repr, twice))}; give the terms other names, "
                    "of which none is another's with a / behind it"
                )
            metrics |= own
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
        returned: list[tuple[Any, Mapping[str, Array]]] = []
        for term in self.terms:
            check_callable(term)
            returned.append(check_returned(term, term(data, logprobs)))
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


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A schedule times a number, which is traced."""

    factor: Any
    schedule: Schedule

    def __call__(self, step: Any) -> Any:
        return self.factor * self.schedule(step)

    def tree_flatten(self) -> tuple[tuple[Any], Schedule]:
        return (self.factor,), self.schedule

    @classmethod
    def tree_unflatten(cls, aux: Schedule, children: tuple[Any]) -> _Scaled:
        return cls(children[0], aux)


def _add(left: Any, right: Any) -> WeightedSum:
    """Makes one weighted sum of the terms of both, as ``left + right`` of objectives does."""
    for number, objective in ((left, right), (right, left)):
        if isinstance(number, int) and number == 0:
            return _sum_of(objective)
    one, other = _sum_of(left), _sum_of(right)
    twice = sorted(set(one.names) & set(other.names))
    if twice:
        raise ValueError(
            f"both sides of + have a term called {', '.join(map(repr, twice))}, and its metrics "
            'would be mixed up: write objectives.weighted_sum({"one": ..., "other": ...}), which '
            "names the terms"
        )
    steps = {each.step for each in (one, other) if each.step is not None}
    if len(steps) > 1:
        raise ValueError(
            f"the sides of + are at the steps {sorted(steps)}: add first, and call at_step(step) "
            "of the sum"
        )
    return WeightedSum(
        names=one.names + other.names,
        terms=one.terms + other.terms,
        weights=one.weights + other.weights,
        step=steps.pop() if steps else None,
        gradient_norms=one.gradient_norms or other.gradient_norms,
    )


def _scale(weight: Any, objective: Any) -> WeightedSum:
    """Multiplies the weights of all terms, as ``weight * objective`` does.

    Args:
        weight: a number or a schedule of the step.
        objective: an objective; one that is no weighted sum becomes one of a single term.
    """
    _check_weight(weight)
    whole = _sum_of(objective)
    return dataclasses.replace(whole, weights=tuple(_times(weight, w) for w in whole.weights))


def _check_weight(weight: Any) -> None:
    """Checks that a weight is a real number or a schedule.

    Raises:
        TypeError: it is something else.
        ValueError: it is NaN or infinite.
    """
    if callable(weight) and not isinstance(weight, LossObjective | type):
        return
    if not is_real(weight):
        raise TypeError(
            f"an objective is multiplied by a number or by a schedule of the step, not by "
            f"{weight!r}; a factor for each token or datum is the column weights of the data"
        )
    if not isinstance(weight, jax.core.Tracer) and not np.isfinite(cast("Any", weight)):
        raise ValueError(f"a weight must be finite, not {weight!r}")


def _times(one: Any, other: Any) -> Any:
    """Multiplies two weights, of which one may be a schedule."""
    if callable(one) and callable(other):
        raise TypeError(
            "a term that already has a schedule for its weight is multiplied by numbers only: "
            "multiply the schedules in one function of the step"
        )
    if isinstance(other, _Scaled):
        return _Scaled(one * other.factor, other.schedule)
    if callable(other):
        return _Scaled(one, other)
    if callable(one):
        return one if isinstance(other, float) and other == 1.0 else _Scaled(other, one)
    return one * other


def _sum_of(objective: Any) -> WeightedSum:
    """Gives an objective as a weighted sum; one that is none becomes a single term."""
    if isinstance(objective, WeightedSum):
        return objective
    if isinstance(objective, LossObjective):
        return WeightedSum(names=(type(objective).__name__,), terms=(objective,), weights=(1.0,))
    said = "a plain function" if callable(objective) else f"{objective!r}"
    raise TypeError(
        f"+ and * join mintjax's objectives, and {said} is none: write objectives.weighted_sum("
        '{"dpo": objectives.dpo(), "own": function}, {"own": 0.1}), which gives each term a name, '
        "under which its metrics are reported"
    )


LossObjective._add = _add  # pyright: ignore[reportPrivateUsage]
LossObjective._scale = _scale  # pyright: ignore[reportPrivateUsage]


def weighted_sum(
    terms: Mapping[str, Term],
    weights: Mapping[str, float | Schedule] | None = None,
    *,
    gradient_norms: bool = False,
) -> WeightedSum:
    """Sums objectives with weights, which makes an objective again.

    ``loss = sum_k weights[k] * terms[k](data, logprobs)``. Each term's metrics come under its name,
    ``"dpo/pair_accuracy"``, with ``"dpo/loss"``, its own unweighted value, and ``"dpo/weight"``.

    ``dpo() + 0.1 * kl_k2()`` is ``weighted_sum({"dpo": dpo(), "kl_k2": kl_k2()}, {"kl_k2": 0.1})``:
    terms have the names of their classes, sums among them are merged, and a factor may be a
    schedule.

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
        TypeError: a weight is no real number and no schedule.
        ValueError: no terms, a weight without a term, or one that is not finite.

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
    for weight in weights.values():
        _check_weight(weight)
    return WeightedSum(
        names=tuple(terms),
        terms=tuple(terms.values()),
        weights=tuple(weights.get(name, 1.0) for name in terms),
        gradient_norms=gradient_norms,
    )
