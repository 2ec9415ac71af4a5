"""The blocks of Python in the documentation run, each page by itself."""

from pathlib import Path

import pytest

from tests.blocks import check_blocks
from tests.examples import THOROUGH

PAGES = Path(__file__).parents[2] / "docs" / "pages"
NAMES = sorted(page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md"))
SLOW = {
    "guides/own_loss.md",
    "guides/local_model.md",
    "recipes/distillation.md",
    "recipes/grpo.md",
}
"""Pages whose blocks compile for seconds; they run under the thorough profile."""


def test_the_slow_pages_are_there():
    assert set(NAMES) >= SLOW


@pytest.mark.parametrize("name", NAMES if THOROUGH else sorted({*NAMES} - SLOW))
def test_the_python_blocks_run_and_print_what_they_are_said_to(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_blocks((PAGES / name).read_text(), name, capsys)
