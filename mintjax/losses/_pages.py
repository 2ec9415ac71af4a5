"""The tables of losses and conventions as Markdown."""

from __future__ import annotations

from mintjax.losses._catalogue import FAMILIES, catalogue
from mintjax.losses._conventions import CONVENTIONS, DIFFERENCES, FIVE, FORMULAS
from mintjax.losses._counterparts import COUNTERPARTS


def conventions(*, trainers: bool = True) -> str:
    """Writes the page of conventions: where implementations differ, and what this package does.

    A row of it is ``point | here | elsewhere``, from :data:`DIFFERENCES`.

    Args:
        trainers: whether a table by trainer follows.

    Returns:
        Markdown: a table by point, then one by trainer, by name.

    Reference:
        TRL 1.16, verl 0.9.1, SkyRL 0.4, Liger 0.8.5, tunix 0.1.7, rlax 0.1.9 and the Tinker
        cookbook 0.6.1 as they were run; OpenRLHF, torchtune and TuFT as an earlier comparison found
        them.
    """
    rows = [("point", "here", "elsewhere")]
    for row in DIFFERENCES:
        elsewhere = "; ".join(f"{who}: {what}" for who, what in row.others.items())
        rows.append((row.about, row.ours, elsewhere))
    return f"{_table(rows)}\n" + (f"\n{_trainers()}\n" if trainers else "")


def counterparts(library: str | None = None) -> str:
    """Writes what the losses of other libraries are called here.

    A row of it is ``library | there | here``, from :data:`COUNTERPARTS`; a dash stands for what is
    not here.

    Args:
        library: one of them, such as ``"verl 0.9.1"``; None for all.

    Returns:
        Markdown: one table, by library and name.

    Reference:
        The sources of the libraries, at the versions that the table names.
    """
    rows = [("library", "there", "here")]
    for name in [library] if library else COUNTERPARTS:
        rows += [(name, there, here or "-") for there, here in COUNTERPARTS[name].items()]
    return f"{_table(rows)}\n"


def describe() -> str:
    """Lists all losses and what each trainer makes of the built-in ones, as text.

    Returns:
        A table of :data:`FORMULAS`, and one of :data:`CONVENTIONS`, in Markdown; then, for each
        family, its losses with formula, inputs, source and the trainers that serve them by name;
        then what the losses of other libraries are called here.
    """
    parts = [f"{_formulas()}\n\n{_trainers()}\n"]
    for family in FAMILIES:
        parts.append(f"## {family}\n")
        for entry in catalogue():
            if entry.family != family:
                continue
            lines = [entry.name, f"    {entry.formula}", f"    inputs: {', '.join(entry.inputs)}"]
            if entry.settings:
                shown = (f"{name}={value}" for name, value in entry.settings.items())
                lines.append(f"    settings: {', '.join(shown)}")
            if entry.source:
                lines.append(f"    source: {entry.source}")
            if entry.served_by:
                lines.append(f"    served by name: {'; '.join(entry.served_by)}")
            parts.append("\n".join(lines) + "\n")
    parts.append(f"## names elsewhere\n\n{counterparts()}")
    return "\n".join(parts)


def _trainers() -> str:
    trainers = [("trainer", "losses", "ppo", "cispo", "dro", "reduction", "weights", "metrics")]
    trainers += [
        (
            row.trainer,
            "the five" if row.losses == FIVE else ", ".join(row.losses),
            _range(row.ppo_clip),
            _range(row.cispo_clip),
            "-" if row.dro_beta is None else f"{row.dro_beta:g}",
            row.reduction,
            row.weights,
            ", ".join(row.metrics) or "none",
        )
        for row in CONVENTIONS
    ]
    return _table(trainers)


def _formulas() -> str:
    formulas = [("loss", "per token, with r = exp(lp - q)", "inputs", "config")]
    formulas += [
        (
            row.loss,
            row.per_token,
            ", ".join(row.inputs),
            ", ".join(f"{name} {value:g}" for name, value in row.config.items()),
        )
        for row in FORMULAS
    ]
    return _table(formulas)


def _range(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:g} / {bounds[1]:g}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
