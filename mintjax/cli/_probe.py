"""``mintjax probe``."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from mintjax.cli._console import AsJson, plain, print_json, progress


def probe(
    base_url: Annotated[
        str | None,
        typer.Option(help="The trainer; MINT_BASE_URL or TINKER_BASE_URL if absent, else MinT's."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            envvar="TINKER_BASE_MODEL",
            help="Of the throwaway model; the first on offer if absent.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure",
            help="Train a throwaway model for a few steps, to see how losses are reduced.",
        ),
    ] = True,
    json: AsJson = False,
) -> None:
    """Say what a trainer is: its models, its flags, and what it makes of losses.

    A gradient computed here is exact only where losses are summed, or where it is known what they
    are divided by; no answer of a trainer says, so it is measured. The key comes from MINT_API_KEY
    or TINKER_API_KEY.
    """
    from mintjax.client import ServiceClient

    with ServiceClient(base_url) as service, progress() as bars:
        began = time.perf_counter()
        task = bars.add_task("probing", total=3, state="asking for models")
        offered = service.get_server_capabilities().supported_models
        bars.update(task, advance=1, state="measuring the reduction")
        reduction = service.probe(base_model) if measure else None
        bars.update(task, advance=1, state="asking for flags")
        flags = service.get_client_config()  # with the encoding that the passes have found
        seconds = time.perf_counter() - began
        url = service.base_url
    found = {
        "base_url": url,
        "models": offered,
        "flags": flags,
        "reduction": reduction,
        "carried_by": None if reduction is None else reduction.loss_fn,
        "seconds": seconds,
    }
    if json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    console = plain()
    table = Table(show_header=False, box=box.SIMPLE)
    for model in found["models"]:
        context = model.max_context_length
        table.add_row("base model", f"{model.model_name}{f', {context} tokens' if context else ''}")
    flags = found["flags"]
    encoding = "protocol buffers" if flags.proto_write_fwdbwd else "JSON"
    if flags.proto_compress_fwdbwd:
        encoding += ", compressed with zstd"
    table.add_row("wants passes in", encoding)
    table.add_row(
        "of at most", f"{flags.fwdbwd_max_chunk_len} datums, {flags.fwdbwd_max_chunk_bytes_count} B"
    )
    reduction = found["reduction"]
    if reduction is None:
        table.add_row("reduction", "not measured")
    else:
        table.add_row("a loss is", str(reduction))
        table.add_row("custom gradients go by", reduction.loss_fn)
    console.print(found["base_url"])
    console.print(table)
    console.print(f"{found['seconds']:.1f} s")
