"""A value that changes behind an objective is seen in the next step."""

import collections
import contextvars
import ctypes
import dataclasses
import enum
import functools
import importlib
import multiprocessing
import os
import random
import sys
import threading
import time
import types
import warnings
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax import Datum, ModelInput, gradients, objectives, value_and_logprob_grads
from mintjax.errors import NonFiniteError, ObjectiveError
from mintjax.gradients.identity import _identify, identify

from ..examples import THOROUGH

SCALE = 1.0
SETTINGS = types.SimpleNamespace(scale=1.0)


def batch(sizes=(3, 2), **columns):
    data = [
        Datum(
            ModelInput.from_ints(range(1, n + 1)),
            {"target_tokens": range(n), **{name: value[:n] for name, value in columns.items()}},
        )
        for n in sizes
    ]
    return data, [np.full(n, -1.0, np.float32) for n in sizes]


def slope(objective, sizes=(3, 2), **columns):
    """The gradient of an objective at its first token, and its metrics."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*made anew for the third time")
        result = value_and_logprob_grads(objective, *batch(sizes, **columns))
    return float(result.grads[0][0]), result.metrics


class Controller:
    """Holds a coefficient that a user adapts from step to step."""

    def __init__(self, coef):
        self.coef = coef

    def __call__(self, data, logprobs):
        return self.coef * logprobs.total(), {"coef": self.coef}


@dataclasses.dataclass
class Plain:
    coef: float

    def __call__(self, data, logprobs):
        return self.coef * logprobs.total(), {"coef": self.coef}


@dataclasses.dataclass(frozen=True)
class WithArray:
    coef: np.ndarray

    def __call__(self, data, logprobs):
        return (self.coef * logprobs.total()).sum(), {}


class Slotted:
    __slots__ = ("coef",)

    def __init__(self, coef):
        self.coef = coef

    def __call__(self, data, logprobs):
        return self.coef * logprobs.total(), {"coef": self.coef}


@pytest.mark.parametrize("kind", [Controller, Plain, Slotted])
def test_an_attribute_that_changes_is_seen(kind):
    objective = kind(0.1)
    for coef in (0.1, 0.2, 0.4, 0.1):
        objective.coef = coef
        found, metrics = slope(objective)
        assert found == pytest.approx(coef)
        assert metrics["coef"] == pytest.approx(coef)


@pytest.mark.parametrize("kind", [Controller, Plain])
def test_another_attribute_runs_the_same_program(kind):
    slope(kind(1.0))
    before = gradients.stats()
    for coef in (0.1, 0.2, 0.4):
        slope(kind(coef))
    assert gradients.stats() == before


def test_a_global_with_the_name_of_an_attribute_is_another_thing(monkeypatch):
    slope(Controller(1.0))
    before = gradients.stats()
    for coef in (0.1, 0.2, 0.4):  # as the variable of a loop in a script
        monkeypatch.setitem(globals(), "coef", coef)
        slope(Controller(coef))
    assert gradients.stats() == before


def test_a_global_that_is_an_attribute_elsewhere_is_seen(monkeypatch):
    def objective(data, logprobs):
        return SCALE * SETTINGS.SCALE * logprobs.total(), {}

    monkeypatch.setattr(SETTINGS, "SCALE", 2.0, raising=False)
    for scale in (1.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert slope(objective)[0] == 2 * scale


def test_a_frozen_dataclass_with_an_array_made_anew_runs_the_same_program():
    slope(WithArray(np.array([5.0, 5.0])))
    before = gradients.stats()
    for scale in (1.0, 2.0, 3.0):
        assert slope(WithArray(np.array([scale, scale])))[0] == pytest.approx(2 * scale)
    assert gradients.stats() == before


numbers = st.sampled_from([1, 1.0, True, 0.0, -0.0, 0.3, 2, np.float32(1), jnp.float32(1)])


def _shown(identity):
    kinds = [(type(value), str(value)) for value in identity.parameters]
    return identity.key, kinds, identity.parameter_kinds


@given(
    objective=st.sampled_from([objectives.dpo(), objectives.ppo(), objectives.bradley_terry()]),
    field=st.integers(0, 5),
    values=st.lists(numbers, min_size=2, max_size=4),
    in_place=st.booleans(),
)
def test_an_identity_that_is_remembered_is_the_one_that_is_found_anew(
    objective, field, values, in_place
):
    names = list(vars(objective))
    name = names[field % len(names)]
    changed = dataclasses.replace(objective)
    for value in values:
        if not in_place:
            changed = dataclasses.replace(objective)
        object.__setattr__(changed, name, value)  # though frozen, as a determined user can
        assert _shown(identify(changed)) == _shown(_identify(changed, True))


def test_an_attribute_that_python_code_needs_is_compared():
    class Branches:
        def __init__(self, coef):
            self.coef = coef

        def __call__(self, data, logprobs):
            sign = 1.0 if self.coef > 0.5 else -1.0
            return sign * logprobs.total(), {}

    objective = Branches(0.1)
    for coef, expected in ((0.1, -1.0), (0.9, 1.0), (0.2, -1.0)):
        objective.coef = coef
        assert slope(objective)[0] == expected


def test_an_integer_attribute_is_compared():
    class Powers:
        def __init__(self, power):
            self.power = power

        def __call__(self, data, logprobs):
            return (logprobs**self.power).total(), {}

    objective = Powers(2)
    for power, expected in ((2, -2.0), (3, 3.0), (2, -2.0)):
        objective.power = power
        assert slope(objective)[0] == pytest.approx(expected)


def test_a_global_that_changes_is_seen(monkeypatch):
    def objective(data, logprobs):
        return SCALE * SETTINGS.scale * logprobs.total(), {}

    for scale in (1.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert slope(objective)[0] == scale
    monkeypatch.setattr(SETTINGS, "scale", 2.0)
    assert slope(objective)[0] == 6.0


def helper(logprobs):
    return SCALE * logprobs.total()


def test_a_global_that_a_called_function_reads_is_seen(monkeypatch):
    def objective(data, logprobs):
        return helper(logprobs), {}

    for scale in (1.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert slope(objective)[0] == scale


def test_a_closure_that_changes_is_seen():
    scale, table, array = 1.0, {"scale": 1.0}, np.ones(2)

    def objective(data, logprobs):
        return scale * table["scale"] * array[0] * logprobs.total(), {}

    assert slope(objective)[0] == 1.0
    scale = 2.0
    assert slope(objective)[0] == 2.0
    table["scale"] = 3.0
    assert slope(objective)[0] == 6.0
    array[0] = 4.0
    assert slope(objective)[0] == 24.0


def test_a_closure_inside_a_weighted_sum_that_changes_is_seen():
    scale = 1.0

    def own(data, logprobs):
        return scale * logprobs.total(), {}

    both = objectives.weighted_sum({"own": own})
    assert slope(both)[0] == 1.0
    scale = 2.0
    assert slope(both)[0] == 2.0


@pytest.mark.parametrize("kind", [Controller, Plain, Slotted])
@pytest.mark.parametrize("depth", [1, 2])
def test_an_object_inside_a_weighted_sum_that_changes_is_seen(kind, depth):
    term = kind(0.1)
    objective = term
    for _ in range(depth):
        objective = objectives.weighted_sum({"term": objective})
    for coef in (0.1, 0.4, 0.1):
        term.coef = coef
        found, metrics = slope(objective)
        assert found == pytest.approx(coef)
        assert metrics["term/" * depth + "coef"] == pytest.approx(coef)


class Weight:
    """A schedule that holds its value."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value


