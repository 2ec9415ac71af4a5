"""What the laws share."""

from collections.abc import Iterator

import jax
import pytest
from hypothesis import settings

from mintjax.gradients import compiled


@pytest.fixture(autouse=True)
def _keeps_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keeps the programs of all cases of a test, and forgets them after it."""
    monkeypatch.setattr(compiled, "_KEPT", 1000)
    yield
    if not settings.default.derandomize:
        compiled._programs.clear()
        jax.clear_caches()
