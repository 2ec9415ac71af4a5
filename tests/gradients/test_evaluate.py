import dataclasses
import functools
import importlib.util
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import (
    Batch,
    Datum,
    ModelInput,
    Ragged,
    losses,
    objectives,
    value_and_logprob_grads,
    with_column,
)
from mintjax.errors import DataError, NonFiniteError, ObjectiveError
from mintjax.gradients.evaluate import constant_logprob_grads
from mintjax.gradients.torch import torch_objective

from ..examples import THOROUGH, examples


def make(sizes, seed=0, **columns):
    """Datums with the usual columns, and logprobs for them."""
    rng = np.random.default_rng(seed)
    data, logprobs = [], []
    for n in sizes:
        row = -rng.exponential(size=n).astype(np.float32)
        logprobs.append(row)
        inputs = {
            "target_tokens": rng.integers(0, 256, n),
            "weights": (rng.random(n) < 0.7).astype(np.float32),
            "logprobs": row + 0.3 * rng.standard_normal(n).astype(np.float32),
            "advantages": rng.standard_normal(n).astype(np.float32),
            **{name: make(n) for name, make in columns.items()},
        }
        data.append(Datum(ModelInput.from_ints(rng.integers(0, 256, n)), inputs))
    return data, logprobs


def bradley_terry(data, logprobs):
    scores = logprobs.dot(data["weights"])
    margins = scores[0::2] - scores[1::2]
    metrics = {"pair_accuracy": (margins > 0).mean(), "mean_margin": margins.mean()}
    return -jax.nn.log_sigmoid(margins).mean(), metrics


def sequence_logprob(logprobs, weights):
    return jnp.dot(logprobs.flatten().astype(jnp.float32), jnp.asarray(weights))


def pairwise_preference_loss(data, logprobs_list):
    """The well-known torch recipe with jnp for torch, loops and all."""
    if len(data) % 2 != 0:
        raise ValueError("Expected (chosen, rejected) pairs.")
    chosen_scores = []
    rejected_scores = []
    for chosen_datum, rejected_datum, chosen_logprobs, rejected_logprobs in zip(
        data[::2], data[1::2], logprobs_list[::2], logprobs_list[1::2], strict=True
    ):
        chosen_scores.append(
            sequence_logprob(chosen_logprobs, chosen_datum.loss_fn_inputs["weights"])
        )
        rejected_scores.append(
            sequence_logprob(rejected_logprobs, rejected_datum.loss_fn_inputs["weights"])
        )
    margins = jnp.stack(chosen_scores) - jnp.stack(rejected_scores)
    loss = -jax.nn.log_sigmoid(margins).mean()
    metrics = {
        "loss": loss,
        "pair_accuracy": (margins > 0).astype(jnp.float32).mean(),
        "mean_margin": margins.mean(),
    }
    return loss, metrics


def by_hand(data, logprobs):
    """Bradley-Terry and its gradient in float64 NumPy."""
    weights = [datum.loss_fn_inputs["weights"].astype(np.float64) for datum in data]
    scores = np.array([lp @ w for lp, w in zip(logprobs, weights, strict=True)])
    margins = scores[0::2] - scores[1::2]
    slope = -1 / (1 + np.exp(margins)) / margins.size
    signs = np.stack([slope, -slope], axis=1).ravel()
    return np.logaddexp(0, -margins).mean(), [s * w for s, w in zip(signs, weights, strict=True)]


def assert_grads(got, want, rtol=1e-5, atol=1e-7):
    assert [g.shape for g in got] == [w.shape for w in want]
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=atol)


