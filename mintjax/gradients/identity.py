"""The identity of an objective: what tells that a compiled program is still the right one.

A program is compiled once and used again, so everything that an objective can reach must either be
an argument of the program or be compared before each use. The rule has three parts:

1. What can be traced is traced. The leaves of a pytree (mintjax's own objectives are pytrees) and
   the floating-point attributes of any other object are arguments of the program. Another value
   runs the same program.
2. What cannot be traced is compared, by value: the code of functions, their defaults, the variables
   they close over, the globals that they name, the attributes of objects, containers, arrays by
   their content. Another value is another program.
3. What cannot be compared is said: an object that shows neither a value nor attributes is known by
   its identity, and a warning names it once. So is a function that gives another value at each
   call, such as ``np.random.rand``, because a program calls it once.

Functions of installed packages are taken to be constant. JAX itself keeps traces of a user's
functions under ``jax.jit``, ``jax.checkpoint``, ``lax.scan`` and their like, and looks at neither
globals nor closures before it uses one again. So the programs of such an objective are traced and
run within a context of JAX's that is part of the keys of these traces, :data:`traces_of`.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
import dataclasses
import dis
import functools
import hashlib
import os
import random
import sys
import sysconfig
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any, TypeAlias, cast

import jax
import numpy as np

Fingerprint: TypeAlias = Any  # hashable

_SCALARS = (type(None), bool, int, str, bytes, complex, type(...), Enum, np.dtype)
_VALUES = (float, *_SCALARS, np.ndarray, np.generic)
_PLAIN = frozenset({float, int, bool, str, type(None)})
_CONSTANT = (type, types.BuiltinFunctionType, types.MethodDescriptorType, types.MethodWrapperType)
_INSTALLED = tuple(
    path
    for name in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_paths().get(name))
)
_ATTRIBUTE = ("_ATTR", "_METHOD")  # endings of the instructions that name an attribute
_LIBRARIES = frozenset({"mintjax", "jax", "jaxlib", "numpy", "optax"})
_LOOPS = frozenset({"scan", "cond", "switch", "while_loop", "fori_loop"})
"""Functions of JAX that keep a trace of a user's function that they are given."""
_LOOKUPS = frozenset({"getattr", "attrgetter", "vars", "__dict__"})
"""Ways to read an attribute by a name that may be made when a function runs."""
_UNFOLLOWED = frozenset({"eval", "exec", "__import__"})
"""Functions of Python that read what no name in a function's code tells."""
_HOLDERS = (dict, list, tuple, set, frozenset, types.SimpleNamespace, argparse.Namespace)
_CLOCKS = (time.time, time.time_ns, time.monotonic, time.perf_counter)
_DRAWS = (random.Random, np.random.RandomState, np.random.Generator)

traces_of: Any = jax.make_user_context(None)
"""A context for the number of the program that is traced or run, if JAX shall keep its traces of
the user's functions apart from those of other programs."""


class _Number:
    """Stands for a number of a pytree that is traced."""


_NUMBER = _Number()


