"""AdamW against NumPy in 64 bits, written from torch's documentation."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.errors import DataError
from mintjax.local import optimizer
from mintjax.types import AdamParams


def oracle(weight, gradients, params):
    """``torch.optim.AdamW``, one of ``params`` per step, after ``clip_grad_norm_``."""
    weight = weight.astype(np.float64)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, (gradient, p) in enumerate(zip(gradients, params, strict=True), 1):
        gradient = gradient.astype(np.float64)
        norm = np.linalg.norm(gradient)
        if p.grad_clip_norm and norm > p.grad_clip_norm:
            gradient = gradient * p.grad_clip_norm / norm
        weight = weight * (1 - p.learning_rate * p.weight_decay)
        mean = p.beta1 * mean + (1 - p.beta1) * gradient
        square = p.beta2 * square + (1 - p.beta2) * gradient**2
        corrected = np.sqrt(square / (1 - p.beta2**step)) + p.eps
        weight = weight - p.learning_rate * mean / (1 - p.beta1**step) / corrected
    return weight


adam_params = st.builds(
    AdamParams,
    learning_rate=st.floats(1e-5, 1e-1),
    beta1=st.floats(0, 0.95),
    beta2=st.floats(0, 0.99),
    eps=st.sampled_from([1e-12, 1e-8, 1e-2, 1e3]),
    weight_decay=st.sampled_from([0.0, 0.01, 1.0]),
    grad_clip_norm=st.sampled_from([0.0, 0.1, 1.0, 1e6]),
)


@given(st.lists(adam_params, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_is_torch_s_adamw(params, seed):
    source = np.random.default_rng(seed)
    weight = source.normal(size=7).astype(np.float32)
    gradients = [source.normal(size=7).astype(np.float32) for _ in params]
    lora = {"w": jnp.asarray(weight)}
    state = optimizer.init(lora)
    for gradient, p in zip(gradients, params, strict=True):
        lora, state, norm = optimizer.step(lora, state, {"w": jnp.asarray(gradient)}, 1, p)
        np.testing.assert_allclose(norm, np.linalg.norm(gradient), rtol=1e-5)
    np.testing.assert_allclose(lora["w"], oracle(weight, gradients, params), rtol=2e-4, atol=2e-5)


def test_the_divisor_comes_before_the_clip():
    lora = {"w": jnp.zeros(2)}
    params = AdamParams(learning_rate=1e-1 * 1e3, eps=1e3, grad_clip_norm=1.0)
    gradient = {"w": jnp.array([3.0, 4.0])}
    new, _, norm = optimizer.step(lora, optimizer.init(lora), gradient, 10.0, params)
    assert float(norm) == pytest.approx(0.5)
    np.testing.assert_allclose(new["w"], [-0.03, -0.04], rtol=1e-3)


def test_a_zero_gradient_moves_nothing_at_first():
    lora = {"w": jnp.ones(3)}
    new, _, _ = optimizer.step(lora, optimizer.init(lora), {"w": jnp.zeros(3)}, 1, AdamParams())
    np.testing.assert_array_equal(new["w"], 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1e-4),
        ("learning_rate", float("inf")),
        ("learning_rate", float("nan")),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", -1e-8),
        ("weight_decay", float("nan")),
        ("grad_clip_norm", -1.0),
    ],
)
def test_names_what_is_out_of_range(field, value):
    with pytest.raises(DataError, match=f"adam_params.{field}"):
        optimizer.check_params(AdamParams(**{field: value}))