@pytest.fixture
def row_by_row():
    """For objectives that take rows one by one, as these tests mean to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*takes rows one by one")
        yield


pairs = st.sampled_from([1, 2, 4]).flatmap(
    lambda n: st.lists(st.integers(1, 300), min_size=2 * n, max_size=2 * n)
)


@given(sizes=pairs, seed=st.integers(0, 1000))
def test_the_gradient_is_the_one_worked_out_by_hand(sizes, seed):
    data, logprobs = make(sizes, seed)
    result = value_and_logprob_grads(bradley_terry, data, logprobs)
    loss, grads = by_hand(data, logprobs)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-4, atol=1e-6)
    assert_grads(result.grads, grads, rtol=2e-3, atol=1e-6)
    assert result.metrics["loss"] == result.loss
    assert all(type(value) is float for value in result.metrics.values())


@settings(max_examples=20)
@given(sizes=pairs, seed=st.integers(0, 1000))
def test_a_loop_over_rows_gives_what_the_columns_give(sizes, seed):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*takes rows one by one")
        data, logprobs = make(sizes, seed)
        loop = value_and_logprob_grads(pairwise_preference_loss, data, logprobs)
    columns = value_and_logprob_grads(bradley_terry, data, logprobs)
    assert_grads(loop.grads, columns.grads, rtol=1e-4, atol=1e-7)
    assert loop.metrics == pytest.approx(columns.metrics, rel=1e-5, abs=1e-4)


class Scores:
    """Scores of datums as a metric, by an objective whose batches are padded with empty rows."""

    row_multiple = 1

    def __call__(self, data, logprobs):
        scores = (logprobs * data["weights"]).sum()
        return scores.sum(), {"scores": scores, "high": scores > -5}


def scores_in_a_loop(data, logprobs):
    scores = jnp.stack(
        [
            lp @ jnp.asarray(d.loss_fn_inputs["weights"])
            for d, lp in zip(data, logprobs, strict=True)
        ]
    )
    return scores.sum(), {"scores": scores, "high": scores > -5}


def scores_in_torch(data, logprobs):
    import torch

    weights = [torch.tensor(np.asarray(datum.loss_fn_inputs["weights"])) for datum in data]
    scores = torch.stack([lp @ w for lp, w in zip(logprobs, weights, strict=True)])
    return scores.sum(), {"scores": scores, "high": scores > -5}


@settings(max_examples=examples(4))
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_a_metric_may_have_one_number_per_datum(sizes, seed):
    data, logprobs = make(sizes, seed)
    ways = [Scores(), scores_in_a_loop]
    if importlib.util.find_spec("torch"):
        ways.append(torch_objective(scores_in_torch))
    right = [
        float(lp @ np.asarray(d.loss_fn_inputs["weights"]))
        for d, lp in zip(data, logprobs, strict=True)
    ]
    for way in ways:
        metrics = value_and_logprob_grads(way, data, logprobs).metrics
        assert type(metrics["scores"]) is np.ndarray
        assert type(metrics["loss"]) is float
        np.testing.assert_allclose(metrics["scores"], right, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(metrics["high"], metrics["scores"] > -5)


@pytest.mark.usefixtures("row_by_row")
def test_a_lambda_that_unpacks_its_one_row():
    data, logprobs = make([7])

    def perplexity(_data, lps):
        [logprobs] = lps
        nll = -jnp.mean(logprobs)
        return nll, {"custom_perplexity": jnp.exp(nll)}

    result = value_and_logprob_grads(perplexity, data, logprobs)
    assert_grads(result.grads, [np.full(7, -1 / 7)])
    assert result.metrics["custom_perplexity"] == pytest.approx(np.exp(-logprobs[0].mean()))
    short = value_and_logprob_grads(lambda data, lps: (-jnp.mean(lps[0]), {}), data, logprobs)
    assert short.loss == pytest.approx(result.loss)


@given(sizes=pairs, order=st.randoms())
def test_datums_in_another_order_have_their_gradients_in_that_order(sizes, order):
    data, logprobs = make(sizes)
    first = value_and_logprob_grads(bradley_terry, data, logprobs)
    pair_order = list(range(len(data) // 2))
    order.shuffle(pair_order)
    index = [i for p in pair_order for i in (2 * p, 2 * p + 1)]
    second = value_and_logprob_grads(
        bradley_terry, [data[i] for i in index], [logprobs[i] for i in index]
    )
    assert_grads(second.grads, [first.grads[i] for i in index], rtol=1e-5)


def test_every_column_is_seen_and_changes_with_the_data():
    def objective(data, logprobs):
        scaled = logprobs * data["my_column"] * data["reward"]
        return scaled.total(), {"mean_reward": data["reward"].mean()}

    columns = {"my_column": lambda n: np.arange(n, dtype=np.float32), "reward": lambda n: 2.0 + n}
    for sizes in ([3, 5], [4, 2], [3, 5]):
        data, logprobs = make(sizes, **columns)
        result = value_and_logprob_grads(objective, data, logprobs)
        assert_grads(result.grads, [np.arange(n) * (2.0 + n) for n in sizes])
        assert result.metrics["mean_reward"] == pytest.approx(2 + np.mean(sizes))


def test_integer_columns_stay_integers():
    def objective(data, logprobs):
        return logprobs.total(data["target_tokens"] == 7), {}

    data, logprobs = make([50, 60])
    result = value_and_logprob_grads(objective, data, logprobs)
    assert_grads(
        result.grads, [(d.loss_fn_inputs["target_tokens"] == 7).astype(float) for d in data]
    )


def test_columns_of_every_kind_at_once_and_of_another_in_the_next_batch():
    def objective(data, logprobs):
        factor = data["a"] * 2 + data["b"] * data["reward"] - data["tries"] + data["target_tokens"]
        return (logprobs * factor).total(), {"": data["tries"].sum()}

    for a, b in ((np.float32, np.int64), (np.int64, np.float32), (np.float32, np.float32)):
        columns = {
            "a": lambda n, kind=a: np.arange(n).astype(kind),
            "b": lambda n, kind=b: np.arange(n)[::-1].astype(kind),
            "reward": lambda n: 0.5 * n,
            "tries": lambda n: n,
        }
        data, logprobs = make([3, 130, 1], **columns)
        result = value_and_logprob_grads(objective, data, logprobs)
        expected = [
            2 * np.arange(n) + np.arange(n)[::-1] * 0.5 * n - n + d.loss_fn_inputs["target_tokens"]
            for n, d in zip((3, 130, 1), data, strict=True)
        ]
        assert_grads(result.grads, expected)
        assert result.metrics == {"loss": result.loss, "": 134.0}


VIEWS = {
    "all": lambda x: x,
    "every other": lambda x: x[0::2],
    "the last ones": lambda x: x[-2:],
    "differences": lambda x: [a - b for a, b in zip(x[0::2], x[1::2], strict=True)],
}


class Roots:
    def __init__(self, name):
        self.name = name

    def __call__(self, data, logprobs):
        differ = self.name == "differences"
        x = logprobs[0::2] - logprobs[1::2] if differ else VIEWS[self.name](logprobs)
        return (x - x.min() + 1e-3).map(jnp.sqrt).total(), {}


ORDERS = [[0, 1, 2], [2, 1, 0], [1, 2, 0]]
# By default each view is tried in one order, and all orders are met.
ORDERED_VIEWS = [
    (name, order)
    for number, name in enumerate(VIEWS)
    for place, order in enumerate(ORDERS)
    if THOROUGH or place == number % len(ORDERS)
]


@pytest.mark.parametrize(("name", "order"), ORDERED_VIEWS)
def test_no_token_is_met_beside_the_value_of_another_row(name, order):
    # Beside the minimum of a row that is higher, a token has no root, and 0 times its slope is NaN.
    _, logprobs = make([200, 200, 3, 3, 150, 150], seed=1)
    shifts = [-60, -10, -20, -20, 0, -70]
    pairs = [[logprobs[i] + shifts[i] for i in (2 * k, 2 * k + 1)] for k in order]
    rows = [row for pair in pairs for row in pair]
    data, _ = make([len(row) for row in rows])

    def loop(rows):
        return sum(jnp.sqrt(row - row.min() + 1e-3).sum() for row in VIEWS[name](rows))

    expected = jax.jit(jax.grad(loop))(rows)
    roots = Roots(name)
    assert_grads(value_and_logprob_grads(roots, data, rows).grads, expected, rtol=1e-4, atol=1e-4)
    traced = jax.jit(jax.grad(lambda rows: roots(data, Ragged.from_rows(rows))[0]))(rows)
    assert_grads(traced, expected, rtol=1e-4, atol=1e-4)


def test_candidates_at_each_token():
    def objective(data, logprobs):
        return (logprobs * data["target_weights"]).total(), {}

    rng = np.random.default_rng(0)
    logprobs = [rng.standard_normal((n, 4)).astype(np.float32) for n in (3, 200)]
    data = [
        Datum(
            ModelInput.from_ints(range(len(row))),
            {"target_tokens": np.ones(row.shape, int), "target_weights": row + 1},
        )
        for row in logprobs
    ]
    result = value_and_logprob_grads(objective, data, logprobs)
    assert_grads(result.grads, [row + 1 for row in logprobs])


def test_compilations_do_not_follow_the_lengths():
    def objective(data, logprobs):
        return (logprobs * data["weights"]).mean().mean(), {}

    rng = np.random.default_rng(0)
    before = mintjax.gradients.stats()
    for step in range(60):
        value_and_logprob_grads(objective, *make(rng.integers(50, 2049, 8), step))
    after = mintjax.gradients.stats()
    assert after.objectives - before.objectives == 1
    assert 1 <= after.compilations - before.compilations <= 8


def test_functions_made_anew_each_step_are_told_so():
    data, logprobs = make([3, 4])

    def scaled(scale, data, logprobs):
        return scale * logprobs.total(), {}

    def step(scale):
        result = value_and_logprob_grads(functools.partial(scaled, scale), data, logprobs)
        assert_grads(result.grads, [np.full(3, scale), np.full(4, scale)])

    step(1.0)
    step(2.0)
    with pytest.warns(UserWarning, match="scaled has been made anew for the third time") as told:
        step(3.0)
    assert told[0].filename == __file__
    step(4.0)  # warnings are errors here: told once


def test_a_bound_method_is_the_same_objective_each_time():
    class Recipe:
        def loss(self, data, logprobs):
            return logprobs.total(), {}

    recipe = Recipe()
    data, logprobs = make([3, 4])
    before = mintjax.gradients.stats()
    for _ in range(4):
        value_and_logprob_grads(recipe.loss, data, logprobs)
    assert mintjax.gradients.stats().objectives - before.objectives == 1


@jax.tree_util.register_pytree_node_class
class Scaled:
    """A user's own pytree, which is changed in place from step to step."""

    def __init__(self, scale):
        self.scale = scale

    def tree_flatten(self):
        return (self.scale,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __call__(self, data, logprobs):
        return self.scale * logprobs.total(), {}


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Holder(Scaled):
    """One that is frozen itself; what it holds is not."""

    held: list | Scaled

    def tree_flatten(self):
        return ((self.held if isinstance(self.held, list) else self.held.scale,), None)

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0] if isinstance(children[0], list) else Scaled(children[0]))

    def __call__(self, data, logprobs):
        scale = self.held[0] if isinstance(self.held, list) else self.held.scale
        return scale * logprobs.total(), {}