class Same:
    """Wraps an object that is known by its identity, and keeps it alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


@dataclasses.dataclass(frozen=True)
class Identity:
    """An objective, taken apart.

    Args:
        key: equal for two objectives exactly if one program serves both.
        parameters: the values that the program takes as arguments.
        rebuild: makes the objective again around other parameters, such as tracers.
        keeps_traces: whether it can reach user's functions of which JAX keeps traces.
        attributes: whether the parameters are attributes of an object.
    """

    key: Fingerprint
    parameters: list[Any]
    rebuild: Callable[[Sequence[Any]], Any]
    keeps_traces: bool = False
    attributes: bool = False

    @property
    def parameter_kinds(self) -> Fingerprint:
        """The types of the parameters, because a trace sees whether one is a float or an array."""
        kinds: list[Any] = [
            (type(v), getattr(v, "shape", None), getattr(v, "dtype", None)) for v in self.parameters
        ]
        return tuple(kinds)


def identify(objective: Any, *, trace_attributes: bool = True) -> Identity:
    """Tells an objective from all others, by the rule of this module.

    Args:
        objective: the callable, as it is now.
        trace_attributes: whether an object's floating-point attributes become parameters; if not,
            they are compared.
    """
    jitted = getattr(objective, "__wrapped__", None)
    if jitted is not None and type(objective).__module__.startswith("jax"):
        objective = jitted  # jax.jit would remember values that have changed since
    if not _is_fixed(objective):
        return _identify(objective, trace_attributes)
    # A number that is the same object has the same value, so its address stands for it.
    kind, values = _parts(objective)
    key = (kind, trace_attributes, *map(id, values))
    if key not in _fixed:
        if len(_fixed) == _KEPT:
            del _fixed[next(iter(_fixed))]
        _fixed[key] = (values, _identify(objective, trace_attributes))
    return _fixed[key][1]


_KEPT = 256  # identities held at a time, the oldest dropped first
_fixed: dict[Any, tuple[tuple[Any, ...], Identity]] = {}
"""Identities by class and addresses of values, with the values, so that no address is reused."""


def _parts(objective: Any) -> tuple[type[Any], tuple[Any, ...]]:
    attributes = cast("dict[str, Any]", vars(objective))
    return cast("type[Any]", type(objective)), tuple(attributes.values())


def _is_fixed(objective: Any) -> bool:
    """Tells whether an object is made of plain values by a class that is taken to be constant."""
    kind = cast("type[Any]", type(objective))
    values: dict[str, Any] = getattr(objective, "__dict__", {})
    return (
        dataclasses.is_dataclass(kind)
        and _is_installed(kind)
        and values.keys() == kind.__dataclass_fields__.keys()
        and _PLAIN.issuperset(map(type, values.values()))
    )


def _identify(objective: Any, trace_attributes: bool) -> Identity:
    leaves, tree = cast("tuple[list[Any], Any]", jax.tree_util.tree_flatten(objective))
    if not (len(leaves) == 1 and leaves[0] is objective):
        return _of_pytree(objective, leaves, tree)
    traced = _traceable(objective) if trace_attributes else {}
    walk = _Walk()
    if not traced:
        return Identity(walk.of(objective), [], lambda _: objective, walk.keeps_traces)
    kind = cast("type[Any]", type(objective))
    attributes = cast("dict[str, Any]", vars(objective))
    rest = {name: value for name, value in attributes.items() if name not in traced}
    key = ("attributes", tuple(traced), walk.of_type(kind), walk.of(rest))

    def rebuild(parameters: Sequence[Any]) -> Any:
        made = copy.copy(objective)
        for name, value in zip(traced, parameters, strict=True):
            object.__setattr__(made, name, value)
        return made

    parameters = list(traced.values())
    return Identity(key, parameters, rebuild, walk.keeps_traces, attributes=True)


def _of_pytree(objective: Any, leaves: list[Any], tree: Any) -> Identity:
    """Takes a pytree apart: numbers are parameters, all else that it holds is compared.

    The structure alone is not enough, because JAX compares an object in it by the object's own
    ``==``, which an attribute that changes need not change. So the pytree is walked, too, with
    placeholders in the place of its numbers.
    """
    walk = _Walk()
    traced = [_is_number(leaf) for leaf in leaves]
    shown = [_NUMBER if number else leaf for leaf, number in zip(leaves, traced, strict=True)]
    try:
        hash(tree)
        structure = tree
    except TypeError:  # its static part is not hashable; it is walked
        structure = None
    try:
        skeleton = tree.unflatten(shown)
    except Exception:  # it takes nothing but numbers; then another number is another program
        skeleton = objective
    key = ("pytree", structure, walk.of(skeleton), tuple(map(walk.of, shown)))

    def rebuild(parameters: Sequence[Any]) -> Any:
        given = iter(parameters)
        return tree.unflatten(
            next(given) if number else leaf for leaf, number in zip(leaves, traced, strict=True)
        )

    parameters = [leaf for leaf, number in zip(leaves, traced, strict=True) if number]
    return Identity(key, parameters, rebuild, walk.keeps_traces)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | np.ndarray | np.generic | jax.Array)


def _traceable(objective: Any) -> dict[str, Any]:
    """Lists the floating-point attributes of an object that is neither a function nor a class."""
    if isinstance(objective, types.FunctionType | types.MethodType | functools.partial | type):
        return {}
    found: dict[str, Any] = {}
    for name, value in getattr(objective, "__dict__", {}).items():
        if isinstance(value, float) or (
            isinstance(value, np.ndarray | np.floating | jax.Array)
            and np.issubdtype(cast("Any", value).dtype, np.floating)
        ):
            found[name] = value
    return found


class _Walk:
    """One look at everything that an object can reach; an object met again is a back reference."""

    def __init__(self) -> None:
        self._met: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no address is used twice during the walk
        self.keeps_traces = False

    def of(self, value: Any) -> Fingerprint:
        """Gives a hashable value that is equal exactly where the given one means the same."""
        kind = cast("Any", type(value))
        if kind is float:
            return (kind, value.hex())
        if kind in _PLAIN:
            return (kind, value)
        if isinstance(value, jax.Array):  # cannot change
            return Same(value)
        if _is_installed(kind) and isinstance(value, _VALUES):
            return (kind, _of_value(cast("Any", value)))
        if id(value) in self._met:
            return ("met", self._met[id(value)])
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return self._of_compound(value)

    def _of_compound(self, value: Any) -> Fingerprint:
        kind = cast("type[Any]", type(value))
        if kind is tuple or kind is list:  # as most are
            return (kind, tuple(map(self.of, cast("Sequence[Any]", value))))
        if kind is dict:
            items = cast("dict[Any, Any]", value).items()
            return (kind, tuple((self.of(k), self.of(v)) for k, v in items))
        if isinstance(value, types.FunctionType):
            return self._of_function(value)
        if isinstance(value, types.MethodType):
            return ("method", self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            made = cast("functools.partial[Any]", value)
            return ("partial", self.of(made.func), self.of(made.args), self.of(made.keywords))
        if isinstance(value, types.ModuleType):
            return self._of_module(value)
        if isinstance(value, type):
            return self.of_type(value)
        if isinstance(value, Enum):  # its value may be a dict, and it may have more attributes
            held: dict[str, Any] = vars(value)
            names = [name for name in held if name in ("_name_", "_value_") or name[0] != "_"]
            return (kind, tuple((name, self.of(held[name])) for name in names))
        if isinstance(value, _VALUES):
            return self._with_attributes(value, kind, _of_value(value))
        if isinstance(value, weakref.ref):
            return (Same(value), self.of(cast("Any", value)()))
        if _is_record(value):  # before what can be called, as an objective of mintjax can
            return self._of_object(value, kind)
        if isinstance(value, _CONSTANT) or (_is_installed(kind) and callable(value)):
            return self._of_wrapper(value)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            found = tuple((self.of(k), self.of(v)) for k, v in items)
            return self._with_attributes(value, kind, found)
        if isinstance(value, Sequence):
            found = tuple(map(self.of, cast("Sequence[Any]", value)))
            return self._with_attributes(value, kind, found)
        if isinstance(value, Set):
            found = frozenset(map(self.of, cast("Set[Any]", value)))
            return self._with_attributes(value, kind, found)
        if isinstance(value, contextvars.ContextVar):
            return (Same(value), self.of(value.get(None)))
        if isinstance(value, threading.local):
            return (Same(value), self.of(vars(value)))
        if kind.__module__ == "multiprocessing.sharedctypes":
            return (Same(value), self.of(value.get_obj()))
        if "_ctypes" in {base.__module__ for base in kind.__mro__}:
            return (Same(value), bytes(value))
        return self._of_object(value, kind)

    def _with_attributes(self, value: Any, kind: type[Any], found: Fingerprint) -> Fingerprint:
        """Adds what an object of a user's class holds beside its number or its items."""
        if _is_installed(kind):
            return (kind, found)
        return (self.of_type(kind), found, self.of(_attributes(value, kind)))

    def _of_wrapper(self, value: Any) -> Fingerprint:
        """Compares a function of C, or what wraps a function, such as ``jax.jit`` and its like."""
        if _changes(value):
            _say_changes(value)
        inner = getattr(value, "__wrapped__", None)
        if inner is None or (isinstance(inner, types.FunctionType) and _is_library(inner)):
            return Same(value)
        self.keeps_traces = True
        attributes = getattr(value, "__dict__", {}).values()  # such as rules of derivatives
        rules = [rule for rule in attributes if isinstance(rule, types.FunctionType)]
        return (Same(value), self.of(inner), self.of(rules))

    def _of_object(self, value: Any, kind: type[Any]) -> Fingerprint:
        if _is_installed(kind) and not _is_record(value):
            _say_incomparable(value)
            return Same(value)
        return (self.of_type(kind), self.of(_attributes(value, kind)))

    def of_type(self, kind: type) -> Fingerprint:
        """Compares a class: a user's by its methods and attributes, others by identity."""
        if _is_installed(kind):
            return Same(kind)
        parts: list[Any] = [Same(kind)]
        for base in kind.__mro__:
            if not _is_installed(base):
                for name, member in vars(base).items():
                    if name.startswith("__") and not isinstance(member, types.FunctionType):
                        continue
                    for name_of_function in ("__func__", "fget", "func"):
                        member = getattr(member, name_of_function, member)
                    if not isinstance(member, types.MemberDescriptorType):
                        parts.append((name, self.of(member)))
        if not _is_installed(type(kind)):
            parts.append(self.of_type(type(kind)))
        return tuple(parts)

    def _of_module(self, module: types.ModuleType) -> Fingerprint:
        """Compares all values of a user's module that an object holds; none says which it reads."""
        if _is_library_module(module):
            return Same(module)
        space = vars(module)
        return (Same(module), tuple((name, self.of(space[name])) for name in _values_in(space)))

    def _of_function(self, function: types.FunctionType) -> Fingerprint:
        if _is_library(function):
            inner = getattr(function, "__wrapped__", None)
            if not isinstance(inner, types.FunctionType) or _is_library(inner):
                return Same(function)
            self.keeps_traces = True  # such as jax.checkpoint of a user's function
            return (Same(function), self.of(inner))
        names, variables = _names(function.__code__), _variables(function.__code__)
        self.keeps_traces = self.keeps_traces or not _LOOPS.isdisjoint(names)
        free = function.__code__.co_freevars
        cells = zip(free, function.__closure__ or (), strict=True)
        enclosed = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        by_name = {"sys", "modules"}.issubset(names) or "import_module" in names
        if by_name or not _UNFOLLOWED.isdisjoint(variables):
            _say_unfollowed(function)
        named = self._named(enclosed, free, names, [])
        if "globals" in variables or "__globals__" in names:
            variables = dict.fromkeys([*variables, *_values_in(function.__globals__)])
        named += self._named(function.__globals__, variables, names, [])
        modules = _imports(function)
        named += self._named(modules, tuple(modules), names, [])
        for name, *path in _chains(function.__code__):
            _look_for_changes(enclosed.get(name, function.__globals__.get(name)), path)
        if "environ" in names or "getenv" in names:
            named.append(tuple(os.environ.items()))
        return (
            function.__code__,
            self.of(function.__defaults__),
            self.of(function.__kwdefaults__),
            tuple(named),
            self.of(function.__dict__),
        )

    def _named(
        self,
        space: Mapping[str, Any],
        names: Iterable[str],
        attributes: Sequence[str],
        within: Sequence[types.ModuleType],
    ) -> list[Any]:
        """Compares the values of names, and of attributes in the user's modules among these.

        Where the attributes may be looked up by names that are made when the function runs, all
        values of such a module are compared.
        """
        found: list[Any] = []
        for name in names:
            if name in space:
                value = space[name]
                is_module = isinstance(value, types.ModuleType)  # entered below, by what is named
                found.append((name, Same(value) if is_module else self.of(value)))
                entered = any(value is module for module in within)
                if isinstance(value, types.ModuleType) and not _is_library_module(value):
                    inside = [*within, value]
                    if not entered:
                        read: Iterable[str] = attributes
                        if not _LOOKUPS.isdisjoint(attributes):
                            read = dict.fromkeys([*attributes, *_values_in(vars(value))])
                        found += self._named(vars(value), read, attributes, inside)
        return found


