"""A loss that runs on the trainer has value and gradient of the objective it was made of."""

import importlib
import json
import operator
import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import Datum, ModelInput, objectives, value_and_logprob_grads
from mintjax.errors import DataError
from mintjax.gradients.lengths import kind_of
from mintjax.local.loss_graphs import CustomLoss
from mintjax.protocol import messages
from mintjax.ragged.batch import Batch
from mintjax.step.one_datum import data_for, server_loss
from mintjax.step.server_loss import METRIC, NotLowered, lower, travelling_names

from ..examples import examples, some
from ..one_meaning.situations import OURS, candidates_of, situations

SUMS = {"ppo + kl_k3", "own + cross_entropy"} | {
    name
    for name, case in OURS.items()
    if getattr(case.objective(), "couples_datums", "unknown") is None
}
"""Objectives that are sums over datums: those that say so, and sums of such."""


def through_json(loss):
    """The request, as it arrives."""
    request = messages.CreateCustomLossRequest("s", 0, loss.name, loss.inputs, loss.graph)
    return messages.decode(messages.encode(request), messages.CreateCustomLossRequest)


_read: dict[bytes, CustomLoss] = {}


def as_trainer(loss):
    """The embedded trainer's reading of a loss, which takes its time, so it is done once."""
    sent = messages.encode([loss.inputs, loss.graph])
    if sent not in _read:
        request = through_json(loss)
        _read[sent] = CustomLoss(request.name, request.inputs, request.graph)
    return _read[sent]


class Found(NamedTuple):
    value: float
    grads: list
    metrics: dict


def joined(values, grads, metrics):
    """The sum over datums, and metrics as their suffixes say."""
    totals = {name: sum(one[name] for one in metrics) for name in metrics[0]}
    assert totals.pop(METRIC) == pytest.approx(sum(values), rel=1e-6, abs=1e-6)
    counts = {name: len(values) if name.endswith(":mean") else 1 for name in totals}
    return Found(sum(values), grads, {name: totals[name] / counts[name] for name in totals})


def summed(loss, data, rows):
    """Value, gradients and metrics as the embedded trainer has them."""
    served = as_trainer(loss)
    each = []
    for datum, row in zip(data, rows, strict=True):
        columns = [datum.loss_fn_inputs[one.name] for one in served.columns]
        each.append(served.evaluate(row, columns))
    return joined(
        [one.loss for one in each], [one.gradient for one in each], [one.metrics for one in each]
    )


def summed_by_torch(loss, data, rows):
    """The same by ``torch.fx`` and torch's own derivatives."""
    torch = pytest.importorskip("torch")
    graph = fx_graph(torch, loss.graph)
    values, grads, reported = [], [], []
    for datum, row in zip(data, rows, strict=True):
        logprobs = torch.tensor(row, requires_grad=True)
        columns = [
            torch.from_numpy(np.array(datum.loss_fn_inputs[one.name])) for one in loss.inputs[1:]
        ]
        one, metrics = graph(logprobs, *columns)
        one.backward()
        values.append(one.item())
        grads.append(logprobs.grad.numpy())
        reported.append({name: metric.item() for name, metric in metrics.items()})
    return joined(values, grads, reported)