def test_an_objective_that_changes_in_place_is_looked_at_in_each_step():
    data, logprobs = make([3])
    listed, scaled = [2.0], Scaled(2.0)
    for objective in (Holder(listed), Holder(scaled), scaled):
        listed[0] = scaled.scale = 2.0
        assert_grads(value_and_logprob_grads(objective, data, logprobs).grads, [np.full(3, 2.0)])
        listed[0] = scaled.scale = 5.0
        assert_grads(value_and_logprob_grads(objective, data, logprobs).grads, [np.full(3, 5.0)])


def test_nothing_that_was_passed_is_changed():
    data, logprobs = make([30, 200])
    kept = [row.copy() for row in logprobs]
    columns = [{k: v.copy() for k, v in d.loss_fn_inputs.items()} for d in data]
    result = value_and_logprob_grads(bradley_terry, data, logprobs)
    assert not result.grads[0].flags.writeable  # XLA's own memory, lent and not copied
    for row, copy in zip(logprobs, kept, strict=True):
        np.testing.assert_array_equal(row, copy)
    for datum, copies in zip(data, columns, strict=True):
        for name, copy in copies.items():
            np.testing.assert_array_equal(datum.loss_fn_inputs[name], copy)


def of_weights(data, logprobs):
    return (logprobs * data["weights"]).total(), {}  # its gradient is a column as it is


