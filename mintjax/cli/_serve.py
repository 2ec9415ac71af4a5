"""``mintjax serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mintjax.cli._console import AsJson, print_json


def _limit(help: str) -> object:
    return typer.Option(min=0, help=help, rich_help_panel="Limits")


def serve(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    like: Annotated[
        str | None,
        typer.Option(
            help="Play a real trainer: skyrl-tx-0.3, skyrl-0.4, tuft-0.2 or hatchery-0.3."
        ),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option(help="Where checkpoints go; a temporary place if absent.")
    ] = None,
    protobuf: Annotated[
        bool, typer.Option("--protobuf", help="Ask clients for protocol buffers.")
    ] = False,
    compress: Annotated[
        bool, typer.Option("--compress", help="Ask for such bodies compressed with zstd.")
    ] = False,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Let other machines use it without a key.")
    ] = False,
    max_sessions: Annotated[int, _limit("Sessions of clients at a time.")] = 10_000,
    max_models: Annotated[int, _limit("Models in training at a time.")] = 2000,
    max_samplers: Annotated[int, _limit("Sampling sessions at a time.")] = 10_000,
    max_rank: Annotated[int, _limit("Rank of a model's adapters.")] = 512,
    max_datum_tokens: Annotated[int, _limit("Tokens of one datum.")] = 2048,
    max_targets: Annotated[int, _limit("Targets of one pass.")] = 1 << 22,
    max_candidates: Annotated[int, _limit("Targets of one token.")] = 1024,
    max_loss_nodes: Annotated[int, _limit("Nodes of a loss that runs here.")] = 1000,
    max_losses: Annotated[int, _limit("Such losses of a session.")] = 1000,
    max_body_bytes: Annotated[int, _limit("Bytes of a request.")] = 128 * 1024 * 1024,
    max_metadata_bytes: Annotated[int, _limit("Bytes of what a client says of itself.")] = 16
    * 1024,
    max_connections: Annotated[int, _limit("Open connections.")] = 512,
    request_seconds: Annotated[float, _limit("For a request to arrive whole.")] = 120.0,
    session_seconds: Annotated[
        float, _limit("After which the models of a client that is gone are let go.")
    ] = 3600.0,
    missing_seconds: Annotated[float, _limit("For which a missing seq_id is waited for.")] = 600.0,
    json: AsJson = False,
) -> None:
    """Run the embedded trainer until Ctrl-C.

    Any client of the protocol can use it. It requires the API key in MINTJAX_SERVE_API_KEY, if that
    is set.
    """
    from mintjax import local
    from mintjax.local.dialects import OWN, dialect_of
    from mintjax.protocol import messages
    from mintjax.step.reduction import SUM

    config = messages.ClientConfigResponse(
        proto_write_fwdbwd=protobuf,
        proto_compress_fwdbwd=compress,
        custom_loss_server_side=dialect_of(like) == OWN,
    )

    limits = local.Limits(
        max_sessions=max_sessions,
        max_models=max_models,
        max_samplers=max_samplers,
        max_rank=max_rank,
        max_datum_tokens=max_datum_tokens,
        max_targets=max_targets,
        max_candidates=max_candidates,
        max_loss_nodes=max_loss_nodes,
        max_losses=max_losses,
        max_body_bytes=max_body_bytes,
        max_metadata_bytes=max_metadata_bytes,
        max_connections=max_connections,
        request_seconds=request_seconds,
        session_seconds=session_seconds,
        missing_seconds=missing_seconds,
    )

    def announce(url: str) -> None:
        if json:
            print_json({"url": url})
        else:
            print(f"mintjax trainer at {url}", flush=True)

    reduction = dialect_of(like).reduction or SUM
    with local.Engine(reduction=reduction, directory=directory) as engine:
        local.serve(
            host,
            port,
            engine=engine,
            api_key=os.environ.get("MINTJAX_SERVE_API_KEY"),
            config=config,
            like=like,
            limits=limits,
            announce=announce,
            open_to_all=open_to_all,
        )
