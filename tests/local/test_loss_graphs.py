"""A loss graph stays within its limits, and garbage is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax.errors import BadRequestError, DataError
from mintjax.local.limits import Limits
from mintjax.local.loss_graphs import CustomLoss
from mintjax.local.torch_functions import FUNCTIONS, METHODS
from mintjax.protocol.messages import CustomLossGraph, CustomLossNode
from tests.examples import THOROUGH
from tests.local.graphs import INPUTS, LOGPROBS, OUTPUT, graph, node

ROW = np.array([-1.0, 0.0, 0.8, 1.2, 25.0, -0.5], np.float32)


def test_nodes_and_sizes_are_bounded():
    many = graph(*(node(name=f"n{i}") for i in range(20)))
    with pytest.raises(BadRequestError, match="max_loss_nodes"):
        CustomLoss("loss", INPUTS[:1], many, Limits(max_loss_nodes=20))
    square = CustomLossGraph(
        [
            LOGPROBS,
            node(name="a", target="torch.unsqueeze", args=({"ref": "logprobs"}, 1)),
            node(name="b", target="operator.mul", args=({"ref": "a"}, {"ref": "logprobs"})),
            node(name="t", target="torch.sum", args=({"ref": "b"},)),
            OUTPUT,
        ]
    )
    loss = CustomLoss("loss", INPUTS[:1], square, Limits(max_targets=10_000))
    loss.check_sizes([(100,)])
    with pytest.raises(BadRequestError, match="max_targets"):
        loss.check_sizes([(101,)])
    with pytest.raises(BadRequestError, match="computes"):
        loss.check_sizes([(100,)] * 1000)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
arguments = st.recursive(
    scalars | st.builds(lambda name: {"ref": name}, st.sampled_from(["logprobs", "a", "t"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["tuple", "slice", "dict", "ellipsis", "float", "dtype", "ref"]),
            inner,
            max_size=1,
        )
    ),
    max_leaves=4,
)
targets = st.sampled_from([*FUNCTIONS, *METHODS, "logprobs", "output", "os.system"])
nodes = st.builds(
    CustomLossNode,
    st.sampled_from(["call_function", "call_method", "placeholder", "output", "get_attr"]),
    st.sampled_from(["a", "b", "t"]),
    targets,
    st.lists(arguments, max_size=3),
    st.dictionaries(st.sampled_from(["dim", "min", "keepdim"]), arguments, max_size=1),
)


@settings(max_examples=300 if THOROUGH else 100)
@given(st.lists(nodes, max_size=3), st.booleans())
def test_garbage_is_refused_in_words(between, whole):
    given = graph(*between) if whole else CustomLossGraph(between)
    try:
        loss = CustomLoss("loss", INPUTS[:1], given)
        loss.trace()
        found = loss.evaluate(ROW, [])
    except DataError:
        return
    assert found.gradient.shape == np.shape(ROW)
