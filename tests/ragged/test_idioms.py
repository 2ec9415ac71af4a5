"""What is written with arrays elsewhere: it is right for a Ragged, or the error says what is."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from mintjax import Ragged
from mintjax.ragged import idioms

from ..examples import examples

LOW, HIGH = 0.4, 0.9


def dtype_of(dtype: Any) -> Any:
    return lambda x, y, m: x.astype(dtype)


# Of a row x, another y and a mask m: what the idiom means for it.
MEANING: dict[str, Any] = {
    **{
        name: (lambda x, y, m, name=name: getattr(np, name)(x))
        for name in (
            *("exp", "expm1", "log", "log1p", "sqrt", "square", "tanh", "sign", "isnan", "isinf"),
            *("isfinite", "floor", "ceil", "abs", "absolute", "median", "size", "zeros_like"),
            *("any", "all", "count_nonzero", "ones_like"),
        )
    },
    "sigmoid": lambda x, y, m: special.expit(x),
    "relu": lambda x, y, m: np.maximum(x, 0),
    "softplus": lambda x, y, m: np.logaddexp(0, x),
    "float": dtype_of(np.float32),
    "to": dtype_of(np.float32),
    "type": dtype_of(np.float32),
    "half": dtype_of(np.float16),
    "bfloat16": dtype_of(jnp.bfloat16),
    "int": dtype_of(np.int32),
    "long": dtype_of(np.int32),
    "bool": dtype_of(bool),
    "double": dtype_of(np.float32),  # as everything is without jax_enable_x64
    "neg": lambda x, y, m: -x,
    "pow": lambda x, y, m: x**2,
    "power": lambda x, y, m: x**2,
    "logsigmoid": lambda x, y, m: special.log_expit(x),
    "log_softmax": lambda x, y, m: special.log_softmax(x),
    "softmax": lambda x, y, m: special.softmax(x),
    "clip": lambda x, y, m: np.clip(x, LOW, HIGH),
    "clamp": lambda x, y, m: np.clip(x, LOW, HIGH),
    "clamp_min": lambda x, y, m: np.maximum(x, LOW),
    "clamp_max": lambda x, y, m: np.minimum(x, HIGH),
    "minimum": lambda x, y, m: np.minimum(x, y),
    "maximum": lambda x, y, m: np.maximum(x, y),
    "where": lambda x, y, m: np.where(m, x, y),
    "masked_fill": lambda x, y, m: np.where(m, 0, x),
    "masked_select": lambda x, y, m: x[m].sum(),
    "nonzero": lambda x, y, m: np.count_nonzero(x),
    "norm": lambda x, y, m: np.sqrt((x * x).sum()),
    "detach": lambda x, y, m: x,
    "stop_gradient": lambda x, y, m: x,
    "numel": lambda x, y, m: x.size,
    **dict.fromkeys(("shape", "ndim", "dim"), lambda x, y, m: x.size),
    **dict.fromkeys(("item", "tolist", "numpy", "cpu", "copy", "clone"), lambda x, y, m: x),
    "T": lambda x, y, m: x,
}
OVER_ALL = {"median", "size", "numel"}


def written(name: str, x: Ragged) -> str:
    """The expression that the error of an attribute of this name says to write."""
    with pytest.raises(AttributeError, match=f"no attribute '{name}'") as caught:
        getattr(x, name)
    found = re.search("write `(.*)`", str(caught.value))
    assert found, caught.value
    return found[1]


@settings(max_examples=examples(2))
@given(st.integers(0, 1000))
def test_what_an_error_says_to_write_means_the_same(seed):
    rng = np.random.default_rng(seed)
    rows = [rng.uniform(0.1, 2.0, size).astype(np.float32) for size in (3, 200, 1)]
    others = [rng.permutation(row) for row in rows]
    masks = [row > 0.5 for row in others]
    x, y, mask = map(Ragged.from_rows, (rows, others, masks))
    names = {"x": x, "y": y, "mask": mask, "low": LOW, "high": HIGH, "jax": jax, "jnp": jnp}
    assert MEANING.keys() == idioms.INSTEAD.keys()
    for name, meaning in MEANING.items():
        got = eval(written(name, x), names)
        if name == "T":
            got = [column[: row.size] for column, row in zip(got.T, rows, strict=True)]
        if name in OVER_ALL:
            together = (np.concatenate(each) for each in (rows, others, masks))
            np.testing.assert_allclose(got, meaning(*together), rtol=1e-5)
            continue
        for mine, row, other, marked in zip(got, rows, others, masks, strict=True):
            expected = np.asarray(meaning(row, other, marked))
            assert np.asarray(mine).dtype.kind == expected.dtype.kind
            mine, expected = (np.asarray(value, np.float32) for value in (mine, expected))
            np.testing.assert_allclose(mine, expected, rtol=3e-5, atol=1e-6, err_msg=name)


def test_attributes_of_arrays_are_not_there_and_those_of_python_say_nothing_more():
    x = Ragged.from_rows([np.ones(2, np.float32)])
    for name in (*idioms.INSTEAD, "unsqueeze", "nothing_of_this_name"):
        assert not hasattr(x, name)
    with pytest.raises(AttributeError, match=r"x - x\.mean\(\)"):
        x.unsqueeze(-1)
    with pytest.raises(AttributeError, match=r"x\.map\(jnp\.exp\)"):
        x.nothing_of_this_name  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute '__jax_array__'$"):
        x.__jax_array__  # noqa: B018


@pytest.mark.parametrize("name", ["sum", "mean", "var", "std", "max", "min", "logsumexp", "count"])
@pytest.mark.parametrize("axis", ["axis", "dim"])
def test_a_reduction_may_be_asked_for_by_the_axis_that_it_takes(name, axis):
    x = Ragged.from_rows([np.array([1.0, 2.5], np.float32), np.array([3.0], np.float32)])
    mask = x > 1
    reduce = getattr(x, name)
    np.testing.assert_array_equal(reduce(**{axis: -1}), reduce())
    np.testing.assert_array_equal(reduce(where=mask, keepdims=False), reduce(mask))
    for wrong in (0, 1, (0, 1)):
        with pytest.raises(TypeError, match=r"not the axis .*x\.total\(\) one in all"):
            reduce(**{axis: wrong})
    for kept in ("keepdim", "keepdims"):
        with pytest.raises(TypeError, match=r"keeps no axis.*x - x\.mean\(\)"):
            reduce(**{axis: -1, kept: True})
    with pytest.raises(TypeError, match="over its candidates"):
        getattr(Ragged.from_rows([np.ones((2, 3), np.float32)]), name)(**{axis: -1})


def test_running_sums_take_no_other_axis():
    x = Ragged.from_rows([np.array([1.0, 2.0], np.float32)])
    for sums in (x.cumsum(-1), x.cumsum(axis=-1), x.cumsum(dim=-1)):
        assert sums[0].tolist() == [1, 3]
    with pytest.raises(TypeError, match="not the axis 1"):
        x.cumsum(1)


def test_a_deviation_of_0_has_a_derivative_of_0():
    x = Ragged.from_rows([np.array([3.0], np.float32), np.array([1.0, 2.0], np.float32)])
    grads = jax.grad(lambda tiles: Ragged(tiles, x.layout).std().sum())(x.tiles)
    assert [row.tolist() for row in Ragged(grads, x.layout)] == [[0], [-0.5, 0.5]]


def test_an_index_that_chooses_tokens_says_how_they_are_chosen():
    x = Ragged.from_rows([np.array([1.0, 2.0], np.float32), np.array([3.0], np.float32)])
    for index in ((slice(None), 0), x > 1, None, ..., [0, 1], 0.0):
        with pytest.raises(TypeError, match=r"x\[0::2\] are rows.*where=mask.*x\.last\(\)"):
            x[index]
    assert x[np.int64(1)].tolist() == [3.0]


def test_functions_of_torch_and_jax_say_what_to_write():
    x = Ragged.from_rows([np.array([1.0, 2.0], np.float32)])
    for function in (jnp.exp, lambda x: jnp.where(x > 1, x, 0), jnp.clip):
        with pytest.raises(TypeError, match=r"x\.map\(jnp\.exp\) or mask\.map\(jnp\.where, x, 0\)"):
            function(x)
    torch = pytest.importorskip("torch")
    for function, expected in (
        (torch.exp, r"exp takes no Ragged: write `x\.map\(jnp\.exp\)`"),
        (lambda x: torch.clamp(x, 0, 1), "clamp takes no Ragged: write `x.map.lambda"),
        (lambda x: torch.minimum(x, x), "minimum takes no Ragged: write"),
        (torch.sum, r"sum takes no Ragged: a Ragged is not an array.*x\.sum\(\)"),
    ):
        with pytest.raises(TypeError, match=expected):
            function(x)
