"""Keeps what the checks found, and puts the table into README."""

from __future__ import annotations

from typing import Any

import msgspec

from benchmarks.report import ROOT, Kept, with_numbers
from mintjax.bench import machine


def keep(rows: list[dict[str, Any]]) -> None:
    """Writes ``benchmarks/results/real_trainers.json`` and README's table.

    The rows of trainers that were not tried this time stay as they were.

    Args:
        rows: as :class:`benchmarks.real_trainers.checks.Row` has them.
    """
    path = ROOT / "benchmarks" / "results" / "real_trainers.json"
    if path.exists():
        rows = merged(msgspec.json.decode(path.read_bytes(), type=Kept).rows, rows)
    kept = Kept(command="python -m benchmarks.real_trainers", machine=machine(), rows=rows)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    readme = ROOT / "README.md"
    text = with_numbers(readme.read_text(), "real_trainers", kept)
    if text is None:
        raise SystemExit("README.md has no place for these: <!-- numbers:real_trainers -->")
    readme.write_text(text)


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replaces the rows of each trainer that there are new ones of."""
    tried = {row["trainer"] for row in new}
    return [row for row in old if row["trainer"] not in tried] + new
