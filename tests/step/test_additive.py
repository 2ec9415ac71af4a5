"""A loss is run on the trainer only if it is shown to be a sum over datums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from mintjax import Ragged, objectives, value_and_logprob_grads
from mintjax.gradients import LogprobGradients
from mintjax.step.one_datum import server_loss
from mintjax.step.server_loss import NotLowered

from ..examples import examples
from .test_server_loss import assert_same, batch, data_for, summed, summed_by_torch

CLIP = 0.2


def total(data, logprobs):
    return -(logprobs * data["weights"]).total(), {"tokens": data["weights"].total()}


def of_rows(data, logprobs):
    """A sum over rows of what is no sum over tokens, divided by a number."""
    scores = logprobs.mean(where=data["weights"] != 0)
    loss = (jnp.tanh(scores) * logprobs.map(jnp.exp).max()).sum() / 4.0
    return loss, {"score": scores.mean(), "largest": scores.max(), "rows": jnp.ones_like(scores)}


def clipped(data, logprobs):
    ratio = (logprobs - data["logprobs"]).map(jnp.exp)
    bounded = ratio.map(lambda r: jnp.clip(r, 1 - CLIP, 1 + CLIP))
    loss = -(ratio * data["advantages"]).map(jnp.minimum, bounded * data["advantages"])
    share = (ratio != bounded).astype(jnp.float32)
    return jnp.sum(loss.sum() * data["scale"]), {"clipped": share.total(), "Share": share.total()}


def added(data, logprobs):
    terms = [logprobs.dot(data["weights"]).sum(), 0.5 * (logprobs**2).total()]
    return -sum(terms), {"loss": terms[0], "half": -terms[1] / 2}


SUMS = {
    "total": (total, {"custom/tokens:sum"}),
    "of rows": (of_rows, {"custom/score:mean"}),
    "clipped": (clipped, {"custom/clipped:sum"}),
    "added": (added, {"custom/half:sum"}),
    "a term": (
        objectives.weighted_sum({"own": total, "kl": objectives.kl_k2()}, {"kl": 0.1}),
        {"custom/own/tokens:sum", "custom/kl/tokens:sum"},
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_users_sum_over_datums_runs_on_the_trainer_with_its_metrics(name):
    objective, metrics = SUMS[name]
    given = batch(scale=lambda n: np.float32(0.5 * n))
    rows = [-np.linspace(0.1, 3, n, dtype=np.float32) for n in given.lengths]
    expected = value_and_logprob_grads(objective, given, rows)
    loss = server_loss(objective, given)
    data = data_for(loss, given)
    for found in (summed(loss, data, rows), summed_by_torch(loss, data, rows)):
        assert_same(found, expected)
        assert found.metrics.keys() == metrics
        for metric, value in found.metrics.items():
            own = metric.removeprefix("custom/").partition(":")[0]
            assert value == pytest.approx(expected.metrics[own], rel=1e-5)


@jax.custom_jvp
def odd(x):
    return x


@odd.defjvp
def odd_jvp(primals, tangents):
    return primals[0], tangents[0] * primals[0].sum()


def rows_of(change):
    return lambda data, logprobs: (change(logprobs.sum(), logprobs, data), {})


COUPLED = {
    "a mean": (rows_of(lambda s, x, d: s.mean()), "no sum over datums but a mean"),
    "a square": (rows_of(lambda s, x, d: s.sum() ** 2), "of a sum over datums"),
    "a ratio": (rows_of(lambda s, x, d: x.total() / x.total_count()), "div of a sum"),
    "an offset": (rows_of(lambda s, x, d: x.total() + 1.0), "add of a sum"),
    "a centre": (rows_of(lambda s, x, d: ((s - s.mean()) ** 2).sum()), "a datum with a sum"),
    "a product": (rows_of(lambda s, x, d: s.sum() * d["scale"].sum()), "mul of a sum"),
    "a mixed product": (rows_of(lambda s, x, d: (s.sum() * d["scale"]).sum()), "with a sum over"),
    "a largest": (rows_of(lambda s, x, d: s.max()), "reduce_max over datums"),
    "an order": (rows_of(lambda s, x, d: (s * jnp.arange(s.size)).sum()), "counts datums, by iota"),
    "pairs": (rows_of(lambda s, x, d: (s[:, None] * s[None, :]).sum()), "arranges the datums"),
    "neighbours": (rows_of(lambda s, x, d: (s[1:] - s[:-1]).sum()), "arranges the datums"),
    "every other": (rows_of(lambda s, x, d: s[::2].sum()), "arranges the datums"),
    "a derivative": (rows_of(lambda s, x, d: odd(s).sum()), "a datum with a sum"),
    "a count": (rows_of(lambda s, x, d: s.sum() * len(d)), "the number of datums"),
    "a shape": (rows_of(lambda s, x, d: s.sum() * s.shape[0]), "mul of a sum"),
    "a choice": (rows_of(lambda s, x, d: s.sum() * (2 if s.shape[0] == 3 else 1)), "chooses by"),
    "an array": (rows_of(lambda s, x, d: (s * np.arange(3.0)).sum()), "incompatible shapes"),
    "noise": (rows_of(lambda s, x, d: (s * jax.random.normal(KEY, s.shape)).sum()), "PRNGKey"),
    "a sum in a map": (
        rows_of(lambda s, x, d: x.map(lambda t, a: t * a.sum(), d["scale"]).total()),
        "with a sum over datums",
    ),
    "a length": (
        rows_of(lambda s, x, d: x.map(lambda t: t * jnp.ones(t.shape[1]).sum()).total()),
        "array of tokens",
    ),
    "rows": (rows_of(lambda s, x, d: sum(row.sum() for row in x)), "rows one by one"),
    "a vector": (rows_of(lambda s, x, d: s), "no scalar"),
    "no batch": (rows_of(lambda s, x, d: jnp.float32(0)), "but a constant"),
}
KEY = jax.random.key(0)


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_datums_is_refused_with_the_reason(name):
    objective, reason = COUPLED[name]
    with pytest.raises(NotLowered, match=reason):
        server_loss(objective, batch(scale=lambda n: np.float32(n)))


TOKENS = st.recursive(
    st.sampled_from(
        [
            lambda x, d: x,
            lambda x, d: d["weights"],
            lambda x, d: x - x.mean(),
            lambda x, d: x * d["scale"],
            lambda x, d: x - x.total() / 7.0,
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda a: lambda x, d: a(x, d).map(jnp.tanh), inner),
        st.builds(lambda a: lambda x, d: a(x, d).map(jnp.clip, -0.5, 0.5), inner),
        st.builds(lambda a, b: lambda x, d: a(x, d) * b(x, d), inner, inner),
        st.builds(lambda a, b: lambda x, d: a(x, d) + b(x, d), inner, inner),
    ),
    max_leaves=3,
)
ROWS = st.recursive(
    st.one_of(
        st.builds(lambda a: lambda x, d: a(x, d).sum(), TOKENS),
        st.builds(lambda a: lambda x, d: a(x, d).max(), TOKENS),
        st.builds(lambda a: lambda x, d: a(x, d).mean(where=d["weights"] != 0), TOKENS),
        st.just(lambda x, d: d["scale"]),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a: lambda x, d: jnp.sin(a(x, d)), inner),
        st.builds(lambda a: lambda x, d: a(x, d) - a(x, d).mean(), inner),
        st.builds(lambda a, b: lambda x, d: jnp.where(a(x, d) > 1, a(x, d), b(x, d)), inner, inner),
    ),
    max_leaves=2,
)
LOSSES = st.recursive(
    st.one_of(
        st.builds(lambda a: lambda x, d: a(x, d).sum(), ROWS),
        st.builds(lambda a: lambda x, d: a(x, d).total(), TOKENS),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, c: lambda x, d: c * a(x, d) / 3.0, inner, st.floats(-2, 2, width=16)),
        st.builds(lambda a, b: lambda x, d: a(x, d) - b(x, d), inner, inner),
        st.builds(lambda a: lambda x, d: jnp.cos(a(x, d)), inner),
        st.builds(lambda a: lambda x, d: a(x, d) / x.total_count(), inner),
        st.builds(lambda a, b: lambda x, d: a(x, d) * b(x, d), inner, inner),
    ),
    max_leaves=2,
)


def eagerly(objective, data, rows):
    """Value, metrics and gradient without a program, which would be compiled for each example."""
    x = Ragged.from_rows(rows)
    (loss, metrics), slopes = jax.value_and_grad(
        lambda tiles: objective(data, Ragged(tiles, x.layout)), has_aux=True
    )(jnp.asarray(x.tiles))
    numbers = {name: float(metric) for name, metric in metrics.items()}
    return LogprobGradients(float(loss), numbers, Ragged(slopes, x.layout).to_rows())


@settings(max_examples=examples(5))
@drawn(loss=LOSSES, metric=LOSSES)
def test_what_is_not_refused_is_the_objective(loss, metric):
    def objective(data, logprobs):
        return loss(logprobs, data), {"one": metric(logprobs, data), "two": logprobs.sum().mean()}

    given = batch(scale=lambda n: np.float32(0.5 * n - 1))
    rows = [-np.linspace(0.1, 2, n, dtype=np.float32) for n in given.lengths]
    try:
        lowered = server_loss(objective, given)
    except NotLowered:
        return
    found = summed(lowered, data_for(lowered, given), rows)
    expected = eagerly(objective, given, rows)
    assert_same(found, expected)
    for name, value in found.metrics.items():
        own = expected.metrics[name.removeprefix("custom/").partition(":")[0]]
        assert value == pytest.approx(own, rel=1e-4, abs=1e-4)


def test_a_loss_goes_without_a_metric_that_a_graph_cannot_say():
    def cumulated(data, logprobs):
        return logprobs.total(), {"odd": jnp.prod(jnp.stack([logprobs.total()]))}

    assert len(server_loss(cumulated, batch()).graph.nodes) > 0
