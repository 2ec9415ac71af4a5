"""Every block of Python in README.md runs, one after another, as a reader would run them."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
NUMBER = re.compile(r"-?\d+\.\d+")


def test_the_python_blocks_run_and_print_what_they_are_said_to(capsys):
    blocks = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", README, re.S)
    assert len(blocks) >= 5
    names = {}
    for block, output in blocks:
        exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        if output:
            assert NUMBER.split(printed) == NUMBER.split(output)
            said = [float(number) for number in NUMBER.findall(output)]
            assert [float(n) for n in NUMBER.findall(printed)] == pytest.approx(said, abs=0.05)
    assert sum(bool(output) for _, output in blocks) >= 2


def test_it_opens_with_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.S)
    assert [command.rpartition("&& ")[2] for command in commands[:2]] == [
        ".venv/bin/mintjax demo",
        ".venv/bin/python -m pytest -q",
    ]
