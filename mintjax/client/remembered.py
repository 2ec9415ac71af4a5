"""Remembers, in the user's cache folder, what was measured about trainers."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

from mintjax.step.reduction import MEMBERS, Reduction


class Entry(msgspec.Struct):
    """The result of a measurement of one trainer.

    Args:
        per_sequence: a field of :class:`~mintjax.step.reduction.Reduction`.
        per_request: the same.
        per_step: the same.
        date: of the measurement, as ISO 8601 has it.
    """

    per_sequence: str | None
    per_request: str | None
    per_step: str | None
    date: str


def reduction_of(base_url: str) -> tuple[Reduction, str] | None:
    """Reads what was measured about a trainer, and when; None where nothing is remembered."""
    entry = _read().get(base_url)
    if entry is None:
        return None
    for member in MEMBERS:
        if _fields(member) == (entry.per_sequence, entry.per_request, entry.per_step):
            return member, entry.date
    return None


def remember(base_url: str, reduction: Reduction | None) -> None:
    """Writes what was measured about a trainer; None forgets it.

    A folder that cannot be written to changes nothing else. Where several processes write at once,
    an entry may be lost, which costs a measurement; the file is whole at any time. An entry that no
    longer holds does no harm, because a process confirms what it reads.
    """
    entries = _read()
    entries.pop(base_url, None)
    if reduction is not None:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        entries[base_url] = Entry(*_fields(reduction), today)
    with suppress(OSError, RuntimeError):  # RuntimeError: nobody knows where home is
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(entries))
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)


def cache_file() -> Path:
    """Finds the file: ``mintjax/reductions.json`` in the user's cache folder.

    That is ``XDG_CACHE_HOME``, else where the operating system has it.
    """
    folder = os.environ.get("XDG_CACHE_HOME")
    if not folder and sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA")
    if not folder:
        home = Path.home()
        folder = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(folder) / "mintjax" / "reductions.json"


def _read() -> dict[str, Entry]:
    try:
        return msgspec.json.decode(cache_file().read_bytes(), type=dict[str, Entry])
    except (OSError, RuntimeError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}


def _fields(reduction: Reduction) -> tuple[str | None, str | None, str | None]:
    return reduction.per_sequence, reduction.per_request, reduction.per_step
