"""Functions of torch have the value and the gradient that torch gives."""

import builtins
import functools
import math
import operator
import warnings

import numpy as np
import pytest

from mintjax.local.loss_graphs import CustomLoss
from mintjax.local.torch_functions import FUNCTIONS, METHODS
from mintjax.protocol.messages import CustomLossGraph, CustomLossNode
from tests.local.graphs import INPUTS, LOGPROBS, OUTPUT, node

ROWS = [
    np.array([-1.0, 0.0, 0.8, 1.2, 25.0, -0.5], np.float32),
    np.array([1.0, 0.0, -2.0], np.float32),
    np.array([0.5], np.float32),
]
WEIGHTS = [np.array([1, 0, 0.8, 1.5, 2, -0.5], np.float32), np.ones(3, np.float32), ROWS[2]]


class Method:
    """Calls a method of its first argument."""

    def __init__(self, name):
        self.name = name

    def __call__(self, tensor, *args, **kwargs):
        return getattr(tensor, self.name)(*args, **kwargs)


def losses(torch):
    """Losses of datums, which together use all that is served."""
    functional = torch.nn.functional

    def both(names, body):
        for name in names.split():
            yield functools.partial(body, getattr(torch, name))
            yield functools.partial(body, Method(name))

    yield from both(
        "abs ceil cos exp expm1 floor relu sigmoid sign sin square tanh",
        lambda f, x, w, c: (f(x / 8) * w).sum(),
    )
    yield from both("log log1p rsqrt sqrt", lambda f, x, w, c: (f(x * x + 1) * w).sum())
    yield from both("add div maximum minimum mul sub", lambda f, x, w, c: f(x, w * w + 1).sum())
    yield from both(
        "eq ge gt le lt ne logical_and logical_or logical_xor",
        lambda f, x, w, c: (f(x, w) * x).sum(),
    )
    for f in (operator.eq, operator.ge, operator.gt, operator.le, operator.lt, operator.ne):
        yield functools.partial(lambda f, x, w, c: (f(x, w) * x).sum(), f)
    for f in (operator.and_, operator.or_, operator.xor):
        yield functools.partial(lambda f, x, w, c: (f(x > 0, w > 0) * x).sum(), f)
    yield from both("amax amin mean sum", lambda f, x, w, c: f(x * w, 0) * c)
    yield from both("amax amin mean sum", lambda f, x, w, c: (f(x * w, -1, keepdim=True) * x).sum())
    yield from both("all any", lambda f, x, w, c: f(x > -0.6, 0).float() * x.sum())
    yield lambda x, w, c: (torch.softmax(x, 0) * w).sum() + x.softmax(-1)[0]
    yield lambda x, w, c: (torch.log_softmax(x, 0) * w).sum() + x.log_softmax(-1)[0]
    yield lambda x, w, c: torch.logsumexp(x * w, 0) + x.logsumexp(-1)
    yield lambda x, w, c: (torch.cumsum(x, 0) * w).sum() + (x.cumsum(-1) * x).sum()
    yield lambda x, w, c: torch.dot(x, w) + x.dot(w) * c
    yield lambda x, w, c: torch.clamp(x, 0.8, 1.2).sum() + (x.clamp(max=0.8) * w).sum()
    yield lambda x, w, c: torch.clip(x, min=0.8).sum() + (x.clip(w, w + 1) * w).sum()
    yield lambda x, w, c: torch.where(x > 0, x, w).sum() + torch.where(x < w, 1.0, 0.0).sum()
    yield lambda x, w, c: torch.where(torch.isfinite(x) & ~torch.isnan(x), x, 0.0).sum()
    yield lambda x, w, c: torch.where(x.isfinite() & ~x.isnan(), x, math.inf).sum()
    yield lambda x, w, c: (torch.pow(x, 2) * w).sum() + (x**3).sum() + (x * x + 1).pow(w).sum()
    yield lambda x, w, c: (2.0**x).sum() + torch.neg(x).sum() + x.neg().dot(w) + (-x * w).sum()
    yield lambda x, w, c: (torch.logical_not(x) * w).sum() + (~(x > 0) * x).sum() + x.sum()
    yield lambda x, w, c: (x.logical_not() * w).sum() + x.bool().float().dot(x)
    yield lambda x, w, c: (x * torch.ones_like(w)).sum() + (w * torch.zeros_like(x)).sum() + x[0]
    yield lambda x, w, c: (x * torch.full_like(w, 0.3)).sum() + abs(x).sum()
    yield lambda x, w, c: (x * torch.exp(x - 25).detach()).sum()
    yield lambda x, w, c: functional.logsigmoid(x).dot(w) + functional.softplus(x).sum()
    yield (
        lambda x, w, c: functional.softplus(x, beta=2, threshold=1).sum() + functional.relu(x).sum()
    )
    yield lambda x, w, c: functional.log_softmax(x, dim=0).dot(w)
    yield lambda x, w, c: functional.softmax(x, -1).dot(w)
    yield lambda x, w, c: x.sum() / x.shape[0] + x.sum() * x.size(0) + x.sum() / x.numel()
    yield lambda x, w, c: x.sum() * torch.numel(w) * x.size()[0]
    yield lambda x, w, c: (x[1:] * w[:-1]).sum() + x[:1].sum() + x[None, ...].sum()
    yield lambda x, w, c: torch.squeeze(torch.unsqueeze(x, 1), 1).dot(w) + (x * c).sum()
    yield lambda x, w, c: x.unsqueeze(0).squeeze(0).dot(w) + x.sum().to(torch.float32)
    yield lambda x, w, c: (x - w).abs().sum() + (1 - c) * x.sum() - x.sum() / c


