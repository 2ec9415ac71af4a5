"""Drives tinker-cookbook's supervised, preference and RL loops against the embedded trainer.

    python -m benchmarks.cookbook [LOOP ...] [--cache DIRECTORY] [--python PYTHON]

Needs a Python 3.11. An environment with tinker-cookbook 0.6.1 is made from PyPI by name, once, in
the cache folder; it takes two gigabytes, most of them torch's. ``--python`` names the Python of one
that is there already. Where no environment can be made, the command says what is missing, and ends
with 2; it ends with 1 if a loop failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.real_trainers.environments import (
    NoEnvironmentError,
    Recipe,
    python_of,
    versions,
)
from mintjax import local

RECIPE = Recipe(
    "3.11",
    (
        (
            *("tinker==0.38.0", "transformers>=5.10,<6", "blobfile", "chz", "cloudpickle"),
            *("datasets", "pillow", "pyrage", "rich", "safetensors", "termcolor", "tiktoken"),
            *("aiohttp", "tqdm", "zstandard"),
        ),
        # Its own requirements name tml-renderers, which only one family of models needs.
        ("--no-deps", "tinker-cookbook==0.6.1"),
    ),
    with_torch=True,
)
LOOPS = Path(__file__).with_name("loops.py")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0 if all loops ran."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loops", nargs="*", metavar="LOOP", help="all if none is named")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "mintjax" / "real_trainers"
    )
    parser.add_argument("--python", type=Path, help="of an environment with tinker-cookbook")
    options = parser.parse_args(arguments)
    cache: Path = options.cache.resolve()
    try:
        python = options.python
        if python is None:
            cache.mkdir(parents=True, exist_ok=True)
            python = python_of("tinker-cookbook", RECIPE, cache, cache / "tinker-cookbook.log")
    except NoEnvironmentError as error:
        print(f"SKIPPED: {error}", file=sys.stderr)
        return 2
    print(versions(python, ("tinker-cookbook", "tinker", "torch", "transformers")), flush=True)
    with tempfile.TemporaryDirectory() as folder, local.running_server() as url:
        return _run(python, url, Path(folder), options.loops)


def _run(python: Path, url: str, folder: Path, loops: list[str]) -> int:
    """Runs the loops, prints their lines, and what else they said if they fail."""
    environment = {**os.environ, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), str(LOOPS), url, str(folder), *loops],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    print("\n".join(lines[-60:] if done.returncode else _results(lines)))
    return 1 if done.returncode else 0


def _results(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith('{"loop"')]


if __name__ == "__main__":
    sys.exit(main())
