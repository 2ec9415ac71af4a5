"""How the metrics of chunks combine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mintjax.client.metrics import combine_metrics


def test_metrics_combine_by_their_suffix():
    parts = [
        {"a:sum": 1.0, "b:mean": 1.0, "c:min": 1.0, "d:max": 1.0, "e:slack": 1.0, "once:sum": 3.0},
        {"a:sum": 2.0, "b:mean": 5.0, "c:min": 5.0, "d:max": 5.0, "e:slack": 5.0},
    ]
    assert combine_metrics(parts, [3, 1]) == {
        "a:sum": 3.0,
        "b:mean": 2.0,
        "c:min": 1.0,
        "d:max": 5.0,
        "e:slack": 3.0,
        "once:sum": 3.0,
    }


def test_what_does_not_combine_is_kept():
    parts = [
        {"x:unique": 1.0, "same": 4.0, "differs": 1.0, "y:new": 1.0, "a:b:sum": 1.0},
        {"x:unique": 1.0, "same": 4.0, "differs": 2.0, "y:new": 2.0, "a:b:sum": 1.0},
    ]
    assert combine_metrics(parts, [1, 1]) == {
        "x:unique": 1.0,
        "x:unique_1": 1.0,
        "same": 4.0,
        "differs": 1.0,
        "differs_1": 2.0,
        "y:new": 1.0,
        "y:new_1": 2.0,
        "a:b:sum": 2.0,
    }


def test_hashes_combine_in_any_order():
    parts = [{"h:hash2": 3.0}, {"h:hash2": 8.0}, {"h:hash2": 1.0}]
    forwards = combine_metrics(parts, [1, 2, 3])
    assert forwards == combine_metrics(parts[::-1], [3, 2, 1])
    assert forwards != combine_metrics([*parts[:2], {"h:hash2": 2.0}], [1, 2, 3])


@given(st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=5))
def test_one_part_is_left_as_it_is(metrics):
    assert combine_metrics([metrics], [4]) == metrics
