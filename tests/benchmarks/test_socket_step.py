"""A step over a socket is counted whole."""

from __future__ import annotations

import pytest

socket_step = pytest.importorskip("benchmarks.socket_step")


def test_a_step_is_counted_whole():
    """Three requests, and one for the result of each; more only if a result is asked for again."""
    rows = socket_step.measure(warm_up=1, steps=1)
    assert [row["encoding"] for row in rows] == ["JSON", "protocol buffers"]
    for row in rows:
        assert row["requests"] >= 6
        assert 0 < row["rest_ms"] < row["step_ms"]
