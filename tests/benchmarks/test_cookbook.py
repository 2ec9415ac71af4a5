"""The loops of tinker-cookbook are run by a command, which says what it lacks."""

from __future__ import annotations

import sys

import pytest

cookbook = pytest.importorskip("benchmarks.cookbook.__main__")


def test_an_environment_that_cannot_be_made_is_told_and_no_failure_of_a_loop(monkeypatch, capsys):
    def none(*_):
        raise cookbook.NoEnvironmentError("there is no Python 3.11 here")

    monkeypatch.setattr(cookbook, "python_of", none)
    assert cookbook.main([]) == 2
    assert "SKIPPED: there is no Python 3.11 here" in capsys.readouterr().err


def test_a_loop_that_fails_is_a_failure_and_its_words_are_shown(monkeypatch, tmp_path, capsys):
    loops = tmp_path / "loops.py"
    loops.write_text('import sys; print("trained", sys.argv[3:]); sys.exit("no such field")')
    monkeypatch.setattr(cookbook, "LOOPS", loops)
    assert cookbook.main(["--python", sys.executable, "preference"]) == 1
    printed = capsys.readouterr().out
    assert "trained ['preference']" in printed
    assert "no such field" in printed
    loops.write_text('print("noise"); print(\'{"loop": "preference"}\')')
    assert cookbook.main(["--python", sys.executable]) == 0
    assert capsys.readouterr().out.endswith('\n{"loop": "preference"}\n')
