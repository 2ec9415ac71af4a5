"""The command line."""

from __future__ import annotations

import importlib.metadata
import io
import sys
import warnings
from typing import Annotated

from mintjax.errors import MintjaxError

try:
    import rich as rich
    import typer
except ModuleNotFoundError as error:
    sys.exit(f'the command line needs {error.name}: pip install "mintjax[cli]"')

from mintjax.cli._bench import bench
from mintjax.cli._console import complain
from mintjax.cli._demo import demo
from mintjax.cli._losses import losses
from mintjax.cli._probe import probe
from mintjax.cli._serve import serve

__all__ = ["app", "main"]

_EXAMPLES = """
**Examples**

- `mintjax demo`: train a small model on preference pairs, here, in half a minute

- `mintjax demo --loss dpo --data pairs.jsonl --json`: your pairs, one line of JSON a step

- `mintjax serve --port 8000`: a trainer for any client of the protocol

- `mintjax probe --base-url http://localhost:8000`: what is this trainer, does it sum or average?

- `mintjax bench ppo --datums 8,64,256 --against torch --plot cost.svg`: what a loss costs

- `mintjax bench my_losses:preference --trainer embedded`: what yours does, and its share of a step

- `mintjax losses`: what each trainer makes of the built-in losses

It ends with 0 if all went well, 1 if something failed, 2 if the command was not understood, 130
after Ctrl-C. Results go to standard output, progress and errors to standard error.
"""

app = typer.Typer(
    name="mintjax",
    help="Custom JAX losses for models that train elsewhere: on Tinker, MinT, SkyRL, or here.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, serve, probe, bench, losses):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            print("mintjax", importlib.metadata.version("mintjax"))
        except importlib.metadata.PackageNotFoundError:
            print("mintjax 0.0.0 (not installed)")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print it, and end."
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Runs the command line; a mistake of the user's is a message, not a traceback."""

    def show(message: object, *_: object, **__: object) -> None:
        complain(message)

    warnings.showwarning = show
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may know no more than ASCII
    try:
        app()
    except (MintjaxError, OSError) as error:
        complain(error)
        sys.exit(1)