def test_an_object_that_is_a_schedule_and_changes_is_seen():
    weight = Weight(1.0)
    both = objectives.weighted_sum({"ours": Plain(1.0)}, {"ours": weight}).at_step(0)
    assert slope(both)[0] == 1.0
    weight.value = 3.0
    assert slope(both)[0] == 3.0


@jax.tree_util.register_pytree_node_class
class Structured:
    """A user's pytree, whose structure holds an object that JAX compares by its identity."""

    def __init__(self, scale, settings):
        self.scale = scale
        self.settings = settings

    def tree_flatten(self):
        return (self.scale,), self.settings

    @classmethod
    def tree_unflatten(cls, settings, children):
        return cls(*children, settings)

    def __call__(self, data, logprobs):
        return self.scale * self.settings.coef * logprobs.total(), {}


def test_an_object_in_the_structure_of_a_pytree_that_changes_is_seen():
    settings = Controller(1.0)
    objective = Structured(2.0, settings)
    assert slope(objective)[0] == 2.0
    settings.coef = 3.0
    assert slope(objective)[0] == 6.0
    before = gradients.stats()
    assert slope(Structured(4.0, settings))[0] == 12.0
    assert gradients.stats() == before  # its number is traced


def test_a_module_within_a_package_that_changes_is_seen(monkeypatch):
    package, settings = types.ModuleType("package"), types.ModuleType("package.settings")
    package.__file__ = settings.__file__ = "/home/me/package.py"
    package.settings, settings.parent, settings.scale = settings, package, 1.0

    def objective(data, logprobs):
        return package.settings.scale * logprobs.total(), {}

    assert slope(objective)[0] == 1.0
    settings.scale = 2.0
    assert slope(objective)[0] == 2.0
    monkeypatch.setitem(globals(), "PACKAGE", package)

    def by_global(data, logprobs):
        return PACKAGE.settings.scale * logprobs.total(), {}  # noqa: F821

    assert slope(by_global)[0] == 2.0
    settings.scale = 5.0
    assert slope(by_global)[0] == 5.0


