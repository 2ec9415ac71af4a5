"""Lists everything public: the modules that users import from, and what is in them."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType
from typing import Any

MODULES = {
    "mintjax": "The public names",
    "mintjax.client": "Sessions with a trainer, training and sampling clients, futures",
    "mintjax.types": "Datums and the other values that travel",
    "mintjax.runs": "Runs, checkpoints and sessions, as a trainer lists them",
    "mintjax.ragged": "Rows of different lengths as one value; batches",
    "mintjax.objectives": "Losses as functions of a batch and its logprobs",
    "mintjax.losses": "Losses, advantages, estimators and diagnostics as functions of arrays",
    "mintjax.gradients": "Value and gradient of any objective, without a trainer",
    "mintjax.interop": "Losses and clients of torch and of the official SDK",
    "mintjax.testing": "Laws that losses obey, and batches to try them on",
    "mintjax.local": "The embedded trainer",
    "mintjax.step.reduction": "What a trainer divides losses by",
    "mintjax.mint": "What only MinT offers",
    "mintjax.errors": "What mintjax raises",
    "mintjax.bench": "What the client's side of a step costs",
    "mintjax.protocol.protobuf": "Messages as protocol buffers",
}
"""The modules that users import from, and what they hold."""

MADE_FOR_USERS = {
    "mintjax.APIFuture",
    "mintjax.Ragged",
    "mintjax.RemoteLogprobs",
    "mintjax.SamplingClient",
    "mintjax.TrainingClient",
}
"""The classes that users get from a function or a method, never by calling the class."""


def names_of(module: str) -> list[str]:
    """Lists the public names of a module: those it lists, or those that are its own."""
    loaded = importlib.import_module(module)
    own = [
        name
        for name, value in vars(loaded).items()
        if not name.startswith("_")
        and isinstance(value, type | FunctionType)
        and value.__module__ == module
    ]
    return list(getattr(loaded, "__all__", own))


def everything() -> dict[str, Any]:
    """Lists public functions, classes and their methods, each once, by its name."""
    found: dict[int, tuple[str, Any]] = {}
    for module in MODULES:
        for name in names_of(module):
            value = getattr(importlib.import_module(module), name)
            if not isinstance(value, type | FunctionType):
                continue
            found.setdefault(id(value), (f"{module}.{name}", value))
            for member, attribute in vars(value).items() if isinstance(value, type) else ():
                function = getattr(attribute, "__func__", getattr(attribute, "fget", attribute))
                is_method = "." in getattr(function, "__qualname__", "")  # the loss of one is not
                if inspect.isfunction(function) and is_method and not member.startswith("_"):
                    path = f"{module}.{name}.{member}"
                    found.setdefault(id(attribute), (path, attribute))
    return dict(found.values())
