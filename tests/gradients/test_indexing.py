"""Gathers and scatters of NumPy are JAX's, in every mode."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from mintjax.gradients import indexing, interpreted

MODES = [
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
]
WAYS: dict[str, Any] = {
    "tokens": lambda x, at, **how: x.at[at],
    "pairs": lambda x, at, **how: x.at[at, at[::-1]],
    "candidates": lambda x, at, **how: x.at[:, at],
    "a window": lambda x, at, **how: x.at[1:3, at[0]],
    "tokens and a window": lambda x, at, **how: x.at[at, 1:],
    "a table": lambda x, at, **how: x.at[at.reshape(2, -1)],
}


def same(program: Any, *arguments: Any) -> None:
    found = interpreted.evaluate(jax.make_jaxpr(program)(*arguments), arguments)
    expected = jax.tree.leaves(program(*map(jnp.asarray, arguments)))
    for got, want in zip(found, expected, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@given(st.sampled_from(list(WAYS)), st.sampled_from(MODES), st.integers(0, 999), st.data())
def test_tokens_are_taken_and_changed_as_by_jax(
    way: str, mode: Any, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    x = data.draw(st.sampled_from([rng.standard_normal((5, 3)), rng.integers(-9, 9, (5, 3))]))
    x = x.astype(np.float32 if x.dtype.kind == "f" else np.int32)
    # What a promise does where it is not kept is XLA's own affair for changes.
    beyond = 0 if mode == MODES[2] else 4
    at = rng.integers(-beyond, 3 + beyond, 4).astype(np.int32)
    change = data.draw(st.sampled_from(["set", "add", "multiply", "max", "min"]), label="change")

    def program(x: Any, at: Any) -> Any:
        changed = getattr(WAYS[way](x, jnp.unique(at, size=4, fill_value=9)), change)(2, mode=mode)
        return WAYS[way](x, at).get(mode=mode), changed if change == "set" else changed + 0

    same(program, x, at)


@given(st.integers(0, 999), st.sampled_from(MODES[:2]))
def test_an_index_for_each_row_is_jaxs(seed: int, mode: Any) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    at = rng.integers(-5, 6, (4, 2)).astype(np.int32)

    def program(x: Any) -> Any:
        return jnp.take_along_axis(x, at, 1, mode=mode.name.split("_")[0].lower())

    same(lambda x: (program(x), jax.grad(lambda x: jnp.nansum(program(x) ** 2))(x)), x)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float32"])
def test_the_number_that_is_filled_in_is_jaxs(dtype: str) -> None:
    x = np.ones(3, dtype)
    same(lambda x: x.at[jnp.array([1, 7])].get(mode="fill"), x)
    same(lambda x: x.at[jnp.array([1, 7])].get(mode="fill", fill_value=1), x)


def test_a_window_that_does_not_fit_is_an_error() -> None:
    numbers = lax.GatherDimensionNumbers((0,), (), (0,))
    with pytest.raises(IndexError, match="a window of 3 does not fit an axis of 2"):
        indexing.gather(np.ones(2), np.array([0]), (3,), numbers, MODES[0], None)
