"""Writes the measured numbers of README as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rows = list[dict[str, Any]]


NAMES = {
    "mintjax": "mintjax",
    "list": "mintjax, the loss as a loop over rows",
    "sdk": "torch, as the official SDK uses it",
    "torch": "torch, from NumPy",
    "numpy": "NumPy, by hand",
}


def gradient_cost(rows: Rows) -> str:
    """Writes one row per batch and implementation, with a column per loss."""
    found = {(r["loss"], r["datums"], r["case"], r["implementation"]): r["median_ms"] for r in rows}
    timed = [r for r in rows if r["implementation"] == "sdk"]
    batches = sorted(
        {(r["datums"], r["case"]) for r in timed}, key=lambda b: (b[1] != "uniform", b[0])
    )
    losses = list(dict.fromkeys(r["loss"] for r in timed))

    def cell(loss: str, datums: int, case: str, name: str) -> str:
        median, ours = (found[loss, datums, case, one] for one in (name, "mintjax"))
        return (
            f"{median:.2f} ms" if name == "mintjax" else f"{median:.2f} ms ({median / ours:.1f}x)"
        )

    lines = [
        [
            f"{datums}" if case == "uniform" else f"{datums}, one of 32,768 tokens",
            words,
            *(cell(loss, datums, case, name) for loss in losses),
        ]
        for datums, case in batches
        for name, words in NAMES.items()
    ]
    many = [r for r in rows if "200 steps" in r["case"]]
    compiled = [r for r in many if r["implementation"] == "mintjax"]
    counts = "".join(
        f"\n\n{row['case'].capitalize()}: {row['compilations']} compilations." for row in compiled
    )
    counts += "".join(
        f"\n\n{row['case'].capitalize()}, {NAMES[row['implementation']]}: "
        f"{row['total_s']:.1f} s in all."
        for row in many
        if "total_s" in row
    )
    callbacks = [r for r in rows if r["implementation"] == "torch_callback"]
    ratios = ", ".join(
        f"{r['loss']} {r['median_ms'] / found[r['loss'], r['datums'], 'callback', 'sdk_loss']:.1f}x"
        for r in callbacks
    )
    if ratios:
        ratios = f"\n\nThe same loss in torch as the SDK's callback, beside `sdk_loss`: {ratios}."
    return table(["datums", "implementation", *losses], lines) + counts + ratios


def transport(rows: Rows) -> str:
    """Writes one row per operation and implementation."""
    found = {(row["operation"], row["implementation"]): row["median_ms"] for row in rows}
    others = sorted({name for _, name in found if name.startswith("sdk")})
    lines = [
        [
            row["operation"].replace("_", " "),
            row["implementation"],
            f"{row['median_ms']:.1f} ms",
            f"{row['bytes'] / 1e6:.1f} MB",
            *(
                _compared(row["median_ms"], found[row["operation"], other])
                if row["implementation"].startswith("mintjax")
                else ""
                for other in others
            ),
        ]
        for row in rows
    ]
    heads = [f"beside {other}" for other in others]
    return table(["operation", "implementation", "median", "body", *heads], lines)


def _compared(ours: float, theirs: float) -> str:
    faster = theirs >= ours
    ratio = theirs / ours if faster else ours / theirs
    return f"{ratio:.1f} times {'faster' if faster else 'slower'}"


def custom_step(rows: Rows) -> str:
    """Writes where the time of a step goes."""
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


def socket_step(rows: Rows) -> str:
    """Writes one row per encoding."""
    lines = [
        [
            row["encoding"],
            f"{row['requests']:g}",
            f"{row['step_ms']:.1f}",
            f"{row['rest_ms']:.1f}",
        ]
        for row in rows
    ]
    return table(["encoding", "requests", "step, ms", "not the trainer's computing, ms"], lines)


def demo(rows: Rows) -> str:
    """Writes the numbers before and after training."""
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


def real_trainers(rows: Rows) -> str:
    """Writes one row per check, with a column per trainer; why something is not so stands below."""
    trainers = list(dict.fromkeys(row["trainer"] for row in rows))
    found = {(row["check"], row["trainer"]): row for row in rows}
    checks = [c for c in dict.fromkeys(row["check"] for row in rows) if c not in ABOUT_A_TRAINER]
    notes: list[str] = []

    def cell(check: str, trainer: str) -> str:
        row = found.get((check, trainer))
        if row is None:
            return ""
        detail = row["detail"].replace("|", "\\|")
        if row["outcome"] == "yes" and len(detail) <= LONGEST_CELL:
            return detail
        if detail not in notes:
            notes.append(detail)
        words = {"yes": "yes", "no": "**no**"}.get(row["outcome"], row["outcome"])
        return f"{words} ({notes.index(detail) + 1})"

    lines = [[check, *(cell(check, trainer) for trainer in trainers)] for check in checks]
    told = [
        f"{trainer}: {found[about, trainer]['detail']}."
        for trainer in trainers
        for about in ABOUT_A_TRAINER
        if (about, trainer) in found
    ]
    numbered = [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n\n".join([table(["", *trainers], lines), "\n".join(numbered), "<br>".join(told)])


ABOUT_A_TRAINER = ("versions", "starts")
"""Rows that say something of a trainer as a whole."""
LONGEST_CELL = 70  # characters; longer ones become notes


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Writes a table in Markdown."""
    ruled = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)


TABLES: dict[str, Callable[[Rows], str]] = {
    "gradient_cost": gradient_cost,
    "transport": transport,
    "custom_step": custom_step,
    "socket_step": socket_step,
    "demo": demo,
    "real_trainers": real_trainers,
}
