"""A loop that is evaluated by groups gives what it gives row by row."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Batch, value_and_logprob_grads
from mintjax.gradients import grouped, interpreted, lengths
from mintjax.gradients.flat import Flat, size_of
from mintjax.gradients.identity import Identity, identify

from ..examples import examples
from .loop_forms import FORMS
from .test_loops import LENGTHS, batch_of

GROUPED = [name for name, form in FORMS.items() if not form.traced]


class Traced(NamedTuple):
    trace: lengths.Trace
    identity: Identity
    program: grouped.Grouped


@functools.cache
def traced(name: str, rows: int, piece: int) -> Traced:
    form = FORMS[name]
    data, logprobs = batch_of([2] * rows, 0, form.candidates)
    identity = identify(form.loop)
    trace = lengths.trace(identity, Batch(data), logprobs)
    program = grouped.prepare(trace.flat, rows, trace.parameters, piece=piece)
    return Traced(trace, identity, program)


def one_by_one(flat: Flat, inputs: list[Any], sizes: dict[str, int]) -> list[Any]:
    """Evaluates the equations in their order, each alone."""
    values = {**flat.constants, **dict(zip(flat.inputs, inputs, strict=True))}
    with np.errstate(all="ignore"):
        for equation in flat.equations:
            step = interpreted.step_of(flat, equation)
            known = {text: size_of(text, sizes) for text in step.texts}
            results = step.compute([values[slot] for slot in step.inputs], known)
            values.update(zip(step.outputs, results, strict=True))
    return [values[slot] for slot in flat.outputs]


def assert_groups_are_rows_one_by_one(name: str, sizes: list[int], seed: int, piece: int) -> None:
    data, logprobs = batch_of(sizes, seed, FORMS[name].candidates)
    trace, identity, program = traced(name, len(sizes), piece)
    arguments = trace.arguments(Batch(data), logprobs, identity)
    results, grads = program.run(arguments, sizes)
    inputs = [row for block in arguments for row in block]
    expected = one_by_one(trace.flat, inputs, dict(zip(trace.symbols, sizes, strict=True)))
    for found, value in zip(results, expected[: -len(sizes)], strict=True):
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        # Sums of all tokens, of either sign, have been rounded in another order.
        rounding = 1e-5 + 5e-7 * sum(sizes)
        np.testing.assert_allclose(found, value, rtol=2e-5, atol=rounding, err_msg=name)
    wanted = np.concatenate(expected[-len(sizes) :])
    assert (grads.dtype, grads.shape) == (wanted.dtype, wanted.shape)
    scale = max(1, np.abs(wanted).max())
    np.testing.assert_allclose(grads, wanted, rtol=2e-5, atol=2e-6 * scale, err_msg=name)


@settings(max_examples=examples(12))
@given(st.data(), st.sampled_from(GROUPED), st.integers(0, 999))
def test_groups_are_rows_one_by_one(data: st.DataObject, name: str, seed: int) -> None:
    rows = data.draw(st.sampled_from([1, 2, 3, 6]), label="blocks") * FORMS[name].block
    sizes = data.draw(st.lists(LENGTHS, min_size=rows, max_size=rows), label="lengths")
    piece = data.draw(st.sampled_from([64, 32768]), label="piece")
    assert_groups_are_rows_one_by_one(name, sizes, seed, piece)


@jax.custom_vjp
def _of_weights(lp: Any, weights: Any) -> Any:
    return jnp.dot(lp, weights)


_of_weights.defvjp(
    lambda lp, weights: (jnp.dot(lp, weights), weights),
    lambda weights, _: (weights, jnp.zeros_like(weights)),  # the column is the gradient
)


def test_gradients_do_not_lie_where_the_next_batch_is_put() -> None:
    def loss(data: Any, logprobs: Any) -> Any:
        rows = zip(data, logprobs, strict=True)
        return sum(_of_weights(lp, datum.loss_fn_inputs["weights"]) for datum, lp in rows), {}

    def grads(seed: int) -> list[Any]:
        data, logprobs = batch_of([50, 3], seed, candidates=False)
        return value_and_logprob_grads(loss, data, logprobs).grads

    first = grads(0)
    kept = [np.array(grad) for grad in first]
    grads(1)
    for grad, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(grad, copy)