@pytest.mark.parametrize("objective", [of_weights, objectives.bradley_terry()])
def test_the_gradients_of_a_step_stay_as_they_are_in_the_next(objective):
    data, logprobs = make([128, 256])
    first = value_and_logprob_grads(objective, data, logprobs).grads
    kept = [grad.copy() for grad in first]
    others = [
        Datum(
            datum.model_input,
            {name: 1 + 2 * np.asarray(x) for name, x in datum.loss_fn_inputs.items()},
        )
        for datum in data
    ]
    second = value_and_logprob_grads(objective, others, [row - 1 for row in logprobs]).grads
    for grad, copy, later in zip(first, kept, second, strict=True):
        np.testing.assert_array_equal(grad, copy)
        assert not np.array_equal(grad, later)


def test_logprobs_may_be_a_ragged_and_data_a_batch():
    data, logprobs = make([3, 5])
    a = value_and_logprob_grads(bradley_terry, data, logprobs)
    b = value_and_logprob_grads(bradley_terry, Batch(data), Ragged.from_rows(logprobs))
    assert_grads(a.grads, b.grads, rtol=0)


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
    data, logprobs = make([3, 5])
    wide = [row.astype(np.float64) for row in logprobs]
    result = value_and_logprob_grads(bradley_terry, data, wide)
    assert {grad.dtype for grad in result.grads} == {np.dtype(np.float64)}
    loss, grads = by_hand(data, wide)
    assert_grads(result.grads, grads, rtol=1e-12)
    assert result.loss == pytest.approx(loss, rel=1e-12)


