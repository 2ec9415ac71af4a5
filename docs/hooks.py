"""Adds to the documentation the pages that are written from the code; shows formulas as MathML."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from docs import built_page, losses_page, reference

LONG = 60
"""Formulas within a sentence scroll by themselves if their LaTeX is longer than this."""

_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_config(config: Any) -> None:
    """Lists the pages of the reference."""
    pages = [{page.title: f"reference/{name}.md"} for name, page in reference.PAGES.items()]
    config.nav[-1]["Reference"] = [*config.nav[-1]["Reference"], *pages]


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are written from the code."""
    pages = losses_page.pages() | reference.pages() | built_page.pages()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Replaces LaTeX by MathML, which browsers show without a script."""
    return _MATH.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    text = html.unescape(found[2]).strip()
    if found[1] == "div":
        return f'<div class="formula">{convert(text, display="block")}</div>'
    math = convert(text)
    return f'<span class="formula">{math}</span>' if len(text) > LONG else math
