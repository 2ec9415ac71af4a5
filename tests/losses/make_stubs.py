"""Modules that are empty, in the place of requirements that a loss does not need."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import types
import typing
from typing import Any


class _Anything(type):
    """A class that can be called, subscripted, combined and inherited from."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _make_anything(name)

    def __getitem__(cls, item: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return Any

    __ror__ = __or__


def _make_anything(name: str) -> Any:
    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # As a decorator it gives the function back.
        plain = len(args) == 1 and callable(args[0]) and not kwargs
        return args[0] if plain else object.__new__(cls)

    return _Anything(name, (), {"__new__": new, "__init__": lambda self, *a, **k: None})


class _Stub(types.ModuleType):
    __path__: typing.ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (lambda: False) if name.startswith("is_") else _make_anything(name)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not installed, and makes empty ones of them."""

    def __init__(self, *roots: str) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] in self.roots:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        return _Stub(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


class Fake:
    """An object with the attributes that are given, and ``get`` as a config has it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)
