import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.gradients import interpreted

x = np.random.default_rng(0).standard_normal(12).astype(np.float32)
m = x.reshape(3, 4)

PROGRAMS = {
    "transcendental": lambda x: jnp.exp(x) + jnp.log1p(x**2) + jnp.tanh(x) - jnp.expm1(-x) / 2,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "log_sigmoid": jax.nn.log_sigmoid,
    "logsumexp": jax.nn.logsumexp,
    "powers": lambda x: x**3 + x**-2 + jnp.sqrt(abs(x)) + jax.lax.rsqrt(abs(x)) + abs(x) ** 0.3,
    "comparisons": lambda x: jnp.where((x > 0) & (x < 1) | ~(x >= -1), x, -2 * x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.7) + jnp.sign(x) + jnp.floor(x) + jnp.ceil(x),
    "clamp": lambda x: jax.lax.clamp(-0.5, x, 0.7),
    "reductions": lambda x: x.max() + x.min() + x.prod() + x.mean() + x.var() + x.argmax(),
    "logical": lambda x: 1.0 * (x > 5).any() + (x < 5).all() + jnp.isfinite(x).sum(),
    "slices": lambda x: x[2:9:3].sum() + x[::-1][:4].sum() + x[-1],
    "pad": lambda x: jnp.pad(x, (2, 3)).cumsum()[::2],
    "gather": lambda x: x[np.array([3, 1, 3])] * jnp.arange(3),
    "concatenate": lambda x: jnp.concatenate([x[:3], x * 2]).reshape(5, 3).T,
    "stack": lambda x: jnp.stack([x, -x]).sum(0),
    "split": lambda x: sum(part.sum() * i for i, part in enumerate(jnp.split(x, [2, 5]))),
    "cumulative": lambda x: (
        x.cumsum() + jax.lax.cummax(x) + jnp.cumprod(x) - jax.lax.cumsum(x, reverse=True)
    ),
    "dot": lambda x: jnp.dot(x, x) + (x.reshape(3, 4) @ x.reshape(4, 3)).sum(),
    "batched_dot": lambda x: jnp.einsum("bij,bjk->bik", x.reshape(2, 3, 2), x.reshape(2, 2, 3)),
    "sort": lambda x: jnp.sort(x) * jnp.arange(12.0),
    "sort by two": lambda x: jax.lax.sort((jnp.floor(x), x, 2 * x), num_keys=2)[2] * x,
    "argsort": lambda x: x[jnp.argsort(-jnp.round(x))] * jnp.arange(12.0),
    "top_k": lambda x: jax.lax.top_k(jnp.round(x, 1), 4)[0] * jax.lax.top_k(jnp.round(x), 4)[1],
    "quantile": lambda x: jnp.quantile(x, 0.3) + jnp.median(x),
    "error function": lambda x: jax.scipy.special.erf(x) + jax.nn.gelu(x, approximate=False),
    "gamma": lambda x: jax.scipy.special.gammaln(x**2 + 1) * jax.scipy.special.digamma(x**2 + 1),
    "trigonometry": lambda x: (
        (jnp.tan(x / 4) + jnp.sinh(x) + jnp.cosh(x) + jnp.arcsinh(x) + jnp.arccosh(x**2 + 2))
        + (jnp.arcsin(x / 9) + jnp.arccos(x / 9) + jnp.arctanh(x / 9) + jnp.arctan2(x, x**2 + 1))
    ),
    "remainders": lambda x: jnp.mod(x, 0.7) + jnp.fmod(x, 0.3) + jnp.cbrt(x - 5) + jnp.round(9 * x),
    "half away": lambda x: jax.lax.round(jnp.round(4 * x) / 2) * x,
    "whole numbers": lambda x: (
        (jnp.arange(-6, 6) // jnp.arange(-3, 9) + jnp.arange(-6, 6) % jnp.arange(-3, 9)) * x
        + (jnp.array([1e20, -1e20, jnp.nan, 7.9, -7.9, jnp.inf] * 2)).astype(jnp.int32) * 1e-9
    ),
    "tile": lambda x: jnp.tile(x, 2) * jnp.repeat(x, 2),
    "loop": lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jnp.sin(y), x),
    "barrier": lambda x: sum(jax.lax.optimization_barrier((jnp.exp(x), 2 * x))),
    "remat": lambda x: jax.checkpoint(jnp.exp)(x),
    "jit": lambda x: jax.jit(lambda y: y * 2 + jnp.cos(y))(x),
    "integers": lambda x: (jnp.arange(12) // 5 + jnp.arange(12) % 5 + x.astype(jnp.int32)) * x,
    "select": lambda x: jax.lax.select_n(jnp.arange(12) % 3, x, -x, 2 * x),
    "logistic": lambda x: jax.nn.sigmoid(x) + jax.nn.softplus(x) + jax.nn.relu(x),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_value_and_gradient_are_jaxs_own(name):
    program = PROGRAMS[name]

    def run(x):
        return jnp.sum(program(x)), jax.grad(lambda x: jnp.sum(program(x)))(x), program(x)

    got = interpreted.evaluate(jax.make_jaxpr(run)(x), [x])
    want = jax.jit(run)(x)
    for g, w in zip(got, want, strict=True):
        assert isinstance(g, np.ndarray)
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config", [[(1, 2, 0)], [(-1, 2, 0)], [(2, -3, 1)], [(-2, -2, 2)], [(0, 0, 3)]]
)
def test_padding_may_be_negative_and_between(config):
    got = interpreted._pad(x, np.float32(7), config)
    np.testing.assert_array_equal(got, jax.lax.pad(x, np.float32(7), config))


@given(st.integers(0, 9999), st.sampled_from(["f4", "f8", "i4", "i8", "?"]))
def test_a_choice_by_bits_is_the_choice_of_numpy(seed, dtype):
    rng = np.random.default_rng(seed)
    cases = [rng.integers(-9, 9, n).astype(dtype) for n in (5000, int(rng.choice([1, 5000])))]
    if cases[0].dtype.kind == "f":
        for case in cases:
            case[::7] = rng.choice([np.nan, np.inf, -np.inf, -0.0], case[::7].shape)
    which = rng.random(5000) < 0.5
    if rng.random() < 0.5:
        cases = [np.asarray(rng.choice([0.0, -0.0, 1.0, 2.0, 0.1]), dtype) for _ in cases]
    got, want = interpreted._choose(which, *cases), np.where(which, cases[1], cases[0])
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


def test_infinities_are_values_and_not_warnings():
    closed = jax.make_jaxpr(lambda x: (jnp.exp(x * 1e4), jnp.log(x * 0), 0 / (x * 0)))(x)
    for value in interpreted.evaluate(closed, [x]):
        assert not np.isfinite(value).all()
