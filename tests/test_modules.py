"""README's table of modules is true of the code."""

from graphlib import TopologicalSorter

import pytest

from docs.modules import Module, files, imports, module_of, modules

TABLE = modules()


def test_the_table_is_read():
    text = "\n## How it is built\n\n| m | holds |\n|---|---|\n| `a.py`, `b/` | c; `d` |\n\n## e\n"
    assert modules(text) == [Module(("a.py", "b/"), "c; `d`")]
    assert len(TABLE) > 10


def test_every_file_belongs_to_one_module():
    names = [module_of(path, TABLE).name for path in files().values()]
    assert set(names) == {module.name for module in TABLE}


def test_every_entry_of_the_table_exists():
    paths = files().values()
    for module in TABLE:
        for entry in module.entries:
            assert any(Module((entry,), "").has(path) for path in paths), entry


def test_a_file_that_the_table_lacks_is_told():
    with pytest.raises(ValueError, match=r"mintjax/attic.py belongs to no module"):
        module_of("attic.py", TABLE)


def test_a_module_imports_only_from_those_above_it():
    order = {module.name: i for i, module in enumerate(TABLE)}
    wrong = [
        f"{path} imports {other}, which is in a module below"
        for path, others in imports().items()
        for other in others
        if order[module_of(other, TABLE).name] > order[module_of(path, TABLE).name]
    ]
    assert not wrong  # nor within a function, nor for types alone


def test_no_file_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError
    assert order.index("errors.py") < order.index("client/training.py")


def test_imports_of_every_kind_are_seen():
    found = imports()
    for_types_alone = "protocol/protobuf/messages_pb2.py"
    assert for_types_alone in found["protocol/protobuf/decoding.py"]
    within_a_function = "cli/preference_demo.py"
    assert within_a_function in found["cli/_demo.py"]
    of_a_package = "protocol/messages.py"
    assert of_a_package in found["client/training.py"]
    assert found["errors.py"] == set()
