"""Makes of docstrings what the documentation shows: links, formulas, and objectives from code."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import griffe

from docs.formulas import formula_paragraph, in_markdown
from docs.public import MADE_FOR_USERS, MODULES, names_of
from mintjax import objectives
from mintjax.objectives import LossObjective

_ROLE = re.compile(r":(?:py:)?(?:func|class|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
_ARGS = re.compile(r"^Args:\n(?:    .*\n?|\n(?=    ))+", re.M)
_QUIET: Any = {
    "warnings": False,
    "returns_multiple_items": False,
    "returns_named_value": False,
}


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of the package once all of it is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Adds what is made when the package is imported; rewrites all docstrings."""
        for name in objectives.__all__:
            made = getattr(objectives, name)
            if isinstance(made, type) and made.__module__ == objectives.__name__:
                pkg["objectives"].set_member(name, _objective(made, pkg["objectives"]))
        for obj in list(_documented(pkg)):
            if obj.is_class:
                _add_methods(obj)
        public = _public(pkg)
        for path in MADE_FOR_USERS:
            made = pkg[path.partition(".")[2]].final_target
            made.docstring.value = _ARGS.sub("", made.docstring.value)
            made.members.pop("__init__", None)
        for obj in _documented(pkg):
            if obj.docstring is not None:
                obj.docstring.value = _rewritten(obj.docstring.value, obj, pkg, public)


def _public(package: griffe.Module) -> set[str]:
    """Finds where everything public is defined."""
    found = set(MODULES)
    for path in MODULES:
        module: Any = package[path.partition(".")[2]] if "." in path else package
        found |= {module[name].canonical_path for name in names_of(path) if name in module.members}
    return found


def _documented(obj: Any) -> Iterator[Any]:
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _documented(member)


def _add_methods(cls: griffe.Class) -> None:
    """Adds the methods that a class makes of others: those that block, and coroutine functions."""
    for name, method in list(cls.members.items()):
        returns = str(getattr(method, "returns", ""))
        public = name.removeprefix("_")
        if method.is_function and name != public and returns.startswith("Limited["):
            text = method.docstring.value if method.docstring else ""
            for called in (public, f"{public}_async"):
                _add_like(cls, called, method, method.returns.slice, text)
                text = f"As :meth:`{public}`, for ``await``."
        base = cls.members.get(name.removesuffix("_async"))
        is_coroutine = method.is_attribute and name.endswith("_async")
        if is_coroutine and base is not None and base.is_function:
            given = method.value.arguments[1:]
            text = f"As :meth:`{base.name}`, for ``await``."
            _add_like(cls, name, base, given[0] if given else base.returns, text)


def _add_like(
    cls: griffe.Class, name: str, method: griffe.Function, returns: Any, text: str
) -> None:
    made = griffe.Function(
        name,
        lineno=method.lineno,
        endlineno=method.endlineno,
        parameters=method.parameters,
        returns=returns,
        docstring=griffe.Docstring(text, parser="google", parser_options=_QUIET),
    )
    if name.endswith("_async"):
        made.labels.add("async")
    cls.set_member(name, made)


def _objective(made: type[LossObjective], parent: griffe.Module) -> griffe.Class:
    """Describes a class that is made when the package is imported, which has no source to read."""
    text = made.__doc__ or ""
    summary, _, rest = text.partition("\n\n")
    formula = formula_paragraph(inspect.getdoc(made.loss) or "")
    text = f"{summary}\n\n{formula}\n\n{rest}" if formula else text
    docstring = griffe.Docstring(text, parser="google", parser_options=_QUIET)
    cls = griffe.Class(made.__name__, parent=parent, docstring=docstring)
    keyword = griffe.ParameterKind.keyword_only
    fields = dataclasses.fields(made)  # type: ignore[arg-type]
    parameters = [
        griffe.Parameter(
            field.name,
            kind=keyword,
            default=None if field.default is dataclasses.MISSING else repr(field.default),
        )
        for field in fields
    ]
    init = griffe.Function("__init__", parameters=griffe.Parameters(*parameters))
    cls.set_member("__init__", init)
    return cls


def _rewritten(text: str, obj: griffe.Object, package: griffe.Module, public: set[str]) -> str:
    text = re.sub(r"^Example:\n", "Examples:\n", text, flags=re.M)
    text = re.sub(r"^Reference:\n((?:    .*\n?)+)", _reference, text, flags=re.M)
    if obj.path.startswith(("mintjax.losses.", "mintjax.objectives.")):
        formula = formula_paragraph(text)
        text = text.replace(formula, in_markdown(formula)) if formula else text
    return _ROLE.sub(lambda found: _link(found, obj, package, public), text)


def _reference(found: re.Match[str]) -> str:
    return "**Reference.** " + re.sub(r"^    ", "", found[1], flags=re.M)


def _link(
    found: re.Match[str], obj: griffe.Object, package: griffe.Module, public: set[str]
) -> str:
    """Writes a role as a link to the place where the name that it means is defined."""
    short, target = found.groups()
    words = target.rpartition(".")[2] if short else target
    scope: Any = obj
    if target.startswith("mintjax."):
        scope, target = package, target.removeprefix("mintjax.")
    while scope is not None and target.partition(".")[0] not in scope.members:
        scope = scope.parent  # a bare name belongs to the class or the module around it
    if scope is None:
        return f"`{words}`"
    path: str = scope[target].canonical_path
    is_public = path in public or path.rpartition(".")[0] in public
    return f"[`{words}`][{path}]" if is_public else f"`{words}`"