def encoded(torch, function):
    """The graph that the official SDK uploads for a function."""
    qualified = torch.fx.node._get_qualified_name

    def argument(value):
        if isinstance(value, torch.fx.Node):
            return {"ref": value.name}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if isinstance(value, tuple):
            return {"tuple": [argument(one) for one in value]}
        if isinstance(value, dict):
            return {"dict": {key: argument(one) for key, one in value.items()}}
        if isinstance(value, slice):
            return {"slice": [argument(one) for one in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        return value

    def loss(logprobs, w, c):
        value = function(logprobs, w, c)
        return value, {"custom/value:sum": value}

    traced = torch.fx.symbolic_trace(loss)
    nodes = []
    for one in traced.graph.nodes:
        target = qualified(one.target) if callable(one.target) else str(one.target)
        nodes.append(
            CustomLossNode(
                one.op,
                one.name,
                target.replace("_operator.", "operator."),
                [argument(value) for value in one.args],
                {key: argument(value) for key, value in one.kwargs.items()},
            )
        )
    return traced, CustomLossGraph(nodes)


def test_what_is_served_has_the_value_and_the_gradient_of_torch():
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.fx
    used = set()
    for function in losses(torch):
        traced, graph = encoded(torch, function)
        used |= {(node.op, node.target) for node in graph.nodes}
        loss = CustomLoss("loss", INPUTS, graph)
        for row, w in zip(ROWS, WEIGHTS, strict=True):
            if len(row) == 1 and "slice" in str(graph.nodes):
                continue
            x = torch.tensor(row, requires_grad=True)
            value, _ = traced(x, torch.tensor(w), torch.tensor(0.75))
            value.backward()
            found = loss.evaluate(row, [w, np.float32(0.75)])
            assert found.metrics == {"custom/value:sum": found.loss}
            np.testing.assert_allclose(found.loss, value.item(), rtol=2e-5, err_msg=traced.code)
            np.testing.assert_allclose(
                found.gradient, x.grad.numpy(), rtol=2e-5, atol=1e-6, err_msg=traced.code
            )
    calls = {("call_function", name) for name in FUNCTIONS if "." in name}
    calls |= {("call_method", name) for name in METHODS}
    left = {name for name in calls - used if name[1] not in ("builtins.getattr",)}
    assert not left


@pytest.mark.parametrize("name", ["cos", "exp", "expm1", "sigmoid", "sin", "square", "tanh"])
def test_a_derivative_is_the_slope_on_every_jax(name):
    total = node(name="t", target="torch.sum", args=({"ref": "a"},))
    nodes = [LOGPROBS, node(target=f"torch.{name}"), total, OUTPUT]
    loss = CustomLoss("loss", INPUTS[:1], CustomLossGraph(nodes))
    row, h = np.array([-2.0, -0.3, 0.9], np.float32), 2**-6
    for i, slope in enumerate(loss.evaluate(row, []).gradient):
        away = h * np.eye(3, dtype=np.float32)[i]
        rise = loss.evaluate(row + away, []).loss - loss.evaluate(row - away, []).loss
        assert slope == pytest.approx(rise / (2 * h), abs=1e-3)


def test_builtins_are_what_they_are():
    assert FUNCTIONS["getattr"] is FUNCTIONS["builtins.getattr"] is not builtins.getattr
