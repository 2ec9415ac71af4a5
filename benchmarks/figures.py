"""The figures of README, from what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
OURS, SDK, TORCH, NUMPY = "#1f77b4", "#d62728", "#ff7f0e", "#7f7f7f"
PARTS = {"forward": "#9ecae1", "client": SDK, "backward": "#3182bd", "optimizer": "#c7c7c7"}

matplotlib.rcParams["svg.hashsalt"] = "mintjax"  # the same numbers give the same file


def gradient_cost(rows: Rows) -> Figure:
    """Draws the ratios of the others' times to mintjax's, by batch and loss."""
    uniform = [row for row in rows if row["case"] == "uniform"]
    found = {(r["loss"], r["datums"], r["implementation"]): r["median_ms"] for r in uniform}
    sizes = sorted({r["datums"] for r in uniform if r["implementation"] == "sdk"})
    losses = list(dict.fromkeys(r["loss"] for r in uniform))
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    others = (
        ("sdk", "torch, as the official SDK does it", SDK),
        ("torch", "torch, from NumPy", TORCH),
        ("numpy", "NumPy, by hand", NUMPY),
    )
    for axis, loss in zip(figure.subplots(1, len(losses), sharey=True), losses, strict=True):
        for i, (name, label, colour) in enumerate(others):
            ratios = [found[loss, b, name] / found[loss, b, "mintjax"] for b in sizes]
            at = np.arange(len(sizes)) + 0.27 * (i - 1)
            axis.bar(at, np.array(ratios) - 1, 0.25, bottom=1, color=colour, label=label)
        axis.axhline(1, color=OURS, linewidth=2, label="mintjax")
        axis.set(title=loss, yscale="log", xlabel="datums")
        axis.set_xticks(np.arange(len(sizes)), [str(b) for b in sizes])
        axis.set_yticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
        axis.minorticks_off()
    figure.axes[0].set_ylabel("times as long")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), ncols=4, loc="outside upper center")
    return figure


def transport(rows: Rows) -> Figure:
    """Milliseconds of each operation."""
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure = Figure(figsize=(10, 2.4), layout="constrained")
    axes = figure.subplots(1, len(operations), squeeze=False)[0]
    for axis, operation in zip(axes, operations, strict=True):
        mine = [row for row in rows if row["operation"] == operation]
        names = [row["implementation"] for row in mine]
        times = [row["median_ms"] for row in mine]
        colours = [OURS if name.startswith("mintjax") else SDK for name in names]
        bars = axis.barh(names, times, color=colours)
        axis.bar_label(bars, [f" {time:,.0f}" if time > 100 else f" {time:.1f}" for time in times])
        axis.set(title=operation.replace("_", " "), xscale="log", xlabel="ms")
        axis.set_xlim(0.4 * min(times), 12 * max(times))
        axis.invert_yaxis()
    return figure


def custom_step(rows: Rows) -> Figure:
    """Draws the parts of a step's time."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axis = figure.subplots()
    words = {"two_pass": "two passes", "one_pass": "one pass", "by_name": "by name"}
    labels = [f"{row['objective']}, {words[row['route']]}" for row in rows]
    start = np.zeros(len(rows))
    for part, colour in PARTS.items():
        width = np.array([row[f"{part}_ms"] for row in rows])
        axis.barh(labels, width, left=start, label=part, color=colour)
        start += width
    axis.invert_yaxis()
    axis.set(xlabel=f"ms of a step of {rows[0]['datums']} datums on {rows[0]['base_model']}")
    figure.legend(ncols=4, loc="outside upper center")
    return figure


def socket_step(rows: Rows) -> Figure:
    """Draws the time of a step, with and without the trainer's computing."""
    figure = Figure(figsize=(8, 1.8), layout="constrained")
    axis = figure.subplots()
    names = [row["encoding"] for row in rows]
    rest = np.array([row["rest_ms"] for row in rows])
    computing = np.array([row["step_ms"] for row in rows]) - rest
    axis.barh(names, computing, label="the trainer computes", color=PARTS["backward"])
    axis.barh(names, rest, left=computing, label="all else", color=SDK)
    axis.invert_yaxis()
    axis.set(xlabel=f"ms of a step of {rows[0]['datums']} datums on mintjax/nano")
    figure.legend(ncols=2, loc="outside upper center")
    return figure


def demo(rows: Rows) -> Figure:
    """The learning curve."""
    steps, end = rows[:-1], rows[-1]
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [step["step"] for step in steps]
    left.plot(at, [step["loss"] for step in steps], color=OURS)
    left.set(xlabel="step", ylabel="loss (nats)", yscale="log")
    right.plot(at, [step["pair_accuracy"] for step in steps], color=OURS, label="batch")
    for part, words, colour in (("train", "training", TORCH), ("heldout", "held-out", SDK)):
        ends = [end[f"{part}_accuracy_{when}"] for when in ("before", "after")]
        right.plot([0, at[-1]], ends, "o--", color=colour, label=f"{words} pairs")
    right.set(xlabel="step", ylabel="pair accuracy", ylim=(0, 1.05))
    right.legend(loc="lower right")
    return figure


FIGURES: dict[str, Callable[[Rows], Figure]] = {
    "gradient_cost": gradient_cost,
    "transport": transport,
    "custom_step": custom_step,
    "socket_step": socket_step,
    "demo": demo,
}


def draw(name: str, rows: Rows, directory: Path) -> Path:
    """Draw the figure of a benchmark as SVG; returns where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.svg"
    FIGURES[name](rows).savefig(path, metadata={"Date": None})
    return path
