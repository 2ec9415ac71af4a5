"""The script of the guide to larger trainers runs, with address and key from the environment."""

import re
from pathlib import Path

from mintjax import local

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "guides" / "growing.md"


def test_the_script_trains_over_a_socket(monkeypatch, capsys):
    (script,) = re.findall(r'```python title="train.py"\n(.*?)```', PAGE.read_text(), re.S)
    with local.running_server() as base_url:
        monkeypatch.setenv("TINKER_BASE_URL", base_url)
        monkeypatch.setenv("TINKER_API_KEY", "tml-any")
        monkeypatch.delenv("MINT_BASE_URL", raising=False)
        monkeypatch.delenv("MINT_API_KEY", raising=False)
        exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
