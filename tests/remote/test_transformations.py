"""JAX's transformations of the bridge: they work, or they say so before anything is sent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax.errors import TransformationError
from mintjax.remote.optimizer import RemoteOptimizerState, remote_optimizer

ONE_STEP = ["logprobs", "backward"]


@pytest.fixture(autouse=True)
def quiet(caplog):
    """JAX logs what a callback raises, and then raises it."""
    caplog.set_level("CRITICAL", logger="jax")


JITTED = {
    "jit(grad)": lambda f: jax.jit(jax.value_and_grad(f)),
    "grad(jit)": lambda f: jax.value_and_grad(jax.jit(f)),
    "jit(grad(jit))": lambda f: jax.jit(jax.value_and_grad(jax.jit(f))),
}


@pytest.mark.parametrize("name", JITTED)
def test_a_compiled_step_asks_the_trainer_each_time(name, loss, remote, double):
    step, params = JITTED[name](loss), remote.params
    value, receipt = step(params)
    assert double.taken() == ONE_STEP
    double.steps.append("one that went past the bridge")  # the model is another now
    again, same = step(params)
    jax.block_until_ready(same)
    assert double.taken() == ONE_STEP
    assert again > value + 1
    assert same != receipt  # each pass has its own
    eager, _ = jax.value_and_grad(loss)(params)
    assert again == pytest.approx(float(eager), rel=1e-6)
    for compiled, direct in zip(double.grads[1], double.grads[2], strict=True):
        np.testing.assert_allclose(compiled, direct, rtol=1e-6)


@pytest.mark.parametrize("name", JITTED)
def test_tracing_sends_nothing(name, loss, remote, double):
    step, params = JITTED[name](loss), remote.params
    jax.eval_shape(step, params)
    jax.make_jaxpr(step)(params)
    jax.jit(step).lower(params).compile()
    assert double.taken() == []


def test_constant_params_are_not_baked_in(loss, remote, double):
    params = remote.params
    step = jax.jit(lambda: jax.value_and_grad(loss)(params))
    step.lower().compile()
    assert double.taken() == []
    first, _ = step()
    double.steps.append("one that went past the bridge")
    second, receipt = step()
    jax.block_until_ready(receipt)
    assert second > first + 1
    assert double.taken() == ONE_STEP * 2


def test_a_compiled_forward_pass(remote, double):
    total = jax.jit(lambda p: remote(p).total())
    direct = remote(remote.params).total()
    assert total(remote.params) == pytest.approx(float(direct), rel=1e-6)
    assert double.taken() == ["logprobs"] * 2


def test_rows_can_be_taken_one_by_one_under_jit(remote, double):
    step = jax.jit(jax.grad(lambda p: sum(i * row.sum() for i, row in enumerate(remote(p)))))
    jax.block_until_ready(step(remote.params))
    assert [set(grad.tolist()) for grad in double.grads[0]] == [{0.0}, {1.0}, {2.0}, {3.0}]


@pytest.mark.parametrize("where", ONE_STEP)
def test_under_jit_an_exception_leaves_its_message(where, loss, remote, double):
    step = jax.jit(jax.grad(loss))
    double.failure[where] = ZeroDivisionError("what the trainer said")
    with pytest.raises(Exception, match="ZeroDivisionError: what the trainer said"):
        jax.block_until_ready(step(remote.params))
    double.failure.clear()
    double.taken()
    jax.block_until_ready(step(remote.params))
    assert double.taken() == ONE_STEP


def test_under_jit_a_gradient_that_is_not_finite_is_not_sent(remote, double):
    step = jax.jit(jax.grad(lambda p: remote(p).map(jnp.sqrt).total()))
    with pytest.raises(Exception, match=r"NonFiniteError: .*nan at datum 0, position 0"):
        jax.block_until_ready(step(remote.params))
    assert double.taken() == ["logprobs"]


def test_scan_takes_steps_in_order(loss, remote, double):
    def body(params, _):
        return params, jax.grad(loss)(params)

    _, receipts = jax.lax.scan(body, remote.params, None, length=3)
    jax.block_until_ready(receipts)
    assert double.taken() == ONE_STEP * 3
    assert (receipts > 0).all()


def test_grad_of_a_scan_adds_up(loss, remote, double):
    def total(params):
        return jax.lax.scan(lambda sum, x: (sum + x * loss(params), None), 0.0, jnp.arange(1.0, 4))

    receipt, _ = jax.grad(total, has_aux=True)(remote.params)
    jax.block_until_ready(receipt)
    assert double.taken().count("backward") == 3
    receipt += jax.grad(loss)(remote.params)
    optimizer = remote_optimizer(double)  # takes the sum of four receipts for what it is
    optimizer.update(receipt, RemoteOptimizerState(jnp.int32(0)), remote.params)
    assert double.taken().count("optim_step") == 1
    for *parts, whole in zip(*double.grads, strict=True):
        np.testing.assert_allclose(sum(parts), 6 * whole, rtol=1e-5)


def test_cond_runs_the_branch_taken(loss, remote, double):
    def either(params, choose):
        return jax.lax.cond(choose, loss, lambda params: 0 * params, params)

    step = jax.jit(jax.grad(either))
    jax.block_until_ready(step(remote.params, True))
    assert double.taken() == ONE_STEP
    jax.block_until_ready(step(remote.params, False))
    assert double.taken() == []


@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_over_something_else_shares_the_passes(compiled, loss, remote, double):
    def whole(params):
        return jax.vmap(lambda x: x * loss(params))(jnp.arange(1.0, 4)).sum()

    step = jax.grad(whole)
    receipt = (jax.jit(step) if compiled else step)(remote.params)
    assert receipt > 1000
    assert double.taken() == ONE_STEP


@pytest.mark.parametrize("compiled", [False, True])
def test_jacrev_is_a_backward_pass_for_each_output(compiled, remote, double):
    step = jax.jacrev(lambda p: remote(p).sum()[:3])
    receipts = (jax.jit(step) if compiled else step)(remote.params)
    assert len(set(receipts.tolist())) == 3
    assert double.taken() == ["logprobs", "backward", "backward", "backward"]
    sums = [[float(grad.sum()) for grad in grads] for grads in double.grads]
    assert sums == [[3, 0, 0, 0], [0, 7, 0, 0], [0, 0, 5, 0]]


REFUSED = {
    "vmap": lambda f, p: jax.vmap(f)(jnp.stack([p, p])),
    "vmap(grad)": lambda f, p: jax.vmap(jax.grad(f))(jnp.stack([p, p])),
    "vmap(jit)": lambda f, p: jax.vmap(jax.jit(f))(jnp.stack([p, p])),
    "jit(vmap(grad))": lambda f, p: jax.jit(jax.vmap(jax.grad(f)))(jnp.stack([p, p])),
    "jvp": lambda f, p: jax.jvp(f, (p,), (p,)),
    "jit(jvp)": lambda f, p: jax.jit(lambda p: jax.jvp(f, (p,), (p,)))(p),
    "jacfwd": lambda f, p: jax.jacfwd(f)(p),
    "hessian": lambda f, p: jax.hessian(f)(p),
    "jacrev(jacrev)": lambda f, p: jax.jacrev(jax.jacrev(f))(p),
    "grad(grad)": lambda f, p: jax.grad(jax.grad(f))(p),
    "jit(grad(grad))": lambda f, p: jax.jit(jax.grad(jax.grad(f)))(p),
    "grad(jit(grad))": lambda f, p: jax.grad(jax.jit(jax.grad(f)))(p),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_trainer_can_follow_is_refused_before_anything_is_sent(name, loss, remote, double):
    with pytest.raises(TransformationError, match="remote model"):
        REFUSED[name](loss, remote.params)
    assert double.taken() == []


def test_jvp_of_jit_is_refused_by_jax(loss, remote, double):
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
        jax.jvp(jax.jit(loss), (remote.params,), (remote.params,))
    assert double.taken() == []


@pytest.mark.parametrize("jit", [False, True])
def test_checkpoint_is_refused_by_jax(jit, loss, remote, double):
    step = jax.grad(jax.checkpoint(loss))
    with pytest.raises(NotImplementedError, match=r"Effects not supported .*`checkpoint`"):
        (jax.jit(step) if jit else step)(remote.params)
    assert double.taken() == []


def test_a_derivative_through_a_gradient_changes_nothing_on_the_trainer(loss, remote, double):
    def of_x(x):
        return jax.grad(lambda p: x * loss(p))(remote.params)

    with pytest.raises(TransformationError, match="stop_gradient"):
        jax.grad(of_x)(1.0)
    assert "backward" not in double.taken()
