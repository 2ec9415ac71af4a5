"""The rooms of README's table, and which of them imports from which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mintjax"


@dataclass(frozen=True)
class Room:
    """A row of the table.

    Args:
        entries: files, and folders with a slash behind them, below ``mintjax/``.
        holds: what is in it, in README's words.
    """

    entries: tuple[str, ...]
    holds: str

    @property
    def name(self) -> str:
        """Its first entry."""
        return self.entries[0]

    def has(self, path: str) -> bool:
        """Whether a file, below ``mintjax/``, belongs to it."""
        return any(path == e or (e.endswith("/") and path.startswith(e)) for e in self.entries)


def rooms(readme: str | None = None) -> list[Room]:
    """The rows of the table under "How it is built", in their order."""
    text = (ROOT / "README.md").read_text() if readme is None else readme
    section = text.partition("\n## How it is built\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", section, re.M)
    return [Room(tuple(re.findall("`(.*?)`", entries)), holds) for entries, holds in rows]


def room_of(path: str, among: list[Room]) -> Room:
    """The one room that a file belongs to.

    Raises:
        ValueError: it belongs to none, or to several.
    """
    found = [room for room in among if room.has(path)]
    if len(found) != 1:
        names = " and ".join(room.name for room in found) or "no room"
        raise ValueError(f"mintjax/{path} belongs to {names} of README's table")
    return found[0]


def files() -> dict[str, str]:
    """Every file of Python in ``mintjax/``, by the name of its module."""
    paths = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return {_module(path): path.as_posix() for path in paths}


def imports() -> dict[str, set[str]]:
    """For each file those it imports: in functions, and for types alone, as well as at the top."""
    known = files()
    return {
        path: {known[name] for name in _imported(ast.parse((PACKAGE / path).read_text()), known)}
        for path in known.values()
    }


def between_rooms(among: list[Room]) -> dict[str, set[str]]:
    """For each room the names of those it imports from."""
    result: dict[str, set[str]] = {room.name: set() for room in among}
    for path, others in imports().items():
        name = room_of(path, among).name
        result[name] |= {room_of(other, among).name for other in others} - {name}
    return result


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """A graph without cycles, without the edges that longer ways make superfluous."""

    def beyond(node: str) -> set[str]:
        return graph[node].union(*(beyond(other) for other in graph[node]))

    return {
        node: others - set().union(*(beyond(other) for other in others))
        for node, others in graph.items()
    }


def _module(path: Path) -> str:
    parts = ["mintjax", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(tree: ast.AST, known: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in known else node.module
