"""Every number and figure of README, measured anew: one command.

    python -m benchmarks.report [--quick] [--only NAME ...] [--draw] [--sdk-038 PYTHON]

Needs the ``bench`` extra. Runs each benchmark in a process of its own, one after the other; keeps
what it gives in ``benchmarks/results/NAME.json`` with the command, the machine, the versions and
the date; draws ``docs/figures/NAME.svg``; and rewrites what stands in README.md between
``<!-- numbers:NAME -->`` and ``<!-- /numbers -->``. ``--draw`` does all but the measuring.
``--quick`` measures less, and writes everything below ``build/report`` instead.

A benchmark that fails leaves its numbers as they were, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.tables import TABLES
from mintjax.bench import Machine, machine

ROOT = Path(__file__).parents[1]
NAMES = tuple(name for name in TABLES if name != "real_trainers")  # which writes its own


class Kept(msgspec.Struct, kw_only=True):
    """The kept results of a benchmark.

    Args:
        command: that gives these rows.
        machine: where, with what, and when.
        rows: as the benchmark writes them.
    """

    command: str
    machine: Machine
    rows: list[dict[str, Any]]


def measure(name: str, quick: bool, extra: Sequence[str]) -> Kept:
    """Run a benchmark.

    Raises:
        subprocess.CalledProcessError: it failed; what it printed stands above.
    """
    if name == "demo":
        arguments = ["-m", "mintjax", "demo", "--json", *["--steps", "5"] * quick]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return Kept(command="mintjax demo --json", machine=machine(), rows=rows)
    options = [*["--quick"] * quick, *extra]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--json", str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        rows = json.loads(path.read_text())
    words = ["python", "-m", f"benchmarks.{name}", *["--quick"] * quick]
    return Kept(command=" ".join(words), machine=machine(), rows=rows)


def with_numbers(text: str, name: str, kept: Kept) -> str | None:
    """A README with a benchmark's numbers in their place, or None if it has no place for them."""
    where = re.compile(rf"(<!-- numbers:{name} -->\n).*?(<!-- /numbers -->)", re.S)
    if not where.search(text):
        return None
    numbers = f"{TABLES[name](kept.rows)}\n\n{provenance(kept)}\n"
    return where.sub(lambda found: found[1] + numbers + found[2], text)


def provenance(kept: Kept) -> str:
    """By which command, where, with what and when."""
    m = kept.machine
    versions = ", ".join(f"{name} {version}" for name, version in m.packages.items())
    return (
        f"<sub>`{kept.command}`, {m.date}, on {m.cores} cores of {m.cpu}, {m.system}, "
        f"Python {m.python}, {versions}.</sub>"
    )


def main() -> int:
    """Measure, keep, draw and rewrite; returns 0 if all went well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="try it: into build/report")
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, help="some of them")
    parser.add_argument("--draw", action="store_true", help="from what was kept; measure nothing")
    parser.add_argument("--sdk-038", help="Python that has tinker 0.38.0, for transport")
    options = parser.parse_args()
    results, figures, readme = (
        ROOT / "benchmarks" / "results",
        ROOT / "docs" / "figures",
        ROOT / "README.md",
    )
    if options.quick:
        results = figures = ROOT / "build" / "report"
    from benchmarks.figures import draw  # late: what only reads results does without figures

    results.mkdir(parents=True, exist_ok=True)
    text, failed = readme.read_text(), False
    for name in options.only:
        path = results / f"{name}.json"
        extra = ["--sdk-038", options.sdk_038] if options.sdk_038 and name == "transport" else []
        try:
            if not options.draw:
                print(f"== {name}", flush=True)
                kept = measure(name, options.quick, extra)
                path.write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
            kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"FAILED: {name}: {error}", file=sys.stderr)
            failed = True
            continue
        drawn = draw(name, kept.rows, figures)
        print(f"{path.relative_to(ROOT)}, {drawn.relative_to(ROOT)}")
        rewritten = with_numbers(text, name, kept)
        if rewritten is None:
            print(f"README.md has no place for these: <!-- numbers:{name} --> <!-- /numbers -->")
        text = rewritten or text
    (results if options.quick else ROOT).joinpath("README.md").write_text(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
