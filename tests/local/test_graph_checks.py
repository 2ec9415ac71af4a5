"""A graph that cannot be a loss is refused, with the reason."""

import pytest

from mintjax.errors import DataError
from mintjax.local.loss_graphs import CustomLoss
from mintjax.protocol.messages import CustomLossGraph, CustomLossInput
from tests.local.graphs import INPUTS, LOGPROBS, TOTAL, graph, node, output

VECTOR = {"tuple": [{"ref": "logprobs"}, {"dict": {}}]}
REFUSED = {
    "a module": (graph(node("call_module", target="lin")), "kind 'call_module' is not served"),
    "an attribute": (graph(node("get_attr", target="w")), "kind 'get_attr' is not served"),
    "another function": (graph(node(target="os.system")), "'os.system' is not served"),
    "a private one": (graph(node(target="torch.load")), "'torch.load' is not served"),
    "another method": (graph(node("call_method", target="backward")), "'backward' is not served"),
    "an attribute by name": (
        graph(node(target="builtins.getattr", args=({"ref": "logprobs"}, "__class__"))),
        "shape is served",
    ),
    "an unknown node": (graph(node(args=({"ref": "later"},))), "which no node before is"),
    "an unhashable reference": (graph(node(args=({"ref": ["a"]},))), "which no node before is"),
    "a name twice": (graph(node(name="logprobs")), "second node"),
    "no argument": (graph(node(args=())), "missing a required argument"),
    "an unknown argument": (graph(node(out={"ref": "logprobs"})), "unexpected keyword"),
    "an object of two keys": (graph(node(args=({"ref": "logprobs", "b": 1},))), "one key"),
    "a device": (graph(node(args=({"device": "cpu"},))), "kind 'device'"),
    "depth": (graph(node(args=([[[[[[[[[[1]]]]]]]]]],))), "lists within lists"),
    "no output": (CustomLossGraph([LOGPROBS, TOTAL]), "last node is not the output"),
    "no nodes": (CustomLossGraph([]), "last node is not the output"),
    "another input": (graph(node("placeholder", "w", "w", ())), "not the inputs"),
    "a bare output": (
        graph(output=node("output", "output", "output", ({"ref": "t"},))),
        "a loss and a dict",
    ),
    "a metric's name": (graph(output=output({"loss:sum": {"ref": "t"}})), "is not named custom/"),
    "a metric's value": (graph(output=output({"custom/a:sum": 1})), "is no node"),
    "a place that may not be there": (
        graph(node(target="operator.getitem", args=({"ref": "logprobs"}, 3))),
        "first and the last",
    ),
    "shapes": (
        graph(
            node(target="operator.getitem", args=({"ref": "logprobs"}, {"slice": [1, None, None]})),
            node(name="b", target="operator.add", args=({"ref": "a"}, {"ref": "logprobs"})),
        ),
        "operator.add cannot be evaluated",
    ),
    "a text operand": (graph(node(target="operator.add", args=("a", 1))), "operand is a str"),
    "no scalar": (
        graph(output=node("output", "output", "output", (VECTOR,))),
        "has shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_graph_that_is_none_is_refused_with_the_reason(name):
    given, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason):
        CustomLoss("loss", INPUTS[:1], given).trace()


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([], "first input is logprobs"),
        ([CustomLossInput("w", 1)], "first input is logprobs"),
        ([CustomLossInput("logprobs", 0)], "first input is logprobs"),
        ([*INPUTS, CustomLossInput("W", 1)], "lowercase"),
        ([*INPUTS, INPUTS[1]], "one name"),
        ([INPUTS[0], *(CustomLossInput(f"c{i}", 1) for i in range(16))], "17 inputs"),
    ],
)
def test_inputs_that_cannot_be_are_refused(inputs, reason):
    with pytest.raises(DataError, match=reason):
        CustomLoss("loss", inputs, graph())
