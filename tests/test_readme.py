"""Every block of Python in README.md runs, one after another, as a reader would run them."""

import re
from pathlib import Path

from tests.blocks import check_blocks

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run_and_print_what_they_are_said_to(capsys):
    outputs = check_blocks(README, "README.md", capsys)
    assert len(outputs) >= 5
    assert sum(map(bool, outputs)) >= 2


def test_it_opens_with_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.S)
    assert [command.rpartition("&& ")[2] for command in commands[:2]] == [
        ".venv/bin/mintjax demo",
        ".venv/bin/python -m pytest -q",
    ]
