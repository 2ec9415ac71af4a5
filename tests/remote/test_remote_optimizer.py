"""The remote optimizer: optax's interface, hyperparameters by schedule, versions that must fit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mintjax import objectives
from mintjax.errors import DataError, StaleError, TransformationError
from mintjax.remote.optimizer import RemoteOptimizerState, remote_optimizer
from mintjax.remote.versions import versions_of
from mintjax.types import AdamParams

from ..examples import some

STEP = ["logprobs", "backward", "optim_step"]


apply_updates: Any = optax.apply_updates  # optax types its result as any tree there is


@pytest.fixture(autouse=True)
def quiet(caplog):
    """JAX logs what a callback raises, and then raises it."""
    caplog.set_level("CRITICAL", logger="jax")


def test_a_loop_reads_like_any_other(loss, remote, double):
    optimizer = remote_optimizer(double, 1e-2)
    params = remote.params
    state = optimizer.init(params)
    losses = []
    for i in range(3):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        params = apply_updates(params, updates)
        losses.append(float(value))
        assert params == remote.params == i + 1
    assert double.taken() == STEP * 3
    assert double.steps == [AdamParams(learning_rate=1e-2)] * 3
    assert losses == sorted(losses)  # each step lowers the double's logprobs, which are negative
    assert jax.tree.leaves(state) == [3]


def test_defaults_are_those_of_adam_params(double, loss, remote):
    optimizer = remote_optimizer(double)
    state = optimizer.init(remote.params)
    optimizer.update(jax.grad(loss)(remote.params), state, remote.params)
    assert double.steps == [AdamParams()]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "0.1", None])
def test_a_hyperparameter_is_a_finite_number(double, wrong):
    with pytest.raises(DataError, match="field 'learning_rate'"):
        remote_optimizer(double, wrong)
    with pytest.raises(DataError, match="field 'beta2'"):
        remote_optimizer(double, beta2=wrong)


def test_a_schedule_gives_finite_numbers(double, loss, remote):
    optimizer = remote_optimizer(double, lambda count: jnp.float32("nan"))
    state = optimizer.init(remote.params)
    grads = jax.grad(loss)(remote.params)
    with pytest.raises(Exception, match="field 'learning_rate': nan is not finite"):
        optimizer.update(grads, state, remote.params)
    assert double.steps == []


@pytest.mark.parametrize("compiled", [False, True])
def test_every_hyperparameter_may_be_a_schedule(compiled, loss, remote, double):
    optimizer = remote_optimizer(
        double,
        optax.linear_schedule(1e-2, 0.0, 4),
        beta1=lambda count: 0.9 - 0.1 * count,
        beta2=0.99,
        eps=optax.constant_schedule(1e-6),
        weight_decay=optax.piecewise_constant_schedule(0.1, {1: 0.5}),
        grad_clip_norm=optax.linear_schedule(1.0, 2.0, 2),
    )

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    params = remote.params
    state = optimizer.init(params)
    for _ in range(3):
        params, state = step(params, state)
    jax.block_until_ready(params)
    assert double.taken() == STEP * 3
    got = [
        (s.learning_rate, s.beta1, s.eps, s.weight_decay, s.grad_clip_norm) for s in double.steps
    ]
    want = [(1e-2, 0.9, 1e-6, 0.1, 1), (7.5e-3, 0.8, 1e-6, 0.05, 1.5), (5e-3, 0.7, 1e-6, 0.05, 2)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert {s.beta2 for s in double.steps} == {0.99}  # numbers are not rounded to float32


def test_a_whole_run_may_be_one_scan(loss, remote, double):
    optimizer = remote_optimizer(double)

    def body(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (apply_updates(params, updates), state), value

    @jax.jit
    def run(params):
        return jax.lax.scan(body, (params, optimizer.init(params)), None, length=4)

    (params, state), losses = run(remote.params)
    assert double.calls == STEP * 4
    assert params == remote.params == 4
    assert state.count == 4
    assert (np.diff(losses) > 0).all()


def test_it_is_one_optimizer_among_others(loss, remote, double):
    def whole(params):
        return params["temperature"] * loss(params["remote"])

    optimizer = optax.multi_transform(
        {"remote": remote_optimizer(double, 1e-3), "here": optax.sgd(1e-3)},
        {"remote": "remote", "temperature": "here"},
    )
    params = {"remote": remote.params, "temperature": jnp.float32(1)}
    state = optimizer.init(params)
    updates, state = optimizer.update(jax.grad(whole)(params), state, params)
    params = apply_updates(params, updates)
    assert params["remote"] == 1
    assert params["temperature"] < 1
    assert double.taken() == STEP


def test_gradients_of_several_batches_add_up(loss, remote, double):
    optimizer = remote_optimizer(double)
    params = remote.params
    state = optimizer.init(params)
    grads = jax.grad(loss)(params) + jax.grad(lambda p: loss(p) + loss(p))(params)
    optimizer.update(grads, state, params)
    assert double.taken().count("optim_step") == 1


# What does not fit


@pytest.fixture
def started(loss, remote, double):
    """An optimizer that has taken one step: itself, its state, and params and grads of before."""
    optimizer = remote_optimizer(double)
    params = remote.params
    state = optimizer.init(params)
    grads = jax.grad(loss)(params)
    _, state = optimizer.update(grads, state, params)
    double.taken()
    return optimizer, state, params, grads


def test_the_same_update_twice_is_stale(started, double):
    optimizer, state, params, grads = started
    with pytest.raises(StaleError, match=r"params of version 0, .* at version 1"):
        optimizer.update(grads, state, params)
    assert double.taken() == []


def test_old_gradients_are_stale(started, remote, double, loss):
    optimizer, state, _, grads = started
    with pytest.raises(StaleError, match="these gradients are stale"):
        optimizer.update(grads, state, remote.params)
    new = jax.grad(loss)(remote.params)
    with pytest.raises(StaleError, match="not those of version 1: 1 backward pass"):
        optimizer.update(grads, state, remote.params)
    assert "optim_step" not in double.taken()
    optimizer.update(new, state, remote.params)
    assert double.taken() == ["optim_step"]


@pytest.mark.parametrize("passes", some([1, 2, 3, 100], 3))
@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: 0.5 * g,
        lambda g: -g,
        lambda g: g + 1,
        lambda g: 0 * g,
        lambda g: (1 + 1e-6) * g,
        lambda g: jnp.clip(g, -100, 100),
        lambda g: g * jnp.minimum(1, 1000 / jnp.abs(g)),
        lambda g: g.astype(jnp.bfloat16).astype(jnp.float32) + 1,
    ],
)
def test_gradients_that_are_not_all_there_is_are_refused(passes, spoil, started, remote, double):
    optimizer, state, _, _ = started
    _, pullback = jax.vjp(lambda p: remote(p).total(), remote.params)
    grads = sum(pullback(jnp.float32(1))[0] for _ in range(passes))
    double.taken()
    with pytest.raises(StaleError, match=f"{passes} backward pass"):
        optimizer.update(spoil(grads), state, remote.params)
    assert double.taken() == []
    optimizer.update(grads, state, remote.params)
    assert double.taken() == ["optim_step"]


@pytest.mark.parametrize("compiled", [False, True])
def test_one_gradient_twice_is_not_two(compiled, started, remote, double, loss):
    optimizer, state, _, _ = started
    step = jax.jit(jax.grad(loss)) if compiled else jax.grad(loss)
    one, other, third = (step(remote.params) for _ in range(3))
    for wrong in (3 * one, one + 2 * other, one + other + other, 1.5 * (one + third)):
        with pytest.raises(StaleError, match="3 backward passes have accumulated"):
            optimizer.update(wrong, state, remote.params)
    with pytest.raises(StaleError, match="3 backward passes"):
        optimizer.update((one + other + third) / 3, state, remote.params)
    assert "optim_step" not in double.taken()
    optimizer.update(third + (other + one), state, remote.params)
    assert double.taken() == ["optim_step"]


def test_a_thousand_passes_are_told_apart_and_too_many_refused(double):
    versions = versions_of(double)
    receipts = [versions.receipt() for _ in range(2048)]
    assert min(receipts) > 1000
    total = np.sum(receipts, dtype=np.float32)
    versions.check_receipts(total)
    for wrong in (total - receipts[0] + receipts[1], total - receipts[-1] + receipts[-2]):
        with pytest.raises(StaleError, match="2048 backward passes"):
            versions.check_receipts(wrong)
    with pytest.raises(StaleError, match="as many as their receipts can be told apart"):
        _ = [versions.receipt() for _ in range(10_000)]
    versions.step()
    versions.check_receipts(versions.receipt())


def test_apply_if_finite_passes_the_receipt_on(loss, remote, double):
    optimizer = optax.apply_if_finite(remote_optimizer(double), 3)
    params = remote.params
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = apply_updates(params, updates)
    assert params == remote.params == 2
    assert double.taken() == STEP * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_under_strict_settings(compiled, loss, remote, double):
    optimizer = remote_optimizer(double, optax.linear_schedule(1e-2, 0.0, 4))

    def step(params, state):
        grads = jax.grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state

    step = jax.jit(step) if compiled else step
    for wide in (False, True):
        with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
            params = remote.params
            params, _ = step(params, optimizer.init(params))
            assert params.dtype == jnp.float32
            jax.block_until_ready(params)
    assert double.taken() == STEP * 2


def test_the_bridge_moves_its_own_arrays_under_a_transfer_guard(loss, remote, double):
    """JAX refuses its own constants of eager derivatives, and of ordered callbacks under jit."""
    optimizer = remote_optimizer(double, optax.linear_schedule(1e-2, 0.0, 4))
    grads = jax.grad(loss)(remote.params)
    with jax.transfer_guard("disallow"):
        params = remote.params
        assert remote(params).sum().shape == (4,)
        updates, _ = optimizer.update(grads, RemoteOptimizerState(count=jax.device_put(0)), params)
        assert apply_updates(params, updates) == remote.params
    assert "optim_step" in double.taken()


@pytest.mark.parametrize("name", ["bradley_terry", "ppo", "cross_entropy"])
def test_objectives_move_their_own_arrays_under_a_transfer_guard(name, remote, double):
    """``jax.grad`` cannot: JAX refuses its own seed of a derivative; ``jax.vjp`` is given one.

    The transpose of a slice, which pairs are taken by, has such a constant of JAX's own, too.
    """
    objective, seed, params = getattr(objectives, name)(), jnp.float32(1), remote.params
    expected = objective(remote.batch, remote(params))[0]
    with jax.transfer_guard("disallow"):
        value, metrics = objective(remote.batch, remote(params))
        if name != "bradley_terry":
            _, pullback, _ = jax.vjp(
                lambda params: objective(remote.batch, remote(params)), params, has_aux=True
            )
            pullback(seed)
    assert float(value) == float(expected)
    assert all(isinstance(metric, jax.Array) for metric in metrics.values())
    assert double.taken().count("backward") == (name != "bradley_terry")


def test_a_pass_left_out_is_named(started, remote, double, loss):
    optimizer, state, _, _ = started
    jax.grad(loss)(remote.params)
    grads = jax.grad(loss)(remote.params)
    with pytest.raises(StaleError, match="2 backward passes have accumulated"):
        optimizer.update(grads, state, remote.params)
    assert "optim_step" not in double.taken()


def test_init_takes_what_accumulated_as_gone(started, remote, double, loss):
    optimizer, _, _, _ = started
    jax.grad(loss)(remote.params)
    state = optimizer.init(remote.params)
    optimizer.update(jax.grad(loss)(remote.params), state, remote.params)
    assert double.taken().count("optim_step") == 1


def test_no_backward_pass_is_no_update(started, remote, double):
    optimizer, state, _, _ = started
    with pytest.raises(StaleError, match="no backward pass was run"):
        optimizer.update(jnp.float32(0), state, remote.params)
    assert double.taken() == []


def test_a_pullback_does_not_outlive_its_version(loss, remote, double):
    optimizer = remote_optimizer(double)
    state = optimizer.init(remote.params)
    _, pullback = jax.vjp(loss, remote.params)
    optimizer.update(pullback(jnp.float32(1))[0], state, remote.params)
    double.taken()
    with pytest.raises(StaleError, match="params of version 0"):
        pullback(jnp.float32(1))
    assert double.taken() == []


def test_stale_gradients_are_refused_under_jit_too(started, remote, double):
    optimizer, state, _, grads = started
    with pytest.raises(Exception, match="StaleError: these gradients are stale"):
        jax.block_until_ready(jax.jit(optimizer.update)(grads, state, remote.params))
    assert double.taken() == []


def test_a_step_that_fails_is_not_counted(loss, remote, double):
    optimizer = remote_optimizer(double)
    params = remote.params
    state = optimizer.init(params)
    grads = jax.grad(loss)(params)
    double.failure["optim_step"] = ConnectionError("down")
    with pytest.raises(ConnectionError, match="down"):
        optimizer.update(grads, state, params)
    double.failure.clear()
    updates, _ = optimizer.update(grads, state, params)
    assert apply_updates(params, updates) == remote.params == 1


@pytest.mark.parametrize("params", [None, {"a": jnp.float32(0), "b": jnp.float32(0)}, jnp.zeros(2)])
def test_params_that_are_no_token_are_refused(params, double):
    optimizer = remote_optimizer(double)
    with pytest.raises(TypeError, match="each a scalar"):
        optimizer.init(params)
    with pytest.raises(TypeError, match="each a scalar"):
        optimizer.update(jnp.float32(1), optimizer.init(jnp.float32(0)), params)
    assert double.taken() == []


def test_an_update_has_no_derivative(started, remote, double, loss):
    optimizer, state, _, _ = started
    grads = jax.grad(loss)(remote.params)
    double.taken()
    with pytest.raises(TransformationError, match="remote model"):
        jax.grad(lambda g: optimizer.update(g, state, remote.params)[0])(grads)
    assert double.taken() == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda optimizer: optax.chain(optax.clip_by_global_norm(2.0), optimizer),
        lambda optimizer: optax.chain(optimizer, optax.scale(2.0)),
        lambda optimizer: optax.chain(optax.add_decayed_weights(0.1), optimizer),
        lambda optimizer: optax.MultiSteps(optimizer, every_k_schedule=2),
        lambda optimizer: optax.named_chain(("clip", optax.clip(1.0)), ("remote", optimizer)),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_would_change_the_receipt_is_refused_before_anything_is_sent(
    remote, double, wrap, compiled
):
    optimizer = wrap(remote_optimizer(double))
    init = jax.jit(optimizer.init) if compiled else optimizer.init
    with pytest.raises(TransformationError, match=r"inside optax's .*grad_clip_norm="):
        init(remote.params)
    assert not double.steps
