"""What README says of how mintjax is built is true of the code."""

from graphlib import TopologicalSorter

import pytest

from docs.rooms import Room, files, imports, reduced, room_of, rooms

TABLE = rooms()


def test_the_table_is_read():
    text = (
        "\n## How it is built\n\n| room | holds |\n|---|---|\n| `a.py`, `b/` | c; `d` |\n\n## e\n"
    )
    assert rooms(text) == [Room(("a.py", "b/"), "c; `d`")]
    assert len(TABLE) > 10


def test_every_file_belongs_to_one_room():
    names = [room_of(path, TABLE).name for path in files().values()]
    assert set(names) == {room.name for room in TABLE}


def test_every_entry_of_the_table_exists():
    paths = files().values()
    for room in TABLE:
        for entry in room.entries:
            assert any(Room((entry,), "").has(path) for path in paths), entry


def test_a_file_without_a_room_is_told():
    with pytest.raises(ValueError, match=r"mintjax/attic.py belongs to no room"):
        room_of("attic.py", TABLE)


def test_a_room_imports_only_from_rooms_above_it():
    order = {room.name: i for i, room in enumerate(TABLE)}
    wrong = [
        f"{path} imports {other}, which is in a room below"
        for path, others in imports().items()
        for other in others
        if order[room_of(other, TABLE).name] > order[room_of(path, TABLE).name]
    ]
    assert not wrong  # nor within a function, nor for types alone


def test_no_file_imports_itself_by_way_of_others():
    order = list(TopologicalSorter(imports()).static_order())  # raises CycleError
    assert order.index("errors.py") < order.index("client/training.py")


def test_imports_of_every_kind_are_seen():
    found = imports()
    assert (
        "protocol/protobuf/messages_pb2.py" in found["protocol/protobuf/decoding.py"]
    )  # for types alone
    assert "cli/preference_demo.py" in found["cli/_demo.py"]  # within a function
    assert (
        "protocol/messages.py" in found["client/training.py"]
    )  # from mintjax.protocol import messages
    assert "client/lane.py" in found["client/training.py"]
    assert found["errors.py"] == set()


def test_an_edge_that_follows_from_others_is_left_out():
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a", "c"}}
    assert reduced(graph) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c"}}
