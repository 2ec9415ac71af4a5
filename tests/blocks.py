"""Runs the Python blocks of a page, one after another, as a reader would run them."""

import re

import pytest

NUMBER = re.compile(r"-?\d+\.\d+")
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.S)


def check_blocks(page: str, name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs the blocks in one namespace, and holds what they print against the block below.

    Args:
        page: the text of the page.
        name: its name, for tracebacks.
        capsys: reads what the blocks print.

    Returns:
        For each block its output, as the page has it; empty where it has none.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    outputs: list[str] = []
    for block, output in BLOCK.findall(page):
        exec(compile(block, name, "exec"), names)
        printed = capsys.readouterr().out
        if output:
            said, found = ([*map(float, NUMBER.findall(text))] for text in (output, printed))
            assert NUMBER.split(printed) == NUMBER.split(output), f"{name} printed:\n{printed}"
            assert found == pytest.approx(said, abs=0.05), f"{name} printed:\n{printed}"
        outputs.append(output)
    return outputs
