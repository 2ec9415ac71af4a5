"""README's figure of how mintjax is built: the rooms, and one step's path through them.

    python -m docs.house

Writes ``docs/figures/house.svg``. Rooms are those of README's table, arrows are the imports of the
code, numbers what one step on the embedded trainer was seen to enter; only the columns are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from itertools import groupby
from textwrap import wrap

from docs.rooms import ROOT, Room, between_rooms, reduced, rooms
from docs.walk import Visit, one_step

FIGURE = ROOT / "docs" / "figures" / "house.svg"

COLUMNS = {
    "errors.py": 1,
    "losses/": 0,
    "ragged.py": 1,
    "types.py": 1,
    "objectives/": 1,
    "gradients.py": 2,
    "testing/": 2,
    "surrogates.py": 3,
    "custom_step.py": 3,
    "wire.py": 4,
    "client/": 3,
    "mint.py": 5,
    "bridge.py": 5,
    "__init__.py": 4,
    "local/": 0,
    "bench/": 2,
    "demo.py": 1,
    "cli/": 1,
}
"""Where rooms stand, from the left; below one that is far above an importer nothing may stand."""

REQUESTS = {
    "forward": ("the forward pass", "#1f6fb2"),
    "forward_backward": ("the gradient, the backward pass", "#c2410c"),
    "optim_step": ("the optimizer step", "#15803d"),
}

WIDTH, HEIGHT = 154, 58  # of a box
ACROSS, DOWN = 170, 100  # from one box to the next
EDGE = 14
LETTERS, LINES = 26, 2  # of the words in a box, for the widest of fonts
INK, GREY, LINE = "#111827", "#4b5563", "#8492a6"


def draw(table: list[Room], graph: dict[str, set[str]], path: list[Visit]) -> str:
    """The figure, as SVG.

    Args:
        table: the rooms, those that others import from first.
        graph: for each room the names of those it imports from.
        path: of one step.

    Raises:
        ValueError: an arrow would run through a room, or words do not fit into one.
    """
    layers: dict[str, int] = {}
    for room in table:
        layers[room.name] = max((layers[other] + 1 for other in graph[room.name]), default=0)
    at = {name: (EDGE + ACROSS * COLUMNS[name], EDGE + DOWN * layers[name]) for name in layers}
    width = max(x for x, _ in at.values()) + WIDTH + EDGE
    height = max(y for _, y in at.values()) + HEIGHT + EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif" '
        f'font-size="11" fill="{INK}">',
        "<title>How mintjax is built, and one step's path through it</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="white"/>',
        *_arrows(reduced(graph), at),
        *(line for room in table for line in _box(room, at[room.name], path)),
        *_key(path, EDGE + 2 * ACROSS + 20, EDGE + 14),
        f'<text x="{width - EDGE}" y="{height - EDGE - 4}" fill="{GREY}" text-anchor="end">'
        "Arrows lead to what is imported; those that follow from others are left out.</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrows(graph: dict[str, set[str]], at: dict[str, tuple[int, int]]) -> Iterator[str]:
    bent: dict[int, set[str]] = {}  # which rooms' arrows change columns above which layer
    for name, others in graph.items():
        bent.setdefault(at[name][1], set()).update(o for o in others if at[o][0] != at[name][0])
    for name, others in graph.items():
        left, y = at[name]
        lanes = sorted(bent[y], key=lambda other: at[other])
        for other in sorted(others):
            to_left, to_top = at[other]
            for between, (x, top) in at.items():
                if x == to_left and to_top < top < y:
                    raise ValueError(f"{name} -> {other} runs through {between}: see COLUMNS")
            x = left + WIDTH // 2 + 9 * _rank(to_left - left, [at[o][0] - left for o in others])
            to_x = to_left + WIDTH // 2
            head = to_top + HEIGHT
            way = f"M{x} {y}"
            if x != to_x:
                lane = y - 6 - (DOWN - HEIGHT - 16) * (lanes.index(other) + 1) // (len(lanes) + 1)
                turn = 5 if to_x > x else -5
                way += f"V{lane + 5}q0 -5 {turn} -5H{to_x - turn}q{turn} 0 {turn} -5"
            yield (
                f'<path d="{way}V{head + 6}" fill="none" stroke="{LINE}" stroke-width="1.3"/>'
                f'<path d="M{to_x} {head + 1}l-4 7h8z" fill="{LINE}"/>'
            )


def _rank(offset: int, offsets: list[int]) -> int:
    """Where an arrow leaves a box: those to the left on the left, the farthest outermost."""
    left = [x for x in sorted(offsets, reverse=True) if x < 0]
    right = [x for x in sorted(offsets) if x > 0]
    if offset == 0:
        return 0
    return right.index(offset) + 1 if offset > 0 else -left.index(offset) - 1


def _box(room: Room, place: tuple[int, int], path: list[Visit]) -> Iterator[str]:
    x, y = place
    visits = [(i, visit.request) for i, visit in enumerate(path, 1) if visit.room == room.name]
    fill, edge = ("#e8f0fa", "#64748b") if visits else ("#f8fafc", "#cbd5e1")
    yield (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{fill}" '
        f'stroke="{edge}"/>'
    )
    yield f'<text x="{x + 8}" y="{y + 20}" font-size="12" font-weight="bold">{room.name}</text>'
    words = wrap(room.holds.partition(";")[0].replace("`", ""), LETTERS)
    if len(words) > LINES:
        raise ValueError(f"what {room.name} holds is too long for its box: {' / '.join(words)}")
    for i, line in enumerate(words):
        yield (
            f'<text x="{x + 8}" y="{y + 36 + 13 * i}" font-size="10.5" fill="{GREY}">'
            f"{escape(line)}</text>"
        )
    for i, (number, request) in enumerate(reversed(visits)):
        yield from _number(number, request, x + WIDTH - 12 - 19 * i, y)


def _key(path: list[Visit], x: int, y: int) -> Iterator[str]:
    yield (
        f'<text x="{x}" y="{y}" font-size="13" font-weight="bold">'
        "One step with a loss of your own, and what it enters on its way to the trainer</text>"
    )
    numbered = enumerate(path, 1)
    for column, (request, visits) in enumerate(groupby(numbered, lambda pair: pair[1].request)):
        words, colour = REQUESTS[request]
        left = x + 240 * column
        yield (f'<text x="{left}" y="{y + 26}" font-weight="bold" fill="{colour}">{words}</text>')
        for line, (number, visit) in enumerate(visits, 2):
            at = y + 10 + 20 * line
            yield from _number(number, request, left + 9, at - 4)
            yield (
                f'<text x="{left + 24}" y="{at}">{visit.room} '
                f'<tspan fill="{GREY}">{visit.call}</tspan></text>'
            )


def _number(number: int, request: str, x: int, y: int) -> Iterator[str]:
    yield (
        f'<circle cx="{x}" cy="{y}" r="8.5" fill="{REQUESTS[request][1]}" stroke="white"/>'
        f'<text x="{x}" y="{y + 3.5}" font-size="10" font-weight="bold" fill="white" '
        f'text-anchor="middle">{number}</text>'
    )


def figure() -> str:
    """The figure, from the code as it is."""
    table = rooms()
    return draw(table, between_rooms(table), one_step(table))


if __name__ == "__main__":
    FIGURE.write_text(figure())
