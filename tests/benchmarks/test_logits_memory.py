"""The benchmark of memory: both ways compute the same, and XLA plans less for the chunks."""

from __future__ import annotations

import pytest

logits_memory = pytest.importorskip("benchmarks.logits_memory")  # left out of the package on PyPI


def test_chunks_are_planned_less_memory_for_the_same_numbers():
    plain, fused = (logits_memory.measure(way, 512, vocabulary=1000) for way in ("plain", "fused"))
    assert fused["value"] == pytest.approx(plain["value"], rel=1e-5)
    assert fused["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-5)
    assert fused["planned_mb"] < 0.5 * plain["planned_mb"]