class Odd(Exception):
    pass


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("objective", [bradley_terry, pairwise_preference_loss])
def test_an_exception_in_an_objective_arrives_as_it_is(objective):
    def failing(data, logprobs):
        objective(data, logprobs)
        raise Odd("mine")

    data, logprobs = make([3, 5])
    with pytest.raises(Odd, match="mine") as caught:
        value_and_logprob_grads(failing, data, logprobs)
    assert any(entry.name == "failing" for entry in caught.traceback)
    with pytest.raises(ValueError, match="pairs"):
        value_and_logprob_grads(pairwise_preference_loss, *make([3]))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda d, lp: lp.sum(), r"must return \(loss, metrics\), not an array of shape \(2,\)"),
        (lambda d, lp: (lp.sum(), {}), r"must be a scalar, not an array of shape \(2,\)"),
        (lambda d, lp: (lp, {}), "must be a floating-point scalar"),
        (lambda d, lp: (1.0, {}), "must be a floating-point scalar"),
        (lambda d, lp: (lp.total(), [1]), "metrics of .* must be a dict, not list"),
        (
            lambda d, lp: (lp.total(), {"x": jnp.ones(3)}),
            r"metric 'x' must be a scalar, or an array .* \(2,\), not .* \(3,\)",
        ),
        (lambda d, lp: (lp.total(), {"x": jnp.ones((2, 2))}), r"metric 'x' .* not .* \(2, 2\)"),
        (lambda d, lp: (lp.total(), {"x": "fast"}), "metric 'x' must be a number, not str"),
        (lambda d, lp: (lp.total(), {"x": 1j}), "metric 'x' must be a real number"),
        (lambda d, lp: (lp.total(), {"x": jax.random.key(0)}), "metric 'x' must be a real number"),
        (lambda d, lp: (lp.total(), {1: 2.0, "1": 3.0}), "metrics of one name"),
        (lambda d, lp: (types.SimpleNamespace(shape=(), dtype="torch.float32"), {}), "floating"),
        (objectives.dpo, r"dpo is a class; .*dpo\(\)"),
        (losses.ppo, r"losses.ppo is a loss of arrays.*objectives.policy\(losses.ppo\)"),
        ("ppo", r"a function \(data, logprobs\) -> \(loss, metrics\), not 'ppo'"),
    ],
)
def test_what_is_no_loss_is_named(objective, message):
    with pytest.raises(ObjectiveError, match=message):
        value_and_logprob_grads(objective, *make([3, 5]))


