"""What README says of how mintjax is built is true of the code."""

import xml.etree.ElementTree as ET
from graphlib import TopologicalSorter

import pytest

from docs import house
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
    assert "protobuf/messages_pb2.py" in found["protobuf/decoding.py"]  # for types alone
    assert "demo.py" in found["cli/_demo.py"]  # within a function
    assert "wire.py" in found["client/training.py"]  # from mintjax import wire
    assert "client/lane.py" in found["client/training.py"]
    assert found["errors.py"] == set()


def test_an_edge_that_follows_from_others_is_left_out():
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": {"a", "c"}}
    assert reduced(graph) == {"a": set(), "b": {"a"}, "c": {"b"}, "d": {"c"}}


def test_a_room_in_the_way_of_an_arrow_is_told(monkeypatch):
    table = [Room((name,), "") for name in ("a", "b", "c")]
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}}
    monkeypatch.setattr(house, "COLUMNS", {"a": 0, "b": 1, "c": 0})
    assert house.draw(table, graph, []).count("<rect") == 4
    monkeypatch.setattr(house, "COLUMNS", {"a": 0, "b": 0, "c": 0})
    monkeypatch.setattr(house, "reduced", lambda graph: graph)
    with pytest.raises(ValueError, match="c -> a runs through b"):
        house.draw(table, graph, [])


def test_the_figure_is_that_of_the_code():
    drawn = house.FIGURE.read_text()
    assert drawn == house.figure(), "draw it anew: python -m docs.house"
    assert len(drawn) < 60_000
    assert ET.fromstring(drawn).tag.endswith("svg")
