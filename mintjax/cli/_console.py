"""The console that all commands print to."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
"""The option that every command has."""


def print_json(value: Any) -> None:
    """Prints a value as one line of JSON on standard output."""
    print(msgspec.json.encode(value).decode(), flush=True)


def plain() -> Console:
    """Returns standard output, for text that is printed as it is."""
    return Console(highlight=False, markup=False, emoji=False)


def complain(message: object) -> None:
    """Prints a message on standard error, where it does not get into what is piped."""
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    console.print("mintjax:", style="bold red", end=" ")
    console.print(str(message), markup=False)


@contextmanager
def progress() -> Generator[Progress]:
    """Progress on standard error, while the block runs; nothing where that is no terminal."""
    console = Console(stderr=True, highlight=False)
    bars = Progress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    if bars.disable:
        yield bars  # not started, because old versions of rich print an empty line when they stop
        return
    with bars:
        yield bars
