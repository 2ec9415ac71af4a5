"""The numbers of README as Markdown, from what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


def gradient_cost(rows: Rows) -> str:
    """mintjax's milliseconds, then how many times as long the others take."""
    found = {(r["loss"], r["datums"], r["case"], r["implementation"]): r["median_ms"] for r in rows}
    batches = list(
        dict.fromkeys((r["datums"], r["case"]) for r in rows if r["implementation"] == "sdk")
    )
    losses = list(dict.fromkeys(r["loss"] for r in rows if r["implementation"] == "sdk"))

    def cell(loss: str, datums: int, case: str) -> str:
        ours = found[loss, datums, case, "mintjax"]
        others = [found[loss, datums, case, name] / ours for name in ("sdk", "torch", "numpy")]
        return f"{ours:.2f} ms: " + " / ".join(f"{ratio:.1f}" for ratio in others)

    def name(datums: int, case: str) -> str:
        return f"{datums}" if case == "uniform" else f"{datums}, one of 32,768 tokens"

    lines = [
        [name(datums, case), *(cell(loss, datums, case) for loss in losses)]
        for datums, case in sorted(batches, key=lambda batch: (batch[1] != "uniform", batch[0]))
    ]
    compiled = [r for r in rows if "200 steps" in r["case"]]
    counts = "".join(
        f"\n\n{row['case'].capitalize()}: {row['compilations']} compilations." for row in compiled
    )
    return table(["datums", *losses], lines) + counts


def transport(rows: Rows) -> str:
    """Milliseconds and size of what each implementation does."""
    found = {(row["operation"], row["implementation"]): row["median_ms"] for row in rows}
    lines = []
    for row in rows:
        operation, name = row["operation"], row["implementation"]
        ratios = [
            f"{median / row['median_ms']:.1f} times as fast as {other}"
            for (of, other), median in found.items()
            if of == operation and other.startswith("sdk") and name.startswith("mintjax")
        ]
        lines.append(
            [
                operation.replace("_", " "),
                name,
                f"{row['median_ms']:.1f} ms",
                f"{row['bytes'] / 1e6:.1f} MB",
                ", ".join(ratios),
            ]
        )
    return table(["", "by", "median", "body", ""], lines)


def custom_step(rows: Rows) -> str:
    """Where the time of a step goes."""
    parts = ("forward", "client", "backward", "optimizer", "step")
    lines = [
        [
            row["objective"],
            row["route"],
            *(f"{row[f'{part}_ms']:.1f}" for part in parts),
            f"{row['client_share']:.1%}",
        ]
        for row in rows
    ]
    heads = ["objective", "route", *(f"{part}, ms" for part in parts), "client's share"]
    return table(heads, lines)


def demo(rows: Rows) -> str:
    """Before and after."""
    end = rows[-1]
    lines = [
        [
            f"pair accuracy, {end[f'{part}_pairs']} {words} pairs",
            f"{end[f'{part}_accuracy_before']:.3f}",
            f"{end[f'{part}_accuracy_after']:.3f}",
        ]
        for part, words in (("train", "training"), ("heldout", "held-out"))
    ]
    lines.append(
        ["loss, first and last step", f"{end['loss_first']:.3f}", f"{end['loss_last']:.3f}"]
    )
    lines.append(["seconds in all", "", f"{end['seconds']:.0f}"])
    return table(["", "before", "after"], lines)


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    ruled = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


TABLES: dict[str, Callable[[Rows], str]] = {
    "gradient_cost": gradient_cost,
    "transport": transport,
    "custom_step": custom_step,
    "demo": demo,
}
