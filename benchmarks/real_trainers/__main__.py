"""Starts real trainers on this machine's CPU and puts each through one list of checks.

    python -m benchmarks.real_trainers [NAME ...] [--cache DIRECTORY] [--json FILE] [--write]

Needs the ``bench`` extra, and Pythons 3.11 and 3.12. Environments are made from PyPI by name, once,
in the cache folder; they take some gigabytes. The base model is a Qwen3 of random numbers that is
written there too. Each trainer runs on the loopback address, with a log of its own, and is ended
with all its children. A gradient is read off a trainer by a step of Adam whose update is the
gradient, and is held against torch's through the same base model and adapters.

``--write`` keeps the rows in ``benchmarks/results/real_trainers.json`` and writes README's table.
Ends with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.real_trainers import checks
from benchmarks.real_trainers.checks import Row, State, Torch
from benchmarks.real_trainers.environments import NoEnvironmentError, python_of, versions
from benchmarks.real_trainers.trainers import (
    REFERENCE,
    TRAINERS,
    NotStartedError,
    Trainer,
    started,
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0 if no check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TRAINERS)}")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "mintjax" / "real_trainers"
    )
    parser.add_argument("--only", action="append", default=[], help="checks with this in the name")
    parser.add_argument("--minutes", type=float, default=20, help="for one trainer, at most")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--write", action="store_true", help="keep the rows, and README's table")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(TRAINERS)
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}; there are {', '.join(TRAINERS)}")
    if options.only and options.write:
        parser.error("--write keeps what all checks say, so it goes without --only")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    reference = python_of("reference", REFERENCE, cache, cache / "reference.log")
    model = cache / "tiny-qwen3"
    if not (model / "model.safetensors").exists():
        script = str(Path(checks.__file__).with_name("reference.py"))
        subprocess.run([str(reference), script, "write", str(model)], check=True)
    rows: list[Row] = []
    with Torch(reference, model) as torch:
        for name in options.names or TRAINERS:
            rows += _tried(TRAINERS[name], cache, model, torch, options.only, options.minutes)
    plain = [asdict(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(plain, indent=1) + "\n")
    if options.write:
        from benchmarks.real_trainers.kept import keep

        keep(plain)
    return 1 if any(row.outcome == "no" for row in rows) else 0


def _tried(
    trainer: Trainer, cache: Path, model: Path, torch: Torch, only: list[str], minutes: float
) -> list[Row]:
    """Starts a trainer and runs the checks; a trainer that does not start gives one row."""
    began = time.perf_counter()
    print(f"== {trainer.name} {trainer.version}", flush=True)
    try:
        python = python_of(trainer.name, trainer.recipe, cache, cache / f"{trainer.name}.log")
        found = versions(python, (trainer.name, *trainer.packages))
        with (
            tempfile.TemporaryDirectory(prefix=f"{trainer.name}-") as directory,
            started(trainer, python, Path(directory), model) as running,
            _cache_folder(Path(directory) / "cache"),
            checks.client(running) as service,
        ):
            stop = threading.Timer(60 * minutes, running.end)
            stop.daemon = True
            stop.start()
            words = ", ".join(f"{name} {version}" for name, version in found.items())
            rows = [Row(trainer.name, "versions", "yes", words, time.perf_counter() - began)]
            try:
                rows += checks.run(State(running, torch, service), only, _tell)
            finally:
                stop.cancel()
                log = Path(directory) / "log"
                (cache / f"{trainer.name}.run.log").write_bytes(log.read_bytes())
            return rows
    except (NoEnvironmentError, NotStartedError) as error:
        row = Row(trainer.name, "starts", "no", str(error), time.perf_counter() - began)
        _tell(row)
        return [row]


@contextmanager
def _cache_folder(folder: Path) -> Iterator[None]:
    """Keeps what the client measures of this trainer out of the user's cache folder."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def _tell(row: Row) -> None:
    print(f"{row.outcome:8} {row.check}: {row.detail} [{row.seconds:.1f} s]", flush=True)


if __name__ == "__main__":
    sys.exit(main())