def fx_graph(torch, graph):
    """A module of the nodes, whose targets are looked up by their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch.fx")
        made, known = torch.fx.Graph(), {}

        def read(argument):
            match argument:
                case {"ref": name}:
                    return known[name]
                case {"tuple": items}:
                    return tuple(read(item) for item in items)
                case {"dict": items}:
                    return {key: read(value) for key, value in items.items()}
                case {"float": text}:
                    return float(text)
                case {"dtype": name}:
                    return getattr(torch, name)
                case list():
                    return [read(item) for item in argument]
            return argument

        for node in graph.nodes:
            target = node.target
            if node.op == "call_function":
                module, _, name = target.rpartition(".")
                target = getattr({"torch": torch, "operator": operator}[module], name)
            args = tuple(read(argument) for argument in node.args)
            kwargs = {key: read(argument) for key, argument in node.kwargs.items()}
            known[node.name] = made.create_node(node.op, target, args, kwargs, name=node.name)
        return torch.fx.GraphModule(torch.nn.Module(), made)


def assert_same(found, expected):
    value, grads, *_ = found
    size = sum(np.abs(grad).sum() for grad in expected.grads) + abs(expected.loss)
    assert value == pytest.approx(expected.loss, rel=1e-5, abs=1e-5 * max(float(size), 1.0))
    for grad, wanted in zip(grads, expected.grads, strict=True):
        assert grad.shape == wanted.shape
        np.testing.assert_allclose(grad, wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=examples(6))
@given(draw=st.data(), name=st.sampled_from(sorted(SUMS)))
def test_value_and_gradient_are_those_of_the_objective(draw, name):
    case = OURS[name]
    objective = case.objective()
    situation = draw.draw(situations(case, draw.draw(candidates_of(case))))
    try:
        expected = value_and_logprob_grads(objective, situation.data, situation.logprobs)
    except (DataError, ValueError):
        return  # it takes no such batch
    batch = Batch(situation.data)
    if any(kind_of(batch, column) is None for column in case.columns):
        with pytest.raises(NotLowered, match="differ in the kind of the column"):
            server_loss(objective, batch)
        return
    loss = server_loss(objective, batch)
    data = data_for(loss, batch)
    assert_same(summed(loss, data, situation.logprobs), expected)
    assert_same(summed_by_torch(loss, data, situation.logprobs), expected)


@pytest.mark.parametrize("name", some(sorted(set(OURS) - SUMS), 6))
@settings(max_examples=1)
@given(draw=st.data())
def test_what_couples_datums_is_refused(draw, name):
    case = OURS[name]
    situation = draw.draw(situations(case, draw.draw(candidates_of(case))))
    with pytest.raises(NotLowered):
        server_loss(case.objective(), Batch(situation.data))


def batch(seed=0, sizes=(3, 1, 5), **columns):
    rng = np.random.default_rng(seed)
    return Batch(
        [
            Datum(
                ModelInput.from_ints(range(1, n + 1)),
                {
                    "target_tokens": np.arange(n),
                    "weights": (np.arange(n) != 1).astype(np.float32),
                    "advantages": rng.integers(-1, 2, n).astype(np.float32),
                    "logprobs": -np.arange(1, n + 1, dtype=np.float32),
                    "ref_logprobs": -np.arange(1, n + 1, dtype=np.float32),
                    **{name: make(n) for name, make in columns.items()},
                },
            )
            for n in sizes
        ]
    )


TIES = {
    "ppo at both bounds": objectives.ppo(clip_low_threshold=1.0, clip_high_threshold=1.0),
    "ppo at a tie": objectives.ppo(),
    "dual clip": objectives.dual_clip_ppo(clip_high_threshold=1.0, dual_clip_threshold=1.0001),
    "cispo": objectives.cispo(clip_high_threshold=1.0),
    "kl_abs": objectives.kl_abs(),
    "gmpo": objectives.gmpo(aggregation="sum"),
    "a mean of the step": objectives.sapo(step_count=7.0),
    "sapo": objectives.sapo(aggregation="sum"),
    "vespo": objectives.vespo(),
    "unlikelihood": objectives.unlikelihood(),
    "terms": objectives.weighted_sum(
        {"policy": objectives.gspo(), "kl": objectives.kl_k3()}, {"kl": lambda step: 0.1 * step}
    ).at_step(3),
}


@pytest.mark.parametrize("name", some(TIES, every=4))
def test_at_ties_and_bounds_the_gradient_is_that_of_the_objective(name):
    given = batch()
    rows = [-np.arange(1, n + 1, dtype=np.float32) for n in given.lengths]  # all ratios are 1
    expected = value_and_logprob_grads(TIES[name], given, rows)
    loss = server_loss(TIES[name], given)
    data = data_for(loss, given)
    assert_same(summed(loss, data, rows), expected)
    assert_same(summed_by_torch(loss, data, rows), expected)


def test_a_number_per_datum_is_an_input_of_rank_0():
    given = batch(advantages=lambda n: np.float32(n - 3))
    loss = server_loss(objectives.ppo(), given)
    assert {one.name: one.rank for one in loss.inputs} == {
        "logprobs": 1,
        "advantages": 0,
        "sampling_logprobs": 1,
        "weights": 1,
    }
    rows = [np.full(n, -2.0, np.float32) for n in given.lengths]
    expected = value_and_logprob_grads(objectives.ppo(), given, rows)
    assert_same(summed(loss, data_for(loss, given), rows), expected)


def test_a_hidden_logprob_of_minus_infinity_stays_hidden():
    given = batch(sizes=(3,))
    loss = server_loss(objectives.kl_k2(), given)
    rows = [np.array([-1.0, -np.inf, -2.0], np.float32)]  # its weight is 0
    expected = value_and_logprob_grads(objectives.kl_k2(), given, rows)
    assert_same(summed(loss, data_for(loss, given), rows), expected)
    assert_same(summed_by_torch(loss, data_for(loss, given), rows), expected)


class Centred(type(objectives.ppo())):
    """An objective with a method of its own, which couples datums."""

    def reduce(self, values, where):
        return (values - values.total(where) / 3).total(where)


def mixed(target, sampling_logprobs, advantages, *, where=None):
    return -target * advantages / jnp.sum(jnp.abs(advantages))


REFUSED = {
    "a pair": (objectives.dpo(), "dpo is not known to be a sum"),
    "a mean": (objectives.ppo(aggregation="token_mean"), "divides by what all datums hold"),
    "a group": (
        objectives.ppo(aggregation="prompt_mean", group_size=3, step_count=1.0),
        "averaged together",
    ),
    "all tokens": (objectives.kl_cov(), "depends on those of other datums"),
    "an override": (Centred(), "combines a datum with a sum over datums"),
    "a mixing loss": (objectives.policy(mixed)(), "reduce_sum along the axis of tokens"),
    "a term": (objectives.weighted_sum({"dpo": objectives.dpo()}), "asks for the number of datums"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_to_be_a_sum_over_datums_is_refused_with_the_reason(name):
    objective, reason = REFUSED[name]
    with pytest.raises(NotLowered, match=reason):
        server_loss(objective, batch(noise=np.zeros))


UNSAYABLE = {
    "running sums": (lambda x, c: jnp.cumsum(x).max(), "uses cumsum"),
    "constants": (lambda x, c: (x[:, None] * np.ones((1, 3), np.float32)).sum(), "3 numbers"),
    "integers": (lambda x, c: (x * (c["ids"] * 2)).sum(), "integers of a column"),
    "wider floats": (lambda x, c: x.astype(jnp.bfloat16).sum().astype(jnp.float32), "bfloat16"),
    "outer sizes": (lambda x, c: jnp.concatenate([x, x]).sum(), "concatenate"),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_a_graph_cannot_say_is_refused_with_the_reason(name):
    loss, reason = UNSAYABLE[name]
    kinds = {"ids": ((), np.dtype(np.int64))}
    with pytest.raises(NotLowered, match=reason):
        lower(lambda x, c: (loss(x, c), {}), kinds, (), "loss")


@given(
    st.lists(st.text("aA_1 é", max_size=4) | st.sampled_from(["logprobs", "column"]), unique=True)
)
def test_columns_travel_under_names_that_differ_and_are_allowed(names):
    travels = travelling_names(names)
    assert set(travels) == set(names)
    assert len({*travels.values(), "logprobs"}) == len(names) + 1
    for name in travels.values():
        assert name.isascii()
        assert name == name.lower()
        assert name.isidentifier()


SDK = {
    "ppo": objectives.ppo(clip_low_threshold=1.0, clip_high_threshold=1.0),
    "gspo": objectives.gspo(),
    "kl_k3": objectives.kl_k3(),
    "sapo": objectives.sapo(aggregation="sum"),
}


@pytest.mark.parametrize("name", SDK)
def test_the_official_sdk_takes_the_graph_and_runs_it_to_the_same_numbers(name):
    """By its own types, checks, encoder and evaluation; only versions from 0.38 on have these."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        types = pytest.importorskip("tinker.types")
        sdk = pytest.importorskip("tinker.lib.public_interfaces.custom_loss")
    given = batch(advantages=lambda n: np.float32(1 - n % 3))
    loss = server_loss(SDK[name], given)
    body = json.loads(messages.encode(through_json(loss)))
    request = types.CreateCustomLossRequest.model_validate(body)
    module = fx_graph(torch, request.graph)
    sdk._check_graph(SDK[name], module)
    handle = sdk.LossHandle(loss.name, tuple(request.inputs), "s", module)
    assert sdk.encode_graph(handle).model_dump() == request.graph.model_dump()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
            loss_fn_inputs={
                key: types.TensorData(
                    data=np.array(column),
                    dtype="int64" if column.dtype.kind == "i" else "float32",
                    shape=list(column.shape),
                )
                for key, column in datum.loss_fn_inputs.items()
            },
        )
        for datum in data_for(loss, given)
    ]
    sdk.check_loss_inputs(handle, data)
    rows = [-np.arange(1, n + 1, dtype=np.float32) for n in given.lengths]  # all ratios are 1
    leaves = [torch.tensor(row, requires_grad=True) for row in rows]
    total, metrics = sdk.run_loss_handle(handle, data, leaves)
    total.backward()
    expected = value_and_logprob_grads(SDK[name], given, rows)
    assert_same((total.item(), [leaf.grad.numpy() for leaf in leaves]), expected)
    assert metrics[METRIC] == pytest.approx(total.item(), rel=1e-6, abs=1e-6)
