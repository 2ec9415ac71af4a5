import pytest

from mintjax.errors import DataError
from mintjax.step.accumulated import Accumulated, Sent


def after(accumulated, *requests):
    """Notes requests that were accepted and succeeded."""
    for request in requests:
        accumulated.accepted(request)
        accumulated.applied(request)


def test_what_is_announced_is_what_a_gradient_is_scaled_for():
    accumulated = Accumulated()
    assert accumulated.datums_in_step(4, 8) == 8
    after(accumulated, Sent(4, 8))
    with pytest.raises(DataError, match=r"8 datums were announced .* and 4 came"):
        accumulated.check_step()
    with pytest.raises(DataError, match="4 are accumulated, 4 are to be added, announced were 9"):
        accumulated.datums_in_step(4, 9)
    with pytest.raises(DataError, match="announced were none"):
        accumulated.datums_in_step(4, None)
    assert accumulated.datums_in_step(4, 8) == 8
    after(accumulated, Sent(4, 8))
    accumulated.check_step()
    after(accumulated, Sent(clears=True))
    assert accumulated.datums_in_step(3, None) == 3


def test_a_failed_optimizer_step_leaves_what_was_accumulated():
    accumulated, step = Accumulated(), Sent(clears=True)
    after(accumulated, Sent(4, 4))
    accumulated.accepted(step)
    accumulated.failed(step)
    with pytest.raises(DataError, match="4 are accumulated"):
        accumulated.datums_in_step(4, None)


def test_a_failed_pass_does_not_count():
    accumulated, failing = Accumulated(), Sent(4, 8)
    after(accumulated, Sent(4, 8))
    accumulated.accepted(failing)
    with pytest.raises(DataError):
        accumulated.datums_in_step(4, 8)
    accumulated.failed(failing)
    assert accumulated.datums_in_step(4, 8) == 8


def test_a_refused_request_never_counts():
    accumulated, refused = Accumulated(), Sent(4, 4)
    accumulated.failed(refused)
    assert accumulated.datums_in_step(5, None) == 5


def test_passes_behind_an_optimizer_step_count_for_the_next():
    accumulated, first, step, second = Accumulated(), Sent(4, 4), Sent(clears=True), Sent(2, 2)
    for request in (first, step, second):
        accumulated.accepted(request)
    with pytest.raises(DataError, match="2 are accumulated"):
        accumulated.datums_in_step(1, None)
    for request in (first, step, second):  # answers come in any order
        accumulated.applied(request)
    with pytest.raises(DataError, match="2 are accumulated"):
        accumulated.datums_in_step(1, None)


@pytest.mark.parametrize("request_", [Sent(4, 4), Sent(clears=True)])
def test_after_an_unknown_outcome_no_number_is_guessed(request_):
    accumulated = Accumulated()
    accumulated.accepted(request_)
    accumulated.lost(request_)
    for ask in (accumulated.check_step, lambda: accumulated.datums_in_step(1, 5)):
        with pytest.raises(DataError, match="their number is not known"):
            ask()
    after(accumulated, Sent(clears=True))  # a checkpoint was loaded
    assert accumulated.datums_in_step(1, None) == 1
