"""``mintjax bench``."""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from mintjax.cli._console import AsJson, plain, print_json, progress
from mintjax.errors import MintjaxError

EMBEDDED = "embedded"


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(",") if part.strip().isdecimal())
    if len(sizes) != text.count(",") + 1 or min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} should be a number, or some with commas: 8,64,256")
    return sizes


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise typer.BadParameter(f"{text!r} should be LEAST:GREATEST, such as 50:2048")
    return int(low), int(high)


def bench(
    objective: Annotated[
        str,
        typer.Argument(help="module:function of yours, or a name of mintjax.objectives: ppo, dpo."),
    ],
    datums: Annotated[
        str, typer.Option(help="Datums in a step; several sizes with commas: 8,64,256.")
    ] = "256",
    lengths: Annotated[str, typer.Option(help="Least and greatest number of tokens.")] = "50:2048",
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each size.")] = 20,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps in front that do not count.")] = 5,
    columns: Annotated[
        str,
        typer.Option(
            help="Columns to have beside those that the objective turns out to need: weights,"
            "reward:datum (one number for each datum)."
        ),
    ] = "",
    candidates: Annotated[
        int | None, typer.Option(min=1, help="K, for objectives of [T, K] logprobs.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="torch, for the same loss in torch; or module:function, a torch loss of yours."
        ),
    ] = None,
    trainer: Annotated[
        str | None,
        typer.Option(
            help="Take real steps, and say which share of them is the client's: embedded, or the "
            "base URL of a trainer, whose key comes from MINT_API_KEY or TINKER_API_KEY."
        ),
    ] = None,
    trainer_steps: Annotated[int, typer.Option(min=1, help="Such steps, after a first one.")] = 3,
    base_model: Annotated[
        str, typer.Option(envvar="TINKER_BASE_MODEL", help="The model of those steps.")
    ] = "mintjax/tiny",
    plot: Annotated[
        Path | None, typer.Option(help="Draw a figure: .svg, .png or .pdf. Needs matplotlib.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of lengths and numbers.")] = 0,
    json: AsJson = False,
) -> None:
    """Measure what an objective's gradient costs here, on batches whose lengths never repeat.

    The objective is imported from the working directory, the columns it reads are made up to fit,
    and its gradient is timed from arrays of logprobs to arrays of gradients: median, 90th
    percentile, first step (with what is compiled in it), tokens per second. Compilations count the
    warm-up.
    """
    from mintjax import bench as engine

    sizes = _sizes(datums)
    source = engine.Synthetic(
        [name.strip() for name in columns.split(",") if name.strip()],
        _range(lengths),
        candidates=candidates,
        seed=seed,
    )
    settings = engine.Settings(
        objective=objective, datums=sizes, steps=steps, warm_up=warm_up, against=against
    )
    with _mistakes_in(objective), progress() as bars:
        task = bars.add_task("timing", total=len(sizes) * (warm_up + steps), state="compiling")
        subject = engine.load_objective(objective)
        report = engine.run(
            subject, source, settings, lambda: bars.update(task, advance=1, state="")
        )
        if trainer is not None:
            report.trainer, report.custom_steps = trainer, []
            task = bars.add_task("training", total=len(sizes) * (1 + trainer_steps), state=trainer)
            with _service(trainer) as service:
                model = service.create_lora_training_client(base_model, rank=8, seed=0)
                for size in sizes:
                    batches = (source.batch(size).data for _ in range(1 + trainer_steps))
                    report.custom_steps.append(
                        engine.time_steps(
                            model, subject, batches, on_step=lambda t=task: bars.advance(t)
                        )
                    )
    if plot is not None:
        engine.plot(report, plot)
    if json:
        print_json(report)
    else:
        _show(report)


@contextmanager
def _service(trainer: str) -> Generator[Any]:
    from mintjax import local
    from mintjax.client import ServiceClient

    with ExitStack() as stack:
        if trainer == EMBEDDED:
            url = stack.enter_context(local.running_server())
            yield stack.enter_context(ServiceClient(url, "tml-embedded"))
        else:
            yield stack.enter_context(ServiceClient(trainer))


@contextmanager
def _mistakes_in(objective: str) -> Generator[None]:
    """Turns an error of a user's own module into a message that says where it was raised."""
    try:
        yield
    except (MintjaxError, OSError):
        raise
    except Exception as error:
        module = objective.partition(":")[0].replace(".", "/")
        frames = traceback.extract_tb(error.__traceback__)
        mine = [f for f in frames if f"{module}.py" in f.filename or f"{module}/" in f.filename]
        where = f", {mine[-1].filename}, line {mine[-1].lineno}" if mine else ""
        raise MintjaxError(f"{objective}: {type(error).__name__}: {error}{where}") from error


def _show(report: Any) -> None:
    console = plain()
    low, high = report.lengths
    console.print(
        f"{report.objective}: {low} to {high} tokens, fresh in each of {report.steps} steps after "
        f"{report.warm_up}; columns {', '.join(report.columns) or 'none'}"
    )
    shares = {step.datums: step.client_share for step in report.custom_steps}
    table = Table("datums", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for head in ("median ms", "p90", "first", "compiled", "tokens/s", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in report.results:
        ours = row.implementation == "mintjax"
        table.add_row(
            str(row.datums),
            row.implementation,
            f"{row.median_ms:.2f}",
            f"{row.p90_ms:.2f}",
            f"{row.first_ms:.0f}",
            str(row.compilations) if ours else "",
            f"{row.tokens_per_second:.2g}",
            f"{shares[row.datums]:.2%}" if ours and shares else "",
        )
    console.print(table)
    if report.gradient_difference is not None:
        _show_comparison(console, report)
    for step in report.custom_steps:
        console.print(
            f"a custom step of {step.datums} datums on {report.trainer} ({step.route}): "
            f"{step.seconds:.2f} s; forward {step.forward_seconds:.2f}, client "
            f"{step.client_seconds:.4f}, backward {step.backward_seconds:.2f}, optimizer "
            f"{step.optimizer_seconds:.2f}"
        )
    if not report.custom_steps:
        console.print("its share of a step: --trainer embedded, or a base URL, measures it")
    console.print(f"{report.machine.cpu}, {report.machine.cores} cores, {report.machine.date}")


def _show_comparison(console: Console, report: Any) -> None:
    medians = {(row.datums, row.implementation): row.median_ms for row in report.results}
    for (size, name), median in medians.items():
        if name != "mintjax":
            ratio = median / medians[size, "mintjax"]
            console.print(f"{name} takes {ratio:.1f} times as long for {size} datums")
    console.print(f"gradients differ by {report.gradient_difference:.1e} of the largest, at most")
