"""In what order one real step goes through the rooms."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mintjax
from docs.rooms import Room, files, room_of
from mintjax import AdamParams, Datum, ModelInput, local, objectives

VALUES = ("errors.py", "ragged.py", "types.py")
"""Rooms of values that every other handles all the time; they are not counted."""

REQUESTS = ("forward", "forward_backward", "optim_step")

_TRAINER, _DOORS = "local/", "local/endpoints.py"


@dataclass(frozen=True)
class Visit:
    """A room is entered.

    Args:
        room: its name.
        call: the function by which.
        request: the request to the trainer that it is part of.
    """

    room: str
    call: str
    request: str


def one_step(rooms: list[Room]) -> list[Visit]:
    """A custom step on the embedded trainer: its two passes, and the optimizer step.

    For each request the rooms that are entered until it has reached the trainer, each where it is
    entered first. What the trainer does is not looked at.
    """

    def preference(data: Any, logprobs: Any) -> Any:  # made anew, so that it is traced anew
        return objectives.bradley_terry()(data, logprobs)

    found: list[list[tuple[str, str]]] = []
    with (
        _watched(rooms, lambda room, call: found[-1].append((room, call))) as watch,
        local.trainer() as service,
    ):
        model = service.create_lora_training_client("mintjax/nano", rank=4, seed=0)
        for submit in (
            lambda: model.forward_backward_custom(_pair(), preference),
            lambda: model.optim_step(AdamParams(learning_rate=1e-3)),
        ):
            found.append([])
            watch(submit).result()
        found.append([])
    return [visit for calls in found for visit in _requests(calls)]


def _pair() -> list[Datum]:
    result: list[Datum] = []
    for answer in ("Blue.", "Loud!"):
        tokens = local.tokenizer.encode(answer)
        weights = [1.0] * (len(tokens) - 1)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        result.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return result


def _requests(calls: list[tuple[str, str]]) -> list[Visit]:
    result: list[Visit] = []
    seen: dict[str, str] = {}
    for room, call in calls:
        if room == _TRAINER:
            seen[room] = call
            result += [Visit(name, by, call) for name, by in seen.items()]
            seen = {}
        elif seen or room != "wire.py":  # which has still to read the last request's answer
            seen.setdefault(room, call)
    return result


@contextmanager
def _watched(
    rooms: list[Room], enter: Callable[[str, str], None]
) -> Generator[Callable[[Callable[[], Any]], Any]]:
    """Report each call from one room into another, in threads to come, and where one is watched.

    Yields:
        Calls a function, watches what it calls in this thread, and returns what it returns.
    """
    package = Path(mintjax.__file__).parent
    names = {f"{package}/{path}": room_of(path, rooms).name for path in files().values()}
    known: set[FrameType] = set()
    watching = False

    def profile(frame: FrameType, event: str, _: object) -> None:
        room = names.get(frame.f_code.co_filename)
        if not watching or event != "call" or room is None or frame in known:
            return
        known.add(frame)  # a coroutine is called once, and then each time it goes on
        callers, call = _rooms_below(frame, names), _name(frame.f_code)
        if _TRAINER in (room, *callers):
            if frame.f_code.co_filename.endswith(_DOORS) and call in REQUESTS:
                enter(_TRAINER, call)
            return
        caller = callers[0] if callers else None
        by_user = caller is None and threading.current_thread() is threading.main_thread()
        if room not in VALUES and room != caller and (caller is not None or by_user):
            enter(room, call)

    def watch(submit: Callable[[], Any]) -> Any:
        nonlocal watching
        watching = True
        sys.setprofile(profile)
        try:
            return submit()
        finally:
            sys.setprofile(None)

    threading.setprofile(profile)
    try:
        yield watch
    finally:
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]


def _rooms_below(frame: FrameType, names: dict[str, str]) -> list[str]:
    result: list[str] = []
    below = frame.f_back
    while below is not None:
        room = names.get(below.f_code.co_filename)
        if room is not None:
            result.append(room)
        below = below.f_back
    return result


def _name(code: CodeType) -> str:
    """The function's name, or that of its class where Python calls it."""
    parts = code.co_qualname.replace(".<locals>", "").split(".")
    return parts[-2] if parts[-1].startswith("__") else parts[-1]
