"""``mintjax serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mintjax.cli._console import AsJson, print_json


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    normalise: Annotated[
        bool,
        typer.Option(
            "--normalise", help="Divide by sums of weights and numbers of datums, as SkyRL does."
        ),
    ] = False,
    directory: Annotated[
        Path | None, typer.Option(help="Where checkpoints go; a temporary place if absent.")
    ] = None,
    protobuf: Annotated[
        bool, typer.Option("--protobuf", help="Ask clients for protocol buffers.")
    ] = False,
    compress: Annotated[
        bool, typer.Option("--compress", help="Ask for such bodies compressed with zstd.")
    ] = False,
    refuse_json: Annotated[
        bool, typer.Option("--refuse-json", help="Take passes as protocol buffers only, as TuFT.")
    ] = False,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Let other machines use it without a key.")
    ] = False,
    json: AsJson = False,
) -> None:
    """Run the embedded trainer until Ctrl-C.

    Any client of the protocol can use it. It requires the API key in MINTJAX_SERVE_API_KEY, if that
    is set.
    """
    from mintjax import local
    from mintjax.protocol import messages
    from mintjax.step.reduction import SUM, Reduction

    config = messages.ClientConfigResponse(
        proto_write_fwdbwd=protobuf, proto_compress_fwdbwd=compress
    )

    def announce(url: str) -> None:
        if json:
            print_json({"url": url})
        else:
            print(f"mintjax trainer at {url}", flush=True)

    reduction = Reduction("weights", per_step="datums") if normalise else SUM
    with local.Engine(reduction=reduction, directory=directory) as engine:
        local.serve(
            host,
            port,
            engine=engine,
            api_key=os.environ.get("MINTJAX_SERVE_API_KEY"),
            config=config,
            json_passes=not refuse_json,
            announce=announce,
            open_to_all=open_to_all,
        )
