"""What a machine can check of the docstrings of everything public."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import mintjax
from docs.public import MADE_FOR_USERS, MODULES, everything

ROOT = Path(mintjax.__file__).parent

PYTREE_PROTOCOL = {"tree_flatten", "tree_unflatten"}
HEADING = re.compile(r"^(Args|Returns|Yields|Raises|Example|Reference):\n", re.MULTILINE)
# "As :meth:`forward`, and ...": the arguments are that one's.
AS_ANOTHER = re.compile(r"\b(?:[Aa]s|those of|those that) :(?:func|meth):")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|exc):`~?([\w.]+)`")


QUESTION = re.compile(r"(What|How|Which|Whether|Where|Why|When|That|Who)\b")


def test_no_docstring_begins_with_a_question():
    """Its first line says what the thing does, or is; a reader has no riddle to solve."""
    found: list[str] = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and QUESTION.match(text):
                found.append(f"{path.name}: {text.splitlines()[0]}")
    assert found == []


NOUN = re.compile(r"(The|A|An|One|From|As|Each|All|Every|No)\b|`")
TITLES = ("losses/",)  # a loss function's docstring begins with the loss's name


def test_the_docstring_of_a_function_begins_with_what_it_does():
    """A property's says what it is, as is usual."""
    found: list[str] = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            is_property = any("property" in ast.unparse(one) for one in node.decorator_list)
            text = ast.get_docstring(node)
            exempt = is_property or str(path.relative_to(ROOT)).startswith(TITLES)
            if text and NOUN.match(text) and not exempt:
                found.append(f"{path.name}: {text.splitlines()[0]}")
    assert found == []


EVERYTHING = everything()
CLASSES = {name: value for name, value in EVERYTHING.items() if isinstance(value, type)}
FUNCTIONS = {
    name: getattr(value, "__func__", value)
    for name, value in EVERYTHING.items()
    if not isinstance(value, type | property)
}


def owner(name: str) -> type | None:
    """The class that a method is of."""
    return CLASSES.get(name.rpartition(".")[0])


def sections(value: Any) -> dict[str, str]:
    """The docstring by its headings; what comes before the first is under ``""``."""
    parts = HEADING.split(inspect.getdoc(value) or "")
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section: str) -> dict[str, str]:
    """``name: what it is`` by name; several names before one colon are several entries."""
    blocks = re.split(r"^ {0,4}(?=\S)", section, flags=re.MULTILINE)
    pairs = [block.partition(":") for block in blocks if ":" in block]
    return {name.strip(" *"): text for names, _, text in pairs for name in names.split(",")}


def parameters(function: Any) -> list[str]:
    """The names a caller passes."""
    given = inspect.signature(function).parameters
    return [name for name in given if name not in ("self", "cls", "draw") and name[0] != "_"]


def raised(function: Any) -> set[str]:
    """The exceptions that a function's own ``raise`` statements name, not those of its closures."""
    if function.__code__.co_filename == "<string>":  # made by Hypothesis
        return set()
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    nodes: list[ast.AST] = list(ast.iter_child_nodes(definition))
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    calls = [node.exc for node in nodes if isinstance(node, ast.Raise) and node.exc]
    names = [ast.unparse(exc.func if isinstance(exc, ast.Call) else exc) for exc in calls]
    return {name for name in names if name[0].isupper()} - {"NotImplementedError"}


def overrides(name: str) -> bool:
    """Whether a method stands for one of a base class, which says what its arguments are."""
    member, of = name.rpartition(".")[2], owner(name)
    return of is not None and any(member in vars(base) for base in of.__mro__[1:])


def test_everything_has_one_that_opens_with_a_sentence():
    opening = {name: sections(value)[""].split("\n\n")[0] for name, value in EVERYTHING.items()}
    assert len(opening) > 200
    assert [name for name, text in opening.items() if not text.rstrip().endswith((".", ":"))] == []


def test_functions_name_their_parameters():
    complaints: list[str] = []
    for name, function in FUNCTIONS.items():
        if overrides(name) or name.rpartition(".")[2] in PYTREE_PROTOCOL:
            continue
        if AS_ANOTHER.search(inspect.getdoc(function) or ""):
            continue
        missing = set(parameters(function)) - set(entries(sections(function).get("Args", "")))
        if owner(name) is not None:  # a method's may be in its sentence, or in the class's
            text = f"{inspect.getdoc(owner(name))} {inspect.getdoc(function)}"
            missing -= set(re.findall(r"\w+", text))
        complaints += [f"{name}: {parameter}" for parameter in sorted(missing)]
    assert complaints == []


def test_functions_say_what_they_return():
    silent = [
        name
        for name, function in FUNCTIONS.items()
        if owner(name) is None
        and inspect.signature(function).return_annotation not in ("None", None)
        and not {"Returns", "Yields"} & set(sections(function))
    ]
    assert silent == []


def test_functions_say_what_they_raise():
    complaints = {
        name: missing
        for name, function in FUNCTIONS.items()
        if (missing := raised(function) - set(entries(sections(function).get("Raises", ""))))
    }
    assert complaints == {}


def test_classes_name_their_fields():
    complaints: list[str] = []
    for name, value in CLASSES.items():
        fields: list[str] = []
        if dataclasses.is_dataclass(value):
            fields = [field.name for field in dataclasses.fields(value)]
        elif "__init__" in vars(value) and name not in MADE_FOR_USERS:
            fields = parameters(vars(value)["__init__"])
        fields += getattr(value, "__struct_fields__", getattr(value, "_fields", ()))
        said: set[str] = set()
        for base in value.__mro__:
            said |= set(entries(sections(base).get("Args", "")))
        complaints += [f"{name}: {field}" for field in fields if field not in said]
    assert complaints == []


def test_losses_give_formula_shapes_units_and_source():
    for name, function in FUNCTIONS.items():
        summary = name.endswith(("_summary", ".describe"))
        if not name.startswith("mintjax.losses.") or summary:
            continue
        said = sections(function)
        assert re.search(r"``[^`]*\S[^`]*``", said[""]), name
        annotations = inspect.signature(function).parameters
        for parameter, text in entries(said["Args"]).items():
            if "ArrayLike" not in str(annotations[parameter].annotation):
                continue
            known = r"shape|scalar|\[\.\.\.|constant"
            assert re.search(known, text), f"{name}: {parameter}"
        assert re.search(r"unit|nats|weight|name|between|squared|Brier", said["Returns"]), name
        assert "Reference" in said or name.endswith("_sums"), name


def test_what_is_referred_to_exists():
    complaints: list[str] = []
    for name, value in EVERYTHING.items():
        public = max((module for module in MODULES if name.startswith(f"{module}.")), key=len)
        home = importlib.import_module(getattr(value, "__module__", None) or "mintjax")
        scope = {
            "mintjax": importlib.import_module("mintjax"),
            **vars(sys.modules[public]),
            **vars(home),
        }
        for target in ROLE.findall(inspect.getdoc(value) or ""):
            head, *rest = target.split(".")
            place = scope.get(head, getattr(owner(name) or value, head, None))
            for part in rest:
                place = getattr(place, part, None)
            if place is None:
                complaints.append(f"{name}: {target}")
    assert complaints == []
