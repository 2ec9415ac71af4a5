"""Environments of the trainers: made from PyPI by name, once, and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TORCH = "torch==2.13.0"
"""The one release of torch that any of them gets."""


class NoEnvironmentError(RuntimeError):
    """An environment cannot be made here; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What an environment is made of.

    Args:
        python: the version of Python, such as ``"3.12"``.
        steps: the arguments of each call of ``pip install``, in order.
        with_torch: it sees torch, which is large, in an environment that all of them share.
    """

    python: str
    steps: tuple[tuple[str, ...], ...]
    with_torch: bool = False

    @property
    def key(self) -> str:
        """Names the recipe by its content."""
        content = [self.python, self.steps, self.with_torch and TORCH]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def python_of(name: str, recipe: Recipe, cache: Path, log: Path) -> Path:
    """Finds the Python of an environment, and makes the environment if it is not there yet.

    Args:
        name: of the environment; a folder in the cache.
        recipe: what it is made of; another recipe makes it anew.
        cache: where environments are kept.
        log: gets what pip prints.

    Raises:
        NoEnvironmentError: there is no such Python here, or pip fails.
    """
    place = cache / name
    python, made = place / "bin" / "python", place / "made-of"
    if made.exists() and made.read_text() == recipe.key:
        return python
    shared = None
    if recipe.with_torch:
        shared = python_of(f"torch-{recipe.python}", Recipe(recipe.python, ((TORCH,),)), cache, log)
    shutil.rmtree(place, ignore_errors=True)
    print(f"making the environment {place}; {log} has what pip says", flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    with log.open("a") as out:
        _run([interpreter(recipe.python), "-m", "venv", str(place)], out)
        if shared is not None:
            _packages(place).joinpath("torch.pth").write_text(f"{_packages(shared.parents[1])}\n")
        for step in (("--upgrade", "pip"), *recipe.steps):
            _run([*install, *step], out)
    made.write_text(recipe.key)
    return python


def _run(command: list[str], out: IO[str]) -> None:
    done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise NoEnvironmentError(f"{' '.join(command)} failed; see {out.name}")


def _packages(environment: Path) -> Path:
    """Finds where an environment's packages are."""
    return next(environment.glob("lib/python*/site-packages"))


def interpreter(version: str) -> str:
    """Finds a Python of a version: this one, on the PATH, or pyenv's.

    Raises:
        NoEnvironmentError: there is none.
    """
    candidates = [
        sys.executable,
        shutil.which(f"python{version}") or "",
        *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))),
    ]
    for candidate in candidates:
        if candidate and _version(candidate) == version:
            return candidate
    raise NoEnvironmentError(f"there is no Python {version} here")


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Reads the installed versions of packages in an environment."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([str(python), "-c", code, *packages], capture_output=True, check=True)
    return json.loads(done.stdout)


def _version(python: str) -> str:
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip()
