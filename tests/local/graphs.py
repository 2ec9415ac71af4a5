"""Loss graphs, written by hand."""

from mintjax.protocol.messages import CustomLossGraph, CustomLossInput, CustomLossNode

INPUTS = [CustomLossInput("logprobs", 1), CustomLossInput("w", 1), CustomLossInput("c", 0)]


def node(op="call_function", name="a", target="torch.exp", args=({"ref": "logprobs"},), **kwargs):
    return CustomLossNode(op, name, target, list(args), kwargs)


LOGPROBS = node("placeholder", "logprobs", "logprobs", ())
TOTAL = node(name="t", target="torch.sum")
OUTPUT = node("output", "output", "output", ({"tuple": [{"ref": "t"}, {"dict": {}}]},))


def graph(*nodes, output=OUTPUT):
    return CustomLossGraph([LOGPROBS, *nodes, TOTAL, output])


def output(metrics):
    return node("output", "output", "output", ({"tuple": [{"ref": "t"}, {"dict": metrics}]},))