@pytest.mark.parametrize("make", [list, collections.deque, bytearray])
def test_a_container_that_changes_is_seen(make):
    table = make([1])

    def objective(data, logprobs):
        return table[0] * logprobs.total(), {}

    assert slope(objective)[0] == 1.0
    table[0] = 2
    assert slope(objective)[0] == 2.0


@jax.jit
def jitted_helper(value):
    return SCALE * value


def loop_with_helper(data, logprobs):
    return sum(jitted_helper(row.sum()) for row in logprobs), {}


@pytest.mark.filterwarnings("ignore:.*takes rows one by one")
@pytest.mark.parametrize(
    "objective", [lambda data, logprobs: (jitted_helper(logprobs.total()), {}), loop_with_helper]
)
def test_a_jitted_function_that_an_objective_calls_is_traced_anew(objective, monkeypatch):
    for scale, sizes in ((1.0, (3, 2)), (3.0, (3, 2)), (1.0, (3, 2)), (3.0, (3,)), (1.0, (3,))):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert slope(objective, sizes)[0] == scale


def body(carry, value):
    return carry + SCALE * value, None


def branch(value):
    return SCALE * value


@jax.checkpoint
def rematerialized(value):
    return SCALE * value


mapped = jax.vmap(branch)


KEPT_TRACES = {
    "scan": lambda values: jax.lax.scan(body, 0.0, values)[0],
    "cond": lambda values: jax.lax.cond(values.sum() < 0, branch, branch, values.sum()),
    "switch": lambda values: jax.lax.switch(0, [branch, branch], values.sum()),
    "checkpoint": lambda values: rematerialized(values.sum()),
    "vmap": lambda values: mapped(values).sum(),
}
# By default each is tried once, and those that follow each other differ in whether they loop.
WITH_AND_WITHOUT_LOOP = [
    (name, loop)
    for number, name in enumerate(KEPT_TRACES)
    for loop in (False, True)
    if THOROUGH or loop == (number % 2 == 1)
]


@pytest.mark.filterwarnings("ignore:.*takes rows one by one")
@pytest.mark.parametrize(("name", "loop"), WITH_AND_WITHOUT_LOOP)
def test_a_function_of_which_jax_keeps_a_trace_is_traced_anew(name, loop, monkeypatch):
    def objective(data, logprobs):
        sums = jnp.stack([row.sum() for row in logprobs]) if loop else logprobs.sum()
        return KEPT_TRACES[name](sums), {}

    for scale, sizes in ((1.0, (3, 2)), (3.0, (3, 2)), (1.0, (3, 2)), (3.0, (3,)), (1.0, (3,))):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert slope(objective, sizes)[0] == scale


class Settings(dict):
    pass


class Numbers(list):
    pass


class Real(float):
    pass


class Text(str):
    __slots__ = ("scale",)


class Array(np.ndarray):
    pass


class Kind(type):
    scale = 1.0


class Private:
    __slots__ = ("__scale",)

    @property
    def scale(self):
        return self.__scale

    @scale.setter
    def scale(self, value):
        self.__scale = value


@pytest.mark.parametrize(
    "holder",
    [
        *(Settings(), Numbers([1]), Real(1), Text("a"), np.ones(1).view(Array)),
        *(Kind("K", (), {}), Private(), threading.local()),
    ],
    ids=lambda holder: type(holder).__name__,
)
def test_an_attribute_beside_a_value_that_changes_is_seen(holder):
    def objective(data, logprobs):
        return holder.scale * logprobs.total(), {}

    owner = Kind if isinstance(holder, Kind) else holder
    for scale in (1.0, 2.0, 1.0):
        owner.scale = scale
        assert slope(objective)[0] == scale


class Member(enum.Enum):
    HELD = {"scale": 1.0}  # noqa: RUF012
    NAMED = "named"


class Owner:
    scale = 1.0


owner = Owner()
weak = weakref.ref(owner)
variable = contextvars.ContextVar("scale")
single = ctypes.c_double(1.0)
shared = multiprocessing.Value("d", 1.0)


