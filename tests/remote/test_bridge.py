"""The remote model as a JAX function, eager: what is called, what it gives, what goes wrong."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import Ragged, objectives
from mintjax.errors import DataError, NonFiniteError, StaleError
from mintjax.remote.logprobs import remote_logprobs

from ..examples import examples, some
from .double import Double, make

ONE_STEP = ["logprobs", "backward"]


def expected(data, by):
    """The derivative of the fixture's loss, times ``by``."""
    return [
        by * 2 * d.loss_fn_inputs["weights"].to_numpy() * d.loss_fn_inputs["logprobs"].to_numpy()
        for d in data
    ]


def assert_rows_close(got, want, rtol=1e-6):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7)


def test_a_call_is_a_forward_pass_and_gives_its_rows(remote, double, data):
    logprobs = remote(remote.params)
    assert isinstance(logprobs, Ragged)
    assert double.taken() == ["logprobs"]
    assert_rows_close(logprobs, [d.loss_fn_inputs["logprobs"].to_numpy() for d in data], 0)
    assert double.taken() == []
    assert remote.output is None


def test_grad_is_one_pass_of_each(loss, remote, double, data):
    receipt = jax.grad(loss)(remote.params)
    assert receipt.shape == ()
    assert receipt.dtype == jnp.float32
    assert receipt > 0
    assert double.taken() == ONE_STEP
    assert_rows_close(double.grads[0], expected(data, 1))
    assert set(remote.output.metrics) == {"loss:sum"}


GIVEN = [objectives.bradley_terry(), objectives.ppo(), objectives.dro(beta=0.2)]


@pytest.mark.parametrize(
    ("objective", "compiled"),
    [*((one, True) for one in GIVEN), *((one, False) for one in some(GIVEN, 3))],
    ids=lambda one: one if isinstance(one, bool) else type(one).__name__,
)
def test_an_objective_gets_what_the_two_phases_give_it(objective, compiled, data, double, remote):
    def whole(params):
        return objective(data, remote(params))

    step = jax.value_and_grad(whole, has_aux=True)
    (loss, metrics), _ = (jax.jit(step) if compiled else step)(remote.params)
    two_phase = mintjax.value_and_logprob_grads(
        objective, data, [d.loss_fn_inputs["logprobs"] for d in data]
    )
    assert remote.output is not None
    assert loss == pytest.approx(two_phase.loss, rel=1e-6)
    assert {"loss": loss, **metrics} == pytest.approx(two_phase.metrics, rel=1e-5)
    assert_rows_close(double.grads[0], two_phase.grads)


def test_candidates_keep_their_axis(double):
    data = mintjax.Batch(make((3, 6), trailing=(4,)))
    remote = remote_logprobs(double, data)
    jax.grad(lambda p: (remote(p) * remote(p)).total())(remote.params)
    assert [grad.shape for grad in double.grads[0]] == [(3, 4), (6, 4)]
    half = [2 * np.array(datum.loss_fn_inputs["logprobs"]) for datum in data]
    assert_rows_close([a + b for a, b in zip(*double.grads, strict=True)], half)


def test_a_list_of_datums_will_do(double):
    data = make()
    remote = remote_logprobs(double, data)
    objective = objectives.dro()
    jax.grad(lambda p: objective(data, remote(p))[0])(remote.params)
    weighted = [
        d.loss_fn_inputs["weights"].to_numpy() * d.loss_fn_inputs["advantages"].to_numpy()
        for d in data
    ]
    assert_rows_close(double.grads[0], [-row for row in weighted])


def test_rows_can_be_taken_one_by_one(remote, double, data):
    def loss(params):
        return sum((row**2).sum() * i for i, row in enumerate(remote(params)))

    jax.grad(loss)(remote.params)
    assert double.taken() == ONE_STEP
    rows = [d.loss_fn_inputs["logprobs"].to_numpy() for d in data]
    assert_rows_close(double.grads[0], [2 * i * row for i, row in enumerate(rows)])


def test_a_pullback_called_twice_is_two_backward_passes(loss, remote, double, data):
    _, pullback = jax.vjp(loss, remote.params)
    first, second = pullback(jnp.float32(1)), pullback(jnp.float32(3))
    assert double.taken() == ["logprobs", "backward", "backward"]
    assert_rows_close(double.grads[0], expected(data, 1))
    assert_rows_close(double.grads[1], expected(data, 3))
    assert first != second  # a receipt says which pass, not how large its gradient is


def test_the_loss_alone_may_be_compiled(remote, double, data):
    square = jax.jit(lambda logprobs, weights: (logprobs * logprobs * weights).total())
    jax.grad(lambda p: square(remote(p), data["weights"]))(remote.params)
    assert double.taken() == ONE_STEP
    assert_rows_close(double.grads[0], expected(data, 1))


