"""``mintjax losses``."""

from __future__ import annotations

from mintjax.cli._console import AsJson, print_json


def losses(json: AsJson = False) -> None:
    """What each trainer makes of the built-in losses: defaults, reductions, what it serves."""
    from mintjax import losses

    if json:
        print_json({"losses": losses.FORMULAS, "trainers": losses.CONVENTIONS})
    else:
        print(losses.describe())