def test_metrics_that_jax_would_wrap_arrive_as_they_are():
    given = {
        "python": 2**40,
        "numpy": np.int64(2**33),
        "negative": np.int64(-(2**33)),
        "unsigned": np.uint32(2**32 - 1),
        "array": np.array([2**34]),
        "beyond": np.float64(1e300),
        "truth": True,
    }
    result = value_and_logprob_grads(lambda d, lp: (lp.total(), given), *make([3]))
    del result.metrics["loss"]
    arrived = {name: float(np.squeeze(value)) for name, value in result.metrics.items()}
    assert arrived == {**{n: float(np.squeeze(v)) for n, v in given.items()}, "beyond": np.inf}


@pytest.mark.parametrize(
    "objective",
    [
        lambda d, lp: ((d["logprobs"] * d["advantages"]).total(), {}),
        lambda d, lp: (sum(one.loss_fn_inputs["logprobs"].sum() for one in d), {}),
        lambda d, lp: (jax.lax.stop_gradient(lp.total()), {}),
        lambda d, lp: (sum(jax.lax.stop_gradient(row).sum() for row in lp), {}),
        lambda d, lp: (np.float32(1), {}),
    ],
)
def test_a_loss_that_does_not_reach_the_logprobs_is_told(objective):
    with pytest.warns(UserWarning, match="is 0 whatever the logprobs are.*from a column"):
        value_and_logprob_grads(objective, *make([3, 5]))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_gradient_that_happens_to_be_0_is_no_concern(scale):
    data, logprobs = make([3, 5])
    data = [with_column([d], "scale", [scale])[0] for d in data]
    result = value_and_logprob_grads(
        lambda d, lp: ((lp.sum() * d["scale"]).sum(), {}), data, logprobs
    )
    assert result.grads[0].tolist() == [scale] * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda ask, data, row: jax.jit(lambda x: ask(data, [x]).loss)(row),
        lambda ask, data, row: jax.grad(lambda x: ask(data, [x]).loss)(row),
        lambda ask, data, row: jax.jit(lambda: ask(data, [row]).loss)(),
    ],
)
def test_a_gradient_is_not_asked_for_within_a_trace(call):
    data, logprobs = make([3])
    ask = functools.partial(value_and_logprob_grads, lambda d, lp: (lp.sum().sum(), {}))
    with pytest.raises(DataError, match=r"it cannot be called within jax\.jit"):
        call(ask, data, jnp.asarray(logprobs[0]))
    assert ask(data, logprobs).grads[0].tolist() == [1, 1, 1]


def test_logprobs_that_are_masked_are_refused():
    data, logprobs = make([3])
    with pytest.raises(DataError, match="masked array hides"):
        value_and_logprob_grads(bradley_terry, data, [np.ma.array(logprobs[0], mask=[0, 1, 0])])


def test_logprobs_that_do_not_fit_the_data_are_named():
    data, logprobs = make([3, 5])
    with pytest.raises(DataError, match="1 rows of logprobs for 2 datums"):
        value_and_logprob_grads(bradley_terry, data, logprobs[:1])
    with pytest.raises(DataError, match=r"datum 1, field 'logprobs': .*\[3\].* 5 tokens"):
        value_and_logprob_grads(bradley_terry, data, [logprobs[0], logprobs[0]])


def test_a_missing_column_names_the_datum_and_what_is_there():
    data, logprobs = make([3, 5])
    del data[1].loss_fn_inputs["weights"]
    with pytest.raises(DataError, match=r"datum 1, field 'weights'.*advantages, logprobs"):
        value_and_logprob_grads(bradley_terry, data, logprobs)