def test_using_the_logprobs_often_costs_one_pass(remote, double, data):
    def loss(params):
        logprobs = remote(params)
        square = logprobs * logprobs * data["weights"]
        return square.sum()[0::2].sum() + 2 * square.total() + logprobs.total() * 0

    jax.grad(loss)(remote.params)
    assert double.taken() == ONE_STEP
    want = [row * (1.5 if i % 2 == 0 else 1) for i, row in enumerate(expected(data, 2))]
    assert_rows_close(double.grads[0], want)


def test_two_calls_are_two_passes_of_each(loss, remote, double, data):
    receipt = jax.grad(lambda p: loss(p) + 5 * loss(p))(remote.params)
    assert sorted(double.taken()) == ["backward", "backward", "logprobs", "logprobs"]
    total = [a + b for a, b in zip(*double.grads, strict=True)]
    assert_rows_close(total, expected(data, 6))
    assert receipt == int(receipt) > 2000


def test_a_datum_that_the_loss_ignores_travels_with_zeros(remote, double):
    jax.grad(lambda p: remote(p)[1:3].total())(remote.params)
    assert double.taken() == ONE_STEP
    assert [float(grad.sum()) for grad in double.grads[0]] == [0, 7, 5, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_that_ignores_all_has_no_backward_pass(compiled, remote, double):
    def loss(params):
        score = remote(params).total()
        return 0 * params, score

    step = jax.grad(loss, has_aux=True)
    receipt, score = (jax.jit(step) if compiled else step)(remote.params)
    assert np.isfinite(score)
    assert receipt == 0
    assert double.taken() == ["logprobs"]


def test_float64_elsewhere_changes_nothing(x64, remote, double):
    def loss(params):
        return (remote(params).tiles[:, :2] * np.float64(3)).sum()

    eager, compiled = jax.grad(loss)(remote.params), jax.jit(jax.grad(loss))(remote.params)
    assert eager.dtype == compiled.dtype == np.float32
    for grads in double.grads:
        assert {grad.dtype for grad in grads} == {np.dtype(np.float32)}
        assert [grad[:3].tolist() for grad in grads] == [[3, 3, 0]] * 4


@pytest.mark.parametrize("trailing", [(), (2,)])
def test_new_data_at_each_step_are_an_argument_of_one_program(double, trailing):
    remote, traces = remote_logprobs(Echo(), None), []

    @jax.jit
    def step(params, data):
        traces.append(1)

        def loss(params):
            logprobs = remote(params, data)
            return (logprobs * logprobs * data["weights"]).total()

        return jax.value_and_grad(loss)(params)

    for lengths in ((3, 7, 5, 4), (130, 2, 1, 9), (1, 1, 200, 1)):
        data = make(lengths, seed=sum(lengths), trailing=trailing)
        step(remote.params, mintjax.Batch(data))[1].block_until_ready()
        trainer = remote._trainer
        for seen, datum, got in zip(trainer.data, data, trainer.grads[-1], strict=True):
            assert seen.model_input.to_ints() == datum.model_input.to_ints()
            targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
            np.testing.assert_array_equal(seen.loss_fn_inputs["target_tokens"], targets)
            weights = datum.loss_fn_inputs["weights"].to_numpy()
            np.testing.assert_allclose(got, 2 * weights * -(targets / 256 + 1), rtol=1e-6)
        direct = jax.grad(lambda p, data=data: remote(p, data).map(jnp.square).total())
        assert direct(remote.params) > 0
    assert len(traces) == 1


class Echo(Double):
    """Answers logprobs that tell the targets, and keeps the data it was given."""

    def logprobs(self, data):
        self.data = data
        return [
            -(np.float32(datum.loss_fn_inputs["target_tokens"].to_numpy()) / 256 + 1)
            for datum in data
        ]


def test_a_slice_of_an_argument_and_columns_without_tokens_are_refused():
    remote = remote_logprobs(Echo())
    step = jax.jit(lambda p, data: remote(p, data[2:]).total())
    with pytest.raises(mintjax.ragged.RowAccessError):
        step(remote.params, mintjax.Batch(make()))
    padded = mintjax.Batch.from_padded({"target_tokens": np.ones((2, 3), int)}, lengths=[1, 3])
    with pytest.raises(mintjax.ragged.RowAccessError):
        remote(remote.params, padded)
    with pytest.raises(DataError, match="given no data"):
        remote(remote.params)


# What goes wrong


@pytest.mark.parametrize("failure", [ZeroDivisionError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ONE_STEP)
def test_what_the_trainer_raises_arrives_as_it_is(where, failure, loss, remote, double):
    double.failure[where] = failure
    with pytest.raises(type(failure)) as raised:
        jax.grad(loss)(remote.params)
    assert raised.value is failure
    double.failure.clear()
    double.taken()
    jax.grad(loss)(remote.params)
    assert double.taken() == ONE_STEP


KINDS = [ZeroDivisionError, mintjax.APIError, KeyboardInterrupt, StaleError]


@settings(max_examples=examples(20), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ONE_STEP), st.sampled_from(KINDS), st.text(max_size=50))
@example("logprobs", ZeroDivisionError, "before\0after")
def test_a_remote_jit_raises_what_the_trainer_raised(compiled_gradient, double, where, kind, words):
    double.failure[where] = failure = kind(words)
    with pytest.raises(kind) as raised:
        compiled_gradient()
    assert raised.value is failure
    double.failure.clear()
    double.taken()
    compiled_gradient()
    assert double.taken() == ONE_STEP


@pytest.fixture
def compiled_gradient(loss, remote, caplog):
    caplog.set_level("CRITICAL", logger="jax")  # JAX logs what a callback raises
    gradient = mintjax.remote_jit(jax.grad(loss))
    return lambda: gradient(remote.params)


def test_a_remote_jit_gives_what_jit_gives_and_leaves_other_errors_alone(loss, remote, double):
    both = mintjax.remote_jit(jax.value_and_grad(loss), donate_argnums=())
    value, receipt = both(remote.params)
    assert double.taken() == ONE_STEP
    assert receipt.shape == ()
    np.testing.assert_allclose(value, loss(remote.params), rtol=1e-6)

    def failing(params):
        jax.debug.callback(lambda: 1 / 0)
        return remote(params).total()

    with pytest.raises(jax.errors.JaxRuntimeError, match="ZeroDivisionError"):
        mintjax.remote_jit(failing)(remote.params)


def test_what_the_objective_raises_arrives_as_it_is(remote, double):
    class Mine(Exception):
        pass

    def failing(params):
        remote(params)
        raise Mine("here")

    with pytest.raises(Mine, match="here"):
        jax.grad(failing)(remote.params)
    assert double.taken() == ["logprobs"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("trailing", "position"), [((), 4), ((2,), 9)])
def test_a_gradient_that_is_not_finite_is_not_sent(bad, trailing, position, double):
    data = make((3, 6, 5), trailing=trailing)
    factors = [np.ones(d.loss_fn_inputs["weights"].shape, np.float32) for d in data]
    factors[1].flat[position] = bad
    remote = remote_logprobs(double, data)
    scale = Ragged.from_rows(factors)
    with pytest.raises(NonFiniteError, match=r"datum 1, position .*are: .*weights") as raised:
        jax.grad(lambda p: (remote(p) * scale).total())(remote.params)
    assert raised.value.datum == 1
    assert raised.value.position == position
    assert double.taken() == ["logprobs"]
    assert remote.output is None


@pytest.mark.parametrize(
    "params", [0.0, None, np.zeros(1, np.float32), np.float64(0), jnp.int32(0)]
)
def test_params_that_are_no_token_are_refused(params, remote, double):
    with pytest.raises(TypeError, match=r"float32 scalar, such as remote\.params"):
        remote(params)
    assert double.taken() == []


def test_params_of_another_version_are_refused(remote, double):
    with pytest.raises(StaleError, match=r"version 1.*at version 0"):
        remote(remote.params + 1)
    with pytest.raises(StaleError, match=r"version 0\.5"):
        remote(remote.params + 0.5)
    assert double.taken() == []


def test_data_that_cannot_be_used_are_refused_at_once(double):
    with pytest.raises(DataError, match="no datum"):
        remote_logprobs(double, [])
    data = make((2, 3))
    del data[1].loss_fn_inputs["target_tokens"]
    with pytest.raises(DataError, match="datum 1, field 'target_tokens'"):
        remote_logprobs(double, data)
    assert double.taken() == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: rows[:-1], "3 rows for 4 datums"),
        (lambda rows: [*rows[:2], rows[2][1:], rows[3]], r"datum 2, .*shape \[4\].*shape \[5\]"),
    ],
)
def test_logprobs_that_do_not_fit_are_refused(answer, message, data):
    class Wrong(Double):
        def logprobs(self, data):
            return answer(super().logprobs(data))

    remote = remote_logprobs(Wrong(), data)
    with pytest.raises(DataError, match=message):
        remote(remote.params)


def test_versions_do_not_keep_a_trainer_alive(data):
    double = Double()
    gone = weakref.ref(double)
    remote_logprobs(double, data)
    del double
    gc.collect()
    assert gone() is None


def test_its_batch_is_the_data_that_it_was_made_of(remote, data):
    assert list(remote.batch) == list(data)
    rows = [datum.loss_fn_inputs["weights"] for datum in data]
    for row, expected in zip(remote.batch["weights"], rows, strict=True):
        np.testing.assert_array_equal(row, expected)
