"""Logprobs from logits, and from hidden states in chunks: the same numbers and gradients."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Ragged, losses

from ..examples import examples, some

D, V = 8, 31
FEW = settings(max_examples=examples(6))


@given(st.integers(0, 2**32 - 1), st.sampled_from([(), (4,)]), st.sampled_from([1e-3, 1.0, 80.0]))
@FEW
def test_logprobs_are_those_of_the_softmax_in_float64(seed, trailing, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(2, 3, V))).astype(np.float32)
    targets = rng.integers(0, V, (2, 3, *trailing))
    wide = logits.astype(np.float64)
    normal = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    index = targets if trailing else targets[..., None]
    want = np.take_along_axis(normal, index, -1).reshape(targets.shape)
    got = losses.target_logprobs(logits, targets)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_a_certain_token_keeps_its_digits():
    logits = np.float32([[1000.0, 1000.0 - 14, 0]])
    got = losses.target_logprobs(logits, np.array([0]))
    np.testing.assert_allclose(got, [-np.log1p(np.exp(-14.0))], rtol=0.1)


def plain(hidden, unembedding, targets, weights):
    logits = hidden.astype(jnp.float32) @ unembedding.astype(jnp.float32)
    values = losses.target_logprobs(logits, targets)
    return (values * weights).sum(), values


def fused(chunk_size):
    def total(hidden, unembedding, targets, weights):
        values = losses.fused_target_logprobs(hidden, unembedding, targets, chunk_size=chunk_size)
        return (values * weights).sum(), values

    return total


def both_ways(function):
    return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))


PLAIN = both_ways(plain)
FUSED = {size: both_ways(fused(size)) for size in (1, 4, None)}


@pytest.mark.parametrize(
    ("chunk_size", "dtype", "trailing"),
    some(itertools.product(FUSED, ["float32", "bfloat16"], [(), (3,)]), 3),
)
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=examples(3))
def test_chunks_give_what_all_logits_give(chunk_size, dtype, trailing, seed):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(2, 5, D)), dtype)
    unembedding = jnp.asarray(rng.normal(size=(D, V)), dtype)
    targets = rng.integers(0, V, (2, 5, *trailing))
    weights = rng.normal(size=targets.shape).astype(np.float32)
    (_, want), slopes = PLAIN(hidden, unembedding, targets, weights)
    (_, got), ours = FUSED[chunk_size](hidden, unembedding, targets, weights)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.03, "atol": 0.03}
    for mine, theirs in zip(ours, slopes, strict=True):
        assert mine.dtype == theirs.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(*(np.float32(x) for x in (mine, theirs)), **close)


@pytest.mark.parametrize("leading", [(0, 3), (2, 0)])
def test_no_position_has_no_logprobs_and_no_gradient(leading):
    targets = np.zeros(leading, int)
    (_, got), slopes = FUSED[4](jnp.ones((*leading, D)), jnp.ones((D, V)), targets, targets * 1.0)
    assert got.shape == leading
    np.testing.assert_array_equal(slopes[1], np.zeros((D, V)))


def shapes_in(jaxpr):
    """The shapes of all values that a jaxpr computes, those within loops among them."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_no_program_holds_more_logits_than_a_chunk_has():
    arguments = (jnp.ones((4, 16, D)), jnp.ones((D, V)), jnp.zeros((4, 16), int), jnp.ones((4, 16)))
    sizes = {}
    for name, function in {"plain": plain, "fused": fused(8)}.items():
        closed = jax.make_jaxpr(jax.grad(function, argnums=(0, 1), has_aux=True))(*arguments)
        wide = [shape for shape in shapes_in(closed.jaxpr) if V in shape]
        sizes[name] = max(int(np.prod(shape)) for shape in wide)
    assert sizes == {"plain": 4 * 16 * V, "fused": 8 * V}


def test_a_target_outside_the_vocabulary_is_nan_and_a_mask_hides_it():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, V)), jnp.float32)
    targets = np.array([[3, -100, V]])
    values = losses.target_logprobs(logits, targets)
    np.testing.assert_array_equal(np.isnan(values), [[False, True, True]])
    hidden, unembedding = logits, jnp.eye(V)
    for function in (
        lambda x: losses.target_logprobs(x, targets),
        lambda x: losses.fused_target_logprobs(x, unembedding, targets, chunk_size=2),
    ):
        total = jax.grad(lambda x, f=function: Ragged.from_padded(f(x), lengths=[1]).total())
        slope = jax.jit(total)(hidden)
        assert np.isfinite(slope).all()
        assert (slope[0, 1:] == 0).all()
        assert slope[0, 0, 3] > 0


def test_a_token_that_cannot_come_has_no_gradient():
    logits = jnp.float32([[0.0, -jnp.inf, 1.0]])
    total = jax.value_and_grad(lambda x: losses.target_logprobs(x, jnp.array([2])).sum())
    value, slope = jax.jit(total)(logits)
    assert value == pytest.approx(-np.log1p(np.exp(-1.0)), rel=1e-6)
    assert np.isfinite(slope).all()
    assert slope[0, 1] == 0


def test_vmap_over_models_and_float64(x64):
    rng = np.random.default_rng(0)
    hidden, heads = rng.normal(size=(3, 4, D)), rng.normal(size=(3, D, V))
    targets = rng.integers(0, V, (3, 4))
    fused = jax.vmap(lambda *a: losses.fused_target_logprobs(*a, chunk_size=3))
    got = jax.jit(fused)(hidden, heads, targets)
    want = losses.target_logprobs(np.einsum("btd,bdv->btv", hidden, heads), targets)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "dtype", "error"),
    [
        (((2, 3, D), (D, V), (3, 2)), int, ValueError),
        (((2, 3, D), (D, V), (2, 3, 1, 1)), int, ValueError),
        (((2, 3, D), (V, D), (2, 3)), int, ValueError),
        (((2, 3, D), (D, V), (2, 3)), float, TypeError),
    ],
)
def test_what_does_not_fit_is_refused(shapes, dtype, error):
    hidden, unembedding, targets = (np.ones(shape) for shape in shapes)
    with pytest.raises(error, match=r"must be|integers"):
        losses.fused_target_logprobs(hidden, unembedding, targets.astype(dtype))
    with pytest.raises(ValueError, match="at least 1"):
        losses.fused_target_logprobs(
            np.ones((1, D)), np.ones((D, V)), np.ones(1, int), chunk_size=0
        )
