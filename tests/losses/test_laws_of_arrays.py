"""The laws that every loss obeys: shapes, dtypes, masks, transformations."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from mintjax import losses, objectives

from ..by_numpy import evaluate
from ..examples import THOROUGH, some
from . import cases

GARBAGE = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38], np.float32)


def pulled(case: cases.Case, args: Any, **options: Any) -> list[Any]:
    """The unreduced loss, and the gradient of its sum."""
    wrt = case.differentiable
    value, pull = jax.vjp(lambda *first: case.loss(*first, *args[wrt:], **options), *args[:wrt])
    return [value, *pull(jnp.ones_like(value))]


def value_and_grads(
    case: cases.Case, inputs: list[Any], *, compiled: bool = False, **options: Any
) -> list[np.ndarray]:
    """The unreduced loss, and the gradient of its sum, as NumPy."""

    def both(*args: Any) -> Any:
        return pulled(case, args, **options)

    run = jax.jit(both) if compiled else functools.partial(evaluate, both)
    return [np.asarray(x) for x in run(*inputs)]


def poisoned(arrays: list[Any], where: np.ndarray) -> list[Any]:
    """The arrays, with every kind of number that must not matter where the mask is False."""
    rng = np.random.default_rng(1)
    return [
        np.where(where, a, GARBAGE[rng.integers(0, GARBAGE.size, a.shape)]).astype(a.dtype)
        for a in arrays
    ]


COMPILED = some(cases.ALL, 4)  # by XLA; the others, by NumPy


@pytest.mark.parametrize("name", cases.ALL)
def test_what_is_masked_is_inert(name):
    case = cases.ALL[name]
    inputs = cases.arrays(case, (6, 4))
    where = np.random.default_rng(2).random((6, 4)) < 0.6
    where[2] = False
    with jax.debug_nans(True):
        value, *grads = value_and_grads(case, poisoned(inputs, where), where=where)
    clean, *clean_grads = value_and_grads(case, inputs, compiled=name in COMPILED, where=where)
    np.testing.assert_allclose(value, clean, rtol=1e-6, atol=1e-6)
    for grad, expected in zip(grads, clean_grads, strict=True):
        np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-6)
        assert (grad[~where] == 0).all()
    if name in cases.ELEMENTWISE:
        assert (value[~where] == 0).all()


@pytest.mark.parametrize("name", some(cases.ELEMENTWISE, 3))
def test_masked_is_the_same_as_removed(name):
    case = cases.ELEMENTWISE[name]
    inputs = cases.arrays(case, (40,))
    where = np.random.default_rng(3).random(40) < 0.5
    masked = value_and_grads(case, inputs, where=where)
    removed = value_and_grads(case, [a[where] for a in inputs])
    for a, b in zip(masked, removed, strict=True):  # but for the last digit of a fused operation
        np.testing.assert_allclose(a[where], b, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("name", some(cases.ELEMENTWISE, 3))
def test_shapes_do_not_matter_nor_does_vmap(name):
    case = cases.ELEMENTWISE[name]
    inputs = cases.arrays(case, (24,))

    shaped = [array.reshape(2, 3, 4) for array in inputs]
    expected = value_and_grads(case, shaped)
    for a, b in zip(value_and_grads(case, inputs), expected, strict=True):
        assert b.shape == (2, 3, 4)
        np.testing.assert_allclose(a, b.reshape(-1), rtol=1e-6, atol=1e-7)
    mapped = evaluate(jax.vmap(jax.vmap(case.loss)), *shaped)
    np.testing.assert_allclose(mapped, expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", cases.OVER_THE_LAST_AXIS)
def test_vmap_agrees(name):
    case = cases.ALL[name]
    inputs = cases.arrays(case, (6, 4))
    mapped = evaluate(jax.vmap(case.loss), *inputs)
    np.testing.assert_allclose(mapped, evaluate(case.loss, *inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", cases.ALL)
def test_the_result_has_the_dtype_of_the_first_input(name, x64):
    case = cases.ALL[name]
    first, *others = cases.arrays(case, (3, 4), dtype=np.float64)
    for dtype in ("float32", "float64", "bfloat16"):
        value = jax.eval_shape(case.loss, jnp.asarray(first, dtype), *others)
        assert value.dtype == dtype


# Those that are objectives too are differenced in tests/objectives.
DIFFERENCED = set(cases.ALL) - cases.STOPS_GRADIENTS
if not THOROUGH:
    DIFFERENCED -= set(objectives.__all__)


@pytest.mark.parametrize("name", sorted(DIFFERENCED))
def test_gradients_are_those_of_differences(name, x64):
    case = cases.ALL[name]
    inputs = cases.arrays(case, (3, 4), dtype=np.float64)
    wrt = case.differentiable

    def loss(*first: Any) -> jax.Array:
        return case.loss(*first, *inputs[wrt:])

    check_grads(loss, inputs[:wrt], order=1, modes=["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", cases.ALL)
def test_a_shape_that_does_not_fit_is_named(name):
    case = cases.ALL[name]
    first, *others = cases.arrays(case, (4, 4))
    if not others:
        with pytest.raises(ValueError, match="where has shape"):
            case.loss(first, where=np.ones(4, bool))
        return
    with pytest.raises(ValueError, match=f"{case.inputs[1]} has shape"):
        case.loss(first, others[0][0], *others[1:])


@pytest.mark.parametrize("name", cases.ALL)
def test_numbers_that_are_hidden_or_missing_are_refused(name):
    case = cases.ALL[name]
    first, *others = cases.arrays(case, (2, 2))
    with pytest.raises(ValueError, match="masked array hides"):
        case.loss(np.ma.array(first, mask=[[False, True], [False, False]]), *others)
    with pytest.raises(TypeError, match="is one of them None"):
        case.loss([[None, -1.0], [-1.0, -1.0]], *others)


@pytest.mark.parametrize("loss", [losses.ppo, losses.cispo, losses.dual_clip_ppo])
def test_thresholds_may_differ_from_token_to_token(loss):
    case = cases.Case(loss, cases.POLICY)
    inputs = cases.arrays(case, (30,))
    low, high = (
        np.linspace(0.5, 0.9, 30, dtype=np.float32),
        np.linspace(1.0, 1.6, 30, dtype=np.float32),
    )
    together = value_and_grads(case, inputs, clip_low_threshold=low, clip_high_threshold=high)
    for t in (4, 19):
        one = value_and_grads(
            case,
            [a[t : t + 1] for a in inputs],
            clip_low_threshold=float(low[t]),
            clip_high_threshold=float(high[t]),
        )
        for a, b in zip(together, one, strict=True):
            np.testing.assert_allclose(a[t], b[0], rtol=1e-6)


def test_lists_and_scalars_are_taken():
    np.testing.assert_allclose(losses.cross_entropy([-1, -2], 1.0), [1.0, 2.0])
    np.testing.assert_allclose(losses.importance_sampling([-1.0], [-1.0], 2), [-2.0])


def test_the_slope_at_a_clip_bound_is_one():
    def slope(advantage: float, **bounds: float) -> float:
        return float(jax.grad(lambda x: losses.ppo(x, -1.0, advantage, **bounds))(-1.0))

    for advantage in (1.0, -1.0):  # a ratio of exactly 1, with a one-sided threshold of 1
        assert slope(advantage, clip_high_threshold=1.0) == -advantage
        assert slope(advantage, clip_low_threshold=1.0) == -advantage


SHARDED = """
import jax, numpy as np, sys
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, {here!r})
import cases
from jax.sharding import Mesh, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 8
tried = {{name: cases.ALL[name] for name in {names!r}}}
inputs = {{name: cases.arrays(case, (16, 4)) for name, case in tried.items()}}
first = {{name: arrays[0] for name, arrays in inputs.items()}}
others = {{name: arrays[1:] for name, arrays in inputs.items()}}
def totals(first, others):
    return {{n: case.loss(first[n], *others[n]).sum() for n, case in tried.items()}}