def test_a_gradient_that_is_not_finite_is_named_with_its_inputs():
    def objective(data, logprobs):
        return logprobs.map(jnp.sqrt).total(), {}

    data, logprobs = make([3, 5])
    logprobs = [-row for row in logprobs]
    logprobs[1][2] = 0.0
    with pytest.raises(NonFiniteError, match=r"inf at datum 1, position 2, .*logprob is 0\.0.*wei"):
        value_and_logprob_grads(objective, data, logprobs)
    with pytest.raises(NonFiniteError) as caught:
        value_and_logprob_grads(objective, data, logprobs)
    assert (caught.value.datum, caught.value.position) == (1, 2)


LINEAR = {
    "cross_entropy": objectives.cross_entropy(),
    "mean": lambda data, logprobs: (-logprobs.mean().mean(), {}),
    "reinforce": lambda data, logprobs: (-(logprobs * data["advantages"]).total(), {}),
    "loop": lambda data, logprobs: (sum(row.sum() for row in logprobs), {}),
    "where": lambda data, logprobs: (logprobs.total(where=data["weights"] != 0), {}),
}
NOT_LINEAR = {
    "bradley_terry": objectives.bradley_terry(),
    "ppo": objectives.ppo(),
    "importance_sampling": objectives.importance_sampling(),
    "cispo": objectives.cispo(),
    "dro": objectives.dro(),
    "max": lambda data, logprobs: (logprobs.max().sum(), {}),
    "square": lambda data, logprobs: ((logprobs**2).total(), {}),
    "loop": lambda data, logprobs: (sum((row * row).sum() for row in logprobs), {}),
}


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("name", LINEAR)
def test_a_gradient_that_needs_no_logprobs_is_known_without_them(name):
    data, logprobs = make([3, 200, 7, 5])
    constant = constant_logprob_grads(LINEAR[name], data)
    assert constant is not None
    assert_grads(constant, value_and_logprob_grads(LINEAR[name], data, logprobs).grads, rtol=0)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_gradient_that_needs_logprobs_is_not_taken_for_one_that_does_not(name):
    data, _ = make([3, 200, 7, 5])
    assert constant_logprob_grads(NOT_LINEAR[name], data) is None


def test_a_row_of_logprobs_is_an_axis_of_tokens():
    data = [Datum(ModelInput.from_ints([1]), {"target_tokens": [2]})]
    with pytest.raises(DataError, match="needs an axis of tokens"):
        value_and_logprob_grads(lambda data, logprobs: (logprobs.total(), {}), data, [-1.0])


def test_rows_that_a_slice_leaves_out_are_not_met():
    data, logprobs = make([30, 200, 3, 1])
    for i, datum in enumerate(data):
        datum.loss_fn_inputs["scale"] = mintjax.TensorData(
            np.full(len(logprobs[i]), 2.0 * (i % 2 == 0), np.float32)
        )

    def of_every_other(data, logprobs):
        scale = data["scale"][0::2].map(jnp.log)  # of 0 in the rows between
        return (logprobs[0::2] * scale).total(), {}

    result = value_and_logprob_grads(of_every_other, data, logprobs)
    for i, grad in enumerate(result.grads):
        np.testing.assert_allclose(grad, np.log(2.0) * (i % 2 == 0), rtol=1e-6)


def test_an_objective_that_looks_at_the_number_of_datums_is_traced_for_each():
    def objective(data, logprobs):
        if len(data) < 2:
            return logprobs.total(), {}
        return (logprobs**2 * data["weights"]).total(), {}

    data, logprobs = make([3, 5, 2, 4])
    assert constant_logprob_grads(objective, data[:1]) is not None
    assert constant_logprob_grads(objective, data) is None
    result = value_and_logprob_grads(objective, data, logprobs)
    want = [
        2 * lp * d.loss_fn_inputs["weights"].astype(np.float32)
        for d, lp in zip(data, logprobs, strict=True)
    ]
    assert_grads(result.grads, want)