def _values_in(space: Mapping[str, Any]) -> list[str]:
    """Lists the names in a module that have values, and not functions, classes or modules."""
    kinds = (*_VALUES, *_HOLDERS)
    return [
        name
        for name, value in space.items()
        if not name.startswith("__") and isinstance(value, kinds)
    ]


def _is_record(value: Any) -> bool:
    """Tells whether an object is a bundle of values, such as a configuration."""
    kind = cast("type[Any]", type(value))
    return (
        (dataclasses.is_dataclass(value) and not isinstance(value, type))
        or hasattr(kind, "__struct_fields__")
        or isinstance(value, types.SimpleNamespace | argparse.Namespace)
    )


def _attributes(value: Any, kind: type[Any]) -> dict[str, Any]:
    """Lists an object's attributes: those in its dict, its slots, and its fields by msgspec."""
    attributes = dict(getattr(value, "__dict__", {}))
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            private = name.startswith("__") and not name.endswith("__")
            own = f"_{base.__name__.lstrip('_')}{name}" if private else name
            if hasattr(value, own):
                attributes[own] = getattr(value, own)
    fields: tuple[str, ...] = getattr(kind, "__struct_fields__", ())  # of msgspec
    return attributes | {name: getattr(value, name) for name in fields}


def _of_value(value: Any) -> Fingerprint:
    """Makes something hashable of the value of a number, a text or an array."""
    if isinstance(value, float):
        return value.hex()
    if not isinstance(value, np.ndarray | np.generic):
        return value
    array: Any = np.ascontiguousarray(cast("Any", value))
    if array.dtype.hasobject:
        return repr(array.tolist())
    digest = hashlib.blake2b(array.tobytes()).digest()
    return (array.dtype, np.shape(cast("Any", value)), digest)


