"""A pass takes the hyperparameters that the loss itself takes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax import losses
from mintjax.errors import DataError
from mintjax.local import loss_fns

CLIPPED = ("ppo", "cispo", "gspo")
numbers = st.floats(width=32) | st.sampled_from([-0.5, 0.0, 0.8, 1.2])


@given(
    st.sampled_from(CLIPPED),
    st.fixed_dictionaries(
        {}, optional={"clip_low_threshold": numbers, "clip_high_threshold": numbers}
    ),
)
def test_bounds_of_a_ratio_are_finite_and_those_of_the_loss(name, config):
    taken = all(map(math.isfinite, config.values()))
    try:
        getattr(losses, name)([-1.0], [-1.0], [1.0], **config)
    except ValueError:
        taken = False
    check(taken, name, config)


@given(numbers)
def test_the_weight_of_dros_penalty_is_finite_and_not_negative(beta):
    check(0 <= beta < math.inf, "dro", {"beta": beta})


def check(taken, name, config):
    if taken:
        assert loss_fns.options(name, config)[name].items() >= config.items()
        return
    with pytest.raises(DataError, match="loss_fn_config") as caught:
        loss_fns.options(name, config)
    assert any(option in str(caught.value) for option in config)