def test_an_objective_that_looks_at_the_kind_of_a_column_is_traced_for_each():
    def objective(data, logprobs):
        scale = data["scale"]
        if isinstance(scale, Ragged):
            return (logprobs**2 * scale * data["weights"]).total(), {}
        return (logprobs.sum() * scale).sum(), {}

    data, logprobs = make([3, 5])
    for datum in data:
        datum.loss_fn_inputs["scale"] = mintjax.TensorData(np.float32(2.0))
    assert constant_logprob_grads(objective, data) is not None
    for datum, row in zip(data, logprobs, strict=True):
        datum.loss_fn_inputs["scale"] = mintjax.TensorData(np.full(len(row), 3.0, np.float32))
    assert constant_logprob_grads(objective, data) is None
    want = [
        6 * lp * np.asarray(d.loss_fn_inputs["weights"])
        for d, lp in zip(data, logprobs, strict=True)
    ]
    assert_grads(value_and_logprob_grads(objective, data, logprobs).grads, want)


def test_a_column_of_integers_in_one_datum_and_floats_in_another_keeps_its_fractions():
    data, logprobs = make([1, 1])
    data[0].loss_fn_inputs["reward"] = mintjax.TensorData(np.array([1]))
    data[1].loss_fn_inputs["reward"] = mintjax.TensorData(np.array([0.5], np.float32))
    result = value_and_logprob_grads(
        lambda data, logprobs: ((logprobs * data["reward"]).total(), {}), data, logprobs
    )
    assert_grads(result.grads, [np.array([1.0]), np.array([0.5])])


def test_the_datum_that_makes_a_gradient_not_finite_is_named_and_not_its_victim():
    def objective(data, logprobs):
        return (logprobs**2).total() * logprobs.total(), {}

    data, logprobs = make([3, 5, 2, 4])
    logprobs[3][1] = -np.inf
    data[3].loss_fn_inputs["weights"] = mintjax.TensorData(np.zeros(4, np.float32))  # not read
    with pytest.raises(
        NonFiniteError, match="the logprob at datum 3, position 1, is -inf"
    ) as caught:
        value_and_logprob_grads(objective, data, logprobs)
    assert (caught.value.datum, caught.value.position) == (3, 1)


def test_ids_that_32_bits_do_not_hold_are_refused():
    data, logprobs = make([1, 2])
    for datum, ids in zip(data, ([7], [7 + 2**32, 7]), strict=True):
        datum.loss_fn_inputs["id"] = mintjax.TensorData(np.array(ids))
    with pytest.raises(DataError, match=r"datum 1, field 'id'.*beyond 32 bits"):
        value_and_logprob_grads(
            lambda data, logprobs: (logprobs.total(where=data["id"] == 7), {}), data, logprobs
        )


@pytest.mark.parametrize("name", ["cross_entropy", "ppo", "bradley_terry"])
def test_a_transfer_guard_of_the_users_does_not_stop_a_gradient(name):
    data, logprobs = make([3, 5])
    objective = getattr(objectives, name)()
    expected = value_and_logprob_grads(objective, data, logprobs)
    with jax.transfer_guard("disallow"):
        result = value_and_logprob_grads(objective, data, logprobs)
        constant_logprob_grads(objective, data)
    assert_grads(result.grads, expected.grads, rtol=0)


def test_metrics_of_every_kind_are_the_same_eagerly_and_in_doubles():
    def mixed(data, logprobs):
        total = logprobs.total()
        kinds = {"z": 2 * total, "rows": len(data), "each": logprobs.sum(), "a": 3 * total}
        return total, kinds | {"double": np.float64(2)}

    data = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [1, 2]})] * 2
    expected = {"loss": 4, "z": 8, "rows": 2, "each": [2, 2], "a": 12, "double": 2}
    for _ in range(2):
        for way in (jax.disable_jit(False), jax.disable_jit(), jax.enable_x64(True)):
            with way:
                found = value_and_logprob_grads(mixed, data, [np.ones(2)] * 2).metrics
            assert {name: np.asarray(value).tolist() for name, value in found.items()} == expected
