"""``mintjax losses``."""

from __future__ import annotations

from mintjax.cli._console import AsJson, print_json


def losses(json: AsJson = False) -> None:
    """Lists all losses: formula, inputs, source, and which trainers serve them by name."""
    from mintjax import losses

    if json:
        print_json(
            {
                "losses": losses.FORMULAS,
                "trainers": losses.CONVENTIONS,
                "catalogue": losses.catalogue(),
                "differences": losses.DIFFERENCES,
            }
        )
    else:
        print(losses.describe())
        print(losses.conventions(trainers=False))
