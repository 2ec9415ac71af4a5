"""Finds the objective or the function that a name stands for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from mintjax import objectives
from mintjax.errors import ConfigError
from mintjax.gradients import Objective

BUILT_IN = tuple(
    sorted(
        name
        for name, value in vars(objectives).items()
        if isinstance(value, type)
        and issubclass(value, objectives.LossObjective)
        and value not in (objectives.LossObjective, objectives.WeightedSum)
    )
)
"""The objectives that need no module before their name."""


def load_objective(name: str) -> Objective:
    """Finds an objective by its name.

    Args:
        name: one of ``mintjax.objectives`` (``"ppo"``), which gets its defaults, or
            ``"module:attribute"``: a function ``(data, logprobs) -> (loss, metrics)`` or any other
            objective. The working directory is searched first.

    Returns:
        The objective.

    Raises:
        ConfigError: there is no such module or attribute, or it cannot be called.
        Exception: what the module raises while it is imported.
    """
    if ":" not in name:
        if name not in BUILT_IN:
            raise ConfigError(
                f"{name!r} is neither one of the built-in objectives ({', '.join(BUILT_IN)}) nor "
                "module:function"
            )
        return getattr(objectives, name)()
    found = load(name)
    is_class = isinstance(found, type) and issubclass(found, objectives.LossObjective)
    return cast("Objective", found() if is_class else found)


def load(name: str) -> Callable[..., Any]:
    """Loads the object that ``"module:attribute"`` names; the attribute may be dotted.

    Raises:
        ConfigError: there is no such module or attribute, or it cannot be called.
        Exception: what the module raises while it is imported.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigError(f"{name!r} should be module:function, such as my_losses:preference")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"there is no module {error.name!r} here or among the installed packages"
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{module_name!r} has no attribute {path!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{name} is {type(found).__name__}, which cannot be called")
    return found
