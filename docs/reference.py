"""Writes the pages of the reference: one for each public module, and a list of all names."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from typing import NamedTuple

from docs.public import names_of

_ROLE = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`")


class Page(NamedTuple):
    """A page of the reference.

    Args:
        title: its heading.
        holds: its contents, in a few words.
        shows: the modules, functions and classes that it shows.
        first: the names of its module that come before the others.
        bases: whether classes show what they are made of.
    """

    title: str
    holds: str
    shows: tuple[str, ...]
    first: tuple[str, ...] = ()
    bases: bool = False


PAGES = {
    "client": Page(
        "Client", "sessions with a trainer, training and sampling, futures", ("mintjax.client",),
        ("ServiceClient", "TrainingClient", "SamplingClient", "APIFuture"),
    ),
    "types": Page(
        "Values", "datums and the other values that travel",
        ("mintjax.types", "mintjax.tensors.TensorData"),
    ),
    "runs": Page(
        "Runs and checkpoints", "what a trainer keeps, as it lists it", ("mintjax.runs",)
    ),
    "ragged": Page(
        "Ragged rows and batches", "rows of different lengths as one value", ("mintjax.ragged",)
    ),
    "objectives": Page(
        "Objectives", "losses as functions of a batch and its logprobs", ("mintjax.objectives",)
    ),
    "losses": Page(
        "Losses", "losses, advantages, estimators and diagnostics of arrays", ("mintjax.losses",)
    ),
    "gradients": Page(
        "Gradients", "the gradient of any objective, without a trainer", ("mintjax.gradients",)
    ),
    "remote": Page(
        "Remote model", "a model that trains elsewhere as a JAX function",
        (
            "mintjax.remote.logprobs.remote_logprobs",
            "mintjax.remote.logprobs.RemoteLogprobs",
            "mintjax.remote.optimizer.remote_optimizer",
            "mintjax.remote.callback.remote_jit",
            "mintjax.remote.optimizer.RemoteOptimizerState",
            "mintjax.remote.trainer",
        ),
    ),
    "interop": Page(
        "Other libraries", "losses and clients of torch and of the official SDK",
        ("mintjax.interop",),
    ),
    "testing": Page("Testing", "the laws that a loss must obey", ("mintjax.testing",)),
    "local": Page("Embedded trainer", "a small trainer for one machine", ("mintjax.local",)),
    "reduction": Page(
        "Reductions", "what a trainer divides losses by", ("mintjax.step.reduction",)
    ),
    "mint": Page("MinT", "what only MinT offers", ("mintjax.mint",)),
    "errors": Page("Errors", "what mintjax raises", ("mintjax.errors",), bases=True),
    "bench": Page("Benchmarks", "what the client's side of a step costs", ("mintjax.bench",)),
    "protobuf": Page(
        "Protocol buffers", "messages as protocol buffers", ("mintjax.protocol.protobuf",)
    ),
}  # fmt: skip
"""The pages, by the names of their files."""


def pages() -> dict[str, str]:
    """Writes all pages, in Markdown, by file."""
    written = {f"reference/{name}.md": _page(page) for name, page in PAGES.items()}
    return {"reference/index.md": _index(), **written}


def _page(page: Page) -> str:
    """Writes a page, whose heading is that of its module if it shows a single one."""
    if len(page.shows) == 1:
        return _show(page.shows[0], page.title, page.first, bases=page.bases)
    return "\n".join([f"# {page.title}\n", *map(_show, page.shows)])


def _show(path: str, title: str = "", first: tuple[str, ...] = (), *, bases: bool = False) -> str:
    """Writes the directive that shows a module with all that is public in it, or one name."""
    options: dict[str, object] = {"heading_level": 1 if title else 2, "show_bases": bases}
    if title:
        options |= {"heading": title, "toc_label": title}
    if first:
        others = [name for name in names_of(path) if name not in first]
        options["members"] = [*first, *others]
    return f"::: {path}\n    options: {json.dumps(options)}\n"


def _index() -> str:
    parts = ["# Reference\n", "Each page has the public names of one part of the package.\n"]
    parts += [f"- [{page.title}]({name}.md): {page.holds}" for name, page in PAGES.items()]
    parts.append("\n## What `import mintjax` offers { #mintjax }\n")
    for name in names_of("mintjax"):
        value = getattr(importlib.import_module("mintjax"), name)
        summary = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
        summary = _ROLE.sub(r"`\1`", summary)
        if inspect.ismodule(value):
            path = value.__name__
        else:
            path = f"{value.__module__}.{value.__qualname__}"
        parts.append(f"- [`{name}`][{path}]: {summary}")
    return "\n".join([*parts, ""])
