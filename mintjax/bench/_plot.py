"""Draws a report as a figure."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from mintjax.bench._report import Report
from mintjax.errors import ConfigError


def plot(report: Report, path: Path) -> None:
    """Draws the time of each step, and median and 90th percentile for each number of datums.

    Args:
        report: the measurements.
        path: the file to write; its ending is the format: ``.svg``, ``.png``, ``.pdf``.

    Raises:
        ConfigError: matplotlib is missing, or does not know the format.
        OSError: the file cannot be written.
    """
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise ConfigError("a figure needs matplotlib: pip install matplotlib") from None
    sizes = sorted({result.datums for result in report.results})
    figure = figures.Figure(figsize=(9 if len(sizes) > 1 else 5, 3.2), layout="constrained")
    axes = figure.subplots(1, 1 + (len(sizes) > 1), squeeze=False)[0]
    _draw_steps(axes[0], report, sizes[-1])
    if len(sizes) > 1:
        _draw_sizes(axes[1], report, sizes)
    figure.suptitle(f"{report.objective}, {report.lengths[0]} to {report.lengths[1]} tokens")
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _draw_steps(axis: Any, report: Report, datums: int) -> None:
    for result in report.results:
        if result.datums == datums:
            axis.plot(result.step_ms, marker=".", label=result.implementation)
    axis.axvspan(-0.5, report.warm_up - 0.5, color="0.93", zorder=0)
    axis.set(xlabel=f"step, {datums} datums each (grey: warm-up)", ylabel="ms", yscale="log")
    axis.legend()


def _draw_sizes(axis: Any, report: Report, sizes: list[int]) -> None:
    for name in dict.fromkeys(result.implementation for result in report.results):
        rows = sorted(
            (r for r in report.results if r.implementation == name), key=lambda r: r.datums
        )
        medians = [row.median_ms for row in rows]
        (line,) = axis.plot(sizes, medians, marker="o", label=f"{name}: median, to p90")
        p90 = [row.p90_ms for row in rows]
        axis.fill_between(sizes, medians, p90, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="datums", ylabel="ms a step", xscale="log", yscale="log", xticks=sizes)
    axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
    axis.minorticks_off()
    axis.legend()