def pulled(losses):
    def both(first, others):
        values, pull = jax.vjp(lambda first: losses(first, others), first)
        return values, pull(jax.tree.map(jax.numpy.ones_like, values))[0]
    return jax.jit(both)(first, others)
sharded = jax.shard_map(
    lambda *args: jax.lax.psum(totals(*args), "data"),
    mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P(),
)
for ours, plain in zip(*map(jax.tree.leaves, (pulled(sharded), pulled(totals))), strict=True):
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
print("agreed", len(tried))
"""
# By default those with derivatives or control flow of their own, and one of those without.
SHARDED_LOSSES = (
    tuple(cases.ALL)
    if THOROUGH
    else (
        "ppo",
        "gspo",
        "kl_k3_straight_through",
        "orpo",
        "plackett_luce",
        "discounted_returns",
    )
)


def test_losses_run_under_shard_map_on_eight_devices():
    code = SHARDED.format(here=cases.__file__.rsplit("/", 1)[0], names=SHARDED_LOSSES)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"agreed {len(SHARDED_LOSSES)}" in done.stdout


def test_the_slope_by_weights_alone_is_minus_the_logprobs():
    logprobs, weights = np.array([-1.0, -2.0, -np.inf], np.float32), jnp.array([1.0, 0.5, 0.0])
    slope = jax.grad(lambda w: losses.cross_entropy(logprobs, w).sum())(weights)
    np.testing.assert_array_equal(slope, [1, 2, 0])
