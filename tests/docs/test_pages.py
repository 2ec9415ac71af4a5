"""The blocks of Python in the documentation run, each page by itself."""

from pathlib import Path

import pytest

from tests.blocks import check_blocks

PAGES = Path(__file__).parents[2] / "docs" / "pages"
NAMES = sorted(page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.md"))


@pytest.mark.parametrize("name", NAMES)
def test_the_python_blocks_run_and_print_what_they_are_said_to(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_blocks((PAGES / name).read_text(), name, capsys)
