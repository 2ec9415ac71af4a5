"""Writes the pages of losses from their docstrings: by family, and the page of conventions."""

from __future__ import annotations

import inspect
import re

from docs.formulas import formula_paragraph, in_markdown
from mintjax import losses

_ROLE = re.compile(r":\w+:`~?([\w.]+)`")

_ABOUT_LOSSES = """# Losses by family

Every function is pure, takes arrays of any batch shape, and returns one loss per token or per
answer, unreduced. [`mintjax.objectives`](reference/objectives.md) makes an objective of most of
them, under the same name. $\\text{sg}$ stops the gradient, $\\sigma$ is the logistic function, and
logprobs are in nats. [Conventions](conventions.md) says where other implementations differ.
"""

_ABOUT_CONVENTIONS = """# Conventions of losses

Implementations give one name to different formulas. Each section says what mintjax does, and what
others do. TRL 1.16, verl 0.9.1, SkyRL 0.4, Liger 0.8.5, tunix 0.1.7, rlax 0.1.9 and the Tinker
cookbook 0.6.1 are compared as they were run; OpenRLHF, torchtune and TuFT as an earlier comparison
found them.

"""


def pages() -> dict[str, str]:
    """Writes both pages, in Markdown, by file."""
    return {"losses.md": _losses(), "conventions.md": _conventions()}


def _losses() -> str:
    """Lists all losses with formula, use, differences, source, and a link to the reference."""
    parts = [_ABOUT_LOSSES]
    for family in losses.FAMILIES:
        parts.append(f"## {family[0].upper()}{family[1:]}\n")
        for entry in losses.catalogue():
            if entry.family == family:
                parts += _section(entry)
    return "\n".join(parts)


def _conventions() -> str:
    """Lists where implementations differ, point by point and trainer by trainer."""
    parts = [_ABOUT_CONVENTIONS, "## By point\n"]
    for row in losses.DIFFERENCES:  # a section each, because a phone is too narrow for a table
        others = "\n".join(f"- {who}: {what}" for who, what in row.others.items())
        parts.append(f"### {row.about}\n\nHere: {row.ours}.\n\nElsewhere:\n\n{others}\n")
    trainers = losses.conventions().partition("\n\n")[2]
    parts += ["## By trainer\n", trainers]
    for library, names in losses.COUNTERPARTS.items():
        rows = "\n".join(f"- `{name}`: {here or 'is not here'}" for name, here in names.items())
        parts.append(f"\n## Names in {library}\n\n{rows}\n")
    return "\n".join(parts)


def _section(entry: losses.Entry) -> list[str]:
    lines = [f"### [`{entry.name}`][mintjax.losses.{entry.name}]\n", f"{entry.summary}\n"]
    docstring = inspect.getdoc(getattr(losses, entry.name)) or ""
    lines.append(f"{_ROLE.sub(_link, in_markdown(formula_paragraph(docstring)))}\n")
    rows = [("When to use it", entry.when), ("What others do", entry.others)]
    rows.append(("Served by name", "; ".join(entry.served_by)))
    rows.append(("Reference", entry.source))
    lines += [f"**{title}.** {text[:1].upper()}{text[1:]}\n" for title, text in rows if text]
    return lines


def _link(found: re.Match[str]) -> str:
    name = found[1].rpartition(".")[2]
    return f"[`{name}`][mintjax.losses.{name}]" if hasattr(losses, name) else f"`{name}`"
