"""Builds the documentation and checks it: python .ci/documentation.py DIRECTORY."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mkdocstrings import Inventory  # noqa: E402

from docs.public import everything  # noqa: E402

UNREAD = re.compile(r"arithmatex|\$\$|\\frac|:(?:func|class|meth|mod|attr|data|exc):|<p>Args:")
"""What a page shows if its formulas or docstrings were not understood."""


class Page(HTMLParser):
    """Collects what a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Reads one tag."""
        named = dict(attrs)
        self.anchors |= {named.get("id") or ""}
        if tag == "a":
            self.links.append(named.get("href") or "")
        elif tag != "link" or named.get("rel") in ("stylesheet", "icon"):
            self.loads += [value for key in ("src", "href") if (value := named.get(key))]


def build(directory: Path) -> None:
    """Builds the pages; a warning is an error."""
    command = ["mkdocs", "build", "--strict", "--quiet", "--config-file", "docs/mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(
        [sys.executable, "-m", *command, "--site-dir", str(directory)],
        cwd=ROOT,
        env=environment,
        check=True,
    )


def complaints(directory: Path) -> list[str]:
    """Finds public names that no page shows, bad links, what is not local, and raw markup."""
    pages = {path: Page(path) for path in directory.rglob("*.html") if path.name != "404.html"}
    with (directory / "objects.inv").open("rb") as file:
        shown = set(Inventory.parse_sphinx(file))
    found = [f"no page shows {name}" for name in public_names() if not {*name} & shown]
    for path, page in pages.items():
        where = path.relative_to(directory)
        found += [f"{where} loads {url}" for url in page.loads if urlsplit(url).netloc]
        found += [f"{where} shows {raw!r}" for raw in set(UNREAD.findall(path.read_text()))]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not link:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{where} links to {link}, which is not there")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{where} links to {link}, which has no such anchor")
    return found


def public_names() -> list[tuple[str, str]]:
    """Lists what users import, under the name that they use and where it is defined."""
    found: list[tuple[str, str]] = []
    public = everything()
    for name, value in public.items():
        owner = public.get(name.rpartition(".")[0])
        if owner is None:
            found.append((name, f"{value.__module__}.{value.__qualname__}"))
        else:  # a method
            member = name.rpartition(".")[2]
            found.append((name, f"{owner.__module__}.{owner.__qualname__}.{member}"))
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1]).absolute()
    build(target)
    if errors := complaints(target):
        sys.exit("\n".join(errors))
