"""The modules of README's table, and which of them imports from which."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mintjax"


@dataclass(frozen=True)
class Module:
    """A row of the table.

    Args:
        entries: files, and folders with a slash behind them, below ``mintjax/``.
        holds: its contents, in README's words.
    """

    entries: tuple[str, ...]
    holds: str

    @property
    def name(self) -> str:
        """Its first entry."""
        return self.entries[0]

    def has(self, path: str) -> bool:
        """Tells whether a file, below ``mintjax/``, belongs to it."""
        return any(path == e or (e.endswith("/") and path.startswith(e)) for e in self.entries)


def modules(readme: str | None = None) -> list[Module]:
    """Reads the table under "How it is built", in its order."""
    text = (ROOT / "README.md").read_text() if readme is None else readme
    section = text.partition("\n## How it is built\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", section, re.M)
    return [Module(tuple(re.findall("`(.*?)`", entries)), holds) for entries, holds in rows]


def module_of(path: str, among: list[Module]) -> Module:
    """Finds the one module that a file belongs to.

    Raises:
        ValueError: it belongs to none, or to several.
    """
    found = [module for module in among if module.has(path)]
    if len(found) != 1:
        names = " and ".join(module.name for module in found) or "no module"
        raise ValueError(f"mintjax/{path} belongs to {names} of README's table")
    return found[0]


def files() -> dict[str, str]:
    """Lists every Python file in ``mintjax/``, by the name under which it is imported."""
    paths = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return {_dotted(path): path.as_posix() for path in paths}


def imports() -> dict[str, set[str]]:
    """Finds, for each file, the files it imports: in functions and for types alone, too."""
    known = files()
    return {
        path: {known[name] for name in _imported(ast.parse((PACKAGE / path).read_text()), known)}
        for path in known.values()
    }


def _dotted(path: Path) -> str:
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