def imports_a_module(data, logprobs):
    import settings_of_a_test

    return settings_of_a_test.scale * logprobs.total(), {}


def imports_a_name(data, logprobs):
    from settings_of_a_test import scale

    return scale * logprobs.total(), {}


def by_an_attribute_of_a_made_name(data, logprobs):
    import settings_of_a_test

    return getattr(settings_of_a_test, "_".join(["by", "name"]))["scale"] * logprobs.total(), {}


def by_the_variables_of_a_module(data, logprobs):
    import settings_of_a_test

    return vars(settings_of_a_test)["sca" + "le"] * logprobs.total(), {}


def by_a_module_in_a_list(data, logprobs):
    return kept_modules[0].scale * logprobs.total(), {}


kept_modules = [types.ModuleType("held_by_a_list")]
kept_modules[0].__file__ = __file__


def changed(scale, monkeypatch):
    """Writes a scale to every place that the objectives of the next test read."""
    name = "settings_of_a_test"
    module = sys.modules.get(name, types.ModuleType(name))
    module.__file__, module.scale, module.by_name = __file__, scale, {"scale": scale}
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("SCALE_OF_A_TEST", str(scale))
    monkeypatch.setitem(globals(), "SCALE", scale)
    variable.set(scale)
    kept_modules[0].scale = scale
    Member.HELD.value["scale"] = Member.NAMED.scale = owner.scale = scale
    single.value = shared.value = scale


@pytest.mark.parametrize(
    "objective",
    [
        imports_a_module,
        imports_a_name,
        lambda data, logprobs: (globals()["SCALE"] * logprobs.total(), {}),
        lambda data, logprobs: (globals()["SCALE_"[:-1]] * logprobs.total(), {}),
        by_an_attribute_of_a_made_name,
        by_the_variables_of_a_module,
        lambda data, logprobs: (float(os.environ["SCALE_OF_A_TEST"]) * logprobs.total(), {}),
        lambda data, logprobs: (float(os.getenv("SCALE_OF_A_TEST")) * logprobs.total(), {}),
        lambda data, logprobs: (variable.get() * logprobs.total(), {}),
        lambda data, logprobs: (Member.HELD.value["scale"] * logprobs.total(), {}),
        lambda data, logprobs: (Member.NAMED.scale * logprobs.total(), {}),
        lambda data, logprobs: (weak().scale * logprobs.total(), {}),
        by_a_module_in_a_list,
        lambda data, logprobs: (single.value * logprobs.total(), {}),
        lambda data, logprobs: (shared.value * logprobs.total(), {}),
    ],
)
def test_a_value_outside_of_all_objects_that_changes_is_seen(objective, monkeypatch):
    for scale in (1.0, 2.0, 1.0):
        changed(scale, monkeypatch)
        assert slope(objective)[0] == scale


