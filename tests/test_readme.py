"""Every block of Python in README.md runs, one after another, as a reader would run them."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "'accuracy': 1.0" in printed
    assert "ppo(" in printed


def test_it_opens_with_two_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.S)
    assert [command.rpartition("&& ")[2] for command in commands[:2]] == [
        ".venv/bin/mintjax demo",
        ".venv/bin/python -m pytest -q",
    ]
