"""The oldest versions that are tested are the oldest that are allowed."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def lower_bounds():
    """The lower bound of each package that the ``test`` extra brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in ("local", "protobuf", "cli", "test"):
        wanted += extras[extra]
    required = [Requirement(one) for one in wanted]
    bounds = {}
    for one in required:
        if one.name != "mintjax":
            (bound,) = one.specifier
            assert bound.operator == ">=", one
            bounds[one.name] = Version(bound.version)
    return bounds


def test_the_oldest_versions_are_those_of_pyproject():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pinned = (line.split("==") for line in lines if not line.startswith("#"))
    assert {name: Version(version) for name, version in pinned} == lower_bounds()
