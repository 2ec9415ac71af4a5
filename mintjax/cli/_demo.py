"""``mintjax demo``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mintjax.cli._console import AsJson, plain, print_json, progress


class Loss(StrEnum):
    """The preference losses that the demo offers."""

    bradley_terry = "bradley_terry"
    dpo = "dpo"


def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Pairs as JSON lines: prompt, chosen, rejected. Else the packaged file."),
    ] = None,
    loss: Annotated[Loss, typer.Option(help="dpo takes the untrained model for reference.")] = (
        Loss.bradley_terry
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 60,
    batch_pairs: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 16,
    lr: Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0, help="Of adapters, split and batches.")] = 0,
    base_url: Annotated[
        str | None, typer.Option(help="A trainer to use; the embedded one is started if absent.")
    ] = None,
    base_model: Annotated[
        str, typer.Option(envvar="TINKER_BASE_MODEL", help="What to start from.")
    ] = "mintjax/tiny",
    json: AsJson = False,
) -> None:
    """Train on preference pairs with a loss written in JAX.

    Starts the embedded trainer on this machine, holds some pairs out, and trains with the loss
    computed here and the model there. With --base-url it takes another trainer; its key comes from
    MINT_API_KEY or TINKER_API_KEY.
    """
    from mintjax.cli import preference_demo as job
    from mintjax.client import ServiceClient

    settings = job.Settings(
        loss=loss.value, steps=steps, batch_pairs=batch_pairs, learning_rate=lr, seed=seed
    )
    pairs = job.read_pairs(data or job.packaged_pairs())
    with ExitStack() as stack:
        if base_url is None:
            from mintjax import local

            url = stack.enter_context(local.running_server())
            service = stack.enter_context(ServiceClient(url, "tml-embedded"))
        else:
            service = stack.enter_context(ServiceClient(base_url))
        results = job.run(service, base_model, pairs, settings)
        if json:
            for result in results:
                print_json(result)
        else:
            _show(results, settings, service.base_url)


def _show(results: Iterator[Any], settings: Any, url: str) -> None:
    console = plain()
    console.print(f"trainer {url}, loss {settings.loss}, {settings.batch_pairs} pairs a step")
    summary: Any = None
    with progress() as bars:
        task = bars.add_task("training", total=settings.steps, state="starting the model")
        for result in results:
            summary = result
            if hasattr(result, "step"):
                state = (
                    f"loss {result.loss:.3f}, accuracy {result.pair_accuracy:.2f}, "
                    f"margin {result.mean_margin:+.1f}, {result.seconds:.2f} s/step"
                )
                bars.update(task, completed=result.step, state=state)
    table = Table("", "before", "after")
    for name, part in (("training", "train"), ("held-out", "heldout")):
        table.add_row(
            f"pair accuracy, {getattr(summary, f'{part}_pairs')} {name} pairs",
            f"{getattr(summary, f'{part}_accuracy_before'):.3f}",
            f"{getattr(summary, f'{part}_accuracy_after'):.3f}",
        )
    table.add_row(
        "loss, first and last step", f"{summary.loss_first:.4f}", f"{summary.loss_last:.4f}"
    )
    console.print(table)
    console.print(
        f"{summary.seconds:.1f} s in all; {summary.client_share:.1%} of the steps' time went into "
        "loss, gradient and encoding on the client"
    )