def _changes(function: Any) -> bool:
    """Tells whether a function gives another value at each call."""
    if not isinstance(function, types.BuiltinFunctionType | types.MethodType):
        return False
    return isinstance(function.__self__, _DRAWS) or function in _CLOCKS


def _look_for_changes(value: Any, path: Sequence[str]) -> None:
    """Follows attributes of modules, such as ``np.random.rand``."""
    for name in path:
        if not isinstance(value, types.ModuleType):
            return
        value = getattr(value, name, None)
    if _changes(value):
        _say_changes(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Lists the globals and attributes that a code and the functions within it name."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_names(constant)))
    return tuple(names)


@functools.lru_cache(maxsize=1024)
def _variables(code: types.CodeType) -> tuple[str, ...]:
    """Leaves out names of attributes only: ``self.beta`` reads no global ``beta``."""
    read = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opcode in dis.hasname and not instruction.opname.endswith(_ATTRIBUTE)
    }
    named = dict.fromkeys(_names(code))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            read |= set(_variables(constant))
        elif isinstance(constant, str) and "globals" in read:  # globals()["beta"]
            read.add(constant)
            named[constant] = None
    return tuple(name for name in named if name in read)


@functools.lru_cache(maxsize=1024)
def _chains(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """Lists names of variables with those of the attributes that are taken of them."""
    found: list[list[str]] = []
    previous = ""
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            found.append([instruction.argval])
        elif name.endswith(_ATTRIBUTE) and found and previous == found[-1][-1]:
            found[-1].append(instruction.argval)
        elif name != "PUSH_NULL":
            previous = ""
            continue
        previous = found[-1][-1] if found else ""
    inner = [_chains(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return tuple({tuple(chain) for chain in found if len(chain) > 1}.union(*inner))


@functools.lru_cache(maxsize=1024)
def _imported(code: types.CodeType) -> tuple[tuple[int, str], ...]:
    """Lists the modules that a code and the functions within it import: level and name of each."""
    instructions = list(dis.get_instructions(code))
    found: list[tuple[int, str]] = [
        (int(instructions[i - 2].argval), one.argval)
        for i, one in enumerate(instructions)
        if one.opname == "IMPORT_NAME"
    ]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _imported(constant)
    return tuple(found)


def _imports(function: types.FunctionType) -> dict[str, types.ModuleType]:
    """Finds the modules that a function imports when it is called, as far as they are there."""
    found: dict[str, types.ModuleType] = {}
    for level, name in _imported(function.__code__):
        package = str(function.__globals__.get("__package__") or "")
        full = name
        if level:
            above = package.rsplit(".", level - 1)[0] if level > 1 else package
            full = f"{above}.{name}" if name else above
        if full in sys.modules:
            found[full] = sys.modules[full]
    return found


def _is_library(function: types.FunctionType) -> bool:
    module = (function.__module__ or "").partition(".")[0]
    return module in _LIBRARIES or function.__code__.co_filename.startswith(_INSTALLED)


def _is_library_module(module: types.ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return (
        file is None
        or module.__name__.partition(".")[0] in _LIBRARIES
        or file.startswith(_INSTALLED)
    )


@functools.lru_cache(maxsize=1024)
def _is_installed(kind: type) -> bool:
    """Tells whether a class is Python's own or of an installed package."""
    if kind.__module__.partition(".")[0] in _LIBRARIES:
        return True
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    if module is None or kind.__module__ == "__main__":
        return False
    return file is None or file.startswith(_INSTALLED)


_said: set[Any] = set()


def _say_once(what: Any, text: str) -> None:
    """Warns of something, the first time that it is met."""
    if what not in _said:
        _said.add(what)
        warnings.warn(text, stacklevel=3)


def _say_changes(function: Any) -> None:
    name = str(function.__name__)
    _say_once(
        name,
        f"an objective calls {name}, which gives another value at each call. JAX calls the "
        "objective once, to trace it, so that every step has the first value. Call it outside and "
        "pass the numbers as a loss_fn_inputs column.",
    )


def _say_unfollowed(function: types.FunctionType) -> None:
    _say_once(
        function.__code__,  # and not its name, because all lambdas have one
        f"{function.__qualname__} finds values by eval, exec, sys.modules or an import by name, "
        "which cannot be followed. If such a value changes between steps, the compiled objective "
        "will not notice. Name the variable in the code, or pass it as a loss_fn_inputs column.",
    )


def _say_incomparable(value: Any) -> None:
    kind = cast("type[Any]", type(value))
    module = kind.__module__.partition(".")[0]
    draws = isinstance(value, Iterator | random.Random)
    if not draws and (module == "mintjax" or module in sys.stdlib_module_names):
        return  # clients, loggers, locks, files: nothing that a loss is computed from
    _say_once(
        kind,
        f"an objective reads an object of type {kind.__qualname__}, which shows no value that can "
        "be compared. If it changes between steps, the compiled objective will not notice. Pass "
        "what changes as a loss_fn_inputs column or as a number.",
    )