@pytest.mark.parametrize(
    "objective",
    [
        lambda data, logprobs: (eval("SCALE") * logprobs.total(), {}),
        lambda data, logprobs: (sys.modules[__name__].SCALE * logprobs.total(), {}),
        lambda data, logprobs: (importlib.import_module(__name__).SCALE * logprobs.total(), {}),
    ],
)
def test_a_value_that_cannot_be_followed_is_said(objective, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    with pytest.warns(UserWarning, match=r"<lambda> finds values by eval.*Name the variable"):
        assert slope(objective)[0] == 1.0


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_arrays_of_small_dtypes_are_compared(dtype):
    scales = [np.array([1.0], dtype)]

    def objective(data, logprobs):
        return float(scales[0][0]) * logprobs.total(), {}

    assert slope(objective)[0] == 1.0
    other = np.dtype(ml_dtypes.float8_e5m2 if scales[0].itemsize == 1 else np.float16)
    scales[0] = scales[0].view(other)  # the same bytes
    assert slope(objective)[0] == float(scales[0][0]) != 1.0


@pytest.mark.parametrize(
    "objective",
    [
        lambda data, logprobs: (np.random.uniform() * logprobs.total(), {}),
        lambda data, logprobs: (random.betavariate(1, 1) * logprobs.total(), {}),
        lambda data, logprobs: (logprobs.total(), {"seconds": time.monotonic()}),
    ],
)
def test_a_function_that_gives_another_value_at_each_call_is_named_once(objective):
    name = set(objective.__code__.co_names).intersection(("uniform", "betavariate", "monotonic"))
    with pytest.warns(UserWarning, match=f"calls {name.pop()}, which gives another value"):
        identify(objective)
    identify(objective)  # warnings are errors here


def test_random_numbers_of_jax_are_no_concern():
    import jax as np  # a name that NumPy has elsewhere

    # warnings are errors here
    identify(lambda data, logprobs: (np.random.uniform(np.random.key(0)) * logprobs.total(), {}))


def test_functions_of_one_factory_are_told_apart_by_their_closures():
    def make(scale):
        return lambda data, logprobs: (scale * logprobs.total(), {})

    for scale in (1.0, 2.0, 1.0):
        assert slope(make(scale))[0] == scale
    before = gradients.stats()
    slope(make(2.0))
    assert gradients.stats() == before


def test_partials_and_bound_methods_are_compared_by_their_parts():
    class Recipe:
        scale = 2

        def loss(self, data, logprobs):
            return self.scale * logprobs.total(), {}

    def scaled(scale, data, logprobs):
        return scale * logprobs.total(), {}

    recipe = Recipe()
    assert slope(recipe.loss)[0] == 2.0
    recipe.scale = 3
    assert slope(recipe.loss)[0] == 3.0
    Recipe.scale = 5
    del recipe.scale
    assert slope(recipe.loss)[0] == 5.0
    for scale in (1.0, 4.0):
        assert slope(functools.partial(scaled, scale))[0] == scale


def test_a_jitted_objective_is_looked_into(monkeypatch):
    @jax.jit
    def objective(data, logprobs):
        return SCALE * logprobs.total(), {}

    for scale in (1.0, 3.0):
        monkeypatch.setitem(globals(), "SCALE", scale)
        assert slope(objective)[0] == scale


def test_what_cannot_be_compared_is_said_once():
    generator = np.random.default_rng(0)

    def objective(data, logprobs):
        return logprobs.total() + 0 * generator.bit_generator.state["state"]["inc"] % 1, {}

    with pytest.warns(UserWarning, match="Generator, which shows no value that can be compared"):
        identify(objective)
    identify(objective)  # warnings are errors here


def test_a_plan_belongs_to_the_number_of_datums_that_its_trace_saw():
    def objective(data, logprobs):
        if len(data) < 2:
            return -logprobs.total(), {}
        return (logprobs.sum() ** 2).sum() + (logprobs * data["extra"]).total(), {}

    for sizes, expected in (((3,), -1.0), ((3, 2), -6.0 + 7.0), ((2,), -1.0)):
        extra = np.full(3, 7.0, np.float32)
        assert slope(objective, sizes, extra=extra)[0] == pytest.approx(expected)
    from mintjax.gradients.evaluate import constant_logprob_grads

    assert constant_logprob_grads(objective, batch((3,), extra=extra)[0]) is not None
    assert constant_logprob_grads(objective, batch((3, 2), extra=extra)[0]) is None


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_is_refused_although_its_gradient_is(value):
    def objective(data, logprobs):
        return logprobs.total() + value, {}

    with pytest.raises(NonFiniteError, match=r"the loss of .* is (nan|inf)"):
        slope(objective)


def test_the_input_that_is_not_finite_is_named_and_not_its_victim():
    def objective(data, logprobs):
        return jnp.log(logprobs.sum().sum() ** 2), {}

    data, logprobs = batch((3, 2, 2, 2))
    logprobs[3][1] = -np.inf
    with pytest.raises(NonFiniteError, match="the logprob at datum 3, position 1, is -inf") as told:
        value_and_logprob_grads(objective, data, logprobs)
    assert (told.value.datum, told.value.position) == (3, 1)


def needs_a_float(data, logprobs):
    loss = logprobs.total()
    return loss, {"loss": float(loss)}


def needs_an_item(data, logprobs):
    return logprobs.total(), {"loss": logprobs.total().item()}


def branches(data, logprobs):
    if logprobs.total() > 0:
        return logprobs.total(), {}
    return -logprobs.total(), {}


def asks_numpy(data, logprobs):
    return logprobs.total(), {"mean": np.mean(np.asarray(logprobs.sum()))}


@pytest.mark.parametrize(
    ("objective", "line", "advice"),
    [
        (needs_a_float, "float(loss)", "Return it as a metric"),
        (needs_an_item, ".item()", "Return it as a metric"),
        (branches, "if logprobs.total() > 0:", "jnp.where"),
        (asks_numpy, "np.asarray(logprobs.sum())", "Use jnp in place of np"),
    ],
)
def test_what_cannot_be_traced_is_told_with_the_line_and_a_way_out(objective, line, advice):
    with pytest.raises(ObjectiveError) as told:
        slope(objective)
    message = str(told.value)
    assert __file__ in message
    assert line in message
    assert advice in message
    assert isinstance(told.value.__cause__, Exception)
