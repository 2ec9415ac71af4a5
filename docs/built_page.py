"""Writes the page that shows the modules and which of them imports from which."""

from __future__ import annotations

from docs.modules import Module, files, imports, module_of, modules

WALK = (
    ("client/training.py", "TrainingClient.forward_backward_custom", "copies and checks the data"),
    ("client/lane.py", "Lane.submit", "gives the step its place in the line of the model"),
    ("client/custom_step.py", "custom_step", "decides what is sent, and in which order"),
    ("step/routes.py", "shortcut", "looks for a way with one pass; this objective has none"),
    ("client/passes.py", "chunks", "cuts the forward pass into requests that are not too large"),
    ("client/encodings.py", "encoded", "writes the datum as JSON or as a protocol buffer"),
    ("client/transport.py", "Transport._exchange", "sends a request over HTTP"),
    ("client/polling.py", "retrieve", "asks for the result until it is there: the logprobs"),
    ("client/passes.py", "Pass.output", "joins the outputs of the requests"),
    ("gradients/evaluate.py", "value_and_logprob_grads", "checks them, and the loss and gradient"),
    (
        "gradients/compiled.py",
        "Program.run",
        "runs the objective and its derivative, compiled once",
    ),
    ("step/carrier.py", "carrier", "makes each token's gradient its weight in a cross-entropy"),
)
"""The way of a datum through a custom step: file, function, what it does there."""

_WAY = """
## The way of one datum

`model.forward_backward_custom(data, objective)` goes through these functions, in the order of
their first calls:

{steps}

The backward pass is cut, encoded, sent and asked for by the functions that did so for the forward
pass. The future then has the output.
"""

_OPENING = """# How it is built

mintjax has {modules} modules. Each imports from modules above it only, so there is no circle. In
the figure a dot says that the module of the row imports from the module of the column.

"""


def pages() -> dict[str, str]:
    """Writes the page, in Markdown, by file."""
    table = modules()
    listed = "\n".join(
        f"{number}. {_names(module)}: {module.holds}" for number, module in enumerate(table, 1)
    )
    text = f"{_OPENING.format(modules=len(table))}{_figure(table)}\n\n{listed}\n"
    steps = "\n".join(
        f"{number}. `mintjax/{path}`, `{function}`: {does}"
        for number, (path, function, does) in enumerate(WALK, 1)
    )
    return {"built.md": text + _WAY.format(steps=steps)}


def arrows(table: list[Module]) -> set[tuple[str, str]]:
    """Finds the pairs of modules of which the first imports from the second."""
    names = {path: module_of(path, table).name for path in files().values()}
    found = {(names[path], names[other]) for path, others in imports().items() for other in others}
    return {(one, other) for one, other in found if one != other}


def _figure(table: list[Module]) -> str:
    """Draws a matrix: a row for each module, with dots under those that it imports from."""
    pairs, names = arrows(table), [module.name for module in table]
    head = "".join(f"<th>{number}</th>" for number in range(1, len(names) + 1))
    rows = [f"<tr><th></th><th></th>{head}</tr>"]
    for number, name in enumerate(names, 1):
        dots = ["●" if (name, other) in pairs else "" for other in names]
        cells = "".join(
            f"<td{' class=self' if place == number else ''}>{dot}</td>"
            for place, dot in enumerate(dots, 1)
        )
        rows.append(f"<tr><th>{number}</th><th><code>{name}</code></th>{cells}</tr>")
    return f'<div class="formula"><table class="modules">{"".join(rows)}</table></div>'


def _names(module: Module) -> str:
    return ", ".join(f"`{entry}`" for entry in module.entries)
